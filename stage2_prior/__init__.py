"""Stage 2: an autoregressive transformer prior over image tokens. Names are loaded when first used, so that looking costs nothing."""

import importlib

_HOME = {
    "TokenPrior": "stage2_prior.prior",
    "Vocabulary": "stage2_prior.vocabulary",
    "SamplingConfig": "vqmosaic.recipes.recipe_sections",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
