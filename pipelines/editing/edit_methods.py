"""The methods of a pipeline that draw a part of an image again, and that score images.

    out = pipe.inpaint(image, mask, class_labels="cat", num_tries=4, seed=1)
    out.images[0].save("edited.png")

A prior that was trained for any order draws exactly the masked tokens, given all others. A prior that was trained in raster order draws each masked
token given only those before it, row by row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pipelines.condition_inputs import ConditionInputs
from pipelines.decoded_images import tokenizer_batch_size
from pipelines.editing.edit_inputs import single_given
from pipelines.editing.given_images import images_and_masks, tokens_of
from pipelines.editing.masked_images import MaskedImages, token_side, tokens_in_masks
from pipelines.editing.scores import Scores, bits_of_tokens, scores_of_tokens
from pipelines.generation_output import GenerationOutput, Images
from pipelines.generation_request import Given, Request, check_request, check_settings, check_training_size
from stage1_tokenizer.image_files.images import as_batches
from stage1_tokenizer.tiles.tiling import OVERLAP, Tiling
from stage1_tokenizer.tokenizer_protocol import Tokenizer
from stage2_prior.generation.passes import UNKNOWN
from stage2_prior.generation.prior_chain import PriorChain
from vqmosaic.errors import InputError, check_range
from vqmosaic.recipes.field_types import as_integer
from vqmosaic.recipes.image_sizes import ImageSize
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.seeding import generator

Labels = Sequence[str | int] | str | int | None
"""Class names (strings) or indices (integers): one for all images, or one for each."""
EDIT_ARGUMENTS = ("class_labels", "num_tries", "num_images_per_label", "seed", "prompt", "condition_image", "given_ids", "size", "window_overlap",
                  "output_type", "callback", "batch_size", "compile")
"""The arguments of all methods that edit, besides the image, what is drawn again, and the sampling settings."""


class EditingMethods(ABC):
    """The methods of ImageGenerationPipeline that start from images.

    Images that are edited must have the size of the pipeline. `inpaint`, `outpaint` and `complete` also make larger results: `size` is their height
    and width, and they are drawn in windows of the training size (see `size` and `window_overlap` of a call). Images and masks then have this size.

    The results are a GenerationOutput. Further arguments are those of a call of the pipeline: num_images_per_label (results per image), seed, prompt,
    given_ids, output_type, callback, batch_size, compile and the sampling settings. Images of conditions are given as condition_image. Results of
    type pil keep alpha.
    """

    tokenizer: Tokenizer
    chain: PriorChain
    inputs: ConditionInputs
    sampling: SamplingConfig

    @abstractmethod
    def _generate(self, request: Request, output_type: str = "pil", callback: Callable[[int, int], bool | None] | None = None, batch_size: int = 64,
                  compile: bool = False) -> GenerationOutput:
        """All images of a checked request together."""

    @abstractmethod
    def _sample_batches(self, request: Request, output_type: str, callback: Callable[[int, int], bool | None] | None, batch_size: int, compile: bool,
                        skip: Callable[[range], bool] | None = None) -> Iterator[GenerationOutput]:
        """The images of a checked request, one batch at a time."""

    def _tiling(self, size: ImageSize | None, overlap: float | None) -> Tiling | None:
        """The windows of images of this size; None for the training size. Raises InputError for a size that is not possible."""
        if size is None:
            if overlap is not None:
                raise InputError(f"window_overlap is {overlap!r}, but size is not given, so there is only one window. Give size, or leave it out.")
            return None
        grids = [*self.tokenizer.grids, *self.inputs.image_grids]
        tiling = Tiling.checked(self.tokenizer.transform.sides, grids, size, OVERLAP if overlap is None else overlap)
        return None if tiling.image == tiling.sides else tiling

    # --- editing -----------------------------------------------------------------------------------------------------------

    def inpaint(self, image: Images, mask: Any, class_labels: Labels = None, num_tries: int = 1, **arguments: Any) -> GenerationOutput:
        """Draw the masked part of an image again. All other pixels are those of the given image, bit for bit.

        Tokens that cover a masked pixel are drawn, given the others. In a band inside the mask, at most as wide as a token, new pixels are adapted to
        the kept ones at the edge. What is under the mask has no influence. `class_labels` may be another class than that of the image.

        Args:
            image: one or several images of the pipeline's size, or of `size`.
            mask: a PIL image (white is drawn again), or a bool array or tensor (H, W) (True is drawn again). One for all images, or a list of one
                for each.
            class_labels: the class of the result: one for all images, or one for each. None for a pipeline without classes, or for no class.
            num_tries: how often each result is drawn. The most likely one is returned, by the likelihood of the whole image.
            arguments: see the class.

        Raises:
            InputError: another size of the image or the mask, a mask without white pixels, or what a call of the pipeline raises.
        """
        request, generation = self._edit_request(image, "mask", mask, class_labels, num_tries, **arguments)
        return self._generate(request, **generation)

    def outpaint(self, image: Images, box: Sequence[int], class_labels: Labels = None, num_tries: int = 1, **arguments: Any) -> GenerationOutput:
        """Draw what lies around an image. `box` is its place in the result: left, top, right and bottom in pixels, as in Pillow.

        The image must have the size of the box. Other arguments are those of `inpaint`.
        """
        request, generation = self._edit_request(image, "box", box, class_labels, num_tries, **arguments)
        return self._generate(request, **generation)

    def complete(self, image: Images, keep: str | float = "top", class_labels: Labels = None, num_tries: int = 1,
                 **arguments: Any) -> GenerationOutput:
        """Keep one side of an image and draw the rest. `keep` is "top" or "left", for one half, or the share of the rows to keep, from the top.

        Keeping the top suits all priors, also those trained in raster order. Other arguments are those of `inpaint`.
        """
        request, generation = self._edit_request(image, "keep", keep, class_labels, num_tries, **arguments)
        return self._generate(request, **generation)

    def variations(self, image: Images, strength: float = 0.5, class_labels: Labels = None, num_tries: int = 1, **arguments: Any) -> GenerationOutput:
        """Images that are similar to the given one. `strength`, above 0 and at most 1, is the share of the tokens that are drawn again.

        The tokens to draw are chosen at random by the seed of each result. All pixels are decoded from tokens, so the other places differ a little
        from the given image, too. Other arguments are those of `inpaint`.
        """
        request, generation = self._edit_request(image, "strength", strength, class_labels, num_tries, **arguments)
        return self._generate(request, **generation)

    def edit_batches(self, image: Images, class_labels: Labels = None, num_tries: int = 1, *, mask: Any = None, box: Sequence[int] | None = None,
                     keep: str | float | None = None, strength: float | None = None, skip: Callable[[range], bool] | None = None,
                     **arguments: Any) -> Iterator[GenerationOutput]:
        """Yield the results of one of the other methods one batch at a time, as `batches` does, so that memory does not grow with their number.

            for out in pipe.edit_batches(image, mask=mask, num_images_per_label=1000, seed=1):
                ...

        Exactly one of `mask` (`inpaint`), `box` (`outpaint`), `keep` (`complete`) and `strength` (`variations`) is given. `skip` is that of
        `batches`, and other arguments are those of `inpaint`.
        """
        given = {"mask": mask, "box": box, "keep": keep, "strength": strength}
        drawn_by = single_given(given)
        request, generation = self._edit_request(image, drawn_by, given[drawn_by], class_labels, num_tries, **arguments)
        return self._sample_batches(request, **generation, skip=skip)

    def _edit_request(self, image: Images, drawn_by: str, value: Any, class_labels: Labels, num_tries: int, *, size: ImageSize | None = None,
                      window_overlap: float | None = None, **arguments: Any) -> tuple[Request, dict[str, Any]]:
        """The request of an edit, in which the argument `drawn_by` with this value says what to draw, and the arguments of `_generate`."""
        # 1. Check the request, before anything slow
        if drawn_by == "strength":
            check_training_size("variations", {"size": size})
        grids, transform, tiling = self.tokenizer.grids, self.tokenizer.transform, self._tiling(size, window_overlap)
        images_NCHW, masks_NHW = images_and_masks(image, drawn_by, value, transform, None if tiling is None else tiling.image)
        request, generation = self._check_edit(images_NCHW, class_labels, num_tries, tiling=tiling, **arguments)
        results = len(request.seeds) // len(images_NCHW)

        # 2. The tokens to draw: some at random places, all others are those of the image
        if masks_NHW is None:
            known_BT = tokens_of(self.tokenizer, images_NCHW).repeat_interleave(results, dim=0)
            is_drawn_BT = torch.stack([self._random_tokens(value, seed) for seed in request.seeds])
            return request._replace(known_BT=known_BT.masked_fill(is_drawn_BT, UNKNOWN)), generation

        # or those that cover a masked pixel. After all are decoded, the masked pixels are put into the given images
        masked = MaskedImages(images_NCHW, masks_NHW, token_side(grids, transform.sides))
        whole_grids = grids if tiling is None else tiling.image_grids[:len(grids)]  # those of conditions follow
        known_NT = tokens_of(self.tokenizer, masked.filled()).masked_fill(tokens_in_masks(masks_NHW, whole_grids), UNKNOWN)

        def finish(drawn_BCHW: torch.Tensor, first: int) -> torch.Tensor:
            return masked.paste(drawn_BCHW, [position // results for position in range(first, first + len(drawn_BCHW))])

        return request._replace(known_BT=known_NT.repeat_interleave(results, dim=0), finish=finish), generation

    def _random_tokens(self, share: float, seed: int) -> torch.Tensor:
        """Which tokens (T,) to draw: this share of each grid, at least one token, by the seed of the image."""
        parts = []
        for number, grid in enumerate(self.tokenizer.grids):
            places = generator("variation", number, seed).permutation(grid.num_tokens)[:max(1, round(share * grid.num_tokens))]
            parts.append(torch.zeros(grid.num_tokens, dtype=torch.bool).index_fill(0, torch.from_numpy(places), True))
        return torch.cat(parts)

    def _check_edit(self, images_NCHW: torch.Tensor, class_labels: Labels, num_tries: int, num_images_per_label: int = 1, seed: int | None = None, *,
                    tiling: Tiling | None = None, prompt: Any = None, condition_image: Any = None,
                    given_ids: Mapping[str, torch.Tensor] | None = None, output_type: str = "pil",
                    callback: Callable[[int, int], bool | None] | None = None, batch_size: int = 64, compile: bool = False,
                    **settings: Any) -> tuple[Request, dict[str, Any]]:
        """The request for results of these images, one after another, and the arguments of `_generate`. Raises InputError for invalid arguments."""
        check_settings(settings, EDIT_ARGUMENTS)
        check_range("num_tries", as_integer("num_tries", num_tries), at_least=1)
        given = Given(prompt, condition_image, given_ids)
        request = self._check_paired(images_NCHW, class_labels, given, num_images_per_label, seed, settings, tiling)
        self.chain.check_order(request.sampling, keep_unseen=True)
        generation = {"output_type": output_type, "callback": callback, "batch_size": batch_size, "compile": compile}
        return request._replace(num_tries=num_tries, keep_alpha=True), generation

    def _check_paired(self, images_NCHW: Sequence[Any] | torch.Tensor, class_labels: Labels, given: Given, results: int, seed: int | None,
                      settings: dict[str, Any], tiling: Tiling | None = None) -> Request:
        """The request for results of each image. A single image counts for all classes and conditions."""
        vocabulary = self.chain.vocabulary
        prompted = [] if given.prompt is None else list(self.inputs.texts)
        lacks_images = self.inputs.tokenizers and given.image is None and not given.ids
        if lacks_images and (why := vocabulary.why_not_sampled(class_labels is not None, prompted)):
            raise InputError(f"{why} Give images of conditions as condition_image, and texts as prompt.")
        return check_request(vocabulary, self.inputs, self.sampling, class_labels, given, results, seed, settings, {"images": images_NCHW},
                             tiling)

    # --- scores ------------------------------------------------------------------------------------------------------------

    def score(self, images: Images, class_labels: Labels = None, *, prompt: Any = None, condition_image: Any = None,
              given_ids: Mapping[str, torch.Tensor] | None = None) -> Scores:
        """How unusual images and their parts are for the prior: bits (B,) of each image, and a map of the bits at each place, (B, h, w).

            bits, bits_map = pipe.score(images)

        Bits are the negative logarithm to base 2 of the likelihood of the tokens, each given those before it in raster order. Several grids give a
        dict of maps. Images of another size are resized and cropped as in training.

        Args:
            images: a PIL image, a list of them, or a tensor (B, C, H, W) in [-1, 1].
            class_labels: the class of the images: one for all, or one for each. None for a pipeline without classes, or for no class.
            prompt, condition_image, given_ids: the conditions, as `prompt`, `image` and `given_ids` of a call.

        Raises:
            InputError: something is missing that was never dropped in training, or given that the prior was not trained with.
        """
        given = images if isinstance(images, (torch.Tensor, list, tuple)) else [images]
        request = self._check_paired(given, class_labels, Given(prompt, condition_image, given_ids), 1, 0, {})
        transform = self.tokenizer.transform
        batches = as_batches(images, transform, tokenizer_batch_size(transform.image_size))
        ids_NT = torch.cat([tokens_of(self.tokenizer, images_BCHW) for images_BCHW in batches])
        bits_BT = bits_of_tokens(self.tokenizer, self.chain, ids_NT.expand(len(request.seeds), -1), request.classes, request.given)
        return scores_of_tokens(self.tokenizer, bits_BT)
