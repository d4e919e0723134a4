"""Every setting of the server, declared once: the command line, the environment and YAML read this model.

Precedence: command line > environment (`MEDUSA_…`) > YAML (`--config`) > defaults.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from engine.config import EngineConfig, faults, with_near
from engine.errors import ConfigError

__all__ = [
    "ENV_PREFIX",
    "OTHER_VARIABLES",
    "Settings",
    "load_settings",
    "option_name",
    "read_yaml",
    "source_of",
    "unknown_variables",
]

ENV_PREFIX = "MEDUSA_"

OTHER_VARIABLES = frozenset(
    f"{ENV_PREFIX}{name}" for name in ("API_KEY", "API_KEYS", "CACHE", "CONFIG", "FAULTS", "URL")
)
"""What is read elsewhere and is no setting."""

_OF_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT)[_=]|_PORT_\d+_(TCP|UDP|SCTP)[_=]|=(tcp|udp|sctp)://")
"""In the variables, `NAME=value`, that pods get for a service whose name begins with "medusa"."""

_ORIGIN = re.compile(r"https?://[^/\s,]+")


class Settings(EngineConfig, BaseSettings):
    """The engine's settings (inherited, so written down there only) and the server's own. Frozen."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        title="medusa-serve settings",
    )

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0: any free one.")
    served_model_name: str | None = Field(
        None,
        description="Name clients give as `model`, or several with commas between them, of which the first "
        "is the main one; the model's own name if unset.",
    )
    api_key_file: Path | None = Field(
        None,
        description="File of API keys, one a line, that clients must send; keys can also be given in the "
        "environment as MEDUSA_API_KEY or, with commas, MEDUSA_API_KEYS.",
    )
    tool_call_parser: Literal[
        "auto",
        "hermes",
        "llama3_json",
        "mistral",
        "granite",
        "nemotron",
        "apriel",
        "xlam",
        "phi4_mini_json",
        "qwen3_coder",
        "seed_oss",
        "glm45",
        "glm47",
        "olmo3",
        "pythonic",
        "llama4_pythonic",
        "deepseek_v3",
        "deepseek_v31",
        "harmony",
    ] = Field(
        "auto",
        description="How the model writes calls of tools: JSON between <tool_call> tags (hermes: Qwen), "
        "as all of an answer (Llama 3.1 and later), as a list behind [TOOL_CALLS] (Mistral), <|tool_call|> "
        "(Granite 3) or functools (phi4_mini_json), between <TOOLCALL> (nemotron) or <tool_calls> (apriel) "
        "tags, or as all of an answer (xlam); or each parameter between tags of its own (qwen3_coder, "
        "seed_oss; glm45: GLM-4.6, too; glm47), in Python (olmo3; pythonic: ToolACE; llama4_pythonic), or "
        "between DeepSeek's marks (deepseek_v3: R1, too; deepseek_v31), or as messages of their own "
        "(harmony: gpt-oss). 'auto': as its chat template shows, else hermes, with which a template that "
        "knows no tools is helped out.",
    )
    reasoning_parser: Literal["auto", "none", "think", "mistral", "seed_oss", "harmony"] = Field(
        "auto",
        description="How the model marks what it thinks before it answers, which chat completions tell from "
        "content: <think> and </think> (think: DeepSeek-R1, Qwen3 and most others), [THINK] and [/THINK] "
        "(Mistral), <seed:think> and </seed:think> (Seed-OSS), or as messages of their own (harmony: "
        "gpt-oss). 'auto': as its chat template shows, else as its vocabulary; where neither knows any, and "
        "with 'none', all text is content.",
    )
    cors_origins: str | None = Field(
        None,
        description="Origins whose pages may call the server from a browser, with commas, or '*'; none if "
        "unset.",
    )
    ssl_certfile: Path | None = Field(None, description="TLS certificate chain (PEM); serves HTTPS.")
    ssl_keyfile: Path | None = Field(None, description="The certificate's private key (PEM).")
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="Largest request body, in bytes.")
    read_timeout: float = Field(
        30.0,
        gt=0.0,
        allow_inf_nan=False,
        description="Seconds a request's headers, and then its body, get to arrive before it is a 408.",
    )
    write_timeout: float = Field(
        60.0,
        gt=0.0,
        allow_inf_nan=False,
        description="Seconds a client may leave what was sent unread before its connection is cut.",
    )
    request_timeout: float = Field(
        0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Seconds from a request's arrival to the end of its answer before it fails; 0: no limit.",
    )
    step_timeout: float = Field(
        300.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Seconds one engine step may take before /health and /ready answer 503; 0: no limit.",
    )
    drain_timeout: float = Field(
        30.0, ge=0.0, allow_inf_nan=False, description="Seconds running requests get to finish at shutdown."
    )
    engine_process: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Run the engine in a process of its own, not in a thread beside the event loop: the two "
        "need no common lock, which counts beside a fast device. 'auto': on a GPU. On the CPU both need the "
        "same cores, and there is nothing to gain.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    log_format: Literal["console", "json"] = Field("console", description="How log lines look.")

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: str | None) -> str | None:
        for origin in (value or "").split(","):
            if value and origin.strip() != "*" and not _ORIGIN.fullmatch(origin.strip()):
                raise ValueError(f"must be origins like https://example.org, or *, got {origin.strip()!r}")
        return value

    @model_validator(mode="after")
    def _tls_files_go_together(self) -> Self:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("ssl_keyfile goes with ssl_certfile")
        return self

    @property
    def origins(self) -> list[str]:
        """`cors_origins` one by one."""
        return [origin.strip() for origin in self.cors_origins.split(",")] if self.cors_origins else []

    @property
    def engine_config(self) -> EngineConfig:
        """The engine's share of the settings."""
        return EngineConfig(**{name: getattr(self, name) for name in EngineConfig.model_fields})

    @field_validator("served_model_name", mode="before")
    @classmethod
    def _joined(cls, value: object) -> object:
        """YAML may have a list of names."""
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            value = ",".join(value)
        if not isinstance(value, str):
            return value
        names = [name.strip() for name in value.split(",")]
        if not all(names):
            raise ValueError("must be a name, or names with commas between them")
        return ",".join(dict.fromkeys(names))

    @property
    def model_name(self) -> str:
        """The main name clients use."""
        return self.model_names[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names clients may use. A local folder or GGUF gives its own name, not the path to it."""
        if self.served_model_name is not None:
            return tuple(self.served_model_name.split(","))
        folder = Path(self.model).expanduser()
        if folder.suffix == ".gguf":
            return (folder.stem,)
        return (folder.resolve().name if folder.is_dir() else self.model,)


def option_name(field: str) -> str:
    """The command-line option of a settings field: `max_num_seqs` is `--max-num-seqs`."""
    return "--" + field.replace("_", "-")


def load_settings(cli: Mapping[str, Any] | None = None, config: Path | None = None) -> Settings:
    """Settings from the command line's values, the environment and a YAML file, in this order.

    Args:
        cli: field name to value, only those given; strings are converted as in the environment.
        config: YAML file with field names as keys.

    Raises:
        ConfigError: one line that names each bad setting and where it came from.
    """
    from_cli = dict(cli or {})
    from_file = {} if config is None else read_yaml(config)

    class Sourced(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the hook's signature
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=from_file)

    try:
        return Sourced(**from_cli)
    except ValidationError as error:
        raise ConfigError(_one_line(error, from_cli, config)) from None


def source_of(field: str, cli: Mapping[str, Any]) -> str | None:
    """The option or environment variable that sets a field; None where neither does, so file or default."""
    if field in cli:
        return "MODEL" if field == "model" else option_name(field)
    variable = ENV_PREFIX + field.upper()
    return variable if any(name.upper() == variable and value for name, value in os.environ.items()) else None


def unknown_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str | None]:
    """The variables named MEDUSA_… that nothing reads, each with the one that may be meant."""
    known = OTHER_VARIABLES | {ENV_PREFIX + field.upper() for field in Settings.model_fields}
    return {
        name: next(iter(get_close_matches(name.upper(), sorted(known), 1, 0.8)), None)
        for name, value in sorted(environment.items())
        if name.upper().startswith(ENV_PREFIX)
        and name.upper() not in known
        and value
        and not _OF_KUBERNETES.search(f"{name}={value}")
    }


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a file; unknown ones are refused.

    Raises:
        ConfigError: unreadable, or not lines of settings.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold 'setting: value' lines, not a {type(data).__name__}")
    if unknown := [str(key) for key in data if key not in Settings.model_fields]:
        raise ConfigError(f"unknown setting in {path}: {with_near(unknown, Settings.model_fields)}")
    return data


def _one_line(error: ValidationError, cli: Mapping[str, Any], config: Path | None) -> str:
    """Each bad field with the source that set it."""
    in_file = "" if config is None else f" in {config}"
    return "; ".join(
        (f"{source_of(field, cli) or field + in_file}: " if field else "") + text
        for field, text in faults(error).items()
    )
