"""What an ablation concludes from its cells: claims, the best fixed gate, corrected p values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvla_fast.engine.ablate import summarise
from dvla_fast.engine.ablation_cells import Cell, Store
from dvla_fast.engine.ablation_claims import _best_fixed, _claim, weigh_claims
from dvla_fast.engine.ablation_variants import Variant
from dvla_fast.engine.config import AblateConfig, AblateRun, EvaluateConfig
from dvla_fast.statistics import holm

SEEDS, SHOTS = range(2), (1, 5)
# mean accuracies by shot; those of other variants are not computed
MEANS = {
    "full": (0.7, 0.8),
    "visual": (0.4, 0.7),
    "name": (0.6, 0.85),
    "alpha=0.25": (0.65, 0.78),
    "alpha=0.75": (0.5, 0.5),
}


@pytest.fixture
def config() -> AblateRun:
    return AblateRun(
        evaluate=EvaluateConfig(shots=list(SHOTS)),
        ablate=AblateConfig(seeds=len(SEEDS), draws=200),
    )


def accuracies(mean: float, seed: int) -> np.ndarray:
    """20 episodes around a mean over the seeds, the same in every variant but for a little."""
    ripple = 0.01 * mean * np.cos(np.arange(20) * np.pi / 2)  # adds up to 0
    return mean + ripple + 0.001 * mean * (2 * seed - 1)


def cell(variant: str, seed: int) -> dict[str, np.ndarray]:
    means = zip(SHOTS, MEANS[variant])
    return {f"accuracy-{shot}": accuracies(mean, seed) for shot, mean in means}


def rows(monitor: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [{"variant": name, "monitor_accuracy": seeds} for name, seeds in monitor.items()]


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(0.1, 0.2), (0.01, 0.3)], "supported"),
        ([(0.1, 0.2), (-0.1, 0.3)], "not shown"),
        ([(-0.1, 0.2), (0.1, 0.3)], "not shown"),
        ([(0.1, 0.2), (None, None)], "not shown"),
        ([(0.1, 0.2), (-0.3, -0.1)], "against"),
        ([(0.0, 0.0)], "not shown"),
        ([], "not computed"),
    ],
)
def test_a_claim_holds_when_all_its_tests_say_so(intervals: list[Any], verdict: str) -> None:
    tests = [{"low": low, "high": high} for low, high in intervals]
    assert _claim("it rains", tests) == {"claim": "it rains", "verdict": verdict, "tests": tests}


def test_the_best_fixed_gate_is_the_one_with_the_highest_monitor_accuracy() -> None:
    monitor = {"full": [1.0], "alpha=0": [0.6, 0.7], "alpha=0.5": [0.9, 0.6], "alpha=1": [0.7, 0.7]}
    assert _best_fixed(rows(monitor)) == "alpha=0.5"
    assert _best_fixed(rows({**monitor, "alpha=0.5": []})) == "alpha=1"  # not computed
    assert _best_fixed(rows({"full": [1.0], "alpha=0": []})) is None


def test_claims_are_differences_of_the_cells(config: AblateRun) -> None:
    found = {(name, seed): cell(name, seed) for name in MEANS for seed in SEEDS}
    monitor = {"alpha=0.25": [0.5, 0.6], "alpha=0.75": [0.7, 0.6]}
    claims = {item["claim"]: item for item in weigh_claims(config, found, rows(monitor))}

    def estimates(claim: str) -> dict[str, float]:
        return {test["test"]: test["estimate"] for test in claims[claim]["tests"]}

    # (0.7 - 0.4) - (0.8 - 0.7): texts bring more at one shot
    gain = "the gain over visual prototypes is largest at one shot"
    expected = {"gain over visual: 1-shot minus 5-shot": pytest.approx(0.2)}
    assert estimates(gain) == expected
    assert claims[gain]["verdict"] == "supported"
    beyond = "attributes and description help beyond the class name"
    assert estimates(beyond) == {
        "full minus name, 1-shot": pytest.approx(0.1),
        "full minus name, 5-shot": pytest.approx(-0.05),
    }
    assert claims[beyond]["verdict"] == "against"
    # monitor images prefer 0.75, though 0.25 does better on the test episodes
    assert estimates("the learned α beats a fixed one") == {
        "full minus alpha=0.75, 1-shot": pytest.approx(0.2),
        "full minus alpha=0.75, 5-shot": pytest.approx(0.3),
    }
    assert claims["both levels matter"]["verdict"] == "not computed"


def test_claims_are_about_what_the_base_has(config: AblateRun) -> None:
    """A base with a fixed gate says nothing of learned ones, one with names nothing of levels."""
    found = {(name, seed): cell(name, seed) for name in MEANS for seed in SEEDS}
    found |= {("description", seed): cell("visual", seed) for seed in SEEDS}
    monitor = rows({"alpha=0.25": [0.5, 0.6], "alpha=0.75": [0.7, 0.6]})

    def verdicts() -> dict[str, str]:
        return {item["claim"]: item["verdict"] for item in weigh_claims(config, found, monitor)}

    concerned = {
        "the learned α beats a fixed one",
        "both levels matter",
        "attributes and description help beyond the class name",
    }
    usual = verdicts()
    config.model.policy, config.semantics.parts = "fixed", "attributes"
    changed = verdicts()
    assert {claim for claim in usual if usual[claim] != changed[claim]} == concerned
    assert {changed[claim] for claim in concerned} == {"not computed"}


def test_p_values_are_corrected_for_all_comparisons(config: AblateRun, tmp_path: Path) -> None:
    """Two other variants at two shots: four comparisons in one correction."""
    names = ("full", "one", "two")
    variants = [Variant(name, "semantics", name) for name in names]
    config.output = str(tmp_path)
    store = Store(tmp_path)
    store.prepare()
    facts = {"monitor_accuracy": 0.5, "seconds": 1.0, "warnings": []}
    rng = np.random.default_rng(0)
    for variant in variants:
        for seed in SEEDS:
            arrays = {f"accuracy-{shot}": rng.random(100) for shot in SHOTS}
            arrays["accuracy-5"] += names.index(variant.name) / 10
            store.write(Cell(variant, seed), arrays, facts)
    summary = summarise(config, store, variants, list(SEEDS))
    tests = [item["difference"] for row in summary["rows"][1:] for item in row["results"]]
    assert summary["comparisons"] == len(tests) == 4
    raw = [test["p_value"] for test in tests]
    assert [test["p_holm"] for test in tests] == holm(raw) != raw
