"""The README's commands and code do what it says."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from everest_ds import cli
from everest_ds.config import Config
from everest_ds.recipes import RECIPES
from everest_ds.train.job import LaunchOptions
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for language, text in BLOCKS
    if language == "bash"
    for line in text.splitlines()
    if line.strip() and line.split()[0] not in ("git", "source")  # see test_quickstart.py
]


def everest_words(command: str) -> list[str] | None:
    """The words that reach our command line, through a launcher or not."""
    words = shlex.split(command)
    if words[0] == "everest":
        return words[1:]
    return words[words.index("everest_ds") + 1 :] if "everest_ds" in words else None


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Config, LaunchOptions]] = []
    monkeypatch.setattr(
        "everest_ds.commands.train.check", lambda given, world: calls.append((given.config, given.options)) or 0
    )
    conversions: list[tuple[object, ...]] = []
    monkeypatch.setattr("everest_ds.inference.conversion.run", lambda *given: conversions.append(given) or 0)
    measurements: list[tuple[object, ...]] = []
    monkeypatch.setattr("everest_ds.benchmark.step.run", lambda *given: measurements.append(given) or 0)
    imports: list[tuple[object, ...]] = []
    monkeypatch.setattr("everest_ds.commands.index.index", lambda *given: imports.append(given))
    benchmarks: list[tuple[object, ...]] = []
    monkeypatch.setattr("everest_ds.commands.benchmark.check_data", lambda *given: benchmarks.append(given) or 0)
    others: list[tuple[object, ...]] = []
    for name in ("evaluate.check", "predict.check", "prepare.start_preparation"):
        monkeypatch.setattr(f"everest_ds.commands.{name}", lambda *given: others.append(given) or 0)
    monkeypatch.chdir(REPOSITORY)
    words = everest_words(command)
    if words is None:
        script = REPOSITORY / shlex.split(command)[1]
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
        return
    assert cli.main(words) == 0
    assert bool(others) == (words[0] in ("evaluate", "predict", "prepare"))
    if words[0] in ("pretrain", "finetune"):
        ((_, options),) = calls
        assert options.ds_config is None or options.ds_config.is_file()
    assert bool(conversions) == (words[0] == "convert")
    assert bool(imports) == (words[0] == "index")
    assert bool(benchmarks) == (words[:2] == ["benchmark", "data"])
    assert bool(measurements) == (words[:2] == ["benchmark", "step"])


def test_there_are_commands_to_test() -> None:
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_command_in_a_recipes_document_is_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Config] = []
    monkeypatch.setattr("everest_ds.commands.train.check", lambda given, world: calls.append(given.config) or 0)
    document = (RECIPES[name].__doc__ or "").replace("\\\n", " ")
    (line,) = (line for line in document.splitlines() if "deepspeed" in line)
    words = everest_words(line)
    assert words is not None
    assert cli.main(words) == 0
    assert calls[0].recipe == name
    assert Path(words[words.index("--ds-config") + 1]).name in {
        p.name for p in (REPOSITORY / "ds_configs").iterdir()
    }


def test_python_example_runs() -> None:
    (code,) = (text for language, text in BLOCKS if language == "python")
    namespace: dict[str, object] = {}
    exec(code, namespace)  # the README's own code
    output = namespace["output"]
    assert output.prediction_RP.shape == (2 * (470 - 156), 1536)  # type: ignore[attr-defined]


# Rows of the first table whose figures are those of BENCHMARKS.md; the others are of tests, or rounded.
QUOTED = [
    row
    for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines())
    if len(row) == 4 and row[3] in ("[BENCHMARKS.md](BENCHMARKS.md)", "`everest benchmark flops`")
]


@pytest.mark.parametrize("row", QUOTED, ids=lambda row: row[0])
def test_figures_that_are_quoted_from_the_benchmarks_stand_there(row: list[str]) -> None:
    benchmarks = (REPOSITORY / "BENCHMARKS.md").read_text()
    figures = re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", row[1])
    assert figures or row[1] == "not yet measured"
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d|\.\d|e-)", benchmarks), figure


def test_there_are_figures_to_compare() -> None:
    assert len(QUOTED) >= 6


def test_files_and_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / target).exists(), target
    tree = README[README.index("everest_ds/  ") :].split("```")[0]
    listed, parents = set(), [""] * 4
    for indent, name in re.findall(r"^( *)(\w+)/ +\S", tree, flags=re.MULTILINE):
        depth = len(indent) // 2
        parents[depth] = name
        listed.add("/".join(parents[: depth + 1]))
    packages = {str(path.parent.relative_to(REPOSITORY)) for path in REPOSITORY.glob("everest_ds/**/__init__.py")}
    copied = "everest_ds/model/weights/hub_code"  # not part of the program: it is copied into exported folders
    assert listed == packages - {copied} | {"ds_configs", "launch", "tests"}
