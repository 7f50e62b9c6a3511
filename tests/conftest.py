"""One thread for every test and every process that a test starts: two threads each would fight over two cores."""

import os
import shutil
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.tiny import make_tiny_run

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever a test before has set: threads gain nothing on models this small, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The folder of one finished tiny digits run, made once for all tests, which only read it."""
    return make_tiny_run(tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture
def tiny_copy(tiny_run, tmp_path) -> Path:
    """A copy of the finished tiny run that a test may change; its recipe's run_dir is the copy."""
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(tiny_run), str(copy)))
    return copy
