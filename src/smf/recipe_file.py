"""Reading and writing recipes as TOML; every key is checked, and refused by name, before any work."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError, refusing
from .files import read_text
from .recipe import UNTRAINED, Method, Recipe, sources

SHIPPED = Path(__file__).parent / "recipes"
SMF = {"rule", "reads", "update", "select_every", "rows_per_step", "train", "heal", "lr_other", "layers", "memory"} | {
    "provenance",
    "betas",
}
KINDS: dict[str, set[str]] = {  # of methods, and the keys that each reads beside kind
    "base": set(),
    "smf": {"lr", "replay"} | SMF,
    "attached": {"layers", "memory"},
    "healed": {"layers", "memory"},
    "dense-addon": {"lr", "replay", "layers", "memory"},
    "lora": {"lr", "replay", "layers", "r", "alpha", "dropout", "options"},
    "oft": {"lr", "replay", "layers", "options"},
    "osf": {"lr", "replay", "layers", "options"},
    "shira": {"lr", "replay", "layers", "r", "options"},
    "full": {"lr", "replay"},
}
MOST_METHODS = 10_000  # that the axes of one method make: more were hardly meant, and billions would fill the memory
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # what no file of Windows can be named
LARGEST = 2**25  # bytes of a recipe: runs keep it with every method written out, each some hundred bytes
LONGEST = 200  # bytes of a method's name: a file's is 255 at most, and a run's folder adds a hash
SHORT = {"rows_per_step": "t", "layers": "layers", "n_keys": "keys"}  # in the names of methods made by axes


def find_recipe(path: str | Path) -> Path:
    """The file at `path`, or the shipped recipe of that file name."""
    candidates = [Path(path)]
    if Path(path).parent in (Path(), Path("recipes")):  # a mistyped folder must not find another file of that name
        candidates += [SHIPPED / Path(path).name, (SHIPPED / Path(path).name).with_suffix(".toml")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = sorted(p.name for p in SHIPPED.glob("*.toml"))
    raise ConfigError(f"no recipe at {path}, and none of that name is shipped; shipped recipes: {names}")


def load_recipe(path: str | Path, settings: Sequence[str] = (), **overrides: Any) -> Recipe:
    """Read and check a recipe; `overrides` replace its keys where they are not None.

    Args:
        path: of the file, or the name of a shipped one.
        settings: keys to replace, however deep: "train.max_length=256", "methods.lora.lr=3e-3", with values in TOML,
            texts also without quotes; methods that there are, or new ones with their kind.
        overrides: top-level keys to replace.

    Raises:
        ConfigError: for a file that is not TOML, an unknown key (with the nearest name), or a value that cannot be.
    """
    with refusing(ConfigError, f"the recipe {str(path)!r} cannot be read"):
        file = find_recipe(path)
        try:
            table = tomllib.loads(read_text(file, LARGEST))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not TOML: {error}") from error
        return _recipe(table, file.name, settings, overrides)


def _recipe(table: dict[str, Any], where: str, settings: Sequence[str], overrides: dict[str, Any]) -> Recipe:
    table |= {key: value for key, value in overrides.items() if value is not None}
    for setting in settings:
        given = _setting(setting)
        _refuse_new_methods(setting, given, table)
        _merge(table, given)
    methods = table.get("methods")
    if isinstance(methods, dict):
        table["methods"] = _named([m for item in methods.items() for m in _expanded(*item, where)], where)
    recipe = build(Recipe, table, where)
    try:
        recipe = dataclasses.replace(recipe, match=named(recipe.match, recipe.methods))
    except ConfigError as error:
        raise ConfigError(f"{where}: match = {recipe.match}: {error}") from error
    _check(recipe, where)
    return recipe


def _setting(text: str) -> dict[str, Any]:
    """The keys that one setting gives; where a key's value is a text, quotes around it can be left out."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        key, equals, value = text.partition("=")
        with contextlib.suppress(tomllib.TOMLDecodeError):
            table = tomllib.loads(f"{key} = {_value(value.strip())}") if equals else {}
            if _is_text(Recipe, table):
                return table
        raise ConfigError(
            f"--set {text!r} is not TOML: {error}. Quote what the shell would change: --set '{key.strip() or 'KEY'}="
            "\"TEXT\"' for a text, --set 'memory.layers=[0, 1]' for a list; --set train.max_length=256 needs no quotes"
        ) from error


def _is_text(hint: Any, value: Any) -> bool:
    """Whether what a recipe has at the place of `value`, a text within tables, is a text too."""
    if typing.get_origin(hint) is types.UnionType:  # X | None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if isinstance(value, dict):
        if not value:
            return False
        (key, inner), *_ = value.items()
        if typing.get_origin(hint) is dict:
            return _is_text(typing.get_args(hint)[1], inner)
        return dataclasses.is_dataclass(hint) and _is_text(typing.get_type_hints(hint).get(key), inner)
    return hint is str or typing.get_origin(hint) is Literal


def _refuse_new_methods(setting: str, given: dict[str, Any], table: dict[str, Any]) -> None:
    """A mistyped name must not make a method of defaults; a new one is given whole, with its kind."""
    known, methods = table.get("methods"), given.get("methods")
    if not isinstance(methods, dict) or not isinstance(known, dict):
        return
    for name, keys in methods.items():
        if name not in known and isinstance(keys, dict) and "kind" not in keys:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(
                f"--set {setting!r}: there is no method {name!r}{hint} There are {sorted(known)}. A new one needs its "
                f"kind: --set 'methods.{name}={{kind=\"smf\", lr=0.1}}'"
            )


def _merge(table: dict[str, Any], given: dict[str, Any]) -> None:
    """Replace keys of a table, and of the tables in it; an empty table replaces one that has keys."""
    for key, value in given.items():
        if value and isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value


def _expanded(name: str, method: Any, where: str) -> list[tuple[str, Any]]:
    """The methods that one table of a recipe stands for: of its axes every combination, each named for its values."""
    axes = method.get("axes") if isinstance(method, dict) else None
    if not axes:
        return [(name, method)]
    where = f"{where}: methods.{name}.axes"
    keys = [field.name for field in dataclasses.fields(Method) if field.name not in ("axes", "kind", "lr")]
    for key, values in axes.items() if isinstance(axes, dict) else [("axes", axes)]:
        if key not in keys or not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: {key} = {values!r}; expected lists of values for keys of {keys}")
    number = math.prod(map(len, axes.values()))
    if number > MOST_METHODS:
        raise ConfigError(f"{where}: these axes make {number:,} methods; expected {MOST_METHODS:,} at most")
    plain = {key: value for key, value in method.items() if key != "axes"}
    expanded = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        expanded.append(("-".join([name, *(_labelled(*item) for item in chosen.items())]), plain | chosen))
    return expanded


def _named(methods: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """The methods by name; a name is part of a folder's, and two methods cannot share one."""
    named: dict[str, Any] = {}
    for name, method in methods:
        bad = name.startswith(".") or any(mark in name for mark in "/\\") or not name.isprintable()
        if not name or bad or DEVICES.fullmatch(name) or len(name.encode()) > LONGEST:
            raise ConfigError(
                f"{where}: a method is named {name!r:.300}, but its runs' folders begin with that; expected a name of "
                f"1 to {LONGEST} bytes that does not begin with a dot, has no slash, backslash or control character, "
                "and is no device's of Windows"
            )
        if name in named:
            raise ConfigError(f"{where}: two methods are named {name!r} once axes are written out; rename one of them")
        named[name] = method
    return named


def _labelled(key: str, value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{SHORT.get(key, key)}={text}"


def named(names: Sequence[str], methods: Collection[str]) -> list[str]:
    """The methods of these names; that of a table with `axes` stands for all that were made of it.

    Raises:
        ConfigError: for a name that is none of them.
    """
    found: list[str] = []
    for name in names:
        made = [m for m in methods if m.startswith(f"{name}-") and "=" in m[len(name) :].split("-")[1]]
        own = [name] if name in methods else made
        if not own:
            raise ConfigError(f"there is no method {name!r}; there are {sorted(methods)}; separate names by blanks")
        found += [each for each in own if each not in found]
    return found


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, every key written out; `load_recipe` reads it back equal."""
    lines: list[str] = []
    _write_table(dataclasses.asdict(recipe), [], lines)
    return "\n".join(lines) + "\n"


def _write_table(table: dict[str, Any], path: list[str], lines: list[str]) -> None:
    if path:
        lines += ["", f"[{'.'.join(path)}]"]
    lines += [f"{k} = {_value(v)}" for k, v in table.items() if v is not None and not isinstance(v, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            _write_table(value, [*path, _key(key)], lines)


def _key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # a TOML basic string: JSON's escapes are a subset of its own, but for \u007f
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):  # within a list
        return f"{{ {', '.join(f'{_key(key)} = {_value(item)}' for key, item in value.items())} }}"
    return repr(value)


def build(cls: type, table: Any, where: str) -> Any:
    """A dataclass from a TOML table; unknown keys and wrong types are refused by name."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table; got {table!r}")
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{where}: unknown key {key!r}; did you mean {near!r}? Keys: {', '.join(hints)}")
    return cls(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in table.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        json.dumps(value)  # hashes of recipes are of JSON, which has no dates
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # X | None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} = {value!r}; expected one of {list(arguments)}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a table; got {value!r}")
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list; got {value!r}")
        return [_convert(arguments[0], item, where) for item in value]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where} = {value!r}; expected {hint.__name__}, got {type(value).__name__}")
    return value


AT_LEAST_ONE = {
    "batch_size",
    "micro_batch_size",
    "max_length",
    "save_every",
    "jobs",
    "eval_batch_size",
    "rows_per_step",
    "r",
}


def check_numbers(table: dict[str, Any], where: str) -> None:
    """Every number of a recipe is finite and not negative (but for layer indices, which the model checks)."""
    for key, value in table.items():
        if isinstance(value, dict) and key != "options":
            check_numbers(value, f"{where}: {key}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            least = 1 if key in AT_LEAST_ONE else 0
            if not least <= value < float("inf"):
                raise ConfigError(f"{where}: {key} = {value}; expected a finite number of at least {least}")


def _check(recipe: Recipe, where: str) -> None:
    train = recipe.train
    check_numbers(dataclasses.asdict(recipe), where)
    if recipe.seed >= 2**31:  # numpy takes one below 2**32, and --seeds counts upwards from it
        raise ConfigError(f"{where}: seed = {recipe.seed}; expected one below {2**31}")
    if train.batch_size % train.micro_batch_size:
        raise ConfigError(
            f"{where}: batch_size = {train.batch_size} is not a multiple of micro_batch_size = {train.micro_batch_size}"
        )
    for table, source in sources(recipe).items():
        if source.task and not table.startswith("target.eval."):
            raise ConfigError(
                f"{where}: [{table}] task = {source.task!r}; only sets of target.eval have tasks of their own"
            )
    both = set(recipe.target.eval) & set(recipe.probes)
    if both:
        raise ConfigError(f"{where}: {sorted(both)[0]!r} names a set of target.eval and a probe; give them two names")
    if recipe.target.validation is not None and "validation" in {*recipe.target.eval, *recipe.probes}:
        raise ConfigError(
            f"{where}: 'validation' is the name of the set of [target.validation]; give the other one another"
        )
    if not recipe.methods:
        raise ConfigError(f"{where}: no [methods.NAME] table, so there is nothing to compare")
    if any(share < 0 for share in recipe.parts.values()) or sum(recipe.parts.values()) > 1 + 1e-9:
        raise ConfigError(f"{where}: [parts] must be shares that add up to 1 at most; got {recipe.parts}")
    if any(not 0 < share < 1 for share in train.score_at):
        raise ConfigError(f"{where}: score_at = {train.score_at}; expected shares between 0 and 1 (the end is scored)")
    for name, method in recipe.methods.items():
        _check_method(recipe, method, f"{where}: [methods.{name}]")


def _check_method(recipe: Recipe, method: Method, where: str) -> None:
    module, _, function = method.kind.partition(":")
    if method.kind not in KINDS and not (module and function):
        raise ConfigError(
            f'{where} kind = {method.kind!r}; expected one of {list(KINDS)}, or your own function: "module:function"'
        )
    if method.kind not in UNTRAINED and method.lr <= 0:
        raise ConfigError(f"{where} lr = {method.lr}; expected a number above 0")
    if (method.heal or method.kind == "healed") and recipe.heal is None:
        raise ConfigError(f"{where} needs a [heal] table that says on what text the memory is healed")
    if method.kind == "smf" and method.rule in ("kl", "tfidf") and recipe.background is None:
        raise ConfigError(f"{where} rule = {method.rule!r} needs a [background] table")
    if len(method.betas) != 2 or not all(0 <= beta < 1 for beta in method.betas):
        raise ConfigError(f"{where} betas = {method.betas}; expected two numbers from 0 to below 1")
    if method.replay and recipe.replay is None:
        raise ConfigError(f"{where} replay = {method.replay} needs a [replay] table that says which text")
    if method.replay >= 1:
        raise ConfigError(f"{where} replay = {method.replay}; expected a share below 1")
    for key in dataclasses.fields(method):
        unread = method.kind in KINDS and key.name not in KINDS[method.kind] | {"kind"}
        if unread and getattr(method, key.name) != _default(key):
            raise ConfigError(
                f"{where} {key.name} = {getattr(method, key.name)!r}: kind {method.kind!r} does not read it; leave it "
                f"out. It reads {sorted(KINDS[method.kind])}"
            )


def _default(key: dataclasses.Field) -> Any:
    return key.default if key.default_factory is dataclasses.MISSING else key.default_factory()
