"""Whatever a file holds, it is read or refused: never another error, a hang, a memory blow-up, or half a change.

Real files are changed byte by byte, field by field and tensor by tensor, with checksums made right again, so that most
of what is tried gets past them.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

import smf
import smf.sources
from conftest import batch, tiny_model, train
from fakes import base, curve, recipe, result, scores, write
from smf.adapter_file import CONFIG, TENSORS, fresh_adapter, patch_of_adapter, put_into_adapter, read_adapter
from smf.errors import SmfError
from smf.export import as_csv, as_json
from smf.files import write_tensors
from smf.fingerprint import tensors_hash
from smf.logs import read_log
from smf.prepare import load_set, load_text, load_training
from smf.recipe import Recipe, Source, Target, asked, limited, sources
from smf.recipe_file import _write_table, load_recipe, to_toml
from smf.row_report import belongs, row_report
from smf.runs import read_runs
from smf.sources import load_rows
from smf.summary import summarise
from smf.table import all_tables
from test_patch import forge, memory_state, read_file
from test_runs import places, put
from tiny import RECIPE, make_tokenizer, question, write_lines

SECONDS = 60  # that one input may take, on however busy a machine
MEGABYTES = 1000  # that the peak memory may rise by

JUNK = [..., None, 0, 1, -1, 1.5, "", "0", "abc", "é\ud800\0", "../x", "x" * 5000, [], {}, [1], ["a"], {"a": 1}, True]
JUNK += [float("nan"), float("inf"), 10**6, 2**31, 2**31 - 1, 10**9, 2**63, 10**19, 10**400, 1e308, "1" * 5000]
BYTES = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "twice", "zeros"]), st.integers(0, 2**16), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)
DTYPES = [torch.int8, torch.int64, torch.float64, torch.float16, torch.bool, torch.float8_e4m3fn, torch.complex64]
TENSOR_EDITS: list[Callable[[Tensor], Tensor]] = [
    *(lambda t, dtype=dtype: t.to(dtype) for dtype in DTYPES),
    *(lambda t, value=value: t.clone().fill_(value) for value in (0, 1, -1, 127, float("nan"))),
    lambda t: t[:0],
    lambda t: t[:-1],
    lambda t: t.flip(0),
    lambda t: t.flatten(),
    lambda t: t.unsqueeze(0),
    lambda t: torch.cat([t, t]),
    lambda t: t.reshape(-1)[0],
    lambda t: torch.empty(0, 10**9, dtype=t.dtype),
    lambda t: _with_first(t, 2**62 if t.dtype == torch.int64 else 120),
    lambda t: t.roll(1, 0),
]


def _with_first(tensor: Tensor, value: int) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[:1] = value
    return changed


def edited(content: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    """Some bytes changed, the rest as it was."""
    found = bytearray(content)
    for kind, where, value in edits:
        place = where * len(found) // (2**16 + 1)
        if kind == "flip" and found:
            found[place] ^= value or 1
        elif kind == "cut":
            del found[place:]
        elif kind == "insert":
            found[place:place] = bytes([value]) * (value % 7 + 1)
        elif kind == "twice":
            found[place:place] = found[place : place + value]
        else:
            found[place : place + 8] = bytes(min(8, len(found) - place))
    return bytes(found)


def with_junk(data: st.DataObject, table: Any) -> Any:
    """A copy of a JSON value of which one place, at any depth, holds junk or is not there."""
    found = json.loads(json.dumps(table))
    paths = list(places(found))
    if not paths:
        return found
    depth = data.draw(st.sampled_from(sorted({len(path) for path in paths})))
    path = data.draw(st.sampled_from([path for path in paths if len(path) == depth]))
    return put(found, list(path), data.draw(st.sampled_from(JUNK)))


def with_edit(data: st.DataObject, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which one is another, is not there, or has another's name."""
    found = dict(tensors)
    name = data.draw(st.sampled_from(sorted(found)))
    how = data.draw(st.integers(-2, len(TENSOR_EDITS) - 1))
    if how == -1:
        found.pop(name)
    elif how == -2:
        found[data.draw(st.sampled_from(sorted(found)))] = found[name].clone()
    else:
        try:
            found[name] = TENSOR_EDITS[how](found[name]).contiguous()
        except (RuntimeError, IndexError):  # not of this tensor
            found.pop(name)
    return found


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"this input took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- what is tried: each returns a function that changes a file in one way and uses what comes of it ------------------

Try = Callable[[st.DataObject], None]


def patches(folder: Path) -> Try:
    models = [tiny_model(train="rows+scale"), tiny_model(init="paper")]
    files = []
    for number, model in enumerate(models):
        options = {"provenance": True, "lr_other": 0.1} if number == 0 else {}
        optimizer = smf.SparseMemoryOptimizer(model, lr=0.1, rule="tf", rows_per_step=8, **options)
        model.train()
        ids = {"example_ids": torch.arange(4)} if options else {}
        model(**batch(), **ids).loss.backward()
        optimizer.step()
        smf.save_patch(model, folder / f"{number}.smf", corpus={"a": [1, "b"]})
        files.append((folder / f"{number}.smf").read_bytes())
    fresh = [tiny_model(train="rows+scale"), tiny_model(init="paper")]
    starts = [tensors_hash(memory_state(model)) for model in fresh]
    whole = [read_file(folder / f"{number}.smf") for number in range(2)]
    path = folder / "any.smf"

    def attempt(data: st.DataObject) -> None:
        number = data.draw(st.integers(0, 1))
        how = data.draw(st.sampled_from(["bytes", "header", "header", "tensors", "tensors"]))
        tensors, header = whole[number]
        if how == "bytes":
            path.write_bytes(edited(files[number], data.draw(BYTES)))
        elif how == "header":
            changed = with_junk(data, header)
            forge(path, tensors, changed if isinstance(changed, dict) else {})
        else:
            forge(path, with_edit(data, tensors), header)
        try:
            patch = smf.load_patch(path)
            belongs(patch, 1, row_report(patch, [patch], None))
            put_into_adapter(patch, fresh_adapter(patch), "apply")
            patch.apply(fresh[number])
            patch.revert(fresh[number])
        except SmfError:
            pass
        assert tensors_hash(memory_state(fresh[number])) == starts[number]

    return attempt


def adapters(folder: Path) -> Try:
    model = tiny_model(train="rows+scale")
    train(model, steps=2)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "checkpoint-2")
    patch = smf.save_patch(model, folder / "a.smf")
    config = json.loads((folder / "whole" / CONFIG).read_text())
    whole = {name: load_file(folder / name / TENSORS) for name in ("whole", "checkpoint-2")}
    start = tensors_hash(memory_state(model))
    (folder / "any").mkdir()

    def attempt(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(whole)))
        how = data.draw(st.sampled_from(["bytes", "config bytes", "config", "config", "tensors", "tensors"]))
        tensors, text = whole[name], json.dumps(config).encode()
        if how.startswith("config"):
            text = edited(text, data.draw(BYTES)) if how != "config" else json.dumps(with_junk(data, config)).encode()
        if how == "tensors":
            tensors = with_edit(data, tensors)
        (folder / "any" / CONFIG).write_bytes(text)
        save_file(tensors, folder / "any" / TENSORS, metadata={"format": "pt"})
        if how == "bytes":
            content = (folder / "any" / TENSORS).read_bytes()
            (folder / "any" / TENSORS).write_bytes(edited(content, data.draw(BYTES)))
        try:
            patch_of_adapter(folder / "any")
            found = read_adapter(folder / "any")
        except SmfError:
            pass
        else:
            before = tensors_hash(found.tensors)
            try:
                put_into_adapter(patch, found, "revert")
                put_into_adapter(patch, found, "apply")
            except SmfError:
                pass
            assert tensors_hash(found.tensors) == before
        if how == "tensors":  # as PEFT's loaders put them in
            try:
                set_peft_model_state_dict(model, tensors)
            except SmfError:
                assert tensors_hash(memory_state(model)) == start
            set_peft_model_state_dict(model, whole["whole"])

    return attempt


def backgrounds(folder: Path) -> Try:
    read = smf.read_background(tiny_model(), [batch(seed=seed) for seed in range(2)])
    read = read.protecting({1: torch.tensor([3, 5])})
    read.save(folder / "whole.safetensors")
    content = (folder / "whole.safetensors").read_bytes()
    tensors = load_file(folder / "whole.safetensors")
    header = {"format": 1, "n_docs": read.n_docs, "identity": read.identity, "corpus": read.corpus}
    path = folder / "any.safetensors"

    def attempt(data: st.DataObject) -> None:
        how = data.draw(st.sampled_from(["bytes", "header", "tensors", "tensors"]))
        if how == "bytes":
            path.write_bytes(edited(content, data.draw(BYTES)))
        else:
            changed = with_edit(data, tensors) if how == "tensors" else tensors
            write_tensors(path, changed, "background", with_junk(data, header) if how == "header" else header)
        try:
            found = smf.Background.load(path)
        except SmfError:
            return
        for layer, counts in found.layers.items():
            b_R, df_R = found.at(layer, torch.arange(256))
            assert bool((b_R >= 0).all()) and bool((df_R >= 0).all()) and counts.total >= 0
            found.hubs(layer, 256)
        found.protecting({layer: torch.tensor([1]) for layer in found.layers}).save(folder / "again.safetensors")

    return attempt


def recipes(folder: Path) -> Try:
    text = RECIPE.format(folder="x") + '\n[methods.more]\nkind = "lora"\nlr = 0.1\naxes = { r = [2, 4] }\n'
    table = tomllib.loads(text)
    path = folder / "any.toml"

    def attempt(data: st.DataObject) -> None:
        if data.draw(st.booleans()):
            path.write_bytes(edited(text.encode(), data.draw(BYTES)))
        else:
            lines: list[str] = []
            _write_table({"about": []} | with_junk(data, table), [], lines)
            path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        try:
            found = load_recipe(path)
        except SmfError:
            return
        again = folder / "again.toml"
        again.write_text(to_toml(found), encoding="utf-8")
        assert load_recipe(again) == found
        for name in found.methods:
            try:
                run = found.run_id(name)
            except SmfError:  # a function of one's own that is not there
                continue
            assert (folder / "runs" / run).resolve().parent == (folder / "runs").resolve()
        asked(found), sources(found), limited(found, 3), found.comparison_id()

    return attempt


def runs(folder: Path) -> Try:
    own = recipe()
    here = {"comparison": own.comparison_id()}
    made = curve("smf", [0.3, 0.5], [1, 0.9], seed=5, rows_per_step=64) | here | {"rows_by_layer": {"1": 2}}
    failed = {"method": "lora", "options": {"lr": 0.1}, "seed": 0, "reason": "NaN"} | here
    log = [{"step": step, "loss": 1.0, "rows": {"1": 4}, "hub_share": {"1": 0.5}} for step in (1, 2)]
    write(folder / "base-0", base() | here, own)
    write(folder / "smf-4", result("smf-more", scores(), seed=4) | here, own)
    run = write(folder / "smf-5", made, own)
    write(folder / "lora-0", b"", own)
    (folder / "lora-0" / "result.json").unlink()
    files = {
        run / "result.json": json.dumps(made).encode(),
        run / "metrics.jsonl": "\n".join(map(json.dumps, log)).encode(),
        folder / "lora-0" / "failed.json": json.dumps(failed).encode(),
        folder / "recipe.toml": to_toml(own).encode(),
    }
    for path, content in files.items():
        path.write_bytes(content)

    def attempt(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from([*files, run / "result.json"]))
        if path.suffix == ".json" and data.draw(st.booleans()):
            path.write_bytes(json.dumps(with_junk(data, json.loads(files[path]))).encode())
        else:
            path.write_bytes(edited(files[path], data.draw(BYTES)))
        try:
            summary = summarise((found := read_runs([folder])).results, ["acc"], failed=found.failed)
            all_tables(summary), as_csv(summary), json.dumps(as_json(summary), allow_nan=False)
            read_log(run / "metrics.jsonl")
        except SmfError:
            pass
        path.write_bytes(files[path])

    return attempt


CHAT = [{"role": "user", "content": "word1"}, {"role": "assistant", "content": "word2"}]
ROWS: dict[str, dict[str, Any]] = {
    "medmcqa": question(1, random.Random(1)) | {"exp": "word3"},
    "choices": {"id": "a", "prompt": "word1", "choices": ["word2", "word3"], "answer": 1, "explanation": "word4"},
    "closed_book": {"id": 3, "question": "word1 ?", "answer": {"value": "word2", "aliases": ["word3"]}},
    "triviaqa": {"question_id": "t", "question": "word1 ?", "possible_answers": '["word2"]'},
    "facts": {"id": 1, "question": "In what country is Paris?", "obj": "France", "possible_answers": '["France"]'},
    "nq_open": {"question": "word1", "answer": ["word2", "word3"]},
    "gsm8k_loss": {"question": "word1 ?", "answer": "word2"},
    "responses": {"messages": CHAT, "prompt": "word1", "completion": "word2", "text": "word3", "id": 4},
    "perplexity": {"text": "word1 word2 word3"},
    "wikitext": {"text": " = Title = \nword1 word2"},
}


class Rows(list[Any]):
    """As datasets gives them."""

    column_names: list[str]


def rows(folder: Path) -> Try:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    read = smf.sources._read

    def attempt(data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(sorted(ROWS)))
        given = Rows([json.loads(json.dumps(ROWS[task])) for _ in range(2)])
        for _ in range(data.draw(st.integers(1, 3))):
            given[0] = with_junk(data, given[0])
        given.column_names = list(given[0] | given[1])
        given[:] = [dict.fromkeys(given.column_names) | row for row in given]
        source = Source(path="x", cluster=".", min_chars=data.draw(st.sampled_from([0, 2])), task=task, sample=1)
        own = Recipe(base="world", data="here", target=Target(task=task, train=source, eval={"a": source}))
        smf.sources._read = lambda *_: given
        try:
            if task not in ("perplexity", "wikitext"):
                load_training(own, tokenizer)
            load_set(own, asked(own)["a"], tokenizer)
            load_text(own, source, tokenizer)
        except SmfError:
            pass
        finally:
            smf.sources._read = read

    return attempt


def lines(folder: Path) -> Try:
    write_lines(folder / "whole.jsonl", [{"text": f"word{i}", "n": i, "list": [1, {"a": "b"}]} for i in range(9)])
    content = (folder / "whole.jsonl").read_bytes()

    def attempt(data: st.DataObject) -> None:
        (folder / "any.jsonl").write_bytes(edited(content, data.draw(BYTES)))
        with suppress(SmfError):
            load_rows(Source(path="any.jsonl", part="a"), str(folder), {"a": 0.9}, ["text"])

    return attempt


KINDS = {f.__name__: f for f in (patches, adapters, backgrounds, recipes, runs, rows, lines)}
FAST = {"patches": 500, "adapters": 240, "backgrounds": 500, "recipes": 400, "runs": 150, "rows": 200, "lines": 10}
SLOW = {"patches": 30_000, "adapters": 10_000, "backgrounds": 25_000, "recipes": 18_000, "runs": 4_500, "rows": 12_000}
SLOW |= {"lines": 500}
assert (sum(FAST.values()), sum(SLOW.values())) == (2_000, 100_000)


@pytest.mark.parametrize(
    ("kind", "count"), [*FAST.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items())]
)
def test_whatever_a_file_holds_it_is_read_or_refused(
    kind: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # a patch may ask for a memory that just fits this machine, which is made; here that is less than the limit
    monkeypatch.setattr("smf.shape.available_memory", lambda: MEGABYTES // 2 * 2**20)
    attempt = KINDS[kind](tmp_path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count == FAST[kind],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def everything(data: st.DataObject) -> None:
        with within(SECONDS):
            attempt(data)

    everything()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024 < MEGABYTES


def test_coverage_can_guide_the_inputs(tmp_path: Path):
    """tests/guided_fuzz.py tries some inputs of each kind and finds nothing."""
    pytest.importorskip("atheris", reason="the extra `fuzz` is not installed")
    script = Path(__file__).with_name("guided_fuzz.py")
    line = [sys.executable, script, "backgrounds", "-runs=30"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Done 30 runs" in done.stderr, done.stderr[-3000:]
