"""Repairs token shards: encodes damaged shards again from the images and leaves all other shards unchanged.

    vqmosaic audit runs/cifar10/tokens --repair

Tokenizer, data set and recipe determine the bytes of a shard, so a lost shard can be encoded again with the same bytes. Before anything is written,
the manifest or the remaining sidecars must show that the folder was made with the same tokenizer, data set and recipe. A shard is replaced only if
its new digest is recorded in the manifest or in its sidecar.

Images that were skipped as unreadable but can be read now are added: their shards are encoded again, and replaced only if the ids of all other
images do not change.

Repair encodes images with the recipe's tokenizer and those of its conditions. If a folder also has grids of other tokenizers, their ids are copied
from the damaged shards.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image

from pipelines.stages.condition_grids import ConditionGrid, ConditionTokenizers
from pipelines.stages.preprocess import SplitPlan, check_tokenizer_fits, fill_shard, open_conditions, split_plans
from pipelines.stages.stage_inputs import check_tokenizer_has_ids, tokenizer_folder
from pipelines.tokens.origin import find_readable, find_run, load_manifest, load_sidecar
from pipelines.tokens.other_grids import other_grids, read_other_ids, stored_grids
from stage1_tokenizer.conditions.condition_data import check_readable
from stage1_tokenizer.data.image_sources import ImageSource, ImageSplits
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.float_images import FloatImage
from stage1_tokenizer.image_files.images import UnreadableImage
from stage1_tokenizer.tokenizer_protocol import Tokenizer, load_tokenizer
from token_shards.audit import audit_folder, audit_shard
from token_shards.manifest import SPLITS, ShardEntry, ShardSetHeader, TokenShardManifest, shard_name
from token_shards.sidecar import ShardSidecar, sidecar_path
from token_shards.writer import DigestMismatch, TokenShardWriter, headers_in_stored_order
from vqmosaic.errors import InputError, printable
from vqmosaic.files.durable_files import sha256_of_file
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.runs.accelerator import set_threads
from vqmosaic.runs.devices import default_device
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.runs.stage_records import load_record
from vqmosaic.training.tracking import progress_bar
from vqmosaic.wording import counted


def repair_tokens(folder: Path, recipe: Recipe) -> dict[str, list[str]]:
    """Repair a tokens folder or the folder of one split. Returns the names of the re-encoded shards of each split and prints progress.

    Raises InputError if the same bytes cannot be reproduced. If the tokenizer, data set, recipe, thread count or device differs, or the folder does
    not record them, it is raised before anything is written. If an image has changed or this machine rounds differently, it is raised at the first
    shard that differs.
    """
    folders = split_folders(folder)
    set_threads(recipe.tokens.threads)  # before any computation, because the number of threads affects the rounding of sums
    device = PartialState(cpu=default_device().type == "cpu").device
    with StopFlag() as stop, lock_run(folder):
        source = tokenizer_folder(recipe)
        check_tokenizer_has_ids(recipe, source)
        tokenizer = load_tokenizer(source, device)
        check_tokenizer_fits(recipe, tokenizer, source)
        condition_tokenizers = ConditionTokenizers.load(recipe, device)
        splits = match_recorded_splits(folders, open_splits(recipe.data))
        conditions = open_recorded_conditions(folders, recipe, condition_tokenizers, splits)
        plans = match_stored_plans(folders, *(split_plans(recipe, tokenizer, conditions, splits, device, former=former) for former in (False, True)))
        check_same_origin(folders, plans)
        return {split: repair_split(path, plans[split], tokenizer, recipe, stop) for split, path in folders.items()}


def split_folders(folder: Path) -> dict[str, Path]:
    """Split -> folder: both splits of a tokens folder, or the one split that is stored in `folder`."""
    if any((folder / split).is_dir() for split in SPLITS):
        return {split: folder / split for split in SPLITS}
    manifest = load_manifest(folder)
    split = manifest.split if manifest is not None else folder.resolve().name
    if split not in SPLITS:
        raise InputError(f"{folder} is not a tokens folder, and its split is not known; give a folder that contains {' and '.join(SPLITS)}.")
    return {split: folder}


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Lock the run that contains the folder, if there is one."""
    root = find_run(folder)
    if root is None:
        yield
        return
    with RunFolder(root).lock():
        yield


def match_recorded_splits(folders: dict[str, Path], splits: ImageSplits) -> ImageSplits:
    """The splits with the class order of the shards in these folders, and with the same images excluded from the identity of the data set.

    Both come from the record of the run and from the manifests.
    """
    splits = splits.as_recorded(recorded_inputs(folders) or {})
    for split, folder in folders.items():
        manifest = load_manifest(folder)
        if manifest is not None:
            splits = splits.in_class_order_of(manifest.class_names)
            splits = dataclasses.replace(splits, **{split: getattr(splits, split).with_unread(manifest.dataset.get("unread", ()))})
    return splits


def open_recorded_conditions(folders: dict[str, Path], recipe: Recipe, tokenizers: ConditionTokenizers,
                             splits: ImageSplits) -> dict[str, list[ConditionGrid]]:
    """Split -> the grids of the conditions, with the same pairs excluded from their identity as in the record of the run and in the manifests."""
    conditions = open_conditions(recipe, tokenizers, splits, recorded_inputs(folders))
    for split, folder in folders.items():
        manifest = load_manifest(folder)
        if manifest is not None:
            recorded = manifest.dataset.get("conditions", {})
            conditions[split] = [grid.as_recorded(recorded.get(grid.name, {})) for grid in conditions[split]]
    return conditions


def recorded_inputs(folders: dict[str, Path]) -> dict[str, str] | None:
    """The inputs in the record of the run that contains the folders; None if there is none that can be read."""
    root = find_run(next(iter(folders.values())))
    with suppress(InputError):
        record = load_record(RunFolder(root), "tokens") if root is not None else None
        return record.inputs if record is not None else None
    return None


def match_stored_plans(folders: dict[str, Path], plans: Sequence[SplitPlan], former_plans: Sequence[SplitPlan]) -> dict[str, SplitPlan]:
    """Split -> plan, with the data set identity and the source order that the shards in these folders were written with.

    `former_plans` have the data set identities that vqmosaic 0.1.0 recorded.
    """
    by_split, former_by_split = ({plan.header.split: with_stored_grids(plan, folders) for plan in candidates} for candidates in (plans, former_plans))
    if any(has_former_identity(path, former_by_split[split].header) for split, path in folders.items()):
        by_split = former_by_split
    headers = headers_in_stored_order({path: by_split[split].header for split, path in folders.items()})
    return {split: dataclasses.replace(by_split[split], header=headers[path]) for split, path in folders.items()}


def with_stored_grids(plan: SplitPlan, folders: dict[str, Path]) -> SplitPlan:
    """The plan with the grids of other tokenizers that the shards of its split have besides the plan's own grids."""
    folder = folders.get(plan.header.split)
    if folder is None:
        return plan
    return dataclasses.replace(plan, header=dataclasses.replace(plan.header, grids=stored_grids(folder, plan.header)))


def has_former_identity(folder: Path, former: ShardSetHeader) -> bool:
    """Whether the manifest or a sidecar in a split's folder was written with the data set identity of vqmosaic 0.1.0."""
    manifest = load_manifest(folder)
    if manifest is not None and "version" not in manifest.dataset:
        return True
    fingerprints = {former.fingerprint, dataclasses.replace(former, order_seed=None).fingerprint}
    sidecars = (load_sidecar(folder, shard_name(index)) for index in range(former.num_shards))
    return any(sidecar is not None and sidecar.header_fingerprint in fingerprints for sidecar in sidecars)


def check_same_origin(folders: dict[str, Path], plans: dict[str, SplitPlan]) -> None:
    """Raise InputError unless the shards in the folders were made with these plans. A split without manifest and sidecars relies on the other."""
    confirmed = []
    for split, folder in folders.items():
        header, manifest = plans[split].header, load_manifest(folder)
        sidecars = [load_sidecar(folder, shard_name(index)) for index in range(header.num_shards)]
        known = [sidecar.header_fingerprint for sidecar in sidecars if sidecar is not None]
        matching = known.count(header.fingerprint)
        if 2 * matching > len(known) or (manifest is not None and manifest.header == header):
            confirmed.append(split)
        elif manifest is not None:
            raise InputError(f"{folder} cannot be repaired with this recipe, which would give other tokens: "
                             f"{'; '.join(describe_differences(manifest.header, header))}.")
        elif known:  # the other split cannot confirm this one: views, for example, do not affect validation
            raise InputError(f"{folder}: the manifest is missing, and {len(known) - matching} of {len(known)} sidecars were written with another "
                             "tokenizer, data set or tokens section than those of this recipe. Give the recipe that wrote them with --recipe.")
    if not confirmed:
        raise InputError(f"{', '.join(map(str, folders.values()))}: no manifest and no readable sidecar is left, so it is not known which recipe "
                         "made the shards. Run `vqmosaic preprocess RECIPE --redo tokens`.")


REMEDIES = {"token_fingerprint": "give the tokenizer that made them with --tokens.tokenizer", "dataset": "restore the original data set"}


def describe_differences(before: ShardSetHeader, now: ShardSetHeader) -> list[str]:
    """One message for each header field, or entry of a dict field, that differs, with a remedy."""
    messages = []
    for field in dataclasses.fields(ShardSetHeader):
        old, new = getattr(before, field.name), getattr(now, field.name)
        remedy = REMEDIES.get(field.name)
        if isinstance(old, dict) and isinstance(new, dict):
            pairs = [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]
        else:
            pairs = [(None, old, new)] if old != new else []
        for key, old_value, new_value in pairs:
            name = field.name if key is None else f"{field.name}.{key}"
            if field.name == "encoding" and key in ("threads", "batch_size"):
                remedy = f"set --tokens.{key} {old_value}"
            elif field.name == "encoding":
                remedy = f"repair them on a machine where {key} is {old_value}"
            messages.append(f"{name} was {shortened(old_value)}, now it is {shortened(new_value)}" + (f" ({remedy})" if remedy else ""))
    return messages


def shortened(value: Any) -> str:
    """The repr of a value, truncated to 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def repair_split(folder: Path, plan: SplitPlan, tokenizer: Tokenizer, recipe: Recipe, stop: StopFlag) -> list[str]:
    """Repair one split and return the names of the re-encoded shards. If there were problems, also removes stray files and rewrites the manifest."""
    manifest, writer = load_manifest(folder), TokenShardWriter(folder, plan.header)
    if manifest is not None and manifest.header != plan.header:  # the manifest is damaged, because most sidecars match the plan
        manifest = None
    is_intact = manifest is not None and audit_folder(folder).passed
    encoded = []
    if manifest is None or not is_intact:
        encoded = encode_damaged_shards(writer, manifest, plan, tokenizer, recipe, stop)
        manifest = writer.finish()
    readable = find_readable(plan.source, manifest.skipped, lambda index: check_readable([condition.data for condition in plan.conditions], index))
    if readable and (others := other_grids(plan.header)):
        print(f"{folder}: {counted(len(readable), 'skipped image')} can be read now, but cannot be added, because other tokenizers than that of the "
              f"recipe made the grids {', '.join(others)}. Write all shards again to store them.")
    elif readable:
        encoded += add_skipped_images(writer, manifest, readable, plan, tokenizer, recipe, stop)
        writer.finish()
    elif is_intact:
        print(f"{folder}: nothing to repair")
    return list(dict.fromkeys(encoded))


def encode_damaged_shards(writer: TokenShardWriter, manifest: TokenShardManifest | None, plan: SplitPlan, tokenizer: Tokenizer, recipe: Recipe,
                          stop: StopFlag) -> list[str]:
    """Encode the damaged shards again to the same bytes, and return their names. Images that were skipped are skipped again."""
    damaged = {index: reason for index in range(writer.num_shards) if (reason := describe_damage(writer, index, manifest))}
    print(f"{writer.folder}: {len(damaged)} of {counted(writer.num_shards, 'shard')} to encode again")
    skipped: dict[str, str] = {}
    with progress_bar(sum(len(plan.header.source_range(index)) for index in damaged), 0, plan.header.split, "image") as bar:
        for index, reason in damaged.items():
            print(f"    {reason}")
            skips = recorded_skips(writer, index, manifest)
            original_plan, other_ids = skip_images(plan, skips), read_other_ids(writer.folder, plan.header, index, skips)
            try:
                with writer.shard(index, recorded_digests(writer, index, manifest), keep_manifest=manifest is not None) as shard:
                    for _ in fill_shard(shard, index, original_plan, tokenizer, recipe, stop, skipped, other_ids):
                        bar.update()
            except DigestMismatch as error:
                if others := other_grids(plan.header):
                    raise DigestMismatch(f"{error} Or the ids of the grids {', '.join(others)}, which other tokenizers made, are damaged; restore "
                                         "the shard from a copy.") from None
                raise
    for name in writer.strays():
        print(f"    {name} is not part of the shard set and is removed.")
    return [shard_name(index) for index in damaged]


def add_skipped_images(writer: TokenShardWriter, manifest: TokenShardManifest, readable: Sequence[dict], plan: SplitPlan, tokenizer: Tokenizer,
                       recipe: Recipe, stop: StopFlag) -> list[str]:
    """Encode shards again to add skipped images that can be read now, and return the names of these shards.

    Raises InputError, without replacing the shard, if the ids of another image in the shard change.
    """
    added = {record["index"] for record in readable}
    shards = [index for index in range(writer.num_shards) if added.intersection(plan.header.source_indices(index))]
    print(f"{writer.folder}: {counted(len(readable), 'skipped image')} can be read now, in {len(shards)} of {counted(writer.num_shards, 'shard')}")
    skipped: dict[str, str] = {}
    for record in readable:
        print(f"    {printable(record['source'])}")
    with progress_bar(sum(len(plan.header.source_range(index)) for index in shards), 0, plan.header.split, "image") as bar:
        for number in shards:
            before = stored_ids(writer, number)
            still_skipped = {index: reason for index, reason in recorded_skips(writer, number, manifest).items() if index not in added}
            with writer.shard(number, keep_manifest=True) as shard:
                for index, ids_VT in fill_shard(shard, number, skip_images(plan, still_skipped), tokenizer, recipe, stop, skipped):
                    if index in before and (isinstance(ids_VT, UnreadableImage) or not np.array_equal(before[index], ids_VT)):
                        name = printable(plan.source.source_name(index))
                        raise InputError(f"{writer.folder / shard_name(number)}: re-encoding changed the ids of {name}. The image has changed, or "
                                         "this processor or torch version rounds differently. The shard was not replaced. Repair it on the machine "
                                         "that wrote it, or write all shards again with `vqmosaic preprocess --redo tokens`.")
                    bar.update()
    print("    The tokens have changed, so a prior that was trained on them must be trained again (--redo prior).")
    return [shard_name(number) for number in shards]


def stored_ids(writer: TokenShardWriter, index: int) -> dict[int, np.ndarray]:
    """Source index -> ids (V, T) of all grids, for all samples of an undamaged shard."""
    header, name = writer.header, shard_name(index)
    sidecar, content = ShardSidecar.load(writer.folder, name), (writer.folder / name).read_bytes()
    views = len(header.views)
    return {source: np.concatenate([np.frombuffer(content, grid.dtype, views * grid.num_tokens, sidecar.offsets[grid.name][row]).reshape(views, -1)
                                    for grid in header.grids], axis=1) for row, source in enumerate(sidecar.indices)}


def recorded_skips(writer: TokenShardWriter, index: int, manifest: TokenShardManifest | None) -> dict[int, str]:
    """Source index -> reason, for the images that a shard skipped when it was written. Empty if neither manifest nor sidecar records them."""
    sidecar, sources = load_sidecar(writer.folder, shard_name(index)), frozenset(writer.header.source_indices(index))
    if manifest is not None:
        records = manifest.skipped
    elif sidecar is not None and sidecar.header_fingerprint == writer.header.fingerprint:
        records = sidecar.skipped
    else:
        records = []
    return {record["index"]: record["reason"] for record in records if record["index"] in sources}


def skip_images(plan: SplitPlan, skipped: dict[int, str]) -> SplitPlan:
    """The plan with a source in which some images are unreadable. `skipped` maps their indices to the reasons."""
    return dataclasses.replace(plan, source=SourceWithSkips(plan.source, skipped)) if skipped else plan


class SourceWithSkips:
    """An image source that raises UnreadableImage for the given indices, even if the images can be read."""

    def __init__(self, source: ImageSource, skipped: dict[int, str]):
        self._source, self._skipped = source, skipped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int, before_decoding: Callable[[Image.Image], object] | None = None) -> Image.Image | FloatImage:
        """The image. Raises UnreadableImage if it is skipped or unreadable."""
        if index in self._skipped:
            raise UnreadableImage(self._skipped[index])
        return self._source.read(index, before_decoding)


def describe_damage(writer: TokenShardWriter, index: int, manifest: TokenShardManifest | None) -> str | None:
    """The reason to encode a shard again, or None if the tar, the sidecar and the manifest (if there is one) agree exactly."""
    reason = writer.incompleteness(index)
    if reason:
        return reason
    name, header = shard_name(index), writer.header
    path = sidecar_path(writer.folder, name)
    sidecar = ShardSidecar.load(writer.folder, name)
    if path.read_bytes() != sidecar.to_bytes():
        return f"{path} has changed since it was written."
    entry = ShardEntry(name=name, count=sidecar.count, size=sidecar.size, sha256=sidecar.sha256, sidecar_sha256=sha256_of_file(path))
    if manifest is not None and manifest.shards[index] != entry:
        return f"{name} and its sidecar do not match the manifest."
    problems, _ = audit_shard(writer.folder, header, entry, index, header.fingerprint, sidecar.skipped)
    return problems[0] if problems else None


def recorded_digests(writer: TokenShardWriter, index: int, manifest: TokenShardManifest | None) -> set[str] | None:
    """The digests allowed for a re-encoded shard: those in the manifest and the sidecar, and that of the tar. None if only the tar is left.

    With grids of other tokenizers, that of the tar is not allowed, because their ids are copied from it and may be damaged.
    """
    sidecar, path = load_sidecar(writer.folder, shard_name(index)), writer.folder / shard_name(index)
    digests = {manifest.shards[index].sha256} if manifest is not None else set()
    if sidecar is not None and sidecar.header_fingerprint == writer.header.fingerprint:
        digests.add(sidecar.sha256)
    if digests and path.is_file() and not other_grids(writer.header):
        digests.add(sha256_of_file(path))  # the tar may be undamaged, and the recorded digests damaged
    return digests or None
