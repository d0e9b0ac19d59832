"""What the ``dvla-fast semantics`` commands on banks do."""

from __future__ import annotations

from dvla_fast.engine.config import SemanticsShow
from dvla_fast.semantics import load_bank


def show(config: SemanticsShow) -> int:
    """Do what ``dvla-fast semantics show`` does."""
    bank = load_bank(config.bank)
    names = bank.resolve([config.name]) if config.name else list(bank.classes)
    for name in names:
        entry = bank.classes[name]
        print(f"{name}: {', '.join(entry.attributes or entry.proposals)}\n  {entry.description}")
    return 0
