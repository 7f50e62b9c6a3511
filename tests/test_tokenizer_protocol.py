"""A second kind of tokenizer, with two grids: no other code knows it, and the whole chain works with it. Errors of the protocol."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from pipelines import ImageGenerationPipeline
from pipelines.bundle import make_bundle
from pipelines.command_line import dispatch
from pipelines.stages.preprocess import preprocess
from pipelines.stages.stage_checks import check_before_start
from pipelines.stages.train_prior import make_picture_saver
from pipelines.tokens.audit_command import audit_run
from stage1_tokenizer import ImageTokenizer, Tokenizer, load_tokenizer
from stage1_tokenizer.data.folder_source import FolderSource
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import ImageTransform, UnreadableImage, to_pil
from stage1_tokenizer.tokenizer_config import FORMATS, is_tokenizer
from stage1_tokenizer.tokenizer_grids import grids_of_tokenizer
from stage2_prior.prior import TokenPrior
from stage2_prior.train import train
from stage2_prior.vocabulary import Vocabulary
from tests.run_files import edit_json, flip_byte, token_files
from tests.test_feature_extractors import Pooled, scripted
from tests.tiny import tiny_recipe
from token_shards import Grid, TokenShardManifest, TokenShardReader
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_sections import PriorConfig, SamplingConfig
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig

SIZE, COARSE, FINE = 16, 2, 4
PHOTOS = 24


class MeanColours(Tokenizer):
    """Mean colours of a coarse grid, and what remains of them in a fine one, each rounded to fixed levels. Only the decoder has weights."""

    FORMAT = "tests.mean_colours"
    DECODER_PARTS = ("colours",)

    def __init__(self, levels: Mapping[str, int], transform: ImageTransform, class_names: list[str] | None = None):
        super().__init__(transform, class_names)
        self.levels = dict(levels)
        self.colours = nn.Conv2d(transform.channels, transform.channels, 1)
        nn.init.dirac_(self.colours.weight)
        nn.init.zeros_(self.colours.bias)

    @property
    def grids(self) -> list[Grid]:
        depth = self.transform.channels
        return [Grid("coarse", self.levels["coarse"], COARSE, COARSE, depth), Grid("fine", self.levels["fine"], FINE, FINE, depth)]

    @torch.inference_mode()
    def encode_grids(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        self.check_images(images_BCHW)
        coarse_BChw = F.adaptive_avg_pool2d(images_BCHW.float(), COARSE)
        coarse_ids = self._rounded((coarse_BChw + 1) / 2, "coarse")
        rest_BChw = F.adaptive_avg_pool2d(images_BCHW.float(), FINE) - F.interpolate(self._values(coarse_ids, "coarse") * 2 - 1, scale_factor=2)
        return {"coarse": coarse_ids, "fine": self._rounded((rest_BChw + 2) / 4, "fine")}

    def _rounded(self, shares_BChw: torch.Tensor, name: str) -> torch.Tensor:
        ids_BhwC = (shares_BChw.clamp(0, 1) * (self.levels[name] - 1)).round().long().permute(0, 2, 3, 1)
        return ids_BhwC[..., 0] if self.transform.channels == 1 else ids_BhwC

    def _values(self, ids: torch.Tensor, name: str) -> torch.Tensor:
        ids_BhwC = ids[..., None] if self.transform.channels == 1 else ids
        return ids_BhwC.permute(0, 3, 1, 2).float() / (self.levels[name] - 1)

    @torch.inference_mode()
    def decode_grids(self, ids: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self.check_grid_names(ids)
        coarse_BChw = F.interpolate(self._values(ids["coarse"], "coarse") * 2 - 1, scale_factor=2)
        images_BChw = coarse_BChw + self._values(ids["fine"], "fine") * 4 - 2
        return self.colours(F.interpolate(images_BChw, size=self.transform.sides).to(self.colours.weight.dtype)).float()

    def network_config(self) -> dict[str, Any]:
        return {"levels": self.levels}

    @classmethod
    def from_config(cls, network: dict[str, Any], transform: ImageTransform, class_names: list[str] | None, where: str,
                    version: str | None) -> Self:
        return cls(network["levels"], transform, class_names)


class WithoutIds(MeanColours):
    """A tokenizer without ids. Its settings have no quantizer."""

    FORMAT = "tests.without_ids"

    @property
    def grids(self) -> list[Grid]:
        return []


@pytest.fixture(scope="module", autouse=True)
def second_format() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for kind in (MeanColours, WithoutIds):
            patch.setitem(FORMATS, kind.FORMAT, ("tests.test_tokenizer_protocol", kind.__name__))
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of colour images in two classes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(PHOTOS):
        path = folder / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((20, 20), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of a saved tokenizer with two grids."""
    MeanColours({"coarse": 4, "fine": 16}, ImageTransform(SIZE), ["a", "b"]).save_pretrained(path := tmp_path_factory.mktemp("second") / "tokenizer")
    return path


def recipe_for(folder: Path, run: Path, photos: Path, **changes: object) -> Recipe:
    return tiny_recipe(run, **{"tokens__tokenizer": folder, "data__source": "folder", "data__path": photos, "data__channels": 3,
                               "tokens__images_per_shard": 7, "tokens__batch_size": 8, "tokens__views": "shifts", "tokens__view_shift": 1,
                               "prior__architecture": "grid_transformer", "sampling__guidance_scale": 1.0, **changes})


@pytest.fixture(scope="module", params=["classes", "no classes"])
def run(request, folder, photos, tmp_path_factory) -> Path:
    """A run folder: shards with two grids, a prior of both, and a pipeline."""
    changes = {"prior_training__order": "annealed", "prior__layers": 2} if request.param == "classes" else {"data__use_labels": "false"}
    path = tmp_path_factory.mktemp("chain") / "run"
    recipe = recipe_for(folder, path, photos, **changes)
    assert check_before_start(recipe, "tokens") == "start"
    preprocess(recipe)
    check_before_start(recipe, "prior")
    train(recipe, make_picture_saver(recipe))
    assert dispatch(["bundle", str(path)]) == 0
    return path


@pytest.fixture
def pipe(run) -> ImageGenerationPipeline:
    return ImageGenerationPipeline.from_pretrained(run, device="cpu")


def images_in(run: Path, folder: Path, photos: Path, tokenizer: Tokenizer, count: int = 3) -> torch.Tensor:
    source = open_splits(recipe_for(folder, run, photos).data).validation
    return torch.stack([tokenizer.transform(source.read(index)) for index in range(count)])


# --- the chain ---------------------------------------------------------------------------------------------------------------


def test_shards_have_both_grids(run, folder, photos):
    manifest, reader = TokenShardManifest.load(run / "tokens/train"), TokenShardReader(run / "tokens/validation")
    tokenizer = load_tokenizer(folder)
    assert manifest.grids == tokenizer.grids == grids_of_tokenizer(folder) and manifest.token_fingerprint == tokenizer.token_fingerprint
    assert len(manifest.views) > 1 and [(grid.name, grid.num_tokens) for grid in manifest.grids] == [("coarse", 12), ("fine", 48)]
    source = open_splits(recipe_for(folder, run, photos).data).validation
    readable = reader.indices_N.tolist()
    ids = tokenizer.encode_grids(torch.stack([tokenizer.transform(source.read(index)) for index in readable]))
    stored_BT = reader.sequential(0, len(reader)).ids_BT
    assert np.array_equal(stored_BT, np.concatenate([ids["coarse"].flatten(1).numpy(), ids["fine"].flatten(1).numpy()], axis=1))
    assert len(np.unique(stored_BT[:, :12])) > 1 and stored_BT[:, 12:].max() > 3, "ids of the fine grid have their own range"


def test_sampling_settings_are_checked_against_the_given_tokens(run, folder, photos):
    assert recipe_for(folder, run, photos, sampling__top_k=64, tokenizer__codebook_size=32).sampling.top_k == 64, "its tokenizer section is not used"
    for settings, message in (({"sampling__top_k": 17}, r"sampling.top_k is 17, but the tokens in .* have 16 codes"),
                              ({"sampling__steps": 61}, r"sampling.steps is 61, but an image in .* has 60 tokens")):
        settings = {"prior_training__order": "annealed", **settings}
        recipe = recipe_for(folder, run.parent / "other", photos, prior_training__tokens=run / "tokens", **settings)
        with pytest.raises(InputError, match=message):
            check_before_start(recipe, "prior")


def test_training_saves_pictures(run):
    assert list((run / "logs/prior/samples").glob("*.png"))


def test_generation_draws_both_grids(pipe):
    labels = pipe.class_names
    out = pipe(labels, 3, seed=5, batch_size=4, output_type="pt")
    count = 3 * len(labels or [None])
    assert {name: tuple(ids.shape) for name, ids in out.token_ids.items()} == {"coarse": (count, 2, 2, 3), "fine": (count, 4, 4, 3)}
    assert out.token_ids["coarse"].max() < 4 and out.token_ids["fine"].max() < 16
    assert torch.equal(out.images, pipe.tokenizer.decode(out.token_ids).clamp(-1, 1)) and out.images.shape == (count, 3, SIZE, SIZE)
    assert [image.tobytes() for image in pipe.decode(out.token_ids)] == [image.tobytes() for image in to_pil(out.images)]
    alone = pipe(labels, 3, seed=5, batch_size=1)
    assert all(torch.equal(alone.token_ids[name], ids) for name, ids in out.token_ids.items())
    if labels:
        assert out.class_indices == [0] * 3 + [1] * 3
    assert pipe.logit_difference(out.token_ids, out.class_indices) < 1e-4
    if pipe.prior.any_order:
        assert set(pipe(labels, seed=5, order="random", steps=7).token_ids) == {"coarse", "fine"}
    with pytest.raises(InputError, match=r"top_k is 17; allowed: 0 \(off\) to 16"):
        pipe(labels, top_k=17)


def test_reconstruct_is_decode_after_encode(run, pipe, folder, photos):
    images_BCHW = images_in(run, folder, photos, pipe.tokenizer)
    ids = pipe.encode(images_BCHW)
    assert set(ids) == {"coarse", "fine"}
    assert [image.tobytes() for image in pipe.reconstruct(images_BCHW)] == [image.tobytes() for image in pipe.decode(ids)]
    difference_BChw = F.adaptive_avg_pool2d(pipe.tokenizer.decode(ids) - images_BCHW, FINE)
    assert difference_BChw.abs().max() < 2 / 15 + 1e-5, "half a level of the fine grid: both grids are used"
    ids_BT = pipe.tokenizer.join_tokens(ids)
    assert ids_BT.shape == (3, 60)
    assert all(torch.equal(found, ids[name]) for name, found in pipe.tokenizer.split_tokens(ids_BT).items())


def test_commands_write_images(run, pipe, photos, tmp_path, capsys):
    classes = ["--classes", "b"] if pipe.class_names else []
    assert dispatch(["generate", str(run), *classes, "--num", "2", "--seed", "1", "--dtype", "bfloat16", "--out", str(tmp_path / "out")]) == 0
    assert "logits of the prior in bfloat16 differ" in capsys.readouterr().out
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3
    assert dispatch(["reconstruct", str(run), str(photos / "a/00.png"), "--out", str(tmp_path / "restored")]) == 0
    with Image.open(photos / "a/00.png") as image, Image.open(tmp_path / "restored/00.png") as restored:
        assert restored.tobytes() == pipe.reconstruct(image)[0].tobytes()


def test_saved_pipeline_gives_the_same_images(run, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    labels = pipe.class_names
    other = ImageGenerationPipeline.from_pretrained(tmp_path / "copy", device="cpu")
    assert [image.tobytes() for image in other(labels, seed=3).images] == [image.tobytes() for image in pipe(labels, seed=3).images]


def test_audit_and_repair(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    assert audit_run(copy) == 0
    before = token_files(copy)
    (copy / "tokens/train/shard-000000.tar").unlink()
    content = (shard := copy / "tokens/train/shard-000001.tar").read_bytes()
    flip_byte(shard, content.index(b"fine.npy") + 512 + 128)
    assert audit_run(copy) == 1 and audit_run(copy, repair=True) == 0
    assert token_files(copy) == before


def test_repair_adds_images_that_can_be_read_again(folder, photos, tmp_path, monkeypatch, capsys):
    complete, flaky = (recipe_for(folder, tmp_path / name, photos, data__max_unreadable=0.5) for name in ("complete", "flaky"))
    preprocess(complete)
    read = FolderSource.read

    def fail_for_one(self, index, *arguments):
        if index == 3:
            raise UnreadableImage("Input/output error")
        return read(self, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "read", fail_for_one)
        preprocess(flaky)
    assert token_files(tmp_path / "flaky") != token_files(tmp_path / "complete")
    assert audit_run(tmp_path / "flaky", repair=True) == 0 and "can be read now" in capsys.readouterr().out
    assert token_files(tmp_path / "flaky") == token_files(tmp_path / "complete")


def test_exported_tokens_can_be_imported(run, folder, tmp_path, capsys):
    lines = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation")}
    for split, path in lines.items():
        assert dispatch(["export-tokens", str(run / "tokens" / split), "--out", str(path)]) == 0
    assert "(coarse: 2 x 2 x 3 of 4 codes, fine: 4 x 4 x 3 of 16 codes)" in capsys.readouterr().out
    options = ["import-tokens", str(lines["train"]), "--validation", str(lines["validation"]), "--tokenizer", str(folder)]
    names = TokenShardManifest.load(run / "tokens/train").class_names
    options += ["--class_names", ",".join(names)] if names else []
    assert dispatch([*options, "--out", str(tmp_path / "tokens")]) == 0
    for split in lines:
        own, imported = TokenShardReader(run / "tokens" / split), TokenShardReader(tmp_path / "tokens" / split)
        assert own.manifest.grids == imported.manifest.grids and own.manifest.token_fingerprint == imported.manifest.token_fingerprint
        for view in range(len(own.manifest.views)):
            found, expected = (reader.samples(np.argsort(reader.indices_N), view) for reader in (imported, own))
            assert np.array_equal(found.ids_BT, expected.ids_BT) and np.array_equal(found.labels_B, expected.labels_B)
    assert dispatch(["audit", str(tmp_path / "tokens")]) == 0
    record = json.loads(lines["train"].read_text().splitlines()[0])
    record["tokens"][0][0] = 4
    lines["train"].write_text(json.dumps(record) + "\n")
    with pytest.raises(InputError, match=r"the ids of grid 'coarse' run from . to 4; allowed: 0 to 3"):
        dispatch([*options, "--out", str(tmp_path / "other")])
    with pytest.raises(InputError, match=r"--codebook_size is 9, but the tokenizer in .* has 4, 16"):
        dispatch([*options, "--codebook_size", "9", "--out", str(tmp_path / "other")])
    record["tokens"] = [tokens[:-1] for tokens in record["tokens"]]
    lines["train"].write_text(json.dumps(record) + "\n")
    expected = "59 tokens per view, but the grids of the tokenizer in .* \\(coarse: 2 x 2 x 3 of 4 codes, fine: 4 x 4 x 3 of 16 codes\\) have 60"
    with pytest.raises(InputError, match=expected):
        dispatch([*options, "--out", str(tmp_path / "other")])


def test_demo_shows_each_grid(pipe, photos):
    pytest.importorskip("gradio")
    import threading

    from pipelines.demo.page import build, reconstruct
    from pipelines.demo.request_checks import sampling_controls

    _, tokens, restored, report = reconstruct(pipe, threading.Event(), str(photos / "a/00.png"))
    assert tokens.count('class="tokens"') == 6 and 'title="coarse ' in tokens and 'title="fine ' in tokens
    assert "became 2 x 2 x 3 + 4 x 4 x 3 tokens" in report and "6,144 bits became 216" in report
    assert restored.size == (SIZE, SIZE)
    assert next(control.maximum for control in sampling_controls(pipe) if control.name == "top_k") == 16
    build(pipe)


def test_sweep_measures_images_of_both_grids(run, photos, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    features = scripted(Pooled(), tmp_path / "pooled.pt")
    assert dispatch(["sweep", str(copy / "pipeline"), "--real", str(photos), "--features", str(features), "--images", "4",
                     "--temperature", "0.5,1", "--device", "cpu"]) == 0
    assert len(json.loads((copy / "pipeline/pipeline.json").read_text())["sweep"]["results"]) == 2


def test_measures_of_samples_count_whole_images(run, pipe):
    from pipelines.stages.measures import measure_generation

    measures = measure_generation(pipe, TokenShardReader(run / "tokens/train"), 0, None)["recommended"]
    assert 0 <= measures["copies"] <= 1 and 0 < measures["distinct"] <= 1


# --- folders and errors ------------------------------------------------------------------------------------------------------


def test_loading_selects_the_class(folder, tiny_run):
    tokenizer = load_tokenizer(folder, dtype="bfloat16")
    assert type(tokenizer) is MeanColours and tokenizer.colours.weight.dtype == torch.bfloat16 and tokenizer.class_names == ["a", "b"]
    assert type(load_tokenizer(tiny_run / "tokenizer")) is ImageTokenizer
    assert is_tokenizer(folder) and is_tokenizer(tiny_run / "tokenizer")
    with pytest.raises(InputError, match=r"format 'tests.mean_colours'; ImageTokenizer reads 'vqmosaic.image_tokenizer'. Use load_tokenizer"):
        ImageTokenizer.from_pretrained(folder)


def test_fingerprints(folder, tmp_path):
    original = load_tokenizer(folder)
    other_decoder = load_tokenizer(folder)
    with torch.no_grad():
        other_decoder.colours.weight.mul_(0.9)
    other_decoder.save_pretrained(tmp_path / "decoder")
    assert other_decoder.token_fingerprint == original.token_fingerprint and other_decoder.full_fingerprint != original.full_fingerprint
    other_levels = MeanColours({"coarse": 5, "fine": 16}, ImageTransform(SIZE))
    other_levels.save_pretrained(tmp_path / "levels")
    assert other_levels.token_fingerprint != original.token_fingerprint == original.fingerprint_of_tokens()
    shutil.copytree(folder, tmp_path / "edited")
    edit_json(tmp_path / "edited/config.json", class_names=["c", "d"])
    with pytest.raises(InputError, match=r"config.json has changed since it was exported"):
        load_tokenizer(tmp_path / "edited")


def test_unknown_format_names_the_known_ones(tiny_run, folder, tmp_path):
    shutil.copytree(tiny_run / "tokenizer", tmp_path / "tokenizer")
    edit_json(tmp_path / "tokenizer/config.json", format="vqmosaic.of_later", vqmosaic="9.0.0")
    with pytest.raises(InputError, match=r"format 'vqmosaic.of_later'.*formats: vqmosaic.image_tokenizer, vqmosaic.hierarchical_tokenizer, "
                                         r"tests.mean_colours.*vqmosaic 9.0.0"):
        load_tokenizer(tmp_path / "tokenizer")
    assert not is_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="is not a tokenizer folder"):
        load_tokenizer(folder).save_pretrained(tmp_path / "tokenizer")


@pytest.mark.parametrize("grids", [
    [Grid("coarse", 4, 2, 2, 3)],
    [Grid("fine", 16, 4, 4, 3), Grid("coarse", 4, 2, 2, 3)],
    [Grid("coarse", 4, 2, 2, 3), Grid("fine", 8, 4, 4, 3)],
], ids=["one grid", "other order", "other codebook"])
def test_prior_with_other_grids_is_refused(grids, folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    vocabulary = Vocabulary(grids=grids, class_names=None, token_fingerprint=tokenizer.token_fingerprint)
    prior = TokenPrior.from_config(PriorConfig(width=32, layers=1, heads=2), vocabulary, 0)
    prior.save_pretrained(tmp_path / "prior")
    message = "the tokenizer has the grids coarse: 2 x 2 x 3 of 4 codes, fine: 4 x 4 x 3 of 16 codes, but the prior predicts"
    with pytest.raises(InputError, match=message):
        make_bundle(folder, tmp_path / "prior", tmp_path / "pipeline", SamplingConfig())
    with pytest.raises(InputError, match=message):
        ImageGenerationPipeline(tokenizer, prior)
    assert not (tmp_path / "pipeline").exists()


def test_decoding_needs_the_ids_of_all_grids(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(torch.zeros(2, 3, SIZE, SIZE))
    with pytest.raises(InputError, match=r"a tensor of shape \(2, 4, 4, 3\), but this tokenizer has the grids coarse, fine. Give a dict"):
        tokenizer.decode(ids["fine"])
    with pytest.raises(InputError, match="of the grids fine; this tokenizer has: coarse, fine"):
        tokenizer.decode({"fine": ids["fine"]})
    with pytest.raises(InputError, match=r"images have shape \(1, 3, 8, 8\)"):
        tokenizer.encode(torch.zeros(1, 3, 8, 8))


def test_pipeline_decodes_the_ids_of_all_grids_for_the_same_images(pipe):
    ids = pipe.tokenizer.encode(torch.zeros(3, 3, SIZE, SIZE))
    for wrong in ({}, {"fine": ids["fine"]}, {**ids, "finest": ids["fine"]}):
        with pytest.raises(InputError, match=r"of the grids .*; this tokenizer has: coarse, fine"):
            pipe.decode(wrong)
    for count in (0, 2):
        with pytest.raises(InputError, match=rf"different numbers of images \(coarse: {count}, fine: 3\)"):
            pipe.decode(ids | {"coarse": ids["coarse"][:count]})


def test_tokenizers_without_ids_make_no_tokens(photos, tmp_path):
    WithoutIds({"coarse": 4, "fine": 16}, ImageTransform(SIZE)).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokens.jsonl").write_text('{"class_id": 0, "tokens": [1]}\n' * 9)
    why = rf"^The tokenizer in {tmp_path}/tokenizer has no ids, so there are no tokens\. Set "
    with pytest.raises(InputError, match=why + r"tokens\.tokenizer to a tokenizer with ids\.$"):
        check_before_start(recipe_for(tmp_path / "tokenizer", tmp_path / "run", photos), "tokens")
    with pytest.raises(InputError, match=why + r"--tokenizer to a tokenizer with ids\.$"):
        dispatch(["import-tokens", str(tmp_path / "tokens.jsonl"), "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "tokens")])


def test_image_tokenizer_has_one_grid_or_none(tiny_run):
    tokenizer = load_tokenizer(tiny_run / "tokenizer")
    assert tokenizer.grids == grids_of_tokenizer(tiny_run / "tokenizer") == TokenShardManifest.load(tiny_run / "tokens/train").grids
    assert "grids" not in json.loads((tiny_run / "tokenizer/config.json").read_text()), "the files of existing tokenizers do not change"
    images_BCHW = torch.linspace(-1, 1, 2 * 256).view(2, 1, 16, 16)
    ids_Bhw = tokenizer.encode(images_BCHW)
    assert torch.equal(tokenizer.encode_grids(images_BCHW)["image"], ids_Bhw)
    assert torch.equal(tokenizer.decode({"image": ids_Bhw}), tokenizer.decode(ids_Bhw))
    assert torch.equal(tokenizer.split_tokens(tokenizer.join_tokens(ids_Bhw)), ids_Bhw)
    with pytest.raises(InputError, match="of the grids picture; this tokenizer has: image"):
        tokenizer.decode({"picture": ids_Bhw})
    continuous = ImageTokenizer(dataclasses.replace(tokenizer.config, quantizer="kl"), tokenizer.transform)
    assert continuous.grids == [] and continuous.grid_shape == tokenizer.grid_shape == ids_Bhw.shape[1:]


def test_frozen_parts(folder):
    tokenizer = ImageTokenizer(TokenizerConfig(channels=32, channel_multipliers=[1, 1], residual_blocks=0), ImageTransform(8, 1))
    assert tokenizer.frozen_modules("all") == [] == load_tokenizer(folder).frozen_modules("decoder")
    frozen = {id(parameter) for part in tokenizer.frozen_modules("decoder") for parameter in part.parameters()}
    trained = {name.partition(".")[0] for name, parameter in tokenizer.named_parameters() if id(parameter) not in frozen}
    assert trained == {"post_quant_conv", "decoder"}


def test_only_trainable_formats_can_be_fine_tuned(folder, tmp_path):
    with pytest.raises(InputError, match=r"format 'tests.mean_colours'. Only tokenizers of format 'vqmosaic.image_tokenizer' or 'vqmosaic.h"):
        check_before_start(tiny_recipe(tmp_path / "run", tokenizer_training__init_from=folder), "tokenizer")
