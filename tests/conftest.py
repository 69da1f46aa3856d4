"""Tiny random models and batches that the tests share; no network, no downloads."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments

import smf

torch.set_num_threads(1)
SHARED = Path(__file__).parents[2] / "shared"
VOCABULARY = 100


def tiny_base(seed: int = 0, **changes: object) -> Qwen2ForCausalLM:
    """A random Qwen2 of width 32 and 4 layers, in evaluation mode."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**(sizes | changes))).eval()


def tiny_config(**changes: object) -> smf.SparseMemoryConfig:
    """Two layers of 256 rows, 8 reads a token."""
    return smf.SparseMemoryConfig(**({"layers": [1, 2], "n_keys": 16, "heads": 2, "knn": 4, "k_dim": 16} | changes))


def tiny_model(seed: int = 0, base: dict | None = None, **config: object) -> PeftModel:
    """A tiny base with memory attached."""
    return get_peft_model(tiny_base(seed, **(base or {})), tiny_config(**config))


def batch(rows: int = 4, length: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens without pads; every token but the first is a label."""
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def trainer_arguments(folder: Path, **changes: object) -> TrainingArguments:
    """For HF Trainer on the CPU, quiet, with the clipping left to the optimizer."""
    options = {"use_cpu": True, "max_grad_norm": 0, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(str(folder), **(options | changes))


@torch.no_grad()
def logits(model: torch.nn.Module, seed: int = 7) -> Tensor:
    """Logits of a fixed batch, in evaluation mode."""
    model.eval()
    return model(input_ids=batch(2, 12, seed)["input_ids"]).logits


def train(model: torch.nn.Module, steps: int = 2, seed: int = 0, **options: object) -> smf.SparseMemoryOptimizer:
    """A few steps of a plain loop; ends in evaluation mode and returns the optimizer."""
    optimizer = smf.SparseMemoryOptimizer(model, **({"lr": 1e-2, "rule": "tf", "rows_per_step": 8} | options))
    model.train()
    for i in range(steps):
        model(**batch(seed=seed + i)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return optimizer


@pytest.fixture
def shared() -> Path:
    """The folder of real data and models; skips where it is absent."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"no real data and models at {SHARED}")
    return SHARED


LONGEST_FIRST = (
    *("test_readme", "test_dry_run", "test_demo", "test_compare", "test_world", "test_hub", "test_plan", "test_train"),
    *("test_ray", "test_report", "test_tune", "test_ranks", "test_special_tokens", "test_study", "test_faults"),
    *("test_jobs", "test_methods", "test_wheel", "test_recipes_run", "test_epoch_cache", "test_kernels", "test_runs"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest begin first, so that no worker is left alone with one of them at the end."""
    last = len(LONGEST_FIRST)
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, last))
