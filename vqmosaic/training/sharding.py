"""Training with weights, gradients and optimizer state sharded over the GPUs: FSDP2, enabled in an accelerate configuration (configs/accelerate).

All processes call these functions together, unless a docstring says otherwise.
"""

import os
import warnings
from collections.abc import Mapping
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, StateDictType
from torch.distributed.tensor import DTensor

from vqmosaic.errors import InputError

SHARDED_STAGES = ("prior",)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds only a part of the weights (FSDP)."""
    return accelerator.distributed_type == DistributedType.FSDP


def set_up_sharding(accelerator: Accelerator, stage: str, optimizer: str) -> None:
    """Check the FSDP settings of the accelerate configuration, if any, and set that gradients are summed in float32.

    Raises InputError if FSDP would not take effect, if checkpoints could not be read safely, and for a stage that does not support FSDP.
    """
    if not is_sharded(accelerator):
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise InputError(f"the accelerate configuration enables FSDP, which accelerate supports only on several GPUs, but this is "
                             f"{accelerator.num_processes} x {accelerator.device.type}: every process would silently hold all weights. "
                             "Use a configuration without FSDP, such as several_gpus or two_cpu_processes.")
        return
    if stage not in SHARDED_STAGES:
        raise InputError(f"the accelerate configuration enables FSDP, which stage {stage} does not support: a tokenizer fits on one GPU. Use "
                         "--processes alone, or a configuration without FSDP, such as several_gpus.")
    if optimizer != "adamw":
        raise InputError(f"{stage}_training.optimizer is {optimizer!r}, which needs complete matrices, but with FSDP each process has only a part; "
                         f"set {stage}_training.optimizer adamw, or use an accelerate configuration without FSDP, such as several_gpus.")
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise InputError(f"the accelerate configuration has fsdp_version {plugin.fsdp_version}; set it to 2.")
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise InputError(f"the accelerate configuration has fsdp_state_dict_type {plugin.state_dict_type.name}, whose checkpoints are read by "
                         "unpickling; set it to FULL_STATE_DICT.")
    if plugin.activation_checkpointing:
        raise InputError("the accelerate configuration has fsdp_activation_checkpointing, which changes the names in checkpoints; set it to "
                         f"false and {stage}_training.activation_checkpointing to true.")
    # harmless: the logits are a view, but nothing writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)  # accelerate's own policy sums in bf16


def shard_like_trained(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Shard a copy of the trained model in the same way as the trained model, in place."""
    return fsdp2_prepare_model(accelerator, model)


def gather_full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The full state of a sharded model, gathered on the CPU of the main process; empty on the others."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    reshard(model)
    return cast(dict[str, torch.Tensor], weights)  # the state of a model has only tensors


def load_full_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give every process its shards of the main process's weights. The weights that other processes pass are ignored."""
    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def reshard(model: nn.Module) -> None:
    """Free the full weights that a forward pass without a backward pass leaves behind. One process can call this alone."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, as a plain tensor that is the same on all processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value
