"""Strictly inductive evaluation: every episode's texts are written from its own supports alone.

A bank is written once, and its classes' texts serve all episodes; here a language model is shown
nothing but the supports of the episode at hand. Answers are kept in the run folder by what was
asked, so a run that is continued asks nothing twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvla_fast.data import EpisodeBatch, ImageSet
from dvla_fast.engine.bank_build import build_language_model
from dvla_fast.engine.build import pick_device
from dvla_fast.engine.settings import read_settings, to_dict
from dvla_fast.engine.tool_config import SemanticsBuild
from dvla_fast.nn import TextTokens
from dvla_fast.semantics import EncodedTexts, build_encoder
from dvla_fast.semantics.construct import EpisodeSemantics, Settings
from dvla_fast.semantics.sources import episode_images
from dvla_fast.semantics.stages import Prompts

BANK = "written for each episode"


class EpisodeTexts:
    """The texts of episodes, written as they come.

    Args:
        path: YAML file with the ``language_model`` and ``construct`` settings of ``dvla-fast
            semantics build``; ``construct.images`` is how many supports of a class are shown (0:
            its name alone).
        images: the split that the episodes are drawn from.

    Raises:
        UsageError: settings that cannot mean anything.
        LanguageModelError, MissingDependencyError, BankError: as the model, encoder and prompts.
    """

    def __init__(self, path: str, images: ImageSet) -> None:
        self.config = read_settings(path, SemanticsBuild, SemanticsBuild())
        self.images = images
        construct = self.config.construct
        self._model = build_language_model(self.config.language_model)
        self._prompts = Prompts.load(construct.candidates_prompt, construct.description_prompt)
        self._encoder = build_encoder(
            construct.encoder, construct.dim, truncate=construct.truncate,
            device=pick_device(construct.device),
        )  # fmt: skip
        self._semantics: EpisodeSemantics | None = None

    def open(self, folder: Path) -> None:
        """Keep the answers in a run folder."""
        construct = self.config.construct
        self._semantics = EpisodeSemantics(
            self._model,
            self._encoder,
            prompts=self._prompts,
            settings=Settings(
                construct.top_k, construct.template, construct.candidates, construct.attempts
            ),
            journal=folder / "answers.jsonl",
        )

    def close(self) -> None:
        """Close the file of answers."""
        if self._semantics is not None:
            self._semantics.close()

    @property
    def kind(self) -> str:
        """What the texts are made from, as a bank would say it."""
        return "episode-supports" if self.config.construct.images else "class-names"

    def described(self) -> dict[str, Any]:
        """What a summary says of the texts, in the words of ``build_texts``."""
        construct = self.config.construct
        settings = to_dict(self.config)
        wanted = {key: settings[key] for key in ("language_model", "construct")}
        digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
        return {
            "bank": BANK,
            "bank_sha256": digest,
            "bank_kind": self.kind,
            "encoder": self._encoder.name,
            "dim": self._encoder.dim,
            "top_k": construct.top_k,
            "template": construct.template,
            "parts": "all",
            "truncated_texts": self._encoder.truncated,
        }

    def leaks(self) -> dict[str, Any]:
        """The facts of ``leaks.seen_images``: a query is never a support of its own episode."""
        counts = dict.fromkeys(("images_seen", "seen_in_split", "unmatched", "unlisted"), 0)
        return {"bank_kind": self.kind, **counts, "per_episode": True, "verdict": "clean"}

    def __call__(self, batch: EpisodeBatch) -> TextTokens:
        """The text tokens of a batch of episodes, on the split's device."""
        assert self._semantics is not None, "open was not called"
        parts = []
        for classes, support in zip(batch.classes.tolist(), batch.support.cpu()):
            names = [self.images.class_names[index] for index in classes]
            parts.append(self._semantics.texts(names, self._shown(support, len(names))))
        return _together(parts, self.images.device)

    def _shown(self, support: Tensor, way: int) -> Sequence[Any]:
        construct = self.config.construct
        if not construct.images:
            return [()] * way
        shown = episode_images(self.images, support, way, construct.max_side)
        return [images[: construct.images] for images in shown]


def _together(parts: Sequence[EncodedTexts], device: torch.device) -> TextTokens:
    """Texts of single episodes as one batch; fewer attributes than the most are padded."""
    most = max(part.tokens.shape[1] for part in parts)
    tokens = torch.stack([_padded(part.tokens, most) for part in parts]).flatten(1, 2)
    mask = torch.stack([_padded(part.mask, most) for part in parts]).flatten(1, 2)
    levels = torch.zeros(most, dtype=torch.int64)
    levels[-1] = 1
    way = len(parts[0].class_names)
    return TextTokens(
        tokens.to(device),
        levels.repeat(way).to(device),
        torch.stack([part.class_embedding for part in parts]).to(device),
        None if bool(mask.all()) else mask.to(device),
    )


def _padded(values: Tensor, most: int) -> Tensor:
    """(way, k + 1, ...) -> (way, most, ...): empty places before the description, which is last."""
    empty = values.new_zeros(values.shape[0], most - values.shape[1], *values.shape[2:])
    return torch.cat([values[:, :-1], empty, values[:, -1:]], dim=1)
