"""`everest report` as a command, and its page in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from everest_ds import cli
from tests.integration.browsing import Browser, find_browser
from tests.integration.launch import PICTURES, SMALL, compute, flags
from tests.integration.test_structure import modules_after


@pytest.fixture(scope="module")
def runs(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two short pre-trainings of different lengths in folders of the same name; the longer one has pictures."""
    folder = tmp_path_factory.mktemp("two runs")
    made = [folder / "short" / "run", folder / "long" / "run"]
    for out, steps, every in zip(made, (2, 6), ("0", "4"), strict=True):
        done = compute(flags(demo_folder, out, *SMALL, PICTURES, every, "--run.seed", str(steps), steps=steps))
        assert done.returncode == 0, done.stderr
    scores = [[3, 1], [0, 4]]
    evaluation = made[1] / "evaluation-test"
    evaluation.mkdir()
    part = {"protocol": {"name": "head"}, "checkpoint": {"name": "x"}, "list": {"path": "t.csv"}, "views": {}}
    summary = part | {"top1": 0.875, "confusion": scores, "classes": ["a", "<script>alert(1)</script>"]}
    (evaluation / "summary.json").write_text(json.dumps(summary))
    return made


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert cli.main(["report", *map(str, runs), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("there is no Chromium here")
    profile = tmp_path_factory.mktemp("profile")
    with Browser(program, profile) as opened:
        yield opened
    shutil.rmtree(profile, ignore_errors=True)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False), (400, True)])
def test_page_opens_without_a_request_and_without_a_complaint(
    width: int, dark: bool, page: Path, browser: Browser
) -> None:
    browser.open(page, width=width, dark=dark)
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert browser.complaints == []
    sticks_out = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.evaluate(sticks_out) == 0
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is not dark
    images = "[...document.images].map(image => image.complete && image.naturalWidth > 0)"
    assert browser.evaluate(images) == [True] * 3  # two clips, and tokens by time step
    assert browser.evaluate("document.querySelectorAll('.by-step .line').length") >= 10  # five curves a run


def test_browser_sees_what_a_page_requests_and_says(tmp_path: Path, browser: Browser) -> None:
    """A page with a request and an error, to show that the test above can fail."""
    (tmp_path / "bad.html").write_text("<img src=http://127.0.0.1:9/x.png><script>console.error('no')</script>")
    browser.open(tmp_path / "bad.html")
    assert "http://127.0.0.1:9/x.png" in browser.requests
    assert any('"no"' in complaint for complaint in browser.complaints)


def test_page_switches_without_scripts(page: Path, browser: Browser) -> None:
    browser.open(page)
    is_shown = "getComputedStyle(document.querySelector('{}')).display != 'none'"
    rows = "[...document.querySelectorAll('#settings tr.same')].filter(row => row.offsetHeight > 0).length"
    assert [browser.evaluate(is_shown.format(name)) for name in (".by-step", ".by-share")] == [True, False]
    assert browser.evaluate(rows) == 0
    browser.evaluate("document.querySelector('#axis-share').click()")
    browser.evaluate("document.querySelector('#only-settings').click()")
    assert [browser.evaluate(is_shown.format(name)) for name in (".by-step", ".by-share")] == [False, True]
    assert browser.evaluate(rows) > 40
    different = "[...document.querySelectorAll('#settings tr.differs th')].map(cell => cell.innerText)"
    assert browser.evaluate(different) == [f"run.{name}≠" for name in ("seed", "max_steps", "pictures_every_steps")]


def test_command_names_runs_apart_and_says_how_they_ended(page: Path) -> None:
    text = page.read_text()
    assert "short/run" in text
    assert "long/run" in text
    assert text.count("finished: after step") == 2
    assert "alert(1)" in text
    assert "<script" not in text


@pytest.mark.parametrize("content", ["mine", ""])
def test_command_replaces_its_own_page_and_nothing_else(
    content: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, other = tmp_path / "new folder" / "own.html", tmp_path / "other.html"
    for _ in range(2):
        assert cli.main(["report", str(runs[0]), "--out", str(own)]) == 0
    other.write_text(content)
    capsys.readouterr()
    assert cli.main(["report", str(runs[0]), "--out", str(other)]) == 2
    assert other.read_text() == content
    assert "was not written by `everest report`; name another file" in capsys.readouterr().err
    assert cli.main(["report", str(runs[0]), "--out", str(tmp_path)]) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new folder", "other.html", "own.html"]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("nothing", "nothing does not exist; expected a run directory"),
        ("file", "file is not a folder; expected a run directory"),
        ("foreign", "foreign is neither a run (no config.json of a run) nor an evaluation (no summary.json)"),
        ("hf", "hf is neither a run"),
        ("record", "record is not a run: "),
        (".", "is not a run but contains runs; name them: "),
        ("run/checkpoints", "checkpoints is inside the run"),
        ("run/checkpoints/step-00000002", "step-00000002 is inside the run"),
    ],
)
def test_command_refuses_what_is_no_run_in_one_sentence(
    named: str, said: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for name in ("foreign", "hf", "record"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "everest", "task": "x"}')
    (tmp_path / "record" / "metrics.jsonl").write_text('{"loss": 1}\n')
    shutil.copytree(runs[0], tmp_path / "run")
    assert cli.main(["report", str(tmp_path / named), "--out", str(tmp_path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_command_needs_a_run_and_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report"]) == 2
    assert "report needs a run" in capsys.readouterr().err
    assert not modules_after("import everest_ds.commands.report") & {"torch", "matplotlib", "deepspeed", "av"}
