"""Image sizes with two numbers, [height, width]: recipes and their checks, crops, views, rules that choose fields, and batches."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from pipelines.decoded_images import tokenizer_batch_size
from pipelines.image_folders.png_files import is_whole_png, png_header
from pipelines.image_folders.write_images import grid_rows
from pipelines.sweep.feature_extractors import load_feature_extractor
from pipelines.sweep.feature_file import resolve_feature_file
from stage1_tokenizer.data.check_data import check_data
from stage1_tokenizer.data.image_batches import TrainingImages, ValidationImages
from stage1_tokenizer.data.image_cache import resized_megabytes
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import ImageTransform, as_batches, to_tensor
from stage1_tokenizer.image_files.views import View, named_views
from stage1_tokenizer.pictures import viewing_scale
from stage1_tokenizer.tokenizer import ImageTokenizer
from tests.image_folders import write_image
from tests.tiny import fields_of, tiny_recipe
from vqmosaic.errors import InputError
from vqmosaic.recipes.fields_from_data import DataSize, describe_choices
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe, save_recipe
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.recipes.tokenizer_sections import AdversarialConfig, TokenizerConfig
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.runs.stage_records import decide_action, write_record


def noise(width: int, height: int) -> Image.Image:
    """Random pixels in colour."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- recipes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "stored"), [("64", 64), ("[64,64]", 64), ("[32,64]", [32, 64]), ("[48, 16]", [48, 16])])
def test_recipe_stores_one_number_or_height_and_width(given, stored, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", data__image_size=given)
    assert recipe.data.image_size == stored
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]["image_size"] == stored
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_number_of_tokens_uses_both_sides(tmp_path):
    assert tiny_recipe(tmp_path, data__image_size="[32,64]").num_tokens == 8 * 16
    assert tiny_recipe(tmp_path, data__image_size="[48,16]").num_tokens == 12 * 4
    assert Recipe(data=DataConfig(image_size=(32, 64))).data.image_size == [32, 64], "a tuple becomes a list"


@pytest.mark.parametrize(("given", "words"), [
    ("[32]", ["data.image_size is [32]", "two integers, [height, width]"]), ("[]", ["data.image_size is []"]),
    ("[32,64,3]", ["data.image_size is [32, 64, 3]", "two integers"]), ("[32,6.5]", ["data.image_size", "[32, 6.5]", "an integer or a list"]),
    ("wide", ["data.image_size", "'wide'", "an integer or a list"]), ("[32,true]", ["data.image_size", "integer"]),
    ("[8,64]", ["data.image_size: the height is 8", "at least 16"]), ("[32,5000]", ["data.image_size: the width is 5000", "at most 4096"]),
    ("[32,66]", ["data.image_size is [32, 66]", "its width must be a multiple of 4", "set data.image_size to [32, 64]"]),
    ("[30,64]", ["data.image_size is [30, 64]", "its height must be a multiple of 4", "set data.image_size to [32, 64]"]),
    ("[30,66]", ["its height and its width must be a multiple of 4"]), ("[33,32]", ["set data.image_size to 32"]),
])
def test_sizes_that_do_not_fit_are_refused_with_the_side(given, words, tmp_path):
    with pytest.raises(InputError) as error:
        tiny_recipe(tmp_path, data__image_size=given)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("given", [[32, 64.5], [32, "64"], [32, None], "64", None, [True, 64], 64.0])
def test_sizes_that_are_not_integers_are_refused_in_python(given):
    with pytest.raises(InputError, match=r"image_size.*integer"):
        DataConfig(image_size=given)
    with pytest.raises(InputError, match=r"image_size.*integer"):
        ImageTransform(given)


def test_patch_size_must_divide_both_sides(tmp_path):
    with pytest.raises(InputError, match=r"data.image_size is \[64, 48\].*tokenizer.patch_size 8, its width must be a multiple of 32"):
        tiny_recipe(tmp_path, data__image_size="[64,48]", tokenizer__patch_size=8)
    with pytest.raises(InputError, match=r"image_size is \[32, 66\].*its width must be a multiple of 4"):
        ImageTokenizer(TokenizerConfig(channels=32), ImageTransform((32, 66)))


def test_shifts_are_limited_by_the_side_along_which_they_move(tmp_path):
    def load(**changes):
        return tiny_recipe(tmp_path, data__image_size="[32,64]", **changes)

    load(tokens__views="[{shift: [20, 0]}, {shift: [0, 15]}]")
    with pytest.raises(InputError, match=r"tokens.views\[0\].shift: an entry is 20; it must be above -16"):
        load(tokens__views="[{shift: [0, 20]}]")
    with pytest.raises(InputError, match=r"tokens.views\[0\].shift: an entry is 32; it must be above -32"):
        load(tokens__views="[{shift: [32, 0]}]")
    for field in ("data__shift", "tokens__view_shift"):
        with pytest.raises(InputError, match=rf"{field.replace('__', '.')}.* is 16; it must be .*below 16"):
            load(**{field: 16})


def test_discriminator_must_fit_the_short_side():
    fields = {"tokenizer": TokenizerConfig(channels=32), "adversarial": AdversarialConfig(weight=0.1, layers=3)}
    Recipe(data=DataConfig(image_size=[24, 64]), **fields)
    with pytest.raises(InputError, match=r"adversarial.layers is 3.*a width of 16 \(data.image_size \[64, 16\]\)"):
        Recipe(data=DataConfig(image_size=[64, 16]), **fields)


def test_records_compare_sizes(tmp_path):
    run = RunFolder(tmp_path / "run")
    recipe = tiny_recipe(run.root, data__image_size="[32,64]")
    write_record(run, recipe, "tokenizer", {}, finished=False)
    assert json.loads(run.record("tokenizer").read_text())["fields"]["data.image_size"] == [32, 64]
    assert decide_action(run, recipe, "tokenizer", {}) == "resume"
    with pytest.raises(InputError, match=r"data.image_size = \[32, 64\], now it is \[64, 32\]"):
        decide_action(run, tiny_recipe(run.root, data__image_size="[64,32]"), "tokenizer", {})


@pytest.mark.parametrize(("size", "grid", "shift"), [
    ("[32,64]", (8, 16), 2), ("[64,32]", (16, 8), 2), ("[48,16]", (12, 4), 1), ("[128,256]", (16, 32), 8),
])
def test_rules_choose_a_grid_that_fits_both_sides(size, grid, shift):
    recipe = load_recipe("image_folder", ["--data.path=photos", f"--data.image_size={size}"], count_images=lambda fields: DataSize(1000))
    assert recipe.grid_sides == grid and recipe.data.shift == shift and recipe.tokens.view_shift >= 1
    expected = f"{size.strip('[]').replace(',', ' x ')} pixels make {grid[0]} x {grid[1]} tokens"
    described = describe_choices(recipe, "tokenizer", DataSize(1000), on_gpu=False)
    assert expected in described["tokenizer.patch_size"]
    assert f"{1000 * grid[0] * grid[1]:,} tokens" in described["tokenizer.codebook_size"]


def test_rules_refuse_sides_without_a_common_power_of_two():
    with pytest.raises(InputError, match=r"data.image_size is \[250, 64\], which makes 125 x 32 tokens.*both sides.*such as \[256, 64\]"):
        load_recipe("image_folder", ["--data.path=photos", "--data.image_size=[250,64]"])
    with pytest.raises(InputError, match=r"data.image_size: the height is 0"):
        load_recipe("image_folder", ["--data.path=photos", "--data.image_size=[0,64]"])


# --- crops and views ---------------------------------------------------------------------------------------------------------


def test_transform_is_stored_as_one_number_or_a_list():
    wide = ImageTransform([32, 64])
    assert wide == ImageTransform((32, 64)) != ImageTransform((64, 32)) and hash(wide) == hash(ImageTransform((32, 64)))
    assert (wide.image_size, wide.sides, wide.shape) == ((32, 64), (32, 64), (3, 32, 64))
    assert json.loads(json.dumps(wide.to_dict())) == {"image_size": [32, 64], "channels": 3, "resampling": "bicubic"}
    assert ImageTransform.from_dict(wide.to_dict()) == wide
    square = ImageTransform((32, 32))
    assert square == ImageTransform(32) and square.image_size == square.to_dict()["image_size"] == 32


def test_largest_crop_with_the_proportions_of_the_result_is_resized():
    exact, tall, wide, large = noise(64, 32), noise(64, 128), noise(100, 32), noise(128, 64)
    transform = ImageTransform((32, 64))
    assert np.array_equal(transform.resize(exact), np.asarray(exact))
    assert np.array_equal(transform.resize(tall), np.asarray(tall)[48:80]), "full width, centre rows"
    assert np.array_equal(transform.resize(wide), np.asarray(wide)[:, 18:82]), "full height, centre columns"
    assert np.array_equal(transform.resize(large), np.asarray(large.resize((64, 32), Image.Resampling.BICUBIC)))
    assert np.array_equal(transform.resize(tall, View(y=1.0)), np.asarray(tall)[96:])
    assert np.array_equal(transform.resize(large, View(crop_scale=0.5, x=1.0, y=0.0)), np.asarray(large)[:32, 64:])
    assert np.array_equal(ImageTransform((48, 16)).resize(noise(16, 60)), np.asarray(noise(16, 60))[6:54])


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1), (101, 100), (33, 500), (64, 32), (2, 3)])
@pytest.mark.parametrize("result", [(32, 64), (48, 16), (16, 512)])
def test_shape_of_the_result_does_not_depend_on_the_image(size, result):
    for view in (View(), View(x=1.0, y=1.0), View(crop_scale=0.05, x=0.0, y=1.0), View(crop_scale=0.37, flip=True, shift_x=3)):
        assert ImageTransform(result)(noise(*size), view).shape == (3, *result)


def test_flips_and_shifts_have_the_right_axes():
    image, transform = noise(64, 32), ImageTransform((32, 64))
    pixels = np.asarray(image)
    assert np.array_equal(transform.resize(image, View(flip=True)), pixels[:, ::-1])
    right = transform.resize(image, View(shift_x=20))
    assert np.array_equal(right[:, 20:], pixels[:, :-20]) and (right[:, :20] == pixels[:, :1]).all()
    down = transform.resize(image, View(shift_y=10))
    assert np.array_equal(down[10:], pixels[:-10]) and (down[:10] == pixels[:1]).all()
    views = [*named_views("flip+shifts", 3), *named_views("ten-crop", crop_scale=0.5)]
    assert np.array_equal(transform.resize_views(image, views), [transform.resize(image, view) for view in views])


def test_ten_crop_takes_the_corners():
    image = noise(128, 64)
    crops, pixels = ImageTransform((32, 64)).resize_views(image, named_views("ten-crop", crop_scale=0.5)), np.asarray(image)
    for number, (top, left) in enumerate([(16, 32), (0, 0), (0, 64), (32, 0), (32, 64)]):
        expected = pixels[top:top + 32, left:left + 64]
        assert np.array_equal(crops[number], expected) and np.array_equal(crops[number + 5], expected[:, ::-1])


def test_tensors_must_have_the_height_and_width_of_the_transform():
    transform = ImageTransform((32, 64))
    assert next(as_batches(torch.zeros(2, 3, 32, 64), transform, 4)).shape == (2, 3, 32, 64)
    with pytest.raises(InputError, match=r"tensor \(B, 3, 32, 64\)"):
        next(as_batches(torch.zeros(2, 3, 64, 32), transform, 4))
    tokenizer = ImageTokenizer(TokenizerConfig(channels=32, channel_multipliers=[1, 1], residual_blocks=0), transform).eval()
    with pytest.raises(InputError, match=r"takes \(B, 3, 32, 64\)"):
        tokenizer.encode(torch.zeros(1, 3, 64, 32))


def test_fingerprints_of_square_sizes_are_those_of_version_0_2_0():
    tokenizer = ImageTokenizer(TokenizerConfig(channels=32, residual_blocks=1), ImageTransform((32, 32)))
    with torch.no_grad():
        for tensor in tokenizer.state_dict().values():
            tensor.fill_(1)
    assert tokenizer.fingerprint_of_tokens() == "2b4630304b466a974ce56569b8dd1cf55c0bf765b0c04631b7963c4d70d5f1b6"


# --- data --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Photos of three shapes. The two of 40 x 30 pixels are smaller than [32, 64]."""
    for number, size in enumerate([(64, 32), (64, 32), (128, 70), (40, 30), (40, 30), (70, 128)] * 4):
        write_image(tmp_path / "photos" / f"{number}.png", number % 6, size)
    return tmp_path / "photos"


@pytest.mark.parametrize("augmentation", [{}, {"flip": True, "shift": 3}, {"crop_scale": 0.5}])
def test_batches_have_the_recipe_size(photos, augmentation):
    data = DataConfig(path=str(photos), image_size=[32, 64], workers=0, validation_fraction=0.3, **augmentation)
    splits, transform = open_splits(data), ImageTransform(data.image_size)
    batch = next(TrainingImages(splits.train, transform, data, 0).batches(0, 4))
    assert batch.images_BCHW.shape == (4, 3, 32, 64)
    source = splits.validation
    images_BCHW, _ = next(ValidationImages(source, transform, limit=2).batches(batch_size=2))
    expected = [transform.resize(source.read(index)) for index in range(len(source))]
    assert any(torch.equal(images_BCHW[0], to_tensor(pixels)) for pixels in expected)
    assert resized_megabytes(512, transform) == 3


def test_check_data_counts_images_that_are_enlarged(photos):
    lines: list[str] = []
    check_data(DataConfig(path=str(photos), image_size=[32, 64], validation_split=None), lines.append)
    assert any("smaller than data.image_size = [32, 64] and will be enlarged" in line for line in lines)
    lines.clear()
    check_data(DataConfig(path=str(photos), image_size=[30, 40]), lines.append)
    assert not any("enlarged" in line for line in lines), "all photos are at least 30 high and 40 wide"


# --- files and pictures ------------------------------------------------------------------------------------------------------


def test_png_header_has_width_before_height(tmp_path):
    noise(64, 32).save(tmp_path / "wide.png")
    assert is_whole_png(tmp_path / "wide.png", png_header((32, 64), 3)) and not is_whole_png(tmp_path / "wide.png", png_header((64, 32), 3))
    noise(32, 32).save(tmp_path / "square.png")
    assert is_whole_png(tmp_path / "square.png", png_header(32, 3))


def test_pictures_and_batches_use_both_sides():
    assert [viewing_scale(size) for size in (16, (16, 16), (16, 32), (32, 16), (32, 64), (16, 256))] == [4, 4, 2, 2, 1, 1]
    assert tokenizer_batch_size((128, 512)) == tokenizer_batch_size(256) == 8
    rows = grid_rows(1000, 16, (256, 1024))
    assert len(rows) == 16 and len(rows[0]) == 4
    assert [len(row) for row in grid_rows(1000, 16, (1024, 256))] == [16] * 4


class Columns(nn.Module):
    """The mean of each column of uint8 images: as many features as the images are wide."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.double().mean(dim=[1, 2])


def test_feature_extractors_are_checked_on_images_of_the_pipeline_size(tmp_path):
    torch.jit.script(Columns()).save(tmp_path / "columns.pt")
    file = resolve_feature_file(tmp_path / "columns.pt", None)
    assert load_feature_extractor(file, (32, 64), torch.device("cpu")).num_features == 64


def test_fields_of_other_sections_do_not_change_with_the_size(tmp_path):
    square, wide = (fields_of(tiny_recipe(tmp_path, data__image_size=size)) for size in ("32", "[32,64]"))
    assert {name for name in square if square[name] != wide[name]} == {"data.image_size"}
