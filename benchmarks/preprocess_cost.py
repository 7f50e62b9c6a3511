"""What preprocessing costs beyond decoding the images and encoding them, on CIFAR-10 with the network of recipe cifar10 at random weights.

    python -m benchmarks.preprocess_cost               # two CPU threads, about five minutes
    python -m benchmarks.preprocess_cost --record      # and into RESULTS.md

Contestants take turns in one process. "alone" is the least that has to be done: stored bytes, already in memory, to pixels by the project's own
rules, both views, encoder and quantizer in batches of the recipe's shape, the ids thrown away. It runs once decoding in a thread ahead of the
encoder and once decoding in between, and the faster of the two counts. "preprocess" is the stage itself: opening the data set, comparing
fingerprints, reading rows, decoding, encoding, tars, sidecars, digests, flushing to disk, manifests and records.
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
from benchmarks.measuring import in_turn, ratio, record, use_two_cpu_threads
from pipelines.stages.preprocess import preprocess
from stage1_tokenizer.image_files.images import IDENTITY, ImageTransform, View, read_image, to_tensor, training_views
from stage1_tokenizer.tokenizer import ImageTokenizer
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.runs.accelerator import set_threads

IMAGES = {"train": 8000, "test": 1000}
ROUNDS, ALLOWED = 7, 1.10


def write_subset(folder: Path) -> dict[str, list[bytes]]:
    """The stored bytes of the first images of each split; the same rows lie in `folder` as parquet, schema and all."""
    import pyarrow.parquet as pq

    stored = {}
    for split, count in IMAGES.items():
        path = next(path for path in sorted(cifar10.folder().rglob("*.parquet")) if split in path.name)
        rows = pq.read_table(path).slice(0, count)
        pq.write_table(rows, folder / f"{split}-00000-of-00001.parquet")
        stored[split] = [row["bytes"] for row in rows["img"].to_pylist()]
    return stored


def batches(stored: list[bytes], views: list[View], transform: ImageTransform, rows: int) -> Iterator[Callable[[], torch.Tensor]]:
    """For each batch the call that decodes it: images_BCHW of all views, `rows` of them in all but the last batch."""
    images = max(1, rows // len(views))
    for start in range(0, len(stored), images):
        yield lambda part=stored[start:start + images]: to_tensor(
            np.concatenate([transform.resize_views(read_image(file), views) for file in part]))


def alone(stored: dict[str, list[bytes]], recipe: Recipe, tokenizer: ImageTokenizer, ahead: bool) -> None:
    """Decode and encode everything; `ahead` decodes the next batch in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        for split, split_views in (("train", training_views(recipe.tokens)), ("test", [IDENTITY])):
            coming = None
            for decode in batches(stored[split], split_views, tokenizer.transform, recipe.tokens.batch_size):
                if not ahead:
                    tokenizer.encode(decode())
                    continue
                now, coming = coming, pool.submit(decode)
                if now is not None:
                    tokenizer.encode(now.result())
            if coming is not None:
                tokenizer.encode(coming.result())


def counted(run: Callable[[], None], seconds: list[float]) -> None:
    """Run something and add the processor seconds of all threads to a list; other programs do not count in them as they do on the clock."""
    started = time.process_time()
    run()
    seconds.append(time.process_time() - started)


def main() -> int:
    """Print the table; exit code 1 where the promise is broken."""
    use_two_cpu_threads()
    with tempfile.TemporaryDirectory() as folder:
        data, run_dir = Path(folder) / "data", Path(folder) / "run"
        data.mkdir()
        stored = write_subset(data)
        recipe = load_recipe("cifar10", [f"--run_dir={run_dir}", f"--data.path={data}", f"--tokens.tokenizer={folder}/tokenizer"])
        set_threads(recipe.tokens.threads)
        tokenizer = ImageTokenizer(recipe.tokenizer, ImageTransform(recipe.data.image_size, recipe.data.channels))
        tokenizer.save_pretrained(f"{folder}/tokenizer")
        tokenizer.requires_grad_(False).eval()

        def stage() -> None:
            shutil.rmtree(run_dir, ignore_errors=True)
            with redirect_stdout(StringIO()):
                preprocess(recipe)

        processor: dict[str, list[float]] = {}
        seconds = in_turn({name: lambda name=name, run=run: counted(run, processor.setdefault(name, [])) for name, run in {
            "alone, decoding in between": lambda: alone(stored, recipe, tokenizer, False),
            "alone, decoding ahead": lambda: alone(stored, recipe, tokenizer, True), "preprocess": stage}.items()}, ROUNDS)
    processor = {name: times[-ROUNDS:] for name, times in processor.items()}  # without the warm-up
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    faster = min((name for name in medians if name != "preprocess"), key=medians.get)
    cost = ratio(seconds, "preprocess", faster)
    count = sum(IMAGES.values())
    views = len(training_views(recipe.tokens))
    lines = [f"{IMAGES['train']:,} images in {views} views and {IMAGES['test']:,} in one; medians of {ROUNDS} rounds.", "",
             "| | s | images/s | times the faster one alone | processor s | times its |", "|---|---|---|---|---|---|"]
    lines += [f"| {name} | {median:.2f} | {count / median:.0f} | {ratio(seconds, name, faster):.3f} | {statistics.median(processor[name]):.2f} | "
              f"{ratio(processor, name, faster):.3f} |" for name, median in medians.items()]
    kept = cost <= ALLOWED
    lines += ["", f"- {'kept' if kept else 'NOT kept'}: at most {ALLOWED:.2f} times decoding and encoding alone: {cost:.3f}"]
    record("Preprocessing over decoding and encoding alone", lines, ("datasets", "pillow"))
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
