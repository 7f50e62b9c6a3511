"""The method of a pipeline that removes noise and damage: it draws tokens again that are likely both for the given image and for the prior.

    out = pipe.enhance(noisy, noise=25, seed=1)
    out.images[0].save("clean.png")

Encoding and decoding alone give the nearest image of the codebook. Here, the code of each token is drawn from the product of two factors: its
probability after the other tokens, by the prior, and the likelihood of the encoder's vector if this were the code of the true image, at the given
level of noise (code_evidence.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipelines.decoded_images import OUTPUT_TYPES, to_output_type
from pipelines.editing.edit_methods import EditingMethods, Labels
from pipelines.editing.given_images import EDITED, images_of_size, tokens_of
from pipelines.editing.masked_images import MaskedImages, masks_from, share_in_masks, token_side
from pipelines.editing.scores import MAX_LOGITS, unexpected_bits
from pipelines.enhancing.code_evidence import evidence_for_codes
from pipelines.enhancing.enhance_settings import NOISE, checked_noise, checked_strength
from pipelines.generation_output import GenerationOutput, Images
from pipelines.generation_request import GUIDANCE_SETTINGS, Request, check_training_size
from stage2_prior.generation.passes import UNKNOWN
from token_shards.manifest import Grid, grid_columns
from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.recipes.field_types import as_integer
from vqmosaic.seeding import image_seed

LEVELS = 127.5
"""8-bit steps in a unit of images in [-1, 1]."""


class EnhancingMethods(EditingMethods):
    """The method of ImageGenerationPipeline that restores images. Sizes and further arguments are those of EditingMethods."""

    def enhance(self, image: Images, noise: float = NOISE, strength: float = 1.0, mask: Any = None, class_labels: Labels = None, average: int = 1,
                num_tries: int = 1, **arguments: Any) -> GenerationOutput:
        """Images without noise and damage. All pixels are decoded from tokens, so fine detail that the tokenizer does not keep is lost.

        Tokens are drawn from the product of the prior, given the other tokens, and the likelihood of the image for each code. Without guidance,
        unless guidance_scale or guidance is given. A prior that was trained in raster order sees only the tokens before each.

        Args:
            image: one or several images of the pipeline's size.
            noise: how far the given pixels are from the true ones: the standard deviation, on the 8-bit scale (0 to 255). More noise gives the
                prior more influence.
            strength: the share of the tokens that are drawn again, above 0 and at most 1: those that surprise the prior most, given the others. All
                other tokens are those of the given image.
            mask: pixels that are missing, as in `inpaint`. They have no influence. Only tokens that cover one are drawn, and only masked pixels
                change: the others are those of the given image, bit for bit.
            class_labels: the class of the images: one for all, or one for each. None for a pipeline without classes, or for no class.
            average: each result is the mean of this many. A single sample is sharp; the mean of several is smoother, and closer to the true image.
                `token_ids` and `seeds` are those of the first one.
            num_tries: how often each result is drawn. The most likely one is returned, by the likelihood of its tokens and that of the given image.
            arguments: see EditingMethods. With temperature 0, each token is the most likely one.

        Raises:
            InputError: another size of the image or the mask, a noise or strength out of range, strength 1 without a mask for a tokenizer whose ids
                are not those of the nearest codes, or what a call of the pipeline raises.
        """
        request, generation = self._enhance_request(image, noise, strength, mask, class_labels, average, num_tries, **arguments)
        return self._generate_means(request, average, **generation)

    def enhance_part(self, images: Images, positions: Sequence[int], seed: int, noise: float = NOISE, strength: float = 1.0,
                     class_labels: Labels = None, average: int = 1, num_tries: int = 1, **arguments: Any) -> GenerationOutput:
        """The results of `enhance` for a part of many images, so that not all have to be in memory.

        `positions` are those of these images among all of them. The results are those of a single call with all images and this seed.
        `class_labels` is one class for all of these images, or one for each. Other arguments are those of `enhance`.
        """
        request, generation = self._enhance_request(images, noise, strength, None, class_labels, average, num_tries, seed=seed, **arguments)
        results = average * arguments.get("num_images_per_label", 1)
        if len(request.seeds) != results * len(positions):
            raise InputError(f"there are {len(positions)} positions and {len(request.seeds) // results} images; give one position for each image.")
        seeds = [image_seed(seed, position * results + number) for position in positions for number in range(results)]
        return self._generate_means(request._replace(seeds=seeds), average, **generation)

    def _generate_means(self, request: Request, average: int, output_type: str = "pil", **generation: Any) -> GenerationOutput:
        """The means of this many successive images of a request. Everything else is that of the first one of them."""
        if average == 1:
            return self._generate(request, output_type, **generation)
        check_name("output_type", output_type, OUTPUT_TYPES)
        out = self._generate(request, "pt", **generation)
        if out.stopped or out.token_ids is None:
            return out
        assert isinstance(out.images, torch.Tensor)  # type pt
        means_NCHW = out.images.unflatten(0, (-1, average)).mean(dim=1)
        if request.finish is not None:  # rounding of the mean must not change pixels that are kept
            means_NCHW = torch.cat([request.finish(mean_1CHW, number * average) for number, mean_1CHW in enumerate(means_NCHW.split(1))])
        firsts = slice(None, None, average)
        ids = {name: ids[firsts] for name, ids in out.token_ids.items()} if isinstance(out.token_ids, dict) else out.token_ids[firsts]
        return GenerationOutput(to_output_type(means_NCHW, output_type, keep_alpha=True), ids, out.seeds[firsts],
                                out.class_indices and out.class_indices[firsts], places=range(len(means_NCHW)),
                                given_ids={name: ids_Nn[firsts] for name, ids_Nn in out.given_ids.items()})

    def _enhance_request(self, image: Images, noise: float, strength: float, mask: Any, class_labels: Labels, average: int, num_tries: int,
                         num_images_per_label: int = 1, **arguments: Any) -> tuple[Request, dict[str, Any]]:
        """The checked request for `average` images for each result of `enhance`, and the arguments of `_generate`."""
        # 1. Check the request, before anything slow
        tokenizer, grids = self.tokenizer, self.tokenizer.grids
        check_training_size("enhance", arguments)
        images_NCHW = images_of_size(image, tokenizer.transform, tokenizer.transform.sides, EDITED)
        noise, strength = checked_noise(noise), checked_strength(strength)
        masks_NHW = None if mask is None else masks_from(mask, len(images_NCHW), tokenizer.transform.sides)
        check_range("average", as_integer("average", average), at_least=1)
        check_range("num_images_per_label", as_integer("num_images_per_label", num_images_per_label), at_least=1)
        request, generation = self._check_edit(images_NCHW, class_labels, num_tries, num_images_per_label * average, **arguments)
        if all(arguments.get(name) is None for name in GUIDANCE_SETTINGS):
            request = request._replace(sampling=request.sampling.unguided())  # the recommended scale would outweigh the given image
        results = len(request.seeds) // len(images_NCHW)
        if strength == 1 and mask is None:
            self.check_has_evidence()

        # 2. Pixels that are missing, and the tokens that may be drawn
        masked = None if masks_NHW is None else MaskedImages(images_NCHW, masks_NHW, token_side(grids, tokenizer.transform.sides))
        filled_NCHW = images_NCHW if masked is None else masked.filled()
        missing_NT = None if masks_NHW is None else share_in_masks(masks_NHW, grids)

        tokens_and_codes = sum(grid.num_tokens * grid.codebook_size for grid in grids)
        batch_size = as_integer("batch_size", generation["batch_size"])
        generation["batch_size"] = min(batch_size, max(1, MAX_LOGITS // tokens_and_codes))  # the evidence has a value for each token and code

        # 3. For each batch: the tokens of the image, the evidence for each code, and which tokens are drawn
        def prepare(part: Request, positions: range) -> Request:
            first, last = positions[0] // results, positions[-1] // results
            images = slice(first, last + 1)
            rows = [position // results - first for position in positions]
            ids_BT = tokens_of(tokenizer, filled_NCHW[images])[rows]
            evidence = evidence_for_codes(tokenizer, filled_NCHW[images], noise / LEVELS)
            is_drawn_BT = torch.ones_like(ids_BT, dtype=torch.bool)
            if missing_NT is not None:
                evidence = weighted_evidence(evidence, 1 - missing_NT[images], grids)
                is_drawn_BT = (missing_NT[images] > 0)[rows]
            if strength < 1:
                bits_BT = unexpected_bits(tokenizer, self.chain, ids_BT, part.classes, part.given)
                is_drawn_BT = largest_share(bits_BT, is_drawn_BT, strength, grids)
            return part._replace(known_BT=ids_BT.masked_fill(is_drawn_BT, UNKNOWN), evidence={name: each[rows] for name, each in evidence.items()})

        # 4. All tokens are decoded. Then missing pixels are put into the given images
        def finish(drawn_BCHW: torch.Tensor, first: int) -> torch.Tensor:
            assert masked is not None
            return masked.paste(drawn_BCHW, [position // results for position in range(first, first + len(drawn_BCHW))])

        return request._replace(prepare=prepare, finish=None if masked is None else finish), generation

    def check_has_evidence(self) -> None:
        """Raise InputError unless a given image says something about the tokens of each grid. Otherwise the prior would draw another image."""
        transform = self.tokenizer.transform
        known = self.tokenizer.vectors_and_codes(torch.zeros(1, *transform.shape, device=self.tokenizer.device))
        if lacking := [grid.name for grid in self.tokenizer.grids if grid.name not in known]:
            raise InputError("strength is 1, so all tokens are drawn, but this tokenizer does not choose the nearest codes (grid "
                             f"{', '.join(lacking)}), so the result would not depend on the image. Give a strength below 1, such as 0.2.")


def weighted_evidence(evidence: Mapping[str, torch.Tensor], weights_BT: torch.Tensor, grids: Sequence[Grid]) -> dict[str, torch.Tensor]:
    """The evidence of each token times its weight."""
    columns = grid_columns(grids)
    return {name: each_BnK * weights_BT[:, columns[name], None] for name, each_BnK in evidence.items()}


def largest_share(bits_BT: torch.Tensor, is_candidate_BT: torch.Tensor, share: float, grids: Sequence[Grid]) -> torch.Tensor:
    """Which tokens (B, T) have the most bits: this share of the candidates of each grid, at least one of them."""
    parts = []
    for columns in grid_columns(grids).values():
        is_candidate_Bn = is_candidate_BT[:, columns]
        count_B1 = (share * is_candidate_Bn.sum(dim=1, keepdim=True)).round().clamp_min(1)
        order_Bn = bits_BT[:, columns].masked_fill(~is_candidate_Bn, -torch.inf).argsort(dim=1, descending=True, stable=True)
        parts.append((order_Bn.argsort(dim=1) < count_B1) & is_candidate_Bn)
    return torch.cat(parts, dim=1)
