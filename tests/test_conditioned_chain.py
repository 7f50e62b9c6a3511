"""Complete tiny runs with conditions: `vqmosaic run`, its pictures and measures, sweep, and two priors from the shards of one run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.command_line import dispatch
from pipelines.stages.chain import run_chain
from stage2_prior.vocabulary import Vocabulary
from tests.test_feature_extractors import Pooled, scripted
from tests.tiny import make_tiny_run, tiny_overrides, tiny_recipe
from token_shards import TokenShardManifest
from vqmosaic.errors import InputError

CONDITIONS = ('[{name: low, kind: low_resolution, factor: 2, drop_rate: 0.2}, {name: text, kind: caption, length: 12, drop_rate: 0.2, '
              'templates: ["digit {class}", "a {class}"], held_out_templates: ["number {class}"]}]')
CHANGES = {"data__conditions": CONDITIONS, "prior__architecture": "grid_transformer", "prior_training__drop_rates": "{class: 0.1}",
           "sampling__guidance": "{low: 2.0}"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with a low resolution and captions."""
    return make_tiny_run(tmp_path_factory.mktemp("conditions") / "run", **CHANGES)


def test_run_bundles_the_conditions(run):
    content = json.loads((run / "pipeline/pipeline.json").read_text())
    assert [record["name"] for record in content["conditions"]] == ["low", "text"] and content["sampling"]["guidance"] == {"low": 2.0}
    assert (run / "pipeline/conditions/low/config.json").read_bytes() == (run / "conditions/low/tokenizer/config.json").read_bytes()
    vocabulary = Vocabulary.load(run / "prior")
    assert [(segment.name, segment.drop_rate) for segment in vocabulary.given_segments] == [("class", 0.1), ("low", 0.2), ("text", 0.2)]


def test_pictures_and_measures_use_the_conditions_of_validation_images(run):
    with Image.open(run / "samples.png") as picture:
        columns, rows = (side // 4 // 18 for side in picture.size)  # enlarged four times; images of 16 pixels with gaps
        assert (columns, rows) == (1 + 6 + 1, 10), "low resolution, samples, image"
    captions = (run / "samples.txt").read_text().splitlines()
    assert len(captions) == 10 and all(caption.startswith("number ") for caption in captions), "templates of validation images"
    assert list((run / "logs/prior/samples").glob("step-*.png"))
    summary = json.loads((run / "summary.json").read_text())
    measures = summary["generation"]["recommended"]
    assert 0 < measures["psnr_of_low"] < 60 and 0 <= measures["class_agreement"] <= 1 and measures["distinct"] > 0
    assert summary["sampling"]["guidance"] == {"low": 2.0}


def test_run_again_does_nothing(run, capsys):
    assert run_chain(tiny_recipe(run, **CHANGES)) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_pipeline_of_a_run(run, tmp_path):
    pipe = ImageGenerationPipeline.from_pretrained(run, "cpu")
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(2)]
    assert pipe.super_resolve(small, seed=1).images[0].size == (16, 16)
    assert len(pipe(prompt="digit 3", num_images_per_label=2, seed=1).images) == 2
    small[0].save(tmp_path / "small.png")
    assert dispatch(["upscale", str(run), str(tmp_path / "small.png"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert dispatch(["generate", str(run), "--prompt", "digit 3", "--num", "2", "--out", str(tmp_path / "prompted"), "--device", "cpu"]) == 0


def test_sweep_gives_the_conditions_of_validation_images(run, tmp_path, capsys):
    features = scripted(Pooled(), tmp_path / "pooled.pt")
    command = ["sweep", str(run), "--features", str(features), "--images", "8", "--temperature", "0.5,1", "--device", "cpu", "--keep",
               "--out", str(tmp_path / "sweep.json")]
    assert dispatch(command) == 0
    assert "with the conditions of validation images" in capsys.readouterr().out
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["setup"]["conditions"] == TokenShardManifest.load(run / "tokens/validation").fingerprint
    assert [result["settings"]["guidance"] for result in record["results"]] == [{"low": 2.0}] * 2, "sweep leaves it unchanged"
    assert "guidance" not in capsys.readouterr().out and dispatch(command) == 0 and "nothing to do" in capsys.readouterr().out


def test_sweep_needs_the_shards_of_the_run(run, tmp_path):
    shutil.copytree(run / "pipeline", tmp_path / "alone")
    features = scripted(Pooled(), tmp_path / "pooled.pt")
    (tmp_path / "real").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "real/1.png")
    with pytest.raises(InputError, match=r"sweep needs the conditions of validation images, but .* has no token shards"):
        dispatch(["sweep", str(tmp_path / "alone"), "--features", str(features), "--real", str(tmp_path / "real"), "--images", "4"])


def test_a_second_prior_from_the_shards_of_a_run(run, tmp_path):
    """A prior that draws the low resolution for a caption. It alone is no pipeline for images, because low is no grid of their tokenizer."""
    changes = {"prior__architecture": "grid_transformer", "sampling__guidance_scale": 1.0, "prior_training__tokens": run / "tokens",
               "prior_training__given": "[text]", "prior_training__drawn": "[low]"}
    assert dispatch(["train-prior", "digits", *tiny_overrides(tmp_path / "low", **changes)]) == 0
    vocabulary = Vocabulary.load(tmp_path / "low/prior")
    assert [grid.name for grid in vocabulary.grids] == ["low"] and [each.name for each in vocabulary.conditions] == ["text"]
    with pytest.raises(InputError, match="do not belong together"):
        dispatch(["bundle", "--tokenizer", str(run / "tokenizer"), "--prior", str(tmp_path / "low/prior"), "--out", str(tmp_path / "pipeline")])


def test_run_refuses_parts_of_the_grids_and_guidance_that_is_not_learned(tmp_path):
    with pytest.raises(InputError, match=r"prior_training\.drawn is \['image'\], but `vqmosaic run` trains one prior"):
        run_chain(tiny_recipe(tmp_path / "run", prior_training__drawn="[image]"))
    never = CONDITIONS.replace("drop_rate: 0.2", "drop_rate: 0.0")
    with pytest.raises(InputError, match="needs a prior that was trained without low, text but with class"):
        run_chain(tiny_recipe(tmp_path / "run", **CHANGES | {"data__conditions": never}))
    assert not (tmp_path / "run/tokenizer").exists()
