"""A method of one's own: rows are weighed against the training examples themselves, in place of general text.

arXiv 2510.15103 (section 5) found that such a background protects less. In a recipe:

    [methods.smf-tfidf-training]
    kind = "training_background:rows"
    rule = "tfidf"
    rows_per_step = 2048
    lr = 0.8
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from smf import methods
from smf.data import Loaded
from smf.methods import Prepared
from smf.recipe import Method, Recipe


def rows(model: Any, method: Method, recipe: Recipe, loaded: Loaded) -> Prepared:
    """Rows of a memory, as kind = "smf", with as many training examples for a background as the recipe has texts."""
    texts = [loaded.tokenizer.decode(example.ids) for example in loaded.train[: len(loaded.background)]]
    method = replace(method, kind="smf")
    return methods.smf(methods.attach(model, method, recipe), method, recipe, replace(loaded, background=texts))
