"""Qwen2.5-0.5B's configuration with random weights, from attaching to reloading, and the benchmark of that shape."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer

import smf
from smf.methods import memory_config
from tiny import WORDS, make_tokenizer, write_lines

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = [*sorted(BENCHMARKS.glob("results/qwen_shape_*.json")), BENCHMARKS / "results" / "train_step.json"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("qwen_shape")


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


@pytest.mark.slow
def test_a_memory_of_qwens_shape_trains_and_comes_back_bit_for_bit(benchmark: ModuleType, shared: Path, tmp_path: Path):
    setup = benchmark.Setup()
    recipe = setup.recipe()
    tokenizer = AutoTokenizer.from_pretrained(setup.tokenizer)
    texts = [f"{'Every child of the town knew the old song by heart. ' * 4}It was song number {i}." for i in range(4)]
    inputs = tokenizer(texts[:2], padding=True, return_tensors="pt")
    base = benchmark.make_base(setup)
    assert sum(p.numel() for p in base.parameters()) == 494_032_768  # as the hub has it
    before = logits(base, inputs["input_ids"])
    model = get_peft_model(base, memory_config(recipe, recipe.methods["smf"]))
    assert torch.equal(logits(model, inputs["input_ids"]), before)
    background = smf.read_background(model, texts, tokenizer=tokenizer, max_length=64)
    optimizer = smf.SparseMemoryOptimizer(model, background, lr=1e-2, reads="gradient")
    model.train()
    for _ in range(2):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {layer: len(rows) for layer, rows in optimizer.last_step.rows.items()} == {10: 512, 12: 512, 14: 512}
    after = logits(model, inputs["input_ids"])
    assert after.isfinite().all() and not torch.equal(after, before)
    model.save_pretrained(tmp_path / "adapter")
    smf.save_patch(model, tmp_path / "patch.smf")
    del model, base, optimizer

    loaded = PeftModel.from_pretrained(benchmark.make_base(setup), tmp_path / "adapter")
    assert torch.equal(logits(loaded, inputs["input_ids"]), after)
    del loaded
    patch = smf.load_patch(tmp_path / "patch.smf")
    patched = get_peft_model(benchmark.make_base(setup), patch.config)
    patch.apply(patched)
    assert torch.equal(logits(patched, inputs["input_ids"]), after)
    patch.revert(patched)
    assert torch.equal(logits(patched, inputs["input_ids"]), before)


def test_the_benchmark_of_the_shape_measures_every_side_on_equal_steps(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_lines(tmp_path / "text.jsonl", [{"text": " ".join(WORDS)}])
    sizes = ["--batch", "2", "--length", "16", "--documents", "4", "--steps", "2", "--turns", "1"]
    files = ["--tokenizer", str(tmp_path / "tokenizer"), "--text", str(tmp_path / "text.jsonl")]
    output = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["qwen_shape.py", "--tiny", *sizes, *files, "--output", str(output)])
    alone = benchmark.measure_alone  # one side in a process of its own; for three of them a fast test has no time
    here = {"full": alone} | dict.fromkeys((s for s in benchmark.SIDES if s != "full"), benchmark.measure)
    monkeypatch.setattr(benchmark, "measure_alone", lambda side, setup: here[side](side, setup))
    benchmark.main()
    report = json.loads(output.read_text())
    turns = {side: turn for side, (turn,) in report["turns"].items()}
    assert list(turns) == list(benchmark.SIDES) and report["setup"]["length"] == 16
    first = [turn["first_loss"] for turn in turns.values()]
    assert first == pytest.approx([first[0]] * 7, rel=1e-6)  # nothing has trained yet
    last = {side: turn["last_loss"] for side, turn in turns.items()}
    assert len({round(loss, 4) for loss in last.values()}) == 5
    for side in ("lora", "full"):
        assert last[side] == pytest.approx(last[f"{side}, our loss"], abs=1e-4)
    for side, turn in turns.items():
        assert len(turn["steps"]) == 2 and min(turn["steps"]) > 0
        assert turn["peak"] > 0 and turn["loaded"] > 0
        assert report["results"][side]["tokens a second"]["median"] > 0
        assert (turn["background"] > 0) == (side in ("smf", "smf-adjacent", "late-rows"))
    assert turns["full"]["trained"] == turns["full"]["parameters"] > turns["lora"]["trained"]
    assert report["results"]["full"]["times full's seconds"]["median"] == 1


@pytest.mark.parametrize("result", RESULTS, ids=lambda path: path.stem)
def test_committed_results_name_files_as_seen_from_the_repository(result: Path):
    found = json.loads(result.read_text())
    named = [str(found["command"]), *map(str, found["setup"].values())]
    words = [word for text in named for word in text.split()]
    assert not [word for word in words if re.match(r"[/~]|\.\w", word)]  # of one machine, or a hidden folder
