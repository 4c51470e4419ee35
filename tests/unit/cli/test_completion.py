"""The completion script in a real bash and a real zsh: what TAB offers after some words."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from everest_ds import cli

ASK = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(( $# - 1 ))
_everest
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    printed = subprocess.run(
        ["python", "-m", "everest_ds", "--tyro-print-completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
    )
    path = tmp_path_factory.mktemp("completion") / "everest.bash"
    path.write_text(printed.stdout)
    return path


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("pre", {"prepare", "pretrain", "predict"}),
        ("pretrain dem", {"demo"}),
        ("finetune dem", {"demo_ft"}),
        ("plan dem", {"demo", "demo_ft"}),
        ("pretrain demo --run.log", {"--run.log-every-steps", "--run.log-to"}),
        ("pretrain demo --run.log-to t", {"tensorboard", "trackio"}),
        ("finetune demo_ft --model.size h", {"huge"}),
        ("finetune demo_ft --task", {""}),
        ("benchmark s", {"step"}),
        ("benchmark step --sweep-r", {"--sweep-ratio"}),
        ("benchmark data dem", {"demo", "demo_ft"}),
        ("index ucf", {"ucf101"}),
        ("index folder --val", {"--val-share"}),
        ("evaluate --protocol k", {"knn"}),
        ("nothing --x", {""}),
    ],
)
def test_tab_offers(words: str, offered: set[str], script: Path, tmp_path: Path) -> None:
    command = ["bash", "-c", ASK, "bash", str(script), "everest", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(done.stdout.splitlines()) == offered
    assert done.stderr == ""


def test_every_command_is_in_the_script_and_other_shells_are_refused(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script.read_text()
    assert all(f"'{name}" in text or f" {name} " in text for name in cli.COMMANDS)
    assert cli.main(["--tyro-print-completion", "fish"]) == 2
    assert "expected bash or zsh, for example `source <(everest --tyro-print-completion bash)`" in (
        capsys.readouterr().err
    )
    assert cli.main(["--tyro-print-completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out


ZSH = """
zmodload zsh/zpty
zpty -b shell zsh -f -i
zpty -w shell "PS1='> '; source $1"
sleep 1
zpty -w -n shell $'everest pretrain k400_vit_\\t\\t'
sleep 1
zpty -w -n shell $'\\x15everest predict --fea\\t'
sleep 1
while zpty -r -t shell line; do print -r -- "$line"; done
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_without_settings_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--tyro-print-completion", "zsh"]) == 0
    (tmp_path / "everest.zsh").write_text(capsys.readouterr().out)
    (tmp_path / "ask.zsh").write_text(ZSH)
    done = subprocess.run(
        ["zsh", "-f", "ask.zsh", "everest.zsh"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TERM": "dumb"},
    )  # fmt: skip
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout)
    assert {"k400_vit_s", "k400_vit_b", "k400_vit_l", "k400_vit_h"} <= set(shown.split())
    assert "predict --features" in shown
    assert "not found" not in shown
