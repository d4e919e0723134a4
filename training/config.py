"""Settings of `medusa-serve train`: the one place where a default of training is written down."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from engine.config import EngineConfig, lora_setting

__all__ = ["TrainConfig"]


class TrainConfig(BaseModel):
    """What to train on what, and how. The defaults suit a CPU, little data and models of any size.

    The shipped heads have three layers, trained at a rate of 2e-3, and what else `benchmarks.gpu_heads` sets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("smollm2-135m", description="Base model, as for `serve`; it stays frozen.")
    lora: str | None = Field(None, description=EngineConfig.model_fields["lora"].description)
    data: tuple[Path, ...] = Field(
        description="What `medusa-serve distill` wrote: a folder of shards; may be given more than once."
    )
    output: Path = Field(description="Folder for heads, checkpoint, log and curves.")
    heads: int = Field(4, ge=1, le=16, description="Number of heads.")
    layers: int = Field(2, ge=1, le=8, description="Residual layers per head.")
    vocabulary: int | Literal["full"] = Field(
        8192, description="Tokens that heads choose from, the most frequent of the data; or 'full'."
    )
    kl: float = Field(
        0.8,
        ge=0.0,
        le=1.0,
        description="Weight of the model's own best tokens as targets; the rest goes to the token that came.",
    )
    decay: float = Field(0.8, gt=0.0, le=1.0, description="Head k's loss counts decay^k.")
    lr: float = Field(1e-3, gt=0.0, description="AdamW's peak learning rate; a cosine brings it to zero.")
    weight_decay: float = Field(0.01, ge=0.0, description="AdamW's.")
    warmup_steps: int = Field(40, ge=0, description="Steps over which the rate rises.")
    epochs: float = Field(2.0, gt=0.0, description="Passes over the data.")
    minutes: float | None = Field(
        None,
        gt=0.0,
        description="End after so long, if the passes take longer; hidden states count (at most half goes to "
        "them: rows beyond are left out), and the rate reaches zero then.",
    )
    batch_tokens: int = Field(
        512, ge=1, description="Tokens of an optimizer step; prompts count where nothing is cached."
    )
    micro_tokens: int = Field(
        512, ge=1, description="Tokens computed together; a step accumulates the gradients of several."
    )
    max_length: int = Field(2048, ge=8, description="Longer conversations are cut.")
    ema: float = Field(
        0.99, ge=0.0, lt=1.0, description="Decay per step of the averaged weights that are kept; 0 is off."
    )
    held_out: float = Field(
        0.05, gt=0.0, lt=1.0, description="Share of prompts never trained on; chosen by the prompt's hash."
    )
    eval_every: int = Field(400, ge=1, description="Steps between looks at held-out answers.")
    eval_tokens: int = Field(16384, ge=64, description="Held-out tokens that are looked at.")
    patience: int = Field(6, ge=1, description="Looks without a better one after which training ends.")
    checkpoint_every: int = Field(400, ge=1, description="Steps between checkpoints.")
    resume: bool = Field(False, description="Go on from the output folder's checkpoint, exactly.")
    seed: int = Field(0, ge=0, description="Of the order of the data.")
    device: str = Field("auto", description="'auto', 'cpu', 'cuda' or 'cuda:N'.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Backbone and activations: 'auto' is float32 on CPU; on CUDA the checkpoint's own, and "
        "bfloat16 for one in float32; float16 for bfloat16 below compute capability 8.0.",
    )
    backbone_bits: Literal[16, 8, 4] = Field(
        16, description="8 or 4: linear layers of the backbone by bitsandbytes, for a small GPU."
    )
    cache: Literal["auto", "on", "off", "memory"] = Field(
        "auto",
        description="Keep the hidden states of all answers on disk; 'auto': up to 64 GiB and a quarter of "
        "the free disk. 'memory': on the device instead, for this run alone: the fastest on a GPU. Rows "
        "that do not fit are left out.",
    )
    cache_dir: Path | None = Field(
        None, description="Where; `<output>/cache` if unset. Several runs may share one."
    )

    @field_validator("lora", mode="before")
    @classmethod
    def _are_adapters(cls, value: object) -> object:
        return lora_setting(value)

    @field_validator("vocabulary", mode="before")
    @classmethod
    def _number_or_word(cls, value: object) -> object:
        if isinstance(value, str) and value.strip().isdigit():
            value = int(value)
        if isinstance(value, int) and value < 64:
            raise ValueError("must be 'full' or a number of tokens from 64")
        return value
