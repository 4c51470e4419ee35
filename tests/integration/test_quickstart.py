"""The first minute: README's first block and the quickstart's printed hints, in a clean shell."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

BLOCK = re.search(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)

# Called instead of an interpreter. For `-m venv` it makes an environment that uses the packages of this one and
# reports that nothing is left to install. launch/compat.sh tests real installations.
PYTHON = """#!/bin/bash
if [ "$1 $2" != "-m venv" ]; then exec {python} "$@"; fi
{python} "$@" || exit 1
environment="${{@: -1}}"
borrowed=$(echo "$environment"/lib/python*/site-packages)/borrowed.pth
echo "import sys; sys.path[:0] = ['$PWD']; sys.path.append('{packages}')" > "$borrowed"
for name in everest deepspeed tensorboard; do
  sed "1s|.*|#!$environment/bin/python|" "{scripts}/$name" > "$environment/bin/$name"
  chmod +x "$environment/bin/$name"
done
source launch/environment.sh
touch "$(stamp_of "")"
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one commit: the current files."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=False).stdout
    if not listed:
        pytest.skip("the project is no git checkout")
    for name in filter(None, listed.decode().split("\0")):
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "-A", "-f"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=source, check=True)
    return source


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """The environment of a clean shell, with the interpreter above."""
    python = tmp_path / "python"
    paths = sysconfig.get_paths()
    python.write_text(
        PYTHON.format(python=sys.executable, packages=paths["purelib"], scripts=Path(sys.executable).parent)
    )
    python.chmod(0o755)
    (tmp_path / "home").mkdir()
    return {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home"), "PYTHON": str(python), "EVEREST_TINY": "1"}


def bash(command: str, folder: Path, shell: dict[str, str], timeout_s: float = 600) -> str:
    """Return the output of a command that must succeed."""
    ran = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=shell, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, f"{command}\n{ran.stdout}"
    return ran.stdout


def serves_until_stopped(command: str, folder: Path, shell: dict[str, str]) -> bool:
    """Whether a server starts and prints its address."""
    with subprocess.Popen(
        ["bash", "-c", f"{command} --port 0"], cwd=folder, env=shell, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as server:  # fmt: skip
        try:
            end = time.monotonic() + 60
            assert server.stdout is not None
            for line in server.stdout:
                if "http://" in line:
                    return True
                if time.monotonic() > end:
                    return False
            return False
        finally:
            os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.slow  # .ci/run has it
def test_first_block_and_the_hints_it_ends_in_work_as_printed(
    source: Path, tmp_path: Path, shell: dict[str, str]
) -> None:
    assert BLOCK is not None
    block = BLOCK.group(1).replace("REPOSITORY_URL", str(source))
    assert block.splitlines()[0].startswith("git clone ")
    shown = bash(f"set -e\n{block}\neverest doctor", tmp_path, shell)
    clone = tmp_path / "everest_ds"
    assert (clone / ".venv" / "bin" / "activate").is_file()
    assert re.search(
        "A linear probe has top-1 [0-9]+% with ReRo, [0-9]+% with tube masking, and [0-9]+% without", shown
    )
    for picture in ("pictures/00000.png", "result.png"):
        assert (clone / "quickstart" / "tiny" / picture).read_bytes().startswith(b"\x89PNG")
    assert shown.endswith("ready to train\n")  # of doctor, which the block's last line puts on the PATH
    hints = re.findall(r"^  (\S.*)$", shown[shown.index("where to look next") :], flags=re.MULTILINE)
    starts = [hint.split()[0].split("/")[-1] for hint in hints]
    assert starts == ["tensorboard", "everest", "cat", "everest", "source"]
    for hint, start in zip(hints, starts, strict=True):
        if start == "tensorboard":
            assert serves_until_stopped(hint, clone, shell), hint
        else:
            said = bash(f"{hint}{' && everest --version' if start == 'source' else ''}", clone, shell)
            assert said.strip(), hint


@pytest.mark.parametrize(("caller", "active"), [(".", False), ("launch", False), (".", True)])
def test_hints_are_written_for_the_shell_that_started_the_script(caller: str, active: bool, tmp_path: Path) -> None:
    environment = tmp_path / "an environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "everest").write_text("#!/bin/bash\necho here\n")
    (environment / "bin" / "everest").chmod(0o755)
    script = (
        f"source {REPOSITORY}/launch/environment.sh; caller=$PWD; caller_path=$PATH; environment=$1; "
        'echo "$(program everest)"; from_caller "$caller/out of it"'
    )
    search = f"{environment / 'bin'}:/usr/bin:/bin" if active else "/usr/bin:/bin"
    folder = REPOSITORY / caller
    hint, path = bash(f"set -- '{environment}'; {script}", folder, {"PATH": search}).splitlines()
    assert hint == ("everest" if active else str(environment / "bin" / "everest").replace(" ", "\\ "))
    assert path == "out\\ of\\ it"
    assert bash(hint, folder, {"PATH": search}) == "here\n"


def test_environment_keeps_the_torch_that_an_active_one_has(tmp_path: Path) -> None:
    packages = tmp_path / "lib"
    (packages / "torch-2.11.0.dist-info").mkdir(parents=True)
    (packages / "torch-2.11.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.11.0\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/bash\nPYTHONPATH={packages} exec {sys.executable} -S "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    shown = bash(f"source launch/environment.sh; kept_versions {tmp_path}", REPOSITORY, {"PATH": "/usr/bin:/bin"})
    kept = set(shown.splitlines())
    tested = set((REPOSITORY / "constraints.txt").read_text().splitlines())
    assert "torch==2.11.0" in kept
    assert kept - tested == {"torch==2.11.0"}
    left_out = {line.split("==")[0] for line in tested - kept}
    assert {"torch", "torchvision", "torchcodec", "triton", "nvidia-cublas", "cuda-bindings"} <= left_out
    assert all(re.match("torch|triton|nvidia-|cuda-", name) for name in left_out)


def test_constraints_name_one_version_of_everything_for_each_python() -> None:
    from packaging.requirements import Requirement

    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = [Requirement(line) for line in lines]
    for python in ("3.11", "3.12", "3.13"):
        where = {"python_version": python, "python_full_version": f"{python}.0"}
        names = [r.name for r in pinned if r.marker is None or r.marker.evaluate(where)]
        assert len(names) == len(set(names))
        assert {"torch", "torchvision", "timm", "deepspeed", "av", "numpy", "pip", "hatchling", "pytest"} <= set(
            names
        )
    assert all(len(r.specifier) == 1 and str(r.specifier).startswith("==") for r in pinned)
