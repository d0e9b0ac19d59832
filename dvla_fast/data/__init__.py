"""Data sets and episodes: images in memory, class splits, and a seeded few-shot sampler."""

from collections.abc import Callable

from dvla_fast.data.cache import open_cache, prepare_cache
from dvla_fast.data.cache_index import is_cache
from dvla_fast.data.check import check_data
from dvla_fast.data.digits import DIGIT_SPLIT, load_digits
from dvla_fast.data.episodes import EpisodeBatch, EpisodeSampler
from dvla_fast.data.images import FewShotData, ImageSet, hold_out, unit_range
from dvla_fast.data.layouts import list_data
from dvla_fast.data.load import load_images
from dvla_fast.data.splits import load_split_list, split_list_names

__all__ = [
    "DIGIT_SPLIT",
    "EpisodeBatch",
    "EpisodeSampler",
    "FewShotData",
    "ImageSet",
    "check_data",
    "hold_out",
    "is_cache",
    "list_data",
    "load_data",
    "load_digits",
    "load_images",
    "load_split_list",
    "open_cache",
    "prepare_cache",
    "split_list_names",
    "unit_range",
]


def load_data(
    dataset: str,
    image_size: int = 16,
    holdout: float = 0.25,
    split_seed: int = 0,
    splits: str = "",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> FewShotData:
    """Load ``"digits"``, a cache, or the data set in a folder.

    Args:
        dataset: ``"digits"``, a cache of ``dvla-fast data prepare``, or a data set's folder.
        image_size: side of the square images; a cache's own.
        holdout: share of each base class's images kept away from training, for monitoring, where
            there are no validation classes.
        split_seed: seed of that share; part of the data set, not of a run.
        splits: split list, as ``list_data``.
        advance: called with the images of a folder decoded so far and all of them.

    Raises:
        DataError: missing or empty folders, unreadable images, too few of them, unclear splits.
        MissingDependencyError: scikit-learn, Pillow, scipy or timm is needed and not installed.
    """
    if dataset == "digits":
        return load_digits(image_size, holdout, split_seed)
    if is_cache(dataset):
        return open_cache(dataset, image_size, holdout, split_seed, splits)
    return load_images(dataset, image_size, holdout, split_seed, splits, advance)
