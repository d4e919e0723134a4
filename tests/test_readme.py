"""The README's maps of the code agree with the code, and its test commands with CI."""

import json
import re
from pathlib import Path

from server.responses import ChatCompletion

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block_after(heading: str) -> list[str]:
    """Lines of the first code block after a heading."""
    return README.split(f"## {heading}", 1)[1].split("```")[1].strip().splitlines()


def mapped_files() -> set[str]:
    """Every file the annotated tree names, with its folder; a folder's files stand beside or below it."""
    files: set[str] = set()
    top = ""
    for line in block_after("What is where"):
        name, _, rest = line.strip().partition(" ")
        if not line.startswith(" "):
            top = name
            files.add(name)
        elif name.endswith("/"):
            files |= {f"{top}{name}{file}" for file in re.findall(r"\b\w+\.py\b", rest)}
        else:
            files.add(f"{top}{name}")
    return files


def test_the_annotated_tree_names_every_module_and_nothing_else() -> None:
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("engine", "server", "training")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    mapped = mapped_files()
    assert {name for name in mapped if name.endswith(".py")} == modules
    for name in mapped:
        assert (ROOT / name).exists(), name


def test_the_data_path_is_ten_lines_of_existing_files() -> None:
    lines = block_after("How it works")
    assert len(lines) == 10
    for line in lines:
        assert (ROOT / line.split()[0]).is_file(), line


def test_ci_runs_the_commands_that_the_readme_names_for_it() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = [line for line in script.splitlines() if line.startswith("make ")]
    tests = README.split("**Tests:**")[1].split("These three are CI.")[0]
    assert sorted(re.findall(r"`(make [a-z-]+)`", tests)) == sorted(commands)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {command.removeprefix("make ") for command in commands} <= set(targets)


def test_the_sample_answer_has_what_answers_have() -> None:
    sample = README[README.index('{"id":"chatcmpl-') :].partition("```")[0].replace("\n", " ")
    answer = json.loads(sample)
    assert ChatCompletion.model_validate(answer).model_dump(exclude_unset=True) == answer
    fields = ChatCompletion.model_fields.items()
    assert list(answer) == [name for name, field in fields if field.is_required()]
