"""A trained model in use: it learns new classes from a few images and their texts.

Nothing is trained here. Supports become class prototypes, and queries go to the nearest one
(method §1), as in an episode of an evaluation with the policy's mean gate.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dvla_fast.arguments import expect_whole
from dvla_fast.data.decode import as_rgb, open_rgb, pillow, to_square
from dvla_fast.data.folders import class_folders
from dvla_fast.data.images import unit_range
from dvla_fast.engine.build import pick_device
from dvla_fast.engine.checkpoint import load_checkpoint, load_weights
from dvla_fast.engine.config import SemanticsConfig
from dvla_fast.engine.models import build_model, described_by, placed
from dvla_fast.engine.modes import evaluating
from dvla_fast.engine.settings import from_mapping
from dvla_fast.engine.texts import encode_texts
from dvla_fast.engine.trained_texts import check_semantics
from dvla_fast.errors import CheckpointError, DataError
from dvla_fast.nn import DVLA, LayerTrace, TextTokens
from dvla_fast.semantics import SemanticBank, load_bank

if TYPE_CHECKING:
    from numpy.typing import NDArray

Picture: TypeAlias = "str | Path | NDArray[np.uint8] | Any"
"""A file, a Pillow image, or an array: uint8 (H, W, 3), (H, W, 4) or (H, W), or uint16 (H, W)."""


class Classification(NamedTuple):
    """What is said about Q images, on the CPU."""

    class_names: tuple[str, ...]
    """The classes that were learned, in their order."""
    probabilities: Tensor
    """(Q, way) float32; rows sum to 1."""

    @property
    def predicted(self) -> list[str]:
        """The likeliest class of each image."""
        return [self.class_names[index] for index in self.probabilities.argmax(1).tolist()]


class _Learned(NamedTuple):
    """Classes and what stands for them; replaced as a whole."""

    class_names: tuple[str, ...]
    features: Tensor
    labels: Tensor
    layers: tuple[LayerTrace, ...]
    text: TextTokens | None


class FewShotClassifier:
    """A checkpoint ready to learn classes and classify images; see :meth:`load`.

    A model of one's own does as well, with a description of how it was trained::

        {
            "kind": "metatune",  # its gates were trained; "pretrain": learn() takes no bank
            "model": {"backbone": {"image_size": 84, "in_channels": 3}},
            "normalisation": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},  # of [0, 1]
            "semantics": {"encoder": "hashed-ngram", "dim": 512},  # that wrote its texts' vectors
        }

    Several threads may classify at once, and while another one learns: each call works with the
    classes that were known when it began.

    Args:
        model: the model, on the device to work on. Whatever its mode, it works here as in
            evaluation, and has its mode again afterwards.
        description: as above, or what a checkpoint of ``dvla-fast`` says of itself.

    Raises:
        ValueError: the description lacks ``kind`` or ``model`` with its ``backbone``.
    """

    def __init__(self, model: DVLA, description: Mapping[str, Any]) -> None:
        self.model = model
        self.description = dict(description)
        weight = next(model.parameters())
        self.device, self._dtype = weight.device, weight.dtype
        try:
            backbone, _ = description["model"]["backbone"], description["kind"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"description: lacks {error}; expected kind, model with its backbone, "
                "normalisation and semantics"
            ) from error
        self.image_size = int(backbone.get("image_size", 224))
        self.channels = int(backbone.get("in_channels", 3))
        statistics = description.get("normalisation") or {"mean": [0.0], "std": [1.0]}
        self._mean, self._std = (
            torch.tensor(statistics[name], device=self.device)[:, None, None]
            for name in ("mean", "std")
        )
        self._learned: _Learned | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that were learned, in their order."""
        return () if self._learned is None else self._learned.class_names

    @classmethod
    def load(cls, checkpoint: str | Path, device: str | torch.device = "auto") -> FewShotClassifier:
        """Load a checkpoint of ``dvla-fast metatune`` (or ``pretrain``: then without texts).

        Args:
            checkpoint: ``.safetensors`` file of a run's ``checkpoints/`` folder.
            device: "cpu", "cuda", "cuda:N", such a ``torch.device``, or "auto": cuda where there is
                one.

        Raises:
            CheckpointError: missing, damaged, or of another kind.
            TypeError: ``device`` is neither a name nor a device.
            UsageError: an unknown device.
            DVLAError: a device that is not there.
        """
        place = pick_device(device)
        tensors, info = load_checkpoint(checkpoint, ("pretrain", "metatune"))
        with described_by(checkpoint):
            model = build_model(info["model"] if info["kind"] == "metatune" else _ungated(info))
        if info["kind"] == "metatune":
            load_weights(model, tensors, "model.", checkpoint)
        else:
            load_weights(model.backbone, tensors, "model.backbone.", checkpoint)
        return cls(placed(model.eval(), place), info)

    @torch.inference_mode()
    def learn(
        self,
        supports: str | Path | Mapping[str, Sequence[Picture]],
        bank: str | Path | SemanticBank | None = None,
        encoder: str = "",
    ) -> FewShotClassifier:
        """Learn classes, in the place of any that were known before.

        Args:
            supports: class name to a few images of it, or a folder with a folder for each class.
            bank: texts of at least these classes, encoded as in training: a bank, its JSON file or
                its bundled name. Texts too long for the encoder are cut where training allowed
                that (``semantics.truncate``). None: no gate runs, and images alone decide.
            encoder: the text encoder of training with the place of its weights, where these were
                read from a file (``open_clip:MODEL/FILE``): a checkpoint knows their content only.

        Returns:
            The classifier itself.

        Raises:
            DataError: an image that cannot be read, a class without images, fewer than two classes.
            TypeError: something else than images, or than a list of them.
            BankError: a class without texts, a text too long, or an encoder that cannot be loaded.
            CheckpointError: a bank for a checkpoint without trained gates, or texts of another
                encoder than its gates learned to read.

        Warns:
            UserWarning: a bank for the control of an experiment, trained on wrong texts.
        """
        given = _folders(Path(supports)) if isinstance(supports, (str, Path)) else supports
        if not isinstance(given, Mapping):
            raise TypeError(
                "supports: expected class names with lists of images, or a folder, got "
                f"{type(given).__name__}"
            )
        for name, images in given.items():
            _check_list(images, f"supports: images of {name!r}")
        empty = [name for name, images in given.items() if not len(images)]
        if empty or len(given) < 2:
            raise DataError(
                f"supports: no image of {empty[0]!r}; give at least one of each class"
                if empty
                else f"supports: {len(given)} class(es); at least two are told apart"
            )
        text = None if bank is None else self._texts(bank, list(given), encoder)
        every = [image for group in given.values() for image in group]
        labels = [label for label, group in enumerate(given.values()) for _ in group]
        marks = torch.tensor([labels], device=self.device)
        with evaluating(self.model):
            features, layers = self.model.support_features(
                self._read(every).unsqueeze(0), marks, text, way=len(given), sample=False
            )
        # All or nothing: what was learned before is whole until then.
        self._learned = _Learned(tuple(given), features, marks, layers, text)
        return self

    @torch.inference_mode()
    def classify(self, images: Sequence[Picture], batch: int = 32) -> Classification:
        """Classify images; each by itself: their number and order change rounding alone.

        Args:
            batch: images of one pass. In text scope "candidate" each counts once for every class.

        Raises:
            ValueError: nothing was learned, no images, or ``batch`` is not positive.
            TypeError: ``images`` is no list, something in it no image, or ``batch`` no whole
                number.
            DataError: an image that cannot be read.
        """
        known = self._learned
        if known is None:
            raise ValueError("classify: learn(...) some classes first")
        _check_list(images, "classify: images")
        if not len(images):
            raise ValueError("classify: no images were given")
        expect_whole("classify: batch", batch)
        if batch < 1:
            raise ValueError(f"classify: batch: expected 1 or more images, got {batch}")
        parts, way = [], len(known.class_names)
        if self.model.text_scope == "candidate" and known.text is not None:
            batch = max(1, batch // way)
        with evaluating(self.model):
            for first in range(0, len(images), batch):
                query = self._read(images[first : first + batch]).unsqueeze(0)
                logits = self.model.query_logits(
                    known.features, known.labels, query, known.text, known.layers, way=way
                )
                parts.append(logits[0].softmax(-1).float().cpu())
        return Classification(known.class_names, torch.cat(parts))

    def _read(self, images: Sequence[Picture]) -> Tensor:
        """Network input (n, C, H, W) of images."""
        squares = np.stack([self._square(image) for image in images])
        pixels = unit_range(torch.from_numpy(squares).to(self.device))
        return ((pixels - self._mean) / self._std).to(self._dtype)

    def _square(self, image: Picture) -> NDArray[np.uint8]:
        square = to_square(_rgb(image), self.image_size)
        if self.channels == 3:
            return square
        grey = pillow().fromarray(np.ascontiguousarray(square.transpose(1, 2, 0))).convert("L")
        return np.asarray(grey)[None]

    def _texts(self, bank: str | Path | SemanticBank, names: list[str], encoder: str) -> TextTokens:
        if self.description["kind"] != "metatune":
            raise CheckpointError(
                "bank: a pre-training checkpoint has no trained gates to read texts; meta-tune it,"
                " or learn from images alone"
            )
        trained = self.description.get("semantics") or {}
        if trained.get("parts") == "shuffled":
            # No split says which texts would be wrong here, and wrong answers serve nobody.
            warnings.warn(
                "the checkpoint is the control of an experiment: it was trained on purpose with "
                "the texts of other classes (semantics.parts: shuffled). Here each class gets its "
                "own texts; use a checkpoint that learned with true ones, or learn from images "
                "alone",
                UserWarning,
                stacklevel=4,
            )
        known = {"encoder", "dim", "top_k", "template", "parts", "truncate"}
        options = {key: value for key, value in trained.items() if key in known and value}
        options |= {"encoder": encoder} if encoder else {}
        config = from_mapping(SemanticsConfig, options, "the checkpoint", section="semantics.")
        bank = bank if isinstance(bank, SemanticBank) else load_bank(bank)
        bank.require(names, "the supports")
        texts, described = encode_texts(config, bank, names, self.device)
        check_semantics(described, self.description, "the checkpoint")
        chosen = texts.episodes(torch.arange(len(names), device=self.device)[None])
        return chosen._replace(
            tokens=chosen.tokens.to(self._dtype),
            class_embedding=chosen.class_embedding.to(self._dtype),
        )


def _ungated(info: Mapping[str, Any]) -> dict[str, Any]:
    """A model around a pre-trained backbone whose gates are never asked."""
    return {"backbone": info["model"]["backbone"], "gated_layers": []}


def _check_list(images: Any, what: str) -> None:
    """Check that images come as a list of them (TypeError otherwise)."""
    one = isinstance(images, (str, bytes))
    if isinstance(images, np.ndarray):
        one = images.ndim < 3 or images.shape[2:] in ((3,), (4,))
    if one or not isinstance(images, (Sequence, np.ndarray)):
        raise TypeError(
            f"{what}: expected a list of images, got {type(images).__name__}; put a single image "
            "into a list: [image]"
        )


def _rgb(image: Picture) -> Any:
    """Read a picture as a Pillow image in RGB (TypeError or DataError otherwise)."""
    if isinstance(image, (str, Path)):
        return open_rgb(Path(image))[0]
    if isinstance(image, np.ndarray):
        depth = image.shape[2:]
        kinds = {(): (np.uint8, np.uint16), (3,): (np.uint8,), (4,): (np.uint8,)}
        if image.ndim < 2 or not image.size or image.dtype not in kinds.get(depth, ()):
            raise DataError(
                "image: expected uint8 (H, W) or (H, W, 3), channels last, or uint16 (H, W), got "
                f"{image.dtype} {image.shape}"
            )
        image = pillow().fromarray(image)
    if not isinstance(image, pillow().Image):
        raise TypeError(
            f"image: expected a file, an array or a Pillow image, got {type(image).__name__}"
        )
    return as_rgb(image, "image")


def _folders(root: Path) -> Mapping[str, Sequence[Picture]]:
    """Images of each class folder, in the order of their names."""
    found = class_folders(root) if root.is_dir() else {}
    if not found:
        what = "no folders in it" if root.is_dir() else "no such folder"
        raise DataError(f"{root}: {what}; give one with a folder of images for each class")
    return found
