"""Losses of a VQ-GAN by name, on logits of a discriminator, and the weight that balances them. All in float32.

Larger logits mean "real". With D = sigmoid(logit), the losses that are minimised are

    name              discriminator                                         generator           source
    hinge             1/2 (mean max(0, 1 - real) + mean max(0, 1 + fake))   -mean fake          Lim & Ye 2017, the default of taming-transformers
    vanilla           -1/2 (mean log D(real) + mean log(1 - D(fake)))       mean log(1 - D)     Goodfellow et al. 2014, eq. 1: the minimax game
    non_saturating    as vanilla                                            -mean log D         Goodfellow et al. 2014, section 3

Other programs mean other things by `vanilla`: taming-transformers pairs that discriminator loss with -mean fake, pix2pix with
-mean log D. Here it is the game as it was first written, whose generator learns least from what the discriminator sees through;
whoever comes from either of them wants hinge or non_saturating. The discriminator's losses carry taming's factor 1/2.
"""

import torch
import torch.nn.functional as F

GRADIENT_EPS = 1e-6
"""delta in Esser et al. 2021, eq. 7."""


def _hinge(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def _cross_entropy(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


DISCRIMINATOR_LOSSES = {"hinge": _hinge, "vanilla": _cross_entropy, "non_saturating": _cross_entropy}
GENERATOR_LOSSES = {
    "hinge": lambda fake_logits: -fake_logits.mean(),
    "vanilla": lambda fake_logits: -F.softplus(fake_logits).mean(),  # log(1 - sigmoid(x)) = -softplus(x)
    "non_saturating": lambda fake_logits: F.softplus(-fake_logits).mean(),
}


def discriminator_loss(name: str, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """What the discriminator minimises, a float32 scalar: it falls as real logits rise and as fake logits fall.

    Args:
        name: hinge, vanilla or non_saturating.
        real_logits, fake_logits: of any shape, say (B, 1, h, w); the mean is over all places. Fakes are to be made from detached images.
    """
    return DISCRIMINATOR_LOSSES[name](real_logits.float(), fake_logits.float())


def generator_loss(name: str, fake_logits: torch.Tensor) -> torch.Tensor:
    """What the generator minimises, a float32 scalar: it falls as the logits of its images rise.

    Args:
        name: hinge, vanilla or non_saturating.
        fake_logits: of any shape, from a discriminator whose own parameters are frozen, but not under no_grad.
    """
    return GENERATOR_LOSSES[name](fake_logits.float())


def adaptive_weight(reconstruction_loss: torch.Tensor, adversarial_loss: torch.Tensor, last_layer: torch.Tensor, limit: float) -> torch.Tensor:
    """The factor that gives the adversarial loss as large a gradient at the last layer as the reconstruction loss has (Esser et al. 2021, eq. 7).

    A detached float32 scalar in [0, limit]: |grad reconstruction| / (|grad adversarial| + 1e-6). Without any adversarial gradient it is the
    limit (or 0, where there is no reconstruction gradient either), which then multiplies nothing. Where a gradient is not finite it is 0, so
    that the discriminator has no say in that step; the losses themselves stay what they are, for the trainer to refuse.

    Args:
        reconstruction_loss, adversarial_loss: scalars that both depend on last_layer; their graphs are kept for the backward that follows.
        last_layer: the decoder's last weight, requiring grad.
        limit: the largest factor allowed; taming-transformers has 10,000.
    """
    norms = [torch.linalg.vector_norm(torch.autograd.grad(loss, last_layer, retain_graph=True)[0].detach().float())
             for loss in (reconstruction_loss, adversarial_loss)]
    ratio = norms[0] / (norms[1] + GRADIENT_EPS)
    return torch.where(torch.isfinite(norms[0]) & torch.isfinite(norms[1]), ratio, 0.0).clamp(0.0, limit)
