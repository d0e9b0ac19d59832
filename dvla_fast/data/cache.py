"""A data set decoded once into a file of uint8 images that training maps into memory.

A cache is a folder: ``images.bin``, (N, 3, S, S) uint8 without a header, split by split and class
by class, and ``index.json``: classes, labels, where each image came from, the channel statistics of
the base images, and checksums. It is built beside its place as ``<name>.partial`` and renamed when
it is whole, so a cache that can be opened is complete. A build that was stopped at any moment
continues: every finished chunk is on record with its checksum and with the size and time of the
files it was made from.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dvla_fast.data.cache_index import (
    FORMAT,
    IMAGES,
    INDEX,
    check_split,
    index_checksum,
    is_cache,
    map_images,
    read_index,
)
from dvla_fast.data.cache_journal import JOURNAL, SETTINGS, keep_settings, read_entries
from dvla_fast.data.decode import check_size, decode, pillow
from dvla_fast.data.equal import in_two_splits, row_hash, warn_of_shared
from dvla_fast.data.images import FewShotData, ImageSet
from dvla_fast.data.layouts import list_data
from dvla_fast.data.listing import Listing
from dvla_fast.data.load import assemble, warn_if_enlarged
from dvla_fast.data.splits import SPLITS, published_name
from dvla_fast.errors import DataError, OutputError
from dvla_fast.files import state_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ANY_NAME = "surrogateescape"  # names of files may hold bytes that are no UTF-8
# Images of a chunk: the unit of decoding in parallel, of checksums, and of what a kill can cost.
CHUNK = 128


@dataclass(frozen=True)
class Prepared:
    """What ``prepare_cache`` did: images in the cache, decoded now, kept, and left out."""

    path: Path
    images: int
    decoded: int
    reused: int
    skipped: tuple[str, ...] = ()


def prepare_cache(
    root: str | Path,
    output: str | Path,
    image_size: int = 224,
    splits: str = "",
    *,
    skip_unreadable: bool = False,
    workers: int = 0,
    advance: Callable[[int, int, int], None] = lambda done, total, earlier: None,
) -> Prepared:
    """Decode a data set once into a cache, in parallel; continue a build that was stopped.

    Args:
        root, splits: as ``list_data``.
        output: folder of the cache, new; ``<output>.partial`` holds it until it is whole.
        image_size: side S of the square images.
        skip_unreadable: leave unreadable images out, on record, instead of failing in the end.
        workers: threads; 0: one for each core.
        advance: called with the images done so far, all of them, and those of the done ones
            that an earlier call made.

    Raises:
        DataError: as ``list_data``; unreadable images (all are looked at first, and named in
            ``unreadable.txt``); a cache of other files in the way; or a size below 1.
        OutputError: not writable, not enough space, or another process builds it right now.
    """
    pillow()
    check_size(image_size)
    output = Path(output)
    if is_cache(root):
        made_from = read_index(root)["root"]
        raise DataError(f"{root}: is a cache; give the folder that it was made from, {made_from}")
    listing = list_data(root, splits, absent_ok=skip_unreadable)
    warn_if_enlarged(listing.root, listing.reduced, image_size)
    builder = _Builder(listing, output, image_size, splits)
    if os.path.lexists(output):  # a link that leads nowhere is in the way, too
        return builder.already_there()
    try:
        with builder.open(advance):
            builder.run(workers or os.cpu_count() or 1, advance)
            return builder.finish(skip_unreadable)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(
                f"{builder.partial}: the disk is full; free {builder.size / 1e9:.2f} GB and run "
                "the same command again: what is done stays"
            ) from error
        raise OutputError(
            f"{builder.partial}: cannot write ({error.strerror or error}); give --output a folder "
            "that you may write to"
        ) from error


class _Builder:
    """One build: the rows of all splits in order, in chunks."""

    def __init__(self, listing: Listing, output: Path, image_size: int, splits: str = "") -> None:
        self.listing, self.output, self.image_size = listing, output, image_size
        self.option = str(Path(splits).resolve()) if splits.endswith(".json") else splits
        self.partial = output.parent / f"{output.name}.partial"  # "." has no name
        self.rows = [(split, i) for split in listing.splits.values() for i in range(len(split))]
        self.base_rows = len(listing.splits["train"]) if "train" in listing.splits else 0
        self.stride = 3 * image_size**2
        self.size = len(self.rows) * self.stride
        if not self.rows:
            raise DataError(f"{listing.root}: no images here; check the split list")
        self.chunks = range(0, len(self.rows), CHUNK)
        self.done: dict[int, dict[str, Any]] = {}
        self.reused = 0
        self.fd = -1

    def fingerprint(self, start: int) -> str:
        """Hash what a chunk is made from: sizes and times of files, or what is stored."""
        digest = hashlib.sha256(f"{FORMAT} {self.image_size}".encode())
        for split, index in self.rows[start : start + CHUNK]:
            source = split.references[index]
            if isinstance(source, Path):
                name = self.listing.image_id(split, index)
                line = f"{name}\0{state_of(source)}\n"
                digest.update(line.encode(errors=_ANY_NAME))
            else:
                digest.update(split.stored(index))
        return digest.hexdigest()

    def already_there(self) -> Prepared:
        """Accept the finished cache in the way if it is this one."""
        if not is_cache(self.output):
            raise OutputError(f"{self.output}: exists and is no cache; give --output a new folder")
        index = read_index(self.output)
        if index["fingerprint"] != self.total_fingerprint():
            raise DataError(
                f"{self.output}: a cache made from other files, or for another size or split, is "
                f"here (from {index['root']}, {index['image_size']} pixels); give --output another "
                "folder, or remove that cache"
            )
        return Prepared(self.output, index["images"], 0, index["images"])

    def total_fingerprint(self) -> str:
        """Hash all chunks' origins and the division into splits."""
        digest = hashlib.sha256()
        for start in self.chunks:
            # what was decoded, where it was just now; else what is on disk
            entry = self.done.get(start)
            digest.update((entry["fingerprint"] if entry else self.fingerprint(start)).encode())
        for name, split in self.listing.splits.items():
            digest.update(f"{name}{split.keys}{split.counts().tolist()}".encode())
        return digest.hexdigest()

    @contextmanager
    def open(self, advance: Callable[[int, int, int], None]) -> Iterator[None]:
        """Make or reopen the partial folder, alone, with room for all images.

        Args:
            advance: called as the images of finished chunks are read.
        """
        import fcntl  # not on every system

        self.partial.mkdir(parents=True, exist_ok=True)
        with open(self.partial / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputError(
                    f"{self.partial}: another process is building this cache; wait for it"
                ) from error
            entries = read_entries(self.partial)
            settings = (str(self.listing.root.resolve()), self.image_size, self.option)
            keep_settings(self.partial, settings, lambda: all(map(self._fits, entries)))
            self.fd = os.open(self.partial / IMAGES, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                # All the space now, not a full disk after hours.
                before = os.fstat(self.fd).st_size
                try:
                    os.posix_fallocate(self.fd, 0, self.size)
                except OSError:
                    os.ftruncate(self.fd, before)
                    raise
                self._reuse(entries, advance)
                yield
            finally:
                os.close(self.fd)

    def _fits(self, entry: dict[str, Any]) -> bool:
        start = entry["start"]
        return start in self.chunks and entry["fingerprint"] == self.fingerprint(start)

    def _reuse(
        self, entries: list[dict[str, Any]], advance: Callable[[int, int, int], None]
    ) -> None:
        for entry in filter(self._fits, entries):
            start = entry["start"]
            count = min(CHUNK, len(self.rows) - start)
            stored = os.pread(self.fd, count * self.stride, start * self.stride)
            if hashlib.sha256(stored).hexdigest() == entry["sha256"]:
                self.done[start] = entry
                self.reused += count
                advance(self.reused, len(self.rows), self.reused)

    def run(self, workers: int, advance: Callable[[int, int, int], None]) -> None:
        """Decode the chunks that are not on record."""
        done = self.reused
        with (
            ThreadPoolExecutor(workers) as pool,  # Pillow releases the GIL while it decodes
            open(self.partial / JOURNAL, "a", encoding="utf-8") as journal,
        ):
            if self.done:
                journal.write("\n")  # ends a line that a kill tore
            for start in self.chunks:
                if start in self.done:
                    continue
                entry = self._chunk(start, pool)
                # The images must be on the disk before the record that says so.
                os.fdatasync(self.fd)
                journal.write(json.dumps(entry, allow_nan=False) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
                self.done[start] = entry
                done += min(CHUNK, len(self.rows) - start)
                advance(done, len(self.rows), self.reused)

    def _chunk(self, start: int, pool: ThreadPoolExecutor) -> dict[str, Any]:
        rows = self.rows[start : start + CHUNK]
        images = np.zeros((len(rows), self.stride), dtype=np.uint8)
        bad: dict[str, str] = {}

        def fill(index: int) -> tuple[bytes, NDArray[np.int64]]:
            split, row = rows[index]
            try:
                images[index] = decode(split.source(row), self.image_size).reshape(-1)
            except DataError as error:
                bad[str(start + index)] = str(error)
            return row_hash(images[index]), _sums(images[index])

        fingerprint = self.fingerprint(start)
        hashes, sums = zip(*pool.map(fill, range(len(rows))))
        base = max(0, min(len(rows), self.base_rows - start))
        total, square = np.stack([np.zeros((2, 3), np.int64), *sums[:base]]).sum(0).tolist()
        _write(self.fd, images.data, start * self.stride)
        return {
            "start": start,
            "fingerprint": fingerprint,
            "sha256": hashlib.sha256(images.data).hexdigest(),
            "sum": total,
            "square": square,
            "rows": b"".join(hashes).hex(),
            "bad": bad,
        }

    def finish(self, skip_unreadable: bool) -> Prepared:
        """Close the gaps of unreadable images, write the index, and put the cache in its place."""
        bad = {int(row): text for entry in self.done.values() for row, text in entry["bad"].items()}
        if bad:
            report = self.partial / "unreadable.txt"
            lines = "".join(f"{bad[row]}\n" for row in sorted(bad))
            report.write_text(lines, encoding="utf-8", errors=_ANY_NAME)
        if bad and not skip_unreadable:
            raise DataError(
                f"{bad[min(bad)]} ({len(bad)} of {len(self.rows)} images cannot be read, all named "
                f"in {report}); the others are done and stay: replace the files and run the same "
                "command again, or leave them out with --skip_unreadable"
            )
        keep = [row for row in range(len(self.rows)) if row not in bad]
        index = self._index(keep, tuple(bad[row] for row in sorted(bad)))
        index["sha256"] = self._compact(keep)
        warn_of_shared(str(self.listing.root), index["shared"])
        index["index_sha256"] = index_checksum(index)
        with open(self.partial / INDEX, "w", encoding="utf-8") as stream:
            json.dump(index, stream, allow_nan=False)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(self.partial, self.output)
        for name in (JOURNAL, SETTINGS, "lock", "unreadable.txt"):
            (self.output / name).unlink(missing_ok=True)
        decoded = len(keep) - self.reused
        return Prepared(self.output, len(keep), decoded, self.reused, tuple(index["skipped"]))

    def _compact(self, keep: list[int]) -> list[str]:
        """Move the kept rows together, chunk by chunk; returns the chunks' checksums.

        Chunks that stay as they are have theirs on record and are not read again.
        """
        checksums = []
        for start in range(0, len(keep), CHUNK):
            rows = keep[start : start + CHUNK]
            if rows == list(range(start, min(start + CHUNK, len(self.rows)))):
                checksums.append(self.done[start]["sha256"])
                continue
            images = b"".join(
                os.pread(self.fd, count * self.stride, first * self.stride)
                for first, count in _runs(rows)
            )
            _write(self.fd, images, start * self.stride)
            checksums.append(hashlib.sha256(images).hexdigest())
        os.ftruncate(self.fd, len(keep) * self.stride)
        os.fsync(self.fd)
        return checksums

    def _index(self, keep: list[int], skipped: tuple[str, ...]) -> dict[str, Any]:
        from dvla_fast import __version__

        listing, kept = self.listing, set(keep)
        splits: dict[str, dict[str, Any]] = {}
        row = 0
        for name, split in listing.splits.items():
            here = [i for i in range(len(split)) if row + i in kept]
            row += len(split)
            counts = np.bincount(split.labels[here], minlength=len(split.keys))
            if (counts < 2).any():
                raise DataError(
                    f"{split.where}: without its unreadable images, class "
                    f"{split.keys[int(counts.argmin())]!r} has {counts.min()}; a class needs at "
                    "least 2: replace the files"
                )
            splits[name] = {
                "keys": list(split.keys),
                "names": list(split.names),
                "counts": counts.tolist(),
                "files": [listing.image_id(split, i) for i in here],
            }
        known = listing.split_list
        pixels = sum(splits["train"]["counts"]) * self.image_size**2 if self.base_rows else 0
        total = np.sum([entry["sum"] for entry in self.done.values()], 0)
        square = np.sum([entry["square"] for entry in self.done.values()], 0)
        return {
            "format": FORMAT,
            "name": listing.name,
            "root": str(listing.root.resolve()),
            "layout": listing.layout,
            "split_list": known.name if known else "",
            "splits_option": self.option,
            "source": list(known.source) if known else [],
            "image_size": self.image_size,
            "images": len(keep),
            "splits": splits,
            "statistics": _statistics(total, square, pixels),
            "reduced": listing.reduced,
            "file_order": all(split.file_order for split in listing.splits.values()),
            "shared": self._shared(keep),
            "skipped": list(skipped),
            "fingerprint": self.total_fingerprint(),
            "dvla_fast": __version__,
            "pillow": pillow().__version__,
        }

    def _shared(self, keep: list[int]) -> list[str]:
        """Describe the images that lie in two splits."""
        hashes = bytes.fromhex("".join(self.done[start]["rows"] for start in self.chunks))
        kept = b"".join(hashes[8 * row : 8 * row + 8] for row in keep)
        names = {id(split): name for name, split in self.listing.splits.items()}
        rows = (self.rows[row] for row in keep)
        places = [(names[id(split)], self.listing.image_id(split, i)) for split, i in rows]
        return list(in_two_splits(kept, places))


def _sums(image: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Sums of a channel's values and of their squares: (2, 3)."""
    pixels = image.reshape(3, -1)
    squares = np.square(pixels, dtype=np.uint16)  # 255 * 255 fits
    return np.stack([pixels.sum(1, dtype=np.int64), squares.sum(1, dtype=np.int64)])


def _statistics(total: Any, square: Any, pixels: int) -> dict[str, list[float]] | None:
    if not pixels:
        return None
    mean = total / pixels / 255
    variance = square / pixels / 255**2 - mean**2
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(variance, 1e-8)).tolist()}


def _runs(rows: list[int]) -> list[tuple[int, int]]:
    """The first and the number of rows that follow each other; gigabytes may lie between runs."""
    grouped = itertools.groupby(enumerate(rows), lambda place: place[1] - place[0])
    runs = [[row for _, row in run] for _, run in grouped]
    return [(run[0], len(run)) for run in runs]


def _write(fd: int, images: bytes | memoryview, offset: int) -> None:
    # pwrite, not a map: a full disk is an error here, but kills a process that writes to a map.
    view = memoryview(images).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def open_cache(
    path: str | Path, image_size: int, holdout: float = 0.25, split_seed: int = 0, splits: str = ""
) -> FewShotData:
    """Map a cache: no image is read before it is used, and all processes share one copy.

    Its checksums are not computed here; ``dvla-fast data check`` does.

    Returns:
        FewShotData with mapped uint8 images (N, 3, S, S). Without validation classes, the two parts
        of the base images are copied into memory.

    Raises:
        DataError: damaged, or made for another size or split list than asked for.
    """
    path = Path(path)
    index = read_index(path)
    if index["image_size"] != image_size:
        raise DataError(
            f"{path}: holds {index['image_size']}-pixel images, not {image_size}; set "
            f"--data.image_size {index['image_size']}, or prepare another cache"
        )
    check_split(path, index, splits)
    warn_if_enlarged(path, index["reduced"], image_size)
    warn_of_shared(str(path), index["shared"])
    images = map_images(path, index)
    sets, row = {}, 0
    for name in SPLITS:
        if name not in index["splits"]:
            continue
        entry = index["splits"][name]
        counts = torch.tensor(entry["counts"])
        labels = torch.arange(len(counts)).repeat_interleave(counts)
        part = images[row : row + len(labels)]
        row += len(labels)
        names, ids = tuple(entry["names"]), tuple(entry["files"])
        sets[name] = ImageSet(
            f"{path} ({name})", part, labels, names, mapped=True, ids=ids,
            file_order=index["file_order"],
        )  # fmt: skip
    known = index["statistics"]
    statistics = (torch.tensor(known["mean"]), torch.tensor(known["std"])) if known else None
    keys = {name: entry["keys"] for name, entry in index["splits"].items()}
    published = published_name(index["split_list"], keys)
    data = assemble(index["name"], sets, holdout, split_seed, statistics, published)
    return replace(data, shared=tuple(index["shared"]), reduced=index["reduced"])


def verify_cache(path: str | Path, look: Callable[[bytes], None] = lambda chunk: None) -> list[str]:
    """Compute all checksums of a cache again, and look whether its files changed since.

    Args:
        look: called with the bytes of each chunk of images in turn.

    Returns:
        The problems found, one line each; empty: sound.

    Raises:
        DataError: as ``read_index``.
    """
    path = Path(path)
    index = read_index(path)
    problems = []
    stride = 3 * index["image_size"] ** 2
    with open(path / IMAGES, "rb") as stream:
        for number, expected in enumerate(index["sha256"]):
            chunk = stream.read(CHUNK * stride)
            look(chunk)
            if hashlib.sha256(chunk).hexdigest() != expected:
                first = number * CHUNK
                last = min(first + CHUNK, index["images"]) - 1
                problems.append(
                    f"{path / IMAGES}: images {first} to {last} differ from their checksum; "
                    "remove the folder and run 'dvla-fast data prepare' again"
                )
    if Path(index["root"]).is_dir():
        try:
            listing = list_data(index["root"], index["splits_option"], absent_ok=True)
            current = _Builder(listing, path, index["image_size"]).total_fingerprint()
        except (DataError, OSError) as error:
            problems.append(f"{path}: the files it was made from have changed ({error})")
        else:
            if current != index["fingerprint"]:
                problems.append(
                    f"{path}: the files in {index['root']} have changed since it was made; remove "
                    "the folder and run 'dvla-fast data prepare' again"
                )
    return problems
