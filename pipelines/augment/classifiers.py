"""Loads the image classifier of `vqmosaic augment` from local files.

    TorchScript file        takes uint8 images 0..255, (B, 3, H, W), in the image size of the pipeline, does its own resizing and scaling, and returns
                            logits (B, classes)
    folder of transformers  an image classifier with its image processor, saved by save_pretrained as safetensors

Grey images are repeated to three channels. A TorchScript file is a program: use only files from sources that you would install a package from.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from pipelines.augment.classifier_file import TORCHSCRIPT, ClassifierFile
from stage1_tokenizer.image_files.channels import colour_channels
from stage1_tokenizer.image_files.images import to_uint8
from stage2_prior.model.causal_lm import quiet_transformers
from vqmosaic.errors import InputError
from vqmosaic.recipes.image_sizes import ImageSize, height_and_width


class Classifier:
    """Predicts the classes of images. `accepts` can be the argument `accept` of `ImageGenerationPipeline.labelled_batches`."""

    def __init__(self, file: ClassifierFile, model: nn.Module, processor: Any, num_classes: int, device: torch.device):
        """`processor` is that of transformers, or None for TorchScript. `num_classes` is the number of classes of the pipeline."""
        self.file, self.model, self.processor, self.device = file, model.eval(), processor, device
        self.label_classes = tuple(range(num_classes)) if file.label_classes is None else file.label_classes

    @torch.inference_mode()
    def logits(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Logits (B, labels) for images (B, C, H, W) in [-1, 1], rounded to 8 bits as in a PNG file."""
        pixels_BHWC = torch.from_numpy(to_uint8(images_BCHW))
        pixels_B3HW = colour_channels(pixels_BHWC.movedim(-1, 1)).expand(-1, 3, -1, -1).contiguous()
        if self.processor is None:
            return self.model(pixels_B3HW.to(self.device))
        pictures = [Image.fromarray(pixels_HWC.numpy()) for pixels_HWC in pixels_B3HW.movedim(1, -1).contiguous()]
        return self.model(**self.processor(images=pictures, return_tensors="pt").to(self.device)).logits

    def accepts(self, images_BCHW: torch.Tensor, classes: Sequence[int]) -> torch.Tensor:
        """Whether the predicted class of each image is the requested one, bool (B,)."""
        found = [self.label_classes[label] for label in self.logits(images_BCHW).argmax(dim=1).tolist()]
        return torch.tensor([own == requested for own, requested in zip(found, classes, strict=True)])

    def check_on_test_batch(self, channels: int, image_size: ImageSize) -> None:
        """Classify two black images. Raises InputError if this fails, or if the logits are not one number for each label."""
        name = f"--classifier {self.file.path}"
        try:
            logits = self.logits(torch.full((2, channels, *height_and_width(image_size)), -1.0))
            shape = tuple(logits.shape)
        except Exception as error:  # a user's network can raise anything
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise InputError(f"{name} fails on a batch of two black images: {reason[0][:300]}") from error
        if shape != (2, len(self.label_classes)):
            why = "one for each class of the pipeline; its outputs have no names" if self.file.label_classes is None else "one for each of its labels"
            raise InputError(f"{name} returns the shape {shape} for two images; it must return (2, {len(self.label_classes)}): {why}.")


def load_classifier(file: ClassifierFile, num_classes: int, channels: int, image_size: ImageSize, device: torch.device) -> Classifier:
    """The classifier in a file or folder, checked on a batch of images of this size. Raises InputError if it cannot be loaded or does not work."""
    model, processor = load_torchscript(file, device) if file.kind == TORCHSCRIPT else load_transformers(file, device)
    classifier = Classifier(file, model, processor, num_classes, device)
    classifier.check_on_test_batch(channels, image_size)
    return classifier


def load_torchscript(file: ClassifierFile, device: torch.device) -> tuple[nn.Module, None]:
    """The module in a TorchScript file, and no processor."""
    try:
        return torch.jit.load(file.path, map_location=device), None
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"--classifier {file.path} is not a TorchScript module: {' '.join(str(error).split())[:200]}") from error


def load_transformers(file: ClassifierFile, device: torch.device) -> tuple[nn.Module, Any]:
    """The model and the image processor in a folder. Reads safetensors only, and no code."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        with quiet_transformers():
            processor = AutoImageProcessor.from_pretrained(file.path, local_files_only=True, trust_remote_code=False)
            model, loaded = AutoModelForImageClassification.from_pretrained(file.path, local_files_only=True, use_safetensors=True,
                                                                            trust_remote_code=False, output_loading_info=True)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise InputError(f"--classifier {file.path} cannot be loaded as an image classifier of transformers: "
                         f"{' '.join(str(error).split())[:300]}") from error
    if loaded["missing_keys"]:
        raise InputError(f"--classifier {file.path} lacks weights of the model, such as {min(loaded['missing_keys'])}, so its predictions would be "
                         "random. Give a folder with a model that was trained as an image classifier.")
    return model.to(device), processor
