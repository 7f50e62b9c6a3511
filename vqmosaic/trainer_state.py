"""The numbers that a checkpoint holds beside weights and optimizer."""

from dataclasses import dataclass, field


@dataclass
class TrainerState:
    """All that a resumed training needs beside weights and optimizer."""

    step: int = 0
    elapsed_seconds: float = 0.0
    refused_steps: int = 0
    validated_step: int = 0
    validated_seconds: float = 0.0
    """What elapsed_seconds was when the last validation began."""
    validation_seconds: float = 0.0
    """Seconds that all validations have taken so far."""
    validations: int = 0
    """How many those were."""
    validation_images: int = 0
    """How many images each validation looks at under a time budget; 0 before that is known, and without one."""
    seconds_per_validation: float = 0.0
    """What a trial before the first step took, under a time budget."""
    validated_on: str = ""
    """Which images best_validation was measured on; version 0.1.0 did not record it."""
    best_step: int = 0
    best_validation: float = float("inf")
    guard: dict[str, float] = field(default_factory=dict)
    """What the guard over an adversarial training has counted (stage1_tokenizer/guard.py)."""
    processes: int = 1
    threads: int = 1
