"""Strictly inductive evaluation: every episode's texts are written from its own supports alone.

A bank is written once, and its classes' texts serve all episodes; here a language model is shown
nothing but the supports of the episode at hand. Answers are kept in the run folder by what was
asked, so a run that is continued asks nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvla_fast.data import EpisodeBatch, ImageSet
from dvla_fast.engine.bank_build import build_language_model
from dvla_fast.engine.build import pick_device
from dvla_fast.engine.config import EvaluateConfig
from dvla_fast.engine.settings import (
    UsageError,
    from_mapping,
    read_settings,
    to_dict,
    to_yaml,
)
from dvla_fast.engine.settle import absolute_paths
from dvla_fast.engine.tool_config import SemanticsBuild
from dvla_fast.errors import OutputError
from dvla_fast.files import write_text_atomic
from dvla_fast.nn import TextTokens
from dvla_fast.semantics import EncodedTexts, build_encoder
from dvla_fast.semantics.construct import EpisodeSemantics, Settings
from dvla_fast.semantics.sources import episode_images
from dvla_fast.semantics.stages import Prompts

BANK = "written for each episode"
_KEPT = "construct.yaml"  # of a run folder: its settings, with paths from the root
# Of the settings: those that may hold a path.
_PATHS = ("answers", "model", "candidates_prompt", "description_prompt", "encoder")
# Folders from the root, also behind an encoder's name ("open_clip:MODEL//a/b.bin"); and any.
_ROOTED, _ANY = re.compile("(^|[:/])/.*/"), re.compile(".*/")


class EpisodeTexts:
    """The texts of episodes, written as they come.

    Args:
        path: YAML file with the ``language_model`` and ``construct`` settings of ``dvla-fast
            semantics build``; ``construct.images`` is how many supports of a class are shown (0:
            its name alone). Its relative paths count from the working folder, as those of
            ``--config`` do.
        images: the split that the episodes are drawn from.
        run: folder of the run to continue, whose own settings are read in the place of the file;
            empty for a new one.

    Raises:
        UsageError: settings that cannot mean anything.
        OutputError: the file no longer says what the run began with.
        LanguageModelError, MissingDependencyError, BankError: as the model, encoder and prompts.
    """

    def __init__(self, path: str, images: ImageSet, run: str = "") -> None:
        self.config = _settings(path, run)
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
        """Keep the settings and the answers in a run folder."""
        construct = self.config.construct
        kept = {key: to_dict(self.config)[key] for key in ("language_model", "construct")}
        write_text_atomic(folder / _KEPT, to_yaml(kept))
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
        return {
            "bank": BANK,
            "bank_sha256": _digest(self.config),
            "bank_kind": self.kind,
            "encoder": self._encoder.name,
            "dim": self._encoder.dim,
            "top_k": construct.top_k,
            "template": construct.template,
            "parts": "all",
            "truncate": construct.truncate,
            "truncated_texts": self._encoder.truncated,
        }

    def leaks(self) -> dict[str, Any]:
        """The facts of ``leaks.seen_images``: a query is never a support of its own episode."""
        counts = dict.fromkeys(("images_seen", "seen_in_split", "unmatched", "unlisted"), 0)
        return {"bank_kind": self.kind, **counts, "per_episode": True, "verdict": "clean"}

    def __call__(self, batch: EpisodeBatch) -> TextTokens:
        """The text tokens of a batch of episodes, on the split's device."""
        assert self._semantics is not None, "open was not called"
        episodes = []
        for classes, support in zip(batch.classes.tolist(), batch.support.cpu()):
            names = [self.images.class_names[index] for index in classes]
            episodes.append((names, self._shown(support, len(names))))
        return _together(self._semantics.all_texts(episodes), self.images.device)

    def _shown(self, support: Tensor, way: int) -> Sequence[Any]:
        construct = self.config.construct
        if not construct.images:
            return [()] * way
        shown = episode_images(self.images, support, way, construct.max_side)
        return [images[: construct.images] for images in shown]


def require_bank_texts(config: EvaluateConfig) -> None:
    """Raise UsageError where each episode's texts are to be written: ``evaluate`` alone does it."""
    if config.construct:
        raise UsageError(
            "--evaluate.construct: texts are written for each episode by 'dvla-fast evaluate' "
            "alone; leave it empty here"
        )


def _settings(path: str, run: str) -> SemanticsBuild:
    """Read the settings of a file, or those that the run in a folder keeps."""
    kept = Path(run, _KEPT)
    continued = bool(run) and kept.is_file()
    found = _read(str(kept) if continued else path)
    # from another folder a relative path is not there, and so was not made absolute
    if continued and Path(path).is_file() and _digest(_read(path), _ANY) != _digest(found, _ANY):
        raise OutputError(
            f"{run}: cannot resume, for {path} has changed since the run began; restore it (the "
            f"settings of then are in {kept}), or start a new run"
        )
    return found


def _read(path: str) -> SemanticsBuild:
    config = read_settings(path, SemanticsBuild, SemanticsBuild(), "--evaluate.construct")
    return from_mapping(SemanticsBuild, absolute_paths(to_dict(config)), path)


def _digest(config: SemanticsBuild, folders: re.Pattern[str] = _ROOTED) -> str:
    """A hash of the settings, whatever folders their files lie in."""
    settings = to_dict(config)
    wanted = {
        section: {
            key: folders.sub("", value) if key in _PATHS else value
            for key, value in settings[section].items()
        }
        for section in ("language_model", "construct")
    }
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()


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
