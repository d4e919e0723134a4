"""`medusa-serve train`: Medusa-1, heads on a frozen base model.

Loss: Σ_k decay^k · CE_k over the answers' tokens (Medusa, section 2.2.1), or the KL divergence to the model's
own distribution, or a mixture. The model's distribution at a position says more than the one token that was
drawn there, which matters most where data is thin.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from engine.errors import ConfigError
from engine.medusa.tree import Tree
from training.calibrate import calibrate
from training.checkpoint import RunLog, RunState, load_checkpoint, save_checkpoint
from training.config import TrainConfig
from training.evaluate import Ranks, rank_targets, replay
from training.heads import PlainHeads, num_parameters
from training.hidden import Batch
from training.objective import Targets, loss_weights, soft_cross_entropy
from training.plots import draw_curves
from training.setup import Setup, fingerprint, prepare, read_rows

__all__ = ["HEADS_FILE", "Trainer", "train"]

HEADS_FILE = "medusa_lm_head.safetensors"
_FREE_TO_CHANGE = {"output", "resume", "device", "cache", "cache_dir", "checkpoint_every", "data"}


def train(config: TrainConfig) -> dict[str, Any]:
    """Train heads as `config` says; writes heads, log, curves and checkpoints to `config.output`.

    Returns:
        What the last line of the command says: file, steps, seconds, accuracies, acceptance length.

    Raises:
        ConfigError: settings or data that cannot work, or do not fit this machine.
        ModelError: the base model cannot be used.
    """
    started = time.monotonic()
    config.output.mkdir(parents=True, exist_ok=True)
    rows, held = read_rows(config)
    described = {
        name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE_TO_CHANGE
    } | {"data": fingerprint([*rows, *held])}
    found = load_checkpoint(config.output, described) if config.resume else None
    if not config.resume and (config.output / "checkpoint.pt").is_file():
        raise ConfigError(f"{config.output} holds a run; go on with --resume, or name another folder")
    setup = prepare(config, rows, held, started)
    trainer = Trainer(config, setup, started)
    if found is not None:
        trainer.restore(*found)
        tqdm.write(f"going on from step {trainer.state.step} of {trainer.total_steps}")
    trainer.state.config = described
    return trainer.run()


class Trainer:
    """One run: heads, optimizer, and where it stands.

    Args:
        config: settings.
        setup: what they were made into (data, lm_head, vocabulary).
        started: `time.monotonic()` when the command's minutes began; now if None.
    """

    def __init__(self, config: TrainConfig, setup: Setup, started: float | None = None) -> None:
        self.config, self.setup, self.state = config, setup, RunState()
        spent = 0.0 if started is None else time.monotonic() - started
        self._seconds = math.inf if config.minutes is None else max(0.0, 60.0 * config.minutes - spent)
        device = setup.lm_head.device
        self.heads = PlainHeads(config.heads, config.layers, setup.lm_head.shape[1]).to(device)
        self.average = PlainHeads(config.heads, config.layers, setup.lm_head.shape[1]).to(device)
        self.best = PlainHeads(config.heads, config.layers, setup.lm_head.shape[1]).to(device)
        matrices, biases = list(self.heads.weights), list(self.heads.biases)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": biases, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=(0.9, 0.99),
            fused=device.type == "cuda",
        )
        self.total_steps = max(1, round(config.epochs * setup.source.steps_per_epoch))
        self._weights = torch.tensor(loss_weights(config.heads, config.decay), device=device).unsqueeze(1)
        # Since the last look, on the device: asking for each step's loss would wait for each step.
        self._loss = torch.zeros((), dtype=torch.float64, device=device)

    def run(self) -> dict[str, Any]:
        """Train to the end, or to the signal that ends it."""
        config, state = self.config, self.state
        run_log = RunLog(config.output / "train.jsonl", state.step)
        bar = tqdm(
            total=self.total_steps,
            initial=state.step,
            desc="training",
            unit="step",
            disable=None,
            smoothing=0.05,
        )
        started, before = time.monotonic(), state.seconds
        with _stop_signals() as stopped:
            while not self._done() and state.stale < config.patience and not stopped.is_set():
                loss, tokens = self._step()
                self._loss += loss
                state.step, state.tokens = state.step + 1, state.tokens + tokens
                state.loss_steps += 1
                state.seconds = before + time.monotonic() - started
                if state.step % config.eval_every == 0 or self._done():
                    line = self._look(float(self._loss) / state.loss_steps)
                    self._loss.zero_()
                    state.loss_steps = 0
                    run_log.write(line)
                    bar.set_postfix_str(
                        f"loss {line['loss']:.3f} top-1 {line['top1'][0]:.3f} replay {line['replay']:.3f}"
                    )
                if state.step % config.checkpoint_every == 0:
                    self._save()
                bar.update()
        bar.close()
        self._save()
        if stopped.is_set():
            tqdm.write(f"stopped at step {state.step}; go on with --resume")
        return self._finish(run_log)

    def restore(self, state: RunState, tensors: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.state = state
        self._loss.fill_(state.loss_sum)
        for name in ("heads", "average", "best"):
            getattr(self, name).load_state_dict(tensors[name])
        self.optimizer.load_state_dict(tensors["optimizer"])

    def _done(self) -> bool:
        """After so many steps, or so long."""
        return self.state.step >= self.total_steps or self.state.seconds >= self._seconds

    def _step(self) -> tuple[Tensor, int]:
        """One optimizer step; its loss per token, a float64 on the device, and its tokens."""
        source, step = self.setup.source, self.state.step
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss, tokens = torch.zeros_like(self._loss), 0
        for batch in source.step(step // source.steps_per_epoch, step % source.steps_per_epoch):
            loss += self._backward(batch)
            tokens += batch.num_tokens
        for parameter in self.heads.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(tokens)
        torch.nn.utils.clip_grad_norm_(self.heads.parameters(), 1.0)
        self.optimizer.step()
        self._update_average(step)
        return loss / tokens, tokens

    def _backward(self, batch: Batch) -> Tensor:
        """Add the gradient of the loss summed over the batch's tokens; returns that loss."""
        lm_head, rows, kl = self.setup.lm_head, self.setup.rows, self.config.kl
        device = lm_head.device
        outputs = self.heads(batch.hidden.to(lm_head))  # [heads, T, hidden]
        targets = batch.targets.to(device)
        known = targets >= 0
        ids, weights = [], []
        if kl < 1.0:
            ids.append(torch.where(known, rows[targets.clamp(min=0)], -1).unsqueeze(2))
            weights.append(torch.full_like(ids[0], 1.0 - kl, dtype=torch.float32))
        if batch.teacher_ids is not None and batch.teacher_log_p is not None:
            mapped = torch.where(known.unsqueeze(2), rows[batch.teacher_ids.to(device)], -1)
            ids.append(mapped)
            weights.append(kl * batch.teacher_log_p.to(device).exp())
        scale = self._weights.expand_as(targets)
        loss, _ = soft_cross_entropy(
            outputs.flatten(0, 1),
            lm_head,
            Targets(torch.cat(ids, 2).flatten(0, 1), torch.cat(weights, 2).flatten(0, 1)),
            scale.flatten(),
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _rate(self) -> float:
        """The next step's learning rate; it reaches zero with the last step, or sooner with the time."""
        config, step = self.config, self.state.step
        if step < config.warmup_steps:
            return config.lr * (step + 1) / config.warmup_steps
        done = (step - config.warmup_steps) / max(1, self.total_steps - config.warmup_steps)
        if self._seconds < math.inf:
            done = max(done, min(1.0, self.state.seconds / max(self._seconds, 1e-9)))
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        # Early on the average would remember the zeros it began with.
        decay = min(self.config.ema, (1 + step) / (10 + step)) if self.config.ema else 0.0
        for mean, value in zip(self.average.parameters(), self.heads.parameters(), strict=True):
            mean.lerp_(value, 1.0 - decay)

    def _look(self, loss: float) -> dict[str, Any]:
        """Measure the averaged weights on held-out answers; keep them if they are the best."""
        state, setup = self.state, self.setup
        ranks = rank_targets(
            lambda hidden: self.average(hidden) @ setup.lm_head.T,
            setup.held,
            setup.held_rows,
            setup.rows,
            num_heads=self.config.heads,
            vocabulary=len(setup.lm_head),
            dtype=setup.lm_head.dtype,
            limit=self.config.eval_tokens,
        )
        score = _score(ranks)
        if score > state.best:
            state.best, state.best_step, state.stale = score, state.step, 0
            self.best.load_state_dict(self.average.state_dict())
        else:
            state.stale += 1
        epoch = state.step / setup.source.steps_per_epoch
        return {
            "step": state.step,
            "epoch": round(epoch, 3),
            "seconds": round(state.seconds, 1),
            "tokens": state.tokens,
            "lr": self._rate(),
            "loss": loss,
            "held_out_loss": ranks.losses,
            **{f"top{count}": ranks.top(count) for count in (1, 3, 5, 10)},
            "replay": score,
        }

    def _save(self) -> None:
        self.state.loss_sum = float(self._loss)
        tensors = {name: getattr(self, name).state_dict() for name in ("heads", "average", "best")}
        save_checkpoint(self.config.output, self.state, {**tensors, "optimizer": self.optimizer.state_dict()})

    def _finish(self, run_log: RunLog) -> dict[str, Any]:
        """Write the best heads and the curves."""
        config, state, setup = self.config, self.state, self.setup
        if state.best_step == 0:
            run_log.write(self._look(float("nan")))
        file = config.output / HEADS_FILE
        save_heads(file, self.best, setup.vocabulary.token_map)
        lines = RunLog.read(config.output / "train.jsonl")
        draw_curves(lines, config.output / "curves.svg")
        best = next((line for line in lines if line["step"] == state.best_step), lines[-1])
        return {
            "heads": str(file),
            "parameters": num_parameters(self.best),
            "step": state.step,
            "best_step": state.best_step,
            "seconds": round(state.seconds, 1),
            "tokens_per_s": round(state.tokens / max(state.seconds, 1e-9)),
            "vocabulary": len(setup.vocabulary),
            "coverage": round(setup.vocabulary.coverage, 4),
            **{name: best[name] for name in ("top1", "top3", "top5", "top10")},
            "replay_64": best["replay"],
        }


def save_heads(file: Path, heads: PlainHeads, token_map: Tensor | None) -> None:
    """Write heads in the official format, in float16; a reduced vocabulary as `token_map` beside them."""
    tensors = {name: tensor.half() for name, tensor in heads.tensors().items()}
    if token_map is not None:
        tensors["token_map"] = token_map
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes it readable to its owner only


def _score(ranks: Ranks) -> float:
    """Tokens per step with the 64-node tree these ranks would give, replayed on them."""
    if len(ranks) == 0:
        return 0.0
    tree: Tree = calibrate(ranks).tree
    return replay(ranks, [tree])[0]


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that a run ends between two steps."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
