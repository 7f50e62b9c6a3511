"""LPIPS with random weights in the layouts of the published files: finding weights, strict loading, values and gradients, training."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import stage1_tokenizer.perceptual_weights as weights_module
from pipelines.stages.stage_checks import check_before_start
from stage1_tokenizer import train as train_module
from stage1_tokenizer.perceptual import LPIPS
from stage1_tokenizer.perceptual_weights import PerceptualWeights, hub_checkpoints, resolve_perceptual_weights
from tests.run_files import records
from tests.test_structure import loaded, modules_after
from tests.tiny import tiny_recipe
from vqmosaic.errors import InputError
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.runs.stage_records import load_record

WIDTHS = (64, 128, 256, 512, 512)
LAYOUT = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
"""torchvision's vgg16().features: a convolution and ReLU for each number, and max pooling for each M."""


def vgg16_features() -> nn.Sequential:
    layers, channels = [], 3
    for width in LAYOUT:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1, device="meta"), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers)


def random_vgg16() -> dict[str, torch.Tensor]:
    """Random tensors with the names of torchvision's vgg16. Those of the classifier are small."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, meta in vgg16_features().state_dict().items():
        deviation = (2 / meta[0].numel()) ** 0.5 if meta.ndim == 4 else 0.1
        tensors[f"features.{name}"] = torch.empty(meta.shape).normal_(0, deviation, generator=generator)
    return tensors | {f"classifier.{index}.{kind}": torch.zeros(2) for index in (0, 3, 6) for kind in ("weight", "bias")}


def random_linear() -> dict[str, torch.Tensor]:
    """Random non-negative tensors with the names in vgg.pth of the lpips package."""
    generator = torch.Generator().manual_seed(1)
    return {f"lin{number}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator) for number, width in enumerate(WIDTHS)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with both weight files."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(random_vgg16(), folder / "vgg16-397923af.pth")
    torch.save(random_linear(), folder / "vgg_lpips.pth")
    return folder


@pytest.fixture(scope="module")
def lpips(weights) -> LPIPS:
    return LPIPS(resolve_perceptual_weights(str(weights)))


@pytest.fixture
def empty_cache(monkeypatch, tmp_path) -> Path:
    """An empty torch hub cache, and neither torchvision nor a package with weights. Returns the cache folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(weights_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: pytest.fail("a download was tried"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def pair(size: int = 32, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.rand(2, channels, size, size, generator=generator) * 2 - 1 for _ in range(2))


# --- finding weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vgg16", weights_module.VGG16_NAMES)
@pytest.mark.parametrize("linear", weights_module.LINEAR_NAMES)
def test_folder_with_both_files_under_any_known_name(empty_cache, tmp_path, vgg16, linear):
    touch(tmp_path / vgg16, tmp_path / linear)
    assert resolve_perceptual_weights(str(tmp_path)) == PerceptualWeights(tmp_path / vgg16, tmp_path / linear)


def test_missing_files_come_from_the_torch_hub_cache(empty_cache, tmp_path):
    own = tmp_path / "own"
    touch(own / "vgg16.pth", empty_cache / "vgg16-397923af.pth", empty_cache / "vgg_lpips.pth")
    expected = PerceptualWeights(own / "vgg16.pth", empty_cache / "vgg_lpips.pth")
    assert resolve_perceptual_weights(str(own)) == resolve_perceptual_weights(str(own / "vgg16.pth")) == expected
    assert resolve_perceptual_weights(None) == PerceptualWeights(empty_cache / "vgg16-397923af.pth", empty_cache / "vgg_lpips.pth")


def test_linear_weights_come_from_an_installed_package(empty_cache, monkeypatch, tmp_path):
    touch(empty_cache / "vgg16-397923af.pth", tmp_path / "torchmetrics/functional/image/lpips_models/vgg.pth")

    def find_spec(name):
        return importlib.util.spec_from_file_location(name, tmp_path / name / "__init__.py", submodule_search_locations=[str(tmp_path / name)])

    monkeypatch.setattr(weights_module.importlib.util, "find_spec", find_spec)
    assert resolve_perceptual_weights(None).linear == tmp_path / "torchmetrics/functional/image/lpips_models/vgg.pth"
    touch(tmp_path / "lpips/weights/v0.1/vgg.pth")
    assert resolve_perceptual_weights(None).linear == tmp_path / "lpips/weights/v0.1/vgg.pth"


def test_error_for_missing_weights_lists_locations_and_remedies(empty_cache):
    with pytest.raises(InputError) as caught:
        resolve_perceptual_weights(None)
    words = str(caught.value)
    for needed in ("tokenizer_training.perceptual_weights is not given", "VGG16", "LPIPS", str(empty_cache / "vgg16-397923af.pth"),
                   str(empty_cache / "vgg_lpips.pth"), "https://download.pytorch.org/models/vgg16-397923af.pth", "pip install lpips",
                   "perceptual_loss to discriminator_features, which needs no weights"):
        assert needed in words
    touch(empty_cache / "vgg_lpips.pth")
    with pytest.raises(InputError) as caught:
        resolve_perceptual_weights(None)
    assert "pip install lpips" not in str(caught.value) and "vgg16-397923af.pth" in str(caught.value)


@pytest.mark.parametrize(("existing", "given", "words"), [
    ([], "nowhere", "does not exist"), (["empty/readme.txt"], "empty", "contains no weight file with a known name"),
    (["alex.pth"], "alex.pth", "has an unknown file name"),
])
def test_wrong_path_is_refused(empty_cache, tmp_path, existing, given, words):
    touch(*(tmp_path / name for name in existing), empty_cache / "vgg16-397923af.pth", empty_cache / "vgg_lpips.pth")
    with pytest.raises(InputError, match=f"perceptual_weights is .*{given}.*{words}.*vgg16-397923af.pth.*vgg_lpips.pth"):
        resolve_perceptual_weights(str(tmp_path / given))


def test_vgg16_is_downloaded_if_torchvision_is_installed(empty_cache, monkeypatch):
    monkeypatch.setattr(weights_module.importlib.util, "find_spec", {"torchvision": importlib.util.spec_from_loader("torchvision", None)}.get)
    touch(empty_cache / "vgg_lpips.pth")
    downloads = []
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda url, target, hash_prefix: downloads.append((url, Path(target), hash_prefix)))
    assert resolve_perceptual_weights(None).vgg16 == empty_cache / "vgg16-397923af.pth"
    assert downloads == [(weights_module.VGG16_URL, empty_cache / "vgg16-397923af.pth", "397923af")]

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(InputError, match=r"download of .*no route to host.*discriminator_features"):
        resolve_perceptual_weights(None)


def test_hub_checkpoints_matches_torch_hub(monkeypatch, tmp_path):
    for variables in ({}, {"XDG_CACHE_HOME": str(tmp_path)}, {"TORCH_HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path)}):
        for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert hub_checkpoints() == Path(torch.hub.get_dir()) / "checkpoints"


def test_resolving_weights_imports_no_heavy_modules(weights):
    code = f"from stage1_tokenizer.perceptual_weights import resolve_perceptual_weights\nresolve_perceptual_weights({str(weights)!r})"
    assert not loaded(modules_after(code), "torch", "torchmetrics", "lpips", "torchvision")


# --- loading weights -----------------------------------------------------------------------------------------------------------


def test_safetensors_and_pickle_files_load_equally(lpips, tmp_path):
    save_file(random_vgg16(), tmp_path / "vgg16.safetensors")
    save_file(random_linear(), tmp_path / "vgg_lpips.safetensors")
    reloaded = LPIPS(resolve_perceptual_weights(str(tmp_path)))
    assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in lpips.state_dict().items())


def with_changed_linear_weights(weights: Path, folder: Path, **changes: torch.Tensor | None) -> PerceptualWeights:
    """Files with valid VGG16 weights, and with linear weights that are changed or, for None, missing."""
    tensors = random_linear() | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "vgg_lpips.pth")
    return PerceptualWeights(weights / "vgg16-397923af.pth", folder / "vgg_lpips.pth")


def test_loading_is_strict(weights, tmp_path):
    files = with_changed_linear_weights(weights, tmp_path, lin0__model__1__weight=None, lin5__model__1__weight=torch.zeros(1, 512, 1, 1),
                                        lin2__model__1__weight=torch.zeros(1, 384, 1, 1))
    with pytest.raises(InputError) as caught:
        LPIPS(files)
    for words in ("vgg_lpips.pth", "missing lin0.model.1.weight", "unexpected lin5.model.1.weight",
                  "lin2.model.1.weight has shape (1, 384, 1, 1), not (1, 256, 1, 1)"):
        assert words in str(caught.value)


def test_weights_of_another_network_are_refused(weights, tmp_path):
    with_norms = random_vgg16() | {"features.1.running_mean": torch.zeros(64), "classifier.9.weight": torch.zeros(2)}
    torch.save(with_norms, tmp_path / "vgg16.pth")
    with pytest.raises(InputError, match=r"unexpected classifier.9.weight; unexpected features.1.running_mean.*without batch norm"):
        LPIPS(PerceptualWeights(tmp_path / "vgg16.pth", weights / "vgg_lpips.pth"))
    with pytest.raises(InputError, match=r"and \d+ more"):
        LPIPS(PerceptualWeights(weights / "vgg_lpips.pth", weights / "vgg_lpips.pth"))


@pytest.mark.parametrize(("name", "content"), [("vgg16.pth", b""), ("vgg16.pth", b"not weights at all"), ("vgg16.pth", b"PK\x03\x04 cut"),
                                               ("vgg16.safetensors", b""), ("vgg16.safetensors", b"\xff" * 64)])
def test_broken_file_is_refused(weights, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is not a weight file"):
        LPIPS(PerceptualWeights(tmp_path / name, weights / "vgg_lpips.pth"))


def test_files_other_than_a_dict_of_tensors_are_refused(weights, tmp_path):
    for content in (nn.Conv2d(1, 1, 1), [1, 2], {"features.0.weight": "words"}):
        torch.save(content, tmp_path / "vgg16.pth")
        with pytest.raises(InputError, match=r"not a weight file|does not hold a dict of tensors"):
            LPIPS(PerceptualWeights(tmp_path / "vgg16.pth", weights / "vgg_lpips.pth"))


def test_lpips_is_frozen_and_keeps_the_global_rng_state(weights, lpips):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    LPIPS(resolve_perceptual_weights(str(weights)))
    assert torch.equal(torch.rand(1), expected)
    assert not lpips.training and not any(parameter.requires_grad for parameter in lpips.parameters())
    assert not any(tensor.is_meta for tensor in lpips.state_dict().values())


# --- values and gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 35])
def test_lpips_matches_torchmetrics(weights, monkeypatch, size):
    reference = pytest.importorskip("torchmetrics.functional.image.lpips")
    features = vgg16_features()
    features.load_state_dict({name.removeprefix("features."): tensor for name, tensor in random_vgg16().items() if name.startswith("features.")},
                             assign=True)
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda net, pretrained: features)
    linear = Path(reference.__file__).parent / "lpips_models" / "vgg.pth"  # trained linear weights with a random VGG16
    ours = LPIPS(PerceptualWeights(weights / "vgg16-397923af.pth", linear))
    first, second = pair(size)
    expected = reference._LPIPS(net="vgg")(first, second).mean()
    assert expected > 0.001
    torch.testing.assert_close(ours(first, second), expected, rtol=1e-4, atol=1e-6)


def installed_weights() -> PerceptualWeights | None:
    """The trained weights, if they are on this machine."""
    files = [hub_checkpoints() / name for name in weights_module.VGG16_NAMES]
    return resolve_perceptual_weights(None) if any(file.is_file() for file in files) else None


@pytest.mark.skipif(installed_weights() is None, reason="needs the trained weights of VGG16")
def test_lpips_with_trained_weights_matches_torchmetrics():
    pytest.importorskip("torchvision")
    from torchmetrics.functional.image.lpips import _LPIPS

    first, second = pair(64)
    torch.testing.assert_close(LPIPS(installed_weights())(first, second), _LPIPS(net="vgg")(first, second).mean(), rtol=1e-4, atol=1e-6)


def test_lpips_is_symmetric_monotonic_and_a_mean_over_images(lpips):
    first, second = pair()
    assert lpips(first, first).item() == 0
    torch.testing.assert_close(lpips(first, second), lpips(second, first))
    small_distance, large_distance = lpips(first, first + 0.1 * (second - first)), lpips(first, second)
    assert 0 < small_distance < large_distance and large_distance.shape == () and large_distance.dtype == torch.float32
    torch.testing.assert_close(large_distance, torch.stack([lpips(first[i:i + 1], second[i:i + 1]) for i in range(2)]).mean(), rtol=1e-4, atol=1e-6)


def test_gray_images_equal_rgb_images_with_equal_channels(lpips):
    first, second = pair(channels=1)
    torch.testing.assert_close(lpips(first, second), lpips(first.repeat(1, 3, 1, 1), second.repeat(1, 3, 1, 1)))


def test_alpha_does_not_count(lpips):
    first, second = torch.rand(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert torch.equal(lpips(first, second), lpips(first[:, :3], second[:, :3]))
    assert torch.equal(lpips(first[:, :2], second[:, :2]), lpips(first[:, :1], second[:, :1]))


def test_gradients_are_nonzero_and_finite_for_equal_images(lpips):
    first, second = pair()
    first.requires_grad_()
    (gradient,) = torch.autograd.grad(lpips(first, second), first)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    with torch.no_grad():
        assert lpips(first - 0.1 * gradient / gradient.abs().max(), second) < lpips(first, second)
    for image in (second, torch.zeros(1, 3, 16, 16), -torch.ones(1, 3, 16, 16)):
        image = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(lpips(image, image.detach()), image)
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_zero_features_have_a_finite_gradient():
    from stage1_tokenizer.perceptual import _normalize_channels

    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    _normalize_channels(features).sum().backward()
    assert torch.isfinite(features.grad).all()


def test_lpips_is_float32_under_autocast_and_for_bf16_images(lpips):
    first, second = (image.bfloat16() for image in pair())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = lpips(first, second)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, lpips(first.float(), second.float()))


def test_too_small_images_are_refused(lpips):
    with pytest.raises(InputError, match=r"\(2, 3, 8, 8\) are too small for LPIPS\. It needs at least 16 pixels"):
        lpips(*pair(8))


# --- training --------------------------------------------------------------------------------------------------------------------


def train(run_dir: Path, **changes) -> list[dict]:
    """Train for two steps and return the logged records."""
    train_module.train(tiny_recipe(run_dir, tokenizer_training__max_steps=2, tokenizer_training__batch_size=4, **changes))
    return records(run_dir, "tokenizer", "train")


def test_training_uses_and_logs_the_perceptual_loss(weights, tmp_path):
    plain = train(tmp_path / "plain")
    records = train(tmp_path / "run", tokenizer_training__perceptual_weight=0.5, tokenizer_training__perceptual_loss="lpips",
                    tokenizer_training__perceptual_weights=weights)
    assert len(records) == 2 and all(math.isfinite(record["perceptual_loss"]) and record["perceptual_loss"] > 0 for record in records)
    assert not any("perceptual_loss" in record for record in plain)
    assert records[0]["reconstruction_loss"] == plain[0]["reconstruction_loss"], "same images and initial weights"
    assert records[0]["gradient_norm"] != pytest.approx(plain[0]["gradient_norm"], rel=1e-3), "the perceptual loss adds a gradient"


def test_training_with_missing_or_broken_weights_is_refused_before_step_0(weights, tmp_path):
    changes = {"tokenizer_training__perceptual_weight": 0.5, "tokenizer_training__perceptual_weights": tmp_path / "nowhere"}
    for call in (lambda: check_before_start(tiny_recipe(tmp_path / "run", **changes), "tokenizer"), lambda: train(tmp_path / "run", **changes)):
        with pytest.raises(InputError, match=r"perceptual_weights is .*nowhere.*does not exist"):
            call()
    (tmp_path / "vgg16.pth").write_bytes(b"cut short")  # the file is found by its name and read only when it is loaded
    (tmp_path / "vgg_lpips.pth").symlink_to(weights / "vgg_lpips.pth")
    with pytest.raises(InputError, match=r"vgg16.pth is not a weight file"):
        train(tmp_path / "run", **changes | {"tokenizer_training__perceptual_weights": tmp_path})
    run = RunFolder(tmp_path / "run")
    assert load_record(run, "tokenizer") is None and not list(run.checkpoints("tokenizer").glob("step-*"))
