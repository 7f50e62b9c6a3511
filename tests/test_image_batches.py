"""Training batches depend only on seed and step: not on ranks, workers, caching or the step at which training resumes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_tokenizer.data import image_batches
from stage1_tokenizer.data.image_batches import ImageBatch, TrainingImages, ValidationImages
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import ImageTransform
from tests.tiny import ROOT
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import DataConfig

SIZE = 16
COUNT = 23
DATA_FIELDS = {
    "kept": {},
    "kept and augmented": {"flip": True, "shift": 2},
    "decoded each time": {"flip": True, "shift": 2, "cache_megabytes": 0, "workers": 0},
    "random crops": {"crop_scale": 0.6, "flip": True, "workers": 0},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(COUNT):  # the grey level identifies the image, the ramp identifies the view
        ramp = np.linspace(0, 9, 20 * 24).reshape(20, 24)
        Image.fromarray((ramp + number * 10).astype(np.uint8)).save(tmp_path / f"{number:02}.png")
    return tmp_path


def training(folder: Path, seed: int = 0, **fields) -> TrainingImages:
    data = DataConfig(path=str(folder), image_size=SIZE, channels=1, validation_fraction=1e-6, **fields)
    return TrainingImages(open_splits(data).train, ImageTransform(SIZE, 1), data, seed)


def take(stream: TrainingImages, steps: int, first_step: int = 0, batch_size: int = 6, **ranks) -> list[ImageBatch]:
    batches = stream.batches(first_step, batch_size, **ranks)
    taken = [next(batches) for _ in range(steps)]
    batches.close()
    return taken


def images_of(batches: list[ImageBatch]) -> torch.Tensor:
    return torch.cat([batch.images_BCHW for batch in batches])


def levels(images_BCHW: torch.Tensor) -> list[int]:
    """The number of each image, read from its pixels."""
    return [int(((image + 1) * 127.5).mean() // 10) for image in images_BCHW]


@pytest.mark.parametrize("fields", DATA_FIELDS.values(), ids=DATA_FIELDS)
def test_resuming_at_any_step_gives_the_same_batches(folder, fields):
    expected = take(training(folder, **fields), 9)
    assert expected[0].images_BCHW.dtype == torch.float32 and expected[0].images_BCHW.shape == (6, 1, SIZE, SIZE)
    assert images_of(expected).min() >= -1 and images_of(expected).max() <= 1
    for first_step in (1, 3, 4, 8):  # an epoch ends inside step 3
        assert torch.equal(images_of(take(training(folder, **fields), 9 - first_step, first_step)), images_of(expected[first_step:]))
    assert not torch.equal(images_of(take(training(folder, seed=1, **fields), 9)), images_of(expected))


@pytest.mark.parametrize("fields", DATA_FIELDS.values(), ids=DATA_FIELDS)
def test_ranks_split_the_batch_of_a_single_process(folder, fields):
    single_process = images_of(take(training(folder, **fields), 5))
    ranks = [take(training(folder, **fields), 5, rank=rank, world_size=2) for rank in range(2)]
    all_ranks = torch.cat([batch.images_BCHW for step in zip(*ranks, strict=True) for batch in step])
    assert torch.equal(all_ranks, single_process)
    with pytest.raises(InputError, match="multiple"):
        training(folder).batches(0, 6, 0, 4)


def test_batches_do_not_depend_on_workers_and_cache(folder):
    (folder / "05.png").write_bytes(b"junk")
    for fields in ({"crop_scale": 0.6, "flip": True}, {"flip": True, "shift": 1, "cache_megabytes": 0}):
        expected = take(training(folder, workers=0, **fields), 6)
        state = torch.get_rng_state()
        for workers in (1, 2):
            batches = take(training(folder, workers=workers, **fields), 6)
            assert torch.equal(images_of(batches), images_of(expected))
            assert [batch.unreadable for batch in batches] == [batch.unreadable for batch in expected]
        assert torch.equal(torch.get_rng_state(), state), "the global generator is not used"
    assert not multiprocessing.active_children(), "closing the iterator ends the workers"
    cached = take(training(folder, flip=True, shift=1), 6)
    assert torch.equal(images_of(cached), images_of(expected))
    assert [batch.unreadable for batch in cached] == [batch.unreadable for batch in expected]


def test_every_epoch_sees_each_image_once(folder):
    stream = training(folder)
    count = len(stream)
    assert count == COUNT - 1
    seen = levels(images_of(take(stream, 3 * count, batch_size=1)))
    epochs = [seen[epoch * count:(epoch + 1) * count] for epoch in range(3)]
    assert len(set(map(tuple, epochs))) == 3
    assert all(sorted(set(epoch)) == sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    large = take(training(folder), 2, batch_size=2 * count)
    assert levels(images_of(large)) == levels(images_of(take(stream, 4 * count, batch_size=1))), "a batch may span several epochs"


def test_unaugmented_training_images_equal_validation_images(folder):
    stream = training(folder)
    validation = ValidationImages(stream.source, stream.transform)
    images = images_of(take(stream, len(stream), batch_size=1))
    seen = dict(zip(levels(images), images, strict=True))
    for images_BCHW, _ in validation.batches(5):
        for level, image in zip(levels(images_BCHW), images_BCHW, strict=True):
            assert torch.equal(image, seen[level])
    one = stream.transform(stream.source.read(3))
    assert torch.equal(one, seen[levels(one[None])[0]]), "the transform gives the same image"


@pytest.mark.parametrize("fields", [{}, {"cache_megabytes": 0, "workers": 0}], ids=["kept", "decoded"])
def test_corrupt_images_are_replaced_by_other_images(folder, fields):
    stream = training(folder, **fields)
    bad = stream.source.source_name(4)
    healthy = take(stream, 8)
    (folder / bad).write_bytes((folder / bad).read_bytes()[:60])
    stream = training(folder, **fields)
    first_pass, second_pass = take(stream, 8), take(training(folder, **fields), 8)
    assert torch.equal(images_of(first_pass), images_of(second_pass))
    replaced = [not torch.equal(before, after) for before, after in zip(images_of(healthy), images_of(first_pass), strict=True)]
    assert sum(replaced) == sum(len(batch.unreadable) for batch in first_pass) in (2, 3)
    assert {name for batch in first_pass for name, _ in batch.unreadable} == set(stream.unreadable) == {bad}
    assert "truncated" in stream.unreadable[bad]


def test_too_many_unreadable_images_stop_training(folder):
    stream = training(folder, max_unreadable=0.1)
    for index in range(3):
        (folder / stream.source.source_name(index)).write_bytes(b"junk")
    with pytest.raises(InputError, match=r"3 of 22 images are unreadable.*check-data"):
        take(stream, 8)
    for path in folder.iterdir():
        path.write_bytes(b"junk")
    with pytest.raises(InputError, match="100 images in a row"):
        take(training(folder, max_unreadable=1.0), 1)


def test_validation_images_are_fixed_and_split_without_duplicates(folder):
    source = training(folder).source
    (folder / source.source_name(7)).write_bytes(b"junk")
    transform = ImageTransform(SIZE, 1)
    few, all_images = ValidationImages(source, transform, 8), ValidationImages(source, transform, 1000)
    assert few.indices == all_images.indices[:8] and len(few) == 8 and len(all_images) == len(source)
    for images in (all_images, ValidationImages(source, transform, cache_megabytes=0)):
        for _ in range(2):  # the second pass is cached
            single_process = [images_BCHW for images_BCHW, _ in images.batches(5)]
            all_ranks = [images_BCHW for rank in range(3) for images_BCHW, count in images.batches(4, rank, 3) if len(images_BCHW) == count]
            assert torch.equal(torch.cat(single_process), torch.cat(all_ranks)) and len(torch.cat(single_process)) == len(source) - 1
        assert set(images.unreadable) == {source.source_name(7)}
    assert list(ValidationImages(source, transform, 1).batches(4, 1, 3)) == [], "a rank may have no images"


def test_unresponsive_or_killed_workers_stop_training(folder, monkeypatch):
    """A worker may hang, for example on a network file system, or be killed."""
    monkeypatch.setattr(image_batches, "MAX_WAIT_SECONDS", 1)
    for act in (lambda: time.sleep(3), lambda: os.kill(os.getpid(), signal.SIGKILL)):
        stream = training(folder, workers=1, cache_megabytes=0)
        monkeypatch.setattr(stream.source, "read", lambda index, act=act: act())
        batches = stream.batches(0, 6)
        with pytest.raises(InputError, match=r"the processes that decode images \(data.workers = 1\) returned no batch"):
            next(batches)
        batches.close()
    assert not multiprocessing.active_children()


WITHOUT_SHARED_MEMORY = """
import sys
from pathlib import Path
from tests.test_image_batches import take, training
if __name__ == "__main__":
    assert len(take(training(Path(sys.argv[1]), workers=1, cache_megabytes=0), 6, batch_size=1024)) == 6
"""


@pytest.mark.slow
def test_batches_need_no_shared_memory(folder, tmp_path):
    """Docker limits /dev/shm to 64 MB, and workers cannot report that it is full."""
    (tmp_path / "small.py").write_text(WITHOUT_SHARED_MEMORY)
    mount = "mount -t tmpfs -o size=128k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this user may not mount a small /dev/shm")
    run = f"{mount} && {sys.executable} {tmp_path / 'small.py'} {folder}"
    result = subprocess.run(["unshare", "-m", "sh", "-c", run], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                            timeout=60)
    assert result.returncode == 0, result.stderr
