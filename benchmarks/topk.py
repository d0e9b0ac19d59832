"""Progressive top-k selection: its time after encoding, and what it keeps of true attributes.

    python -m benchmarks.topk --time
    python -m benchmarks.topk --filter [--encoder open_clip:ViT-B-16/openai]

``--time``: 1,000 classes of 32 candidates, k = 8, on vectors that are encoded already: random unit
vectors of length 512, templates included, and the choices compared with the one-by-one definition.

``--filter``: the made ``shapes`` classes, whose six true attributes are known; their bank adds
three hallucinated ones to each. Precision and recall of the true ones after top-k, by k. Their
names are made up and say nothing, so the same is measured with names that tell three attributes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from dvla_fast.data.shapes import make_classes
from dvla_fast.semantics import TextEncoder, build_encoder, progressive_top_k
from dvla_fast.semantics.topk import TEMPLATES, Selection, select_vectors, template_text

CLASSES, CANDIDATES, K, DIM = 1000, 32, 8, 512


class _Known:
    """An encoder that has every answer ready: texts are keys of a table, made on first sight."""

    name, dim, truncated = "known", DIM, 0

    def __init__(self) -> None:
        self.table: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def encode(self, texts: Sequence[str]) -> Tensor:
        for text in texts:
            if text not in self.table:
                vector = torch.randn(DIM, generator=self.generator)
                self.table[text] = vector / vector.norm()
        return torch.stack([self.table[text] for text in texts])


def one_by_one_top_k(
    class_names: Sequence[str],
    candidates: Sequence[Sequence[str]],
    encoder: TextEncoder,
    k: int,
    template: str = "all",
) -> list[Selection]:
    """Choose as the definition says: class by class, each text encoded alone."""
    result = []
    for name, proposed in zip(class_names, candidates, strict=True):
        vectors = [encoder.encode([text])[0].double() for text in proposed]
        order: list[int] = []
        scores: list[list[float]] = [[] for _ in proposed]
        for _ in range(min(k, len(proposed))):
            text = template_text(name, [proposed[i] for i in order], template)
            query = encoder.encode([text])[0].double()
            best = -1
            for place, vector in enumerate(vectors):
                if place in order:
                    continue
                # Equal cosines must be equal however they were summed.
                scores[place].append(round(float(vector @ query), 6))
                if best < 0 or scores[place][-1] > scores[best][-1]:
                    best = place
            order.append(best)
        result.append(Selection(tuple(order), tuple(map(tuple, scores))))
    return result


def measure_time(classes: int = CLASSES, repeats: int = 5) -> dict[str, float]:
    """Time the selection on encoded vectors; check it against the one-by-one definition.

    Returns:
        Median seconds of ``select_vectors`` ("selection") and of ``progressive_top_k`` with an
        encoder that looks its vectors up ("with look-up of texts"), and of the definition.
    """
    names = [f"class {number}" for number in range(classes)]
    candidates = [[f"{name} {number}" for number in range(CANDIDATES)] for name in names]
    encoder = _Known()
    start = time.perf_counter()
    expected = one_by_one_top_k(names, candidates, encoder, K)
    seconds = {"one by one": time.perf_counter() - start}
    vectors = torch.stack([encoder.encode(texts) for texts in candidates])
    mask = torch.ones(classes, CANDIDATES, dtype=torch.bool)
    rounds = []  # the templates' vectors of each round, as the choices will ask for them

    def record(order: list[list[int]]) -> Tensor:
        texts = [
            template_text(name, [texts[i] for i in chosen])
            for name, texts, chosen in zip(names, candidates, order)
        ]
        rounds.append(encoder.encode(texts))
        return rounds[-1]

    if select_vectors(vectors, mask, record, K) != expected:
        raise SystemExit("the batched selection differs from the definition: no time is reported")
    for name, run in (
        ("selection", lambda: select_vectors(vectors, mask, lambda o: rounds[len(o[0])], K)),
        ("with look-up of texts", lambda: progressive_top_k(names, candidates, encoder, K)),
    ):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            if run() != expected:
                raise SystemExit(f"{name}: another choice than the definition's")
            times.append(time.perf_counter() - start)
        seconds[name] = sorted(times)[repeats // 2]
    return seconds


def measure_filter(
    encoder: TextEncoder, template: str = "all", telling: bool = False
) -> dict[int, tuple[float, float]]:
    """Return precision and recall of true attributes after top-k, by k.

    Args:
        telling: call a class by three of its attributes ("red dotted star") instead of its name.
    """
    made = make_classes()
    names = [f"{c.colour} {c.texture} {c.shape}" for c in made.classes] if telling else made.names
    candidates = [text.attributes for text in made.texts]
    longest = max(map(len, candidates))
    found = progressive_top_k(names, candidates, encoder, longest, template)
    result = {}
    for k in range(1, longest + 1):
        kept = [
            [not text.hallucinated[place] for place in selection.order[:k]]
            for text, selection in zip(made.texts, found)
        ]
        true = sum(map(sum, kept))
        every = sum(not false for text in made.texts for false in text.hallucinated)
        result[k] = true / sum(map(len, kept)), true / every
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--filter", action="store_true")
    parser.add_argument("--encoder", default="hashed-ngram")
    options = parser.parse_args()
    if options.time:
        for name, seconds in measure_time().items():
            print(f"{name:<22} {seconds:.3f} s")
    if options.filter:
        encoder = build_encoder(options.encoder)
        tables = {
            f"{names}, {template}": measure_filter(encoder, template, names == "telling names")
            for names in ("made-up names", "telling names")
            for template in TEMPLATES
        }
        print(f"{encoder.name}: precision / recall of true attributes")
        print("k  " + "  ".join(f"{title:<20}" for title in tables))
        for k in next(iter(tables.values())):
            cells = (f"{table[k][0]:.3f} / {table[k][1]:.3f}" for table in tables.values())
            print(f"{k}  " + "  ".join(f"{cell:<20}" for cell in cells))


if __name__ == "__main__":
    main()
