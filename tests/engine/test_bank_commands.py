"""dvla-fast semantics show, diff, edit, encode and check."""

from __future__ import annotations

import errno
import json
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dvla_fast.cli import main
from dvla_fast.data import prepare_cache
from dvla_fast.engine import bank_commands
from dvla_fast.engine.text_options import EncoderOptions
from dvla_fast.engine.texts import bank_encoder
from dvla_fast.semantics import HashedNGramEncoder, load_bank
from dvla_fast.semantics.vectors import CachedEncoder

CPU = torch.device("cpu")

BIRDS: dict[str, Any] = {
    "format": "dvla-fast-bank/1",
    "name": "birds",
    "language": "en",
    "provenance": {"kind": "support-images", "model": "a model"},
    "classes": {
        "Sooty Albatross": {
            "candidates": [
                {"text": "dark wings", "scores": [0.31, 0.5]},
                {"text": "a [long] bill", "scores": [0.6]},
                {"text": "a crown", "scores": [0.2, 0.1]},
                "a tail",
            ],
            "attributes": ["a [long] bill", "dark wings"],
            "description": "A dark seabird.",
            "answers": {"candidates": ["1. dark wings\n2. a [long] bill"]},
            "images": ["train/albatross/3.jpg"],
        },
        "jay": {"candidates": ["blue wing", "black bib"], "description": "A loud bird."},
    },
}


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    path = tmp_path / "birds.json"
    path.write_text(json.dumps(BIRDS))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    assert main(["semantics", *map(str, arguments)]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


@pytest.mark.usefixtures("wide")
def test_show_a_class(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "show", birds, "sooty_albatross")
    rows = {name: line for line in text.splitlines() for name in ("wings", "[long]", "crown")
            if name in line and "│" in line}  # fmt: skip
    assert "kept in round 1" in rows["[long]"]
    assert "kept in round 2" in rows["wings"]
    assert "dropped: 0.100 in the last round, where 0.500 was kept" in rows["crown"]
    assert rows["[long]"].count("█") == 20
    assert rows["crown"].count("█") == 3
    for expected in ("A dark seabird.", "train/albatross/3.jpg", "model: a model", "answer"):
        assert expected in text


@pytest.mark.usefixtures("wide")
def test_a_dropped_candidate_beside_what_the_last_round_kept(
    birds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    birds.write_text(birds.read_text().replace("[0.31, 0.5]", "[0.31, 0.7]"))
    text = run(capsys, "show", birds, "sooty_albatross")
    assert "dropped: 0.100 in the last round, where 0.700 was kept" in text


@pytest.mark.usefixtures("wide")
def test_show_a_selection_made_now(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "show", birds, "jay")
    assert "nothing chosen yet" in text
    text = run(capsys, "show", birds, "jay", "--top_k=1")
    assert text.count("kept in round 1") == 1
    assert text.count("dropped:") == 1
    assert "shapes" in run(capsys, "show", "shapes")


def test_words_do_not_steer_the_terminal(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steering = json.loads(
        json.dumps(BIRDS).replace("jay", "j\\u001b[2Jay").replace(" bird", "\\u001b]0;x\\u0007 b")
    )
    steering["provenance"]["kind"] = steering["name"] = "\x1b[1m[red]"
    steering["classes"]["j\x1b[2Jay"]["answers"] = {"candidates": "\x9b2J\u202e\x1b[8m"}
    other = birds.with_name("other.json")
    other.write_text(json.dumps(steering))
    lines = [
        run(capsys, "show", other),
        run(capsys, "show", other, "j\x1b[2Jay"),
        run(capsys, "diff", birds, other),
    ]
    main(["semantics", "check", str(other)])
    lines.append(capsys.readouterr().out)
    for text in lines:
        assert "[red]" in text
        assert not [c for c in text if c != "\n" and unicodedata.category(c)[0] == "C"]


def test_show_what_is_not_there(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("show", "edit"):
        error = run(capsys, command, birds, "jax", status=1)
        assert "the bank has no class 'jax' (near it: 'jay'); 'dvla-fast semantics show'" in error
        assert "data set" not in error
    assert "cannot read the semantic bank" in run(capsys, "show", "none.json", status=1)


def test_diff(birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = json.loads(json.dumps(BIRDS))
    entry = other["classes"].pop("Sooty Albatross")
    entry["attributes"] = ["dark wings", "a [long] bill", "a tail"]
    entry["description"] = "A seabird."
    other["classes"] |= {"sooty_albatross": entry, "wren": other["classes"]["jay"]}
    del other["classes"]["jay"]
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert run(capsys, "diff", birds, tmp_path / "other.json").splitlines() == [
        "Sooty Albatross:",
        "  + attribute 'a tail'",
        "  ~ attributes reordered: 2, 1",
        "  - description 'A dark seabird.'",
        "  + description 'A seabird.'",
        "- class 'jay'",
        "+ class 'wren'",
    ]
    assert run(capsys, "diff", birds, birds).strip() == "no difference"


def test_diff_of_what_decides_about_leaks(
    birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads(json.dumps(BIRDS))
    other["provenance"]["kind"] = "class-names"
    other["classes"]["Sooty Albatross"]["images"] = ["train/albatross/4.jpg"]
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert run(capsys, "diff", birds, tmp_path / "other.json").splitlines() == [
        "~ made from: support-images -> class-names",
        "Sooty Albatross:",
        "  - image 'train/albatross/3.jpg'",
        "  + image 'train/albatross/4.jpg'",
    ]


def test_diff_of_where_texts_come_from(
    birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads(json.dumps(BIRDS))
    other["provenance"]["model"] = "another"
    entry = other["classes"]["Sooty Albatross"]
    entry["candidates"][0]["scores"] = [0.125]
    entry["answers"] = {"candidates": "[]"}
    entry["dropped"] = [{"text": "a beak", "reason": "repeated"}]
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert run(capsys, "diff", birds, tmp_path / "other.json").splitlines() == [
        "~ provenance: model",
        "Sooty Albatross:",
        "  ~ scores of 1 candidates",
        "  ~ the model's answers",
        "  ~ dropped",
    ]


def editor(tmp_path: Path, code: str) -> str:
    script = tmp_path / "editor.py"
    script.write_text(
        "import json, sys\npath = sys.argv[1]\n"
        f"text = open(path, errors='replace').read()\n{code}\n"
    )
    return f"{sys.executable} {script}"


@pytest.fixture
def use_editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("VISUAL", raising=False)

    def use(code: str) -> None:
        monkeypatch.setenv("EDITOR", editor(tmp_path, code))

    return use


def test_edit(birds: Path, use_editor: Any, capsys: pytest.CaptureFixture[str]) -> None:
    use_editor("open(path, 'w').write(text.replace('A loud bird.', 'A blue bird.'))")
    assert "changed" in run(capsys, "edit", birds, "Jay")
    content = json.loads(birds.read_text())
    assert content["classes"]["jay"]["description"] == "A blue bird."
    assert content["classes"]["Sooty Albatross"] == BIRDS["classes"]["Sooty Albatross"]
    assert content["language"] == "en"  # what the library does not read stays too
    before = birds.read_bytes()
    use_editor("")
    assert "no change" in run(capsys, "edit", birds, "jay")
    assert birds.read_bytes() == before


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("open(path, 'w').write(text[:-3])", "not valid JSON"),
        ("open(path, 'w').write(text.replace('A loud bird.', ' '))", "has an empty description"),
    ],
)
def test_an_invalid_edit_is_kept_aside(
    birds: Path, use_editor: Any, capsys: pytest.CaptureFixture[str], code: str, message: str
) -> None:
    before = birds.read_bytes()
    use_editor(code)
    error = run(capsys, "edit", birds, "jay", status=1)
    (kept,) = birds.parent.glob("birds.jay-*.rejected.json")
    assert message in error
    assert str(kept) in error
    assert birds.read_bytes() == before
    # the next edit goes on from there, and tidies up
    use_editor(
        "assert 'blue wing' in text\n"
        "new = {'attributes': ['blue wing'], 'description': 'A bird.'}\n"
        "open(path, 'w').write(json.dumps(new))"
    )
    run(capsys, "edit", birds, "jay")
    assert load_bank(birds).classes["jay"].description == "A bird."
    assert not kept.exists()


def test_an_edit_does_not_undo_what_others_wrote(
    birds: Path, use_editor: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.dumps(BIRDS).replace("A loud bird.", "Changed meanwhile.")
    use_editor(
        f"open({str(birds)!r}, 'w').write({other!r})\n"
        "open(path, 'w').write(text.replace('A loud bird.', 'Mine.'))"
    )
    assert "changed in the bank meanwhile" in run(capsys, "edit", birds, "jay", status=1)
    assert load_bank(birds).classes["jay"].description == "Changed meanwhile."
    (kept,) = birds.parent.glob("birds.jay-*.rejected.json")
    assert "Mine." in kept.read_text()


def test_an_edit_through_a_link_reaches_the_bank(
    birds: Path, use_editor: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    link = birds.with_name("link.json")
    link.symlink_to(birds)
    use_editor("open(path, 'w').write(text.replace('A loud bird.', 'Mine.'))")
    assert "changed" in run(capsys, "edit", link, "jay")
    assert link.is_symlink()
    assert load_bank(birds).classes["jay"].description == "Mine."


@pytest.mark.parametrize("now", ["[]", '{"classes": []}', "{"])
def test_an_edit_outlives_a_bank_that_is_damaged_meanwhile(
    birds: Path, use_editor: Any, capsys: pytest.CaptureFixture[str], now: str
) -> None:
    use_editor(
        f"open({str(birds)!r}, 'w').write({now!r})\n"
        "open(path, 'w').write(text.replace('A loud bird.', 'Mine.'))"
    )
    assert "your edit is kept in" in run(capsys, "edit", birds, "jay", status=1)
    (kept,) = birds.parent.glob("birds.jay-*.rejected.json")
    assert "Mine." in kept.read_text()


def test_edits_of_like_names_are_kept_apart(
    birds: Path, use_editor: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = BIRDS["classes"]["jay"]
    birds.write_text(json.dumps({"classes": {"a/b": entry, "a b": entry, "x" * 250: entry}}))
    use_editor("open(path, 'w').write('mine')")
    run(capsys, "edit", birds, "a/b", status=1)
    run(capsys, "edit", birds, "x" * 250, status=1)
    use_editor("assert 'A loud bird.' in text")
    assert "no change" in run(capsys, "edit", birds, "a b")
    use_editor("assert text == 'mine'\nopen(path, 'w').write('yours')")
    assert "kept in" in run(capsys, "edit", birds, "a/b", status=1)


@pytest.mark.parametrize(
    ("code", "message", "kept"),
    [
        ("open(path, 'w').write('mine')\nsys.exit(3)", "was saved, but the editor", b"mine"),
        (r"open(path, 'wb').write(b'mine \xe9')", "is not UTF-8 text any more", b"mine \xe9"),
    ],
)
def test_what_was_saved_is_never_lost(
    birds: Path,
    use_editor: Any,
    capsys: pytest.CaptureFixture[str],
    code: str,
    message: str,
    kept: bytes,
) -> None:
    use_editor(code)
    assert message in run(capsys, "edit", birds, "jay", status=1)
    (file,) = birds.parent.glob("birds.jay-*.rejected.json")
    assert file.read_bytes() == kept
    assert json.loads(birds.read_text()) == BIRDS
    use_editor("")
    run(capsys, "edit", birds, "jay", status=1)  # it is opened again, and still no JSON
    assert file.read_bytes() == kept


def test_edits_that_cannot_be(
    birds: Path,
    use_editor: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "comes with the package; copy" in run(capsys, "edit", "digits", "one", status=2)
    use_editor("sys.exit(3)")
    assert "ended with 3; nothing changed" in run(capsys, "edit", birds, "jay", status=2)
    use_editor("import os\nos.unlink(path)")
    assert "left no file to read" in run(capsys, "edit", birds, "jay", status=2)
    for command in ("/no/such/editor", "vi 'an open quote"):
        monkeypatch.setenv("EDITOR", command)
        assert "cannot start the editor" in run(capsys, "edit", birds, "jay", status=2)
    assert json.loads(birds.read_text()) == BIRDS


def test_encode(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "encode", birds, "--dim=32")
    assert "6 of hashed-ngram, length 32 (6 encoded now)" in " ".join(text.split())
    assert birds.with_suffix(".safetensors").exists()
    birds.write_text(birds.read_text().replace("A loud bird.", "A blue bird."))
    assert "(1 encoded now)" in run(capsys, "encode", birds, "--dim=32")
    # with top-k: every candidate, and one template a class and round
    text = run(capsys, "encode", birds, "--dim=32", "--top_k=2")
    assert "13 of hashed-ngram" in " ".join(text.split())
    assert "(0 encoded now)" in run(capsys, "encode", birds, "--dim=32", "--top_k=2")
    # what other settings use stays, and what an edit has left behind goes where that is asked for
    text = run(capsys, "encode", birds, "--dim=32")
    assert "13 of hashed-ngram" in " ".join(text.split())
    assert "(0 encoded now)" in run(capsys, "encode", birds, "--dim=32", "--top_k=2")
    text = run(capsys, "encode", birds, "--dim=32", "--prune")
    assert "6 of hashed-ngram" in " ".join(text.split())
    assert "longer than the 77 words" in run(capsys, "encode", long_bank(birds), status=1)
    with pytest.warns(UserWarning, match="longer than the 77 words"):
        assert "cut         1 texts" in run(capsys, "encode", long_bank(birds), "--truncate")


@pytest.mark.parametrize("command", ["encode", "show"])
def test_an_unknown_template(command: str, birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, command, birds, "--top_k=2", "--template=zzz", status=2)
    assert "template: 'zzz' is unknown; choose one of all, last" in text


def test_encode_where_nothing_can_be_written(
    birds: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Path.mkdir

    def refuses(path: Path, *given: Any, **options: Any) -> None:
        if "home" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        real(path, *given, **options)

    monkeypatch.setattr(Path, "mkdir", refuses)
    monkeypatch.setattr(HashedNGramEncoder, "encode", None)  # nothing is encoded in vain
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(birds.parent / "home"))
    text = run(capsys, "encode", "digits", status=1)
    assert "digits.safetensors: cannot write (Permission denied); set XDG_CACHE_HOME to" in text
    monkeypatch.setenv("XDG_CACHE_HOME", str(birds))  # a file
    text = run(capsys, "encode", "digits", status=1)
    assert "cannot write (Not a directory); set XDG_CACHE_HOME to" in text

    def nowhere(*given: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", nowhere)
    text = run(capsys, "encode", birds, status=1)
    assert "birds.safetensors: cannot write (Permission denied); copy the bank to" in text


def test_made_banks_are_like_others_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = run(capsys, "check", "shapes", "--data.dataset=shapes", "--data.images_per_class=2")
    assert "all 120 classes of the data set are in the bank" in text
    assert f"{tmp_path}/cache/dvla-fast/banks/shapes.safetensors" in run(capsys, "encode", "shapes")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert isinstance(bank_encoder(EncoderOptions(), load_bank("shapes"), CPU), CachedEncoder)
    assert "load_bank('shapes').save(" in run(capsys, "edit", "shapes", "rokobu", status=2)
    assert main(["semantics"]) == 2
    assert "shapes-varied-true" in capsys.readouterr().out


def test_a_stopped_encode_keeps_what_is_done(
    birds: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = HashedNGramEncoder.encode, []

    def stops(self: HashedNGramEncoder, texts: Any) -> Any:
        calls.append(texts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, texts)

    monkeypatch.setattr(bank_commands, "_BATCH", 2)
    monkeypatch.setattr(HashedNGramEncoder, "encode", stops)
    assert "interrupted" in run(capsys, "encode", birds, status=130)
    assert "(2 encoded now)" in run(capsys, "encode", birds)


def long_bank(birds: Path) -> Path:
    path = birds.with_name("long.json")
    path.write_text(birds.read_text().replace("A blue bird.", "bird " * 80))
    return path


def test_encode_with_a_model(
    birds: Path, tiny_open_clip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run(capsys, "encode", birds, f"--encoder={tiny_open_clip}", "--device=cpu")
    assert "open_clip:dvla-fast-tiny/sha256-" in text
    assert "length 10 (6 encoded now)" in text


def test_check_against_a_data_set(
    birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, names in (("train", ["Sooty_Albatross", "jay"]), ("test", ["wren", "owl"])):
        for name in names:
            folder = tmp_path / "photos" / split / name
            os.makedirs(folder)
            for number in range(2):
                Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f"{number}.png")
    assert main(["semantics", "check", str(birds)]) == 0
    assert "no problems found" in capsys.readouterr().out
    dataset = f"--data.dataset={tmp_path / 'photos'}"
    assert main(["semantics", "check", str(birds), dataset]) == 1
    captured = capsys.readouterr()
    assert "lacks 2 class(es) of the data set: 'owl', 'wren'" in captured.out
    assert "1 image(s) that the bank has seen are not in the data set" in captured.out
    assert captured.err.count("error:") == 1
    prepare_cache(tmp_path / "photos", tmp_path / "cache", 8)
    cache = f"--data.dataset={tmp_path / 'cache'}"
    other = run(capsys, "check", birds, cache, "--data.splits=fc100", status=1)
    assert "was prepared with the split of its folders, not fc100" in other
    assert "no problems" in run(capsys, "check", "digits", "--data.dataset=digits")
