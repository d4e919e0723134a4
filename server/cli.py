"""The `medusa-serve` command. Options are generated from the settings' fields, so each is declared once."""

from __future__ import annotations

import inspect
import json
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic.fields import FieldInfo

from engine.config import EngineConfig
from engine.errors import ConfigError, MedusaError
from engine.limits import limit_threads
from server import __version__
from server.settings import Settings, load_settings, option_name, unknown_variables
from training.cli import app as training_commands, type_name

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: in rich's, a "[default: …]" would be markup and vanish
    help="OpenAI-compatible inference server with Medusa tree decoding.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"medusa-serve {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """OpenAI-compatible inference server with Medusa tree decoding."""


def serve(config: Path | None, **options: str | None) -> None:
    """Serve MODEL over HTTP until stopped.

    Every option can also be set in the environment (MEDUSA_MAX_NUM_SEQS) or in the YAML file given by
    --config (max_num_seqs). The command line wins over the environment, which wins over the file.
    """
    settings = _settings(config, options)

    from server.lifecycle import run  # here, so that --help and --version do not import the engine

    raise typer.Exit(run(settings))


def bench(config: Path | None, concurrency: str, **options: Any) -> None:
    """Measure the engine on this machine, without HTTP: tokens/s, step time, TTFT, TPOT, acceptance length.

    Prompts are random tokens, whose answers say nothing about acceptance on text; --prompts takes real
    ones. Temperature is 0. The engine's settings are those of `serve`. The last line is JSON.
    """
    from server.bench import Workload, run

    own = {name: options.pop(name) for name in ("prompt_tokens", "new_tokens", "rounds", "prompts", "seed")}
    settings = _settings(config, options)
    _warn_of_variables()
    try:
        if not all(part.strip().isdigit() for part in concurrency.split(",")):
            raise ConfigError(f"--concurrency must be numbers like 1,8,16, got {concurrency!r}")
        workload = Workload(concurrency=tuple(int(part) for part in concurrency.split(",")), **own)
        result = run(settings.engine_config, workload)
    except ConfigError as error:
        _fail(error, 2)
    except (MedusaError, RuntimeError) as error:
        _fail(error, 1)
    typer.echo(json.dumps(result, ensure_ascii=False))


def show_config(config: Path | None, json_output: bool, **options: str | None) -> None:
    """Show the settings a server would run with, and where each comes from.

    Takes the options of `serve`; reads the environment and the YAML file as it does, and loads nothing.
    """
    from server.show_config import resolved, table

    try:
        settings = resolved({name: value for name, value in options.items() if value is not None}, config)
    except ConfigError as error:
        _fail(error, 2)
    _warn_of_variables()
    typer.echo(json.dumps(settings, ensure_ascii=False, indent=2) if json_output else table(settings))


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for `serve`.", show_default=False)],
    revision: Annotated[str | None, typer.Option(metavar="TEXT", help="Hub revision of the model.")] = None,
    lora: Annotated[str | None, typer.Option(metavar="TEXT", help="Adapters, as for `serve`.")] = None,
    device: Annotated[str, typer.Option(metavar="TEXT", help="'auto', 'cpu', 'cuda' or 'cuda:N'.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what MODEL is, the memory it takes per dtype and token, and which contexts fit this machine.

    Of a model on the hub the config is downloaded, not the weights (they are part of a .gguf).
    """
    from server.show_info import as_json, show_info, table

    try:
        found = show_info(model, revision, device, lora)
    except ConfigError as error:
        _fail(error, 2)
    except MedusaError as error:
        _fail(error, 1)
    typer.echo(json.dumps(as_json(found), indent=2) if json_output else table(found))


def chat(
    url: Annotated[
        str, typer.Option(envvar="MEDUSA_URL", metavar="URL", help="The server's address.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Its first model if unset.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="FLOAT", help="The server's default if unset.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="INT", help="Longest answer, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="INT", help="The same answers again.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=["MEDUSA_API_KEY", "OPENAI_API_KEY"], metavar="KEY", help="For servers that ask for one."
        ),
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(metavar="PEM", help="The server's own certificate, or what signed it.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Take any certificate.")] = False,
) -> None:
    """Chat with a running server in the terminal.

    Answers appear as they are written; each ends with its tokens per second and, where the server tells,
    its acceptance length. Ctrl-C stops an answer, /reset forgets the conversation, /quit leaves, /help says
    more.
    """
    from server.chat import run

    # A shell that starts it in the background ignores Ctrl-C for it; here it has a meaning.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sampling = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    raise typer.Exit(
        run(
            url,
            model=model,
            system=system,
            api_key=api_key,
            ca=ca,
            insecure=insecure,
            sampling=sampling,
        )
    )


def _settings(config: Path | None, options: dict[str, str | None]) -> Settings:
    """The settings these options give; ends the command where one is bad."""
    try:
        return load_settings({name: value for name, value in options.items() if value is not None}, config)
    except ConfigError as error:
        _fail(error, 2)


def _warn_of_variables() -> None:
    for name, meant in unknown_variables().items():
        typer.echo(f"warning: nothing reads {name}" + (f"; {meant} is meant?" if meant else ""), err=True)


def _fail(error: Exception, code: int) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(code)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    # Values stay strings: the settings model converts and checks them, as it does for the environment.
    default = "" if field.default is None else f" [default: {field.default}]"
    help_text = f"{field.description}{default}"
    kind: Any
    if name == "model":
        kind = typer.Argument(help=help_text, metavar="MODEL", show_default=False)
    else:
        kind = typer.Option(
            option_name(name), help=help_text, metavar=type_name(field.annotation), show_default=False
        )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, kind]
    )


_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option("--config", envvar="MEDUSA_CONFIG", metavar="YAML", help="YAML file of settings."),
    ],
)


def _signature(
    fields: Iterable[tuple[str, FieldInfo]], own: Iterable[inspect.Parameter] = ()
) -> inspect.Signature:
    return inspect.Signature([_CONFIG, *own, *(_parameter(name, field) for name, field in fields)])


def _own(name: str, kind: Any, default: Any, metavar: str, help_text: str) -> inspect.Parameter:
    """An option of one command that is no setting of the engine."""
    option = typer.Option(option_name(name), metavar=metavar, help=help_text)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


serve.__signature__ = _signature(Settings.model_fields.items())  # type: ignore[attr-defined]
app.command()(serve)

show_config.__signature__ = _signature(  # type: ignore[attr-defined]
    Settings.model_fields.items(),
    [
        inspect.Parameter(
            "json_output",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--json", help="As JSON.")],
        )
    ],
)
app.command("config")(show_config)
app.command()(info)
app.command()(chat)

bench.__signature__ = _signature(  # type: ignore[attr-defined]
    EngineConfig.model_fields.items(),
    [
        _own("concurrency", str, "1,8,16", "N,N,…", "Requests that run together, one measurement each."),
        _own("prompt_tokens", int, 60, "INT", "Length of a random prompt."),
        _own("new_tokens", int, 128, "INT", "Tokens of an answer; real prompts may end before."),
        _own("rounds", int, 3, "INT", "Per concurrency, each with new prompts, after one to warm up."),
        _own("prompts", Path | None, None, "JSONL", "Real prompts: lines with 'turns' or 'prompt'."),
        _own("seed", int, 0, "INT", "Of the random prompts."),
    ],
)
app.command()(bench)

app.add_typer(training_commands)  # its modules import torch when a command runs


def main() -> None:
    """Entry point of the console script."""
    limit_threads()
    app()


if __name__ == "__main__":
    main()
