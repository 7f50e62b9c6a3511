"""Schedule of adversarial training: when the discriminator joins, its current weight, and halving the weight if reconstructions get worse.

The guard depends only on the training progress and a few counters in the trainer state, so a resumed run continues exactly.
Schedule of a run with start 0.3, warmup 0.05 and ramp 0.1:

    progress   0 ............... 0.30 ........... 0.35 .......... 0.45 ......................... 1
               no discriminator  it trains, but   its weight      full weight, halved if validation
                                 has weight 0     rises from 0    reconstruction worsens past the limit
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from vqmosaic.files.json_files import from_fields
from vqmosaic.recipes.recipe_sections import TrainingConfig
from vqmosaic.recipes.tokenizer_sections import AdversarialConfig
from vqmosaic.training.budget import format_duration
from vqmosaic.training.checkpoints import version_of

PLATEAU_VALIDATIONS = 2
PAUSE_VALIDATIONS = 3


@dataclass
class AdversarialGuard:
    """Counters of the guard, saved in the trainer state."""

    joined_at: float | None = None
    """Progress at which the discriminator joined; None before that."""
    reference_error: float = math.inf
    """Best validation reconstruction error before the discriminator joined."""
    previous_error: float = math.inf
    stalled: int = 0
    """Consecutive validations that improved by less than plateau_gain."""
    risen: float = 0.0
    """Position on the ramp, in [0, 1]. Never falls, although the progress falls when the training budget is extended."""
    halvings: int = 0
    pause: int = 0
    """Number of validations to wait before the next halving, because the validated weight average reacts slowly."""

    @classmethod
    def from_checkpoint(cls, counters: dict[str, float | None], checkpoint: Path | None) -> "AdversarialGuard":
        """The guard with the counters of a checkpoint, or a new guard if it is None. Raises InputError for counters of a later version."""
        if checkpoint is None:
            return cls()
        return from_fields(cls, counters, f"{checkpoint / 'trainer_state.json'}: guard", version_of(checkpoint))

    def to_dict(self) -> dict[str, float | None]:
        """The counters, for the trainer state."""
        return dataclasses.asdict(self)

    def forget_errors(self) -> None:
        """Reset the validation errors, because later validations use other images."""
        self.reference_error = self.previous_error = math.inf
        self.stalled = 0

    def joins(self, config: AdversarialConfig, progress: float) -> bool:
        """Whether the discriminator has joined at this progress. Records the progress when it first joins."""
        if self.joined_at is None and config.weight > 0 and progress >= config.start:
            self.joined_at = progress
        return self.joined_at is not None

    def share(self, config: AdversarialConfig, progress: float) -> float:
        """Current fraction of the adversarial weight, in [0, 1]: 0 during the warm-up, then rising over the ramp, times 0.5 per halving."""
        if self.joined_at is None:
            return 0.0
        since = progress - self.joined_at - config.warmup
        self.risen = max(self.risen, 0.0 if since < 0 else min(1.0, since / config.ramp) if config.ramp else 1.0)
        return self.risen * 0.5**self.halvings

    def update_after_validation(self, config: AdversarialConfig, error: float, progress: float) -> str | None:
        """Record a validation reconstruction error. Returns a message about the action taken, or None.

        Before the discriminator joins: tracks the best error, and with start_at_plateau lets the discriminator join at a plateau.
        Afterwards: halves the adversarial weight if the error exceeds the limit.
        """
        if config.weight == 0 or not math.isfinite(error):
            return None
        if self.joined_at is not None:
            if not math.isfinite(self.reference_error):  # it joined before the first validation
                self.reference_error = error
            self.pause = max(0, self.pause - 1)
            limit = self.reference_error * (1 + config.worsening_limit)
            if error <= limit or self.share(config, progress) == 0 or self.pause:
                return None
            self.halvings += 1
            self.pause = PAUSE_VALIDATIONS
            return (f"the guard halved the adversarial weight, now {config.weight * 0.5**self.halvings:g}: the validation reconstruction error is "
                    f"{error:.4f}, more than {config.worsening_limit:.0%} above the {self.reference_error:.4f} before the discriminator joined "
                    "(adversarial.worsening_limit)")
        self.reference_error = min(self.reference_error, error)
        self.stalled = self.stalled + 1 if error > self.previous_error * (1 - config.plateau_gain) else 0
        self.previous_error = error
        if config.start_at_plateau and self.stalled >= PLATEAU_VALIDATIONS:
            self.joined_at = progress
            return (f"reconstruction has reached a plateau ({PLATEAU_VALIDATIONS} validations in a row improved by less than "
                    f"{config.plateau_gain:.0%}), so the discriminator joins now")
        return None


def describe_schedule(config: AdversarialConfig, training: TrainingConfig) -> str:
    """The resolved schedule of the discriminator, for the plan."""
    moments = [config.start, config.start + config.warmup, config.start + config.warmup + config.ramp]
    if training.max_steps:
        when = [f"step {math.ceil(moment * training.max_steps):,}" for moment in moments]
        if training.max_minutes:  # whichever comes first
            when = [f"{step} or after {format_duration(moment * training.max_minutes * 60)}" for step, moment in zip(when, moments, strict=True)]
    else:
        assert training.max_minutes is not None  # a recipe has at least one of the two budgets
        when = [format_duration(moment * training.max_minutes * 60) for moment in moments]
    when = [text if moment <= 1 else f"{text} (after the end)" for text, moment in zip(when, moments, strict=True)]
    qualifier = "at the latest " if config.start_at_plateau else ""
    return f"joins {qualifier}at {when[0]}, affects the tokenizer from {when[1]}, with full weight {config.weight:g} from {when[2]}"
