"""Files made to do harm: sizes that fill the memory, files that never end, code in pickles and repositories."""

from __future__ import annotations

import gzip
import json
import math
import os
import pickle
import re
import struct
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import smf
from conftest import batch, logits, tiny_base, tiny_config, tiny_model, train
from smf import background, json_lines
from smf.adapter_file import CONFIG, TENSORS, fresh_adapter, read_adapter
from smf.background import Background
from smf.base import load_base
from smf.checkpoints import read_manifest, seal
from smf.data import in_order
from smf.errors import BackgroundError, ConfigError, DataError, PatchError, SmfError, TrainingError
from smf.logs import read_log
from smf.loop import fit
from smf.plan import _forget_peak, _resident
from smf.prepare import load
from smf.recipe import Recipe, Source
from smf.recipe_file import load_recipe
from smf.runs import read_result, read_runs
from smf.shape import MemoryShape
from smf.sources import load_rows
from smf.train import _prepare
from test_fuzz import SECONDS, within
from test_patch import forge, read_file
from tiny import make_base, make_world

SOURCES = Path(smf.__file__).parent
GIB = 2**30

# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def patch_file(tmp_path: Path) -> Path:
    model = tiny_model()
    train(model, steps=1)
    smf.save_patch(model, tmp_path / "a.smf")
    return tmp_path / "a.smf"


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smf.shape.available_memory", lambda: GIB)


def _no_rows(width: int) -> dict[str, Tensor]:
    ids = {f"{layer}.ids": torch.empty(0, dtype=torch.int32) for layer in (1, 2)}
    return ids | {f"{layer}.new": torch.empty(0, width) for layer in (1, 2)}


Forgery = Callable[[dict, dict], Any]
HUGE: dict[str, tuple[Forgery, str]] = {
    "sub-keys": (lambda t, h: h["config"].update(n_keys=10**6), r"n_keys=1000000.* 46340 at most"),
    "rows": (lambda t, h: h["config"].update(n_keys=46340), r"n_keys=46340, .* width 32 takes 25\d\.\d GiB"),
    "random rows": (lambda t, h: h["config"].update(n_keys=46340, init="paper"), r"takes 25\d\.\d GiB"),
    "heads": (lambda t, h: h["config"].update(heads=10**9), r"heads=1000000000.* GiB"),
    "too many heads": (lambda t, h: h["config"].update(heads=10**30), r"heads must be a whole number"),
    "reads": (lambda t, h: h["config"].update(knn=10**9), r"knn=1000000000"),
    "queries": (lambda t, h: h["config"].update(k_dim=2 * 10**9), r"k_dim=2000000000.* GiB"),
    "width": (lambda t, h: h.update(width=10**9) or t.update(_no_rows(10**9)), r"width 1000000000 .* GiB"),
    "a longer width": (lambda t, h: h.update(width=10**30) or t.update(_no_rows(9)), r"width 10{30}"),
    "no width": (lambda t, h: h.update(width=0) or t.update(_no_rows(0)), r"width 0"),
    "layers": (
        lambda t, h: (
            h.update(layers=dict.fromkeys(map(str, range(5000)), h["layers"]["1"]))
            or h["config"].update(layers=list(range(5000)), target_modules=[f"m{i}" for i in range(5000)])
        ),
        "5,000 layers; expected 1,000 at most",
    ),
    "a layer twice": (
        lambda t, h: h["layers"].update({"01": h["layers"]["1"]}),
        "are not those of its config",
    ),
    "a module twice": (lambda t, h: h["config"].update(target_modules=["a", "a"]), "one module for each layer"),
    "a LoRA": (lambda t, h: h.update(lora_numbers=10**400), "a LoRA has 10{39} numbers"),
    "less than no LoRA": (lambda t, h: h.update(lora_numbers=-1), "a LoRA has -1 numbers"),
    "a table beside rows": (lambda t, h: h["layers"]["1"].update(others=["values"]), "expected some of"),
}


@pytest.mark.parametrize("case", HUGE)
def test_a_patch_that_asks_for_more_than_there_is_is_refused(case: str, patch_file: Path, small_machine: None):
    tensors, header = read_file(patch_file)
    change, message = HUGE[case]
    change(tensors, header)
    forge(patch_file, tensors, header)
    with pytest.raises(PatchError, match=message):
        smf.load_patch(patch_file)


def test_counts_whose_sum_wraps_around_are_refused(tmp_path: Path):
    """Four counts of 2**62 add up to 0 in 64 bits; as many writers would fill any memory."""
    model = tiny_model()
    optimizer = smf.SparseMemoryOptimizer(model, lr=0.1, rule="tf", rows_per_step=8, provenance=True)
    model.train()
    model(**batch(), example_ids=torch.arange(4)).loss.backward()
    optimizer.step()
    smf.save_patch(model, tmp_path / "a.smf")
    tensors, header = read_file(tmp_path / "a.smf")
    counts = tensors["1.writers.counts"].clone()
    counts[:4] += 2**62
    forge(tmp_path / "a.smf", tensors | {"1.writers.counts": counts}, header)
    with pytest.raises(PatchError, match="the writers of 8 rows must be as many as are counted"):
        smf.load_patch(tmp_path / "a.smf")


def test_what_just_fits_is_made_and_a_byte_less_is_not(monkeypatch: pytest.MonkeyPatch):
    shape = MemoryShape(1, 32, 16, 2, 4, 16, "additive", "zero", 0, torch.float32)
    needed = sum(tensor.nbytes for tensor in shape.start().values())
    monkeypatch.setattr("smf.shape.available_memory", lambda: needed)
    assert {kind: (t.dtype, tuple(t.shape)) for kind, t in shape.start().items()} == shape.layouts()
    half = replace(shape, table_dtype=torch.bfloat16, init="paper")
    for wrong, room in ((shape, needed - 1), (half, needed)):  # drawn in float32, then cast
        monkeypatch.setattr("smf.shape.available_memory", lambda room=room: room)
        with pytest.raises(ConfigError, match="n_keys=16, heads=2, k_dim=16 at width 32 takes"):
            wrong.start()


def test_a_large_table_still_works(tmp_path: Path):
    """A million rows: the patch of eight of them is small, and its table is not."""
    model = tiny_model(n_keys=1024, layers=[1])
    train(model, steps=1)
    smf.save_patch(model, tmp_path / "a.smf")
    assert (tmp_path / "a.smf").stat().st_size < 10_000
    other = tiny_model(n_keys=1024, layers=[1])
    smf.load_patch(tmp_path / "a.smf").apply(other)
    assert torch.equal(logits(model), logits(other))


def test_a_memory_that_does_not_fit_leaves_the_base_as_it_was(small_machine: None):
    base = tiny_base()
    before, names = logits(base), [name for name, _ in base.named_modules()]
    for config in (tiny_config(n_keys=4000), tiny_config(n_keys=2400)):  # the second: two layers, of which one fits
        with pytest.raises(ConfigError, match=r"at 2 layer\(s\), and this machine has 1\.0 GiB left"):
            get_peft_model(base, config)
    assert [name for name, _ in base.named_modules()] == names and torch.equal(logits(base), before)
    get_peft_model(base, tiny_config())


@pytest.mark.parametrize("folder", ["whole", "checkpoint-1"])
def test_an_adapter_that_promises_a_huge_table_is_refused(folder: str, tmp_path: Path, small_machine: None):
    model = tiny_model(k_dim=2, heads=1)
    train(model, steps=1)
    model.save_pretrained(tmp_path / folder)
    config = json.loads((tmp_path / folder / CONFIG).read_text())
    (tmp_path / folder / CONFIG).write_text(json.dumps(config | {"n_keys": 46340}))
    tensors = load_file(tmp_path / folder / TENSORS)
    tensors |= {name: torch.zeros(1, 2, 46340, 1) for name in tensors if name.endswith("keys")}
    save_file(tensors, tmp_path / folder / TENSORS)
    with pytest.raises(PatchError, match="GiB" if folder != "whole" else r"its config promises .*2147395600, 32"):
        read_adapter(tmp_path / folder)


def test_the_adapter_of_a_patch_is_not_made_where_it_does_not_fit(patch_file: Path, monkeypatch: pytest.MonkeyPatch):
    patch = smf.load_patch(patch_file)
    monkeypatch.setattr("smf.shape.available_memory", lambda: 0)
    with pytest.raises(PatchError, match=r"cannot be made: .* 0\.0 GiB left"):
        fresh_adapter(patch)


def test_tensors_of_other_sizes_change_nothing(tmp_path: Path):
    """torch alone copies those that fit before it says which did not."""
    from peft import set_peft_model_state_dict

    model, other = tiny_model(), tiny_model(seed=1, heads=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(PatchError, match=r"query_weight is \(16, 32\) in the file; the model has \(32, 32\)"):
        set_peft_model_state_dict(model, load_file(tmp_path / "other" / TENSORS))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# -- files that are none ----------------------------------------------------------------------------------------------


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(begin: int, end: int, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin], "data_offsets": [begin, end]}


META = {"__metadata__": {"smf_patch": "{}", "smf_background": "{}"}}
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x08",
    "text": b"general text",
    "not UTF-8": b"\xff\xfe\xff" * 30,
    "a header longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "a header of the largest size": struct.pack("<Q", 2**64 - 1) + b"{}",
    "overlapping offsets": raw({"a": _entry(0, 8), "b": _entry(4, 12)} | META, bytes(12)),
    "offsets twice": raw({"a": _entry(0, 8), "b": _entry(0, 8)} | META, bytes(8)),
    "offsets past the end": raw({"a": _entry(0, 2**40)} | META, bytes(8)),
    "negative offsets": raw({"a": _entry(-8, 8)} | META, bytes(16)),
    "a name twice": raw(json.dumps({"a": _entry(0, 4), "b": _entry(4, 8)}).replace('"b"', '"a"').encode(), bytes(8)),
    "a shape that overflows": raw({"a": {"dtype": "F64", "shape": [2**62, 8], "data_offsets": [0, 0]}} | META),
    "an unknown dtype": raw({"a": _entry(0, 8, "X9")} | META, bytes(8)),
    "a dtype that torch lacks": raw({"a": _entry(0, 8, "F8_E8M0")} | META, bytes(8)),
    "a deep header": raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a deep header of ours": raw({"__metadata__": dict.fromkeys(META["__metadata__"], "[" * 100_000)}),
    "a number too long": raw({"__metadata__": dict.fromkeys(META["__metadata__"], '{"format":' + "1" * 5000 + "}")}),
    "no table": raw({"__metadata__": dict.fromkeys(META["__metadata__"], "[1]")}),
}
READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "patch": (smf.load_patch, "a.smf"),
    "patch or folder": (smf.open_patch, "a.smf"),
    "background": (smf.Background.load, "a.safetensors"),
    "adapter": (lambda path: read_adapter(path.parent), TENSORS),
    "its config": (lambda path: read_adapter(path.parent), CONFIG),
    "recipe": (load_recipe, "a.toml"),
    "result": (read_result, "result.json"),
}


def _place(what: str, folder: Path) -> Path:
    """Where the reader looks; of an adapter the other file is there, and whole."""
    if what in ("adapter", "its config"):
        tiny_model().save_pretrained(folder)
        (folder / READERS[what][1]).unlink()
    return folder / READERS[what][1]


@pytest.mark.parametrize("what", READERS)
def test_whatever_a_file_holds_that_is_none_it_is_refused(what: str, tmp_path: Path):
    path = _place(what, tmp_path)
    for name, content in CONTENTS.items():
        if (what, name) != ("recipe", "empty"):  # which lacks nothing but methods
            path.write_bytes(content)
            with pytest.raises(SmfError):
                READERS[what][0](path)


@pytest.mark.parametrize("what", READERS)
@pytest.mark.parametrize("kind", ["folder", "circle", "pipe", "device", "missing", "too long", "NUL"])
def test_what_is_no_file_is_refused_and_not_waited_for(what: str, kind: str, tmp_path: Path):
    path = _place(what, tmp_path)
    if kind == "folder":
        path.mkdir()
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind in ("too long", "NUL"):
        path = path.with_name("a" * 300) if kind == "too long" else tmp_path / "a\0b"
        path = path / READERS[what][1] if what in ("adapter", "its config") else path
    with pytest.raises(SmfError):
        READERS[what][0](path)


def test_pipes_in_runs_are_named_and_not_waited_for(tmp_path: Path):
    for name in ("result.json", "failed.json"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        os.mkfifo(tmp_path / "runs" / name / name)
    (tmp_path / "runs" / "failed.json" / "recipe.toml").touch()
    with pytest.raises(ConfigError, match="is not a regular file"):
        read_runs([tmp_path / "runs"])
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(DataError, match="is not a regular file"):
        read_log(tmp_path / "metrics.jsonl")


DEEP: dict[str, bytes] = {
    "lists": b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n",
    "tables": b'{"text": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}\n",
    "lists over lines": b"[\n" * 100_000,
    "behind text that looks like an end": b'{"text": "]]]", "b": ' + b'["\\\\", ["\\"]]", ' * 100_000 + b"\n",
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("case", DEEP)
def test_data_nested_too_deep_is_refused_before_the_parser_crashes(case: str, pack: Callable, tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(pack(b'{"text": "word"}\n' + DEEP[case]))
    with pytest.raises(DataError, match=r"line \d+: more than 500 brackets are open"):
        load_rows(Source(path="a.jsonl"), str(tmp_path), {}, ["text"])


def test_brackets_in_texts_are_no_nesting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = ["[" * 1000, '\\"[{' * 500, "]}" * 999, "\\"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text, "l": [[1]]}) + "\n" for text in texts))
    found = load_rows(Source(path="a.jsonl"), str(tmp_path), {}, ["text"])
    assert [row["text"] for row in found] == texts


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes that Python's own objects took at most."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def load_lines(folder: Path, what: Iterable[bytes], pack: Callable = open) -> Any:
    with pack(folder / "a.jsonl", "wb") as file:
        file.writelines(what)
    return load_rows(Source(path="a.jsonl"), str(folder), {}, ["text"])


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path):
    long = (b'{"text": "word"}\n', b'{"text": "', *[b"a" * 2**20] * 100, b'"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 has more than 64 MiB"):
        load_lines(tmp_path, long, gzip.open)

    def refused() -> None:
        with pytest.raises(DataError, match="line 2 has more than 64 MiB"):
            json_lines.check_lines(tmp_path / "a.jsonl")

    assert peak_of(refused) < 2**24


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("case", [*DEEP, "texts", "characters"])
def test_a_line_is_looked_at_in_pieces_as_if_it_were_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, size: int
):
    monkeypatch.setattr(json_lines, "PIECE", size)
    monkeypatch.setattr(json_lines, "NESTED", 5)
    texts = ["[" * 10, '\\"[{' * 5, "]}" * 9, "\\", 'a": {"b": ', "äöü€"]
    same = "".join(json.dumps({"text": text, "l": [[1]]}, ensure_ascii=False) + "\n" for text in texts).encode()
    given = {"texts": same, "characters": same[:-4] + b'"\xe2\x82"}\n'} | {
        name: deep[:3000] for name, deep in DEEP.items()
    }
    (tmp_path / "a.jsonl").write_bytes(given[case])
    if case == "texts":
        json_lines.check_lines(tmp_path / "a.jsonl")
        return
    with pytest.raises(DataError, match="is not UTF-8" if case == "characters" else r"line \d+: more than 5 brackets"):
        json_lines.check_lines(tmp_path / "a.jsonl")


COLUMNS: dict[str, Callable[[int], list[bytes]]] = {  # of rows with so many different keys
    "rows": lambda n: [b'{"text": "a", "k%d": 1}\n' % i for i in range(n)],
    "one row": lambda n: [b'{"text": "a"', *(b', "k%d": {"a": 1}' % i for i in range(n)), b"}\n"],
    "a list": lambda n: [b"[", *(b'{"text": "a", "k%d": [{"b": "c"}]},\n' % i for i in range(n)), b'{"text": "a"}]'],
    "behind deeper ones": lambda n: [
        b'{"text": "a", "b": {"c": 1' + b"".join(b', "k%d": 1' % i for i in range(n)) + b"}}\n",
        *(b'{"text": "a", "k%d": 1}\n' % i for i in range(n)),
    ],
}


@pytest.mark.parametrize("case", COLUMNS)
def test_rows_that_all_have_other_columns_are_refused(tmp_path: Path, case: str):
    with pytest.raises(DataError, match=r"line \d+: its rows have more than 1,000 different keys"):
        load_lines(tmp_path, COLUMNS[case](1000))
    (tmp_path / "a.jsonl").write_bytes(b"".join(COLUMNS[case](900)))
    json_lines.check_lines(tmp_path / "a.jsonl")


def test_different_keys_within_a_column_are_none_of_rows(tmp_path: Path):
    within = (b'{"text": "b", "scores": {"k%d": {"l%d": ": {"}}}\n' % (i, i) for i in range(3000))
    (tmp_path / "a.jsonl").write_bytes(b"".join(within))
    json_lines.check_lines(tmp_path / "a.jsonl")


TWICE = [b'{"text": "a", "text": "b"}', b'{"text": "a", "text": [1]}', b'{"text": "a", "n": {}, "text": 1}']


@pytest.mark.parametrize("row", TWICE)
def test_a_row_that_has_a_key_twice_is_refused(tmp_path: Path, row: bytes):
    with pytest.raises(DataError, match="line 2 has the key 'text' twice"):
        load_lines(tmp_path, [b'{"text": "a", "n": {"text": "b"}}\n', row + b"\n"])


def test_texts_that_look_like_dates_stay_texts(tmp_path: Path):
    """The parser makes dates of them where all texts of a column look like some."""
    rows = [{"a": "2001-01-01", "b": {"c": ["1999-12-31 10:00:00"]}, "d": 1}, {"a": None, "b": None, "d": 2}]
    lines = "".join(json.dumps(row) + "\n\n" for row in rows)
    for packed in (lines, "\ufeff" + json.dumps(rows), json.dumps(rows, indent=1), lines.replace(", ", ",\n")):
        (tmp_path / "a.jsonl").write_text(packed)
        assert [dict(row) for row in load_rows(Source(path="a.jsonl"), str(tmp_path), {}, ["a"])] == rows


def test_a_column_of_dates_changes_no_other(tmp_path: Path):
    row = {"d": "2001-01-01", "timestamp": {"timestamp": "x"}, "v": [{"k": 1}, {"k": None}]}
    (read,) = load_lines(tmp_path, [json.dumps(row | {"text": "a"}).encode() + b"\n"])
    assert dict(read) == row | {"text": "a"} and list(read) == [*row, "text"]


def test_a_row_of_many_keys_with_one_twice_does_not_hang(tmp_path: Path):
    row = ",".join(f'"{number:x}":1' for number in (*range(100_000), 99_999)).encode()
    assert len(row) < 2**20 - 10  # a piece
    with within(SECONDS), pytest.raises(DataError, match="has the key '1869f' twice"):
        load_lines(tmp_path, [b'{"text": "a"}\n', b"{" + row + b"}\n"])


ONCE = [
    b'{"text": "a", "b\\"": 1, "b": 2}\n',
    b'{"text": "a", "n": {"text": 1}, "m": {"text": 2}}\n',
    b'{"text": "a"} {"text": "b"}\n',
]


@pytest.mark.parametrize("line", ONCE)
def test_what_only_looks_like_a_key_twice_is_read(tmp_path: Path, line: bytes):
    assert next(row["text"] for row in load_lines(tmp_path, [line])) == "a"


SPARSE: dict[str, tuple[Callable[[Path], Any], type[Exception]]] = {  # a file of 2 GiB that takes no room on a disk
    "recipe.toml": (load_recipe, ConfigError),
    "result.json": (read_result, DataError),
    "metrics.jsonl": (read_log, DataError),
}


@pytest.mark.parametrize("name", SPARSE)
def test_texts_that_are_too_large_are_refused_unread(tmp_path: Path, name: str):
    read, error = SPARSE[name]
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**31)

    def refused() -> None:
        with pytest.raises(error, match=f"{name} has 2,147,483,648 bytes; expected .* at most"):
            read(tmp_path / name)

    assert peak_of(refused) < 2**22


SPARSE_COLUMNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # shapes by column, what else the header says
    "zeros": (dict.fromkeys(("ids", "b", "df"), (2**27,)), {}),
    "spared zeros": ({"ids": [1], "b": [1], "df": [1], "spared": [2**27]}, {}),
    "unequal": ({"ids": [2**27], "b": [3], "df": [2**27]}, {}),
    "tables": (dict.fromkeys(("ids", "b", "df"), (2, 2**26)), {}),
    "another format": (dict.fromkeys(("ids", "b", "df"), (2**27,)), {"format": 99}),
    "no number of documents": (dict.fromkeys(("ids", "b", "df"), (2**27,)), {"n_docs": "many"}),
}


@pytest.mark.parametrize("case", SPARSE_COLUMNS)
def test_a_background_of_gigabytes_that_take_no_room_is_refused_unread(tmp_path: Path, case: str):
    shapes, other = SPARSE_COLUMNS[case]
    about = {"format": background.FORMAT, "n_docs": 5, "identity": "a", "corpus": "b"} | other
    header, end = {"__metadata__": {"smf_background": json.dumps(about)}}, 0
    for column, shape in shapes.items():
        begin, end = end, end + 8 * math.prod(shape)
        header |= {f"1.{column}": {"dtype": "I64", "shape": shape, "data_offsets": [begin, end]}}
    packed = json.dumps(header).encode()
    with (tmp_path / "background.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(packed)) + packed)
        file.truncate(8 + len(packed) + end)
    _forget_peak("cpu")
    before = _resident("VmRSS")
    with pytest.raises(BackgroundError, match=r"background\.safetensors"):
        Background.load(tmp_path / "background.safetensors")
    assert _resident("VmHWM") - before < 2**28


def test_data_packed_otherwise_is_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b"BZh91AY&SY")
    with pytest.raises(DataError, match="neither JSON lines, nor such lines packed by gzip"):
        load_rows(Source(path="a.jsonl"), str(tmp_path), {}, ["text"])


# -- code -------------------------------------------------------------------------------------------------------------


class Bomb:
    """A pickle of it makes a file, where it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (str(self.mark), "w"))


def test_a_pickle_that_is_loaded_as_one_would_act(tmp_path: Path):
    """What the tests below rest on."""
    torch.save(Bomb(tmp_path / "mark"), tmp_path / "bomb.bin")
    torch.load(tmp_path / "bomb.bin", weights_only=False)
    assert (tmp_path / "mark").exists()


def test_a_base_with_code_in_its_weights_is_refused_and_runs_nothing(tmp_path: Path):
    make_base().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save({"a": Bomb(tmp_path / "mark")}, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot be loaded as a causal language model: .*[Ww]eights.only"):
        load_base(Recipe(base=str(tmp_path / "base")))
    assert not (tmp_path / "mark").exists()


def test_a_base_with_code_beside_its_weights_is_refused_and_runs_nothing(tmp_path: Path):
    make_base().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"model_type": "unheard-of"}
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_base(Recipe(base=str(tmp_path / "base")))
    model = tiny_model()
    train(model, steps=1)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    with pytest.raises(ValueError, match="trust_remote_code"):  # transformers' own words
        smf.load(str(tmp_path / "base"), patch)
    assert not (tmp_path / "mark").exists()


def test_an_adapter_with_code_in_its_weights_is_refused_and_runs_nothing(tmp_path: Path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / TENSORS).unlink()
    torch.save({"a": Bomb(tmp_path / "mark")}, tmp_path / "adapter" / "adapter_model.bin")
    torch.save(Bomb(tmp_path / "mark"), tmp_path / "adapter" / "training_args.bin")
    with pytest.raises(PatchError, match=r"there is no file adapter_model\.safetensors"):
        smf.open_patch(tmp_path / "adapter")
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights only"):  # PEFT's own
        PeftModel.from_pretrained(tiny_base(), tmp_path / "adapter")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_checkpoint_with_code_in_it_is_refused_and_runs_nothing(
    name: str, sealed: bool, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Whether or not its manifest was written anew to fit; where it was, so is anything that Trainer cannot read."""
    recipe = load_recipe(make_world(tmp_path))
    loaded, folder = load(recipe), tmp_path / "run"
    examples = in_order(loaded.train, 8 * 4, 0)

    def fit_to(steps: int) -> None:
        prepared = _prepare(recipe, "smf", loaded, folder)[0]
        fit(prepared, examples, recipe, folder, loaded.tokenizer, steps=steps, loss="answer", name="smf")

    fit_to(2)
    checkpoint = folder / "checkpoints" / "checkpoint-2"
    torch.save(Bomb(tmp_path / "mark"), checkpoint / name)
    torch.save(Bomb(tmp_path / "mark"), checkpoint / "training_args.bin")
    if sealed:
        seal(checkpoint, **{key: value for key, value in read_manifest(checkpoint).items() if key != "sha256"})
        for other in (None, "trainer_state.json", TENSORS):
            if other is not None:
                torch.save({}, checkpoint / name)
                (checkpoint / other).write_bytes(b"{")
                seal(checkpoint, **{key: value for key, value in read_manifest(checkpoint).items() if key != "sha256"})
            with pytest.raises(
                TrainingError, match=r"checkpoint-2 holds what Trainer did not save; remove it to go on"
            ):
                fit_to(4)
    else:
        fit_to(4)
        assert "checkpoint-2" in capsys.readouterr().err  # set aside, and said
    assert not (tmp_path / "mark").exists()


UNSAFE = (
    r"(?<![.\w])(eval|exec|compile|__import__)\(|pickle\.(loads?|Unpickler)|torch\.load\(|np\.load\(|joblib|marshal"
)
UNSAFE += r"|yaml\.(unsafe_|full_)?load|os\.(system|popen)|shell=True|trust_remote_code=True|weights_only=False"


def test_no_code_of_ours_loads_pickles_or_runs_text():
    found = [
        f"{path.relative_to(SOURCES)}: {line.strip()}"
        for path in SOURCES.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(UNSAFE, line)
    ]
    assert found == ["adapter_file.py: trust_remote_code=True among them alone."]
    started = [p.name for p in SOURCES.rglob("*.py") if re.search(r"subprocess\.\w+\(", p.read_text())]
    assert started == ["train.py"]  # git rev-parse HEAD, without a shell
