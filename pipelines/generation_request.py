"""Checks the arguments of a call of a pipeline: settings, classes, conditions and seeds of each image."""

import dataclasses
import operator
import secrets
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, NamedTuple, cast

import torch

from pipelines.condition_inputs import ConditionInputs
from pipelines.labels import class_indices
from stage1_tokenizer.tiles.tiling import Tiling
from stage2_prior.chain_vocabulary import ChainVocabulary
from stage2_prior.generation.guidance_scales import segment_scales
from vqmosaic.errors import InputError, check_range, listed_names, nearest_name
from vqmosaic.recipes.field_types import as_integer
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.seeding import derive_seed, image_seeds

SAMPLING_SETTINGS = tuple(field.name for field in dataclasses.fields(SamplingConfig))
GUIDANCE_SETTINGS = tuple(name for name in SAMPLING_SETTINGS if name.startswith("guidance"))
CALL_ARGUMENTS = ("class_labels", "num_images_per_label", "seed", "prompt", "image", "given_ids", "size", "window_overlap", "output_type",
                  "callback", "batch_size", "compile")
"""The arguments of a call besides the sampling settings."""
FORMER_POSITIONS = ("guidance_scale", "temperature", "top_k", "top_p", "output_type", "callback", "batch_size")
"""The arguments of a call that could be positional in version 0.1.0, after seed."""


class Request(NamedTuple):
    """A checked request to a pipeline: the sampling settings, the class index of each image (None without classes) and its seed."""

    sampling: SamplingConfig
    classes: list[int] | None
    seeds: list[int]
    known_BT: torch.Tensor | None = None
    """Ids of all grids that are kept; -1 is a token to draw. None draws all."""
    given: Mapping[str, torch.Tensor] = {}
    """Ids (B, n) of the conditions, by name."""
    num_tries: int = 1
    """How often each image is drawn; the most likely one is returned."""
    finish: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    """Called with each batch of decoded images (B, C, H, W) and the position of the first one in the request. Returns the images to output."""
    keep_alpha: bool = False
    """Whether images of type pil keep alpha."""
    tiling: Tiling | None = None
    """The windows of images that are larger than the training images. `known_BT` and `given` are then those of the whole images."""
    evidence: Mapping[str, torch.Tensor] | None = None
    """The log likelihood (B, n, K) of what was observed for each code, by name of the grid."""
    prepare: Callable[["Request", range], "Request"] | None = None
    """Called with the request for a batch and its positions. Returns it with `known_BT` and `evidence`, which are large, for this batch alone."""

    def part(self, positions: range) -> "Request":
        """The request for the images at these positions alone."""
        batch = slice(positions.start, positions.stop)
        part = self._replace(classes=self.classes and self.classes[batch], seeds=self.seeds[batch],
                             known_BT=None if self.known_BT is None else self.known_BT[batch],
                             given={name: ids_Nn[batch] for name, ids_Nn in self.given.items()}, prepare=None)
        return part if self.prepare is None else self.prepare(part, positions)


class Given(NamedTuple):
    """What a call gives beside the class: prompts, images, and ids of conditions."""

    prompt: str | Sequence[str] | None = None
    image: Any = None
    ids: Mapping[str, torch.Tensor] | None = None


def check_request(vocabulary: ChainVocabulary, inputs: ConditionInputs, recommended: SamplingConfig,
                  class_labels: Sequence[str | int] | str | int | None, given: Given, num_images_per_label: int, seed: int | None,
                  settings: dict[str, Any], paired: Mapping[str, Sized] | None = None, tiling: Tiling | None = None) -> Request:
    """Check the arguments of a call and resolve classes, conditions, seeds and sampling settings. Raises InputError for invalid ones.

    `paired` are other arguments by name, such as images to edit, with which labels and conditions are paired by position. `tiling` has the windows of
    larger images.
    """
    check_settings(settings)
    count = as_integer("num_images_per_label", num_images_per_label)
    check_range("num_images_per_label", count, at_least=1)
    changed = {name: value for name, value in settings.items() if value is not None}
    sampling = dataclasses.replace(recommended, **changed)
    if sampling.top_k > vocabulary.most_codes:
        raise InputError(f"top_k is {sampling.top_k}; allowed: 0 (off) to {vocabulary.most_codes}, the codebook size.")
    labels, names = as_labels(class_labels), vocabulary.class_names
    if labels is not None and names is not None and vocabulary.learned_class_names is None:
        raise InputError("class_labels is given, but this prior was trained with drop rate 1 of the class, so it would have no effect. "
                         f"{inputs.describe_taken()}")
    classes = None if labels is None else class_indices(names, labels)
    if given.ids is not None and not isinstance(given.ids, Mapping):
        raise InputError(f"given_ids is {type(given.ids).__name__}; give a dict of ids by the name of their condition. {inputs.describe_taken()}")
    ids = inputs.ids(given.prompt, given.image, given.ids, tiling)
    for message in inputs.describe_cut(given.prompt):
        warnings.warn(message, stacklevel=level_of_user())
    if why := vocabulary.why_not_sampled(classes is not None, ids.keys()):
        if not vocabulary.conditions and len(vocabulary.vocabularies) == 1:
            raise InputError("class_labels is not given, but this prior was trained without label drop and cannot sample unconditionally. "
                             f"Give class_labels; allowed: {listed_names(names or [], 50)}.")
        raise InputError(f"{why} {inputs.describe_taken()}")
    if classes is None and not ids:
        guided = {name: changed[name] for name in GUIDANCE_SETTINGS if name in changed}
        if guided and guided.get("guidance_scale") != 1:
            remedy = inputs.remedy_without_guidance()
            words = " and ".join(f"{name} is {value}" for name, value in guided.items())
            raise InputError(f"{words}, but {'no class_labels are given' if not vocabulary.conditions else 'nothing is given'}, so guidance has no "
                             f"effect; {remedy}.")
        sampling = sampling.unguided()  # the recommended guidance needs classes or conditions
    check_guidance(vocabulary, sampling)
    vocabulary.check_guided_are_given(changed.get("guidance", {}), classes is not None, ids)
    rows = common_length({"class_labels": classes, **{inputs.label_of(name): rows for name, rows in ids.items()}, **(paired or {})})
    if classes is not None:
        classes = [index for index in (classes * rows if len(classes) == 1 else classes) for _ in range(count)]
    ids = {name: (each.expand(rows, -1) if len(each) == 1 else each).repeat_interleave(count, dim=0) for name, each in ids.items()}
    return Request(sampling, classes, image_seeds(secrets.randbits(62) if seed is None else seed, rows * count), given=ids, tiling=tiling)


def check_settings(settings: Iterable[str], arguments: Sequence[str] = CALL_ARGUMENTS) -> None:
    """Raise InputError for names that are no sampling settings. `arguments` are the other arguments of the method, which the message lists, too."""
    for name in settings:
        if name not in SAMPLING_SETTINGS:
            allowed = [*arguments, *SAMPLING_SETTINGS]
            nearest = next((each for each in allowed if each.startswith(name)), None) or nearest_name(name, allowed)
            hint = f" Did you mean {nearest!r}?" if nearest else ""
            raise InputError(f"there is no argument or sampling setting {name!r}.{hint} Arguments: {', '.join(arguments)}. Sampling settings: "
                             f"{', '.join(SAMPLING_SETTINGS)}.")


def check_training_size(method: str, arguments: dict[str, Any]) -> None:
    """Remove `size` and `window_overlap` from the arguments of a method that draws only images of the training size. Raises InputError if given."""
    if given := [name for name in ("size", "window_overlap") if arguments.pop(name, None) is not None]:
        raise InputError(f"{method} draws images of the training size only; leave {' and '.join(given)} out. A call of the pipeline, inpaint, "
                         "outpaint and complete draw larger images.")


def level_of_user() -> int:
    """The `stacklevel` with which a warning of the calling function names the line, outside of this package, that called the pipeline."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(f"{__package__}."):
        frame, level = frame.f_back, level + 1
    return level


def check_guidance(vocabulary: ChainVocabulary, sampling: SamplingConfig) -> None:
    """Raise InputError for guidance of segments that no prior is given, and for scales that a prior has not learned."""
    if unknown := [name for name in sampling.guidance if name not in vocabulary.given_names]:
        raise InputError(f"guidance has {', '.join(unknown)}; the given segments of the prior are: {', '.join(vocabulary.given_names) or 'none'}.")
    for number, each in enumerate(vocabulary.vocabularies):
        own = vocabulary.settings_of(number, sampling)
        if own.guidance:
            segment_scales(each, own.guidance_scale, own.guidance)


def tries_seeds(seeds: Sequence[int], num_tries: int) -> list[list[int]]:
    """The seeds of the images for each try. The first try has the seeds of the images themselves, so it does not depend on the number of tries."""
    return [list(seeds), *([derive_seed("try", number, seed) for seed in seeds] for number in range(1, num_tries))]


def as_labels(class_labels: Sequence[str | int] | str | int | None) -> list[str | int] | None:
    """The labels of a call as a list, or None if there are none. Raises InputError for an empty list."""
    if class_labels is None:
        return None
    single_label = class_labels if isinstance(class_labels, str) else as_index(class_labels)  # None for a sequence
    labels = list(cast("Sequence[str | int]", class_labels)) if single_label is None else [single_label]
    if not labels:
        raise InputError("class_labels is empty; give class names or indices, or None.")
    return labels


def common_length(given: Mapping[str, Any]) -> int:
    """The number of entries of what is given, 1 for nothing. A single entry counts for all. Raises InputError for different numbers."""
    lengths = {name: len(entries) for name, entries in given.items() if entries is not None}
    several = {length for length in lengths.values() if length != 1}
    if len(several) > 1:
        raise InputError(f"{' and '.join(f'{name} has {counted_entries(length)}' for name, length in lengths.items())}; give one for each image, or "
                         "a single one for all.")
    return several.pop() if several else 1


def counted_entries(count: int) -> str:
    """The number with its noun."""
    return f"{count} {'entry' if count == 1 else 'entries'}"


def keywords_from_former_positions(positional: Sequence[Any]) -> dict[str, Any]:
    """Name the deprecated positional arguments of a call of the pipeline, and warn its caller. Raises TypeError if there are too many."""
    if len(positional) > len(FORMER_POSITIONS):
        raise TypeError(f"a call takes at most {3 + len(FORMER_POSITIONS)} positional arguments")
    keywords = dict(zip(FORMER_POSITIONS[:len(positional)], positional, strict=True))
    warnings.warn(f"pass {', '.join(keywords)} by keyword", DeprecationWarning, stacklevel=3)
    return keywords


def as_index(value: Any) -> int | None:
    """A single integer of any type (int, numpy, torch) as int, or None for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        return None
