"""A whole tiny world in a folder: base model, tokenizer, data and recipe, for tests of the command and of training."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
WORDS = [f"word{i}" for i in range(120)]
EXTRA = ["Medical", "exam", "question", ":", "Question", "Answer", "A", "B", "C", "D", ".", "?"]

RECIPE = """
base = "{folder}/base"
data = "{folder}/data"
output = "{folder}/runs"
eval_batch_size = 8

[parts]
background = 0.5
healing = 0.3
probe = 0.2

[memory]
layers = [1, 2]
n_keys = 16
heads = 2
knn = 4
k_dim = 16

[train]
steps = 4
batch_size = 8
micro_batch_size = 2
max_length = 64
save_every = 2

[target]
task = "medmcqa"
explanation = false
train = {{ path = "train.jsonl" }}
metrics = ["loss", "acc"]
validation = {{ path = "validation.jsonl" }}
eval.exam = {{ path = "eval.jsonl" }}

[background]
source = {{ path = "stories.jsonl", part = "background" }}

[heal]
source = {{ path = "stories.jsonl", part = "healing" }}
steps = 2
lr = 1e-3

[probes.stories]
task = "perplexity"
source = {{ path = "stories.jsonl", part = "probe" }}

[methods.base]
kind = "base"

[methods.smf]
kind = "smf"
reads = "gradient"
rows_per_step = 8
lr = 0.05

[methods.smf-all]
kind = "smf"
rule = "all"
lr = 0.05

[methods.smf-healed]
kind = "smf"
heal = true
rule = "tfidf"
train = "rows+scale"
rows_per_step = 8
lr = 0.05
memory = {{ layers = [2], n_keys = 8, heads = 2, knn = 2, k_dim = 8, init = "paper" }}

[methods.lora]
kind = "lora"
r = 2
alpha = 4.0
lr = 1e-2

[methods.full]
kind = "full"
lr = 1e-3
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<eos>", *EXTRA, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def make_base(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of width 32 and 4 layers that fits the tokenizer."""
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 160, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4} | heads
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=128, eos_token_id=2, pad_token_id=0)).eval()


def question(number: int, rng: random.Random) -> dict:
    """A row in the schema of MedMCQA."""
    row = {"id": f"q{number}", "question": " ".join(rng.choices(WORDS, k=rng.randint(3, 9))) + " ?"}
    row |= {f"op{letter}": " ".join(rng.choices(WORDS, k=rng.randint(1, 3))) for letter in "abcd"}
    return row | {"cop": rng.randrange(4), "exp": None, "choice_type": "single"}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_world(folder: Path) -> Path:
    """Write everything below `folder`; returns the recipe's path."""
    rng = random.Random(0)
    make_base().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    questions = [question(i, rng) for i in range(64)]
    write_lines(folder / "data" / "train.jsonl", questions[:40])
    write_lines(folder / "data" / "eval.jsonl", questions[40:52])
    write_lines(folder / "data" / "validation.jsonl", questions[52:])
    stories = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(5, 80)))} for _ in range(60)]
    write_lines(folder / "data" / "stories.jsonl", stories)
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=folder))
    return recipe


def command(*arguments: object) -> list[str]:
    """The command line of `smf` with these arguments, to run with the environment ONE_THREAD."""
    return [sys.executable, "-m", "smf", *map(str, arguments)]
