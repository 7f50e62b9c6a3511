"""ImageGenerationPipeline: samples tokens from the prior and decodes them to images.

    from pipelines import ImageGenerationPipeline
    pipe = ImageGenerationPipeline.from_pretrained("runs/quickstart")
    out = pipe(class_labels=["3", 7], num_images_per_label=4, seed=1)
    out.images[0].save("three.png")

    for out in pipe.batches(num_images_per_label=50_000, class_labels=3, seed=1):      # many images, one batch in memory at a time
        ...

Pipelines whose prior is given more than the class also take `prompt` and `image`:

    pipe(prompt="a photo of a cat")
    pipe.super_resolve(small_images)
    pipe.translate(pictures_of_edges)

tokenizer_methods.py has encode, decode and reconstruct, editing/edit_methods.py has inpaint, outpaint, complete, variations and score,
enhancing/enhance_methods.py has enhance, and augment/labelled_images.py has labelled_batches.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.augment.labelled_images import LabelledImageMethods
from pipelines.bundle import check_replaceable, find_pipeline, make_bundle, read_bundle, recommended_sampling, usable_device
from pipelines.condition_inputs import ConditionInputs
from pipelines.decoded_images import MAX_BATCH_IMAGES, OUTPUT_TYPES, concatenate, decode_in_batches, to_output_type
from pipelines.enhancing.enhance_methods import EnhancingMethods
from pipelines.generation_output import GenerationOutput, Images
from pipelines.generation_request import Given, Request, check_request, keywords_from_former_positions
from pipelines.larger_images.sample_request import sample_request
from pipelines.pipeline_parts import PipelineParts, check_same_grids
from pipelines.tokenizer_methods import TokenizerMethods
from stage1_tokenizer.tiles.tiling import Tiling
from stage1_tokenizer.tokenizer_protocol import Ids, Tokenizer, concatenate_ids, load_tokenizer
from stage2_prior.chain_vocabulary import ChainVocabulary
from stage2_prior.generation.prior_chain import PriorChain
from stage2_prior.generation.sampling import SamplingStopped
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import NO_CLASS
from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.files.exported_weights import same_weights
from vqmosaic.files.fingerprints import check_same_tokens
from vqmosaic.recipes.field_types import as_boolean, as_integer
from vqmosaic.recipes.image_sizes import ImageSize
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.devices import as_dtype
from vqmosaic.runs.out_of_memory import FittingBatches, ranges


class ImageGenerationPipeline(EnhancingMethods, LabelledImageMethods, TokenizerMethods):
    """A tokenizer and one or several priors that belong together, with recommended sampling settings."""

    def __init__(self, tokenizer: Tokenizer, prior: TokenPrior | Sequence[TokenPrior], sampling: SamplingConfig | None = None,
                 source: PipelineParts | None = None, inputs: ConditionInputs | None = None):
        """`prior` may be several, in the order of sampling. `inputs` has the tokenizers of the conditions that they are given."""
        if tokenizer.token_fingerprint is None:
            raise InputError("the tokenizer has no token fingerprint yet, so it cannot be matched with the prior. Call its save_pretrained first.")
        self.chain = PriorChain([prior] if isinstance(prior, TokenPrior) else prior)
        check_same_tokens(tokenizer.token_fingerprint, "the tokenizer", self.vocabulary.token_fingerprint, "the prior")
        check_same_grids(tokenizer.grids, "the tokenizer", self.vocabulary, "the prior")
        self.tokenizer, self.sampling, self._source = tokenizer, sampling or SamplingConfig(), source
        self.inputs = inputs or ConditionInputs(self.vocabulary, {}, {})

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None,
                        dtype: torch.dtype | str = torch.float32) -> "ImageGenerationPipeline":
        """Load the pipeline of a pipeline folder or a run folder to a device, by default the best available one.

        dtype, a torch.dtype or its name such as "bfloat16", applies to the priors and the decoder. Encoder and quantizer stay in float32.

        Raises:
            ValueError: there is no pipeline, its parts do not belong together, this machine does not have the device, or the dtype is unknown.
        """
        folder, dtype = find_pipeline(path), as_dtype(dtype)
        content = read_bundle(folder)
        parts, device = PipelineParts.in_folder(folder, content), usable_device(device)
        tokenizer = load_tokenizer(parts.tokenizer, device, dtype)
        priors = [TokenPrior.from_pretrained(prior, device=device, dtype=dtype) for prior in parts.priors]
        vocabulary = ChainVocabulary([prior.vocabulary for prior in priors])
        assert tokenizer.token_fingerprint is not None  # every saved tokenizer has one
        check_same_tokens(tokenizer.token_fingerprint, parts.tokenizer, vocabulary.token_fingerprint, parts.priors[0])
        inputs = ConditionInputs.load(vocabulary, parts.conditions, device)
        return cls(tokenizer, priors, recommended_sampling(folder, content), parts, inputs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pipeline to another folder, with the current recommended settings.

        If the weights have not changed since loading, except by a cast, the original files are copied. Otherwise the weights are saved.
        """
        folder = Path(folder)
        if self._source is not None and self._has_loaded_weights(self._source):  # copy the files, because the weights in memory may have been cast
            make_bundle(self._source.tokenizer, self._source.priors, folder, self.sampling, self._source.conditions)
            return
        check_replaceable(folder)
        temporary = folder.with_name(f".parts-{folder.name}")
        try:
            self.tokenizer.save_pretrained(temporary / "tokenizer")
            priors = [temporary / f"prior-{number}" for number in range(len(self.chain.priors))]
            for prior, path in zip(self.chain.priors, priors, strict=True):
                prior.save_pretrained(path)
            make_bundle(temporary / "tokenizer", priors, folder, self.sampling, self.inputs.save(temporary / "conditions"))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _has_loaded_weights(self, source: PipelineParts) -> bool:
        """Whether tokenizer and priors still have the weights in the folders. Loads all models again and compares. False if loading fails."""
        try:
            return (same_weights(self.tokenizer, load_tokenizer(source.tokenizer))
                    and all(same_weights(prior, TokenPrior.from_pretrained(path))
                            for prior, path in zip(self.chain.priors, source.priors, strict=True)))
        except InputError:  # the folder was deleted or replaced
            return False

    @property
    def prior(self) -> TokenPrior:
        """The prior; the first one if there are several."""
        return self.chain.priors[0]

    @property
    def vocabulary(self) -> ChainVocabulary:
        """What the priors are given and draw."""
        return self.chain.vocabulary

    @property
    def class_names(self) -> list[str] | None:
        """The class names, or None if the prior was trained without classes."""
        return self.vocabulary.class_names

    @property
    def device(self) -> torch.device:
        """The device of the tokenizer and the prior."""
        return self.tokenizer.device

    def __call__(self, class_labels: Sequence[str | int] | str | int | None = None, num_images_per_label: int = 1, seed: int | None = None,
                 *positional: Any, prompt: Any = None, image: Any = None, given_ids: Mapping[str, torch.Tensor] | None = None,
                 size: ImageSize | None = None, window_overlap: float | None = None, output_type: str = "pil",
                 callback: Callable[[int, int], bool | None] | None = None, batch_size: int = 64, compile: bool = False,
                 **settings: Any) -> GenerationOutput:
        """Generate images, label by label. Image i depends on the seed, i and its class, not on the other images.

        Returns all images together. `batches` yields them one batch at a time.

        Args:
            class_labels: class names (strings) or indices (integers). None for a pipeline without classes, or for unconditional images.
            num_images_per_label: images per label (or per prompt, or per given image).
            prompt: a text or a list of texts, for a prior that is given captions. With several texts, a dict of them by name.
            image: a PIL image, a list of them or a tensor (B, C, H, W) in [-1, 1], for a prior that is given an image, such as one at low resolution.
                With several images, a dict of them by name. Labels, prompts and images are paired by position; a single one counts for all.
            given_ids: ids of conditions by name, as token shards hold them, in place of prompt and image.
            size: the size of the images in pixels, if it is larger than that of the training images: (height, width), or one number for squares. The
                tokens are drawn in windows of the training size, each given those of earlier windows. The sides must be multiples of a token's.
            window_overlap: the share of a window that the next one overlaps, from 0 to below 1. Larger values take longer and fit better.
                Default: 0.5.
            seed: a number that determines the result. None draws a random one (out.seeds has the seed of each image).
            output_type: pil, np (uint8, B H W C) or pt (float32 in [-1, 1], B C H W). np and pt have all channels; pil images are for viewing,
                without alpha (to_pil). tokenizer.transform.to_stored_values converts pt images to data.value_range.
            callback: called as callback(done, total) after each pass of each batch, with the number of tokens so far. total is the number of
                batches times the tokens per image. If it returns False, sampling stops: out.stopped is True and out.images is empty.
            batch_size: images sampled in parallel.
            compile: record the step of the prior as a CUDA graph. This is faster for small batches on CUDA and has no effect on other devices. Only
                steps that draw one token after one new token use the graph, so with fewer `steps` than tokens, it makes almost no difference.
            settings: guidance_scale, temperature, top_k, top_p, min_p and the other fields of SamplingConfig. None, or a setting that is not
                given, uses the recommended one. Unconditional images are sampled without guidance, which would have no effect.
            positional: deprecated; the arguments that version 0.1.0 accepted by position.

        Raises:
            ValueError: an unknown class, a setting out of range or of the wrong type, guidance without class_labels, something that the prior was not
                trained with (the message lists what it takes), or something missing that was never dropped in training.
        """
        if positional:
            former = keywords_from_former_positions(positional)
            keywords = {"output_type": output_type, "callback": callback, "batch_size": batch_size}
            if twice := former.keys() & settings.keys():
                raise TypeError(f"{', '.join(sorted(twice))} given both by position and by keyword")
            return self(class_labels, num_images_per_label, seed, prompt=prompt, image=image, given_ids=given_ids, size=size,
                        window_overlap=window_overlap, compile=compile, **settings, **keywords | former)
        tiling = self._tiling(size, window_overlap)
        request = self._check_request(class_labels, num_images_per_label, seed, settings, Given(prompt, image, given_ids), tiling)
        return self._generate(request, output_type, callback, batch_size, compile)

    def _generate(self, request: Request, output_type: str = "pil", callback: Callable[[int, int], bool | None] | None = None, batch_size: int = 64,
                  compile: bool = False) -> GenerationOutput:
        """All images of a checked request together."""
        try:
            batches = list(self._sample_batches(request, output_type, callback, batch_size, compile))
        except SamplingStopped:
            return GenerationOutput(seeds=request.seeds, class_indices=request.classes, stopped=True, given_ids=dict(request.given))
        ids = concatenate_ids([batch.token_ids for batch in batches if batch.token_ids is not None])
        return GenerationOutput(concatenate(batch.images for batch in batches), ids, [seed for batch in batches for seed in batch.seeds],
                                request.classes, places=range(len(request.seeds)), given_ids=dict(request.given))

    def super_resolve(self, images: Images, class_labels: Sequence[str | int] | str | int | None = None, **arguments: Any) -> GenerationOutput:
        """Images at full size for images at low resolution, by a prior that is given those. Other arguments are those of a call.

        Larger images are first resized to the low resolution. Raises InputError if the prior is not given images at low resolution.
        """
        return self(class_labels, image={self.inputs.image_for("super_resolve"): images}, **arguments)

    def translate(self, images: Images, class_labels: Sequence[str | int] | str | int | None = None, **arguments: Any) -> GenerationOutput:
        """Images for images of another kind, such as edges, by a prior that is given those. Other arguments are those of a call.

        Raises InputError if the prior is given no such image, or only one at low resolution.
        """
        return self(class_labels, image={self.inputs.image_for("translate"): images}, **arguments)

    def batches(self, class_labels: Sequence[str | int] | str | int | None = None, num_images_per_label: int = 1, seed: int | None = None, *,
                prompt: Any = None, image: Any = None, given_ids: Mapping[str, torch.Tensor] | None = None,
                size: ImageSize | None = None, window_overlap: float | None = None, output_type: str = "pil",
                callback: Callable[[int, int], bool | None] | None = None, batch_size: int = 64, compile: bool = False,
                skip: Callable[[range], bool] | None = None, **settings: Any) -> Iterator[GenerationOutput]:
        """Yield the same images as a call with these arguments, one batch at a time, so that memory does not grow with their number.

        Args:
            skip: called with the positions of each batch in the request before sampling starts. Batches for which it returns True are skipped,
                and the callback's total does not count them.
            settings: guidance_scale, temperature and the other sampling settings of `__call__`.

        The other arguments are those of `__call__`. If the callback returns False, the iterator raises
        stage2_prior.generation.sampling.SamplingStopped.

        Raises:
            ValueError: as in `__call__`, before the first batch.
        """
        tiling = self._tiling(size, window_overlap)
        request = self._check_request(class_labels, num_images_per_label, seed, settings, Given(prompt, image, given_ids), tiling)
        return self._sample_batches(request, output_type, callback, batch_size, compile, skip)

    def _check_request(self, class_labels: Sequence[str | int] | str | int | None, num_images_per_label: int, seed: int | None,
                       settings: dict[str, Any], given: Given | None = None, tiling: Tiling | None = None) -> Request:
        request = check_request(self.vocabulary, self.inputs, self.sampling, class_labels, given or Given(), num_images_per_label, seed, settings,
                                tiling=tiling)
        self.chain.check_order(request.sampling)
        return request

    def _sample_batches(self, request: Request, output_type: str, callback: Callable[[int, int], bool | None] | None, batch_size: int,
                        compile: bool, skip: Callable[[range], bool] | None = None) -> Iterator[GenerationOutput]:
        """Check the arguments immediately and return an iterator that samples one batch at a time."""
        check_name("output_type", output_type, OUTPUT_TYPES)
        check_range("batch_size", as_integer("batch_size", batch_size), at_least=1)
        compile = as_boolean("compile", compile)
        batches = [positions for positions in ranges(len(request.seeds), batch_size) if skip is None or not skip(positions)]
        decoding = FittingBatches(self.device)
        most = 0  # tokens that were reported: the parts of a batch that did not fit start again
        tokens_per_batch = request.num_tries * self.vocabulary.num_tokens * (1 if request.tiling is None else len(request.tiling.places))

        def sample_part(positions: range) -> GenerationOutput:
            """The images at these positions, which are a batch or, if that does not fit into memory, a part of one."""
            number = next(number for number, batch in enumerate(batches) if positions.start in batch)
            batch, part = batches[number], request.part(positions)

            def report(done: int, _: int) -> bool | None:
                nonlocal most
                assert callback is not None  # otherwise this function is not passed on
                done_in_batch = ((positions.start - batch.start) * tokens_per_batch + len(positions) * done) // len(batch)
                most = max(most, number * tokens_per_batch + done_in_batch)
                return callback(most, len(batches) * tokens_per_batch)

            def draw(seeds: Sequence[int], known_BT: torch.Tensor | None, given: Mapping[str, torch.Tensor],
                     callback: Callable[[int, int], bool | None] | None) -> Ids:
                return self.sample_ids(part.classes, part.sampling, seeds, callback, compile, given, known_BT, keep_unseen=True,
                                       evidence=part.evidence)

            ids, seeds = sample_request(self.tokenizer, self.chain, part, draw, report if callback is not None else None)
            images, first = [], positions.start
            for images_BCHW in decode_in_batches(self.tokenizer, ids, is_larger=request.tiling is not None, fitting=decoding):
                finished_BCHW = images_BCHW if request.finish is None else request.finish(images_BCHW, first)
                images.append(to_output_type(finished_BCHW, output_type, keep_alpha=request.keep_alpha))
                first += len(images_BCHW)
            return GenerationOutput(concatenate(images), concatenate_ids([ids]), seeds, part.classes, places=positions, given_ids=dict(part.given))

        return (output for _, output in FittingBatches(self.device, "batch_size").run(batches, sample_part))

    def sample_ids(self, class_indices: Sequence[int] | None, sampling: SamplingConfig, seeds: Sequence[int],
                   callback: Callable[[int, int], bool | None] | None = None, compile: bool = False, given: Mapping[str, torch.Tensor] | None = None,
                   known_BT: torch.Tensor | None = None, keep_unseen: bool = False, evidence: Mapping[str, torch.Tensor] | None = None) -> Ids:
        """Sample ids of all grids of the tokenizer, in the form of `encode`, on the pipeline's device. Image b has the seed seeds[b].

        `given` are ids of conditions by name, `known_BT` tokens of all grids to keep, with -1 for tokens to draw. `keep_unseen` is that of
        `TokenPrior.sample`, and `evidence` that of `PriorChain.sample`.
        """
        grids = self.tokenizer.grids
        known = None if known_BT is None else {grid.name: part for grid, part in zip(
            grids, known_BT.split([grid.num_tokens for grid in grids], dim=1), strict=True)}
        drawn = self.chain.sample(class_indices, sampling, seeds, callback, compile, given, known, keep_unseen, evidence)
        return self.tokenizer.split_tokens(torch.cat([drawn[grid.name] for grid in grids], dim=1))

    def logit_difference(self, token_ids: Ids, class_indices: Sequence[int] | None, given_ids: Mapping[str, torch.Tensor] | None = None) -> float:
        """The largest absolute difference between the logits used in sampling and those of the float32 prior, at every position of sampled images.

        Loads the prior again from the folder, in float32. For priors that draw tokens in any order, it measures raster order.

        Args:
            token_ids: the ids of the images, such as out.token_ids.
            class_indices: the class index of each image. None for unconditional images.
            given_ids: the ids of the conditions, such as out.given_ids.

        Raises:
            ValueError: the pipeline was not loaded from a folder.
        """
        if self._source is None:
            raise InputError("the pipeline was not loaded from a folder, so there are no float32 weights to compare with. Load a saved pipeline.")
        references = [TokenPrior.from_pretrained(path, device=self.device) for path in self._source.priors]
        ids_BT, grids = self.tokenizer.join_tokens(token_ids), self.tokenizer.grids
        classes = [NO_CLASS] * len(ids_BT) if class_indices is None else list(class_indices)
        differences = []
        for start in range(0, len(ids_BT), MAX_BATCH_IMAGES):
            batch = slice(start, start + MAX_BATCH_IMAGES)
            ids = dict(zip([grid.name for grid in grids], ids_BT[batch].split([grid.num_tokens for grid in grids], dim=1), strict=True))
            given = {name: rows[batch] for name, rows in (given_ids or {}).items()}
            differences.append(self.chain.logit_difference(references, ids, classes[batch], given))
        return max(differences)
