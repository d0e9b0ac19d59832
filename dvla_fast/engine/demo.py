"""The demo: DVLA-RL learns on real handwritten digits, from nothing, in a few minutes on a CPU.

Pre-trains on the even digits, meta-tunes the gates with REINFORCE, and evaluates on the odd
digits, which training never sees. The settings of ``engine.config.demo_config`` follow images of
the even digits alone: held-out images, and cross-validation that leaves two even digits out of
training and tells them apart (epochs of meta-tuning, ways, frozen BatchNorm statistics,
augmentation, quarter turns). Quarter turns and frozen BatchNorm were first tried after a look at
results on the odd digits; where those would have preferred another setting, as for the epochs of
meta-tuning, the even ones decided. ``pretrain`` and ``metatune`` select their best epoch by
held-out images too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dvla_fast import __version__
from dvla_fast.data import EpisodeSampler, FewShotData, ImageSet
from dvla_fast.data.images import unit_range
from dvla_fast.engine.build import build_data, seed_everything
from dvla_fast.engine.checkpoint import load_checkpoint
from dvla_fast.engine.config import DemoRun, EvaluateConfig
from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.episode_lists import build_samplers
from dvla_fast.engine.evaluate import Contender, Evaluation, load_model
from dvla_fast.engine.execution import Execution
from dvla_fast.engine.inductive import require_bank_texts
from dvla_fast.engine.inputs import pixel_facts
from dvla_fast.engine.leaks import SeenImages, find_seen_images
from dvla_fast.engine.metatune import check_metatuning, metatune
from dvla_fast.engine.models import backbone_spec, build_model, load_backbone, model_spec
from dvla_fast.engine.monitor import accuracy_text
from dvla_fast.engine.predict import BEFORE, FIXED, VISUAL
from dvla_fast.engine.pretrain import check_pretraining, pretrain
from dvla_fast.engine.progress import Progress
from dvla_fast.engine.recipes import recipe_of, started_from
from dvla_fast.engine.records import keep_record
from dvla_fast.engine.run_folder import RunFolder
from dvla_fast.engine.settings import UsageError, checked, to_dict
from dvla_fast.engine.stages import StageRun
from dvla_fast.engine.texts import build_texts
from dvla_fast.engine.trained_classes import training_stages
from dvla_fast.nn import DVLA
from dvla_fast.pictures.demo import plot_demo
from dvla_fast.semantics import EncodedTexts

# Shares of the time that the stages take, for the overall progress bar (measured on 2 cores).
_SHARES = {"pre-train": 0.22, "meta-tune": 0.43, "evaluate": 0.35}


def run_demo(config: DemoRun, *, quiet: bool = False) -> dict[str, Any]:
    """Do what ``dvla-fast demo`` does; returns the summary that it writes."""
    started, config = time.monotonic(), checked(config)
    require_bank_texts(config.evaluate)
    execution = _execution(config)
    device = execution.processes.device
    data = build_data(config.data, device, quiet=quiet)
    texts, semantics = build_texts(config.semantics, data, device)
    backbone = backbone_spec(config.model, data.channels, data.image_size)
    spec = model_spec(config.model, backbone, semantics["dim"])
    seen = find_seen_images(config.semantics, data, config.evaluate.split)
    # What fits no model, and too few images, are found before the training.
    check_pretraining(config.pretrain, data, execution.processes)
    check_metatuning(config.metatune, build_model(spec), data, execution.processes)
    tested = data.split(config.evaluate.split)
    samplers = build_samplers(config.evaluate, tested, config.seed, seen.barred)
    folder = RunFolder(config.output, to_dict(config), resume=config.resume, wandb=config.wandb)
    with folder:
        with Progress(_SHARES, enabled=not quiet) as progress:
            rng = seed_everything(config.seed)
            run = StageRun(folder, rng, config.seed, progress, execution)
            pretrained = pretrain(config.pretrain, data, backbone, run)
            rng = seed_everything(config.seed + 1)
            model = build_model(spec)
            training = training_stages(load_backbone(model, backbone, pretrained)[1])
            model.to(device)
            facts = {"semantics": semantics, "started_from": str(pretrained), "training": training}
            run = replace(run, rng=rng)
            tuned = metatune(config.metatune, model, spec, data, texts, run, facts)
            progress.begin("evaluate", config.evaluate.episodes * len(samplers))
            evaluation = _evaluation(config.evaluate, data, texts, pretrained, tuned)
            results = _results(evaluation, samplers, run, seen)
        provenance = _provenance(tuned, model, semantics, device)
        results = [result | provenance for result in results]
        summary: dict[str, Any] = {
            "command": "demo",
            "seconds": round(time.monotonic() - started, 1),
            "resumed": config.resume,
            **results[0],
            "gated_layers": [list(layer) for layer in model.gated_layers],
            "classes": {"base": data.base.class_names, "novel": data.novel.class_names},
            "results": results,
        }
        folder.write_summary(summary)
        picture = folder.write_file(
            "curves.png",
            lambda path: plot_demo(
                path,
                summary,
                folder.rows("pretrain"),
                folder.rows("metatune"),
                samples={
                    "learned in training": _samples(data.base),
                    "never seen": _samples(data.novel),
                },
                labels={FIXED: f"{FIXED}, α = {config.evaluate.fixed_alpha:g}"},
            ),
        )
    return {**summary, "folder": str(folder.path), "picture": str(picture)}


def _execution(config: DemoRun) -> Execution:
    processes = Processes(config.device)
    if processes.count > 1:
        raise UsageError("the demo runs in one process; launch pretrain and metatune instead")
    return Execution(config.execution, processes)


def _evaluation(
    config: EvaluateConfig, data: FewShotData, texts: EncodedTexts, pretrained: Path, tuned: Path
) -> Evaluation:
    """The pre-trained and the meta-tuned checkpoint, side by side."""
    (_, first, _), (model, backbone, _) = (load_model(str(x), data) for x in (pretrained, tuned))
    return Evaluation([Contender(model, {BEFORE: first, VISUAL: backbone})], data, texts, config)


def _results(
    evaluation: Evaluation, samplers: Sequence[EpisodeSampler], run: StageRun, seen: SeenImages
) -> list[dict[str, Any]]:
    """Evaluate every list of episodes, and keep what it leaves."""
    run.folder.trim("evaluate", -1)
    pixels = pixel_facts(evaluation.images)
    results = []
    for sampler in samplers:
        result, record = evaluation.evaluate(sampler, run.progress)
        result["leaks"] = seen.summary(sampler, evaluation.config.episodes)
        result |= pixels
        results.append(result)
        keep_record(run.folder, result, record, evaluation.images.class_names)
        scored = accuracy_text(result["accuracy"], result["ci95"])
        run.progress.note(f"{sampler.shot}-shot {scored}")
    return results


def _provenance(
    checkpoint: Path, model: DVLA, semantics: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    info = load_checkpoint(checkpoint)[1]
    return {
        "checkpoint": str(checkpoint),
        "checkpoints_sha256": [info.get("tensors_sha256")],
        "started_from": [started_from(info)],
        "recipe": recipe_of(model, info),
        "semantics": semantics,
        "device": str(device),
        "dvla_fast": __version__,
        "torch": torch.__version__,
    }


def _samples(images: ImageSet) -> dict[str, Any]:
    """Of each of the first five classes the image nearest to its mean, as in ``Samples``."""
    found = {}
    for label, name in enumerate(images.class_names[:5]):
        pixels = unit_range(images.images[images.labels == label])
        distance = (pixels - pixels.mean(0)).square().sum((1, 2, 3))
        found[name] = pixels[distance.argmin()].permute(1, 2, 0).squeeze(-1).cpu().numpy()
    return found
