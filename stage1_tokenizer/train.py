"""Train the image tokenizer of a recipe.

    vqmosaic train-tokenizer digits                                        # two CPU cores, about a minute
    vqmosaic train-tokenizer image_folder --data.path photos --processes 4 # four GPUs of one machine
    accelerate launch -m stage1_tokenizer.train cifar10                    # the same under your own launcher

Writes <run_dir>/tokenizer/ (the export), checkpoints/tokenizer/ and logs/tokenizer/. Run again to go on. With adversarial.weight
above 0 it is a VQ-GAN: a discriminator joins in part of the way, under the guard of guard.py.
"""

import math
import sys
import zlib
from pathlib import Path

import torch

from stage1_tokenizer.adversarial.discriminator import PatchDiscriminator
from stage1_tokenizer.adversarial.discriminator_training import Adversary
from stage1_tokenizer.adversarial.guard import AdversarialGuard, calendar
from stage1_tokenizer.data.image_batches import TrainingImages, UpcomingBatch, ValidationImages
from stage1_tokenizer.data.image_sources import ImageSplits, refuse_if_too_many_unreadable
from stage1_tokenizer.data.open_data import count_training_images, open_splits
from stage1_tokenizer.find_initial_weights import fingerprint_of_initial_weights
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.load_initial_weights import check_tokens_stay, load_initial_weights
from stage1_tokenizer.losses import reconstruction_loss
from stage1_tokenizer.networks import compile_networks
from stage1_tokenizer.running_means import RunningMeans
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage1_tokenizer.tokenizer_setup import (
    describe_loss,
    describe_start,
    describe_tokens,
    initialize_codebook,
    load_perceptual_loss,
    set_training_mode,
    time_of_one_step,
    warn_if_codebook_is_large,
)
from stage1_tokenizer.validation import validate
from vqmosaic.errors import printable
from vqmosaic.recipes.fields_from_data import DataSize
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.tokenizer_sections import TokenizerTrainingConfig
from vqmosaic.runs.accelerator import check_compiler, held_by_main_process
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.runs.launch import run_worker
from vqmosaic.runs.stage_records import judge, load_record, write_record
from vqmosaic.seeding import reseed_step
from vqmosaic.training.best_weights import export_best_and_last, link_or_copy, restore_best, save_weights
from vqmosaic.training.tracking import read_metrics
from vqmosaic.training.training_plan import print_plan
from vqmosaic.training.training_run import TrainingRun
from vqmosaic.wording import counted

ALARM_FROM = 0.25
"""Share of the training from which on few codes in use are worth a warning: a codebook fills up in the beginning."""


def train(recipe: Recipe) -> None:
    """Train stage 1 as the recipe says, from the newest checkpoint if there is one, and export runs/<name>/tokenizer/."""
    with StopFlag() as stop:
        run = TrainingRun(recipe, "tokenizer", recipe.tokenizer_training, stop)
        try:
            with held_by_main_process(run.folder):
                train_locked(recipe, run)
        finally:
            run.end()


def train_locked(recipe: Recipe, run: TrainingRun) -> None:
    """The training itself, while this process holds the run folder."""
    training, adversarial, report, accelerator = recipe.tokenizer_training, recipe.adversarial, run.report, run.accelerator

    # --- data ---------------------------------------------------------------------------------------------------------------
    before = load_record(run.folder, "tokenizer")
    recorded = before.inputs if before is not None else {}
    splits, data_set = run.wait_before_training(lambda: recorded_splits(recipe, recorded))
    inputs = {"data set": data_set}
    starts_from = training.init_from
    if starts_from is not None and run.checkpoints.all() and not Path(starts_from).expanduser().exists():
        starts_from = None  # to go on from a checkpoint, it need not be there
    if starts_from is not None:
        inputs["initial weights"] = fingerprint_of_initial_weights(starts_from)
    if judge(run.folder, recipe, "tokenizer", inputs) == "skip":
        report(f"finished already: {run.folder.export('tokenizer')}")
        return
    run.check_checkpoints()
    if training.compile:
        run.wait_before_training(lambda: check_compiler("tokenizer_training.compile", accelerator.device))
    for note in splits.notes:
        report(f"note: {note}")
    transform = ImageTransform(image_size=recipe.data.image_size, channels=recipe.data.channels)
    train_images = TrainingImages(splits.train, transform, recipe.data, recipe.seed)

    # --- model --------------------------------------------------------------------------------------------------------------
    tokenizer = ImageTokenizer(recipe.tokenizer, transform, splits.train.class_names, recipe.seed)
    if starts_from is not None:
        load_initial_weights(tokenizer, starts_from)
        if training.train_parts == "decoder":
            check_tokens_stay(tokenizer, starts_from)
    perceptual = load_perceptual_loss(recipe, accelerator.device)
    if training.train_parts == "decoder":
        for part in (tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantizer):
            part.requires_grad_(False)
    if training.channels_last:
        tokenizer.to(memory_format=torch.channels_last)
    discriminator = PatchDiscriminator(adversarial, transform.channels, recipe.seed) if adversarial.weight else None
    model = run.prepare(tokenizer, discriminator, adversarial.learning_rate)
    guard = AdversarialGuard.restored(run.state.guard, run.resumed_from)
    adversary = discriminator and Adversary(adversarial, discriminator, run.rival, tokenizer.decoder.last_layer, accelerator.autocast)
    best_weights = run.checkpoints.root / "best.safetensors"
    if run.is_main:
        restore_best(run.resumed_from, best_weights)
    if run.state.step == 0 and training.init_from is not None and starts_from is None:
        load_initial_weights(tokenizer, training.init_from)  # no checkpoint was whole, so they are needed after all: says that they are gone
    if run.state.step == 0 and training.init_from is None:
        run.wait_before_training(lambda: initialize_codebook(tokenizer, train_images, run))
    if training.compile:
        compile_networks(tokenizer.encoder, tokenizer.decoder)

    # --- plan ---------------------------------------------------------------------------------------------------------------
    batches = UpcomingBatch(train_images.batches(run.state.step, training.batch_size, run.rank, run.world_size))
    first_batch = run.wait_before_training(lambda: next(train_images.batches(0, training.batch_size, run.rank, run.world_size)))
    seconds_per_step = run.wait_before_training(lambda: time_of_one_step(model, adversary, perceptual, first_batch, run))
    validation_images = ValidationImages(splits.validation, transform, training.validation_images)
    validation_images = validation_images.first(run.validations.choose_images(
        len(splits.validation), lambda count: validate(run.validated_model, validation_images.first(count), run.micro_batch, accelerator)))
    if run.validations.has_other_images:
        guard.forget_errors()
    classes = splits.train.class_names
    print_plan(run, {
        "images": f"{len(splits.train):,} to train on, {len(splits.validation):,} to validate on ({splits.how})",
        "classes": ", ".join(classes[:12]) + (" ..." if len(classes) > 12 else "") if classes else "none",
        **describe_tokens(tokenizer, len(validation_images)),
        **describe_start(training),
        "loss": describe_loss(training),
        **({"discriminator": f"{sum(map(torch.numel, discriminator.parameters())):,} parameters; {calendar(adversarial, training)}"}
           if discriminator is not None else {}),
    }, seconds_per_step, DataSize(len(splits.train)))
    if warning := run.validations.warn_of_few_images(len(validation_images), len(splits.validation), len(classes or [])):
        report(warning)
    warn_if_codebook_is_large(tokenizer, len(splits.train), run)
    accelerator.wait_for_everyone()  # all have judged the record before it is written anew, and found that they can start
    if run.is_main:
        inputs |= {"data set": splits.fingerprint, **splits.unread_input}  # also where the one before has the former identities, which know less
        inputs = (before.inputs if before is not None else {}) | inputs  # the fingerprint of initial weights that are gone is kept
        write_record(run.folder, recipe, "tokenizer", inputs, finished=False)

    # --- loop ---------------------------------------------------------------------------------------------------------------
    means = RunningMeans()
    unreadable: set[str] = set()
    while True:
        batches.wait(run.stop)  # before the processes agree on the next step: a signal ends the wait of one process, and then all save
        signal_number, progress = run.sync()
        finished = progress >= 1
        if not signal_number and run.validations.due(finished):
            with run.validations.clock():
                validate_and_report(validation_images, run, guard, progress, best_weights)
            signal_number, _ = run.sync()  # one that came meanwhile cut the validation short; it is made anew when the training goes on
        if run.due(training.checkpoint_every, finished) or signal_number:
            check_replicas_agree(tokenizer, run)
            run.state.guard = guard.to_dict()
            run.save(lambda checkpoint: link_or_copy(best_weights, checkpoint / best_weights.name))
        if signal_number:
            raise run.interrupted(signal_number)
        if finished:
            break

        batch = next(batches)
        for source, reason in batch.unreadable:
            if source not in unreadable:
                report(f"warning: {printable(source)} is unreadable ({reason}); another image takes its place", everywhere=True)
                unreadable.add(source)
        reseed_step(recipe.seed, "tokenizer", run.state.step, run.rank)
        set_training_mode(model, tokenizer, training.train_parts)
        tokenizer.quantizer.set_progress(progress)
        if adversary is not None and guard.joined_at is None and guard.joins(adversarial, progress):
            report(f"the discriminator joins at step {run.state.step:,}")
        learns, share = guard.joined_at is not None, guard.share(adversarial, progress)

        total, step_means = torch.zeros((), device=accelerator.device), RunningMeans()
        for images_BCHW in batch.images_BCHW.to(accelerator.device).chunk(training.accumulation_steps):
            if training.channels_last:
                images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
            with accelerator.accumulate(*filter(None, (model, run.rival))):
                output = model(images_BCHW)
                terms = {"reconstruction_loss": reconstruction_loss(training.reconstruction_loss, output.reconstructions, images_BCHW),
                         "quantizer_loss": output.quantizer.loss}
                reconstruction = terms["reconstruction_loss"]
                if perceptual is not None:
                    terms["perceptual_loss"] = perceptual(output.reconstructions, images_BCHW)
                    reconstruction = reconstruction + training.perceptual_weight * terms["perceptual_loss"]
                loss = reconstruction + output.quantizer.loss
                if share > 0:
                    added, more = adversary.generator_terms(images_BCHW, output.reconstructions, reconstruction, share, feature_weight(training))
                    loss, terms = loss + added, terms | more
                accelerator.backward(loss)
                if learns:
                    rival_loss, more = adversary.discriminator_terms(images_BCHW, output.reconstructions)
                    accelerator.backward(rival_loss)
                    loss, terms = loss + rival_loss.detach(), terms | more
            total += loss.detach()
            step_means.add(terms)
        accepted, norm, learning_rate = run.optimizer_step(total, progress, tokenizer.quantizer.commit, rival_learns=learns)
        if accepted:
            means.update(step_means)
            if learns:
                discriminator.commit()
        else:
            tokenizer.quantizer.discard()
        run.end_step()

        if run.due(training.log_every, finished=False):
            run.metrics.write(run.state.step, "train", **means.over_processes(accelerator), gradient_norm=norm, learning_rate=learning_rate,
                              seconds=run.state.elapsed_seconds)
            means = RunningMeans()

    # --- export -------------------------------------------------------------------------------------------------------------
    if run.is_main:
        exported_step = export_best_and_last(run, best_weights, "reconstruction error")
        warn_if_nothing_was_learned(run, exported_step)
        if run.has_warned_of_codebook and (alarm := codebook_alarm(run)):  # it was said once, perhaps long ago
            report(alarm)
        write_record(run.folder, recipe, "tokenizer", inputs, finished=True, seconds=run.state.elapsed_seconds, exported_step=exported_step)
        report(f"exported {run.folder.export('tokenizer')} after {counted(run.state.step, 'step')}: the {training.export} weights "
               f"(best reconstruction: step {run.state.best_step:,})")
    run.finish()


def recorded_splits(recipe: Recipe, recorded: dict[str, str]) -> tuple[ImageSplits, str]:
    """The images in their recorded form, and their fingerprint in the form of the recorded one. Reads some bytes of each image."""
    splits = open_splits(recipe.data).as_recorded(recorded)
    return splits, splits.fingerprint_like(recorded.get("data set"))


def feature_weight(training: TokenizerTrainingConfig) -> float:
    """The weight of matching the discriminator's features; 0 where the recipe does not ask for it."""
    return training.perceptual_weight if training.perceptual_loss == "discriminator_features" else 0.0


def validate_and_report(images: ValidationImages, run: TrainingRun, guard: AdversarialGuard, progress: float, best_weights: Path) -> None:
    """Validate what would be exported now, keep it if it is the best so far, write the numbers, let the guard judge them, and raise the alarm
    where few codes are in use; nothing where a signal comes."""
    picture = run.folder.logs("tokenizer") / "reconstructions" / f"step-{run.state.step:08d}.png"
    known = set(images.unreadable)
    numbers = validate(run.validated_model, images, run.micro_batch, run.accelerator, picture, run.stop)
    for source in images.unreadable.keys() - known:
        run.report(f"warning: {printable(source)} is unreadable ({images.unreadable[source]}); validations do without it", everywhere=True)
    refuse_if_too_many_unreadable(images.unreadable, len(images), run.recipe.data)
    if numbers is None:
        return
    run.validations.record()
    error = numbers["reconstruction_l2" if run.training.reconstruction_loss == "l2" else "reconstruction_l1"]
    is_best = error < run.state.best_validation
    if is_best:
        run.state.best_validation, run.state.best_step = error, run.state.step
        if run.is_main:
            save_weights(run.validated_model, best_weights)
    run.metrics.write(run.state.step, "validation", images=len(images), **numbers)
    use = f", {numbers['codebook_usage']:.1%} of the codebook used, perplexity {numbers['perplexity']:.0f}" if "perplexity" in numbers else ""
    run.report(f"step {run.state.step:,}: PSNR {numbers['psnr']:.2f} dB, SSIM {numbers['ssim']:.3f}{use}")
    judgement = guard.judge_validation(run.recipe.adversarial, error, progress)
    if judgement:
        run.report(f"step {run.state.step:,}: {judgement}")
    alarm = codebook_alarm(run)
    if alarm is not None and not run.has_warned_of_codebook and progress >= ALARM_FROM:
        run.has_warned_of_codebook = True
        run.report(alarm)


def codebook_alarm(run: TrainingRun) -> str | None:
    """A warning if the last validation used few of the codes that its number of images can use; None otherwise."""
    numbers, config = run.metrics.newest["validation"], run.unwrapped.config
    tokens = numbers["images"] * run.unwrapped.grid_size ** 2
    possible = 1 - math.exp(-tokens / config.codebook_size)  # share of equally likely codes that so many tokens hit
    if numbers.get("codebook_usage", 1.0) >= run.training.usage_alarm * possible:
        return None
    kind = run.recipe.tokenizer.quantizer
    more = {"fsq": "", "gumbel": "a higher tokenizer.entropy_weight, ", "lfq": "a higher tokenizer.entropy_weight, ",
            "ibq": "a lower tokenizer.entropy_weight, a higher tokenizer.revival_threshold, "}
    return (f"warning: only {numbers['codebook_usage']:.1%} of the codebook is in use at step {numbers['step']:,}. Remedies: a smaller "
            "tokenizer.codebook_size, "
            + more.get(kind, "a smaller tokenizer.code_dim, tokenizer.l2_normalize true, a higher tokenizer.revival_threshold, ")
            + "longer training, more data.")


def check_replicas_agree(tokenizer: ImageTokenizer, run: TrainingRun) -> None:
    """Stop if the codes or buffers of the quantizers differ between ranks, which must never happen.

    Layers inside a quantizer, encoder or decoder are not compared, because matrix products may round differently on each rank.
    """
    if run.world_size == 1:
        return
    tensors = [*tokenizer.quantizer.buffers(), *tokenizer.codebook_parameters()]
    own = zlib.crc32(b"".join(tensor.detach().cpu().numpy().tobytes() for tensor in tensors))
    everyone = run.accelerator.gather(torch.tensor([own], device=run.accelerator.device)).tolist()
    if len(set(everyone)) > 1:
        raise RuntimeError(f"the quantizers of the processes differ at step {run.state.step}: checksums {everyone}")


def warn_if_nothing_was_learned(run: TrainingRun, exported_step: int) -> None:
    """Warn if the exported tokenizer reconstructs images no better than a flat grey image would."""
    records = read_metrics(run.folder.logs("tokenizer") / "metrics.jsonl", "validation")
    numbers = next((record for record in records if record["step"] == exported_step), {})  # the file may have been deleted
    if "variance" in numbers and not numbers["reconstruction_l2"] < numbers["variance"]:  # NaN too
        run.report(f"warning: the squared error of the exported tokenizer is {numbers['reconstruction_l2']:.4g}. A flat grey image has "
                   f"{numbers['variance']:.4g}, so this tokenizer has learned nothing. Lower tokenizer_training.learning_rate, which is "
                   f"{run.training.learning_rate:g}, or train longer.")


def main(arguments: list[str]) -> None:
    """Entry point: a recipe and its overrides."""
    train(load_recipe(arguments[0], arguments[1:], count_images=count_training_images))


if __name__ == "__main__":
    run_worker(main, sys.argv[1:])
