"""The output folders of `generate` and `reconstruct`."""
