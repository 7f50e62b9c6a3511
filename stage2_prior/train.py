"""Train the token prior of a recipe on its token shards.

    vqmosaic train-prior digits                                          # two CPU cores, about a minute
    vqmosaic train-prior cifar10 --processes 4                           # four GPUs of one machine
    vqmosaic train-prior cifar10 --prior_training.tokens other/tokens    # on the tokens of another folder
    vqmosaic train-prior cifar10 --overfit 8                             # checks the setup in a minute, changes nothing in the run
    accelerate launch -m stage2_prior.train cifar10                      # with your own launcher, without sample images

Writes <run_dir>/prior/ (the export, a transformers checkpoint), checkpoints/prior/ and logs/prior/. Run the command again to resume.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F

from stage2_prior.losses import next_token_loss, z_loss
from stage2_prior.prior import TokenPrior
from stage2_prior.prior_setup import (
    check_first_loss,
    describe_attention,
    describe_blocks,
    prepare_prior,
    time_and_loss_of_one_step,
    uniform_loss,
)
from stage2_prior.recipe_vocabulary import describe_given, vocabulary_of_recipe
from stage2_prior.stored_images import count_stored_images
from stage2_prior.token_batches import (
    VALIDATION_RULE,
    TokenBatches,
    describe_validation,
    random_orders,
    random_share,
    validation_batches,
    warn_of_sorted_shards,
)
from stage2_prior.token_columns import TokenColumns, check_same_tokens
from stage2_prior.vocabulary import Vocabulary
from token_shards import TokenShardReader
from token_shards.manifest import describe_grids
from vqmosaic.recipes.fields_from_data import DataSize
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import PriorTrainingConfig
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.runs.launch import run_worker
from vqmosaic.runs.stage_records import write_record
from vqmosaic.seeding import reseed_step
from vqmosaic.training.running_means import RunningMeans
from vqmosaic.training.sharding import is_sharded
from vqmosaic.training.tracking import progress_lines
from vqmosaic.training.training_loop import export_best_and_last, finished_already, locked_run, training_steps
from vqmosaic.training.training_plan import describe_classes, print_plan
from vqmosaic.training.training_run import TrainingRun
from vqmosaic.wording import counted

SUFFIXES = WITHOUT_CLASS, WITHOUT_GIVEN, IN_RANDOM_ORDER = ("_without_class", "_without_given", "_in_random_order")
"""Endings of the names of validation metrics; see `validate`."""
SUFFIX_WORDS = {WITHOUT_CLASS: "without the class", WITHOUT_GIVEN: "without class and conditions", IN_RANDOM_ORDER: "in random order"}
"""Ending -> how progress lines describe it."""
OnValidation = Callable[[TokenPrior, int, Path, StopFlag], None]


def train(recipe: Recipe, on_validation: OnValidation | None = None) -> None:
    """Train the prior of a recipe, from the newest checkpoint if there is one, and export it to runs/<name>/prior/.

    `on_validation(prior, step, log_folder, stop)` is called on the main process after each validation, if the time budget allows. It should
    return early after a signal. The pipelines package uses it to make sample images; this stage has no tokenizer to decode them.
    """
    with locked_run(recipe, "prior", recipe.prior_training) as run:
        train_locked(recipe, run, on_validation)


def train_locked(recipe: Recipe, run: TrainingRun, on_validation: OnValidation | None) -> None:
    """Train while this process holds the lock of the run folder."""
    training, report, accelerator = recipe.prior_training, run.report, run.accelerator

    # --- data ---------------------------------------------------------------------------------------------------------------
    folder = recipe.tokens_folder
    reader = TokenShardReader(folder / "train", recipe.seed, training.window_shards)
    held_out = TokenShardReader(folder / "validation", token_fingerprint=reader.manifest.token_fingerprint)
    inputs = {"tokens": reader.manifest.fingerprint, "validation tokens": held_out.manifest.fingerprint}
    if finished_already(run, inputs):
        return

    # --- model --------------------------------------------------------------------------------------------------------------
    manifest = reader.manifest
    vocabulary = vocabulary_of_recipe(recipe, manifest)
    check_same_tokens(held_out, vocabulary)
    any_order = training.order != "raster"
    prior = TokenPrior.from_config(recipe.prior, vocabulary, recipe.seed, any_order)
    model = prepare_prior(prior, training, run)
    batches = TokenBatches(reader, vocabulary, recipe.seed, vocabulary.label_drop, training.token_noise)

    # --- plan ---------------------------------------------------------------------------------------------------------------
    first_batch = batches.batch(0, training.batch_size, run.rank, run.world_size, random_share(training, 0.0))
    seconds_per_step, first_loss = run.wait_before_training(lambda: time_and_loss_of_one_step(model, first_batch, run))
    validation_images = run.validations.choose_images(
        len(held_out), lambda count: validate(cast(TokenPrior, run.validated_model), held_out, run.micro_batch, count, accelerator), VALIDATION_RULE)
    first_loss_line = {"first loss": check_first_loss(first_loss, vocabulary, training.first_loss_tolerance)} if run.state.step == 0 else {}
    print_plan(run, {
        "tokens": f"{counted(len(reader), 'image')} x {counted(len(manifest.views), 'view')} x {counted(vocabulary.num_tokens, 'token')}; "
                  f"{describe_validation(held_out, validation_images)}",
        "classes": describe_classes(manifest.class_names),
        **({"given": describe_given(vocabulary)} if vocabulary.conditions else {}),
        **({"drawn": describe_grids(vocabulary.grids)} if vocabulary.grids != manifest.grids else {}),
        "model": f"{recipe.prior.architecture}, {counted(recipe.prior.sizes.layers, 'layer')}, {recipe.prior.sizes.width} wide, "
                 f"vocabulary of {vocabulary.size:,}{describe_blocks(prior.model.config)}",
        "attention": describe_attention(prior.model, accelerator.device, accelerator.mixed_precision),
        **first_loss_line,
    }, seconds_per_step, DataSize(len(reader), len(manifest.views)))
    if warning := run.validations.warn_of_few_images(validation_images, len(held_out), len(manifest.class_names or [])):
        report(warning)
    if run.is_main and (warning := warn_of_sorted_shards(reader, training.batch_size)):
        report(warning)
    if run.is_main:
        write_record(run.folder, recipe, "prior", inputs, finished=False)

    # --- loop ---------------------------------------------------------------------------------------------------------------
    means = RunningMeans()

    def validate_now(_progress: float) -> None:
        with run.validations.clock():
            validated_prior = validate_and_report(held_out, validation_images, run)
        if validated_prior is not None and on_validation is not None:
            make_pictures(validated_prior, run, on_validation)

    for progress in training_steps(run, validate_now, run.save):
        batch = batches.batch(run.state.step, training.batch_size, run.rank, run.world_size, random_share(training, progress))
        reseed_step(recipe.seed, "prior", run.state.step, run.rank)
        model.train()
        total, step_means = torch.zeros((), device=accelerator.device), RunningMeans()
        micro_batches = zip(*(part.to(accelerator.device).chunk(training.accumulation_steps) for part in batch), strict=True)
        for ids_bT, classes_b, inputs_bT, given_bG, orders_bT in micro_batches:
            with accelerator.accumulate(model):
                logits_bTK = model(inputs_bT, classes_b, given_bG, orders_bT if any_order else None)
                loss = next_token_loss(logits_bTK, ids_bT)
                terms = {"nll": loss}
                if training.z_loss:
                    terms["z_loss"] = z_loss(logits_bTK)
                    loss = loss + training.z_loss * terms["z_loss"]
                accelerator.backward(loss)
            total += loss.detach()
            step_means.add(terms)
        accepted, norm, learning_rate = run.optimizer_step(total, progress)
        if accepted:
            means.update(step_means)
        run.end_step()

        if run.due(training.log_every, finished=False):
            run.metrics.write(run.state.step, "train", **means.average_over_processes(accelerator), gradient_norm=norm, learning_rate=learning_rate,
                              seconds=run.state.elapsed_seconds)
            means = RunningMeans()

    # --- export -------------------------------------------------------------------------------------------------------------
    run.end_sharding()
    if run.is_main:
        warn_if_nothing_was_learned(run, vocabulary)
        exported_step = export_best_and_last(run, "NLL")
        write_record(run.folder, recipe, "prior", inputs, finished=True, seconds=run.state.elapsed_seconds, exported_step=exported_step)
        report(f"exported {run.folder.export('prior')}: the {training.export} weights (best: step {run.state.best_step:,}, "
               f"{run.state.best_validation:.4f} nats per token{', the mean of raster and random order' if any_order else ''}; "
               f"last: step {run.state.step:,})")
    run.finish()


@torch.no_grad()  # not inference_mode: without a weight average this is the model in training, and tensors that it caches must support autograd
def validate(prior: TokenPrior, reader: TokenShardReader, batch_size: int, limit: int, accelerator,
             stop: StopFlag | None = None) -> dict[str, float] | None:
    """nll in nats per token, bits_per_image and next-token accuracy over `limit` validation images in raster order, the same on all ranks.

    Each process works on at most `batch_size` images at a time. If the null class is trained (label_drop), there are also nll_without_class and
    so on, with the null class in place of each image's class; for a prior with conditions, nll_without_given and so on, with null ids in all given
    segments. With several drawn grids, there is also nll_<grid> for each. If the prior predicts in any order, there are also nll_in_random_order and
    so on, with a fixed random order for each image. Returns None if a signal to any rank's `stop` interrupted the validation.
    """
    prior.eval()
    vocabulary, columns = prior.vocabulary, TokenColumns(reader, prior.vocabulary)
    suffixes = [""]
    if vocabulary.why_unguided() is None:
        suffixes.append(WITHOUT_GIVEN if vocabulary.conditions else WITHOUT_CLASS)
    if prior.any_order:
        suffixes.append(IN_RANDOM_ORDER)
    sums = torch.zeros(2 * len(suffixes) + 2, device=accelerator.device)  # NLL and hits for each suffix; tokens; stopped ranks
    nll_T = torch.zeros(vocabulary.num_tokens, dtype=torch.float64)       # by position, for several grids
    ranks = accelerator.num_processes
    progress = progress_lines(min(limit, len(reader)), "validation", "image", accelerator.is_main_process)
    for ids_BT, classes_B, samples_B in validation_batches(reader, batch_size * ranks, accelerator.process_index, ranks, limit):
        halted = stop is not None and bool(stop.signal)
        if is_sharded(accelerator):  # a sharded forward pass needs all ranks, so all must stop before the same batch
            halted = bool(accelerator.reduce(torch.tensor(float(halted), device=accelerator.device), "sum"))
        if halted:
            sums[-1] = 1
            break
        progress.update(len(ids_BT) * ranks)
        (ids_BT, given_BG), classes_B = columns.split(ids_BT.to(accelerator.device)), classes_B.to(accelerator.device)
        random_orders_BT = torch.from_numpy(random_orders(samples_B.numpy(), vocabulary.grids, "validation"))
        for index, suffix in enumerate(suffixes):
            conditions = (None, None) if suffix in (WITHOUT_CLASS, WITHOUT_GIVEN) else (classes_B, given_BG)
            orders_BT = random_orders_BT.to(accelerator.device) if suffix == IN_RANDOM_ORDER else None
            with accelerator.autocast():
                logits_BTK = prior(ids_BT, *conditions, orders_BT).float()
            if len(vocabulary.grids) > 1 and index == 0:
                nll_T += F.cross_entropy(logits_BTK.transpose(1, 2), ids_BT, reduction="none").double().sum(0).cpu()
            sums[2 * index] += F.cross_entropy(logits_BTK.flatten(0, 1), ids_BT.flatten(), reduction="sum")
            sums[2 * index + 1] += (logits_BTK.argmax(-1) == ids_BT).sum()
        sums[-2] += ids_BT.numel()
    *totals, tokens, stopped = accelerator.reduce(sums, "sum").tolist()
    if stopped:
        return None
    metrics: dict[str, float] = {}
    for suffix, nll, hits in zip(suffixes, totals[::2], totals[1::2], strict=True):
        metrics |= {f"nll{suffix}": nll / tokens, f"bits_per_image{suffix}": nll / tokens * vocabulary.num_tokens / math.log(2),
                    f"accuracy{suffix}": hits / tokens}
    if len(vocabulary.grids) > 1:
        by_grid = accelerator.reduce(nll_T.float().to(accelerator.device), "sum").split([grid.num_tokens for grid in vocabulary.grids])
        images = tokens / vocabulary.num_tokens
        metrics |= {f"nll_{grid.name}": float(nll_n.sum()) / images / grid.num_tokens for grid, nll_n in zip(vocabulary.grids, by_grid, strict=True)}
    return metrics


def validate_and_report(reader: TokenShardReader, images: int, run: TrainingRun) -> TokenPrior | None:
    """Validate the weights that would be exported now and save them if they are the best so far. Returns the model on the main process, else None.

    Also returns None if a signal interrupted the validation.
    """
    metrics = validate(cast(TokenPrior, run.validated_model), reader, run.micro_batch, images, run.accelerator, run.stop)
    if metrics is None:
        return None
    prior = cast(TokenPrior | None, run.full_model())  # the run prepared a TokenPrior
    run.validations.record()
    # a prior for any order is judged by raster and random order alike
    is_best = run.best_weights.save_if_best((metrics["nll"] + metrics.get(f"nll{IN_RANDOM_ORDER}", metrics["nll"])) / 2, prior)
    run.metrics.write(run.state.step, "validation", images=images, **metrics)

    run.report(f"step {run.state.step:,}: {describe_metrics(metrics)}{', the best so far' if is_best else ''}")
    return prior if run.is_main else None


def describe_metrics(metrics: dict[str, float]) -> str:
    """The metrics of a validation as text, with those without the class or the given segments, and in random order, in parentheses."""
    def formatted(name: str, spec: str) -> str:
        others = [f"{words} {metrics[name + suffix]:{spec}}" for suffix, words in SUFFIX_WORDS.items() if name + suffix in metrics]
        return f"{metrics[name]:{spec}}" + (f" ({', '.join(others)})" if others else "")

    grids = [f"{name.removeprefix('nll_')} {value:.4f}" for name, value in metrics.items()
             if name.startswith("nll_") and not name.endswith(SUFFIXES)]
    of_grids = f" ({', '.join(grids)})" if grids else ""
    return (f"NLL {formatted('nll', '.4f')} nats per token{of_grids}, {formatted('bits_per_image', '.1f')} bits per image, "
            f"accuracy {formatted('accuracy', '.1%')}")


def make_pictures(prior: TokenPrior, run: TrainingRun, on_validation: OnValidation) -> None:
    """Call `on_validation`, which makes sample images of the validated prior, if the time budget allows."""
    run.validations.make_pictures(lambda: on_validation(prior, run.state.step, run.folder.logs("prior"), run.stop))
    if run.is_sharded:
        prior.cpu()  # free the memory of the unsharded weights while training continues


def warn_if_nothing_was_learned(run: TrainingRun, vocabulary: Vocabulary) -> None:
    """Warn if no validation loss was lower than that of a uniform distribution over the codes."""
    uniform = uniform_loss(vocabulary)
    if uniform <= run.state.best_validation < math.inf:
        mean = ", the mean of raster and random order" if cast(PriorTrainingConfig, run.training).order != "raster" else ""
        run.report(f"warning: the best NLL of all validations is {run.state.best_validation:.4g} nats per token{mean}. A uniform distribution over "
                   f"all codes has {uniform:.3f} (ln K), so this prior has learned nothing and its images are noise. Lower "
                   f"prior_training.learning_rate, which is {run.training.learning_rate:g}, or train longer.")


def main(arguments: list[str]) -> None:
    """Entry point of a process. `arguments` are a recipe and its overrides."""
    train(load_recipe(arguments[0], arguments[1:], count_images=count_stored_images))


if __name__ == "__main__":
    run_worker(main, sys.argv[1:])

