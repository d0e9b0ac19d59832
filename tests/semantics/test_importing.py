"""Published vectors become banks: unit norm, readable class names, nothing run from a pickle."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dvla_fast.cli import main
from dvla_fast.engine.config import SemanticsConfig
from dvla_fast.engine.texts import build_texts
from dvla_fast.errors import BankError
from dvla_fast.semantics import HashedNGramEncoder, encode_bank, load_bank
from dvla_fast.semantics.importing import read_published, save_published
from dvla_fast.semantics.vectors import read_stored

PEER_DATA = Path(__file__).parents[3] / "shared" / "peer-data"
needs_peer_data = pytest.mark.skipif(not PEER_DATA.is_dir(), reason="no published caches here")


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def features(*keys: str, dim: int = 6, count: int = 0, dtype: Any = torch.float32) -> dict:
    shape = (count, dim) if count else (dim,)
    return {key: (5 * torch.randn(shape)).to(dtype) for key in keys}


def assert_unit(vectors: torch.Tensor) -> None:
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))


def test_descriptions_and_attributes_of_two_files(tmp_path: Path) -> None:
    first = save(tmp_path / "s.pth", {"semantic_feature": features("owl", "jay")})
    second = save(tmp_path / "a.pth", {"attribute_features": features("jay", "wren", count=3)})
    bank = save_published(read_published([first, second]), tmp_path / "birds.json")
    again = load_bank(tmp_path / "birds.json")
    assert (again.classes, again.vectors) == (bank.classes, bank.vectors)
    assert again.fingerprint() == bank.fingerprint() != ""
    raw = torch.load(second)["attribute_features"]["jay"]
    texts = encode_bank(again, ["jay", "wren", "owl"], HashedNGramEncoder())
    assert texts.mask.tolist() == [[True] * 4, [True] * 3 + [False], [False] * 3 + [True]]
    torch.testing.assert_close(texts.tokens[0, :3], torch.nn.functional.normalize(raw, dim=1))
    assert texts.levels.tolist() == [0, 0, 0, 1]
    assert_unit(texts.tokens[texts.mask])
    assert_unit(texts.class_embedding)


def test_one_level_of_two_files_is_refused(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{x}.pth", {"semantic_feature": features(x)}) for x in ("owl", "jay")]
    with pytest.raises(
        BankError, match=r"jay\.pth: holds descriptions again; give one file for ea"
    ):
        read_published(paths)


def test_the_lengths_of_vectors_are_told(tmp_path: Path) -> None:
    vectors = {"owl": torch.tensor([0.0, 3.0]), "jay": torch.tensor([-4.0, 3.0])}
    assert read_published([save(tmp_path / "s.pth", {"semantic_feature": vectors})]).norms == (3, 5)


def test_two_files_of_one_name_are_both_on_record(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
    first = save(tmp_path / "a" / "cub.pth", {"semantic_feature": features("owl")})
    second = save(tmp_path / "b" / "cub.pth", {"attribute_features": features("owl", count=3)})
    digests = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in (("cub.pth", first), (str(second), second))
    }
    assert read_published([first, second]).files == digests


def test_levels_of_one_class_are_one_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys of two files may differ in case; a class without attributes is told."""
    first = save(tmp_path / "s.pth", {"semantic_feature": features("owl", "blue_jay", "wren")})
    second = save(tmp_path / "a.pth", {"attribute_features": features("Blue Jay", "owl", count=3)})
    output = tmp_path / "birds.json"
    assert main(["semantics", "import", str(first), f"--attributes={second}",
                 f"--output={output}"]) == 0  # fmt: skip
    text = capsys.readouterr().out
    assert "3 classes" in text
    assert "no attributes1 classes: wren" in text.replace("  ", "")
    stored = {name: entry.stored for name, entry in load_bank(output).classes.items()}
    assert stored == {"owl": (3, 1), "blue_jay": (3, 1), "wren": (0, 1)}
    assert main(["semantics", "check", str(output)]) == 0
    assert "note: 'wren' has no attributes" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--splits=cifar_fs"]], ids=["found", "named"])
@pytest.mark.parametrize("spelled", [str.upper, lambda key: key.replace("_", " ")])
def test_classes_of_a_split_list_in_any_spelling(
    spelled: Any, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dvla_fast.data import load_split_list

    keys = sorted(load_split_list("cifar_fs").keys)
    path = save(tmp_path / "s.pth", {"semantic_feature": features(*map(spelled, keys[1:]))})
    arguments = ["semantics", "import", str(path), f"--output={tmp_path / 'c.json'}", *options]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "split list  c" in text
    assert "1 of 64 train classes: apple" in text
    assert text.count("missing") == 1
    assert "unknown" not in text


def test_a_file_with_the_names_of_classes_finds_their_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dvla_fast.data import load_split_list
    from dvla_fast.data.splits import class_names

    known = load_split_list("miniimagenet_ravi")
    names = class_names(sorted(known.keys), known)
    path = save(tmp_path / "s.pth", {"semantic_feature": features(*names)})
    assert main(["semantics", "import", str(path), f"--output={tmp_path / 'm.json'}"]) == 0
    text = capsys.readouterr().out
    assert "split list  miniimagenet" in text
    assert "missing" not in text
    assert "unknown" not in text


def test_half_precision_and_other_lengths(tmp_path: Path) -> None:
    content = {"semantic_feature": features("owl", dim=768, dtype=torch.float16)}
    bank = save_published(read_published([save(tmp_path / "x.pth", content)]), tmp_path / "b.json")
    assert bank.vectors is not None
    assert (bank.vectors.dim, bank.vectors.encoder) == (768, "imported/768")
    assert_unit(read_stored(bank)["owl"].description)


def test_banks_of_the_journal_extension(tmp_path: Path) -> None:
    part = {"local": torch.randn(4, 6), "global": torch.randn(1, 6)}
    entry = {"name": "owl", "intrinsic": part, "nuisance": {"local": torch.randn(2, 6)}}
    meta = {"generator": "a model", "text_encoder": "ViT-B/16", "images_per_class": 5}
    content = {"text_dim": 6, "classes": {"owl": entry}, "meta": meta}
    published = read_published([save(tmp_path / "x.pth", content)])
    assert published.encoder == "imported/ViT-B/16"
    assert published.meta == meta
    content["meta"] = {**meta, "loss": float("nan")}  # JSON has no NaN
    assert read_published([save(tmp_path / "y.pth", content)]).meta == meta
    assert [len(each) for each in published.classes["owl"]] == [4, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], r"holds a list; expected"),
        ({"weights": {}}, r"has the keys \['weights'\]; expected"),
        ({"semantic_feature": {"owl": torch.zeros(6)}}, "class 'owl' hold a zero"),
        ({"semantic_feature": {"owl": torch.full((6,), torch.nan)}}, "zero, infinite or NaN"),
        ({"semantic_feature": {"owl": torch.ones(2, 6)}}, r"shape \(2, 6\), expected"),
        ({"semantic_feature": {"owl": [1.0, 2.0]}}, "not a tensor of numbers, but list"),
        ({"attribute_features": {"owl": torch.ones(2, 6, dtype=torch.int64)}}, "not a tensor"),
        ({"semantic_feature": {"owl": torch.eye(6).to_sparse()}}, "class 'owl' are sparse; save"),
        (
            {"semantic_feature": {"owl": torch.ones(6), "jay": torch.ones(7)}},
            r"vectors of lengths \[6, 7\]",
        ),
        ({"classes": {"owl": {"text": 1}}, "meta": {}}, "class 'owl' has no 'intrinsic'"),
        (
            {
                "classes": {
                    "jay": {"intrinsic": {"global": torch.ones(1, 6)}},
                    "owl": {"intrinsic": {"local": torch.zeros(0, 6)}},
                }
            },
            "class 'owl' has no vectors",
        ),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(BankError, match=rf"x\.pth.*{message}"):
        read_published([save(tmp_path / "x.pth", content)])


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(Harmful.target),)

    target = ""


def test_a_class_without_a_name_or_attributes(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", {"semantic_feature": features("owl", " ")})
    with pytest.raises(BankError, match=r"x\.pth: a class has no name"):
        save_published(read_published([path]), tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()
    entry = {"intrinsic": {"local": torch.zeros(0, 6), "global": torch.ones(1, 6)}}
    path = save(tmp_path / "y.pth", {"classes": {"owl": entry}, "meta": {}})
    assert len(read_published([path]).classes["owl"].attributes) == 0


def test_pickles_are_data_alone(tmp_path: Path) -> None:
    Harmful.target = str(tmp_path / "ran")
    path = save(tmp_path / "x.pth", {"semantic_feature": Harmful()})
    with pytest.raises(BankError, match=r"x\.pth: not loaded .*can run any program"):
        read_published([path])
    assert not (tmp_path / "ran").exists()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BankError, match="not loaded"):
        read_published([path])
    with pytest.raises(BankError, match=r"none\.pth: cannot read"):
        read_published([tmp_path / "none.pth"])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_torch_did_not_write(tmp_path: Path) -> None:
    path, blocked = tmp_path / "x.pth", tmp_path / "y.pth"
    for content in (b'{"classes": {}}', b"", b"\x89PNG\r\n"):
        path.write_bytes(content)
        with pytest.raises(BankError, match=r"x\.pth: not a file that torch\.save wrote; give"):
            read_published([path])
    path.write_bytes(pickle.dumps({"a": 1}))
    torch.save({"semantic_feature": Path("x")}, blocked)
    for file, reason in ((path, "damaged, or not from torch.save"), (blocked, "it names pathlib")):
        with pytest.raises(BankError, match=rf"\.pth: not loaded \({reason}") as caught:
            read_published([file])
        assert "weights_only" not in str(caught.value)  # torch's advice, not ours


def test_vectors_that_are_not_the_banks(tmp_path: Path) -> None:
    def bank() -> Any:
        return load_bank(tmp_path / "birds.json")

    path = save(tmp_path / "s.pth", {"semantic_feature": features("owl", "jay")})
    save_published(read_published([path]), tmp_path / "birds.json")
    vectors = tmp_path / "birds.safetensors"
    good = vectors.read_bytes()
    other = save(tmp_path / "o.pth", {"semantic_feature": features("owl", "jay")})
    save_published(read_published([other]), tmp_path / "other.json")
    vectors.write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(BankError, match="not those that"):
        read_stored(bank())
    vectors.unlink()
    with pytest.raises(BankError, match=r"birds\.safetensors is missing"):
        read_stored(bank())
    vectors.write_bytes(good)
    with pytest.raises(BankError, match="nothing for top-k selection"):
        encode_bank(bank(), ["owl"], HashedNGramEncoder(), top_k=2)
    content = json.loads((tmp_path / "birds.json").read_text())
    del content["classes"]["jay"]  # by hand
    (tmp_path / "birds.json").write_text(json.dumps(content))
    assert list(read_stored(bank())) == ["owl"]
    with safe_open(vectors, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(vectors)
    tensors["description|owl"][0, 0] = torch.nan
    save_file(tensors, vectors, metadata)
    with pytest.raises(BankError, match="not those that"):
        read_stored(bank())
    vectors.write_bytes(good)
    content["classes"]["owl"]["vectors"]["attributes"] = 2
    (tmp_path / "birds.json").write_text(json.dumps(content))
    with pytest.raises(BankError, match="class 'owl' has vectors of shapes"):
        read_stored(bank())


def test_import_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "s.pth", {"semantic_feature": features("owl", "jay")})
    output = tmp_path / "birds.json"
    arguments = ["semantics", "import", str(path), f"--output={output}"]
    assert main(arguments) == 0
    assert "2 classes, length 6" in capsys.readouterr().out
    assert main(arguments) == 1
    assert "exists" in capsys.readouterr().err
    assert main(arguments[:3]) == 2
    assert "needs --output" in capsys.readouterr().err
    assert main(["semantics", "show", str(output), "jay"]) == 0
    assert "no words" in capsys.readouterr().out
    assert main(["semantics", "show", str(output), "jay", "--top_k=3"]) == 1
    assert "nothing for top-k selection to choose from" in capsys.readouterr().err
    assert main(["semantics", "check", str(output)]) == 0


def test_import_keeps_vectors_that_are_not_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "s.pth", {"semantic_feature": features("owl", "jay")})
    other = tmp_path / "birds.safetensors"
    other.write_bytes(b"a model")
    assert main(["semantics", "import", str(path), f"--output={tmp_path / 'birds.json'}"]) == 1
    assert "birds.safetensors: exists" in capsys.readouterr().err
    assert other.read_bytes() == b"a model"
    assert not (tmp_path / "birds.json").exists()


@needs_peer_data
def test_published_cifar_fs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dvla_fast.data import load_split_list
    from dvla_fast.data.splits import class_names

    output = tmp_path / "cifar-fs.json"
    source = str(PEER_DATA / "vt_CIFAR-FS.pth")
    assert main(["semantics", "import", source, f"--output={output}", "--splits=cifar_fs"]) == 0
    text = capsys.readouterr().out
    assert "100 classes, length 512" in text
    assert "missing" not in text
    known = load_split_list("cifar_fs")
    names = class_names(sorted(known.keys), known)

    class Data:
        class_names = names

    config = SemanticsConfig(bank=str(output))
    texts, described = build_texts(config, Data(), torch.device("cpu"))  # type: ignore[arg-type]
    assert texts.tokens.shape == (100, 1, 512)
    assert_unit(texts.tokens[:, 0])
    assert (described["encoder"], described["bank_kind"]) == ("imported/512", "imported")
    raw = torch.load(source, map_location="cpu")["semantic_feature"]["pickup_truck"]
    row = names.index("pickup truck")
    torch.testing.assert_close(texts.tokens[row, 0], raw / raw.norm())


@needs_peer_data
def test_published_tiered_imagenet_lacks_its_validation_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tiered.json"
    source = str(PEER_DATA / "vt_tieredImageNet.pth")
    assert main(["semantics", "import", source, f"--output={output}"]) == 0
    text = capsys.readouterr().out
    assert "511 classes" in text
    assert "missing     97 of 97 val classes: n02099267" in text
    bank = load_bank(output)
    assert "house finch" in bank.classes
    assert not [name for name in bank.classes if name.startswith("n0") and name[1:].isdigit()]
