"""Every head format in the wild drafts what a plain reference computes; misfits are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import HeadsError, TreeError
from engine.medusa.head_files import read_heads
from engine.medusa.heads import HeadDrafter, MedusaHeads
from engine.medusa.tree import Tree, default_tree
from tests.engine.conftest import TinyModel
from tests.support import greedy, greedy_reference, load_heads, make_engine, run_all, save_model, tiny_llama

CPU = torch.device("cpu")
HIDDEN, VOCAB, HEADS, DRAFT_VOCAB = 16, 40, 3, 12


class Plain:
    """Three heads as plain matrices, and what they compute one head and one state at a time.

    Args:
        layers: residual layers per head.
        bias: whether these have a bias.
        lm_heads: 3 (own), 1 (one for all) or 0 (the base model's).
        truncated: draft from DRAFT_VOCAB tokens only, in no order.
    """

    def __init__(self, layers: int, *, bias: bool = True, lm_heads: int = 3, truncated: bool = False) -> None:
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.weights = [[normal(HIDDEN, HIDDEN) * 0.3 for _ in range(layers)] for _ in range(HEADS)]
        self.biases = [[normal(HIDDEN) * 0.3 for _ in range(layers)] for _ in range(HEADS)] if bias else None
        self.lm_heads = [normal(VOCAB, HIDDEN) for _ in range(lm_heads)]
        self.base = normal(VOCAB, HIDDEN)
        self.token_map = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB] if truncated else None

    def ranking(self, x: Tensor, head: int) -> list[int]:
        """Tokens, best first, of a hidden state [hidden]."""
        for layer, weight in enumerate(self.weights[head]):
            y = weight @ x + (self.biases[head][layer] if self.biases else 0.0)
            x = x + y / (1.0 + torch.exp(-y))
        lm_head = ([self.base] if not self.lm_heads else self.lm_heads)[head if len(self.lm_heads) > 1 else 0]
        scores = {token: float(lm_head[token] @ x) for token in range(VOCAB)}
        if self.token_map is not None:
            scores = {token: scores[token] for token in self.token_map.tolist()}
        return sorted(scores, key=lambda token: -scores[token])

    def official(self, prefix: str = "") -> dict[str, Tensor]:
        tensors = {}
        for i, layers in enumerate(self.weights):
            for j, weight in enumerate(layers):
                tensors[f"{prefix}{i}.{j}.linear.weight"] = weight
                tensors[f"{prefix}{i}.{j}.linear.bias"] = self.biases[i][j]
            if len(self.lm_heads) == HEADS:
                tensors[f"{prefix}{i}.{len(layers)}.weight"] = self.lm_heads[i]
        return self._rest(tensors)

    def vllm(self, prefix: str = "") -> dict[str, Tensor]:
        tensors = {}
        for i, layers in enumerate(self.weights):
            for j, weight in enumerate(layers):
                tensors[f"{prefix}blocks.{i}.layers.{j}.weight"] = weight
                if self.biases:
                    tensors[f"{prefix}blocks.{i}.layers.{j}.bias"] = self.biases[i][j]
            if len(self.lm_heads) == HEADS:
                tensors[f"{prefix}lm_heads.{i}.weight"] = self.lm_heads[i]
        return self._rest(tensors)

    def _rest(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if len(self.lm_heads) == 1:
            tensors["lm_head.weight"] = self.lm_heads[0]
        if self.token_map is not None:
            tensors["token_map"] = self.token_map
        return tensors


def load(source: Path) -> MedusaHeads:
    return load_heads(source, hidden_size=HIDDEN, vocab_size=VOCAB)


def assert_drafts(heads: MedusaHeads, plain: Plain) -> None:
    """The drafts of two states are the reference's, for a whole tree and parts of it."""
    assert heads.num_heads == HEADS
    width = DRAFT_VOCAB if plain.token_map is not None else VOCAB
    tree = Tree.from_paths([*default_tree(HEADS).prefix(30).paths, (width - 1,)])
    hidden = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(6))
    if not plain.lm_heads and plain.token_map is None:
        heads.prepare(torch.empty(0), quantize="none")  # nothing of the base's lm_head is copied
    else:
        heads.prepare(plain.base, quantize="none")
    drafter = HeadDrafter(heads, lambda x: x @ plain.base.T, tree, vocab_size=VOCAB, device=CPU)
    rankings = [[plain.ranking(state, head) for head in range(HEADS)] for state in hidden]
    for nodes in (30, 7, 0):
        expected = [[of[len(path) - 1][path[-1]] for path in tree.paths[:nodes]] for of in rankings]
        assert drafter.guess(torch.zeros(len(hidden), dtype=torch.int64), hidden, nodes).tolist() == expected
    with pytest.raises(TreeError, match=f"{width + 1} best of {width} tokens"):
        HeadDrafter(heads, lambda x: x, Tree.from_paths([[width]]), vocab_size=VOCAB, device=CPU)


def sharded(folder: Path, tensors: dict[str, Tensor], stem: str, suffix: str = ".safetensors") -> Path:
    """Two shards and their index; returns the folder."""
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"{stem}-0000{number}-of-00002{suffix}"
        values = {name: tensors[name].contiguous() for name in part}
        save_file(values, folder / shard) if suffix == ".safetensors" else torch.save(values, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def single(folder: Path, tensors: dict[str, Tensor], name: str = "medusa_lm_head.safetensors") -> Path:
    file = folder / name
    save_file(tensors, file) if file.suffix == ".safetensors" else torch.save(tensors, file)
    return file


FORMATS: dict[str, tuple[Plain, Callable[[Path, Plain], Path]]] = {
    "v1": (Plain(1), lambda f, p: single(f, p.official())),
    "v1 of two layers": (Plain(2), lambda f, p: single(f, p.official()).parent),
    "v1 as .pt": (Plain(1), lambda f, p: single(f, p.official(), "medusa_lm_head.pt").parent),
    "v1 as .bin": (Plain(1), lambda f, p: single(f, p.official(), "other.bin")),
    "v1 sharded": (Plain(1), lambda f, p: sharded(f, p.official(), "medusa_lm_head")),
    "v1 under a prefix": (Plain(1), lambda f, p: single(f, p.official("medusa_head."))),
    "v1 of no layers": (Plain(0), lambda f, p: single(f, p.official())),
    "v2 with the lm_head": (Plain(1, lm_heads=1), lambda f, p: single(f, p.official())),
    "v2 without": (Plain(1, lm_heads=0), lambda f, p: single(f, p.official())),
    "ours with a draft vocabulary": (
        Plain(1, lm_heads=0, truncated=True),
        lambda f, p: single(f, p.official() | {"token_map": p.token_map.int()}),
    ),
    "own lm_heads cut to a draft vocabulary": (
        Plain(1, truncated=True),
        lambda f, p: single(f, p.official()),
    ),
    "vLLM": (Plain(2), lambda f, p: single(f, p.vllm(), "model.safetensors").parent),
    "vLLM without biases": (Plain(1, bias=False), lambda f, p: single(f, p.vllm("medusa_heads."))),
    "vLLM of no layers": (Plain(0), lambda f, p: single(f, p.vllm())),
    "vLLM sharded .bin": (Plain(1), lambda f, p: sharded(f, p.vllm(), "pytorch_model", ".bin")),
    "vLLM with one lm_head": (Plain(1, lm_heads=1), lambda f, p: single(f, p.vllm())),
    "vLLM's original_lm_head": (Plain(1, lm_heads=1), lambda f, p: original_lm_head(f, p)),
    "vLLM truncated, all rows": (
        Plain(1, truncated=True),
        lambda f, p: truncated(f, p, p.vllm()),
    ),
    "vLLM truncated, its rows": (
        Plain(1, truncated=True),
        lambda f, p: truncated(
            f, p, p.vllm() | {f"lm_heads.{i}.weight": p.lm_heads[i][p.token_map] for i in range(HEADS)}
        ),
    ),
}


def original_lm_head(folder: Path, plain: Plain) -> Path:
    """One lm_head for all heads, stored as the first one's."""
    tensors = plain.vllm()
    tensors["lm_heads.0.weight"] = tensors.pop("lm_head.weight")
    (folder / "config.json").write_text(json.dumps({"model_type": "medusa", "original_lm_head": True}))
    return single(folder, tensors)


def truncated(folder: Path, plain: Plain, tensors: dict[str, Tensor], size: int = DRAFT_VOCAB) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "medusa", "truncated_vocab_size": size}))
    return single(folder, tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_in_this_format_drafts_what_the_reference_does(name: str, tmp_path: Path) -> None:
    plain, write = FORMATS[name]
    assert_drafts(load(write(tmp_path, plain)), plain)


def test_a_draft_vocabulary_needs_the_base_models_rows_first(tmp_path: Path) -> None:
    heads = load(single(tmp_path, Plain(1, lm_heads=0, truncated=True).official()))
    with pytest.raises(RuntimeError, match="prepare"):
        heads(torch.zeros(1, HIDDEN), lambda x: x, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token_map": torch.tensor([0, VOCAB])}, "token_map must hold token ids from 0 to 39"),
        ({"token_map": torch.tensor([-1, 2])}, "token_map must hold token ids"),
        ({"token_map": torch.tensor([3, 2, 3])}, "token_map lists a token twice"),
        ({"token_map": torch.zeros(3)}, r"token_map must be a list of token ids, got torch.float32 \[3\]"),
        ({"token_map": torch.zeros(1, 3).long()}, "token_map must be a list of token ids"),
        ({"token_map": torch.zeros(0).long()}, "token_map must hold token ids"),
        ({"lm_heads.1.weight": torch.zeros(11, HIDDEN)}, r"must|has shape \[11, 16\], the model needs"),
        ({"lm_heads.1.weight": None}, r"do not: lm_heads\.1\.weight"),
        ({"blocks.1.layers.0.bias": None}, r"blocks\.1\.layers\.0\.bias is missing"),
        ({"blocks.1.layers.0.weight": None}, "head 1 has layers"),
        ({"blocks.2.layers.1.weight": torch.zeros(HIDDEN, HIDDEN)}, "head 2 has layers"),
        ({"lm_heads.4.weight": torch.zeros(VOCAB, HIDDEN)}, "there is a head 4 and no head 3"),
        ({"0.5.weight": torch.zeros(VOCAB, HIDDEN)}, r"unexpected tensors 0\.5\.weight"),
        ({"embed.weight": torch.zeros(1)}, "unexpected tensors embed"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, changes: dict, reason: str) -> None:
    tensors = Plain(1).vllm() | changes
    with pytest.raises(HeadsError, match=reason):
        load(single(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None}))


def test_a_truncated_vocabulary_and_its_map_must_agree(tmp_path: Path) -> None:
    plain = Plain(1, truncated=True)
    with pytest.raises(HeadsError, match=r"lists 12 tokens, and config\.json says truncated_vocab_size 13"):
        load(truncated(tmp_path, plain, plain.vllm(), 13))
    without = Plain(1)
    with pytest.raises(HeadsError, match="truncated_vocab_size 12, and no tensor token_map"):
        load(truncated(tmp_path, without, without.vllm()))
    assert_drafts(load(truncated(tmp_path, without, without.vllm(), VOCAB)), without)


def test_damaged_sets_of_shards_are_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path, Plain(1).official(), "medusa_lm_head")
    index = folder / "medusa_lm_head.safetensors.index.json"
    shard = folder / "medusa_lm_head-00002-of-00002.safetensors"
    shard.rename(folder / "elsewhere")
    with pytest.raises(HeadsError, match=r"names medusa_lm_head-00002-of-.* which is not there"):
        load(folder)
    save_file({"x": torch.zeros(1)}, shard)
    with pytest.raises(HeadsError, match="does not hold"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(HeadsError, match="no weight_map"):
        load(folder)
    index.write_text("[]")
    with pytest.raises(HeadsError, match="must hold a JSON object"):
        load(folder)


def test_a_hub_id_that_nobody_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HeadsError, match="no heads at nobody/nothing, neither a local path nor on the hub"):
        read_heads("nobody/nothing", hidden_size=1, vocab_size=1)


@pytest.mark.parametrize("in_shards", [False, True])
@pytest.mark.parametrize("stem", ["medusa_lm_head", "model"])
def test_a_hub_id_is_read_from_the_hubs_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stem: str, in_shards: bool
) -> None:
    """Without a connection, from what an earlier download left there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    plain = Plain(1)
    if in_shards:
        sharded(snapshot, plain.official(), stem)
    else:
        single(snapshot, plain.official(), f"{stem}.safetensors")
    assert_drafts(load(Path("owner/name")), plain)


@pytest.mark.parametrize("files", ["one", "shards", "shards of .bin"])
def test_a_medusa_2_model_brings_its_heads(tiny: TinyModel, tmp_path: Path, files: str) -> None:
    """`medusa_head.…` inside the base is no error; its heads draft, and the text is the joint model's."""
    reference = tiny_llama(initializer_range=0.5)  # not the weights of `tiny`
    save_model(reference, tmp_path)
    hidden, vocab = reference.config.hidden_size, reference.config.vocab_size
    heads = {
        f"medusa_head.{i}.{name}": torch.randn(*shape, generator=torch.Generator().manual_seed(i))
        for i in range(2)
        for name, shape in (
            ("0.linear.weight", (hidden, hidden)),
            ("0.linear.bias", (hidden,)),
            ("1.weight", (vocab, hidden)),
        )
    }
    tensors = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()} | heads
    (tmp_path / "model.safetensors").unlink()
    if files == "one":
        single(tmp_path, tensors, "model.safetensors")
    elif files == "shards":
        sharded(tmp_path, tensors, "model")
    else:
        sharded(tmp_path, tensors, "pytorch_model", ".bin")
    prompt = [5, 9, 2, 44, 17]
    engine = make_engine(tmp_path, tree=16)
    assert engine.info.num_heads == 2
    assert run_all(engine, [greedy("a", prompt, 20)])["a", 0] == greedy_reference(reference, prompt, 20)
    assert engine.stats.draft_tokens > 0

    def num_heads(folder: Path, **settings: object) -> int:
        return make_engine(folder, **{"tree": 8, **settings}).info.num_heads

    assert num_heads(tmp_path, heads=str(tmp_path)) == 2  # the same model, named
    assert num_heads(tmp_path, heads="none") == 0
    assert num_heads(tmp_path, tree="off") == 0
    assert num_heads(tmp_path, heads=str(tiny.heads)) == 4  # others over the joint base
    assert num_heads(tiny.folder, heads=str(tmp_path)) == 2  # its heads over another base


def test_a_draft_vocabulary_gives_the_same_text_in_the_engine(tiny: TinyModel, tmp_path: Path) -> None:
    """The rows are taken from the base model's lm_head as loaded; the heads are sure to be right at times."""
    config = tiny.reference.config
    generator = torch.Generator().manual_seed(3)
    size = config.hidden_size
    tensors = {f"{i}.0.linear.weight": torch.randn(size, size, generator=generator) * 0.1 for i in range(2)}
    tensors |= {f"{i}.0.linear.bias": torch.zeros(size) for i in range(2)}
    prompt = [5, 9, 2, 44, 17]
    answer = greedy_reference(tiny.reference, prompt, 24)
    tensors["token_map"] = torch.tensor(sorted(set(answer)))
    heads = single(tmp_path, tensors)
    engine = make_engine(tiny.folder, heads=str(heads), tree=12, lookup="off")
    assert run_all(engine, [greedy("a", prompt, 24)])["a", 0] == answer
    assert engine.stats.accepted_tokens > 0


def test_a_draft_vocabulary_in_int8_keeps_the_best_guess(tmp_path: Path) -> None:
    if not torch.cpu._is_vnni_supported():
        pytest.skip("int8 needs AVX-512 VNNI")
    plain = Plain(1, lm_heads=0, truncated=True)
    heads = load(single(tmp_path, plain.official()))
    heads.prepare(plain.base, quantize="int8")
    drafter = HeadDrafter(heads, lambda x: x, Tree.from_paths([[0]]), vocab_size=VOCAB, device=CPU)
    hidden = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(8))
    guesses = drafter.guess(torch.zeros(50, dtype=torch.int64), hidden, 1).flatten().tolist()
    right = [guess == plain.ranking(x, 0)[0] for guess, x in zip(guesses, hidden, strict=True)]
    assert sum(right) >= 45
