"""Measures the overhead of preprocessing over decoding and encoding, on CIFAR-10 with the network of recipe cifar10 and random weights.

    python -m benchmarks.preprocess_cost               # two CPU threads, about five minutes
    python -m benchmarks.preprocess_cost --record      # also write to RESULTS.md

Contestants alternate in one process. "alone" is the minimum work: it decodes stored bytes in memory to pixels as vqmosaic does, in both views, runs
encoder and quantizer in batches of the recipe's shape, and discards the ids. One variant decodes in a thread ahead of the encoder, the other decodes
between batches. The faster one counts. "preprocess" is the stage itself: opening the data set, comparing fingerprints, reading rows, decoding,
encoding, tars, sidecars, digests, flushing to disk, manifests and records.
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch

from benchmarks import cifar10
from benchmarks.measuring import ratio, record, time_alternately, use_two_cpu_threads
from pipelines.stages.preprocess import preprocess
from stage1_tokenizer.image_files.images import ImageTransform, read_image, to_tensor
from stage1_tokenizer.image_files.views import CENTER_VIEW, View, training_views
from stage1_tokenizer.tokenizer import ImageTokenizer
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.runs.accelerator import set_threads

IMAGES = {"train": 8000, "test": 1000}
ROUNDS, MAX_RATIO = 7, 1.10


def write_subset(folder: Path) -> dict[str, list[bytes]]:
    """Write the first rows of each split to `folder` as parquet files, and return their stored image bytes."""
    import pyarrow.parquet as pq

    stored = {}
    for split, count in IMAGES.items():
        path = next(path for path in sorted(cifar10.folder().rglob("*.parquet")) if split in path.name)
        rows = pq.read_table(path).slice(0, count)
        pq.write_table(rows, folder / f"{split}-00000-of-00001.parquet")
        stored[split] = [row["bytes"] for row in rows["img"].to_pylist()]
    return stored


def batches(stored: list[bytes], views: list[View], transform: ImageTransform, rows: int) -> Iterator[Callable[[], torch.Tensor]]:
    """Yield a function for each batch that decodes it to images (B, C, H, W) of all views: `rows` images in all batches but the last."""
    images = max(1, rows // len(views))
    for start in range(0, len(stored), images):
        yield lambda part=stored[start:start + images]: to_tensor(
            np.concatenate([transform.resize_views(read_image(file), views) for file in part]))


def alone(stored: dict[str, list[bytes]], recipe: Recipe, tokenizer: ImageTokenizer, ahead: bool) -> None:
    """Decode and encode all images. With `ahead`, a thread decodes the next batch meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        for split, split_views in (("train", training_views(recipe.tokens)), ("test", [CENTER_VIEW])):
            upcoming = None
            for decode in batches(stored[split], split_views, tokenizer.transform, recipe.tokens.batch_size):
                if not ahead:
                    tokenizer.encode(decode())
                    continue
                current, upcoming = upcoming, pool.submit(decode)
                if current is not None:
                    tokenizer.encode(current.result())
            if upcoming is not None:
                tokenizer.encode(upcoming.result())


def record_cpu_seconds(run: Callable[[], None], seconds: list[float]) -> None:
    """Call `run` and append the CPU seconds of all threads. Unlike wall-clock time, they do not include other programs."""
    started = time.process_time()
    run()
    seconds.append(time.process_time() - started)


def main() -> int:
    """Print the table. Returns exit code 1 if the target is missed."""
    use_two_cpu_threads()
    with tempfile.TemporaryDirectory() as folder:
        data, run_dir = Path(folder) / "data", Path(folder) / "run"
        data.mkdir()
        stored = write_subset(data)
        recipe = load_recipe("cifar10", [f"--run_dir={run_dir}", f"--data.path={data}", f"--tokens.tokenizer={folder}/tokenizer"])
        set_threads(recipe.tokens.threads)
        tokenizer = ImageTokenizer(recipe.tokenizer, ImageTransform.from_recipe(recipe.data))
        tokenizer.save_pretrained(f"{folder}/tokenizer")
        tokenizer.requires_grad_(False).eval()

        def stage() -> None:
            shutil.rmtree(run_dir, ignore_errors=True)
            with redirect_stdout(StringIO()):
                preprocess(recipe)

        cpu_seconds: dict[str, list[float]] = {}
        seconds = time_alternately({name: lambda name=name, run=run: record_cpu_seconds(run, cpu_seconds.setdefault(name, [])) for name, run in {
            "alone, decoding in between": lambda: alone(stored, recipe, tokenizer, False),
            "alone, decoding ahead": lambda: alone(stored, recipe, tokenizer, True), "preprocess": stage}.items()}, ROUNDS)
    cpu_seconds = {name: times[-ROUNDS:] for name, times in cpu_seconds.items()}  # without the warm-up
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    faster = min((name for name in medians if name != "preprocess"), key=medians.get)
    cost = ratio(seconds, "preprocess", faster)
    count = sum(IMAGES.values())
    views = len(training_views(recipe.tokens))
    lines = [f"{IMAGES['train']:,} images in {views} views and {IMAGES['test']:,} in one; medians of {ROUNDS} rounds.", "",
             "| | s | images/s | times the faster one alone | processor s | times its |", "|---|---|---|---|---|---|"]
    lines += [f"| {name} | {median:.2f} | {count / median:.0f} | {ratio(seconds, name, faster):.3f} | {statistics.median(cpu_seconds[name]):.2f} | "
              f"{ratio(cpu_seconds, name, faster):.3f} |" for name, median in medians.items()]
    kept = cost <= MAX_RATIO
    lines += ["", f"- {'kept' if kept else 'NOT kept'}: at most {MAX_RATIO:.2f} times decoding and encoding alone: {cost:.3f}"]
    record("Preprocessing over decoding and encoding alone", lines, ("datasets", "pillow"))
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
