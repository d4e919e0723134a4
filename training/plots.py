"""Pictures: a run's curves, and a calibrated tree beside the acceptance length it promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from engine.medusa.tree import Tree

__all__ = ["draw_curves", "draw_tree"]


def draw_curves(lines: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Held-out loss, accuracies and replayed acceptance length against steps; SVG or PNG by the file's name.

    Args:
        lines: of `train.jsonl`.
    """
    figure = _figure(11.0, 3.4)
    loss, accuracy, length = figure.subplots(1, 3)
    steps = [line["step"] for line in lines]
    loss.plot(steps, [line["loss"] for line in lines], "k--", label="training, all heads")
    for head in range(len(lines[0]["held_out_loss"]) if lines else 0):
        loss.plot(steps, [line["held_out_loss"][head] for line in lines], f"C{head}", label=f"head {head}")
        for count, style in ((1, "-"), (10, ":")):
            accuracy.plot(steps, [line[f"top{count}"][head] for line in lines], f"C{head}{style}")
    length.plot(steps, [line["replay"] for line in lines], "C0")
    for axes, title in (
        (loss, "loss on held-out answers"),
        (accuracy, "accuracy: top-1 (line), top-10 (dots)"),
        (length, "tokens a step, 64 nodes, replayed"),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    loss.legend(fontsize=7)
    _save(figure, file)


def draw_tree(
    tree: Tree, accepted: Sequence[float], lengths: Mapping[str, Sequence[float]], file: Path
) -> None:
    """The tree, its nodes as large as they are likely, and acceptance length against the number of nodes.

    Args:
        tree: at most 64 nodes.
        accepted: for each node below the root, how likely it is.
        lengths: by label, the acceptance length of 1, 2, … nodes.
        file: `.svg` or `.png`.
    """
    figure = _figure(12.0, 4.6)
    picture, curve = figure.subplots(1, 2, width_ratios=(2.2, 1))
    _nodes(picture, tree, accepted)
    for label, values in lengths.items():
        curve.plot(range(1, 1 + len(values)), values, label=label)
    curve.set_xlabel("nodes, root counted")
    curve.set_title("acceptance length", fontsize=10)
    curve.grid(alpha=0.3)
    curve.legend(fontsize=8)
    _save(figure, file)


def _nodes(axes: Axes, tree: Tree, accepted: Sequence[float]) -> None:
    """Leaves at equal distances, parents above the middle of their children."""
    children: dict[tuple[int, ...], list[tuple[int, ...]]] = {(): []}
    for path in tree.paths:
        children[path] = []
        children[path[:-1]].append(path)
    x: dict[tuple[int, ...], float] = {}
    next_leaf = 0.0

    def place(path: tuple[int, ...]) -> None:
        nonlocal next_leaf
        below = sorted(children[path])
        for child in below:
            place(child)
        if below:
            x[path] = (x[below[0]] + x[below[-1]]) / 2
        else:
            x[path] = next_leaf
            next_leaf += 1

    place(())
    chance = dict(zip(tree.paths, accepted, strict=True)) | {(): 1.0}
    for path in tree.paths:
        parent = path[:-1]
        axes.plot(
            (x[parent], x[path]),
            (-len(parent), -len(path)),
            color="0.6",
            linewidth=0.4 + 3 * chance[path],
            zorder=1,
        )
    nodes = list(chance)
    axes.scatter(
        [x[path] for path in nodes],
        [-len(path) for path in nodes],
        s=[12 + 260 * chance[path] for path in nodes],
        c=[path[-1] if path else 0 for path in nodes],
        cmap="viridis_r",
        zorder=2,
    )
    for path in nodes:
        if chance[path] >= 0.02 and path:
            axes.annotate(
                f"{chance[path]:.2f}",
                (x[path], -len(path)),
                fontsize=6,
                ha="center",
                xytext=(0, 7),
                textcoords="offset points",
            )
    axes.set_yticks(
        [-depth for depth in range(tree.depth + 1)], ["root", *(f"head {d}" for d in range(tree.depth))]
    )
    axes.set_xticks([])
    axes.set_title(
        f"{tree.size} nodes; the size is the chance to be accepted, dark colours are later guesses",
        fontsize=10,
    )
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "pictures need matplotlib; install it with: pip install 'medusa-serve[train]'"
        ) from error
    # Not pyplot: a figure of its own needs no display and keeps no global state.
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # No date and no random ids: the same run draws the same file.
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "medusa-serve"}):
        metadata = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(file, metadata=metadata, dpi=140)
