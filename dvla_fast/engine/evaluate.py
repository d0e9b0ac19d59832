"""Evaluation on paired episodes: visual prototypes, a fixed gate, and the learned gate.

All methods, checkpoints and compared runs meet the same episodes, so their differences are taken
episode by episode: the spread of the episodes' difficulty cancels, and a difference of tenths of a
point can be told from chance. ``engine.predict`` computes, ``statistics`` has the formulas.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dvla_fast import __version__
from dvla_fast.data import EpisodeSampler, FewShotData, ImageSet
from dvla_fast.engine.build import build_data, pick_device, seed_everything
from dvla_fast.engine.checkpoint import load_checkpoint, load_weights
from dvla_fast.engine.compare import check_comparable, compare_groups
from dvla_fast.engine.config import EvaluateConfig, EvaluateRun, SemanticsConfig
from dvla_fast.engine.episode_lists import build_samplers
from dvla_fast.engine.inductive import EpisodeTexts
from dvla_fast.engine.inputs import images_fingerprint, pixel_facts
from dvla_fast.engine.leaks import SeenImages, find_seen_images
from dvla_fast.engine.models import build_model, build_pretrain_model, described_by, placed
from dvla_fast.engine.monitor import accuracy_text
from dvla_fast.engine.predict import (
    LEARNED,
    VISUAL,
    EpisodePredictor,
    Predictions,
    image_features,
    predict_visual,
)
from dvla_fast.engine.progress import Progress
from dvla_fast.engine.recipes import check_one_recipe, checkpoint_paths, recipe_of, started_from
from dvla_fast.engine.records import (
    EpisodeRecord,
    finished_result,
    keep_record,
    keep_result,
)
from dvla_fast.engine.run_folder import RunFolder
from dvla_fast.engine.settings import checked, to_dict
from dvla_fast.engine.starting import published, published_visformer, trained_normalisation
from dvla_fast.engine.texts import build_texts
from dvla_fast.engine.trained_classes import require_untrained, training_stages
from dvla_fast.engine.trained_texts import COMPARED, check_semantics, text_differences
from dvla_fast.errors import CheckpointError
from dvla_fast.nn import DVLA
from dvla_fast.semantics import EncodedTexts
from dvla_fast.statistics import (
    INTERVAL,
    PAIRED_INTERVAL,
    mean_interval,
    paired_difference,
    require_scipy,
)


class Contender(NamedTuple):
    """A checkpoint to evaluate.

    model: gated model, or None for visual prototypes alone; backbones: name -> backbone to
    evaluate with visual prototypes.
    """

    model: DVLA | None
    backbones: Mapping[str, nn.Module]


def compare(accuracies: Mapping[str, Tensor], reference: str) -> dict[str, Any]:
    """Summarise paired accuracies.

    Args:
        accuracies: method -> (n,) accuracies on the same episodes.
        reference: the method that the others are subtracted from.

    Returns:
        ``{"methods": {name: {accuracy, ci95}}, "paired": {"<reference> - <other>": {...}}}``.
    """
    methods, paired = {}, {}
    for name, values in accuracies.items():
        mean, half = mean_interval(values)
        methods[name] = {"accuracy": mean, "ci95": half}
        if name != reference:
            paired[f"{reference} - {name}"] = paired_difference(accuracies[reference], values)
    return {"methods": methods, "paired": paired}


class Evaluation:
    """Evaluates checkpoints on lists of episodes of one split; images are computed once.

    Args:
        contenders: the checkpoints, alike in their methods. Accuracies are means over them.
        texts: encoded texts of all classes; needed with gated models.
        config: split and numbers; :meth:`evaluate` takes the list of each of its shots.
        episode_texts: what writes each episode's texts, instead of ``texts``.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        data: FewShotData,
        texts: EncodedTexts | None,
        config: EvaluateConfig,
        episode_texts: EpisodeTexts | None = None,
    ) -> None:
        self.contenders, self.data, self.config = contenders, data, config
        self.images = data.split(config.split)
        self.predictors: list[EpisodePredictor | None] = []
        self._features: dict[tuple[int, str], Tensor] = {}
        self._passed: list[EpisodeSampler] = []
        for contender in contenders:
            predictor = None
            if contender.model is not None and (texts is not None or episode_texts is not None):
                predictor = EpisodePredictor(
                    contender.model,
                    data,
                    texts,
                    config.split,
                    episode_texts=episode_texts,
                    fixed_alpha=config.fixed_alpha,
                    visual=any(b is contender.model.backbone for b in contender.backbones.values()),
                    cache_mib=config.cache_mib / len(contenders),
                )
            self.predictors.append(predictor)

    def evaluate(
        self, sampler: EpisodeSampler, progress: Progress | None = None
    ) -> tuple[dict[str, Any], EpisodeRecord]:
        """Evaluate all methods on one list of episodes.

        Returns:
            The result (settings, episode-list fingerprint, accuracy of the main method, which is
            the learned gate or else the first backbone, all methods and paired differences), and
            the record of all predictions.
        """
        config = self.config
        for passed, predictor in itertools.product(self._passed, self.predictors):
            if predictor is not None:
                predictor.remember(passed, config.episodes, progress)
        self._passed.clear()
        found = [self._predictions(i, sampler, progress) for i in range(len(self.contenders))]
        main = LEARNED if LEARNED in found[0] else next(iter(found[0]))
        accuracies = {
            name: torch.stack([each[name].accuracies for each in found]) for name in found[0]
        }
        compared = compare({name: rows.mean(0) for name, rows in accuracies.items()}, main)
        whole = sampler.batch(0, config.episodes)
        record = EpisodeRecord(
            whole.classes,
            whole.query_labels,
            {name: torch.stack([each[name].predicted for each in found]) for name in found[0]},
            _recorded_alphas(found),
        )
        result = {
            **identity(self.data, config, sampler),
            "episode_list": config.episode_list,
            "seed": sampler.seed,
            "method": main,
            **compared["methods"][main],
            "interval": INTERVAL,
            **compared,
            "paired_interval": PAIRED_INTERVAL,
            "fixed_alpha": config.fixed_alpha,
            "alpha": _alphas(record.alphas),
        }
        if self.predictors[0] is not None:
            result["computed"] = self.predictors[0].plans
            result["gated_layers"] = [list(pair) for pair in self.predictors[0].model.gated_layers]
        if len(found) > 1:
            result["over_checkpoints"] = {name: record.over_checkpoints(name) for name in found[0]}
        return result, record

    def pass_over(self, sampler: EpisodeSampler) -> None:
        """Leave out a list that was evaluated in an earlier process.

        Lists that follow compute its images first, in the batches in which it would have: batches
        of other images round otherwise.
        """
        self._passed.append(sampler)

    def _predictions(
        self, index: int, sampler: EpisodeSampler, progress: Progress | None
    ) -> dict[str, Predictions]:
        contender, predictor = self.contenders[index], self.predictors[index]
        count, found = self.config.episodes, {}
        for name, backbone in contender.backbones.items():
            if predictor is not None and backbone is predictor.model.backbone:
                found[name] = predictor.visual(sampler, count, progress)
                continue
            if (index, name) not in self._features:
                self._features[index, name] = image_features(
                    backbone, self.data, self.images, progress=progress
                )
            found[name] = predict_visual(self._features[index, name], sampler, count)
        if predictor is not None:
            found |= predictor.predict(sampler, count, self.config.batch_episodes, progress)
        elif progress is not None:
            progress.advance(count)
        return found


def _recorded_alphas(found: Sequence[Mapping[str, Predictions]]) -> Tensor | None:
    """(K, n, L), or None without learned gates."""
    alphas = [each[LEARNED].alphas for each in found if LEARNED in each]
    kept = [values for values in alphas if values is not None]
    return torch.stack(kept).float() if kept else None


def _alphas(recorded: Tensor | None) -> dict[str, Any]:
    """Mean and deviation of each layer's gate, over checkpoints and episodes."""
    if recorded is None:
        return {}
    alphas = recorded.flatten(0, 1)
    return {"mean": alphas.mean(0).tolist(), "std": alphas.std(0, unbiased=False).tolist()}


def identity(data: FewShotData, config: EvaluateConfig, sampler: EpisodeSampler) -> dict[str, Any]:
    """Describe a list of episodes: two evaluations may be paired when all of it agrees."""
    images = data.split(config.split)
    return {
        "dataset": data.name,
        "split_list": data.split_list,
        "split": config.split,
        "split_sha256": split_fingerprint(images),
        "images_sha256": images_fingerprint(images),
        "way": sampler.way,
        "shot": sampler.shot,
        "query": sampler.query,
        "episodes": config.episodes,
        "episodes_sha256": sampler.fingerprint(config.episodes),
    }


def split_fingerprint(images: ImageSet) -> str:
    """Return a hash of a split's class names and labels in order, to know it in another run."""
    digest = hashlib.sha256(json.dumps(images.class_names).encode())
    digest.update(images.labels.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def load_model(path: str, data: FewShotData) -> tuple[DVLA | None, nn.Module, dict[str, Any]]:
    """Rebuild the model of a checkpoint from its own description.

    The path may also name a ``.pth`` file of the method's authors: its backbone is evaluated.

    Returns:
        (gated model or None for a pre-training checkpoint, backbone, description), on the
        data's device.

    Raises:
        CheckpointError: unreadable, foreign, or made for images of another size.
    """
    if published(path):
        backbone, info = published_visformer(path, data)
        return None, placed(backbone, data.base.device), info
    tensors, info = load_checkpoint(path, ("pretrain", "metatune"))
    spec = info["model"]["backbone"]
    shape = (spec.get("in_channels", 3), spec["image_size"])
    if shape != (data.channels, data.image_size):
        remedy = (
            f"set --data.image_size {shape[1]}"
            if shape[0] == data.channels
            else "give the data set that it is for (--data.dataset, or --config RUN/config.yaml)"
        )
        raise CheckpointError(
            f"{path}: made for images of {shape[0]} channel(s) and {shape[1]} pixels, but "
            f"{data.name} gives {data.channels} and {data.image_size}; {remedy}, or use another "
            "checkpoint"
        )
    device = data.base.device
    if info["kind"] == "pretrain":
        with described_by(path):
            container = build_pretrain_model(spec, info["model"]["classes"])
        load_weights(container, tensors, "model.", path)
        return None, placed(container["backbone"], device), info
    with described_by(path):
        model = build_model(info["model"])
    load_weights(model, tensors, "model.", path)
    placed(model, device)
    return model, model.backbone, info


class _Texts(NamedTuple):
    """What the gates read, and what a summary says of it; all None for visual prototypes alone.

    encoded: texts of the bank's classes, or written: what writes each episode's; described: as of
    ``build_texts``; changed: as of ``text_differences``; seen: the images they were written from.
    """

    encoded: EncodedTexts | None = None
    written: EpisodeTexts | None = None
    described: dict[str, Any] | None = None
    changed: dict[str, Any] | None = None
    seen: SeenImages | None = None

    @property
    def barred(self) -> Tensor | None:
        """(N,) bool, the images that are kept out of the queries, if any are."""
        return None if self.seen is None else self.seen.barred


def run_evaluate(config: EvaluateRun, *, quiet: bool = False) -> dict[str, Any]:
    """Do what ``dvla-fast evaluate`` does; returns the summary that it writes."""
    config = checked(config)
    paths, settings = checkpoint_paths(config), config.evaluate
    device = pick_device(config.device)
    data = build_data(config.data, device, quiet=quiet)
    loaded = [load_model(path, data) for path in paths]
    contenders = [Contender(model, {VISUAL: backbone}) for model, backbone, _ in loaded]
    infos = [info for _, _, info in loaded]
    check_one_recipe(paths, [model for model, _, _ in loaded], infos)
    stages = {path: training_stages(info) for path, info in zip(paths, infos)}
    classes = require_untrained(stages, data, settings.split)
    texts = _Texts()
    if contenders[0].model is not None:
        texts = _find_texts(config, data, dict(zip(paths, infos)))
    elif settings.construct:
        warnings.warn(
            f"evaluate.construct: not used, for {config.checkpoint} has no gates that read texts",
            stacklevel=2,
        )
    samplers = _samplers(config, data, texts.barred)  # fail before the folder is made
    data = trained_normalisation(data, infos[0])
    facts = {
        "checkpoint": config.checkpoint,
        "checkpoints": paths,
        "checkpoints_sha256": [info.get("tensors_sha256") for info in infos],
        "started_from": [started_from(info) for info in infos],
        "trained_on": infos[0].get("dataset"),
        "trained_split_list": infos[0].get("split_list"),
        "recipe": recipe_of(contenders[0].model, infos[0]),
        "cross_domain": infos[0].get("dataset", data.name) != data.name,
        "monitor": data.monitor_kind,
        "shared_images": len(data.shared),
        "enlarged_from": data.reduced if data.reduced < data.image_size else 0,
        **pixel_facts(data.split(settings.split)),
        "semantics": texts.described,
        "text_differences": texts.changed or {},
        "device": str(device),
        "dvla_fast": __version__,
        "torch": torch.__version__,
    }
    folder = RunFolder(config.output, to_dict(config), resume=config.resume, wandb=config.wandb)
    with folder, ExitStack() as opened:
        seed_everything(config.seed)
        folder.trim("evaluate", -1)  # those of finished lists are written again
        if texts.written is not None:
            opened.callback(texts.written.close)
            texts.written.open(folder.path)
        evaluation = Evaluation(contenders, data, texts.encoded, settings, texts.written)
        results = []
        with Progress({"evaluate": 1.0}, enabled=not quiet) as progress:
            progress.begin("evaluate", settings.episodes * len(settings.shots) * len(contenders))
            for sampler in samplers:
                leaks = {
                    "classes": classes,
                    **_leaks(texts.seen, sampler, settings.episodes, progress),
                }
                results.append(
                    _result(evaluation, sampler, {**facts, "leaks": leaks}, folder, progress)
                )
        # The fields of the first shot stand at the top; all of them are in "results".
        summary = {"command": "evaluate", **results[0], "results": results}
        folder.write_summary(summary)
        if config.compare:
            summary["compared"] = compare_groups([str(folder.path)], [config.compare])
            folder.write_summary(summary)
    return summary


def _result(
    evaluation: Evaluation,
    sampler: EpisodeSampler,
    known: Mapping[str, Any],
    folder: RunFolder,
    progress: Progress,
) -> dict[str, Any]:
    """Evaluate one list of episodes and keep what it leaves, unless the folder holds it already."""
    config, shot = evaluation.config, sampler.shot
    described = {**identity(evaluation.data, config, sampler), **known}
    result = finished_result(folder, described)
    if result is None:
        result, record = evaluation.evaluate(sampler, progress)
        result |= known
        keep_record(folder, result, record, evaluation.images.class_names)
        keep_result(folder, result)
    else:
        evaluation.pass_over(sampler)
        folder.log("evaluate", shot, accuracy=result["accuracy"], ci95=result["ci95"])
        progress.skip(config.episodes * len(evaluation.contenders))
    accuracy = accuracy_text(result["accuracy"], result["ci95"])
    progress.note(f"{shot}-shot {accuracy} ({result['method']})")
    return result


def _find_texts(
    config: EvaluateRun, data: FewShotData, infos: Mapping[str, Mapping[str, Any]]
) -> _Texts:
    """Encode the texts that the gates of checkpoints (path -> description) read."""
    split, device = config.evaluate.split, data.base.device
    if config.evaluate.construct:
        default = SemanticsConfig()
        given = [
            f"semantics.{name}"
            for name in ("bank", "encoder", "dim", "top_k", "template", "parts", "truncate")
            if getattr(config.semantics, name) != getattr(default, name)
        ]
        if given:
            warnings.warn(
                f"{', '.join(given)}: not used, for the texts are written as "
                f"{config.evaluate.construct} says",
                stacklevel=3,
            )
        run = config.output if config.resume else ""
        written = EpisodeTexts(config.evaluate.construct, data.split(split), run)
        none = torch.zeros(len(written.images), dtype=torch.bool)
        seen = SeenImages(none, written.leaks(), config.semantics.seen_images)
        described = written.described()
        found = _Texts(written=written, described=described, seen=seen)
    else:
        encoded, described = build_texts(config.semantics, data, device, [split])
        seen = find_seen_images(config.semantics, data, split)
        found = _Texts(encoded, described=described, seen=seen)
    for path, info in infos.items():
        check_semantics(described, info, path)
    compared = COMPARED if found.written is None else ("parts",)
    return found._replace(changed=text_differences(described, infos, data.name, compared))


def _samplers(
    config: EvaluateRun, data: FewShotData, barred: Tensor | None
) -> list[EpisodeSampler]:
    """The episodes of each shot, which are those of the run to compare with."""
    require_scipy()
    settings, images = config.evaluate, data.split(config.evaluate.split)
    samplers = build_samplers(settings, images, config.seed, barred)
    if settings.episode_list == "authors" and config.seed:
        warnings.warn(
            f"--seed {config.seed}: the authors' published list of episodes is that of seed 0; "
            "give --seed 0 where figures are to be compared with theirs",
            stacklevel=3,
        )
    if settings.episode_list == "authors" and not images.file_order:
        warnings.warn(
            f"{images.name}: images without file names, in an order of their publisher's: the "
            "authors' list draws from images sorted by file name, so these episodes have other "
            "images; evaluate on the image files where figures are to be compared with theirs",
            stacklevel=3,
        )
    if config.compare:
        described = [identity(data, settings, sampler) for sampler in samplers]
        check_comparable(described, config.compare)
    return samplers


def _leaks(
    seen: SeenImages | None, sampler: EpisodeSampler, episodes: int, progress: Progress
) -> dict[str, Any]:
    """What a summary says of queries that the texts were written from, told if there are any."""
    if seen is None:
        return {}
    leaks = seen.summary(sampler, episodes)
    if leaks["verdict"] == "leak":
        progress.note(
            f"leak: {leaks['seen_queries']} of {leaks['queries']} queries are images that the "
            "texts were written from"
        )
    return leaks
