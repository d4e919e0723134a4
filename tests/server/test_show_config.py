"""`medusa-serve config` says what would run and who said so."""

from __future__ import annotations

import json
from pathlib import Path

from server.settings import Settings
from server.show_config import resolved, table
from tests.server.test_cli import invoke


def test_each_setting_names_its_source(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: 1001\nhost: 10.0.0.1\ntree: off\n")
    arguments = ["config", "some/model", "--config", str(file), "--port", "3003", "--json"]
    code, out, err = invoke(*arguments, MEDUSA_PORT="2002", MEDUSA_HOST="10.0.0.2", MEDUSA_HEADS="")
    assert code == 0, err
    settings = json.loads(out)
    assert settings.keys() == Settings.model_fields.keys()
    assert settings["model"] == {"value": "some/model", "source": "MODEL"}
    assert settings["port"] == {"value": 3003, "source": "--port"}
    assert settings["host"] == {"value": "10.0.0.2", "source": "MEDUSA_HOST"}
    assert settings["tree"] == {"value": "off", "source": str(file)}
    assert settings["heads"] == {"value": None, "source": "default"}  # an empty variable says nothing


def test_the_table_has_a_line_a_setting_what_was_set_first() -> None:
    lines = table(resolved({"max_num_seqs": 4}, None)).splitlines()
    assert len(lines) == len(Settings.model_fields)
    assert lines[0].split() == ["max_num_seqs", "4", "--max-num-seqs"]
    assert {line.split()[-1] for line in lines[1:]} == {"default"}
    code, out, _ = invoke("config", "--max-num-seqs", "4")
    assert (code, out.splitlines()) == (0, lines)


def test_a_variable_that_nothing_reads_is_told() -> None:
    code, out, err = invoke("config", "--json", MEDUSA_PROT="8001")
    assert (code, err) == (0, "warning: nothing reads MEDUSA_PROT; MEDUSA_PORT is meant?\n")
    assert json.loads(out)["port"]["value"] == 8000


def test_a_bad_setting_is_told_as_when_serving() -> None:
    code, out, err = invoke("config", "--tree", "99")
    assert (code, out) == (2, "")
    assert err.startswith("error: --tree: ")
