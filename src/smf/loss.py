"""The loss: cross-entropy of each next token, whose logits are made for some positions at a time."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import TrainingError
from .memory import evaluation_mode

AT_ONCE = 2**25  # numbers of logits: 128 MiB in float32; products of fewer positions are slower (docs/log.md)
AT_ONCE_ON_GPU = 2**27  # larger products suit it, and its bandwidth the sums over parts; not measured there


def token_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Cross-entropy `[B, S - 1]` of each next token, in at least float32; zero where there is no label.

    Without gradients it works on some positions at a time, so that it needs little beside the logits.
    """
    next_BS = labels_BS[:, 1:]
    labelled_BS = next_BS != -100
    if torch.is_grad_enabled():
        losses_L = _cross_entropy(logits_BSV[:, :-1][labelled_BS], next_BS[labelled_BS])  # the L labelled positions
    else:
        places = places_of(labelled_BS, logits_BSV)
        losses_L = torch.cat([_cross_entropy(logits_BSV[at], next_BS[at]) for at in places])
    return losses_L.new_zeros(next_BS.shape).masked_scatter(labelled_BS, losses_L)


class MeanTokenLoss:
    """Cross-entropy summed over labels and divided by the labels of the whole step, over all its micro-batches.

    It is Trainer's `compute_loss_func`. As a context, it keeps the logits of a whole batch from being made, which take
    more memory than anything else where the vocabulary is large: in training the model makes them of the first
    position alone, and the loss those of positions with a label, `AT_ONCE` numbers at a time, with their gradient at
    once. The values are the same, up to the order of sums. A model whose logits are more than a linear layer of its
    hidden states (capped, scaled, a head with an adapter) makes them all, as it does outside of the context.

    Args:
        model: that is trained, before anything is wrapped around it.
    """

    def __init__(self, model: Any):
        self._model = model
        self._head: nn.Linear | None = None
        self._kept: tuple[Tensor, torch.autocast] | None = None

    def __enter__(self) -> MeanTokenLoss:
        if self._head is not None:
            raise TrainingError("this loss is open already; make another MeanTokenLoss, or close this one first")
        self._head = _plain_head(self._model)
        if self._head is not None:
            self._handle = self._head.register_forward_pre_hook(self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._head is not None:
            self._handle.remove()
        self._head = self._kept = None

    def _keep(self, head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if not (self._model.training and torch.is_grad_enabled()):
            self._kept = None
            return None
        if self._kept is not None:
            raise TrainingError("two forward passes in training, and no loss of the first; take it before the second")
        (hidden_BSD,) = args
        kind = hidden_BSD.device.type
        as_now = torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
        self._kept = (hidden_BSD, as_now)
        return (hidden_BSD[:, :1],)

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a micro-batch that the model has just read.

        Args:
            outputs: of the model.
            labels: `[B, S]`; -100 where there is none.
            num_items_in_batch: labels of the whole step; None: those of this micro-batch.

        Raises:
            TrainingError: where the labels are not those of the tokens that the model read last.
        """
        next_BS = labels[:, 1:]
        labelled_BS = next_BS != -100
        count = labelled_BS.sum() if num_items_in_batch is None else num_items_in_batch
        kept = self.taken()
        read = outputs.logits if kept is None else kept[0]
        if read.shape[:2] != labels.shape:
            raise TrainingError(f"labels {list(labels.shape)}, but the model read tokens {list(read.shape[:2])} last")
        if kept is None:
            return token_loss(outputs.logits, labels).sum() / count
        hidden_BSD, head, as_then = kept
        with as_then:
            return summed_loss(hidden_BSD[:, :-1][labelled_BS], head, next_BS[labelled_BS]) / count

    def taken(self) -> tuple[Tensor, nn.Linear, torch.autocast] | None:
        """What the model has just kept from its head, the head, and its precision; None where it made all logits."""
        kept, self._kept = self._kept, None
        return None if kept is None or self._head is None else (kept[0], self._head, kept[1])


def summed_loss(hidden_LD: Tensor, head: nn.Linear, next_L: Tensor) -> Tensor:
    """Summed cross-entropy of `head(hidden_LD)` with the tokens that come next, in at least float32.

    Its gradient is computed with it, part by part, so no graph of the logits is kept. PyTorch's own
    `linear_cross_entropy` does the same since 2.13, and rounds the sum to the dtype of the hidden states: of a step in
    float16 it may be infinite, in bfloat16 it has three digits.
    """
    return _SummedLoss.apply(hidden_LD, head.weight, head.bias, next_L)  # type: ignore[return-value]


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_LD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, next_L: Tensor) -> Tensor:
        ctx.dtype, wide = hidden_LD.dtype, _wide(hidden_LD.dtype)
        given = zip((hidden_LD, weight_VD, bias_V), ctx.needs_input_grad[:3], (ctx.dtype, wide, wide), strict=True)
        grads = [torch.zeros_like(t, dtype=as_) if t is not None and wanted else None for t, wanted, as_ in given]
        for_hidden_LD, for_weight_VD, for_bias_V = grads
        total = hidden_LD.new_zeros((), dtype=wide)
        positions = positions_at_once(len(weight_VD), weight_VD.device.type)
        for part in (slice(at, at + positions) for at in range(0, len(hidden_LD), positions)):
            here_PD, next_P1 = hidden_LD[part], next_L[part, None]
            p_PV = F.linear(here_PD, weight_VD, bias_V).to(wide)  # logits; probabilities in their place, to hold one
            p_PV -= p_PV.amax(1, keepdim=True)
            of_next_P1 = p_PV.gather(1, next_P1)
            sum_P1 = p_PV.exp_().sum(1, keepdim=True)
            total += (sum_P1.log() - of_next_P1).sum()
            # with respect to logits: what is likely, less what came
            for_logits_PV = p_PV.div_(sum_P1).scatter_add_(1, next_P1, -torch.ones_like(next_P1, dtype=wide))
            if for_bias_V is not None:
                for_bias_V += for_logits_PV.sum(0)
            for_logits_PV = for_logits_PV.to(here_PD.dtype)
            if for_hidden_LD is not None:
                for_hidden_LD[part] = for_logits_PV @ weight_VD
            if for_weight_VD is not None:
                _add_product_(for_weight_VD, for_logits_PV.T, here_PD)
            del p_PV, for_logits_PV  # before the next part's are made
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # the head's gradient of a sum may be too large for float16, which that of the mean is not
        return *(None if each is None else (each * grad).to(ctx.dtype) for each in ctx.saved_tensors), None


def _add_product_(sum_VD: Tensor, a_VP: Tensor, b_PD: Tensor) -> None:
    """Add `a @ b` to a sum that may be wider, so that many parts do not swallow what is small."""
    if sum_VD.dtype == b_PD.dtype:
        sum_VD.addmm_(a_VP, b_PD)
    else:
        sum_VD += a_VP @ b_PD


def _plain_head(model: Any) -> nn.Linear | None:
    """The layer whose outputs are the model's logits, where it is nothing but linear."""
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = bare.get_output_embeddings() if hasattr(bare, "get_output_embeddings") else None
    # quantised or adapted, moved about by accelerate, or sharded
    if type(head) is not nn.Linear or "forward" in vars(head) or is_traceable_wrapper_subclass(head.weight):
        return None
    made: list[tuple[Tensor, int]] = []
    handle = head.register_forward_hook(lambda *call: made.append((call[2], call[2]._version)), prepend=True)
    try:
        with torch.no_grad(), evaluation_mode(model):
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)).logits
    except Exception:  # it needs more than tokens: whatever that is, training gives it, or fails with its own words
        return None
    finally:
        handle.remove()
    untouched = len(made) == 1 and logits is made[0][0] and logits._version == made[0][1]
    return head if untouched else None


def places_of(mask_BS: Tensor, logits_BSV: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The places of a mask, in order, `positions_at_once` at a time; of an empty one, none once."""
    at_once = positions_at_once(logits_BSV.shape[-1], logits_BSV.device.type)
    return [(places[:, 0], places[:, 1]) for places in mask_BS.nonzero().split(at_once)]


def positions_at_once(vocabulary: int, device: str) -> int:
    """Positions of which whole vocabularies are worked on at a time."""
    return max(1, (AT_ONCE if device == "cpu" else AT_ONCE_ON_GPU) // vocabulary)


def _cross_entropy(logits_LV: Tensor, next_L: Tensor) -> Tensor:
    return F.cross_entropy(logits_LV.to(_wide(logits_LV.dtype)), next_L, reduction="none")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
