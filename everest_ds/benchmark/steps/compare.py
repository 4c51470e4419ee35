"""`everest benchmark step RECIPE --compare everest videomae`: our step and the official ones, interleaved.

Both sides have the same weights and clips. They do a forward and a backward pass, with targets and loss, from fresh
gradients and without an optimiser step. Ours standardises uint8 clips; the official code gets standardised ones, as
from its loader. VideoMAE sees a tenth of the tokens in tubes and predicts all others. In bf16 our weights are bf16,
as under DeepSpeed, and theirs are float32 under autocast, as in their loop. With --precision autocast both are the
same. Official code is imported unchanged from the user's folder; modules that it does not find here are replaced.
"""

import contextlib
import importlib
import io
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import timm.layers
import timm.models
import torch
from torch import Tensor, nn

from everest_ds.benchmark.options import ReferenceName, StepOptions
from everest_ds.benchmark.report import StepReport, Table, rounded, run_fields
from everest_ds.benchmark.steps.timing import Side, SideTimes, interleave, measure_ceiling, step_times
from everest_ds.benchmark.steps.workbench import limit_memory, synthetic_batch
from everest_ds.config import PretrainConfig
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.model.tubelets import standardise
from everest_ds.tokens import count_tube_positions
from everest_ds.train.precision import Precision, choose_precision
from everest_ds.train.tasks import Task, make_task

OURS = "ours"
# VideoMAE shows a tenth of the tokens to its encoder (its recipes for Kinetics and SSv2).
TUBE_VISIBLE = 0.1
# Modules to import from the folder, in this order. Both repositories use these top-level names.
MODULES = ("modeling_finetune", "modeling_pretrain", "engine_for_pretraining")
# The only clips that the official models accept.
FRAMES, IMAGE_SIZE, TUBELET, PATCH = 16, 224, 2, 16
TABLE = Table(
    ("micro", 6, "d"), ("  side", 11, "<"), ("clips/s", 10, ".2f"), ("ms", 11, ".1f"), ("p90", 11, ".1f"),
    ("GiB", 8, ".2f"), ("ours/theirs", 13, ".3f"),
)  # fmt: skip


class Source(NamedTuple):
    """Environment variable and repository of official code, and the prefix of its models' names."""

    variable: str
    repository: str
    prefix: str


SOURCES: dict[ReferenceName, Source] = {
    "everest": Source("EVEREST_REFERENCE_DIR", "https://github.com/sunilhoho/EVEREST", "pretrain_videoms"),
    "videomae": Source("VIDEOMAE_REFERENCE_DIR", "https://github.com/MCG-NJU/VideoMAE", "pretrain_videomae"),
}


class OfficialCode(NamedTuple):
    """Official functions: one makes the model, the other is the training loop."""

    name: ReferenceName
    make_model: Callable[..., nn.Module]
    train_one_epoch: Callable[..., Any]


def benchmark_compare(config: PretrainConfig, options: StepOptions, sizes: Iterable[int], world: World) -> int:
    """Print a line for each micro-batch, and below the table each side's best rate; return 0."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision({}, options.precision, device.type)
    limit_memory(options.memory_gib, world)
    common = {
        **run_fields("step-compare", config, device, options),
        "precision": precision.name,
        "time": "cpu" if device.type == "cpu" else "wall",
        "includes": "forward, backward",
        "threads": torch.get_num_threads(),
        "ceiling_tflops": measure_ceiling(device),
    }
    report = StepReport(world, common, TABLE, _rows, as_json=options.json)
    best = dict.fromkeys((OURS, *options.compare), 0.0)
    rounds, names = {"rounds": options.steps, "warmup": options.warmup}, options.compare
    for line in compare_steps(config, names, sizes, precision=precision, device=device, **rounds):
        report.print(line)
        best = {name: max(rate, line.get(name, {}).get("clips_per_s", 0.0)) for name, rate in best.items()}
    if not options.json:
        print("\nat each side's best micro-batch: " + ", ".join(f"{n} {c:.2f} clips/s" for n, c in best.items()))
    return 0


def _rows(line: dict[str, Any]) -> Iterator[str]:
    size, *sides = line.items()
    for name, side in sides:
        if side["out_of_memory"]:
            yield f"{TABLE.row(size[1], f'  {name}')}  out of memory"
            continue
        values = (side[field] for field in ("clips_per_s", "step_ms_median", "step_ms_p90", "step_gib"))
        yield TABLE.row(size[1], f"  {name}", *values, side.get("ours_to_theirs"))


def compare_steps(
    config: PretrainConfig,
    names: Sequence[ReferenceName],
    micro_sizes: Iterable[int],
    *,
    precision: Precision,
    device: torch.device,
    rounds: int,
    warmup: int,
) -> Iterator[dict[str, Any]]:
    """Yield a line for each micro-batch until ours runs out of memory; a reference that does is left out then."""
    require_comparable(config, names)
    official = {name: load_official(name, config.model.size) for name in names}
    torch.manual_seed(config.run.seed)
    task = make_task(config).to(device)
    references = {}
    for name, code in official.items():
        model = make_official_model(code, config).to(device)
        model.load_state_dict(task.model.state_dict())  # both have the same names; a difference raises an error
        references[name] = OfficialStep(code, model, precision.matmul_dtype)
    task.to(precision.weights_dtype)
    for micro_size in micro_sizes:
        sides = _sides(task, references, micro_size, device, autocasts=precision.autocasts)
        times = interleave(sides, device, rounds=rounds, warmup=warmup)
        yield {"micro_batch": micro_size, **side_fields(times, micro_size)}
        if times[OURS].out_of_memory:
            return
        references = {name: step for name, step in references.items() if not times[name].out_of_memory}


def side_fields(times: dict[str, SideTimes], micro_size: int) -> dict[str, Any]:
    """Return the fields of a line by side: times, clips/s, loss, memory, and the ratio of ours to theirs."""
    ours = times[OURS]
    fields: dict[str, Any] = {}
    for name, side in times.items():
        fields[name] = {"out_of_memory": side.out_of_memory}
        if side.out_of_memory:
            continue
        fields[name] |= {
            "clips_per_s": round(micro_size / statistics.median(side.seconds), 4),
            **step_times(side.seconds),
            "loss": round(side.loss, 6),
            "step_gib": rounded(side.peak_gib),
        }
        if name != OURS and not ours.out_of_memory:
            ratios = [a / b for a, b in zip(ours.seconds, side.seconds, strict=True)]
            fields[name]["ours_to_theirs"] = round(statistics.median(ratios), 4)
    return fields


def _sides(
    task: Task, references: "References", micro_size: int, device: torch.device, *, autocasts: bool
) -> list[Side]:
    """Return our step and the official ones, on the same clips."""
    config = task.config
    assert isinstance(config, PretrainConfig)
    batch = synthetic_batch(task, micro_size, device, config.run.seed)
    inputs = task.inputs(batch, device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocasts, cache_enabled=False):
            loss: Tensor = task(*inputs)
        loss.backward()
        return float(loss.detach())

    sides = [Side(OURS, step, partial(task.zero_grad, set_to_none=True))]
    if references:
        videos_BCTHW = standardise(batch.clips_BCTHW)
        mask_BN = tube_mask(config, micro_size, device)
    for name, reference in references.items():
        take = partial(reference, videos_BCTHW, mask_BN)
        sides.append(Side(name, take, partial(reference.model.zero_grad, set_to_none=True)))
    return sides


def tube_mask(config: PretrainConfig, micro_size: int, device: torch.device) -> Tensor:
    """Return the mask of the tokens that VideoMAE hides, (B, N) bool; a tenth is visible, in tubes."""
    grid = config.grid
    num_tubes = count_tube_positions(grid, TUBE_VISIBLE)
    generator = torch.Generator(device).manual_seed(config.run.seed)
    noise_BJ = torch.rand(micro_size, grid.tokens_per_step, device=device, generator=generator)
    hidden_BJ = torch.ones_like(noise_BJ, dtype=torch.bool).scatter(
        1, noise_BJ.argsort(dim=1)[:, :num_tubes], False
    )
    return hidden_BJ.repeat(1, grid.time)


def require_comparable(config: PretrainConfig, names: Iterable[ReferenceName]) -> None:
    """Refuse a configuration that the official code does not support."""
    found = (config.data.num_frames, config.data.image_size, config.model.tubelet_size, config.model.patch_size)
    if found != (FRAMES, IMAGE_SIZE, TUBELET, PATCH):
        raise UserError(
            f"--compare: the official code takes {FRAMES} frames of {IMAGE_SIZE} pixels in tubelets of {TUBELET} x "
            f"{PATCH} x {PATCH}, got {found[0]} of {found[1]} in tubelets of {found[2]} x {found[3]} x {found[3]}; "
            "use a recipe like k400_vit_b"
        )
    if config.model.size not in ("small", "base", "large", "huge") or config.model.embedding_layers != 1:
        raise UserError(
            f"--compare: official models are small, base, large or huge, with one embedding layer; got "
            f"model.size={config.model.size}, model.embedding_layers={config.model.embedding_layers}"
        )
    selection = config.selection
    ours = (selection.strategy, selection.order, selection.distance, selection.targets, selection.budget)
    if "everest" in names and (ours != ("rero", "descending", "l2", "masked", "clip") or selection.alpha > 1):
        raise UserError(
            "--compare everest: the official code has only the selection rero, descending, l2, masked, clip, "
            f"alpha 1; got {', '.join(ours)}, alpha {selection.alpha}"
        )


def load_official(name: ReferenceName, size: str) -> OfficialCode:
    """Import official code from the folder that its environment variable names."""
    source = SOURCES[name]
    given = os.environ.get(source.variable)
    if not given:
        raise UserError(
            f"--compare {name}: {source.variable} is not set; clone {source.repository} and set it to the folder"
        )
    folder = Path(given)
    for module in MODULES:
        if not (folder / f"{module}.py").is_file():
            fault = f"{source.variable}={given} has no {module}.py"
            raise UserError(f"--compare {name}: {fault}; set it to a clone of {source.repository}")
    try:
        with _importable(folder):
            modules = {module: importlib.import_module(module) for module in MODULES}
    except ModuleNotFoundError as error:
        raise UserError(f"--compare {name}: the code in {given} needs {error.name}; pip install it") from error
    functions = {
        "modeling_pretrain": f"{source.prefix}_{size}_patch16_224",
        "engine_for_pretraining": "train_one_epoch",
    }
    found = []
    for module, function in functions.items():
        if not hasattr(modules[module], function):
            fault = f"{folder / module}.py has no {function}"
            raise UserError(f"--compare {name}: {fault}; set {source.variable} to a clone of {source.repository}")
        found.append(getattr(modules[module], function))
    return OfficialCode(name, *found)


def make_official_model(official: OfficialCode, config: PretrainConfig) -> nn.Module:
    """Return their model of a configuration's size, decoder and ratios, freshly initialised."""
    model, selection = config.model, config.selection
    # The official code takes masked shares and truncates: 1 - 0.3 and 1 - 0.1 give 470 and 156 of 1568 tokens.
    masking = {
        "motion_centric_masking": True,
        "motion_centric_masking_ratio": 1 - selection.selected_ratio,
        "masking_ratio": 1 - selection.visible_ratio,
    }
    common = {"decoder_depth": model.decoder_depth, "use_checkpoint": model.activation_checkpointing}
    return official.make_model(**common, **(masking if official.name == "everest" else {}))


class OfficialStep:
    """Forward and backward pass of the official training loop, without an optimiser step.

    Autocast uses ``dtype``; float32 means no autocast.
    """

    def __init__(self, official: OfficialCode, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self._official, self._dtype = model, official, dtype
        self._device = next(model.parameters()).device
        self._optimizer = torch.optim.AdamW(model.parameters())  # only clears gradients
        self._scaler = _BackwardOnly()

    def __call__(self, videos_BCTHW: Tensor, mask_BN: Tensor) -> float:
        """Run a step on standardised float32 clips and return its loss.

        mask_BN is True for tokens that the encoder does not see. EVEREST ignores it and makes its own mask.
        """
        with _measured_autocast(self._device, self._dtype), contextlib.redirect_stdout(io.StringIO()):
            self._official.train_one_epoch(
                self.model, [(videos_BCTHW, mask_BN)], self._optimizer, self._device, 0, self._scaler,
                patch_size=PATCH, normlize_target=True, start_steps=0,
            )  # fmt: skip
        return self._scaler.loss


References = dict[ReferenceName, OfficialStep]


class _BackwardOnly:
    """Replaces the official gradient scaler: only runs the backward pass."""

    loss = float("nan")

    def __call__(self, loss: Tensor, optimizer: Any, **options: Any) -> None:
        loss.backward()
        self.loss = float(loss.detach())

    def state_dict(self) -> dict[str, float]:
        return {"scale": 1.0}


def _no_metrics(**options: Any) -> SimpleNamespace:
    """Replace the official metrics: pass batches through and record nothing."""

    ignored = dict.fromkeys(("add_meter", "update", "synchronize_between_processes"), lambda *_, **__: None)
    return SimpleNamespace(meters={}, log_every=lambda batches, *_: iter(batches), **ignored)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Make a folder's modules importable, and restore sys afterwards; nothing is written to the folder.

    The original utils needs a module that newer versions of torch do not have. Our replacement logs nothing, which
    can only make their step faster. Models are called by name and not registered with timm.
    """
    ours: dict[str, Any] = {
        "timm.models.layers": timm.layers,  # the current name
        "timm.models.registry": SimpleNamespace(register_model=lambda make: make),
        "utils": SimpleNamespace(MetricLogger=_no_metrics, SmoothedValue=lambda **options: None),
    }
    names = (*ours, *MODULES)
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules.update(ours)
    path = [str(folder), *sys.path]
    try:
        with mock.patch.object(sys, "path", path), mock.patch.object(sys, "dont_write_bytecode", True):
            yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@contextlib.contextmanager
def _measured_autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Let the official loop use the measured precision and device; on a CPU, synchronising does nothing."""
    half = dtype != torch.float32
    autocast = partial(torch.autocast, device.type, dtype=dtype if half else torch.bfloat16, enabled=half)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device=None: None
    with (
        mock.patch.object(torch.cuda.amp, "autocast", autocast),
        mock.patch.object(torch.cuda, "synchronize", wait),
    ):
        yield
