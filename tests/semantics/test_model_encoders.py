"""Text towers of open_clip and transformers: the libraries' own numbers, pooled as they define."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dvla_fast.errors import BankError, MissingDependencyError
from dvla_fast.semantics import build_encoder
from dvla_fast.semantics.encoders import encoder_identity

TEXTS = ["a red beak", "a photo of a bird , which has blue wing", "bird"]


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def test_open_clip_gives_the_text_features(tiny_open_clip: str) -> None:
    import open_clip

    encoder = build_encoder(tiny_open_clip, batch_size=2)
    weights = tiny_open_clip.partition("/")[2]
    model = open_clip.create_model("dvla-fast-tiny", pretrained=weights).eval()
    tokens = open_clip.get_tokenizer("dvla-fast-tiny")(TEXTS)
    vectors = encoder.encode(TEXTS)
    torch.testing.assert_close(vectors, model.encode_text(tokens, normalize=True).detach())
    assert (encoder.dim, vectors.dtype, vectors.requires_grad) == (10, torch.float32, False)
    assert encoder.encode([]).shape == (0, 10)


def test_open_clip_truncation_is_refused_or_counted(tiny_open_clip: str) -> None:
    long = " ".join(["albatross"] * 90)
    with pytest.raises(BankError, match=r"1 of 2 texts are longer than the 77 tokens"):
        build_encoder(tiny_open_clip).encode(["bird", long])
    encoder = build_encoder(tiny_open_clip, truncate=True)
    with pytest.warns(UserWarning, match="the rest of each is ignored"):
        encoder.encode(["bird", long])
    assert encoder.truncated == 1


def test_openai_weights_get_their_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    # open_clip only warns when a tag was trained with another activation than its configuration's.
    import open_clip

    asked: dict[str, bool] = {}

    def record(model: str, pretrained: str, force_quick_gelu: bool, **_: Any) -> None:
        asked[pretrained] = force_quick_gelu
        raise RuntimeError("no network here")

    monkeypatch.setattr(open_clip, "create_model", record)
    for tag in ("openai", "laion2b_s34b_b88k"):
        with pytest.raises(BankError, match=rf"open_clip:ViT-B-16/{tag}: cannot be loaded"):
            build_encoder(f"open_clip:ViT-B-16/{tag}")
    assert asked == {"openai": True, "laion2b_s34b_b88k": False}


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_transformers_clip_gives_the_text_features(tiny_clip: Path, batch_size: int) -> None:
    from transformers import AutoTokenizer, CLIPModel

    encoder = build_encoder(f"transformers:{tiny_clip}", batch_size=batch_size)
    tokens = AutoTokenizer.from_pretrained(tiny_clip)(TEXTS, padding=True, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    expected = CLIPModel.from_pretrained(tiny_clip).get_text_features(**tokens).pooler_output
    torch.testing.assert_close(encoder.encode(TEXTS), unit(expected.detach()))
    assert encoder.dim == 10


def test_clip_text_model_alone_keeps_its_projection(tiny_clip: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    CLIPTextModelWithProjection.from_pretrained(tiny_clip).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_clip).save_pretrained(tmp_path)
    both = build_encoder(f"transformers:{tiny_clip}").encode(TEXTS)
    torch.testing.assert_close(build_encoder(f"transformers:{tmp_path}").encode(TEXTS), both)


def test_siglip_pads_to_its_full_length(tiny_siglip: Path) -> None:
    from transformers import AutoTokenizer, SiglipModel

    texts = ["a red beak", "bird"]
    encoder = build_encoder(f"transformers:{tiny_siglip}")
    ids = AutoTokenizer.from_pretrained(tiny_siglip)(
        texts, padding="max_length", max_length=9, return_tensors="pt"
    )["input_ids"]
    model = SiglipModel.from_pretrained(tiny_siglip)
    expected = model.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(encoder.encode(texts), unit(expected.detach()))


@pytest.mark.parametrize("mode", ["cls_token", "mean_tokens", "lasttoken", None])
def test_sentence_encoder_pools_as_its_files_say(
    tiny_bert: Path, tmp_path: Path, mode: str | None
) -> None:
    from transformers import AutoTokenizer, BertModel

    folder = tmp_path / "bert"
    shutil.copytree(tiny_bert, folder)
    if mode is None:
        shutil.rmtree(folder / "1_Pooling")
    else:
        settings = {"word_embedding_dimension": 8, f"pooling_mode_{mode}": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    texts = ["a red beak", "bird"]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    hidden = BertModel.from_pretrained(folder).eval()(
        input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
    )[0]
    count = tokens["attention_mask"].sum(1).tolist()
    assert count == [5, 3]
    expected = {
        "cls_token": hidden[:, 0],
        "lasttoken": torch.stack([hidden[0, 4], hidden[1, 2]]),
        "mean_tokens": torch.stack([hidden[0, :5].mean(0), hidden[1, :3].mean(0)]),
    }[mode or "mean_tokens"]
    encoder = build_encoder(f"transformers:{folder}")
    torch.testing.assert_close(encoder.encode(texts), unit(expected.detach()))


def test_sentence_encoder_reads_as_far_as_its_files_say(tiny_bert: Path) -> None:
    encoder = build_encoder(f"transformers:{tiny_bert}")
    encoder.encode(["a red red beak"])
    with pytest.raises(BankError, match="longer than the 6 tokens"):
        encoder.encode(["a red red red beak"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "layers after its pool"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by pooling_mode_max"),
    ],
)
def test_unsupported_sentence_encoder(
    tiny_bert: Path, tmp_path: Path, name: str, content: object, message: str
) -> None:
    shutil.copytree(tiny_bert, tmp_path / "bert")
    (tmp_path / "bert" / name).write_text(json.dumps(content))
    with pytest.raises(BankError, match=message):
        build_encoder(f"transformers:{tmp_path / 'bert'}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-16", r"unknown; choose one of hashed-ngram, open_clip:MODEL/WEIGHTS"),
        ("open_clip:ViT-B-61/openai", r"no model 'ViT-B-61'; near: .*ViT-B-16"),
        ("open_clip:ViT-B-16/none.safetensors", r"none\.safetensors: no such file"),
        ("transformers:/no/such/folder", r"/no/such/folder: no such file or folder"),
        ("transformers:no/such/folder", r"no/such/folder: no such file or folder"),
        ("open_clip:local-dir:none", r"none: no such file or folder"),
        ("transformers:", "unknown; choose one of"),
        ("open_clip:local-dir:", "unknown; choose one of"),
        ("hashed-ngram:64", "unknown; choose one of"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(BankError, match=message):
        build_encoder(name)


def test_damaged_weights(tmp_path: Path, tiny_clip: Path, tiny_open_clip: str) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    with pytest.raises(BankError, match="cannot be loaded"):
        build_encoder(f"open_clip:dvla-fast-tiny/{tmp_path / 'broken.safetensors'}")
    shutil.copytree(tiny_clip, tmp_path / "clip")
    (tmp_path / "clip" / "config.json").write_text("{}")
    with pytest.raises(BankError, match="cannot be loaded"):
        build_encoder(f"transformers:{tmp_path / 'clip'}")


def test_weights_that_are_not_there_are_not_made_up(tiny_clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_clip, tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    name = next(key for key in weights if "text_model" in key and "fc1.weight" in key)
    kept = {key: tensor for key, tensor in weights.items() if key != name}
    save_file(kept, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BankError, match=r"lack 1 tensor.*fc1\.weight"):
        build_encoder(f"transformers:{tmp_path / 'clip'}")


def test_another_width_is_named(tiny_open_clip: str) -> None:
    with pytest.raises(BankError, match=r"vectors of length 10, but semantics\.dim asks for 512"):
        build_encoder(tiny_open_clip, 512)
    assert build_encoder(tiny_open_clip, 10).dim == 10


def test_identity_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    first = encoder_identity(f"open_clip:ViT-B-16/{path}")
    assert first.startswith("open_clip:ViT-B-16/sha256-")
    path.rename(tmp_path / "other.bin")
    assert encoder_identity(f"open_clip:ViT-B-16/{tmp_path / 'other.bin'}") == first
    (tmp_path / "other.bin").write_bytes(b"two")
    assert encoder_identity(f"open_clip:ViT-B-16/{tmp_path / 'other.bin'}") != first
    for name in (
        "transformers:BAAI/bge-base-en-v1.5",
        "open_clip:ViT-B-16/openai",
        "open_clip:hf-hub:timm/ViT-B-16-SigLIP2",
    ):
        assert encoder_identity(name) == name
    assert encoder_identity("hashed-ngram", 64) != encoder_identity("hashed-ngram")


@pytest.mark.parametrize("package", ["open_clip", "transformers"])
def test_missing_package_names_the_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, tiny_clip: Path, tiny_open_clip: str
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    name = tiny_open_clip if package == "open_clip" else f"transformers:{tiny_clip}"
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'dvla-fast\[semantics\]'"):
        build_encoder(name)
