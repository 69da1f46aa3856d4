"""Makes the shipped base model from nothing: `python -m smf.world.train_base --output FOLDER` (docs/world.md)."""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments, set_seed

from ..errors import ConfigError
from ..files import write_json
from ..fingerprint import json_hash
from ..train import RunTrainer, newest_complete
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


def train(output: Path, steps: int, seed: int, compiled: bool) -> None:
    """Train, resuming from the newest complete checkpoint in `output`, and save model and tokenizer there.

    Raises:
        ConfigError: where `output` holds a training with other options.
    """
    set_seed(seed)
    tokenizer = make_tokenizer()
    options = {"steps": steps, "seed": seed, "vocabulary": json_hash(tokenizer.get_vocab())}
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
        torch_compile=compiled,
        seed=seed,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    model = Qwen2ForCausalLM(config(tokenizer))
    trainer = RunTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)  # type: ignore[arg-type]
    checkpoint = newest_complete(output / "checkpoints", tidy=True)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    nn.Module.to(model, torch.bfloat16)
    model.config.use_cache = True  # Trainer turns it off, and it would be saved
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the model and its checkpoints")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} x {LENGTH} tokens")
    parser.add_argument("--seed", type=int, default=0, help="of documents and initial weights")
    parser.add_argument("--compile", action="store_true", help="torch.compile: about 1.4 times as fast, needs g++")
    options = parser.parse_args()
    train(options.output, options.steps, options.seed, options.compile)


if __name__ == "__main__":
    main()
