"""The errors that public functions raise: op, argument, expected, got, and the way out."""


class VlmfastError(Exception):
    """Base of every error that vlmfast raises on purpose."""


class ShapeError(VlmfastError, ValueError):
    """An argument has the wrong number of dimensions or sizes that do not fit the others."""


class DTypeError(VlmfastError, TypeError):
    """An argument has a dtype that the op does not take."""


class BackendError(VlmfastError, RuntimeError):
    """A backend was asked for by name and cannot run the call; the message says why."""


class DataError(VlmfastError, ValueError):
    """Data on disk is not what it should be: a missing column, a truncated file, a mismatched checkpoint."""


class MissingExtraError(VlmfastError, ImportError):
    """An optional library is missing; the message names the extra that brings it."""


def missing_extra(library: str, extra: str) -> MissingExtraError:
    """The error to raise when `library`, which the extra `extra` brings, cannot be imported."""
    return MissingExtraError(f"{library} is not installed; run: pip install 'vlmfast[{extra}]'")
