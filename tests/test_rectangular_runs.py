"""Complete runs on images that are not square: a wide one, 32 x 64 pixels, and a tall one, 48 x 16. Nothing is transposed anywhere."""

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
from stage1_tokenizer.image_files.images import ImageTransform, to_tensor
from stage1_tokenizer.image_files.views import training_views
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.vocabulary import Vocabulary
from tests.run_files import flip_byte
from tests.tiny import tiny_recipe
from token_shards import TokenShardReader
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_files import load_recipe

HEIGHT, WIDTH, ROWS, COLUMNS = 32, 64, 4, 8


def write_quarters(path: Path, values: np.ndarray, size: tuple[int, int]) -> None:
    """Write an image of this (width, height) whose four quarters have these grey values (2, 2)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8).repeat(size[1] // 2, 0).repeat(size[0] // 2, 1)).save(path)


def random_values(seed: int) -> np.ndarray:
    """Random grey values of four quarters."""
    return np.random.default_rng(seed).integers(0, 256, (2, 2))


def quarters(image: Image.Image) -> np.ndarray:
    """The mean of each quarter of an image (2, 2)."""
    pixels_HW = np.asarray(image.convert("L"), dtype=float)
    height, width = pixels_HW.shape
    return pixels_HW.reshape(2, height // 2, 2, width // 2).mean((1, 3))


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A finished run on wide images, in which the tokenizer has learned to reconstruct quarters. The photos are beside it."""
    folder = tmp_path_factory.mktemp("wide")
    for number in range(48):
        write_quarters(folder / "photos" / "ab"[number % 2] / f"{number:02}.png", random_values(number), (2 * WIDTH, 2 * HEIGHT))
    recipe = tiny_recipe(
        folder / "run", data__source="folder", data__path=folder / "photos", data__image_size=f"[{HEIGHT},{WIDTH}]", data__shift=0,
        tokenizer__patch_size=4, tokenizer__channel_multipliers=[1, 1], tokenizer_training__max_steps=60, tokenizer_training__validate_every=60,
        tokenizer_training__checkpoint_every=60, tokenizer_training__learning_rate=0.003, tokens__views="flip", tokens__images_per_shard=10,
        prior__architecture="grid_transformer", tokens__batch_size=16)
    assert run_chain(recipe) == 0
    return folder / "run"


@pytest.fixture
def photo(wide) -> Path:
    """A photo of the wide run."""
    return wide.parent / "photos" / "a" / "00.png"


def test_sizes_are_recorded(wide):
    config = json.loads((wide / "tokenizer" / "config.json").read_text())
    assert config["transform"] == {"image_size": [HEIGHT, WIDTH], "channels": 1, "resampling": "bicubic"}
    grid = TokenShardReader(wide / "tokens" / "train").manifest.grids[0]
    assert (grid.height, grid.width) == (ROWS, COLUMNS)
    prior_grid = Vocabulary.load(wide / "prior").grids[0]
    assert (prior_grid.height, prior_grid.width) == (ROWS, COLUMNS)
    assert json.loads((wide / "summary.json").read_text())["tokens"]["count"] == ROWS * COLUMNS
    tokenizer = ImageTokenizer.from_pretrained(wide / "tokenizer")
    assert tokenizer.grid_shape == tokenizer.grid_size == (ROWS, COLUMNS)
    assert load_recipe(str(wide)).data.image_size == [HEIGHT, WIDTH]
    assert run_chain(load_recipe(str(wide))) == 0, "nothing is trained again"


def test_stored_tokens_are_those_of_the_images(wide):
    recipe, tokenizer = load_recipe(str(wide)), ImageTokenizer.from_pretrained(wide / "tokenizer")
    reader, source = TokenShardReader(wide / "tokens" / "train"), open_splits(recipe.data).train
    for view, expected_view in enumerate(training_views(recipe.tokens)):
        stored = reader.samples(np.arange(4), view)
        pixels = [tokenizer.transform.resize(source.read(int(index)), expected_view) for index in reader.indices_N[:4]]
        assert torch.equal(torch.as_tensor(np.asarray(stored.ids_BT)).view(-1, ROWS, COLUMNS).long(), tokenizer.encode(to_tensor(np.stack(pixels))))


def test_each_token_is_decoded_at_its_place(wide):
    """Changing one token changes the picture most at this token or beside it."""
    tokenizer = ImageTokenizer.from_pretrained(wide / "tokenizer")
    ids_1hw = tokenizer.encode(torch.zeros(1, 1, HEIGHT, WIDTH))
    for row, column in ((0, 0), (0, COLUMNS - 1), (ROWS - 1, 1), (2, 5)):
        changed_Bhw = ids_1hw.repeat(tokenizer.config.codebook_size, 1, 1)
        changed_Bhw[:, row, column] = torch.arange(tokenizer.config.codebook_size)
        difference_HW = (tokenizer.decode(changed_Bhw) - tokenizer.decode(ids_1hw)).abs().mean((0, 1))
        difference_hw = difference_HW.view(ROWS, HEIGHT // ROWS, COLUMNS, WIDTH // COLUMNS).mean((1, 3))
        changed_row, changed_column = divmod(int(difference_hw.argmax()), COLUMNS)
        assert abs(changed_row - row) <= 1 and abs(changed_column - column) <= 1


def test_reconstructions_keep_left_and_right_and_top_and_bottom(wide, tmp_path):
    for number in range(4):  # one bright quarter, in an image of the right proportions and in a portrait, whose centre is cropped
        values = np.where(np.arange(4).reshape(2, 2) == number, 230, 30)
        write_quarters(tmp_path / f"wide-{number}.png", values, (2 * WIDTH, 2 * HEIGHT))
        write_quarters(tmp_path / f"tall-{number}.png", values, (64, 128))
    files = sorted(tmp_path.glob("*.png"))
    assert dispatch(["reconstruct", str(wide), *map(str, files), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    for file in files:
        with Image.open(tmp_path / "out" / file.name) as restored, Image.open(file) as original:
            assert restored.size == (WIDTH, HEIGHT)
            assert quarters(restored).argmax() == quarters(original).argmax() and np.ptp(quarters(restored)) > 50


def test_generated_images_are_wide(wide, tmp_path, capsys):
    command = ["generate", str(wide), "--num", "3", "--seed", "1", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert dispatch(command) == 0
    files = sorted(set((tmp_path / "out").glob("*.png")) - {tmp_path / "out" / "grid.png"})
    contents = [file.read_bytes() for file in files]
    assert len(files) == 6 and all(Image.open(file).size == (WIDTH, HEIGHT) for file in files)
    pipe = ImageGenerationPipeline.from_pretrained(wide, "cpu")
    out = pipe(["a", "b"], num_images_per_label=3, seed=1, output_type="np")
    assert out.images.shape == (6, HEIGHT, WIDTH, 1) and out.token_ids.shape == (6, ROWS, COLUMNS)
    assert all(np.array_equal(np.asarray(Image.open(file)), pixels[..., 0]) for file, pixels in zip(files, out.images, strict=True))
    assert np.array_equal(out.images, np.stack([np.asarray(image) for image in pipe.decode(out.token_ids)])[..., None])
    assert dispatch(command) == 0 and "nothing to do" in capsys.readouterr().out
    Image.open(files[0]).transpose(Image.Transpose.ROTATE_90).save(files[0])
    assert dispatch(command) == 0 and "1 file" in capsys.readouterr().out, "a picture of the transposed size is written again"
    assert [file.read_bytes() for file in files] == contents


def test_saved_pipeline_generates_the_same_images(wide, tmp_path):
    pipe = ImageGenerationPipeline.from_pretrained(wide, "cpu")
    pipe.save_pretrained(tmp_path / "copy")
    copy = ImageGenerationPipeline.from_pretrained(tmp_path / "copy", "cpu")
    assert torch.equal(pipe("a", seed=3).token_ids, copy("a", seed=3).token_ids)


def test_damaged_shard_is_repaired(wide, tmp_path):
    run = Path(shutil.copytree(wide, tmp_path / "run"))
    assert dispatch(["audit", str(run / "tokens" / "train")]) == 0
    shard = run / "tokens" / "train" / "shard-000001.tar"
    content = shard.read_bytes()
    flip_byte(shard)
    assert dispatch(["audit", str(run / "tokens" / "train")]) != 0
    assert dispatch(["audit", str(run), "--repair"]) == 0
    assert shard.read_bytes() == content


def test_tokens_are_exported_and_imported(wide, tmp_path):
    exported, imported = tmp_path / "tokens.jsonl", tmp_path / "imported"
    assert dispatch(["export-tokens", str(wide / "tokens" / "train"), "--out", str(exported)]) == 0
    assert dispatch(["import-tokens", str(exported), "--tokenizer", str(wide / "tokenizer"), "--out", str(imported)]) == 0
    rows = [json.loads(line)["tokens"] for line in exported.read_text().splitlines()]
    found = []
    for split in ("train", "validation"):
        reader = TokenShardReader(imported / split)
        assert (reader.manifest.grids[0].height, reader.manifest.grids[0].width) == (ROWS, COLUMNS)
        views = [reader.samples(np.arange(len(reader)), view).ids_BT.tolist() for view in range(2)]
        found += [list(ids_VT) for ids_VT in zip(*views, strict=True)]
    assert sorted(found) == sorted(rows)
    np.save(tmp_path / "grids.npy", np.array(rows)[:, 0].reshape(-1, ROWS, COLUMNS))
    assert dispatch(["import-tokens", str(tmp_path / "grids.npy"), "--unlabelled", "--tokenizer", str(wide / "tokenizer"),
                     "--out", str(tmp_path / "grids")]) == 0
    with pytest.raises(InputError, match=r"--height is 8, but the tokenizer in .* has 4"):
        dispatch(["import-tokens", str(exported), "--tokenizer", str(wide / "tokenizer"), "--height", "8", "--width", "4",
                  "--out", str(tmp_path / "transposed")])


def test_demo_generates_and_reconstructs(wide, photo):
    demo = pytest.importorskip("pipelines.demo.page")
    pipe = ImageGenerationPipeline.from_pretrained(wide, "cpu")
    gallery, grid, *_ = demo.generate(pipe, wide, threading.Event(), lambda *_, **__: None, ["a", "b"], 2, 0, {})
    assert [image.size for image, _ in gallery] == [(WIDTH, HEIGHT)] * 4 and grid.width > grid.height
    seen, tokens, restored, report = demo.reconstruct(pipe, threading.Event(), str(photo))
    assert seen.size == restored.size == (WIDTH, HEIGHT)
    assert f"repeat({COLUMNS}," in tokens and f"{HEIGHT} x {WIDTH} pixels became {ROWS} x {COLUMNS} tokens" in report
    with Image.open(photo) as original:
        assert np.abs(quarters(seen) - quarters(original)).max() < 5
    page = str(demo.build(pipe).get_config_file()["components"])
    assert f"{HEIGHT} x {WIDTH} pixels, {ROWS} x {COLUMNS} tokens" in page


def test_another_size_is_refused_before_anything_is_written(wide, tmp_path, capsys):
    recipe = str(wide / "recipe.yaml")
    overrides = ["--run_dir", str(tmp_path / "other"), "--data.image_size", f"[{WIDTH},{HEIGHT}]", "--tokens.tokenizer", str(wide / "tokenizer")]
    assert dispatch(["preprocess", recipe, *overrides]) == 2
    error = capsys.readouterr().err
    assert "data.image_size is [64, 32], but the tokenizer in" in error and "Set data.image_size to [32, 64]" in error
    with pytest.raises(InputError, match=r"data.image_size = \[32, 64\], now it is \[64, 32\]"):
        dispatch(["train-tokenizer", str(wide), "--data.image_size", f"[{WIDTH},{HEIGHT}]"])
    assert not (tmp_path / "other" / "tokens").exists()


def test_tall_run_with_a_discriminator_crops_and_attention(tmp_path):
    for number in range(24):
        write_quarters(tmp_path / "photos" / f"{number:02}.png", random_values(number), (40, 60))
    recipe = tiny_recipe(
        tmp_path / "run", data__source="folder", data__path=tmp_path / "photos", data__image_size="[48,16]", data__crop_scale=0.7, data__flip="true",
        data__shift=2, data__channels=3, tokenizer__middle_attention="true", tokenizer__attention_levels=[1], tokenizer__quantizer="residual",
        tokenizer__residual_depth=2, adversarial__weight=0.1, adversarial__layers=1, adversarial__channels=8, adversarial__start=0,
        adversarial__augmentations=["translation", "cutout"], tokenizer_training__batch_size=4, tokens__views="ten-crop", tokens__images_per_shard=10,
        tokens__batch_size=10, prior_training__max_steps=3, tokenizer_training__max_steps=3, sampling__guidance_scale=1)
    assert run_chain(recipe) == 0
    grid = TokenShardReader(tmp_path / "run" / "tokens" / "train").manifest.grids[0]
    assert (grid.height, grid.width, grid.depth) == (12, 4, 2)
    pipe = ImageGenerationPipeline.from_pretrained(tmp_path / "run", "cpu")
    out = pipe(num_images_per_label=2, seed=0)
    assert [image.size for image in out.images] == [(16, 48)] * 2 and out.token_ids.shape == (2, 12, 4, 2)
    seen = ImageTransform((48, 16), 3).resize(Image.open(tmp_path / "photos" / "00.png"))
    assert pipe.encode(to_tensor(seen)[None]).shape == (1, 12, 4, 2)
