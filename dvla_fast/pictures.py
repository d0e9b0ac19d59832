"""What every function that draws a picture asks for first."""

from __future__ import annotations

from dvla_fast.errors import MissingDependencyError


def require_matplotlib() -> None:
    """Raise MissingDependencyError, with the remedy, unless matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "pictures need matplotlib, which is not installed; run pip install 'dvla-fast[train]'"
        ) from error
