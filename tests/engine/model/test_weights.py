"""Model folders, generation defaults, and tensors into parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.errors import ModelError, WeightsError
from engine.model import embedded
from engine.model.weights import (
    Checkpoint,
    GenerationDefaults,
    load_generation_defaults,
    load_tokenizer,
    load_weights,
    resolve_model,
)
from engine.text import TextProcessor

Tensors = dict[str, torch.Tensor]


def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (7, 4), "q": (6, 4), "k": (2, 4), "v": (2, 4), "norm": (4,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


WEIGHT_MAP = {"embed": ("embed",), "qkv": ("q", "k", "v"), "norm": ("norm",)}


def parameters(dtype: torch.dtype = torch.float32) -> Tensors:
    shapes = {"embed": (7, 4), "qkv": (10, 4), "norm": (4,)}
    return {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in shapes.items()}


def single(folder: Path, values: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(values, folder / "model.safetensors")
    return folder


def sharded(folder: Path, values: Tensors, shards: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        names = sorted(values)[number::shards]
        save_file({name: values[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# Tensors


@pytest.mark.parametrize("write", [single, sharded])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_filled_in_place(tmp_path: Path, write: Any, dtype: torch.dtype) -> None:
    values, filled = tensors(), parameters(dtype)
    addresses = {name: parameter.data_ptr() for name, parameter in filled.items()}
    load_weights(Checkpoint(write(tmp_path / "model", values)), filled, WEIGHT_MAP)
    assert {name: parameter.data_ptr() for name, parameter in filled.items()} == addresses
    assert torch.equal(filled["embed"], values["embed"].to(dtype))
    assert torch.equal(filled["qkv"], torch.cat([values["q"], values["k"], values["v"]]).to(dtype))
    assert torch.equal(filled["norm"], values["norm"].to(dtype))


def test_parameters_of_a_module_are_filled(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 10, bias=False)
    values = {name: tensors()[name] for name in "qkv"}
    load_weights(
        Checkpoint(single(tmp_path / "m", values)),
        dict(module.named_parameters()),
        {"weight": ("q", "k", "v")},
    )
    assert torch.equal(module.weight[6:8], values["k"])
    assert module.weight.requires_grad


def test_checkpoint_reads_names_shapes_and_values(tmp_path: Path) -> None:
    checkpoint = Checkpoint(sharded(tmp_path / "model", tensors(), shards=3))
    assert checkpoint.names == {"embed", "q", "k", "v", "norm"}
    assert checkpoint.shape("q") == (6, 4)
    assert torch.equal(checkpoint.get("norm"), tensors()["norm"])
    with pytest.raises(WeightsError, match="holds no tensor bias"):
        checkpoint.get("bias")


def test_one_error_names_all_that_does_not_fit_and_nothing_is_filled(tmp_path: Path) -> None:
    values = tensors()
    del values["v"]
    values["embed"] = torch.zeros(8, 4)
    values |= {f"extra.{number:02d}": torch.zeros(1) for number in range(12)}
    filled = parameters()
    with pytest.raises(WeightsError) as caught:
        load_weights(Checkpoint(single(tmp_path / "model", values)), filled, WEIGHT_MAP)
    text = str(caught.value)
    assert str(tmp_path / "model") in text
    assert "missing (1): v." in text
    assert "unexpected (12): extra.00, " in text
    assert "extra.07 and 4 more" in text
    assert "extra.08" not in text
    assert "embed is [8, 4], not [7, 4]" in text
    assert all(parameter.isnan().all() for parameter in filled.values())


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [
        ("k", (3, 4), "q + k + v is [6, 4] + [3, 4] + [2, 4], not [10, 4]"),
        ("k", (2, 5), "q + k + v is [6, 4] + [2, 5] + [2, 4], not [10, 4]"),
        ("k", (8,), "q + k + v is [6, 4] + [8] + [2, 4], not [10, 4]"),
        ("norm", (1, 4), "norm is [1, 4], not [4]"),
        ("norm", (), "norm is [], not [4]"),
    ],
)
def test_shapes_are_checked(tmp_path: Path, name: str, shape: tuple[int, ...], found: str) -> None:
    values = tensors() | {name: torch.zeros(shape)}
    with pytest.raises(WeightsError, match=re.escape(found)):
        load_weights(Checkpoint(single(tmp_path / "model", values)), parameters(), WEIGHT_MAP)


def test_ignored_tensors_may_be_there(tmp_path: Path) -> None:
    values = tensors() | {
        "lm_head.weight": torch.zeros(7, 4),
        "layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
    }
    checkpoint = Checkpoint(single(tmp_path / "model", values))
    load_weights(checkpoint, parameters(), WEIGHT_MAP, ignored={"lm_head.weight"})
    load_weights(checkpoint, parameters(), WEIGHT_MAP, ignored=lambda name: name.startswith("lm_head"))
    with pytest.raises(WeightsError, match=r"unexpected \(1\): lm_head\.weight$"):
        load_weights(checkpoint, parameters(), WEIGHT_MAP)


def test_no_bar_where_stderr_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_weights(Checkpoint(single(tmp_path / "m", tensors())), parameters(), WEIGHT_MAP, progress=True)
    assert capsys.readouterr().err == ""


# Files


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = single(tmp_path / "model", tensors())
    whole = (folder / "model.safetensors").read_bytes()
    for content in (b"", whole[:-1], whole[:20], b"version https://git-lfs.github.com/spec/v1\n"):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(WeightsError, match=r"model/model\.safetensors is damaged .*download it again"):
            Checkpoint(folder)
    with pytest.raises(WeightsError, match="git lfs pull"):
        Checkpoint(folder)


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", tensors())
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"00002-of-00002\.safetensors is damaged"):
        Checkpoint(folder)


def test_absent_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", tensors())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"not in .*: model-00002-of-00002\.safetensors; download"):
        Checkpoint(folder)


def test_index_that_names_what_a_shard_lacks_is_an_error(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", tensors())
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["bias"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(value))
    with pytest.raises(WeightsError, match="do not hold: bias"):
        Checkpoint(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_broken_index_is_an_error(tmp_path: Path, content: str) -> None:
    folder = single(tmp_path / "model", tensors())
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["model.safetensors"], r"holds no config\.json"),
        (["config.json"], "holds no weights"),
        (["config.json", "consolidated.00.pth"], r"as consolidated\.00\.pth only.*save_pretrained"),
        (["config.json", "model-q4.gguf"], r"as model-q4\.gguf; name the file itself"),
        (["config.json", "weights.safetensors"], r"holds weights\.safetensors, but neither"),
    ],
)
def test_folder_that_is_no_model_is_an_error(tmp_path: Path, files: list[str], reason: str) -> None:
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(ModelError, match=reason):
        Checkpoint(tmp_path)


# Names


def test_embedded_model_resolves_to_its_conversion() -> None:
    assert resolve_model("smollm2-135m") == embedded.ensure_converted()


def test_local_folder_resolves_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    assert resolve_model(str(tmp_path / "mine")) == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/mine") == tmp_path / "mine"


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "~/absent", "a/b/c"])
def test_absent_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match=f"model folder {name} does not exist"):
        resolve_model(name)


def test_other_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(tmp_path / "model.bin"))


def test_revision_is_for_hub_ids_only(tmp_path: Path) -> None:
    for name in ("smollm2-135m", str(tmp_path)):
        with pytest.raises(ModelError, match="revision 'main' has no effect"):
            resolve_model(name, "main")


def test_hub_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"the hub cannot be reached.*embedded 'smollm2-135m'"):
        resolve_model("medusa-serve-tests/absent")
    with pytest.raises(ModelError, match=r"nor a hub id \(owner/name\)"):
        resolve_model("not a name")


def test_hub_id_in_the_cache_needs_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--model"
    (repo / "snapshots").mkdir(parents=True)
    single(repo / "snapshots" / commit, tensors())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = resolve_model("someone/model")
    assert Checkpoint(folder).names == tensors().keys()


# Generation defaults


def defaults(folder: Path, generation: Any, config: Any) -> GenerationDefaults:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_generation_defaults(folder)


NOTHING = GenerationDefaults(None, None, None, None, None, ())


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {}, NOTHING),
        (None, {"eos_token_id": 2}, GenerationDefaults(None, None, None, None, None, (2,))),
        (
            None,
            {"text_config": {"eos_token_id": [1, 106]}},
            GenerationDefaults(None, None, None, None, None, (1, 106)),
        ),
        (
            {"eos_token_id": [5, 6, 5]},
            {"eos_token_id": 2},
            GenerationDefaults(None, None, None, None, None, (5, 6)),
        ),
        ({"eos_token_id": 0}, {"eos_token_id": 2}, GenerationDefaults(None, None, None, None, None, (0,))),
        ({"eos_token_id": None}, {"eos_token_id": 2}, GenerationDefaults(None, None, None, None, None, (2,))),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05},
            {},
            GenerationDefaults(0.6, 0.9, 20, 0.05, None, ()),
        ),
        ({"temperature": 0.6, "top_k": -1}, {}, GenerationDefaults(0.6, None, 0, None, None, ())),
        (
            {"do_sample": False, "temperature": 0.6, "eos_token_id": 1},
            {},
            GenerationDefaults(*[None] * 5, (1,)),
        ),
    ],
)
def test_generation_config_is_honoured(
    tmp_path: Path, generation: Any, config: Any, expected: GenerationDefaults
) -> None:
    assert defaults(tmp_path, generation, config) == expected


@pytest.mark.parametrize(
    "generation",
    [{"temperature": "hot"}, {"top_k": True}, {"eos_token_id": "</s>"}, {"eos_token_id": [1, None]}, []],
)
def test_generation_config_of_the_wrong_type_is_an_error(tmp_path: Path, generation: Any) -> None:
    with pytest.raises(ModelError, match="must"):
        defaults(tmp_path, generation, {})


def test_sampling_defaults_may_come_from_elsewhere_or_from_nowhere(tmp_path: Path) -> None:
    """The model's EOS ids count where the source says nothing of them."""
    model, other = tmp_path / "model", tmp_path / "other"
    model.mkdir()
    other.mkdir()
    own = defaults(model, {"temperature": 0.6, "repetition_penalty": 1.1, "eos_token_id": 7}, {})
    assert own == GenerationDefaults(0.6, None, None, None, 1.1, (7,))
    assert load_generation_defaults(model, "none") == GenerationDefaults(*[None] * 5, (7,))
    file = other / "generation_config.json"
    file.write_text('{"top_p": 0.5, "eos_token_id": null}')
    assert load_generation_defaults(model, str(other)) == GenerationDefaults(
        None, 0.5, None, None, None, (7,)
    )
    file.write_text('{"eos_token_id": [8]}')
    assert load_generation_defaults(model, str(other)).eos_token_ids == (8,)
    with pytest.raises(ModelError, match="'auto', 'none' or a folder"):
        load_generation_defaults(model, str(tmp_path / "absent"))


# Tokenizer


def test_tokenizer_is_what_its_file_says_whatever_the_class(tmp_path: Path) -> None:
    """transformers 5 rebuilds a GPT2Tokenizer without the digits, which real repositories rely on."""
    vocab = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "ĠĠ"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("1", "2"), ("Ġ", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": True, "eos_token": "!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(tmp_path)
    assert loaded.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
    assert loaded.eos_token == "!"
    assert loaded.clean_up_tokenization_spaces is False


def test_chat_templates_are_found_wherever_models_have_them(tmp_path: Path) -> None:
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))

    def templates() -> tuple[str | None, str | None]:
        text = TextProcessor(load_tokenizer(tmp_path))
        return text.chat_template_for(tools=False), text.chat_template_for(tools=True)

    assert templates() == (None, None)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    assert templates() == ("of a processor", "of a processor")
    named = [{"name": name, "template": f"of a processor, {name}"} for name in ("default", "tool_use")]
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    assert templates() == ("of a processor, default", "of a processor, tool_use")
    (tmp_path / "chat_template.json").write_text('{"chat_template": [{"name": "default"}]}')
    with pytest.raises(
        ModelError, match=r"chat_template.json: each template .* must have a name and a template"
    ):
        templates()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "of the tokenizer"}')
    assert templates() == ("of the tokenizer", "of the tokenizer")
    (tmp_path / "chat_template.jinja").write_text("by itself")
    assert templates() == ("by itself", "by itself")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    assert templates() == ("by itself", "for tools")


@pytest.mark.parametrize("content", [None, "", "{", "{}"])
def test_tokenizer_that_cannot_be_read_is_an_error(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"cannot (load|read) "):
        load_tokenizer(tmp_path)
