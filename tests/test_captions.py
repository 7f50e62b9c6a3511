"""Captions: their sources, their ids, and the tokenizers of texts."""

import csv
import json
import pickle
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from stage1_tokenizer.conditions.captions import Captions
from stage1_tokenizer.conditions.condition_checks import check_condition_data
from stage1_tokenizer.conditions.condition_data import check_coverage
from stage1_tokenizer.conditions.text_tokenizer import (
    BYTES_FINGERPRINT,
    ByteTokenizer,
    load_text_tokenizer,
    text_fingerprint,
    text_grid,
    text_ids,
)
from stage1_tokenizer.data.check_data import check_data
from stage1_tokenizer.data.folder_metadata import texts_in_metadata
from stage1_tokenizer.data.open_data import open_splits
from tests.image_folders import names, write_classes
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import DataConfig

CAPTION = {"name": "text", "kind": "caption", "length": 12}


def data_with(path: object, **fields) -> DataConfig:
    return DataConfig(path=str(path), image_size=16, validation_fraction=0.2, conditions=[{**CAPTION, **fields}])


def captions_of(data: DataConfig, split: str = "train") -> dict[str, str | None]:
    source = getattr(open_splits(data), split)
    return dict(zip(names(source), Captions(source, data.given_conditions[0], split).texts, strict=True))


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_classes(tmp_path / "photos", {"cat": 10, "dog": 10})


# --- ids ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a cat", "", "exactly twelv", "grün und blau", "日本語の写真です", "🦜🦜🦜🦜"])
@pytest.mark.parametrize("length", [1, 3, 12, 40])
def test_bytes_are_cut_at_characters_and_padded(text, length):
    ids_T = text_ids(ByteTokenizer(), text, length)
    assert ids_T.shape == (length,) and ids_T.dtype == np.int64 and ids_T.max(initial=0) <= 256
    content = bytes(ids_T[ids_T < 256].tolist())
    assert (ids_T[len(content):] == 256).all() and text.startswith(content.decode()), "a prefix of whole characters, then padding"
    assert len(content) == len(text.encode()) if len(text.encode()) <= length else length - 3 <= len(content) <= length


def test_text_that_is_not_unicode_has_ids():
    assert ByteTokenizer().encode("a\udce9b", 9) == [*b"a?b"]


def test_grid_of_a_text():
    grid = text_grid("text", ByteTokenizer(), 48)
    assert (grid.codebook_size, grid.height, grid.width, grid.token_fingerprint) == (257, 1, 48, BYTES_FINGERPRINT)


def word_tokenizer(folder: Path, words: list[str]) -> Path:
    """Save a tokenizer of transformers that has one id per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


def test_tokenizers_of_transformers(tmp_path):
    folder = word_tokenizer(tmp_path / "words", ["a", "photo", "of", "cat"])
    tokenizer = load_text_tokenizer(folder)
    assert tokenizer.num_ids == 5 and tokenizer.encode("a photo of a dog", 9) == [1, 2, 3, 1, 0]
    assert text_ids(tokenizer, "a photo of a cat", 3).tolist() == [1, 2, 3] and text_ids(tokenizer, "a cat", 4).tolist() == [1, 4, 5, 5]
    assert tokenizer.fingerprint == text_fingerprint(folder) and tokenizer.fingerprint.startswith("text:")
    (folder / "model.safetensors").write_bytes(b"weights of a model")
    assert text_fingerprint(folder) == tokenizer.fingerprint, "weights do not matter"
    other = word_tokenizer(tmp_path / "others", ["a", "photo", "of", "dog"])
    assert text_fingerprint(other) != tokenizer.fingerprint and text_fingerprint(None) == BYTES_FINGERPRINT


def test_missing_text_tokenizers_are_reported_early(tmp_path, photos):
    with pytest.raises(InputError, match=r"data\.conditions\[0\]\.text_tokenizer is .*which is not a folder"):
        check_condition_data(data_with(photos, text_tokenizer=str(tmp_path / "none")))
    with pytest.raises(InputError, match="a folder without a tokenizer of transformers"):
        check_condition_data(data_with(photos, text_tokenizer=str(photos)))


# --- sources -----------------------------------------------------------------------------------------------------------------


def test_text_files_beside_the_images(photos):
    for number, path in enumerate(sorted(photos.glob("*/*.png"))):
        path.with_suffix(".txt").write_text(f"  photo {number}\n", encoding="utf-8-sig" if number % 2 else "utf-8")
    data = data_with(photos)
    texts = captions_of(data)
    assert texts["cat/000.png"] == "photo 0" and all(text.startswith("photo ") for text in texts.values())
    assert not open_splits(data).notes, "the text files are not reported as ignored"
    assert any("ignored" in note for note in open_splits(DataConfig(path=str(photos), image_size=16)).notes)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_columns_of_metadata(photos, kind):
    rows = [{"file_name": f"{name}.png", "caption": f"animal {name}"} for name in ("000", "001", "002")]
    for folder in ("cat", "dog"):
        with open(photos / folder / f"metadata.{kind}", "w", newline="") as file:
            if kind == "csv":
                writer = csv.DictWriter(file, ["file_name", "caption"])
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.write("\n".join(json.dumps(row) for row in rows))
    texts = captions_of(data_with(photos, column="caption"))
    assert {name for name, text in texts.items() if text} == {name for name in texts if name[-7:-4] in ("000", "001", "002")}
    assert texts.get("dog/001.png", "animal 001") == "animal 001"
    with pytest.raises(InputError, match=r"data\.conditions: column .* is 'captoin'; allowed: caption. Did you mean 'caption'"):
        captions_of(data_with(photos, column="captoin"))


def test_columns_without_texts_are_refused(photos):
    rows = [{"file_name": "cat/000.png", "caption": ["a cat", "an animal"]}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"column 'caption' of metadata\.jsonl has \['a cat', 'an animal'\] for cat/000\.png; .* one text"):
        texts_in_metadata(photos, ["cat/000.png"], "caption")
    (photos / "metadata.jsonl").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"cannot be read .* has the classes or captions of the images beside it"):
        texts_in_metadata(photos, ["cat/000.png"], "caption")


def test_columns_of_hugging_face_data_sets(tmp_path):
    images = [Image.fromarray(np.full((9, 9, 3), 5 * number, np.uint8)) for number in range(20)]
    texts = [f"picture {number}" if number % 5 else None for number in range(20)]
    table = datasets.Dataset.from_dict({"text": texts, "picture": images, "number": list(range(20))},
                                       features=datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image(),
                                                                   "number": datasets.Value("int64")}))
    (tmp_path / "tables").mkdir()
    table.to_parquet(str(tmp_path / "tables" / "train.parquet"))
    for split in ("train", "validation"):
        found = captions_of(data_with(tmp_path / "tables", column="text"), split)
        assert found and all(text == texts[int(name)] for name, text in found.items())
    source, plain = open_splits(data_with(tmp_path / "tables", column="text")).train, open_splits(DataConfig(
        path=str(tmp_path / "tables"), image_size=16, validation_fraction=0.2)).train
    assert source.identity == plain.identity and source.former_identity == plain.former_identity, "the identity of the images stays the same"
    assert np.asarray(source.read(3)).max() == 5 * int(source.source_name(3))
    # DataLoader pickles a source to send it to workers. This pickle is made here, so loading it is safe.
    assert pickle.loads(pickle.dumps(source)).texts("text") == source.texts("text"), "worker processes get it"
    with pytest.raises(InputError, match=r"column 'number' holds .*not text"):
        captions_of(data_with(tmp_path / "tables", column="number"))
    with pytest.raises(InputError, match=r"column .* is 'txt'; allowed"):
        captions_of(data_with(tmp_path / "tables", column="txt"))
    with pytest.raises(InputError, match=r"neither column nor templates.*not files in a folder"):
        check_condition_data(data_with(tmp_path / "tables"))


def test_templates_use_class_names_and_hold_some_out():
    data = DataConfig(source="digits", image_size=16, channels=1, conditions=[
        {**CAPTION, "templates": ["the digit {class}", "a {class}", "{class}"], "held_out_templates": ["number {class}"]}])
    train, validation = captions_of(data), captions_of(data, "validation")
    source = open_splits(data).train
    assert all(text.endswith(str(source.label(index))) for index, text in enumerate(train.values()))
    counts = Counter(text[:-1] for text in train.values())
    assert counts.keys() == {"the digit ", "a ", ""} and min(counts.values()) > len(train) / 4
    assert all(text.startswith("number ") for text in validation.values())
    assert captions_of(data) == train, "the choice does not change"
    data.conditions[0].pop("held_out_templates")
    assert {text[:-1] for text in captions_of(data, "validation").values()} == {"the digit ", "a ", ""}


def test_captions_that_cannot_be_read(photos):
    with pytest.raises(InputError, match=r"\(text\): no image of the train split has a caption in a .txt file beside it"):
        captions_of(data_with(photos))
    with pytest.raises(InputError, match=r"no metadata\.csv or metadata\.jsonl"):
        captions_of(data_with(photos, column="caption"))
    (photos / "cat" / "000.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="cannot be read as a caption in UTF-8"):
        captions_of(data_with(photos))
    with pytest.raises(InputError, match="the images have no classes"):
        captions_of(data_with(photos / "cat", templates=["a {class}"]))
    with pytest.raises(InputError, match=r"templates, but data\.use_labels is false"):
        check_condition_data(DataConfig(source="digits", image_size=16, use_labels=False, conditions=[{**CAPTION, "templates": ["a {class}"]}]))
    with pytest.raises(InputError, match="the digits have no captions"):
        captions_of(DataConfig(source="digits", image_size=16, conditions=[{**CAPTION, "column": "text"}]))


def test_check_data_reports_captions(photos):
    long_names = []
    for number, path in enumerate(sorted(photos.glob("*/*.png"))[2:]):
        path.with_suffix(".txt").write_text("short" if number % 3 else "a photo of an animal")
        long_names += [] if number % 3 else [path.relative_to(photos).as_posix()]
    lines = []
    problems = check_data(data_with(photos), lines.append)
    report = "\n".join(lines)
    assert {name for name, _ in problems} == {"cat/000.png", "cat/001.png"} and "it has no caption in a .txt file beside it" in report
    long = sum(name in names(open_splits(data_with(photos)).train) for name in long_names)
    assert f"train, condition text: warning: {long} captions are longer than 12 bytes, and the rest is cut" in report
    assert "has 20: 'a photo of an animal'. To keep more, raise `length` of the condition 'text' in data.conditions" in report
    for name in ("cat/000.txt", "cat/001.txt"):
        (photos / name).write_text("short")
    assert [warning.split(":")[0] for warning in check_coverage(data_with(photos))] == ["train", "validation"]
    assert check_coverage(data_with(photos, length=20)) == [], "nothing is cut"
