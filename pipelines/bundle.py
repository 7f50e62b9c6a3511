"""Join a tokenizer and a prior into one self-contained pipeline folder.

    vqmosaic bundle digits                                                    # this run's own two parts
    vqmosaic bundle --tokenizer a/tokenizer --prior b/prior --out pipeline    # parts trained anywhere

pipeline/
    tokenizer/, prior/    copies of the exports
    pipeline.json         recommended sampling settings, class names, fingerprints; where the settings were chosen by `vqmosaic sweep`, its record
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
    read_vocabulary,
    token_fingerprint_of_prior,
    token_fingerprint_of_tokenizer,
)
from stage2_prior.digests import DIGESTS_NAME, check_digests, fingerprint_of_weights, write_digests
from vqmosaic import __version__
from vqmosaic.errors import InputError, nearest_name
from vqmosaic.files.durable_files import copy_folder, publish, removed_on_failure, temporary_sibling, write_json
from vqmosaic.files.fingerprints import check_same_tokens
from vqmosaic.files.full_disks import naming_full_disks, size_of
from vqmosaic.files.json_files import VERSION_FIELD, check_fields, from_fields, read_object, version_hint, written_by
from vqmosaic.files.permissions import check_readable
from vqmosaic.recipes.recipe_sections import SamplingConfig

if TYPE_CHECKING:
    import torch

FORMAT = "vqmosaic.pipeline"
FORMAT_VERSION = 1
FIELDS = ("format", "format_version", "class_names", "token_fingerprint", "sampling")
SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingConfig))


def make_bundle(tokenizer: Path, prior: Path, out: Path, sampling: SamplingConfig) -> Path:
    """The pipeline folder made of a tokenizer and a prior folder, whole or absent.

    The record of a sweep is taken along from the pipeline that the parts lie in, or that is replaced, where it chose these settings for these parts.

    Raises:
        ValueError: one of the parts is missing, the prior was trained on another tokenizer's tokens (both values and paths), the sampling
            settings do not fit it, or `out` holds something else than a pipeline.
    """
    check_replaceable(out)
    token_fingerprint = token_fingerprint_of_tokenizer(tokenizer)
    check_same_tokens(token_fingerprint, tokenizer, token_fingerprint_of_prior(prior), prior)
    vocabulary = read_vocabulary(prior)
    check_sampling_fits(sampling, vocabulary, prior)
    check_digests(prior)
    record = record_that_fits([tokenizer.parent, out], sampling, tokenizer, prior)
    partial = temporary_sibling(out)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming_full_disks(out.parent):
            partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made: {error.strerror}. Give another folder for the pipeline.") from None
    with naming_full_disks(out.parent, lambda: size_of(tokenizer) + size_of(prior)), removed_on_failure(partial):
        copy_folder(tokenizer, partial / "tokenizer")
        copy_folder(prior, partial / "prior")
        if not (partial / "prior" / DIGESTS_NAME).is_file():  # a prior saved by 0.1.0: changes of its copy are detected from now on
            write_digests(partial / "prior")
        write_json(partial / "pipeline.json", {
            "format": FORMAT, "format_version": FORMAT_VERSION, VERSION_FIELD: __version__, "class_names": vocabulary["class_names"],
            "token_fingerprint": token_fingerprint, "sampling": dataclasses.asdict(sampling), **({"sweep": record} if record else {})})
        publish(partial, out)
    return out


def part_fingerprints(tokenizer: Path, prior: Path) -> dict[str, str]:
    """What decides the images of a pipeline: the tokens' fingerprint, that of the whole tokenizer, and the digest of the prior's weights."""
    return {"tokens": token_fingerprint_of_tokenizer(tokenizer), "tokenizer": full_fingerprint_of_tokenizer(tokenizer),
            "prior": fingerprint_of_weights(prior)}


def record_that_fits(folders: Sequence[Path], sampling: SamplingConfig, tokenizer: Path, prior: Path) -> dict[str, Any] | None:
    """The record of the sweep that chose these settings for these parts, out of the pipelines in `folders`; None where there is none."""
    for folder in folders:
        if not (folder / "pipeline.json").is_file():
            continue
        try:
            content = read_bundle(folder)
            record = content.get("sweep")
            if record and recommended_sampling(folder, content) == sampling and record["setup"]["pipeline"] == part_fingerprints(tokenizer, prior):
                return record
        except (InputError, TypeError, KeyError):  # the pipeline that is replaced may be of another version, or damaged
            continue
    return None


def recommend(folder: Path, sampling: SamplingConfig, record: dict[str, Any]) -> None:
    """Make settings those that a pipeline folder recommends, with the record of the sweep that chose them; whole or not at all.

    Raises:
        ValueError: the record was not made with this pipeline's parts.
    """
    content, parts = read_bundle(folder), part_fingerprints(folder / "tokenizer", folder / "prior")
    if record["setup"]["pipeline"] != parts:
        raise InputError(f"{folder} has changed since the sweep began: its tokenizer or its prior is not the one that was measured. "
                         "Its recommended settings stay as they are; start another sweep.")
    write_json(folder / "pipeline.json", content | {"sampling": dataclasses.asdict(sampling), "sweep": record})


def check_replaceable(out: Path) -> None:
    """Raise InputError unless a pipeline may be written to this path: nothing is there, an empty folder, or an older pipeline."""
    is_free = not out.exists() or (out.is_dir() and ((out / "pipeline.json").is_file() or not any(out.iterdir())))
    if not is_free:
        what = "a folder with other things in it, which would be lost" if out.is_dir() else "a file"
        raise InputError(f"{out} is {what}; give a folder that does not exist yet, or that holds a pipeline to be replaced.")


def check_sampling_fits(sampling: SamplingConfig, vocabulary: dict[str, Any], prior: Path) -> None:
    """Raise InputError where sampling settings ask for what a prior's vocabulary.json says it cannot do."""
    if sampling.guidance_scale != 1 and (vocabulary["class_names"] is None or vocabulary["label_drop"] == 0):
        why = "has no classes" if vocabulary["class_names"] is None else "was trained without label drop"
        raise InputError(f"sampling.guidance_scale is {sampling.guidance_scale:g}, but the prior in {prior} {why}; set sampling.guidance_scale to 1.")
    codes = max(grid["codebook_size"] for grid in vocabulary["grids"])
    if sampling.top_k > codes:
        raise InputError(f"sampling.top_k is {sampling.top_k}, but the prior in {prior} knows {codes} codes; allowed: 0 (off) to {codes}.")


def check_given_sampling(folder: Path, content: dict, given: dict[str, Any]) -> SamplingConfig:
    """A pipeline's recommended settings, overridden by the given ones. Raises InputError if they are invalid or do not fit its prior."""
    recommended = recommended_sampling(folder, content)
    with naming_options():
        sampling = dataclasses.replace(recommended, **given)
        check_sampling_fits(sampling, read_vocabulary(folder / "prior"), folder / "prior")
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
    """The pipeline folder for a path that is one, or is a run folder with one; InputError otherwise."""
    path = Path(path)
    for folder in (path, path / "pipeline"):
        check_readable(folder / "pipeline.json")
        if (folder / "pipeline.json").is_file():
            return folder
    known = sorted(str(found.parent.parent) for found in Path("runs").glob("*/pipeline/pipeline.json"))
    hint = f" Finished runs here: {', '.join(known)}." if known else ""
    what = "has no finished pipeline" if path.is_dir() else "does not exist"
    raise InputError(f"{path} {what}; give a run folder or a pipeline folder with a pipeline.json, which `vqmosaic bundle` writes.{hint}")


def find_tokenizer(path: str | Path) -> Path:
    """The tokenizer folder for a path that is one, or is a pipeline or a run folder with one; InputError otherwise."""
    path = Path(path)
    check_readable(path / "pipeline.json")
    inside = [path / "tokenizer", path] if (path / "pipeline.json").is_file() else [path / "pipeline" / "tokenizer", path / "tokenizer", path]
    for folder in inside:
        check_readable(folder / "config.json")
        if (folder / "config.json").is_file():
            return folder
    what = "has no finished pipeline and no tokenizer" if path.is_dir() else "does not exist"
    raise InputError(f"{path} {what}; give a run folder, a pipeline folder or a tokenizer folder, which `vqmosaic train-tokenizer` writes to "
                     "<run_dir>/tokenizer.")


def read_bundle(folder: Path) -> dict:
    """The content of pipeline.json. Its format, version and fields are checked; its classes and tokens must be those of the prior.

    Read the sampling settings, which a user may edit, with `recommended_sampling`.
    """
    path = folder / "pipeline.json"
    content = read_object(path, "`vqmosaic bundle` writes it again")
    if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{folder}/pipeline.json says format {content.get('format')!r} version {content.get('format_version')!r}; "
                         f"this vqmosaic reads {FORMAT!r} version {FORMAT_VERSION}.{version_hint(written_by(content))}")
    check_fields(content, (*FIELDS, VERSION_FIELD, "sweep"), str(path), written_by(content), FIELDS)
    vocabulary = read_vocabulary(folder / "prior")
    for name in ("class_names", "token_fingerprint"):
        if content[name] != vocabulary.get(name):
            raise InputError(f"{path} has another {name} than {folder / 'prior' / 'vocabulary.json'}; one of them was edited or replaced. Copy the "
                             "pipeline again, or make it again with `vqmosaic bundle`.")
    return content


def recommended_sampling(folder: Path, content: dict) -> SamplingConfig:
    """The sampling settings in the content of a folder's pipeline.json. Settings that the file does not have keep their defaults."""
    return from_fields(SamplingConfig, content["sampling"], f"{folder / 'pipeline.json'}: sampling", written_by(content))


def evenly_spread(classes: int, samples: int) -> list[int]:
    """At most `samples` of the class indices 0 to classes - 1, spread evenly over all classes."""
    count = min(classes, samples)
    return [index * classes // count for index in range(count)]


def class_indices(names: list[str] | None, asked: Sequence[str | int]) -> list[int]:
    """Class indices of names (strings) and indices (integers of any kind); InputError lists what there is."""
    if names is None:
        raise InputError(f"the classes {list(asked)} are given, but this pipeline was trained without classes; leave them out.")
    indices = []
    for label in asked:
        if isinstance(label, str):
            if label not in names:
                nearest = nearest_name(label, names)
                hint = f" Did you mean {nearest!r}?" if nearest else ""
                raise InputError(f"no class {label!r}; there are {len(names)}: {', '.join(names[:50])}{' ...' if len(names) > 50 else ''}.{hint}")
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
    """What a user typed as classes, with commas between: class names first (the longest, for they may hold commas), else indices.

    If all class names are numbers, a number is always a name: among classes 1 to 12, 0 is a mistake and not the first class.
    """
    words, known, labels, start = text.split(","), set(names or []), [], 0
    has_indices = not known or not all(name.isdecimal() for name in known)
    while start < len(words):
        spans = (",".join(words[start:stop]).strip() for stop in range(len(words), start, -1))
        label = next((span for span in spans if span in known), words[start].strip())
        labels.append(int(label) if has_indices and label not in known and label.isdecimal() else label)
        start += 1 + (label.count(",") if label in known else 0)
    return labels


def classes_from_text(names: list[str] | None, text: str | None) -> list[int] | None:
    """The indices of the classes that a user typed. Without text, all classes, or None if there are no classes. Raises as class_indices does."""
    if text is not None:
        return class_indices(names, labels_from_text(names, text))
    return None if names is None else list(range(len(names)))


def usable_device(device: "str | torch.device | None", given_as: str = "device") -> "torch.device":
    """The requested device; by default the best device of this machine. Loads torch.

    Raises InputError if this machine does not have the device. The message names the option or argument `given_as`.
    """
    import torch

    from vqmosaic.runs.devices import default_device

    best = default_device()
    if device is None:
        return best
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        asked = None
    count = torch.accelerator.device_count() if best.type != "cpu" else 0
    if asked is None or (asked.type != "cpu" and (asked.type != best.type or (asked.index or 0) >= count)):
        here = ["cpu", *(f"{best.type}:{index}" for index in range(count))]
        raise InputError(f"{given_as} is {str(device)!r}; this machine has: {', '.join(here)}.")
    return asked
