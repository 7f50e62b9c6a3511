"""Reads tokens of other programs row by row: JSON lines, a folder of npy files, or one npy array. Does not load torch.

    codes.jsonl                 {"class_id": 3, "tokens": [17, 4, ...]} on each line, as 1d-tokenizer's scripts/pretokenization.py writes them.
                                tokens can be a list of lists, the views of one image. A class_id of null means an image without a class
    x_codes/, x_labels/         0.npy, 1.npy ... with the shapes (1, V, T) and (1,), as LlamaGen's autoregressive/train/extract_codes_c2i.py writes
    codes.npy, labels.npy       arrays of the shapes (N, T) or (N, V, T), and (N,)

In each layout, the T ids of a view can also have the shape of their grid, (h, w) or (h, w, depth), as `ImageGenerationPipeline.encode` returns them.

Files are not loaded into memory as a whole. For JSON lines, only the byte offset of each line is kept.
"""

import json
import math
import re
import zipfile
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from vqmosaic.errors import InputError
from vqmosaic.files.permissions import check_readable, explain_permission_errors

CHUNK_BYTES = 1 << 24
NPY_MAGIC, ZIP_MAGIC = b"\x93NUMPY", b"PK\x03\x04"
LABELS_HINT = "give the labels, or --unlabelled for tokens without classes"


class ForeignTokens(Protocol):
    """The tokens of N images, one row for each image."""

    path: Path
    layout: str

    def __len__(self) -> int:
        """The number of rows, N."""

    def read(self, row: int) -> tuple[np.ndarray, int | None]:
        """Ids (V, T) of any integer type and the label of a row. Raises InputError, which names the row, if the row is invalid."""

    def where(self, row: int) -> str:
        """The location of a row, for error messages."""

    def name(self, row: int) -> str:
        """The source that the stored sample names. It does not depend on the machine."""


@explain_permission_errors()
def open_foreign_tokens(path: Path, labels: Path | None, unlabelled: bool, option: str = "SOURCE",
                        grid_shape: tuple[int, int, int] | None = None) -> ForeignTokens:
    """Open the tokens at `path`. `option` is the name of the command's option for it. `grid_shape` is (height, width, depth), if known.

    Raises InputError if `path` has none of the three layouts, labels are missing, or labels are given but not allowed.
    """
    if labels is not None and unlabelled:
        raise InputError(f"both --unlabelled and labels ({labels}) are given; give one of them.")
    for given, name in ((path, option), (labels, "the path of the labels")):
        if given is not None and not given.exists():
            raise InputError(f"{name} is {str(given)!r}, which does not exist.")
    if path.is_dir():
        return _open_folder(path, labels, unlabelled, option, grid_shape)
    with open(path, "rb") as file:
        begins_with = file.read(4096).lstrip()[:6]
    if path.suffix in (".npy", ".npz") or begins_with.startswith((NPY_MAGIC, ZIP_MAGIC)):
        return TokenArray(path, labels, unlabelled, grid_shape)
    if begins_with.startswith(b"["):
        raise InputError(f'{path} is a JSON array; expected JSON lines: an object such as {{"class_id": 3, "tokens": [17, 4]}} on each line, without '
                         "brackets around the lines or commas between them. Write each entry of the array on its own line, or save the ids as an npy "
                         "array.")
    if labels is not None:
        raise InputError(f"labels ({labels}) are given, but the lines of {path} have a class_id; omit the labels.")
    return TokenLines(path, unlabelled, grid_shape)


class TokenLines:
    """JSON lines with the fields tokens and class_id. Other fields are ignored."""

    layout = "JSON lines"

    def __init__(self, path: Path, unlabelled: bool, grid_shape: tuple[int, int, int] | None = None):
        self.path, self._unlabelled, self._grid_shape = path, unlabelled, grid_shape
        self._file: BinaryIO = open(path, "rb")  # noqa: SIM115, stays open for `read`
        self._starts_N = self._line_starts()

    def _line_starts(self) -> np.ndarray:
        """The byte offset of each line and of the end of the last line. Blank lines at the end of the file do not count."""
        starts, position = [np.zeros(1, dtype=np.int64)], 0
        while chunk := self._file.read(CHUNK_BYTES):
            starts.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + position + 1)
            position += len(chunk)
        starts_N = np.concatenate(starts)
        if starts_N[-1] < position:
            starts_N = np.append(starts_N, position)
        while len(starts_N) > 1 and not self._bytes(int(starts_N[-2]), int(starts_N[-1])).strip():
            starts_N = starts_N[:-1]
        return starts_N

    def _bytes(self, start: int, stop: int) -> bytes:
        self._file.seek(start)
        return self._file.read(stop - start)

    def __len__(self) -> int:
        return len(self._starts_N) - 1

    def read(self, row: int) -> tuple[np.ndarray, int | None]:
        """Ids (V, T) and the label of a line. Raises InputError, which names the line, if it is invalid."""
        line = self._bytes(int(self._starts_N[row]), int(self._starts_N[row + 1]))
        if not line.strip():
            raise InputError(f"{self.where(row)} is blank; each line must be an image. Remove the blank lines.")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.where(row)} is not JSON ({error}).") from None
        if not isinstance(record, dict) or "tokens" not in record:
            raise InputError(f'{self.where(row)}: expected an object such as {{"class_id": 3, "tokens": [17, 4]}}, found {_shortened(line)}.')
        try:
            ids = np.array(record["tokens"])
        except ValueError:
            raise InputError(f"{self.where(row)}: tokens is a list of lists of unequal lengths; every view must have the same number.") from None
        return _views(ids, self.where(row), self._grid_shape), None if self._unlabelled else self._label(record, row)

    def _label(self, record: dict, row: int) -> int | None:
        if "class_id" not in record:
            raise InputError(f"{self.where(row)} has no class_id; {LABELS_HINT} (null means that this image has no class).")
        label = record["class_id"]
        if label is not None and type(label) is not int:
            raise InputError(f"{self.where(row)}: class_id is {label!r}; allowed: an integer, or null.")
        return label

    def where(self, row: int) -> str:
        """File and line number, counted from 1."""
        return f"{self.path}, line {row + 1}"

    def name(self, row: int) -> str:
        """File name and line number."""
        return f"{self.path.name}:{row + 1}"


class TokenFiles:
    """A folder of codes and a folder of labels, each with one npy file per image: 0.npy, 1.npy and so on without gaps."""

    layout = "npy files"

    def __init__(self, path: Path, labels: Path | None, grid_shape: tuple[int, int, int] | None):
        self.path, self._labels, self._grid_shape = path, labels, grid_shape
        self._count = 0
        for file in path.iterdir():
            if file.suffix == ".npy":
                if not re.fullmatch(r"0|[1-9]\d*", file.stem):
                    raise InputError(f"{file}: the codes must be named 0.npy, 1.npy and so on.")
                self._count += 1

    def __len__(self) -> int:
        return self._count

    def read(self, row: int) -> tuple[np.ndarray, int | None]:
        """Ids (V, T) and the label in the files of a row. Raises InputError, which names the file, if one is missing or invalid."""
        path = self.path / f"{row}.npy"
        if not path.is_file():
            raise InputError(f"{path} is missing; the {self._count} files in {self.path} must be 0.npy to {self._count - 1}.npy.")
        ids = _load(path)
        if ids.ndim >= 3:
            if len(ids) != 1:
                raise InputError(f"{path} has the shape {ids.shape}; expected (1, views, tokens): one image per file.")
            ids = ids[0]
        return _views(ids, str(path), self._grid_shape), None if self._labels is None else self._label(self._labels / path.name)

    def _label(self, path: Path) -> int:
        if not path.is_file():
            raise InputError(f"{path}, the label of {self.path / path.name}, is missing; {LABELS_HINT}.")
        label = _load(path)
        if label.size != 1 or label.dtype.kind not in "iu":
            raise InputError(f"{path} is {label.dtype} with the shape {label.shape}; expected one integer, the label.")
        return int(label.reshape(()))

    def where(self, row: int) -> str:
        """The file."""
        return str(self.path / f"{row}.npy")

    def name(self, row: int) -> str:
        """Folder and file name."""
        return f"{self.path.name}/{row}.npy"


class TokenArray:
    """One array of codes and one array of labels, memory-mapped."""

    layout = "npy array"

    def __init__(self, path: Path, labels: Path | None, unlabelled: bool, grid_shape: tuple[int, int, int] | None):
        self.path, self._labels_N, self._grid_shape = path, None, grid_shape
        self._ids = _load(path, mapped=True)
        if self._ids.ndim not in (2, 3, 4, 5) or self._ids.dtype.kind not in "iu":
            raise InputError(f"{path} is {self._ids.dtype} with the shape {self._ids.shape}; expected integers with the shape (images, tokens), "
                             "(images, views, tokens) or (images, height, width).")
        if labels is None and not unlabelled:
            raise InputError(f"{path} has no labels; {LABELS_HINT}.")
        if labels is not None:
            if not labels.is_file():
                raise InputError(f"{labels} is a folder; expected an npy file with one label for each row of {path}.")
            self._labels_N = _load(labels, mapped=True)
            if self._labels_N.shape != (len(self._ids),) or self._labels_N.dtype.kind not in "iu":
                raise InputError(f"{labels} is {self._labels_N.dtype} with the shape {self._labels_N.shape}; expected {len(self._ids)} integers, "
                                 f"one for each row of {path}.")

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, row: int) -> tuple[np.ndarray, int | None]:
        """Ids (V, T) and the label of a row."""
        return _views(np.array(self._ids[row]), self.where(row), self._grid_shape), None if self._labels_N is None else int(self._labels_N[row])

    def where(self, row: int) -> str:
        """File and row number, counted from 0 as in numpy."""
        return f"{self.path}, row {row}"

    def name(self, row: int) -> str:
        """File name and row number."""
        return f"{self.path.name}[{row}]"


def _open_folder(path: Path, labels: Path | None, unlabelled: bool, option: str, grid_shape: tuple[int, int, int] | None) -> TokenFiles:
    """Open a folder of codes, or a folder that contains one, as LlamaGen writes them. By default, the labels are in a folder next to the codes."""
    codes_folders = sorted(found for found in path.iterdir() if found.is_dir() and found.name.endswith("_codes"))
    if len(codes_folders) > 1:
        raise InputError(f"{option} is {str(path)!r}, which contains {', '.join(found.name for found in codes_folders)}; give one of them.")
    codes = codes_folders[0] if codes_folders else path
    default_labels = codes.with_name(f"{codes.name.removesuffix('_codes')}_labels")
    if labels is None and not unlabelled:
        if not codes.name.endswith("_codes") or not default_labels.is_dir():
            raise InputError(f"{codes} has no labels: {LABELS_HINT} (by default, labels are read from {default_labels.name}/ in the same folder).")
        labels = default_labels
    if labels is not None and not labels.is_dir():
        raise InputError(f"{labels} is a file; for a folder of codes, the labels must be a folder with one file per image.")
    files = TokenFiles(codes, labels, grid_shape)
    if not len(files):
        raise InputError(f"{option} is {str(path)!r}, a folder without .npy files; expected 0.npy, 1.npy and so on.")
    return files


def _load(path: Path, mapped: bool = False) -> np.ndarray:
    """The array in an npy file, optionally memory-mapped. Raises InputError if it is invalid or would need unpickling."""
    check_readable(path)
    try:
        with open(path, "rb") as file:
            begins_with = file.read(6)
        if begins_with.startswith(ZIP_MAGIC):
            raise ValueError("it is a zip archive, such as an npz file. Save one array of the archive: numpy.save('array.npy', "
                             f"numpy.load({str(path)!r})[NAME])" + _names_in_archive(path))
        if begins_with != NPY_MAGIC:
            raise ValueError("it does not have the header of an npy file")
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as an npy file: {error}.") from None


def _names_in_archive(path: Path) -> str:
    """A clause with the names of the arrays in an npz file, or an empty string."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (OSError, ValueError, zipfile.BadZipFile):
        return ""
    return f", where NAME is one of {', '.join(map(repr, names[:10]))}" if names else ""


def _views(ids: np.ndarray, where: str, grid_shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """Reshape the ids of an image to (V, T). They can have the shape (T,), (V, T), or that of the grid with or without a leading axis of views.

    `grid_shape` is (height, width, depth). If it is not known, two equal axes are taken as a square grid, the shape in which pipelines return ids;
    as many views as tokens are unlikely. Raises InputError if the shape is ambiguous or invalid.
    """
    if ids.ndim not in (1, 2, 3, 4) or not ids.size:
        raise InputError(f"{where}: the tokens have the shape {ids.shape}; expected (tokens,), (views, tokens) or (height, width), not empty.")
    if ids.dtype.kind not in "iu":
        raise InputError(f"{where}: the tokens are not all integers ({ids.dtype}).")
    if ids.ndim == 1:
        return ids[None]
    if grid_shape is not None:
        shapes = [grid_shape, grid_shape[:2]] if grid_shape[2] == 1 else [grid_shape]
        if ids.shape in shapes:
            return ids.reshape(1, -1)
        if ids.shape[1:] in shapes:
            return ids.reshape(len(ids), -1)
        if ids.ndim == 2:
            return ids
        raise InputError(f"{where}: the tokens have the shape {ids.shape}; expected (tokens,), (views, tokens), or the grid "
                         f"{' x '.join(map(str, shapes[-1]))}, with or without a leading axis of views.")
    height, width = ids.shape[-2:]
    if ids.ndim == 2 and height == width:
        return ids.reshape(1, -1)
    if ids.ndim == 2 and height < width:
        return ids
    if ids.ndim == 3 and height == width:
        return ids.reshape(len(ids), -1)
    options = [f"--height {height} --width {width} for a grid of this shape"]
    side = math.isqrt(width)
    if ids.ndim == 2 and side * side == width:
        options.append(f"--height {side} --width {side} for {height} views of a {side} x {side} grid")
    raise InputError(f"{where}: the tokens have the shape {ids.shape}, which can be a grid or several views. Give {', or '.join(options)}, or "
                     "--tokenizer with the vqmosaic tokenizer that made the ids.")


def _shortened(line: bytes) -> str:
    text = line[:61].decode(errors="replace").strip()
    return repr(text if len(line) <= 60 else f"{text[:57]}...")
