"""The cache holds transformers' own hidden states, each beside the token that it chose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from engine.errors import ConfigError
from tests.engine.model.test_text_part import gemma, mistral, save
from tests.support import save_model, tiny_llama
from tests.training.support import random_rows
from training.backbone import Backbone, make_backbone, model_class, packs, read_lm_head
from training.batches import OnlineBatches, ResidentBatches
from training.data import Row
from training.hidden import HiddenCache, cache_hidden, missing_rows
from training.resident import ResidentCache, keep_hidden

VOCAB = 61


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    reference = tiny_llama()
    return reference, save_model(reference, tmp_path_factory.mktemp("hidden"))


def backbone(folder: Path, pack: int = 64) -> Backbone:
    return make_backbone(str(folder), device="cpu", dtype="float32", bits=16, pack_tokens=pack, longest=30)


def cached(folder: Path, base: Path, rows: list[Row], **values: object) -> HiddenCache:
    settings = {"model": "m", "hidden_size": 32, "top_k": 8} | values
    return cache_hidden(
        folder,
        rows,
        make_backbone=lambda: (backbone(base), read_lm_head(str(base))),
        pack_tokens=64,
        progress=False,
        **settings,  # type: ignore[arg-type]
    )


@torch.inference_mode()
def test_states_tokens_and_best_tokens_are_the_models_own(
    model: tuple[LlamaForCausalLM, Path], tmp_path: Path
) -> None:
    reference, folder = model
    rows = random_rows(7, VOCAB)
    cache = cached(tmp_path, folder, rows)
    start = 0
    for index, row in enumerate(rows):
        tokens = torch.tensor([[*row.prompt, *row.answer]])
        output = reference(tokens, output_hidden_states=True)
        chose = slice(len(row.prompt) - 1, tokens.shape[1] - 1)
        here = slice(start, start + len(row.answer))
        np.testing.assert_allclose(
            cache.hidden[here], output.hidden_states[-1][0, chose], rtol=2e-3, atol=2e-3
        )
        np.testing.assert_array_equal(cache.tokens[here], row.answer)
        best = output.logits[0, chose].log_softmax(-1).topk(8)
        np.testing.assert_array_equal(cache.top_ids[here], best.indices)
        np.testing.assert_allclose(cache.top_log_p[here], best.values, atol=0.01, rtol=2e-3)
        assert (cache.ends[here] == here.stop).all()
        assert (cache.row_of[here] == index).all()
        start = here.stop
    assert len(cache) == start


def test_more_rows_are_added_to_what_is_there(model: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    rows = random_rows(9, VOCAB)
    first = np.array(cached(tmp_path / "a", model[1], rows[3:6]).hidden)
    assert missing_rows(tmp_path / "a", rows, model="m", hidden_size=32, top_k=8) == [*rows[:3], *rows[6:]]
    both = cached(tmp_path / "a", model[1], rows)
    np.testing.assert_array_equal(both.hidden[: len(first)], first)
    assert both.select(rows[:2]).tolist() == [False] * 3 + [True] * 2 + [False] * 4


def test_a_killed_pass_goes_on_and_ends_the_same(
    model: tuple[LlamaForCausalLM, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(8, VOCAB)
    whole = cached(tmp_path / "whole", model[1], rows)
    real = backbone(model[1])
    calls = 0

    class Dying:
        device, dtype = real.device, real.dtype

        def hidden(self, sequences: list[list[int]]) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return real.hidden(sequences)

    def dying() -> tuple[Backbone, torch.Tensor]:
        return Dying(), read_lm_head(str(model[1]))

    settings = {"model": "m", "hidden_size": 32, "top_k": 8, "pack_tokens": 64, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        cache_hidden(tmp_path / "cut", rows, make_backbone=dying, **settings)  # type: ignore[arg-type]
    with (tmp_path / "cut" / "hidden.f16").open("ab") as file:
        file.write(b"half a pack that was never counted")
    again = cached(tmp_path / "cut", model[1], rows)
    assert 0 < calls <= 3
    for name in ("hidden", "tokens", "ends", "row_of", "top_ids", "top_log_p", "keys"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))


def test_the_cache_of_another_model_is_refused(model: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    rows = random_rows(2, VOCAB)
    cached(tmp_path, model[1], rows)
    with pytest.raises(ConfigError, match="holds hidden states of m"):
        cached(tmp_path, model[1], rows, model="another")
    (tmp_path / "cache.json").write_text(json.dumps({"rows": 3}))
    with pytest.raises(ConfigError, match="cannot be read"):
        cached(tmp_path, model[1], rows)


def test_batches_from_the_cache_and_from_the_backbone_say_the_same(
    model: tuple[LlamaForCausalLM, Path], tmp_path: Path
) -> None:
    rows = random_rows(6, VOCAB)
    cache = cached(tmp_path, model[1], rows)
    online = OnlineBatches(
        backbone(model[1]),
        rows,
        lm_head=read_lm_head(str(model[1])),
        num_heads=3,
        batch_tokens=64,
        micro_tokens=32,
        seed=5,
    )
    found = list(online.step(0, 0))
    assert len(found) == 2
    for batch in found:
        # Each batch is one whole answer here; find it by its first state.
        distance = np.abs(np.asarray(cache.hidden, dtype=np.float32) - batch.hidden[0].numpy()).sum(1)
        start = int(distance.argmin())
        expected = cache.gather(np.arange(start, start + batch.num_tokens), 3, teacher=True)
        np.testing.assert_allclose(batch.hidden, expected.hidden, rtol=2e-3, atol=2e-3)
        assert torch.equal(batch.targets, expected.targets)
        assert batch.teacher_ids is not None
        assert expected.teacher_ids is not None
        known = batch.targets >= 0
        assert torch.equal(batch.teacher_ids[..., :8][known], expected.teacher_ids[known])


def kept(base: Path, rows: list[Row], **values: float) -> ResidentCache:
    weight = read_lm_head(str(base))
    return keep_hidden(rows, top_k=8, backbone=backbone(base), lm_head=weight, pack_tokens=64, **values)


def test_batches_from_the_devices_memory_are_those_from_the_disk(
    model: tuple[LlamaForCausalLM, Path], tmp_path: Path
) -> None:
    rows = random_rows(9, VOCAB)
    cache, resident = cached(tmp_path, model[1], rows), kept(model[1], rows)
    assert len(resident) == len(cache)
    positions = np.arange(len(cache))
    for teacher in (True, False):
        one, other = (each.gather(positions, 3, teacher) for each in (cache, resident))
        assert torch.equal(one.hidden, other.hidden)
        assert torch.equal(one.targets, other.targets)
        known = one.targets >= 0
        if not teacher:
            assert (other.teacher_ids, other.teacher_log_p) == (None, None)
            continue
        assert one.teacher_ids is not None
        assert other.teacher_ids is not None
        assert other.teacher_log_p is not None
        assert one.teacher_log_p is not None
        assert torch.equal(one.teacher_ids[known], other.teacher_ids[known])
        assert torch.equal(one.teacher_log_p[known], other.teacher_log_p[known])
    np.testing.assert_array_equal(cache.select(rows[2:4]), resident.select(rows[2:4]))


def test_an_epoch_in_the_devices_memory_has_every_position_once(model: tuple[LlamaForCausalLM, Path]) -> None:
    rows = random_rows(9, VOCAB)
    cache = kept(model[1], rows)
    cache = replace(cache, hidden=torch.arange(len(cache)).unsqueeze(1))  # each says where it is
    chosen = cache.select(rows[1:])
    settings = {"num_heads": 2, "batch_tokens": 8, "micro_tokens": 4, "seed": 1, "teacher": False}
    batches = ResidentBatches(cache, chosen, **settings)
    place = np.arange(len(cache))
    learned = place[chosen[cache.row_of] & (cache.ends - place > 1)]
    assert batches.steps_per_epoch == len(learned) // 8
    orders = []
    for epoch in (0, 1, 0):
        parts = [b for i in range(batches.steps_per_epoch) for b in batches.step(epoch, i)]
        assert all(part.num_tokens == 4 for part in parts)
        orders.append(torch.cat([part.hidden for part in parts]).flatten().tolist())
    assert orders[0] == orders[2] != orders[1]
    assert len(set(orders[0])) == len(orders[0]) == 8 * batches.steps_per_epoch
    assert set(orders[0]) <= set(learned.tolist())
    with pytest.raises(ConfigError, match="a batch takes 4096"):
        ResidentBatches(cache, chosen, **(settings | {"batch_tokens": 4096}))


def test_a_pass_that_is_out_of_time_leaves_the_other_rows_out(
    model: tuple[LlamaForCausalLM, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(9, VOCAB)
    now = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    cache = cached(tmp_path, model[1], rows, until=2.0)
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    assert cache.select(rows).sum() == len(cache.keys) == 4  # two packs of two
    assert len(cached(tmp_path, model[1], rows).keys) == 9
    resident = kept(model[1], rows, until=0.0)
    assert (len(resident), len(resident.hidden), len(resident.keys)) == (0, 0, 0)


def test_a_pack_that_does_not_fit_the_pool_is_split(model: tuple[LlamaForCausalLM, Path]) -> None:
    small = backbone(model[1], pack=16)
    sequences = [row.prompt.tolist() for row in random_rows(20, VOCAB, prompt=17)]
    together = small.hidden(sequences)
    torch.testing.assert_close(together, torch.cat([small.hidden([one]) for one in sequences]))


@pytest.mark.parametrize("kind", ["llama", "gemma", "mistral"])
@torch.inference_mode()
def test_what_is_quantised_for_training_is_read_as_the_engine_reads_it(tmp_path: Path, kind: str) -> None:
    """Also the text part of models that see images; the quantising itself needs a GPU."""
    models = {"llama": tiny_llama, "gemma": gemma, "mistral": lambda: mistral("ministral3")}
    folder = save_model(models[kind](), tmp_path) if kind == "llama" else save(models[kind](), tmp_path)
    whole = model_class(folder).from_pretrained(folder).eval()
    tokens = list(range(1, 30))
    states = whole.base_model(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(backbone(folder).hidden([tokens]), states, rtol=1e-4, atol=1e-4)


def test_packs_hold_what_fits_and_a_longer_sequence_alone() -> None:
    assert list(packs([3, 4, 9, 2, 2], 7)) == [range(2), range(2, 3), range(3, 5)]
    assert list(packs([], 7)) == []
