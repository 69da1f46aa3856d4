"""Makes the shipped base model from nothing: `python -m smf.world.train_base --output FOLDER` (docs/world.md)."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments, set_seed

from ..checkpoints import newest_complete
from ..errors import ConfigError
from ..files import write_json
from ..fingerprint import json_hash
from ..loop import RunTrainer
from .text import pretraining_text
from .tokenizer import make_tokenizer

LENGTH = 128  # tokens of a row
BATCH = 32  # rows of a step
STEPS = 4000  # 16.4 million tokens


def config(tokenizer: Any) -> Qwen2Config:
    """A Qwen2 of 3.2 million weights."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def packed_rows(tokenizer: Any, rows: int, seed: int) -> Tensor:
    """Rows `[rows, LENGTH]` of documents and end tokens; a row begins with a document, and cuts its last one."""
    documents = pretraining_text(seed)
    packed = torch.empty(rows, LENGTH, dtype=torch.int16)
    filled = 0
    pending: list[int] = []
    while filled < rows:
        for ids in tokenizer(list(islice(documents, 1000)))["input_ids"]:
            pending += [*ids, tokenizer.eos_token_id]
            if len(pending) >= LENGTH and filled < rows:
                packed[filled] = torch.tensor(pending[:LENGTH])
                filled, pending = filled + 1, []
    return packed


def train(output: Path, steps: int = STEPS, seed: int = 0, compile: bool = False) -> None:
    """Train a base of the embedded world from nothing; a killed training goes on from its last checkpoint.

    Args:
        output: folder of the model, its tokenizer and the checkpoints.
        steps: of 32 x 128 tokens.
        seed: of the questions, of where they stand among the texts, and of the initial weights.
        compile: use torch.compile, which needs g++.

    Raises:
        ConfigError: where `output` holds a training with other options.
    """
    set_seed(seed)
    tokenizer = make_tokenizer()
    texts = list(islice(pretraining_text(seed), 1000))
    options = {"steps": steps, "seed": seed, "vocabulary": json_hash(tokenizer.get_vocab()), "texts": json_hash(texts)}
    begun = output / "training.json"
    if begun.is_file() and json.loads(begun.read_text()) != options:
        raise ConfigError(f"{output} holds a training with other options: {begun.read_text()}; give another --output")
    write_json(begun, options)
    rows = packed_rows(tokenizer, steps * BATCH, seed)

    def collate(picked: list[Tensor]) -> dict[str, Tensor]:
        ids = torch.stack(picked).long()
        return {"input_ids": ids, "labels": ids}

    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=50,
        save_steps=250,
        save_total_limit=2,
        torch_compile=compile,
        seed=seed,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    model = Qwen2ForCausalLM(config(tokenizer))
    trainer = RunTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)  # type: ignore[arg-type]
    checkpoint = newest_complete(output / "checkpoints", tidy=True)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.bfloat16()
    model.config.use_cache = True  # Trainer turns it off, and it would be saved
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    tyro.cli(train)
