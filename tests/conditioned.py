"""Tiny tokenizers, token shards and pipelines with conditions, written by hand: a low resolution, a text, and two drawn grids."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from pipelines.bundle import make_bundle
from stage1_tokenizer import ImageTokenizer
from stage1_tokenizer.image_files.images import ImageTransform
from stage2_prior.prior import TokenPrior
from stage2_prior.segments import Condition, GivenGrid, GivenText
from stage2_prior.vocabulary import Vocabulary
from tests.tiny_priors import tiny_prior
from token_shards import Grid, ShardSetHeader, TokenShardWriter, default_key
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig

SIZE, LOW_SIZE, CODES = 16, 8, 16
CLASSES = ["ant", "bee"]
LOW_DERIVATION = {"kind": "low_resolution", "factor": SIZE // LOW_SIZE}
TEXT_LENGTH = 6


def image_tokenizer(folder: Path, size: int = SIZE, derived: Mapping[str, object] | None = None, seed: int = 0) -> Path:
    """Save a tokenizer of grey images with random weights, one token per 4 x 4 pixels, and return its folder."""
    config = TokenizerConfig(channels=32, channel_multipliers=[1, 1, 1], residual_blocks=0, codebook_size=CODES, code_dim=8, latent_channels=8,
                             middle_attention=False)
    torch.manual_seed(seed)
    ImageTokenizer(config, ImageTransform(size, 1, derived=derived), CLASSES).eval().save_pretrained(folder)
    return folder


def sharpened(prior: TokenPrior) -> TokenPrior:
    """The prior in evaluation mode with random values in all weights, so that its logits depend on everything that is given."""
    with torch.no_grad():
        for number, parameter in enumerate(prior.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
    return prior.eval()


def saved_prior(folder: Path, grids: Sequence[Grid], fingerprint: str, conditions: Sequence[Condition] = (), **fields: object) -> Path:
    """Save a prior with random weights and return its folder."""
    vocabulary = Vocabulary(**{"grids": list(grids), "class_names": CLASSES, "token_fingerprint": fingerprint, "label_drop": 0.1,
                               "conditions": list(conditions), **fields})
    sharpened(tiny_prior("grid_transformer", vocabulary)).save_pretrained(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Parts:
    """Folders of a tokenizer, of that of its low resolution, and of a prior."""

    tokenizer: Path
    low: Path
    prior: Path

    def bundle(self, out: Path, **sampling: object) -> Path:
        return make_bundle(self.tokenizer, self.prior, out, SamplingConfig(**sampling), {"low": self.low})


def given_low(tokenizer: Path, drop_rate: float = 0.2) -> GivenGrid:
    """The condition `low` of a saved tokenizer."""
    loaded = ImageTokenizer.from_pretrained(tokenizer)
    return GivenGrid(grid=dataclasses.replace(loaded.grids[0], name="low", token_fingerprint=loaded.token_fingerprint), drop_rate=drop_rate)


def given_text(drop_rate: float = 0.2) -> GivenText:
    """A text of bytes."""
    return GivenText(name="text", text_ids=256, num_tokens=TEXT_LENGTH, drop_rate=drop_rate, token_fingerprint="text:bytes")


def make_parts(folder: Path, low_drop: float = 0.2, text_drop: float = 0.2, **fields: object) -> Parts:
    """A tokenizer of 16 x 16 pixels, one of 8 x 8 pixels for `low`, and a prior that is given class, low and text."""
    tokenizer, low = image_tokenizer(folder / "tokenizer"), image_tokenizer(folder / "low", LOW_SIZE, LOW_DERIVATION, seed=1)
    loaded = ImageTokenizer.from_pretrained(tokenizer)
    prior = saved_prior(folder / "prior", loaded.grids, str(loaded.token_fingerprint), [given_low(low, low_drop), given_text(text_drop)], **fields)
    return Parts(tokenizer, low, prior)


def write_shards(folder: Path, grids: Sequence[Grid], ids: Mapping[str, np.ndarray], conditions: Sequence[Mapping[str, object]] = (),
                 labels: Sequence[int] | None = None, fingerprint: str = "f" * 64) -> Path:
    """Write token shards of both splits into folder/train and folder/validation, with the ids (N, n) of each grid, and return the folder."""
    count = len(next(iter(ids.values())))
    for split in ("train", "validation"):
        header = ShardSetHeader(split=split, token_fingerprint=fingerprint, grids=list(grids), views=[{"name": "original"}],
                                class_names=None if labels is None else CLASSES, dataset={"name": "made up"}, encoding={}, images_per_shard=100,
                                num_sources=count, conditions=[dict(record) for record in conditions])
        writer = TokenShardWriter(folder / split, header)
        for number in range(writer.num_shards):
            with writer.shard(number) as shard:
                for index in header.source_indices(number):
                    shard.add(index=index, key=default_key(index), source=str(index), label=None if labels is None else int(labels[index]),
                              ids={name: rows[index][None] for name, rows in ids.items()})
        writer.finish()
    return folder
