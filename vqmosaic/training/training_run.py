"""What the trainings of both stages share: their state, resuming, the budget, signals, refusing non-finite steps, checkpoints.

The step itself is in the train.py of each stage, and the loop around it is in training_loop.py.
"""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vqmosaic.errors import InputError
from vqmosaic.files.full_disks import explain_full_disk
from vqmosaic.recipes.recipe import Recipe, check_batch_split, recipe_fields
from vqmosaic.recipes.recipe_sections import PriorTrainingConfig
from vqmosaic.recipes.tokenizer_sections import TokenizerTrainingConfig
from vqmosaic.runs.accelerator import keep_process_group, make_accelerator, set_threads
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.training.best_weights import BestWeights
from vqmosaic.training.budget import Budget, Pace, format_duration, remaining_seconds
from vqmosaic.training.checkpoints import CheckpointFolder, restore_state
from vqmosaic.training.learning_rate import learning_rate_share
from vqmosaic.training.muon import Muon
from vqmosaic.training.sharding import (
    full_tensor,
    gather_full_weights,
    is_sharded,
    load_full_weights,
    reshard,
    set_up_sharding,
    shard_like_trained,
)
from vqmosaic.training.tracking import LINE_SECONDS, MetricsLog, Reporter, terminal_bar
from vqmosaic.training.trainer_state import TrainerState
from vqmosaic.training.validation_schedule import ValidationSchedule
from vqmosaic.training.weight_averaging import make_average
from vqmosaic.wording import counted, is_or_are

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FIRST_LINE_SECONDS = 10.0
"""Seconds of training after which the first estimate of the remaining time from real steps is printed."""


class TrainingRun:
    """The training of one stage. Create it, pass the model to prepare(), then call the other methods from the loop in train.py."""

    def __init__(self, recipe: Recipe, stage: str, training: TokenizerTrainingConfig | PriorTrainingConfig, stop: StopFlag):
        self.recipe, self.stage, self.training, self.stop = recipe, stage, training, stop
        self.folder = RunFolder(Path(recipe.run_dir))
        self.accelerator = make_accelerator(training, str(self.folder.logs(stage)))
        set_up_sharding(self.accelerator, stage, training.optimizer)
        self.is_sharded = is_sharded(self.accelerator)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        check_batch_split(recipe, training.SECTION, self.world_size)
        self.is_main = self.accelerator.is_main_process
        self.report = Reporter(stage, self.is_main)
        self.checkpoints = CheckpointFolder(self.folder.checkpoints(stage), training.keep_checkpoints)
        self.state = TrainerState(processes=self.world_size, threads=set_threads())
        self.saved_step = -1
        self.resumed_from: Path | None = None

    # --- before step 0 -----------------------------------------------------------------------------------------------------

    def wait_before_training(self, call: Callable[[], Any]) -> Any:
        """The result of `call`. A signal raises Interrupted immediately, because there is nothing to save yet."""
        return self.stop.wait_or_raise(call, f"{self.stage} was still starting, so no step was lost")

    def prepare(self, model: nn.Module, second: nn.Module | None = None, second_learning_rate: float | None = None) -> nn.Module:
        """Set up optimizers, weight average and wrapping, and resume from a checkpoint if there is one. Returns the wrapped model to call.

        `second` is another model with its own optimizer. It is saved in checkpoints, but never averaged or exported.
        """
        self._full_copy = copy.deepcopy(model) if self.is_sharded and self.is_main else None
        model.to(self.accelerator.device)
        self.unwrapped = model
        self.average = make_average(model, self.training.weight_ema_decay) if self.training.weight_ema_decay else None
        models = [model] if second is None else [model, second.to(self.accelerator.device)]
        peaks = [self.training.learning_rate, second_learning_rate or self.training.learning_rate][:len(models)]
        self.peak_learning_rates = [peak * self.training.learning_rate_factor for peak in peaks]
        prepared = self.accelerator.prepare(*models, *map(self._optimizer, models))
        self.model, self.second_model = prepared[0], prepared[1] if second is not None else None
        self.optimizers = list(prepared[len(models):])
        if self.is_sharded and self.average is not None:
            shard_like_trained(self.accelerator, self.average.module)
        self._resume()
        self.best_weights = BestWeights(self.checkpoints.root, self.state, self.is_main)
        self.best_weights.restore(self.resumed_from)
        training = self.training
        self.budget = Budget(training.max_steps, training.max_minutes, self.state.elapsed_seconds)
        config = {field.name: field.value for field in recipe_fields(self.recipe)}
        self.metrics = MetricsLog(self.accelerator, self.folder.logs(self.stage), self.state.step, self.state.validated_step, config)
        self.bar = terminal_bar(training.max_steps, self.state.step, self.stage, "step", enabled=self.is_main)
        self.pace, self._next_line = Pace(), FIRST_LINE_SECONDS
        self.validations = ValidationSchedule(training, self.state, self.budget, self.accelerator, self.micro_batch)
        return self.model

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer for the trainable parameters. Weight decay only applies to matrices that are not codes. A second model gets AdamW."""
        training = self.training
        codes = {id(parameter) for parameter in codebook_parameters(model)}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        decayed = [parameter for parameter in trained if parameter.ndim >= 2 and id(parameter) not in codes]
        inner = inner_matrices(model, decayed) if training.optimizer == "muon" and model is self.unwrapped else []
        inner_ids = {id(parameter) for parameter in inner}
        groups = [{"params": [parameter for parameter in decayed if id(parameter) not in inner_ids], "weight_decay": training.weight_decay},
                  {"params": [parameter for parameter in trained if parameter.ndim < 2 or id(parameter) in codes], "weight_decay": 0.0}]
        betas = training.adam_betas[0], training.adam_betas[1]
        if not inner:
            return torch.optim.AdamW(groups, lr=training.learning_rate, betas=betas, fused=True)
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        return Muon(inner, groups, lr=training.learning_rate, stacks=matrix_stacks(model), betas=betas, weight_decay=training.weight_decay,
                    dtype=dtype)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the first model's optimizer updates."""
        return parameters_of(self.optimizers[0])

    @property
    def validated_model(self) -> nn.Module:
        """The model that is validated and exported: the weight average, or the model itself if there is no average."""
        return self.average.module if self.average is not None else self.unwrapped

    def full_model(self) -> nn.Module | None:
        """The validated model with all of its weights, to save and to sample from. All processes must call this.

        With sharded weights (FSDP), it is None on all but the main process, where it is a copy that is valid until the next call.
        """
        if not self.is_sharded:
            return self.validated_model
        weights = gather_full_weights(self.validated_model)
        if self._full_copy is not None:
            self._full_copy.load_state_dict(weights)
            self._full_copy.to(self.accelerator.device).eval()
        return self._full_copy

    def end_sharding(self) -> None:
        """Make `validated_model` the full model on the main process, for the export. Training cannot continue after this."""
        if self.is_sharded:
            full, self.average = self.full_model(), None
            if full is not None:
                self.unwrapped = full

    def _resume(self) -> None:
        checkpoint = self.checkpoints.choose(self.training.resume, self.report)
        if checkpoint is None:
            return
        saved = restore_state(checkpoint, TrainerState)
        if saved.processes != self.world_size:
            raise InputError(f"{checkpoint} was written by {counted(saved.processes, 'process')}, now there {is_or_are(self.world_size)} "
                             f"{self.world_size}. Continue with --processes {saved.processes}.")
        try:
            self.accelerator.load_state(str(checkpoint))  # uses weights_only: loads tensors and numbers, never runs code
            if self.average is not None and self.is_sharded:
                load_full_weights(self.average, load_file(checkpoint / "weights_ema.safetensors") if self.is_main else {})
            elif self.average is not None:
                self.average.load_state_dict(load_file(checkpoint / "weights_ema.safetensors"))
        except pickle.UnpicklingError as error:
            raise InputError(f"{checkpoint} contains more than tensors and numbers. Such files are never loaded, and vqmosaic does not write them. "
                             f"Delete it to resume from the one before it, or start over with --redo {self.stage}.") from error
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"{checkpoint} does not fit this recipe: {' '.join(str(error).split())[:500]}. Set {self.training.SECTION}.resume "
                             f"to a checkpoint of this stage and recipe. Otherwise, or if an earlier version of vqmosaic wrote it, "
                             f"start over with --redo {self.stage}.") from error
        if saved.step == 0:  # version 0.1.0 counted the start-up, which may have used up the whole budget
            saved.elapsed_seconds = 0.0
        self.state = saved
        self.state.threads = set_threads(saved.threads)
        self.saved_step, self.resumed_from = saved.step, checkpoint
        self.report(f"resumed at step {saved.step:,} from {checkpoint}")

    @property
    def micro_batch(self) -> int:
        """Images that one process trains on at a time. Validation and k-means use the same number, so that they need no more memory."""
        return self.training.batch_size // self.world_size // self.training.accumulation_steps

    # --- every step --------------------------------------------------------------------------------------------------------

    def sync(self) -> tuple[int, float]:
        """The signal that asks for a stop (0 for none) and the progress in [0, 1], the same on all ranks.

        The first call starts the budget's clock.
        """
        clocks = [self.budget.elapsed_seconds, self.state.validation_seconds] if self.is_main else [0.0, 0.0]
        self.budget.start()
        self.pace.start()
        values = torch.tensor([float(self.stop.signal), *clocks], dtype=torch.float64)
        if self.world_size > 1:
            values = self.accelerator.gather(values[None].float().to(self.accelerator.device)).amax(0)
        signal_number, self.state.elapsed_seconds, self.state.validation_seconds = int(values[0]), float(values[1]), float(values[2])
        return signal_number, self.budget.progress(self.state.step, self.state.elapsed_seconds)

    def due(self, every: int, finished: bool) -> bool:
        """Whether an action is due that happens every `every` steps and at the last step."""
        return self.state.step > 0 and (finished or self.state.step % every == 0)

    def end_step(self) -> None:
        """Count a step, refused or not, and report progress: by a bar on a terminal, by a line every LINE_SECONDS elsewhere."""
        self.state.step += 1
        self.bar.update()
        self.pace.step()
        if not self.is_main or self.budget.session_seconds < self._next_line:
            return
        self._next_line = self.budget.session_seconds + LINE_SECONDS
        pace = self.pace.seconds_per_step
        left = f"{pace * 1000:.0f} ms per step overall, about {format_duration(remaining_seconds(pace, self.budget, self.state.step))} left"
        if not self.bar.disable:
            self.bar.set_postfix_str(left)
            return
        of_steps = f" of {self.training.max_steps:,}" if self.training.max_steps else ""
        newest = list(self.metrics.newest.get("train", {}).items())[:2]  # the step and the first loss, if a step was accepted
        has_loss = bool(newest) and newest[1][0] != "gradient_norm"
        loss = f", training {newest[1][0]} {newest[1][1]:.4g} at step {newest[0][1]:,}" if has_loss else ""
        self.report(f"step {self.state.step:,}{of_steps}{loss}, {left}")

    def optimizer_step(self, loss: torch.Tensor, progress: float, commit: Callable[[], None] = lambda: None,
                       update_second: bool = False) -> tuple[bool, float, float]:
        """Clip, check and apply the gradients. Returns (accepted, gradient norm, learning rate).

        A step with a non-finite loss or gradient is refused: it does not change the weights.

        `commit` is called after an accepted step and before the average is updated, so that the average has the newest codebook.
        With `update_second`, both models are updated, or neither is.

        Raises:
            InputError: more steps were refused than max_refused_steps allows.
        """
        training, updated_optimizers = self.training, self.optimizers[:1 + update_second]
        share = learning_rate_share(progress, training.warmup_fraction, training.final_learning_rate, training.learning_rate_schedule)
        for optimizer, peak in zip(updated_optimizers, self.peak_learning_rates[:len(updated_optimizers)], strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
        norms = [self._clip(optimizer) for optimizer in updated_optimizers]
        is_finite = torch.isfinite(torch.stack([*norms, loss])).all()
        accepted = float(self.accelerator.reduce((~is_finite).float(), "sum")) == 0
        scaler = self.accelerator.scaler  # for fp16: skips a step with a non-finite gradient itself, and then lowers its scale
        if accepted or (scaler is not None and not torch.isfinite(norms[0])):
            for optimizer in updated_optimizers:
                optimizer.step()
        elif scaler is not None:
            scaler.update()
        if accepted:
            commit()
            if self.average is not None:
                self.average.update_parameters(self.unwrapped)
                for averaged, trained in zip(codebook_parameters(self.average.module), codebook_parameters(self.unwrapped), strict=True):
                    averaged.copy_(trained.detach())
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if not accepted:
            self._count_refused(loss, norms, scaler)
        return accepted, float(norms[0]), self.peak_learning_rates[0] * share

    def _clip(self, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Clip the norm of the gradients to gradient_clip. Returns the norm before clipping, as a plain tensor."""
        limit = self.training.gradient_clip
        if self.is_sharded:  # accelerate compares the list with the model's parameters, so it must have the same objects in the same order
            return full_tensor(self.accelerator.clip_grad_norm_(list(self.model.parameters()), limit))
        self.accelerator.unscale_gradients()
        parameters = parameters_of(optimizer)
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if not norm <= limit:  # torch's clip_grad_norm_ would multiply by 1, which takes as long
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def _count_refused(self, loss: torch.Tensor, norms: list[torch.Tensor], scaler: torch.amp.GradScaler | None) -> None:
        section, limit = self.training.SECTION, self.training.max_refused_steps
        self.state.refused_steps += 1
        self.report(f"warning: step {self.state.step} refused: loss {float(loss):g}, gradient norm {', '.join(f'{float(norm):g}' for norm in norms)} "
                    f"({self.state.refused_steps} refused so far)")
        is_lowering_scale = scaler is not None and scaler.get_scale() >= 1  # the loss scale may be too large, not the loss
        if self.state.refused_steps > limit and not is_lowering_scale:
            raise InputError(f"{counted(self.state.refused_steps, 'step')} had a non-finite loss or gradient, more than "
                             f"{section}.max_refused_steps = {limit}. They did not change the weights. Lower "
                             f"{section}.learning_rate, or set {section}.mixed_precision to no.")

    # --- saving ------------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one already."""
        if self.saved_step == self.state.step:
            return
        reshard(self.unwrapped)
        averages = None
        if self.average is not None:
            averages = gather_full_weights(self.average) if self.is_sharded else self.average.state_dict()

        def save_extra(folder: Path) -> None:
            if averages is not None:  # cloned because safetensors accepts neither tied nor channels_last tensors
                weights = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in averages.items()}
                save_file(weights, folder / "weights_ema.safetensors")
            self.best_weights.link_in(folder)

        self.checkpoints.write(self.accelerator, dataclasses.asdict(self.state), save_extra)
        self.saved_step = self.state.step

    def finish(self) -> None:
        """Close the bar and wait for all processes."""
        self.bar.close()
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Close the trackers and leave the process group, even if training failed."""
        keep_process_group()  # end_training destroys the group
        with explain_full_disk(self.folder.logs(self.stage)):
            self.accelerator.end_training()


def codebook_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that the model declares to be codes. They are neither decayed nor averaged."""
    return getattr(model, "codebook_parameters", list)()


def inner_matrices(model: nn.Module, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that Muon updates: weights of linear layers, convolution kernels, and stacks of matrices.

    Embeddings and output matrices are left out. So are all other parameters: position tables, class tokens and biases can have two or three
    dimensions too, but they are not factors of a matrix product.
    """
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)] + getattr(model, "output_matrices", list)()
    outer = {id(parameter) for parameter in tables}
    weights = [(module, module.weight) for module in model.modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]
    inner = {id(weight) for module, weight in weights if weight.ndim == 2 or isinstance(module, CONVOLUTIONS)}
    inner |= {id(parameter) for parameter in matrix_stacks(model)}
    return [parameter for parameter in parameters if id(parameter) in inner - outer]


def matrix_stacks(model: nn.Module) -> list[nn.Parameter]:
    """Parameters (E, R, C) that the model declares to be stacks of E matrices."""
    return getattr(model, "matrix_stacks", list)()


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters that an optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
