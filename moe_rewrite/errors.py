"""The errors this package raises. Each names the value, what was expected and what to do."""

from importlib.util import find_spec


class MoeRewriteError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(MoeRewriteError, ValueError):
    """An option (mode, router, experts, ...) has an invalid value."""


class CaptureError(MoeRewriteError, RuntimeError):
    """The model could not be captured as a graph."""


class SplitError(MoeRewriteError, ValueError):
    """The split is not inside the model."""


class ConversionError(MoeRewriteError, RuntimeError):
    """The model was captured, but nothing in it can be converted."""


class InputError(MoeRewriteError, ValueError):
    """A call's arguments are not ones that the converted model can run."""


class EquivalenceError(MoeRewriteError, RuntimeError):
    """A converted graph does not give what the original gives."""


class CheckpointError(MoeRewriteError, RuntimeError):
    """A saved folder is damaged, of another model, or of an unknown version."""


class InvariantError(MoeRewriteError, AssertionError):
    """A pass left the program in an invalid state. This is a bug: please report it."""


def require_package(package: str, extra: str, what: str) -> None:
    """Raise ConfigError, saying which extra to install, where a package that `what` needs is
    missing."""
    if find_spec(package) is None:
        raise ConfigError(f"{what} needs {package}: pip install 'moe-rewrite[{extra}]'")
