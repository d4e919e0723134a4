"""The server as a Ray Serve application, for those who outgrow one machine: one replica per GPU.

    serve run server.ray_app:app model=smollm2-135m max_replicas=4

Every setting of `medusa-serve serve` can be given as `name=value` (or as MEDUSA_… in the environment), beside
the fields of `Scaling`, but those of connections: Ray's proxies take HTTP, on port 8000 of each node, and
balance by ongoing requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import cluster_resources, is_initialized, serve
from starlette.datastructures import MutableHeaders

from engine.errors import ConfigError
from server.lifecycle import HANDSHAKE_S
from server.middleware import REQUEST_ID_HEADER
from server.settings import Settings, load_settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Scaling", "app"]

OF_CONNECTIONS = {"host", "port", "ssl_certfile", "ssl_keyfile", "read_timeout", "write_timeout"}
"""Settings of `bind` and `ServerConfig`, which do not run here. The environment may still hold them."""

HEALTH_PERIOD_S = 5.0
DRAIN_POLL_S = 0.5
"""How often a replica that shall go looks whether its last request has ended."""


class Scaling(BaseModel):
    """How many replicas there are, and what each gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(1, ge=1, description="Replicas that are always there.")
    max_replicas: int = Field(1, ge=1, description="Most replicas.")
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="Requests a replica shall have; three quarters of max_num_seqs if unset."
    )
    upscale_delay_s: float = Field(10.0, ge=0, description="How long there are too many before one is added.")
    downscale_delay_s: float = Field(
        600.0, ge=0, description="How long there are too few before one goes; a start takes minutes."
    )
    look_back_period_s: float = Field(30.0, gt=0, description="Span over which requests are averaged.")
    gpus: float | None = Field(
        None, ge=0, description="GPUs a replica; if unset 1 where the cluster has any and device is not cpu."
    )
    cpus: float = Field(1.0, ge=0, description="CPU cores a replica; also its threads where it has no GPU.")


def app(args: Mapping[str, Any]) -> serve.Application:
    """The application for these arguments: what Ray Serve calls an application builder.

    Args:
        args: fields of `Settings` and `Scaling`, as strings or values.

    Raises:
        ConfigError: one line that names each bad one.
    """
    own = {name: value for name, value in args.items() if name in Scaling.model_fields}
    rest = {name: value for name, value in args.items() if name not in own}
    if unknown := [name for name in rest if name not in Settings.model_fields]:
        raise ConfigError(f"unknown: {', '.join(unknown)}")
    if others := [name for name in rest if name in OF_CONNECTIONS]:
        raise ConfigError(f"of no effect here, where Ray's proxies take the connections: {', '.join(others)}")
    if "engine_process" in rest:
        raise ConfigError("of no effect here, where a replica is a process anyway: engine_process")
    settings = load_settings(rest)
    try:
        scaling = Scaling(**own)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise ConfigError("; ".join(f"{item['loc'][0]}: {item['msg']}" for item in problems)) from None
    if scaling.max_replicas < scaling.min_replicas:
        raise ConfigError("max_replicas: below min_replicas")
    return _application(settings, scaling)


def _application(settings: Settings, scaling: Scaling) -> serve.Application:
    gpus = scaling.gpus
    if gpus is None:
        has_gpu = is_initialized() and cluster_resources().get("GPU", 0) > 0
        gpus = 1.0 if has_gpu and settings.device != "cpu" else 0.0
    threads = None if gpus else max(1, int(scaling.cpus))

    def build() -> FastAPI:
        """In the replica's own process: the model is loaded here, and its engine starts with the lifespan."""
        return _load(settings, threads)

    ingress = serve.ingress(build)(MedusaServe)
    deployment = serve.deployment(
        ingress,
        name="medusa-serve",
        # Beyond this Ray keeps requests in its own queue. All that the engine can hold may reach it, and one
        # more, so that a full queue is answered with 503 as everywhere.
        max_ongoing_requests=settings.max_num_seqs + settings.max_waiting + 1,
        autoscaling_config={
            "min_replicas": scaling.min_replicas,
            "initial_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing_requests or 0.75 * settings.max_num_seqs,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "look_back_period_s": scaling.look_back_period_s,
        },
        ray_actor_options={"num_cpus": scaling.cpus, "num_gpus": gpus},
        health_check_period_s=HEALTH_PERIOD_S,
        # A replica that shall go gets no new requests, and is killed when this is over.
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        graceful_shutdown_timeout_s=settings.drain_timeout + HANDSHAKE_S,
    )
    return deployment.bind()


class MedusaServe:
    """One replica: the whole server around one engine. Ray adds `app`, which `build` returned."""

    app: FastAPI

    async def check_health(self) -> None:
        """Asked by Ray every few seconds; a replica that raises is replaced."""
        if not self.app.state.context.healthy:
            raise RuntimeError("the engine died or is stuck; the log says which")


def _load(settings: Settings, threads: int | None) -> FastAPI:
    import torch

    from engine.loop import EngineLoop
    from server.app import create_app
    from server.logs import configure_logging

    configure_logging(settings.log_level, settings.log_format)
    if threads is not None:
        torch.set_num_threads(threads)
    engine = EngineLoop.load(settings.engine_config)
    app = create_app(engine, engine.text, settings, engine.generation_defaults)
    app.add_middleware(_WithoutRequestId)
    return app


class _WithoutRequestId:
    """Takes X-Request-Id from answers: Ray's proxy adds the same one, which it has handed to us."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[REQUEST_ID_HEADER]
            await send(message)

        await self._app(scope, receive, send_without)
