"""Runs with several ids per position (residual), with other kinds of ids (fsq, lfq), and without ids (kl)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipelines import ImageGenerationPipeline
from pipelines.bundle import find_tokenizer
from pipelines.command_line import dispatch
from pipelines.stages import stage_checks
from pipelines.stages.chain import run_chain
from pipelines.stages.preprocess import preprocess
from pipelines.stages.stage_checks import check_before_start, check_chain
from stage1_tokenizer import ImageTokenizer
from stage1_tokenizer.data.digits_source import load_scans
from stage1_tokenizer.image_files.images import ImageTransform, to_uint8
from stage1_tokenizer.train import train
from tests.run_files import records
from tests.tiny import CODES, GRID_SIZE, make_tiny_run, tiny_overrides, tiny_recipe
from token_shards import TokenShardReader
from vqmosaic.errors import InputError
from vqmosaic.runs.run_folder import RunFolder

DEPTH = 2
RESIDUAL = {"tokenizer__quantizer": "residual", "tokenizer__residual_depth": DEPTH}
KL = {"tokenizer__quantizer": "kl"}


@pytest.fixture(scope="module")
def residual_run(tmp_path_factory) -> Path:
    """The folder of a finished tiny run with two ids per position."""
    return make_tiny_run(tmp_path_factory.mktemp("residual") / "run", **RESIDUAL)


@pytest.fixture(scope="module")
def pipe(residual_run) -> ImageGenerationPipeline:
    return ImageGenerationPipeline.from_pretrained(residual_run, device="cpu")


def scans_as_images(transform: ImageTransform, count: int) -> torch.Tensor:
    """Transformed images (B, C, H, W) of digits."""
    return torch.stack([transform(Image.fromarray(scan)) for scan in load_scans()[0][:count]])


# --- several ids per position ------------------------------------------------------------------------------------------------


def test_stored_ids_are_ordered_by_position_then_depth(residual_run, pipe):
    reader = TokenShardReader(residual_run / "tokens/validation")
    grid = reader.manifest.grids[0]
    assert (grid.codebook_size, grid.height, grid.width, grid.depth) == (CODES, GRID_SIZE, GRID_SIZE, DEPTH)
    assert grid.num_tokens == reader.manifest.num_tokens == GRID_SIZE**2 * DEPTH
    stored_BT = torch.from_numpy(reader.sequential(0, 8).ids_BT)
    assert stored_BT.shape == (8, GRID_SIZE**2 * DEPTH)
    from stage1_tokenizer.data.open_data import open_splits

    source = open_splits(tiny_recipe("unused", **RESIDUAL).data).validation
    encoded = pipe.tokenizer.encode(torch.stack([pipe.tokenizer.transform(source.read(index)) for index in range(8)]))
    assert encoded.shape == (8, GRID_SIZE, GRID_SIZE, DEPTH)
    assert (stored_BT == encoded.flatten(1)).float().mean() > 0.98, "near ties may differ by rounding in a batch of another shape"
    assert stored_BT[0, 1 * DEPTH + 1] == encoded[0, 0, 1, 1]


def test_shard_arrays_contain_all_ids_of_an_image(residual_run):
    import io
    import tarfile

    with tarfile.open(residual_run / "tokens/train/shard-000000.tar") as tar:
        member = next(member for member in tar if member.name.endswith(".image.npy"))
        ids_VT = np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False)
    assert ids_VT.shape == (1, GRID_SIZE**2 * DEPTH) and ids_VT.dtype == np.uint16


def test_prior_pipeline_and_summary_include_the_depth(residual_run, pipe):
    assert pipe.prior.vocabulary.num_tokens == GRID_SIZE**2 * DEPTH == tiny_recipe("unused", **RESIDUAL).num_tokens
    assert pipe.prior.vocabulary.num_codes == CODES, "all levels share one range of ids"
    assert pipe.tokenizer.grid_shape == (GRID_SIZE, GRID_SIZE, DEPTH)
    summary = json.loads((residual_run / "summary.json").read_text())
    assert summary["tokens"] == {"count": GRID_SIZE**2 * DEPTH, "codebook_size": CODES, "bits_per_image": GRID_SIZE**2 * DEPTH * 5}
    assert (residual_run / "samples.png").is_file() and list((residual_run / "logs/prior/samples").glob("*.png"))


def test_generated_ids_have_the_depth_and_decode_to_the_returned_images(pipe):
    calls = []
    out = pipe([3, "7"], 3, seed=5, batch_size=4, output_type="np", callback=lambda done, total: calls.append(total))
    assert out.token_ids.shape == (6, GRID_SIZE, GRID_SIZE, DEPTH) and out.token_ids.dtype == torch.int64
    assert 0 <= out.token_ids.min() <= out.token_ids.max() < CODES
    assert set(calls) == {2 * GRID_SIZE**2 * DEPTH}
    decoded = np.stack([np.asarray(image)[..., None] for image in pipe.decode(out.token_ids)])
    assert np.abs(decoded.astype(int) - out.images).max() <= 1, "a batch of another shape may differ by one rounding step"
    with pytest.raises(ValueError, match=rf"top_k is {CODES + 1}; allowed: 0 \(off\) to {CODES}"):
        pipe(3, top_k=CODES + 1)


def test_encode_decode_and_reconstruct_agree_with_the_forward_pass(pipe):
    images_BCHW = scans_as_images(pipe.tokenizer.transform, 5)
    ids = pipe.encode(images_BCHW)
    assert ids.shape == (5, GRID_SIZE, GRID_SIZE, DEPTH)
    with torch.no_grad():
        forward_BCHW = pipe.tokenizer(images_BCHW).reconstructions
    torch.testing.assert_close(pipe.tokenizer.decode(ids), forward_BCHW, rtol=0, atol=1e-5)
    torch.testing.assert_close(pipe.tokenizer.reconstruct(images_BCHW), forward_BCHW, rtol=0, atol=1e-5)
    restored = [image.tobytes() for image in pipe.reconstruct(images_BCHW)]
    assert restored == [image.tobytes() for image in pipe.decode(ids)]


def test_second_id_affects_the_image(pipe):
    ids = pipe.encode(scans_as_images(pipe.tokenizer.transform, 1))
    other = ids.clone()
    other[..., 1] = (other[..., 1] + 1) % CODES
    assert not torch.equal(pipe.tokenizer.decode(ids), pipe.tokenizer.decode(other))


def test_rerunning_a_finished_run_does_nothing(residual_run, capsys):
    assert run_chain(tiny_recipe(residual_run, **RESIDUAL)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert dispatch(["audit", str(residual_run)]) == 0


def test_residual_tokenizer_of_depth_1_has_2d_grids(tmp_path):
    recipe = tiny_recipe(tmp_path, tokenizer__quantizer="residual", tokenizer__residual_depth=1)
    tokenizer = ImageTokenizer(recipe.tokenizer, ImageTransform(image_size=16, channels=1)).eval()
    images_BCHW = scans_as_images(tokenizer.transform, 2)
    ids_Bhw = tokenizer.encode(images_BCHW)
    assert tokenizer.grid_shape == (GRID_SIZE, GRID_SIZE) and ids_Bhw.shape == (2, GRID_SIZE, GRID_SIZE)
    assert tokenizer.decode(ids_Bhw).shape == images_BCHW.shape


def test_check_prior_counts_tokens_of_all_levels(tmp_path, monkeypatch):
    import stage2_prior.model.causal_lm

    seen = []
    monkeypatch.setattr(stage2_prior.model.causal_lm, "make_config", lambda prior, vocabulary, any_order: seen.append(vocabulary.num_tokens))
    stage_checks.check_prior_config(tiny_recipe(tmp_path, **RESIDUAL))
    stage_checks.check_prior_config(tiny_recipe(tmp_path))
    assert seen == [GRID_SIZE**2 * DEPTH, GRID_SIZE**2]


def test_demo_shows_a_token_map_for_each_level(pipe, tmp_path):
    pytest.importorskip("gradio")
    import re
    import threading

    from pipelines.demo.page import build, reconstruct

    image = Image.fromarray(load_scans()[0][0])
    image.save(tmp_path / "digit.png")
    _, tokens, _, report = reconstruct(pipe, threading.Event(), str(tmp_path / "digit.png"))
    ids = pipe.encode(image)[0]
    assert tokens.count('class="tokens"') == DEPTH
    assert [int(code) for code in re.findall(r">(\d+)</span>", tokens)] == [*ids[..., 0].flatten().tolist(), *ids[..., 1].flatten().tolist()]
    assert "4 x 4 x 2 tokens" in report and "2,048 bits became 160" in report
    build(pipe)


# --- other kinds of ids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "learnt"), [
    ({"tokenizer__quantizer": "simvq"}, "projection"),
    ({"tokenizer__quantizer": "gradient"}, "codebook"),
    ({"tokenizer__rotation_trick": "true"}, "codebook"),
], ids=["simvq", "gradient", "ema, rotation"])
def test_training_with_other_nearest_code_quantizers(changes, learnt, tiny_run, tmp_path):
    train(tiny_recipe(tmp_path / "run", **changes))
    checkpoints = sorted((tmp_path / "run/checkpoints/tokenizer").glob("step-*"))
    codes = [load_file(folder / "model.safetensors")[f"quantizer.{learnt}"] for folder in checkpoints]
    assert len(codes) == 2 and not torch.equal(*codes), "the learned codes change until the last step"
    own, default = (records(folder, "tokenizer", "train") for folder in (tmp_path / "run", tiny_run))
    assert len(own) == 6 and all(np.isfinite([record["quantizer_loss"], record["gradient_norm"]]).all() for record in own)
    first, other = ([each[0][name] for name in ("quantizer_loss", "gradient_norm")] for each in (own, default))
    assert first != pytest.approx(other, rel=1e-4), "loss or gradients differ from the default"
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "run/tokenizer")
    images_BCHW = scans_as_images(tokenizer.transform, 16)
    with torch.no_grad():
        output = tokenizer(images_BCHW)
    assert torch.equal(tokenizer.encode(images_BCHW), output.quantizer.ids) and len(output.quantizer.ids.unique()) > CODES // 4
    torch.testing.assert_close(tokenizer.reconstruct(images_BCHW), output.reconstructions, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"tokenizer__quantizer": "fsq", "tokenizer__codebook_size": 64},
    {"tokenizer__quantizer": "lfq"},
    {"tokenizer__quantizer": "ibq"},
    {"tokenizer__quantizer": "gumbel"},
    {"tokenizer__quantizer": "simvq"},
    {"tokenizer__quantizer": "gradient"},
    {"tokenizer__quantizer": "ema", "tokenizer__rotation_trick": "true"},
    {**RESIDUAL, "tokenizer__residual_kind": "simvq", "tokenizer__residual_shared": "true"},
], ids=lambda changes: "-".join(map(str, changes.values())))
def test_complete_run_with_every_kind_of_ids(changes, tmp_path):
    pipe = ImageGenerationPipeline.from_pretrained(make_tiny_run(tmp_path / "run", **changes), device="cpu")
    codes = changes.get("tokenizer__codebook_size", CODES)
    out = pipe(3, 2, seed=1)
    assert out.token_ids.shape == (2, *pipe.tokenizer.grid_shape) and out.token_ids.max() < codes
    images_BCHW = scans_as_images(pipe.tokenizer.transform, 4)
    with torch.no_grad():
        forward_BCHW = pipe.tokenizer(images_BCHW).reconstructions
    torch.testing.assert_close(pipe.tokenizer.reconstruct(images_BCHW), forward_BCHW, rtol=0, atol=1e-5)
    reader = TokenShardReader(tmp_path / "run/tokens/train")
    assert reader.manifest.grids[0].codebook_size == codes and reader.sequential(0, len(reader)).ids_BT.max() < codes


# --- no ids ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kl_run(tmp_path_factory) -> Path:
    """A run folder with only a trained kl tokenizer."""
    folder = tmp_path_factory.mktemp("kl") / "run"
    train(tiny_recipe(folder, **KL))
    return folder


WHY = r"'kl', whose latents are continuous.*need discrete ids.*ema, gradient"


def test_run_with_continuous_latents_is_refused_before_it_starts(tmp_path):
    with pytest.raises(InputError, match=rf"tokenizer.quantizer is {WHY}"):
        check_chain(tiny_recipe(tmp_path / "run", **KL), 1, None)
    with pytest.raises(InputError, match=WHY):
        run_chain(tiny_recipe(tmp_path / "run", **KL))
    assert not (tmp_path / "run").exists()


def test_preprocessing_with_a_continuous_tokenizer_in_the_recipe_is_refused(tmp_path):
    with pytest.raises(InputError, match=rf"tokenizer.quantizer is {WHY}"):
        check_before_start(tiny_recipe(tmp_path / "run", **KL), "tokens")
    assert check_before_start(tiny_recipe(tmp_path / "run", **KL), "tokenizer") == "start"


def test_preprocessing_with_a_given_continuous_tokenizer_is_refused(kl_run, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", tokens__tokenizer=kl_run / "tokenizer")
    for call in (lambda: check_before_start(recipe, "tokens"), lambda: preprocess(recipe)):
        with pytest.raises(InputError, match=f"tokenizer in {kl_run}/tokenizer has no ids, .* Set tokens.tokenizer to a tokenizer with ids"):
            call()
    assert not RunFolder(tmp_path / "run").export("tokens").exists()


def test_preprocessing_with_a_continuous_tokenizer_in_the_run_is_refused(kl_run, tmp_path):
    shutil.copytree(kl_run, tmp_path / "run")
    with pytest.raises(InputError, match=f"tokenizer in {tmp_path}/run/tokenizer has no ids"):
        check_before_start(tiny_recipe(tmp_path / "run"), "tokens")


def test_preprocessing_with_a_given_tokenizer_ignores_the_recipe(tiny_run, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", tokens__tokenizer=tiny_run / "tokenizer", **KL)
    assert check_before_start(recipe, "tokens") == "start", "the recipe's tokenizer is not used"


def test_continuous_tokenizer_reconstructs_deterministically(kl_run):
    tokenizer = ImageTokenizer.from_pretrained(kl_run / "tokenizer")
    images_BCHW = scans_as_images(tokenizer.transform, 4)
    restored_BCHW = tokenizer.reconstruct(images_BCHW)
    assert restored_BCHW.shape == images_BCHW.shape and torch.equal(restored_BCHW, tokenizer.reconstruct(images_BCHW)), "no sampling"
    with torch.no_grad():
        torch.testing.assert_close(restored_BCHW, tokenizer(images_BCHW).reconstructions, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no ids"):
        tokenizer.encode(images_BCHW)
    with pytest.raises(ValueError, match=r"shape \(1, 1, 8, 8\)"):
        tokenizer.reconstruct(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("given", ["", "tokenizer"])
def test_reconstruct_command_needs_only_a_tokenizer(given, kl_run, tmp_path, capsys):
    Image.fromarray(load_scans()[0][0]).save(tmp_path / "digit.png")
    assert dispatch(["reconstruct", str(kl_run / given), str(tmp_path / "digit.png"), "--out", str(tmp_path / "out")]) == 0
    assert "wrote 1 reconstruction " in capsys.readouterr().out
    tokenizer = ImageTokenizer.from_pretrained(kl_run / "tokenizer")
    expected_HWC = to_uint8(tokenizer.reconstruct(scans_as_images(tokenizer.transform, 1)))[0]
    with Image.open(tmp_path / "out/digit.png") as image:
        assert np.array_equal(np.asarray(image), expected_HWC[..., 0])


def test_find_tokenizer(tiny_run, kl_run, tmp_path):
    assert find_tokenizer(tiny_run) == find_tokenizer(tiny_run / "pipeline") == tiny_run / "pipeline/tokenizer"
    assert find_tokenizer(tiny_run / "tokenizer") == tiny_run / "tokenizer"
    assert find_tokenizer(kl_run) == find_tokenizer(str(kl_run / "tokenizer")) == kl_run / "tokenizer"
    with pytest.raises(InputError, match=r"does not exist\. Give a run folder, a pipeline folder or a tokenizer folder"):
        find_tokenizer(tmp_path / "none")


def test_run_command_prints_the_error(tmp_path, capsys):
    from pipelines.command_line import main

    with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["vqmosaic", "run", "digits", *tiny_overrides(tmp_path / "run", **KL)])
        main()
    assert ended.value.code == 2 and "whose latents are continuous" in capsys.readouterr().err
