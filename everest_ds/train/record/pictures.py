"""RUN/media/: pictures of the same few clips during a run, and its curves at the end.

clips.npz                           the clips: the first ones of rank zero's first batch, cropped and augmented
clip-1/step-00000020.png            frames, importance, kept tokens, and what pre-training reconstructs
kept-by-step/step-00000020.png      tokens kept in each time step, averaged over the clips
curves.png                          the loss, and top-1 if videos are scored, at the end of the run

Rank zero draws. At ZeRO-3, where each rank has a part of every weight, all ranks gather the tubelet embedding and
nothing is reconstructed. With compiled blocks nothing is reconstructed either, because they would be compiled again
for these clips.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from everest_ds import distributed
from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.console.messages import say
from everest_ds.data.clips.batch import ClipBatch
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.distributed import World
from everest_ds.errors import escaped
from everest_ds.files import atomic_path
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.encoder import TokenEncoder
from everest_ds.model.selection import SelectionRule, keep_rule
from everest_ds.pictures.charts import draw_curves, draw_kept_by_step
from everest_ds.pictures.clip import HIDDEN, SEEN, PicturedClip
from everest_ds.pictures.clip_sheet import draw_clip
from everest_ds.pictures.examine import choose_frames, examine
from everest_ds.train.callbacks import Callback
from everest_ds.train.ema import gather_parameter
from everest_ds.train.record.lines import read_measurements
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.selecting import pretrain_rule
from everest_ds.train.tasks import Task

MEDIA, CLIPS = "media", "clips.npz"
NUM_CLIPS = 2
SHARE = 0.01
"""Maximum share of a run's time for drawing, apart from the first pictures and those after the last step."""
_TILE_PX = 112


class Pace:
    """When pictures are drawn: at the first log step, then every few steps, or less often if drawing is slow.

    Args:
        every: Steps from one picture to the next.
        start_step: Steps taken before this launch; a resumed run has its first pictures already.
    """

    def __init__(self, every: int, start_step: int = 0) -> None:
        self._every = every
        self._last = start_step or None
        self._spent_s = self._cost_s = 0.0

    def is_due(self, step: int) -> bool:
        """Return whether pictures are wanted after a step; the same on all ranks."""
        return self._last is None or step // self._every > self._last // self._every

    def passed(self, step: int) -> None:
        """Record that a step was due, whether it was drawn or not."""
        self._last = step

    def can_afford(self, elapsed_s: float) -> bool:
        """Return whether one more picture like the last stays within the share of the time."""
        return self._cost_s == 0 or self._spent_s + self._cost_s <= SHARE * elapsed_s

    def spend(self, seconds: float) -> None:
        """Record the time that a picture took."""
        self._spent_s += seconds
        self._cost_s = seconds


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownClips:
    """The clips that are drawn.

    Attributes:
        clips_BCTHW: uint8; all candidate frames if the run chooses frames.
        numbers_BT: The number of each frame in its video.
        names: Names of the videos.
    """

    clips_BCTHW: NDArray[np.uint8]
    numbers_BT: NDArray[np.int64]
    names: tuple[str, ...]

    @classmethod
    def of_batch(cls, batch: ClipBatch, rows: Sequence[VideoRow], image_size: int) -> "ShownClips":
        """Copy the first clips of a batch."""
        few = replace(batch, clips_BCTHW=batch.clips_BCTHW[:NUM_CLIPS], crops=batch.crops[:NUM_CLIPS])
        return cls(
            clips_BCTHW=few.clips_on(torch.device("cpu"), image_size).clone().contiguous().numpy(),
            numbers_BT=batch.frames_BT[:NUM_CLIPS].numpy().copy(),
            names=tuple(rows[int(index)].name for index in batch.index_B[:NUM_CLIPS]),
        )

    def save(self, path: Path) -> None:
        """Write the clips, so that a resumed run draws the same ones."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial, partial.open("wb") as file:
            names = np.array([escaped(name) for name in self.names])
            np.savez(file, clips=self.clips_BCTHW, numbers=self.numbers_BT, names=names)

    @classmethod
    def load(cls, path: Path) -> "ShownClips":
        """Read the file that `save` wrote; numpy's errors for other files are passed on."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(
                clips_BCTHW=stored["clips"], numbers_BT=stored["numbers"], names=tuple(map(str, stored["names"]))
            )


class Pictures(Callback):
    """Draws clips into RUN/media; if a picture fails, it warns and draws no more.

    It uses no random numbers of training: losses are bitwise identical with and without pictures.

    Args:
        run_dir: The run directory.
        task: The task, with the run's weights.
        rows: The training list.
        log: Shows the pictures in trackers.
        world: This rank.
        device: This rank's device.
        start_step: Steps taken before this launch.
        partitioned: Whether each rank has a part of every weight, as at ZeRO-3; then all ranks take part.
        autocasts: Whether matmuls of float32 weights are in bfloat16.
    """

    def __init__(
        self,
        run_dir: Path,
        task: Task,
        rows: Sequence[VideoRow],
        log: MetricsLog,
        *,
        world: World,
        device: torch.device,
        start_step: int,
        partitioned: bool,
        autocasts: bool,
    ) -> None:
        self._media, self._task, self._rows, self._log = run_dir / MEDIA, task, rows, log
        self._world, self._device = world, device
        self._partitioned, self._autocasts = partitioned, autocasts
        self._pace = Pace(task.config.run.pictures_every_steps, start_step)
        self._clips: ShownClips | None = None
        self._works = world.is_main
        self._has_logged = False
        self._drawn_step: int | None = None
        self._began = time.perf_counter()

    def on_start(self) -> None:
        """Load the clips of an earlier launch, if there are any."""
        self._began = time.perf_counter()
        path = self._media / CLIPS
        if self._works and path.is_file():
            try:
                self._clips = ShownClips.load(path)
            except Exception as error:
                say(f"warning: {path} cannot be read by this version and is replaced: {_first_line(error)}")

    def on_batch(self, batch: ClipBatch) -> None:
        if self._works and self._clips is None:
            with self._guarded():
                self._clips = ShownClips.of_batch(batch, self._rows, self._task.config.data.image_size)
                self._clips.save(self._media / CLIPS)

    def wants_log(self, step: int) -> bool:
        """Whether pictures are due; such a step always has a line of metrics, and a new window starts after it."""
        return step % self._task.config.run.log_every_steps == 0 and self._pace.is_due(step)

    def on_log(self, step: int, values: Mapping[str, Any]) -> None:
        self._has_logged = True
        if self.wants_log(step):
            self._pace.passed(step)
            self._draw(step)

    def on_end(self, step: int) -> None:
        """Draw the clips once more, after the last step, and the curves."""
        if self._has_logged:
            self._draw(step, at_end=True)
        if self._works:
            with self._guarded():
                lines = read_measurements(self._media.parent)
                train = [(line["step"], line["loss"]) for line in lines if _holds(line, "train", "loss")]
                scores = [(line["step"], line["top1"]) for line in lines if _holds(line, "val", "top1")]
                curves = {"training loss": train, "top-1 of the validation videos": scores}
                self._media.mkdir(parents=True, exist_ok=True)
                path = self._media / "curves.png"
                with atomic_path(path) as partial:
                    draw_curves(curves, title=self._media.parent.resolve().name).savefig(partial, format="png")
                with Image.open(path) as image:
                    self._log.image("curves", np.asarray(image.convert("RGB")), step)

    def _draw(self, step: int, *, at_end: bool = False) -> None:
        """Draw all pictures of a step, if rank zero has the time; at ZeRO-3 all ranks take part."""
        affords = at_end or self._pace.can_afford(time.perf_counter() - self._began)
        draws = self._works and affords and self._drawn_step != step
        if self._partitioned:
            draws_here, draws = draws, distributed.gather_objects(draws)[0]
            tensors = self._gather_embedding() if draws else {}
            draws = draws and draws_here
        else:
            tensors = {}
        if draws and self._clips is not None:
            started = time.perf_counter()
            with self._guarded():
                model = self._bare_embedding(tensors) if self._partitioned else self._task.model
                self._write(self._examine(model, self._clips), self._clips.names, step)
            self._pace.spend(time.perf_counter() - started)
            if self._drawn_step is None and self._works:
                self._log.say(f"pictures of what is kept: {self._media}")
            self._drawn_step = step

    def _gather_embedding(self) -> dict[str, Tensor]:
        """Return the whole tubelet embedding; all ranks take part."""
        named = _encoder_of(self._task.model).patch_embed.named_parameters()
        return {f"patch_embed.{name}": gather_parameter(p, self._device) for name, p in named}

    def _bare_embedding(self, tensors: Mapping[str, Tensor]) -> TokenEncoder:
        """Return an encoder without blocks that DeepSpeed does not manage."""
        encoder = _encoder_of(self._task.model)
        with torch.random.fork_rng(devices=[]):
            bare = TokenEncoder(replace(encoder.size, depth=0), encoder.grid, encoder.options)
        bare.load_state_dict(tensors, strict=True)
        return bare.to(self._device)

    def _examine(self, model: EverestAutoencoder | TokenEncoder, clips: ShownClips) -> list[PicturedClip]:
        config, rule = self._task.config, _rule_of(self._task.config)
        predicts = isinstance(config, PretrainConfig)
        pictures = []
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocasts):
            for clip_CTHW, numbers_T in zip(clips.clips_BCTHW, clips.numbers_BT, strict=True):
                pixels, numbers = torch.from_numpy(clip_CTHW).to(self._device), numbers_T
                if rule.num_steps is not None:
                    tubelet = config.model.tubelet_size
                    pixels, choice = choose_frames(model, pixels, rule, rule.num_steps)
                    place = choice.steps_BT[0].cpu().numpy()[:, None] * tubelet + np.arange(tubelet)
                    numbers = numbers_T[place.flatten()]
                reconstructs = predicts and not config.model.compile_blocks
                label = _describe(rule, config)
                pictures.append(
                    examine(
                        model,
                        pixels,
                        [(label, rule)],
                        predicts=predicts,
                        reconstructs=reconstructs,
                        numbers=numbers,
                    )
                )
        return pictures

    def _write(self, pictures: Sequence[PicturedClip], names: Sequence[str], step: int) -> None:
        for number, (picture, name) in enumerate(zip(pictures, names, strict=True), start=1):
            title = f"step {step}, clip {number}: {Path(name).name}"
            lines = ["as training gets it: cropped and augmented"]
            self._save(draw_clip(picture, title=title, lines=lines, tile_px=_TILE_PX), f"clip-{number}", step)
        roles_BThw = np.stack([picture.choices[0].roles(picture.grid) for picture in pictures])
        visible_T, predicted_T = (
            ((roles_BThw & role) > 0).sum(axis=(2, 3)).mean(axis=0) for role in (SEEN, HIDDEN)
        )
        title = f"step {step}: tokens kept in each time step, mean of {len(pictures)} clips"
        self._save(draw_kept_by_step(visible_T, predicted_T, title=title), "kept-by-step", step)

    def _save(self, image: Image.Image, name: str, step: int) -> None:
        path = self._media / name / f"step-{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            image.save(partial, format="PNG", compress_level=1)
        self._log.image(name, np.asarray(image), step)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn any error into a warning, and draw nothing afterwards."""
        try:
            yield
        except Exception as error:
            self._works = False
            say(f"warning: no more pictures in {self._media}: {_first_line(error)}; training continues")


def _encoder_of(model: EverestAutoencoder | TokenEncoder) -> TokenEncoder:
    return model.encoder if isinstance(model, EverestAutoencoder) else model


def _rule_of(config: Config) -> SelectionRule:
    if isinstance(config, PretrainConfig):
        return pretrain_rule(config)
    assert isinstance(config, FinetuneConfig)
    return keep_rule(config.selection)


def _describe(rule: SelectionRule, config: Config) -> str:
    varies = isinstance(config, PretrainConfig) and config.selection.varies
    return f"{rule.strategy} {rule.selected_ratio:g}{', as many as the average clip' if varies else ''}"


def _holds(line: Mapping[str, Any], kind: str, name: str) -> bool:
    return line["kind"] == kind and isinstance(line.get(name), int | float)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return escaped(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")
