"""What came out of a study: results.jsonl, a table in markdown, and a plot for each table of the paper."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from everest_ds.files import write_atomically
from everest_ds.study.conditions import BASELINE, GROUPS, Group
from everest_ds.study.results import Result

_HEADER = (
    "| condition | fine-tuned top-1, % | linear probe top-1, % | n | GMACs of a clip, pre-training / fine-tuning | "
    "seconds, pre-training / fine-tuning | paper, % |\n|---|---|---|---|---|---|---|"
)
_NOTES = (
    "Mean and standard deviation over seeds. GMACs of one clip, forward and backward. Seconds of the steps alone, "
    "with other runs beside them. The paper's figures are of its own data and models: compare orders, not values."
)
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


@dataclass(frozen=True)
class Spread:
    """A mean and how far single values lie from it.

    Attributes:
        mean: The mean.
        deviation: The standard deviation of the sample, with n - 1; None of a single value.
        count: How many values.
    """

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of one or more values."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    def percent(self) -> str:
        """Return mean and deviation of shares, in percent."""
        if self.deviation is None:
            return f"{100 * self.mean:.1f}"
        return f"{100 * self.mean:.1f} ± {100 * self.deviation:.1f}"


def write_report(folder: Path, results: Sequence[Result], *, chance: float) -> str:
    """Write results, table and plots into a folder; return the table."""
    lines = [json.dumps(asdict(result)) + "\n" for result in results]
    write_atomically(folder / "results.jsonl", "".join(lines))
    text = make_table(results, chance=chance)
    write_atomically(folder / "table.md", text + "\n")
    for group in GROUPS:
        if _rows_of(group, results):
            write_atomically(folder / f"{group.name}.svg", draw_group(group, results, chance=chance))
    return text


def make_table(results: Sequence[Result], *, chance: float) -> str:
    """Return the results as markdown, one table a group; groups without any are left out."""
    parts = [f"{_NOTES} Chance is {chance:.0%}."]
    for group in GROUPS:
        rows = _rows_of(group, results)
        if rows:
            lines = [_table_row(label, own, paper) for label, own, paper in rows]
            parts.append("\n".join([f"**{group.title}**\n", _HEADER, *lines]))
    return "\n\n".join(parts)


def _rows_of(group: Group, results: Sequence[Result]) -> list[tuple[str, list[Result], float | None]]:
    """Return label, results and the paper's figure of the rows that have results.

    None where the baseline, which is in most groups, has nothing beside it; the first group has it anyway.
    """
    found = [
        (row, own)
        for row in group.rows
        if (own := [result for result in results if result.condition == row.condition])
    ]
    is_worth_it = group is GROUPS[0] or any(row.condition != BASELINE for row, _ in found)
    return [(row.label, own, row.paper) for row, own in found] if is_worth_it else []


def _table_row(label: str, own: Sequence[Result], paper: float | None) -> str:
    tuned = Spread.of([result.finetune_top1 for result in own])
    probe = Spread.of([result.probe_top1 for result in own])
    seconds = [statistics.fmean(values) for values in ([r.pretrain_s for r in own], [r.finetune_s for r in own])]
    shown = "-" if paper is None else f"{paper:.2f}"
    return (
        f"| {label} | {tuned.percent()} | {probe.percent()} | {tuned.count} | {own[0].pretrain_gmacs:.4f} / "
        f"{own[0].finetune_gmacs:.4f} | {seconds[0]:.0f} / {seconds[1]:.0f} | {shown} |"
    )


def draw_group(group: Group, results: Sequence[Result], *, chance: float) -> str:
    """Draw a group as SVG: a dot and an error bar a condition, filled for fine-tuning, hollow for the probe."""
    rows = _rows_of(group, results)
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _ROW * len(rows) + _BOTTOM
    bottom = _TOP + _ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(group.title)}</title><style>{_STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        f'<text class="ink title" x="12" y="22">{escape(group.title)}</text>',
        *_legend(),
    ]
    for percent in range(0, 101, 20):
        x = _place(percent / 100)
        parts.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="dim small" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{percent}</text>')
    x = _place(chance)
    parts.append(
        f'<line class="chance" stroke-dasharray="3 3" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
    )
    for place, (label, own, _) in enumerate(rows):
        y = _TOP + _ROW * (place + 0.5)
        parts.append(f'<text class="ink" x="{_LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        parts.append(_dot(Spread.of([result.finetune_top1 for result in own]), y - 6, "tuned"))
        parts.append(_dot(Spread.of([result.probe_top1 for result in own]), y + 6, "probe"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend() -> list[str]:
    y = 42
    return [
        f'<circle class="tuned" cx="{_LEFT}" cy="{y - 4}" r="4"/>',
        f'<text class="dim small" x="{_LEFT + 10}" y="{y}">fine-tuned top-1, %</text>',
        f'<circle class="probe" stroke-width="2" cx="{_LEFT + 140}" cy="{y - 4}" r="4"/>',
        f'<text class="dim small" x="{_LEFT + 150}" y="{y}">linear probe; dashed: chance; bars: deviation</text>',
    ]


def _dot(spread: Spread, y: float, kind: str) -> str:
    x = _place(spread.mean)
    bar = ""
    if spread.deviation:
        low, high = (_place(min(max(spread.mean + sign * spread.deviation, 0), 1)) for sign in (-1, 1))
        bar = f'<line class="{kind}" stroke-width="2" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{bar}<circle class="{kind}" stroke-width="2" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def _place(share: float) -> float:
    return _LEFT + _WIDTH * share
