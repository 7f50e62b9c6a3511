"""Writes the labelled data set of `vqmosaic augment`. Keeps at most one batch, or one shard, in memory, and continues after an interruption."""

import io
from collections.abc import Mapping

from PIL import Image

from pipelines.augment.classifiers import load_classifier
from pipelines.augment.dataset_folder import TABLE_NAME, DatasetFolder, FolderDataset, Row, ShardDataset
from pipelines.augment.labelled_images import LabelledOutput
from pipelines.bundle import usable_device
from pipelines.image_folders.write_images import load_pipeline
from stage2_prior.generation.sampling import SamplingStopped
from token_shards.writer import default_key
from vqmosaic.errors import printable
from vqmosaic.runs.interruption import Interrupted, StopFlag
from vqmosaic.runs.run_folder import locked
from vqmosaic.training.tracking import progress_bar
from vqmosaic.wording import counted, is_or_are

BATCH_IMAGES = 64
"""Images that are sampled at a time."""
MAX_LISTED_CLASSES = 12
"""Largest number of classes whose acceptance is printed."""


def write_dataset(folder: DatasetFolder, device: str | None) -> int:
    """Write the missing and damaged images of a request to its folder. Returns exit code 0.

    Raises:
        InputError: the classifier does not work or rejected all candidates of an image, the folder contains images of another request, or another
            process is writing to it.
        Interrupted: a signal stopped it. Written images are kept, and the same request continues from there.
    """
    with locked(folder.out, "--out"):
        return write_missing_images(folder, device)


def write_missing_images(folder: DatasetFolder, device: str | None) -> int:
    """The part of `write_dataset` that runs while this process holds the lock of the folder."""
    if folder.is_finished():  # another process finished it before releasing the lock
        return 0
    complete = folder.usable_files()
    rows, accept = folder.rows(complete), None
    kept = len(rows)
    if isinstance(folder, FolderDataset) and (lost := len(complete & set(folder.names)) - kept):
        print(f"warning: {counted(lost, 'image')} in {folder.out} {is_or_are(lost)} not in {TABLE_NAME} and will be drawn again", flush=True)
    pipe = load_pipeline(folder, device)
    if folder.classifier is not None:
        transform = pipe.tokenizer.transform
        accept = load_classifier(folder.classifier, len(folder.class_names), transform.channels, transform.image_size, usable_device(device)).accepts
    if kept:
        print(f"continuing: {kept:,} of {counted(folder.num, 'image')} {is_or_are(kept)} already in {folder.out}", flush=True)
    with StopFlag() as stop, progress_bar(folder.num, kept, "sampling", "image") as bar:
        # batches are skipped or sampled as a whole, so that each image is computed in the same batch as without an interruption
        batches = pipe.labelled_batches(folder.num, folder.labels, folder.seed, oversample=folder.oversample, rank_by=folder.rank_by, accept=accept,
                                        max_attempts=folder.max_attempts, batch_size=BATCH_IMAGES, callback=lambda _, __: not stop.signal,
                                        skip=lambda positions: rows.keys() >= set(positions))
        folder.begin()
        try:
            for batch in batches:
                new = {position: row for position, row in rows_of(folder, batch).items() if position not in rows}
                folder.write(new, pngs_of(batch, new))
                rows |= new
                bar.update(len(new))
                if stop.signal:
                    break
        except SamplingStopped:
            pass
        if stop.signal:
            done = len(rows) - (len(folder.waiting) if isinstance(folder, ShardDataset) else 0)
            raise Interrupted(stop.signal, f"{done:,} of {counted(folder.num, 'image')} {is_or_are(done)} written to {folder.out}")
    folder.finish(rows)
    print(f"wrote {counted(folder.num - kept, 'image')} of {counted(len(folder.labels), 'class')} to {folder.out}"
          + (f", which now contains all {folder.num:,}" if kept else ""))
    if folder.classifier is not None:
        print(f"accepted candidates: {describe_acceptance(folder)}")
    return 0


def rows_of(folder: DatasetFolder, batch: LabelledOutput) -> dict[int, Row]:
    """Position -> row of each image of a batch."""
    rows: dict[int, Row] = {}
    for number, position in enumerate(batch.places):
        label = folder.image_labels[position]
        file = f"{folder.names[position // folder.images_per_shard]}/{default_key(position)}.png" if isinstance(folder, ShardDataset) \
            else folder.names[position]
        rows[position] = {"file": file, "class": folder.class_names[label], "label": label, "seed": batch.seeds[number],
                          "candidates": batch.candidates[number], "accepted": batch.accepted[number],
                          "score": None if batch.scores is None else round(batch.scores[number], 4)}
    return rows


def pngs_of(batch: LabelledOutput, rows: Mapping[int, Row]) -> dict[int, bytes]:
    """Position -> PNG file of the images of a batch that have rows."""
    files = {}
    for position, image in zip(batch.places, batch.images, strict=True):
        if position in rows:
            assert isinstance(image, Image.Image)  # the default output type
            content = io.BytesIO()
            image.save(content, format="PNG")
            files[position] = content.getvalue()
    return files


def describe_acceptance(folder: DatasetFolder) -> str:
    """The share of accepted candidates of each class, the lowest first."""
    classes = folder.record()["result"]["classes"]
    shares = sorted((each["acceptance_rate"], name) for name, each in classes.items())
    more = f" ... ({counted(len(shares), 'class')})" if len(shares) > MAX_LISTED_CLASSES else ""
    return ", ".join(f"{printable(name)} {share:.0%}" for share, name in shares[:MAX_LISTED_CLASSES]) + more
