"""Recipe sections for tokens and prior, as keyword-only dataclasses. Constructors check the values. Loads no torch.

The docstring under a field is its help text. Field metadata says whether a field may change when a stage is run again
(vqmosaic/runs/stage_records.py): a budget may grow, an unrecorded field may change freely, a place may change if the data is the same. Any other
change makes it a different run.
"""

from dataclasses import dataclass, field
from typing import Any

from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.recipes.data_section import DataConfig as DataConfig  # re-exported
from vqmosaic.recipes.field_types import budget, check_types, checked_names, checked_numbers, unrecorded
from vqmosaic.recipes.prior_sizes import PRESETS, PriorSizes, resolve_sizes
from vqmosaic.recipes.sampling_section import SamplingConfig as SamplingConfig  # re-exported
from vqmosaic.recipes.view_lists import MIRRORED_SETS, VIEW_SETS, checked_views

OPTIMIZERS = ("adamw", "muon")
LEARNING_RATE_SCHEDULES = ("cosine", "linear")
MIXED_PRECISIONS = ("auto", "no", "bf16", "fp16")


@dataclass(kw_only=True)
class TrainingConfig:
    """Training settings that both stages share."""

    max_steps: int | None = budget(10_000)
    """Number of optimizer steps; null trains until max_minutes is over."""
    max_minutes: float | None = budget(None)
    """Wall-clock budget in minutes. It starts with the first step and includes validation. A resumed run continues with the time left."""
    batch_size: int = 128
    """Images per optimizer step, summed over all processes and accumulation steps."""
    accumulation_steps: int = 1
    """Number of parts into which each process splits its share of the batch, to save memory."""
    optimizer: str = "adamw"
    """adamw, or muon: orthogonalized momentum for the matrices inside the network, AdamW for the rest, with the same learning rate."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    learning_rate_batch: int | None = None
    """Batch size for which learning_rate was tuned. The rate is scaled by sqrt(batch_size / learning_rate_batch); null turns scaling off."""
    learning_rate_schedule: str = "cosine"
    """Decay of the learning rate after the warmup: cosine or linear."""
    final_learning_rate: float = 0.05
    """Learning rate at the end, as a fraction of the peak."""
    warmup_fraction: float = 0.05
    """Fraction of the training over which the learning rate rises."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decay rates of AdamW's first and second moments."""
    weight_decay: float = 0.0
    """AdamW's weight decay. It applies to matrices only, not to biases and norms."""
    gradient_clip: float = 1.0
    """Largest norm of the gradients. Larger gradients are scaled down to it."""
    weight_ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is validated and exported; 0 turns it off."""
    mixed_precision: str = "auto"
    """auto (bf16 if the device supports it, else no), no, bf16 or fp16."""
    validate_every: int = 500
    """Steps between validations. The last step is always validated. With a time budget, a validation also runs every 4 % of it."""
    validation_images: int = 1000
    """Images per validation, from the validation split; fewer if a time budget is too short for them."""
    max_refused_steps: int = unrecorded(20)
    """Largest number of steps with a non-finite loss or gradient. Such steps are skipped. With more of them, the run stops."""
    checkpoint_every: int = unrecorded(500)
    """Steps between checkpoints. The last step always writes one."""
    keep_checkpoints: int = unrecorded(2)
    """Number of newest checkpoints to keep."""
    resume: str = unrecorded("auto")
    """auto (the newest complete checkpoint), never (an error if there is one), or the path of a checkpoint."""
    log_every: int = unrecorded(20)
    """Steps between lines in metrics.jsonl."""
    trackers: list[str] = field(default_factory=list, metadata={"change_policy": "unrecorded"})
    """Accelerate trackers that get the same numbers, such as tensorboard or wandb. They must be installed."""

    SECTION = "training"

    def __post_init__(self):
        name = self.SECTION
        check_types(self, name)
        if self.max_steps is None and self.max_minutes is None:
            raise InputError(f"{name}.max_steps and {name}.max_minutes are both null; set at least one of them.")
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
            raise InputError(f"{name}.adam_betas is {self.adam_betas}; it must be two numbers, each at least 0 and below 1.")
        check_range(f"{name}.weight_decay", self.weight_decay, at_least=0)
        check_range(f"{name}.gradient_clip", self.gradient_clip, above=0)
        check_range(f"{name}.weight_ema_decay", self.weight_ema_decay, at_least=0, below=1)
        check_range(f"{name}.max_refused_steps", self.max_refused_steps, at_least=0)
        check_name(f"{name}.mixed_precision", self.mixed_precision, MIXED_PRECISIONS)

    @property
    def learning_rate_factor(self) -> float:
        """Factor for all learning rates: sqrt(batch_size / learning_rate_batch), the rule for Adam (Malladi et al. 2022, 2205.10287)."""
        return 1.0 if self.learning_rate_batch is None else (self.batch_size / self.learning_rate_batch) ** 0.5


@dataclass(kw_only=True)
class TokensConfig:
    """Settings of the preprocessing that writes token shards."""

    tokenizer: str | None = unrecorded(None)
    """A tokenizer folder from another run or source; null uses this run's tokenizer/."""
    views: list[Any] | str = "none"
    """Stored variants of each training image: none, flip, shifts (by view_shift pixels, 9 in all), wide-shifts (by up to two such steps, 25 in all),
    flip+shifts (18), flip+wide-shifts (50), ten-crop (centre and corners at view_crop_scale, each also mirrored), or a list of records, each with any
    of crop_scale, position, flip and shift."""
    view_shift: int = 1
    """Pixels by which shifts and wide-shifts move the image in each of eight directions."""
    view_crop_scale: float = 0.875
    """Side of the ten-crop crops, relative to the largest crop of the proportions of data.image_size."""
    images_per_shard: int = 1000
    """Source images per shard. Best a multiple of batch_size, because the last batch of each shard is padded to batch_size."""
    batch_size: int = 64
    """Images encoded at a time. All batches have this size, so encoding again gives the same bytes."""
    threads: int = 2
    """CPU threads per process. The number is fixed because rounding depends on it, and rounding can change the nearest code."""

    def __post_init__(self):
        check_types(self, "tokens")
        if isinstance(self.views, list):
            self.views = checked_views("tokens.views", self.views)
        else:
            check_name("tokens.views (if not a list of records)", self.views, VIEW_SETS)
        check_range("tokens.view_crop_scale", self.view_crop_scale, above=0, at_most=1)
        for key in ("view_shift", "images_per_shard", "batch_size", "threads"):
            check_range(f"tokens.{key}", getattr(self, key), at_least=1)

    @property
    def mirrors(self) -> bool:
        """Whether one of the stored views is a mirror image."""
        return any(view["flip"] for view in self.views) if isinstance(self.views, list) else self.views in MIRRORED_SETS


@dataclass(kw_only=True)
class PriorConfig:
    """The stage 2 network: a causal language model over the vocabulary of tokens and classes."""

    architecture: str = "llama"
    """grid_transformer (of this project), or a model type of transformers: llama, gpt2, qwen3 or any other causal language model."""
    preset: str | None = None
    """A named size: tiny (about 5M parameters; the default), B (86M with 1,024 codes in raster order), L, XL or XXL."""
    width: int | None = None
    """Width of the residual stream; null uses the preset's."""
    layers: int | None = None
    """Number of transformer layers; null uses the preset's."""
    heads: int | None = None
    """Number of attention heads, which must divide width; null uses the preset's."""
    dropout: float = 0.1
    """Dropout on token embeddings, on the output of each attention and feed-forward block and, in transformers models, on attention weights."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further entries of the model's transformers configuration, under their names in transformers. grid_transformer also has embedding_blocks, the
    number of last blocks with embeddings of all ids (null: as many as can replace about half of the feed-forward parameters) and, unless
    prior_training.order is raster, query_blocks, the number of last blocks that are queries for tokens (by default two thirds of them),
    query_embeddings, whether they have embeddings of all ids (true or false; by default if there are at most 4 times as many as the width), and
    query_intermediate_size, the width of their feed-forward layers."""

    def __post_init__(self):
        check_types(self, "prior")
        if self.preset is not None:
            check_name("prior.preset", self.preset, tuple(PRESETS))
            if None not in (self.width, self.layers, self.heads):
                raise InputError(f"prior.preset is {self.preset!r}, but prior.width {self.width}, prior.layers {self.layers} and prior.heads "
                                 f"{self.heads} replace all of its sizes; remove the preset, or set some of them to null.")
        for key, value in self.sizes._asdict().items():
            check_range(f"prior.{key}", value, at_least=1)
        if self.sizes.width % self.sizes.heads:
            raise InputError(f"prior.width is {self.sizes.width} and prior.heads is {self.sizes.heads}; the first must be a multiple of the second.")
        check_range("prior.dropout", self.dropout, at_least=0, below=1)

    @property
    def sizes(self) -> PriorSizes:
        """The given sizes, and those of the preset for the others."""
        return resolve_sizes(self)


@dataclass(kw_only=True)
class PriorTrainingConfig(TrainingConfig):
    """Settings of the stage 2 training."""

    tokens: str | None = unrecorded(None)
    """A folder of token shards from another run or source; null uses this run's tokens/."""
    label_drop: float = 0.1
    """Fraction of the samples whose class is replaced by the null class, and all other given segments by null ids. Guidance needs this."""
    drop_rates: dict[str, float] = field(default_factory=dict, metadata={"omit_if_default": True})
    """Fraction of the samples in which a given segment is dropped independently of the others, by name: the class (class), or a condition, whose rate
    in data.conditions it replaces. Guidance by segment, and sampling without a segment, need this."""
    given: list[str] | None = field(default=None, metadata={"omit_if_default": True})
    """Names of the grids and texts that are given to the prior; null: the conditions of the tokens."""
    drawn: list[str] | None = field(default=None, metadata={"omit_if_default": True})
    """Names of the grids that the prior draws; null: all grids that are not given. For several priors that draw one grid each."""
    token_noise: float = 0.0
    """Fraction of the input tokens replaced by random codes in training. The targets stay unchanged. It delays overfitting to few images."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax denominator in the loss, which keeps logits from drifting; 1e-4 is usual, 0 turns it off."""
    activation_checkpointing: bool = unrecorded(False)
    """Store only the inputs of each transformer layer and recompute the rest in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile each transformer layer with torch.compile. It takes up to a minute or so at each start, so measure whether it pays off on your
    machine."""
    first_loss_tolerance: float = unrecorded(0.5)
    """Largest difference, in nats per token, between ln(codes) and the loss of a new prior on its first batch. If it is larger, the run stops."""
    window_shards: int = 16
    """Number of shards among which samples are shuffled. It bounds the memory of the reader."""
    order: str = "raster"
    """Order in which the prior learns to predict the tokens of an image: raster (row by row), random (another order for every image), or annealed
    (random at first, then more and more images in raster order). Only grid_transformer learns orders other than raster."""
    order_annealing: list[float] = field(default_factory=lambda: [0.5, 0.75])
    """annealed only: the two fractions of the training between which the share of images in random order falls from 1 to final_random_share."""
    final_random_share: float = 0.5
    """annealed only: share of the images in random order at the end. With 0, the prior forgets orders other than raster."""
    export: str = "best"
    """Weights to export to prior/: best (lowest validation NLL) or last. The others are kept beside the checkpoints."""

    SECTION = "prior_training"

    def __post_init__(self):
        super().__post_init__()
        check_range("prior_training.label_drop", self.label_drop, at_least=0, at_most=1)
        self.drop_rates = checked_numbers("prior_training.drop_rates", self.drop_rates, at_least=0, at_most=1)
        self.given, self.drawn = (checked_names(f"prior_training.{key}", getattr(self, key)) for key in ("given", "drawn"))
        if self.drawn is not None and not self.drawn:
            raise InputError("prior_training.drawn is empty; give the names of grids, or null for all grids that are not given.")
        if both := sorted({*(self.given or [])} & {*(self.drawn or [])}):
            raise InputError(f"prior_training.given and prior_training.drawn both have {', '.join(both)}; a grid is either given or drawn.")
        check_range("prior_training.token_noise", self.token_noise, at_least=0, below=1)
        check_range("prior_training.z_loss", self.z_loss, at_least=0)
        check_range("prior_training.first_loss_tolerance", self.first_loss_tolerance, above=0)
        check_range("prior_training.window_shards", self.window_shards, at_least=1)
        check_name("prior_training.order", self.order, ("raster", "random", "annealed"))
        if len(self.order_annealing) != 2 or not 0 <= self.order_annealing[0] <= self.order_annealing[1] <= 1:
            raise InputError(f"prior_training.order_annealing is {self.order_annealing}; it must be two numbers [start, stop] with "
                             "0 <= start <= stop <= 1, such as [0.5, 0.75].")
        check_range("prior_training.final_random_share", self.final_random_share, at_least=0, at_most=1)
        check_name("prior_training.export", self.export, ("best", "last"))
