"""Adversarial losses by name, on discriminator logits, and the adaptive weight of VQGAN. All in float32.

Larger logits mean "real". With D = sigmoid(logit), discriminator and generator minimise

    name              discriminator                                         generator           source
    hinge             1/2 (mean max(0, 1 - real) + mean max(0, 1 + fake))   -mean fake          Lim & Ye 2017, the default of taming-transformers
    vanilla           -1/2 (mean log D(real) + mean log(1 - D(fake)))       mean log(1 - D)     Goodfellow et al. 2014, eq. 1: the minimax game
    non_saturating    as vanilla                                            -mean log D         Goodfellow et al. 2014, section 3

Other code uses the name `vanilla` differently: taming-transformers pairs this discriminator loss with -mean fake, pix2pix with
-mean log D. Here it is the original minimax game, whose generator gradient vanishes for images that the discriminator recognises as fake.
To reproduce taming-transformers use hinge; for pix2pix use non_saturating. Discriminator losses have the factor 1/2 of taming-transformers.
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
    """Discriminator loss, a float32 scalar. It decreases as real logits rise and as fake logits fall.

    Args:
        name: hinge, vanilla or non_saturating.
        real_logits, fake_logits: of any shape, such as (B, 1, h, w); averaged over all elements. Compute fake_logits from detached images.
    """
    return DISCRIMINATOR_LOSSES[name](real_logits.float(), fake_logits.float())


def generator_loss(name: str, fake_logits: torch.Tensor) -> torch.Tensor:
    """Generator loss, a float32 scalar. It decreases as the logits of the generated images rise.

    Args:
        name: hinge, vanilla or non_saturating.
        fake_logits: of any shape, from a discriminator with frozen parameters, but not under no_grad.
    """
    return GENERATOR_LOSSES[name](fake_logits.float())


def adaptive_weight(reconstruction_loss: torch.Tensor, adversarial_loss: torch.Tensor, last_layer: torch.Tensor, limit: float) -> torch.Tensor:
    """The adaptive weight lambda of the adversarial loss (VQGAN, Esser et al. 2021, eq. 7). Equalizes both gradient norms at the last layer.

    A detached float32 scalar in [0, limit]: |grad reconstruction| / (|grad adversarial| + 1e-6). If the adversarial gradient is zero, the weight
    is the limit (or 0 if the reconstruction gradient is zero too), which then has no effect. If a gradient is not finite, the weight is 0, so the
    adversarial loss has no effect in that step. The losses keep their non-finite values, and the trainer refuses the step.

    Args:
        reconstruction_loss, adversarial_loss: scalars that depend on last_layer. Their graphs are retained for the backward that follows.
        last_layer: the decoder's last weight, requiring grad.
        limit: the largest weight allowed; 10,000 in taming-transformers.
    """
    norms = [torch.linalg.vector_norm(torch.autograd.grad(loss, last_layer, retain_graph=True)[0].detach().float())
             for loss in (reconstruction_loss, adversarial_loss)]
    ratio = norms[0] / (norms[1] + GRADIENT_EPS)
    return torch.where(torch.isfinite(norms[0]) & torch.isfinite(norms[1]), ratio, 0.0).clamp(0.0, limit)
