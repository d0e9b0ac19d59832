"""Tiny text encoders with random weights, saved as the libraries save theirs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ["a", "photo", "of", "red", "blue", "beak", "wing", "bird", "which", "has", ",", "."]


def _tokenizer(folder: Path, length: int, post: str = "") -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<start>", "<end>"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single=post or "<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=length,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers CLIP with both towers; its texts have 12 tokens at most, and 10 dimensions."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 2
    text = {**tower, "vocab_size": 16, "max_position_embeddings": 12, "eos_token_id": 3}
    text |= {"bos_token_id": 2, "pad_token_id": 0, "projection_dim": 10}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
    CLIPModel(config).save_pretrained(folder)
    _tokenizer(folder, 12)
    return folder


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers SigLIP with both towers."""
    from transformers import SiglipConfig, SiglipModel

    folder = tmp_path_factory.mktemp("siglip")
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 2
    text = {**tower, "vocab_size": 16, "max_position_embeddings": 9, "projection_size": 8}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    config = SiglipConfig(text_config=text, vision_config=vision)
    SiglipModel(config).save_pretrained(folder)
    _tokenizer(folder, 9, post="$A <end>")
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT saved as a sentence encoder that takes the first token, of 6 tokens at most."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=20, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    _tokenizer(folder, 20)
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture(scope="session")
def tiny_open_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of an encoder: a tiny open_clip model with its weights in a file, 10 dimensions."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 10,
        "vision_cfg": {
            "image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8,
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1,
        },
    }  # fmt: skip
    (folder / "dvla-fast-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "dvla-fast-tiny.json")
    torch.manual_seed(0)
    save_file(open_clip.create_model("dvla-fast-tiny").state_dict(), folder / "tiny.safetensors")
    return f"open_clip:dvla-fast-tiny/{folder / 'tiny.safetensors'}"


@pytest.fixture(scope="session")
def tiny_open_clip_folder(tiny_open_clip: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of the same encoder, in a folder of its own."""
    weights = Path(tiny_open_clip.partition("/")[2])
    folder = tmp_path_factory.mktemp("local")
    shutil.copy(weights, folder / "open_clip_model.safetensors")
    config = json.loads((weights.parent / "dvla-fast-tiny.json").read_text())
    description = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    return f"open_clip:local-dir:{folder}"
