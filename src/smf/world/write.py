"""Writes a world for recipes to read: `python -m smf.world.write --seed 1 --output FOLDER` (docs/world.md)."""

from __future__ import annotations

import json
from pathlib import Path

import tyro

from ..errors import ConfigError
from ..files import write_atomically, write_json
from ..fingerprint import json_hash
from .facts import EMBEDDED, World
from .sets import SETS, rows_of_set

ABOUT = "world.json"  # which world a folder has, and the hash of each set


def write(output: Path, seed: int = EMBEDDED.seed, times: int = EMBEDDED.times) -> None:
    """Write every set of a world as a file of JSON lines, which is named as the set is: `data = FOLDER` in a recipe.

    Args:
        output: folder of the files. A killed writing is made whole by writing again.
        seed: of the world.
        times: how many times as many facts as the embedded world it has.

    Raises:
        ConfigError: where there is no such world, or `output` holds another one; runs of it would read this one.
    """
    world = World(seed, times)
    sets = {name: rows_of_set(name, world) for name in SETS}
    about = {"seed": seed, "times": times, "sets": {name: json_hash(rows) for name, rows in sets.items()}}
    begun = output / ABOUT
    if begun.is_file() and json.loads(begun.read_text()) != about:
        raise ConfigError(
            f"{output} holds another world than that of seed {seed}, times {times}: see {begun}; give another --output"
        )
    write_json(begun, about)
    for name, rows in sets.items():
        write_atomically(output / name, "".join(f"{json.dumps(row)}\n" for row in rows))


if __name__ == "__main__":
    tyro.cli(write)
