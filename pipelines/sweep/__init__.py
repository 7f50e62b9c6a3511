"""`vqmosaic sweep`: chooses sampling settings by Frechet distance."""
