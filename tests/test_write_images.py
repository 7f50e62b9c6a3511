"""Output of `generate` and `reconstruct`: bounded memory, sortable names, safe interruptions, and one request per folder."""

import json
import os
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipelines.command_line import dispatch
from pipelines.generate import ImageGenerationPipeline
from pipelines.image_folders import write_images
from pipelines.image_folders.sample_folder import SampleFolder, reconstruction_names
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.prior import TokenPrior
from tests.image_folders import write_classes
from tests.run_files import pictures
from tests.tiny import ROOT
from vqmosaic.errors import InputError, printable
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.interruption import EXIT_CODES
from vqmosaic.runs.launch import exit_code_of

NUM, TOTAL = 13, 130  # images of each of ten classes: two full batches of 64 and a part of a third


def generate(run: Path, out: Path, *arguments: object) -> int:
    """Run the command in this process and return its exit code."""
    return exit_code_of(lambda: dispatch(["generate", str(run), "--num", str(NUM), "--out", str(out), *map(str, arguments)]))


@pytest.fixture(scope="module")
def uninterrupted(tiny_run, tmp_path_factory) -> dict[str, bytes]:
    """The files of a request that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert generate(tiny_run, out) == 0
    return pictures(out)


@pytest.fixture
def after_files(monkeypatch):
    """after_files(n, act): call act() after n pictures are written; after_files.written counts them."""
    class Counter:
        written, at, act = 0, None, None

        def __call__(self, number, act):
            self.written, self.at, self.act = 0, number, act

    counter, save = Counter(), write_images.save_picture

    def counted(picture, path):
        save(picture, path)
        counter.written += 1
        if counter.written == counter.at:
            counter.act()

    monkeypatch.setattr(write_images, "save_picture", counted)
    return counter


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Killed(BaseException):
    """Simulates a SIGKILL: nothing catches it."""


def kill() -> None:
    raise Killed


# --- generate: interruptions -------------------------------------------------------------------------------------------------


def test_request_interrupted_twice_gives_the_same_files(tiny_run, tmp_path, uninterrupted, after_files, capsys):
    out = tmp_path / "out"
    after_files(5, interrupt)
    assert generate(tiny_run, out) == EXIT_CODES[signal.SIGTERM]
    assert f"stopped by SIGTERM; 64 of {TOTAL} images are written to {out}. Run the same command to continue." in capsys.readouterr().err
    assert len(pictures(out)) == 64

    after_files(7, kill)
    with pytest.raises(Killed):
        generate(tiny_run, out)
    assert len(pictures(out)) == 64 + 7 and "grid.png" not in pictures(out)

    after_files(None, None)
    capsys.readouterr()
    assert generate(tiny_run, out) == 0
    output = capsys.readouterr().out
    assert f"continuing: 71 of {TOTAL} images are already in {out}" in output
    assert f"wrote 59 images and grid.png to {out}, which now contains all 130" in output
    assert pictures(out) == uninterrupted


def test_record_without_a_newer_setting_is_continued(tiny_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert generate(tiny_run, out) == 0
    record = json.loads((out / "samples.json").read_text())
    assert record["request"]["sampling"].pop("min_p") == 0.0
    (out / "samples.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert generate(tiny_run, out) == 0 and "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("number", list(EXIT_CODES))
def test_signal_stops_in_the_middle_of_a_batch(number, tiny_run, tmp_path, monkeypatch, capsys):
    sample, calls = TokenPrior.sample, []

    def interrupted(self, classes, sampling, seeds, callback, compile=False, **named):
        def count(done, total):
            calls.append(done)
            if len(calls) == 16 + 3:
                os.kill(os.getpid(), number)
            return callback(done, total)
        return sample(self, classes, sampling, seeds, count, compile)

    monkeypatch.setattr(TokenPrior, "sample", interrupted)
    assert generate(tiny_run, tmp_path) == EXIT_CODES[number] and len(calls) == 19
    assert f"64 of {TOTAL} images are written" in capsys.readouterr().err


def test_only_batches_with_missing_images_are_sampled(tiny_run, tmp_path, uninterrupted, monkeypatch):
    out = tmp_path / "out"
    assert generate(tiny_run, out) == 0
    sample, asked = TokenPrior.sample, []
    monkeypatch.setattr(TokenPrior, "sample",
                        lambda self, classes, *others, **named: asked.append(len(classes)) or sample(self, classes, *others, **named))
    (out / "5-03.png").unlink()  # place 68 of the request, in the second batch
    times = {path: path.stat().st_mtime_ns for path in out.glob("?-*.png")}
    assert generate(tiny_run, out) == 0
    assert asked == [64] and pictures(out) == uninterrupted
    assert {path: path.stat().st_mtime_ns for path in times} == times, "the other files of its batch are kept"


def test_missing_grid_is_written_without_sampling(tiny_run, tmp_path, uninterrupted, monkeypatch):
    assert generate(tiny_run, tmp_path / "out") == 0
    (tmp_path / "out" / "grid.png").unlink()
    monkeypatch.setattr(ImageGenerationPipeline, "from_pretrained", lambda *_: pytest.fail("the pipeline must not be loaded"))
    assert generate(tiny_run, tmp_path / "out") == 0 and pictures(tmp_path / "out") == uninterrupted


def test_rerunning_a_finished_request_does_nothing(tiny_run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert generate(tiny_run, out, "--dtype", "bfloat16") == 0
    assert "measured on 8 images" in capsys.readouterr().out
    monkeypatch.setattr(ImageGenerationPipeline, "from_pretrained", lambda *_: pytest.fail("the pipeline must not be loaded"))
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert generate(tiny_run, out, "--dtype", "bfloat16") == 0
    assert capsys.readouterr().out.strip() == f"nothing to do: {out} already contains all {TOTAL} images of this request"
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


# --- generate: one request per folder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changed", "expected"), [
    (["--seed", "1"], ["--seed was 0, now 1"]),
    (["--num", "14"], ["--num was 13, now 14"]),
    (["--classes", "3,7"], ["--classes was all classes, now 3,7"]),
    (["--temperature", "0.5", "--top_k", "3"], ["--temperature was 1, now 0.5", "--top_k was 0, now 3"]),
    (["--guidance_interval", "0", "0.8"], ["--guidance_interval was 0 1, now 0 0.8"]),
    (["--dtype", "bfloat16"], ["--dtype was float32, now bfloat16"]),
], ids=lambda value: " ".join(value) if value[0].startswith("--") else "")
def test_another_request_in_the_same_folder_is_rejected(changed, expected, tiny_run, tmp_path, after_files, capsys):
    out = tmp_path / "out"
    after_files(3, interrupt)
    assert generate(tiny_run, out) == 143
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert generate(tiny_run, out, *changed) == 2
    output = capsys.readouterr().err
    assert all(part in output for part in (f"--out {out} contains the images of another request", "Give another --out", *expected)), output
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_each_request_gets_its_own_default_folder(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["--seed", "1"], ["--temperature", "0.5"], [], ["--seed", "1"]):
        assert exit_code_of(lambda arguments=arguments: dispatch(["generate", str(tiny_run), "--num", "1", *arguments])) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples", "samples-2", "samples-3"]
    assert [json.loads((tmp_path / name / "samples.json").read_text())["request"]["seed"] for name in ("samples", "samples-2")] == [0, 1]
    assert capsys.readouterr().out.count("nothing to do: samples") == 2


def test_request_without_images_does_not_reserve_the_folder(tiny_copy, tmp_path, monkeypatch):
    """The pipeline cannot be loaded, or a signal comes before the first image."""
    weights = tiny_copy / "pipeline/prior/model.safetensors"
    valid_weights = weights.read_bytes()
    weights.write_bytes(valid_weights[:-1] + bytes([valid_weights[-1] ^ 1]))
    out = tmp_path / "out"
    assert generate(tiny_copy, out) == 2 and not (out / "samples.json").exists()
    weights.write_bytes(valid_weights)
    monkeypatch.setattr(ImageGenerationPipeline, "batches", lambda *arguments, **rest: os.kill(os.getpid(), signal.SIGTERM) or iter(()))
    assert generate(tiny_copy, out) == EXIT_CODES[signal.SIGTERM] and (out / "samples.json").exists()
    monkeypatch.undo()
    assert generate(tiny_copy, out, "--seed", "5") == 0
    assert json.loads((out / "samples.json").read_text())["request"]["seed"] == 5


def test_changed_pipeline_or_recommended_settings_are_rejected(tiny_copy, tmp_path, capsys):
    assert generate(tiny_copy, tmp_path / "out") == 0
    content = json.loads((tiny_copy / "pipeline" / "pipeline.json").read_text())
    content["sampling"]["top_p"] = 0.5
    (tiny_copy / "pipeline" / "pipeline.json").write_text(json.dumps(content))
    assert generate(tiny_copy, tmp_path / "out") == 2
    assert "--top_p was 1, now 0.5" in capsys.readouterr().err
    assert generate(tiny_copy, tmp_path / "out", "--top_p", 1) == 0, "equal values count, not where they are set"
    weights = tiny_copy / "pipeline" / "prior" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert generate(tiny_copy, tmp_path / "out", "--top_p", 1, "--seed", 4) == 2
    output = capsys.readouterr().err
    assert "another request: the pipeline is a different one: its prior differs; --seed was 0, now 4. Give another --out" in output
    assert not re.search("[0-9a-f]{16}", output.replace(str(tmp_path), "")), "the message contains no digests"


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other", "format_version": 1, "request": {}}'])
def test_invalid_record_is_rejected(content, tiny_run, tmp_path, capsys):
    (tmp_path / "samples.json").write_text(content)
    assert generate(tiny_run, tmp_path) == 2
    assert "samples.json is not a record of generated images" in capsys.readouterr().err


def test_files_of_unknown_origin_are_not_replaced(tiny_run, tmp_path, capsys):
    (tmp_path / "3-00.png").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    assert generate(tiny_run, tmp_path) == 2
    assert "3-00.png that would be replaced and that no samples.json lists" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3-00.png", "notes.txt"]
    (tmp_path / "3-00.png").unlink()
    assert generate(tiny_run, tmp_path) == 0 and (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("image", ["other.png", "cat/001.JPG", "cat/a\nb.png"])
def test_samples_are_not_written_into_a_data_set(image, tiny_run, tmp_path, monkeypatch, capsys):
    photos = tmp_path / "samples"
    (photos / image).parent.mkdir(parents=True, exist_ok=True)
    (photos / image).write_text("a photo")
    assert generate(tiny_run, photos) == 2
    err = capsys.readouterr().err
    assert f"--out {photos} contains images of another origin, such as {printable(image)}" in err and "Give a folder that is new or empty" in err
    assert reconstruct(tiny_run, [write_photo(tmp_path / "photo.png")], photos) == 2
    assert "contains images of another origin" in capsys.readouterr().err
    assert [path for path in photos.rglob("*") if path.is_file()] == [photos / image]
    monkeypatch.chdir(tmp_path)
    assert exit_code_of(lambda: dispatch(["generate", str(tiny_run), "--num", "1"])) == 0
    assert (tmp_path / "samples-2" / "samples.json").is_file(), "the default folder is one without images"


@pytest.mark.parametrize("is_relative", [False, True])
def test_output_folders_inside_the_training_images_are_refused(is_relative, tiny_copy, tmp_path, monkeypatch, capsys):
    photo = write_photo(write_classes(tmp_path / "photos", {"cat": 2}) / "photo.png")
    recipe = yaml.safe_load((tiny_copy / "recipe.yaml").read_text())
    recipe["data"] |= {"source": "folder", "path": "." if is_relative else str(tmp_path / "photos")}
    (tiny_copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path / "photos")
    for source in (tiny_copy, tiny_copy / "pipeline"):
        for arguments in (["generate", source], ["generate", source, "--out", "cat/new"], ["reconstruct", source, photo]):
            assert exit_code_of(lambda arguments=arguments: dispatch([*map(str, arguments)])) == 2
            assert "the new images would become part of the data set" in capsys.readouterr().err.lower()
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["cat", "photo.png"]
    assert generate(tiny_copy, tmp_path / "samples") == 0


def test_results_may_be_beside_and_above_other_results(tiny_run, tmp_path):
    assert generate(tiny_run, tmp_path / "results/samples") == 0
    assert reconstruct(tiny_run, [write_photo(tmp_path / "photo.png")], tmp_path / "results/reconstructions") == 0
    assert generate(tiny_run, tmp_path / "results") == 0
    (tmp_path / "results/kept.png").write_text("mine")
    (tmp_path / "results/3-00.png").unlink()
    assert generate(tiny_run, tmp_path / "results") == 0 and (tmp_path / "results/3-00.png").is_file(), "the folder holds an earlier result"


def test_a_record_cannot_name_files_outside_of_its_folder(tiny_run, tmp_path):
    victim, out = tmp_path / "victim.txt", tmp_path / "out"
    victim.write_text("mine")
    out.mkdir()
    names = ["../victim.txt", str(victim), "001.png"]
    (out / "reconstructions.json").write_text(json.dumps({"request": {"tokenizer": "another"}, "files": names}))
    (out / "001.png").write_text("of the other tokenizer")
    assert reconstruct(tiny_run, [write_photo(tmp_path / "photo.png")], out) == 0
    assert victim.read_text() == "mine" and not (out / "001.png").exists()


# --- locks and damaged files -------------------------------------------------------------------------------------------------


@pytest.fixture
def holder(monkeypatch):
    """holder(folder): a process that holds the lock of a folder until the test ends or kills it."""
    processes = []

    def hold(folder: Path) -> subprocess.Popen:
        code = ("import sys, time; from pathlib import Path; from vqmosaic.runs.run_folder import locked\n"
                "with locked(Path(sys.argv[1]), '--out'): print('held', flush=True); time.sleep(60)")
        processes.append(subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    monkeypatch.setattr("vqmosaic.runs.run_folder.LOCK_WAIT_SECONDS", 0.3)
    yield hold
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_locked_folder_is_rejected(tiny_run, photos, tmp_path, holder, uninterrupted, capsys):
    out = tmp_path / "out"
    process = holder(out)
    assert generate(tiny_run, out) == 2
    assert f"--out {out} is in use by process {process.pid}; wait for it, stop it, or set another --out." in capsys.readouterr().err
    assert reconstruct(tiny_run, photos[:2], out) == 2
    assert f"--out {out} is in use by process {process.pid}" in capsys.readouterr().err
    assert not pictures(out) and not list(out.glob("*.json"))
    process.kill()
    process.wait()
    assert generate(tiny_run, out) == 0 and pictures(out) == uninterrupted, "the lock of a killed process does not block others"


def test_locked_default_folder_is_skipped(tiny_run, tmp_path, monkeypatch, holder):
    monkeypatch.chdir(tmp_path)
    holder(tmp_path / "samples")
    assert dispatch(["generate", str(tiny_run), "--num", "1", "--classes", "3"]) == 0
    assert not pictures(tmp_path / "samples") and set(pictures(tmp_path / "samples-2")) == {"3-0.png", "grid.png"}


DAMAGES = {
    "garbage": lambda path: path.write_bytes(b"garbage"),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a changed byte": lambda path: path.write_bytes(path.read_bytes()[:-20] + bytes([path.read_bytes()[-20] ^ 1]) + path.read_bytes()[-19:]),
    "another picture": lambda path: Image.new("RGB", (300, 200)).save(path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_images_are_written_again(damage, tiny_run, tmp_path, uninterrupted, capsys):
    out = tmp_path / "out"
    assert generate(tiny_run, out) == 0
    times = {path: path.stat().st_mtime_ns for path in out.glob("?-*.png")}
    damage(out / "5-03.png")
    capsys.readouterr()
    assert generate(tiny_run, out) == 0
    output = capsys.readouterr().out
    assert f"1 file in {out} is damaged or replaced and will be written again: 5-03.png" in output
    assert f"wrote 1 image and grid.png to {out}, which now contains all 130" in output
    assert pictures(out) == uninterrupted
    assert [path.name for path in times if path.stat().st_mtime_ns != times[path]] == ["5-03.png"]


def test_damaged_grid_and_reconstructions_are_written_again(tiny_run, photos, tmp_path, uninterrupted, capsys):
    assert generate(tiny_run, tmp_path / "out") == 0
    (tmp_path / "out" / "grid.png").write_bytes(uninterrupted["grid.png"][:100])
    assert generate(tiny_run, tmp_path / "out") == 0 and pictures(tmp_path / "out") == uninterrupted
    out = tmp_path / "reconstructions"
    assert reconstruct(tiny_run, photos[:3], out) == 0
    before = pictures(out)
    (out / "001.png").write_bytes(b"garbage")
    capsys.readouterr()
    assert reconstruct(tiny_run, photos[:3], out) == 0 and pictures(out) == before
    output = capsys.readouterr().out
    assert "1 file in" in output and "written again: 001.png" in output and "wrote 1 reconstruction and grid.png" in output


# --- memory ------------------------------------------------------------------------------------------------------------------


def count_alive(references: list, counts: list) -> None:
    counts.append(sum(reference() is not None for reference in references))


def test_memory_of_generate_does_not_depend_on_the_number_of_images(tiny_run, tmp_path, monkeypatch):
    batches, decode, references, alive, decoded = ImageGenerationPipeline.batches, ImageTokenizer.decode, [], [], []

    def watched(self, *arguments, **settings):
        for batch in batches(self, *arguments, **settings):
            references.append(weakref.ref(batch.images))
            count_alive(references, alive)
            yield batch

    def counted(self, ids_Bhw):
        decoded.append(len(ids_Bhw))
        return decode(self, ids_Bhw)

    monkeypatch.setattr(ImageGenerationPipeline, "batches", watched)
    monkeypatch.setattr(ImageTokenizer, "decode", counted)
    assert dispatch(["generate", str(tiny_run), "--classes", "3", "--num", "320", "--out", str(tmp_path)]) == 0
    assert len(references) == 5 and max(alive) <= 3 and max(decoded) <= 64
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == ((8 * 18 + 2) * 4, (16 * 18 + 2) * 4), "128 images"


def test_memory_of_reconstruct_does_not_depend_on_the_number_of_images(tiny_run, tmp_path, monkeypatch):
    paths = []
    for number in range(200):
        paths.append(tmp_path / f"{number:03d}.png")
        Image.new("L", (16, 16), number).save(paths[-1])
    reconstruct, references, alive, sizes = ImageTokenizer.reconstruct, [], [], []

    def watched(self, images_BCHW):
        sizes.append(len(images_BCHW))
        references.extend((weakref.ref(images_BCHW), weakref.ref(result := reconstruct(self, images_BCHW))))
        count_alive(references, alive)
        return result

    monkeypatch.setattr(ImageTokenizer, "reconstruct", watched)
    assert write_images.write_reconstructions(tiny_run / "tokenizer", paths, tmp_path / "out", "cpu", "float32") == 0
    assert sum(sizes) == 200 and max(sizes) <= 64 and max(alive) <= 3
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == ((8 * 18 + 2) * 4, (16 * 18 + 2) * 4), "64 images and their reconstructions"


@pytest.mark.parametrize("size", [16, 64, 256, 512, 1024, 4096])
@pytest.mark.parametrize(("count", "columns"), [(50_000, 50), (50_000, 8), (50_000, 50_000), (3, 1), (1, 1)])
@pytest.mark.parametrize("rows_each", [1, 2])
def test_size_of_a_grid_is_bounded(size, count, columns, rows_each):
    rows = write_images.grid_rows(count, columns, size, rows_each)
    assert rows and all(rows) and max(max(row) for row in rows) < count
    width, height = max(map(len, rows)), len(rows) * rows_each
    assert width <= 16 and height <= max(16, rows_each) and width * height * size**2 <= max(16 * 16 * 256**2, rows_each * size**2)


# --- names -------------------------------------------------------------------------------------------------------------------


def test_names_sort_in_the_order_of_the_request():
    request = {"out": Path("out"), "pipeline": Path("p"), "class_names": ["a b", "c"], "seed": 0, "sampling": SamplingConfig(), "dtype": "float32"}
    names = SampleFolder(labels=[0, 1], num=25_000, **request).names
    assert len(set(names)) == 50_000 and names == sorted(names) and (names[0], names[-1]) == ("a_b-00000.png", "c-24999.png")
    unlabelled = SampleFolder(labels=None, num=101, **request | {"class_names": None}).names
    assert unlabelled == sorted(unlabelled) and unlabelled[-1] == "sample-100.png"
    assert SampleFolder(labels=[1, 0, 1], num=1, **request).names == ["c-0.png", "a_b-0.png", "c-1.png"]


def test_images_of_equal_names_get_distinct_short_names():
    paths = [Path(f"{folder}/image.jpg") for folder in range(2000)] + [Path("image_2.png"), Path("grid.png"), Path("a.b.png")]
    names = reconstruction_names(paths)
    assert len(set(names)) == len(names) and names[:3] == ["image.png", "image_.png", "image_2.png"] and max(map(len, names)) <= len("image_2000.png")
    assert names[-2:] == ["grid_.png", "a.b.png"]


# --- reconstruct -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    paths = []
    for number in range(150):
        paths.append(tmp_path / "photos" / f"{number:03d}.png")
        paths[0].parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(paths[-1])
    return paths


def write_photo(path: Path) -> Path:
    Image.new("L", (16, 16), 99).save(path)
    return path


def reconstruct(run: Path, paths: list[Path], out: Path) -> int:
    return exit_code_of(lambda: dispatch(["reconstruct", str(run), *map(str, paths), "--out", str(out)]))


def test_reconstructions_continue_after_an_interruption(tiny_run, photos, tmp_path, after_files, capsys, monkeypatch):
    assert reconstruct(tiny_run, photos, tmp_path / "whole") == 0
    out = tmp_path / "out"
    after_files(3, interrupt)
    assert reconstruct(tiny_run, photos, out) == 143
    assert f"64 of 150 reconstructions are written to {out}. Run the same command to continue." in capsys.readouterr().err
    after_files(9, kill)
    with pytest.raises(Killed):
        reconstruct(tiny_run, photos, out)
    after_files(None, None)
    assert reconstruct(tiny_run, photos, out) == 0
    assert after_files.written == 150 - 64 - 9 + 1 and pictures(out) == pictures(tmp_path / "whole")


def test_reconstructions_of_changed_images_are_replaced(tiny_run, photos, tmp_path):
    out = tmp_path / "out"
    assert reconstruct(tiny_run, photos[:3], out) == 0
    before = pictures(out)
    Image.new("L", (16, 16), 255).save(photos[0])
    assert reconstruct(tiny_run, photos[:2], out) == 0
    after = pictures(out)
    assert after["000.png"] != before["000.png"] and after["001.png"] == before["001.png"] and after["002.png"] == before["002.png"]
    tokenizer = ImageTokenizer.from_pretrained(tiny_run / "tokenizer")
    tokenizer.post_quant_conv.weight.data *= 0.5
    tokenizer.save_pretrained(tmp_path / "other")
    assert reconstruct(tmp_path / "other", photos[:1], out) == 0
    assert set(pictures(out)) == {"000.png", "grid.png"}, "reconstructions of the other tokenizer are removed"


def test_reconstruct_does_not_replace_originals_or_unknown_files(tiny_run, photos, tmp_path, capsys):
    before = pictures(photos[0].parent)
    assert reconstruct(tiny_run, photos[:2], photos[0].parent) == 2
    assert "would replace the original image" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "001.png").write_text("mine")
    assert reconstruct(tiny_run, photos[:2], tmp_path / "out") == 2
    assert "001.png that would be replaced and that no reconstructions.json lists" in capsys.readouterr().err
    assert pictures(photos[0].parent) == before and (tmp_path / "out" / "001.png").read_text() == "mine"
    (tmp_path / "out" / "001.png").unlink()
    assert reconstruct(tiny_run, photos[2:4], tmp_path / "out") == 0
    (tmp_path / "out" / "001.png").write_text("mine")
    assert reconstruct(tiny_run, photos[:2], tmp_path / "out") == 2, "the record lists other images only"
    assert (tmp_path / "out" / "001.png").read_text() == "mine"


def test_error_names_an_unreadable_image(tiny_run, photos, tmp_path):
    photos[70].write_bytes(photos[70].read_bytes()[:60])
    with pytest.raises(InputError, match=r"070.png' cannot be read"):
        dispatch(["reconstruct", str(tiny_run), *map(str, photos), "--out", str(tmp_path / "out")])
    assert len(pictures(tmp_path / "out")) == 64


# --- pipeline methods --------------------------------------------------------------------------------------------------------


def test_pipeline_methods_split_large_batches(tiny_run, photos, monkeypatch):
    pipe = ImageGenerationPipeline.from_pretrained(tiny_run, "cpu")
    images = []
    for path in photos[:10]:
        with Image.open(path) as image:
            images.append(image.copy())
    ids_Bhw, restored = pipe.encode(images), [image.tobytes() for image in pipe.reconstruct(images)]
    sizes = []
    for name in ("encode", "decode", "reconstruct"):
        method = getattr(ImageTokenizer, name)
        monkeypatch.setattr(ImageTokenizer, name, lambda self, batch, method=method: sizes.append(len(batch)) or method(self, batch))
    monkeypatch.setattr("pipelines.decoded_images.MAX_BATCH_PIXELS", 3 * 16**2)
    assert torch.equal(pipe.encode(images), ids_Bhw)
    assert [image.tobytes() for image in pipe.reconstruct(images)] == restored == [image.tobytes() for image in pipe.decode(ids_Bhw)]
    assert len(pipe(3, 7, seed=1).images) == 7
    assert max(sizes) == 3
    with pytest.raises(InputError, match="image 4 of images cannot be read"):
        pipe.encode([*images[:4], Image.new("F", (16, 16), 5.0)])
