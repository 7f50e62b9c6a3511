"""Configuration of a GridTransformer, and what follows from it: sizes within a parameter budget, coordinates of tokens, rotations.

In comments: S sequence (class and tokens), T tokens, D width, p pairs of a head.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

MODEL_TYPE = "grid_transformer"
CLASS_PLACE = -1
"""The place of the class. Tokens have places 0 to T - 1, in raster order."""


class GridTransformerConfig(PreTrainedConfig):
    """Configuration of a GridTransformer; the base class makes it a dataclass. `grids` and `num_codes` define the meaning of positions and ids."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (name and type from transformers)

    vocab_size: int = 523
    """Number of ids, V: codes, classes, null class."""
    num_codes: int = 512
    """Ids below this are codes. The others are classes; the last one is the null class."""
    grids: list | tuple = ((8, 8, 1),)
    """[height, width, depth] of each drawn grid, in the order of their tokens."""
    given: list | tuple = ()
    """[height, width, depth] of each given grid and [length] of each given text, in the order of their tokens, which follow the class."""
    text_ngram_rows: int = 0
    """Number of embeddings for n-grams of each length in given texts. 0 if ids of texts have only embeddings of their own."""
    hidden_size: int = 256
    """Width of the residual stream, D."""
    num_hidden_layers: int = 6
    """Number of blocks."""
    num_attention_heads: int = 4
    """Number of heads, A. D / A must be a multiple of 4."""
    intermediate_size: int = 1024
    """Width of the feed-forward layers of blocks that are not query blocks."""
    query_blocks: int = 0
    """Number of blocks, counted from the last, that are queries for tokens. 0 is a model that predicts in raster order only."""
    query_embeddings: bool = False
    """Whether each query block adds its own embeddings of all ids to the attention values."""
    query_intermediate_size: int | None = None
    """Width of the feed-forward layers of query blocks. None is 4 D."""
    embedding_blocks: int = 0
    """Number of blocks, counted from the last that are not query blocks, with embeddings of all ids. The others have only class embeddings."""
    max_position_embeddings: int = 65
    """1 + T: the class and the tokens, given and drawn."""
    rope_theta: float = 100.0
    """Base of the rotary frequencies. The slowest rotation is about 1 / rope_theta per row or column; grids have tens of rows and columns."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in norms."""
    embd_pdrop: float = 0.0
    """Dropout on the embedded tokens."""
    resid_pdrop: float = 0.0
    """Dropout on the output of each attention and feed-forward block."""
    tie_word_embeddings: bool = False
    """Always false: input embeddings and output head are separate matrices."""
    use_cache: bool = True
    """Whether forward returns a key-value cache."""
    bos_token_id: int | None = None
    """None: a sequence starts with its class."""
    eos_token_id: int | None = None
    """None: a sequence ends after T tokens."""
    pad_token_id: int | None = None
    """None: all sequences have the same length."""

    def __post_init__(self, **kwargs):
        head_width = self.hidden_size // self.num_attention_heads
        if self.hidden_size % self.num_attention_heads or head_width % 4:
            raise ValueError(f"hidden_size {self.hidden_size} / num_attention_heads {self.num_attention_heads} gives a head dimension of "
                             f"{head_width}; a grid_transformer rotates pairs of dimensions in two axes, so it must be a multiple of 4")
        tokens = sum(math.prod(shape) for shape in (*self.given, *self.grids))
        if self.max_position_embeddings != 1 + tokens:
            raise ValueError(f"max_position_embeddings is {self.max_position_embeddings}; the class and the tokens of grids "
                             f"{[*self.given, *self.grids]} need {1 + tokens}")
        if self.query_blocks not in range(self.num_hidden_layers):
            raise ValueError(f"query_blocks is {self.query_blocks}; allowed: 0 to {self.num_hidden_layers - 1}, all blocks but one")
        if not isinstance(self.query_embeddings, bool):
            raise ValueError(f"query_embeddings is {self.query_embeddings!r}; allowed: true or false")
        if self.query_embeddings and not self.query_blocks:
            raise ValueError("query_embeddings is true, but query_blocks is 0; query embeddings belong to query blocks")
        if self.query_intermediate_size is not None and (not self.query_blocks or self.query_intermediate_size < 1):
            raise ValueError(f"query_intermediate_size is {self.query_intermediate_size} with {self.query_blocks} query_blocks; allowed: a width of "
                             "at least 1 if there are query blocks, otherwise null")
        if self.embedding_blocks not in range(self.num_token_blocks + 1):
            kind = "blocks that are not query blocks" if self.query_blocks else "blocks"
            raise ValueError(f"embedding_blocks is {self.embedding_blocks}; allowed: 0 to {self.num_token_blocks}, the number of {kind}")
        if self.text_ngram_rows < 0 or (self.text_ngram_rows and all(len(shape) == 3 for shape in self.given)):
            raise ValueError(f"text_ngram_rows is {self.text_ngram_rows}; allowed: 0, or a number of embeddings if a text is given")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is true; a grid_transformer has a separate output head, so it must be false")
        super().__post_init__(**kwargs)

    @property
    def num_token_blocks(self) -> int:
        """Number of blocks that process tokens: all but the query blocks."""
        return self.num_hidden_layers - self.query_blocks

    @property
    def num_cache_layers(self) -> int:
        """Number of layers in a key-value cache. Query blocks without embeddings share one."""
        return self.num_hidden_layers if self.query_embeddings else self.num_token_blocks + bool(self.query_blocks)

    @property
    def query_feed_forward(self) -> int:
        """Width of the feed-forward layers of query blocks."""
        return 4 * self.hidden_size if self.query_intermediate_size is None else self.query_intermediate_size

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of config.json. It omits what older versions did not write, unless it is set."""
        newer = ("given", "text_ngram_rows", "query_embeddings", "query_intermediate_size")
        return {name: value for name, value in super().to_diff_dict().items() if name not in newer or value}


def token_coordinates(shapes: Sequence[Sequence[int]]) -> torch.Tensor:
    """Row and column (T, 2) of each token of grids [height, width, depth] and texts [length], in units of the largest grid.

    A token of a smaller grid is at the centre of the area it covers. The first text is in row -2, the next in row -3, its columns are its places.
    """
    grids = [shape for shape in shapes if len(shape) == 3]
    max_rows, max_columns = max(grid[0] for grid in grids), max(grid[1] for grid in grids)
    coordinates, text_row = [], -2.0
    for shape in shapes:
        if len(shape) == 1:
            coordinates.append(torch.stack([torch.full((shape[0],), text_row), torch.arange(shape[0], dtype=torch.float32)], dim=-1))
            text_row -= 1
            continue
        height, width, depth = shape
        rows = (torch.arange(height) + 0.5) * (max_rows / height) - 0.5
        columns = (torch.arange(width) + 0.5) * (max_columns / width) - 0.5
        grid_coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
        coordinates.append(grid_coordinates.repeat_interleave(depth, dim=0))
    return torch.cat(coordinates)


def split_parameter_budget(layers: int, width: int, vocabulary: int, embedding_blocks: int | None = None) -> tuple[int, int]:
    """Split parameters between embeddings and feed-forward blocks. Returns the number of blocks with embeddings and the feed-forward width.

    The budget is that of feed-forward blocks of width 4 D without embeddings, so that a preset has its nominal size. Unless `embedding_blocks` is
    given, about half of the budget (5/8 at most) goes to embeddings: a larger vocabulary means fewer blocks with embeddings, and more than 8 D ids
    mean none. Raises ValueError if `embedding_blocks` leaves no parameters for the feed-forward blocks.
    """
    step = max(1, min(width // 4, 64))  # multiples of 64 are fast
    if embedding_blocks is None:
        affordable = layers * width / vocabulary  # embedding blocks that a quarter of the budget pays for
        embedding_blocks = min(layers, round(2 * affordable), int(2.5 * affordable)) if vocabulary <= 8 * width else 0
    feed_forward = int(4 * width - embedding_blocks * vocabulary / layers) // step * step
    if feed_forward <= 0:
        raise ValueError(f"embedding_blocks {embedding_blocks}, for {vocabulary:,} ids, leaves no parameters for the feed-forward blocks; "
                         f"allowed: 0 to {int((4 * width - step) * layers / vocabulary)}, or more with an intermediate_size")
    return embedding_blocks, feed_forward


def query_block_sizes(width: int, vocabulary: int, has_embeddings: bool | None = None) -> dict[str, Any]:
    """Whether query blocks have embeddings of the known ids (unless it is given), and their feed-forward width.

    With embeddings, feed-forward layers of half the usual width 4 D learn as much per step, and steps are faster. The embeddings of more than 4 D ids
    would be larger than what that saves.
    """
    has_embeddings = vocabulary <= 4 * width if has_embeddings is None else has_embeddings
    return {"query_embeddings": has_embeddings, "query_intermediate_size": 2 * width if has_embeddings else 4 * width}


def rotation_tables(config: GridTransformerConfig) -> torch.Tensor:
    """Cosines and sines (S, 2, p, 2) that rotate queries (0) and keys (1) at S = 1 + T positions. The class has the coordinates (-1, -1)."""
    tokens_T2 = token_coordinates([*config.given, *config.grids])
    class_12 = torch.full((1, 2), -1.0)
    keys_S2 = torch.cat([class_12, tokens_T2])
    queries_S2 = torch.cat([tokens_T2, tokens_T2[-1:]])  # the last token predicts nothing
    pairs_per_axis = config.hidden_size // config.num_attention_heads // 4
    frequencies = config.rope_theta ** -(torch.arange(pairs_per_axis) / pairs_per_axis)
    coordinates_S22 = torch.stack([queries_S2, keys_S2], dim=1)                     # S, query or key, axis
    angles = (coordinates_S22[..., None] * frequencies).flatten(2).float()          # S, 2, p: pairs of rows, then of columns
    return torch.stack([angles.cos(), angles.sin()], dim=-1)
