"""From configuration to objects: seeds, devices, data, texts, backbones and models."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dvla_fast.data import FewShotData, ImageSet, load_data
from dvla_fast.data.shapes import BANKS, KINDS, load_shapes, make_classes
from dvla_fast.engine.checkpoint import load_checkpoint, load_weights
from dvla_fast.engine.config import DataConfig, ModelConfig, SemanticsConfig
from dvla_fast.engine.description import REMEDY
from dvla_fast.engine.settings import UsageError, differences
from dvla_fast.engine.settle import sized
from dvla_fast.engine.text_options import EncoderOptions, check_template
from dvla_fast.errors import CheckpointError, DataError, DVLAError, TrainingError
from dvla_fast.nn import DVLA, build_backbone
from dvla_fast.semantics import (
    EncodedTexts,
    HashedNGramEncoder,
    SemanticBank,
    TextEncoder,
    build_encoder,
    encode_bank,
    load_bank,
)
from dvla_fast.semantics.encoders import check_dim, encoder_identity
from dvla_fast.semantics.tokens import PARTS, encode_names, shuffled_sources, stored_tokens
from dvla_fast.semantics.vectors import CachedEncoder, vectors_path

# Of ModelConfig: what describes the backbone and its start, and not the gates.
_BACKBONE_FIELDS = (
    "backbone", "width", "clip_model", "pretrained", "normalisation", "backbone_options",
)  # fmt: skip


def seed_everything(seed: int) -> np.random.Generator:
    """Seed torch and Python; return the run's own NumPy generator."""
    random.seed(seed)
    torch.manual_seed(seed)
    return np.random.Generator(np.random.PCG64(seed))


def pick_device(name: str) -> torch.device:
    """Return the device for cpu, cuda, cuda:N or auto.

    Raises:
        DVLAError: unknown name, or no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise DVLAError(f"device {name!r} is unknown; choose cpu, cuda, cuda:N or auto")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise DVLAError(f"device {name!r} was asked for, but torch sees no GPU; choose cpu or auto")
    if device.index is not None and device.index >= count:
        raise DVLAError(f"device {name!r}: torch sees {count} GPU(s), cuda:0 to cuda:{count - 1}")
    return device


def build_data(config: DataConfig, device: torch.device, *, training: bool = False) -> FewShotData:
    """Load the data set onto the device; the images of a cache stay on disk.

    Raises:
        DataError: missing or unusable; or, for ``training``, without base classes.
    """
    config = sized(config)
    if config.dataset in KINDS:
        data = load_shapes(config.image_size, config.images_per_class, kind=config.dataset)
    else:
        data = load_data(
            config.dataset, config.image_size, config.holdout, config.split_seed, config.splits
        )
    if training and not len(data.base):
        raise DataError(
            f"{config.dataset}: no base classes to train on, only classes to evaluate; train on "
            "another data set and give this one to 'dvla-fast evaluate'"
        )
    return _resident(data.to(device), config.resident, device)


def _resident(data: FewShotData, wanted: str, device: torch.device) -> FewShotData:
    """Bring the training images of a cache into GPU memory, where asked for or where they fit."""
    if wanted not in ("auto", "yes", "no"):
        raise UsageError(f"data.resident: expected auto, yes or no, got {wanted!r}")
    sets = [data.base, data.monitor]
    if wanted == "no" or device.type != "cuda" or not any(item.mapped for item in sets):
        return data
    free, _ = torch.cuda.mem_get_info(device)
    if wanted == "auto" and sum(item.images.nbytes for item in sets) > free / 2:
        return data
    base, monitor = (replace(x, images=x.images.to(device), mapped=False) for x in sets)
    return replace(data, base=base, monitor=monitor)


def build_bank(name: str) -> SemanticBank:
    """Load a bank by name or path; those of ``shapes.BANKS`` are made with the data set."""
    if name not in BANKS:
        return load_bank(name)
    kind, hallucinated = BANKS[name]
    content = {
        "name": name,
        "provenance": {
            "kind": "definitions",
            "writer": "made with the images' definitions, without a look at an image",
        },
        "classes": make_classes(varied=KINDS[kind]).bank(hallucinated),
    }
    return SemanticBank.from_dict(content, name)


class TrainingData(FewShotData):
    """A data set without its test images: what pre-training and meta-tuning work on.

    Selection uses ``monitor``. The novel classes' names stay, their images do not, so that no
    training loop can score itself on them.
    """

    def split(self, name: str) -> ImageSet:
        """Return base or monitor.

        Raises:
            DataError: unknown name, or novel, which only an evaluation may read.
        """
        if name == "novel":
            raise DataError(
                f"{self.novel.name}: the test split is not read during training; select by "
                "'monitor', and run `dvla-fast evaluate` when training is done"
            )
        return super().split(name)


def without_test_split(data: FewShotData) -> TrainingData:
    """Return the data set as training may see it; no image is copied."""
    parts = {item.name: getattr(data, item.name) for item in fields(data)}
    novel = data.novel
    empty = replace(novel, images=novel.images[:0], labels=novel.labels[:0], ids=())
    return TrainingData(**{**parts, "novel": empty})


def normalisation(data: FewShotData) -> dict[str, list[float]]:
    """Return the channel statistics for a checkpoint's description."""
    return {"mean": data.mean.tolist(), "std": data.std.tolist()}


def build_texts(
    config: SemanticsConfig,
    data: FewShotData,
    device: torch.device,
    splits: Sequence[str] = (),
    encoder: TextEncoder | None = None,
) -> tuple[EncodedTexts, dict[str, Any]]:
    """Encode the bank's texts for all classes of the data set.

    Args:
        splits: only the classes of these must be in the bank, others may lack texts; none: all.
        encoder: of ``config`` (``bank_encoder``), where several calls share one.

    Returns:
        The texts in the order of ``data.class_names``, and a description for the summary.

    Raises:
        BankError: missing bank, class or text, or a text longer than the encoder reads.
    """
    bank = build_bank(config.bank)
    names = list(data.class_names)
    lacking = set(bank.missing(names)) if splits else set()
    if lacking.isdisjoint(name for split in splits for name in data.split(split).class_names):
        names = [name for name in names if name not in lacking]
    sources = text_sources(config, data, names)
    texts, described = encode_texts(config, bank, sources, device, encoder)
    texts = replace(texts, class_names=tuple(names))
    if len(names) < len(data.class_names):
        texts = texts.among(data.class_names)
    return texts, described


def text_sources(config: SemanticsConfig, data: FewShotData, names: Sequence[str]) -> list[str]:
    """Return the class whose texts each named class gets: itself, but with parts ``shuffled``."""
    if config.parts != "shuffled":
        return list(names)
    kept = set(names)
    splits = (data.base, data.monitor, data.novel)
    sources = shuffled_sources([n for n in split.class_names if n in kept] for split in splits)
    return [sources[name] for name in names]


def encode_texts(
    config: SemanticsConfig,
    bank: SemanticBank | str,
    names: list[str],
    device: torch.device,
    encoder: TextEncoder | None = None,
) -> tuple[EncodedTexts, dict[str, Any]]:
    """Encode a bank's texts for the named classes, in that order; see :func:`build_texts`.

    For parts ``shuffled`` the caller exchanges the names (:func:`text_sources`).
    """
    check_template(config.template, "semantics.template")
    if config.parts not in PARTS:
        raise UsageError(
            f"semantics.parts: {config.parts!r} is unknown; choose one of {', '.join(PARTS)}"
        )
    bank = build_bank(bank) if isinstance(bank, str) else bank
    if bank.vectors and config.parts == "name":
        raise UsageError(
            f"semantics.parts: {bank.source} has vectors and no words, so its classes' names "
            "cannot be encoded; choose all, attributes or description"
        )
    if bank.vectors:
        texts = stored_tokens(bank, names, config.top_k)
        check_dim(bank.source, bank.vectors.dim, config.dim)
        encoder_name, truncated = bank.vectors.encoder, 0
    else:
        encoder = encoder or bank_encoder(config, bank, device)
        cut_before = encoder.truncated
        if config.parts == "name":
            texts = encode_names(bank, names, encoder)
        else:
            texts = encode_bank(bank, names, encoder, top_k=config.top_k, template=config.template)
        encoder_name, truncated = encoder.name, encoder.truncated - cut_before
    if config.parts in ("attributes", "description"):
        texts = texts.only(config.parts)
    described = {
        "bank": bank.name,
        "bank_sha256": bank.fingerprint(),
        "bank_kind": bank.kind,
        "encoder": encoder_name,
        "dim": texts.tokens.shape[-1],
        "top_k": config.top_k,
        "template": config.template if config.top_k else None,
        "parts": config.parts,
        "truncate": config.truncate,
        "truncated_texts": truncated,
    }
    return texts.to(device), described


def bank_encoder(
    config: EncoderOptions, bank: SemanticBank, device: torch.device, *, cache: bool = False
) -> TextEncoder:
    """Build the encoder of a bank's texts, over the vectors beside the bank where there are any.

    Args:
        cache: use the file of vectors even if it does not exist yet.

    Raises:
        BankError: unknown encoder, weights that cannot be loaded, another ``config.dim``, or a
            damaged file of vectors.
    """

    def build() -> TextEncoder:
        return build_encoder(config.encoder, config.dim, truncate=config.truncate, device=device)

    path = vectors_path(bank.source)
    if not cache and not (Path(bank.source).is_file() and os.path.exists(path)):
        return build()
    identity = encoder_identity(config.encoder, config.dim)
    name = HashedNGramEncoder.name if config.encoder == HashedNGramEncoder.name else identity
    encoder = CachedEncoder(path, identity, name, build, truncate=config.truncate)
    check_dim(config.encoder, encoder.dim, config.dim)
    return encoder


def split_classes(data: FewShotData, split: str) -> Tensor:
    """Map a split's class indices to positions in ``data.class_names``: int64 (C,)."""
    position = {name: index for index, name in enumerate(data.class_names)}
    names = data.split(split).class_names
    return torch.tensor([position[name] for name in names], device=data.base.labels.device)


def backbone_spec(config: ModelConfig, channels: int, image_size: int) -> dict[str, Any]:
    """Describe a backbone completely: ``build_backbone(**spec)`` builds it."""
    spec: dict[str, Any] = {"name": config.backbone, "image_size": image_size}
    if config.backbone == "clip":
        spec["architecture"] = config.clip_model
        if channels != 3:
            raise UsageError(f"the clip backbone takes 3 colours, the images have {channels}")
    elif channels != 3 or config.backbone in ("small", "resnet12"):
        spec["in_channels"] = channels
    if config.backbone == "small":
        spec["width"] = config.width
    taken = sorted(set(spec) & set(config.backbone_options))
    if taken:
        raise UsageError(f"--model.backbone_options: {', '.join(taken)} has its own option")
    return spec | config.backbone_options


def build_pretrain_model(
    spec: dict[str, Any], classes: int, drop_path: float = 0.0
) -> nn.ModuleDict:
    """Build ``{"backbone", "head"}``: the backbone and a linear classifier.

    Stochastic depth belongs to the training, not to the network: no checkpoint knows of it.
    """
    backbone = _backbone({**spec, "drop_path_rate": drop_path} if drop_path else spec)
    head = nn.Linear(backbone.feature_dim, classes)
    return nn.ModuleDict({"backbone": backbone, "head": head})


def model_spec(config: ModelConfig, spec: dict[str, Any], text_dim: int) -> dict[str, Any]:
    """Describe a DVLA model completely: ``build_model`` builds it from this alone."""
    gate = asdict(config)
    for key in _BACKBONE_FIELDS:
        gate.pop(key)
    if config.policy != "fixed":
        gate.pop("fixed_alpha")
        if config.fixed_alpha != ModelConfig.fixed_alpha:
            warnings.warn(
                "model.fixed_alpha has no effect here: it belongs to policy fixed",
                UserWarning,
                stacklevel=2,
            )
    if not config.level_weights:
        gate.pop("level_weights")
    return {"backbone": spec, "text_dim": text_dim, **gate}


def build_model(spec: dict[str, Any]) -> DVLA:
    """Build the model that ``model_spec`` describes."""
    arguments = dict(spec)
    backbone = _backbone(arguments.pop("backbone"))
    layers = arguments.pop("gated_layers") or None  # empty: the backbone's own choice
    try:
        return DVLA(backbone, layers, **arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"cannot build the model: {error}") from error


@contextlib.contextmanager
def described_by(path: str | Path) -> Iterator[None]:
    """While a model is built that a checkpoint describes: name the file where that fails.

    Raises:
        CheckpointError: this version cannot build the model.
    """
    try:
        yield
    except RuntimeError as error:  # ours, and torch's of sizes that cannot be
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: its entry model: {reason}; {REMEDY}") from error


def _backbone(spec: dict[str, Any]) -> Any:
    arguments = dict(spec)
    name = arguments.pop("name")
    try:
        return build_backbone(name, **arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"cannot build the backbone {name!r}: {error}") from error


def fingerprint(spec: dict[str, Any]) -> str:
    """Return a short hash of a model description."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def load_backbone(model: DVLA, spec: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Load the backbone of a pre-training (or meta-tuning) checkpoint into a model.

    The path may also name a ``.pth`` file of published weights (``GatedBackbone.load_pretrained``).
    Regularisation such as drop-path may differ from what the checkpoint was trained with.

    Returns:
        The checkpoint's description.

    Raises:
        CheckpointError: unreadable, or of another backbone than ``spec`` describes.
    """
    if Path(path).suffix in (".pth", ".pt"):
        try:
            return model.backbone.load_pretrained(str(path))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    tensors, info = load_checkpoint(path, ("pretrain", "metatune"))
    theirs, ours = (
        {key: value for key, value in item.items() if key not in model.backbone.regularisers}
        for item in (info["model"]["backbone"], spec)
    )
    changed = differences(theirs, ours)
    if changed:
        raise CheckpointError(
            f"{path}: of another model ({'; '.join(changed[:3])}); use the --model and --data "
            "settings that it was trained with"
        )
    load_weights(model.backbone, tensors, "model.backbone.", path)
    return info


def check_weights(module: nn.Module, what: str) -> None:
    """Stop on broken weights before they meet an operation that cannot say where they come from.

    Raises:
        TrainingError: a parameter or buffer holds NaN or infinity.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise TrainingError(
                f"{what}: the weights {name!r} hold NaN or infinity; use an earlier checkpoint, or "
                "train with a lower rate"
            )
