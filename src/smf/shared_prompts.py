"""lm-evaluation-harness's model of a Hugging Face model, reading the prompt of a question once for all its choices."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

Request = tuple[tuple[str, str], list[int], list[int]]  # the texts, and the tokens of prompt and continuation


Base: Any = HFLM  # whose decorators hide its type


class SharedPromptLM(Base):
    """HFLM with the same log-probabilities, up to rounding, for less work.

    The choices of a question differ in their last tokens only. The prompt is read once, its keys and values are handed
    to all choices, and logits are made of the choices alone. Questions of like length go together. What shares its
    prompt with no other continuation, or is too long for the model, HFLM itself scores; so it does where a model keeps
    more of a prompt than keys and values (linear attention, state spaces).
    """

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        """The text of tokens; None of none, as HFLM asks for the text to stop at where nothing ends a sequence."""
        return None if tokens is None else super().tok_decode(tokens, skip_special_tokens)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Ends at the tokenizer's end token, too: not every model's generation config says it, and no text shows it."""
        config = self.model.generation_config
        known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ends = sorted({*known, self.tokenizer.eos_token_id} - {None})
        return super()._model_generate(context, max_length, stop, **({"eos_token_id": ends} if ends else {}) | options)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each request the log-probability of its continuation, and whether greedy decoding would say it."""
        found: dict[int, tuple[float, bool]] = {}
        groups = self._groups(requests)
        with tqdm(total=sum(map(len, groups)), desc="choices", leave=False, disable=disable_tqdm) as bar:
            for batch in _batches(groups, int(override_bs or self.batch_size)):
                places = [place for group in batch for place in group]
                scores = self._score([[requests[place] for place in group] for group in batch])
                if scores is None:
                    break
                for place, score in zip(places, scores, strict=True):
                    found[place] = score
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], score)
                bar.update(len(places))
        alone = [place for place in range(len(requests)) if place not in found]
        if alone:
            rest = super()._loglikelihood_tokens([requests[place] for place in alone], disable_tqdm, override_bs)
            found |= zip(alone, rest, strict=True)
        return [found[place] for place in range(len(requests))]

    def _groups(self, requests: Sequence[Request]) -> list[list[int]]:
        """Places of the requests that share a prompt and fit the model; those of like length are neighbours."""
        if self.backend != "causal" or self.batch_size == "auto" or "past_key_values" not in self._known():
            return []
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for place, (_, prompt, _) in enumerate(requests):
            by_prompt.setdefault(tuple(prompt), []).append(place)
        shared = []
        for prompt, places in by_prompt.items():
            longest = max(len(requests[place][2]) for place in places)
            if len(places) > 1 and len(prompt) + longest <= self.max_length + 1:
                # continuations first: of a question there are several, each padded to the longest of its batch
                shared.append((longest.bit_length(), len(prompt), places))
        return [places for *_, places in sorted(shared, reverse=True)]

    @torch.no_grad()
    def _score(self, questions: Sequence[Sequence[Request]]) -> list[tuple[float, bool]] | None:
        """Scores of all continuations C of the questions Q, by question; None where none can share its prompt."""
        prompts = [torch.tensor(question[0][1]) for question in questions]
        continuations = [torch.tensor(request[2]) for question in questions for request in question]
        owner_C = torch.tensor([q for q, question in enumerate(questions) for _ in question], device=self.device)
        # pads on the left, so that each prompt ends where its choices begin
        ids_QP = pad_sequence(prompts, batch_first=True, padding_side="left").to(self.device)
        lengths_Q = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        mask_QP = torch.arange(ids_QP.shape[1], 0, -1, device=self.device) <= lengths_Q[:, None]
        read = self._forward(ids_QP, mask_QP, (mask_QP.cumsum(-1) - 1).clamp(min=0), last_only=True)
        if not _keys_and_values_alone(getattr(read, "past_key_values", None)):
            return None
        next_CS = pad_sequence(continuations, batch_first=True, padding_value=-1).to(self.device)
        scores_C, greedy_C = self._compare(read.logits[owner_C, -1:], next_CS[:, :1])
        longer_R = (next_CS[:, 1:2] >= 0).any(-1).nonzero()[:, 0]  # continuations of more than one token
        if len(longer_R):
            cache, owner_R, next_RS = read.past_key_values, owner_C[longer_R], next_CS[longer_R]
            cache.batch_select_indices(owner_R)
            positions_RS = lengths_Q[owner_R, None] + torch.arange(next_RS.shape[1] - 1, device=self.device)
            mask_RX = torch.cat([mask_QP[owner_R], next_RS[:, 1:] >= 0], 1)
            logits_RSV = self._forward(next_RS[:, :-1].clamp(min=0), mask_RX, positions_RS, cache=cache).logits
            scores_R, greedy_R = self._compare(logits_RSV, next_RS[:, 1:])
            scores_C[longer_R] += scores_R
            greedy_C[longer_R] &= greedy_R
        return list(zip(scores_C.tolist(), greedy_C.tolist(), strict=True))

    def _compare(self, logits_CSV: Tensor, next_CS: Tensor) -> tuple[Tensor, Tensor]:
        """Summed log-probability `[C]` of the tokens that come next (-1: none), and whether all are the likeliest."""
        here_CS = next_CS >= 0
        logits_LV, next_L = logits_CSV[here_CS], next_CS[here_CS]
        log_p_L = -F.cross_entropy(logits_LV.to(self.softmax_dtype or logits_LV.dtype), next_L, reduction="none")
        sums_C = log_p_L.new_zeros(here_CS.shape).masked_scatter(here_CS, log_p_L).sum(-1)
        return sums_C, torch.ones_like(here_CS).masked_scatter(here_CS, logits_LV.argmax(-1) == next_L).all(-1)

    def _known(self) -> Mapping[str, Any]:
        """What the model's forward takes."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return inspect.signature(model.forward).parameters

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None, last_only: bool = False) -> Any:
        """The model on `ids`; its forward takes what it knows of positions and of which logits are wanted."""
        wanted = {"position_ids": positions} | ({"logits_to_keep": 1} if last_only else {})
        known = self._known()
        options = {name: value for name, value in wanted.items() if name in known}
        device_type, dtype = self.device.type, self.mixed_precision_dtype
        with torch.autocast(device_type=device_type, dtype=dtype, enabled=dtype is not None):
            return self.model(
                input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True, **options
            )


def _keys_and_values_alone(cache: Any) -> bool:
    """Whether the rows of a cache can be picked: keys and values can, the states of linear attention cannot."""
    layers = getattr(cache, "layers", [])
    picked = [hasattr(layer, "batch_select_indices") and not hasattr(layer, "conv_states") for layer in layers]
    return bool(picked) and all(picked)


def _batches(groups: Sequence[list[int]], size: int) -> list[list[list[int]]]:
    """Neighbouring groups together, `size` members at most; the prompt of a larger group is read once for each part."""
    batches: list[list[list[int]]] = []
    count = size
    for whole in groups:
        for group in (whole[i : i + size] for i in range(0, len(whole), size)):
            if count + len(group) > size:
                batches.append([])
                count = 0
            batches[-1].append(group)
            count += len(group)
    return batches
