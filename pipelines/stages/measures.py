"""Measures of generated samples: copies of training images, distinct samples and, for digits, agreement with the requested class."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pipelines.condition_inputs import ConditionInputs
from pipelines.generate import ImageGenerationPipeline
from pipelines.labels import evenly_spaced_classes
from pipelines.stages.stored_conditions import stored_images
from stage1_tokenizer.data.digits_source import load_mnist, load_scans
from stage1_tokenizer.image_files.channels import colour_channels
from stage1_tokenizer.image_files.images import to_tensor, to_uint8
from token_shards import TokenShardReader
from token_shards.manifest import grid_columns
from vqmosaic.recipes.recipe_sections import SamplingConfig

SAMPLES = 500
SAMPLES_WITHOUT_CLASSIFIER = 100
CHUNK_IMAGES = 4096


def grid_digests(ids_BT: np.ndarray) -> list[bytes]:
    """A 16-byte digest of each row of ids, used to compare whole grids."""
    return [hashlib.blake2b(np.ascontiguousarray(row, dtype=np.int64).tobytes(), digest_size=16).digest() for row in ids_BT]


def training_grids(reader: TokenShardReader, names: Sequence[str]) -> set[bytes]:
    """Digests of the grids with these names in every stored view of every training image."""
    digests: set[bytes] = set()
    columns = grid_columns(reader.manifest.grids)
    columns_T = np.concatenate([np.arange(columns[name].start, columns[name].stop) for name in names])
    for view in range(len(reader.manifest.views)):
        for start in range(0, len(reader), CHUNK_IMAGES):
            digests.update(grid_digests(reader.sequential(start, min(start + CHUNK_IMAGES, len(reader)), view).ids_BT[:, columns_T]))
    return digests


def token_measures(ids_Bhw: torch.Tensor, training_digests: set[bytes]) -> dict[str, float]:
    """copies: fraction of samples whose token grid equals that of a training image in any stored view; distinct: fraction of distinct grids."""
    digests = grid_digests(ids_Bhw.flatten(1).numpy())
    return {"copies": sum(digest in training_digests for digest in digests) / len(digests), "distinct": len(set(digests)) / len(digests)}


class DigitsClassifier:
    """A scikit-learn SVC trained on the real 8x8 scans, or on MNIST at 14x14 pixels, and the spread of these images within each class."""

    def __init__(self, validation_rows: list[int], source: str = "digits"):
        from sklearn.svm import SVC

        images_NHW, labels_N = load_mnist() if source == "mnist" else load_scans()  # uint8 0..255
        if source == "mnist":
            images_NHW = images_NHW.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4))
        self.sides = images_NHW.shape[1:]
        pixels_NP = images_NHW.reshape(len(images_NHW), -1) / 255
        held_out = np.isin(np.arange(len(labels_N)), validation_rows)
        self.svc = SVC(C=10, gamma="scale").fit(pixels_NP[~held_out], labels_N[~held_out])
        self.accuracy = float(self.svc.score(pixels_NP[held_out], labels_N[held_out]))
        self.spread = within_class_spread(pixels_NP, labels_N)

    def measures(self, images_BCHW: torch.Tensor, classes_B: list[int]) -> dict[str, float]:
        """class_agreement: fraction of samples classified as the requested class; spread: pixel spread relative to that of real images."""
        pixels_BP = (F.interpolate(colour_channels(images_BCHW).mean(1, keepdim=True), size=self.sides, mode="area").flatten(1).numpy() + 1) / 2
        classes = np.asarray(classes_B)
        return {"class_agreement": float((self.svc.predict(pixels_BP) == classes).mean()),
                "spread": within_class_spread(pixels_BP, classes) / self.spread}


def within_class_spread(pixels_BP: np.ndarray, classes_B: np.ndarray) -> float:
    """Standard deviation of each pixel within each class, averaged over pixels and classes."""
    return float(np.mean([pixels_BP[classes_B == label].std(axis=0).mean() for label in np.unique(classes_B)]))


def measure_generation(pipe: ImageGenerationPipeline, reader: TokenShardReader, seed: int, classifier: DigitsClassifier | None,
                       held_out: TokenShardReader | None = None) -> dict[str, dict[str, float]]:
    """Measures of samples generated with the recommended settings and, if a classifier is given, also without guidance and at temperature 1.

    Settings that equal earlier ones, such as those without guidance if none is recommended, are left out.

    A prior with conditions gets those of validation images, from the shards of `held_out`. psnr_of_<condition> compares a condition that is derived
    from the samples (such as their low resolution) with the given one.
    """
    training_digests, names = training_grids(reader, [grid.name for grid in pipe.tokenizer.grids]), pipe.vocabulary.learned_class_names
    samples = SAMPLES if classifier is not None else SAMPLES_WITHOUT_CLASSIFIER
    labels = evenly_spaced_classes(len(names), samples) if names else None
    per_label = samples // len(labels) if labels else samples
    settings: dict[str, dict[str, Any]] = {"recommended": {}}
    if classifier is not None:
        unguided: dict[str, Any] = {"guidance_scale": 1.0, "guidance": {}}
        plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        settings |= {"guidance off": unguided, "temperature 1": plain, "guidance off, temperature 1": unguided | plain}
    request: dict[str, Any] = {"class_labels": labels, "num_images_per_label": per_label}
    classes = None if labels is None else [label for label in labels for _ in range(per_label)]
    if held_out is not None:
        stored = stored_images(held_out, pipe.chain.vocabularies, samples)
        if pipe.vocabulary.why_not_sampled(stored.classes is not None, stored.ids):
            return {}  # no validation image has a class, and the prior has not learned to sample without one
        class_labels, given_ids = stored.learned_by(pipe.vocabulary)
        request, classes = {"class_labels": class_labels, "given_ids": given_ids}, stored.classes
    results: dict[str, dict[str, float]] = {}
    measured: list[SamplingConfig] = []
    for name, changed in settings.items():
        sampling = dataclasses.replace(pipe.sampling, **changed)
        if sampling in measured:
            continue
        measured.append(sampling)
        out = pipe(**request, seed=seed, output_type="pt", **changed)
        assert isinstance(out.images, torch.Tensor) and out.token_ids is not None  # as output_type says, and nothing stops the sampling
        results[name] = {"samples": len(out.seeds), **token_measures(pipe.tokenizer.join_tokens(out.token_ids), training_digests)}
        if classifier is not None and classes is not None:  # a prior that is not given the class can learn it from the caption
            results[name].update(classifier.measures(out.images, classes))
        results[name].update(condition_psnr(pipe.inputs, out.images, out.given_ids))
    return results


def condition_psnr(inputs: ConditionInputs, images_BCHW: torch.Tensor, given: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """psnr_of_<name> for each condition that is derived from an image: PSNR in dB between those derived from images and the given ones (decoded)."""
    psnr = {}
    for name in inputs.tokenizers:
        transform = inputs.tokenizers[name].transform
        if transform.derived is None or name not in given:
            continue
        found_BCHW = to_tensor(np.stack([transform.derive(pixels_HWC) for pixels_HWC in to_uint8(images_BCHW)]))
        error = (found_BCHW - inputs.decode_images(name, given[name])).double().square().mean().item() / 4  # of values in [0, 1]
        psnr[f"psnr_of_{name}"] = -10 * math.log10(max(error, 1e-14))
    return psnr
