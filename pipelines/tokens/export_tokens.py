"""Exports token shards as JSON lines, the format that 1d-tokenizer trains on and `vqmosaic import-tokens` reads. Does not load torch.

    vqmosaic export-tokens runs/cifar10/tokens/train --out tokens.jsonl
    vqmosaic export-tokens runs/cifar10/tokens/train --out tokens.jsonl --one_view_a_line      # the format that 1d-tokenizer reads
    vqmosaic export-tokens tokens/train --grid low --out tokens.jsonl                          # one of several grids

A line is {"class_id": 3, "tokens": [17, 4, ...]}. If an image has several views, "tokens" is a list of lists, one for each view.
If the shards have several grids, "tokens" has those of all grids, in the order of the manifest, and each grid's own ids start at 0.
--one_view_a_line writes each view on a separate line. The lines are in the order of the data set, not in the order of the shards.
"""

import json
from pathlib import Path

import numpy as np

from token_shards.manifest import describe_grids, grid_columns
from token_shards.reader import TokenShardReader
from vqmosaic.errors import InputError, check_name
from vqmosaic.files.durable_files import publish, temporary_sibling
from vqmosaic.files.full_disks import explain_full_disk
from vqmosaic.runs.interruption import Interrupted, StopFlag
from vqmosaic.training.tracking import progress_bar
from vqmosaic.wording import counted

SAMPLES_PER_READ = 256
MAX_SHARDS = 1_000_000
"""The largest number of shards that shard names allow. The reader keeps the index of every shard, about 24 bytes per sample."""


def export_tokens(folder: Path, out: Path, one_view_a_line: bool = False, grid_name: str | None = None) -> int:
    """Write the ids of all grids, or of one, to the file `out` and return exit code 0.

    Raises InputError if the folder is incomplete, if it has no such grid, or if `out` exists.
    """
    if out.exists():
        raise InputError(f"--out is {str(out)!r}, which exists; give another name, or remove it.")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out is {str(out)!r}, but the folder {out.absolute().parent} does not exist.")
    reader = TokenShardReader(folder, window_shards=MAX_SHARDS)  # neighbours in the data set are in different shards
    grids = reader.manifest.grids
    columns = slice(None)
    if grid_name is not None:
        check_name("--grid", grid_name, [grid.name for grid in grids])
        columns = grid_columns(grids)[grid_name]
        grids = [grid for grid in grids if grid.name == grid_name]
    partial = temporary_sibling(out)
    order, lines = np.argsort(reader.indices_N), 0
    try:
        with explain_full_disk(out.absolute().parent), open(partial, "w", encoding="ascii") as file, \
                StopFlag() as stop, progress_bar(len(reader), 0, "export", "image") as bar:
            for start in range(0, len(reader), SAMPLES_PER_READ):
                if stop.signal:
                    raise Interrupted(stop.signal, f"{out} was not written")
                end = min(start + SAMPLES_PER_READ, len(reader))
                for record in make_records(reader, order[start:end], one_view_a_line, columns):
                    file.write(json.dumps(record) + "\n")
                    lines += 1
                bar.update(end - start)
        publish(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{out}: {counted(lines, 'line')} for {counted(len(reader), 'image')}, {counted(sum(grid.num_tokens for grid in grids), 'token')} each "
          f"({describe_grids(grids)})")
    return 0


def make_records(reader: TokenShardReader, samples: np.ndarray, one_view_a_line: bool, columns: slice) -> list[dict]:
    """The JSON content of the lines for these samples, with these columns of their ids."""
    views = [reader.samples(samples, view) for view in range(len(reader.manifest.views))]
    classes = [None if label < 0 else label for label in views[0].labels_B.tolist()]
    ids_VBT = [view.ids_BT[:, columns].tolist() for view in views]
    if one_view_a_line or len(views) == 1:
        return [{"class_id": label, "tokens": ids_BT[number]} for number, label in enumerate(classes) for ids_BT in ids_VBT]
    return [{"class_id": label, "tokens": [ids_BT[number] for ids_BT in ids_VBT]} for number, label in enumerate(classes)]
