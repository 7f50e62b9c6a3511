"""nanoGPT's model, from a checkout of its repository that the caller has; none of it is part of this project."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load_nanogpt(checkout: Path) -> ModuleType:
    """Its model.py as a module, with GPT and GPTConfig."""
    path = checkout / "model.py"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: give --nanogpt a checkout of https://github.com/karpathy/nanoGPT.")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
