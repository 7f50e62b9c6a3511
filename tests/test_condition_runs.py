"""Conditions in the stages of a run: training their tokenizers, one sample for all grids, resuming, two processes, audit, repair, import and export.

The runs end with the tokens.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.command_line import dispatch
from pipelines.stages import preprocess as module
from pipelines.stages.chain import delete_stages_from, record_recipe
from pipelines.stages.condition_tokenizers import train_condition_tokenizers
from pipelines.stages.preprocess import preprocess
from pipelines.stages.stage_checks import check_before_start, check_chain
from pipelines.stages.stage_inputs import input_fingerprints
from pipelines.tokens.audit_command import audit_run, repair_run
from pipelines.tokens.export_tokens import export_tokens
from stage1_tokenizer.conditions.text_tokenizer import ByteTokenizer, text_ids
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import to_tensor
from stage1_tokenizer.image_files.views import CENTER_VIEW, training_views
from stage1_tokenizer.tokenizer_protocol import load_tokenizer
from stage1_tokenizer.train import train
from tests.image_folders import write_classes
from tests.run_files import flip_byte, token_files
from tests.tiny import command, tiny_overrides, tiny_recipe
from token_shards.manifest import TokenShardManifest, grid_columns
from token_shards.reader import TokenShardReader
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe import Recipe, recipe_of_condition
from vqmosaic.runs.interruption import Interrupted

PER_SHARD = 8
NO_PAIR, BAD_PAIR, NO_CAPTION = "cat/003.png", "dog/004.png", "dog/006.png"
VIEWS = [{}, {"flip": True, "shift": [2, 0]}, {"crop_scale": 0.75, "position": "top-left"}]
GIVEN = ("low", "edges", "maps", "text")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A folder with photos/ (with captions beside the images) and maps/. One image has no pair, one has a damaged pair, one has no caption."""
    root = tmp_path_factory.mktemp("pairs")
    photos = write_classes(root / "photos", {"cat": 16, "dog": 16})
    for path in sorted(photos.glob("*/*.png")):
        name = path.relative_to(photos)
        target = root / "maps" / name.with_suffix(".bmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("L")
        image.resize((2 * image.width, 2 * image.height)).save(target)
        if str(name) != NO_CAPTION:
            path.with_suffix(".txt").write_text(f"{path.parent.name} number {path.stem}")
    (root / "maps" / NO_PAIR).with_suffix(".bmp").unlink()
    (root / "maps" / BAD_PAIR).with_suffix(".bmp").write_bytes(b"no image")
    return root


def conditions(folders: Path, **changes: dict) -> str:
    network = {"channel_multipliers": [1, 1], "codebook_size": 16}
    records = {"low": {"kind": "low_resolution", "factor": 2, "network": network, "training": {"max_steps": 2}},
               "edges": {"kind": "edges", "network": {"codebook_size": 24}, "training": {"max_steps": 2}},
               "maps": {"kind": "paired_folder", "path": str(folders / "maps"), "channels": 1, "training": {"max_steps": 2}},
               "text": {"kind": "caption", "length": 12}}
    return json.dumps([{"name": name, **record, **changes.get(name, {})} for name, record in records.items()])


def fields(folders: Path, **changes: object) -> dict[str, object]:
    return {"data__source": "folder", "data__path": folders / "photos", "data__validation_fraction": 0.25, "data__max_unreadable": 0.4,
            "data__channels": 3, "data__conditions": conditions(folders), "tokens__images_per_shard": PER_SHARD, "tokens__batch_size": 8,
            "tokens__views": json.dumps(VIEWS), "tokenizer_training__max_steps": 2, **changes}


def train_tokenizers(recipe: Recipe) -> None:
    record_recipe(recipe)
    train(recipe)
    assert train_condition_tokenizers(recipe, lambda each: train(each) or 0)[0] == 0


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory) -> Path:
    """A run folder with the four tokenizers and the tokens."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("conditions") / "run", **fields(folders))
    train_tokenizers(recipe)
    preprocess(recipe)
    return Path(recipe.run_dir)


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the run that a test may change."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def recipe_of(run: Path, folders: Path, **changes: object) -> Recipe:
    return tiny_recipe(run, **fields(folders, **changes))


# --- tokens --------------------------------------------------------------------------------------------------------------------


def test_all_grids_are_made_from_the_same_view(trained, folders):
    recipe = recipe_of(trained, folders)
    image_tokenizer = load_tokenizer(trained / "tokenizer")
    own = {name: load_tokenizer(trained / "conditions" / name / "tokenizer") for name in ("low", "edges", "maps")}
    splits = open_splits(recipe.data)
    for split, source, views in (("train", splits.train, training_views(recipe.tokens)), ("validation", splits.validation, [CENTER_VIEW])):
        reader = TokenShardReader(trained / "tokens" / split)
        columns, grids = grid_columns(reader.manifest.grids), {grid.name: grid for grid in reader.manifest.grids}
        assert [*grids] == ["image", *GIVEN] and [record["name"] for record in reader.manifest.conditions] == [*GIVEN]
        assert [grid.name for grid in reader.manifest.drawn_grids] == ["image"]
        assert [(grids[name].codebook_size, grids[name].num_tokens) for name in GIVEN] == [(16, 16), (24, 16), (32, 16), (257, 12)]
        assert reader.manifest.token_fingerprints == {"image": image_tokenizer.token_fingerprint, "text": "text:bytes",
                                                      **{name: tokenizer.token_fingerprint for name, tokenizer in own.items()}}
        for number, view in enumerate(views):
            stored_BT = reader.sequential(0, len(reader), number).ids_BT
            for row, index in enumerate(reader.indices_N.tolist()):
                name = source.source_name(index)
                pair = Image.open((folders / "maps" / name).with_suffix(".bmp"))
                viewed = image_tokenizer.transform.resize(source.read(index), view)
                expected = {"image": image_tokenizer.encode(to_tensor(viewed)[None]),
                            "maps": own["maps"].encode(own["maps"].transform(pair, view)[None]),
                            **{kind: own[kind].encode(to_tensor(own[kind].transform.derive(viewed))[None]) for kind in ("low", "edges")}}
                for kind, ids in expected.items():
                    same = torch.from_numpy(stored_BT[row, columns[kind]].astype(np.int64)) == ids.flatten()
                    assert same.float().mean() > 0.9, "equal except for near ties, which round differently in another batch shape"
                text = f"{name[:3]} number {name[4:7]}"
                assert stored_BT[row, columns["text"]].tolist() == text_ids(ByteTokenizer(), text, 12).tolist(), "a flipped view has the same caption"


def test_images_without_a_pair_or_a_caption_are_skipped(trained):
    skipped = {record["source"]: record["reason"] for split in ("train", "validation")
               for record in TokenShardManifest.load(trained / "tokens" / split).skipped}
    assert skipped[NO_PAIR] == "it has no pair (condition 'maps')" and "no caption" in skipped[NO_CAPTION]
    assert skipped[BAD_PAIR].startswith("its pair for 'maps' is unreadable") and len(skipped) == 3


def test_too_many_images_without_a_pair_stop_the_run(run, folders):
    recipe = recipe_of(run, folders, data__max_unreadable=0)
    delete_stages_from(recipe, "tokens")
    with pytest.raises(InputError, match=r"images are unreadable, more than data\.max_unreadable = 0 allows"):
        preprocess(recipe)


def test_pairs_that_were_unread_at_the_start_do_not_stop_a_run(run, folders, tmp_path, capsys):
    data = shutil.copytree(folders, tmp_path / "data")
    pair, content = data / "maps/cat/005.bmp", (data / "maps/cat/005.bmp").read_bytes()
    pair.unlink()
    pair.symlink_to(data / "unmounted.bmp")
    recipe = recipe_of(run, data)
    delete_stages_from(recipe, "tokens")
    preprocess(recipe)
    (data / "unmounted.bmp").write_bytes(content)
    preprocess(recipe)
    assert "finished already" in capsys.readouterr().out, "the pairs count as the same"
    assert audit_run(run / "tokens", recipe) == 1
    report = capsys.readouterr().out
    assert "have changed" not in report and report.count("can be read now") == 1
    repair_run(run / "tokens", recipe)
    assert audit_run(run / "tokens", recipe) == 0


def test_manifest_and_records_describe_the_conditions(trained):
    manifest = TokenShardManifest.load(trained / "tokens/train")
    assert manifest.conditions == [{"name": "low", "kind": "low_resolution", "factor": 2}, {"name": "edges", "kind": "edges", "method": "sobel"},
                                   {"name": "maps", "kind": "paired_folder", "channels": 1}, {"name": "text", "kind": "caption", "length": 12}]
    assert manifest.dataset["conditions"].keys() == {"maps", "text"}
    record = json.loads((trained / "stages/tokens.json").read_text())
    assert record["fields"]["data.conditions"] == manifest.conditions
    assert {f"tokenizer of {name}" for name in GIVEN} | {"data of maps", "data of text"} <= record["inputs"].keys()
    assert "data.conditions" not in json.loads((trained / "stages/tokenizer.json").read_text())["fields"]
    assert json.loads((trained / "conditions/edges/stages/tokenizer.json").read_text())["fields"]["data.derived"] == {"kind": "edges",
                                                                                                                     "method": "sobel"}


def test_killed_in_between_writes_the_same_bytes(run, trained, folders, monkeypatch):
    recipe = recipe_of(run, folders)
    delete_stages_from(recipe, "tokens")
    original, seen = module.encode_sources, []

    def stop_after_some(*arguments):
        for result in original(*arguments):
            seen.append(result)
            if len(seen) == PER_SHARD + 3:
                raise Interrupted(15, "stopped by the test")
            yield result

    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_sources", stop_after_some)
        with pytest.raises(Interrupted):
            preprocess(recipe)
    assert not (run / "tokens/train/manifest.json").exists()
    preprocess(recipe)
    assert token_files(run) == token_files(trained)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(run, trained, folders):
    shutil.rmtree(run / "tokens")
    (run / "stages/tokens.json").unlink()
    overrides = tiny_overrides(run, **fields(folders))
    result = command("preprocess", "digits", *overrides, "--processes", 2)
    assert result.returncode == 0, result.stderr
    assert token_files(run) == token_files(trained)


# --- tokenizers of conditions ----------------------------------------------------------------------------------------------------


def test_finished_tokenizers_are_skipped_and_redone_on_request(run, folders, capsys):
    recipe = recipe_of(run, folders)
    assert train_condition_tokenizers(recipe, pytest.fail) == (0, {})
    assert capsys.readouterr().out.count("finished already") == 3
    before = (run / "conditions/low/tokenizer/model.safetensors").read_bytes()
    delete_stages_from(recipe, "conditions")
    assert "the tokenizer of edges" in capsys.readouterr().out
    assert (run / "tokenizer").exists() and not (run / "tokens").exists() and not (run / "conditions/low/tokenizer").exists()
    assert train_condition_tokenizers(recipe, lambda each: train(each) or 0)[0] == 0
    assert (run / "conditions/low/tokenizer/model.safetensors").read_bytes() == before, "the same training gives the same weights"


def test_a_stopped_tokenizer_stops_the_chain(tmp_path, folders):
    recipe = tiny_recipe(tmp_path / "run", **fields(folders))
    calls = []
    code, _ = train_condition_tokenizers(recipe, lambda each: calls.append(each.run_dir) or 143)
    assert code == 143 and len(calls) == 1


def test_another_condition_keeps_the_other_tokenizers(run, folders):
    recipe = recipe_of(run, folders, data__conditions=conditions(folders)[:-1] + ', {"name": "grey", "kind": "grey"}]')
    assert check_before_start(recipe, "tokenizer", alone=False) == "skip"
    with pytest.raises(InputError, match=r"stage tokens was started with data\.conditions"):
        check_before_start(recipe, "tokens", alone=False)
    delete_stages_from(recipe, "tokens")
    trained = []
    train_condition_tokenizers(recipe, lambda each: trained.append(Path(each.run_dir).name) or 0)
    assert trained == ["grey"]
    with pytest.raises(InputError, match=r"\(grey\) has no tokenizer yet: .*--condition grey"):
        input_fingerprints(recipe, "tokens")


def test_drop_rates_do_not_change_the_tokens(run, folders):
    recipe = recipe_of(run, folders, data__conditions=conditions(folders, low={"drop_rate": 0.5}))
    assert check_before_start(recipe, "tokens") == "skip"


def test_a_given_tokenizer_is_checked_and_used(run, trained, folders):
    given = {"low": {"tokenizer": str(trained / "conditions/low/tokenizer"), "network": {}, "training": {}}}
    recipe = recipe_of(run, folders, data__conditions=conditions(folders, **given))
    shutil.rmtree(run / "conditions/low")
    assert check_before_start(recipe, "tokens") == "skip", "the same tokenizer at another place"
    for wrong, message in (("conditions/edges", r"\(low\) needs a tokenizer of images with derived .*factor.*trained with .*edges"),
                           ("conditions/maps", r"with derived .* but that in .* was trained with null"), ("conditions", "is not a tokenizer")):
        given["low"]["tokenizer"] = str(trained / wrong / "tokenizer") if "/" in wrong else str(trained / wrong)
        with pytest.raises(InputError, match=message):
            check_before_start(recipe_of(run, folders, data__conditions=conditions(folders, **given)), "tokens")


def test_the_chain_is_checked_before_it_starts(tmp_path, folders):
    with pytest.raises(InputError, match=r"data\.conditions\[2\]\.path is .*not a folder"):
        check_chain(tiny_recipe(tmp_path / "run", **fields(folders, data__conditions=conditions(folders, maps={"path": "/nowhere"}))), 1, None)
    given = {"low": {"tokenizer": "/nowhere", "network": {}, "training": {}}}
    with pytest.raises(InputError, match="/nowhere is not a tokenizer"):
        check_chain(tiny_recipe(tmp_path / "run", **fields(folders, data__conditions=conditions(folders, **given))), 1, None)
    with pytest.raises(InputError, match="batch_size is 15, which is not divisible by 2 processes"):
        changed = conditions(folders, edges={"training": {"batch_size": 15}})
        check_chain(tiny_recipe(tmp_path / "run", **fields(folders, data__conditions=changed)), 2, None)
    with pytest.raises(InputError, match=r"images are unreadable, more than data\.max_unreadable"):
        check_chain(tiny_recipe(tmp_path / "run", **fields(folders, data__max_unreadable=0)), 1, None)
    with pytest.raises(InputError, match=r"\(text\): no image .* has a caption"):
        changed = json.dumps([{"name": "text", "kind": "caption", "length": 9}])
        check_chain(tiny_recipe(tmp_path / "run", **fields(folders, data__path=folders / "maps", data__conditions=changed)), 1, None)
    assert not (tmp_path / "run").exists()


def test_tokenizers_of_conditions_do_not_encode_the_images(trained, folders, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", **fields(folders, data__channels=1, data__conditions="[]",
                                                    tokens__tokenizer=trained / "conditions/edges/tokenizer"))
    with pytest.raises(InputError, match="encodes images of the kind 'edges', as those of a condition"):
        preprocess(recipe)


def test_a_grown_budget_needs_new_tokens(run, folders):
    grown = conditions(folders, low={"training": {"max_steps": 3}})
    with pytest.raises(InputError, match="the budget of this tokenizer has grown, but the tokens were made"):
        check_chain(recipe_of(run, folders, data__conditions=grown), 1, None)


def test_other_pairs_are_another_data_set(run, folders, tmp_path):
    shutil.copytree(folders / "maps", tmp_path / "maps")
    moved = conditions(folders, maps={"path": str(tmp_path / "maps")})
    recipe = recipe_of(run, folders, data__conditions=moved)
    inner = recipe_of_condition(recipe, "maps")
    assert check_before_start(inner, "tokenizer") == "compare", "the pairs were moved"
    train(inner)
    preprocess(recipe)  # finished already
    Image.fromarray(np.zeros((16, 18), np.uint8)).save(tmp_path / "maps/cat/000.bmp")
    with pytest.raises(InputError, match="data set"):
        train(inner)
    with pytest.raises(InputError, match="data of maps"):
        preprocess(recipe)


@pytest.mark.slow
def test_commands_for_one_condition(tmp_path, folders):
    overrides = tiny_overrides(tmp_path / "run", **fields(folders))
    result = command("train-tokenizer", "digits", *overrides, "--condition", "edges")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/conditions/edges/tokenizer/config.json").is_file() and not (tmp_path / "run/tokenizer").exists()
    result = command("train-tokenizer", "digits", *overrides, "--condition", "edgs")
    assert result.returncode == 2 and "allowed: low, edges, maps. Did you mean 'edges'" in result.stderr
    result = command("preprocess", "digits", *overrides)
    assert result.returncode == 2


# --- audit, repair, export ---------------------------------------------------------------------------------------------------------


def test_damaged_shards_are_repaired_with_all_grids(run, trained, folders, capsys):
    flip_byte(run / "tokens/train/shard-000000.tar", 3000)
    (run / "tokens/train/shard-000001.tar").unlink()
    (run / "tokens/validation/manifest.json").unlink()
    recipe = recipe_of(run, folders)
    assert audit_run(run / "tokens", recipe) == 1
    assert audit_run(run / "tokens", recipe, repair=True) == 0
    assert token_files(run) == token_files(trained)
    assert "2 shards were encoded again" in capsys.readouterr().out


def test_audit_and_repair_notice_changed_captions_and_pairs(run, folders, tmp_path, capsys):
    shutil.copytree(folders, tmp_path / "folders")
    recipe = recipe_of(run, tmp_path / "folders")
    assert audit_run(run / "tokens", recipe) == 0, "the data set was moved"
    source = open_splits(recipe.data).train
    text = (tmp_path / "folders/photos" / next(name for index in range(9) if (name := source.source_name(index)) not in (NO_CAPTION, NO_PAIR)))
    text.with_suffix(".txt").write_text("another animal")
    capsys.readouterr()
    assert audit_run(run / "tokens", recipe) == 1
    assert "the captions of condition 'text' have changed since they were encoded" in capsys.readouterr().out
    flip_byte(run / "tokens/train/shard-000000.tar", 3000)
    with pytest.raises(InputError, match=r"dataset\.conditions was"):
        audit_run(run / "tokens", recipe, repair=True)


def test_export_and_import_keep_grids_and_conditions(trained, tmp_path):
    export_tokens(trained / "tokens/train", tmp_path / "train.jsonl")
    export_tokens(trained / "tokens/validation", tmp_path / "validation.jsonl")
    result = command("import-tokens", tmp_path / "train.jsonl", "--validation", tmp_path / "validation.jsonl", "--like", trained / "tokens/train",
                     "--out", tmp_path / "tokens")
    assert result.returncode == 0, result.stderr
    for split in ("train", "validation"):
        before, after = TokenShardReader(trained / "tokens" / split), TokenShardReader(tmp_path / "tokens" / split)
        assert after.manifest.grids == before.manifest.grids and after.manifest.conditions == before.manifest.conditions
        assert after.manifest.token_fingerprints == before.manifest.token_fingerprints and after.manifest.class_names == before.manifest.class_names
        ids = [reader.sequential(0, len(reader), 0).ids_BT[np.argsort(reader.indices_N)] for reader in (before, after)]
        assert np.array_equal(*ids)
    result = command("import-tokens", tmp_path / "train.jsonl", "--like", trained / "tokens/train", "--codebook_size", 9, "--out", tmp_path / "other")
    assert result.returncode == 2 and "--like and --codebook_size are both given" in result.stderr


def test_relative_paths_of_a_moved_run(run, folders, tmp_path, monkeypatch):
    from vqmosaic.recipes.recipe_files import load_recipe

    (tmp_path / "project").mkdir()
    shutil.copytree(folders, tmp_path / "project/data")
    monkeypatch.chdir(tmp_path / "project")
    recipe = tiny_recipe("runs/pairs", **fields(Path("data")))
    record_recipe(recipe)
    record_recipe(recipe_of_condition(recipe, "maps"))
    (tmp_path / "project/runs/pairs/stages").mkdir()
    monkeypatch.chdir(tmp_path)
    moved = load_recipe("project/runs/pairs")
    assert moved.data.given_conditions[2].path == str(tmp_path / "project/data/maps")
    inner = load_recipe("project/runs/pairs/conditions/maps")
    assert inner.data.derived["path"] == str(tmp_path / "project/data/maps") and inner.data.path == str(tmp_path / "project/data/photos")


def test_cut_captions_are_reported_once(run, folders, capsys):
    shorter = conditions(folders, text={"length": 4})
    assert dispatch(["preprocess", str(run), "--run_dir", str(run), "--data.conditions", shorter, "--redo", "tokens"]) == 0
    assert capsys.readouterr().out.count("longer than 4 bytes") == 2, "one for each split"
