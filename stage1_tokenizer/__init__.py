"""Stage 1: trains a discrete image tokenizer. Names are imported on first use."""

import importlib

_MODULE_OF_NAME = {
    "HierarchicalTokenizer": "trainable.hierarchical_tokenizer",
    "ImageTokenizer": "tokenizer",
    "Tokenizer": "tokenizer_protocol",
    "load_tokenizer": "tokenizer_protocol",
    "QUANTIZERS": "quantizers",
    "ImageTransform": "image_files.images",
    "View": "image_files.views",
    "decode_tiled": "tiles.tiled_images",
    "encode_tiled": "tiles.tiled_images",
    "reconstruct_tiled": "tiles.tiled_images",
}
__all__ = list(_MODULE_OF_NAME)


def __getattr__(name: str):
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)
