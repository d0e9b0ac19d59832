"""Single episodes of a run, computed from its checkpoint and data: features, gates and attention.

Everything here needs what a run folder alone does not hold. What cannot be had (checkpoint moved,
images gone, other images than the run's) comes back as a sentence for the page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dvla_fast.data import EpisodeSampler, FewShotData, ImageSet
from dvla_fast.data.decode import pillow
from dvla_fast.engine.build import build_data, pick_device, split_classes
from dvla_fast.engine.config import (
    LARGEST_SEED,
    DataConfig,
    EvaluateConfig,
    MetatuneConfig,
    SemanticsConfig,
)
from dvla_fast.engine.entries import count, short
from dvla_fast.engine.episode_lists import build_sampler
from dvla_fast.engine.evaluate import load_model
from dvla_fast.engine.inputs import images_fingerprint
from dvla_fast.engine.leaks import find_seen_images
from dvla_fast.engine.settings import from_mapping
from dvla_fast.engine.starting import trained_normalisation
from dvla_fast.engine.texts import build_texts, text_sources
from dvla_fast.engine.tool_config import ReportRun
from dvla_fast.errors import DVLAError
from dvla_fast.nn import DVLA, Explanation, explain_episodes, prototype_logits
from dvla_fast.report.attention import overlay_attention, peak_ratio, resize
from dvla_fast.report.collect import Run
from dvla_fast.report.texts import ClassTexts, class_texts
from dvla_fast.semantics import EncodedTexts

_SIDE = 104  # pixels of a picture on the page
_CLEAR = 1.5  # times even attention: what full colour stands for at least
MOST_CLASSES, _SHOWN = 24, 4  # of the texts' part: classes, and images of each
_WRONG, _RIGHT = 2, 2  # queries drawn of an episode


class Missing(Exception):
    """Something that the pictures need is not there; the message says what, in a sentence."""


@dataclass
class Overlay:
    """Attention of one text at one layer: picture (data URL) and its peak over even attention."""

    url: str
    peak: float


@dataclass
class Row:
    """One text's attention: an overlay for each gated layer."""

    text: str
    owner: str
    level: str
    overlays: list[Overlay]


@dataclass
class Look:
    """One image of an episode, what it was taken for, and where its texts looked."""

    url: str
    true: str
    answer: str
    right: bool
    share: float
    alphas: list[float]
    rows: list[Row]

    @property
    def owners(self) -> list[str]:
        """Classes whose texts are shown, the true one first."""
        return list(dict.fromkeys(row.owner for row in self.rows))


@dataclass
class Scene:
    """One episode.

    Attributes:
        reason: why it is shown.
        alphas: of each gated layer, mean over the episode.
        before, after: 2-d t-SNE of the visual and of the gated features, (S + Q, 2); None without
            scikit-learn.
        labels: (S + Q,) class of each image, supports first; ``supports``: how many those are.
        answers: (Q,) predicted classes; ``visual_accuracy``: of the prototypes before fusion.
    """

    number: int
    reason: str
    accuracy: float
    visual_accuracy: float
    names: list[str]
    shown: list[tuple[str, str]]
    looks: list[Look]
    alphas: list[float]
    labels: list[int]
    supports: int
    answers: list[int]
    before: list[tuple[float, float]] | None = None
    after: list[tuple[float, float]] | None = None


@dataclass
class Pictures:
    """What the page shows of one run's checkpoint and data."""

    run: str
    layers: list[str] = field(default_factory=list)
    scenes: list[Scene] = field(default_factory=list)
    texts: list[ClassTexts] = field(default_factory=list)
    provenance: str = ""
    text_scope: str = "episode"
    shot: int = 1
    notes: list[str] = field(default_factory=list)


def collect_pictures(runs: Sequence[Run], config: ReportRun) -> tuple[Pictures | None, list[str]]:
    """Compute the pictures of the first run that has all they need.

    Returns:
        The pictures, or None; and sentences about the runs that were tried in vain.
    """
    order = {"evaluate": 0, "demo": 1, "metatune": 2}
    able = sorted((r for r in runs if r.kind in order), key=lambda run: order[run.kind])
    if not able:
        return None, ["Features and attention: none of the runs has gates to look into."]
    notes: list[str] = []
    for run in able:
        pictures, reason = _try(run, config)
        if pictures is not None:
            return pictures, notes
        notes.append(f"Features and attention of {run.name} are missing: {reason}")
    return None, notes


def _try(run: Run, config: ReportRun) -> tuple[Pictures | None, str]:
    try:
        return _Studio(run, config).pictures(), ""
    except Missing as error:
        return None, str(error)
    except (DVLAError, OSError) as error:  # anything else is an error of ours, not of the run
        return None, f"{' '.join(str(error).split())}."


class _Studio:
    """A run's model, data, texts and list of episodes."""

    def __init__(self, run: Run, config: ReportRun) -> None:
        self.run, self.wanted = run, config.episodes
        self.pillow = pillow()
        device = pick_device(config.device)
        path = _checkpoint(run)
        data = build_data(from_mapping(DataConfig, run.config.get("data", {})), device)
        model, _, info = load_model(str(path), data)
        if model is None:
            raise Missing("its checkpoint is one of pre-training, which has no gates.")
        self.model: DVLA = model.eval()
        self.data: FewShotData = trained_normalisation(data, info)
        self.semantics = from_mapping(SemanticsConfig, run.config.get("semantics", {}))
        self.split, self.sampler, self.shot = self._episodes(config.shot)
        self.images: ImageSet = self.data.split(self.split)
        self.positions = split_classes(self.data, self.split)
        texts: EncodedTexts = build_texts(self.semantics, data, device, [self.split])[0]
        self.texts = texts
        # Classes of other splits may lack texts.
        known = [name for name, has in zip(texts.class_names, texts.mask.any(1)) if has]
        sources = dict(zip(known, text_sources(self.semantics, data, known)))
        names = self.images.class_names
        own = [sources[name] for name in names]
        self.phrases = class_texts(self.semantics, texts.among(names), own)

    def _episodes(self, shot: int) -> tuple[str, EpisodeSampler, int]:
        run = self.run
        seed = run.config.get("seed", 0)
        if not count(0, LARGEST_SEED)(seed):
            raise Missing(f"its config.yaml has the seed {short(seed)}, which cannot be.")
        if run.kind == "metatune":
            tuning = from_mapping(MetatuneConfig, run.config.get("metatune", {}))
            shot = shot or tuning.shots[0]
            sampler = EpisodeSampler(self.data.monitor, tuning.way, shot, tuning.query, seed)
            return "monitor", sampler, shot
        settings = from_mapping(EvaluateConfig, run.config.get("evaluate", {}))
        if settings.construct:
            raise Missing("each episode had texts of its own there, which no bank holds.")
        shot = shot or settings.shots[0]
        images = self.data.split(settings.split)
        barred, known = None, run.result(shot) or {}
        # demos that do not speak of leaks left no images out
        if run.kind == "evaluate" or (run.kind == "demo" and "leaks" in known):
            barred = find_seen_images(self.semantics, self.data, settings.split).barred
        sampler = build_sampler(
            settings.episode_list, images, settings.way, shot, settings.query, seed, barred
        )
        result = run.result(shot)
        if result is None and run.results:
            raise Missing(f"it was not evaluated with {shot} support(s) a class.")
        same = result is None or (
            sampler.fingerprint(settings.episodes) == result.get("episodes_sha256")
            # results of earlier versions do not say which images they are of
            and result.get("images_sha256") in (None, images_fingerprint(images))
        )
        if not same:
            raise Missing(
                "the images that are there now give other episodes than the run met; restore the "
                "data set that it used."
            )
        return settings.split, sampler, shot

    def pictures(self) -> Pictures:
        """Compute everything."""
        result = Pictures(self.run.name, shot=self.shot, text_scope=self.model.text_scope)
        result.layers = [f"stage {s}, block {b}" for s, b in self.model.gated_layers]
        for number, reason in self._choose(result.notes):
            result.scenes.append(self._scene(number, reason))
        if result.scenes and result.scenes[0].before is None:
            result.notes.append("t-SNE needs scikit-learn: pip install 'dvla-fast[train]'.")
        result.texts = self._texts()
        result.provenance = self.phrases.provenance
        return result

    def _choose(self, notes: list[str]) -> list[tuple[int, str]]:
        record = self.run.records.get(self.shot)
        count = len(next(iter(record.predictions.values()))) if record else 1
        if count > 1:
            notes.append(
                f"Features, episodes and attention are of the first of {count} checkpoints."
            )
        if self.wanted:
            last = record.labels.shape[0] if record else None
            kept = [number for number in self.wanted if last is None or number < last]
            if len(kept) < len(self.wanted):
                notes.append(f"The list ends at episode {last - 1 if last else 0}.")
            return [(number, "asked for") for number in kept]
        if record is None:
            return [(number, "one of the first of the list") for number in range(3)]
        method = (self.run.result(self.shot) or {}).get("method") or next(iter(record.predictions))
        shown = record.predictions[method][0]  # of the checkpoint that is drawn, the first
        order = (shown == record.labels).double().mean(1).argsort(stable=True).tolist()
        chosen = {
            order[0]: "the lowest accuracy of all",
            order[len(order) // 2]: "the median accuracy",
            order[-1]: "the highest accuracy of all",
        }
        return list(chosen.items())

    def _scene(self, number: int, reason: str) -> Scene:
        batch = self.sampler.batch(number, 1).to(self.images.device)
        index = torch.cat((batch.support, batch.query), 1)[0]
        raw = self.images.gather(index)
        images = self.data.normalise(raw)
        supports = batch.support.shape[1]
        text = self.texts.episodes(self.positions[batch.classes])
        way = self.sampler.way
        found = explain_episodes(
            self.model, images[None, :supports], batch.support_labels, images[None, supports:],
            text, way=way,
        )  # fmt: skip
        with torch.no_grad():
            visual = self.model.features(images)
        logits = found.output.logits[0]
        truth = batch.query_labels[0]
        answers = logits.argmax(-1)
        plain = prototype_logits(
            visual[None, :supports], batch.support_labels, visual[None, supports:], way
        )
        classes = batch.classes[0].tolist()
        names = [self.images.class_names[c] for c in classes]
        before, after = _embed(visual), _embed(found.features[0])
        scene = Scene(
            number,
            reason,
            (answers == truth).float().mean().item(),
            (plain[0].argmax(-1) == truth).float().mean().item(),
            names,
            [
                (self._url(raw[i]), names[batch.support_labels[0, i]])
                for i in _one_each(batch.support_labels[0].tolist())
            ],
            [],
            [layer.alpha.float().mean().item() for layer in found.layers],
            torch.cat((batch.support_labels[0], truth)).tolist(),
            supports,
            answers.tolist(),
            before,
            after,
        )
        scene.looks = self._looks(found, raw, truth, supports, batch.support_labels[0], names)
        return scene

    def _looks(
        self,
        found: Explanation,
        raw: Tensor,
        truth: Tensor,
        supports: int,
        support_labels: Tensor,
        names: list[str],
    ) -> list[Look]:
        """Queries with every attribute's attention; in scopes but "episode" supports."""
        looks = []
        if self.model.text_scope != "episode":  # queries see no text there, or every class's
            for i in _one_each(support_labels.tolist()):
                label = int(support_labels[i])
                looks.append(self._look(found, raw[i], i, [label], names, label, label, 1.0, True))
            return looks
        shares = found.output.logits[0].softmax(-1)
        answers = shares.argmax(-1)
        right = (answers == truth).tolist()
        for i in _some(right, truth.tolist()):
            true, answer = int(truth[i]), int(answers[i])
            shown = [true] if right[i] else [true, answer]
            looks.append(
                self._look(
                    found, raw[supports + i], supports + i, shown, names, true, answer,
                    float(shares[i, answer]), False,
                )
            )  # fmt: skip
        return looks

    def _look(
        self,
        found: Explanation,
        raw: Tensor,
        place: int,
        shown: list[int],
        names: list[str],
        true: int,
        answer: int,
        share: float,
        own_text: bool,
    ) -> Look:
        """``place``: of the image among those that met text; ``own_text``: of its class alone."""
        weights = [layer.image[0, place].mean(0) for layer in found.layers]  # [P, N] each
        limits = [_limits(w) for w in weights]
        per_class = weights[0].shape[0] // (1 if own_text else len(names))
        rows = []
        for label in shown:
            phrases = self.phrases.tokens[names[label]]
            first = 0 if own_text else label * per_class
            for token, phrase in enumerate(phrases):
                if not phrase:
                    continue  # padding
                overlays = [
                    Overlay(
                        self._url(overlay_attention(raw, w[first + token], size=_SIDE, limits=lim)),
                        peak_ratio(w[first + token]),
                    )
                    for w, lim in zip(weights, limits)
                ]
                level = "description" if self.texts.levels[token] else "attribute"
                rows.append(Row(phrase, names[label], level, overlays))
        alphas = [
            float(layer.alpha[0, place] if layer.alpha.dim() == 2 else layer.alpha[0])
            for layer in found.layers
        ]
        return Look(self._url(raw), names[true], names[answer], true == answer, share, alphas, rows)

    def _texts(self) -> list[ClassTexts]:
        """The texts of the split's classes, with a few of their images."""
        cards = []
        for label, name in enumerate(self.images.class_names[:MOST_CLASSES]):
            card = self.phrases.cards[name]
            shown = self._seen(card.seen)
            card.drawn_seen = bool(shown)
            if not shown:
                places = (self.images.labels == label).nonzero()[:_SHOWN, 0]
                shown = list(self.images.gather(places))
            card.images = [self._url(image, 64) for image in shown]
            cards.append(card)
        return cards

    def _seen(self, wanted: Sequence[str]) -> list[Tensor]:
        """The images with these ids, a few of them, from whichever split has them."""
        found: list[Tensor] = []
        if not wanted:
            return found
        for images in (self.data.base, self.data.monitor, self.data.novel):
            places = [place for place, name in enumerate(images.ids) if name in wanted]
            if places:
                found += list(images.gather(torch.tensor(places[:_SHOWN], device=images.device)))
        return found[:_SHOWN]

    def _url(self, image: Tensor, side: int = _SIDE) -> str:
        """A picture (H, W, 3) uint8 or an image (C, H, W), as a JPEG data URL."""
        if image.shape[-1] != 3 or image.shape[0] in (1, 3):
            pixels = resize(image.detach().cpu(), side)
            pixels = pixels.expand(3, -1, -1) if pixels.shape[0] == 1 else pixels
            image = (255 * pixels).round().to(torch.uint8).permute(1, 2, 0)
        stream = io.BytesIO()
        self.pillow.fromarray(image.contiguous().numpy()).save(stream, "JPEG", quality=84)
        return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _checkpoint(run: Run) -> Path:
    """Find the checkpoint that a run evaluated or wrote, also where folders were moved together."""
    named = run.summary.get("checkpoint") or ""
    places = []
    if run.kind in ("metatune", "demo"):  # they wrote their own
        places.append(run.path / "checkpoints" / "metatune-best.safetensors")
    else:
        named = named or run.config.get("checkpoint") or ""
    if named:
        given = Path(str(named))
        places += [given, run.path.parent / Path(*given.parts[-3:])]
    for place in places:
        if place.is_file():
            return place
    raise Missing(f"the checkpoint {named or 'of meta-tuning'} is not there.")


def _limits(weights: Tensor) -> tuple[float, float]:
    """Colour from even attention upwards; attention that is all but even gets hardly any."""
    even = 1 / weights.shape[-1]
    return even, max(float(weights.max()), _CLEAR * even)


def _one_each(labels: list[int]) -> list[int]:
    """First position of every label."""
    return [labels.index(label) for label in sorted(set(labels))]


def _some(right: list[bool], truth: list[int]) -> list[int]:
    """A few queries: wrong ones first, each of another class where that can be."""
    chosen: list[int] = []
    for wanted, most in ((False, _WRONG), (True, _RIGHT)):
        able = [i for i, value in enumerate(right) if value == wanted]
        first: dict[int, int] = {}
        for i in able:
            first.setdefault(truth[i], i)
        fresh = [i for i in first.values() if truth[i] not in {truth[j] for j in chosen}]
        order = list(dict.fromkeys([*fresh, *first.values(), *able]))
        chosen += order[:most]
    return chosen


def _embed(features: Tensor) -> list[tuple[float, float]] | None:
    """t-SNE of (n, d) unit features into the plane; None without scikit-learn."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return None
    unit = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
    if len(unit) < 5:
        return None
    found = TSNE(
        perplexity=min(20.0, (len(unit) - 1) / 3), init="pca", random_state=0, max_iter=500
    ).fit_transform(unit)
    return [(float(x), float(y)) for x, y in found]
