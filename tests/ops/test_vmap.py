"""torch.func.vmap over the ops, against a loop over the examples."""

from __future__ import annotations

import pytest
import torch
from attention_cases import NAMES, Shape, make
from torch import Tensor
from torch.func import grad, jacrev, vmap

from dvla_fast import _extension
from dvla_fast.functional import beta_policy, dual_attention

pytestmark = pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))

SIZE = 3
SHAPES = [
    Shape(2, 2, 3, 5, 7, 4, 8),
    Shape(2, 1, 2, 3, 6, 4, 8),  # results not saved: one text an image
    Shape(1, 2, 1, 3, 260, 4, 8),  # results saved: two blocks of keys
]


def mapped(shape: Shape, which: tuple[int, ...]) -> tuple[list[Tensor], tuple[int | None, ...]]:
    """query … alpha, of which some have a mapped dimension, each at another place."""
    examples = [make(shape, seed=seed) for seed in range(SIZE)]
    tensors, dims = list(examples[0]), [None] * 6
    for i in which:
        dims[i] = i % (tensors[i].dim() + 1)
        tensors[i] = torch.stack([example[i] for example in examples], dims[i])
    return tensors, tuple(dims)


def example(tensors: list[Tensor], dims: tuple[int | None, ...], i: int) -> list[Tensor]:
    return [x if dim is None else x.select(dim, i) for x, dim in zip(tensors, dims)]


def attend(*tensors: Tensor, **options: Tensor) -> Tensor:
    return dual_attention(*tensors, backend="cpp", **options)


WHICH = [(0, 1, 2, 3, 4, 5), (1, 2), (0, 3, 4), (5,)]


@pytest.mark.parametrize("which", WHICH, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape: Shape, which: tuple[int, ...]) -> None:
    tensors, dims = mapped(shape, which)
    got = vmap(attend, dims, out_dims=2)(*tensors)
    want = torch.stack([attend(*example(tensors, dims, i)) for i in range(SIZE)], 2)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("which", WHICH, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_gradients_of_each_example(shape: Shape, which: tuple[int, ...]) -> None:
    tensors, dims = mapped(shape, which)

    def loss(*one: Tensor) -> Tensor:
        return attend(*one).square().sum()

    gradients = grad(loss, tuple(range(6)))
    got = vmap(gradients, dims)(*tensors)
    each = [gradients(*example(tensors, dims, i)) for i in range(SIZE)]
    for name, mine, theirs in zip(NAMES, got, zip(*each)):
        torch.testing.assert_close(mine, torch.stack(theirs), msg=name)
    # The gradient of the sum over examples: what is not mapped gets the sum.
    whole = grad(lambda *all_: vmap(loss, dims)(*all_).sum(), tuple(range(6)))(*tensors)
    for mine, theirs, dim in zip(whole, zip(*each), dims):
        stacked = torch.stack(theirs, dim or 0)
        torch.testing.assert_close(mine, stacked.sum(0) if dim is None else stacked)


@pytest.mark.parametrize("mask_dims", [(0, 0), (None, 1), (1, None), (None, None)], ids=str)
def test_attention_masks(mask_dims: tuple[int | None, int | None]) -> None:
    shape = SHAPES[0]
    tensors, dims = mapped(shape, WHICH[0])
    masks = []
    for dim, size in zip(mask_dims, ((4, 7), (2, 4))):
        mask = torch.rand(SIZE, *size) < 0.6
        masks.append(mask[0] if dim is None else mask.movedim(0, dim))

    def run(*inputs: Tensor) -> Tensor:
        return attend(*inputs[:6], image_mask=inputs[6], text_mask=inputs[7])

    everything, dims = [*tensors, *masks], dims + mask_dims
    got = vmap(run, dims)(*everything)
    want = torch.stack([run(*example(everything, dims, i)) for i in range(SIZE)])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("size", [(), (4,), (4, 3)], ids=str)
def test_attention_alpha_shapes(size: tuple[int, ...]) -> None:
    tensors, _ = mapped(SHAPES[0], ())
    alpha = torch.rand(SIZE, *size, dtype=torch.float64)
    got = vmap(lambda a: attend(*tensors[:5], a))(alpha)
    want = torch.stack([attend(*tensors[:5], a) for a in alpha])
    torch.testing.assert_close(got, want)


def test_attention_nested_and_jacobian() -> None:
    shape = Shape(1, 2, 1, 2, 3, 2, 4)
    *tensors, alpha = make(shape)
    alphas = torch.rand(2, SIZE, 2, 1, dtype=torch.float64)
    got = vmap(vmap(lambda a: attend(*tensors, a)))(alphas)
    want = torch.stack([attend(*tensors, a) for a in alphas.flatten(0, 1)]).unflatten(0, (2, SIZE))
    torch.testing.assert_close(got, want)
    jacobian = jacrev(lambda a: attend(*tensors, a))(alpha)
    slope = attend(*tensors, torch.ones_like(alpha)) - attend(*tensors, torch.zeros_like(alpha))
    want = torch.einsum("bhpd,bi,hj->bhpdij", slope, torch.eye(2).double(), torch.eye(1).double())
    torch.testing.assert_close(jacobian, want)


def test_attention_then_ordinary_backward() -> None:
    tensors, dims = mapped(SHAPES[0], WHICH[0])
    leaves = [x.clone().requires_grad_() for x in tensors]
    vmap(attend, dims)(*leaves).square().sum().backward()
    twins = [x.clone().requires_grad_() for x in tensors]
    sum(attend(*example(twins, dims, i)).square().sum() for i in range(SIZE)).backward()
    for leaf, twin in zip(leaves, twins):
        torch.testing.assert_close(leaf.grad, twin.grad)


@pytest.mark.parametrize("kappa_dim", [0, None, "number"], ids=str)
@pytest.mark.parametrize("action", [False, True], ids=["mean", "replay"])
def test_policy(kappa_dim: int | str | None, action: bool) -> None:
    logits, actions = torch.randn(5, SIZE, 2).double(), torch.randn(5, 2).double()
    kappa = torch.rand(SIZE, 2).double() + 1
    if kappa_dim is None:
        kappa = kappa[0]

    def loss(x: Tensor, k: Tensor) -> Tensor:
        value = 3.0 if kappa_dim == "number" else k
        options = {"action_logit": actions} if action else {"deterministic": True}
        out = beta_policy(x, value, **options)
        return (out.log_prob * 2 + out.entropy + out.alpha).sum()

    dims = (1, None if kappa_dim is None else 0)
    for function in (loss, grad(loss), grad(loss, 1)):
        got = vmap(function, dims)(logits, kappa)
        each = [function(*example([logits, kappa], dims, i)) for i in range(SIZE)]
        torch.testing.assert_close(got, torch.stack(each))


def test_policy_draws_as_vmap_is_told() -> None:
    logits = torch.zeros(SIZE, 4)

    def draw(x: Tensor) -> Tensor:
        return beta_policy(x, 5.0).alpha

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(draw)(logits)
    same = vmap(draw, randomness="same")(logits)
    assert torch.equal(same[0], same[1])
    different = vmap(draw, randomness="different")(logits)
    assert not torch.equal(different[0], different[1])
    assert different[0].unique().numel() == 4
