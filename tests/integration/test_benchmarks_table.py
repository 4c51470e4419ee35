"""The commands of docs/notes/goals.md, which measure a GPU: parsed as written, and run on a CPU with a small model.

The table is read from the file, so that a row with a removed option or recipe fails.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess

import pytest

from everest_ds import cli
from everest_ds.benchmark.options import StepJob
from tests.conftest import REPOSITORY
from tests.integration.scanning import run_in_turn

TEXT = (REPOSITORY / "docs" / "notes" / "goals.md").read_text()
SECTION = TEXT.split("\n## Step on a GPU\n")[1].split("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in SECTION.splitlines() if line[:1] == "|"][
    2:
]
CELLS = [row[-1] for row in ROWS]
COMMANDS = [command for cell in CELLS for command in re.findall(r"`([^`]+)`", cell)]
STEPS = [command for command in COMMANDS if command.startswith("everest benchmark step ")]

SHORT = {"--micro-batch": "1", "--steps": "1", "--warmup": "0"}
SMALL = {**SHORT, "--model.size": "nano", "--model.decoder-depth": "1", "--data.image-size": "64"}
REFERENCES = ("EVEREST_REFERENCE_DIR", "VIDEOMAE_REFERENCE_DIR")


def words_of(command: str) -> list[str]:
    return shlex.split(command)[1:]


def values_of(words: list[str], name: str) -> list[str]:
    """The values of an option, up to the next option; empty if it is absent."""
    if name not in words:
        return []
    after = words[words.index(name) + 1 :]
    return after[: next((at for at, word in enumerate(after) if word.startswith("--")), len(after))]


def without(words: list[str], name: str) -> list[str]:
    if name not in words:
        return words
    at = words.index(name)
    return words[:at] + words[at + 1 + len(values_of(words, name)) :]


def small(command: str) -> list[str]:
    """The words of a command changed for a CPU: one small size, and no limit on GPU memory."""
    words = words_of(command)
    if words[0] == "plan":
        return words
    options = SHORT if "--compare" in words else SMALL  # the official models take nothing smaller
    for name in (*options, "--memory-gib"):
        words = without(words, name)
    return [*words, *(word for pair in options.items() for word in pair)]


def distinct(commands: list[str]) -> list[str]:
    """The commands whose small versions differ in more than the recipe; the first of those that do not."""
    return list(
        {tuple(small(command)[:2] + small(command)[3:]): command for command in reversed(commands)}.values()
    )


RUN = distinct(COMMANDS)


@pytest.mark.parametrize("cell", CELLS)
def test_last_cell_holds_whole_commands_and_nothing_else(cell: str) -> None:
    assert re.fullmatch(r"`everest (benchmark step|plan) [^`]+`", cell)


def test_every_row_says_what_is_wanted_and_whether_it_was_measured() -> None:
    assert len(ROWS) >= 18
    assert all(len(row) == 4 and all(row) for row in ROWS)


@pytest.mark.parametrize("command", STEPS)
def test_command_is_understood_as_it_stands(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags, recipe and fields are known, and the options fit together."""
    seen: list[StepJob] = []
    monkeypatch.setattr("everest_ds.benchmark.steps.step.run", lambda job, world: seen.append(job) or 0)
    words = words_of(command)
    assert cli.main(words) == 0
    (job,) = seen
    config, options = job.config, job.options
    assert config.recipe == words[2]
    assert list(options.micro_batch) == values_of(words, "--micro-batch") != []
    assert list(options.compare) == values_of(words, "--compare")
    assert [f"{ratio:g}" for ratio in options.sweep_ratio] == [
        f"{float(word):g}" for word in values_of(words, "--sweep-ratio")
    ]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """The small versions of the commands, and two that must fail, run in one process."""
    commands = {command: small(command) for command in RUN}
    commands |= {
        "flag": [*small(STEPS[0]), "--no-such-flag", "1"],
        "recipe": ["benchmark", "step", "k400_vit_x", *small(STEPS[0])[3:]],
    }
    folder = tmp_path_factory.mktemp("table")
    return dict(zip(commands, run_in_turn(list(commands.values()), folder), strict=True))


@pytest.mark.parametrize("command", RUN)
def test_command_runs_on_a_cpu_made_small(command: str, done: dict[str, subprocess.CompletedProcess[str]]) -> None:
    one = done[command]
    if "--compare" in shlex.split(command) and not all(name in os.environ for name in REFERENCES):
        assert one.returncode == 2
        assert "EVEREST_REFERENCE_DIR" in one.stderr
        return
    assert one.returncode == 0, one.stderr
    expected = {
        "plan": "recommended: ",
        "--compare": "ours/theirs",
        "--compare-gradients": "zero2         flat ",
        "--sweep-stages": "fastest: zero",
        "--json": "{",
    }
    text = next((text for word, text in expected.items() if word in shlex.split(command)), "GiB")
    if "--sweep-ratio" in command or "--sweep-frames" in command:
        text = "linear within "
    assert text in one.stdout


def test_sweeps_have_a_point_for_each_value(done: dict[str, subprocess.CompletedProcess[str]]) -> None:
    """Selected tokens of one clip of 16 x 64 x 64, a third of them visible; or of T x 64 x 64 at 0.3 and 0.1."""
    (by_ratio,) = (table(one) for command, one in done.items() if "--sweep-ratio" in command)
    assert by_ratio == [(r, 128 * 10 * r // 100, 128 * 10 * r // 300) for r in (1, 2, 3, 4, 6, 8, 10)]
    (by_frames,) = (table(one) for command, one in done.items() if "--sweep-frames" in command)
    assert by_frames == [(t, 8 * t * 3 // 10, 8 * t // 10) for t in (8, 16, 24, 32, 48, 64)]


def table(done: subprocess.CompletedProcess[str]) -> list[tuple[int, int, int]]:
    """Value (ratios in tenths), selected and visible tokens of each row of a sweep."""
    rows = [line.split()[:3] for line in done.stdout.splitlines() if re.match(r" +[\d.]+ +\d+ +\d+ ", line)]
    scale = 10 if " ratio " in done.stdout else 1
    return [(round(scale * float(value)), int(selected), int(visible)) for value, selected, visible in rows]


@pytest.mark.parametrize(("fault", "said"), [("flag", "no-such-flag"), ("recipe", "unknown recipe 'k400_vit_x'")])
def test_unknown_flag_or_recipe_would_be_seen(
    fault: str, said: str, done: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    assert done[fault].returncode == 2
    assert said in done[fault].stderr
