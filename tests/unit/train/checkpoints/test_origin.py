from __future__ import annotations

from pathlib import Path

import pytest

from everest_ds.errors import UserError
from everest_ds.train.checkpoints.origin import Origin, locate
from tests.unit.inference.test_source import demo_ft, make_run


def test_run_stands_for_its_best_checkpoint_else_its_newest(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert (locate(run).weights.name, locate(run).choice) == ("step-00000008", "the newest")
    (run / "checkpoints" / "best").write_text("step-00000004\n")
    origin = locate(run)
    assert (origin.weights.name, origin.choice, origin.run_dir) == ("step-00000004", "the best", run)
    assert origin.config == demo_ft()
    named = locate(run / "checkpoints" / "step-00000008")
    assert (named.weights.name, named.run_dir, named.config) == ("step-00000008", run, demo_ft())


def test_pointer_to_nothing_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "best").write_text("step-00000099")
    with pytest.raises(UserError, match="which is not a complete checkpoint"):
        locate(run)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    torn = run / "checkpoints" / "step-00000012"
    torn.mkdir()
    with pytest.raises(UserError, match=r"nor a complete checkpoint: it has no complete\.json"):
        locate(torn)
    with pytest.raises(UserError, match="does not exist; expected a run directory"):
        locate(tmp_path / "absent")
    empty = make_run(tmp_path / "empty", steps=())
    (empty / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no complete checkpoint"):
        locate(empty)


def test_what_belongs_to_no_run_is_weights(tmp_path: Path) -> None:
    for weights in (tmp_path / "w.pth", tmp_path / "hf"):
        weights.touch()
        assert locate(weights) == Origin(given=weights, weights=weights)


def test_checkpoint_without_its_run_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        locate(run / "checkpoints" / "step-00000004")
