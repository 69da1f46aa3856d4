"""What `smf doctor` says of the environment: versions, device, disks, the hub, and what does not go together."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import InvalidRequirement, Requirement

from .health import Finding
from .shape import available_memory

OURS = "sparse-memory-finetuning"
COMPANIONS = ("torchvision", "torchaudio", "accelerate", "bitsandbytes", "deepspeed", "xformers", "flash-attn")
SHOWN = ("torch", "transformers", "peft", "safetensors", "accelerate", "datasets", "lm-eval", "ray", "triton")
EXTRAS = {"run": "the command smf", "ray": "--ray", "cuda": "kernels for GPUs"}  # and what needs them
ROOM = 2**30  # bytes that a disk should have left
SECONDS = 4.0  # that the hub has to answer


def environment() -> tuple[dict[str, str], list[Finding]]:
    """What there is, by name, and what to do about what is wrong."""
    about: dict[str, str] = {"python": f"{platform.python_version()} on {platform.platform()}"}
    findings: list[Finding] = []
    looks: tuple[Callable[[dict[str, str]], Iterator[Finding]], ...] = (_packages, _device, _memory, _disks, _hub)
    for look in looks:
        findings += look(about)
    return about, findings


# -- packages ---------------------------------------------------------------------------------------------------------


def _packages(about: dict[str, str]) -> Iterator[Finding]:
    about[OURS] = _version(OURS) or "not installed; it runs from its source"
    about |= {name: _version(name) or "-" for name in SHOWN}
    for extra, what in EXTRAS.items():
        needed = sorted({need.name for need in _needs(OURS, extra)})
        missing = [name for name in needed if _version(name) is None]
        about[f"extra [{extra}]"] = f"lacks {', '.join(missing)}" if missing else "present" if needed else "unknown"
        if missing and extra == "run":
            yield Finding(f"extra [{extra}]", f"{what} needs {', '.join(missing)}", f"pip install '{OURS}[{extra}]'")
    yield from unmet([OURS, *COMPANIONS, *(need.name for need in _needs(OURS, "run"))])


def unmet(names: list[str]) -> Iterator[Finding]:
    """What installed packages need in another version than there is, as their own metadata say."""
    for name in dict.fromkeys(names):
        for need in _needs(name) if _version(name) is not None else ():
            found = _version(need.name)
            if found is not None and not need.specifier.contains(found, prereleases=True):
                what = f"{name} {_version(name)} needs {need.name}{need.specifier}; {found} is installed"
                yield Finding(name, what, f"pip install -U '{need.name}{need.specifier}'")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _needs(name: str, extra: str = "") -> list[Requirement]:
    """What a package needs here, or one of its extras beyond that."""
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            need = Requirement(line)
        except InvalidRequirement:
            continue
        plain = need.marker is None or need.marker.evaluate({"extra": ""})
        if (plain and not extra) or (extra and not plain and need.marker and need.marker.evaluate({"extra": extra})):
            found.append(need)
    return found


# -- the machine ------------------------------------------------------------------------------------------------------


def _device(about: dict[str, str]) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        free, size = torch.cuda.mem_get_info()
        about["device"] = f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {size / 2**30:.1f} GiB free"
        about["bfloat16"] = "supported" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated"
        if about["bfloat16"] == "emulated":
            yield Finding(
                "bfloat16", "this GPU has none of its own, and is slow with it", 'dtype = "float32"', act=False
            )
    else:
        about["device"] = f"CPU, {threads} threads on {cores} cores"
        about["bfloat16"] = f"works; a product takes {_bfloat16_against_float32():.1f} times as long as in float32"
        if _gpus():
            built = torch.version.cuda
            why = f"this torch ({torch.__version__}) is built without CUDA" if built is None else "torch cannot use it"
            do = "pip install a torch with CUDA (https://pytorch.org/get-started)"
            yield Finding("device", f"there is an NVIDIA GPU, but {why}", do if built is None else "nvidia-smi")
    if cores and threads > cores:
        what = f"torch has {threads} threads on {cores} cores, which makes it slow"
        yield Finding("threads", what, f"export OMP_NUM_THREADS={cores}")


def _gpus() -> list[Path]:
    return [path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdecimal()]


def _bfloat16_against_float32(size: int = 512) -> float:
    """How much longer a matrix product takes; the best of some tries of each, in turn."""
    sides = [torch.ones(size, size, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    best = [float("inf")] * 2
    for _ in range(5):
        for which, side in enumerate(sides):
            began = time.perf_counter()
            torch.mm(side, side)
            best[which] = min(best[which], time.perf_counter() - began)
    return best[1] / best[0]


def _memory(about: dict[str, str]) -> Iterator[Finding]:
    room = available_memory()
    about["memory"] = f"{room / 2**30:.1f} GiB left"
    if room < ROOM:
        yield Finding("memory", f"only {room / 2**20:,.0f} MiB are left", "end what else runs, before training")


def _disks(about: dict[str, str]) -> Iterator[Finding]:
    for name, folder in (("here", Path.cwd()), ("hub's cache", _cache()), ("temporary", Path(tempfile.gettempdir()))):
        there = next(each for each in (folder, *folder.parents) if each.exists())
        free = shutil.disk_usage(there).free
        about[f"disk, {name}"] = f"{folder}: {free / 2**30:.1f} GiB free"
        if free < ROOM:
            yield Finding(str(folder), f"only {free / 2**20:,.0f} MiB are free", "make room on this disk")
        if not os.access(there, os.W_OK):
            yield Finding(str(folder), "nothing can be written there", f"ls -ld {there}", act=name == "temporary")


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


# -- the hub ----------------------------------------------------------------------------------------------------------


def _hub(about: dict[str, str]) -> Iterator[Finding]:
    from huggingface_hub import constants

    cached = sorted(_cache().glob("*--*")) if _cache().is_dir() else []
    kept = f"{len(cached)} repositories in its cache"
    if constants.HF_HUB_OFFLINE:
        about["hub"] = f"offline, by HF_HUB_OFFLINE; {kept}"
        return
    why = _within(SECONDS, lambda: _refusal(constants.ENDPOINT))
    about["hub"] = f"{constants.ENDPOINT} {'answers' if why is None else f'does not answer ({why})'}; {kept}"
    if why is not None:
        what = "it cannot be reached; what its cache has works"
        yield Finding("hub", what, "export HF_HUB_OFFLINE=1  # so that nothing waits for it", act=False)


def _refusal(address: str) -> str | None:
    """Why nothing answers at an address; None where something does, whatever it says."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:  # of the network, or an address that is none
        return " ".join(str(getattr(error, "reason", error)).split())


def _within(seconds: float, ask: Callable[[], str | None]) -> str | None:
    """An answer, or that there was none in time: a name that nobody resolves takes longer than any limit of ours."""
    found: list[Any] = ["no answer in time"]
    thread = threading.Thread(target=lambda: found.__setitem__(0, ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]
