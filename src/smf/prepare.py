"""Everything that a recipe reads, loaded and checked before anything trains."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .base import check_models, load_tokenizer, positions, resolved_base
from .data import Example, Loaded, Row, ScoredSet, check_text, encode, keep_answered
from .errors import ConfigError, DataError, refusing
from .harness import check_task
from .recipe import VALIDATION, Asked, Recipe, Source, asked, sources
from .sources import load_rows, load_texts, place, resolved
from .tasks import find_task, harness_task, lessons


def load(recipe: Recipe) -> Loaded:
    """Load and check all that the recipe names, but for the base's weights; raises before hours of work."""
    check_output(Path(recipe.output))
    check_models(recipe)
    recipe = dataclasses.replace(recipe, revision=resolved_base(recipe) or recipe.revision)
    tokenizer, scored = load_scored(recipe)
    train = load_training(recipe, tokenizer)
    refuse_trained(recipe, train, scored)
    background = [] if recipe.background is None else load_documents(recipe, recipe.background.source)
    if background:
        document_length(recipe)
    healing: list[Example] = []
    if recipe.heal is not None and heals(recipe):
        healing = load_text(recipe, recipe.heal.source, tokenizer)
        refuse_scored("heal", healing, scored)
    replay: list[Example] = []
    if recipe.replay is not None and replays(recipe):
        texts = load_text(recipe, recipe.replay.source, tokenizer)
        refuse_scored("replay", texts, scored)
        replay = [dataclasses.replace(text, id=f"replay {text.id}") for text in texts]  # not an example's id
    return Loaded(tokenizer, train, scored, background, healing, replay, revisions(recipe, scored))


def document_length(recipe: Recipe) -> int:
    """Tokens read of a document of the background; where the base reads fewer than are asked for, it is said."""
    assert recipe.background is not None
    length, longest = recipe.background.max_length, positions(recipe)
    if length > longest:
        print(
            f"smf: [background] max_length = {length}, but the base reads {longest} tokens at most: so much of each "
            "document is read",
            file=sys.stderr,
        )
    return min(length, longest)


def heals(recipe: Recipe) -> bool:
    """Whether some method's memory is healed."""
    return any(method.heal or method.kind == "healed" for method in recipe.methods.values())


def replays(recipe: Recipe) -> bool:
    """Whether some method trains on general text beside the target's."""
    return any(method.replay for method in recipe.methods.values())


def load_training(recipe: Recipe, tokenizer: Any) -> list[Example]:
    """What is learned, none of it cut away."""
    target = recipe.target
    task, where = find_task(target.task), place(target.train, recipe.data)
    length, rows = recipe.train.max_length, training_rows(recipe)
    if task.KIND == "response":
        with refusing(DataError, where):
            return keep_answered(task.examples(rows, where, tokenizer, length), where, recipe.train.too_long, length)
    explained = target.explanation and hasattr(task, "EXPLANATION")
    with refusing(DataError, where):
        taught = [(row, lessons(task, row, explanation=explained)) for row in rows]
        examples = [
            encode(tokenizer, _id(row, n if len(own) > 1 else None), *text, length, end=True, **_known(task, row))
            for row, own in taught
            for n, text in enumerate(own)
        ]
    return keep_answered(examples, where, recipe.train.too_long, length)


def training_rows(recipe: Recipe) -> list[Any]:
    """The rows to learn from, checked as far as that needs no tokenizer."""
    target = recipe.target
    task = find_task(target.task)
    explained = target.explanation and hasattr(task, "EXPLANATION")
    rows = _checked_rows(recipe, task, target.train)
    if explained and task.EXPLANATION not in rows[0]:
        raise DataError(
            f"{place(target.train, recipe.data)} has no column {task.EXPLANATION!r}, which is learned; "
            f"its columns are {list(rows[0])}. Where there are none to learn, set explanation = false in [target]"
        )
    for row in rows if explained else ():
        if row[task.EXPLANATION] is not None:  # a row need not have one
            check_text(row, task.EXPLANATION, f"{place(target.train, recipe.data)}, row {row.number}", blank=True)
    return rows


def scored_rows(recipe: Recipe, wanted: Asked) -> list[Any]:
    """The rows that a set asks about or reads, checked as far as that needs no tokenizer."""
    task, source = find_task(wanted.task), wanted.source
    if task.KIND == "text":
        return load_texts(source, recipe.data, recipe.parts, wanted.table)
    forms = getattr(task, "FORMS", ())
    if source.form and source.form not in forms:
        raise ConfigError(f"[{wanted.table}] form = {source.form!r}; task {wanted.task!r} has {list(forms) or 'none'}")
    return _checked_rows(recipe, task, source)


def _checked_rows(recipe: Recipe, task: Any, source: Source) -> list[Any]:
    where = place(source, recipe.data)
    given = load_rows(source, recipe.data, recipe.parts, task.COLUMNS, _table_of(recipe, source))
    with refusing(DataError, where):
        return task.select(given, where)


def _table_of(recipe: Recipe, source: Source) -> str:
    """The recipe's table that a source is; "" for one that is none of its own."""
    return next((table for table, own in sources(recipe).items() if own is source), "")


def load_scored(recipe: Recipe) -> tuple[Any, dict[str, ScoredSet]]:
    """The tokenizer and what the recipe scores, checked."""
    check_target(recipe)
    tokenizer = load_tokenizer(recipe)
    sets = {name: load_set(recipe, each, tokenizer) for name, each in asked(recipe).items()}
    refuse_shared_validation(sets)
    return tokenizer, sets


def check_target(recipe: Recipe) -> None:
    """Refuse a target without a set to score, or with metrics that its task does not have."""
    task = find_task(recipe.target.task)
    if task.KIND in ("text", "harness"):
        raise ConfigError(f"task {recipe.target.task!r} can be a probe, but not a target: it has no answers to learn")
    if not recipe.target.eval:
        raise ConfigError("the recipe has no [target.eval.NAME] table: say what the target is scored on")
    unknown = [metric for metric in recipe.target.metrics if metric not in task.METRICS]
    if unknown or not recipe.target.metrics:
        raise ConfigError(
            f"target.metrics = {recipe.target.metrics}; task {recipe.target.task!r} has {list(task.METRICS)}"
        )


def refuse_trained(recipe: Recipe, train: Iterable[Example], scored: Mapping[str, ScoredSet]) -> None:
    """Refuse rows that are both trained and scored, where recall of them is not the question."""
    tested = [each for each in scored.values() if each.role in ("target", "validation")]
    learned = {example.id: example.row for example in train}
    overlap = {id: (each.where, row) for each in tested for id, row in _ids(each).items() if id in learned}
    if overlap and not recipe.target.recall:
        id, (where, row) = min(overlap.items())
        raise DataError(
            f"{len(overlap)} rows are both trained and scored, such as id {id!r}: "
            f"{place(recipe.target.train, recipe.data)}, row {learned[id]}, and {where}, row {row}; where recall of "
            "what was read is the question, set recall = true in [target]"
        )


def refuse_scored(what: str, texts: Iterable[Example], scored: Mapping[str, ScoredSet]) -> None:
    """Refuse general text that trains, in the table `what`, and is a probe as well."""
    probes = [item for each in scored.values() if each.role == "probe" for item in each.items]
    known = {tuple(item.ids) for item in probes if isinstance(item, Example)}
    both = [text for text in texts if tuple(text.ids) in known]
    if both:
        raise DataError(
            f"{len(both)} texts of [{what}] are scored as well, such as that of {both[0].place}; use [parts]"
        )


def refuse_shared_validation(sets: Mapping[str, ScoredSet]) -> None:
    """Refuse to choose learning rates by what the methods are compared by."""
    if VALIDATION in sets:
        own, tested = sets[VALIDATION], [scored for scored in sets.values() if scored.role == "target"]
        ids = _ids(own)
        shared = {id: (each.where, row) for each in tested for id, row in _ids(each).items() if id in ids}
        if shared:
            id, (where, row) = min(shared.items())
            raise DataError(
                f"{len(shared)} validation rows are in target.eval too, such as id {id!r}: {own.where}, row {ids[id]}, "
                f"and {where}, row {row}"
            )


def _ids(scored: ScoredSet) -> dict[str, int]:
    """The rows that a set asks about, their numbers by id; a task of the harness has documents of its own."""
    if find_task(scored.task).KIND == "harness":
        return {}
    asked = [item for item in scored.items if not isinstance(item, Example)]
    read = {item.id: item.row for item in scored.items if isinstance(item, Example)}
    return read | {item["id"]: item.get("row", 0) for item in asked}


def load_set(recipe: Recipe, wanted: Asked, tokenizer: Any) -> ScoredSet:
    """What a task asks of the rows of a source, none of it cut away."""
    role, name, source = wanted.role, wanted.task, wanted.source
    task, where, length = find_task(name), place(source, recipe.data), recipe.train.max_length
    if task.KIND == "harness":
        known = harness_task.parse(name, source.limit, source.first)
        return ScoredSet(role, name, [known], hub=_loaded_by_the_harness(recipe, wanted.table, known))
    longest = positions(recipe)
    if wanted.window > longest:
        raise ConfigError(f"[{wanted.table}] window = {wanted.window}, but the base reads {longest} tokens at most")
    room = wanted.window or min(getattr(task, "WINDOW", length), longest)
    rows = scored_rows(recipe, wanted)
    if task.KIND == "text":
        with refusing(DataError, where):
            pages = task.pages(rows, source.column, tokenizer, room) if hasattr(task, "pages") else []
            made = _some(task.examples(rows, source.column, tokenizer, room), where, source)
        return ScoredSet(role, name, made, source.cluster, pages)
    if task.KIND == "response":
        with refusing(DataError, where):
            made = task.examples(rows, where, tokenizer, room)
        kept = keep_answered(made, where, recipe.train.too_long, room)
        _refuse_twice([{"id": example.id, "row": example.row} for example in kept], where)
        return ScoredSet(role, name, kept, source.cluster, where=where)
    with refusing(DataError, where):
        forms = [source.form] if source.form else []
        questions = [(task.item(row, *forms), row, task.response(row, explanation=False)) for row in rows]
        answered = [
            encode(tokenizer, item["id"], item["prompt"], answer, length, end=True, **_known(task, row))
            for item, row, answer in questions
        ]
    kept = {example.id for example in keep_answered(answered, where, recipe.train.too_long, length)}
    items = [item | {"row": row.number} for item, row, _ in questions if item["id"] in kept]
    _refuse_twice(items, where)
    return ScoredSet(role, name, items, source.cluster, where=where)


def _loaded_by_the_harness(recipe: Recipe, table: str, known: harness_task.HarnessTask) -> dict[str, str]:
    """The revisions of a task's data sets, by name; an error names the recipe's table."""
    try:
        return check_task(known, recipe.lm_eval_tasks, positions(recipe))
    except DataError as error:
        raise DataError(
            f"[{table.removesuffix('.source')}] {error}. Load it once while online, or remove the table"
        ) from error


def _id(row: Row, number: int | None) -> str:
    return str(row["id"]) if number is None else f"{row['id']}.{number}"


def _known(task: Any, row: Row) -> dict[str, Any]:
    """Where a row's prompt stands, for messages."""
    return {"row": row.number, "column": row["column"] if task.KIND == "answer" else task.PROMPT}


def _refuse_twice(items: list[dict[str, Any]], where: str) -> None:
    first: dict[str, int] = {}
    twice = [(first[item["id"]], item) for item in items if first.setdefault(item["id"], item["row"]) != item["row"]]
    if twice:
        row, item = twice[0]
        raise DataError(
            f"{where}, row {item['row']}: {len(twice)} ids stand there twice, such as {item['id']!r}, which is row "
            f"{row}'s too; leave equal rows out, and give others an id of their own"
        )


def load_text(recipe: Recipe, source: Source, tokenizer: Any) -> list[Example]:
    """Windows of plain text to train on."""
    rows, length = load_texts(source, recipe.data, recipe.parts, _table_of(recipe, source)), recipe.train.max_length
    with refusing(DataError, place(source, recipe.data)):
        made = find_task("perplexity").examples(rows, source.column, tokenizer, length)
        return _some(made, place(source, recipe.data), source)


def _some(examples: list[Example], where: str, source: Source) -> list[Example]:
    """The examples of a text, of which there must be one."""
    if not examples:
        raise DataError(f"{where}: column {source.column!r} has no text of two tokens or more")
    return examples


def load_documents(recipe: Recipe, source: Source) -> list[str]:
    """Texts of a source that are not blank."""
    rows = load_texts(source, recipe.data, recipe.parts, _table_of(recipe, source))
    return [row[source.column] for row in rows if row[source.column].strip()]


def revisions(recipe: Recipe, scored: Mapping[str, ScoredSet]) -> dict[str, str]:
    """The commit hashes of what was loaded from the hub, by name; of a data set at several revisions, by both."""
    used = {(s.hub, s.revision) for s in sources(recipe).values()} if recipe.data == "hub" else set()
    names = Counter(name for name, _ in used)
    found = {name if names[name] == 1 else f"{name}@{revision}": resolved(name, revision) for name, revision in used}
    for each in scored.values():
        for name, revision in each.hub.items():
            with contextlib.suppress(DataError):  # offline, the harness reads a cache that may not know of commits
                found[name] = resolved(name, revision)
    base = resolved_base(recipe)
    return dict(sorted(found.items())) | ({recipe.base: base} if base else {})


def check_output(folder: Path, *, make: bool = True) -> None:
    """Refuse an output folder that cannot be written; unless it is to be made, the folder that it would be made in."""
    try:
        if "\0" in str(folder):
            raise ValueError("no name of a file has a null character")
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        whole = folder.absolute()
        tempfile.TemporaryFile(dir=next(place for place in (whole, *whole.parents) if place.exists())).close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"output = {str(folder)!r} cannot be written: {error}; give another --output") from error
