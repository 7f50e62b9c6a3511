"""The methods of a pipeline that only need its tokenizer: images to tokens and back."""

from collections.abc import Callable, Mapping

import torch
from PIL import Image

from pipelines.decoded_images import Result, as_ids, decode_in_batches, map_batches, tokenizer_batch_size
from pipelines.editing.given_images import images_of_any_size, same_sizes
from pipelines.generation_output import Images
from stage1_tokenizer.image_files.images import as_batches, to_pil
from stage1_tokenizer.tiles.tiled_images import encode_tiled, reconstruct_tiled
from stage1_tokenizer.tokenizer_protocol import Ids, Tokenizer, concatenate_ids


class TokenizerMethods:
    """The methods of ImageGenerationPipeline that encode and decode images."""

    tokenizer: Tokenizer

    def encode(self, images: Images, tiled: bool = False) -> Ids:
        """Encode a PIL image, a list of them, or a tensor (B, C, H, W) in [-1, 1] to int64 ids (B, h, w), or (B, h, w, depth), on the CPU.

        If the tokenizer has several grids, returns a dict with the ids of each. PIL images are resized to the training size. With `tiled`, they keep
        their size, which must be the same for all, and are encoded in overlapping tiles of the training size.
        """
        if tiled:
            return concatenate_ids([encode_tiled(self.tokenizer, images_NCHW, batch_size=self._tiles_at_a_time())
                                    for images_NCHW in same_sizes(images_of_any_size(images, self.tokenizer.transform))])
        return concatenate_ids(self._map_images(images, self.tokenizer.encode))

    def decode(self, token_ids: torch.Tensor | Mapping[str, torch.Tensor], tiled: bool = False) -> list[Image.Image]:
        """Decode ids (B, h, w), or (B, h, w, depth) if the tokenizer has several ids per position, to PIL images (see to_pil).

        Several grids are a dict. With `tiled`, grids of any size are decoded in overlapping tiles of the training size.
        """
        batches = decode_in_batches(self.tokenizer, as_ids(token_ids), is_larger=tiled)
        return [image for images_BCHW in batches for image in to_pil(images_BCHW)]

    def reconstruct(self, images: Images, tiled: bool = False) -> list[Image.Image]:
        """Encode images to tokens and decode them again, to PIL images (see to_pil). `pipe.tokenizer.reconstruct` returns tensors.

        PIL images are resized to the training size. With `tiled`, each keeps its size, and is reconstructed in overlapping tiles.
        """
        if tiled:
            return [image for images_NCHW in images_of_any_size(images, self.tokenizer.transform)
                    for image in to_pil(reconstruct_tiled(self.tokenizer, images_NCHW, batch_size=self._tiles_at_a_time()))]
        return [image for part in self._map_images(images, lambda images_BCHW: to_pil(self.tokenizer.reconstruct(images_BCHW))) for image in part]

    def _tiles_at_a_time(self) -> int:
        """Number of tiles that are encoded or decoded together."""
        return tokenizer_batch_size(self.tokenizer.transform.image_size)

    def _map_images(self, images: Images, compute: Callable[[torch.Tensor], Result]) -> list[Result]:
        """The results of a function for batches (B, C, H, W) of the given images in [-1, 1] on the pipeline's device."""
        transform = self.tokenizer.transform
        return map_batches(as_batches(images, transform, tokenizer_batch_size(transform.image_size)), self.tokenizer.device, compute)
