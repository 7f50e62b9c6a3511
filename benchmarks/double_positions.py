"""The other layout of a prior for any order: double positions, as in sigma-GPT (Pannatier et al. 2024, 2404.09562).

Each element of the sequence is a known token and the place of the token to predict. There are no query blocks. To predict several tokens in a pass,
the last known token is repeated with other places, and each drawn token passes through the model a second time as a known token. So sampling
processes most tokens twice. benchmarks/parallel_sampling.py compares what both layouts learn in equal time. Training needs no cache, so there is
none here.
"""

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from stage2_prior.model.causal_lm import make_causal_lm
from stage2_prior.model.grid_transformer import GridTransformer
from stage2_prior.vocabulary import Vocabulary
from vqmosaic.recipes.recipe_sections import PriorConfig


class DoublePositionTransformer(GridTransformer):
    """A GridTransformer without query blocks that rotates queries by the place to predict and keys by the place that they hold."""

    predicts_in_any_order = True

    def forward(self, input_ids: torch.Tensor, places: torch.Tensor | None = None, targets: torch.Tensor | None = None,
                **unused) -> CausalLMOutputWithPast:
        """Logits (B, S, K) of the targets, each from the ids up to its own, or in raster order."""
        if places is None or targets is None:
            targets = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
            places = targets - 1
        tables = self.rotations(input_ids.device)
        rotations = torch.stack([tables[:, 0][targets], tables[:, 1][places + 1]], dim=2)         # B, S, query or key, p, 2
        x_BSD = self.embed_ids(input_ids, targets)
        classes_B = self.starting_classes(input_ids, 0)[0]
        for block in self.blocks:
            x_BSD = block(x_BSD, input_ids, classes_B, rotations)
        return CausalLMOutputWithPast(logits=self.head(self.final_norm(x_BSD)))


def make_double_positions(prior: PriorConfig, vocabulary: Vocabulary, seed: int, any_order: bool) -> DoublePositionTransformer:
    """A new model with the weights that make_causal_lm gives a GridTransformer for raster order. Can replace make_causal_lm."""
    model = make_causal_lm(prior, vocabulary, seed)
    model.__class__ = DoublePositionTransformer
    return model
