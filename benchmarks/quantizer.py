"""Compares the EMA quantizer with that of vector-quantize-pytorch: forward and codebook update in training mode, alternating in one process.

    python -m benchmarks.quantizer               # two CPU threads, about two minutes
    python -m benchmarks.quantizer --record      # also write to RESULTS.md

Also measures the peak extra memory of one step, and checks that the selected codes are the nearest ones in float64.
"""

import subprocess
import sys
from pathlib import Path

import torch
from vector_quantize_pytorch import VectorQuantize

from benchmarks.measuring import ratio, record, time_alternately
from stage1_tokenizer.quantizers import QUANTIZERS

SIZES = [(8192, 16384, 8, 5, 25.0), (8192, 16384, 256, 5, 5.5), (4096, 1024, 64, 25, 4.0)]
"""Vectors N, codes K, dimensions D, rounds, and the required speed-up on a CPU."""
GPU_SPEEDUP = 3.0
"""Required speed-up on a GPU, for all sizes."""
MAX_EXTRA_MEMORY_MIB = 64
"""Allowed extra memory, besides four bytes for each vector and for each value of the codebook."""
MAX_RELATIVE_ERROR = 1e-5


def make_step(kind: str, vectors: int, codes: int, dim: int, device: str):
    """Make a quantizer, ours ("ours") or the peer's ("peer"). Returns a function that runs one training step, the quantizer, and the latents."""
    generator = torch.Generator().manual_seed(0)
    latents_BDhw = torch.randn(vectors // 64, dim, 8, 8, generator=generator).to(device)
    if kind == "ours":
        quantizer = QUANTIZERS["ema"](codes, dim).to(device).train()
        quantizer.codebook.copy_(torch.randn(codes, dim, generator=generator))

        def step():
            quantizer(latents_BDhw)
            quantizer.commit()
        return step, quantizer, latents_BDhw
    peer = VectorQuantize(dim=dim, codebook_size=codes, decay=0.99, accept_image_fmap=True).to(device).train()
    return (lambda: peer(latents_BDhw)), peer, latents_BDhw


def largest_relative_error(quantizer, latents_BDhw: torch.Tensor) -> float:
    """The largest relative difference between the distance to the selected code and the smallest distance, in float64."""
    vectors_ND = latents_BDhw.permute(0, 2, 3, 1).reshape(-1, quantizer.code_dim)
    ids_N = quantizer.eval()(latents_BDhw).ids.flatten()
    codebook_KD, worst = quantizer.codebook.double(), 0.0
    for piece_nD, ids_n in zip(vectors_ND.double().split(512), ids_N.split(512), strict=True):
        distances_nK = torch.cdist(piece_nD, codebook_KD)
        chosen_n = distances_nK.gather(1, ids_n[:, None])[:, 0]
        worst = max(worst, float((chosen_n / distances_nK.amin(1) - 1).max()))
    return worst


def extra_memory_mib(vectors: int, codes: int, dim: int, device: str) -> float:
    """Peak memory of a step in MiB beyond the memory before it. On a CPU, measured as the peak memory of this process, reset before (Linux)."""
    step, _, _ = make_step("ours", vectors, codes, dim, device)
    if device == "cuda":
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    warm_up, _, _ = make_step("ours", 64, 16, dim, device)
    warm_up()  # allocates the buffers of the libraries
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status_mib("VmRSS")
    step()
    return status_mib("VmHWM") - before


def status_mib(field: str) -> float:
    """A memory field of /proc/self/status in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def main() -> int:
    """Print the table. Returns exit code 1 if a target is missed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(2)
    if "--memory-of" in sys.argv:
        size = map(int, sys.argv[sys.argv.index("--memory-of") + 1].split(","))
        print(extra_memory_mib(*size, device))
        return 0
    lines = ["| N | K | D | ours, ms | peer, ms | times faster | asked for | extra memory, MiB | allowed | chosen over nearest distance |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    missed = 0
    for vectors, codes, dim, rounds, required in SIZES:
        required = GPU_SPEEDUP if device == "cuda" else required
        ours, quantizer, latents_BDhw = make_step("ours", vectors, codes, dim, device)
        peer, _, _ = make_step("peer", vectors, codes, dim, device)
        seconds = time_alternately({"ours": ours, "peer": peer}, rounds)
        speedup = ratio(seconds, "peer", "ours")
        error = largest_relative_error(quantizer, latents_BDhw)
        memory = float(subprocess.run([sys.executable, "-m", "benchmarks.quantizer", "--memory-of", f"{vectors},{codes},{dim}"],
                                      capture_output=True, text=True, check=True).stdout)
        allowed = MAX_EXTRA_MEMORY_MIB + 4 * (vectors + codes * dim) / 2**20
        missed += speedup < required or memory > allowed or error > MAX_RELATIVE_ERROR
        our_ms, peer_ms = (sorted(seconds[name])[rounds // 2] * 1000 for name in ("ours", "peer"))
        lines.append(f"| {vectors} | {codes} | {dim} | {our_ms:.1f} | {peer_ms:.1f} | {speedup:.1f} | {required:g} | {memory:.0f} | {allowed:.0f} | "
                     f"1 + {error:.1e} |")
    record("Quantizer: lookup and codebook update", lines, ("vector-quantize-pytorch",))
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
