"""Sampling with guidance against transformers' `generate` and LlamaGen's own model and `generate`, in turn in one process.

    git clone https://github.com/FoundationVision/LlamaGen /tmp/LlamaGen
    python -m benchmarks.sampling --llamagen /tmp/LlamaGen             # two CPU threads, about ten minutes
    python -m benchmarks.sampling --presets tiny --rounds 3            # a minute
    python -m benchmarks.sampling --gpu                                # on a GPU: batches 1, 8, 64, 256 with presets B and XL, ours alone

Random weights of equal sizes (LlamaGen rounds its feed-forward width up to a multiple of 256), guidance scale 2, temperature 1, no top-k and no
top-p. LlamaGen's code is unchanged. It runs in evaluation mode, with caches in the number format of the weights. The cold time is what our sampler
needs before its first token, to join and pack the weights. It is part of the time of each call. Nothing is compiled. The first call is the first of
its kind in this process.
"""

import argparse
import functools
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers

from benchmarks.measuring import in_turn, ratio, record, use_two_cpu_threads
from stage2_prior.generation import sampling as sampling_module
from stage2_prior.generation.decoding import StockDecoder, make_decoder
from stage2_prior.generation.logit_differences import largest_logit_difference
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from token_shards.manifest import Grid
from vqmosaic.recipes.recipe_sections import PriorConfig, SamplingConfig
from vqmosaic.runs.accelerator import cpu_has_bf16

CLASSES, GUIDANCE = 10, 2.0
LLAMAGEN, TRANSFORMERS, LOOP, OURS = "LlamaGen, generate", "transformers, generate", "transformers' model in our loop", "ours, llama"


class Preset(NamedTuple):
    """One size, and how many times faster than LlamaGen it is asked to be."""

    layers: int
    width: int
    heads: int
    codes: int
    side: int
    batch: int
    wanted: float
    wanted_bf16: float


PRESETS = {"tiny": Preset(6, 256, 4, 1024, 8, 64, 2.0, 3.0), "B": Preset(12, 768, 12, 1024, 16, 4, 1.8, 3.5)}
GPU_PRESETS = {"B": Preset(12, 768, 12, 16384, 16, 1, 0, 0), "XL": Preset(36, 1280, 20, 16384, 16, 1, 0, 0)}
BANDWIDTH_SHARE = 0.5
"""Share of the limit by memory, weights being read once for each token, that XL with batch 1 has to reach."""


def make_prior(preset: Preset, architecture: str) -> TokenPrior:
    """A prior of random weights, with logits that differ enough to be worth sampling."""
    vocabulary = Vocabulary(grids=[Grid(name="image", codebook_size=preset.codes, height=preset.side, width=preset.side)],
                            class_names=[str(number) for number in range(CLASSES)], token_fingerprint="f" * 64, label_drop=0.1)
    config = PriorConfig(architecture=architecture, width=preset.width, layers=preset.layers, heads=preset.heads, dropout=0.0)
    prior = TokenPrior.from_config(config, vocabulary, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in prior.parameters():
            if weight.ndim == 2 and not weight.any():  # matrices that start as nothing
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
    return prior


def ours(prior: TokenPrior, batch: int) -> Callable[[], torch.Tensor]:
    """A call of TokenPrior.sample."""
    classes, seeds = [number % CLASSES for number in range(batch)], list(range(batch))
    return lambda: prior.sample(classes, SamplingConfig(guidance_scale=GUIDANCE), seeds)


def bare_loop(prior: TokenPrior, batch: int) -> Callable[[], torch.Tensor]:
    """The same call with the steps through transformers' model and its cache, as for an architecture that is not known."""
    def run() -> torch.Tensor:
        sampling_module.make_decoder = lambda model, codes, rows, length, compile: StockDecoder(model, rows)
        try:
            return ours(prior, batch)()
        finally:
            sampling_module.make_decoder = make_decoder
    return run


def transformers_generate(prior: TokenPrior, batch: int) -> Callable[[], torch.Tensor]:
    """transformers' `generate` with its own guidance, which goes through the model once more for the null class."""
    transformers.utils.logging.set_verbosity_error()
    vocabulary = prior.vocabulary
    ids_B1 = torch.tensor([[vocabulary.class_id(number % CLASSES)] for number in range(batch)])
    null_B1 = torch.full_like(ids_B1, vocabulary.null_id)
    return lambda: prior.model.generate(ids_B1, guidance_scale=GUIDANCE, negative_prompt_ids=null_B1)


def llamagen_generate(path: str, preset: Preset) -> Callable[[], torch.Tensor]:
    """LlamaGen's `generate` on its own model, from a checkout of its repository."""
    sys.path.insert(0, path)
    try:
        from autoregressive.models import generate, gpt
    finally:
        sys.path.remove(path)
    torch.manual_seed(0)
    model = gpt.Transformer(gpt.ModelArgs(dim=preset.width, n_layer=preset.layers, n_head=preset.heads, vocab_size=preset.codes,
                                          block_size=preset.side**2, num_classes=CLASSES)).eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)  # it starts at zero
    classes_B = torch.arange(preset.batch) % CLASSES

    def run() -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how it asks for its kind of attention
            return generate.generate(model, classes_B, preset.side**2, cfg_scale=GUIDANCE, temperature=1.0, top_k=0, top_p=1.0)
    return run


def cold_seconds(prior: TokenPrior, rows: int) -> float:
    """Seconds that a decoder takes to be made, the smallest of three."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.inference_mode():
            make_decoder(prior.model, prior.vocabulary.num_codes, rows, prior.vocabulary.num_tokens)
        times.append(time.perf_counter() - started)
    return min(times)


def measure(preset: Preset, rounds: int, llamagen: str | None) -> tuple[list[str], bool]:
    """The lines for a preset, and whether what was asked for was kept."""
    has_bf16 = cpu_has_bf16()
    priors = {OURS: make_prior(preset, "llama"), "ours, grid_transformer": make_prior(preset, "grid_transformer")}
    reference = dict(priors)
    if has_bf16:
        for kind in list(priors):
            priors[f"{kind}, bf16"] = make_prior(preset, kind.rpartition(" ")[2]).to(torch.bfloat16)
    contestants = {LLAMAGEN: llamagen_generate(llamagen, preset)} if llamagen else {}
    contestants |= {TRANSFORMERS: transformers_generate(priors[OURS], preset.batch), LOOP: bare_loop(priors[OURS], preset.batch)}
    contestants |= {kind: ours(prior, preset.batch) for kind, prior in priors.items()}
    first = {kind: seconds_of(contestants[kind]) for kind in priors}
    seconds = in_turn(contestants, rounds)

    classes = [number % CLASSES for number in range(preset.batch)]
    ids_BT = priors[OURS].sample(classes, SamplingConfig(), list(range(preset.batch)))
    differences = {kind: largest_logit_difference(prior, reference[kind.removesuffix(", bf16")], ids_BT, classes)
                   for kind, prior in priors.items()}
    million = priors[OURS].num_parameters / 1e6
    lines = [f"{preset.layers} layers, {preset.width} wide, {preset.heads} heads ({million:.0f}M), {preset.codes} codes, "
             f"{preset.side**2} tokens, batch {preset.batch}, {rounds} rounds.", "",
             "| | seconds | times LlamaGen | times transformers | first call, s | of each call cold, s | largest logit difference |",
             "|---|---|---|---|---|---|---|"]
    for kind, times in seconds.items():
        own = kind in priors
        cold = f"{cold_seconds(priors[kind], 2 * preset.batch):.3f}" if own else ""
        peer = f"{ratio(seconds, LLAMAGEN, kind):.2f}" if llamagen else ""
        lines.append(f"| {kind} | {statistics.median(times):.2f} | {peer} | {ratio(seconds, TRANSFORMERS, kind):.2f} | "
                     f"{f'{first[kind]:.2f}' if own else ''} | {cold} | "
                     f"{f'{differences[kind]:.1e}' if own else ''} |")
    checks = [(f"{kind}: logits within 1e-4 of the plain forward pass in float32: {differences[kind]:.1e}", differences[kind] <= 1e-4)
              for kind in reference]
    if llamagen:
        for kind in reference:
            formats = [("float32", kind, preset.wanted)] + ([("bf16", f"{kind}, bf16", preset.wanted_bf16)] if has_bf16 else [])
            for name, contestant, wanted in formats:
                factor = ratio(seconds, LLAMAGEN, contestant)
                checks.append((f"{kind}: {wanted} times LlamaGen in {name}: {factor:.2f}", factor >= wanted))
    lines += ["", *(f"- {'kept' if kept else 'NOT kept'}: {words}" for words, kept in checks)]
    if not llamagen:
        lines.append("- not checked: the ratios to LlamaGen, because --llamagen is not given")
    if not has_bf16:
        lines.append(f"- not checked: {preset.wanted_bf16} times LlamaGen in bf16, since this processor has no bf16 products")
    return lines, all(kept for _, kept in checks)


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of one call, on a GPU to its end."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def memory_bandwidth(device: str) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes, the best of ten."""
    source = torch.zeros(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(seconds_of(lambda: target.copy_(source)) for _ in range(10))


def measure_gpu(rounds: int, device: str = "cuda") -> tuple[list[str], bool]:
    """Lines on our own sampling in bf16 on a GPU, with and without a recorded graph, and whether what was asked for was kept."""
    bandwidth = memory_bandwidth(device)
    lines = [f"A copy moves {bandwidth / 1e9:,.0f} GB/s.", "",
             "| | batch | seconds | with compile=True, s | its first call, s | images/s | time of reading the weights, of the faster one |",
             "|---|---|---|---|---|---|---|"]
    shares = {}
    for name, preset in GPU_PRESETS.items():
        prior = make_prior(preset, "llama").to(device, torch.bfloat16)
        read = sum(weight.numel() * weight.element_size() for weight in prior.parameters()) - prior.model.get_input_embeddings().weight.nbytes
        for batch in (1, 8, 64, 256):
            classes, seeds = [number % CLASSES for number in range(batch)], list(range(batch))
            sampling = SamplingConfig(guidance_scale=GUIDANCE)
            calls = {"plain": functools.partial(prior.sample, classes, sampling, seeds),
                     "graph": functools.partial(prior.sample, classes, sampling, seeds, compile=True)}
            first = seconds_of(calls["graph"])
            seconds = in_turn(calls, rounds)
            plain, graph = (statistics.median(times) for times in seconds.values())
            shares[name, batch] = preset.side**2 * read / bandwidth / min(plain, graph)
            lines.append(f"| {name}, {prior.num_parameters / 1e6:.0f}M | {batch} | {plain:.2f} | {graph:.2f} | {first:.2f} | "
                         f"{batch / min(plain, graph):.1f} | {shares[name, batch]:.0%} |")
    kept = shares["XL", 1] >= BANDWIDTH_SHARE
    lines += ["", f"- {'kept' if kept else 'NOT kept'}: XL, batch 1, at least {BANDWIDTH_SHARE:.0%} of the limit by memory: {shares['XL', 1]:.0%}"]
    return lines, kept


def main() -> int:
    """Print the tables; exit code 1 where a promise that binds here is broken."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--llamagen", metavar="PATH", help="a checkout of github.com/FoundationVision/LlamaGen")
    parser.add_argument("--presets", default="tiny,B", help="with commas between")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--record", action="store_true", help="put the result into RESULTS.md")
    options = parser.parse_args()
    if options.gpu:
        lines, kept = measure_gpu(options.rounds)
        record("Sampling on a GPU", lines, ("transformers",))
        return int(not kept)
    use_two_cpu_threads()
    all_kept = True
    for name in options.presets.split(","):
        lines, kept = measure(PRESETS[name], options.rounds, options.llamagen)
        record(f"Sampling with guidance, preset {name}", lines, ("transformers",))
        all_kept = all_kept and kept
    return int(not all_kept)


if __name__ == "__main__":
    sys.exit(main())
