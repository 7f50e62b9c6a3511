"""The last blocks of a GridTransformer for any order: queries for tokens, which attend to the tokens that are known.

The first blocks process known tokens and their places, without regard to what is predicted. The query blocks start from the place to predict, and
attend to keys and values that are computed once for each known token. So any number of tokens can be predicted at once, and each token passes
through each block once, as in ARPG (Li et al. 2025, 2503.10568). Each query block can add its own embeddings of the known ids to the values: the
blocks then read different things from the same tokens, for the cost of a lookup.

In comments: B batch, S known tokens (the class first), Q queries, D width, A heads, d head dimension, p pairs of a head.
"""

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from stage2_prior.model.grid_attention import attend, normalize_and_rotate
from stage2_prior.model.grid_transformer_config import GridTransformerConfig
from vqmosaic.kernels.dropout import dropout


class KeysAndValues(nn.Module):
    """Keys and values of the known tokens for all query blocks, which may add embeddings to the values."""

    def __init__(self, config: GridTransformerConfig):
        super().__init__()
        self.heads, self.epsilon = config.num_attention_heads, config.layer_norm_epsilon
        self.norm = nn.LayerNorm(config.hidden_size, eps=self.epsilon, bias=False)
        self.projection = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)

    def forward(self, x_BSD: torch.Tensor, rotations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, A, S, d) from the residual stream. Keys are normalized, and rotated by (S, p, 2) or (B, S, p, 2)."""
        keys, values = self.projection(self.norm(x_BSD)).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return normalize_and_rotate(keys, rotations, self.epsilon).transpose(1, 2), values.transpose(1, 2)


class QueryBlock(GradientCheckpointingLayer):
    """Attention to the known tokens and feed-forward, each added to the stream of queries."""

    def __init__(self, config: GridTransformerConfig, layer: int):
        super().__init__()
        width, hidden_width = config.hidden_size, config.query_feed_forward
        self.layer = layer
        self.heads, self.epsilon, self.dropout = config.num_attention_heads, config.layer_norm_epsilon, config.resid_pdrop
        self.attention_norm = nn.LayerNorm(width, eps=self.epsilon, bias=False)
        self.value_embedding = nn.Embedding(config.vocab_size, width) if config.query_embeddings else None
        self.attention_in = nn.Linear(width, width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.LayerNorm(width, eps=self.epsilon, bias=False)
        self.feed_forward_in = nn.Linear(width, hidden_width, bias=False)
        self.feed_forward_out = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x_BQD: torch.Tensor, ids_BS: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rotations: torch.Tensor,
                mask_QS: torch.Tensor | None, is_causal: bool, past_key_values: Cache | None = None) -> torch.Tensor:
        """The queries (B, Q, D) after the block, from keys and values (B, A, S, d).

        With value embeddings, these are the keys and values of the new ids, and the block has a layer in the cache. Otherwise, they are those of all
        ids. Without a mask, each query attends to all keys or, if causal, query q to the first q + 1.
        """
        if self.value_embedding is not None:
            values = values + self.value_embedding(ids_BS).to(values.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            if past_key_values is not None:
                keys, values = past_key_values.update(keys, values, self.layer)                         # of all positions
        queries = self.attention_in(self.attention_norm(x_BQD)).unflatten(-1, (self.heads, -1))
        queries = normalize_and_rotate(queries, rotations, self.epsilon).transpose(1, 2)
        mixed_BQD = attend(queries, keys, values, mask_QS, is_causal).transpose(1, 2).flatten(2)
        x_BQD = x_BQD + dropout(self.attention_out(mixed_BQD), self.dropout, self.training)
        hidden = torch.relu(self.feed_forward_in(self.feed_forward_norm(x_BQD))).square()
        return x_BQD + dropout(self.feed_forward_out(hidden), self.dropout, self.training)
