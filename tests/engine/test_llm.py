"""The offline engine: what transformers would say, what ended how, and nothing left behind."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.config import EngineConfig
from engine.errors import ConfigError, ContextLengthError, ModelError, RequestError
from engine.llm import LLM
from engine.output import Output
from engine.tool_prompt import arguments_told
from engine.types import FinishReason, MedusaParams, Request, SamplingParams, TokenDelta
from engine.vllm_names import CALLS, SETTINGS
from tests.support import greedy, greedy_reference, save_model, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    config = EngineConfig(
        model=str(folder), device="cpu", max_num_seqs=2, block_size=4, max_model_len=64, tree="off"
    )
    return LLM(config)


def test_outputs_are_the_models_in_the_order_asked(llm: LLM) -> None:
    model = tiny_llama()
    prompts = [[5, 6, 7], [9, 1], [30, 31, 32, 33]]  # one more than there are slots
    outputs = llm.generate([greedy(f"r{i}", prompt, 6 + i) for i, prompt in enumerate(prompts)])
    assert [output.request_id for output in outputs] == ["r0", "r1", "r2"]
    for i, (output, prompt) in enumerate(zip(outputs, prompts, strict=True)):
        assert output.token_ids == greedy_reference(model, prompt, 6 + i)
        assert output.finish_reason is FinishReason.LENGTH
        assert output.error is None
        # The first token is the prefill's, each other one a step of plain decoding.
        assert output.num_steps == output.num_decoded == 5 + i
    llm.check()


def test_times_are_of_each_output(llm: LLM) -> None:
    first, second, waited = llm.generate([greedy(name, [4, 5], 8) for name in "abc"])
    for output in (first, second, waited):
        assert output.ttft_s is not None
        assert output.tpot_s is not None
        assert 0 < output.ttft_s < output.seconds
        assert output.tpot_s == pytest.approx((output.seconds - output.ttft_s) / 7)
    assert waited.ttft_s is not None
    assert waited.ttft_s >= min(first.seconds, second.seconds)  # it got the slot of one that had ended


def test_one_output_a_choice(llm: LLM) -> None:
    request = Request("n", (3, 4, 5), SamplingParams(n=2, seed=1, max_tokens=5))
    outputs = llm.generate([request])
    assert [(output.index, len(output.token_ids)) for output in outputs] == [(0, 5), (1, 5)]


def test_a_single_token_has_no_time_per_token(llm: LLM) -> None:
    (output,) = llm.generate([greedy("one", [1, 2], 1)])
    assert len(output.token_ids) == 1
    assert output.tpot_s is None


def test_closed_early_it_leaves_nothing_behind(llm: LLM) -> None:
    steps = llm.steps([greedy(name, [8, 9], 40) for name in "abc"])
    assert next(steps)
    with pytest.raises(RuntimeError, match="one call at a time"):
        llm.generate([greedy("other", [1], 2)])
    steps.close()  # type: ignore[attr-defined]
    llm.check()
    assert llm.stats.running == llm.stats.waiting == 0
    assert len(llm.generate([greedy("a", [8, 9], 4)])[0].token_ids) == 4


def test_a_request_that_cannot_run_is_refused_before_any_runs(llm: LLM) -> None:
    before = llm.stats.num_steps
    with pytest.raises(ContextLengthError):
        llm.generate([greedy("a", [1, 2], 4), greedy("b", [1] * 60, 20)])
    with pytest.raises(RequestError, match="must differ"):
        llm.generate([greedy("a", [1, 2], 4), greedy("a", [3, 4], 4)])
    assert llm.stats.num_steps == before
    llm.check()


def words(tokens: list[int]) -> str:
    """What the test tokenizer makes of tokens that follow others."""
    return "".join(f" t{token}" for token in tokens)


GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


def test_text_and_tokens_are_prompts_alike(llm: LLM) -> None:
    model = tiny_llama()
    expected = [greedy_reference(model, prompt, 6) for prompt in ([5, 6, 7], [9, 1])]
    for prompts in (["t5 t6 t7", "t9 t1"], [[5, 6, 7], (9, 1)], ["t5 t6 t7", [9, 1]]):
        outputs = llm.generate(prompts, GREEDY)
        assert [output.token_ids for output in outputs] == expected
        assert [output.text for output in outputs] == [words(tokens) for tokens in expected]
        assert [output.prompt_token_ids for output in outputs] == [(5, 6, 7), (9, 1)]
        assert {output.finish_reason for output in outputs} == {FinishReason.LENGTH}
        assert {output.acceptance_length for output in outputs} == {1.0}
    for single in ("t5 t6 t7", [5, 6, 7]):
        assert [output.token_ids for output in llm.generate(single, GREEDY)] == expected[:1]
    assert llm.generate([]) == []


def test_sampling_is_for_all_or_one_each(llm: LLM) -> None:
    several = SamplingParams(n=2, seed=3, max_tokens=3, logprobs=1)
    one, first, second = llm.generate(["t5", "t9"], [GREEDY, several])
    assert [len(output.token_ids) for output in (one, first, second)] == [6, 3, 3]
    assert [output.index for output in (one, first, second)] == [0, 0, 1]
    assert [entry.token_id for entry in second.logprobs] == second.token_ids
    assert one.logprobs == []
    with pytest.raises(RequestError, match="2 prompts and 1 sampling params"):
        llm.generate(["t5", "t9"], [GREEDY])
    with pytest.raises(RequestError, match="requests carry their own"):
        llm.generate([greedy("a", [5], 2)], GREEDY)  # type: ignore[call-overload]


def test_a_stop_string_ends_its_output_only(llm: LLM) -> None:
    """The tokens go as far as the one that completed it, the text ends before it, and the slot is free."""
    full, other = llm.generate(["t5 t6 t7", "t9 t1"], GREEDY)
    stop = f"t{full.token_ids[2]}"
    where = full.token_ids.index(full.token_ids[2])
    cut, same = llm.generate(["t5 t6 t7", "t9 t1"], GREEDY, stop=[stop + " ", "absent"])
    assert cut.text == words(full.token_ids[:where]) + " "
    assert cut.finish_reason is FinishReason.STOP
    assert cut.token_ids == full.token_ids[: where + 2]  # the space comes with the next word
    assert (same.text, same.token_ids) == (other.text, other.token_ids)
    llm.check()
    with pytest.raises(RequestError, match="must not be empty"):
        llm.generate("t5", stop="")


def test_sampling_params_carry_stop_strings_too(llm: LLM) -> None:
    """As in vLLM, for each prompt its own; `stop` beside them is for all."""
    one, two = llm.generate(["t5 t6 t7", "t9 t1"], GREEDY)
    stops = [f"t{output.token_ids[3]} " for output in (one, two)]

    def ends(output: Output, stop: str) -> bool:
        whole = {one.prompt_token_ids: one, two.prompt_token_ids: two}[output.prompt_token_ids]
        cut = output.finish_reason is FinishReason.STOP and whole.text.startswith(output.text + stop)
        assert cut or output.text == whole.text
        return cut

    each = [replace(GREEDY, stop=stops[0]), replace(GREEDY, stop=[stops[1]])]
    assert [params.stop for params in each] == [(stops[0],), (stops[1],)]
    assert hash(each[0]) != hash(each[1])
    prompts = ["t5 t6 t7", "t9 t1"]
    assert list(map(ends, llm.generate(prompts, each), stops)) == [True, True]
    assert list(map(ends, llm.generate(prompts, [each[0], GREEDY]), stops)) == [True, False]
    assert list(map(ends, llm.generate(prompts, [each[0], GREEDY], stop=stops[1]), stops)) == [True, True]
    requests = [Request("a", (5, 6, 7), each[0]), Request("b", (9, 1), GREEDY)]
    assert list(map(ends, llm.generate(requests), stops)) == [True, False]
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]  # what vLLM's has
    with pytest.raises(RequestError, match="stop must be strings that are not empty"):
        SamplingParams(stop=["a", ""])
    # Where only tokens come out nobody would look for them.
    with pytest.raises(RequestError, match="stop strings go with"):
        next(llm.steps(requests))
    llm.check()


def test_an_output_is_shown_on_a_short_line(llm: LLM) -> None:
    (short,) = llm.generate("t5", replace(GREEDY, max_tokens=2))
    assert re.fullmatch(
        r"Output\('offline-\d+', index=0, tokens=2, finish_reason='length', text=' t\d+ t\d+'\)", repr(short)
    )
    (long,) = llm.generate("t5", replace(GREEDY, max_tokens=60))
    assert len(repr(long)) < 150
    assert repr(long).endswith(f"text={long.text[:60] + '…'!r})")
    assert repr(Output("r", 1, 0.0)) == "Output('r', index=1, tokens=0)"
    failed = TokenDelta("r", 0, [], FinishReason.ERROR, error="no memory")
    shown = "Output('r', index=0, tokens=0, finish_reason='error', error='no memory')"
    assert repr(Output("r", 0, 0.0, deltas=[failed])) == shown


def test_medusa_params_reach_the_requests(folder: Path) -> None:
    small = LLM(str(folder), device="cpu", block_size=4, max_model_len=64, tree=8, lookup=7)
    prompt = [5, 6, 7, 8] * 4
    (drafted,) = small.generate(prompt, SamplingParams(temperature=0.0, max_tokens=20))
    before = small.stats.draft_tokens
    assert before > 0
    plain_only = MedusaParams(max_tree_size=1)
    (plain,) = small.generate(prompt, SamplingParams(temperature=0.0, max_tokens=20), medusa=plain_only)
    assert small.stats.draft_tokens == before
    assert plain.token_ids == drafted.token_ids
    assert plain.acceptance_length == 1.0
    assert all(delta.trace is None for delta in plain.deltas)


def test_its_gpu_becomes_that_of_whichever_thread_calls(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the calling thread's device, which is the first one unless it is told."""
    chosen: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((threading.current_thread().name, device))
    )
    monkeypatch.setattr(llm, "_device", torch.device("cuda:1"))
    caller = threading.Thread(target=llm.generate, args=([greedy("a", [1, 2], 3)],), name="caller")
    caller.start()
    caller.join()
    assert set(chosen) == {("caller", torch.device("cuda:1"))}


def test_a_stop_token_is_no_text(llm: LLM) -> None:
    full = llm.generate("t5 t6 t7", GREEDY)[0].token_ids
    sampling = SamplingParams(temperature=0.0, max_tokens=6, stop_token_ids=(full[3],))
    (output,) = llm.generate("t5 t6 t7", sampling)
    end = full.index(full[3])
    assert output.token_ids == full[: end + 1]
    assert output.text == words(full[:end])
    assert output.finish_reason is FinishReason.STOP


def test_an_output_says_what_stopped_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    full = llm.generate("t5 t6 t7", GREEDY)[0].token_ids
    by_string, by_token, by_length, by_none = llm.generate(
        ["t5 t6 t7"] * 4,
        [
            replace(GREEDY, stop=f"t{full[2]} "),
            replace(GREEDY, stop_token_ids=[full[2]], stop="absent"),
            replace(GREEDY, stop="absent"),
            GREEDY,
        ],
    )
    assert by_string.stop_reason == f"t{full[2]} "
    assert by_token.stop_reason == full[2]
    assert by_length.stop_reason is by_none.stop_reason is None
    monkeypatch.setattr(llm._engine, "_eos", frozenset({full[2]}))
    (by_end,) = llm.generate("t5 t6 t7", GREEDY)
    assert (by_end.finish_reason, by_end.stop_reason) == (FinishReason.STOP, None)


def test_what_stopped_it_may_be_in_its_text(llm: LLM) -> None:
    full = llm.generate("t5 t6 t7", GREEDY)[0].token_ids
    end = full.index(full[2])
    asked = replace(GREEDY, include_stop_str_in_output=True)
    for sampling, text in (
        (replace(asked, stop=f"t{full[2]} "), words(full[: end + 1]) + " "),
        (replace(asked, stop_token_ids=(full[2],)), words(full[: end + 1])),
        (replace(asked, stop_token_ids=(full[2],), stop="absent"), words(full[: end + 1])),
        (replace(GREEDY, stop_token_ids=(full[2],), stop="absent"), words(full[:end])),
    ):
        (output,) = llm.generate("t5 t6 t7", sampling)
        assert output.text == text


def test_special_tokens_may_be_text(folder: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    full = llm.generate("t5 t6 t7", GREEDY)[0].token_ids
    special = frozenset(full[1:2])
    monkeypatch.setattr(llm.text, "_special_ids", special)
    kept = [token for token in full if token not in special]
    for stop in ((), "absent"):
        shown, hidden = llm.generate(
            ["t5 t6 t7"] * 2,
            [replace(GREEDY, stop=stop, skip_special_tokens=asked) for asked in (False, True)],
        )
        assert (shown.text, hidden.text) == (words(full), words(kept))


def test_bad_words_may_be_strings(llm: LLM) -> None:
    full = llm.generate("t5 t6 t7", GREEDY)[0].token_ids
    as_text, as_tokens = (
        llm.generate("t5 t6 t7", replace(GREEDY, bad_words=bad))[0].token_ids
        for bad in ([f"t{full[1]}", f"t{full[3]} t9"], [(full[1],), [full[3], 9]])
    )
    assert full[1] not in as_text
    assert as_text == as_tokens
    both = SamplingParams(bad_words=["t1", (2, 3)])
    assert (both.bad_words, both.bad_strings) == (((2, 3),), ("t1",))
    request = Request("a", (5, 6, 7), replace(GREEDY, bad_words=[f"t{full[1]}"]))
    assert (
        llm.generate([request])[0].token_ids
        == llm.generate("t5 t6 t7", replace(GREEDY, bad_words=[(full[1],)]))[0].token_ids
    )
    with pytest.raises(RequestError, match="strings that are not empty"):
        SamplingParams(bad_words=[""])


def test_prompts_may_be_cut(llm: LLM) -> None:
    for keep, prompt in ((2, (6, 7)), (3, (5, 6, 7)), (9, (5, 6, 7)), (-1, (5, 6, 7))):
        (output,) = llm.generate("t5 t6 t7", replace(GREEDY, truncate_prompt_tokens=keep))
        assert output.prompt_token_ids == prompt
        assert output.token_ids == greedy_reference(tiny_llama(), list(prompt), 6)
    (long,) = llm.generate([[5] * 100], replace(GREEDY, truncate_prompt_tokens=-1))
    assert long.prompt_token_ids == (5,) * (64 - 6)
    with pytest.raises(RequestError, match="truncate_prompt_tokens must be at least 1, or -1"):
        replace(GREEDY, truncate_prompt_tokens=0)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"bad_words": ["t1"]}, "bad_words"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
    ],
)
def test_where_only_tokens_come_out_nothing_is_about_text(llm: LLM, fields: Any, name: str) -> None:
    with pytest.raises(RequestError, match=r"go with LLM.generate and LLM.chat only") as caught:
        next(llm.steps([Request("a", (5,), replace(GREEDY, **fields))]))
    assert caught.value.param == name


def test_vllms_arguments_are_told_what_takes_their_place(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"^sampling_params is not supported: it is called sampling$"):
        llm.generate("t5", sampling_params=GREEDY)  # type: ignore[call-overload]
    with pytest.raises(RequestError, match=r"^use_tqdm is not supported: it is called progress$"):
        llm.chat([], use_tqdm=False)  # type: ignore[call-arg]
    assert llm.generate([], lora_request=None) == []  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match=r"^tensor_parallel_size is not supported: an LLM has one device$"):
        LLM("x", tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"^the engine has no such setting: port$"):
        LLM("x", tensor_parallel_size=1, trust_remote_code=False, port=3)
    assert not SETTINGS.keys() & EngineConfig.model_fields.keys()
    for function in (LLM.generate, LLM.chat):
        assert not CALLS.keys() & inspect.signature(function).parameters.keys()


def test_chat_writes_the_models_template(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}t9{% endif %}"
    )
    with pytest.raises(RequestError, match="no chat template"):
        llm.chat([{"role": "user", "content": "t5"}], GREEDY)
    monkeypatch.setattr(llm.text.tokenizer, "chat_template", template)
    talk = [{"role": "system", "content": "t5"}, {"role": "user", "content": "t6"}]
    (output,) = llm.chat(talk, GREEDY)
    assert output.token_ids == greedy_reference(tiny_llama(), [5, 6, 9], 6)
    both = llm.chat([talk, talk[1:]], GREEDY)
    assert [each.prompt_token_ids for each in both] == [(5, 6, 9), (6, 9)]
    for wrong, place in (
        ([*talk, {"role": "usr", "content": "t7"}], "messages[2].role"),
        ([talk, [{"content": "t7"}]], "messages[1][0].role"),
    ):
        with pytest.raises(RequestError, match=f"^{re.escape(place)} must be one of 'system', ") as caught:
            llm.chat(wrong, GREEDY)  # type: ignore[arg-type]
        assert caught.value.param == place
    for wrong, place in ((["t5"], "messages[0][0]"), ([*talk, "t5"], "messages[2]")):
        with pytest.raises(RequestError, match=f"^{re.escape(place)} must be a dict with role and content"):
            llm.chat(wrong, GREEDY)  # type: ignore[arg-type]


def test_chat_tells_the_model_of_tools(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ messages[0].content }} {% for t in tools %}{{ t.function.name }}{% endfor %}"
    monkeypatch.setattr(llm.text.tokenizer, "chat_template", template)
    told = [{"type": "function", "function": {"name": "t8"}}]
    (output,) = llm.chat([{"role": "user", "content": "t5"}], GREEDY, tools=told)
    assert output.prompt_token_ids == (5, 8)


WRITES_CALLS = (
    "{% if tools %}{% endif %}{% for m in messages %}"
    "{% for c in m.tool_calls or () %}{{ c.function.name }} "
    "{{ c.function.arguments.x or c.function.arguments }} {% endfor %}{{ m.content }} {% endfor %}"
)


def test_chat_takes_calls_as_openais_messages_have_them(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments as text, which is JSON or what a model wrote instead, and no content beside them."""
    monkeypatch.setattr(llm.text.tokenizer, "chat_template", WRITES_CALLS)
    for arguments, token in ({"x": "t5"}, 5), ('{"x": "t5"}', 5), ("t6", 6), ("", None):
        function = {"name": "t4", "arguments": arguments}
        call = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
        for content in ({}, {"content": None}, {"content": "t8"}):
            (output,) = llm.chat([{**call, **content}, {"role": "user", "content": "t9"}], GREEDY)
            expected = [4, token, 8 if content.get("content") else None, 9]
            assert [i for i in output.prompt_token_ids if i > 1] == [i for i in expected if i is not None]
        assert function["arguments"] == arguments
    assert arguments_told('"x"') == '"x"'  # JSON, and of no object
    for wrong in ("f", {"name": "f"}, {"function": {"arguments": "{}"}}):
        with pytest.raises(RequestError, match="a dict with a function, which has name") as caught:
            llm.chat([{"role": "assistant", "content": "", "tool_calls": [wrong]}], GREEDY)
        assert caught.value.param == "messages[0].tool_calls[0]"


def test_a_chat_template_may_come_from_a_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content }} t9 {% endfor %}")

    def load(path: Path) -> LLM:
        return LLM(
            str(folder), device="cpu", block_size=4, max_model_len=64, tree="off", chat_template=str(path)
        )

    (output,) = load(file).chat([{"role": "user", "content": "t5"}], GREEDY)
    assert output.prompt_token_ids == (5, 9)
    inline = LLM(
        str(folder), device="cpu", block_size=4, max_model_len=64, tree="off", chat_template="t8 {{ 't7' }}"
    )
    (output,) = inline.chat([{"role": "user", "content": "t5"}], GREEDY)
    assert output.prompt_token_ids == (8, 7)
    with pytest.raises(ConfigError, match=r"cannot read the chat template .*absent: No such file"):
        load(tmp_path / "absent")
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(file)
    file.write_text("{% for %}")
    with pytest.raises(ModelError, match="not valid Jinja"):
        load(file)


def test_a_name_and_settings_make_an_llm(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7}')
    small = engine.LLM(str(folder), device="cpu", block_size=4, max_model_len=64, tree="off")
    assert small.info.max_model_len == 64
    assert small.default_sampling == SamplingParams(temperature=0.5, top_k=7)
    assert len(small.generate("t5")[0].token_ids) == 63  # to the context's end
    for unknown, told in (
        ({"max_len": 3}, "max_len (max_model_len?)"),
        ({"port": 3}, "port"),
        ({"port": 3, "max_num_seq": 3, "block_size": 4}, "max_num_seq (max_num_seqs?), port"),
    ):
        with pytest.raises(ConfigError, match=f"^the engine has no such setting: {re.escape(told)}$"):
            LLM("x", **unknown)
    with pytest.raises(ConfigError, match=r"^tree: must be 'auto', 'off' or a number"):
        LLM("x", tree=99)
    with pytest.raises(
        ConfigError, match=r"^device: must be a valid string; block_size: must be a valid int"
    ):
        LLM("x", block_size="four", device=0)
    with pytest.raises(ConfigError, match="block_size: put these into the EngineConfig"):
        LLM(EngineConfig(model="x"), block_size=4)


def test_the_package_gives_the_names_without_importing_torch() -> None:
    code = (
        "import sys, engine, engine.types; engine.SamplingParams, engine.EngineConfig;"
        "assert 'torch' not in sys.modules; assert set(engine._HOME) == set(engine.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert engine.LLM is LLM
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        engine.nothing  # noqa: B018


def test_the_readmes_example_says_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.S)
    assert example is not None
    code, shown = example[1].split("# prints: ")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == shown.strip()


def test_tokens_beyond_the_vocabulary_are_refused(llm: LLM) -> None:
    size = llm.info.vocab_size
    assert llm._grammars._vocab_size == size
    assert llm.generate("t5", SamplingParams(max_tokens=1, stop_token_ids=(size - 1,)))
    for fields in ({"stop_token_ids": (size,)}, {"logit_bias": ((size, 1.0),)}, {"bad_words": ((size,),)}):
        with pytest.raises(RequestError, match=r"token ids must be in \[0, ") as caught:
            llm.generate("t5", SamplingParams(max_tokens=1, **fields))  # type: ignore[arg-type]
        assert caught.value.param == next(iter(fields))
