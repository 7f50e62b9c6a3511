"""The guard over an adversarial training: when the discriminator joins, how much it may say, and what happens when pictures suffer.

Everything is a function of the progress and of a few counted numbers, which travel in the trainer state: a resumed run goes on as
if it had never stopped. The calendar of a run with start 0.3, warmup 0.05 and ramp 0.1:

    progress   0 ........ 0.30 ........ 0.35 ............ 0.45 ......... 1
               no        learns, and   its weight        full weight, halved whenever validation
               rival     has no say    rises from 0      reconstruction worsened past the limit
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from vqmosaic.files.json_files import from_fields
from vqmosaic.recipes.recipe_sections import TrainingConfig
from vqmosaic.recipes.tokenizer_sections import AdversarialConfig
from vqmosaic.training.budget import duration
from vqmosaic.training.checkpoints import version_of

PLATEAU_VALIDATIONS = 2
PAUSE_VALIDATIONS = 3


@dataclass
class AdversarialGuard:
    """What the guard has counted so far."""

    joined_at: float | None = None
    """Progress at which the discriminator joined in; None while it has not."""
    reference_error: float = math.inf
    """Best validation reconstruction error before the discriminator joined in."""
    previous_error: float = math.inf
    stalled: int = 0
    """Validations in a row that improved by less than plateau_gain."""
    risen: float = 0.0
    """How far the weight has risen; kept, since a budget that grows sets the progress back."""
    halvings: int = 0
    pause: int = 0
    """Validations for which no further halving is made: what is validated is an average, which follows slowly."""

    @classmethod
    def restored(cls, numbers: dict[str, float | None], checkpoint: Path | None) -> "AdversarialGuard":
        """The guard with the numbers of a checkpoint, or a new one without any. Raises InputError for numbers of a later version."""
        if checkpoint is None:
            return cls()
        return from_fields(cls, numbers, f"{checkpoint / 'trainer_state.json'}: guard", version_of(checkpoint))

    def to_dict(self) -> dict[str, float | None]:
        """The numbers for the trainer state."""
        return dataclasses.asdict(self)

    def forget_errors(self) -> None:
        """Start anew with the errors of validations: those that follow are measured on other images."""
        self.reference_error = self.previous_error = math.inf
        self.stalled = 0

    def joins(self, config: AdversarialConfig, progress: float) -> bool:
        """Whether the discriminator takes part at this progress; notes when it does so for the first time."""
        if self.joined_at is None and config.weight > 0 and progress >= config.start:
            self.joined_at = progress
        return self.joined_at is not None

    def share(self, config: AdversarialConfig, progress: float) -> float:
        """Share of its weight that the adversarial loss has now: 0 during the warm-up, rising over the ramp, halved as often as the guard did."""
        if self.joined_at is None:
            return 0.0
        since = progress - self.joined_at - config.warmup
        self.risen = max(self.risen, 0.0 if since < 0 else min(1.0, since / config.ramp) if config.ramp else 1.0)
        return self.risen * 0.5**self.halvings

    def judge_validation(self, config: AdversarialConfig, error: float, progress: float) -> str | None:
        """Take note of a validation's reconstruction error; what the guard did about it, in words, or None.

        Before the start: keeps the best error, and lets the discriminator join in at a plateau where that is asked for.
        After it: halves the adversarial weight when the error is past the limit.
        """
        if config.weight == 0 or not math.isfinite(error):
            return None
        if self.joined_at is not None:
            if not math.isfinite(self.reference_error):  # it joined before there was a validation
                self.reference_error = error
            self.pause = max(0, self.pause - 1)
            limit = self.reference_error * (1 + config.worsening_limit)
            if error <= limit or self.share(config, progress) == 0 or self.pause:
                return None
            self.halvings += 1
            self.pause = PAUSE_VALIDATIONS
            return (f"the guard halved the adversarial weight, now {config.weight * 0.5**self.halvings:g}: validation reconstruction is {error:.4f}, "
                    f"more than {config.worsening_limit:.0%} above the {self.reference_error:.4f} from before the discriminator joined "
                    "(adversarial.worsening_limit)")
        self.reference_error = min(self.reference_error, error)
        self.stalled = self.stalled + 1 if error > self.previous_error * (1 - config.plateau_gain) else 0
        self.previous_error = error
        if config.start_at_plateau and self.stalled >= PLATEAU_VALIDATIONS:
            self.joined_at = progress
            return (f"reconstruction has reached a plateau ({PLATEAU_VALIDATIONS} validations in a row gained less than {config.plateau_gain:.0%}): "
                    "the discriminator joins now")
        return None


def calendar(config: AdversarialConfig, training: TrainingConfig) -> str:
    """The resolved calendar of the discriminator, for the plan."""
    moments = [config.start, config.start + config.warmup, config.start + config.warmup + config.ramp]
    if training.max_steps:
        when = [f"step {math.ceil(moment * training.max_steps):,}" for moment in moments]
        if training.max_minutes:  # whichever comes first
            when = [f"{step} or after {duration(moment * training.max_minutes * 60)}" for step, moment in zip(when, moments, strict=True)]
    else:
        when = [duration(moment * training.max_minutes * 60) for moment in moments]
    when = [text if moment <= 1 else f"{text} (after the end)" for text, moment in zip(when, moments, strict=True)]
    at = "at the latest " if config.start_at_plateau else ""
    return f"joins {at}at {when[0]}, has a say from {when[1]}, its full weight {config.weight:g} from {when[2]}"
