"""The EMA quantizer against vector-quantize-pytorch's, forward and codebook update in training mode, in turn in one process.

    python -m benchmarks.quantizer               # two CPU threads, about two minutes
    python -m benchmarks.quantizer --record      # and into RESULTS.md

Also: the extra memory that one step takes at its peak, and whether the chosen codes are the nearest ones in float64.
"""

import subprocess
import sys
from pathlib import Path

import torch
from vector_quantize_pytorch import VectorQuantize

from benchmarks.measuring import in_turn, ratio, record
from stage1_tokenizer.quantizers import QUANTIZERS

SIZES = [(8192, 16384, 8, 5, 25.0), (8192, 16384, 256, 5, 5.5), (4096, 1024, 64, 25, 4.0)]
"""Vectors N, codes K, dimensions D, rounds, and how many times faster it has to be."""
MEMORY_MIB = 64
RELATIVE_ERROR = 1e-5


def step_of(kind: str, vectors: int, codes: int, dim: int, device: str):
    """A closure that makes one training step of a quantizer: ours ("ours") or the peer's ("peer")."""
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
    """By how much the distance to the chosen code exceeds the smallest one, in float64, at worst."""
    vectors_ND = latents_BDhw.permute(0, 2, 3, 1).reshape(-1, quantizer.code_dim)
    ids_N = quantizer.eval()(latents_BDhw).ids.flatten()
    codebook_KD, worst = quantizer.codebook.double(), 0.0
    for piece_nD, ids_n in zip(vectors_ND.double().split(512), ids_N.split(512), strict=True):
        distances_nK = torch.cdist(piece_nD, codebook_KD)
        chosen_n = distances_nK.gather(1, ids_n[:, None])[:, 0]
        worst = max(worst, float((chosen_n / distances_nK.amin(1) - 1).max()))
    return worst


def extra_memory_mib(vectors: int, codes: int, dim: int, device: str) -> float:
    """MiB that a step takes beyond what was there before it; on a CPU by the high-water mark of this process, reset before (Linux)."""
    step, _, _ = step_of("ours", vectors, codes, dim, device)
    if device == "cuda":
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    small, _, _ = step_of("ours", 64, 16, dim, device)
    small()  # the libraries' own buffers
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    step()
    return status_mib("VmHWM") - before


def status_mib(field: str) -> float:
    """A memory figure of this process in MiB, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def main() -> int:
    """Print the table; exit code 1 where a promise is broken."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(2)
    if "--memory-of" in sys.argv:
        size = map(int, sys.argv[sys.argv.index("--memory-of") + 1].split(","))
        print(extra_memory_mib(*size, device))
        return 0
    lines = ["| N | K | D | ours, ms | peer, ms | times faster | asked for | extra memory, MiB | allowed | chosen over nearest distance |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    broken = 0
    for vectors, codes, dim, rounds, wanted in SIZES:
        wanted = 3.0 if device == "cuda" else wanted
        ours, quantizer, latents_BDhw = step_of("ours", vectors, codes, dim, device)
        peer, _, _ = step_of("peer", vectors, codes, dim, device)
        seconds = in_turn({"ours": ours, "peer": peer}, rounds)
        times = ratio(seconds, "peer", "ours")
        error = largest_relative_error(quantizer, latents_BDhw)
        memory = float(subprocess.run([sys.executable, "-m", "benchmarks.quantizer", "--memory-of", f"{vectors},{codes},{dim}"],
                                      capture_output=True, text=True, check=True).stdout)
        allowed = MEMORY_MIB + 4 * (vectors + codes * dim) / 2**20
        broken += times < wanted or memory > allowed or error > RELATIVE_ERROR
        mine, other = (sorted(seconds[name])[rounds // 2] * 1000 for name in ("ours", "peer"))
        lines.append(f"| {vectors} | {codes} | {dim} | {mine:.1f} | {other:.1f} | {times:.1f} | {wanted:g} | {memory:.0f} | {allowed:.0f} | "
                     f"1 + {error:.1e} |")
    record("Quantizer: lookup and codebook update", lines, ("vector-quantize-pytorch",))
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
