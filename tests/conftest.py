"""Fixtures and settings for all tests.

Tests and the processes that they start use one thread each, because parallel test workers share few cores.
"""

import os
import shutil
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.tiny import ANY_ORDER, copy_tokens, make_tiny_run

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Skip tests marked gpu on machines without a GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def one_thread():
    """Run each test with one thread, whatever earlier tests have set. Small models gain nothing from more, and threads wait on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The folder of a finished tiny digits run. All tests share it, so they must not change it."""
    return make_tiny_run(tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture(scope="session")
def any_order_run(tmp_path_factory) -> Path:
    """The folder of a finished tiny run whose prior predicts in any order. Tests must not change it."""
    return make_tiny_run(tmp_path_factory.mktemp("any_order") / "run", **ANY_ORDER)


@pytest.fixture
def tiny_copy(tiny_run, tmp_path) -> Path:
    """A copy of the finished tiny run that a test may change. The run_dir in its recipe is the copy."""
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(tiny_run), str(copy)))
    return copy


@pytest.fixture
def run_dir(tiny_run, tmp_path) -> Path:
    """A run folder with finished tokens and no training."""
    return copy_tokens(tiny_run, tmp_path / "run")
