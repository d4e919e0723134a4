"""The lean decoder against transformers: prefill, decode, and every path of a tree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Ministral3Config, PreTrainedModel, SmolLM3Config
from transformers.models.ernie4_5.modeling_ernie4_5 import apply_rotary_pos_emb

from engine.attention.base import AttentionInput
from engine.attention.cpu import CpuAttention
from engine.attention.sdpa import SdpaAttention
from engine.cache.pool import KVPool
from engine.errors import ModelError, UnsupportedModelError
from engine.medusa.tree import default_tree
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.layers import RotaryTable, apply_rotary
from engine.model.weights import Checkpoint, load_weights
from tests.engine.model.family_cases import FAMILIES, MINISTRAL3, VARIANTS
from tests.support import save_model, tiny_llama, tiny_model

CPU = torch.device("cpu")
BLOCK, BLOCKS = 4, 100


class Bench:
    """A decoder with a pool and one block table per sequence, scattered over the pool."""

    def __init__(
        self,
        model: PreTrainedModel,
        folder: Path,
        sequences: int,
        backend: type[CpuAttention] | type[SdpaAttention],
    ) -> None:
        with torch.no_grad():  # biases start at zero and would hide a missing one
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.3)
        config = ModelConfig.from_folder(save_model(model, folder))
        self.decoder = Decoder(config, torch.float32, 512)
        load_weights(
            Checkpoint(folder),
            dict(self.decoder.named_parameters()),
            self.decoder.weight_map(),
            ignored=set(),
            progress=False,
        )
        self.decoder.order_rows()
        self.decoder.pack()
        self.pool = KVPool(
            num_layers=config.num_layers,
            num_blocks=BLOCKS * sequences + 1,
            block_size=BLOCK,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=torch.float32,
            device=CPU,
        )
        order = torch.randperm(BLOCKS * sequences, generator=torch.Generator().manual_seed(0)) + 1
        self.tables = order.view(sequences, BLOCKS)
        windows = config.windows_within(512)
        self.attention = backend(config.group, scale=config.attention_scale, windows=windows)

    def run(
        self,
        tokens: torch.Tensor,
        depths: torch.Tensor,
        lengths: list[int],
        ancestors: torch.Tensor | None = None,
    ):
        """Logits [B, N, vocab] of `tokens` [B, N] written behind `lengths` rows."""
        batch, size = tokens.shape
        cached = torch.tensor(lengths)
        row = cached[:, None] + torch.arange(size)
        rows = self.tables.gather(1, row // BLOCK) * BLOCK + row % BLOCK
        attention_input = AttentionInput(
            self.tables,
            cached,
            rows,
            max(lengths) + size,
            ancestors=None if ancestors is None else ancestors.expand(batch, size),
            depths=depths.expand(batch, size),
        )
        self.attention.plan(attention_input, self.pool)
        positions = (cached[:, None] + depths).flatten()
        hidden = self.decoder(tokens.flatten(), positions, self.attention)
        return self.decoder.logits(hidden).view(batch, size, -1)

    def prefill(self, index: int, tokens: list[int], start: int) -> torch.Tensor:
        size = len(tokens)
        every, self.tables = self.tables, self.tables[index : index + 1]
        logits = self.run(torch.tensor([tokens]), torch.arange(size), [start])[0]
        self.tables = every
        return logits


@pytest.mark.parametrize("backend", [CpuAttention, SdpaAttention])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_prefill_decode_and_every_tree_path_agree(
    variant: dict[str, Any], backend: type[CpuAttention] | type[SdpaAttention], tmp_path: Path
) -> None:
    check_against_transformers(tiny_llama(**variant), backend, tmp_path, prompts=(23, 9, 58))


@pytest.mark.parametrize(("family", "overrides"), FAMILIES, ids=str)
def test_every_family_agrees(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """A long prompt among short ones: the CPU's backend takes it by another way, and a window cuts it."""
    check_against_transformers(tiny_model(family, **overrides), CpuAttention, tmp_path, prompts=(23, 300, 58))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [(family, flags) for family, flags in FAMILIES if "sliding" in str(flags)],
    ids=str,
)
def test_windows_agree_on_the_reference_backend(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    check_against_transformers(tiny_model(family, **overrides), SdpaAttention, tmp_path, prompts=(23, 9, 330))


@torch.inference_mode()
def check_against_transformers(
    model: PreTrainedModel,
    backend: type[CpuAttention] | type[SdpaAttention],
    folder: Path,
    prompts: tuple[int, int, int],
) -> None:
    """Logits of prompts in two chunks, and of each node of a tree behind each prompt, in float32."""
    bench = Bench(model, folder, 3, backend)
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(61, (n,), generator=generator).tolist() for n in prompts]

    for index, prompt in enumerate(texts):
        reference = model(torch.tensor([prompt])).logits[0]
        cut = len(prompt) // 3
        logits = torch.cat((bench.prefill(index, prompt[:cut], 0), bench.prefill(index, prompt[cut:], cut)))
        torch.testing.assert_close(logits, reference, atol=1e-4, rtol=1e-4)

    tree = default_tree(4).prefix(24)
    topology = tree.topology(CPU)
    tokens = torch.randint(61, (3, tree.size), generator=generator)
    lengths = [len(prompt) for prompt in texts]
    logits = bench.run(tokens, topology.depths, lengths, topology.ancestors)
    paths = [[node] for node in range(tree.size)]
    for path in paths:
        while path[0]:
            path.insert(0, tree.parents[path[0]])
    depth = torch.tensor([len(path) - 1 for path in paths])
    # Padded with its last node, since what follows a row does not change it.
    nodes = torch.tensor([path + path[-1:] * (int(depth.max()) + 1 - len(path)) for path in paths])
    for index, prompt in enumerate(texts):
        rows = torch.cat((torch.tensor([prompt] * tree.size), tokens[index, nodes]), dim=1)
        reference = model(rows).logits[torch.arange(tree.size), len(prompt) + depth]
        torch.testing.assert_close(logits[index], reference, atol=1e-4, rtol=1e-4)


def test_ministral_3_is_served_up_to_where_its_queries_are_scaled() -> None:
    def most(positions: int = 8192, **rope: Any) -> int:
        config = Ministral3Config(
            rope_parameters=rope,
            architectures=["Ministral3ForCausalLM"],
            max_position_embeddings=positions,
        )
        return ModelConfig.from_hf(config).max_position

    assert most(**MINISTRAL3) == 384
    assert most(256, **MINISTRAL3) == 256
    assert most(**(MINISTRAL3 | {"llama_4_scaling_beta": None})) == 8192


@pytest.mark.parametrize("used", [True, False])
def test_windows_that_smollm3_does_not_use_are_none(used: bool) -> None:
    config = SmolLM3Config(
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=3,
        use_sliding_window=used,
        architectures=["SmolLM3ForCausalLM"],
    )
    assert ModelConfig.from_hf(config).windows == (3 if used else None, None)


def test_ernies_rotation_is_of_float32_in_a_model_of_bfloat16(tmp_path: Path) -> None:
    model = tiny_model("ernie4_5")
    table = RotaryTable(ModelConfig.from_folder(save_model(model, tmp_path)).rope, 512, torch.bfloat16)
    positions = torch.arange(3, 512, 7)
    x = torch.randn(1, 6, len(positions), 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted, _ = apply_rotary_pos_emb(x, x, *model.model.rotary_emb(x, positions[None]))
    x, wanted = (torch.cat((y[0, ..., ::2], y[0, ..., 1::2]), -1).transpose(0, 1) for y in (x, wanted))
    turned = apply_rotary(x, *table(positions))
    assert turned.dtype == torch.bfloat16
    assert (turned == wanted).float().mean() > 0.999


def test_what_is_not_covered_is_refused_with_what_is(tmp_path: Path) -> None:
    config = LlamaConfig(architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        ModelConfig.from_hf(config)
    with pytest.raises(UnsupportedModelError, match="gelu"):
        ModelConfig.from_hf(LlamaConfig(architectures=["LlamaForCausalLM"], hidden_act="gelu"))
    dynamic = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        ModelConfig.from_hf(dynamic)
    with pytest.raises(ModelError, match="config"):
        ModelConfig.from_folder(tmp_path)
    halved = {"model_type": "exaone4", "architectures": ["Exaone4ForCausalLM"], "sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(halved), encoding="utf-8")
    with pytest.raises(ModelError, match="cannot read the model config"):  # transformers divides by zero
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divisor", [1.0, 3.0])
@torch.inference_mode()
def test_logits_and_states_go_where_they_shall(dtype: torch.dtype, divisor: float, tmp_path: Path) -> None:
    """Rounded to the model's dtype once, by lm_head; what a family divides by divides float32."""
    config = ModelConfig.from_folder(save_model(tiny_llama(), tmp_path))
    decoder = Decoder(replace(config, logits_divisor=divisor), dtype, 64)
    decoder.randomize(CPU)
    hidden = torch.randn(3, config.hidden_size, dtype=dtype)
    wanted = decoder.lm_head(hidden).float() / divisor
    assert torch.equal(decoder.logits(hidden), wanted)
    for kind in (torch.float32, decoder.logits_dtype):
        out = torch.empty_like(wanted, dtype=kind)
        assert decoder.logits(hidden, out) is out
        assert torch.equal(out.float(), wanted)
    assert decoder.logits_dtype == (dtype if divisor == 1.0 else torch.float32)

    tokens, states = torch.arange(3), torch.empty_like(hidden)
    assert decoder(tokens, tokens, Mixed(), states) is states
    assert torch.equal(states, decoder(tokens, tokens, Mixed()))


class Mixed:
    """Attention to oneself alone."""

    def plan(self, batch: AttentionInput, pool: KVPool) -> None:
        """Nothing is shared by its layers."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).flatten(1)


def test_bfloat16_runs_and_stays_near(tmp_path: Path) -> None:
    model = tiny_llama()
    save_model(model, tmp_path)
    decoder = Decoder(ModelConfig.from_folder(tmp_path), torch.bfloat16, 64)
    load_weights(
        Checkpoint(tmp_path),
        dict(decoder.named_parameters()),
        decoder.weight_map(),
        ignored=set(),
        progress=False,
    )
    plain = decoder.lm_head(torch.ones(3, 32, dtype=torch.bfloat16)).float()
    decoder.pack()
    packed = decoder.lm_head(torch.ones(3, 32, dtype=torch.bfloat16)).float()
    torch.testing.assert_close(packed, plain, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"head_dim": -1}, "head_dim is -1; it must be 1 or more"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be 1 or more"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, not a multiple of num_key_value_heads, 3"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, of heads with 16 channels"),
        ({"quantization_config": 4}, "'int' object has no attribute"),
        ({"attention_bias": None}, "Validation error for field 'attention_bias': TypeError"),
    ],
    ids=str,
)
def test_what_a_config_cannot_mean_is_told_in_a_line(stated: dict, told: str, tmp_path: Path) -> None:
    save_model(tiny_model("glm"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **stated, "rope_parameters": None, "rope_theta": 10000.0}))
    with pytest.raises(ModelError) as raised:
        ModelConfig.from_folder(tmp_path)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_window_holds_a_position_at_least() -> None:
    model = tiny_model("mistral", sliding_window=0)
    model.config.architectures = ["MistralForCausalLM"]
    with pytest.raises(ValueError, match="sliding_window is 0; it must be 1 or more"):
        ModelConfig.from_hf(model.config)
