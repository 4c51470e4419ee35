from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.checkpoints import reshard
from everest_ds.train.checkpoints.reshard import load_resharded, needs_resharding, universal_copy
from everest_ds.train.checkpoints.save import TrainState, prune_checkpoints, save_checkpoint, universal_of
from everest_ds.train.checkpoints.seal import seal
from tests.unit.train.checkpoints.test_save import ALONE, FakeEngine, state


def where(world_size: int, zero_stage: int, dtype: str = "float32") -> TrainState:
    return TrainState(world_size=world_size, zero_stage=zero_stage, dtype=dtype, videos="")


def test_only_another_world_or_stage_needs_conversion() -> None:
    for stage in range(4):
        assert not needs_resharding(where(2, stage), where(2, stage))
    assert needs_resharding(where(2, 2), where(4, 2))
    assert needs_resharding(where(2, 3), where(2, 1))
    assert not needs_resharding(where(2, 0), where(4, 0))  # every process has the whole state


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (where(2, 0), where(2, 2)),
        (where(2, 3), where(2, 0)),
        (where(2, 0, "bfloat16"), where(1, 0, "bfloat16")),
    ],
)
def test_stage_zero_goes_on_as_stage_zero_only(was: TrainState, now: TrainState) -> None:
    with pytest.raises(UserError, match=r"written by 2 processes at ZeRO stage \d; this run has \d at stage \d"):
        needs_resharding(was, now)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace DeepSpeed's converter by one that writes a single file, and list its calls."""
    done = []

    def convert(checkpoint: Path, copy: Path, source: str, world: World) -> None:
        reshard.remove_sealed(copy)
        copy.mkdir()
        (copy / "weights.bin").write_bytes(b"whole")
        seal(copy, world, source=source)
        done.append(checkpoint.name)

    monkeypatch.setattr(reshard, "_convert", convert)
    return done


def test_copy_is_made_once_and_used_again(tmp_path: Path, conversions: list[str]) -> None:
    checkpoint = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    for _ in range(2):
        with universal_copy(checkpoint, ALONE) as copy:
            assert copy == checkpoint.parent / "universal-step-00000005"
            assert (copy / "weights.bin").read_bytes() == b"whole"
    assert conversions == ["step-00000005"]


def test_copy_that_is_damaged_or_of_another_save_is_made_anew(tmp_path: Path, conversions: list[str]) -> None:
    checkpoint = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    with universal_copy(checkpoint, ALONE) as copy:
        (copy / "weights.bin").write_bytes(b"hole!")
    with universal_copy(checkpoint, ALONE):
        assert len(conversions) == 2
    seal_text = (checkpoint / "complete.json").read_text()
    (checkpoint / "complete.json").write_text(seal_text + " ")
    with universal_copy(checkpoint, ALONE):
        assert len(conversions) == 3


def test_copy_made_for_a_start_that_fails_is_removed_and_an_older_one_is_not(
    tmp_path: Path, conversions: list[str]
) -> None:
    checkpoint = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError), universal_copy(checkpoint, ALONE):
        raise UserError("the model does not fit")
    assert sorted(tmp_path.rglob("*")) == before
    with universal_copy(checkpoint, ALONE):
        pass
    with pytest.raises(UserError), universal_copy(checkpoint, ALONE) as copy:
        raise UserError("the model does not fit")
    assert copy.is_dir()
    assert len(conversions) == 2


def test_copy_goes_with_its_checkpoint(tmp_path: Path, conversions: list[str]) -> None:
    older = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    newer = save_checkpoint(FakeEngine(), tmp_path, state(6), ALONE)
    for checkpoint in (older, newer):
        with universal_copy(checkpoint, ALONE):
            pass
    prune_checkpoints(tmp_path, keep_last=1)
    assert not universal_of(older).exists()
    assert universal_of(newer).exists()
    save_checkpoint(FakeEngine(), tmp_path, state(6), ALONE)  # the same step, saved again
    assert not universal_of(newer).exists()


def test_conversion_that_fails_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed cannot read the shards of the fake engine."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # rarely set in users' shells
    checkpoint = save_checkpoint(FakeEngine(), tmp_path, state(5), ALONE)
    torch.save({"param_shapes": {}}, checkpoint / "mp_rank_00_model_states.pt")
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(UserError, match=r"could not be converted.*converter ended with 1: .*weights_only"),
        universal_copy(checkpoint, ALONE),
    ):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_every_state_gets_a_step_counter_of_its_own(tmp_path: Path) -> None:
    """DeepSpeed's loader shares one counter at stage 3, and leaves none after a change from stage 3 to 2."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW(parameters)
    shared: dict[str, Any] = {"step": torch.tensor(7.0)}
    for parameter in parameters:
        optimizer.state[parameter] = {"exp_avg": torch.zeros(2), **shared}
    del optimizer.state[parameters[2]]["step"]
    engine = FakeEngine()
    engine.optimizer = type("Wrapper", (), {"optimizer": optimizer})()  # type: ignore[attr-defined]
    load_resharded(engine, tmp_path, num_updates=11)
    steps = [optimizer.state[parameter]["step"] for parameter in parameters]
    assert [float(step) for step in steps] == [11.0, 11.0, 11.0]
    assert len({id(step) for step in steps}) == 3
