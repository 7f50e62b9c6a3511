"""Scores: bits of images and of their parts, and the command `score`."""

import csv
import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.command_line import dispatch
from pipelines.editing import scores, write_results
from pipelines.editing.condition_files import find_condition_images
from pipelines.editing.result_folder import ScoreFolder
from pipelines.editing.write_results import write_scores
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.tokenizer_config import FORMATS
from stage2_prior.chain_vocabulary import ChainVocabulary
from stage2_prior.segments import GivenGrid
from stage2_prior.vocabulary import Vocabulary
from tests.conditioned import CLASSES, given_text, make_parts
from tests.editing import make_pipe, make_prior, make_tokenizer, random_image, saved_pipeline, two_grids
from tests.test_tokenizer_protocol import MeanColours
from token_shards import Grid
from vqmosaic.errors import InputError
from vqmosaic.runs.interruption import Interrupted


@pytest.fixture(scope="module", params=["any order", "raster order"])
def pipe(request, tmp_path_factory) -> ImageGenerationPipeline:
    return make_pipe(tmp_path_factory.mktemp("pipe") / "tokenizer", any_order=request.param == "any order")


def test_bits_are_those_of_the_tokens(pipe, monkeypatch):
    images = [random_image(pipe, seed) for seed in range(5)]
    bits_B, bits_Bhw = pipe.score(images, ["ant", "bee", "ant", "bee", "ant"])
    with torch.no_grad():
        ids_BT = pipe.encode(images).flatten(1)
        log_probabilities_BTK = pipe.prior(ids_BT, torch.tensor([0, 1, 0, 1, 0])).log_softmax(dim=-1)
    expected_BT = -log_probabilities_BTK.gather(-1, ids_BT[..., None])[..., 0] / math.log(2)
    torch.testing.assert_close(bits_Bhw.flatten(1), expected_BT)
    torch.testing.assert_close(bits_B, expected_BT.sum(dim=1))
    monkeypatch.setattr(scores, "MAX_LOGITS", 2 * 16 * 16)  # two images at a time
    torch.testing.assert_close(pipe.score(images, ["ant", "bee", "ant", "bee", "ant"]).bits, bits_B)


def test_one_image_is_scored_for_several_classes(pipe):
    image = random_image(pipe)
    both_B = pipe.score(image, CLASSES).bits
    torch.testing.assert_close(both_B, torch.cat([pipe.score([image], name).bits for name in CLASSES]))
    without_1 = pipe.score(image).bits
    assert len({round(bits, 3) for bits in (*both_B.tolist(), without_1.item())}) == 3
    torch.testing.assert_close(pipe.score(pipe.tokenizer.transform(image)[None]).bits, without_1)


def test_several_grids_have_a_map_each(tmp_path):
    tokenizer = two_grids(tmp_path / "tokenizer", channels=3)
    coarse, fine = tokenizer.grids
    one = ImageGenerationPipeline(tokenizer, make_prior(tokenizer))
    two = ImageGenerationPipeline(tokenizer, [make_prior(tokenizer, grids=[coarse]),
                                              make_prior(tokenizer, grids=[fine], class_drop=0.1, conditions=[GivenGrid(grid=coarse)])])
    images = [random_image(one, seed) for seed in range(2)]
    for pipe in (one, two):
        bits_B, maps = pipe.score(images, "ant")
        assert {name: tuple(bits_Bhw.shape) for name, bits_Bhw in maps.items()} == {"coarse": (2, 2, 2), "fine": (2, 4, 4)}
        torch.testing.assert_close(bits_B, sum(bits_Bhw.sum(dim=(1, 2)) for bits_Bhw in maps.values()))
    ids, (_, maps) = tokenizer.encode(torch.stack([tokenizer.transform(image) for image in images])), two.score(images, "ant")
    with torch.no_grad():
        nll = two.chain.priors[1].loss(ids["fine"].flatten(1), torch.tensor([0, 0]), {"coarse": ids["coarse"].flatten(1)})
    assert maps["fine"].sum().item() * math.log(2) == pytest.approx(nll.item() * 2 * 48, rel=1e-5), "given the coarse grid"


def test_what_a_score_needs(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer", ImageTransform(16, 1))
    pipe = ImageGenerationPipeline(tokenizer, make_prior(tokenizer, label_drop=0.0))
    image = random_image(pipe)
    for call, words in ((lambda: pipe.score(image), "class_labels is not given"), (lambda: pipe.score("a.png", "ant"), "images is str"),
                        (lambda: pipe.score([image] * 2, ["ant"] * 3), "class_labels has 3 entries and images has 2 entries")):
        with pytest.raises(InputError, match=words):
            call()


# --- finding what is unusual -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> ImageGenerationPipeline:
    """A pipeline that has learned images of one grey value. Its tokenizer has one token per pixel of a coarse image."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = MeanColours({"coarse": 5, "fine": 16}, ImageTransform(16, 1), CLASSES).eval()
    tokenizer.save_pretrained(folder / "tokenizer")
    prior = make_prior(tokenizer).train()
    ids = tokenizer.encode(torch.linspace(-1, 1, 32)[:, None, None, None].expand(-1, 1, 16, 16))
    ids_BT, optimizer = tokenizer.join_tokens(ids), torch.optim.AdamW(prior.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        prior.loss(ids_BT).backward()
        optimizer.step()
    return ImageGenerationPipeline(tokenizer, prior.eval())


@pytest.mark.parametrize(("row", "column"), [(0, 3), (1, 1), (2, 0), (3, 3)])
def test_an_odd_patch_is_found_in_the_map(trained, row, column):
    usual = np.full((16, 16), 120, dtype=np.uint8)
    odd = usual.copy()
    odd[4 * row:4 * row + 4, 4 * column:4 * column + 4] = 250
    bits_B, maps = trained.score([Image.fromarray(usual), Image.fromarray(odd)])
    assert bits_B[1] > bits_B[0] + 3
    assert divmod(int(maps["fine"][1].argmax()), 4) == (row, column)


def test_the_command_finds_the_odd_patch(trained, tmp_path, monkeypatch, capsys):
    """The table has its box, and the picture shows the image and the heat maps of both grids."""
    monkeypatch.setitem(FORMATS, MeanColours.FORMAT, ("tests.test_tokenizer_protocol", "MeanColours"))
    pipeline = saved_pipeline(tmp_path, trained)
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels_HW = np.full((16, 16), 60 * number + 60, dtype=np.uint8)
        pixels_HW[8:12, 4:8] = 250 if number == 1 else pixels_HW[8:12, 4:8]
        Image.fromarray(pixels_HW).save(tmp_path / "images" / f"{number}.png")
    arguments = ["score", str(pipeline), str(tmp_path / "images"), str(tmp_path / "images" / "1.png"), "--out", str(tmp_path / "out")]
    assert dispatch(arguments) == 0
    printed = capsys.readouterr().out
    assert "The most unusual image is" in printed and "1.png with" in printed
    with open(tmp_path / "out" / "scores.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["image"] for row in table] == [str(tmp_path / "images" / f"{number}.png") for number in (0, 1, 2, 1)]
    assert table[1] == table[3] and [table[1][side] for side in ("left", "top", "right", "bottom")] == ["4", "8", "8", "12"]
    bits_B = trained.score([Image.open(row["image"]) for row in table]).bits
    assert [float(row["bits"]) for row in table] == pytest.approx(bits_B.tolist(), abs=1e-3)
    with Image.open(tmp_path / "out" / "1.png") as picture:
        assert picture.mode == "RGB" and picture.size == ((3 * 18 + 2) * 4, (18 + 2) * 4)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"0.png", "1.png", "2.png", "1_2.png"}
    assert dispatch(arguments) == 0 and "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match="images of another request: --classes was not given, now bee"):
        dispatch([*arguments, "--classes", "bee"])
    with pytest.raises(InputError, match="is inside"):
        dispatch([*arguments[:-1], str(tmp_path / "images" / "out")])


@pytest.fixture
def photos(tmp_path) -> tuple[ImageGenerationPipeline, list[str]]:
    """A pipeline, and the command that scores three images, of which the second one is truncated."""
    pipe = make_pipe(tmp_path / "made")
    for number in range(3):
        random_image(pipe, number).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    return pipe, ["score", str(saved_pipeline(tmp_path, pipe)), *(str(tmp_path / f"{number}.png") for number in range(3)),
                  "--out", str(tmp_path / "out")]


def read_table(tmp_path) -> list[dict[str, str]]:
    with open(tmp_path / "out" / "scores.csv") as file:
        return list(csv.DictReader(file))


def test_unreadable_images_have_empty_cells(photos, tmp_path):
    pipe, arguments = photos
    for _ in range(2):
        with pytest.raises(InputError, match=r"1 of 3 images cannot be read, .*\n  image '.*1.png' cannot be read: "):
            dispatch(arguments)
        table = read_table(tmp_path)
        assert [bool(row["bits"]) for row in table] == [True, False, True]
        assert float(table[2]["bits"]) == pytest.approx(pipe.score(random_image(pipe, 2)).bits.item(), abs=2e-3)
        assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"0.png", "2.png"}


def test_finished_rows_are_kept_after_an_interruption(photos, tmp_path, monkeypatch):
    """Batches of one image; a signal arrives while the second one is read."""
    pipe, arguments = photos
    random_image(pipe, 1).save(tmp_path / "1.png")
    monkeypatch.setattr(write_results, "tokenizer_batch_size", lambda _: 1)
    load, read = write_results.load_image, []

    def stopped_at_the_second(path, transform):
        read.append(path.name)
        if len(read) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return load(path, transform)

    monkeypatch.setattr(write_results, "load_image", stopped_at_the_second)
    with pytest.raises(Interrupted, match=r"1 of 3 images is scored\. Run the same command to continue"):
        dispatch(arguments)
    assert [bool(row["bits"]) for row in read_table(tmp_path)] == [True, False, False]
    assert dispatch(arguments) == 0 and read == ["0.png", "1.png", "1.png", "2.png"]
    bits_B = pipe.score([random_image(pipe, number) for number in range(3)]).bits
    assert [float(row["bits"]) for row in read_table(tmp_path)] == pytest.approx(bits_B.tolist(), abs=2e-3)


def test_a_table_without_a_row_gives_no_image_the_score_of_another(photos, tmp_path):
    pipe, arguments = photos
    random_image(pipe, 1).save(tmp_path / "1.png")
    assert dispatch(arguments) == 0
    expected, table = read_table(tmp_path), tmp_path / "out" / "scores.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join([lines[0], *lines[2:]]))
    (tmp_path / "out" / "2.png").unlink()
    assert dispatch(arguments) == 0
    found = read_table(tmp_path)
    assert [row["image"] for row in found] == [row["image"] for row in expected]
    assert [float(row["bits"]) for row in found] == pytest.approx([float(row["bits"]) for row in expected], abs=2e-3)


# --- conditions ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory) -> Path:
    """A pipeline whose prior always needs a low resolution, and also takes a class and a text."""
    root = tmp_path_factory.mktemp("conditioned")
    return make_parts(root, low_drop=0.0, class_drop=0.1).bundle(root / "pipeline")


@pytest.fixture
def pairs(conditioned, tmp_path) -> tuple[ImageGenerationPipeline, Path]:
    """The pipeline, and a folder with images/{a,b}.png and small/{a,b}.png."""
    pipe = ImageGenerationPipeline.from_pretrained(conditioned, "cpu")
    for number, name in enumerate("ab"):
        for folder in ("images", "small"):
            (tmp_path / folder).mkdir(exist_ok=True)
            random_image(pipe, number + 10 * (folder == "small")).save(tmp_path / folder / f"{name}.png")
    return pipe, tmp_path


def test_images_are_scored_with_their_conditions(pairs, conditioned, capsys):
    """A folder has a condition for each image, a file is for all; the prompt is for all. The same command finishes an unfinished folder."""
    pipe, root = pairs
    images, small = ([Image.open(root / folder / f"{name}.png") for name in "ab"] for folder in ("images", "small"))
    command = ["score", str(conditioned), str(root / "images"), "--out", str(root / "out"), "--device", "cpu", "--condition_image"]
    expected_B = pipe.score(images, "bee", prompt="sea", condition_image=small).bits
    assert dispatch([*command, str(root / "small"), "--prompt", "sea", "--classes", "bee"]) == 0
    assert [float(row["bits"]) for row in read_table(root)] == pytest.approx(expected_B.tolist(), abs=2e-3)
    (root / "out/b.png").unlink()
    assert dispatch([*command, f"low={root / 'small'}", "--prompt", "sea", "--classes", "bee"]) == 0
    assert "wrote scores.csv and 1 picture" in capsys.readouterr().out
    assert [float(row["bits"]) for row in read_table(root)] == pytest.approx(expected_B.tolist(), abs=2e-3)
    with pytest.raises(InputError, match="another request: --prompt was sea, now not given"):
        dispatch([*command, str(root / "small"), "--classes", "bee"])
    with pytest.raises(InputError, match="another request: the given images are other files"):
        dispatch([*command, str(root / "small/b.png"), "--prompt", "sea", "--classes", "bee"])
    command[command.index("--out") + 1] = str(root / "single/out")
    assert dispatch([*command, str(root / "small/b.png")]) == 0
    expected_B = pipe.score(images, condition_image=small[1]).bits
    assert [float(row["bits"]) for row in read_table(root / "single")] == pytest.approx(expected_B.tolist(), abs=2e-3)


def test_an_image_without_a_readable_condition_has_empty_cells(pairs, conditioned):
    _, root = pairs
    (root / "small/a.png").write_bytes((root / "small/a.png").read_bytes()[:60])
    command = ["score", str(conditioned), str(root / "images"), "--condition_image", str(root / "small"), "--out", str(root / "out"), "--device",
               "cpu"]
    with pytest.raises(InputError, match=r"1 of 2 images cannot be read, .*\n  image '.*small/a.png' cannot be read: "):
        dispatch(command)
    assert [bool(row["bits"]) for row in read_table(root)] == [False, True]
    (root / "small/a.png").unlink()
    with pytest.raises(InputError, match=r"small has no images with these names: a\. Give a folder with an image of the same name"):
        dispatch(command)


def test_edit_with_conditions(pairs, conditioned):
    pipe, root = pairs
    command = ["edit", str(conditioned), str(root / "images/a.png"), "--keep", "top", "--num", "2", "--seed", "3", "--out", str(root / "out"),
               "--device", "cpu", "--prompt", "sea"]
    with pytest.raises(InputError, match=r"low is not given, .* Give --condition_image FILE\.$"):
        dispatch(command)
    assert not (root / "out").exists()
    assert dispatch([*command, "--condition_image", f"low={root / 'small/b.png'}"]) == 0
    image, low = Image.open(root / "images/a.png"), Image.open(root / "small/b.png")
    expected = pipe.complete(image, "top", num_images_per_label=2, seed=3, prompt="sea", condition_image=low).images
    for number, result in enumerate(expected):
        with Image.open(root / f"out/a-{number}.png") as picture:
            assert picture.tobytes() == result.tobytes()
    assert json.loads((root / "out/edits.json").read_text())["request"]["condition_image"] == ["low"]
    with pytest.raises(InputError, match="another request: the given images are other files"):
        dispatch([*command, "--condition_image", str(root / "small/a.png")])


def two_images() -> ChainVocabulary:
    """The vocabulary of a prior that is given two images and a text."""
    grids = [Grid(name=name, height=2, width=2, codebook_size=4, token_fingerprint="f") for name in ("image", "low", "sketch")]
    return ChainVocabulary([Vocabulary(grids=grids[:1], class_names=None, token_fingerprint="f", label_drop=0.1,
                                       conditions=[*(GivenGrid(grid=grid, drop_rate=0.1) for grid in grids[1:]), given_text()])])


def test_images_of_several_conditions_are_named(tmp_path):
    (tmp_path / "a=b.png").touch()
    found = find_condition_images([f"sketch={tmp_path}/1.png", f"low={tmp_path}/a=b.png"], two_images())
    assert found == {"low": tmp_path / "a=b.png", "sketch": tmp_path / "1.png"} and list(found) == ["low", "sketch"]
    one = ChainVocabulary([dataclasses.replace(two_images().vocabularies[0], conditions=two_images().conditions[:1])])
    assert find_condition_images([f"{tmp_path}/a=b.png"], one) == find_condition_images([f"low={tmp_path}/a=b.png"], one)


@pytest.mark.parametrize(("given", "words"), [
    (["1.png"], "--condition_image is '1.png'; give low=FILE or sketch=FILE"), (["depth=1.png"], "is 'depth=1.png'; give low=FILE or sketch=FILE"),
    (["low=1.png", "low=2.png"], "two images for low: 1.png and 2.png"), (["low="], "--condition_image is '', which is empty"),
    (["text=1.png"], "give low=FILE or sketch=FILE"),
])
def test_condition_images_that_do_not_fit(given, words):
    with pytest.raises(InputError, match=words):
        find_condition_images(given, two_images())


@pytest.mark.parametrize("folder", ["images", "small"])
def test_images_that_differ_only_in_the_suffix_cannot_be_paired(folder, pairs, conditioned):
    _, root = pairs
    Image.open(root / folder / "a.png").convert("RGB").save(root / folder / "a.jpg")
    with pytest.raises(InputError, match=r"several images have the same name up to the suffix, such as a\.(png|jpg)"):
        dispatch(["score", str(conditioned), str(root / "images"), "--out", str(root / "out"), "--condition_image", str(root / "small")])


@pytest.mark.usefixtures("photos")
def test_the_folder_of_another_request(tmp_path):
    """It can be used if that request was stopped before its first picture. Otherwise, it is refused, also if it was finished in the meantime."""
    images = {f"{number}.png": tmp_path / f"{number}.png" for number in (0, 2)}
    by_class = [ScoreFolder(out=tmp_path / "out", pipeline=tmp_path / "pipeline", class_names=CLASSES, labels=[label], images=images, prompt=None,
                            condition_images={}, dtype="float32")
                for label in (0, 1)]
    by_class[0].begin()
    assert write_scores(by_class[1], "cpu") == 0
    with pytest.raises(InputError, match="another request: --classes was bee, now ant"):
        write_scores(by_class[0], "cpu")


@pytest.mark.parametrize(("options", "words"), [(["--classes", "ant,bee"], "2 classes for 1 images"), (["--classes", "cow"], "no class 'cow'")])
def test_the_command_refuses_invalid_classes(tmp_path, options, words):
    pipe = make_pipe(tmp_path / "made")
    random_image(pipe).save(tmp_path / "photo.png")
    with pytest.raises(InputError, match=words):
        dispatch(["score", str(saved_pipeline(tmp_path, pipe)), str(tmp_path / "photo.png"), "--out", str(tmp_path / "out"), *options])
