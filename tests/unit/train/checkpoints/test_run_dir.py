from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from everest_ds.config import (
    BatchConfig,
    FinetuneConfig,
    OptimConfig,
    PretrainConfig,
    PretrainDataConfig,
    RunConfig,
)
from everest_ds.config.file import dump_config
from everest_ds.errors import UserError
from everest_ds.train.checkpoints.run_dir import (
    FREE_ON_RESUME,
    Resume,
    find_pointer_fault,
    find_resume,
    require_same_classes,
    require_shared,
    write_run_files,
)
from everest_ds.train.checkpoints.save import TrainState

CONFIG = PretrainConfig(recipe="demo", data=PretrainDataConfig(train_list="a.csv"))


# The seal's entries for the files of a ZeRO-0 checkpoint.
SEALED = {name: {"size": 0, "sha256": ""} for name in ("state.json", "mp_rank_00_model_states.pt")}


def make_run(folder: Path, steps: list[int]) -> list[Path]:
    """Create a run directory with checkpoints of empty files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(dump_config(CONFIG))
    checkpoints = [folder / "checkpoints" / f"step-{step:08d}" for step in steps]
    for step, checkpoint in zip(steps, checkpoints, strict=True):
        checkpoint.mkdir(parents=True)
        state = TrainState(step=step, samples=1024 * step, world_size=1, zero_stage=0, dtype="float32", videos="")
        (checkpoint / "state.json").write_text(json.dumps(asdict(state)))
        (checkpoint / "complete.json").write_text(json.dumps({"files": SEALED}))
    return checkpoints


def test_auto_starts_afresh_or_goes_on_from_the_newest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert find_resume(run, CONFIG, "auto") == Resume(run_dir=run)
    older, newer = make_run(run, [5, 20])
    assert find_resume(run, CONFIG, "auto") == Resume(run_dir=run, candidates=(newer, older))
    (newer / "complete.json").unlink()
    assert find_resume(run, CONFIG, "auto").candidates == (older,)


def test_run_of_a_version_with_fewer_settings_goes_on_with_their_defaults(tmp_path: Path) -> None:
    (checkpoint,) = make_run(tmp_path / "run", [5])
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["data"].pop("sampling_seconds") is None
    assert stored["data"].pop("max_pixels") == 2**29
    assert stored["model"].pop("cuda_graph") == stored["optim"].pop("gradients") == "auto"
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    assert find_resume(tmp_path / "run", CONFIG, "auto").candidates == (checkpoint,)
    in_time = replace(CONFIG, data=replace(CONFIG.data, sampling_seconds=0.1))
    with pytest.raises(UserError, match=r"data\.sampling_seconds was None and is now 0\.1"):
        find_resume(tmp_path / "run", in_time, "auto")


def test_start_that_was_killed_while_it_wrote_its_first_file_leaves_the_directory_free(tmp_path: Path) -> None:
    (tmp_path / ".config.json.partial").write_text('{"recipe"')
    assert find_resume(tmp_path, CONFIG, "never") == Resume(run_dir=tmp_path)


def test_without_out_the_run_is_named_after_its_recipe_or_the_checkpoint(tmp_path: Path) -> None:
    assert find_resume(None, CONFIG, "auto").run_dir == Path("runs/demo")
    (checkpoint,) = make_run(tmp_path / "run", [5])
    assert find_resume(None, CONFIG, str(checkpoint)) == Resume(
        run_dir=tmp_path / "run", candidates=(checkpoint,), exact=True
    )


def test_named_checkpoint_that_is_not_the_newest_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    older, _ = make_run(tmp_path / "run", [5, 20])
    with pytest.raises(UserError, match=r"the run continued to step-00000020.*--out to branch off"):
        find_resume(tmp_path / "run", CONFIG, str(older))
    branch = find_resume(tmp_path / "branch", CONFIG, str(older))
    assert branch == Resume(run_dir=tmp_path / "branch", candidates=(older,), exact=True)
    make_run(tmp_path / "other", [1])
    with pytest.raises(UserError, match="holds another run"):
        find_resume(tmp_path / "other", CONFIG, str(older))


def test_settings_that_change_the_result_are_refused_and_others_are_free(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [5])
    changed = replace(CONFIG, optim=OptimConfig(base_lr=1.0, epochs=77))
    with pytest.raises(UserError) as caught:
        find_resume(tmp_path / "run", changed, "auto")
    assert "optim.base_lr was 0.00015 and is now 1.0, optim.epochs was 200 and is now 77" in str(caught.value)
    free = replace(CONFIG, run=RunConfig(max_steps=3, log_every_steps=1, keep_checkpoints=9))
    assert find_resume(tmp_path / "run", free, "auto").candidates
    dumps = [json.loads(dump_config(config)) for config in (CONFIG, FinetuneConfig(recipe="demo_ft"))]
    sections = [item for dump in dumps for item in dump.items() if item[0] not in ("recipe", "task")]
    assert {f"{section}.{key}" for section, part in sections for key in part} >= FREE_ON_RESUME
    assert {name for name in FREE_ON_RESUME if name.startswith(("optim.", "selection."))} == {"optim.gradients"}


def test_run_files_say_what_ran(tmp_path: Path) -> None:
    write_run_files(tmp_path / "run", CONFIG, {"zero_optimization": {"stage": 2}})
    assert json.loads((tmp_path / "run" / "ds_config.json").read_text()) == {"zero_optimization": {"stage": 2}}
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {"command", "commit", "versions", "host", "cpu_count", "gpus", "world_size"} == set(environment)


def test_run_directory_that_a_node_does_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everest_ds.train.checkpoints.run_dir.VISIBLE_WITHIN_S", 0)
    with pytest.raises(
        UserError, match=r"does not see .*config\.json; put the run directory on a file system that"
    ):
        require_shared(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    require_shared(tmp_path)


def test_run_or_its_checkpoints_stand_for_the_latest_checkpoint(tmp_path: Path) -> None:
    older, newer = make_run(tmp_path / "run", [2, 4])
    pointer = tmp_path / "run" / "checkpoints" / "latest"
    pointer.write_text("step-00000004\n")
    for named in (tmp_path / "run", pointer.parent):
        assert find_resume(None, CONFIG, str(named)).candidates == (newer,)
    pointer.write_text("../elsewhere\n")
    with pytest.raises(UserError, match=r"latest names '../elsewhere', which is not a complete checkpoint"):
        find_resume(None, CONFIG, str(tmp_path / "run"))
    assert "not a complete checkpoint" in str(find_pointer_fault(tmp_path / "run"))
    pointer.unlink()
    with pytest.raises(UserError, match=r"latest cannot be read"):
        find_resume(None, CONFIG, str(pointer.parent))
    pointer.write_text(f"{older.name}\n")  # a save that was killed just before it moved the pointer
    assert find_pointer_fault(tmp_path / "run") is None
    assert find_resume(None, CONFIG, "auto").candidates == ()


@pytest.mark.parametrize("text", [b"", b"{", b"\0" * 512, b"\xff\xfe", b"[1]", b"[" * 100_000])
def test_configuration_that_is_lost_is_compared_with_a_copy_or_begun_again(text: bytes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoints = make_run(run, [5, 20])
    (run / "config.json").write_bytes(text)
    (checkpoints[0] / "config.json").write_text(dump_config(CONFIG))
    (checkpoints[1] / "config.json").write_bytes(text)  # its copy is damaged, too
    found = find_resume(run, CONFIG, "auto")
    assert f"after comparison with {checkpoints[0] / 'config.json'}" in str(found.note)
    with pytest.raises(UserError, match=r"base_lr was 0\.00015 and is now 1\.0"):
        find_resume(run, replace(CONFIG, optim=OptimConfig(base_lr=1.0)), "auto")
    (checkpoints[0] / "config.json").unlink()
    assert "with the settings of this command" in str(find_resume(run, CONFIG, "auto").note)
    smaller = replace(CONFIG, batch=BatchConfig(global_size=512, micro_size=32))
    with pytest.raises(UserError, match=r"was trained with batch\.global_size=1024, now 512"):
        find_resume(run, smaller, "auto")
    shutil.rmtree(run / "checkpoints")
    assert "the run has no checkpoint yet" in str(find_resume(run, CONFIG, "auto").note)
    (run / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"also has thesis\.tex; name another folder"):
        find_resume(run, CONFIG, "auto")


def test_settings_of_another_version_are_not_taken_for_lost_ones(tmp_path: Path) -> None:
    (checkpoint,) = make_run(tmp_path / "run", [5])
    (checkpoint / "config.json").write_text(dump_config(CONFIG))
    (tmp_path / "run" / "config.json").write_text('{"task": "pretrain", "future": 1}')
    with pytest.raises(UserError, match="unknown key future"):
        find_resume(tmp_path / "run", CONFIG, "auto")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("b\na\n", r"class 0 was 'b' and is now 'a'.*restore the names.*, or .*remove .*classes\.txt and start"),
        ("a\nb\nc\n", r"class 2 was 'c' and is now None"),
        ("a\n", r"class 1 was None and is now 'b'"),
        ("a\n\nb\n", r"line 2 is blank.*remove .*classes\.txt and start again"),
        ("\x1b[31m\nb\n", r"class 0 was '\\x1b\[31m'"),
    ],
)
def test_other_names_of_classes_are_refused(stored: str, message: str, tmp_path: Path) -> None:
    checkpoints = make_run(tmp_path / "run", [5])
    resume = Resume(run_dir=tmp_path / "run", candidates=tuple(checkpoints))
    require_same_classes(resume, ("a", "b"))  # a run that recorded no class names
    (tmp_path / "run" / "classes.txt").write_text(stored)
    with pytest.raises(UserError, match=message):
        require_same_classes(resume, ("a", "b"))
    require_same_classes(Resume(run_dir=tmp_path / "run"), ("a", "b"))
