"""Images larger than those of the training: sampling in sliding windows, with every kind of prior, from Python and from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.command_line import dispatch
from pipelines.image_folders.write_images import ids_of_first_window
from stage1_tokenizer import decode_tiled
from stage1_tokenizer.image_files.images import ImageTransform
from stage2_prior.generation.passes import UNKNOWN
from stage2_prior.prior import TokenPrior
from tests.conditioned import make_parts
from tests.editing import make_prior, make_tokenizer, saved_pipeline, two_grids
from tests.run_files import pictures
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import SamplingConfig

SIZE = (16, 24)
"""Height and width of the training images: 4 x 6 tokens."""
LARGER = (28, 40)
"""7 x 10 tokens: two windows along each side, with different overlaps."""


def make_pipe(folder: Path, any_order: bool = True, **sampling: object) -> ImageGenerationPipeline:
    tokenizer = make_tokenizer(folder, ImageTransform(SIZE, 1))
    return ImageGenerationPipeline(tokenizer, make_prior(tokenizer, any_order), SamplingConfig(**sampling))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> ImageGenerationPipeline:
    return make_pipe(tmp_path_factory.mktemp("any order") / "tokenizer", order="spread", steps=3, guidance_scale=1.5)


@pytest.fixture(scope="module")
def raster_pipe(tmp_path_factory) -> ImageGenerationPipeline:
    return make_pipe(tmp_path_factory.mktemp("raster") / "tokenizer", any_order=False)


@pytest.fixture(scope="module")
def pipe_of_two_grids(tmp_path_factory) -> ImageGenerationPipeline:
    tokenizer = two_grids(tmp_path_factory.mktemp("two grids") / "tokenizer", channels=2)
    return ImageGenerationPipeline(tokenizer, make_prior(tokenizer), SamplingConfig(steps=3))


def each_grid(ids: object) -> list[torch.Tensor]:
    return list(ids.values()) if isinstance(ids, dict) else [ids]


# --- images ------------------------------------------------------------------------------------------------------------------


def test_larger_images_of_every_prior(pipe, raster_pipe, pipe_of_two_grids):
    for each, size in ((pipe, LARGER), (raster_pipe, LARGER), (pipe_of_two_grids, (24, 40))):
        sides = each.tokenizer.transform.sides
        out = each("ant", num_images_per_label=2, size=size, seed=1, output_type="pt")
        assert out.images.shape == (2, each.tokenizer.transform.channels, *size)
        for grid, ids in zip(each.tokenizer.grids, each_grid(out.token_ids), strict=True):
            assert ids.shape[:3] == (2, grid.height * size[0] // sides[0], grid.width * size[1] // sides[1]) and ids.ndim == 3 + (grid.depth > 1)
            assert 0 <= ids.min() <= ids.max() < grid.codebook_size
        assert torch.allclose(out.images, decode_tiled(each.tokenizer, out.token_ids).clamp(-1, 1), atol=1e-4), "rounding depends on the batch"
        first_window = each_grid(ids_of_first_window(out.token_ids, each.tokenizer.grids))
        plain = each_grid(each("ant", num_images_per_label=2, seed=1).token_ids)
        assert all(map(torch.equal, first_window, plain)), "the upper left corner has the tokens of the image of this seed"


def test_training_size_gives_the_plain_images(pipe):
    larger, plain = (pipe("bee", num_images_per_label=3, seed=5, output_type="pt", **size) for size in ({"size": SIZE}, {}))
    assert torch.equal(larger.token_ids, plain.token_ids) and torch.equal(larger.images, plain.images)


def test_each_window_keeps_the_tokens_before_it_and_draws_the_others(pipe, raster_pipe, monkeypatch):
    for each in (pipe, raster_pipe):
        calls = []
        sample = TokenPrior.sample

        def recorded(self, *arguments, sample=sample, calls=calls, **keywords):
            ids_BT = sample(self, *arguments, **keywords)
            calls.append((arguments[2], keywords["known_BT"].view(-1, 4, 6), ids_BT.view(-1, 4, 6)))
            return ids_BT

        monkeypatch.setattr(TokenPrior, "sample", recorded)
        out = each("ant", size=LARGER, seed=1)
        monkeypatch.undo()
        canvas_hw = torch.full((7, 10), UNKNOWN)
        places = [(row, column) for row in (0, 2, 3) for column in (0, 3, 4)]
        assert len(calls) == len(places) and len({tuple(seeds) for seeds, _, _ in calls}) == len(places), "each window has random numbers of its own"
        for (row, column), (_, known_1hw, drawn_1hw) in zip(places, calls, strict=True):
            window = slice(row, row + 4), slice(column, column + 6)
            assert torch.equal(known_1hw[0], canvas_hw[window])
            is_known = known_1hw[0] != UNKNOWN
            assert torch.equal(drawn_1hw[0][is_known], known_1hw[0][is_known])
            canvas_hw[window] = drawn_1hw[0]
        assert torch.equal(out.token_ids[0], canvas_hw)


def test_windows_depend_on_their_neighbours(pipe):
    """Other tokens in the first window change those of the next ones, although their random numbers are the same."""
    request = pipe._check_request("ant", 1, 1, {}, tiling=pipe._tiling(LARGER, 0.5))
    tokens_BT = torch.full((1, 70), UNKNOWN)
    results = []
    for code in (0, 1):
        known_Bhw = tokens_BT.view(1, 7, 10).clone()
        known_Bhw[:, :4, :6] = code
        results.append(pipe._generate(request._replace(known_BT=known_Bhw.flatten(1))).token_ids)
        assert (results[-1][:, :4, :6] == code).all()
    assert (results[0] != results[1])[:, 4:, 6:].any()


def test_images_depend_only_on_their_seed(pipe):
    together = pipe(["ant", "bee"], num_images_per_label=2, size=LARGER, seed=3)
    apart = pipe(["ant", "bee"], num_images_per_label=2, size=LARGER, seed=3, batch_size=1)
    assert torch.equal(together.token_ids, apart.token_ids)
    assert len({tuple(ids.flatten().tolist()) for ids in together.token_ids}) == 4
    batches = list(pipe.batches(["ant", "bee"], 2, 3, size=LARGER, batch_size=3))
    assert [len(batch.images) for batch in batches] == [3, 1]
    assert torch.equal(torch.cat([batch.token_ids for batch in batches]), together.token_ids)


def test_progress_covers_all_windows_and_can_stop(pipe):
    reports = []
    pipe("ant", size=LARGER, callback=lambda done, total: reports.append((done, total)))
    assert reports[-1] == (9 * 24, 9 * 24) and [done for done, _ in reports] == sorted(done for done, _ in reports)
    out = pipe("ant", size=LARGER, callback=lambda done, total: done < 50)
    assert out.stopped and not out.images


def test_overlap_sets_the_number_of_windows(pipe):
    totals = {}
    for overlap in (0.0, 0.5, 0.8):
        pipe("ant", size=(32, 24), window_overlap=overlap, callback=lambda _, total, overlap=overlap: totals.update({overlap: total}) or True)
    assert totals == {0.0: 2 * 24, 0.5: 3 * 24, 0.8: 5 * 24}


def test_given_images_are_cut_into_windows(tmp_path):
    """A prior that is given an image at low resolution gets, in each window, the part of it that lies there."""
    pipe = ImageGenerationPipeline.from_pretrained(make_parts(tmp_path, class_drop=0.1).bundle(tmp_path / "pipeline"), "cpu")
    gradient = Image.fromarray(np.linspace(0, 255, 12 * 20).reshape(12, 20).astype(np.uint8))
    out = pipe.super_resolve(gradient, size=(24, 40), seed=1, output_type="pt", prompt="x")
    assert out.images.shape == (1, 1, 24, 40) and out.given_ids["low"].shape == (1, 3 * 5)
    left = pipe.super_resolve(gradient.crop((0, 0, 8, 8)), seed=1, prompt="x")
    assert torch.equal(left.given_ids["low"].view(2, 2)[0, 0], out.given_ids["low"].view(3, 5)[0, 0])
    assert not torch.equal(out.token_ids, pipe.super_resolve(gradient.rotate(180), size=(24, 40), seed=1, prompt="x").token_ids)
    with pytest.raises(InputError, match=r"size is given, and given_ids has low\. Give the image itself"):
        pipe(size=(24, 40), given_ids={"low": torch.zeros(1, 4, dtype=torch.int64)}, prompt="x")


def test_a_part_of_a_larger_image_is_drawn_again(pipe, raster_pipe):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, LARGER, dtype=np.uint8))
    mask_HW = np.zeros(LARGER, dtype=bool)
    mask_HW[4:24, 30:40] = True
    for each in (pipe, raster_pipe):
        out = each.inpaint(image, mask_HW, num_images_per_label=2, num_tries=2, size=LARGER, seed=1)
        kept_hw = ~mask_HW.reshape(7, 4, 10, 4).any((1, 3))
        assert out.token_ids.shape == (2, 7, 10) and (out.token_ids != out.token_ids[0]).any()
        assert (out.token_ids[0] == out.token_ids[1])[torch.from_numpy(kept_hw)].all()
        for result in out.images:
            assert (np.asarray(result) == np.asarray(image))[~mask_HW].all() and (np.asarray(result) != np.asarray(image))[mask_HW].any()
    with pytest.raises(InputError, match=r"the image is 40 x 28 pixels .* this pipeline edits images of 24 x 16"):
        pipe.inpaint(image, mask_HW)
    with pytest.raises(InputError, match=r"size asks for images of 48 x 32"):
        pipe.inpaint(image, mask_HW, size=(32, 48))


def test_outpaint_and_complete_beyond_the_training_size(pipe):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8))
    out = pipe.outpaint(image, (8, 4, 32, 20), size=LARGER, seed=1)
    assert out.images[0].size == (40, 28) and out.images[0].crop((8, 4, 32, 20)).tobytes() == image.tobytes()
    larger = out.images[0]
    completed = pipe.complete(larger, 0.5, size=LARGER, seed=2).images[0]
    assert completed.crop((0, 0, 40, 14)).tobytes() == larger.crop((0, 0, 40, 14)).tobytes() and completed.tobytes() != larger.tobytes()
    batches = list(pipe.edit_batches(larger, keep=0.5, size=LARGER, window_overlap=0.75, num_images_per_label=3, batch_size=2, seed=2))
    together = pipe.complete(larger, 0.5, size=LARGER, window_overlap=0.75, num_images_per_label=3, seed=2)
    assert [len(batch.images) for batch in batches] == [2, 1]
    assert torch.equal(torch.cat([batch.token_ids for batch in batches]), together.token_ids)


@pytest.mark.parametrize(("method", "call"), [
    ("variations", lambda pipe, image, **size: pipe.variations(image, **size)),
    ("variations", lambda pipe, image, **size: pipe.edit_batches(image, strength=0.5, **size)),
    ("enhance", lambda pipe, image, **size: pipe.enhance(image, strength=0.5, seed=1, **size)),
    ("labelled_batches", lambda pipe, image, **size: next(pipe.labelled_batches(2, seed=1, **size))),
])
def test_methods_of_the_training_size_refuse_others(pipe, method, call):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8))
    with pytest.raises(InputError, match=f"{method} draws images of the training size only; leave size out"):
        call(pipe, image, size=LARGER)
    call(pipe, image, size=None)


def test_encode_decode_and_reconstruct_keep_the_size(pipe):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in ((28, 40), (28, 40), (17, 50))]
    ids = pipe.encode(images[:2], tiled=True)
    assert ids.shape == (2, 7, 10)
    decoded, restored = pipe.decode(ids, tiled=True), pipe.reconstruct(images, tiled=True)
    assert [image.size for image in decoded] == [(40, 28), (40, 28)] and [image.size for image in restored] == [(40, 28), (40, 28), (50, 17)]
    for one, other in zip(decoded, restored[:2], strict=True):
        assert np.allclose(np.asarray(one, dtype=int), np.asarray(other, dtype=int), atol=1)
    tensor_BCHW = torch.from_numpy(np.stack([np.asarray(image) for image in images[:2]]))[:, None] / 127.5 - 1
    assert torch.equal(pipe.encode(tensor_BCHW, tiled=True), ids)
    assert pipe.encode(images).shape == (3, 4, 6) and [image.size for image in pipe.reconstruct(images)] == [(24, 16)] * 3, "resized without `tiled`"
    with pytest.raises(InputError, match=r"different sizes, such as 28 x 40 and 17 x 50 pixels"):
        pipe.encode(images, tiled=True)
    with pytest.raises(InputError, match=r"images is a list of str"):
        pipe.encode(["x"], tiled=True)


def test_errors_come_before_sampling(pipe):
    with pytest.raises(InputError, match=r"window_overlap is 0\.25, but size is not given"):
        pipe("ant", window_overlap=0.25)
    for size, words in (((16, 20), "size: the width is 20, but this pipeline was trained with images of 16 x 24 pixels"),
                        ((30, 24), "size: the height is 30; it must be a multiple of 4"), ("40", "size is '40'")):
        with pytest.raises(InputError, match=words):
            pipe.batches("ant", size=size)
    with pytest.raises(InputError, match="overlap is 1; it must be at least 0 and below 1"):
        pipe("ant", size=LARGER, window_overlap=1)


# --- command -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory) -> Path:
    return saved_pipeline(tmp_path_factory.mktemp("saved"), pipe)


def test_generate_writes_larger_images(folder, tmp_path, capsys):
    command = ["generate", folder, "--size", "28x40", "--num", 2, "--seed", 1, "--steps", 4, "--out", tmp_path / "out", "--device", "cpu"]
    command = [str(word) for word in command]
    assert dispatch(command) == 0
    contents = pictures(tmp_path / "out")
    names = sorted(set(contents) - {"grid.png"})
    assert len(names) == 4 and all(Image.open(tmp_path / "out" / name).size == (40, 28) for name in names)
    out = ImageGenerationPipeline.from_pretrained(folder, "cpu")(["ant", "bee"], num_images_per_label=2, size=LARGER, seed=1, steps=4)
    written = [np.asarray(Image.open(tmp_path / "out" / name)) for name in names]
    assert all(np.array_equal(pixels, np.asarray(image)) for pixels, image in zip(written, out.images, strict=True))
    capsys.readouterr()
    assert dispatch(command) == 0 and "nothing to do" in capsys.readouterr().out
    (tmp_path / "out" / names[1]).unlink()
    Image.new("L", (24, 16)).save(tmp_path / "out" / names[2])  # the training size
    assert dispatch(command) == 0 and pictures(tmp_path / "out") == contents
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["request"]["size"] == [28, 40]
    with pytest.raises(InputError, match=r"another request: --size was 28 40, now not given"):
        dispatch([word for word in command if word not in ("--size", "28x40")])


def test_generate_in_another_dtype_compares_logits(folder, tmp_path, capsys):
    assert dispatch(["generate", str(folder), "--size", "28x40", "--num", "1", "--dtype", "bfloat16", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert "differ from those in float32" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "words"), [
    (["--size", "wide"], "give height and width in pixels, such as 64x96"),
    (["--size", "30x40"], "--size: the height is 30; it must be a multiple of 4"),
    (["--size", "16"], "--size: the width is 16, but this pipeline was trained with images of 16 x 24"),
    (["--size", "28x40", "--window_overlap", "1"], "--window_overlap is 1.0; it must be at least 0 and below 1"),
    (["--window_overlap", "0.5"], "--size is not given"),
])
def test_generate_refuses_impossible_sizes(folder, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        dispatch(["generate", str(folder), *options, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
