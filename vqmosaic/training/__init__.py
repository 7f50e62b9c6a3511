"""Training: what both stages share. Time budgets, checkpoints, validation schedule, optimizers, logging."""
