"""Train the token prior of a recipe on its token shards.

    vqmosaic train-prior digits                                          # two CPU cores, about a minute
    vqmosaic train-prior cifar10 --processes 4                           # four GPUs of one machine
    vqmosaic train-prior cifar10 --prior_training.tokens other/tokens    # on tokens made elsewhere
    accelerate launch -m stage2_prior.train cifar10                      # under your own launcher, without sample pictures

Writes <run_dir>/prior/ (the export, a transformers checkpoint), checkpoints/prior/ and logs/prior/. Run again to go on.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from stage2_prior.prior import TokenPrior
from stage2_prior.token_batches import TokenBatches, validation_batches
from stage2_prior.vocabulary import Vocabulary
from token_shards import TokenShardReader
from vqmosaic.best_weights import export_best_and_last, link_or_copy, restore_best, save_weights
from vqmosaic.devices import held_by_main_process
from vqmosaic.interruption import StopFlag
from vqmosaic.launch import run_worker
from vqmosaic.recipe import Recipe
from vqmosaic.recipe_files import load_recipe
from vqmosaic.seeding import reseed_step
from vqmosaic.stage_records import judge, write_record
from vqmosaic.training_run import TrainingRun

OnValidation = Callable[[TokenPrior, int, Path, StopFlag], None]


def tokens_folder(recipe: Recipe) -> Path:
    """The folder with train/ and validation/ shards that the prior is trained on."""
    return Path(recipe.prior_training.tokens or Path(recipe.run_dir) / "tokens")


def train(recipe: Recipe, on_validation: OnValidation | None = None) -> None:
    """Train stage 2 as the recipe says, from the newest checkpoint if there is one, and export runs/<name>/prior/.

    `on_validation(prior, step, log_folder, stop)` is called on the main process after each validation, and should end early when
    a signal comes; the pipelines package uses it for pictures, which this stage cannot make since it knows no tokenizer.
    """
    with StopFlag() as stop:
        run = TrainingRun(recipe, "prior", recipe.prior_training, stop)
        try:
            with held_by_main_process(run.folder):
                train_locked(recipe, run, on_validation)
        finally:
            run.accelerator.end_training()


def train_locked(recipe: Recipe, run: TrainingRun, on_validation: OnValidation | None) -> None:
    """The training itself, while this process holds the run folder."""
    training, report, accelerator = recipe.prior_training, run.report, run.accelerator

    # --- data ---------------------------------------------------------------------------------------------------------------
    folder = tokens_folder(recipe)
    reader = TokenShardReader(folder / "train", recipe.seed, training.window_shards)
    held_out = TokenShardReader(folder / "validation", token_fingerprint=reader.manifest.token_fingerprint)
    inputs = {"tokens": reader.manifest.fingerprint, "validation tokens": held_out.manifest.fingerprint}
    if judge(run.folder, recipe, "prior", inputs) == "skip":
        report(f"finished already: {run.folder.export('prior')}")
        return
    accelerator.wait_for_everyone()
    if run.is_main:
        write_record(run.folder, recipe, "prior", inputs, finished=False)

    # --- model --------------------------------------------------------------------------------------------------------------
    manifest = reader.manifest
    vocabulary = Vocabulary(grids=manifest.grids, class_names=manifest.class_names, token_fingerprint=manifest.token_fingerprint,
                            label_drop=training.label_drop if manifest.class_names else 0.0)
    prior = TokenPrior.from_config(recipe.prior, vocabulary, recipe.seed)
    model = run.prepare(prior)
    best_weights = run.checkpoints.root / "best.safetensors"
    if run.is_main:
        restore_best(run.resumed_from, best_weights)
    batches = TokenBatches(reader, vocabulary, recipe.seed, vocabulary.label_drop)

    # --- plan ---------------------------------------------------------------------------------------------------------------
    seconds_per_step = time_of_one_step(model, batches.batch(0, training.batch_size, run.rank, run.world_size), run)
    validated = min(len(held_out), training.validation_images)
    run.print_plan({
        "tokens": f"{len(reader):,} images x {len(manifest.views)} views x {vocabulary.num_tokens} tokens; "
                  f"{validated:,} of {len(held_out):,} to validate on",
        "classes": ", ".join(manifest.class_names[:12]) + (" ..." if len(manifest.class_names) > 12 else "") if manifest.class_names else "none",
        "model": f"{recipe.prior.architecture}, {recipe.prior.layers} layers, {recipe.prior.width} wide, vocabulary of {vocabulary.size:,}, "
                 f"{prior.model.config._attn_implementation} attention",
        "epochs": f"{training.max_steps * training.batch_size / len(reader):.1f}" if training.max_steps else "as the clock allows",
    }, seconds_per_step)

    # --- loop ---------------------------------------------------------------------------------------------------------------
    sums = torch.zeros(2, device=accelerator.device)  # loss, number of micro-batches
    while True:
        signal_number, progress = run.sync()
        finished = progress >= 1
        if not signal_number and run.due(training.validate_every, finished) and run.state.validated_step < run.state.step:
            validate_and_report(held_out, run, best_weights, on_validation)
            signal_number, _ = run.sync()  # one that came meanwhile cut the validation short; it is made anew when the training goes on
        if run.due(training.checkpoint_every, finished) or signal_number:
            run.save(lambda checkpoint: link_or_copy(best_weights, checkpoint / best_weights.name))
        if signal_number:
            raise run.interrupted(signal_number)
        if finished:
            break

        ids_BT, classes_B = batches.batch(run.state.step, training.batch_size, run.rank, run.world_size)
        reseed_step(recipe.seed, "prior", run.state.step, run.rank)
        model.train()
        total = torch.zeros((), device=accelerator.device)
        micro_batches = zip(ids_BT.to(accelerator.device).chunk(training.accumulation_steps),
                            classes_B.to(accelerator.device).chunk(training.accumulation_steps), strict=True)
        for ids_bT, classes_b in micro_batches:
            with accelerator.accumulate(model):
                loss = next_token_loss(model(ids_bT, classes_b), ids_bT)
                accelerator.backward(loss)
            total += loss.detach()
        accepted, norm, learning_rate = run.optimizer_step(total, progress)
        if accepted:
            sums += torch.stack([total, torch.full_like(total, training.accumulation_steps)])
        run.state.step += 1
        run.bar.update()

        if run.due(training.log_every, finished=False):
            reduced = accelerator.reduce(sums, "sum").clamp_min(1e-12)  # nothing but refused steps leaves zeros
            run.metrics.write(run.state.step, "train", nll=float(reduced[0] / reduced[1]), gradient_norm=norm, learning_rate=learning_rate,
                              seconds=run.state.elapsed_seconds)
            sums.zero_()

    # --- export -------------------------------------------------------------------------------------------------------------
    if run.is_main:
        export_best_and_last(run, best_weights, "NLL")
        write_record(run.folder, recipe, "prior", inputs, finished=True, seconds=run.state.elapsed_seconds)
        report(f"exported {run.folder.export('prior')}: the {training.export} weights (best: step {run.state.best_step:,}, "
               f"{run.state.best_validation:.4f} nats per token; last: step {run.state.step:,})")
    run.finish()


def next_token_loss(logits_BTK: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token, in float32."""
    return F.cross_entropy(logits_BTK.float().flatten(0, 1), ids_BT.flatten())


@torch.no_grad()  # not inference mode: without a weight average it is the model in training, which may keep what it computes here
def validate(prior: TokenPrior, reader: TokenShardReader, batch_size: int, limit: int, accelerator,
             stop: StopFlag | None = None) -> dict[str, float] | None:
    """nll in nats per token, bits_per_image and next-token accuracy over the first `limit` validation images, the same on all ranks.

    None where a signal to any rank's `stop` cut it short.
    """
    prior.eval()
    sums = torch.zeros(4, dtype=torch.float32, device=accelerator.device)  # of NLL, of hits, of tokens, of ranks that were stopped
    for ids_BT, classes_B in validation_batches(reader, batch_size, accelerator.process_index, accelerator.num_processes, limit):
        if stop is not None and stop.signal:
            sums[3] = 1
            break
        ids_BT, classes_B = ids_BT.to(accelerator.device), classes_B.to(accelerator.device)
        with accelerator.autocast():
            logits_BTK = prior(ids_BT, classes_B).float()
        nll = F.cross_entropy(logits_BTK.flatten(0, 1), ids_BT.flatten(), reduction="sum")
        sums[:3] += torch.stack([nll, (logits_BTK.argmax(-1) == ids_BT).sum().float(), torch.tensor(float(ids_BT.numel()), device=sums.device)])
    sums = accelerator.reduce(sums, "sum").double()
    if sums[3]:
        return None
    nll = float(sums[0] / sums[2])
    return {"nll": nll, "bits_per_image": nll * prior.vocabulary.num_tokens / math.log(2), "accuracy": float(sums[1] / sums[2])}


def validate_and_report(reader: TokenShardReader, run: TrainingRun, best_weights: Path, on_validation: OnValidation | None) -> None:
    """Validate what would be exported now, keep it if it is the best so far, let the caller make pictures of it; nothing where a signal comes."""
    prior: TokenPrior = run.validated_model
    numbers = validate(prior, reader, run.training.batch_size, run.training.validation_images, run.accelerator, run.stop)
    if numbers is None:
        return
    run.state.validated_step = run.state.step
    is_best = numbers["nll"] < run.state.best_validation
    if is_best:
        run.state.best_validation, run.state.best_step = numbers["nll"], run.state.step
        if run.is_main:
            save_weights(prior, best_weights)
    run.metrics.write(run.state.step, "validation", **numbers)
    run.report(f"step {run.state.step:,}: NLL {numbers['nll']:.4f} nats per token, {numbers['bits_per_image']:.1f} bits per image, "
               f"accuracy {numbers['accuracy']:.1%}{', the best so far' if is_best else ''}")
    if on_validation is not None and run.is_main:
        on_validation(prior, run.state.step, run.folder.logs("prior"), run.stop)


def time_of_one_step(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], run: TrainingRun) -> float:
    """Seconds of one forward and backward, measured on a step that is thrown away."""
    count = max(1, len(batch[0]) // run.training.accumulation_steps)
    ids_BT, classes_B = (part[:count].to(run.accelerator.device) for part in batch)
    model.train()
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        run.accelerator.backward(next_token_loss(model(ids_BT, classes_B), ids_BT))
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    run.optimizers[0].zero_grad(set_to_none=True)
    return seconds * run.training.accumulation_steps


def main(arguments: list[str]) -> None:
    """Entry point: a recipe and its overrides."""
    train(load_recipe(arguments[0], arguments[1:]))


if __name__ == "__main__":
    run_worker(main, sys.argv[1:])

