"""int8 in every family: near the float model, and no row knows of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import loader
from engine.config import EngineConfig
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.weights import Checkpoint, load_weights
from engine.types import Request, SamplingParams
from tests.engine.model.family_cases import FAMILIES
from tests.engine.model.test_quantize import Recorder, needs_int8
from tests.support import greedy, make_engine, run_all, save_model, tiny_model

EVERY = [("llama", {}), *FAMILIES]


def loaded(folder: Path) -> Decoder:
    decoder = Decoder(ModelConfig.from_folder(folder), torch.float32, 512)
    load_weights(Checkpoint(folder), dict(decoder.named_parameters()), decoder.weight_map())
    return decoder


@needs_int8
@pytest.mark.parametrize(
    ("family", "overrides"), [EVERY[0], next(each for each in EVERY if each[0] == "ernie4_5_moe")], ids=str
)
def test_layers_are_quantised_one_by_one_as_they_are_loaded(
    family: str, overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same numbers as all at once, and no two of them are held as they were."""
    save_model(tiny_model(family, **overrides), tmp_path)
    held: list[set[str]] = []

    def watching(checkpoint: Any, parameters: Any, weight_map: Any, *, filled: Any, **given: Any) -> None:
        loaded: list[str] = []

        def noting(name: str) -> None:
            loaded.append(name)
            matrices = (name for name in loaded if name.startswith("layers.") and parameters[name].dim() > 1)
            held.append({name.split(".")[1] for name in matrices if "router" not in name})
            filled(name)

        load_weights(checkpoint, parameters, weight_map, filled=noting, **given)

    monkeypatch.setattr(loader, "load_weights", watching)
    config = EngineConfig(model=str(tmp_path), device="cpu", quantization="int8", kv_cache_tokens=640)
    decoder = loader.load(config, progress=False).decoder
    assert set().union(*held) == {str(index) for index in range(len(decoder.layers))}
    assert all(len(each) <= 1 for each in held)
    at_once, tokens = loaded(tmp_path), torch.arange(9) + 2
    at_once.order_rows()
    at_once.quantize("int8")
    with torch.inference_mode():
        found, wanted = (each(tokens, tokens, Recorder()) for each in (decoder, at_once))
    assert torch.equal(found, wanted)


def prompt_logprobs(folder: Path, prompt: list[int], **settings: Any) -> torch.Tensor:
    """Of a prompt's tokens, through the engine; decodes a few tokens with trees behind them too."""
    engine = make_engine(folder, tree=8, lookup=7, **settings)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    engine.add(Request("scored", tuple(prompt), sampling))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    (known,) = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs]
    copies = [1, 2, 3, 4, 5, 6] * 8  # so that lookup proposes
    assert len(run_all(engine, [greedy("more", copies, 12)])["more", 0]) == 12
    return torch.tensor([one.logprob for one in known if one is not None])


@needs_int8
@pytest.mark.parametrize(("family", "overrides"), EVERY, ids=str)
def test_every_family_runs_in_int8(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    save_model(tiny_model(family, **overrides), tmp_path)
    with torch.inference_mode():
        decoder, tokens = loaded(tmp_path), torch.arange(9) + 2
        positions = torch.arange(9) + 300
        wanted = decoder(tokens, positions, Recorder())
        decoder.quantize("int8")
        got = decoder(tokens, positions, Recorder())
        assert (got - wanted).norm() / wanted.norm() < 0.06
        assert not torch.equal(got, wanted)
        decoder.embed[tokens[4:]] *= 30
        decoder.embed[tokens[:3]] *= 30
        loud = decoder(tokens, positions, Recorder())
        assert torch.equal(loud[3], got[3])
        assert torch.equal(decoder(tokens[3:4], positions[3:4], Recorder())[0], got[3])
        assert not torch.equal(loud[4], got[4])

    prompt = torch.randint(61, (60,), generator=torch.Generator().manual_seed(4)).tolist()
    floats, ints = (prompt_logprobs(tmp_path, prompt, quantization=kind) for kind in ("none", "int8"))
    assert 0 < (ints - floats).abs().mean() < 0.15 * floats.std()
