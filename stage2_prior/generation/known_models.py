"""Faster versions of transformers' Llama and this project's GridTransformer for sampling.

They call the blocks of the model with one token per row and a key-value cache of fixed size. Linear layers are packed for a few rows
(vqmosaic/kernels/decoding_products.py), and in Llama, those with the same input are joined. `prepare_known_model` is strict: it returns None for
a model with an unknown module, weight, hook or option. Then the decoder calls the model as it is.

In comments: N rows, D width, A heads, d head dimension, S positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers import Cache
from transformers.models.llama import modeling_llama as llama

from stage2_prior.model import causal_lm
from stage2_prior.model import grid_transformer as grid
from stage2_prior.model.cached_positions import causal_mask
from stage2_prior.model.query_block import KeysAndValues, QueryBlock
from stage2_prior.model.text_embedding import NGramEmbedding
from vqmosaic.kernels.decoding_products import Parts, pack_linear_layers, share_weights
from vqmosaic.kernels.single_query_attention import can_use_single_query_attention, reference, single_query_attention


class KnownModel(ABC):
    """Base class of the supported architectures. If the weights of the model change, prepare it again."""

    MODULES: tuple[type, ...] = ()
    """The module types that a model may contain, apart from activations."""

    def __init__(self, model: nn.Module, layers: int, key_heads: int, head_width: int, length: int):
        self.layers, self.key_heads, self.head_width = layers, key_heads, head_width
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.positions_S = torch.arange(length, device=self.device)

    @abstractmethod
    def logits(self, ids_N: torch.Tensor, position: int | torch.Tensor, mask_1S: torch.Tensor | None, cache: Cache) -> torch.Tensor:
        """Logits (N, codes) for the ids after `position`, from the ids (N,) at `position`: an int, or a tensor (1,) on the device that is never 0.

        The blocks write the keys and values of this position to the cache, and attend to those that it returns.
        """


class KnownLlama(KnownModel):
    """transformers' LlamaForCausalLM, which may have grouped queries, biases, and rotations that depend only on the position."""

    MODULES = (llama.LlamaForCausalLM, llama.LlamaModel, llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm,
               llama.LlamaRotaryEmbedding, nn.Linear, nn.Embedding, nn.ModuleList)
    ROTATIONS = ("default", "linear", "llama3", "yarn")
    """Rotary embeddings of transformers whose frequencies do not depend on the sequence length."""

    def __init__(self, model: llama.LlamaForCausalLM, num_codes: int, rows: int, length: int):
        first = cast(llama.LlamaAttention, model.model.layers[0].self_attn)
        super().__init__(model, len(model.model.layers), first.k_proj.out_features // first.head_dim, first.head_dim, length)
        self.model = cast(llama.LlamaModel, pack_linear_layers(share_weights(model.model, FASTER_PARTS), rows))
        self.head = pack_linear_layers(first_outputs(model.lm_head, num_codes), rows)
        cosines_1Sd, sines_1Sd = model.model.rotary_emb(model.lm_head.weight, self.positions_S[None])
        first_half, second_half = sines_1Sd.chunk(2, dim=-1)
        self.cosines_1Sd, self.sines_1Sd = cosines_1Sd, torch.cat([-first_half, second_half], dim=-1)  # negated for `rotate_halves`

    @classmethod
    def fits(cls, model: llama.LlamaForCausalLM) -> bool:
        """Whether the rotary frequencies are fixed, and looking up an embedding does not rescale it (max_norm)."""
        return model.model.rotary_emb.rope_type in cls.ROTATIONS and model.model.embed_tokens.max_norm is None

    def logits(self, ids_N: torch.Tensor, position: int | torch.Tensor, mask_1S: torch.Tensor | None, cache: Cache) -> torch.Tensor:
        """Logits (N, codes) for the ids after `position`."""
        index = slice(position, position + 1) if isinstance(position, int) else position
        rotations = self.cosines_1Sd[:, index], self.sines_1Sd[:, index]
        x_N1D = self.model.embed_tokens(ids_N[:, None])
        for layer in self.model.layers:
            x_N1D = layer(x_N1D, attention_mask=mask_1S, past_key_values=cache, position_embeddings=rotations)
        return self.head(self.model.norm(x_N1D))[:, 0]


class JointAttention(nn.Module):
    """A LlamaAttention for one query per row, with one projection to queries, keys and values."""

    def __init__(self, attention: llama.LlamaAttention):
        super().__init__()
        self.layer_index, self.head_width = attention.layer_idx, attention.head_dim
        self.query_heads, self.key_heads = (linear.out_features // attention.head_dim for linear in (attention.q_proj, attention.k_proj))
        self.query_key_value, self.out = join_linear_layers([attention.q_proj, attention.k_proj, attention.v_proj]), attention.o_proj

    def forward(self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], attention_mask: torch.Tensor | None,
                past_key_values: Cache, **unused) -> tuple[torch.Tensor, None]:
        """The attention output (N, 1, D), and no attention weights."""
        heads = self.query_key_value(hidden_states).unflatten(-1, (-1, self.head_width)).transpose(1, 2)      # N, all heads, 1, d
        queries_and_keys, values = heads.tensor_split([self.query_heads + self.key_heads], dim=1)
        query, keys = rotate_halves(queries_and_keys, *position_embeddings).split((self.query_heads, self.key_heads), dim=1)
        keys, values = past_key_values.update(keys, values, self.layer_index)                                   # N, key heads, S, d
        attend = single_query_attention if can_use_single_query_attention(query, keys) else reference
        return self.out(attend(query, keys, values, attention_mask).flatten(1)[:, None]), None


class JointFeedForward(nn.Module):
    """A LlamaMLP with one linear layer in place of gate_proj and up_proj."""

    def __init__(self, mlp: llama.LlamaMLP):
        super().__init__()
        self.gate_up, self.down, self.activation = join_linear_layers([mlp.gate_proj, mlp.up_proj]), mlp.down_proj, mlp.act_fn

    def forward(self, x_N1D: torch.Tensor) -> torch.Tensor:
        """The output (N, 1, D)."""
        gate, up = self.gate_up(x_N1D).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


def fused_norm(norm: llama.LlamaRMSNorm) -> nn.RMSNorm:
    """The same norm with the same weight. It is one operator, and LlamaRMSNorm is five. In float32, results are equal up to rounding."""
    fast = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, device="meta")
    fast.weight = norm.weight
    return fast


FASTER_PARTS: Parts = {llama.LlamaAttention: JointAttention, llama.LlamaMLP: JointFeedForward, llama.LlamaRMSNorm: fused_norm}
"""Replacements for the parts of a Llama."""


def rotate_halves(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate Llama's heads (..., d), in which dimensions i and i + d / 2 are a pair. The first half of `sines` must be negated."""
    return torch.addcmul(heads * cosines, heads.roll(heads.shape[-1] // 2, dims=-1), sines)


class KnownGridTransformer(KnownModel):
    """This project's GridTransformer."""

    MODULES = (grid.GridTransformer, grid.GridBlock, QueryBlock, KeysAndValues, NGramEmbedding, nn.LayerNorm, nn.Linear, nn.Embedding, nn.ModuleList)
    QUERY_WEIGHTS = frozenset(f"{name}.weight" for name in ("attention_norm", "attention_in", "attention_out", "feed_forward_norm",
                                                            "feed_forward_in", "feed_forward_out"))
    WEIGHTS = QUERY_WEIGHTS | {"stream_embedding.weight"}

    def __init__(self, model: grid.GridTransformer, rows: int, length: int):
        config = model.config
        super().__init__(model, config.num_cache_layers, config.num_attention_heads, config.hidden_size // config.num_attention_heads, length)
        self.model = cast(grid.GridTransformer, pack_linear_layers(model, rows))
        self.rotations = model.rotations(self.device)                                                  # S, 2, p, 2

    @classmethod
    def fits(cls, model: grid.GridTransformer) -> bool:
        """Whether the blocks of the model have exactly the known weights. Some blocks also have a value embedding."""
        known: dict[type[nn.Module], frozenset[str]] = {grid.GridBlock: cls.WEIGHTS, QueryBlock: cls.QUERY_WEIGHTS}
        return all({name for name, _ in block.named_parameters()} - {"value_embedding.weight"} == known[type(block)] for block in model.blocks)

    def logits(self, ids_N: torch.Tensor, position: int | torch.Tensor, mask_1S: torch.Tensor | None, cache: Cache) -> torch.Tensor:
        """Logits (N, codes) for the ids after `position`, in raster order."""
        ids_N1 = ids_N[:, None]
        index = slice(position, position + 1) if isinstance(position, int) else position
        if self.model.predicts_in_any_order:
            targets_N1 = self.positions_S[index].expand(ids_N1.shape)
            return self.target_logits(ids_N1, targets_N1 - 1, targets_N1, position, mask_1S, mask_1S, cache)[:, 0]
        classes_N = self.model.starting_classes(ids_N1, position)[0] if isinstance(position, int) else None  # a tensor is never 0
        x_N1D = self.model.embed_ids(ids_N1, self.positions_S[index])
        for block in self.model.blocks:
            x_N1D = block(x_N1D, ids_N1, classes_N, self.rotations[index], mask_1S, past_key_values=cache)
        return self.model.head(self.model.final_norm(x_N1D))[:, 0]

    def start_logits(self, ids_NP: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits (N, codes) after the first ids."""
        positions = ids_NP.shape[1]
        targets_NP = self.positions_S[:positions].expand(ids_NP.shape)
        if self.model.predicts_in_any_order:
            mask_PP = causal_mask(self.positions_S[:positions], 0, positions, positions)
            return self.target_logits(ids_NP, targets_NP - 1, targets_NP[:, -1:], 0, mask_PP, None, cache)[:, 0]
        classes_N = self.model.starting_classes(ids_NP, 0)[0]
        x_NPD = self.model.add_text_embeddings(self.model.embed_ids(ids_NP, targets_NP), ids_NP)
        for block in self.model.blocks:
            x_NPD = block(x_NPD, ids_NP, classes_N, self.rotations[:positions], past_key_values=cache)
        return self.model.head(self.model.final_norm(x_NPD[:, -1]))

    def target_logits(self, ids_Ns: torch.Tensor, places_Ns: torch.Tensor, targets_Nm: torch.Tensor, position: int | torch.Tensor,
                      mask_sS: torch.Tensor | None, mask_1S: torch.Tensor | None, cache: Cache) -> torch.Tensor:
        """Logits (N, m, codes) of target places, from the ids in the cache and new ones, whose first is at `position`.

        `mask_sS` are the keys that new ids attend to, `mask_1S` those that targets attend to. For models with query blocks.
        """
        classes_N = self.model.starting_classes(ids_Ns, position)[0] if isinstance(position, int) else None
        x_NsD, rotations = self.model.embed_placed_ids(ids_Ns, places_Ns), self.model.token_rotations(places_Ns)
        if classes_N is not None:
            x_NsD = self.model.add_text_embeddings(x_NsD, ids_Ns)
        for block in self.model.blocks[:self.model.config.num_token_blocks]:
            x_NsD = block(x_NsD, ids_Ns, classes_N, rotations, mask_sS, past_key_values=cache)
        x_NmD = self.model.predict(x_NsD, ids_Ns, targets_Nm, rotations, mask_1S, is_causal=False, past_key_values=cache)
        return self.model.head(self.model.final_norm(x_NmD))


def join_linear_layers(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer in place of several with the same input."""
    joined = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), device="meta")
    joined.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    biases = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
    has_bias = any(layer.bias is not None for layer in layers)
    joined.register_parameter("bias", nn.Parameter(torch.cat(biases), requires_grad=False) if has_bias else None)
    return joined


def first_outputs(layer: nn.Linear, outputs: int) -> nn.Linear:
    """A linear layer that computes only the first outputs of another one, with the same weights."""
    first = nn.Linear(layer.in_features, outputs, device="meta")
    first.weight = nn.Parameter(layer.weight.detach()[:outputs], requires_grad=False)
    first.register_parameter("bias", None if layer.bias is None else nn.Parameter(layer.bias.detach()[:outputs], requires_grad=False))
    return first


def prepare_known_model(model: nn.Module, num_codes: int, rows: int, length: int) -> KnownModel | None:
    """The model prepared for sampling if every part of it is known, otherwise None. See make_decoder for the arguments."""
    if type(model) is llama.LlamaForCausalLM and is_plain(model, KnownLlama.MODULES) and KnownLlama.fits(model):
        return KnownLlama(model, num_codes, rows, length)
    if type(model) is grid.GridTransformer and is_plain(model, KnownGridTransformer.MODULES) and KnownGridTransformer.fits(model):
        return KnownGridTransformer(model, rows, length)
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
