"""Token shards leave as JSON lines, in the layout that 1d-tokenizer trains from and `vqmosaic import-tokens` reads. Loads no torch.

    vqmosaic export-tokens runs/cifar10/tokens/train --out tokens.jsonl
    vqmosaic export-tokens runs/cifar10/tokens/train --out tokens.jsonl --one_view_a_line      # what 1d-tokenizer reads

A line is {"class_id": 3, "tokens": [17, 4, ...]}; of several views tokens is a list of lists, unless each has a line of its own.
The lines are in the order of the data set, not in the order of the shards.
"""

import json
from pathlib import Path

import numpy as np

from token_shards.reader import TokenShardReader
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import publish, temporary_sibling
from vqmosaic.files.full_disks import naming_full_disks
from vqmosaic.runs.interruption import Interrupted, StopFlag
from vqmosaic.training.tracking import progress_bar
from vqmosaic.wording import counted

SAMPLES_AT_A_TIME = 256
ALL_SHARDS = 1_000_000
"""As many shards as their names allow. The reader then keeps the index of every shard, about 24 bytes per sample."""


def export_tokens(folder: Path, out: Path, one_view_a_line: bool = False) -> int:
    """Exit code 0 once the file is there, whole. Raises InputError for an incomplete folder, several grids, or a file that exists."""
    if out.exists():
        raise InputError(f"--out is {str(out)!r}, which exists; give another name, or remove it.")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out is {str(out)!r}, and there is no folder {out.absolute().parent}.")
    reader = TokenShardReader(folder, window_shards=ALL_SHARDS)  # neighbours in the data set lie in different shards
    grids = reader.manifest.grids
    if len(grids) != 1:
        raise InputError(f"{folder} has the grids {', '.join(grid.name for grid in grids)}; the layout of JSON lines has room for one.")
    partial = temporary_sibling(out)
    order, lines = np.argsort(reader.indices_N), 0
    try:
        with naming_full_disks(out.absolute().parent), open(partial, "w", encoding="ascii") as file, \
                StopFlag() as stop, progress_bar(len(reader), 0, "export", "image") as bar:
            for start in range(0, len(reader), SAMPLES_AT_A_TIME):
                if stop.signal:
                    raise Interrupted(stop.signal, f"{out} is not written")
                stop_at = min(start + SAMPLES_AT_A_TIME, len(reader))
                for record in records(reader, order[start:stop_at], one_view_a_line):
                    file.write(json.dumps(record) + "\n")
                    lines += 1
                bar.update(stop_at - start)
        publish(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{out}: {counted(lines, 'line')} of {counted(len(reader), 'image')}, {counted(reader.num_tokens, 'token')} of "
          f"{grids[0].codebook_size:,} codes each ({grids[0].height} x {grids[0].width}{f' x {grids[0].depth}' if grids[0].depth > 1 else ''})")
    return 0


def records(reader: TokenShardReader, samples: np.ndarray, one_view_a_line: bool) -> list[dict]:
    """The content of the lines of these samples."""
    views = [reader.samples(samples, view) for view in range(len(reader.manifest.views))]
    classes = [None if label < 0 else label for label in views[0].labels_B.tolist()]
    ids_VBT = [view.ids_BT.tolist() for view in views]
    if one_view_a_line or len(views) == 1:
        return [{"class_id": label, "tokens": ids_BT[number]} for number, label in enumerate(classes) for ids_BT in ids_VBT]
    return [{"class_id": label, "tokens": [ids_BT[number] for ids_BT in ids_VBT]} for number, label in enumerate(classes)]
