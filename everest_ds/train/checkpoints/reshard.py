"""Resumes with another number of ranks or another ZeRO stage, through DeepSpeed's universal checkpoints.

    step-00001200/              shards for the number of ranks and the stage that wrote them
    universal-step-00001200/    one folder per parameter: weight and two moments, whole and in float32

DeepSpeed's own converter makes the copy when it is first needed; it is kept next to the checkpoint. Three faults of
DeepSpeed's loader (0.19.8) are corrected here. A folder converted from one stage lacks files that the loader of
another stage needs (`_bridge_stages`). ZeRO-3 gives every parameter group the hyper-parameters of the first one
(`_bridge_stages` stores none, so each group keeps its own). ZeRO-3 lets all groups share one step counter, which
then advances once per group (`_separate_step_counters`).
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import everest_ds
from everest_ds import distributed
from everest_ds.console.messages import say
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.files import parse_json, sha256
from everest_ds.interrupts import ending_with_us
from everest_ds.train.checkpoints.save import TrainState, read_state, universal_of
from everest_ds.train.checkpoints.seal import (
    SEAL,
    find_damage,
    is_sealed,
    remove_sealed,
    seal,
    try_together,
)
from everest_ds.train.checkpoints.shards import load_checkpoint, read_shard, require_data

REPORT_EVERY_S = 5.0
# Errors from shards that are only data, but not in DeepSpeed's format.
ODD = (LookupError, TypeError, ValueError, AttributeError)


def needs_resharding(was: TrainState, now: TrainState) -> bool:
    """Return whether a checkpoint must be converted before it can be loaded on these ranks at this stage.

    Raises:
        UserError: Only one side is ZeRO-0, or both are, in bfloat16, on different numbers of processes.
    """
    if (was.world_size, was.zero_stage) == (now.world_size, now.zero_stage):
        return False
    if was.zero_stage and now.zero_stage:
        return True
    if was.zero_stage == now.zero_stage and now.dtype == "float32":
        return False  # every process of ZeRO-0 has everything
    raise UserError(
        f"the checkpoint was written by {was.world_size} processes at ZeRO stage {was.zero_stage}; this run has "
        f"{now.world_size} at stage {now.zero_stage}. Stages 1 to 3 convert into each other; stage 0 resumes "
        "only at stage 0 and in float32"
    )


@contextlib.contextmanager
def universal_copy(checkpoint: Path, world: World) -> Iterator[Path]:
    """Provide a checkpoint's universal copy, and make it if there is none yet; all ranks take part.

    If the block fails, a copy made here is removed again, so a failed start leaves the run unchanged.

    Raises:
        UserError: The conversion failed.
    """
    copy, source = universal_of(checkpoint), sha256(checkpoint / SEAL)
    fault = find_damage(copy, world) if is_sealed(copy) else "there is none yet"
    if fault is None and parse_json((copy / SEAL).read_text()).get("source") != source:
        fault = "it was made from another save of this step"
    if distributed.agree(fault) is None:
        require_data(copy, world)
        if world.is_main:
            say(f"using {copy}, converted earlier")
        yield copy
        return
    try:
        _convert(checkpoint, copy, source, world)
        yield copy
    except BaseException:
        if world.is_main:
            remove_sealed(copy)
        raise


def load_resharded(engine: Any, copy: Path, num_updates: int) -> None:
    """Load a universal copy into an engine that was built with `universal`; all ranks take part.

    Args:
        engine: The DeepSpeed engine.
        copy: The folder that `universal_copy` provides.
        num_updates: Updates that the optimiser had made.
    """
    load_checkpoint(engine, copy)
    _separate_step_counters(engine.optimizer.optimizer, num_updates)


def _convert(checkpoint: Path, copy: Path, source: str, world: World) -> None:
    temporary = copy.with_name(f"tmp-{copy.name}")
    started = time.monotonic()
    if world.is_main:
        say(f"converting {checkpoint.name} for another number of processes or ZeRO stage")
    fault = (
        _run_converter(checkpoint, temporary, world)
        or try_together(lambda: _bridge(checkpoint, temporary) if world.is_main else None)
        or try_together(lambda: seal(temporary, world, source=source))
        or try_together(lambda: _publish(temporary, copy) if world.is_main else None)
    )
    if fault:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{checkpoint} could not be converted for this run's processes and ZeRO stage: {fault}")
    if world.is_main:
        say(f"converted to {copy} in {time.monotonic() - started:.1f} s")


def _publish(temporary: Path, copy: Path) -> None:
    remove_sealed(copy)
    temporary.rename(copy)


def _run_converter(checkpoint: Path, temporary: Path, world: World) -> str | None:
    """Run DeepSpeed's converter on rank zero and report progress; return its last output if it failed.

    All ranks synchronise every few seconds, so that no collective times out.
    """
    process, fault, num_parameters, started = None, None, 0, time.monotonic()
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            num_parameters = _count_parameters(checkpoint)
            process = _start_converter(checkpoint, temporary)
        except (OSError, *ODD) as error:
            fault = str(error)
    with contextlib.nullcontext() if process is None else ending_with_us(process):
        while any(distributed.gather_objects(_is_converting(process, temporary, num_parameters, started))):
            pass
    if process is not None and process.returncode:
        last = (temporary / "converter.log").read_text(errors="replace").strip().splitlines()[-1:]
        fault = f"DeepSpeed's converter ended with {process.returncode}: {' '.join(last)}"
    if world.is_main:
        (temporary / "converter.log").unlink(missing_ok=True)
    return distributed.agree(fault)


def _is_converting(
    process: "subprocess.Popen[bytes] | None", temporary: Path, num_parameters: int, started: float
) -> bool:
    """Wait a few seconds for the converter, report progress, return whether it still runs; False without one."""
    if process is None:
        return False
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=REPORT_EVERY_S)
    done = len(list(temporary.glob("zero/*/exp_avg_sq.pt")))
    what = f"{done} of {num_parameters} parameters merged" if done else "splitting the shards"
    say(f"  {what}, {time.monotonic() - started:.0f} s")
    return process.poll() is None


def _start_converter(checkpoint: Path, temporary: Path) -> "subprocess.Popen[bytes]":
    """Start the converter as a process without the launch's environment variables and GPUs."""
    launch = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launch}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONUNBUFFERED"] = "1"  # otherwise its output comes after its traceback
    workers = str(max(1, min(8, (os.cpu_count() or 2) // 2)))
    paths = [str(Path(everest_ds.__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", "everest_ds.processes", "everest_ds.train.checkpoints.converter"]
    command += ["--inject_missing_state"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(temporary)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    with (temporary / "converter.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _count_parameters(checkpoint: Path) -> int:
    shapes = _model_states(checkpoint)["param_shapes"]
    return sum(len(group) for group in shapes) if isinstance(shapes, list) else len(shapes)


def _bridge(checkpoint: Path, temporary: Path) -> None:
    """Run `_bridge_stages`; report unexpected contents as a RuntimeError, which all ranks get like a full disk."""
    try:
        _bridge_stages(checkpoint, temporary)
    except ODD as error:
        raise RuntimeError(f"DeepSpeed did not write its contents: {type(error).__name__}: {error}") from error


def _bridge_stages(checkpoint: Path, temporary: Path) -> None:
    """Add to a universal folder the files that the loaders of all stages need.

    ZeRO-1 and 2 expect another name for the model's states than ZeRO-3; weights always come from zero/. Groups are
    listed without hyper-parameters, because the new optimiser's own are the right ones.
    """
    states = {key: value for key, value in _model_states(checkpoint).items() if key not in ("module", "optimizer")}
    for path in temporary.glob("*_model_states.pt"):
        path.unlink()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save(states, temporary / name)
    path = temporary / "zero" / "optimizer_state.pt"
    num_groups = len(read_shard(path, has_objects=True, mmap=True)["param_groups"])
    train_state = read_state(checkpoint)
    step = torch.tensor(float(train_state.step - train_state.num_skipped))
    bridged = {
        "ds_version": states["ds_version"],
        "clip_grad": states["ds_config"]["gradient_clipping"],
        "param_groups": [{} for _ in range(num_groups)],
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{}]},
    }
    torch.save(bridged, path)
    # DeepSpeed records the converted folder in its own pointer, which the seal makes unnecessary.
    (checkpoint.parent / "latest_universal").unlink(missing_ok=True)
    for tensor_path in (temporary / "zero").glob("*/*.pt"):
        tensor = read_shard(tensor_path)
        if (
            torch.is_tensor(tensor) and tensor_path.stem != "step"
        ):  # ZeRO-3 is converted to bare tensors; ZeRO-1 and 2 expect a name
            torch.save({"param": tensor, "cat_dim": 0}, tensor_path)


def _model_states(checkpoint: Path) -> dict[str, Any]:
    """Read the first file of model states in a checkpoint."""
    path = sorted(checkpoint.glob("*mp_rank_00_model_states.pt"))[0]
    loaded: dict[str, Any] = read_shard(path, mmap=True)
    return loaded


def _separate_step_counters(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    """Give the state of every flat parameter its own step counter, as torch does."""
    fused = bool(optimizer.defaults.get("fused"))
    for parameter, state in optimizer.state.items():
        device = parameter.device if fused else torch.device("cpu")
        state["step"] = torch.tensor(float(num_updates), dtype=torch.float32, device=device)
