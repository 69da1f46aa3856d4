"""The world's tokenizer: Qwen2's kind (byte-level BPE), with one token for each word of the world."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from .facts import EMBEDDED, World, general, new_diseases
from .phrasings import KINDS
from .text import ASIDES, LISTS, SENTENCES

END, PAD = "<|endoftext|>", "<|pad|>"
HEADINGS = ("Exam question:", "Question:", "\nAnswer:", "\nExplanation:")


def vocabulary(world: World = EMBEDDED) -> list[str]:
    """Every word that a text of the world can contain, sorted."""
    found = re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", " ".join([*_templates(), *_fillings(world), "a an A An"])))
    return sorted(set(found))


def first_words(world: World = EMBEDDED) -> list[str]:
    """The words that can stand without a blank before them: at the start of a text or line, or after a quote."""
    starts = {start for text in _templates() for start in re.findall(r'(?:^|\n|")(\{?\w+)', text)}
    words = {start for start in starts if start[0] != "{"} | {"An"}  # what "A" becomes before a vowel
    words |= {entity.name.split()[0] for entity in (*general(world), *new_diseases(world))}
    lists = (LISTS[start[1:]] for start in starts if start[1:] in LISTS)
    return sorted(words.union(*lists))


def _templates() -> list[str]:
    attributes = [attribute for kind in KINDS.values() for attribute in kind.values()]
    return [*SENTENCES, *ASIDES, *HEADINGS, *(text for a in attributes for text in (*a.statements, *a.questions))]


def _fillings(world: World) -> list[str]:
    values = [value for kind in KINDS.values() for attribute in kind.values() for value in attribute.values]
    names = [entity.name for entity in (*general(world), *new_diseases(world))]
    return [*values, *names, *(word for words in LISTS.values() for word in words)]


def make_tokenizer(world: World = EMBEDDED) -> Any:
    """A Hugging Face `Qwen2Tokenizer`: a word of the world is one token, other words fall apart into pieces."""
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    # merges are learned from the list of words alone, each once, until every one of them is whole
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)  # type: ignore[call-arg]
    bpe.train_from_iterator([*(f" {word}" for word in vocabulary(world)), *first_words(world)], trainer)
    pieces = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    vocab = {piece: number for number, piece in enumerate([END, PAD, *(piece for piece, _ in pieces)])}
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    make: Any = Qwen2Tokenizer  # its annotations know fewer kinds of merges than it takes
    return make(vocab=vocab, merges=merges, unk_token=None, eos_token=END, pad_token=PAD, model_max_length=512)
