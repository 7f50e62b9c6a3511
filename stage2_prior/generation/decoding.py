"""Decoders compute the logits of one position after another, with a key-value cache. `make_decoder` chooses the fastest decoder for a model.

    decoder = make_decoder(model, num_codes, rows=8, length=256)
    logits = decoder.start(ids_NP)            # the class and the conditions, at positions 0 to P - 1
    logits = decoder.step(ids_N, P)           # ids sampled from these logits

A model for any order takes several tokens and predicts several others in a step:

    logits = decoder.predict(ids_Ns, places_Ns, targets_Nm, 2)   # s ids, the first at position 2, and m places to predict

For models with only known modules (known_models.py), StaticDecoder and GraphDecoder call the model's blocks directly: the weights of linear layers
are packed (vqmosaic/kernels/decoding_products.py), keys and values are in one static cache, and only the logits of codes are computed. For all other
models, and models with hooks, adapters, wrappers or autocast, ReferenceDecoder calls the model itself.

In comments: N rows, A heads, d head dimension, S positions, P ids of class and conditions, s ids and m targets of a step, V ids, K codes.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from stage2_prior.generation.known_models import KnownGridTransformer, KnownModel, prepare_known_model
from stage2_prior.model.cached_positions import causal_mask

CPU_CACHE_DTYPES = {torch.bfloat16: torch.float32}
"""dtypes of keys and values on a CPU that differ from that of the model: vqmosaic/kernels/single_query_attention.py needs float32."""


class ReferenceDecoder:
    """Calls the model itself with a dynamic cache of transformers. Works for every architecture."""

    def __init__(self, model: nn.Module, rows: int):
        self.model, self.rows = model, rows
        self.cache: Cache | None = None

    def start(self, ids_NP: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) after the first ids, or (N, K) if the model has no others."""
        output = self.model(input_ids=ids_NP, past_key_values=None, use_cache=True)
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def step(self, ids_N: torch.Tensor, position: int) -> torch.Tensor:
        """Logits (N, V) after the ids (N,) at a position, or (N, K) if the model has no others. Positions must come in order, from 0."""
        output = self.model(input_ids=ids_N[:, None], past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def predict(self, ids_Ns: torch.Tensor, places_Ns: torch.Tensor, targets_Nm: torch.Tensor, position: int) -> torch.Tensor:
        """Logits (N, m, K) of target places, from all ids so far: those of former steps and new ones, whose first is at `position`."""
        output = self.model(input_ids=ids_Ns, past_key_values=self.cache, use_cache=True, places=places_Ns, targets=targets_Nm)
        self.cache = output.past_key_values
        return output.logits

    def keep_first(self, rows: int) -> None:
        """Keep only the first rows, if the cache of the architecture supports it. Otherwise `rows` does not change."""
        layers = getattr(self.cache, "layers", ())
        # Other types of layers store more than keys and values.
        if self.cache is not None and layers and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
            self.cache.batch_select_indices(torch.arange(rows, device=next(self.model.parameters()).device))
            self.rows = rows


class StaticCache:
    """Keys and values of a known model for all positions, allocated once. Blocks use it as their `past_key_values`."""

    def __init__(self, model: KnownModel, rows: int, length: int):
        dtype = CPU_CACHE_DTYPES.get(model.dtype, model.dtype) if model.device.type == "cpu" else model.dtype
        # Positions come first, so a step writes one contiguous block and reads sequentially (measured up to four times faster than heads first).
        # Zeros, because a recorded step attends to all positions under a mask, and uninitialized memory may hold NaN.
        shape = (model.layers, length, rows, model.key_heads, model.head_width)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=model.device) for _ in range(2))       # layers, S, N, A, d
        self.rows = rows
        self.position: int | torch.Tensor = 0
        """The position of the current step."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values (N, A, s, d) of the current position and those after it.

        Returns the keys and values (N, A, S, d) of all positions so far, or of the whole cache if the position is a tensor.
        """
        return self.write(self.keys, keys, layer), self.write(self.values, values, layer)

    def write(self, memory: torch.Tensor, heads: torch.Tensor, layer: int) -> torch.Tensor:
        """Write heads (N, A, s, d) from the current position on to the keys or the values. Returns a view (N, A, S, d)."""
        stored, heads = memory[layer, :, :self.rows], heads.permute(2, 0, 1, 3)                                 # S or s, N, A, d
        if isinstance(self.position, int):
            stored = stored[:self.position + len(heads)]
            stored[self.position:] = heads
        else:
            stored.index_copy_(0, self.position, heads.to(stored.dtype))
        return stored.permute(1, 2, 0, 3)


class StaticDecoder:
    """Calls the blocks of a known model with a cache for all positions."""

    def __init__(self, model: KnownModel, rows: int, length: int):
        self.model, self.cache = model, StaticCache(model, rows, length)

    @property
    def rows(self) -> int:
        """Number of rows in the batch."""
        return self.cache.rows

    def start(self, ids_NP: torch.Tensor) -> torch.Tensor:
        """Logits (N, K) after the first ids."""
        if isinstance(self.model, KnownGridTransformer):
            self.cache.position = 0
            return self.model.start_logits(ids_NP, cast(Cache, self.cache))
        for position in range(ids_NP.shape[1]):
            logits = self.step(ids_NP[:, position], position)
        return logits

    def step(self, ids_N: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
        """Logits (N, K) after the ids (N,) at a position. Positions must come in order, from 0.

        If the position is a tensor on the device (int64, one element), every step runs the same operations, so one CUDA graph serves all positions
        except 0.
        """
        self.cache.position = position
        mask_1S = None if isinstance(position, int) else (self.model.positions_S <= position)[None]
        return self.model.logits(ids_N, position, mask_1S, cast(Cache, self.cache))  # blocks need only its `update`

    def predict(self, ids_Ns: torch.Tensor, places_Ns: torch.Tensor, targets_Nm: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
        """Logits (N, m, K) of target places; see ReferenceDecoder. A position that is a tensor takes one id per row."""
        self.cache.position = position
        if isinstance(position, int):
            length = ids_Ns.shape[1]
            mask_sS, mask_1S = causal_mask(self.model.positions_S[position:position + length], position, length, position + length), None
        else:
            mask_sS = mask_1S = (self.model.positions_S <= position)[None]
        model = cast(KnownGridTransformer, self.model)
        return model.target_logits(ids_Ns, places_Ns, targets_Nm, position, mask_sS, mask_1S, cast(Cache, self.cache))

    def keep_first(self, rows: int) -> None:
        """Keep only the first rows."""
        self.cache.rows = rows


class GraphDecoder:
    """Records the step of a StaticDecoder as a CUDA graph. It needs one launch per token instead of a dozen per layer."""

    def __init__(self, decoder: StaticDecoder):
        self.decoder = decoder
        self.graph: torch.cuda.CUDAGraph | None = None
        self.position = torch.zeros(1, dtype=torch.int64, device=decoder.model.device)

    @property
    def rows(self) -> int:
        """Number of rows in the batch."""
        return self.decoder.rows

    def start(self, ids_NP: torch.Tensor) -> torch.Tensor:
        """Logits (N, K) after the first ids."""
        return self.decoder.start(ids_NP)

    def step(self, ids_N: torch.Tensor, position: int) -> torch.Tensor:
        """Logits (N, K) after the ids (N,) at a position. The next step overwrites them."""
        if position == 0:  # some models compute more at position 0
            return self.decoder.step(ids_N, 0)
        return self.replay(lambda ids_N: self.decoder.step(ids_N, self.position), [ids_N], position)

    def predict(self, ids_Ns: torch.Tensor, places_Ns: torch.Tensor, targets_Nm: torch.Tensor, position: int) -> torch.Tensor:
        """Logits (N, m, K) of target places. Only steps of one id and one target use the graph, and the next one overwrites their logits."""
        if position == 0 or ids_Ns.shape[1] > 1 or targets_Nm.shape[1] > 1:
            return self.decoder.predict(ids_Ns, places_Ns, targets_Nm, position)
        return self.replay(lambda ids, places, targets: self.decoder.predict(ids, places, targets, self.position),
                           [ids_Ns, places_Ns, targets_Nm], position)

    def replay(self, step: Callable[..., torch.Tensor], inputs: list[torch.Tensor], position: int) -> torch.Tensor:
        """Run the recorded step, or record it now, on new inputs at a position."""
        with torch.cuda.device(self.decoder.model.device):
            self.position.fill_(position)
            graph = self.record(step, inputs) if self.graph is None else self.graph
            for recorded, given in zip(self.inputs, inputs, strict=True):
                recorded.copy_(given)
            graph.replay()
        return self.logits

    def record(self, step: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> torch.cuda.CUDAGraph:
        """Record one step at the current position and return the graph. Warm-up steps are harmless: they write the same cache entries."""
        self.inputs = [given.clone() for given in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step(*self.inputs)
        return self.graph

    def keep_first(self, rows: int) -> None:
        """Keep only the first rows. The next step records a new graph."""
        self.decoder.keep_first(rows)
        self.graph = None


def make_decoder(model: nn.Module, num_codes: int, rows: int, length: int, compile: bool = False) -> ReferenceDecoder | StaticDecoder | GraphDecoder:
    """The fastest decoder that supports the model, for `rows` sequences of `length` positions, with the current weights.

    Make a new decoder for each call of the sampler, so that no decoder holds memory or stale weights while the model is trained. Packing the
    weights takes a few percent of the sampling time. `compile` records the step as a CUDA graph, on CUDA only. Steps of several
    ids or targets do not use the graph.
    """
    known_model = prepare_known_model(model, num_codes, rows, length)
    if known_model is None:
        return ReferenceDecoder(model, rows)
    decoder = StaticDecoder(known_model, rows, length)
    return GraphDecoder(decoder) if compile and known_model.device.type == "cuda" else decoder
