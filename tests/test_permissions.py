"""New files have the permissions that the umask allows. Errors for denied permissions name the file and the user."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines import ImageGenerationPipeline, make_bundle
from pipelines.bundle import find_pipeline, find_tokenizer
from pipelines.stages.stage_inputs import token_fingerprint_of_tokenizer, vocabulary_of_prior
from pipelines.sweep.feature_file import resolve_feature_file
from pipelines.tokens.foreign_tokens import open_foreign_tokens
from pipelines.tokens.repair import load_sidecar
from stage1_tokenizer import perceptual
from stage1_tokenizer.data.data_location import check_data_path
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.find_initial_weights import locate_initial_weights
from stage1_tokenizer.image_files.images import UnreadableImage, read_image
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from tests.tiny import ROOT, command
from token_shards import TokenShardManifest, TokenShardReader
from token_shards.audit import audit_folder
from token_shards.sidecar import ShardSidecar
from token_shards.writer import TokenShardWriter
from vqmosaic.files.durable_files import copy_folder, publish, write_json
from vqmosaic.files.permissions import PermissionDenied, current_umask
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import DataConfig, SamplingConfig
from vqmosaic.runs.launch import exit_code_of
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.runs.stage_records import load_record
from vqmosaic.training.checkpoints import CheckpointFolder, checkpoint_problems

NOBODY = 65534


@contextmanager
def umask(mask: int):
    previous = os.umask(mask)
    try:
        yield
    finally:
        os.umask(previous)


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


def check_modes(folder: Path, mask: int) -> None:
    for name, mode in modes(folder).items():
        assert mode == (0o777 if (folder / name).is_dir() else 0o666) & ~mask, f"{name} has mode {mode:04o}"


# --- new files ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_all_files_of_a_run_follow_the_umask(tmp_path, mask):
    """Exports of all stages, shards, checkpoints, logs, pictures, records, the pipeline and images generated with it."""
    run = tmp_path / "run"
    code = (f"import os; os.umask({mask})\nfrom tests.tiny import make_tiny_run\nmake_tiny_run({str(run)!r})\n"
            f"from pipelines.command_line import dispatch\nrun = {str(run)!r}\n"
            "assert dispatch(['generate', run, '--num', '2', '--out', run + '/samples', '--device', 'cpu']) == 0\n"
            "assert dispatch(['reconstruct', run, run + '/samples/grid.png', '--out', run + '/reconstructions', '--device', 'cpu']) == 0")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300,
                            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    names = modes(run)
    assert {"checkpoints/tokenizer/step-00000006/weights_ema.safetensors", "prior/model.safetensors", "samples/grid.png",
            "tokens/train/manifest.json", "stages/prior.json", "logs/prior/metrics.jsonl", "summary.json"} <= names.keys()
    check_modes(run, mask)


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_saved_models_follow_the_umask(tmp_path, tiny_run, mask):
    for path in (source := shutil.copytree(tiny_run / "pipeline", tmp_path / "source")).rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    with umask(mask):
        out = tmp_path / "out"
        make_bundle(source / "tokenizer", source / "prior", out / "bundle", SamplingConfig())
        pipe = ImageGenerationPipeline.from_pretrained(source, device="cpu")
        pipe.save_pretrained(out / "copied")
        ImageGenerationPipeline(pipe.tokenizer, pipe.prior).save_pretrained(out / "saved")
        pipe.prior.save_pretrained(out / "prior")
    check_modes(out, mask)


def test_a_read_only_folder_can_be_bundled(tmp_path, tiny_run):
    copy_folder(tiny_run / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer").chmod(0o555)
    for _ in range(2):  # the second call replaces the bundle of the first
        make_bundle(tmp_path / "tokenizer", tiny_run / "prior", tmp_path / "out", SamplingConfig())
    check_modes(tmp_path / "out", current_umask())


def test_publishing_adds_permissions_and_removes_none(tmp_path):
    folder = tmp_path / ".partial-folder"
    folder.mkdir(mode=0o700)
    for name, mode in (("private", 0o600), ("program", 0o755), ("shared", 0o664)):
        (folder / name).write_text(name)
        (folder / name).chmod(mode)
    folder.chmod(0o2700)
    (tmp_path / "outside").write_text("of somebody else")
    (tmp_path / "outside").chmod(0o600)
    (folder / "link").symlink_to(tmp_path / "outside")
    with umask(0o022):
        publish(folder, tmp_path / "folder")
    found = modes(tmp_path)
    assert found["outside"] == 0o600 and found["folder"] == 0o2755, "links are not followed, and the setgid bit is kept"
    assert [found[f"folder/{name}"] for name in ("private", "program", "shared")] == [0o644, 0o755, 0o664]


def test_reading_the_umask_does_not_change_it():
    for mask in (0o022, 0o002, 0o077):
        with umask(mask):
            assert current_umask() == mask and os.umask(mask) == mask


# --- denied permissions -----------------------------------------------------------------------------------------


@contextmanager
def as_nobody():
    """Run a block as another user if the current user is root, who may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def folder():
    """A folder that other users may enter, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def deny(path: Path) -> Path:
    path.chmod(0)
    return path


READERS = {
    "tokenizer config": ("run/tokenizer/config.json", lambda folder: ImageTokenizer.from_pretrained(folder / "run/tokenizer")),
    "tokenizer weights": ("run/tokenizer/model.safetensors", lambda folder: ImageTokenizer.from_pretrained(folder / "run/tokenizer")),
    "tokenizer folder": ("run/tokenizer", lambda folder: ImageTokenizer.from_pretrained(folder / "run/tokenizer")),
    "tokenizer fingerprint": ("run/tokenizer/config.json", lambda folder: token_fingerprint_of_tokenizer(folder / "run/tokenizer")),
    "prior config": ("run/prior/config.json", lambda folder: TokenPrior.from_pretrained(folder / "run/prior")),
    "prior weights": ("run/prior/model.safetensors", lambda folder: TokenPrior.from_pretrained(folder / "run/prior")),
    "prior digests": ("run/prior/digests.json", lambda folder: TokenPrior.from_pretrained(folder / "run/prior")),
    "prior folder": ("run/prior", lambda folder: TokenPrior.from_pretrained(folder / "run/prior")),
    "vocabulary of a prior": ("run/prior/model.safetensors", lambda folder: vocabulary_of_prior(folder / "run/prior")),
    "vocabulary": ("run/prior/vocabulary.json", lambda folder: Vocabulary.load(folder / "run/prior")),
    "pipeline": ("run/pipeline/pipeline.json", lambda folder: ImageGenerationPipeline.from_pretrained(folder / "run", device="cpu")),
    "pipeline folder": ("run/pipeline", lambda folder: find_pipeline(folder / "run")),
    "run folder": ("run", lambda folder: find_pipeline(folder / "run")),
    "tokenizer of a run": ("run/pipeline/tokenizer", lambda folder: find_tokenizer(folder / "run")),
    "manifest": ("run/tokens/train/manifest.json", lambda folder: TokenShardManifest.load(folder / "run/tokens/train")),
    "sidecar": ("run/tokens/train/shard-000000.json", lambda folder: ShardSidecar.load(folder / "run/tokens/train", "shard-000000.tar")),
    "sidecar for the reader": ("run/tokens/train/shard-000001.json", lambda folder: TokenShardReader(folder / "run/tokens/train")),
    "shard for the reader": ("run/tokens/train/shard-000001.tar", lambda folder: TokenShardReader(folder / "run/tokens/train")),
    "shard for the audit": ("run/tokens/train/shard-000001.tar", lambda folder: audit_folder(folder / "run/tokens/train")),
    "sidecar for a repair": ("run/tokens/train/shard-000001.json", lambda folder: load_sidecar(folder / "run/tokens/train", "shard-000001.tar")),
    "sidecar for the writer": ("run/tokens/train/shard-000001.json", lambda folder: TokenShardWriter(
        folder / "run/tokens/train", TokenShardManifest.load(folder / "run/tokens/train").header).is_complete(1)),
    "checkpoint": ("run/checkpoints/prior/step-00000006/model.safetensors",
                   lambda folder: checkpoint_problems(folder / "run/checkpoints/prior/step-00000006")),
    "newest checkpoint": ("run/checkpoints/prior/step-00000006/checksums.json",
                          lambda folder: CheckpointFolder(folder / "run/checkpoints/prior").choose("auto")),
    "checkpoints": ("run/checkpoints/prior", lambda folder: CheckpointFolder(folder / "run/checkpoints/prior").choose("auto")),
    "stage record": ("run/stages/prior.json", lambda folder: load_record(RunFolder(folder / "run"), "prior")),
    "recipe": ("run/recipe.yaml", lambda folder: load_recipe(str(folder / "run"))),
    "initial weights": ("run/tokenizer/model.safetensors", lambda folder: locate_initial_weights(str(folder / "run"))),
    "initial config": ("run/tokenizer/config.json", lambda folder: locate_initial_weights(str(folder / "run/tokenizer"))),
    "image folder": ("images/cat", lambda folder: open_splits(DataConfig(source="folder", path=str(folder / "images")))),
    "image folder's names": ("images/cat", lambda folder: check_data_path(DataConfig(source="folder", path=str(folder / "images")))),
    "metadata of a folder": ("images/metadata.csv", lambda folder: open_splits(DataConfig(path=str(folder / "images"), label_column="kind"))),
    "table of a data set": ("tables/data.parquet", lambda folder: open_splits(DataConfig(path=str(folder / "tables")))),
    "features": ("features.pt", lambda folder: resolve_feature_file(folder / "features.pt", None)),
    "perceptual weights": ("weights.safetensors", lambda folder: perceptual._read_weights(folder / "weights.safetensors", {"a": torch.zeros(1)})),
    "npy file": ("codes.npy", lambda folder: open_foreign_tokens(folder / "codes.npy", None, True)),
    "JSON lines": ("codes.jsonl", lambda folder: open_foreign_tokens(folder / "codes.jsonl", None, True)),
}


@pytest.mark.parametrize(("denied", "read"), READERS.values(), ids=list(READERS))
def test_an_unreadable_file_is_reported_as_permission_denied(folder, tiny_run, denied, read):
    copy_folder(tiny_run, folder / "run")
    (folder / "images/cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images/cat/0.png")
    (folder / "images/metadata.csv").write_text("file_name,kind\ncat/0.png,cat\n")
    save_file({"a": torch.zeros(1)}, folder / "weights.safetensors")
    (folder / "weights.safetensors").chmod(0o644)
    (folder / "features.pt").write_bytes(b"code")
    (folder / "tables").mkdir()
    (folder / "tables/data.parquet").write_bytes(b"table")
    np.save(folder / "codes.npy", np.zeros((2, 4), dtype=np.int64))
    (folder / "codes.jsonl").write_text('{"tokens": [1, 2]}\n')
    if denied.endswith(("json", "safetensors", "tar", "yaml", "parquet")):  # another user may not be able to read the libraries
        import_libraries(read, folder)
    path = deny(folder / denied)
    with as_nobody(), pytest.raises(PermissionDenied) as caught:
        read(folder)
    message = str(caught.value)
    user = "nobody" if os.geteuid() == 0 else ""
    assert "permission denied" in message and user in message and str(path) in message and "mode 0000" in message
    path.chmod(0o755)


def test_granting_permission_later_keeps_the_recorded_identity(folder):
    """If permission is granted later, the data set still matches the recorded one. Changes of its other images are still detected."""
    (folder / "images/cat").mkdir(parents=True)
    for number in range(4):
        Image.new("L", (8, 8), number).save(folder / f"images/cat/{number}.png")
    data = DataConfig(path=str(folder / "images"), use_labels=False, train_split=".")
    denied = folder / "images" / open_splits(data).train.source_name(0)
    denied.chmod(0)
    with as_nobody():
        splits = open_splits(data)
        inputs = {"data set": splits.fingerprint, **splits.unread_input}
    assert json.loads(inputs["unread images"]) == {"train": [0], "validation": []}
    denied.chmod(0o644)
    reopened = open_splits(data)
    assert reopened.fingerprint != inputs["data set"] and not reopened.unread_input
    assert reopened.as_recorded(inputs).fingerprint == inputs["data set"] and reopened.as_recorded(inputs).unread_input.items() <= inputs.items()
    changed = folder / "images" / reopened.train.source_name(1)
    changed.write_bytes(denied.read_bytes())
    assert open_splits(data).as_recorded(inputs).fingerprint != inputs["data set"]


def import_libraries(read, folder: Path) -> None:
    with suppress(ValueError):
        read(folder)


def test_an_unreadable_image_is_not_reported_as_corrupt(folder):
    Image.new("RGB", (8, 8)).save(folder / "image.png")
    read_image(folder / "image.png")
    deny(folder / "image.png")
    with as_nobody(), pytest.raises(UnreadableImage, match=r"^permission denied: the user .* may not read .*image\.png") as caught:
        read_image(folder / "image.png")
    assert "corrupt" not in str(caught.value)


def test_folders_without_write_permission_are_named(folder, tiny_run):
    tokenizer, prior = ImageTokenizer.from_pretrained(tiny_run / "tokenizer"), TokenPrior.from_pretrained(tiny_run / "prior")
    with umask(0), tempfile.TemporaryDirectory() as elsewhere:  # imports libraries while they are readable
        tokenizer.save_pretrained(Path(elsewhere) / "tokenizer")
        prior.save_pretrained(Path(elsewhere) / "prior")
    folder.chmod(0o555)
    for save in (lambda: tokenizer.save_pretrained(folder / "new"), lambda: prior.save_pretrained(folder / "new"),
                 lambda: write_json(folder / "new.json", {})):
        with as_nobody(), pytest.raises(PermissionDenied) as caught:
            save()
        assert f"may not write into the folder {folder} (owner" in str(caught.value)
    assert not list(folder.iterdir())
    folder.chmod(0o755)


def test_the_command_reports_denied_permission_without_traceback(folder, capsys):
    (folder / "file").write_text("x")
    deny(folder / "file")
    with as_nobody():
        code = exit_code_of(lambda: (folder / "file").read_text())
    assert code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: permission denied: the user") and f"may not read {folder / 'file'}" in err and "Traceback" not in err


def test_reconstruct_reports_an_unreadable_image(tmp_path, tiny_run):
    if os.geteuid() == 0:
        pytest.skip("root may read everything, and another user cannot start Python from root's home")
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    deny(tmp_path / "image.png")
    result = command("reconstruct", tiny_run, tmp_path / "image.png", "--out", tmp_path / "out")
    assert result.returncode == 2 and "permission denied" in result.stderr and "known format" not in result.stderr
