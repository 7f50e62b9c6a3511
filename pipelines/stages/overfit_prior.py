"""Implements `vqmosaic train-prior RECIPE --overfit N`: checks the request, then runs the overfit test. Imports torch after the checks."""

import argparse

from pipelines.stages.stage_checks import check_architecture
from pipelines.stages.stage_inputs import input_fingerprints
from vqmosaic.errors import InputError, check_range


def overfit_prior(options: argparse.Namespace, images: int) -> int:
    """Exit code 0 if the recipe's prior memorizes this number of images within about a minute, otherwise 1. Writes nothing.

    Raises InputError for options that cannot be combined with --overfit, and if there are no tokens.
    """
    for name in ("redo", "accelerate_config"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name} cannot be combined with --overfit, which runs in one process and does not change the run. Leave it out.")
    check_range("--processes with --overfit", options.processes, at_least=1, at_most=1)
    check_range("--overfit", images, at_least=1)
    input_fingerprints(options.recipe, "prior")  # raises InputError if there are no tokens
    check_architecture(options.recipe)

    from stage2_prior.overfit import overfit

    return overfit(options.recipe, images)
