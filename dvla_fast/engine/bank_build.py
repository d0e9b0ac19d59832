"""What ``dvla-fast semantics build`` does: a configuration to classes, a model, and a bank."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from dvla_fast.data import load_digits
from dvla_fast.data.images import FewShotData
from dvla_fast.data.shapes import load_shapes
from dvla_fast.data.splits import class_names
from dvla_fast.engine.build import pick_device
from dvla_fast.engine.config import SPLIT_NAMES
from dvla_fast.engine.progress import Progress
from dvla_fast.engine.settings import UsageError
from dvla_fast.engine.settle import MADE_SIZES, sized
from dvla_fast.engine.tool_config import LanguageModelConfig, SemanticsBuild
from dvla_fast.errors import DataError
from dvla_fast.semantics import build_encoder
from dvla_fast.semantics.construct import STAGES, Settings, construct_bank, journal_path
from dvla_fast.semantics.language_models import (
    AnswerFile,
    LanguageModel,
    OpenAIServer,
    TransformersModel,
)
from dvla_fast.semantics.sources import folder_classes, image_set_classes, named_classes
from dvla_fast.semantics.stages import ClassSource, Prompts


def build(config: SemanticsBuild) -> int:
    """Build or continue the bank; returns the exit status: 1 where a class failed."""
    if not config.output:
        raise UsageError("semantics build needs --output, the JSON file of the bank")
    output = Path(config.output)
    prompts = Prompts.load(config.construct.candidates_prompt, config.construct.description_prompt)
    model = build_language_model(config.language_model)
    classes, record = find_classes(config)
    encoder = build_encoder(
        config.construct.encoder,
        config.construct.dim,
        truncate=config.construct.truncate,
        device=pick_device(config.construct.device),
    )
    settings = Settings(
        config.construct.top_k,
        config.construct.template,
        config.construct.candidates,
        config.construct.attempts,
    )
    shares = dict(zip(STAGES, (0.6, 0.05, 0.35)))
    with Progress(shares) as progress:
        built = construct_bank(
            classes,
            model,
            encoder,
            output,
            prompts=prompts,
            settings=settings,
            provenance=record,
            progress=progress.reach,
        )
    _print_usage(config, model, built.reused)
    if built.lost:
        print(
            f"bank        {output} is as it was: it has {len(built.lost)} class(es) that failed now"
        )
    elif built.bank is not None:
        print(f"bank        {output}, {len(built.bank.classes)} of {len(classes)} classes")
    if built.bank is not None:
        print(f"answers     {journal_path(output)}")
    if not built.failures:
        print(f"next        dvla-fast semantics show {shlex.quote(str(output))}")
        return 0
    for name, failure in built.failures.items():
        print(f"failed      {name!r} ({failure.stage}): {failure.message}")
    for helps in dict.fromkeys(filter(None, (f.remedy for f in built.failures.values()))):
        print(f"may help    {helps}")
    names = ", ".join(map(repr, list(built.failures)[:8]))
    more = f" and {len(built.failures) - 8} more" if len(built.failures) > 8 else ""
    print(
        f"error: {len(built.failures)} of {len(classes)} classes failed ({names}{more}; reasons "
        "above); run the same command again: it asks for these alone and keeps the others",
        file=sys.stderr,
    )
    return 1


def build_language_model(config: LanguageModelConfig) -> LanguageModel:
    """Return the back end of a configuration.

    Raises:
        LanguageModelError, MissingDependencyError: as the back ends.
    """
    if config.backend == "files":
        return AnswerFile(config.answers)
    if config.backend == "transformers":
        return TransformersModel(
            config.model,
            device_map=config.device_map,
            dtype=config.dtype,
            batch_size=config.batch_size,
            temperature=config.temperature,
            seed=config.seed,
            max_tokens=config.max_tokens,
        )
    return OpenAIServer(
        config.model,
        base_url=config.base_url,
        api_key_env=config.api_key_env,
        concurrency=config.concurrency,
        timeout=config.timeout,
        retries=config.retries,
        temperature=config.temperature,
        seed=config.seed,
        structured=config.structured,
        max_tokens=config.max_tokens,
    )


def find_classes(config: SemanticsBuild) -> tuple[list[ClassSource], dict[str, Any]]:
    """Return the classes to write for, and what the bank records of where they come from.

    Raises:
        DataError: no such data set, split or file; a class without a name or images.
    """
    construct = config.construct
    if construct.classes:
        path = Path(construct.classes)
        try:
            # utf-8-sig: editors on Windows begin a file with a mark
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"{path}: cannot read the class names ({reason}); give --construct.classes a text "
                "file with one name a line"
            ) from error
        # a wnid, or a number before the name, tells a model nothing
        named = class_names(line.strip() for line in lines if line.strip())
        return named_classes(named), {"classes": path.name}
    record: dict[str, Any] = {
        # a path need not be UTF-8, a bank is
        "dataset": os.fsencode(config.data.dataset).decode(errors="replace"),
        "splits": config.data.splits,
        "split": construct.split,
        "images_per_class": construct.images,
        "seed": config.seed,
        "max_side": construct.max_side,
    }
    if config.data.dataset in MADE_SIZES:
        made = _made_data(config)
        names = [SPLIT_NAMES.get(name, name) for name in construct.split]
        names = names or ["base", "novel", *_validation(made)]
        sets = [(f"{made.name}/{name}", made.split(name)) for name in names]
        classes = image_set_classes(sets, construct.images, config.seed, construct.max_side)
    else:
        theirs = {ours: name for name, ours in SPLIT_NAMES.items()}
        classes = folder_classes(
            config.data.dataset,
            config.data.splits,
            [theirs.get(name, name) for name in construct.split],
            construct.images,
            config.seed,
            construct.max_side,
        )
    return classes, record


def _made_data(config: SemanticsBuild) -> FewShotData:
    data = sized(config.data)
    if data.dataset == "digits":
        return load_digits(data.image_size, data.holdout, data.split_seed)
    return load_shapes(data.image_size, data.images_per_class, kind=data.dataset)


def _validation(data: FewShotData) -> list[str]:
    """The split of validation classes, if it is not a share of the base classes' images."""
    return [] if set(data.monitor.class_names) <= set(data.base.class_names) else ["monitor"]


def _print_usage(config: SemanticsBuild, model: LanguageModel, reused: int) -> None:
    usage, prices = model.usage, config.language_model
    line = f"asked       {usage.answers} answers"
    if reused:
        line += f" ({reused} more were kept from before)"
    if usage.input_tokens or usage.output_tokens:
        line += f", {usage.input_tokens} tokens read and {usage.output_tokens} written"
    if usage.uncounted and prices.backend != "files":
        line += f" ({usage.uncounted} answers came without a count)"
    if usage.retries:
        line += f", {usage.retries} requests sent again"
    if prices.input_price or prices.output_price:
        line += f"; cost {usage.cost(prices.input_price, prices.output_price):.4f}"
    print(line)
