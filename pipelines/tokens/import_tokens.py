"""Converts tokens of other programs to token shards, on which a prior can be trained. Does not load torch.

    vqmosaic import-tokens pretokenized.jsonl --codebook_size 1024 --token_fingerprint maskgit-vqgan --out tokens
    vqmosaic import-tokens imagenet256_codes --codebook_size 16384 --token_fingerprint llamagen-vq16 --out tokens
    vqmosaic import-tokens codes.npy --labels labels.npy --tokenizer runs/cifar10/tokenizer --out tokens
    vqmosaic train-prior cifar10 --prior_training.tokens tokens

With --tokenizer or --like, an image may have several grids: its tokens are those of all grids, in order. --like takes the grids, and which of them
are given to a prior, from a folder of shards, such as the one that export-tokens read.
The source is read twice: first to check every row before anything is written, then to write the shards. Do not change it in between. If the command
is killed, run it again to write the missing shards; this works if the source has not changed.
Rows are often sorted by class, so they are permuted by a recorded seed before they are divided into shards. The second pass therefore reads the
source in jumps, but forwards within each shard.

1d-tokenizer writes the mirrored view of an image on a separate line, far from the original, and each line becomes an image. A fraction of such lines
must not be used for validation, because the mirrored views of most of these images would be in the training set. Use --validation for such tokens.
"""

import argparse
import dataclasses
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.stages.stage_checks import check_can_write
from pipelines.stages.stage_inputs import token_fingerprint_of_tokenizer
from pipelines.tokens.foreign_tokens import ForeignTokens, open_foreign_tokens
from stage1_tokenizer.tokenizer_grids import IMAGE_GRID, grids_of_tokenizer
from token_shards.manifest import (
    MANIFEST_NAME,
    ORDER_SEED,
    SPLITS,
    Grid,
    ShardSetHeader,
    TokenShardManifest,
    describe_grids,
    grid_columns,
)
from token_shards.sidecar import ShardSidecar
from token_shards.writer import TokenShardWriter, default_key, headers_in_stored_order
from vqmosaic.errors import InputError, check_range
from vqmosaic.files.given_paths import given_path
from vqmosaic.files.permissions import permission_denied
from vqmosaic.held_out import choose_held_out
from vqmosaic.runs.interruption import Interrupted, StopFlag
from vqmosaic.training.tracking import Reporter, progress_bar
from vqmosaic.wording import counted

FOREIGN_PREFIX = "imported:"  # the fingerprints of vqmosaic tokenizers are hex digits, so they never begin with this
VALIDATION_FRACTION = 0.05
MAX_UNNAMED_CLASSES = 1_000_000
"""Labels below this number are used as class names. Larger labels are refused without --class_names, because they are probably a mistake."""


@dataclasses.dataclass
class SourceSummary:
    """Properties of the rows of one source. The shape comes from the first row, the rest from reading all rows."""

    views: int
    """Number of views of each image, V."""
    tokens: int
    """Number of ids of each view, T."""
    largest_id: int = 0
    """The largest id of all rows."""
    classes: int = 0
    """The largest label plus one."""
    digest: str = ""
    """Hex sha256 of all ids and labels in order. It does not depend on the layout of the source."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of import-tokens to a parser."""
    parser.add_argument("source", type=given_path, metavar="SOURCE", help="JSON lines with tokens and class_id, one image per line; a folder of npy "
                        "codes (with the labels in *_labels in the same folder); or one npy array (images, tokens), (images, views, tokens) or "
                        "(images, height, width). Two equal axes are taken as a square grid; give --height and --width if they are views and tokens")
    parser.add_argument("--out", required=True, type=given_path, help="the folder to write; it will contain train/ and validation/")
    parser.add_argument("--labels", type=given_path, help="labels of npy codes: a folder or an array")
    parser.add_argument("--unlabelled", action="store_true", help="import without classes")
    parser.add_argument("--validation", type=given_path, metavar="SOURCE", help="tokens for validation, in one of the same layouts; needed if the "
                        "mirrored views of images are separate rows")
    parser.add_argument("--validation_labels", type=given_path, help="labels of --validation, if they are in a separate file or folder")
    parser.add_argument("--validation_fraction", type=float, help="fraction of the rows for validation, chosen by a hash of the row number; default: "
                        f"{VALIDATION_FRACTION}")
    parser.add_argument("--tokenizer", type=given_path, help="the vqmosaic tokenizer that made the ids; it determines codebook size and grid")
    parser.add_argument("--like", type=given_path, metavar="FOLDER", help="token shards of one split with the same grids, tokenizers and conditions")
    parser.add_argument("--token_fingerprint", help="a name for the tokenizer of another program; default: a digest of the tokens")
    parser.add_argument("--codebook_size", type=int, help="number of codes K; ids are 0 .. K-1")
    parser.add_argument("--height", type=int, help="rows of the grid; default: a square grid of all tokens")
    parser.add_argument("--width", type=int, help="columns of the grid")
    parser.add_argument("--grid", metavar="NAME", help=f"name of the grid in the shards, without --tokenizer; default: {IMAGE_GRID}")
    parser.add_argument("--class_names", help="class names separated by commas, or a file with one name per line; default: 0, 1, 2 ...")
    parser.add_argument("--images_per_shard", type=int, default=1000)


def import_tokens(options: argparse.Namespace) -> int:
    """Write both splits and return exit code 0. Raises InputError, before anything is written, for invalid options or rows."""
    check_options(options)
    report = Reporter("import")
    grids = get_tokenizer_grids(options)
    grid_shape = get_grid_shape(options, grids)
    names = parse_class_names(options.class_names)
    sources = [open_foreign_tokens(options.source, options.labels, options.unlabelled, grid_shape=grid_shape)]
    if options.validation is not None:
        sources.append(open_foreign_tokens(options.validation, options.validation_labels, options.unlabelled, "--validation", grid_shape))
    elif len(sources[0]) < 2:
        raise InputError(f"{options.source} has {counted(len(sources[0]), 'row')}; at least 2 are needed, one for training and one for validation.")
    for source in sources:
        if len(source):
            make_grids(SourceSummary(*source.read(0)[0].shape), grids, options)  # fails early: reading all rows can take minutes
    with StopFlag() as stop:
        summaries = [check_rows(source, grids, options, None if names is None else len(names), stop) for source in sources]
        parts = make_headers(options, sources, summaries, make_grids(summaries[0], grids, options), names)
        # an import that version 0.1.0 began continues in the order of the rows
        headers = headers_in_stored_order({options.out / header.split: header for header, _, _ in parts})
        parts = [(headers[options.out / header.split], source, rows) for header, source, rows in parts]
        for header, _, _ in parts:
            check_folder_unused(options.out / header.split, header)
        print_plan(report, parts, summaries)
        writers = [TokenShardWriter(options.out / header.split, header) for header, _, _ in parts]
        for writer, (_, source, rows) in zip(writers, parts, strict=True):
            write_split(writer, source, rows, stop)
    for writer in writers:
        manifest = writer.finish()
        report(f"{writer.folder}: {counted(manifest.num_samples, 'image')} in {counted(len(manifest.shards), 'shard')}")
    return 0


def print_plan(report: Reporter, parts: list[tuple[ShardSetHeader, ForeignTokens, np.ndarray]], summaries: Sequence[SourceSummary]) -> None:
    """Print what will be written."""
    train, source, _ = parts[0]
    report.table("plan", {
        "source": f"{source.path}, {source.layout}",
        "images": ", ".join(f"{len(rows):,} x {counted(len(header.views), 'view')} in {header.split}" for header, _, rows in parts),
        "tokens": f"{describe_grids(train.grids)}; "
                  f"the largest id is {max(summary.largest_id for summary in summaries):,}",
        "classes": "none" if train.class_names is None else f"{len(train.class_names):,}",
        "token fingerprint": train.token_fingerprint})


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for options that contradict each other or are out of range."""
    check_can_write("--out", options.out)
    check_range("--images_per_shard", options.images_per_shard, at_least=1)
    for name in ("codebook_size", "height", "width"):
        if getattr(options, name) is not None:
            check_range(f"--{name}", getattr(options, name), at_least=1)
    if options.validation is None and options.validation_labels is not None:
        raise InputError(f"--validation_labels is {str(options.validation_labels)!r}, but --validation is not given.")
    if options.validation_fraction is not None:
        if options.validation is not None:
            raise InputError("--validation and --validation_fraction are both given; give one of them.")
        check_range("--validation_fraction", options.validation_fraction, above=0, below=1)
    if (options.height is None) != (options.width is None):
        raise InputError(f"--height is {options.height} and --width is {options.width}; give both, or neither for a square grid.")
    if options.like is not None:
        for name in ("tokenizer", "token_fingerprint", "codebook_size", "height", "width", "grid"):
            if getattr(options, name) is not None:
                raise InputError(f"--like and --{name} are both given; the shards in --like have all grids and their tokenizers. Omit --{name}.")
    name = options.token_fingerprint
    if name is not None and options.tokenizer is not None:
        raise InputError("--tokenizer and --token_fingerprint are both given; omit --token_fingerprint, because a tokenizer has its own.")
    if options.grid is not None and options.tokenizer is not None:
        raise InputError("--grid and --tokenizer are both given; the tokenizer names its grids. Omit --grid.")
    if name is not None and not re.fullmatch(r"[\w.:/@+-]{1,200}", name):
        raise InputError(f"--token_fingerprint is {name!r}; allowed: 1 to 200 letters, digits and any of . : / @ + - _")
    if options.tokenizer is None and options.like is None and options.codebook_size is None:
        raise InputError("--codebook_size is not given; give the number of codes of the tokenizer that made the ids, "
                         "or --tokenizer with its folder if it is a vqmosaic tokenizer.")


def get_tokenizer_grids(options: argparse.Namespace) -> list[Grid] | None:
    """The grids of --tokenizer or --like, or None without them. Raises InputError if the tokenizer has no ids, or if other options differ from it."""
    if options.like is not None:
        return TokenShardManifest.load(options.like).grids
    if options.tokenizer is None:
        return None
    grids = grids_of_tokenizer(options.tokenizer)
    if not grids:
        raise InputError(f"The tokenizer in {options.tokenizer} has no ids, so there are no tokens. Set --tokenizer to a tokenizer with ids.")
    for name in ("codebook_size", "height", "width"):
        expected = [getattr(grid, name) for grid in grids]
        if getattr(options, name) is not None and set(expected) != {getattr(options, name)}:
            raise InputError(f"--{name} is {getattr(options, name)}, but the tokenizer in {options.tokenizer} has "
                             f"{', '.join(map(str, expected))}; omit --{name}.")
    return grids


def get_grid_shape(options: argparse.Namespace, grids: Sequence[Grid] | None) -> tuple[int, int, int] | None:
    """(height, width, depth) of an image's ids, or None if it is not known. The ids of several grids are one row."""
    if grids is None:
        return None if options.height is None else (options.height, options.width, 1)
    if len(grids) > 1:
        return 1, sum(grid.num_tokens for grid in grids), 1
    return grids[0].height, grids[0].width, grids[0].depth


def parse_class_names(text: str | None) -> list[str] | None:
    """The names in a file, one per line, or in a list separated by commas. Raises InputError for an empty or repeated name."""
    if text is None:
        return None
    path = Path(text)
    try:
        is_file = path.is_file()
    except OSError:  # a list of names can be too long for a file name
        is_file = False
    try:
        names = path.read_text(encoding="utf-8").splitlines() if is_file else text.split(",")
    except PermissionError as error:
        raise permission_denied(path) from error
    except (OSError, ValueError) as error:
        raise InputError(f"--class_names {text} cannot be read as text: {error}.") from None
    names = [name.strip() for name in names]
    if not all(names) or len(set(names)) < len(names):
        wrong = next(name for position, name in enumerate(names) if not name or name in names[:position])
        raise InputError(f"--class_names {text}: {repr(wrong) + ' is repeated' if wrong else 'a name is empty'}; each class needs a unique name.")
    return names


def check_rows(source: ForeignTokens, grids: Sequence[Grid] | None, options: argparse.Namespace, classes: int | None,
               stop: StopFlag) -> SourceSummary:
    """Read and check all rows. `grids` are those of --tokenizer, or None without it.

    Raises InputError, which names the row, for a row that is out of range or has another shape than the first row.
    """
    if not len(source):
        raise InputError(f"{source.path} has no rows.")
    summary, digest = SourceSummary(*source.read(0)[0].shape), hashlib.sha256()
    grids = make_grids(summary, grids, options)
    with progress_bar(len(source), 0, f"check {source.path.name}", "image") as bar:
        for row in range(len(source)):
            if stop.signal:
                raise Interrupted(stop.signal, "nothing was written yet")
            ids_VT, label = read_checked_row(source, row, summary, grids, classes)
            summary.largest_id = max(summary.largest_id, int(ids_VT.max()))
            summary.classes = max(summary.classes, 0 if label is None else label + 1)
            digest.update(ids_VT.astype("<i4").tobytes())
            digest.update(f"\n{label}\n".encode())
            bar.update()
    summary.digest = digest.hexdigest()
    return summary


def read_checked_row(source: ForeignTokens, row: int, summary: SourceSummary, grids: Sequence[Grid],
                     classes: int | None) -> tuple[np.ndarray, int | None]:
    """Ids (V, T) and label of a row. Raises InputError, which names the row, if shape, ids or label are not allowed."""
    ids_VT, label = source.read(row)
    if ids_VT.shape != (summary.views, summary.tokens):
        raise InputError(f"{source.where(row)} has {counted(ids_VT.shape[0], 'view')} of {counted(ids_VT.shape[1], 'token')}, but the rows before it "
                         f"have {summary.views} of {summary.tokens}; all rows must have the same numbers.")
    columns = grid_columns(grids)
    for grid in grids:
        low, high = int(ids_VT[:, columns[grid.name]].min()), int(ids_VT[:, columns[grid.name]].max())
        if low < 0 or high >= grid.codebook_size:
            which = f" of grid {grid.name!r}" if len(grids) > 1 else ""
            raise InputError(f"{source.where(row)}: the ids{which} run from {low} to {high}; allowed: 0 to {grid.codebook_size - 1}, because "
                             f"--codebook_size or the tokenizer gives {grid.codebook_size} codes.")
    if label is not None and not 0 <= label < (MAX_UNNAMED_CLASSES if classes is None else classes):
        allowed = f"0 to {MAX_UNNAMED_CLASSES - 1} without --class_names" if classes is None else f"0 to {classes - 1}, as in --class_names"
        raise InputError(f"{source.where(row)}: the label is {label}; allowed: {allowed}.")
    return ids_VT, label


def make_grids(summary: SourceSummary, grids: Sequence[Grid] | None, options: argparse.Namespace) -> list[Grid]:
    """The grids of the T tokens of a view: those of --tokenizer or, without it, one grid, by default a square.

    Raises InputError if the grids do not have T tokens.
    """
    shape = get_grid_shape(options, grids)
    if shape is None:
        side = math.isqrt(summary.tokens)
        if side * side != summary.tokens:
            raise InputError(f"{options.source} has {counted(summary.tokens, 'token')} per view, which is not a square number; give --height and "
                             f"--width (--height 1 --width {summary.tokens} if the tokens are not a grid).")
        shape = (side, side, 1)
    if math.prod(shape) != summary.tokens:
        origin = f"the tokenizer in {options.tokenizer}" if options.tokenizer else f"the shards in {options.like}" if options.like else (
            "--height and --width")
        what = f"the grid {' x '.join(map(str, shape))} of {origin} has"
        if grids is not None and len(grids) > 1:
            what = f"the grids of {origin} ({describe_grids(grids)}) have"
        raise InputError(f"{options.source} has {summary.tokens} tokens per view, but {what} {math.prod(shape)}.")
    return list(grids) if grids is not None else [Grid(IMAGE_GRID if options.grid is None else options.grid, options.codebook_size, *shape)]


def make_headers(options: argparse.Namespace, sources: Sequence[ForeignTokens], summaries: Sequence[SourceSummary], grids: list[Grid],
                 names: list[str] | None) -> list[tuple[ShardSetHeader, ForeignTokens, np.ndarray]]:
    """For each split, its header, its source, and the rows of the source to store."""
    if len(summaries) == 2 and summaries[0].tokens != summaries[1].tokens:
        raise InputError(f"{options.source} has {summaries[0].tokens} tokens per view, but {options.validation} has {summaries[1].tokens}; "
                         "the numbers must be equal.")
    classes = max(summary.classes for summary in summaries)
    if names is not None and not classes:
        raise InputError(f"--class_names is given, but no row of {options.source} has a label.")
    if names is None and classes:
        names = [str(label) for label in range(classes)]
    like = TokenShardManifest.load(options.like) if options.like is not None else None
    if like is not None:
        fingerprint = like.token_fingerprint
        if options.class_names is None and like.class_names is not None and classes <= len(like.class_names):
            names = like.class_names if classes else None
    elif options.tokenizer is not None:
        fingerprint = token_fingerprint_of_tokenizer(options.tokenizer)
    else:
        fingerprint = FOREIGN_PREFIX + (options.token_fingerprint
                                        or hashlib.sha256("".join(summary.digest for summary in summaries).encode()).hexdigest())
    fraction = None if len(sources) == 2 else options.validation_fraction or VALIDATION_FRACTION
    if fraction is None:
        split_rows = [np.arange(len(source)) for source in sources]
    else:
        held_out_N = choose_held_out(range(len(sources[0])), fraction)
        split_rows = [np.flatnonzero(~held_out_N), np.flatnonzero(held_out_N)]
    parts = []
    for split, rows, source, summary in zip(SPLITS, split_rows, (sources[0], sources[-1]), (summaries[0], summaries[-1]), strict=True):
        identity = {"imported": source.layout, "name": source.path.name, "rows": len(source), "sha256": summary.digest,
                    "validation_fraction": fraction}
        views = [{"name": "original" if summary.views == 1 else f"imported {view}"} for view in range(summary.views)]
        header = ShardSetHeader(split=split, token_fingerprint=fingerprint, grids=grids, views=views, class_names=names, dataset=identity,
                                encoding={"imported": source.layout}, images_per_shard=options.images_per_shard, num_sources=len(rows),
                                order_seed=ORDER_SEED, conditions=like.conditions if like is not None else [])
        parts.append((header, source, rows))
    return parts


def check_folder_unused(folder: Path, header: ShardSetHeader) -> None:
    """Raise InputError if the folder contains shards with another header."""
    found = None
    if (folder / MANIFEST_NAME).is_file():
        found = TokenShardManifest.load(folder).header.fingerprint
    else:
        sidecars, tars = sorted(folder.glob("shard-*.json")), list(folder.glob("shard-*.tar"))
        if sidecars:
            found = ShardSidecar.load(folder, sidecars[0].with_suffix(".tar").name).header_fingerprint
        elif len(tars) > 1:  # a single one may be from this import: it can be killed after it writes a shard and before it writes the sidecar
            found = "not known"
    if found not in (None, header.fingerprint):
        raise InputError(f"{folder} contains other token shards, or shards of the same tokens imported with other options. "
                         "Remove it, or give another folder with --out.")


def write_split(writer: TokenShardWriter, source: ForeignTokens, rows: np.ndarray, stop: StopFlag) -> None:
    """Write the shards of one split that are not complete yet."""
    header, columns = writer.header, grid_columns(writer.header.grids)
    missing = [shard for shard in range(writer.num_shards) if not writer.is_complete(shard)]
    with progress_bar(sum(len(header.source_range(shard)) for shard in missing), 0, header.split, "image") as bar:
        for number in missing:
            with writer.shard(number) as shard:
                for index in header.source_indices(number):
                    if stop.signal:
                        raise Interrupted(stop.signal, f"finished shards are kept in {writer.folder}")
                    row = int(rows[index])
                    ids_VT, label = source.read(row)
                    shard.add(index=index, key=default_key(index), source=source.name(row), label=label,
                              ids={name: ids_VT[:, places] for name, places in columns.items()})
                    bar.update()
