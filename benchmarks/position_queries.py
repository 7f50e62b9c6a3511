"""A prior for any order with position queries over a content cache, to compare with GridTransformer's layout.

In a GridTransformer, each token of the sequence carries an id and the place to predict. To predict several tokens at once, the last id is repeated
with other places, so most ids are processed twice: once to predict, once for the cache. Here, as in ARPG (Li et al. 2025, 2503.10568), the first
blocks process only ids and places, and the others are queries: they start from the place to predict, and attend to the keys and values that the first
blocks left. No id is processed twice. This model has no cache, because the comparison is about what it learns; see benchmarks/parallel_sampling.py.

In comments: B batch, S sequence, D width, A heads, d head dimension.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from stage2_prior.model.cached_positions import rotations_in_order
from stage2_prior.model.grid_attention import attend, rotate
from stage2_prior.model.grid_transformer import CLASS_PLACE, GridTransformer, GridTransformerConfig


class QueryBlock(nn.Module):
    """Attention of queries to the content, and feed-forward, each added to the stream of queries."""

    def __init__(self, config: GridTransformerConfig):
        super().__init__()
        width = config.hidden_size
        self.heads, self.epsilon, self.dropout = config.num_attention_heads, config.layer_norm_epsilon, config.resid_pdrop
        self.attention_norm, self.feed_forward_norm = (nn.LayerNorm(width, eps=self.epsilon, bias=False) for _ in range(2))
        self.attention_in, self.attention_out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.feed_forward_in = nn.Linear(width, config.intermediate_size, bias=False)
        self.feed_forward_out = nn.Linear(config.intermediate_size, width, bias=False)
        for matrix in (self.attention_out, self.feed_forward_out):
            nn.init.zeros_(matrix.weight)
        for matrix in (self.attention_in, self.feed_forward_in):
            nn.init.normal_(matrix.weight, std=matrix.in_features**-0.5)

    def forward(self, x_BSD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
        """The stream of queries (B, S, D), from keys and values (B, A, S, d) of the content. Query s attends to the first s + 1 of them."""
        queries = self.attention_in(self.attention_norm(x_BSD)).unflatten(-1, (self.heads, -1))
        queries = rotate(F.layer_norm(queries, queries.shape[-1:], eps=self.epsilon), rotations[..., None, :, :]).transpose(1, 2)
        x_BSD = x_BSD + F.dropout(self.attention_out(attend(queries, keys, values).transpose(1, 2).flatten(2)), self.dropout, self.training)
        hidden = torch.relu(self.feed_forward_in(self.feed_forward_norm(x_BSD))).square()
        return x_BSD + F.dropout(self.feed_forward_out(hidden), self.dropout, self.training)


class PositionQueryTransformer(GridTransformer):
    """A GridTransformer whose last blocks are replaced by query blocks."""

    def __init__(self, config: GridTransformerConfig, query_blocks: int):
        super().__init__(config)
        self.blocks = self.blocks[:len(self.blocks) - query_blocks]
        self.query_blocks = nn.ModuleList(QueryBlock(config) for _ in range(query_blocks))
        self.content_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon, bias=False)
        self.content_keys_values = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        nn.init.normal_(self.content_keys_values.weight, std=config.hidden_size**-0.5)

    def forward(self, input_ids: torch.Tensor, places: torch.Tensor | None = None, targets: torch.Tensor | None = None, use_cache: bool = False,
                **unused) -> CausalLMOutputWithPast:
        """Logits (B, S, K) of the targets, as GridTransformer.forward."""
        if targets is None:
            targets = torch.arange(input_ids.shape[1], device=input_ids.device).expand(len(input_ids), -1)
            places = F.pad(targets[:, :-1], (1, 0), value=CLASS_PLACE)
        rotations = rotations_in_order(self.rotations(input_ids.device), places, targets)                   # B, S, query or key, p, 2
        own_rotations = torch.stack([rotations[:, :, 1]] * 2, dim=2)
        stream_dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        x_BSD = (self.token_embedding(input_ids) + self.place_embedding(places + 1)).to(stream_dtype)
        classes_B1 = (input_ids[:, :1] - self.config.num_codes).clamp_min(0)
        for block in self.blocks:
            x_BSD = block(x_BSD, input_ids, classes_B1, own_rotations)
        content = self.content_keys_values(self.content_norm(x_BSD)).unflatten(-1, (2, self.config.num_attention_heads, -1))
        keys, values = content.unbind(2)
        keys = F.layer_norm(keys, keys.shape[-1:], eps=self.config.layer_norm_epsilon)
        keys, values = rotate(keys, rotations[:, :, 1, None]).transpose(1, 2), values.transpose(1, 2)
        x_BSD = self.position_embedding(targets).to(stream_dtype)
        for block in self.query_blocks:
            x_BSD = block(x_BSD, keys, values, rotations[:, :, 0])
        return CausalLMOutputWithPast(logits=self.head(self.final_norm(x_BSD)))
