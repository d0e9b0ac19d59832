"""Checkpoints in the layout of the method's authors, made from our own networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dvla_fast.nn import Visformer


def their_layout(backbone: Visformer, prefix: str = "") -> dict[str, Tensor]:
    """State dict under the authors' names: BatchNorm wrapped as ``bn``, a classifier, a log τ."""
    norms = {name for name, m in backbone.net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    state = {"head.weight": torch.randn(64, 384), "head.bias": torch.randn(64)}
    state["log_tau"] = torch.tensor(-2.3)
    for name, tensor in backbone.net.state_dict().items():
        module, _, last = name.rpartition(".")
        state[f"{module}.bn.{last}" if module in norms else name] = tensor.clone()
    return {prefix + name: tensor for name, tensor in state.items()}


def their_gates() -> dict[str, Tensor]:
    """What DVLA-RL checkpoints hold beside the network, as far as is known."""
    gates = {"t2i.weight": torch.randn(192, 512), "t2i2.weight": torch.randn(384, 512)}
    for index, width in ((1, 192), (2, 384)):
        gates[f"rl_gate{index}.policy_net.1.weight"] = torch.randn(3, width, 1, 1)
        gates[f"rl_gate{index}.policy_net.1.bias"] = torch.randn(3)
    return gates


def save_their_checkpoint(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    """Write ``{"epoch", "state_dict", "optimizer", "k"}`` as their training scripts do."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    content = {"epoch": 7, "state_dict": state, "optimizer": optimizer.state_dict(), "k": "0.45"}
    torch.save({**content, **more}, path)
    return path
