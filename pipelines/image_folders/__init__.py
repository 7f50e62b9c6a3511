"""The output folders of `vqmosaic generate` and `vqmosaic reconstruct`."""
