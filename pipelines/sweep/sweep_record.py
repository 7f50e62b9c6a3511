"""The record of a sweep: with what it was made, and the result of each combination, written as it comes. Loads no torch.

    sweep.json
        setup        what decides the numbers: parts of the pipeline, feature extractor, real images, number of images, seed, classes
        reference    how many real images were compared with
        results      for each combination its settings, distances, seconds, device and library versions
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
RESULT_FIELDS = ("settings", "frechet_distance", "kernel_distance", "kernel_deviation", "images", "seconds", "device", "versions")
"""Fields of one result. The first four are needed for a ranking."""


class SweepRecord:
    """A sweep's JSON file. Each result is added to it whole, so that a sweep that is stopped goes on with what is missing."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self.path, self.content = path, content

    @classmethod
    def open(cls, path: Path, setup: Mapping[str, Any]) -> "SweepRecord":
        """The record in a file, or a fresh one that is not written yet.

        Raises:
            ValueError: the file is something else, or a sweep with another setup, whose numbers could not be compared with new ones.
        """
        setup, content = json.loads(json.dumps(setup)), read_sweep(path)
        if content is None:
            return cls(path, {"format": FORMAT, "format_version": FORMAT_VERSION, "setup": setup, "reference": None, "results": []})
        if content["setup"] != setup:
            raise InputError(f"{path} was made with another setup, so its numbers cannot be compared with new ones: "
                             f"{differences_in_words(list(differing(content['setup'], setup)))}. "
                             "Give another --out, or delete the file to start anew.")
        return cls(path, content)

    def result_of(self, sampling: SamplingConfig) -> dict[str, Any] | None:
        """The result of a combination that was measured."""
        return next((result for result in self.content["results"] if self.settings_of(result) == sampling), None)

    def settings_of(self, result: Mapping[str, Any]) -> SamplingConfig:
        """The settings of a result. Settings that the record does not have keep their defaults."""
        return from_fields(SamplingConfig, result["settings"], f"{self.path}: settings", result.get("versions", {}).get("vqmosaic"))

    def add(self, sampling: SamplingConfig, **numbers: Any) -> None:
        """Add the result of a combination and write the file."""
        self.content["results"].append({"settings": dataclasses.asdict(sampling), **numbers})
        write_json(self.path, self.content)

    def ranked(self) -> list[dict[str, Any]]:
        """All results, the lowest Frechet distance first; of equal ones the one that was measured first."""
        return sorted(self.content["results"], key=lambda result: result["frechet_distance"])


def read_sweep(path: Path) -> dict[str, Any] | None:
    """What is in the record of a sweep, None where there is no file; InputError for a file that is something else."""
    check_readable(path)
    if not path.exists():
        return None
    content = read_object(path, "give another --out, or delete it to start anew")
    if (content.get("format"), content.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise InputError(f"{path} is no record of a sweep that this vqmosaic reads; give another --out.")
    check_fields(content, (*FIELDS, VERSION_FIELD), str(path), written_by(content), FIELDS)
    for number, result in enumerate(content["results"]):
        check_fields(result, RESULT_FIELDS, f"{path}: results[{number}]", written_by(result.get("versions")), RESULT_FIELDS[:4])
    return content


def differing(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value there, value here) of the leaves in which two nested mappings differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            yield from differing(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield name, there, here


def is_about_the_pipeline(name: str) -> bool:
    """Whether a dotted name in a record belongs to a fingerprint of the pipeline (see part_fingerprints)."""
    return name.partition(".")[0] == "pipeline"


def other_pipeline(differences: Sequence[tuple[str, Any, Any]]) -> str:
    """A clause that says which parts of a recorded pipeline have changed. It leaves out the fingerprints, which mean nothing to a reader."""
    names = {name for name, _, _ in differences}
    parts = [part for part, fingerprints in (("tokenizer", {"pipeline.tokens", "pipeline.tokenizer"}), ("prior", {"pipeline.prior"}))
             if names & fingerprints]
    return "the pipeline is a different one" + (f": its {' and its '.join(parts)} {'differs' if len(parts) == 1 else 'differ'}" if parts else "")


def differences_in_words(differences: Sequence[tuple[str, Any, Any]]) -> str:
    """The differences between a recorded setup and another one. Fingerprints and digests are named without their values."""
    words = [other_pipeline(differences)] if any(is_about_the_pipeline(name) for name, _, _ in differences) else []
    for name, there, here in differences:
        if is_about_the_pipeline(name):
            continue
        is_digest = any(isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16,}", value) for value in (there, here))
        words.append(f"{name} differs" if is_digest else f"{name} was {there!r}, now {here!r}")
    return "; ".join(words)


def settings_in_words(settings: dict[str, Any], names: list[str]) -> str:
    """The named settings, for a line that a person reads."""
    return ", ".join(f"{name} {settings[name]:g}" if isinstance(settings[name], float | int) else f"{name} {settings[name]}" for name in names)


def varied(results: list[dict[str, Any]]) -> list[str]:
    """Names of the settings in which results differ; all names where they do not differ."""
    names = list(results[0]["settings"])
    return [name for name in names if len({json.dumps(result["settings"][name]) for result in results}) > 1] or names


def ranking_table(results: list[dict[str, Any]]) -> str:
    """Ranked results as lines: rank, the settings that differ, Frechet distance, kernel distance with its deviation over subsets."""
    names = varied(results)
    rows = [["", *names, "Frechet", "kernel"]]
    for rank, result in enumerate(results, start=1):
        values = [f"{value:g}" if isinstance(value := result["settings"][name], float | int) else str(value) for name in names]
        kernel = f"{result['kernel_distance']:.6g} ± {result['kernel_deviation']:.2g}"
        rows.append([f"{rank}.", *values, f"{result['frechet_distance']:.6g}", kernel])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("    " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
