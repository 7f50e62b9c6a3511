"""`vqmosaic sweep`: the choice of sampling settings by Frechet distance."""
