"""The sections of a recipe that stage 1 reads: the tokenizer, its training, and the discriminator of a VQ-GAN. No torch."""

from dataclasses import dataclass, field

from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.recipes.field_types import check_types
from vqmosaic.recipes.quantizer_sizes import bits_of, levels_of
from vqmosaic.recipes.recipe_sections import TrainingConfig, unrecorded

NEAREST_CODE_KINDS = ("ema", "gradient", "simvq")
"""Quantizers that look for the nearest code: they take l2_normalize, rotation_trick and diveq, and residual can be made of them."""
QUANTIZER_NAMES = (*NEAREST_CODE_KINDS, "gumbel", "fsq", "lfq", "ibq", "residual", "kl")
CONTINUOUS = ("kl",)
"""Quantizers without ids: nothing to store as tokens, and no prior to train."""
RESIDUAL_FIELDS = ("residual_depth", "residual_kind", "residual_shared")
"""Without effect unless the quantizer is residual."""
LEARNING_FIELDS = ("dropout", "commitment_weight", "codebook_weight", "ema_decay", "rotation_trick", "diveq", "revival_threshold",
                   "gumbel_temperature", "entropy_weight", "entropy_diversity", "entropy_temperature", "kl_weight")
"""Fields of TokenizerConfig that shape the loss or the codebook's learning, not what the finished network computes."""
PATCH_SIZES = (1, 2, 4, 8)
BLOCKS = ("resnet", "convnext")
RECONSTRUCTION_LOSSES = ("l1", "l2", "huber")
PERCEPTUAL_LOSSES = ("lpips", "discriminator_features")
ADVERSARIAL_LOSSES = ("hinge", "vanilla", "non_saturating")
DISCRIMINATOR_NORMS = ("group", "none")
AUGMENTATIONS = ("color", "translation", "cutout")


@dataclass(kw_only=True)
class TokenizerConfig:
    """The stage 1 network: convolutional encoder, quantizer, convolutional decoder."""

    quantizer: str = "ema"
    """How latents become ids: ema, gradient, simvq, gumbel, fsq, lfq, ibq, residual, or kl (continuous, no ids: a baseline)."""
    codebook_size: int = 512
    """Number of codes K; the levels of fsq and the bits of lfq follow from it."""
    code_dim: int = 64
    """Dimension D of a code; independent of the width of the network."""
    latent_channels: int = 64
    """Channels between the encoder and the 1x1 convolution that leads to code_dim (taming's z_channels)."""
    channels: int = 64
    """Width of the first level; a multiple of 32, for GroupNorm's 32 groups."""
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Width of each level in units of channels; every level after the first halves height and width."""
    patch_size: int = 1
    """The network works on patches of this many pixels a side, their pixels side by side as channels: 2 saves most of the time and memory."""
    residual_blocks: int = 2
    """Blocks with a skip connection in each level of the encoder; the decoder has one more. Two more are at the lowest resolution of either, so 0
    leaves the encoder some too."""
    block: str = "resnet"
    """What they are: resnet (two 3x3 convolutions with GroupNorm, as in taming-transformers), or convnext (depthwise 3x3 convolution, LayerNorm, two
    pointwise layers), which has less than half of the weights and multiplications."""
    attention_levels: list[int] = field(default_factory=list)
    """Levels (0 is the full resolution, or that of the patches) that get self-attention after each block."""
    middle_attention: bool = True
    """Self-attention between the two residual blocks at the lowest resolution."""
    dropout: float = 0.0
    """Dropout inside the residual blocks."""
    commitment_weight: float = 0.25
    """Weight beta of the commitment loss, which pulls latents to their codes."""
    codebook_weight: float = 1.0
    """gradient, simvq and ibq only: weight of the codebook loss, which pulls codes to their latents."""
    ema_decay: float = 0.99
    """ema: decay of the moving averages from which codes are computed; nearest-code kinds and ibq: of the counts of use that revival goes by."""
    l2_normalize: bool = False
    """Nearest-code kinds only: put latents and codes on the unit sphere before comparing them (others call it cosine)."""
    rotation_trick: bool = False
    """Nearest-code kinds only: the gradient is rotated and scaled from code to latent instead of passed straight through."""
    diveq: bool = False
    """Nearest-code kinds only: the part of the gradient along the quantization error, which changes its length alone, is left out (DiVeQ)."""
    revival_threshold: float = 0.03
    """Nearest-code kinds and ibq: a code whose moving-average use falls below this share of the mean use is moved onto a latent of the batch."""
    residual_depth: int = 4
    """residual only: codes for each position; each quantizes what the ones before left over."""
    residual_kind: str = "ema"
    """residual only: the nearest-code kind that its levels are made of."""
    residual_shared: bool = False
    """residual only: one codebook for all levels instead of one each."""
    gumbel_temperature: float = 1.0
    """gumbel only: temperature of the relaxed samples at the start; it falls to a sixteenth over the training, as a half cosine."""
    entropy_weight: float = 0.1
    """lfq and ibq only: weight of the entropy loss; gumbel only: weight of the pull to uniform code probabilities, times 0.005."""
    entropy_diversity: float = 1.0
    """lfq and ibq only: weight of the batch-entropy term, which spreads use over all codes, inside the entropy loss."""
    entropy_temperature: float = 0.1
    """lfq and ibq only: squared distances (ibq: inner products) are divided by it before the probabilities of the entropy loss are taken."""
    kl_weight: float = 1e-6
    """kl only: weight of the divergence from a standard normal distribution."""

    def __post_init__(self):
        check_types(self, "tokenizer")
        check_name("tokenizer.quantizer", self.quantizer, QUANTIZER_NAMES)
        check_range("tokenizer.codebook_size", self.codebook_size, at_least=2, at_most=2**31 - 1)
        check_range("tokenizer.code_dim", self.code_dim, at_least=1)
        check_range("tokenizer.latent_channels", self.latent_channels, at_least=1)
        if self.channels < 32 or self.channels % 32:
            raise InputError(f"tokenizer.channels is {self.channels}; it must be a multiple of 32 (GroupNorm has 32 groups), "
                             f"nearest: {max(32, round(self.channels / 32) * 32)}.")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise InputError(f"tokenizer.channel_multipliers is {self.channel_multipliers}; it must be a list of integers of at least 1, "
                             "such as [1, 2, 2].")
        if self.patch_size not in PATCH_SIZES:
            raise InputError(f"tokenizer.patch_size is {self.patch_size}; allowed: {', '.join(map(str, PATCH_SIZES))}.")
        check_range("tokenizer.residual_blocks", self.residual_blocks, at_least=0)
        if self.residual_blocks == 0 and set(self.channel_multipliers) != {1}:
            raise InputError(f"tokenizer.residual_blocks is 0, so the encoder has nothing that changes its width from level to level, but "
                             f"tokenizer.channel_multipliers is {self.channel_multipliers}; make all of them 1, or residual_blocks at least 1.")
        check_name("tokenizer.block", self.block, BLOCKS)
        levels = len(self.channel_multipliers)
        for level in self.attention_levels:
            check_range(f"tokenizer.attention_levels (there are {levels} levels, the first is 0): an entry", level, at_least=0, below=levels)
        check_range("tokenizer.dropout", self.dropout, at_least=0, below=1)
        for key in ("commitment_weight", "codebook_weight", "entropy_weight", "entropy_diversity", "kl_weight"):
            check_range(f"tokenizer.{key}", getattr(self, key), at_least=0)
        check_range("tokenizer.ema_decay", self.ema_decay, at_least=0, below=1)
        check_range("tokenizer.revival_threshold", self.revival_threshold, at_least=0, below=1)
        for key in ("gumbel_temperature", "entropy_temperature"):
            check_range(f"tokenizer.{key}", getattr(self, key), above=0)
        check_range("tokenizer.residual_depth", self.residual_depth, at_least=1, at_most=64)
        check_name("tokenizer.residual_kind", self.residual_kind, NEAREST_CODE_KINDS)
        self._check_quantizer()

    def _check_quantizer(self) -> None:
        """Combinations of the quantizer with the other fields."""
        if self.quantizer == "fsq":
            levels_of(self.codebook_size)
        if self.quantizer == "lfq":
            bits_of(self.codebook_size)
        if self.rotation_trick and self.diveq:
            raise InputError("tokenizer.rotation_trick and tokenizer.diveq are both true, but the gradient takes one of the two ways; turn one off.")
        for key in ("l2_normalize", "rotation_trick", "diveq"):
            if getattr(self, key) and self.quantizer not in (*NEAREST_CODE_KINDS, "residual"):
                raise InputError(f"tokenizer.{key} is true, but tokenizer.quantizer is {self.quantizer!r}, which does not look for the nearest code; "
                                 f"set it to false (a recipe may have set it), or take one of: {', '.join(NEAREST_CODE_KINDS)}, residual.")

    @property
    def downsampling(self) -> int:
        """Pixels of the image along one side of a token."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def depth(self) -> int:
        """Ids for each position of the grid."""
        return self.residual_depth if self.quantizer == "residual" else 1


@dataclass(kw_only=True)
class TokenizerTrainingConfig(TrainingConfig):
    """How stage 1 is trained."""

    reconstruction_loss: str = "l1"
    """l1, l2 or huber, on pixels in [-1, 1]."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual loss beside the reconstruction loss; 0 is off."""
    perceptual_loss: str = "lpips"
    """lpips (features of VGG16; needs weight files, and torchvision only to download them), or discriminator_features (feature matching, needs
    adversarial.weight)."""
    perceptual_weights: str | None = unrecorded(None)
    """lpips only: folder or file of its weights; null looks in the usual cache of torch and of the lpips package."""
    init_from: str | None = None
    """A tokenizer folder or a training checkpoint whose weights the training starts from, for fine-tuning."""
    train_parts: str = "all"
    """all, or decoder: encoder and codebook stay as init_from has them, so tokens and priors made with them still fit."""
    export: str = "last"
    """Which weights become tokenizer/: last, or best (best validation reconstruction); the other is kept beside the checkpoints."""
    channels_last: bool = True
    """Keep feature maps in channels-last order, in which convolutions are faster."""
    compile: bool = False
    """Compile the network with torch.compile: takes a minute or two at each start, so measure whether it pays back on your machine."""
    usage_alarm: float = unrecorded(0.5)
    """Share of the codebook in use below which a validation prints remedies."""

    SECTION = "tokenizer_training"

    def __post_init__(self):
        super().__post_init__()
        check_name("tokenizer_training.reconstruction_loss", self.reconstruction_loss, RECONSTRUCTION_LOSSES)
        check_name("tokenizer_training.perceptual_loss", self.perceptual_loss, PERCEPTUAL_LOSSES)
        check_name("tokenizer_training.train_parts", self.train_parts, ("all", "decoder"))
        check_name("tokenizer_training.export", self.export, ("last", "best"))
        check_range("tokenizer_training.perceptual_weight", self.perceptual_weight, at_least=0)
        check_range("tokenizer_training.usage_alarm", self.usage_alarm, at_least=0, at_most=1)
        if self.train_parts == "decoder" and self.init_from is None:
            raise InputError("tokenizer_training.train_parts is 'decoder', but tokenizer_training.init_from is not given: there is no encoder to "
                             "keep. Set init_from to a tokenizer folder, or train_parts to all.")


@dataclass(kw_only=True)
class AdversarialConfig:
    """The discriminator of a VQ-GAN, when it joins the training, and the guard over what it does."""

    weight: float = 0.0
    """Weight of the adversarial loss; 0 trains without a discriminator."""
    loss: str = "hinge"
    """hinge, vanilla or non_saturating."""
    balance: str = "adaptive"
    """adaptive (weight times the ratio of the gradients of reconstruction and adversarial loss at the decoder's last layer), or fixed."""
    balance_limit: float = 10.0
    """adaptive only: the ratio is clamped to at most this (taming-transformers: 10,000)."""
    start: float = 0.3
    """Share of the training after which the discriminator joins in."""
    start_at_plateau: bool = False
    """Join in earlier: as soon as two validations in a row improve the reconstruction by less than plateau_gain; start is the latest then."""
    plateau_gain: float = 0.01
    """Share by which the validation reconstruction error must fall not to count as a plateau."""
    warmup: float = 0.05
    """Share of the training, from the start on, over which the discriminator learns without a say."""
    ramp: float = 0.1
    """Share of the training, after the warm-up, over which its weight rises to the full one."""
    worsening_limit: float = 0.15
    """Share by which validation reconstruction may worsen, against the best before the start; past it the weight is halved."""
    layers: int = 3
    """Strided layers of the PatchGAN discriminator; 3 judges patches of 70 pixels, 2 of 34, 1 of 16."""
    channels: int = 64
    """Width of its first layer; it doubles with each layer, up to eight times."""
    norm: str = "group"
    """Norm between its layers: group or none; neither looks at other images of the batch."""
    spectral_norm: bool = False
    """Divide its weights by their largest singular value."""
    learning_rate: float | None = None
    """Its peak learning rate; null takes that of the tokenizer."""
    augmentations: list[str] = field(default_factory=list)
    """Differentiable augmentation of what it sees, for small data: any of color, translation, cutout."""

    def __post_init__(self):
        check_types(self, "adversarial")
        check_name("adversarial.loss", self.loss, ADVERSARIAL_LOSSES)
        check_name("adversarial.balance", self.balance, ("adaptive", "fixed"))
        check_name("adversarial.norm", self.norm, DISCRIMINATOR_NORMS)
        for entry in self.augmentations:
            check_name("adversarial.augmentations: an entry", entry, AUGMENTATIONS)
        for key in ("weight", "worsening_limit", "plateau_gain"):
            check_range(f"adversarial.{key}", getattr(self, key), at_least=0)
        check_range("adversarial.balance_limit", self.balance_limit, above=0)
        for key in ("start", "warmup", "ramp"):
            check_range(f"adversarial.{key}", getattr(self, key), at_least=0, at_most=1)
        check_range("adversarial.layers", self.layers, at_least=1, at_most=6)
        check_range("adversarial.channels", self.channels, at_least=8)
        if self.channels % 8:
            raise InputError(f"adversarial.channels is {self.channels}; it must be a multiple of 8, nearest: {round(self.channels / 8) * 8}.")
        if self.learning_rate is not None:
            check_range("adversarial.learning_rate", self.learning_rate, above=0)


def patch_grid(image_size: int, layers: int) -> int:
    """Patches along one side that a discriminator with this many strided layers judges.

    Each strided layer halves the side; the two convolutions after them, 4x4 with padding 1, take a place each.

    Raises:
        ValueError: not even one patch is left.
    """
    side = image_size // 2**layers - 2
    if side < 1:
        fitting = [fewer for fewer in range(1, layers) if image_size // 2**fewer >= 3]
        remedy = f"adversarial.layers to at most {fitting[-1]}, or " if fitting else ""
        raise InputError(f"adversarial.layers is {layers}, which needs images of at least {3 * 2**layers} pixels a side, but they have {image_size} "
                         f"(data.image_size); set {remedy}data.image_size to at least {3 * 2**layers}.")
    return side
