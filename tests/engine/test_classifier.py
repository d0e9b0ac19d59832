"""FewShotClassifier: a checkpoint that learns classes from a few images and classifies others."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dvla_fast
from dvla_fast.cli import main
from dvla_fast.data import load_digits
from dvla_fast.engine.checkpoint import load_checkpoint
from dvla_fast.engine.config import SemanticsConfig
from dvla_fast.engine.evaluate import load_model
from dvla_fast.engine.modes import evaluating
from dvla_fast.engine.settings import UsageError
from dvla_fast.engine.texts import encode_texts
from dvla_fast.errors import BankError, CheckpointError, DataError
from dvla_fast.nn.dvla import TEXT_SCOPES
from dvla_fast.semantics import SemanticBank
from dvla_fast.semantics.encoders import encoder_identity
from tests.engine.conftest import MEAN, STD

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")

TEXTS = {
    "jay": {"attributes": ["blue wings", "a crest"], "description": "A loud blue bird."},
    "wren": {"attributes": ["a short tail"], "description": "A small brown bird."},
    "crow": {"attributes": ["black all over"], "description": "A large black bird."},
}
BANK = SemanticBank.from_dict({"classes": TEXTS})


def pictures(count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(count)]


SUPPORTS = {"jay": pictures(2, 0), "wren": pictures(1, 1), "crow": pictures(3, 2)}


@pytest.mark.parametrize("kind", ["pretrain", "metatune"])
def test_loaded_models_keep_channels_last(make_checkpoint: Callable, kind: str) -> None:
    """On CPUs, where convolutions are faster so."""
    path = make_checkpoint(kind, channels=1)
    loaded = [
        dvla_fast.FewShotClassifier.load(path, "cpu").model.backbone,
        load_model(str(path), load_digits())[1],
    ]
    for backbone in loaded:
        kernels = [weights for weights in backbone.parameters() if weights.dim() == 4]
        assert kernels
        for weights in kernels:
            assert weights.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_says_what_the_model_says(make_checkpoint: Callable, text_scope: str) -> None:
    path = make_checkpoint(text_scope=text_scope)
    classifier = dvla_fast.FewShotClassifier.load(path, "cpu").learn(SUPPORTS, BANK)
    queries = pictures(5, 3)
    got = classifier.classify(queries, batch=2)

    def prepare(images: list[np.ndarray]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        return ((pixels - mean) / std)[None]

    supports = prepare([image for group in SUPPORTS.values() for image in group])
    labels = torch.tensor([[0, 0, 1, 2, 2, 2]])
    known = classifier._learned
    assert known is not None
    with torch.inference_mode():
        expected = classifier.model(
            supports, labels, prepare(queries), known.text, way=3, sample=False
        ).logits[0]
        plain = classifier.model(supports, labels, prepare(queries), way=3).logits[0]
    torch.testing.assert_close(got.probabilities, expected.softmax(-1), rtol=1e-4, atol=1e-5)
    assert got.class_names == ("jay", "wren", "crow")
    assert got.predicted == [got.class_names[i] for i in expected.argmax(1).tolist()]
    assert not torch.allclose(expected, plain, atol=1e-4)  # the texts count


@pytest.mark.parametrize("kind", ["metatune", "pretrain"])
def test_all_weights_are_those_of_the_file(make_checkpoint: Callable, kind: str) -> None:
    path = make_checkpoint(kind)
    torch.manual_seed(7)  # not the one that the file was made with
    found = dvla_fast.FewShotClassifier.load(path, "cpu").model.state_dict()
    of_backbone = "model." if kind == "metatune" else "model.backbone."
    stored = {
        name.removeprefix("model."): tensor
        for name, tensor in load_checkpoint(path)[0].items()
        if name.startswith(of_backbone)
    }
    compared = {name for name in found if kind == "metatune" or name.startswith("backbone.")}
    assert compared == stored.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize(("text_scope", "sizes"), [("episode", [6, 6]), ("candidate", [2] * 6)])
def test_images_of_a_pass(
    make_checkpoint: Callable, monkeypatch: pytest.MonkeyPatch, text_scope: str, sizes: list[int]
) -> None:
    path = make_checkpoint(text_scope=text_scope)
    classifier = dvla_fast.FewShotClassifier.load(path, "cpu").learn(SUPPORTS, BANK)
    seen: list[int] = []
    compute = classifier.model.query_logits

    def query_logits(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(arguments[2].shape[1])
        return compute(*arguments, **options)

    monkeypatch.setattr(classifier.model, "query_logits", query_logits)
    assert len(classifier.classify(pictures(12, 9), 6).predicted) == 12
    assert seen == sizes


def test_failing_to_learn_changes_nothing(make_checkpoint: Callable, tmp_path: Path) -> None:
    classifier = dvla_fast.FewShotClassifier.load(make_checkpoint(), "cpu").learn(SUPPORTS, BANK)
    before = classifier.classify(pictures(5, 3))
    with pytest.raises(DataError, match="missing"):
        classifier.learn({"jay": pictures(4, 5), "wren": [tmp_path / "missing.png"]}, BANK)
    after = classifier.classify(pictures(5, 3))
    assert after.class_names == before.class_names
    assert torch.equal(after.probabilities, before.probabilities)


def test_documented_example(
    make_checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    (code,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    checkpoints = tmp_path / "runs/tuned/checkpoints"
    checkpoints.mkdir(parents=True)
    make_checkpoint().rename(checkpoints / "metatune-best.safetensors")
    for name, images in SUPPORTS.items():
        (tmp_path / "birds" / name).mkdir(parents=True)
        Image.fromarray(images[0]).save(tmp_path / "birds" / name / "0.png")
    Image.fromarray(SUPPORTS["jay"][0]).save(tmp_path / "query.jpg")
    (tmp_path / "birds.json").write_text(json.dumps({"classes": TEXTS}))
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(compile(code, "evaluation.md", "exec"), variables)
    assert variables["result"].predicted == ["jay"]


def test_files_folders_and_pillow_images(make_checkpoint: Callable, tmp_path: Path) -> None:
    root = tmp_path / "birds"
    for name, images in SUPPORTS.items():
        (root / name).mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(root / name / f"{number}.png")
    (root / "crow" / "notes.txt").write_text("no image")
    classifier = dvla_fast.FewShotClassifier.load(make_checkpoint(), "cpu").learn(root, BANK)
    query = pictures(1, 9)[0]
    Image.fromarray(query).save(tmp_path / "query.png")
    got = classifier.classify([tmp_path / "query.png", query, Image.fromarray(query)])
    assert got.class_names == ("crow", "jay", "wren")
    assert torch.equal(got.probabilities[0], got.probabilities[1])
    assert torch.equal(got.probabilities[0], got.probabilities[2])
    torch.testing.assert_close(got.probabilities.sum(1), torch.ones(3))


def test_photographs_are_turned_upright(make_checkpoint: Callable, tmp_path: Path) -> None:
    classifier = dvla_fast.FewShotClassifier.load(make_checkpoint(), "cpu").learn(SUPPORTS, BANK)
    upright = np.full((20, 12, 3), 255, np.uint8)
    upright[:10, :6] = (200, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to see it upright
    lying = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    lying.save(tmp_path / "lying.png", exif=exif)
    images = [upright, tmp_path / "lying.png", Image.open(tmp_path / "lying.png"), lying]
    answers = classifier.classify(images).probabilities
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], answers[3])


def test_arrays_are_read_as_files_are(make_checkpoint: Callable, tmp_path: Path) -> None:
    classifier = dvla_fast.FewShotClassifier.load(make_checkpoint(), "cpu").learn(SUPPORTS, BANK)
    grey = pictures(1, 4)[0][..., 0]
    deep = grey.astype(np.uint16) * 257
    alpha = np.dstack([grey, grey, grey, grey // 2])
    Image.fromarray(deep).save(tmp_path / "deep.png")
    images = [grey, deep, Image.fromarray(deep), tmp_path / "deep.png", alpha]
    answers = classifier.classify(images).probabilities
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    many = np.stack(pictures(3, 5))  # (N, H, W, 3): a sequence of images, too
    assert classifier.classify(many).predicted == classifier.classify(list(many)).predicted


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(3, 16, 16), TypeError, "a file, an array or a Pillow image, got Tensor"),
        (None, TypeError, "got NoneType"),
        ([[0, 1], [2, 3]], TypeError, "got list"),
        (np.zeros((3, 16, 16), np.uint8), DataError, r"channels last, .*got uint8 \(3, 16, 16\)"),
        (np.zeros((0, 16, 3), np.uint8), DataError, r"got uint8 \(0, 16, 3\)"),
        (np.zeros((16, 16, 3), np.uint16), DataError, r"got uint16 \(16, 16, 3\)"),
        (np.zeros(16, np.uint8), DataError, r"got uint8 \(16,\)"),
        (Image.new("F", (16, 16)), DataError, "holds floating-point values"),
    ],
)
def test_what_is_no_image(
    make_checkpoint: Callable, image: Any, error: type[Exception], message: str
) -> None:
    classifier = dvla_fast.FewShotClassifier.load(make_checkpoint(), "cpu").learn(SUPPORTS, BANK)
    with pytest.raises(error, match=f"^image: .*{message}"):
        classifier.classify([image])
    with pytest.raises(error, match=f"^image: .*{message}"):
        classifier.learn({**SUPPORTS, "owl": [image]})


@pytest.mark.parametrize(
    "images",
    [
        "x.jpg", Path("x.jpg"), b"x", None, {"a": 1}, torch.zeros(2, 3, 16, 16),
        Image.new("RGB", (9, 9)), np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8),
    ],
)  # fmt: skip
def test_one_image_is_no_list(make_checkpoint: Callable, images: Any) -> None:
    classifier = dvla_fast.FewShotClassifier.load(make_checkpoint(), "cpu").learn(SUPPORTS, BANK)
    form = f"expected a list of images, got {type(images).__name__}; put a single image into a list"
    with pytest.raises(TypeError, match=f"classify: images: {form}"):
        classifier.classify(images)
    with pytest.raises(TypeError, match=f"supports: images of 'owl': {form}"):
        classifier.learn({**SUPPORTS, "owl": images})


def test_supports_without_names(make_checkpoint: Callable) -> None:
    classifier = dvla_fast.FewShotClassifier.load(make_checkpoint(), "cpu")
    with pytest.raises(TypeError, match="expected class names with lists of images, or a folder"):
        classifier.learn(pictures(3, 0))  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
def test_pretrained_backbone_without_texts(make_checkpoint: Callable, channels: int) -> None:
    path = make_checkpoint("pretrain", channels=channels)
    classifier = dvla_fast.FewShotClassifier.load(path, "cpu").learn(SUPPORTS)
    # A class's only support is nearer to its own prototype than to any other.
    assert classifier.classify(SUPPORTS["wren"]).predicted == ["wren"]
    with pytest.raises(CheckpointError, match="no trained gates"):
        classifier.learn(SUPPORTS, BANK)


def test_text_encoder_of_a_local_file(make_checkpoint: Callable, tiny_open_clip: str) -> None:
    """A checkpoint knows the content of its encoder's weights, and not where they lie."""
    path = make_checkpoint(encoder=encoder_identity(tiny_open_clip), text_dim=10)
    classifier = dvla_fast.FewShotClassifier.load(path, "cpu")
    with pytest.raises(BankError, match=r"sha256-.*known by their content only; name that file"):
        classifier.learn(SUPPORTS, BANK)
    with pytest.raises(CheckpointError, match="not 'hashed-ngram'; give the text encoder"):
        classifier.learn(SUPPORTS, BANK, encoder="hashed-ngram")
    assert classifier.class_names == ()
    classifier.learn(SUPPORTS, BANK, encoder=tiny_open_clip)
    assert classifier.classify(pictures(1, 3)).probabilities.shape == (1, 3)


@pytest.mark.parametrize("local", ["tiny_open_clip", "tiny_open_clip_folder", "tiny_clip"])
def test_vectors_beside_the_bank_take_the_place_of_a_local_encoder(
    make_checkpoint: Callable, tmp_path: Path, local: str, request: pytest.FixtureRequest
) -> None:
    name = str(request.getfixturevalue(local))
    name = name if name.startswith("open_clip:") else f"transformers:{name}"
    path = make_checkpoint(encoder=encoder_identity(name), text_dim=10)
    bank = tmp_path / "birds.json"
    bank.write_text(json.dumps({"classes": TEXTS}))
    assert main(["semantics", "encode", str(bank), f"--encoder={name}"]) == 0
    classifier = dvla_fast.FewShotClassifier.load(path, "cpu")
    expected = classifier.learn(SUPPORTS, BANK, encoder=name).classify(pictures(1, 3))
    found = classifier.learn(SUPPORTS, bank).classify(pictures(1, 3))
    torch.testing.assert_close(found.probabilities, expected.probabilities)


def test_long_texts_are_cut_where_training_allowed_it(make_checkpoint: Callable) -> None:
    long = {name: {**texts, "description": "bird " * 78} for name, texts in TEXTS.items()}
    bank = SemanticBank.from_dict({"classes": long})
    strict = dvla_fast.FewShotClassifier.load(make_checkpoint(), "cpu")
    with pytest.raises(BankError, match="longer than the 77 words"):
        strict.learn(SUPPORTS, bank)
    config, device = SemanticsConfig(truncate=True), torch.device("cpu")
    described = encode_texts(config, BANK, list(TEXTS), device)[1]  # what training notes
    path = make_checkpoint(truncate=described["truncate"])
    classifier = dvla_fast.FewShotClassifier.load(path, "cpu")
    with pytest.warns(UserWarning, match="the rest of each is ignored"):
        classifier.learn(SUPPORTS, bank)
    cut = {name: {**texts, "description": "bird " * 77} for name, texts in TEXTS.items()}
    expected = strict.learn(SUPPORTS, SemanticBank.from_dict({"classes": cut}))
    got, wanted = (model.classify(pictures(1, 3)) for model in (classifier, expected))
    assert torch.equal(got.probabilities, wanted.probabilities)


def test_the_control_with_wrong_texts_says_so(make_checkpoint: Callable) -> None:
    control = dvla_fast.FewShotClassifier.load(make_checkpoint(parts="shuffled"), "cpu")
    with pytest.warns(UserWarning, match="control .* trained on purpose .* its own texts") as told:
        got = control.learn(SUPPORTS, BANK).classify(pictures(1, 3))
    assert told[0].filename == __file__
    plain = dvla_fast.FewShotClassifier.load(make_checkpoint(), "cpu").learn(SUPPORTS, BANK)
    assert torch.equal(got.probabilities, plain.classify(pictures(1, 3)).probabilities)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        control.learn(SUPPORTS)  # reads no texts


def test_a_device_by_name_or_as_one(make_checkpoint: Callable) -> None:
    path = make_checkpoint()
    for device in (torch.device("cpu"), torch.device("cpu", 0)):
        assert dvla_fast.FewShotClassifier.load(path, device).device.type == "cpu"
    with pytest.raises(UsageError, match="device 'meta' is unknown; choose cpu"):
        dvla_fast.FewShotClassifier.load(path, torch.device("meta"))
    with pytest.raises(TypeError, match=r"device: expected cpu, .* or a torch\.device, got int"):
        dvla_fast.FewShotClassifier.load(path, 0)  # type: ignore[arg-type]


def test_wrong_inputs(make_checkpoint: Callable, tmp_path: Path) -> None:
    classifier = dvla_fast.FewShotClassifier.load(make_checkpoint(), "cpu")
    with pytest.raises(ValueError, match="learn"):
        classifier.classify(pictures(1, 0))
    with pytest.raises(DataError, match="no image of 'wren'"):
        classifier.learn({"jay": pictures(1, 0), "wren": []})
    with pytest.raises(DataError, match="at least two"):
        classifier.learn({"jay": pictures(1, 0)})
    with pytest.raises(DataError, match="no such folder"):
        classifier.learn(tmp_path / "nowhere")
    with pytest.raises(BankError, match=r"lacks 1 class\(es\) of the supports: 'owl'; give a"):
        classifier.learn({"owl": pictures(1, 0), "jay": pictures(1, 1)}, BANK)
    classifier.learn(SUPPORTS, BANK)
    with pytest.raises(ValueError, match="no images were given"):
        classifier.classify([])
    with pytest.raises(ValueError, match="batch: expected 1 or more images, got 0"):
        classifier.classify(pictures(1, 0), batch=0)
    with pytest.raises(TypeError, match=r"classify: batch: expected a whole number, got 1\.5"):
        classifier.classify(pictures(1, 0), batch=1.5)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="uint8"):
        classifier.classify([np.zeros((16, 16, 3))])
    with pytest.raises(DataError, match="no such file"):
        classifier.classify([tmp_path / "nowhere.png"])


@pytest.mark.parametrize("text_scope", TEXT_SCOPES)
def test_the_models_mode_changes_nothing(make_checkpoint: Callable, text_scope: str) -> None:
    """A model of a training loop: batches are not normalised by their own statistics here."""
    path = make_checkpoint(text_scope=text_scope)
    classifier = dvla_fast.FewShotClassifier.load(path, "cpu").learn(SUPPORTS, BANK)
    queries = pictures(4, 9)
    expected = classifier.classify(queries).probabilities
    before = {key: value.clone() for key, value in classifier.model.state_dict().items()}
    classifier.model.train()
    frozen = next(part for part in classifier.model.modules() if not list(part.children()))
    frozen.eval()
    got = classifier.learn(SUPPORTS, BANK).classify(queries)
    torch.testing.assert_close(got.probabilities, expected)
    assert classifier.model.training
    assert not frozen.training
    for key, value in classifier.model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_classes_learned_while_others_are_classified(make_checkpoint: Callable) -> None:
    """What a call began with is what it answers with."""
    classifier = dvla_fast.FewShotClassifier.load(make_checkpoint(), "cpu").learn(SUPPORTS, BANK)
    queries = pictures(3, 4)
    expected = classifier.classify(queries)
    read, calls = classifier._read, []

    def learns_between(images: Any) -> torch.Tensor:
        if not calls:
            calls.append(images)
            classifier.learn({"owl": pictures(1, 7), "jay": pictures(1, 8)})
        return read(images)

    classifier._read = learns_between  # type: ignore[method-assign]
    got = classifier.classify(queries, batch=1)
    assert got.class_names == expected.class_names
    torch.testing.assert_close(got.probabilities, expected.probabilities)
    assert classifier.class_names == ("owl", "jay")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_dtype(make_checkpoint: Callable, dtype: torch.dtype) -> None:
    loaded = dvla_fast.FewShotClassifier.load(make_checkpoint(), "cpu")
    expected = loaded.learn(SUPPORTS, BANK).classify(pictures(2, 3))
    again = dvla_fast.FewShotClassifier(loaded.model.to(dtype), loaded.description)
    got = again.learn(SUPPORTS, BANK).classify(pictures(2, 3))
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(got.probabilities, expected.probabilities, atol=tolerance, rtol=0)


def test_a_description_that_lacks_its_entries(make_checkpoint: Callable) -> None:
    model = dvla_fast.FewShotClassifier.load(make_checkpoint(), "cpu").model
    with pytest.raises(ValueError, match="description: lacks 'model'"):
        dvla_fast.FewShotClassifier(model, {})


def test_calls_that_overlap_leave_the_mode_to_the_last(make_checkpoint: Callable) -> None:
    classifier = dvla_fast.FewShotClassifier.load(make_checkpoint(), "cpu").learn(SUPPORTS, BANK)
    model = classifier.model.train()
    first, second = evaluating(model), evaluating(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())  # the second still works
    second.__exit__(None, None, None)
    assert all(module.training for module in model.modules())
    for one, other in ((model.backbone, model), (model, model.backbone)):
        first, second = evaluating(one), evaluating(other)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not any(module.training for module in model.backbone.modules())
        second.__exit__(None, None, None)
        assert all(module.training for module in model.modules())
