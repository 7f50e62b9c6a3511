"""The part of a checkpoint that is neither weights nor optimizer state."""

from dataclasses import dataclass, field


@dataclass
class TrainerState:
    """Everything that a resumed training needs besides the weights and the optimizer state."""

    step: int = 0
    elapsed_seconds: float = 0.0
    refused_steps: int = 0
    validated_step: int = 0
    """The step of the last validation."""
    validated_seconds: float = 0.0
    """The value of elapsed_seconds when the last validation began."""
    validation_seconds: float = 0.0
    """Seconds that all validations have taken so far."""
    validations: int = 0
    """Number of validations so far."""
    validation_images: int = 0
    """Number of images in each validation under a time budget; 0 until it is chosen, and without a time budget."""
    seconds_per_validation: float = 0.0
    """Expected seconds of one validation under a time budget, from a trial before the first step."""
    validated_on: str = ""
    """The images that best_validation was measured on, in words; empty in checkpoints of version 0.1.0."""
    best_step: int = 0
    best_validation: float = float("inf")
    guard: dict[str, float | None] = field(default_factory=dict)
    """The state of the adversarial guard in stage 1; empty in stage 2."""
    processes: int = 1
    threads: int = 1
