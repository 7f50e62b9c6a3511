"""Recipe sections for stage 1: the tokenizer, its training, and the discriminator of a VQ-GAN. Loads no torch."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from vqmosaic.errors import InputError, check_name, check_range, did_you_mean
from vqmosaic.recipes.field_types import check_types
from vqmosaic.recipes.image_sizes import SIDES, ImageSize, checked_image_size, height_and_width
from vqmosaic.recipes.quantizer_sizes import fsq_levels, lfq_bits
from vqmosaic.recipes.recipe_sections import TrainingConfig, unrecorded
from vqmosaic.wording import counted

TOKENIZER_KINDS = ("image", "hierarchical")
IMAGE_GRID, TOP_GRID, BOTTOM_GRID = "image", "top", "bottom"
"""Names of the grids: that of a tokenizer of kind image, and the two of kind hierarchical."""
HIERARCHICAL_FIELDS = ("kind", "top_factor", "top")
"""Fields of TokenizerConfig that do not describe a network of kind image."""
NEAREST_CODE_KINDS = ("ema", "gradient", "simvq")
"""Quantizers that look up the nearest code. They support l2_normalize, rotation_trick and diveq, and residual can consist of them."""
QUANTIZER_NAMES = (*NEAREST_CODE_KINDS, "gumbel", "fsq", "lfq", "ibq", "residual", "kl")
CONTINUOUS_QUANTIZERS = ("kl",)
"""Quantizers without ids: there are no tokens to store and no prior to train."""
RESIDUAL_FIELDS = ("residual_depth", "residual_kind", "residual_shared")
"""Fields of TokenizerConfig that have no effect unless the quantizer is residual."""
LEARNING_FIELDS = ("dropout", "commitment_weight", "codebook_weight", "ema_decay", "rotation_trick", "diveq", "revival_threshold",
                   "gumbel_temperature", "entropy_weight", "entropy_diversity", "entropy_temperature", "kl_weight")
"""Fields of TokenizerConfig that affect the loss or the learning of the codebook, but not what the trained network computes."""
QUANTIZER_FIELDS = ("quantizer", "codebook_size", "code_dim", "l2_normalize", *RESIDUAL_FIELDS,
                    *(name for name in LEARNING_FIELDS if name != "dropout"))
"""Fields of TokenizerConfig that belong to the quantizer. `tokenizer.top` can set them for the top grid."""
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

    SECTION: ClassVar[str] = "tokenizer"
    """The name of these fields in error messages."""

    kind: str = field(default="image", metadata={"omit_if_default": True})
    """image (one token grid), or hierarchical (VQ-VAE-2: a bottom grid for details, and a smaller top grid for the whole)."""
    top_factor: int = field(default=2, metadata={"omit_if_default": True})
    """hierarchical only: the top grid has this many times fewer rows and columns than the bottom grid. A power of two."""
    top: dict[str, Any] = field(default_factory=dict, metadata={"omit_if_default": True})
    """hierarchical only: fields of the quantizer, such as codebook_size, that differ for the top grid. All others are those of this section."""
    quantizer: str = "ema"
    """Maps latents to ids: ema, gradient, simvq, gumbel, fsq, lfq, ibq or residual. kl is a baseline with continuous latents and no ids."""
    codebook_size: int = 512
    """Number of codes K. It determines the levels of fsq and the bits of lfq."""
    code_dim: int = 64
    """Dimension D of a code, independent of the width of the network."""
    latent_channels: int = 64
    """Channels between the encoder and the 1x1 convolution that maps to code_dim (z_channels in taming-transformers)."""
    channels: int = 64
    """Width of the first level. It must be a multiple of 32, for GroupNorm's 32 groups."""
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 2, 2])
    """Width of each level as a multiple of channels. Every level after the first halves height and width."""
    patch_size: int = 1
    """The network works on patches of this many pixels per side, with the pixels of a patch as channels. 2 saves most of the time and memory."""
    residual_blocks: int = 2
    """Residual blocks in each level of the encoder. The decoder has one more per level. Both have two more at the lowest resolution, so the encoder
    has some even with 0."""
    block: str = "resnet"
    """Type of the residual blocks: resnet (two 3x3 convolutions with GroupNorm, as in taming-transformers), or convnext (depthwise 3x3 convolution,
    LayerNorm, two pointwise layers), which has less than half of the weights and multiplications."""
    attention_levels: list[int] = field(default_factory=list)
    """Levels with self-attention after each block. 0 is the level with the highest resolution."""
    middle_attention: bool = True
    """Self-attention between the two residual blocks at the lowest resolution."""
    dropout: float = 0.0
    """Dropout inside the residual blocks."""
    commitment_weight: float = 0.25
    """Weight beta of the commitment loss, which pulls latents to their codes."""
    codebook_weight: float = 1.0
    """gradient, simvq and ibq only: weight of the codebook loss, which pulls codes to their latents."""
    ema_decay: float = 0.99
    """Decay of moving averages. For ema: those from which codes are computed. For nearest-code kinds and ibq: the usage counts for revival."""
    l2_normalize: bool = False
    """Nearest-code kinds only: normalize latents and codes to unit length before comparing them (cosine similarity)."""
    rotation_trick: bool = False
    """Nearest-code kinds only: rotate and scale the gradient from code to latent instead of passing it straight through."""
    diveq: bool = False
    """Nearest-code kinds only: remove the part of the gradient along the quantization error, which only changes the length of the error (DiVeQ)."""
    revival_threshold: float = 0.03
    """Nearest-code kinds and ibq: move a code onto a latent of the batch once its moving-average use is below this fraction of the mean use."""
    residual_depth: int = 4
    """residual only: number of codes per position. Each code quantizes the residual of the codes before it."""
    residual_kind: str = "ema"
    """residual only: the nearest-code kind of its levels."""
    residual_shared: bool = False
    """residual only: use one codebook for all levels instead of one per level."""
    gumbel_temperature: float = 1.0
    """gumbel only: initial temperature of the relaxed samples. It falls to 1/16 of this over the training, along a half cosine."""
    entropy_weight: float = 0.1
    """lfq and ibq: weight of the entropy loss. gumbel: weight, times 0.005, of the loss that pulls code probabilities to uniform."""
    entropy_diversity: float = 1.0
    """lfq and ibq only: weight of the batch-entropy term in the entropy loss. The term spreads use over all codes."""
    entropy_temperature: float = 0.1
    """lfq and ibq only: temperature of the probabilities in the entropy loss. It divides squared distances (lfq) or inner products (ibq)."""
    kl_weight: float = 1e-6
    """kl only: weight of the KL divergence from a standard normal distribution."""

    def __post_init__(self):
        check_types(self, self.SECTION)
        check_name("tokenizer.kind", self.kind, TOKENIZER_KINDS)
        check_range(f"{self.SECTION}.codebook_size", self.codebook_size, at_least=2, at_most=2**31 - 1)
        check_range(f"{self.SECTION}.code_dim", self.code_dim, at_least=1)
        check_range("tokenizer.latent_channels", self.latent_channels, at_least=1)
        if self.channels < 32 or self.channels % 32:
            raise InputError(f"tokenizer.channels is {self.channels}; it must be a multiple of 32 (GroupNorm has 32 groups); "
                             f"nearest: {max(32, round(self.channels / 32) * 32)}.")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise InputError(f"tokenizer.channel_multipliers is {self.channel_multipliers}; it must be a list of integers of at least 1, "
                             "such as [1, 2, 2].")
        if self.patch_size not in PATCH_SIZES:
            raise InputError(f"tokenizer.patch_size is {self.patch_size}; allowed: {', '.join(map(str, PATCH_SIZES))}.")
        check_range("tokenizer.residual_blocks", self.residual_blocks, at_least=0)
        if self.residual_blocks == 0 and set(self.channel_multipliers) != {1}:
            raise InputError(f"tokenizer.residual_blocks is 0, but tokenizer.channel_multipliers is {self.channel_multipliers}. Without residual "
                             "blocks, the width cannot change between levels. Set all multipliers to 1, or residual_blocks to at least 1.")
        check_name("tokenizer.block", self.block, BLOCKS)
        levels = len(self.channel_multipliers)
        for level in self.attention_levels:
            check_range(f"tokenizer.attention_levels (there are {levels} levels, the first is 0): an entry", level, at_least=0, below=levels)
        check_range("tokenizer.dropout", self.dropout, at_least=0, below=1)
        self._check_quantizer()
        self._check_top()

    def _check_quantizer(self) -> None:
        """Raise InputError for fields of the quantizer that are invalid or do not work together."""
        section = self.SECTION
        check_name(f"{section}.quantizer", self.quantizer, QUANTIZER_NAMES)
        for key in ("commitment_weight", "codebook_weight", "entropy_weight", "entropy_diversity", "kl_weight"):
            check_range(f"{section}.{key}", getattr(self, key), at_least=0)
        check_range(f"{section}.ema_decay", self.ema_decay, at_least=0, below=1)
        check_range(f"{section}.revival_threshold", self.revival_threshold, at_least=0, below=1)
        for key in ("gumbel_temperature", "entropy_temperature"):
            check_range(f"{section}.{key}", getattr(self, key), above=0)
        check_range(f"{section}.residual_depth", self.residual_depth, at_least=1, at_most=64)
        check_name(f"{section}.residual_kind", self.residual_kind, NEAREST_CODE_KINDS)
        if self.quantizer == "fsq":
            fsq_levels(self.codebook_size, section)
        if self.quantizer == "lfq":
            lfq_bits(self.codebook_size, section)
        if self.rotation_trick and self.diveq:
            raise InputError(f"{section}.rotation_trick and {section}.diveq are both true, but only one of them can be used; turn one off.")
        for key in ("l2_normalize", "rotation_trick", "diveq"):
            if getattr(self, key) and self.quantizer not in (*NEAREST_CODE_KINDS, "residual"):
                raise InputError(f"{section}.{key} is true, but {section}.quantizer is {self.quantizer!r}, which does not look up the nearest code. "
                                 f"Set it to false (a recipe may have set it), or use one of: {', '.join(NEAREST_CODE_KINDS)}, residual.")

    def _check_top(self) -> None:
        """Raise InputError for an invalid top grid."""
        if not isinstance(self.top, dict):
            raise InputError(f"tokenizer.top is {self.top!r}; it must be a mapping of fields, such as {{codebook_size: 256}}.")
        if self.kind != "hierarchical":
            if self.top:
                raise InputError(f"tokenizer.top sets {', '.join(map(str, self.top))}, but tokenizer.kind is {self.kind!r}, which has no top grid. "
                                 "Set tokenizer.kind to hierarchical, or tokenizer.top to {}.")
            return
        factor = self.top_factor
        if factor < 2 or factor & (factor - 1):
            raise InputError(f"tokenizer.top_factor is {factor}; it must be a power of two of at least 2, such as 2 or 4.")
        for name in self.top:
            if name not in QUANTIZER_FIELDS:
                raise InputError(f"tokenizer.top sets {name!r}; allowed are the fields of the quantizer: {', '.join(QUANTIZER_FIELDS)}. "
                                 f"All other fields are the same for both grids.{did_you_mean(str(name), QUANTIZER_FIELDS)}")
        self._top_level()  # its constructor checks the values

    def _top_level(self) -> "TopLevelConfig":
        fields = {name: value for name, value in vars(self).items() if name not in HIERARCHICAL_FIELDS}
        return TopLevelConfig(**fields | self.top)

    @property
    def levels(self) -> "dict[str, TokenizerConfig]":
        """The section by grid name, in the order in which the grids are computed, with the fields of the quantizer of each grid."""
        return {TOP_GRID: self._top_level(), BOTTOM_GRID: self} if self.kind == "hierarchical" else {IMAGE_GRID: self}

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a token, in the bottom grid if there are two."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def depth(self) -> int:
        """Number of ids per position of the grid."""
        return self.residual_depth if self.quantizer == "residual" else 1

    @property
    def has_ids(self) -> bool:
        """Whether the quantizer of this level has ids."""
        return self.quantizer not in CONTINUOUS_QUANTIZERS


@dataclass(kw_only=True)
class TopLevelConfig(TokenizerConfig):
    """The section with the quantizer of the top grid."""

    SECTION: ClassVar[str] = "tokenizer.top"
    """The name of these fields in error messages."""


@dataclass(kw_only=True)
class TokenizerTrainingConfig(TrainingConfig):
    """Settings of the stage 1 training."""

    reconstruction_loss: str = "l1"
    """Loss on pixels in [-1, 1]: l1, l2 or huber."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual loss, which is added to the reconstruction loss; 0 turns it off."""
    perceptual_loss: str = "lpips"
    """lpips (features of VGG16; needs weight files, and torchvision only to download them), or discriminator_features (feature matching; needs
    adversarial.weight)."""
    perceptual_weights: str | None = unrecorded(None)
    """lpips only: folder or file with its weights; null looks in the usual caches of torch and the lpips package."""
    init_from: str | None = None
    """A tokenizer folder or a training checkpoint whose weights the training starts from, for fine-tuning."""
    train_parts: str = "all"
    """all, or decoder: encoder and codebook keep the weights of init_from, so tokens and priors made with them stay valid."""
    export: str = "last"
    """Weights to export to tokenizer/: last, or best (best validation reconstruction). The others are kept beside the checkpoints."""
    channels_last: bool = True
    """Store feature maps in channels-last order, which makes convolutions faster."""
    compile: bool = False
    """Compile the network with torch.compile. It takes a minute or two at each start, so measure whether it pays off on your machine."""
    usage_alarm: float = unrecorded(0.5)
    """Validation prints remedies if the fraction of the codebook in use is below this."""

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
            raise InputError("tokenizer_training.train_parts is 'decoder', but tokenizer_training.init_from is not given, so there is no encoder "
                             "to keep. Set init_from to a tokenizer folder, or train_parts to all.")


@dataclass(kw_only=True)
class AdversarialConfig:
    """The discriminator of a VQ-GAN, its schedule, and the guard that limits its weight."""

    weight: float = 0.0
    """Weight of the adversarial loss; 0 trains without a discriminator."""
    loss: str = "hinge"
    """Adversarial loss: hinge, vanilla or non_saturating."""
    balance: str = "adaptive"
    """adaptive (weight is multiplied by the ratio of reconstruction and adversarial gradient norms at the decoder's last layer), or fixed."""
    balance_limit: float = 10.0
    """adaptive only: upper limit of the ratio (10,000 in taming-transformers)."""
    start: float = 0.3
    """Fraction of the training after which the discriminator joins."""
    start_at_plateau: bool = False
    """Join earlier, once two validations in a row improve the reconstruction by less than plateau_gain. `start` is then the latest time."""
    plateau_gain: float = 0.01
    """Relative decrease of the validation reconstruction error below which a validation counts as a plateau."""
    warmup: float = 0.05
    """Fraction of the training, after the discriminator joins, in which it learns without affecting the tokenizer."""
    ramp: float = 0.1
    """Fraction of the training, after the warmup, over which the adversarial weight rises to its full value."""
    worsening_limit: float = 0.15
    """Fraction by which the validation reconstruction error may exceed its best value before the start. Beyond it, the weight is halved."""
    layers: int = 3
    """Strided layers of the PatchGAN discriminator. 3 layers see patches of 70 pixels, 2 see 34, 1 sees 16."""
    channels: int = 64
    """Width of the discriminator's first layer. It doubles with each layer, up to eight times."""
    norm: str = "group"
    """Norm between the discriminator's layers: group or none. Neither depends on other images of the batch."""
    spectral_norm: bool = False
    """Divide the discriminator's weight matrices by their largest singular value."""
    learning_rate: float | None = None
    """Peak learning rate of the discriminator; null uses that of the tokenizer."""
    augmentations: list[str] = field(default_factory=list)
    """Differentiable augmentations of the discriminator's inputs, for small data sets: any of color, translation, cutout."""

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
            raise InputError(f"adversarial.channels is {self.channels}; it must be a multiple of 8; nearest: {round(self.channels / 8) * 8}.")
        if self.learning_rate is not None:
            check_range("adversarial.learning_rate", self.learning_rate, above=0)


def token_grids(field: str, image_size: ImageSize, config: TokenizerConfig, fewest: int = 1) -> dict[str, tuple[int, int]]:
    """Height and width of each token grid of images of this size, by grid name.

    Raises:
        InputError: a side of the images is not a multiple of the pixels along one side of a token, or has fewer than `fewest` tokens. If there are
            two grids, this is about the top grid. The message names the field, the side and the nearest size that fits.
    """
    sides, is_hierarchical = height_and_width(image_size, field), config.kind == "hierarchical"
    factor = config.downsampling * (config.top_factor if is_hierarchical else 1)
    wrong = [name for name, side in zip(SIDES, sides, strict=True) if side % factor or side // factor < fewest]
    if wrong:
        size = checked_image_size(field, image_size)
        nearest = checked_image_size(field, [max(fewest, round(side / factor)) * factor for side in sides])
        subject = "it" if isinstance(size, int) else f"its {' and its '.join(wrong)}"
        levels, patches = f"{len(config.channel_multipliers)} levels in tokenizer.channel_multipliers", f"tokenizer.patch_size {config.patch_size}"
        cause, remedy = f"{levels} and {patches}", "remove levels"
        if is_hierarchical:
            cause, remedy = f"{levels}, {patches} and tokenizer.top_factor {config.top_factor}", "remove levels or lower tokenizer.top_factor"
        raise InputError(f"{field} is {size}. With {cause}, {subject} must be a multiple of {factor} with at least {counted(fewest, 'token')} per "
                         f"side{' of the top grid' if is_hierarchical else ''}; set {field} to {nearest}, or {remedy}.")
    height, width = sides[0] // config.downsampling, sides[1] // config.downsampling
    if is_hierarchical:
        return {TOP_GRID: (height // config.top_factor, width // config.top_factor), BOTTOM_GRID: (height, width)}
    return {IMAGE_GRID: (height, width)}


def check_discriminator_fits(image_size: ImageSize, layers: int) -> None:
    """Raise InputError, which names the side, if a discriminator with this many strided layers classifies no patch of images of this size."""
    size = checked_image_size("data.image_size", image_size)
    for name, side in zip(SIDES, height_and_width(size), strict=True):
        patches_per_side(side, layers, f"{side} (data.image_size)" if isinstance(size, int) else f"a {name} of {side} (data.image_size {size})")


def patches_per_side(side: int, layers: int, described_as: str = "") -> int:
    """Number of patches along one side of an image that a discriminator with this many strided layers classifies.

    Each strided layer halves the side. Each of the two 4x4 convolutions after them, with padding 1, shortens it by one. Errors describe the side as
    `described_as`.

    Raises:
        InputError: no patch is left.
    """
    patches = side // 2**layers - 2
    if patches < 1:
        possible = [fewer for fewer in range(1, layers) if side // 2**fewer >= 3]
        remedy = f"adversarial.layers to at most {possible[-1]}, or " if possible else ""
        raise InputError(f"adversarial.layers is {layers}, which needs images of at least {3 * 2**layers} pixels per side, but they have "
                         f"{described_as or side}; set {remedy}data.image_size to at least {3 * 2**layers}.")
    return patches
