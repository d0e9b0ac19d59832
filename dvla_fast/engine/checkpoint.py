"""Checkpoints: one safetensors file with its JSON description inside, replaced atomically.

The JSON part sits in the file's own header, so tensors and description cannot be torn apart by a
crash between two writes; a readable copy is put beside it (``<name>.json``). The file is written
under a temporary name, flushed to the disk, and renamed over the old one: at any moment the path
holds one complete checkpoint. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dvla_fast.engine.description import check_description
from dvla_fast.errors import CheckpointError, MissingDependencyError, TrainingError
from dvla_fast.files import RUN_REMEDY, json_text, write_tensors_atomic, write_text_atomic

FORMAT = "dvla-fast-checkpoint/1"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingDependencyError(
            "checkpoints need safetensors, which is not installed; run "
            "pip install 'dvla-fast[train]'"
        ) from error
    return safetensors


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        path: ``*.safetensors`` file to write or replace.
        tensors: named tensors on any device.
        info: JSON-serialisable description; must hold ``kind``.

    Raises:
        TrainingError: a tensor holds NaN or infinity; the old file stays as it was.
        OutputError: the file cannot be written; the old one stays.
    """
    _safetensors()
    host = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in sorted(tensors.items())
    }
    for name, tensor in host.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise TrainingError(
                f"{path}: not written, because {name!r} holds NaN or infinity; the last good "
                "checkpoint is kept"
            )
    content = {**info, "format": FORMAT, "tensors_sha256": _digest(host)}
    write_tensors_atomic(path, host, json_text(content), RUN_REMEDY)
    write_readable(path, content)


def write_readable(path: Path, info: Mapping[str, Any]) -> None:
    """Put the readable copy of a checkpoint's description beside it (OutputError)."""
    readable = {key: value for key, value in info.items() if key != "resume"}
    write_text_atomic(path.with_suffix(".json"), json_text(readable, indent=2) + "\n", RUN_REMEDY)


def load_checkpoint(
    path: str | Path, kinds: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify a checkpoint, on the CPU.

    Args:
        path: the ``.safetensors`` file.
        kinds: acceptable values of ``info["kind"]``, whose model is described; any if empty.

    Returns:
        (tensors, info) as given to ``save_checkpoint``.

    Raises:
        CheckpointError: missing, truncated or damaged file, foreign file, another kind, or one
            whose description lacks an entry or has one that cannot be.
    """
    safetensors = _safetensors()
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint file; give the path of a .safetensors file from a run's "
            "checkpoints/ folder"
        )
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({str(error).splitlines()[0]}); it is "
            "truncated, damaged or of another format: use another checkpoint or train again"
        ) from error
    try:
        info = json.loads(metadata["dvla_fast"])
        known = info["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: a safetensors file, but not a dvla-fast checkpoint; give one from a run's "
            "checkpoints/ folder"
        ) from error
    if known != FORMAT:
        raise CheckpointError(f"{path}: format {known!r} is unknown; this version reads {FORMAT!r}")
    if info.get("tensors_sha256") != _digest(tensors):
        raise CheckpointError(
            f"{path}: damaged (its tensors do not match their checksum); use another checkpoint "
            "or train again"
        )
    if kinds and info.get("kind") not in kinds:
        raise CheckpointError(
            f"{path}: a {info.get('kind')!r} checkpoint, but this command needs "
            f"{' or '.join(map(repr, kinds))}"
        )
    if kinds:
        check_description(path, info)
    return tensors, info


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, path: Any) -> None:
    """Copy the tensors under ``prefix`` into a module, after checking all names and shapes.

    Raises:
        CheckpointError: names or shapes differ; the module is left as it was.
    """
    given = {
        name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }
    wanted = module.state_dict()
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    wrong = [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if missing or extra or wrong:
        detail = "; ".join(
            [f"lacks {name}" for name in missing[:2]]
            + [f"has an unknown {name}" for name in extra[:2]]
            + wrong[:2]
        )
        raise CheckpointError(
            f"{path}: of another model ({len(missing)} tensors missing, {len(extra)} unknown, "
            f"{len(wrong)} of another shape: {detail}); use the --model settings that it was "
            "trained with"
        )
    module.load_state_dict(given)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into named tensors and a JSON part."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    return tensors, {"groups": state["param_groups"], "scalars": scalars}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], info: Mapping[str, Any]
) -> None:
    """Restore what ``pack_optimizer`` split, each tensor in the memory format of its parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            like = parameters[int(index)]
            if tensor.shape == like.shape:
                tensor = torch.empty_like(like, dtype=tensor.dtype, device="cpu").copy_(tensor)
            state.setdefault(int(index), {})[key] = tensor
    for index, entries in info["scalars"].items():
        state.setdefault(int(index), {}).update(entries)
    kind = {"fused": optimizer.defaults.get("fused")}  # how it is computed is not the file's matter
    groups = [{**group, **kind} for group in info["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def pack_rng(generator: np.random.Generator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Capture every random state a run draws from: torch CPU and CUDA, NumPy, Python."""
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        if torch.distributed.is_initialized():  # this process's GPU stands for everyone's
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        else:
            for index, state in enumerate(torch.cuda.get_rng_state_all()):
                tensors[f"rng.cuda.{index}"] = state
    version, internal, gauss = random.getstate()
    return tensors, {
        "numpy": _plain(generator.bit_generator.state),
        "python": [version, list(internal), gauss],
    }


def unpack_rng(
    generator: np.random.Generator, tensors: Mapping[str, Tensor], info: Mapping[str, Any]
) -> None:
    """Restore what ``pack_rng`` captured (CUDA states only where those devices exist)."""
    torch.set_rng_state(tensors["rng.torch"])
    if torch.cuda.is_available():
        if "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        for index in range(torch.cuda.device_count()):
            if f"rng.cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"], index)
    generator.bit_generator.state = info["numpy"]
    version, internal, gauss = info["python"]
    random.setstate((version, tuple(internal), gauss))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
