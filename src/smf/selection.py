"""Which rows a step updates: how often each was read, how often general text reads it, and a rule that scores it.

Rules follow arXiv 2605.03229 (kl) and arXiv 2510.15103 (tfidf). Shape letters: R rows read, N rows of the table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .background import Background
from .errors import ConfigError
from .memory import Factors
from .rows import find

Rule = Callable[..., Tensor]
ReadsKind = Literal["hits", "gradient"]
EPSILON = 1e-8  # of the papers' kl score


# -- rules ------------------------------------------------------------------------------------------------------------


def _share(c_R: Tensor) -> Tensor:
    return c_R / c_R.sum().clamp_min(torch.finfo(c_R.dtype).tiny)  # gradient reads may all be zero


def kl(c_R: Tensor, b_R: Tensor, df_R: Tensor, *, b_total: int, n_docs: int, generator: torch.Generator) -> Tensor:
    """`p log((p + e) / (q + e))`: the row's term of KL(step || background) (arXiv 2605.03229)."""
    p_R, q_R = _share(c_R), (b_R + 1) / b_total
    return p_R * torch.log((p_R + EPSILON) / (q_R + EPSILON))


def tfidf(c_R: Tensor, b_R: Tensor, df_R: Tensor, *, b_total: int, n_docs: int, generator: torch.Generator) -> Tensor:
    """`p log((B + 1) / (df + 1))` over B background documents (arXiv 2510.15103)."""
    return _share(c_R) * torch.log((n_docs + 1) / (df_R + 1))


def tf(c_R: Tensor, b_R: Tensor, df_R: Tensor, *, b_total: int, n_docs: int, generator: torch.Generator) -> Tensor:
    """`p`: the most read rows, whatever general text reads (a control)."""
    return _share(c_R)


def random(c_R: Tensor, b_R: Tensor, df_R: Tensor, *, b_total: int, n_docs: int, generator: torch.Generator) -> Tensor:
    """Uniform over the rows read (a control)."""
    return torch.rand(len(c_R), generator=generator, dtype=torch.float64).to(c_R.device)


RULES: dict[str, Rule] = {"kl": kl, "tfidf": tfidf, "tf": tf, "random": random}
NEED_BACKGROUND = ("kl", "tfidf")


def find_rule(rule: str | Rule) -> Rule | None:
    """The function of a rule's name, a user's own function as it is, or None for `all`."""
    if callable(rule):
        try:
            inspect.signature(rule).bind(None, None, None, b_total=1, n_docs=0, generator=None)
        except TypeError as error:
            raise ConfigError(
                f"the rule must be callable as rule(c_R, b_R, df_R, *, b_total, n_docs, generator): {error}"
            ) from error
        return rule
    if rule == "all":
        return None
    if rule not in RULES:
        raise ConfigError(
            f"rule={rule!r} is not known; use one of {[*RULES, 'all']} or a function like smf.selection.kl"
        )
    return RULES[rule]


# -- reads ------------------------------------------------------------------------------------------------------------


@dataclass
class Reads:
    """Reads of one layer: `rows_R` ascending, what the rule counts of each, and how often each was hit.

    Args:
        rows_R: ids of the rows read.
        c_R: hits, or gradient mass, in float64.
        hits_R: hits, in int64.
    """

    rows_R: Tensor
    c_R: Tensor
    hits_R: Tensor


def count_reads(factors: list[Factors], kind: ReadsKind, device: torch.device) -> Reads:
    """Count the reads of some backward passes; pads never count.

    Args:
        factors: of one layer.
        kind: "hits" counts 1 a read; "gradient" counts `w * ||dL/do||`, the size of what the read adds to the row's
            gradient.
        device: where the counts live, needed when there are no factors.
    """
    parts = []  # of each pass: the rows it read, ascending, how often, and what each read counts, row by row
    for f in factors:
        ids, places = f.by_row
        if f.mask_T is not None:
            real = f.mask_T[places // f.idx_TR.shape[1]]
            ids, places = ids[real], places[real]
        rows, hits = torch.unique_consecutive(ids, return_counts=True)
        amounts = (f.w_TR * f.g_TD.norm(dim=-1, keepdim=True)).flatten()[places] if kind == "gradient" else None
        parts.append((rows.long(), hits, amounts))
    none = torch.empty(0, dtype=torch.int64, device=device)
    rows_R = torch.unique(torch.cat([none, *(rows for rows, _, _ in parts)]))
    hits_R = torch.zeros_like(rows_R)
    c_R = torch.zeros(len(rows_R), dtype=torch.float64, device=rows_R.device)
    for rows, hits, amounts in parts:
        place = find(rows_R, rows)[0]
        hits_R[place] += hits
        if amounts is None:
            c_R[place] += hits
        else:  # in the order of the reads, so that how a step is cut into passes changes no bit
            c_R.index_add_(0, place.repeat_interleave(hits), amounts.double())
    return Reads(rows_R, c_R, hits_R)


def hub_share(hits_R: Tensor, n_rows: int) -> float:
    """Share of the hits that fall on hubs: the one percent of the table's rows that are hit most."""
    total = int(hits_R.sum())
    return int(hits_R.topk(min(len(hits_R), max(1, n_rows // 100))).values.sum()) / total if total else 0.0


def select_rows(reads: Reads, scores_R: Tensor, t: int) -> Tensor:
    """The `t` best rows by score, ascending by id; ties go to the lower id, negative scores are eligible."""
    order_R = torch.sort(scores_R, descending=True, stable=True).indices  # stable: equal scores stay ascending by id
    return reads.rows_R[order_R[:t]].sort().values


def score_rows(
    rule: Rule, reads: Reads, layer: int, background: Background | None, n_rows: int, generator: torch.Generator
) -> Tensor:
    """Scores `[R]` of the rows read; without a background every row counts as never read by general text.

    Rows that the background spares are below all others, whatever the rule.
    """
    device = reads.c_R.device
    if background is None:
        b_R, df_R = torch.zeros_like(reads.c_R), torch.zeros_like(reads.c_R)
        b_total, n_docs = n_rows, 0
    else:
        b_R, df_R = background.at(layer, reads.rows_R)
        b_total, n_docs = background.layers[layer].total + n_rows, background.n_docs
    scores_R = rule(reads.c_R, b_R, df_R, b_total=b_total, n_docs=n_docs, generator=generator)
    if not isinstance(scores_R, Tensor) or scores_R.shape != reads.c_R.shape:
        got = tuple(scores_R.shape) if isinstance(scores_R, Tensor) else type(scores_R).__name__
        raise ConfigError(f"the rule returned {got}; it must return one score for each of {len(reads.c_R)} rows read")
    if bool(scores_R.isnan().any()):
        raise ConfigError(f"the rule returned NaN for {int(scores_R.isnan().sum())} of {len(scores_R)} rows")
    if background is not None and len(background.layers[layer].spared):
        scores_R = scores_R.to(device, torch.float64).masked_fill(background.spared(layer, reads.rows_R), -torch.inf)
    return scores_R.to(device)
