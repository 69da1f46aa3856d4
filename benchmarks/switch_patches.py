"""Switching what a loaded model knows: patches by row copy against PEFT's set_adapter and load_adapter.

    python benchmarks/switch_patches.py

Qwen2.5-0.5B's shape with random weights, memory at layers 6, 12 and 18, two patches of 4,096 random rows a layer;
beside them two LoRAs of rank 16 on all linear layers of the same base. All sides switch from one to the other,
interleaved, in one process. "load" sides read a file (in the page cache) first. Ratios are to `PatchSwitch.use`. Also
what each further patch or adapter holds in memory. Writes benchmarks/results/switch_patches.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

import smf
from smf.patch_file import patch_of

RESULT = Path(__file__).parent / "results" / "switch_patches.json"
NAMES = ("medicine", "law")


def base(small: bool) -> Qwen2ForCausalLM:
    """Random weights in the shape of Qwen2.5-0.5B; `small` for a test of this script."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    sizes |= {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936}
    if small:
        sizes |= {"hidden_size": 28, "intermediate_size": 32, "vocab_size": 100}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))


def make_patch(model: PeftModel, rows: int, seed: int) -> smf.Patch:
    """A patch of random rows; the model is left as it was."""
    generator = torch.Generator().manual_seed(seed)
    for memory in smf.memory_layers(model).values():
        ids = torch.randperm(memory.shape.n_rows, generator=generator)[:rows]
        memory.values.data[ids] = torch.randn(len(ids), memory.shape.d, generator=generator) * 0.01
    patch = patch_of(model)
    patch.revert(model)
    return patch


def lora_model(base: Any, folder: Path) -> PeftModel:
    """The base with two LoRAs, of which each is saved as well."""
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name="medicine")
    model.add_adapter("law", config)
    model.save_pretrained(str(folder))
    return model


def sides(folder: Path, rows: int, small: bool) -> tuple[dict[str, Callable[[str], None]], dict[str, int]]:
    """What is timed, by name: a function that switches to "medicine" or "law"; and bytes that each one more holds."""
    config = smf.SparseMemoryConfig(layers=[6, 12, 18], n_keys=16 if small else 128, heads=4, knn=16, k_dim=256)
    model = get_peft_model(base(small), config)
    switch, whole = smf.PatchSwitch(model), get_peft_model(base(small), config, adapter_name="medicine")
    whole.add_adapter("law", config)
    patches = {}
    for seed, name in enumerate(NAMES):
        patches[name] = smf.save_patch(make_patch(model, rows, seed), folder / f"{name}.smf")
        switch.add(name, patches[name])
        patches[name].apply(whole, name)
    whole.save_pretrained(str(folder / "whole"))
    loras = lora_model(base(small), folder / "lora")
    live = smf.PatchSwitch(get_peft_model(base(small), config))

    def load_patch(name: str) -> None:
        if live.active is not None:
            live.remove(live.active)
        live.add(name, smf.load_patch(folder / f"{name}.smf"))
        live.use(name)

    def loader(of: PeftModel, kept: Path) -> Callable[[str], None]:
        def load(name: str) -> None:
            of.load_adapter(str(kept / name), adapter_name=f"{name} again")
            of.set_adapter(f"{name} again")
            of.delete_adapter(f"{name} again")

        return load

    timed: dict[str, Callable[[str], None]] = {
        "PatchSwitch.use": switch.use,
        "load_patch, add and use": load_patch,
        "memory: set_adapter": whole.set_adapter,
        "memory: load_adapter, set and delete": loader(whole, folder / "whole"),
        "LoRA: set_adapter": loras.set_adapter,
        "LoRA: load_adapter, set and delete": loader(loras, folder / "lora"),
    }
    first = patches["medicine"]
    held = {
        "patch (old and new rows)": sum(first.new[n].nbytes + first.old[n].nbytes for n in first.rows),
        "memory adapter": sum(p.nbytes for n, p in whole.named_parameters() if n.endswith(".law")),
        "LoRA adapter": sum(p.nbytes for n, p in loras.named_parameters() if ".law." in n),
    }
    return timed, held


def main() -> None:
    """Time every side in turn, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rows", type=int, default=4096, help="changed rows a layer")
    parser.add_argument("--small", action="store_true", help="a tiny base, to try this script")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        timed, held = sides(Path(name), min(options.rows, 100) if options.small else options.rows, options.small)
        seconds: dict[str, list[float]] = {side: [] for side in timed}
        for turn in range(options.rounds + 1):
            for side, switch in timed.items():
                started = time.perf_counter()
                switch(NAMES[turn % 2])
                if turn:  # the first one warms up
                    seconds[side].append(time.perf_counter() - started)
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    result = {
        "ratio_to_PatchSwitch.use": {side: median / medians["PatchSwitch.use"] for side, median in medians.items()},
        "median_seconds": medians,
        "least_and_most_seconds": {side: [min(times), max(times)] for side, times in seconds.items()},
        "bytes_of_one_more": held,
        "rows_a_layer": options.rows,
        "rounds": options.rounds,
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
