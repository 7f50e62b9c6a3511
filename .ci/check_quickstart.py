"""Check a finished quickstart run against the promises of the documentation. Exits with 1 if any is broken.

    python .ci/check_quickstart.py runs/quickstart
"""

import json
import sys
from pathlib import Path
from typing import Any

PICTURES = ("samples.png", "reconstructions.png", "edited.png")


def promises(run: Path) -> dict[str, tuple[Any, bool]]:
    """Promise -> the measured value, and whether it is kept."""
    summary = json.loads((run / "summary.json").read_text())
    tokens, tokenizer, samples, edited = summary["tokens"], summary["tokenizer"], summary["generation"]["recommended"], summary.get("edited", {})
    chain_seconds = round(sum(summary["seconds_of_this_call"].values()))
    return {
        "codebook of at least 64 codes": (tokens["codebook_size"], tokens["codebook_size"] >= 64),
        "at most 400 bits an image": (tokens["bits_per_image"], tokens["bits_per_image"] <= 400),
        "at least 90 % of the codebook used": (tokenizer["codebook_usage"], tokenizer["codebook_usage"] >= 0.9),
        "PSNR of at least 20 dB": (tokenizer["psnr"], tokenizer["psnr"] >= 20),
        "500 samples": (samples["samples"], samples["samples"] >= 500),
        "at least 95 % of the class asked for": (samples["class_agreement"], samples["class_agreement"] >= 0.95),
        "fewer than 5 % copies": (samples["copies"], samples["copies"] < 0.05),
        "at least 95 % distinct": (samples["distinct"], samples["distinct"] >= 0.95),
        "spread of at least 0.7 of the real digits'": (samples["spread"], samples["spread"] >= 0.7),
        "figures without guidance beside them": (list(summary["generation"]), {"guidance off", "temperature 1"} <= set(summary["generation"])),
        "an edited example with 16 results": (edited.get("results", 0), edited.get("results", 0) == 16),
        # 5 minutes are promised for two idle cores; the machine of a check may be shared
        "the chain took at most 10 minutes": (chain_seconds, chain_seconds <= 600),
        **{f"{name} exists": (str(run / name), (run / name).exists()) for name in (*PICTURES, "pipeline/pipeline.json")},
    }


if __name__ == "__main__":
    found = promises(Path(sys.argv[1]))
    for promise, (value, kept) in found.items():
        print(f"{'kept  ' if kept else 'BROKEN'}  {promise}: {value}")
    sys.exit(0 if all(kept for _, kept in found.values()) else 1)
