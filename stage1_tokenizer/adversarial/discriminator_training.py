"""Adversarial losses of a training step, for the tokenizer and for the discriminator."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from stage1_tokenizer.adversarial.adversarial_losses import adaptive_weight, discriminator_loss, generator_loss
from stage1_tokenizer.adversarial.differentiable_augmentation import augment_images, augment_pair
from stage1_tokenizer.adversarial.discriminator import PatchDiscriminator
from stage1_tokenizer.perceptual import feature_matching_loss
from vqmosaic.recipes.tokenizer_sections import AdversarialConfig


class Adversary:
    """Computes the adversarial losses of a tokenizer and of its discriminator.

    `discriminator` is the plain module. The tokenizer's loss uses it with frozen weights. `wrapped` is the same module wrapped by Accelerate. The
    discriminator's loss uses it, so that gradients are averaged over processes.
    """

    def __init__(self, config: AdversarialConfig, discriminator: PatchDiscriminator, wrapped: nn.Module, last_layer: torch.Tensor,
                 autocast: Callable[[], AbstractContextManager] = nullcontext):
        self.config, self.discriminator, self.wrapped, self.last_layer, self.autocast = config, discriminator, wrapped, last_layer, autocast

    def generator_terms(self, images_BCHW: torch.Tensor, reconstructions_BCHW: torch.Tensor, reconstruction_loss: torch.Tensor,
                        share: float, feature_weight: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The adversarial part of the tokenizer's loss, and its terms by name for the log.

        Args:
            reconstruction_loss: the loss that the adaptive weight balances against.
            share: the current fraction of the adversarial weight, in [0, 1]. Also scales feature matching.
            feature_weight: weight of feature matching, 0 for none.
        """
        self.discriminator.requires_grad_(False)
        # the same augmentation for an image and its reconstruction, because feature matching compares them
        fake_BCHW, real_BCHW = augment_pair(reconstructions_BCHW.float(), images_BCHW, self.config.augmentations)
        with self.autocast():
            logits_B1hw, fake_features = self.discriminator.features(fake_BCHW)
            if feature_weight:
                with torch.no_grad():
                    _, real_features = self.discriminator.features(real_BCHW)
        adversarial = generator_loss(self.config.loss, logits_B1hw)
        balance = adversarial.new_ones(())
        if self.config.balance == "adaptive":
            balance = adaptive_weight(reconstruction_loss, adversarial, self.last_layer, self.config.balance_limit)
            if dist.is_initialized():
                dist.all_reduce(balance)
                balance = balance / dist.get_world_size()
        total = share * self.config.weight * balance * adversarial
        terms = {"adversarial_loss": adversarial, "adversarial_weight": share * self.config.weight * balance}
        if feature_weight:
            matching = feature_matching_loss(real_features, fake_features)
            total = total + share * feature_weight * matching
            terms["discriminator_features"] = matching
        return total, terms

    def discriminator_terms(self, images_BCHW: torch.Tensor, reconstructions_BCHW: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The discriminator's loss on images and detached reconstructions, and its terms (with mean logits) by name for the log."""
        self.discriminator.requires_grad_(True)
        both = torch.cat([images_BCHW, reconstructions_BCHW.detach().to(images_BCHW.dtype)])
        real_B1hw, fake_B1hw = self.wrapped(augment_images(both, self.config.augmentations)).float().chunk(2)
        loss = discriminator_loss(self.config.loss, real_B1hw, fake_B1hw)
        return loss, {"discriminator_loss": loss, "real_logits": real_B1hw.mean(), "fake_logits": fake_B1hw.mean()}
