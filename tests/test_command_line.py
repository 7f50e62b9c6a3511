"""The vqmosaic command: messages, exit codes, response times, and the files that its commands write.

Invalid calls run in forks of a process that has not loaded torch (tests/forked_command.py). Calls that need torch run in this process through
`dispatch`, because the import is slow. Only tests of the process itself start one.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.command_line import dispatch
from pipelines.doctor import processor_name
from pipelines.stages.chain import example_classes
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.vocabulary import Vocabulary
from tests.forked_command import ForkedCommands
from tests.run_files import pictures
from tests.test_structure import SLOW, loaded
from tests.tiny import ROOT, command, tiny_overrides, tiny_recipe
from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_files import shipped_names
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.devices import default_device

HELP_SECONDS, ERROR_SECONDS = 1.5, 4.0  # the target; a busy machine is allowed SLACK times as much
SLACK = 2.0


def timed(*arguments: object, **environment: str):
    """Run the command and return its result and duration in seconds, which `pytest -s` and `-rP` show."""
    started = time.monotonic()
    result = command(*arguments, **environment)
    seconds = time.monotonic() - started
    print(f"{seconds:.2f} s, exit code {result.returncode}: vqmosaic {' '.join(map(str, arguments))}")
    return result, seconds


@pytest.fixture(scope="module")
def commands():
    """Runs commands in forks of a process without torch."""
    with ForkedCommands() as forks:
        yield forks


@pytest.fixture
def error_message(commands):
    """error_message(*arguments) returns the message of a call that must fail: on stderr, with exit code 2, without a traceback.

    Only calls that must look at weights or devices may load torch, which takes seconds. With the other slow libraries it would take longer.
    """
    def message(*arguments: object, may_load: tuple[str, ...] = ()) -> str:
        result = commands.run(*arguments)
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr and result.stderr.startswith("error: ") and not result.stdout
        assert loaded(result.modules, *SLOW) <= {*may_load}
        return result.stderr

    return message


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory) -> Path:
    """A folder that contains only a text file."""
    folder = tmp_path_factory.mktemp("nowhere")
    (folder / "file.txt").write_text("not an image")
    return folder


# --- help --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], [], ["help"], ["run", "--help"], ["run", "digits", "--help"], ["generate", "--help"],
                                       ["bundle", "--help"], ["--version"]], ids=" ".join)
def test_help_is_fast(arguments):
    result, seconds = timed(*arguments)
    assert result.returncode == 0 and result.stdout and not result.stderr
    assert seconds < SLACK * HELP_SECONDS


def test_overview_lists_commands_and_recipes(commands):
    stdout = commands.run("--help").stdout
    for word in ("run", "train-tokenizer", "preprocess", "train-prior", "bundle", "generate", "reconstruct", "check-data", "audit", "demo", "doctor",
                 "digits", "cifar10", "image_folder", "imagenet256"):
        assert word in stdout
    assert commands.run("--version").stdout.strip() == __version__


def test_recipe_help_shows_its_values(commands):
    stdout = " ".join(commands.run("run", "digits", "--help").stdout.split())
    assert "--tokenizer.codebook_size" in stdout and "default: runs/digits)" in stdout and "those of digits" in stdout


@pytest.mark.parametrize("name", ["run", "train-prior"])
def test_recipe_help_shows_options_that_are_not_fields(name, commands):
    stdout = " ".join(commands.run(name, "--help").stdout.split())
    for option in ("--processes N number of processes", "--accelerate_config FILE Accelerate configuration",
                  "--redo STAGE delete and rerun this stage (tokenizer, "):
        assert option in stdout
    assert ("--overfit N only check that" in stdout) == (name == "train-prior")


def test_run_without_recipe_prints_usage(commands):
    result = commands.run("run")
    assert result.returncode == 2 and "usage: vqmosaic run RECIPE" in result.stdout


# --- invalid calls -----------------------------------------------------------------------------------------------------------

INVALID_CALLS = {
    "command": (["generat"], ["'generat'", "reconstruct", "Did you mean 'generate'?"]),
    "recipe name": (["run", "digts"], ["'digts'", "cifar10", "Did you mean 'digits'?"]),
    "run folder missing": (["train-prior", "{nowhere}/runs/b"], ["neither a recipe nor a run folder", "Shipped recipes: cifar10", "YAML file"]),
    "run folder misspelt": (["train-prior", "{run}s"], ["neither a recipe nor a run folder", "Run folders: {run}", "Did you mean '{run}'?"]),
    "no run folder": (["train-prior", "{nowhere}"], ["is a folder without recipe.yaml", "Shipped recipes: cifar10"]),
    "recipe missing": (["run", "--seed", "3"], ["the first argument of run must be a recipe", "'--seed'"]),
    "key": (["run", "digits", "--tokenizer.codebok_size", "3"], ["tokenizer.codebok_size", "Did you mean tokenizer.codebook_size?"]),
    "key of a stage": (["train-prior", "digits", "--prior.layer=3"], ["prior.layer", "Did you mean prior.layers?"]),
    "option misspelt": (["train-prior", "digits", "--overfitt", "8"], ["'overfitt'", "Did you mean overfit?", "--processes", "Sections: "]),
    "option of another command": (["run", "digits", "--overfit", "8"], ["'overfit'", "Other options: --processes"]),
    "value type": (["run", "digits", "--tokenizer.codebook_size", "many"], ["tokenizer.codebook_size", "'many'", "an integer"]),
    "value range": (["run", "digits", "--prior.dropout", "1"], ["prior.dropout is 1", "below 1"]),
    "value name": (["run", "digits", "--tokenizer.quantizer", "ema2"], ["tokenizer.quantizer is 'ema2'", "ema"]),
    "value missing": (["run", "digits", "--seed"], ["--seed needs a value"]),
    "combination": (["run", "digits", "--data.image_size", "17"], ["data.image_size is 17", "must be a multiple of"]),
    "stray word": (["run", "digits", "digits"], ["'digits' was not expected"]),
    "data path": (["run", "image_folder", "--data.path", "/nowhere/at/all"], ["data.path is '/nowhere/at/all'", "does not exist"]),
    "data path missing": (["run", "image_folder"], ["data.path is not given", "--data.path"]),
    "data path in check-data": (["check-data", "image_folder", "--data.path", "/nowhere/at/all"], ["data.path is '/nowhere/at/all'"]),
    "data without images": (["run", "image_folder", "--data.path", "{nowhere}"], ["data.path is", "without images", ".png"]),
    "run_dir is a file": (["run", "digits", "--run_dir", "{nowhere}/file.txt"], ["run_dir is", "file.txt", "folder"]),
    "run_dir in a file": (["run", "digits", "--run_dir", "{nowhere}/file.txt/run"], ["run_dir is", "file.txt", "folder"]),
    "architecture": (["run", "digits", "--run_dir", "{nowhere}/r", "--prior.architecture", "lama"],
                     ["prior.architecture is 'lama'", "llama, gpt2, qwen3", "Did you mean 'llama'?"]),
    "odd heads": (["run", "digits", "--run_dir", "{nowhere}/r", "--prior.width=36", "--prior.heads=4"],
                  ["prior.width is 36", "prior.heads is 4", "multiple of 8"]),
    "tracker": (["run", "digits", "--run_dir", "{nowhere}/r", "--prior_training.trackers", "[tensorbord]"],
                ["prior_training.trackers", "'tensorbord'", "Did you mean 'tensorboard'?"]),
    "tracker not installed": (["train-tokenizer", "digits", "--run_dir", "{nowhere}/r", "--tokenizer_training.trackers", "[clearml]"],
                              ["tokenizer_training.trackers", "'clearml'", "not installed"]),
    "checkpoint": (["train-tokenizer", "digits", "--run_dir", "{nowhere}/r", "--tokenizer_training.resume", "atuo"],
                   ["tokenizer_training.resume is 'atuo'", "auto, never", "Did you mean 'auto'?"]),
    "processes": (["run", "digits", "--processes", "0"], ["--processes is 0", "at least 1"]),
    "processes that do not divide": (["train-tokenizer", "digits", "--processes=3", "--run_dir={nowhere}/r", "--tokenizer_training.batch_size=64"],
                                     ["tokenizer_training.batch_size is 64", "3 processes", "66"]),
    "processes not a number": (["run", "digits", "--processes", "two"], ["--processes", "'two'"]),
    "accelerate config": (["run", "digits", "--accelerate_config", "{nowhere}/no.yaml"], ["--accelerate_config", "no.yaml"]),
    "redo": (["run", "digits", "--redo", "priors"], ["--redo is 'priors'", "tokenizer, conditions, tokens, prior, pipeline",
                                                     "Did you mean 'prior'?"]),
    "redo of an input": (["train-prior", "digits", "--redo", "tokenizer"], ["--redo tokenizer", "the input of train-prior", "--redo prior"]),
    "inputs of preprocess": (["preprocess", "digits", "--run_dir", "{nowhere}/r"], ["r/tokenizer is not a tokenizer", "vqmosaic train-tokenizer"]),
    "inputs of train-prior": (["train-prior", "digits", "--run_dir", "{nowhere}/r"], ["r/tokens/train", "vqmosaic preprocess"]),
    "inputs of bundle": (["bundle", "digits", "--run_dir", "{nowhere}/r"], ["r/prior is not a prior", "vqmosaic train-prior"]),
    "parts made elsewhere in a chain": (["run", "digits", "--tokens.tokenizer", "a/tokenizer"], ["tokens.tokenizer is 'a/tokenizer'", "preprocess"]),
    "bundle parts": (["bundle", "--tokenizer", "{nowhere}", "--prior", "{run}/prior", "--out", "{nowhere}/p"], ["is not a tokenizer", "config.json"]),
    "bundle parts swapped": (["bundle", "--tokenizer", "{run}/prior", "--prior", "{run}/tokenizer", "--out", "{nowhere}/p"], ["is not a prior"]),
    "bundle onto a folder": (["bundle", "--tokenizer", "{run}/tokenizer", "--prior", "{run}/prior", "--out", "{nowhere}"], ["would be lost"]),
    "bundle onto a file": (["bundle", "--tokenizer", "{run}/tokenizer", "--prior", "{run}/prior", "--out", "{nowhere}/file.txt"], ["is a file"]),
    "bundle settings": (["bundle", "--tokenizer", "{run}/tokenizer", "--prior", "{run}/prior", "--out", "{nowhere}/p", "--top_k", "33"],
                        ["--top_k is 33", "32"]),
    "bundle without all parts": (["bundle", "--tokenizer", "{run}/tokenizer"], ["--prior", "--out"]),
    "pipeline missing": (["generate", "/nowhere/at/all"], ["/nowhere/at/all does not exist", "pipeline.json", "vqmosaic bundle"]),
    "pipeline not finished": (["generate", "{nowhere}"], ["has no finished pipeline"]),
    "class name": (["generate", "{run}", "--classes", "cat"], ["no class 'cat'", "0, 1, 2"]),
    "class index": (["generate", "{run}", "--classes", "3,10"], ["no class '10'", "there are 10"]),
    "class like a digit": (["generate", "{run}", "--classes", "²"], ["no class '²'"]),
    "no class": (["generate", "{run}", "--classes", "3,"], ["no class ''"]),
    "num": (["generate", "{run}", "--num", "0"], ["--num is 0", "at least 1"]),
    "num not a number": (["generate", "{run}", "--num", "four"], ["--num", "'four'"]),
    "temperature": (["generate", "{run}", "--temperature", "-1"], ["--temperature is -1", "at least 0"]),
    "infinite guidance": (["generate", "{run}", "--guidance_scale", "inf"], ["--guidance_scale is inf"]),
    "top_k": (["generate", "{run}", "--top_k", "33"], ["--top_k is 33", "32"]),
    "top_p": (["generate", "{run}", "--top_p", "0"], ["--top_p is 0", "above 0"]),
    "out": (["generate", "{run}", "--out", "{nowhere}/file.txt"], ["--out is", "which is a file"]),
    "device": (["generate", "{run}", "--device", "gpu"], ["--device is 'gpu'", "cpu"]),
    "dtype": (["generate", "{run}", "--dtype", "half"], ["--dtype", "'half'", "bfloat16"]),
    "option": (["generate", "{run}", "--clases", "3"], ["--clases", "Did you mean --classes?"]),
    "image missing": (["reconstruct", "{run}", "{nowhere}/fil.txt"], ["fil.txt' does not exist", "Did you mean", "file.txt"]),
    "image unreadable": (["reconstruct", "{run}", "{nowhere}/file.txt"], ["file.txt' cannot be read"]),
    "image is a folder": (["reconstruct", "{run}", "{nowhere}"], ["is a folder"]),
    "no image": (["reconstruct", "{run}"], ["IMAGE"]),
    "reconstruct without a pipeline": (["reconstruct", "{nowhere}", "{nowhere}/file.txt"], ["has no finished pipeline"]),
    "audit path": (["audit", "/nowhere/at/all"], ["/nowhere/at/all does not exist"]),
    "audit folder": (["audit", "{nowhere}"], ["manifest.json"]),
    "audit recipe": (["audit", "{run}", "--recipe", "digts"], ["'digts'", "Did you mean 'digits'?"]),
    "audit stray": (["audit", "{run}", "--seed=3"], ["'--seed=3' was not expected"]),
    "demo pipeline": (["demo", "/nowhere/at/all"], ["/nowhere/at/all does not exist"]),
    "doctor stray": (["doctor", "now"], ["unrecognized arguments: now"]),
}

MAY_LOAD = {"data path missing": ("torch",), "architecture": ("torch", "transformers"), "device": ("torch",)}
"""Slow libraries that the check needs: whether there is a GPU, and the architectures that transformers has."""


@pytest.mark.parametrize("name", INVALID_CALLS)
def test_invalid_call_is_rejected(name, nowhere, tiny_run, error_message):
    arguments, expected = INVALID_CALLS[name]
    message = error_message(*(argument.format(nowhere=nowhere, run=tiny_run) for argument in arguments), may_load=MAY_LOAD.get(name, ()))
    assert all(part.replace("{run}", str(tiny_run)) in message for part in expected), message
    assert not (nowhere / "r").exists() and not (nowhere / "p").exists(), "a rejected call leaves no files behind"


def test_bundle_rejects_mismatched_parts(tiny_run, tmp_path, error_message):
    recipe = tiny_recipe(tmp_path)
    ImageTokenizer(recipe.tokenizer, ImageTransform(image_size=16, channels=1), seed=1).save_pretrained(tmp_path / "tokenizer")
    message = error_message("bundle", "--tokenizer", tmp_path / "tokenizer", "--prior", tiny_run / "prior", "--out", tmp_path / "pipeline")
    for folder, name in ((tmp_path / "tokenizer", "config.json"), (tiny_run / "prior", "vocabulary.json")):
        assert str(folder) in message and json.loads((folder / name).read_text())["token_fingerprint"][:16] in message
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize(("changes", "expected"), [
    ({"tokenizer__code_dim": 9}, ["tokenizer.code_dim = 8, now it is 9", "--redo tokenizer"]),
    ({"tokenizer_training__max_steps": 4}, ["tokenizer_training.max_steps = 6, now it is 4", "can only grow"]),
    ({"tokens__views": "shifts"}, ["tokens.views = 'none', now it is 'shifts'", "--redo tokens"]),
    ({"prior__layers": 2}, ["prior.layers = 1, now it is 2", "--redo prior"]),
    ({"tokenizer_training__max_steps": 9}, ["stage tokenizer has grown", "--redo tokens"]),
], ids=str)
def test_changed_recipe_of_a_finished_run_is_rejected(changes, expected, tiny_run, error_message):
    recipe = (tiny_run / "recipe.yaml").read_bytes()
    message = error_message("run", "digits", *tiny_overrides(tiny_run, **changes))
    assert all(part in message for part in expected), message
    assert (tiny_run / "recipe.yaml").read_bytes() == recipe


def test_damaged_files_are_reported(tiny_copy, tiny_run, error_message):
    (tiny_copy / "pipeline" / "pipeline.json").write_text("{")
    assert "pipeline.json is not JSON" in error_message("generate", tiny_copy)
    (tiny_copy / "tokenizer" / "config.json").write_text("[]")
    assert "does not contain a JSON object" in error_message("preprocess", tiny_copy, "--redo", "tokens")
    (tiny_copy / "prior" / "model.safetensors").unlink()
    parts = ("--tokenizer", tiny_run / "tokenizer", "--prior", tiny_copy / "prior")
    assert "model.safetensors is missing" in error_message("bundle", *parts, "--out", tiny_copy / "joined")


# --- valid calls -------------------------------------------------------------------------------------------------------------


def test_rerunning_a_finished_run_does_nothing(tiny_run):
    started = time.monotonic()
    probe = ("import sys\nfrom pipelines.command_line import dispatch\n"
             f"code = dispatch(['run', {str(tiny_run)!r}])\nassert code == 0 and 'torch' not in sys.modules\n")
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file() and path.name not in ("recipe.yaml", ".lock")}
    result = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished already") == 4 and f"nothing to do: {tiny_run} is finished" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert time.monotonic() - started < SLACK * ERROR_SECONDS


@pytest.mark.parametrize("stage_command", ["train-tokenizer", "preprocess", "train-prior"])
def test_rerunning_a_finished_stage_does_nothing(stage_command, tiny_run, capsys):
    assert dispatch([stage_command, str(tiny_run)]) == 0
    assert "finished already" in capsys.readouterr().out


def test_generate_writes_images_and_a_grid(tiny_run, tmp_path):
    result, _ = timed("generate", tiny_run, "--classes", "3,7", "--num", "3", "--seed", "7", "--out", tmp_path / "out")
    assert result.returncode == 0 and result.stdout.strip() == f"wrote 6 images and grid.png to {tmp_path / 'out'}" and not result.stderr
    assert set(pictures(tmp_path / "out")) == {"3-0.png", "3-1.png", "3-2.png", "7-0.png", "7-1.png", "7-2.png", "grid.png"}
    with Image.open(tmp_path / "out" / "3-0.png") as image:
        assert image.size == (16, 16) and image.mode == "L"
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width > grid.height, "one row per class"


def test_same_seed_gives_the_same_files(tiny_run, tmp_path):
    def generated(name: str, *arguments: str) -> dict[str, bytes]:
        assert dispatch(["generate", str(tiny_run), "--out", str(tmp_path / name), *arguments]) == 0
        return pictures(tmp_path / name)

    first = generated("a", "--classes", "3,7", "--num", "2", "--seed", "7")
    assert generated("b", "--classes", "3,7", "--num", "2", "--seed", "7") == first
    assert generated("c", "--classes", "3,7", "--num", "2", "--seed", "8") != first
    more = generated("d", "--classes", "3", "--num", "5", "--seed", "7")
    assert (more["3-0.png"], more["3-1.png"]) == (first["3-0.png"], first["3-1.png"]), "earlier images do not depend on --num"
    assert len({more[name] for name in more}) == 6


def test_repeated_class_gets_distinct_files(tiny_run, tmp_path):
    assert dispatch(["generate", str(tiny_run), "--classes", "3,3", "--num", "2", "--out", str(tmp_path)]) == 0
    assert set(pictures(tmp_path)) == {"3-0.png", "3-1.png", "3-2.png", "3-3.png", "grid.png"}


def test_generate_from_a_pipeline_folder_uses_all_classes_by_default(tiny_run, tmp_path, capsys):
    assert dispatch(["generate", str(tiny_run / "pipeline"), "--num", "1", "--out", str(tmp_path), "--temperature", "0.9", "--top_k", "5",
                     "--top_p", "0.9", "--guidance_scale", "1", "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert set(pictures(tmp_path)) == {f"{digit}-0.png" for digit in range(10)} | {"grid.png"}
    assert "wrote 10 images" in capsys.readouterr().out


def test_reconstruct_names_files_after_the_images(tiny_run, tmp_path, capsys):
    for number, (folder, mode, size) in enumerate((("a", "RGB", (40, 30)), ("b", "RGBA", (8, 8)), ("b", "L", (16, 16)))):
        (tmp_path / folder).mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], *([len(mode)] if len(mode) > 1 else [])), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / folder / ("same.png" if number < 2 else "grid.png"))
    images = [str(tmp_path / name) for name in ("a/same.png", "b/same.png", "b/grid.png")]
    assert dispatch(["reconstruct", str(tiny_run), *images, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == f"wrote 3 reconstructions and grid.png (originals over reconstructions) to {tmp_path / 'out'}"
    assert set(pictures(tmp_path / "out")) == {"same.png", "same_.png", "grid_.png", "grid.png"}


def test_audit_compares_with_the_data_set_of_the_run(tiny_run, capsys):
    assert dispatch(["audit", str(tiny_run)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"compared with the data set of {tiny_run}",
                                                    "train: 1,418 samples in 4 shards, 0 skipped: no problems",
                                                    "validation: 379 samples in 1 shard, 0 skipped: no problems"]


def test_audit_reports_problems_and_exits_with_1(tiny_copy, capsys):
    shard = tiny_copy / "tokens" / "train" / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert dispatch(["audit", str(tiny_copy / "tokens")]) == 1
    stdout = capsys.readouterr().out
    assert "shard-000001.tar" in stdout and stdout.count("no problems") == 1
    assert "validation: 379 samples in 1 shard, 0 skipped: no problems" in stdout


def test_audit_of_a_single_split_and_with_another_data_set(tiny_run, capsys):
    assert dispatch(["audit", str(tiny_run / "tokens" / "train")]) == 0
    assert "train: 1,418" in capsys.readouterr().out
    assert dispatch(["audit", str(tiny_run), "--recipe", "digits", "--data.validation_fraction", "0.5"]) == 1


def test_check_data_lists_unreadable_images(tmp_path, capsys):
    for number in range(5):
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / "cat" / f"{number}.png")
    arguments = ["check-data", "image_folder", f"--data.path={tmp_path}"]
    assert dispatch(arguments) == 0 and "5 of 5 images are readable" in capsys.readouterr().out
    (tmp_path / "cat" / "3.png").write_bytes(b"broken")
    assert dispatch(arguments) == 1
    stdout = capsys.readouterr().out
    assert "unreadable: cat/3.png" in stdout and "4 of 5 images are readable" in stdout


def test_doctor_prints_versions_device_and_recipes(capsys):
    assert dispatch(["doctor"]) == 0
    stdout = capsys.readouterr().out
    for word in ("torch", "transformers", "gradio", "threads 1 of",
                 "mixed_precision auto is", f"recipes: {', '.join(shipped_names())}", __version__):
        assert word in stdout
    if default_device().type == "cpu":
        cores = os.cpu_count()
        assert f"    cpu: {processor_name()}, {cores} core{'' if cores == 1 else 's'}\n" in stdout


def test_example_classes_match_the_readme():
    digits = [str(digit) for digit in range(10)]
    assert f"--classes {example_classes(digits)} --num 8 --seed 7" in (ROOT / "README.md").read_text()
    assert [example_classes(names) for names in ([], ["cat"], ["cat", "dog"], ["a", "b", "c"])] == ["", "cat", "cat,dog", "a,c"]


def test_default_output_folder_is_printed(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (16, 16)).save("one.png")
    assert dispatch(["generate", str(tiny_run), "--num", "1", "--classes", "3"]) == 0
    assert capsys.readouterr().out.startswith(f"without --out, the images are written to {tmp_path / 'samples'}\n")
    assert dispatch(["reconstruct", str(tiny_run), "one.png"]) == 0
    assert capsys.readouterr().out.startswith(f"without --out, the images are written to {tmp_path / 'reconstructions'}\n")


def test_doctor_says_how_to_install_a_missing_package(monkeypatch, capsys):
    from pipelines import doctor

    monkeypatch.setattr(doctor, "installed_version", lambda package: None if package == "torch" else "1.0")
    assert dispatch(["doctor"]) == 0
    stdout = capsys.readouterr().out
    assert "torch          MISSING" in stdout and "to fix: pip install torch" in stdout and "mixed_precision" not in stdout


def test_bundle_joins_parts_given_by_path(tiny_run, tmp_path, capsys):
    arguments = ["bundle", "--tokenizer", str(tiny_run / "tokenizer"), "--prior", str(tiny_run / "prior"), "--out", str(tmp_path / "joined")]
    result, seconds = timed(*arguments)
    assert result.returncode == 0 and result.stdout.strip() == f"bundled {tmp_path / 'joined'}" and seconds < SLACK * ERROR_SECONDS
    assert dispatch([*arguments, "--guidance_scale", "2", "--top_k", "8"]) == 0, "an existing pipeline is replaced"
    content = json.loads((tmp_path / "joined" / "pipeline.json").read_text())
    sampling = dataclasses.asdict(SamplingConfig(guidance_scale=2.0, top_k=8))
    assert sampling.pop("guidance") == {} and content["sampling"] == sampling
    assert dispatch(["generate", str(tmp_path / "joined"), "--num", "1", "--classes", "3", "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joined", "out"], "no temporary folders are left"


def test_single_stages_with_the_tokenizer_of_another_run(tiny_run, tmp_path, capsys):
    own = tiny_overrides(tmp_path / "b", tokens__tokenizer=tiny_run / "tokenizer", prior__layers=2)
    assert dispatch(["preprocess", "digits", *own]) == 0
    assert dispatch(["train-prior", "digits", *own]) == 0
    assert dispatch(["bundle", "digits", *own]) == 0
    assert dispatch(["bundle", str(tmp_path / "b")]) == 0, "the recipe in the run folder names the parts"
    for shard in sorted((tiny_run / "tokens" / "train").glob("*.tar")):
        assert (tmp_path / "b" / "tokens" / "train" / shard.name).read_bytes() == shard.read_bytes()
    assert dispatch(["generate", str(tmp_path / "b"), "--num", "1", "--classes", "3", "--out", str(tmp_path / "out")]) == 0


def test_redo_prior_reruns_prior_and_bundle(tiny_copy, capsys):
    def times(*names: str) -> list[int]:
        return [(tiny_copy / name).stat().st_mtime_ns for name in names]

    kept = ("tokenizer/model.safetensors", "tokenizer/config.json", "tokens/train/manifest.json", "tokens/train/shard-000000.tar")
    before = times(*kept)
    prior = (tiny_copy / "prior" / "model.safetensors").read_bytes()
    assert dispatch(["run", "digits", *tiny_overrides(tiny_copy, prior__layers=2), "--redo", "prior"]) == 0
    stdout = capsys.readouterr().out
    assert "--redo prior: removed prior, pipeline" in stdout and stdout.count("finished already") == 2
    assert times(*kept) == before
    assert (tiny_copy / "prior" / "model.safetensors").read_bytes() != prior
    assert (tiny_copy / "pipeline" / "prior" / "model.safetensors").read_bytes() == (tiny_copy / "prior" / "model.safetensors").read_bytes()
    assert dispatch(["run", str(tiny_copy)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_image_folder_without_classes(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    assert dispatch(["run", "image_folder", *tiny_overrides(tmp_path / "run", data__path=photos)]) == 0
    stdout = capsys.readouterr().out
    assert "does not use sampling.guidance_scale 1.5" in stdout and "classes                       none" in stdout
    assert Vocabulary.load(tmp_path / "run" / "prior").class_names is None
    assert dispatch(["generate", str(tmp_path / "run"), "--num", "3", "--out", str(tmp_path / "out")]) == 0
    assert set(pictures(tmp_path / "out")) == {"sample-0.png", "sample-1.png", "sample-2.png", "grid.png"}
    for options in (["--classes", "cat"], ["--guidance_scale", "2"]):
        with pytest.raises(InputError, match="class"):
            dispatch(["generate", str(tmp_path / "run"), *options])


@pytest.mark.slow
def test_run_and_rerun_in_a_subprocess(tmp_path):
    result, _ = timed("run", "digits", *tiny_overrides(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    for word in ("measured", "reconstruction, validation", "\n    total  ", "samples.png", "vqmosaic generate"):
        assert word in result.stdout
    for name in ("samples.png", "reconstructions.png", "summary.json", "recipe.yaml", "pipeline/pipeline.json"):
        assert (tmp_path / "run" / name).is_file()
    again, seconds = timed("run", "digits", *tiny_overrides(tmp_path / "run"))
    assert again.returncode == 0 and "nothing to do" in again.stdout and seconds < SLACK * ERROR_SECONDS


@pytest.mark.parametrize(("given", "expected"), [({}, "6000"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_spin_count_is_set_before_torch_is_imported_unless_given(given, expected):
    program = ("import atexit, os, sys; from pipelines.command_line import main; assert 'torch' not in sys.modules; "
               "sys.argv = ['vqmosaic', '--version']; atexit.register(lambda: print(os.environ.get('GOMP_SPINCOUNT'))); main()")
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    finished = subprocess.run([sys.executable, "-c", program], env=environment | given, capture_output=True, text=True, check=True)
    assert finished.stdout.split() == [__version__, expected]
