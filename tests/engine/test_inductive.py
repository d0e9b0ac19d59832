"""Texts of every episode from its own supports: nothing else is shown, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dvla_fast.data import EpisodeSampler, load_digits
from dvla_fast.engine import inductive
from dvla_fast.engine.config import EvaluateConfig, EvaluateRun, SemanticsConfig
from dvla_fast.engine.evaluate import run_evaluate
from dvla_fast.engine.records import EpisodeRecord
from dvla_fast.engine.settings import UsageError
from dvla_fast.engine.tool_config import SemanticsBuild
from dvla_fast.errors import LanguageModelError, OutputError
from dvla_fast.semantics import load_bank
from tests.engine.runs import write_tuned
from tests.semantics.scripted import Scripted

WAY, SHOT, EPISODES = 5, 2, 6
EVALUATE = EvaluateConfig(
    way=WAY, shots=[SHOT], query=3, episodes=EPISODES, batch_episodes=4, cache_mib=1024
)


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    scope = getattr(request, "param", "episode")
    return write_tuned(tmp_path / "model.safetensors", 64, text_scope=scope)


def settings_file(folder: Path, images: int, answers: str = "") -> str:
    path = folder / "build.yaml"
    path.write_text(
        f"language_model: {{backend: files, answers: '{answers}'}}\n"
        f"construct: {{images: {images}, top_k: 3, dim: 64}}\n"
    )
    return str(path)


def evaluate(checkpoint: Path, output: Path, **changes: Any) -> dict[str, Any]:
    config = EvaluateRun(
        output=str(output), device="cpu", checkpoint=str(checkpoint),
        semantics=SemanticsConfig(dim=64), evaluate=EVALUATE,
    )  # fmt: skip
    return run_evaluate(dataclasses.replace(config, **changes), quiet=True)


@pytest.mark.parametrize("checkpoint", ["episode", "class"], indirect=True)
def test_names_alone_give_what_a_bank_of_the_same_answers_gives(
    checkpoint: Path, tmp_path: Path
) -> None:
    bank = load_bank("digits")
    texts = {
        "candidates": {name: list(entry.attributes) for name, entry in bank.classes.items()},
        "description": {name: entry.description for name, entry in bank.classes.items()},
    }
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(texts))
    written = dataclasses.replace(
        EVALUATE, construct=settings_file(tmp_path, images=0, answers=str(answers))
    )
    summary = evaluate(checkpoint, tmp_path / "written", evaluate=written)
    plain = evaluate(checkpoint, tmp_path / "bank", semantics=SemanticsConfig(dim=64, top_k=3))
    found, expected = (
        EpisodeRecord.read(tmp_path / run / f"episodes-{SHOT}shot.npz")
        for run in ("written", "bank")
    )
    for method, predictions in expected.predictions.items():
        assert torch.equal(found.predictions[method], predictions), method
    assert summary["accuracy"] == plain["accuracy"]
    assert summary["semantics"]["bank"] == inductive.BANK
    assert summary["semantics"]["bank_kind"] == "class-names"


def test_only_the_supports_of_the_episode_are_shown(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Scripted()
    monkeypatch.setattr(inductive, "build_language_model", lambda config: model)
    written = dataclasses.replace(EVALUATE, construct=settings_file(tmp_path, images=1))
    summary = evaluate(checkpoint, tmp_path / "run", evaluate=written)
    images = load_digits().novel
    batch = EpisodeSampler(images, WAY, SHOT, 3, 0).batch(0, EPISODES)
    allowed = [{images.ids[i] for i in row} for row in batch.support.tolist()]
    shown = [{image.id for image in request.images} for request in model.asked if request.images]
    assert shown
    for ids in shown:
        assert len(ids) == 1  # construct.images
        assert any(ids <= supports for supports in allowed)
    assert len(set().union(*shown)) > WAY  # other supports in other episodes
    leaks = summary["leaks"]
    assert (leaks["verdict"], leaks["bank_kind"], leaks["seen_queries"]) == (
        "clean", "episode-supports", 0,
    )  # fmt: skip
    assert leaks["per_episode"] is True
    assert (tmp_path / "run" / "answers.jsonl").exists()


def test_a_whole_batch_is_asked_about_at_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(Scripted):
        def answers(self, requests: Any) -> Any:
            calls.append([request.stage for request in requests])
            return super().answers(requests)

    calls: list[list[str]] = []
    monkeypatch.setattr(inductive, "build_language_model", lambda config: Counting())
    written = dataclasses.replace(EVALUATE, construct=settings_file(tmp_path, images=1))
    evaluate(checkpoint, tmp_path / "run", evaluate=written)
    # 6 episodes in batches of 4
    assert set(calls[0]) == {"candidates"}
    assert WAY < len(calls[0]) <= 4 * WAY
    assert len(calls) <= 4


def test_an_evaluation_that_fails_closes_its_answers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    real = inductive.EpisodeTexts.close

    def close(self: inductive.EpisodeTexts) -> None:
        real(self)
        closed.append("answers")

    def fail(*arguments: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(inductive.EpisodeTexts, "close", close)
    monkeypatch.setattr(inductive.EpisodeTexts, "__call__", fail)
    written = dataclasses.replace(EVALUATE, construct=settings_file(tmp_path, images=0))
    monkeypatch.setattr(inductive, "build_language_model", lambda config: Scripted())
    with pytest.raises(RuntimeError, match="on purpose"):
        evaluate(checkpoint, tmp_path / "run", evaluate=written)
    assert closed == ["answers"]


def test_a_checkpoint_without_gates_is_told_to_read_no_texts(backbone: str, tmp_path: Path) -> None:
    written = dataclasses.replace(EVALUATE, construct=settings_file(tmp_path, images=0))
    with pytest.warns(UserWarning, match=r"evaluate\.construct: not used, for .* has no gates"):
        summary = evaluate(Path(backbone), tmp_path / "run", evaluate=written)
    assert summary["semantics"] is None


def test_continued_evaluation_asks_nothing_twice(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Scripted(), Scripted()
    written = dataclasses.replace(EVALUATE, construct=settings_file(tmp_path, images=1))
    monkeypatch.setattr(inductive, "build_language_model", lambda config: first)
    expected = evaluate(checkpoint, tmp_path / "run", evaluate=written)
    monkeypatch.setattr(inductive, "build_language_model", lambda config: second)
    for path in (tmp_path / "run").glob("result-*.json"):  # as if it was stopped before its end
        path.unlink()
    again = evaluate(checkpoint, tmp_path / "run", evaluate=written, resume=True)
    assert first.asked
    assert second.asked == []
    assert again["accuracy"] == expected["accuracy"]


def test_relative_paths_count_from_the_working_folder_and_are_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = load_bank("digits")
    texts = {
        "candidates": {name: list(entry.attributes) for name, entry in bank.classes.items()},
        "description": {name: entry.description for name, entry in bank.classes.items()},
    }
    for folder in ("here/texts", "settings", "there"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "here/texts/answers.json").write_text(json.dumps(texts))
    file = settings_file(tmp_path / "settings", images=0, answers="texts/answers.json")
    written = dataclasses.replace(EVALUATE, construct=file)
    monkeypatch.chdir(tmp_path / "here")
    expected = evaluate(checkpoint, tmp_path / "run", evaluate=written)
    monkeypatch.chdir(tmp_path / "there")
    again = evaluate(checkpoint, tmp_path / "run", evaluate=written, resume=True)
    assert again["accuracy"] == expected["accuracy"]
    assert again["semantics"] == expected["semantics"]
    with pytest.raises(LanguageModelError, match=r"texts/answers\.json"):
        evaluate(checkpoint, tmp_path / "other", evaluate=written)
    Path(file).write_text(Path(file).read_text().replace("top_k: 3", "top_k: 2"))
    with pytest.raises(OutputError, match=r"build\.yaml has changed since the run began"):
        evaluate(checkpoint, tmp_path / "run", evaluate=written, resume=True)
    Path(file).unlink()
    again = evaluate(checkpoint, tmp_path / "run", evaluate=written, resume=True)
    assert again["accuracy"] == expected["accuracy"]


def test_episodes_of_fewer_attributes_are_padded(checkpoint: Path) -> None:
    from dvla_fast.semantics import ClassEntry, SemanticBank, build_encoder, encode_bank

    encoder = build_encoder("hashed-ngram", 16)
    parts = []
    for count in (1, 3):
        entry = ClassEntry(tuple(f"part {i} of it" for i in range(count)), "a thing with parts")
        bank = SemanticBank("episode", {"one": entry, "two": entry})
        parts.append(encode_bank(bank, ["one", "two"], encoder))
    text = inductive._together(parts, torch.device("cpu"))
    assert text.tokens.shape == (2, 2 * 4, 16)
    assert text.levels.tolist() == [0, 0, 0, 1] * 2
    assert text.mask is not None
    assert text.mask.tolist() == [[True, False, False, True] * 2, [True] * 8]
    assert torch.equal(text.tokens[0, 3], parts[0].tokens[0, -1])  # the description stays last
    assert torch.equal(text.tokens[0, 1:3], torch.zeros(2, 16))


def test_settings_of_a_bank_that_is_not_read_are_told(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductive, "build_language_model", lambda config: Scripted())
    written = dataclasses.replace(EVALUATE, construct=settings_file(tmp_path, images=0))
    given = SemanticsConfig(top_k=2, encoder="open_clip:none")
    with pytest.warns(UserWarning, match=r"semantics\.encoder, semantics\.top_k: not used"):
        evaluate(checkpoint, tmp_path / "run", evaluate=written, semantics=given)


def test_wrong_settings_fail_before_the_folder_is_made(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("language_model: {backend: oracle}")
    wrong = dataclasses.replace(EVALUATE, construct=str(path))
    with pytest.raises(UsageError, match=r"language_model\.backend: 'oracle' is unknown"):
        evaluate(checkpoint, tmp_path / "run", evaluate=wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"model": "lab/VL-7B"}, {"model": "other/VL-7B"}, False),
        ({"model": "/a/VL-7B"}, {"model": "/b/c/VL-7B"}, True),
        ({"answers": "/a/x.json"}, {"answers": "/b/x.json"}, True),
        ({"answers": "/a/x.json"}, {"answers": "/a/y.json"}, False),
        ({"encoder": "open_clip:B-16/openai"}, {"encoder": "open_clip:L-14/openai"}, False),
        ({"encoder": "open_clip:B-16//a/x.bin"}, {"encoder": "open_clip:B-16//b/x.bin"}, True),
        ({"encoder": "transformers:/a/x"}, {"encoder": "transformers:/b/x"}, True),
        ({"encoder": "transformers:a/x"}, {"encoder": "transformers:b/x"}, False),
    ],
)
def test_what_wrote_the_texts_is_known_by_its_name_and_not_by_its_folder(
    first: dict[str, str], second: dict[str, str], same: bool
) -> None:
    def digest(changes: dict[str, str]) -> str:
        config = SemanticsBuild()
        for key, value in changes.items():
            setattr(config.construct if key == "encoder" else config.language_model, key, value)
        return inductive._digest(config)

    assert (digest(first) == digest(second)) == same
