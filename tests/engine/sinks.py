"""Tiny models with attention sinks: another family's, with gpt-oss's attention in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from engine.model.families import FAMILIES
from tests.support import tiny_model


def model_with_sinks(model_type: str, patches: pytest.MonkeyPatch, **overrides: Any) -> PreTrainedModel:
    """As `tiny_model`; until the patches are undone this engine's family has sinks too.

    They are among the scores, of another size in each layer, but one is above all of them and one below.
    """
    AttentionInterface.register("sinks", eager_attention_forward)
    AttentionMaskInterface.register("sinks", eager_mask)
    model: PreTrainedModel = tiny_model(model_type, **overrides)
    model.set_attn_implementation("sinks")
    generator = torch.Generator().manual_seed(9)
    for index, layer in enumerate(model.model.layers):
        sinks = torch.randn(model.config.num_attention_heads, generator=generator) * 2 + index
        sinks[0], sinks[-1] = 40.0, -1e4
        layer.self_attn.sinks = nn.Parameter(sinks.roll(index))
    name = type(model).__name__
    family = FAMILIES[name]
    patches.setitem(FAMILIES, name, lambda config: {**family(config), "sinks": True})
    return model
