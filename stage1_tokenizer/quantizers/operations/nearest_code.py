"""Nearest-code search and k-means in full float32, regardless of autocast, TF32 and matmul-precision flags.

Distances in bf16 select a wrong code for 1-5 % of vectors. The search processes chunks of vectors and codes, so the N x K matrix of distances is
never stored. On a CPU, the chunks fit in its cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vqmosaic.seeding import derive_seed

# Bytes of codes and of scores per chunk. On a CPU both fit in the cache. A GPU should prefer few large chunks (not measured).
WORKING_SET_BYTES = {"cpu": (2**20, 4 * 2**20)}
LARGE_WORKING_SET_BYTES = (16 * 2**20, 32 * 2**20)
SCORES_PER_GROUP = 64  # for row_minima


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Context manager for exact float32 matrix products and convolutions on a device: no autocast, TF32 or bf16."""
    if device.type == "cuda":
        cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
        flags = {cuda.matmul: torch.backends, cudnn.conv: cudnn}  # type: ignore[attr-defined]  # torch replaces these modules by objects
    else:
        mkldnn = torch.backends.mkldnn
        flags = {mkldnn.matmul: mkldnn, mkldnn.conv: mkldnn}  # type: ignore[attr-defined]  # as above
    # An unset flag reads as the value of its parent. Writing that value back would stop it from following the parent, so write "none".
    previous = {flag: "none" if flag.fp32_precision == parent.fp32_precision else flag.fp32_precision
              for flag, parent in flags.items() if flag.fp32_precision != "ieee"}
    try:
        for flag in previous:
            flag.fp32_precision = "ieee"
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device_type=device.type, enabled=False):
                yield
        else:  # entering an autocast context costs as much as a small operator
            yield
    finally:
        for flag, precision in previous.items():
            flag.fp32_precision = precision


@torch.no_grad()
def nearest_codes(vectors_ND: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
    """Int64 ids (N,) of the code nearest to each vector by Euclidean distance (van den Oord et al. 2017, eq. 1). The first code wins ties.

    |x - c|^2 = |x|^2 - 2 x.c + |c|^2, where the first term does not affect the order.
    """
    with full_precision(vectors_ND.device):
        return lowest_score_ids(vectors_ND, codebook_KD, codebook_KD.float().square().sum(1).mul_(0.5))


@torch.no_grad()
def lowest_score_ids(vectors_ND: torch.Tensor, codebook_KD: torch.Tensor, offsets_K: torch.Tensor) -> torch.Tensor:
    """Int64 ids (N,) of the code c with the smallest offset - x.c for each vector x. The first code wins ties."""
    with full_precision(vectors_ND.device):
        vectors_ND, codebook_KD, offsets_K = vectors_ND.float(), codebook_KD.float(), offsets_K.float()
        codes_bytes, scores_bytes = WORKING_SET_BYTES.get(vectors_ND.device.type, LARGE_WORKING_SET_BYTES)
        groups_per_chunk = max(1, codes_bytes // (4 * codebook_KD.shape[1]) // SCORES_PER_GROUP)
        codes_per_chunk = min(len(codebook_KD), groups_per_chunk * SCORES_PER_GROUP)
        vectors_per_chunk = min(len(vectors_ND), max(16, scores_bytes // (4 * codes_per_chunk)))
        scores = torch.empty(vectors_per_chunk * codes_per_chunk, device=vectors_ND.device)
        ids_N = torch.empty(len(vectors_ND), dtype=torch.int64, device=vectors_ND.device)
        for start in range(0, len(vectors_ND), max(1, vectors_per_chunk)):
            chunk_nD = vectors_ND[start:start + vectors_per_chunk]
            for first_code in range(0, len(codebook_KD), codes_per_chunk):
                codes_kD = codebook_KD[first_code:first_code + codes_per_chunk]
                scores_nk = scores[:len(chunk_nD) * len(codes_kD)].view(len(chunk_nD), -1)
                torch.addmm(offsets_K[first_code:first_code + codes_per_chunk], chunk_nD, codes_kD.T, alpha=-1, out=scores_nk)
                lowest_n, at_n = row_minima(scores_nk)
                if first_code == 0:
                    best_n, ids_n = lowest_n, at_n
                else:
                    ids_n = torch.where(lowest_n < best_n, at_n + first_code, ids_n)
                    best_n = torch.minimum(lowest_n, best_n)
            ids_N[start:start + vectors_per_chunk] = ids_n
    return ids_N


def row_minima(scores_nk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and index of the smallest entry of each row. Finds the best group of each row (a vectorized reduction), then the entry in it."""
    if scores_nk.shape[1] % SCORES_PER_GROUP:
        return scores_nk.min(1)
    groups_ngG = scores_nk.view(len(scores_nk), -1, SCORES_PER_GROUP)  # n rows of g groups of G scores
    lowest_n, group_n = groups_ngG.amin(2).min(1)
    first_group_n = torch.arange(0, groups_ngG.shape[0] * groups_ngG.shape[1], groups_ngG.shape[1], device=scores_nk.device)
    inside_n = scores_nk.view(-1, SCORES_PER_GROUP).index_select(0, first_group_n.add_(group_n)).argmin(1)
    return lowest_n, inside_n.add_(group_n, alpha=SCORES_PER_GROUP)


def random_codebook(codebook_size: int, code_dim: int, seed: int) -> torch.Tensor:
    """A random codebook (K, D) from a seed. The expected squared length of a code is 1."""
    rng = torch.Generator().manual_seed(derive_seed(seed, "codebook"))
    return torch.randn(codebook_size, code_dim, generator=rng) * code_dim**-0.5


@torch.no_grad()
def kmeans(vectors_ND: torch.Tensor, codebook_size: int, seed: int, iterations: int = 10) -> torch.Tensor:
    """Codebook (K, D) by Lloyd's algorithm, initialized with randomly chosen vectors. Empty clusters are reset to random vectors.

    With fewer vectors than codes, the vectors are repeated with a little noise.
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
    """Float32 counts (K,) and sums (K, D) of the vectors assigned to each code."""
    counts_K = torch.bincount(ids_N, minlength=codebook_size).float()
    sums_KD = torch.zeros(codebook_size, vectors_ND.shape[1], device=vectors_ND.device).index_add_(0, ids_N, vectors_ND.float())
    return counts_K, sums_KD
