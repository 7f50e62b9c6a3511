"""Compares the speed of our sampling with guidance to that of transformers' and LlamaGen's `generate`, alternating in one process.

    git clone https://github.com/FoundationVision/LlamaGen /tmp/LlamaGen
    python -m benchmarks.sampling --llamagen /tmp/LlamaGen             # two CPU threads, about ten minutes
    python -m benchmarks.sampling --presets tiny --rounds 3            # one minute
    python -m benchmarks.sampling --gpu                                # on a GPU: presets B and XL, batches 1, 8, 64, 256, only ours

The models have random weights and the same size (LlamaGen rounds its feed-forward width up to a multiple of 256). The settings are guidance scale 2,
temperature 1, no top-k and no top-p. LlamaGen's code is unchanged. It runs in evaluation mode, with caches in the dtype of the weights. Without
--gpu, nothing is compiled. In the table, "first call" is the first call of a contestant in this process, and "cold" is the part of each call in which
our sampler joins and packs the weights before its first token.
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

from benchmarks.measuring import ratio, record, time_alternately, use_two_cpu_threads
from stage2_prior.generation import sampling as sampling_module
from stage2_prior.generation.decoding import ReferenceDecoder, make_decoder
from stage2_prior.generation.logit_differences import largest_logit_difference
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from token_shards.manifest import Grid
from vqmosaic.recipes.recipe_sections import PriorConfig, SamplingConfig
from vqmosaic.runs.accelerator import cpu_has_bf16

CLASSES, GUIDANCE = 10, 2.0
LLAMAGEN, TRANSFORMERS, LOOP, OURS = "LlamaGen, generate", "transformers, generate", "transformers' model in our loop", "ours, llama"


class Preset(NamedTuple):
    """A model size, and the required speed-ups over LlamaGen in float32 and bf16."""

    layers: int
    width: int
    heads: int
    codes: int
    side: int
    batch: int
    speedup: float
    speedup_bf16: float


PRESETS = {"tiny": Preset(6, 256, 4, 1024, 8, 64, 2.0, 3.0), "B": Preset(12, 768, 12, 1024, 16, 4, 1.8, 3.5)}
GPU_PRESETS = {"B": Preset(12, 768, 12, 16384, 16, 1, 0, 0), "XL": Preset(36, 1280, 20, 16384, 16, 1, 0, 0)}
MIN_BANDWIDTH_SHARE = 0.5
"""Required fraction of the memory-bound speed of XL with batch 1, if the weights are read once per token."""


def make_prior(preset: Preset, architecture: str, any_order: bool = False) -> TokenPrior:
    """A prior with random weights whose logits are not all equal."""
    vocabulary = Vocabulary(grids=[Grid(name="image", codebook_size=preset.codes, height=preset.side, width=preset.side)],
                            class_names=[str(number) for number in range(CLASSES)], token_fingerprint="f" * 64, label_drop=0.1)
    config = PriorConfig(architecture=architecture, width=preset.width, layers=preset.layers, heads=preset.heads, dropout=0.0)
    prior = TokenPrior.from_config(config, vocabulary, 0, any_order).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in prior.parameters():
            if weight.ndim == 2 and not weight.any():  # matrices that are initialized to zero
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
    return prior


def our_sampling(prior: TokenPrior, batch: int) -> Callable[[], torch.Tensor]:
    """A function that calls TokenPrior.sample."""
    classes, seeds = [number % CLASSES for number in range(batch)], list(range(batch))
    return lambda: prior.sample(classes, SamplingConfig(guidance_scale=GUIDANCE), seeds)


def our_loop(prior: TokenPrior, batch: int) -> Callable[[], torch.Tensor]:
    """A function that calls TokenPrior.sample with transformers' model and cache, as for architectures without a decoder of their own."""
    def run() -> torch.Tensor:
        sampling_module.make_decoder = lambda model, codes, rows, length, compile: ReferenceDecoder(model, rows)
        try:
            return our_sampling(prior, batch)()
        finally:
            sampling_module.make_decoder = make_decoder
    return run


def transformers_generate(prior: TokenPrior, batch: int) -> Callable[[], torch.Tensor]:
    """A function that calls transformers' `generate` with its own guidance, which needs a second forward pass for the null class."""
    transformers.utils.logging.set_verbosity_error()
    vocabulary = prior.vocabulary
    ids_B1 = torch.tensor([[vocabulary.class_id(number % CLASSES)] for number in range(batch)])
    null_B1 = torch.full_like(ids_B1, vocabulary.null_id)
    return lambda: prior.model.generate(ids_B1, guidance_scale=GUIDANCE, negative_prompt_ids=null_B1)


def llamagen_generate(path: str, preset: Preset) -> Callable[[], torch.Tensor]:
    """A function that calls LlamaGen's `generate` on LlamaGen's model, from a checkout of its repository."""
    sys.path.insert(0, path)
    try:
        from autoregressive.models import generate, gpt
    finally:
        sys.path.remove(path)
    torch.manual_seed(0)
    model = gpt.Transformer(gpt.ModelArgs(dim=preset.width, n_layer=preset.layers, n_head=preset.heads, vocab_size=preset.codes,
                                          block_size=preset.side**2, num_classes=CLASSES)).eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)  # initialized to zero
    classes_B = torch.arange(preset.batch) % CLASSES

    def run() -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how it selects its attention kernel
            return generate.generate(model, classes_B, preset.side**2, cfg_scale=GUIDANCE, temperature=1.0, top_k=0, top_p=1.0)
    return run


def cold_seconds(prior: TokenPrior, rows: int) -> float:
    """Seconds to construct a decoder, the minimum of three runs."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.inference_mode():
            make_decoder(prior.model, prior.vocabulary.num_codes, rows, prior.vocabulary.num_tokens)
        times.append(time.perf_counter() - started)
    return min(times)


def measure(preset: Preset, rounds: int, llamagen: str | None) -> tuple[list[str], bool]:
    """The lines of the result for a preset, and whether all targets are met."""
    has_bf16 = cpu_has_bf16()
    architectures = {OURS: "llama", "ours, grid_transformer": "grid_transformer"}
    priors = {kind: make_prior(preset, architecture) for kind, architecture in architectures.items()}
    reference = dict(priors)
    if has_bf16:
        for kind, architecture in architectures.items():
            priors[f"{kind}, bf16"] = make_prior(preset, architecture).to(torch.bfloat16)
    contestants = {LLAMAGEN: llamagen_generate(llamagen, preset)} if llamagen else {}
    contestants |= {TRANSFORMERS: transformers_generate(priors[OURS], preset.batch), LOOP: our_loop(priors[OURS], preset.batch)}
    contestants |= {kind: our_sampling(prior, preset.batch) for kind, prior in priors.items()}
    first = {kind: time_call(contestants[kind]) for kind in priors}
    seconds = time_alternately(contestants, rounds)

    classes = [number % CLASSES for number in range(preset.batch)]
    ids_BT = priors[OURS].sample(classes, SamplingConfig(), list(range(preset.batch)))
    differences = {kind: largest_logit_difference(prior, reference[kind.removesuffix(", bf16")], ids_BT, classes)
                   for kind, prior in priors.items()}
    millions = priors[OURS].num_parameters / 1e6
    lines = [f"{preset.layers} layers, {preset.width} wide, {preset.heads} heads ({millions:.0f}M), {preset.codes} codes, "
             f"{preset.side**2} tokens, batch {preset.batch}, {rounds} rounds.", "",
             "| | seconds | times LlamaGen | times transformers | first call, s | of each call cold, s | largest logit difference |",
             "|---|---|---|---|---|---|---|"]
    for kind, times in seconds.items():
        is_ours = kind in priors
        cold = f"{cold_seconds(priors[kind], 2 * preset.batch):.3f}" if is_ours else ""
        peer = f"{ratio(seconds, LLAMAGEN, kind):.2f}" if llamagen else ""
        lines.append(f"| {kind} | {statistics.median(times):.2f} | {peer} | {ratio(seconds, TRANSFORMERS, kind):.2f} | "
                     f"{f'{first[kind]:.2f}' if is_ours else ''} | {cold} | "
                     f"{f'{differences[kind]:.1e}' if is_ours else ''} |")
    checks = [(f"{kind}: logits within 1e-4 of the plain forward pass in float32: {differences[kind]:.1e}", differences[kind] <= 1e-4)
              for kind in reference]
    if llamagen:
        for kind in reference:
            dtypes = [("float32", kind, preset.speedup)] + ([("bf16", f"{kind}, bf16", preset.speedup_bf16)] if has_bf16 else [])
            for dtype, contestant, required in dtypes:
                factor = ratio(seconds, LLAMAGEN, contestant)
                checks.append((f"{kind}: {required} times LlamaGen in {dtype}: {factor:.2f}", factor >= required))
    lines += ["", *(f"- {'kept' if kept else 'NOT kept'}: {words}" for words, kept in checks)]
    if not llamagen:
        lines.append("- not checked: the ratios to LlamaGen, because --llamagen is not given")
    if not has_bf16:
        lines.append(f"- not checked: {preset.speedup_bf16} times LlamaGen in bf16, since this processor has no bf16 instructions")
    return lines, all(kept for _, kept in checks)


def time_call(call: Callable[[], object]) -> float:
    """Seconds of one call. On a GPU, waits until the device has finished."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def memory_bandwidth(device: str) -> float:
    """Bytes per second read and written by a copy of 1 GiB, the best of ten runs."""
    source = torch.zeros(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(time_call(lambda: target.copy_(source)) for _ in range(10))


def measure_gpu(rounds: int, device: str = "cuda") -> tuple[list[str], bool]:
    """The lines of the result for our sampling in bf16 on a GPU, with and without a CUDA graph, and whether the target is met."""
    bandwidth = memory_bandwidth(device)
    lines = [f"A copy moves {bandwidth / 1e9:,.0f} GB/s.", "",
             "| | batch | seconds | with compile=True, s | its first call, s | images/s | reading the weights, share of the faster time |",
             "|---|---|---|---|---|---|---|"]
    shares = {}
    for name, preset in GPU_PRESETS.items():
        prior = make_prior(preset, "llama").to(device, torch.bfloat16)
        bytes_read = sum(weight.numel() * weight.element_size() for weight in prior.parameters()) - prior.model.get_input_embeddings().weight.nbytes
        for batch in (1, 8, 64, 256):
            classes, seeds = [number % CLASSES for number in range(batch)], list(range(batch))
            sampling = SamplingConfig(guidance_scale=GUIDANCE)
            calls = {"plain": functools.partial(prior.sample, classes, sampling, seeds),
                     "graph": functools.partial(prior.sample, classes, sampling, seeds, compile=True)}
            first = time_call(calls["graph"])
            seconds = time_alternately(calls, rounds)
            plain, graph = (statistics.median(times) for times in seconds.values())
            shares[name, batch] = preset.side**2 * bytes_read / bandwidth / min(plain, graph)
            lines.append(f"| {name}, {prior.num_parameters / 1e6:.0f}M | {batch} | {plain:.2f} | {graph:.2f} | {first:.2f} | "
                         f"{batch / min(plain, graph):.1f} | {shares[name, batch]:.0%} |")
    kept = shares["XL", 1] >= MIN_BANDWIDTH_SHARE
    lines += ["", f"- {'kept' if kept else 'NOT kept'}: XL, batch 1, at least {MIN_BANDWIDTH_SHARE:.0%} of the limit by memory: "
                  f"{shares['XL', 1]:.0%}"]
    return lines, kept


def main() -> int:
    """Print the tables. Returns exit code 1 if a target that applies to this machine is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--llamagen", metavar="PATH", help="a checkout of github.com/FoundationVision/LlamaGen")
    parser.add_argument("--presets", default="tiny,B", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--record", action="store_true", help="write the result to RESULTS.md")
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
