"""import-tokens and export-tokens: layouts, checks before writing, resuming, and training a prior on imported tokens."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines import make_bundle
from pipelines.command_line import dispatch
from pipelines.tokens import import_tokens
from pipelines.tokens.foreign_tokens import TokenLines, open_foreign_tokens
from stage2_prior.prior import TokenPrior
from stage2_prior.train import train
from tests.run_files import file_contents
from tests.tiny import CODES, GRID_SIZE, ROOT, command, tiny_recipe
from token_shards import Grid, ShardSetHeader, TokenShardManifest, TokenShardReader, TokenShardWriter, default_key
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.interruption import Interrupted

ROWS, VIEWS, CLASSES, TOKENS = 60, 2, 5, GRID_SIZE**2
IDS_NVT = np.random.default_rng(0).integers(0, CODES, (ROWS, VIEWS, TOKENS))
LABELS_N = np.arange(ROWS) % CLASSES
LABELS = LABELS_N.tolist()
COMMON = ("--codebook_size", CODES, "--token_fingerprint", "made-up")


def run(*arguments: object) -> int:
    return dispatch([str(argument) for argument in arguments])


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


def write_array(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, allow_pickle=False)
    return path


def records_of(ids_NVT=IDS_NVT, labels=LABELS) -> list[dict]:
    return [{"class_id": label, "tokens": ids_VT.tolist() if len(ids_VT) > 1 else ids_VT[0].tolist()}
            for ids_VT, label in zip(ids_NVT, labels, strict=True)]


# as_*: write the tokens in one layout, and return the arguments of import-tokens for them


def as_lines(folder: Path, ids_NVT=IDS_NVT) -> list[object]:
    return [write_lines(folder / "tokens.jsonl", records_of(ids_NVT))]


def as_files(folder: Path, ids_NVT=IDS_NVT) -> list[object]:
    """The output of LlamaGen's extract_codes_c2i.py: codes (1, V, T) and labels (1,) of int64."""
    for row, ids_VT in enumerate(ids_NVT):
        write_array(folder / f"llama/digits16_codes/{row}.npy", ids_VT[None])
        write_array(folder / f"llama/digits16_labels/{row}.npy", LABELS_N[row:row + 1])
    return [folder / "llama"]


def as_array(folder: Path, ids_NVT=IDS_NVT) -> list[object]:
    return [write_array(folder / "codes.npy", ids_NVT.astype(np.uint16)), "--labels", write_array(folder / "labels.npy", LABELS_N)]


def as_flat_array(folder: Path, ids_NVT=IDS_NVT) -> list[object]:
    return [write_array(folder / "codes.npy", ids_NVT[:, 0].astype(np.int32)), "--labels", write_array(folder / "labels.npy", LABELS_N)]


def stored(tokens: Path) -> dict[int, tuple[np.ndarray, int]]:
    """Stored views (V, T) and label of each source row, from both splits."""
    found = {}
    for split in ("train", "validation"):
        reader = TokenShardReader(tokens / split)
        views = [reader.sequential(0, len(reader), view) for view in range(len(reader.manifest.views))]
        rows = []
        for shard in reader.manifest.shards:
            sidecar = json.loads((tokens / split / shard.name).with_suffix(".json").read_text())
            # the row in a name such as tokens.jsonl:17, digits16_codes/17.npy or codes.npy[17]
            rows += [int("".join(filter(str.isdigit, source.rpartition("/")[2].rpartition("jsonl")[2]))) for source in sidecar["sources"]]
        for number, row in enumerate(rows):
            assert row not in found, "a row is stored once"
            found[row] = np.stack([view.ids_BT[number] for view in views]), int(views[0].labels_B[number])
    return found


# --- the layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "views", "first_row"), [(as_lines, 2, 1), (as_files, 2, 0), (as_array, 2, 0), (as_flat_array, 1, 0)])
def test_every_row_is_stored_once_with_its_views_and_label(tmp_path, layout, views, first_row, capsys):
    assert run("import-tokens", *layout(tmp_path), *COMMON, "--out", tmp_path / "tokens", "--images_per_shard", 7) == 0
    found = stored(tmp_path / "tokens")
    assert sorted(found) == list(range(first_row, ROWS + first_row))
    for row, (ids_VT, label) in found.items():
        np.testing.assert_array_equal(ids_VT, IDS_NVT[row - first_row, :views])
        assert label == LABELS[row - first_row]
    train_manifest, held_out = (TokenShardManifest.load(tmp_path / "tokens" / split) for split in ("train", "validation"))
    assert train_manifest.token_fingerprint == held_out.token_fingerprint == "imported:made-up"
    assert train_manifest.class_names == ["0", "1", "2", "3", "4"] and (train_manifest.grids[0].height, train_manifest.grids[0].width) == (4, 4)
    assert 1 <= held_out.num_samples < 12 and train_manifest.num_samples + held_out.num_samples == ROWS
    capsys.readouterr()
    assert run("audit", tmp_path / "tokens") == 0, capsys.readouterr().out
    with pytest.raises(InputError, match=r"imported tokens, which cannot be encoded again\. Run `import-tokens` again"):
        run("audit", tmp_path / "tokens", "--repair")


def test_imported_tokens_are_recognized_by_the_other_manifest(tmp_path):
    run("import-tokens", *as_array(tmp_path), *COMMON, "--out", tmp_path / "tokens")
    (tmp_path / "tokens" / "train" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="imported tokens, which cannot be encoded again"):
        run("audit", tmp_path / "tokens", "--repair")


def test_fingerprint_does_not_depend_on_the_layout(tmp_path):
    seen = set()
    for number, layout in enumerate((as_lines, as_files, as_array)):
        run("import-tokens", *layout(tmp_path), "--codebook_size", CODES, "--out", tmp_path / str(number))
        seen.add(TokenShardManifest.load(tmp_path / str(number) / "train").token_fingerprint)
    changed = IDS_NVT.copy()
    changed[-1, -1, -1] = (changed[-1, -1, -1] + 1) % CODES
    run("import-tokens", *as_array(tmp_path, changed), "--codebook_size", CODES, "--out", tmp_path / "changed")
    (fingerprint,) = seen
    assert len(fingerprint) == len("imported:") + 64
    assert TokenShardManifest.load(tmp_path / "changed/train").token_fingerprint != fingerprint


def test_newlines_and_blank_lines_at_the_end_are_optional(tmp_path):
    text = "\n".join(json.dumps(record) for record in records_of())
    for ending in ("", "\n", "\r\n\n  \n"):
        path = tmp_path / "tokens.jsonl"
        path.write_text(text + ending)
        rows = open_foreign_tokens(path, None, False)
        assert len(rows) == ROWS
        np.testing.assert_array_equal(rows.read(ROWS - 1)[0], IDS_NVT[-1])
        np.testing.assert_array_equal(rows.read(0)[0], IDS_NVT[0])


GRIDS_NVhw = IDS_NVT.reshape(ROWS, VIEWS, GRID_SIZE, GRID_SIZE)


@pytest.mark.parametrize(("write", "options"), [
    (as_array, []), (as_lines, []), (as_files, []),
    (as_array, ["--height", GRID_SIZE, "--width", GRID_SIZE]),
], ids=["array", "lines", "files", "array with its size"])
@pytest.mark.parametrize("views", [1, VIEWS])
def test_ids_with_grid_shape_define_the_grid(tmp_path, write, options, views):
    ids = GRIDS_NVhw if views > 1 else GRIDS_NVhw[:, 0]
    assert run("import-tokens", *write(tmp_path, ids), *COMMON, *options, "--out", tmp_path / "tokens") == 0
    found = stored(tmp_path / "tokens")
    for row in range(ROWS):
        np.testing.assert_array_equal(found[row + min(found)][0], IDS_NVT[row, :views])  # lines are counted from 1
    grid = TokenShardManifest.load(tmp_path / "tokens/train").grids[0]
    assert (grid.height, grid.width) == (GRID_SIZE, GRID_SIZE)


def test_grid_size_options_resolve_ambiguous_shapes(tmp_path):
    ids_NVT = IDS_NVT.reshape(ROWS, VIEWS * 4, 4)[:, :4]
    assert run("import-tokens", *as_array(tmp_path, ids_NVT), *COMMON, "--height", 2, "--width", 2, "--out", tmp_path / "tokens") == 0
    manifest = TokenShardManifest.load(tmp_path / "tokens/train")
    assert len(manifest.views) == 4 and (manifest.grids[0].height, manifest.grids[0].width) == (2, 2)
    np.testing.assert_array_equal(stored(tmp_path / "tokens")[5][0], ids_NVT[5])


def test_class_name_lists_may_exceed_the_file_name_limit(tmp_path):
    names = [f"a class with the number {number}" for number in range(40)]
    assert run("import-tokens", *as_lines(tmp_path), *COMMON, "--class_names", ",".join(names), "--out", tmp_path / "tokens") == 0
    assert TokenShardManifest.load(tmp_path / "tokens/train").class_names == names


@pytest.mark.parametrize("name", ["tokens.json", "tokens.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_arrays_are_rejected(tmp_path, name, indent):
    path = tmp_path / name
    path.write_text(json.dumps(records_of(), indent=indent))
    with pytest.raises(InputError, match=f"{name} is a JSON array; expected JSON lines"):
        run("import-tokens", path, *COMMON, "--out", tmp_path / "tokens")


@pytest.mark.parametrize("name", ["codes.npz", "codes.npy", "codes"])
def test_npz_files_are_rejected_with_their_array_names(tmp_path, name):
    np.savez(tmp_path / "codes.npz", ids=IDS_NVT, labels=LABELS_N)
    (tmp_path / "codes.npz").rename(tmp_path / name)
    with pytest.raises(InputError, match=r"such as an npz file\. Save one array .*NAME is one of 'ids', 'labels'"):
        run("import-tokens", tmp_path / name, "--unlabelled", *COMMON, "--out", tmp_path / "tokens")


def test_validation_file_class_names_and_unlabelled_images(tmp_path):
    names = write_lines(tmp_path / "names.txt", [f"class {number}" for number in range(7)])
    held_out = write_lines(tmp_path / "held-out.jsonl", records_of(IDS_NVT[:9, :1], [*LABELS[:8], None]))
    assert run("import-tokens", *as_lines(tmp_path), *COMMON, "--validation", held_out, "--class_names", names, "--out", tmp_path / "tokens") == 0
    train_reader, held_out_reader = TokenShardReader(tmp_path / "tokens/train"), TokenShardReader(tmp_path / "tokens/validation")
    assert (len(train_reader), len(held_out_reader)) == (ROWS, 9)
    np.testing.assert_array_equal(held_out_reader.sequential(0, 9).ids_BT, IDS_NVT[:9, 0])  # a shard keeps the order of the rows
    assert held_out_reader.labels_N.tolist() == [*LABELS[:8], -1]
    assert train_reader.manifest.class_names == held_out_reader.manifest.class_names == [f"class {number}" for number in range(7)]
    assert run("import-tokens", *as_lines(tmp_path), *COMMON, "--unlabelled", "--out", tmp_path / "plain") == 0
    assert TokenShardManifest.load(tmp_path / "plain/train").class_names is None
    assert (TokenShardReader(tmp_path / "plain/train").labels_N == -1).all()


# --- invalid input -----------------------------------------------------------------------------------------------------------


def with_record(row: int, record: object) -> list:
    return [*records_of()[:row], record, *records_of()[row + 1:]]


VALID_IDS = IDS_NVT[0].tolist()


@pytest.mark.parametrize(("record", "message"), [
    ({"class_id": 1, "tokens": [VALID_IDS[0], [*VALID_IDS[1][:-1], CODES]]}, rf"line 18: the ids run from \d+ to {CODES}; allowed: 0 to {CODES - 1}"),
    ({"class_id": 1, "tokens": [VALID_IDS[0], [-1, *VALID_IDS[1][1:]]]}, "line 18: the ids run from -1"),
    ({"class_id": 1, "tokens": [VALID_IDS[0][:-1], VALID_IDS[1][:-1]]}, "line 18 has 2 views of 15 tokens, but the rows before it have 2 of 16"),
    ({"class_id": 1, "tokens": VALID_IDS[0]}, "line 18 has 1 view of 16"),
    ({"class_id": 1, "tokens": [VALID_IDS[0], VALID_IDS[1][:-1]]}, "line 18: .*unequal lengths"),
    ({"class_id": 1, "tokens": [VALID_IDS[0], [0.5, *VALID_IDS[1][1:]]]}, "line 18: the tokens are not all integers"),
    ({"class_id": 1, "tokens": [VALID_IDS[0], ["7", *VALID_IDS[1][1:]]]}, "line 18: the tokens are not all integers"),
    ({"class_id": 1, "tokens": []}, "line 18: the tokens have the shape"),
    ({"class_id": 1}, "line 18: expected an object"),
    ({"tokens": VALID_IDS}, "line 18 has no class_id"),
    ({"class_id": 1.0, "tokens": VALID_IDS}, "line 18: class_id is 1.0; allowed: an integer, or null"),
    ({"class_id": True, "tokens": VALID_IDS}, "line 18: class_id is True"),
    ({"class_id": -1, "tokens": VALID_IDS}, "line 18: the label is -1; allowed: 0 to 999999 without --class_names"),
    ({"class_id": 2**31 - 1, "tokens": VALID_IDS}, "line 18: the label is 2147483647; allowed: 0 to 999999"),
    ('{"class_id": 1, "tokens": [3, 4', "line 18 is not JSON"),
    ("", "line 18 is blank; each line must be an image"),
    ("[" * 100_000, "line 18 is not JSON"),
    ("17", "line 18: expected an object"),
])
def test_invalid_lines_are_reported_before_writing(tmp_path, record, message):
    path = write_lines(tmp_path / "tokens.jsonl", with_record(17, record))
    with pytest.raises(InputError, match=message) as error:
        run("import-tokens", path, *COMMON, "--out", tmp_path / "tokens")
    assert str(path) in str(error.value) and not (tmp_path / "tokens").exists()


def damaged_files(folder: Path, name: str, array: np.ndarray | None) -> list[object]:
    source = as_files(folder)
    path = folder / "llama" / name
    if array is None:
        path.unlink()
    else:
        np.save(path, array, allow_pickle=array.dtype.kind == "O")  # object arrays are pickled and must not be loaded
    return source


@pytest.mark.parametrize(("name", "array", "message"), [
    ("digits16_codes/17.npy", IDS_NVT[:1] + CODES, r"17\.npy: the ids run from"),
    ("digits16_codes/17.npy", IDS_NVT[:2], r"17\.npy has the shape \(2, 2, 16\); expected \(1, views, tokens\)"),
    ("digits16_codes/17.npy", IDS_NVT[:1, :1], r"17\.npy has 1 view of 16"),
    ("digits16_codes/17.npy", IDS_NVT[:1].astype(np.float32), r"17\.npy: the tokens are not all integers \(float32\)"),
    ("digits16_codes/17.npy", np.array([{}], dtype=object), r"17\.npy cannot be read as an npy file: .*allow_pickle=False"),
    ("digits16_codes/17.npy", None, r"17\.npy is missing; the 59 files"),
    ("digits16_codes/extra.npy", IDS_NVT[:1], r"extra\.npy: the codes must be named 0\.npy"),
    ("digits16_labels/17.npy", None, r"digits16_labels/17\.npy, the label of .*digits16_codes/17\.npy, is missing"),
    ("digits16_labels/17.npy", np.array([1, 2]), r"digits16_labels/17\.npy is int64 with the shape \(2,\); expected one integer"),
    ("digits16_labels/17.npy", np.array([0.5]), "expected one integer"),
])
def test_invalid_files_are_reported_before_writing(tmp_path, name, array, message):
    with pytest.raises(InputError, match=message):
        run("import-tokens", *damaged_files(tmp_path, name, array), *COMMON, "--out", tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(("codes", "labels", "message"), [
    (IDS_NVT * 1.0, LABELS_N, r"codes.npy is float64 with the shape \(60, 2, 16\); expected integers"),
    (IDS_NVT[0, 0], LABELS_N, r"codes.npy is int64 with the shape \(16,\)"),
    (IDS_NVT, LABELS_N[:-1], r"labels.npy is int64 with the shape \(59,\); expected 60 integers"),
    (IDS_NVT, LABELS_N * 1.0, r"labels.npy is float64"),
    (IDS_NVT, None, "codes.npy has no labels; give the labels, or --unlabelled"),
    (np.where(np.arange(ROWS)[:, None, None] == 33, CODES, IDS_NVT), LABELS_N, "codes.npy, row 33: the ids run from 32 to 32"),
    (IDS_NVT, np.where(np.arange(ROWS) == 33, -2, LABELS_N), "codes.npy, row 33: the label is -2"),
    (IDS_NVT, np.where(np.arange(ROWS) == 33, 2**31 - 1, LABELS_N), "codes.npy, row 33: the label is 2147483647"),
    (IDS_NVT.swapaxes(1, 2)[:, :, [0] * 9], LABELS_N,
     r"row 0: the tokens have the shape \(16, 9\).* --height 16 --width 9 for a grid .*, or --height 3 --width 3 for 16 views"),
    (IDS_NVT[:, :, :15], LABELS_N, "15 tokens per view, which is not a square number; give --height and --width"),
    (IDS_NVT[:1], LABELS_N[:1], "has 1 row; at least 2 are needed"),
])
def test_invalid_arrays_are_reported_before_writing(tmp_path, codes, labels, message):
    given = [] if labels is None else ["--labels", write_array(tmp_path / "labels.npy", labels)]
    with pytest.raises(InputError, match=message):
        run("import-tokens", write_array(tmp_path / "codes.npy", codes), *given, *COMMON, "--out", tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(("options", "message"), [
    ([], "--codebook_size is not given"),
    ([*COMMON, "--height", 4], "--height is 4 and --width is None; give both"),
    ([*COMMON, "--height", 2, "--width", 4], "the grid 2 x 4 x 1 of --height and --width has 8"),
    ([*COMMON, "--validation_fraction", 1.5], "--validation_fraction is 1.5"),
    ([*COMMON, "--validation_labels", "x.npy"], "but --validation is not given"),
    ([*COMMON, "--class_names", "a,b,c"], "line 4: the label is 3; allowed: 0 to 2, as in --class_names"),
    ([*COMMON, "--class_names", "a,b,a"], "'a' is repeated"),
    ([*COMMON, "--class_names", "a,,b"], "a name is empty"),
    ([*COMMON, "--unlabelled", "--class_names", "a,b"], "no row of .* has a label"),
    ([*COMMON, "--tokenizer", "x"], "--tokenizer and --token_fingerprint are both given"),
    (["--codebook_size", CODES, "--token_fingerprint", "a b"], "allowed: 1 to 200 letters"),
    ([*COMMON, "--labels", "nowhere.npy"], "'nowhere.npy', which does not exist"),
    (["--tokenizer", "nowhere"], "nowhere is not a tokenizer"),
    (["--tokenizer", "x", "--grid", "low"], "--grid and --tokenizer are both given; the tokenizer names its grids. Omit --grid."),
])
def test_invalid_options_are_rejected(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run("import-tokens", *as_lines(tmp_path), *options, "--out", tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_command_reports_invalid_input_and_does_not_load_torch(tmp_path):
    path = write_lines(tmp_path / "tokens.jsonl", with_record(17, "{"))
    result = command("import-tokens", path, *COMMON, "--out", tmp_path / "tokens")
    assert result.returncode == 2 and result.stderr.startswith("error: ") and "line 18 is not JSON" in result.stderr
    source = as_lines(tmp_path)[0]
    code = ("import sys\nfrom pipelines.command_line import dispatch\n"
            f"dispatch({['import-tokens', str(source), *map(str, COMMON), '--out', str(tmp_path / 'tokens')]})\n"
            f"dispatch({['export-tokens', str(tmp_path / 'tokens/train'), '--out', str(tmp_path / 'out.jsonl')]})\n"
            "print('torch' in sys.modules)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "False"


# --- interruption ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [0, 5])
def test_resumed_import_writes_the_same_bytes(tmp_path, finished):
    call = [str(word) for word in ("import-tokens", *as_lines(tmp_path), *COMMON, "--images_per_shard", 5, "--out")]
    assert run(*call, tmp_path / "straight") == 0
    killed = tmp_path / "killed"
    code = ("import os, signal\nfrom pathlib import Path\nfrom token_shards.sidecar import ShardSidecar\nsave = ShardSidecar.save\n"
            "def save_or_die(sidecar, folder):\n"
            f"    if len(list(Path(folder).glob('shard-*.json'))) == {finished}:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    save(sidecar, folder)\nShardSidecar.save = save_or_die\n"
            f"from pipelines.command_line import dispatch\ndispatch({[*call, str(killed)]})")
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert process.returncode == -signal.SIGKILL, process.stderr  # between a shard and its sidecar
    before = {path: path.stat().st_mtime_ns for path in killed.glob("train/shard-*.json")}
    assert len(before) == finished and len(list(killed.glob("train/shard-*.tar"))) == finished + 1
    assert not (killed / "train/manifest.json").exists()
    assert run(*call, killed) == 0
    assert file_contents(killed) == file_contents(tmp_path / "straight")
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items()), "finished shards are not rewritten"
    assert run(*call, killed) == 0  # already finished: nothing changes
    assert file_contents(killed) == file_contents(tmp_path / "straight")


@pytest.mark.parametrize("pattern", ["train/manifest.json", "train/*", "*/shard-00000[13].*", "nothing"])
def test_imports_of_version_0_1_0_continue_in_row_order(tmp_path, pattern, monkeypatch):
    """Version 0.1.0 did not permute rows."""
    call = [str(word) for word in ("import-tokens", *as_lines(tmp_path), *COMMON, "--images_per_shard", 5, "--out")]
    with monkeypatch.context() as patch:
        patch.setattr(import_tokens, "ORDER_SEED", None)
        run(*call, tmp_path / "old")
    before = file_contents(tmp_path / "old")
    assert b"order_seed" not in before["train/manifest.json"]
    for path in (tmp_path / "old").glob(pattern):
        path.unlink()
    assert run(*call, tmp_path / "old") == 0
    assert file_contents(tmp_path / "old") == before
    run(*call, tmp_path / "new")
    assert TokenShardManifest.load(tmp_path / "new/train").order_seed == import_tokens.ORDER_SEED
    assert file_contents(tmp_path / "new")["train/shard-000000.tar"] != before["train/shard-000000.tar"]


def test_signal_stops_an_import_between_images(tmp_path, monkeypatch):
    read, calls = TokenLines.read, []

    def read_and_signal(self, row):
        calls.append(row)
        if len(calls) == ROWS + 20:  # in the second pass over the lines
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, row)

    monkeypatch.setattr(TokenLines, "read", read_and_signal)
    with pytest.raises(Interrupted) as error:
        run("import-tokens", *as_lines(tmp_path), *COMMON, "--images_per_shard", 5, "--out", tmp_path / "tokens")
    assert error.value.exit_code == 143 and list(tmp_path.rglob("shard-*.json"))
    assert not list(tmp_path.rglob(".partial-*")) and not list(tmp_path.rglob("manifest.json"))


def test_other_shards_are_not_overwritten(tmp_path, tiny_run):
    source, run_before = as_lines(tmp_path), file_contents(tiny_run / "tokens")
    with pytest.raises(InputError, match="contains other token shards"):
        run("import-tokens", *source, *COMMON, "--out", tiny_run / "tokens")
    assert file_contents(tiny_run / "tokens") == run_before
    run("import-tokens", *source, *COMMON, "--out", tmp_path / "tokens")
    before = file_contents(tmp_path / "tokens")
    with pytest.raises(InputError, match="imported with other options"):
        run("import-tokens", *source, *COMMON, "--class_names", "a,b,c,d,e", "--out", tmp_path / "tokens")
    (tmp_path / "tokens/train/manifest.json").unlink()
    with pytest.raises(InputError, match="imported with other options"):
        run("import-tokens", *source, *COMMON, "--images_per_shard", 9, "--out", tmp_path / "tokens")
    run("import-tokens", *source, *COMMON, "--out", tmp_path / "tokens")
    assert file_contents(tmp_path / "tokens") == before


# --- export ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 2])
def test_export_reverses_import(tmp_path, views):
    labels = [None if row == 11 else label for row, label in enumerate(LABELS)]
    source = write_lines(tmp_path / "tokens.jsonl", records_of(IDS_NVT[:, :views], labels))
    run("import-tokens", source, *COMMON, "--validation", source, "--images_per_shard", 13, "--out", tmp_path / "tokens")
    assert run("export-tokens", tmp_path / "tokens/train", "--out", tmp_path / "back.jsonl") == 0
    assert (tmp_path / "back.jsonl").read_text() == source.read_text(), "in row order, not in shard order"
    assert run("export-tokens", tmp_path / "tokens/train", "--out", tmp_path / "flat.jsonl", "--one_view_a_line") == 0
    lines = [json.loads(line) for line in (tmp_path / "flat.jsonl").read_text().splitlines()]
    np.testing.assert_array_equal([line["tokens"] for line in lines], IDS_NVT[:, :views].reshape(-1, TOKENS))
    assert [line["class_id"] for line in lines] == [label for label in labels for _ in range(views)]


def test_export_rejects_existing_files_and_folders_without_shards(tmp_path):
    run("import-tokens", *as_lines(tmp_path), *COMMON, "--out", tmp_path / "tokens")
    (tmp_path / "mine.jsonl").write_text("kept")
    with pytest.raises(InputError, match="which exists"):
        run("export-tokens", tmp_path / "tokens/train", "--out", tmp_path / "mine.jsonl")
    with pytest.raises(InputError, match="contains no shards"):
        run("export-tokens", tmp_path / "tokens", "--out", tmp_path / "new.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "kept" and not list(tmp_path.glob("*new.jsonl"))


def test_export_and_import_of_one_of_several_grids(tmp_path):
    grids = [Grid("image", CODES, GRID_SIZE, GRID_SIZE), Grid("low", CODES, 1, 2, token_fingerprint="b" * 64)]
    header = ShardSetHeader(split="train", token_fingerprint="a" * 64, grids=grids, views=[{"name": str(view)} for view in range(VIEWS)],
                            class_names=["0", "1", "2", "3", "4"], dataset={"name": "made up"}, encoding={}, images_per_shard=25, num_sources=ROWS)
    writer = TokenShardWriter(tmp_path / "both", header)
    for number in range(writer.num_shards):
        with writer.shard(number) as shard:
            for index in header.source_indices(number):
                shard.add(index=index, key=default_key(index), source=str(index), label=LABELS[index],
                          ids={"image": IDS_NVT[index], "low": IDS_NVT[index, :, :2]})
    writer.finish()
    assert run("export-tokens", tmp_path / "both", "--out", tmp_path / "all.jsonl") == 0
    both_NVT = np.concatenate([IDS_NVT, IDS_NVT[..., :2]], axis=2)
    assert [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()] == records_of(both_NVT)
    with pytest.raises(InputError, match="--grid is 'loww'; allowed: image, low"):
        run("export-tokens", tmp_path / "both", "--grid", "loww", "--out", tmp_path / "none.jsonl")
    for name, ids_NVT in (("image", IDS_NVT), ("low", IDS_NVT[..., :2])):
        assert run("export-tokens", tmp_path / "both", "--grid", name, "--out", tmp_path / f"{name}.jsonl") == 0
        assert [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] == records_of(ids_NVT)
    run("import-tokens", tmp_path / "low.jsonl", *COMMON, "--grid", "low", "--height", 1, "--width", 2, "--out", tmp_path / "imported")
    assert [grid.name for grid in TokenShardManifest.load(tmp_path / "imported/train").grids] == ["low"]
    with pytest.raises(InputError, match="The grid name is 'Low'"):
        run("import-tokens", tmp_path / "low.jsonl", *COMMON, "--grid", "Low", "--height", 1, "--width", 2, "--out", tmp_path / "other")


# --- training and bundling ---------------------------------------------------------------------------------------------------


def test_prior_trains_on_imported_tokens_and_rejects_another_tokenizer(tmp_path, tiny_run):
    run("import-tokens", *as_files(tmp_path), *COMMON, "--out", tmp_path / "tokens")
    recipe = tiny_recipe(tmp_path / "run", prior_training__tokens=tmp_path / "tokens")
    train(recipe)
    prior = TokenPrior.from_pretrained(tmp_path / "run/prior")
    assert prior.vocabulary.token_fingerprint == "imported:made-up" and prior.vocabulary.num_classes == CLASSES
    ids_BT = prior.sample([0, 4, 4], SamplingConfig(), [1, 2, 3])
    assert ids_BT.shape == (3, TOKENS) and 0 <= int(ids_BT.min()) <= int(ids_BT.max()) < CODES
    with pytest.raises(InputError, match="do not belong together"):
        make_bundle(tiny_run / "tokenizer", tmp_path / "run/prior", tmp_path / "pipeline", SamplingConfig())
    assert not (tmp_path / "pipeline").exists()


def test_reimported_tokens_with_their_tokenizer_make_a_pipeline(tmp_path, tiny_run):
    for split in ("train", "validation"):
        run("export-tokens", tiny_run / "tokens" / split, "--out", tmp_path / f"{split}.jsonl")
    arguments = (tmp_path / "train.jsonl", "--validation", tmp_path / "validation.jsonl", "--tokenizer", tiny_run / "tokenizer")
    run("import-tokens", *arguments, "--out", tmp_path / "tokens")
    original, imported = (TokenShardReader(folder / "train") for folder in (tiny_run / "tokens", tmp_path / "tokens"))
    assert imported.manifest.token_fingerprint == original.manifest.token_fingerprint
    assert imported.manifest.grids == original.manifest.grids
    imported_batch, original_batch = (reader.samples(np.argsort(reader.indices_N)) for reader in (imported, original))
    np.testing.assert_array_equal(imported_batch.ids_BT, original_batch.ids_BT)
    np.testing.assert_array_equal(imported_batch.labels_B, original_batch.labels_B)
    train(tiny_recipe(tmp_path / "run", prior_training__tokens=tmp_path / "tokens"))
    assert make_bundle(tiny_run / "tokenizer", tmp_path / "run/prior", tmp_path / "pipeline", SamplingConfig()).is_dir()
    for option, message in (("--codebook_size", "has 32; omit --codebook_size"), ("--height", "give both")):
        with pytest.raises(InputError, match=message):
            run("import-tokens", *arguments, option, 7, "--out", tmp_path / "other")
    short = write_lines(tmp_path / "short.jsonl", records_of(IDS_NVT[:, :, :9]))
    with pytest.raises(InputError, match=r"9 tokens per view, but the grid 4 x 4 x 1 of the tokenizer in .* has 16"):
        run("import-tokens", short, "--tokenizer", tiny_run / "tokenizer", "--out", tmp_path / "other")
