"""The tables of docs/operations.md that follow from the code: `make docs` writes them, a test compares.

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from engine.config import EngineConfig
from server import sizing
from server.metrics import METRICS
from server.settings import ENV_PREFIX, Settings, option_name

__all__ = ["TABLES", "with_tables"]


def _settings(fields: set[str]) -> str:
    lines = ["| option | environment | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        if name in fields:
            option = "MODEL" if name == "model" else option_name(name)
            default = "" if field.default is None else f"`{field.default}`"
            meaning = (field.description or "").replace("|", "\\|")
            lines.append(f"| `{option}` | `{ENV_PREFIX}{name.upper()}` | {default} | {meaning} |")
    return "\n".join(lines)


def _metrics() -> str:
    lines = ["| metric | type | labels | unit | meaning |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(metric.row for metric in METRICS)])


_ENGINE = set(EngineConfig.model_fields)

TABLES = {
    "server settings": _settings(set(Settings.model_fields) - _ENGINE),
    "engine settings": _settings(_ENGINE),
    "metrics": _metrics(),
    "sizing": sizing.table(),
}


def with_tables(text: str) -> str:
    """The page with its tables as the code has them. Raises ValueError if the page has no place for one."""
    for name, table in TABLES.items():
        begin, end = f"<!-- begin {name} -->\n", f"\n<!-- end {name} -->"
        before, begun, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not begun or not ended:
            raise ValueError(f"the page has no place for the table of {name}")
        text = before + begin + table + end + after
    return text


def main() -> None:
    """Write the tables into the page named on the command line."""
    page = Path(sys.argv[1])
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
