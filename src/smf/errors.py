"""What can go wrong, by cause. Each class is also the standard exception that callers would expect."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class SmfError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(SmfError, ValueError):
    """An option, a recipe key or a combination of them that cannot work."""


class UnsupportedModelError(SmfError, ValueError):
    """A model that memory layers cannot be attached to."""


class NoSuchLayerError(UnsupportedModelError):
    """A decoder layer that the model does not have."""


class BackgroundError(SmfError, ValueError):
    """A missing, broken or foreign background."""


class DataError(SmfError, ValueError):
    """A data set, file, row or column that cannot be used."""


class HubError(DataError):
    """A data set of the hub that cannot be had: no network, no such revision, or not in the cache."""


class PatchError(SmfError, ValueError):
    """A patch file that is broken, or that does not fit the model."""


class TrainingError(SmfError, RuntimeError):
    """A training step that would do nothing, or something else than it says."""


class NotFiniteError(TrainingError):
    """A training step whose gradient is not finite; it changed nothing."""


class StorageError(SmfError, OSError):
    """A file that could not be written."""


class BusyError(SmfError, RuntimeError):
    """A run's folder that another process works in."""


class Stopped(SystemExit):
    """The end that SIGTERM asked for: no error, but exit code 75 (EX_TEMPFAIL: try again)."""

    CODE = 75

    def __init__(self, message: str):
        super().__init__(self.CODE)
        self.message = message


@contextlib.contextmanager
def refusing(error: type[SmfError], what: str) -> Iterator[None]:
    """While something is read that others may have written: whatever goes wrong is `error`, saying what and why.

    Parsers raise many classes on bytes that nobody foresaw; a caller needs one.
    """
    try:
        yield
    except error:
        raise
    except SmfError as cause:
        raise error(f"{what}: {cause}") from cause
    except Exception as cause:
        raise error(f"{what}: {type(cause).__name__}: {cause}") from cause
