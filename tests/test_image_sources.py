"""Images from the digits, folders and Hugging Face data: names, labels, splits, and words for what cannot be used."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage1_tokenizer.check_data import check_data
from stage1_tokenizer.data_location import check_data_path, resolve_source
from stage1_tokenizer.image_sources import ImageSource, cut_validation, open_splits, refuse_if_too_many_unreadable
from stage1_tokenizer.images import UnreadableImage
from vqmosaic.errors import InputError
from vqmosaic.recipe_sections import DataConfig

ROOT = Path(__file__).parents[1]


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (9, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def write_classes(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for number in range(count):
            write_image(folder / name / f"{number:03}.png", seed=len(name) * 1000 + number)
    return folder


def contents(source: ImageSource) -> dict[str, tuple[int | None, bytes]]:
    return {source.source_name(index): (source.label(index), source.read(index).tobytes()) for index in range(len(source))}


def names(source: ImageSource) -> list[str]:
    return [source.source_name(index) for index in range(len(source))]


# --- where the images are ----------------------------------------------------------------------------------------------------


def test_source_is_told_by_looking(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "photos", {"cat": 1, "dog": 1})
    (tmp_path / "tables" / "data").mkdir(parents=True)
    (tmp_path / "tables" / "README.md").write_text("words")
    (tmp_path / "tables" / "data" / "train-0.parquet").write_bytes(b"")
    assert resolve_source(DataConfig(source="digits")) == "digits"
    assert resolve_source(DataConfig(path="photos")) == "folder"
    assert resolve_source(DataConfig(path="tables")) == resolve_source(DataConfig(path="tables/data")) == "huggingface"
    assert resolve_source(DataConfig(path="tables/data/train-0.parquet")) == "huggingface"
    assert resolve_source(DataConfig(path="cifar10")) == resolve_source(DataConfig(path="uoft-cs/cifar10")) == "huggingface"
    assert resolve_source(DataConfig(path="photos", source="huggingface")) == "huggingface"
    for path in ("./photoz", "../photos", "~/no/such", "/no/such", "a/b/c", "photos/cats"):
        with pytest.raises(InputError, match="does not exist"):
            resolve_source(DataConfig(path=path))
    with pytest.raises(InputError, match="Did you mean 'photos'"):
        resolve_source(DataConfig(path="./photoz"))
    with pytest.raises(InputError, match="which is a file"):
        resolve_source(DataConfig(path="tables/README.md"))
    with pytest.raises(InputError, match=r"data.path is not given.*digits"):
        resolve_source(DataConfig())


def test_paths_are_checked_before_anything_slow(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("a")
    with pytest.raises(InputError, match="without images"):
        check_data_path(DataConfig(path=str(tmp_path / "words")))
    with pytest.raises(InputError, match="does not exist"):
        check_data_path(DataConfig(path=str(tmp_path / "gone"), source="folder"))
    with pytest.raises(InputError, match="does not exist"):
        check_data_path(DataConfig(path=str(tmp_path / "gone"), source="huggingface"))
    assert check_data_path(DataConfig(source="digits")) == "digits"


def run_python(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
                              timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_a_folder_run_loads_no_data_set_library(tmp_path):
    folder = write_classes(tmp_path / "photos", {"cat": 3, "dog": 3})
    code = """if True:
        import sys
        from stage1_tokenizer.data_location import check_data_path
        from vqmosaic.recipe_sections import DataConfig
        data = DataConfig(path=sys.argv[1], cache_megabytes=int(sys.argv[2]))
        check_data_path(data)
        assert not {"torch", "numpy", "PIL", "datasets", "sklearn"} & set(sys.modules), "paths are checked before slow imports"
        from stage1_tokenizer.image_batches import TrainingImages
        from stage1_tokenizer.image_sources import open_splits
        from stage1_tokenizer.images import ImageTransform
        batches = TrainingImages(open_splits(data).train, ImageTransform(16), data, 0).batches(0, 4)
        print(next(batches).images_BCHW.shape)
        assert not {"datasets", "pyarrow", "sklearn", "pandas"} & set(sys.modules)
        """
    assert "[4, 3, 16, 16]" in run_python(code, str(folder), "16")
    # workers that are still running when the interpreter ends must neither hang it nor outlive it
    started = time.monotonic()
    run_python(code, str(folder), "0")
    assert time.monotonic() - started < 20


# --- the cut -----------------------------------------------------------------------------------------------------------------


def test_the_cut_is_stable_when_images_are_added():
    data = DataConfig(source="digits", validation_fraction=0.2)
    few = [f"a/{number}.png" for number in range(0, 1000, 2)]
    many = sorted(few + [f"a/{number}.png" for number in range(1, 1000, 2)])
    held_out = {}
    for listed in (few, many):
        train, validation, how = cut_validation(listed, None, data)
        assert sorted([*train, *validation]) == list(range(len(listed)))
        assert 0.15 < len(validation) / len(listed) < 0.25 and "hash of path" in how and str(len(validation)) in how
        held_out[len(listed)] = {listed[index] for index in validation}
    assert held_out[1000] & set(few) == held_out[500]


def test_the_cut_leaves_something_on_both_sides():
    for fraction in (1e-6, 0.999999):
        data = DataConfig(source="digits", validation_fraction=fraction)
        for labels in (None, ["cat"] * 5 + ["dog"], list(range(6))):
            train, validation, _ = cut_validation(range(6), labels, data)
            assert len(train) and len(validation) and len(train) + len(validation) == 6
            if labels and len(set(labels)) == 2:
                assert {labels[index] for index in train} == {"cat", "dog"}, "no class loses its last training image"
    with pytest.raises(InputError, match="at least 2"):
        cut_validation(["a.png"], None, DataConfig(source="digits"))


# --- digits ------------------------------------------------------------------------------------------------------------------


def test_digits():
    data = DataConfig(source="digits", channels=1)
    splits = open_splits(data)
    assert len(splits.train) + len(splits.validation) == 1797 and splits.class_names == [str(digit) for digit in range(10)]
    assert "row number" in splits.how and not set(names(splits.train)) & set(names(splits.validation))
    image = splits.train.read(0)
    assert image.size == (8, 8) and image.mode == "L" and max(np.asarray(splits.train.read(index)).max() for index in range(50)) == 255
    assert splits.train.identity == open_splits(data).train.identity != splits.validation.identity
    assert open_splits(DataConfig(source="digits")).train.read(0).mode == "RGB"
    assert open_splits(DataConfig(source="digits", use_labels=False)).class_names is None


# --- folders -----------------------------------------------------------------------------------------------------------------


def test_folder_with_classes(tmp_path):
    folder = write_classes(tmp_path, {"dog": 30, "cat": 30, "a cat": 2})
    write_image(folder / "dog" / "deeper" / "UPPER.JPG")
    write_image(folder / ".hidden" / "a.png")
    write_image(folder / "dog" / ".hidden.png")
    (folder / "notes.txt").write_text("no image")
    splits = open_splits(DataConfig(path=str(folder), validation_fraction=0.2))
    assert splits.class_names == ["a cat", "cat", "dog"]
    every = contents(splits.train) | contents(splits.validation)
    assert len(every) == len(splits.train) + len(splits.validation) == 63 and "cut" in splits.how
    assert names(splits.train) == sorted(names(splits.train))
    assert every["dog/deeper/UPPER.JPG"][0] == 2 and every["cat/000.png"][0] == 1
    assert every["cat/000.png"][1] == Image.open(folder / "cat" / "000.png").tobytes()
    identity = splits.train.identity
    assert set(identity) == {"kind", "path", "split", "count", "sha256"} and identity["count"] == len(splits.train)
    write_image(folder / splits.train.source_name(0), seed=77, size=(20, 20))
    assert open_splits(DataConfig(path=str(folder), validation_fraction=0.2)).train.identity["sha256"] != identity["sha256"]
    assert contents(pickle.loads(pickle.dumps(splits.train))) == contents(splits.train)  # its own, made here: so DataLoader sends it to workers


def test_folder_without_classes(tmp_path):
    for number in range(10):
        write_image(tmp_path / f"{number}.png", number)
    os.symlink(tmp_path / "gone.png", tmp_path / "dead.png")
    os.symlink(tmp_path, tmp_path / "loop")
    splits = open_splits(DataConfig(path=str(tmp_path)))
    assert splits.class_names is None and splits.train.label(0) is None
    assert len(splits.train) + len(splits.validation) == 11
    source = next(source for source in (splits.train, splits.validation) if "dead.png" in names(source))
    with pytest.raises(UnreadableImage, match="No such file"):
        source.read(names(source).index("dead.png"))
    assert splits.train.identity["sha256"]


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "test"])
def test_split_sub_folders(tmp_path, validation):
    write_classes(tmp_path / "train", {"cat": 3, "dog": 2})
    write_classes(tmp_path / validation, {"dog": 2})
    splits = open_splits(DataConfig(path=str(tmp_path)))
    assert splits.class_names == splits.validation.class_names == ["cat", "dog"] and validation in splits.how
    assert names(splits.validation) == [f"{validation}/dog/000.png", f"{validation}/dog/001.png"]
    assert [splits.validation.label(index) for index in range(2)] == [1, 1] and len(splits.train) == 5
    assert (splits.train.identity["split"], splits.validation.identity["split"]) == ("train", validation)


def test_split_names_are_chosen_and_checked(tmp_path):
    write_classes(tmp_path / "train", {"cat": 30, "dog": 30})
    alone = open_splits(DataConfig(path=str(tmp_path)))
    assert alone.class_names == ["cat", "dog"] and "cut" in alone.how and len(alone.train) + len(alone.validation) == 60
    write_classes(tmp_path / "held-out", {"cat": 2})
    with pytest.raises(InputError, match="may be a split or a class"):
        open_splits(DataConfig(path=str(tmp_path)))
    assert open_splits(DataConfig(path=str(tmp_path), train_split=".")).class_names == ["held-out", "train"]
    swapped = open_splits(DataConfig(path=str(tmp_path), train_split="train", validation_split="held-out"))
    assert len(swapped.validation) == 2
    with pytest.raises(InputError, match=r"data.validation_split is 'heldout'.*Did you mean 'held-out'"):
        open_splits(DataConfig(path=str(tmp_path), validation_split="heldout"))
    with pytest.raises(InputError, match=r"data.train_split is 'trian'.*Did you mean 'train'"):
        open_splits(DataConfig(path=str(tmp_path), train_split="trian"))
    with pytest.raises(InputError, match="both 'train'"):
        open_splits(DataConfig(path=str(tmp_path), validation_split="train"))


def test_folders_that_leave_doubts(tmp_path):
    write_classes(tmp_path / "mixed", {"cat": 2})
    write_image(tmp_path / "mixed" / "top.png")
    with pytest.raises(InputError, match=r"both at the top.*'top.png'.*'cat'.*use_labels false"):
        open_splits(DataConfig(path=str(tmp_path / "mixed")))
    unlabelled = open_splits(DataConfig(path=str(tmp_path / "mixed"), use_labels=False))
    assert unlabelled.class_names is None and len(unlabelled.train) + len(unlabelled.validation) == 3
    write_classes(tmp_path / "new" / "train", {"cat": 2})
    write_classes(tmp_path / "new" / "val", {"cat": 1, "dog": 1})
    with pytest.raises(InputError, match="class 'dog' has images in 'val' but none in 'train'"):
        open_splits(DataConfig(path=str(tmp_path / "new")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="without images"):
        open_splits(DataConfig(path=str(tmp_path / "empty")))


# --- check-data --------------------------------------------------------------------------------------------------------------


def test_check_data_names_what_is_unreadable(tmp_path):
    folder = write_classes(tmp_path, {"cat": 20, "dog": 20})
    (folder / "dog" / "003.png").write_bytes(b"junk")
    (folder / "cat" / "big.jpg").write_bytes(b"")
    write_image(folder / "cat" / "wide.png", size=(50, 8))
    lines = []
    found = check_data(DataConfig(path=str(folder)), lines.append)
    assert dict(found) == {"dog/003.png": "not an image of a known format, or its header is corrupt", "cat/big.jpg": "the file is empty"}
    said = "\n".join(lines)
    for words in ("2 classes: cat", "from 9 x 8 to 50 x 8 pixels", "40 of 42 images are readable", "hash of path"):
        assert words in said


def test_check_data_counts_exact_duplicates_inside_and_across_splits(tmp_path):
    def write(name: str, value: int) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(tmp_path / name)

    for number in range(6):
        write(f"train/cat/{number}.png", number)
    for number in range(3):
        write(f"val/cat/{number}.png", 10 + number)
    lines = []
    check_data(DataConfig(path=str(tmp_path)), lines.append)
    assert [line for line in lines if "duplicate" in line] == ["duplicates: none, no two images have the same pixels"]
    write("train/cat/copy.bmp", 1)  # another file with the same pixels
    write("val/cat/seen.png", 2)
    write("val/cat/seen twice.png", 2)
    write("val/cat/again.png", 10)
    lines.clear()
    check_data(DataConfig(path=str(tmp_path)), lines.append)
    said = [line for line in lines if "duplicate" in line]
    assert said[0].startswith("duplicates: 4 images have exactly the pixels of another one; 2 of the images to validate on are among those")
    assert said[1:] == ["duplicates: train/cat/2.png (train) = val/cat/seen twice.png (validation) = val/cat/seen.png (validation)",
                        "duplicates: train/cat/1.png (train) = train/cat/copy.bmp (train)",
                        "duplicates: val/cat/0.png (validation) = val/cat/again.png (validation)"]


def test_check_data_lists_a_few_duplicates_however_many_there_are(tmp_path):
    for number in range(40):
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), number // 4, dtype=np.uint8)).save(tmp_path / f"cat/{number}.png")
    lines = []
    check_data(DataConfig(path=str(tmp_path)), lines.append)
    said = [line for line in lines if "duplicate" in line]
    assert len(said) == 7 and said[0].startswith("duplicates: 30 images") and all("and 1 more" in line for line in said[1:6])
    assert said[-1] == "duplicates: and 5 more groups"


def test_the_share_of_unreadable_images_has_a_limit():
    data = DataConfig(source="digits", max_unreadable=0.1)
    refuse_if_too_many_unreadable({"a": "empty"}, 3, data)
    refuse_if_too_many_unreadable({str(number): "empty" for number in range(10)}, 100, data)
    with pytest.raises(InputError, match=r"11 of 100.*data.max_unreadable = 0.1.*0 \(empty\).*check-data"):
        refuse_if_too_many_unreadable({str(number): "empty" for number in range(11)}, 100, data)
    with pytest.raises(InputError):
        refuse_if_too_many_unreadable({"a": "empty"}, 3, DataConfig(source="digits", max_unreadable=0.0))
