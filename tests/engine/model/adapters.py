"""LoRA adapters made with PEFT for tiny models, and the models that PEFT merges them into."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_adapter(model: Any, folder: Path, *, seed: int = 1, std: float = 0.3, **config: Any) -> Path:
    """An adapter of random numbers for the model, as PEFT saves it."""
    values = {"r": 4, "lora_alpha": 6, "target_modules": list(LINEAR), "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT has to say of tied and resized embeddings
        torch.manual_seed(seed)
        made = get_peft_model(copy.deepcopy(model), LoraConfig(**(values | config)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad or name.endswith(("lora_B.default.bias", "base_layer.bias")):
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
        made.save_pretrained(folder)
    return folder


def merged(model: Any, *adapters: tuple[Path, float]) -> Any:
    """A copy of the model with these merged into it by PEFT, each times its factor."""
    return _with(model, *adapters).merge_and_unload()


def adapted(model: Any, *adapters: tuple[Path, float]) -> Any:
    """The same not merged: each layer adds what the adapters say, as it did in training."""
    return _with(model, *adapters)


def _with(model: Any, *adapters: tuple[Path, float]) -> Any:
    names = [f"a{i}" for i in range(len(adapters))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = PeftModel.from_pretrained(copy.deepcopy(model), adapters[0][0], adapter_name=names[0])
        for name, (folder, _) in list(zip(names, adapters, strict=True))[1:]:
            made.load_adapter(folder, adapter_name=name)
        made.base_model.set_adapter(names)
        for module in made.modules():
            if isinstance(module, LoraLayer):
                for name, (_, scale) in zip(names, adapters, strict=True):
                    module.set_scale(name, scale)
    return made.eval()


def edit_config(folder: Path, **values: Any) -> Path:
    """Other settings in an adapter's config; None takes one out."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Other tensors in an adapter, by what follows the prefix; None takes one out."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(f"base_model.model.{name}", None)
        if tensor is not None:
            tensors[f"base_model.model.{name}"] = tensor.contiguous()
    save_file(tensors, file)
    return folder
