"""Token shards repaired: what is broken is encoded again from the images, and nothing else is touched.

    vqmosaic audit runs/cifar10/tokens --repair

A shard is a function of tokenizer, data set and recipe, so one that is lost can be made again with the same bytes. That these three are what
the folder was made with is proved before anything is written, by the manifest or by the sidecars that are left; and a shard is put in place
only if its digest is one that manifest or sidecar remember.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState

from pipelines.audit import run_root
from pipelines.preprocess import SplitPlan, check_tokenizer_fits, fill_shard, split_plans
from pipelines.stage_inputs import check_tokenizer_has_ids, tokenizer_folder
from stage1_tokenizer.image_sources import open_splits
from stage1_tokenizer.tokenizer import ImageTokenizer
from token_shards.audit import audit_folder, audit_shard
from token_shards.manifest import SPLITS, ShardEntry, ShardSetHeader, TokenShardManifest, shard_name
from token_shards.sidecar import ShardSidecar, sidecar_path
from token_shards.writer import TokenShardWriter, headers_as_written
from vqmosaic.device_choice import default_device
from vqmosaic.devices import set_threads
from vqmosaic.durable_files import sha256_of_file
from vqmosaic.errors import InputError
from vqmosaic.interruption import StopFlag
from vqmosaic.permissions import PermissionDenied
from vqmosaic.recipe import Recipe
from vqmosaic.run_folder import RunFolder
from vqmosaic.tracking import progress_bar


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
        splits = open_splits(recipe.data)
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
    if manifest is not None and audit_folder(folder).passed:
        print(f"{folder}: nothing to repair")
        return []
    broken = {index: reason for index in range(writer.num_shards) if (reason := what_is_broken(writer, index, manifest))}
    print(f"{folder}: {len(broken)} of {writer.num_shards} shards to encode again")
    skipped: dict[str, str] = {}
    with progress_bar(sum(len(plan.header.source_range(index)) for index in broken), 0, plan.header.split, "image") as bar:
        for index, reason in broken.items():
            print(f"    {reason}")
            with writer.shard(index, remembered_digests(writer, index, manifest), keep_manifest=manifest is not None) as shard:
                for _ in fill_shard(shard, index, plan, tokenizer, recipe, stop, skipped):
                    bar.update()
    for name in writer.strays():
        print(f"    {name} is no part of the set and is removed.")
    writer.finish()
    return [shard_name(index) for index in broken]


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
