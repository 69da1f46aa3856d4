"""The memory as a PEFT method: every loader and switch of PEFT and transformers, without touching the base."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

import smf
from conftest import batch, logits, tiny_base, tiny_config, tiny_model, train
from smf.adapter import SparseMemoryLayer
from smf.config import TRAINED
from smf.decoder import default_layers

FRESH = {"additive": {"mode": "additive", "init": "paper"}, "replacement": {"mode": "replacement", "init": "paper"}}


def tables(model: nn.Module, adapter: str | None = None) -> dict[int, Tensor]:
    return {layer: memory.values.detach().clone() for layer, memory in smf.memory_layers(model, adapter).items()}


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def trainable_kinds(model: nn.Module, adapter: str) -> set[str]:
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(".sparse_memory_" in n for n in names)
    return {n.split("sparse_memory_")[1].split(".")[0] for n in names if n.endswith(f".{adapter}")}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path, Tensor, Tensor]:
    """A base and a trained adapter on disk, with the logits of both: `(base_dir, adapter_dir, base, trained)`."""
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    tiny_base().save_pretrained(base_dir)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), tiny_config())
    before = logits(model)
    train(model)
    model.save_pretrained(adapter_dir)
    after = logits(model)
    assert not torch.equal(before, after)
    return base_dir, adapter_dir, before, after


# -- attaching --------------------------------------------------------------------------------------------------------


def test_attaching_a_zero_memory_changes_no_logit():
    base = tiny_base()
    before = logits(base)
    model = get_peft_model(base, tiny_config())
    assert torch.equal(logits(model), before)
    assert all(memory.values.abs().sum() == 0 for memory in smf.memory_layers(model).values())


@pytest.mark.parametrize("mode", FRESH)
def test_a_paper_memory_changes_logits_and_its_start_has_the_papers_variances(mode: str):
    base = tiny_base()
    before = logits(base)
    model = get_peft_model(base, tiny_config(**FRESH[mode], n_keys=32))
    assert not torch.equal(logits(model), before)
    memory = smf.memory_layers(model)[1]
    assert memory.values.var().item() == pytest.approx(1 / 32, rel=0.03)
    assert memory.tensor("keys").var().item() == pytest.approx(1 / (3 * 16), rel=0.1)
    assert memory.tensor("gate").var().item() == pytest.approx(1 / 32, rel=0.1)
    assert ("scale" in memory.kinds) == (mode == "additive")
    if mode == "additive":
        assert memory.tensor("scale").item() == pytest.approx(0.01)


def test_a_replacement_never_runs_the_mlp():
    model = tiny_model(**FRESH["replacement"])
    layers = [m for m in model.modules() if isinstance(m, SparseMemoryLayer)]

    def refuse(*args: object) -> None:
        raise AssertionError("the replaced MLP ran")

    for layer in layers:
        layer.base_layer.register_forward_pre_hook(refuse)
    logits(model)
    with pytest.raises(AssertionError, match="replaced MLP"), model.disable_adapter():
        logits(model)


def test_an_additive_memory_adds_scale_times_its_output():
    model = tiny_model(init="paper")
    layer = next(m for m in model.modules() if isinstance(m, SparseMemoryLayer))
    x = torch.randn(2, 3, 32)
    memory = layer.memories["default"]
    x_TD = x.view(6, 32)
    idx_TR, w_TR = memory.search(x_TD)
    o_TD = (memory.values[idx_TR.long()] * w_TR.unsqueeze(-1)).sum(1)
    gated_TD = o_TD * nn.functional.silu(x_TD @ memory.tensor("gate").T)
    y = (memory.tensor("scale") * (gated_TD @ memory.tensor("out").T)).view(2, 3, 32)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + y, atol=1e-6, rtol=1e-5)


def test_the_same_seed_gives_the_same_start_and_another_seed_another():
    def start(seed: int) -> dict[str, Tensor]:
        model = get_peft_model(tiny_base(), tiny_config(init="paper", seed=seed))
        return {n: p.detach() for n, p in model.named_parameters() if "sparse_memory" in n and "values" in n}

    torch.manual_seed(123)  # the global generator plays no part
    first = start(0)
    torch.manual_seed(5)
    assert same_tensors(start(0), first)
    other = start(1)
    assert not any(torch.equal(other[name], first[name]) for name in first)
    one, two = first.values()
    assert not torch.equal(one, two)  # nor are two layers alike


@pytest.mark.parametrize(
    ("depth", "layers"), [(24, [6, 12, 18]), (6, [2, 3, 4]), (4, [1, 2, 3]), (3, [1, 2]), (2, [1]), (1, [0])]
)
def test_default_layers_lie_between_one_and_three_quarters(depth: int, layers: list[int]):
    assert default_layers(depth) == layers


def test_default_layers_are_printed_and_kept_in_the_adapters_config(capsys: pytest.CaptureFixture):
    model = get_peft_model(tiny_base(num_hidden_layers=6), tiny_config(layers=None))
    assert "[2, 3, 4] of 6" in capsys.readouterr().out
    assert list(smf.memory_layers(model)) == [2, 3, 4]
    assert model.peft_config["default"].layers == [2, 3, 4]


def test_one_config_object_serves_two_bases_and_stays_as_the_user_wrote_it():
    config = tiny_config(layers=None)
    small = get_peft_model(tiny_base(num_hidden_layers=2), config)
    large = get_peft_model(tiny_base(seed=3, num_hidden_layers=6), config)
    assert list(smf.memory_layers(small)) == [1]
    assert list(smf.memory_layers(large)) == [2, 3, 4]
    assert config.layers is None
    assert config.target_modules is None
    assert config.base_hash is None
    smf.set_train(small, "memory")
    assert config.train == "rows"
    assert large.peft_config["default"].train == "rows"


# -- saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_trainable": True},
        {"adapter_name": "medicine"},
        {"low_cpu_mem_usage": True},
        {"low_cpu_mem_usage": True, "is_trainable": True, "adapter_name": "medicine"},
    ],
    ids=str,
)
def test_from_pretrained_gives_the_trained_model(saved: tuple, options: dict):
    base_dir, adapter_dir, before, after = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), adapter_dir, **options)
    assert torch.equal(logits(model), after)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    name = options.get("adapter_name", "default")
    assert model.active_adapter == name
    if options.get("is_trainable"):
        assert trainable_kinds(model, name) == {"anchor"}
        train(model)
        assert not torch.equal(logits(model), after)


def test_a_loaded_adapter_is_frozen_unless_it_is_to_train(saved: tuple):
    base_dir, adapter_dir, *_ = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), adapter_dir)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(smf.ConfigError, match="is_trainable=True"):
        smf.SparseMemoryOptimizer(model, lr=0.1, rule="tf")
    model.train()
    model(**batch())  # reads nothing into a training
    assert all(not memory._pending for memory in smf.memory_layers(model).values())


def test_auto_classes_load_base_and_adapter_from_the_adapters_folder(saved: tuple):
    _, adapter_dir, before, after = saved
    model = AutoPeftModelForCausalLM.from_pretrained(adapter_dir)
    assert torch.equal(logits(model), after)
    config = PeftConfig.from_pretrained(adapter_dir)
    assert isinstance(config, smf.SparseMemoryConfig)
    assert (config.layers, config.n_keys, config.knn) == ([1, 2], 16, 4)
    native = AutoModelForCausalLM.from_pretrained(adapter_dir)
    assert isinstance(native, Qwen2ForCausalLM)
    assert torch.equal(logits(native), after)
    native.disable_adapters()
    assert torch.equal(logits(native), before)
    native.enable_adapters()
    assert torch.equal(logits(native), after)


def test_transformers_load_adapter_finds_every_tensor(saved: tuple):
    base_dir, adapter_dir, _, after = saved
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    info = model.load_adapter(str(adapter_dir))
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert torch.equal(logits(model), after)
    other = AutoModelForCausalLM.from_pretrained(base_dir)
    other.load_adapter(str(adapter_dir), adapter_name="medicine")
    assert torch.equal(logits(other), after)


def test_an_adapter_natively_added_trains_saves_and_loads(tmp_path: Path):
    base = tiny_base()
    before = logits(base)
    base.add_adapter(tiny_config())
    assert torch.equal(logits(base), before)
    train(base)
    after = logits(base)
    assert not torch.equal(after, before)
    base.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_base(), tmp_path)
    assert torch.equal(logits(model), after)
    base.delete_adapter("default")
    assert torch.equal(logits(base), before)


def test_an_injected_adapter_takes_a_state_dict(tmp_path: Path):
    trained = tiny_model()
    train(trained)
    trained.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    base = inject_adapter_in_model(tiny_config(), tiny_base())
    result = set_peft_model_state_dict(base, load_file(tmp_path / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    assert torch.equal(logits(base), logits(trained))


def test_the_saved_file_holds_every_memory_tensor_and_nothing_of_the_base(tmp_path: Path):
    from safetensors.torch import load_file

    model = tiny_model()
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    kinds = ("values", "keys", "query_weight", "query_bias", "gate", "out", "scale", "anchor")
    expected = {f"base_model.model.model.layers.{i}.mlp.sparse_memory_{kind}" for i in (1, 2) for kind in kinds}
    assert keys == expected


@pytest.mark.parametrize("mode", FRESH)
def test_a_healed_paper_memory_survives_saving(mode: str, tmp_path: Path):
    model = tiny_model(**FRESH[mode], train="memory")
    train(model, rule="all")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    assert "keys" in trainable_kinds(loaded, "default")


def test_an_adapter_of_another_base_is_refused_by_every_loader(saved: tuple):
    _, adapter_dir, *_ = saved
    other = tiny_base(seed=1)
    before = logits(other)
    state = set(other.state_dict())
    with pytest.raises(smf.UnsupportedModelError, match="another base"):
        PeftModel.from_pretrained(other, adapter_dir)
    with pytest.raises(smf.UnsupportedModelError, match="another base"):
        other.load_adapter(str(adapter_dir))
    assert set(other.state_dict()) == state
    assert torch.equal(logits(other), before)


# -- switching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", FRESH)
def test_a_disabled_adapter_gives_the_base_bit_for_bit(mode: str):
    before = logits(tiny_base())
    model = tiny_model(**FRESH[mode])
    train(model)
    trained = logits(model)
    assert not torch.equal(trained, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), trained)


def test_two_adapters_switch_add_up_and_are_deleted():
    model = tiny_model()
    base = logits(tiny_base())
    train(model)
    first = logits(model)
    model.add_adapter("second", tiny_config(layers=[0, 2], seed=1))
    assert torch.equal(logits(model), first)  # adding does not activate
    model.set_adapter("second")
    assert torch.equal(logits(model), base)
    assert list(smf.memory_layers(model)) == [0, 2]
    assert list(smf.memory_layers(model, "default")) == [1, 2]
    frozen = tables(model, "default")
    train(model)
    assert same_tensors(tables(model, "default"), frozen)
    second = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.equal(both, first)
    assert not torch.equal(both, second)
    with pytest.raises(smf.ConfigError, match="adapter=\\.\\.\\."):
        smf.memory_layers(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any("second" in name for name in model.state_dict())
    with pytest.raises(smf.ConfigError, match="second"):
        smf.memory_layers(model, "second")


def test_an_additive_memory_adds_to_a_replacement():
    model = tiny_model()
    train(model)
    model.add_adapter("instead", tiny_config(**FRESH["replacement"]))
    model.set_adapter("instead")
    replaced = logits(model)
    model.base_model.set_adapter(["default", "instead"])
    layer = next(m for m in model.modules() if isinstance(m, SparseMemoryLayer))
    x = torch.randn(1, 3, 32)
    parts = [layer.memories[name].forward(x, None, training=False) for name in ("default", "instead")]
    torch.testing.assert_close(layer(x), parts[0] + parts[1])
    assert not torch.equal(logits(model), replaced)


def test_a_refused_second_adapter_leaves_the_first_alone():
    model = tiny_model()
    train(model)
    before, state = logits(model), set(model.state_dict())
    with pytest.raises(smf.UnsupportedModelError, match="99"):
        model.add_adapter("second", tiny_config(layers=[0, 99]))
    assert set(model.state_dict()) == state
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)


def test_a_natively_refused_adapter_leaves_a_model_that_works(tmp_path: Path):
    base = tiny_base()
    with pytest.raises(smf.UnsupportedModelError, match="99"):
        base.add_adapter(tiny_config(layers=[99]))
    base.save_pretrained(tmp_path)  # would look for adapters if it thought it had some
    base.add_adapter(tiny_config())
    assert torch.equal(logits(base), logits(tiny_base()))
    train(base)


def test_a_second_memory_needs_add_adapter_and_a_name_of_its_own():
    model = tiny_model()
    state = set(model.state_dict())
    with pytest.raises(smf.UnsupportedModelError, match="add_adapter"):
        get_peft_model(model, tiny_config(layers=[0, 3]))
    with pytest.raises(smf.ConfigError, match="choose another name"):
        inject_adapter_in_model(tiny_config(layers=[0, 3]), model.base_model.model)
    assert set(model.state_dict()) == state
    assert list(smf.memory_layers(model)) == [1, 2]


def test_only_what_the_train_mode_names_requires_gradients():
    model = tiny_model()
    for mode, kinds in TRAINED.items():
        smf.set_train(model, mode)
        assert trainable_kinds(model, "default") == set(kinds)
        model.set_adapter("default")
        assert trainable_kinds(model, "default") == set(kinds)
        with model.disable_adapter():
            assert trainable_kinds(model, "default") == set()
        assert trainable_kinds(model, "default") == set(kinds)
    model.add_adapter("second", tiny_config(train="rows+scale"))
    model.set_adapter("second")
    assert trainable_kinds(model, "default") == set()
    assert trainable_kinds(model, "second") == {"anchor", "scale"}
    model.set_adapter("second", inference_mode=True)
    assert trainable_kinds(model, "second") == set()
    assert not any(memory.values.requires_grad for memory in smf.memory_layers(model).values())


def test_set_train_refuses_what_does_not_exist_and_changes_nothing():
    model = tiny_model(**FRESH["replacement"])
    with pytest.raises(smf.ConfigError, match=r"rows.*rows\+scale.*memory"):
        smf.set_train(model, "everything")
    with pytest.raises(smf.ConfigError, match="replacement has no scale"):
        smf.set_train(model, "rows+scale")
    with pytest.raises(smf.ConfigError, match="medicine"):
        smf.set_train(model, "memory", adapter="medicine")
    with pytest.raises(smf.ConfigError, match="no memory layer"):
        smf.set_train(tiny_base(), "memory")
    assert trainable_kinds(model, "default") == {"anchor"}


# -- back to the base -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", FRESH)
def test_unload_gives_the_exact_base(mode: str):
    untouched = tiny_base()
    model = tiny_model(**FRESH[mode])
    train(model)
    base = model.unload()
    assert type(base) is Qwen2ForCausalLM
    assert same_tensors(base.state_dict(), untouched.state_dict())
    assert [(n, type(m)) for n, m in base.named_modules()] == [(n, type(m)) for n, m in untouched.named_modules()]
    assert hooks(base) == hooks(untouched) == 0
    assert torch.equal(logits(base), logits(untouched))


def test_a_memory_can_be_attached_again_after_unload():
    model = tiny_model()
    train(model)
    again = get_peft_model(model.unload(), tiny_config(layers=[0, 3]))
    assert list(smf.memory_layers(again)) == [0, 3]
    assert torch.equal(logits(again), logits(tiny_base()))
    train(again)
    assert hooks(again) == hooks(tiny_model()) > 0


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_and_leaves_the_model_as_it_was(merge: str):
    model = tiny_model()
    train(model)
    before, state = logits(model), copy.deepcopy(model.state_dict())
    with pytest.raises(NotImplementedError, match=r"unload\(\)"):
        getattr(model, merge)()
    assert same_tensors(model.state_dict(), state)
    assert torch.equal(logits(model), before)


# -- what it prints ---------------------------------------------------------------------------------------------------


def test_the_summary_tells_table_size_and_rows_a_step(capsys: pytest.CaptureFixture):
    model = tiny_model(train="rows+scale")
    capsys.readouterr()
    table = 2 * 256 * 32
    assert model.get_nb_trainable_parameters() == (table + 2, sum(p.numel() for p in model.parameters()))
    model.print_trainable_parameters()
    out = capsys.readouterr().out
    assert f"trainable params: {table + 2:,}" in out
    assert f"2 layers x 256 x 32 = {table:,} numbers" in out
    assert "until an optimizer is made" in out
    assert "other trainable params: 2" in out
    optimizer = smf.SparseMemoryOptimizer(model, lr=0.1, rule="tf", rows_per_step=17)
    model.print_trainable_parameters()
    assert "rows a step and layer: 17" in capsys.readouterr().out
    del optimizer
    everything = smf.SparseMemoryOptimizer(model, lr=0.1, rule="all")
    model.print_trainable_parameters()
    assert "rows a step and layer: 256" in capsys.readouterr().out
    assert everything.rows_per_step == 256


def test_the_summary_of_a_frozen_adapter_says_that_nothing_trains(saved: tuple, capsys: pytest.CaptureFixture):
    base_dir, adapter_dir, *_ = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), adapter_dir)
    capsys.readouterr()
    model.print_trainable_parameters()
    assert "trainable params: 0 " in capsys.readouterr().out


def test_other_methods_still_print_pefts_line_only(capsys: pytest.CaptureFixture):
    model = get_peft_model(tiny_base(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    out = capsys.readouterr().out
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert out.count("\n") == 1
    assert f"trainable params: {count:,}" in out
    assert "table" not in out


# -- using it ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", FRESH)
def test_generating_with_and_without_cache_agrees(mode: str):
    model = tiny_model(**FRESH[mode])
    train(model, steps=3, lr=0.5)
    ids = batch(2, 5)["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    with_cache = model.generate(input_ids=ids, use_cache=True, **options)
    assert with_cache.shape == (2, 17)
    assert torch.equal(with_cache, model.generate(input_ids=ids, use_cache=False, **options))


def test_a_deep_copy_is_independent_and_has_no_optimizer():
    model = tiny_model()
    optimizer = train(model)
    twin = copy.deepcopy(model)
    before = logits(twin)
    assert torch.equal(before, logits(model))
    memories = smf.memory_layers(twin)
    assert not any(memory.attached for memory in memories.values())
    assert all(memory.attached for memory in smf.memory_layers(model).values())
    twin.train()
    with pytest.raises(smf.TrainingError, match="no SparseMemoryOptimizer"):
        twin(**batch()).loss.backward()
    mine = tables(model)
    train(twin, seed=9)
    assert same_tensors(tables(model), mine)
    assert not torch.equal(logits(twin), before)
    model.train()
    model(**batch()).loss.backward()
    optimizer.step()
    twin.unload()
    assert hooks(twin) == 0
    assert hooks(model) == hooks(tiny_model()) > 0


def test_a_copys_mask_is_its_own():
    model = tiny_model()
    twin = copy.deepcopy(model)
    optimizers = [smf.SparseMemoryOptimizer(m, lr=0.1, rule="tf") for m in (model, twin)]
    padded = batch(2, 8)
    padded["attention_mask"][:, 5:] = 0
    for m, inputs in ((model, batch(2, 8)), (twin, padded)):
        m.train()
        m(**inputs).loss.backward()
    for optimizer, tokens in zip(optimizers, (16, 10), strict=True):
        optimizer.step()
        assert set(optimizer.last_step.reads.values()) == {tokens * 2 * 4}


def test_a_model_can_be_pickled():
    model = tiny_model()
    train(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), logits(model))
    assert not any(memory.attached for memory in smf.memory_layers(twin).values())
    train(twin)
    assert not torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("mode", FRESH)
def test_a_bfloat16_base_keeps_a_float32_memory(mode: str):
    base = tiny_base().to(torch.bfloat16)
    model = get_peft_model(base, tiny_config(**FRESH[mode]))
    memory = [p for n, p in model.named_parameters() if "sparse_memory" in n]
    assert {p.dtype for p in memory} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    before = tables(model)
    optimizer = train(model)
    after = tables(model)
    for layer, rows in optimizer.last_step.rows.items():
        assert (after[layer][rows] != before[layer][rows]).any(-1).all()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_base().to(torch.bfloat16)))


def test_a_zero_memory_leaves_a_bfloat16_base_bit_identical():
    base = tiny_base().to(torch.bfloat16)
    before = logits(base)
    assert torch.equal(logits(get_peft_model(base, tiny_config())), before)


def test_a_bfloat16_adapter_is_loaded_with_its_dtypes(tmp_path: Path):
    model = get_peft_model(tiny_base().to(torch.bfloat16), tiny_config(table_dtype="bfloat16"))
    train(model, lr=0.1)
    memory = smf.memory_layers(model)[1]
    assert memory.values.dtype == torch.bfloat16
    assert memory.tensor("gate").dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base().to(torch.bfloat16), tmp_path)
    assert smf.memory_layers(loaded)[1].values.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_every_loader_gives_a_bfloat16_base_its_float32_memory(tmp_path: Path):
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    half = {"dtype": torch.bfloat16}
    tiny_base().save_pretrained(base_dir)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir, **half), tiny_config(init="paper"))
    train(model)
    model.save_pretrained(adapter_dir)
    native = AutoModelForCausalLM.from_pretrained(base_dir, **half)
    native.load_adapter(str(adapter_dir))
    loaded = [
        native,
        AutoModelForCausalLM.from_pretrained(adapter_dir, **half),
        AutoPeftModelForCausalLM.from_pretrained(adapter_dir, **half),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir, **half), adapter_dir),
    ]
    for other in loaded:
        assert {p.dtype for n, p in other.named_parameters() if "sparse_memory" in n} == {torch.float32}
        assert torch.equal(logits(other), logits(model))


def test_training_under_bfloat16_autocast_works_and_searches_in_float32():
    model = tiny_model()
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", rows_per_step=8)
    before = tables(model)
    model.train()
    dtypes = []
    memory = smf.memory_layers(model)[1]
    search = memory.search

    def spy(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        idx_TR, w_TR = search(x_TD)
        dtypes.append((x_TD.dtype, w_TR.dtype))
        return idx_TR, w_TR

    memory.search = spy
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    optimizer.step()
    assert dtypes == [(torch.float32, torch.float32)]
    assert loss.isfinite()
    after = tables(model)
    assert all((after[layer] != before[layer]).any(-1).sum() == 8 for layer in after)
