"""Several patches that take turns in one loaded model, by copying rows."""

from __future__ import annotations

from torch import nn

from .errors import PatchError
from .fingerprint import base_hash
from .memory import memory_layers
from .patch import Patch, fitting_memories, tables_of


class PatchSwitch:
    """Puts one of several patches at a time into a model; every switch is checked, and leaves nothing of the last one.

    Switch between requests, not while the model generates.

    Args:
        model: with the memory of the patches attached, and none of them in it: `get_peft_model(base, patch.config)`.
        adapter: the memory's adapter; None for the active one.
    """

    def __init__(self, model: nn.Module, adapter: str | None = None):
        memories = memory_layers(model, adapter)
        if not memories:
            raise PatchError("the model has no memory layers; attach them first: get_peft_model(base, patch.config)")
        self._model, self._adapter = model, next(iter(memories.values())).adapter
        self._base_hash = base_hash(model)  # once: it reads every weight
        self._patches: dict[str, Patch] = {}
        self._active: str | None = None

    @property
    def active(self) -> str | None:
        """Name of the patch that is in the model; None: none of them."""
        return self._active

    @property
    def names(self) -> list[str]:
        """Of the patches that were added."""
        return list(self._patches)

    def add(self, name: str, patch: Patch) -> None:
        """Make a patch known under a name.

        Raises:
            PatchError: for a patch of another base, config, seed or healing, for one that was trained with another
                patch applied, and for a name that is taken.
        """
        if name in self._patches:
            raise PatchError(f"there is a patch {name!r} already; choose another name, or remove that one first")
        active = self._active
        self.use(None)  # it must fit without any other
        try:
            memories = fitting_memories(self._model, self._adapter, patch, "add", self._base_hash)
            patch.check_present(tables_of(memories), "apply")
        finally:
            self.use(active)
        self._patches[name] = patch

    def remove(self, name: str) -> None:
        """Forget a patch, taking it out of the model first where it is in it."""
        self._known(name)
        if name == self._active:
            self.use(None)
        del self._patches[name]

    def use(self, name: str | None) -> None:
        """Take the patch that is in the model out, and put another one in; None: none.

        Raises:
            PatchError: for a name that was not added, or where something else changed the rows since; the model is then
                as it was.
        """
        wanted = None if name is None else self._known(name)
        if name == self._active:
            return
        tables = tables_of(memory_layers(self._model, self._adapter))
        present = None if self._active is None else self._patches[self._active]
        if present is not None:
            present.put_into(tables, "revert")
        try:
            if wanted is not None:
                wanted.put_into(tables, "apply")
        except BaseException:
            if present is not None:
                present.put_into(tables, "apply")
            raise
        self._active = name

    def _known(self, name: str) -> Patch:
        if name not in self._patches:
            raise PatchError(f"there is no patch {name!r}; added were {self.names}")
        return self._patches[name]
