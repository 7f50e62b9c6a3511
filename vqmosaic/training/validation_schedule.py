"""Decides when to validate, and on how many images. Under a time budget, it validates regularly and limits the share of time that this takes."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from vqmosaic.recipes.recipe_sections import TrainingConfig
from vqmosaic.training.budget import Budget
from vqmosaic.training.trainer_state import TrainerState
from vqmosaic.wording import counted

INTERVAL_SHARE = 0.04
"""Share of a time budget from one validation to the next. If a step takes at most 1 % of the budget, at most 5 % pass between two validations."""
TIME_SHARE = 0.1
"""Largest share of the time that validations may take under a time budget."""
PLANNED_TIME_SHARE = 0.075
"""Share of the time that validations should take when a trial before the first step sets their number of images. The difference to TIME_SHARE is a
margin for validations that take longer than the trial."""
FEW_IMAGES = 32
"""The plan warns if a validation uses fewer images than this, or fewer images than there are classes."""
FEWEST_IMAGES = 16
"""Smallest number of images in a validation, even if the time budget is too short for it. If there are fewer, a validation uses all of them."""


class ValidationSchedule:
    """Decides when to validate and on how many images. It uses only the trainer state, so all processes and a resumed training agree."""

    def __init__(self, training: TrainingConfig, state: TrainerState, budget: Budget, accelerator: Accelerator, micro_batch: int):
        self.training, self.state, self.budget, self.accelerator, self.micro_batch = training, state, budget, accelerator, micro_batch
        self.has_other_images = False
        """Whether a resumed training validates on other images than before."""
        self._picture_seconds: list[float] = []
        """Duration of each call in make_pictures."""

    def choose_images(self, available: int, validate: Callable[[int], Any], rule: int = 0) -> int:
        """The number of the `available` images in each validation: validation_images, or fewer if a time budget is too short for them.

        A resumed training keeps its number. If the images change nevertheless, for example because the new budget has no minutes, the best
        validation so far is dropped, because it cannot be compared with validations on other images.

        Args:
            validate: validate(count) validates on `count` images. All processes call it together to time it on a few images.
            rule: number of the rule by which the caller selects the images. Rule 0 is that of version 0.1.0.
        """
        limit = chosen = min(self.training.validation_images, available)
        if self.budget.max_seconds is not None:
            if not self.state.validation_images:
                self._fit_images_to_budget(limit, validate)
            chosen = min(limit, self.state.validation_images)
        selection = "all" if chosen == available else f"{chosen}, rule {rule}"
        previous_selection = self.state.validated_on or ("all" if limit == available else f"{limit}, rule 0")  # version 0.1.0 did not record it
        self.has_other_images = selection != previous_selection and self.state.validated_step > 0
        if self.has_other_images:
            self.state.best_validation = math.inf
        self.state.validated_on = selection
        return chosen

    def _fit_images_to_budget(self, limit: int, validate: Callable[[int], Any]) -> None:
        """Set the number of images and the expected seconds of a validation in the trainer state, by timing a validation on a few images.

        Rank 0 decides for all processes.
        """
        trial_images = min(limit, 2 * self.micro_batch * self.accelerator.num_processes)
        for _ in range(2):  # the first one is a warm-up
            started = time.monotonic()
            validate(trial_images)
            trial_seconds = time.monotonic() - started
        assert self.budget.max_seconds is not None
        planned_seconds = PLANNED_TIME_SHARE * INTERVAL_SHARE * self.budget.max_seconds
        chosen = min(limit, max(int(planned_seconds * trial_images / trial_seconds), FEWEST_IMAGES, self.accelerator.num_processes))
        decision = broadcast(torch.tensor([chosen, trial_seconds / trial_images * chosen], device=self.accelerator.device), from_process=0)
        self.state.validation_images, self.state.seconds_per_validation = int(decision[0]), float(decision[1])

    def describe(self) -> str:
        """When validations happen and on how many images, as text for the plan."""
        by_steps = "every step" if self.training.validate_every == 1 else f"every {self.training.validate_every:,} steps"
        if self.budget.max_seconds is None:
            return by_steps
        return (f"every {INTERVAL_SHARE:.0%} of the time budget, and {by_steps} if there is time; {counted(self.state.validation_images, 'image')}, "
                f"less than {TIME_SHARE:.0%} of the time")

    def warn_of_few_images(self, chosen: int, available: int, classes: int) -> str | None:
        """A warning if `chosen` of the `available` images are too few to compare weights by their validations; None if they are enough."""
        if chosen >= max(FEW_IMAGES, classes):
            return None
        section = self.training.SECTION
        fewer_than_classes = f", fewer than the {classes:,} classes" if chosen < classes else ""
        if chosen == available:
            remedy = "Hold out more images: raise data.validation_fraction, or give the data set a larger validation split."
        elif chosen == self.training.validation_images:
            remedy = f"Raise {section}.validation_images; {available:,} are available."
        else:
            remedy = f"The time budget has no time for more of the {available:,} that are available: raise {section}.max_minutes or minutes."
            if available < max(FEW_IMAGES, classes):
                remedy += " Also hold out more images: raise data.validation_fraction."
        return (f"warning: only {counted(chosen, 'image')} to validate on{fewer_than_classes}. The validation metrics and the choice of the best "
                f"weights depend on chance. {remedy}")

    def due(self, finished: bool) -> bool:
        """Whether to validate now: every `validate_every` steps and at the last step.

        A time budget may end long before `validate_every` steps, so a validation is also due after each INTERVAL_SHARE of the budget.

        If the time will run out before the steps do, validations may take at most TIME_SHARE of the time so far, and a validation that would exceed
        it is skipped. The last validation always runs. A validation that is due only by steps must leave time for a second one.
        """
        state = self.state
        if state.validated_step >= state.step:
            return False
        by_steps = finished or state.step % self.training.validate_every == 0
        if self.budget.max_seconds is None or finished:
            return by_steps
        by_time = state.elapsed_seconds - state.validated_seconds >= INTERVAL_SHARE * self.budget.max_seconds
        if not self.budget.ends_by_clock(state.step, state.elapsed_seconds):
            return by_steps or by_time
        expected_seconds = state.validation_seconds / state.validations if state.validations else state.seconds_per_validation
        available_seconds = TIME_SHARE * (state.elapsed_seconds + expected_seconds) - state.validation_seconds
        return (by_time and expected_seconds <= available_seconds) or (by_steps and 2 * expected_seconds <= available_seconds)

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Measure the time of a block, and add it to the time of validations if the block records one."""
        started = time.monotonic()
        yield
        if self.state.validated_step == self.state.step:
            self.state.validation_seconds += time.monotonic() - started
            self.state.validations += 1

    def record(self) -> None:
        """Record that the current step was validated."""
        self.state.validated_step, self.state.validated_seconds = self.state.step, self.state.elapsed_seconds

    def make_pictures(self, make: Callable[[], None]) -> None:
        """Call `make`, which makes pictures. Under a time budget, skip it if validations and pictures would take more than TIME_SHARE of the time.

        The pictures at the end of training are always made.
        """
        elapsed = self.budget.elapsed_seconds
        finished = self.budget.progress(self.state.step, elapsed) >= 1
        expected_seconds = self._picture_seconds[-1] if self._picture_seconds else 0.0  # as long as the last time
        total_seconds = self.state.validation_seconds + sum(self._picture_seconds) + expected_seconds
        if self.budget.max_seconds is None or finished or total_seconds <= TIME_SHARE * elapsed:
            started = time.monotonic()
            make()
            self._picture_seconds.append(time.monotonic() - started)
