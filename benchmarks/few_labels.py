"""A small classifier of 32 x 32 images that is trained on few real images, with or without synthetic ones."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.classifier import Classifier

BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 64, 2e-3, 1e-2
MAX_SHIFT = 4
"""Largest shift of a training image in pixels."""


class LabelledImages(NamedTuple):
    """Images (N, H, W, C), uint8, and the class index of each."""

    images_NHWC: torch.Tensor
    labels_N: torch.Tensor

    def take(self, indices_n: torch.Tensor) -> "LabelledImages":
        """The images at these indices."""
        return LabelledImages(self.images_NHWC[indices_n], self.labels_N[indices_n])


def random_subset(images: LabelledImages, per_class: int, seed: int) -> LabelledImages:
    """As many random images of each class."""
    order_N = torch.randperm(len(images.labels_N), generator=torch.Generator().manual_seed(seed))
    classes = range(int(images.labels_N.max()) + 1)
    return images.take(torch.cat([order_N[images.labels_N[order_N] == label][:per_class] for label in classes]))


def flip_and_shift(images_BHWC: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Each image flipped or not, and shifted by up to MAX_SHIFT pixels along each axis. Pixels from outside are reflected at the edge."""
    batch, height, width = images_BHWC.shape[:3]

    def places(side: int) -> torch.Tensor:
        shifted = torch.arange(side) + torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (batch, 1), generator=random)
        return side - 1 - (side - 1 - shifted.abs()).abs()

    rows_BH, columns_BW = places(height), places(width)
    columns_BW = torch.where(torch.rand(batch, 1, generator=random) < 0.5, columns_BW, columns_BW.flip(1))
    return images_BHWC[torch.arange(batch)[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]


def train_on_few(real: LabelledImages, synthetic: LabelledImages | None, share: float, steps: int, seed: int) -> Classifier:
    """Train a classifier. In each batch, this share of the images is synthetic. All batches have the same size, so all trainings cost the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier().train()
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    count = 0 if synthetic is None else round(share * BATCH_SIZE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        parts = [draw(real, BATCH_SIZE - count, random)]
        if synthetic is not None:
            parts.append(draw(synthetic, count, random))
        images_BHWC = flip_and_shift(torch.cat([part.images_NHWC for part in parts]), random)
        optimizer.zero_grad()
        logits_BK = model.head(model(images_BHWC.permute(0, 3, 1, 2)))
        F.cross_entropy(logits_BK, torch.cat([part.labels_N for part in parts])).backward()
        optimizer.step()
    return model.eval()


def draw(images: LabelledImages, count: int, random: torch.Generator) -> LabelledImages:
    """Random images, with replacement."""
    return images.take(torch.randint(len(images.labels_N), (count,), generator=random))


@torch.no_grad()
def accuracy(model: Classifier, images: LabelledImages) -> float:
    """The share of the images that are assigned to their class."""
    found_N = torch.cat([model.head(model(part.permute(0, 3, 1, 2))).argmax(1) for part in images.images_NHWC.split(500)])
    return float((found_N == images.labels_N).float().mean())


def mean_and_deviation(values: Sequence[float]) -> str:
    """The mean of accuracies and, of several, their standard deviation, as text in percent."""
    values_N = 100 * torch.tensor(list(values), dtype=torch.float64)
    return f"{values_N.mean():.1f}" + (f" ± {values_N.std():.1f}" if len(values) > 1 else "")
