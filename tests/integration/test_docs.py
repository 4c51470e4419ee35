"""README and docs: commands run, links resolve, tables are generated from their sources, no line is too wide.

A block marked `bash` is run, page by page, in a folder with demo videos (`my_videos`, `data`) and two short runs
(`runs/demo`, `runs/demo_ft`). `bash gpu` and `bash slow` blocks need other machines or minutes: their commands are
parsed up to the point where work would begin. A `bash diff` block belongs to the patch above it.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from everest_ds import cli
from everest_ds.config import Config
from everest_ds.recipes import RECIPES
from everest_ds.recipes.__main__ import page as recipes_page
from tests.conftest import REPOSITORY
from tests.integration.launch import compute, free_port
from tests.unit.data.importers.layouts import touch, write

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "ds_configs" / "README.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
WIDEST = 98  # characters of code that GitHub shows without a scrollbar


@dataclass(frozen=True)
class Block:
    page: Path
    kind: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, one each, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def blocks_of(page: Path) -> Iterator[Block]:
    for kind, text in re.findall(r"^ *```([^\n]*)\n(.*?)^ *```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        lines = text.splitlines(keepends=True)
        indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        yield Block(page, kind, "".join(line[indent:] if line.strip() else line for line in lines))


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
FIRST = next(block for block in BLOCKS if block.kind == "bash")  # of the README; see test_quickstart.py
RUN = [block for block in BLOCKS if block.kind == "bash" and block != FIRST]
PARSED = [block for block in BLOCKS if block.kind in ("bash gpu", "bash slow")]


def everest_words(command: str) -> list[str] | None:
    """The words that reach the `everest` command line, through a launcher or not."""
    words = shlex.split(command)
    if words[0] == "everest":
        return words[1:]
    return words[words.index("everest_ds") + 1 :] if "everest_ds" in words else None


def name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def test_all_blocks_say_what_they_are() -> None:
    kinds = {block.kind for block in BLOCKS}
    assert kinds <= {"", "bash", "bash gpu", "bash slow", "bash diff", "python", "diff", "bibtex"}
    assert len(RUN) >= 12
    assert len(PARSED) >= 4


@pytest.mark.parametrize(
    "command",
    dict.fromkeys(command for block in PARSED for command in block.commands if not command.startswith("demo=")),
)
def test_command_for_a_larger_machine_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in replaces the work itself; all refusals before it still apply."""
    calls: list[tuple[object, ...]] = []
    for work in (
        "benchmark.steps.step.run",
        "commands.benchmark.check_data",
        "commands.data.prepare.start_preparation",
        "commands.train.check",
        "commands.weights.evaluate.check",
        "inference.conversion.run",
    ):
        monkeypatch.setattr(f"everest_ds.{work}", lambda *given, **named: calls.append((given, named)) or 0)
    monkeypatch.setattr(
        "everest_ds.commands.data.demo_data.write_demo_data", lambda *given: calls.append(given) or []
    )
    monkeypatch.chdir(REPOSITORY)
    words = everest_words(command.replace("$demo", "--train 16 --val 0 --test 0"))
    if words is not None:
        assert cli.main(words) == 0
        assert bool(calls) == (words[0] != "plan")
    elif (program := shlex.split(command))[0] in ("bash", "sbatch"):
        script = next(REPOSITORY / word for word in program[1:] if (REPOSITORY / word).is_file())
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    else:
        assert program[0] in ("tensorboard", "pip")  # see test_wheel.py


@pytest.fixture(scope="module")
def workspace(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages assume: videos, lists, two runs, and datasets as downloaded."""
    root = tmp_path_factory.mktemp("docs")
    for folder in ("ds_configs", "launch"):
        (root / folder).symlink_to(REPOSITORY / folder)
    small = "--batch.global-size 4 --batch.micro-size 4"
    for command in (
        "demo-data data --train 12 --val 4 --test 4",
        f"pretrain demo --data.train-list data/train.csv {small} --run.max-steps 2 --out runs/demo",
        f"finetune demo_ft --data.train-list data/train.csv --data.val-list data/val.csv {small} "
        "--init-from runs/demo --run.max-steps 2 --out runs/demo_ft",
    ):
        done = compute(shlex.split(command), folder=root, environment={"DS_ACCELERATOR": "cpu"})
        assert done.returncode == 0, done.stdout + done.stderr
    for number in range(12):
        into = root / "my_videos" / ("left" if number % 2 else "right") / f"{number}.mp4"
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / f"data/train/{number:05}.mp4", into)
    ucf, hmdb, k400, ssv2, ego4d = (
        root / "downloads" / name for name in ("ucf101", "hmdb51", "k400", "ssv2", "ego4d")
    )
    touch(ucf, "UCF-101/Biking/v_Biking_g01_c01.avi", "UCF-101/Biking/v_Biking_g02_c01.avi")
    write(ucf / "classInd.txt", "1 Biking\n")
    write(ucf / "trainlist01.txt", "Biking/v_Biking_g01_c01.avi 1\n")
    write(ucf / "testlist01.txt", "Biking/v_Biking_g02_c01.avi\n")
    touch(hmdb, "climb/a.avi", "climb/b.avi")
    write(hmdb / "climb_test_split1.txt", "a.avi 1\nb.avi 2\n")
    touch(k400, "abc_000001_000011.mp4")
    write(k400 / "train.csv", "label,youtube_id,time_start,time_end,split\njumping,abc,1,11,train\n")
    touch(ssv2, "1.webm", "2.webm")
    write(ssv2 / "labels.json", {"Moving something": "0"})
    for split, number in (("train", "1"), ("validation", "2")):
        write(ssv2 / f"{split}.json", [{"id": number, "label": "moving a", "template": "Moving [something]"}])
    write(ssv2 / "test.json", [])
    touch(ego4d, "full_scale/uid.mp4")
    clips = [
        {"video_uid": "uid", "unique_id": "u", "parent_start_sec": 0.0, "parent_end_sec": 8.0, "state_change": True}
    ]
    for split in ("train", "val"):
        write(ego4d / f"fho_oscc-pnr_{split}.json", {"clips": clips})
    return root


@pytest.fixture
def copy(workspace: Path, tmp_path: Path) -> Path:
    """A copy of the workspace for each page."""
    return Path(shutil.copytree(workspace, tmp_path / "copy", symlinks=True))


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in RUN), ids=name)
def test_commands_of_a_page_run(page: Path, copy: Path) -> None:
    for command in (command for block in RUN if block.page == page for command in block.commands):
        words = everest_words(command)
        if words is None:
            program = shlex.split(command)
            assert program[:1] in (["git"], ["source"]) or program[:2] in (["bash", "launch/test.sh"],), command
            continue
        done = compute(words, folder=copy, environment={"DS_ACCELERATOR": "cpu", "MASTER_PORT": str(free_port())})
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_strategy_of_the_page_is_added_by_its_patch(copy: Path) -> None:
    page = REPOSITORY / "docs" / "add_a_strategy.md"
    assert len(page.read_text().splitlines()) < 60
    (patch,) = (block.text for block in blocks_of(page) if block.kind == "diff")
    (command,) = (command for block in blocks_of(page) if block.kind == "bash diff" for command in block.commands)
    shutil.copytree(REPOSITORY / "everest_ds", copy / "everest_ds", ignore=shutil.ignore_patterns("__pycache__"))
    applied = subprocess.run(
        ["git", "apply", "--unidiff-zero", "-"], input=patch, cwd=copy, capture_output=True, text=True, check=False
    )
    assert applied.returncode == 0, applied.stderr
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(copy), "DS_ACCELERATOR": "cpu", "HOME": str(copy)}
    ran = subprocess.run(
        [sys.executable, "-m", "everest_ds", *(everest_words(command) or [])],
        cwd=copy, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    whole_steps = (
        "import torch\nfrom everest_ds.model.selection import SelectionRule\n"
        "from everest_ds.tokens import TokenGrid\n"
        "grid = TokenGrid(time=4, rows=2, cols=3)\n"
        "rule = SelectionRule(strategy='frame', selected_ratio=0.5, visible_ratio=0.25)\n"
        "kept = rule.select(grid, torch.tensor([[0.3, 0.1, 0.9, 0.2]]))\n"
        "print(sorted(kept.visible.position_M.tolist()), sorted(kept.target.position_M.tolist()))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", whole_steps], cwd=copy, env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == f"{list(range(6, 12))} {list(range(18, 24))}"


def test_python_examples_run(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    namespace: dict[str, object] = {}
    examples = [block.text for block in BLOCKS if block.kind == "python"]
    shapes = []
    for example in examples:
        exec(example, namespace)  # the page's own code
        shapes.append(tuple(namespace["output"].prediction_RP.shape))  # type: ignore[attr-defined]
    assert shapes[0] == (2 * (470 - 156), 1536)
    assert namespace["picture"].size[0] > 500  # type: ignore[attr-defined]


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_command_in_a_recipes_document_is_understood(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Config] = []
    monkeypatch.setattr("everest_ds.commands.train.check", lambda given, world: calls.append(given.config) or 0)
    document = (RECIPES[recipe].__doc__ or "").replace("\\\n", " ")
    (line,) = (line for line in document.splitlines() if "deepspeed" in line)
    words = everest_words(line)
    assert words is not None
    assert cli.main(words) == 0
    assert calls[0].recipe == recipe
    assert Path(words[words.index("--ds-config") + 1]).name in {
        p.name for p in (REPOSITORY / "ds_configs").iterdir()
    }


def test_table_of_recipes_is_made_from_the_recipes() -> None:
    assert (REPOSITORY / "docs" / "recipes.md").read_text() == recipes_page()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_is_linked() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s:]+)\)", page.read_text())
        if target.partition("#")[0]
    }
    assert [name(page) for page in PAGES[1:] if page not in linked] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_nothing_needs_a_scrollbar(page: Path) -> None:
    wide = [line for block in blocks_of(page) for line in block.text.splitlines() if len(line) > WIDEST]
    assert wide == []
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    for above, row in pairwise(rows):  # cells wrap only between words
        cells, before = ([cell.strip() for cell in line.strip("|").split("|")] for line in (row, above))
        words = [max((len(word.strip("`")) for word in cell.split()), default=0) for cell in cells]
        assert len(cells) != len(before) or sum(words) + 3 * len(words) <= WIDEST + 3, row


def test_readme_is_short() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 180


def test_readme_draws_the_folders() -> None:
    text = PAGES[0].read_text()
    tree = text[text.index("everest_ds/  ") :].split("```")[0]
    listed, parents = set(), [""] * 4
    for indent, folder in re.findall(r"^( *)(\w+)/ +\S", tree, flags=re.MULTILINE):
        depth = len(indent) // 2
        parents[depth] = folder
        listed.add("/".join(parents[: depth + 1]))
    top = {str(path.parent.relative_to(REPOSITORY)) for path in REPOSITORY.glob("everest_ds/*/__init__.py")}
    assert listed == top | {"everest_ds", "docs", "ds_configs", "launch", "tests"}


# Rows of the README's table of results, with the section of docs/results.md that has the figures.
QUOTED = re.findall(r"^\|(.+)\| \[.+\]\(docs/results.md#([\w-]+)\) \|$", PAGES[0].read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize(("row", "anchor"), QUOTED)
def test_figures_that_the_readme_quotes_are_in_the_results(row: str, anchor: str) -> None:
    results = (REPOSITORY / "docs" / "results.md").read_text()
    (section,) = (
        part
        for part in re.split(r"^## ", results, flags=re.MULTILINE)[1:]
        if re.sub(r"[^\w\- ]", "", part.splitlines()[0].lower()).replace(" ", "-") == anchor
    )
    figures = [figure for cell in row.split("|")[1:] for figure in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", cell)]
    assert figures or "not yet measured" in row
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d|\.\d|e-)", section), figure


def test_there_are_figures_to_compare() -> None:
    assert len(QUOTED) >= 6


def test_image_is_built_from_files_that_exist() -> None:
    lines = (REPOSITORY / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert len(sources) >= 6
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    assert 'CMD ["bash", "launch/quickstart.sh"]' in lines
