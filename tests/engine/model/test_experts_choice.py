"""Which experts a gate chooses and how it weighs them: by torch and by the kernel, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from engine.errors import UnsupportedModelError
from engine.model.experts import SharedExpert, route
from engine.model.experts_choice_triton import choose
from engine.model.experts_config import Gate, experts_of
from engine.model.experts_triton import Beside, join_experts, shared_expert
from tests.engine.model.test_experts_triton import DEVICE, error, some

pytestmark = pytest.mark.cuda


def defined(
    x: Tensor, router: Tensor, chosen: int, renormalised: bool, gate: Gate, correction: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row by row in float64, with sorted lists of numbers."""
    logits = x.double() @ router.double().T
    shares = (logits.sigmoid() if gate.sigmoid else logits.softmax(-1)).tolist()
    terms = [0.0] * len(router) if correction is None else correction.tolist()
    size = len(router) // gate.groups
    every: list[list[int]] = []
    weights: list[list[float]] = []
    for row in shares:
        scores = [share + term for share, term in zip(row, terms, strict=True)]
        groups = [range(start, start + size) for start in range(0, len(router), size)]
        groups.sort(key=lambda group: -sum(sorted((scores[n] for n in group), reverse=True)[:2]))
        allowed = sorted(n for group in groups[: gate.open_groups] for n in group)
        best = sorted(allowed, key=lambda n: -scores[n])[:chosen]
        total = max(sum(row[n] for n in best), gate.least) if renormalised else 1.0
        every.append(best)
        weights.append([row[n] / total * gate.scale for n in best])
    return torch.tensor(every, device=DEVICE), torch.tensor(weights, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize(
    ("count", "chosen", "renormalised", "gate"),
    [
        (64, 6, True, Gate(corrected=True, least=0.2)),
        (7, 2, False, Gate(corrected=True)),
        (128, 8, True, Gate(sigmoid=True, corrected=True, scale=2.5, least=1e-20)),
        (10, 3, False, Gate(sigmoid=True)),
        (48, 5, True, Gate(sigmoid=True, corrected=True, groups=6, open_groups=2)),
        (6, 2, False, Gate(sigmoid=True, corrected=True, groups=3, scale=0.5)),
        (16, 4, True, Gate(groups=2)),
    ],
    ids=str,
)
def test_a_gate_chooses_and_weighs_as_defined(
    count: int, chosen: int, renormalised: bool, gate: Gate
) -> None:
    x, router = some(9, 320), some(count, 320, seed=1) / 10
    correction = some(count, seed=2) - 0.5 if gate.corrected else None  # below zero too
    experts, weights = defined(x, router, chosen, renormalised, gate, correction)
    if gate.groups > 1:  # or groups would change nothing
        free = gate._replace(groups=1, open_groups=1)
        assert not torch.equal(experts, defined(x, router, chosen, renormalised, free, correction)[0])
    if gate.least > 0.1:
        shares = (x.double() @ router.double().T).softmax(-1).gather(1, experts).sum(-1)
        assert (shares < gate.least).any()
        assert (shares > gate.least).any()
    given: dict[str, Any] = {"renormalised": renormalised, "gate": gate, "correction": correction}
    for by in (route, choose):
        found, got = by(x, router, chosen, **given)
        assert torch.equal(found.long(), experts)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), weights, atol=1e-6, rtol=1e-5)


def test_of_equal_scores_the_lower_number_and_group_come_first() -> None:
    x, router = torch.ones(1, 16, device=DEVICE), torch.zeros(8, 16, device=DEVICE)
    correction = torch.tensor([-1.0, -2.0, -1.0, -2.0, -1.5, -1.5, -1.0, -2.0], device=DEVICE)
    gate = Gate(sigmoid=True, corrected=True)
    found, shares = choose(x, router, 4, renormalised=False, gate=gate, correction=correction)
    assert found.tolist() == [[0, 2, 6, 4]]
    assert shares.tolist() == [[0.5] * 4]
    gate = Gate(sigmoid=True, corrected=True, groups=4, open_groups=2)
    found, _ = choose(x, router, 3, renormalised=False, gate=gate, correction=correction)
    assert found.tolist() == [[0, 2, 1]]


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_valid_experts_and_disturbs_nobody(value: float) -> None:
    """Where a weight is zero, infinity makes no number of it, and of others it does."""
    x, router, correction = some(5, 64), some(12, 64, seed=1) / 8, some(12, seed=2)
    router[3:, 5] = 0.0
    gate = Gate(sigmoid=True, corrected=True, groups=3, open_groups=2, scale=2.0, least=1e-20)
    given: dict[str, Any] = {"renormalised": True, "gate": gate, "correction": correction}
    experts, shares = choose(x, router, 4, **given)
    x[2, 5] = value
    found, got = choose(x, router, 4, **given)
    assert found[2].tolist() == [0, 1, 2, 3]
    assert got[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], experts[others])
    torch.testing.assert_close(got[others], shares[others])


def test_a_router_in_float32_tells_apart_what_bfloat16_would_not() -> None:
    """ERNIE's is, whatever the model's dtype."""
    x = some(4, 320).bfloat16()
    router = some(1, 320, seed=1).expand(6, 320) / 18
    router = router + torch.arange(6, device=DEVICE)[:, None] * 1e-3 * x[0].sign()
    experts, _ = defined(x, router, 3, False, Gate(), None)
    found, _ = choose(x, router, 3, renormalised=False)
    assert torch.equal(found.long(), experts)
    assert not torch.equal(choose(x, router.bfloat16(), 3, renormalised=False)[0].long(), experts)


def shared_mlp(hidden: int, width: int, dtype: torch.dtype, *, gated: bool) -> SharedExpert:
    from types import SimpleNamespace

    beside = SimpleNamespace(shared=(width, gated))
    config = SimpleNamespace(experts=beside, hidden_size=hidden, mlp_bias=False)
    found = SharedExpert(config, dtype, F.silu)  # type: ignore[arg-type]
    for seed, parameter in enumerate(found.parameters(), 1):
        parameter.data = (some(*parameter.shape, seed=seed) / parameter.shape[-1] ** 0.5).to(dtype)
    return found.to(DEVICE)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mlp_beside_the_experts_is_added_by_its_gate(dtype: torch.dtype, gated: bool) -> None:
    """Alike by torch alone and in the kernel that adds up the experts."""
    shared, x = shared_mlp(40, 24, dtype, gated=gated), some(5, 40, dtype=dtype)
    assert (shared.gate is not None) == gated
    gate, up = (x.double() @ shared.gate_up_proj.weight.double().T).chunk(2, -1)
    want = (F.silu(gate) * up) @ shared.down_proj.weight.double().T
    if shared.gate is not None:
        want *= (x.double() @ shared.gate.double()).sigmoid()[:, None]
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert error(shared(x), want) < bound
    stream, parts = some(5, 40, seed=7, dtype=dtype), some(15, 40, seed=8, dtype=dtype)
    every = stream.double() + 0.5 * (parts.double().view(5, 3, 40).sum(1) + want)
    beside = shared_expert(x, shared, "silu")
    assert isinstance(beside, Beside)
    join_experts(stream, parts, 3, after=None, before=None, eps=1e-5, residual_scale=0.5, beside=beside)
    assert error(stream, every) < bound


def test_groups_that_cannot_be_are_refused() -> None:
    class Stated:
        num_experts_per_tok, intermediate_size, num_hidden_layers = 3, 8, 1

    for groups, opened, told in (
        (3, 1, "n_group is 3 for 8 experts"),
        (8, 4, "n_group is 8 for 8 experts; a group must have two or more"),
        (0, 1, "n_group is 0"),
        (4, 1, "topk_group is 1 of 4 groups with 2 experts each"),
        (4, 5, "topk_group is 5 of 4 groups"),
    ):
        with pytest.raises(UnsupportedModelError, match=told):
            experts_of(Stated, 8, renormalised=True, gate=Gate(groups=groups, open_groups=opened))
    assert experts_of(Stated, 8, renormalised=True, gate=Gate(groups=4, open_groups=2)).gate.groups == 4
