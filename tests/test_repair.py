"""audit --repair: damaged shards are restored byte for byte, intact shards are not rewritten, and impossible repairs are rejected."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.command_line import dispatch
from pipelines.stages import preprocess as module
from pipelines.stages.preprocess import preprocess
from pipelines.tokens.audit_command import audit_run
from stage1_tokenizer import ImageTokenizer
from stage1_tokenizer import train as train_tokenizer
from stage1_tokenizer.data.content_digest import file_digest
from stage1_tokenizer.data.folder_source import FolderSource
from stage1_tokenizer.data.image_sources import comparable_identity
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import UnreadableImage
from tests.run_files import edit_json, flip_byte, token_files
from tests.tiny import tiny_recipe
from token_shards import Grid, TokenShardManifest, TokenShardReader, TokenShardWriter, default_key
from token_shards.manifest import shard_name
from token_shards.sidecar import ShardSidecar
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import sha256_of_file
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.wording import counted

COUNT, PER_SHARD = 50, 6


@pytest.fixture(scope="module")
def written(tiny_run, tmp_path_factory) -> tuple[Path, Path]:
    """(run, photos): a run with the tokens of these photos, one of which is unreadable."""
    folder = tmp_path_factory.mktemp("repair")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = folder / "photos" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 5), dtype=np.uint8)).resize((24, 20), Image.Resampling.BICUBIC).save(path)
    recipe = tiny_recipe(folder / "run", data__source="folder", data__path=folder / "photos", data__validation_fraction=0.2,
                         tokens__tokenizer=tiny_run / "tokenizer", tokens__images_per_shard=PER_SHARD, tokens__batch_size=8, tokens__views="shifts")
    unreadable = folder / "photos" / open_splits(recipe.data).train.source_name(PER_SHARD + 1)
    unreadable.write_bytes(unreadable.read_bytes()[:60])
    preprocess(recipe)
    return folder / "run", folder / "photos"


@pytest.fixture
def run(written, tmp_path) -> Path:
    """A copy of the run that a test may damage. The run_dir in its recipe is that of the original."""
    return Path(shutil.copytree(written[0], tmp_path / "copy"))


def recipe_in(run: Path, *overrides: str) -> Recipe:
    return load_recipe(str(run), list(overrides))


def shard_states(run: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(run / "tokens")): (path.stat().st_ino, path.stat().st_mtime_ns) for path in (run / "tokens").rglob("shard-*")}


@pytest.fixture
def encoded_sources(monkeypatch) -> list[list[int]]:
    """Source indices of each shard that is encoded during the test."""
    original, seen = module.encode_sources, []

    def encoded(source, indices, *others):
        seen.append(list(indices))
        return original(source, indices, *others)

    monkeypatch.setattr(module, "encode_sources", encoded)
    return seen


def relabel(path: Path) -> None:
    labels = json.loads(path.read_text())["labels"]
    edit_json(path, labels=[1 - labels[0], *labels[1:]])


DAMAGES = {
    "deleted": (lambda train: (train / "shard-000000.tar").unlink(), [0]),
    "flipped": (lambda train: flip_byte(train / "shard-000001.tar"), [1]),
    "cut short": (lambda train: (train / "shard-000002.tar").write_bytes((train / "shard-000002.tar").read_bytes()[:3000]), [2]),
    "emptied": (lambda train: (train / "shard-000002.tar").write_bytes(b""), [2]),
    "sidecar deleted": (lambda train: (train / "shard-000003.json").unlink(), [3]),
    "sidecar no JSON": (lambda train: flip_byte(train / "shard-000003.json", 0), [3]),
    "sidecar relabelled": (lambda train: relabel(train / "shard-000003.json"), [3]),
    "foreign sidecar": (lambda train: edit_json(train / "shard-000003.json", header_fingerprint="f" * 64), [3]),
    "another shard's files": (lambda train: [shutil.copy(train / f"shard-000000.{kind}", train / f"shard-000004.{kind}")
                                             for kind in ("tar", "json")], [4]),
    "manifest deleted": (lambda train: (train / "manifest.json").unlink(), []),
    "manifest cut short": (lambda train: (train / "manifest.json").write_bytes((train / "manifest.json").read_bytes()[:500]), []),
    "manifest of another recipe": (lambda train: edit_json(train / "manifest.json", token_fingerprint="e" * 64), []),
    "sum of sources": (lambda train: edit_json(train / "manifest.json", sources_sha256="0" * 64), []),
    "strays": (lambda train: [shutil.copy(train / "shard-000000.tar", train / name)
                              for name in ("shard-000099.tar", ".partial-shard-000001.tar")], []),
    "the whole split": (lambda train: shutil.rmtree(train), [0, 1, 2, 3, 4, 5, 6]),
}


def assert_repaired(run: Path, written: Path, broken: set[str], before: dict) -> None:
    """Check that the tokens equal the original ones and that only the broken shards were written since `before`."""
    assert token_files(run) == token_files(written)
    rewritten = {name.removesuffix(".json").removesuffix(".tar") for name, state in shard_states(run).items() if before.get(name) != state}
    assert rewritten == broken


@pytest.mark.parametrize("damage", DAMAGES)
def test_only_damaged_shards_are_rewritten(damage, run, written, encoded_sources, capsys):
    shards = len(list((run / "tokens/train").glob("shard-*.tar")))
    apply_damage, broken = DAMAGES[damage]
    before = shard_states(run)
    apply_damage(run / "tokens/train")
    before = {name: state for name, state in before.items() if shard_states(run).get(name) == state}
    assert audit_run(run) == 1
    assert audit_run(run, repair=True) == 0
    header = TokenShardManifest.load(run / "tokens/train").header
    assert shards == 7 and encoded_sources == [header.source_indices(index) for index in broken]
    assert_repaired(run, written[0], {f"train/shard-{index:06d}" for index in broken}, before)
    assert f"repaired: {counted(len(broken), 'shard')}" in capsys.readouterr().out


def test_command_repairs_several_damages(run, written, capsys):
    """With the manifests of both splits missing."""
    train, validation = run / "tokens/train", run / "tokens/validation"
    before = shard_states(run)
    for damage in ("strays", "deleted", "flipped", "cut short", "manifest deleted"):
        DAMAGES[damage][0](train)
    relabel(validation / "shard-000000.json")
    (validation / "manifest.json").unlink()
    capsys.readouterr()
    assert dispatch(["audit", str(run / "tokens"), "--repair"]) == 0
    output, errors = capsys.readouterr()
    assert "shard-000099.tar is not part of the shard set and is removed" in output and output.count(": no problems") == 2 and not errors
    assert_repaired(run, written[0], {"train/shard-000000", "train/shard-000001", "train/shard-000002", "validation/shard-000000"}, before)


def test_intact_splits_are_unchanged_and_one_split_can_be_repaired(run, written, encoded_sources):
    before = {path: path.stat().st_mtime_ns for path in (run / "tokens").rglob("*") if path.is_file()}
    assert audit_run(run, repair=True) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (run / "tokens").rglob("*") if path.is_file()} and not encoded_sources
    flip_byte(run / "tokens/validation/shard-000000.tar")
    flip_byte(run / "tokens/train/shard-000000.tar")
    assert audit_run(run / "tokens/validation", repair=True) == 0
    assert encoded_sources == [TokenShardManifest.load(run / "tokens/validation").source_indices(0)]
    assert audit_run(run) == 1, "the other split was not repaired"


def test_exit_code_reports_problems_that_remain_after_the_repair(run, capsys):
    (run / "tokens/train/shard-000099.tar").mkdir()  # a repair does not delete folders
    assert audit_run(run, repair=True) == 1
    assert "shard-000099.tar: this file is not listed" in capsys.readouterr().out


def delete_shard(tokens: Path) -> None:
    (tokens / "train/shard-000002.tar").unlink()


def delete_manifest_and_sidecar(tokens: Path) -> None:
    (tokens / "train/manifest.json").unlink()
    (tokens / "train/shard-000002.json").unlink()


def delete_sidecars(tokens: Path) -> None:
    for path in (tokens / "train").glob("shard-*.json"):
        path.unlink()


@pytest.mark.parametrize("delete", [delete_shard, delete_manifest_and_sidecar, delete_sidecars, lambda tokens: shutil.rmtree(tokens / "train")],
                         ids=["shard", "manifest and shard", "sidecars", "split"])
def test_shards_of_version_0_1_0_are_repaired_in_data_set_order(delete, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "ORDER_SEED", None)
        preprocess(recipe_in(run, f"--run_dir={tmp_path / 'old'}"))
    before = token_files(tmp_path / "old")
    assert b"order_seed" not in before["tokens/train/manifest.json"]
    delete(tmp_path / "old/tokens")
    assert audit_run(tmp_path / "old", recipe_in(run), repair=True) == 0
    assert token_files(tmp_path / "old") == before


# --- temporary read errors -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def flaky_run(written, tmp_path, monkeypatch) -> tuple[Path, dict[str, list[str]]]:
    """(run, names by split): a run like `written`, during which these three images were temporarily unreadable."""
    recipe = recipe_in(written[0], f"--run_dir={tmp_path / 'flaky'}", "--data.max_unreadable=0.5")
    splits = open_splits(recipe.data)
    names = {"train": [splits.train.source_name(index) for index in (2, 30)], "validation": [splits.validation.source_name(1)]}
    read = FolderSource.read

    def failing(source, index):
        if source.source_name(index) in names[source.split]:
            raise UnreadableImage("truncated, corrupt or not accessible: Input/output error")
        return read(source, index)

    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "read", failing)
        preprocess(recipe)
    return tmp_path / "flaky", names


def test_images_that_became_readable_are_reported_by_audit_and_added_by_repair(flaky_run, written, capsys):
    run, names = flaky_run
    capsys.readouterr()
    assert audit_run(run) == 1
    output = capsys.readouterr().out
    for name in (*names["train"], *names["validation"]):
        assert f"{name}: it was skipped as unreadable (truncated, corrupt or not accessible: Input/output error), but can be read now" in output
    assert "3 skipped: 2 problems" in output and "1 skipped: 1 problem" in output, "images that are still unreadable are not problems"
    assert audit_run(run, repair=True) == 0
    assert token_files(run) == token_files(written[0]), "the same bytes as without the error"
    assert "2 skipped images can be read now" in capsys.readouterr().out
    assert audit_run(run / "tokens/train") == 0


def test_broken_shards_are_repaired_although_skipped_images_became_readable(flaky_run, written):
    run, _ = flaky_run
    for path in (run / "tokens/train").glob("shard-*.tar"):
        flip_byte(path)
    (run / "tokens/validation/manifest.json").unlink()
    (run / "tokens/validation/shard-000000.tar").unlink()
    assert audit_run(run, repair=True) == 0
    assert token_files(run) == token_files(written[0])


@pytest.mark.parametrize("name", ["publish", "ShardSidecar.save", "TokenShardWriter.finish"])
def test_adding_images_can_be_interrupted_and_rerun(name, flaky_run, written, monkeypatch):
    run, _ = flaky_run
    owner, _, attribute = f"token_shards.writer.{name}".rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(f"{owner}.{attribute}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            audit_run(run, repair=True)
    assert audit_run(run, repair=True) == 0
    assert token_files(run) == token_files(written[0])


def test_images_are_not_added_if_reencoding_changes_other_ids(flaky_run, monkeypatch):
    run, _ = flaky_run
    before, read = token_files(run), FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda source, index: ImageOps.invert(read(source, index)))
    with pytest.raises(InputError, match=r"shard-00000\d\.tar: re-encoding changed the ids of "):
        audit_run(run, repair=True)
    assert token_files(run) == before


# --- rejected repairs ------------------------------------------------------------------------------------------------------------------


def rejection_message(run: Path, *overrides: str) -> str:
    """The message of a rejected repair, which must not change any file."""
    (run / "tokens/train/shard-000001.tar").unlink()
    before = token_files(run)
    with pytest.raises(InputError) as error:
        audit_run(run, recipe_in(run, *overrides) if overrides else None, repair=True)
    assert token_files(run) == before
    return str(error.value)


@pytest.mark.parametrize(("override", "message"), [
    ("--tokens.threads=2", "encoding.threads was 1, now it is 2 (set --tokens.threads 1)"),
    ("--tokens.batch_size=16", "encoding.batch_size was 8, now it is 16 (set --tokens.batch_size 8)"),
    ("--tokens.views=none", "views was "), ("--tokens.images_per_shard=7", "images_per_shard was 6, now it is 7"),
    ("--data.validation_fraction=0.3", "num_sources was "),
])
def test_changed_recipe_fields_are_reported(override, message, run):
    assert message in rejection_message(run, override)


def test_another_tokenizer_is_rejected(run, tiny_run, tmp_path):
    other = ImageTokenizer.from_pretrained(tiny_run / "tokenizer")
    other.quantizer.codebook[0] += 1
    other.save_pretrained(tmp_path / "other")
    message = rejection_message(run, f"--tokens.tokenizer={tmp_path / 'other'}")
    assert "token_fingerprint was" in message and other.token_fingerprint in message and "--tokens.tokenizer" in message
    for manifest in run.rglob("tokens/*/manifest.json"):  # the sidecars alone reveal the other tokenizer
        manifest.unlink()
    with pytest.raises(InputError, match=r"the manifest is missing, and \d+ of \d+ sidecars were written with another tokenizer"):
        audit_run(run, recipe_in(run, f"--tokens.tokenizer={tmp_path / 'other'}"), repair=True)


def test_other_views_are_rejected_although_validation_matches(run):
    """Validation tokens do not depend on tokens.views, so their manifest cannot reveal the change."""
    (run / "tokens/train/manifest.json").unlink()
    (run / "tokens/train/shard-000001.tar").unlink()
    before = token_files(run)
    with pytest.raises(InputError, match=r"tokens/train: the manifest is missing, and \d+ of \d+ sidecars"):
        audit_run(run, recipe_in(run, "--tokens.views=none"), repair=True)
    assert token_files(run) == before


def test_another_data_set_is_rejected(run, written, tmp_path):
    photos = Path(shutil.copytree(written[1], tmp_path / "photos"))
    Image.new("L", (20, 20)).save(photos / "a/new.png")
    assert "dataset.sha256 was" in rejection_message(run, f"--data.path={photos}")


def test_changed_images_of_equal_file_size_are_detected(run, written, tmp_path, capsys):
    photos = Path(shutil.copytree(written[1], tmp_path / "photos"))
    moved = recipe_in(run, f"--data.path={photos}")
    assert audit_run(run, moved) == 0, "the same images in another folder"
    changed = photos / open_splits(moved.data).train.source_name(PER_SHARD)
    content = changed.read_bytes()
    Image.new("L", (24, 20), 255).save(changed)
    changed.write_bytes(changed.read_bytes().ljust(len(content), b"\0"))
    capsys.readouterr()
    assert audit_run(run, moved) == 1
    assert "1 skipped: 1 problem\n    the images have changed since they were encoded" in capsys.readouterr().out
    assert "dataset.sha256 was" in rejection_message(run, f"--data.path={photos}")


def test_repair_fails_if_an_image_changed_undetected(run, written, tiny_run, tmp_path):
    """The name, the size and the digested bytes of the image are unchanged, so the identity of the data set is the same."""
    photos = Path(shutil.copytree(written[1], tmp_path / "photos"))
    recipe = recipe_in(run, f"--data.path={photos}", f"--run_dir={tmp_path / 'own'}")
    second_shard = TokenShardManifest.load(run / "tokens/train").source_indices(1)
    changed = photos / open_splits(recipe.data).train.source_name(second_shard[0])
    Image.new("RGB", (100, 100), 255).save(changed, "BMP")
    content = changed.read_bytes()
    preprocess(recipe)
    changed.write_bytes(content[:5000] + bytes(5000) + content[10_000:])
    shard = tmp_path / "own/tokens/train/shard-000001.tar"
    digest = sha256_of_file(shard)
    shard.unlink()
    with pytest.raises(InputError, match=rf"re-encoding gave a different file: .*{digest}.*An image has changed"):
        audit_run(tmp_path / "own", recipe, repair=True)
    assert not shard.exists() and (tmp_path / "own/tokens/train/manifest.json").exists(), "the other files are kept"


@pytest.mark.parametrize("order_seed", [None, module.ORDER_SEED])
def test_tokens_of_version_0_1_0_are_completed_and_repaired_in_their_format(order_seed, run, written, tmp_path, monkeypatch, capsys):
    """Also with permuted sources, which were introduced before identities without a path."""
    recipe = recipe_in(run, f"--data.path={written[1]}", f"--run_dir={tmp_path / 'old'}")
    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "identity", FolderSource.former_identity)
        patch.setattr(module, "ORDER_SEED", order_seed)
        preprocess(recipe)
    old, before = tmp_path / "old", token_files(tmp_path / "old")
    assert json.loads(before["tokens/train/manifest.json"])["dataset"]["path"] == str(written[1])
    record = old / "stages/tokens.json"
    recorded = json.loads(record.read_text())
    if order_seed is None:
        del recorded["inputs"][module.SOURCE_ORDER]
        record.write_text(json.dumps(recorded))
    capsys.readouterr()

    preprocess(recipe)
    assert "finished already" in capsys.readouterr().out and audit_run(old) == 0
    for damage in ("deleted", "manifest deleted"):
        DAMAGES[damage][0](old / "tokens/train")
        assert audit_run(old, repair=True) == 0 and token_files(old) == before
    for name in ("shard-000002.tar", "shard-000002.json", "manifest.json"):  # as if the old version had been interrupted
        (old / "tokens/train" / name).unlink()
    record.write_text(json.dumps(recorded | {"finished": False}))
    capsys.readouterr()
    preprocess(recipe)
    assert "6 of 7 shards are already complete" in capsys.readouterr().out and token_files(old) == before
    assert json.loads(record.read_text())["inputs"] == recorded["inputs"]


def test_folder_without_manifests_and_sidecars_is_rejected(run):
    for path in [*run.rglob("tokens/*/manifest.json"), *run.rglob("tokens/*/shard-*.json")]:
        path.unlink()
    assert "no manifest and no readable sidecar is left" in rejection_message(run)


def test_folder_outside_of_a_run_needs_a_recipe(run, written, tmp_path):
    tokens = Path(shutil.copytree(run / "tokens", tmp_path / "elsewhere/tokens"))
    flip_byte(tokens / "train/shard-000002.tar")
    with pytest.raises(InputError, match="give --recipe"):
        audit_run(tokens, repair=True)
    assert audit_run(tokens, recipe_in(run), repair=True) == 0
    assert token_files(tokens.parent) == token_files(written[0])


# --- images that could not be opened --------------------------------------------------------------------------------------------------


def run_with_unread_image(tiny_run: Path, photos: Path, folder: Path) -> tuple[Recipe, Path]:
    """(recipe, link): a preprocessed run on a copy of the photos, one of which is a broken link."""
    shutil.copytree(photos, folder / "photos")
    recipe = tiny_recipe(folder / "run", data__source="folder", data__path=folder / "photos", data__validation_fraction=0.2,
                         tokens__tokenizer=tiny_run / "tokenizer", tokens__images_per_shard=PER_SHARD, tokens__batch_size=8, data__max_unreadable=0.1)
    link = folder / "photos" / open_splits(recipe.data).train.source_name(3)
    link.rename(folder / "away.png")
    link.symlink_to(folder / "target.png")
    preprocess(recipe)
    return recipe, link


def test_unopened_image_is_added_once_it_can_be_opened(tiny_run, written, tmp_path, capsys):
    recipe, link = run_with_unread_image(tiny_run, written[1], tmp_path)
    run, name = tmp_path / "run", "/".join(link.parts[-2:])
    assert TokenShardManifest.load(run / "tokens/train").dataset["unread"] == [3] and "unread" not in TokenShardManifest.load(
        run / "tokens/validation").dataset
    assert audit_run(run) == 0
    before = token_files(run)
    preprocess(recipe)
    (tmp_path / "away.png").rename(tmp_path / "target.png")
    capsys.readouterr()
    assert audit_run(run) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert len(problems) == 1 and name in problems[0] and "--repair encodes it" in problems[0]
    preprocess(recipe)
    assert "finished already" in capsys.readouterr().out and token_files(run) == before
    assert audit_run(run, repair=True) == 0
    assert [entry["source"] for entry in TokenShardManifest.load(run / "tokens/train").skipped] == [
        entry["source"] for entry in TokenShardManifest.load(written[0] / "tokens/train").skipped]
    assert audit_run(run) == 0 and audit_run(run, repair=True) == 0, "the recorded identity of the data set is unchanged"
    other = tmp_path / "photos" / open_splits(recipe.data).train.source_name(5)
    other.write_bytes(other.read_bytes()[:-20] + bytes(20))
    assert audit_run(run) == 1, "changes of other images are still detected"


def test_training_continues_after_an_image_can_be_opened_again(tiny_run, written, tmp_path, capsys):
    recipe, _ = run_with_unread_image(tiny_run, written[1], tmp_path)
    train_tokenizer.train(dataclasses.replace(recipe, tokens=dataclasses.replace(recipe.tokens, tokenizer=None)))
    (tmp_path / "away.png").rename(tmp_path / "target.png")
    capsys.readouterr()
    longer = dataclasses.replace(recipe, tokenizer_training=dataclasses.replace(recipe.tokenizer_training, max_steps=8))
    train_tokenizer.train(longer)
    assert "resumed at step 6" in capsys.readouterr().out


def test_identities_of_readable_data_sets_are_unchanged(written, tmp_path):
    """Records made before unread images were listed stay valid."""
    shutil.copytree(written[1], tmp_path / "photos")
    recipe = tiny_recipe(tmp_path / "run", data__source="folder", data__path=tmp_path / "photos", data__validation_fraction=0.2)
    source = open_splits(recipe.data).train
    lines = [json.dumps([source.source_name(index), source.label(index), *size_and_digest(tmp_path / "photos" / source.source_name(index))])
             for index in range(len(source))]
    digest = hashlib.sha256("".join([json.dumps(source.class_names), *lines]).encode()).hexdigest()
    assert source.identity == {"kind": "folder", "version": 2, "split": "train", "count": len(source), "sha256": digest}
    assert comparable_identity(source, source.identity) == source.identity


def size_and_digest(path: Path) -> tuple[int, str]:
    size, content = file_digest(path)
    return size, content.hex()


# --- grids of several tokenizers ---------------------------------------------------------------------------------------------


@pytest.fixture
def run_with_other_grid(run) -> Path:
    """The run after a grid `low` of another tokenizer was added to each image."""
    for split in ("train", "validation"):
        folder = run / "tokens" / split
        manifest, reader = TokenShardManifest.load(folder), TokenShardReader(folder)
        low = Grid("low", 16, 1, 2, token_fingerprint="b" * 64)
        header = dataclasses.replace(manifest.header, grids=[*manifest.grids, low])
        views = [reader.samples(range(len(reader)), view).ids_BT for view in range(len(manifest.views))]
        rows = {index: row for row, index in enumerate(reader.indices_N.tolist())}
        sidecars = [ShardSidecar.load(folder, name) for name in map(shard_name, range(manifest.num_shards))]
        labels = {index: (source, label) for each in sidecars for index, source, label in zip(each.indices, each.sources, each.labels, strict=True)}
        writer = TokenShardWriter(folder, header)
        for number in range(writer.num_shards):
            with writer.shard(number) as shard:
                for record in sidecars[number].skipped:
                    shard.skip(**record)
                for index in sorted({*header.source_indices(number)} & rows.keys()):
                    ids_VT = np.stack([view[rows[index]] for view in views])
                    shard.add(index=index, key=default_key(index), source=labels[index][0], label=labels[index][1],
                              ids={"image": ids_VT, "low": np.full((len(views), 2), index % 16)})
        writer.finish()
    return run


def test_audit_and_repair_with_grids_of_several_tokenizers(run_with_other_grid, capsys):
    run = run_with_other_grid
    manifest = TokenShardManifest.load(run / "tokens/train")
    assert manifest.token_fingerprints == {"image": manifest.token_fingerprint, "low": "b" * 64} and audit_run(run) == 0
    before, shard = token_files(run), run / "tokens/train/shard-000002.tar"
    flip_byte(shard, shard.read_bytes().index(b"\x93NUMPY") + 140)  # an id of `image`
    (run / "tokens/train/shard-000001.json").unlink()
    assert audit_run(run) == 1 and audit_run(run, repair=True) == 0
    assert token_files(run) == before, "the ids of `low` come from the damaged shards"
    content, message = shard.read_bytes(), r"grids of other tokenizers than that of the recipe: low \(tokenizer bbbbbbbbbbbbbbbb\.\.\.\)"
    last_sample = content.rindex(b".image.npy") - len(default_key(0))
    for damaged in (content[:last_sample] + bytes(len(content) - last_sample), content[:last_sample] + b"x" * (len(content) - last_sample),
                    content.replace(b"(9, 2)", b"(2, 9)", 1), content.replace(b"(9, 2)", b"(9, 2 ", 1), None):
        shard.unlink() if damaged is None else shard.write_bytes(damaged)
        with pytest.raises(InputError, match=message):
            audit_run(run, repair=True)
        assert damaged is None or shard.read_bytes() == damaged, "the shard is not replaced"


def test_damaged_ids_of_another_tokenizer_are_named(run_with_other_grid):
    run, shard = run_with_other_grid, run_with_other_grid / "tokens/train/shard-000001.tar"
    content = bytearray(shard.read_bytes())
    place = content.index(b".low.npy") - len(default_key(0)) + 512 + 128  # the first id of `low`, after the headers of tar and npy
    content[place] = (content[place] + 1) % 16
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"An image has changed, .* Or the ids of the grids low, which other tokenizers made, are damaged; restore"):
        audit_run(run, repair=True)
    assert shard.read_bytes() == content
    content[place] = 16
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read from the damaged shard \(grid 'low' has ids from \d+ to 16; allowed: 0 to 15"):
        audit_run(run, repair=True)


@pytest.mark.parametrize("damage", ["manifest deleted", "manifest cut short", "manifest of another recipe"])
@pytest.mark.parametrize("repaired", ["tokens", "tokens/train"])
def test_lost_manifest_of_grids_of_several_tokenizers_is_restored(damage, repaired, run_with_other_grid):
    run = run_with_other_grid
    before = token_files(run)
    DAMAGES[damage][0](run / "tokens/train")
    assert audit_run(run / repaired, repair=True) == 0 and token_files(run) == before


def test_both_manifests_of_grids_of_several_tokenizers_are_lost(run_with_other_grid):
    run = run_with_other_grid
    for manifest in run.glob("tokens/*/manifest.json"):
        manifest.unlink()
    before = token_files(run)
    with pytest.raises(InputError, match=r"tokens/train cannot be repaired: .*does not make: low\. Only the manifest says"):
        audit_run(run, repair=True)
    assert token_files(run) == before


def test_images_that_became_readable_are_not_added_to_grids_of_several_tokenizers(run_with_other_grid, monkeypatch, capsys):
    run, read = run_with_other_grid, FolderSource.read
    (skipped,), before = TokenShardManifest.load(run / "tokens/train").skipped, token_files(run)
    monkeypatch.setattr(FolderSource, "read", lambda source, index: Image.new("L", (24, 20)) if source.source_name(index) == skipped["source"]
                        else read(source, index))
    (run / "tokens/validation/shard-000000.json").unlink()
    capsys.readouterr()
    assert audit_run(run, repair=True) == 1 and token_files(run) == before, "the validation shard is repaired"
    output = capsys.readouterr().out
    assert "1 skipped image can be read now, but cannot be added, because other tokenizers than that of the recipe made the grids low" in output
    assert f"{skipped['source']}: it was skipped" in output and "write all shards again to store it" in output and "--repair encodes it" not in output
