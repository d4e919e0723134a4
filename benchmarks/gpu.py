"""Everything that wants a GPU, in one run of under nine minutes: tests, ceilings, steps, texts.

    python -m benchmarks.gpu                                     # all parts, on CUDA
    python -m benchmarks.gpu --parts tests,ceilings,steps        # some
    python -m benchmarks.gpu --device cpu --tiny                 # the script itself, in seconds
    python -m benchmarks.gpu --combine a.json b.json             # several runs as one file

Results go to benchmarks/results/gpu-DEVICE.json (or --output) as they come: a run that is cut off keeps what
it has, a part that fails is told and costs no other. The last lines hold each target of the project with what
was measured; the very last is JSON. docs/performance.md says how to run it on a bare machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, new_parser, numbers, print_result
from benchmarks.gpu_device import between_products, ceilings, tests
from benchmarks.gpu_quantized import quantized_steps
from benchmarks.gpu_run import Run, combine, device_name, output_file
from benchmarks.gpu_shapes import MIXTURES, SHAPES
from benchmarks.gpu_simulated import simulated
from benchmarks.gpu_steps import idle, sampled_steps, steps
from benchmarks.gpu_targets import targets
from benchmarks.gpu_text import divergences, end_to_end, http, quality_cost

PARTS: dict[str, Callable[[Run], Any]] = {
    "tests": tests,
    "ceilings": ceilings,
    "steps": steps,
    "idle": idle,
    "simulated": simulated,
    "end_to_end": end_to_end,
    "divergences": divergences,
    "http": http,
    "sampled_steps": sampled_steps,
    "quantized_steps": quantized_steps,
    "quality": quality_cost,
    "between_products": between_products,
}
"""In the order in which they run; each may use what those before it found."""


def names(text: str) -> list[str]:
    """`a,b` as a list, for argparse's `type`."""
    return [part for part in text.split(",") if part]


def cases(text: str) -> list[tuple[int, int]]:
    """`1x512,16x512` as (batch, context)."""
    return [(int(batch), int(context)) for batch, context in (part.split("x") for part in text.split(","))]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", type=names, default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--skip", type=names, default=[], help="parts to leave out")
    parser.add_argument("--minutes", type=float, default=8.7, help="after which no part begins")
    parser.add_argument("--model", default="smollm2-135m", help="that answers: embedded name or folder")
    parser.add_argument("--heads", default=None, help="its heads; the shipped ones if unset")
    usual = [name for name in SHAPES if name not in MIXTURES]
    parser.add_argument("--shapes", type=names, default=usual, help=f"of {', '.join(SHAPES)}")
    parser.add_argument(
        "--cases", type=cases, default=None, help="of `steps`, as 1x512,16x512: batch x context"
    )
    parser.add_argument("--nodes", type=numbers, default=None, help="of `steps`, as 1,64")
    parser.add_argument("--steps-share", type=float, default=0.55, help="of the time left, for `steps`")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model, few repeats: to run the script itself"
    )
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument(
        "--log", type=Path, default=None, help="file to add what the engine says and measures at its start to"
    )
    parser.add_argument(
        "--known", type=Path, nargs="*", default=[], help="earlier results that parts may use"
    )
    parser.add_argument(
        "--combine", type=Path, nargs="+", default=None, help="write these files as one; no run"
    )
    args = parser.parse_args(argv)
    for given, known in ((args.parts + args.skip, PARTS), (args.shapes, SHAPES)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"no such part or shape: {', '.join(unknown)}; there are {', '.join(known)}")
    if args.combine is None and args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny runs the script itself")
    if args.combine is None and args.device == "cpu" and not args.tiny:
        parser.error("on a CPU only --tiny makes sense: the shapes would take hours")
    return args


def again(args: argparse.Namespace, run: Run, parts: list[str]) -> list[str]:
    """Arguments of a run that goes on with these parts, and with the results so far."""
    given = ["--device", args.device, "--parts", ",".join(parts), "--minutes", f"{run.left() / 60:.3f}"]
    given += [
        "--model",
        args.model,
        "--shapes",
        ",".join(args.shapes),
        "--steps-share",
        str(args.steps_share),
    ]
    given += ["--heads", args.heads] if args.heads else []
    given += (
        ["--cases", ",".join(f"{batch}x{context}" for batch, context in args.cases)] if args.cases else []
    )
    given += ["--nodes", ",".join(map(str, args.nodes))] if args.nodes else []
    given += ["--log", str(args.log)] if args.log else []
    given += ["--tiny"] if args.tiny else []
    return [*given, "--output", str(run.output), "--known", str(run.output)]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.combine is not None:
        whole = combine(args.combine)
        file = args.output or args.combine[0]
        file.write_text(json.dumps(whole, ensure_ascii=False) + "\n", encoding="utf-8")
        print_result({"benchmark": "gpu", "output": str(file), "targets": targets(whole["parts"])})
        return 0
    if args.log is not None:
        handler = logging.FileHandler(args.log, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(relativeCreated)d ms %(name)s: %(message)s"))
        logging.getLogger("engine").addHandler(handler)
        logging.getLogger("engine").setLevel(logging.DEBUG)
    device = torch.device(args.device)
    output = output_file(args, device, ROOT)
    run = Run(args, device, output, time.monotonic() + 60 * args.minutes)
    print(f"{device_name(device)}, torch {torch.__version__}; results in {output}", flush=True)
    for known in args.known:
        run.parts |= json.loads(known.read_text(encoding="utf-8"))["parts"]
        run.seconds |= json.loads(known.read_text(encoding="utf-8"))["seconds"]
    wanted = [name for name in PARTS if name in args.parts and name not in args.skip]
    for number, name in enumerate(wanted):
        run.measure(name, PARTS[name])
        rest = wanted[number + 1 :]
        if rest and not run.sound():
            print("the device's context is lost: the other parts run in a new process", flush=True)
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *again(args, run, rest)])
    run.record("targets", found := targets(run.parts))
    for row in found:
        print(f"{row['state']:>12}  {row['target']}: {row['measured']}", flush=True)
    print_result(
        {"benchmark": "gpu", "device": device_name(device), "seconds": run.seconds, "failed": run.failed}
    )
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
