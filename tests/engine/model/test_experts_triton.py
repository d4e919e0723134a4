"""The kernels of a mixture of experts against float64, and who gets into which slot."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from engine.model import experts_triton, products_tuning
from engine.model.experts import Experts
from engine.model.experts_choice_triton import Assignments, assign, choose
from engine.model.experts_config import Clamp, ExpertsConfig
from engine.model.experts_shapes import ExpertsShape, Tile, experts_shape
from engine.model.experts_triton import expert_products, experts_parts, join_experts, shape_for
from engine.model.fused_triton import Ways
from engine.model.product_shapes import MOST_ROWS, Around
from engine.model.products_tuning import tune_products
from tests.engine.model.test_fused_triton import Recorder, decoder
from tests.engine.model.test_triton_products import some_shapes, stand_in
from tests.interpreter import multiply_bfloat16

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILE = Tile(16, 32, 4, 2)


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_bfloat16(monkeypatch)


def some(*lengths: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(lengths) + seed)
    return torch.randn(lengths, generator=generator).to(dtype).to(DEVICE)


def mixture(
    count: int,
    chosen: int,
    hidden: int,
    width: int,
    dtype: torch.dtype,
    *,
    renormalised: bool = True,
    clamp: Clamp | None = None,
) -> Experts:
    """With biases where there is a clamp."""
    found = ExpertsConfig(count, chosen, width, renormalised, (True,), clamp is not None, clamp)
    experts = Experts(SimpleNamespace(hidden_size=hidden, experts=found), dtype, F.silu)  # type: ignore[arg-type]
    for name, size, seed in (("router", hidden, 1), ("gate_up", hidden, 2), ("down", width, 3)):
        shape = getattr(experts, name).shape
        getattr(experts, name).data = (some(*shape, seed=seed) / size**0.5).to(dtype)
        if clamp is not None:
            getattr(experts, f"{name}_bias").data = some(shape[0], seed=seed).to(dtype)
    return experts.to(DEVICE)


def wanted(experts: Experts, x: Tensor, activation: str = "silu") -> Tensor:
    """[T, hidden] in float64."""
    count, hidden, width = experts.count, experts.hidden, experts.width
    biases = (experts.router_bias, experts.gate_up_bias, experts.down_bias)
    router_bias, gate_up_bias, down_bias = (
        torch.zeros(1, 1, device=DEVICE).double() if bias is None else bias.double().view(count, -1)
        for bias in biases
    )
    logits = x.double() @ experts.router.double().T + router_bias.T
    shares, chosen = logits.softmax(-1).topk(experts.chosen)
    if experts.renormalised:
        shares = shares / shares.sum(-1, keepdim=True)
    gate_up = experts.gate_up.double().view(count, 2 * width, hidden)
    every = torch.einsum("th,ewh->tew", x.double(), gate_up) + gate_up_bias
    gate, up = every.chunk(2, -1)
    inner = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    if experts.clamp is not None:
        limit, alpha = experts.clamp
        assert (up > limit).any()
        assert (up < -limit).any()
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        inner = (up + 1) * gate * torch.sigmoid(alpha * gate)
    out = torch.einsum("tew,ehw->teh", inner, experts.down.double().view(count, hidden, width)) + down_bias
    return (out.gather(1, chosen[..., None].expand(-1, -1, hidden)) * shares[..., None]).sum(1)


def add_experts(x: Tensor, of: Tensor, experts: Experts, activation: str, **options: Any) -> Tensor:
    """As the layers do."""
    return join_experts(x, experts_parts(of, experts, activation), experts.chosen, **options)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("count", "chosen", "rows", "hidden", "width", "dtype"),
    [
        (4, 1, 1, 40, 24, torch.float32),
        (128, 8, 1, 48, 40, torch.bfloat16),
        (5, 2, 3, 600, 40, torch.float32),  # the router's channels in three shares
        (64, 8, 3, 24, 40, torch.bfloat16),
        (16, 4, 17, 32, 24, torch.bfloat16),
        (24, 8, 64, 40, 24, torch.float32),
        (3, 3, 64, 80, 136, torch.bfloat16),
        (4, 2, 300, 40, 24, torch.bfloat16),
    ],
)
def test_a_layer_is_the_sum_of_each_rows_experts(
    count: int, chosen: int, rows: int, hidden: int, width: int, dtype: torch.dtype
) -> None:
    """Added to the residual stream, whose norm comes out."""
    short = dtype == torch.bfloat16
    clamp = Clamp(1.5, 1.702) if count in (5, 16) else None
    experts = mixture(count, chosen, hidden, width, dtype, renormalised=rows != 64, clamp=clamp)
    y, x, norm = some(rows, hidden, dtype=dtype), some(rows, hidden, seed=5), some(hidden, seed=6)
    for activation in ("silu", "gelu_tanh") if rows == 3 else ("silu",):
        want = x.to(dtype).double() + 0.25 * wanted(experts, y, activation)
        stream, out = x.to(dtype), torch.empty_like(y)
        got = add_experts(
            stream,
            y,
            experts,
            activation,
            after=None,
            before=norm.to(dtype),
            eps=1e-5,
            offset=True,
            residual_scale=0.25,
            y=out,
        )
        assert got is out
        assert error(stream, want) < (5e-3 if short else 1e-6)
        # Of the rounded stream, so that only the norm's own error counts.
        normed = F.rms_norm(stream.double(), (hidden,), 1 + norm.to(dtype).double(), 1e-5)
        assert error(got, normed) < (5e-3 if short else 1e-6)
        if rows > 64:
            continue
        kept = x.to(dtype)
        given: dict[str, Any] = {"before": None, "eps": 1e-5, "residual_scale": 0.25}
        assert add_experts(kept, y, experts, activation, after=None, **given) is kept
        assert torch.equal(kept, stream)


def test_a_norm_behind_the_experts_is_of_their_sum() -> None:
    experts, norm = mixture(4, 2, 40, 24, torch.float32), some(40, seed=6)
    x, y = some(3, 40, seed=5), some(3, 40)
    want = x.double() + F.rms_norm(wanted(experts, y), (40,), norm.double(), 1e-5)
    add_experts(x, y, experts, "silu", after=norm, before=None, eps=1e-5)
    assert error(x, want) < 1e-6


def test_no_rows_are_none() -> None:
    x = some(0, 40)
    experts = mixture(4, 2, 40, 24, torch.float32)
    assert add_experts(x, x, experts, "silu", after=None, before=x.new_ones(40), eps=1e-5).shape == (0, 40)


@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize(("count", "chosen"), [(2, 1), (7, 7), (60, 4), (300, 16)])
def test_the_best_experts_are_chosen(count: int, chosen: int, renormalised: bool) -> None:
    x, router = some(5, 320), some(count, 320, seed=1) / 320**0.5
    found, shares = choose(x, router, chosen, renormalised=renormalised)
    want, experts = (x.double() @ router.double().T).softmax(-1).topk(chosen)
    if renormalised:
        want = want / want.sum(-1, keepdim=True)
    assert (found.dtype, shares.dtype) == (torch.int32, torch.float32)
    assert torch.equal(found.long(), experts)
    torch.testing.assert_close(shares.double(), want, atol=1e-6, rtol=1e-5)


def test_of_equal_shares_the_lower_number_is_chosen_first() -> None:
    router = (
        torch.tensor([[0.0], [2.0], [1.0], [2.0], [1.0], [1.0]], device=DEVICE).expand(6, 16).contiguous()
    )
    found, _ = choose(torch.ones(1, 16, device=DEVICE), router, 4, renormalised=False)
    assert found.tolist() == [[1, 3, 2, 4]]


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's
@pytest.mark.parametrize("value", [float("nan"), float("-nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_row_that_is_not_finite_has_valid_experts_and_disturbs_nobody(rows: int, value: float) -> None:
    experts = mixture(6, 3, 40, 24, torch.float32)
    y = some(rows, 40)
    before = some(rows, 40, seed=5)
    sound = before.clone()
    add_experts(sound, y, experts, "silu", after=None, before=None, eps=1e-5)
    y[rows // 2, 7:9] = value
    found, shares = choose(y, experts.router, 3, renormalised=True)
    bad = found[rows // 2].tolist()
    assert len(set(bad)) == 3
    assert set(bad) <= set(range(6))
    assert bad == [0, 1, 2] or not shares[rows // 2].isnan().any()
    _, as_they_are = choose(y, experts.router, 3, renormalised=False)
    assert torch.equal(as_they_are.isnan(), shares.isnan())
    assert shares[rows // 2].isnan().all() or value == value
    add_experts(before, y, experts, "silu", after=None, before=None, eps=1e-5)
    assert not before[rows // 2].isfinite().all()
    others = torch.arange(rows) != rows // 2
    # numpy's products, which the interpreter takes, depend on where a row stands.
    bound = 0.0 if DEVICE.type == "cuda" else 1e-6
    torch.testing.assert_close(before[others], sound[others], atol=bound, rtol=bound)


def chooses(kind: str, rows: int, chosen: int, count: int) -> Tensor:
    """[rows, chosen] int32, different ones for each row."""
    generator = torch.Generator().manual_seed(rows)
    if kind == "one":  # all rows have the same experts, and the others nobody
        return torch.arange(count - chosen, count).int().expand(rows, -1).contiguous().to(DEVICE)
    if kind == "even":
        return ((torch.arange(rows)[:, None] + torch.arange(chosen)) % count).int().to(DEVICE)
    return torch.rand(rows, count, generator=generator).topk(chosen).indices.int().to(DEVICE)


def check_slots(experts: Tensor, count: int, shape: ExpertsShape, found: Assignments) -> None:
    """Each assignment is in one slot, its expert's, and slots hold as many as they may."""
    every = experts.flatten().long()
    assert torch.equal(found.order.flatten().long(), every.argsort(stable=True))
    assert found.slots.shape == (3, found.num_slots)
    used = []
    for expert, first, end in found.slots.T.tolist():
        assert -1 <= expert < count
        if expert < 0:
            continue
        mine = found.order.flatten()[first : min(first + shape.rows, end)].tolist()
        assert mine
        assert end == int((every <= expert).sum())
        assert {int(every[each]) for each in mine} == {expert}
        used += mine
    assert sorted(used) == list(range(len(every)))


@pytest.mark.parametrize("kind", ["one", "even", "any"])
@pytest.mark.parametrize(
    ("count", "chosen", "rows"), [(4, 1, 7), (5, 2, 33), (8, 8, 4), (64, 8, 3), (70, 6, 20), (33, 3, 11)]
)
def test_slots_hold_each_assignment_once(count: int, chosen: int, rows: int, kind: str) -> None:
    experts = chooses(kind, rows, chosen, count)
    for of_slot in (2, 8):
        for led in (True, False):
            shape = ExpertsShape(of_slot, False, led, 16 if rows < 20 else 64, TILE, TILE)
            check_slots(experts, count, shape, assign(experts, experts.float(), count, shape))


def test_no_slot_is_written_past_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """However rows are distributed: every expert has one row too many for a slot."""
    shape = ExpertsShape(4, False, False, 64, TILE, TILE)
    experts = torch.arange(6, dtype=torch.int32, device=DEVICE).repeat_interleave(5).view(-1, 1)
    fence = torch.full((3 * shape.slots(30, 6) + 64,), 77, dtype=torch.int32, device=DEVICE)
    real = Tensor.new_empty

    def fenced(tensor: Tensor, *sizes: Any, **options: Any) -> Tensor:
        wanted = torch.Size(sizes[0] if isinstance(sizes[0], tuple) else sizes)
        if wanted == (3, shape.slots(30, 6)):
            return fence[: wanted.numel()].view(wanted)
        return real(tensor, *sizes, **options)

    monkeypatch.setattr(Tensor, "new_empty", fenced)
    found = assign(experts, experts.float(), 6, shape)
    check_slots(experts, 6, shape, found)
    assert (fence[found.slots.numel() :] == 77).all()
    assert not (found.slots == 77).any()


def test_one_expert_may_have_all_rows() -> None:
    """In more slots than one, whose rows do not fill the last; a row's share of its expert's output."""
    x, gate_up, down = some(37, 32), some(4 * 2 * 24, 32, seed=1) / 6, some(4 * 32, 24, seed=2) / 5
    shares = some(37, 1, seed=3).abs()
    gate, up = (x.double() @ gate_up[48 * 2 : 48 * 3].double().T).chunk(2, -1)
    want = (F.silu(gate) * up) @ down[64:96].double().T * shares.double()
    for led in (True, False):
        shape = ExpertsShape(16, False, led, 1024, TILE, TILE)
        experts = torch.full((37, 1), 2, dtype=torch.int32, device=DEVICE)
        found = assign(experts, shares, 4, shape)
        got = expert_products(x, gate_up, down, found, shape, chosen=1, activation="silu")
        assert error(got, want) < 1e-6


def whole(experts: Experts) -> None:
    """Weights in 8 bits back in float32, as what they stand for."""
    assert experts.scales is not None
    for name, scale in zip(("gate_up", "down"), experts.scales, strict=True):
        getattr(experts, name).data = getattr(experts, name).float() * scale[:, None]
    experts.scales = None


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("int8", torch.float32), ("fp8", torch.float32), *([("fp8", torch.bfloat16)] * (DEVICE.type == "cuda"))],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 19])
def test_weights_in_8_bits_are_lifted_and_scaled(kind: Any, rows: int, dtype: torch.dtype) -> None:
    """They stand for what they were by a scale of each output, whatever its size is."""
    experts, x = mixture(5, 2, 48, 40, dtype), some(rows, 48, dtype=dtype)
    experts.gate_up.data *= torch.linspace(0.1, 9, len(experts.gate_up), device=DEVICE)[:, None].to(dtype)
    experts.gate_up.data[3] = 0.0
    want = wanted(experts, x)
    experts.quantize_weights(kind)
    assert experts.gate_up.element_size() == experts.down.element_size() == 1
    assert experts.gate_up.dtype == (torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    assert not experts.gate_up.requires_grad
    got = experts_parts(x, experts, "silu").double().view(rows, 2, 48).sum(1)
    assert 1e-4 < error(got, want) < (0.15 if kind == "fp8" else 0.03)
    whole(experts)
    assert error(got, wanted(experts, x)) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_on_cuda_a_mixtures_weights_are_what_is_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router is not, and the CPU's form is its own."""
    here, there = mixture(3, 1, 32, 32, torch.float32), mixture(3, 1, 32, 32, torch.float32)
    router = there.router.clone()
    there.quantize_weights("int8")
    on_cuda = SimpleNamespace(gate_up=SimpleNamespace(device=torch.device("cuda")), gate_up_scales=None)
    on_cuda.quantize_weights = lambda kind: asked.append(kind)
    asked: list[str] = []
    Experts.quantize(on_cuda, "fp8")  # type: ignore[arg-type]
    assert asked == ["fp8"]
    assert torch.equal(there.router, router)
    if DEVICE.type == "cuda":
        here.quantize("int8")
        assert torch.equal(here.gate_up, there.gate_up)


@torch.inference_mode()
def test_layers_take_experts_in_8_bits(tmp_path: Path) -> None:
    model = decoder("granitemoe", {"num_local_experts": 4}, tmp_path, torch.float32)
    tokens = torch.arange(7, device=DEVICE)
    mixtures = [layer.experts for layer in model.layers if layer.experts is not None]
    for experts in mixtures:
        experts.quantize_weights("int8")
    model.fuse_triton()
    got = model(tokens, tokens, Recorder())
    model.fused_cuda = None
    for experts in mixtures:
        whole(experts)
    torch.testing.assert_close(got, model(tokens, tokens, Recorder()), atol=2e-5, rtol=2e-5)


MODELS = {
    "mixtral": {"experts": 8, "chosen": 2, "hidden": 4096, "width": 14336},
    "qwen3": {"experts": 128, "chosen": 8, "hidden": 2048, "width": 768},
    "granite": {"experts": 40, "chosen": 8, "hidden": 1536, "width": 512},
}


@pytest.mark.parametrize(
    ("processors", "kib"),
    [(132, 228), (108, 164), (72, 100), (128, 100)],
    ids=["H100", "A100", "A10", "4090"],
)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("itemsize", "weighed"), [(2, 2), (4, 4), (2, 1)])
def test_shapes_fit_the_device_and_its_load(
    model: str, itemsize: int, weighed: int, processors: int, kib: int
) -> None:
    sizes, forms = MODELS[model], set()
    for rows in (1, 2, 3, 8, 16, 64, 200, 512, 2048, 8192):
        shape = experts_shape(
            rows,
            **sizes,
            itemsize=itemsize,
            weight_itemsize=weighed,
            processors=processors,
            shared=kib << 10,
        )
        forms.add(shape)
        assert shape.alone == (rows == 1)
        assignments = rows * sizes["chosen"]
        slots = shape.slots(assignments, sizes["experts"])
        assert slots <= min(assignments, sizes["experts"] + assignments // 16)
        for tile, gates, outputs in ((shape.gate_up, 2, sizes["width"]), (shape.down, 1, sizes["hidden"])):
            stage = (gates * tile.outputs * weighed + shape.rows * itemsize) * tile.channels
            assert tile.stages >= 2
            assert tile.stages * stage <= (kib - 1) << 10
            # Where outputs can be divided among all multiprocessors, they are.
            assert tile.outputs <= 32 or slots * -(-outputs // tile.outputs) >= processors
    assert len(forms) >= 4


def test_shapes_are_those_of_the_device_and_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = mixture(8, 2, 64, 48, torch.bfloat16)
    asked: list[int | None] = []
    device = experts_triton._device
    monkeypatch.setattr(experts_triton, "_device", lambda index: asked.append(index) or (7, 100 << 10))
    sizes: dict[str, Any] = {"experts": 8, "chosen": 2, "hidden": 64, "width": 48, "itemsize": 2}
    found = shape_for(experts, 5)
    assert found == experts_shape(5, **sizes, weight_itemsize=2, processors=7, shared=100 << 10)
    assert asked == [experts.router.device.index]
    properties = SimpleNamespace(multi_processor_count=9, shared_memory_per_multiprocessor=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert device.__wrapped__(0) == (9, 3)


MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]}


@pytest.mark.parametrize("only", [[], [0]], ids=["experts", "mixed"])
def test_of_a_mixture_the_products_around_attention_are_measured(
    only: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In passes through its experts, whose kernels take what comes, and through the MLPs of other layers."""
    stand_in(monkeypatch)
    monkeypatch.setattr(products_tuning, "side_by_side", lambda ways, here: None)
    overrides = MIXED | {"mlp_only_layers": only}
    model = decoder("qwen3_moe", overrides, tmp_path / "model", torch.bfloat16)
    model.fuse_triton()
    layers = model.fused_cuda
    assert layers is not None
    tried: list[Ways] = []

    def clock(run: Any) -> float:
        tried.append(run.args[1])
        return 10.0 - sum(shape is not None for shape in run.args[1][:4])

    tune_products(layers, tmp_path / "kept", clock=clock)
    for rows, ways in layers.ways.items():
        assert (ways.qkv is not None) == (ways.o is not None) == (rows <= MOST_ROWS)
    assert all(ways.gate_up is None and ways.down is None for ways in tried)
    assert {ways.ahead for ways in tried} == {0, 8 << 20, 24 << 20}  # in front of what is torch's
    found, layers.ways = layers.ways, {}
    tune_products(layers, tmp_path / "kept", clock=clock)
    assert layers.ways == found


@torch.inference_mode()
def test_a_mixtures_layers_are_the_same_where_the_products_around_attention_join(tmp_path: Path) -> None:
    plain = decoder("qwen3_moe", MIXED, tmp_path, torch.float32)
    tokens, positions = torch.arange(7, device=DEVICE) * 5 % 61, torch.arange(7, device=DEVICE)
    reference = Recorder()
    hidden = plain(tokens, positions, reference)
    plain.fuse_triton()
    layers, dense = plain.fused_cuda, plain.layers[1]
    assert layers is not None
    every = Ways(
        *(
            some_shapes(7, linear.in_features, len(linear.weight), Around(activation="silu" * (index == 2)))[
                0
            ]
            for index, linear in enumerate(dense.linears)
        )
    )
    for ways in (every, every._replace(qkv=None, down=None)):
        layers.ways = {16: ways}
        seen, given = Recorder(), torch.empty_like(hidden)
        assert plain(tokens, positions, seen, given) is given
        torch.testing.assert_close(given, hidden, atol=2e-5, rtol=2e-5)
        for ours, theirs in zip(seen.given, reference.given, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
