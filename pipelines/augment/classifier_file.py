"""Checks the file or folder of an image classifier without loading it, so that errors appear before torch is imported."""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vqmosaic.errors import InputError, did_you_mean, listed_names
from vqmosaic.files.durable_files import sha256_of_file
from vqmosaic.files.permissions import explain_permission_errors

TORCHSCRIPT, TRANSFORMERS = "torchscript", "transformers"
CLASS_NAMES_FILE = "class_names.json"
"""Extra file of a TorchScript archive: a JSON list with the class name of each output."""
MAX_LISTED_LABELS = 20


@dataclass(frozen=True, kw_only=True)
class ClassifierFile:
    """A TorchScript archive, or the folder of an image classifier of transformers."""

    path: Path
    """Path of the file or folder."""
    kind: str
    """TORCHSCRIPT or TRANSFORMERS."""
    sha256: str
    """Digest of the file, or of the files in the folder."""
    label_classes: tuple[int | None, ...] | None
    """For each output, the class index of the pipeline, None for another class. None if the outputs have no names: they are all classes in order."""


@explain_permission_errors()
def resolve_classifier_file(path: Path, class_names: Sequence[str], classes: Sequence[int]) -> ClassifierFile:
    """Check that a file or folder can be a classifier of the requested classes, and compute its digest. classifiers.py loads its content.

    `class_names` are all classes of the pipeline, and `classes` the indices of the requested ones, for which the classifier must have labels.

    Raises:
        InputError: nothing is there, it is neither a TorchScript archive nor a folder of transformers with safetensors, or its labels lack a class.
    """
    path = path.expanduser()
    if path.is_dir():
        return check_transformers_folder(path, class_names, classes)
    if not path.is_file():
        raise InputError(f"--classifier is {str(path)!r}, which does not exist; give a TorchScript file, or the folder of an image classifier that "
                         "was saved by transformers.")
    names = names_in_archive(path)
    return ClassifierFile(path=path, kind=TORCHSCRIPT, sha256=sha256_of_file(path),
                          label_classes=None if names is None else classes_of_labels(path, names, class_names, classes))


def check_transformers_folder(path: Path, class_names: Sequence[str], classes: Sequence[int]) -> ClassifierFile:
    """Check the folder of an image classifier of transformers. Raises InputError as `resolve_classifier_file` does."""
    if missing := [name for name in ("config.json", "preprocessor_config.json") if not (path / name).is_file()]:
        raise InputError(f"--classifier is {str(path)!r}, which has no {' and no '.join(missing)}; give a folder in which both the model and its "
                         "image processor were saved with save_pretrained.")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise InputError(f"--classifier is {str(path)!r}, which has no .safetensors file. Files with pickles are not read: save the model again with "
                         "save_pretrained of a current transformers.")
    try:
        labels = {int(index): name for index, name in json.loads((path / "config.json").read_text())["id2label"].items()}
        names = [str(labels[index]) for index in range(len(labels))]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path / 'config.json'} has no id2label with the name of each label. Set id2label in the configuration of the "
                         "model.") from None
    digest = hashlib.sha256()
    for file in (*sorted(path.glob("*.json")), *weights):
        digest.update(f"{file.name}\0{sha256_of_file(file)}\0".encode(errors="surrogateescape"))
    return ClassifierFile(path=path, kind=TRANSFORMERS, sha256=digest.hexdigest(), label_classes=classes_of_labels(path, names, class_names, classes))


def names_in_archive(path: Path) -> list[str] | None:
    """The class names in a TorchScript archive, or None if it has none. Raises InputError for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.partition("/")[2]: name for name in archive.namelist()}
            if not any(name.startswith("code/") for name in members):
                raise zipfile.BadZipFile
            member = members.get(f"extra/{CLASS_NAMES_FILE}")
            names = None if member is None else json.loads(archive.read(member))
    except zipfile.BadZipFile:
        raise InputError(f"--classifier is {str(path)!r}, which is not a TorchScript file; give one, or the folder of an image classifier that was "
                         "saved by transformers.") from None
    except ValueError:
        names = ""  # not a list
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"{CLASS_NAMES_FILE} in --classifier {path} is not a JSON list of class names.")
    return names


def classes_of_labels(path: Path, labels: Sequence[str], class_names: Sequence[str], classes: Sequence[int]) -> tuple[int | None, ...]:
    """The class index for each label of a classifier, None for labels that are not a class.

    Names are equal, or equal apart from case, spaces, _ and -. Raises InputError if a requested class has no label, or shares one with another class.
    """
    found: dict[int, int] = {}
    for index in classes:
        name = class_names[index]
        exact = [number for number, label in enumerate(labels) if label == name]
        matches = exact or [number for number, label in enumerate(labels) if plain_name(label) == plain_name(name)]
        if not matches:
            raise InputError(f"--classifier {path} has no label for the class {name!r}; its {len(labels)} labels are: "
                             f"{listed_names(labels, MAX_LISTED_LABELS)}.{did_you_mean(name, labels)} Rename its labels, or leave the class out with "
                             "--classes.")
        if taken := [class_names[found[number]] for number in matches if number in found]:
            raise InputError(f"--classifier {path} has one label, {labels[matches[0]]!r}, for the classes {taken[0]!r} and {name!r}. Rename its "
                             "labels.")
        found |= dict.fromkeys(matches, index)
    return tuple(found.get(number) for number in range(len(labels)))


def plain_name(name: str) -> str:
    """A name without case, and with spaces for _ and -."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
