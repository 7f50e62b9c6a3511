"""Codebook sizes that the quantizers without a learned codebook support: levels of fsq, bits of lfq. Loads no torch."""

from functools import cache

from vqmosaic.errors import InputError

MIN_LEVELS, MAX_LEVELS = 3, 8
"""Bounds for the number of levels in one dimension of fsq."""


@cache
def _factorize(size: int, max_level: int) -> tuple[int, ...] | None:
    """The most even factorization of `size` into levels of at most `max_level`, largest level first; None if there is none."""
    if size == 1:
        return ()
    found = [(level, *rest) for level in range(min(max_level, size), MIN_LEVELS - 1, -1)
             if size % level == 0 and (rest := _factorize(size // level, level)) is not None]
    # Most even: the smallest level is as large as possible; of those, the one with the fewest levels.
    return max(found, key=lambda levels: (levels[-1], -len(levels))) if found else None


def _products_of_small_primes(limit: int) -> set[int]:
    """All products of 2, 3, 5 and 7 up to `limit`. No other size can be factorized into levels."""
    sizes = {1}
    for prime in (2, 3, 5, 7):
        for size in list(sizes):
            while (size := size * prime) <= limit:
                sizes.add(size)
    return sizes


def fsq_levels(codebook_size: int, section: str = "tokenizer") -> list[int]:
    """Levels of each fsq dimension: 3 to 8 each, as even as possible, with the codebook size as their product (240 -> 8, 6, 5).

    Raises:
        InputError: there is no such product. The message names the field in `section` and the nearest sizes that have one.
    """
    levels = _factorize(codebook_size, MAX_LEVELS)
    if levels:
        return list(levels)
    # The limit includes a possible size above codebook_size: 3, or a power of two.
    possible = sorted(size for size in _products_of_small_primes(2 * codebook_size + MIN_LEVELS) if size > 1 and _factorize(size, MAX_LEVELS))
    below, above = max((size for size in possible if size < codebook_size), default=None), min(size for size in possible if size > codebook_size)
    raise InputError(f"{section}.codebook_size is {codebook_size}, but {section}.quantizer fsq needs a product of levels from {MIN_LEVELS} to "
                     f"{MAX_LEVELS}; nearest: {' or '.join(str(size) for size in (below, above) if size)}.")


def lfq_bits(codebook_size: int, section: str = "tokenizer") -> int:
    """Number of bits of an lfq code.

    Raises:
        InputError: the size is not a power of two. The message names the field in `section` and the nearest ones.
    """
    bits = codebook_size.bit_length() - 1
    if codebook_size != 2**bits:
        raise InputError(f"{section}.codebook_size is {codebook_size}, but {section}.quantizer lfq needs a power of two; "
                         f"nearest: {2**bits} or {2 ** (bits + 1)}.")
    return bits
