"""Validation metrics of the tokenizer: PSNR and SSIM of images in [0, 1], although the network uses [-1, 1]."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_image

from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.quantizers import QuantizerOutput
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage1_tokenizer.trainable.trainable_tokenizer import TokenizerOutput
from stage1_tokenizer.validation import validate
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig


class TensorImages:
    """Validation images from one tensor."""

    def __init__(self, images_BCHW: torch.Tensor):
        self.images_BCHW = images_BCHW

    def __len__(self) -> int:
        return len(self.images_BCHW)

    def batches(self, batch_size: int, rank: int, world_size: int):
        for part in self.images_BCHW.split(batch_size):
            yield part, len(part)


@pytest.fixture
def measure_metrics(monkeypatch):
    """Returns a function that validates a tokenizer with the given reconstructions, with all images in [0, 1]."""
    def measure(images_01: torch.Tensor, restored_01: torch.Tensor, batch_size: int = 2) -> dict[str, float]:
        tokenizer = ImageTokenizer(TokenizerConfig(quantizer="kl", latent_channels=16, channels=32, channel_multipliers=[1, 1]),
                                   ImageTransform(image_size=images_01.shape[-1], channels=images_01.shape[1]))
        reconstructions = iter((restored_01 * 2 - 1).split(batch_size))
        monkeypatch.setattr(ImageTokenizer, "forward", lambda self, images: TokenizerOutput(
            next(reconstructions), {"image": QuantizerOutput(images, None, torch.zeros(()))}))
        return validate(tokenizer, TensorImages(images_01 * 2 - 1), batch_size, Accelerator(cpu=True))
    return measure


def photographs(channels: int, size: int) -> torch.Tensor:
    """Crops of scikit-learn's sample images, in [0, 1]."""
    crops = [np.asarray(load_sample_image(name))[top:top + size, left:left + size] for name in ("china.jpg", "flower.jpg")
             for top, left in ((100, 200), (200, 300))]
    images_BCHW = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
    return images_BCHW if channels == 3 else images_BCHW.mean(1, keepdim=True)


def ssim_by_scipy(first_BCHW: torch.Tensor, second_BCHW: torch.Tensor) -> float:
    """Mean SSIM of Wang et al. 2004 (equation 13) of images in [0, 1], with 11 x 11 Gaussian windows of standard deviation 1.5."""
    def local_mean(values_HW: np.ndarray) -> np.ndarray:
        return gaussian_filter(values_HW, 1.5, mode="mirror", truncate=5 / 1.5)

    means = []
    for x, y in zip(first_BCHW.flatten(0, 1).double().numpy(), second_BCHW.flatten(0, 1).double().numpy(), strict=True):
        mean_x, mean_y = local_mean(x), local_mean(y)
        variance_x, variance_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
        covariance = local_mean(x * y) - mean_x * mean_y
        means.append(((2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
                      / ((mean_x**2 + mean_y**2 + 0.01**2) * (variance_x + variance_y + 0.03**2))).mean())
    return float(np.mean(means))


def test_ssim_of_constant_images_is_the_luminance_term(measure_metrics):
    """It is 0.9968 here. For images in [-1, 1] it would be negative, because the two values would have different signs."""
    grey = torch.full((2, 1, 32, 32), 0.5)
    expected = (2 * 0.48 * 0.52 + 0.01**2) / (0.48**2 + 0.52**2 + 0.01**2)
    assert measure_metrics(grey - 0.02, grey + 0.02)["ssim"] == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("channels, size", [(1, 16), (3, 16), (1, 64), (3, 64)])
@pytest.mark.parametrize("change", ["noise", "brighter", "blurred"])
def test_ssim_and_psnr_match_their_formulas(channels, size, change, measure_metrics):
    images_BCHW = photographs(channels, size)
    noise_BCHW = 0.1 * torch.randn(images_BCHW.shape, generator=torch.Generator().manual_seed(0))
    restored_BCHW = {"noise": images_BCHW + noise_BCHW, "brighter": images_BCHW + 0.1,
                     "blurred": torch.nn.functional.avg_pool2d(images_BCHW, 3, 1, 1)}[change].clamp(0, 1)
    metrics = measure_metrics(images_BCHW, restored_BCHW, batch_size=3)
    assert metrics["ssim"] == pytest.approx(ssim_by_scipy(images_BCHW, restored_BCHW), abs=1e-4)
    assert metrics["psnr"] == pytest.approx(-10 * float((images_BCHW - restored_BCHW).double().square().mean().log10()), abs=1e-3)
    assert metrics["reconstruction_l2"] == pytest.approx(4 * 10 ** (-metrics["psnr"] / 10), rel=1e-4), "L2 is computed on images in [-1, 1]"


def test_ssim_of_identical_images_is_one(measure_metrics):
    images_BCHW = photographs(3, 32)
    assert measure_metrics(images_BCHW, images_BCHW)["ssim"] == pytest.approx(1, abs=1e-6)
