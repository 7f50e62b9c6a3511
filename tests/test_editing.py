"""Editing images: kept pixels are unchanged, masked tokens are drawn given the others, and the command `edit`."""

import inspect
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt

from pipelines import ImageGenerationPipeline, bundle
from pipelines.command_line import dispatch
from pipelines.editing.edit_inputs import DRAWN_BY
from pipelines.editing.edit_methods import EDIT_ARGUMENTS, EditingMethods
from pipelines.editing.given_images import tokens_of
from pipelines.editing.masked_images import masks_from, tokens_in_masks
from pipelines.editing.result_folder import EditFolder
from pipelines.editing.write_results import write_edits
from pipelines.generation_request import CALL_ARGUMENTS, tries_seeds
from pipelines.image_folders import write_images
from stage1_tokenizer.pictures import GAP_PIXELS, viewing_scale
from stage2_prior.segments import GivenGrid
from tests.conditioned import CLASSES, LOW_SIZE, make_parts
from tests.editing import TOKEN, box_mask, make_pipe, make_prior, random_image, saved_pipeline, two_grids
from tests.test_structure import loaded, modules_after
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.interruption import Interrupted
from vqmosaic.runs.launch import exit_code_of
from vqmosaic.training.tracking import ProgressLines

CASES = {
    "grey": {}, "grey and alpha": {"channels": 2}, "colour": {"channels": 3, "size": [16, 24]}, "colour and alpha": {"channels": 4},
    "16 bits": {"value_range": (0, 65535)}, "raster order": {"channels": 3, "any_order": False}, "passes": {"order": "spread", "steps": 3},
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> ImageGenerationPipeline:
    return make_pipe(tmp_path_factory.mktemp("grey") / "tokenizer")


@pytest.fixture(scope="module")
def raster_pipe(tmp_path_factory) -> ImageGenerationPipeline:
    return make_pipe(tmp_path_factory.mktemp("raster") / "tokenizer", any_order=False)


@pytest.fixture(scope="module", params=["one prior", "two priors", "raster order"])
def pipe_of_two_grids(request, tmp_path_factory) -> ImageGenerationPipeline:
    """Pipelines whose tokenizer has two grids, with three ids at each place."""
    tokenizer = two_grids(tmp_path_factory.mktemp("two grids") / "tokenizer", channels=3)
    if request.param != "two priors":
        return ImageGenerationPipeline(tokenizer, make_prior(tokenizer, any_order=request.param == "one prior"))
    coarse, fine = tokenizer.grids
    return ImageGenerationPipeline(tokenizer, [make_prior(tokenizer, grids=[coarse]),
                                               make_prior(tokenizer, grids=[fine], class_drop=0.1, conditions=[GivenGrid(grid=coarse)])])


def random_masks(sides: tuple[int, int]) -> list[np.ndarray]:
    """Masks of a box, of single pixels, and of all but one pixel."""
    rng, masks = np.random.default_rng(0), []
    (top, bottom), (left, right) = (sorted(rng.choice(side + 1, 2, replace=False)) for side in sides)
    masks.append(np.zeros(sides, dtype=bool))
    masks[0][top:bottom, left:right] = True
    masks.append(rng.random(sides) < 0.1)
    masks.append(np.ones(sides, dtype=bool))
    masks[2][rng.integers(sides[0]), rng.integers(sides[1])] = False
    return masks


# --- kept pixels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_pixels_outside_of_the_mask_are_unchanged(case, tmp_path):
    pipe = make_pipe(tmp_path / "tokenizer", **CASES[case])
    transform, image = pipe.tokenizer.transform, random_image(pipe)
    given_CHW = transform(image)
    masks = random_masks(transform.sides)
    exact = pipe.inpaint([image] * 3, masks, ["ant", "bee", "ant"], seed=1, output_type="pt").images
    for mask_HW, result_CHW in zip(masks, exact, strict=True):
        assert torch.equal(result_CHW[:, ~mask_HW], given_CHW[:, ~mask_HW])
        assert not torch.equal(result_CHW[:, mask_HW], given_CHW[:, mask_HW])
    if transform.value_range is None:
        for output_type in ("pil", "np"):
            results = pipe.inpaint([image] * 3, masks, ["ant", "bee", "ant"], seed=1, output_type=output_type).images
            for mask_HW, result in zip(masks, results, strict=True):
                assert np.array_equal(np.asarray(result).reshape(*transform.sides, -1)[~mask_HW],
                                      np.asarray(image).reshape(*transform.sides, -1)[~mask_HW])
        for result in (pipe.inpaint(image, masks[0], seed=1), pipe.complete(image, seed=1), pipe.variations(image, seed=1)):
            assert result.images[0].mode == image.mode


def test_every_8_bit_value_is_kept(pipe):
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for mask_HW in (box_mask(pipe, 0, 0, 16, 1), box_mask(pipe, 0, 15, 16, 16)):
        assert np.array_equal(np.asarray(pipe.inpaint(image, mask_HW, seed=1).images[0])[~mask_HW], np.asarray(image)[~mask_HW])


def test_only_a_band_inside_the_mask_is_blended(pipe):
    """Farther than a token from the kept pixels, and if everything is drawn, pixels are those of the decoder."""
    image, mask_HW = random_image(pipe), box_mask(pipe, 2, 2, 16, 16)
    is_far_HW = distance_transform_edt(mask_HW) >= TOKEN
    out = pipe.inpaint(image, mask_HW, seed=1, output_type="pt")
    decoded_CHW = pipe.tokenizer.decode(out.token_ids)[0].clamp(-1, 1)
    assert is_far_HW.any() and torch.equal(out.images[0][:, is_far_HW], decoded_CHW[:, is_far_HW])
    assert not torch.equal(out.images[0][:, mask_HW & ~is_far_HW], decoded_CHW[:, mask_HW & ~is_far_HW])
    everything = pipe.inpaint(image, np.ones_like(mask_HW), seed=1, output_type="pt")
    assert torch.equal(everything.images, pipe.tokenizer.decode(everything.token_ids).clamp(-1, 1))


def test_blending_removes_the_step_at_the_edge(pipe):
    """The image is the decoded one with 0.3 added: the pixels beside the edge get most of the difference."""
    mask_HW = box_mask(pipe, 8, 0, 16, 16)
    image = Image.new("L", (16, 16), 150)
    out = pipe.inpaint(image, mask_HW, seed=1, output_type="pt")
    decoded_HW, given = pipe.tokenizer.decode(out.token_ids)[0, 0].clamp(-1, 1), pipe.tokenizer.transform(image)[0, 0, 0]
    for column in (8, 9, 10, 11):
        weight = 1 - (column - 7) / TOKEN
        expected_H = (decoded_HW[:, column] + weight * (given - decoded_HW[:, 7])).clamp(-1, 1)
        torch.testing.assert_close(out.images[0, 0, :, column], expected_H)


def test_what_is_under_the_mask_has_no_influence(pipe):
    image, mask_HW = random_image(pipe), box_mask(pipe, 3, 5, 9, 14)
    other = np.where(mask_HW, 255 - np.asarray(image), np.asarray(image)).astype(np.uint8)
    results = [pipe.inpaint(given, mask_HW, seed=1).images[0].tobytes() for given in (image, Image.fromarray(other))]
    assert results[0] == results[1]


# --- drawn tokens --------------------------------------------------------------------------------------------------------------


def test_masks_are_widened_to_tokens(pipe, pipe_of_two_grids):
    mask_1HW = masks_from(box_mask(pipe, 3, 4, 5, 8), 1, (16, 16))
    assert tokens_in_masks(mask_1HW, pipe.tokenizer.grids).view(4, 4).nonzero().tolist() == [[1, 0], [1, 1]]
    drawn_T = tokens_in_masks(mask_1HW, pipe_of_two_grids.tokenizer.grids)[0]
    assert drawn_T[:12].view(2, 2, 3).all(dim=-1).nonzero().tolist() == [[0, 0]], "pixels 0 to 7"
    assert drawn_T[12:].view(4, 4, 3).all(dim=-1).nonzero().tolist() == [[1, 0], [1, 1]] and drawn_T.sum() == 9


def test_all_other_tokens_are_those_of_the_image(pipe, raster_pipe, pipe_of_two_grids):
    for each in (pipe, raster_pipe, pipe_of_two_grids):
        tokenizer, image = each.tokenizer, random_image(each)
        mask_HW = box_mask(each, 4, 4, 8, 8)  # a whole token
        out = each.inpaint(image, mask_HW, num_images_per_label=6, seed=1)
        rows, columns = np.arange(16)[:, None], np.arange(16)
        rows, columns = np.broadcast_to(rows, (16, 16)).copy(), np.broadcast_to(columns, (16, 16)).copy()
        nearest = distance_transform_edt(mask_HW, return_distances=False, return_indices=True)
        filled_1CHW = tokenizer.transform(image)[None][:, :, nearest[0], nearest[1]]
        is_drawn_T, expected_T = tokens_in_masks(masks_from(mask_HW, 1, (16, 16)), tokenizer.grids)[0], tokens_of(tokenizer, filled_1CHW)[0]
        ids_BT = tokenizer.join_tokens(out.token_ids)
        assert (ids_BT[:, ~is_drawn_T] == expected_T[~is_drawn_T]).all()
        assert len(ids_BT[:, is_drawn_T].unique(dim=0)) > 1, "the results differ"


def test_a_token_is_drawn_given_all_others(pipe, raster_pipe):
    """At temperature 0, it is the likeliest token after all others for any order, and after those before it in raster order."""
    image, mask_HW, place = random_image(pipe), box_mask(pipe, 4, 4, 8, 8), 5
    for each in (pipe, raster_pipe):
        ids_1T = each.inpaint(image, mask_HW, "bee", temperature=0.0, seed=1).token_ids.flatten(1)
        last_1T = torch.tensor([[*(other for other in range(16) if other != place), place]])
        with torch.no_grad():
            logits_1TK = each.prior(ids_1T, torch.tensor([1]), orders_BT=last_1T if each is pipe else None)
        assert ids_1T[0, place] == logits_1TK[0, place].argmax()


def test_several_tries_return_the_most_likely_one(pipe):
    image, mask_HW = random_image(pipe), box_mask(pipe, 4, 4, 12, 12)
    arguments = {"mask": mask_HW, "class_labels": "ant", "num_images_per_label": 3, "seed": 5}
    first, best = pipe.inpaint(image, **arguments), pipe.inpaint(image, num_tries=4, **arguments)
    known_BT = first.token_ids.flatten(1).masked_fill(tokens_in_masks(masks_from(mask_HW, 1, (16, 16)), pipe.tokenizer.grids), -1)
    tries = [pipe.sample_ids([0] * 3, pipe.sampling, seeds, known_BT=known_BT) for seeds in tries_seeds(first.seeds, 4)]
    assert torch.equal(tries[0], first.token_ids)
    with torch.no_grad():
        nll_KB = torch.stack([torch.stack([pipe.prior.loss(ids[image][None].flatten(1), torch.tensor([0])) for image in range(3)]) for ids in tries])
    chosen_B = nll_KB.argmin(dim=0).tolist()
    assert set(chosen_B) != {0}
    assert all(torch.equal(best.token_ids[image], tries[chosen][image]) for image, chosen in enumerate(chosen_B))
    assert best.seeds == [tries_seeds(first.seeds, 4)[chosen][image] for image, chosen in enumerate(chosen_B)]


def test_results_do_not_depend_on_the_batches(pipe):
    images, masks = [random_image(pipe, seed) for seed in range(3)], random_masks((16, 16))
    together, alone = (pipe.inpaint(images, masks, ["ant", "bee", "ant"], 2, num_images_per_label=2, seed=3, batch_size=size) for size in (64, 1))
    assert torch.equal(together.token_ids, alone.token_ids)
    assert [image.tobytes() for image in together.images] == [image.tobytes() for image in alone.images]
    for number, result in enumerate(together.images):
        kept_HW = ~masks[number // 2]
        assert np.array_equal(np.asarray(result)[kept_HW], np.asarray(images[number // 2])[kept_HW])


def test_one_image_with_several_classes(pipe):
    image, mask_HW = random_image(pipe), box_mask(pipe, 0, 0, 16, 12)
    out = pipe.inpaint(image, mask_HW, CLASSES, temperature=0.0, seed=1)
    assert out.class_indices == [0, 1] and not torch.equal(out.token_ids[0], out.token_ids[1])
    assert all(np.array_equal(np.asarray(result)[12:], np.asarray(image)[12:]) for result in out.images)


def test_progress_counts_all_tries_and_a_callback_stops(pipe):
    image, mask_HW, progress = random_image(pipe), box_mask(pipe, 4, 4, 12, 12), []
    pipe.inpaint(image, mask_HW, num_tries=3, num_images_per_label=2, batch_size=1, callback=lambda *done: progress.append(done))
    assert progress == sorted(progress) and progress[-1] == (6 * 16, 6 * 16) and len(progress) == 6 * 4
    out = pipe.inpaint(image, mask_HW, num_tries=3, callback=lambda done, total: done < 20)
    assert out.stopped and not len(out.images)


def test_priors_that_are_given_more_than_the_class(tmp_path):
    pipe = ImageGenerationPipeline.from_pretrained(make_parts(tmp_path, low_drop=0.0).bundle(tmp_path / "pipeline"), "cpu")
    image, mask_HW = random_image(pipe), box_mask(pipe, 4, 4, 12, 12)
    low = image.resize((LOW_SIZE, LOW_SIZE))
    out = pipe.inpaint(image, mask_HW, "ant", prompt="sea", condition_image=low, seed=1)
    assert sorted(out.given_ids) == ["low", "text"] and np.array_equal(np.asarray(out.images[0])[~mask_HW], np.asarray(image)[~mask_HW])
    with pytest.raises(InputError, match=r"low is not given, .* Give images of conditions as condition_image"):
        pipe.inpaint(image, mask_HW, "ant")
    with pytest.raises(InputError, match=r"low is not given, .* Give images of conditions as condition_image"):
        pipe.score(image, "ant")
    assert pipe.score([image, low], ["ant", "bee"], condition_image=low).bits.shape == (2,)


# --- outpaint, complete, variations ----------------------------------------------------------------------------------------------


def test_outpaint_puts_the_image_into_the_box(pipe):
    image = random_image(pipe).crop((0, 0, 9, 6))
    out = pipe.outpaint([image, image.transpose(Image.Transpose.ROTATE_180)], (3, 2, 12, 8), seed=1)
    assert out.images[0].size == (16, 16) and np.array_equal(np.asarray(out.images[0])[2:8, 3:12], np.asarray(image))
    assert np.array_equal(np.asarray(out.images[1])[2:8, 3:12], np.asarray(image)[::-1, ::-1])


@pytest.mark.parametrize(("keep", "kept"), [("top", np.s_[:8]), ("left", np.s_[:, :8]), (0.25, np.s_[:4]), (0.01, np.s_[:1]), (0.99, np.s_[:15])])
def test_complete_keeps_one_side(pipe, raster_pipe, keep, kept):
    for each in (pipe, raster_pipe):
        image = random_image(each)
        result = np.asarray(each.complete(image, keep, seed=1).images[0])
        assert np.array_equal(result[kept], np.asarray(image)[kept]) and not np.array_equal(result, np.asarray(image))


def test_keeping_the_top_gives_a_raster_prior_only_tokens_before_all_others(raster_pipe):
    out = raster_pipe.complete(random_image(raster_pipe), "top", seed=1)
    known_BT = out.token_ids.flatten(1).clone()
    known_BT[:, 8:] = -1
    assert torch.equal(raster_pipe.prior.sample(None, SamplingConfig(), out.seeds, known_BT=known_BT), out.token_ids.flatten(1))


def test_variations_draw_a_share_of_the_tokens(pipe, pipe_of_two_grids):
    for each in (pipe, pipe_of_two_grids):
        image, tokenizer = random_image(each), each.tokenizer
        given_T, changed = tokens_of(tokenizer, tokenizer.transform(image)[None])[0], []
        for strength in (0.01, 0.25, 1.0):
            out = each.variations(image, strength, num_images_per_label=3, seed=1)
            is_changed_BT = tokenizer.join_tokens(out.token_ids) != given_T
            most = sum(max(1, round(strength * grid.num_tokens)) for grid in tokenizer.grids)
            assert is_changed_BT.any() and is_changed_BT.sum(dim=1).max() <= most
            changed.append(is_changed_BT)
        assert not torch.equal(changed[1][0], changed[1][1]), "other places for each result"


@pytest.mark.parametrize("kind", ["mask", "box", "keep", "strength"])
def test_batches_are_the_results_of_the_methods(kind, pipe, tmp_path):
    own, image = KINDS[kind], random_image(pipe).crop((0, 0, 8, 4) if kind == "box" else (0, 0, 16, 16))
    image.save(tmp_path / "photo.png")
    Image.fromarray(box_mask(pipe, 4, 3, 11, 9)).save(tmp_path / "mask.png")
    own_values = {"mask": Image.open(tmp_path / "mask.png")} if kind == "mask" else own
    files = {"image": str(tmp_path / "photo.png"), "mask": str(tmp_path / "mask.png")}
    expected = call(pipe, files, own, num_images_per_label=5, seed=3)
    skipped = pipe.edit_batches(image, **own_values, num_images_per_label=5, seed=3, batch_size=2, skip=lambda positions: 2 in positions)
    batches = list(skipped)
    assert [batch.places for batch in batches] == [range(2), range(4, 5)]
    for batch in batches:
        assert [result.tobytes() for result in batch.images] == [expected[place].tobytes() for place in batch.places]


def test_the_listed_arguments_are_those_of_the_methods():
    for method in (EditingMethods.inpaint, EditingMethods.edit_batches):
        own = {name for each in (method, EditingMethods._edit_request, EditingMethods._check_edit) for name in inspect.signature(each).parameters}
        assert own - {"self", "image", "images_NCHW", "drawn_by", "value", "tiling", "arguments", "settings", "skip", *DRAWN_BY} == {*EDIT_ARGUMENTS}
    own = {*inspect.signature(ImageGenerationPipeline.__call__).parameters}
    assert own - {"self", "positional", "settings"} == {*CALL_ARGUMENTS}


# --- masks and errors ------------------------------------------------------------------------------------------------------------


def test_masks_of_all_types_are_the_same():
    mask_HW = np.zeros((16, 24), dtype=bool)
    mask_HW[3:9, 5:20] = True
    picture = Image.fromarray((mask_HW * 255).astype(np.uint8))
    masks = [mask_HW, torch.from_numpy(mask_HW), mask_HW[None], [mask_HW], picture, picture.convert("1"), picture.convert("RGB"),
             picture.convert("RGBA"), picture.convert("P"), Image.fromarray((mask_HW * 65535).astype(np.uint16))]
    assert all(np.array_equal(masks_from(mask, 1, (16, 24))[0].numpy(), mask_HW) for mask in masks)
    assert masks_from([mask_HW, picture], 2, (16, 24)).shape == masks_from(mask_HW, 2, (16, 24)).shape == (2, 16, 24)


BLACK, WHITE = Image.new("L", (16, 16)), Image.new("L", (16, 16), 255)


@pytest.mark.parametrize(("mask", "words"), [
    (BLACK, "has no white"), (Image.new("L", (16, 8), 255), "the mask is 16 x 8 pixels"), ([WHITE, BLACK], "2 masks and 1 images"),
    (Image.new("RGBA", (16, 16)), "transparent pixels"), (np.ones((16, 16), dtype=np.uint8), "an array of uint8 .* give mask > 0"),
    (np.ones(16, dtype=bool), "of shape"), ("mask.png", r"of type str; .* PIL.Image.open\('mask.png'\)"), ([], "mask is an empty list"),
])
def test_invalid_masks_are_refused(pipe, mask, words):
    with pytest.raises(InputError, match=words):
        pipe.inpaint(random_image(pipe), mask)


@pytest.mark.parametrize(("call", "words"), [
    (lambda pipe, image: pipe.inpaint(image.resize((8, 32)), WHITE), "the image is 8 x 32 pixels .* edits images of 16 x 16.*resize"),
    (lambda pipe, image: pipe.inpaint(torch.zeros(1, 1, 8, 8), WHITE), "images is a torch.float32 tensor"),
    (lambda pipe, image: pipe.inpaint([image, image.resize((8, 32))], WHITE), "image 1 is 8 x 32 pixels"),
    (lambda pipe, image: pipe.inpaint("photo.png", WHITE), r"images is str; .* open it first: PIL.Image.open\('photo.png'\)"),
    (lambda pipe, image: pipe.inpaint(["photo.png"], WHITE), r"images is a list of str; .* PIL.Image.open\('photo.png'\)"),
    (lambda pipe, image: pipe.inpaint([image] * 2, WHITE, ["ant"] * 3), "class_labels has 3 entries and images has 2 entries"),
    (lambda pipe, image: pipe.inpaint(image, WHITE, num_tries=0), "num_tries is 0"),
    (lambda pipe, image: pipe.inpaint(image, WHITE, condition_image=image), "was not trained with an image"),
    (lambda pipe, image: pipe.inpaint(image, WHITE, num_images=2), "sampling setting 'num_images'. Did you mean 'num_images_per_label'"),
    (lambda pipe, image: pipe.variations(image, sharpness=2), "sharpness.* Arguments: class_labels, num_tries, .* Sampling settings: guidance_scale"),
    (lambda pipe, image: pipe.edit_batches(image), "nothing says what to draw again; give exactly one of mask, box, keep and strength"),
    (lambda pipe, image: pipe.edit_batches(image, mask=WHITE, keep="top"), "mask and keep are given; give exactly one of"),
    (lambda pipe, image: pipe.inpaint(image, WHITE, "cow"), "no class 'cow'"),
    (lambda pipe, image: pipe.outpaint(image, (0, 0, 16, 16)), "nothing to draw"),
    (lambda pipe, image: pipe.outpaint(image, (0, 0, 17, 8)), "inside of 16 x 16"),
    (lambda pipe, image: pipe.outpaint(image, (0, 0, 8)), "give left, top, right and bottom"),
    (lambda pipe, image: pipe.outpaint(image, (0, 0, 8, 4)), "the image is 16 x 16 pixels .* box is a place of 8 x 4"),
    (lambda pipe, image: pipe.complete(image, "bottom"), 'keep is \'bottom\'; allowed: "top", "left"'),
    (lambda pipe, image: pipe.complete(image, 1), "keep is 1"), (lambda pipe, image: pipe.complete(image, True), "keep is True"),
    (lambda pipe, image: pipe.variations(image, 0), "strength is 0"), (lambda pipe, image: pipe.variations(image, 1.5), "strength is 1.5"),
])
def test_invalid_arguments_are_refused(pipe, call, words):
    with pytest.raises(InputError, match=words):
        call(pipe, random_image(pipe))


# --- the command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(pipe, tmp_path_factory) -> Path:
    """The folder of the pipeline, which tests must not change."""
    return saved_pipeline(tmp_path_factory.mktemp("saved"), pipe)


@pytest.fixture
def files(pipe, pipeline, tmp_path) -> dict[str, str]:
    """Paths of a pipeline, an image and a mask."""
    random_image(pipe).save(tmp_path / "photo.png")
    Image.fromarray(box_mask(pipe, 4, 3, 11, 9)).save(tmp_path / "mask.png")
    return {"pipeline": str(pipeline), "image": str(tmp_path / "photo.png"), "mask": str(tmp_path / "mask.png"),
            "out": str(tmp_path / "out")}


def edit(files: dict[str, str], *options: str, drawn: tuple[str, ...] | None = None) -> int:
    drawn = ("--mask", files["mask"]) if drawn is None else drawn
    return dispatch(["edit", files["pipeline"], files["image"], *drawn, "--out", files["out"], *options])


KINDS = {"mask": {"mask": "mask.png"}, "box": {"box": (4, 8, 12, 12)}, "keep": {"keep": "left"}, "share": {"keep": 0.25},
         "strength": {"strength": 0.3}}


def call(pipe: ImageGenerationPipeline, files: dict[str, str], own: dict[str, object], **arguments: object) -> list[Image.Image]:
    """The results of the method of a pipeline for the same edit as that of the command with `option_of`."""
    method = {"mask": pipe.inpaint, "box": pipe.outpaint, "keep": pipe.complete, "strength": pipe.variations}[next(iter(own))]
    own = {"mask": Image.open(files["mask"])} if "mask" in own else own
    return method(Image.open(files["image"]), **own, **arguments).images


def option_of(own: dict[str, object], files: dict[str, str]) -> tuple[str, ...]:
    (name, value), = own.items()
    return f"--{name}", files["mask"] if name == "mask" else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("kind", KINDS)
def test_edit_writes_what_the_methods_return(kind, pipe, files, monkeypatch):
    """The results and the kept pixels, bit for bit; what the grid shows above them, what the record has, and the progress in images."""
    own, bars = KINDS[kind], []
    if kind == "box":
        random_image(pipe).crop((0, 0, 8, 4)).save(files["image"])

    class Bar(ProgressLines):
        def update(self, count=1):
            super().update(count)
            bars.append((self.n, self.total))

    monkeypatch.setattr(write_images, "progress_bar", Bar)
    drawn, out, image = option_of(own, files), Path(files["out"]), Image.open(files["image"])
    assert edit(files, "--classes", "bee", "--num", "2", "--num_tries", "2", "--seed", "7", drawn=drawn) == 0
    results = [np.asarray(Image.open(out / f"photo_bee-{number}.png")) for number in range(2)]
    expected = call(pipe, files, own, class_labels="bee", num_images_per_label=2, num_tries=2, seed=7)
    assert all(np.array_equal(result, np.asarray(image)) for result, image in zip(results, expected, strict=True))
    is_kept = {"mask": ~box_mask(pipe, 4, 3, 11, 9), "box": box_mask(pipe, 4, 8, 12, 12), "keep": box_mask(pipe, 0, 0, 8, 16),
               "share": box_mask(pipe, 0, 0, 16, 4), "strength": box_mask(pipe, 0, 0, 0, 0)}[kind]
    kept = np.full((16, 16), 128, dtype=np.uint8)
    kept[is_kept] = np.asarray(image).ravel() if kind == "box" else np.asarray(image)[is_kept]
    assert all(np.array_equal(result[is_kept], kept[is_kept]) for result in results)
    shown = {"box": [kept], "strength": [np.asarray(image), np.asarray(pipe.reconstruct(image)[0])]}.get(kind, [np.asarray(image), kept])
    scale = viewing_scale((16, 16))
    grid = np.asarray(Image.open(out / "grid.png").convert("L"))[::scale, ::scale]
    for number, pixels_HW in enumerate(shown):
        found_HW = grid[GAP_PIXELS:, GAP_PIXELS + number * (16 + GAP_PIXELS):][:16, :16]
        assert np.abs(found_HW.astype(int) - pixels_HW).max() <= 1, (kind, number)
    record = json.loads((out / "edits.json").read_text())["request"]
    value, = own.values()
    assert {name: record[name] for name in ("mask", "box", "keep", "strength") if record[name] is not None} == {
        next(iter(own)): list(value) if isinstance(value, tuple) else value}
    assert bars[-1] == (2, 2) and [done for done, _ in bars] == sorted(done for done, _ in bars) and any(0 < done < 1 for done, _ in bars)
    other = ("--strength", "0.9") if kind != "strength" else ("--keep", "top")
    with pytest.raises(InputError, match=f"another request: .*{other[0]} was not given, now {other[1]}" if kind != "box" else "image .* is 8 x 4"):
        edit(files, "--classes", "bee", "--num", "2", "--num_tries", "2", "--seed", "7", drawn=other)


@pytest.mark.parametrize(("drawn", "words"), [
    ((), "nothing says what to draw again; give exactly one of --mask, --box, --keep and --strength"),
    (("--keep", "top", "--strength", "0.5"), "--keep and --strength are given; give exactly one"),
    (("--box", "1,2,3"), "--box: '1,2,3' was given; give left, top, right and bottom"), (("--box", "0,0,9,17"), "--box is 0,0,9,17; .* 16 x 16"),
    (("--box", "0,0,8,8"), "photo.png' is 16 x 16 pixels .* --box is a place of 8 x 8"), (("--keep", "right"), "--keep: 'right' was given; give top"),
    (("--keep", "1"), "--keep is 1"), (("--strength", "0"), "--strength is 0"),
    (("--strength", "0.5", "--guidance_scale", "3"), "--guidance_scale is given, but no class, prompt or condition image"),
    (("--strength", "0.5", "--condition_image", "photo.png"), "the prior of this pipeline was not trained with images"),
])
def test_edit_refuses_invalid_ways_to_draw(files, drawn, words):
    with pytest.raises(InputError, match=words):
        edit(files, drawn=drawn)
    assert not Path(files["out"]).exists()


def test_files_are_checked_before_torch_is_loaded(files, tmp_path):
    """All errors about images and masks, in one process that never loads torch."""
    Image.new("L", (16, 8), 255).save(tmp_path / "small.png")
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    (tmp_path / "cut.png").write_bytes(Path(files["image"]).read_bytes()[:60])
    command = ["edit", files["pipeline"], "IMAGE", "--out", files["out"]]
    cases = {f"image '{tmp_path}/small.png' is 16 x 8 pixels": ("small.png", "--keep", "top"),
             f"image '{tmp_path}/cut.png' cannot be read": ("cut.png", "--strength", "0.5"),
             f"the mask '{tmp_path}/small.png' is 16 x 8 pixels": ("photo.png", "--mask", str(tmp_path / "small.png")),
             f"the mask '{tmp_path}/cut.png' cannot be read": ("photo.png", "--mask", str(tmp_path / "cut.png")),
             f"the mask '{tmp_path}/black.png' has no white": ("photo.png", "--mask", str(tmp_path / "black.png"))}
    program = f"""
from pipelines.command_line import dispatch
for words, (image, *drawn) in {cases!r}.items():
    try:
        dispatch([*{command!r}[:2], {str(tmp_path)!r} + "/" + image, *drawn, *{command!r}[3:]])
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
"""
    assert not loaded(modules_after(program), "torch", "scipy", "transformers")


def test_guidance_is_recorded_only_with_something_to_guide_to(files, tmp_path):
    shutil.copytree(files["pipeline"], tmp_path / "guided")
    content = json.loads((tmp_path / "guided/pipeline.json").read_text())
    (tmp_path / "guided/pipeline.json").write_text(json.dumps(content | {"sampling": content["sampling"] | {"guidance_scale": 2.5}}))
    for name, options, scale in (("plain", (), 1.0), ("ant", ("--classes", "ant"), 2.5)):
        out = tmp_path / name
        assert edit(files | {"pipeline": str(tmp_path / "guided"), "out": str(out)}, "--num", "1", *options) == 0
        assert json.loads((out / "edits.json").read_text())["request"]["sampling"]["guidance_scale"] == scale


def test_ctrl_c_before_the_first_image_says_that_none_is_written(files, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, "usable_device", interrupt)
    assert exit_code_of(lambda: edit(files)) == 130
    assert capsys.readouterr().err == f"stopped by SIGINT; 0 of 4 images are written to {files['out']}. Run the same command to continue.\n"
    assert not Path(files["out"]).exists()


def test_edit_writes_results_with_the_kept_pixels(pipe, files, capsys):
    assert edit(files, "--classes", "ant,bee", "--num", "2", "--num_tries", "2", "--seed", "7") == 0
    out, given, kept_HW = Path(files["out"]), np.asarray(Image.open(files["image"])), ~box_mask(pipe, 4, 3, 11, 9)
    assert {path.name for path in out.glob("*.png")} == {"photo_ant-0.png", "photo_ant-1.png", "photo_bee-0.png", "photo_bee-1.png", "grid.png"}
    expected = pipe.inpaint(Image.open(files["image"]), Image.open(files["mask"]), CLASSES, 2, num_images_per_label=2, seed=7).images
    for name, image in zip(("ant-0", "ant-1", "bee-0", "bee-1"), expected, strict=True):
        pixels_HW = np.asarray(Image.open(out / f"photo_{name}.png"))
        assert np.array_equal(pixels_HW[kept_HW], given[kept_HW]) and np.array_equal(pixels_HW, np.asarray(image))
    assert "note:" not in capsys.readouterr().out
    assert edit(files, "--classes", "ant,bee", "--num", "2", "--num_tries", "2", "--seed", "7") == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match="images of another request: --seed was 7, now 8"):
        edit(files, "--classes", "ant,bee", "--num", "2", "--num_tries", "2", "--seed", "8")
    assert json.loads((out / "edits.json").read_text())["request"]["num_tries"] == 2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "share"])
def test_edit_writes_the_missing_results(kind, files, monkeypatch, capsys):
    """The results of an interrupted call are those of an uninterrupted one, and complete ones are kept. Alpha is kept, too."""
    rgba, own = make_pipe(Path(files["out"]).parent / "rgba/made", channels=4), KINDS[kind]
    random_image(rgba).crop((0, 0, 8, 4) if kind == "box" else (0, 0, 16, 16)).save(files["image"])
    drawn = option_of(own, files)
    files = files | {"pipeline": str(saved_pipeline(Path(files["out"]).parent / "rgba", rgba))}
    batches = ImageGenerationPipeline._sample_batches

    def stopped_after_a_batch(self, request, output_type, callback, batch_size, compile, skip=None):
        for number, batch in enumerate(batches(self, request, output_type, callback, 2, compile, skip)):
            if number == 1 and is_stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(ImageGenerationPipeline, "_sample_batches", stopped_after_a_batch)
    out, is_stopped = Path(files["out"]), True
    with pytest.raises(Interrupted, match=r"4 of 6 images are written .* Run the same command to continue"):
        edit(files, "--num", "6", "--seed", "3", drawn=drawn)
    assert {path.name for path in out.glob("*.png")} == {f"photo-{number}.png" for number in range(4)}
    is_stopped, kept = False, {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert edit(files, "--num", "6", "--seed", "3", drawn=drawn) == 0 and "wrote 2 results and grid.png" in capsys.readouterr().out
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    expected = call(rgba, files, own, num_images_per_label=6, seed=3)
    for number, image in enumerate(expected):
        with Image.open(out / f"photo-{number}.png") as picture:
            assert picture.mode == "RGBA" and picture.tobytes() == image.tobytes()
    assert edit(files, "--num", "6", "--seed", "3", drawn=drawn) == 0 and "nothing to do" in capsys.readouterr().out


def test_edit_checks_the_folder_again_under_the_lock(pipe, files, tmp_path):
    """Another process wrote the results of another seed after the options were checked."""
    edits = EditFolder(out=Path(files["out"]), pipeline=Path(files["pipeline"]), class_names=CLASSES, labels=None, image=Path(files["image"]),
                       drawn_by="mask", value=Path(files["mask"]), condition_images={}, num=1, num_tries=1, prompt=None, seed=7,
                       sampling=SamplingConfig(), dtype="float32")
    assert not edits.is_finished()
    assert edit(files, "--num", "1", "--seed", "8") == 0
    with pytest.raises(InputError, match="images of another request: --seed was 8, now 7"):
        write_edits(edits, "cpu")


def test_names_of_results_are_short_and_distinct(tmp_path):
    fields = {"out": tmp_path, "pipeline": tmp_path, "drawn_by": "keep", "value": "top", "condition_images": {}, "num": 2, "num_tries": 1,
              "prompt": None, "seed": 0, "sampling": SamplingConfig(), "dtype": "float32"}
    names = EditFolder(class_names=["a b", "a_b"], labels=[0, 1, 0], image=Path("photo.png"), **fields).names
    assert names == [f"photo_a_b-{number}.png" for number in range(6)]
    long = EditFolder(class_names=["c" * 210 + "1", "c" * 210 + "2"], labels=[0, 1], image=Path("p" * 210 + ".png"), **fields).names
    assert len(set(long)) == 4 and all(len(name) <= 230 for name in long)


def test_edit_says_what_priors_in_raster_order_do_not_see(raster_pipe, files, tmp_path, capsys):
    pipeline = saved_pipeline(tmp_path / "raster", raster_pipe)
    assert edit({**files, "pipeline": str(pipeline)}, "--num", "1") == 0
    assert "without seeing what is kept after it (to the right and below)" in capsys.readouterr().out
    with pytest.raises(InputError, match="--order is 'random', but the prior"):
        edit({**files, "pipeline": str(pipeline), "out": str(tmp_path / "random")}, "--order", "random")
    assert not (tmp_path / "random").exists()


def test_the_order_is_checked_before_the_image_is_encoded(raster_pipe, monkeypatch):
    monkeypatch.setattr(type(raster_pipe.tokenizer), "encode", lambda *_: pytest.fail("the image was encoded"))
    with pytest.raises(InputError, match="order is 'random', but the prior was trained in raster order"):
        raster_pipe.inpaint(random_image(raster_pipe), box_mask(raster_pipe, 0, 0, 8, 8), order="random")


@pytest.mark.parametrize(("change", "options", "words"), [
    ({}, ["--num", "0"], "--num is 0"), ({}, ["--num_tries", "0"], "--num_tries is 0"), ({}, ["--classes", "cow"], "no class 'cow'"),
    ({}, ["--prompt", "sea"], "not trained with captions"),
    ({"image": "missing.png"}, [], "image 'missing.png' does not exist"), ({}, ["--steps", "17"], "--steps is 17"),
])
def test_edit_refuses_invalid_options(files, change, options, words):
    with pytest.raises(InputError, match=words):
        edit(files | change, *options)
    assert not Path(files["out"]).exists()


def test_edit_refuses_a_mask_of_another_size(files, tmp_path):
    Image.new("L", (16, 8), 255).save(tmp_path / "small.png")
    with pytest.raises(InputError, match=r"the mask '.*small.png' is 16 x 8 pixels"):
        edit({**files, "mask": str(tmp_path / "small.png")})
    assert not Path(files["out"]).exists()
