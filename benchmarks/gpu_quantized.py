"""The part of `benchmarks.gpu` about weights in 8 bits: steps of the 7B shape, and single linears."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_run import Run, ms
from benchmarks.gpu_shapes import SHAPES, TINY
from benchmarks.gpu_steps import load_shape, made_up_engine, step_times
from engine.model.quantize_cuda import RowwiseWeight

__all__ = ["quantized_steps"]


def quantized_steps(run: Run) -> dict[str, Any]:
    """The 7B shape with weights in 8 bits next to bf16, and torchao's own linear next to ours."""
    found: dict[str, Any] = {"steps": {}}
    try:
        found["linears"] = _linears(run)
    except torch.AcceleratorError:
        raise  # the device is lost
    except Exception as error:  # torchao may not have been carried, or a product is refused
        found["linears"] = f"{type(error).__name__}: {error}"[:500]
    if not run.cuda:
        return found
    run.record("quantized_steps", found)
    shape = TINY if run.tiny else SHAPES["llama-2-7b"]
    tokens, context = (2048, 24) if run.tiny else (30_000, 512)
    for name in ("none", "fp8", "int8"):
        rows: list[dict[str, Any]] = []
        try:
            settings = {"quantization": name, "dtype": "bfloat16"}
            with load_shape(run, shape, tokens=tokens, **settings) as (loaded, _):
                for batch in (1, 2) if run.tiny else (1, 16):
                    for nodes in (1, 4) if run.tiny else (1, 64):
                        case: dict[str, Any] = {"batch": batch, "context": context, "nodes": nodes}
                        with made_up_engine(loaded, **case, drafting=True) as engine:
                            times = step_times(run, engine, batch, count=20)
                        rows.append({"batch": batch, "nodes": nodes, "ms": ms(statistics.median(times))})
                        print(name, rows[-1], flush=True)
            del loaded  # see `steps`
            found["steps"][name] = rows
        except Exception as error:  # torchao may not have been carried
            found["steps"][name] = f"{type(error).__name__}: {error}"[:500]
            print(name, found["steps"][name], flush=True)
        run.record("quantized_steps", found)
    return found


@torch.inference_mode()
def _linears(run: Run) -> dict[str, Any]:
    """Milliseconds of one linear (7B's gate and up) with float weights, by our product, by torchao's own."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    outs, ins = (64, 32) if run.tiny else (22016, 4096)
    configs = {"int8": Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)}
    if run.cuda:  # torchao refuses it on a CPU
        configs["fp8"] = Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), set_inductor_config=False
        )
    weight = torch.empty(outs, ins, dtype=torch.bfloat16, device=run.device).normal_(std=0.02)
    found: dict[str, Any] = {}
    for rows in (1, 20) if run.tiny else (1, 16, 64):
        x = torch.empty(rows, ins, dtype=torch.bfloat16, device=run.device).normal_()
        row: dict[str, Any] = {"bfloat16": ms(run.timed(run.captured(partial(F.linear, x, weight))))}
        for kind, config in configs.items():
            ours = RowwiseWeight(weight, None, kind)
            row[kind] = ms(run.timed(run.captured(partial(ours, x))))
            theirs = torch.nn.Sequential(torch.nn.Linear(ins, outs, bias=False, device="meta"))
            theirs[0].weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
            try:
                quantize_(theirs, config)
                row[f"{kind}, torchao's linear"] = ms(run.timed(run.captured(partial(theirs, x))))
            except torch.AcceleratorError:
                raise  # the device is lost
            except Exception as error:  # it need not work here, nor in a graph; ours is what counts
                row[f"{kind}, torchao's linear"] = f"{type(error).__name__}: {error}"[:300]
        found[f"rows {rows}"] = row
        print("linear", rows, row, flush=True)
    return found
