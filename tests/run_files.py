"""Reads and changes the files of run folders for tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.training.tracking import read_metrics


def file_contents(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
    """Relative path -> content of the files in a folder that match a pattern, by default of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()}


def pictures(folder: Path) -> dict[str, bytes]:
    """Name -> content of the PNGs directly in a folder."""
    return file_contents(folder, "*.png")


def token_files(run_dir: Path) -> dict[str, bytes]:
    """Path in the run folder -> content of the token files of a run."""
    return file_contents(run_dir, "tokens/**/*")


def records(run_dir: Path, stage: str, kind: str) -> list[dict[str, Any]]:
    """The records of one kind that the training of a stage logged, oldest first."""
    return read_metrics(RunFolder(run_dir).logs(stage) / "metrics.jsonl", kind)


def flip_byte(path: Path, offset: int = 700) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def edit_json(path: Path, **changes: object) -> None:
    """Set fields of the object in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, separators=(",", ":")))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply `change` to the named tensors in a folder's model.safetensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
