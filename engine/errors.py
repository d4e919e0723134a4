"""Everything the engine raises on purpose.

MedusaError
├── ConfigError            a setting that cannot work; raised at start-up
├── CaptureError           a decode step that cannot be captured; raised at start-up
├── ModelError             a model that cannot be served; raised at start-up
│   ├── UnsupportedModelError    the architecture or feature is not covered
│   ├── WeightsError             tensors missing, unexpected, or of a wrong shape
│   ├── HeadsError               a head file that does not fit the model
│   ├── AdapterError             a LoRA adapter that cannot be read or does not fit the model
│   └── TreeError                a draft tree that is malformed or does not fit the heads
├── RequestError           a request that is wrong in itself (HTTP 400)
│   └── ContextLengthError       prompt and output cannot fit the context (HTTP 400)
├── QueueFullError         too much waiting; try again later (HTTP 503)
├── EngineStoppedError     draining or stopped; try another replica (HTTP 503)
└── StepError              a step failed under a running request (HTTP 500)
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "CaptureError",
    "ConfigError",
    "ContextLengthError",
    "EngineStoppedError",
    "HeadsError",
    "MedusaError",
    "ModelError",
    "QueueFullError",
    "RequestError",
    "StepError",
    "TreeError",
    "UnsupportedModelError",
    "WeightsError",
    "told",
]


class MedusaError(Exception):
    """Base of every error this project raises on purpose; its text is fit for a user."""


class ConfigError(MedusaError):
    """A setting, or a combination of settings, that cannot work."""


class CaptureError(MedusaError):
    """A decode step that cannot be captured as a CUDA graph; the text says what to do."""


class ModelError(MedusaError):
    """A model that cannot be served."""


class UnsupportedModelError(ModelError):
    """The model's architecture, or a feature its config asks for, is not covered."""


class WeightsError(ModelError):
    """The checkpoint's tensors do not match the model; the text names them."""


class HeadsError(ModelError):
    """A Medusa head file that cannot be read or does not fit the base model."""


class AdapterError(ModelError):
    """A LoRA adapter that cannot be read, is not covered or does not fit the base model."""


class TreeError(ModelError):
    """A draft tree that is malformed, too large, or deeper or wider than the heads."""


class RequestError(MedusaError):
    """A request that is wrong in itself. `param` is the request field to blame, if one is."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """Prompt plus requested output exceed what the model or the K/V pool can hold."""


class QueueFullError(MedusaError):
    """The waiting queue is at its bound. `retry_after_s` is a hint in seconds."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStoppedError(MedusaError):
    """The engine is draining or has stopped and takes no new requests."""


class StepError(MedusaError):
    """A step failed; the requests in it end with this, and no others."""


def told(error: BaseException) -> str:
    """What a client is told of an error in its request: no more than that of errors not raised on purpose."""
    return str(error) if isinstance(error, MedusaError) else f"internal error: {type(error).__name__}"
