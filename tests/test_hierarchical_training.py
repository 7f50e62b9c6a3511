"""Training the tokenizer with two levels: start, validation, alarm, VQ-GAN, resume, fine-tuning, and a run of all stages from images to samples."""

import json
import math
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from pipelines import ImageGenerationPipeline
from pipelines.command_line import dispatch
from pipelines.stages.stage_checks import check_before_start
from stage1_tokenizer import load_tokenizer
from stage1_tokenizer import train as train_module
from stage1_tokenizer.data.image_batches import TrainingImages
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.quantizers import EMAQuantizer, QuantizerOutput
from stage1_tokenizer.tokenizer_setup import describe_tokens, initialize_codebooks, warn_if_codebook_is_large
from stage1_tokenizer.trainable.codebook_usage import CodeCounts
from stage1_tokenizer.trainable.hierarchical_tokenizer import HierarchicalTokenizer
from stage2_prior.train import train as train_prior
from stage2_prior.vocabulary import Vocabulary
from tests.run_files import records
from tests.test_adversarial_training import ADVERSARIAL, assert_same_results, train_until_interrupted
from tests.tiny import HIERARCHICAL, run_tiny_chain, tiny_overrides, tiny_recipe
from token_shards import TokenShardReader
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig
from vqmosaic.training.weight_averaging import make_average


def train(run_dir: Path, **changes) -> Path:
    train_module.train(tiny_recipe(run_dir, **HIERARCHICAL | changes))
    return run_dir


def tokenizer_of(recipe: Recipe) -> HierarchicalTokenizer:
    return HierarchicalTokenizer(recipe.tokenizer, ImageTransform(16, 1), seed=recipe.seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder with a trained tokenizer of two levels. Tests must not change it."""
    return train(tmp_path_factory.mktemp("levels") / "run")


# --- all stages --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished tiny run of the recipe digits_vqvae2."""
    folder = tmp_path_factory.mktemp("digits_vqvae2") / "run"
    assert run_tiny_chain(load_recipe("digits_vqvae2", tiny_overrides(folder))) == 0
    return folder


def test_one_prior_draws_both_grids(run):
    vocabulary, reader = Vocabulary.load(run / "prior"), TokenShardReader(run / "tokens/train")
    sizes = [("top", 256, 2, 2), ("bottom", 32, 4, 4)]
    assert [(grid.name, grid.codebook_size, grid.height, grid.width) for grid in vocabulary.grids] == sizes
    pipe = ImageGenerationPipeline.from_pretrained(run, device="cpu")
    splits = open_splits(load_recipe(str(run)).data)
    ids = pipe.encode(torch.stack([pipe.tokenizer.transform(splits.train.read(index)) for index in reader.indices_N[:3]]))
    assert torch.equal(pipe.tokenizer.join_tokens(ids), torch.as_tensor(reader.sequential(0, 3).ids_BT, dtype=torch.int64)), "shards have both grids"
    out = pipe(["3", 7], 2, seed=1, output_type="pt")
    assert {name: tuple(grid_ids.shape) for name, grid_ids in out.token_ids.items()} == {"top": (4, 2, 2), "bottom": (4, 4, 4)}
    assert torch.equal(out.images, pipe.tokenizer.decode(out.token_ids).clamp(-1, 1))
    validation = records(run, "prior", "validation")[-1]
    assert validation["nll_top"] > 0 and validation["nll_bottom"] > 0


def test_commands_and_summary(run, tmp_path, capsys):
    assert dispatch(["generate", str(run), "--classes", "3", "--num", "2", "--seed", "1", "--out", str(tmp_path / "out")]) == 0
    pictures = sorted((tmp_path / "out").glob("3-*.png"))
    assert len(pictures) == 2
    assert dispatch(["reconstruct", str(run), str(pictures[0]), "--out", str(tmp_path / "restored")]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tokens"] == {"count": 20, "codebook_size": {"top": 256, "bottom": 32}, "bits_per_image": 4 * 8 + 16 * 5}
    assert {"codebook_usage_top", "perplexity_bottom", "codebook_usage"} <= summary["tokenizer"].keys()
    (run / "summary.json").unlink()
    capsys.readouterr()
    assert dispatch(["run", str(run)]) == 0
    table = capsys.readouterr().out
    assert "top codebook, validation" in table and "bottom codebook, validation" in table and "20 of 256 codes (top) and 32 codes (bottom)" in table


def test_two_priors_draw_one_grid_each(run, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, changes in ((first, {"drawn": "[top]"}), (second, {"given": "[top]", "drawn": "[bottom]"})):
        settings = {f"prior_training__{name}": value for name, value in {"tokens": run / "tokens", **changes}.items()}
        train_prior(load_recipe("digits_vqvae2", tiny_overrides(folder, **settings)))
    priors = ["--prior", str(first / "prior"), "--prior", str(second / "prior")]
    assert dispatch(["bundle", "--tokenizer", str(run / "tokenizer"), *priors, "--out", str(tmp_path / "pipeline")]) == 0
    pipe = ImageGenerationPipeline.from_pretrained(tmp_path / "pipeline", device="cpu")
    out = pipe(["3", 7], 2, seed=1, output_type="pt")
    assert {name: tuple(grid_ids.shape) for name, grid_ids in out.token_ids.items()} == {"top": (4, 2, 2), "bottom": (4, 4, 4)}
    assert torch.equal(out.images, pipe.tokenizer.decode(out.token_ids).clamp(-1, 1))


# --- start -------------------------------------------------------------------------------------------------------------------


def test_codes_of_the_top_are_initialized_first():
    recipe = tiny_recipe("unused", **HIERARCHICAL)
    tokenizer, splits = tokenizer_of(recipe), open_splits(recipe.data)
    average = make_average(tokenizer, 0.9)
    run = SimpleNamespace(accelerator=Accelerator(cpu=True), training=recipe.tokenizer_training, rank=0, world_size=1, is_main=False, micro_batch=8,
                          average=average)
    images = TrainingImages(splits.train, tokenizer.transform, recipe.data, recipe.seed)
    initialize_codebooks(tokenizer, images, run)
    images_BCHW = torch.cat([batch.images_BCHW for batch in islice(images.batches(0, 16), 4)])  # 256 vectors of the top grid
    for name, level in tokenizer.config.levels.items():
        quantizer, expected = tokenizer.quantizers[name], EMAQuantizer(level, seed=tokenizer.quantizers[name].seed)
        with torch.no_grad():  # the latents of the bottom grid are those with the final codes of the top grid
            latents_BDhw = tokenizer.latents(images_BCHW[:64 if name == "top" else 32], name)
        expected.initialize(latents_BDhw.permute(0, 2, 3, 1).reshape(-1, level.code_dim))
        torch.testing.assert_close(quantizer.codebook, expected.codebook, rtol=1e-4, atol=1e-5)
        assert torch.equal(average.module.quantizers[name].codebook, quantizer.codebook)


def test_the_plan_describes_both_grids(trained, capsys):
    tokenizer = load_tokenizer(trained / "tokenizer")
    lines = describe_tokens(tokenizer, 10)
    assert lines["tokens"] == "top 2 x 2 per image, 16 codes (ema); bottom 4 x 4 per image, 32 codes (ema)"
    assert lines["codebook use is measured on"] == "10 images, 200 tokens"
    continuous = tokenizer_of(tiny_recipe("unused", **HIERARCHICAL | {"tokenizer__top": '{"quantizer": "kl", "code_dim": 4}'}))
    assert describe_tokens(continuous, 10)["latents"] == "top 2 x 2 x 4, continuous (kl); bottom 4 x 4 x 8 (ema), so there are no tokens"


def test_warning_of_a_codebook_that_is_too_large_names_the_level():
    tokenizer, warnings = tokenizer_of(tiny_recipe("unused", **HIERARCHICAL)), []
    for images in (9, 3, 1):
        warn_if_codebook_is_large(tokenizer, images, SimpleNamespace(report=warnings.append))
    assert [warning.partition(",")[0] for warning in warnings] == [
        "warning: tokenizer.top.codebook_size is 16", "warning: tokenizer.top.codebook_size is 16", "warning: tokenizer.codebook_size is 32"]
    assert "only 12 latent vectors (2 x 2 each)" in warnings[0] and "Lower tokenizer.top.codebook_size" in warnings[0]


# --- validation --------------------------------------------------------------------------------------------------------------


def counts_of(top_ids: list[int], bottom_ids: list[int]) -> CodeCounts:
    quantizers = {name: EMAQuantizer(TokenizerConfig(codebook_size=size, code_dim=2)) for name, size in (("top", 4), ("bottom", 8))}
    counts = CodeCounts(quantizers, torch.device("cpu"))
    counts.add({name: QuantizerOutput(torch.zeros(()), torch.tensor(ids).view(1, 1, -1), torch.zeros(()))
                for name, ids in (("top", top_ids), ("bottom", bottom_ids))})
    return counts


def test_usage_and_perplexity_of_each_level_and_of_both():
    metrics = counts_of([0, 1], [0, 1, 2, 3, 4, 5, 6, 7]).metrics()
    assert metrics["codebook_usage_top"] == 0.5 and metrics["codebook_usage_bottom"] == 1 and metrics["codebook_usage"] == pytest.approx(10 / 12)
    assert metrics["perplexity_top"] == pytest.approx(2) and metrics["perplexity_bottom"] == pytest.approx(8)
    assert metrics["perplexity"] == pytest.approx(math.exp((2 * math.log(2) + 8 * math.log(8)) / 10))


def test_validations_report_both_levels(trained, capsys):
    for record in records(trained, "tokenizer", "validation"):
        assert {f"{metric}{suffix}" for metric in ("codebook_usage", "perplexity") for suffix in ("", "_top", "_bottom")} <= record.keys()
        assert 1 <= record["perplexity_top"] <= 16 and 1 <= record["perplexity_bottom"] <= 32


@pytest.mark.parametrize("collapsed, other", [("top", "bottom"), ("bottom", "top")])
def test_alarm_names_the_level_that_collapsed(collapsed, other, tmp_path, monkeypatch, capsys):
    initialize = train_module.initialize_codebooks

    def initialize_and_spread(tokenizer, *arguments):
        initialize(tokenizer, *arguments)
        quantizer = tokenizer.quantizers[collapsed]
        quantizer.codebook += 100 * torch.arange(quantizer.codebook_size)[:, None]  # all but the first are far away from all latents
        quantizer.ema_sums.copy_(quantizer.codebook * quantizer.ema_counts[:, None])

    monkeypatch.setattr(train_module, "initialize_codebooks", initialize_and_spread)
    train(tmp_path / "run", tokenizer__revival_threshold=0, tokenizer__ema_decay=0.999999, tokenizer_training__weight_ema_decay=0,
          tokenizer_training__max_steps=2, tokenizer_training__usage_alarm=0.4)
    out = capsys.readouterr().out
    usage, section = ("6.2%", "tokenizer.top") if collapsed == "top" else ("3.1%", "tokenizer")
    assert f"only {usage} of the {collapsed} codebook is in use at step 2. Remedies: a smaller {section}.codebook_size" in out
    assert f"of the {other} codebook is in use" not in out and f"{usage} of the {collapsed} codebook used" in out


# --- training ----------------------------------------------------------------------------------------------------------------


def test_resumed_training_with_a_discriminator_equals_uninterrupted_training(tmp_path):
    changes = {**HIERARCHICAL, "tokenizer__dropout": 0.1}
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    train(uninterrupted, **ADVERSARIAL | changes)
    train_until_interrupted(resumed, 5, **changes)
    train(resumed, **ADVERSARIAL | changes)
    assert_same_results(uninterrupted, resumed, 10)
    terms = records(resumed, "tokenizer", "train")[-1]
    assert terms["adversarial_loss"] and terms["discriminator_loss"]
    weights = load_file(resumed / "tokenizer/model.safetensors")
    assert not any(name.startswith("discriminator") for name in weights)


@pytest.mark.parametrize("quantizers", [("gradient", "fsq"), ("residual", "gumbel")])
def test_other_quantizers_train(quantizers, tmp_path):
    top, bottom = quantizers
    train(tmp_path / "run", tokenizer__quantizer=bottom, tokenizer__codebook_size=64, tokenizer__residual_depth=2,
          tokenizer__top=json.dumps({"quantizer": top, "codebook_size": 16}))
    tokenizer = load_tokenizer(tmp_path / "run/tokenizer")
    assert [quantizer.KIND for quantizer in tokenizer.quantizers.values()] == [top, bottom]
    losses = [record["reconstruction_loss"] for record in records(tmp_path / "run", "tokenizer", "train")]
    assert losses[-1] < losses[0]


def test_exported_codes_are_not_averaged(trained):
    newest = load_file(trained / "checkpoints/tokenizer/step-00000006/model.safetensors")
    exported = load_file(trained / "tokenizer/model.safetensors")
    for name in ("top_quantizer.codebook", "bottom_quantizer.codebook"):
        assert torch.equal(exported[name], newest[name])
    assert not torch.equal(exported["top_decoder.conv_out.weight"], newest["top_decoder.conv_out.weight"])


# --- fine-tuning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["tokenizer", "checkpoints/tokenizer/step-00000006"])
def test_fine_tuning_the_decoder_keeps_the_ids(start, trained, tmp_path):
    tuned = train(tmp_path / "run", tokenizer_training__init_from=trained / start, tokenizer_training__train_parts="decoder",
                  adversarial__weight=0.5, adversarial__start=0, adversarial__layers=1, adversarial__channels=16)
    before, after = (load_tokenizer(folder / "tokenizer") for folder in (trained, tuned))
    assert after.token_fingerprint == before.token_fingerprint and after.full_fingerprint != before.full_fingerprint
    images_BCHW = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = before.encode(images_BCHW)
    assert all(torch.equal(after.encode(images_BCHW)[name], grid_ids) for name, grid_ids in ids.items())
    assert not torch.equal(after.decode(ids), before.decode(ids))


@pytest.mark.parametrize("changes, message", [
    ({"tokenizer__top": '{"codebook_size": 8, "code_dim": 4}'}, r"tokenizer\.top\.codebook_size is 8 in the recipe and 16 in the weights"),
    ({"tokenizer__top_factor": 4, "tokenizer__channel_multipliers": [1, 1]}, r"tokenizer\.top_factor is 4 in the recipe and 2 in the weights"),
    ({"tokenizer__kind": "image", "tokenizer__top": "{}"}, r"tokenizer\.kind is 'image' in the recipe and 'hierarchical' in the weights\. Set"),
    ({"tokenizer__code_dim": 4}, r"tokenizer\.code_dim is 4 in the recipe and 8 in the weights\. Set")])
@pytest.mark.parametrize("start", ["tokenizer", "checkpoints/tokenizer/step-00000006"])
def test_initial_weights_of_another_network_are_refused(start, changes, message, trained, tmp_path):
    with pytest.raises(InputError, match=message):
        check_before_start(tiny_recipe(tmp_path / "run", tokenizer_training__init_from=trained / start, **HIERARCHICAL | changes), "tokenizer")


def test_weights_of_one_level_cannot_start_two(tiny_run, trained, tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.kind is 'hierarchical' in the recipe and 'image' in the weights"):
        check_before_start(tiny_recipe(tmp_path / "run", tokenizer_training__init_from=tiny_run / "tokenizer", **HIERARCHICAL), "tokenizer")
    same = '{"codebook_size": 16, "code_dim": 4, "commitment_weight": 1.0, "quantizer": "ema", "residual_depth": 2}'  # differs in learning only
    changes = HIERARCHICAL | {"tokenizer__top": same}
    assert check_before_start(tiny_recipe(tmp_path / "run", tokenizer_training__init_from=trained, **changes), "tokenizer") == "start"


@pytest.mark.slow
def test_compiled_training_matches_eager(tmp_path):
    runs = [train(tmp_path / flag, tokenizer_training__compile=flag, tokenizer__channels=64) for flag in ("true", "false")]
    losses = [[record["reconstruction_loss"] for record in records(run, "tokenizer", "train")] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
