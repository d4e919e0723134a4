"""Experts by the same names whatever form a checkpoint has, and what is told of those that do not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import WeightsError
from engine.model.weights import Checkpoint
from tests.engine.model.gguf_files import published
from tests.support import greedy, greedy_reference, make_engine, run_all, save_model, tiny_model

FAMILIES = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 4, "hidden_size": 64},
    "granitemoe": {"num_local_experts": 3},
    "ernie4_5_moe": {"moe_num_experts": 3, "moe_k": 2, "moe_intermediate_size": 24},
    "qwen2_moe": {"num_experts": 3, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 40},
    "hunyuan_v1_moe": {"num_experts": 3},
    "glm4_moe": {"n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
LAYER = "model.layers.1."
W1 = f"{LAYER}block_sparse_moe.experts.{{}}.w1.weight"
INPUT, OUTPUT = (f"{LAYER}block_sparse_moe.{kind}_linear.weight" for kind in ("input", "output"))


def saved(folder: Path, family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny model's folder; returns the model and the file's tensors."""
    model = tiny_model(family, **FAMILIES[family])
    save_model(model, folder)
    return model, load_file(folder / "model.safetensors")


def refusal(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError) as refused:
        make_engine(folder)
    return str(refused.value).partition("do not fit the model. ")[2] or str(refused.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_form_gives_the_same(tmp_path: Path, family: str) -> None:
    """As published, and as transformers has it in memory."""
    model, tensors = saved(tmp_path, family)
    wanted = published(model)
    in_memory = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert in_memory.keys() != tensors.keys()
    for form in (tensors, in_memory):
        save_file(form, tmp_path / "model.safetensors")
        checkpoint = Checkpoint(tmp_path)
        assert checkpoint.names == wanted.keys()
        for name, tensor in wanted.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert torch.equal(checkpoint.get(name), tensor), name
    outputs = run_all(make_engine(tmp_path), [greedy("r", [3, 14, 15], 6, ignore_eos=True)])
    assert outputs["r", 0] == greedy_reference(model, [3, 14, 15], 6)


def test_an_expert_that_does_not_fit_is_told_by_the_files_own_name(tmp_path: Path) -> None:
    _, tensors = saved(tmp_path, "mixtral")
    name = W1.format(1)
    short = {name: tensors[name][:-2].clone()}
    assert refusal(tmp_path, {key: value for key, value in tensors.items() if key != name}) == (
        f"missing (1): {name}"
    )
    assert refusal(tmp_path, tensors | {W1.format(3): tensors[name].clone()}) == (
        f"unexpected (1): {W1.format(3)}"
    )
    told = f"{name} is [46, 32], not [48, 32]"
    assert refusal(tmp_path, tensors | short) == f"of another shape (1): {told}"
    longer = {W1.format(2): torch.zeros(50, 32)}  # so that all together have the right number of rows
    assert refusal(tmp_path, tensors | short | longer) == (
        f"of another shape (2): {told}, {W1.format(2)} is [50, 32], not [48, 32]"
    )
    gate = f"{LAYER}block_sparse_moe.gate.weight"
    del tensors[gate]
    assert refusal(tmp_path, tensors) == f"missing (1): {gate}"


def test_stacked_experts_that_do_not_fit_are_told_by_their_tensor(tmp_path: Path) -> None:
    _, tensors = saved(tmp_path, "granitemoe")
    whole = tensors[INPUT]
    assert refusal(tmp_path, tensors | {INPUT: whole[:2].clone()}) == f"missing (1): {INPUT}[2]"
    assert refusal(tmp_path, tensors | {INPUT: torch.cat([whole, whole[:1]])}) == (
        f"unexpected (2): {INPUT}[3], {INPUT}[3]"
    )
    assert refusal(tmp_path, tensors | {OUTPUT: torch.zeros(3, 32, 46)}) == (
        "of another shape (3): " + ", ".join(f"{OUTPUT}[{i}] is [32, 46], not [32, 48]" for i in range(3))
    )
    assert refusal(tmp_path, tensors | {INPUT: torch.zeros(3, 96, 30)}) == (
        "of another shape (3): " + ", ".join(f"{INPUT}[{i}] is [48, 30], not [48, 32]" for i in range(3))
    )
    # The two projections of an expert cannot be told apart, or there are no experts.
    for shape in ((3, 95, 32), (96, 32), (3, 3, 32, 32)):
        told = refusal(tmp_path, tensors | {INPUT: torch.zeros(shape)})
        assert told == f"missing (3): {', '.join(f'{INPUT}[{i}]' for i in range(3))}. unexpected (1): {INPUT}"


def test_weights_in_two_forms_are_refused(tmp_path: Path) -> None:
    _, tensors = saved(tmp_path, "mixtral")
    own = f"{LAYER}mlp.experts.1.gate_proj.weight"
    told = f"holds {own} twice, as {W1.format(1)} and as {own}"
    assert told in refusal(tmp_path, tensors | {own: torch.zeros(48, 32)})


def test_a_norm_of_heads_is_told_once(tmp_path: Path) -> None:
    """Though each head takes it."""
    _, tensors = saved(tmp_path, "qwen3_moe")
    name = f"{LAYER}self_attn.q_norm.weight"
    told = f"of another shape (1): {name} is [15], not [16]"
    assert refusal(tmp_path, tensors | {name: torch.zeros(15)}) == told


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral")
    with pytest.raises(WeightsError, match=re.escape(f"holds no tensor {W1.format(7)}")):
        Checkpoint(tmp_path).get(f"{LAYER}mlp.experts.7.gate_proj.weight")
