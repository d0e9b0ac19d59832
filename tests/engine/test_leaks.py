"""Images that a bank's texts were written from are kept out of the queries, and on record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dvla_fast.data import EpisodeSampler, FewShotData, load_data, load_digits, prepare_cache
from dvla_fast.data.images import ImageSet
from dvla_fast.data.shapes import load_shapes
from dvla_fast.engine.ablation_cells import Store, Workshop
from dvla_fast.engine.checkpoint import save_checkpoint
from dvla_fast.engine.config import (
    AblateConfig,
    AblateRun,
    DataConfig,
    DemoRun,
    EvaluateConfig,
    EvaluateRun,
    ModelConfig,
    SemanticsConfig,
)
from dvla_fast.engine.demo import run_demo
from dvla_fast.engine.episode_lists import build_sampler
from dvla_fast.engine.evaluate import run_evaluate
from dvla_fast.engine.inputs import images_fingerprint
from dvla_fast.engine.leaks import leak_summary, seen_images
from dvla_fast.engine.models import backbone_spec, build_model, model_spec
from dvla_fast.engine.settings import UsageError
from dvla_fast.errors import DataError
from dvla_fast.semantics import SemanticBank

SHOTS, QUERY = 2, 3
NOVEL = [f"test-{name}" for name in "abcdef"]


def images(per_class: int = 8, classes: int = 6) -> ImageSet:
    labels = torch.arange(classes).repeat_interleave(per_class)
    names = tuple("abcdefghij"[:classes])
    ids = tuple(f"{names[label]}/{i % per_class}" for i, label in enumerate(labels.tolist()))
    return ImageSet("made", torch.zeros(len(labels), 1, 4, 4), labels, names, ids=ids)


def test_seen_images_are_supports_but_never_queries() -> None:
    pool = images()
    seen = torch.zeros(len(pool), dtype=torch.bool)
    seen[[0, 1, 2, 9, 40]] = True
    batch = EpisodeSampler(pool, 4, SHOTS, QUERY, 0, seen).batch(0, 300)
    assert not seen[batch.query].any()
    assert seen[batch.support].any()
    # still episodes: without replacement, each image of its class
    both = torch.cat([batch.support.view(300, 4, -1), batch.query.view(300, 4, -1)], 2)
    assert all(len(set(row)) == SHOTS + QUERY for row in both.flatten(0, 1).tolist())
    assert torch.equal(pool.labels[both], batch.classes.unsqueeze(-1).expand_as(both))
    plain = EpisodeSampler(pool, 4, SHOTS, QUERY, 0).batch(0, 300)
    assert torch.equal(batch.support, plain.support)
    untouched = ~seen[plain.query].any(1)
    assert torch.equal(batch.query[untouched], plain.query[untouched])


def test_without_seen_images_the_list_is_the_same() -> None:
    pool = images()
    none = torch.zeros(len(pool), dtype=torch.bool)
    plain, barred = EpisodeSampler(pool, 4, 1, 2, 0), EpisodeSampler(pool, 4, 1, 2, 0, none)
    assert plain.fingerprint(200) == barred.fingerprint(200)


def test_too_few_unseen_images_are_named() -> None:
    seen = torch.zeros(48, dtype=torch.bool)
    seen[:4] = True
    with pytest.raises(DataError, match=r"texts were written from, 1 class.*'a' has 4"):
        EpisodeSampler(images(), 4, SHOTS, QUERY, 0, seen)


def test_the_authors_list_cannot_leave_images_out() -> None:
    seen = torch.zeros(48, dtype=torch.bool)
    build_sampler("authors", images(), 4, 1, 2, 0, seen)
    seen[0] = True
    with pytest.raises(UsageError, match=r"fixed and cannot leave out the 1 images"):
        build_sampler("authors", images(), 4, 1, 2, 0, seen)


def data() -> FewShotData:
    parts = [images(classes=c) for c in (6, 6, 6)]
    renamed = [
        dataclasses.replace(
            part,
            class_names=tuple(f"{split}-{name}" for name in part.class_names),
            ids=tuple(f"{split}/{image}" for image in part.ids),
        )
        for split, part in zip(("train", "val", "test"), parts)
    ]
    return FewShotData("made", *renamed, "validation classes", torch.zeros(1), torch.ones(1))


def bank(kind: str | None, seen: dict[str, list[str]]) -> SemanticBank:
    classes = {
        name: {"attributes": ["x"], "description": "y", "images": seen.get(name, [])}
        for name in (*data().class_names, "of another data set")
    }
    return SemanticBank.from_dict(
        {"provenance": {"kind": kind} if kind else {}, "classes": classes}
    )


@pytest.mark.parametrize(
    ("kind", "seen", "verdict", "count"),
    [
        ("class-names", {}, "clean", 0),
        (None, {}, "unknown", 0),
        ("support-images", {}, "unknown", 0),
        ("support-images", {"train-a": ["train/a/1"]}, "unknown", 0),
        ("support-images", {name: ["train/a/1"] for name in NOVEL}, "clean", 0),
        ("support-images", {name: ["train/a/1"] for name in NOVEL[1:]}, "unknown", 0),
        ("definitions", {"train-a": ["train/a/1"]}, "clean", 0),
        ("support-images", {"test-a": ["test/a/1", "test/a/2"]}, "overlap", 2),
        ("class-names", {"test-a": ["test/a/1"]}, "overlap", 1),
        ("support-images", {"test-a": ["elsewhere/1.jpg"]}, "unknown", 0),
        (
            "support-images",
            {"of another data set": ["x.jpg"], "test-a": ["test/a/1"]},
            "overlap",
            1,
        ),
    ],
)
def test_what_a_bank_has_seen(
    kind: str | None, seen: dict[str, list[str]], verdict: str, count: int
) -> None:
    mask, facts = seen_images(bank(kind, seen), data(), "novel")
    assert (facts["verdict"], facts["seen_in_split"], int(mask.sum())) == (verdict, count, count)
    assert [data().novel.ids[i] for i in mask.nonzero()[:, 0].tolist()] == [
        image for image in data().novel.ids if image in seen.get("test-a", [])
    ]


@pytest.mark.parametrize(
    ("seen", "action", "drawn", "verdict"),
    [
        (NOVEL, "exclude", False, "excluded"),
        (NOVEL, "report", False, "clean"),
        (NOVEL, "report", True, "leak"),
        (NOVEL[:1], "exclude", False, "unknown"),
        (NOVEL[:1], "report", True, "leak"),
    ],
)
def test_verdict_on_a_list(seen: list[str], action: str, drawn: bool, verdict: str) -> None:
    listed = {name: [f"{name.replace('-', '/')}/1"] for name in seen}
    mask, facts = seen_images(bank("support-images", listed), data(), "novel")
    assert facts["verdict"] == "overlap"
    queries = torch.tensor([1 if drawn else 2])
    assert leak_summary(facts, action, mask, queries)["verdict"] == verdict


def test_ids_are_those_of_the_files_whatever_they_are_loaded_from(tmp_path: Path) -> None:
    for split, names in (("train", "ab"), ("test", "cd")):
        for name in names:
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = np.full((8, 8, 3), 10 * number, np.uint8)
                file = tmp_path / "photos" / split / name / f"{number}.png"
                Image.fromarray(pixels).save(file)
    prepare_cache(tmp_path / "photos", tmp_path / "cache", 8)
    folder = load_data(str(tmp_path / "photos"), 8)
    cache = load_data(str(tmp_path / "cache"), 8)
    assert folder.novel.ids == cache.novel.ids
    assert folder.novel.ids[:2] == ("test/c/0.png", "test/c/1.png")
    assert images_fingerprint(folder.novel) == images_fingerprint(cache.novel)
    assert images_fingerprint(folder.novel) != images_fingerprint(
        dataclasses.replace(folder.novel, ids=())
    )
    for part in (folder.base, folder.monitor, cache.base, cache.monitor):
        assert len(part.ids) == len(part)
    # the held-out images take their names with them
    for index, image in enumerate(folder.monitor.ids):
        value = int(Path(image).stem) * 10
        assert int(folder.monitor.images[index].max()) == value
    for made in (load_digits().monitor, load_shapes(16, 2).novel):
        assert len(set(made.ids)) == len(made) == len(made.ids)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained gated model of the digits."""
    torch.manual_seed(0)
    config = ModelConfig(width=8, num_heads=4, hidden_dim=8)
    spec = model_spec(config, backbone_spec(config, 1, 16), 512)
    model = build_model(spec)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    path = tmp_path_factory.mktemp("checkpoint") / "m.safetensors"
    info = {"kind": "metatune", "model": spec, "dataset": "digits"}
    save_checkpoint(path, tensors, {**info, "semantics": {"encoder": "hashed-ngram", "dim": 512}})
    return path


def digits_bank(path: Path, seen: int) -> Path:
    from dvla_fast.semantics import load_bank

    novel = load_digits().novel
    content = load_bank("digits").to_dict()
    content["provenance"] = {"kind": "support-images"}
    for label, name in enumerate(novel.class_names):
        places = (novel.labels == label).nonzero()[:seen, 0].tolist()
        content["classes"][name]["images"] = [novel.ids[place] for place in places]
    path.write_text(json.dumps(content))
    return path


def evaluate(checkpoint: Path, output: Path, **semantics: Any) -> dict[str, Any]:
    settings = EvaluateConfig(episodes=8, query=5, shots=[1], batch_episodes=4)
    config = EvaluateRun(
        output=str(output), device="cpu", checkpoint=str(checkpoint), data=DataConfig(),
        semantics=SemanticsConfig(**semantics), evaluate=settings,
    )  # fmt: skip
    run_evaluate(config, quiet=True)
    return json.loads((output / "summary.json").read_text())


def test_the_verdict_is_in_the_summary(checkpoint: Path, tmp_path: Path) -> None:
    bank = str(digits_bank(tmp_path / "bank.json", 60))
    excluded = evaluate(checkpoint, tmp_path / "excluded", bank=bank)
    reported = evaluate(checkpoint, tmp_path / "reported", bank=bank, seen_images="report")
    classes = excluded["leaks"].pop("classes")  # a checkpoint that lists none
    assert (classes["verdict"], classes["split"]) == ("unknown", "novel")
    assert excluded["leaks"] == {
        "bank_kind": "support-images", "images_seen": 300, "seen_in_split": 300, "unmatched": 0,
        "unlisted": 0, "verdict": "excluded", "action": "excluded", "seen_queries": 0,
        "queries": 200,
    }  # fmt: skip
    assert (reported["leaks"]["verdict"], reported["leaks"]["action"]) == ("leak", "reported")
    assert 20 < reported["leaks"]["seen_queries"] < 120
    assert excluded["episodes_sha256"] != reported["episodes_sha256"]
    plain = evaluate(checkpoint, tmp_path / "plain", bank="digits")
    assert (plain["leaks"]["verdict"], plain["leaks"]["action"]) == ("clean", "none")
    assert plain["episodes_sha256"] == reported["episodes_sha256"]
    assert plain["accuracy"] == reported["accuracy"]


def test_only_the_evaluated_classes_need_texts(checkpoint: Path, tmp_path: Path) -> None:
    from dvla_fast.errors import BankError
    from dvla_fast.semantics import load_bank

    content = load_bank("digits").to_dict()
    for name in load_digits().base.class_names:
        del content["classes"][name]
    (tmp_path / "odd.json").write_text(json.dumps(content))
    odd = evaluate(checkpoint, tmp_path / "odd", bank=str(tmp_path / "odd.json"))
    whole = evaluate(checkpoint, tmp_path / "whole", bank="digits")
    assert odd["accuracy"] == whole["accuracy"]
    assert odd["alpha"]["mean"] == pytest.approx(whole["alpha"]["mean"], abs=1e-6)
    assert odd["leaks"]["verdict"] == "clean"
    del content["classes"]["one"]
    (tmp_path / "none.json").write_text(json.dumps(content))
    with pytest.raises(BankError, match=r"lacks 1 class\(es\) of .*split novel\): 'one'"):
        evaluate(checkpoint, tmp_path / "none", bank=str(tmp_path / "none.json"))


def test_another_width_is_named(checkpoint: Path, tmp_path: Path) -> None:
    from dvla_fast.errors import CheckpointError

    with pytest.raises(CheckpointError, match="read texts with dim=512, not 64"):
        evaluate(checkpoint, tmp_path / "run", dim=64)


def test_demo_and_ablation_keep_seen_images_out(tiny: DemoRun, tmp_path: Path) -> None:
    tiny.output = str(tmp_path / "demo")
    tiny.semantics.bank = str(digits_bank(tmp_path / "bank.json", 60))
    tiny.metatune.backbone_lr = 0.0
    first = run_demo(tiny, quiet=True)["results"][0]
    assert (first["leaks"]["verdict"], first["leaks"]["seen_queries"]) == ("excluded", 0)

    config = AblateRun(
        output=str(tmp_path / "ablation"), device="cpu", model=tiny.model,
        semantics=tiny.semantics, pretrain=tiny.pretrain, metatune=tiny.metatune,
        evaluate=tiny.evaluate,
        ablate=AblateConfig(seeds=1, processes=1, variants=["visual"], draws=100),
    )  # fmt: skip
    workshop = Workshop(config, Store(tmp_path / "ablation"), torch.device("cpu"))
    leaks = workshop.leaks()["1"]
    assert (leaks["verdict"], leaks["seen_queries"]) == ("excluded", 0)
    facts = workshop._visual(tmp_path / "demo/checkpoints/pretrain-best.safetensors")[1]
    assert facts["episodes_sha256"]["1"] == first["episodes_sha256"]
    config.semantics.seen_images = "report"
    reported = Workshop(config, Store(tmp_path / "ablation"), torch.device("cpu")).leaks()["1"]
    assert reported["verdict"] == "leak"
