"""One token after another through a model, with a key-value cache: `make_decoder` chooses how.

    decoder = make_decoder(model, num_codes, rows=8, length=256)
    logits_NV = decoder.step(ids_N, 0)        # ids of the classes, at position 0
    logits_NV = decoder.step(ids_N, 1)        # ids drawn from them

Models whose every module is known (decoding_layers.py) go through the same weights without their modules: matrices that read the same
input are joined, keys and values lie in one static cache, logits are those of the codes. Everything else, and whatever was added to a model
from outside (hooks, adapters, wrappers, autocast), goes through the model itself, which is the reference.

In comments: N rows, D width, A heads, d width of a head, S = 1 + T positions, V ids.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from stage2_prior.generation.decoding_layers import DecoderLayers, layers_of

SHORT = 65
"""Positions up to which, in bf16 on a CPU, keys and values are kept in float32: torch's operator for bf16 takes longer to begin than the products
in float32 take in all (measured by hand on an Intel Xeon; up to 57 positions of 128 rows, 85 of 8)."""


class StockDecoder:
    """Steps through the model itself with the growing cache of transformers, which works for every architecture."""

    def __init__(self, model: nn.Module, rows: int):
        self.model, self.rows, self.cache = model, rows, None

    def step(self, ids_N: torch.Tensor, position: int) -> torch.Tensor:
        """Logits (N, V), or of codes alone, after ids at a position; positions come in order, from 0."""
        output = self.model(input_ids=ids_N[:, None], past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def keep_first(self, rows: int) -> None:
        """Go on with the first rows alone, where the cache of the architecture can do that."""
        layers = getattr(self.cache, "layers", ())
        if layers and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):  # others keep more than keys and values
            self.cache.batch_select_indices(torch.arange(rows, device=next(self.model.parameters()).device))
            self.rows = rows


class StaticDecoder:
    """Steps through a known model's weights, with keys and values of all positions in memory from the start."""

    def __init__(self, layers: DecoderLayers, rows: int, length: int):
        self.layers, self.rows = layers, rows
        # positions first: what is filled lies together, and a step writes one piece and reads in order (measured up to four times faster than
        # heads first). Only bf16 on a CPU is read faster heads first, by a fifteenth of the time of an image of 256 tokens, and so lies that way;
        # a short sequence is kept in float32 there, for the products of attend.
        # Zeros, since a recorded step attends to all positions under a mask, and fresh memory may hold what is no number.
        shape, heads_first = (layers.count, length, rows, layers.key_heads, layers.head_width), (0, 2, 3, 1, 4)
        is_bf16 = layers.device.type == "cpu" and layers.dtype == torch.bfloat16
        dtype = torch.float32 if is_bf16 and length <= SHORT else layers.dtype
        order = heads_first if is_bf16 and dtype == torch.bfloat16 else tuple(range(5))
        self.keys, self.values = (torch.zeros([shape[dim] for dim in order], dtype=dtype, device=layers.device)
                                  .permute([order.index(dim) for dim in range(5)]) for _ in range(2))  # S, N, A, d for each layer
        self.positions_S = torch.arange(length, device=layers.device)

    def step(self, ids_N: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
        """Logits (N, codes) after ids at a position; positions come in order, from 0.

        A position on the device (int64, one element) makes every step the same work, so that one recording serves for all but position 0.
        """
        layers, is_number = self.layers, isinstance(position, int)
        mask_S = None if is_number else self.positions_S <= position
        x_ND = layers.embed(ids_N, position)
        for number in range(layers.count):
            x_ND = layers.enter(number, x_ND, ids_N, is_class=is_number and position == 0)
            query_NAd, key_NAd, value_NAd = layers.heads(number, x_ND, ids_N, position)
            keys, values = self.keys[number, :, :self.rows], self.values[number, :, :self.rows]           # S, N, A, d
            if is_number:
                keys[position], values[position] = key_NAd, value_NAd
                keys, values = keys[:position + 1], values[:position + 1]
            else:
                keys.index_copy_(0, position, key_NAd[None].to(keys.dtype))
                values.index_copy_(0, position, value_NAd[None].to(values.dtype))
            x_ND = x_ND + layers.attention_out[number](attend(query_NAd, keys, values, mask_S))
            x_ND = x_ND + layers.feed_forward(number, x_ND)
        return layers.head(layers.final_norm(x_ND))

    def keep_first(self, rows: int) -> None:
        """Go on with the first rows alone."""
        self.rows = rows


def attend(query_NAd: torch.Tensor, keys_SNAd: torch.Tensor, values_SNAd: torch.Tensor, mask_S: torch.Tensor | None) -> torch.Tensor:
    """What one query of each row and head takes from the positions before it (N, A d); several heads may share keys and values."""
    rows, key_heads, width = keys_SNAd.shape[1:]
    if query_NAd.device.type != "cpu" or keys_SNAd.dtype != torch.float32:
        mixed = F.scaled_dot_product_attention(query_NAd[:, :, None], keys_SNAd.permute(1, 2, 0, 3), values_SNAd.permute(1, 2, 0, 3),
                                               attn_mask=mask_S if mask_S is None else mask_S[None], enable_gqa=query_NAd.shape[1] != key_heads)
        return mixed.flatten(1)
    # two plain products are faster here than the blocks of the operator above, which is made for many queries
    query = (query_NAd.float() * width**-0.5).reshape(rows * key_heads, -1, width)                       # N A, queries of a key, d
    scores = torch.bmm(query, keys_SNAd.flatten(1, 2).permute(1, 2, 0))                                  # N A, queries of a key, S
    if mask_S is not None:
        scores.masked_fill_(~mask_S, -torch.inf)
    return torch.bmm(scores.softmax(dim=-1), values_SNAd.flatten(1, 2).transpose(0, 1)).view(rows, -1).to(query_NAd.dtype)


class GraphDecoder:
    """The steps of a StaticDecoder recorded as a CUDA graph: one call to the device for each token instead of a dozen for each layer."""

    def __init__(self, decoder: StaticDecoder):
        self.decoder, self.graph = decoder, None
        self.position = torch.zeros(1, dtype=torch.int64, device=decoder.layers.device)

    @property
    def rows(self) -> int:
        """Rows that go through the model together."""
        return self.decoder.rows

    def step(self, ids_N: torch.Tensor, position: int) -> torch.Tensor:
        """Logits (N, codes) after ids at a position, valid until the next step."""
        if position == 0:  # some models do more there
            return self.decoder.step(ids_N, 0)
        with torch.cuda.device(self.decoder.layers.device):
            self.position.fill_(position)
            if self.graph is None:
                self.record(ids_N)
            self.ids_N.copy_(ids_N)
            self.graph.replay()
        return self.logits_NV

    def record(self, ids_N: torch.Tensor) -> None:
        """Record one step; the steps that warm up write what the recorded one will write again."""
        self.ids_N, stream = ids_N.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.decoder.step(self.ids_N, self.position)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits_NV = self.decoder.step(self.ids_N, self.position)

    def keep_first(self, rows: int) -> None:
        """Go on with the first rows alone, by a recording of their own."""
        self.decoder.keep_first(rows)
        self.graph = None


def make_decoder(model: nn.Module, num_codes: int, rows: int, length: int, compile: bool = False) -> StockDecoder | StaticDecoder | GraphDecoder:
    """The fastest decoder that a model allows, for `rows` rows of `length` positions; it takes the weights as they are now.

    It lives as long as one call: joining and packing weights takes a few hundredths of the time of the images, and what is not kept can
    neither become stale while a model is trained nor hold memory. `compile` records the steps as a CUDA graph, where there is one.
    """
    layers = layers_of(model, num_codes, rows, length)
    if layers is None:
        return StockDecoder(model, rows)
    decoder = StaticDecoder(layers, rows, length)
    return GraphDecoder(decoder) if compile and layers.device.type == "cuda" else decoder
