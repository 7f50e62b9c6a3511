"""Counted randomness: every random choice is a function of named integers, so nothing has to be carried or restored."""

import hashlib
import operator
from collections.abc import Sequence

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order, the same on every machine and version."""
    text = "\x1f".join(f"str:{part}" if isinstance(part, str) else f"int:{operator.index(part)}" for part in parts)
    # surrogatepass: a file name that is not valid UTF-8 has surrogates in it
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A fresh numpy generator for exactly these parts."""
    return np.random.Generator(np.random.PCG64(derive_seed(*parts)))


def permutation(size: int, *parts: int | str) -> np.ndarray:
    """A permutation of range(size) (int64) for exactly these parts."""
    return generator(*parts).permutation(size)


def image_seeds(seed: int, count: int) -> list[int]:
    """seeds[i] = f(seed, i): the seed of the i-th image of a request, whatever the batch size or the number of ranks."""
    return [derive_seed("image", seed, index) for index in range(count)]


def uniforms(seeds: Sequence[int], length: int) -> np.ndarray:
    """Float64 uniforms (B, T) in [0, 1): row b depends on seeds[b] alone."""
    return np.stack([np.random.Generator(np.random.PCG64(seed)).random(length) for seed in seeds])


def reseed_step(*parts: int | str) -> None:
    """Seed torch's global generators for one step, so that dropout is f(seed, step, rank) and survives any resume."""
    import torch  # imported here: the leaf package loads without torch

    torch.manual_seed(derive_seed(*parts))
