"""Meta-tuning: gates, policy and backbone learn on episodes of the base classes.

Epochs of steps (``engine.metatune_steps``) with a validation after some of them, from settings to
the summary. Nothing here sees a novel class.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.engine.augmentation import Augmentation
from dvla_fast.engine.build import (
    build_data,
    normalisation,
    seed_everything,
    without_test_split,
)
from dvla_fast.engine.config import MetatuneConfig, MetatuneRun
from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.divergence import DivergenceWatch
from dvla_fast.engine.execution import Execution, adamw
from dvla_fast.engine.gating import GateTraining
from dvla_fast.engine.inputs import run_inputs
from dvla_fast.engine.memory import free_mib
from dvla_fast.engine.metatune_steps import Epoch, Step
from dvla_fast.engine.models import backbone_spec, build_model, model_spec
from dvla_fast.engine.monitor import monitor_episodes, monitor_sampler, monitor_word, scored
from dvla_fast.engine.next_steps import keep_settings_files
from dvla_fast.engine.predict import LEARNED, EpisodePredictor
from dvla_fast.engine.prefixes import PrefixMaps, check_constant_prefix
from dvla_fast.engine.progress import Progress
from dvla_fast.engine.run_folder import open_folder
from dvla_fast.engine.settings import checked, to_dict
from dvla_fast.engine.stages import StageRun, Validation, run_epochs, training_summary
from dvla_fast.engine.starting import begin_metatuning
from dvla_fast.engine.state import TrainingState
from dvla_fast.engine.texts import build_texts
from dvla_fast.engine.trained_classes import (
    require_untrained,
    training_stage,
    unknown_stage,
)
from dvla_fast.nn import DVLA
from dvla_fast.semantics import EncodedTexts

_MAPS_MIB = 8192  # the default of evaluate.cache_mib
_SELECTS = "monitor_accuracy"  # the figure that selects checkpoints


def parameter_groups(
    model: DVLA, config: MetatuneConfig, baseline: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Split parameters: the backbone at its small rate, everything new at the full one."""
    backbone = list(model.backbone.parameters())
    known = {id(parameter) for parameter in backbone}
    new = [parameter for parameter in model.parameters() if id(parameter) not in known]
    if baseline is not None:
        new += baseline.parameters()
    return [
        {"params": new, "lr": config.lr},
        {"params": backbone, "lr": config.backbone_lr},
    ]


def metatune(
    config: MetatuneConfig,
    model: DVLA,
    spec: dict[str, Any],
    data: FewShotData,
    texts: EncodedTexts,
    run: StageRun,
    facts: dict[str, Any] | None = None,
    prefixes: PrefixMaps | None = None,
) -> Path:
    """Meta-tune a model whose backbone is pre-trained.

    Args:
        config: the recipe.
        model: on the device to train on; trained in place.
        spec: its description (``models.model_spec``).
        texts: encoded texts of ``data.class_names``.
        run: folder, random numbers, display, execution; the display's stage is "meta-tune".
        facts: more to note in the checkpoints; ``training`` has the stages before this one
            (``trained_classes.training_stages``), which else are not known.
        prefixes: maps before the first gate, computed once for the whole run, of a frozen backbone
            without augmentation.

    Returns:
        Path of the checkpoint that validated best on monitor episodes.

    Raises:
        TrainingError: loss, features or weights became NaN or infinite; the last good one stays.
        UsageError: settings of the gates' learning that do not fit together.

    Warns:
        RuntimeWarning: a gate's policy has collapsed; once a layer.
    """
    if prefixes is not None:
        check_constant_prefix(config)
    data = without_test_split(data)
    model.backbone.requires_grad_(config.backbone_lr > 0)  # frozen: no gradients are computed
    execution = run.execution
    execution.prepare(model)
    gates = GateTraining(config, model, execution.processes)
    state = _state(config, model, spec, data, gates, run, facts or {})
    if run.folder.resume:
        state.restore()
    step = Step(config, model, data, texts, state.optimizer, gates, execution, run.seed, prefixes)
    rates = {"metatune.lr": config.lr, "metatune.backbone_lr": config.backbone_lr}
    watch = DivergenceWatch("meta-tuning", state, rates)
    epoch = Epoch(step, watch)
    run.progress.begin("meta-tune", config.epochs * config.steps_per_epoch, state.step)
    numbers = _monitor_episodes(data, config)
    sampler = monitor_sampler(data, numbers, run.seed + 1, run.progress)

    def train(state: TrainingState) -> dict[str, Any]:
        return epoch(state, run.progress.advance)

    def validate() -> dict[str, Any]:
        count, processes = config.validation_episodes, execution.processes.count
        return _validate(model, data, texts, sampler, count, processes, prefixes)

    validation = Validation(_SELECTS, numbers, validate, monitor_word(data))
    return run_epochs(config, run, watch, train, validation, _describe)


def _monitor_episodes(data: FewShotData, config: MetatuneConfig) -> dict[str, Any]:
    return monitor_episodes(data, config.way, config.shots[0], config.query)


def _state(
    config: MetatuneConfig,
    model: DVLA,
    spec: dict[str, Any],
    data: FewShotData,
    gates: GateTraining,
    run: StageRun,
    facts: dict[str, Any],
) -> TrainingState:
    """Begin the state of the stage, with its optimiser and what its checkpoints say of it."""
    groups = parameter_groups(model, config, gates.baseline)
    optimizer = adamw(groups, weight_decay=config.weight_decay)
    earlier = facts.get("training", [unknown_stage("before")])
    facts = {
        "dataset": data.name,
        "split_list": data.split_list,
        "normalisation": normalisation(data),
        "inputs": run_inputs(data, facts.get("semantics")),
        "seed": run.seed,
        **facts,
        "training": [*earlier, training_stage("metatune", data, config)],
    }
    modules = {"model": model, **gates.modules}
    return TrainingState(run.folder, "metatune", spec, modules, optimizer, run.rng, facts)


def _validate(
    model: DVLA,
    data: FewShotData,
    texts: EncodedTexts,
    sampler: EpisodeSampler,
    episodes: int,
    processes: int,
    prefixes: PrefixMaps | None,
) -> dict[str, Any]:
    """Return the accuracy of monitor episodes with the policy's mean, and its mean by layer.

    Training's own memory stays where it is: the feature maps kept here take at most a quarter of
    what is free beside it, over all processes.
    """
    most = min(_MAPS_MIB, free_mib(data.monitor.device) / (4 * processes))
    maps = None if prefixes is None else prefixes.of(model, "monitor")
    predictor = EpisodePredictor(model, data, texts, "monitor", cache_mib=most, maps=maps)
    found = predictor.predict(sampler, episodes)[LEARNED]
    assert found.alphas is not None
    score, half = scored(found.accuracies)
    return {_SELECTS: score, "monitor_ci95": half, "monitor_alpha": found.alphas.mean(0).tolist()}


def _describe(row: Mapping[str, Any]) -> str:
    alphas = ", ".join(f"{alpha:.2f}" for alpha in row["alpha_mean"])
    return f"accuracy {row['accuracy']:.1%}  alpha {alphas}"


def run_metatune(
    config: MetatuneRun, *, quiet: bool = False, files: Sequence[str] = ()
) -> dict[str, Any]:
    """Do what ``dvla-fast metatune`` does; returns the summary that it writes.

    Args:
        files: the settings files that it was given, for the command that follows.
    """
    config = checked(config)
    processes = Processes(config.device)
    execution = Execution(config.execution, processes)
    shown = not quiet and processes.main
    data = build_data(config.data, processes.device, training=True, quiet=not shown)
    texts, semantics = build_texts(config.semantics, data, processes.device, ["base", "monitor"])
    _warn_of_lacking_texts(texts, data)
    spec = model_spec(
        config.model,
        backbone_spec(config.model, data.channels, data.image_size),
        semantics["dim"],
    )
    rng = seed_everything(config.seed)
    model = build_model(spec)
    data, start = begin_metatuning(model, spec, data, config.model, config.checkpoint, semantics)
    model.to(processes.device)
    started = config.checkpoint or config.model.pretrained
    # Before any training: a checkpoint is selected by the one and evaluated on the other.
    classes = {
        split: require_untrained({started: start.stages}, data, split)
        for split in ("monitor", "novel")
    }
    check_metatuning(config.metatune, model, data, processes)
    # The rates are constant: a run that goes on for longer is the one that was longer at once.
    folder = open_folder(
        config.output, to_dict(config), processes, config.resume, config.wandb, ("metatune.epochs",)
    )
    with folder:
        keep_settings_files(folder, files)
        facts = {"semantics": semantics, "started_from": started, "gates": start.gates}
        noted = {**facts, "start": start.facts, "training": start.stages}
        with Progress({"meta-tune": 1.0}, enabled=shown) as progress:
            if start.gates == "continued":
                progress.note(f"the gates of {config.checkpoint} learn on")
            run = StageRun(folder, rng, config.seed, progress, execution)
            best = metatune(config.metatune, model, spec, data, texts, run, noted)
        processes.wait()
        numbers = _monitor_episodes(data, config.metatune)
        summary = {
            **training_summary(config, data, folder, processes, _SELECTS, numbers),
            **facts,
            "checkpoint": str(best),
            "gated_layers": [list(layer) for layer in model.gated_layers],
            "leaks": {"classes": classes},
        }
        folder.write_summary(summary)
    return summary


def _warn_of_lacking_texts(texts: EncodedTexts, data: FewShotData) -> None:
    """Warn of classes that training does not need, and evaluation will."""
    known = dict(zip(texts.class_names, texts.mask.any(1).tolist()))
    lacking = [name for name in data.novel.class_names if not known[name]]
    if lacking:
        shown = ", ".join(map(repr, lacking[:5])) + (", ..." if len(lacking) > 5 else "")
        warnings.warn(
            f"the bank lacks {len(lacking)} class(es) of the test split, which training does not "
            f"read and evaluating will: {shown}",
            stacklevel=3,
        )


def check_metatuning(
    config: MetatuneConfig, model: DVLA, data: FewShotData, processes: Processes
) -> None:
    """Find settings that cannot train before a folder is made.

    Raises:
        DataError, UsageError: what does not fit together.
        MissingDependencyError: augmentation that needs torchvision, without it.
    """
    for shot in config.shots:
        EpisodeSampler(data.base, config.way, shot, config.query, 0)
    _monitor_episodes(data, config)
    Augmentation(config.augment, data)
    GateTraining(config, model, processes)
    processes.share(config.episodes_per_step, "metatune.episodes_per_step")
