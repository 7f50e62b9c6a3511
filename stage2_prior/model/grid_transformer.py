"""GridTransformer: this project's own causal language model for the tokens of images, registered with transformers' auto classes.

What differs from a language model for text:

- Positions are places in a grid. Keys are rotated by the place of the token they hold and queries by the place of the token they are to predict
  (rows in one half of each head, columns in the other; after RoFormer, Su et al. 2021, in two axes), so that "the one above" looks the same
  everywhere, at the beginning of a row too. A learnt embedding of the place to predict is added at the input.
- Each block adds its own embedding of the class to the class token, which all later positions attend to: the class enters at every depth, and
  the key-value cache holds all of it.
- Where the codebook is not too large, the last blocks, or all, do that for every id, and again for its value (embeddings of a layer's own as
  in Gemma 3n, Google 2025; of values as in modded-nanogpt, Jordan et al. 2024), so what a token is need not be carried beside what becomes of
  it. Looking up costs next to nothing. The feed-forward blocks, which do cost, give up as many weights: steps are shorter, and teach more.
- Queries and keys are normalized in each head (Dehghani et al. 2023), which keeps attention logits bounded at high learning rates.
- Squared ReLU in the feed-forward block (So et al. 2021). Norms are LayerNorm without bias: one pass, where RMSNorm takes five on a CPU.

In comments: B batch, S sequence (class token and tokens), D width, A heads, d width of a head, p its pairs, K codes of all grids together.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from stage2_prior.model.forward_arguments import check_arguments, check_labels, check_length
from stage2_prior.model.grid_attention import KERNELS, attend, compiled_passes, passes_for, project, queries_keys_values
from vqmosaic.errors import InputError
from vqmosaic.kernels.embedding_lookup import Occurrences, lookup

MODEL_TYPE = "grid_transformer"
NUMBERS = 2**18
"""Numbers that are looked at together in a feed-forward block, a part of a processor's cache."""


class GridTransformerConfig(PreTrainedConfig):
    """Sizes of a GridTransformer; the base makes it a dataclass. `grids` and `num_codes` say what the ids and their positions mean."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own name and kind)

    vocab_size: int = 523
    """All ids, V: codes, classes, null class."""
    num_codes: int = 512
    """Ids below this are codes; those from here on are classes, the last of them the null class."""
    grids: list | tuple = ((8, 8, 1),)
    """[height, width, depth] of each grid, in the order of their tokens."""
    hidden_size: int = 256
    """Width of the residual stream, D."""
    num_hidden_layers: int = 6
    """Blocks."""
    num_attention_heads: int = 4
    """Heads, A; D / A must be a multiple of 4."""
    intermediate_size: int = 1024
    """Width of the feed-forward blocks."""
    embedding_blocks: int = 0
    """How many blocks, the last ones, have embeddings of all ids, and not of the classes alone."""
    max_position_embeddings: int = 65
    """1 + T."""
    rope_theta: float = 100.0
    """The slowest rotation turns by about 1 / rope_theta a place; grids are some tens of places wide."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in norms."""
    embd_pdrop: float = 0.0
    """Dropout on the embedded tokens."""
    resid_pdrop: float = 0.0
    """Dropout on what each attention and feed-forward block adds."""
    tie_word_embeddings: bool = False
    """Always false: ids at the input and at the output have matrices of their own."""
    use_cache: bool = True
    """Whether forward returns a key-value cache."""
    bos_token_id: int | None = None
    """None: a sequence begins with its class."""
    eos_token_id: int | None = None
    """None: a sequence ends after T tokens."""
    pad_token_id: int | None = None
    """None: all sequences are of one length."""

    def __post_init__(self, **kwargs):
        head_width = self.hidden_size // self.num_attention_heads
        if self.hidden_size % self.num_attention_heads or head_width % 4:
            raise ValueError(f"hidden_size {self.hidden_size} over num_attention_heads {self.num_attention_heads} gives heads of {head_width} "
                             "dimensions; a grid_transformer rotates pairs of them in two axes, so it must be a multiple of 4")
        tokens = sum(height * width * depth for height, width, depth in self.grids)
        if self.max_position_embeddings != 1 + tokens:
            raise ValueError(f"max_position_embeddings is {self.max_position_embeddings}; the class and the tokens of grids {self.grids} "
                             f"make {1 + tokens}")
        if self.embedding_blocks not in range(self.num_hidden_layers + 1):
            raise ValueError(f"embedding_blocks is {self.embedding_blocks}; allowed: 0 to {self.num_hidden_layers}, the number of blocks")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is true; a grid_transformer has a matrix for its logits of its own")
        super().__post_init__(**kwargs)


def places_of_tokens(grids: list[list[int]]) -> torch.Tensor:
    """Row and column (T, 2) of each token, in places of the largest grid; those of smaller grids lie at the centres of what they cover."""
    most_rows, most_columns = max(grid[0] for grid in grids), max(grid[1] for grid in grids)
    places = []
    for height, width, depth in grids:
        rows = (torch.arange(height) + 0.5) * (most_rows / height) - 0.5
        columns = (torch.arange(width) + 0.5) * (most_columns / width) - 0.5
        grid_places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
        places.append(grid_places.repeat_interleave(depth, dim=0))
    return torch.cat(places)


def embeddings_and_feed_forward(layers: int, width: int, vocabulary: int, embedding_blocks: int | None = None) -> tuple[int, int]:
    """How many blocks have embeddings of all ids, unless that is given, and the width that this leaves to the feed-forward blocks.

    Together they have no more numbers than feed-forward blocks of the usual 4 D without any, so that a model has the size it is known by. About
    half of these are given up (5/8 at most): with a larger vocabulary fewer blocks have embeddings, and with one of more than 8 D, none.
    Raises ValueError for a given number that leaves nothing.
    """
    step = max(1, min(width // 4, 64))  # processors like multiples of 64
    if embedding_blocks is None:
        affordable = layers * width / vocabulary  # blocks with embeddings, for a width of D less in all feed-forward blocks
        embedding_blocks = min(layers, round(2 * affordable), int(2.5 * affordable)) if vocabulary <= 8 * width else 0
    feed_forward = int(4 * width - embedding_blocks * vocabulary / layers) // step * step
    if feed_forward <= 0:
        raise ValueError(f"embedding_blocks {embedding_blocks}, for {vocabulary:,} ids, leaves nothing to feed-forward blocks of the usual size; "
                         f"allowed: 0 to {int((4 * width - step) * layers / vocabulary)}, or more with an intermediate_size")
    return embedding_blocks, feed_forward


def rotation_tables(config: GridTransformerConfig) -> torch.Tensor:
    """Cosines and sines (S, 2, p, 2) by which queries (0) and keys (1) at S = 1 + T positions are rotated; the class stands at (-1, -1)."""
    tokens_T2 = places_of_tokens(config.grids)
    class_12 = torch.full((1, 2), -1.0)
    keys_S2 = torch.cat([class_12, tokens_T2])
    queries_S2 = torch.cat([tokens_T2, tokens_T2[-1:]])  # after the last token there is nothing left to predict
    pairs_per_axis = config.hidden_size // config.num_attention_heads // 4
    frequencies = config.rope_theta ** -(torch.arange(pairs_per_axis) / pairs_per_axis)
    places_S22 = torch.stack([queries_S2, keys_S2], dim=1)                          # S, query or key, axis
    angles = (places_S22[..., None] * frequencies).flatten(2).float()               # S, 2, p: pairs of rows, then of columns
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2 with the gradient 2 relu(x), some rows at a time, where autograd's own way, over a power and a threshold, goes over x five times."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        """The function, of any shape."""
        ctx.save_for_backward(x)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        for part, into in zip(some_rows(x), some_rows(result), strict=True):
            torch.clamp_min(part, 0, out=into).square_()
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of its input."""
        x, = ctx.saved_tensors
        result, zero = torch.empty_like(x, memory_format=torch.contiguous_format), x.new_zeros(())
        for part, outer, into in zip(some_rows(x), some_rows(gradient), some_rows(result), strict=True):
            torch.addcmul(zero, outer, torch.clamp_min(part, 0, out=into), value=2, out=into)
        return result


def some_rows(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Parts of x, taken as rows of its last dimension, of about NUMBERS each; on a GPU and for the compiler the whole."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.split(max(1, NUMBERS // x.shape[-1])) if x.device.type == "cpu" and not torch.compiler.is_compiling() else (rows,)


class GridBlock(GradientCheckpointingLayer):
    """Embeddings, attention, feed-forward: each around a skip connection."""

    def __init__(self, config: GridTransformerConfig, layer: int):
        super().__init__()
        width = config.hidden_size
        self.layer, self.heads, self.epsilon, self.dropout = layer, config.num_attention_heads, config.layer_norm_epsilon, config.resid_pdrop
        self.passes = KERNELS
        self.embeds_all_ids = layer >= config.num_hidden_layers - config.embedding_blocks
        self.stream_embedding = nn.Embedding(config.vocab_size - (0 if self.embeds_all_ids else config.num_codes), width)
        self.value_embedding = nn.Embedding(config.vocab_size, width) if self.embeds_all_ids else None
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_epsilon, bias=False)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.layer_norm_epsilon, bias=False)
        self.feed_forward_in = nn.Linear(width, config.intermediate_size, bias=False)
        self.feed_forward_out = nn.Linear(config.intermediate_size, width, bias=False)

    def forward(self, x_BSD: torch.Tensor, ids_BS: torch.Tensor, classes_B: torch.Tensor | None, rotations_S2p2: torch.Tensor,
                mask_SS: torch.Tensor | None = None, occurrences: Occurrences | None = None, is_start: torch.Tensor | None = None,
                past_key_values: Cache | None = None) -> torch.Tensor:
        """The residual stream (B, S, D) after the block; `classes_B` is None where the class token is in the cache already.

        `is_start`, for static caches: a bool scalar on the device that says whether the sequence starts with `classes_B`.
        The cache goes by transformers' name, and by keyword: so activation checkpointing finds it, and leaves it out.
        """
        batch, length, width = x_BSD.shape
        if self.embeds_all_ids:
            x_BSD = added(x_BSD, lookup(self.stream_embedding, ids_BS, occurrences, x_BSD.dtype))
        elif classes_B is not None:
            classes_BD = self.stream_embedding(classes_B) if is_start is None else self.stream_embedding(classes_B) * is_start
            x_BSD = x_BSD + F.pad(classes_BD[:, None], (0, 0, 0, length - 1)).to(x_BSD.dtype)
        # a cache goes on being read where there are no passes, so its pairs are never half-split
        passes = passes_for(x_BSD, self.attention_in, self.passes) if past_key_values is None else None
        hidden = project(self.attention_norm(x_BSD), self.attention_in, self.heads, passes)           # B, S, 3 D
        value_embeddings_BSD = lookup(self.value_embedding, ids_BS, occurrences, hidden.dtype) if self.embeds_all_ids else None
        query, key, value = queries_keys_values(hidden, value_embeddings_BSD, rotations_S2p2, self.heads, self.epsilon, passes)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer)                               # B, A, S, d each
        mixed_BSD = attend(query, key, value, mask_SS).transpose(1, 2).reshape(batch, length, width)
        x_BSD = added(x_BSD, F.dropout(self.attention_out(mixed_BSD), self.dropout, self.training))
        hidden = SquaredReLU.apply(self.feed_forward_in(self.feed_forward_norm(x_BSD)))               # B, S, intermediate
        return added(x_BSD, F.dropout(self.feed_forward_out(hidden), self.dropout, self.training))


def added(x_BSD: torch.Tensor, new_BSD: torch.Tensor) -> torch.Tensor:
    """The sum, in the place of what is new where that has the stream's format: fresh memory costs a CPU as much as the sum."""
    return new_BSD.add_(x_BSD) if new_BSD.dtype == x_BSD.dtype else x_BSD + new_BSD


class WidenToVocabulary(LogitsProcessor):
    """Gives the ids that have no logits, the class ids, a score of -inf."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (N, V) of scores (N, K)."""
        return F.pad(scores, (0, self.vocabulary - scores.shape[-1]), value=-torch.inf)


class GridTransformer(PreTrainedModel, GenerationMixin):
    """The causal language model: ids (B, S), a class id first, to logits (B, S, K): a class is never to be predicted.

    Use it through TokenPrior, or like any transformers model.
    """

    config_class = GridTransformerConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["GridBlock"]  # noqa: RUF012 (transformers' own name and kind)
    _supports_sdpa = True

    def __init__(self, config: GridTransformerConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers infers it from class names like LlamaForCausalLM; the Trainer needs it to count shifted labels
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(GridBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon, bias=False)
        self.head = nn.Linear(config.hidden_size, config.num_codes, bias=False)
        self._rotations: dict[torch.device, torch.Tensor] = {}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Embeddings are normal, matrices too, of variance 1 over inputs; what writes into the residual stream is zero: blocks start as nothing."""
        if isinstance(module, GridBlock):
            for matrix in (module.attention_out, module.feed_forward_out):
                nn.init.zeros_(matrix.weight)
        elif isinstance(module, nn.Linear) and not any(module is block.attention_out or module is block.feed_forward_out for block in self.blocks):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of all ids."""
        return self.token_embedding

    def get_output_embeddings(self) -> nn.Linear:
        """The matrix that makes logits."""
        return self.head

    def compile_passes(self) -> None:
        """Train in bf16 on a CPU with what lies between the products of attention compiled; compiled whole, blocks are no faster there."""
        for block in self.blocks:
            block.passes = compiled_passes()

    def rotations(self, device: torch.device) -> torch.Tensor:
        """The rotations on a device; computed once. (Buffers outside of checkpoints would be lost when transformers loads a model.)"""
        if device not in self._rotations:
            with torch.inference_mode(False):  # first asked for in sampling, they must still be fit for training
                self._rotations[device] = rotation_tables(self.config).to(device)
        return self._rotations[device]

    def generate(self, inputs=None, generation_config=None, logits_processor=None, *args, **kwargs):
        """transformers' `generate`. Scores cover the whole vocabulary, as beam search and `compute_transition_scores` expect."""
        self.rotations(self.device)  # cached before any compiled call: the next run of a CUDA graph would overwrite them
        processors = [*(logits_processor or []), WidenToVocabulary(self.config.vocab_size)]
        return super().generate(inputs, generation_config, processors, *args, **kwargs)

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None = None, **unused) -> torch.Tensor | None:
        """The attention mask, unchanged. `forward` masks by position, so `generate` does not have to build a mask for static caches."""
        return attention_mask

    def init_continuous_batching(self, *args, **kwargs):
        """Raises InputError. `generate` with cache_implementation "paged" calls this; otherwise it would log an error and return nothing."""
        raise InputError("A grid_transformer does not support continuous batching (cache_implementation 'paged'): all sequences have the same length "
                         "and start together. Use 'static' or 'dynamic'.")

    @can_return_tuple
    def forward(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, past_key_values: Cache | None = None,
                labels: torch.Tensor | None = None, use_cache: bool | None = None, logits_to_keep: int | torch.Tensor = 0,
                output_hidden_states: bool | None = None, num_items_in_batch: torch.Tensor | int | None = None,
                **others) -> CausalLMOutputWithPast:
        """Logits (B, S, K) for ids (B, S), or for the last `logits_to_keep` positions (if it is a tensor, for the positions in it).

        `labels` (B, S), usually the ids themselves, add the loss: the mean cross-entropy, in float32, of predicting labels[:, s + 1] at position s.
        Labels of -100 are ignored. The first label, which is the class, is not predicted. With `num_items_in_batch`, the loss is the sum divided by
        that number. With labels, no cache is returned by default.

        `past_key_values` may be any cache of transformers without a sliding window. `output_hidden_states` returns the embedded ids and the output
        of each block, the last one after the final norm. `return_dict=False` returns a tuple. `attention_mask` must be all ones, because all
        sequences have the same length. Raises ValueError for zeros in it, for labels that are not codes, and for arguments that are not supported.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        others.setdefault("output_attentions", self.config.output_attentions)
        check_arguments(input_ids, attention_mask, output_hidden_states, others)
        if labels is not None:
            check_labels(labels, input_ids, logits_to_keep, self.config.num_codes)
        checkpoints = self.training and any(block.gradient_checkpointing for block in self.blocks)
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not checkpoints
        if checkpoints and (use_cache or past_key_values is not None):
            raise InputError("Training with gradient checkpointing cannot use a cache. Set use_cache False, or call eval() first.")
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        seen, length, keys = 0, input_ids.shape[1], 0  # ids in the cache, new ids, and all keys of attention, filled or not
        check_length(past_key_values, length, self.config.max_position_embeddings)
        if past_key_values is not None:
            seen, (keys, _) = past_key_values.get_seq_length(), past_key_values.get_mask_sizes(length, 0)
        is_static = isinstance(seen, torch.Tensor)  # `seen` is then a tensor on the device, and the first block changes it
        positions_S = torch.arange(length, device=input_ids.device) + seen if is_static else \
            torch.arange(seen, seen + length, device=input_ids.device)
        occurrences = None
        if torch.is_grad_enabled() and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            occurrences = Occurrences.of(input_ids, self.config.vocab_size)
        x_BSD = lookup(self.token_embedding, input_ids, occurrences, self.token_embedding.weight.dtype)
        x_BSD = x_BSD + self.position_embedding(positions_S)                                          # B, S, D
        x_BSD = F.dropout(x_BSD, self.config.embd_pdrop, self.training)
        if x_BSD.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
            x_BSD = x_BSD.bfloat16()  # half of the memory to pass over in each block; for GPUs it was not measured
        classes_B = (input_ids[:, 0] - self.config.num_codes).clamp_min(0) if is_static or seen == 0 else None
        is_start = seen == 0 if is_static else None
        rotations_S2p2 = self.rotations(input_ids.device)[positions_S if is_static else slice(seen, seen + length)]
        mask_SS = None
        if is_static or keys > seen + length or (seen and length > 1):
            mask_SS = torch.arange(keys, device=input_ids.device) <= positions_S[:, None]             # S, keys
        hidden_states = [] if output_hidden_states else None
        for block in self.blocks:
            if hidden_states is not None:
                hidden_states.append(x_BSD)
            x_BSD = block(x_BSD, input_ids, classes_B, rotations_S2p2, mask_SS, occurrences, is_start, past_key_values=past_key_values)
        x_BSD = self.final_norm(x_BSD)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep    # -0 keeps all
        logits_BSK = self.head(x_BSD[:, kept])                                                        # B, S, K
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BSK, labels, vocab_size=self.config.num_codes, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BSK, past_key_values=past_key_values,
                                      hidden_states=None if hidden_states is None else (*hidden_states, x_BSD))


AutoConfig.register(MODEL_TYPE, GridTransformerConfig)
AutoModelForCausalLM.register(GridTransformerConfig, GridTransformer)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MODEL_TYPE] = GridTransformer.__name__  # otherwise the Trainer's label smoothing does not shift labels
