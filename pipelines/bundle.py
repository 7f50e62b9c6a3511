"""Joins a tokenizer and a prior into one self-contained pipeline folder.

    vqmosaic bundle digits                                                    # the two parts of this run
    vqmosaic bundle --tokenizer a/tokenizer --prior b/prior --out pipeline    # parts from anywhere

pipeline/
    tokenizer/, prior/    copies of the exports
    pipeline.json         recommended sampling settings, class names, token fingerprint; the sweep record if `vqmosaic sweep` chose the settings
"""

import dataclasses
import operator
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.stages.stage_inputs import (
    full_fingerprint_of_tokenizer,
    predicts_in_any_order,
    token_fingerprint_of_tokenizer,
    vocabulary_of_prior,
)
from stage1_tokenizer.tokenizer_grids import grids_of_tokenizer
from stage2_prior.digests import DIGESTS_NAME, check_digests, fingerprint_of_weights, write_digests
from stage2_prior.vocabulary import VOCABULARY_NAME, Vocabulary
from token_shards.manifest import Grid, describe_grids
from vqmosaic import __version__
from vqmosaic.errors import InputError, did_you_mean, listed_names
from vqmosaic.files.durable_files import copy_folder, publish, removed_on_failure, temporary_sibling, write_json
from vqmosaic.files.fingerprints import check_same_tokens
from vqmosaic.files.full_disks import explain_full_disk, size_of
from vqmosaic.files.json_files import VERSION_FIELD, check_fields, check_format, from_fields, read_object, written_by
from vqmosaic.files.permissions import check_readable
from vqmosaic.recipes.recipe_sections import SamplingConfig

if TYPE_CHECKING:
    import torch

FORMAT = "vqmosaic.pipeline"
FORMAT_VERSION = 1
FIELDS = ("format", "format_version", "class_names", "token_fingerprint", "sampling")
SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingConfig))


def make_bundle(tokenizer: Path, prior: Path, out: Path, sampling: SamplingConfig) -> Path:
    """Write a pipeline folder from a tokenizer folder and a prior folder, and return its path. After a failure, no partial folder remains.

    If a sweep chose these settings for these parts, its record is kept. It is read from the pipeline that contains the tokenizer, or from the
    one that is replaced.

    Raises:
        ValueError: one of the parts is missing, the prior was trained on tokens of another tokenizer (the message gives both fingerprints and
            paths) or on other grids, the sampling settings do not fit the prior, or `out` is a file, or a folder with files but without a pipeline.
    """
    check_replaceable(out)
    token_fingerprint, vocabulary = token_fingerprint_of_tokenizer(tokenizer), vocabulary_of_prior(prior)
    check_same_tokens(token_fingerprint, tokenizer, vocabulary.token_fingerprint, prior)
    check_same_grids(grids_of_tokenizer(tokenizer), tokenizer, vocabulary, prior)
    check_sampling_fits(sampling, vocabulary, prior)
    check_digests(prior)
    record = find_sweep_record([tokenizer.parent, out], sampling, tokenizer, prior)
    partial = temporary_sibling(out)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with explain_full_disk(out.parent):
            partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot create {out}: {error.strerror}. Give another folder for the pipeline.") from None
    with explain_full_disk(out.parent, lambda: size_of(tokenizer) + size_of(prior)), removed_on_failure(partial):
        copy_folder(tokenizer, partial / "tokenizer")
        copy_folder(prior, partial / "prior")
        if not (partial / "prior" / DIGESTS_NAME).is_file():  # a prior saved by 0.1.0: detect later changes of the copy
            write_digests(partial / "prior")
        write_json(partial / "pipeline.json", {
            "format": FORMAT, "format_version": FORMAT_VERSION, VERSION_FIELD: __version__, "class_names": vocabulary.class_names,
            "token_fingerprint": token_fingerprint, "sampling": dataclasses.asdict(sampling), **({"sweep": record} if record else {})})
        publish(partial, out)
    return out


def part_fingerprints(tokenizer: Path, prior: Path) -> dict[str, str]:
    """The fingerprints that identify the parts of a pipeline: of the tokens, of the whole tokenizer, and of the prior's weights."""
    return {"tokens": token_fingerprint_of_tokenizer(tokenizer), "tokenizer": full_fingerprint_of_tokenizer(tokenizer),
            "prior": fingerprint_of_weights(prior)}


def find_sweep_record(folders: Sequence[Path], sampling: SamplingConfig, tokenizer: Path, prior: Path) -> dict[str, Any] | None:
    """The record of the sweep that chose these settings for these parts, from the first pipeline in `folders` that has it, or None."""
    for folder in folders:
        if not (folder / "pipeline.json").is_file():
            continue
        try:
            content = read_bundle(folder)
            record = content.get("sweep")
            if record and recommended_sampling(folder, content) == sampling and record["setup"]["pipeline"] == part_fingerprints(tokenizer, prior):
                return record
        except (InputError, TypeError, KeyError):  # the pipeline to be replaced may have another version, or be damaged
            continue
    return None


def recommend(folder: Path, sampling: SamplingConfig, record: dict[str, Any]) -> None:
    """Write recommended sampling settings to a pipeline folder, with the record of the sweep that chose them. The write is atomic.

    Raises:
        ValueError: the record was not made with the parts of this pipeline.
    """
    content, parts = read_bundle(folder), part_fingerprints(folder / "tokenizer", folder / "prior")
    if record["setup"]["pipeline"] != parts:
        raise InputError(f"{folder} has changed since the sweep started: the sweep measured another tokenizer or prior. "
                         "The recommended settings are unchanged. Start a new sweep.")
    write_json(folder / "pipeline.json", content | {"sampling": dataclasses.asdict(sampling), "sweep": record})


def check_replaceable(out: Path) -> None:
    """Raise InputError unless the path does not exist, is an empty folder, or is a pipeline folder, which may be replaced."""
    is_free = not out.exists() or (out.is_dir() and ((out / "pipeline.json").is_file() or not any(out.iterdir())))
    if not is_free:
        what = "a folder with other files, which would be lost" if out.is_dir() else "a file"
        raise InputError(f"{out} is {what}. Give a new folder, an empty folder, or a pipeline folder to replace.")


def check_same_grids(grids: Sequence[Grid], tokenizer: object, vocabulary: Vocabulary, prior: object) -> None:
    """Raise InputError unless a prior predicts all grids of a tokenizer, in its order, and is given nothing but the class.

    `tokenizer` and `prior` are names for the message.
    """
    if list(grids) != list(vocabulary.grids):
        raise InputError(f"{tokenizer} and {prior} do not belong together: the tokenizer has the grids {describe_grids(grids) or 'none'}, but the "
                         f"prior predicts {describe_grids(vocabulary.grids)}. A pipeline needs a prior of all grids of its tokenizer, in the same "
                         "order.")
    if vocabulary.conditions:
        raise InputError(f"{prior} is given {', '.join(condition.name for condition in vocabulary.conditions)} besides the class, which pipelines do "
                         "not support yet. Use TokenPrior.sample.")


def check_sampling_fits(sampling: SamplingConfig, vocabulary: Vocabulary, prior: Path) -> None:
    """Raise InputError if a prior with this vocabulary does not support the sampling settings."""
    if sampling.guidance_scale != 1 and (why := vocabulary.why_unguided()):
        raise InputError(f"sampling.guidance_scale is {sampling.guidance_scale:g}, but the prior in {prior} {why}. Set sampling.guidance_scale to 1.")
    is_usual = sampling.order == "raster" and sampling.steps in (None, vocabulary.num_tokens)  # one token after another, row by row
    if not is_usual and not predicts_in_any_order(prior):
        setting = f"order is {sampling.order!r}" if sampling.order != "raster" else f"steps is {sampling.steps}"
        raise InputError(f"sampling.{setting}, but the prior in {prior} was trained in raster order, so it draws one token after another. Leave "
                         "it out, or train a grid_transformer with prior_training.order annealed.")
    if sampling.steps is not None and sampling.steps > vocabulary.num_tokens:
        raise InputError(f"sampling.steps is {sampling.steps}, but the prior in {prior} has {vocabulary.num_tokens} tokens per image; allowed: 1 to "
                         f"{vocabulary.num_tokens}.")
    if sampling.top_k > vocabulary.most_codes:
        raise InputError(f"sampling.top_k is {sampling.top_k}, but the prior in {prior} has {vocabulary.most_codes} codes; allowed: 0 (off) to "
                         f"{vocabulary.most_codes}.")


def check_given_sampling(folder: Path, content: dict, given: dict[str, Any]) -> SamplingConfig:
    """The recommended settings of a pipeline, overridden by the given ones. Raises InputError if they are invalid or do not fit its prior."""
    recommended = recommended_sampling(folder, content)
    with naming_options():
        sampling = dataclasses.replace(recommended, **given)
        check_sampling_fits(sampling, vocabulary_of_prior(folder / "prior"), folder / "prior")
    return sampling


@contextmanager
def naming_options(names: Iterable[str] = SAMPLING_FIELDS) -> Iterator[None]:
    """Make errors name the options of a command, such as --top_k, instead of the fields of a recipe, such as sampling.top_k.

    Args:
        names: the sampling settings for which the command has an option.
    """
    try:
        yield
    except InputError as error:
        raise type(error)(re.sub(rf"(?<![\w./-])sampling\.(?=({'|'.join(names)})\b)", "--", str(error))) from None


def find_pipeline(path: str | Path) -> Path:
    """The pipeline folder of a path, which is a pipeline folder or a run folder. Raises InputError if there is none."""
    path = Path(path)
    for folder in (path, path / "pipeline"):
        check_readable(folder / "pipeline.json")
        if (folder / "pipeline.json").is_file():
            return folder
    finished = sorted(str(found.parent.parent) for found in Path("runs").glob("*/pipeline/pipeline.json"))
    hint = f" Finished runs in this folder: {', '.join(finished)}." if finished else ""
    what = "has no finished pipeline" if path.is_dir() else "does not exist"
    raise InputError(f"{path} {what}. Give a run folder, or a pipeline folder with pipeline.json from `vqmosaic bundle`.{hint}")


def find_tokenizer(path: str | Path) -> Path:
    """The tokenizer folder of a path, which is a tokenizer, pipeline or run folder. Raises InputError if there is none."""
    path = Path(path)
    check_readable(path / "pipeline.json")
    candidates = [path / "tokenizer", path] if (path / "pipeline.json").is_file() else [path / "pipeline" / "tokenizer", path / "tokenizer", path]
    for folder in candidates:
        check_readable(folder / "config.json")
        if (folder / "config.json").is_file():
            return folder
    what = "has no finished pipeline and no tokenizer" if path.is_dir() else "does not exist"
    raise InputError(f"{path} {what}. Give a run folder, a pipeline folder or a tokenizer folder. `vqmosaic train-tokenizer` writes the "
                     "tokenizer to <run_dir>/tokenizer.")


def read_bundle(folder: Path) -> dict:
    """The content of pipeline.json, after a check of its format, version, fields, class names and token fingerprint.

    Does not check the sampling settings, which users may edit: `recommended_sampling` does.
    """
    path = folder / "pipeline.json"
    content = read_object(path, "`vqmosaic bundle` writes it again")
    check_format(content, FORMAT, FORMAT_VERSION, str(path))
    check_fields(content, (*FIELDS, VERSION_FIELD, "sweep"), str(path), written_by(content), FIELDS)
    vocabulary = vocabulary_of_prior(folder / "prior")
    for name in ("class_names", "token_fingerprint"):
        if content[name] != getattr(vocabulary, name):
            raise InputError(f"{path} has another {name} than {folder / 'prior' / VOCABULARY_NAME}. One of them was edited or replaced. Copy the "
                             "pipeline again, or run `vqmosaic bundle` again.")
    return content


def recommended_sampling(folder: Path, content: dict) -> SamplingConfig:
    """The sampling settings in the content of a folder's pipeline.json. Missing settings get their defaults."""
    return from_fields(SamplingConfig, content["sampling"], f"{folder / 'pipeline.json'}: sampling", written_by(content))


def evenly_spaced_classes(classes: int, samples: int) -> list[int]:
    """At most `samples` class indices, evenly spaced between 0 and classes - 1."""
    count = min(classes, samples)
    return [index * classes // count for index in range(count)]


def class_indices(names: list[str] | None, labels: Sequence[str | int]) -> list[int]:
    """The index of each label, which is a class name or an integer of any type.

    Raises InputError for unknown classes, and if the pipeline has no classes (`names` is None).
    """
    if names is None:
        raise InputError(f"the classes {list(labels)} are given, but this pipeline was trained without classes. Leave them out.")
    indices = []
    for label in labels:
        if isinstance(label, str):
            if label not in names:
                raise InputError(f"no class {label!r}; there are {len(names)}: {listed_names(names, 50)}."
                                 f"{did_you_mean(label, names)}")
            indices.append(names.index(label))
            continue
        try:
            index = operator.index(label)
        except TypeError:
            raise InputError(f"class_labels has {label!r}; allowed: class names as strings, class indices as integers.") from None
        if not 0 <= index < len(names):
            raise InputError(f"class index {index} does not exist; allowed: 0 to {len(names) - 1}.")
        indices.append(index)
    return indices


def labels_from_text(names: list[str] | None, text: str) -> list[str | int]:
    """The labels in a comma-separated text: class names as strings, class indices as integers.

    Class names take precedence, longer ones first, because names may contain commas. If all class names are numbers, a number is always a name:
    with classes 1 to 12, 0 is an error and not the first class.
    """
    parts, known, labels, start = text.split(","), set(names or []), [], 0
    has_indices = not known or not all(name.isdecimal() for name in known)
    while start < len(parts):
        spans = (",".join(parts[start:stop]).strip() for stop in range(len(parts), start, -1))
        label = next((span for span in spans if span in known), parts[start].strip())
        labels.append(int(label) if has_indices and label not in known and label.isdecimal() else label)
        start += 1 + label.count(",")  # only a class name can contain commas
    return labels


def classes_from_text(names: list[str] | None, text: str | None) -> list[int] | None:
    """The class indices in a comma-separated text. Without a text: all classes, or None if there are none. Raises as `class_indices` does."""
    if text is not None:
        return class_indices(names, labels_from_text(names, text))
    return None if names is None else list(range(len(names)))


def usable_device(device: "str | torch.device | None", given_as: str = "device") -> "torch.device":
    """The requested device, or the best device of this machine if `device` is None. Imports torch.

    Raises InputError if this machine does not have the device. The message contains `given_as`, the name of the option or argument.
    """
    import torch

    from vqmosaic.runs.devices import default_device

    best = default_device()
    if device is None:
        return best
    try:
        requested = torch.device(device)
    except (RuntimeError, TypeError):
        requested = None
    count = torch.accelerator.device_count() if best.type != "cpu" else 0
    if requested is None or (requested.type != "cpu" and (requested.type != best.type or (requested.index or 0) >= count)):
        available = ["cpu", *(f"{best.type}:{index}" for index in range(count))]
        raise InputError(f"{given_as} is {str(device)!r}; this machine has: {', '.join(available)}.")
    return requested
