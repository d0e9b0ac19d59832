"""What a look through data or texts found, before work starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from dvla_fast.characters import printable

# Lines of one kind; the rest is counted.
_SHOWN = 10


@dataclass
class Report:
    """What was found: facts, notes (worth knowing) and problems (to be put right)."""

    facts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the report for people, one line each, without what steers a terminal."""
        lines = [*self.facts]
        lines += [f"note: {line}" for line in self.notes]
        lines += [f"problem: {line}" for line in self.problems]
        return printable("\n".join(lines))

    def add(self, kind: list[str], lines: list[str]) -> None:
        """Add lines, the first few in full."""
        kind += lines[:_SHOWN]
        if len(lines) > _SHOWN:
            kind.append(f"... and {len(lines) - _SHOWN} more of this kind")
