"""Tiny pipelines with random weights, random images and masks for the tests of editing and scores."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.bundle import make_bundle
from stage1_tokenizer import ImageTokenizer, Tokenizer
from stage1_tokenizer.image_files.images import ImageTransform
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from tests.conditioned import CLASSES, CODES, sharpened
from tests.test_tokenizer_protocol import MeanColours
from tests.tiny_priors import tiny_prior
from vqmosaic.recipes.image_sizes import ImageSize
from vqmosaic.recipes.recipe_sections import PriorConfig, SamplingConfig
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig

TOKEN = 4
"""Pixels along each side of a token."""


def make_tokenizer(folder: Path, transform: ImageTransform) -> Tokenizer:
    """A convolutional tokenizer with random weights, one token per TOKEN x TOKEN pixels."""
    config = TokenizerConfig(channels=32, channel_multipliers=[1, 1, 1], residual_blocks=0, codebook_size=CODES, code_dim=8, latent_channels=8,
                             middle_attention=False)
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(config, transform, CLASSES).eval()
    tokenizer.save_pretrained(folder)
    return tokenizer


def two_grids(folder: Path, channels: int = 1) -> Tokenizer:
    """A tokenizer with 2 x 2 and 4 x 4 places, and as many ids at each place as channels."""
    tokenizer = MeanColours({"coarse": 5, "fine": 16}, ImageTransform(16, channels), CLASSES).eval()
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_prior(tokenizer: Tokenizer, any_order: bool = True, **fields: object) -> TokenPrior:
    """A prior with random weights for the tokens of a tokenizer."""
    vocabulary = Vocabulary(**{"grids": tokenizer.grids, "class_names": CLASSES, "token_fingerprint": tokenizer.token_fingerprint,
                               "label_drop": 0.1, **fields})
    if not any_order:
        return sharpened(tiny_prior("llama", vocabulary))
    config = PriorConfig(architecture="grid_transformer", width=32, layers=2, heads=2, dropout=0.0)
    return sharpened(TokenPrior.from_config(config, vocabulary, 0, any_order=True))


def make_pipe(folder: Path, channels: int = 1, size: ImageSize = 16, value_range: tuple[float, float] | None = None, any_order: bool = True,
              **sampling: object) -> ImageGenerationPipeline:
    """A pipeline of one grid."""
    tokenizer = make_tokenizer(folder, ImageTransform(size, channels, value_range))
    return ImageGenerationPipeline(tokenizer, make_prior(tokenizer, any_order), SamplingConfig(**sampling))


def saved_pipeline(root: Path, pipe: ImageGenerationPipeline) -> Path:
    """Save the parts of a pipeline and bundle them. Returns the pipeline folder."""
    pipe.tokenizer.save_pretrained(root / "tokenizer")
    pipe.prior.save_pretrained(root / "prior")
    return make_bundle(root / "tokenizer", root / "prior", root / "pipeline", SamplingConfig())


def random_image(pipe: ImageGenerationPipeline, seed: int = 0) -> Image.Image:
    """A random PIL image of the pipeline's size and channels, of 16 bits with a value range."""
    transform, rng = pipe.tokenizer.transform, np.random.default_rng(seed)
    if transform.value_range is not None:
        return Image.fromarray(rng.integers(0, 65536, transform.sides, dtype=np.uint16))
    pixels_HWC = rng.integers(0, 256, (*transform.sides, transform.channels), dtype=np.uint8)
    return Image.fromarray(pixels_HWC[..., 0] if transform.channels == 1 else pixels_HWC)


def box_mask(pipe: ImageGenerationPipeline, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """A bool mask (H, W) of a box in pixels."""
    mask_HW = np.zeros(pipe.tokenizer.transform.sides, dtype=bool)
    mask_HW[top:bottom, left:right] = True
    return mask_HW
