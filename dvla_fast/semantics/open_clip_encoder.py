"""Text towers of open_clip models."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvla_fast.errors import BankError, MissingDependencyError
from dvla_fast.semantics.encoders import LimitedEncoder


class OpenCLIPEncoder(LimitedEncoder):
    """The text tower of an open_clip model, in float32.

    Args:
        model: name of a model configuration, ``hf-hub:NAME`` or ``local-dir:PATH``.
        weights: pretrained tag, or path of a weights file; of no matter for the last two.
        name: identity of the encoder.
        truncate: as for ``LimitedEncoder``.
        device, batch_size: where the tower runs, and on how many texts at once.

    Raises:
        BankError: unknown model or tag, or weights that cannot be fetched or do not fit.
        MissingDependencyError: open_clip is not installed.
    """

    def __init__(
        self,
        model: str,
        weights: str,
        name: str,
        *,
        truncate: bool = False,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
    ) -> None:
        open_clip = _open_clip()
        whole = ":" in model
        if not whole and model not in open_clip.list_models():
            near = difflib.get_close_matches(model, open_clip.list_models(), 3, 0.4)
            raise BankError(
                f"open_clip:{model}/{weights}: open_clip knows no model {model!r}; near: "
                f"{', '.join(near) or 'none'} (all: open_clip.list_models())"
            )
        try:
            network = open_clip.create_model(
                model,
                pretrained=None if whole else weights,
                require_pretrained=True,
                # The configuration does not say which activation a tag was trained with.
                force_quick_gelu=not whole and _quick_gelu(open_clip, model, weights),
            )
            tokenizer = open_clip.get_tokenizer(model)
        # open_clip, the hub and torch each raise their own
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BankError(
                f"open_clip:{model}{'' if whole else '/' + weights}: cannot be loaded "
                f"({reason[:300]}); give a model and a tag that open_clip lists, or the path of a "
                "weights file of that model"
            ) from error
        network.visual = None  # half of the memory, never used here
        self._network = network.to(device).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._device, self._batch_size = device, batch_size
        super().__init__(int(tokenizer.context_length), truncate)
        self.name = name
        self.dim = self._vectors(["a"]).shape[1]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, begin and end included."""
        inner = getattr(self._tokenizer, "tokenizer", None)
        if inner is None:
            return [len(self._tokenizer.encode(text)) + 2 for text in texts]
        return [len(ids) for ids in inner(list(texts), truncation=False)["input_ids"]]

    @torch.no_grad()
    def _vectors(self, texts: list[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), self._batch_size):
            tokens = self._tokenizer(texts[start : start + self._batch_size])
            parts.append(self._network.encode_text(tokens.to(self._device)).float().cpu())
        return torch.cat(parts)


def _quick_gelu(open_clip: Any, model: str, weights: str) -> bool:
    known = open_clip.get_pretrained_cfg(model, weights) if not Path(weights).exists() else {}
    return bool(known.get("quick_gelu", False))


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise MissingDependencyError(
            "open_clip text encoders need open_clip, which is not installed; run "
            "pip install 'dvla-fast[semantics]'"
        ) from error
    return open_clip
