"""Rows of an ablation: what they change, how they are chosen and named, how a table shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dvla_fast.engine.ablation_tables import _estimate
from dvla_fast.engine.ablation_variants import GROUPS, all_variants, chosen_variants
from dvla_fast.engine.config import AblateConfig, AblateRun, DemoRun, SemanticsConfig
from dvla_fast.engine.settings import UsageError, read_settings
from dvla_fast.semantics.importing import read_published, save_published

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def config(tiny: DemoRun) -> AblateRun:
    return AblateRun(
        model=tiny.model,
        semantics=SemanticsConfig(top_k=3),
        metatune=tiny.metatune,
        ablate=AblateConfig(variants=["visual", "alpha=0.5"]),
    )


def test_every_row_of_the_method_is_there(config: AblateRun) -> None:
    config.semantics.bank = "shapes"
    variants = {row.name: row for row in all_variants(config, 1)}
    assert {row.group for row in variants.values()} == set(GROUPS)
    assert set(variants) >= {
        "full", "visual", "name", "attributes", "description", "shuffled", "no-top-k", "true",
        "alpha=0", "alpha=0.25", "alpha=0.5", "alpha=0.75", "alpha=1", "static", "mlp",
        "ppo", "grpo", "counterfactual", "dpo", "pathwise", "scope=class",
        "entropy=0", "temperature=0.1", "levels=equal", "levels=swapped",
    }  # fmt: skip
    assert not {"k=3", "reinforce"} & set(variants)  # those are the base itself
    for row in variants.values():
        changed = row.apply(config)
        assert (changed != config) == bool(row.overrides), row.name
    assert variants["alpha=0.25"].apply(config).model.fixed_alpha == 0.25
    assert variants["levels=swapped"].apply(config).model.level_weights == [[0.3, 0.7], [0.7, 0.3]]
    assert "levels=shallow-first" not in variants  # the base, too


def test_rows_need_the_texts_that_they_are_about(config: AblateRun, tmp_path: Path) -> None:
    config.ablate = AblateConfig(groups=["semantics"])
    torch.save({"semantic_feature": {"jay": torch.ones(6)}}, tmp_path / "d.pth")
    torch.save({"attribute_features": {"jay": torch.ones(2, 6)}}, tmp_path / "a.pth")
    both = read_published([tmp_path / "d.pth", tmp_path / "a.pth"])
    save_published(both, tmp_path / "both.json")
    config.semantics = SemanticsConfig(bank=str(tmp_path / "both.json"))
    rows = ["full", "visual", "attributes", "description", "shuffled"]  # no name without words
    assert [row.name for row in chosen_variants(config, 1)] == rows
    save_published(read_published([tmp_path / "d.pth"]), tmp_path / "one.json")
    config.semantics = SemanticsConfig(bank=str(tmp_path / "one.json"))
    assert [row.name for row in chosen_variants(config, 1)] == ["full", "visual", "shuffled"]


def test_groups_and_variants(config: AblateRun) -> None:
    assert [row.name for row in chosen_variants(config, 1)] == ["full", "visual", "alpha=0.5"]
    config.ablate = AblateConfig(groups=["scope"])
    names = [row.name for row in chosen_variants(config, 1)]
    assert names == ["full", "scope=class", "scope=candidate"]
    for bad, words in (
        ({"groups": ["semantic"]}, "did you mean 'semantics'"),
        ({"variants": ["alpha=0.3"]}, "alpha=0.3"),
        ({"reference": "best"}, "reference"),
        ({"variants": ["kappa=10"]}, "'kappa=10' is what the base .* already: the row 'full'$"),
        ({"reference": "scope=episode"}, "'scope=episode' is what the base"),
    ):
        config.ablate = AblateConfig(**bad)
        with pytest.raises(UsageError, match=words):
            chosen_variants(config, 1)


def test_no_layers_are_those_of_the_backbone(config: AblateRun) -> None:
    config.ablate.layers = [[], [[3, 0]], [[2, 1], [3, 0]]]
    names = [row.name for row in all_variants(config, 1)]
    assert [name for name in names if name.startswith("layers=")] == ["layers=3.0"]
    config.model.gated_layers = [[3, 0]]
    names = [row.name for row in all_variants(config, 1)]
    assert [name for name in names if name.startswith("layers=")] == ["layers=2.1+3.0"]


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.00004, 0.0061, "+0.00200 [+0.00004, +0.00610]"),
        (-0.0061, -0.0041, "+0.002 [-0.006, -0.004]"),
        (-0.004, 0.004, "+0.002 [-0.004, +0.004]"),
        (0.1, 0.2, "+0.00 [+0.10, +0.20]"),
        (0.0, 0.0, "+0.00 [+0.00, +0.00]"),
        (None, None, "+0.00 [unknown]"),
    ],
)
def test_an_interval_shows_where_it_is_and_how_wide(
    low: float | None, high: float | None, shown: str
) -> None:
    assert _estimate({"estimate": 0.002, "low": low, "high": high}, 1) == shown


def test_a_fixed_base_keeps_the_rows_of_other_gates(config: AblateRun) -> None:
    config.model.policy, config.model.fixed_alpha = "fixed", 0.25
    names = {row.name for row in all_variants(config, 1)}
    assert {"alpha=0", "alpha=0.5", "alpha=0.75", "alpha=1", "static", "mlp"} <= names
    assert "alpha=0.25" not in names  # the base itself


@pytest.mark.parametrize("parts", ["attributes", "description", "name", "shuffled"])
def test_a_base_of_other_texts_is_called_by_them(config: AblateRun, parts: str) -> None:
    config.semantics = SemanticsConfig(bank="shapes", top_k=3, parts=parts)
    variants = {row.name: row for row in all_variants(config, 1)}
    assert parts not in variants  # the base itself
    both = [row.title for row in variants.values() if "attributes and description" in row.title]
    assert both == []
    configurations = [row.apply(config) for row in variants.values() if row.trains]
    assert all(other != config for other in configurations[1:])
    assert ("no-top-k" in variants) == (parts in ("attributes", "shuffled"))
    assert ("no-top-k-attributes" in variants) == (parts != "attributes")
    config.ablate.variants = [parts]
    with pytest.raises(UsageError, match="is what the base configuration has already"):
        chosen_variants(config, 1)


def test_near_values_are_variants_of_their_own(config: AblateRun) -> None:
    config.ablate = AblateConfig(groups=["kappa"], kappa=[1e-3, 1234567.0, 1234568.0])
    names = [row.name for row in chosen_variants(config, 1)]
    assert names == ["full", "kappa=0.001", "kappa=1234567.0", "kappa=1234568.0"]


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("ablation_shapes", set(GROUPS)),
        ("ablation_digits", set(GROUPS)),
        ("ablation_shapes_varied", {"semantics", "alpha", "levels", "scope"}),
    ],
)
def test_shipped_configurations(name: str, groups: set[str]) -> None:
    shipped = read_settings(str(CONFIGS / f"{name}.yaml"), AblateRun, AblateRun())
    assert shipped.ablate.seeds >= 5
    assert shipped.semantics.top_k > 0
    assert shipped.metatune.backbone_lr == 0
    variants = chosen_variants(shipped, 1 if shipped.data.dataset == "digits" else 3)
    assert {row.group for row in variants} == groups
