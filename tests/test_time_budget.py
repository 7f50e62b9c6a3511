"""Training under a time budget: the start of the clock, the frequency of validations, printed progress, and the memory of one micro-batch."""

import io
import json
import math
import re
import shutil
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from pipelines.stages.train_prior import make_picture_saver
from stage1_tokenizer import train as train_tokenizer
from stage1_tokenizer.data.image_batches import ValidationImages
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior import train as train_prior
from stage2_prior.prior import TokenPrior
from tests.run_files import records
from tests.tiny import command, tiny_overrides, tiny_recipe
from vqmosaic.files.durable_files import sha256_of_file, write_json
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.training import best_weights, tracking, training_run, validation_schedule
from vqmosaic.training import budget as budget_module
from vqmosaic.training.budget import Budget, Pace
from vqmosaic.training.checkpoints import CheckpointFolder, read_state
from vqmosaic.training.tracking import ProgressLines
from vqmosaic.training.trainer_state import TrainerState
from vqmosaic.training.validation_schedule import FEWEST_IMAGES, INTERVAL_SHARE, PLANNED_TIME_SHARE, TIME_SHARE, ValidationSchedule

STAGES = {"tokenizer": train_tokenizer, "prior": train_prior}
both_stages = pytest.mark.parametrize("stage", STAGES)


def train(stage: str, run_dir: Path, **changes) -> list[dict]:
    """Train a stage in this process and return the records of its metrics.jsonl."""
    STAGES[stage].train(tiny_recipe(run_dir, **{f"{stage}_training__{name}": value for name, value in changes.items()}))
    return [json.loads(line) for line in (RunFolder(run_dir).logs(stage) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that all clocks return. Tests can change it."""
    now = [1000.0]
    for module in (budget_module, tracking, validation_schedule):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@both_stages
def test_start_up_uses_none_of_the_time_budget(stage, run_dir, monkeypatch):
    module, trial = STAGES[stage], {"tokenizer": "measure_step_seconds", "prior": "time_and_loss_of_one_step"}[stage]
    original = getattr(module, trial)

    def slow(*arguments):  # like k-means of a large codebook, or torch.compile
        time.sleep(1.5)
        return original(*arguments)

    monkeypatch.setattr(module, trial, slow)
    records = train(stage, run_dir, max_steps="null", max_minutes=0.02, warmup_fraction=0.5, learning_rate=0.01)
    first = next(record for record in records if record["kind"] == "train")
    assert first["seconds"] == 0 and first["learning_rate"] == pytest.approx(1e-5), "the warm-up begins with the first step"


@both_stages
def test_validation_and_k_means_use_micro_batches(stage, run_dir, monkeypatch):
    batches, model = Counter(), {"tokenizer": ImageTokenizer, "prior": TokenPrior}[stage]
    methods = {"tokenizer": ("forward", "latents"), "prior": ("forward",)}[stage]

    def counting(original):
        def counted(self, inputs, *more):
            batches["train" if self.training else "eval", len(inputs)] += 1
            return original(self, inputs, *more)
        return counted

    for name in methods:
        monkeypatch.setattr(model, name, counting(getattr(model, name)))
    train(stage, run_dir, max_steps=2, batch_size=32, accumulation_steps=8, validation_images=20)
    assert {size for _, size in batches} == {4}
    assert batches["eval", 4] >= 20 / 4


@both_stages
def test_a_short_time_budget_validates_before_validate_every(stage, run_dir, capsys):
    records = train(stage, run_dir, max_steps="null", max_minutes=0.05, validate_every=10**6, validation_images=32)
    validated = [record["step"] for record in records if record["kind"] == "validation"]
    assert len(validated) > 2
    assert capsys.readouterr().out.count(": PSNR" if stage == "tokenizer" else ": NLL") == len(validated)


def schedule(seconds: float | None, max_steps: int | None = None, **changes) -> ValidationSchedule:
    """The validation schedule of a new training with a budget in seconds."""
    training = tiny_recipe("unused", **{f"prior_training__{name}": value for name, value in changes.items()}).prior_training
    budget = Budget(max_steps, None if seconds is None else seconds / 60)
    return ValidationSchedule(training, TrainerState(), budget, Accelerator(cpu=True), micro_batch=16)


@pytest.mark.parametrize(("max_steps", "max_minutes", "steps", "epochs", "has_warning"), [
    (200, "null", 200, "2.0", False),
    (20, "null", 20, "0.2", False),
    ("null", 2, 40, "about 0.4, from the trial step", True),
    (10**6, 2, 40, "about 0.4, from the trial step", True),
    (30, 2, 30, "about 0.3, from the trial step", False),
    (10**6, 2, 100, "about 1.0, from the trial step", False),
], ids=str)
def test_the_plan_shows_steps_and_epochs_of_the_budget(max_steps, max_minutes, steps, epochs, has_warning):
    changes = {"prior_training__max_steps": max_steps, "prior_training__max_minutes": max_minutes, "prior_training__batch_size": 10}
    training = tiny_recipe("unused", **changes).prior_training
    assert budget_module.describe_epochs(training, steps, 1000) == epochs
    warning = budget_module.few_steps_warning(training, steps, seconds_per_step=3.0)
    assert (warning is not None) == has_warning
    assert not has_warning or ("max_minutes 2 has time for about 40 steps" in warning and "100 steps take about 5 minutes" in warning)


@pytest.mark.parametrize(("chosen", "available", "classes", "message"), [
    (2, 2, 0, "only 2 images to validate on. .* raise data.validation_fraction"),
    (1, 1, 0, "only 1 image to validate on"),
    (64, 64, 100, "only 64 images to validate on, fewer than the 100 classes"),
    (64, 500, 100, "Raise prior_training.validation_images; 500 are available"),
    (16, 500, 0, "raise prior_training.max_minutes"),
    (64, 500, 10, None), (32, 32, 2, None),
])
def test_few_validation_images_give_a_warning(chosen, available, classes, message):
    warning = schedule(60, validation_images=64).warn_of_few_images(chosen, available, classes)
    assert re.search(message, warning) if message else warning is None


@both_stages
def test_the_plan_warns_of_few_steps_and_few_validation_images(stage, run_dir, capsys):
    train(stage, run_dir, max_steps="null", max_minutes=0.001, validation_images=20)
    out = capsys.readouterr().out
    assert re.search(rf"warning: {stage}_training.max_minutes 0.001 has time for about \d+ steps? \(", out)
    assert re.search(r"warning: only \d+ images to validate on\.", out) and re.search(r"epochs +about \d\.\d, from the trial step", out)


@pytest.mark.parametrize(("validation_seconds", "validate_every"), [(3.0, 10**6), (3.0, 30), (3.0, 5), (90.0, 10**6)])
def test_validations_under_a_time_budget_are_frequent_and_bounded(validation_seconds, validate_every, clock):
    """One step per second for 1,000 s. A validation takes as long as choose_images plans, or far longer."""
    start, validations = clock[0], schedule(1000, validate_every=validate_every)
    state, budget, starts = validations.state, validations.budget, [0.0]
    state.seconds_per_validation = 3.0
    budget.start()
    while True:
        state.elapsed_seconds = budget.elapsed_seconds
        finished = state.elapsed_seconds >= 1000
        if validations.due(finished):
            starts.append(state.elapsed_seconds)
            with validations.clock():
                clock[0] += validation_seconds
                validations.record()
        if finished:
            break
        state.step += 1
        clock[0] += 1
    assert starts[-1] >= 1000, "the last step is validated"
    in_validation = validation_seconds * (len(starts) - 1)
    if validation_seconds == 3.0:
        assert max(later - earlier for earlier, later in pairwise(starts)) <= 50
        assert in_validation <= TIME_SHARE * (clock[0] - start)
    else:
        assert in_validation - validation_seconds <= TIME_SHARE * 1000, "the last validation always runs"
    assert len(starts) > 20 if validation_seconds == 3.0 else len(starts) == 3


def test_validate_every_applies_if_the_steps_end_first(clock):
    validations = schedule(1200, max_steps=60, validate_every=20)
    state = validations.state
    state.seconds_per_validation = 5.0
    validations.budget.start()
    due = []
    for state.step in range(1, 61):
        clock[0] += 0.1
        state.elapsed_seconds = validations.budget.elapsed_seconds
        if validations.due(finished=state.step == 60):
            due.append(state.step)
            validations.record()
    assert due == [20, 40, 60]


def test_an_interrupted_validation_is_due_again(clock):
    validations = schedule(1000)
    state = validations.state
    state.step, state.elapsed_seconds, state.seconds_per_validation = 7, 41.0, 3.0
    assert validations.due(finished=False)
    with validations.clock():
        clock[0] += 2
    assert state.validations == state.validation_seconds == 0 and validations.due(finished=False)


def test_the_best_validation_is_reset_if_the_images_change(clock):
    def validate(count: int) -> None:
        clock[0] += count * 0.5

    def resumed(state: TrainerState, seconds: float | None, limit: int = 1000) -> ValidationSchedule:
        validations = schedule(seconds, 100, validation_images=limit)
        validations.state = state
        return validations

    first = schedule(3600)
    first.choose_images(3000, validate)
    state = first.state
    assert not first.has_other_images
    state.best_validation = state.validated_step = 5
    longer = resumed(state, 7200)
    assert longer.choose_images(3000, validate) == 21 and not longer.has_other_images and state.best_validation == 5
    without_minutes = resumed(state, None)
    assert without_minutes.choose_images(3000, validate) == 1000 and without_minutes.has_other_images and state.best_validation == math.inf

    for rule, available, is_reset in ((1, 3000, True), (1, 800, False), (0, 3000, False)):  # states of version 0.1.0 have no `validated_on`
        earlier = resumed(TrainerState(validated_step=5, best_validation=5.0), None)
        earlier.choose_images(available, validate, rule)
        assert earlier.has_other_images == is_reset == (earlier.state.best_validation == math.inf)


def test_the_time_budget_limits_the_number_of_validation_images(clock):
    def validate(count: int) -> None:
        clock[0] += count * 0.5  # seconds per image

    validations = schedule(3600, validation_images=5000)
    assert validations.choose_images(3000, validate) == int(PLANNED_TIME_SHARE * INTERVAL_SHARE * 3600 / 0.5) == 21
    validations.budget = Budget(None, 600)
    assert validations.choose_images(3000, validate) == 21, "a larger budget keeps the number of images, because they select the best weights"
    assert validations.choose_images(7, validate) == 7
    assert schedule(60).choose_images(3000, validate) == FEWEST_IMAGES
    assert schedule(10**6, validation_images=40).choose_images(3000, validate) == 40
    assert schedule(None, max_steps=100, validation_images=50).choose_images(3000, lambda count: pytest.fail("there is nothing to time")) == 50


def test_slow_pictures_are_skipped_until_the_end(clock):
    validations, made = schedule(1000), []
    validations.budget.start()

    def make() -> None:
        made.append(validations.budget.elapsed_seconds)
        clock[0] += 30

    while validations.budget.elapsed_seconds < 1000:
        clock[0] += 40
        validations.make_pictures(make)
    assert made == [40, 630, 900, 1010], "the first, those that take at most a tenth of the time, and the last"


@both_stages
def test_a_resumed_training_keeps_its_number_of_validation_images(stage, run_dir, monkeypatch, capsys):
    def fit_images_to_budget(self, limit, validate) -> None:
        self.state.validation_images, self.state.seconds_per_validation = 20, 0.01

    monkeypatch.setattr(ValidationSchedule, "_fit_images_to_budget", fit_images_to_budget)
    train(stage, run_dir, max_steps=4, max_minutes=10)
    out = capsys.readouterr().out
    assert "every 4% of the time budget, and every 3 steps if there is time; 20 images, less than 10% of the time" in out
    monkeypatch.setattr(ValidationSchedule, "_fit_images_to_budget", lambda *_: pytest.fail("the number is known"))
    records = train(stage, run_dir, max_steps=6, max_minutes=20)
    assert [record["images"] for record in records if record["kind"] == "validation"] == [20, 20, 20]
    state = read_state(CheckpointFolder(RunFolder(run_dir).checkpoints(stage)).all()[-1])
    assert state["validation_images"] == 20 and state["validations"] == 3 and state["validation_seconds"] > 0


@both_stages
def test_saving_the_best_weights_counts_as_validation_time(stage, run_dir, monkeypatch):
    original = best_weights.save_weights
    monkeypatch.setattr(best_weights, "save_weights", lambda *arguments: time.sleep(0.3) or original(*arguments))
    train(stage, run_dir, max_steps=3, max_minutes=10)
    assert read_state(CheckpointFolder(RunFolder(run_dir).checkpoints(stage)).all()[-1])["validation_seconds"] > 0.3


@both_stages
@pytest.mark.slow
def test_two_processes_stay_within_the_time_budget(stage, run_dir):
    name = {"tokenizer": "train-tokenizer", "prior": "train-prior"}[stage]
    result = command(name, "digits", *tiny_overrides(run_dir, **{f"{stage}_training__max_steps": "null", f"{stage}_training__max_minutes": 0.1}),
                     "--processes", "2")
    assert result.returncode == 0, result.stderr
    state = read_state(CheckpointFolder(RunFolder(run_dir).checkpoints(stage)).all()[-1])
    assert state["validations"] > 2 and state["validated_step"] == state["step"] and 6 <= state["elapsed_seconds"] < 20


def test_start_up_time_counted_by_version_0_1_0_uses_no_budget(run_dir):
    """A checkpoint from before the first step contains the time of the start-up, which may exceed the whole budget."""
    checkpoint = RunFolder(run_dir).checkpoints("prior")
    train("prior", run_dir, max_steps=1, max_minutes=5)
    (path,) = CheckpointFolder(checkpoint).all()
    write_json(path / "trainer_state.json", read_state(path) | {"step": 0, "elapsed_seconds": 1e6, "validated_step": 0})
    checksums = json.loads((path / "checksums.json").read_text())
    state = path / "trainer_state.json"
    write_json(path / "checksums.json", checksums | {state.name: {"size": state.stat().st_size, "sha256": sha256_of_file(state)}})
    records = train("prior", run_dir, max_steps=2, max_minutes=5)
    assert records[-1]["step"] == 2


def test_a_finished_tokenizer_without_logs_is_exported_again(tmp_path):
    train("tokenizer", tmp_path)
    shutil.rmtree(tmp_path / "logs")
    shutil.rmtree(tmp_path / "tokenizer")
    train_tokenizer.train(tiny_recipe(tmp_path))
    assert (tmp_path / "tokenizer/config.json").is_file()


def test_few_validation_images_give_no_warning_about_codebook_usage(tmp_path, capsys):
    train("tokenizer", tmp_path, max_steps=40, learning_rate=0.003, validation_images=2, usage_alarm=0.6)
    assert "of the codebook is in use" not in capsys.readouterr().out


def test_sample_pictures_use_micro_batches(tiny_run, tmp_path, monkeypatch):
    rows, decoded = [], []
    recipe = tiny_recipe(tiny_run, prior_training__batch_size=64, prior_training__accumulation_steps=16)
    save, prior = make_picture_saver(recipe), TokenPrior.from_pretrained(tiny_run / "prior")
    sample, decode = prior.sample, ImageTokenizer.decode
    monkeypatch.setattr(prior, "sample", lambda classes, sampling, seeds, callback, **given: rows.append(2 * len(seeds)) or sample(
        classes, sampling, seeds, callback, **given))
    monkeypatch.setattr(ImageTokenizer, "decode", lambda self, ids: decoded.append(len(ids)) or decode(self, ids))
    with StopFlag() as stop:
        save(prior, 1, tmp_path, stop)
    assert max(rows) <= 4 and max(decoded) <= 4 and sum(decoded) == 80


def test_pace_excludes_the_first_steps(clock):
    pace, averages = Pace(), []
    pace.start()
    for seconds in (9.0, 5.0, 3.0, 2.0, 2.0, 0.5, 0.7, 0.6, 1.4):
        clock[0] += seconds
        pace.step()
        averages.append(pace.seconds_per_step)
    assert averages == pytest.approx([9, 7, 17 / 3, 19 / 4, 21 / 5, 21.5 / 6, 22.2 / 7, 0.6, 0.8])


@both_stages
def test_progress_is_printed_if_the_output_is_not_a_terminal(stage, run_dir, monkeypatch, capsys):
    monkeypatch.setattr(training_run, "FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(training_run, "LINE_SECONDS", 0.0)
    records = train(stage, run_dir, max_steps=8)
    lines = [line for line in capsys.readouterr().out.splitlines() if "per step overall" in line]
    assert len(lines) == 8, "one line per step"
    loss = {"tokenizer": "reconstruction_loss", "prior": "nll"}[stage]
    logged = {record["step"]: record[loss] for record in records if record["kind"] == "train"}
    assert f"step 7 of 8, training {loss} {logged[6]:.4g} at step 6, " in lines[6] and lines[6].endswith("s left")


def test_progress_lines_replace_the_progress_bar(clock, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(tracking.sys, "stderr", out)
    lines = tracking.progress_bar(5000, 1000, "train", "image")
    assert isinstance(lines, ProgressLines)
    for _ in range(7):
        clock[0] += 10
        lines.update(200)
    assert out.getvalue().splitlines() == ["train: 1,600 of 5,000 images (32%), about 2 min 50 s left",
                                           "train: 2,200 of 5,000 images (44%), about 2 min 20 s left"]
    lines = tracking.progress_bar(4, 0, "sampling", "image")
    clock[0] += 30
    lines.n = 0.5  # a share of images that are sampled together
    lines.update(0)
    assert out.getvalue().splitlines()[-1] == "sampling: 0.5 of 4 images (12%), about 3 min 30 s left"


@both_stages
def test_long_validations_and_k_means_print_progress_lines(stage, run_dir, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "LINE_SECONDS", 0.0)
    train(stage, run_dir, max_steps=1, batch_size=16, validation_images=64)
    err = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in err if line.startswith("validation")] == [
        f"validation: {count} of 64 images ({count / 64:.0%})" for count in (16, 32, 48, 64)]
    assert any(line.startswith("k-means: ") for line in err) == (stage == "tokenizer")


def test_a_prior_that_learned_nothing_is_exported_with_a_warning(run_dir, capsys):
    train("prior", run_dir, max_steps=6, learning_rate=100, warmup_fraction=0, weight_ema_decay=0)
    best = min(record["nll"] for record in records(run_dir, "prior", "validation"))
    out = capsys.readouterr().out
    assert best > 3.466 and f"the best NLL of all validations is {best:.4g} nats per token" in out and "3.466 (ln K)" in out


@pytest.mark.parametrize("learning_rate", [0.3, 100])
def test_a_tokenizer_that_learned_nothing_is_exported_with_a_warning(learning_rate, tmp_path, capsys):
    records = train("tokenizer", tmp_path, max_steps=6, learning_rate=learning_rate, warmup_fraction=0, weight_ema_decay=0)
    last = records[-1]
    assert not last["reconstruction_l2"] < last["variance"] and math.isfinite(last["reconstruction_l2"]) == (learning_rate < 1)
    assert f"the squared error of the exported tokenizer is {last['reconstruction_l2']:.4g}. A flat grey image has" in capsys.readouterr().out


def test_validation_variance_is_the_variance_of_the_pixels(tmp_path, capsys):
    numbers = train("tokenizer", tmp_path, max_steps=60, learning_rate=0.003, weight_ema_decay=0)[-1]
    recipe = tiny_recipe(tmp_path)
    images = ValidationImages(open_splits(recipe.data).validation, ImageTransform(16, recipe.data.channels), 64)
    pixels = torch.cat([batch for batch, _ in images.batches(64)])
    assert numbers["variance"] == pytest.approx(float(pixels.var(correction=0)), rel=1e-5)
    assert numbers["reconstruction_l2"] < numbers["variance"] and "warning" not in capsys.readouterr().out


def test_a_prior_that_learned_is_exported_without_a_warning(run_dir, capsys):
    train("prior", run_dir, max_steps=30, learning_rate=0.01, weight_ema_decay=0)
    assert "warning" not in capsys.readouterr().out


def test_a_codebook_with_more_codes_than_vectors_gives_a_warning(tmp_path, capsys):
    train_tokenizer.train(tiny_recipe(tmp_path, tokenizer__quantizer="fsq", tokenizer__codebook_size=32768, tokenizer__code_dim=5,
                                      tokenizer_training__max_steps=1))
    warning = "warning: tokenizer.codebook_size is 32,768, but the 1,418 training images have only 22,688 latent vectors (4 x 4 each)"
    out = capsys.readouterr().out
    assert warning in out and out.index("plan") < out.index(warning) < out.index("step 1:")
