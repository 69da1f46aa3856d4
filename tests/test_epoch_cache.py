"""The cache of hidden states between epochs: the same training, without the layers below the first that trains."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import smf
from conftest import tiny_base, tiny_model
from smf.compare import result_path
from smf.dry_run import dry_run
from smf.epoch_cache import HIDDEN, EpochCache, disk_bytes, why_not
from smf.errors import StorageError
from smf.recipe import Recipe
from smf.recipe_file import load_recipe
from smf.train import run_method
from tiny import make_world

EPOCHS, SEQUENCES, LENGTH = 3, 6, 12


def sequences(*lengths: int) -> list[list[int]]:
    """Random token ids, none of them the pad."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 100, (length,), generator=generator).tolist() for length in lengths]


def padded(some: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, some))
    ids = torch.tensor([each + [0] * (longest - len(each)) for each in some])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


class Runs:
    """How often the first decoder layer's MLP was called."""

    def __init__(self, model: PeftModel):
        self.count = 0
        model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.count += 1


def trained(
    model: PeftModel, texts: list[list[int]], cache: EpochCache | None, *, epochs: range = range(EPOCHS)
) -> tuple[list[float], Any]:
    """Losses of each pass, and the patch; steps of two passes of two sequences, drawn anew in each epoch."""
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", reads="gradient", rows_per_step=8)
    model.train()
    losses = []
    for epoch in epochs:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(epoch)).tolist()
        for start in range(0, len(order), 2):
            loss = model(**padded([texts[i] for i in order[start : start + 2]])).loss
            loss.backward()
            losses.append(loss.item())
            if start % 4:
                optimizer.step()
                optimizer.zero_grad()
        optimizer.zero_grad()
    if cache is not None:
        cache.close()
    return losses, smf.patch_file.patch_of(model)


def model_of(**changes: object) -> PeftModel:
    return tiny_model(layers=[2, 3], init="paper", **changes)


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(one.rows[n], other.rows[n]) and torch.equal(one.new[n], other.new[n]) for n in one.rows)


def test_losses_and_patch_are_the_same_bit_for_bit_and_later_epochs_skip_the_frozen_layers(tmp_path: Path):
    texts = sequences(*[LENGTH] * SEQUENCES)
    losses, patch = trained(model_of(), texts, None)
    model = model_of()
    runs = Runs(model)
    again, cached = trained(model, texts, EpochCache(model, texts * EPOCHS, tmp_path / "cache"))
    assert again == losses
    assert same(cached, patch)
    assert runs.count == SEQUENCES // 2  # of the first epoch


def test_sequences_of_unequal_length_differ_by_rounding_alone(tmp_path: Path):
    texts = sequences(5, 12, 9, 12, 3, 8)
    losses, patch = trained(model_of(), texts, None)
    model = model_of()
    again, cached = trained(model, texts, EpochCache(model, texts * EPOCHS, tmp_path / "cache"))
    assert again == pytest.approx(losses, rel=1e-5)
    assert all(torch.allclose(cached.new[n], patch.new[n], atol=1e-5) for n in patch.rows)


def test_what_a_killed_run_stored_is_gone_on_with_and_what_is_broken_is_not(tmp_path: Path):
    texts = sequences(*[LENGTH] * SEQUENCES)
    first = model_of()
    trained(first, texts, EpochCache(first, texts * EPOCHS, tmp_path / "cache"), epochs=range(1))
    stored = (tmp_path / "cache" / "hidden").read_bytes()
    assert len(stored) == disk_bytes(texts * EPOCHS, 32, torch.float32) == SEQUENCES * LENGTH * 32 * 4
    again = model_of()
    runs = Runs(again)
    trained(again, texts, EpochCache(again, texts * EPOCHS, tmp_path / "cache"))
    assert runs.count == 0
    (tmp_path / "cache" / "hidden").write_bytes(b"\1" * 100 + stored[100:])
    broken = model_of()
    runs = Runs(broken)
    losses, _ = trained(broken, texts, EpochCache(broken, texts * EPOCHS, tmp_path / "cache"))
    assert runs.count == 1  # the pass that reads the first sequence
    assert losses == trained(model_of(), texts, None)[0]
    for about in ("{", "[]", '"x"', "\x00"):  # begun anew, as it does not say of what it is
        (tmp_path / "cache" / "about.json").write_text(about)
        EpochCache(model_of(), texts * EPOCHS, tmp_path / "cache").close()
        assert not any((tmp_path / "cache" / "hidden").read_bytes())
    other = sequences(*[LENGTH] * (SEQUENCES + 1))
    fresh = model_of()
    cache = EpochCache(fresh, other * 2, tmp_path / "cache")  # of another training: begun anew
    runs = Runs(fresh)
    trained(fresh, other, cache, epochs=range(1))
    assert runs.count == (SEQUENCES + 2) // 2


def test_other_calls_are_computed_as_ever(tmp_path: Path):
    texts = sequences(*[LENGTH] * SEQUENCES)
    model = model_of()
    cache = EpochCache(model, texts * EPOCHS, tmp_path / "cache")
    runs = Runs(model)
    kept = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf")
    model.train()
    batch = padded(texts[:2])
    model(**batch)
    left = {name: value.flip(1) for name, value in padded(sequences(5, 9)).items()}
    for inputs in (batch | {"position_ids": torch.arange(LENGTH).repeat(2, 1) + 1}, left, padded(sequences(4))):
        before = runs.count
        model(**inputs)
        assert runs.count == before + 1
    before = runs.count
    model.eval()
    model(**batch)
    with torch.no_grad():
        model.train()(**batch)
    assert runs.count == before + 2
    model(**batch)
    assert runs.count == before + 2
    cache.close()
    model(**batch)
    assert runs.count == before + 3
    assert kept.steps == 0


def test_what_cannot_be_kept_is_named():
    texts = sequences(4, 5) * 2
    assert why_not(model_of(), texts) is None
    assert "twice" in why_not(model_of(), sequences(4, 5))
    assert "first decoder layer" in why_not(tiny_model(layers=[0, 2]), texts)
    embeddings = model_of()
    embeddings.get_base_model().model.embed_tokens.weight.requires_grad_()
    assert "embeddings" in why_not(embeddings, texts)
    assert "dropout" in why_not(model_of(base={"attention_dropout": 0.1}), texts)
    hybrid = model_of()
    hybrid.config.layer_types = ["linear_attention", *["full_attention"] * 3]
    assert "linear_attention" in why_not(hybrid, texts)
    assert "no decoder layer" in why_not(tiny_base().requires_grad_(False), texts)


def test_too_little_room_is_refused_before_anything_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2000, 1000, 1000))
    with pytest.raises(StorageError, match="epoch_cache"):
        EpochCache(model_of(), sequences(LENGTH) * 2, tmp_path / "cache")


# -- in a recipe ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    recipe = load_recipe(make_world(tmp_path), ["train.epoch_cache=true", "train.examples=8", "memory.layers=[2,3]"])
    return replace(recipe, train=replace(recipe.train, steps=6))  # of 8 examples: six epochs


def without(recipe: Recipe) -> Recipe:
    return replace(recipe, train=replace(recipe.train, epoch_cache=False))


def test_a_recipe_trains_the_same_with_it(recipe: Recipe, capsys: pytest.CaptureFixture):
    assert recipe.run_id("smf") != without(recipe).run_id("smf")
    plain, cached = run_method(without(recipe), "smf"), run_method(recipe, "smf")
    patches = [smf.load_patch(result_path(each, "smf").parent / "patch.smf") for each in (without(recipe), recipe)]
    assert all(torch.allclose(patches[0].new[n], patches[1].new[n], atol=1e-4) for n in patches[0].rows)
    loss = plain["scores"]["exam"]["metrics"]["loss"]
    assert cached["scores"]["exam"]["metrics"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert not (result_path(recipe, "smf").parent / HIDDEN).exists()
    run_method(recipe, "full")
    assert "full: trains without epoch_cache: the first decoder layer trains" in capsys.readouterr().err


def test_a_killed_run_goes_on_as_if_nothing_had_happened(recipe: Recipe, monkeypatch: pytest.MonkeyPatch):
    import smf.loop as loop

    run_method(recipe, "smf")
    whole = result_path(recipe, "smf").parent
    other = replace(recipe, output=recipe.output + "-killed")

    class Killed(loop.RunTrainer):
        def _save_checkpoint(self, *args: Any) -> None:
            super()._save_checkpoint(*args)
            if self.state.global_step == 4:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "RunTrainer", Killed)
        with pytest.raises(KeyboardInterrupt):
            run_method(other, "smf")
    folder = result_path(other, "smf").parent
    assert (folder / HIDDEN / "hidden").is_file()
    run_method(other, "smf")
    one, two = (smf.load_patch(each / "patch.smf") for each in (whole, folder))
    assert same(one, two)
    losses = [[json.loads(line)["loss"] for line in (f / "metrics.jsonl").open()] for f in (whole, folder)]
    assert losses[0] == losses[1]


def test_a_dry_run_says_how_much_disk_it_takes_and_refuses_too_much(recipe: Recipe, monkeypatch: pytest.MonkeyPatch):
    plan = dry_run(recipe)
    assert "GiB of disk" in plan.base["epoch cache"] and plan.problems == []
    assert "epoch cache" not in dry_run(without(recipe)).base
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2000, 1000, 1000))
    (problem,) = dry_run(recipe).problems
    assert "epoch_cache = true takes up to" in problem
