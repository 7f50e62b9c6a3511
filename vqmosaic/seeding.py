"""Counter-based randomness: every random choice is a function of named integers, so there is no random state to save and restore."""

import hashlib
import operator
from collections.abc import Sequence

import numpy as np

from vqmosaic.recipes.field_types import as_integer


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order. It is the same on every machine and in every version."""
    text = "\x1f".join(f"str:{part}" if isinstance(part, str) else f"int:{operator.index(part)}" for part in parts)
    # surrogatepass: a file name that is not valid UTF-8 contains surrogates
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A fresh numpy generator for exactly these parts."""
    return np.random.Generator(np.random.PCG64(derive_seed(*parts)))


def permutation(size: int, *parts: int | str) -> np.ndarray:
    """A permutation of range(size) (int64) for exactly these parts."""
    return generator(*parts).permutation(size)


def hashes(numbers_N: np.ndarray, *parts: int | str) -> np.ndarray:
    """The uint64 hash (N,) of each number for exactly these parts. Different numbers have different hashes.

    Applies the finalizer of splitmix64 (Steele et al. 2014) to the whole array. Unlike numpy's generators, it never changes with a version.
    """
    hashed_N = numbers_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive_seed(*parts))
    hashed_N = (hashed_N ^ (hashed_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashed_N = (hashed_N ^ (hashed_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashed_N ^ (hashed_N >> np.uint64(31))


def image_seeds(seed: int, count: int) -> list[int]:
    """The seeds of the images of a request. seeds[i] depends only on `seed` and i, not on the batch size or the number of processes.

    Raises InputError for a seed that is not an integer: the text "7" would give different seeds from the number 7.
    """
    seed = as_integer("seed", seed)
    return [image_seed(seed, index) for index in range(count)]


def image_seed(seed: int, index: int) -> int:
    """The seed of the image with this index in a request, as in `image_seeds`."""
    return derive_seed("image", as_integer("seed", seed), index)


def uniforms(seeds: Sequence[int], length: int) -> np.ndarray:
    """Uniform random numbers (B, T) in [0, 1), float64. Row b depends only on seeds[b]."""
    return np.stack([np.random.Generator(np.random.PCG64(seed)).random(length) for seed in seeds])


def reseed_step(*parts: int | str) -> None:
    """Seed torch's global generators for one step, so that dropout depends only on seed, step and rank and a resumed run repeats it."""
    import torch  # imported here because importing this package must not load torch

    torch.manual_seed(derive_seed(*parts))
