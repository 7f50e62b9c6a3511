"""Paired images: finding them by name, missing and unreadable ones, training their tokenizer, and check-data."""

import dataclasses
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage1_tokenizer.conditions import condition_data
from stage1_tokenizer.conditions.condition_checks import check_condition_data
from stage1_tokenizer.conditions.condition_data import check_coverage, check_readable, identities, open_condition_data
from stage1_tokenizer.conditions.image_pairs import ImagePairs, OtherProportions, find_pairs
from stage1_tokenizer.data.check_data import check_data
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import ImageTransform, UnreadableImage
from tests.image_folders import names, write_classes
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import DataConfig


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_classes(tmp_path / "photos", {"cat": 10, "dog": 10})


@pytest.fixture
def maps(tmp_path, photos) -> Path:
    """Grey images, twice as large, with the same names in another format."""
    for path in photos.glob("*/*.png"):
        target = tmp_path / "maps" / path.relative_to(photos).with_suffix(".bmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("L")
        image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(target)
    return tmp_path / "maps"


def data_with(photos: Path, maps: Path, **fields) -> DataConfig:
    return DataConfig(path=str(photos), image_size=16, validation_fraction=0.2, max_unreadable=0.5,
                      conditions=[{"name": "maps", "kind": "paired_folder", "path": str(maps), **fields}])


def test_pairs_have_the_same_name_without_suffix(photos, maps):
    data = data_with(photos, maps, channels=1)
    for split in ("train", "validation"):
        source = getattr(open_splits(data), split)
        [condition] = open_condition_data(data, source, split)
        for index in range(len(source)):
            expected = Image.open(maps / Path(source.source_name(index)).with_suffix(".bmp"))
            assert condition.missing(index) is None and np.array_equal(np.asarray(condition.pairs.read(index)), np.asarray(expected))
    assert find_pairs(str(maps), data)["cat/003"] == "cat/003.bmp"


def test_pairs_can_be_read_at_full_depth(photos, maps, tmp_path):
    deep = tmp_path / "deep"
    for path in photos.glob("*/*.png"):
        target = deep / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 12), 40_001, np.uint16)).save(target)
    data = data_with(photos, deep, channels=1, value_range=[0, 65535])
    [condition] = open_condition_data(data, open_splits(data).train, "train")
    derived = dataclasses.replace(data, conditions=[], derived=data.given_conditions[0].derivation())
    transform = ImageTransform.from_recipe(derived)
    assert transform == ImageTransform(16, 1, (0, 65535))
    pixels = transform(condition.pairs.read(0))
    assert transform.to_stored_values(pixels[None]).round().unique().tolist() == [40_001], "all 16 bits"
    assert np.array_equal(transform(open_splits(derived).train.read(0)), pixels), "its tokenizer is trained on the same values"
    with pytest.raises(InputError, match=r"data\.value_range is .*, but 'maps' in data\.conditions has no value_range, .* 8 bits"):
        dataclasses.replace(data_with(photos, maps), value_range=[0, 65535])


def test_missing_and_unreadable_pairs_have_a_reason(photos, maps):
    data = data_with(photos, maps)
    source = open_splits(data).train
    first, second = names(source)[:2]
    (maps / first).with_suffix(".bmp").unlink()
    (maps / second).with_suffix(".bmp").write_bytes(b"no image")
    conditions = open_condition_data(data, source, "train")
    with pytest.raises(UnreadableImage, match=r"it has no pair \(condition 'maps'\)"):
        check_readable(conditions, 0)
    with pytest.raises(UnreadableImage):
        check_readable(conditions, 1)
    check_readable(conditions, 2)


def test_identity_covers_the_pairs_but_not_their_place(photos, maps, tmp_path):
    data = data_with(photos, maps)
    source = open_splits(data).train

    def identity(path: Path) -> dict:
        return identities(open_condition_data(data_with(photos, path), source, "train"))

    original = identity(maps)
    shutil.copytree(maps, tmp_path / "moved")
    assert identity(tmp_path / "moved") == original and original["maps"]["count"] == len(source)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "moved" / Path(source.source_name(0)).with_suffix(".bmp"))
    changed = identity(tmp_path / "moved")
    (tmp_path / "moved" / source.source_name(0)).with_suffix(".bmp").unlink()
    assert len({str(each) for each in (original, changed, identity(tmp_path / "moved"))}) == 3


def test_the_tokenizer_is_trained_on_the_pairs_of_each_split(photos, maps):
    (maps / "cat" / "000.bmp").unlink()
    data = data_with(photos, maps, channels=1)
    splits = open_splits(data)
    derived = dataclasses.replace(data, conditions=[], derived=data.given_conditions[0].derivation(), value_range=None)
    paired = open_splits(derived)
    assert ImageTransform.from_recipe(derived) == ImageTransform(16, 1)
    for split in ("train", "validation"):
        images, pairs = getattr(splits, split), getattr(paired, split)
        expected = {Path(name).with_suffix("").as_posix(): images.label(index) for index, name in enumerate(names(images)) if name != "cat/000.png"}
        assert {Path(name).with_suffix("").as_posix(): pairs.label(index) for index, name in enumerate(names(pairs))} == expected
        assert pairs.read(0).mode == "L"
    assert any("1 image is not used, because there is no pair" in note for note in paired.notes)


def test_pairs_that_were_unread_when_recorded_do_not_change_the_identity_later(photos, maps, tmp_path):
    source = open_splits(data_with(photos, maps)).train
    path = (maps / source.source_name(1)).with_suffix(".bmp")
    path.rename(tmp_path / "elsewhere.bmp")
    path.symlink_to(tmp_path / "gone.bmp")  # such as on a file system that is not mounted

    def opened():
        return open_condition_data(data_with(photos, maps), source, "train")

    recorded = identities(opened())
    assert recorded["maps"]["unread"] == [1]
    (tmp_path / "elsewhere.bmp").rename(tmp_path / "gone.bmp")
    assert identities(opened()) != recorded and "unread" not in identities(opened())["maps"]
    assert identities([opened()[0].as_recorded(recorded["maps"])]) == recorded


@pytest.mark.parametrize(("change", "message"), [
    (lambda photos, maps: (maps / "cat" / "000.png").write_bytes((photos / "cat" / "000.png").read_bytes()), "cat/000.bmp and cat/000.png"),
    (lambda photos, maps: shutil.move(maps, photos / "maps"), "which is not a folder"),
    (lambda photos, maps: [shutil.rmtree(maps), maps.mkdir()], "a folder without images"),
])
def test_unclear_folders_are_refused(change, message, photos, maps):
    change(photos, maps)
    data = data_with(photos, maps)
    with pytest.raises(InputError, match=message):
        check_condition_data(data)
        find_pairs(str(maps), data)


def test_pairs_need_a_folder_of_images_beside_them(photos, maps):
    with pytest.raises(InputError, match=r"data\.conditions\[0\]\.path is .*inside data\.path"):
        check_condition_data(data_with(photos, photos / "cat"))
    with pytest.raises(InputError, match="not files in a folder"):
        check_condition_data(DataConfig(source="digits", image_size=16, conditions=[{"name": "m", "kind": "paired_folder", "path": str(maps)}]))


def test_no_pairs_at_all(photos, maps):
    for path in maps.glob("*/*"):
        path.rename(path.with_name(f"x{path.name}"))
    data = data_with(photos, maps)
    with pytest.raises(InputError, match=r"no image of the train split has a pair in .*maps\. .*an image is cat/"):
        open_splits(dataclasses.replace(data, conditions=[], derived=data.given_conditions[0].derivation()))
    pairs = ImagePairs(open_splits(data).train, {"path": str(maps)}, data)
    assert pairs.indices == []


def test_check_data_names_what_is_missing(photos, maps):
    for number in range(4):
        (maps / "cat" / f"{number:03}.bmp").unlink()
    (maps / "dog" / "001.bmp").write_bytes(b"no image")
    Image.fromarray(np.zeros((9, 40), np.uint8)).save(maps / "dog" / "002.bmp")
    lines = []
    problems = check_data(data_with(photos, maps), lines.append)
    report = "\n".join(lines)
    assert {name for name, _ in problems} == {*(f"cat/{number:03}.png" for number in range(4)), "dog/001.png", "dog/002.png"}
    assert "it has no pair: cat/00" in report and "its pair is unreadable" in report
    assert "1 image is not used, because the pair has other proportions than the image" in report and "part: dog/002.png" in report


def test_check_data_names_pairs_without_an_image_and_shared_pairs(photos, maps):
    (maps / "dog" / "003.bmp").rename(maps / "dog" / "003_map.bmp")
    with Image.open(photos / "cat" / "000.png") as image:
        image.save(photos / "cat" / "000.bmp")
    lines = []
    check_data(data_with(photos, maps), lines.append)
    [unused] = [line for line in lines if "to no image" in line]
    assert unused.startswith("condition maps: 1 paired image belongs to no image") and unused.endswith(": dog/003_map.bmp")
    [shared] = [line for line in lines if "same pair" in line]
    assert {"cat/000.bmp", "cat/000.png"} <= set(shared.replace(",", "").split()), shared


def test_accents_may_be_characters_of_their_own(photos, maps):
    (photos / "cat" / "000.png").rename(photos / "cat" / unicodedata.normalize("NFC", "caf\u00e9.png"))
    (maps / "cat" / "000.bmp").rename(maps / "cat" / unicodedata.normalize("NFD", "caf\u00e9.bmp"))
    lines = []
    assert check_data(data_with(photos, maps), lines.append) == [] and not any("to no image" in line for line in lines)


def test_pairs_of_other_proportions_are_refused_before_a_run(photos, maps):
    data = data_with(photos, maps)
    assert check_coverage(data) == []
    for path in maps.glob("*/*"):
        Image.fromarray(np.zeros((30, 10), np.uint8)).save(path)
    with pytest.raises(InputError, match=r"\(maps\): \d+ of the \d+ pairs of the train split .* have other proportions .*10 x 30 pixels, the image"):
        check_coverage(data)
    source = open_splits(data).train
    with pytest.raises(UnreadableImage, match="other proportions"):
        check_readable(open_condition_data(data, source, "train"), 0)


def test_few_pairs_of_other_proportions_in_the_checked_ones_give_a_warning(photos, maps, monkeypatch):
    monkeypatch.setattr(condition_data, "CHECKED_PAIRS", 4)
    data = dataclasses.replace(data_with(photos, maps), max_unreadable=0.2)
    source = open_splits(data).train
    pairs = open_condition_data(data, source, "train")[0].pairs
    wrong = [maps / Path(source.source_name(index)).with_suffix(".bmp") for index in pairs.indices[::-(-len(pairs.indices) // 4)]]
    assert len(source) == 14 and len(wrong) == 4
    for number, path in enumerate(wrong):
        Image.fromarray(np.zeros((30, 10), np.uint8)).save(path)
        if number == 1:  # 2 of 14 are allowed, although 2 of the 4 that are checked are more than a fifth
            [warning] = check_coverage(data)
            assert "(maps): 2 of the 4 pairs of the train split that were checked have other proportions" in warning
    with pytest.raises(InputError, match="4 of the 4 pairs"):
        check_coverage(data)


def test_many_pairs_of_other_proportions_are_refused_although_the_whole_source_may_have_more():
    assert condition_data.is_larger_fraction(200, 200, 0.01) and condition_data.is_larger_fraction(20, 200, 0.01)
    assert not any(condition_data.is_larger_fraction(found, 200, 0.01) for found in (0, 1, 3, 8))
    assert not condition_data.is_larger_fraction(110, 200, 0.5) and condition_data.is_larger_fraction(200, 200, 0.5)


def test_proportions_may_differ_by_rounding(photos, maps):
    pairs = ImagePairs(open_splits(data_with(photos, maps)).train, {"path": str(maps)}, data_with(photos, maps))
    width, height = pairs.read(0).size
    pairs.read(0, (3 * width + 1, 3 * height))
    with pytest.raises(OtherProportions):
        pairs.read(0, (3 * width + 4, 3 * height))


def test_check_data_lists_the_first_ten(photos, maps):
    for path in maps.glob("*/*"):
        if path.name != "005.bmp":
            path.unlink()
    lines = []
    check_data(data_with(photos, maps), lines.append)
    line = next(line for line in lines if line.startswith("train, condition maps") and "not used" in line)
    assert line.count(".png") == 10 and line.endswith("...")
