"""Encode the images of a recipe to token shards.

    vqmosaic preprocess digits
    vqmosaic preprocess cifar10 --processes 8

Writes <run_dir>/tokens/train and <run_dir>/tokens/validation. The images are permuted by a recorded seed before they are cut into
shards, because data sets are often stored class by class. Shard s holds the images at positions [s*n, (s+1)*n), whoever writes it, so
any number of processes gives the same bytes, and a run that was killed goes on with the shards that are missing.
"""

import dataclasses
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from pipelines.stages.count_images import count_images
from pipelines.stages.stage_inputs import check_tokenizer_has_ids, tokenizer_folder
from stage1_tokenizer.data.image_sources import ImageSource, ImageSplits, refuse_if_too_many_unreadable
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import IDENTITY, UnreadableImage, View, to_tensor, training_views
from stage1_tokenizer.tokenizer import ImageTokenizer
from token_shards.manifest import MANIFEST_NAME, ORDER_SEED, SPLITS, Grid, ShardSetHeader, TokenShardManifest, shard_name
from token_shards.sidecar import ShardSidecar
from token_shards.writer import ShardInProgress, TokenShardWriter, default_key
from vqmosaic.errors import InputError, listed_names, printable
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.runs.accelerator import held_by_main_process, keep_process_group, set_threads
from vqmosaic.runs.devices import available_cores, default_device
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.runs.launch import check_world_size, run_worker
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.runs.stage_records import StageRecord, judge, load_record, write_record
from vqmosaic.training.tracking import Reporter, progress_bar
from vqmosaic.wording import counted, is_or_are

GRID_NAME = "image"
SOURCE_ORDER = "order of the sources"
"""The name of the permutation in the stage record. Records of version 0.1.0, which did not permute, do not have it."""


def preprocess(recipe: Recipe) -> None:
    """Write the token shards of both splits, from where an earlier call stopped."""
    state = PartialState(cpu=default_device().type == "cpu")
    check_world_size(state.num_processes)
    set_threads(recipe.tokens.threads)  # before anything is computed: the number decides how sums round
    run = RunFolder(Path(recipe.run_dir))
    try:
        with StopFlag() as stop, held_by_main_process(run):
            preprocess_locked(recipe, run, state, stop)
    finally:
        keep_process_group()
        state.destroy_process_group()


def preprocess_locked(recipe: Recipe, run: RunFolder, state: PartialState, stop: StopFlag) -> None:
    """The preprocessing itself, while this process holds the run folder."""
    report, started = Reporter("tokens", state.is_main_process), time.monotonic()
    folder = tokenizer_folder(recipe)
    check_tokenizer_has_ids(recipe, folder)  # again, for a launcher of the user's own
    tokenizer = ImageTokenizer.from_pretrained(folder, state.device)
    check_tokenizer_fits(recipe, tokenizer, folder)
    before = load_record(run, "tokens")
    opened, splits, data_set = stop.wait_or_leave(lambda: recorded_splits(recipe, before, tokenizer), "no shard was started")
    inputs = {"tokenizer": tokenizer.token_fingerprint, "data set": data_set}
    check_same_data(run, recipe, opened)
    if judge(run, recipe, "tokens", inputs) == "skip":
        report(f"finished already: {run.export('tokens')}")
        return
    order_seed = ORDER_SEED
    if before is not None and SOURCE_ORDER not in before.inputs:  # version 0.1.0 began these shards
        order_seed = None
        report("these shards were begun in the order of the data set and are finished in the same order; `--redo tokens` writes them in a "
               "permuted order, which mixes the classes of training batches")
    else:
        inputs[SOURCE_ORDER] = f"seed {order_seed}"
    for note in splits.notes:
        report(f"note: {note}")
    if before is None and splits.class_names != opened.class_names:
        report(f"note: the classes are sorted as text ({listed_names(splits.class_names)}), as in the tokenizer {folder}")
    check_class_order(run, splits)
    if data_set == splits.fingerprint:
        inputs |= splits.unread_input
    state.wait_for_everyone()  # all processes have read the record before it is written again
    if state.is_main_process:
        write_record(run, recipe, "tokens", inputs, finished=False)

    views = training_views(recipe.tokens)
    report.table("plan", {
        "images": f"{len(splits.train):,} x {counted(len(views), 'view')} to train on, {len(splits.validation):,} to validate on ({splits.how})",
        "tokens": f"{' x '.join(map(str, tokenizer.grid_shape))} of {tokenizer.config.codebook_size} codes a view",
        "device": f"{state.device} x {state.num_processes}, float32, {counted(recipe.tokens.threads, 'thread')} each",
    })
    writers = []
    former = data_set != splits.fingerprint  # what vqmosaic 0.1.0 has begun goes on with the identities that it recorded
    for split in split_plans(recipe, tokenizer, splits, state.device, order_seed, former):
        writer = TokenShardWriter(run.export("tokens") / split.header.split, split.header)
        write_split(writer, split, tokenizer, recipe, state, stop, report)
        writers.append(writer)
    state.wait_for_everyone()
    if state.is_main_process:
        for writer in writers:  # all processes' together, before a manifest makes anything complete
            refuse_if_too_many_unreadable(skipped_by_all(writer), writer.header.num_sources, recipe.data)
        for writer in writers:
            manifest = writer.finish()
            report(f"{writer.folder}: {counted(manifest.num_samples, 'image')} in {counted(len(manifest.shards), 'shard')}, "
                   f"{len(manifest.skipped)} skipped")
            for entry in manifest.skipped[:10]:
                report(f"    skipped {printable(entry['source'])}: {entry['reason']}")
            if manifest.skipped:
                report(f"    `vqmosaic audit {run.export('tokens')} --repair` reads them again, and stores those that can be read by then")
        write_record(run, recipe, "tokens", inputs, finished=True, seconds=time.monotonic() - started)
    state.wait_for_everyone()


def recorded_splits(recipe: Recipe, before: StageRecord | None, tokenizer: ImageTokenizer) -> tuple[ImageSplits, ImageSplits, str]:
    """The images as opened, the images in their recorded form, and the fingerprint of the latter.

    Without a record, the second result has the class order of the tokenizer. The fingerprint has the form of the recorded one. Reads some bytes
    of each image.
    """
    opened = open_splits(recipe.data)
    splits = opened.as_recorded(before.inputs) if before is not None else opened.in_order_of(tokenizer.class_names)
    return opened, splits, splits.fingerprint_like(before.inputs.get("data set") if before is not None else None)


def check_same_data(run: RunFolder, recipe: Recipe, splits: ImageSplits) -> None:
    """Raise InputError where this run's own tokenizer was trained on other images than those that are here now."""
    record = load_record(run, "tokenizer") if recipe.tokens.tokenizer is None else None
    recorded = record.inputs.get("data set") if record is not None else None
    if recorded is not None and splits.as_recorded(record.inputs).fingerprint_like(recorded) != recorded:
        raise InputError(f"{run.root}: the data set has changed since the tokenizer was trained on it. Put it back, train anew with "
                         f"--redo tokenizer, or say that this tokenizer is meant with --tokens.tokenizer {run.export('tokenizer')}.")


def check_class_order(run: RunFolder, splits: ImageSplits) -> None:
    """Raise InputError if finished shards have the classes of the data set in another order, because new shards would have other labels."""
    for split in SPLITS:
        folder = run.export("tokens") / split
        recorded = TokenShardManifest.load(folder).class_names if (folder / MANIFEST_NAME).is_file() else None
        names = splits.class_names
        if recorded != names and sorted(recorded or ()) == sorted(names or ()):
            raise InputError(f"{folder}: these tokens have their classes in the order {listed_names(recorded)}, but new tokens would be in the "
                             f"order {listed_names(names)}. Make the tokens and all later stages again with --redo tokens, or use another "
                             "--run_dir.")


@dataclass(frozen=True)
class SplitPlan:
    """What the shards of one split are made from: the same plan gives the same bytes."""

    header: ShardSetHeader
    source: ImageSource
    views: list[View]


def split_plans(recipe: Recipe, tokenizer: ImageTokenizer, splits: ImageSplits, device: torch.device,
                order_seed: int | None = ORDER_SEED, former: bool = False) -> list[SplitPlan]:
    """The plans of the training split, with the views of the recipe, and of the validation split, whose one view is the untouched image.

    `former` makes them with the identities of the data set that vqmosaic 0.1.0 recorded.
    """
    grid = Grid(name=GRID_NAME, codebook_size=tokenizer.config.codebook_size, height=tokenizer.grid_size, width=tokenizer.grid_size,
                depth=tokenizer.config.depth)
    encoding = {"batch_size": recipe.tokens.batch_size, "threads": recipe.tokens.threads, "dtype": "float32", "device": device.type}
    plans = []
    for name, source, views in (("train", splits.train, training_views(recipe.tokens)), ("validation", splits.validation, [IDENTITY])):
        header = ShardSetHeader(
            split=name, token_fingerprint=tokenizer.token_fingerprint, class_names=source.class_names,
            dataset=source.former_identity if former else source.identity, grids=[grid], views=[view.to_dict() for view in views],
            images_per_shard=recipe.tokens.images_per_shard, num_sources=len(source), order_seed=order_seed, encoding=encoding)
        plans.append(SplitPlan(header, source, views))
    return plans


def write_split(writer: TokenShardWriter, split: SplitPlan, tokenizer: ImageTokenizer, recipe: Recipe, state: PartialState, stop: StopFlag,
                report: Reporter) -> None:
    """Write this process's share of one split's shards, leaving out those that are complete already."""
    own = range(state.process_index, writer.num_shards, state.num_processes)
    missing = [shard for shard in own if not writer.is_complete(shard)]
    if len(missing) < len(own):
        report(f"{writer.folder}: {len(own) - len(missing)} of {counted(len(own), 'shard')} {is_or_are(len(own) - len(missing))} complete already")
    skipped: dict[str, str] = {}
    images = sum(len(writer.header.source_range(shard)) for shard in missing)
    with progress_bar(images, 0, writer.header.split, "image", state.is_main_process) as bar:
        for number in missing:
            with writer.shard(number) as shard:
                for _ in fill_shard(shard, number, split, tokenizer, recipe, stop, skipped):
                    bar.update()


def fill_shard(shard: ShardInProgress, number: int, split: SplitPlan, tokenizer: ImageTokenizer, recipe: Recipe, stop: StopFlag,
               skipped: dict[str, str]) -> Iterator[tuple[int, np.ndarray | UnreadableImage]]:
    """Encode the sources of one shard into it. Gives each index with its ids (V, T) when they are stored, or with the reason when it is skipped;
    `skipped` takes source -> reason."""
    source = split.source
    for index, ids_VT in encoded(source, split.header.source_indices(number), split.views, tokenizer, recipe, stop):
        if isinstance(ids_VT, UnreadableImage):
            shard.skip(index=index, source=source.source_name(index), reason=str(ids_VT))
            skipped[source.source_name(index)] = str(ids_VT)
            refuse_if_too_many_unreadable(skipped, len(source), recipe.data)
        else:
            shard.add(index=index, key=default_key(index), source=source.source_name(index), label=source.label(index), ids={GRID_NAME: ids_VT})
        yield index, ids_VT


def skipped_by_all(writer: TokenShardWriter) -> dict[str, str]:
    """Source -> reason of everything that finished shards leave out."""
    sidecars = (ShardSidecar.load(writer.folder, shard_name(shard)) for shard in range(writer.num_shards))
    return {entry["source"]: entry["reason"] for sidecar in sidecars for entry in sidecar.skipped}


def encoded(source: ImageSource, indices: Sequence[int], views: list[View], tokenizer: ImageTokenizer, recipe: Recipe,
            stop: StopFlag) -> Iterator[tuple[int, np.ndarray | UnreadableImage]]:
    """(index, ids (V, T)) for each source in order, or (index, why it cannot be read)."""
    images_per_batch = max(1, recipe.tokens.batch_size // len(views))
    batches = [indices[start:start + images_per_batch] for start in range(0, len(indices), images_per_batch)]
    # beside an encoder that has all cores, a thread would take them from it, and Python's lock between any two of its operations
    has_all_cores = tokenizer.device.type == "cpu" and recipe.tokens.threads >= available_cores()
    coming = decoded(source, batches, views, tokenizer, max(1, recipe.data.workers), 0 if has_all_cores else 2)
    for _ in batches:
        batch, rows_NVCHW, reasons = stop.wait_or_leave(lambda: next(coming), f"finished shards are kept in {Path(recipe.run_dir) / 'tokens'}")
        ids_RT = encode_rows(rows_NVCHW.flatten(0, 1), tokenizer, recipe.tokens.batch_size)  # R rows: each view of each image
        ids_NVT = ids_RT.reshape(len(batch), len(views), -1)
        yield from ((index, ids_VT if reason is None else reason) for index, ids_VT, reason in zip(batch, ids_NVT, reasons, strict=True))


def decoded(source: ImageSource, batches: list[Sequence[int]], views: list[View], tokenizer: ImageTokenizer, threads: int,
            ahead: int) -> Iterator[tuple[Sequence[int], torch.Tensor, list[UnreadableImage | None]]]:
    """For each batch its indices, its rows (N, V, C, H, W) float32, zeros where an image is unreadable, and for each image None or why it is.

    Each thread decodes a part: a task for each image would spend much of what one of 32 pixels takes on the way from thread to thread. They
    are `ahead` batches ahead of the caller. With one thread and none ahead the caller's own thread decodes.
    """
    size, channels = tokenizer.transform.image_size, tokenizer.transform.channels

    def decode(part: Sequence[int], rows_NVCHW: torch.Tensor) -> list[UnreadableImage | None]:
        reasons, pixels = [], {}
        for slot, index in enumerate(part):
            reasons.append(None)
            try:
                pixels[slot] = tokenizer.transform.resize_views(source.read(index), views)
            except UnreadableImage as error:
                reasons[-1] = UnreadableImage(str(error))  # the error itself would keep the frames it passed through, and their images, alive
        if pixels:
            rows_NVCHW.numpy()[list(pixels)] = to_tensor(np.stack(list(pixels.values()))).numpy()  # in numpy, as in to_tensor
        return reasons

    coming: deque[tuple[Sequence[int], torch.Tensor, list[Future]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for batch in [*batches, *[range(0)] * ahead]:  # the empty ones push out the last of the others
            rows_NVCHW = torch.zeros(len(batch), len(views), channels, size, size)
            if threads == 1 and not ahead:
                yield batch, rows_NVCHW, decode(batch, rows_NVCHW)
                continue
            in_part = max(1, -(-len(batch) // threads))
            coming.append((batch, rows_NVCHW, [pool.submit(decode, batch[start:start + in_part], rows_NVCHW[start:start + in_part])
                                               for start in range(0, len(batch), in_part)]))
            if len(coming) > ahead:
                batch, rows_NVCHW, parts = coming.popleft()
                yield batch, rows_NVCHW, [reason for part in parts for reason in part.result()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # do not wait: a thread may be stuck reading a file


def encode_rows(rows_NCHW: torch.Tensor, tokenizer: ImageTokenizer, batch_size: int) -> np.ndarray:
    """Ids (N, T) of images (N, C, H, W), always computed `batch_size` at a time so that the shape cannot change the rounding."""
    missing = -len(rows_NCHW) % batch_size
    filled_NCHW = torch.cat([rows_NCHW, torch.zeros(missing, *rows_NCHW.shape[1:])]) if missing else rows_NCHW
    ids = [tokenizer.encode(piece.to(tokenizer.device)).flatten(1).cpu() for piece in filled_NCHW.split(batch_size)]
    return torch.cat(ids)[:len(rows_NCHW)].numpy()


def check_tokenizer_fits(recipe: Recipe, tokenizer: ImageTokenizer, folder: Path) -> None:
    """Raise InputError where the recipe's images are not of the size the tokenizer was made for."""
    for field in dataclasses.fields(tokenizer.transform):
        given, needed = getattr(recipe.data, field.name, None), getattr(tokenizer.transform, field.name)
        if given is not None and given != needed:
            raise InputError(f"data.{field.name} is {given}, but the tokenizer in {folder} was trained with {needed}; "
                             f"set data.{field.name} to {needed}.")


def main(arguments: list[str]) -> None:
    """Entry point: a recipe and its overrides."""
    preprocess(load_recipe(arguments[0], arguments[1:], count_images=count_images))


if __name__ == "__main__":
    run_worker(main, sys.argv[1:])
