"""Feature extractors from files: preprocessing, checks of the features, and invalid files."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pipelines.sweep.feature_extractors import FeatureExtractor, FeatureNetwork, load_feature_extractor, normalise_images, timm_network
from pipelines.sweep.feature_file import FeatureFile, resolve_feature_file
from vqmosaic.errors import InputError

CPU = torch.device("cpu")


class Pooled(nn.Module):
    """The first channel averaged over a 4 x 4 grid: 16 features of uint8 images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, 4)[:, 0].flatten(1)


def scripted(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(path)
    return path


class Raw(nn.Module):
    """Returns the input pixels as features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        return images.double().flatten(1)


def test_torchscript_receives_uint8_rgb_of_the_pipeline_size(tmp_path):
    extractor = load_feature_extractor(resolve_feature_file(scripted(Raw(), tmp_path / "raw.pt"), None), 8, CPU)
    assert extractor.num_features == 3 * 8 * 8
    grey_B1HW = torch.arange(2 * 64, dtype=torch.uint8).view(2, 1, 8, 8)
    features_BF = extractor(grey_B1HW)
    assert features_BF.dtype == torch.float64 and torch.equal(features_BF, grey_B1HW.expand(-1, 3, -1, -1).double().flatten(1))
    colour_B3HW = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(extractor(colour_B3HW), colour_B3HW.double().flatten(1))
    alpha_B1HW = torch.zeros_like(grey_B1HW)
    assert torch.equal(extractor(torch.cat([grey_B1HW, alpha_B1HW], 1)), features_BF)
    assert torch.equal(extractor(torch.cat([colour_B3HW, alpha_B1HW], 1)), extractor(colour_B3HW))


def test_return_features_argument_is_used(tmp_path):
    class Classifier(nn.Module):
        def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            features = images.float().mean((2, 3))
            return features if return_features else features.sum(1, keepdim=True)

    assert load_feature_extractor(resolve_feature_file(scripted(Classifier(), tmp_path / "classifier.pt"), None), 8, CPU).num_features == 3


class Unpooled(nn.Module):
    """Returns feature maps instead of vectors."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()[:, :, :1, :1]


class Blind(nn.Module):
    """Returns the same features for all images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(images), 4)


class WantsFloats(nn.Module):
    """A convolution, which does not accept integers."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.convolution(images).mean((2, 3))


@pytest.mark.parametrize(("module", "message"), [
    (Unpooled(), r"returns the shape \(2, 3, 1, 1\) for a batch of two 8 x 8 images \(uint8, 0 to 255\); it must return \(2, F\)"),
    (Blind(), "equal features for a noise image and a black image"),
    (WantsFloats(), r"fails on a batch of two 8 x 8 images \(uint8, 0 to 255\)"),
], ids=["maps", "blind", "floats"])
def test_networks_without_usable_features_are_rejected_on_loading(module, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_feature_extractor(resolve_feature_file(scripted(module, tmp_path / "module.pt"), None), 8, CPU)


def small_network(name: str = "small") -> FeatureNetwork:
    torch.manual_seed(0)
    return FeatureNetwork(module=nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), size=(12, 10), mean=(0.5, 0.4, 0.3),
                        deviation=(0.2, 0.25, 0.5), classifier=("head", "head_dist"))


def feature_file(path: Path) -> FeatureFile:
    return FeatureFile(path=path, model="small", sha256="")


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "wrapped.pth"])
def test_weights_of_a_named_network_are_loaded(suffix, tmp_path):
    trained = small_network().module
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    weights = {**trained.state_dict(), "head.weight": torch.zeros(10, 5), "head_dist.bias": torch.zeros(10)}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if "wrapped" in suffix else weights, path)
    extractor = load_feature_extractor(feature_file(path), 8, CPU, small_network)
    assert extractor.num_features == 5 and not extractor.training and not any(p.requires_grad for p in extractor.parameters())
    pixels_BCHW = torch.full((2, 3, 20, 20), 51, dtype=torch.uint8)
    normalised_B3HW = torch.tensor([(0.2 - 0.5) / 0.2, (0.2 - 0.4) / 0.25, (0.2 - 0.3) / 0.5]).view(1, 3, 1, 1).expand(2, -1, 12, 10)
    assert torch.allclose(extractor(pixels_BCHW).float(), trained(normalised_B3HW), atol=1e-5), "pixels are scaled, resized and normalised"
    assert torch.allclose(extractor(pixels_BCHW[:, :1]), extractor(pixels_BCHW)), "grey images are repeated to 3 channels"


def test_images_are_resized_like_the_image_transform():
    seen = []
    network = small_network()
    hooked = nn.Identity()
    hooked.forward = lambda images_BCHW: seen.append(images_BCHW) or images_BCHW.mean((2, 3))
    named = FeatureNetwork(module=hooked, size=(12, 12), mean=(0.0,) * 3, deviation=(1.0,) * 3, classifier=network.classifier)
    pixels_BCHW = torch.randint(0, 256, (1, 3, 31, 31), dtype=torch.uint8)
    FeatureExtractor(feature_file(Path("none")), hooked, lambda images_BCHW: normalise_images(images_BCHW, named), CPU)(pixels_BCHW)
    by_pillow = np.asarray(Image.fromarray(pixels_BCHW[0].permute(1, 2, 0).numpy()).resize((12, 12), Image.Resampling.BICUBIC))
    assert np.abs(seen[0][0].permute(1, 2, 0).numpy() * 255 - by_pillow).max() < 2, "antialiased bicubic; Pillow rounds between its two passes"


@pytest.mark.parametrize(("change", "message"), [
    ({"0.weight": None}, r"missing 0\.weight"),
    ({"1.extra": torch.zeros(1)}, r"unexpected 1\.extra"),
    ({"headless.weight": torch.zeros(1)}, r"unexpected headless\.weight"),
    ({"0.bias": torch.zeros(7)}, r"0\.bias has shape \(7,\), not \(5,\)"),
], ids=["missing", "unexpected", "like a head", "shape"])
def test_mismatched_weights_are_listed(change, message, tmp_path):
    weights = {name: tensor for name, tensor in {**small_network().module.state_dict(), **change}.items() if tensor is not None}
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=rf"does not contain the weights of --features_model small: {message}"):
        load_feature_extractor(feature_file(tmp_path / "weights.safetensors"), 8, CPU, small_network)


def test_files_of_another_kind_are_rejected(tmp_path, monkeypatch):
    features = scripted(Pooled(), tmp_path / "pooled.pt")
    class MaliciousPickle:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"a": MaliciousPickle()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pt").write_text("not a network")
    with pytest.raises(InputError, match=r"not a TorchScript module.*add --features_model NAME"):
        load_feature_extractor(resolve_feature_file(tmp_path / "text.pt", None), 8, CPU)
    with pytest.raises(InputError, match="not a TorchScript module"):
        load_feature_extractor(resolve_feature_file(tmp_path / "evil.pth", None), 8, CPU)
    for name, message in (("evil.pth", "not a weights file"), ("list.pth", "does not contain only named tensors"), ("text.pt", "not a weights file")):
        with pytest.raises(InputError, match=message):
            load_feature_extractor(feature_file(tmp_path / name), 8, CPU, small_network)
    with pytest.raises(InputError, match="For a TorchScript file, omit --features_model"):
        load_feature_extractor(feature_file(features), 8, CPU, small_network)
    assert not (tmp_path / "ran").exists(), "no pickle was executed"

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs timm, but timm is not installed: pip install 'vqmosaic"):
        resolve_feature_file(features, "resnet18")


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_weights_of_a_timm_model(tmp_path):
    import timm

    torch.manual_seed(0)
    save_file(timm.create_model("resnet18", pretrained=False).state_dict(), tmp_path / "resnet18.safetensors")
    extractor = load_feature_extractor(resolve_feature_file(tmp_path / "resnet18.safetensors", "resnet18"), 16, CPU)
    assert extractor.num_features == 512
    with pytest.raises(InputError, match=r"does not contain the weights of --features_model resnet34: missing layer"):
        load_feature_extractor(resolve_feature_file(tmp_path / "resnet18.safetensors", "resnet34"), 16, CPU)
    with pytest.raises(InputError, match=r"'resnet_18', which is not one of .* Did you mean 'resnet18'"):
        timm_network("resnet_18")
