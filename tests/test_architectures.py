"""Every decoder-only architecture by shape alone, and what cannot be served refused before anything changes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import smf
from conftest import batch, logits, tiny_base, tiny_config, train
from smf.decoder import find_decoder
from smf.memory import memory_layers

TOKENS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MANY_HEADS = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
REPLACEMENT = {"mode": "replacement", "init": "paper"}
GPT2 = TOKENS | {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
BLOOM = TOKENS | {"hidden_size": 32, "n_layer": 4, "n_head": 4}

MODELS: dict[str, dict[str, Any]] = {
    "Qwen2": COMMON,
    "Qwen3": COMMON | {"head_dim": 8},
    "Llama": COMMON,
    "Mistral": COMMON | {"head_dim": 8},
    "Gemma2": COMMON | {"head_dim": 8, "sliding_window": 8},
    "Gemma3": COMMON | {"head_dim": 8, "sliding_window": 8},
    "Phi3": COMMON,
    "Olmo2": COMMON,
    "GPTNeoX": MANY_HEADS,
    "GPT2": GPT2,
    "Mixtral": COMMON | EXPERTS,
    "Gemma": COMMON | {"head_dim": 8},
    "Phi": COMMON,
    "StableLm": COMMON,
    "SmolLM3": COMMON,
    "Granite": COMMON,
    "Cohere": COMMON,
    "Starcoder2": COMMON,
    "GPTJ": GPT2 | {"rotary_dim": 4},
    "Bloom": BLOOM,
    "GptOss": COMMON | EXPERTS | {"head_dim": 8},
    "Qwen3Moe": COMMON | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
REPLACEABLE = [name for name in MODELS if name not in ("Bloom", "GptOss")]


def tiny(name: str, **changes: object) -> PreTrainedModel:
    """A tiny random model of an architecture; Gemma 3 is its text model."""
    short = f"{name}Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{short}Config")(**(MODELS[name] | changes))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def layout(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def check_life(base: PreTrainedModel, config: smf.SparseMemoryConfig, folder: Path) -> None:
    """Attach, two steps, save, load into a fresh copy, disable, unload."""
    untouched, fresh = copy.deepcopy(base), copy.deepcopy(base)
    before = logits(base)
    model = get_peft_model(base, config)
    assert torch.equal(logits(model), before) == (config.init == "zero")
    tables = {layer: memory.values.detach().clone() for layer, memory in smf.memory_layers(model).items()}
    assert list(tables) == [1, 2]
    optimizer = train(model, steps=2)
    for layer, memory in smf.memory_layers(model).items():
        changed = (memory.values != tables[layer]).any(-1)
        assert 8 <= changed.sum() <= 16
        assert changed[optimizer.last_step.rows[layer]].all()
        assert optimizer.last_step.reads[layer] == 4 * 16 * 2 * 4  # rows x length x heads x knn
    trained = logits(model)
    assert trained.isfinite().all()
    assert not torch.equal(trained, before)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(fresh, folder)
    assert torch.equal(logits(loaded), trained)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), before)
    plain = loaded.unload()
    assert layout(plain) == layout(untouched)
    assert same_tensors(plain.state_dict(), untouched.state_dict())
    assert torch.equal(logits(plain), before)


@pytest.mark.parametrize("name", MODELS)
def test_a_zero_memory_lives_through_attach_train_save_load_disable_unload(name: str, tmp_path: Path):
    check_life(tiny(name), tiny_config(), tmp_path)


@pytest.mark.parametrize("name", REPLACEABLE)
def test_a_replacement_does_too(name: str, tmp_path: Path):
    check_life(tiny(name), tiny_config(**REPLACEMENT), tmp_path)


@pytest.mark.parametrize("name", ["Qwen2", "GPT2", "Mixtral", "GptOss"])
def test_pads_are_told_from_tokens(name: str):
    model = get_peft_model(tiny(name), tiny_config())
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf")
    inputs = batch(2, 10)
    inputs["attention_mask"][0, 6:] = 0
    model.train()
    model(**inputs).loss.backward()
    optimizer.step()
    assert set(optimizer.last_step.reads.values()) == {16 * 2 * 4}


@pytest.mark.parametrize("name", ["Gemma2", "GPTNeoX", "GPT2", "Mixtral"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_counts_reads_once(name: str, use_reentrant: bool):
    def step(checkpointing: bool) -> smf.StepReport:
        model = get_peft_model(tiny(name), tiny_config())
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        return train(model, steps=2).last_step

    plain, checkpointed = step(False), step(True)
    assert checkpointed.reads == plain.reads
    assert all(torch.equal(checkpointed.rows[layer], plain.rows[layer]) for layer in plain.rows)
    assert checkpointed.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)


def test_a_mixture_with_as_many_experts_as_layers_is_still_found(tmp_path: Path):
    check_life(tiny("Mixtral", num_local_experts=4, num_hidden_layers=4), tiny_config(), tmp_path)


# -- an MLP under another name ----------------------------------------------------------------------------------------


def rename_mlp(base: PreTrainedModel, name: str) -> PreTrainedModel:
    """Call each layer's MLP something else; its forward keeps using it."""
    for block in base.model.layers:
        mlp = block.mlp
        del block.mlp
        block.add_module(name, mlp)
        cls = type(block)
        block.__class__ = type(cls.__name__, (cls,), {"mlp": property(lambda self: getattr(self, name))})
    return base


class Mixer(nn.Module):
    """An attention whose name and class say nothing of it, but that needs more than hidden states."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any) -> Any:
        return self.inner(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )


@pytest.mark.parametrize("name", ["feed_forward", "ffn", "block_sparse_moe"])
def test_an_mlp_of_another_name_is_found_by_shape(name: str):
    base = rename_mlp(tiny_base(), name)
    before = logits(base)
    model = get_peft_model(base, tiny_config())
    assert model.peft_config["default"].target_modules == [f"model.layers.{i}.{name}" for i in (1, 2)]
    assert torch.equal(logits(model), before)
    train(model)
    assert not torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


def test_an_attention_of_another_name_is_not_taken_for_the_mlp():
    base = rename_mlp(tiny_base(), "feed_forward")
    for block in base.model.layers:
        block.self_attn = Mixer(block.self_attn)
        block.mixer = block.self_attn
    model = get_peft_model(base, tiny_config())
    assert model.peft_config["default"].target_modules == ["model.layers.1.feed_forward", "model.layers.2.feed_forward"]


def test_two_modules_that_fit_are_named_and_refused():
    base = rename_mlp(tiny_base(), "feed_forward")
    for block in base.model.layers:
        block.adapter = nn.Linear(32, 32)
    check_refused(base, tiny_config(), smf.UnsupportedModelError, "2 of its modules fit.*feed_forward.*adapter")


# -- refusals ---------------------------------------------------------------------------------------------------------


def check_refused(base: nn.Module, config: smf.SparseMemoryConfig, error: type, message: str) -> None:
    before = (set(base.state_dict()), layout(base), [p.requires_grad for p in base.parameters()], set(vars(base)))
    settings = copy.deepcopy(vars(config))
    with pytest.raises(error, match=message):
        get_peft_model(base, config)
    after = (set(base.state_dict()), layout(base), [p.requires_grad for p in base.parameters()], set(vars(base)))
    assert before == after
    assert not any(module._forward_pre_hooks for module in base.modules())
    settings["base_model_name_or_path"] = config.base_model_name_or_path  # older PEFT fills it in before it asks us
    assert vars(config) == settings


def opt() -> PreTrainedModel:
    sizes = TOKENS | {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64)
    )


def t5() -> PreTrainedModel:
    sizes = {
        "vocab_size": 100,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 4,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def flagged(flag: str, value: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        base = tiny_base()
        setattr(base, flag, value)
        return base

    return make


def quantised_config() -> nn.Module:
    base = tiny_base()
    base.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    return base


class Params4bit(nn.Parameter):
    """Stands in for the parameter class of bitsandbytes."""


def four_bit_parameter() -> nn.Module:
    base = tiny_base()
    projection = base.model.layers[0].mlp.up_proj
    projection.weight = Params4bit(projection.weight.data, requires_grad=False)
    return base


BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no MLP module": (opt, "OPTDecoderLayer.*no single MLP module.*fc1"),
    "encoder-decoder": (t5, "T5ForConditionalGeneration is an encoder-decoder"),
    "4 bit": (flagged("is_loaded_in_4bit", True), "quantised.*is_loaded_in_4bit.*bfloat16"),
    "8 bit": (flagged("is_loaded_in_8bit", True), "quantised.*is_loaded_in_8bit"),
    "quantised": (flagged("is_quantized", True), "quantised.*is_quantized"),
    "quantised by its config": (quantised_config, "quantised.*config.quantization_config"),
    "quantised parameters": (four_bit_parameter, "quantised.*up_proj"),
    "tensor parallel": (flagged("_tp_size", 2), "tensor parallel.*tp_plan"),
    "no Transformers model": (lambda: nn.Sequential(nn.Linear(4, 4)), "Sequential has no Transformers config"),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_cannot_be_served_is_refused_by_name(case: str):
    make, message = BASES[case]
    check_refused(make(), tiny_config(), smf.UnsupportedModelError, message)


@pytest.mark.parametrize(("layers", "wrong"), [([1, 4], 4), ([-5], -5), ([0, 99], 99), ([-9, 3], -9)])
def test_a_layer_out_of_range_is_refused(layers: list[int], wrong: int):
    message = rf"layer index {wrong} is out of range.*4 decoder layers \(0 to 3; from the end, -1 to -4\)"
    check_refused(tiny_base(), tiny_config(layers=layers), smf.UnsupportedModelError, message)


def test_negative_layers_count_from_the_end_and_are_saved_as_what_they_are(tmp_path: Path):
    models = {}
    for layers in ([-1, 0], [0, 3]):
        models[str(layers)] = get_peft_model(tiny_base(), tiny_config(layers=layers))
    negative, positive = models.values()
    assert list(memory_layers(negative)) == list(memory_layers(positive)) == [0, 3]
    state = positive.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in negative.state_dict().items())
    negative.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layers"] == [0, 3]
    check_refused(tiny_base(), tiny_config(layers=[3, -1]), smf.UnsupportedModelError, r"\[-1, 3\] name one .* twice")


@pytest.mark.parametrize("name", ["Bloom", "GptOss"])
def test_a_replacement_of_an_mlp_that_does_more_than_map_hidden_states_is_refused(name: str):
    config = tiny_config(**REPLACEMENT)
    check_refused(tiny(name), config, smf.UnsupportedModelError, 'Use mode="additive"')


def test_lora_on_the_base_is_refused_however_it_came_there():
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(tiny_base(), lora)
    check_refused(wrapped, tiny_config(), smf.UnsupportedModelError, "lora.*merge_and_unload")
    check_refused(wrapped.base_model.model, tiny_config(), smf.UnsupportedModelError, "lora")
    native = tiny_base()
    native.add_adapter(lora)
    check_refused(native, tiny_config(), smf.UnsupportedModelError, "lora")
    with pytest.raises(smf.UnsupportedModelError, match="lora"):
        native.add_adapter(tiny_config(), "memory")
    assert list(native.peft_config) == ["default"]
    logits(native)


def test_lora_that_was_merged_is_welcome():
    lora = get_peft_model(tiny_base(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model = get_peft_model(lora.merge_and_unload(), tiny_config())
    train(model)
    assert list(smf.memory_layers(model)) == [1, 2]


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "odd k_dim": ({"k_dim": 15}, "k_dim must be even.*15"),
    "knn over n_keys": ({"knn": 17}, "knn=17.*n_keys=16"),
    "knn zero": ({"knn": 0}, "knn.*from 1 to.*0"),
    "no keys": ({"n_keys": 0, "knn": 1}, "n_keys.*from 1 to.*0"),
    "negative heads": ({"heads": -1}, "heads.*-1"),
    "fractional heads": ({"heads": 2.0}, "heads.*2.0"),
    "boolean k_dim": ({"k_dim": True}, "k_dim.*True"),
    "more rows than 32-bit ids": ({"n_keys": 46341}, "46340 at most"),
    "zero replacement": ({"mode": "replacement"}, 'erase the MLP.*init="paper"'),
    "scale of a replacement": (
        {"mode": "replacement", "init": "paper", "train": "rows+scale"},
        "replacement has no scale",
    ),
    "unknown mode": ({"mode": "parallel"}, "mode='parallel'.*additive.*replacement"),
    "unknown init": ({"init": "normal"}, "init='normal'.*zero.*paper"),
    "unknown train": ({"train": "table"}, "train='table'.*rows.*memory"),
    "unknown dtype": ({"table_dtype": "float16"}, "table_dtype='float16'.*float32.*bfloat16"),
    "no layer": ({"layers": []}, "at least one layer"),
    "a layer twice": ({"layers": [1, 1]}, "each once"),
    "a layer by name": ({"layers": ["1"]}, r"layers.*\['1'\]"),
    "a layer alone": ({"layers": 1}, "list of decoder layer indices"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_cannot_work_is_refused_when_it_is_made(case: str):
    changes, message = BAD_CONFIGS[case]
    with pytest.raises(smf.ConfigError, match=message):
        tiny_config(**changes)


def test_layers_may_come_in_any_order_and_sequence():
    assert tiny_config(layers=(3, 0)).layers == [0, 3]
    model = get_peft_model(tiny_base(), tiny_config(layers=(3, 0)))
    assert list(smf.memory_layers(model)) == [0, 3]


@pytest.mark.parametrize("name", MODELS)
def test_the_decoder_is_found_through_its_list_of_layers(name: str):
    model = tiny(name)
    decoder = find_decoder(model)
    assert len(decoder.blocks) == 4
    assert decoder.width == 32
    names = decoder.mlp_names([0, 3], replace=False)
    assert all(model.get_submodule(n) is not None for n in names)


def test_a_model_loaded_by_auto_class_from_disk_is_found_too(tmp_path: Path):
    tiny("Gemma3").save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    check_life(base.eval(), tiny_config(), tmp_path / "adapter")
