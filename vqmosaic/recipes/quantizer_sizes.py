"""Which codebook sizes the quantizers without a learnt codebook can have: levels of fsq, bits of lfq. No torch."""

from functools import cache

from vqmosaic.errors import InputError

FEWEST_LEVELS, MOST_LEVELS = 3, 8


@cache
def _levels(size: int, most: int) -> tuple[int, ...] | None:
    """The factorisation of `size` into levels of at most `most`, largest first, with the largest smallest level; None where there is none."""
    if size == 1:
        return ()
    found = [(level, *rest) for level in range(min(most, size), FEWEST_LEVELS - 1, -1)
             if size % level == 0 and (rest := _levels(size // level, level)) is not None]
    return max(found, key=lambda levels: (levels[-1], -len(levels))) if found else None


def _products_of_small_primes(most: int) -> set[int]:
    """All products of 2, 3, 5 and 7 up to `most`: no other size can have levels."""
    sizes = {1}
    for prime in (2, 3, 5, 7):
        for size in list(sizes):
            while (size := size * prime) <= most:
                sizes.add(size)
    return sizes


def levels_of(codebook_size: int) -> list[int]:
    """Levels of each dimension of fsq, whose product is the codebook size: 3 to 8 each, as even as they can be (240 -> 8, 6, 5).

    Raises:
        ValueError: there are none; names the nearest sizes that can be had.
    """
    levels = _levels(codebook_size, MOST_LEVELS)
    if levels:
        return list(levels)
    smooth = sorted(size for size in _products_of_small_primes(2 * codebook_size + FEWEST_LEVELS) if size > 1 and _levels(size, MOST_LEVELS))
    below, above = max((size for size in smooth if size < codebook_size), default=None), min(size for size in smooth if size > codebook_size)
    raise InputError(f"tokenizer.codebook_size is {codebook_size}, which is no product of levels from {FEWEST_LEVELS} to {MOST_LEVELS}, as "
                     f"tokenizer.quantizer fsq needs; nearest: {' or '.join(str(size) for size in (below, above) if size)}.")


def bits_of(codebook_size: int) -> int:
    """Bits of an lfq code.

    Raises:
        ValueError: the size is no power of two; names the nearest ones.
    """
    bits = codebook_size.bit_length() - 1
    if codebook_size != 2**bits:
        raise InputError(f"tokenizer.codebook_size is {codebook_size}, which is no power of two, as tokenizer.quantizer lfq needs; "
                         f"nearest: {2**bits} or {2 ** (bits + 1)}.")
    return bits
