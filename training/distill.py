"""Self-distillation: the model answers, at full batch and in any order, and every answer is a row.

`rows.jsonl` is the record: a row is written when its answer is complete, with its token ids, and never
again. A row's seed is a function of the seed and the row's key, so that it comes out the same whenever it
is asked. What a killed run had under way is asked again; what it had half written is cut off.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from engine.config import EngineConfig, lora_sources
from engine.errors import ConfigError
from engine.llm import LLM
from engine.model.adapter_files import Adapter, read_adapters
from engine.model.config import ModelConfig
from engine.model.weights import resolve_model
from engine.types import FinishReason, Request, SamplingParams, TokenDelta
from training.conversations import Asked, hash64, read_asked, self_prompted, user_turn_start
from training.data import SHARD_SUFFIX, Row, row_of, write_json, write_shard

__all__ = ["DistillOptions", "run"]

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class DistillOptions:
    """What to ask, and how to answer; see `medusa-serve distill --help`."""

    prompts: tuple[Path, ...] = ()
    self_prompt: int = 0
    self_prompt_temperature: float = 1.0
    turns: int | None = None
    temperatures: tuple[float, ...] = (0.0, 0.7)
    top_p: float = 1.0
    max_tokens: int = 256
    max_prompt_tokens: int = 256
    samples: int = 1
    seed: int = 0
    limit: int | None = None
    part: tuple[int, int] = (0, 1)
    shard_rows: int = 4096
    minutes: float | None = None

    @classmethod
    def parse(cls, *, temperature: str, part: str, **given: Any) -> DistillOptions:
        """From the command line's strings.

        Raises:
            ConfigError: a value that cannot be used, with its option.
        """
        try:
            temperatures = tuple(float(value) for value in temperature.split(","))
            if not all(0.0 <= value < 100.0 for value in temperatures):
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"--temperature must be numbers from 0 like 0,0.7, got {temperature!r}"
            ) from None
        try:
            index, count = (int(value) for value in part.split("/"))
            if not 1 <= index <= count:
                raise ValueError
        except ValueError:
            raise ConfigError(f"--part must be I/N with I from 1 to N, got {part!r}") from None
        options = cls(temperatures=temperatures, part=(index - 1, count), **given)
        if not options.prompts and not options.self_prompt:
            raise ConfigError("nothing to answer: give --prompts JSONL, --self-prompt N, or both")
        if options.samples > 1 and 0.0 in temperatures:
            raise ConfigError(
                "--samples above 1 would repeat the answers at --temperature 0; leave 0 out of it"
            )
        if not 0.0 < options.top_p <= 1.0:
            raise ConfigError(f"--top-p must be in (0, 1], got {options.top_p}")
        return options

    def identity(self) -> dict[str, Any]:
        """What decides a row's content; a run can only be continued with the same."""
        return {
            "temperatures": list(self.temperatures),
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "max_prompt_tokens": self.max_prompt_tokens,
            "seed": self.seed,
            "self_prompt_temperature": self.self_prompt_temperature,
        }


@dataclass(slots=True)
class _Talk:
    """A conversation under way.

    Args:
        asked: what the user says in it.
        sample: which of several runs through it, from 0.
        messages: what has been said, in OpenAI's form.
        turn: user turns answered so far.
        prompt: token ids of the request under way.
        asking: that request samples the user's turn, not the answer.
        tokens: what it has drawn.
    """

    asked: Asked
    sample: int
    messages: list[dict[str, Any]]
    turn: int = 0
    prompt: tuple[int, ...] = ()
    asking: bool = False
    tokens: list[int] = field(default_factory=list)


def run(config: EngineConfig, options: DistillOptions, output: Path) -> dict[str, Any]:
    """Answer everything that is not answered yet, or until the time is over; returns the manifest.

    Raises:
        ConfigError: settings that cannot work, or an output folder of another run.
        ModelError: the model cannot be used.
        RuntimeError: the model failed on a request.
    """
    asked = read_asked(options.prompts)[: options.limit]
    asked += [self_prompted(number, options.seed) for number in range(options.self_prompt)]
    asked = asked[options.part[0] :: options.part[1]]
    until = math.inf if options.minutes is None else time.monotonic() + 60.0 * options.minutes
    book = _Book(output, config, options)
    try:
        _Distiller(LLM(config, progress=True), options, asked, book).run(until)
    finally:
        book.close()
    return book.manifest


class _Book:
    """The output folder: rows so far, shards of them, manifest."""

    def __init__(self, folder: Path, config: EngineConfig, options: DistillOptions) -> None:
        self._folder, self._shard_rows = folder, options.shard_rows
        model = resolve_model(config.model, config.revision)
        self._vocab_size = ModelConfig.from_folder(model).vocab_size
        self.done: dict[tuple[int, int], dict[int, dict[str, Any]]] = {}
        self._open_rows: list[Row] = []  # of the shard that is not full yet
        self._full_shards = 0
        folder.mkdir(parents=True, exist_ok=True)
        identity = {
            "model": config.model,
            "revision": config.revision,
            "weights_sha256": hash_weights(model, read_adapters(lora_sources(config.lora))),
            "dtype": config.dtype,
            "quantization": config.quantization,
            **options.identity(),
        }
        self.manifest: dict[str, Any] = {"format": "medusa-serve distill 1", **identity}
        self._refuse_other(identity)
        self.manifest["counts"] = {"rows": 0, "prompt_tokens": 0, "answer_tokens": 0, "skipped": 0}
        self.manifest["rows_by"] = {"temperature": {}, "finish_reason": {}}
        self.manifest["prompts"] = [path.name for path in options.prompts]
        self.manifest["lora"] = config.lora
        self.manifest["seconds"] = float(self._before.get("seconds", 0.0))
        self._started, self._seconds = time.monotonic(), self.manifest["seconds"]
        # Compressing a shard takes seconds, in which no step would be made.
        self._writer = ThreadPoolExecutor(1, "shards")
        self._shards: list[Future[None]] = []
        self._file = self._read()

    def add(self, talk: _Talk, answer: str, temperature: float, seed: int, reason: FinishReason) -> None:
        """Write down a complete answer."""
        item = {
            "conversation": f"{talk.asked.key:016x}",
            "turn": talk.turn,
            "sample": talk.sample,
            "temperature": temperature,
            "seed": seed,
            "finish_reason": reason.value,
            "messages": talk.messages,
            "answer": answer,
            "prompt_ids": list(talk.prompt),
            "answer_ids": talk.tokens,
        }
        self._file.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self._count(item)

    def skip(self) -> None:
        """Count a prompt that is too long."""
        self.manifest["counts"]["skipped"] += 1

    def close(self) -> None:
        """Write the last shard and the manifest.

        Raises:
            OSError: a shard could not be written.
        """
        self._file.close()
        self._write_shard()
        self._writer.shutdown()
        for shard in self._shards:
            shard.result()

    def _refuse_other(self, identity: dict[str, Any]) -> None:
        path = self._folder / "manifest.json"
        self._before: dict[str, Any] = {}
        if not path.exists():
            write_json(path, self.manifest)
            return
        self._before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in identity.items():
            if self._before.get(name) != value:
                raise ConfigError(
                    f"{self._folder} was distilled with {name} {self._before.get(name)!r}, not {value!r}; "
                    "continue with the same settings, or name another --output"
                )

    def _read(self) -> IO[bytes]:
        """Take in the rows of earlier runs, and open the file behind the last whole one."""
        path = self._folder / "rows.jsonl"
        path.touch()
        file = path.open("r+b")
        end = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            self._count(json.loads(line))
            end += len(line)
        file.seek(end)
        file.truncate()
        return file

    def _count(self, item: dict[str, Any]) -> None:
        row = row_of(item)
        said = {"messages": item["messages"], "answer": item["answer"]}
        self.done.setdefault((row.conversation, row.sample), {})[row.turn] = said
        counts = self.manifest["counts"]
        counts["rows"] += 1
        counts["prompt_tokens"] += len(row.prompt)
        counts["answer_tokens"] += len(row.answer)
        for name, by in self.manifest["rows_by"].items():
            by[str(item[name])] = by.get(str(item[name]), 0) + 1
        self._open_rows.append(row)
        if len(self._open_rows) == self._shard_rows:
            self._write_shard()
            self._full_shards += 1
            self._open_rows = []

    def _write_shard(self) -> None:
        path = self._folder / f"{self._full_shards:05}{SHARD_SUFFIX}"
        full = len(self._open_rows) == self._shard_rows
        if self._open_rows and not (full and path.exists()):
            about = {
                name: self.manifest[name] for name in ("model", "weights_sha256", "quantization", "seed")
            }
            write = partial(write_shard, path, self._open_rows, vocab_size=self._vocab_size, **about)
            self._shards.append(self._writer.submit(write))
        self.manifest["seconds"] = round(self._seconds + time.monotonic() - self._started, 1)
        write_json(self._folder / "manifest.json", self.manifest)


class _Distiller:
    """Keeps the engine's slots full of conversations, and writes down what they give."""

    def __init__(self, llm: LLM, options: DistillOptions, asked: list[Asked], book: _Book) -> None:
        self._llm, self._options, self._book = llm, options, book
        self._fresh = self._start(asked)
        self._going: deque[_Talk] = deque()  # to be asked for their next turn
        self._active: dict[str, _Talk] = {}
        self._questions: set[str] = set()
        rows = sum(self._turns(item) for item in asked) * options.samples
        done = book.manifest["counts"]["rows"]
        self._bar = tqdm(total=rows, initial=done, unit="row", smoothing=0.05, mininterval=2.0)
        self._refill = _refill(llm)
        self._filling = True

    def run(self, until: float = math.inf) -> None:
        """Answer what there is, or until `time.monotonic()` says so; what is under way then is dropped."""
        started, before = time.monotonic(), self._book.manifest["counts"]["answer_tokens"]
        with self._bar as bar:
            for deltas in self._llm.stream(self._take):
                for delta in deltas:
                    self._receive(delta)
                if time.monotonic() >= until:
                    break
                self._filling = self._llm.info.max_num_seqs - len(self._active) >= self._refill
                made = self._book.manifest["counts"]["answer_tokens"] - before
                rate = made / (time.monotonic() - started)
                bar.set_postfix_str(f"{rate:.0f} answer tokens/s, {before + made} in all", refresh=False)

    def _start(self, asked: list[Asked]) -> Iterator[_Talk]:
        """Conversations in which something is left to answer, each where it stands."""
        for sample in range(self._options.samples):
            for item in asked:
                talk = _Talk(item, sample, [])
                if item.system is not None:
                    talk.messages = [{"role": "system", "content": item.system}]
                if done := self._book.done.get((item.key, sample)):
                    talk.turn = max(done) + 1
                    last = done[max(done)]
                    talk.messages = [*last["messages"], {"role": "assistant", "content": last["answer"]}]
                if talk.turn < self._turns(item):
                    yield talk

    def _turns(self, asked: Asked) -> int:
        most = self._options.turns
        if not asked.users:
            return most or 1
        return len(asked.users) if most is None else min(most, len(asked.users))

    def _take(self) -> Request | None:
        """The next request, None where no conversation can go on right now, or few slots are free."""
        while self._filling:
            talk = self._going.popleft() if self._going else next(self._fresh, None)
            if talk is None:
                return None
            if (request := self._request(talk)) is not None:
                self._active[request.request_id] = talk
                return request
            self._skip(talk)
        return None

    def _request(self, talk: _Talk) -> Request | None:
        """What to ask the engine for next in `talk`; None where that is too long."""
        options, users, text = self._options, talk.asked.users, self._llm.text
        said = bool(talk.messages) and talk.messages[-1]["role"] == "user"
        talk.asking = not users and not said
        if talk.asking:
            talk.prompt = tuple(user_turn_start(text, talk.messages))
        else:
            if not said:
                talk.messages = [*talk.messages, {"role": "user", "content": users[talk.turn]}]
            talk.prompt = tuple(text.encode_chat(talk.messages))
        if len(talk.prompt) > options.max_prompt_tokens:
            return None
        talk.tokens = []
        temperature = options.self_prompt_temperature if talk.asking else self._temperature(talk)
        sampling = SamplingParams(
            temperature=temperature,
            top_p=1.0 if talk.asking or not temperature else options.top_p,
            max_tokens=options.max_tokens,
            seed=self._seed(talk),
        )
        return Request(
            f"{talk.asked.key:016x}-{talk.sample}-{talk.turn}-{talk.asking}", talk.prompt, sampling
        )

    def _receive(self, delta: TokenDelta) -> None:
        talk = self._active[delta.request_id]
        talk.tokens += delta.token_ids
        if delta.finish_reason is None:
            return
        del self._active[delta.request_id]
        if delta.finish_reason is FinishReason.ERROR:
            raise RuntimeError(f"conversation {talk.asked.key:016x} failed: {delta.error}")
        said = self._llm.text.decode(talk.tokens)
        if talk.asking:
            question = said.strip()
            if delta.finish_reason is not FinishReason.STOP or not question or question in self._questions:
                self._skip(talk)
                return
            self._questions.add(question)
            talk.messages = [*talk.messages, {"role": "user", "content": question}]
            self._going.append(talk)
            return
        self._book.add(talk, said, self._temperature(talk), self._seed(talk), delta.finish_reason)
        self._bar.update()
        talk.messages = [*talk.messages, {"role": "assistant", "content": said}]
        talk.turn += 1
        if talk.turn < self._turns(talk.asked):
            self._going.append(talk)

    def _skip(self, talk: _Talk) -> None:
        """Give up a conversation: too long, or a sampled question that is none, or known."""
        self._book.skip()
        self._bar.total = (self._bar.total or 0) - (self._turns(talk.asked) - talk.turn)

    def _temperature(self, talk: _Talk) -> float:
        choices = self._options.temperatures
        return choices[hash64("temperature", self._options.seed, talk.asked.key, talk.sample) % len(choices)]

    def _seed(self, talk: _Talk) -> int:
        kind = "user" if talk.asking else "answer"
        return hash64(kind, self._options.seed, talk.asked.key, talk.sample, talk.turn) & _MAX_SEED


def _refill(llm: LLM) -> int:
    """Slots that are free together before new conversations take them.

    On a GPU a pass over one prompt takes as long as one over sixteen, and longer than a step of hundreds of
    sequences; with as many slots busy, some sequence ends at nearly every step.
    """
    return 1 if llm.info.device == "cpu" else max(1, llm.info.max_num_seqs // 16)


def hash_weights(folder: Path, adapters: Sequence[Adapter] = ()) -> str:
    """SHA-256 over a model's safetensors files, by name, and what is merged into them."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for adapter in adapters:
        digest.update(f"{adapter.digest}@{adapter.scale}".encode())
    return digest.hexdigest()
