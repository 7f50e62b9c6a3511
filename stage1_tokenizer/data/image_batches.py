"""Batches of images for training and validation, as float32 tensors on the CPU.

The training stream is a sequence of epochs. Each epoch is a permutation of the images that depends only on the seed and the epoch. With batch size
B, step s uses the positions [s*B, (s+1)*B) of the stream, and each rank a contiguous slice of them. The augmentation of an image depends only on the
seed, the epoch and the image. So a batch depends on the number of its step, not on the number of workers, and a resumed run sees the same images as
an uninterrupted one.
"""

import atexit
import copy
import functools
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from stage1_tokenizer.data.augmentation import augment, is_augmented
from stage1_tokenizer.data.image_cache import ResizedImages, resized_megabytes
from stage1_tokenizer.data.image_sources import ImageSource, refuse_if_too_many_unreadable
from stage1_tokenizer.image_files.images import ImageTransform, UnreadableImage, to_tensor
from vqmosaic.errors import InputError, printable
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.runs.interruption import EXIT_CODES, StopFlag
from vqmosaic.seeding import derive_seed, generator, permutation

_MAX_ATTEMPTS = 100
"""Images to try for one sample: its own, then random substitutes while they are unreadable."""
_PREFETCHED_BATCHES = 4
"""Batches that each worker process decodes ahead of training."""
MAX_WAIT_SECONDS = 600
"""The longest time that training waits for a batch from the processes that decode images."""
MAX_CLOSE_SECONDS = 2
"""The longest time to wait for a thread that decodes images when nobody needs them. It may be stuck reading a file."""


@dataclass(frozen=True)
class ImageBatch:
    """One rank's images of one training step."""

    images_BCHW: Tensor
    """float32 in [-1, 1], on the CPU."""
    unreadable: list[tuple[str, str]]
    """(source name, reason) of the unreadable images that were replaced by others in this batch."""


class UpcomingBatch(Iterator[ImageBatch]):
    """An iterator over batches whose wait() decodes the next batch without returning it.

    A signal may reach only one process, and ends the wait there. All processes then agree whether to stop, before any of them takes the batch.
    """

    def __init__(self, batches: Iterator[ImageBatch]):
        self._batches = batches
        self._next: ImageBatch | None = None
        self._error: Exception | None = None

    def wait(self, stop: StopFlag) -> None:
        """Wait until the next batch is ready or a signal arrives. An error is stored, and raised by next()."""
        if self._next is None and self._error is None:
            try:
                self._next = stop.wait_for(lambda: next(self._batches))
            except Exception as error:
                self._error = error

    def __next__(self) -> ImageBatch:
        if self._error is not None:
            raise self._error
        batch, self._next = self._next, None
        return next(self._batches) if batch is None else batch


class _Samples(Dataset[tuple[np.ndarray | None, list[tuple[str, str]]]]):
    """A map-style data set for DataLoader: (epoch, index in the source) -> augmented image."""

    def __init__(self, source: ImageSource, transform: ImageTransform, data: DataConfig, seed: int, cache: ResizedImages | None = None):
        self.source, self.transform, self.data, self.seed, self.cache = source, transform, data, seed, cache

    def __getitem__(self, sample: tuple[int, int]) -> tuple[np.ndarray | None, list[tuple[str, str]]]:
        """The image (H, W, C), uint8 or float32, and (source name, reason) of the unreadable images that were tried before it.

        The image is None if all substitutes are unreadable too.
        """
        epoch, index = sample
        unreadable = []
        for attempt in range(_MAX_ATTEMPTS):
            candidate = index if attempt == 0 else derive_seed("substitute", self.seed, epoch, index, attempt) % len(self.source)
            try:
                image = self.cache.read(candidate) if self.cache else self.source.read(candidate)
            except UnreadableImage as error:
                unreadable.append((self.source.source_name(candidate), str(error)))
                continue
            if isinstance(image, np.ndarray) and not is_augmented(self.data):
                return self.transform.derive(image), unreadable
            return augment(image, self.transform, self.data, generator("augment", self.seed, epoch, index)), unreadable
        return None, unreadable

    def decode_batch(self, samples: list[tuple[int, int]]) -> "_Collated":
        """The collated samples. Decodes them in this process, with several threads if there is a cache."""
        if self.cache:
            self.cache.prepare([index for _, index in samples])
        return _collate([self[sample] for sample in samples])


class TrainingImages:
    """The endless stream of training batches over one source.

    If the recipe has no random crops and the resized images fit in data.cache_megabytes, threads decode each image once, and no worker process
    is needed. Otherwise, data.workers processes decode images ahead of training.
    """

    def __init__(self, source: ImageSource, transform: ImageTransform, data: DataConfig, seed: int):
        self.source, self.transform, self.data, self.seed = source, transform, data, seed
        self.unreadable: dict[str, str] = {}
        """Unreadable images found so far: source name -> reason."""
        # Random crops need the original images. The cache only has those resized for the centre crop.
        is_cached = data.crop_scale == 1 and resized_megabytes(len(source), transform.base) <= data.cache_megabytes
        self._cache = ResizedImages(source, transform.base) if is_cached else None
        # The permutation of an epoch. A batch may need those of two epochs.
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: permutation(len(source), "order", seed, epoch))

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, position: int) -> tuple[int, int]:
        """(epoch, index in the source) of the sample at a position of the stream."""
        epoch, offset = divmod(position, len(self.source))
        return epoch, int(self._order(epoch)[offset])

    def batches(self, first_step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[ImageBatch]:
        """This rank's batches from `first_step` on, without end.

        `batch_size` is the number of images in a step, over all ranks. Raises InputError if world_size does not divide it. The iterator raises
        InputError if more images are unreadable than data.max_unreadable allows. Closing the iterator stops the threads or processes that decode.
        """
        if batch_size % world_size:
            raise InputError(f"batch_size {batch_size} is not divisible by {world_size} processes. Use a multiple of {world_size}.")
        # A separate generator, so that this error is raised now and not at the first next().
        return self._batches(first_step, batch_size, rank, batch_size // world_size)

    def _batches(self, first_step: int, batch_size: int, rank: int, rank_batch_size: int) -> Iterator[ImageBatch]:
        def sample_lists() -> Iterator[list[tuple[int, int]]]:
            """The (epoch, index) pairs of each of this rank's batches."""
            start = first_step * batch_size + rank * rank_batch_size
            while True:
                yield [self.sample(position) for position in range(start, start + rank_batch_size)]
                start += batch_size

        samples = _Samples(self.source, self.transform, self.data, self.seed, self._cache)
        workers = 0 if self._cache else self.data.workers
        collated = _from_workers(samples, sample_lists(), workers) if workers else _from_thread(samples, sample_lists())
        for pixels_BHWC, unreadable in collated:
            self._add_unreadable(dict(unreadable))
            if pixels_BHWC is None:
                raise InputError(f"{_MAX_ATTEMPTS} images in a row are unreadable, the last one {printable(unreadable[-1][0])} "
                                 f"({unreadable[-1][1]}); `vqmosaic check-data` lists all of them.")
            yield ImageBatch(to_tensor(pixels_BHWC), unreadable)

    def _add_unreadable(self, unreadable: dict[str, str]) -> None:
        """Record unreadable images. Raises InputError if there are more than data.max_unreadable allows."""
        if unreadable.keys() - self.unreadable.keys():
            self.unreadable.update(unreadable)
            refuse_if_too_many_unreadable(self.unreadable, len(self.source), self.data)


_Collated = tuple[np.ndarray | None, list[tuple[str, str]]]
"""Images (B, H, W, C), uint8 or float32, and (source name, reason) of the unreadable ones. The images are None if one has no readable substitute."""


def _collate(samples: list[tuple[np.ndarray | None, list[tuple[str, str]]]]) -> _Collated:
    """Stack the results of _Samples.

    8-bit pixels stay uint8, because float32 would send four times as many bytes between processes. They are an array because arrays go through a
    pipe. A tensor would go through shared memory, and if /dev/shm is full (64 MB in Docker), the worker's error is lost and training waits forever.
    """
    unreadable = [entry for _, entries in samples for entry in entries]
    readable = [pixels for pixels, _ in samples if pixels is not None]
    return (np.stack(readable) if len(readable) == len(samples) else None), unreadable


def _from_thread(samples: _Samples, sample_lists: Iterator[list[tuple[int, int]]]) -> Iterator[_Collated]:
    """One batch per list of samples, in order. A thread prepares the next batch while the caller uses the current one."""
    upcoming = _run_in_thread(samples.decode_batch, next(sample_lists))
    while True:
        batch = upcoming.result()
        upcoming = _run_in_thread(samples.decode_batch, next(sample_lists))
        try:
            yield batch
        except GeneratorExit:
            wait([upcoming], timeout=MAX_CLOSE_SECONDS)  # otherwise the thread would slow down what the caller does next
            raise


def _run_in_thread(call: Callable[[Any], Any], argument: Any) -> Future[Any]:
    """Start call(argument) in a thread and return its future. The thread may get stuck in reading a file, so it is a daemon: Python does not wait
    for it at exit."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call(argument))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _from_workers(samples: _Samples, sample_lists: Iterator[list[tuple[int, int]]], workers: int) -> Iterator[_Collated]:
    """One batch per list of samples, in order. Worker processes prepare the next few.

    Raises InputError if the workers return no batch for MAX_WAIT_SECONDS, or if one of them was killed.
    """
    # DataLoader draws seeds for its workers, which nothing here uses. Give it a generator, so that it does not draw from the global one.
    loader = DataLoader(samples, batch_sampler=sample_lists, num_workers=workers, collate_fn=_collate, prefetch_factor=_PREFETCHED_BATCHES,
                        worker_init_fn=_leave_signals_to_parent, generator=torch.Generator(), timeout=MAX_WAIT_SECONDS)
    earlier_children = multiprocessing.active_children()
    # a list, so that the function registered for exit can drop the iterator
    iterators = [cast(_MultiProcessingDataLoaderIter, iter(loader))]  # its type if num_workers > 0
    processes = [process for process in multiprocessing.active_children() if process not in earlier_children]
    # The workers ignore SIGTERM, so multiprocessing cannot end them at exit. Dropping the iterator shuts them down.
    atexit.register(iterators.clear)
    try:
        while True:
            try:
                batch = next(iterators[0])
            except RuntimeError as error:
                raise InputError(f"the processes that decode images (data.workers = {workers}) returned no batch: {error}. If the images are on a "
                                 "network file system, check it. If memory is short, lower data.workers. The same command continues from the last "
                                 "checkpoint.") from error
            yield batch
    except BaseException:  # the caller closed the iterator, or there was an error; a worker may be stuck, and the loader would wait for it
        _kill(processes)
        raise
    finally:
        for iterator in iterators:  # the list is empty if Python is exiting
            iterator._shutdown_workers()  # dropping the iterator does the same, but the traceback of an error may still refer to it
        iterators.clear()
        atexit.unregister(iterators.clear)
        for process in processes:
            process.kill()  # a stuck worker ignores the loader's SIGTERM, and multiprocessing would wait for it at exit


def _kill(processes: list[BaseProcess]) -> None:
    """Kill the workers of a DataLoader, with its SIGCHLD handler disabled, which would raise an error for each killed worker.

    Does nothing outside of the main thread, because only the main thread can change signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for process in processes:
            process.kill()
            process.join()
    finally:
        signal.signal(signal.SIGCHLD, before)


def _leave_signals_to_parent(worker: int) -> None:
    """Let a worker ignore signals. Ctrl-C and `timeout` signal the whole process group, but the parent still needs the workers to finish its step."""
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)


class ValidationImages:
    """The same images at every validation: the first `limit` of the source, in the order of a hash of their names.

    A larger limit adds images to those of a smaller limit. Unreadable images are skipped and listed in `unreadable`.
    """

    def __init__(self, source: ImageSource, transform: ImageTransform, limit: int | None = None, *, cache_megabytes: int = 128):
        self.source, self.transform = source, transform
        names = [source.source_name(index) for index in range(len(source))]
        self.indices = sorted(range(len(names)), key=lambda index: derive_seed("validation order", names[index]))[:limit]
        self.unreadable: dict[str, str] = {}
        """Unreadable images found so far: source name -> reason."""
        is_cached = resized_megabytes(len(self.indices), transform) <= cache_megabytes
        self._cache = ResizedImages(source, transform) if is_cached else None

    def first(self, count: int) -> "ValidationImages":
        """The first `count` of these images. They share the cache."""
        fewer = copy.copy(self)
        fewer.indices, fewer.unreadable = self.indices[:count], {}
        return fewer

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, int]]:
        """Yield this rank's images as pairs (images_BCHW, B), with at most `batch_size` images each. B is smaller where images are unreadable.

        Each rank has a contiguous share of the images. The shares differ by at most one image, so ranks may differ by one batch. Reduce over the
        ranks after the loop, not inside it.
        """
        share = self.indices[rank * len(self) // world_size:(rank + 1) * len(self) // world_size]
        for start in range(0, len(share), batch_size):
            images_HWC = self._read(share[start:start + batch_size])
            if images_HWC:
                yield to_tensor(np.stack(images_HWC)), len(images_HWC)

    def _read(self, indices: list[int]) -> list[np.ndarray]:
        """The readable images among these (H, W, C). Records the others in `unreadable`."""
        images = self._cache or ResizedImages(self.source, self.transform)  # without a cache, a temporary one decodes in several threads
        images.prepare(indices)
        pixels = []
        for index in indices:
            try:
                pixels.append(images.read(index))
            except UnreadableImage as error:
                self.unreadable[self.source.source_name(index)] = str(error)
        return pixels
