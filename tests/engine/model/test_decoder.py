"""The lean decoder against transformers: prefill, decode, and every path of a tree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.attention.base import AttentionInput
from engine.attention.cpu import CpuAttention
from engine.attention.sdpa import SdpaAttention
from engine.cache.pool import KVPool
from engine.errors import ModelError, UnsupportedModelError
from engine.medusa.tree import default_tree
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.weights import Checkpoint, load_weights
from tests.support import save_model, tiny_llama

CPU = torch.device("cpu")
BLOCK = 4

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 10000.0,
    },
}

VARIANTS = [
    *({"rope_parameters": rope} for rope in ROPE.values()),
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "head_dim": 8},
]


class Bench:
    """A decoder with a pool and one block table per sequence, scattered over the pool."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        folder: Path,
        sequences: int,
        backend: type[CpuAttention] | type[SdpaAttention],
    ) -> None:
        with torch.no_grad():  # biases start at zero and would hide a missing one
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.3)
        config = ModelConfig.from_folder(save_model(model, folder))
        self.decoder = Decoder(config, torch.float32, 256)
        load_weights(
            Checkpoint(folder),
            dict(self.decoder.named_parameters()),
            self.decoder.weight_map(),
            ignored=set(),
            progress=False,
        )
        self.decoder.pack()
        self.pool = KVPool(
            num_layers=config.num_layers,
            num_blocks=40 * sequences + 1,
            block_size=BLOCK,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=torch.float32,
            device=CPU,
        )
        order = torch.randperm(40 * sequences, generator=torch.Generator().manual_seed(0)) + 1
        self.tables = order.view(sequences, 40)
        self.attention = backend(config.num_heads // config.num_kv_heads)

    def run(self, tokens: torch.Tensor, depths: torch.Tensor, lengths: list[int], visible: torch.Tensor):
        """Logits [B, N, vocab] of `tokens` [B, N] written behind `lengths` rows."""
        batch, size = tokens.shape
        cached = torch.tensor(lengths)
        row = cached[:, None] + torch.arange(size)
        rows = self.tables.gather(1, row // BLOCK) * BLOCK + row % BLOCK
        attention_input = AttentionInput(
            self.tables, cached, rows, visible.expand(batch, size, size), max(lengths) + size
        )
        self.attention.plan(attention_input, self.pool)
        positions = (cached[:, None] + depths).flatten()
        hidden = self.decoder(tokens.flatten(), positions, self.attention)
        return self.decoder.logits(hidden).view(batch, size, -1)

    def prefill(self, index: int, tokens: list[int], start: int) -> torch.Tensor:
        size = len(tokens)
        every, self.tables = self.tables, self.tables[index : index + 1]
        chain = torch.ones(1, size, size, dtype=torch.bool).tril()
        logits = self.run(torch.tensor([tokens]), torch.arange(size), [start], chain)[0]
        self.tables = every
        return logits


@pytest.mark.parametrize("backend", [CpuAttention, SdpaAttention])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.inference_mode()
def test_prefill_decode_and_every_tree_path_agree(
    variant: dict, backend: type[CpuAttention] | type[SdpaAttention], tmp_path: Path
) -> None:
    with torch.inference_mode(False):
        model = tiny_llama(**variant)
    bench = Bench(model, tmp_path, 3, backend)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(61, (n,), generator=generator).tolist() for n in (23, 9, 58)]

    for index, prompt in enumerate(prompts):
        reference = model(torch.tensor([prompt])).logits[0]
        cut = len(prompt) // 3
        logits = torch.cat((bench.prefill(index, prompt[:cut], 0), bench.prefill(index, prompt[cut:], cut)))
        torch.testing.assert_close(logits, reference, atol=1e-4, rtol=1e-4)

    tree = default_tree(4).prefix(24)
    topology = tree.topology(CPU)
    tokens = torch.randint(61, (3, tree.size), generator=generator)
    lengths = [len(prompt) for prompt in prompts]
    logits = bench.run(tokens, topology.depths, lengths, topology.visible())
    for index, prompt in enumerate(prompts):
        for node in range(tree.size):
            path = [node]
            while path[0]:
                path.insert(0, tree.parents[path[0]])
            reference = model(torch.tensor([prompt + tokens[index, path].tolist()])).logits[0, -1]
            torch.testing.assert_close(logits[index, node], reference, atol=1e-4, rtol=1e-4)


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
