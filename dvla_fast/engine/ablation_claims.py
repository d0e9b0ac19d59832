"""The paper's claims as tests on the cells of an ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dvla_fast.data.shapes import KINDS, make_classes
from dvla_fast.engine.ablation_statistics import crossed_interval
from dvla_fast.engine.ablation_variants import FULL, VISUAL
from dvla_fast.engine.build import pick_device
from dvla_fast.engine.config import AblateRun
from dvla_fast.engine.reward_curves import ALPHAS, best_mean
from dvla_fast.engine.texts import bank_encoder
from dvla_fast.semantics import load_bank
from dvla_fast.semantics.topk import progressive_top_k

HOLDS, AGAINST, OPEN, MISSING = "supported", "against", "not shown", "not computed"

_Found = Mapping[tuple[str, int], Mapping[str, Any]]


def weigh_claims(
    config: AblateRun, found: _Found, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Test each claim as far as its cells are finished.

    A claim is "supported" if every test's 95 % interval lies above 0, "against" if one lies below,
    else "not shown". Intervals are those of ``ablation_statistics``, not corrected for the number
    of claims.
    """
    cells = _Cells(config, found)
    shots = config.evaluate.shots
    few, many = min(shots), max(shots)
    gain = [] if few == many else cells.contrast(
        f"gain over {VISUAL}: {few}-shot minus {many}-shot",
        [(FULL, few, 1), (VISUAL, few, -1), (FULL, many, -1), (VISUAL, many, 1)],
    )  # fmt: skip
    whole = config.semantics.parts == "all"  # else the texts of ``full`` are not both levels
    fixed = None if config.model.policy == "fixed" else _best_fixed(rows)
    top_k = _claim("top-k removes what hallucinations cost", cells.over(FULL, "no-top-k"))
    if config.semantics.bank in KINDS:
        top_k["selection"] = hallucinated_shares(config)
    return [
        _claim("text and meta-tuning together beat visual prototypes", cells.over(FULL, VISUAL)),
        _claim(
            "attributes and description help beyond the class name",
            cells.over(FULL, "name") if whole else [],
        ),
        _claim("what the texts say matters, not that there are any", cells.over(FULL, "shuffled")),
        _claim("the gain over visual prototypes is largest at one shot", gain),
        _claim(
            "both levels matter",
            cells.over(FULL, "attributes") + cells.over(FULL, "description") if whole else [],
        ),
        top_k,
        _claim("hallucinations cost accuracy (taken out by hand)", cells.over("true", "no-top-k")),
        _claim("the learned α beats a fixed one", cells.over(FULL, fixed) if fixed else []),
        _claim("α is larger in shallow layers", cells.alphas()),
        _claim("attributes matter in shallow layers", cells.over(FULL, "levels=swapped")),
    ]


class _Cells:
    def __init__(self, config: AblateRun, found: _Found) -> None:
        self.config, self.found = config, found
        self.seeds = range(config.seed, config.seed + config.ablate.seeds)

    def over(self, first: str, second: str) -> list[dict[str, Any]]:
        """first − second on the same episodes, at each shot."""
        return [
            test
            for shot in self.config.evaluate.shots
            for test in self.contrast(
                f"{first} minus {second}, {shot}-shot", [(first, shot, 1), (second, shot, -1)]
            )
        ]

    def contrast(self, name: str, terms: Sequence[tuple[str, int, int]]) -> list[dict[str, Any]]:
        """The signed sum of mean accuracies of (variant, shot, sign), seeds in common."""
        names = {variant for variant, _, _ in terms}
        seeds = [s for s in self.seeds if all((variant, s) in self.found for variant in names)]
        if not seeds:
            return []
        tables: dict[int, Any] = {}
        for variant, shot, sign in terms:
            rows = [sign * self.found[variant, s][f"accuracy-{shot}"].astype(float) for s in seeds]
            tables[shot] = tables.get(shot, 0) + np.stack(rows)
        return [{"test": name, **crossed_interval(list(tables.values()), self.config.ablate.draws)}]

    def alphas(self) -> list[dict[str, Any]]:
        """Mean gate of the first gated layer minus the last one's, at each shot."""
        seeds = [s for s in self.seeds if (FULL, s) in self.found]
        tests = []
        for shot in self.config.evaluate.shots:
            name = f"alpha-{shot}"
            tables = [self.found[FULL, s][name] for s in seeds if name in self.found[FULL, s]]
            if not tables or tables[0].shape[1] < 2:
                continue
            apart = np.stack([table[:, 0] - table[:, -1] for table in tables])
            interval = crossed_interval([apart], self.config.ablate.draws)
            tests.append({"test": f"α of the first minus the last layer, {shot}-shot", **interval})
        return tests


def _claim(text: str, tests: list[dict[str, Any]]) -> dict[str, Any]:
    if not tests:
        verdict = MISSING
    elif any(test["high"] is not None and test["high"] < 0 for test in tests):
        verdict = AGAINST
    elif all(test["low"] is not None and test["low"] > 0 for test in tests):
        verdict = HOLDS
    else:
        verdict = OPEN
    return {"claim": text, "verdict": verdict, "tests": tests}


def _best_fixed(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The fixed gate that monitor images prefer: the test split has no say in the choice."""
    fixed = [r for r in rows if r["variant"].startswith("alpha=") and r["monitor_accuracy"]]
    if not fixed:
        return None
    best: str = max(fixed, key=lambda row: float(np.mean(row["monitor_accuracy"])))["variant"]
    return best


def weigh_rewards(
    config: AblateRun, found: _Found, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Say what the rewards of the full configuration ask of its gates, a mapping a gated layer.

    Returns:
        Per layer "layer", "alphas" and "rewards" (mean over seeds), and seed by seed, since a mean
        of curves that peak apart peaks nowhere: "best" (the policy mean that earns most),
        "best_with_entropy" (and with the entropy bonus), "learned" (mean α at the first shot).
        Empty where no such cell is finished or its gates are no Beta policy's.
    """
    seeds = range(config.seed, config.seed + config.ablate.seeds)
    curves = [found[FULL, s]["rewards"] for s in seeds if "rewards" in found.get((FULL, s), {})]
    if not curves or config.model.policy != "beta":
        return []
    row = next(row for row in rows if row["variant"] == FULL)
    kappa, tau = config.model.concentration, config.metatune.entropy_weight
    result = []
    for layer, by_seed in enumerate(np.stack(curves, 1).tolist()):
        result.append(
            {
                "layer": row["gated_layers"][layer],
                "alphas": list(ALPHAS),
                "rewards": np.mean(by_seed, 0).tolist(),
                "best": [best_mean(ALPHAS, curve, kappa, 0.0) for curve in by_seed],
                "best_with_entropy": [best_mean(ALPHAS, curve, kappa, tau) for curve in by_seed],
                "learned": [alphas[layer] for alphas in row["results"][0]["alpha_by_seed"]],
            }
        )
    return result


def hallucinated_shares(config: AblateRun) -> dict[str, Any]:
    """How many of the attributes that top-k chooses on a made data set are hallucinated.

    Returns:
        ``proposed``: their share among all that the texts propose; ``chosen``: k -> their share
        among those chosen by progressive selection, for k of the sweep and of the configuration.
    """
    made = make_classes(varied=KINDS[config.semantics.bank])
    bank = load_bank(config.semantics.bank)
    encoder = bank_encoder(config.semantics, bank, pick_device("cpu"))
    flags = [dict(zip(text.attributes, text.hallucinated)) for text in made.texts]
    proposals = [list(item) for item in flags]
    shares = {}
    for k in sorted({*config.ablate.k, config.semantics.top_k} - {0}):
        selections = progressive_top_k(made.names, proposals, encoder, k, config.semantics.template)
        false = [
            known[texts[place]]
            for known, texts, selection in zip(flags, proposals, selections)
            for place in selection.order
        ]
        shares[str(k)] = float(np.mean(false))
    every = [value for known in flags for value in known.values()]
    return {"proposed": float(np.mean(every)), "chosen": shares}
