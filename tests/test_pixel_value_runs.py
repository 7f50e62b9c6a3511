"""Complete runs on images with 1, 2 and 4 channels, one of them with 16 bits per value."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.command_line import dispatch
from pipelines.stages.chain import run_chain
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.find_initial_weights import check_init_from
from stage1_tokenizer.image_files.channels import visible_pixels
from stage1_tokenizer.image_files.images import read_image, to_tensor, to_uint8
from stage1_tokenizer.tokenizer import ImageTokenizer
from tests.tiny import tiny_recipe
from token_shards import TokenShardReader
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe

SIDE, LOW, HIGH = 16, 30000, 30512
"""LOW and HIGH differ by two of 256 levels: with 8 bits per value, the images of the deep run would be nearly flat."""

PIXELS = {2: np.array([(230, 30), (20, 255), (120, 150)]), 4: np.array([(230, 30, 40, 30), (20, 40, 220, 255), (40, 220, 30, 150)])}
"""The pixels in the images with alpha, by number of channels."""


def quarters(values: np.ndarray, side: int = 2 * SIDE) -> np.ndarray:
    """An image (side, side, C) whose four quarters have these values (2, 2, C)."""
    return values.repeat(side // 2, 0).repeat(side // 2, 1)


def write_photo(path: Path, channels: int, seed: int) -> None:
    """Write an image with random quarters: 16-bit grey, grey and alpha, or RGB and alpha."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    if channels == 1:
        Image.fromarray(quarters(rng.integers(LOW, HIGH, (2, 2, 1))).astype(np.uint16)[..., 0]).save(path)
    else:
        Image.fromarray(quarters(PIXELS[channels][rng.integers(0, 3, (2, 2))]).astype(np.uint8)).save(path)


def recipe_for(folder: Path, channels: int, **changes: object) -> Recipe:
    """The recipe of a tiny run with as many steps as its tokenizer needs to reconstruct quarters."""
    steps, learning_rate = (60, 0.003) if channels == 1 else (160, 0.006)
    settings = {"tokenizer__patch_size": 4, "tokenizer__channel_multipliers": [1, 1], "tokenizer_training__max_steps": steps,
                "tokenizer_training__validate_every": steps, "tokenizer_training__checkpoint_every": steps,
                "tokenizer_training__learning_rate": learning_rate,
                "data__value_range": f"[{LOW},{HIGH}]" if channels == 1 else "null", "prior_training__max_steps": 3, **changes}
    return tiny_recipe(folder / "run", data__source="folder", data__path=folder / "photos", data__channels=channels, data__shift=0,
                       data__flip="true", tokens__views="flip", tokens__images_per_shard=20, prior__architecture="grid_transformer", **settings)


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["grey of 16 bits", "grey and alpha", "RGB and alpha"])
def run(request, tmp_path_factory) -> Path:
    """A finished run. The photos are beside it."""
    folder = tmp_path_factory.mktemp(f"channels{request.param}")
    for number in range(48):
        write_photo(folder / "photos" / "ab"[number % 2] / f"{number:02}.png", request.param, number)
    assert run_chain(recipe_for(folder, request.param)) == 0
    return folder / "run"


@pytest.fixture
def channels(run) -> int:
    """The number of channels of the run."""
    return json.loads((run / "tokenizer" / "config.json").read_text())["transform"]["channels"]


def test_settings_are_recorded_and_nothing_is_trained_again(run, channels):
    transform = json.loads((run / "tokenizer" / "config.json").read_text())["transform"]
    value_range = {"value_range": [LOW, HIGH]} if channels == 1 else {}
    assert transform == {"image_size": SIDE, "channels": channels, "resampling": "bicubic", **value_range}
    assert run_chain(load_recipe(str(run))) == 0
    if channels == 1:
        with pytest.raises(InputError, match=r"data.value_range = \[30000.0, 30512.0\], now it is \[0.0, 65535.0\]"):
            dispatch(["train-tokenizer", str(run), "--data.value_range", "[0,65535]"])


def test_the_tokenizer_reconstructs_all_channels(run, channels):
    tokenizer, source = ImageTokenizer.from_pretrained(run / "tokenizer"), open_splits(load_recipe(str(run)).data).validation
    images = torch.stack([tokenizer.transform(source.read(index)) for index in range(len(source))])
    restored = tokenizer.reconstruct(images).clamp(-1, 1)
    assert images.shape[1] == channels
    error_C, variance_C = ((each.square().mean((0, 2, 3))) for each in (restored - images, images - images.mean((0, 2, 3), keepdim=True)))
    assert (error_C < 0.8 * variance_C).all(), (error_C, variance_C)
    metrics = [json.loads(line) for line in (run / "logs" / "tokenizer" / "metrics.jsonl").read_text().splitlines()]
    psnr = next(line["psnr"] for line in reversed(metrics) if "psnr" in line)
    assert psnr == pytest.approx(-10 * np.log10((restored - images).square().mean().item() / 4), abs=0.1), "over all channels, relative to the range"
    stored = tokenizer.transform.to_stored_values(images)
    with Image.open(run.parent / "photos" / source.source_name(0)) as photo:
        assert np.allclose(stored[0, :, 0, 0], np.asarray(photo, np.float64).reshape(-1, channels)[0], atol=0.01)


def test_stored_tokens_are_those_of_the_images(run):
    recipe, tokenizer = load_recipe(str(run)), ImageTokenizer.from_pretrained(run / "tokenizer")
    reader, source = TokenShardReader(run / "tokens" / "train"), open_splits(recipe.data).train
    pixels = np.stack([tokenizer.transform.resize(source.read(int(index))) for index in reader.indices_N[:4]])
    ids_BT = torch.as_tensor(np.asarray(reader.samples(np.arange(4), 0).ids_BT)).long()
    assert torch.equal(ids_BT, tokenizer.encode(to_tensor(pixels)).flatten(1))
    assert dispatch(["audit", str(run / "tokens" / "train")]) == 0


def test_pictures_have_8_bits_and_no_alpha(run, channels):
    mode = "L" if channels < 3 else "RGB"
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(run / name) as picture:
            assert picture.mode == mode


def test_generate_writes_pictures(run, channels, tmp_path, capsys):
    command = ["generate", str(run), "--num", "2", "--seed", "1", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert dispatch(command) == 0
    files = sorted(set((tmp_path / "out").glob("*.png")) - {tmp_path / "out" / "grid.png"})
    pipe = ImageGenerationPipeline.from_pretrained(run, "cpu")
    out, tensors = (pipe(["a", "b"], num_images_per_label=2, seed=1, output_type=kind) for kind in ("np", "pt"))
    assert out.images.shape == (4, SIDE, SIDE, channels) and out.images.dtype == np.uint8 and tensors.images.shape == (4, channels, SIDE, SIDE)
    assert np.array_equal(to_uint8(tensors.images), out.images) and tensors.images.abs().max() <= 1
    shown = visible_pixels(out.images)
    for file, pixels, image in zip(files, shown, pipe.decode(out.token_ids), strict=True):
        with Image.open(file) as picture:
            assert picture.mode == image.mode and np.array_equal(np.asarray(picture).reshape(pixels.shape), pixels)
            assert picture.tobytes() == image.tobytes()
    assert dispatch(command) == 0 and "nothing to do" in capsys.readouterr().out


def test_reconstruct_command_and_demo_agree(run, channels, tmp_path):
    demo = pytest.importorskip("pipelines.demo.page")
    photo = run.parent / "photos" / "a" / "00.png"
    command = ["reconstruct", str(run), str(photo), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert dispatch(command) == 0 and dispatch(command) == 0
    pipe = ImageGenerationPipeline.from_pretrained(run, "cpu")
    seen, tokens, restored, report = demo.reconstruct(pipe, threading.Event(), str(photo))
    with Image.open(tmp_path / "out" / "00.png") as written:
        assert written.tobytes() == restored.tobytes() and written.mode == seen.mode == ("L" if channels < 3 else "RGB")
    read = read_image(photo, channels=channels, value_range=pipe.tokenizer.transform.value_range)
    image = pipe.tokenizer.transform(read)[None]
    error = (image - pipe.tokenizer.reconstruct(image).clamp(-1, 1)).square().mean().item() / 4
    assert float(report.split("reconstruction is ")[1].split(" dB")[0]) == pytest.approx(-10 * np.log10(error), abs=0.3)
    assert ("256 values became" in report) == (channels == 1) and 'class="tokens"' in tokens
    gallery, grid, *_ = demo.generate(pipe, run, threading.Event(), lambda *_, **__: None, ["a", "b"], 2, 0, {})
    assert len(gallery) == 4 and {image.mode for image, _ in gallery} == {grid.mode} == {seen.mode}


def test_pipelines_encode_pil_images(run, channels):
    pipe = ImageGenerationPipeline.from_pretrained(run, "cpu")
    photo = run.parent / "photos" / "b" / "01.png"
    with Image.open(photo) as image:
        expected = pipe.encode(pipe.tokenizer.transform(read_image(photo, channels=channels, value_range=pipe.tokenizer.transform.value_range))[None])
        assert torch.equal(pipe.encode(image), expected)
    if channels == 1:
        with pytest.raises(InputError, match=r"8 bits per value, at most 255, but data\.value_range ends at 30512"):
            pipe.encode(Image.new("L", (SIDE, SIDE)))


def test_check_data_reads_the_values(run, channels, tmp_path, capsys):
    photos = Path(shutil.copytree(run.parent / "photos", tmp_path / "photos"))
    write_photo(photos / "a" / "copy.png", channels, 0)
    Image.new("RGB", (SIDE, SIDE)).save(photos / "b" / "eight.png")
    dispatch(["check-data", str(run), "--data.path", str(photos)])
    printed = capsys.readouterr().out
    assert "a/00.png" in printed and "a/copy.png" in printed, "equal images are duplicates"
    assert ("eight.png: Pillow reads it with 8 bits per value" in printed) == (channels == 1)


def test_another_range_is_refused(run, channels, tmp_path, capsys):
    overrides = ["--run_dir", str(tmp_path / "other"), "--tokens.tokenizer", str(run / "tokenizer")]
    given, needed = ("null", f"[{LOW}.0, {HIGH}.0]") if channels == 1 else ("[0,255]", "null")
    assert dispatch(["preprocess", str(run / "recipe.yaml"), *overrides, "--data.value_range", given]) == 2
    assert f"Set data.value_range to {needed}" in capsys.readouterr().err
    assert not (tmp_path / "other" / "tokens").exists()
    for weights in (run / "tokenizer", max((run / "checkpoints" / "tokenizer").glob("step-*"))):
        changes = {"tokenizer_training__init_from": weights, "tokenizer_training__train_parts": "decoder", "run_dir": tmp_path / "tuned"}
        recipe = recipe_for(run.parent, channels, **{name: value for name, value in changes.items() if name != "run_dir"})
        recipe.run_dir = str(tmp_path / "tuned")
        check_init_from(recipe)
        recipe.data.value_range = [0.0, 1.0]
        with pytest.raises(InputError, match=r"data.value_range is \[0.0, 1.0\], but .* Set data.value_range to (null|\[30000.0, 30512.0\])"):
            check_init_from(recipe)


def test_tables_give_the_same_images(run, channels, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = sorted((run.parent / "photos").glob("*/*.png"))
    rows = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "label": [file.parent.name for file in files]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows["label"] = ["ab".index(label) for label in rows["label"]]
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "tables" / "train.parquet")
    data = recipe_for(run.parent, channels).data
    data.source, data.path = "huggingface", str(tmp_path / "tables")
    source = open_splits(data).train
    expected = read_image(files[int(source.source_name(0))], channels=channels, value_range=data.value_range)
    assert source.read(0).tobytes() == expected.tobytes()


@pytest.mark.parametrize("channels", [2, 4])
def test_runs_with_a_discriminator_and_worker_processes(channels, tmp_path):
    for number in range(24):
        write_photo(tmp_path / "photos" / f"{number:02}.png", channels, number)
    changes = {"data__crop_scale": 0.7, "data__workers": 1, "adversarial__weight": 0.1, "adversarial__layers": 1, "adversarial__channels": 8,
               "adversarial__start": 0, "adversarial__augmentations": ["color", "translation"], "tokenizer_training__batch_size": 4,
               "tokenizer_training__max_steps": 3, "sampling__guidance_scale": 1, "data__value_range": "[0,255]"}
    recipe = recipe_for(tmp_path, channels, **changes)
    assert run_chain(recipe) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tokens"]["count"] == (SIDE // 8) ** 2
