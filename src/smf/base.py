"""The base of a recipe: its configuration, tokenizer and weights, from a folder, the hub or the embedded world."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import methods, world
from .decoder import DecoderLayers, find_decoder, positions_of
from .errors import ConfigError, NoSuchLayerError, refusing
from .recipe import Recipe
from .selection import find_rule
from .sources import resolved


def check_models(recipe: Recipe) -> None:
    """Refuse examples longer than the base reads, memory options that do not fit it, and functions that do not exist.

    Looks at the base's config only.
    """
    config = base_config(recipe)
    check_length(recipe)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoder = find_decoder(AutoModelForCausalLM.from_config(config))
    for name in recipe.methods:
        with naming_layers(recipe, name):
            _check_method(recipe, name, decoder)


def check_length(recipe: Recipe) -> None:
    """Refuse examples longer than the base reads."""
    length, longest = recipe.train.max_length, positions(recipe)
    if length > longest:
        raise ConfigError(
            f"[train] max_length = {length}, but the base reads {longest} tokens at most; set it to {longest} or less"
        )


def _check_method(recipe: Recipe, name: str, decoder: DecoderLayers) -> None:
    method = recipe.methods[name]
    try:
        methods.find_method(method.kind)
        if method.kind in methods.BESIDE_THE_MLP:
            find_rule(method.rule)
            memory = methods.memory_config(recipe, method)
            decoder.mlp_names(decoder.chosen(memory.layers), replace=memory.mode == "replacement")
        elif method.layers is not None and ":" not in method.kind:  # what they are to one's own function is its affair
            decoder.chosen(method.layers)
    except ConfigError as error:
        raise ConfigError(f"[methods.{name}]: {error}") from error


@contextlib.contextmanager
def naming_layers(recipe: Recipe, name: str) -> Iterator[None]:
    """Where a method's layers do not fit the base: say which key of which table names them."""
    try:
        yield
    except NoSuchLayerError as error:
        method = recipe.methods[name]
        table, options = (f"methods.{name}.memory", method.memory) if method.memory else ("memory", recipe.memory)
        table, layers = (f"methods.{name}", method.layers) if method.layers is not None else (table, options.layers)
        if layers is None:
            raise
        other = "" if method.layers is not None else ", or methods.NAME.layers"
        raise ConfigError(
            f"[{table}] layers = {layers}: {error}; set {table}.layers{other}; [-1] is the last layer"
        ) from error


def load_tokenizer(recipe: Recipe) -> Any:
    """The base's tokenizer; ConfigError where it has tokens of which the base has no embedding."""
    tokenizer = _from_base(AutoTokenizer, recipe)
    _check_tokens(tokenizer, recipe)
    # as said already: what is longer than the base reads is cut, or refused in our own words
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _check_tokens(tokenizer: Any, recipe: Recipe) -> None:
    """Refuse tokens that the base cannot read, which files without an `eos_token` can get from their class.

    Tokens that were added beside the vocabulary, as for images, may be more than a base of text reads: of these, those
    that begin, end and pad sequences are looked at. One for the unknown, which classes add by themselves, is never
    written by a tokenizer of bytes.
    """
    rows = getattr(base_config(recipe).get_text_config(), "vocab_size", None)
    used = {f"{name}_token": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    used |= {"last token": tokenizer.vocab_size - 1}
    for name, id in used.items():
        if rows is not None and id is not None and id >= rows:
            raise ConfigError(
                f"base = {recipe.base!r}: the tokenizer's {name} {tokenizer.convert_ids_to_tokens(id)!r} has the id "
                f"{id}, but the base's embedding has {rows} rows (the tokenizer has {len(tokenizer)} tokens). Name a "
                "token that the base knows in tokenizer_config.json, or save the base with a row for each token "
                "(model.resize_token_embeddings)"
            )


def load_base(recipe: Recipe) -> Any:
    """The base in evaluation mode, on the GPU where there is one."""
    model = _from_base(AutoModelForCausalLM, recipe, dtype=getattr(torch, recipe.dtype))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _from_base(loader: Any, recipe: Recipe, **options: Any) -> Any:
    if not recipe.base:
        raise ConfigError("the recipe names no base; give --base a model folder or a hub name")
    if recipe.base == "world":
        return loader.from_pretrained(world.BASE, **options)
    _check_name(recipe)
    with refusing(ConfigError, f"base = {recipe.base!r} cannot be loaded as a causal language model"):
        # pickles are read as weights only, and a repository's own code is not run, which transformers would ask about
        return loader.from_pretrained(recipe.base, revision=recipe.revision, trust_remote_code=False, **options)


def _check_name(recipe: Recipe) -> None:
    """Refuse a path at which there is no folder."""
    looks_like_path = recipe.base.startswith((".", "/", "~")) or recipe.base.count("/") > 1
    if looks_like_path and not Path(recipe.base).is_dir():
        raise ConfigError(f"base = {recipe.base!r}: there is no model folder; give --base a folder or a hub name")


def base_config(recipe: Recipe) -> Any:
    """The base's configuration."""
    return _from_base(AutoConfig, recipe)


def positions(recipe: Recipe) -> int:
    """Tokens that the base reads at most; a million where its configuration does not say."""
    return positions_of(base_config(recipe))


def on_this_machine(recipe: Recipe) -> bool:
    """Whether the base is a folder, the embedded world's, or in the hub's cache; ConfigError where it can be none."""
    from huggingface_hub import try_to_load_from_cache

    if recipe.base == "world" or Path(recipe.base).is_dir():
        return True
    _check_name(recipe)
    with refusing(ConfigError, f"base = {recipe.base!r} is neither a model folder nor a name on the hub"):
        return isinstance(try_to_load_from_cache(recipe.base, "config.json", revision=recipe.revision), str)


def resolved_base(recipe: Recipe) -> str | None:
    """The commit hash of the base on the hub; None for a folder and for the embedded world's."""
    if recipe.base == "world" or Path(recipe.base).is_dir():
        return None
    return resolved(recipe.base, recipe.revision, "model")
