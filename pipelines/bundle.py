"""Joins a tokenizer and one or several priors into one self-contained pipeline folder.

    vqmosaic bundle digits                                                    # the parts of this run
    vqmosaic bundle --tokenizer a/tokenizer --prior b/prior --out pipeline    # parts from anywhere
    vqmosaic bundle --tokenizer a/tokenizer --prior a/prior --prior b/prior --out pipeline    # two priors: the second is given what the first draws

pipeline/
    tokenizer/, prior/    copies of the exports; further priors are prior_2/ and so on
    conditions/<name>/    copies of the tokenizers of the conditions, if the prior is given any
    pipeline.json         recommended sampling settings, class names, token fingerprint; the sweep record if `vqmosaic sweep` chose the settings
"""

import dataclasses
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.pipeline_parts import PipelineParts, condition_records, copy_condition
from pipelines.stages.stage_inputs import predicts_in_any_order
from stage2_prior.chain_vocabulary import ChainVocabulary
from stage2_prior.digests import DIGESTS_NAME, check_digests, write_digests
from stage2_prior.generation.guidance_scales import segment_scales
from stage2_prior.vocabulary import VOCABULARY_NAME, Vocabulary
from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import copy_folder, publish, removed_on_failure, temporary_sibling, write_json
from vqmosaic.files.full_disks import explain_full_disk, size_of
from vqmosaic.files.json_files import VERSION_FIELD, check_fields, check_format, from_fields, read_object, written_by
from vqmosaic.files.permissions import check_readable
from vqmosaic.recipes.recipe_sections import SamplingConfig

if TYPE_CHECKING:
    import torch

FORMAT = "vqmosaic.pipeline"
FORMAT_VERSION = 1
FIELDS = ("format", "format_version", "class_names", "token_fingerprint", "sampling")
OPTIONAL_FIELDS = (VERSION_FIELD, "sweep", "priors", "conditions")
"""Fields of pipeline.json that are there only if needed: priors if there are several, conditions if the prior is given any."""
SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingConfig))


def make_bundle(tokenizer: Path, prior: Path | Sequence[Path], out: Path, sampling: SamplingConfig,
                conditions: Mapping[str, Path] | None = None) -> Path:
    """Write a pipeline folder from a tokenizer folder and a prior folder, and return its path. After a failure, no partial folder remains.

    If a sweep chose these settings for these parts, its record is kept. It is read from the pipeline that contains the tokenizer, or from the
    one that is replaced.

    Args:
        prior: the folder of the prior, or those of several priors in the order of sampling. Each may be given grids that earlier ones draw.
        conditions: name -> folder of the tokenizer of each condition that is given to the priors.

    Raises:
        ValueError: one of the parts is missing, a prior was trained on tokens of another tokenizer (the message gives both fingerprints and
            paths) or the priors do not draw all grids, the tokenizer of a condition is missing or another one, the sampling settings do not fit the
            prior, or `out` is a file, or a folder with files but without a pipeline.
    """
    check_replaceable(out)
    parts = PipelineParts(tokenizer, [prior] if isinstance(prior, Path) else list(prior), dict(conditions or {}))
    vocabulary = parts.check()
    parts = parts.used_by(vocabulary)
    check_sampling_fits(sampling, vocabulary, parts.priors)
    for folder in parts.priors:
        check_digests(folder)
    record = find_sweep_record([tokenizer.parent, out], sampling, parts)
    partial = temporary_sibling(out)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with explain_full_disk(out.parent):
            partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot create {out}: {error.strerror}. Give another folder for the pipeline.") from None
    prior_names = [f"prior_{number}" if number > 1 else "prior" for number in range(1, len(parts.priors) + 1)]
    with explain_full_disk(out.parent, lambda: sum(map(size_of, parts.folders))), removed_on_failure(partial):
        copy_folder(tokenizer, partial / "tokenizer")
        for name, folder in zip(prior_names, parts.priors, strict=True):
            copy_folder(folder, partial / name)
            if not (partial / name / DIGESTS_NAME).is_file():  # a prior saved by 0.1.0: detect later changes of the copy
                write_digests(partial / name)
        for name, folder in parts.conditions.items():
            (partial / "conditions").mkdir(exist_ok=True)
            copy_condition(folder, partial / "conditions" / name)
        write_json(partial / "pipeline.json", {
            "format": FORMAT, "format_version": FORMAT_VERSION, VERSION_FIELD: __version__, "class_names": vocabulary.class_names,
            "token_fingerprint": vocabulary.token_fingerprint, "sampling": sampling.to_dict(),
            **({"priors": prior_names} if len(prior_names) > 1 else {}),
            **({"conditions": condition_records(vocabulary, parts.conditions)} if vocabulary.conditions else {}),
            **({"sweep": record} if record else {})})
        publish(partial, out)
    return out


def part_fingerprints(tokenizer: Path, prior: Path) -> dict[str, str]:
    """The fingerprints of a pipeline with one prior and no conditions. `PipelineParts.fingerprints` has those of any pipeline."""
    return PipelineParts(tokenizer, [prior]).fingerprints()


def find_sweep_record(folders: Sequence[Path], sampling: SamplingConfig, parts: PipelineParts) -> dict[str, Any] | None:
    """The record of the sweep that chose these settings for these parts, from the first pipeline in `folders` that has it, or None."""
    for folder in folders:
        if not (folder / "pipeline.json").is_file():
            continue
        try:
            content = read_bundle(folder)
            record = content.get("sweep")
            if record and recommended_sampling(folder, content) == sampling and record["setup"]["pipeline"] == parts.fingerprints():
                return record
        except (InputError, TypeError, KeyError):  # the pipeline to be replaced may have another version, or be damaged
            continue
    return None


def recommend(folder: Path, sampling: SamplingConfig, record: dict[str, Any]) -> None:
    """Write recommended sampling settings to a pipeline folder, with the record of the sweep that chose them. The write is atomic.

    Raises:
        ValueError: the record was not made with the parts of this pipeline.
    """
    content = read_bundle(folder)
    if record["setup"]["pipeline"] != PipelineParts.in_folder(folder, content).fingerprints():
        raise InputError(f"{folder} has changed since the sweep started: the sweep measured another tokenizer or prior. "
                         "The recommended settings are unchanged. Start a new sweep.")
    write_json(folder / "pipeline.json", content | {"sampling": sampling.to_dict(), "sweep": record})


def check_replaceable(out: Path) -> None:
    """Raise InputError unless the path does not exist, is an empty folder, or is a pipeline folder, which may be replaced."""
    is_free = not out.exists() or (out.is_dir() and ((out / "pipeline.json").is_file() or not any(out.iterdir())))
    if not is_free:
        what = "a folder with other files, which would be lost" if out.is_dir() else "a file"
        raise InputError(f"{out} is {what}. Give a new folder, an empty folder, or a pipeline folder to replace.")


def check_sampling_fits(sampling: SamplingConfig, vocabulary: ChainVocabulary, priors: Sequence[Path]) -> None:
    """Raise InputError if the priors in these folders do not support the sampling settings."""
    prior = " and ".join(map(str, priors))
    if sampling.guidance_scale != 1 and (why := vocabulary.why_unguided()):
        raise InputError(f"sampling.guidance_scale is {sampling.guidance_scale:g}, but the prior in {prior} {why}. Set sampling.guidance_scale to 1.")
    if unknown := [name for name in sampling.guidance if name not in vocabulary.given_names]:
        raise InputError(f"sampling.guidance has {', '.join(unknown)}; the given segments of the prior in {prior} are: "
                         f"{', '.join(vocabulary.given_names) or 'none'}.")
    for number, (folder, each) in enumerate(zip(priors, vocabulary.vocabularies, strict=True)):
        check_prior_settings(vocabulary.settings_of(number, sampling), each, folder)
    if sampling.steps is not None and sampling.steps > vocabulary.most_steps:
        raise InputError(f"sampling.steps is {sampling.steps}, but the prior in {prior} has {vocabulary.most_steps} tokens per image; allowed: 1 to "
                         f"{vocabulary.most_steps}.")
    if sampling.top_k > vocabulary.most_codes:
        raise InputError(f"sampling.top_k is {sampling.top_k}, but the prior in {prior} has {vocabulary.most_codes} codes; allowed: 0 (off) to "
                         f"{vocabulary.most_codes}.")


def check_prior_settings(sampling: SamplingConfig, vocabulary: Vocabulary, prior: Path) -> None:
    """Raise InputError if one prior has not learned the drawing order or the guidance of the settings."""
    is_usual = sampling.order == "raster" and sampling.steps in (None, vocabulary.num_tokens)  # one token after another, row by row
    if not is_usual and not predicts_in_any_order(prior):
        setting = f"order is {sampling.order!r}" if sampling.order != "raster" else f"steps is {sampling.steps}"
        raise InputError(f"sampling.{setting}, but the prior in {prior} was trained in raster order, so it draws one token after another. Leave "
                         "it out, or train a grid_transformer with prior_training.order annealed.")
    if sampling.guidance:
        try:
            segment_scales(vocabulary, sampling.guidance_scale, sampling.guidance)
        except InputError as error:
            raise InputError(f"sampling.guidance does not fit the prior in {prior}. {error}") from None


def check_given_sampling(folder: Path, content: dict, given: dict[str, Any]) -> SamplingConfig:
    """The recommended settings of a pipeline, overridden by the given ones. Raises InputError if they are invalid or do not fit its prior."""
    recommended, parts = recommended_sampling(folder, content), PipelineParts.in_folder(folder, content)
    with naming_options():
        sampling = dataclasses.replace(recommended, **given)
        check_sampling_fits(sampling, parts.vocabulary(), parts.priors)
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
    """The content of pipeline.json, after a check of its format, version, fields, class names, token fingerprint and conditions.

    Does not check the sampling settings, which users may edit: `recommended_sampling` does.
    """
    path = folder / "pipeline.json"
    content = read_object(path, "`vqmosaic bundle` writes it again")
    check_format(content, FORMAT, FORMAT_VERSION, str(path))
    check_fields(content, (*FIELDS, *OPTIONAL_FIELDS), str(path), written_by(content), FIELDS)
    parts = PipelineParts.in_folder(folder, content)
    vocabulary = parts.vocabulary()
    remedy = "One of them was edited or replaced. Copy the pipeline again, or run `vqmosaic bundle` again."
    for name in ("class_names", "token_fingerprint"):
        if content[name] != getattr(vocabulary, name):
            raise InputError(f"{path} has another {name} than {parts.priors[0] / VOCABULARY_NAME}. {remedy}")
    if [record["name"] for record in content.get("conditions", [])] != [condition.name for condition in vocabulary.conditions]:
        raise InputError(f"{path} has other conditions than {parts.priors[0] / VOCABULARY_NAME}. {remedy}")
    if vocabulary.conditions or len(parts.priors) > 1:
        parts.check()
    return content


def recommended_sampling(folder: Path, content: dict) -> SamplingConfig:
    """The sampling settings in the content of a folder's pipeline.json. Missing settings get their defaults."""
    return from_fields(SamplingConfig, content["sampling"], f"{folder / 'pipeline.json'}: sampling", written_by(content))


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
