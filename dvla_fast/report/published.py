"""Other people's numbers, quoted as theirs: 5-way accuracy in percent at 1 and 5 shots.

They are put beside a result for orientation. Backbones, pre-training data, language models and
splits differ between papers, so nothing here is a paired or even a like-for-like comparison.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dvla_fast.data import load_split_list, split_list_names

_DVLA = "DVLA-RL, ICLR 2026, arXiv 2602.00795"
_VTFSL = "VT-FSL, NeurIPS 2025"
_PLUS = "DVLA-RL++, github.com/peacelwh/TPAMI27-DVLA-RLpp"  # the authors' journal extension
_SP = "SP (Semantic Prompt)"
_SEMFEW = "SemFew"
_ECER = "ECER"


class Published(NamedTuple):
    """One published result, in percent; ``half`` is its 95 % interval where one was given."""

    source: str
    accuracy: float
    half: float | None


# column -> source -> (1-shot, its interval, 5-shot, its interval)
_Row = tuple[float | None, float | None, float | None, float | None]
_TABLE: dict[str, dict[str, _Row]] = {
    "miniImageNet": {
        _SP: (72.31, None, 83.42, None),
        _SEMFEW: (78.94, None, 86.49, None),
        _ECER: (81.14, None, None, None),
        _DVLA: (81.69, 0.36, 88.25, 0.28),
        _VTFSL: (83.66, 0.31, 88.38, 0.25),
        _PLUS: (83.41, None, 89.63, None),
    },
    "tieredImageNet": {
        _SP: (78.03, None, 88.55, None),
        _SEMFEW: (82.37, None, 89.89, None),
        _ECER: (81.81, None, None, None),
        _DVLA: (83.02, 0.43, 91.71, 0.29),
        _VTFSL: (88.02, 0.34, 91.97, 0.27),
        _PLUS: (84.57, None, 92.89, None),
    },
    "CIFAR-FS": {
        _SP: (82.18, None, 88.24, None),
        _SEMFEW: (84.34, None, 89.11, None),
        _ECER: (86.01, None, None, None),
        _DVLA: (87.18, 0.40, 90.59, 0.31),
        _VTFSL: (88.67, 0.33, 91.45, 0.46),
        _PLUS: (88.70, None, 91.75, None),
    },
    "FC100": {
        _SEMFEW: (54.27, None, 65.02, None),
        _VTFSL: (57.99, None, 67.68, None),
    },
    "CUB": {
        _DVLA: (91.93, 0.28, 95.06, 0.19),
        _VTFSL: (91.08, None, 94.63, None),
        _PLUS: (94.31, None, 96.28, None),
    },
    "Cars": {
        _DVLA: (92.95, 0.24, 96.59, 0.15),
        _VTFSL: (92.95, 0.24, 96.62, None),
        _PLUS: (95.13, None, 97.14, None),
    },
    "Dogs": {
        _DVLA: (89.64, 0.30, 91.42, 0.25),
        _VTFSL: (86.58, None, 90.69, None),
        _PLUS: (92.05, None, 92.67, None),
    },
    "miniImageNet to CUB": {
        _SEMFEW: (59.07, None, 72.47, None),
        _DVLA: (67.46, 0.47, 78.99, 0.35),
        _VTFSL: (66.86, None, 81.02, None),
        _PLUS: (69.14, None, 80.30, None),
    },
    "miniImageNet to Places": {
        _SEMFEW: (64.01, None, 74.70, None),
        _DVLA: (69.26, 0.45, 80.70, 0.36),
        _VTFSL: (73.68, None, 81.52, None),
        _PLUS: (70.87, None, 81.92, None),
    },
    "miniImageNet to ChestX": {
        _DVLA: (23.47, 0.20, 26.94, 0.22),
        _PLUS: (23.65, None, 27.10, None),
    },
}
# What the bundled split lists call the data sets of these columns.
_DATASETS = {
    "CUB-200-2011": "CUB",
    "Stanford Cars": "Cars",
    "Stanford Dogs": "Dogs",
    "Places365": "Places",
}


def benchmark(split_list: str) -> str | None:
    """Return the benchmark that a bundled split list divides, or None for any other name."""
    if split_list not in split_list_names():
        return None
    dataset = load_split_list(split_list).dataset
    return _DATASETS.get(dataset, dataset)


def published_for(result: dict[str, Any]) -> tuple[str, list[Published]]:
    """Return the published column that fits a result, and its entries.

    Data sets are known by the published split that their classes follow, never by their names:
    any folder may be called ``cars``.

    Args:
        result: of an evaluation: ``split_list``, ``trained_on``, ``trained_split_list``, ``split``,
            ``way``, ``shot``.

    Returns:
        Column name and entries; ("", []) where nothing was published for such episodes.
    """
    if result.get("way") != 5 or result.get("shot") not in (1, 5) or result.get("split") != "novel":
        return "", []
    column = benchmark(str(result.get("split_list")))
    trained = column  # weights of the authors do not say what they were trained on
    if result.get("trained_on"):
        trained = benchmark(str(result.get("trained_split_list")))
    if column != trained:
        column = f"{trained} to {column}"
    entries = []
    first = 0 if result["shot"] == 1 else 2
    for source, row in _TABLE.get(column or "", {}).items():
        accuracy = row[first]
        if accuracy is not None:
            entries.append(Published(source, accuracy, row[first + 1]))
    return (column or "", entries) if entries else ("", [])
