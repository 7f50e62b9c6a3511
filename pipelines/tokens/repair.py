"""Token shards repaired: what is broken is encoded again from the images, and nothing else is touched.

    vqmosaic audit runs/cifar10/tokens --repair

A shard is a function of tokenizer, data set and recipe, so one that is lost can be made again with the same bytes. That these three are what
the folder was made with is proved before anything is written, by the manifest or by the sidecars that are left; and a shard is put in place
only if its digest is one that manifest or sidecar remember.

Images that were skipped because they could not be read, and can be read now, are stored then: their shards are encoded again, and put in
place only if the ids of all other images come out as they were.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image

from pipelines.stages.preprocess import GRID_NAME, SplitPlan, check_tokenizer_fits, fill_shard, split_plans
from pipelines.stages.stage_inputs import check_tokenizer_has_ids, tokenizer_folder
from pipelines.tokens.origin import readable_now, run_root
from stage1_tokenizer.data.image_sources import ImageSource, ImageSplits
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import UnreadableImage
from stage1_tokenizer.tokenizer import ImageTokenizer
from token_shards.audit import audit_folder, audit_shard
from token_shards.manifest import SPLITS, ShardEntry, ShardSetHeader, TokenShardManifest, shard_name
from token_shards.sidecar import ShardSidecar, sidecar_path
from token_shards.writer import TokenShardWriter, headers_as_written
from vqmosaic.errors import InputError, printable
from vqmosaic.files.durable_files import sha256_of_file
from vqmosaic.files.permissions import PermissionDenied
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.runs.accelerator import set_threads
from vqmosaic.runs.devices import default_device
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.runs.stage_records import load_record
from vqmosaic.training.tracking import progress_bar
from vqmosaic.wording import counted


def repair_tokens(folder: Path, recipe: Recipe) -> dict[str, list[str]]:
    """The names of the shards of each split that were encoded again, in a tokens folder or in the folder of one split.

    Prints what it does. Raises InputError where the same bytes cannot be made again: before anything is written for another tokenizer, data
    set or recipe, another thread count or device, or a folder that does not say what it was made with; at the shard that comes out
    different for a changed image or a machine that rounds differently.
    """
    folders = split_folders(folder)
    set_threads(recipe.tokens.threads)  # before anything is computed: the number decides how sums round
    device = PartialState(cpu=default_device().type == "cpu").device
    with StopFlag() as stop, held(folder):
        source = tokenizer_folder(recipe)
        check_tokenizer_has_ids(recipe, source)
        tokenizer = ImageTokenizer.from_pretrained(source, device)
        check_tokenizer_fits(recipe, tokenizer, source)
        splits = splits_as_written(folders, open_splits(recipe.data))
        plans = plans_as_written(folders, *(split_plans(recipe, tokenizer, splits, device, former=former) for former in (False, True)))
        check_same_origin(folders, plans)
        return {split: repair_split(path, plans[split], tokenizer, recipe, stop) for split, path in folders.items()}


def split_folders(folder: Path) -> dict[str, Path]:
    """Split -> its folder: both of a tokens folder, or the one that `folder` itself is."""
    if any((folder / split).is_dir() for split in SPLITS):
        return {split: folder / split for split in SPLITS}
    manifest = load_manifest(folder)
    split = manifest.split if manifest is not None else folder.resolve().name
    if split not in SPLITS:
        raise InputError(f"{folder} is no tokens folder and does not say which split it is; give a folder with {' and '.join(SPLITS)} in it.")
    return {split: folder}


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the run that the folder is part of, if it is part of one."""
    root = run_root(folder)
    if root is None:
        yield
        return
    with RunFolder(root).lock():
        yield


def load_manifest(folder: Path) -> TokenShardManifest | None:
    """The manifest of a split's folder, or None where it is missing or cannot be understood."""
    try:
        return TokenShardManifest.load(folder)
    except PermissionDenied:
        raise
    except InputError:
        return None


def load_sidecar(folder: Path, name: str) -> ShardSidecar | None:
    """The sidecar of a shard, or None where it is missing or cannot be understood."""
    try:
        return ShardSidecar.load(folder, name)
    except PermissionDenied:
        raise
    except InputError:
        return None


def splits_as_written(folders: dict[str, Path], splits: ImageSplits) -> ImageSplits:
    """The images with the class order of the shards in these folders, and with the same images left out of the identity.

    Both are taken from the record of the run and from the manifests.
    """
    root = run_root(next(iter(folders.values())))
    with suppress(InputError):
        record = load_record(RunFolder(root), "tokens") if root is not None else None
        splits = splits.as_recorded(record.inputs if record is not None else {})
    for split, folder in folders.items():
        manifest = load_manifest(folder)
        if manifest is not None:
            splits = splits.in_order_of(manifest.class_names)
            splits = dataclasses.replace(splits, **{split: getattr(splits, split).with_unread(manifest.dataset.get("unread", ()))})
    return splits


def plans_as_written(folders: dict[str, Path], plans: Sequence[SplitPlan], former_plans: Sequence[SplitPlan]) -> dict[str, SplitPlan]:
    """The plan of each split, with the data set's identity and the order of sources that the shards in these folders were written with.

    `former_plans` have the identities of vqmosaic 0.1.0.
    """
    of_split, former = ({plan.header.split: plan for plan in made} for made in (plans, former_plans))
    if any(recorded_formerly(path, former[split].header) for split, path in folders.items()):
        of_split = former
    headers = headers_as_written({path: of_split[split].header for split, path in folders.items()})
    return {split: dataclasses.replace(of_split[split], header=headers[path]) for split, path in folders.items()}


def recorded_formerly(folder: Path, former: ShardSetHeader) -> bool:
    """Whether the manifest or a sidecar in a split's folder has the data set's identity in the form of vqmosaic 0.1.0."""
    manifest = load_manifest(folder)
    if manifest is not None and "version" not in manifest.dataset:
        return True
    fingerprints = {former.fingerprint, dataclasses.replace(former, order_seed=None).fingerprint}
    sidecars = (load_sidecar(folder, shard_name(index)) for index in range(former.num_shards))
    return any(sidecar is not None and sidecar.header_fingerprint in fingerprints for sidecar in sidecars)


def check_same_origin(folders: dict[str, Path], plans: dict[str, SplitPlan]) -> None:
    """Raise InputError unless what is left in the folders was made with these plans; one split's word is enough for one that is lost."""
    proven = []
    for split, folder in folders.items():
        header, manifest = plans[split].header, load_manifest(folder)
        sidecars = [load_sidecar(folder, shard_name(index)) for index in range(header.num_shards)]
        known = [sidecar.header_fingerprint for sidecar in sidecars if sidecar is not None]
        fitting = known.count(header.fingerprint)
        if 2 * fitting > len(known) or (manifest is not None and manifest.header == header):
            proven.append(split)
        elif manifest is not None:
            raise InputError(f"{folder} cannot be repaired with this recipe, which would give other tokens: "
                             f"{'; '.join(differences(manifest.header, header))}.")
        elif known:  # this split's own word counts, whatever the other says: views make no difference to validation
            raise InputError(f"{folder}: no manifest is left, and {len(known) - fitting} of its {len(known)} sidecars were written with another "
                             "tokenizer, data set or tokens section than this recipe's. Give the recipe that they were written with by --recipe.")
    if not proven:
        raise InputError(f"{', '.join(map(str, folders.values()))}: no manifest and no sidecar is left that says what the shards were made with, so "
                         "nothing could tell whether the same bytes come back. Run `vqmosaic preprocess RECIPE --redo tokens`.")


REMEDIES = {"token_fingerprint": "give the tokenizer that made them by --tokens.tokenizer", "dataset": "put the data set back as it was"}


def differences(before: ShardSetHeader, now: ShardSetHeader) -> list[str]:
    """One text for each field of a header that differs, dicts entry by entry, with what to do about it."""
    texts = []
    for field in dataclasses.fields(ShardSetHeader):
        old, new = getattr(before, field.name), getattr(now, field.name)
        remedy = REMEDIES.get(field.name)
        if isinstance(old, dict) and isinstance(new, dict):
            pairs = [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]
        else:
            pairs = [(None, old, new)] if old != new else []
        for key, was, would in pairs:
            name = field.name if key is None else f"{field.name}.{key}"
            if field.name == "encoding" and key in ("threads", "batch_size"):
                remedy = f"set --tokens.{key} {was}"
            elif field.name == "encoding":
                remedy = f"repair them where that is {was}"
            texts.append(f"{name} was {shortened(was)}, now it is {shortened(would)}" + (f" ({remedy})" if remedy else ""))
    return texts


def shortened(value: Any) -> str:
    """A value's text, cut where it is too long for a message."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def repair_split(folder: Path, plan: SplitPlan, tokenizer: ImageTokenizer, recipe: Recipe, stop: StopFlag) -> list[str]:
    """The names of the shards that were encoded again; where anything was amiss, stray files are gone and the manifest is written anew."""
    manifest, writer = load_manifest(folder), TokenShardWriter(folder, plan.header)
    if manifest is not None and manifest.header != plan.header:  # then it is the damaged one: the sidecars have spoken for the plan
        manifest = None
    is_whole = manifest is not None and audit_folder(folder).passed
    encoded = []
    if not is_whole:
        encoded = encode_broken(writer, manifest, plan, tokenizer, recipe, stop)
        manifest = writer.finish()
    readable = readable_now(plan.source, manifest.skipped)
    if readable:
        encoded += take_in(writer, manifest, readable, plan, tokenizer, recipe, stop)
        writer.finish()
    elif is_whole:
        print(f"{folder}: nothing to repair")
    return list(dict.fromkeys(encoded))


def encode_broken(writer: TokenShardWriter, manifest: TokenShardManifest | None, plan: SplitPlan, tokenizer: ImageTokenizer, recipe: Recipe,
                  stop: StopFlag) -> list[str]:
    """The names of the broken shards, which are encoded again to the same bytes: images that they left out are left out again."""
    broken = {index: reason for index in range(writer.num_shards) if (reason := what_is_broken(writer, index, manifest))}
    print(f"{writer.folder}: {len(broken)} of {counted(writer.num_shards, 'shard')} to encode again")
    skipped: dict[str, str] = {}
    with progress_bar(sum(len(plan.header.source_range(index)) for index in broken), 0, plan.header.split, "image") as bar:
        for index, reason in broken.items():
            print(f"    {reason}")
            as_before = without(plan, recorded_skips(writer, index, manifest))
            with writer.shard(index, remembered_digests(writer, index, manifest), keep_manifest=manifest is not None) as shard:
                for _ in fill_shard(shard, index, as_before, tokenizer, recipe, stop, skipped):
                    bar.update()
    for name in writer.strays():
        print(f"    {name} is no part of the set and is removed.")
    return [shard_name(index) for index in broken]


def take_in(writer: TokenShardWriter, manifest: TokenShardManifest, readable: Sequence[dict], plan: SplitPlan, tokenizer: ImageTokenizer,
            recipe: Recipe, stop: StopFlag) -> list[str]:
    """The names of the shards that left out images which can be read now, encoded again with them.

    Raises InputError where another image of the shard gets other ids than it had, and leaves the shard as it is.
    """
    wanted = {record["index"] for record in readable}
    shards = [index for index in range(writer.num_shards) if wanted.intersection(plan.header.source_indices(index))]
    print(f"{writer.folder}: {counted(len(readable), 'skipped image')} can be read now, in {len(shards)} of {counted(writer.num_shards, 'shard')}")
    skipped: dict[str, str] = {}
    for record in readable:
        print(f"    {printable(record['source'])}")
    with progress_bar(sum(len(plan.header.source_range(index)) for index in shards), 0, plan.header.split, "image") as bar:
        for number in shards:
            before = stored_ids(writer, number)
            still_left_out = {index: reason for index, reason in recorded_skips(writer, number, manifest).items() if index not in wanted}
            with writer.shard(number, keep_manifest=True) as shard:
                for index, ids_VT in fill_shard(shard, number, without(plan, still_left_out), tokenizer, recipe, stop, skipped):
                    if index in before and (isinstance(ids_VT, UnreadableImage) or not np.array_equal(before[index], ids_VT)):
                        name = printable(plan.source.source_name(index))
                        raise InputError(f"{writer.folder / shard_name(number)}: encoded again, {name} is not what it was: the image has changed, or "
                                         "this processor or torch rounds differently. The shard is left as it is. Repair it where it was written, "
                                         "or write all anew: `vqmosaic preprocess --redo tokens`.")
                    bar.update()
    print("    Training on these tokens is now another training: a prior that was trained on them before has to be made anew (--redo prior).")
    return [shard_name(number) for number in shards]


def stored_ids(writer: TokenShardWriter, index: int) -> dict[int, np.ndarray]:
    """Source index -> ids (V, T) of a whole shard."""
    header, name = writer.header, shard_name(index)
    sidecar, content = ShardSidecar.load(writer.folder, name), (writer.folder / name).read_bytes()
    grid = header.grids[0]
    shape = (len(header.views), grid.num_tokens)
    count = shape[0] * shape[1]
    return {source: np.frombuffer(content, grid.dtype, count, offset).reshape(shape)
            for source, offset in zip(sidecar.indices, sidecar.offsets[GRID_NAME], strict=True)}


def recorded_skips(writer: TokenShardWriter, index: int, manifest: TokenShardManifest | None) -> dict[int, str]:
    """Source index -> reason of what a shard left out when it was written, as manifest or sidecar remember it; nothing where neither does."""
    sidecar, sources = load_sidecar(writer.folder, shard_name(index)), frozenset(writer.header.source_indices(index))
    if manifest is not None:
        records = manifest.skipped
    elif sidecar is not None and sidecar.header_fingerprint == writer.header.fingerprint:
        records = sidecar.skipped
    else:
        records = []
    return {record["index"]: record["reason"] for record in records if record["index"] in sources}


def without(plan: SplitPlan, left_out: dict[int, str]) -> SplitPlan:
    """The plan with a source that does not read some of its images, as when a shard was written."""
    return dataclasses.replace(plan, source=LeavingOut(plan.source, left_out)) if left_out else plan


class LeavingOut:
    """A source that refuses the images at some indices, each with its reason, whether they can be read or not."""

    def __init__(self, source: ImageSource, left_out: dict[int, str]):
        self._source, self._left_out = source, left_out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Image.Image:
        """The image, or UnreadableImage."""
        if index in self._left_out:
            raise UnreadableImage(self._left_out[index])
        return self._source.read(index)


def what_is_broken(writer: TokenShardWriter, index: int, manifest: TokenShardManifest | None) -> str | None:
    """Why a shard has to be encoded again, or None where tar, sidecar and, if there is one, manifest agree to the last byte."""
    reason = writer.incompleteness(index)
    if reason:
        return reason
    name, header = shard_name(index), writer.header
    path = sidecar_path(writer.folder, name)
    sidecar = ShardSidecar.load(writer.folder, name)
    if path.read_bytes() != sidecar.to_bytes():
        return f"{path} is not as it was written."
    entry = ShardEntry(name=name, count=sidecar.count, size=sidecar.size, sha256=sidecar.sha256, sidecar_sha256=sha256_of_file(path))
    if manifest is not None and manifest.shards[index] != entry:
        return f"{name} and its sidecar are not those of the manifest."
    problems, _ = audit_shard(writer.folder, header, entry, index, header.fingerprint, sidecar.skipped)
    return problems[0] if problems else None


def remembered_digests(writer: TokenShardWriter, index: int, manifest: TokenShardManifest | None) -> set[str] | None:
    """Digests of which a shard that is encoded again must have one: what manifest, sidecar and the file itself say; None if only the last is left."""
    sidecar, path = load_sidecar(writer.folder, shard_name(index)), writer.folder / shard_name(index)
    remembered = {manifest.shards[index].sha256} if manifest is not None else set()
    if sidecar is not None and sidecar.header_fingerprint == writer.header.fingerprint:
        remembered.add(sidecar.sha256)
    if remembered and path.is_file():
        remembered.add(sha256_of_file(path))  # the tar may be the whole one, and the digest in the other two the damaged one
    return remembered or None
