"""How the runs of a folder are, and what to do about what is wrong with them; nothing is changed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from .checkpoints import MANIFEST, flaw, found_in, step_of
from .epoch_cache import HIDDEN
from .errors import ConfigError, DataError, PatchError, SmfError
from .files import PART, no_folder, read_text
from .locks import LOCK, held_by
from .patch_file import load_patch
from .recipe_file import load_recipe
from .runs import failure_of, read_result
from .skipping import SKIPPED

HEALED = "healed-"  # begins the names of folders with a memory that methods share
FILES = (LOCK, "recipe.toml", "result.json", "log.txt", "metrics.jsonl", SKIPPED, "patch.smf")
FOLDERS = ("checkpoints", "scores", HIDDEN)
MADE = ("recipe.toml", "result.json", "log.txt", "checkpoints")  # some of which every run's folder has


@dataclass(frozen=True)
class Finding:
    """Something that is worth saying.

    Args:
        where: a folder, file or part of the environment.
        what: it is.
        do: what to do about it, mostly a command.
        act: whether something is wrong until that is done.
    """

    where: str
    what: str
    do: str
    act: bool = True


@dataclass
class Health:
    """One run's folder.

    Args:
        folder: of the run.
        state: "finished", "running", "unfinished", "failed" or "broken".
        newest: the step of the newest checkpoint that a start would go on from; None where there is none.
        damaged: why each newer checkpoint is of no use, by its name.
        holder: which process works in it.
        skipped: steps that were.
        bytes: on disk.
        findings: what is worth saying.
    """

    folder: str
    state: str = "unfinished"
    newest: int | None = None
    damaged: dict[str, str] = field(default_factory=dict)
    holder: str | None = None
    skipped: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)


def look_at(path: Path) -> list[Health]:
    """The runs of a folder, or the one that it is of.

    Raises:
        ConfigError: where there are none.
    """
    if path.name in ("", ".."):  # a folder's name is needed: it is that of the run
        path = path.resolve()
    try:
        if not path.is_dir():
            raise ConfigError(f"{no_folder(path)}; give the folder that `smf compare` wrote to, or one of a run")
        inner = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
        folders = [each for each in inner if _holds_runs(each)]
        runs = [each for each in inner if _is_run(each) and each not in folders]
        if not runs and not folders and _is_run(path):
            runs = [path]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not runs and folders:
        raise ConfigError(f"no run in {path}, but folders of runs: give {' or '.join(map(str, folders[:5]))}")
    if not runs:
        raise ConfigError(f"no run in {path}, nor in a folder there")
    return [_look(run) for run in runs]


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in MADE) or folder.name.startswith(HEALED)


def _holds_runs(folder: Path) -> bool:
    """Whether it is what `smf compare` wrote to, which has a recipe too."""
    if any(os.path.lexists(folder / name) for name in ("result.json", "log.txt", "checkpoints", "metrics.jsonl", LOCK)):
        return False  # a run's own folder, whatever lies in it
    try:
        inner = [each for each in folder.iterdir() if each.is_dir()]
        return any((each / name).is_file() for each in inner for name in ("recipe.toml", "result.json"))
    except OSError:
        return False


def _is_shared(folder: Path) -> bool:
    """Whether it has the memory that methods share, and is no run of a method whose name begins like it."""
    return folder.name.startswith(HEALED) and not (folder / "recipe.toml").exists()


def _look(folder: Path) -> Health:
    health = Health(str(folder))
    try:
        health.bytes = disk_taken(folder)
        _look_at_lock(health, folder)
        _look_at_checkpoints(health, folder)
        if _is_shared(folder):
            _look_at_healing(health, folder)
        else:
            _look_at_result(health, folder)
            _look_at_skipped(health, folder)
        _look_at_kinds(health, folder)
        _look_at_links(health, folder)
        _look_at_remains(health, folder)
    except OSError as error:  # no right to read, or a disk that fails
        health.state = "broken"
        health.findings.append(Finding(str(folder), f"it cannot be read: {error}", f"ls -la {_quoted(folder)}"))
    return health


def disk_taken(folder: Path) -> int:
    """Bytes of all files below a folder; links count for themselves."""
    found = (os.path.join(inner, name) for inner, _, names in os.walk(folder) for name in names)
    return sum(os.lstat(file).st_size for file in found if os.path.lexists(file))


# -- who works in it, and what it could go on from --------------------------------------------------------------------


def _look_at_lock(health: Health, folder: Path) -> None:
    held = held_by(folder / LOCK)
    if held is None:
        return
    holder, lives = held
    if lives:
        health.state, health.holder = "running", holder
        health.findings.append(Finding(str(folder), f"{holder} works in it", "wait until it has ended", act=False))
    else:
        what = f"{holder} ended before its work was done; its lock is nobody's"
        health.findings.append(Finding(str(folder), what, "nothing: the next start takes it over", act=False))


def _look_at_checkpoints(health: Health, folder: Path) -> None:
    for checkpoint in found_in(folder / "checkpoints"):
        why = flaw(checkpoint)
        if why is None:
            health.newest = step_of(checkpoint)
            return
        if health.state == "running" and not (checkpoint / MANIFEST).is_file():
            continue  # it is being written
        health.damaged[checkpoint.name] = why
        health.findings.append(
            Finding(str(checkpoint), why, "nothing: the next start goes on from an earlier one", act=False)
        )


def _going_on(folder: Path) -> str:
    """The command that does a run, or goes on with it; where there is none, what to do first."""
    recipe, name = folder / "recipe.toml", folder.name.rpartition("-")[0]
    if not recipe.is_file():
        return "it has no recipe.toml; start the command that began it again"
    try:
        methods = (loaded := load_recipe(recipe)).methods
        # of a function of one's own the name has a hash, for which its package would have to be imported
        own = name in methods and (":" in methods[name].kind or loaded.run_id(name) == folder.name)
    except (SmfError, OSError) as error:
        reason = " ".join(str(error).split())
        return f"its recipe.toml cannot be used ({reason:.200}); start the command that began it again"
    if not own:
        return "its name is not that of its recipe.toml (renamed, or of another version); begin it anew elsewhere"
    return f"smf train {_quoted(recipe)} --method {shlex.quote(name)} --output {_quoted(folder.parent)}"


def _look_at_healing(health: Health, folder: Path) -> None:
    """The memory that methods share: trained to its end where it has a manifest."""
    if (folder / MANIFEST).is_file():
        why = flaw(folder)
        health.state = "finished" if why is None else "broken" if health.state != "running" else health.state
        if why:
            health.findings.append(Finding(str(folder), why, "nothing: the next start heals it again", act=False))
    elif health.state != "running":
        what = "the memory that methods share is not healed to its end"
        do = f"smf compare {_quoted(folder.parent / 'recipe.toml')} --output {_quoted(folder.parent)}"
        health.findings.append(Finding(str(folder), what, do))


def _look_at_kinds(health: Health, folder: Path) -> None:
    """Whether files are files and folders are folders; a run does not begin where they are not."""
    for name in (*FILES, *FOLDERS):
        path = folder / name
        right = path.is_dir() if name in FOLDERS else path.is_file() and not (name == LOCK and path.is_symlink())
        if os.path.lexists(path) and not right:
            health.state = "broken" if health.state != "running" else health.state
            what = f"it is no {'folder' if name in FOLDERS else 'file'}"
            health.findings.append(Finding(str(path), what, f"rm -r {_quoted(path)}"))


def _look_at_links(health: Health, folder: Path) -> None:
    """No run begins beside a link, through which it could write elsewhere."""
    for path in sorted(folder.iterdir()) if health.state not in ("finished", "running") else ():
        if path.is_symlink() and path.name != LOCK:
            health.state = "broken"
            health.findings.append(Finding(str(path), "it is a link", f"rm {_quoted(path)}"))


# -- what it left -----------------------------------------------------------------------------------------------------


def _look_at_result(health: Health, folder: Path) -> None:
    result = folder / "result.json"
    if result.exists():
        try:
            found = read_result(result)
        except DataError as error:
            health.state = "broken" if health.state != "running" else health.state
            what = f"it cannot be used: {error}"
            health.findings.append(Finding(str(result), what, f"{_going_on(folder)} # which sets it aside"))
            return
        health.state = "finished"
        anew = f"rm {_quoted(result)} && {_going_on(folder)}"
        if found["kind"] == "smf":
            _look_at_patch(health, folder, anew)
        _look_at_tensors(health, folder, anew)
        return
    if health.state == "running":
        return
    failure = failure_of(folder)
    if failure is not None:
        health.state = "failed"
        what = f"its training failed: {failure['reason']}"
        do = "change what the reason names; with the same recipe, " if health.newest is None else ""
        health.findings.append(Finding(str(folder), what, f"{do}{_going_on(folder)}"))
        return
    after = "without a checkpoint" if health.newest is None else f"with a checkpoint of step {health.newest}"
    what = f"unfinished, {after}, and nobody works in it"
    health.findings.append(Finding(str(folder), what, _going_on(folder)))
    _look_for_room(health, folder)


def _look_for_room(health: Health, folder: Path) -> None:
    """Whether another checkpoint fits on the disk."""
    sizes = [disk_taken(checkpoint) for checkpoint in found_in(folder / "checkpoints")]
    free = shutil.disk_usage(folder).free
    if sizes and free < max(sizes):
        what = f"a checkpoint takes {max(sizes) / 2**20:,.0f} MiB, and the disk has {free / 2**20:,.0f} MiB left"
        health.findings.append(Finding(str(folder), what, "make room on this disk before going on"))


def _look_at_patch(health: Health, folder: Path, anew: str) -> None:
    try:
        load_patch(folder / "patch.smf")
    except PatchError as error:
        health.state = "broken"
        health.findings.append(Finding(str(folder / "patch.smf"), f"it cannot be used: {error}", anew))


def _look_at_tensors(health: Health, folder: Path, anew: str) -> None:
    """Whether adapters and models are whole: of the size that their headers say."""
    for file in sorted(each for each in _files(folder) if each.suffix == ".safetensors" and each.is_file()):
        if "checkpoints" in file.relative_to(folder).parts:
            continue
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except Exception as error:  # safetensors raises classes of its own for what it cannot read
            health.state = "broken"
            what = f"it is not whole: {error}"
            health.findings.append(Finding(str(file), what, anew))


def _look_at_skipped(health: Health, folder: Path) -> None:
    file = folder / SKIPPED
    if not file.is_file():
        return
    try:
        steps = json.loads(read_text(file))
        health.skipped = len(steps)
        which = ", ".join(str(each["step"]) for each in steps[:5]) + (", ..." if len(steps) > 5 else "")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        what = f"the list of skipped steps cannot be read: {type(error).__name__}: {error}"
        health.findings.append(Finding(str(file), what, f"rm {_quoted(file)}"))
        return
    if health.skipped:
        what = f"{health.skipped} steps were skipped, as their loss or gradient was not finite: {which}"
        health.findings.append(Finding(str(folder), what, f"look at their examples: cat {_quoted(file)}", act=False))


def _look_at_remains(health: Health, folder: Path) -> None:
    """What was set aside, and what killed processes had begun to write."""
    aside = [*folder.glob("checkpoints/set-aside-*"), *folder.glob("result.broken.json")]
    if health.state != "running":
        aside += [file for file in _files(folder) if file.name.startswith(".") and file.name.endswith(PART)]
    if health.state == "finished":  # the end of a run removes them, unless it is killed then
        aside += [each for each in (folder / "checkpoints", folder / "scores") if each.is_dir()]
    for path in sorted(set(aside)):
        size = disk_taken(path) if path.is_dir() else os.lstat(path).st_size
        what = f"nobody needs it, and it takes {size / 2**20:,.1f} MiB"
        health.findings.append(Finding(str(path), what, f"rm -r {_quoted(path)}", act=False))


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, without following links to folders."""
    return (Path(inner) / name for inner, _, names in os.walk(folder) for name in names)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
