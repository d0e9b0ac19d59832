"""Predictions on a list of episodes, each image computed as seldom as the method allows.

Three plans, chosen by what a feature depends on; all give the model's own numbers:

- ``"once"``: supports do not depend on their episode (``DVLA.supports_are_independent``). Every
  image goes through once as a support and once as a query; episodes are gathers and one batched
  product with the prototypes.
- ``"supports"``: queries see no text but the supports' gate looks at its episode. Queries once
  per image; the supports, a few images, once per episode.
- ``"prefix"``: queries see texts, too. What comes before the first gate is computed
  once per image, the rest once per episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dvla_fast.data import EpisodeBatch, EpisodeSampler, FewShotData, ImageSet
from dvla_fast.engine.build import split_classes
from dvla_fast.engine.models import check_weights
from dvla_fast.engine.modes import evaluating
from dvla_fast.engine.progress import Progress
from dvla_fast.errors import TrainingError
from dvla_fast.nn import DVLA, TextTokens, prototype_logits
from dvla_fast.semantics import EncodedTexts

VISUAL, FIXED, LEARNED = "visual prototypes", "fixed gate", "learned gate"
BEFORE = f"{VISUAL}, before meta-tuning"
ONCE, SUPPORTS, PREFIX = "once", "supports", "prefix"
_GATHERED = 128  # episodes of one batched prototype product: about 15 MB of features
_MAPS = 4096  # of one pass on a GPU, whatever an episode has of them


class Predictions(NamedTuple):
    """What a method says about n episodes, on the CPU."""

    logits: Tensor
    """(n, Q, way)."""
    labels: Tensor
    """(n, Q) int64: the truth."""
    alphas: Tensor | None = None
    """(n, L): mean gate of each gated layer; None without gates."""

    @property
    def predicted(self) -> Tensor:
        """(n, Q) int64 in [0, way)."""
        return self.logits.argmax(-1)

    @property
    def accuracies(self) -> Tensor:
        """(n,) float32."""
        return (self.predicted == self.labels).float().mean(-1)


def image_features(
    backbone: nn.Module,
    data: FewShotData,
    images: ImageSet,
    progress: Progress | None = None,
) -> Tensor:
    """Compute the visual features (N, d) of a whole image set once, in evaluation mode.

    Args:
        progress: shown that work goes on, not advanced.

    Raises:
        TrainingError: a feature is NaN or infinite.
    """
    with evaluating(backbone), torch.inference_mode():
        chunks = images.chunks(_image_batch(images))
        parts: list[Tensor] = []
        for chunk in chunks:
            parts.append(backbone(data.normalise(chunk)))
            _show_images(progress, sum(map(len, parts)), len(images))
    features = torch.cat(parts)
    if not bool(features.isfinite().all()):
        bad = int((~features.isfinite()).any(1).sum())
        raise TrainingError(
            f"{images.name}: features of {bad} of {len(features)} images are NaN or infinite; "
            "the weights are broken: use an earlier checkpoint, or train with a lower rate"
        )
    return features


@torch.inference_mode()
def predict_visual(features: Tensor, sampler: EpisodeSampler, episodes: int) -> Predictions:
    """Classify with cosine prototypes of precomputed features (N, d)."""
    logits, labels = [], []
    for batch in _batches(sampler, episodes, _GATHERED, features.device):
        logits.append(
            prototype_logits(
                features[batch.support],
                batch.support_labels,
                features[batch.query],
                sampler.way,
            )
        )
        labels.append(batch.query_labels)
    return Predictions(torch.cat(logits).cpu(), torch.cat(labels).cpu())


def plan(model: DVLA, alpha: float | None = None) -> str:
    """Say which plan of this module's description is exact for a model (and a replayed gate)."""
    if model.text_scope != "class":
        return PREFIX
    return ONCE if model.supports_are_independent(alpha) else SUPPORTS


class EpisodePredictor:
    """Predicts episodes of one split with one model; remembers images across lists of episodes.

    Args:
        model: on the data's device. Its weights must not change while the predictor is used.
        texts: encoded texts of ``data.class_names``; None with ``episode_texts``.
        split: where the episodes are drawn from.
        episode_texts: gives the texts of a batch of episodes, which then are each episode's own.
        fixed_alpha: also predict with all gates fixed at this value.
        visual: :meth:`visual` will be asked too.
        cache_mib: largest memory for feature maps of the plans that keep maps. A split that needs
            more goes without: the same numbers, more slowly.
        maps: what ``DVLA.prefix`` gives for all images of the split, if it is known already.

    Raises:
        TrainingError: a weight is NaN or infinite.
    """

    def __init__(
        self,
        model: DVLA,
        data: FewShotData,
        texts: EncodedTexts | None,
        split: str,
        *,
        episode_texts: Callable[[EpisodeBatch], TextTokens] | None = None,
        fixed_alpha: float | None = None,
        visual: bool = False,
        cache_mib: float = 8192,
        maps: Tensor | None = None,
    ) -> None:
        self.maps = maps
        self.model, self.data, self.texts = model, data, texts
        self.images = data.split(split)
        check_weights(model, self.images.name)
        self.modes: dict[str, float | None] = {LEARNED: None}
        if fixed_alpha is not None:
            self.modes[FIXED] = fixed_alpha
        self.plans = {name: plan(model, alpha) for name, alpha in self.modes.items()}
        self.episode_texts = episode_texts
        if episode_texts is not None:  # then a support's feature is its episode's, too
            self.plans = {name: SUPPORTS if x == ONCE else x for name, x in self.plans.items()}
        self.image_batch = _image_batch(self.images)
        self.cache_mib = cache_mib
        self.classes = split_classes(data, split)  # positions in texts of the split's classes
        self._known = torch.zeros(len(self.images), dtype=torch.bool)
        self._tables: dict[str, Tensor] = {}
        self._map_mib = 0.0  # of one image, once known
        self._keep_maps = set(self.plans.values()) != {ONCE}
        self._plain = visual or set(self.plans.values()) != {PREFIX}

    def predict(
        self,
        sampler: EpisodeSampler,
        episodes: int,
        batch_episodes: int = 0,
        progress: Progress | None = None,
    ) -> dict[str, Predictions]:
        """Predict the first ``episodes`` episodes of a list.

        Args:
            batch_episodes: episodes of one pass, in the plans that compute images per episode; 0:
                8, but on a CPU no more than keep their maps in its cache, on a GPU than 4096 maps.
            progress: advanced by ``episodes`` in all.

        Returns:
            Predictions by method: ``LEARNED`` (the policy's mean), and ``FIXED`` if asked for.

        Raises:
            TrainingError: features or logits are NaN or infinite.
        """
        with evaluating(self.model), torch.inference_mode():
            self._fill(sampler, episodes, progress)
            results = {}
            for name in self.modes:
                results[name] = self._predict(name, sampler, episodes, batch_episodes, progress)
        return results

    def remember(
        self, sampler: EpisodeSampler, episodes: int, progress: Progress | None = None
    ) -> None:
        """Compute the images of a list's episodes, as :meth:`predict` does first."""
        with evaluating(self.model), torch.inference_mode():
            self._fill(sampler, episodes, progress)

    def visual(
        self,
        sampler: EpisodeSampler,
        episodes: int,
        progress: Progress | None = None,
    ) -> Predictions:
        """Predict with the model's backbone alone, its gates left out.

        Args:
            progress: shown that work goes on, not advanced.

        Raises:
            ValueError: the predictor was built without ``visual``.
        """
        if not self._plain:
            raise ValueError("visual: build the predictor with visual=True")
        with evaluating(self.model), torch.inference_mode():
            self._fill(sampler, episodes, progress)
            return predict_visual(self._tables["plain"], sampler, episodes)

    def _predict(
        self,
        name: str,
        sampler: EpisodeSampler,
        episodes: int,
        batch_episodes: int,
        progress: Progress | None,
    ) -> Predictions:
        parts: list[tuple[Tensor, Tensor]] = []
        labels: list[Tensor] = []
        if self.plans[name] == ONCE:
            size = _GATHERED
        else:
            size = batch_episodes or self._fitting(sampler)
        for batch in _batches(sampler, episodes, size, self.classes.device):
            if self.plans[name] == ONCE:
                parts.append(self._gathered(name, batch, sampler.way))
            elif self.plans[name] == SUPPORTS:
                parts.append(self._supports(name, batch, sampler.way))
            else:
                parts.append(self._whole(name, batch, sampler.way))
            labels.append(batch.query_labels)
            if progress is not None:  # an episode counts once, each method for its part
                progress.advance(len(batch.classes) / len(self.modes))
        logits, alphas = (torch.cat(column).cpu() for column in zip(*parts))
        if not bool(logits.isfinite().all()):
            raise TrainingError(
                f"{self.images.name}: the model's logits are NaN or infinite; the weights are "
                "broken: use an earlier checkpoint, or train with a lower rate"
            )
        return Predictions(logits, torch.cat(labels).cpu(), alphas)

    def _gathered(self, name: str, batch: EpisodeBatch, way: int) -> tuple[Tensor, Tensor]:
        """Plan "once"."""
        alphas = self._tables[f"alpha of {name}"][batch.support].mean(1)
        return self._logits(self._tables[name][batch.support], batch, way), alphas

    def _supports(self, name: str, batch: EpisodeBatch, way: int) -> tuple[Tensor, Tensor]:
        """Plan "supports"."""
        features, traces = self.model.support_features(
            self._inputs(batch.support),
            batch.support_labels,
            self._texts_of(batch),
            way=way,
            alpha=self.modes[name],
            sample=False,
            from_prefix=self._keep_maps,
        )
        alphas = torch.stack([_mean_alpha(trace.alpha, len(features)) for trace in traces], 1)
        return self._logits(features, batch, way), alphas

    def _whole(self, name: str, batch: EpisodeBatch, way: int) -> tuple[Tensor, Tensor]:
        """Plan "prefix"."""
        output = self.model(
            self._inputs(batch.support),
            batch.support_labels,
            self._inputs(batch.query),
            self._texts_of(batch),
            way=way,
            alpha=self.modes[name],
            sample=False,
            from_prefix=self._keep_maps,
        )
        count = len(batch.classes)
        alphas = torch.stack([_mean_alpha(trace.alpha, count) for trace in output.layers], 1)
        return output.logits, alphas

    def _texts_of(self, batch: EpisodeBatch) -> TextTokens:
        if self.episode_texts is not None:
            return self.episode_texts(batch)
        assert self.texts is not None
        return self.texts.episodes(self.classes[batch.classes])

    def _logits(self, support: Tensor, batch: EpisodeBatch, way: int) -> Tensor:
        query = self._tables["plain"][batch.query]
        return prototype_logits(support, batch.support_labels, query, way, self.model.temperature)

    def _inputs(self, index: Tensor) -> Tensor:
        """Maps before the first gate of images (E, n), or the images where maps are not kept."""
        if self._keep_maps:
            maps = self._tables["maps"] if self.maps is None else self.maps
            return maps[index]
        images = self.images.gather(index.flatten())
        return self.data.normalise(images).unflatten(0, index.shape)

    def _fill(
        self, sampler: EpisodeSampler, episodes: int, progress: Progress | None = None
    ) -> None:
        """Compute all rows of the images that the episodes use and that are not known yet."""
        self._limit_maps()
        if not (self._keep_maps or self._plain):
            return
        whole = sampler.batch(0, episodes)
        used = torch.zeros_like(self._known)
        used[whole.support.flatten()] = True
        used[whole.query.flatten()] = True
        missing = (used & ~self._known).nonzero().squeeze(1)
        if len(missing) == 0:
            return
        for number, part in enumerate(missing.split(self.image_batch)):
            _show_images(progress, number * self.image_batch, len(missing))
            index = part.to(self.classes.device)
            rows = self._rows(index)
            if not all(bool(values.isfinite().all()) for values in rows.values()):
                raise TrainingError(
                    f"{self.images.name}: image features are NaN or infinite; check the images, "
                    "or use an earlier checkpoint"
                )
            for key, values in rows.items():
                if key not in self._tables:
                    self._tables[key] = values.new_empty(len(self.images), *values.shape[1:])
                self._tables[key][index] = values
        self._known[missing] = True

    def _limit_maps(self) -> None:
        if self.maps is not None:
            self._map_mib = self.maps[0].nbytes / 2**20
            return
        if self._keep_maps and not self._tables:
            one = self.model.prefix(self.data.normalise(next(self.images.chunks(1))))
            self._map_mib = one.numel() * one.element_size() / 2**20
            self._keep_maps = self._map_mib * len(self.images) <= self.cache_mib

    def _fitting(self, sampler: EpisodeSampler) -> int:
        copies = sampler.way if self.model.text_scope == "candidate" else 1
        episode = sampler.way * (sampler.shot + copies * sampler.query)  # maps
        if self.images.device.type != "cpu":
            return min(8, max(1, _MAPS // episode))
        return min(8, max(1, int(8 / max(episode * self._map_mib, 1e-9))))  # 8 MiB in a pass

    def _rows(self, index: Tensor) -> dict[str, Tensor]:
        """Everything that is computed once per image, of images (n,)."""
        rows = {}
        if self.maps is not None:
            maps = self.maps[index]
        else:
            maps = self.model.prefix(self.data.normalise(self.images.gather(index)))
            rows = {"maps": maps} if self._keep_maps else {}
        if self._plain:
            rows["plain"] = self.model.backbone(maps, start=self.model.gated_layers[0])
        if ONCE not in self.plans.values() or self.texts is None:
            return rows
        text = self.texts.episodes(self.classes[self.images.labels[index]].unsqueeze(1))
        for name, alpha in self.modes.items():
            if self.plans[name] != ONCE:
                continue
            features, traces = self.model.support_features(
                maps.unsqueeze(1),  # every image an episode of its own, one way and one shot
                torch.zeros(len(maps), 1, dtype=torch.int64, device=maps.device),
                text,
                way=1,
                alpha=alpha,
                sample=False,
                from_prefix=True,
            )
            rows[name] = features.squeeze(1)
            alphas = [_mean_alpha(trace.alpha, len(maps)) for trace in traces]
            rows[f"alpha of {name}"] = torch.stack(alphas, 1)
        return rows


def _show_images(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress.tick(f"{done} of {total} images")


def _image_batch(images: ImageSet) -> int:
    """Images of one pass through the backbone: on a CPU as many as its cache holds the maps of.

    Visformer-Tiny then takes half the time of 128.
    """
    return 32 if images.device.type == "cpu" else 512


def _mean_alpha(alpha: Tensor, episodes: int) -> Tensor:
    return alpha.float().reshape(episodes, -1).mean(1)  # one per episode, whatever the scope


def _batches(
    sampler: EpisodeSampler, episodes: int, size: int, device: torch.device
) -> Iterator[EpisodeBatch]:
    for first in range(0, episodes, size):
        yield sampler.batch(first, min(size, episodes - first)).to(device)
