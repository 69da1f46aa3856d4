"""Prompts that are read once for all choices give the scores of prompts that are read for each."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import tiny_config
from smf.harness import choice_records
from smf.memory import evaluation_mode
from smf.shared_prompts import SharedPromptLM
from test_architectures import MODELS, tiny
from tiny import WORDS, make_base, make_tokenizer

TOKENIZER = make_tokenizer()
ROOM = 48  # tokens of a sequence


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS[:80], k=words))


def questions(seed: int, count: int) -> list[tuple[str, str]]:
    """Prompts of 1 to 12 tokens with 1 to 5 continuations of 1 to 6; besides empty, repeated and too long ones."""
    rng = random.Random(seed)
    pairs = []
    for number in range(count):
        prompt = text(rng, rng.randint(1, 12))
        choices = 1 if number % 4 == 3 else rng.randint(2, 5)
        pairs += [(prompt, " " + text(rng, rng.randint(1, 6))) for _ in range(choices)]
    pairs += [(text(rng, 46), " " + text(rng, words)) for words in (2, 4)]  # the second is cut on its left
    pairs += [(pairs[0][0], " " + text(rng, 3)), pairs[1], ("", text(rng, 2)), ("", text(rng, 3))]
    rng.shuffle(pairs)
    return pairs


def scores(kind: Any, model: Any, pairs: list[tuple[str, str]], batch_size: int) -> list[tuple[float, bool]]:
    lm = kind(pretrained=model, tokenizer=TOKENIZER, batch_size=batch_size, max_length=ROOM, add_bos_token=False)
    return lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)


def check_equal(model: Any, seed: int = 0, sizes: tuple[int, ...] = (1, 8, 64)) -> None:
    pairs = questions(seed, 16)
    one_by_one = scores(HFLM, model, pairs, 1)
    for size in sizes:
        together = scores(SharedPromptLM, model, pairs, size)
        assert [value for value, _ in together] == pytest.approx([value for value, _ in one_by_one], abs=1e-4)
        assert [greedy for _, greedy in together] == [greedy for _, greedy in one_by_one]


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_gives_the_scores_of_one_by_one(name: str):
    check_equal(tiny(name), sizes=(8,))


WIDTH = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
STATES: dict[str, dict[str, Any]] = {  # models that keep more of a prompt than keys and values
    "falcon_h1": HEADS | {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "jamba": HEADS | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8},
    "lfm2": HEADS | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mamba": {"state_size": 8},
    "qwen3_next": HEADS
    | LINEAR
    | EXPERTS
    | {"head_dim": 8, "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": HEADS
    | {"head_dim": 8, "lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
}


@pytest.mark.parametrize("name", STATES)
def test_models_with_states_beside_keys_and_values_are_scored_by_the_harness_own_way(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **WIDTH | STATES[name])).eval()
    check_equal(model, sizes=(8,))


@pytest.mark.parametrize("seed", range(4))
def test_any_batch_size_gives_the_scores_of_one_by_one(seed: int):
    check_equal(make_base(), seed)


def test_models_with_a_memory_and_bfloat16():
    model = get_peft_model(make_base(), tiny_config(init="paper"))
    with evaluation_mode(model):
        check_equal(model)
    base = make_base().bfloat16()
    pairs = questions(5, 16)
    rough = [value for value, _ in scores(SharedPromptLM, base, pairs, 8)]
    exact = [value for value, _ in scores(HFLM, base.float(), pairs, 1)]
    assert rough == pytest.approx(exact, rel=0.02)


def test_a_continuation_that_greedy_decoding_says_is_known_as_such():
    base = make_base()
    said = []
    ids = TOKENIZER("word1 word2")["input_ids"]
    while len(said) < 3:
        said.append(base(torch.tensor([ids + said])).logits[0, -1].argmax().item())
    pairs = [("word1 word2", " " + TOKENIZER.decode(said)), ("word1 word2", f" {TOKENIZER.decode(said[:2])} word5")]
    assert [greedy for _, greedy in scores(SharedPromptLM, base, pairs, 8)] == [True, said[2] == 5]


def test_prompts_are_read_once():
    """Four choices of four tokens: the prompt's tokens, and of each choice all but the last."""
    base, read = make_base(), []
    base.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"].numel()), with_kwargs=True)
    item = {"id": "q", "prompt": " ".join(WORDS[:20]), "answer": 0}
    item["choices"] = [" " + " ".join(WORDS[i : i + 4]) for i in range(4)]
    choice_records(base, TOKENIZER, [item], batch_size=4, max_length=64)
    assert read == [20, 4 * 3]


def test_a_batch_has_no_more_sequences_than_asked_for_however_many_share_a_prompt():
    """Tasks without a prompt, as BLiMP's, have all their sentences in one group."""
    base, read = make_base(), []
    pairs = [("", " ".join(WORDS[i : i + 2])) for i in range(30)]
    one_by_one = scores(HFLM, base, pairs, 1)
    base.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"].shape[0]), with_kwargs=True)
    together = scores(SharedPromptLM, base, pairs, 8)
    assert [value for value, _ in together] == pytest.approx([value for value, _ in one_by_one], abs=1e-4)
    assert max(read) <= 8 and len(read) == 2 * 4  # the prompt, then what follows it, of 8, 8, 8 and 6
