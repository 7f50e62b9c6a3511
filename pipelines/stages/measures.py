"""What a finished run can do, measured: copies and variety of generated tokens, and, for digits, whether they are what was asked for."""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F

from pipelines.bundle import evenly_spread
from pipelines.generate import ImageGenerationPipeline
from stage1_tokenizer.data.digits_source import load_scans
from token_shards import TokenShardReader

SAMPLES = 500
SAMPLES_WITHOUT_JUDGE = 100
CHUNK = 4096


def grid_digests(ids_BT: np.ndarray) -> list[bytes]:
    """A short digest of each row of ids, for comparing grids as wholes."""
    return [hashlib.blake2b(np.ascontiguousarray(row, dtype=np.int64).tobytes(), digest_size=16).digest() for row in ids_BT]


def training_grids(reader: TokenShardReader) -> set[bytes]:
    """Digests of every stored view of every training image."""
    found: set[bytes] = set()
    for view in range(len(reader.manifest.views)):
        for start in range(0, len(reader), CHUNK):
            found.update(grid_digests(reader.sequential(start, min(start + CHUNK, len(reader)), view).ids_BT))
    return found


def token_measures(ids_Bhw: torch.Tensor, known: set[bytes]) -> dict[str, float]:
    """copies: share of samples whose grid of tokens is that of a training image in any stored view; distinct: share of different grids."""
    digests = grid_digests(ids_Bhw.flatten(1).numpy())
    return {"copies": sum(digest in known for digest in digests) / len(digests), "distinct": len(set(digests)) / len(digests)}


class DigitsJudge:
    """A scikit-learn SVC trained on the real 8x8 scans, and the spread of the scans within each class."""

    def __init__(self, validation_rows: list[int]):
        from sklearn.svm import SVC

        scans_N88, labels_N = load_scans()  # uint8 0..255
        pixels_NP = scans_N88.reshape(len(scans_N88), -1) / 255
        held_out = np.isin(np.arange(len(labels_N)), validation_rows)
        self.classifier = SVC(C=10, gamma="scale").fit(pixels_NP[~held_out], labels_N[~held_out])
        self.accuracy = float(self.classifier.score(pixels_NP[held_out], labels_N[held_out]))
        self.spread = within_class_spread(pixels_NP, labels_N)

    def measures(self, images_BCHW: torch.Tensor, classes_B: list[int]) -> dict[str, float]:
        """class_agreement: share of samples the classifier calls by the class asked for; spread: pixel spread relative to the scans'."""
        pixels_BP = (F.interpolate(images_BCHW.mean(1, keepdim=True), size=(8, 8), mode="area").flatten(1).numpy() + 1) / 2
        classes = np.asarray(classes_B)
        return {"class_agreement": float((self.classifier.predict(pixels_BP) == classes).mean()),
                "spread": within_class_spread(pixels_BP, classes) / self.spread}


def within_class_spread(pixels_BP: np.ndarray, classes_B: np.ndarray) -> float:
    """Standard deviation of each pixel within each class, averaged over pixels and classes."""
    return float(np.mean([pixels_BP[classes_B == label].std(axis=0).mean() for label in np.unique(classes_B)]))


def measure_generation(pipe: ImageGenerationPipeline, reader: TokenShardReader, seed: int, judge: DigitsJudge | None) -> dict[str, dict[str, float]]:
    """Measures of generated samples under the recommended settings; with a judge also without guidance and at temperature 1."""
    known, names = training_grids(reader), pipe.class_names
    samples = SAMPLES if judge is not None else SAMPLES_WITHOUT_JUDGE
    labels = evenly_spread(len(names), samples) if names else None
    per_label = samples // len(labels) if labels else samples
    settings = {"recommended": {}}
    if judge is not None:
        unguided, plain = {"guidance_scale": 1.0}, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        settings |= {"guidance off": unguided, "temperature 1": plain, "guidance off, temperature 1": unguided | plain}
    results = {}
    for name, changed in settings.items():
        out = pipe(labels, per_label, seed=seed, output_type="pt", **changed)
        results[name] = {"samples": len(out.seeds), **token_measures(out.token_ids, known)}
        if judge is not None:
            results[name].update(judge.measures(out.images, out.class_indices))
    return results
