"""The command augment: balanced and loadable data sets, exact continuation, rejection, and refusals."""

import csv
import json
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.augment import dataset_folder, write_dataset
from pipelines.augment.dataset_folder import class_folders
from pipelines.command_line import dispatch
from stage1_tokenizer.data.open_data import open_splits
from tests.conditioned import CLASSES
from tests.editing import make_pipe, make_prior, saved_pipeline
from tests.test_augment import save_torchscript
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import DataConfig, SamplingConfig
from vqmosaic.runs.interruption import Interrupted


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> ImageGenerationPipeline:
    return make_pipe(tmp_path_factory.mktemp("grey") / "tokenizer")


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory) -> Path:
    """A saved pipeline of the classes ant and bee."""
    return saved_pipeline(tmp_path_factory.mktemp("saved"), pipe)


@pytest.fixture(scope="module")
def threshold(pipe) -> float:
    """The median brightness of images, so that a classifier accepts about half of the candidates."""
    return float(np.median(pipe(CLASSES, 16, seed=5, output_type="np").images.mean(axis=(1, 2, 3))))


@pytest.fixture(scope="module")
def classifier(threshold, tmp_path_factory) -> Path:
    """A TorchScript file that calls bright images ant and dark ones bee."""
    return save_torchscript(tmp_path_factory.mktemp("classifier") / "classifier.pt", ["ant", "bee"], threshold)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(write_dataset, "BATCH_IMAGES", 4)


def augment(folder: Path, out: Path, *options: object, num: int = 9) -> int:
    return dispatch(["augment", str(folder), "--num", str(num), "--out", str(out), "--seed", "3", *map(str, options)])


def files_of(out: Path) -> dict[str, bytes]:
    """Relative path -> content of each file except the lock."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}


def table_of(out: Path) -> list[dict[str, str]]:
    with open(out / "images.csv", newline="") as file:
        return list(csv.DictReader(file))


SHARDS = ("--format", "webdataset", "--images_per_shard", "5")


# --- content -----------------------------------------------------------------------------------------------------------------


def test_images_are_balanced_and_those_of_the_python_interface(pipe, folder, tmp_path, capsys):
    assert augment(folder, tmp_path / "out") == 0
    assert Counter(path.parent.name for path in (tmp_path / "out").rglob("*.png")) == {"ant": 5, "bee": 4}
    batches = list(pipe.labelled_batches(9, seed=3, batch_size=4))
    images = [image for batch in batches for image in batch.images]
    for number, (row, image) in enumerate(zip(table_of(tmp_path / "out"), images, strict=True)):
        assert row["file"] == f"{CLASSES[number % 2]}/{number // 2:05d}.png" and row["class"] == CLASSES[number % 2]
        assert (row["label"], row["candidates"], row["accepted"], row["score"]) == (str(number % 2), "1", "1", "")
        with Image.open(tmp_path / "out" / row["file"]) as picture:
            assert picture.tobytes() == image.tobytes()
    record = json.loads((tmp_path / "out/augmentation.json").read_text())
    assert record["result"]["classes"]["ant"] == {"images": 5, "candidates": 5, "accepted": 5, "acceptance_rate": 1.0}
    assert record["request"]["seed"] == 3 and record["request"]["pipeline"]["tokens"] == pipe.tokenizer.token_fingerprint
    assert "wrote 9 images of 2 classes" in capsys.readouterr().out
    before = files_of(tmp_path / "out")
    assert augment(folder, tmp_path / "out") == 0 and "nothing to do" in capsys.readouterr().out
    assert files_of(tmp_path / "out") == before


def test_the_image_folder_source_reads_the_data_set(folder, tmp_path):
    assert augment(folder, tmp_path / "out", num=20) == 0
    splits = open_splits(DataConfig(path=str(tmp_path / "out"), image_size=16, channels=1, validation_fraction=0.2))
    assert splits.class_names == CLASSES and len(splits.train) + len(splits.validation) == 20
    for source in (splits.train, splits.validation):
        for index in range(len(source)):
            name = source.source_name(index)
            assert CLASSES[source.label(index)] == name.partition("/")[0]
            with Image.open(tmp_path / "out" / name) as picture:
                assert np.array_equal(np.asarray(source.read(index)), np.asarray(picture))


def test_datasets_reads_the_folder(folder, tmp_path):
    import datasets

    assert augment(folder, tmp_path / "out", num=6) == 0
    data = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert data.features["label"].names == CLASSES and Counter(data["label"]) == {0: 3, 1: 3}


def test_webdataset_and_datasets_read_the_shards(folder, tmp_path):
    import datasets
    import webdataset

    assert augment(folder, tmp_path / "plain") == 0 and augment(folder, tmp_path / "out", *SHARDS) == 0
    shards = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    assert [Path(path).name for path in shards] == ["shard-000000.tar", "shard-000001.tar"]
    rows = table_of(tmp_path / "plain")
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert len(samples) == 9 and [row["file"] for row in table_of(tmp_path / "out")][5] == "shard-000001.tar/000000005.png"
    for sample, row in zip(samples, rows, strict=True):
        assert sample["cls"] == int(row["label"]) and sample["json"]["class"] == row["class"] and sample["json"]["seed"] == int(row["seed"])
        with Image.open(tmp_path / "plain" / row["file"]) as picture:
            assert picture.convert("RGB").tobytes() == sample["png"].convert("RGB").tobytes()
    data = datasets.load_dataset("webdataset", data_files=shards, split="train", cache_dir=str(tmp_path / "cache"))
    assert data["cls"][:3] == [0, 1, 0]


def test_folders_of_odd_class_names_are_distinct():
    names = ["cat", "a/b", "a_b", "Cat", "golden retriever", ".hidden", "@tmp", "..", "x\ny", "é", "c" * 300, "a_b_2", "end.", ""]
    folders = class_folders(names)
    assert len({folder.casefold() for folder in folders}) == len(names)
    assert folders[:8] == ["cat", "a_b_3", "a_b", "Cat_2", "golden retriever", "_hidden", "_tmp", "_"]
    assert folders[8:10] == ["x_y", "é"] and len(folders[10]) < 255 and folders[12:] == ["end_", "class"]


def test_classes_select_and_order(folder, tmp_path):
    assert augment(folder, tmp_path / "out", "--classes", "bee", num=2) == 0
    assert {path.parent.name for path in (tmp_path / "out").rglob("*.png")} == {"bee"}
    assert json.loads((tmp_path / "out/augmentation.json").read_text())["result"]["classes"].keys() == {"bee"}


def test_alpha_is_kept(tmp_path):
    folder = saved_pipeline(tmp_path / "saved", make_pipe(tmp_path / "tokenizer", channels=4))
    assert augment(folder, tmp_path / "out", num=2) == 0 and augment(folder, tmp_path / "out", num=2) == 0
    with Image.open(tmp_path / "out/ant/00000.png") as picture:
        assert picture.mode == "RGBA"


# --- continuing --------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: the process writes nothing more."""


@pytest.mark.parametrize("options", [("--oversample", "2"), SHARDS], ids=["folder", "shards"])
def test_a_kill_between_files_changes_nothing(folder, tmp_path, monkeypatch, options):
    """After each number of written files, the process is killed. The same command then writes the same files as without a kill."""
    assert augment(folder, tmp_path / "whole", *options) == 0
    expected, write, written = files_of(tmp_path / "whole"), dataset_folder.write_bytes, 0

    def killed_after(path, content):
        nonlocal written
        if written == limit:
            raise Killed
        write(path, content)
        written += 1

    monkeypatch.setattr(dataset_folder, "write_bytes", killed_after)
    for limit in range(3) if options == SHARDS else (0, 1, 6, 9):
        out, written = tmp_path / f"after-{limit}", 0
        with pytest.raises(Killed):
            augment(folder, out, *options)
        kept = {path: path.stat().st_mtime_ns for path in [*out.rglob("*.png"), *out.rglob("*.tar")]}
        assert len(kept) == min(limit, len(expected) - 2)
        with open(out / ".images.jsonl", "a") as file:
            file.write('{"file": "ant/000')  # a line that a crash cut
        limit = -1
        assert augment(folder, out, *options) == 0
        assert files_of(out) == expected
        assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_signal_keeps_what_is_written(folder, tmp_path, monkeypatch, capsys):
    pngs, calls = write_dataset.pngs_of, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return pngs(*arguments)

    monkeypatch.setattr(write_dataset, "pngs_of", stopping)
    with pytest.raises(Interrupted, match="8 of 9 images are written"):
        augment(folder, tmp_path / "out")
    assert augment(folder, tmp_path / "out") == 0
    assert "continuing: 8 of 9 images" in capsys.readouterr().out
    calls.clear()
    with pytest.raises(Interrupted, match="5 of 9 images are written"):
        augment(folder, tmp_path / "shards", *SHARDS)
    assert augment(folder, tmp_path / "shards", *SHARDS) == 0
    assert "continuing: 5 of 9 images" in capsys.readouterr().out


@pytest.mark.parametrize("options", [(), SHARDS], ids=["folder", "shards"])
def test_damaged_files_are_written_again(folder, tmp_path, capsys, options):
    assert augment(folder, tmp_path / "out", *options) == 0
    expected = files_of(tmp_path / "out")
    name = "shard-000001.tar" if options else "bee/00002.png"
    for content in (expected[name][:len(expected[name]) // 2], expected[name].replace(b"IDAT", b"IDAD")):
        (tmp_path / "out" / name).write_bytes(content)
        assert augment(folder, tmp_path / "out", *options) == 0
        assert "1 file in" in capsys.readouterr().out and files_of(tmp_path / "out") == expected


# --- rejection ---------------------------------------------------------------------------------------------------------------


def test_a_classifier_rejects_candidates(folder, classifier, threshold, tmp_path, capsys):
    assert augment(folder, tmp_path / "out", "--classifier", classifier, "--max_attempts", "50") == 0
    for path in (tmp_path / "out").rglob("*.png"):
        mean = np.asarray(Image.open(path)).mean()
        assert (mean > threshold) == (path.parent.name == "ant")
    rows, record = table_of(tmp_path / "out"), json.loads((tmp_path / "out/augmentation.json").read_text())
    for name in CLASSES:
        drawn = sum(int(row["candidates"]) for row in rows if row["class"] == name)
        counts = record["result"]["classes"][name]
        assert counts["candidates"] == drawn and counts["acceptance_rate"] == round(counts["accepted"] / drawn, 4)
    assert sum(counts["candidates"] for counts in record["result"]["classes"].values()) > 9
    assert "accepted candidates: " in capsys.readouterr().out


def test_more_attempts_continue(folder, classifier, tmp_path):
    options = ("--classifier", classifier)
    assert augment(folder, tmp_path / "whole", *options, "--max_attempts", "50") == 0
    with pytest.raises(InputError, match=r"had no accepted candidate after 1 attempt\. Accepted in this call: .* Raise max_attempts"):
        augment(folder, tmp_path / "out", *options, "--max_attempts", "1")
    assert augment(folder, tmp_path / "out", *options, "--max_attempts", "50") == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


# --- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    (("--seed", "4"), "--seed was 3, now 4"), (("--oversample", "2"), "--oversample was 1, now 2"),
    (("--temperature", "0.5"), "--temperature was 1, now 0.5"), (("--classes", "bee,ant"), "--classes was all classes, now bee,ant"),
    (("--num", "8"), "--num was 9, now 8"), (SHARDS, "--format was folder, now webdataset"),
])
def test_another_request_is_refused(folder, tmp_path, options, words):
    assert augment(folder, tmp_path / "out") == 0
    before = files_of(tmp_path / "out")
    with pytest.raises(InputError, match=f"images of another request: .*{words}"):
        augment(folder, tmp_path / "out", *options)
    assert files_of(tmp_path / "out") == before


def test_another_classifier_is_refused(folder, classifier, tmp_path):
    assert augment(folder, tmp_path / "out", "--classifier", classifier, "--max_attempts", "50") == 0
    other = save_torchscript(tmp_path / "classifier.pt", ["bee", "ant"], threshold=1.0)
    with pytest.raises(InputError, match="--classifier is another one, or has changed"):
        augment(folder, tmp_path / "out", "--classifier", other)
    with pytest.raises(InputError, match="--classifier was given before, now not given"):
        augment(folder, tmp_path / "out")


@pytest.mark.parametrize(("options", "words"), [
    (("--num", "1"), "--num is 1: 1 image cannot be balanced over 2 classes"), (("--num", "0"), "--num is 0"),
    (("--classes", "ant,ant"), "--classes: the class 'ant' is listed twice"), (("--classes", "cow"), "no class 'cow'"),
    (("--images_per_shard", "5"), "--images_per_shard is given, but has no effect without --format webdataset"),
    (("--rank_by", "posterior"), "--rank_by is given, but has no effect without --oversample above 1"),
    (("--max_attempts", "5"), "--max_attempts is given, but has no effect without --classifier"),
    (("--classifier", "missing.pt"), "--classifier is 'missing.pt', which does not exist"), (("--oversample", "0"), "--oversample is 0"),
    (("--steps", "17"), "--steps is 17"),
])
def test_invalid_options_are_refused(folder, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        augment(folder, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_pipelines_that_cannot_are_refused(pipe, tmp_path):
    unlabelled = ImageGenerationPipeline(pipe.tokenizer, make_prior(pipe.tokenizer, class_names=None, label_drop=0.0), SamplingConfig())
    with pytest.raises(InputError, match=r"trained without classes\. Use `vqmosaic generate`"):
        augment(saved_pipeline(tmp_path / "unlabelled", unlabelled), tmp_path / "out")
    without_drop = ImageGenerationPipeline(pipe.tokenizer, make_prior(pipe.tokenizer, label_drop=0.0), SamplingConfig())
    with pytest.raises(InputError, match="Give --rank_by likelihood"):
        augment(saved_pipeline(tmp_path / "without", without_drop), tmp_path / "out", "--oversample", "2")


def test_a_folder_of_other_images_is_refused(folder, tmp_path):
    (tmp_path / "out/cat").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "out/cat/1.png")
    with pytest.raises(InputError, match=r"contains images of another origin, such as cat/1\.png"):
        augment(folder, tmp_path / "out")


def test_a_folder_of_other_shards_is_refused(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/shard-000007.tar").write_bytes(b"other")
    with pytest.raises(InputError, match=r"contains other shards, such as shard-000007\.tar"):
        augment(folder, tmp_path / "out", *SHARDS)


def test_a_table_that_was_edited(folder, tmp_path, capsys):
    """A byte order mark and other class names do no harm. Images without a row are drawn again, with a warning."""
    assert augment(folder, tmp_path / "out") == 0
    expected, table = files_of(tmp_path / "out"), tmp_path / "out/images.csv"
    table.write_text(table.read_text().replace(",ant,", ",Ant,"), encoding="utf-8-sig")
    (tmp_path / "out/bee/00002.png").unlink()
    capsys.readouterr()
    assert augment(folder, tmp_path / "out") == 0
    assert "warning" not in capsys.readouterr().out and files_of(tmp_path / "out") == expected
    table.unlink()
    assert augment(folder, tmp_path / "out") == 0
    assert "warning: 9 images in" in capsys.readouterr().out and files_of(tmp_path / "out") == expected


def test_an_unstarted_request_can_be_replaced(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_folder, "write_bytes", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        augment(folder, tmp_path / "out")
    monkeypatch.undo()
    assert augment(folder, tmp_path / "out", "--seed", "4") == 0 and augment(folder, tmp_path / "other", "--seed", "4") == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "other")
