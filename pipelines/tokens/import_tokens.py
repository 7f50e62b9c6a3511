"""Tokens made elsewhere become token shards, which the prior is trained on like any others. Loads no torch.

    vqmosaic import-tokens pretokenized.jsonl --codebook_size 1024 --token_fingerprint maskgit-vqgan --out tokens
    vqmosaic import-tokens imagenet256_codes --codebook_size 16384 --token_fingerprint llamagen-vq16 --out tokens
    vqmosaic import-tokens codes.npy --labels labels.npy --tokenizer runs/cifar10/tokenizer --out tokens
    vqmosaic train-prior cifar10 --prior_training.tokens tokens

Everything is read twice: once to check it, before anything is written, and once to write it; leave the source alone meanwhile. A call that was
killed goes on, when it is made again, with the shards that are missing, unless the source has another digest by then.
The rows are permuted by a recorded seed before they are cut into shards, because they are often sorted by class. The second reading
therefore jumps through the source: one shard after another, and forwards within each shard.

1d-tokenizer writes the mirrored view of an image as a line of its own, far from the other, and each line becomes an image: a share of such
lines is no set to validate on, since most of its images are trained on mirrored. Give such tokens a --validation of their own.
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
from token_shards.manifest import MANIFEST_NAME, ORDER_SEED, SPLITS, Grid, ShardSetHeader, TokenShardManifest
from token_shards.sidecar import ShardSidecar
from token_shards.writer import TokenShardWriter, default_key, headers_as_written
from vqmosaic.errors import InputError, check_range
from vqmosaic.files.given_paths import given_path
from vqmosaic.files.json_files import from_fields, read_object, written_by
from vqmosaic.files.permissions import permission_denied
from vqmosaic.recipes.tokenizer_sections import CONTINUOUS, TokenizerConfig
from vqmosaic.runs.interruption import Interrupted, StopFlag
from vqmosaic.seeding import derive_seed
from vqmosaic.training.tracking import Reporter, progress_bar
from vqmosaic.wording import counted

GRID_NAME = "image"
FOREIGN_PREFIX = "imported:"  # never starts a fingerprint of our own tokenizers, which are hex digits
VALIDATION_FRACTION = 0.05
MAX_UNNAMED_CLASSES = 1_000_000
"""Labels below this get their number for a name. A larger one is a mistake, or needs --class_names."""


@dataclasses.dataclass
class Facts:
    """What the rows of one source have in common, found by reading all of them."""

    views: int
    """Views of each image, V."""
    tokens: int
    """Ids of each view, T."""
    largest_id: int = 0
    """The largest id of all."""
    classes: int = 0
    """The largest label and one."""
    digest: str = ""
    """Hex sha256 over ids and labels in order, whatever the layout they came in."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of import-tokens."""
    parser.add_argument("source", type=given_path, metavar="SOURCE", help="JSON lines with tokens and class_id, each line an image; a folder of npy "
                        "codes (labels beside it in *_labels); or one npy array (images, tokens), (images, views, tokens) or (images, height, "
                        "width). Two equal axes are a square grid; give --height and --width where they are views")
    parser.add_argument("--out", required=True, type=given_path, help="the folder to write: train/ and validation/ inside")
    parser.add_argument("--labels", type=given_path, help="labels of npy codes: a folder, or an array")
    parser.add_argument("--unlabelled", action="store_true", help="do without classes")
    parser.add_argument("--validation", type=given_path, metavar="SOURCE", help="tokens to validate on, in the same layouts; needed where the "
                        "mirrored views of an image are rows of their own")
    parser.add_argument("--validation_labels", type=given_path, help="labels of --validation, where they are a file of their own")
    parser.add_argument("--validation_fraction", type=float, help="share of the rows to validate on, chosen by a hash of the row number; default: "
                        f"{VALIDATION_FRACTION}")
    parser.add_argument("--tokenizer", type=given_path, help="the vqmosaic tokenizer that made the ids: codebook size and grid are taken from it")
    parser.add_argument("--token_fingerprint", help="a name for a tokenizer of another program; default: a digest of the tokens themselves")
    parser.add_argument("--codebook_size", type=int, help="codes K: ids lie in 0 .. K-1")
    parser.add_argument("--height", type=int, help="rows of the grid; default: a square of all tokens")
    parser.add_argument("--width", type=int, help="columns of the grid")
    parser.add_argument("--class_names", help="names with commas between, or a file with one a line; default: 0, 1, 2 ...")
    parser.add_argument("--images_per_shard", type=int, default=1000)


def import_tokens(options: argparse.Namespace) -> int:
    """Exit code 0 once both splits are written. Raises InputError, before anything is written, for options and rows that cannot be used."""
    check_options(options)
    report = Reporter("import")
    codebook_size, grid_shape = size_and_grid(options)
    names = given_class_names(options.class_names)
    sources = [open_foreign_tokens(options.source, options.labels, options.unlabelled, grid_shape=grid_shape)]
    if options.validation is not None:
        sources.append(open_foreign_tokens(options.validation, options.validation_labels, options.unlabelled, "--validation", grid_shape))
    elif len(sources[0]) < 2:
        raise InputError(f"{options.source} holds {counted(len(sources[0]), 'row')}; at least 2 are needed, one to train and one to validate on.")
    for source in sources:
        if len(source):
            grid_of(Facts(*source.read(0)[0].shape), codebook_size, grid_shape, options)  # before the minutes that reading all rows may take
    with StopFlag() as stop:
        facts = [examine(source, codebook_size, None if names is None else len(names), stop) for source in sources]
        grid = grid_of(facts[0], codebook_size, grid_shape, options)
        parts = make_headers(options, sources, facts, grid, names)
        # an import that version 0.1.0 began continues in the order of the rows
        headers = headers_as_written({options.out / header.split: header for header, _, _ in parts})
        parts = [(headers[options.out / header.split], source, rows) for header, source, rows in parts]
        for header, _, _ in parts:
            check_free(options.out / header.split, header)
        print_plan(report, parts, facts)
        writers = [TokenShardWriter(options.out / header.split, header) for header, _, _ in parts]
        for writer, (_, source, rows) in zip(writers, parts, strict=True):
            write_split(writer, source, rows, stop)
    for writer in writers:
        manifest = writer.finish()
        report(f"{writer.folder}: {counted(manifest.num_samples, 'image')} in {counted(len(manifest.shards), 'shard')}")
    return 0


def print_plan(report: Reporter, parts: list[tuple[ShardSetHeader, ForeignTokens, np.ndarray]], facts: Sequence[Facts]) -> None:
    """Say what will be written."""
    train, source, _ = parts[0]
    grid = train.grids[0]
    report.table("plan", {
        "source": f"{source.path}, {source.layout}",
        "images": ", ".join(f"{len(rows):,} x {counted(len(header.views), 'view')} in {header.split}" for header, _, rows in parts),
        "tokens": f"{grid.height} x {grid.width}{f' x {grid.depth}' if grid.depth > 1 else ''} of {grid.codebook_size:,} codes; "
                  f"the largest id is {max(each.largest_id for each in facts):,}",
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
        raise InputError(f"--validation_labels is {str(options.validation_labels)!r}, but there is no --validation that they belong to.")
    if options.validation_fraction is not None:
        if options.validation is not None:
            raise InputError("--validation and --validation_fraction are both given; give the tokens to validate on, or the share to cut off.")
        check_range("--validation_fraction", options.validation_fraction, above=0, below=1)
    if (options.height is None) != (options.width is None):
        raise InputError(f"--height is {options.height} and --width is {options.width}; give both, or none for a square.")
    name = options.token_fingerprint
    if name is not None and options.tokenizer is not None:
        raise InputError("--tokenizer and --token_fingerprint are both given; a tokenizer carries its own fingerprint.")
    if name is not None and not re.fullmatch(r"[\w.:/@+-]{1,200}", name):
        raise InputError(f"--token_fingerprint is {name!r}; allowed: 1 to 200 letters, digits and any of . : / @ + - _")
    if options.tokenizer is None and options.codebook_size is None:
        raise InputError("--codebook_size is not given; give the number of codes of the tokenizer that made the ids, "
                         "or --tokenizer with its folder where it is one of vqmosaic's.")


def size_and_grid(options: argparse.Namespace) -> tuple[int, tuple[int, int, int] | None]:
    """Codes K, and (height, width, depth) where options or the tokenizer say it. Raises InputError where the two differ."""
    given = None if options.height is None else (options.height, options.width, 1)
    if options.tokenizer is None:
        return options.codebook_size, given
    token_fingerprint_of_tokenizer(options.tokenizer)  # checks that there is one
    where = options.tokenizer / "config.json"
    content = read_object(where, "copy the tokenizer again from where it was trained")
    config = from_fields(TokenizerConfig, content.get("network"), f"{where}: network", written_by(content))
    if config.quantizer in CONTINUOUS:
        raise InputError(f"--tokenizer {options.tokenizer} is of the kind {config.quantizer!r}, which gives no ids.")
    side = content["transform"]["image_size"] // config.downsampling
    for name, own in (("codebook_size", config.codebook_size), ("height", side), ("width", side)):
        if getattr(options, name) not in (None, own):
            raise InputError(f"--{name} is {getattr(options, name)}, but the tokenizer in {options.tokenizer} has {own}; leave it out.")
    return config.codebook_size, (side, side, config.depth)


def given_class_names(text: str | None) -> list[str] | None:
    """The names in a file, one a line, or with commas between. Raises InputError for a name that is empty or there twice."""
    if text is None:
        return None
    path = Path(text)
    try:
        is_file = path.is_file()
    except OSError:  # a list of names can be too long for the name of a file
        is_file = False
    try:
        names = path.read_text(encoding="utf-8").splitlines() if is_file else text.split(",")
    except PermissionError as error:
        raise permission_denied(path) from error
    except (OSError, ValueError) as error:
        raise InputError(f"--class_names {text} cannot be read as text: {error}.") from None
    names = [name.strip() for name in names]
    if not all(names) or len(set(names)) < len(names):
        wrong = next(name for place, name in enumerate(names) if not name or name in names[:place])
        raise InputError(f"--class_names {text}: {repr(wrong) + ' is there twice' if wrong else 'a name is empty'}; each class needs its own.")
    return names


def examine(source: ForeignTokens, codebook_size: int, classes: int | None, stop: StopFlag) -> Facts:
    """What the rows have in common. Raises InputError that names the first row that is not like the first, or out of range."""
    if not len(source):
        raise InputError(f"{source.path} holds no rows.")
    facts, digest = Facts(*source.read(0)[0].shape), hashlib.sha256()
    with progress_bar(len(source), 0, f"check {source.path.name}", "image") as bar:
        for row in range(len(source)):
            if stop.signal:
                raise Interrupted(stop.signal, "nothing is written yet")
            ids_VT, label = checked(source, row, facts, codebook_size, classes)
            facts.largest_id = max(facts.largest_id, int(ids_VT.max()))
            facts.classes = max(facts.classes, 0 if label is None else label + 1)
            digest.update(ids_VT.astype("<i4").tobytes())
            digest.update(f"\n{label}\n".encode())
            bar.update()
    facts.digest = digest.hexdigest()
    return facts


def checked(source: ForeignTokens, row: int, facts: Facts, codebook_size: int, classes: int | None) -> tuple[np.ndarray, int | None]:
    """Ids (V, T) and label of a row that fits the others. Raises InputError that names it otherwise."""
    ids_VT, label = source.read(row)
    if ids_VT.shape != (facts.views, facts.tokens):
        raise InputError(f"{source.where(row)} has {counted(ids_VT.shape[0], 'view')} of {counted(ids_VT.shape[1], 'token')}, the rows before it "
                         f"have {facts.views} of {facts.tokens}; all rows need the same numbers.")
    low, high = int(ids_VT.min()), int(ids_VT.max())
    if low < 0 or high >= codebook_size:
        raise InputError(f"{source.where(row)}: ids run from {low} to {high}; allowed: 0 to {codebook_size - 1}, by --codebook_size "
                         f"{codebook_size} or the tokenizer.")
    if label is not None and not 0 <= label < (MAX_UNNAMED_CLASSES if classes is None else classes):
        allowed = f"0 to {MAX_UNNAMED_CLASSES - 1} without --class_names" if classes is None else f"0 to {classes - 1}, by --class_names"
        raise InputError(f"{source.where(row)}: the label is {label}; allowed: {allowed}.")
    return ids_VT, label


def grid_of(facts: Facts, codebook_size: int, shape: tuple[int, int, int] | None, options: argparse.Namespace) -> Grid:
    """The grid that T tokens make. Raises InputError where they do not."""
    if shape is None:
        side = math.isqrt(facts.tokens)
        if side * side != facts.tokens:
            raise InputError(f"{options.source} has {counted(facts.tokens, 'token')} a view, which is no square; give --height and --width "
                             f"(--height 1 --width {facts.tokens} for tokens that are no grid).")
        shape = (side, side, 1)
    if math.prod(shape) != facts.tokens:
        made_by = f"the tokenizer in {options.tokenizer}" if options.tokenizer else "--height and --width"
        raise InputError(f"{options.source} has {facts.tokens} tokens a view; {' x '.join(map(str, shape))} by {made_by} make {math.prod(shape)}.")
    return Grid(GRID_NAME, codebook_size, *shape)


def make_headers(options: argparse.Namespace, sources: Sequence[ForeignTokens], facts: Sequence[Facts], grid: Grid,
                 names: list[str] | None) -> list[tuple[ShardSetHeader, ForeignTokens, np.ndarray]]:
    """For each split its header, its source, and the rows of the source that it stores."""
    if len(facts) == 2 and facts[0].tokens != facts[1].tokens:
        raise InputError(f"{options.source} has {facts[0].tokens} tokens a view, and {options.validation} has {facts[1].tokens}; both need as many.")
    classes = max(each.classes for each in facts)
    if names is not None and not classes:
        raise InputError(f"--class_names are given, but no row of {options.source} has a label.")
    if names is None and classes:
        names = [str(label) for label in range(classes)]
    if options.tokenizer is not None:
        fingerprint = token_fingerprint_of_tokenizer(options.tokenizer)
    else:
        fingerprint = FOREIGN_PREFIX + (options.token_fingerprint or hashlib.sha256("".join(each.digest for each in facts).encode()).hexdigest())
    fraction = None if len(sources) == 2 else options.validation_fraction or VALIDATION_FRACTION
    rows_of = [np.arange(len(source)) for source in sources] if fraction is None else cut_validation(len(sources[0]), fraction)
    parts = []
    for split, rows, source, each in zip(SPLITS, rows_of, (sources[0], sources[-1]), (facts[0], facts[-1]), strict=True):
        identity = {"imported": source.layout, "name": source.path.name, "rows": len(source), "sha256": each.digest, "validation_fraction": fraction}
        views = [{"name": "original" if each.views == 1 else f"imported {view}"} for view in range(each.views)]
        header = ShardSetHeader(split=split, token_fingerprint=fingerprint, grids=[grid], views=views, class_names=names, dataset=identity,
                                encoding={"imported": source.layout}, images_per_shard=options.images_per_shard, num_sources=len(rows),
                                order_seed=ORDER_SEED)
        parts.append((header, source, rows))
    return parts


def cut_validation(count: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train and to validate on, each in order and at least one: a hash of the row number decides, so that rows added later move none."""
    million = 1_000_000
    hashes_N = np.fromiter((derive_seed("validation", row) % million for row in range(count)), dtype=np.int64, count=count)
    held_out_N = hashes_N < fraction * million
    if not held_out_N.any():
        held_out_N[np.argmin(hashes_N)] = True
    if held_out_N.all():
        held_out_N[np.argmax(hashes_N)] = False
    return np.flatnonzero(~held_out_N), np.flatnonzero(held_out_N)


def check_free(folder: Path, header: ShardSetHeader) -> None:
    """Raise InputError where other shards than the ones to be written lie in the folder."""
    found = None
    if (folder / MANIFEST_NAME).is_file():
        found = TokenShardManifest.load(folder).header.fingerprint
    else:
        sidecars, tars = sorted(folder.glob("shard-*.json")), list(folder.glob("shard-*.tar"))
        if sidecars:
            found = ShardSidecar.load(folder, sidecars[0].with_suffix(".tar").name).header_fingerprint
        elif len(tars) > 1:  # a single one may be ours: a kill can fall between a shard and its sidecar
            found = "not known"
    if found not in (None, header.fingerprint):
        raise InputError(f"{folder} holds other token shards, or those of the same tokens imported with other options; "
                         "remove it, or give another folder with --out.")


def write_split(writer: TokenShardWriter, source: ForeignTokens, rows: np.ndarray, stop: StopFlag) -> None:
    """Write the shards of one split that are not complete already."""
    header = writer.header
    missing = [shard for shard in range(writer.num_shards) if not writer.is_complete(shard)]
    with progress_bar(sum(len(header.source_range(shard)) for shard in missing), 0, header.split, "image") as bar:
        for number in missing:
            with writer.shard(number) as shard:
                for index in header.source_indices(number):
                    if stop.signal:
                        raise Interrupted(stop.signal, f"finished shards are kept in {writer.folder}")
                    row = int(rows[index])
                    ids_VT, label = source.read(row)
                    shard.add(index=index, key=default_key(index), source=source.name(row), label=label, ids={GRID_NAME: ids_VT})
                    bar.update()
