"""Makes a world's base model from nothing: `python -m smf.world.train_base --output FOLDER` (docs/world.md)."""

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
from .facts import EMBEDDED, World
from .text import pretraining_text
from .tokenizer import make_tokenizer

LENGTH = 128  # tokens of a row
BATCH = 32  # rows of a step
STEPS = 4000  # 16.4 million tokens
LAYERS, WIDTH = 6, 192  # of the shipped base
HEAD = 32  # width of an attention head


def config(tokenizer: Any, layers: int = LAYERS, width: int = WIDTH) -> Qwen2Config:
    """A Qwen2; by default of 3.2 million weights.

    Raises:
        ConfigError: where `width` is not that of whole attention heads.
    """
    if layers < 1 or width < HEAD or width % HEAD:
        raise ConfigError(f"{layers} layers of width {width}: needs a layer, and a width that is a multiple of {HEAD}")
    heads = width // HEAD
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2 if heads % 2 == 0 else 1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def packed_rows(tokenizer: Any, rows: int, seed: int, world: World = EMBEDDED) -> Tensor:
    """Rows `[rows, LENGTH]` of documents and end tokens; a row begins with a document, and cuts its last one."""
    documents = pretraining_text(seed, world)
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


def train(
    output: Path,
    steps: int = STEPS,
    seed: int = 0,
    compile: bool = False,
    world_seed: int = EMBEDDED.seed,
    times: int = EMBEDDED.times,
    layers: int = LAYERS,
    width: int = WIDTH,
) -> None:
    """Train a base from nothing, of the embedded world or another; a killed training goes on from its last checkpoint.

    Args:
        output: folder of the model, its tokenizer and the checkpoints.
        steps: of 32 x 128 tokens.
        seed: of the questions, of where they stand among the texts, and of the initial weights.
        compile: use torch.compile, which needs g++.
        world_seed: of the world that it reads about.
        times: how many times as many facts as the embedded world that world has.
        layers: of the model.
        width: of the model; its attention heads are 32 wide, and its MLPs three times as wide as itself.

    Raises:
        ConfigError: where `output` holds a training with other options, or there is no such world or model.
    """
    set_seed(seed)
    world = World(world_seed, times)
    tokenizer = make_tokenizer(world)
    shape = config(tokenizer, layers, width)
    options = {"steps": steps, "seed": seed, "world_seed": world_seed, "times": times, "layers": layers, "width": width}
    options |= {"vocabulary": json_hash(tokenizer.get_vocab())}
    options |= {"texts": json_hash(list(islice(pretraining_text(seed, world), 1000)))}
    begun = output / "training.json"
    if begun.is_file() and json.loads(begun.read_text()) != options:
        raise ConfigError(f"{output} holds a training with other options: {begun.read_text()}; give another --output")
    write_json(begun, options)
    rows = packed_rows(tokenizer, steps * BATCH, seed, world)

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
    model = Qwen2ForCausalLM(shape)
    trainer = RunTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)  # type: ignore[arg-type]
    checkpoint = newest_complete(output / "checkpoints", tidy=True)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.bfloat16()
    model.config.use_cache = True  # Trainer turns it off, and it would be saved
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    tyro.cli(train)
