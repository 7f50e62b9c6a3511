"""The budget of a training in steps or minutes: its progress, speed and remaining time."""

import math
import time
from collections import deque

from vqmosaic.recipes.recipe_sections import TrainingConfig
from vqmosaic.wording import counted

FEW_STEPS = 100
"""The plan warns if a time budget allows fewer steps than this."""


class Budget:
    """Progress in [0, 1] = max(step / max_steps, elapsed / max_minutes). After a resume, the time spent before still counts.

    `start` starts the clock. It is called at the first step, so start-up uses none of the budget.
    """

    def __init__(self, max_steps: int | None, max_minutes: float | None, elapsed_seconds: float = 0.0):
        self.max_steps, self.max_seconds = max_steps, None if max_minutes is None else max_minutes * 60
        self._elapsed_before = elapsed_seconds
        self._started: float | None = None

    def start(self) -> None:
        """Start the clock if it is not running yet."""
        if self._started is None:
            self._started = time.monotonic()

    @property
    def session_seconds(self) -> float:
        """Seconds since the clock started; 0 before that."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    @property
    def elapsed_seconds(self) -> float:
        """Seconds of training so far, validations included, over all sessions."""
        return self._elapsed_before + self.session_seconds

    def ends_by_clock(self, step: int, elapsed_seconds: float) -> bool:
        """Whether the time will run out before the steps do, at the speed so far."""
        return self.max_seconds is not None and (not self.max_steps or elapsed_seconds / self.max_seconds >= step / self.max_steps)

    def progress(self, step: int, elapsed_seconds: float) -> float:
        """The fraction of the budget that is used. `elapsed_seconds` is rank 0's, the same on all ranks."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        by_clock = elapsed_seconds / self.max_seconds if self.max_seconds else 0.0
        return min(1.0, max(by_steps, by_clock))


class Pace:
    """Average seconds per step over the last minute. The first few steps are left out because they are slower; validations are included."""

    WARM_UP_STEPS = 5
    WINDOW_SECONDS = 60.0
    FEWEST_INTERVALS = 3
    """With fewer intervals between steps, the average is that of all steps: a single one may be exceptionally long."""

    def __init__(self) -> None:
        self._steps = 0
        self._started: float | None = None
        self._ends: deque[float] = deque()

    def start(self) -> None:
        """Start the clock if it is not running yet. Called before the first step."""
        if self._started is None:
            self._started = time.monotonic()

    def step(self) -> None:
        """Count a finished step."""
        now = time.monotonic()
        self._steps += 1
        if self._steps >= self.WARM_UP_STEPS:
            self._ends.append(now)
        while len(self._ends) > 2 and now - self._ends[1] > self.WINDOW_SECONDS:
            self._ends.popleft()

    @property
    def seconds_per_step(self) -> float:
        """The average, or that of all steps until there are some after the first WARM_UP_STEPS. There must be at least one step."""
        if len(self._ends) > self.FEWEST_INTERVALS:
            return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        assert self._started is not None
        return (time.monotonic() - self._started) / self._steps


def remaining_seconds(seconds_per_step: float, budget: Budget, step: int) -> float:
    """The expected seconds until the end of the budget at this speed."""
    bounds = []
    if budget.max_steps is not None:
        bounds.append((budget.max_steps - step) * seconds_per_step)
    if budget.max_seconds is not None:
        bounds.append(budget.max_seconds - budget.elapsed_seconds)
    return max(0.0, min(bounds))


def format_duration(seconds: float) -> str:
    """Seconds as text: 42 s, 3 min 05 s, 2 h 10 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def describe_epochs(training: TrainingConfig, steps: int, images: int) -> str:
    """The number of epochs as text, for the plan. `steps` is the total number; under a time budget, it is estimated from a trial step."""
    number = f"{steps * training.batch_size / images:.1f}"
    return f"about {number}, from the trial step" if training.max_minutes else number


def few_steps_warning(training: TrainingConfig, steps: int, seconds_per_step: float) -> str | None:
    """A warning if the time budget allows fewer than FEW_STEPS steps; None if it allows more, or if max_steps ends the training."""
    if training.max_minutes is None or steps >= min(FEW_STEPS, training.max_steps or FEW_STEPS):
        return None
    minutes = math.ceil(FEW_STEPS * seconds_per_step / 60)
    return (f"warning: {training.SECTION}.max_minutes {training.max_minutes:g} has time for about {counted(steps, 'step')} (estimated from a trial "
            f"step), which is too few to learn much. {FEW_STEPS} steps take about {counted(minutes, 'minute')}. Raise max_minutes (or minutes), or "
            f"make steps faster with a smaller {training.SECTION}.batch_size, data.image_size or network.")
