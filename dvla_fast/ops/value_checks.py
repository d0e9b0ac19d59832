"""Whether values are looked at: NaN and concentrations of the policy's ops, labels, rewards."""

from __future__ import annotations

import os

import torch
from torch import Tensor

_enabled: bool | None = None
_CPU = torch.device("cpu")


def set_value_checks(enabled: bool | None) -> None:
    """Checks of tensors' values, for the whole process.

    Looked at are those of the policy's ops (``beta_policy``, ``gate_policy``, ``beta_cdf``,
    ``beta_kl`` and their like), the labels that ``DVLA``, ``prototype_logits`` and rewards read,
    and the rewards that ``EMABaseline`` takes in.

    ``True``: on every device. A CPU raises ``ValueError``. On a GPU the kernel itself stops with a
    device-side assertion, which costs no synchronisation and shows as a RuntimeError of some later
    call; the process cannot use that GPU any more. ``False``: nowhere; the results of an invalid
    element are NaN. ``None`` (default): on CPUs only, where a check costs nothing and its error can
    be caught; a GPU gives NaN, since one bad step should not take the process's GPU away unasked.
    Also from outside: ``DVLA_FAST_VALUE_CHECKS=1`` or ``0``. A compiled graph looks again at each
    call; a CUDA graph keeps what held at its capture.

    Shapes, dtypes, devices and a concentration given as a number are always checked.

    Raises:
        TypeError: ``enabled`` is neither a bool nor ``None``.
    """
    global _enabled
    if enabled is not None and not isinstance(enabled, bool):
        raise TypeError(f"set_value_checks: expected True, False or None, got {enabled!r}")
    _enabled = enabled


def value_checks(device: torch.device) -> bool:
    """Whether values on that device are checked now; see :func:`set_value_checks`."""
    if _enabled is None:  # a device builds its type as a text at each question
        return device == _CPU or device.type == "cpu"
    return _enabled


def setting() -> bool | None:
    """What :func:`set_value_checks` set."""
    return _enabled


def require(valid: Tensor, message: str) -> None:
    """Raises on a CPU; elsewhere asserts on the device, without waiting for it."""
    if valid.device.type != "cpu":
        torch._assert_async(valid.all(), message)
    elif not bool(valid.all()):
        raise ValueError(message)


def _from_environment() -> bool | None:
    text = os.environ.get("DVLA_FAST_VALUE_CHECKS", "")
    if text not in ("", "0", "1"):
        raise ValueError(f"DVLA_FAST_VALUE_CHECKS={text!r}: expected 0 or 1")
    return None if text == "" else text == "1"


set_value_checks(_from_environment())
