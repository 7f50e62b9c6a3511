"""Training under a time budget: the start of the clock, the frequency of validations, printed progress, and memory of one micro-batch."""

import io
import json
import math
import shutil
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from stage1_tokenizer import train as train_tokenizer
from stage1_tokenizer.image_batches import ValidationImages
from stage1_tokenizer.image_sources import open_splits
from stage1_tokenizer.images import ImageTransform
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior import train as train_prior
from stage2_prior.prior import TokenPrior
from tests.tiny import tiny_recipe
from vqmosaic import budget as budget_module
from vqmosaic import tracking, training_run, validation_schedule
from vqmosaic.budget import Budget, Pace
from vqmosaic.checkpoints import CheckpointFolder, read_state
from vqmosaic.run_folder import RunFolder
from vqmosaic.tracking import ProgressLines, read_metrics
from vqmosaic.trainer_state import TrainerState
from vqmosaic.validation_schedule import FEWEST_IMAGES, INTERVAL, PLANNED_TIME_SHARE, TIME_SHARE, ValidationSchedule

STAGES = {"tokenizer": train_tokenizer, "prior": train_prior}
both_stages = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture
def run_dir(tiny_run, tmp_path) -> Path:
    """A run folder with finished tokens and no training."""
    shutil.copytree(tiny_run / "tokens", tmp_path / "run/tokens")
    return tmp_path / "run"


def train(stage: str, run_dir: Path, **changes) -> list[dict]:
    """Train a stage in this process and return the records of its metrics.jsonl."""
    STAGES[stage].train(tiny_recipe(run_dir, **{f"{stage}_training__{name}": value for name, value in changes.items()}))
    return [json.loads(line) for line in (RunFolder(run_dir).logs(stage) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that all clocks show. A test changes it."""
    now = [1000.0]
    for module in (budget_module, tracking, validation_schedule):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@both_stages
def test_start_up_uses_none_of_the_time_budget(stage, run_dir, monkeypatch):
    module, trial = STAGES[stage], {"tokenizer": "time_of_one_step", "prior": "time_and_loss_of_one_step"}[stage]
    original = getattr(module, trial)

    def slow(*arguments):  # stands for k-means of a large codebook, or for torch.compile
        time.sleep(3)
        return original(*arguments)

    monkeypatch.setattr(module, trial, slow)
    records = train(stage, run_dir, max_steps="null", max_minutes=0.04, warmup_fraction=0.5, learning_rate=0.01)
    first = next(record for record in records if record["kind"] == "train")
    assert first["seconds"] == 0 and first["learning_rate"] == pytest.approx(1e-5), "the warm-up begins with the first step"


@both_stages
def test_validation_and_k_means_work_on_no_more_images_than_a_training_step(stage, run_dir, monkeypatch):
    parts, model = Counter(), {"tokenizer": ImageTokenizer, "prior": TokenPrior}[stage]
    methods = {"tokenizer": ("forward", "latents"), "prior": ("forward",)}[stage]

    def counting(original):
        def counted(self, inputs, *more):
            parts["train" if self.training else "eval", len(inputs)] += 1
            return original(self, inputs, *more)
        return counted

    for name in methods:
        monkeypatch.setattr(model, name, counting(getattr(model, name)))
    train(stage, run_dir, max_steps=2, batch_size=32, accumulation_steps=8, validation_images=20)
    assert {size for _, size in parts} == {4}
    assert parts["eval", 4] >= 20 / 4


@both_stages
def test_a_short_time_budget_validates_before_validate_every(stage, run_dir, capsys):
    records = train(stage, run_dir, max_steps="null", max_minutes=0.05, validate_every=10**6, validation_images=32)
    validated = [record["step"] for record in records if record["kind"] == "validation"]
    assert len(validated) > 2
    assert capsys.readouterr().out.count(": PSNR" if stage == "tokenizer" else ": NLL") == len(validated)


def schedule(seconds: float | None, max_steps: int | None = None, **changes) -> ValidationSchedule:
    """The schedule of a training that has not begun, with a budget in seconds."""
    training = tiny_recipe("unused", **{f"prior_training__{name}": value for name, value in changes.items()}).prior_training
    budget = Budget(max_steps, None if seconds is None else seconds / 60)
    return ValidationSchedule(training, TrainerState(), budget, Accelerator(cpu=True), micro_batch=16)


@pytest.mark.parametrize(("one", "every"), [(3.0, 10**6), (3.0, 30), (3.0, 5), (90.0, 10**6)])
def test_validations_under_a_time_budget_are_frequent_and_bounded(one, every, clock):
    """One step per second for 1,000 s. A validation takes `one` seconds: as long as choose_images plans, or far more."""
    began, validations = clock[0], schedule(1000, validate_every=every)
    state, budget, starts = validations.state, validations.budget, [0.0]
    budget.start()
    while True:
        state.elapsed_seconds = budget.elapsed_seconds
        finished = state.elapsed_seconds >= 1000
        if validations.due(finished):
            starts.append(state.elapsed_seconds)
            with validations.clock():
                clock[0] += one
            validations.record()
        if finished:
            break
        state.step += 1
        clock[0] += 1
    assert starts[-1] >= 1000, "the last step is validated"
    in_validation = one * (len(starts) - 1)
    if one == 3.0:
        assert max(later - earlier for earlier, later in pairwise(starts)) <= 50
        assert in_validation <= TIME_SHARE * (clock[0] - began)
    else:
        assert in_validation - one <= TIME_SHARE * 1000, "the last one always takes place"
    assert len(starts) > 20 if one == 3.0 else len(starts) == 3


def test_a_time_budget_decides_how_many_images_are_validated(clock):
    def validate(count: int) -> None:
        clock[0] += count * 0.5  # seconds per image

    hour = schedule(3600, validation_images=5000)
    assert hour.choose_images(3000, validate) == int(PLANNED_TIME_SHARE * INTERVAL * 3600 / 0.5) == 21
    hour.budget = Budget(None, 600)
    assert hour.choose_images(3000, validate) == 21, "a longer budget keeps the number of images, because the best weights are chosen by them"
    assert hour.choose_images(7, validate) == 7
    assert schedule(60).choose_images(3000, validate) == FEWEST_IMAGES
    assert schedule(10**6, validation_images=40).choose_images(3000, validate) == 40
    assert schedule(None, max_steps=100, validation_images=50).choose_images(3000, lambda count: pytest.fail("there is nothing to time")) == 50


def test_pictures_that_take_long_are_left_out_until_the_end(clock):
    validations, made = schedule(1000), []
    validations.budget.start()

    def make() -> None:
        made.append(validations.budget.elapsed_seconds)
        clock[0] += 30

    while validations.budget.elapsed_seconds < 1000:
        clock[0] += 40
        validations.make_pictures(make)
    assert made == [40, 630, 900, 1010], "the first, then as long as they take at most a tenth of the time, and the last"


def test_a_resumed_training_keeps_its_number_of_validation_images(run_dir, capsys):
    train("prior", run_dir, max_steps=4, max_minutes=10)
    state = read_state(CheckpointFolder(RunFolder(run_dir).checkpoints("prior")).all()[-1])
    assert state["validation_images"] == 64 and state["validation_seconds"] > 0
    out = capsys.readouterr().out
    assert "64 of 379 to validate on" in out
    assert "every 4% of the time budget, on 64 images, so that validation takes less than 10% of the time" in out


def test_the_pace_excludes_the_first_steps(clock):
    pace = Pace()
    for seconds in (9.0, 5.0, 3.0, 2.0, 2.0, 0.5, 0.7):
        clock[0] += seconds
        pace.step()
    assert pace.seconds_per_step == pytest.approx(0.6)


@both_stages
def test_progress_is_printed_if_the_output_is_not_a_terminal(stage, run_dir, monkeypatch, capsys):
    monkeypatch.setattr(training_run, "FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(training_run, "LINE_SECONDS", 0.0)
    records = train(stage, run_dir, max_steps=8)
    lines = [line for line in capsys.readouterr().out.splitlines() if "per step overall" in line]
    assert len(lines) == 3, "every step after the five that warm up"
    loss = {"tokenizer": "reconstruction_loss", "prior": "nll"}[stage]
    logged = {record["step"]: record[loss] for record in records if record["kind"] == "train"}
    assert f"step 7 of 8, {loss} {logged[6]:.4g}, " in lines[1] and lines[1].endswith("s left")


def test_progress_lines_replace_a_bar(clock, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(tracking.sys, "stderr", out)
    lines = tracking.progress_bar(5000, 1000, "train", "image")
    assert isinstance(lines, ProgressLines)
    for _ in range(7):
        clock[0] += 10
        lines.update(200)
    assert out.getvalue().splitlines() == ["train: 1,600 of 5,000 images (32%), about 2 min 50 s left",
                                           "train: 2,200 of 5,000 images (44%), about 2 min 20 s left"]


def test_a_prior_that_learned_nothing_is_exported_with_a_warning(run_dir, capsys):
    train("prior", run_dir, max_steps=6, learning_rate=100, warmup_fraction=0, weight_ema_decay=0)
    best = min(record["nll"] for record in read_metrics(RunFolder(run_dir).logs("prior") / "metrics.jsonl", "validation"))
    out = capsys.readouterr().out
    assert best > 3.466 and f"the best NLL of all validations is {best:.4g} nats per token" in out and "3.466 (ln K)" in out


@pytest.mark.parametrize("learning_rate", [0.3, 100])
def test_a_tokenizer_that_learned_nothing_is_exported_with_a_warning(learning_rate, tmp_path, capsys):
    records = train("tokenizer", tmp_path, max_steps=6, learning_rate=learning_rate, warmup_fraction=0, weight_ema_decay=0)
    last = records[-1]
    assert not last["reconstruction_l2"] < last["variance"] and math.isfinite(last["reconstruction_l2"]) == (learning_rate < 1)
    assert f"the squared error of the exported tokenizer is {last['reconstruction_l2']:.4g}. A flat grey image has" in capsys.readouterr().out


def test_the_variance_of_the_validation_images_is_that_of_their_pixels(tmp_path, capsys):
    numbers = train("tokenizer", tmp_path, max_steps=60, learning_rate=0.003, weight_ema_decay=0)[-1]
    recipe = tiny_recipe(tmp_path)
    images = ValidationImages(open_splits(recipe.data).validation, ImageTransform(16, recipe.data.channels), 64)
    pixels = torch.cat([batch for batch, _ in images.batches(64)])
    assert numbers["variance"] == pytest.approx(float(pixels.var(correction=0)), rel=1e-5)
    assert numbers["reconstruction_l2"] < numbers["variance"] and "warning" not in capsys.readouterr().out


def test_a_prior_that_learned_is_exported_without_a_warning(run_dir, capsys):
    train("prior", run_dir, max_steps=30, learning_rate=0.01, weight_ema_decay=0)
    assert "warning" not in capsys.readouterr().out


def test_a_codebook_with_more_codes_than_vectors_is_warned_about(tmp_path, capsys):
    train_tokenizer.train(tiny_recipe(tmp_path, tokenizer__quantizer="fsq", tokenizer__codebook_size=32768, tokenizer__code_dim=5,
                                      tokenizer_training__max_steps=1))
    words = "warning: tokenizer.codebook_size is 32,768, but the 1,418 training images have 22,688 vectors (4 x 4 each)"
    out = capsys.readouterr().out
    assert words in out and out.index("plan") < out.index(words) < out.index("step 1:")
