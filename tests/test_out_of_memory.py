"""Batches that do not fit into memory: they are split, the images stay the same, and messages say what to change. Memory is never really short."""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines import ImageGenerationPipeline
from pipelines.generation_output import GenerationOutput
from stage1_tokenizer import ImageTokenizer, decode_tiled, encode_tiled
from stage2_prior import train as train_module
from stage2_prior.prior import TokenPrior
from tests.conditioned import make_parts
from tests.editing import box_mask, make_pipe, random_image
from tests.tiny import tiny_recipe
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import PriorTrainingConfig
from vqmosaic.recipes.tokenizer_sections import TokenizerTrainingConfig
from vqmosaic.runs.launch import exit_code_of
from vqmosaic.runs.out_of_memory import FittingBatches, is_out_of_memory, ranges
from vqmosaic.training.training_loop import describe_too_large_step

CPU = torch.device("cpu")
MOST = 2
"""The most images that fit at a time in these tests."""


def limited(method, count=lambda argument: len(argument)):
    """A method that runs out of memory if it gets more than MOST images."""
    def with_limit(self, argument, *arguments, **keywords):
        if count(argument) > MOST:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return method(self, argument, *arguments, **keywords)
    return with_limit


def limit_tokenizer(monkeypatch) -> None:
    monkeypatch.setattr(ImageTokenizer, "encode_grids", limited(ImageTokenizer.encode_grids))
    monkeypatch.setattr(ImageTokenizer, "decode_grids", limited(ImageTokenizer.decode_grids, lambda ids: len(ids["image"])))


def limit_prior(monkeypatch) -> None:
    sample, nll = TokenPrior.sample, TokenPrior.forward

    def with_limit(self, class_indices, sampling, seeds, *arguments, **keywords):
        if len(seeds) > MOST:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return sample(self, class_indices, sampling, seeds, *arguments, **keywords)

    monkeypatch.setattr(TokenPrior, "sample", with_limit)
    monkeypatch.setattr(TokenPrior, "forward", limited(nll))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> ImageGenerationPipeline:
    return make_pipe(tmp_path_factory.mktemp("pipe") / "tokenizer", steps=3)


# --- splitting ---------------------------------------------------------------------------------------------------------------


def test_batches_are_halved_until_they_fit_and_stay_small():
    attempts = []

    def compute(part: range) -> list[int]:
        attempts.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return list(part)

    with pytest.warns(UserWarning, match="does not fit into the memory") as found:
        results = list(FittingBatches(CPU, "batch_size").run(ranges(19, 8), compute))
    assert attempts == [8, 4, *[2] * 8, 2, 1]
    assert [number for part, _ in results for number in part] == [number for _, result in results for number in result] == list(range(19))
    assert "a batch of 8 images does not fit" in str(found[0].message) and "Give batch_size=4 to begin with it" in str(found[0].message)
    assert "Continuing with batches of 2" in str(found[1].message) and len(found) == 2
    assert "GiB free" in str(found[0].message)


def test_batches_that_fit_are_not_split():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [part for part, _ in FittingBatches(CPU).run(ranges(10, 4), list)] == [range(4), range(4, 8), range(8, 10)]


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True),
    (np.exceptions.AxisError("x"), False), (ValueError("out of memory"), False), (RuntimeError("shapes differ"), False),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."), True),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
], ids=lambda value: repr(value)[:40])
def test_errors_for_too_little_memory_are_recognized(error, expected):
    assert is_out_of_memory(error) is expected


def test_real_error_of_the_cpu_allocator_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_single_image_that_does_not_fit_is_an_error_and_other_errors_pass():
    def compute(part: range) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UserWarning), pytest.raises(InputError, match=r"one image does not fit into the memory of this machine .*another device"):
        list(FittingBatches(CPU).run(ranges(4, 4), compute))
    with pytest.raises(ZeroDivisionError):
        list(FittingBatches(CPU).run(ranges(4, 4), lambda part: 1 // 0))


# --- pipelines ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:a batch of")
def test_images_are_the_same_in_smaller_batches(pipe, monkeypatch):
    expected = pipe(["ant", "bee"], num_images_per_label=4, seed=1)
    limit_prior(monkeypatch)
    reports = []
    out = pipe(["ant", "bee"], num_images_per_label=4, seed=1, callback=lambda done, total: reports.append((done, total)))
    assert torch.equal(out.token_ids, expected.token_ids) and out.seeds == expected.seeds and len(out.images) == 8
    assert reports[-1] == (16, 16) and [done for done, _ in reports] == sorted(done for done, _ in reports)
    batches = list(pipe.batches(["ant", "bee"], 4, 1, batch_size=5, skip=lambda positions: positions.start == 0))
    assert [batch.places for batch in batches] == [range(5, 6), range(6, 7), range(7, 8)]
    assert torch.equal(torch.cat([batch.token_ids for batch in batches]), expected.token_ids[5:])


@pytest.mark.filterwarnings("ignore:a batch of")
def test_every_method_splits_its_batches(pipe, monkeypatch, tmp_path):
    images, mask = [random_image(pipe, seed) for seed in range(5)], box_mask(pipe, 4, 4, 8, 8)
    conditioned = ImageGenerationPipeline.from_pretrained(make_parts(tmp_path, class_drop=0.1).bundle(tmp_path / "pipeline"), "cpu")
    methods = {
        "encode": lambda: pipe.encode(images),
        "decode": lambda: pipe.decode(torch.arange(5 * 16).view(5, 4, 4) % 16),
        "reconstruct": lambda: pipe.reconstruct(images),
        "score": lambda: pipe.score(images).bits,
        "inpaint": lambda: pipe.inpaint(images, mask, seed=1, num_tries=2),
        "outpaint": lambda: pipe.outpaint([image.crop((0, 0, 8, 8)) for image in images], (0, 0, 8, 8), seed=1),
        "complete": lambda: pipe.complete(images, seed=1),
        "variations": lambda: pipe.variations(images, seed=1),
        "edit_batches": lambda: joined(pipe.edit_batches(images, keep="top", num_images_per_label=2, seed=1)),
        "enhance": lambda: pipe.enhance(images, seed=1),
        "labelled_batches": lambda: joined(pipe.labelled_batches(5, seed=1, oversample=2)),
        "larger": lambda: pipe("ant", 3, seed=1, size=24),
        "encode_tiled": lambda: encode_tiled(pipe.tokenizer, torch.linspace(-1, 1, 32 * 40).view(1, 1, 32, 40)),
        "decode_tiled": lambda: decode_tiled(pipe.tokenizer, torch.arange(80).view(1, 8, 10) % 16),
        "super_resolve": lambda: conditioned.super_resolve(images, prompt="x", seed=1),
    }
    expected = {name: comparable(method()) for name, method in methods.items()}
    limit_tokenizer(monkeypatch)
    limit_prior(monkeypatch)
    for name, method in methods.items():
        for found, before in zip(comparable(method()), expected[name], strict=True):
            assert np.allclose(found, before, atol=1), name


@pytest.mark.parametrize("size", [None, 24])
def test_a_request_learns_once_what_fits_into_memory(size, pipe, monkeypatch):
    """Later batches of a request begin with what fitted into memory before, in decoding, too."""
    limit_tokenizer(monkeypatch)
    methods = [lambda: joined(pipe.batches("ant", 9, 1, batch_size=3, **({} if size is None else {"size": size})))]
    if size is None:
        methods += [lambda: joined(pipe.labelled_batches(9, seed=1, batch_size=3)),
                    lambda: joined(pipe.labelled_batches(9, seed=1, batch_size=3, oversample=2, accept=lambda images, classes: [True] * len(images)))]
    for method in methods:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")  # equal ones, too
            method()
        sizes = [int(re.search(r"a batch of (\d+) images", str(warning.message))[1]) for warning in caught]
        assert sizes and sizes == sorted(set(sizes), reverse=True)


def joined(batches: Iterable[GenerationOutput]) -> list[object]:
    """The images and ids of all batches. There are more batches if some are split."""
    outputs = list(batches)
    return [*(image for out in outputs for image in out.images), *(ids for out in outputs for ids in out.token_ids)]


def comparable(result: object) -> list[np.ndarray]:
    """The results of a method as arrays of numbers. Pixels may be rounded differently in other batches."""
    parts = [*result.images, result.token_ids] if hasattr(result, "images") else result
    return [np.asarray(part, dtype=float) for part in parts]


# --- training ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "fields", "words"), [
    (PriorTrainingConfig, {"batch_size": 64}, r"step of 64 images \(prior_training.batch_size\) in 1 part .*accumulation_steps to 2, which"),
    (PriorTrainingConfig, {"batch_size": 18, "accumulation_steps": 3}, r"accumulation_steps to 6, .*activation_checkpointing to true\.$"),
    (TokenizerTrainingConfig, {"batch_size": 3}, r"accumulation_steps to 3, .*tokenizer.patch_size to a larger"),
    (TokenizerTrainingConfig, {"batch_size": 1}, r"Set tokenizer_training.batch_size to a smaller number, or tokenizer.patch_size"),
])
def test_training_names_the_fields(config, fields, words):
    run = SimpleNamespace(training=config(**fields), world_size=1, stage="prior", accelerator=SimpleNamespace(device=CPU),
                          state=SimpleNamespace(step=0))
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(describe_too_large_step(run))


def test_training_that_does_not_fit_says_so(run_dir, monkeypatch):
    def forward(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(TokenPrior, "forward", forward)
    with pytest.raises(InputError, match=r"a training step of 16 images \(prior_training.batch_size\)"):
        train_module.train(tiny_recipe(run_dir))


def test_commands_print_one_line_instead_of_a_traceback(capsys, tmp_path: Path):
    def run() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    assert exit_code_of(run) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: there is too little memory: CUDA out of memory") and error.count("\n") == 1
