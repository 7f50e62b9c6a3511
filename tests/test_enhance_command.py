"""The command `enhance`: results of files and folders, continuing, and errors."""

import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.command_line import dispatch
from pipelines.enhancing import write_enhanced
from pipelines.image_folders.write_images import load_image
from tests.editing import make_pipe, random_image, saved_pipeline
from vqmosaic.errors import InputError
from vqmosaic.runs.interruption import Interrupted


@pytest.fixture
def pipe(tmp_path) -> ImageGenerationPipeline:
    """A pipeline of grey images with alpha, saved in tmp_path, where a folder has three images and a further one is larger."""
    pipe = make_pipe(tmp_path / "made", channels=2, order="spread", steps=4)
    saved_pipeline(tmp_path, pipe)
    (tmp_path / "photos/cats").mkdir(parents=True)
    for number in range(3):
        random_image(pipe, number).save(tmp_path / f"photos/cats/{number}.png")
    random_image(pipe, 3).resize((40, 48)).save(tmp_path / "large.png")
    return pipe


def enhance(root: Path, *options: str) -> int:
    return dispatch(["enhance", str(root / "pipeline"), str(root / "photos"), str(root / "large.png"), "--out", str(root / "out"), *options])


def test_results_are_those_of_the_method(pipe, tmp_path, capsys):
    options = ("--noise", "60", "--strength", "0.5", "--classes", "ant", "--average", "3", "--num_tries", "2", "--seed", "7")
    assert enhance(tmp_path, *options) == 0
    names = ["cats/0.png", "cats/1.png", "cats/2.png", "large.png"]
    assert {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")} == {*names, "grid.png"}
    given = [load_image(tmp_path / path, pipe.tokenizer.transform) for path in (*(f"photos/{name}" for name in names[:3]), "large.png")]
    loaded = ImageGenerationPipeline.from_pretrained(tmp_path / "pipeline", "cpu")
    for number, name in enumerate(names):
        expected = loaded.enhance_part(given[number][None], [number], 7, 60, 0.5, "ant", 3, 2).images[0]
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.mode == "LA" and picture.tobytes() == expected.tobytes()
    printed = capsys.readouterr().out
    assert "wrote 4 images and grid.png (given images over results)" in printed and "note:" not in printed
    assert enhance(tmp_path, *options) == 0 and "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"images of another request: --noise was 60, now 25; --strength was 0\.5, now 1"):
        enhance(tmp_path, "--classes", "ant", "--average", "3", "--num_tries", "2", "--seed", "7")
    assert json.loads((tmp_path / "out/enhanced.json").read_text())["request"]["sampling"]["guidance_scale"] == 1.0


def test_missing_results_are_written_after_an_interruption(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(write_enhanced, "tokenizer_batch_size", lambda _: 2)
    save, saved = write_enhanced.save_picture, []

    def stopped_after_two(picture, path):
        save(picture, path)
        saved.append(path.name)
        if len(saved) == 2 and is_stopped:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(write_enhanced, "save_picture", stopped_after_two)
    is_stopped = True
    with pytest.raises(Interrupted, match="2 of 4 images are written"):
        enhance(tmp_path)
    is_stopped, kept = False, {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert len(kept) == 2 and enhance(tmp_path) == 0
    assert "wrote 2 images and grid.png" in (printed := capsys.readouterr().out) and "which now contains 4" in printed
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
    (tmp_path / "out").rename(tmp_path / "first")
    assert enhance(tmp_path) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")} == first, "as without an interruption"


def test_unreadable_images_are_named_at_the_end(pipe, tmp_path):
    path = tmp_path / "photos/cats/1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    with pytest.raises(InputError, match=r"1 of 4 images cannot be read, so they have no result:\n .*1.png"):
        enhance(tmp_path)
    assert {path.name for path in (tmp_path / "out").rglob("*.png")} == {"0.png", "2.png", "large.png", "grid.png"}


def test_priors_in_raster_order_give_a_note(tmp_path, capsys):
    pipe = make_pipe(tmp_path / "made", any_order=False)
    random_image(pipe).save(tmp_path / "photo.png")
    arguments = ["enhance", str(saved_pipeline(tmp_path, pipe)), str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]
    assert dispatch(arguments) == 0 and "note: the prior of this pipeline was trained in raster order" in capsys.readouterr().out
    with pytest.raises(InputError, match="--order is 'random', but the prior"):
        dispatch([*arguments[:-1], str(tmp_path / "random"), "--order", "random"])


def test_guidance_has_an_effect(pipe, tmp_path):
    pictures = []
    for number, options in enumerate([[], ["--guidance_scale", "8"]]):
        command = ["enhance", str(tmp_path / "pipeline"), str(tmp_path / "large.png"), "--out", str(tmp_path / f"out{number}"), "--noise", "200"]
        assert dispatch([*command, "--classes", "ant", *options]) == 0
        pictures.append((tmp_path / f"out{number}/large.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_without_readable_images_there_is_no_grid(pipe, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/1.png").write_text("no image")
    with pytest.raises(InputError, match="1 of 1 image cannot be read"):
        dispatch(["enhance", str(tmp_path / "pipeline"), str(tmp_path / "broken"), "--out", str(tmp_path / "out")])
    assert "grid.png" not in capsys.readouterr().out


@pytest.mark.parametrize(("options", "words"), [
    (["--noise", "0"], "--noise is 0.0; allowed: above 0, at most 255"), (["--strength", "2"], "--strength is 2.0; allowed: above 0, at most 1"),
    (["--average", "0"], "--average is 0"), (["--num_tries", "0"], "--num_tries is 0"),
    (["--seed", "-1"], "--seed is -1"), (["--classes", "cow"], "no class 'cow'"),
    (["--guidance_scale", "3"], "guidance is given, but no class"),
    (["--classes", "ant,bee"], "2 classes for 4 images"), (["--steps", "17"], "--steps is 17"),
])
def test_invalid_options_are_refused(pipe, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        enhance(tmp_path, *options)
    assert not (tmp_path / "out").exists()
