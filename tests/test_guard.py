"""The guard of adversarial training: schedule, plateau detection and halvings as functions of progress and validation errors."""

import json
import math

import pytest

from stage1_tokenizer.adversarial.guard import AdversarialGuard, describe_schedule
from vqmosaic.recipes.tokenizer_sections import AdversarialConfig, TokenizerTrainingConfig


def config(**fields) -> AdversarialConfig:
    return AdversarialConfig(**{"weight": 0.8, "start": 0.3, "warmup": 0.05, "ramp": 0.1, "worsening_limit": 0.1, "plateau_gain": 0.01} | fields)


def shares(guard: AdversarialGuard, settings: AdversarialConfig, steps: int) -> list[float]:
    found = []
    for step in range(steps):
        guard.joins(settings, step / steps)
        found.append(guard.share(settings, step / steps))
    return found


def test_share_is_zero_until_the_warmup_ends_and_then_ramps_up():
    guard, settings = AdversarialGuard(), config()
    found = shares(guard, settings, 200)
    assert guard.joined_at == 0.3
    assert not any(found[:71]), "no share before the start and during warmup"
    rising = found[70:91]
    assert rising == sorted(rising) and 0 < rising[5] < 1 and math.isclose(rising[10], 0.5, abs_tol=1e-6)
    assert all(share == 1 for share in found[91:])


@pytest.mark.parametrize(("fields", "expected"), [({"start": 0, "warmup": 0, "ramp": 0}, [1.0] * 4), ({"start": 1.0}, [0.0] * 4),
                                                   ({"weight": 0}, [0.0] * 4), ({"start": 0.5, "warmup": 0, "ramp": 0}, [0, 0, 1, 1])])
def test_schedule_edge_cases(fields, expected):
    assert shares(AdversarialGuard(), config(**fields), 4) == expected


def test_plateau_starts_the_discriminator_early_if_enabled():
    for is_enabled in (True, False):
        guard, settings = AdversarialGuard(), config(start_at_plateau=is_enabled, start=0.9)
        words = [guard.update_after_validation(settings, error, progress) for progress, error in ((0.1, 1.0), (0.2, 0.8), (0.3, 0.799), (0.4, 0.798))]
        assert words[:3] == [None] * 3
        assert (words[3] is not None and "plateau" in words[3]) == is_enabled
        assert guard.joined_at == (0.4 if is_enabled else None)
    guard = AdversarialGuard()
    for progress, error in ((0.1, 1.0), (0.2, 0.999), (0.3, 0.5), (0.4, 0.499), (0.5, 0.3)):
        guard.update_after_validation(config(start_at_plateau=True, start=0.9), error, progress)
    assert guard.joined_at is None, "stalls must be consecutive"


def test_worse_validation_halves_the_weight_repeatedly():
    guard, settings = AdversarialGuard(), config()
    for error in (0.5, 0.4, 0.45):
        assert guard.update_after_validation(settings, error, 0.2) is None
    assert guard.reference_error == 0.4
    guard.joins(settings, 0.3)
    assert guard.update_after_validation(settings, 0.9, 0.32) is None, "during warmup, the discriminator does not affect the generator"
    assert guard.update_after_validation(settings, 0.439, 0.5) is None
    words = guard.update_after_validation(settings, 0.441, 0.6)
    assert "halved the adversarial weight, now 0.4" in words and "0.4410" in words and "worsening_limit" in words
    assert guard.share(settings, 0.6) == 0.5
    assert [guard.update_after_validation(settings, 0.5, 0.62) for _ in range(2)] == [None, None], "the averaged weights need time to follow"
    assert "now 0.2" in guard.update_after_validation(settings, 0.5, 0.7)
    assert guard.update_after_validation(settings, 0.41, 0.8) is None and guard.share(settings, 0.8) == 0.25


def test_first_validation_is_the_reference_if_none_precedes_the_start():
    guard, settings = AdversarialGuard(), config(start=0, warmup=0, ramp=0)
    guard.joins(settings, 0.0)
    assert guard.update_after_validation(settings, 0.4, 0.1) is None
    assert "halved" in guard.update_after_validation(settings, 0.6, 0.2)


def test_share_does_not_drop_when_the_step_budget_grows():
    guard, settings = AdversarialGuard(), config()
    guard.joins(settings, 0.3)
    assert guard.share(settings, 0.4) == pytest.approx(0.5) and guard.share(settings, 1.0) == 1
    assert guard.share(settings, 0.25) == 1, "progress drops to a quarter if the number of steps quadruples"


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_non_finite_validation_error_is_ignored(error):
    guard = AdversarialGuard()
    assert guard.update_after_validation(config(), error, 0.1) is None and guard == AdversarialGuard()


def test_state_round_trips_through_json():
    guard, settings = AdversarialGuard(), config(start_at_plateau=True)
    for progress, error in ((0.1, 0.5), (0.2, 0.4999), (0.25, 0.4999), (0.6, 0.9)):
        guard.update_after_validation(settings, error, progress)
    assert guard.joined_at == 0.25 and guard.halvings == 1
    assert AdversarialGuard(**json.loads(json.dumps(guard.to_dict()))) == guard
    assert AdversarialGuard(**json.loads(json.dumps(AdversarialGuard().to_dict()))) == AdversarialGuard()


def test_plan_describes_the_schedule_in_steps_or_minutes():
    steps = describe_schedule(config(), TokenizerTrainingConfig(max_steps=1000))
    assert "joins at step 300" in steps and "from step 350" in steps and "from step 450" in steps and "weight 0.8" in steps
    assert "at the latest at step 300" in describe_schedule(config(start_at_plateau=True), TokenizerTrainingConfig(max_steps=1000))
    assert "from step 1,050 (after the end)" in describe_schedule(config(start=0.9), TokenizerTrainingConfig(max_steps=1000))
    schedule_in_minutes = describe_schedule(config(), TokenizerTrainingConfig(max_steps=None, max_minutes=10))
    assert "joins at 3 min 00 s" in schedule_in_minutes and "4 min 30 s" in schedule_in_minutes
