"""Complete runs that several test modules compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.launch import compute, recovery_command


@pytest.fixture(scope="session")
def uninterrupted(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Complete runs on two processes, by ZeRO stage, made at first use."""

    class Runs(dict[int, Path]):
        def __missing__(self, stage: int) -> Path:
            out = tmp_path_factory.mktemp("runs") / f"zero{stage}"
            done = compute(recovery_command(demo_folder, out, stage=stage), processes=2)
            assert done.returncode == 0, done.stderr
            self[stage] = out
            return out

    return Runs()
