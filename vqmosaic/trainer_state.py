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
    best_step: int = 0
    best_validation: float = float("inf")
    validation_choice: int = 0
    """Which rule chose the images that best_validation was measured on; 0 is that of version 0.1.0 (the prior's: stage2_prior/token_batches.py)."""
    guard: dict[str, float] = field(default_factory=dict)
    """What the guard over an adversarial training has counted (stage1_tokenizer/guard.py)."""
    processes: int = 1
    threads: int = 1
