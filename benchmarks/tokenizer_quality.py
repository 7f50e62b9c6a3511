"""Compares tokenizers trained on CIFAR-10 for the same wall-clock time: diffusers' VQModel, ours, and ours with a discriminator.

    python -m benchmarks.tokenizer_quality                         # 12 minutes each, two CPU threads
    python -m benchmarks.tokenizer_quality --minutes 2             # a quick comparison
    python -m benchmarks.tokenizer_quality --only ours             # one contestant (diffusers, ours, vqgan)
    python -m benchmarks.tokenizer_quality --record                # also write to RESULTS.md and save the pictures beside it

Other arguments, such as --tokenizer.channels=64, change both of our recipes.

All tokenizers encode 32x32 pixels to 8x8 tokens of 512 codes. Ours are the shipped recipes cifar10 and cifar10_vqgan, trained by the code of
`train-tokenizer`. Only the budget differs. The metrics, on all 10,000 test images, are PSNR, the fraction of the codebook that is used, and the
Frechet distance between the originals and their reconstructions (torchmetrics, on the features of a small classifier that this script trains).
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import VQModel
from torchmetrics.image.fid import FrechetInceptionDistance

from benchmarks import cifar10
from benchmarks.classifier import Classifier, train_classifier
from benchmarks.measuring import record, use_two_cpu_threads
from stage1_tokenizer.pictures import save_picture
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage1_tokenizer.train import train
from stage1_tokenizer.validation import reconstruction_picture
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.training.tracking import read_metrics

CODES, PEER_BATCH, PEER_LEARNING_RATE = 512, 32, 5e-4
RECIPES = {"ours": "cifar10", "vqgan": "cifar10_vqgan"}


def train_peer(minutes: float, images_NHWC: torch.Tensor, widths: tuple[int, ...] = (32, 64, 128)):
    """Train diffusers' VQModel in a plain float32 loop with AdamW on MSE and its own commitment loss. Returns (restore, images seen, model).

    Each entry of `widths` after the first adds a level that halves height and width.
    """
    torch.manual_seed(0)
    levels = len(widths)
    model = VQModel(in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
                    block_out_channels=widths, layers_per_block=1, latent_channels=64, num_vq_embeddings=CODES, vq_embed_dim=16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEER_LEARNING_RATE)
    started, seen = time.monotonic(), 0
    while time.monotonic() - started < minutes * 60:
        images_BCHW = cifar10.to_float(images_NHWC[torch.randint(len(images_NHWC), (PEER_BATCH,))])
        output = model(images_BCHW)
        loss = F.mse_loss(output.sample, images_BCHW) + output.commit_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += PEER_BATCH
    model.eval()

    def restore(images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantized_BDhw, _, (_, _, ids) = model.quantize(model.encode(images_BCHW).latents)
        return model.decode(quantized_BDhw, force_not_quantize=True).sample, ids

    return restore, seen, model


def train_ours(name: str, minutes: float, overrides: list[str]):
    """Train a shipped recipe with this budget and these overrides by vqmosaic's own code. Returns (restore, images seen)."""
    run_dir = Path(tempfile.mkdtemp()) / name
    recipe = load_recipe(RECIPES[name], [
        f"--run_dir={run_dir}", f"--data.path={cifar10.folder()}", "--tokenizer_training.max_steps=null",
        f"--tokenizer_training.max_minutes={minutes}", "--tokenizer_training.validate_every=500", "--tokenizer_training.validation_images=500",
        "--tokenizer_training.checkpoint_every=100000", *overrides])
    train(recipe)
    tokenizer = ImageTokenizer.from_pretrained(run_dir / "tokenizer")
    steps = read_metrics(RunFolder(run_dir).logs("tokenizer") / "metrics.jsonl", "validation")[-1]["step"]

    def restore(images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = tokenizer(images_BCHW)
        return output.reconstructions, output.quantizer.ids

    return restore, steps * recipe.tokenizer_training.batch_size


@torch.no_grad()
def evaluate(restore, images_NHWC: torch.Tensor, labels_N: torch.Tensor, classifier: Classifier) -> dict[str, float]:
    """Metrics of one tokenizer on held-out images."""
    distance = FrechetInceptionDistance(feature=classifier, normalize=False, input_img_size=(3, 32, 32), antialias=False)
    used_K, squared_error, correct = torch.zeros(CODES), 0.0, 0
    for pixels_BHWC, labels_B in zip(images_NHWC.split(100), labels_N.split(100), strict=True):
        images_BCHW = cifar10.to_float(pixels_BHWC)
        restored_BCHW, ids = restore(images_BCHW)
        restored_BCHW = restored_BCHW.clamp(-1, 1)
        squared_error += float((restored_BCHW - images_BCHW).square().mean()) * len(images_BCHW)
        used_K += torch.bincount(ids.flatten(), minlength=CODES)
        restored_pixels_BCHW = restored_BCHW.add(1).mul(127.5).round().to(torch.uint8)
        distance.update(pixels_BHWC.permute(0, 3, 1, 2), real=True)
        distance.update(restored_pixels_BCHW, real=False)
        correct += int((classifier.head(classifier(restored_pixels_BCHW)).argmax(1) == labels_B).sum())
    return {"psnr": float(10 * torch.log10(torch.tensor(4 / (squared_error / len(images_NHWC))))), "usage": float((used_K > 0).float().mean()),
            "distance": float(distance.compute()), "accuracy": correct / len(images_NHWC)}


def main() -> int:
    """Train, evaluate and print the table. Returns exit code 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--only", choices=["diffusers", *RECIPES], nargs="+", default=["diffusers", *RECIPES])
    parser.add_argument("--record", action="store_true")
    options, overrides = parser.parse_known_args()
    if options.record and len(options.only) < 3:
        parser.error("--record needs all three contestants. Leave out --only.")
    use_two_cpu_threads()
    images_NHWC, labels_N = cifar10.load("train")
    test_NHWC, test_labels_N = cifar10.load("test")
    rows, pictures = {}, []
    restorers = {}
    for name in options.only:
        restorers[name] = train_peer(options.minutes, images_NHWC)[:2] if name == "diffusers" else train_ours(name, options.minutes, overrides)
    classifier = train_classifier(images_NHWC, labels_N)
    for name, (restore, seen) in restorers.items():
        rows[name] = {"seen": seen, **evaluate(restore, test_NHWC, test_labels_N, classifier)}
        with torch.no_grad():
            some_BCHW = cifar10.to_float(test_NHWC[:16])
            pictures.append(reconstruction_picture(some_BCHW, restore(some_BCHW)[0].clamp(-1, 1)))
    lines = ["| | images seen | PSNR, dB | codebook used | Frechet distance to the originals | classified rightly |", "|---|---|---|---|---|---|"]
    titles = {"diffusers": "diffusers VQModel, AdamW, MSE", "ours": "vqmosaic, recipe cifar10", "vqgan": "vqmosaic, recipe cifar10_vqgan"}
    lines += [f"| {titles[name]} | {row['seen']:,} | {row['psnr']:.2f} | {row['usage']:.1%} | {row['distance']:.3f} | {row['accuracy']:.1%} |"
              for name, row in rows.items()]
    missed = []
    if "diffusers" in rows and "ours" in rows:
        factor = rows["ours"]["seen"] / rows["diffusers"]["seen"]
        checks = {f"at least 25.5 dB: {rows['ours']['psnr']:.2f}": rows["ours"]["psnr"] >= 25.5,
                  f"more than 95 % of the codebook used: {rows['ours']['usage']:.1%}": rows["ours"]["usage"] > 0.95,
                  f"at least three times the images seen: {factor:.1f}": factor >= 3}
        if "vqgan" in rows:
            checks[f"the discriminator brings the Frechet distance down: {rows['ours']['distance']:.3f} to {rows['vqgan']['distance']:.3f}"] = \
                rows["vqgan"]["distance"] < rows["ours"]["distance"]
        missed = [text for text, kept in checks.items() if not kept]
        lines += ["", *(f"- {'kept' if kept else 'NOT kept'}: {text}" for text, kept in checks.items())]
    folder = Path("benchmarks") if options.record else Path(tempfile.gettempdir())
    for name, image in zip(rows, pictures, strict=True):
        save_picture(image, folder / f"tokenizer_quality_{name}.png")
    lines += ["", f"Each trained for {options.minutes:g} minutes. Originals over reconstructions: "
              + ", ".join(f"[{name}](tokenizer_quality_{name}.png)" for name in rows) + "."]
    record("Tokenizer quality on CIFAR-10 in equal time", lines, ("diffusers", "torchmetrics"))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
