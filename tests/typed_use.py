"""What type checkers know of the public names: mypy checks this file with the package."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import dvla_fast
from dvla_fast import DVLA, GateOutput, RLAGate
from dvla_fast.nn import EpisodeOutput, TextTokens


class Recorded(RLAGate):
    """A gate of a user's own."""

    def tokens(self, image_tokens: Tensor, text_tokens: Tensor) -> Tensor:
        return self(image_tokens, text_tokens).image_tokens


def use(model: DVLA, images: Tensor, labels: Tensor, text: TextTokens) -> None:
    gate = Recorded(32, 16, num_heads=4)
    assert_type(gate(images, images, sample=False), GateOutput)
    assert_type(model(images, labels, images, text, way=5), EpisodeOutput)
    assert_type(dvla_fast.functional.gated_attention(*[images] * 7)[0], Tensor)
    assert_type(dvla_fast.ReinforceLoss()(images, images, images)[0], Tensor)
    learned = dvla_fast.FewShotClassifier.load("model.safetensors", torch.device("cpu").type)
    assert_type(learned, dvla_fast.FewShotClassifier)


def misuse() -> None:
    RLAGate("32", dims=3)  # type: ignore[arg-type, call-arg]
    dvla_fast.RLAGatee(32)  # type: ignore[attr-defined]
    dvla_fast.functional.beta_polcy()  # type: ignore[attr-defined]
