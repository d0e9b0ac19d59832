"""What an unfinished cache has on record: its finished chunks, and what it is built from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dvla_fast.errors import OutputError

JOURNAL, SETTINGS = "journal.jsonl", "settings.json"


def read_entries(partial: Path) -> list[dict[str, Any]]:
    """Return the finished chunks without unreadable images, the newest record of each."""
    path = partial / JOURNAL
    entries: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # a kill may tear the last line
            continue
        entries[entry["start"]] = entry
    return [entry for entry in entries.values() if not entry["bad"]]


def keep_settings(partial: Path, settings: tuple[str, int, str], fit: Callable[[], bool]) -> None:
    """Note what a cache is built from; refuse to build over the work of other settings.

    Args:
        settings: folder of the data set, size in pixels, and split list.
        fit: tells whether all finished chunks would be kept.

    Raises:
        OutputError: they would not, and for other settings than those noted.
    """
    path = partial / SETTINGS
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # new, of an earlier version, or torn by a kill
        noted = None
    if isinstance(noted, list) and len(noted) == 3 and noted != [*settings] and not fit():
        root, size, splits = noted
        words = f"{root}, {size} pixels" + (f", splits {splits}" if splits else "")
        raise OutputError(
            f"{partial}: an unfinished cache of other settings is here ({words}); give --output "
            "another folder, or remove that one"
        )
    path.write_text(json.dumps(settings), encoding="utf-8")
