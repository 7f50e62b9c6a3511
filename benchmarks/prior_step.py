"""Compares the speed of a training step of the prior with nanoGPT's model and training loop in float32, alternating in one process.

    git clone https://github.com/karpathy/nanoGPT /tmp/nanogpt
    python -m benchmarks.prior_step --nanogpt /tmp/nanogpt               # two CPU threads, about two minutes
    python -m benchmarks.prior_step --nanogpt /tmp/nanogpt --turn 5      # rounds of five consecutive steps each
    python -m benchmarks.prior_step --nanogpt /tmp/nanogpt --record      # also write to RESULTS.md

Both models have the same size (6 layers, width 256, 4 heads: about 5M parameters), 64 tokens of 512 codes, and batch 32. The peer is nanoGPT's GPT
with its own optimizer and the steps of its train.py. Ours is vqmosaic's training step: Accelerate, rejection of non-finite steps, clipping, weight
average. With --turn 5, most steps follow a step of the same model and find the memory and caches as that step left them, as in a real training.
"""

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.measuring import ratio, record, time_alternately, use_two_cpu_threads
from benchmarks.nanogpt import load_nanogpt
from stage2_prior.losses import next_token_loss
from stage2_prior.prior import TokenPrior
from stage2_prior.prior_setup import compile_layers
from stage2_prior.vocabulary import Vocabulary
from token_shards.manifest import Grid
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.runs.accelerator import cpu_has_bf16
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.training.training_run import TrainingRun

BATCH, TOKENS, CODES, CLASSES, ROUNDS = 32, 64, 512, 10, 25
PEER = "nanoGPT, float32"


class Peer:
    """nanoGPT's model and optimizer. Inputs are the class id and all ids but the last; targets are the ids."""

    def __init__(self, checkout: Path):
        torch.manual_seed(0)
        module = load_nanogpt(checkout)
        self.model = module.GPT(module.GPTConfig(block_size=TOKENS, vocab_size=CODES + CLASSES, n_layer=6, n_head=4, n_embd=256,
                                                 dropout=0.0, bias=False))
        self.model.train()
        self.optimizer = self.model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")

    def step(self, ids_BT: torch.Tensor, classes_B: torch.Tensor) -> None:
        """One optimizer step as in nanoGPT's train.py."""
        inputs_BT = torch.cat([CODES + classes_B[:, None], ids_BT[:, :-1]], dim=1)
        _, loss = self.model(inputs_BT, ids_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Ours:
    """vqmosaic's prior and training loop, used as in stage2_prior/train.py."""

    def __init__(self, architecture: str, optimizer: str, precision: str, batch: int = BATCH, compiled: bool = False,
                 dropout: float = 0.0):
        recipe = load_recipe("cifar10", [
            f"--run_dir={tempfile.mkdtemp()}", f"--prior.architecture={architecture}", "--prior.preset=tiny", f"--prior.dropout={dropout}",
            f"--prior_training.optimizer={optimizer}", f"--prior_training.mixed_precision={precision}", f"--prior_training.batch_size={batch}"])
        vocabulary = Vocabulary(grids=[Grid("image", CODES, 8, 8)], class_names=[str(index) for index in range(CLASSES)],
                                token_fingerprint="none", label_drop=0.1)
        self.prior = TokenPrior.from_config(recipe.prior, vocabulary, seed=0)
        self.run = TrainingRun(recipe, "prior", recipe.prior_training, StopFlag())
        self.model = self.run.prepare(self.prior)
        if compiled:
            compile_layers(self.prior.model, self.run.accelerator.device)

    def step(self, ids_BT: torch.Tensor, classes_B: torch.Tensor) -> None:
        """One optimizer step."""
        self.model.train()
        with self.run.accelerator.accumulate(self.model):
            loss = next_token_loss(self.model(ids_BT, classes_B), ids_BT)
            self.run.accelerator.backward(loss)
        self.run.optimizer_step(loss.detach(), progress=0.5)


def matmul_seconds(step: Callable[[], None]) -> float:
    """Seconds per step spent in matrix products, except those inside attention. A program with the same products cannot save this time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            step()
    return sum(event.self_cpu_time_total for event in profile.key_averages() if event.key == "aten::mm") / 3 / 1e6


def main() -> int:
    """Print the table. Returns exit code 1 if a target that applies to this processor is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--turn", type=int, default=1, help="consecutive steps of each contestant in a round")
    parser.add_argument("--record", action="store_true", help="write the result to RESULTS.md")
    options = parser.parse_args()
    use_two_cpu_threads()
    ours = "ours, grid_transformer, AdamW, float32"
    contestants = {PEER: Peer(options.nanogpt), ours: Ours("grid_transformer", "adamw", "no"),
                   "ours, grid_transformer, Muon, float32": Ours("grid_transformer", "muon", "no"),
                   "ours, Llama, AdamW, float32": Ours("llama", "adamw", "no")}
    required_speedups = {ours: 1.2}
    if cpu_has_bf16():
        contestants["ours, grid_transformer, AdamW, bf16"] = Ours("grid_transformer", "adamw", "bf16")
        contestants["ours, grid_transformer, AdamW, bf16, compiled"] = Ours("grid_transformer", "adamw", "bf16", compiled=True)
        contestants["ours, grid_transformer, Muon, bf16"] = Ours("grid_transformer", "muon", "bf16")
        required_speedups["ours, grid_transformer, AdamW, bf16"] = 2.5
    generator = torch.Generator().manual_seed(0)
    ids_BT, classes_B = torch.randint(CODES, (BATCH, TOKENS), generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)

    def run_steps(contestant: Peer | Ours) -> None:
        for _ in range(options.turn):
            contestant.step(ids_BT, classes_B)

    seconds = time_alternately({name: functools.partial(run_steps, contestant) for name, contestant in contestants.items()}, ROUNDS, warm_up=3)
    seconds = {name: [duration / options.turn for duration in times] for name, times in seconds.items()}

    matmul_share = matmul_seconds(lambda: contestants[PEER].step(ids_BT, classes_B)) / statistics.median(seconds[PEER])
    sizes = {name: sum(parameter.numel() for parameter in (contestant.model if isinstance(contestant, Peer) else contestant.prior).parameters())
             for name, contestant in contestants.items()}
    lines = ["| | parameters | sequences/s | tokens/s | times the peer |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {sizes[name] / 1e6:.2f}M | {BATCH / statistics.median(times):.1f} | {BATCH * TOKENS / statistics.median(times):,.0f} | "
              f"{ratio(seconds, PEER, name):.2f} |" for name, times in seconds.items()]
    embedding_share = sum(module.weight.numel() for module in contestants[ours].prior.modules() if isinstance(module, nn.Embedding)) / sizes[ours]
    speedups = {name: ratio(seconds, PEER, name) for name in required_speedups}
    lines += ["", *(f"- {'kept' if speedups[name] >= required else 'NOT kept'}: {name} at least {required} times the peer: {speedups[name]:.2f}"
                    for name, required in required_speedups.items())]
    if not cpu_has_bf16():
        lines.append("- not measured: at least 2.5 times in bf16; this processor has no bf16 instructions")
    lines += ["", f"Matrix products take about {matmul_share:.0%} of the peer's step here. A step without anything else would be about "
                  f"{1 / matmul_share:.2f} times as fast. Our model has the same size but fewer matrix products: {embedding_share:.0%} of its "
                  "weights are embeddings, which are looked up and not multiplied. `benchmarks.prior_quality` measures what it learns."]
    record("Training step of the prior" + (f", {options.turn} steps a turn" if options.turn > 1 else ""), lines, ("transformers", "accelerate"))
    return int(any(speedups[name] < required for name, required in required_speedups.items()))


if __name__ == "__main__":
    sys.exit(main())
