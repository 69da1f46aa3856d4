"""One run of one method: the same examples, order and loss for all, on Hugging Face's Trainer, resumable."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from . import methods
from .data import Collator, Example, in_order, pad_id
from .errors import ConfigError
from .evaluate import score, token_loss
from .files import write_atomically, write_json
from .optimizer import SparseMemoryOptimizer
from .patch import load_patch
from .prepare import Loaded, load, load_base, load_scored
from .recipe import Method, Recipe, to_toml

COMPLETE = "smf_complete.json"  # written into a checkpoint after everything else: what has it can be resumed from


def mean_token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy summed over labels and divided by the labels of the whole step, over all its micro-batches."""
    count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return token_loss(outputs.logits, labels).sum() / count


class RunTrainer(Trainer):
    """Trainer that marks a checkpoint as complete once everything is in it, with the seconds it took to get there."""

    seconds_before = 0.0  # of killed processes
    started = 0.0

    def seconds(self) -> float:
        """Spent on training so far, without what killed processes lost."""
        return self.seconds_before + time.perf_counter() - self.started

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
            write_json(folder / COMPLETE, {"step": self.state.global_step, "seconds": self.seconds()})


def is_main() -> bool:
    """Whether this process is the one that writes (torchrun starts several)."""
    return os.environ.get("RANK", "0") == "0"


def newest_complete(folder: Path, *, tidy: bool) -> Path | None:
    """The newest complete checkpoint; half-written ones, as a crash leaves them, are removed with `tidy`."""
    complete = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).is_file():
            complete.append(checkpoint)
        elif tidy:
            print(f"smf: {checkpoint} was not written to its end; set aside", file=sys.stderr)
            shutil.rmtree(checkpoint)
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # cut off by a crash
        return math.inf


class MetricsFile(TrainerCallback):
    """Appends what Trainer logs to metrics.jsonl, with the row optimizer's own norm and counts."""

    def __init__(self, path: Path, optimizer: torch.optim.Optimizer | None, resumed_at: int):
        self.path, self.optimizer = path, optimizer
        lines = path.read_text().splitlines() if path.is_file() and resumed_at else []
        kept = [line for line in lines if _step(line) <= resumed_at]
        if is_main():
            write_atomically(path, "".join(f"{line}\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """One line a log of a step."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        line = {"step": state.global_step} | {k: logs[k] for k in ("loss", "learning_rate", "grad_norm") if k in logs}
        if isinstance(self.optimizer, SparseMemoryOptimizer) and (report := self.optimizer.last_step) is not None:
            line["grad_norm"] = logs["grad_norm"] = report.grad_norm
            line["rows"] = {layer: len(rows) for layer, rows in report.rows.items()}
            line |= {"rows_read": report.rows_read, "reads": report.reads}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def fit(
    prepared: methods.Prepared,
    examples: list[Example],
    recipe: Recipe,
    folder: Path,
    tokenizer: Any,
    *,
    steps: int,
    loss: str,
    name: str,
) -> float:
    """Train for `steps` steps, resuming where a killed run stopped; returns the seconds it took, killed ones included.

    Args:
        prepared: model and optimizer.
        examples: to learn from, in any order; the recipe's seed orders them.
        recipe: for the shared options.
        folder: for checkpoints and metrics.
        tokenizer: for the padding token.
        steps: optimizer steps.
        loss: "answer" or "full".
        name: shown beside the progress.
    """
    options = recipe.train
    per_step = options.micro_batch_size * int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    if options.batch_size % per_step:
        raise ConfigError(
            f"batch_size = {options.batch_size} is not a multiple of micro_batch_size x ranks = {per_step}"
        )
    checkpoint = newest_complete(folder / "checkpoints", tidy=is_main())
    if checkpoint is not None:
        print(f"smf: {name}: resuming from {checkpoint}", file=sys.stderr)
    done = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=options.batch_size // per_step,
        train_sampling_strategy="sequential",
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup_steps,
        max_grad_norm=prepared.max_grad_norm,
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
    )
    trainer = RunTrainer(
        model=prepared.model,
        args=arguments,
        train_dataset=in_order(examples, steps * options.batch_size, recipe.seed),  # type: ignore[arg-type]
        data_collator=Collator(pad_id(tokenizer), loss),
        compute_loss_func=mean_token_loss,
        optimizers=(prepared.optimizer, None),
        callbacks=[MetricsFile(folder / "metrics.jsonl", prepared.optimizer, done)],
    )
    if checkpoint is not None:
        trainer.seconds_before = json.loads((checkpoint / COMPLETE).read_text())["seconds"]
    trainer.started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.seconds()


def steps_of(steps: int, epochs: float, examples: int, batch_size: int) -> int:
    """Optimizer steps: as given, or those of `epochs` passes."""
    return steps or max(1, math.ceil(epochs * examples / batch_size))


# -- one run ----------------------------------------------------------------------------------------------------------


def run_method(recipe: Recipe, name: str, loaded: Loaded | None = None) -> dict[str, Any]:
    """Train and score one method of a recipe, into its folder below `recipe.output`; a finished run is only read.

    Returns:
        The run's result.json: scores with per-example records, what changed, seconds, peak memory, versions.
    """
    if name not in recipe.methods:
        raise ConfigError(f"the recipe has no [methods.{name}]; its methods: {sorted(recipe.methods)}")
    folder = Path(recipe.output) / recipe.run_id(name)
    result_file = folder / "result.json"
    if result_file.is_file():
        return json.loads(result_file.read_text())
    loaded = loaded or load(recipe)
    method = recipe.methods[name]
    folder.mkdir(parents=True, exist_ok=True)
    if is_main():
        write_atomically(folder / "recipe.toml", to_toml(recipe))
    set_seed(recipe.seed)
    prepared, heal_seconds = _prepare(recipe, name, method, loaded, folder)
    seconds, steps = 0.0, 0
    if prepared.optimizer is not None:
        steps = steps_of(recipe.train.steps, recipe.train.epochs, len(loaded.train), recipe.train.batch_size)
        seconds = fit(
            prepared, loaded.train, recipe, folder, loaded.tokenizer, steps=steps, loss=recipe.train.loss, name=name
        )
    result: dict[str, Any] = {"method": name, "kind": method.kind, "seed": recipe.seed, "steps": steps}
    if not is_main():
        return result
    result["peak_memory_mb"] = peak_memory_mb()  # of loading and training, before scoring adds its own
    result["scores"] = score(prepared.model, loaded.tokenizer, recipe, loaded.scored)
    result |= prepared.save(folder)
    result |= {"trained_parameters": prepared.trained, "seconds": seconds, "heal_seconds": heal_seconds}
    result["provenance"] = provenance(recipe)
    write_json(result_file, result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def _prepare(recipe: Recipe, name: str, method: Method, loaded: Loaded, folder: Path) -> tuple[methods.Prepared, float]:
    """The method's model and optimizer, healed first where it says so, and the seconds that took."""
    model = load_base(recipe)
    if method.kind != "smf":
        make = {"base": methods.base, "full": methods.full, "lora": methods.lora}[method.kind]
        return make(model, method, recipe), 0.0
    seconds = 0.0
    if method.heal:
        healed = folder / "healed"
        if not (healed / COMPLETE).is_file():
            assert recipe.heal is not None
            prepared = methods.healing(methods.attach(model, method, recipe), recipe)
            steps = steps_of(recipe.heal.steps, recipe.heal.epochs, len(loaded.healing), recipe.train.batch_size)
            seconds = fit(
                prepared,
                loaded.healing,
                recipe,
                folder / "healing",
                loaded.tokenizer,
                steps=steps,
                loss="full",
                name=f"{name}, healing",
            )
            if is_main():
                prepared.save(healed)
                write_json(healed / COMPLETE, {"seconds": seconds})
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            model = load_base(recipe)
        seconds = json.loads((healed / COMPLETE).read_text())["seconds"]
        model = PeftModel.from_pretrained(model, healed, is_trainable=True)
    else:
        model = methods.attach(model, method, recipe)
    texts = loaded.background if method.rule in ("kl", "tfidf") else []
    return methods.smf(model, method, recipe, tokenizer=loaded.tokenizer, background_texts=texts), seconds


def peak_memory_mb() -> float:
    """Peak memory of this process: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def provenance(recipe: Recipe) -> dict[str, Any]:
    """Versions, machine and code state that a result came from."""
    names = ("sparse-memory-finetuning", "torch", "transformers", "peft", "datasets", "lm-eval")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(), "jobs": recipe.jobs},
        "git": git.stdout.strip() or None,
        "base": recipe.base,
    }


def evaluate_saved(recipe: Recipe, *, adapter: str | None, patch: str | None) -> list[dict[str, Any]]:
    """Scores of the base, and of a saved adapter or patch of it where one is given, in the form of results."""
    if adapter is not None and patch is not None:
        raise ConfigError("give --adapter or --patch, not both")
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter {adapter!r} is not a folder with an adapter_config.json")
    file = None if patch is None else load_patch(patch)
    tokenizer, sets = load_scored(recipe)
    model: Any = load_base(recipe)
    if adapter is None and file is None:
        return [{"method": "base", "kind": "base", "scores": score(model, tokenizer, recipe, sets)}]
    # attach first, so that what does not fit is refused before the base is scored
    if file is None:
        model = PeftModel.from_pretrained(model, str(adapter))
        result: dict[str, Any] = {"method": Path(str(adapter)).name, "kind": "adapter"}
    else:
        model = get_peft_model(model, file.config)
        file.apply(model)
        result = {"method": Path(str(patch)).name, "kind": "patch"} | methods.counts(file)
    with model.disable_adapter():
        base = {"method": "base", "kind": "base", "scores": score(model, tokenizer, recipe, sets)}
    return [base, result | {"scores": score(model, tokenizer, recipe, sets)}]
