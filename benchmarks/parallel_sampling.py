"""Measures priors that predict in any order: what they learn, and the quality and time of sampling with several tokens per pass.

    python -m benchmarks.parallel_sampling quality                        # tokenizer, tokens, 12 minutes per prior, samples: two hours
    python -m benchmarks.parallel_sampling quality --run runs/parallel    # keeps all results, and continues with them
    python -m benchmarks.parallel_sampling layouts --run runs/parallel    # double positions beside query blocks, 4 minutes each
    python -m benchmarks.parallel_sampling speed --llamagen /tmp/LlamaGen # about ten minutes
    python -m benchmarks.parallel_sampling gpu --arpg /tmp/ARPG           # on a GPU: bf16, models of 111M and 775M, batches 1, 8 and 64

quality: recipe cifar10, whose prior predicts in raster order, and recipe cifar10_any_order, trained for the same time on the same tokens (8x8 of
512 codes), without dropout. A tenth of the training images is held out. On them (as many as the time for validations allows), the NLL is measured,
and for each prior and number of passes the guidance scale with the lowest Frechet distance is chosen. The distances in the table are those of 10,000
samples to the 10,000 test images, in the features of a small classifier that this script trains. That of 10,000 real training images is beside them.

speed, gpu: sampling with guidance, models with random weights, alternating in one process. ARPG (github.com/hp-l33/ARPG) runs as it is, with as many
passes, layers and channels.
"""

import argparse
import contextlib
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from benchmarks import cifar10
from benchmarks.classifier import Classifier, train_classifier
from benchmarks.double_positions import make_double_positions
from benchmarks.measuring import RESULTS, ratio, record, time_alternately, use_two_cpu_threads
from benchmarks.sampling import CLASSES, GPU_PRESETS, GUIDANCE, PRESETS, Preset, llamagen_generate, make_prior
from pipelines.stages.preprocess import preprocess
from stage1_tokenizer.image_files.images import to_uint8
from stage1_tokenizer.pictures import save_picture, tile_images
from stage1_tokenizer.tokenizer_protocol import Tokenizer, load_tokenizer
from stage1_tokenizer.train import train as train_tokenizer
from stage2_prior.prior import TokenPrior
from stage2_prior.train import train as train_prior
from vqmosaic.files.durable_files import write_json
from vqmosaic.files.json_files import read_object
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.accelerator import cpu_has_bf16
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.seeding import image_seeds
from vqmosaic.training.tracking import read_metrics

RASTER, ANY_ORDER, DOUBLE = "cifar10", "cifar10_any_order", "double positions"
PASSES = (4, 8, 16, 32, 64)
GUIDANCE_SCALES = {"linear": (4.0, 5.0, 6.0, 8.0, 10.0, 12.0), "constant": (1.5, 2.0, 2.5, 3.0, 4.0)}
"""For each guidance schedule, the scales that are compared on the held-out images, without top-p."""
SAMPLES, HELD_OUT_SAMPLES, BATCH, SHOWN, SEED = 10_000, 2_500, 250, 3, 0
MINUTES, BATCH_SIZE = 12.0, 32


def make_recipe(name: str, run_dir: Path, *changes: str) -> Recipe:
    """A shipped recipe in this run folder, without the test images: a tenth of the training images is held out."""
    data = run_dir / "training_images"
    if not data.is_dir():
        data.mkdir(parents=True)
        for path in cifar10.folder().rglob("*train*.parquet"):
            (data / path.name).symlink_to(path.resolve())
    return load_recipe(name, [f"--run_dir={run_dir}", f"--data.path={data}", "--data.validation_split=null", "--data.validation_fraction=0.1",
                              *changes])


def make_tokens(run_dir: Path, name: str = "cifar10", minutes: float = MINUTES) -> Path:
    """Train the tokenizer of a recipe and write its tokens, unless they exist. Returns the run folder."""
    recipe = make_recipe(name, run_dir, "--tokenizer_training.max_steps=null", f"--tokenizer_training.max_minutes={minutes}",
                         "--tokenizer_training.validate_every=500")
    if not (run_dir / "tokens/train/manifest.json").is_file():
        train_tokenizer(recipe)
        preprocess(recipe)
    return run_dir


def train(name: str, run_dir: Path, minutes: float, extra: Sequence[str] = ()) -> tuple[TokenPrior, dict[str, float]]:
    """Train a prior for some minutes, or continue with a finished one. Returns it, and its metrics on the held-out images with its `steps`."""
    recipe = make_recipe(ANY_ORDER if name == DOUBLE else name, run_dir / f"{name} {minutes:g} minutes".replace(" ", "_"),
                         f"--prior_training.tokens={run_dir / 'tokens'}", "--prior_training.max_steps=null",
                         f"--prior_training.max_minutes={minutes}", f"--prior_training.batch_size={BATCH_SIZE}",
                         "--prior_training.learning_rate_batch=null", "--prior.dropout=0", "--prior_training.export=last",
                         "--prior_training.validate_every=500", "--prior_training.validation_images=5000",
                         "--prior_training.checkpoint_every=100000", *extra)
    train_prior(recipe)
    run = RunFolder(Path(recipe.run_dir))
    metrics = read_metrics(run.logs("prior") / "metrics.jsonl", "validation")[-1]
    return TokenPrior.from_pretrained(run.export("prior")), metrics


class Judge:
    """Decodes samples and computes their Frechet distance to real images."""

    def __init__(self, tokenizer: Tokenizer, classifier: Classifier, real_NHWC: torch.Tensor):
        self.tokenizer, self.classifier = tokenizer, classifier
        self.distance = FrechetInceptionDistance(feature=classifier, normalize=False, input_img_size=(3, 32, 32), antialias=False,
                                                 reset_real_features=False)
        for part_NHWC in real_NHWC.split(500):
            self.distance.update(part_NHWC.permute(0, 3, 1, 2), real=True)

    @torch.no_grad()
    def distance_of(self, images_NHWC: torch.Tensor) -> float:
        """The Frechet distance of images."""
        self.distance.reset()
        for part_NHWC in images_NHWC.split(500):
            self.distance.update(part_NHWC.permute(0, 3, 1, 2), real=False)
        return float(self.distance.compute())

    @torch.no_grad()
    def agreement(self, images_NHWC: torch.Tensor, classes: Sequence[int]) -> float:
        """The fraction of images that the classifier assigns to the requested class."""
        found = torch.cat([self.classifier.head(self.classifier(part.permute(0, 3, 1, 2))).argmax(1) for part in images_NHWC.split(500)])
        return float((found == torch.tensor(classes)).float().mean())


@torch.no_grad()
def sample_images(prior: TokenPrior, tokenizer: Tokenizer, settings: SamplingConfig, count: int) -> tuple[torch.Tensor, list[int], float]:
    """Images (N, H, W, C), their classes in turn, and the seconds of sampling, without those of decoding."""
    classes, seeds, images, seconds = [number % CLASSES for number in range(count)], image_seeds(SEED, count), [], 0.0
    for start in range(0, count, BATCH):
        part, started = slice(start, start + BATCH), time.perf_counter()
        ids_BT = prior.sample(classes[part], settings, seeds[part])
        seconds += time.perf_counter() - started
        images.append(torch.from_numpy(to_uint8(tokenizer.decode(tokenizer.split_tokens(ids_BT)))))
    return torch.cat(images), classes, seconds


def settings_of(steps: int | None, guidance_schedule: str, guidance_scale: float) -> SamplingConfig:
    """The settings of a point of the curve. Without steps, raster order."""
    base = load_recipe(ANY_ORDER).sampling
    order = "raster" if steps is None else base.order
    return SamplingConfig(order=order, steps=steps, step_schedule=base.step_schedule, guidance_schedule=guidance_schedule,
                          guidance_scale=guidance_scale)


def measure_quality(run_dir: Path, minutes: float, schedule: str) -> int:
    """Train both priors, and print the tables. Returns exit code 1 if a target is missed."""
    tokenizer = load_tokenizer(make_tokens(run_dir) / "tokenizer")
    priors, metrics = {}, {}
    for name in (RASTER, ANY_ORDER):
        priors[name], metrics[name] = train(name, run_dir, minutes)
    raster_nll, own_nll = metrics[RASTER]["nll"], metrics[ANY_ORDER]["nll"]
    random_nll = metrics[ANY_ORDER]["nll_in_random_order"]

    train_NHWC, labels_N = cifar10.load("train")
    classifier = train_classifier(train_NHWC, labels_N)
    held_out_NHWC = train_NHWC[cifar10.held_out_rows(make_recipe(RASTER, run_dir))]
    test_NHWC, _ = cifar10.load("test")
    chooser, judge = Judge(tokenizer, classifier, held_out_NHWC), Judge(tokenizer, classifier, test_NHWC)

    points: dict[tuple[str, int | None], dict[str, float]] = {}
    rows = []
    for name, steps in ((RASTER, None), (ANY_ORDER, None), *((ANY_ORDER, count) for count in PASSES)):
        file = run_dir / "points" / f"{name}-{minutes:g}-minutes-{schedule}-{steps or 'raster'}.json"
        if not file.is_file():
            held_out = {scale: chooser.distance_of(sample_images(priors[name], tokenizer, settings_of(steps, schedule, scale), HELD_OUT_SAMPLES)[0])
                        for scale in GUIDANCE_SCALES[schedule]}
            scale = min(held_out, key=lambda scale: held_out[scale])
            images_NHWC, classes, seconds = sample_images(priors[name], tokenizer, settings_of(steps, schedule, scale), SAMPLES)
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"distance": judge.distance_of(images_NHWC), "agreement": judge.agreement(images_NHWC, classes), "scale": scale,
                              "seconds": seconds})
        points[name, steps] = read_object(file, "delete it")
        shown_NHWC = sample_images(priors[name], tokenizer, settings_of(steps, schedule, points[name, steps]["scale"]), SHOWN * CLASSES)[0]
        rows.append(shown_NHWC.numpy())
        print(name, steps, points[name, steps], flush=True)
    real_distance = judge.distance_of(train_NHWC[:SAMPLES])
    decoded_NHWC = torch.cat([torch.from_numpy(to_uint8(tokenizer.decode(tokenizer.encode(cifar10.to_float(part))))) for part in
                              test_NHWC.split(500)])

    def order_of(name: str, steps: int | None) -> str:
        order = "raster, 64 passes" if steps is None else f"{load_recipe(ANY_ORDER).sampling.order}, {steps} passes"
        return f"{'raster only' if name == RASTER else 'any order'}: {order}"

    lines = [f"Each prior trained for {minutes:g} minutes. NLL on {metrics[RASTER]['images']:,} held-out images, in nats per token: raster only "
             f"{raster_nll:.4f} ({metrics[RASTER]['step']:,} steps); any order {own_nll:.4f} in raster and {random_nll:.4f} in random order "
             f"({metrics[ANY_ORDER]['step']:,} steps). Guidance schedule: {schedule}.", "",
             "| | guidance scale, chosen on held-out images | Frechet distance to the test images | requested class | seconds for 10,000 images |",
             "|---|---|---|---|---|"]
    lines += [f"| {order_of(*key)} | {point['scale']:g} | {point['distance']:.3f} | {point['agreement']:.1%} | {point['seconds']:.0f} |"
              for key, point in points.items()]
    lines += [f"| 10,000 real training images | | {real_distance:.3f} | | |",
              f"| reconstructions of the test images | | {judge.distance_of(decoded_NHWC):.3f} | | |"]
    eight, own, raster = (points[key]["distance"] for key in ((ANY_ORDER, 8), (ANY_ORDER, 64), (RASTER, None)))
    checks = {f"NLL in raster order at most 4 % above raster only: {own_nll / raster_nll - 1:+.1%}": own_nll <= 1.04 * raster_nll,
              f"NLL in random order at most 4 % above its own in raster order: {random_nll / own_nll - 1:+.1%}": random_nll <= 1.04 * own_nll,
              f"distance at 8 passes at most 10 % above its own at 64: {eight / own - 1:+.1%}": eight <= 1.1 * own,
              f"distance at 8 passes at most 25 % above raster only: {eight / raster - 1:+.1%}": eight <= 1.25 * raster}
    lines += ["", *(f"- {'kept' if kept else 'NOT kept'}: {text}" for text, kept in checks.items())]
    folder = RESULTS.parent if "--record" in sys.argv else Path(tempfile.gettempdir())
    save_picture(tile_images(rows, 2), folder / "parallel_sampling.png")
    lines += ["", f"Pictures: [parallel_sampling.png](parallel_sampling.png), the rows of the table from top to bottom, {SHOWN * CLASSES} images "
                  "each, classes in turn."]
    record("Sampling with several tokens per pass: quality on CIFAR-10", lines, ("transformers", "torchmetrics"))
    return int(not all(checks.values()))


def measure_layouts(run_dir: Path, minutes: float) -> int:
    """Train a prior of each layout for the same time, and print their NLL."""
    make_tokens(run_dir)
    rows = {}
    for name in (ANY_ORDER, DOUBLE):
        with patch("stage2_prior.prior.make_causal_lm", make_double_positions) if name == DOUBLE else contextlib.nullcontext():
            prior, metrics = train(name, run_dir, minutes)
        rows[name] = (prior.num_parameters, metrics)
    lines = ["| | parameters | steps | NLL in raster order | NLL in random order |", "|---|---|---|---|---|"]
    lines += [f"| {'query blocks' if name == ANY_ORDER else name} | {parameters:,} | {metrics['step']:,} | {metrics['nll']:.4f} | "
              f"{metrics['nll_in_random_order']:.4f} |" for name, (parameters, metrics) in rows.items()]
    record("Layouts of a prior for any order", lines, ("transformers",))
    return 0


SPEED_TARGETS = {"tiny": ((8, 16), 8, 3.0, 3.0), "B": ((24, 32), 32, 2.0, 3.5)}
"""For each preset: numbers of passes, the one that is checked, and the required speed-ups over one token per pass in float32 and bf16."""
LLAMAGEN_TARGETS = (6.0, 10.0)


def measure_speed(rounds: int, llamagen: str | None, presets: Sequence[str]) -> int:
    """Print the times of sampling one image. Returns exit code 1 if a target is missed."""
    all_kept = True
    for name in presets:
        preset = PRESETS[name]._replace(batch=1)
        passes, checked, *required = SPEED_TARGETS[name]
        calls = {}
        for dtype in ("float32", "bf16") if cpu_has_bf16() else ("float32",):
            kinds = {"raster only": make_prior(preset, "grid_transformer"), "any order": make_prior(preset, "grid_transformer", any_order=True)}
            for kind, prior in kinds.items():
                prior.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
                for steps in (None,) if kind == "raster only" else (None, *passes):
                    settings = SamplingConfig(guidance_scale=GUIDANCE, order="raster" if steps is None else "spread", steps=steps)
                    words = f"{steps} passes" if steps else f"{preset.side**2} passes"
                    calls[f"{kind}, {words}, {dtype}"] = functools.partial(prior.sample, [3], settings, [1])
        if llamagen:
            calls["LlamaGen, float32"] = llamagen_generate(llamagen, preset)
        seconds = time_alternately(calls, rounds)
        lines = [f"{preset.layers} layers, {preset.width} wide, {preset.codes} codes, {preset.side**2} tokens, one image, guidance {GUIDANCE:g}, "
                 f"{rounds} rounds. Parameters: {', '.join(f'{prior.num_parameters:,} ({kind})' for kind, prior in kinds.items())}.", "",
                 "| | milliseconds | times one token per pass |", "|---|---|---|"]
        for call, times in seconds.items():
            dtype = call.rpartition(", ")[2]
            speedup = f"{ratio(seconds, f'raster only, {preset.side**2} passes, {dtype}', call):.2f}"
            lines.append(f"| {call} | {1000 * statistics.median(times):.0f} | {speedup} |")
        checks = {}
        for dtype, factor, llamagen_factor in zip(("float32", "bf16"), required, LLAMAGEN_TARGETS, strict=True):
            fast = f"any order, {checked} passes, {dtype}"
            if fast not in seconds:
                continue
            found = ratio(seconds, f"raster only, {preset.side**2} passes, {dtype}", fast)
            checks[f"{checked} passes at least {factor:g} times as fast as one token per pass, {dtype}: {found:.2f}"] = found >= factor
            if llamagen and name == "B":
                found = ratio(seconds, "LlamaGen, float32", fast)
                checks[f"{checked} passes at least {llamagen_factor:g} times as fast as LlamaGen, {dtype}: {found:.2f}"] = found >= llamagen_factor
        lines += ["", *(f"- {'kept' if kept else 'NOT kept'}: {text}" for text, kept in checks.items())]
        title = f"Sampling with several tokens per pass: time, preset {name}"
        record(title if cpu_has_bf16() else f"{title}, processor without bf16", lines, ("transformers",))
        all_kept = all_kept and all(checks.values())
    return int(not all_kept)


def arpg_generate(path: str, preset: Preset, batch: int, steps: int, device: str) -> Callable[[], torch.Tensor]:
    """A function that calls `generate` of ARPG's model in bf16, from a checkout of its repository."""
    sys.path.insert(0, path)
    try:
        from models import arpg
    finally:
        sys.path.remove(path)
    torch.manual_seed(0)
    model = arpg.Transformer(arpg.ModelArgs(dim=preset.width, n_layer=preset.layers, n_head=preset.heads, vocab_size=preset.codes,
                                            block_size=preset.side**2, num_classes=CLASSES)).eval().to(device, torch.bfloat16)
    torch.nn.init.normal_(model.head.weight, std=0.02)  # initialized to zero
    classes_B = torch.arange(batch, device=device) % CLASSES
    return lambda: model.generate(classes_B, guidance_scale=GUIDANCE, seq_len=preset.side**2, num_iter=steps)


def measure_gpu(rounds: int, arpg: str | None, presets: dict[str, Preset] = GPU_PRESETS, batches: Sequence[int] = (1, 8, 64),
                passes: Sequence[int] = (64, 32), device: str = "cuda") -> int:
    """Print the images per second in bf16, with one and with several tokens per pass, each with and without a CUDA graph."""
    lines = ["| | batch | images/s | with compile=True | ARPG, images/s |", "|---|---|---|---|---|"]
    for name, preset in presets.items():
        kinds = {"raster only": make_prior(preset, "grid_transformer"), "any order": make_prior(preset, "grid_transformer", any_order=True)}
        for prior in kinds.values():
            prior.to(device, torch.bfloat16)
        for batch in batches:
            classes, seeds = [number % CLASSES for number in range(batch)], list(range(batch))
            for kind, steps in (("raster only", None), *(("any order", count) for count in passes)):
                settings = SamplingConfig(guidance_scale=GUIDANCE, order="raster" if steps is None else "spread", steps=steps)
                calls: dict[str, Callable[[], object]] = {
                    "plain": functools.partial(kinds[kind].sample, classes, settings, seeds),
                    "graph": functools.partial(kinds[kind].sample, classes, settings, seeds, compile=True)}
                if arpg and steps:
                    calls["ARPG"] = arpg_generate(arpg, preset, batch, steps, device)
                rates = {call: batch / statistics.median(times) for call, times in time_alternately(calls, rounds).items()}
                peer = f"{rates['ARPG']:.1f}" if "ARPG" in rates else ""
                lines.append(f"| {name}, {kinds[kind].num_parameters / 1e6:.0f}M, {kind}, {steps or preset.side**2} passes | {batch} | "
                             f"{rates['plain']:.1f} | {rates['graph']:.1f} | {peer} |")
                print(lines[-1], flush=True)
    record("Sampling with several tokens per pass on a GPU", lines, ("transformers",))
    return 0


def main() -> int:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("quality", "layouts", "speed", "gpu"))
    parser.add_argument("--run", type=Path, help="a folder for tokenizer, tokens and priors; default: a temporary one")
    parser.add_argument("--minutes", type=float, help="minutes of training per prior; default: 12, for layouts 4")
    parser.add_argument("--guidance_schedule", choices=tuple(GUIDANCE_SCALES), default="linear", help="for quality")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--presets", default="tiny,B", help="comma-separated")
    parser.add_argument("--llamagen", metavar="PATH", help="a checkout of github.com/FoundationVision/LlamaGen")
    parser.add_argument("--arpg", metavar="PATH", help="a checkout of github.com/hp-l33/ARPG")
    parser.add_argument("--record", action="store_true", help="write the result to RESULTS.md")
    options = parser.parse_args()
    if options.what == "gpu":
        return measure_gpu(options.rounds, options.arpg)
    use_two_cpu_threads()
    if options.what == "speed":
        return measure_speed(options.rounds, options.llamagen, options.presets.split(","))
    run_dir = options.run or Path(tempfile.mkdtemp())
    if options.what == "layouts":
        return measure_layouts(run_dir, options.minutes or 4.0)
    return measure_quality(run_dir, options.minutes or MINUTES, options.guidance_schedule)


if __name__ == "__main__":
    sys.exit(main())
