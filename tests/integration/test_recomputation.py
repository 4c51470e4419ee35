"""Recomputation under ZeRO-3, where a weight can be read in its own module's forward pass alone."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.conftest import REPOSITORY
from tests.integration.launch import cpu_environment, free_port


def test_two_processes_at_stage_3_compute_the_same_bits_however_much_is_recomputed() -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.integration.scan_recomputation"],
        capture_output=True,
        text=True,
        env=cpu_environment(),
        cwd=REPOSITORY,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    seen = [json.loads(text.splitlines()[0]) for text in done.stdout.split("SEEN ")[1:]]
    figures: dict[tuple[str, int], dict[str, list[float]]] = {}
    for line in seen:
        figures.setdefault((line["case"], line["rank"]), {})[line["recomputed"]] = line["figures"]
    cases = ("demo fp32", "demo_ft bf16")
    assert set(figures) == {(case, rank) for case in cases for rank in (0, 1)}
    for found in figures.values():
        assert list(found) == ["nothing", "all but attention", "all"]
        assert len(set(found["nothing"])) == len(found["nothing"])  # the steps did something
        assert found["all but attention"] == found["all"] == found["nothing"]
