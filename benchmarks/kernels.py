"""Measures what each kernel of vqmosaic/kernels gains: steps and sampling with all kernels, and with one of them replaced by its reference.

    python -m benchmarks.kernels                          # two CPU threads, about fifteen minutes
    python -m benchmarks.kernels --only prior_step        # prior_step, tokenizer_step or sampling
    python -m benchmarks.kernels --record                 # also write to RESULTS.md

The models and settings are those of benchmarks.prior_step (but with dropout 0.1), benchmarks.tokenizer_step and benchmarks.sampling. The variants
alternate in one process and train the same model, in rounds of five steps each, as in a real training. The gain is the time without the kernel,
divided by the time with it, the median over the rounds. A kernel must gain 5 % of a step or of sampling on some device, or it is deleted.
"""

import argparse
import contextlib
import functools
import statistics
import sys
from collections.abc import Callable
from unittest import mock

import torch

from benchmarks import cifar10, prior_step, sampling, tokenizer_step
from benchmarks.measuring import ratio, record, time_alternately, use_two_cpu_threads
from vqmosaic.kernels import upsampling
from vqmosaic.runs.accelerator import cpu_has_bf16

STEPS_PER_ROUND = 5
ALL = "all kernels"
Replacements = dict[str, object]
"""Names to patch -> new values, which together replace a kernel by its reference."""


def never(*_) -> bool:
    """In place of a function that says whether a kernel applies."""
    return False


COMPLEX_ROTATION: Replacements = {"vqmosaic.kernels.complex_rotation.can_rotate_as_complex": never}
PRIOR_KERNELS: dict[str, Replacements] = {
    "matmul_attention": {"stage2_prior.model.grid_attention.can_use_matmul_attention": never},
    "complex_rotation": COMPLEX_ROTATION,
    "dropout": {"vqmosaic.kernels.dropout.can_share_draws": never},
}
TOKENIZER_KERNELS: dict[str, Replacements] = {
    "group_norm": {"vqmosaic.kernels.group_norm.can_reorder": never},
    "matmul_attention": {"stage1_tokenizer.networks.can_use_matmul_attention": never},
    "upsampling": {"stage1_tokenizer.networks.upsample": upsampling.reference},
}
SAMPLING_KERNELS: dict[str, Replacements] = {
    "decoding_products": {"vqmosaic.kernels.decoding_products.can_pack": never},
    "single_query_attention": {"stage2_prior.model.grid_attention.can_use_single_query_attention": never,
                               "vqmosaic.kernels.single_query_attention.can_use_single_query_attention": never,
                               "stage2_prior.generation.decoding.CPU_CACHE_DTYPES": {}},
    "complex_rotation": COMPLEX_ROTATION,
}


def repeat(run: Callable[[], object], times: int, replacements: Replacements) -> Callable[[], None]:
    """A function that calls `run` several times, while a kernel is replaced."""
    def call() -> None:
        with contextlib.ExitStack() as stack:
            for name, value in replacements.items():
                stack.enter_context(mock.patch(name, value))
            for _ in range(times):
                run()
    return call


def measure(name: str, run: Callable[[], object], kernels: dict[str, Replacements], rounds: int, times: int) -> list[str]:
    """Print and return table rows for `run`: its time with all kernels, and the gain of each."""
    variants = {ALL: repeat(run, times, {})} | {kernel: repeat(run, times, replacements) for kernel, replacements in kernels.items()}
    seconds = time_alternately(variants, rounds, warm_up=2)
    lines = [f"| {name} | {ALL} | {statistics.median(seconds[ALL]) / times * 1000:.1f} | |"]
    lines += [f"| | without {kernel} | {statistics.median(seconds[kernel]) / times * 1000:.1f} | {ratio(seconds, kernel, ALL):.3f} |"
              for kernel in kernels]
    print("\n".join(lines), flush=True)
    return lines


def measure_prior(rounds: int) -> list[str]:
    """Table rows for a training step of the prior in bf16 and in float32."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(prior_step.CODES, (prior_step.BATCH, prior_step.TOKENS), generator=generator)
    classes_B = torch.randint(prior_step.CLASSES, (prior_step.BATCH,), generator=generator)
    lines = []
    for precision in ("bf16", "no") if cpu_has_bf16() else ("no",):
        contestant = prior_step.Ours("grid_transformer", "adamw", precision, dropout=0.1)
        lines += measure(f"prior, {'bf16' if precision == 'bf16' else 'float32'}", functools.partial(contestant.step, ids_BT, classes_B),
                         PRIOR_KERNELS, rounds, STEPS_PER_ROUND)
    return lines


def measure_tokenizer(rounds: int) -> list[str]:
    """Table rows for a training step of the tokenizer in bf16 and in float32."""
    images_NCHW = cifar10.to_float(cifar10.load("train", 256)[0])
    lines = []
    for precision in ("bf16", "no") if cpu_has_bf16() else ("no",):
        contestant = tokenizer_step.Ours(precision, True, images_NCHW)
        lines += measure(f"tokenizer, {'bf16' if precision == 'bf16' else 'float32'}",
                         functools.partial(contestant.step, images_NCHW[:tokenizer_step.BATCH]), TOKENIZER_KERNELS, rounds, STEPS_PER_ROUND)
    return lines


def measure_sampling(rounds: int) -> list[str]:
    """Table rows for sampling with guidance."""
    lines = []
    for name, preset in sampling.PRESETS.items():
        for architecture in ("grid_transformer", "llama"):
            for dtype in (torch.float32, torch.bfloat16) if cpu_has_bf16() else (torch.float32,):
                call = sampling.our_sampling(sampling.make_prior(preset, architecture).to(dtype), preset.batch)
                lines += measure(f"sampling {name}, {architecture}, {'bf16' if dtype == torch.bfloat16 else 'float32'}", call, SAMPLING_KERNELS,
                                 max(3, rounds // 3), 1)
    return lines


BENCHMARKS = {"prior_step": measure_prior, "tokenizer_step": measure_tokenizer, "sampling": measure_sampling}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=BENCHMARKS, help="one benchmark")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--record", action="store_true", help="write the result to RESULTS.md")
    options = parser.parse_args()
    use_two_cpu_threads()
    lines = ["| | | ms | gain |", "|---|---|---|---|"]
    for name, measure_benchmark in BENCHMARKS.items():
        if options.only in (None, name):
            lines += measure_benchmark(options.rounds)
    record("Kernels", lines, ("transformers", "accelerate"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
