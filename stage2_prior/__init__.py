"""Stage 2: an autoregressive transformer prior over image tokens. Names are imported on first use, so importing the package is cheap."""

import importlib

_MODULE_OF_NAME = {
    "TokenPrior": "stage2_prior.prior",
    "Vocabulary": "stage2_prior.vocabulary",
    "SamplingConfig": "vqmosaic.recipes.recipe_sections",
}
__all__ = list(_MODULE_OF_NAME)


def __getattr__(name: str):
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
