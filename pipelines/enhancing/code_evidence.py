"""The evidence of an image for each code: how likely the encoder's vectors are if the true image has this code, under noise of a known level.

In comments and names: B images, n tokens of a grid, F entries of an encoder vector, K codes.
"""

import torch
import torch.nn.functional as F

from pipelines.decoded_images import map_batches, tokenizer_batch_size
from stage1_tokenizer.tokenizer_protocol import Tokenizer
from vqmosaic.seeding import generator

NOISE_SAMPLES = 4
"""How often noise is added to an image to measure how far it moves the encoder's vectors."""
SMALLEST_VARIANCE = 1e-10
"""Added to the variances, so that the evidence is finite if a vector and its code are equal."""


def evidence_for_codes(tokenizer: Tokenizer, images_BCHW: torch.Tensor, noise: float) -> dict[str, torch.Tensor]:
    """The log likelihood (B, n, K) of the encoder's vectors of images in [-1, 1] for each code, by grid, up to a constant. On the CPU.

    `noise` is its standard deviation, in the units of the pixels. Grids whose ids are not those of the nearest codes are left out.

    Vectors are Gaussian around the code of the true image. Their covariance is that of two independent parts: the quantization, with the mean squared
    distance of the vectors to their nearest codes in all directions, and the noise. For the latter, noise is added to the reconstruction of the
    image, and encoded. Noise moves vectors much farther in some directions than in others, so distances alone say little about the true code.
    """
    batches = images_BCHW.split(tokenizer_batch_size(tokenizer.transform.image_size))
    parts = map_batches(batches, tokenizer.device, lambda batch_BCHW: evidence_of_batch(tokenizer, batch_BCHW, noise))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.inference_mode()
def evidence_of_batch(tokenizer: Tokenizer, images_BCHW: torch.Tensor, noise: float) -> dict[str, torch.Tensor]:
    """`evidence_for_codes` for images on the tokenizer's device that fit into one batch."""
    observed = tokenizer.vectors_and_codes(images_BCHW)
    if not observed:
        return {}
    ids = tokenizer.encode_grids(images_BCHW)
    restored_BCHW = tokenizer.decode_grids(ids).clamp(-1, 1)
    without_noise = tokenizer.vectors_and_codes(restored_BCHW)
    shifts: dict[str, list[torch.Tensor]] = {name: [] for name in observed}
    for number in range(NOISE_SAMPLES):
        # the same noise for each image, so that the evidence of an image does not depend on the others
        noise_CHW = torch.from_numpy(generator("restoration noise", number).standard_normal(images_BCHW.shape[1:], dtype="float32"))
        noisy_BCHW = (restored_BCHW + noise * noise_CHW.to(restored_BCHW)).clamp(-1, 1)
        for name, (vectors_BhwF, _) in tokenizer.vectors_and_codes(noisy_BCHW).items():
            shifts[name].append((vectors_BhwF - without_noise[name][0]).flatten(1, 2))
    evidence = {}
    for name, (vectors_BhwF, codes_KF) in observed.items():
        vectors_BnF, shifts_BsF = vectors_BhwF.flatten(1, 2), torch.cat(shifts[name], dim=1)
        quantization_B = (vectors_BnF - F.embedding(ids[name].flatten(1), codes_KF)).square().mean(dim=(1, 2)) + SMALLEST_VARIANCE
        identity_FF = torch.eye(codes_KF.shape[1], device=codes_KF.device)
        covariance_BFF = shifts_BsF.mT @ shifts_BsF / shifts_BsF.shape[1] + quantization_B[:, None, None] * identity_FF
        whitening_BFF = torch.linalg.inv(torch.linalg.cholesky(covariance_BFF)).mT
        # one image at a time, because each has its own covariance and thus its own K whitened codes
        distances = [torch.cdist(vectors_nF @ whitening_FF, codes_KF @ whitening_FF) for vectors_nF, whitening_FF
                     in zip(vectors_BnF, whitening_BFF, strict=True)]
        evidence[name] = torch.stack([-0.5 * distances_nK.square() for distances_nK in distances]).cpu()
    return evidence
