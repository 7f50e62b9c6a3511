"""VQ-GAN trainings of a few steps: when the discriminator joins, what is saved, how a run made to go wrong is caught, exact resume."""

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
from tests.tiny import tiny_recipe
from vqmosaic.errors import InputError
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.training.checkpoints import CheckpointFolder, read_state
from vqmosaic.training.tracking import read_metrics
from vqmosaic.training.training_run import TrainingRun

RIVAL = {"adversarial__weight": 0.5, "adversarial__start": 0.3, "adversarial__warmup": 0.15, "adversarial__ramp": 0.3, "adversarial__layers": 1,
         "adversarial__channels": 16, "tokenizer_training__max_steps": 10, "tokenizer_training__validate_every": 2,
         "tokenizer_training__checkpoint_every": 1, "tokenizer_training__keep_checkpoints": 20, "tokenizer_training__weight_ema_decay": 0.5}


def train(run_dir: Path, **changes) -> Path:
    train_module.train(tiny_recipe(run_dir, **RIVAL | changes))
    return run_dir


def records(run_dir: Path, kind: str = "train") -> list[dict]:
    return read_metrics(RunFolder(run_dir).logs("tokenizer") / "metrics.jsonl", kind)


def checkpoint(run_dir: Path, step: int) -> Path:
    return RunFolder(run_dir).checkpoints("tokenizer") / f"step-{step:08d}"


def train_until(run_dir: Path, steps: int, **changes) -> None:
    """The training stopped by a signal after so many steps, which writes a checkpoint of that step."""
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


def assert_same_end(straight: Path, resumed: Path, step: int) -> None:
    """All weights, both optimizers, the guard and what was written down on the way are the same."""
    first, second = (state_files(checkpoint(run, step)) for run in (straight, resumed))
    assert first.keys() == second.keys() and len(first) >= 6
    assert {name for name in first if first[name] != second[name]} == set()
    assert read_state(checkpoint(straight, step))["guard"] == read_state(checkpoint(resumed, step))["guard"]
    for kind in ("train", "validation"):
        first, second = ([record | {"seconds": 0} for record in records(run, kind)] for run in (straight, resumed))
        assert first == second


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("vqgan") / "run")


def test_it_joins_at_its_step_learns_silently_then_speaks(finished):
    for record in records(finished):
        step = record["step"] - 1  # a record is written after its step
        assert ("discriminator_loss" in record) == (step >= 3), record
        assert ("adversarial_loss" in record) == (step >= 5), "the warm-up is silent"
    weights = {step: load_file(checkpoint(finished, step) / "model_1.safetensors") for step in (1, 3, 4, 10)}
    moved = {(first, second): any(not torch.equal(tensor, weights[second][name]) for name, tensor in weights[first].items())
             for first, second in ((1, 3), (3, 4), (4, 10))}
    assert moved == {(1, 3): False, (3, 4): True, (4, 10): True}


def test_the_plan_prints_the_resolved_steps(tmp_path, capsys):
    train(tmp_path / "run", tokenizer_training__max_steps=4)
    out = capsys.readouterr().out
    assert "joins at step 2, affects the tokenizer from step 2, with full weight 0.5 from step 3" in out
    assert "the discriminator joins at step 2" in out


def test_the_checkpoint_holds_both_and_the_export_inference_weights_alone(finished):
    names = {path.name for path in checkpoint(finished, 10).iterdir()}
    assert {"model.safetensors", "model_1.safetensors", "optimizer.bin", "optimizer_1.bin", "best.safetensors"} <= names
    exported = load_file(finished / "tokenizer/model.safetensors")
    assert not any("discriminator" in name or "blocks" in name or "ema" in name for name in exported)
    ImageTokenizer.from_pretrained(finished / "tokenizer")


def test_best_and_last_are_kept_side_by_side(finished, tmp_path):
    errors = {record["step"]: record["reconstruction_l2"] for record in records(finished, "validation")}
    best = min(errors, key=errors.get)
    assert read_state(checkpoint(finished, 10))["best_step"] == best
    folder = RunFolder(finished).checkpoints("tokenizer")
    for export, step in ((finished / "tokenizer", 10), (folder / "best", best)):
        averaged = load_file(checkpoint(finished, step) / "weights_ema.safetensors")
        for name, tensor in load_file(export / "model.safetensors").items():
            assert torch.equal(tensor, averaged[f"module.{name}"]), name
    other = train(tmp_path / "run", tokenizer_training__export="best")
    for one, another in ((other / "tokenizer", folder / "best"), (RunFolder(other).checkpoints("tokenizer") / "last", finished / "tokenizer")):
        assert (one / "model.safetensors").read_bytes() == (another / "model.safetensors").read_bytes()


@pytest.mark.parametrize("changes", [
    {}, {"adversarial__spectral_norm": "true", "adversarial__augmentations": "[color,translation,cutout]", "tokenizer__dropout": 0.1,
         "tokenizer_training__perceptual_loss": "discriminator_features", "tokenizer_training__perceptual_weight": 0.1,
         "tokenizer_training__accumulation_steps": 2}])
def test_resumed_at_any_phase_it_ends_like_a_straight_run(changes, tmp_path):
    """Stopped before the discriminator joins, in its warm-up and in the ramp; all weights, both optimizers and the guard's counters are the same."""
    straight = train(tmp_path / "straight", **changes)
    resumed = tmp_path / "resumed"
    for steps in (2, 4, 7):
        train_until(resumed, steps, **changes)
    train(resumed, **changes)
    assert_same_end(straight, resumed, 10)
    speaking = [record for record in records(straight) if "adversarial_loss" in record]
    named = [record for record in records(straight) if record.get("discriminator_features", 0) > 0]
    assert speaking and named == (speaking if "tokenizer_training__perceptual_loss" in changes else []), "feature matching is logged by its name"


# --- runs made to go wrong ---------------------------------------------------------------------------------------------------------

RUINED = {"adversarial__weight": 10_000, "adversarial__balance": "fixed", "adversarial__warmup": 0, "adversarial__ramp": 0, "adversarial__start": 0.5,
          "tokenizer_training__max_steps": 16, "tokenizer_training__learning_rate": 0.02, "tokenizer_training__warmup_fraction": 0}


@pytest.fixture(scope="module")
def ruined(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a finished training with a fixed balance and far too much weight, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return train(tmp_path_factory.mktemp("ruined") / "run", **RUINED), out.getvalue()


def test_a_discriminator_that_ruins_the_pictures_is_turned_down(ruined):
    """Validation worsens, the guard halves the weight and says so, the best weights are older."""
    run_dir, out = ruined
    assert "the guard halved the adversarial weight, now 5000" in out
    state = read_state(checkpoint(run_dir, 16))
    assert state["guard"]["halvings"] >= 1 and state["best_step"] <= 8
    weights = [record["adversarial_weight"] for record in records(run_dir) if "adversarial_weight" in record]
    assert weights[0] == 10_000 and weights[-1] <= 5000


def test_resumed_after_a_halving_it_ends_like_a_straight_run(ruined, tmp_path):
    """Stopped while the guard still waits after its first halving; the weight stays halved, and whether it is halved again comes out the same."""
    straight, resumed = ruined[0], tmp_path / "resumed"
    halvings = {step: read_state(checkpoint(straight, step))["guard"]["halvings"] for step in range(1, 17)}
    step = min(step for step, count in halvings.items() if count) + 1
    train_until(resumed, step, **RUINED)
    guard = read_state(checkpoint(resumed, step))["guard"]
    assert guard["halvings"] == 1 and guard["pause"] > 0 and step < 16
    train(resumed, **RUINED)
    assert {record["adversarial_weight"] for record in records(resumed) if record["step"] == step + 1} == {5000}
    assert_same_end(straight, resumed, 16)


def test_a_training_that_stands_still_brings_the_discriminator_in(tmp_path, capsys):
    run_dir = train(tmp_path / "run", adversarial__start=0.95, adversarial__start_at_plateau="true", tokenizer_training__learning_rate=1e-9)
    assert "reconstruction has reached a plateau" in capsys.readouterr().out
    assert read_state(checkpoint(run_dir, 10))["guard"]["joined_at"] < 0.95


@pytest.mark.parametrize("whose", ["discriminator_loss", "generator_loss"])
def test_a_non_finite_loss_of_either_side_changes_neither(whose, tmp_path, monkeypatch, capsys):
    original, calls = getattr(adversary_module, whose), []

    def spoiled(*arguments):
        calls.append(1)
        result = original(*arguments)
        return result * torch.nan if len(calls) == {"discriminator_loss": 5, "generator_loss": 3}[whose] else result

    monkeypatch.setattr(adversary_module, whose, spoiled)
    run_dir = train(tmp_path / "run")
    assert "refused" in capsys.readouterr().out
    states = [read_state(path)["refused_steps"] for path in CheckpointFolder(RunFolder(run_dir).checkpoints("tokenizer")).all()]
    step = states.index(1)  # the first checkpoint after the refused step is that of step + 1
    before, after = (checkpoint(run_dir, number) for number in (step, step + 1))
    for name in ("model.safetensors", "model_1.safetensors", "weights_ema.safetensors"):
        assert (before / name).read_bytes() == (after / name).read_bytes(), name
    assert states[-1] == 1, "one spoiled step costs one step"
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
def test_what_cannot_be_is_refused_in_words(changes, words, tmp_path):
    with pytest.raises(InputError, match=words):
        tiny_recipe(tmp_path / "run", **RIVAL | changes)


def test_a_codebook_that_hardly_anything_uses_raises_the_alarm_with_remedies(tmp_path, monkeypatch, capsys):
    def spread(tokenizer, *_):
        for buffer in (tokenizer.quantizer.codebook, tokenizer.quantizer.ema_sums):
            buffer.add_(100 * torch.arange(32)[:, None])

    monkeypatch.setattr(train_module, "initialize_codebook", spread)
    train(tmp_path / "run", adversarial__weight=0, tokenizer__revival_threshold=0, tokenizer__ema_decay=0.999999,
          tokenizer_training__weight_ema_decay=0, tokenizer_training__max_steps=2)
    assert "warning: only 3.1% of the codebook is in use at step 2. Remedies: a smaller tokenizer.codebook_size" in capsys.readouterr().out


def test_the_alarm_is_raised_once_and_again_at_the_end(tmp_path, capsys):
    train(tmp_path / "run", adversarial__weight=0, tokenizer_training__usage_alarm=1, tokenizer_training__max_steps=8,
          tokenizer_training__validate_every=2, tokenizer_training__validation_images=8)
    lines = [line for line in capsys.readouterr().out.splitlines() if "of the codebook is in use" in line]
    assert len(lines) == 2 and "at step 2" in lines[0] and "at step 8" in lines[1]


# --- speed-ups that must change nothing ----------------------------------------------------------------------------------------------


def test_memory_order_changes_nothing_but_rounding(tmp_path):
    """At 64 channels: with 32, a bias before a norm of one channel a group has no true gradient, and follows rounding."""
    runs = [train(tmp_path / flag, tokenizer_training__channels_last=flag, tokenizer_training__max_steps=4, adversarial__weight=0,
                  tokenizer__channels=64) for flag in ("true", "false")]
    first, second = (load_file(checkpoint(run, 4) / "model.safetensors") for run in runs)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_compiled_network_trains_like_the_plain_one_with_a_discriminator(tmp_path):
    compiled = []
    original = train_module.compile_networks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "compile_networks", lambda *networks: (original(*networks), compiled.extend(networks)))
        runs = [train(tmp_path / flag, tokenizer_training__compile=flag, tokenizer_training__max_steps=6, tokenizer__channels=64)
                for flag in ("true", "false")]
    encoder, decoder = compiled  # once
    assert encoder._compiled_call_impl is not None and "features" in vars(decoder) and "features" not in vars(copy.deepcopy(decoder))
    losses = [[record["reconstruction_loss"] for record in records(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert json.loads((runs[0] / "tokenizer/config.json").read_text())["network"]["channels"] == 64
    assert load_file(runs[0] / "tokenizer/model.safetensors").keys() == load_file(runs[1] / "tokenizer/model.safetensors").keys()
