"""Compile the kernels between two products for GPUs that need not be there, as the decoder would call them.

    python -m tests.engine.model.compile_triton [CAPABILITY ...]

A line of JSON: how many were compiled for each compute capability (times ten), and those that spill registers
(bytes a thread). Run without TRITON_INTERPRET in the environment.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from engine.attention.base import Rotary
from engine.model import experts_choice_triton, experts_triton, triton_kernels as kernels, triton_quantize
from engine.model.experts_config import Clamp, Gate
from engine.model.experts_shapes import experts_shape
from engine.model.product_shapes import MOST_TILES, Around, shapes
from engine.model.triton_products import product, row_kernel, rows_kernel
from engine.model.triton_streamed import streamed_kernel
from tests.engine.triton_compile import compile_only, resources, use

KERNELS = (
    "_embed_kernel",
    "_add_norm_kernel",
    "_rotate_kernel",
    "_gated_kernel",
)

EXPERTS = (
    *((experts_choice_triton, f"{name}_kernel") for name in ("router", "choose", "assign")),
    *((experts_triton, f"{name}_kernel") for name in ("experts", "join_experts")),
)

SHARED = {80: 164 << 10, 89: 100 << 10, 90: 228 << 10}
"""Bytes of a multiprocessor, by compute capability."""


def call_all(dtype: torch.dtype, hidden: int, fp8: bool) -> None:
    """Every kernel in every form that a family asks for."""

    def some(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    x, weight, positions = some(4, hidden), some(hidden), torch.arange(4)
    kernels.rms_norm(x, weight, 1e-5)
    kernels.embed(positions, x, 1.0, weight, 1e-5)
    kernels.embed(positions, x, 3.0, weight, 1e-5, offset=True)
    kernels.embed(positions, x, 3.0, None, 1e-5)
    for after, before, offset in ((None, weight, False), (weight, None, False), (weight, weight, True)):
        kernels.add_norm(x, x, after=after, before=before, eps=1e-5, offset=offset, residual_scale=0.5)
    for rows in (1, 64):
        ahead = some(4 * hidden, hidden), 1 << 23
        kernels.add_norm(
            some(rows, hidden), some(rows, hidden), after=None, before=weight, eps=1e-5, ahead=ahead
        )
        kernels.gated_activation(some(rows, 2 * 3 * hidden), "silu", ahead)
    for heads, head_dim, rotated in ((2, 64, 64), (11, 128, 128), (16, 96, 48), (11, 256, 256)):
        qk = some(4, heads, head_dim)
        rotary = Rotary(some(16, rotated), some(16, rotated))
        kernels.rotate(qk, positions, rotary)
        if rotated == head_dim:
            normed = rotary._replace(norm=some(heads * head_dim))
            kernels.rotate(qk, positions, normed._replace(offset=True))
            kernels.rotate(qk, positions, normed._replace(after=True))
    for activation in ("silu", "gelu_tanh"):
        kernels.gated_activation(some(4, 2 * 3 * hidden), activation)
    for kind in (torch.int8, torch.float8_e4m3fn) if fp8 else (torch.int8,):
        triton_quantize.quantize_rows(x, kind, 32)
        triton_quantize.quantize_rows(some(4, 3 * hidden), kind)
    sums, scale = torch.empty(4, hidden, dtype=torch.int32), torch.empty(max(4, hidden))
    for bias in (None, weight):
        triton_quantize.scale_sums(sums, scale[:4].view(4, 1), scale[:hidden].view(1, -1), bias, dtype)


def call_products(dtype: torch.dtype, hidden: int, width: int) -> None:
    """The products of a layer in every shape that is measured."""
    bias, norm = torch.empty(2 * width, dtype=dtype), torch.empty(hidden, dtype=dtype)
    counts = torch.empty(MOST_TILES, dtype=torch.int32)
    for rows in (1, 8, 16, 64):
        for size, outputs, around in (
            (hidden, width, Around(norm=True)),
            (hidden, 2 * width, Around(norm=True, offset=True, activation="gelu_tanh")),
            (hidden, 2 * width, Around(norm=True, activation="silu")),
            (width, hidden, Around(adds=True)),
        ):
            x, weight = torch.empty(rows, size, dtype=dtype), torch.empty(outputs, size, dtype=dtype)
            gated = bool(around.activation)
            for shape in shapes(rows, size, outputs // (2 if gated else 1), gated, 132):
                for given in (None, bias[:outputs]) if around.offset or around.adds else (None,):
                    y = torch.empty(rows, outputs, dtype=dtype) if around.adds else None
                    norms = around.norm and not shape.streams
                    inside = around._replace(norm=norms)
                    norm_given = norm if norms else None
                    product(x, weight, given, shape, inside, norm=norm_given, eps=1e-5, y=y, counts=counts)


def call_experts(dtype: torch.dtype, weight_dtype: torch.dtype, capability: int) -> None:
    """Mixtures from one row to many; sizes that are not multiples of 16 too."""
    some, weight = (torch.empty(1, dtype=kind) for kind in (dtype, weight_dtype))  # which nobody reads
    whole = dtype == weight_dtype
    for count, chosen, hidden, width in ((8, 2, 4096, 14336), (128, 8, 2048, 768), (40, 8, 1544, 520)):
        if hidden % 16 and dtype == torch.float16:
            continue  # for which Triton 3.6 keeps 40 bytes of a thread of the last kernel in memory
        for rows in (1, 4, 16, 64, 8192) if dtype == torch.bfloat16 else (1, 256):
            shape = experts_shape(
                rows,
                experts=count,
                chosen=chosen,
                hidden=hidden,
                width=width,
                itemsize=dtype.itemsize,
                weight_itemsize=weight_dtype.itemsize,
                processors=132,
                shared=SHARED[capability],
            )
            x, router = some.expand(rows, hidden), some.expand(count, hidden)
            found = experts_choice_triton.assign(
                *experts_choice_triton.choose(x, router, chosen, renormalised=True), count, shape
            )
            for activation in ("silu", "gelu_tanh") if rows == 16 else ("silu",):
                experts_triton.expert_products(
                    x,
                    weight.expand(count * 2 * width, hidden),
                    weight.expand(count * hidden, width),
                    found,
                    shape,
                    chosen=chosen,
                    activation=activation,
                    scales=None if whole else (found.shares, found.shares),
                )
            experts_triton.join_experts(
                x, some.expand(rows * chosen, hidden), chosen, after=None, before=some, eps=1e-5
            )


def call_gates(dtype: torch.dtype) -> None:
    """ERNIE's choice of experts, GLM-4.5's, and one among groups; and what is beside experts."""
    some, precise = torch.empty(1, dtype=dtype), torch.empty(1, dtype=torch.float32)
    ernie, glm = Gate(corrected=True, least=1e-12), Gate(sigmoid=True, corrected=True, least=1e-20)
    for count, chosen, hidden, gate, router in (
        (64, 6, 2560, ernie, precise),
        (128, 8, 4096, glm, some),
        (160, 8, 5120, glm._replace(scale=2.5), some),
        (256, 8, 7168, glm._replace(groups=8, open_groups=4), some),
    ):
        x, correction = some.expand(4, hidden), precise.expand(count)
        router = router.expand(count, hidden)
        experts_choice_triton.choose(x, router, chosen, renormalised=True, gate=gate, correction=correction)
        for of_input in (None, some.expand(hidden)):
            beside = experts_triton.Beside(x, x, of_input)
            parts = some.expand(4 * chosen, hidden)
            experts_triton.join_experts(x, parts, chosen, after=None, before=some, eps=1e-5, beside=beside)


def call_gpt_oss(dtype: torch.dtype, capability: int, *, mxfp4: bool) -> None:
    """Experts with biases and a clamp, in 4 bits or not."""
    some, four_bits = torch.empty(1, dtype=dtype), torch.empty(1, dtype=torch.uint8)
    for count, chosen, hidden, width in ((32, 4, 2880, 2880), (8, 2, 64, 192)):
        for rows in (1, 4, 16, 64, 8192) if dtype == torch.bfloat16 else (1, 256):
            shape = experts_shape(
                rows,
                experts=count,
                chosen=chosen,
                hidden=hidden,
                width=width,
                itemsize=dtype.itemsize,
                weight_itemsize=0 if mxfp4 else dtype.itemsize,
                processors=132,
                shared=SHARED[capability],
            )
            x, router, bias = some.expand(rows, hidden), some.expand(count, hidden), some.expand(count)
            chose = experts_choice_triton.choose(x, router, chosen, renormalised=True, bias=bias)
            outputs = count * 2 * width, count * hidden
            columns = (hidden // 2, width // 2) if mxfp4 else (hidden, width)
            weight, words = (four_bits if mxfp4 else some), torch.empty(1, dtype=torch.int32)
            experts_triton.expert_products(
                x,
                weight.expand(outputs[0], columns[0]),
                weight.expand(outputs[1], columns[1]),
                experts_choice_triton.assign(*chose, count, shape),
                shape,
                chosen=chosen,
                activation="silu",
                clamp=Clamp(7.0, 1.702),
                scales=(words, words) if mxfp4 else None,
                biases=(some.expand(outputs[0]), some.expand(outputs[1])),
            )


def main() -> int:
    compiled = compile_only(
        *(getattr(kernels, name) for name in KERNELS),
        *(getattr(module, name) for module, name in EXPERTS),
        triton_quantize._quantize_kernel,
        triton_quantize._scale_kernel,
        row_kernel,
        rows_kernel,
        streamed_kernel,
    )
    found: dict[str, Any] = {"compiled": {}, "spilled": {}}
    for capability in [int(word) for word in sys.argv[1:]] or [90]:
        use(capability)
        compiled.clear()
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            # Not only multiples of 16, which Triton compiles apart.
            for hidden in (576, 588, 4096) if dtype == torch.bfloat16 else (576, 4096):
                call_all(dtype, hidden, fp8=capability >= 89)
            call_experts(dtype, dtype, capability)
            call_gates(dtype)
            call_gpt_oss(dtype, capability, mxfp4=True)
        call_gpt_oss(torch.bfloat16, capability, mxfp4=False)
        call_experts(torch.bfloat16, torch.int8, capability)
        if capability >= 89:
            call_experts(torch.bfloat16, torch.float8_e4m3fn, capability)
        for hidden, width in ((576, 1536), (4096, 11008)):
            call_products(torch.bfloat16, hidden, width)
        found["compiled"][capability] = len(compiled)
        for kernel in compiled:
            # Of the products' many shapes those that spill lose where they are measured.
            bound = 128 if kernel.name in ("row_kernel", "rows_kernel") else 0
            if (num_bytes := resources(kernel)["spilled"]) > bound:
                found["spilled"][f"{kernel.name} {capability}"] = num_bytes
    print(json.dumps(found))
    return 1 if found["spilled"] else 0


if __name__ == "__main__":
    sys.exit(main())
