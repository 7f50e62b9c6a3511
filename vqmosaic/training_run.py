"""The mechanism that the training of both stages shares: resume, budget, refusal of non-finite steps, checkpoints, signals.

The step itself, and everything that is learnt, stands in each stage's own train.py.
"""

import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vqmosaic.budget import Budget, duration, expected_time, warmup_cosine
from vqmosaic.checkpoints import CheckpointFolder, read_state
from vqmosaic.devices import make_accelerator, set_threads
from vqmosaic.errors import InputError
from vqmosaic.interruption import Interrupted, StopFlag
from vqmosaic.recipe import Recipe, check_batch_split, recipe_fields
from vqmosaic.recipe_sections import TrainingConfig
from vqmosaic.run_folder import RunFolder
from vqmosaic.tracking import MetricsLog, Reporter, progress_bar
from vqmosaic.weight_averaging import averaged


@dataclass
class TrainerState:
    """All that a resumed training needs beside weights and optimizer."""

    step: int = 0
    elapsed_seconds: float = 0.0
    refused_steps: int = 0
    validated_step: int = 0
    best_step: int = 0
    best_validation: float = float("inf")
    processes: int = 1
    threads: int = 1


class TrainingRun:
    """One stage's training in progress. Made, then given the model by prepare(), then driven by the loop in train.py."""

    def __init__(self, recipe: Recipe, stage: str, training: TrainingConfig, stop: StopFlag):
        self.recipe, self.stage, self.training, self.stop = recipe, stage, training, stop
        self.folder = RunFolder(Path(recipe.run_dir))
        self.accelerator = make_accelerator(training, str(self.folder.logs(stage)))
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        check_batch_split(recipe, training.SECTION, self.world_size)
        self.is_main = self.accelerator.is_main_process
        self.report = Reporter(stage, self.is_main)
        self.checkpoints = CheckpointFolder(self.folder.checkpoints(stage), training.keep_checkpoints)
        self.state = TrainerState(processes=self.world_size, threads=set_threads())
        self.saved_step = -1
        self.resumed_from: Path | None = None

    # --- before step 0 -----------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module) -> nn.Module:
        """Set up optimizer, weight average and wrapping, go on from a checkpoint if there is one; returns the model to call."""
        training = self.training
        decayed = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim >= 2]
        plain = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim < 2]
        optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": training.weight_decay}, {"params": plain, "weight_decay": 0.0}],
                                      lr=training.learning_rate, betas=tuple(training.adam_betas), fused=True)
        model.to(self.accelerator.device)
        self.unwrapped = model
        self.average = averaged(model, training.weight_ema_decay) if training.weight_ema_decay else None
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.parameters = decayed + plain
        self._resume()
        self.budget = Budget(training.max_steps, training.max_minutes, self.state.elapsed_seconds)
        config = {field.name: field.value for field in recipe_fields(self.recipe)}
        self.metrics = MetricsLog(self.accelerator, self.folder.logs(self.stage), self.state.step, self.state.validated_step, config)
        self.bar = progress_bar(training.max_steps, self.state.step, self.stage, enabled=self.is_main)
        return self.model

    @property
    def validated_model(self) -> nn.Module:
        """The model that is validated and exported: the weight average, or the model itself where there is none."""
        return self.average.module if self.average is not None else self.unwrapped

    def _resume(self) -> None:
        checkpoint = self.checkpoints.choose(self.training.resume, self.report)
        if checkpoint is None:
            return
        saved = TrainerState(**read_state(checkpoint))
        if saved.processes != self.world_size:
            raise InputError(f"{checkpoint} was written by {saved.processes} processes, now there are {self.world_size}; "
                             f"go on with --processes {saved.processes}.")
        try:
            self.accelerator.load_state(str(checkpoint))  # reads with weights_only: tensors and numbers, never an object's own code
            if self.average is not None:
                self.average.load_state_dict(load_file(checkpoint / "weights_ema.safetensors"))
        except pickle.UnpicklingError as error:
            raise InputError(f"{checkpoint} holds more than tensors and numbers, which is never loaded: no training here wrote such files. "
                             f"Delete it to go on from the one before it, or start anew with --redo {self.stage}.") from error
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"{checkpoint} does not fit this recipe: {' '.join(str(error).split())[:500]}. Give {self.training.SECTION}.resume "
                             "the path of a checkpoint of this very stage and recipe.") from error
        self.state = saved
        self.state.threads = set_threads(saved.threads)
        self.saved_step, self.resumed_from = saved.step, checkpoint
        self.report(f"resumed at step {saved.step:,} from {checkpoint}")

    def print_plan(self, facts: dict[str, Any], seconds_per_step: float) -> None:
        """Print what is about to happen, before it costs anything."""
        count = sum(parameter.numel() for parameter in self.parameters)
        copies = 4 + (self.average is not None)  # weights, gradients, two moments, the average
        device = self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {self.state.threads} threads"
        self.report.table("plan", {
            **facts,
            "parameters": f"{count:,}",
            "memory of the training state": f"{count * 4 * copies / 2**20:,.0f} MiB and activations",
            "device": f"{name} x {self.world_size}", "dtype": f"{self.accelerator.mixed_precision} autocast, float32 weights",
            "budget": " or ".join(filter(None, [self.training.max_steps and f"{self.training.max_steps:,} steps",
                                                self.training.max_minutes and f"{self.training.max_minutes:g} minutes"])),
            "done already": f"{self.state.step:,} steps",
            "expected time": f"{duration(expected_time(seconds_per_step, self.budget, self.state.step))} "
                             f"at {seconds_per_step * 1000:.0f} ms a step, validations aside",
        })

    # --- every step --------------------------------------------------------------------------------------------------------

    def sync(self) -> tuple[int, float]:
        """The signal that asks for a stop (0 for none) and the progress in [0, 1], the same on all ranks."""
        facts = torch.tensor([float(self.stop.signal), self.budget.elapsed_seconds if self.is_main else 0.0], dtype=torch.float64)
        if self.world_size > 1:
            facts = self.accelerator.gather(facts[None].float().to(self.accelerator.device)).amax(0)
        self.state.elapsed_seconds = float(facts[1])
        return int(facts[0]), self.budget.progress(self.state.step, self.state.elapsed_seconds)

    def due(self, every: int, finished: bool) -> bool:
        """Whether something that happens every so many steps, and at the last one, happens now."""
        return self.state.step > 0 and (finished or self.state.step % every == 0)

    def optimizer_step(self, loss: torch.Tensor, progress: float, commit: Callable[[], None] = lambda: None) -> tuple[bool, float, float]:
        """Clip, check and apply the gradients: (accepted, gradient norm, learning rate). A non-finite step changes nothing.

        `commit` is called after an accepted step and before the average follows it, so that the average has the newest codebook.

        Raises:
            InputError: more steps were refused than max_refused_steps allows.
        """
        training = self.training
        learning_rate = training.learning_rate * warmup_cosine(progress, training.warmup_fraction, training.final_learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self.accelerator.clip_grad_norm_(self.parameters, training.gradient_clip)
        is_bad = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        accepted = float(self.accelerator.reduce(is_bad, "sum")) == 0
        scaler = self.accelerator.scaler  # of fp16: it skips a step with a non-finite gradient itself, and then lowers its scale
        if accepted or (scaler is not None and not torch.isfinite(norm)):
            self.optimizer.step()
        elif scaler is not None:
            scaler.update()
        if accepted:
            commit()
            if self.average is not None:
                self.average.update_parameters(self.unwrapped)
        self.optimizer.zero_grad(set_to_none=True)
        if not accepted:
            self.state.refused_steps += 1
            self.report(f"warning: step {self.state.step} refused: loss {float(loss):g}, gradient norm {float(norm):g} "
                        f"({self.state.refused_steps} refused so far)")
            searching = scaler is not None and scaler.get_scale() >= 1  # a scale that is too large is no fault of the training's
            if self.state.refused_steps > training.max_refused_steps and not searching:
                raise InputError(f"{self.state.refused_steps} steps had a non-finite loss or gradient, more than "
                                 f"{training.SECTION}.max_refused_steps = {training.max_refused_steps}; weights are as they were before them. "
                                 f"Lower {training.SECTION}.learning_rate, or set {training.SECTION}.mixed_precision to no.")
        return accepted, float(norm), learning_rate

    # --- saving ------------------------------------------------------------------------------------------------------------

    def save(self, save_more: Callable[[Path], None] = lambda folder: None) -> None:
        """Write a checkpoint of this step, unless there is one already. `save_more(folder)` adds files, on the main process."""
        if self.saved_step == self.state.step:
            return

        def add(folder: Path) -> None:
            if self.average is not None:  # cloned: safetensors takes neither tied nor channels_last tensors
                weights = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                           for name, tensor in self.average.state_dict().items()}
                save_file(weights, folder / "weights_ema.safetensors")
            save_more(folder)

        self.checkpoints.write(self.accelerator, dataclasses.asdict(self.state), add)
        self.saved_step = self.state.step

    def interrupted(self, signal_number: int) -> Interrupted:
        """The exception that ends a stage which a signal asked to stop, after its state was saved."""
        return Interrupted(signal_number, f"{self.stage} saved at step {self.state.step:,} in {self.checkpoints.root}")

    def finish(self) -> None:
        """Close the bar, the trackers and the process group."""
        self.bar.close()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
