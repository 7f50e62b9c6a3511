"""Training of the prior: activation checkpointing, compilation, losses, the first-loss check, validation, overfit, accelerate configurations."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from pipelines.command_line import dispatch
from stage2_prior import overfit as overfit_module
from stage2_prior import prior_setup
from stage2_prior import train as train_prior
from stage2_prior.losses import next_token_loss, z_loss
from stage2_prior.overfit import conditional_entropy, overfit, overfit_recipe
from stage2_prior.prior import TokenPrior
from stage2_prior.prior_setup import (
    check_first_loss,
    compile_layers,
    describe_attention,
    recompute_activations,
    transformer_layers,
    uniform_loss,
)
from stage2_prior.token_batches import validation_samples
from stage2_prior.train import validate
from tests.run_files import records
from tests.tiny import ROOT, tiny_recipe
from tests.tiny_priors import TWO_GRIDS, VOCABULARY, tiny_prior
from token_shards import TokenShardReader, TokenShardWriter, default_key
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import sha256_of_file, write_json
from vqmosaic.kernels.matmul_attention import MAX_MATMUL_LENGTH
from vqmosaic.recipes.recipe_sections import PriorTrainingConfig
from vqmosaic.runs.accelerator import make_accelerator
from vqmosaic.runs.launch import find_accelerate_config, processes_to_start
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.training.checkpoints import read_state
from vqmosaic.training.training_plan import describe_learning_rate
from vqmosaic.training.training_run import TrainingRun


def batch(size=8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 48, (size, 9), generator=generator), torch.randint(-1, 3, (size,), generator=generator)


def train(run_dir: Path, **changes) -> Path:
    """Train the prior and return the newest checkpoint. `changes` without a section belong to prior_training."""
    fields = {name if "__" in name else f"prior_training__{name}": value for name, value in changes.items()}
    train_prior.train(tiny_recipe(run_dir, **fields))
    return sorted(RunFolder(run_dir).checkpoints("prior").glob("step-*"))[-1]


def loss_and_gradients(prior: TokenPrior) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids_BT, classes_B = batch()
    prior.train().zero_grad()
    torch.manual_seed(3)
    loss = next_token_loss(prior(ids_BT, classes_B), ids_BT)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in prior.named_parameters()}


# --- activation checkpointing, compilation, attention --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
@pytest.mark.filterwarnings("error")
def test_activation_checkpointing_does_not_change_loss_or_gradients(architecture):
    """The second forward computation must use the same dropout mask."""
    prior = tiny_prior(architecture, dropout=0.2)
    loss, gradients = loss_and_gradients(prior)
    calls = []
    transformer_layers(prior.model)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    loss_and_gradients(prior)
    assert len(calls) == 1
    recompute_activations(prior.model)
    loss_again, gradients_again = loss_and_gradients(prior)
    assert len(calls) == 3, "the backward pass computes the layer again"
    assert torch.equal(loss_again, loss)
    assert all(torch.equal(gradients_again[name], gradient) for name, gradient in gradients.items())
    prior.eval()
    with torch.no_grad():
        prior(*batch())
    assert len(calls) == 4


def test_activation_checkpointing_gives_the_same_weights_and_can_be_switched_on_resume(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "plain")
    plain = train(tmp_path / "plain", prior__dropout=0.2)
    train(run_dir, prior__dropout=0.2, activation_checkpointing=True)
    shutil.rmtree(RunFolder(run_dir).checkpoints("prior") / "step-00000006")
    shutil.rmtree(run_dir / "prior")
    found = train(run_dir, prior__dropout=0.2, activation_checkpointing=False)  # resumes from step 4
    for name in ("model.safetensors", "weights_ema.safetensors"):
        assert (found / name).read_bytes() == (plain / name).read_bytes()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_loss_is_computed_in_float32_and_ignores_padded_codes(dtype, tolerance):
    generator = torch.Generator().manual_seed(3)
    logits_BTK = (torch.randn(2, 5, 13, generator=generator) * 3).to(dtype)
    logits_BTK[..., 12] = -torch.inf  # padding, as for smaller grids
    logits_BTK.requires_grad_()
    ids_BT = torch.randint(12, (2, 5), generator=generator)
    found = next_token_loss(logits_BTK, ids_BT)
    exact_BTK = logits_BTK.detach().double().requires_grad_()
    expected = -exact_BTK.log_softmax(-1).gather(-1, ids_BT[..., None]).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    (gradient,), (exact_gradient,) = torch.autograd.grad(found, logits_BTK), torch.autograd.grad(expected, exact_BTK)
    assert gradient.dtype == dtype and not gradient[..., 12].any()
    assert (gradient - exact_gradient).abs().max() <= tolerance * exact_gradient.abs().max()


def test_activation_checkpointing_of_an_unsupported_architecture_is_refused(monkeypatch):
    model = tiny_prior().model
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match=r"prior_training\.activation_checkpointing is true, but llama does not support it"):
        recompute_activations(model)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "recomputed", "order"), [("llama", False, "raster"), ("llama", True, "raster"),
                                                                    ("grid_transformer", True, "raster"), ("grid_transformer", False, "random")])
def test_compiled_training_matches_eager_and_does_not_affect_files(architecture, recomputed, order, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "plain")
    plain = train(tmp_path / "plain", prior__architecture=architecture, prior__dropout=0, prior__layers=2, order=order)
    compiled_models = []
    original = prior_setup.compile_layers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prior_setup, "compile_layers", lambda model, *how: (original(model, *how), compiled_models.append(model)))
        found = train(run_dir, prior__architecture=architecture, prior__dropout=0, prior__layers=2, order=order, compile=True,
                      activation_checkpointing=recomputed)
    (model,) = compiled_models
    assert all(layer._compiled_call_impl is not None for layer in transformer_layers(model))
    for name in ("model.safetensors", "weights_ema.safetensors"):
        expected, weights = load_file(plain / name), load_file(found / name)
        assert weights.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-4, msg=key)
    assert load_file(run_dir / "prior/model.safetensors").keys() == load_file(tmp_path / "plain/prior/model.safetensors").keys()
    TokenPrior.from_pretrained(run_dir / "prior")


@pytest.mark.slow
def test_compiled_grid_transformer_in_bf16_matches_eager():
    prior = tiny_prior("grid_transformer", dropout=0.0)
    with torch.no_grad():  # a new block adds nothing, so most of its weights would get no gradient
        for parameter in prior.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.1)
    ids_BT, classes_B = batch()
    gradients = []
    for compiled in (False, True):
        if compiled:
            compile_layers(prior.model, torch.device("cpu"))
        prior.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            next_token_loss(prior(ids_BT, classes_B), ids_BT).backward()
        gradients.append([parameter.grad.clone() for parameter in prior.parameters()])
    for plain, found in zip(*gradients, strict=True):
        assert plain.norm() > 0 and (plain - found).norm() <= 0.1 * plain.norm()


def test_compilation_without_a_compiler_is_refused(monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/no-compiler",))
    model = tiny_prior().model
    with pytest.raises(InputError, match=r"prior_training\.compile is true, but torch\.compile does not work on this machine.*compile false"):
        compile_layers(model, torch.device("cpu"))
    assert all(layer._compiled_call_impl is None for layer in transformer_layers(model))


def test_plan_describes_the_attention(run_dir, capsys):
    model = tiny_prior().model
    assert describe_attention(model, torch.device("cpu"), "bf16") == "sdpa"
    description = describe_attention(model, torch.device("cuda"), "bf16")
    assert description.startswith("sdpa (") and "flash" in description and "math" in description and description.endswith("enabled)")
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert "flash" not in describe_attention(model, torch.device("cuda"), "bf16")
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    own, cpu = tiny_prior("grid_transformer").model, torch.device("cpu")
    for extra, precision, expected in ((0, "bf16", "matrix products"), (1, "bf16", "sdpa"), (0, "no", "sdpa")):
        own.config.max_position_embeddings = MAX_MATMUL_LENGTH + extra + 1  # positions are the class and all ids; the last id is not an input
        assert describe_attention(own, cpu, precision).startswith(expected)
    train(run_dir, max_steps=1)
    assert "    attention                     sdpa\n" in capsys.readouterr().out


def test_log_of_refused_steps_has_no_loss(run_dir, monkeypatch):
    monkeypatch.setattr(train_prior, "next_token_loss", lambda logits_BTK, ids_BT: logits_BTK.sum() * math.nan)
    train(run_dir, max_steps=4, log_every=2, max_refused_steps=10)
    logged = records(run_dir, "prior", "train")
    assert [record["step"] for record in logged] == [2, 4] and all("nll" not in record and "learning_rate" in record for record in logged)


# --- losses, decay, learning rate ----------------------------------------------------------------------------------------------------


def test_z_loss_values_and_gradients():
    logits_BTK = torch.tensor([[[0.0, math.log(3.0)], [math.log(0.25), math.log(0.75)]], [[2.0, -torch.inf], [1.0, 1.0]]])
    expected = (math.log(4) ** 2 + 0 + 2.0**2 + (1 + math.log(2)) ** 2) / 4
    assert z_loss(logits_BTK).item() == pytest.approx(expected, rel=1e-6)
    assert z_loss(logits_BTK.to(torch.bfloat16)).dtype == torch.float32
    logits_BTK = torch.randn(2, 3, 5, requires_grad=True)
    z_loss(logits_BTK).backward()
    by_hand = 2 * logits_BTK.logsumexp(-1, keepdim=True) * logits_BTK.softmax(-1) / 6
    torch.testing.assert_close(logits_BTK.grad, by_hand)


def test_z_loss_is_logged_separately_and_decreases(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "without")
    fields = {"prior__dropout": 0, "max_steps": 20, "learning_rate": 0.01}
    train(run_dir, z_loss=0.1, **fields)
    train(tmp_path / "without", **fields)
    logged, without = records(run_dir, "prior", "train"), records(tmp_path / "without", "prior", "train")
    assert logged[0]["nll"] == without[0]["nll"] and all("z_loss" not in record for record in without)
    assert logged[0]["z_loss"] == pytest.approx(math.log(32) ** 2, rel=0.05)
    assert logged[-1]["z_loss"] < 0.4 * logged[0]["z_loss"]
    assert logged[-1]["nll"] == pytest.approx(without[-1]["nll"], abs=0.4)


def test_weight_decay_applies_to_matrices_only(run_dir, monkeypatch):
    runs = []
    original = TrainingRun.prepare
    monkeypatch.setattr(TrainingRun, "prepare", lambda self, *models: (runs.append(self), original(self, *models))[1])
    train(run_dir, max_steps=1, weight_decay=0.25)
    decayed = {id(parameter): group["weight_decay"] for group in runs[0].optimizers[0].param_groups for parameter in group["params"]}
    parameters = dict(runs[0].unwrapped.named_parameters())
    assert len(decayed) == len(parameters)
    for name, parameter in parameters.items():
        assert decayed[id(parameter)] == (0.25 if parameter.ndim == 2 else 0.0), name
    assert any(parameter.ndim == 1 for parameter in parameters.values())


def test_learning_rate_scales_with_the_batch_size(run_dir, capsys):
    training = PriorTrainingConfig(learning_rate=6e-4, batch_size=128, learning_rate_batch=32)
    assert training.learning_rate_factor == 2.0 and describe_learning_rate(training) == "0.0006 x sqrt(128 / 32) = 0.0012"
    assert describe_learning_rate(PriorTrainingConfig(learning_rate=6e-4, batch_size=128)) == "0.0006"
    with pytest.raises(InputError, match=r"prior_training\.learning_rate_batch is 0; it must be at least 1"):
        PriorTrainingConfig(learning_rate_batch=0)
    train(run_dir, max_steps=3, learning_rate=0.004, learning_rate_batch=4, warmup_fraction=0, final_learning_rate=1)  # batches of 16
    assert [record["learning_rate"] for record in records(run_dir, "prior", "train")] == pytest.approx([0.008] * 3)
    assert "learning rate                 0.004 x sqrt(16 / 4) = 0.008\n" in capsys.readouterr().out


# --- the first loss ------------------------------------------------------------------------------------------------------------------


def test_first_loss_check_with_several_grids():
    assert uniform_loss(VOCABULARY) == pytest.approx(math.log(48))
    assert uniform_loss(TWO_GRIDS) == pytest.approx((2 * math.log(8) + 4 * math.log(32)) / 6)
    assert check_first_loss(3.2, TWO_GRIDS, 0.5) == "3.200 nats per token; ln K is 3.004"
    for wrong in (3.51, 2.49, math.nan, math.inf):
        with pytest.raises(InputError, match=r"8 and 32 codes.*3\.004.*first_loss_tolerance = 0\.5"):
            check_first_loss(wrong, TWO_GRIDS, 0.5)


def test_training_with_a_wrong_first_loss_stops_before_the_first_step(run_dir, capsys):
    wrong = {"prior__options": '{"tie_word_embeddings": true, "initializer_range": 1.0}'}
    with pytest.raises(InputError, match=r"first batch is \d+\.\d+ nats per token.*32 codes.*3\.466 \(ln K\).*prior\.options"):
        train(run_dir, **wrong)
    assert not list(RunFolder(run_dir).checkpoints("prior").glob("step-*"))
    assert not RunFolder(run_dir).record("prior").exists(), "the stage has not started, so the recipe may change"
    train(run_dir, max_steps=2, first_loss_tolerance=1000, **wrong)  # a larger tolerance allows it
    assert "nats per token; ln K is 3.466" in capsys.readouterr().out


def test_first_loss_is_not_checked_on_resume(run_dir, capsys):
    train(run_dir, max_steps=2)
    assert "first loss" in capsys.readouterr().out
    train(run_dir, max_steps=4, first_loss_tolerance=1e-9)
    assert "first loss" not in capsys.readouterr().out


# --- validation ----------------------------------------------------------------------------------------------------------------------


def test_validation_metrics_with_and_without_the_class(tiny_run, capsys):
    prior = TokenPrior.from_pretrained(tiny_run / "prior")
    with torch.no_grad():  # six training steps are too few to distinguish classes
        prior.model.get_input_embeddings().weight[prior.vocabulary.num_codes:] += 3 * torch.eye(11, 32)
    reader = TokenShardReader(tiny_run / "tokens/validation")
    accelerator = make_accelerator(tiny_recipe(tiny_run).prior_training, "")
    metrics = validate(prior, reader, 16, 50, accelerator)
    accelerator.end_training()
    tokens = reader.samples(validation_samples(reader, 50))
    ids_BT, classes_B = torch.from_numpy(tokens.ids_BT), torch.from_numpy(tokens.labels_B)
    for name, given_B in (("", classes_B), ("_without_class", None)):
        with torch.no_grad():
            logits_BTK = prior(ids_BT, given_B)
            nll = prior.loss(ids_BT, given_B).item()
        assert metrics[f"nll{name}"] == pytest.approx(nll, rel=1e-5)
        assert metrics[f"bits_per_image{name}"] == pytest.approx(nll * 16 / math.log(2), rel=1e-5)
        assert metrics[f"accuracy{name}"] == pytest.approx((logits_BTK.argmax(-1) == ids_BT).float().mean().item(), rel=1e-5)
    assert abs(metrics["nll"] - metrics["nll_without_class"]) > 1e-3


def test_validation_without_the_class_requires_label_drop(run_dir, tmp_path, capsys):
    shutil.copytree(run_dir, tmp_path / "conditional")
    train(run_dir, max_steps=2)
    assert "(without the class " in capsys.readouterr().out
    (record,) = records(run_dir, "prior", "validation")
    assert {"nll", "accuracy", "bits_per_image", "nll_without_class", "accuracy_without_class", "bits_per_image_without_class"} <= record.keys()
    train(tmp_path / "conditional", max_steps=2, label_drop=0, sampling__guidance_scale=1)
    assert "without class" not in capsys.readouterr().out
    (record,) = records(tmp_path / "conditional", "prior", "validation")
    assert "nll" in record and not [name for name in record if "without_class" in name]


def test_plan_prints_the_number_of_validation_classes(run_dir, capsys):
    train(run_dir, max_steps=1, validation_images=30)
    assert "; 30 of 379 to validate on, 10 of 10 classes\n" in capsys.readouterr().out


def store_by_class(tokens: Path) -> None:
    """Rewrite the run's training tokens in small shards sorted by class, as version 0.1.0 stored a folder of classes."""
    reader = TokenShardReader(tokens / "train")
    by_class = reader.samples(np.argsort(reader.labels_N, kind="stable"))
    header = dataclasses.replace(reader.manifest.header, order_seed=None, images_per_shard=40, num_sources=len(reader))
    shutil.rmtree(tokens / "train")
    writer = TokenShardWriter(tokens / "train", header)
    for number in range(writer.num_shards):
        with writer.shard(number) as shard:
            for index in header.source_indices(number):
                shard.add(index=index, key=default_key(index), source=str(index), label=int(by_class.labels_B[index]),
                          ids={"image": by_class.ids_BT[index:index + 1]})
    writer.finish()


def test_training_on_shards_sorted_by_class_warns(run_dir, capsys):
    train(run_dir, max_steps=1)
    assert "stored by class" not in capsys.readouterr().out
    store_by_class(run_dir / "tokens")
    train(run_dir.with_name("other"), max_steps=1, tokens=run_dir / "tokens", window_shards=3)
    assert "warning: a batch of 16 holds " in capsys.readouterr().out


def test_best_nll_of_other_validation_images_is_ignored(run_dir, capsys):
    """Version 0.1.0 validated on the first images, so its NLL is not comparable."""
    checkpoint = train(run_dir, max_steps=3)
    state = read_state(checkpoint) | {"best_validation": 0.5, "best_step": 1}
    assert state.pop("validated_on") == "64, rule 1"
    path = checkpoint / "trainer_state.json"
    write_json(path, state)
    checksums = json.loads((checkpoint / "checksums.json").read_text())
    write_json(checkpoint / "checksums.json", checksums | {path.name: {"size": path.stat().st_size, "sha256": sha256_of_file(path)}})
    capsys.readouterr()
    train(run_dir)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "step 6: NLL" in line)
    assert line.endswith("the best so far")


# --- the overfit test ---------------------------------------------------------------------------------------------------------------


def test_overfit_recipe_disables_regularization(tiny_run):
    recipe = tiny_recipe(tiny_run, prior__dropout=0.3, prior__options='{"attention_dropout": 0.2, "rms_norm_eps": 1e-5}',
                         prior_training__learning_rate=0.001, prior_training__learning_rate_batch=4, prior_training__accumulation_steps=8)
    own = overfit_recipe(recipe, 3, "/somewhere", 1.0)
    assert own.prior.dropout == 0 and own.prior.options == {"attention_dropout": 0, "rms_norm_eps": 1e-5}
    assert (own.prior_training.label_drop, own.prior_training.weight_ema_decay, own.prior_training.batch_size) == (0, 0, 3)
    assert own.prior_training.learning_rate == pytest.approx(0.002) and own.prior_training.learning_rate_batch is None
    assert own.run_dir == "/somewhere" and recipe.prior.dropout == 0.3


def test_conditional_entropy():
    a, b, c = [1, 2], [1, 3], [2, 2]
    assert conditional_entropy([a, b], [0, 1]) == 0
    assert conditional_entropy([a, b, c], [-1, -1, -1]) == pytest.approx(math.log(3))
    assert conditional_entropy([a, a, b], [0, 0, 0]) == pytest.approx((2 * math.log(1.5) + math.log(3)) / 3)
    assert conditional_entropy([a, b, c], [0, 0, 1]) == pytest.approx(2 * math.log(2) / 3)


def file_hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_overfit_memorizes_and_does_not_change_the_run(tiny_run, capsys):
    before = file_hashes(tiny_run)
    assert dispatch(["train-prior", str(tiny_run), "--overfit", "4", "--prior_training.learning_rate", "0.01"]) == 0
    output = capsys.readouterr().out
    losses = [float(line.partition("NLL ")[2].split()[0]) for line in output.splitlines() if "] step " in line]
    assert losses[0] == pytest.approx(math.log(32), abs=0.1) and losses[-1] < 0.3 and losses == sorted(losses, reverse=True)
    assert "memorized after" in output
    assert file_hashes(tiny_run) == before


def test_overfit_uses_several_classes_from_shards_sorted_by_class(tiny_run, tmp_path, capsys, monkeypatch):
    shutil.copytree(tiny_run / "tokens", tmp_path / "tokens")
    store_by_class(tmp_path / "tokens")
    seen = []
    monkeypatch.setattr(overfit_module, "conditional_entropy", lambda ids, classes: seen.append(set(classes)) or 0.0)
    overfit(tiny_recipe(tiny_run, prior_training__tokens=tmp_path / "tokens"), 16, max_minutes=1e-3)
    assert len(seen[0]) >= 5, "of 10"


@pytest.mark.parametrize("changes", [{"prior_training__learning_rate": 1e-9}, {"prior_training__z_loss": 1e4}], ids=["rate", "z-loss"])
def test_overfit_fails_if_the_prior_does_not_learn(changes, tiny_run, capsys):
    assert overfit(tiny_recipe(tiny_run, **changes), 4, max_minutes=0.02) == 1
    output = capsys.readouterr().out
    assert "NOT memorized" in output and "a uniform distribution has 3.466" in output and "prior_training.learning_rate" in output


def test_a_signal_stops_the_overfit_test(tiny_run, capsys, monkeypatch):
    original = TrainingRun.end_step
    monkeypatch.setattr(TrainingRun, "end_step", lambda run: original(run) or os.kill(os.getpid(), signal.SIGTERM))
    assert overfit(tiny_recipe(tiny_run), 4) == 143
    words = capsys.readouterr().out
    assert "stopped by a signal; nothing was saved" in words and "emorized" not in words and "step 1:" not in words


def test_overfit_with_all_training_options(tiny_run, capsys):
    recipe = tiny_recipe(tiny_run, prior__architecture="gpt2", prior_training__learning_rate=0.01, prior_training__activation_checkpointing=True,
                         prior_training__mixed_precision="bf16", prior_training__z_loss=1e-4)
    assert overfit(recipe, 2) == 0
    assert "bf16 autocast" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "words"), [
    (["--overfit", "0"], "--overfit is 0"), (["--overfit", "2000"], "--overfit is 2000; it must be at least 1 and at most 1418"),
    (["--overfit", "many"], "invalid int value"), (["--overfit", "2", "--processes", "2"], "--processes with --overfit is 2"),
    (["--overfit", "2", "--redo", "prior"], "--redo cannot be combined with --overfit")])
def test_overfit_with_invalid_options_is_refused(options, words, tiny_run, capsys):
    with pytest.raises(InputError) as refusal:
        dispatch(["train-prior", str(tiny_run), *options])
    assert words in str(refusal.value)


# --- accelerate configurations -------------------------------------------------------------------------------------------------------

CONFIGS = {"one_gpu": ("NO", 1), "several_gpus": ("MULTI_GPU", 4), "several_nodes": ("MULTI_GPU", 16), "fsdp2": ("FSDP", 4),
           "two_cpu_processes": ("MULTI_GPU", 2)}


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_loads_shipped_configurations(name):
    assert {path.stem for path in (ROOT / "configs/accelerate").glob("*.yaml")} == set(CONFIGS)
    path = find_accelerate_config(name)
    config = load_config_from_file(str(path))
    assert (config.distributed_type.value, config.num_processes) == CONFIGS[name]
    assert processes_to_start(None, name) == config.num_processes
    assert bool(config.fsdp_config) == (name == "fsdp2")
    if config.fsdp_config:
        from accelerate.commands.launch import launch_command_parser

        options = {option.lstrip("-") for action in launch_command_parser()._actions for option in action.option_strings}
        assert config.fsdp_config.keys() <= options, "accelerate silently ignores unknown options"
        assert config.fsdp_config["fsdp_version"] == 2


def test_number_of_processes_comes_from_the_option_then_the_configuration():
    assert [processes_to_start(None, None), processes_to_start(3, None)] == [1, 3]
    assert [processes_to_start(None, "two_cpu_processes"), processes_to_start(1, "two_cpu_processes")] == [2, 1]
    assert [processes_to_start(None, "several_nodes"), processes_to_start(4, "several_nodes")] == [16, 4]
    with pytest.raises(InputError, match=r"--processes is 15, but .*several_nodes.yaml is for 2 machines\. .* the nearest: 14, 16"):
        processes_to_start(15, "several_nodes")
    with pytest.raises(InputError, match=r"--processes is 1, .* the nearest: 2"):
        processes_to_start(1, "several_nodes")


def test_broken_accelerate_configuration_is_refused_with_processes(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    for text in ("- 1", "a: [", "distributed_type: MULTI_GPU\nnum_machines: two", "distributed_type: MULTI_GPU\nnum_machines: 0"):
        wrong.write_text(text)
        with pytest.raises(InputError, match=r"wrong.yaml (is not an accelerate configuration|sets num_machines to 0)"):
            processes_to_start(4, str(wrong))


def test_unknown_or_broken_accelerate_configuration_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"'several_gpu'.*shipped configurations: fsdp2, one_gpu.*Did you mean 'several_gpus'"):
        find_accelerate_config("several_gpu")
    wrong = tmp_path / "wrong.yaml"
    for text, words in (("- 1", "is not an accelerate configuration"), ("a: [", "is not an accelerate configuration"),
                        ("distributed_type: MULTI_GPU", "does not set num_processes")):
        wrong.write_text(text)
        with pytest.raises(InputError, match=words):
            processes_to_start(None, str(wrong))


def test_shortest_time_budget_exports_a_prior(run_dir):
    train(run_dir, max_minutes=1e-6)
    assert RunFolder(run_dir).export("prior").exists()
