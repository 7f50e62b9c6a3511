"""Files of other versions: an unknown field is an error with file, field and version; fields missing in older files keep their defaults."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.bundle import read_bundle, recommended_sampling
from pipelines.sweep.sweep_record import SweepRecord, read_sweep
from stage1_tokenizer.adversarial.guard import AdversarialGuard
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.digests import digests_of
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from tests.run_files import edit_json
from tests.tiny import tiny_recipe
from tests.tiny_priors import tiny_prior
from token_shards import TokenShardManifest
from token_shards.sidecar import ShardSidecar
from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import copy_folder
from vqmosaic.files.json_files import from_fields, is_later, version_hint
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.runs.stage_records import decide_action, load_record
from vqmosaic.training.checkpoints import read_state, restore_state
from vqmosaic.training.trainer_state import TrainerState

LATER = "9.8.7"
CHECKPOINT = "checkpoints/prior/step-00000006"


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    copy_folder(tiny_run, tmp_path / "run")
    sampling = dataclasses.asdict(SamplingConfig())
    result = {"settings": sampling, "frechet_distance": 1.0, "kernel_distance": 0.0, "kernel_deviation": 0.0, "images": 20, "seconds": 1.0,
              "device": "cpu", "versions": {"vqmosaic": __version__}}
    record = SweepRecord.open(tmp_path / "run/sweep.json", {})
    record.content["results"].append(result)
    (tmp_path / "run/sweep.json").write_text(json.dumps(record.content))
    return tmp_path / "run"


def item_at(content: Any, *keys: str | int) -> Any:
    for key in keys:
        content = content[key]
    return content


def sweep_results(path: Path) -> list:
    record = SweepRecord.open(path, {})
    return [record.settings_of(result) for result in record.content["results"]]


# name -> (file, where a field is added to it, how it is read)
FILES: dict[str, tuple[str, tuple[str | int, ...], Callable[[Path], Any]]] = {
    "tokenizer": ("tokenizer/config.json", (), lambda run: ImageTokenizer.from_pretrained(run / "tokenizer")),
    "network": ("tokenizer/config.json", ("network",), lambda run: ImageTokenizer.from_pretrained(run / "tokenizer")),
    "transform": ("tokenizer/config.json", ("transform",), lambda run: ImageTokenizer.from_pretrained(run / "tokenizer")),
    "vocabulary": ("prior/vocabulary.json", (), lambda run: Vocabulary.load(run / "prior")),
    "segment": ("prior/vocabulary.json", ("segments", 1), lambda run: Vocabulary.load(run / "prior")),
    "grid": ("prior/vocabulary.json", ("segments", 1, "grid"), lambda run: Vocabulary.load(run / "prior")),
    "digests": ("prior/digests.json", (), lambda run: TokenPrior.from_pretrained(run / "prior")),
    "pipeline": ("pipeline/pipeline.json", (), lambda run: read_bundle(run / "pipeline")),
    "sampling": ("pipeline/pipeline.json", ("sampling",),
                 lambda run: recommended_sampling(run / "pipeline", read_bundle(run / "pipeline"))),
    "manifest": ("tokens/train/manifest.json", (), lambda run: TokenShardManifest.load(run / "tokens/train")),
    "grid of the manifest": ("tokens/train/manifest.json", ("grids", 0), lambda run: TokenShardManifest.load(run / "tokens/train")),
    "shard of the manifest": ("tokens/train/manifest.json", ("shards", 1), lambda run: TokenShardManifest.load(run / "tokens/train")),
    "sidecar": ("tokens/train/shard-000000.json", (), lambda run: ShardSidecar.load(run / "tokens/train", "shard-000000.tar")),
    "stage record": ("stages/prior.json", (), lambda run: load_record(RunFolder(run), "prior")),
    "checkpoint": (f"{CHECKPOINT}/trainer_state.json", (), lambda run: restore_state(run / CHECKPOINT, TrainerState)),
    "guard": (f"{CHECKPOINT}/trainer_state.json", ("guard",),
              lambda run: AdversarialGuard.from_checkpoint(read_state(run / CHECKPOINT)["guard"], run / CHECKPOINT)),
    "sweep": ("sweep.json", (), lambda run: read_sweep(run / "sweep.json")),
    "result of a sweep": ("sweep.json", ("results", 0), lambda run: read_sweep(run / "sweep.json")),
    "settings of a sweep": ("sweep.json", ("results", 0, "settings"), lambda run: sweep_results(run / "sweep.json")),
}


@pytest.mark.parametrize(("file", "keys", "read"), FILES.values(), ids=list(FILES))
def test_unknown_field_error_names_file_field_and_version(run, file, keys, read):
    read(run)
    path = run / file
    content = json.loads(path.read_text())
    item_at(content, *keys)["of_later"] = 3
    if "results" in keys:  # each result of a sweep has its own versions
        content["results"][0]["versions"] = {"vqmosaic": LATER}
    else:
        content["vqmosaic"] = LATER
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read(run)
    message = str(caught.value)
    assert str(path) in message and "unknown fields: of_later" in message, message
    assert f"written by vqmosaic {LATER}; this is {__version__}. Update vqmosaic" in message, message


@pytest.mark.parametrize(("file", "keys", "read"), FILES.values(), ids=list(FILES))
def test_unknown_field_in_a_file_without_version(run, file, keys, read):
    path = run / file
    content = json.loads(path.read_text())
    item_at(content, *keys)["of_later"] = 3
    content.pop("vqmosaic", None)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"unknown fields: of_later"):
        read(run)


@pytest.mark.parametrize(("file", "keys", "field", "read"), [
    ("tokenizer/config.json", (), "network", FILES["tokenizer"][2]),
    ("tokenizer/config.json", ("transform",), "channels", FILES["transform"][2]),
    ("prior/vocabulary.json", ("segments", 1, "grid"), "height", FILES["grid"][2]),
    ("prior/digests.json", (), "files", FILES["digests"][2]),
    ("pipeline/pipeline.json", (), "sampling", FILES["pipeline"][2]),
    ("tokens/train/manifest.json", ("shards", 1), "sha256", FILES["manifest"][2]),
    ("tokens/train/shard-000000.json", (), "labels", FILES["sidecar"][2]),
    ("stages/prior.json", (), "inputs", FILES["stage record"][2]),
    ("sweep.json", ("results", 0), "settings", FILES["sweep"][2]),
])
def test_missing_field_error_names_file_and_field(run, file, keys, field, read):
    path = run / file
    content = json.loads(path.read_text())
    del item_at(content, *keys)[field]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"missing fields: {field}") as caught:
        read(run)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
@pytest.mark.parametrize(("file", "keys", "read"), {entry[0]: entry for entry in FILES.values()}.values(), ids=lambda value: str(value)[:20])
def test_invalid_file_content_is_an_input_error(run, file, keys, read, text):
    (run / file).write_text(text)
    with pytest.raises(InputError) as caught:
        read(run)
    assert str(run / file) in str(caught.value)


def test_fields_missing_in_older_files_keep_their_defaults(run):
    path = run / "pipeline/pipeline.json"
    content = json.loads(path.read_text())
    content["sampling"] = {"temperature": 0.5}
    path.write_text(json.dumps(content))
    assert recommended_sampling(run / "pipeline", read_bundle(run / "pipeline")) == SamplingConfig(temperature=0.5)
    state = run / CHECKPOINT / "trainer_state.json"
    state.write_text(json.dumps({"step": 6, "elapsed_seconds": 1.5}))
    assert restore_state(run / CHECKPOINT, TrainerState) == TrainerState(step=6, elapsed_seconds=1.5)


def test_unknown_recipe_field_in_a_stage_record(run):
    record = RunFolder(run).record("prior")
    content = json.loads(record.read_text())
    content["fields"]["prior.of_later"] = 3
    record.write_text(json.dumps(content | {"vqmosaic": LATER}))
    with pytest.raises(InputError, match=f"unknown fields prior.of_later.*vqmosaic {LATER}"):
        decide_action(RunFolder(run), tiny_recipe(run), "prior", None)
    record.write_text(json.dumps(content | {"vqmosaic": "0.0.9"}))  # fields of earlier versions may have been removed since and are ignored
    assert decide_action(RunFolder(run), tiny_recipe(run), "prior", None) == "skip"


def test_unknown_field_in_a_recipe_of_a_later_version(run):
    path = run / "recipe.yaml"
    text = path.read_text()
    assert text.startswith(f"# written by vqmosaic {__version__}\n")
    path.write_text(text.replace(__version__, LATER, 1).replace("prior:\n", "prior:\n  of_later: 3\n"))
    with pytest.raises(InputError, match=rf"no field 'prior.of_later'.*written by vqmosaic {LATER}"):
        load_recipe(str(run))
    path.write_text(text.partition("\n")[2])  # version 0.1.0 wrote no such line
    assert load_recipe(str(run)).run_dir == str(run)


def test_unknown_option_of_a_later_grid_transformer(tmp_path):
    tiny_prior("grid_transformer").save_pretrained(tmp_path)

    def save_as(version: str, **changes) -> None:
        config, digests = tmp_path / "config.json", tmp_path / "digests.json"
        edit_json(config, **changes)
        edit_json(digests, vqmosaic=version, files=digests_of(tmp_path))

    save_as(LATER)  # a later version without a new field
    TokenPrior.from_pretrained(tmp_path)
    save_as(__version__, of_later=True)  # a field that transformers added
    TokenPrior.from_pretrained(tmp_path)
    save_as(LATER)  # the field is still there
    with pytest.raises(InputError, match=rf"config\.json has unknown fields: of_later.*vqmosaic {LATER}"):
        TokenPrior.from_pretrained(tmp_path)


def test_unknown_value_in_a_file_of_a_later_version(run):
    path = run / "tokenizer/config.json"
    content = json.loads(path.read_text())
    content["network"]["quantizer"] = "of_later"
    path.write_text(json.dumps(content | {"vqmosaic": LATER}))
    with pytest.raises(InputError, match=f"quantizer is 'of_later'.*written by vqmosaic {LATER}"):
        ImageTokenizer.from_pretrained(run / "tokenizer")


def test_values_of_wrong_type_are_an_input_error():
    for content in (None, 3, [1], {"temperature": "warm"}, {"guidance_interval": 3}):
        with pytest.raises(InputError, match=r"here\.json"):
            from_fields(SamplingConfig, content, "here.json")


def test_versions_are_compared_numerically():
    assert is_later("0.10.0") and is_later("1.0") and is_later(LATER)
    assert not is_later(__version__) and not is_later("0.0.9") and not is_later(None)
    assert version_hint(__version__) == "" and "another version" in version_hint(None)
