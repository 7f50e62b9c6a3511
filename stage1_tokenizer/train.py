"""Train the image tokenizer of a recipe.

    vqmosaic train-tokenizer digits                                        # two CPU cores, about a minute
    vqmosaic train-tokenizer image_folder --data.path photos --processes 4 # four GPUs of one machine
    accelerate launch -m stage1_tokenizer.train cifar10                    # the same under your own launcher

Writes <run_dir>/tokenizer/ (the export), checkpoints/tokenizer/ and logs/tokenizer/. Run the same command again to resume. With
adversarial.weight above 0 it trains a VQGAN: a discriminator joins later, on the schedule of adversarial/guard.py.
"""

import sys
import zlib
from pathlib import Path
from typing import cast

import torch

from stage1_tokenizer.adversarial.discriminator import PatchDiscriminator
from stage1_tokenizer.adversarial.discriminator_training import Adversary
from stage1_tokenizer.adversarial.guard import AdversarialGuard, describe_schedule
from stage1_tokenizer.data.image_batches import TrainingImages, UpcomingBatch, ValidationImages
from stage1_tokenizer.data.image_sources import refuse_if_too_many_unreadable
from stage1_tokenizer.data.open_data import count_training_images, open_recorded_splits
from stage1_tokenizer.find_initial_weights import fingerprint_of_initial_weights
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.load_initial_weights import check_tokens_unchanged, load_initial_weights
from stage1_tokenizer.losses import reconstruction_loss
from stage1_tokenizer.networks import compile_networks
from stage1_tokenizer.tokenizer_config import FORMAT_OF_KIND, tokenizer_class
from stage1_tokenizer.tokenizer_setup import (
    describe_loss,
    describe_start,
    describe_tokens,
    initialize_codebooks,
    load_perceptual_loss,
    measure_step_seconds,
    set_training_mode,
    warn_if_codebook_is_large,
)
from stage1_tokenizer.trainable.codebook_usage import describe_usage, low_codebook_usage_warnings
from stage1_tokenizer.trainable.trainable_tokenizer import TrainableTokenizer
from stage1_tokenizer.validation import validate
from vqmosaic.errors import printable
from vqmosaic.recipes.fields_from_data import DataSize
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.tokenizer_sections import TokenizerTrainingConfig
from vqmosaic.runs.accelerator import check_compiler
from vqmosaic.runs.launch import run_worker
from vqmosaic.runs.stage_records import load_record, write_record
from vqmosaic.seeding import reseed_step
from vqmosaic.training.running_means import RunningMeans
from vqmosaic.training.tracking import read_metrics
from vqmosaic.training.training_loop import export_best_and_last, finished_already, locked_run, training_steps
from vqmosaic.training.training_plan import describe_classes, print_plan
from vqmosaic.training.training_run import TrainingRun
from vqmosaic.wording import counted

USAGE_WARNING_MIN_PROGRESS = 0.25
"""Training progress before which low codebook usage gives no warning, because usage still grows."""


def train(recipe: Recipe) -> None:
    """Train stage 1 of a recipe, resuming from the newest checkpoint if there is one, and export runs/<name>/tokenizer/."""
    with locked_run(recipe, "tokenizer", recipe.tokenizer_training) as run:
        train_locked(recipe, run)


def train_locked(recipe: Recipe, run: TrainingRun) -> None:
    """Train while the run folder is locked."""
    training, adversarial, report, accelerator = recipe.tokenizer_training, recipe.adversarial, run.report, run.accelerator

    # --- data ---------------------------------------------------------------------------------------------------------------
    record = load_record(run.folder, "tokenizer")
    recorded_inputs = record.inputs if record is not None else {}
    _, splits, data_set = run.wait_before_training(lambda: open_recorded_splits(recipe.data, recorded_inputs))
    inputs = {"data set": data_set}
    init_from = training.init_from
    if init_from is not None and run.checkpoints.all() and not Path(init_from).expanduser().exists():
        init_from = None  # not needed to resume from a checkpoint
    if init_from is not None:
        inputs["initial weights"] = fingerprint_of_initial_weights(init_from)
    if finished_already(run, inputs):
        return
    if training.compile:
        run.wait_before_training(lambda: check_compiler("tokenizer_training.compile", accelerator.device))
    for note in splits.notes:
        report(f"note: {note}")
    transform = ImageTransform.from_recipe(recipe.data)
    train_images = TrainingImages(splits.train, transform, recipe.data, recipe.seed)

    # --- model --------------------------------------------------------------------------------------------------------------
    make_tokenizer = tokenizer_class(FORMAT_OF_KIND[recipe.tokenizer.kind])
    tokenizer: TrainableTokenizer = make_tokenizer(recipe.tokenizer, transform, splits.train.class_names, recipe.seed)
    if init_from is not None:
        load_initial_weights(tokenizer, init_from)
        if training.train_parts == "decoder":
            check_tokens_unchanged(tokenizer, init_from)
    perceptual = load_perceptual_loss(recipe, accelerator.device)
    for part in tokenizer.frozen_modules(training.train_parts):
        part.requires_grad_(False)
    if training.channels_last:
        tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch does not declare this argument
    discriminator = PatchDiscriminator(adversarial, transform.channels, recipe.seed) if adversarial.weight else None
    model = run.prepare(tokenizer, discriminator, adversarial.learning_rate)
    guard = AdversarialGuard.from_checkpoint(run.state.guard, run.resumed_from)
    adversary = None
    if discriminator is not None and run.second_model is not None:  # the same module, plain and wrapped
        adversary = Adversary(adversarial, discriminator, run.second_model, tokenizer.decoder.last_layer, accelerator.autocast)
    if run.state.step == 0 and training.init_from is not None and init_from is None:
        load_initial_weights(tokenizer, training.init_from)  # no checkpoint is intact, so raise the error about missing weights
    if run.state.step == 0 and training.init_from is None:
        run.wait_before_training(lambda: initialize_codebooks(tokenizer, train_images, run))
    if training.compile:
        compile_networks(*tokenizer.networks())

    # --- plan ---------------------------------------------------------------------------------------------------------------
    batches = UpcomingBatch(train_images.batches(run.state.step, training.batch_size, run.rank, run.world_size))
    first_batch = run.wait_before_training(lambda: next(train_images.batches(0, training.batch_size, run.rank, run.world_size)))
    seconds_per_step = run.wait_before_training(lambda: measure_step_seconds(model, adversary, perceptual, first_batch, run))
    candidates = ValidationImages(splits.validation, transform, training.validation_images)
    validation_images = candidates.first(run.validations.choose_images(
        len(splits.validation),
        lambda count: run.wait_before_training(
            lambda: validate(cast(TrainableTokenizer, run.validated_model), candidates.first(count), run.micro_batch, accelerator))))
    if run.validations.has_other_images:
        guard.forget_errors()
    print_plan(run, {
        "images": f"{len(splits.train):,} to train on, {len(splits.validation):,} to validate on ({splits.validation_origin})",
        "classes": describe_classes(splits.class_names),
        **describe_tokens(tokenizer, len(validation_images)),
        **describe_start(training),
        "loss": describe_loss(training),
        **({"discriminator": f"{sum(map(torch.numel, discriminator.parameters())):,} parameters; {describe_schedule(adversarial, training)}"}
           if discriminator is not None else {}),
    }, seconds_per_step, DataSize(len(splits.train)))
    if warning := run.validations.warn_of_few_images(len(validation_images), len(splits.validation), len(splits.class_names or [])):
        report(warning)
    warn_if_codebook_is_large(tokenizer, len(splits.train), run)
    if run.is_main:
        inputs |= {"data set": splits.fingerprint, **splits.unread_input}  # replaces identities in an older format
        inputs = recorded_inputs | inputs  # keeps the fingerprint of initial weights that were deleted
        write_record(run.folder, recipe, "tokenizer", inputs, finished=False)

    # --- loop ---------------------------------------------------------------------------------------------------------------
    means = RunningMeans()
    unreadable: set[str] = set()
    warned_of: set[str] = set()

    def validate_now(progress: float) -> None:
        with run.validations.clock():
            validate_and_report(validation_images, run, guard, progress, warned_of)

    def save() -> None:
        check_replicas_agree(tokenizer, run)
        run.state.guard = guard.to_dict()
        run.save()

    for progress in training_steps(run, validate_now, save, batches.wait):
        batch = next(batches)
        for source, reason in batch.unreadable:
            if source not in unreadable:
                report(f"warning: {printable(source)} is unreadable ({reason}). Another image replaces it.", all_processes=True)
                unreadable.add(source)
        reseed_step(recipe.seed, "tokenizer", run.state.step, run.rank)
        set_training_mode(model, tokenizer, training.train_parts)
        tokenizer.set_progress(progress)
        if adversary is not None and guard.joined_at is None and guard.joins(adversarial, progress):
            report(f"the discriminator joins at step {run.state.step:,}")
        train_discriminator, share = guard.joined_at is not None, guard.share(adversarial, progress)

        total, step_means = torch.zeros((), device=accelerator.device), RunningMeans()
        for images_BCHW in batch.images_BCHW.to(accelerator.device).chunk(training.accumulation_steps):
            if training.channels_last:
                images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
            with accelerator.accumulate(*filter(None, (model, run.second_model))):
                output = model(images_BCHW)
                terms = {"reconstruction_loss": reconstruction_loss(training.reconstruction_loss, output.reconstructions, images_BCHW),
                         "quantizer_loss": output.quantizer_loss}
                reconstruction = terms["reconstruction_loss"]
                if perceptual is not None:
                    terms["perceptual_loss"] = perceptual(output.reconstructions, images_BCHW)
                    reconstruction = reconstruction + training.perceptual_weight * terms["perceptual_loss"]
                loss = reconstruction + output.quantizer_loss
                if adversary is not None and share > 0:
                    generator_loss, generator_terms = adversary.generator_terms(images_BCHW, output.reconstructions, reconstruction, share,
                                                                                feature_matching_weight(training))
                    loss, terms = loss + generator_loss, terms | generator_terms
                accelerator.backward(loss)
                if adversary is not None and train_discriminator:
                    discriminator_loss, discriminator_terms = adversary.discriminator_terms(images_BCHW, output.reconstructions)
                    accelerator.backward(discriminator_loss)
                    loss, terms = loss + discriminator_loss.detach(), terms | discriminator_terms
            total += loss.detach()
            step_means.add(terms)
        accepted, norm, learning_rate = run.optimizer_step(total, progress, tokenizer.commit, update_second=train_discriminator)
        if accepted:
            means.update(step_means)
            if discriminator is not None and train_discriminator:
                discriminator.commit()
        else:
            tokenizer.discard()
        run.end_step()

        if run.due(training.log_every, finished=False):
            run.metrics.write(run.state.step, "train", **means.average_over_processes(accelerator), gradient_norm=norm, learning_rate=learning_rate,
                              seconds=run.state.elapsed_seconds)
            means = RunningMeans()

    # --- export -------------------------------------------------------------------------------------------------------------
    if run.is_main:
        exported_step = export_best_and_last(run, "reconstruction error")
        warn_if_nothing_was_learned(run, exported_step)
        for warning in usage_warnings(run).values():
            report(warning)
        write_record(run.folder, recipe, "tokenizer", inputs, finished=True, seconds=run.state.elapsed_seconds, exported_step=exported_step)
        report(f"exported {run.folder.export('tokenizer')} after {counted(run.state.step, 'step')}: the {training.export} weights "
               f"(best reconstruction: step {run.state.best_step:,})")
    run.finish()


def feature_matching_weight(training: TokenizerTrainingConfig) -> float:
    """The weight of feature matching. 0 if the recipe uses another perceptual loss."""
    return training.perceptual_weight if training.perceptual_loss == "discriminator_features" else 0.0


def validate_and_report(images: ValidationImages, run: TrainingRun, guard: AdversarialGuard, progress: float, warned_of: set[str]) -> None:
    """Validate the model to be exported, save it if it is the best so far, log the metrics, update the guard, and warn about low codebook usage.

    The warning of each codebook is given once at most before the end; `warned_of` records the grids. Returns early if a signal aborted the
    validation.
    """
    picture = run.folder.logs("tokenizer") / "reconstructions" / f"step-{run.state.step:08d}.png"
    known = set(images.unreadable)
    tokenizer = cast(TrainableTokenizer, run.validated_model)
    metrics = validate(tokenizer, images, run.micro_batch, run.accelerator, picture, run.stop)
    for source in images.unreadable.keys() - known:
        run.report(f"warning: {printable(source)} is unreadable ({images.unreadable[source]}). Validation skips it.", all_processes=True)
    refuse_if_too_many_unreadable(images.unreadable, len(images), run.recipe.data)
    if metrics is None:
        return
    run.validations.record()
    error = metrics["reconstruction_l2" if run.recipe.tokenizer_training.reconstruction_loss == "l2" else "reconstruction_l1"]
    run.best_weights.save_if_best(error, run.validated_model)
    run.metrics.write(run.state.step, "validation", images=len(images), **metrics)
    run.report(f"step {run.state.step:,}: PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}{describe_usage(metrics, tokenizer)}")
    guard_message = guard.update_after_validation(run.recipe.adversarial, error, progress)
    if guard_message:
        run.report(f"step {run.state.step:,}: {guard_message}")
    for level, warning in usage_warnings(run).items():
        if level not in warned_of and USAGE_WARNING_MIN_PROGRESS <= progress < 1:
            warned_of.add(level)
            run.report(warning)


def usage_warnings(run: TrainingRun) -> dict[str, str]:
    """The warnings about codebook usage in the last validation, by level."""
    metrics, alarm = run.metrics.newest.get("validation"), run.recipe.tokenizer_training.usage_alarm
    return {} if metrics is None else low_codebook_usage_warnings(metrics, cast(TrainableTokenizer, run.unwrapped), alarm)


def check_replicas_agree(tokenizer: TrainableTokenizer, run: TrainingRun) -> None:
    """Raise RuntimeError if the codes or buffers of the quantizers differ between ranks, which must never happen.

    Layers inside a quantizer, encoder or decoder are not compared, because matrix products may round differently on each rank.
    """
    if run.world_size == 1:
        return
    buffers = [buffer for quantizer in tokenizer.quantizers.values() for buffer in quantizer.buffers()]
    tensors = [*buffers, *tokenizer.codebook_parameters()]
    own = zlib.crc32(b"".join(tensor.detach().cpu().numpy().tobytes() for tensor in tensors))
    everyone = run.accelerator.gather(torch.tensor([own], device=run.accelerator.device)).tolist()
    if len(set(everyone)) > 1:
        raise RuntimeError(f"the quantizers of the processes differ at step {run.state.step}: checksums {everyone}")


def warn_if_nothing_was_learned(run: TrainingRun, exported_step: int) -> None:
    """Warn if the exported tokenizer reconstructs images no better than a flat grey image would."""
    records = read_metrics(run.folder.logs("tokenizer") / "metrics.jsonl", "validation")
    metrics = next((record for record in records if record["step"] == exported_step), {})  # the file may have been deleted
    if "variance" in metrics and not metrics["reconstruction_l2"] < metrics["variance"]:  # also true for NaN
        run.report(f"warning: the squared error of the exported tokenizer is {metrics['reconstruction_l2']:.4g}. A flat grey image has "
                   f"{metrics['variance']:.4g}, so this tokenizer has learned nothing. Lower tokenizer_training.learning_rate, which is "
                   f"{run.training.learning_rate:g}, or train longer.")


def main(arguments: list[str]) -> None:
    """Train from command-line arguments: a recipe and its overrides."""
    train(load_recipe(arguments[0], arguments[1:], count_images=count_training_images))


if __name__ == "__main__":
    run_worker(main, sys.argv[1:])
