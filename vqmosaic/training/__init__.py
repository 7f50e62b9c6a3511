"""The parts of training that both stages share: time budgets, checkpoints, validation schedule, optimizers, logging."""
