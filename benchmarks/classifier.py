"""A small classifier, trained by the benchmarks, for Frechet distances (on its features) and class agreement."""

import time
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

CLASSIFIER_SECONDS = 90


class Classifier(nn.Module):
    """A small convolutional classifier of uint8 images. `forward` returns the features (B, 128), `head` maps them to logits."""

    num_features = 128

    def __init__(self):
        super().__init__()
        widths = [3, 32, 64, 128, 128]
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
                                      for a, b in pairwise(widths)))
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.blocks(images_BCHW.float() / 127.5 - 1).mean((2, 3))


def train_classifier(images_NHWC: torch.Tensor, labels_N: torch.Tensor, seconds: float = CLASSIFIER_SECONDS) -> Classifier:
    """Train the classifier for a fixed time on flipped and shifted training images."""
    torch.manual_seed(1)
    model = Classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - elapsed / seconds) + 1e-5
        chosen_B = torch.randint(len(images_NHWC), (128,))
        images_BCHW = images_NHWC[chosen_B].permute(0, 3, 1, 2)
        if torch.rand(()) < 0.5:
            images_BCHW = images_BCHW.flip(3)
        images_BCHW = images_BCHW.roll(torch.randint(-3, 4, (2,)).tolist(), (2, 3))
        optimizer.zero_grad()
        F.cross_entropy(model.head(model(images_BCHW)), labels_N[chosen_B]).backward()
        optimizer.step()
    return model.eval()
