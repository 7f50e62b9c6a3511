"""VQGAN training: discriminator, adversarial losses, augmentation and schedule."""
