"""The wheel contains all packages and recipes, and works outside of the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT

PACKAGES = ("vqmosaic", "token_shards", "stage1_tokenizer", "stage2_prior", "pipelines")
IMPORT_ALL_MODULES = (
    "import importlib, pkgutil\n"
    f"for name in {PACKAGES!r}:\n"
    "    package = importlib.import_module(name)\n"
    "    for module in pkgutil.walk_packages(package.__path__, name + '.'):\n"
    "        importlib.import_module(module.name)\n"
    "        print(module.name, importlib.import_module(module.name).__file__)\n"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built without network access."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)], check=True)
    (built,) = folder.glob("vqmosaic-*.whl")
    return built


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command without this checkout on the Python path."""
    environment_without_path = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env={**environment_without_path, **environment}, capture_output=True, text=True)


def test_wheel_imports_all_modules_and_finds_recipes_by_name(wheel, tmp_path):
    target = tmp_path / "installed"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)], check=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    imported = run([sys.executable, "-c", IMPORT_ALL_MODULES], empty, PYTHONPATH=str(target))
    assert imported.returncode == 0, imported.stderr
    assert all(str(target) in line for line in imported.stdout.splitlines()), imported.stdout
    help_output = run([sys.executable, "-m", "pipelines.command_line", "--help"], empty, PYTHONPATH=str(target))
    assert help_output.returncode == 0 and "train-tokenizer" in help_output.stdout
    assert "digits" in help_output.stdout and "imagenet256" in help_output.stdout, "the recipes are not in the wheel"
    assert (target / "configs/accelerate/fsdp2.yaml").is_file(), "the accelerate configurations are not in the wheel"
    misspelled = run([sys.executable, "-m", "pipelines.command_line", "run", "digits", "--data.image_siz", "3"], empty, PYTHONPATH=str(target))
    assert misspelled.returncode == 2 and "data.image_size" in misspelled.stderr


@pytest.mark.slow
def test_wheel_in_an_empty_environment_runs_a_recipe_by_name(wheel, tmp_path):
    """Without the extras, everything except the demo can be imported, and the first steps of a recipe run."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    code = IMPORT_ALL_MODULES.replace(
        "        importlib.import_module(module.name)\n",
        "        if module.name.startswith('pipelines.demo'): continue\n        importlib.import_module(module.name)\n", 1)
    imported = run([str(python), "-c", code], tmp_path)
    assert imported.returncode == 0, imported.stderr
    overrides = ["--run_dir", str(tmp_path / "run"), "--tokenizer_training.max_steps", "2"]
    trained = run([str(tmp_path / "venv" / "bin" / "vqmosaic"), "train-tokenizer", "digits", *overrides], tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "tokenizer" / "model.safetensors").is_file()
    without_gradio = run([str(tmp_path / "venv" / "bin" / "vqmosaic"), "demo", str(tmp_path / "run")], tmp_path)
    assert without_gradio.returncode == 2
