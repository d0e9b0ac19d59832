"""Ablations as one command: every variant, several training seeds, the same episodes for all.

One backbone per seed is pre-trained and shared by all variants; each variant meta-tunes from it and
is evaluated on one common list of episodes per shot. Selection is by monitor images alone, as in
every training here. ``ablation_variants`` has the rows, ``ablation_cells`` computes them,
``ablation_statistics`` has the intervals, ``ablation_tables`` and ``pictures`` lay them out.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvla_fast import __version__
from dvla_fast.engine.ablation_cells import FREE_KEYS, Cell, Store, Workshop, all_cells, work
from dvla_fast.engine.ablation_claims import weigh_claims, weigh_rewards
from dvla_fast.engine.ablation_statistics import FORMULA, SINGLE, crossed_interval
from dvla_fast.engine.ablation_tables import csv_table, markdown_table
from dvla_fast.engine.ablation_variants import GROUPS, Variant, chosen_variants
from dvla_fast.engine.build import pick_device
from dvla_fast.engine.config import AblateRun
from dvla_fast.engine.inductive import require_bank_texts
from dvla_fast.engine.inputs import check_inputs
from dvla_fast.engine.progress import Progress
from dvla_fast.engine.run_folder import read_config
from dvla_fast.engine.settings import (
    UsageError,
    checked,
    differences,
    from_mapping,
    to_dict,
    to_yaml,
    unrecorded,
)
from dvla_fast.engine.settle import absolute_paths
from dvla_fast.errors import OutputError
from dvla_fast.files import write_atomic, write_text_atomic
from dvla_fast.pictures.ablation import plot_ablation
from dvla_fast.statistics import holm, require_scipy

_POLL = 0.5
# In a folder that another launch is making at this moment, or was killed in.
_OWN = {"cells", "claims", "backbones", "running", "inputs.json", "config.yaml"}


def run_ablate(config: AblateRun, *, quiet: bool = False) -> dict[str, Any]:
    """Do what ``dvla-fast ablate`` does; returns the content of ``ablation.json``.

    Raises:
        UsageError: unknown groups or variants, or settings that do not fit.
        OutputError: the folder cannot be written, or holds an ablation of other settings.
    """
    started, config = time.monotonic(), checked(config)
    require_scipy()
    if config.wandb:
        raise UsageError("--wandb: an ablation logs no curves; leave it empty")
    require_bank_texts(config.evaluate)
    device = _device(config.device)
    store = Store(Path(config.output))
    workshop = Workshop(config, store, device, quiet=quiet)
    variants = chosen_variants(config, workshop.data.channels)
    workshop.check(variants)
    seeds = list(range(config.seed, config.seed + config.ablate.seeds))
    cells = all_cells(variants, seeds)
    inputs = workshop.inputs()
    _open(store, config, inputs)
    _check_lists(store, cells, workshop.lists())
    _forget_errors(store, cells)
    count = config.ablate.processes or (1 if device.type != "cpu" else os.cpu_count() or 1)
    left = sum(not store.finished(cell) for cell in cells)
    with Progress({"ablate": 1.0}, enabled=not quiet) as progress:
        progress.begin("ablate", len(cells), len(cells) - left)
        if min(count, left) > 1:
            _work_in_processes(config, cells, min(count, left), store, progress)
        else:
            _work_here(workshop, cells, progress)
    summary = summarise(config, store, variants, seeds)
    summary["seconds_of_this_launch"] = round(time.monotonic() - started, 1)
    summary |= {"device": str(device), "inputs": inputs, "leaks": workshop.leaks()}
    _write(store, summary)
    return summary


def _device(name: str) -> torch.device:
    """The device of this process: its own GPU where a launcher started several."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


def _open(store: Store, config: AblateRun, inputs: dict[str, str]) -> None:
    """Begin in a new or empty folder, or go on in one of the same settings, images and texts."""
    path = store.path
    if os.path.exists(path) and not os.path.isdir(path):
        raise OutputError(f"{path}: is a file; give --output a new folder")
    strangers = {item.name for item in path.iterdir()} - _OWN if os.path.isdir(path) else set()
    strangers -= {name for name in strangers if name.startswith(".") and name.endswith(".tmp")}
    if strangers and not (path / "config.yaml").exists():
        raise OutputError(f"{path}: not empty and no ablation; give --output a new or empty folder")
    store.prepare()
    kept = {key: value for key, value in to_dict(config).items() if key not in FREE_KEYS[:2]}
    while True:
        with store.claim("config") as mine:
            if mine:
                if not (path / "config.yaml").exists():
                    write_text_atomic(path / "inputs.json", json.dumps(inputs, indent=2) + "\n")
                    write_text_atomic(path / "config.yaml", to_yaml(kept))
                break
        time.sleep(0.01)
    saved = absolute_paths(read_config(path))
    changed = [
        line
        for line in differences(saved, json.loads(json.dumps(absolute_paths(kept))))
        if line.split(":")[0].split(".")[0] not in FREE_KEYS
    ]
    if changed:
        raise OutputError(
            f"{path}: holds an ablation of other settings ({'; '.join(changed[:4])}); "
            f"{unrecorded(changed)}only "
            "--ablate settings and --device may change there: leave the others out, or give "
            "--output a new folder"
        )
    if (path / "inputs.json").exists():  # ablations of older versions have none
        check_inputs(path, _read(path / "inputs.json"), inputs, "give --output a new folder")


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(
            f"{path}: damaged ({error}); remove it and run the ablation again"
        ) from error
    return content


def _check_lists(store: Store, cells: Sequence[Cell], lists: dict[str, str]) -> None:
    """Only cells of the same episodes are paired (OutputError)."""
    for cell in cells:
        if cell.variant is None or not store.finished(cell):
            continue
        theirs = store.read(cell)[1]["episodes_sha256"]
        if theirs != lists:
            raise OutputError(
                f"{store.result(cell)}: computed on other episodes than are drawn now (the bank "
                "lists other images as seen, or the version draws otherwise); give --output a new "
                "folder"
            )


def _forget_errors(store: Store, cells: Sequence[Cell]) -> None:
    """What failed in an earlier launch is tried again."""
    for cell in cells:
        with store.claim(cell.key) as mine:
            if mine:
                store.error(cell).unlink(missing_ok=True)


def _work_here(workshop: Workshop, cells: Sequence[Cell], progress: Progress) -> None:
    threads = torch.get_num_threads()
    if workshop.device.type == "cpu":  # the same numbers however many processes share the work
        torch.set_num_threads(1)
    try:
        work(workshop, cells, lambda cell: _count(workshop.store, cell, progress))
    finally:
        torch.set_num_threads(threads)


def _count(store: Store, cell: Cell, progress: Progress) -> None:
    progress.advance()
    failed = store.failed(cell)
    progress.note(f"{cell.key} failed: {store.reason(cell)}" if failed else cell.key)


def _work_in_processes(
    config: AblateRun, cells: Sequence[Cell], count: int, store: Store, progress: Progress
) -> None:
    context = multiprocessing.get_context("spawn")  # no lock or thread of the parent goes along
    names = [(cell.variant.name if cell.variant else None, cell.seed) for cell in cells]
    workers = [
        context.Process(target=_worker, args=(to_dict(config), names), daemon=True)
        for _ in range(count)
    ]
    for worker in workers:
        worker.start()
    seen = {cell.key for cell in cells if store.finished(cell)}
    try:
        while True:
            running = any(worker.is_alive() for worker in workers)
            for cell in cells:
                if cell.key not in seen and store.ended(cell):
                    seen.add(cell.key)
                    _count(store, cell, progress)
            if not running:
                break
            time.sleep(_POLL)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
            worker.join()
    broken = [worker.exitcode for worker in workers if worker.exitcode]
    if broken:
        print(
            f"{len(broken)} of {count} worker processes ended early (exit status {broken[0]}); "
            "the same command computes what is missing",
            file=sys.stderr,
        )


def _worker(settings: dict[str, Any], names: list[tuple[str | None, int]]) -> None:
    """A worker process: its own workshop, one thread on a CPU."""
    _end_with_parent()
    config = from_mapping(AblateRun, settings)
    device = _device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        workshop = Workshop(config, Store(Path(config.output)), device)
        known = {row.name: row for row in chosen_variants(config, workshop.data.channels)}
        cells = [Cell(None if name is None else known[name], seed) for name, seed in names]
        work(workshop, cells)
    except KeyboardInterrupt:
        sys.exit(130)  # Ctrl-C reaches every process; the first one says so


def _end_with_parent() -> None:
    """End this worker when its launch is killed: it would write into whatever comes after."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def summarise(
    config: AblateRun, store: Store, variants: Sequence[Variant], seeds: Sequence[int]
) -> dict[str, Any]:
    """Put the finished cells together: rows, paired differences, corrected p values, failures."""
    found, facts = read_cells(store, variants, seeds)
    rows = [_row(config, variant, found, facts, seeds) for variant in variants]
    tests = [
        result["difference"]
        for row in rows
        for result in row["results"]
        if result.get("difference") is not None
    ]
    for test, p in zip(tests, holm([test["p_value"] for test in tests])):
        test["p_holm"] = p
    cells = all_cells(variants, seeds)
    seconds = {key: item["seconds"] for key, item in facts.items()}
    backbones = {}
    for seed in seeds:
        path = store.result(Cell(None, seed))
        if path.exists():
            backbones[str(seed)] = _read(path)
    settings = config.evaluate
    return {
        "command": "ablate",
        "line": shlex.join(["dvla-fast", *sys.argv[1:]]) if sys.argv[1:2] == ["ablate"] else None,
        **_provenance(),
        "dataset": Path(config.data.dataset).name,
        "split": settings.split,
        "way": settings.way,
        "query": settings.query,
        "episodes": settings.episodes,
        "shots": list(settings.shots),
        "seeds": list(seeds),
        "reference": config.ablate.reference,
        "intervals": FORMULA,
        "note": SINGLE if len(seeds) == 1 else "",
        "comparisons": len(tests),
        "backbones": backbones,
        "cells": {
            "all": len(cells),
            "finished": sum(store.finished(cell) for cell in cells),
            "core_seconds": sum(seconds.values())
            + sum(item["seconds"] for item in backbones.values()),
            "seconds": {f"{name}-seed{seed}": round(s, 2) for (name, seed), s in seconds.items()},
        },
        "failures": {cell.key: store.reason(cell) for cell in cells if store.failed(cell)},
        "rows": rows,
        "claims": weigh_claims(config, found, rows),
        "pull": weigh_rewards(config, found, rows),
        "config": to_dict(config),
    }


Found = dict[tuple[str, int], dict[str, Any]]


def read_cells(
    store: Store, variants: Sequence[Variant], seeds: Sequence[int]
) -> tuple[Found, Found]:
    """Read all finished cells: (variant, seed) -> arrays, and -> facts."""
    found, facts = {}, {}
    for variant in variants:
        for seed in seeds:
            cell = Cell(variant, seed)
            if store.finished(cell):
                found[variant.name, seed], facts[variant.name, seed] = store.read(cell)
    return found, facts


def _row(
    config: AblateRun, variant: Variant, found: Found, facts: Found, seeds: Sequence[int]
) -> dict[str, Any]:
    reference = config.ablate.reference
    mine = [seed for seed in seeds if (variant.name, seed) in found]
    described = [facts[variant.name, seed] for seed in mine]
    row: dict[str, Any] = {
        "variant": variant.name,
        "group": variant.group,
        "group_title": GROUPS[variant.group],
        "title": variant.title,
        "overrides": dict(variant.overrides),
        "seeds": mine,
        "monitor_accuracy": [item["monitor_accuracy"] for item in described],
        "gated_layers": next((item.get("gated_layers") for item in described), None),
        "warnings": sorted({text for item in described for text in item["warnings"]}),
        "results": [],
    }
    for shot in config.evaluate.shots:
        result: dict[str, Any] = {"shot": shot, "accuracy": None, "difference": None}
        row["results"].append(result)
        if not mine:
            continue
        name = f"accuracy-{shot}"
        table = np.stack([found[variant.name, seed][name] for seed in mine])
        result["by_seed"] = table.mean(1).astype(float).tolist()
        result["accuracy"] = crossed_interval([table], config.ablate.draws)
        del result["accuracy"]["p_value"]  # of an accuracy of 0, which nobody asks about
        if f"alpha-{shot}" in found[variant.name, mine[0]]:
            alphas = [found[variant.name, seed][f"alpha-{shot}"].mean(0) for seed in mine]
            result["alpha"] = np.mean(alphas, 0).astype(float).tolist()
            result["alpha_by_seed"] = [values.astype(float).tolist() for values in alphas]
        both = [seed for seed in mine if (reference, seed) in found]
        if variant.name != reference and both:
            apart = [
                found[variant.name, seed][name].astype(float) - found[reference, seed][name]
                for seed in both
            ]
            result["difference"] = {
                **crossed_interval([np.stack(apart)], config.ablate.draws),
                "by_seed": [float(values.mean()) for values in apart],
            }
    return row


def _provenance() -> dict[str, Any]:
    return {
        "dvla_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {_processor()}, {os.cpu_count()} cores",
        "commit": _commit(),
        "finished_at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.system()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.system()


def _commit() -> str | None:
    """The commit of the source tree, with a + when it was changed; None outside of one."""
    folder = Path(__file__).parent
    try:
        commit, changed = (
            subprocess.run(
                ["git", *arguments],
                cwd=folder, capture_output=True, text=True, check=True, timeout=10,
            ).stdout.strip()
            for arguments in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _write(store: Store, summary: dict[str, Any]) -> None:
    write_text_atomic(store.path / "ablation.json", json.dumps(summary, indent=2) + "\n")
    write_text_atomic(store.path / "ablation.md", markdown_table(summary))
    write_text_atomic(store.path / "ablation.csv", csv_table(summary))
    write_atomic(store.path / "ablation.png", lambda path: plot_ablation(summary, path))
