"""The training stream is arithmetic: whatever the ranks, the workers and the point of resume, each step sees the same images."""

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
RECIPES = {
    "kept": {},
    "kept and augmented": {"flip": True, "shift": 2},
    "decoded each time": {"flip": True, "shift": 2, "cache_megabytes": 0, "workers": 0},
    "random crops": {"crop_scale": 0.6, "flip": True, "workers": 0},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(COUNT):  # the level tells which image it is, the ramp which view
        ramp = np.linspace(0, 9, 20 * 24).reshape(20, 24)
        Image.fromarray((ramp + number * 10).astype(np.uint8)).save(tmp_path / f"{number:02}.png")
    return tmp_path


def training(folder: Path, seed: int = 0, **fields) -> TrainingImages:
    data = DataConfig(path=str(folder), image_size=SIZE, channels=1, validation_fraction=1e-6, **fields)
    return TrainingImages(open_splits(data).train, ImageTransform(SIZE, 1), data, seed)


def take(stream: TrainingImages, steps: int, first_step: int = 0, batch_size: int = 6, **where) -> list[ImageBatch]:
    batches = stream.batches(first_step, batch_size, **where)
    taken = [next(batches) for _ in range(steps)]
    batches.close()
    return taken


def images_of(batches: list[ImageBatch]) -> torch.Tensor:
    return torch.cat([batch.images_BCHW for batch in batches])


def levels(images_BCHW: torch.Tensor) -> list[int]:
    """The number of each image, read from its pixels."""
    return [int(((image + 1) * 127.5).mean() // 10) for image in images_BCHW]


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_any_resume_point_gives_the_same_batches(folder, fields):
    whole = take(training(folder, **fields), 9)
    assert whole[0].images_BCHW.dtype == torch.float32 and whole[0].images_BCHW.shape == (6, 1, SIZE, SIZE)
    assert images_of(whole).min() >= -1 and images_of(whole).max() <= 1
    for first_step in (1, 3, 4, 8):  # an epoch ends inside step 3
        assert torch.equal(images_of(take(training(folder, **fields), 9 - first_step, first_step)), images_of(whole[first_step:]))
    assert not torch.equal(images_of(take(training(folder, seed=1, **fields), 9)), images_of(whole))


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_ranks_share_the_batch_of_one(folder, fields):
    alone = images_of(take(training(folder, **fields), 5))
    ranks = [take(training(folder, **fields), 5, rank=rank, world_size=2) for rank in range(2)]
    together = torch.cat([batch.images_BCHW for step in zip(*ranks, strict=True) for batch in step])
    assert torch.equal(together, alone)
    with pytest.raises(InputError, match="multiple"):
        training(folder).batches(0, 6, 0, 4)


def test_workers_and_memory_change_nothing(folder):
    (folder / "05.png").write_bytes(b"junk")
    for fields in ({"crop_scale": 0.6, "flip": True}, {"flip": True, "shift": 1, "cache_megabytes": 0}):
        expected = take(training(folder, workers=0, **fields), 6)
        state = torch.get_rng_state()
        for workers in (1, 2):
            batches = take(training(folder, workers=workers, **fields), 6)
            assert torch.equal(images_of(batches), images_of(expected))
            assert [batch.unreadable for batch in batches] == [batch.unreadable for batch in expected]
        assert torch.equal(torch.get_rng_state(), state), "nothing global is seeded or drawn from"
    assert not multiprocessing.active_children(), "closing the iterator ends the workers"
    kept = take(training(folder, flip=True, shift=1), 6)
    assert torch.equal(images_of(kept), images_of(expected))
    assert [batch.unreadable for batch in kept] == [batch.unreadable for batch in expected]


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


def test_training_without_augmentation_sees_what_validation_sees(folder):
    stream = training(folder)
    validation = ValidationImages(stream.source, stream.transform)
    images = images_of(take(stream, len(stream), batch_size=1))
    seen = dict(zip(levels(images), images, strict=True))
    for images_BCHW, _ in validation.batches(5):
        for level, image in zip(levels(images_BCHW), images_BCHW, strict=True):
            assert torch.equal(image, seen[level])
    one = stream.transform(stream.source.read(3))
    assert torch.equal(one, seen[levels(one[None])[0]]), "and what the pipeline sees"


@pytest.mark.parametrize("fields", [{}, {"cache_megabytes": 0, "workers": 0}], ids=["kept", "decoded"])
def test_another_image_takes_the_place_of_a_corrupt_one(folder, fields):
    stream = training(folder, **fields)
    bad = stream.source.source_name(4)
    healthy = take(stream, 8)
    (folder / bad).write_bytes((folder / bad).read_bytes()[:60])
    stream = training(folder, **fields)
    once, again = take(stream, 8), take(training(folder, **fields), 8)
    assert torch.equal(images_of(once), images_of(again))
    replaced = [not torch.equal(before, after) for before, after in zip(images_of(healthy), images_of(once), strict=True)]
    assert sum(replaced) == sum(len(batch.unreadable) for batch in once) in (2, 3)
    assert {name for batch in once for name, _ in batch.unreadable} == set(stream.unreadable) == {bad}
    assert "truncated" in stream.unreadable[bad]


def test_past_the_limit_the_run_stops(folder):
    stream = training(folder, max_unreadable=0.1)
    for index in range(3):
        (folder / stream.source.source_name(index)).write_bytes(b"junk")
    with pytest.raises(InputError, match=r"3 of 22 images are unreadable.*check-data"):
        take(stream, 8)
    for path in folder.iterdir():
        path.write_bytes(b"junk")
    with pytest.raises(InputError, match="100 images in a row"):
        take(training(folder, max_unreadable=1.0), 1)


def test_validation_images_are_fixed_and_shared_without_duplicates(folder):
    source = training(folder).source
    (folder / source.source_name(7)).write_bytes(b"junk")
    transform = ImageTransform(SIZE, 1)
    few, every = ValidationImages(source, transform, 8), ValidationImages(source, transform, 1000)
    assert few.indices == every.indices[:8] and len(few) == 8 and len(every) == len(source)
    for images in (every, ValidationImages(source, transform, cache_megabytes=0)):
        for _ in range(2):  # the second time from memory
            alone = [images_BCHW for images_BCHW, _ in images.batches(5)]
            shares = [images_BCHW for rank in range(3) for images_BCHW, count in images.batches(4, rank, 3) if len(images_BCHW) == count]
            assert torch.equal(torch.cat(alone), torch.cat(shares)) and len(torch.cat(alone)) == len(source) - 1
        assert set(images.unreadable) == {source.source_name(7)}
    assert list(ValidationImages(source, transform, 1).batches(4, 1, 3)) == [], "a rank may have no share"


def test_workers_that_give_nothing_end_the_training_with_words(folder, monkeypatch):
    """As when a network file system hangs. A worker that is killed ends it at once."""
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
    """Docker gives /dev/shm 64 MB; a worker that finds it full cannot tell."""
    (tmp_path / "small.py").write_text(WITHOUT_SHARED_MEMORY)
    mount = "mount -t tmpfs -o size=128k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this user may not mount a small /dev/shm")
    run = f"{mount} && {sys.executable} {tmp_path / 'small.py'} {folder}"
    result = subprocess.run(["unshare", "-m", "sh", "-c", run], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                            timeout=60)
    assert result.returncode == 0, result.stderr
