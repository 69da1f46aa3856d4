"""Hidden states that enter the first decoder layer that trains, kept on disk from the first epoch for the others.

The layers below it are frozen, so a sequence leaves them as it did before. It is stored as it was when it came first;
in later epochs the embeddings and the frozen layers have nothing to do for it. Padding may round hidden states
otherwise in the last bit, so a training with the cache equals one without bit for bit where all sequences of a training
are equally long, and else as closely as two paddings of a batch do.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .decoder import DecoderLayers, find_decoder
from .errors import StorageError, TrainingError
from .files import read_text, write_json
from .fingerprint import json_hash, tensor_bytes
from .ranks import world_size

HIDDEN = "hidden-states"  # folder of a run
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # layers that read nothing but hidden states


def first_trained(decoder: DecoderLayers) -> int:
    """The first decoder layer in which anything requires a gradient; as many as there are, where none does."""
    trained = (n for n, block in enumerate(decoder.blocks) if any(p.requires_grad for p in block.parameters()))
    return next(trained, len(decoder.blocks))


def why_not(model: Any, sequences: Sequence[Sequence[int]]) -> str | None:
    """Why hidden states cannot be kept, or keeping them is of no use; None where they can."""
    decoder = find_decoder(model)
    layer = first_trained(decoder)
    inside = {id(p) for block in decoder.blocks for p in block.parameters()}
    if layer == 0 or any(p.requires_grad and id(p) not in inside for p in decoder.owner.parameters()):
        return "the first decoder layer trains, or the embeddings do"
    if layer == len(decoder.blocks):
        return "no decoder layer trains"
    text: Any = model.config.get_text_config()
    other = set(getattr(text, "layer_types", None) or []) - ATTENTION
    if other or getattr(text, "num_kv_shared_layers", 0) or getattr(text, "state_size", 0):
        return f"layers hand on more than hidden states ({', '.join(sorted(other)) or 'keys and values, or a state'})"
    below = [m for n, m in decoder.owner.named_modules() if not _reaches(n, decoder, layer)]
    if any(_drops(module) for module in below):
        return "there is dropout below the first layer that trains"
    if world_size() > 1 or "RANK" in os.environ:
        return "several ranks train"
    if len(set(map(tuple, sequences))) == len(sequences):
        return "no example is read twice"
    return None


def _reaches(name: str, decoder: DecoderLayers, layer: int) -> bool:
    """Whether a module of the decoder's owner is in a layer from the first that trains on, or holds such layers."""
    blocks = decoder.name.rpartition(".")[2]
    if name in ("", blocks):
        return True
    return name.startswith(f"{blocks}.") and int(name.split(".")[1]) >= layer


def _drops(module: nn.Module) -> bool:
    rates = [module.p] if isinstance(module, nn.Dropout) else []
    rates += [value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
    return any(rate > 0 for rate in rates)


def disk_bytes(sequences: Iterable[Sequence[int]], width: int, dtype: torch.dtype) -> int:
    """What the hidden states of these sequences take, each of them counted once."""
    return sum(map(len, set(map(tuple, sequences)))) * width * dtype.itemsize


class EpochCache:
    """Hidden states by sequence, in a memory-mapped file; `close` ends it.

    While it is open, a forward pass of training that reads stored sequences alone begins at the first layer that
    trains, and any other stores what it computes. What else a model is called with (given hidden states or positions,
    left pads, sequences that are not known) is computed as ever.

    Args:
        model: whose frozen layers are spared; `why_not` said None.
        sequences: token ids of the training's examples, in any order.
        folder: for the files; those of a run that was killed are gone on with.

    Raises:
        StorageError: where the disk has too little room.
    """

    def __init__(self, model: Any, sequences: Sequence[Sequence[int]], folder: Path):
        decoder = find_decoder(model)
        self._layer = first_trained(decoder)
        self._width, self._dtype = decoder.width, next(decoder.blocks[0].parameters()).dtype
        self._slots: dict[tuple[int, ...], int] = {}
        self._starts = [0]
        for sequence in map(tuple, sequences):
            if sequence not in self._slots:
                self._slots[sequence] = len(self._slots)
                self._starts.append(self._starts[-1] + len(sequence))
        self._folder = folder
        self._open()
        self._storing: list[tuple[int, int, int]] = []  # rows of this pass to store: row, slot, tokens
        self._given: Tensor | None = None  # what enters the first layer that trains in this pass
        self._blocks = list(decoder.blocks)[: self._layer]
        for number, block in enumerate(self._blocks):
            block.forward = self._instead(block.forward, first=number == 0)
        self._handles = [
            decoder.owner.register_forward_pre_hook(self._look, with_kwargs=True),
            decoder.blocks[self._layer].register_forward_pre_hook(self._store, with_kwargs=True),
        ]

    # -- files --------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        known = json_hash([list(map(list, self._slots)), self._layer, self._width, str(self._dtype)])
        about = self._folder / "about.json"
        if not _is_of(about, known):
            shutil.rmtree(self._folder)
            self._folder.mkdir()
        hidden, sums = self._folder / "hidden", self._folder / "sums"
        tokens, count = self._starts[-1], len(self._slots)
        _reserve(hidden, tokens * self._width * self._dtype.itemsize)
        _reserve(sums, count * 8)
        write_json(about, {"of": known})
        size = tokens * self._width
        self._hidden = torch.from_file(str(hidden), shared=True, size=size, dtype=self._dtype).view(tokens, -1)
        self._sums = torch.from_file(str(sums), shared=True, size=count, dtype=torch.int64)
        for slot in self._sums.nonzero().flatten().tolist():  # a crash of the machine may have cut some off
            if self._sums[slot] != _sum(self._of(slot)):
                self._sums[slot] = 0

    def _of(self, slot: int) -> Tensor:
        return self._hidden[self._starts[slot] : self._starts[slot + 1]]

    def flush(self) -> None:
        """Write to the disk what a checkpoint is about to rely on."""
        for name in ("hidden", "sums"):
            with (self._folder / name).open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Give the model its layers back; the files stay, since a later start may go on with them."""
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            del block.forward
        del self._hidden, self._sums

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _look(self, owner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """See which sequences are read, and whether all of them are stored."""
        self._given, self._storing = None, []
        ids_BS = args[0] if args else kwargs.get("input_ids")
        others = ("inputs_embeds", "position_ids", "past_key_values")
        if not owner.training or not torch.is_grad_enabled() or any(kwargs.get(name) is not None for name in others):
            return
        mask_BS = kwargs.get("attention_mask")
        if not isinstance(ids_BS, Tensor) or not isinstance(mask_BS, Tensor) or mask_BS.shape != ids_BS.shape:
            return
        rows = []
        for row, (ids_S, mask_S) in enumerate(zip(ids_BS.tolist(), mask_BS.bool().tolist(), strict=True)):
            tokens = sum(mask_S)
            slot = self._slots.get(tuple(ids_S[:tokens]))
            if slot is None or not all(mask_S[:tokens]):
                return
            rows.append((row, slot, tokens))
        self._storing = [each for each in rows if not self._sums[each[1]]]
        if not self._storing:
            given_BSD = torch.zeros(*ids_BS.shape, self._width, dtype=self._dtype)  # pads are read by nobody
            for row, slot, tokens in rows:
                given_BSD[row, :tokens] = self._of(slot)
            self._given = given_BSD.to(ids_BS.device)

    def _instead(self, forward: Any, *, first: bool) -> Any:
        """A frozen layer that hands on what is given, where something is."""

        def layer(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._given is None:
                return forward(hidden, *args, **kwargs)
            return self._given if first else hidden

        return layer

    def _store(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden_BSD = args[0] if args else kwargs["hidden_states"]
        if self._storing and hidden_BSD.dtype != self._dtype:
            raise TrainingError(
                f"hidden states are {hidden_BSD.dtype}, the frozen layers {self._dtype}; train without epoch_cache"
            )
        for row, slot, tokens in self._storing:
            self._of(slot).copy_(hidden_BSD[row, :tokens].detach())
            self._sums[slot] = _sum(self._of(slot))
        self._storing = []


def _is_of(about: Path, known: str) -> bool:
    """Whether a file says that the states beside it are of these sequences and layers."""
    try:
        return json.loads(read_text(about))["of"] == known
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # none, or not what was written
        return False


def _sum(hidden_SD: Tensor) -> int:
    """Checksum of hidden states; never 0, which stands for none."""
    return 1 + zlib.crc32(tensor_bytes(hidden_SD))


def _reserve(path: Path, size: int) -> None:
    """A file of this size whose room on the disk is taken; writing to a map of a file for which there is none kills."""
    missing = size - (path.stat().st_size if path.is_file() else 0)
    free = shutil.disk_usage(path.parent).free
    if missing > free:
        raise StorageError(
            f"{path}: epoch_cache = true takes {size / 2**20:,.0f} MiB of disk, and {free / 2**20:,.0f} MiB are free; "
            "make room, or leave epoch_cache out"
        )
    with path.open("ab") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
