"""Prints the plan of a training before its first step."""

from typing import Any

import torch

from vqmosaic.errors import listed_names
from vqmosaic.recipes.fields_from_data import DataSize, describe_choices
from vqmosaic.recipes.recipe_sections import TrainingConfig
from vqmosaic.training.budget import describe_epochs, few_steps_warning, format_duration, remaining_seconds
from vqmosaic.training.muon import Muon
from vqmosaic.training.training_run import FIRST_LINE_SECONDS, TrainingRun
from vqmosaic.wording import counted


def print_plan(run: TrainingRun, facts: dict[str, Any], seconds_per_step: float, data: DataSize) -> None:
    """Print the plan: the stage's own `facts`, the size of the model, the budget and the expected time. `data` is what the stage trains on.

    All processes call this together. Before the plan is printed, all are ready for signals and have read the stage record, so the main process can
    rewrite it afterwards.
    """
    run.accelerator.wait_for_everyone()
    count = sum(parameter.numel() for parameter in run.parameters)
    copies = 4 + (run.average is not None)  # weights, gradients, two moments, the average
    parts = run.world_size if run.is_sharded else 1
    device, seconds = run.accelerator.device, remaining_seconds(seconds_per_step, run.budget, run.state.step)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {counted(run.state.threads, 'thread')}"
    steps = round(seconds / seconds_per_step)
    run.report.table("plan", {
        **facts,
        "epochs": describe_epochs(run.training, run.state.step + steps, data.images),
        "parameters": f"{count:,}",
        "optimizer": "Muon for the inner matrices, AdamW for the rest" if isinstance(run.optimizers[0].optimizer, Muon) else "AdamW",
        "learning rate": describe_learning_rate(run.training),
        "memory of the training state": f"about {count * 4 * copies / parts / 2**20:,.0f} MiB, plus activations"
                                        + (f", on each of {parts} processes (FSDP)" if run.is_sharded else ""),
        "device": f"{device_name} x {run.world_size}", "dtype": f"{run.accelerator.mixed_precision} autocast, float32 weights",
        "budget": " or ".join(filter(None, [counted(run.training.max_steps, "step") if run.training.max_steps else None,
                                            format_duration(run.training.max_minutes * 60) if run.training.max_minutes else None])),
        "validation": run.validations.describe(),
        "done already": counted(run.state.step, "step"),
        "start-up": f"{format_duration(run.report.seconds)}; the budget starts with the first step",
        "expected time": f"about {format_duration(seconds)}, {counted(steps, 'step')}, from a trial step of "
                         f"{seconds_per_step * 1000:.0f} ms; updated after {FIRST_LINE_SECONDS:.0f} s of training",
    })
    if chosen := describe_choices(run.recipe, run.stage, data, device.type != "cpu"):
        run.report.table("chosen for this data and this device", chosen)
    if warning := few_steps_warning(run.training, run.state.step + steps, seconds_per_step):
        run.report(warning)


def describe_classes(names: list[str] | None) -> str:
    """The first class names as text."""
    return listed_names(names) if names else "none"


def describe_learning_rate(training: TrainingConfig) -> str:
    """The peak learning rate as text, with its scaling rule if it depends on the batch size."""
    if training.learning_rate_batch is None:
        return f"{training.learning_rate:g}"
    return (f"{training.learning_rate:g} x sqrt({training.batch_size} / {training.learning_rate_batch}) = "
            f"{training.learning_rate * training.learning_rate_factor:.4g}")
