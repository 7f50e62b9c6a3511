"""Classes are in natural order (2 before 10). What was made when digits were sorted as text keeps that order, byte for byte."""

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
    """Five images of each of the classes 0 to 11, with one folder for each class."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(5 * CLASSES):
        path = folder / str(number % CLASSES) / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def earlier(monkeypatch):
    """Sorts classes as text, as they were before, for the duration of a test."""
    with monkeypatch.context() as patch:
        patch.setattr(class_labels, "natural_key", lambda text: text)
        yield patch


def recipe_for(photos: Path, run: Path, **changes: object) -> Recipe:
    return tiny_recipe(run, data__source="folder", data__path=photos, tokens__images_per_shard=8, **changes)


def names_in(run: Path) -> tuple[list[str], list[str]]:
    """The classes of a run's tokenizer and of its tokens."""
    return ImageTokenizer.from_pretrained(run / "tokenizer").class_names, TokenShardManifest.load(run / "tokens/train").class_names


def content(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted((run / "tokens").rglob("*")) if path.is_file()}


# --- the order -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [
    ["0", "1", "2", "10", "100"], ["class 2", "class 10", "class 10b"], ["1.5", "1.10", "2.0"], ["", "7", "a", "a1", "a1b2", "a1b10", "a2", "b"],
    ["01", "1", "02", "2"], ["-1", "-10", "B", "a", "é"], ["n01440764", "n01443537"], ["9" * 5000, "1" + "0" * 5000],
])
def test_numbers_in_names_are_compared_as_numbers(ordered):
    for seed in range(5):
        shuffled = np.random.default_rng(seed).permutation(np.array(ordered, dtype=object)).tolist()
        assert sorted_classes(shuffled) == ordered
    assert len({str(natural_key(name)) for name in ordered}) == len(ordered), "no two names are equal"


def test_every_kind_of_data_has_the_natural_order(photos, tmp_path):
    assert open_splits(DataConfig(path=str(photos))).class_names == NATURAL
    names = [f"{number % CLASSES}" for number in range(5 * CLASSES)]
    stored = [(photos / name / f"{index:02}.png").read_bytes() for index, name in enumerate(names)]
    (tmp_path / "tables").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"image": stored, "label": names}), tmp_path / "tables/train.parquet")
    table = open_splits(DataConfig(path=str(tmp_path / "tables")))
    assert table.class_names == NATURAL and [table.train.label(0), table.train.label(10)] == [int(table.train.source_name(0)) % CLASSES,
                                                                                              int(table.train.source_name(10)) % CLASSES]
    for text in (False, True):  # numbers, and names with numbers in them
        folder = tmp_path / f"flat-{text}"
        folder.mkdir()
        lines = [f"{index:02}.png,{'kind ' * text}{7 * int(name)}" for index, name in enumerate(names)]
        for index, image in enumerate(stored):
            (folder / f"{index:02}.png").write_bytes(image)
        (folder / "metadata.csv").write_text("\n".join(["file_name,kind", *lines]))
        splits = open_splits(DataConfig(path=str(folder), label_column="kind"))
        assert splits.class_names == [f"{'kind ' * text}{7 * number}" for number in range(CLASSES)], "numbers with gaps are classes one by one"
        assert splits.train.label(0) == int(splits.train.source_name(0)[:2]) % CLASSES


def test_another_order_changes_names_and_indices_together(photos):
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


def test_records_in_the_earlier_order_are_recognized(photos, tmp_path, earlier):
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


# --- runs that have begun in the earlier order --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_earlier(photos, tmp_path_factory) -> Path:
    """A run whose tokenizer and tokens were made when digits were sorted as text."""
    run = tmp_path_factory.mktemp("earlier") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_labels, "natural_key", lambda text: text)
        train_tokenizer.train(recipe_for(photos, run, tokenizer_training__max_steps=2))
        preprocess(recipe_for(photos, run, tokenizer_training__max_steps=2))
    assert names_in(run) == (AS_TEXT, AS_TEXT)
    return run


@pytest.fixture
def earlier_run(made_earlier, tmp_path) -> Path:
    return Path(shutil.copytree(made_earlier, tmp_path / "run"))


def test_a_new_run_has_the_natural_order(photos, tmp_path, made_earlier):
    recipe = recipe_for(photos, tmp_path / "new", tokenizer_training__max_steps=1)
    train_tokenizer.train(recipe)
    preprocess(recipe)
    assert names_in(tmp_path / "new") == (NATURAL, NATURAL) and audit_run(tmp_path / "new") == 0


def test_an_earlier_run_continues_in_its_order(photos, earlier_run, capsys):
    before = content(earlier_run)
    assert audit_run(earlier_run) == 0, "the labels are compared in the order of the shards"
    longer = recipe_for(photos, earlier_run, tokenizer_training__max_steps=4)
    preprocess(longer)
    assert "finished already" in capsys.readouterr().out and content(earlier_run) == before
    train_tokenizer.train(longer)
    assert "resumed at step 2" in capsys.readouterr().out
    assert names_in(earlier_run) == (AS_TEXT, AS_TEXT)


@pytest.mark.parametrize("lost", ["record", "nothing"])
def test_unfinished_tokens_are_finished_in_their_order(photos, earlier_run, lost):
    """Without a record of the tokens, the order is that of the tokenizer."""
    before = content(earlier_run)
    for name in ("manifest.json", "shard-000001.tar"):
        (earlier_run / "tokens/train" / name).unlink()
    record = earlier_run / "stages/tokens.json"
    if lost == "record":
        record.unlink()
        shutil.rmtree(earlier_run / "tokens")
    else:
        record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
    preprocess(recipe_for(photos, earlier_run, tokenizer_training__max_steps=2))
    assert content(earlier_run) == before


@pytest.mark.parametrize("manifests", ["here", "lost"])
def test_shards_in_the_earlier_order_are_repaired_to_the_same_bytes(earlier_run, manifests):
    before = content(earlier_run)
    (earlier_run / "tokens/train/shard-000001.tar").write_bytes(b"damaged")
    if manifests == "lost":
        for split in ("train", "validation"):
            (earlier_run / "tokens" / split / "manifest.json").unlink()
    assert audit_run(earlier_run, load_recipe(str(earlier_run)), repair=True) == 0
    assert content(earlier_run) == before


def test_tokens_of_an_earlier_tokenizer_have_its_order(photos, made_earlier, tmp_path, capsys):
    preprocess(recipe_for(photos, tmp_path / "new", tokens__tokenizer=made_earlier / "tokenizer"))
    assert "note: the classes are sorted as text (0, 1, 10, 11, 2" in capsys.readouterr().out
    assert content(tmp_path / "new") == content(made_earlier)


def test_shards_in_another_order_are_not_relabelled(photos, earlier_run, tmp_path):
    recipe = recipe_for(photos, tmp_path / "natural", tokenizer_training__max_steps=1)
    train_tokenizer.train(recipe)
    before = content(earlier_run)
    (earlier_run / "stages/tokens.json").unlink()
    with pytest.raises(InputError, match=r"in the order 0, 1, 10, 11, 2, .*would be in the order 0, 1, 2, 3, .*--redo tokens"):
        preprocess(recipe_for(photos, earlier_run, tokens__tokenizer=tmp_path / "natural/tokenizer"))
    assert content(earlier_run) == before


def test_class_proportions_fit_a_prior_with_the_earlier_order(photos):
    labelled = open_splits(DataConfig(path=str(photos))).in_class_order_of(AS_TEXT).train
    counts, clause = class_counts(labelled.class_names, labelled, 48)
    assert sum(counts) == 48 and "proportions of the" in clause
