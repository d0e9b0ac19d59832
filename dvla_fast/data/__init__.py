"""Data sets and episodes: images in memory, class splits, and a seeded few-shot sampler."""

from dvla_fast.data.digits import DIGIT_SPLIT, load_digits
from dvla_fast.data.episodes import EpisodeBatch, EpisodeSampler
from dvla_fast.data.folder import load_image_folder
from dvla_fast.data.images import FewShotData, ImageSet, hold_out

__all__ = [
    "DIGIT_SPLIT",
    "EpisodeBatch",
    "EpisodeSampler",
    "FewShotData",
    "ImageSet",
    "hold_out",
    "load_data",
    "load_digits",
    "load_image_folder",
]


def load_data(
    dataset: str, image_size: int = 16, holdout: float = 0.25, split_seed: int = 0
) -> FewShotData:
    """Load ``"digits"`` or the image folder at a path.

    Args:
        dataset: ``"digits"``, or the root of an image-folder data set.
        image_size: side of the square images.
        holdout: share of each base class's images kept away from training, for monitoring.
        split_seed: seed of that share; part of the data set, not of a run.

    Raises:
        DataError: missing or empty folders, unreadable images, too few of them.
        MissingDependencyError: scikit-learn or Pillow is not installed.
    """
    if dataset == "digits":
        return load_digits(image_size, holdout, split_seed)
    return load_image_folder(dataset, image_size, holdout, split_seed)
