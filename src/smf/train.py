"""One run of one method: prepared, healed where it says so, trained, scored, saved."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import set_seed

from . import methods
from .adapter_file import check_saved, open_patch
from .base import load_base
from .checkpoints import MANIFEST, flaw, read_manifest, seal
from .data import Loaded, in_order, with_replay
from .epoch_cache import HIDDEN
from .errors import ConfigError, TrainingError, refusing
from .evaluate import score
from .faults import explained
from .files import read_text, remove_parts, write_atomically, write_json
from .locks import working_in
from .loop import ScoreOnTheWay, fit, steps_of, training_steps
from .prepare import load, load_scored
from .ranks import is_main
from .recipe import Recipe
from .recipe_file import to_toml
from .runs import FORMAT, is_finished


def run_method(recipe: Recipe, name: str, loaded: Loaded | None = None, *, wait: bool = False) -> dict[str, Any]:
    """Train and score one method of a recipe, into its folder below `recipe.output`; a finished run is only read.

    Args:
        recipe: whose method to run.
        name: of the method.
        loaded: what the recipe reads, where it is loaded already.
        wait: for another process that is at this run, and read its result; else refuse.

    Returns:
        The run's result.json: scores with per-example records, what changed, seconds, peak memory, versions.

    Raises:
        BusyError: where another process is at this run.
        StorageError: where a file could not be written; TrainingError: where the training failed, or memory ran out.
            What is finished is kept, and the next call goes on from the last checkpoint.
        Stopped: where SIGTERM came while training, after a checkpoint: a SystemExit with code 75.
    """
    if name not in recipe.methods:
        raise ConfigError(f"the recipe has no [methods.{name}]; its methods: {sorted(recipe.methods)}")
    folder = Path(recipe.output) / recipe.run_id(name)
    result_file = folder / "result.json"
    if is_finished(result_file):
        return json.loads(read_text(result_file))
    loaded = loaded or load(recipe)
    with explained(folder), _alone_in(folder, wait=wait):
        if is_finished(result_file):  # another process was at it
            return json.loads(read_text(result_file))
        return _run(recipe, name, loaded, folder, result_file)


@contextlib.contextmanager
def _alone_in(folder: Path, *, wait: bool) -> Iterator[None]:
    """The lock of a folder, which the first rank holds for all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_symlink():
            raise TrainingError(f"{path} is a link, through which a run would write elsewhere; remove it to go on")
    with working_in(folder, wait=wait) if is_main() else contextlib.nullcontext():
        yield


def _run(recipe: Recipe, name: str, loaded: Loaded, folder: Path, result_file: Path) -> dict[str, Any]:
    method = recipe.methods[name]
    if is_main():
        remove_parts(folder)
        write_atomically(folder / "recipe.toml", to_toml(recipe))
    set_seed(recipe.seed)
    prepared, heal_seconds = _prepare(recipe, name, loaded, folder)
    if not isinstance(prepared, methods.Prepared):
        raise ConfigError(f"kind = {method.kind!r} returned {prepared!r:.60}; expected a smf.methods.Prepared")
    result: dict[str, Any] = {"format": FORMAT, "comparison": recipe.comparison_id(), "method": name}
    result |= {"kind": method.kind, "options": asdict(method), "seed": recipe.seed, "steps": 0, "seconds": 0.0}
    result |= {} if method.code() is None else {"code": method.code()}
    if prepared.optimizer is not None:
        result |= _train(prepared, recipe, name, loaded, folder)
    if not is_main():
        return result
    result.setdefault("peak_memory_mb", peak_memory_mb())  # of loading and training, before scoring adds its own
    result["scores"] = _score(prepared, recipe, loaded)
    result |= _saved(prepared, folder, method.kind)
    result |= {"trained_parameters": prepared.trained, "heal_seconds": heal_seconds}
    result["provenance"] = provenance(recipe) | {"revisions": loaded.revisions}
    write_json(result_file, result)
    for finished in ("checkpoints", "scores", HIDDEN):
        shutil.rmtree(folder / finished, ignore_errors=True)
    return result


def _train(prepared: methods.Prepared, recipe: Recipe, name: str, loaded: Loaded, folder: Path) -> dict[str, Any]:
    """Train; returns steps, seconds, skipped steps and the scores before the end, without their questions."""
    options, method = recipe.train, recipe.methods[name]
    count = min(options.examples or len(loaded.train), len(loaded.train))
    steps = training_steps(options, len(loaded.train))
    shares = {round(share * steps): share for share in sorted(options.score_at) if 0 < round(share * steps) < steps}
    files = {step: folder / "scores" / f"step-{step}.json" for step in shares}

    if is_main() and files:
        _check_scores_on_the_way(folder / "scores", files.values())  # before hours of training rather than after them
    peak: list[float] = []

    def score_now() -> dict[str, Any]:
        peak.append(peak_memory_mb())  # before scoring adds its own
        return without_questions(_score(prepared, recipe, loaded))

    learned = in_order(loaded.train, count, recipe.seed) if count < len(loaded.train) else loaded.train
    examples = with_replay(learned, loaded.replay, method.replay, steps * options.batch_size, recipe.seed)
    fitted = fit(
        prepared,
        examples,
        recipe,
        folder,
        loaded.tokenizer,
        steps=steps,
        loss=options.loss,
        name=name,
        on_the_way=ScoreOnTheWay(files, score_now),
        places=loaded.places if method.provenance else {},
    )
    result: dict[str, Any] = {"steps": steps, "seconds": fitted.seconds, "skipped_steps": fitted.skipped}
    if peak:
        result["peak_memory_mb"] = peak[0]
    if is_main():
        result["on_the_way"] = [
            {"step": step, "share": share, "scores": _scores_on_the_way(files[step])} for step, share in shares.items()
        ]
    return result


def _check_scores_on_the_way(folder: Path, files: Iterable[Path]) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise TrainingError(f"{folder} is no folder; remove it to go on")
    for file in files:
        if os.path.lexists(file):
            _scores_on_the_way(file)


def _scores_on_the_way(file: Path) -> dict[str, Any]:
    """What was scored before the end, perhaps by a process that was killed since."""
    run = file.parents[1]
    with refusing(TrainingError, f"{file} is not what was written; remove {run} to begin this run anew"):
        scores = json.loads(read_text(file))
        if not all({"role", "task", "metrics", "records"} <= set(entry) for entry in scores.values()):
            raise ValueError("expected scores with role, task, metrics and records")
    return scores


def _score(prepared: methods.Prepared, recipe: Recipe, loaded: Loaded) -> dict[str, Any]:
    base = _base(recipe, loaded) if recipe.divergence else None
    return score(prepared.model, loaded.tokenizer, recipe, loaded.scored, base)


def _base(recipe: Recipe, loaded: Loaded) -> Any:
    """The base at the commit that was resolved before anything ran, wherever its branch is now."""
    return load_base(replace(recipe, revision=loaded.revisions.get(recipe.base, recipe.revision)))


def without_questions(scores: dict[str, Any]) -> dict[str, Any]:
    """The scores without what the end's records say as well: question, right answer, each choice's log-probability."""
    again = ("question", "right", "logprobs")
    return {
        name: entry | {"records": [{k: v for k, v in r.items() if k not in again} for r in entry["records"]]}
        for name, entry in scores.items()
    }


def _prepare(recipe: Recipe, name: str, loaded: Loaded, folder: Path) -> tuple[methods.Prepared, float]:
    """The method's model and optimizer, healed first where it says so, and the seconds that took."""
    method = recipe.methods[name]
    make = methods.find_method(method.kind)
    if method.kind not in methods.WITH_MEMORY:
        return make(_base(recipe, loaded), method, recipe, loaded), 0.0
    if not method.heal and method.kind != "healed":
        return make(methods.attach(_base(recipe, loaded), method, recipe), method, recipe, loaded), 0.0
    # methods with the same memory share its healing, but for torchrun, whose ranks must agree whether it is there
    healed = (folder if "RANK" in os.environ else folder.parent) / f"healed-{recipe.healing_id(method)}"
    with _alone_in(healed, wait=True):
        if (why := flaw(healed)) is not None:
            if is_main() and (healed / MANIFEST).is_file():
                print(f"smf: {name}: healing again: in {healed} {why}", file=sys.stderr)
                (healed / MANIFEST).unlink()
            _heal(recipe, name, loaded, healed)
    model = PeftModel.from_pretrained(_base(recipe, loaded), healed, is_trainable=True)
    return make(model, method, recipe, loaded), read_manifest(healed)["seconds"]


def _heal(recipe: Recipe, name: str, loaded: Loaded, healed: Path) -> None:
    """Train the whole memory on general text, into a folder of its own."""
    assert recipe.heal is not None
    prepared = methods.healing(methods.attach(_base(recipe, loaded), recipe.methods[name], recipe), recipe)
    steps = steps_of(recipe.heal.steps, recipe.heal.epochs, len(loaded.healing), recipe.train.batch_size)
    examples = in_order(loaded.healing, steps * recipe.train.batch_size, recipe.seed)
    title, tokenizer = f"{name}, healing", loaded.tokenizer
    fitted = fit(prepared, examples, recipe, healed, tokenizer, steps=steps, loss="full", name=title)
    if is_main():
        prepared.save(healed)
        for finished in ("checkpoints", HIDDEN):
            shutil.rmtree(healed / finished, ignore_errors=True)
        seal(healed, seconds=fitted.seconds, skipped_steps=fitted.skipped)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _saved(prepared: methods.Prepared, folder: Path, kind: str) -> dict[str, Any]:
    """What a method's `save` says that it changed."""
    changed = prepared.save(folder)
    keys = ("rows_changed", "numbers_changed")
    if not isinstance(changed, dict) or not all(isinstance(changed.get(key), int | None) for key in keys):
        raise ConfigError(
            f"kind = {kind!r}: save returned {changed!r}; expected a table with {' and '.join(keys)}, each a whole "
            "number or None. The training is kept: the same command goes on from its last checkpoint"
        )
    return changed


def peak_memory_mb() -> float:
    """Peak memory of this process: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def provenance(recipe: Recipe) -> dict[str, Any]:
    """Versions, machine and code state that a result came from."""
    names = ("sparse-memory-finetuning", "torch", "transformers", "peft", "datasets", "lm-eval")
    return {
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(), "jobs": recipe.jobs},
        "git": _commit(),
        "base": recipe.base,
    }


def _commit() -> str | None:
    """The commit of this code, with "-dirty" where files differ from it; None where it is installed without its git."""
    here = Path(__file__)
    git: dict[str, Any] = {"cwd": here.parent, "capture_output": True, "text": True}
    try:
        if subprocess.run(["git", "ls-files", "--error-unmatch", here.name], **git).returncode:
            return None  # of another project, in whose folder this code is installed
        named = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"], **git)
    except OSError:  # no git on this machine
        return None
    return named.stdout.strip() or None


def evaluate_saved(recipe: Recipe, *, adapter: str | None, patch: str | None) -> list[dict[str, Any]]:
    """Scores of the base, and of a saved adapter or patch of it where one is given, in the form of results."""
    if adapter is not None and patch is not None:
        raise ConfigError("give --adapter or --patch, not both")
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter {adapter!r} is not a folder with an adapter_config.json")
    file = None if patch is None else open_patch(patch)
    if adapter is not None:
        check_saved(adapter)
    tokenizer, sets = load_scored(recipe)
    model: Any = load_base(recipe)
    if adapter is None and file is None:
        return [{"method": "base", "kind": "base", "scores": score(model, tokenizer, recipe, sets)}]
    # attach first, so that what does not fit is refused before the base is scored
    if file is None:
        with refusing(ConfigError, f"--adapter {adapter!r} cannot be loaded"), warnings.catch_warnings():
            warnings.filterwarnings("error", ".*Found missing adapter keys")  # all that PEFT says of a file in part
            model = PeftModel.from_pretrained(model, str(adapter))
        result: dict[str, Any] = {"method": Path(str(adapter)).name, "kind": "adapter"}
    else:
        file.check_base(model)
        model = get_peft_model(model, file.config)
        file.apply(model)
        result = {"method": Path(str(patch)).name, "kind": "patch"} | methods.counts(file)
    with model.disable_adapter():
        base = {"method": "base", "kind": "base", "scores": score(model, tokenizer, recipe, sets)}
    return [base, result | {"scores": score(model, tokenizer, recipe, sets)}]
