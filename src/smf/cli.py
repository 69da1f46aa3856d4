"""Sparse memory finetuning: train, evaluate and compare methods from a recipe."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from .errors import ConfigError, SmfError, Stopped, TrainingError

if TYPE_CHECKING:
    from .runs import Runs  # imports are within the functions, so that `smf --help` need not wait for torch

try:
    import tyro
    from tyro.conf import OmitArgPrefixes, Positional

    from .options import Format, Formatted, Options, Overrides, Ray, RecipePath
except ImportError:  # the command needs the extra [run]; the library does not
    sys.exit("the command smf needs more packages: pip install 'sparse-memory-finetuning[run]'")


def train(recipe: RecipePath, /, method: str, overrides: Options = Overrides()) -> None:
    """Train and score one method of a recipe; a killed run goes on where it stopped.

    Args:
        method: name of a [methods.NAME] table.
    """
    from .compare import result_path
    from .runs import read_result
    from .summary import summarise
    from .table import print_tables
    from .train import run_method

    loaded = overrides.load(recipe)
    result = run_method(loaded, method)
    if "scores" in result:  # torchrun: the first rank's alone
        bases = [result_path(loaded, name) for name, m in loaded.methods.items() if m.kind == "base" and name != method]
        before = [read_result(path) for path in bases if path.is_file()]
        title = f"{method} -> {result_path(loaded, method).parent}{overrides.trial()}"
        print_tables(summarise([*before, result], loaded.target.metrics), title)


def evaluate(
    recipe: RecipePath,
    /,
    adapter: str | None = None,
    patch: str | None = None,
    overrides: Options = Overrides(),
) -> None:
    """Score the base of a recipe, and an adapter or patch of it, on the recipe's target and probes.

    Args:
        adapter: folder of a saved PEFT adapter (of any method).
        patch: file written by smf.save_patch, a run's folder, or a saved adapter's.
    """
    from .summary import summarise
    from .table import print_tables
    from .train import evaluate_saved

    loaded = overrides.load(recipe)
    results = evaluate_saved(loaded, adapter=adapter, patch=patch)
    print_tables(summarise(results, loaded.target.metrics), f"{recipe.stem} on {loaded.base}{overrides.trial()}")


@dataclass(frozen=True)
class Comparing:
    """What of a recipe is compared, and how it is shown."""

    methods: tuple[str, ...] = ()
    """Names of [methods.NAME] tables, beside which the base and that of --against are always run; none: all."""
    seeds: int = 1
    """How many seeds to run, from the recipe's upwards; five for a claim."""
    against: str | None = None
    """The method that the others are compared with; none: the first LoRA, or full finetuning."""
    format: Formatted = "table"


Compared = OmitArgPrefixes[Comparing]


def compare(
    recipe: RecipePath,
    /,
    what: Compared = Comparing(),
    dry_run: bool = False,
    ray: Ray = None,
    overrides: Options = Overrides(),
) -> None:
    """Train and score every method of a recipe; print the tables and write report.html.

    Finished methods are not run again, and a killed run goes on where it stopped. Several such commands may share an
    output folder, each with runs of its own. Runs at other learning rates that the folder has are points too.

    Args:
        dry_run: say what would be loaded, trained and measured, check all that lies on this machine, and stop.
    """
    from .compare import check_reference
    from .compare import compare as run_all
    from .files import write_atomically
    from .recipe_file import named, to_toml

    loaded = overrides.load(recipe)
    if what.against is not None:
        check_reference(loaded, what.against)
    if dry_run:
        _print_plan(loaded)
        return
    methods = named(_with_reference(what.methods, what.against), loaded.methods)
    title = f"{recipe.stem} on {loaded.base}{overrides.trial()}"
    try:
        run_all(loaded, methods, what.seeds, ray)
    except TrainingError:
        with contextlib.suppress(SmfError):  # where nothing finished there is nothing to show
            _publish_runs_of(loaded, methods, title, what)
        raise
    write_atomically(Path(loaded.output) / "recipe.toml", to_toml(loaded))  # with which smf report shows the same
    _publish_runs_of(loaded, methods, title, what)


def _print_plan(recipe: Any) -> None:
    """What a dry run found; ends with an error where something would stop the run."""
    from .dry_run import dry_run
    from .table import print_plain

    plan = dry_run(recipe)
    print_plain("The base", list(plan.base), [list(plan.base.values())])
    print_plain("What is read", ["table", "from", "rows", "tokens", "scored by"], plan.sets)
    header = ["method", "kind", "lr", "steps", "numbers that train", "GiB, roughly"]
    print_plain("What trains", header, plan.methods)
    for title, lines in (("Not checked", plan.unchecked), ("Warnings", plan.doubts), ("Problems", plan.problems)):
        if lines:
            print(f"{title}:", *lines, sep="\n  ")
    if plan.problems:
        raise ConfigError(f"{plan.verdict()} listed above")
    command = shlex.join(["smf", *(word for word in sys.argv[1:] if word.replace("_", "-") != "--dry-run")])
    print(f"{plan.verdict()}; start it: {command}; results go to {recipe.output}")


def _with_reference(methods: tuple[str, ...], against: str | None) -> tuple[str, ...]:
    """The methods asked for, with that they are compared with; none: all."""
    return (*methods, against) if methods and against is not None else methods


def _publish_runs_of(recipe: Any, methods: Sequence[str], title: str, what: Comparing) -> None:
    """Publish all that the output folder has of a recipe, as `smf report` does; print what was asked for."""
    found = _read([Path(recipe.output)], recipe)
    finished = any(result["method"] == what.against for result in found.results)
    _publish(found, title, what.format, what.against if finished else None, shown=methods)


def _read(folders: Sequence[Path], recipe: Any = None) -> Runs:
    """The runs of one comparison; what cannot be used is said."""
    from .runs import read_runs

    found = read_runs(folders, recipe)
    for path, reason in found.skipped.items():
        print(f"smf: skipped {path}: {reason}", file=sys.stderr)
    for run in found.failed:
        which = f"{run['method']}, lr {run['options']['lr']:g}, seed {run['seed']}"
        print(f"smf: training failed: {which}: {run['reason']}", file=sys.stderr)
    return found


def _of_methods(found: Runs, methods: Sequence[str]) -> Runs:
    """The runs of some methods and of the base; none: all."""
    kept = [r for r in found.results if not methods or r["method"] in methods or r["kind"] == "base"]
    failed = [r for r in found.failed if not methods or r["method"] in methods]
    return replace(found, results=kept, failed=failed)


def _publish(
    found: Runs,
    title: str,
    format: Format,
    against: str | None = None,
    gains: Sequence[float] = (),
    shown: Sequence[str] = (),
) -> None:
    """Write report.html, table.md and summary.json of all runs into the output folder, and print those to be shown."""
    from .export import as_csv, as_json
    from .files import write_atomically, write_json
    from .report import write_report
    from .summary import summarise
    from .table import markdown, print_tables

    recipe, output = found.recipe, Path(found.recipe.output)
    summary = summarise(found.results, recipe.target.metrics, against, gains, found.failed, recipe.match)
    write_atomically(output / "table.md", markdown(summary))
    write_json(output / "summary.json", as_json(summary))
    write_report(summary, output / "report.html", title, _notes(recipe, summary), found.skipped)
    if shown:
        some = _of_methods(found, [*shown, *recipe.match])
        summary = summarise(some.results, recipe.target.metrics, against, gains, some.failed, recipe.match)
    if format == "table":
        print_tables(summary, title)
    else:
        as_text = {"md": markdown, "csv": as_csv, "json": lambda shown: json.dumps(as_json(shown), indent=2)}
        print(as_text[format](summary).rstrip("\n"))
    print(f"report: {output / 'report.html'}", file=sys.stdout if format == "table" else sys.stderr)


def _notes(recipe: Any, summary: Any) -> list[str]:
    """What a report says above its table."""
    from .table import methods_at_a_time

    runs = [run for point in summary.points for run in point.runs]
    per_step = f"{recipe.train.steps or recipe.train.epochs} {'steps' if recipe.train.steps else 'epochs'}"
    return [
        *recipe.about,
        f"Every method: {per_step} with {recipe.train.batch_size} examples a step.",
        f"Made by: smf {' '.join(sys.argv[1:])}, with {methods_at_a_time(runs)} of the methods running at a time",
    ]


def report(
    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(help="folders that smf compare or smf tune wrote to")],
    /,
    output: Path | None = None,
    methods: tuple[str, ...] = (),
    against: str | None = None,
    gain: tuple[float, ...] = (),
    match: tuple[str, ...] = (),
    format: Formatted = "table",
) -> None:
    """Make tables and report.html anew from the folders of runs; nothing is trained.

    Of a method that was run at several learning rates, the best by the validation score is shown, and all of its points
    are kept. Folders that are no runs, broken or of another comparison are named and left out.

    Args:
        output: folder for report.html, table.md and summary.json; none: the first of the runs.
        methods: names of methods, beside which the base and that of --against are always shown; none: all.
        against: the method that the others are compared with; none: the first LoRA, or full finetuning.
        gain: of the target, at which to read off what each method forgets; none: that of the method compared with.
        match: names of methods, "lora full" for example: every other one is shown at the lowest rate at which it learns
            as much as the best of these; none: those of the recipe.
    """
    from .recipe_file import named

    if not runs:
        raise ConfigError("give the folder of some runs, such as: smf report runs/demo")
    found = _read(runs)
    names = {result["method"] for result in found.results}
    match = tuple(named(match, names) if match else found.recipe.match)
    wanted = named(_with_reference(methods, against), names)
    found = _of_methods(found, [*wanted, *match] if wanted else [])
    found = replace(found, recipe=replace(found.recipe, output=str(output or runs[0]), match=list(match)))
    _publish(found, f"{', '.join(path.name for path in runs)} on {found.recipe.base}", format, against, gain)


def demo(what: Compared = Comparing(), overrides: Options = Overrides()) -> None:
    """The whole comparison on the embedded world, in minutes on two CPU cores: `smf compare demo.toml`."""
    from .recipe_file import SHIPPED

    compare(SHIPPED / "demo.toml", what, overrides=overrides)


def tune(
    recipe: RecipePath,
    /,
    methods: tuple[str, ...] = (),
    points: int = 5,
    factor: float = 2.0,
    match: tuple[str, ...] = (),
    ray: Ray = None,
    overrides: Options = Overrides(),
) -> None:
    """Choose each method's learning rate on the recipe's validation set, from grids of equal size.

    Args:
        methods: names of [methods.NAME] tables; none: all.
        points: of each grid, whose middle is the recipe's rate; a best point at an end extends the grid.
        factor: between neighbouring rates.
        match: names of methods, "lora full" for example: every other method takes the lowest rate at which it learns as
            much as the best of these, since it forgets least there; none: the recipe's.
    """
    from .files import write_atomically, write_json
    from .recipe_file import named
    from .tune import tune as run_all
    from .tune import tuned_toml, tuning_table, with_earlier

    loaded = overrides.load(recipe)
    loaded = replace(loaded, match=named(match, loaded.methods)) if match else loaded
    output = Path(loaded.output)
    tuned = with_earlier(loaded, run_all(loaded, methods, points, factor, ray), output / "tune.json")
    table = tuning_table(tuned)
    write_json(output / "tune.json", tuned)
    write_atomically(output / "tune.md", table)
    write_atomically(output / "tuned.toml", tuned_toml(loaded, tuned, output))
    print(table)
    print(f"the recipe with these rates: {output / 'tuned.toml'}; every point: smf report {output}")


def push(
    run: Annotated[Positional[Path], tyro.conf.arg(help="folder of a finished run")],
    repo: Positional[str],
    /,
    public: bool = False,
) -> None:
    """Upload a run's adapter and patch to the hub, with a model card that says what was gained and lost.

    Args:
        repo: name on the hub, USER/NAME; made where there is none. `hf auth login` stores the token that this needs.
        public: whether a new repository can be seen by everyone.
    """
    from .card import push_to_hub

    print(push_to_hub(run, repo, private=not public))


def doctor(
    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(help="folders of runs, or of one run each")] = (),
    /,
    plan: Annotated[Path | None, tyro.conf.arg(metavar="RECIPE")] = None,
    larger: bool = False,
    format: Annotated[Literal["table", "json"], tyro.conf.arg(help="what to print")] = "table",
    overrides: Options = Overrides(),
) -> None:
    """Look at this machine, and at the runs of some folders; say what to do about what is wrong. Changes nothing.

    Of a run: whether it is finished, and the newest checkpoint that it could go on from; checkpoints, results, patches
    and adapters that are damaged; which process works in it; skipped steps; what was set aside; its bytes on disk. The
    exit code is 0 where nothing needs to be done, and 1 where something does. With --plan nothing is looked at, but
    what a recipe would take.

    Args:
        plan: a recipe: print what its methods take in memory, disk, computation and exchange, as counted on its model
            and measured by a few steps on this machine.
        larger: with --plan, also what larger models and tables would take; counting them takes some minutes.
    """
    if plan is not None:
        from .plan_cli import print_plan

        print_plan(overrides.load(plan), format == "json", larger)
        return
    from .doctor_cli import examine

    if not examine(runs, as_json=format == "json"):
        sys.exit(1)


def patch(command: Positional[str] = "--help", /) -> None:
    """Patches: inspect, apply, revert, merge, diff, forget; `smf patch --help` says more.

    Args:
        command: one of these.
    """
    raise ConfigError(f"smf patch {command}: unknown; see smf patch --help")


def main() -> None:
    """Entry point: errors of ours are one message and exit code 2, without a traceback; of SIGTERM, exit code 75."""
    from .compare import quiet_known_warnings
    from .faults import explained
    from .stopping import end_on_sigterm

    quiet_known_warnings()
    end_on_sigterm()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # half a surrogate pair in a name is no reason to fail
    if sys.argv[1:] == ["--version"]:
        print(f"smf {version('sparse-memory-finetuning')}")
        return
    sys.path.append(os.getcwd())  # where methods of one's own are looked for; only python -m puts it there itself
    commands: dict[str, Callable[..., Any]] = {
        "demo": demo,
        "compare": compare,
        "tune": tune,
        "report": report,
        "train": train,
        "eval": evaluate,
        "push": push,
        "doctor": doctor,
        "patch": patch,
    }
    try:
        if sys.argv[1:2] == ["patch"]:  # a command with commands of its own
            from .patch_cli import main as patches

            return patches(sys.argv[2:])
        with explained(Path.cwd()):
            tyro.extras.subcommand_cli_from_dict(commands, prog="smf", description=__doc__)
    except SmfError as error:
        print(f"smf: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"smf: {stopped.message}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("smf: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    finally:
        # raised in the midst of Python's own end, Stopped would be a traceback
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
