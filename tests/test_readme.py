"""Commands in README.md and docs/ are valid, and their Python snippets run on a tiny finished run."""

import dataclasses
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipelines import command_line
from pipelines.bundle import make_bundle
from stage1_tokenizer import HierarchicalTokenizer, ImageTokenizer, ImageTransform, load_tokenizer
from stage2_prior.segments import GivenGrid
from tests.conditioned import CLASSES, LOW_DERIVATION, SIZE, given_low, given_text, image_tokenizer, saved_prior
from tests.tiny import ANY_ORDER, ROOT, make_tiny_run, tiny_overrides
from vqmosaic.recipes.data_section import DIGITS
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig

GENERATED = ("recipe_reference.md", "benchmarks.md")
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in GENERATED)]
BLOCKS = [block for page in PAGES for block in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.DOTALL)]
LINES = [line.split("#")[0].strip() for language, block in BLOCKS if language == "bash" for line in block.splitlines() if line.strip()]
COMMANDS = list(dict.fromkeys(LINES))
SNIPPETS = list(dict.fromkeys(block for language, block in BLOCKS if language == "python"))


@pytest.fixture(scope="session")
def conditioned_runs(tmp_path_factory) -> dict[str, Path]:
    """Run name -> pipeline folder, for priors that are given a low resolution, a paired image or a text, with random weights."""
    root, folders = tmp_path_factory.mktemp("conditioned"), {}
    for run, name, derived in (("large", "low", LOW_DERIVATION), ("sketches", "sketch", None), ("captions", "text", None)):
        tokenizer, own = image_tokenizer(root / run / "tokenizer"), image_tokenizer(root / run / name, derived=derived, seed=1)
        loaded = ImageTokenizer.from_pretrained(tokenizer)
        given = given_text() if name == "text" else given_low(own)
        if name != "text":
            given = dataclasses.replace(given, grid=dataclasses.replace(given.grid, name=name))
        prior = saved_prior(root / run / "prior", loaded.grids, loaded.token_fingerprint, [given], class_drop=0.1)
        folders[run] = make_bundle(tokenizer, prior, root / run / "pipeline", SamplingConfig(), {} if name == "text" else {name: own})
    return folders


@pytest.fixture(scope="session")
def level_runs(tmp_path_factory) -> Path:
    """The runs of docs/two_levels.md with random weights: levels, with one prior of two grids, and top and bottom, whose priors two_priors joins."""
    root = tmp_path_factory.mktemp("levels")
    config = TokenizerConfig(kind="hierarchical", channels=32, channel_multipliers=[1, 1, 1], residual_blocks=0, codebook_size=16, code_dim=8,
                             latent_channels=8, middle_attention=False)
    HierarchicalTokenizer(config, ImageTransform(SIZE, 1), CLASSES).eval().save_pretrained(root / "top/tokenizer")
    tokenizer = load_tokenizer(root / "top/tokenizer")
    grids, fingerprint = tokenizer.grids, str(tokenizer.token_fingerprint)
    both = saved_prior(root / "levels/prior", grids, fingerprint)
    first = saved_prior(root / "top/prior", grids[:1], fingerprint)
    second = saved_prior(root / "bottom/prior", grids[1:], fingerprint, [GivenGrid(grid=grids[0])])
    make_bundle(root / "top/tokenizer", both, root / "levels/pipeline", SamplingConfig())
    make_bundle(root / "top/tokenizer", [first, second], root / "two_priors/pipeline", SamplingConfig())
    return root


def make_conditioned_runs(folders: dict[str, Path], root: Path) -> None:
    """Link the pipelines, and write the images that the documented commands give them."""
    for run, folder in (folders | {"digits_superres": folders["large"], "digits_edges": folders["sketches"]}).items():
        (root / "runs" / run).mkdir()
        (root / "runs" / run / "pipeline").symlink_to(folder)
    (root / "small").mkdir()
    shutil.copytree(root / "photos", root / "sketches")
    for path in (root / "small/1.png", root / "small/2.png", root / "my-sketch.png"):
        Image.new("L", (8, 8), 100).save(path)
    for folder in ("small-digits", "edges-of-digits"):
        shutil.copytree(root / "small", root / folder)
    Image.linear_gradient("L").resize((16, 16)).save(root / "photo.png")
    Image.linear_gradient("L").resize((28, 28)).save(root / "digit.png")
    for size, name in ((16, "photo-mask"), (28, "mask")):
        mask = Image.new("1", (size, size))
        mask.paste(1, (5, 3, 11, 9))
        mask.save(root / f"{name}.png")
    for name in ("blot", "noisy"):
        shutil.copyfile(root / "digit.png", root / f"{name}.png")
    Image.new("L", (21, 21), 100).save(root / "part.png")


@pytest.fixture(scope="session")
def digits_at_28_run(tmp_path_factory) -> Path:
    """The folder of a finished tiny run with the token grid, the classes and the order of recipe mnist, on the scans of scikit-learn."""
    changes = ANY_ORDER | {"data__image_size": 28, "tokenizer__patch_size": 4, "tokenizer__channel_multipliers": [1]}
    run = make_tiny_run(tmp_path_factory.mktemp("digits_at_28") / "run", **changes)
    assert load_recipe("mnist").num_tokens == load_recipe(str(run)).num_tokens == 49
    return run


@pytest.fixture
def workplace(tiny_run, any_order_run, digits_at_28_run, conditioned_runs, level_runs, tmp_path, monkeypatch) -> Path:
    """A folder with all files that the documented commands use."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (64, 64), (index * 20, 0, 0)).save(tmp_path / "photos" / name / f"{index:04d}.jpg")
    (tmp_path / "scans").symlink_to(tmp_path / "photos")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "parquet").symlink_to(tmp_path / "photos")
    (tmp_path / "runs").mkdir()
    finished = dict.fromkeys(("photos", "scans", "a", "b"), tiny_run) | {"cifar10_any_order": any_order_run, "quickstart": digits_at_28_run}
    for run, folder in finished.items():
        (tmp_path / "runs" / run).mkdir(parents=True)
        for child in folder.iterdir():  # links in a new folder, because commands write into it
            (tmp_path / "runs" / run / child.name).symlink_to(child)
    for name, rows in (("pretokenized", 12), ("validation", 4)):
        lines = [json.dumps({"class_id": row % 3, "tokens": [row] * 16}) for row in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    make_conditioned_runs(conditioned_runs, tmp_path)
    shutil.copytree(level_runs, tmp_path / "runs", dirs_exist_ok=True)
    (tmp_path / "runs/top/recipe.yaml").symlink_to(tiny_run / "recipe.yaml")
    (tmp_path / "inception.pt").write_bytes(b"a TorchScript file: it is not opened before the sweep begins")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_documentation_has_commands_and_snippets():
    assert len(COMMANDS) >= 12 and len(SNIPPETS) >= 3
    assert {command.split()[0] for command in COMMANDS} <= {"make", "vqmosaic", "source"}


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_python_snippet_runs(number, workplace, digits_at_28_run):
    """In this process, because a new one would import torch for each snippet."""
    codes = int(re.search(r'"codebook_size": (\d+)', (digits_at_28_run / "tokenizer" / "config.json").read_text())[1])
    program = SNIPPETS[number].replace("128 + 3", f"{codes} + 3").replace("read(470)", "read(3)")  # the tiny run has few images
    exec(compile(program, f"snippet {number}", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("vqmosaic ")])
def test_command_works(command, workplace, monkeypatch):
    """Commands that train are only parsed and checked. All others run."""
    words = shlex.split(command)[1:]
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            command_line.dispatch(words)
        assert stop.value.code == 0
    elif (words[0] in command_line.STAGE_COMMANDS or words[0] == "run") and "--overfit" not in words:
        recipe = command_line.parse_recipe_command(words[0], words[1:])[0].recipe
        assert recipe.data.path or recipe.data.source in DIGITS or recipe.prior_training.tokens
    else:
        calls = []
        monkeypatch.setattr("pipelines.demo.page.serve", lambda folder, **_: calls.append("demo"))
        monkeypatch.setattr("pipelines.sweep.sweep.run_sweep", lambda request: calls.append("sweep") or 0)
        assert command_line.dispatch(words) == 0
        assert bool(calls) == (words[0] in ("demo", "sweep"))


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    assert links or page.name != "README.md"
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists() and link not in GENERATED]
    assert not missing


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_notebook_runs_on_a_finished_run(workplace, tiny_run, monkeypatch, capsys):
    shutil.copytree(tiny_run, workplace / "runs" / "notebook")
    monkeypatch.setenv("OVERRIDES", "\n".join(tiny_overrides(Path("runs/notebook"))))
    runpy.run_path(str(ROOT / "docs" / "images_to_samples.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "nothing to do" in output and "tensor" in output


@pytest.mark.slow
def test_notebook_trains(tmp_path):
    overrides = "\n".join(tiny_overrides(Path("runs/notebook")))
    result = subprocess.run([sys.executable, str(ROOT / "docs" / "images_to_samples.py")], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OVERRIDES": overrides})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "notebook" / "samples.png").is_file()
