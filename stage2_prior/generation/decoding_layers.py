"""The layers of Llama and of this project's GridTransformer for one token per row, computed directly from the weights of their modules.

`make_decoder_layers` is strict: it returns None for a model with an unknown module, weight, hook or option. Then the decoder calls the model itself.

In comments: N rows, D width, A heads, d head dimension, S positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama import modeling_llama as llama

from stage2_prior.model import causal_lm
from stage2_prior.model import grid_transformer as grid
from stage2_prior.model.grid_attention import rotate
from vqmosaic.kernels.decoding_products import Product


def rotate_halves(heads_NAd: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate Llama's heads, which pair dimensions of the first half with those of the second. The sines of the first half must be negated."""
    return torch.addcmul(heads_NAd * cosines, heads_NAd.roll(heads_NAd.shape[-1] // 2, dims=-1), sines)


class DecoderLayers(ABC):
    """Base class of the architectures, which differ in `embed`, `add_layer_embedding`, `queries_keys_values` and `feed_forward`."""

    MODULES: tuple[type, ...] = ()
    """The module types that a model may contain, apart from activations."""
    key_heads: int
    """Number of heads of keys and values. Like the following attributes, subclasses set it."""
    head_width: int
    attention_out: list[Product]
    """The output projection of each layer's attention."""
    final_norm: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, count: int, head: nn.Linear, num_codes: int, rows: int):
        self.count = count
        self.device, self.dtype = head.weight.device, head.weight.dtype
        self.head = Product([head], rows, num_codes)

    @abstractmethod
    def embed(self, ids_N: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
        """The input of the first layer (N, D)."""

    def add_layer_embedding(self, layer: int, x_ND: torch.Tensor, ids_N: torch.Tensor, is_class: bool) -> torch.Tensor:
        """The input (N, D) of a layer, plus the layer's own embedding of the ids if it has one. `is_class`: the ids are classes, at position 0."""
        return x_ND

    @abstractmethod
    def queries_keys_values(self, layer: int, x_ND: torch.Tensor, ids_N: torch.Tensor,
                            position: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (N, A, d), and keys and values (N, key heads, d)."""

    @abstractmethod
    def feed_forward(self, layer: int, x_ND: torch.Tensor) -> torch.Tensor:
        """The output (N, D) of a layer's feed-forward block."""


class LlamaLayers(DecoderLayers):
    """Layers of transformers' LlamaForCausalLM, which may have grouped queries, biases, and rotations that depend only on the position."""

    MODULES = (llama.LlamaForCausalLM, llama.LlamaModel, llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm,
               llama.LlamaRotaryEmbedding, nn.Linear, nn.Embedding, nn.ModuleList)
    ROTATIONS = ("default", "linear", "llama3", "yarn")
    """Rotary embeddings of transformers whose frequencies do not depend on the sequence length."""

    def __init__(self, model: llama.LlamaForCausalLM, num_codes: int, rows: int, length: int):
        self.blocks = cast(list[llama.LlamaDecoderLayer], list(model.model.layers))  # a ModuleList does not declare the class of its modules
        super().__init__(len(self.blocks), model.lm_head, num_codes, rows)
        attentions = [layer.self_attn for layer in self.blocks]
        self.embedding, self.final_norm, self.head_width = model.model.embed_tokens, rms_norm(model.model.norm), attentions[0].head_dim
        self.query_heads = attentions[0].q_proj.out_features // self.head_width
        self.key_heads = attentions[0].k_proj.out_features // self.head_width
        self.attention_norm = [rms_norm(layer.input_layernorm) for layer in self.blocks]
        self.feed_forward_norm = [rms_norm(layer.post_attention_layernorm) for layer in self.blocks]
        self.query_key_value = [Product([attention.q_proj, attention.k_proj, attention.v_proj], rows) for attention in attentions]
        self.attention_out = [Product([attention.o_proj], rows) for attention in attentions]
        self.gate_up = [Product([layer.mlp.gate_proj, layer.mlp.up_proj], rows) for layer in self.blocks]
        self.down = [Product([layer.mlp.down_proj], rows) for layer in self.blocks]
        cosines, sines = model.model.rotary_emb(self.embedding.weight, torch.arange(length, device=self.device)[None])
        self.cosines = cosines[0, :, None]                                                                 # S, 1, d
        half = self.head_width // 2
        self.sines = torch.cat([-sines[0, :, :half], sines[0, :, half:]], dim=-1)[:, None]                 # negated for rotate_halves

    @classmethod
    def fits(cls, model: llama.LlamaForCausalLM) -> bool:
        """Whether the rotary frequencies of the model do not change."""
        return model.model.rotary_emb.rope_type in cls.ROTATIONS and model.model.embed_tokens.max_norm is None

    def embed(self, ids_N: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
        """The embedding of the ids (N, D)."""
        return F.embedding(ids_N, self.embedding.weight)

    def queries_keys_values(self, layer: int, x_ND: torch.Tensor, ids_N: torch.Tensor,
                            position: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (N, A, d), and keys and values (N, key heads, d)."""
        heads = self.query_key_value[layer](self.attention_norm[layer](x_ND)).unflatten(-1, (-1, self.head_width))
        queries_and_keys, values = heads[:, :-self.key_heads], heads[:, -self.key_heads:]
        rotated_NAd = rotate_halves(queries_and_keys, self.cosines[position], self.sines[position])
        return *rotated_NAd.split((self.query_heads, self.key_heads), dim=1), values

    def feed_forward(self, layer: int, x_ND: torch.Tensor) -> torch.Tensor:
        """The output (N, D) of the gated feed-forward block."""
        gate, up = self.gate_up[layer](self.feed_forward_norm[layer](x_ND)).chunk(2, dim=-1)
        return self.down[layer](self.blocks[layer].mlp.act_fn(gate) * up)


class GridLayers(DecoderLayers):
    """Layers of this project's GridTransformer."""

    MODULES = (grid.GridTransformer, grid.GridBlock, nn.LayerNorm, nn.Linear, nn.Embedding, nn.ModuleList)
    WEIGHTS = frozenset(f"{name}.weight" for name in ("stream_embedding", "attention_norm", "attention_in", "attention_out", "feed_forward_norm",
                                                      "feed_forward_in", "feed_forward_out"))

    def __init__(self, model: grid.GridTransformer, num_codes: int, rows: int, length: int):
        self.blocks = cast(list[grid.GridBlock], list(model.blocks))
        super().__init__(len(self.blocks), model.head, num_codes, rows)
        self.embedding, self.position_embedding, self.final_norm = model.token_embedding, model.position_embedding, model.final_norm
        self.first_class, self.key_heads = model.config.num_codes, model.config.num_attention_heads
        self.head_width = model.config.hidden_size // self.key_heads
        self.attention_in = [Product([block.attention_in], rows) for block in self.blocks]
        self.attention_out = [Product([block.attention_out], rows) for block in self.blocks]
        self.feed_forward_in = [Product([block.feed_forward_in], rows) for block in self.blocks]
        self.feed_forward_out = [Product([block.feed_forward_out], rows) for block in self.blocks]
        self.rotations = model.rotations(self.device)[:, :, None]                                          # S, 2, 1, d / 2, 2

    @classmethod
    def fits(cls, model: grid.GridTransformer) -> bool:
        """Whether the blocks of the model have exactly the known weights. Some blocks also have a value embedding."""
        return all({name for name, _ in block.named_parameters()} - {"value_embedding.weight"} == cls.WEIGHTS for block in model.blocks)

    def embed(self, ids_N: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
        """The sum of the embeddings of the ids and of the position (N, D)."""
        return F.embedding(ids_N, self.embedding.weight) + self.position_embedding.weight[position]

    def add_layer_embedding(self, layer: int, x_ND: torch.Tensor, ids_N: torch.Tensor, is_class: bool) -> torch.Tensor:
        """The input (N, D) of a layer, plus the layer's own embedding of the ids. Some layers embed only classes: they change only position 0."""
        block = self.blocks[layer]
        if block.embeds_all_ids:
            return x_ND + block.stream_embedding(ids_N)
        return x_ND + block.stream_embedding((ids_N - self.first_class).clamp_min(0)) if is_class else x_ND

    def queries_keys_values(self, layer: int, x_ND: torch.Tensor, ids_N: torch.Tensor,
                            position: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (N, A, d)."""
        block = self.blocks[layer]
        heads = self.attention_in[layer](block.attention_norm(x_ND)).view(len(x_ND), 3, self.key_heads, self.head_width)
        normed = F.layer_norm(heads[:, :2], heads.shape[-1:], eps=block.epsilon)                           # queries and keys: N, 2, A, d
        query_NAd, key_NAd = rotate(normed, self.rotations[position]).unbind(1)
        value_NAd = heads[:, 2]
        if block.value_embedding is not None:
            value_NAd = value_NAd + block.value_embedding(ids_N).view_as(value_NAd)
        return query_NAd, key_NAd, value_NAd

    def feed_forward(self, layer: int, x_ND: torch.Tensor) -> torch.Tensor:
        """The output (N, D) of the feed-forward block."""
        hidden = self.feed_forward_in[layer](self.blocks[layer].feed_forward_norm(x_ND))
        return self.feed_forward_out[layer](F.relu(hidden).square())


def rms_norm(module: llama.LlamaRMSNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that computes a LlamaRMSNorm with one operator. In float32, results are equal up to rounding."""
    return lambda x_ND: F.rms_norm(x_ND, module.weight.shape, module.weight, module.variance_epsilon)


def make_decoder_layers(model: nn.Module, num_codes: int, rows: int, length: int) -> DecoderLayers | None:
    """The decoder layers for a model of which every part is known, otherwise None. See make_decoder for the arguments."""
    if type(model) is llama.LlamaForCausalLM and is_plain(model, LlamaLayers.MODULES) and LlamaLayers.fits(model):
        return LlamaLayers(model, num_codes, rows, length)
    if type(model) is grid.GridTransformer and is_plain(model, GridLayers.MODULES) and GridLayers.fits(model):
        return GridLayers(model, num_codes, rows, length)
    return None


def is_plain(model: nn.Module, modules: tuple[type, ...]) -> bool:
    """Whether a model has only modules of these types and activations, and nothing that changes their results or the place of their weights.

    That excludes autocast, a replaced `forward`, hooks other than those for dropout, and weights on several devices or of several dtypes.
    """
    first = next(model.parameters())
    if torch.is_autocast_enabled(first.device.type):
        return False
    if any(weight.device != first.device or weight.dtype != first.dtype or weight.is_meta for weight in model.parameters()):
        return False
    for name, module in model.named_modules():
        is_known = type(module) in modules or (name.endswith("act_fn") and not any(True for _ in module.parameters()))
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        has_other_hooks = any(getattr(hook, "func", None) is not causal_lm._drop_output for hook in hooks)
        if not is_known or "forward" in vars(module) or has_other_hooks:
            return False
    return True
