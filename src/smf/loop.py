"""The training loop that all methods share: Hugging Face's Trainer, resumable, with our loss, metrics and scores."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from .checkpoints import newest_complete, read_manifest, seal, step_of
from .data import Collator, Example, pad_id
from .doubts import warmup_doubts
from .epoch_cache import HIDDEN, EpochCache, why_not
from .errors import ConfigError, SmfError, Stopped, TrainingError, refusing
from .faults import explanation
from .files import read_text, write_atomically, write_json
from .loss import MeanTokenLoss
from .methods import Prepared
from .optimizer import SparseMemoryOptimizer
from .ranks import is_main, join_again, mean_, same_everywhere
from .recipe import Recipe, TrainOptions
from .skipping import SKIPPED, Skipping
from .stopping import StopAtSigterm

MOST_EXAMPLES = 10**8  # that a training is listed for, in order: 0.8 GB
PATIENCE = timedelta(days=1)  # of ranks with the first one, which may score for hours while they wait in a step


class ScoreOnTheWay(TrainerCallback):
    """Scores the model after some steps, into a file for each, so that a resumed run scores nothing twice."""

    def __init__(self, files: dict[int, Path], score: Callable[[], dict[str, Any]]):
        self.files, self.score = files, score
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score, where this is one of the steps; the random numbers of training stay as they are."""
        file = self.files.get(state.global_step)
        if file is None or file.is_file() or not state.is_world_process_zero:
            return
        started = time.perf_counter()
        with torch.random.fork_rng():
            write_json(file, self.score())
        self.seconds += time.perf_counter() - started


class RunTrainer(Trainer):
    """Trainer that seals a checkpoint once everything is in it, with what Trainer's own state lacks."""

    on_the_way = ScoreOnTheWay({}, dict)
    seconds_before = 0.0  # of killed processes
    started = 0.0
    cache: EpochCache | None = None

    def seconds(self) -> float:
        """Spent on training so far, without scoring and without what killed processes lost."""
        return self.seconds_before + time.perf_counter() - self.started - self.on_the_way.seconds

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.cache is not None:
            self.cache.flush()
        super()._save_checkpoint(model, trial)
        loss, logged_at = self._tr_loss.clone(), self._globalstep_last_logged
        mean_(loss)  # over the ranks, as Trainer logs it
        if self.args.should_save:
            folder = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
            seal(folder, step=self.state.global_step, seconds=self.seconds(), loss=loss.item(), logged_at=logged_at)


class Fitted(NamedTuple):
    """What a training took: seconds, those of killed processes included, and how many steps were skipped."""

    seconds: float
    skipped: int


class LossGoesOn(TrainerCallback):
    """Gives a resumed Trainer the losses that it had added up but not logged yet, so that its next log is the same.

    Also knows when everything of the checkpoint has been read: once the first step begins.
    """

    def __init__(self, trainer: RunTrainer, manifest: dict[str, Any]):
        self.trainer, self.manifest = trainer, manifest
        self.read = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Trainer has just set both to nothing."""
        self.trainer._tr_loss += self.manifest["loss"]
        self.trainer._globalstep_last_logged = self.manifest["logged_at"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Nothing is read any more."""
        self.read = True


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, RecursionError):  # cut off by a crash, or not written by us
        return math.inf


class MetricsFile(TrainerCallback):
    """Appends what Trainer logs to metrics.jsonl, with the row optimizer's own norm, counts and hubs."""

    def __init__(self, path: Path, optimizer: torch.optim.Optimizer | None, resumed_at: int, skipping: Skipping):
        self.path, self.optimizer, self.skipping = path, optimizer, skipping
        self.hubs: dict[int, Tensor] = {}  # of general text
        if isinstance(optimizer, SparseMemoryOptimizer) and optimizer.background is not None:
            layers = optimizer.memories.items()
            self.hubs = {layer: optimizer.background.hubs(layer, memory.shape.n_rows) for layer, memory in layers}
        with refusing(TrainingError, f"{path} cannot be read; remove it to go on"):
            lines = read_text(path, errors="replace").splitlines() if path.is_file() and resumed_at else []
        kept = [line for line in lines if _step(line) <= resumed_at]
        if is_main():
            write_atomically(path, "".join(f"{line}\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """One line a log of a step."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        line = {"step": state.global_step} | {k: logs[k] for k in ("loss", "learning_rate", "grad_norm") if k in logs}
        if self.skipping.steps:
            line["skipped"] = len(self.skipping.steps)
        if self.skipping.steps and self.skipping.steps[-1]["step"] == state.global_step:
            line.pop("grad_norm", None)  # which is not finite, nor did the optimizer do anything to report
        elif isinstance(self.optimizer, SparseMemoryOptimizer) and (report := self.optimizer.last_step) is not None:
            line["grad_norm"] = logs["grad_norm"] = report.grad_norm
            line["rows"] = {layer: len(rows) for layer, rows in report.rows.items()}
            line |= {"rows_read": report.rows_read, "reads": report.reads, "hub_share": report.hub_share}
            line["hubs_written"] = {
                n: int(torch.isin(report.rows[n].cpu(), hubs).sum()) for n, hubs in self.hubs.items()
            }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def fit(
    prepared: Prepared,
    examples: list[Example],
    recipe: Recipe,
    folder: Path,
    tokenizer: Any,
    *,
    steps: int,
    loss: str,
    name: str,
    on_the_way: ScoreOnTheWay | None = None,
    places: Mapping[str, int] = {},
) -> Fitted:
    """Train for `steps` steps, resuming where a killed run stopped.

    Args:
        prepared: model and optimizer.
        examples: to learn from, in this order, `batch_size` a step.
        recipe: for the shared options.
        folder: for checkpoints and metrics.
        tokenizer: for the padding token.
        steps: optimizer steps.
        loss: "answer" or "full".
        name: shown beside the progress.
        on_the_way: scores before the end.
        places: numbers of the examples by their ids, where the optimizer keeps provenance.

    Raises:
        TrainingError: where more steps than `train.max_skipped` have a loss or gradient that is not finite, or what
            trains is not finite itself.
        Stopped: where SIGTERM came, after a checkpoint.
    """
    assert prepared.optimizer is not None
    join_again(PATIENCE)
    arguments = _arguments(recipe, folder / "checkpoints", steps, prepared.max_grad_norm)
    checkpoint = newest_complete(folder / "checkpoints", tidy=is_main())
    if checkpoint is not None:
        print(f"smf: {name}: resuming from {checkpoint}", file=sys.stderr)
    done = step_of(checkpoint) if checkpoint else 0
    for doubt in warmup_doubts(recipe.train.warmup_steps, steps) if is_main() else ():
        print(f"smf: warning: {name}: {doubt}", file=sys.stderr)
    if not same_everywhere(done):
        raise TrainingError(
            f"{name}: the ranks find different checkpoints: {folder} must be one folder for all of them"
        )
    most, listed = recipe.train.max_skipped, folder / SKIPPED
    skipping = Skipping(prepared.optimizer, examples, recipe.train.batch_size, most, listed, done, main=is_main())
    loss_of = MeanTokenLoss(prepared.model)
    trainer = RunTrainer(
        model=prepared.model,
        args=arguments,
        train_dataset=examples,  # type: ignore[arg-type]
        data_collator=Collator(pad_id(tokenizer), loss, places),
        compute_loss_func=skipping.watched(loss_of),
        optimizers=(prepared.optimizer, None),
        callbacks=[skipping, MetricsFile(folder / "metrics.jsonl", prepared.optimizer, done, skipping)],
    )
    if on_the_way is not None:
        trainer.on_the_way = on_the_way
        trainer.add_callback(on_the_way)
    manifest = _goes_on_from(checkpoint)
    trainer.seconds_before = manifest["seconds"]
    goes_on = LossGoesOn(trainer, manifest)
    trainer.add_callback(goes_on)
    trainer.cache = _open_cache(recipe, prepared.model, examples, folder, name)
    trainer.started = time.perf_counter()
    with StopAtSigterm() as stop, contextlib.ExitStack() as cleanup:
        if trainer.cache is not None:
            cleanup.callback(trainer.cache.close)
        cleanup.enter_context(loss_of)
        trainer.add_callback(stop)  # last: a step is scored before it is saved
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Exception as error:
            if checkpoint is None or goes_on.read or isinstance(error, SmfError) or explanation(error, folder):
                raise
            said = str(error).partition("\n")[0]  # Trainer reads its pickles as weights only
            why = f"{type(error).__name__}: {said}"
            raise TrainingError(f"{checkpoint} holds what Trainer did not save; remove it to go on ({why})") from error
    if stop.came:
        done = trainer.state.global_step
        raise Stopped(f"{name}: stopped by SIGTERM after step {done} of {steps}; the same command goes on from there")
    skipping.refuse_diverged(steps)
    return Fitted(trainer.seconds(), len(skipping.steps))


def _open_cache(
    recipe: Recipe, model: nn.Module, examples: list[Example], folder: Path, name: str
) -> EpochCache | None:
    """The cache that a recipe asks for, where this method can have one; the reason is said where it cannot."""
    if not recipe.train.epoch_cache:
        return None
    sequences = [example.ids for example in examples]
    reason = why_not(model, sequences)
    if reason is None:
        return EpochCache(model, sequences, folder / HIDDEN)
    if is_main():
        print(f"smf: {name}: trains without epoch_cache: {reason}", file=sys.stderr)
    return None


def _arguments(recipe: Recipe, checkpoints: Path, steps: int, max_grad_norm: float) -> TrainingArguments:
    options = recipe.train
    per_step = options.micro_batch_size * int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    if options.batch_size % per_step:
        raise ConfigError(
            f"batch_size = {options.batch_size} is not a multiple of micro_batch_size x ranks = {per_step}"
        )
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=options.batch_size // per_step,
        train_sampling_strategy="sequential",
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup_steps,
        max_grad_norm=max_grad_norm,
        logging_steps=max(1, min(10, steps // 20)),
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=2,  # while one is being written, the one before is whole
        seed=recipe.seed,
        report_to=[],
        remove_unused_columns=False,
        dataloader_num_workers=0,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_timeout=int(PATIENCE.total_seconds()),
    )
    # Trainer would give a micro-batch to every GPU of the machine (nn.DataParallel), which is another batch size
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _goes_on_from(checkpoint: Path | None) -> dict[str, Any]:
    """What a checkpoint's manifest knows of the training; of none, its beginning."""
    if checkpoint is None:
        return {"seconds": 0.0, "loss": 0.0, "logged_at": 0}
    with refusing(TrainingError, f"{checkpoint} is not of `smf train`; remove it to go on"):
        facts = read_manifest(checkpoint)
        return {name: kind(facts[name]) for name, kind in (("seconds", float), ("loss", float), ("logged_at", int))}


def steps_of(steps: int, epochs: float, examples: int, batch_size: int) -> int:
    """Optimizer steps: as given, or those of `epochs` passes.

    Raises:
        ConfigError: where they read more examples than can be put in order.
    """
    wanted = steps * batch_size if steps else epochs * examples
    if wanted > MOST_EXAMPLES:
        raise ConfigError(
            f"a training on {wanted:,.0f} examples (steps = {steps:,}, epochs = {epochs:g}, {batch_size:,} a step); at "
            f"most {MOST_EXAMPLES:,} can be put in order: lower steps, epochs or batch_size"
        )
    return steps or max(1, math.ceil(epochs * examples / batch_size))


def training_steps(options: TrainOptions, examples: int) -> int:
    """Optimizer steps of every method of a recipe, whose data has so many examples."""
    count = min(options.examples or examples, examples)
    return steps_of(options.steps, options.epochs, count, options.batch_size)
