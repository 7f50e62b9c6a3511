"""The images of each training step and of each validation, as float32 batches on the CPU.

The training stream is the concatenation of epoch permutations f(seed, epoch). Step s takes its positions [s*B, (s+1)*B) and each
rank a contiguous slice of them; a sample's augmentation is f(seed, epoch, index). So any step can be computed from its number
alone, whatever the number of workers, and a resumed run sees what an uninterrupted one would have seen.
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
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stage1_tokenizer.data.augmentation import augment, is_augmented
from stage1_tokenizer.data.image_cache import ResizedImages, megabytes
from stage1_tokenizer.data.image_sources import ImageSource, refuse_if_too_many_unreadable
from stage1_tokenizer.image_files.images import ImageTransform, UnreadableImage, to_tensor
from vqmosaic.errors import InputError, printable
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.runs.interruption import EXIT_CODES, StopFlag
from vqmosaic.seeding import derive_seed, generator, permutation

_ATTEMPTS = 100
_PREFETCHED_BATCHES = 4
LONGEST_WAIT_SECONDS = 600
"""Seconds after which a training gives up waiting for the processes that decode its images."""


@dataclass(frozen=True)
class ImageBatch:
    """One rank's images of one training step."""

    images_BCHW: Tensor
    """float32 in [-1, 1], on the CPU."""
    unreadable: list[tuple[str, str]]
    """(source name, reason) of the images that others took the place of in this batch."""


class UpcomingBatch(Iterator[ImageBatch]):
    """An iterator over batches that can wait for its next batch before all processes agree whether to use it."""

    def __init__(self, batches: Iterator[ImageBatch]):
        self._batches = batches
        self._next: ImageBatch | None = None
        self._error: Exception | None = None

    def wait(self, stop: StopFlag) -> None:
        """Wait until the next batch is ready; the first signal ends the wait. An error is stored and raised when the batch is taken."""
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


class _Samples:
    """The map (epoch, index) -> augmented image, in the form that DataLoader sends to its workers."""

    def __init__(self, source: ImageSource, transform: ImageTransform, data: DataConfig, seed: int, kept: ResizedImages | None = None):
        self.source, self.transform, self.data, self.seed, self.kept = source, transform, data, seed, kept

    def __getitem__(self, sample: tuple[int, int]) -> tuple[np.ndarray | None, list[tuple[str, str]]]:
        """uint8 (H, W, C), and the unreadable images met on the way; no image when every substitute was unreadable too."""
        epoch, index = sample
        unreadable = []
        for attempt in range(_ATTEMPTS):
            taken = index if attempt == 0 else derive_seed("substitute", self.seed, epoch, index, attempt) % len(self.source)
            try:
                image = self.kept.read(taken) if self.kept else self.source.read(taken)
            except UnreadableImage as error:
                unreadable.append((self.source.source_name(taken), str(error)))
                continue
            if self.kept and not is_augmented(self.data):
                return image, unreadable
            return augment(image, self.transform, self.data, generator("augment", self.seed, epoch, index)), unreadable
        return None, unreadable

    def batch(self, wanted: list[tuple[int, int]]) -> "_Collated":
        """The collated samples, decoded in this process."""
        if self.kept:
            self.kept.prepare([index for _, index in wanted])
        return _collate([self[sample] for sample in wanted])


class TrainingImages:
    """The endless stream of training batches over one source.

    Where the recipe crops nothing at random and the resized images fit in data.cache_megabytes, each is decoded once, by
    threads, and no worker process is needed. Otherwise data.workers processes decode ahead of the training.
    """

    def __init__(self, source: ImageSource, transform: ImageTransform, data: DataConfig, seed: int):
        self.source, self.transform, self.data, self.seed = source, transform, data, seed
        self.unreadable: dict[str, str] = {}
        """Unreadable images met so far: source name -> reason."""
        # A random crop looks at the original: what was resized for the centre crop could not serve it.
        keeps = data.crop_scale == 1 and megabytes(len(source), transform) <= data.cache_megabytes
        self._kept = ResizedImages(source, transform) if keeps else None
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: permutation(len(source), "order", seed, epoch))

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, position: int) -> tuple[int, int]:
        """(epoch, index in the source) at a position of the stream."""
        epoch, offset = divmod(position, len(self.source))
        return epoch, int(self._order(epoch)[offset])

    def batches(self, first_step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[ImageBatch]:
        """This rank's batches from `first_step` on, without end.

        `batch_size` counts the images of a step over all ranks. Raises InputError when world_size does not divide it, and, from
        the iterator, when more images are unreadable than data.max_unreadable allows. Closing the iterator ends what runs ahead.
        """
        if batch_size % world_size:
            raise InputError(f"batch_size is {batch_size}, for {world_size} processes together; it must be a multiple of their number.")
        return self._batches(first_step, batch_size, rank, batch_size // world_size)

    def _batches(self, first_step: int, batch_size: int, rank: int, share: int) -> Iterator[ImageBatch]:
        def wanted() -> Iterator[list[tuple[int, int]]]:
            start = first_step * batch_size + rank * share
            while True:
                yield [self.sample(position) for position in range(start, start + share)]
                start += batch_size

        samples = _Samples(self.source, self.transform, self.data, self.seed, self._kept)
        workers = 0 if self._kept else self.data.workers
        collated = _from_workers(samples, wanted(), workers) if workers else _from_thread(samples, wanted())
        for pixels_BHWC, unreadable in collated:
            self._note(dict(unreadable))
            if pixels_BHWC is None:
                raise InputError(f"{_ATTEMPTS} images in a row are unreadable, the last one {printable(unreadable[-1][0])} ({unreadable[-1][1]}); "
                                 "`vqmosaic check-data` lists all of them.")
            yield ImageBatch(to_tensor(pixels_BHWC), unreadable)

    def _note(self, unreadable: dict[str, str]) -> None:
        if unreadable.keys() - self.unreadable.keys():
            self.unreadable.update(unreadable)
            refuse_if_too_many_unreadable(self.unreadable, len(self.source), self.data)


_Collated = tuple[np.ndarray | None, list[tuple[str, str]]]


def _collate(samples: list[tuple[np.ndarray | None, list[tuple[str, str]]]]) -> _Collated:
    """uint8 (B, H, W, C), a quarter of what float32 would cost on its way between processes, and the unreadable images.

    An array, because it goes through a pipe. A tensor would go through shared memory, and if /dev/shm is full (64 MB in Docker), the worker's error
    is lost and the training waits for ever.
    """
    unreadable = [entry for _, entries in samples for entry in entries]
    if any(pixels is None for pixels, _ in samples):
        return None, unreadable
    return np.stack([pixels for pixels, _ in samples]), unreadable


def _from_thread(samples: _Samples, wanted: Iterator[list[tuple[int, int]]]) -> Iterator[_Collated]:
    """The batches in the order wanted; a thread makes the next one while the caller works with this one."""
    coming = _in_thread(samples.batch, next(wanted))
    while True:
        batch = coming.result()
        coming = _in_thread(samples.batch, next(wanted))
        try:
            yield batch
        except GeneratorExit:
            wait([coming])  # the caller goes on with other work, which the thread would slow down
            raise


def _in_thread(call: Callable[[Any], Any], argument: Any) -> Future:
    """The future result of call(argument) from a daemon thread. Python does not wait for the thread, which may be stuck reading a file."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(call(argument))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _from_workers(samples: _Samples, wanted: Iterator[list[tuple[int, int]]], workers: int) -> Iterator[_Collated]:
    """The batches in the order wanted; processes make the next few.

    Raises InputError if they give no batch for LONGEST_WAIT_SECONDS, or if one of them was killed.
    """
    # DataLoader draws seeds for its workers, which nothing here uses: a generator of its own keeps it off the global one.
    loader = DataLoader(samples, batch_sampler=wanted, num_workers=workers, collate_fn=_collate, prefetch_factor=_PREFETCHED_BATCHES,
                        worker_init_fn=_leave_signals_to_parent, generator=torch.Generator(), timeout=LONGEST_WAIT_SECONDS)
    others = multiprocessing.active_children()
    running = [iter(loader)]
    processes = [process for process in multiprocessing.active_children() if process not in others]
    # Workers that ignore SIGTERM would outlast multiprocessing's own clean-up at exit: dropping the iterator ends them in order.
    atexit.register(running.clear)
    try:
        while True:
            try:
                batch = next(running[0])
            except RuntimeError as error:
                raise InputError(f"the processes that decode images (data.workers = {workers}) gave no batch: {error}. If the images are on a "
                                 "network file system, check it; if memory is short, lower data.workers. The same command continues from the last "
                                 "checkpoint.") from error
            yield batch
    except GeneratorExit:
        raise
    except BaseException:  # a worker may be stuck, and the loader would wait for it
        _kill(processes)
        raise
    finally:
        for each in running:  # none if Python is exiting
            each._shutdown_workers()  # what dropping the iterator does, also where the traceback of an error still holds it
        running.clear()
        atexit.unregister(running.clear)
        for process in processes:
            process.kill()  # a stuck worker ignores the loader's SIGTERM, and multiprocessing would wait for it at exit


def _kill(processes: list[multiprocessing.Process]) -> None:
    """Kill the workers of a loader, without its SIGCHLD handler, which would raise an error for each of them."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for process in processes:
            process.kill()
            process.join()
    finally:
        signal.signal(signal.SIGCHLD, before)


def _leave_signals_to_parent(worker: int) -> None:
    # Ctrl-C and `timeout` signal the whole process group. The parent finishes its step and saves, for which it needs its workers.
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)


class ValidationImages:
    """The same images at every validation: the first `limit` in an order by a hash of their names.

    A larger limit adds images to those of a smaller one. Unreadable images are left out and named in `unreadable`.
    """

    def __init__(self, source: ImageSource, transform: ImageTransform, limit: int | None = None, *, cache_megabytes: int = 128):
        self.source, self.transform = source, transform
        names = [source.source_name(index) for index in range(len(source))]
        self.indices = sorted(range(len(names)), key=lambda index: derive_seed("validation order", names[index]))[:limit]
        self.unreadable: dict[str, str] = {}
        """Unreadable images met so far: source name -> reason."""
        keeps = megabytes(len(self.indices), transform) <= cache_megabytes
        self._kept = ResizedImages(source, transform) if keeps else None

    def first(self, count: int) -> "ValidationImages":
        """The first `count` of these images; they share what is kept in memory."""
        fewer = copy.copy(self)
        fewer.indices, fewer.unreadable = self.indices[:count], {}
        return fewer

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, int]]:
        """(images_BCHW, B) over this rank's contiguous share, `batch_size` at a time; together the ranks give each image once.

        Shares differ by at most one image, so ranks may differ by one batch: add up over the ranks after the loop, not in it.
        """
        share = self.indices[rank * len(self) // world_size:(rank + 1) * len(self) // world_size]
        for start in range(0, len(share), batch_size):
            pixels_BHWC = self._readable(share[start:start + batch_size])
            if pixels_BHWC:
                yield to_tensor(np.stack(pixels_BHWC)), len(pixels_BHWC)

    def _readable(self, indices: list[int]) -> list[np.ndarray]:
        images = self._kept or ResizedImages(self.source, self.transform)
        images.prepare(indices)
        pixels = []
        for index in indices:
            try:
                pixels.append(images.read(index))
            except UnreadableImage as error:
                self.unreadable[self.source.source_name(index)] = str(error)
        return pixels
