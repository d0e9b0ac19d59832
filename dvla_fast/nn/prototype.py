"""The cosine prototype classifier of method §3: a query goes to the nearest class mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dvla_fast.arguments import expect_number, expect_tensor
from dvla_fast.nn.episode_checks import check_support_labels
from dvla_fast.reference import in_own_precision


def prototypes(features: Tensor, labels: Tensor, way: int) -> Tensor:
    """Class means of support features.

    Args:
        features: (E, S, d).
        labels: (E, S) int64 in [0, way).
        way: number of classes.

    Returns:
        (E, way, d) in the features' dtype; 0 for a class without support.
    """
    members = labels.unsqueeze(-1) == torch.arange(way, device=labels.device)  # [E, S, way]
    wide = torch.promote_types(features.dtype, torch.float32)  # a sum may pass float16's range
    weights = members.to(wide)
    with in_own_precision(features):
        sums = weights.transpose(1, 2) @ features.to(wide)
    return (sums / weights.sum(1).clamp_min(1).unsqueeze(-1)).to(features.dtype)


def prototype_logits(
    support_features: Tensor,
    support_labels: Tensor,
    query_features: Tensor,
    way: int,
    temperature: float = 0.2,
) -> Tensor:
    """Cosine similarity of queries to class means, divided by the temperature.

    Args:
        support_features: (E, S, d).
        support_labels: (E, S) int64 in [0, way).
        query_features: (E, Q, d); or (E, Q, way, d), one for the comparison with each class.
        way: number of classes.
        temperature: > 0 (the authors' code: 0.2).

    Returns:
        (E, Q, way), at least float32: rounding in half types turns close classes into ties.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit together; where values are checked
            (:func:`dvla_fast.functional.set_value_checks`), labels out of range or a class without
            supports.
    """
    _check(support_features, support_labels, query_features, way, temperature)
    return nearest_prototypes(support_features, support_labels, query_features, way, temperature)


def nearest_prototypes(
    support_features: Tensor,
    support_labels: Tensor,
    query_features: Tensor,
    way: int,
    temperature: float,
) -> Tensor:
    """:func:`prototype_logits` of what was checked already."""
    wide = torch.promote_types(support_features.dtype, query_features.dtype)
    wide = torch.promote_types(wide, torch.float32)
    with in_own_precision(support_features):
        means = F.normalize(prototypes(support_features.to(wide), support_labels, way), dim=-1)
        queries = F.normalize(query_features.to(wide), dim=-1)
        if queries.dim() == 4:
            return torch.linalg.vecdot(queries, means.unsqueeze(1)) / temperature
        return queries @ means.transpose(1, 2) / temperature


def _check(support: Tensor, labels: Tensor, query: Tensor, way: int, temperature: float) -> None:
    for name, tensor, known in (
        ("support_features", support, (3,)),
        ("query_features", query, (3, 4)),
    ):
        expect_tensor(name, tensor)
        if tensor.dim() not in known:
            wanted = " or ".join(map(str, known))
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {wanted} dimensions")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating tensor, got {tensor.dtype}")
    fits = query.shape[0] == support.shape[0] and query.shape[-1] == support.shape[-1]
    if not fits or (query.dim() == 4 and query.shape[2] != way):
        raise ValueError(
            f"query_features: shape {tuple(query.shape)} does not fit support_features"
            f" {tuple(support.shape)}"
        )
    check_support_labels(labels, support.shape[:2], way)
    check_temperature(temperature)


def check_temperature(temperature: float | Tensor) -> None:
    """Raises TypeError or ValueError unless it is a positive number, or a tensor of one."""
    if not isinstance(temperature, Tensor):
        expect_number("temperature", temperature)
    elif temperature.numel() != 1:
        raise TypeError(
            f"temperature: expected a number, got a tensor of shape {tuple(temperature.shape)}"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a positive finite number, got {temperature}")
