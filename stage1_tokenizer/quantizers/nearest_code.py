"""Nearest-code search and k-means in full float32, whatever autocast, TF32 or matmul-precision flags say.

bf16 distances pick a wrong code for 1-5 % of vectors. The N x K matrix of distances is never held: vectors and codes are
worked off in pieces, on a CPU of a size that stays in its cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vqmosaic.seeding import derive_seed

# Bytes of codes and of scores worked on at a time. On a CPU both stay in its cache; a GPU should want few large pieces (not measured).
WORKING_SET_BYTES = {"cpu": (2**20, 4 * 2**20)}
LARGE_WORKING_SET_BYTES = (16 * 2**20, 32 * 2**20)
GROUP = 64


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """A context in which a device's float32 matrix products and convolutions are float32: no autocast, no TF32, no bf16 inside."""
    if device.type == "cuda":
        flags = {torch.backends.cuda.matmul: torch.backends, torch.backends.cudnn.conv: torch.backends.cudnn}
    else:
        flags = {torch.backends.mkldnn.matmul: torch.backends.mkldnn, torch.backends.mkldnn.conv: torch.backends.mkldnn}
    # a flag that was never set reads as the wider one above it; written back as read, it would no longer follow that one
    before = {flag: "none" if flag.fp32_precision == wider.fp32_precision else flag.fp32_precision
              for flag, wider in flags.items() if flag.fp32_precision != "ieee"}
    try:
        for flag in before:
            flag.fp32_precision = "ieee"
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device_type=device.type, enabled=False):
                yield
        else:  # entering autocast costs as much as a small operator
            yield
    finally:
        for flag, precision in before.items():
            flag.fp32_precision = precision


@torch.no_grad()
def nearest_codes(vectors_ND: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
    """Ids (N,) int64 of the code with the smallest Euclidean distance to each vector, the first one where several are as near.

    |x - c|^2 = |x|^2 - 2 x.c + |c|^2, of which the first term does not change the order.
    """
    with full_precision(vectors_ND.device):
        return lowest_scores(vectors_ND, codebook_KD, codebook_KD.float().square().sum(1).mul_(0.5))


@torch.no_grad()
def lowest_scores(vectors_ND: torch.Tensor, codebook_KD: torch.Tensor, offsets_K: torch.Tensor) -> torch.Tensor:
    """Ids (N,) int64 of the code with the smallest offset - x.c for each vector, the first one where several are as small."""
    with full_precision(vectors_ND.device):
        vectors_ND, codebook_KD, offsets_K = vectors_ND.float(), codebook_KD.float(), offsets_K.float()
        codes_bytes, scores_bytes = WORKING_SET_BYTES.get(vectors_ND.device.type, LARGE_WORKING_SET_BYTES)
        codes = min(len(codebook_KD), max(GROUP, codes_bytes // (4 * codebook_KD.shape[1]) // GROUP * GROUP))
        rows = min(len(vectors_ND), max(16, scores_bytes // (4 * codes)))
        scores = torch.empty(rows * codes, device=vectors_ND.device)
        ids_N = torch.empty(len(vectors_ND), dtype=torch.int64, device=vectors_ND.device)
        for start in range(0, len(vectors_ND), max(1, rows)):
            piece_nD = vectors_ND[start:start + rows]
            best_n, ids_n = None, None
            for first in range(0, len(codebook_KD), codes):
                codes_kD = codebook_KD[first:first + codes]
                scores_nk = scores[:len(piece_nD) * len(codes_kD)].view(len(piece_nD), -1)
                torch.addmm(offsets_K[first:first + codes], piece_nD, codes_kD.T, alpha=-1, out=scores_nk)
                lowest_n, at_n = lowest(scores_nk)
                if best_n is None:
                    best_n, ids_n = lowest_n, at_n
                else:
                    ids_n = torch.where(lowest_n < best_n, at_n + first, ids_n)
                    best_n = torch.minimum(lowest_n, best_n)
            ids_N[start:start + rows] = ids_n
    return ids_N


def lowest(scores_nk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and index of the smallest entry of each row: of groups first, which processors do many at a time, then inside the best group."""
    if scores_nk.shape[1] % GROUP:
        return scores_nk.min(1)
    groups_ngG = scores_nk.view(len(scores_nk), -1, GROUP)
    lowest_n, group_n = groups_ngG.amin(2).min(1)
    rows_n = torch.arange(0, groups_ngG.shape[0] * groups_ngG.shape[1], groups_ngG.shape[1], device=scores_nk.device)
    inside_n = scores_nk.view(-1, GROUP).index_select(0, rows_n.add_(group_n)).argmin(1)
    return lowest_n, inside_n.add_(group_n, alpha=GROUP)


def random_codebook(codebook_size: int, code_dim: int, seed: int) -> torch.Tensor:
    """A seeded codebook (K, D) of vectors whose expected length is 1."""
    rng = torch.Generator().manual_seed(derive_seed(seed, "codebook"))
    return torch.randn(codebook_size, code_dim, generator=rng) * code_dim**-0.5


@torch.no_grad()
def kmeans(vectors_ND: torch.Tensor, codebook_size: int, seed: int, iterations: int = 10) -> torch.Tensor:
    """Codebook (K, D) by Lloyd's iterations from a seeded choice of vectors; an empty cluster takes a vector at random.

    With fewer vectors than codes, the rest of the codes are the vectors again with a little noise.
    """
    vectors_ND = vectors_ND.float()
    rng = torch.Generator().manual_seed(derive_seed(seed, "kmeans"))
    order_N = torch.randperm(len(vectors_ND), generator=rng)
    repeats = -(-codebook_size // len(vectors_ND))
    chosen_K = order_N.repeat(repeats)[:codebook_size].to(vectors_ND.device)
    codebook_KD = vectors_ND[chosen_K].clone()
    if repeats > 1:
        scale = 0.01 * vectors_ND.std().clamp_min(1e-6)
        codebook_KD += scale * torch.randn(codebook_KD.shape, generator=rng).to(codebook_KD.device)
    for _ in range(iterations):
        ids_N = nearest_codes(vectors_ND, codebook_KD)
        counts_K, sums_KD = code_sums(vectors_ND, ids_N, codebook_size)
        spare_K = torch.randint(len(vectors_ND), (codebook_size,), generator=rng).to(vectors_ND.device)
        codebook_KD = torch.where(counts_K[:, None] > 0, sums_KD / counts_K.clamp_min(1)[:, None], vectors_ND[spare_K])
    return codebook_KD


def code_sums(vectors_ND: torch.Tensor, ids_N: torch.Tensor, codebook_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each code the number of its vectors (K,) float32 and their sum (K, D) float32."""
    counts_K = torch.bincount(ids_N, minlength=codebook_size).float()
    sums_KD = torch.zeros(codebook_size, vectors_ND.shape[1], device=vectors_ND.device).index_add_(0, ids_N, vectors_ND.float())
    return counts_K, sums_KD
