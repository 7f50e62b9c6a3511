"""Rules that choose recipe fields from the data. With `fit_to_data: true`, they set the fields that neither the recipe nor the command line sets.

Each rule is one function. It yields a value and a reason for each of its fields, and may read fields that are already set. The rules use the image
size, the number of training images and the device. The plan of each training prints the chosen values. A run keeps the values it started with:
stages/<stage>.json records them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.files.json_files import read_object
from vqmosaic.recipes.image_sizes import checked_image_size, height_and_width
from vqmosaic.recipes.recipe import Recipe, recipe_fields
from vqmosaic.recipes.tokenizer_sections import NEAREST_CODE_KINDS, PATCH_SIZES
from vqmosaic.recipes.view_lists import VIEW_COUNTS
from vqmosaic.runs.run_folder import STAGES, RunFolder

ASSUMED_IMAGES = 5000
"""Number of training images to assume if the data set is not known, as in `vqmosaic run image_folder --help`."""
BUDGETS = {"tokenizer_training.max_minutes": 0.5, "prior_training.max_minutes": 0.5}
"""The fields among which `minutes` is divided, and the share of each."""
PIXELS_PER_TOKEN, SMALLEST_SIDE, LARGEST_SIDE = 8, 8, 16
"""The target grid: tokens of 8 x 8 pixels, but at least 8 and at most 16 tokens along one side. For images that are not square, the number of tokens
is that of a square with the same number of pixels."""
FEWEST_CODES, MOST_CODES, TOKENS_PER_CODE = 128, 512, 64
"""Bounds of the codebook size, and the target number of training tokens per code."""
FEW_IMAGES, MANY_IMAGES = 2000, 25_000
"""Augmentation is strong below FEW_IMAGES training images, weak from MANY_IMAGES on, and medium in between."""
EPOCHS_OF_ONE_VIEW = 8
"""Epochs after which a prior overfits if each image is stored in one view. With V views, it is this number times sqrt(V)."""
SECTIONS_IN_PLAN = {"tokenizer": ("data", "tokenizer", "tokenizer_training"), "prior": ("tokens", "prior", "prior_training")}
"""For each training stage, the sections whose chosen fields its plan prints."""


class DataSize(NamedTuple):
    """The amount of training data."""

    images: int
    """Number of training images."""
    views: int | None = None
    """Number of views in existing tokens; None if the recipe decides it."""


CountImages = Callable[[Mapping[str, Any]], DataSize | None]
"""Returns the size of a recipe's data, given its fields by dotted name; None if no data set is named."""


class Facts:
    """Facts about data and device for the rules. Each fact is looked up when a rule first needs it, because a look-up takes time.

    `given` holds the names of the fields that the recipe file or an option sets.
    """

    def __init__(self, count: Callable[[], DataSize | None], has_gpu: Callable[[], bool], given: Set[str] = frozenset()):
        self._count, self._has_gpu, self.given = count, has_gpu, given

    @cached_property
    def data(self) -> DataSize:
        """The amount of training data."""
        return self._count() or DataSize(ASSUMED_IMAGES)

    @property
    def images(self) -> int:
        """Number of training images."""
        return self.data.images

    @cached_property
    def on_gpu(self) -> bool:
        """Whether training runs on a GPU."""
        return self._has_gpu()

    @property
    def device(self) -> str:
        """The device, as text for a reason."""
        return "a GPU" if self.on_gpu else "a CPU"


@dataclass(frozen=True)
class Choice:
    """A value that a rule chose for a field, and the reason."""

    field: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Rule:
    """A function that chooses the values of some fields."""

    fields: tuple[str, ...]
    choose: Callable[[Mapping[str, Any], Facts], Iterator[Choice]]


def sides_of_images(recipe: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the images of a recipe."""
    return height_and_width(recipe["data.image_size"], "data.image_size")


def time_budgets(recipe: Mapping[str, Any], facts: Facts) -> Iterator[Choice]:
    """Divide `minutes` between the two training stages, and the share of the tokenizer among all tokenizers that are trained for so long."""
    minutes = recipe["minutes"]
    if minutes is not None:
        check_range("minutes", minutes, above=0)
        for field, share in BUDGETS.items():
            tokenizers = 1 + conditions_in_budget(recipe["data.conditions"]) if field == "tokenizer_training.max_minutes" else 1
            among = f", divided among {tokenizers} tokenizers" if tokenizers > 1 else ""
            yield Choice(field, round(minutes * share / tokenizers, 4), f"{share:.0%} of minutes = {minutes:g}{among}")


def conditions_in_budget(conditions: Sequence[Any]) -> int:
    """The number of conditions whose tokenizer is trained as long as that of the images: without those whose `training` sets max_minutes."""
    trained = [record.get("training", {}) for record in conditions if isinstance(record, Mapping)  # the recipe reports other entries
               and record.get("kind") != "caption" and record.get("tokenizer") is None]
    return sum(not (isinstance(training, Mapping) and "max_minutes" in training) for training in trained)


def token_grid(recipe: Mapping[str, Any], facts: Facts) -> Iterator[Choice]:
    """Choose the pixels along one side of a token: the power of two whose grid is closest to the target, the smaller one of two."""
    size = checked_image_size("data.image_size", recipe["data.image_size"], at_least=16)
    height, width = sides = height_and_width(size)
    target = min(max(height * width / PIXELS_PER_TOKEN**2, SMALLEST_SIDE**2), LARGEST_SIDE**2)
    factor = 1
    if recipe["tokenizer.kind"] == "hierarchical":  # its top grid needs whole tokens too
        factor = recipe["tokenizer.top_factor"]
        check_range("tokenizer.top_factor", factor, at_least=2)
    fitting = [2**power for power in range(1, 8) if all(side % (2**power * factor) == 0 and side // (2**power * factor) >= 2 for side in sides)]
    candidates = fitting or [1]
    downsampling = min(candidates, key=lambda candidate: abs(math.log2(height * width / candidate**2 / target)))
    grid = f"{height // downsampling} x {width // downsampling}"
    if (height // downsampling) * (width // downsampling) > (2 * LARGEST_SIDE) ** 2:
        nearest = checked_image_size("data.image_size", [max(16, round(side / 16) * 16) for side in sides])
        of_what, numbers = ("it", "it to a multiple") if isinstance(size, int) else ("both sides", "both to multiples")
        raise InputError(f"data.image_size is {size}, which makes {grid} tokens, because {downsampling} is the largest power of two that divides "
                         f"{of_what}. Set {numbers} of 16, such as {nearest}.")
    reason = f"{size if isinstance(size, int) else f'{height} x {width}'} pixels make {grid} tokens"
    halvings = max(0, len(recipe["tokenizer.channel_multipliers"]) - 1) if "tokenizer.channel_multipliers" in facts.given else 0
    yield Choice("tokenizer.patch_size", min(max(1, downsampling // 2**halvings), max(PATCH_SIZES)), reason)
    check_range("tokenizer.patch_size", recipe["tokenizer.patch_size"], at_least=1)
    levels = 1 + round(math.log2(max(1, downsampling // recipe["tokenizer.patch_size"])))
    yield Choice("tokenizer.channel_multipliers", [1] * levels, reason)


def codebook(recipe: Mapping[str, Any], facts: Facts) -> Iterator[Choice]:
    """Choose the codebook size by the number of tokens in the training images."""
    codes, reason = codes_for_tokens(recipe, facts, pixels_per_token(recipe))
    yield Choice("tokenizer.codebook_size", codes, reason)


def top_codebook(recipe: Mapping[str, Any], facts: Facts) -> Iterator[Choice]:
    """Choose the codebook size of the top grid, if there is one, by the number of its tokens."""
    if recipe["tokenizer.kind"] == "hierarchical":
        pixels = pixels_per_token(recipe) * recipe["tokenizer.top_factor"]
        codes, reason = codes_for_tokens(recipe, facts, pixels)
        yield Choice("tokenizer.top", {"codebook_size": codes}, reason)


def pixels_per_token(recipe: Mapping[str, Any]) -> int:
    """Pixels along one side of a token."""
    return recipe["tokenizer.patch_size"] * 2 ** (len(recipe["tokenizer.channel_multipliers"]) - 1)


def codes_for_tokens(recipe: Mapping[str, Any], facts: Facts, pixels: int) -> tuple[int, str]:
    """The codebook size for a grid whose tokens are `pixels` pixels wide, and the reason."""
    height, width = sides_of_images(recipe)
    tokens = max(1, facts.images * (height // pixels) * (width // pixels))
    codes = min(MOST_CODES, max(FEWEST_CODES, 2 ** round(math.log2(tokens / TOKENS_PER_CODE))))
    return codes, f"for {tokens:,} tokens in {facts.images:,} training images"


def gradient_path(recipe: Mapping[str, Any], facts: Facts) -> Iterator[Choice]:
    """Use DiVeQ with quantizers that look up the nearest code."""
    quantizer, rotation = recipe["tokenizer.quantizer"], recipe["tokenizer.rotation_trick"]
    yield Choice("tokenizer.diveq", quantizer in (*NEAREST_CODE_KINDS, "residual") and not rotation,
                 f"for quantizer {quantizer}" + (" with rotation_trick" if rotation else ""))


def tokenizer_network(recipe: Mapping[str, Any], facts: Facts) -> Iterator[Choice]:
    """Choose width, depth and batch size by device."""
    yield Choice("tokenizer.channels", 128 if facts.on_gpu else 64, f"for {facts.device}")
    changes_width = set(recipe["tokenizer.channel_multipliers"]) != {1}
    yield Choice("tokenizer.residual_blocks", 2 if facts.on_gpu else int(changes_width), f"for {facts.device}")
    yield Choice("tokenizer_training.batch_size", 64 if facts.on_gpu else 16, f"for {facts.device}: many steps with small batches learn most")


def random_shifts(recipe: Mapping[str, Any], facts: Facts) -> Iterator[Choice]:
    """Shift the training images at random, unless there are many images."""
    yield Choice("data.shift", min(sides_of_images(recipe)) // 16 if facts.images < MANY_IMAGES else 0, f"{facts.images:,} training images")


def stored_views(recipe: Mapping[str, Any], facts: Facts) -> Iterator[Choice]:
    """Store more views for the prior if there are fewer images."""
    flips = "flip+" if recipe["data.flip"] else ""
    if facts.images < FEW_IMAGES:
        views = f"{flips}wide-shifts"
    elif facts.images < MANY_IMAGES:
        views = f"{flips}shifts"
    else:
        views = "flip" if recipe["data.flip"] else "none"
    yield Choice("tokens.views", views, f"{facts.images:,} training images, data.flip is {str(recipe['data.flip']).lower()}")
    height, width = sides_of_images(recipe)
    yield Choice("tokens.view_shift", max(1, min(height, width) // 32),
                 f"less than a token, for images of {height if height == width else f'{height} x {width}'} pixels")


def prior_training(recipe: Mapping[str, Any], facts: Facts) -> Iterator[Choice]:
    """Choose dropout, batch size and steps. A prior soon overfits to few images, so its training ends before that, at a low learning rate."""
    images, views = facts.images, facts.data.views
    if views is None and isinstance(recipe["tokens.views"], list):
        views = max(1, len(recipe["tokens.views"]))
    elif views is None:
        check_name("tokens.views (if not a list of records)", recipe["tokens.views"], tuple(VIEW_COUNTS))
        views = VIEW_COUNTS[recipe["tokens.views"]]
    yield Choice("prior.dropout", 0.2 if images < FEW_IMAGES else 0.1, f"{images:,} training images")
    yield Choice("prior_training.batch_size", 64 if facts.on_gpu else 32, f"for {facts.device}")
    check_range("prior_training.batch_size", recipe["prior_training.batch_size"], at_least=1)
    epochs = round(EPOCHS_OF_ONE_VIEW * math.sqrt(views))
    yield Choice("prior_training.max_steps", math.ceil(epochs * images / recipe["prior_training.batch_size"]),
                 f"{epochs} epochs of {images:,} training images, one view of each image per epoch; more epochs would overfit")


BUDGET_RULE = Rule(tuple(BUDGETS), time_budgets)
RULES = (
    Rule(("tokenizer.patch_size", "tokenizer.channel_multipliers"), token_grid),
    Rule(("tokenizer.codebook_size",), codebook),
    Rule(("tokenizer.top",), top_codebook),
    Rule(("tokenizer.diveq",), gradient_path),
    Rule(("tokenizer.channels", "tokenizer.residual_blocks", "tokenizer_training.batch_size"), tokenizer_network),
    Rule(("data.shift",), random_shifts),
    Rule(("tokens.views", "tokens.view_shift"), stored_views),
    Rule(("prior.dropout", "prior_training.batch_size", "prior_training.max_steps"), prior_training),
)
"""The rules of `fit_to_data`, in the order in which they run."""


def rules_of(recipe: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules that apply to a recipe."""
    return (BUDGET_RULE, *(RULES if recipe["fit_to_data"] else ()))


def fill_unset_fields(recipe: MutableMapping[str, Any], facts: Facts, recorded: Mapping[str, Any]) -> None:
    """Set the fields (dotted names) that are not in `facts.given`: to the recorded value, or else to the value that a rule chooses.

    A rule runs only if one of its fields is still unset, so a recipe that sets all of them needs no data set.
    """
    for rule in rules_of(recipe):
        missing = [field for field in rule.fields if field not in facts.given]
        for field in missing:
            if field in recorded:
                recipe[field] = recorded[field]
        still_unset = [field for field in missing if field not in recorded]
        if not still_unset:
            continue
        for choice in rule.choose(recipe, facts):  # the rule is a generator: it continues after its field is set, and can read the value
            if choice.field in still_unset:
                recipe[choice.field] = choice.value


def recorded_fields(run_dir: str, redo_stage: str | None) -> dict[str, Any]:
    """The fields with which the stages of a run were started, except `redo_stage` and the stages after it."""
    fields: dict[str, Any] = {}
    for stage in STAGES[:STAGES.index(redo_stage) if redo_stage in STAGES else len(STAGES)]:
        path = RunFolder(Path(run_dir)).record(stage)
        if path.is_file():
            recorded = read_object(path, f"run the stage again with --redo {stage}").get("fields")
            fields = (recorded if isinstance(recorded, dict) else {}) | fields
    return {name: value for name, value in fields.items() if value is not None}


def describe_choices(recipe: Recipe, stage: str, data: DataSize, on_gpu: bool) -> dict[str, str]:
    """The fields that the rules choose for the training of a stage, with values and reasons, as lines of its plan."""
    values = {field.name: field.value for field in recipe_fields(recipe)}
    chosen = [choice for rule in rules_of(values) for choice in rule.choose(values, Facts(lambda: data, lambda: on_gpu))]
    return {choice.field: f"{values[choice.field]}: {choice.reason}" if choice.value == values[choice.field]
            else f"{values[choice.field]}, as set; the rule gives {choice.value}"
            for choice in chosen if choice.field.partition(".")[0] in SECTIONS_IN_PLAN[stage]}
