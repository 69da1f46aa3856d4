"""Serving: patches that take turns in a loaded model, generation, and the folder that `transformers serve` loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import smf
from conftest import batch, logits, tiny_base, tiny_config, tiny_model, train
from smf import patch_cli
from smf.errors import PatchError
from test_merge import patch as trained_patch


@pytest.fixture
def patches(tmp_path: Path) -> dict[str, smf.Patch]:
    """Two trainings of one memory, which share rows."""
    made = {name: trained_patch(tmp_path, seed) for name, seed in (("medicine", 0), ("law", 5))}
    assert any(len(found.ids_R) for found in made["medicine"].overlap(made["law"]).values())
    return made


@pytest.fixture
def model(patches: dict[str, smf.Patch]) -> torch.nn.Module:
    return get_peft_model(tiny_base(), patches["medicine"].config)  # type: ignore[arg-type]


def test_each_switch_leaves_nothing_of_the_last_one(patches: dict[str, smf.Patch], model: torch.nn.Module):
    alone = {name: logits(smf.load(tiny_base(), patch)) for name, patch in patches.items()}
    alone[None] = logits(tiny_base())  # type: ignore[index]
    switch = smf.PatchSwitch(model)
    for name, patch in patches.items():
        switch.add(name, patch)
    assert switch.names == ["medicine", "law"] and switch.active is None
    for name in ("law", "law", None, "medicine", "law", "medicine", None):
        switch.use(name)
        assert switch.active == name
        assert torch.equal(logits(model), alone[name])  # type: ignore[index]
    switch.use("law")
    switch.remove("law")
    assert switch.active is None and torch.equal(logits(model), alone[None])  # type: ignore[index]
    with pytest.raises(PatchError, match=r"no patch 'law'; added were \['medicine'\]"):
        switch.use("law")


def test_a_switch_that_fails_changes_nothing(patches: dict[str, smf.Patch], model: torch.nn.Module):
    switch = smf.PatchSwitch(model)
    for name, patch in patches.items():
        switch.add(name, patch)
    with pytest.raises(PatchError, match="there is a patch 'law' already"):
        switch.add("law", patches["law"])
    switch.use("medicine")
    layer, rows = next((n, rows) for n, rows in patches["law"].rows.items() if len(rows))
    foreign = next(row for row in rows.tolist() if row not in patches["medicine"].rows[layer].tolist())
    smf.memory_layers(model)[layer].values.data[foreign] += 1.0  # somebody else's change
    before = logits(model)
    with pytest.raises(PatchError, match="not what the patch replaced"):
        switch.use("law")
    assert switch.active == "medicine" and torch.equal(logits(model), before)


def test_what_does_not_fit_is_refused_when_added(patches: dict[str, smf.Patch]):
    patch = patches["medicine"]
    with pytest.raises(PatchError, match="another base"):
        smf.PatchSwitch(get_peft_model(tiny_base(seed=1), tiny_config())).add("a", patch)
    with pytest.raises(PatchError, match=r"memory at layers \[1, 2\]"):
        smf.PatchSwitch(tiny_model(layers=[1])).add("a", patch)
    with pytest.raises(PatchError, match="has no memory layers"):
        smf.PatchSwitch(tiny_base())


def test_generation_with_and_without_a_cache_is_the_same(patches: dict[str, smf.Patch]):
    model = smf.load(tiny_base(), patches["medicine"])
    inputs = {key: batch(rows=2, length=6)[key] for key in ("input_ids", "attention_mask")}
    with_cache, without = (
        model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(with_cache, without)
    base = tiny_base().generate(**inputs, max_new_tokens=8, do_sample=False)
    assert not torch.equal(with_cache, base)


def test_the_folder_that_transformers_serve_loads(patches: dict[str, smf.Patch], tmp_path: Path):
    """docs/serving.md: the base's files and the adapter's in one folder, which any `from_pretrained` loads."""
    tiny_base().save_pretrained(tmp_path / "base")
    patch_cli.main(["apply", str(tmp_path / "0.smf"), "--output", str(tmp_path / "served")])
    shutil.copytree(tmp_path / "base", tmp_path / "served", dirs_exist_ok=True)
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    assert torch.equal(logits(served), logits(smf.load(tiny_base(), patches["medicine"])))


def test_what_vllm_looks_for_is_not_there(patches: dict[str, smf.Patch], tmp_path: Path):
    """vLLM takes LoRA adapters only, which it knows by these keys; docs/serving.md quotes its error."""
    patch_cli.main(["apply", str(tmp_path / "0.smf"), "--output", str(tmp_path / "adapter")])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert {"r", "lora_alpha"} & set(config) == set()
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    assert "Missing required configuration fields: {'r', 'lora_alpha'}" in page


def test_a_patch_is_added_as_if_no_other_were_there(tmp_path: Path):
    """One with a scale of its own is active; and one that was trained on top of another can never take its turn."""
    base, made = tiny_model(train="rows+scale"), {}
    for name, seed in (("one", 0), ("two", 5)):
        model = tiny_model(train="rows+scale")
        train(model, steps=3, seed=seed, lr=0.1)
        made[name] = smf.save_patch(model, tmp_path / name)
    train(model, steps=2, seed=9, lr=0.1)
    on_top = smf.save_patch(model, tmp_path / "on top")
    switch = smf.PatchSwitch(base)
    switch.add("one", made["one"])
    switch.use("one")
    shown = logits(base)
    switch.add("two", made["two"])
    with pytest.raises(PatchError, match=r"not what the patch replaced|differ from those the patch was trained with"):
        switch.add("on top", on_top)
    assert switch.active == "one" and torch.equal(logits(base), shown) and switch.names == ["one", "two"]


def test_a_switch_keeps_to_its_adapter(patches: dict[str, smf.Patch], model: torch.nn.Module):
    switch = smf.PatchSwitch(model)
    switch.add("law", patches["law"])
    model.add_adapter("second", tiny_config(seed=3))  # type: ignore[operator]
    model.set_adapter("second")  # type: ignore[operator]
    switch.use("law")
    assert not any(memory.values.any() for memory in smf.memory_layers(model, "second").values())
    switch.use(None)
    assert not any(memory.values.any() for memory in smf.memory_layers(model, "default").values())
