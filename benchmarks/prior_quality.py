"""Compares the prior of recipe cifar10 with nanoGPT's GPT, trained for the same wall-clock time on the same tokens of CIFAR-10.

    git clone https://github.com/karpathy/nanoGPT /tmp/nanogpt
    python -m benchmarks.prior_quality --nanogpt /tmp/nanogpt                     # tokenizer (12 minutes), tokens, 12 minutes per prior
    python -m benchmarks.prior_quality --nanogpt /tmp/nanogpt --tokens runs/c10   # tokenizer and tokens of a finished run
    python -m benchmarks.prior_quality --nanogpt /tmp/nanogpt --record            # also write to RESULTS.md and save the pictures beside it

Both use one frozen tokenizer (recipe cifar10: 8x8 tokens of 512 codes) and the same shards. The peer is nanoGPT's GPT with 6 layers of width 256, the
class token as the first token, and the optimizer settings of its configuration for small networks. Ours is recipe cifar10, trained by the code of
`train-prior` with this budget, no dropout (no image is seen more than a few times), the peer's batch size and the recipe's learning rate. Both use
the last weights. The metrics are the NLL on all test images and, for 2,000 samples (200 per class), the Frechet distance to the test images, in the
features of a small classifier that this script trains, and the fraction of samples that it assigns to the requested class.
"""

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from benchmarks import cifar10
from benchmarks.classifier import Classifier, train_classifier
from benchmarks.measuring import record, use_two_cpu_threads
from benchmarks.nanogpt import load_nanogpt
from pipelines.stages.preprocess import preprocess
from stage1_tokenizer.image_files.images import to_uint8
from stage1_tokenizer.pictures import save_picture, tile_images
from stage1_tokenizer.tokenizer_protocol import Tokenizer, load_tokenizer
from stage1_tokenizer.train import train as train_tokenizer
from stage2_prior.prior import TokenPrior
from stage2_prior.token_batches import validation_batches
from stage2_prior.train import train as train_prior
from token_shards.reader import TokenShardReader
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.seeding import image_seeds
from vqmosaic.training.tracking import read_metrics

BATCH, CLASSES, SAMPLES_PER_CLASS, SEED = 32, 10, 200, 0
# from nanoGPT's config/train_shakespeare_char.py ("with baby networks can afford to go a bit higher"), without its dropout for repeated data
LEARNING_RATE, FINAL_LEARNING_RATE, BETAS, WEIGHT_DECAY, WARMUP_STEPS, CLIP = 1e-3, 1e-4, (0.9, 0.99), 0.1, 100, 1.0
NUM_CODES, TOKENS = 512, 64

Model = tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], Callable[[list[int]], torch.Tensor], int]
"""A function from ids and classes to logits (B, T, K), a function that samples ids (B, T) for classes, and the sequences seen in training."""
ReadBatch = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Maps a step to the ids (B, T) and classes (B) of its batch."""
EVALUATE_EVERY = 250  # as in train_shakespeare_char.py


def make_tokens(run_dir: Path, minutes: float) -> None:
    """Train the tokenizer of recipe cifar10 and write its tokens in a run folder, unless they exist."""
    recipe = load_recipe("cifar10", [f"--run_dir={run_dir}", f"--data.path={cifar10.folder()}", "--tokenizer_training.max_steps=null",
                                     f"--tokenizer_training.max_minutes={minutes}", "--tokenizer_training.validate_every=500"])
    train_tokenizer(recipe)
    preprocess(recipe)


def read_shards(run_dir: Path) -> ReadBatch:
    """A function that reads batches of the training tokens of a run folder."""
    reader = TokenShardReader(run_dir / "tokens/train", seed=0)

    def read_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = reader.read(range(step * BATCH, (step + 1) * BATCH))
        return torch.from_numpy(tokens.ids_BT), torch.from_numpy(tokens.labels_B)

    return read_batch


def train_nanogpt(checkout: Path, read_batch: ReadBatch, minutes: float, dropout: float = 0.0,
                  held_out: tuple[torch.Tensor, torch.Tensor] | None = None) -> Model:
    """Train nanoGPT's model with its optimizer and training step. The learning rate decays over the minutes instead of a number of steps.

    With `held_out` ids and classes, the loss on them is measured every EVALUATE_EVERY steps, and the weights with the lowest loss are kept.
    """
    torch.manual_seed(0)
    module = load_nanogpt(checkout)
    model = module.GPT(module.GPTConfig(block_size=TOKENS, vocab_size=NUM_CODES + CLASSES, n_layer=6, n_head=4, n_embd=256, dropout=dropout,
                                        bias=False))
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, "cpu")

    def loss_of(ids_BT: torch.Tensor, classes_B: torch.Tensor) -> torch.Tensor:
        return model(torch.cat([NUM_CODES + classes_B[:, None], ids_BT[:, :-1]], dim=1), ids_BT)[1]

    best_loss, best_weights = math.inf, None
    started, step = time.monotonic(), 0
    while (progress := (time.monotonic() - started) / (minutes * 60)) < 1:
        share = 0.5 * (1 + math.cos(math.pi * progress))
        rate = min((step + 1) / (WARMUP_STEPS + 1), 1.0) * (FINAL_LEARNING_RATE + share * (LEARNING_RATE - FINAL_LEARNING_RATE))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss_of(*read_batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if held_out is not None and step % EVALUATE_EVERY == 0:
            model.eval()
            with torch.no_grad():
                loss = float(loss_of(*held_out))
            if loss < best_loss:
                best_loss, best_weights = loss, copy.deepcopy(model.state_dict())
            model.train()
    if best_weights is not None:
        model.load_state_dict(best_weights)
    model.eval()

    def logits(ids_BT: torch.Tensor, classes_B: torch.Tensor) -> torch.Tensor:
        inputs_BT = torch.cat([NUM_CODES + classes_B[:, None], ids_BT[:, :-1]], dim=1)
        return model(inputs_BT, ids_BT)[0][..., :NUM_CODES]  # the model returns the logits of all positions only if targets are given

    def sample(classes: list[int]) -> torch.Tensor:
        torch.manual_seed(SEED)
        starts_N1 = NUM_CODES + torch.tensor(classes)[:, None]
        ids_NT = torch.cat([model.generate(part, TOKENS)[:, 1:] for part in starts_N1.split(200)])
        return ids_NT % NUM_CODES  # maps a sampled class id to a code

    return logits, sample, step * BATCH


def train_ours(run_dir: Path, minutes: float, extra: list[str]) -> tuple[TokenPrior, SamplingConfig, int]:
    """Train the recipe's prior. Returns it, its recommended sampling settings, and the number of sequences seen."""
    recipe = load_recipe("cifar10", [
        f"--run_dir={Path(tempfile.mkdtemp()) / 'ours'}", f"--data.path={cifar10.folder()}", f"--prior_training.tokens={run_dir / 'tokens'}",
        "--prior_training.max_steps=null", f"--prior_training.max_minutes={minutes}", f"--prior_training.batch_size={BATCH}", "--prior.dropout=0",
        "--prior_training.learning_rate_batch=null", "--prior_training.export=last",  # the best weights would be selected on the evaluation data
        "--prior_training.validate_every=500", "--prior_training.validation_images=500", "--prior_training.checkpoint_every=100000", *extra])
    train_prior(recipe)
    run = RunFolder(Path(recipe.run_dir))
    steps = read_metrics(run.logs("prior") / "metrics.jsonl", "validation")[-1]["step"]
    return TokenPrior.from_pretrained(run.export("prior")), recipe.sampling, steps * recipe.prior_training.batch_size


@torch.no_grad()
def nll(logits, run_dir: Path) -> float:
    """Mean NLL in nats per token over all test images."""
    reader, total, count = TokenShardReader(run_dir / "tokens/validation"), 0.0, 0
    for ids_BT, classes_B, _ in validation_batches(reader, 100):
        total += float(F.cross_entropy(logits(ids_BT, classes_B).flatten(0, 1).float(), ids_BT.flatten(), reduction="sum"))
        count += ids_BT.numel()
    return total / count


@torch.no_grad()
def evaluate_samples(ids_NT: torch.Tensor, classes: list[int], tokenizer: Tokenizer, test_NHWC: torch.Tensor,
                     classifier: Classifier) -> tuple[dict[str, float], torch.Tensor]:
    """Frechet distance and class agreement of samples, and the first images of each class (10, 8, H, W, C)."""
    distance = FrechetInceptionDistance(feature=classifier, normalize=False, input_img_size=(3, 32, 32), antialias=False)
    for part_NHWC in test_NHWC.split(500):
        distance.update(part_NHWC.permute(0, 3, 1, 2), real=True)
    correct, images = 0, []
    for ids_BT, labels_B in zip(ids_NT.split(200), torch.tensor(classes).split(200), strict=True):
        images_BHWC = torch.from_numpy(to_uint8(tokenizer.decode(tokenizer.split_tokens(ids_BT))))
        images_BCHW = images_BHWC.permute(0, 3, 1, 2)
        distance.update(images_BCHW, real=False)
        correct += int((classifier.head(classifier(images_BCHW)).argmax(1) == labels_B).sum())
        images.append(images_BHWC)
    shown = torch.cat(images).view(CLASSES, SAMPLES_PER_CLASS, *images_BHWC.shape[1:])[:, :8]
    return {"distance": float(distance.compute()), "agreement": correct / len(classes)}, shown


def main() -> int:
    """Train, evaluate and print the table. Returns exit code 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--tokens", type=Path, help="a run folder with tokenizer/ and tokens/ of CIFAR-10; default: train and encode first")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--record", action="store_true")
    options, extra = parser.parse_known_args()
    use_two_cpu_threads()
    run_dir = options.tokens or Path(tempfile.mkdtemp()) / "tokens"
    if options.tokens is None:
        make_tokens(run_dir, 12.0)
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    classes = [label for label in range(CLASSES) for _ in range(SAMPLES_PER_CLASS)]
    rows, pictures = {}, {}

    peer_logits, peer_sample, peer_seen = train_nanogpt(options.nanogpt, read_shards(run_dir), options.minutes)
    prior, sampling, seen = train_ours(run_dir, options.minutes, extra)
    train_NHWC, labels_N = cifar10.load("train")
    classifier = train_classifier(train_NHWC, labels_N)
    test_NHWC, _ = cifar10.load("test")

    def sample(settings: SamplingConfig) -> torch.Tensor:
        seeds = image_seeds(SEED, len(classes))
        return torch.cat([prior.sample(classes[i:i + 200], settings, seeds[i:i + 200]) for i in range(0, len(classes), 200)])

    with torch.no_grad():
        peer_nll, own_nll = nll(peer_logits, run_dir), nll(prior.eval(), run_dir)
        samples = {"nanoGPT": (peer_nll, peer_seen, peer_sample(classes)),
                   "vqmosaic, temperature 1, no guidance": (own_nll, seen, sample(SamplingConfig())),
                   "vqmosaic, as the recipe recommends": (own_nll, seen, sample(sampling))}
    for name, (value, sequences, ids_NT) in samples.items():
        figures, pictures[name] = evaluate_samples(ids_NT, classes, tokenizer, test_NHWC, classifier)
        rows[name] = {"seen": sequences, "nll": value, **figures}
    return report(rows, pictures, options)


def report(rows: dict[str, dict[str, float]], pictures: dict[str, torch.Tensor], options: argparse.Namespace) -> int:
    """Print the table and, with --record, write it to RESULTS.md. Returns exit code 1 if a target is missed."""
    lines = ["| | sequences seen | NLL, nats a token | Frechet distance to the test images | taken for the class asked for |",
             "|---|---|---|---|---|"]
    lines += [f"| {name} | {row['seen']:,} | {row['nll']:.4f} | {row['distance']:.3f} | {row['agreement']:.1%} |" for name, row in rows.items()]
    peer, own = rows["nanoGPT"], rows["vqmosaic, as the recipe recommends"]
    checks = {f"lower NLL: {own['nll']:.4f} against {peer['nll']:.4f}": own["nll"] < peer["nll"],
              f"lower Frechet distance: {own['distance']:.3f} against {peer['distance']:.3f}": own["distance"] < peer["distance"],
              f"higher class agreement: {own['agreement']:.1%} against {peer['agreement']:.1%}": own["agreement"] > peer["agreement"]}
    folder = Path("benchmarks") if options.record else Path(tempfile.gettempdir())
    files = {"nanoGPT": "prior_quality_nanogpt.png", "vqmosaic, as the recipe recommends": "prior_quality_ours.png"}
    for name, file in files.items():
        save_picture(tile_images(list(pictures[name].numpy()), 2), folder / file)
    lines += ["", *(f"- {'kept' if kept else 'NOT kept'}: {text}" for text, kept in checks.items()),
              "", f"Each trained for {options.minutes:g} minutes. Samples, one class per row: "
              + ", ".join(f"[{name}]({file})" for name, file in files.items()) + "."]
    record("Prior quality on CIFAR-10 in equal time", lines, ("transformers", "torchmetrics"))
    return int(not all(checks.values()))


if __name__ == "__main__":
    sys.exit(main())
