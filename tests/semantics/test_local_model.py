"""The transformers back end, on randomly initialised models that are saved and loaded as real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvla_fast.errors import LanguageModelError
from dvla_fast.semantics import build_encoder
from dvla_fast.semantics.construct import construct_bank
from dvla_fast.semantics.language_models import local
from dvla_fast.semantics.language_models.base import Answer, Request, ShownImage, answer_all
from dvla_fast.semantics.language_models.local import TransformersModel
from dvla_fast.semantics.stages import ClassSource
from tests.semantics.tiny_models import save_tiny_qwen, save_tiny_text_model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen(tmp_path_factory.mktemp("models") / "tiny-qwen")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_text_model(tmp_path_factory.mktemp("models") / "tiny-text")


@pytest.fixture(scope="module")
def loaded(qwen: Path) -> TransformersModel:
    model = TransformersModel(str(qwen), device_map="cpu", batch_size=3)
    model.check()
    return model


def image(seed: int, height: int = 60) -> ShownImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, 56, 3), dtype=np.uint8)
    return ShownImage(f"image-{seed}", pixels)


def test_several_images_of_one_request_and_batches(loaded: TransformersModel) -> None:
    requests = [
        Request("What is it?", (image(0), image(1, 90)), max_tokens=8),
        Request("And what are the attributes of this?", (image(2),), max_tokens=5),
        Request("Nothing to see", max_tokens=6),
    ]
    together = answer_all(loaded, requests)
    assert [answer.output_tokens for answer in together] == [8, 5, 6]
    assert all(answer.finish == "length" for answer in together)
    prompt_bytes = len("user\nWhat is it?\nassistant\n")
    assert together[0].input_tokens is not None
    # 2 x 2 merged patches for 56 x 56 pixels, 2 x 3 for 90 x 56; six marks around images and turns
    assert together[0].input_tokens == prompt_bytes + 4 + 6 + 4 + 3
    alone = [answer_all(loaded, [request])[0] for request in requests]
    assert together == alone  # padding to the left changes no answer


def test_images_are_seen(loaded: TransformersModel) -> None:
    model = loaded._model
    seen: list[Any] = []
    handle = model.model.visual.register_forward_hook(lambda *a: seen.append(a[1][0].shape))
    answer_all(loaded, [Request("?", (image(0),), max_tokens=2), Request("?", max_tokens=2)])
    handle.remove()
    assert len(seen) == 1


def test_end_of_turn_ends_an_answer(
    loaded: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = loaded._processor.tokenizer
    end = tokenizer.eos_token_id
    words = tokenizer("white face", return_tensors="pt")["input_ids"]

    def generate(**inputs: Any) -> torch.Tensor:
        tail = torch.tensor([[end, tokenizer.pad_token_id]])
        return torch.cat([inputs["input_ids"], words, tail], 1)

    monkeypatch.setattr(loaded._model, "generate", generate)
    (answer,) = answer_all(loaded, [Request("?")])
    assert (answer.text, answer.finish, answer.output_tokens) == ("white face", "stop", 10)


def test_garbage_of_a_random_model_is_reported_class_by_class(
    loaded: TransformersModel, tmp_path: Path
) -> None:
    classes = [ClassSource("Crow", (image(0),)), ClassSource("Gull", (image(1), image(2)))]
    built = construct_bank(
        classes, _short(loaded), build_encoder("hashed-ngram"), tmp_path / "b.json"
    )
    assert built.bank is None
    assert list(built.failures) == ["Crow", "Gull"]
    for failure in built.failures.values():
        assert failure.stage == "candidates"
        assert "the answer" in failure.message
    assert not (tmp_path / "b.json").exists()


def _short(model: TransformersModel) -> Any:
    """The same model, stopped after a few tokens."""

    class Short:
        identity, usage, check = model.identity, model.usage, model.check

        def answers(self, requests: Any) -> Any:
            shorter = [
                Request(r.prompt, r.images, r.stage, r.subject, r.schema, 6) for r in requests
            ]
            return model.answers(shorter)

    return Short()


def test_text_only_model(text_model: Path) -> None:
    model = TransformersModel(str(text_model), device_map="cpu")
    requests = [Request("Hello", max_tokens=4), Request("Look", (image(0),), subject="Crow")]
    found = dict(model.answers(requests))
    assert isinstance(found[0], Answer)
    assert found[0].output_tokens == 4
    assert isinstance(found[1], LanguageModelError)
    assert "text-only model and cannot be shown the images of 'Crow'" in str(found[1])


def test_model_without_a_chat_template(tmp_path: Path) -> None:
    model = TransformersModel(str(save_tiny_text_model(tmp_path, template=False)), device_map="cpu")
    (answer,) = answer_all(model, [Request("Hello", max_tokens=3)])
    assert answer.input_tokens == len("Hello")


def _begins_texts(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tokenizer put a token before every text, as most do."""
    from tokenizers import Tokenizer, processors

    first = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single=f"{first[0]} $A", special_tokens=[first]
    )
    monkeypatch.setattr(tokenizer, "_tokenizer", inner)


def test_a_chat_template_begins_the_text_alone(
    loaded: TransformersModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template writes the first token itself; a second one would change the answer."""
    for template, more in ((True, len("user\n\nassistant\n") + 3), (False, 1)):
        folder = save_tiny_text_model(tmp_path / str(template), template)
        model = TransformersModel(str(folder), device_map="cpu")
        model.check()
        _begins_texts(model._processor, monkeypatch)
        (answer,) = answer_all(model, [Request("Hello", max_tokens=3)])
        assert answer.input_tokens == len("Hello") + more
    requests = [Request("?", (image(0),), max_tokens=2)]
    (before,) = answer_all(loaded, requests)
    _begins_texts(loaded._processor.tokenizer, monkeypatch)
    assert answer_all(loaded, requests) == [before]


def test_sampling_leaves_the_global_generator_alone(text_model: Path) -> None:
    model = TransformersModel(str(text_model), device_map="cpu", temperature=1.0, seed=1)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    answer_all(model, [Request("?", max_tokens=4)])
    assert torch.equal(torch.rand(3), expected)


def test_sampling_repeats_with_its_seed(qwen: Path) -> None:
    def sample(seed: int) -> str:
        model = TransformersModel(str(qwen), device_map="cpu", temperature=1.0, seed=seed)
        return answer_all(model, [Request("?", max_tokens=12)])[0].text

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_device_map_auto(qwen: Path) -> None:
    model = TransformersModel(str(qwen), device_map="auto", dtype="float32")
    assert answer_all(model, [Request("?", (image(0),), max_tokens=2)])[0].output_tokens == 2


def test_model_larger_than_the_memory(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "free_memory", lambda: 100_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loads: list[Any] = []
    monkeypatch.setattr(TransformersModel, "_load", lambda *_: loads.append(1))
    with pytest.raises(LanguageModelError) as caught:
        TransformersModel(str(qwen), device_map="cpu", dtype="float32").check()
    message = str(caught.value)
    assert "does not fit: its weights take 0.0 GB as float32, and 0.0 GB of main memory" in message
    assert "vLLM" in message
    assert loads == []
    monkeypatch.setattr(local, "free_memory", lambda: 10_000_000)
    TransformersModel(str(qwen), device_map="cpu").check()
    assert loads == [1]


def test_memory_that_runs_out_while_answering(
    loaded: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = loaded._model.generate, []

    def generate(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(**inputs)

    monkeypatch.setattr(loaded._model, "generate", generate)
    monkeypatch.setattr(loaded, "batch_size", 4)
    fits = 1
    answers = answer_all(loaded, [Request(f"? {i}", max_tokens=1) for i in range(4)])
    assert len(answers) == 4
    assert sizes == [4, 2, 1, 1, 1, 1]
    fits = 0
    with pytest.raises(LanguageModelError, match=r"does not fit .* fewer or smaller images"):
        answer_all(loaded, [Request("?", max_tokens=1)])


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LanguageModelError, match=r"no-model: no such folder; give --language_mod"):
        TransformersModel(str(tmp_path / "no-model")).check()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LanguageModelError, match=r"cannot load this model"):
        TransformersModel(str(tmp_path)).check()


def test_damaged_weights(tmp_path: Path) -> None:
    folder = save_tiny_text_model(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(LanguageModelError, match="cannot load this model"):
        TransformersModel(str(folder), device_map="cpu").check()


def test_model_that_does_not_write(tmp_path: Path) -> None:
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(LanguageModelError, match=r"this model \(clip\) does not answer in text"):
        TransformersModel(str(tmp_path), device_map="cpu").check()


def test_unknown_dtype() -> None:
    with pytest.raises(LanguageModelError, match="'int3' is unknown; choose auto, bfloat16"):
        TransformersModel(dtype="int3")


def test_unreadable_image_fails_its_own_request(loaded: TransformersModel, tmp_path: Path) -> None:
    bad = ShownImage("bad.jpg", tmp_path / "bad.jpg")
    requests = [Request("?", (shown,), max_tokens=1) for shown in (image(0), bad, image(1))]
    found = dict(loaded.answers(requests))
    assert isinstance(found[0], Answer)
    assert isinstance(found[2], Answer)
    assert "bad.jpg" in str(found[1])


def test_request_that_cannot_be_read_fails_alone(loaded: TransformersModel) -> None:
    strip = ShownImage("strip.png", np.zeros((2, 512, 3), np.uint8))  # refused: 256 to 1
    for bad, reason in (
        (Request("?", (strip,), "candidates", "Eel", max_tokens=1), "aspect ratio"),
        (Request("<|image_pad|>", (image(3),), "candidates", "Eel", max_tokens=1), "image_pad"),
    ):
        good = [Request("?", (image(seed),), max_tokens=1) for seed in (0, 1)]
        found = dict(loaded.answers([good[0], bad, good[1]]))
        assert isinstance(found[0], Answer)
        assert isinstance(found[2], Answer)
        assert isinstance(found[1], LanguageModelError)
        assert str(found[1]).startswith("candidates of 'Eel': ")
        assert reason in str(found[1])
        assert str(found[1]).endswith(f"; images shown: {bad.images[0].id}")


def test_memory_that_runs_out_beside_an_unreadable_request(
    loaded: TransformersModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def generate(**inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loaded._model, "generate", generate)
    bad = ShownImage("bad.jpg", tmp_path / "bad.jpg")
    requests = [Request("?", (shown,), max_tokens=1) for shown in (bad, image(0))]
    with pytest.raises(LanguageModelError, match="does not fit"):
        list(loaded.answers(requests))


def test_length_of_answers_can_be_set(text_model: Path) -> None:
    model = TransformersModel(str(text_model), device_map="cpu", max_tokens=3)
    answers = answer_all(model, [Request("Hello"), Request("Hello", max_tokens=5)])
    assert [answer.output_tokens for answer in answers] == [3, 5]
    assert model.identity["max_tokens"] == 3
    assert "max_tokens" not in TransformersModel(str(text_model)).identity  # as earlier versions
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        TransformersModel(max_tokens=0)


def test_other_weights_in_a_folder_are_another_model(tmp_path: Path) -> None:
    folder = save_tiny_text_model(tmp_path)
    before = TransformersModel(str(folder)).identity
    assert TransformersModel(str(folder)).identity == before
    (folder / "README.md").write_text("no part of the model")
    assert TransformersModel(str(folder)).identity == before
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for place in (len(whole) - 8, len(whole) // 2, len(whole) // 3):
        content = bytearray(whole)
        content[place : place + 8192] = bytes(len(content[place : place + 8192]))
        weights.write_bytes(content)
        assert TransformersModel(str(folder)).identity != before
    weights.write_bytes(whole)
    assert TransformersModel(str(folder)).identity == before
    (folder / "merges.txt").write_text("a b")
    assert TransformersModel(str(folder)).identity != before
    assert "files_sha256" not in TransformersModel("a/name-on-the-hub").identity
