"""Images a second from a prepared cache, beside decoding the JPEG files again with Pillow.

One call is a batch of 64 random images of 224 pixels, uint8 (64, 3, 224, 224). Made JPEGs of 500 x
375 pixels at quality 90, smooth shapes with a little noise, about as large as photographs are.
A row is timed only after both ways gave the same batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dvla_fast.data import list_data, prepare_cache
from dvla_fast.data.cache_index import map_images, read_index
from dvla_fast.data.decode import decode

BATCH, SIZE, IMAGES = 64, 224, 512
SECONDS_A_ROW = 2.0
PROVIDERS = ["dvla_fast", "Pillow"]
# More threads than cores measure the scheduler.
THREADS = [n for n in (1, 2) if n <= (os.cpu_count() or 1)]


def photograph(rng: np.random.Generator) -> Image.Image:
    """Smooth colours, as large areas of photographs are, and the noise of a sensor."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
    noise = rng.normal(0, 6, (375, 500, 1)).astype(np.int16)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Tensor, float]:
    """The files, the cache's images in the same order, and kilobytes a file."""
    root = tmp_path_factory.mktemp("image_cache")
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("test", 4)):
        for number in range(count):
            folder = root / "photos" / split / f"{split}{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            photograph(rng).save(folder / f"{number}.jpg", quality=90)
    prepare_cache(root / "photos", root / "cache", SIZE)
    files = [Path(str(path)) for path in list_data(root / "photos").splits["train"].references]
    kilobytes = sum(path.stat().st_size for path in files) / len(files) / 1000
    return files, map_images(root / "cache", read_index(root / "cache"))[:IMAGES], kilobytes


def reader(provider: str, files: list[Path], images: Tensor, threads: int) -> Callable:
    """A function from positions (64,) to a batch."""
    if provider == "dvla_fast":
        return lambda index: images[index]
    pool = ThreadPoolExecutor(threads)
    return lambda index: torch.from_numpy(
        np.stack(list(pool.map(lambda i: decode(files[i], SIZE), index.tolist())))
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("threads", THREADS)
def test_image_cache(benchmark, data, threads: int, provider: str) -> None:
    files, images, kilobytes = data
    read = reader(provider, files, images, threads)
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[tuple, dict]:
        return (torch.randperm(IMAGES, generator=generator)[:BATCH],), {}

    index = batch()[0][0]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(read(index), reader("Pillow", files, images, 1)(index)), "not timed"
        begin = time.perf_counter()
        read(index)
        rounds = int(min(100, max(3, SECONDS_A_ROW / (time.perf_counter() - begin))))
        benchmark.group = f"image_cache {BATCH} images {SIZE} px, {threads} thread(s)"
        benchmark.name = provider
        benchmark.extra_info.update(threads=threads, kilobytes_a_file=round(kilobytes, 1))
        benchmark.pedantic(read, setup=batch, rounds=rounds)
    finally:
        torch.set_num_threads(before)
