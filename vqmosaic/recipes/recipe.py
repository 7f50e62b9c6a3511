"""A recipe: every section of one run, its combinations checked once, at construction. Loads no torch."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqmosaic.errors import InputError, check_range, printable
from vqmosaic.recipes.field_types import check_types
from vqmosaic.recipes.recipe_sections import (
    DataConfig,
    PriorConfig,
    PriorTrainingConfig,
    SamplingConfig,
    TokensConfig,
    unrecorded,
)
from vqmosaic.recipes.tokenizer_sections import AdversarialConfig, TokenizerConfig, TokenizerTrainingConfig, patch_grid
from vqmosaic.recipes.view_lists import check_shifts_fit


@dataclass(kw_only=True)
class Recipe:
    """One run from images to generated images; each stage checks the whole and reads its own part."""

    run_dir: str = unrecorded("runs/unnamed")
    """The folder that gets everything this run makes."""
    seed: int = 0
    """Seed of every random choice of the run."""
    minutes: float | None = unrecorded(None)
    """Minutes for both training stages together. Each stage gets a share as its max_minutes, unless its max_minutes is set."""
    fit_to_data: bool = unrecorded(False)
    """Choose the fields that are not set from image size, number of images and device; the plan of a training prints them with the reasons."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where the images come from."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The stage 1 network."""
    tokenizer_training: TokenizerTrainingConfig = field(default_factory=TokenizerTrainingConfig)
    """How stage 1 is trained."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """The discriminator of a VQ-GAN; off unless its weight is set."""
    tokens: TokensConfig = field(default_factory=TokensConfig)
    """How preprocessing writes token shards."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """The stage 2 network."""
    prior_training: PriorTrainingConfig = field(default_factory=PriorTrainingConfig)
    """How stage 2 is trained."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How tokens are drawn, unless a caller says otherwise."""

    def __post_init__(self):
        check_types(self, "")
        if self.minutes is not None:
            check_range("minutes", self.minutes, above=0)
        check_range("seed", self.seed, at_least=0, below=2**63)
        for each in recipe_fields(self):
            if isinstance(each.value, str) and any("\ud800" <= character <= "\udfff" for character in each.value):
                raise InputError(f"{each.name} is '{printable(each.value)}', which is not UTF-8 and cannot be kept in recipe.yaml; rename it, or "
                                 "give the name of a link to it.")
        if not self.run_dir:
            raise InputError("run_dir is empty; give the folder for this run, such as runs/my-run.")
        size, step = self.data.image_size, self.tokenizer.downsampling
        if size % step or size // step < 2:
            fitting = max(2, round(size / step)) * step
            raise InputError(f"data.image_size is {size} and tokenizer.channel_multipliers has {len(self.tokenizer.channel_multipliers)} levels, "
                             f"which with tokenizer.patch_size {self.tokenizer.patch_size} divide the size by {step}; the size must be a multiple of "
                             f"{step} with at least 2 tokens a side: set data.image_size to {fitting}, or take levels away.")
        training = self.tokenizer_training
        if self.adversarial.weight and training.mixed_precision == "fp16":
            raise InputError("tokenizer_training.mixed_precision is 'fp16' and adversarial.weight is not 0; the balance of the two losses overflows "
                             "in fp16. Set mixed_precision to auto, bf16 or no.")
        if self.adversarial.weight:
            patch_grid(size, self.adversarial.layers)
        if training.perceptual_weight and training.perceptual_loss == "discriminator_features" and not self.adversarial.weight:
            raise InputError("tokenizer_training.perceptual_loss is 'discriminator_features', but adversarial.weight is 0: there is no discriminator "
                             "to take features from. Set adversarial.weight, or perceptual_loss to lpips.")
        steps = 2 if self.tokens.views in ("wide-shifts", "flip+wide-shifts") else 1
        check_range(f"tokens.view_shift (tokens.views {self.tokens.views!r})" if steps == 2 else "tokens.view_shift", self.tokens.view_shift,
                    at_least=1, below=size / 2 / steps)
        check_shifts_fit("tokens.views", self.tokens.views, size)
        if self.data.source == "digits" and (self.data.flip or self.tokens.mirrors):
            field_name = "data.flip" if self.data.flip else "tokens.views"
            raise InputError(f"{field_name} mirrors images, but data.source is 'digits': a mirrored digit is another sign. Turn it off.")
        if self.sampling.top_k > self.tokenizer.codebook_size:
            raise InputError(f"sampling.top_k is {self.sampling.top_k}, but tokenizer.codebook_size is {self.tokenizer.codebook_size}; "
                             "set sampling.top_k at most to the codebook size, or to 0 for off.")
        if self.sampling.guidance_scale != 1 and self.prior_training.label_drop == 0:
            raise InputError(f"sampling.guidance_scale is {self.sampling.guidance_scale:g}, but prior_training.label_drop is 0: a prior trained "
                             "without label drop has no null class to be guided from. Set prior_training.label_drop to 0.1, or "
                             "sampling.guidance_scale to 1.")
        if self.sampling.guidance_scale != 1 and not self.data.use_labels:
            raise InputError(f"sampling.guidance_scale is {self.sampling.guidance_scale:g}, but data.use_labels is false: without classes there is "
                             "nothing to guide to. Set sampling.guidance_scale to 1.")

    @property
    def num_tokens(self) -> int:
        """Tokens T of one image."""
        return (self.data.image_size // self.tokenizer.downsampling) ** 2 * self.tokenizer.depth

    @property
    def tokens_folder(self) -> Path:
        """The folder with train/ and validation/ shards that the prior is trained on: the one given, or this run's own."""
        return Path(self.prior_training.tokens or Path(self.run_dir) / "tokens")


@dataclass(frozen=True)
class RecipeField:
    """One field of a recipe: its dotted name, its value here, its default, and how a change of it is judged."""

    name: str
    value: Any
    default: Any
    judged: str


def recipe_fields(recipe: Recipe) -> Iterator[RecipeField]:
    """Every leaf field of a recipe in its order, as dotted names."""
    for entry in dataclasses.fields(recipe):
        value = getattr(recipe, entry.name)
        if dataclasses.is_dataclass(value):
            for inner in dataclasses.fields(value):
                yield RecipeField(f"{entry.name}.{inner.name}", getattr(value, inner.name), default_of(inner), inner.metadata.get("judged", "same"))
        else:
            yield RecipeField(entry.name, value, default_of(entry), entry.metadata.get("judged", "same"))


def default_of(entry: dataclasses.Field) -> Any:
    """The default of a dataclass's field; dataclasses.MISSING where it has none."""
    return entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default


def check_batch_split(recipe: Recipe, section: str, processes: int) -> None:
    """Raise InputError unless a training section's batch divides over processes and accumulation steps."""
    training = getattr(recipe, section)
    parts = processes * training.accumulation_steps
    if training.batch_size % parts:
        raise InputError(f"{section}.batch_size is {training.batch_size}, which does not divide over {processes} processes with "
                         f"{section}.accumulation_steps {training.accumulation_steps}; set it to {-(-training.batch_size // parts) * parts}.")
