"""What every function that draws a picture asks for first, and other people's names in one."""

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


def plain(name: str, longest: int = 28) -> str:
    """Make a name fit for matplotlib: cut, and without formulas, which it sees between two $."""
    cut = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return cut.replace("$", r"\$")
