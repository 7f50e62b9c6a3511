"""The discriminator of a VQ-GAN: network, losses, augmentation, and when it takes part."""
