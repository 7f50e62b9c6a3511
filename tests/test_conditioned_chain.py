"""Complete tiny runs with conditions: `vqmosaic run`, its pictures and measures, sweep, and two priors from the shards of one run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.command_line import dispatch
from pipelines.stages.chain import longer_training_hint, next_steps, run_chain
from pipelines.stages.edited_example import save_edited_example
from stage1_tokenizer.pictures import GAP_PIXELS, TEXT_PIXELS
from stage2_prior.generation.prior_chain import PriorChain
from stage2_prior.vocabulary import Vocabulary
from tests.conditioned import make_parts
from tests.test_edited_example import random_prior, tiles_of, validation_images
from tests.test_feature_extractors import Pooled, scripted
from tests.tiny import make_tiny_run, tiny_overrides, tiny_recipe
from token_shards import TokenShardManifest, TokenShardReader
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe import condition_recipes
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.runs.run_folder import RunFolder

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
        tile, text = 4 * (16 + GAP_PIXELS), TEXT_PIXELS + 2 * GAP_PIXELS  # enlarged four times
        assert picture.width == 8 * tile + 4 * GAP_PIXELS, "low resolution, six samples, image"
        assert picture.height == 2 * text + 10 * (text + tile + 4 * GAP_PIXELS), "two lines of headings, ten rows with titles"
    captions = (run / "samples.txt").read_text().splitlines()
    assert len(captions) == 10 and all(caption.startswith("number ") for caption in captions), "templates of validation images"
    assert list((run / "logs/prior/samples").glob("step-*.png"))
    summary = json.loads((run / "summary.json").read_text())
    measures = summary["generation"]["recommended"]
    assert 0 < measures["psnr_of_low"] < 60 and 0 <= measures["class_agreement"] <= 1 and measures["distinct"] > 0
    assert summary["sampling"]["guidance"] == {"low": 2.0}


def test_edited_example_has_the_conditions_of_its_images(run, tmp_path):
    """The prior has random weights: only its inputs are tested."""
    pipe, held_out = ImageGenerationPipeline.from_pretrained(run, "cpu"), TokenShardReader(run / "tokens/validation")
    pipe.chain = PriorChain([random_prior(pipe.prior.vocabulary)])
    given, inpaint = [], pipe.inpaint
    pipe.inpaint = lambda *arguments, **options: given.append(options["given_ids"]) or inpaint(*arguments, **options)
    record = save_edited_example(pipe, *validation_images(run), held_out, 0, tmp_path / "edited.png")
    assert record["images"] == len(tiles_of(tmp_path / "edited.png")) == 4
    assert {name: len(ids_Bn) for name, ids_Bn in given[0].items()} == {"low": 4, "text": 4}


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


def test_guidance_of_the_class_is_left_out_without_classes(tmp_path, capsys):
    """The folder of images may turn out to have no classes, which the check before the run does not know."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(tmp_path / f"photos/{number}.png")
    low = "[{name: low, kind: low_resolution, factor: 2, drop_rate: 0.2}]"
    run = make_tiny_run(tmp_path / "run", data__source="folder", data__path=tmp_path / "photos", data__conditions=low,
                        prior__architecture="grid_transformer", sampling__guidance="{class: 1.5, low: 2.0}")
    assert "does not use sampling.guidance of the class, because the images have no classes" in capsys.readouterr().out
    assert json.loads((run / "pipeline/pipeline.json").read_text())["sampling"]["guidance"] == {"low": 2.0}
    assert list((run / "logs/prior/samples").glob("step-*.png"))


def test_next_steps_name_no_classes_that_the_prior_has_not_learned(tmp_path):
    root = tmp_path / "run"
    make_parts(root, class_drop=1.0).bundle(root / "pipeline")
    commands = next_steps(RunFolder(root))
    assert any("upscale" in command for command in commands) and not any("--classes" in command for command in commands)


@pytest.mark.parametrize(("conditions", "minutes"), [
    ([], 15), (["low"], 7.5), (["low", "edges"], 5), (["low", "text"], 7.5), (["low", "given"], 7.5), (["low", "own_time"], 7.5),
])
def test_minutes_are_the_total_with_tokenizers_of_conditions(conditions, minutes, tmp_path):
    known = {"low": "kind: low_resolution, factor: 2", "edges": "kind: edges", "text": "kind: caption, length: 8, templates: ['a {class}']",
             "given": "kind: edges, tokenizer: tokenizers/edges", "own_time": "kind: edges, training: {max_minutes: 3}"}
    listed = f"[{', '.join(f'{{name: {name}, {known[name]}}}' for name in conditions)}]"
    recipe = load_recipe("digits", [f"--run_dir={tmp_path / 'run'}", "--minutes=30", f"--data.conditions={listed}"])
    own = {name: each.tokenizer_training.max_minutes for name, each in condition_recipes(recipe).items()}
    assert recipe.tokenizer_training.max_minutes == minutes and recipe.prior_training.max_minutes == 15
    assert own.pop("own_time", 3) == 3 and sum(own.values(), minutes) == 15
    given = load_recipe("digits", ["--minutes=30", f"--data.conditions={listed}", "--tokenizer_training.max_minutes=9"])
    assert given.tokenizer_training.max_minutes == 9, "divided only if it is not set"
    assert "add --minutes 60 --redo tokens" in longer_training_hint(recipe)
