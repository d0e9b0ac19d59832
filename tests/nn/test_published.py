"""The authors' Visformer files: loaded to the bit, or refused with what is wrong with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dvla_fast.errors import CheckpointError
from dvla_fast.nn import Visformer, has_small_stem, visformer_tiny

from .published import save_their_checkpoint, their_gates, their_layout

ONE_NAN = torch.zeros(1, 192, 8, 8)
ONE_NAN[0, 5, 3, 2] = torch.nan
SHALLOW: dict[str, Any] = {"depth": (1, 1, 2), "locations": ((2, 0), (3, 0))}


def trained(size: int = 64, **options: Any) -> Visformer:
    """A network whose normalisation statistics are not those of a fresh one."""
    backbone = visformer_tiny(size, **{**SHALLOW, **options})
    backbone.train()
    with torch.no_grad():
        backbone(torch.randn(4, 3, size, size) * 2 + 1)
    return backbone.eval()


def fresh(size: int = 64, **options: Any) -> Visformer:
    return visformer_tiny(size, **{**SHALLOW, **options}).eval()


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "backbone."])
@pytest.mark.parametrize("small_stem", [True, False])
def test_loads_to_the_bit(tmp_path: Path, small_stem: bool, prefix: str) -> None:
    theirs, ours = trained(small_stem=small_stem), fresh(small_stem=small_stem)
    path = save_their_checkpoint(tmp_path / "visformer-mini.pth", their_layout(theirs, prefix))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = ours.load_pretrained(str(path))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))
    assert report["left_out"].keys() == {"head", "log_tau"}
    assert (report["format"], report["epoch"], report["resized"]) == ("visformer", 7, [])


def test_full_size_network_and_bare_state_dict(tmp_path: Path) -> None:
    theirs, ours = visformer_tiny(224).eval(), visformer_tiny(224).eval()
    state = their_layout(theirs)
    assert len(state) == 206  # the published network's
    torch.save(state, tmp_path / "visformer-CUB.pth")
    assert ours.load_pretrained(str(tmp_path / "visformer-CUB.pth"))["epoch"] is None
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))


def test_dvla_rl_checkpoint_gives_its_backbone_and_says_what_it_leaves(tmp_path: Path) -> None:
    theirs, ours = trained(), fresh()
    state = {**their_layout(theirs), **their_gates(), "unheard_of.weight": torch.ones(1)}
    path = save_their_checkpoint(tmp_path / "dvla_rl-mini-1shot.pth", state)
    with pytest.warns(UserWarning, match=r"only its backbone.*rl_gate1, rl_gate2, t2i, t2i2"):
        report = ours.load_pretrained(str(path))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))
    assert report["format"] == "dvla-rl"
    assert report["left_out"]["unheard_of"] == "unknown"


def test_positions_are_interpolated_to_another_size(tmp_path: Path) -> None:
    theirs, ours = trained(64), fresh(80)
    path = save_their_checkpoint(tmp_path / "v.pth", their_layout(theirs))
    with pytest.warns(UserWarning, match="interpolated to another image size"):
        report = ours.load_pretrained(str(path))
    assert report["resized"] == ["pos_embed1", "pos_embed2", "pos_embed3"]
    assert ours(torch.randn(1, 3, 80, 80)).isfinite().all()
    constant = their_layout(theirs)
    constant["pos_embed1"] = torch.full_like(constant["pos_embed1"], 0.25)
    save_their_checkpoint(path, constant)
    with pytest.warns(UserWarning, match="interpolated"):
        ours.load_pretrained(str(path))
    torch.testing.assert_close(ours.net.pos_embed1, torch.full_like(ours.net.pos_embed1, 0.25))


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        del state[name]

    return change


def with_(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        state[name] = value

    return change


@pytest.mark.parametrize(
    ("match", "change"),
    [
        (r"1 tensors missing \(stage2\.0\.attn\.proj", without("stage2.0.attn.proj.weight")),
        (
            r"1 unexpected \(stage1\.7\.norm2\.weight\)",
            with_("stage1.7.norm2.bn.weight", torch.ones(96)),
        ),
        (r"norm\.weight is \(3,\), expected \(384,\)", with_("norm.bn.weight", torch.ones(3))),
        (r"no module known here \(adapter\.w\)", with_("adapter.w", torch.ones(1))),
        ("NaN or infinity in pos_embed2", with_("pos_embed2", ONE_NAN)),
        ("no 'stem.0.weight' among its tensors", without("stem.0.weight")),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(
    tmp_path: Path, match: str, change: Callable[[dict[str, Tensor]], None]
) -> None:
    ours = fresh()
    state = their_layout(trained())
    change(state)
    path = save_their_checkpoint(tmp_path / "v.pth", state)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        ours.load_pretrained(str(path))
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())


@pytest.mark.parametrize("theirs", [True, False])
def test_another_stem_is_named(tmp_path: Path, theirs: bool) -> None:
    path = save_their_checkpoint(tmp_path / "v.pth", their_layout(trained(small_stem=theirs)))
    word = "true" if theirs else "false"
    with pytest.raises(CheckpointError, match=rf"backbone_options\.small_stem {word}"):
        fresh(small_stem=not theirs).load_pretrained(str(path))


def test_unreadable_files(tmp_path: Path) -> None:
    ours = fresh()
    with pytest.raises(CheckpointError, match="no such file"):
        ours.load_pretrained(str(tmp_path / "none.pth"))
    whole = save_their_checkpoint(tmp_path / "v.pth", their_layout(trained()))
    part = tmp_path / "part.pth"
    part.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"part\.pth: not a complete PyTorch file"):
        ours.load_pretrained(str(part))
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match=r"text\.pth: not a file that is safe to load"):
        ours.load_pretrained(str(tmp_path / "text.pth"))
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"empty\.pth: not a complete PyTorch file"):
        ours.load_pretrained(str(tmp_path / "empty.pth"))


def test_files_of_before_torch_1_6_cut_short(tmp_path: Path) -> None:
    """Pickles, which fail by another error at each of their instructions."""
    path = tmp_path / "v.pth"
    torch.save({"stem.0.weight": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"v\.pth: not a (complete PyTorch )?file"):
            has_small_stem(path)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
            return open, (str(tmp_path / "sprung"), "w")

    path = save_their_checkpoint(tmp_path / "v.pth", their_layout(trained()), trap=Trap())
    with pytest.raises(CheckpointError, match="not a file that is safe to load"):
        fresh().load_pretrained(str(path))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("match", "content"),
    [
        ("holds a list", [1, 2]),
        ("no state_dict of tensors", {"state_dict": {"stem.0.weight": 3}}),
        ("no state_dict of tensors", {"state_dict": 5}),
        ("no state_dict of tensors", {}),
        ("not a Visformer checkpoint", {"conv1.weight": torch.ones(1)}),
    ],
)
def test_other_contents(tmp_path: Path, match: str, content: Any) -> None:
    torch.save(content, tmp_path / "v.pth")
    with pytest.raises(CheckpointError, match=match):
        fresh().load_pretrained(str(tmp_path / "v.pth"))


def test_numpy_scalars_are_refused_readably(tmp_path: Path) -> None:
    path = save_their_checkpoint(tmp_path / "v.pth", their_layout(trained()), k=np.float64(0.4))
    with pytest.raises(CheckpointError, match="save its state_dict alone"):
        fresh().load_pretrained(str(path))
