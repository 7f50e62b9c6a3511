"""Writes metrics.jsonl and tracker logs, and prints the progress of one training stage."""

import importlib.util
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vqmosaic.errors import InputError, check_name
from vqmosaic.files.durable_files import write_bytes
from vqmosaic.files.full_disks import explain_full_disk
from vqmosaic.training.budget import format_duration

TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")


def check_trackers(section: str, trackers: list[str]) -> None:
    """Raise InputError for a tracker that Accelerate does not support or that is not installed."""
    for tracker in trackers:
        check_name(f"{section}.trackers: an entry", tracker, TRACKERS)
        modules = ("tensorboard", "tensorboardX") if tracker == "tensorboard" else (tracker,)
        if not any(importlib.util.find_spec(module) for module in modules):
            raise InputError(f"{section}.trackers names {tracker!r}, which is not installed; pip install {tracker}, or remove it.")


class MetricsLog:
    """metrics.jsonl with one JSON object per line, written by the main process. Trackers get the same numbers."""

    def __init__(self, accelerator, folder: Path, first_step: int, validated_step: int, config: dict[str, Any]):
        self.accelerator, self.path = accelerator, folder / "metrics.jsonl"
        self.newest: dict[str, dict[str, float | int]] = {}
        """The last record written, by kind."""
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            truncate_metrics(self.path, first_step, validated_step)
        if accelerator.log_with:
            flat = {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in config.items()}
            with explain_full_disk(folder):
                accelerator.init_trackers("vqmosaic", config=flat,
                                          init_kwargs=tracker_resume_arguments(folder, first_step) if accelerator.is_main_process else {})

    def write(self, step: int, kind: str, **numbers: float | int) -> None:
        """Append one record; `kind` is train or validation."""
        rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in numbers.items()}
        self.newest[kind] = {"step": step, **rounded}
        if self.accelerator.is_main_process:
            line = json.dumps({"step": step, "kind": kind, **rounded}) + "\n"
            with explain_full_disk(self.path.parent, len(line)), open(self.path, "a") as file:
                file.write(line)
        if self.accelerator.log_with:
            with explain_full_disk(self.path.parent):  # TensorBoard's thread reports the error of an earlier call, without a file name
                self.accelerator.log({f"{kind}/{name}": value for name, value in rounded.items()}, step=step)


def tracker_resume_arguments(folder: Path, first_step: int) -> dict[str, dict[str, Any]]:
    """Arguments for trackers to continue where a resumed training does: TensorBoard hides what will be written again, wandb keeps its run."""
    identifier = folder / "tracker_run_id.txt"
    if first_step == 0 or not identifier.exists():
        write_bytes(identifier, secrets.token_hex(8).encode())
    return {"tensorboard": {"purge_step": first_step + 1} if first_step else {}, "wandb": {"id": identifier.read_text(), "resume": "allow"}}


def truncate_metrics(path: Path, step: int, validated_step: int) -> None:
    """Delete records that a resumed run will write again (after `step`, validations after `validated_step`), and lines that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= (validated_step if record["kind"] == "validation" else step):
            kept.append(line + "\n")
    write_bytes(path, "".join(kept).encode())


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in metrics.jsonl, oldest first; an empty list if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


LINE_SECONDS = 30.0
"""Seconds between progress lines if the output is not a terminal."""


def terminal_bar(total: int | None, initial: int, title: str, unit: str, enabled: bool = True) -> tqdm:
    """A bar with rate and ETA on a terminal; nothing if the output is a file or a pipe."""
    return tqdm(total=total, initial=initial, desc=title, unit=unit, disable=not (enabled and sys.stderr.isatty()), dynamic_ncols=True)


def progress_bar(total: int | None, initial: int, title: str, unit: str, enabled: bool = True) -> "tqdm | ProgressLines":
    """A bar with rate and ETA on a terminal; a line every LINE_SECONDS if the output is a file or a pipe."""
    if sys.stderr.isatty() or not enabled:
        return terminal_bar(total, initial, title, unit, enabled)
    return ProgressLines(total, initial, title, unit)


def progress_lines(total: int, title: str, unit: str, enabled: bool) -> "tqdm | ProgressLines":
    """The lines of `progress_bar` if the output is not a terminal. Nothing on a terminal, which shows the bar of the training."""
    if enabled and not sys.stderr.isatty():
        return ProgressLines(total, 0, title, unit)
    return tqdm(disable=True)


class ProgressLines:
    """Replaces a tqdm bar if the output is not a terminal: prints a line every LINE_SECONDS."""

    def __init__(self, total: int | None, initial: int, title: str, unit: str):
        self.total, self._initial, self._title, self._unit = total, initial, title, unit
        self.n: float = initial
        """The units that are done. Callers may set it, with decimals, and call update(0)."""
        self._started = self._last_line = time.monotonic()

    def update(self, count: int = 1) -> None:
        """Add `count` units and print a line if one is due."""
        self.n += count
        now = time.monotonic()
        if now - self._last_line < LINE_SECONDS:
            return
        self._last_line = now
        of_total, left = "", ""
        if self.total:
            of_total = f" of {self.total:,}"
            seconds = (now - self._started) * (self.total - self.n) / (self.n - self._initial or 1)
            left = f" ({self.n / self.total:.0%}), about {format_duration(max(0.0, seconds))} left"
        print(f"{self._title}: {self.n:,}{of_total} {self._unit}s{left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing. The method exists because a tqdm bar has it."""

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Reporter:
    """Prints lines of a stage with the seconds since it started. Only the main process prints, unless `all_processes` is set."""

    def __init__(self, stage: str, is_main_process: bool = True):
        self.stage, self.enabled, self.started = stage, is_main_process, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the stage started."""
        return time.monotonic() - self.started

    def __call__(self, text: str, all_processes: bool = False) -> None:
        if self.enabled or all_processes:
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            text = text.encode(encoding, "backslashreplace").decode(encoding)  # a name may contain characters that the encoding lacks
            tqdm.write(f"[{self.stage} {self.seconds:6.1f} s] {text}", file=sys.stdout)
            sys.stdout.flush()

    def table(self, title: str, rows: dict[str, Any]) -> None:
        """Print a title and one line for each named value."""
        width = max(map(len, rows))
        lines = "".join(f"{os.linesep}    {name:<{width}}  {value}" for name, value in rows.items())
        self(f"{title}{lines}")
