"""The sections of a recipe: keyword-only dataclasses, a sentence for every field, checked at construction, no torch.

Field metadata says how a change of the field is judged when a stage is run again (vqmosaic/runs/stage_records.py):
a budget may grow, an unrecorded field may change freely, a place may change where the same data lie there, anything else makes it a different run.
"""

from dataclasses import dataclass, field
from typing import Any

from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.recipes.field_types import check_types
from vqmosaic.recipes.prior_sizes import PRESETS, PriorSizes, sizes_of
from vqmosaic.recipes.view_lists import MIRRORED_SETS, VIEW_SETS, checked_views

SOURCES = ("auto", "digits", "folder", "huggingface")
OPTIMIZERS = ("adamw", "muon")
LEARNING_RATE_SCHEDULES = ("cosine", "linear")
GUIDANCE_SCHEDULES = ("constant", "linear", "cosine", "power-cosine")
MIXED_PRECISIONS = ("auto", "no", "bf16", "fp16")


def budget(default: Any) -> Any:
    """A field that may grow when a finished or interrupted stage is run again."""
    return field(default=default, metadata={"judged": "budget"})


def unrecorded(default: Any) -> Any:
    """A field that changes no result, so it may differ when a stage is run again."""
    return field(default=default, metadata={"judged": "unrecorded"})


def place(default: Any) -> Any:
    """A field that says where data lie: it may differ when a stage is run again, if the data are the same."""
    return field(default=default, metadata={"judged": "place"})


@dataclass(kw_only=True)
class DataConfig:
    """Where the images come from and how they are brought to one size."""

    source: str = "auto"
    """digits (scikit-learn's scans), folder (of images), huggingface (a data set by name or local parquet), or auto: by looking at path."""
    path: str | None = place(None)
    """A folder of images (class sub-folders or none), a folder of parquet or arrow files, or a Hugging Face data set name."""
    image_column: str | None = None
    """Hugging Face data only: the column with the images; found by its type if not given."""
    label_column: str | None = None
    """The column with the class labels, found by its type or name in Hugging Face data; for folders, a column of metadata.csv beside the images."""
    use_labels: bool = True
    """Read class labels where there are some; false trains an unconditional prior."""
    train_split: str = "train"
    """The split to train on; for folders, a sub-folder of this or another usual name (Training), if there is one; . is the whole folder."""
    validation_split: str | None = None
    """The split to validate on; if not given and there is none by a usual name, one is cut by a hash of path or row number."""
    validation_fraction: float = 0.05
    """Share of the images that the hash puts into the validation split, where one has to be cut."""
    image_size: int = 32
    """Height and width in pixels to which every image is brought (short side resized, centre cropped)."""
    channels: int = 3
    """3 for RGB, 1 for grey."""
    crop_scale: float = 1.0
    """Training augmentation: smallest side of the random crop relative to the whole short side; 1 crops nothing away."""
    flip: bool = False
    """Training augmentation: mirror left and right half of the time; leave it off where that changes the meaning."""
    shift: int = 0
    """Training augmentation: largest random shift in pixels, in each direction, edges repeated."""
    max_pixels: int = 100_000_000
    """An image with more pixels than this is refused as a decompression bomb."""
    max_unreadable: float = unrecorded(0.01)
    """Share of unreadable images past which a run stops instead of replacing or skipping them."""
    workers: int = unrecorded(1)
    """Processes that decode images beside the training process; 0 decodes in the training process."""
    cache_megabytes: int = unrecorded(512)
    """Decoded training images are kept in memory when all of them fit in this much; 0 keeps none."""

    def __post_init__(self):
        check_types(self, "data")
        check_name("data.source", self.source, SOURCES)
        check_range("data.image_size", self.image_size, at_least=16, at_most=4096)
        if self.channels not in (1, 3):
            raise InputError(f"data.channels is {self.channels}; allowed: 1 (grey) or 3 (RGB).")
        check_range("data.validation_fraction", self.validation_fraction, above=0, below=1)
        check_range("data.crop_scale", self.crop_scale, above=0, at_most=1)
        check_range("data.shift", self.shift, at_least=0, below=self.image_size / 2)
        check_range("data.max_pixels", self.max_pixels, at_least=1)
        check_range("data.max_unreadable", self.max_unreadable, at_least=0, at_most=1)
        check_range("data.workers", self.workers, at_least=0)
        check_range("data.cache_megabytes", self.cache_megabytes, at_least=0)
        if self.source in ("folder", "huggingface") and not self.path:
            raise InputError(f"data.path is not given, and data.source is {self.source!r}; give --data.path a folder of images "
                             "or the name of a Hugging Face data set.")
        if self.source == "digits" and self.path:
            raise InputError(f"data.path is {self.path!r}, but data.source is 'digits', which reads no path; "
                             "set --data.source auto to train on that path, or leave data.path out.")


@dataclass(kw_only=True)
class TrainingConfig:
    """What the training of both stages has in common."""

    max_steps: int | None = budget(10_000)
    """Optimizer steps to train for; none trains by max_minutes alone."""
    max_minutes: float | None = budget(None)
    """Wall-clock budget in minutes. It begins with the first step and includes validation; a resumed run continues with the time left."""
    batch_size: int = 128
    """Images in one optimizer step, over all processes and accumulation steps together."""
    accumulation_steps: int = 1
    """Parts in which each process works through its share of the batch, to save memory."""
    optimizer: str = "adamw"
    """adamw, or muon: orthogonalized momentum for the matrices inside the network, AdamW for the rest, at one learning rate."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    learning_rate_batch: int | None = None
    """The batch size that learning_rate was found for: another batch_size scales it by the square root of their ratio; null takes it as it is."""
    learning_rate_schedule: str = "cosine"
    """How the learning rate falls after its rise: cosine or linear."""
    final_learning_rate: float = 0.05
    """Learning rate at the end, as a share of the peak."""
    warmup_fraction: float = 0.05
    """Share of the training over which the learning rate rises."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decay of AdamW's first and second moment."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on matrices only (no biases, no norms)."""
    gradient_clip: float = 1.0
    """Gradients are scaled down to this norm."""
    weight_ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is what is validated and exported; 0 turns it off."""
    mixed_precision: str = "auto"
    """auto (bf16 where the device has it, else no), no, bf16 or fp16."""
    validate_every: int = 500
    """Steps between validations; the last step is always validated. Under a time budget, one is also due every 4 % of it."""
    validation_images: int = 1000
    """Images of the validation split that each validation looks at; fewer if a time budget is too short for them."""
    max_refused_steps: int = unrecorded(20)
    """Steps with a non-finite loss or gradient, which change nothing, after which the run stops."""
    checkpoint_every: int = unrecorded(500)
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = unrecorded(2)
    """How many of the newest checkpoints are kept."""
    resume: str = unrecorded("auto")
    """auto (the newest complete checkpoint), never (refused while one exists), or the path of a checkpoint."""
    log_every: int = unrecorded(20)
    """Steps between lines in metrics.jsonl."""
    trackers: list[str] = field(default_factory=list, metadata={"judged": "unrecorded"})
    """Trackers of Accelerate that get the same numbers, such as tensorboard or wandb; they must be installed."""

    SECTION = "training"

    def __post_init__(self):
        name = self.SECTION
        check_types(self, name)
        if self.max_steps is None and self.max_minutes is None:
            raise InputError(f"{name}.max_steps and {name}.max_minutes are both none; give at least one of them.")
        if self.max_steps is not None:
            check_range(f"{name}.max_steps", self.max_steps, at_least=1)
        if self.max_minutes is not None:
            check_range(f"{name}.max_minutes", self.max_minutes, above=0)
        for key in ("batch_size", "accumulation_steps", "validate_every", "validation_images", "checkpoint_every", "keep_checkpoints", "log_every"):
            check_range(f"{name}.{key}", getattr(self, key), at_least=1)
        if self.batch_size % self.accumulation_steps:
            raise InputError(f"{name}.batch_size is {self.batch_size} and {name}.accumulation_steps is {self.accumulation_steps}; "
                             "the first must be a multiple of the second.")
        check_name(f"{name}.optimizer", self.optimizer, OPTIMIZERS)
        check_range(f"{name}.learning_rate", self.learning_rate, above=0)
        if self.learning_rate_batch is not None:
            check_range(f"{name}.learning_rate_batch", self.learning_rate_batch, at_least=1)
        check_name(f"{name}.learning_rate_schedule", self.learning_rate_schedule, LEARNING_RATE_SCHEDULES)
        check_range(f"{name}.final_learning_rate", self.final_learning_rate, at_least=0, at_most=1)
        check_range(f"{name}.warmup_fraction", self.warmup_fraction, at_least=0, below=1)
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise InputError(f"{name}.adam_betas is {self.adam_betas}; it must be two numbers of at least 0 and below 1.")
        check_range(f"{name}.weight_decay", self.weight_decay, at_least=0)
        check_range(f"{name}.gradient_clip", self.gradient_clip, above=0)
        check_range(f"{name}.weight_ema_decay", self.weight_ema_decay, at_least=0, below=1)
        check_range(f"{name}.max_refused_steps", self.max_refused_steps, at_least=0)
        check_name(f"{name}.mixed_precision", self.mixed_precision, MIXED_PRECISIONS)

    @property
    def learning_rate_factor(self) -> float:
        """What learning rates are multiplied with: sqrt(batch_size / learning_rate_batch), the rule for Adam (Malladi et al. 2022, 2205.10287)."""
        return 1.0 if self.learning_rate_batch is None else (self.batch_size / self.learning_rate_batch) ** 0.5


@dataclass(kw_only=True)
class TokensConfig:
    """How preprocessing writes token shards."""

    tokenizer: str | None = unrecorded(None)
    """A tokenizer folder made elsewhere; null takes this run's own tokenizer/."""
    views: list[Any] | str = "none"
    """Variants of each training image that are stored: none, flip, shifts (by view_shift pixels, 9 in all), wide-shifts (by up to two such steps, 25
    in all), flip+shifts (18), flip+wide-shifts (50), ten-crop (centre and corners at view_crop_scale, each also mirrored), or a list of records, each
    with any of crop_scale, position, flip and shift."""
    view_shift: int = 1
    """Pixels by which the shifts views move the image, in each of eight directions."""
    view_crop_scale: float = 0.875
    """Side of the crops of ten-crop relative to the short side of the image."""
    images_per_shard: int = 1000
    """Source images in one shard; best a multiple of batch_size, since the last batch of each is filled up to that."""
    batch_size: int = 64
    """Images encoded at a time; the shape never varies, so encoding again gives the same bytes."""
    threads: int = 2
    """CPU threads of each process; fixed, since another number may round a latent across a code's border."""

    def __post_init__(self):
        check_types(self, "tokens")
        if isinstance(self.views, list):
            self.views = checked_views("tokens.views", self.views)
        else:
            check_name("tokens.views, unless it is a list of records,", self.views, VIEW_SETS)
        check_range("tokens.view_crop_scale", self.view_crop_scale, above=0, at_most=1)
        for key in ("view_shift", "images_per_shard", "batch_size", "threads"):
            check_range(f"tokens.{key}", getattr(self, key), at_least=1)

    @property
    def mirrors(self) -> bool:
        """True where one of the stored views is a mirror image."""
        return any(view["flip"] for view in self.views) if isinstance(self.views, list) else self.views in MIRRORED_SETS


@dataclass(kw_only=True)
class PriorConfig:
    """The stage 2 network: a transformers causal language model, stock or our own, over the vocabulary of tokens and classes."""

    architecture: str = "llama"
    """grid_transformer (our own), or a model type of transformers: llama, gpt2, qwen3 or any other causal language model."""
    preset: str | None = None
    """A named size: tiny (about 5M parameters; what null means), B (86M with 1,024 codes), L, XL or XXL."""
    width: int | None = None
    """Width of the residual stream; null takes the preset's."""
    layers: int | None = None
    """Number of transformer layers; null takes the preset's."""
    heads: int | None = None
    """Attention heads, of which width must be a multiple; null takes the preset's."""
    dropout: float = 0.1
    """Dropout on the embedded tokens, on what each attention and feed-forward block adds and, in stock models, on attention weights."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further entries of the model's transformers configuration, as transformers names them; of grid_transformer also embedding_blocks, how many of
    its last blocks have embeddings of all ids (null: as many as half of its feed-forward blocks pay for)."""

    def __post_init__(self):
        check_types(self, "prior")
        if self.preset is not None:
            check_name("prior.preset", self.preset, tuple(PRESETS))
            if None not in (self.width, self.layers, self.heads):
                raise InputError(f"prior.preset is {self.preset!r}, and prior.width {self.width}, prior.layers {self.layers} and prior.heads "
                                 f"{self.heads} are given as well, so nothing of it would be used; leave it out, or set those to null.")
        for key, value in self.sizes._asdict().items():
            check_range(f"prior.{key}", value, at_least=1)
        if self.sizes.width % self.sizes.heads:
            raise InputError(f"prior.width is {self.sizes.width} and prior.heads is {self.sizes.heads}; the first must be a multiple of the second.")
        check_range("prior.dropout", self.dropout, at_least=0, below=1)

    @property
    def sizes(self) -> PriorSizes:
        """The sizes that are given, and for the others those of the preset."""
        return sizes_of(self.preset, self.layers, self.width, self.heads)


@dataclass(kw_only=True)
class PriorTrainingConfig(TrainingConfig):
    """How stage 2 is trained."""

    tokens: str | None = unrecorded(None)
    """A folder of token shards made elsewhere; null takes this run's own tokens/."""
    label_drop: float = 0.1
    """Share of the samples whose class is replaced by the null class, which guidance needs; 0 makes guidance impossible."""
    token_noise: float = 0.0
    """Share of the input tokens that is replaced by random codes in training. The targets stay unchanged. Delays overfitting to few images."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator, added to the loss so that logits do not drift; 1e-4 is usual, 0 is off."""
    activation_checkpointing: bool = unrecorded(False)
    """Keep only what goes into each transformer layer and compute the rest again in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile each transformer layer with torch.compile (of a grid_transformer in bf16 on a CPU, what lies between its products): takes up to a
    minute or so at each start, so measure whether it pays back on your machine."""
    first_loss_tolerance: float = unrecorded(0.5)
    """How far, in nats per token, the loss of a fresh prior on its first batch may be from ln(codes) before the run is stopped."""
    window_shards: int = 16
    """Shards among which samples are shuffled; bounds the memory of the reader."""
    export: str = "best"
    """Which weights become prior/: best (lowest validation NLL) or last; the other is kept beside the checkpoints."""

    SECTION = "prior_training"

    def __post_init__(self):
        super().__post_init__()
        check_range("prior_training.label_drop", self.label_drop, at_least=0, at_most=1)
        check_range("prior_training.token_noise", self.token_noise, at_least=0, below=1)
        check_range("prior_training.z_loss", self.z_loss, at_least=0)
        check_range("prior_training.first_loss_tolerance", self.first_loss_tolerance, above=0)
        check_range("prior_training.window_shards", self.window_shards, at_least=1)
        check_name("prior_training.export", self.export, ("best", "last"))


@dataclass(kw_only=True)
class SamplingConfig:
    """How tokens are drawn from the prior; a bundle carries it as the recommended settings."""

    guidance_scale: float = 1.0
    """Classifier-free guidance: logits = null + scale * (conditional - null); 1 is off."""
    guidance_schedule: str = "constant"
    """How the scale goes from 1 at the first token to guidance_scale at the last, 1 + (guidance_scale - 1) * f(p) with p = t / (T - 1): constant
    (f = 1 everywhere), linear (p), cosine ((1 - cos(pi p)) / 2) or power-cosine ((1 - cos(pi p^guidance_power)) / 2; MDTv2, Gao et al. 2023)."""
    guidance_power: float = 2.75
    """Of the power-cosine schedule: the larger, the later guidance sets in."""
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """[start, stop] as shares of the T tokens outside of which guidance is off (Kynkaanniemi et al. 2024); after stop, a token costs half as much."""
    temperature: float = 1.0
    """Divides the logits; 0, or any value below 1e-6, takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens are drawn from; 0 is off."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability are drawn from; 1 is off."""
    min_p: float = 0.0
    """Only tokens of at least this share of the likeliest one's probability are drawn from (Nguyen et al. 2024); 0 is off."""

    def __post_init__(self):
        check_types(self, "sampling")
        check_range("sampling.guidance_scale", self.guidance_scale, at_least=0)
        check_name("sampling.guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)
        check_range("sampling.guidance_power", self.guidance_power, above=0)
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise InputError(f"sampling.guidance_interval is {self.guidance_interval}; it must be two numbers [start, stop] with "
                             "0 <= start <= stop <= 1, such as [0.1, 0.8].")
        check_range("sampling.temperature", self.temperature, at_least=0)
        check_range("sampling.top_k", self.top_k, at_least=0)
        check_range("sampling.top_p", self.top_p, above=0, at_most=1)
        check_range("sampling.min_p", self.min_p, at_least=0, at_most=1)
