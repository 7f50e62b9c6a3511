"""What chains the stages: preprocessing, bundling, generation, the demo and the command line. Names are loaded when first used."""

import importlib

_HOME = {
    "ImageGenerationPipeline": "generate",
    "GenerationOutput": "generate",
    "make_bundle": "bundle",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
