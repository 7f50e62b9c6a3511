"""Overfit test: checks in about a minute that the prior can memorize a few images.

    vqmosaic train-prior digits --overfit 8

If it cannot, something is wrong with the learning rate, number format, architecture, compiler or tokens, and more images will not help. The test
uses one process and the recipe's prior, optimizer and number format, without regularization. It reads only the tokens of the run and writes
only to a temporary folder.
"""

import dataclasses
import math
import tempfile
from collections import Counter
from collections.abc import Hashable, Sequence

import torch

from stage2_prior.losses import next_token_loss, z_loss
from stage2_prior.model.causal_lm import ATTENTION_DROPOUTS, EMBEDDING_DROPOUTS, RESIDUAL_DROPOUTS
from stage2_prior.prior import TokenPrior
from stage2_prior.prior_setup import describe_attention, prepare_prior, uniform_loss
from stage2_prior.recipe_vocabulary import vocabulary_of_recipe
from stage2_prior.token_columns import TokenColumns
from token_shards import TokenShardReader
from vqmosaic.errors import check_range
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.runs.interruption import EXIT_CODES, StopFlag
from vqmosaic.seeding import reseed_step
from vqmosaic.training.training_loop import training_steps
from vqmosaic.training.training_run import TrainingRun
from vqmosaic.wording import counted

NLL_MARGIN = 0.1
"""The images count as memorized if the NLL exceeds the irreducible NLL by at most this many nats per token."""
MAX_STEPS, MAX_MINUTES = 2000, 1.0


def overfit(recipe: Recipe, images: int, max_minutes: float = MAX_MINUTES) -> int:
    """Run the overfit test on the first `images` images of the training stream. Returns the exit code: 0 if they are memorized in time, else 1.

    After a signal, the exit code is 143 or 130. Raises InputError if there are fewer images or the tokens cannot be read.
    """
    reader = TokenShardReader(recipe.tokens_folder / "train", recipe.seed, recipe.prior_training.window_shards)
    check_range("--overfit", images, at_least=1, at_most=len(reader))
    with StopFlag() as stop, tempfile.TemporaryDirectory(prefix="vqmosaic-overfit-") as scratch:
        unregularized = overfit_recipe(recipe, images, scratch, max_minutes)
        run = TrainingRun(unregularized, "prior", unregularized.prior_training, stop)
        try:
            return memorize(run, reader, images)
        finally:
            run.end()


def overfit_recipe(recipe: Recipe, images: int, scratch: str, max_minutes: float) -> Recipe:
    """The recipe of the test, with run folder `scratch`: no dropout, label drop or weight average; constant learning rate after a short warm-up."""
    dropouts = {*ATTENTION_DROPOUTS, *RESIDUAL_DROPOUTS, *EMBEDDING_DROPOUTS} & recipe.prior.options.keys()
    prior = dataclasses.replace(recipe.prior, dropout=0.0, options=recipe.prior.options | dict.fromkeys(dropouts, 0.0))
    training = recipe.prior_training
    training = dataclasses.replace(
        training, max_steps=MAX_STEPS, max_minutes=max_minutes, batch_size=images, accumulation_steps=1, label_drop=0.0, drop_rates={},
        weight_ema_decay=0.0, learning_rate=training.learning_rate * training.learning_rate_factor, learning_rate_batch=None, warmup_fraction=0.02,
        final_learning_rate=1.0, resume="never", trackers=[])
    sampling = recipe.sampling.unguided()  # guidance is an error without label drop
    return dataclasses.replace(recipe, run_dir=scratch, prior=prior, prior_training=training, sampling=sampling)


def memorize(run: TrainingRun, reader: TokenShardReader, images: int) -> int:
    """Train on the same images until they are memorized or the budget is used up, and print the NLL. Returns the exit code."""
    recipe, training = run.recipe, run.recipe.prior_training
    vocabulary = vocabulary_of_recipe(recipe, reader.manifest)
    prior = TokenPrior.from_config(recipe.prior, vocabulary, recipe.seed, training.order != "raster")  # trained in raster order in any case
    model = prepare_prior(prior, training, run)
    tokens = reader.read(range(images))  # in shuffled order: the first stored images may all be of one class
    ids, given = TokenColumns(reader, vocabulary).split(tokens.ids_BT)
    labels = tokens.labels_B.tolist()
    conditions = [(label, *row) for label, row in zip(labels, given.tolist(), strict=True)] if vocabulary.conditions else labels
    irreducible_nll = conditional_entropy(ids.tolist(), conditions) / vocabulary.num_tokens
    goal = irreducible_nll + NLL_MARGIN
    run.report.table("overfit test", {
        "images": f"{images} of {len(reader):,}, {counted(vocabulary.num_tokens, 'token')} each",
        "attention": describe_attention(prior.model, run.accelerator.device, run.accelerator.mixed_precision),
        "learning rate": f"{training.learning_rate:.4g}", "dtype": f"{run.accelerator.mixed_precision} autocast, float32 weights",
        "goal": f"at most {goal:.3f} nats per token, of which {irreducible_nll:.3f} are irreducible: the choice among the images of "
                f"{'equal conditions' if vocabulary.conditions else 'a class'}",
        "budget": f"{counted(MAX_STEPS, 'step')} or {training.max_minutes:g} minute{'' if training.max_minutes == 1 else 's'}"})
    ids_BT, classes_B, given_BG = (torch.from_numpy(part).to(run.accelerator.device) for part in (ids, tokens.labels_B, given))

    def forward_and_backward() -> torch.Tensor:
        """Compute the gradients of one step. Returns the NLL of the images."""
        reseed_step(recipe.seed, "overfit", run.state.step)
        model.train()
        with run.accelerator.accumulate(model):
            logits_BTK = model(ids_BT, classes_B, given_BG)
            loss = next_token_loss(logits_BTK, ids_BT)
            run.accelerator.backward(loss + training.z_loss * z_loss(logits_BTK) if training.z_loss else loss)
        return loss.detach()

    report_at = 0
    for progress in training_steps(run):
        loss = forward_and_backward()
        nll = float(loss)
        if nll <= goal:
            break
        if run.state.step >= report_at:
            run.report(f"step {run.state.step:,}: NLL {nll:.4f} nats per token")
            report_at = max(5, 2 * run.state.step)
        run.optimizer_step(loss, progress)
        run.end_step()
    else:  # the budget is used up, or a signal arrived
        if run.stop.signal:
            run.report("stopped by a signal; nothing was saved")
            return EXIT_CODES[run.stop.signal]
        nll = float(forward_and_backward())
    run.report(f"step {run.state.step:,}: NLL {nll:.4f} nats per token")
    if nll <= goal:
        run.report(f"memorized after {counted(run.state.step, 'step')}: NLL {nll:.4f}, at most {goal:.3f} required. The setup works.")
        return 0
    run.report(f"NOT memorized after {counted(run.state.step, 'step')}: NLL {nll:.4f}, at most {goal:.3f} required; a uniform distribution has "
               f"{uniform_loss(vocabulary):.3f}. Check prior_training.learning_rate ({training.learning_rate:.4g} here), mixed_precision, "
               "and the size and options of prior before training on more images.")
    return 1


def conditional_entropy(ids_BT: list[list[int]], given_B: Sequence[Hashable]) -> float:
    """Mean entropy, in nats per image, of an image given its class (and further conditions).

    All images of a class are equally likely; identical images are one outcome.
    """
    class_counts = Counter(given_B)
    image_counts = Counter((given, *ids) for ids, given in zip(ids_BT, given_B, strict=True))
    return sum(math.log(class_counts[given] / image_counts[given, *ids]) for ids, given in zip(ids_BT, given_B, strict=True)) / len(given_B)
