"""The ``dvla-fast`` command line: one function per subcommand over typed configurations.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted (Ctrl-C), 141 nobody reads the output.
A failure is one line that says what to do; the traceback comes with ``--debug``. Only the
subcommand that runs imports what it needs, so ``--help`` is quick and ``doctor`` works on an
incomplete installation.
"""

from __future__ import annotations

import difflib
import os
import select
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvla_fast.commands import COMMANDS, GROUPS
from dvla_fast.errors import DVLAError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status, as above."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        with _short_warnings():
            status = _dispatch(given, owns_process=arguments is None)
        sys.stdout.flush()  # a reader that is gone shows here, not when Python ends
        return status
    except SystemExit as stop:  # from the argument parser: --help (0) or wrong usage (2)
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        if debug:
            raise
        if given[:1] == ["semantics"]:
            return _fail("interrupted; the same command continues", _INTERRUPTED)
        return _fail("interrupted", _INTERRUPTED)
    except DVLAError as error:
        if debug:
            raise
        from dvla_fast.engine.settings import UsageError

        return _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_closed():
            return _BROKEN_PIPE
        if debug:
            raise
        message = " ".join(str(error).split()) or "no message"
        return _fail(f"{type(error).__name__}: {message} (--debug shows the traceback)")


# What a shell reports of a process that a signal ended: 128 + SIGINT, 128 + SIGPIPE.
_INTERRUPTED, _BROKEN_PIPE = 130, 141


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show warnings as one line each, without the place in the code."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *more, **options: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _output_closed() -> bool:
    """Whether nobody reads on (``| head``); what is left to say then goes nowhere."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if _reader_gone(stream)]
    for stream in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(closed)


def _reader_gone(stream: Any) -> bool:
    """Whether a stream is a pipe that is closed at its other end."""
    try:
        ask = select.poll()
        ask.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in ask.poll(0))
    except (OSError, ValueError, AttributeError):  # no file behind it, or a system without poll
        return False


def _fail(message: str, status: int = 1) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _dispatch(given: list[str], owns_process: bool) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0 if given else 2
    if given[0] == "--version":
        from dvla_fast import __version__

        print(f"dvla-fast {__version__}")
        return 0
    name, rest = given[0], given[1:]
    if name in GROUPS:
        if not rest or rest[0] in ("-h", "--help"):
            print(_group_overview(name))
            return 0 if rest else 2
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        return _fail(f"no command {name!r}{hint} Choose one of {', '.join(COMMANDS)}", 2)
    if name == "doctor":
        return _doctor(rest)
    if name == "ablate" and rest and not rest[0].startswith("-"):
        rest = ["--config", *rest]
    config = _parse(name, rest)
    if not hasattr(config, "resume"):  # no run, no run folder
        return _RUNNERS[name](config)
    if owns_process:
        from dvla_fast.engine.memory import keep_freed_memory

        keep_freed_memory()
    if not config.output:
        config.output = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        from dvla_fast.engine.settle import settle, size_line

        given, config = config, settle(config)
        if line := size_line(given, config):
            print(line, file=sys.stderr, flush=True)
        if name in _CONTINUED:
            return _CONTINUED[name](config, _config_files(rest))
        return _RUNNERS[name](config)
    except KeyboardInterrupt:
        if not Path(config.output, "config.yaml").exists():
            return _fail("interrupted before the run began; nothing is kept", _INTERRUPTED)
        again = shlex.join(["dvla-fast", name, "--resume", "--output", config.output])
        return _fail(f"interrupted; continue: {again}", _INTERRUPTED)


def _group_overview(group: str) -> str:
    from dvla_fast.data import split_list_names
    from dvla_fast.semantics import bundled_banks

    known = {
        "data": ("published split lists, for --splits", split_list_names()),
        "semantics": ("banks that come with the package", bundled_banks()),
    }
    commands = {n: c for n, c in COMMANDS.items() if n.startswith(f"{group} ")}
    width = max(map(len, commands)) + 1
    rows = "\n".join(f"  {name:<{width}} {command.summary}" for name, command in commands.items())
    examples = "\n".join(command.examples.splitlines()[0] for command in commands.values())
    title, names = known[group]
    return (
        f"usage: dvla-fast {group} {'|'.join(name.split()[1] for name in commands)} [options]\n\n"
        f"commands:\n{rows}\n\n{title}:\n  {', '.join(names)}\n\nexamples:\n{examples}"
    )


def _overview() -> str:
    rows = "\n".join(f"  {name:<17} {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: dvla-fast COMMAND [options]\n\n"
        "Few-shot image classification with text, gated by reinforcement learning (DVLA-RL).\n\n"
        f"commands:\n{rows}\n\n"
        "options of every command: --help (with examples), --debug (tracebacks);\n"
        "of every run: --config FILE.yaml, --seed N, --output FOLDER, --resume\n\n"
        "examples:\n  dvla-fast demo --quick\n  dvla-fast pretrain --help\n  dvla-fast --version"
    )


def _doctor(rest: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog="dvla-fast doctor",
        description=COMMANDS["doctor"].summary,
        epilog="example:\n  dvla-fast doctor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(rest)
    from dvla_fast.doctor import report

    text, healthy = report()
    print(text)
    return 0 if healthy else 1


def _parse(name: str, rest: list[str]) -> Any:
    """Turn arguments into the command's configuration.

    Defaults come from the dataclasses; over them, when resuming, the configuration of the run
    folder; over that, ``--config``; and over all, the options on the command line.
    """
    from dvla_fast.engine import config as runs
    from dvla_fast.engine import settings, tool_config

    cls = getattr(runs, COMMANDS[name].config, None) or getattr(tool_config, COMMANDS[name].config)
    default = cls()
    if name == "demo":
        from dvla_fast.engine.config import demo_config

        default = demo_config(quick="--quick" in rest)
    for path in _config_files(rest):
        default = settings.read_settings(path, cls, default)
    parsed = _parse_with(name, rest, cls, default)
    if not getattr(parsed, "resume", False):
        return parsed
    if not parsed.output:
        raise settings.UsageError(
            f"--resume needs --output, the folder of the run to continue: dvla-fast {name} "
            "--resume --output runs/..."
        )
    from dvla_fast.engine.logging import read_config  # loads torch

    record = read_config(parsed.output)
    theirs = _whose(record, name)
    if theirs != name:
        raise settings.UsageError(
            f"{parsed.output}: a run of 'dvla-fast {theirs}', not of {name}; continue it with "
            f"dvla-fast {theirs} --resume --output {shlex.quote(parsed.output)}"
        )
    saved = settings.from_mapping(cls, record, parsed.output)
    for path in _config_files(rest):
        saved = settings.read_settings(path, cls, saved)
    return _parse_with(name, rest, cls, saved)


# Settings that tell whose record it is, the most telling first.
_SIGNS = {
    "ablate": "ablate",
    "quick": "demo",
    "metatune": "metatune",
    "pretrain": "pretrain",
    "evaluate": "evaluate",
}


def _whose(record: Mapping[str, Any], name: str) -> str:
    """Return the command whose run a record is of; ``name`` where it does not tell."""
    several = {"pretrain", "metatune", "evaluate"} <= set(record)
    if several and not {"ablate", "quick"} & set(record):
        return name  # a backbone of an ablation
    return next((command for key, command in _SIGNS.items() if key in record), name)


def _config_files(rest: list[str]) -> list[str]:
    """The files of ``--config FILE`` and ``--config=FILE``, in order; later ones win."""
    following = [*rest[1:], ""]
    found = (
        item.split("=", 1)[1] if item.startswith("--config=") else after
        for item, after in zip(rest, following)
        if item == "--config" or item.startswith("--config=")
    )
    return [path for path in found if path]


def _parse_with(name: str, rest: list[str], cls: type, default: Any) -> Any:
    from dvla_fast.engine.command_parser import build_parser
    from dvla_fast.engine.settings import from_mapping

    values = build_parser(name, cls, default).parse_args(rest).as_dict()
    values.pop("config", None)
    values.pop("debug", None)
    return from_mapping(cls, values, "command line")


def _demo(config: Any) -> int:
    from dvla_fast.engine.demo import result_table, run_demo

    print(
        "DVLA-RL on real handwritten digits: train on 0 2 4 6 8, then tell 1 3 5 7 9 apart from "
        f"a few examples each\nrun folder: {config.output}",
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
    from dvla_fast.engine.logging import Progress

    with Progress({"check": 1.0}) as progress:
        report = check_data(
            config.path,
            config.splits,
            shot=config.shot,
            query=config.query,
            image_size=config.image_size,
            decode_images=not config.counts_only,
            workers=config.workers,
            advance=_counter(progress, "check"),
        )
    print(report.text())
    if report.problems:
        return _fail(f"{config.path}: {len(report.problems)} line(s) of problems above")
    print("no problems found")
    return 0


def _data_prepare(config: Any) -> int:
    from dvla_fast.data import prepare_cache
    from dvla_fast.engine.logging import Progress
    from dvla_fast.engine.settings import UsageError

    if not config.output:
        raise UsageError("data prepare needs --output, the folder of the cache")
    try:
        with Progress({"prepare": 1.0}) as progress:
            done = prepare_cache(
                config.path,
                config.output,
                config.image_size,
                config.splits,
                skip_unreadable=config.skip_unreadable,
                workers=config.workers,
                advance=_counter(progress, "prepare"),
            )
    except KeyboardInterrupt:
        return _fail("interrupted; the same command continues", _INTERRUPTED)
    for line in done.skipped:
        print(f"left out: {line}")
    print(
        f"cache       {done.path}, {done.images} images ({done.decoded} decoded, {done.reused} "
        f"kept)\nnext        dvla-fast pretrain --data.dataset {shlex.quote(str(done.path))} "
        f"--data.image_size {config.image_size}"
    )
    return 0


def _counter(progress: Any, stage: str) -> Any:
    """Drive a progress bar by calls with the images done and all of them."""
    last = None

    def advance(done: int, total: int) -> None:
        nonlocal last
        if last is None:
            progress.begin(stage, total)
            last = 0
        progress.advance(done - last)
        last = done

    return advance


def _bank_command(name: str) -> Callable[[Any], int]:
    def run(config: Any) -> int:
        from dvla_fast.engine import bank_commands

        status: int = getattr(bank_commands, name)(config)
        return status

    return run


def _semantics_build(config: Any) -> int:
    from dvla_fast.engine.bank_build import build

    try:
        return build(config)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command continues", _INTERRUPTED)


def _ablate(config: Any) -> int:
    from dvla_fast.engine.ablate import run_ablate

    summary = run_ablate(config)
    cells, failures = summary["cells"], summary["failures"]
    print(Path(config.output, "ablation.md").read_text(encoding="utf-8"))
    print(f"run folder  {config.output} (ablation.md, .csv, .png, .json)")
    print(f"time        {summary['seconds_of_this_launch']:.0f} s on {summary['device']}")
    if failures:
        first = min(failures)
        return _fail(
            f"{len(failures)} of {cells['all']} cells failed (first: {first}: {failures[first]}); "
            "the same command tries them again, tracebacks are in the folder's cells/*.error.json"
        )
    if cells["finished"] < cells["all"]:
        return _fail(
            f"{cells['all'] - cells['finished']} of {cells['all']} cells are not finished; the "
            "same command computes them"
        )
    return 0


def _pretrain(config: Any, files: Sequence[str]) -> int:
    from dvla_fast.engine.monitor import validation_text
    from dvla_fast.engine.next_steps import metatune_command
    from dvla_fast.engine.pretrain import run_pretrain

    summary = run_pretrain(config)
    print(
        f"{validation_text(summary, 'monitor_episode_accuracy')}\n"
        f"run folder  {config.output}\n"
        f"next        {metatune_command(config, summary['checkpoint'], files)}"
    )
    return 0


def _metatune(config: Any, files: Sequence[str]) -> int:
    from dvla_fast.engine.metatune import run_metatune
    from dvla_fast.engine.monitor import validation_text
    from dvla_fast.engine.next_steps import evaluate_command

    summary = run_metatune(config)
    print(
        f"{validation_text(summary, 'monitor_accuracy')}\n"
        f"run folder  {config.output}\n"
        f"next        {evaluate_command(summary['checkpoint'], files)}"
    )
    return 0


def _evaluate(config: Any) -> int:
    from dvla_fast.engine.demo import result_table
    from dvla_fast.engine.evaluate import run_evaluate
    from dvla_fast.engine.records import checkpoints_table, comparison_table

    summary = run_evaluate(config)
    print(result_table(summary["results"]))
    if spread := checkpoints_table(summary["results"]):
        print(f"\n{spread}")
    if "compared" in summary:
        print(f"\n{comparison_table(summary['compared'])}")
    if summary["split"] == "monitor":
        print(f"\nsplit       monitor: {summary['monitor']}")
    print(f"\nsummary     {config.output}/summary.json")
    print(f"page        dvla-fast report {config.output}")
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
    return 0


def _compare(config: Any) -> int:
    from dvla_fast.engine.compare import comparison_text, run_compare

    print(comparison_text(run_compare(config), config.classes))
    return 0


# Runs that say what comes next, from the settings files that they were given.
_CONTINUED = {"pretrain": _pretrain, "metatune": _metatune}

_RUNNERS = {
    "data check": _data_check,
    "data prepare": _data_prepare,
    "demo": _demo,
    "semantics build": _semantics_build,
    "semantics show": _bank_command("show"),
    "semantics diff": _bank_command("diff"),
    "semantics edit": _bank_command("edit"),
    "semantics encode": _bank_command("encode"),
    "semantics check": _bank_command("check"),
    "semantics import": _bank_command("import_published"),
    "ablate": _ablate,
    "evaluate": _evaluate,
    "predict": _predict,
    "report": _report,
    "compare": _compare,
}
