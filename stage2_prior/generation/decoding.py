"""Decoders compute the logits of one position after another, with a key-value cache. `make_decoder` chooses the fastest decoder for a model.

    decoder = make_decoder(model, num_codes, rows=8, length=256)
    logits_NV = decoder.step(ids_N, 0)        # class ids, at position 0
    logits_NV = decoder.step(ids_N, 1)        # ids sampled from these logits

For models with only known modules (decoding_layers.py), StaticDecoder and GraphDecoder use the weights directly: matrices with the same input are
concatenated, keys and values are in one static cache, and only the logits of codes are computed. For all other models, and models with hooks,
adapters, wrappers or autocast, ReferenceDecoder calls the model itself.

In comments: N rows, D width, A heads, d head dimension, S = 1 + T positions, V ids.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from stage2_prior.generation.decoding_layers import DecoderLayers, make_decoder_layers

MAX_FLOAT32_CACHE_LENGTH = 65
"""For a bf16 model on a CPU, sequences up to this length keep keys and values in float32, because the overhead of torch's bf16 attention operator
exceeds the total time of the float32 products (measured by hand on an Intel Xeon: up to 57 positions with 128 rows, 85 with 8)."""


class ReferenceDecoder:
    """Calls the model itself with a dynamic cache of transformers. Works for every architecture."""

    def __init__(self, model: nn.Module, rows: int):
        self.model, self.rows = model, rows
        self.cache: Cache | None = None

    def step(self, ids_N: torch.Tensor, position: int) -> torch.Tensor:
        """Logits (N, V) after the ids (N,) at a position, or (N, codes) if the model has only those. Positions must come in order, from 0."""
        output = self.model(input_ids=ids_N[:, None], past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def keep_first(self, rows: int) -> None:
        """Keep only the first rows, if the cache of the architecture supports it. Otherwise `rows` does not change."""
        layers = getattr(self.cache, "layers", ())
        # Other types of layers store more than keys and values.
        if self.cache is not None and layers and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
            self.cache.batch_select_indices(torch.arange(rows, device=next(self.model.parameters()).device))
            self.rows = rows


class StaticDecoder:
    """Computes with the weights of a known model, with a key-value cache allocated for all positions."""

    def __init__(self, layers: DecoderLayers, rows: int, length: int):
        self.layers, self.rows = layers, rows
        is_bf16_on_cpu = layers.device.type == "cpu" and layers.dtype == torch.bfloat16
        dtype = torch.float32 if is_bf16_on_cpu and length <= MAX_FLOAT32_CACHE_LENGTH else layers.dtype
        # Memory order: positions come first, so a step writes one contiguous block and reads sequentially (measured up to four times faster than
        # heads first). Only bf16 on a CPU has heads first, which saves 1/15 of the time of an image of 256 tokens.
        shape = (layers.count, length, rows, layers.key_heads, layers.head_width)
        memory_order = (0, 2, 3, 1, 4) if is_bf16_on_cpu and dtype == torch.bfloat16 else (0, 1, 2, 3, 4)
        # Zeros, because a recorded step attends to all positions under a mask, and uninitialized memory may hold NaN.
        self.keys, self.values = (torch.zeros([shape[dim] for dim in memory_order], dtype=dtype, device=layers.device)
                                  .permute([memory_order.index(dim) for dim in range(5)]) for _ in range(2))  # layers, S, N, A, d
        self.positions_S = torch.arange(length, device=layers.device)

    def step(self, ids_N: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
        """Logits (N, codes) after the ids (N,) at a position. Positions must come in order, from 0.

        If the position is a tensor on the device (int64, one element), every step runs the same operations, so one CUDA graph serves all positions
        except 0.
        """
        layers = self.layers
        mask_S = None if isinstance(position, int) else self.positions_S <= position
        x_ND = layers.embed(ids_N, position)
        for layer in range(layers.count):
            x_ND = layers.add_layer_embedding(layer, x_ND, ids_N, is_class=isinstance(position, int) and position == 0)
            query_NAd, key_NAd, value_NAd = layers.queries_keys_values(layer, x_ND, ids_N, position)
            keys, values = self.keys[layer, :, :self.rows], self.values[layer, :, :self.rows]             # S, N, A, d
            if isinstance(position, int):
                keys[position], values[position] = key_NAd, value_NAd
                keys, values = keys[:position + 1], values[:position + 1]
            else:
                keys.index_copy_(0, position, key_NAd[None].to(keys.dtype))
                values.index_copy_(0, position, value_NAd[None].to(values.dtype))
            x_ND = x_ND + layers.attention_out[layer](attend(query_NAd, keys, values, mask_S))
            x_ND = x_ND + layers.feed_forward(layer, x_ND)
        return layers.head(layers.final_norm(x_ND))

    def keep_first(self, rows: int) -> None:
        """Keep only the first rows."""
        self.rows = rows


def attend(query_NAd: torch.Tensor, keys_SNAd: torch.Tensor, values_SNAd: torch.Tensor, mask_S: torch.Tensor | None) -> torch.Tensor:
    """Attention output (N, A d) of one query per row and head. Several heads may share keys and values."""
    rows, key_heads, width = keys_SNAd.shape[1:]
    if query_NAd.device.type != "cpu" or keys_SNAd.dtype != torch.float32:
        output = F.scaled_dot_product_attention(query_NAd[:, :, None], keys_SNAd.permute(1, 2, 0, 3), values_SNAd.permute(1, 2, 0, 3),
                                                attn_mask=None if mask_S is None else mask_S[None], enable_gqa=query_NAd.shape[1] != key_heads)
        return output.flatten(1)
    # Two matrix products are faster here than the operator above, which is designed for many queries.
    query = (query_NAd.float() * width**-0.5).reshape(rows * key_heads, -1, width)                       # N A, queries per key head, d
    scores = torch.bmm(query, keys_SNAd.flatten(1, 2).permute(1, 2, 0))                                  # N A, queries per key head, S
    if mask_S is not None:
        scores.masked_fill_(~mask_S, -torch.inf)
    return torch.bmm(scores.softmax(dim=-1), values_SNAd.flatten(1, 2).transpose(0, 1)).view(rows, -1).to(query_NAd.dtype)


class GraphDecoder:
    """Records the step of a StaticDecoder as a CUDA graph. It needs one launch per token instead of a dozen per layer."""

    def __init__(self, decoder: StaticDecoder):
        self.decoder = decoder
        self.graph: torch.cuda.CUDAGraph | None = None
        self.position = torch.zeros(1, dtype=torch.int64, device=decoder.layers.device)

    @property
    def rows(self) -> int:
        """Number of rows in the batch."""
        return self.decoder.rows

    def step(self, ids_N: torch.Tensor, position: int) -> torch.Tensor:
        """Logits (N, codes) after the ids (N,) at a position. The next step overwrites them."""
        if position == 0:  # some models compute more at position 0
            return self.decoder.step(ids_N, 0)
        with torch.cuda.device(self.decoder.layers.device):
            self.position.fill_(position)
            graph = self.record(ids_N) if self.graph is None else self.graph
            self.ids_N.copy_(ids_N)
            graph.replay()
        return self.logits_NV

    def record(self, ids_N: torch.Tensor) -> torch.cuda.CUDAGraph:
        """Record one step at the current position and return the graph. The warm-up steps before it write the same cache entries as the step."""
        self.ids_N = ids_N.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.decoder.step(self.ids_N, self.position)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits_NV = self.decoder.step(self.ids_N, self.position)
        return self.graph

    def keep_first(self, rows: int) -> None:
        """Keep only the first rows. The next step records a new graph."""
        self.decoder.keep_first(rows)
        self.graph = None


def make_decoder(model: nn.Module, num_codes: int, rows: int, length: int, compile: bool = False) -> ReferenceDecoder | StaticDecoder | GraphDecoder:
    """The fastest decoder that supports the model, for `rows` sequences of `length` positions, with the current weights.

    Make a new decoder for each call of the sampler, so that no decoder holds memory or stale weights while the model is trained. Concatenating and
    packing the weights takes a few percent of the sampling time. `compile` records the step as a CUDA graph, on CUDA only.
    """
    layers = make_decoder_layers(model, num_codes, rows, length)
    if layers is None:
        return ReferenceDecoder(model, rows)
    decoder = StaticDecoder(layers, rows, length)
    return GraphDecoder(decoder) if compile and layers.device.type == "cuda" else decoder
