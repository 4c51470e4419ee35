"""The study: settings of the conditions, arithmetic of the report, resuming and faults of the runner."""

from __future__ import annotations

import json
import math
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from everest_ds import cli
from everest_ds.config import FinetuneConfig, PretrainConfig
from everest_ds.errors import UserError
from everest_ds.study import jobs
from everest_ds.study.conditions import BASELINE, CONDITIONS, GROUPS, PRETRAININGS, StudyOptions
from everest_ds.study.jobs import Job, Runner
from everest_ds.study.results import Result, draw_group, make_table, seconds_of_steps, write_report
from everest_ds.study.runs import QUICK, Scale, make_jobs
from everest_ds.train.schedule import Schedule
from everest_ds.train.step.optim import learning_rate


def result(condition: str, seed: int, tuned: float, probe: float) -> Result:
    return Result(
        condition=condition, seed=seed, probe_top1=probe, finetune_top1=tuned, visible_tokens=32,
        pretrain_gmacs=0.0415, finetune_gmacs=0.0526, pretrain_s=20.0 + seed, finetune_s=10.0, commands=("a", "b"),
    )  # fmt: skip


def parsed(job: Job, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig | FinetuneConfig:
    """Return the configuration that a job's command gives."""
    seen: list[PretrainConfig | FinetuneConfig] = []
    with monkeypatch.context() as patch:
        patch.setattr("everest_ds.commands.train.check", lambda given, world: seen.append(given.config) or 0)
        assert cli.main(list(job.words)) == 0
    return seen[0]


def test_conditions_are_unique_and_every_row_of_a_table_is_one() -> None:
    names = [condition.name for condition in CONDITIONS]
    assert len(set(names)) == len(names)
    assert len({(condition.pretraining, condition.finetune) for condition in CONDITIONS}) == len(names)
    assert len(set(PRETRAININGS.values())) == len(PRETRAININGS)
    assert {condition.pretraining for condition in CONDITIONS} == set(PRETRAININGS)
    assert {row.condition for group in GROUPS for row in group.rows} == set(names)
    assert len({group.name for group in GROUPS}) == len(GROUPS)


def test_pretrainings_are_valid_and_show_the_encoder_equally_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = make_jobs(Path("s"), CONDITIONS, [0], Scale())
    configs = {job.name: parsed(job, monkeypatch) for job in jobs if job.kind == "pretrain"}
    assert set(configs) == {f"{name}-0" for name in PRETRAININGS}
    assert {config.num_visible for config in configs.values()} == {32}
    # Only the selection differs, and the condition without pre-training takes one step.
    baseline = configs["baseline-0"]
    for name, config in configs.items():
        assert (config.data, config.model, config.optim, config.batch) == (
            baseline.data, baseline.model, baseline.optim, baseline.batch,
        )  # fmt: skip
        assert config.run.max_steps == (1 if name == "none-0" else None)
    assert (
        len({config.selection for config in configs.values()}) == len(configs) - 1
    )  # "none" selects like the baseline


def test_no_pretraining_leaves_the_weights_as_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = make_jobs(Path("s"), CONDITIONS, [0], Scale())
    config = parsed(next(job for job in jobs if job.name == "none-0" and job.kind == "pretrain"), monkeypatch)
    assert Schedule.of(config, Scale().train).end_step == 1
    assert learning_rate(0, config.optim, config.batch, steps_per_epoch=37) == 0


def test_fine_tunings_are_valid_and_start_from_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = make_jobs(Path("s"), CONDITIONS, [3], Scale())
    tuned = {job.name: job for job in jobs if job.kind == "finetune"}
    assert set(tuned) == {f"{condition.name}-3" for condition in CONDITIONS}
    for condition in CONDITIONS:
        job = tuned[f"{condition.name}-3"]
        config = parsed(job, monkeypatch)
        assert config.run.seed == 3
        if condition.pretraining == "none":
            assert "--init-from" not in job.words
            continue
        assert job.words[job.words.index("--init-from") + 1] == f"s/runs/{condition.pretraining}-3/pretrain"
        assert job.needs is not None
        assert job.needs.name == f"{condition.pretraining}-3"
    kept = {
        name: parsed(tuned[f"{name}-3"], monkeypatch).num_kept for name in ("baseline", "ft-rho-0.15", "ft-all")
    }
    assert kept == {"baseline": 76, "ft-rho-0.15": 38, "ft-all": 256}


def test_pretrainings_run_once_a_seed_and_before_what_needs_them() -> None:
    jobs = make_jobs(Path("s"), CONDITIONS, [0, 1], Scale())
    assert len({job.out for job in jobs}) == len(jobs) == 2 * (2 * len(PRETRAININGS) + len(CONDITIONS))
    place = {id(job): i for i, job in enumerate(jobs)}
    assert all(place[id(job.needs)] < i for i, job in enumerate(jobs) if job.needs)
    ends = [i for i, job in enumerate(jobs) if job.name.endswith("-0")]
    assert max(ends) < len(jobs) / 2  # ordered by seed, so an unfinished study has complete seeds


def test_scale_of_a_quick_study_has_fewer_steps_and_the_main_conditions() -> None:
    assert QUICK.pretrain_epochs < Scale().pretrain_epochs
    assert QUICK.finetune_epochs < Scale().finetune_epochs
    names = [condition.name for condition in StudyOptions(quick=True).conditions]
    assert BASELINE in names
    assert len(names) < len(CONDITIONS)
    assert [condition.name for condition in StudyOptions(only=("tube",)).conditions] == ["tube"]


def test_physics_world_has_its_own_conditions_and_seeds() -> None:
    options = StudyOptions(world="physics")
    assert [condition.name for condition in options.conditions] == ["baseline", "random", "tube", "none"]
    assert options.seeds_to_run == (0, 1, 2, 3, 4, 5)
    assert StudyOptions(world="physics", quick=True).seeds_to_run == StudyOptions(quick=True).seeds_to_run == (0,)
    assert StudyOptions().seeds_to_run == (0, 1, 2)
    assert StudyOptions(world="physics", seeds=(7, 3)).seeds_to_run == (7, 3)
    assert [c.name for c in StudyOptions(world="physics", only=("l1",)).conditions] == ["l1"]


def test_physics_world_keeps_its_own_share_of_the_tokens_unless_a_condition_names_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ratio = StudyOptions(world="physics").keep_ratio
    jobs = make_jobs(Path("s"), CONDITIONS, [0], Scale(), ratio)
    kept = {job.name: parsed(job, monkeypatch).num_kept for job in jobs if job.kind == "finetune"}
    assert (kept["baseline-0"], kept["none-0"], kept["ft-rho-0.6-0"], kept["ft-all-0"]) == (38, 38, 153, 256)
    probes = [job.words for job in jobs if job.kind == "probe"]
    assert {words[words.index("--keep-ratio") + 1] for words in probes} == {"0.15"}
    assert StudyOptions().keep_ratio is None


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match=r"tubee: no such condition; did you mean 'tube'"):
        StudyOptions(only=("tubee",))
    for changes in (
        {"jobs": 0}, {"seeds": ()}, {"seeds": (1, 1)}, {"seeds": tuple(range(17))}, {"data_seed": -1},
        {"shake": 2, "world": "physics"},
    ):  # fmt: skip
        with pytest.raises(UserError):
            StudyOptions(**changes)


def test_seconds_of_steps_count_each_window_once() -> None:
    lines = [{"step": 50, "step_ms": 100.0}, {"step": 100, "step_ms": 40.0}, {"step": 110, "step_ms": 60.0}]
    assert seconds_of_steps(lines) == pytest.approx(50 * 0.1 + 50 * 0.04 + 10 * 0.06)
    assert seconds_of_steps([]) == 0


RESULTS = [
    *(result(BASELINE, seed, 0.70 + seed / 10, 0.60) for seed in range(3)),
    *(result("tube", seed, 0.50, 0.40 + seed / 10) for seed in range(2)),
]


def test_table_has_mean_deviation_count_and_the_papers_value_beside() -> None:
    text = make_table(RESULTS, chance=0.25)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    baseline, tube = (next(row for row in rows if row.startswith(start)) for start in ("| EVEREST", "| tube"))
    cells = [cell.strip() for cell in baseline.strip("|").split("|")]
    assert cells[1:] == ["80.0 ± 10.0", "60.0 ± 0.0", "3", "0.0415 / 0.0526", "21 / 10", "93.40"]
    assert [cell.strip() for cell in tube.strip("|").split("|")][1:4] == ["50.0 ± 0.0", "45.0 ± 7.1", "2"]
    assert "Chance is 25%" in text
    assert text.count("Tables 2 and 17") == 1
    assert "Table 9" not in text  # with the baseline alone there is nothing to compare


def test_table_pairs_the_baseline_with_each_condition_by_seed(tmp_path: Path) -> None:
    """Only seeds 0 and 1 are in both: fine-tuned 70, 80 against 50, 50; probe 60, 60 against 40, 50."""
    text = make_table(RESULTS, chance=0.25)
    rows = [line for line in text.splitlines() if "linear probe |" in line or "| fine-tuned |" in line]
    assert rows == [
        "| tube, all predicted | fine-tuned | +25.0 | +20.0 to +30.0 (50.0%) | 0.500 | 2 of 2 |",
        "| tube, all predicted | linear probe | +15.0 | +10.0 to +20.0 (50.0%) | 0.500 | 2 of 2 |",
    ]
    write_report(tmp_path, RESULTS, chance=0.25)
    lines = [json.loads(line) for line in (tmp_path / "paired.jsonl").read_text().splitlines()]
    assert [(line["group"], line["condition"], line["score"]) for line in lines] == [
        ("selection", "tube", "finetune_top1"), ("selection", "tube", "probe_top1"),
    ]  # fmt: skip
    assert [line["mean"] for line in lines] == pytest.approx([0.25, 0.15])
    assert "seeds ahead" not in make_table([RESULTS[0], RESULTS[3]], chance=0.25)  # one seed


def test_mean_and_deviation_are_plain_arithmetic() -> None:
    """Four values have the sample deviation (n - 1); a single value has none."""
    values = [0.5, 0.75, 0.625, 0.8]
    mean = sum(values) / 4
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 3)
    text = make_table([result(BASELINE, seed, value, 0.5) for seed, value in enumerate(values)], chance=0.25)
    assert f"| {100 * mean:.1f} ± {100 * deviation:.1f} | 50.0 ± 0.0 | 4 |" in text
    assert "| 66.9 ± 13.4 |" in text
    assert "| 50.0 | 40.0 | 1 |" in make_table([result(BASELINE, 0, 0.5, 0.4)], chance=0.25)


def test_plot_has_a_dot_for_each_score_where_it_belongs_and_dark_colours() -> None:
    text = draw_group(GROUPS[0], RESULTS, chance=0.25)
    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    tuned = [float(dot.get("cx")) for dot in root.iter(f"{space}circle") if dot.get("class") == "tuned"][1:]
    probe = [float(dot.get("cx")) for dot in root.iter(f"{space}circle") if dot.get("class") == "probe"][1:]
    ticks = {
        label.text: float(label.get("x"))
        for label in root.iter(f"{space}text")
        if label.text in ("0", "100") and label.get("text-anchor") == "middle"
    }

    def percent(x: float) -> float:
        return 100 * (x - ticks["0"]) / (ticks["100"] - ticks["0"])

    assert [percent(x) for x in tuned] == pytest.approx([80, 50], abs=0.05)
    assert [percent(x) for x in probe] == pytest.approx([60, 45], abs=0.05)
    bars = [line for line in root.iter(f"{space}line") if line.get("class") == "tuned"]
    assert [percent(float(bars[0].get(end))) for end in ("x1", "x2")] == pytest.approx([70, 90], abs=0.05)
    assert "prefers-color-scheme: dark" in text


def test_report_writes_results_table_and_plots(tmp_path: Path) -> None:
    write_report(tmp_path, RESULTS, chance=0.25)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["condition"], line["seed"]) for line in lines] == [
        *((BASELINE, seed) for seed in range(3)), *(("tube", seed) for seed in range(2)),
    ]  # fmt: skip
    assert (tmp_path / "table.md").read_text().startswith("Mean and standard deviation")
    assert [path.name for path in tmp_path.glob("*.svg")] == ["selection.svg"]


def scripted(folder: Path, name: str, *, fails: bool = False, needs: Job | None = None) -> Job:
    return Job(kind="probe", name=name, words=("1" if fails else "0", name), folder=folder / name, needs=needs)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the project's commands by jobs that write the summary of a complete job, or fail."""
    program = (
        "import os, pathlib, sys; fails, name, folder = sys.argv[1:]; print('looking'); print(f'this is {name}');"
        "out = pathlib.Path(folder) / 'probe'; out.mkdir(exist_ok=True);"
        "open(pathlib.Path(folder).parent / 'order.txt', 'a').write(name + os.environ['OMP_NUM_THREADS'] + ' ');"
        "sys.exit(1) if fails == '1' else (out / 'summary.json').write_text('{}')"
    )
    real = jobs.subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        folder = Path(options["stdout"].name).parent  # type: ignore[attr-defined]
        return real([sys.executable, "-c", program, *command[3:], str(folder)], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(jobs.subprocess, "Popen", popen)


@pytest.mark.usefixtures("scripts")
def test_runner_goes_past_a_failed_job_but_not_to_what_needs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, bad = scripted(tmp_path, "a"), scripted(tmp_path, "b", fails=True)
    jobs = [first, bad, scripted(tmp_path, "c", needs=bad), scripted(tmp_path, "d", needs=first)]
    runner = Runner(jobs=jobs, slots=1, num_gpus=0, on_done=lambda job: "fine")
    assert [job.name for job in runner.run()] == ["b", "c"]
    assert (tmp_path / "order.txt").read_text() == "a1 b1 d1 "
    said = capsys.readouterr().out
    assert f"FAILED probe b (exit code 1: this is b); see {tmp_path}/b/probe.log" in said
    assert "NOT RUN probe c" in said
    assert "[2/4] probe d: fine" in said
    assert (tmp_path / "a" / "probe.command").read_text() == "python -m everest_ds 0 a\n"


@pytest.mark.usefixtures("scripts")
def test_runner_leaves_done_jobs_alone_and_does_changed_ones_again(tmp_path: Path) -> None:
    jobs = [scripted(tmp_path, "a"), scripted(tmp_path, "b")]
    for _ in range(2):
        assert Runner(jobs=jobs, slots=2, num_gpus=0, on_done=lambda job: "fine").run() == []
    assert sorted((tmp_path / "order.txt").read_text().split()) == ["a1", "b1"]
    (tmp_path / "b" / "probe.command").write_text("python -m everest_ds something else\n")
    Runner(jobs=jobs, slots=2, num_gpus=0, on_done=lambda job: "fine").run()
    assert sorted((tmp_path / "order.txt").read_text().split()) == ["a1", "b1", "b1"]


def test_runs_are_spread_over_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("RANK", "1")
    runner = Runner(jobs=[], slots=4, num_gpus=2, on_done=lambda job: "")
    found = [runner._environment(slot) for slot in range(4)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in found] == ["4", "6", "4", "6"]
    assert "RANK" not in found[0]
    on_cpu = Runner(jobs=[], slots=1, num_gpus=0, on_done=lambda job: "")._environment(0)
    assert (on_cpu["DS_ACCELERATOR"], on_cpu["OMP_NUM_THREADS"]) == ("cpu", "1")
