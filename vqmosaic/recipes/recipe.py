"""The recipe of a run: all its sections. The constructor checks combinations of fields. Loads no torch."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vqmosaic.errors import InputError, check_name, check_range, printable
from vqmosaic.recipes.conditions import ConditionConfig
from vqmosaic.recipes.data_section import DIGITS
from vqmosaic.recipes.field_types import check_types
from vqmosaic.recipes.image_sizes import height_and_width
from vqmosaic.recipes.recipe_sections import (
    DataConfig,
    PriorConfig,
    PriorTrainingConfig,
    SamplingConfig,
    TokensConfig,
    unrecorded,
)
from vqmosaic.recipes.tokenizer_sections import (
    HIERARCHICAL_FIELDS,
    AdversarialConfig,
    TokenizerConfig,
    TokenizerTrainingConfig,
    check_discriminator_fits,
    token_grids,
)
from vqmosaic.recipes.view_lists import check_shifts_fit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Section = TypeVar("Section", bound="DataclassInstance")


@dataclass(kw_only=True)
class Recipe:
    """The settings of one run, from images to generated images. Each stage checks the whole recipe and reads its own part."""

    run_dir: str = unrecorded("runs/unnamed")
    """The folder for everything that this run writes."""
    seed: int = 0
    """Seed of all random choices in the run."""
    minutes: float | None = unrecorded(None)
    """Time budget in minutes for both training stages together. Each stage gets a share as its max_minutes, unless its max_minutes is set. The
    tokenizers of the images and of conditions divide the share of the tokenizer equally."""
    fit_to_data: bool = unrecorded(False)
    """Choose unset fields by image size, number of images and device. The plan of each training lists them with the reasons."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data set and the preparation of its images."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The stage 1 network."""
    tokenizer_training: TokenizerTrainingConfig = field(default_factory=TokenizerTrainingConfig)
    """Settings of the stage 1 training."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """The discriminator of a VQ-GAN. It is off unless its weight is set."""
    tokens: TokensConfig = field(default_factory=TokensConfig)
    """Settings of the preprocessing that writes token shards."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """The stage 2 network."""
    prior_training: PriorTrainingConfig = field(default_factory=PriorTrainingConfig)
    """Settings of the stage 2 training."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Default settings for sampling tokens from the prior."""

    def __post_init__(self):
        check_types(self, "")
        if self.minutes is not None:
            check_range("minutes", self.minutes, above=0)
        check_range("seed", self.seed, at_least=0, below=2**63)
        for each in recipe_fields(self):
            texts = [each.value] if isinstance(each.value, str) else strings_in(each.value) if each.omit_if_default else []
            for text in texts:
                if any("\ud800" <= character <= "\udfff" for character in text):
                    raise InputError(f"{each.name} is '{printable(text)}', which is not UTF-8, so recipe.yaml cannot store it. Rename the file or "
                                     "folder, or give a link to it.")
        if not self.run_dir:
            raise InputError("run_dir is empty; set it to a folder for this run, such as runs/my-run.")
        field_name = "data.image_size" if self.data.derived is None else "the size of its images"
        token_grids(field_name, self.data.final_size, self.tokenizer, fewest=2)
        training = self.tokenizer_training
        if self.adversarial.weight and training.mixed_precision == "fp16":
            raise InputError("tokenizer_training.mixed_precision is 'fp16' and adversarial.weight is not 0, but balancing the two losses "
                             "overflows in fp16. Set mixed_precision to auto, bf16 or no.")
        if self.adversarial.weight:
            check_discriminator_fits(self.data.final_size, self.adversarial.layers)
        if training.perceptual_weight and training.perceptual_loss == "discriminator_features" and not self.adversarial.weight:
            raise InputError("tokenizer_training.perceptual_loss is 'discriminator_features', but adversarial.weight is 0, so there is no "
                             "discriminator. Set adversarial.weight above 0, or perceptual_loss to lpips.")
        steps = 2 if self.tokens.views in ("wide-shifts", "flip+wide-shifts") else 1
        check_range(f"tokens.view_shift (tokens.views {self.tokens.views!r})" if steps == 2 else "tokens.view_shift", self.tokens.view_shift,
                    at_least=1, below=min(height_and_width(self.data.image_size)) / 2 / steps)
        check_shifts_fit("tokens.views", self.tokens.views, self.data.image_size)
        if self.data.source in DIGITS and (self.data.flip or self.tokens.mirrors):
            field_name = "data.flip" if self.data.flip else "tokens.views"
            raise InputError(f"{field_name} mirrors images, but data.source is {self.data.source!r}, and mirroring changes the meaning of digits. "
                             "Turn it off.")
        has_own_tokens = self.tokens.tokenizer is None and self.prior_training.tokens is None  # otherwise stage_checks.py checks the given tokens
        largest = max(self.tokenizer.levels.values(), key=lambda level: level.codebook_size)
        if has_own_tokens and self.sampling.top_k > largest.codebook_size:
            raise InputError(f"sampling.top_k is {self.sampling.top_k}, but {largest.SECTION}.codebook_size is {largest.codebook_size}; "
                             "set sampling.top_k to at most the codebook size, or to 0 to turn it off.")
        if self.prior_training.order != "raster" and self.prior.architecture != "grid_transformer":
            raise InputError(f"prior_training.order is {self.prior_training.order!r}, but prior.architecture is {self.prior.architecture!r}, which "
                             "predicts tokens only in raster order. Set prior_training.order to raster, or prior.architecture to grid_transformer.")
        if self.prior_training.order == "raster" and (self.sampling.order != "raster" or self.sampling.steps is not None):
            name = "order" if self.sampling.order != "raster" else "steps"
            raise InputError(f"sampling.{name} is {getattr(self.sampling, name)!r}, but prior_training.order is 'raster', so the prior draws one "
                             f"token after another. Set prior_training.order to annealed, or leave out sampling.{name}.")
        if has_own_tokens and self.sampling.steps is not None and self.sampling.steps > self.num_tokens:
            raise InputError(f"sampling.steps is {self.sampling.steps}, but an image has {self.num_tokens} tokens; set it to at most this number, "
                             "or to null for one token in each pass.")
        self.check_guidance()
        condition_recipes(self)  # raises InputError if a tokenizer could not be trained

    def check_guidance(self) -> None:
        """Raise InputError for guidance that the prior of this recipe cannot learn. With conditions, the vocabulary of the tokens decides."""
        training, sampling, has_own_tokens = self.prior_training, self.sampling, self.prior_training.tokens is None
        names = list(dict.fromkeys(["class", *(condition.name for condition in self.data.given_conditions), *(training.given or [])]))
        for field_name, given in (("sampling.guidance", sampling.guidance), ("prior_training.drop_rates", training.drop_rates)):
            if has_own_tokens and (unknown := [name for name in given if name not in names]):
                raise InputError(f"{field_name} has {', '.join(unknown)}; the given segments of this recipe are: {', '.join(names)}.")
        if not sampling.is_guided:
            return
        setting = f"sampling.guidance_scale is {sampling.guidance_scale:g}" if sampling.guidance_scale != 1 else "sampling.guidance is set"
        of_conditions = [condition.drop_rate for condition in self.data.given_conditions]
        if not any([training.label_drop, *training.drop_rates.values(), *of_conditions]):
            raise InputError(f"{setting}, but prior_training.label_drop is 0, so the prior does not learn the null class that guidance needs. Set "
                             "prior_training.label_drop to 0.1, or sampling.guidance_scale to 1.")
        if not self.data.use_labels and has_own_tokens and len(names) == 1:
            raise InputError(f"{setting}, but data.use_labels is false, and guidance needs class labels. Set sampling.guidance_scale to 1.")

    @property
    def grid_sides(self) -> tuple[int, int]:
        """Height and width of the token grid of one image; of the bottom grid if there are two."""
        return list(token_grids("data.image_size", self.data.final_size, self.tokenizer).values())[-1]

    @property
    def num_tokens(self) -> int:
        """Number of tokens T of one image."""
        sides = token_grids("data.image_size", self.data.final_size, self.tokenizer)
        return sum(math.prod(sides[name]) * level.depth for name, level in self.tokenizer.levels.items())

    @property
    def tokens_folder(self) -> Path:
        """The folder with the train/ and validation/ shards for the prior: prior_training.tokens if set, else this run's tokens/."""
        return Path(self.prior_training.tokens or Path(self.run_dir) / "tokens")


@dataclass(frozen=True)
class RecipeField:
    """One field of a recipe: its dotted name, its value, its default, and the policy for changes between runs (see recipe_sections.py)."""

    name: str
    value: Any
    default: Any
    change_policy: str
    omit_if_default: bool = False
    """Whether files omit the field while it has its default value, as those of versions before this field do."""

    @property
    def is_omitted(self) -> bool:
        """Whether files omit the field."""
        return self.omit_if_default and self.value == self.default


def recipe_fields(recipe: Recipe) -> Iterator[RecipeField]:
    """Yield all fields of a recipe and its sections in order, with dotted names."""
    for entry in dataclasses.fields(recipe):
        value = getattr(recipe, entry.name)
        if dataclasses.is_dataclass(value):
            for inner in dataclasses.fields(value):
                yield RecipeField(f"{entry.name}.{inner.name}", getattr(value, inner.name), field_default(inner),
                                  inner.metadata.get("change_policy", "same"), inner.metadata.get("omit_if_default", False))
        else:
            yield RecipeField(entry.name, value, field_default(entry), entry.metadata.get("change_policy", "same"))


def condition_recipe(recipe: Recipe, condition: ConditionConfig) -> Recipe:
    """The recipe of the tokenizer of an image condition, a run of its own in <run_dir>/conditions/<name>.

    It is the recipe's tokenizer with the changes of `network` and `training`. Not inherited: a second level, initial weights, the discriminator and
    the perceptual loss, which are for images.

    Raises InputError, which names the condition, if the tokenizer does not fit its images.
    """
    entry = f"data.conditions ({condition.name})"
    one_level = {each.name: field_default(each) for each in dataclasses.fields(recipe.tokenizer) if each.name in HIERARCHICAL_FIELDS}
    network = {**one_level, **fewer_pixels_per_token(recipe.tokenizer, condition), **condition.network}
    training = dataclasses.replace(recipe.tokenizer_training, init_from=None, train_parts="all", perceptual_weight=0.0, resume="auto")
    try:
        tokenizer = _with_changes(recipe.tokenizer, network, f"{entry}.network")
        if tokenizer.kind != "image" or not tokenizer.has_ids:
            raise InputError(f"tokenizer.kind is {tokenizer.kind!r} and tokenizer.quantizer {tokenizer.quantizer!r}; allowed: kind 'image' with a "
                             "quantizer that has ids, because a condition is one grid of ids.")
        return Recipe(run_dir=str(Path(recipe.run_dir) / "conditions" / condition.name), seed=recipe.seed,
                      data=dataclasses.replace(recipe.data, conditions=[], derived=condition.derivation()), tokenizer=tokenizer,
                      tokenizer_training=_with_changes(training, condition.training, f"{entry}.training"))
    except InputError as error:
        raise InputError(f"{entry} needs a tokenizer of its own. {error} Here, fields of tokenizer are set in {entry}.network, and those of "
                         f"tokenizer_training in {entry}.training.") from None


def fewer_pixels_per_token(tokenizer: TokenizerConfig, condition: ConditionConfig) -> dict[str, Any]:
    """Changes of the network for the smaller images of a low resolution: as many tokens as the image has, or one for each pixel.

    First the patch size is divided, then levels are removed. Returns nothing if `network` of the condition sets one of these fields.
    """
    if condition.factor == 1 or {"patch_size", "channel_multipliers"} & condition.network.keys():
        return {}
    divisor = math.gcd(tokenizer.patch_size, condition.factor)
    levels, factor = len(tokenizer.channel_multipliers), condition.factor // divisor
    while levels > 1 and factor % 2 == 0:
        levels, factor = levels - 1, factor // 2
    return {"patch_size": tokenizer.patch_size // divisor, "channel_multipliers": tokenizer.channel_multipliers[:levels],
            "attention_levels": [level for level in tokenizer.attention_levels if level < levels]}


def condition_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """Name -> recipe of the tokenizers that the run trains for its conditions, in order."""
    return {condition.name: condition_recipe(recipe, condition) for condition in recipe.data.given_conditions
            if not condition.is_caption and condition.tokenizer is None}


def recipe_of_condition(recipe: Recipe, name: str) -> Recipe:
    """The recipe of the tokenizer of one condition. Raises InputError, which lists the conditions, if the run does not train one of this name."""
    recipes = condition_recipes(recipe)
    if not recipes:
        raise InputError("--condition is given, but the recipe has no condition whose tokenizer is trained: data.conditions has none with images, or "
                         "all of them have a tokenizer.")
    check_name("--condition", name, recipes)
    return recipes[name]


def _with_changes(section: Section, changes: Mapping[str, Any], entry: str) -> Section:
    for name in changes:
        check_name(f"{entry}: a field", name, [each.name for each in dataclasses.fields(section)])
    return dataclasses.replace(section, **changes)


def strings_in(value: Any) -> Iterator[str]:
    """Yield the strings in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from strings_in(inner)


def field_default(entry: dataclasses.Field) -> Any:
    """The default value of a dataclass field; dataclasses.MISSING if it has none."""
    return entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default


def check_batch_split(recipe: Recipe, section: str, processes: int) -> None:
    """Raise InputError unless the batch size of a training section is divisible by processes times accumulation steps."""
    training = getattr(recipe, section)
    parts = processes * training.accumulation_steps
    if training.batch_size % parts:
        raise InputError(f"{section}.batch_size is {training.batch_size}, which is not divisible by {processes} processes times "
                         f"{section}.accumulation_steps {training.accumulation_steps}; set it to {-(-training.batch_size // parts) * parts}.")
