"""Reads and encodes images to token ids, with those of their conditions. Threads decode the next batches while the tokenizers encode one."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from pipelines.stages.condition_grids import ConditionGrid
from stage1_tokenizer.conditions.condition_data import check_complete
from stage1_tokenizer.data.image_sources import ImageSource
from stage1_tokenizer.image_files.images import UnreadableImage, to_tensor
from stage1_tokenizer.image_files.views import View
from stage1_tokenizer.tokenizer_protocol import Tokenizer
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.runs.devices import available_cores
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.wording import counted, is_or_are


def encode_sources(source: ImageSource, indices: Sequence[int], views: list[View], tokenizer: Tokenizer, recipe: Recipe, stop: StopFlag,
                   conditions: Sequence[ConditionGrid] = ()) -> Iterator[tuple[int, np.ndarray | UnreadableImage]]:
    """Yield (index, ids (V, T)) for each source in order, or (index, error) for unreadable ones.

    The ids are those of the tokenizer's grids, then those of the conditions.
    """
    images_per_batch = max(1, recipe.tokens.batch_size // len(views))
    batches = [indices[start:start + images_per_batch] for start in range(0, len(indices), images_per_batch)]
    # if the encoder uses all cores, a decoding thread would compete with it for cores and for the GIL
    has_all_cores = tokenizer.device.type == "cpu" and recipe.tokens.threads >= available_cores()
    decoded = decode_batches(source, batches, views, tokenizer, max(1, recipe.data.workers), 0 if has_all_cores else 2, conditions)
    for _ in batches:
        batch, rows, errors = stop.wait_or_raise(lambda: next(decoded), lambda: describe_kept_shards(Path(recipe.run_dir) / "tokens"))
        encoders = [tokenizer, *(condition.tokenizer for condition in conditions if condition.tokenizer is not None)]
        encoded = iter([encode_rows(rows_NVCHW.flatten(0, 1), encoder, recipe.tokens.batch_size).reshape(len(batch), len(views), -1)
                        for encoder, rows_NVCHW in zip(encoders, rows, strict=True)])  # one row per view of each image
        ids_NVT = np.concatenate([next(encoded), *(next(encoded) if condition.tokenizer is not None else condition.text_ids_of(batch, len(views))
                                                   for condition in conditions)], axis=2)
        yield from ((index, ids_VT if error is None else error) for index, ids_VT, error in zip(batch, ids_NVT, errors, strict=True))


def describe_kept_shards(folder: Path) -> str:
    """How many finished shards of both splits there are in a tokens folder, for the message after an interruption."""
    shards = sum(1 for _ in folder.glob("*/shard-*.json"))  # the sidecar of a shard is written when it is complete
    return f"{counted(shards, 'finished shard')} {is_or_are(shards)} kept in {folder}" if shards else "no shard was finished"


def decode_batches(source: ImageSource, batches: list[Sequence[int]], views: list[View], tokenizer: Tokenizer, threads: int, ahead: int,
                   conditions: Sequence[ConditionGrid] = ()) -> Iterator[tuple[Sequence[int], list[torch.Tensor], list[UnreadableImage | None]]]:
    """Yield the indices of each batch, its rows, and an error or None for each image.

    The rows are float32 (N, V, C, H, W), zeros for unreadable images: those of the images, then those of each image condition.
    Each thread decodes a part of a batch, not one image at a time: for 32-pixel images, passing tasks between threads would take a large part of the
    time. The threads work `ahead` batches ahead of the caller. With one thread and `ahead` 0, the calling thread decodes.
    """
    images = [condition for condition in conditions if condition.tokenizer is not None]
    shapes = [tokenizer.transform.shape, *(condition.tokenizer.transform.shape for condition in images if condition.tokenizer is not None)]

    def decode(part: Sequence[int], rows: Sequence[torch.Tensor]) -> list[UnreadableImage | None]:
        errors: list[UnreadableImage | None] = []
        pixels: dict[int, list[np.ndarray]] = {}
        for position, index in enumerate(part):
            errors.append(None)
            try:
                image = source.read(index)
                view_VHWC = tokenizer.transform.resize_views(image, views)
                check_complete((condition.data for condition in conditions), index)
                pixels[position] = [view_VHWC, *(condition.pixels(index, image.size, view_VHWC, views) for condition in images)]
            except UnreadableImage as error:
                errors[-1] = UnreadableImage(str(error))  # a copy, because the traceback of the original keeps images in memory
        if pixels:
            for rows_NVCHW, same_kind in zip(rows, zip(*pixels.values(), strict=True), strict=True):
                rows_NVCHW.numpy()[list(pixels)] = to_tensor(np.stack(same_kind)).numpy()  # in numpy, as in to_tensor
        return errors

    def empty_rows(batch: Sequence[int]) -> list[torch.Tensor]:
        return [torch.zeros(len(batch), len(views), *shape) for shape in shapes]

    def submit(batch: Sequence[int]) -> tuple[Sequence[int], list[torch.Tensor], list[Future]]:
        rows, part_size = empty_rows(batch), -(-len(batch) // threads)
        return batch, rows, [pool.submit(decode, batch[start:start + part_size], [row[start:start + part_size] for row in rows])
                             for start in range(0, len(batch), part_size)]

    def finish(batch: Sequence[int], rows: list[torch.Tensor], parts: list[Future]) -> tuple[Sequence[int], list[torch.Tensor], list]:
        return batch, rows, [error for part in parts for error in part.result()]

    if threads == 1 and not ahead:
        for batch in batches:
            rows = empty_rows(batch)
            yield batch, rows, decode(batch, rows)
        return
    pending: deque[tuple[Sequence[int], list[torch.Tensor], list[Future]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for batch in batches:
            pending.append(submit(batch))
            if len(pending) > ahead:
                yield finish(*pending.popleft())
        while pending:
            yield finish(*pending.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # do not wait: a thread may be stuck reading a file


def encode_rows(rows_NCHW: torch.Tensor, tokenizer: Tokenizer, batch_size: int) -> np.ndarray:
    """Ids (N, T) of all grids of images (N, C, H, W). Every batch is padded to `batch_size`, because rounding may depend on the batch shape."""
    padding = -len(rows_NCHW) % batch_size
    padded_NCHW = torch.cat([rows_NCHW, torch.zeros(padding, *rows_NCHW.shape[1:])]) if padding else rows_NCHW
    ids = [tokenizer.join_tokens(tokenizer.encode_grids(piece.to(tokenizer.device))).cpu() for piece in padded_NCHW.split(batch_size)]
    return torch.cat(ids)[:len(rows_NCHW)].numpy()
