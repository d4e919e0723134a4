"""What docs/operations.md says about settings, metrics and tests is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.metrics import METRICS
from server.reference import TABLES, with_tables
from server.settings import Settings, option_name

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def test_the_tables_are_the_codes() -> None:
    assert with_tables(PAGE) == PAGE, "run `make docs`"


def test_every_setting_and_metric_is_in_a_table() -> None:
    for name in Settings.model_fields:
        assert ("`MODEL`" if name == "model" else f"`{option_name(name)}`") in PAGE
    for metric in METRICS:
        assert f"`{metric.full_name}`" in PAGE


def test_the_metrics_that_the_text_and_its_queries_name_exist() -> None:
    names = {metric.full_name for metric in METRICS} | {"medusa_", "medusa_engine_process_"}
    for found in set(re.findall(r"medusa_[a-z0-9_]+", PAGE)):
        base = re.sub(r"_(bucket|sum|count)$", "", found)
        assert found in names or base in names, found


def test_the_options_that_the_text_names_exist() -> None:
    """Those of other programs are named, too."""
    others = {"--build-arg", "--read-only", "--tmpfs", "--wait", "--no-deps", "--stop-timeout", "--pictures"}
    others |= {"--subprocesses", "--cpus", "--memory"}
    options = {option_name(name) for name in Settings.model_fields} | {"--config"} | others
    assert set(re.findall(r"--[a-z][a-z-]+[a-z]", PAGE)) <= options


def test_each_fault_names_tests_that_exist() -> None:
    rows = PAGE.split("## Faults\n")[1].split("\n## ")[0].splitlines()
    cells = [row.split("|")[3] for row in rows if row.startswith("| ") and "tests/" in row]
    assert len(cells) >= 10
    for cell in cells:
        file = None
        for path, test in re.findall(r"`(tests/[\w/]+\.py|…)(?:::(\w+))?`", cell):
            file = ROOT / path if path != "…" else file
            assert file is not None
            assert file.exists(), cell
            assert not test or f"def {test}(" in file.read_text(encoding="utf-8"), cell


def test_its_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


def test_a_page_without_a_place_for_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="metrics"):
        with_tables(PAGE.replace("<!-- begin metrics -->", ""))
    assert set(TABLES) == {"server settings", "engine settings", "metrics", "sizing"}
