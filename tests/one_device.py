"""Detects tensors on the wrong device on machines without a GPU.

    with one_device(torch.device("meta")):
        model.to("meta")(images.to("meta"))

Tensors on the device `meta` have shapes, dtypes and gradients, but no data. torch's meta kernels accept many combinations of devices that CUDA
kernels refuse, so a dispatch mode checks the tensors of each operator, also in the backward pass. It also refuses the few combinations that CUDA
accepts, such as indices on the CPU: they wait for a copy and are nearly always a mistake. On other devices, torch checks this itself.

FakeTensorMode with the device `cuda` would also take the branches for CUDA, but it needs a torch built for CUDA: in a CPU build, modules cannot be
moved to `cuda` and the backward pass crashes the process.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = {"copy_", "copy", "_to_copy"}
"""Operators that move data from one device to another."""


class WrongDevice(RuntimeError):
    """An operator got tensors on several devices."""


class OneDevice(TorchDispatchMode):
    """Raises WrongDevice if an operator other than a copy gets tensors on several devices.

    As in torch, element-wise operators accept scalars (tensors without dimensions) on the CPU.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if torch.Tag.pointwise in func.tags:
            tensors = [tensor for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"]
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1 and func.overloadpacket.__name__ not in COPIES:
            raise WrongDevice(f"{func} got tensors on {' and '.join(sorted(map(str, devices)))}")
        if func is torch.ops.aten.bincount.default and tensors[0].is_meta:
            # a meta tensor has no ids, so the size is minlength, the last argument: ids are assumed to be below it
            return torch.empty((*args, *(kwargs or {}).values())[-1], dtype=torch.int64, device="meta")
        return func(*args, **(kwargs or {}))


@contextmanager
def one_device(device: torch.device) -> Iterator[None]:
    """With the device `meta`, raise WrongDevice if an operator gets tensors on several devices. With other devices, do nothing.

    On `meta`, autocast does nothing, because torch does not support it there, and transformers does not check for packed sequences, because that
    needs data.
    """
    if device.type != "meta":
        yield
        return
    autocast, is_autocast_enabled = torch.autocast, torch.is_autocast_enabled

    def autocast_except_on_meta(device_type, *args, **kwargs):
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    def is_enabled_except_on_meta(*device_type):
        return device_type != ("meta",) and is_autocast_enabled(*device_type)

    with (patch("torch.autocast", autocast_except_on_meta), patch("torch.is_autocast_enabled", is_enabled_except_on_meta),
          patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None), OneDevice()):
        yield
