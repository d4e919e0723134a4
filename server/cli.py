"""The `medusa-serve` command. Options are generated from the settings' fields, so each is declared once."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from engine.errors import ConfigError
from server import __version__
from server.settings import Settings, load_settings, option_name

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
    given = {name: value for name, value in options.items() if value is not None}
    try:
        settings = load_settings(given, config)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None

    from server.lifecycle import run  # here, so that --help and --version do not import the engine

    raise typer.Exit(run(settings))


def _metavar(annotation: Any) -> str:
    """A readable type: `int | None` is INT, `int | Literal['off']` is INT|off."""
    members = get_args(annotation) if get_origin(annotation) is not Literal else (annotation,)
    shown: list[str] = []
    for member in members or (annotation,):
        if get_origin(member) is Literal:
            shown += [str(choice) for choice in get_args(member)]
        elif member is not type(None):
            shown.append({"str": "TEXT"}.get(member.__name__, member.__name__.upper()))
    return "|".join(shown)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    # Values stay strings: the settings model converts and checks them, as it does for the environment.
    default = "" if field.default is None else f" [default: {field.default}]"
    help_text = f"{field.description}{default}"
    kind: Any
    if name == "model":
        kind = typer.Argument(help=help_text, metavar="MODEL", show_default=False)
    else:
        kind = typer.Option(
            option_name(name), help=help_text, metavar=_metavar(field.annotation), show_default=False
        )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, kind]
    )


def _signature() -> inspect.Signature:
    config = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option("--config", envvar="MEDUSA_CONFIG", metavar="YAML", help="YAML file of settings."),
        ],
    )
    return inspect.Signature([config, *(_parameter(*item) for item in Settings.model_fields.items())])


serve.__signature__ = _signature()  # type: ignore[attr-defined]
app.command()(serve)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
