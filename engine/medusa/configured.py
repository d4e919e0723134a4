"""What the settings ask of a draft tree: which heads, which of their nodes, and how many in all."""

from __future__ import annotations

from pathlib import Path

from engine.config import MAX_TREE_NODES, EngineConfig
from engine.errors import ConfigError
from engine.medusa.calibrated import CalibratedTree, find_calibrated
from engine.medusa.head_files import JOINT_PREFIX
from engine.medusa.tree import Tree, default_tree
from engine.model.embedded import EMBEDDED_MODEL, shipped_heads
from engine.model.weights import Checkpoint

__all__ = ["check_tree", "head_nodes", "heads_source", "heads_tree", "tree_size"]

_LOOKUP_SHARE = 3
"""Beside heads, the lookup branch gets one node in so many of a tree of fixed size."""


def heads_source(config: EngineConfig, folder: Path, checkpoint: Checkpoint | None) -> str | None:
    """Where the heads are: a path or hub id, "" for those inside a Medusa-2 model, None for no heads.

    The embedded model has heads of its own, which are taken where no others are named.
    """
    if (
        config.heads is None
        and config.model == EMBEDDED_MODEL
        and checkpoint is not None
        and not Path(config.model).is_dir()
    ):
        shipped = shipped_heads()
        return None if shipped is None else str(shipped)
    joint = checkpoint is not None and any(name.startswith(JOINT_PREFIX) for name in checkpoint.names)
    if config.heads == "none" or (config.heads is None and not joint):
        return None
    if joint and (
        config.heads in (None, config.model) or Path(config.heads).expanduser().resolve() == folder.resolve()
    ):
        return ""
    return config.heads


def check_tree(config: EngineConfig, *, with_heads: bool) -> None:
    """Refuse what contradicts itself, before anything is loaded.

    Raises:
        ConfigError: the settings of tree, tree_file, lookup and heads do not go together; says what does.
    """
    off = config.tree in ("off", 1)
    if off and config.tree_file:
        raise ConfigError(
            "tree_file has no effect while the tree is off; leave it out, or set heads and tree"
        )
    if off and isinstance(config.lookup, int):
        raise ConfigError("lookup has no effect while the tree is off; leave it out, or set tree to auto")
    if config.tree_file and not with_heads:
        raise ConfigError("tree_file needs Medusa heads; pass --heads PATH")
    if isinstance(config.tree, int) and not off and with_heads and isinstance(config.lookup, int):
        room = (config.tree - 1) // _LOOKUP_SHARE
        if config.lookup > room:
            raise ConfigError(
                f"lookup {config.lookup} does not fit: of tree {config.tree} with heads the lookup branch "
                f"gets {room} nodes, a third; pass --lookup on, or --tree {_LOOKUP_SHARE * config.lookup + 1}"
            )
    if isinstance(config.tree, int) and not off and not with_heads:
        if not config.lookup_nodes:
            raise ConfigError(
                f"tree {config.tree} needs Medusa heads or the lookup branch; pass --heads PATH, "
                "--lookup on, or --tree off"
            )
        if config.tree - 1 > config.lookup_nodes:
            raise ConfigError(
                f"tree {config.tree} without heads is a lookup chain of {config.tree - 1} nodes, and lookup "
                f"allows {config.lookup_nodes}; pass --lookup {config.tree - 1}, or --tree auto"
            )


def heads_tree(config: EngineConfig, num_heads: int, source: str) -> CalibratedTree:
    """The heads' tree: the one asked for, else the one that lies beside the heads, else the built-in one.

    Args:
        num_heads: how many heads there are.
        source: where they are, see `heads_source`.

    Raises:
        ConfigError: it holds fewer nodes than are asked of it.
        TreeError: its file cannot be read.
    """
    calibrated = find_calibrated(source) if source else None
    tree = calibrated or CalibratedTree(default_tree(num_heads))
    if config.tree_file:
        asked = Tree.load(Path(config.tree_file))
        tree = tree if calibrated is not None and asked == tree.tree else CalibratedTree(asked)
    if config.tree == "auto":
        return tree
    assert isinstance(config.tree, int)
    nodes = head_nodes(config, config.tree)
    if nodes > tree.tree.size:
        most = max(size for size in range(1, config.tree) if head_nodes(config, size) <= tree.tree.size)
        offering = f"{config.tree_file} holds" if config.tree_file else f"{num_heads} heads offer"
        raise ConfigError(
            f"tree {config.tree} takes {nodes} nodes from the heads, and {offering} {tree.tree.size}; "
            f"pass --tree {most} or less"
        )
    return tree.prefix(nodes)


def head_nodes(config: EngineConfig, size: int) -> int:
    """Nodes of the heads' branch in a tree of fixed size, both with the root."""
    return size - min(config.lookup_nodes, (size - 1) // _LOOKUP_SHARE)


def tree_size(config: EngineConfig, heads: Tree | None) -> int:
    """Most nodes per sequence and step, root counted."""
    if config.tree == "off":
        return 1
    if isinstance(config.tree, int):
        return config.tree
    return min(MAX_TREE_NODES, (heads.size if heads is not None else 1) + config.lookup_nodes)
