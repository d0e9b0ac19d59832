"""What each subcommand does with its settings, and what it prints; each returns its exit status."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from dvla_fast.terminal import fail

_SHOWN = 10  # images that a command names; the rest is counted


def _demo(config: Any) -> int:
    from dvla_fast.engine.demo import run_demo
    from dvla_fast.engine.records import result_table

    what = {"digits": "real handwritten digits: train on 0 2 4 6 8, then tell 1 3 5 7 9"}.get(
        config.data.dataset, f"{config.data.dataset}: train on some classes, then tell others"
    )
    print(
        f"DVLA-RL on {what} apart from a few examples each\nrun folder: {config.output}",
        file=sys.stderr,
        flush=True,
    )
    summary = run_demo(config)
    print()
    print(result_table(summary["results"]))
    print()
    print(f"run folder  {summary['folder']}")
    print(f"picture     {summary['picture']}")
    print(f"time        {summary['seconds']:.0f} s on {summary['device']}")
    return 0


def _data_check(config: Any) -> int:
    from dvla_fast.data import check_data
    from dvla_fast.engine.progress import Progress

    with Progress({"check": 1.0}) as progress:
        report = check_data(
            config.path,
            config.splits,
            shot=config.shot,
            query=config.query,
            image_size=config.image_size,
            decode_images=not config.counts_only,
            workers=config.workers,
            advance=partial(progress.reach, "check"),
        )
    print(report.text())
    if report.problems:
        return fail(f"{config.path}: {len(report.problems)} line(s) of problems above")
    print("no problems found")
    return 0


def _data_prepare(config: Any) -> int:
    from dvla_fast.data import prepare_cache
    from dvla_fast.engine.progress import Progress
    from dvla_fast.engine.settings import UsageError

    if not config.output:
        raise UsageError("data prepare needs --output, the folder of the cache")
    with Progress({"prepare": 1.0}) as progress:
        done = prepare_cache(
            config.path,
            config.output,
            config.image_size,
            config.splits,
            skip_unreadable=config.skip_unreadable,
            workers=config.workers,
            advance=partial(progress.reach, "prepare"),
        )
    for line in done.skipped[:_SHOWN]:
        print(f"left out: {line}")
    if len(done.skipped) > _SHOWN:
        print(
            f"... and {len(done.skipped) - _SHOWN} more, all named by 'skipped' in its index.json"
        )
    print(
        f"cache       {done.path}, {done.images} images ({done.decoded} decoded, {done.reused} "
        f"kept)\nnext        dvla-fast pretrain --data.dataset {shlex.quote(str(done.path))} "
        f"--data.image_size {config.image_size}"
    )
    return 0


def _bank_command(name: str, module: str = "bank_commands") -> Callable[[Any], int]:
    def run(config: Any) -> int:
        status: int = getattr(import_module(f"dvla_fast.engine.{module}"), name)(config)
        return status

    return run


def _ablate(config: Any) -> int:
    from dvla_fast.engine.ablate import run_ablate

    summary = run_ablate(config)
    cells, failures = summary["cells"], summary["failures"]
    print(Path(config.output, "ablation.md").read_text(encoding="utf-8"))
    print(f"run folder  {config.output} (ablation.md, .csv, .png, .json)")
    print(f"time        {summary['seconds_of_this_launch']:.0f} s on {summary['device']}")
    if failures:
        first = min(failures)
        return fail(
            f"{len(failures)} of {cells['all']} cells failed (first: {first}: {failures[first]}); "
            "the same command tries them again, tracebacks are in the folder's cells/*.error.json"
        )
    if cells["finished"] < cells["all"]:
        return fail(
            f"{cells['all'] - cells['finished']} of {cells['all']} cells are not finished; the "
            "same command computes them"
        )
    return 0


def _pretrain(config: Any, files: Sequence[str]) -> int:
    from dvla_fast.engine.next_steps import metatune_command, settings_files
    from dvla_fast.engine.pretrain import run_pretrain

    summary = run_pretrain(config, files=files)
    files = settings_files(config.output, files, config.resume)
    following = metatune_command(config, summary["checkpoint"], files)
    return _trained(summary, "monitor_episode_accuracy", config.output, following)


def _metatune(config: Any, files: Sequence[str]) -> int:
    from dvla_fast.engine.metatune import run_metatune
    from dvla_fast.engine.next_steps import evaluate_command, settings_files

    summary = run_metatune(config, files=files)
    files = settings_files(config.output, files, config.resume)
    following = evaluate_command(summary["checkpoint"], files, config.seed)
    return _trained(summary, "monitor_accuracy", config.output, following)


def _trained(summary: Any, accuracy: str, output: str, following: str) -> int:
    """Print the validation accuracy, kept under that key, and where to go on."""
    from dvla_fast.engine.monitor import validation_text

    print(f"{validation_text(summary, accuracy)}\nrun folder  {output}\nnext        {following}")
    return 0


def _evaluate(config: Any) -> int:
    from dvla_fast.engine.compare import comparison_text
    from dvla_fast.engine.evaluate import run_evaluate
    from dvla_fast.engine.records import checkpoints_table, result_table

    summary = run_evaluate(config)
    print(result_table(summary["results"]))
    if spread := checkpoints_table(summary["results"]):
        print(f"\n{spread}")
    if "compared" in summary:
        print(f"\n{comparison_text(summary['compared'])}")
    if summary["split"] == "monitor":
        print(f"\nsplit       monitor: {summary['monitor']}")
    elif summary["split"] == "base":
        print("\nsplit       base: classes that training works on")
    print(f"\nsummary     {config.output}/summary.json")
    print(f"page        {shlex.join(['dvla-fast', 'report', config.output])}")
    return 0


def _predict(config: Any) -> int:
    from dvla_fast.engine.predict_images import run_predict

    found = run_predict(config)
    for answer in found.unreadable:
        print(f"unreadable: {answer.error}", file=sys.stderr)
    print(found.text(config.rows))
    return 0


def _report(config: Any) -> int:
    from dvla_fast.report.page import run_report

    done = run_report(config)
    for line in done.notes:
        print(f"note        {line}")
    print(f"page        {done.path} ({done.bytes / 1e6:.1f} MB, {done.seconds:.0f} s)")
    if config.table:
        print(f"table       {config.table}")
    return 0


def _compare(config: Any) -> int:
    from dvla_fast.engine.compare import comparison_text, run_compare

    print(comparison_text(run_compare(config), config.classes))
    return 0


# Runs that say what comes next, from the settings files that they were given.
CONTINUED = {"pretrain": _pretrain, "metatune": _metatune}

RUNNERS = {
    "data check": _data_check,
    "data prepare": _data_prepare,
    "demo": _demo,
    "semantics build": _bank_command("build", "bank_build"),
    "semantics show": _bank_command("show"),
    "semantics diff": _bank_command("diff"),
    "semantics edit": _bank_command("edit"),
    "semantics encode": _bank_command("encode"),
    "semantics check": _bank_command("check"),
    "semantics import": _bank_command("import_published", "bank_import"),
    "ablate": _ablate,
    "evaluate": _evaluate,
    "predict": _predict,
    "report": _report,
    "compare": _compare,
}
