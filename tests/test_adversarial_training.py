"""Short VQ-GAN trainings: the schedule of the discriminator, checkpoints and exports, exact resume, the guard against failing runs."""

import contextlib
import copy
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stage1_tokenizer import train as train_module
from stage1_tokenizer.adversarial import discriminator_training as adversary_module
from stage1_tokenizer.tokenizer import ImageTokenizer
from tests.run_files import records
from tests.tiny import tiny_recipe
from vqmosaic.errors import InputError
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.training.checkpoints import CheckpointFolder, read_state
from vqmosaic.training.training_run import TrainingRun

ADVERSARIAL = {"adversarial__weight": 0.5, "adversarial__start": 0.3, "adversarial__warmup": 0.15, "adversarial__ramp": 0.3, "adversarial__layers": 1,
               "adversarial__channels": 16, "tokenizer_training__max_steps": 10, "tokenizer_training__validate_every": 2,
               "tokenizer_training__checkpoint_every": 1, "tokenizer_training__keep_checkpoints": 20, "tokenizer_training__weight_ema_decay": 0.5}


def train(run_dir: Path, **changes) -> Path:
    train_module.train(tiny_recipe(run_dir, **ADVERSARIAL | changes))
    return run_dir


def checkpoint(run_dir: Path, step: int) -> Path:
    return RunFolder(run_dir).checkpoints("tokenizer") / f"step-{step:08d}"


def train_until_interrupted(run_dir: Path, steps: int, **changes) -> None:
    """Train and stop as if by a signal after `steps` steps, which writes a checkpoint."""
    original = TrainingRun.sync

    def sync(run):
        _, progress = original(run)
        return 15 * (run.state.step >= steps), progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "sync", sync)
        with pytest.raises(BaseException, match=f"saved at step {steps}"):
            train(run_dir, **changes)


def state_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()
            if path.suffix in (".safetensors", ".bin") and not path.name.startswith(("random", "scheduler"))}


def assert_same_results(uninterrupted: Path, resumed: Path, step: int) -> None:
    """Weights, optimizers, the guard's state and metrics are equal."""
    first, second = (state_files(checkpoint(run, step)) for run in (uninterrupted, resumed))
    assert first.keys() == second.keys() and len(first) >= 6
    assert {name for name in first if first[name] != second[name]} == set()
    assert read_state(checkpoint(uninterrupted, step))["guard"] == read_state(checkpoint(resumed, step))["guard"]
    for kind in ("train", "validation"):
        first, second = ([record | {"seconds": 0} for record in records(run, "tokenizer", kind)] for run in (uninterrupted, resumed))
        assert first == second


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("vqgan") / "run")


def test_discriminator_starts_at_its_step_and_affects_the_generator_after_warmup(finished):
    for record in records(finished, "tokenizer", "train"):
        step = record["step"] - 1  # records are written after their step
        assert ("discriminator_loss" in record) == (step >= 3), record
        assert ("adversarial_loss" in record) == (step >= 5), "the generator has no adversarial loss during warmup"
    weights = {step: load_file(checkpoint(finished, step) / "model_1.safetensors") for step in (1, 3, 4, 10)}
    has_changed = {(first, second): any(not torch.equal(tensor, weights[second][name]) for name, tensor in weights[first].items())
                   for first, second in ((1, 3), (3, 4), (4, 10))}
    assert has_changed == {(1, 3): False, (3, 4): True, (4, 10): True}


def test_plan_prints_the_resolved_steps(tmp_path, capsys):
    train(tmp_path / "run", tokenizer_training__max_steps=4)
    out = capsys.readouterr().out
    assert "joins at step 2, affects the tokenizer from step 2, with full weight 0.5 from step 3" in out
    assert "the discriminator joins at step 2" in out


def test_checkpoint_contains_both_networks_and_export_only_the_tokenizer(finished):
    names = {path.name for path in checkpoint(finished, 10).iterdir()}
    assert {"model.safetensors", "model_1.safetensors", "optimizer.bin", "optimizer_1.bin", "best.safetensors"} <= names
    exported = load_file(finished / "tokenizer/model.safetensors")
    assert not any("discriminator" in name or "blocks" in name or "ema" in name for name in exported)
    ImageTokenizer.from_pretrained(finished / "tokenizer")


def test_best_and_last_weights_are_exported(finished, tmp_path):
    errors = {record["step"]: record["reconstruction_l2"] for record in records(finished, "tokenizer", "validation")}
    best = min(errors, key=errors.get)
    assert read_state(checkpoint(finished, 10))["best_step"] == best
    folder = RunFolder(finished).checkpoints("tokenizer")
    for export, step in ((finished / "tokenizer", 10), (folder / "best", best)):
        averaged = load_file(checkpoint(finished, step) / "weights_ema.safetensors")
        for name, tensor in load_file(export / "model.safetensors").items():
            assert torch.equal(tensor, averaged[f"module.{name}"]), name
    other = train(tmp_path / "run", tokenizer_training__export="best")
    for folder_1, folder_2 in ((other / "tokenizer", folder / "best"), (RunFolder(other).checkpoints("tokenizer") / "last", finished / "tokenizer")):
        assert (folder_1 / "model.safetensors").read_bytes() == (folder_2 / "model.safetensors").read_bytes()


@pytest.mark.parametrize("changes", [
    {}, {"adversarial__spectral_norm": "true", "adversarial__augmentations": "[color,translation,cutout]", "tokenizer__dropout": 0.1,
         "tokenizer_training__perceptual_loss": "discriminator_features", "tokenizer_training__perceptual_weight": 0.1,
         "tokenizer_training__accumulation_steps": 2}])
def test_resumed_training_matches_an_uninterrupted_one(changes, tmp_path):
    """Training is stopped before the discriminator starts, during its warmup and during the ramp."""
    uninterrupted = train(tmp_path / "straight", **changes)
    resumed = tmp_path / "resumed"
    for steps in (2, 4, 7):
        train_until_interrupted(resumed, steps, **changes)
    train(resumed, **changes)
    assert_same_results(uninterrupted, resumed, 10)
    with_generator_loss = [record for record in records(uninterrupted, "tokenizer", "train") if "adversarial_loss" in record]
    with_features = [record for record in records(uninterrupted, "tokenizer", "train") if record.get("discriminator_features", 0) > 0]
    assert with_generator_loss and with_features == (with_generator_loss if "tokenizer_training__perceptual_loss" in changes else [])


# --- failing runs ------------------------------------------------------------------------------------------------------------------

FAILING = {"adversarial__weight": 10_000, "adversarial__balance": "fixed", "adversarial__warmup": 0, "adversarial__ramp": 0,
           "adversarial__start": 0.5, "tokenizer_training__max_steps": 16, "tokenizer_training__learning_rate": 0.02,
           "tokenizer_training__warmup_fraction": 0}


@pytest.fixture(scope="module")
def failing_run(tmp_path_factory) -> tuple[Path, str]:
    """The run folder and output of a training with a fixed adversarial weight that is much too large."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return train(tmp_path_factory.mktemp("ruined") / "run", **FAILING), out.getvalue()


def test_guard_lowers_the_adversarial_weight_when_validation_worsens(failing_run):
    """The guard halves the weight and reports it, and the best weights are from before."""
    run_dir, out = failing_run
    assert "the guard halved the adversarial weight, now 5000" in out
    state = read_state(checkpoint(run_dir, 16))
    assert state["guard"]["halvings"] >= 1 and state["best_step"] <= 8
    weights = [record["adversarial_weight"] for record in records(run_dir, "tokenizer", "train") if "adversarial_weight" in record]
    assert weights[0] == 10_000 and weights[-1] <= 5000


def test_resume_after_a_halving_matches_an_uninterrupted_training(failing_run, tmp_path):
    """Training is stopped while the guard pauses after its first halving. Later halvings must be the same."""
    uninterrupted, resumed = failing_run[0], tmp_path / "resumed"
    halvings = {step: read_state(checkpoint(uninterrupted, step))["guard"]["halvings"] for step in range(1, 17)}
    step = min(step for step, count in halvings.items() if count) + 1
    train_until_interrupted(resumed, step, **FAILING)
    guard = read_state(checkpoint(resumed, step))["guard"]
    assert guard["halvings"] == 1 and guard["pause"] > 0 and step < 16
    train(resumed, **FAILING)
    assert {record["adversarial_weight"] for record in records(resumed, "tokenizer", "train") if record["step"] == step + 1} == {5000}
    assert_same_results(uninterrupted, resumed, 16)


def test_discriminator_starts_early_at_a_plateau(tmp_path, capsys):
    run_dir = train(tmp_path / "run", adversarial__start=0.95, adversarial__start_at_plateau="true", tokenizer_training__learning_rate=1e-9)
    assert "reconstruction has reached a plateau" in capsys.readouterr().out
    assert read_state(checkpoint(run_dir, 10))["guard"]["joined_at"] < 0.95


@pytest.mark.parametrize("loss_name", ["discriminator_loss", "generator_loss"])
def test_step_with_a_non_finite_loss_updates_neither_network(loss_name, tmp_path, monkeypatch, capsys):
    original, calls = getattr(adversary_module, loss_name), []

    def nan_at_one_call(*arguments):
        calls.append(1)
        result = original(*arguments)
        return result * torch.nan if len(calls) == {"discriminator_loss": 5, "generator_loss": 3}[loss_name] else result

    monkeypatch.setattr(adversary_module, loss_name, nan_at_one_call)
    run_dir = train(tmp_path / "run")
    assert "refused" in capsys.readouterr().out
    states = [read_state(path)["refused_steps"] for path in CheckpointFolder(RunFolder(run_dir).checkpoints("tokenizer")).all()]
    step = states.index(1)  # the first checkpoint after the refused step is that of step + 1
    before, after = (checkpoint(run_dir, number) for number in (step, step + 1))
    for name in ("model.safetensors", "model_1.safetensors", "weights_ema.safetensors"):
        assert (before / name).read_bytes() == (after / name).read_bytes(), name
    assert states[-1] == 1, "only the step with the non-finite loss is skipped"
    for name in ("model.safetensors", "model_1.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(checkpoint(run_dir, 10) / name).values() if tensor.is_floating_point())


@pytest.mark.parametrize(("changes", "words"), [
    ({"tokenizer_training__mixed_precision": "fp16"}, "adversarial.weight is not 0"),
    ({"adversarial__weight": 0, "tokenizer_training__perceptual_loss": "discriminator_features", "tokenizer_training__perceptual_weight": 1},
     "there is no discriminator"),
    ({"adversarial__layers": 6}, "adversarial.layers"),
    ({"adversarial__loss": "hinges"}, "Did you mean 'hinge'"),
    ({"adversarial__augmentations": "[colour]"}, "Did you mean 'color'"),
    ({"tokenizer_training__train_parts": "decoder"}, "init_from"),
])
def test_invalid_combinations_are_refused(changes, words, tmp_path):
    with pytest.raises(InputError, match=words):
        tiny_recipe(tmp_path / "run", **ADVERSARIAL | changes)


def test_low_codebook_usage_prints_a_warning_with_remedies(tmp_path, monkeypatch, capsys):
    def spread_codes(tokenizer, *_):
        for buffer in (tokenizer.quantizer.codebook, tokenizer.quantizer.ema_sums):
            buffer.add_(100 * torch.arange(32)[:, None])

    monkeypatch.setattr(train_module, "initialize_codebooks", spread_codes)
    train(tmp_path / "run", adversarial__weight=0, tokenizer__revival_threshold=0, tokenizer__ema_decay=0.999999,
          tokenizer_training__weight_ema_decay=0, tokenizer_training__max_steps=2)
    assert "warning: only 3.1% of the codebook is in use at step 2. Remedies: a smaller tokenizer.codebook_size" in capsys.readouterr().out


def test_usage_warning_is_printed_once_and_at_the_end(tmp_path, capsys):
    train(tmp_path / "run", adversarial__weight=0, tokenizer_training__usage_alarm=1, tokenizer_training__max_steps=8,
          tokenizer_training__validate_every=2, tokenizer_training__validation_images=8)
    lines = [line for line in capsys.readouterr().out.splitlines() if "of the codebook is in use" in line]
    assert len(lines) == 2 and "at step 2" in lines[0] and "at step 8" in lines[1]


# --- optimizations that must not change results --------------------------------------------------------------------------------------


def test_channels_last_matches_contiguous_up_to_rounding(tmp_path):
    """With 64 channels. With 32, groups have one channel, so the true gradient of a bias before the norm is 0 and only rounding is left."""
    runs = [train(tmp_path / flag, tokenizer_training__channels_last=flag, tokenizer_training__max_steps=4, adversarial__weight=0,
                  tokenizer__channels=64) for flag in ("true", "false")]
    first, second = (load_file(checkpoint(run, 4) / "model.safetensors") for run in runs)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_compiled_training_with_a_discriminator_matches_eager(tmp_path):
    compiled = []
    original = train_module.compile_networks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "compile_networks", lambda *networks: (original(*networks), compiled.extend(networks)))
        runs = [train(tmp_path / flag, tokenizer_training__compile=flag, tokenizer_training__max_steps=6, tokenizer__channels=64)
                for flag in ("true", "false")]
    encoder, decoder = compiled  # compile_networks is called once
    assert encoder._compiled_call_impl is not None and "features" in vars(decoder) and "features" not in vars(copy.deepcopy(decoder))
    losses = [[record["reconstruction_loss"] for record in records(run, "tokenizer", "train")] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert json.loads((runs[0] / "tokenizer/config.json").read_text())["network"]["channels"] == 64
    assert load_file(runs[0] / "tokenizer/model.safetensors").keys() == load_file(runs[1] / "tokenizer/model.safetensors").keys()
