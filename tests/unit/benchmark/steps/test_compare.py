"""The comparison: order of steps and ratios with a fake clock; a fake and the real folder of the official code.

The real code is tested only if EVEREST_REFERENCE_DIR and VIDEOMAE_REFERENCE_DIR name clones of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from everest_ds.benchmark.steps import compare
from everest_ds.benchmark.steps.compare import (
    MODULES,
    SOURCES,
    OfficialStep,
    compare_steps,
    load_official,
    make_official_model,
    require_comparable,
    side_fields,
    tube_mask,
)
from everest_ds.benchmark.steps.timing import Side, SideTimes, interleave
from everest_ds.config import PretrainConfig
from everest_ds.errors import UserError
from everest_ds.model.packing import TokenSet
from everest_ds.model.selection import Selection
from everest_ds.model.tubelets import standardise
from everest_ds.recipes import get_recipe
from everest_ds.train.precision import FP32
from everest_ds.train.tasks import make_task

CPU = torch.device("cpu")
FAKE = {
    "modeling_finetune": "import math\nfrom timm.models.layers import trunc_normal_\nWHO = {name!r}\n",
    "modeling_pretrain": """
import modeling_finetune
import torch
from timm.models.registry import register_model

class Model(torch.nn.Module):
    def __init__(self, options):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.options, self.who = options, modeling_finetune.WHO
    def forward(self, videos, mask):
        return self.weight * videos.mean() + mask.sum()

@register_model
def pretrain_{kind}_base_patch16_224(pretrained=False, **kwargs):
    return Model(kwargs)
""",
    "engine_for_pretraining": """
import torch
import utils

def train_one_epoch(model, data_loader, optimizer, device, epoch, loss_scaler, max_norm=0, patch_size=16,
                    normlize_target=True, log_writer=None, start_steps=None):
    logger = utils.MetricLogger(delimiter="  ")
    logger.add_meter("lr", utils.SmoothedValue(window_size=1))
    for videos, mask in logger.log_every(data_loader, 10, "Epoch"):
        print("noise")
        with torch.cuda.amp.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
            loss = model(videos, mask).sum() + (product.dtype == torch.bfloat16)
        optimizer.zero_grad()
        loss_scaler(loss, optimizer, clip_grad=max_norm, parameters=model.parameters(), create_graph=False)
        scale = loss_scaler.state_dict()["scale"]
        torch.cuda.synchronize()
        logger.update(loss=float(loss), scale=scale)
    logger.synchronize_between_processes()
    return {k: meter.global_avg for k, meter in logger.meters.items()}
""",
}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Create a fake folder for each reference; both contain modules of the same names."""
    folders = {}
    for name, kind in (("everest", "videoms"), ("videomae", "videomae")):
        folder = tmp_path / name
        folder.mkdir()
        for module, text in FAKE.items():
            (folder / f"{module}.py").write_text(text.replace("{name!r}", repr(name)).replace("{kind}", kind))
        monkeypatch.setenv(SOURCES[name].variable, str(folder))
        folders[name] = folder
    return folders


def base() -> PretrainConfig:
    config = get_recipe("k400_vit_b")
    assert isinstance(config, PretrainConfig)
    return config


def test_folders_of_equal_module_names_do_not_mix_and_leave_no_trace(fakes: dict[str, Path]) -> None:
    before, path = set(sys.modules), list(sys.path)
    autocast, synchronize = torch.cuda.amp.autocast, torch.cuda.synchronize
    for name in ("everest", "videomae", "everest"):
        official = load_official(name, "base")
        model = make_official_model(official, base())
        assert model.who == name
        OfficialStep(official, model, torch.float32)(torch.ones(1), torch.zeros(1))
    assert sys.path == path
    assert not {*MODULES, "utils"} & (set(sys.modules) - before)
    assert torch.cuda.amp.autocast is autocast
    assert torch.cuda.synchronize is synchronize
    assert sorted(p.name for p in fakes["everest"].iterdir()) == sorted(f"{module}.py" for module in MODULES)


def test_ratios_reach_the_official_model_as_it_wants_them(fakes: dict[str, Path]) -> None:
    options = make_official_model(load_official("everest", "base"), base()).options
    assert options["motion_centric_masking"]
    # The official code truncates: 470 selected and 156 visible tokens of 1568.
    assert int((1 - options["motion_centric_masking_ratio"]) * 1568) == base().num_selected == 470
    assert int((1 - options["masking_ratio"]) * 1568) == base().num_visible == 156
    assert options["decoder_depth"] == 4
    assert set(make_official_model(load_official("videomae", "base"), base()).options) == {
        "decoder_depth", "use_checkpoint",
    }  # fmt: skip


def test_step_goes_backward_in_the_asked_dtype_and_updates_nothing(
    fakes: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    official = load_official("everest", "base")
    model = make_official_model(official, base())
    videos, mask = torch.full((2,), 5.0), torch.zeros(1)
    assert OfficialStep(official, model, torch.float32)(videos, mask) == 15.0
    assert torch.equal(model.weight.grad, torch.full((3,), 5.0))
    assert OfficialStep(official, model, torch.bfloat16)(videos, mask) == 16.0  # the multiplication ran in bfloat16
    assert torch.equal(model.weight.grad, torch.full((3,), 5.0))  # not accumulated over calls
    assert torch.equal(model.weight, torch.ones(3))
    assert capsys.readouterr().out == ""


def test_code_that_is_not_there_is_named_with_the_way_out(
    fakes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"has no pretrain_videoms_large_patch16_224.*EVEREST_REFERENCE_DIR"):
        load_official("everest", "large")
    (fakes["everest"] / "modeling_finetune.py").write_text("import no_such_package\n")
    with pytest.raises(UserError, match="needs no_such_package; pip install it"):
        load_official("everest", "base")
    (fakes["everest"] / "engine_for_pretraining.py").unlink()
    with pytest.raises(UserError, match=r"has no engine_for_pretraining\.py; set it to a clone of https://"):
        load_official("everest", "base")
    monkeypatch.delenv("VIDEOMAE_REFERENCE_DIR")
    with pytest.raises(UserError, match=r"VIDEOMAE_REFERENCE_DIR is not set; clone https://.*VideoMAE"):
        load_official("videomae", "base")


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("data", {"num_frames": 8}, "got 8 of 224"),
        ("data", {"image_size": 112}, "got 16 of 112"),
        ("model", {"size": "tiny"}, "model.size=tiny"),
        ("model", {"embedding_layers": 2}, "model.embedding_layers=2"),
        ("selection", {"strategy": "random"}, "got random"),
        ("selection", {"distance": "cosine"}, "cosine"),
        ("selection", {"alpha": 1.5}, "alpha 1.5"),
    ],
)
def test_run_that_the_official_code_cannot_do_is_refused(
    section: str, changes: dict[str, object], message: str
) -> None:
    config = replace(base(), **{section: replace(getattr(base(), section), **changes)})
    with pytest.raises(UserError, match=message):
        require_comparable(config, ["everest"])
    if section == "selection":
        require_comparable(config, ["videomae"])


class Clock:
    """A clock that a step advances by its own duration."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, ""

    def __call__(self, device: torch.device) -> float:
        return self.now

    def side(self, name: str, seconds: Callable[[], float]) -> Side:
        def step() -> float:
            self.order += name[0]
            self.now += seconds()
            return 1.5

        return Side(name, step, lambda: None)


def test_sides_are_interleaved_and_the_median_of_ratios_counts() -> None:
    clock = Clock()
    ours, theirs = iter([9.0, 1.0, 1.0, 4.0]), iter([9.0, 2.0, 4.0, 4.0])
    sides = [clock.side("ours", lambda: next(ours)), clock.side("everest", lambda: next(theirs))]
    times = interleave(sides, CPU, rounds=3, warmup=1, clock=clock)
    assert clock.order == "oeeooeeo"
    assert times["ours"].seconds == [1.0, 1.0, 4.0]
    fields = side_fields(times, 2)
    assert fields["everest"]["ours_to_theirs"] == 0.5  # median of 1/2, 1/4 and 4/4
    assert fields["ours"]["clips_per_s"] == 2.0
    assert fields["everest"]["step_ms_median"] == 4000.0
    assert fields["everest"]["step_ms_p90"] == 4000.0
    assert fields["ours"]["step_gib"] is None
    assert "ours_to_theirs" not in fields["ours"]


def test_side_without_memory_leaves_the_others_alone() -> None:
    clock = Clock()

    def refuse() -> float:
        raise torch.OutOfMemoryError("no more")

    sides = [clock.side("ours", lambda: 1.0), clock.side("videomae", refuse), clock.side("everest", lambda: 2.0)]
    times = interleave(sides, CPU, rounds=2, warmup=1, clock=clock)
    assert clock.order.count("v") == 1
    fields = side_fields(times, 4)
    assert fields["videomae"] == {"out_of_memory": True}
    assert fields["everest"]["ours_to_theirs"] == 0.5


def test_sweep_leaves_out_who_did_not_fit_and_ends_with_us(
    fakes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three requested sizes, theirs fits in memory at one and ours at two."""
    seen: list[tuple[int, list[str]]] = []
    held = {"ours": 2, "everest": 1}

    def made_up(sides: list[Side], device: torch.device, **options: int) -> dict[str, SideTimes]:
        size = 2 ** len(seen)
        seen.append((size, [side.name for side in sides]))
        return {s.name: SideTimes(seconds=[1.0], out_of_memory=size > held[s.name]) for s in sides}

    monkeypatch.setattr(compare, "interleave", made_up)
    monkeypatch.setattr(compare, "make_task", lambda config: torch.nn.Linear(1, 1))
    monkeypatch.setattr(compare, "make_official_model", lambda *given: torch.nn.Linear(1, 1))
    monkeypatch.setattr(torch.nn.Linear, "model", property(lambda self: self), raising=False)
    monkeypatch.setattr(
        compare,
        "_sides",
        lambda task, refs, *o, **named: [Side(n, lambda: 0.0, lambda: None) for n in ("ours", *refs)],
    )
    lines = list(compare_steps(base(), ["everest"], [1, 2, 4, 8], precision=FP32, device=CPU, rounds=1, warmup=0))
    assert seen == [(1, ["ours", "everest"]), (2, ["ours", "everest"]), (4, ["ours"])]
    assert [line["micro_batch"] for line in lines] == [1, 2, 4]
    assert lines[-1]["ours"] == {"out_of_memory": True}


def test_our_side_autocasts_where_it_is_asked_to() -> None:
    config = get_recipe("demo")
    assert isinstance(config, PretrainConfig)
    torch.manual_seed(0)
    task = make_task(config)
    ((plain,), (lowered,)) = (compare._sides(task, {}, 2, CPU, autocasts=autocasts) for autocasts in (False, True))
    assert 0 < abs(lowered.step() / plain.step() - 1) < 1e-2
    assert {p.grad.dtype for p in task.parameters() if p.grad is not None} == {torch.float32}
    lowered.clear()
    assert all(p.grad is None for p in task.parameters())


def test_tubes_show_a_tenth_of_the_places_in_every_time_step() -> None:
    """The official generator hides int(0.9 * 196) = 176 of the 196 tokens of a time step."""
    mask_BN = tube_mask(base(), 3, CPU)
    assert mask_BN.shape == (3, 1568)
    hidden_BTJ = mask_BN.view(3, 8, 196)
    assert (hidden_BTJ.sum(dim=2) == 176).all()
    assert (hidden_BTJ == hidden_BTJ[:, :1]).all()
    assert not torch.equal(hidden_BTJ[0], hidden_BTJ[1])


@pytest.fixture(params=["everest", "videomae"])
def real(request: pytest.FixtureRequest) -> str:
    variable = SOURCES[request.param].variable
    if not os.environ.get(variable):
        pytest.skip(f"{variable} does not name a clone of {SOURCES[request.param].repository}")
    return request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_real_code_does_the_same_work(real: str) -> None:
    """With the same weights and clips, VideoMAE's loss equals ours; EVEREST's differs by its own noise only.

    Measured over four draws: VideoMAE's losses are identical, EVEREST's within 9e-4 relative.
    """
    config = replace(base(), model=replace(base().model, size="small"))
    torch.manual_seed(0)
    task = make_task(config)
    official = load_official(real, "small")
    model = make_official_model(official, config)
    model.load_state_dict(task.model.state_dict())
    clips = compare.synthetic_batch(task, 1, CPU, 0).clips_BCTHW
    mask_BN = tube_mask(config, 1, CPU)
    theirs = OfficialStep(official, model, torch.float32)(standardise(clips), mask_BN)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if real == "everest":
        ours = task(clips, torch.rand(1, 470)).item()
        assert theirs == pytest.approx(ours, rel=5e-3)
        return
    selection = Selection(visible=TokenSet.from_mask(~mask_BN), target=TokenSet.from_mask(mask_BN))
    output = task.model.reconstruct(clips, selection)
    assert F.mse_loss(output.prediction_RP, output.target_RP).item() == pytest.approx(theirs, rel=1e-5)
