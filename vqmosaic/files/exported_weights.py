"""Collects the weights of a model under their exported names. Refuses weights that could not be loaded again, before anything is written."""

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from vqmosaic.errors import InputError
from vqmosaic.files.weights_fit import describe_mismatches, list_problems


def inner_attribute(module: nn.Module) -> str | None:
    """The attribute where a torch wrapper (torch.compile, data parallelism, weight average) stores the inner module; None for other modules."""
    if "_orig_mod" in module._modules:  # torch.compile; importing its class would load the compiler
        return "_orig_mod"
    return "module" if isinstance(module, DistributedDataParallel | DataParallel | AveragedModel) else None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch's wrappers."""
    while (name := inner_attribute(module)) is not None:
        module = module.get_submodule(name)
    return module


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model with the names that it has without torch's wrappers around the model or its modules.

    State that belongs to a wrapper is left out.
    """
    wrappers = {path: name for path, module in model.named_modules(remove_duplicate=False) if (name := inner_attribute(module)) is not None}
    plain = {}
    for name, tensor in model.state_dict().items():
        parts, kept = name.split("."), []
        for depth, part in enumerate(parts):
            inner = wrappers.get(".".join(parts[:depth]))
            if inner is None:
                kept.append(part)
            elif part != inner:
                break
        else:
            plain[".".join(kept)] = tensor
    return plain


def same_weights(model: nn.Module, reference: nn.Module) -> bool:
    """Whether a model has the same weights as a reference. Wrappers, devices and dtypes may differ."""
    found, expected = plain_state(model), plain_state(reference)
    if describe_mismatches(found, expected):
        return False
    return all(torch.equal(tensor.cpu(), expected[name].to("cpu", tensor.dtype)) for name, tensor in found.items())


def exportable_weights(model: nn.Module, fresh: nn.Module, what: str) -> dict[str, torch.Tensor]:
    """The tensors of a model, named as without wrappers. They share memory with the model.

    Args:
        fresh: a model of the same configuration on the meta device, like the one that loading will create.
        what: the name of the model in the error message.

    Raises:
        InputError: a name, a shape, a type of number or a weight tie differs from the configuration, or a tensor has no values.
    """
    found, expected = plain_state(model), fresh.state_dict(keep_vars=True)
    problems = describe_mismatches(found, expected)
    if not problems:
        problems = list_problems([f"{name} {problem}" for name, tensor in found.items() if (problem := _tensor_problem(tensor, expected[name]))])
    if not problems:
        problems = list_problems(_broken_ties(found, expected))
    if problems:
        raise InputError(f"{what} cannot be saved: its weights do not match its configuration, so the file could not be loaded again: "
                         f"{problems}. Undo the changes first: merge adapters (peft: merge_and_unload), remove parametrizations, or load "
                         "without quantization or offloading.")
    return found


def _tensor_problem(tensor: torch.Tensor, expected: torch.Tensor) -> str | None:
    """The reason why a tensor cannot be exported, as a clause that follows its name; None if it can."""
    if type(tensor) is not torch.Tensor:
        return f"is a {type(tensor).__name__}, not a plain tensor"
    if tensor.is_meta:
        return "has no values (it is on the meta device)"
    if tensor.is_floating_point() != expected.is_floating_point() or tensor.is_complex() != expected.is_complex():
        return f"has dtype {str(tensor.dtype).removeprefix('torch.')}, not {str(expected.dtype).removeprefix('torch.')}"
    return None


def _broken_ties(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Messages for weights that the configuration ties but that differ in this model. An export would keep only one of them."""
    first: dict[int, str] = {}
    problems = []
    for name, tensor in expected.items():
        other = first.setdefault(id(tensor), name)
        if other != name and not torch.equal(found[other], found[name]):
            problems.append(f"{name} differs from {other}, which the configuration ties it to")
    return problems
