"""Optional Triton kernels for what a step does with memory rows on a GPU; `smf.use_kernels(model)` turns them on.

`rows.py` needs triton and is imported only where it is used.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ..errors import ConfigError

DTYPES = (torch.float32, torch.bfloat16)  # of tables
OFF = "or let PyTorch's operators do it: smf.use_kernels(model, False)"


def check_triton() -> None:
    """Refuse where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "the GPU kernels need triton, which is not installed here: pip install "
            f"'sparse-memory-finetuning[cuda]' (Linux), {OFF}"
        )


def check_table(values_ND: Tensor) -> None:
    """Refuse a table that the kernels cannot read; Triton's interpreter (`TRITON_INTERPRET=1`) reads CPU tensors."""
    if not values_ND.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        seen = "" if torch.cuda.is_available() else "; torch sees no such device here"
        raise ConfigError(
            f"the GPU kernels need the memory on a CUDA device, but its table is on {values_ND.device}{seen}: move "
            f'the model first (model.to("cuda")), {OFF}'
        )
    if values_ND.dtype not in DTYPES:
        raise ConfigError(
            f"the GPU kernels read tables in float32 or bfloat16, not {values_ND.dtype}; cast the model, {OFF}"
        )
