"""Deprecated: import stage2_prior.model.grid_transformer instead."""

import warnings

from stage2_prior.model.grid_transformer import GridTransformer
from stage2_prior.model.grid_transformer_config import GridTransformerConfig

warnings.warn("stage2_prior.grid_transformer is now stage2_prior.model.grid_transformer", DeprecationWarning, stacklevel=2)

__all__ = ["GridTransformer", "GridTransformerConfig"]
