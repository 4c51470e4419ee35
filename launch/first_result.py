"""Print the result of launch/quickstart.sh as one sentence, and draw it as one picture.

python launch/first_result.py OUT    OUT contains rero/, tube/, random/ and probe-rero/, ...; writes OUT/result.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

# Colours of Okabe and Ito, which people with any colour vision can distinguish.
STARTS = {
    "rero": ("ReRo", "#0072B2"),
    "tube": ("tube masking", "#E69F00"),
    "random": ("no pre-training", "#999999"),
}


def read_losses(run_dir: Path) -> tuple[list[int], list[float]]:
    """Return the recorded steps and losses of a run."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    return [line["step"] for line in steps], [line["loss"] for line in steps]


def draw(out: Path, top1: dict[str, float], chance: float) -> Figure:
    """Draw the top-1 scores in [0, 1] by start, and the losses of pre-training."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    names = [STARTS[start][0] for start in top1]
    drawn = bars.bar(names, [100 * score for score in top1.values()], color=[STARTS[start][1] for start in top1])
    bars.bar_label(drawn, fmt="%.0f %%")
    bars.axhline(100 * chance, color="black", linestyle=":", linewidth=1)
    bars.annotate("chance", (2.45, 100 * chance), ha="right", va="bottom", fontsize=8)
    bars.set(ylabel="top-1 of a linear probe (%)", ylim=(0, 100), title="Effect of pre-training")
    for start in ("rero", "tube"):
        name, colour = STARTS[start]
        curves.plot(*read_losses(out / start), color=colour, label=name)
    curves.set(xlabel="step", ylabel="loss on the predicted tokens", title="Pre-training")
    curves.legend(frameon=False)
    return figure


def main(out: Path) -> None:
    """Read the runs' scores, draw OUT/result.png and print the sentence."""
    summaries = {start: json.loads((out / f"probe-{start}" / "summary.json").read_text()) for start in STARTS}
    top1 = {start: summary["top1"] for start, summary in summaries.items()}
    num_classes = len(summaries["rero"]["per_class"])
    draw(out, top1, 1 / num_classes).savefig(out / "result.png", dpi=130)
    scores = ", ".join(f"{top1[start]:.0%} with {STARTS[start][0]}" for start in ("rero", "tube"))
    print(
        f"\nA linear probe has top-1 {scores}, and {top1['random']:.0%} without pre-training "
        f"(one seed, chance {1 / num_classes:.0%}): {out / 'result.png'}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
