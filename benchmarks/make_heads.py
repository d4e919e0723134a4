"""Head files for checks, in the official format (`medusa_lm_head.safetensors`); they are not trained heads.

    python -m benchmarks.make_heads random   --model smollm2-135m --output heads/random
    python -m benchmarks.make_heads handmade --model smollm2-135m --output heads/handmade \\
        --prompts mt_bench.jsonl --reference-cache reference.json

Random heads are nearly always wrong. Hand-made heads are fitted to the very answers a check will ask
for, so that they are often right and long acceptances happen; they are worth nothing on other text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.common import add_model, first_turns, model_folder, new_parser, print_result
from benchmarks.reference import DEFAULT_CACHE, load_reference

if TYPE_CHECKING:
    from benchmarks.reference import Reference

__all__ = ["FILE", "handmade_heads", "random_heads", "save_heads"]

FILE = "medusa_lm_head.safetensors"


def random_heads(
    hidden_size: int, *, num_heads: int, num_layers: int = 1, vocab_size: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Heads of random weights, each guessing differently.

    Args:
        vocab_size: with a number, each head gets a random lm_head of its own; without, they share the base's.

    Returns:
        `{i}.{j}.linear.weight` [hidden, hidden], `.bias` [hidden], and `{i}.{layers}.weight` [vocab, hidden].
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors: dict[str, Tensor] = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            # 2/sqrt(hidden) makes the residual as large as x, so that the guesses are not the base model's.
            tensors[f"{head}.{layer}.linear.weight"] = (
                normal(hidden_size, hidden_size) * 2 * hidden_size**-0.5
            )
            tensors[f"{head}.{layer}.linear.bias"] = normal(hidden_size)
        if vocab_size is not None:
            tensors[f"{head}.{num_layers}.weight"] = (
                normal(vocab_size, hidden_size) * hidden_size**-0.5
            ).half()
    return tensors


def handmade_heads(
    reference: Reference, vocab_size: int, *, num_heads: int, steps: int = 120
) -> tuple[dict[str, Tensor], list[float]]:
    """Heads fitted to the reference's own answers, and how often each one's first guess is right there.

    Head i maps the hidden state that chose token k to token k + i + 1. Its residual layer is zero
    (x + SiLU(0) = x); its own lm_head is a linear classifier over the tokens that occur, fitted
    by cross-entropy. Tokens that do not occur have zero rows, far below the best.
    """
    hidden_size = reference.hidden[0].shape[1]
    tensors: dict[str, Tensor] = {}
    accuracies: list[float] = []
    for head in range(num_heads):
        states, targets = _pairs(reference, head)
        weight, accuracy = _fit(states, targets, vocab_size, steps)
        tensors[f"{head}.0.linear.weight"] = torch.zeros(hidden_size, hidden_size)
        tensors[f"{head}.0.linear.bias"] = torch.zeros(hidden_size)
        tensors[f"{head}.1.weight"] = weight.half()
        accuracies.append(accuracy)
    return tensors, accuracies


def _pairs(reference: Reference, head: int) -> tuple[Tensor, Tensor]:
    """Hidden states [n, hidden] and the token [n] that head `head` should guess from each."""
    states: list[Tensor] = []
    targets: list[int] = []
    for answer, hidden in zip(reference.answers, reference.hidden, strict=True):
        future = answer.token_ids[head + 1 :]
        states.append(hidden[: len(future)])
        targets += future
    return torch.cat(states), torch.tensor(targets)


def _fit(states: Tensor, targets: Tensor, vocab_size: int, steps: int) -> tuple[Tensor, float]:
    """An lm_head [vocab, hidden] for these pairs, and its accuracy on them."""
    tokens, labels = targets.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    # Features of unit scale make one learning rate fit all; the scale is folded into the weights.
    scale = states.std(0).clamp_min(1e-6)
    inputs = states / scale
    weight = torch.zeros(len(tokens), inputs.shape[1])
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    # Adam (Kingma & Ba 2015) on the softmax regression's own gradient, all pairs at once. torch.optim
    # would do the same after ten seconds of imports.
    for step in range(1, steps + 1):
        error = (inputs @ weight.T).softmax(1)
        error[torch.arange(len(labels)), labels] -= 1.0
        gradient = error.T @ inputs / len(labels)
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient.square(), 0.001)
        weight -= 0.02 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    accuracy = float(((inputs @ weight.T).argmax(1) == labels).float().mean())
    full = torch.zeros(vocab_size, inputs.shape[1])
    full[tokens] = weight / scale
    return full, accuracy


def save_heads(tensors: dict[str, Tensor], folder: Path) -> Path:
    """Write `medusa_lm_head.safetensors` into `folder`; returns the file."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE)
    return folder / FILE


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("kind", choices=("random", "handmade"))
    add_model(parser)
    parser.add_argument("--output", type=Path, required=True, help=f"folder for {FILE}")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=1, help="residual layers per random head")
    parser.add_argument("--own-lm-head", action="store_true", help="random heads get an lm_head of their own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=Path, help="MT-bench-shaped JSONL; handmade only")
    parser.add_argument("--reference-cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    folder = model_folder(args.model)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    accuracies: list[float] | None = None
    if args.kind == "random":
        vocab_size = config["vocab_size"] if args.own_lm_head else None
        tensors = random_heads(
            config["hidden_size"],
            num_heads=args.heads,
            num_layers=args.layers,
            vocab_size=vocab_size,
            seed=args.seed,
        )
    else:
        if args.prompts is None:
            parser.error("handmade heads need --prompts")
        reference = load_reference(folder, first_turns(args.prompts), args.max_tokens, args.reference_cache)
        tensors, accuracies = handmade_heads(reference, config["vocab_size"], num_heads=args.heads)
    file = save_heads(tensors, args.output)
    print_result({"file": str(file), "heads": args.heads, "first_guess_right": accuracies})


if __name__ == "__main__":
    main()
