"""The moving average of the weights at every ZeRO stage, in one and two processes, against plain arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launch import compute

# The average against one in float64, relative to the value plus 1e-3: measured 1.6e-6.
AVERAGE_RTOL = 1e-5
# The loss inside the swap against that of a model without DeepSpeed: measured identical in float32 and in bfloat16.
LOSS_RTOL = {"fp32": 1e-6, "bf16": 1e-6}

DEFAULT_CASES = ["2:fp32", "3:bf16"]
OTHER_CASES = ["0:fp32", "0:bf16", "1:bf16", "2:bf16", "3:fp32"]


def scan(folder: Path, cases: list[str], *, processes: int) -> dict[str, list[dict[str, Any]]]:
    """Run cases and return every rank's findings of each."""
    module = "tests.integration.scan_average"
    done = compute([folder, *cases], processes=processes, module=module, timeout_s=600)
    assert done.returncode == 0, done.stderr
    seen: dict[str, list[dict[str, Any]]] = {}
    for text in done.stdout.split("SEEN ")[1:]:
        line = json.loads(text.splitlines()[0])
        seen.setdefault(line["case"], []).append(line)
    return seen


def check(seen: dict[str, list[dict[str, Any]]], cases: list[str], *, processes: int) -> None:
    assert list(seen) == cases
    for case, lines in seen.items():
        assert sorted(line["rank"] for line in lines) == list(range(processes))
        for line in lines:
            print(f"{case} of {processes}: {line}")
            assert line["worst"] < AVERAGE_RTOL
            assert line["moved"] > 1e-3  # the averages are not the weights
            assert len(line["losses"]) == 2
            for inside, plain in line["losses"]:
                assert inside == pytest.approx(plain, rel=LOSS_RTOL[case.split(":")[1]])
            assert line["traceless"]
            # After both swaps, gathered and as it lies there; and what was loaded from every case so far.
            assert len(line["restored"]) >= 5
            assert all(line["restored"])
            assert (line["small"] > 0) == case.startswith("3")
            share = 4 * line["parameters"] / processes
            assert share <= line["bytes"] <= 1.001 * share


@pytest.mark.parametrize(
    "cases", [DEFAULT_CASES, pytest.param(OTHER_CASES, marks=pytest.mark.slow)], ids=["default", "others"]
)
def test_average_is_that_of_plain_arithmetic_and_swapping_leaves_no_trace(cases: list[str], tmp_path: Path) -> None:
    check(scan(tmp_path, cases, processes=2), cases, processes=2)


@pytest.mark.slow
def test_average_goes_on_in_another_world(tmp_path: Path) -> None:
    """One process loads what two have saved, and the other way round."""
    for processes in (2, 1, 2):
        cases = ["3:fp32", "2:fp32"]
        seen = scan(tmp_path, cases, processes=processes)
        check(seen, cases, processes=processes)
    assert len(seen["2:fp32"][0]["restored"]) == 4 + 4
