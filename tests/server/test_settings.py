"""One model of settings: command line over environment over YAML over defaults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.settings import OTHER_VARIABLES, Settings, load_settings, option_name, unknown_variables

ROOT = Path(__file__).parents[2]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path / "c.yaml", "port: 1001\nmax_num_seqs: 11\nhost: 10.0.0.1\nblock_size: 8\n")
    monkeypatch.setenv("MEDUSA_PORT", "2002")
    monkeypatch.setenv("MEDUSA_MAX_NUM_SEQS", "22")
    settings = load_settings({"port": "3003"}, config)
    assert (settings.port, settings.max_num_seqs, settings.host) == (3003, 22, "10.0.0.1")
    assert (settings.block_size, settings.max_waiting) == (8, EngineConfig().max_waiting)


def test_engine_fields_are_the_engines_own() -> None:
    assert set(EngineConfig.model_fields) < set(Settings.model_fields)
    for name, field in EngineConfig.model_fields.items():
        assert Settings.model_fields[name].default == field.default
        assert name not in Settings.__annotations__
    assert load_settings({"max_num_seqs": 5}).engine_config == EngineConfig(max_num_seqs=5)


@pytest.mark.parametrize(
    ("text", "tree"), [("tree: off", "off"), ("tree: 'off'", "off"), ("tree: 33", 33), ("", "auto")]
)
def test_tree_in_yaml(tmp_path: Path, text: str, tree: object) -> None:
    """YAML 1.1 reads a bare `off` as false."""
    assert load_settings(config=write(tmp_path / "c.yaml", text)).tree == tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_num_seq: 1\nfoo: 2", r"unknown setting in .*c\.yaml: max_num_seq \(max_num_seqs\?\), foo$"),
        ("port: many", r"port in .*c\.yaml: must be a valid integer"),
        ("- a", r"must hold 'setting: value' lines"),
        ("a: [", r"not valid YAML"),
        (
            "kv_cache_bytes: 9\nkv_cache_tokens: 64",
            r"kv_cache_bytes in .*c\.yaml: give either this or kv_cache_tokens",
        ),
        ("max-num-seqs: 3", r"unknown setting in .*c\.yaml: max-num-seqs \(max_num_seqs\?\)"),
    ],
)
def test_bad_yaml_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(config=write(tmp_path / "c.yaml", text))
    assert "\n" not in str(caught.value)


def test_missing_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(config=tmp_path / "none.yaml")


def test_bad_value_names_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^--max-num-seqs: must be greater than or equal to 1$"):
        load_settings({"max_num_seqs": "0"})
    monkeypatch.setenv("MEDUSA_PORT", "tcp://10.0.0.1:80")  # as Kubernetes sets it for a service "medusa"
    with pytest.raises(ConfigError, match=r"^MEDUSA_PORT: must be a valid integer"):
        load_settings()


def test_settings_are_frozen() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


def test_model_name(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert load_settings().model_name == "smollm2-135m"
    assert load_settings({"model": "org/name"}).model_name == "org/name"
    assert load_settings({"model": f"{folder}/"}).model_name == "my-model"
    assert load_settings({"model": str(folder), "served_model_name": "x"}).model_name == "x"


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())
    assert option_name("max_num_seqs") == "--max-num-seqs"


def test_unknown_variables_are_told_with_what_may_be_meant() -> None:
    given = {"MEDUSA_PROT": "8001", "MEDUSA_TREE": "8", "MEDUSA_CACHE": "/c", "MEDUSA_Q": "1", "MEDUSA_A": ""}
    of_kubernetes = {  # for a service "medusa-serve"
        "MEDUSA_SERVE_SERVICE_HOST": "10.0.0.1",
        "MEDUSA_SERVE_SERVICE_PORT": "8000",
        "MEDUSA_SERVE_SERVICE_PORT_HTTP": "8000",
        "MEDUSA_SERVE_PORT": "tcp://10.0.0.1:8000",
        "MEDUSA_SERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "MEDUSA_SERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert unknown_variables(given | of_kubernetes) == {"MEDUSA_PROT": "MEDUSA_PORT", "MEDUSA_Q": None}


def test_every_variable_that_is_read_is_known() -> None:
    files = [file for folder in ("engine", "server", "training") for file in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "Dockerfile", *(file for file in (ROOT / "docker").rglob("*") if file.is_file())]
    read = {
        name
        for file in files
        for name in re.findall(r"\bMEDUSA_[A-Z_]*[A-Z]\b", file.read_text(encoding="utf-8", errors="replace"))
    }
    assert read >= OTHER_VARIABLES
    assert not unknown_variables(dict.fromkeys(read, "1"))


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=str)
def test_shipped_configs_are_valid(file: Path) -> None:
    settings = load_settings(config=file)
    assert settings.model == yaml.safe_load(file.read_text())["model"]
