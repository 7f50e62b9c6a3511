"""Reads and writes the record of a sweep, and ranks its results. Each result is written as soon as it is measured. Does not load torch.

    sweep.json
        setup        everything that affects the distances except the sampling settings: pipeline parts, feature extractor, real images, the
                     number, seed, classes and data type of the generated images, and the parameters of the kernel distance
        reference    the number of real images that were used, and the names of the unreadable ones
        results      for each combination: settings, distances, number of images, seconds, device and library versions
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import write_json
from vqmosaic.files.json_files import VERSION_FIELD, check_fields, from_fields, read_object, written_by
from vqmosaic.files.permissions import check_readable
from vqmosaic.recipes.recipe_sections import SamplingConfig

FORMAT = "vqmosaic.sweep"
FORMAT_VERSION = 1
FIELDS = ("format", "format_version", "setup", "reference", "results")
REQUIRED_RESULT_FIELDS = ("settings", "frechet_distance", "kernel_distance", "kernel_deviation")
"""Fields that every result must have, because the ranking uses them."""
RESULT_FIELDS = (*REQUIRED_RESULT_FIELDS, "images", "seconds", "device", "versions")
SETTING_NAMES = tuple(field.name for field in dataclasses.fields(SamplingConfig))


class SweepRecord:
    """The JSON file of a sweep. Each result is added when it is complete, so a stopped sweep can continue with the missing combinations."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self.path, self.content = path, content

    @classmethod
    def open(cls, path: Path, setup: Mapping[str, Any]) -> "SweepRecord":
        """The record in a file, or a new record that is not written yet.

        Raises:
            InputError: the file is not a sweep record, or it has another setup, so that its distances are not comparable with new ones.
        """
        setup, content = json.loads(json.dumps(setup)), read_sweep(path)  # the setup as JSON stores it, for the comparison
        if content is None:
            return cls(path, {"format": FORMAT, "format_version": FORMAT_VERSION, "setup": setup, "reference": None, "results": []})
        if content["setup"] != setup:
            raise InputError(f"{path} was made with another setup, so its distances are not comparable with new ones: "
                             f"{describe_setup_differences(list(iterate_differences(content['setup'], setup)))}. "
                             "Give another --out, or delete the file to start a new sweep.")
        return cls(path, content)

    def result_of(self, sampling: SamplingConfig) -> dict[str, Any] | None:
        """The result of a combination, or None if it has not been measured yet."""
        return next((result for result in self.content["results"] if self.settings_of(result) == sampling), None)

    def settings_of(self, result: Mapping[str, Any]) -> SamplingConfig:
        """The settings of a result. Settings that are missing from the record have their default values."""
        return from_fields(SamplingConfig, result["settings"], f"{self.path}: settings", result.get("versions", {}).get("vqmosaic"))

    def add(self, sampling: SamplingConfig, **numbers: Any) -> None:
        """Add the result of a combination and write the file."""
        self.content["results"].append({"settings": sampling.to_dict(), **numbers})
        write_json(self.path, self.content)

    def ranked(self) -> list[dict[str, Any]]:
        """All results in ascending order of Frechet distance. Equal distances keep the order in which they were measured."""
        return sorted(self.content["results"], key=lambda result: result["frechet_distance"])


def read_sweep(path: Path) -> dict[str, Any] | None:
    """The content of a sweep record, or None if the file does not exist. Raises InputError if it is not a sweep record."""
    check_readable(path)
    if not path.exists():
        return None
    content = read_object(path, "give another --out, or delete it to start a new sweep")
    if (content.get("format"), content.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise InputError(f"{path} is not a sweep record that this version of vqmosaic can read; give another --out.")
    check_fields(content, (*FIELDS, VERSION_FIELD), str(path), written_by(content), FIELDS)
    for number, result in enumerate(content["results"]):
        check_fields(result, RESULT_FIELDS, f"{path}: results[{number}]", written_by(result.get("versions")), REQUIRED_RESULT_FIELDS)
    return content


def iterate_differences(recorded: Any, current: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, recorded value, current value) for each leaf in which two nested mappings differ."""
    if isinstance(recorded, dict) and isinstance(current, dict):
        for key in dict.fromkeys([*recorded, *current]):
            yield from iterate_differences(recorded.get(key), current.get(key), f"{name}.{key}" if name else key)
    elif recorded != current:
        yield name, recorded, current


def is_pipeline_field(name: str) -> bool:
    """Whether a dotted name in a record belongs to a fingerprint of the pipeline (see part_fingerprints)."""
    return name.partition(".")[0] == "pipeline"


def describe_pipeline_change(differences: Sequence[tuple[str, Any, Any]]) -> str:
    """A clause that names the changed parts of a recorded pipeline. It omits the fingerprints, which are not useful to the user."""
    names = {name for name, _, _ in differences}
    # pipeline.tokens is the fingerprint of the part of the tokenizer that determines the ids, pipeline.tokenizer that of the whole tokenizer
    parts = [part for part, prefix in (("tokenizer", "pipeline.token"), ("prior", "pipeline.prior"), ("conditions", "pipeline.condition_"))
             if any(name.startswith(prefix) for name in names)]
    return "the pipeline is a different one" + (f": its {' and its '.join(parts)} {'differs' if len(parts) == 1 else 'differ'}" if parts else "")


def describe_setup_differences(differences: Sequence[tuple[str, Any, Any]]) -> str:
    """A message with the differences between a recorded setup and the current one. It omits the values of fingerprints and digests."""
    clauses = [describe_pipeline_change(differences)] if any(is_pipeline_field(name) for name, _, _ in differences) else []
    for name, recorded, current in differences:
        if is_pipeline_field(name):
            continue
        is_digest = any(isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16,}", value) for value in (recorded, current))
        clauses.append(f"{name} differs" if is_digest else f"{name} was {recorded!r}, now it is {current!r}")
    return "; ".join(clauses)


def format_value(value: Any) -> str:
    """The value of a setting as text."""
    if isinstance(value, Mapping):
        return ",".join(f"{key}={number:g}" for key, number in value.items())
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def format_settings(sampling: SamplingConfig, names: Sequence[str]) -> str:
    """The settings with these names as text, for printed lines."""
    return ", ".join(f"{name} {format_value(getattr(sampling, name))}" for name in names)


def varying_settings(combinations: Sequence[SamplingConfig]) -> Sequence[str]:
    """Names of the settings that differ between combinations, or all names if none differ."""
    names = setting_names(combinations)
    return [name for name in names if len({json.dumps(getattr(sampling, name)) for sampling in combinations}) > 1] or names


def setting_names(combinations: Sequence[SamplingConfig]) -> Sequence[str]:
    """Names of all settings; `guidance`, which is by segment, only if a combination has any."""
    return [name for name in SETTING_NAMES if name != "guidance" or any(sampling.guidance for sampling in combinations)]


def ranking_table(record: SweepRecord) -> str:
    """A text table of the ranked results: rank, the settings that differ, Frechet distance, kernel distance ± standard deviation over subsets."""
    ranked = record.ranked()
    combinations = [record.settings_of(result) for result in ranked]
    names = varying_settings(combinations)
    rows = [["", *names, "Frechet", "kernel"]]
    for rank, (result, sampling) in enumerate(zip(ranked, combinations, strict=True), start=1):
        values = [format_value(getattr(sampling, name)) for name in names]
        kernel = f"{result['kernel_distance']:.6g} ± {result['kernel_deviation']:.2g}"
        rows.append([f"{rank}.", *values, f"{result['frechet_distance']:.6g}", kernel])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("    " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
