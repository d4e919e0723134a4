"""`medusa-serve config`: the settings a server would run with, and where each came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.settings import Settings, load_settings, read_yaml, source_of

__all__ = ["resolved", "table"]


def resolved(cli: Mapping[str, Any], config: Path | None) -> dict[str, dict[str, Any]]:
    """Each setting's `value` and `source`: an option, a variable, the file, or "default".

    Raises:
        ConfigError: a bad setting, as when serving.
    """
    settings = load_settings(cli, config)
    in_file = {} if config is None else read_yaml(config)
    return {
        name: {
            "value": _shown(getattr(settings, name)),
            "source": source_of(name, cli) or (str(config) if name in in_file else "default"),
        }
        for name in Settings.model_fields
    }


def table(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """For people: aligned columns, what was set first."""
    rows = [(name, json.dumps(row["value"]), row["source"]) for name, row in settings.items()]
    rows.sort(key=lambda row: row[2] == "default")  # stable: otherwise as declared
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows)


def _shown(value: Any) -> Any:
    """As JSON has it. No setting is a secret: API keys are in a file, or in variables of their own."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)
