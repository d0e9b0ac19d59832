"""Small gates, episodes and texts that the tests of dvla_fast.nn share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dvla_fast.nn import DVLA, RLAGate, SmallConvAttention, TextTokens

TEXT_DIM = 24


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors here are tiny: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20260)


@pytest.fixture
def make_gate() -> Callable[..., RLAGate]:
    """A gate whose policy has left its starting point, so that states matter."""

    def make(dim: int = 16, **options: object) -> RLAGate:
        gate = RLAGate(dim, TEXT_DIM, 2, hidden_dim=8, **options)  # type: ignore[arg-type]
        for parameter in gate.policy.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        return gate

    return make


@pytest.fixture
def make_model() -> Callable[..., DVLA]:
    """A DVLA over a very small backbone, policies off their starting point."""

    def make(**options: object) -> DVLA:
        backbone = SmallConvAttention(image_size=8, width=8, depths=(1, 1, 1), num_heads=2)
        model = DVLA(backbone, text_dim=TEXT_DIM, num_heads=2, hidden_dim=8, **options)  # type: ignore[arg-type]
        for gate in model.gates:
            for parameter in gate.policy.parameters():
                torch.nn.init.normal_(parameter, std=0.4)
        return model

    return make


def make_text(episodes: int, way: int, attributes: int = 2, masked: bool = False) -> TextTokens:
    """Random texts; ``masked``: the last class lacks its second attribute."""
    per_class = attributes + 1
    tokens = torch.nn.functional.normalize(torch.randn(episodes, way * per_class, TEXT_DIM), dim=-1)
    mask = None
    if masked:
        mask = torch.ones(episodes, way * per_class, dtype=torch.bool)
        mask[:, (way - 1) * per_class + 1] = False
    levels = torch.tensor([0] * attributes + [1]).repeat(way)
    return TextTokens(tokens, levels, torch.randn(episodes, way, TEXT_DIM), mask)


def make_episodes(
    episodes: int, way: int, shot: int, queries: int, side: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(support, support_labels, query, query_labels), supports in shuffled class order."""
    support_labels = torch.stack(
        [torch.arange(way).repeat(shot)[torch.randperm(way * shot)] for _ in range(episodes)]
    )
    query_labels = torch.arange(way).repeat(queries).expand(episodes, -1).contiguous()
    support = torch.randn(episodes, way * shot, 1, side, side)
    query = torch.randn(episodes, way * queries, 1, side, side)
    return support, support_labels, query, query_labels
