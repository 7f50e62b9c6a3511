"""Train the image tokenizer of a recipe.

    vqmosaic train-tokenizer digits                                        # two CPU cores, about a minute
    vqmosaic train-tokenizer image_folder --data.path photos --processes 4 # four GPUs of one machine
    accelerate launch -m stage1_tokenizer.train cifar10                    # the same under your own launcher

Writes <run_dir>/tokenizer/ (the export), checkpoints/tokenizer/ and logs/tokenizer/. Run again to go on.
"""

import sys
import time
import zlib
from itertools import islice

import torch
from accelerate.utils import broadcast

from stage1_tokenizer.image_batches import ImageBatch, TrainingImages, ValidationImages
from stage1_tokenizer.image_sources import open_splits, refuse_if_too_many_unreadable
from stage1_tokenizer.images import ImageTransform
from stage1_tokenizer.losses import reconstruction_loss
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage1_tokenizer.validation import validate
from vqmosaic.devices import held_by_main_process
from vqmosaic.fingerprints import fingerprint
from vqmosaic.interruption import StopFlag
from vqmosaic.launch import run_worker
from vqmosaic.recipe import Recipe
from vqmosaic.recipe_files import load_recipe
from vqmosaic.seeding import reseed_step
from vqmosaic.stage_records import judge, write_record
from vqmosaic.training_run import TrainingRun

KMEANS_VECTORS_PER_CODE = 16
KMEANS_MAX_BATCHES = 256


def train(recipe: Recipe) -> None:
    """Train stage 1 as the recipe says, from the newest checkpoint if there is one, and export runs/<name>/tokenizer/."""
    with StopFlag() as stop:
        run = TrainingRun(recipe, "tokenizer", recipe.tokenizer_training, stop)
        try:
            with held_by_main_process(run.folder):
                train_locked(recipe, run)
        finally:
            run.accelerator.end_training()


def train_locked(recipe: Recipe, run: TrainingRun) -> None:
    """The training itself, while this process holds the run folder."""
    training, report, accelerator = recipe.tokenizer_training, run.report, run.accelerator

    # --- data ---------------------------------------------------------------------------------------------------------------
    splits = open_splits(recipe.data)
    inputs = {"data set": fingerprint({"train": splits.train.identity, "validation": splits.validation.identity})}
    if judge(run.folder, recipe, "tokenizer", inputs) == "skip":
        report(f"finished already: {run.folder.export('tokenizer')}")
        return
    accelerator.wait_for_everyone()
    if run.is_main:
        write_record(run.folder, recipe, "tokenizer", inputs, finished=False)
    transform = ImageTransform(image_size=recipe.data.image_size, channels=recipe.data.channels)
    train_images = TrainingImages(splits.train, transform, recipe.data, recipe.seed)
    validation_images = ValidationImages(splits.validation, transform, training.validation_images)

    # --- model --------------------------------------------------------------------------------------------------------------
    tokenizer = ImageTokenizer(recipe.tokenizer, transform, splits.train.class_names, recipe.seed)
    model = run.prepare(tokenizer)
    if run.state.step == 0:
        initialize_codebook(tokenizer, train_images, run)

    # --- plan ---------------------------------------------------------------------------------------------------------------
    batches = train_images.batches(run.state.step, training.batch_size, run.rank, run.world_size)
    seconds_per_step = time_of_one_step(model, next(train_images.batches(0, training.batch_size, run.rank, run.world_size)), recipe, run)
    tokens, classes = tokenizer.grid_size ** 2, splits.train.class_names
    run.print_plan({
        "images": f"{len(splits.train):,} to train on, {len(splits.validation):,} to validate on ({splits.how})",
        "classes": ", ".join(classes[:12]) + (" ..." if len(classes) > 12 else "") if classes else "none",
        "tokens": f"{tokenizer.grid_size} x {tokenizer.grid_size} of {recipe.tokenizer.codebook_size} codes an image",
        "codebook use is measured on": f"{len(validation_images):,} images, {len(validation_images) * tokens:,} tokens",
        "epochs": f"{training.max_steps * training.batch_size / len(splits.train):.1f}" if training.max_steps else "as the clock allows",
    }, seconds_per_step)

    # --- loop ---------------------------------------------------------------------------------------------------------------
    sums = torch.zeros(3, device=accelerator.device)  # reconstruction, quantizer loss, number of micro-batches
    unreadable: set[str] = set()
    while True:
        signal_number, progress = run.sync()
        finished = progress >= 1
        if not signal_number and run.due(training.validate_every, finished) and run.state.validated_step < run.state.step:
            validate_and_report(validation_images, run)
            signal_number, _ = run.sync()  # one that came meanwhile cut the validation short; it is made anew when the training goes on
        if run.due(training.checkpoint_every, finished) or signal_number:
            check_codebooks_agree(tokenizer, run)
            run.save()
        if signal_number:
            raise run.interrupted(signal_number)
        if finished:
            break

        batch = next(batches)
        for source, reason in batch.unreadable:
            if source not in unreadable:
                report(f"warning: {source} is unreadable ({reason}); another image takes its place", everywhere=True)
                unreadable.add(source)
        reseed_step(recipe.seed, "tokenizer", run.state.step, run.rank)
        model.train()
        total, step_sums = torch.zeros((), device=accelerator.device), torch.zeros_like(sums)
        for images_BCHW in batch.images_BCHW.to(accelerator.device).chunk(training.accumulation_steps):
            with accelerator.accumulate(model):
                output = model(images_BCHW)
                reconstruction = reconstruction_loss(training.reconstruction_loss, output.reconstructions, images_BCHW)
                loss = reconstruction + output.quantizer.loss
                accelerator.backward(loss)
            total += loss.detach()
            step_sums += torch.stack([reconstruction.detach(), output.quantizer.loss.detach(), torch.ones_like(total)])
        accepted, norm, learning_rate = run.optimizer_step(total, progress, tokenizer.quantizer.commit)
        if accepted:
            sums += step_sums
        else:
            tokenizer.quantizer.discard()
        run.state.step += 1
        run.bar.update()

        if run.due(training.log_every, finished=False):
            reduced = accelerator.reduce(sums, "sum").clamp_min(1e-12)  # nothing but refused steps leaves zeros
            run.metrics.write(run.state.step, "train", reconstruction_loss=float(reduced[0] / reduced[2]),
                              quantizer_loss=float(reduced[1] / reduced[2]), gradient_norm=norm, learning_rate=learning_rate,
                              seconds=run.state.elapsed_seconds)
            sums.zero_()

    # --- export -------------------------------------------------------------------------------------------------------------
    if run.is_main:
        run.validated_model.save_pretrained(run.folder.export("tokenizer"))
        write_record(run.folder, recipe, "tokenizer", inputs, finished=True, seconds=run.state.elapsed_seconds)
        report(f"exported {run.folder.export('tokenizer')} after {run.state.step:,} steps")
    run.finish()


@torch.no_grad()
def initialize_codebook(tokenizer: ImageTokenizer, images: TrainingImages, run: TrainingRun) -> None:
    """K-means on latents of the first batches, collected until there are enough, pooled over ranks in the order of the stream."""
    wanted = KMEANS_VECTORS_PER_CODE * tokenizer.config.codebook_size
    collected: list[torch.Tensor] = []
    tokenizer.eval()
    for batch in islice(images.batches(0, run.training.batch_size, run.rank, run.world_size), KMEANS_MAX_BATCHES):
        latents_BDhw = tokenizer.latents(batch.images_BCHW.to(run.accelerator.device))
        vectors_ND = latents_BDhw.permute(0, 2, 3, 1).reshape(-1, tokenizer.config.code_dim)
        collected.append(run.accelerator.gather(vectors_ND))
        if sum(map(len, collected)) >= wanted:
            break
    tokenizer.quantizer.initialize(torch.cat(collected))
    for buffer in tokenizer.quantizer.buffers():  # on GPUs the sums of k-means may round differently on each rank
        buffer.copy_(broadcast(buffer.clone(), from_process=0))
    if run.average is not None:  # the average starts from these codes too
        run.average.module.quantizer.load_state_dict(tokenizer.quantizer.state_dict())


def time_of_one_step(model: torch.nn.Module, batch: ImageBatch, recipe: Recipe, run: TrainingRun) -> float:
    """Seconds of one forward and backward, measured on a step that is thrown away."""
    images_BCHW = batch.images_BCHW.to(run.accelerator.device)
    model.train()
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        output = model(images_BCHW[: max(1, len(images_BCHW) // recipe.tokenizer_training.accumulation_steps)])
        run.accelerator.backward(output.reconstructions.float().square().mean() + output.quantizer.loss)
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    run.optimizer.zero_grad(set_to_none=True)
    run.unwrapped.quantizer.discard()
    return seconds * recipe.tokenizer_training.accumulation_steps


def validate_and_report(images: ValidationImages, run: TrainingRun) -> None:
    """Validate what would be exported now, write the numbers, and raise the alarm where few codes are in use; nothing where a signal comes."""
    picture = run.folder.logs("tokenizer") / "reconstructions" / f"step-{run.state.step:08d}.png"
    known = set(images.unreadable)
    numbers = validate(run.validated_model, images, run.training.batch_size, run.accelerator, picture, run.stop)
    for source in images.unreadable.keys() - known:
        run.report(f"warning: {source} is unreadable ({images.unreadable[source]}); validations do without it", everywhere=True)
    refuse_if_too_many_unreadable(images.unreadable, len(images), run.recipe.data)
    if numbers is None:
        return
    run.state.validated_step = run.state.step
    run.metrics.write(run.state.step, "validation", **numbers)
    run.report(f"step {run.state.step:,}: PSNR {numbers['psnr']:.2f} dB, SSIM {numbers['ssim']:.3f}, "
               f"{numbers['codebook_usage']:.1%} of the codebook used, perplexity {numbers['perplexity']:.0f}")
    tokens = len(images) * run.unwrapped.grid_size ** 2
    possible = min(1.0, tokens / run.unwrapped.config.codebook_size)  # few validation images cannot use many codes
    if numbers["codebook_usage"] < run.training.usage_alarm * possible:
        run.report(f"warning: only {numbers['codebook_usage']:.1%} of the codebook is in use. Remedies: a smaller tokenizer.codebook_size or "
                   "tokenizer.code_dim, tokenizer.l2_normalize true, a higher tokenizer.revival_threshold, more data.")


def check_codebooks_agree(tokenizer: ImageTokenizer, run: TrainingRun) -> None:
    """Stop where the ranks' codebooks have drifted apart, which must never happen."""
    if run.world_size == 1:
        return
    own = zlib.crc32(tokenizer.quantizer.codebook.cpu().numpy().tobytes())
    everyone = run.accelerator.gather(torch.tensor([own], device=run.accelerator.device)).tolist()
    assert len(set(everyone)) == 1, f"the codebooks of the ranks differ at step {run.state.step}: {everyone}"


def main(arguments: list[str]) -> None:
    """Entry point: a recipe and its overrides."""
    train(load_recipe(arguments[0], arguments[1:]))


if __name__ == "__main__":
    run_worker(main, sys.argv[1:])
