"""Text towers of transformers models: CLIP, SigLIP and their relatives, and sentence encoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvla_fast.errors import BankError, MissingDependencyError
from dvla_fast.semantics.encoders import LimitedEncoder

# What a sentence encoder's own files may ask for beyond a transformer and pooling.
_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}


class TransformersEncoder(LimitedEncoder):
    """A text encoder of the transformers library, in float32.

    Models with text and image towers give the text features of their common space. A sentence
    encoder is pooled as its ``1_Pooling/config.json`` says (mean, first or last token); a plain
    language model, which defines no vector of a text, by the mean of its tokens. Task prompts that
    some sentence encoders want before a text are not added.

    Args:
        source: name on the hub, or folder.
        name: identity of the encoder.
        truncate: as for ``LimitedEncoder``.
        device, batch_size: where the tower runs, and on how many texts at once.

    Raises:
        BankError: not to be found or loaded, or a sentence encoder with further layers.
        MissingDependencyError: transformers is not installed.
    """

    def __init__(
        self,
        source: str,
        name: str,
        *,
        truncate: bool = False,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
    ) -> None:
        transformers = _transformers()
        try:
            config = transformers.AutoConfig.from_pretrained(source)
            kind = config.model_type
            projected = kind == "clip_text_model"  # AutoModel would leave its projection out
            loader = transformers.CLIPTextModelWithProjection if projected else None
            loader = loader or transformers.AutoModel
            network, loaded = loader.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True
            )
            _check_loaded(source, loaded)
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            self._pooling = _pooling(source)
            limit = _limit(source, config, self._tokenizer)
        # the hub, the tokenizers and torch each raise their own
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            if isinstance(error, BankError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BankError(
                f"transformers:{source}: cannot be loaded ({reason[:300]}); give the folder of a "
                "model saved with its tokenizer, or a name on the hub"
            ) from error
        for tower in ("vision_model", "image_model"):
            if hasattr(network, tower):
                setattr(network, tower, None)  # half of the memory, never used here
        self._two_towers = hasattr(network, "get_text_features")
        self._pooled = projected or kind.endswith("text_model")
        # SigLIP learned on texts padded to full length and attends to the padding.
        self._padded = kind.startswith("siglip")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._network = network.to(device).eval().requires_grad_(False)
        self._device, self._batch_size = device, batch_size
        super().__init__(limit, truncate)
        self.name = name
        self.dim = self._vectors(["a"]).shape[1]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, special ones included."""
        found = self._tokenizer(list(texts), truncation=False, verbose=False)
        return [len(ids) for ids in found["input_ids"]]

    @torch.no_grad()
    def _vectors(self, texts: list[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), self._batch_size):
            tokens = self._tokenizer(
                texts[start : start + self._batch_size],
                padding="max_length" if self._padded else True,
                padding_side="right",
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self._device)
            parts.append(self._features(tokens).float().cpu())
        return torch.cat(parts)

    def _features(self, tokens: Any) -> Tensor:
        ids = {"input_ids": tokens["input_ids"]}
        if self._padded:
            masked = ids
        else:
            masked = {**ids, "attention_mask": tokens["attention_mask"]}
        if self._two_towers:
            found = self._network.get_text_features(**masked)
            result: Tensor = found if isinstance(found, Tensor) else found.pooler_output
            return result
        out = self._network(**masked)
        if self._pooled:
            return out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
        hidden, mask = out.last_hidden_state, tokens["attention_mask"]
        if self._pooling == "first":
            return hidden[:, 0]
        if self._pooling == "last":
            return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def _check_loaded(source: str, loaded: Any) -> None:
    # transformers fills what a checkpoint lacks with random numbers, and only logs it.
    keys = [*loaded["missing_keys"], *(item[0] for item in loaded["mismatched_keys"])]
    lacking = [key for key in sorted(keys) if "vision" not in key and "pooler" not in key]
    if lacking:
        raise BankError(
            f"transformers:{source}: its weights lack {len(lacking)} tensor(s) of the text "
            f"encoder, or hold them in another shape ({', '.join(lacking[:3])}); use a complete "
            "checkpoint"
        )


def _pooling(source: str) -> str:
    modules = _json(source, "modules.json") or []
    extra = [m["type"] for m in modules if m["type"].rpartition(".")[2] not in _MODULES]
    if extra:
        raise BankError(
            f"transformers:{source}: has layers after its pooling ({', '.join(extra)}), which are "
            "not supported; choose a sentence encoder without"
        )
    settings = _json(source, "1_Pooling/config.json") or {}
    modes = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on]
    if not modes:
        return "mean"
    if len(modes) > 1 or modes[0] not in _POOLINGS:
        raise BankError(
            f"transformers:{source}: pools by {', '.join(modes)}, which is not supported; choose a "
            "sentence encoder that takes the mean, the first or the last token"
        )
    return _POOLINGS[modes[0]]


def _limit(source: str, config: Any, tokenizer: Any) -> int:
    """Return the number of tokens that a model reads."""
    text = getattr(config, "text_config", config)
    limits = [int(tokenizer.model_max_length)]
    positions = getattr(text, "max_position_embeddings", None)
    if positions:
        # RoBERTa's positions start after its padding index.
        offset = text.pad_token_id + 1 if "roberta" in config.model_type else 0
        limits.append(positions - offset)
    settings = _json(source, "sentence_bert_config.json") or {}
    if settings.get("max_seq_length"):
        limits.append(int(settings["max_seq_length"]))
    return min(limits)


def _json(source: str, name: str) -> Any:
    """Read a JSON file of a model, None where it has no such file."""
    from transformers.utils.hub import cached_file

    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "transformers text encoders need transformers, which is not installed; run "
            "pip install 'dvla-fast[semantics]'"
        ) from error
    return transformers
