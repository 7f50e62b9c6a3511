"""Rules that choose recipe fields from the data. With `fit_to_data: true`, they set the fields that neither the recipe nor the command line sets.

Each rule is one function. It gives its fields values, each with a reason, and may read fields that were set before. The rules know the image
size, the number of training images and the device. The plan of a training prints the chosen values. A run keeps the values it started with:
stages/<stage>.json records them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vqmosaic.json_files import read_object
from vqmosaic.recipe import Recipe, recipe_fields
from vqmosaic.run_folder import STAGES, RunFolder
from vqmosaic.tokenizer_sections import NEAREST_CODE_KINDS, PATCH_SIZES

ASSUMED_IMAGES = 5000
"""Number of training images to assume if the data set is not known, as in `vqmosaic run image_folder --help`."""
BUDGETS = {"tokenizer_training.max_minutes": 0.5, "prior_training.max_minutes": 0.5}
"""The fields between which `minutes` is divided, and the share of each."""
PIXELS_PER_TOKEN, SMALLEST_SIDE, LARGEST_SIDE = 8, 8, 16
"""The grid that the rules aim at: tokens of 8 x 8 pixels, with at least 8 and at most 16 tokens along one side."""

FEWEST_CODES, MOST_CODES, TOKENS_PER_CODE = 128, 512, 64
"""Bounds of the codebook size, and how many tokens the training images should have for each code."""
FEW_IMAGES, MANY_IMAGES = 2000, 25_000
"""Augmentation is moderate between these numbers of training images, stronger below and weaker above."""
PRIOR_EPOCHS = {"none": 8, "flip": 12, "shifts": 20, "flip+shifts": 30, "wide-shifts": 40, "flip+wide-shifts": 60, "ten-crop": 20}
"""Largest number of epochs of the prior for each value of tokens.views. An epoch reads one view of each image."""
PLANNED = {"tokenizer": ("data", "tokenizer", "tokenizer_training"), "prior": ("tokens", "prior", "prior_training")}
"""For each training, the sections whose chosen fields its plan prints."""


@dataclass(frozen=True)
class Choice:
    """The value that a rule gives to a field, and why."""

    field: str
    value: Any
    reason: str


CountImages = Callable[[Mapping[str, Any]], int | None]
"""Counts the training images of a recipe, given its fields by dotted name; None if no data set is named."""


def no_count() -> None:
    """Stands in for CountImages if the caller gives no function: the number of images is not known."""


class Facts:
    """What the rules know about data and device. Each fact is looked up when a rule first needs it, because a look-up takes time."""

    def __init__(self, count: Callable[[], int | None], has_gpu: Callable[[], bool]):
        self._count_images, self._has_gpu = count, has_gpu

    @cached_property
    def images(self) -> int:
        """Number of training images."""
        return self._count_images() or ASSUMED_IMAGES

    @cached_property
    def on_gpu(self) -> bool:
        """Whether training runs on a GPU."""
        return self._has_gpu()


Rule = Callable[[Mapping[str, Any], Facts], Iterator[Choice]]


def time_budgets(recipe: Mapping[str, Any], facts: Facts) -> Iterator[Choice]:
    """`minutes` is divided between the two trainings."""
    minutes = recipe["minutes"]
    if minutes is not None:
        for field, share in BUDGETS.items():
            yield Choice(field, round(minutes * share, 4), f"{share:.0%} of minutes = {minutes:g}")


def token_grid(recipe: Mapping[str, Any], facts: Facts) -> Iterator[Choice]:
    """Pixels along one side of a token: the power of two that brings the grid closest to the target."""
    size = recipe["data.image_size"]
    goal = min(max(size / PIXELS_PER_TOKEN, SMALLEST_SIDE), LARGEST_SIDE)
    fitting = [2**power for power in range(1, 8) if size % 2**power == 0 and size // 2**power >= 2] or [1]
    step = min(fitting, key=lambda step: abs(math.log2(size / step / goal)))
    reason = f"{size} pixels make {size // step} x {size // step} tokens"
    yield Choice("tokenizer.patch_size", min(step, max(PATCH_SIZES)), reason)
    levels = 1 + round(math.log2(max(1, step // recipe["tokenizer.patch_size"])))
    yield Choice("tokenizer.channel_multipliers", [1] * levels, reason)


def tokenizer_network(recipe: Mapping[str, Any], facts: Facts) -> Iterator[Choice]:
    """Codebook size by the number of tokens in the training images; width, depth and batch size by device."""
    step = recipe["tokenizer.patch_size"] * 2 ** (len(recipe["tokenizer.channel_multipliers"]) - 1)
    tokens = facts.images * (recipe["data.image_size"] // step) ** 2
    codes = min(MOST_CODES, max(FEWEST_CODES, 2 ** round(math.log2(tokens / TOKENS_PER_CODE))))
    yield Choice("tokenizer.codebook_size", codes, f"for {tokens:,} tokens in {facts.images:,} training images")
    quantizer = recipe["tokenizer.quantizer"]
    yield Choice("tokenizer.diveq", quantizer in (*NEAREST_CODE_KINDS, "residual") and not recipe["tokenizer.rotation_trick"],
                 f"for quantizer {quantizer}, rotation_trick {str(recipe['tokenizer.rotation_trick']).lower()}")
    device = "a GPU" if facts.on_gpu else "a CPU"
    yield Choice("tokenizer.channels", 128 if facts.on_gpu else 64, f"for {device}")
    yield Choice("tokenizer.residual_blocks", 2 if facts.on_gpu else 0, f"for {device}")
    yield Choice("tokenizer_training.batch_size", 64 if facts.on_gpu else 16, f"for {device}: many small steps learn most in a short time")


def augmentation(recipe: Mapping[str, Any], facts: Facts) -> Iterator[Choice]:
    """Fewer images get more variants: random shifts for the tokenizer, stored views for the prior."""
    images, size, flips = f"{facts.images:,} training images", recipe["data.image_size"], "flip+" if recipe["data.flip"] else ""
    yield Choice("data.shift", size // 16 if facts.images < MANY_IMAGES else 0, images)
    if facts.images < FEW_IMAGES:
        views = f"{flips}wide-shifts"
    elif facts.images < MANY_IMAGES:
        views = f"{flips}shifts"
    else:
        views = "flip" if recipe["data.flip"] else "none"
    yield Choice("tokens.views", views, f"{images}, data.flip is {str(recipe['data.flip']).lower()}")
    yield Choice("tokens.view_shift", max(1, size // 32), f"a fraction of a token, for images of {size} pixels")


def prior_training(recipe: Mapping[str, Any], facts: Facts) -> Iterator[Choice]:
    """A prior soon overfits to few images. Its training ends before that, with a low learning rate."""
    images = f"{facts.images:,} training images"
    yield Choice("prior.dropout", 0.2 if facts.images < FEW_IMAGES else 0.1, images)
    device = "a GPU" if facts.on_gpu else "a CPU"
    yield Choice("prior_training.batch_size", 64 if facts.on_gpu else 32, f"for {device}")
    epochs = PRIOR_EPOCHS[recipe["tokens.views"]] if isinstance(recipe["tokens.views"], str) else PRIOR_EPOCHS["shifts"]
    yield Choice("prior_training.max_steps", math.ceil(epochs * facts.images / recipe["prior_training.batch_size"]),
                 f"{epochs} epochs of {images}; more would overfit")


RULES: tuple[Rule, ...] = (token_grid, tokenizer_network, augmentation, prior_training)
"""The rules of `fit_to_data`, in their order."""


def choices(recipe: MutableMapping[str, Any], given: set[str] | None, facts: Facts, recorded: Mapping[str, Any] | None = None) -> list[Choice]:
    """The choices of the rules for a recipe, given its fields by dotted name.

    Sets each field that is not in `given` to its `recorded` value, or else to the chosen value. If `given` is None, all fields keep their values.
    """
    recorded = {name: value for name, value in (recorded or {}).items() if value is not None}
    chosen: list[Choice] = []
    for rule in (time_budgets, *(RULES if recipe["fit_to_data"] else ())):
        for choice in rule(recipe, facts):  # the rule continues after its field is set, and can read the field
            if given is not None and choice.field not in given:
                recipe[choice.field] = recorded.get(choice.field, choice.value)
            chosen.append(choice)
    return chosen


def recorded_fields(run_dir: str, redone: str | None) -> dict[str, Any]:
    """The fields with which the stages of a run were started, except the stage `redone` and the stages after it."""
    fields: dict[str, Any] = {}
    for stage in STAGES[:STAGES.index(redone) if redone in STAGES else len(STAGES)]:
        path = RunFolder(Path(run_dir)).record(stage)
        if path.is_file():
            recorded = read_object(path, f"make the stage again with --redo {stage}").get("fields")
            fields = (recorded if isinstance(recorded, dict) else {}) | fields
    return fields


def describe_choices(recipe: Recipe, stage: str, images: int, on_gpu: bool) -> dict[str, str]:
    """The fields of a stage that the rules choose, with their values and reasons, for the plan of its training."""
    values = {field.name: field.value for field in recipe_fields(recipe)}
    return {choice.field: f"{values[choice.field]}: {choice.reason}" if choice.value == values[choice.field]
            else f"{values[choice.field]}, as set; the rule gives {choice.value}"
            for choice in choices(values, None, Facts(lambda: images, lambda: on_gpu)) if choice.field.partition(".")[0] in PLANNED[stage]}
