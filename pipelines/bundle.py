"""Join a tokenizer and a prior into one self-contained pipeline folder.

    vqmosaic bundle digits                                                    # this run's own two parts
    vqmosaic bundle --tokenizer a/tokenizer --prior b/prior --out pipeline    # parts trained anywhere

pipeline/
    tokenizer/, prior/    copies of the exports
    pipeline.json         recommended sampling settings, class names, fingerprints
"""

import dataclasses
import json
import shutil
from pathlib import Path

from pipelines.stage_inputs import token_fingerprint_of_prior, token_fingerprint_of_tokenizer
from vqmosaic import __version__
from vqmosaic.durable_files import publish, temporary_sibling, write_json
from vqmosaic.errors import InputError
from vqmosaic.fingerprints import check_same_tokens
from vqmosaic.recipe_sections import SamplingConfig

FORMAT = "vqmosaic.pipeline"
FORMAT_VERSION = 1


def make_bundle(tokenizer: Path, prior: Path, out: Path, sampling: SamplingConfig) -> Path:
    """The pipeline folder made of a tokenizer and a prior folder, whole or absent.

    Raises:
        ValueError: one of the parts is missing, or the prior was trained on another tokenizer's tokens (both values and paths).
    """
    token_fingerprint = token_fingerprint_of_tokenizer(tokenizer)
    check_same_tokens(token_fingerprint, tokenizer, token_fingerprint_of_prior(prior), prior)
    vocabulary = json.loads((prior / "vocabulary.json").read_text())
    class_names = vocabulary["class_names"]
    if sampling.guidance_scale != 1 and (class_names is None or vocabulary["label_drop"] == 0):
        raise InputError(f"sampling.guidance_scale is {sampling.guidance_scale:g}, but the prior in {prior} "
                         f"{'has no classes' if class_names is None else 'was trained without label drop'}; set sampling.guidance_scale to 1.")
    partial = temporary_sibling(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copytree(tokenizer, partial / "tokenizer")
    shutil.copytree(prior, partial / "prior")
    write_json(partial / "pipeline.json", {
        "format": FORMAT, "format_version": FORMAT_VERSION, "vqmosaic": __version__, "class_names": class_names,
        "token_fingerprint": token_fingerprint, "sampling": dataclasses.asdict(sampling)})
    publish(partial, out)
    return out


def find_pipeline(path: str | Path) -> Path:
    """The pipeline folder for a path that is one, or is a run folder with one; InputError otherwise."""
    path = Path(path)
    for folder in (path, path / "pipeline"):
        if (folder / "pipeline.json").is_file():
            return folder
    known = sorted(str(found.parent.parent) for found in Path("runs").glob("*/pipeline/pipeline.json"))
    hint = f" Finished runs here: {', '.join(known)}." if known else ""
    what = "has no finished pipeline" if path.is_dir() else "does not exist"
    raise InputError(f"{path} {what}; give a run folder or a pipeline folder with a pipeline.json, which `vqmosaic bundle` writes.{hint}")


def read_bundle(folder: Path) -> dict:
    """pipeline.json, checked for format and version; its sampling settings are checked by SamplingConfig."""
    content = json.loads((folder / "pipeline.json").read_text())
    if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{folder}/pipeline.json says format {content.get('format')!r} version {content.get('format_version')!r}; "
                         f"this vqmosaic reads {FORMAT!r} version {FORMAT_VERSION}.")
    return content


def class_indices(names: list[str] | None, asked: list[str | int]) -> list[int]:
    """Class indices of names (strings) and indices (integers); InputError lists what there is."""
    from vqmosaic.errors import nearest_name

    if names is None:
        raise InputError(f"class_labels is {asked}, but this pipeline was trained without classes; leave class_labels out.")
    indices = []
    for label in asked:
        if isinstance(label, str):
            if label not in names:
                nearest = nearest_name(label, names)
                hint = f" Did you mean {nearest!r}?" if nearest else ""
                raise InputError(f"no class {label!r}; there are {len(names)}: {', '.join(names[:50])}{' ...' if len(names) > 50 else ''}.{hint}")
            indices.append(names.index(label))
        else:
            if not 0 <= int(label) < len(names):
                raise InputError(f"class index {label} does not exist; allowed: 0 to {len(names) - 1}.")
            indices.append(int(label))
    return indices


def labels_from_words(names: list[str] | None, words: list[str]) -> list[str | int]:
    """What a user typed as classes: a class name first, else an index."""
    return [int(word) if (names is None or word not in names) and word.isdigit() else word for word in words]
