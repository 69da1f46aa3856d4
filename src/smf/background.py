"""The background: how often general text reads each row of each memory layer."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sized
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .errors import BackgroundError, refusing
from .files import read_tensors, write_tensors
from .fingerprint import json_hash, tensor_bytes, tensors_hash
from .memory import MemoryShape, ProductKeyMemory, evaluation_mode, memory_layers, unwrap
from .rows import find

FORMAT = 1
PIECE = 2**20  # rows that are checked at a time
SEARCH = ("query_weight", "query_bias", "keys")  # parameters that decide which rows are read


@dataclass
class LayerCounts:
    """Rows of one layer that the background read: ids ascending, reads `b`, documents that read them `df`.

    `spared` are ids, ascending, of rows that are to be chosen last, whoever read them.
    """

    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    b: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    df: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    spared: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def total(self) -> int:
        """All reads of the layer."""
        return int(self.b.sum())

    def check(self, n_docs: int, where: str) -> None:
        """Refuse what `n_docs` documents cannot have left; sums of it then stay whole in float64."""
        columns = (self.ids, self.b, self.df, self.spared)
        whole = all(column.dtype == torch.int64 and column.dim() == 1 for column in columns)
        whole = whole and len(self.ids) == len(self.b) == len(self.df) and float(self.b.double().sum()) < 2**53
        ascending = whole and all(bool((ids.diff() > 0).all() & (ids >= 0).all()) for ids in (self.ids, self.spared))
        if not ascending or not bool(((self.df >= 1) & (self.df <= self.b) & (self.df <= n_docs)).all()):
            found = [(str(column.dtype), tuple(column.shape)) for column in columns]
            raise BackgroundError(
                f"{where}: ids, reads, documents and spared rows are {found}; expected int64, ids ascending from 0, "
                f"and for each id as many reads as documents or more, of {n_docs} documents"
            )

    def add(self, idx_TR: Tensor, doc_T: Tensor, n_rows: int) -> None:
        """Count the reads of tokens that belong to documents `doc_T`; a document comes in one call."""
        key = doc_T[:, None].long() * n_rows + idx_TR.long()
        pairs, hits = torch.unique(key, return_counts=True)  # one entry for each (document, row)
        ids = torch.cat([self.ids, (pairs % n_rows).cpu()])
        b = torch.cat([self.b, hits.cpu()])
        df = torch.cat([self.df, torch.ones(len(pairs), dtype=torch.int64)])
        self.ids, inverse = torch.unique(ids, return_inverse=True)
        self.b = torch.zeros_like(self.ids).index_add_(0, inverse, b)
        self.df = torch.zeros_like(self.ids).index_add_(0, inverse, df)


@dataclass(repr=False)
class Background:
    """How often general text reads each row.

    Args:
        layers: counts by decoder layer index.
        n_docs: documents read (B).
        identity: hash of base, config, query and keys that the counts belong to (not of the values).
        corpus: hash of the token ids that were read.
    """

    layers: dict[int, LayerCounts]
    n_docs: int
    identity: str
    corpus: str

    def __repr__(self) -> str:
        rows = {layer: len(counts.ids) for layer, counts in self.layers.items()}
        return f"Background(n_docs={self.n_docs}, rows_read={rows}, identity={self.identity[:12]!r})"

    def at(self, layer: int, rows_R: Tensor) -> tuple[Tensor, Tensor]:
        """`b_R` and `df_R` in float64 on the device of `rows_R`; rows that no document read have zero.

        Spared rows count as read by every document, as often as the most-read row is.
        """
        counts, device = self.layers[layer], rows_R.device
        b_R, df_R = torch.zeros(2, len(rows_R), dtype=torch.float64, device=device)
        if len(counts.ids):
            place_R, found_R = find(counts.ids.to(device), rows_R)
            b_R, df_R = (c.to(device)[place_R].double().masked_fill_(~found_R, 0.0) for c in (counts.b, counts.df))
        if len(counts.spared):
            spared_R = self.spared(layer, rows_R)
            b_R.masked_fill_(spared_R, float(counts.b.max()) if len(counts.b) else 1.0)
            df_R.masked_fill_(spared_R, float(self.n_docs))
        return b_R, df_R

    def spared(self, layer: int, rows_R: Tensor) -> Tensor:
        """Which of the rows are to be chosen last, `[R]`, bool."""
        return torch.isin(rows_R, self.layers[layer].spared.to(rows_R.device))

    def hubs(self, layer: int, n_rows: int) -> Tensor:
        """Ids, ascending, of the one percent of a layer's `n_rows` rows that general text reads most."""
        counts = self.layers[layer]
        order = torch.sort(counts.b, descending=True, stable=True).indices
        return counts.ids[order[: max(1, n_rows // 100)]].sort().values

    def protecting(self, rows: Mapping[int, Tensor]) -> Background:
        """A background that spares some rows: a step chooses them only where it read too few others.

        They also count as read by general text, by every document, as often as the most-read row is.

        Args:
            rows: ids by layer, such as `patch.rows` of an earlier training that the next one is to spare.
        """
        strange = sorted(set(rows) - set(self.layers))
        if strange:
            raise BackgroundError(
                f"rows of layers {strange} cannot be protected; the background is of {list(self.layers)}"
            )
        layers = dict(self.layers)
        for layer, given in rows.items():
            ids = torch.as_tensor(given).cpu()
            if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool or bool((ids < 0).any()):
                raise BackgroundError(f"rows of layer {layer} must be ids from 0; got {ids.dtype} {tuple(ids.shape)}")
            spared = torch.unique(torch.cat([layers[layer].spared, ids.long()]))
            layers[layer] = replace(layers[layer], spared=spared)
        written = tensors_hash({str(layer): layers[layer].spared for layer in rows})
        return replace(self, layers=layers, corpus=json_hash([self.corpus, written]))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        header = {"format": FORMAT, "n_docs": self.n_docs, "identity": self.identity, "corpus": self.corpus}
        tensors = {
            f"{layer}.{name}": getattr(counts, name)
            for layer, counts in self.layers.items()
            for name in ("ids", "b", "df", "spared")
        }
        write_tensors(Path(path), tensors, "background", header)

    @classmethod
    def load(cls, path: str | Path) -> Background:
        """Read a file written by `save`; anything else raises BackgroundError."""
        with refusing(BackgroundError, f"{path} is not a whole background"):
            check = functools.partial(_check_unread, str(path))
            header, tensors = read_tensors(Path(path), "background", FORMAT, BackgroundError, check)
            counts = {layer: LayerCounts(**columns) for layer, columns in sorted(_by_layer(tensors).items())}
            for layer, each in counts.items():
                each.check(header["n_docs"], f"{path}, layer {layer}")
            return cls(counts, *(header[key] for key in ("n_docs", "identity", "corpus")))


def _by_layer(named: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    layers: dict[int, dict[str, Any]] = {}
    for name, each in named.items():
        layer, _, column = name.partition(".")
        layers.setdefault(int(layer), {})[column] = each
    return layers


def _check_unread(path: str, header: dict[str, Any], slices: dict[str, Any]) -> None:
    """Refuse a file's header and sizes, then its rows a piece at a time: gigabytes of zeros take no room on a disk."""
    n_docs, identity, corpus = (header[key] for key in ("n_docs", "identity", "corpus"))
    if type(n_docs) is not int or not 0 <= n_docs < 2**53 or not isinstance(identity + corpus, str):
        raise BackgroundError(f"{path} says n_docs = {n_docs!r:.40}; expected a whole number, and two hashes")
    for layer, columns in _by_layer(slices).items():
        found = {column: (each.get_dtype(), each.get_shape()) for column, each in columns.items()}
        rows = {size[0] for column, (_, size) in found.items() if column != "spared" and len(size) == 1}
        if len(rows) != 1 or any(kind != "I64" or len(size) != 1 for kind, size in found.values()):
            raise BackgroundError(f"{path}, layer {layer}: it holds {found}; expected int64, of equal length")
        for start in range(0, max(size[0] for _, size in found.values()), PIECE):
            here = {c: each[start : start + PIECE] for c, each in columns.items() if found[c][1][0] > start}
            LayerCounts(**here).check(n_docs, f"{path}, layer {layer}")


def batches_of_texts(texts: Iterable[Any], tokenizer: Any, max_length: int, batch_size: int) -> Iterable[dict]:
    """Tokenise texts and pad them on the right; a text without tokens is left out."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked, so any id will do
    rows: list[list[int]] = []
    for text in texts:
        if not isinstance(text, str):
            raise BackgroundError(f"with a tokenizer, data must be texts; got {type(text).__name__}")
        ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        if ids:
            rows.append(ids)
        if len(rows) == batch_size:
            yield pad_right(rows, pad)
            rows = []
    if rows:
        yield pad_right(rows, pad)


def pad_right(rows: list[list[int]], pad: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` `[B, S]` of token lists."""
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
    }


def background_identity(memories: dict[int, ProductKeyMemory]) -> str:
    """Hash of what decides which rows a text reads: base, sizes, query and keys; not of the values."""
    return json_hash({n: read_by(m.base_hash, m.shape, {k: m.tensor(k) for k in SEARCH}) for n, m in memories.items()})


def read_by(base: str | None, shape: MemoryShape, search: dict[str, Tensor]) -> dict[str, Any]:
    """What decides which rows of one layer a text reads; `search` has the tensors of SEARCH."""
    sizes = {k: v for k, v in asdict(shape).items() if k in ("d", "n_keys", "heads", "knn", "mode")}
    return {"base": base, "shape": sizes, "search": tensors_hash(search, dtype=torch.float32)}


def read_background(
    model: nn.Module,
    data: Iterable[Any],
    *,
    tokenizer: Any = None,
    max_length: int = 512,
    batch_size: int = 8,
    adapter: str | None = None,
) -> Background:
    """Count how often general text reads each row.

    Args:
        model: a model with memory layers.
        data: texts (with a tokenizer), or batches: mappings with `input_ids` `[B, S]`, optionally `attention_mask`
            and `position_ids`. A document is one text, or one row of a batch.
        tokenizer: for texts.
        max_length: tokens read of a text.
        batch_size: texts a forward pass.
        adapter: whose memory; None for the active one.

    Raises:
        BackgroundError: no document, no tokenizer for texts, or no memory layer that reads.
    """
    if isinstance(data, (str, Mapping)) or not isinstance(data, Iterable):
        raise BackgroundError(f"data must be a list of texts or of batches; got one {type(data).__name__}")
    if batch_size < 1 or max_length < 1:
        raise BackgroundError(f"batch_size and max_length must be at least 1; got {batch_size} and {max_length}")
    model = unwrap(model)
    memories = memory_layers(model, adapter)
    if not memories:
        raise BackgroundError("the model has no memory layers; attach them first with get_peft_model(model, config)")
    items: Iterable[Any] = data
    if tokenizer is not None:
        items = batches_of_texts(data, tokenizer, max_length, batch_size)
    batches = -(-len(data) // batch_size) if tokenizer is not None and isinstance(data, Sized) else None
    counts = {layer: LayerCounts() for layer in memories}
    corpus, n_docs = hashlib.sha256(), 0
    try:
        with evaluation_mode(model):
            for batch in tqdm(items, total=batches, desc="background", unit="batch", leave=False):
                n_docs += _read_batch(model, memories, counts, _checked(batch), corpus)
                if n_docs and any(len(count.ids) == 0 for count in counts.values()):
                    raise BackgroundError("a memory layer read nothing; is its adapter disabled or inactive?")
    finally:
        for memory in memories.values():
            memory.observer = None
    if n_docs == 0:
        raise BackgroundError("the background has no document with a token in it; pass general texts or batches")
    return Background(counts, n_docs, background_identity(memories), corpus.hexdigest())


def _checked(batch: Any) -> dict[str, Tensor]:
    if isinstance(batch, str):
        raise BackgroundError("data holds texts; pass tokenizer=... or batches of input_ids and attention_mask")
    if not hasattr(batch, "keys") or "input_ids" not in batch:
        raise BackgroundError(f"a batch must be a mapping with input_ids; got {type(batch).__name__}")
    try:
        ids = torch.as_tensor(batch["input_ids"])
    except (TypeError, ValueError) as error:
        raise BackgroundError(f"input_ids must be one rectangular [B, S] of token ids: {error}") from error
    if ids.dim() != 2:
        raise BackgroundError(f"input_ids must be [B, S]; got {tuple(ids.shape)}")
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    if mask.shape != ids.shape:
        raise BackgroundError(f"attention_mask must be [B, S] = {tuple(ids.shape)}; got {tuple(mask.shape)}")
    positions = batch.get("position_ids")
    if positions is None:  # right for left padding too
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": torch.as_tensor(positions)}


class _AllRead(Exception):  # noqa: N818  (no error)
    """The highest memory has read: what the model would compute from here on is not needed."""


@torch.no_grad()
def _read_batch(model: nn.Module, memories: dict, counts: dict, batch: dict[str, Tensor], corpus: Any) -> int:
    device = next(model.parameters()).device
    ids, mask = batch["input_ids"], batch["attention_mask"] != 0
    for row, real in zip(ids.cpu(), mask.cpu(), strict=True):
        if bool(real.any()):
            corpus.update(hashlib.sha256(tensor_bytes(row[real].long())).digest())
    doc_T = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
    mask_T = mask.flatten().to(device)
    doc_T = doc_T.to(device)[mask_T]

    def observer(layer: int, memory: ProductKeyMemory):
        def count(idx_TR: Tensor) -> None:
            counts[layer].add(idx_TR[mask_T], doc_T, memory.shape.n_rows)
            if layer == max(memories):
                raise _AllRead

        return count

    for layer, memory in memories.items():
        memory.observer = observer(layer, memory)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    accepted = inspect.signature(base.forward).parameters
    inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.items()}
    inputs |= {"use_cache": False, "logits_to_keep": 1}  # where a memory is inactive and nothing stops the pass
    with contextlib.suppress(_AllRead):
        model(**{name: value for name, value in inputs.items() if name in accepted})
    return int(mask.any(-1).sum())
