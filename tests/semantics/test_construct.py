"""The three stages, the build over all classes, and the texts of one episode."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.topk import one_by_one_top_k
from dvla_fast.errors import DataError, LanguageModelError, OutputError
from dvla_fast.semantics import (
    HashedNGramEncoder,
    TextEncoder,
    build_encoder,
    encode_bank,
    load_bank,
)
from dvla_fast.semantics.construct import (
    Settings,
    construct_bank,
    journal_path,
)
from dvla_fast.semantics.journal import Journal, JournaledModel
from dvla_fast.semantics.language_models.base import Answer, Request, ShownImage
from dvla_fast.semantics.stages import (
    ClassSource,
    Prompts,
    candidate_attributes,
    describe,
    select_attributes,
)
from tests.semantics.scripted import Scripted, attributes_of, good_answer, image, spoil

NAMES = ("Crow", "Gull", "Owl")
CLASSES = [ClassSource(name) for name in NAMES]
ENCODER = build_encoder("hashed-ngram", 128)
PROMPTS = Prompts.load()


def test_candidates_of_all_classes() -> None:
    model = Scripted()
    classes = [ClassSource("Crow", (image(0), image(1))), ClassSource("Gull")]
    found = candidate_attributes(model, classes, PROMPTS, count=7)
    assert list(found.done) == ["Crow", "Gull"]  # in order, though answers came in reverse
    crow = found.done["Crow"]
    assert crow.value.kept == tuple(attributes_of("Crow"))
    assert crow.answers == (good_answer("candidates", "Crow"),)
    assert crow.tokens == (100, 10)
    gull, shown = model.asked
    assert shown.images == classes[0].images
    assert "Crow in the given image?" in shown.prompt
    assert "Name 7 attributes" in shown.prompt
    assert gull.images == ()
    assert "image" not in gull.prompt


def test_unusable_answer_is_asked_for_again_with_the_reason() -> None:
    model = spoil("candidates", "Gull", "I like gulls. They are nice.", times=1)
    found = candidate_attributes(model, CLASSES, PROMPTS)
    assert found.failures == {}
    assert found.done["Gull"].answers == (
        "I like gulls. They are nice.",
        good_answer("candidates", "Gull"),
    )
    assert found.done["Gull"].tokens == (200, 20)
    again = model.asked[-1].prompt
    assert "could not be used: the answer holds no list of attributes but 'I like" in again
    assert "distinguishing attributes of the Gull" in again


def test_class_that_fails_leaves_the_others() -> None:
    refused = spoil("candidates", "Gull", Answer("No.", "refusal"))
    found = candidate_attributes(refused, CLASSES, PROMPTS, attempts=3)
    assert list(found.done) == ["Crow", "Owl"]
    assert found.failures["Gull"].message == "the model refused: 'No.'"
    assert len(found.unusable) == 3
    broken = spoil("candidates", "Gull", LanguageModelError("the server answered 500"))
    found = candidate_attributes(broken, CLASSES, PROMPTS)
    assert found.failures["Gull"].message == "the server answered 500"
    assert len(broken.asked) == 3  # an error is not an answer: nothing to ask again about


def test_selection_is_that_of_the_definition() -> None:
    candidates = {name: attributes_of(name) for name in NAMES}
    found = select_attributes(candidates, ENCODER, 3).done
    expected = one_by_one_top_k(list(NAMES), list(candidates.values()), ENCODER, 3)
    for name, selection in zip(NAMES, expected):
        assert found[name].attributes == tuple(candidates[name][i] for i in selection.order)
        assert [item.text for item in found[name].candidates] == candidates[name]
        assert [item.scores for item in found[name].candidates] == list(selection.scores)


def test_selection_fails_class_by_class() -> None:
    candidates = {"Crow": attributes_of("Crow"), "Gull": ["!!!", "white face"]}
    found = select_attributes(candidates, ENCODER, 2)
    assert list(found.done) == ["Crow"]
    assert "holds no word to encode" in found.failures["Gull"].message


def test_description_of_the_chosen_attributes() -> None:
    model = Scripted()
    found = describe(model, {"Crow": ["black bill", "white face"]}, PROMPTS)
    assert found.done["Crow"].value.startswith("The Crow is a bird with")
    (asked,) = model.asked
    assert "for the class Crow:\n- black bill\n- white face\n" in asked.prompt
    assert asked.images == ()


def test_long_description_is_shortened_only_at_the_last_attempt() -> None:
    long = "A black bird with a thick bill. " * 12
    found = describe(spoil("description", "Crow", long, 1), {"Crow": ["a"]}, PROMPTS)
    assert found.done["Crow"].value.startswith("The Crow is")
    found = describe(spoil("description", "Crow", long), {"Crow": ["a"]}, PROMPTS)
    assert found.done["Crow"].value.count("thick bill") == 8


LONG = "A bird of sooty-brown, dark-edged, wedge-tipped, long-winged looks. It is large."


def described(text: str, times: int, encoder: TextEncoder, **options: Any) -> Any:
    model = spoil("description", "Crow", json.dumps({"description": text}), times)
    found = describe(model, {"Crow": ["a"]}, PROMPTS, encoder=encoder, **options)
    return found, [request.prompt for request in model.asked]


def test_description_is_measured_by_the_encoder_that_will_read_it() -> None:
    found, asked = described(LONG, 1, HashedNGramEncoder(64, max_tokens=14))
    assert found.done["Crow"].value == json.loads(good_answer("description", "Crow"))["description"]
    assert "is 15 words long, the hashed-ngram encoder reads 14 words (write at" in asked[1]
    # the last attempt: as many whole sentences as it reads
    found, asked = described(LONG, 99, HashedNGramEncoder(64, max_tokens=14))
    assert len(asked) == 2
    assert found.done["Crow"].value == LONG.partition(" It is")[0]
    found, asked = described(LONG, 99, HashedNGramEncoder(64, max_tokens=15))
    assert (len(asked), found.done["Crow"].value) == (1, LONG)


def test_description_that_no_cut_between_sentences_makes_short_enough() -> None:
    found, _ = described(LONG, 99, HashedNGramEncoder(64, max_tokens=11))
    assert found.done == {}
    message = found.failures["Crow"].message
    assert "is 15 words long, the hashed-ngram encoder reads 11 words" in message
    assert "or allow the cut: construct.truncate" in message
    encoder = HashedNGramEncoder(64, max_tokens=11, truncate=True)
    found, asked = described(LONG, 99, encoder)
    assert (len(asked), found.done["Crow"].value) == (1, LONG)


def test_encoders_that_do_not_tell_lengths_are_no_limit() -> None:
    class Any_:
        name, dim, truncated = "any", 4, 0

        def encode(self, texts: Sequence[str]) -> Tensor:
            return torch.ones(len(texts), 4) / 2

    found, asked = described(LONG, 99, Any_())
    assert (len(asked), found.done["Crow"].value) == (1, LONG)


def test_bank_of_long_descriptions_can_be_encoded_by_its_own_encoder(tmp_path: Path) -> None:
    encoder = HashedNGramEncoder(64, max_tokens=14)
    model = spoil("description", "Crow", LONG)
    built = construct_bank(CLASSES, model, encoder, tmp_path / "b.json", settings=Settings(top_k=1))
    assert not built.failures
    encode_bank(load_bank(tmp_path / "b.json"), NAMES, encoder)


def test_classes_of_one_name_are_told_apart_by_their_keys() -> None:
    classes = [ClassSource("Crow", (image(0),), "a"), ClassSource("Crow", (image(1),), "b")]
    found = candidate_attributes(Scripted(), classes, PROMPTS)
    names = dict.fromkeys("ab", "Crow")
    assert list(found.done) == ["a", "b"]
    candidates = {"a": attributes_of("Crow"), "b": attributes_of("Gull")}
    chosen = select_attributes(candidates, ENCODER, 2, names=names).done
    for key, texts in candidates.items():
        assert chosen[key] == select_attributes({"Crow": texts}, ENCODER, 2).done["Crow"]
    model = Scripted()
    describe(model, {key: item.attributes for key, item in chosen.items()}, PROMPTS, names=names)
    assert {request.subject for request in model.asked} == {"Crow"}
    assert all("for the class Crow:" in request.prompt for request in model.asked)


def test_bank_records_everything(tmp_path: Path) -> None:
    path = tmp_path / "birds.json"
    classes = [ClassSource(name, (image(i), image(9 + i))) for i, name in enumerate(NAMES)]
    steps: list[tuple[str, int, int]] = []
    built = construct_bank(
        classes,
        Scripted(),
        ENCODER,
        path,
        settings=Settings(top_k=3),
        provenance={"dataset": "photos"},
        progress=lambda *step: steps.append(step),
    )
    bank = load_bank(path)
    assert built.failures == {}
    assert bank.to_dict() == built.bank.to_dict()  # type: ignore[union-attr]
    entry = bank.classes["Owl"]
    assert len(entry.attributes) == 3
    assert len(entry.candidates) == 6
    assert entry.images == ("image-2", "image-11")
    assert entry.answers["candidates"] == [good_answer("candidates", "Owl")]
    assert entry.answers["description"] == good_answer("description", "Owl")
    record = bank.provenance
    assert record["kind"] == "support-images"
    assert record["model"] == "scripted"
    assert record["language_model"]["answered_as"] == ["scripted-1"]
    assert record["language_model"]["input_tokens"] == 600
    assert record["encoder"] == "hashed-ngram"
    assert record["prompts"]["candidates"] == PROMPTS.candidates.record()
    assert set(record["prompts"]) == {"candidates", "description", "again"}
    assert record["dataset"] == "photos"
    assert {"date", "dvla_fast"} <= set(record)
    assert steps[0] == ("candidates", 1, 3)
    assert steps[-1] == ("description", 3, 3)


def test_prompts_and_settings_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("List {count} marks of the {class}.")
    own = Prompts.load(str(tmp_path / "own.txt"))
    model, settings = Scripted(), Settings(top_k=2, count=7)
    classes = [ClassSource("Crow"), ClassSource("Gull", (image(0),))]
    path = tmp_path / "b.json"
    construct_bank(classes, model, ENCODER, path, prompts=own, settings=settings)
    assert "List 7 marks of the Crow." in [request.prompt for request in model.asked]
    record = load_bank(path).provenance
    assert record["prompts"]["candidates-by-name"] == own.by_name.record()
    assert record["kind"] == "support-images"  # of one class


def test_dropped_candidates_are_recorded_with_the_reason(tmp_path: Path) -> None:
    answer = json.dumps(["black bill", "Black bill.", "x" * 500, "white face"])
    construct_bank(CLASSES, spoil("candidates", "Crow", answer), ENCODER, tmp_path / "b.json")
    content = json.loads((tmp_path / "b.json").read_text())
    dropped = content["classes"]["Crow"]["dropped"]
    assert [item["reason"][:8] for item in dropped] == ["repeated", "too long"]
    assert content["provenance"]["kind"] == "class-names"


def test_failed_classes_are_asked_about_again_and_the_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    built = construct_bank(CLASSES, spoil("candidates", "Gull", "no"), ENCODER, path)
    assert list(built.failures) == ["Gull"]
    assert list(load_bank(path).classes) == ["Crow", "Owl"]
    assert load_bank(path).provenance["failed"] == ["Gull"]
    model = Scripted()
    built = construct_bank(CLASSES, model, ENCODER, path)
    assert built.failures == {}
    assert list(load_bank(path).classes) == list(NAMES)
    assert {request.subject for request in model.asked} == {"Gull"}
    assert built.reused == 4
    assert "failed" not in load_bank(path).provenance


def test_a_finished_class_is_never_lost(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    construct_bank(CLASSES, Scripted(), ENCODER, path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"has 2 class\(es\) .* not ask for \('Crow', 'Owl'\)"):
        construct_bank([ClassSource("Gull"), ClassSource("Tit")], Scripted(), ENCODER, path)
    settings = Settings(top_k=3)  # another bank, in which one fails
    model = spoil("description", "Gull", "no")
    built = construct_bank(CLASSES, model, ENCODER, path, settings=settings)
    assert (list(built.failures), built.lost) == (["Gull"], ("Gull",))
    assert path.read_bytes() == before
    built = construct_bank(CLASSES, Scripted(), ENCODER, path, settings=settings)
    assert built.lost == ()
    assert len(load_bank(path).classes["Gull"].attributes) == 3


def test_finished_bank_asks_nothing_and_another_k_only_descriptions(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    construct_bank(CLASSES, Scripted(), ENCODER, path, settings=Settings(top_k=2))
    before = path.read_bytes()
    model = Scripted()
    construct_bank(CLASSES, model, ENCODER, path, settings=Settings(top_k=2))
    assert model.asked == []
    assert path.read_bytes() == before
    construct_bank(CLASSES, model, ENCODER, path, settings=Settings(top_k=3))
    assert {request.stage for request in model.asked} == {"description"}
    construct_bank(CLASSES, other := Scripted(name="other"), ENCODER, path)
    assert len(other.asked) == 6  # another model's answers are others


def test_edited_bank_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    construct_bank(CLASSES, Scripted(), ENCODER, path)
    text = path.read_text()
    path.write_text(text.replace("is a bird", "is a fine bird"))
    with pytest.raises(OutputError, match="was edited since; a build would replace it: move it"):
        construct_bank(CLASSES, Scripted(), ENCODER, path)
    assert "fine bird" in path.read_text()
    path.write_text(text)
    construct_bank(CLASSES, Scripted(), ENCODER, path)
    content = json.loads(text)
    content["reviewed"] = "by me"  # nothing reads it, but it is somebody's work
    path.write_text(json.dumps(content))
    with pytest.raises(OutputError, match="was edited since"):
        construct_bank(CLASSES, Scripted(), ENCODER, path)
    path.write_text("{oops")
    with pytest.raises(OutputError, match="was not written by this build"):
        construct_bank(CLASSES, Scripted(), ENCODER, path)


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot keep answers here"):
        construct_bank(CLASSES, Scripted(), ENCODER, tmp_path / "file" / "b.json")
    with pytest.raises(OutputError, match="is a folder"):
        construct_bank(CLASSES, Scripted(), ENCODER, tmp_path)


def test_folder_of_the_bank_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "b.json"
    construct_bank(CLASSES, Scripted(), ENCODER, path)
    assert list(load_bank(path).classes) == list(NAMES)


@pytest.mark.parametrize("escaped", [False, True])
def test_half_a_character_costs_no_answer(tmp_path: Path, escaped: bool) -> None:
    def answers(request: Request) -> str:
        text = good_answer(request.stage, request.subject)
        text = text.replace("black", "black \ud83d").replace("is a bird", "is a \ud83d bird")
        text = text.replace("]}", ', "\ud83d"]}')  # one that is dropped
        return text.replace("\ud83d", "\\ud83d") if escaped else text

    path = tmp_path / "b.json"
    built = construct_bank(CLASSES, Scripted(answers), ENCODER, path)
    assert not built.failures
    assert list(load_bank(path).classes) == list(NAMES)
    again = Scripted()
    construct_bank(CLASSES, again, ENCODER, path)
    assert again.asked == []


def test_answer_can_be_written() -> None:
    assert Answer("a \ud83d\ude00 \ud83d", model="\ude00") == Answer("a 😀 \ufffd", model="\ufffd")


def test_names_that_are_not_utf8_are_refused_before_the_work(tmp_path: Path) -> None:
    model = Scripted()
    for item in (
        ClassSource("caf\udce9"),
        ClassSource("jay", (ShownImage("caf\udce9/1.jpg", tmp_path),)),
    ):
        with pytest.raises(DataError, match=r"'caf\\udce9.*' is not UTF-8.*rename"):
            construct_bank([*CLASSES, item], model, ENCODER, tmp_path / "b.json")
    assert model.asked == []


def test_one_build_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    with (
        Journal(journal_path(path)),
        pytest.raises(OutputError, match="another process is building this bank"),
    ):
        construct_bank(CLASSES, Scripted(), ENCODER, path)
    construct_bank(CLASSES, Scripted(), ENCODER, path)


def test_all_classes_failing_writes_no_bank(tmp_path: Path) -> None:
    built = construct_bank(CLASSES, Scripted(lambda _: "no"), ENCODER, tmp_path / "b.json")
    assert built.bank is None
    assert len(built.failures) == 3
    assert not (tmp_path / "b.json").exists()


def test_a_file_named_like_a_bank_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        built = construct_bank(CLASSES, Scripted(), ENCODER, "cub")
        assert built.bank is not None
    assert built.reused == 6
    assert list(json.loads(Path("cub").read_text())["classes"]) == list(NAMES)


def test_classes_without_a_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class number 1 has no name"):
        construct_bank([ClassSource(" ")], Scripted(), ENCODER, tmp_path / "b.json")


def test_journal_of_another_kind_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"format": "else"}\n')
    with pytest.raises(OutputError, match="no journal of answers; remove the file"):
        Journal(path)
    path.unlink()
    Journal(path).close()
    path.write_text(path.read_text() + "oops\n")
    with pytest.raises(OutputError, match="line 2 is damaged; remove that line"):
        Journal(path)


@pytest.mark.parametrize("text", ["no line break", "first line\nsecond without a break"])
def test_files_of_others_stay_as_they_are(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(OutputError, match="no journal of answers"):
        Journal(path)
    assert path.read_text() == text


def test_half_an_answer_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full in the middle of a line, and has room again."""
    real = os.write

    def full(file: int, content: memoryview) -> int:
        if len(content) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, content[:-5])

    with Journal(tmp_path / "j.jsonl") as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OutputError, match="No space left"):
                journal.add("a", Request("?"), Answer("lost"))
        journal.add("b", Request("?"), Answer("kept"))
    with Journal(tmp_path / "j.jsonl") as again:
        assert (again.get("a"), again.get("b")) == (None, Answer("kept"))


def test_equal_questions_are_asked_once() -> None:
    model = Scripted()
    journaled = JournaledModel(model, Journal())
    requests = [Request("?", subject="a"), Request("?", subject="b"), Request("?", subject="a")]
    assert len(dict(journaled.answers(requests))) == 3
    assert len(model.asked) == 2


@pytest.mark.parametrize(
    "other",
    [
        Request("other", (image(0),), "s", "a"),
        Request("?", (image(1),), "s", "a"),
        Request("?", (image(0), image(0)), "s", "a"),
        Request("?", (image(0),), "t", "a"),
        Request("?", (image(0),), "s", "a", {"type": "object"}),
        Request("?", (image(0),), "s", "a", None, 7),
    ],
)
def test_key_holds_all_that_an_answer_depends_on(other: Request) -> None:
    journaled = JournaledModel(Scripted(), Journal())
    request = Request("?", (image(0),), "s", "a")
    assert journaled.key(request) == journaled.key(Request("?", (image(0),), "s", "a"))
    assert journaled.key(request) != journaled.key(other)
    assert journaled.key(request) != JournaledModel(Scripted(name="x"), Journal()).key(request)
    # answers from before a model had a limit of its own are found again
    assert journaled.key(Request("a")) == journaled.key(Request("a", max_tokens=1024))
