"""The handwritten digits that ship with scikit-learn: 1,797 real 8 x 8 scans of ten classes.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository (the test part, as bundled with scikit-learn).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dvla_fast.data.images import FewShotData, ImageSet, channel_statistics, hold_out
from dvla_fast.errors import DataError, MissingDependencyError

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# The "even-odd" split: train on the even digits, and evaluate on the odd ones. Parity says nothing
# about shape, and it was fixed before the first run: it favours no result and is never tuned.
DIGIT_SPLIT: dict[str, tuple[int, ...]] = {"base": (0, 2, 4, 6, 8), "novel": (1, 3, 5, 7, 9)}


def load_digits(image_size: int = 16, holdout: float = 0.25, split_seed: int = 0) -> FewShotData:
    """Load the digits, resized bilinearly, under the even-odd split.

    Returns:
        FewShotData with float32 images (N, 1, image_size, image_size) in [0, 1]; ``monitor`` is
        the held-out share of the base classes' images.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
        DataError: an image size below 8, or a holdout that is out of range or takes all.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise MissingDependencyError(
            "the digits data set comes with scikit-learn, which is not installed; run "
            "pip install 'dvla-fast[train]'"
        ) from error
    if image_size < 8:
        raise DataError(f"image_size must be at least 8 for the digits, got {image_size}")
    if not 0 < holdout < 1:
        raise DataError(f"holdout must be between 0 and 1 (both excluded), got {holdout}")
    bunch = sklearn_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16  # 0..16 grey levels
    size = (image_size, image_size)
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    target = torch.from_numpy(bunch.target).long()
    base_all = _pick(images, target, DIGIT_SPLIT["base"], "digits/base")
    kept, held = hold_out(base_all.labels, holdout, split_seed, base_all.class_names)
    base = base_all.subset(kept, "digits/base")
    monitor = base_all.subset(held, "digits/monitor")
    novel = _pick(images, target, DIGIT_SPLIT["novel"], "digits/novel")
    mean, std = channel_statistics(base.images)
    kind = "held-out images of the base classes"
    return FewShotData("digits", base, monitor, novel, kind, mean, std)


def _pick(
    images: torch.Tensor, target: torch.Tensor, digits: tuple[int, ...], name: str
) -> ImageSet:
    lookup = torch.full((10,), -1, dtype=torch.int64)
    lookup[list(digits)] = torch.arange(len(digits))
    labels = lookup[target]
    chosen = labels >= 0
    names = tuple(DIGIT_NAMES[i] for i in digits)
    ids = tuple(f"digits[{row}]" for row in chosen.nonzero()[:, 0].tolist())
    return ImageSet(name, images[chosen].contiguous(), labels[chosen], names, ids=ids)
