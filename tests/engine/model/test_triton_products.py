"""Products of few rows with what lies around them against float64, and which the measurement takes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from engine import triton_dependent
from engine.model import products_tuning, triton_kernels
from engine.model.fused_triton import FusedLayers, Ways
from engine.model.product_shapes import MOST_ROWS, MOST_TILES, Around, Shape, shapes
from engine.model.products_tuning import ROWS, tune_products
from engine.model.triton_products import product
from engine.triton_dependent import ahead_of
from tests.engine.model.test_fused_triton import Recorder, decoder

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if DEVICE.type == "cuda" else [torch.float32]
"""The interpreter multiplies bfloat16 wrongly."""

PROCESSORS = 4

AROUND = [
    Around(),
    Around(norm=True),
    Around(norm=True, offset=True),
    Around(norm=True, activation="silu"),
    Around(activation="gelu_tanh"),
    Around(adds=True),
]


def wanted(x: Tensor, weight: Tensor, bias: Tensor | None, around: Around, norm: Tensor, y: Tensor) -> Tensor:
    x, weight, norm = x.double(), weight.double(), norm.double()
    if around.norm:
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5) * (norm + (1 if around.offset else 0))
    out = x @ weight.T + (0 if bias is None else bias.double())
    if around.activation:
        gate, up = out.chunk(2, 1)
        out = (F.silu(gate) if around.activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    return y.double() + 0.5 * out if around.adds else out


def some_shapes(rows: int, size: int, outputs: int, around: Around) -> list[Shape]:
    """Those that take a weight of so many outputs."""
    gated = bool(around.activation)
    return shapes(rows, size, outputs // 2 if gated else outputs, gated, PROCESSORS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("around", AROUND, ids=str)
@pytest.mark.parametrize(
    ("rows", "size", "outputs", "biased"),
    [
        (1, 64, 96, True),
        (1, 208, 34, False),
        (1, 2112, 30, True),
        (2, 80, 50, False),
        (16, 208, 64, True),
        (16, 1104, 34, False),
        (17, 80, 34, True),
        (20, 1104, 16, True),
        (MOST_ROWS, 96, 32, False),
        (2, 2112, 50, True),
        (17, 2064, 130, False),
        (17, 2064, 402, True),  # programs have fewer outputs than their tiles
        (MOST_ROWS, 2320, 66, True),
    ],
)
def test_every_shape_gives_the_product(
    rows: int, size: int, outputs: int, biased: bool, around: Around, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows + size)

    def some(*lengths: int) -> Tensor:
        return torch.randn(lengths, generator=generator).to(dtype).to(DEVICE)

    x, weight, norm = some(rows, size), some(outputs, size) / size**0.5, 1 + 0.5 * some(size)
    bias, y = some(outputs) if biased else None, some(rows, outputs)
    if around.adds:
        want = wanted(x, weight, bias, around, norm, y)
    else:
        want = wanted(x, weight, bias, around, norm, y[:0])
    counts = torch.zeros(MOST_TILES, dtype=torch.int32, device=DEVICE)
    tried = some_shapes(rows, size, outputs, around)
    assert any(shape.fewer for shape in tried) if outputs == 402 else tried
    ran = 0
    for shape in tried:
        if shape.streams and around.norm:
            with pytest.raises(ValueError, match="takes a normed input"):
                product(x, weight, bias, shape, around, norm=norm, counts=counts)
            ran += 1
            continue
        kept = y.clone()
        try:
            got = product(
                x,
                weight,
                bias,
                shape,
                around,
                norm=norm if around.norm else None,
                eps=1e-5,
                y=kept if around.adds else None,
                residual_scale=0.5,
                counts=counts,
            )
        except OutOfResources:  # as when shapes are measured; float32 takes twice the shared memory
            continue
        ran += 1
        assert not counts.any()
        assert (got is kept) == around.adds
        assert got.dtype == dtype
        error = (got.double() - want).norm() / want.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), shape
    if not ran and dtype == torch.float32:
        pytest.skip("only tests give float32 to these kernels, and no shape of it fits this device")
    assert ran


@pytest.mark.parametrize("rows", [1, 5])
def test_float16_does_not_overflow_where_the_norm_keeps_it_small(rows: int) -> None:
    x, weight = 1e4 * torch.randn(rows, 208), torch.randn(32, 208) / 20
    x, weight, norm = (tensor.half().to(DEVICE) for tensor in (x, weight, torch.full((208,), 20.0)))
    want = wanted(x, weight, None, Around(norm=True), norm, x[:0])
    for shape in shapes(rows, 208, 32, False, PROCESSORS):
        got = product(x, weight, None, shape, Around(norm=True), norm=norm, eps=1e-5)
        assert (got.double() - want).norm() / want.norm() < 1e-2, shape


def test_rows_do_not_depend_on_one_another() -> None:
    x, weight, norm = torch.randn(16, 80), torch.randn(48, 80), torch.ones(80)
    x, weight, norm = x.to(DEVICE), weight.to(DEVICE), norm.to(DEVICE)
    (shape, *_), around = shapes(16, 80, 24, True, PROCESSORS), Around(norm=True, activation="silu")
    together = product(x, weight, None, shape, around, norm=norm, eps=1e-5)
    for some in (torch.tensor([3, 9]), torch.tensor([15, 0, 4])):
        alone = product(x[some].contiguous(), weight, None, shape, around, norm=norm, eps=1e-5)
        # numpy's products, which the interpreter takes, depend on where a row stands.
        bound = 0.0 if DEVICE.type == "cuda" else 1e-5
        torch.testing.assert_close(alone, together[some], rtol=bound, atol=bound)


def test_odd_sizes_and_many_rows_are_torchs() -> None:
    assert not shapes(1, 584, 64, False, 132)
    assert not shapes(2, 4104, 64, False, 132)
    assert not shapes(MOST_ROWS + 1, 576, 64, False, 132)
    # There is a count for each tile that programs share.
    for width in (4, 64, 4096, 64 * (MOST_TILES + 1)):
        for processors in (1, 20, 132):
            found = shapes(2, 4096, width, True, processors)
            assert all(-(-width // s.height) <= MOST_TILES or s.splits == 1 for s in found)
    assert shapes(1, 4096, 64, False, 132)


SEVEN_B = [(4096, 12288, False), (4096, 4096, False), (4096, 11008, True), (11008, 4096, False)]


@pytest.mark.parametrize("rows", [2, 16, 64])
@pytest.mark.parametrize(
    ("processors", "kib"),
    [(132, 228), (108, 164), (72, 100), (128, 100)],
    ids=["H100", "A100", "A10", "4090"],
)
@pytest.mark.parametrize(("size", "width", "gated"), SEVEN_B)
def test_tiles_that_stream_fit_a_multiprocessors_memory(
    rows: int, size: int, width: int, gated: bool, processors: int, kib: int
) -> None:
    found = shapes(rows, size, width, gated, processors, kib << 10)
    assert found
    for shape in found:
        stage = ((2 if gated else 1) * shape.outputs + shape.rows) * shape.channels * 2
        assert shape.stages >= 2
        assert shape.stages * stage <= (kib - 1) << 10  # of a program


@pytest.mark.parametrize("rows", [2, 16, 64])
@pytest.mark.parametrize(("size", "width", "gated"), SEVEN_B)
def test_a_weight_that_streams_fills_all_multiprocessors(
    rows: int, size: int, width: int, gated: bool
) -> None:
    """A 7B's products: of what the busiest loads, the others load most too, and its memory holds it."""
    found = shapes(rows, size, width, gated, 132)
    assert len(set(found)) == len(found) >= 3
    # Where there are outputs enough for each multiprocessor, none are shared.
    assert all((shape.splits == 1) == (width >= 132 * 40) for shape in found)
    shares = []
    for shape in found:
        assert shape.streams
        assert shape.rows >= rows
        tiles, two = -(-width // shape.height), 2 if gated else 1
        stage = (two * shape.outputs + shape.rows) * shape.channels * 2
        assert 2 <= shape.stages <= 8
        assert shape.stages * stage <= 227 << 10  # of a program, on Hopper
        programs, steps = tiles * shape.splits, -(-size // shape.channels // shape.splits)
        busiest = -(-programs // 132) * steps
        shares.append(width / shape.height * size / shape.channels / 132 / busiest)
    assert min(shares) > 0.85


def fused(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> tuple[Any, FusedLayers]:
    model = decoder("llama", overrides, folder, dtype)
    model.fuse_triton()
    assert model.fused_cuda is not None
    return model, model.fused_cuda


def first_of(model: Any, rows: int) -> Ways:
    layer = model.layers[0]
    found = [
        some_shapes(rows, linear.in_features, len(linear.weight), Around(activation="silu" * (index == 2)))[0]
        for index, linear in enumerate(layer.linears)
    ]
    return Ways(*found)


@pytest.mark.parametrize("rows", [1, 7])
@torch.inference_mode()
def test_layers_are_the_same_whichever_products_join(rows: int, tmp_path: Path) -> None:
    plain, layers = fused(tmp_path, attention_bias=True, mlp_bias=True)
    tokens, positions = torch.arange(rows, device=DEVICE) * 5 % 61, torch.arange(rows, device=DEVICE)
    reference = Recorder()
    hidden = plain(tokens, positions, reference)
    every = first_of(plain, rows)
    some = [Ways(**{name: getattr(every, name)}) for name in Ways._fields]
    stream = Shape(16, 16, 32, 4, splits=2, stages=2)
    streams = Ways(stream, stream, stream, stream)
    streaming = [streams, *(every._replace(**{name: stream}) for name in ("qkv", "o", "gate_up", "down"))]
    for ways in [*some, every, every._replace(qkv=None), every._replace(gate_up=None), *streaming]:
        layers.ways = {16: ways}
        seen, given = Recorder(), torch.empty_like(hidden)
        assert plain(tokens, positions, seen, given) is given
        torch.testing.assert_close(given, hidden, atol=2e-5, rtol=2e-5)
        for ours, theirs in zip(seen.given, reference.given, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@torch.inference_mode()
def test_steps_take_the_ways_of_the_smallest_bucket_that_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layers = fused(tmp_path)
    taken: list[int] = []
    real = FusedLayers._open

    def note(self: FusedLayers, linear: Any, x: Tensor, y: Any, norm: Any, shape: Any, *rest: Any) -> Tensor:
        taken.append(0 if shape is None else shape.outputs)
        return real(
            self, linear, x, y, norm, None if shape is None else shapes(len(x), 32, 32, True, 4)[0], *rest
        )

    monkeypatch.setattr(FusedLayers, "_open", note)
    shape = Shape(1, 1, 32, 4)
    layers.ways = {
        n: Ways(qkv=shape._replace(outputs=n), gate_up=shape._replace(outputs=n)) for n in (16, 1, MOST_ROWS)
    }
    for rows, bucket in ((1, 1), (2, 16), (16, 16), (17, 64), (64, 64), (65, 0)):
        taken.clear()
        tokens = torch.arange(rows, device=DEVICE) % 7
        model(tokens, tokens, Recorder())
        assert set(taken) == {bucket}


@torch.inference_mode()
def test_in_front_of_a_product_of_torchs_its_weight_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layers = fused(tmp_path, num_hidden_layers=2)
    asked: list[tuple[Any, int]] = []
    add_norm, gated = triton_kernels.add_norm, triton_kernels.gated_activation

    def noted_norm(*args: Any, ahead: tuple[Any, int], **options: Any) -> Tensor:
        asked.append(ahead)
        return add_norm(*args, ahead=ahead, **options)

    def noted_gate(gate_up: Tensor, activation: str, ahead: tuple[Any, int]) -> Tensor:
        asked.append(ahead)
        return gated(gate_up, activation, ahead)

    monkeypatch.setattr(triton_kernels, "add_norm", noted_norm)
    monkeypatch.setattr(triton_kernels, "gated_activation", noted_gate)
    first, second = model.layers
    every, tokens = first_of(model, 5), torch.arange(5, device=DEVICE)
    behind = [
        first.gate_up_proj,
        first.down_proj,
        second.qkv_proj,
        second.gate_up_proj,
        second.down_proj,
        None,
    ]
    for ways, ours in ((Ways(), ()), (Ways(down=every.down), ("down",)), (Ways(qkv=every.qkv), ("qkv",))):
        layers.ways = {8: ways._replace(ahead=4096)}
        asked.clear()
        model(tokens, tokens, Recorder())
        wanted = [None if linear is None else linear.weight for linear in behind]
        if "down" in ours:  # its kernel adds, and is not asked for
            wanted = [first.gate_up_proj.weight, None, second.gate_up_proj.weight, None]
        if "qkv" in ours:
            wanted[2] = None
        assert [weight is want for (weight, _), want in zip(asked, wanted, strict=True)] == [True] * len(
            wanted
        )
        assert {size for weight, size in asked if weight is not None} == {4096}


def test_so_many_lines_are_asked_for() -> None:
    weight = torch.empty(64, 128, dtype=torch.bfloat16)  # 128 lines
    assert ahead_of(weight, 1 << 20, 4) == (128, 32)
    assert ahead_of(weight, 1280, 4) == (10, 4)
    assert ahead_of(weight, 1 << 20, 100) == (128, 2)
    assert ahead_of(weight, 0, 4) == ahead_of(None, 1 << 20, 4) == (0, 0)
    assert ahead_of(weight.float(), 1 << 20, 4) == (0, 0)
    wide = torch.empty(1 << 13, 1 << 8, dtype=torch.bfloat16)  # 32768 lines
    assert ahead_of(wide, 1 << 30, 2) == (8192, 4096)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        properties = SimpleNamespace(
            name="a GPU", multi_processor_count=4, shared_memory_per_multiprocessor=100 << 10
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_the_measurement_takes_what_is_fastest_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stand_in(monkeypatch)
    monkeypatch.setattr(products_tuning, "side_by_side", lambda ways, here: None)
    model, layers = fused(tmp_path / "model", torch.bfloat16)
    liked = {rows: first_of(model, rows) for rows in ROWS if rows <= MOST_ROWS}
    clocked: list[Ways] = []

    def clock(run: Any) -> float:
        _, ways = run.args
        clocked.append(ways)
        # The first shapes of qkv and down pay, whatever the others are, and so does a little ahead.
        by_torch = 10.0 + sum(shape is not None for shape in (ways.o, ways.gate_up)) - (ways.ahead == 8 << 20)
        return by_torch - sum(
            any(getattr(ways, n) == getattr(w, n) for w in liked.values()) for n in ("qkv", "down")
        )

    tune_products(layers, tmp_path / "kept", clock=clock)
    assert set(layers.ways) == set(ROWS)
    for rows, ways in layers.ways.items():
        if rows <= MOST_ROWS:
            assert ways == Ways(qkv=liked[rows].qkv, down=liked[rows].down, ahead=8 << 20)
        else:
            assert ways == Ways(ahead=8 << 20)
    (file,) = (tmp_path / "kept").iterdir()
    assert json.loads(file.read_text())["device"]
    assert "measured the products" in caplog.text
    found, layers.ways = layers.ways, {}
    clocked.clear()
    tune_products(layers, tmp_path / "kept", clock=clock)
    assert not clocked
    assert layers.ways == found


@pytest.mark.parametrize("refused", [False, True])
def test_torchs_products_stay_where_no_other_is_faster(
    refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours gain only beside one another here, and all of them together are still no faster, or do not run."""
    stand_in(monkeypatch)
    monkeypatch.setattr(products_tuning, "side_by_side", lambda ways, here: None)
    _, layers = fused(tmp_path / "model", torch.bfloat16)
    rooms: list[int] = []
    monkeypatch.setattr(products_tuning, "shapes", lambda *given: rooms.append(given[-1]) or shapes(*given))

    def clock(run: Any) -> float:
        ours = sum(shape is not None for shape in run.args[1][:4])
        if ours and refused:
            raise OutOfResources(1, 0, "shared memory")
        return 10.0 if ours == 0 else 14.0 - ours

    tune_products(layers, tmp_path / "kept", clock=clock)
    assert set(layers.ways.values()) == {Ways()}
    assert DEVICE.type == "cuda" or set(rooms) == {100 << 10}  # of the device, not of a Hopper


def test_shapes_that_do_not_run_cost_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    monkeypatch.setattr(products_tuning, "side_by_side", lambda ways, here: None)
    model, layers = fused(tmp_path / "model", torch.bfloat16)
    wanted = {rows: first_of(model, rows) for rows in ROWS if rows <= MOST_ROWS}

    def clock(run: Any) -> float:
        ways = run.args[1]
        refused = [(first.o, first.gate_up) for first in wanted.values()]
        if any(ways.o == o or ways.gate_up == gate_up for o, gate_up in refused):
            raise OutOfResources(1, 0, "shared memory")
        return 10.0 - sum(shape is not None for shape in (ways.qkv, ways.down))

    tune_products(layers, tmp_path / "kept", clock=clock)
    for rows, first in wanted.items():
        assert (layers.ways[rows].qkv, layers.ways[rows].down) == (first.qkv, first.down)


@pytest.mark.parametrize(
    ("capability", "interprets", "early"),
    [((9, 0), False, True), ((8, 9), False, False), ((9, 0), True, False)],
)
def test_kernels_begin_early_from_hopper_on(
    capability: tuple[int, int], interprets: bool, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interprets else "0")
    triton_dependent._launched_early.cache_clear()
    try:
        found = triton_dependent.launched_early(torch.device("cuda", 0))
        assert found == (early, {"launch_pdl": True} if early else {})
        assert triton_dependent.launched_early(torch.device("cpu")) == (False, {})
    finally:
        triton_dependent._launched_early.cache_clear()


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("gemma3_text", torch.bfloat16), ("olmo2", torch.bfloat16), ("llama", torch.float32)],
)
def test_what_cannot_join_is_left_alone(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    model = decoder(family, {}, tmp_path / "model", dtype)
    model.fuse_triton(tmp_path / "kept")
    assert model.fused_cuda is not None
    assert not model.fused_cuda.ways
    assert not (tmp_path / "kept").exists()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs an NVIDIA GPU")
def test_a_gpu_measures_and_gives_the_same(tmp_path: Path) -> None:
    plain, layers = fused(tmp_path / "model", torch.bfloat16)
    tokens = torch.arange(5, device=DEVICE)
    with torch.inference_mode():
        hidden = plain(tokens, tokens, Recorder())
        tune_products(layers, tmp_path / "kept")
        assert set(layers.ways) == set(ROWS)
        layers.ways = {16: first_of(plain, 5)}
        torch.testing.assert_close(plain(tokens, tokens, Recorder()), hidden, atol=5e-2, rtol=5e-2)
