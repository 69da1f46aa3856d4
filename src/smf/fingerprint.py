"""Hashes: which weights a file belongs to, and which part of a split a text."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .errors import ConfigError

MEMORY_PREFIX = "sparse_memory_"
WRAPPERS = re.compile(r"module\.|_orig_mod\.|base_model\.model\.")  # of DDP, torch.compile and PEFT


def tensor_bytes(tensor: Tensor) -> Any:
    """The raw bytes of a tensor, row-major, whatever its dtype."""
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def tensors_hash(tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in order of the names.

    Args:
        tensors: what to hash.
        dtype: round floating-point tensors to this dtype first (one tensor at a time).
    """

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.detach().to(dtype)
        head = json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode()
        return hashlib.sha256(head + hashlib.sha256(tensor_bytes(tensor)).digest()).digest()

    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        return hashlib.sha256(b"".join(pool.map(digest, sorted(tensors.items())))).hexdigest()


def json_hash(value: Any) -> str:
    """SHA-256 of a JSON value with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def source_hash(module: str) -> str:
    """SHA-256 of the file of a Python module, which is looked for and not imported."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a package on the way to it is missing
        found = None
    if found is None or not found.origin or not Path(found.origin).is_file():
        raise ConfigError(f"there is no Python module {module!r} in the current folder or among the installed ones")
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()


def hashed(salt: str, text: Any) -> str:
    """SHA-256 of a text, up to outer white space, that differs for every salt."""
    return hashlib.sha256(f"{salt}\n{str(text).strip()}".encode()).hexdigest()


def part_of(text: str, parts: Mapping[str, float]) -> str:
    """The part that the hash of a text puts it into; equal texts, up to outer white space, share their part.

    Args:
        text: what is to be in one part only.
        parts: shares by name; where they add up to less than 1, the part of the rest is "".
    """
    position = int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big") / 2**64
    for name, share in parts.items():
        position -= share
        if position < 0:
            return name
    return ""


def is_memory_parameter(name: str) -> bool:
    """Whether a parameter of a PEFT model belongs to a memory layer."""
    return any(part.startswith(MEMORY_PREFIX) for part in name.split("."))


def _base_parameters(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if not is_memory_parameter(name):
            while (match := WRAPPERS.match(name)) is not None:
                name = name[match.end() :]
            yield name.replace(".base_layer.", "."), parameter


def base_hash(model: nn.Module) -> str | None:
    """Hash of a model's own weights, rounded to bfloat16, without any memory.

    The same for a base in float32 and in bfloat16, bare or wrapped by PEFT. None where weights are not in memory
    (meta and fake tensors), since nothing can be said then.
    """
    parameters = dict(_base_parameters(model))
    if any(p.is_meta or isinstance(p, FakeTensor) for p in parameters.values()):
        return None
    return tensors_hash(parameters, dtype=torch.bfloat16)
