"""How much of each codebook is in use: counts on validation images, metrics, and the warning for a codebook that is hardly used."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from stage1_tokenizer.quantizers import Quantizer, QuantizerOutput
from stage1_tokenizer.trainable.trainable_tokenizer import TrainableTokenizer


class CodeCounts:
    """Counts the uses of each code. With several ids per position, the codes are counted separately for each."""

    def __init__(self, quantizers: Mapping[str, Quantizer], device: torch.device):
        self.depths = {name: quantizer.depth for name, quantizer in quantizers.items() if quantizer.has_ids}
        self.counts = {name: torch.zeros(quantizers[name].codebook_size * depth, device=device) for name, depth in self.depths.items()}

    def add(self, levels: Mapping[str, QuantizerOutput]) -> None:
        """Count the ids of one batch."""
        for name, counts_K in self.counts.items():
            ids, depth = levels[name].ids, self.depths[name]
            assert ids is not None  # only quantizers with ids are counted
            offsets = len(counts_K) // depth * torch.arange(depth, device=counts_K.device)
            counts_K += torch.bincount(((ids if depth > 1 else ids[..., None]) + offsets).flatten(), minlength=len(counts_K))

    def reduce(self, accelerator) -> None:
        """Sum the counts over all processes."""
        self.counts = {name: accelerator.reduce(counts_K, "sum") for name, counts_K in self.counts.items()}

    def metrics(self) -> dict[str, float]:
        """codebook_usage and perplexity of all grids together; if there are several, also codebook_usage_<grid> and perplexity_<grid>.

        For several grids, codebook_usage is the share of all their codes, and perplexity is exp of the mean entropy per id. Empty without ids.
        """
        by_grid = {name: codebook_metrics(counts_K, self.depths[name]) for name, counts_K in self.counts.items()}
        if len(by_grid) < 2:
            return next(iter(by_grid.values()), {})
        ids = {name: float(counts_K.sum()) for name, counts_K in self.counts.items()}
        entropy = sum(ids[name] * math.log(metrics["perplexity"]) for name, metrics in by_grid.items()) / max(1.0, sum(ids.values()))
        together = {"codebook_usage": float((torch.cat([*self.counts.values()]) > 0).double().mean()), "perplexity": math.exp(entropy)}
        return together | {f"{metric}_{name}": value for name, metrics in by_grid.items() for metric, value in metrics.items()}


def codebook_metrics(counts_K: torch.Tensor, levels: int = 1) -> dict[str, float]:
    """codebook_usage and perplexity from code counts (levels * K,)."""
    shares_K = counts_K.double() / counts_K.sum().clamp_min(1)
    entropy = -(shares_K * shares_K.clamp_min(1e-12).log()).sum()
    return {"codebook_usage": float((counts_K > 0).double().mean()), "perplexity": math.exp(float(entropy)) / levels}


def metric_suffixes(tokenizer: TrainableTokenizer) -> dict[str, str]:
    """For each grid with ids, the end of the names of its metrics: "_top" and "_bottom", or nothing if there is only one codebook."""
    names = [name for name, quantizer in tokenizer.quantizers.items() if quantizer.has_ids]
    return {name: f"_{name}" if len(names) > 1 else "" for name in names}


def describe_usage(metrics: Mapping[str, Any], tokenizer: TrainableTokenizer) -> str:
    """Text about codebook usage and perplexity in validation metrics, for a line of the log. Empty without ids."""
    return "".join(f", {metrics[f'codebook_usage{suffix}']:.1%} of the {f'{name} ' if suffix else ''}codebook used, "
                   f"perplexity {metrics[f'perplexity{suffix}']:.0f}" for name, suffix in metric_suffixes(tokenizer).items())


def low_codebook_usage_warnings(metrics: Mapping[str, Any], tokenizer: TrainableTokenizer, alarm: float) -> dict[str, str]:
    """Warnings by grid name, for each codebook of which the validation with these metrics used few of the codes that its images could use.

    Args:
        alarm: the fraction of the possible codes below which there is a warning (tokenizer_training.usage_alarm).
    """
    warnings = {}
    for name, suffix in metric_suffixes(tokenizer).items():
        level, (height, width) = tokenizer.config.levels[name], tokenizer.level_sides[name]
        possible = 1 - math.exp(-metrics["images"] * height * width / level.codebook_size)  # expected share of codes hit if all are equally likely
        usage, section = metrics.get(f"codebook_usage{suffix}", 1.0), level.SECTION
        if usage >= alarm * possible:
            continue
        remedies = {"fsq": "", "gumbel": f"a higher {section}.entropy_weight, ", "lfq": f"a higher {section}.entropy_weight, ",
                    "ibq": f"a lower {section}.entropy_weight, a higher {section}.revival_threshold, "}
        others = f"a smaller {section}.code_dim, {section}.l2_normalize true, a higher {section}.revival_threshold, "
        warnings[name] = (f"warning: only {usage:.1%} of the {f'{name} ' if suffix else ''}codebook is in use at step {metrics['step']:,}. "
                          f"Remedies: a smaller {section}.codebook_size, {remedies.get(level.quantizer, others)}longer training, more data.")
    return warnings
