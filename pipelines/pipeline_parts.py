"""The parts of a pipeline: a tokenizer, one or several priors that sample one after another, and the tokenizers of their conditions.

Checks that they belong together by their fingerprints. Does not load torch.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.stages.stage_inputs import full_fingerprint_of_tokenizer, token_fingerprint_of_tokenizer, vocabulary_of_prior
from stage1_tokenizer.conditions.text_tokenizer import BYTES_FINGERPRINT, text_fingerprint, tokenizer_files
from stage1_tokenizer.tokenizer_config import is_tokenizer, read_tokenizer_config
from stage1_tokenizer.tokenizer_grids import grids_of_tokenizer
from stage2_prior.chain_vocabulary import ChainVocabulary
from stage2_prior.digests import fingerprint_of_weights
from stage2_prior.segments import Condition, GivenText
from token_shards.manifest import Grid, describe_grids
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import copy_folder
from vqmosaic.files.fingerprints import check_same_tokens

PRIOR_NAME = re.compile(r"prior(_[2-9])?")
"""Names of the folders of priors in a pipeline: prior, prior_2 and so on."""


@dataclass(frozen=True)
class PipelineParts:
    """The folders of the parts of a pipeline."""

    tokenizer: Path
    """The tokenizer that decodes images."""
    priors: Sequence[Path]
    """The priors in the order of sampling."""
    conditions: Mapping[str, Path] = field(default_factory=dict)
    """Name of a condition -> the folder of its tokenizer. Captions whose ids are bytes have none."""

    @classmethod
    def in_folder(cls, folder: Path, content: Mapping[str, Any]) -> "PipelineParts":
        """The parts in a pipeline folder, according to the content of its pipeline.json. Raises InputError for names that are not allowed."""
        names, path = content.get("priors", ["prior"]), folder / "pipeline.json"
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and PRIOR_NAME.fullmatch(name) for name in names):
            raise InputError(f"{path}: priors is {names!r}; it must be a list of the folders prior, prior_2 and so on. Bundle the pipeline again.")
        records = content.get("conditions", [])
        if not isinstance(records, list) or not all(isinstance(record, Mapping) and re.fullmatch(r"[a-z][a-z0-9_]{0,29}", str(record.get("name")))
                                                    for record in records):
            raise InputError(f"{path}: conditions is {str(records)[:100]!r}; it must be a list of records with a name. Bundle the pipeline again.")
        folders = {record["name"]: folder / "conditions" / record["name"] for record in records}
        return cls(folder / "tokenizer", [folder / name for name in names], {name: path for name, path in folders.items() if path.is_dir()})

    @property
    def folders(self) -> list[Path]:
        """All folders."""
        return [self.tokenizer, *self.priors, *self.conditions.values()]

    def vocabulary(self) -> ChainVocabulary:
        """The vocabulary of the priors. Raises InputError if a prior is missing, or if they do not belong together."""
        return ChainVocabulary([vocabulary_of_prior(prior) for prior in self.priors], [str(prior) for prior in self.priors])

    def fingerprints(self) -> dict[str, str]:
        """The fingerprints that identify the parts: of the tokens, of the whole tokenizer, of the weights of each prior and of the conditions."""
        priors = {f"prior{f'_{number}' if number > 1 else ''}": fingerprint_of_weights(prior) for number, prior in enumerate(self.priors, start=1)}
        conditions = {f"condition_{name}": fingerprint_of_condition(folder) for name, folder in self.conditions.items()}
        return {"tokens": token_fingerprint_of_tokenizer(self.tokenizer), "tokenizer": full_fingerprint_of_tokenizer(self.tokenizer),
                **priors, **conditions}

    def used_by(self, vocabulary: ChainVocabulary) -> "PipelineParts":
        """The same parts without tokenizers of conditions that the priors are not given."""
        names = [condition.name for condition in vocabulary.conditions]
        return PipelineParts(self.tokenizer, self.priors, {name: self.conditions[name] for name in names if name in self.conditions})

    def check(self) -> ChainVocabulary:
        """The vocabulary of the priors. Raises InputError unless all parts exist and belong together."""
        vocabulary = self.vocabulary()
        check_same_tokens(token_fingerprint_of_tokenizer(self.tokenizer), self.tokenizer, vocabulary.token_fingerprint, self.priors[0])
        check_same_grids(grids_of_tokenizer(self.tokenizer), self.tokenizer, vocabulary, " and ".join(map(str, self.priors)))
        for condition in vocabulary.conditions:
            check_condition(condition, vocabulary, self.conditions.get(condition.name))
        return vocabulary


def check_same_grids(grids: Sequence[Grid], tokenizer: object, vocabulary: ChainVocabulary, priors: object) -> None:
    """Raise InputError unless the priors together draw all grids of a tokenizer. One prior must draw them in the tokenizer's order.

    `tokenizer` and `priors` are names for the message.
    """
    drawn, expected = list(vocabulary.grids), list(grids)
    if len(vocabulary.vocabularies) > 1:
        drawn, expected = (sorted(each, key=lambda grid: grid.name) for each in (drawn, expected))
    if drawn == expected:
        return
    hint = " A pipeline needs a prior of all grids of its tokenizer, in the same order, or priors that together draw all of them."
    missing = [grid.name for grid in grids if grid.name not in [each.name for each in vocabulary.grids]]
    given = [condition.name for condition in vocabulary.conditions if condition.name in missing]
    if given:
        hint += f" {', '.join(given)} is given to it: add the prior that draws {', '.join(given)}, before it."
    raise InputError(f"{tokenizer} and {priors} do not belong together: the tokenizer has the grids {describe_grids(grids) or 'none'}, but the "
                     f"prior predicts {describe_grids(vocabulary.grids)}.{hint}")


def check_condition(condition: Condition, vocabulary: ChainVocabulary, folder: Path | None) -> None:
    """Raise InputError unless the folder has the tokenizer that made the ids of a condition."""
    name, expected = condition.name, vocabulary.token_fingerprints.get(condition.name)
    if isinstance(condition, GivenText):
        if is_bytes(condition):
            return
        if folder is None:
            raise InputError(f"the prior is given the text {name!r}, whose ids come from a tokenizer of transformers. Give its folder with "
                             f"--condition {name}=FOLDER.")
        check_same_tokens(fingerprint_of_condition(folder), folder, str(expected), f"the text {name!r} of the prior")
        return
    if folder is None:
        raise InputError(f"the prior is given the grid {name!r}, so the pipeline needs the tokenizer that made its ids. Give its folder with "
                         f"--condition {name}=FOLDER, such as runs/NAME/conditions/{name}/tokenizer.")
    grids = grids_of_tokenizer(folder)
    if len(grids) != 1:
        raise InputError(f"{folder} has the grids {describe_grids(grids) or 'none'}; the tokenizer of a condition must have one grid.")
    check_same_tokens(token_fingerprint_of_tokenizer(folder), folder, str(expected), f"the condition {name!r} of the prior")


def is_bytes(text: GivenText) -> bool:
    """Whether the ids of a text are the bytes of UTF-8. True if its tokenizer is not known."""
    return text.token_fingerprint in (None, BYTES_FINGERPRINT)


def fingerprint_of_condition(folder: Path) -> str:
    """The token fingerprint of a condition's tokenizer: that of images, or a tokenizer of transformers for texts."""
    return token_fingerprint_of_tokenizer(folder) if is_tokenizer(folder) else text_fingerprint(folder)


def copy_condition(source: Path, target: Path) -> None:
    """Copy the tokenizer of a condition. Of a folder of transformers only the files of the tokenizer, because it may hold a whole model."""
    if is_tokenizer(source):
        copy_folder(source, target)
        return
    target.mkdir(parents=True)
    for path in tokenizer_files(source):
        shutil.copyfile(path, target / path.name)


def find_conditions(given: Sequence[str], priors: Sequence[Path]) -> dict[str, Path]:
    """Name of a condition -> the folder of its tokenizer, from options NAME=FOLDER and, for the others, from the run folders of the priors."""
    found: dict[str, Path] = {}
    for prior in priors:
        for config in sorted(prior.parent.glob("conditions/*/tokenizer/config.json")):
            found.setdefault(config.parent.parent.name, config.parent)
    for option in given:
        name, _, folder = option.partition("=")
        if not name or not folder:
            raise InputError(f"--condition is {option!r}; give the name of a condition and a folder, such as low=runs/NAME/conditions/low/tokenizer.")
        found[name] = Path(folder).expanduser()
        if not found[name].is_dir():
            raise InputError(f"--condition {option}: {folder} is not a folder.")
    return found


def condition_records(vocabulary: ChainVocabulary, conditions: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The records of the conditions for pipeline.json: name, and kind of the image or text."""
    records = []
    for condition in vocabulary.conditions:
        if isinstance(condition, GivenText):
            records.append({"name": condition.name, "kind": "caption"})
        else:
            transform = read_tokenizer_config(conditions[condition.name])["transform"]
            records.append({"name": condition.name, **(transform.get("derived") or {"kind": "paired_folder"})})
    return records
