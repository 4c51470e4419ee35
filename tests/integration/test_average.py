"""The moving average of the weights at every ZeRO stage, in one and two processes, against plain arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.scanning import scan

# Difference from an average in float64, relative to the value plus 1e-3: measured 1.6e-6.
AVERAGE_RTOL = 1e-5
# Loss inside the swap against a model without DeepSpeed: measured identical in float32 and bfloat16.
LOSS_RTOL = {"fp32": 1e-6, "bf16": 1e-6}

DEFAULT_CASES = ["2:fp32", "3:bf16"]
OTHER_CASES = ["0:fp32", "0:bf16", "1:bf16", "2:bf16", "3:fp32"]


@pytest.mark.parametrize(
    ("cases", "worlds"),
    [
        pytest.param(DEFAULT_CASES, (2,), id="default"),
        pytest.param(OTHER_CASES, (2,), id="others", marks=pytest.mark.slow),
        # One process loads what two processes saved, and the other way round.
        pytest.param(["3:fp32", "2:fp32"], (2, 1, 2), id="other worlds", marks=pytest.mark.slow),
    ],
)
def test_average_is_that_of_plain_arithmetic_and_swapping_leaves_no_trace(
    cases: list[str], worlds: tuple[int, ...], tmp_path: Path
) -> None:
    for processes in worlds:
        lines = scan("average", tmp_path, *cases, processes=processes)
        seen = [(line["case"], line["rank"]) for line in lines]
        assert sorted(seen) == sorted((case, rank) for case in cases for rank in range(processes))
        for line in lines:
            print(f"{line['case']} of {processes}: {line}")
            assert line["worst"] < AVERAGE_RTOL
            assert line["moved"] > 1e-3  # the averages are not the weights
            assert len(line["losses"]) == 2
            for inside, plain in line["losses"]:
                assert inside == pytest.approx(plain, rel=LOSS_RTOL[line["case"].split(":")[1]])
            assert line["traceless"]
            # After both swaps, gathered and in place; and what was loaded from every case so far.
            assert len(line["restored"]) >= 5
            assert all(line["restored"])
            assert (line["small"] > 0) == line["case"].startswith("3")
            share = 4 * line["parameters"] / processes
            assert share <= line["bytes"] <= 1.001 * share
    if len(worlds) == 3:
        last = next(line for line in lines if line["case"] == cases[-1])
        assert len(last["restored"]) == 4 + 4
