"""Target and probe definitions: which columns a task reads, and what texts it makes of a row."""

from __future__ import annotations

from types import ModuleType

from ..errors import ConfigError
from . import medmcqa, perplexity

TASKS: dict[str, ModuleType] = {"medmcqa": medmcqa, "perplexity": perplexity}


def find_task(name: str) -> ModuleType:
    """The module of a task's name."""
    if name not in TASKS:
        raise ConfigError(f"task = {name!r} is not known; use one of {sorted(TASKS)}")
    return TASKS[name]
