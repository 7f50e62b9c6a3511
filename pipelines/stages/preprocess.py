"""Encodes the images of a recipe to token shards.

    vqmosaic preprocess digits
    vqmosaic preprocess cifar10 --processes 8

Writes <run_dir>/tokens/train and <run_dir>/tokens/validation. The images are permuted with a recorded seed before they are divided into
shards, because data sets are often stored class by class. Shard s holds the images at positions [s*n, (s+1)*n). So any number of processes
writes the same bytes, and after an interruption only the missing shards are written.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from pipelines.stages.condition_grids import ConditionGrid, ConditionTokenizers, condition_grids
from pipelines.stages.count_images import count_images
from pipelines.stages.encode_images import encode_sources
from pipelines.stages.stage_inputs import check_tokenizer_has_ids, tokenizer_folder
from stage1_tokenizer.conditions.condition_data import identities
from stage1_tokenizer.data.image_sources import ImageSource, ImageSplits, refuse_if_too_many_unreadable
from stage1_tokenizer.data.open_data import open_recorded_splits
from stage1_tokenizer.image_files.images import ImageTransform, UnreadableImage
from stage1_tokenizer.image_files.views import CENTER_VIEW, View, training_views
from stage1_tokenizer.tokenizer_protocol import Tokenizer, load_tokenizer
from token_shards.manifest import (
    MANIFEST_NAME,
    ORDER_SEED,
    SPLITS,
    ShardSetHeader,
    TokenShardManifest,
    describe_grids,
    grid_columns,
    shard_name,
)
from token_shards.sidecar import ShardSidecar
from token_shards.writer import ShardInProgress, TokenShardWriter, default_key
from vqmosaic.errors import InputError, listed_names, printable
from vqmosaic.files.fingerprints import fingerprint
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.runs.accelerator import keep_process_group, lock_run_folder, set_threads
from vqmosaic.runs.devices import default_device
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.runs.launch import check_world_size, run_worker
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.runs.stage_records import decide_action, load_record, write_record
from vqmosaic.training.tracking import Reporter, progress_bar
from vqmosaic.wording import counted, is_or_are

SOURCE_ORDER = "order of the sources"
"""Name of the permutation in the stage record. Missing in records of version 0.1.0, which did not permute."""

UNREAD_PAIRS = "unread pairs"
"""The key in a stage record for pairs whose contents are not part of the fingerprint of the pairs."""


def preprocess(recipe: Recipe) -> None:
    """Write the token shards of both splits that an earlier call has not written."""
    state = PartialState(cpu=default_device().type == "cpu")
    check_world_size(state.num_processes)
    set_threads(recipe.tokens.threads)  # before any computation: the number of threads affects the rounding of sums
    run = RunFolder(Path(recipe.run_dir))
    try:
        with StopFlag() as stop, lock_run_folder(run):
            preprocess_locked(recipe, run, state, stop)
    finally:
        keep_process_group()  # delays the destructor of the group, which could deadlock, until this process ends
        state.destroy_process_group()


def preprocess_locked(recipe: Recipe, run: RunFolder, state: PartialState, stop: StopFlag) -> None:
    """Write the token shards while the run folder is locked."""
    report, started = Reporter("tokens", state.is_main_process), time.monotonic()
    folder = tokenizer_folder(recipe)
    check_tokenizer_has_ids(recipe, folder)  # again, because a user's own launcher skips the checks of the command line
    tokenizer = load_tokenizer(folder, state.device)
    check_tokenizer_fits(recipe, tokenizer, folder)
    condition_tokenizers = ConditionTokenizers.load(recipe, state.device)
    earlier_record = load_record(run, "tokens")
    recorded_inputs = earlier_record.inputs if earlier_record is not None else None
    # `splits` are the images as the earlier record describes them or, without one, in the class order of the tokenizer
    opened, splits, data_fingerprint = stop.wait_or_raise(
        lambda: open_recorded_splits(recipe.data, recorded_inputs, tokenizer.class_names), "no shard was started")
    conditions = stop.wait_or_raise(lambda: open_conditions(recipe, condition_tokenizers, splits, recorded_inputs), "no shard was started")
    inputs = {"tokenizer": tokenizer.token_fingerprint, "data set": data_fingerprint, **condition_inputs(conditions)}
    check_same_data(run, recipe, opened)
    if decide_action(run, recipe, "tokens", inputs) == "skip":
        report(f"finished already: {run.export('tokens')}")
        return
    is_unpermuted = recorded_inputs is not None and SOURCE_ORDER not in recorded_inputs  # version 0.1.0 started these shards
    order_seed = None if is_unpermuted else ORDER_SEED
    if is_unpermuted:
        report("these shards were started in the order of the data set and are finished in that order. `--redo tokens` writes them in a "
               "permuted order, which mixes the classes of training batches")
    else:
        inputs[SOURCE_ORDER] = f"seed {order_seed}"
    for note in splits.notes:
        report(f"note: {note}")
    if earlier_record is None and splits.class_names != opened.class_names:
        report(f"note: the classes are sorted as text ({listed_names(splits.class_names)}), as in the tokenizer {folder}")
    check_class_order(run, splits)
    has_former_identities = data_fingerprint != splits.fingerprint  # version 0.1.0 started these shards, so they keep its data set identities
    if not has_former_identities:
        inputs |= splits.unread_input
    inputs |= unread_pairs_input(conditions)
    state.wait_for_everyone()  # until all processes have read the record, which is written next
    if state.is_main_process:
        write_record(run, recipe, "tokens", inputs, finished=False)

    report_plan(recipe, tokenizer, conditions["train"], splits, state, report)
    writers = []
    for split in split_plans(recipe, tokenizer, conditions, splits, state.device, order_seed, has_former_identities):
        writer = TokenShardWriter(run.export("tokens") / split.header.split, split.header)
        write_split(writer, split, tokenizer, recipe, state, stop, report)
        writers.append(writer)
    state.wait_for_everyone()
    if state.is_main_process:
        write_manifests(writers, recipe, run, report)
        write_record(run, recipe, "tokens", inputs, finished=True, seconds=time.monotonic() - started)
    state.wait_for_everyone()


def open_conditions(recipe: Recipe, tokenizers: ConditionTokenizers, splits: ImageSplits,
                    inputs: Mapping[str, str] | None = None) -> dict[str, list[ConditionGrid]]:
    """Split -> the grids of the conditions of its images. Finds the pairs, and reads all captions and some bytes of each pair.

    `inputs` are those that the stage has recorded, if it has started before.
    """
    opened = {split: condition_grids(recipe, tokenizers, source, split) for split, source in (("train", splits.train),
                                                                                             ("validation", splits.validation))}
    if inputs is not None:
        unread = json.loads(inputs.get(UNREAD_PAIRS, "{}"))
        opened = {split: [grid.as_recorded({"unread": unread.get(split, {}).get(grid.name, ())}) for grid in grids]
                  for split, grids in opened.items()}
    condition_inputs(opened)  # computes the digests, which are cached
    return opened


def condition_inputs(conditions: Mapping[str, Sequence[ConditionGrid]]) -> dict[str, str]:
    """The inputs that the conditions add to the stage record: fingerprints of the tokenizers, and of the pairs and captions of both splits."""
    inputs = {f"tokenizer of {condition.name}": str(condition.grid.token_fingerprint) for condition in conditions["train"]}
    digests = {split: identities([condition.data for condition in grids]) for split, grids in conditions.items()}
    return inputs | {f"data of {name}": fingerprint({split: digests[split][name] for split in digests}) for name in digests["train"]}


def unread_pairs_input(conditions: Mapping[str, Sequence[ConditionGrid]]) -> dict[str, str]:
    """The entry of the stage record about missing or forbidden pairs, as ImageSplits.unread_input for images; empty if there are none."""
    unread = {split: {name: identity["unread"] for name, identity in identities([condition.data for condition in grids]).items()
                      if "unread" in identity} for split, grids in conditions.items()}
    return {UNREAD_PAIRS: json.dumps(unread)} if any(unread.values()) else {}


def report_plan(recipe: Recipe, tokenizer: Tokenizer, conditions: Sequence[ConditionGrid], splits: ImageSplits, state: PartialState,
                report: Reporter) -> None:
    """Print the number of images, views and tokens, and the devices."""
    views = training_views(recipe.tokens)
    report.table("plan", {
        "images": f"{len(splits.train):,} x {counted(len(views), 'view')} to train on, {len(splits.validation):,} to validate on "
                  f"({splits.validation_origin})",
        "tokens": f"{describe_grids([*tokenizer.grids, *(condition.grid for condition in conditions)])} a view",
        "device": f"{state.device} x {state.num_processes}, float32, {counted(recipe.tokens.threads, 'thread')} each",
    })


def write_manifests(writers: Sequence[TokenShardWriter], recipe: Recipe, run: RunFolder, report: Reporter) -> None:
    """Write the manifests of the splits, whose shards are complete, and print the numbers of images and the first skipped images.

    Raises InputError, before any manifest marks a split as complete, if the processes together skipped too many images.
    """
    for writer in writers:
        refuse_if_too_many_unreadable(read_skipped_sources(writer), writer.header.num_sources, recipe.data)
    for writer in writers:
        manifest = writer.finish()
        report(f"{writer.folder}: {counted(manifest.num_samples, 'image')} in {counted(len(manifest.shards), 'shard')}, "
               f"{len(manifest.skipped)} skipped")
        for entry in manifest.skipped[:10]:
            report(f"    skipped {printable(entry['source'])}: {entry['reason']}")
        if manifest.skipped:
            report(f"    `vqmosaic audit {run.export('tokens')} --repair` reads them again and stores those that are readable then")


def check_same_data(run: RunFolder, recipe: Recipe, splits: ImageSplits) -> None:
    """Raise InputError if the images have changed since this run's own tokenizer was trained."""
    record = load_record(run, "tokenizer") if recipe.tokens.tokenizer is None else None
    inputs = record.inputs if record is not None else {}
    recorded = inputs.get("data set")
    if recorded is not None and splits.as_recorded(inputs).comparable_fingerprint(recorded) != recorded:
        raise InputError(f"{run.root}: the data set has changed since the tokenizer was trained on it. Restore it, train again with "
                         f"--redo tokenizer, or use this tokenizer anyway with --tokens.tokenizer {run.export('tokenizer')}.")


def check_class_order(run: RunFolder, splits: ImageSplits) -> None:
    """Raise InputError if finished shards have the same classes in another order, because new shards would have other labels."""
    for split in SPLITS:
        folder = run.export("tokens") / split
        recorded = TokenShardManifest.load(folder).class_names if (folder / MANIFEST_NAME).is_file() else None
        names = splits.class_names
        if recorded and names and recorded != names and sorted(recorded) == sorted(names):
            raise InputError(f"{folder}: the classes of these tokens are in the order {listed_names(recorded)}, but those of new tokens would be in "
                             f"the order {listed_names(names)}. Rerun the tokens and all later stages with --redo tokens, or use another "
                             "--run_dir.")


@dataclass(frozen=True)
class SplitPlan:
    """Everything that determines the shards of one split. The same plan gives the same bytes."""

    header: ShardSetHeader
    source: ImageSource
    views: list[View]
    conditions: Sequence[ConditionGrid] = ()


def split_plans(recipe: Recipe, tokenizer: Tokenizer, conditions: Mapping[str, Sequence[ConditionGrid]], splits: ImageSplits, device: torch.device,
                order_seed: int | None = ORDER_SEED, former: bool = False) -> list[SplitPlan]:
    """The plans of the training split, with the views of the recipe, and of the validation split, whose only view is the unchanged image.

    `former` selects the data set identities that vqmosaic 0.1.0 recorded.
    """
    encoding = {"batch_size": recipe.tokens.batch_size, "threads": recipe.tokens.threads, "dtype": "float32", "device": device.type}
    assert tokenizer.token_fingerprint is not None  # every saved tokenizer has one
    plans = []
    for name, source, views in (("train", splits.train, training_views(recipe.tokens)), ("validation", splits.validation, [CENTER_VIEW])):
        given = conditions[name]
        header = ShardSetHeader(
            split=name, token_fingerprint=tokenizer.token_fingerprint, class_names=source.class_names,
            dataset=dataset_identity(source.former_identity if former else source.identity, given),
            grids=[*tokenizer.grids, *(condition.grid for condition in given)],
            conditions=[condition.data.config.ids_record() for condition in given], views=[view.to_dict() for view in views],
            images_per_shard=recipe.tokens.images_per_shard, num_sources=len(source), order_seed=order_seed, encoding=encoding)
        plans.append(SplitPlan(header, source, views, given))
    return plans


def dataset_identity(identity: dict[str, Any], conditions: Sequence[ConditionGrid]) -> dict[str, Any]:
    """The identity of a split's images, with that of the pairs and captions if there are any."""
    digests = identities([condition.data for condition in conditions])
    return {**identity, "conditions": digests} if digests else identity


def write_split(writer: TokenShardWriter, split: SplitPlan, tokenizer: Tokenizer, recipe: Recipe, state: PartialState, stop: StopFlag,
                report: Reporter) -> None:
    """Write this process's part of the shards of one split. Complete shards are skipped."""
    own = range(state.process_index, writer.num_shards, state.num_processes)
    missing = [shard for shard in own if not writer.is_complete(shard)]
    if len(missing) < len(own):
        report(f"{writer.folder}: {len(own) - len(missing)} of {counted(len(own), 'shard')} {is_or_are(len(own) - len(missing))} already complete")
    skipped: dict[str, str] = {}
    images = sum(len(writer.header.source_range(shard)) for shard in missing)
    with progress_bar(images, 0, writer.header.split, "image", state.is_main_process) as bar:
        for number in missing:
            with writer.shard(number) as shard:
                for _ in fill_shard(shard, number, split, tokenizer, recipe, stop, skipped):
                    bar.update()


def fill_shard(shard: ShardInProgress, number: int, split: SplitPlan, tokenizer: Tokenizer, recipe: Recipe, stop: StopFlag,
               skipped: dict[str, str],
               other_ids: Mapping[int, dict[str, np.ndarray]] | None = None) -> Iterator[tuple[int, np.ndarray | UnreadableImage]]:
    """Encode the sources of one shard and add them to it one by one. If the caller does not exhaust this iterator, the shard stays incomplete.

    Yields each index with its ids (V, T) of all grids after they are stored, or with the error if the image is skipped. Adds skipped images to
    `skipped` (source -> reason). `other_ids` has the ids of grids that this tokenizer does not make: source index -> grid name -> ids (V, T).
    """
    source, columns = split.source, grid_columns([*tokenizer.grids, *(condition.grid for condition in split.conditions)])
    for index, outcome in encode_sources(source, split.header.source_indices(number), split.views, tokenizer, recipe, stop, split.conditions):
        if isinstance(outcome, UnreadableImage):
            shard.skip(index=index, source=source.source_name(index), reason=str(outcome))
            skipped[source.source_name(index)] = str(outcome)
            refuse_if_too_many_unreadable(skipped, len(source), recipe.data)
        else:
            shard.add(index=index, key=default_key(index), source=source.source_name(index), label=source.label(index),
                      ids={name: outcome[:, places] for name, places in columns.items()} | (other_ids or {}).get(index, {}))
        yield index, outcome


def read_skipped_sources(writer: TokenShardWriter) -> dict[str, str]:
    """Source -> reason of all images that the finished shards skip."""
    sidecars = (ShardSidecar.load(writer.folder, shard_name(shard)) for shard in range(writer.num_shards))
    return {entry["source"]: entry["reason"] for sidecar in sidecars for entry in sidecar.skipped}


def check_tokenizer_fits(recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> None:
    """Raise InputError if the image size or another image field of the recipe differs from that of the tokenizer."""
    own, expected = ImageTransform.from_recipe(recipe.data).to_dict(), tokenizer.transform.to_dict()
    for name in ("image_size", "channels", "value_range"):
        given, needed = ("null" if value is None else value for value in (own.get(name), expected.get(name)))
        if given != needed:
            raise InputError(f"data.{name} is {given}, but the tokenizer in {folder} was trained with {needed}. Set data.{name} to {needed}.")
    if own.get("derived") != expected.get("derived"):
        kind = (expected.get("derived") or {}).get("kind", "image")
        raise InputError(f"The tokenizer in {folder} encodes images of the kind {kind!r}, as those of a condition, but the recipe has other images "
                         "(data.derived). Set tokens.tokenizer to the tokenizer of these images.")


def main(arguments: list[str]) -> None:
    """Write token shards from command-line arguments: a recipe and its overrides."""
    preprocess(load_recipe(arguments[0], arguments[1:], count_images=count_images))


if __name__ == "__main__":
    run_worker(main, sys.argv[1:])
