"""Classes are in natural order (2 before 10). Runs of version 0.1.0, which sorted them as text, keep their order and bytes."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from pipelines.stages.preprocess import preprocess
from pipelines.sweep.sweep import class_counts
from pipelines.tokens.audit_command import audit_run
from stage1_tokenizer import ImageTokenizer
from stage1_tokenizer import train as train_tokenizer
from stage1_tokenizer.data import class_labels
from stage1_tokenizer.data.class_labels import natural_key, sorted_classes
from stage1_tokenizer.data.open_data import open_splits
from tests.run_files import token_files
from tests.tiny import tiny_recipe
from token_shards import TokenShardManifest
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import DataConfig

CLASSES = 12
NATURAL = [str(number) for number in range(CLASSES)]
AS_TEXT = sorted(NATURAL)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Five images of each of the classes 0 to 11, in one folder per class."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(5 * CLASSES):
        path = folder / str(number % CLASSES) / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def text_order(monkeypatch):
    """Sort classes as text during a test, as version 0.1.0 did."""
    with monkeypatch.context() as patch:
        patch.setattr(class_labels, "natural_key", lambda text: text)
        yield patch


def recipe_for(photos: Path, run: Path, **changes: object) -> Recipe:
    return tiny_recipe(run, data__source="folder", data__path=photos, tokens__images_per_shard=8, **changes)


def class_names_of(run: Path) -> tuple[list[str], list[str]]:
    """The class names of the tokenizer and of the tokens of a run."""
    return ImageTokenizer.from_pretrained(run / "tokenizer").class_names, TokenShardManifest.load(run / "tokens/train").class_names


# --- the order -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [
    ["0", "1", "2", "10", "100"], ["class 2", "class 10", "class 10b"], ["1.5", "1.10", "2.0"], ["", "7", "a", "a1", "a1b2", "a1b10", "a2", "b"],
    ["01", "1", "02", "2"], ["-1", "-10", "B", "a", "é"], ["n01440764", "n01443537"], ["9" * 5000, "1" + "0" * 5000],
])
def test_numbers_in_names_are_compared_as_numbers(ordered):
    for seed in range(5):
        shuffled = np.random.default_rng(seed).permutation(np.array(ordered, dtype=object)).tolist()
        assert sorted_classes(shuffled) == ordered
    assert len({str(natural_key(name)) for name in ordered}) == len(ordered), "the keys are unique"


def test_all_sources_have_natural_order(photos, tmp_path):
    assert open_splits(DataConfig(path=str(photos))).class_names == NATURAL
    names = [f"{number % CLASSES}" for number in range(5 * CLASSES)]
    stored = [(photos / name / f"{index:02}.png").read_bytes() for index, name in enumerate(names)]
    (tmp_path / "tables").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"image": stored, "label": names}), tmp_path / "tables/train.parquet")
    table = open_splits(DataConfig(path=str(tmp_path / "tables")))
    assert table.class_names == NATURAL and [table.train.label(0), table.train.label(10)] == [int(table.train.source_name(0)) % CLASSES,
                                                                                              int(table.train.source_name(10)) % CLASSES]
    for text in (False, True):  # numbers, and names that contain numbers
        folder = tmp_path / f"flat-{text}"
        folder.mkdir()
        lines = [f"{index:02}.png,{'kind ' * text}{7 * int(name)}" for index, name in enumerate(names)]
        for index, image in enumerate(stored):
            (folder / f"{index:02}.png").write_bytes(image)
        (folder / "metadata.csv").write_text("\n".join(["file_name,kind", *lines]))
        splits = open_splits(DataConfig(path=str(folder), label_column="kind"))
        assert splits.class_names == [f"{'kind ' * text}{7 * number}" for number in range(CLASSES)], "gaps between numbers add no classes"
        assert splits.train.label(0) == int(splits.train.source_name(0)[:2]) % CLASSES


def test_sorting_as_text_changes_names_and_labels_together(photos):
    splits = open_splits(DataConfig(path=str(photos)))
    as_text = splits.sorted_as_text()
    assert as_text.class_names == AS_TEXT and as_text.fingerprint != splits.fingerprint
    for index in range(len(splits.train)):
        label = splits.train.label(index)
        assert as_text.train.source_name(index) == splits.train.source_name(index)
        assert AS_TEXT[as_text.train.label(index)] == NATURAL[label] == splits.train.source_name(index).split("/")[0]
    assert splits.in_class_order_of(AS_TEXT).class_names == AS_TEXT and splits.in_class_order_of(NATURAL[::-1]).class_names == NATURAL
    assert splits.as_recorded({"data set": as_text.fingerprint}).class_names == AS_TEXT
    assert splits.as_recorded({"data set": "another"}) is splits


def test_records_in_text_order_are_recognized(photos, tmp_path, text_order):
    names = [f"{number % CLASSES}" for number in range(5 * CLASSES)]
    stored = [(photos / name / f"{index:02}.png").read_bytes() for index, name in enumerate(names)]
    (tmp_path / "tables").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"image": stored, "label": [name if name != "3" else None for name in names]}),
                                tmp_path / "tables/train.parquet")
    for path in (photos, tmp_path / "tables"):
        before = open_splits(DataConfig(path=str(path)))
        recorded = [before.fingerprint, before.comparable_fingerprint("former")]
        former = (before.train.former_identity, before.validation.former_identity)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(class_labels, "natural_key", natural_key)
            now = open_splits(DataConfig(path=str(path)))
            found = now.as_recorded({"data set": recorded[0]})
            assert now.fingerprint != recorded[0] and found.fingerprint == recorded[0] and found.class_names == before.class_names
            assert (found.train.former_identity, found.validation.former_identity) == former
            assert [found.train.label(index) for index in range(len(found.train))] == [before.train.label(index) for index in range(len(found.train))]


# --- runs in text order ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_order_run(photos, tmp_path_factory) -> Path:
    """A run whose tokenizer and tokens have classes sorted as text."""
    run = tmp_path_factory.mktemp("earlier") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_labels, "natural_key", lambda text: text)
        train_tokenizer.train(recipe_for(photos, run, tokenizer_training__max_steps=2))
        preprocess(recipe_for(photos, run, tokenizer_training__max_steps=2))
    assert class_names_of(run) == (AS_TEXT, AS_TEXT)
    return run


@pytest.fixture
def text_order_copy(text_order_run, tmp_path) -> Path:
    return Path(shutil.copytree(text_order_run, tmp_path / "run"))


def test_new_run_has_natural_order(photos, tmp_path, text_order_run):
    recipe = recipe_for(photos, tmp_path / "new", tokenizer_training__max_steps=1)
    train_tokenizer.train(recipe)
    preprocess(recipe)
    assert class_names_of(tmp_path / "new") == (NATURAL, NATURAL) and audit_run(tmp_path / "new") == 0


def test_run_in_text_order_continues_in_text_order(photos, text_order_copy, capsys):
    before = token_files(text_order_copy)
    assert audit_run(text_order_copy) == 0, "labels are compared in the class order of the shards"
    longer = recipe_for(photos, text_order_copy, tokenizer_training__max_steps=4)
    preprocess(longer)
    assert "finished already" in capsys.readouterr().out and token_files(text_order_copy) == before
    train_tokenizer.train(longer)
    assert "resumed at step 2" in capsys.readouterr().out
    assert class_names_of(text_order_copy) == (AS_TEXT, AS_TEXT)


@pytest.mark.parametrize("lost", ["record", "nothing"])
def test_unfinished_tokens_in_text_order_are_completed_in_text_order(photos, text_order_copy, lost):
    """Without a stage record of the tokens, the class order is that of the tokenizer."""
    before = token_files(text_order_copy)
    for name in ("manifest.json", "shard-000001.tar"):
        (text_order_copy / "tokens/train" / name).unlink()
    record = text_order_copy / "stages/tokens.json"
    if lost == "record":
        record.unlink()
        shutil.rmtree(text_order_copy / "tokens")
    else:
        record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
    preprocess(recipe_for(photos, text_order_copy, tokenizer_training__max_steps=2))
    assert token_files(text_order_copy) == before


@pytest.mark.parametrize("manifests", ["here", "lost"])
def test_shards_in_text_order_are_repaired_to_the_same_bytes(text_order_copy, manifests):
    before = token_files(text_order_copy)
    (text_order_copy / "tokens/train/shard-000001.tar").write_bytes(b"damaged")
    if manifests == "lost":
        for split in ("train", "validation"):
            (text_order_copy / "tokens" / split / "manifest.json").unlink()
    assert audit_run(text_order_copy, load_recipe(str(text_order_copy)), repair=True) == 0
    assert token_files(text_order_copy) == before


def test_tokens_have_the_class_order_of_their_tokenizer(photos, text_order_run, tmp_path, capsys):
    preprocess(recipe_for(photos, tmp_path / "new", tokens__tokenizer=text_order_run / "tokenizer"))
    assert "note: the classes are sorted as text (0, 1, 10, 11, 2" in capsys.readouterr().out
    assert token_files(tmp_path / "new") == token_files(text_order_run)


def test_shards_in_another_order_are_not_relabelled(photos, text_order_copy, tmp_path):
    recipe = recipe_for(photos, tmp_path / "natural", tokenizer_training__max_steps=1)
    train_tokenizer.train(recipe)
    before = token_files(text_order_copy)
    (text_order_copy / "stages/tokens.json").unlink()
    with pytest.raises(InputError, match=r"in the order 0, 1, 10, 11, 2, .*would be in the order 0, 1, 2, 3, .*--redo tokens"):
        preprocess(recipe_for(photos, text_order_copy, tokens__tokenizer=tmp_path / "natural/tokenizer"))
    assert token_files(text_order_copy) == before


def test_class_counts_in_text_order(photos):
    labelled = open_splits(DataConfig(path=str(photos))).in_class_order_of(AS_TEXT).train
    counts, description = class_counts(labelled.class_names, labelled, 48)
    assert sum(counts) == 48 and "proportions of the" in description
