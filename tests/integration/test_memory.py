"""The estimate of model states against the memory measured on each of two ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.integration.scanning import scan

# Measured over all kinds of sharding, precisions and ranks: at most 0.31 % (float32 at stage 2, where the two ranks
# have whole gradients of different parameters and the estimate is for the rank with more), else 0.006 %.
# Fine-tuning with layer decay 0.003 %, a frozen encoder 0.00007 %.
STATES_RTOL = 0.01
# At stage 3, forward adds the gathered parameters and the activations of one small clip. The activations are not
# estimated here: measured 1.7 % in bf16, 1.6 % in float32.
GATHERED_RTOL = 0.03

# Flat gradients that are sent in bfloat16 are cast between two measurements. On DeepSpeed's own path a group's
# float32 gradients are copied and the originals freed at once. The step's peak is then not visible from outside.
COPIED_BETWEEN_LOOKS = ("zero1:bf16", "zero2:bf16", "zero1:fp32:deepspeed", "zero2:fp32:deepspeed")
COPIED_BETWEEN_LOOKS += ("zero0:bf16", "zero1:autocast:deepspeed", "zero2:autocast:deepspeed")

NAMES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
DEFAULT_CASES = ["zero0:fp32:1", "zero1:bf16", "zero2:bf16", "zero2:bf16:1", "zero3:bf16", "zero3:autocast"]
FINETUNE_CASES = ["zero1:bf16:finetune", "zero3:bf16:finetune"]
FINETUNE_CASES += [f"zero{stage}:bf16:probe" for stage in range(4)]
PRECISIONS = ("bf16", "fp32", "autocast")
OTHER_CASES = [f"{name}:{precision}" for name in NAMES for precision in PRECISIONS]
OTHER_CASES += [f"{name}:{precision}:1" for name in NAMES[:3] for precision in PRECISIONS]
OTHER_CASES += [f"{name}:{precision}:deepspeed" for name in NAMES[:3] for precision in PRECISIONS]
OTHER_CASES = [case for case in OTHER_CASES if case not in DEFAULT_CASES]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(DEFAULT_CASES, id="default"),
        pytest.param(OTHER_CASES, marks=pytest.mark.slow, id="others"),
        pytest.param(FINETUNE_CASES, marks=pytest.mark.slow, id="fine-tuning"),
    ],
)
def test_model_states_are_what_each_rank_holds(cases: list[str]) -> None:
    seen: dict[str, list[dict[str, Any]]] = {}
    for line in scan("states", REPOSITORY / "ds_configs", *cases, processes=2):
        seen.setdefault(line["case"], []).append(line)
    assert list(seen) == cases
    for case, lines in seen.items():
        assert [line["rank"] for line in sorted(lines, key=lambda line: line["rank"])] == [0, 1]
        for line in lines:
            measured, expected = line["measured"], line["estimate"]
            held, estimated = measured["states"], expected["states"]
            print(f"{case} rank {line['rank']}: held {held}, estimated {estimated} ({estimated / held - 1:+.3%})")
            print(f"  in the step: held {measured['step']}, estimated {expected['step']}")
            assert expected["states"] == pytest.approx(measured["states"], rel=STATES_RTOL), (case, line["rank"])
            assert measured["step"] <= expected["step"] * (1 + STATES_RTOL)
            plain = case.removesuffix(":1")
            if (
                plain not in COPIED_BETWEEN_LOOKS and case not in FINETUNE_CASES
            ):  # a probe's gradients are too small
                assert expected["step"] == pytest.approx(measured["step"], rel=STATES_RTOL), (case, line["rank"])
            if case.startswith("zero3") and case not in FINETUNE_CASES:  # whose activations are larger
                gathered = measured["forward"] - measured["states"]
                assert expected["gathered"] == pytest.approx(gathered, rel=GATHERED_RTOL), (case, line["rank"])
