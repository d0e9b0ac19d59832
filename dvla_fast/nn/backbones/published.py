"""Visformer-Tiny checkpoints of the method's authors, read into timm's network.

The files ``visformer-<dataset>.pth`` (VT-FSL, DVLA-RL) and ``dvla_rl-<dataset>-<shot>shot.pth``
hold ``{"state_dict": ..., "optimizer": ..., "epoch": ...}`` of a Visformer that derives from
danczs's, as timm's does. Its parameters have timm's names but for one thing: each BatchNorm sits in
a wrapper as ``bn`` (``norm.bn.weight`` for ``norm.weight``). docs/backbones.md says what was
compared.

Nothing is unpickled but tensors and plain values.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvla_fast.errors import CheckpointError

_STEM = "stem.0.weight"
_NETWORK = re.compile(r"(stem|patch_embed\d|pos_embed\d|stage\d|norm)(\.|$)")
_WRAPPED = re.compile(r"\.bn\.(weight|bias|running_mean|running_var|num_batches_tracked)$")
# Modules beside the network, by their first name, and what they are.
_BESIDE = {
    "head": "classifier of the base classes",
    "log_tau": "temperature of VT-FSL's alignment loss",
    "t2i": "text projection",
    "t2i2": "text projection",
    "se_block": "channel prompt of SP and VT-FSL",
    "rl_gate1": "gate",
    "rl_gate2": "gate",
    # DVLA-RL++
    "gated": "gated attention",
    "csp": "purification",
    "policy": "gate policy",
    "value": "value baseline",
    "reference": "reference gate",
    "static_gate": "static gate",
}
_GATES = ("rl_gate1", "rl_gate2")


def load_visformer(net: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load the backbone of an authors' checkpoint into timm's Visformer.

    Every tensor of the file is loaded or accounted for. A prefix such as ``module.``, ``encoder.``
    or ``backbone.`` is stripped; position embeddings of another image size are interpolated
    (bicubic), with a warning.

    Returns:
        ``{"format", "epoch", "left_out": {first name: what it is}, "resized": [names]}``.

    Raises:
        CheckpointError: unreadable, unsafe to load, or not of this network; ``net`` stays as it is.

    Warns:
        UserWarning: gates were left out, or position embeddings interpolated.
    """
    content = _read(Path(path))
    state = _state_dict(content, path)
    prefix = _prefix(state, path)
    ours, left_out = _divide(state, prefix, path)
    resized = _fit(ours, net.state_dict(), path)
    net.load_state_dict(ours)
    if resized:
        warnings.warn(
            f"{path}: position embeddings interpolated to another image size"
            f" ({', '.join(resized)})",
            stacklevel=3,
        )
    gates = [name for name in _GATES if name in left_out]
    if gates:
        warnings.warn(
            f"{path}: only its backbone was loaded; {', '.join(sorted(left_out))} were left out:"
            " its gates have another form than those here (docs/backbones.md), which begin anew",
            stacklevel=3,
        )
    epoch = content.get("epoch")
    return {
        "format": "dvla-rl" if gates else "visformer",
        "epoch": epoch if isinstance(epoch, int) else None,
        "left_out": left_out,
        "resized": resized,
    }


def has_small_stem(path: str | Path) -> bool:
    """Whether an authors' checkpoint has their stem for small images: two 3 × 3 convolutions.

    Raises:
        CheckpointError: unreadable, unsafe to load, or no Visformer.
    """
    state = _state_dict(_read(Path(path)), path)
    return f"{_prefix(state, path)}stem.3.weight" in state


def _read(path: Path) -> Mapping[Any, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a visformer-*.pth file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a file that is safe to load: damaged, of another kind, or with more in"
            " it than tensors and plain values; save its state_dict alone with torch.save"
        ) from error
    except Exception as error:  # a damaged pickle can fail at any of its instructions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: not a complete PyTorch file ({reason}); fetch it again"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a state_dict")
    return content


def _state_dict(content: Mapping[Any, Any], path: Any) -> dict[str, Tensor]:
    state = content.get("state_dict", content)
    wrong = (
        [key for key, value in state.items() if not isinstance(value, Tensor)]
        if isinstance(state, Mapping)
        else ["state_dict"]
    )
    if wrong or not state:
        raise CheckpointError(
            f"{path}: holds no state_dict of tensors (its keys: {_few(map(str, content))})"
        )
    return {str(name): value for name, value in state.items()}


def _prefix(state: Mapping[str, Tensor], path: Any) -> str:
    found = sorted(n[: -len(_STEM)] for n in state if n == _STEM or n.endswith(f".{_STEM}"))
    if not found:
        raise CheckpointError(
            f"{path}: not a Visformer checkpoint: no {_STEM!r} among its tensors ({_few(state)})"
        )
    return min(found, key=len)


def _divide(
    state: Mapping[str, Tensor], prefix: str, path: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The network's tensors under timm's names, and what the others are."""
    ours: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    strangers = []
    # No code of DVLA-RL was published: its files may hold modules that nobody outside can name.
    open_ended = any(_first(name, prefix) in _GATES for name in state)
    for name, tensor in state.items():
        inner = name.removeprefix(prefix)
        if name.startswith(prefix) and _NETWORK.match(inner):
            ours[_WRAPPED.sub(r".\1", inner)] = tensor
            continue
        first = _first(name, prefix)
        if first in _BESIDE:
            left_out[first] = _BESIDE[first]
        elif open_ended:
            left_out[first] = "unknown"
        else:
            strangers.append(name)
    if strangers:
        raise CheckpointError(
            f"{path}: {len(strangers)} tensors belong to no module known here ({_few(strangers)});"
            " save the backbone's state_dict alone with torch.save"
        )
    return ours, left_out


def _first(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).split(".", 1)[0]


def _fit(given: dict[str, Tensor], wanted: Mapping[str, Tensor], path: Any) -> list[str]:
    """Check names and shapes; interpolate position embeddings in place, and return their names."""
    theirs, ours = ("stem.3.weight" in state for state in (given, wanted))
    if theirs != ours or given[_STEM].shape != wanted[_STEM].shape:
        kind = "small (two 3 × 3 convolutions)" if theirs else "large (one 7 × 7 convolution)"
        raise CheckpointError(
            f"{path}: its stem is the {kind}, {tuple(given[_STEM].shape)}, the model's is"
            f" {tuple(wanted[_STEM].shape)}; set --model.backbone_options.small_stem"
            f" {str(theirs).lower()}, or --data.image_size to what it was trained with"
        )
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    resized, wrong = [], []
    for name in sorted(wanted.keys() & given.keys()):
        mine, other = wanted[name].shape, given[name].shape
        if mine == other:
            continue
        if name.startswith("pos_embed") and len(other) == 4 and mine[:2] == other[:2]:
            resized.append(name)
        else:
            wrong.append(f"{name} is {tuple(other)}, expected {tuple(mine)}")
    if missing or extra or wrong:
        raise CheckpointError(
            f"{path}: not this Visformer: {len(missing)} tensors missing ({_few(missing)}),"
            f" {len(extra)} unexpected ({_few(extra)}), {len(wrong)} of another shape"
            f" ({'; '.join(wrong[:3]) or 'none'})"
        )
    bad = [n for n, t in given.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        raise CheckpointError(f"{path}: NaN or infinity in {_few(bad)}; fetch it again")
    for name in resized:
        given[name] = F.interpolate(
            given[name].float(), wanted[name].shape[2:], mode="bicubic", align_corners=False
        )
    return resized


def _few(names: Any) -> str:
    """The first names of many, to be quoted."""
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "") or "none"
