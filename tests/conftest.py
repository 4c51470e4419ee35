"""Shared fixtures: golden vectors, real clips, a small demo dataset, and marks that skip themselves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# One thread per process, child processes included: threads that share cores waste time spinning for one another.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from everest_ds.data.demo import DemoConfig, write_demo_data
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.selection import SelectionRule
from everest_ds.model.sizes import ModelSize
from everest_ds.tokens import TokenGrid
from everest_ds.train.signals import STOP_SIGNALS
from tests import messages

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
CLIPS = REPOSITORY.parent / "shared" / "clips"
SHARED_GOLDEN = REPOSITORY.parent / "shared" / "golden"

# Every run uses the same examples. There is no time limit per example because machines differ in speed.
hypothesis.settings.register_profile("everest", derandomize=True, deadline=None)
hypothesis.settings.load_profile("everest")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take more than a minute")
    parser.addoption("--messages", type=Path, metavar="FILE", help="write the texts of all UserErrors to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--messages") and not hasattr(config, "workerinput"):  # workers inherit the variable
        os.environ[messages.VARIABLE] = tempfile.mkdtemp(prefix="everest-messages-")
    messages.record_if_asked()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--messages")
    if not target or hasattr(session.config, "workerinput"):
        return
    folder = Path(os.environ.pop(messages.VARIABLE))
    too_long = messages.write_report(folder, target)
    shutil.rmtree(folder)
    print(f"\n{target}: {len(target.read_text().splitlines())} texts of UserErrors, {len(too_long)} too long")
    print("".join(f"too long: {text}\n" for text in too_long))
    if too_long and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "multi_gpu": None if torch.cuda.device_count() > 1 else "needs two CUDA devices",
        "slow": None if config.getoption("--slow") else "takes more than a minute; run with --slow",
    }
    for item in items:
        for mark, reason in reasons.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


class GoldenModel:
    """One golden fixture: clips, official weights, official outputs."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.numbers: dict[str, Any] = json.loads((GOLDEN / "model_vectors.json").read_text())[tag]
        self.outputs = load_file(GOLDEN / f"{tag}_outputs.safetensors")
        self.weights = load_file(GOLDEN / f"{tag}_weights.safetensors")
        self.clips_BCTHW = torch.from_numpy(np.load(GOLDEN / f"{tag}_clips_u8.npz")["clips"])
        self.num_visible: int = self.numbers["num_input"]
        edge = self.numbers["size"] // 16
        self.grid = TokenGrid(time=self.numbers["frames"] // 2, rows=edge, cols=edge)
        sizes = self.numbers["cfg"]
        self.size = ModelSize(
            width=sizes["dim"],
            depth=sizes["depth"],
            num_heads=sizes["heads"],
            decoder_width=sizes["ddim"],
            decoder_num_heads=sizes["dheads"],
        )

    def autoencoder(self) -> EverestAutoencoder:
        model = EverestAutoencoder(self.size, self.grid, decoder_depth=self.numbers["cfg"]["ddepth"])
        model.load_state_dict(self._weights_of("pretrain."))
        return model

    def classifier(self, keep_ratio: float) -> EverestClassifier:
        rule = SelectionRule(selected_ratio=keep_ratio)
        model = EverestClassifier(self.size, self.grid, num_classes=7, rule=rule)
        model.load_state_dict(self._weights_of("finetune."))
        return model

    def _weights_of(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)}


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """Restore signal handlers: training ends with stop signals ignored, and child processes inherit that."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(params=["tiny224", "mini64"])
def golden(request: pytest.FixtureRequest) -> GoldenModel:
    return GoldenModel(request.param)


@pytest.fixture
def mini64() -> GoldenModel:
    return GoldenModel("mini64")


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], Any]:
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def whole_golden_set() -> Path:
    """Folder of the complete golden set; tests/golden has a subset of it."""
    if not SHARED_GOLDEN.is_dir():
        pytest.skip(f"the whole golden set is not at {SHARED_GOLDEN}")
    return SHARED_GOLDEN


@pytest.fixture(scope="session")
def real_clips() -> Path:
    if not CLIPS.is_dir():
        pytest.skip(f"the real clips are not at {CLIPS}")
    return CLIPS


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 training videos of the demo dataset."""
    folder = tmp_path_factory.mktemp("demo data")  # the space is on purpose
    write_demo_data(folder, DemoConfig(train=128, val=0, test=0))
    return folder


def make_size(width: int = 32, depth: int = 2, num_heads: int = 2) -> ModelSize:
    """Return the size of a model that runs in milliseconds."""
    return ModelSize(width=width, depth=depth, num_heads=num_heads, decoder_width=16, decoder_num_heads=2)
