"""``dvla-fast semantics build`` from the command line, against a loopback server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dvla_fast.cli import main
from dvla_fast.data import prepare_cache
from dvla_fast.engine import bank_build
from dvla_fast.engine.build import build_data
from dvla_fast.engine.config import DataConfig
from dvla_fast.engine.leaks import seen_images
from dvla_fast.engine.tool_config import LanguageModelConfig
from dvla_fast.semantics import load_bank
from tests.data.trees import split_folders
from tests.semantics.loopback import Reply, images_of, prompt_of, serve
from tests.semantics.scripted import good_answer

NAMES = ["crow", "gull", "owl", "jay", "tit"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return split_folders(tmp_path / "photos", {"train": NAMES, "test": ["eagle", "heron"]})


def answer(request: dict[str, Any], number: int) -> Reply:
    found = re.search(r"attributes of the (.+?)( in the given image)?\?|the class (.+?):\n",
                      prompt_of(request))  # fmt: skip
    assert found
    stage = "candidates" if found[1] else "description"
    return Reply(good_answer(stage, found[1] or found[3]))


def build(url: str, output: Path, *more: str) -> int:
    arguments = [f"--output={output}", f"--language_model.base_url={url}", "--construct.top_k=3"]
    return main(["semantics", "build", *arguments, *more])


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    assert main(["semantics", "build", *arguments]) == status
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def test_bank_of_a_folder(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "birds.json"
    more = [f"--data.dataset={photos}", "--construct.images=2", "--seed=3"]
    prices = ["--language_model.input_price=2", "--language_model.output_price=10"]
    with serve(answer) as server:
        assert build(server.url, path, *more, *prices) == 0
        text = capsys.readouterr().out
        assert len(server.requests) == 14
        assert sorted(len(images_of(request)) for request in server.requests) == [0] * 7 + [2] * 7
        assert build(server.url, path, *more) == 0
        assert len(server.requests) == 14
    assert "7 of 7 classes" in text
    assert "asked       14 answers, 1400 tokens read and 140 written; cost 0.0042" in text
    assert "next        dvla-fast semantics show" in text
    assert "asked       0 answers (14 more were kept from before)" in capsys.readouterr().out
    bank = load_bank(path)
    assert sorted(bank.classes) == sorted([*NAMES, "eagle", "heron"])
    for name, entry in bank.classes.items():
        assert len(entry.attributes) == 3
        assert len(entry.images) == 2
        assert all((photos / image).parent.name == name for image in entry.images)
    record = bank.provenance
    assert record["kind"] == "support-images"
    assert (record["dataset"], record["images_per_class"], record["seed"]) == (str(photos), 2, 3)
    assert record["model"] == "tiny-vl"
    assert str(server.url) not in path.read_text()


@pytest.mark.parametrize("dataset", ["folder", "cache", "digits", "shapes"])
def test_evaluation_knows_the_images_again(dataset: str, photos: Path, tmp_path: Path) -> None:
    options = DataConfig(dataset, images_per_class=4)
    if dataset in ("folder", "cache"):
        options.image_size = 16
    if dataset == "folder":
        options.dataset = str(photos)
    if dataset == "cache":
        options.dataset = str(tmp_path / "cache")
        prepare_cache(photos, options.dataset, options.image_size)
    more = [f"--data.dataset={options.dataset}", "--data.images_per_class=4"]
    with serve(answer) as server:
        assert build(server.url, tmp_path / "b.json", *more, "--construct.images=2") == 0
    bank = load_bank(tmp_path / "b.json")
    data = build_data(options, torch.device("cpu"))
    mask, facts = seen_images(bank, data, "novel")
    assert facts["unmatched"] == 0
    assert facts["verdict"] == "overlap"
    assert mask.sum() == 2 * len(data.novel.class_names)
    for name, label in zip(data.novel.class_names, range(99)):
        seen = {data.novel.ids[place] for place in (mask & (data.novel.labels == label)).nonzero()}
        assert seen == set(bank.classes[name].images)


def test_bank_follows_the_published_schema(photos: Path, tmp_path: Path) -> None:
    from jsonschema import validate

    import dvla_fast.semantics.bank as module

    with serve(answer) as server:
        assert build(server.url, tmp_path / "b.json", f"--data.dataset={photos}") == 0
    schema = Path(module.__file__).parent / "bank.schema.json"
    validate(json.loads((tmp_path / "b.json").read_text()), json.loads(schema.read_text()))


def test_path_of_a_data_set_need_not_be_utf8(photos: Path, tmp_path: Path) -> None:
    root = photos.rename(photos.with_name("caf\udce9"))
    with serve(answer) as server:
        assert build(server.url, tmp_path / "b.json", f"--data.dataset={root}") == 0
    assert load_bank(tmp_path / "b.json").provenance["dataset"].endswith("caf\ufffd")


def test_another_length_of_answers_asks_anew(photos: Path, tmp_path: Path) -> None:
    more = [f"--data.dataset={photos}", "--construct.images=0", "--language_model.max_tokens=77"]
    with serve(answer) as server:
        assert build(server.url, tmp_path / "a.json", *more[:2]) == 0
        assert build(server.url, tmp_path / "a.json", *more) == 0
        sent = [request["max_tokens"] for request in server.requests]
        assert sent == [1024] * 14 + [77] * 14
        assert build(server.url, tmp_path / "a.json", *more) == 0
        assert len(server.requests) == 28
    assert load_bank(tmp_path / "a.json").provenance["language_model"]["max_tokens"] == 77
    local = LanguageModelConfig(backend="transformers", max_tokens=77)
    assert bank_build.build_language_model(local).identity["max_tokens"] == 77


def test_one_split_and_class_names_alone(photos: Path, tmp_path: Path) -> None:
    with serve(answer) as server:
        more = [f"--data.dataset={photos}", "--construct.images=0"]
        for name in ("test", "novel"):
            one = f"--construct.split=[{name}]"
            assert build(server.url, tmp_path / f"{name}.json", *more, one) == 0
    bank = load_bank(tmp_path / "test.json")
    assert list(bank.classes) == ["eagle", "heron"]
    assert load_bank(tmp_path / "novel.json").classes == bank.classes
    assert bank.provenance["kind"] == "class-names"
    assert not any(images_of(request) for request in server.requests)


def test_keys_in_a_list_of_classes_get_their_names(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("n02085620-Chihuahua\n003.Sooty_Albatross\ncrow\n")
    with serve(answer) as server:
        assert build(server.url, tmp_path / "a.json", f"--construct.classes={names}") == 0
    assert list(load_bank(tmp_path / "a.json").classes) == ["Chihuahua", "Sooty Albatross", "crow"]
    assert not any("n02085620" in prompt for prompt in server.prompts())


@pytest.mark.parametrize("dataset", ["digits", "shapes"])
def test_made_data_sets(dataset: str, tmp_path: Path) -> None:
    with serve(answer) as server:
        more = [f"--data.dataset={dataset}", "--construct.images=1", "--data.images_per_class=2"]
        assert build(server.url, tmp_path / "a.json", *more) == 0
    bank = load_bank(tmp_path / "a.json")
    assert len(bank.classes) == {"digits": 10, "shapes": 120}[dataset]
    with serve(answer) as server:
        one = [*more, "--construct.split=[test]"]
        assert build(server.url, tmp_path / "b.json", *one) == 0
    assert len(load_bank(tmp_path / "b.json").classes) == {"digits": 5, "shapes": 24}[dataset]
    assert all(len(entry.images) == 1 for entry in bank.classes.values())


def test_settings_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("crow\n\ngull\n", encoding="utf-8-sig")
    prompt = tmp_path / "short.txt"
    prompt.write_text("version: short-1\n\nattributes of the {class}?")
    with serve(answer) as server:
        (tmp_path / "build.yaml").write_text(
            f"output: {tmp_path / 'b.json'}\n"
            f"language_model: {{base_url: {server.url}, model: tiny-vl, structured: false}}\n"
            f"construct: {{classes: {tmp_path / 'names.txt'}, candidates_prompt: {prompt}}}\n"
        )
        assert main(["semantics", "build", "--config", str(tmp_path / "build.yaml")]) == 0
    assert server.prompts().count("attributes of the crow?") == 1
    assert not any("response_format" in request for request in server.requests)
    record = load_bank(tmp_path / "b.json").provenance
    assert record["prompts"]["candidates-by-name"]["version"] == "short-1"


def test_classes_that_fail(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusing(request: dict[str, Any], number: int) -> Reply:
        refused = "owl" in prompt_of(request)
        return Reply(None, refusal="Not this bird.") if refused else answer(request, number)

    path = tmp_path / "birds.json"
    with serve(refusing) as server:
        assert build(server.url, path, f"--data.dataset={photos}") == 1
    shown = capsys.readouterr()
    assert "failed      'owl' (candidates): the model refused: 'Not this bird.'" in shown.out
    assert "may help    allow more construct.attempts, change the prompt" in shown.out
    assert "error: 1 of 7 classes failed ('owl'; reasons above); run the same command" in shown.err
    assert "owl" not in load_bank(path).classes
    with serve(answer) as server:
        assert build(server.url, path, f"--data.dataset={photos}") == 0
        assert len(server.requests) == 2
    assert list(load_bank(path).classes) == [*sorted(NAMES), "eagle", "heron"]
    capsys.readouterr()
    with serve(refusing) as server:  # a bank that has the class is not replaced by one without
        assert build(server.url, path, f"--data.dataset={photos}", "--construct.images=0") == 1
    assert "is as it was: it has 1 class(es) that failed now" in capsys.readouterr().out
    assert "owl" in load_bank(path).classes


def test_transformers_back_end(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from dvla_fast.semantics.language_models.base import Answer
    from dvla_fast.semantics.language_models.local import TransformersModel
    from tests.semantics.tiny_models import save_tiny_qwen

    seen = []
    generate = TransformersModel._generate

    def short(self: Any, requests: Any) -> list[Answer]:
        seen.extend(len(request.images) for request in requests)
        from dataclasses import replace

        return generate(self, [replace(request, max_tokens=4) for request in requests])

    monkeypatch.setattr(TransformersModel, "_generate", short)
    model = save_tiny_qwen(tmp_path / "tiny")
    options = ["--language_model.backend=transformers", f"--language_model.model={model}"]
    more = ["--language_model.device_map=cpu", "--construct.images=2", "--construct.attempts=1"]
    assert build("", tmp_path / "b.json", f"--data.dataset={photos}", *options, *more) == 1
    assert seen == [2] * 7
    shown = capsys.readouterr()
    assert "7 of 7 classes failed" in shown.err
    assert shown.out.count("(candidates): the answer") == 7


def test_answers_of_a_file(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers.json"
    stages = ("candidates", "description")
    names = [*NAMES, "eagle", "heron"]
    path.write_text(json.dumps({s: {name: good_answer(s, name) for name in names} for s in stages}))
    options = ["--language_model.backend=files", f"--language_model.answers={path}"]
    assert build("", tmp_path / "b.json", f"--data.dataset={photos}", *options) == 0
    assert "came without a count" not in capsys.readouterr().out


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"--output={tmp_path / 'b.json'}"
    assert "needs --output" in fails([], capsys, 2)
    assert "'gpt' is unknown; choose one of openai, transformers, files" in fails(
        [output, "--language_model.backend=gpt"], capsys, 2
    )
    assert "'first' is unknown; choose one of all, last" in fails(
        [output, "--construct.template=first"], capsys, 2
    )
    message = fails([output, "--construct.top_k=0"], capsys, 2)
    assert "construct.top_k: expected at least 1" in message


def test_bad_input(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    output = f"--output={tmp_path / 'b.json'}"
    assert "no key: set the environment variable OPENAI_API_KEY" in fails([output], capsys)
    server = ["--language_model.base_url=http://127.0.0.1:9/v1", f"--data.dataset={photos}"]
    assert "http://127.0.0.1:9/v1: the server cannot be reached" in fails([output, *server], capsys)
    assert "has no split 'valid'" in fails([output, *server, "--construct.split=[valid]"], capsys)
    assert "cannot read the class names" in fails(
        [output, *server, f"--construct.classes={tmp_path / 'none.txt'}"], capsys
    )
    model = ["--language_model.backend=transformers", f"--language_model.model={tmp_path / 'no'}"]
    assert "no: no such folder" in fails([output, *model, *server], capsys)
    (photos / "test" / "heron" / "heron_0.jpg").write_bytes(b"no image")
    with serve(answer) as running:
        assert build(running.url, tmp_path / "c.json", f"--data.dataset={photos}") == 1
    assert "heron_0.jpg: cannot read this image" in capsys.readouterr().out
    assert len(load_bank(tmp_path / "c.json").classes) == 6


def test_interruption_says_how_to_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bank_build, "construct_bank", interrupted)
    line = fails(
        [f"--output={tmp_path / 'b.json'}", "--language_model.base_url=http://x/v1"], capsys, 130
    )
    assert line == "error: interrupted; the same command continues"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["semantics", "build", "--help"]) == 0
    text = capsys.readouterr().out
    assert "dvla-fast semantics build --data.dataset photos/ --output bank.json" in text
    assert "the same command continues" in text
    assert main(["semantics", "--help"]) == 0
    assert "semantics build" in capsys.readouterr().out
