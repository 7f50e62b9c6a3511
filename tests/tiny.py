"""A small digits run for tests: overrides of the shipped recipe, and functions that run it. It trains for about a second on one thread.

    from tests.tiny import make_tiny_run, tiny_overrides, tiny_recipe

The session fixture `tiny_run` (tests/conftest.py) is a finished run that all tests share; `tiny_copy` is a copy that a test may change.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from vqmosaic.recipes.recipe import Recipe, recipe_fields
from vqmosaic.recipes.recipe_files import load_recipe

ROOT = Path(__file__).resolve().parent.parent
GRID_SIZE, CODES = 4, 32
SETTINGS = {
    "data.image_size": 16, "data.workers": 0, "data.shift": 1, "data.validation_fraction": 0.2,
    "tokenizer.codebook_size": CODES, "tokenizer.code_dim": 8, "tokenizer.latent_channels": 32, "tokenizer.channels": 32,
    "tokenizer.channel_multipliers": [1, 1, 1], "tokenizer.residual_blocks": 1, "tokenizer.middle_attention": "false",
    "tokenizer_training.max_steps": 6, "tokenizer_training.batch_size": 16, "tokenizer_training.validation_images": 64,
    "tokenizer_training.validate_every": 3, "tokenizer_training.checkpoint_every": 2, "tokenizer_training.log_every": 1,
    "tokenizer_training.mixed_precision": "no", "tokenizer_training.learning_rate_batch": "null",
    "tokens.views": "none", "tokens.images_per_shard": 400, "tokens.batch_size": 32, "tokens.threads": 1,
    "prior.width": 32, "prior.layers": 1, "prior.heads": 2,
    "prior_training.max_steps": 6, "prior_training.batch_size": 16, "prior_training.validation_images": 64,
    "prior_training.validate_every": 3, "prior_training.checkpoint_every": 2, "prior_training.log_every": 1,
    "prior_training.mixed_precision": "no", "prior_training.learning_rate_batch": "null", "prior_training.label_drop": 0.1,
    "prior_training.export": "best",
    "sampling.guidance_scale": 1.5, "sampling.temperature": 1.0, "sampling.top_k": 0, "sampling.top_p": 1.0,
}
"""Overrides that make the digits recipe small: 16 tokens, 32 codes, six steps per stage, a checkpoint every two steps."""


ANY_ORDER = {"prior__architecture": "grid_transformer", "prior__layers": 2, "prior_training__order": "annealed", "sampling__order": "spread",
             "sampling__steps": 4}
"""Changes for a prior that predicts in any order."""
HIERARCHICAL = {"tokenizer__kind": "hierarchical", "tokenizer__top": '{"codebook_size": 16, "code_dim": 4}'}
"""Changes for a tokenizer with two levels: 2 x 2 tokens of 16 codes and 4 x 4 tokens of 32 codes."""


def tiny_overrides(run_dir: Path | str, **changes: object) -> list[str]:
    """Command line overrides for a tiny digits run. In the names of `changes`, two underscores stand for a dot: prior__layers=2."""
    settings = {"run_dir": run_dir, **SETTINGS, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [f"--{name}={value}" for name, value in settings.items()]


def tiny_recipe(run_dir: Path | str, **changes: object) -> Recipe:
    """The recipe of a tiny digits run."""
    return load_recipe("digits", tiny_overrides(run_dir, **changes))


def fields_of(recipe: Recipe) -> dict[str, object]:
    """Dotted name -> value of each field of a recipe."""
    return {field.name: field.value for field in recipe_fields(recipe)}


def command(*arguments: object, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
    """Run the vqmosaic command in a new process, from the project root, with one thread."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-m", "pipelines.command_line", *map(str, arguments)], cwd=ROOT, env=variables,
                          capture_output=True, text=True, timeout=timeout)


def run_tiny_chain(recipe: Recipe, **options: object) -> int:
    """Run all stages of a recipe in this process, measure few samples, and return the exit code. `options` are those of run_chain."""
    from pipelines.stages import measures
    from pipelines.stages.chain import run_chain

    with patch.object(measures, "SAMPLES", 50):
        return run_chain(recipe, **options)


def make_tiny_run(run_dir: Path | str, **changes: object) -> Path:
    """Run all stages of a tiny digits run in this process and return the run folder."""
    assert run_tiny_chain(tiny_recipe(run_dir, **changes)) == 0
    return Path(run_dir)


def copy_tokens(run: Path, run_dir: Path) -> Path:
    """Make a run folder that has only the tokens of a finished run, and return it."""
    shutil.copytree(run / "tokens", run_dir / "tokens")
    return run_dir
