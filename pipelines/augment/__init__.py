"""Labelled synthetic data sets: the command `augment` and `ImageGenerationPipeline.labelled_batches`."""
