"""Sparse memory finetuning: teach a pretrained language model something new by changing a few memory rows.

Importing this package registers the method with PEFT.
"""

from .adapter import SparseMemoryModel, set_train
from .adapter_file import load, open_patch
from .background import Background, read_background
from .config import SparseMemoryConfig
from .errors import (
    BackgroundError,
    BusyError,
    ConfigError,
    DataError,
    PatchError,
    SmfError,
    StorageError,
    TrainingError,
    UnsupportedModelError,
)
from .memory import ProductKeyMemory, memory_layers, use_kernels
from .optimizer import SparseMemoryOptimizer, StepReport
from .patch import Patch
from .patch_file import load_patch, save_patch
from .sealing import SealCheckpoints, newest_checkpoint
from .serving import PatchSwitch

__version__ = "0.1.0"

__all__ = [
    "Background",
    "BackgroundError",
    "BusyError",
    "ConfigError",
    "DataError",
    "Patch",
    "PatchError",
    "PatchSwitch",
    "ProductKeyMemory",
    "SealCheckpoints",
    "SmfError",
    "SparseMemoryConfig",
    "SparseMemoryModel",
    "SparseMemoryOptimizer",
    "StepReport",
    "StorageError",
    "TrainingError",
    "UnsupportedModelError",
    "load",
    "load_patch",
    "memory_layers",
    "newest_checkpoint",
    "open_patch",
    "read_background",
    "save_patch",
    "set_train",
    "use_kernels",
]
