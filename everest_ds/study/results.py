"""Write the results of a study: results.jsonl, a markdown table, and a plot for each table of the paper."""

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from everest_ds.config import PretrainConfig
from everest_ds.config.file import load_config
from everest_ds.files import write_atomically
from everest_ds.study.conditions import BASELINE, GROUPS, Condition, Group, Row
from everest_ds.study.jobs import Job, read_metrics
from everest_ds.study.paired import PairedTest, compare_pairs
from everest_ds.train.record.stored.evaluations import SUMMARY
from everest_ds.train.tasks import make_task

_HEADER = (
    "| condition | fine-tuned top-1, % | linear probe top-1, % | n | GMACs of a clip, pre-training / fine-tuning | "
    "seconds, pre-training / fine-tuning | paper, % |\n|---|---|---|---|---|---|---|"
)
_NOTES = (
    "Mean and standard deviation over seeds. GMACs of one clip, forward and backward. Seconds of the training "
    "steps, while other runs shared the machine. The paper's figures come from its own data and models: compare "
    "the order, not the values. Differences are paired by seed; p enumerates all choices of signs and is not "
    "corrected for multiple tests."
)
_PAIRED_HEADER = (
    "| the baseline minus | score | mean difference, points | interval (coverage) | p, two-sided | seeds ahead |\n"
    "|---|---|---|---|---|---|"
)
_SCORES = {"finetune_top1": "fine-tuned", "probe_top1": "linear probe"}
# Layout of a plot, in pixels.
_ROW, _LEFT, _WIDTH, _TOP, _BOTTOM, _RIGHT = 34, 330, 420, 58, 34, 24
_STYLE = """
  .paper { fill: #ffffff } .ink { fill: #1f2328 } .dim { fill: #59636e } .line { stroke: #d1d9e0 }
  .chance { stroke: #59636e } .tuned { stroke: #0969da; fill: #0969da } .probe { stroke: #bc4c00; fill: none }
  text { font: 13px system-ui, sans-serif } .small { font-size: 11px } .title { font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .ink { fill: #f0f6fc } .dim { fill: #9198a1 } .line { stroke: #3d444d }
    .chance { stroke: #9198a1 } .tuned { stroke: #4493f8; fill: #4493f8 } .probe { stroke: #f0883e }
  }
"""
_LEGEND = (
    f'<circle class="tuned" cx="{_LEFT}" cy="38" r="4"/>',
    f'<text class="dim small" x="{_LEFT + 10}" y="42">fine-tuned top-1, %</text>',
    f'<circle class="probe" stroke-width="2" cx="{_LEFT + 140}" cy="38" r="4"/>',
    f'<text class="dim small" x="{_LEFT + 150}" y="42">linear probe; dashed: chance; bars: deviation</text>',
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Scores and cost of one condition with one seed.

    Attributes:
        probe_top1: Top-1 on the test videos of a linear probe on pre-trained features, in [0, 1].
        finetune_top1: Top-1 on the test videos of the fine-tuned model, in [0, 1].
        visible_tokens: Tokens of a pre-training clip that the encoder sees.
        pretrain_gmacs: Multiply-accumulates of a pre-training clip, forward and backward, in units of 1e9.
        pretrain_s: Seconds of the pre-training steps.
    """

    condition: str
    seed: int
    probe_top1: float
    finetune_top1: float
    visible_tokens: int
    pretrain_gmacs: float
    finetune_gmacs: float
    pretrain_s: float
    finetune_s: float
    commands: tuple[str, ...]


def outcome_text(job: Job) -> str:
    if job.kind == "pretrain":
        return f"loss {read_metrics(job.out, 'train')[-1]['loss']:.4f}"
    return f"top-1 {_top1(job.out):.1%}"


def read_result(condition: Condition, seed: int, jobs: Sequence[Job]) -> Result | None:
    """Return the result of a condition with a seed; None if one of its runs is not complete."""
    names = {"pretrain": condition.pretraining, "probe": condition.pretraining, "finetune": condition.name}
    parts = {job.kind: job for job in jobs if job.name == f"{names[job.kind]}-{seed}"}
    if not all(job.is_done() for job in parts.values()):
        return None
    pretrain, finetune = parts["pretrain"].out, parts["finetune"].out
    config = load_config(pretrain / "config.json")
    assert isinstance(config, PretrainConfig)
    return Result(
        condition=condition.name,
        seed=seed,
        probe_top1=_top1(parts["probe"].out),
        finetune_top1=_top1(finetune),
        visible_tokens=config.num_visible,
        pretrain_gmacs=_clip_gmacs(pretrain),
        finetune_gmacs=_clip_gmacs(finetune),
        pretrain_s=seconds_of_steps(read_metrics(pretrain, "train")),
        finetune_s=seconds_of_steps(read_metrics(finetune, "train")),
        commands=tuple(job.command for job in parts.values()),
    )


def seconds_of_steps(lines: Sequence[dict[str, Any]]) -> float:
    """Return the seconds of a run's steps; each train line has the mean step time since the previous line."""
    pairs = itertools.pairwise([{"step": 0}, *lines])
    return sum(line["step_ms"] * (line["step"] - before["step"]) / 1e3 for before, line in pairs)


@lru_cache
def _clip_gmacs(run_dir: Path) -> float:
    return make_task(load_config(run_dir / "config.json")).clip_flops() / 2e9


def _top1(out: Path) -> float:
    if (out / SUMMARY).is_file():
        return float(json.loads((out / SUMMARY).read_text())["top1"])
    return float(read_metrics(out, "val")[-1]["top1"])


def write_report(folder: Path, results: Sequence[Result], *, chance: float) -> str:
    """Write results, paired tests, table and plots into a folder; return the table."""
    write_atomically(folder / "results.jsonl", "".join(json.dumps(asdict(result)) + "\n" for result in results))
    text = make_table(results, chance=chance)
    write_atomically(folder / "table.md", text + "\n")
    lines = [
        json.dumps({"group": group.name, "condition": row.condition, "score": score} | asdict(test)) + "\n"
        for group in GROUPS
        for row, score, test in _compare(_rows_of(group, results))
    ]
    write_atomically(folder / "paired.jsonl", "".join(lines))
    for group in GROUPS:
        if _rows_of(group, results):
            write_atomically(folder / f"{group.name}.svg", draw_group(group, results, chance=chance))
    return text


def make_table(results: Sequence[Result], *, chance: float) -> str:
    """Return the results as markdown, one table a group; groups without results are left out."""
    parts = [f"{_NOTES} Chance is {chance:.0%}."]
    for group in GROUPS:
        if rows := _rows_of(group, results):
            lines = [_table_row(row, own) for row, own in rows]
            parts.append("\n".join([f"**{group.title}**\n", _HEADER, *lines]))
            if tests := _compare(rows):
                parts.append("\n".join([_PAIRED_HEADER, *(_paired_row(*test) for test in tests)]))
    return "\n\n".join(parts)


def _rows_of(group: Group, results: Sequence[Result]) -> list[tuple[Row, list[Result]]]:
    """Return the rows that have results, with their results.

    Empty if only the baseline has some, except in the first group: the baseline is in every group.
    """
    found = [(row, [result for result in results if result.condition == row.condition]) for row in group.rows]
    found = [(row, own) for row, own in found if own]
    return found if group is GROUPS[0] or any(row.condition != BASELINE for row, _ in found) else []


def _table_row(row: Row, own: Sequence[Result]) -> str:
    tuned, probe = (_percent([getattr(r, name) for r in own]) for name in _SCORES)
    seconds = [statistics.fmean(getattr(r, name) for r in own) for name in ("pretrain_s", "finetune_s")]
    paper = "-" if row.paper is None else f"{row.paper:.2f}"
    return (
        f"| {row.label} | {tuned} | {probe} | {len(own)} | {own[0].pretrain_gmacs:.4f} / "
        f"{own[0].finetune_gmacs:.4f} | {seconds[0]:.0f} / {seconds[1]:.0f} | {paper} |"
    )


def _compare(rows: Sequence[tuple[Row, list[Result]]]) -> list[tuple[Row, str, PairedTest]]:
    """Test the baseline against each other row, for each score, over the seeds that both have (at least two)."""
    base = {result.seed: result for row, own in rows if row.condition == BASELINE for result in own}
    tests = []
    for row, own in rows:
        pairs = [(base[result.seed], result) for result in own if result.seed in base]
        if row.condition != BASELINE and len(pairs) > 1:
            for score in _SCORES:
                differences = [getattr(ours, score) - getattr(theirs, score) for ours, theirs in pairs]
                tests.append((row, score, compare_pairs(differences)))
    return tests


def _paired_row(row: Row, score: str, test: PairedTest) -> str:
    mean, low, high = (f"{100 * share:+.1f}" for share in (test.mean, test.low, test.high))
    return (
        f"| {row.label} | {_SCORES[score]} | {mean} | {low} to {high} ({test.coverage:.1%}) | "
        f"{test.p:.3f} | {test.ahead} of {test.n} |"
    )


def _percent(shares: Sequence[float]) -> str:
    """Return mean and sample standard deviation of shares in percent; the mean alone for a single share."""
    mean = f"{100 * statistics.fmean(shares):.1f}"
    return mean if len(shares) == 1 else f"{mean} ± {100 * statistics.stdev(shares):.1f}"


def draw_group(group: Group, results: Sequence[Result], *, chance: float) -> str:
    """Draw a group as SVG: two dots with error bars a condition, filled for fine-tuning, hollow for the probe."""
    rows = _rows_of(group, results)
    bottom = _TOP + _ROW * len(rows)
    width, height = _LEFT + _WIDTH + _RIGHT, bottom + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(group.title)}</title><style>{_STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        f'<text class="ink title" x="12" y="22">{escape(group.title)}</text>',
        *_LEGEND,
    ]
    for percent in range(0, 101, 20):
        x = _x(percent / 100)
        parts.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="dim small" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{percent}</text>')
    span = f'x1="{_x(chance):.1f}" x2="{_x(chance):.1f}" y1="{_TOP}" y2="{bottom}"'
    parts.append(f'<line class="chance" stroke-dasharray="3 3" {span}/>')
    for number, (row, own) in enumerate(rows):
        y = _TOP + _ROW * (number + 0.5)
        label = escape(row.label)
        parts.append(f'<text class="ink" x="{_LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        parts.append(_dot([result.finetune_top1 for result in own], y - 6, "tuned"))
        parts.append(_dot([result.probe_top1 for result in own], y + 6, "probe"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _dot(shares: Sequence[float], y: float, kind: str) -> str:
    mean, bar = statistics.fmean(shares), ""
    deviation = statistics.stdev(shares) if len(shares) > 1 else 0.0
    if deviation:
        low, high = (_x(min(max(mean + sign * deviation, 0), 1)) for sign in (-1, 1))
        bar = f'<line class="{kind}" stroke-width="2" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{bar}<circle class="{kind}" stroke-width="2" cx="{_x(mean):.1f}" cy="{y:.1f}" r="4"/>'


def _x(share: float) -> float:
    return _LEFT + _WIDTH * share
