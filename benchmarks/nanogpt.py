"""Loads nanoGPT's model from a checkout of its repository, which is not part of this project."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load_nanogpt(checkout: Path) -> ModuleType:
    """Import model.py of the checkout as a module, with GPT and GPTConfig."""
    path = checkout / "model.py"
    if not path.is_file():
        raise SystemExit(f"{path} is missing. Give --nanogpt a checkout of https://github.com/karpathy/nanoGPT.")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
