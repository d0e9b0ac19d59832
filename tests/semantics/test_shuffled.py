"""The control: every class with the texts of another of its split."""

from __future__ import annotations

import torch

from dvla_fast.data import load_digits
from dvla_fast.engine.config import SemanticsConfig
from dvla_fast.engine.texts import build_texts, text_sources
from dvla_fast.report.texts import class_texts
from dvla_fast.semantics.tokens import shuffled_sources

CPU = torch.device("cpu")


def test_no_class_keeps_its_texts_and_none_gets_those_of_another_split() -> None:
    odd = "d\udcf6g"  # a folder's name that is no UTF-8
    groups = [[f"bird {i}" for i in range(50)], ["cat", odd], ["alone"]]
    sources = shuffled_sources(groups)
    for group in groups:
        assert sorted(sources[name] for name in group) == sorted(group)
        assert len(group) == 1 or all(sources[name] != name for name in group)
    assert shuffled_sources([names[::-1] * 2 for names in groups[::-1]]) == sources


def test_texts_are_those_of_the_other_class() -> None:
    data, config = load_digits(), SemanticsConfig(top_k=3, parts="shuffled")
    texts, described = build_texts(config, data, CPU)
    own, _ = build_texts(SemanticsConfig(top_k=3), data, CPU)
    assert described["parts"] == "shuffled"
    assert texts.class_names == own.class_names == data.class_names
    sources = text_sources(config, data, texts.class_names)
    rows = [own.class_names.index(name) for name in sources]
    assert torch.equal(texts.tokens, own.tokens[rows])
    assert torch.equal(texts.class_embedding, own.class_embedding[rows])
    for split in (data.base, data.novel):
        for name in split.class_names:
            source = sources[texts.class_names.index(name)]
            assert source != name
            assert source in split.class_names


def test_the_report_shows_the_texts_that_were_read() -> None:
    data, config = load_digits(), SemanticsConfig(top_k=3, parts="shuffled")
    texts, _ = build_texts(config, data, CPU)
    sources = text_sources(config, data, texts.class_names)
    plain = SemanticsConfig(top_k=3)
    own = class_texts(plain, build_texts(plain, data, CPU)[0], texts.class_names)
    shown = class_texts(config, texts, sources)
    for name, source in zip(texts.class_names, sources):
        assert shown.tokens[name] == own.tokens[source]
        assert shown.cards[name].description == own.cards[source].description
    assert "the texts of another" in shown.provenance
    assert "the texts of another" not in own.provenance
