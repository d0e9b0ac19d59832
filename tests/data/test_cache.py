"""The prepared cache: equal to decoding, resumable, never half there, honest about what changed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dvla_fast.data import cache, load_data, load_split_list, prepare_cache
from dvla_fast.data.cache_index import is_cache
from dvla_fast.data.decode import decode
from dvla_fast.errors import DataError, OutputError
from tests.data import trees


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHUNK", 7)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return trees.split_folders(tmp_path / "photos")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_equal_to_decoding(tree: Path, tmp_path: Path) -> None:
    done = prepare_cache(tree, tmp_path / "cache", 16)
    assert (done.images, done.decoded, done.reused) == (48, 48, 0)
    assert set(files(tmp_path / "cache")) == {"images.bin", "index.json"}
    assert not (tmp_path / "cache.partial").exists()
    direct, cached = load_data(str(tree), 16), load_data(str(tmp_path / "cache"), 16)
    for name in ("base", "monitor", "novel"):
        ours, theirs = cached.split(name), direct.split(name)
        assert ours.mapped
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.class_names == theirs.class_names
        index = torch.tensor([3, 0])
        assert torch.equal(ours.gather(index), theirs.images[index])
        assert torch.equal(torch.cat(list(ours.chunks(5))), theirs.images)
    torch.testing.assert_close(cached.mean, direct.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(cached.std, direct.std, rtol=1e-6, atol=0)
    assert (cached.monitor_kind, cached.name) == (direct.monitor_kind, direct.name)
    stored = json.loads((tmp_path / "cache" / "index.json").read_text())["statistics"]
    torch.testing.assert_close(torch.tensor(stored["mean"]), direct.mean.flatten())
    torch.testing.assert_close(torch.tensor(stored["std"]), direct.std.flatten())


def test_of_arrays_and_of_a_published_split(tmp_path: Path) -> None:
    trees.cifar100(tmp_path / "cifar")
    prepare_cache(tmp_path / "cifar", tmp_path / "cache", 32, "fc100")
    direct = load_data(str(tmp_path / "cifar"), 32, splits="fc100")
    cached = load_data(str(tmp_path / "cache"), 32, splits="fc100")
    assert torch.equal(cached.novel.images, direct.novel.images)
    with pytest.raises(DataError, match="prepared with the split fc100, not cifar_fs"):
        load_data(str(tmp_path / "cache"), 32, splits="cifar_fs")
    with pytest.raises(DataError, match=r"holds 32-pixel images, not 84; set --data.image_size 32"):
        load_data(str(tmp_path / "cache"), 84)
    assert cache.verify_cache(tmp_path / "cache") == []


def test_photographs_lie_upright_in_a_cache(tree: Path, tmp_path: Path) -> None:
    path = next((tree / "test/h").iterdir())
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.asarray(Image.open(path))
    Image.fromarray(pixels).save(path.with_suffix(".png"), exif=exif)
    path.unlink()
    prepare_cache(tree, tmp_path / "cache", 16)
    cached = load_data(str(tmp_path / "cache"), 16).novel.images
    assert torch.equal(cached, load_data(str(tree), 16).novel.images)
    upright = decode(np.ascontiguousarray(pixels[::-1, ::-1]), 16)
    assert any((image == upright).all() for image in cached.numpy())


def test_only_the_classes_of_a_published_split_are_that_data_set(tmp_path: Path) -> None:
    """Neither a folder's name nor that of a user's list makes a data set the published one."""
    known = load_split_list("cifar_fs")
    root = trees.split_folders(tmp_path / "photos", dict(known.splits), 2)
    assert load_data(str(root), 8).split_list == "cifar_fs"
    prepare_cache(root, tmp_path / "cache", 8)
    assert load_data(str(tmp_path / "cache"), 8).split_list == "cifar_fs"

    toys = tmp_path / "cifar_fs"
    trees.class_folders(toys, "abcd", 3)
    own = tmp_path / "own.json"
    splits = {"train": ["a", "b"], "test": ["c", "d"]}
    own.write_text(json.dumps({"name": "cifar_fs", "dataset": "CIFAR-FS", "splits": splits}))
    prepare_cache(toys, tmp_path / "toys", 8, str(own))
    for data in (load_data(str(toys), 8, splits=str(own)), load_data(str(tmp_path / "toys"), 8)):
        assert data.name == "CIFAR-FS"
        assert data.split_list == ""


def test_an_edited_split_file_is_noticed(tmp_path: Path) -> None:
    trees.class_folders(tmp_path / "photos", "abc", 3)
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"splits": {"train": ["a", "b"], "test": ["c"]}}))
    prepare_cache(tmp_path / "photos", tmp_path / "cache", 16, splits=str(mine))
    opened = cache.open_cache(tmp_path / "cache", 16, splits=str(mine))
    assert opened.novel.class_names == ("c",)
    mine.write_text(json.dumps({"splits": {"train": ["a", "c"], "test": ["b"]}}))
    with pytest.raises(DataError, match="was prepared with the split"):
        cache.open_cache(tmp_path / "cache", 16, splits=str(mine))


def test_the_same_images_divided_otherwise_are_another_cache(tmp_path: Path) -> None:
    trees.class_folders(tmp_path / "photos", "abc", 3)
    mine = tmp_path / "mine.json"
    for train, test in (("ab", "c"), ("a", "bc")):
        mine.write_text(json.dumps({"splits": {"train": list(train), "test": list(test)}}))
        if train == "ab":
            prepare_cache(tmp_path / "photos", tmp_path / "cache", 16, splits=str(mine))
    with pytest.raises(DataError, match="a cache made from other files, or for another size or sp"):
        prepare_cache(tmp_path / "photos", tmp_path / "cache", 16, splits=str(mine))


@pytest.mark.parametrize(("size", "error"), [(0, DataError), (-3, DataError), (2.5, TypeError)])
def test_sizes_that_no_image_has(
    tree: Path, tmp_path: Path, size: int, error: type[Exception]
) -> None:
    with pytest.raises(error, match="image_size"):
        prepare_cache(tree, tmp_path / "cache", size)
    assert not (tmp_path / "cache.partial").exists()
    with pytest.raises(error, match="image_size"):
        load_data(str(tree), size)


def test_without_validation_classes(tmp_path: Path) -> None:
    tree = trees.split_folders(tmp_path / "photos", {"train": "abc", "test": "de"})
    prepare_cache(tree, tmp_path / "cache", 16)
    direct, cached = load_data(str(tree), 16), load_data(str(tmp_path / "cache"), 16)
    assert torch.equal(cached.monitor.images, direct.monitor.images)
    assert torch.equal(cached.mean, direct.mean)


@pytest.mark.parametrize("kill_at", [1, 20, 47])
def test_killed_and_continued(tree: Path, tmp_path: Path, kill_at: int) -> None:
    """SIGKILL in the middle of the build; the same call then gives the same bytes."""
    program = f"""
import os, signal
from dvla_fast.data import cache
cache.CHUNK = 7
real, calls = cache.decode, [0]
def decode(source, size):
    calls[0] += 1
    if calls[0] == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(source, size)
cache.decode = decode
cache.prepare_cache({str(tree)!r}, {str(tmp_path / "cache")!r}, 16, workers=1)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "cache").exists()
    resumed = prepare_cache(tree, tmp_path / "cache", 16)
    assert resumed.reused == (kill_at - 1) // 7 * 7
    assert resumed.reused + resumed.decoded == 48
    prepare_cache(tree, tmp_path / "other", 16)
    assert files(tmp_path / "cache") == files(tmp_path / "other")


def stopped_build(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a build after two of its chunks."""

    def stop(done: int, total: int, earlier: int) -> None:
        if done >= 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_cache(tree, tmp_path / "cache", 16, advance=stop)


@pytest.mark.parametrize("change", ["size", "images", "split"])
def test_a_stopped_build_of_other_settings_stays(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    stopped_build(tree, tmp_path, monkeypatch)
    before = files(tmp_path / "cache.partial")
    root, size, splits = tree, 16, ""
    if change == "size":
        size = 24
    elif change == "images":
        root = trees.split_folders(tmp_path / "others", {"train": "abc", "test": "de"})
    else:
        splits = str(tmp_path / "mine.json")
        mine = {"train": ["b", "a", "c", "d"], "val": ["e", "f"], "test": ["g", "h"]}
        Path(splits).write_text(json.dumps({"splits": mine}))
        root = tmp_path / "classes"
        trees.class_folders(root, "abcdefgh", 6)
    with pytest.raises(OutputError, match=r"cache\.partial: an unfinished .*photos, 16 pixels.*or"):
        prepare_cache(root, tmp_path / "cache", size, splits)
    assert files(tmp_path / "cache.partial") == before
    assert prepare_cache(tree, tmp_path / "cache", 16).reused == 14
    assert set(files(tmp_path / "cache")) == {"images.bin", "index.json"}


def test_a_stopped_build_of_images_that_moved_goes_on(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_build(tree, tmp_path, monkeypatch)
    tree.rename(tmp_path / "moved")
    assert prepare_cache(tmp_path / "moved", tmp_path / "cache", 16).reused == 14


def test_a_cache_that_lost_its_images_is_named(tree: Path, tmp_path: Path) -> None:
    prepare_cache(tree, tmp_path / "cache", 16)
    (tmp_path / "cache" / "images.bin").unlink()
    with pytest.raises(DataError, match=r"cannot read this cache .*images\.bin.*prepare' again"):
        load_data(str(tmp_path / "cache"), 16)
    (tree / "index.json").write_text("[]")  # of somebody else
    assert not is_cache(tree)


def test_changed_file_is_decoded_again(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_build(tree, tmp_path, monkeypatch)
    trees.write_image(tree / "train" / "a" / "a_1.jpg", 999)
    assert prepare_cache(tree, tmp_path / "cache", 16).reused == 7
    data = load_data(str(tmp_path / "cache"), 16)
    assert torch.equal(data.base.images, load_data(str(tree), 16).base.images)


def test_images_decoded_otherwise_are_not_kept(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(cache, "FORMAT", "dvla-fast-cache/1")
        prepare_cache(tree, tmp_path / "older", 16)
        stopped_build(tree, tmp_path, monkeypatch)
    with pytest.raises(DataError, match=r"another version of dvla-fast .*cache/1.*remove"):
        load_data(str(tmp_path / "older"), 16)
    assert prepare_cache(tree, tmp_path / "cache", 16).reused == 0


def test_torn_images_and_torn_journal_are_decoded_again(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_build(tree, tmp_path, monkeypatch)
    with open(tmp_path / "cache.partial" / "images.bin", "rb+") as stream:
        stream.write(b"torn")
    with open(tmp_path / "cache.partial" / "journal.jsonl", "a") as stream:
        stream.write('{"start": 14, "finger')
    assert prepare_cache(tree, tmp_path / "cache", 16).reused == 7
    data = load_data(str(tmp_path / "cache"), 16)
    assert torch.equal(data.base.images, load_data(str(tree), 16).base.images)


def test_same_command_again_does_nothing(tree: Path, tmp_path: Path) -> None:
    prepare_cache(tree, tmp_path / "cache", 16)
    before = files(tmp_path / "cache")
    again = prepare_cache(tree, tmp_path / "cache", 16)
    assert (again.decoded, again.reused) == (0, 48)
    assert files(tmp_path / "cache") == before


def test_in_the_folder_of_a_cache(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_cache(tree, tmp_path / "cache", 16)
    monkeypatch.chdir(tmp_path / "cache")
    assert cache.verify_cache(".") == []
    assert prepare_cache(tree, ".", 16).reused == 48
    with pytest.raises(DataError, match=r"is a cache; give the folder .*photos"):
        prepare_cache(".", tmp_path / "smaller", 8)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="exists and is no cache"):
        prepare_cache(tree, ".", 16)


def test_cache_of_other_files_in_the_way(tree: Path, tmp_path: Path) -> None:
    prepare_cache(tree, tmp_path / "cache", 16)
    before = files(tmp_path / "cache")
    with pytest.raises(DataError, match=r"made from other files, or for another size"):
        prepare_cache(tree, tmp_path / "cache", 24)
    trees.write_image(tree / "test" / "h" / "new.jpg", 5)
    with pytest.raises(DataError, match=r"made from other files"):
        prepare_cache(tree, tmp_path / "cache", 16)
    assert files(tmp_path / "cache") == before
    assert "have changed since it was made" in cache.verify_cache(tmp_path / "cache")[0]
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for other in ("mine", "link"):
        with pytest.raises(OutputError, match="exists and is no cache"):
            prepare_cache(tree, tmp_path / other, 16)


def test_unreadable_images(tree: Path, tmp_path: Path) -> None:
    """All are named; the rest stays; replacing them continues, and so does leaving them out."""
    bad = [tree / "train" / "b" / "b_0.jpg", tree / "val" / "f" / "f_3.jpg"]
    kept = [path.read_bytes() for path in bad]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(kept[1][:200])
    with pytest.raises(DataError, match=r"b_0\.jpg.*0 bytes.*2 of 48 images.*--skip_unreadable"):
        prepare_cache(tree, tmp_path / "cache", 16)
    named = (tmp_path / "cache.partial" / "unreadable.txt").read_text()
    assert re.findall(r"(\w+\.jpg): cannot", named) == ["b_0.jpg", "f_3.jpg"]
    shutil.copytree(tmp_path / "cache.partial", tmp_path / "copy.partial")

    skipped = prepare_cache(tree, tmp_path / "cache", 16, skip_unreadable=True)
    assert skipped.images == 46
    assert skipped.reused >= 28
    assert len(skipped.skipped) == 2
    assert cache.verify_cache(tmp_path / "cache") == []
    data = load_data(str(tmp_path / "cache"), 16)
    for path in bad:
        path.unlink()
    direct = load_data(str(tree), 16)
    for name in ("base", "monitor", "novel"):
        assert torch.equal(data.split(name).images, direct.split(name).images)
        assert torch.equal(data.split(name).labels, direct.split(name).labels)
    torch.testing.assert_close(data.mean, direct.mean, rtol=1e-6, atol=0)

    for path, content in zip(bad, kept):
        path.write_bytes(content)
    repaired = prepare_cache(tree, tmp_path / "copy", 16)
    assert (repaired.images, repaired.reused >= 28) == (48, True)
    assert torch.equal(
        load_data(str(tmp_path / "copy"), 16).base.images, load_data(str(tree), 16).base.images
    )


def test_many_unreadable_images_in_a_row_take_no_memory(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where most of a data set's archives were not extracted."""
    for name in "bcde":
        for path in sorted((tree / "train" / name).iterdir())[1:-1]:
            path.write_bytes(b"")
    real, most = os.pread, 7 * 3 * 16 * 16

    def pread(file: int, size: int, offset: int) -> bytes:
        assert size <= most
        return real(file, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    prepare_cache(tree, tmp_path / "cache", 16, skip_unreadable=True)
    assert cache.verify_cache(tmp_path / "cache") == []


def test_names_that_are_no_utf8(tree: Path, tmp_path: Path) -> None:
    (tree / "train" / "a").rename(tree / "train" / os.fsdecode(b"caf\xe9"))
    (tree / "test" / "h" / os.fsdecode(b"\xe9.jpg")).write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        prepare_cache(tree, tmp_path / "cache", 16)
    assert b"/h/\xe9.jpg: " in (tmp_path / "cache.partial" / "unreadable.txt").read_bytes()
    assert prepare_cache(tree, tmp_path / "cache", 16, skip_unreadable=True).images == 48
    assert cache.verify_cache(tmp_path / "cache") == []
    assert prepare_cache(tree, tmp_path / "cache", 16).reused == 48
    assert os.fsdecode(b"caf\xe9") in load_data(str(tmp_path / "cache"), 16).base.class_names


def test_links_that_lead_nowhere_are_left_out(tree: Path, tmp_path: Path) -> None:
    """They are no change of the files, neither for the same command nor for a check."""
    link = tree / "train" / "b" / "away.jpg"
    link.symlink_to(tmp_path / "elsewhere.jpg")
    done = prepare_cache(tree, tmp_path / "cache", 16, skip_unreadable=True)
    assert (done.images, len(done.skipped)) == (48, 1)
    assert cache.verify_cache(tmp_path / "cache") == []
    assert prepare_cache(tree, tmp_path / "cache", 16).reused == 48
    trees.write_image(tmp_path / "elsewhere.jpg", 7)
    assert "have changed since it was made" in cache.verify_cache(tmp_path / "cache")[0]


def test_full_disk_before_the_work(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OutputError, match=r"the disk is full; free .* GB and run the same"):
            prepare_cache(tree, tmp_path / "cache", 16)
    assert prepare_cache(tree, tmp_path / "cache", 16).images == 48


def test_full_disk_during_the_work(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, []

    def fills_up(fd: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: max(1, len(data) // 2)], offset)  # and short writes

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fills_up)
        with pytest.raises(OutputError, match="the disk is full"):
            prepare_cache(tree, tmp_path / "cache", 16)
    assert not (tmp_path / "cache").exists()
    assert prepare_cache(tree, tmp_path / "cache", 16).images == 48
    assert cache.verify_cache(tmp_path / "cache") == []


def test_unwritable_place(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"cannot write.*give --output"):
        prepare_cache(tree, tmp_path / "file" / "cache", 16)


def test_two_builds_at_once(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(done: int, total: int, earlier: int) -> None:
        with pytest.raises(OutputError, match="another process is building this cache"):
            prepare_cache(tree, tmp_path / "cache", 16)

    assert prepare_cache(tree, tmp_path / "cache", 16, advance=second).images == 48


def test_damaged_caches(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    prepare_cache(tree, path, 16)
    images, index = (path / "images.bin").read_bytes(), (path / "index.json").read_text()
    damaged = bytearray(images)
    damaged[8 * 768] ^= 1  # one bit of image 8, in the second chunk
    (path / "images.bin").write_bytes(damaged)
    assert "images 7 to 13 differ from their checksum" in cache.verify_cache(path)[0]
    (path / "images.bin").write_bytes(images[:-1])
    with pytest.raises(DataError, match=r"images\.bin: 36863 bytes, expected 36864"):
        load_data(str(path), 16)
    (path / "images.bin").write_bytes(images)
    content = json.loads(index)
    content["splits"]["train"]["names"][0] = "another"
    for text, message in (
        (json.dumps(content), "changed since it was written"),
        (index[:100], "cannot read this cache"),
        ("[" * 100_000, "cannot read this cache"),
        ('{"format": "dvla-fast-cache/9"}', "format 'dvla-fast-cache/9', not dvla-fast-cache"),
    ):
        (path / "index.json").write_text(text)
        with pytest.raises(DataError, match=message):
            load_data(str(path), 16)


def test_memory_stays_flat_over_ten_epochs(tmp_path: Path) -> None:
    """Reading a cache takes no memory of the process's own: pages belong to the file."""
    status = Path("/proc/self/status")
    if not status.exists() or "RssAnon" not in status.read_text():
        pytest.skip("the system does not tell resident memory apart")
    tree = trees.split_folders(tmp_path / "photos", {"train": "ab", "test": "cd"}, 70)
    prepare_cache(tree, tmp_path / "cache", 224)
    rng = np.random.default_rng(0)

    def own() -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024

    def epoch(images: torch.Tensor) -> int:
        order = torch.from_numpy(rng.permutation(len(images)))
        return sum(int(images[index].numpy().sum()) for index in order.split(16))

    earlier = cache.map_images(tmp_path / "cache", cache.read_index(tmp_path / "cache"))
    first = epoch(earlier)  # whatever the first use of all this takes, it has taken
    before = own()
    images = cache.map_images(tmp_path / "cache", cache.read_index(tmp_path / "cache"))
    assert {epoch(images) for _ in range(10)} == {first}
    assert own() - before < images.numel() / 4
