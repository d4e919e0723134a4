"""How many kernels a decode step of the plain Llama shape launches: a small model waits for each of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from engine.attention import triton as attention_module
from engine.attention.base import AttentionInput
from engine.attention.triton import TritonAttention
from engine.attention.triton_tiles import Kind, Tile
from engine.cache.pool import KVPool
from engine.model import triton_kernels, triton_products
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.fused_triton import Ways
from engine.model.product_shapes import Shape
from tests.engine.model.compile_triton import EXPERTS, KERNELS
from tests.support import save_model, tiny_llama, tiny_model

MANY = 132


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators that would be kernels on a GPU, and Triton kernels, which do nothing meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        kernels = [(triton_kernels, name) for name in KERNELS]
        kernels += EXPERTS
        kernels += [(triton_products, name) for name in ("row_kernel", "rows_kernel", "streamed_kernel")]
        for module, name in [*kernels, *((attention_module, n) for n in ("attend_kernel", "join_kernel"))]:
            monkeypatch.setattr(module, name, _Kernel(name, self.counts))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in ("empty", "new_empty", "empty_like"):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class _Kernel:
    def __init__(self, name: str, counts: Counter[str]) -> None:
        self._name, self._counts = name, counts

    def __getitem__(self, grid: object) -> Any:
        def launch(*args: object, **options: object) -> None:
            self._counts[self._name] += 1

        return launch


@torch.inference_mode()
def launches(
    layers: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    joins: bool = False,
    rotates: bool = True,
    ways: Ways | None = None,
    family: str = "llama",
    **overrides: Any,
) -> Counter[str]:
    """Of a step of one sequence with 4 nodes, whose keys are split."""
    model = tiny_llama(num_hidden_layers=layers)
    if family != "llama":
        model = tiny_model(family, num_hidden_layers=layers, **overrides)
    config = ModelConfig.from_folder(save_model(model, folder))
    decoder = Decoder(config, torch.float32, 512)
    decoder.randomize(torch.device("cpu"))
    decoder.fuse_triton()
    if ways is not None:
        assert decoder.fused_cuda is not None
        decoder.fused_cuda.ways = {4: ways}
    pool = KVPool(
        num_layers=layers,
        num_blocks=2,
        block_size=512,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    tiles = {Kind(rows, chunk=False): Tile(16, 16, 4, 2, joins, rotates) for rows in (8, 16)}
    attention = TritonAttention(config.group, tiles=tiles, processors=MANY)
    nodes = torch.arange(4)
    positions = 300 + nodes
    batch = AttentionInput(
        block_tables=torch.ones(1, 1, dtype=torch.int64),
        lengths=torch.tensor([300]),
        rows=positions[None],
        max_length=512,
        ancestors=(2 << nodes[None]) - 1,
        depths=nodes[None],
    )
    out, logits = torch.empty(4, config.hidden_size), torch.empty(4, config.vocab_size)
    attention.plan(batch, pool)
    with Launches(monkeypatch) as found:
        decoder.logits(decoder(nodes, positions, attention, out), logits)
    return found.counts


@pytest.mark.parametrize(("joins", "rotates"), [(False, True), (True, True), (True, False)])
def test_a_layer_is_four_products_and_four_or_five_kernels(
    joins: bool, rotates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of attention may be joined, and queries and keys rotated, by kernels of their own."""
    two, three = (launches(n, tmp_path / str(n), monkeypatch, joins=joins, rotates=rotates) for n in (2, 3))
    assert three - two == {
        "aten.linear.default": 4,
        "attend_kernel": 1,
        **({} if joins else {"join_kernel": 1}),
        **({} if rotates else {"_rotate_kernel": 1}),
        "_add_norm_kernel": 2,
        "_gated_kernel": 1,
    }


def test_a_layer_is_as_few_kernels_as_products_and_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all products take in what is around them."""
    shape = Shape(16, 16, 16, 4)
    ways = Ways(shape, shape, shape, shape)
    two, three = (launches(n, tmp_path / str(n), monkeypatch, joins=True, ways=ways) for n in (2, 3))
    assert three - two == {"rows_kernel": 4, "attend_kernel": 1}


def test_where_weights_stream_norms_are_kernels_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(16, 16, 16, 4, splits=2, stages=2)
    ways = Ways(shape, shape, shape, shape)
    two, three = (launches(n, tmp_path / str(n), monkeypatch, joins=True, ways=ways) for n in (2, 3))
    assert three - two == {"streamed_kernel": 4, "_add_norm_kernel": 2, "attend_kernel": 1}


def test_experts_are_six_kernels_where_there_were_four(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many experts there are."""
    two, three = (launches(n, tmp_path / str(n), monkeypatch, joins=True, family="mixtral") for n in (2, 3))
    assert three - two == {
        "aten.linear.default": 2,
        "attend_kernel": 1,
        "_add_norm_kernel": 1,
        "router_kernel": 1,
        "choose_kernel": 1,
        "assign_kernel": 1,
        "experts_kernel": 2,
        "join_experts_kernel": 1,
    }


def test_an_mlp_beside_the_experts_is_its_products_and_a_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However experts are chosen."""
    sizes = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 4}
    given = {"joins": True, "family": "glm4_moe", "topk_group": 2, **sizes}
    two, three = (launches(n, tmp_path / str(n), monkeypatch, **given) for n in (2, 3))
    assert three - two == {
        "aten.linear.default": 4,
        "attend_kernel": 1,
        "_add_norm_kernel": 1,
        "_gated_kernel": 1,
        "router_kernel": 1,
        "choose_kernel": 1,
        "assign_kernel": 1,
        "experts_kernel": 2,
        "join_experts_kernel": 1,
    }


def test_around_the_layers_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding with the first norm before them; lm_head behind, which writes where logits shall be."""
    one, two = (launches(layers, tmp_path / str(layers), monkeypatch) for layers in (1, 2))
    around = one - (two - one)
    assert around == {"_embed_kernel": 1, "aten.mm.out": 1}
