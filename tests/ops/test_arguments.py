"""Arguments of a wrong kind: the message names them, whatever backend would have run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from dvla_fast import _extension
from dvla_fast import functional as F

ACTION = torch.zeros(13)
LOGITS = torch.linspace(-1, 1, 13)
NUMBER_OR_TENSOR = "concentration: expected a number or a tensor, got "
BETA: dict[str, Callable[..., Any]] = {
    "policy": lambda logits, kappa, action: F.beta_policy(logits, kappa, action_logit=action),
    "draw": lambda logits, kappa, _: F.beta_policy(logits, kappa),
    "reference": lambda logits, kappa, _: F.beta_policy(logits, kappa, backend="reference"),
    "sample": lambda logits, kappa, _: F.beta_sample(logits, kappa),
    "log_prob": F.beta_log_prob,
    "entropy": lambda logits, kappa, _: F.beta_entropy(logits, kappa),
    "cdf": F.beta_cdf,
    "derivatives": F.beta_implicit_derivatives,
    "kl": lambda logits, kappa, _: F.beta_kl(logits, kappa, logits, 2.0),
    "other_kl": lambda logits, kappa, _: F.beta_kl(logits, 2.0, logits, kappa),
}
CHECKED = ("cdf", "derivatives", "kl", "other_kl")  # composed of PyTorch's own operations


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    F.set_value_checks(None)


@pytest.mark.parametrize("name", BETA)
@pytest.mark.parametrize(
    ("kappa", "error", "message"),
    [
        (None, TypeError, NUMBER_OR_TENSOR + "None"),
        ("10", TypeError, NUMBER_OR_TENSOR + "'10'"),
        ([10.0], TypeError, NUMBER_OR_TENSOR + r"\[10.0\]"),
        (True, TypeError, NUMBER_OR_TENSOR + "True"),
        (np.ones(13), TypeError, NUMBER_OR_TENSOR + "array"),
        (torch.ones(13, dtype=torch.cfloat), TypeError, "concentration: .* real .*complex64"),
        (0.0, ValueError, "concentration: expected a positive finite number, got 0.0"),
        (math.nan, ValueError, "concentration: expected a positive finite number, got nan"),
        (10**400, ValueError, r"concentration: expected a number or a tensor, got one beyond 1.8e"),
        (Fraction(10**400, 3), ValueError, "concentration: expected a number or a tensor, got one"),
        (torch.zeros(13), ValueError, "concentration: expected positive finite values"),
        (torch.tensor(math.nan), ValueError, "concentration: expected positive finite values"),
    ],
    ids=str,
)
def test_wrong_concentrations(name: str, kappa: Any, error: type[Exception], message: str) -> None:
    prefix = "other_" if name == "other_kl" else ""
    with pytest.raises(error, match=f"^{prefix}{message}"):
        BETA[name](LOGITS, kappa, ACTION)


@pytest.mark.parametrize("kappa", [2, np.float32(2.0), np.int64(2), torch.tensor(2)], ids=repr)
@pytest.mark.parametrize("name", BETA)
def test_every_kind_of_number_is_a_concentration(name: str, kappa: Any) -> None:
    results = []
    for x in (kappa, 2.0):
        torch.manual_seed(0)
        out = BETA[name](LOGITS, x, ACTION)
        results.append(out if isinstance(out, tuple) else (out,))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: F.beta_log_prob(LOGITS, 2.0, None), "action_logit: expected a tensor, got None"),
        (lambda: F.beta_log_prob(LOGITS, 2.0, 0.5), "action_logit: expected a tensor, got float"),
        (lambda: F.beta_cdf(0.0, 2.0, ACTION), "logits: expected a tensor, got float"),
        (lambda: F.beta_cdf(LOGITS, 2.0, 0.5), "action_logit: expected a tensor, got float"),
        (
            lambda: F.beta_implicit_derivatives(LOGITS, 2.0, None),
            "action_logit: expected a tensor, got NoneType",
        ),
        (lambda: F.beta_kl(None, 2.0, LOGITS, 2.0), "logits: expected a tensor, got NoneType"),
        (lambda: F.beta_kl(LOGITS, 1.0, 0.0, 2.0), "other_logits: expected a tensor, got float"),
    ],
)
def test_what_is_no_tensor(call: Callable[[], Any], name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}"):
        call()


@pytest.mark.parametrize("name", ["policy", "log_prob", "cdf", "derivatives"])
def test_actions_are_real(name: str) -> None:
    for dtype in (torch.cfloat, torch.cdouble):
        with pytest.raises(TypeError, match=f"^action_logit: expected real values, got {dtype}$"):
            BETA[name](LOGITS, 2.0, ACTION.to(dtype))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_wrong_generators(backend: str | None) -> None:
    message = r"^generator: expected a torch\.Generator, got str$"
    for op, arguments in ((F.beta_policy, (LOGITS,)), (F.gate_policy, tuple(DECISION.values()))):
        with pytest.raises(TypeError, match=message):
            op(*arguments, 2.0, generator="seed", backend=backend)


@pytest.mark.parametrize("name", CHECKED)
def test_values_are_looked_at_where_that_is_asked_for(name: str) -> None:
    kappa, logits = torch.full((13,), 2.0), LOGITS.clone()
    kappa[3], logits[5] = -1.0, math.nan
    with pytest.raises(ValueError, match="concentration: expected positive finite values"):
        BETA[name](LOGITS, kappa, ACTION)
    with pytest.raises(ValueError, match="logits: NaN found"):
        BETA[name](logits, 2.0, ACTION)
    if name in ("cdf", "derivatives"):
        with pytest.raises(ValueError, match="action_logit: NaN found"):
            BETA[name](LOGITS, 2.0, logits)
    torch.vmap(BETA[name])(logits, kappa, ACTION)  # a transform has no values
    F.set_value_checks(False)
    out = BETA[name](logits, kappa, ACTION)
    for x in out if isinstance(out, tuple) else (out,):
        assert x.isnan().nonzero().squeeze(1).tolist() == [3, 5]


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
@pytest.mark.parametrize("name", BETA)
def test_the_checks_are_traced(name: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(BETA[name], backend="aot_eager", fullgraph=True)
    for kappa in (2.5, torch.full((13,), 2.5)):
        compiled(LOGITS, kappa, ACTION)
    torch.compiler.reset()


DECISION = {
    "image_tokens": torch.randn(6, 4, 8),
    "text_tokens": torch.randn(3, 2, 8),
    "hidden_weight": torch.randn(5, 17),
    "hidden_bias": torch.zeros(5),
    "out_weight": torch.randn(1, 5),
    "out_bias": torch.zeros(1),
}
LAYER = {
    "query": torch.randn(2, 2, 3, 4),
    "image_tokens": torch.randn(2, 5, 8),
    "kv_weight": torch.randn(16, 8),
    "text_key": torch.randn(2, 2, 3, 4),
    "text_value": torch.randn(2, 2, 3, 4),
    "alpha": torch.rand(2),
    "out_weight": torch.randn(8, 8),
}
ATTENTION = {
    "query": torch.randn(2, 2, 3, 4),
    "image_key": torch.randn(2, 2, 5, 4),
    "image_value": torch.randn(2, 2, 5, 4),
    "text_key": torch.randn(2, 2, 3, 4),
    "text_value": torch.randn(2, 2, 3, 4),
    "alpha": torch.rand(2),
}
CALLS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (F.gate_policy, {**DECISION, "concentration": 10.0}),
    (F.gate_state, {name: DECISION[name] for name in ("image_tokens", "text_tokens")}),
    (F.dual_attention, ATTENTION),
    (F.gated_attention, LAYER),
]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    ("op", "arguments", "name"),
    [(*call, name) for call in CALLS for name in call[1] if name != "concentration"],
)
def test_every_tensor_is_named(op: Any, arguments: dict, name: str, backend: str | None) -> None:
    for wrong in (None, [0.5], np.zeros((6, 4, 8))):
        message = f"^{name}: expected a tensor, got {type(wrong).__name__}$"
        with pytest.raises(TypeError, match=message):
            op(**{**arguments, name: wrong}, backend=backend)


@pytest.mark.parametrize(
    ("op", "arguments", "name"),
    [
        *((*call, name) for call in CALLS for name in call[1] if name != "concentration"),
        (F.beta_policy, {"logits": LOGITS, "concentration": 2.0}, "logits"),
        (F.beta_policy, {"logits": LOGITS, "concentration": LOGITS.exp()}, "concentration"),
    ],
)
def test_sparse_and_nested_tensors_are_named(op: Any, arguments: dict, name: str) -> None:
    sparse = arguments[name].to_sparse()
    nested = torch.nested.nested_tensor([arguments[name]])
    for backend in (None, "reference"):
        with pytest.raises(
            TypeError,
            match=rf"^{name}: expected a dense tensor, got one of layout torch.sparse_coo",
        ):
            op(**{**arguments, name: sparse}, backend=backend)
        with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got a nested one"):
            op(**{**arguments, name: nested}, backend=backend)


@pytest.mark.parametrize("name", ["image_tokens", "text_tokens"])
def test_tokens_of_eight_bits_are_refused(name: str) -> None:
    """They have no arithmetic of their own; logits of any floating dtype are widened."""
    short = {name: DECISION[name].to(torch.float8_e4m3fn)}
    tokens = {name: DECISION[name] for name in ("image_tokens", "text_tokens")}
    with pytest.raises(TypeError, match=f"^{name}: expected a floating tensor of at least 16 bits"):
        F.gate_state(**{**tokens, **short})
    with pytest.raises(TypeError, match=f"^{name}: expected a floating tensor of at least 16 bits"):
        F.gate_policy(**{**CALLS[0][1], **short})
    logits = LOGITS.to(torch.float8_e4m3fn)
    want = F.beta_cdf(logits.float(), 2.0, ACTION)
    torch.testing.assert_close(F.beta_cdf(logits, 2.0, ACTION), want)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("op", [2, 3], ids=["dual_attention", "gated_attention"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.cfloat], ids=str)
def test_a_query_of_another_kind(
    dtype: torch.dtype, op: int, autocast: bool, backend: str | None
) -> None:
    """It is named itself, not what differs from it, and autocast makes no number of it."""
    function, arguments = CALLS[op]
    wrong = {**arguments, "query": arguments["query"].to(dtype)}
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TypeError, match=f"^query: dtype {dtype} is not one of"),
    ):
        function(**wrong, backend=backend)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", [0, 1], ids=["gate_policy", "gate_state"])
@pytest.mark.parametrize("name", ["state_images", "groups_per_decision"])
def test_counts_of_a_decision_that_no_machine_holds(
    name: str, op: int, backend: str | None
) -> None:
    function, arguments = CALLS[op]
    for wrong in (2**70, -(2**70)):
        with pytest.raises(ValueError, match=f"^{name}: "):
            function(**arguments, **{name: wrong}, backend=backend)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", [0, 1], ids=["gate_policy", "gate_state"])
@pytest.mark.parametrize("name", ["state_images", "groups_per_decision"])
def test_counts_of_a_decision_are_whole(name: str, op: int, backend: str | None) -> None:
    function, arguments = CALLS[op]
    for wrong in (1.5, 1.0, True, "1", *((None,) if name == "groups_per_decision" else ())):
        with pytest.raises(TypeError, match=f"^{name}: expected a whole number, got {wrong!r}$"):
            function(**arguments, **{name: wrong}, backend=backend)
    function(**arguments, **{name: np.int64(1)}, backend=backend)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kappa", [None, "10", [10.0], True], ids=str)
def test_a_decision_has_a_number_for_concentration(kappa: Any, backend: str | None) -> None:
    with pytest.raises(TypeError, match=r"^concentration: expected a number, got "):
        F.gate_policy(**{**CALLS[0][1], "concentration": kappa}, backend=backend)
    with pytest.raises(ValueError, match=r"^concentration: expected a number, got one beyond 1.8e"):
        F.gate_policy(**{**CALLS[0][1], "concentration": 10**400}, backend=backend)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_action_of_a_decision_is_real(backend: str | None) -> None:
    action = torch.zeros(3, dtype=torch.cfloat)
    with pytest.raises(
        TypeError, match=r"^action_logit: expected real values, got torch\.complex64"
    ):
        F.gate_policy(**CALLS[0][1], action_logit=action, backend=backend)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", [2, 3], ids=["dual_attention", "gated_attention"])
@pytest.mark.parametrize("scale", ["x", True, torch.tensor([0.3, 0.4]), torch.tensor(0.3)], ids=str)
def test_a_scale_is_a_number(scale: Any, op: int, backend: str | None) -> None:
    function, arguments = CALLS[op]
    with pytest.raises(TypeError, match=r"^scale: expected a number, got "):
        function(**arguments, scale=scale, backend=backend)
    function(**arguments, scale=1, backend=backend)


@pytest.mark.parametrize("name", ["cdf", "derivatives", "kl"])
def test_logits_that_no_special_function_takes(name: str) -> None:
    for dtype in (torch.cfloat, torch.bool, torch.int64):
        with pytest.raises(TypeError, match=r"^logits: expected a floating tensor, got torch"):
            BETA[name](LOGITS.to(dtype), 2.0, ACTION)
    with pytest.raises(ValueError, match=r"^shapes that do not broadcast together: logits \(13,\)"):
        BETA[name](LOGITS, torch.ones(2), ACTION)
    with pytest.raises(ValueError, match="other_logits: on meta, logits on cpu"):
        F.beta_kl(LOGITS, 2.0, LOGITS.to("meta"), 2.0)


def test_half_types_on_meta_under_autocast_are_named() -> None:
    """Autocast knows no meta device."""
    tensors = [torch.zeros(1, 2, 3, 4), torch.zeros(1, 5, 8), torch.zeros(16, 8)]
    tensors += [
        torch.zeros(1, 2, 3, 4),
        torch.zeros(1, 2, 3, 4),
        torch.zeros(()),
        torch.zeros(8, 8),
    ]
    query, tokens, *rest = (x.to("meta", torch.float16) for x in tensors)
    with pytest.raises(TypeError, match=r"image_tokens: dtype torch.bfloat16"):
        F.gated_attention(query, tokens.bfloat16(), *rest)
