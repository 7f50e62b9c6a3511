"""Every method that starts from images, and its command, with images of 16 x 24 pixels: rows stay rows, and columns stay columns."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.bundle import make_bundle
from pipelines.command_line import dispatch
from stage1_tokenizer import ImageTokenizer
from stage1_tokenizer.image_files.images import ImageTransform
from tests.conditioned import given_low, saved_prior
from tests.editing import box_mask, make_pipe, make_tokenizer, random_image, saved_pipeline
from vqmosaic.recipes.recipe_sections import SamplingConfig

HEIGHT, WIDTH, ROWS, COLUMNS = 16, 24, 4, 6


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> ImageGenerationPipeline:
    return make_pipe(tmp_path_factory.mktemp("rectangular") / "tokenizer", size=(HEIGHT, WIDTH), steps=3)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory) -> Path:
    return saved_pipeline(tmp_path_factory.mktemp("saved"), pipe)


def drawn_places(pipe, image, out) -> torch.Tensor:
    """Which tokens (ROWS, COLUMNS) differ from those of the image in at least one of the results."""
    return (out.token_ids != pipe.encode(image)).any(dim=0)


def test_inpaint_draws_the_place_of_the_mask(pipe):
    image = random_image(pipe)
    out = pipe.inpaint(image, box_mask(pipe, 20, 4, 24, 8), num_images_per_label=8, seed=1)
    differs_HW = (np.stack([np.asarray(each) for each in out.images]) != np.asarray(image)).any(axis=0)
    rows, columns = differs_HW.nonzero()
    assert rows.min() >= 4 and rows.max() < 8 and columns.min() >= 20 and len(set(columns)) > 1


def test_outpaint_complete_and_variations(pipe):
    image = random_image(pipe)
    part = image.crop((0, 0, 8, 12))
    out = pipe.outpaint(part, (16, 4, 24, 16), seed=1)
    assert out.images[0].size == (WIDTH, HEIGHT) and out.images[0].crop((16, 4, 24, 16)).tobytes() == part.tobytes()
    for keep, box in (("top", (0, 0, WIDTH, 8)), ("left", (0, 0, 12, HEIGHT)), (0.25, (0, 0, WIDTH, 4))):
        completed = pipe.complete(image, keep, seed=1).images[0]
        assert completed.crop(box).tobytes() == image.crop(box).tobytes() and completed.tobytes() != image.tobytes()
    varied = pipe.variations(image, strength=0.25, num_images_per_label=6, seed=1)
    assert varied.token_ids.shape == (6, ROWS, COLUMNS) and drawn_places(pipe, image, varied).any()


def test_score_has_a_map_of_the_grid(pipe):
    images = [random_image(pipe, seed) for seed in range(2)]
    bits, bits_map = pipe.score(images)
    assert bits_map.shape == (2, ROWS, COLUMNS) and torch.allclose(bits_map.sum((1, 2)), bits, rtol=1e-4)


def test_given_images_are_rectangular(tmp_path):
    """super_resolve and the command upscale with a low resolution of 8 x 12 pixels."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer", ImageTransform((HEIGHT, WIDTH), 1))
    make_tokenizer(tmp_path / "low", ImageTransform((8, 12), 1, derived={"kind": "low_resolution", "factor": 2}))
    prior = saved_prior(tmp_path / "prior", tokenizer.grids, str(tokenizer.token_fingerprint), [given_low(tmp_path / "low")])
    folder = make_bundle(tmp_path / "tokenizer", prior, tmp_path / "pipeline", SamplingConfig(), {"low": tmp_path / "low"})
    pipe = ImageGenerationPipeline.from_pretrained(folder, "cpu")
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12), dtype=np.uint8))
    out = pipe.super_resolve(small, class_labels="ant", seed=1)
    assert out.images[0].size == (WIDTH, HEIGHT) and out.given_ids["low"].shape == (1, 2 * 3)
    low = ImageTokenizer.from_pretrained(tmp_path / "low")
    assert torch.equal(out.given_ids["low"].view(1, 2, 3), low.encode(low.transform.without_derivation(small)[None]))
    larger = pipe.super_resolve(small.resize((36, 16)), class_labels="ant", size=(32, 72), seed=1)
    assert larger.images[0].size == (72, 32) and larger.given_ids["low"].shape == (1, 4 * 9)
    small.save(tmp_path / "small.png")
    assert dispatch(["upscale", str(folder), str(tmp_path / "small.png"), "--classes", "ant", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert Image.open(tmp_path / "out" / "small.png").size == (WIDTH, HEIGHT)


def test_commands_edit_and_score(pipe, folder, tmp_path):
    image, mask_HW = random_image(pipe), box_mask(pipe, 20, 0, 24, 4)
    image.save(tmp_path / "image.png")
    Image.fromarray(mask_HW).save(tmp_path / "mask.png")
    arguments = ["edit", folder, tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--num", 1, "--out", tmp_path / "edited", "--device", "cpu"]
    assert dispatch([str(word) for word in arguments]) == 0
    edited = Image.open(tmp_path / "edited" / "image-0.png")
    assert edited.size == (WIDTH, HEIGHT) and (np.asarray(edited) == np.asarray(image))[~mask_HW].all()
    assert dispatch(["score", str(folder), str(tmp_path / "image.png"), "--out", str(tmp_path / "scores"), "--device", "cpu"]) == 0
    row, = csv.DictReader((tmp_path / "scores" / "scores.csv").open())
    place = int(pipe.score(image).bits_map[0].argmax())
    assert (int(row["top"]), int(row["left"])) == (place // COLUMNS * 4, place % COLUMNS * 4)
