"""Hugging Face data sets: the same images as from a folder, labels, paths, fingerprints, and error messages."""

import dataclasses
import pickle
import time
from pathlib import Path

import pytest
from PIL import Image

from stage1_tokenizer.data.check_data import check_data
from stage1_tokenizer.data.open_data import open_splits
from tests.image_folders import contents, names, write_classes, write_image
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import DataConfig


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The datasets library, with its cache in a temporary folder."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return library


def write_parquet(path: Path, files: list[Path], labels: list, datasets, **label_feature) -> None:
    """Write a table of images and labels. `label_feature` is one pair: the name of the label column and its feature."""
    [label_column] = label_feature
    features = datasets.Features({"image": datasets.Image(), **label_feature})
    rows = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], label_column: labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def test_parquet_gives_the_same_images_as_a_folder(tmp_path, datasets):
    folder = write_classes(tmp_path / "photos", {"cat": 6, "dog": 5})
    files = sorted(folder.rglob("*.png"))
    labels = [["cat", "dog"].index(file.parent.name) for file in files]
    feature = datasets.ClassLabel(names=["cat", "dog"])
    write_parquet(tmp_path / "tables" / "train-00000-of-00001.parquet", files, labels, datasets, y=feature)
    write_parquet(tmp_path / "tables" / "test-00000-of-00001.parquet", files[:3], labels[:3], datasets, y=feature)
    before = sorted(path.name for path in (tmp_path / "tables").iterdir())
    data = DataConfig(path=str(tmp_path / "tables"))
    splits = open_splits(data)
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == before, "nothing is written to the data folder"
    assert splits.class_names == ["cat", "dog"] and "'test'" in splits.validation_origin and len(splits.validation) == 3
    assert names(splits.train) == [str(row) for row in range(11)]
    from_folder = open_splits(DataConfig(path=str(folder)))
    expected = contents(from_folder.train) | contents(from_folder.validation)
    assert list(contents(splits.train).values()) == [expected[file.relative_to(folder).as_posix()] for file in files]
    assert "_column" in vars(splits.train) and "_column" not in splits.train.__getstate__(), "pickled sources contain no images"
    # DataLoader pickles a source to send it to workers. This pickle is made here, so loading it is safe.
    assert contents(pickle.loads(pickle.dumps(splits.train))) == contents(splits.train)

    seen, moved = contents(splits.train), tmp_path / "moved"
    (tmp_path / "tables").rename(moved)
    identity = open_splits(DataConfig(path=str(moved))).train.identity
    assert identity == splits.train.identity, "the digest depends on the images, not on their location"
    held_out = open_splits(DataConfig(path=str(moved / "train-00000-of-00001.parquet"), validation_fraction=0.3))
    assert "row number" in held_out.validation_origin and sorted(map(int, names(held_out.train) + names(held_out.validation))) == list(range(11))
    assert contents(held_out.train) | contents(held_out.validation) == seen


def test_tables_written_with_pyarrow(tmp_path, datasets):
    import pyarrow
    import pyarrow.parquet

    folder = write_classes(tmp_path / "photos", {"x": 3})
    images = [file.read_bytes() for file in sorted(folder.rglob("*.png"))]
    (tmp_path / "tables").mkdir()
    structs = [{"bytes": image, "path": None} for image in images]
    for column, labels, expected in ((images, ["b", "a", "b"], ["a", "b"]), (structs, [7, 3, None], ["3", "7"])):
        pyarrow.parquet.write_table(pyarrow.table({"picture": column, "label": labels}), tmp_path / "tables" / "a.parquet")
        splits = open_splits(DataConfig(path=str(tmp_path / "tables"), validation_fraction=1e-6))
        assert splits.class_names == expected and splits.train.identity["count"] == 2
        seen = contents(splits.train) | contents(splits.validation)
        assert [seen[str(row)][0] for row in range(3)] == ([1, 0, 1] if expected == ["a", "b"] else [1, 0, None])
        time.sleep(0.01)  # datasets detects changed files by their modification time
    missing = pyarrow.table({"picture": pyarrow.array([images[0], None, b"junk"]), "size": [1.0, 2.0, 3.0]})
    pyarrow.parquet.write_table(missing, tmp_path / "tables" / "a.parquet")
    splits = open_splits(DataConfig(path=str(tmp_path / "tables")))
    assert splits.class_names is None
    lines = []
    assert dict(check_data(DataConfig(path=str(tmp_path / "tables")), lines.append)) == {
        "1": "the row has no image", "2": "not an image of a known format, or its header is corrupt"}
    assert "1 of 3 images is readable" in lines


def write_table(folder: Path, columns: dict, rows: int = 8) -> DataConfig:
    """Write a table of images with these columns, without datasets."""
    import pyarrow
    import pyarrow.parquet

    images = []
    for row in range(rows):
        write_image(folder.parent / "image.png", row)
        images.append({"bytes": (folder.parent / "image.png").read_bytes(), "path": None})
    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"image": images} | columns), folder / "train.parquet")
    return DataConfig(path=str(folder), validation_fraction=1e-6)


@pytest.mark.parametrize(("values", "expected", "labels"), [
    ([10.0, 2.0, None, 2.0] * 2, ["2", "10"], [1, 0, None, 0] * 2), ([1.0, 2.0, float("nan"), 2.0] * 2, ["1", "2"], [0, 1, None, 1] * 2),
    ([True, False] * 4, ["False", "True"], [1, 0] * 4), ([True, None] * 4, ["True"], [0, None] * 4)])
def test_integral_floats_and_booleans_are_classes(values, expected, labels, tmp_path, datasets):
    splits = open_splits(write_table(tmp_path / "tables", {"label": values}))
    seen = contents(splits.train) | contents(splits.validation)
    assert splits.class_names == expected and [seen[str(row)][0] for row in range(8)] == labels and not splits.notes


def test_columns_that_look_like_labels_are_reported(tmp_path, datasets):
    data = write_table(tmp_path / "tables", {"label": [0.5, 1.0] * 4, "caption": [f"picture {row}" for row in range(8)], "width": [9] * 8,
                                             "light": ["day", "night"] * 4, "category": ["cat", "dog"] * 4})
    splits = open_splits(data)
    assert splits.class_names is None and splits.notes == (
        "no classes are read; columns that look like labels: 'category' (2 values), 'light' (2 values); "
        "to read one, give --data.label_column category",)
    lines = []
    check_data(data, lines.append)
    assert f"train: {splits.notes[0]}" in lines
    assert open_splits(dataclasses.replace(data, label_column="category")).class_names == ["cat", "dog"]
    assert not open_splits(dataclasses.replace(data, use_labels=False)).notes
    with pytest.raises(InputError, match="numbers with fractions"):
        open_splits(dataclasses.replace(data, label_column="label"))


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_paths_in_tables_are_relative_to_the_table(typed, as_text, tmp_path, datasets):
    import pyarrow
    import pyarrow.parquet

    folder = write_classes(tmp_path / "tables", {"img": 4})
    paths = [f"img/{number:03}.png" for number in range(4)]
    records = [{"bytes": None, "path": path} for path in paths]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    column = paths if as_text else pyarrow.array(records, kind) if typed else records
    pyarrow.parquet.write_table(pyarrow.table({"image": column, "label": [0, 1] * 2}), folder / "train.parquet")
    data = DataConfig(path=str(folder), image_column="image" if as_text else None)
    splits = open_splits(data)
    seen, before = contents(splits.train) | contents(splits.validation), splits.fingerprint
    assert [seen[str(row)][1] for row in range(4)] == [Image.open(folder / path).tobytes() for path in paths]
    write_image(folder / paths[0], seed=5)
    assert open_splits(data).fingerprint != before, "the fingerprint depends on the files named in the rows"
    (folder / paths[0]).unlink()
    [(_, reason)] = check_data(data, lambda line: None)
    assert "img/000.png': " in reason and "No such file" in reason


def test_data_path_may_be_the_working_directory(tmp_path, datasets, monkeypatch):
    write_table(tmp_path / "tables", {"label": [0, 1] * 4})
    monkeypatch.chdir(tmp_path / "tables")
    assert len(open_splits(DataConfig(path=".")).train) == 7


@pytest.mark.parametrize("row", [0, 3, 299])
def test_changed_bytes_of_equal_size_are_detected_in_every_row(row, tmp_path, datasets):
    import pyarrow
    import pyarrow.parquet

    images = [bytes([number % 251]) * 100 for number in range(300)]
    identities = []
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(images, pyarrow.binary())}), tmp_path / name / "train.parquet")
        identities.append(open_splits(DataConfig(path=str(tmp_path / name))).fingerprint)
        images[row] = images[row][:-1] + b"x"
    assert identities[0] != identities[1]


@pytest.mark.parametrize("stored_as", [None, "numpy", "torch"])
def test_data_sets_saved_to_disk_are_read(stored_as, tmp_path, datasets):
    folder = write_classes(tmp_path / "photos", {"x": 4})
    rows = {"image": [str(file) for file in sorted(folder.rglob("*.png"))], "label": [0, 0, 1, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    saved = datasets.Dataset.from_dict(rows, features=features).with_format(stored_as)
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "saved")
    splits = open_splits(DataConfig(path=str(tmp_path / "saved")))
    assert len(splits.train) == 3 and splits.class_names == ["a", "b"]
    seen = contents(splits.train) | contents(splits.validation)
    assert [seen[str(row)][0] for row in range(4)] == [0, 0, 1, 1]


def test_invalid_splits_and_columns_are_rejected_with_suggestions(tmp_path, datasets):
    files = sorted(write_classes(tmp_path / "photos", {"x": 4}).rglob("*.png"))
    for split, labels in (("train", [0, 0, 0, 0]), ("validation", [0, 0, 1, 1])):
        write_parquet(tmp_path / "tables" / f"{split}-0.parquet", files, labels, datasets, kind=datasets.ClassLabel(names=["a", "b"]))
    invalid = {"data.train_split.*'trian'.*Did you mean 'train'": {"train_split": "trian"},
               "data.validation_split.*'tests'": {"validation_split": "tests"},
               "data.image_column.*'img'.*Did you mean 'image'": {"image_column": "img"},
               "data.image_column.*not images": {"image_column": "kind"},
               "data.label_column.*'kinds'.*Did you mean 'kind'": {"label_column": "kinds"},
               "data.label_column.*allowed: class labels": {"label_column": "image"},
               "class 'b' has images in 'validation' but none in 'train'": {},
               "both 'train'": {"validation_split": "train"}}
    for message, fields in invalid.items():
        with pytest.raises(InputError, match=message):
            open_splits(DataConfig(path=str(tmp_path / "tables"), **fields))
    assert open_splits(DataConfig(path=str(tmp_path / "tables"), use_labels=False)).class_names is None
    (tmp_path / "tables" / "train-0.parquet").write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be loaded"):
        open_splits(DataConfig(path=str(tmp_path / "tables")))


def test_class_numbers_without_a_name_are_rejected(tmp_path, datasets):
    import json

    import pyarrow
    import pyarrow.parquet

    files = sorted(write_classes(tmp_path / "photos", {"x": 4}).rglob("*.png"))
    features = {"image": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["a", "b"]}}
    table = pyarrow.table({"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "kind": [-1, 0, 5, 1]})
    (tmp_path / "tables").mkdir()
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}),
                                tmp_path / "tables" / "train.parquet")
    with pytest.raises(InputError, match="class number 5 has no name; the data set names 2 classes"):
        open_splits(DataConfig(path=str(tmp_path / "tables")))


def test_errors_of_datasets_show_their_cause(tmp_path, datasets):
    import pyarrow
    import pyarrow.parquet

    columns = [pyarrow.array([b"x"] * 4), pyarrow.array([0] * 4), pyarrow.array([0] * 4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["image", "twice", "twice"]), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"cannot be loaded as a Hugging Face data set: (?!DatasetGenerationError).*twice"):
        open_splits(DataConfig(path=str(tmp_path)))


def test_invalid_paths_in_tables_are_unreadable_images(tmp_path, datasets):
    (tmp_path / "tables").mkdir()
    datasets.Dataset.from_dict({"image": ["a\0b"] * 4}).to_parquet(tmp_path / "tables" / "train.parquet")
    data = DataConfig(path=str(tmp_path / "tables"), image_column="image")
    assert open_splits(data).fingerprint and len(check_data(data, lambda line: None)) == 4


def test_missing_connection_is_reported_quickly(tmp_path, datasets, monkeypatch):
    import socket

    def unreachable(*args, **options):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"'nobody/nothing'.*not a local folder.*--data.path its folder of parquet"):
        open_splits(DataConfig(path="nobody/nothing"))
    assert time.monotonic() - started < 10
