"""vqmosaic sweep: ranking of settings, resuming, the record in the bundle, and invalid arguments."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pipelines import ImageGenerationPipeline, make_bundle
from pipelines.bundle import read_bundle, recommend
from pipelines.command_line import dispatch
from pipelines.sweep import sweep as sweep_module
from pipelines.sweep import sweep_plan
from pipelines.sweep.feature_extractors import load_feature_extractor
from pipelines.sweep.feature_file import resolve_feature_file
from pipelines.sweep.random_subset import RandomSubset
from pipelines.sweep.sweep import Distances, class_counts, open_all_images, run_sweep
from pipelines.sweep.sweep_plan import SweepRequest, combine, parse_values, sweepable_fields
from pipelines.sweep.sweep_record import SweepRecord
from stage1_tokenizer import ImageTokenizer
from stage1_tokenizer.image_files.images import ImageTransform, to_uint8
from stage2_prior.prior import TokenPrior
from tests.test_feature_extractors import Pooled, feature_file, scripted, small_network
from tests.test_pipeline import prior_like
from tests.test_structure import SLOW, called, loaded, modules_after
from tests.tiny import CODES, ROOT, command, tiny_recipe
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.interruption import Interrupted
from vqmosaic.runs.run_folder import locked

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    return scripted(Pooled(), tmp_path_factory.mktemp("features") / "pooled.pt")


def sweep(*arguments: object) -> int:
    return dispatch(["sweep", *map(str, arguments)])


def results_of(path: Path) -> dict[str, tuple[float, ...]]:
    """Distances in a record, by settings as JSON."""
    names = ("frechet_distance", "kernel_distance", "kernel_deviation")
    return {json.dumps(result["settings"]): tuple(result[name] for name in names) for result in json.loads(path.read_text())["results"]}


def bundle_of(run: Path) -> dict:
    return json.loads((run / "pipeline" / "pipeline.json").read_text())


# --- ranking -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(tiny_run, tmp_path_factory) -> tuple[Path, Path]:
    """(pipeline, folder of images): a prior trained to imitate a known distribution, and images drawn from that distribution.

    Every token of class c is code c with probability 3/4, code c + 10 with 1/4. The images are stored in class folders, in unequal numbers.
    """
    folder = tmp_path_factory.mktemp("known")
    pipe = ImageGenerationPipeline.from_pretrained(tiny_run, device="cpu")
    prior, draw = TokenPrior.from_config(tiny_recipe("unused").prior, pipe.prior.vocabulary, 0), torch.Generator().manual_seed(0)

    def drawn(classes_B: torch.Tensor) -> torch.Tensor:
        return classes_B[:, None] + 10 * (torch.rand(len(classes_B), pipe.prior.vocabulary.num_tokens, generator=draw) < 0.25).long()

    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
    for _ in range(60):
        classes_B = torch.randint(10, (64,), generator=draw)
        optimizer.zero_grad()
        prior.loss(drawn(classes_B), classes_B).backward()
        optimizer.step()
    prior.save_pretrained(folder / "prior")
    make_bundle(tiny_run / "tokenizer", folder / "prior", folder / "pipeline", SamplingConfig())
    classes_B = torch.tensor([label for label in range(10) for _ in range(10 + 4 * label)])
    pixels_BHWC = to_uint8(pipe.tokenizer.decode(drawn(classes_B).view(len(classes_B), *pipe.tokenizer.grid_shape)))
    for number, (label, pixels_HWC) in enumerate(zip(classes_B.tolist(), pixels_BHWC, strict=True)):
        (folder / "real" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_HWC[..., 0]).save(folder / "real" / str(label) / f"{number}.png")
    return folder / "pipeline", folder / "real"


@pytest.fixture
def known_copy(known, tmp_path) -> tuple[Path, Path]:
    """`known` with a copy of the pipeline that a test may change."""
    shutil.copytree(known[0], tmp_path / "pipeline")
    return tmp_path / "pipeline", known[1]


def test_best_settings_win_and_are_recommended(known_copy, features, capsys):
    pipeline, real = known_copy
    sampling_before = read_bundle(pipeline)["sampling"]
    assert sweep(pipeline, "--real", real, "--features", features, "--images", 280, "--temperature", "100,1,0", "--device", "cpu") == 0
    output = capsys.readouterr().out
    record = json.loads((pipeline.parent / "sweep.json").read_text())
    frechet = {result["settings"]["temperature"]: result["frechet_distance"] for result in record["results"]}
    kernel = {result["settings"]["temperature"]: result["kernel_distance"] for result in record["results"]}
    assert frechet[1.0] < 0.5 * min(frechet[0.0], frechet[100.0]), "temperature 0 has no variety, temperature 100 is noise"
    assert kernel[1.0] < 0.5 * min(kernel[0.0], kernel[100.0])
    assert record["setup"]["images_of_class"] == [10 + 4 * label for label in range(10)], "the proportions of the real images"

    content = read_bundle(pipeline)
    assert content["sampling"] == {**sampling_before, "temperature": 1.0} and content["sweep"] == record
    assert "warning: 280 generated and 280 real images" in output and "kernel" in output
    table = [line.split() for line in output.partition("ranked (")[2].splitlines()[1:5]]
    assert table[0] == ["temperature", "Frechet", "kernel"] and [row[0] for row in table[1:]] == ["1.", "2.", "3."]
    assert table[1][1] == "1" and [float(row[2]) for row in table[1:]] == pytest.approx(sorted(frechet.values()), rel=1e-5)


def test_generation_uses_the_chosen_settings_by_default(known_copy, features, tmp_path):
    pipeline, real = known_copy
    assert sweep(pipeline, "--real", real, "--features", features, "--images", 20, "--top_k", "1,2", "--temperature", "1", "--top_p", "0.9") == 0
    chosen = read_bundle(pipeline)["sampling"]
    pipe = ImageGenerationPipeline.from_pretrained(pipeline, device="cpu")
    assert (chosen["top_p"], chosen["temperature"]) == (0.9, 1.0) and pipe.sampling == SamplingConfig(**chosen)
    assert torch.equal(pipe([3, 4], 8, seed=1).token_ids, pipe([3, 4], 8, seed=1, top_k=chosen["top_k"], top_p=0.9).token_ids)
    other = {"top_k": 3 - chosen["top_k"], "top_p": 1.0}
    assert not torch.equal(pipe([3, 4], 8, seed=1).token_ids, pipe([3, 4], 8, seed=1, **other).token_ids)
    assert dispatch(["generate", str(pipeline), "--num", "1", "--classes", "3", "--out", str(tmp_path / "samples")]) == 0


def test_equal_seeds_give_equal_distances(known, features, tmp_path):
    pipeline, real = known
    common = (pipeline, "--real", real, "--features", features, "--images", 30, "--temperature", "1,2", "--keep", "--device", "cpu")
    for name, options in {"first": (), "again": (), "batches": ("--batch_size", 7), "other": ("--seed", 1)}.items():
        assert sweep(*common, "--out", tmp_path / name, *options) == 0
    first, again, batches, other = (results_of(tmp_path / name) for name in ("first", "again", "batches", "other"))
    assert first == again and len(first) == 2
    for settings, distances in first.items():
        assert batches[settings] == pytest.approx(distances, rel=1e-6), "images do not depend on the batch size"
        assert other[settings][0] != distances[0]


def test_validation_images_of_the_run_are_the_default_reference(tiny_copy, features, capsys):
    before = bundle_of(tiny_copy)
    assert sweep(tiny_copy, "--features", features, "--images", 20, "--temperature", "0.5,1") == 0
    assert "379 images, the validation split of digits" in capsys.readouterr().out
    after = bundle_of(tiny_copy)
    setup, reference = after["sweep"]["setup"], after["sweep"]["reference"]
    assert (setup["real"]["split"], setup["real"]["count"], reference) == ("validation", 379, {"images": 379, "unreadable": []})
    assert setup["real"]["transform"] == {"image_size": 16, "channels": 1, "resampling": "bicubic"}
    assert setup["features"] == {"kind": "torchscript", "file": "pooled.pt", "model": None, "count": 16,
                                 "sha256": resolve_feature_file(features, None).sha256}
    assert setup["pipeline"]["tokens"] == after["token_fingerprint"] and {"torch", "torchmetrics"} <= set(after["sweep"]["results"][0]["versions"])
    assert {name: value for name, value in after.items() if name not in ("sampling", "sweep")} == \
        {name: value for name, value in before.items() if name != "sampling"}
    assert dispatch(["run", str(tiny_copy)]) == 0 and bundle_of(tiny_copy) == after, "a finished run stays finished"


@pytest.mark.parametrize("inside", [".", "pipeline"])
def test_run_is_found_from_inside_its_folder(inside, tiny_copy, features, monkeypatch):
    monkeypatch.chdir(tiny_copy / inside)
    assert sweep(".", "--features", features, "--images", 10, "--temperature", "1") == 0
    assert (tiny_copy / "sweep.json").is_file() and bundle_of(tiny_copy)["sweep"]["setup"]["real"]["kind"] == "digits"
    assert not (tiny_copy / "pipeline" / "sweep.json").exists()


def test_guidance_is_compared_by_default(tiny_copy, features, capsys):
    assert sweep(tiny_copy, "--features", features, "--images", 10, "--dry_run") == 0
    assert f"each of {len(sweep_plan.GUIDANCE_GRID['guidance_scale'])} combinations" in capsys.readouterr().out


# --- distances ---------------------------------------------------------------------------------------------------------------


def test_distances_match_the_formulas(features):
    """Compare with the closed form, computed from eigenvalues of a symmetric matrix, and with the unbiased kernel estimator over all images."""
    extractor = load_feature_extractor(resolve_feature_file(features, None), 16, CPU)
    distances, draw = Distances(extractor), torch.Generator().manual_seed(0)
    real_BCHW, fake_BCHW = (torch.rand(60, 1, 16, 16, generator=draw) * scale - shift for scale, shift in ((2, 1), (1, 0.7)))
    for images_BCHW, is_real in ((real_BCHW, True), (fake_BCHW, False)):
        for part in images_BCHW.split(25):
            distances.update(part, real=is_real)
    result = distances.result(seed=0)

    x, y = (extractor(torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)).numpy() for images in (real_BCHW, fake_BCHW))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(a)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    both = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    assert result["frechet_distance"] == pytest.approx(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * both, rel=1e-9)
    kxx, kyy, kxy = ((p @ q.T / 16 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    unbiased = sum((k.sum() - np.trace(k)) / (60 * 59) for k in (kxx, kyy)) - 2 * kxy.mean()
    assert result["kernel_distance"] == pytest.approx(unbiased, rel=1e-9)

    distances.update(real_BCHW, real=False)
    assert distances.result(seed=0)["frechet_distance"] == pytest.approx(0, abs=1e-6), "earlier generated images are dropped, real images are kept"


class FirstPixels(nn.Module):
    """A fake feature extractor that returns the first four pixels, in [0, 1]."""

    num_features = 4

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return images_BCHW.flatten(1)[:, :4].double() / 255


def class_images(classes: list[int], seed: int) -> torch.Tensor:
    """Images (N, 1, 2, 2) of ten classes that differ in brightness."""
    noise = torch.randn(len(classes), 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    return (torch.tensor(classes)[:, None, None, None] / 6.25 - 0.8 + 0.05 * noise).clamp(-1, 1)


def distances_in_order(real_order: list[int], fake_order: list[int], batch_size: int = 500) -> dict[str, float]:
    distances = Distances(FirstPixels())
    for seed, (order, is_real) in enumerate(((real_order, True), (fake_order, False))):
        for part in class_images(order, seed).split(batch_size):
            distances.update(part, real=is_real)
    return distances.result(seed=0)


@pytest.mark.parametrize("real, fake", [(1, 4), (4, 1), (4, 4)])
def test_distances_of_equal_distributions_are_zero_for_any_number_of_images(real, fake, monkeypatch):
    """Images are sorted by class, so the first images belong to the first classes."""
    monkeypatch.setattr(sweep_module, "KERNEL_IMAGES", 2000)
    real_order, fake_order = (sorted(list(range(10)) * 200 * times) for times in (real, fake))
    result = distances_in_order(real_order, fake_order)
    assert abs(result["kernel_distance"]) < 0.005 and result["frechet_distance"] < 0.005
    assert distances_in_order(real_order, sorted(list(range(5)) * 400 * fake))["kernel_distance"] > 0.1, "five classes are another distribution"
    assert distances_in_order(real_order, fake_order, batch_size=77) == pytest.approx(result, rel=1e-9), "independent of the batch size"


def test_each_combination_is_measured_independently(monkeypatch):
    """A resumed sweep measures fewer combinations in one process, but must give the same distances."""
    monkeypatch.setattr(sweep_module, "KERNEL_IMAGES", 100)
    real_BCHW, fake_BCHW = class_images(list(range(10)) * 15, 0), class_images(list(range(10)) * 30, 1)
    distances = Distances(FirstPixels())
    distances.update(real_BCHW, real=True)
    found = []
    for _ in range(2):
        distances.update(fake_BCHW, real=False)
        found.append(distances.result(seed=0))
    assert found[0] == found[1]


@pytest.mark.parametrize("count", [0, 1, 7, 30])
def test_random_subset_keeps_few_rows_in_order(count):
    subset, rows_BF = RandomSubset(30, "test"), torch.arange(2 * count).view(-1, 2)
    for part in rows_BF.split(4):
        subset.update(part)
    assert subset.count == count and (count == 0 or torch.equal(subset.rows(), rows_BF))


def test_random_subset_is_uniform_over_positions():
    """In 1,000 draws of 20 rows out of 100, each row is drawn 200 times on average, with a standard deviation of 12.6."""
    drawn = torch.zeros(100)
    for seed in range(1000):
        subset = RandomSubset(20, seed)
        for part in torch.arange(100)[:, None].split(33):
            subset.update(part)
        rows = subset.rows().flatten()
        assert len(rows.unique()) == 20
        drawn[rows] += 1
    assert (drawn - 200).abs().max() < 51


def test_record_with_only_the_first_images_is_rejected(known_copy, features, monkeypatch):
    """Its kernel distances are not comparable with new ones if there are more than KERNEL_IMAGES images."""
    pipeline, real = known_copy
    monkeypatch.setattr(sweep_module, "KERNEL_IMAGES", 50)
    common = (pipeline, "--real", real, "--features", features, "--temperature", "1", "--keep", "--device", "cpu")
    assert sweep(*common, "--images", 60) == 0
    path = pipeline.parent / "sweep.json"
    record = json.loads(path.read_text())
    del record["setup"]["kernel"]["images_chosen"]
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"kernel\.images_chosen was None, now it is 'at random'"):
        sweep(*common, "--images", 60)
    monkeypatch.setattr(sweep_module, "KERNEL_IMAGES", 10_000)
    assert sweep(*common, "--images", 60, "--out", pipeline.parent / "few.json") == 0
    assert "images_chosen" not in json.loads((pipeline.parent / "few.json").read_text())["setup"]["kernel"]


def test_non_finite_features_are_rejected(tmp_path):
    class Divides(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 1 / (images.float().mean((2, 3)) - 255)

    distances = Distances(load_feature_extractor(resolve_feature_file(scripted(Divides(), tmp_path / "divides.pt"), None), 8, CPU))
    with pytest.raises(InputError, match="not finite for generated images"):
        distances.update(torch.ones(1, 3, 8, 8), real=False)


@dataclass
class Labelled:
    """An image source with labels only."""

    labels: list[int | None]

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int | None:
        return self.labels[index]


def test_class_counts_follow_the_proportions_of_the_data():
    names = ["a", "b", "c"]
    assert class_counts(names, Labelled([0] * 6 + [2] * 2), 4)[0] == [3, 0, 1]
    assert class_counts(names, Labelled([0, 1, 2, None, None]), 5)[0] == [2, 2, 1], "equal remainders go to the lower class"
    assert class_counts(names, Labelled([0] * 5 + [1] * 3 + [2] * 2), 3)[0] == [1, 1, 1], "largest remainders first"
    counts, description = class_counts(names, None, 7)
    assert counts == [3, 2, 2] and "equal proportions" in description
    assert class_counts(None, None, 7) == (None, "without classes")
    for images in range(2, 60):
        assert sum(class_counts(names, Labelled([0] * 7 + [1] * 5 + [2] * 3), images)[0]) == images
    few, _ = class_counts([str(number) for number in range(1000)], None, 100)
    assert sum(few) == 100 and max(few) == 1 and 25 < sum(few[:500]) < 75, "fewer images than classes are not limited to the first classes"


# --- resuming ----------------------------------------------------------------------------------------------------------------


def test_stopped_sweep_resumes_with_the_missing_combinations(known_copy, features, tmp_path, monkeypatch):
    pipeline, real = known_copy
    common = (pipeline, "--real", real, "--features", features, "--images", 20, "--device", "cpu")
    complete = tmp_path / "whole.json"
    assert sweep(*common, "--temperature", "0.5,1,2", "--out", complete, "--keep") == 0
    assert "sweep" not in read_bundle(pipeline), "--keep leaves the bundle unchanged"

    before, add = (pipeline / "pipeline.json").read_bytes(), SweepRecord.add
    with monkeypatch.context() as patched:
        patched.setattr(SweepRecord, "add", lambda record, *args, **numbers: (add(record, *args, **numbers), os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(Interrupted, match="stopped by SIGTERM; 1 combination is in") as stopped:
            sweep(*common, "--temperature", "0.5,1,2")
    assert stopped.value.exit_code == 143 and (pipeline / "pipeline.json").read_bytes() == before
    record = pipeline.parent / "sweep.json"
    first = json.loads(record.read_text())["results"]
    assert len(first) == 1

    measured = []
    monkeypatch.setattr(SweepRecord, "add", lambda record, sampling, **numbers: (
        measured.append(sampling.temperature), add(record, sampling, **numbers)))
    assert sweep(*common, "--temperature", "0.5,1,2") == 0
    assert measured == [1.0, 2.0] and json.loads(record.read_text())["results"][0] == first[0], "finished combinations are not measured again"
    assert results_of(record) == results_of(complete)
    assert read_bundle(pipeline)["sweep"] == json.loads(record.read_text())

    assert sweep(*common, "--temperature", "1,2") == 0 and measured == [1.0, 2.0], "nothing to measure"
    assert sweep(*common, "--temperature", "1,4") == 0 and measured == [1.0, 2.0, 4.0], "a grid may be extended"


@pytest.mark.slow
def test_ctrl_c_leaves_a_complete_record(known_copy, features):
    """SIGINT to a subprocess: exit code 130 and a message without traceback."""
    pipeline, real = known_copy
    code = ("import os, signal, sys\nfrom pipelines import command_line\nfrom pipelines.sweep import sweep_record\n"
            "add = sweep_record.SweepRecord.add\n"
            "def add_and_stop(record, *args, **numbers):\n    add(record, *args, **numbers)\n    os.kill(os.getpid(), signal.SIGINT)\n"
            "sweep_record.SweepRecord.add = add_and_stop\nsys.argv[0] = 'vqmosaic'\ncommand_line.main()\n")
    result = run_code(code, "sweep", pipeline, "--real", real, "--features", features, "--images", 20, "--temperature", "1,2")
    assert result.returncode == 130 and "Traceback" not in result.stderr, result.stderr
    assert "1 combination is in" in result.stderr and "Run the same command to continue" in result.stderr
    assert len(results_of(pipeline.parent / "sweep.json")) == 1


def run_code(code: str, *arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_real_images_may_move_and_records_of_version_0_1_0_are_resumed(known, features, tmp_path):
    pipeline, real = known
    record, moved = tmp_path / "record.json", shutil.copytree(real, tmp_path / "elsewhere")
    common = ("--features", features, "--temperature", "1", "--keep", "--out", record, "--images", 20)
    assert sweep(pipeline, "--real", real, *common) == 0
    assert sweep(pipeline, "--real", moved, *common) == 0 and len(results_of(record)) == 1
    content = json.loads(record.read_text())
    transform = content["setup"]["real"]["transform"]
    names = ImageTokenizer.from_pretrained(pipeline / "tokenizer").class_names
    former = open_all_images(real, ImageTransform.from_dict(transform), names).former_identity
    content["setup"]["real"] = former | {"transform": transform}
    record.write_text(json.dumps(content))
    assert sweep(pipeline, "--real", real, *common) == 0 and len(results_of(record)) == 1
    content["setup"]["real"]["sha256"] = "0" * 64
    record.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"real\.sha256 differs"):
        sweep(pipeline, "--real", real, *common)


def test_rerunning_a_finished_sweep_measures_nothing(known_copy, features, capsys, monkeypatch):
    pipeline, real = known_copy
    common = (pipeline, "--real", real, "--features", features, "--images", 20, "--temperature", "1,2")
    assert sweep(*common) == 0 and "nothing was measured" not in capsys.readouterr().out
    monkeypatch.setattr(ImageGenerationPipeline, "batches", None)
    assert sweep(*common) == 0
    output = capsys.readouterr().out
    assert "nothing to do: 2 combinations are in the record already, so nothing was measured" in output and "ranked (" in output
    monkeypatch.setattr("vqmosaic.runs.run_folder.LOCK_WAIT_SECONDS", 0.3)
    record = pipeline.parent / "sweep.json"
    with locked(record, "--out", record.with_name(".lock-sweep.json")), pytest.raises(InputError, match=f"--out {record} is in use by process"):
        sweep(*common)


def test_another_setup_is_rejected(known, features, tmp_path):
    pipeline, real = known
    record = tmp_path / "record.json"
    common = (pipeline, "--real", real, "--features", features, "--temperature", "1", "--keep", "--out", record)
    assert sweep(*common, "--images", 20) == 0
    content = record.read_bytes()
    with pytest.raises(InputError, match=r"made with another setup.*images was 20, now it is 30.*Give another --out, or delete the file"):
        sweep(*common, "--images", 30)
    with pytest.raises(InputError, match=r"seed was 0, now it is 5"):
        sweep(*common, "--images", 20, "--seed", 5)
    other = scripted(nn.Sequential(Pooled()), tmp_path / "pooled.pt")
    with pytest.raises(InputError, match=r"features\.sha256 differs"):
        sweep(*common, "--images", 20, "--features", other)
    assert record.read_bytes() == content
    for text, message in (("{", "is not JSON"), ('{"format": "something"}', "not a sweep record"), ("[]", "does not contain a JSON object")):
        record.write_text(text)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match=message):
            patch.setattr("pipelines.sweep.sweep.run_sweep", None)  # must not be reached
            sweep(*common, "--images", 20)
        assert record.read_text() == text


def test_dry_run_writes_nothing(known_copy, features, capsys):
    pipeline, real = known_copy
    before = (pipeline / "pipeline.json").read_bytes()
    assert sweep(pipeline, "--real", real, "--features", features, "--temperature", "1,2", "--top_k", "0,5", "--dry_run") == 0
    output = capsys.readouterr().out
    assert "16 of pooled.pt" in output and "10,000 images for each of 4 combinations" in output and "nothing was measured" in output
    assert (pipeline / "pipeline.json").read_bytes() == before and sorted(path.name for path in pipeline.parent.iterdir()) == ["pipeline"]


# --- the record in the bundle ------------------------------------------------------------------------------------------------


@pytest.fixture
def swept(known_copy, features) -> Path:
    """A pipeline whose settings were chosen by a sweep."""
    pipeline, real = known_copy
    assert sweep(pipeline, "--real", real, "--features", features, "--images", 20, "--temperature", "1,3") == 0
    return pipeline


def test_copies_keep_the_record_if_parts_and_settings_match(swept, tiny_run, tmp_path):
    record = read_bundle(swept)["sweep"]
    pipe = ImageGenerationPipeline.from_pretrained(swept, device="cpu")
    pipe.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "pipeline.json").read_bytes() == (swept / "pipeline.json").read_bytes()
    make_bundle(swept / "tokenizer", swept / "prior", tmp_path / "changed", SamplingConfig(top_k=3))
    assert "sweep" not in read_bundle(tmp_path / "changed"), "no sweep chose these settings"
    shutil.copytree(swept, tmp_path / "replaced")
    make_bundle(tiny_run / "tokenizer", tiny_run / "prior", tmp_path / "replaced", pipe.sampling)
    assert "sweep" not in read_bundle(tmp_path / "replaced"), "another prior"
    shutil.copytree(swept / "prior", tmp_path / "prior")
    make_bundle(tiny_run / "tokenizer", tmp_path / "prior", swept, pipe.sampling)
    assert read_bundle(swept)["sweep"] == record, "the same parts bundled again"


def test_record_of_other_parts_is_rejected(swept, tiny_copy):
    before = bundle_of(tiny_copy)
    with pytest.raises(InputError, match="has changed since the sweep started"):
        recommend(tiny_copy / "pipeline", SamplingConfig(top_k=3), read_bundle(swept)["sweep"])
    assert bundle_of(tiny_copy) == before


def test_damaged_pipeline_can_be_replaced(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "pipeline", tmp_path / "pipeline")
    for text in ("{", '{"format": "vqmosaic.pipeline", "format_version": 1, "sweep": {"setup": {}}}'):
        (tmp_path / "pipeline" / "pipeline.json").write_text(text)
        make_bundle(tiny_run / "tokenizer", tiny_run / "prior", tmp_path / "pipeline", SamplingConfig(top_k=3))
        assert read_bundle(tmp_path / "pipeline")["sampling"]["top_k"] == 3


def test_sweep_with_weights_of_a_named_network(known, tmp_path):
    """End to end with a state dict. A function replaces timm."""
    pipeline, real = known
    save_file(small_network().module.state_dict(), tmp_path / "weights.safetensors")
    request = SweepRequest(folder=pipeline, combinations=[SamplingConfig(), SamplingConfig(temperature=100.0)], features=feature_file(
        tmp_path / "weights.safetensors"), data=None, real=real, record=tmp_path / "record.json", images=40, keep=True, device="cpu")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipelines.sweep.sweep.version", lambda name: "1.0" if name == "timm" else importlib.metadata.version(name))
        assert run_sweep(request, small_network) == 0
    record = json.loads(request.record.read_text())
    assert record["setup"]["features"]["kind"] == "timm" and record["setup"]["features"]["model"] == "small"
    assert record["results"][0]["versions"]["timm"] == "1.0"
    assert record["results"][0]["frechet_distance"] < record["results"][1]["frechet_distance"]


# --- arguments ---------------------------------------------------------------------------------------------------------------


def test_sampling_settings_of_a_single_value_can_be_swept():
    fields = sweepable_fields()
    assert {"guidance_scale": float, "temperature": float, "top_k": int, "top_p": float}.items() <= fields.items()
    assert {"steps": int, "order": str}.items() <= fields.items() and "guidance_interval" not in fields
    assert parse_values("order", str, "raster,spread") == ("raster", "spread")
    combinations = combine(SamplingConfig(top_p=0.5), {"guidance_scale": (1.0, 2.0), "top_k": (0, 5)})
    assert [(item.guidance_scale, item.top_k, item.top_p) for item in combinations] == [(1, 0, 0.5), (1, 5, 0.5), (2, 0, 0.5), (2, 5, 0.5)]
    assert parse_values("top_p", float, "1, 0.5,1.0") == (1.0, 0.5), "duplicates are removed"
    with pytest.raises(InputError, match=r"--top_k is '5,x'; it must be integers separated by commas"):
        parse_values("top_k", int, "5,x")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--temperature", "1,-1"], r"--temperature is -1"),
    (["--top_k", f"0,{CODES + 1}"], rf"--top_k is {CODES + 1}, but the prior in .* has {CODES} codes"),
    (["--guidance_power", "1,2"], r"--guidance_power has no effect.*'constant'.*Only power-cosine"),
    (["--top_p", "high"], r"--top_p is 'high'"),
    (["--images", "1"], r"--images is 1; it must be at least 2"),
    (["--batch_size", "0"], r"--batch_size is 0"),
    (["--seed", "-1"], r"--seed is -1"),
    (["--features", "/nowhere/at/all.pt"], r"--features is '/nowhere/at/all.pt', which does not exist"),
    (["--features_model", "resnet18", "--features", "/nowhere"], r"--features is '/nowhere'"),
    (["--guidence_scale", "1,2"], r"unrecognized arguments: --guidence_scale.*Did you mean --guidance_scale"),
    (["--data.pth", "photos"], r"there is no field 'data.pth' in a recipe"),
    (["--real", "/nowhere/at/all"], r"/nowhere/at/all"),
    (["--out", "/"], r"--out is '/', which is a folder"),
    (["--out", "/dev/null/sweep.json"], r"--out: '/dev/null/sweep\.json' was given, but /dev/null is a file"),
    (["--device", "gpu"], r"device is 'gpu'; this machine has: cpu"),
], ids=str)
def test_invalid_arguments_are_rejected(tiny_run, features, arguments, message):
    with pytest.raises(InputError, match=message):
        sweep(tiny_run, "--features", features, "--keep", *arguments)
    assert not (tiny_run / "sweep.json").exists()


def test_guidance_is_rejected_for_priors_without_guidance(tiny_run, features, tmp_path, capsys):
    pipe = ImageGenerationPipeline.from_pretrained(tiny_run, device="cpu")
    for name, changes, message in (("undropped", {"label_drop": 0.0}, "was trained with label_drop 0 and has not learned .* needs"),
                                   ("unlabelled", {"class_names": None, "label_drop": 0.0}, "was trained without classes")):
        prior_like(pipe, **changes).save_pretrained(tmp_path / name / "prior")
        make_bundle(tiny_run / "tokenizer", tmp_path / name / "prior", tmp_path / name / "pipeline", SamplingConfig())
        common = (tmp_path / name / "pipeline", "--features", features, "--recipe", tiny_run, "--images", 10)
        with pytest.raises(InputError, match=rf"--guidance_scale is 2.*{message}\. Set --guidance_scale to 1"):
            sweep(*common, "--guidance_scale", "1,2")
        assert sweep(*common, "--temperature", "1,2") == 0 and read_bundle(tmp_path / name / "pipeline")["sweep"]
        assert sweep(*common, "--dry_run", "--out", tmp_path / name / "other.json") == 0, "temperature is compared by default"
        assert f"each of {len(sweep_plan.TEMPERATURE_GRID['temperature'])} combinations" in capsys.readouterr().out


def test_pipeline_outside_of_a_run_needs_real_images(known, features, tmp_path):
    pipeline, _ = known
    with pytest.raises(InputError, match=r"is not in a run folder.*give --recipe.*or --real"):
        sweep(pipeline, "--features", features)
    with pytest.raises(InputError, match=r"'--data.path=x' is not an option of sweep; overrides of the recipe need --recipe"):
        sweep(pipeline, "--features", features, "--data.path=x")
    (tmp_path / "one").mkdir()
    Image.new("L", (20, 20)).save(tmp_path / "one" / "a.png")
    with pytest.raises(InputError, match=r"there is 1 real image to compare with"):
        sweep(pipeline, "--features", features, "--real", tmp_path / "one")


def test_all_real_images_of_a_folder_are_used(tmp_path):
    transform = ImageTransform(image_size=16, channels=1)
    for name in ("b/1.png", "a/2.png", "a/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    labelled = open_all_images(tmp_path, transform, ["a", "b", "c"])
    assert [labelled.label(index) for index in range(3)] == [0, 0, 1] and labelled.class_names == ["a", "b", "c"]
    assert labelled.identity["count"] == 3 and labelled.read(0).mode == "L"
    for others in (None, ["a", "c"]):
        assert open_all_images(tmp_path, transform, others).class_names is None
    Image.new("RGB", (20, 20)).save(tmp_path / "4.png")
    assert open_all_images(tmp_path, transform, ["a", "b", "c"]).class_names is None


def test_unreadable_real_images_are_skipped_and_recorded(known, features, tmp_path):
    pipeline, real = known
    shutil.copytree(real, tmp_path / "real")
    (tmp_path / "real" / "0" / "broken.png").write_bytes(b"no image")
    common = (pipeline, "--real", tmp_path / "real", "--features", features, "--images", 10, "--temperature", "1", "--keep")
    assert sweep(*common, "--out", tmp_path / "record.json") == 0
    assert json.loads((tmp_path / "record.json").read_text())["reference"] == {"images": 280, "unreadable": ["0/broken.png"]}
    for number in range(5):
        (tmp_path / "real" / "0" / f"broken-{number}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="6 of 286 images are unreadable"):
        sweep(*common, "--out", tmp_path / "other.json")


def test_help_and_invalid_input_load_no_slow_modules():
    assert not loaded(modules_after(called("sweep", "/nowhere/at/all", "--features", "x.pt")), *SLOW)
    result = command("sweep", "--help")
    assert result.returncode == 0 and all(f"--{name}" in result.stdout for name in sweepable_fields())
