"""The tree made for certain heads and how often its nodes come true, as `calibrate` leaves it beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from engine.errors import TreeError
from engine.medusa.tree import Tree

__all__ = ["CALIBRATION_FILE", "TREE_FILE", "CalibratedTree", "find_calibrated"]

TREE_FILE = "medusa_tree.json"
"""A list of paths, as `--tree-file` takes it."""

CALIBRATION_FILE = "medusa_calibration.json"
"""The same paths, with the table they come from."""


@dataclass(frozen=True, slots=True)
class CalibratedTree:
    """A tree, and for each node below the root the share of held-out positions where it came true.

    Args:
        tree: nested.
        accepted: chances in the tree's order, from 0 to 1; None where nobody counted.
    """

    tree: Tree
    accepted: tuple[float, ...] | None = None

    def prefix(self, size: int) -> CalibratedTree:
        """The first `size` nodes, root counted.

        Raises:
            TreeError: there are fewer.
        """
        accepted = None if self.accepted is None else self.accepted[: size - 1]
        return CalibratedTree(self.tree.prefix(size), accepted)

    @classmethod
    def load(cls, file: Path) -> CalibratedTree:
        """Read a calibration.

        Raises:
            TreeError: unreadable, no such file, or not one chance per path.
        """
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            tree = Tree.from_paths(data["paths"])
            accepted = tuple(float(chance) for chance in data["accepted"])
            if len(accepted) != len(tree.paths) or not all(0.0 <= chance <= 1.0 for chance in accepted):
                raise ValueError("'accepted' must hold a chance for each of 'paths'")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise TreeError(f"cannot read the calibration {file}: {error}") from error
        return cls(tree, accepted)


def find_calibrated(heads: str) -> CalibratedTree | None:
    """What lies beside a local head file, or in its folder; None where nobody calibrated these heads.

    Raises:
        TreeError: what lies there cannot be read.
    """
    path = Path(heads).expanduser()
    folder = path if path.is_dir() else path.parent
    if (folder / CALIBRATION_FILE).is_file():
        return CalibratedTree.load(folder / CALIBRATION_FILE)
    if (folder / TREE_FILE).is_file():
        return CalibratedTree(Tree.load(folder / TREE_FILE))
    return None
