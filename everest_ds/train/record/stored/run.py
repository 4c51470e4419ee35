"""Read a run directory, in any state, into the contents of a report."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everest_ds.config.file import CONFIGS
from everest_ds.errors import UserError
from everest_ds.files import read_json_object, scan_json_lines
from everest_ds.pictures.report.contents import BadDraws, ReportedRun, ScoredList, StoredPicture
from everest_ds.progress import format_duration
from everest_ds.train.checkpoints.listing import list_checkpoints
from everest_ds.train.checkpoints.owner import find_owner
from everest_ds.train.checkpoints.run_config import CONFIG, find_config_copy
from everest_ds.train.record.lines import METRICS
from everest_ds.train.record.stored.events import describe_events
from everest_ds.train.record.stored.measurements import Measurements
from everest_ds.train.record.stored.texts import flat_texts, moment_of, number_of, text_of

ENVIRONMENT = "environment.json"
_STEP = re.compile(r"step-(\d{1,12})\.png", re.ASCII)
_MOST_PICTURES, _MOST_HANGS, _MOST_HANG_BYTES = 8, 3, 6000
_MOST_REASONS, _FIRST_BAD, _LONGEST_REASON, _MOST_KNOWN = 8, 5, 160, 10_000
# Facts of the event `start` or `resume` that environment.json does not contain.
_OF_START = (
    "world_size", "zero_stage", "dtype", "autocast", "attention", "gradients", "compile_blocks", "cuda_graph",
    "reader", "parameters", "init_from",
)  # fmt: skip


def is_run(path: Path) -> bool:
    """Return whether a folder is a run directory: it has the config.json of a run or a metrics.jsonl."""
    return _read_config(path)[1] is None or (path / METRICS).is_file()


def read_run(path: Path, scores: Sequence[ScoredList] = ()) -> ReportedRun:
    """Read a run; its notes name the files and lines that could not be read.

    Args:
        path: The run directory.
        scores: Its evaluations.

    Raises:
        UserError: The folder has neither a run's configuration nor a measurement.
    """
    config, fault = _read_config(path)
    record = Measurements(path)
    if fault is not None and not record.num_lines:
        raise UserError(f"{path} is not a run: {fault}, and {METRICS} has no measurements")
    environment, environment_fault = (
        _read_object(path / ENVIRONMENT) if (path / ENVIRONMENT).exists() else ({}, None)
    )
    notes = [f"no settings: {fault}"] if fault is not None else []
    if environment_fault is not None:
        notes.append(environment_fault)
    if record.num_odd:
        notes.append(f"{record.num_odd} lines of {METRICS} are not measurements and were skipped")
    state, sentence = _judge(path, config, record)
    curves = {name: record.curve(name) for name in ("loss", "lr", "clips_per_s", "data_wait_ms", "grad_norm")}
    curves["val/top1"] = record.curve("top1", "val")
    start = {name: record.opening[name] for name in _OF_START if name in record.opening}
    bad = _read_bad(path / "bad_samples.jsonl")
    return ReportedRun(
        path=path,
        state=state,
        facts={"state": f"{state}: {sentence}"} | _describe(config, record, bad.count),
        curves={name: curve for name, curve in curves.items() if curve is not None},
        speed=_describe_speed(record),
        settings=flat_texts(config),
        environment=flat_texts(environment | {"at the last start": start} if start else environment),
        pictures=_find_pictures(path / "media"),
        bad=bad,
        events=describe_events(record),
        hangs=_read_hangs(path / "hangs"),
        scores=scores,
        notes=notes,
    )


def _read_config(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return a run's stored configuration, and None or why it could not be read."""
    raw, fault = _read_object(path / CONFIG)
    if fault is None and raw.get("task") in CONFIGS and isinstance(raw.get("recipe"), str):
        return raw, None
    try:
        copy = find_config_copy(list_checkpoints(path))
    except UserError:
        copy = None
    if copy is not None:
        return _read_object(copy)
    return {}, fault or f"{path / CONFIG} is not the configuration of a run"


def _read_object(path: Path) -> tuple[dict[str, Any], str | None]:
    if not path.is_file():  # reading a pipe of that name would never end
        return {}, f"there is no file {path}"
    try:
        return read_json_object(path), None
    except UserError as error:
        return {}, str(error)


def _judge(path: Path, config: Mapping[str, Any], record: Measurements) -> tuple[str, str]:
    """Return the state of a run, as a word and as a sentence."""
    owner, step, closing = find_owner(path), record.last_step, record.closing
    if owner is not None:
        return "training", f"by pid {owner.pid} on {owner.host} since {owner.since}; step {step} was recorded last"
    end_step = _end_step(config, record)
    if (closing or {}).get("event") == "end" or (closing is None and end_step is not None and step >= end_step > 0):
        return "finished", f"after step {step}"
    if closing is not None and closing.get("event") == "stopped":
        return "stopped", f"by {text_of(closing.get('signal'))} after step {step}, all saved; it can be resumed"
    if closing is not None and closing.get("event") == "hang":
        return "hung", f"after step {step}: {text_of(closing.get('why'))}"
    if closing is not None:
        return (
            "broken off",
            f"after step {step}: weights of ranks {text_of(closing.get('ranks'))} differ from others",
        )
    if step == 0:
        return "empty", "no step is recorded: it failed or was killed before that"
    of = "" if end_step is None else f" of {end_step}"
    return "broken off", f"no end is recorded after step {step}{of}: it failed or was killed"


def _end_step(config: Mapping[str, Any], record: Measurements) -> int | None:
    """Return the number of steps that a run is configured for; None if its record does not tell."""
    settings = flat_texts(config)
    most, epochs = (_parsed(settings.get(name, "")) for name in ("run.max_steps", "optim.epochs"))
    loss, epoch = record.curve("epoch"), record.last("epoch")
    whole = math.nan if loss is None or not epoch > 0 else round(float(loss.steps_P[-1]) / epoch * epochs, 3)
    known = [steps for steps in (most, whole) if steps == steps]
    return round(min(known)) if whole == whole or most == most else None


def _parsed(text: str) -> float:
    return float(text) if re.fullmatch(r"\d{1,12}", text, re.ASCII) else math.nan


def _describe(config: Mapping[str, Any], record: Measurements, num_bad: int) -> dict[str, str]:
    facts = {"recipe": text_of(config.get("recipe")), "task": text_of(config.get("task"))}
    if not config:
        facts = {}
    end_step = _end_step(config, record)
    facts["steps"] = f"{record.last_step}" + ("" if end_step is None else f" of {end_step}")
    if record.first_s == record.first_s:
        facts["began"] = moment_of(record.first_s)
    if record.last_s > record.first_s:
        facts["time to the last line"] = format_duration(record.last_s - record.first_s)
    loss = record.curve("loss")
    if loss is not None:
        first, last, least = loss.values_P[0], record.last("loss"), loss.values_P.min()
        ended = f"{last:.4f}" if last == last else "not finite"
        facts["loss"] = f"{first:.4f} first, {ended} last, {least:.4f} lowest"
    top1 = record.curve("top1", "val")
    if top1 is not None:
        best = int(top1.values_P.argmax())
        at = f"best at step {top1.steps_P[best]:.0f}"
        facts["validation top-1"] = f"{top1.values_P[best]:.2%} {at}, {top1.values_P[-1]:.2%} last"
    facts["starts"] = (
        f"{record.num_events['start'] + record.num_events['resume']}, {record.num_events['resume']} resumed"
    )
    facts["checkpoints saved"] = str(record.num_events["checkpoint"])
    facts["skipped steps"] = str(record.num_events["skipped_step"])
    facts["unreadable draws"] = str(num_bad)
    return facts


def _describe_speed(record: Measurements) -> dict[str, str]:
    """Return throughput, and measured and planned memory."""
    speed: dict[str, str] = {}
    rows: tuple[tuple[str, str, str, float], ...] = (
        ("clips/s, median", "clips_per_s", ".4g", 1),
        ("step, median", "step_ms", ".4g", 1),
        ("waiting for clips, median share", "stalled", ".1f", 100),
        ("MFU, median", "mfu", ".1f", 100),
        ("visible tokens/s, median", "tokens_per_s", ".4g", 1),
    )
    units = {"step_ms": " ms", "stalled": " %", "mfu": " %"}
    for title, name, form, factor in rows:
        median = record.median(name)
        if median == median:
            speed[title] = f"{median * factor:{form}}{units.get(name, '')}"
    memory, last = record.memory, record.last("memory_gib")
    peak, planned = number_of(memory.get("peak_gib")), number_of(memory.get("estimated_gib"))
    if peak == peak and planned == planned:
        is_cuda = memory.get("device") == "cuda"
        speed["peak memory"] = f"{peak:.3f} GiB {'allocated' if is_cuda else 'resident, with Python and libraries'}"
        speed["planned memory"] = f"{planned:.3f} GiB of tensors"
        if is_cuda and planned > 0:
            speed["measured against planned"] = f"{peak / planned - 1:+.1%}"
    elif last == last:
        speed["peak memory"] = f"{last:.3f} GiB so far"
        speed["planned memory"] = "recorded when a run ends"
    return speed


def _find_pictures(media: Path) -> list[StoredPicture]:
    """Return the newest picture of each folder of RUN/media, folders sorted by name."""
    found = []
    try:
        for folder in sorted(path for path in media.iterdir() if path.is_dir()):
            files = [path for path in folder.iterdir() if path.is_file()]
            steps = {int(match[1]): path for path in files if (match := _STEP.fullmatch(path.name))}
            if steps:
                what = "tokens kept by time step" if folder.name == "kept-by-step" else folder.name
                found.append(StoredPicture(path=steps[max(steps)], caption=f"{what}, step {max(steps)}"))
    except OSError:
        return found
    return found[:_MOST_PICTURES]


def _read_bad(path: Path) -> BadDraws:
    """Count the draws of bad_samples.jsonl."""
    reasons: Counter[str] = Counter()
    first: list[dict[str, str]] = []
    for _, line in scan_json_lines(path, lambda line: "path" in line) if path.is_file() else ():
        if line is None:
            continue
        reason = text_of(line.get("reason"))[:_LONGEST_REASON]
        reasons[reason if reason in reasons or len(reasons) < _MOST_KNOWN else "other reasons"] += 1
        if len(first) < _FIRST_BAD:
            first.append({name: text_of(line.get(name)) for name in ("path", "reason", "epoch", "index")})
    return BadDraws(count=reasons.total(), reasons=reasons.most_common(_MOST_REASONS), first=first)


def _read_hangs(folder: Path) -> list[tuple[str, str]]:
    """Return the reports of a run's latest hangs, newest first."""
    reports = []
    found = [path for path in folder.glob("*/report.txt") if path.is_file()]
    for path in sorted(found, reverse=True)[:_MOST_HANGS]:
        try:
            with path.open("rb") as file:
                text = file.read(_MOST_HANG_BYTES).decode("utf-8", "backslashreplace")
        except OSError as error:
            text = f"cannot be read: {error.strerror}"
        reports.append((path.parent.name, text.rstrip("\n")))
    return reports
