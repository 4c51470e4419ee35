"""A built wheel, installed without the repository, has everything that the package needs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the repository with the installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(REPOSITORY)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("everest_ds-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "everest_ds/py.typed" in archive.namelist()
        assert not [name for name in archive.namelist() if name.startswith(("tests/", "docs/"))]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder


def run(installed: Path, *words: str) -> str:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(installed / "site"), "HOME": str(installed)}
    ran = subprocess.run(
        [sys.executable, "-P", *words], cwd=installed, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_it_is_the_wheel_that_is_imported_and_its_version_is_the_projects(installed: Path) -> None:
    out = run(installed, "-c", "import everest_ds; print(everest_ds.__file__, everest_ds.__version__)")
    file, version = out.split()
    assert file.startswith(str(installed / "site"))
    assert list((installed / "site").glob(f"everest_ds-{version}.dist-info"))
    assert f"## {version} " in (REPOSITORY / "CHANGELOG.md").read_text()
    assert f"version: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()


def test_plan_finds_the_files_of_ds_configs(installed: Path) -> None:
    out = run(installed, "-m", "everest_ds", "plan", "k400_vit_b", "--gpus", "8", "--gpu-memory-gib", "80")
    for file in (REPOSITORY / "ds_configs").glob("*.json"):
        assert file.stem in out


def test_file_of_ds_configs_is_found_by_its_usual_name(installed: Path) -> None:
    out = run(installed, "-m", "everest_ds", "recipes", "k400_vit_b", "--ds-config", "ds_configs/zero1.json")
    assert '"stage": 1' in out
