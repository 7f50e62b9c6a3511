"""Stage 1: images in, a discrete tokenizer out. Names are loaded when first used, so that looking costs nothing."""

import importlib

_HOME = {
    "ImageTokenizer": "tokenizer",
    "QUANTIZERS": "quantizers",
    "ImageTransform": "image_files.images",
    "View": "image_files.images",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
