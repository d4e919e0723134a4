"""The commands `distill`, `train`, `calibrate` and `export`; `server.cli` adds them to `medusa-serve`.

Nothing heavy is imported before a command runs, so that `--help` stays quick.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ValidationError

from engine.config import EngineConfig
from engine.errors import ConfigError, MedusaError
from training.config import TrainConfig

__all__ = ["app", "type_name"]

app = typer.Typer()


def type_name(annotation: Any) -> str:
    """A readable type: `int | None` is INT, `int | Literal['off']` is INT|off."""
    members = get_args(annotation) if get_origin(annotation) is not Literal else (annotation,)
    shown: list[str] = []
    for member in members or (annotation,):
        if get_origin(member) is Literal:
            shown += [str(choice) for choice in get_args(member)]
        elif member is not type(None):
            shown.append({"str": "TEXT"}.get(member.__name__, member.__name__.upper()))
    return "|".join(shown)


def engine_option(name: str, metavar: str) -> Any:
    """The option of an engine setting: its help is the setting's own, its default None (the setting's)."""
    field = EngineConfig.model_fields[name]
    default = "" if field.default is None else f" [default: {field.default}]"
    return typer.Option(
        "--" + name.replace("_", "-"),
        metavar=metavar,
        help=f"{field.description}{default}",
        show_default=False,
    )


def engine_config(**given: Any) -> EngineConfig:
    """The engine's settings from the options that were given (not None).

    Raises:
        ConfigError: a bad value, with its option.
    """
    try:
        return EngineConfig(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise _bad_options(error) from None


def checked_lora(lora: str | None) -> str | None:
    """The option, which is no part of other settings here. Raises ConfigError where it is none."""
    return engine_config(lora=lora).lora


def _bad_options(error: ValidationError) -> ConfigError:
    """One line that says of each bad option what is wrong."""
    parts = (
        f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg'].removeprefix('Value error, ')}"
        for item in error.errors(include_url=False, include_input=False)
    )
    return ConfigError("; ".join(dict.fromkeys(parts)))


@contextmanager
def failing() -> Iterator[None]:
    """An error of ours ends the command in one line: code 2 for a bad setting, 1 for what failed."""
    try:
        yield
    except (MedusaError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help=str(EngineConfig.model_fields["model"].description))
]
Revision = Annotated[str | None, engine_option("revision", "TEXT")]
Lora = Annotated[str | None, engine_option("lora", "TEXT")]
Dtype = Annotated[str | None, engine_option("dtype", "auto|float32|bfloat16|float16")]
Quantization = Annotated[str | None, engine_option("quantization", "none|int8|fp8")]
Device = Annotated[str | None, engine_option("device", "TEXT")]


@app.command()
def distill(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where rows, shards and manifest go.")
    ],
    model: Model = "smollm2-135m",
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompts",
            metavar="JSONL",
            help="Lines with 'prompt', 'turns', OpenAI 'messages' or ShareGPT 'conversations'; repeatable.",
        ),
    ] = None,
    self_prompt: Annotated[
        int, typer.Option(min=0, help="Also so many conversations whose user turns the model samples itself.")
    ] = 0,
    self_prompt_temperature: Annotated[
        float, typer.Option(min=0.01, help="Temperature of those user turns.")
    ] = 1.0,
    turns: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most user turns answered in a conversation; all, and 1 of a sampled one, if unset."
        ),
    ] = None,
    temperature: Annotated[
        str, typer.Option(metavar="T,T,…", help="Each row takes one of these, by its hash; 0 is greedy.")
    ] = "0,0.7",
    top_p: Annotated[float, typer.Option(help="Nucleus of the answers that are not greedy.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Longer prompts are skipped, and counted in the manifest.")
    ] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Answers per prompt; several need a temperature.")] = 1,
    seed: Annotated[int, typer.Option(help="Of every row's own seed.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts.")] = None,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Only the I-th of N disjoint parts, for N processes.")
    ] = "1/1",
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows of a full token shard.")] = 4096,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.01, help="Stop after so long; the same command goes on where it was."),
    ] = None,
    revision: Revision = None,
    lora: Lora = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    device: Device = None,
    max_num_seqs: Annotated[int, typer.Option(metavar="INT", help="Conversations answered together.")] = 64,
    max_step_tokens: Annotated[int | None, engine_option("max_step_tokens", "INT")] = None,
    kv_cache_tokens: Annotated[int | None, engine_option("kv_cache_tokens", "INT")] = None,
) -> None:
    """Let MODEL answer prompts: the rows its heads are trained on.

    Writes rows.jsonl, manifest.json and shards of token ids to the output folder. Stopped or killed, the
    same command goes on where it was; no row is lost or repeated.
    """
    from training.distill import DistillOptions, run

    with failing():
        options = DistillOptions.parse(
            prompts=tuple(prompts or ()),
            self_prompt=self_prompt,
            self_prompt_temperature=self_prompt_temperature,
            turns=turns,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            max_prompt_tokens=max_prompt_tokens,
            samples=samples,
            seed=seed,
            limit=limit,
            part=part,
            shard_rows=shard_rows,
            minutes=minutes,
        )
        config = engine_config(
            model=model,
            revision=revision,
            lora=lora,
            dtype=dtype,
            quantization=quantization,
            device=device,
            max_num_seqs=max_num_seqs,
            max_step_tokens=max_step_tokens,
            kv_cache_tokens=kv_cache_tokens,
            max_model_len=max_prompt_tokens + max_tokens,
            tree="off",  # a full batch leaves no room for speculation
        )
        run(config, options, output)


def train(**given: Any) -> None:
    """Train Medusa heads for MODEL on its own answers (Medusa-1: the model stays frozen).

    Says what memory it takes before it starts. Writes heads (medusa_lm_head.safetensors), train.jsonl,
    curves.svg and checkpoints to the output folder; stopped or killed, --resume goes on exactly there.
    The last line is JSON.
    """
    from training.train import train as run

    with failing():
        try:
            config = TrainConfig(**{name: value for name, value in given.items() if value not in (None, [])})
        except ValidationError as error:
            raise _bad_options(error) from None
        typer.echo(json.dumps(run(config), ensure_ascii=False))


def _train_parameter(name: str) -> inspect.Parameter:
    """An option from the field of `TrainConfig`, so that each is declared once; values stay strings."""
    field = TrainConfig.model_fields[name]
    shown = "" if field.is_required() or field.default is None else f" [default: {field.default}]"
    text = f"{field.description}{shown}"
    option = "--" + name.replace("_", "-")
    kind: Any
    annotation: Any = str | None
    if name == "model":
        kind = typer.Argument(metavar="MODEL", help=text, show_default=False)
    elif name == "data":
        annotation, kind = list[Path] | None, typer.Option(option, metavar="FOLDER", help=text)
    elif field.annotation is bool:
        annotation, kind = bool, typer.Option(option, help=field.description)
    else:
        names = (option, "-o") if name == "output" else (option,)
        kind = typer.Option(*names, help=text, metavar=type_name(field.annotation), show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if annotation is bool else None,
        annotation=Annotated[annotation, kind],
    )


train.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_train_parameter(name) for name in TrainConfig.model_fields]
)
app.command()(train)


@app.command()
def calibrate(
    heads: Annotated[str, typer.Option("--heads", help="Heads: a file, a folder or a hub id.")],
    data: Annotated[
        list[Path], typer.Option("--data", metavar="FOLDER", help="What `distill` wrote; repeatable.")
    ],
    model: Model = "smollm2-135m",
    lora: Lora = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for tree, table and picture; that of the heads."),
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Hidden states, as `train` left them; `cache` in the output if unset.")
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of conversations to measure on; if unset that of training, from the checkpoint "
            f"beside the heads, and {TrainConfig.model_fields['held_out'].default} without one.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=2, max=64, help="Most nodes of the tree, root counted.")] = 64,
    bigram: Annotated[
        bool,
        typer.Option(help="Count which token follows which in the rest of the data, for the guesses' order."),
    ] = True,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="auto|float32|bfloat16|float16",
            help=f"{TrainConfig.model_fields['dtype'].description} [default: auto]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Grow the tree that fits these heads, from answers they were not trained on.

    Counts how often each guess comes true given that the path before it did, and writes medusa_tree.json
    (every prefix is a tree), medusa_calibration.json (what `--tree auto` starts from), medusa_tree.svg, and,
    where it brings the right guesses forward, medusa_bigram.safetensors (which token follows which).
    The last line is JSON, with acceptance lengths replayed without a server.
    """
    from training.checkpoint import recorded_settings
    from training.measure import measure

    with failing():
        beside = Path(heads).expanduser()
        home = beside if beside.is_dir() else beside.parent
        folder = output or home
        if output is None and not beside.exists():
            raise ConfigError("--output is needed where the heads are no local file or folder")
        recorded = {}
        with nullcontext() if held_out is None else suppress(ConfigError):  # told what to do without it
            recorded = recorded_settings(home) if beside.exists() else {}
        trained = float(recorded.get("held_out", TrainConfig.model_fields["held_out"].default))
        if held_out is None:
            held_out = trained
        elif recorded and held_out > trained:
            typer.echo(
                f"warning: these heads were trained with --held-out {trained:g}, so of {held_out:g} they "
                "know a part, which makes the tree look better than it is",
                err=True,
            )
        result = measure(
            heads,
            tuple(data),
            folder,
            model=model,
            lora=checked_lora(lora),
            cache_dir=cache_dir or folder / "cache",
            share=held_out,
            size=size,
            bigram=bigram,
            device=device or "auto",
            dtype=dtype or "auto",
        )
        typer.echo(json.dumps(result, ensure_ascii=False))


@app.command()
def export(
    heads: Annotated[str, typer.Option("--heads", help="Heads: a file, a folder or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="A new folder.")],
    model: Model = "smollm2-135m",
    lora: Lora = None,
    format: Annotated[
        str, typer.Option("--format", metavar="official|vllm|medusa-serve", help="Whose files to write.")
    ] = "official",
) -> None:
    """Write heads and tree in the files that other servers read."""
    from training.export import export as run

    with failing():
        typer.echo(str(run(heads, output, model=model, lora=checked_lora(lora), format=format)))
