"""Add what runs of `distill` have answered so far to a folder of token shards.

    python -m training.pack configs/smollm2-135m/data out/distill-1 out/distill-2

A run may still be under way: its whole rows count. Rows that the folder has are left alone, so the same
command adds what is new; files that are there are never written again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, MedusaError
from engine.model.config import ModelConfig
from engine.model.weights import resolve_model
from training.data import SHARD_SUFFIX, Row, load_shards, read_shard, row_of, write_shard

__all__ = ["pack"]

_SHARD_ROWS = 8192

_ABOUT = ("model", "weights_sha256", "quantization", "temperatures", "top_p", "max_tokens", "seed")


def pack(folder: Path, runs: Sequence[Path]) -> int:
    """Add the runs' rows to the shards of `folder`; returns how many were new.

    Raises:
        ConfigError: a run that cannot be read, or answers of another model than the rest.
    """
    files = sorted(folder.glob("*" + SHARD_SUFFIX))
    known = {row.key for row in load_shards([folder])} if files else set()
    weights = {str(read_shard(file)[0].get("weights_sha256")) for file in files}
    new: list[Row] = []
    about: dict[str, Any] = {}
    for run in runs:
        manifest, rows = _read_run(run)
        about = {name: manifest[name] for name in _ABOUT}
        weights.add(manifest["weights_sha256"])
        if len(weights) > 1:
            raise ConfigError(
                f"{run} holds answers of other weights than the rest; pack each model by itself"
            )
        for row in rows:
            if row.key not in known:
                known.add(row.key)
                new.append(row)
    if not new:
        return 0
    vocab_size = ModelConfig.from_folder(resolve_model(about["model"])).vocab_size
    for start in range(0, len(new), _SHARD_ROWS):
        path = folder / f"{len(files) + start // _SHARD_ROWS:05}{SHARD_SUFFIX}"
        if path.exists():
            raise ConfigError(f"{path} is there already; the files of {folder} must be numbered from 00000")
        write_shard(path, new[start : start + _SHARD_ROWS], vocab_size=vocab_size, **about)
    return len(new)


def _read_run(run: Path) -> tuple[dict[str, Any], list[Row]]:
    try:
        manifest: dict[str, Any] = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        lines = (run / "rows.jsonl").read_bytes().splitlines(keepends=True)
        # A run under way may be writing the last line.
        return manifest, [row_of(json.loads(line)) for line in lines if line.endswith(b"\n")]
    except (OSError, ValueError, LookupError) as error:
        raise ConfigError(f"{run} is no output of `medusa-serve distill`: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for what cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m training.pack", description="Add rows to token shards.")
    parser.add_argument("folder", type=Path, help="of the shards")
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of `medusa-serve distill`")
    given = parser.parse_args(arguments)
    try:
        new = pack(given.folder, given.runs)
        rows = load_shards([given.folder]) if new else []
    except MedusaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in given.folder.glob("*" + SHARD_SUFFIX))
    tokens = sum(len(row.answer) for row in rows)
    print(f"{new} new rows" + (f"; now {len(rows)}, {tokens} answer tokens, {size} bytes" if new else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
