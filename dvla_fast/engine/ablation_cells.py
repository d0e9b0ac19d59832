"""The cells of an ablation, one variant with one training seed each, and how they are computed.

A finished cell is one small file with the accuracy of every episode. A cell is claimed by a file
lock that ends with its process, so any number of launches may share a folder, and a cell that was
cut off is begun anew. What variants have in common is computed once per process: data, texts, and
the maps before the first gate of each seed's frozen backbone.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dvla_fast.data import EpisodeSampler, FewShotData
from dvla_fast.engine.ablation_variants import FULL, Variant
from dvla_fast.engine.build import build_data, seed_everything
from dvla_fast.engine.config import AblateRun, SemanticsConfig
from dvla_fast.engine.distributed import Processes
from dvla_fast.engine.episode_lists import build_samplers
from dvla_fast.engine.evaluate import load_model
from dvla_fast.engine.execution import Execution
from dvla_fast.engine.gating import reward_weights
from dvla_fast.engine.inputs import run_inputs
from dvla_fast.engine.leaks import find_seen_images
from dvla_fast.engine.metatune import check_metatuning, metatune
from dvla_fast.engine.models import backbone_spec, build_model, fingerprint, model_spec
from dvla_fast.engine.predict import LEARNED, EpisodePredictor, image_features, predict_visual
from dvla_fast.engine.prefixes import PrefixMaps, has_constant_prefix
from dvla_fast.engine.pretrain import check_pretraining, pretrain
from dvla_fast.engine.reward_curves import reward_curves
from dvla_fast.engine.run_folder import RunFolder
from dvla_fast.engine.settings import UsageError, to_dict
from dvla_fast.engine.stages import StageRun
from dvla_fast.engine.starting import begin_metatuning, normalise_for
from dvla_fast.engine.texts import bank_encoder, build_texts
from dvla_fast.errors import OutputError
from dvla_fast.files import unwritable, write_atomic, write_text_atomic
from dvla_fast.nn import DVLA
from dvla_fast.semantics import EncodedTexts, HashedNGramEncoder, TextEncoder, load_bank

BACKBONE = "backbone"
# What may change between two launches on one folder: which cells there are, not what is in them.
FREE_KEYS = ("output", "resume", "device", "wandb", "ablate")
_REMEDY = "give --output a folder that you may write to"
_POLL = 0.2  # seconds between two looks at cells that others compute


class Cell(NamedTuple):
    """A unit of work: a variant with a training seed; variant None: that seed's backbone."""

    variant: Variant | None
    seed: int

    @property
    def key(self) -> str:
        name = BACKBONE if self.variant is None else self.variant.name
        return f"{name}-seed{self.seed}"


def all_cells(variants: Sequence[Variant], seeds: Sequence[int]) -> list[Cell]:
    """Seed by seed, so that a stopped ablation has whole seeds, and each backbone first."""
    return [Cell(variant, seed) for seed in seeds for variant in (None, *variants)]


@dataclass(frozen=True)
class Store:
    """The files of an ablation's folder."""

    path: Path

    @property
    def cells(self) -> Path:
        return self.path / "cells"

    def result(self, cell: Cell) -> Path:
        """The file that exists when the cell is finished."""
        if cell.variant is None:
            return self.backbone(cell.seed) / "summary.json"
        return self.cells / f"{cell.key}.npz"

    def error(self, cell: Cell) -> Path:
        return self.cells / f"{cell.key}.error.json"

    def backbone(self, seed: int) -> Path:
        return self.path / "backbones" / f"seed{seed}"

    def finished(self, cell: Cell) -> bool:
        return self.result(cell).exists()

    def failed(self, cell: Cell) -> bool:
        """Whether it ended with an error in this launch; another one tries it again."""
        return self.error(cell).exists() and not self.finished(cell)

    def ended(self, cell: Cell) -> bool:
        """Whether nothing is left to compute of it in this launch."""
        return self.finished(cell) or self.failed(cell)

    def reason(self, cell: Cell) -> str:
        """Why a cell failed; another launch may take that away, to try the cell again."""
        try:
            return str(json.loads(self.error(cell).read_text())["error"])
        except FileNotFoundError:
            return "another launch is trying it again"

    def prepare(self) -> None:
        try:
            for name in ("cells", "claims", "backbones", "running"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.path, error, _REMEDY) from error

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Try to take a piece of work; False: somebody else, here or elsewhere, has it.

        The lock is the operating system's, on a file in ``claims/``: it ends with the process.

        Raises:
            OutputError: the folder cannot be written.
        """
        import fcntl  # POSIX alone has it

        path = self.path / "claims" / name
        try:
            claimed = open(path, "a")  # noqa: SIM115 - closed below
        except OSError as error:
            raise unwritable(path, error, _REMEDY) from error
        with claimed as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def write(self, cell: Cell, arrays: dict[str, Any], facts: dict[str, Any]) -> None:
        """Keep a finished cell: accuracies (and gates) by shot, and facts as JSON inside."""
        text = json.dumps(facts)
        path = self.result(cell)

        def save(temporary: Path) -> None:
            with open(temporary, "wb") as stream:
                np.savez_compressed(stream, facts=np.array(text), **arrays)

        write_atomic(path, save)
        self.error(cell).unlink(missing_ok=True)

    def read(self, cell: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a finished cell back: (arrays, facts).

        Raises:
            OutputError: the file is damaged.
        """
        path = self.result(cell)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            return arrays, json.loads(str(arrays.pop("facts")))
        except Exception as error:  # numpy raises nearly anything on damaged files
            raise OutputError(
                f"{path}: not a finished cell ({error}); remove it and run the ablation again"
            ) from error


class Workshop:
    """Computes cells, and keeps what they share.

    Args:
        config: the base configuration.
        store: where backbones and running cells lie.
        device: of all tensors.
        quiet: do not show how far reading the images is.

    Raises:
        DataError, BankError, UsageError: as building the data.
    """

    def __init__(
        self, config: AblateRun, store: Store, device: torch.device, *, quiet: bool = True
    ) -> None:
        self.config, self.store, self.device = config, store, device
        data = build_data(config.data, device, training=True, quiet=quiet)
        self.data = normalise_for(data, config.model)
        self._texts: dict[str, tuple[EncodedTexts, dict[str, Any]]] = {}
        self._encoders: dict[str, TextEncoder] = {}
        # The episodes are the same for all variants and training seeds: those that suit the texts
        # of the base configuration.
        split = config.evaluate.split
        self._seen = find_seen_images(config.semantics, self.data, split)
        self.samplers = build_samplers(
            config.evaluate, self.data.split(split), config.seed, self._seen.barred
        )
        self._prefixes: tuple[int, PrefixMaps] | None = None

    def texts(self, config: AblateRun) -> tuple[EncodedTexts, dict[str, Any]]:
        """Encoded texts of a variant, each kind once."""
        key = json.dumps(asdict(config.semantics), sort_keys=True)
        if key not in self._texts:
            encoder = self._encoder(config.semantics)
            self._texts[key] = build_texts(
                config.semantics, self.data, self.device, encoder=encoder
            )
        return self._texts[key]

    def _encoder(self, semantics: SemanticsConfig) -> TextEncoder | None:
        """The encoder of a bank, which remembers: variants have most of their texts in common."""
        bank = load_bank(semantics.bank)
        if bank.vectors or semantics.encoder == HashedNGramEncoder.name:
            return None
        if bank.source not in self._encoders:
            self._encoders[bank.source] = bank_encoder(semantics, bank, self.device, cache=True)
        return self._encoders[bank.source]

    def check(self, variants: Sequence[Variant]) -> None:
        """Build every variant's model, texts and objective before work starts.

        Raises:
            UsageError, BankError, DataError: what does not fit, with the variant's name.
        """
        check_pretraining(self.config.pretrain, self.data, Processes())
        for variant in variants:
            if not variant.trains:
                continue
            config = variant.apply(self.config)
            try:
                model = build_model(self._spec(config))
                check_metatuning(config.metatune, model, self.data, Processes())
            except UsageError as error:
                raise UsageError(f"variant {variant.name}: {error}") from error

    def inputs(self) -> dict[str, str]:
        """Hashes of the images and texts that all cells have in common."""
        split = self.config.evaluate.split
        return run_inputs(self.data, self.texts(self.config)[1], split)

    def lists(self) -> dict[str, str]:
        """Fingerprints of the lists of episodes, by shot, as every cell records them."""
        episodes = self.config.evaluate.episodes
        return {str(sampler.shot): sampler.fingerprint(episodes) for sampler in self.samplers}

    def leaks(self) -> dict[str, dict[str, Any]]:
        """What the summary says of queries that the texts were written from, by shot."""
        episodes = self.config.evaluate.episodes
        return {str(x.shot): self._seen.summary(x, episodes) for x in self.samplers}

    def _spec(self, config: AblateRun) -> dict[str, Any]:
        backbone = backbone_spec(config.model, self.data.channels, self.data.image_size)
        return model_spec(config.model, backbone, self.texts(config)[1]["dim"])

    def run(self, cell: Cell) -> None:
        """Compute a cell that this process has claimed, and keep its result."""
        if cell.variant is None:
            self._pretrain(cell.seed)
        else:
            self._variant(cell, cell.variant)

    def _pretrain(self, seed: int) -> None:
        started = time.monotonic()
        config, path = self.config, self.store.backbone(seed)
        spec = backbone_spec(config.model, self.data.channels, self.data.image_size)
        resume = (path / "config.yaml").exists()
        if not resume:
            shutil.rmtree(path, ignore_errors=True)
        settings = {**to_dict(config), "seed": seed}
        folder = RunFolder(path, settings, resume=resume, free=FREE_KEYS)
        with folder:
            run = StageRun(
                folder, seed_everything(seed), seed, execution=Execution(config.execution)
            )
            best = pretrain(config.pretrain, self.data, spec, run, config.model.pretrained)
            rows = [row["monitor_episode_accuracy"] for row in folder.rows("pretrain")
                    if "monitor_episode_accuracy" in row]  # fmt: skip
            (folder.checkpoints / "pretrain-last.safetensors").unlink(missing_ok=True)
            folder.write_summary(
                {
                    "command": "pretrain",
                    "seed": seed,
                    "checkpoint": str(best),
                    "monitor": self.data.monitor_kind,
                    "monitor_episode_accuracy": max(rows),
                    "seconds": time.monotonic() - started,
                }
            )

    def _variant(self, cell: Cell, variant: Variant) -> None:
        started = time.monotonic()
        config = variant.apply(self.config)
        checkpoint = self.store.backbone(cell.seed) / "checkpoints" / "pretrain-best.safetensors"
        facts: dict[str, Any] = {
            "variant": variant.name,
            "seed": cell.seed,
            "overrides": dict(variant.overrides),
        }
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if variant.trains:
                arrays, more = self._tuned(cell, config, checkpoint)
            else:
                arrays, more = self._visual(checkpoint)
        facts["warnings"] = sorted({str(item.message) for item in caught
                                    if item.category is RuntimeWarning})  # fmt: skip
        facts |= {**more, "seconds": time.monotonic() - started}
        self.store.write(cell, arrays, facts)

    def _visual(self, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        _, backbone, info = load_model(str(checkpoint), self.data)
        features = image_features(backbone, self.data, self.data.split(self.config.evaluate.split))
        arrays = {}
        for sampler in self.samplers:
            found = predict_visual(features, sampler, self.config.evaluate.episodes)
            arrays[f"accuracy-{sampler.shot}"] = found.accuracies.numpy()
        return arrays, {"episodes_sha256": self.lists(), "monitor_accuracy": info["best"]}

    def _tuned(
        self, cell: Cell, config: AblateRun, checkpoint: Path
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        path = self.store.path / "running" / cell.key
        shutil.rmtree(path, ignore_errors=True)
        texts, semantics = self.texts(config)
        spec = self._spec(config)
        # Gates and episodes follow the training seed; the backbone's own seed was the same.
        seed_everything(cell.seed + 1)
        pattern = build_model(self._spec(self.config))
        rng = seed_everything(cell.seed + 1)
        model = build_model(spec)
        start_alike(model, pattern)
        data, _ = begin_metatuning(model, spec, self.data, config.model, str(checkpoint))
        model.to(self.device)
        prefixes = self._prefix_maps(cell.seed, data, config)
        with RunFolder(path, to_dict(config), free=FREE_KEYS) as folder:
            run = StageRun(folder, rng, cell.seed, execution=Execution(config.execution))
            noted = {"semantics": semantics}
            best = metatune(config.metatune, model, spec, data, texts, run, noted, prefixes)
            rows = folder.rows("metatune")
        tuned, _, info = load_model(str(best), data)
        assert tuned is not None
        arrays = self._evaluated(tuned, data, texts, prefixes)
        if cell.variant is not None and cell.variant.name == FULL:
            arrays["rewards"] = self._rewards(config, tuned, data, texts, cell.seed, prefixes)
        shutil.rmtree(path, ignore_errors=True)
        return arrays, {
            "episodes_sha256": self.lists(),
            "fingerprint": fingerprint(spec),
            "gated_layers": [list(layer) for layer in tuned.gated_layers],
            "monitor_accuracy": info["best"],
            "best_epoch": info["best_epoch"],
            "accuracy_in_training": [row["accuracy"] for row in rows],
            "alpha_in_training": [row["alpha_mean"] for row in rows],
            "monitor_by_epoch": [row["monitor_accuracy"] for row in rows
                                 if "monitor_accuracy" in row],
        }  # fmt: skip

    def _rewards(
        self,
        config: AblateRun,
        model: DVLA,
        data: FewShotData,
        texts: EncodedTexts,
        seed: int,
        prefixes: PrefixMaps | None,
    ) -> Any:
        """(layers, alphas): what each gate is paid, on base episodes that training did not draw."""
        tuning = config.metatune
        sampler = EpisodeSampler(data.base, tuning.way, tuning.shots[0], tuning.query, seed + 2)
        maps = None if prefixes is None else prefixes.of(model, "base")
        weights = reward_weights(tuning)
        return reward_curves(model.eval(), data, texts, sampler, weights, maps=maps).numpy()

    def _evaluated(
        self, model: Any, data: FewShotData, texts: EncodedTexts, prefixes: PrefixMaps | None
    ) -> dict[str, Any]:
        settings = self.config.evaluate
        maps = None if prefixes is None else prefixes.of(model, settings.split)
        predictor = EpisodePredictor(
            model, data, texts, settings.split, cache_mib=settings.cache_mib, maps=maps
        )
        arrays: dict[str, Any] = {}
        for sampler in self.samplers:
            found = predictor.predict(sampler, settings.episodes, settings.batch_episodes)[LEARNED]
            arrays[f"accuracy-{sampler.shot}"] = found.accuracies.numpy()
            assert found.alphas is not None
            arrays[f"alpha-{sampler.shot}"] = found.alphas.float().numpy()
        return arrays

    def _prefix_maps(self, seed: int, data: FewShotData, config: AblateRun) -> PrefixMaps | None:
        if not has_constant_prefix(config.metatune):
            return None
        if self._prefixes is None or self._prefixes[0] != seed:
            self._prefixes = (seed, PrefixMaps(data, config.evaluate.cache_mib))
        return self._prefixes[1]


def start_alike(model: DVLA, pattern: DVLA) -> None:
    """Give a variant the initial weights of the base configuration wherever both have them.

    Policies draw different numbers of initial weights; without this the attention of a fixed gate
    would start elsewhere than a learned gate's, and the difference between two starts (near a point
    of accuracy on shapes) would stand between them.
    """
    own = model.state_dict()
    shared = {
        name: value
        for name, value in pattern.state_dict().items()
        if name in own and own[name].shape == value.shape
    }
    model.load_state_dict(own | shared)


def work(workshop: Workshop, cells: Sequence[Cell], done: Any = None) -> None:
    """Compute cells until none is left that this process could compute.

    A failed cell leaves an error file and the others go on; cells whose backbone failed are left.

    Args:
        done: called with each cell that was finished or failed here.
    """
    store = workshop.store
    while True:
        busy = False
        for cell in cells:
            if store.ended(cell):
                continue
            backbone = Cell(None, cell.seed)
            if cell.variant is not None and not store.finished(backbone):
                busy = busy or not store.failed(backbone)
                continue
            with store.claim(cell.key) as mine:
                # Another process may have finished it between the look and the claim.
                if mine and not store.ended(cell):
                    _attempt(workshop, cell)
                    if done is not None:
                        done(cell)
                busy = True
            if mine:
                break  # look again from the start: a backbone may be ready now
        else:
            if not busy:
                return
            time.sleep(_POLL)


def _attempt(workshop: Workshop, cell: Cell) -> None:
    try:
        workshop.run(cell)
    except Exception as error:
        content = {
            "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
        write_text_atomic(workshop.store.error(cell), json.dumps(content, indent=2) + "\n")
