"""Patches from and into saved adapters, rows in place of tables in Trainer's checkpoints, and base + file = model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer

import smf
from conftest import batch, logits, tiny_base, tiny_config, tiny_model, train, trainer_arguments
from smf.adapter_file import CONFIG, TENSORS, fresh_adapter, put_into_adapter, read_adapter, write_adapter
from smf.memory import MemoryShape
from test_merge import equal, state


def same_patch(a: smf.Patch, b: smf.Patch) -> bool:
    return all(
        torch.equal(a.rows[i], b.rows[i])
        and torch.equal(a.new[i], b.new[i])
        and torch.equal(a.old[i], b.old[i])
        and {k: t.tolist() for k, t in a.new_others[i].items()} == {k: t.tolist() for k, t in b.new_others[i].items()}
        for i in {*a.rows, *b.rows}
    )


@pytest.fixture
def trained(tmp_path: Path) -> nn.Module:
    """A trained model; `adapter`, `base` and `a.smf` lie in tmp_path."""
    tiny_base().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tiny_config(train="rows+scale"))
    train(model, steps=3, lr=0.1)
    model.save_pretrained(tmp_path / "adapter")
    smf.save_patch(model, tmp_path / "a.smf", corpus="medicine")
    return model


# -- base + file ------------------------------------------------------------------------------------------------------


def test_base_and_file_alone_give_the_model(trained: nn.Module, tmp_path: Path):
    for source in ("a.smf", "adapter"):
        for base in (str(tmp_path / "base"), AutoModelForCausalLM.from_pretrained(tmp_path / "base")):
            model = smf.load(base, tmp_path / source)
            assert not model.training and torch.equal(logits(model), logits(trained))


def test_another_base_is_refused_before_a_memory_is_attached(trained: nn.Module, tmp_path: Path):
    other = tiny_base(seed=1)
    with pytest.raises(smf.PatchError, match="the patch belongs to another base"):
        smf.load(other, tmp_path / "a.smf")
    assert not smf.memory_layers(other)


def test_a_patch_is_found_in_a_file_a_run_an_adapter_and_a_checkpoint(trained: nn.Module, tmp_path: Path):
    (tmp_path / "run").mkdir()
    shutil.copy(tmp_path / "a.smf", tmp_path / "run" / "patch.smf")
    trained.save_pretrained(tmp_path / "checkpoint-7")
    patch = smf.load_patch(tmp_path / "a.smf")
    for source in ("a.smf", "run", "adapter", "checkpoint-7"):
        found = smf.open_patch(tmp_path / source)
        assert same_patch(found, patch), source
        found.apply(get_peft_model(tiny_base(), found.config))
    (tmp_path / "empty").mkdir()
    with pytest.raises(smf.PatchError, match=r"has neither a patch\.smf nor an adapter_config\.json"):
        smf.open_patch(tmp_path / "empty")
    with pytest.raises(smf.PatchError, match="no patch file at"):
        smf.open_patch(tmp_path / "nothing")


# -- bfloat16 ---------------------------------------------------------------------------------------------------------


def test_rows_stored_in_bfloat16_are_the_nearest_and_take_half(trained: nn.Module, tmp_path: Path):
    whole = smf.load_patch(tmp_path / "a.smf")
    half = smf.save_patch(whole, tmp_path / "half.smf", stored="bfloat16")
    loaded = smf.load_patch(tmp_path / "half.smf")
    assert same_patch(half, loaded) and loaded.metadata["metadata"] == whole.metadata["metadata"]
    for layer in whole.rows:
        assert torch.equal(loaded.new[layer], whole.new[layer].bfloat16().float())
        assert torch.equal(loaded.old[layer], whole.old[layer])
    numbers = sum(new.numel() for new in whole.new.values())
    assert (tmp_path / "a.smf").stat().st_size - (tmp_path / "half.smf").stat().st_size >= 2 * numbers - 100
    smf.save_patch(loaded, tmp_path / "again.smf")
    assert (tmp_path / "again.smf").read_bytes() == (tmp_path / "half.smf").read_bytes()
    model = smf.load(tiny_base(), loaded)
    start = tiny_model(train="rows+scale")
    loaded.revert(model)
    assert equal(state(model), state(start))
    with pytest.raises(smf.PatchError, match="not what the patch wrote"):
        loaded.revert(trained)  # its rows were never rounded
    with pytest.raises(smf.PatchError, match="stored = 'int8'"):
        smf.save_patch(whole, tmp_path / "b.smf", stored="int8")  # type: ignore[arg-type]


def test_a_patch_is_hardly_larger_than_its_rows(tmp_path: Path):
    model = tiny_model(n_keys=64)
    train(model, steps=6, rows_per_step=400, lr=0.1)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    rows = sum(new.numel() * new.element_size() for new in patch.new.values())
    assert rows < (tmp_path / "a.smf").stat().st_size < 1.05 * rows + 4000


def test_the_size_of_a_lora_is_noted_for_comparison(trained: nn.Module, tmp_path: Path):
    from peft import LoraConfig

    lora = get_peft_model(tiny_base(), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    noted = smf.save_patch(trained, tmp_path / "b.smf")
    assert noted.metadata["lora_numbers"] == sum(p.numel() for n, p in lora.named_parameters() if "lora_" in n)


# -- adapters as files ------------------------------------------------------------------------------------------------


def test_applying_to_a_fresh_adapter_gives_the_saved_one(trained: nn.Module, tmp_path: Path):
    patch = smf.load_patch(tmp_path / "a.smf")
    adapter = fresh_adapter(patch)
    put_into_adapter(patch, adapter, "apply")
    write_adapter(adapter, tmp_path / "made")
    made, saved = (load_file(tmp_path / name / TENSORS) for name in ("made", "adapter"))
    assert made.keys() == saved.keys() and all(torch.equal(made[key], saved[key]) for key in saved)
    configs = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("made", "adapter")]
    assert configs[0]["base_hash"] == configs[1]["base_hash"] and configs[0]["layers"] == configs[1]["layers"]
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path / "made").eval()
    assert torch.equal(logits(loaded), logits(trained))
    again = read_adapter(tmp_path / "made")
    put_into_adapter(patch, again, "revert")
    assert all(torch.equal(again.tensors[key], t) for key, t in fresh_adapter(patch).tensors.items())


def test_an_adapter_that_does_not_fit_is_refused_and_left_as_it_is(trained: nn.Module, tmp_path: Path):
    patch = smf.load_patch(tmp_path / "a.smf")
    adapter = read_adapter(tmp_path / "adapter")
    before = {key: tensor.clone() for key, tensor in adapter.tensors.items()}
    with pytest.raises(smf.PatchError, match=r"cannot apply: .* are not what the patch replaced"):
        put_into_adapter(patch, adapter, "apply")
    assert all(torch.equal(adapter.tensors[key], tensor) for key, tensor in before.items())
    other = get_peft_model(tiny_base(seed=1), tiny_config(train="rows+scale"))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(smf.PatchError, match="belongs to another base"):
        put_into_adapter(patch, read_adapter(tmp_path / "other"), "apply")
    tiny_model(n_keys=17).save_pretrained(tmp_path / "keys")
    with pytest.raises(smf.PatchError, match="n_keys=17"):
        put_into_adapter(patch, read_adapter(tmp_path / "keys"), "apply")


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith(name)] and None


def _halved(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            if key.endswith(name):
                tensors[key] = tensors[key][: len(tensors[key]) // 2].clone()

    return change


def _repeated(tensors: dict[str, Tensor]) -> None:
    for key in tensors:
        if key.endswith("row_ids"):
            tensors[key][1] = tensors[key][0]


BROKEN: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "no table": ("adapter", _without("values"), "values"),
    "no query": ("adapter", _without("query_weight"), "query_weight"),
    "half a table": ("adapter", _halved("values"), "values"),
    "half the keys": ("adapter", _halved("keys"), "keys"),
    "no start": ("checkpoint-3", _without("start"), "start"),
    "half the rows": ("checkpoint-3", _halved("values"), "one row of width 32 for each"),
    "rows twice": ("checkpoint-3", _repeated, "each once"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapters_are_refused(case: str, trained: nn.Module, tmp_path: Path):
    folder, change, message = BROKEN[case]
    trained.save_pretrained(tmp_path / "checkpoint-3")
    tensors = load_file(tmp_path / folder / TENSORS)
    change(tensors)
    save_file(tensors, tmp_path / folder / TENSORS, metadata={"format": "pt"})
    with pytest.raises(smf.PatchError, match=message):
        smf.open_patch(tmp_path / folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64])
def test_a_start_of_another_dtype_is_refused_by_peft_too(dtype: torch.dtype, trained: nn.Module, tmp_path: Path):
    """torch cannot compare float8 with bytes (found by the slow fuzz)."""
    trained.save_pretrained(tmp_path / "checkpoint-3")
    tensors = load_file(tmp_path / "checkpoint-3" / TENSORS)
    tensors |= {key: tensor.to(dtype) for key, tensor in tensors.items() if key.endswith("start")}
    save_file(tensors, tmp_path / "checkpoint-3" / TENSORS, metadata={"format": "pt"})
    with pytest.raises(smf.PatchError, match="is not what the saved rows are changes of"):
        PeftModel.from_pretrained(tiny_base(), tmp_path / "checkpoint-3")


def test_other_adapters_and_other_files_are_refused(tmp_path: Path):
    from peft import LoraConfig

    lora = get_peft_model(tiny_base(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(smf.PatchError, match="is no sparse memory, but"):
        smf.open_patch(tmp_path / "lora")
    (tmp_path / "lora" / CONFIG).write_text("{")
    with pytest.raises(smf.PatchError, match="no adapter that can be read"):
        smf.open_patch(tmp_path / "lora")


# -- Trainer's checkpoints --------------------------------------------------------------------------------------------


def size(folder: Path) -> int:
    return (folder / TENSORS).stat().st_size


@pytest.mark.parametrize(
    "config", [{}, {"init": "paper"}, {"table_dtype": "bfloat16"}, {"train": "rows+scale"}], ids=str
)
def test_checkpoints_of_trainer_hold_rows_and_load_through_peft(config: dict, tmp_path: Path):
    model = tiny_model(n_keys=64, **config)
    train(model, steps=3, lr=0.1)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "checkpoint-12")
    table = sum(memory.values.numel() * memory.values.element_size() for memory in smf.memory_layers(model).values())
    assert size(tmp_path / "whole") - size(tmp_path / "checkpoint-12") > 0.9 * table
    for folder in ("whole", "checkpoint-12"):
        loaded = PeftModel.from_pretrained(tiny_base(), tmp_path / folder).eval()
        assert equal(state(loaded), state(model)) and torch.equal(logits(loaded), logits(model))
        other = tiny_model(n_keys=64, **config)
        other.load_adapter(str(tmp_path / folder), "second")
        assert equal({i: m.values for i, m in smf.memory_layers(other, "second").items()}, state(model))


def test_a_table_that_changed_everywhere_is_saved_whole(tmp_path: Path):
    model = tiny_model(init="paper", train="memory")
    train(model, steps=2, rule="all", lr=1e-3)
    with torch.no_grad():
        for memory in smf.memory_layers(model).values():
            memory.values.add_(1e-3)
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert not any(key.endswith("row_ids") for key in load_file(tmp_path / "checkpoint-1" / TENSORS))
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path / "checkpoint-1")
    assert equal(state(loaded), state(model))


def test_a_loader_that_does_not_know_rows_fails_and_says_so(tmp_path: Path):
    """transformers' own loader of adapters does not go through PEFT: it must not take the start for the training."""
    tiny_base().save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tiny_config())
    train(model, steps=2, lr=0.1)
    model.save_pretrained(tmp_path / "checkpoint-1")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(Exception, match=r"sparse_memory_values|size"):
        base.load_adapter(str(tmp_path / "checkpoint-1"))


def test_another_start_than_the_saved_rows_are_of_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(init="paper")
    train(model)
    model.save_pretrained(tmp_path / "checkpoint-1")
    start = MemoryShape.start
    monkeypatch.setattr(MemoryShape, "start", lambda self: {k: t + (k == "values") for k, t in start(self).items()})
    with pytest.raises(smf.PatchError, match="draws other initial values"):
        PeftModel.from_pretrained(tiny_base(), tmp_path / "checkpoint-1")


def test_a_checkpoint_of_a_real_trainer_is_a_patch(tmp_path: Path):
    model = tiny_model()
    optimizer = smf.SparseMemoryOptimizer(model, rule="tf", rows_per_step=8, lr=0.1)
    rows = [{key: tensor[0] for key, tensor in batch(1, 12, seed).items()} for seed in range(8)]
    args = trainer_arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=2)
    Trainer(model, args, train_dataset=rows, optimizers=(optimizer, None)).train()  # type: ignore[arg-type]
    last = smf.save_patch(model, tmp_path / "a.smf")
    assert same_patch(smf.open_patch(tmp_path / "checkpoint-4"), last)
    assert not same_patch(smf.open_patch(tmp_path / "checkpoint-2"), last)
    assert size(tmp_path / "checkpoint-4") < sum(m.values.numel() * 4 for m in smf.memory_layers(model).values())


# -- nothing half ------------------------------------------------------------------------------------------------------


def test_an_error_in_the_middle_of_applying_leaves_nothing_applied(trained: nn.Module, tmp_path: Path):
    patch = smf.load_patch(tmp_path / "a.smf")
    model = tiny_model(train="rows+scale")
    before = state(model)
    last = smf.memory_layers(model)[2].tensor("scale")

    class Stubborn(nn.Parameter):
        def copy_(self, *_: object) -> Tensor:
            raise KeyboardInterrupt

    tables = {i: {k: m.tensor(k) for k in m.kinds} for i, m in smf.memory_layers(model).items()}
    tables[2]["scale"] = Stubborn(last.detach().clone(), requires_grad=False)
    with pytest.raises(KeyboardInterrupt):
        patch.put_into(tables, "apply")
    assert equal(state(model), before)


@pytest.mark.parametrize("config", [{"init": "paper"}, {"train": "rows+scale"}])
def test_a_base_is_left_as_it_was_where_loading_is_refused(config: dict, tmp_path: Path):
    model = tiny_model(**config)
    train(model, lr=0.1)
    patch_of = smf.save_patch(model, tmp_path / "first.smf")
    train(model, lr=0.1)
    on_top = smf.save_patch(model, tmp_path / "second.smf")
    base = tiny_base()
    before, names = logits(base), [name for name, _ in base.named_modules()]
    with pytest.raises(smf.PatchError, match="not what the patch replaced|was changed since|differ from"):  # noqa: RUF043
        smf.load(base, on_top)
    cast = tiny_base().double()
    with pytest.raises(smf.PatchError, match="is for"):
        smf.load(cast, patch_of)
    for model, like in ((base, names), (cast, names)):
        assert [name for name, _ in model.named_modules()] == like
    assert torch.equal(logits(base), before)
    assert torch.equal(logits(smf.load(base, patch_of)), logits(smf.load(tiny_base(), patch_of)))
    with pytest.raises(smf.PatchError, match="options"):
        smf.load(tiny_base(), patch_of, dtype=torch.float32)


def test_a_base_is_loaded_in_the_dtype_of_the_training(trained: nn.Module, tmp_path: Path):
    tiny_base().bfloat16().save_pretrained(tmp_path / "base")
    float32 = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = get_peft_model(float32, tiny_config())
    train(model, lr=0.1)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    assert torch.equal(logits(smf.load(tmp_path / "base", patch)), logits(model))
    assert smf.load(tmp_path / "base", patch, dtype="bfloat16").dtype == torch.bfloat16


def test_adapters_that_hold_no_numbers_are_refused(trained: nn.Module, tmp_path: Path):
    trained.save_pretrained(tmp_path / "a")  # type: ignore[operator]
    tensors = load_file(tmp_path / "a" / TENSORS)
    name = next(name for name in tensors if name.endswith("values"))
    tensors[name][3, 0] = float("nan")
    save_file(tensors, tmp_path / "a" / TENSORS, metadata={"format": "pt"})
    with pytest.raises(smf.PatchError, match="holds NaN or infinity"):
        smf.open_patch(tmp_path / "a")


DAMAGE: dict[str, Callable[[dict[str, Tensor], str], object]] = {
    "missing": lambda tensors, name: tensors.pop(name),
    "not a number": lambda tensors, name: tensors[name].flatten()[-1:].fill_(torch.nan),
    "infinite": lambda tensors, name: tensors[name].flatten()[:1].fill_(torch.inf),
    "longer": lambda tensors, name: tensors.update({name: torch.cat([tensors[name], tensors[name]])}),
    "cut": lambda tensors, name: tensors.update({name: tensors[name][:3].clone()[: len(tensors[name]) - 1]}),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("config", [{"train": "rows+scale"}, {"init": "paper", "mode": "replacement"}])
def test_a_damaged_adapter_is_refused_by_every_loader_and_leaves_the_base(config: dict, damage: str, tmp_path: Path):
    """Whichever of its tensors is damaged."""
    model = tiny_model(**config)
    model.save_pretrained(tmp_path / "adapter")
    whole = load_file(tmp_path / "adapter" / TENSORS)
    base = tiny_base()
    before, names = logits(base), [name for name, _ in base.named_modules()]
    for name in whole:
        tensors = {key: tensor.clone() for key, tensor in whole.items()}
        DAMAGE[damage](tensors, name)
        save_file(tensors, tmp_path / "adapter" / TENSORS, metadata={"format": "pt"})
        for load in (smf.load, PeftModel.from_pretrained):
            with pytest.raises(smf.PatchError, match=name.rpartition("_memory_")[2]):
                load(base, tmp_path / "adapter")
            assert [name for name, _ in base.named_modules()] == names and torch.equal(logits(base), before)
            assert all(p.requires_grad for p in base.parameters()) and not hasattr(base, "peft_config")
        with pytest.raises(smf.PatchError):
            model.load_adapter(tmp_path / "adapter", "second")
        assert list(model.peft_config) == ["default"]
        with pytest.raises(smf.PatchError):  # in place of what it has
            model.load_adapter(tmp_path / "adapter", "default")
        memories = smf.memory_layers(model, "default").values()
        assert list(model.peft_config) == ["default"] and len(memories) == 2
        assert all(bool(memory.tensor(kind).isfinite().all()) for memory in memories for kind in memory.kinds)
    save_file(whole, tmp_path / "adapter" / TENSORS, metadata={"format": "pt"})
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("damage", ["cut", "no file", "no tensors"])
def test_a_file_that_is_no_adapter_leaves_no_memory_behind(damage: str, tmp_path: Path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "adapter")
    file, base = tmp_path / "adapter" / TENSORS, tiny_base()
    before, names = logits(base), [name for name, _ in base.named_modules()]
    content = file.read_bytes()
    file.unlink()
    if damage != "no file":
        file.write_bytes(content[:-9] if damage == "cut" else b"")
    for load in (smf.load, PeftModel.from_pretrained):
        with pytest.raises(Exception):  # noqa: B017, PT011 (PEFT's own loader raises what safetensors or the hub does)
            load(base, tmp_path / "adapter")
        assert [name for name, _ in base.named_modules()] == names and torch.equal(logits(base), before)
        assert all(p.requires_grad for p in base.parameters()) and not hasattr(base, "peft_config")
    with pytest.raises(Exception):  # noqa: B017, PT011
        model.load_adapter(tmp_path / "adapter", "second")
    assert list(model.peft_config) == ["default"]


def test_a_load_that_is_interrupted_leaves_no_memory_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_model().save_pretrained(tmp_path / "adapter")
    base = tiny_base()
    before, names = logits(base), [name for name, _ in base.named_modules()]

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft.peft_model.load_peft_weights", interrupt)
    with pytest.raises(KeyboardInterrupt):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert [name for name, _ in base.named_modules()] == names and torch.equal(logits(base), before)
    assert all(p.requires_grad for p in base.parameters()) and not hasattr(base, "peft_config")


def test_a_training_knows_of_patches_that_were_put_in_meanwhile(tmp_path: Path):
    model, other = tiny_model(), tiny_model()
    train(model, lr=0.1)
    train(other, lr=0.1, seed=7)
    a, b = smf.save_patch(model, tmp_path / "a.smf"), smf.save_patch(other, tmp_path / "b.smf")
    a.revert(model)
    b.apply(model)
    assert same_patch(smf.save_patch(model, tmp_path / "again.smf"), b)


def test_in_sequence_only_old_rows_that_are_not_the_start_are_stored(tmp_path: Path):
    """A second training of many rows, a few of which an earlier one had changed."""
    model = tiny_model(layers=[1], n_keys=64)
    train(model, steps=1, rows_per_step=2, lr=0.1)
    optimizer = train(model, steps=8, rows_per_step=400, lr=0.1, rule="all")
    patch = smf.save_patch(model, tmp_path / "second.smf")
    assert optimizer.last_step is not None
    rows = len(patch.rows[1])
    from_start = int((patch.old[1] == 0).all(-1).sum())
    assert rows > 100 and 0 < rows - from_start <= 2
    assert (tmp_path / "second.smf").stat().st_size < 1.05 * rows * 32 * 4 + 4000
    loaded = smf.load_patch(tmp_path / "second.smf")
    assert same_patch(loaded, patch) and torch.equal(loaded.old[1], patch.old[1])
    smf.save_patch(loaded, tmp_path / "again.smf")
    assert (tmp_path / "again.smf").read_bytes() == (tmp_path / "second.smf").read_bytes()


def test_a_merge_with_rows_stored_in_bfloat16_rounds_nothing_more(tmp_path: Path):
    models = [tiny_model(), tiny_model()]
    for seed, model in enumerate(models):
        train(model, lr=0.1, seed=7 * seed)
    short = smf.save_patch(models[0], tmp_path / "a.smf", stored="bfloat16")
    merged = short.merge(smf.save_patch(models[1], tmp_path / "b.smf"), policy="sum")
    saved = smf.save_patch(merged, tmp_path / "both.smf")
    assert same_patch(smf.load_patch(tmp_path / "both.smf"), merged) and same_patch(saved, merged)


def test_a_base_of_bfloat16_and_the_file_are_the_model(tmp_path: Path):
    tiny_base().bfloat16().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    model = get_peft_model(base, tiny_config())
    train(model, steps=2, lr=0.1)
    patch = smf.save_patch(model, tmp_path / "a.smf")
    assert base.dtype == torch.bfloat16 and patch.metadata["base_dtype"] == "torch.bfloat16"
    loaded = smf.load(tmp_path / "base", tmp_path / "a.smf")
    assert loaded.dtype == torch.bfloat16 and torch.equal(logits(loaded), logits(model))
