"""Files that version 0.1.0 wrote load, resume, pass their audit and give the same images. tests/artifacts_0_1_0/README.md says how they were made."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipelines import ImageGenerationPipeline
from pipelines.stages.stage_inputs import input_fingerprints
from pipelines.tokens.audit_command import audit_run
from stage1_tokenizer.data.digits_source import load_scans
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.prior import TokenPrior
from stage2_prior.train import train
from stage2_prior.vocabulary import Vocabulary
from tests.run_files import edit_json, records
from token_shards import TokenShardReader
from token_shards.manifest import TokenShardManifest
from token_shards.sidecar import ShardSidecar
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.run_folder import STAGES, RunFolder
from vqmosaic.runs.stage_records import decide_action, load_record

ARTIFACTS = Path(__file__).parent / "artifacts_0_1_0"
EXPECTED = json.loads((ARTIFACTS / "expected.json").read_text())
PRIORS = {"grid_transformer": "prior", "llama": "llama"}
pytestmark = pytest.mark.filterwarnings("ignore:.*has no digests.json")  # version 0.1.0 did not write it


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The run folder. Tests must not change it."""
    folder = tmp_path_factory.mktemp("0_1_0")
    with tarfile.open(ARTIFACTS / "run.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return folder / "run"


def test_pipeline_generates_the_same_images(run):
    pipe, expected = ImageGenerationPipeline.from_pretrained(run, device="cpu"), EXPECTED["pipeline"]
    out = pipe(class_labels=["3", 7], num_images_per_label=2, seed=1, output_type="np")
    assert out.token_ids.tolist() == expected["ids"]
    assert np.abs(out.images[..., 0].astype(int) - np.array(expected["pixels"])).max() <= 1


@pytest.mark.parametrize("architecture", PRIORS)
def test_priors_have_the_same_logits_and_ids(architecture, run):
    prior, expected = TokenPrior.from_pretrained(run / PRIORS[architecture]), EXPECTED[architecture]
    classes, seeds, ids_BT = EXPECTED["classes"], EXPECTED["seeds"], torch.tensor(expected["ids"])
    with torch.no_grad():
        torch.testing.assert_close(prior(ids_BT, torch.tensor(classes)), torch.tensor(expected["logits"]), rtol=0, atol=1e-5)
    assert prior.sample(classes, SamplingConfig(), seeds).tolist() == expected["ids"]
    guided = SamplingConfig(guidance_scale=3.0, guidance_schedule="linear", top_k=12, temperature=0.9)
    assert prior.sample(classes[:3], guided, seeds[:3]).tolist() == expected["guided_ids"]


@pytest.mark.parametrize("architecture", PRIORS)
def test_priors_are_saved_again_without_a_change_of_their_weights(architecture, run, tmp_path):
    prior = TokenPrior.from_pretrained(run / PRIORS[architecture])
    prior.save_pretrained(tmp_path / "prior")
    before, after = (load_file(folder / "model.safetensors") for folder in (run / PRIORS[architecture], tmp_path / "prior"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert Vocabulary.load(tmp_path / "prior") == Vocabulary.load(run / "prior")


def test_tokenizer_keeps_its_fingerprints_and_ids(run, tmp_path):
    tokenizer, reader = ImageTokenizer.from_pretrained(run / "tokenizer"), TokenShardReader(run / "tokens/train")
    recorded = tokenizer.token_fingerprint, tokenizer.full_fingerprint
    tokenizer.save_pretrained(tmp_path / "tokenizer")  # computes both from the weights
    assert (tokenizer.token_fingerprint, tokenizer.full_fingerprint) == recorded
    sidecar, scans = ShardSidecar.load(reader.folder, "shard-000000.tar"), load_scans()[0]
    images_BCHW = torch.stack([tokenizer.transform(Image.fromarray(scans[int(row)])) for row in sidecar.sources[:64]])
    is_same_BT = tokenizer.encode(images_BCHW).flatten(1).numpy() == reader.sequential(0, 64).ids_BT
    assert is_same_BT.mean() > 0.99  # processors round differently at near ties


def test_manifests_keep_their_fingerprints(run):
    inputs = load_record(RunFolder(run), "prior").inputs
    for split, name in (("train", "tokens"), ("validation", "validation tokens")):
        manifest = TokenShardManifest.load(run / "tokens" / split)
        assert manifest.fingerprint == inputs[name]
        assert manifest.header.fingerprint == ShardSidecar.load(run / "tokens" / split, "shard-000000.tar").header_fingerprint
        assert manifest.token_fingerprints == {"image": manifest.token_fingerprint}
        before = (run / "tokens" / split / "manifest.json").read_bytes()
        manifest.save(run.parent)
        assert (run.parent / "manifest.json").read_bytes() == before


def test_audit_finds_no_problems(run, capsys):
    assert audit_run(run / "tokens", load_recipe(str(run))) == 0
    printed = capsys.readouterr().out
    assert "compared with the data set" in printed and "train: 1,418 samples in 3 shards, 0 skipped: no problems" in printed


def test_stages_count_as_finished(run):
    recipe = load_recipe(str(run))
    for stage in STAGES[1:]:
        inputs = load_record(RunFolder(run), stage).inputs
        assert input_fingerprints(recipe, stage).items() <= inputs.items()
        assert decide_action(RunFolder(run), recipe, stage, inputs) == "skip"


def test_prior_resumes_from_its_checkpoint(run, tmp_path, monkeypatch):
    monkeypatch.setattr("vqmosaic.kernels.dropout.can_share_draws", lambda x: False)  # 0.1.0 had torch's dropout
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    recipe = load_recipe(str(copy))
    for folder in ("prior", "pipeline"):
        shutil.rmtree(copy / folder)
    edit_json(copy / "stages/prior.json", finished=False)
    train(recipe)
    assert [record["step"] for record in records(copy, "prior", "train")] == [5, 6], "it continues after step 4"
    before, after = (load_file(folder / "prior/model.safetensors") for folder in (run, copy))
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-5)
