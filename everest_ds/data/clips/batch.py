"""Training clips and batches of them.

Place in the flow: clip_CTHW uint8 of a sample -> pairs mixed -> ClipBatch, in pinned memory where there is a GPU ->
clips_BCTHW uint8 on the device. Axes: B clips, C T H W of a clip, S noise values, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from everest_ds.data.clips.augment import PairMixer
from everest_ds.data.clips.sampling import SampleKey
from everest_ds.data.clips.transforms import resize_crop
from everest_ds.data.loading.shared_memory import Layout
from everest_ds.errors import UserError

MAX_REPLACEMENTS = 10


@dataclass(frozen=True)
class BadSample:
    """A drawn sample whose video could not be read."""

    path: str
    reason: str
    epoch: int
    index: int
    repeat: int = 0


@dataclass(frozen=True)
class Clip:
    """One training sample; a lost one, if no replacement could be read either, contains only the failed draws.

    Small parts are arrays, because tensors would be passed between processes through files.

    Attributes:
        pixels: uint8, clip_CTHW, or crop_THWC if the device resizes it (data.resize); None for a lost clip.
        frames_T: int64, index in the video of each frame of the clip; empty for a lost clip.
        noise_S: float32 in [0, 1), as many values as the task asked for.
        label: Class of the row.
        index: Row of the list that was read.
        key: The requested key; its row differs from ``index`` if the requested video could not be read.
        target_K: float32, the shares of the classes; None if clips are not mixed.
        bad: Draws that failed before this one was read.
    """

    pixels: Tensor | None
    frames_T: NDArray[np.int64]
    noise_S: NDArray[np.float32]
    label: int
    index: int
    key: SampleKey
    target_K: NDArray[np.float32] | None = None
    bad: tuple[BadSample, ...] = ()

    @classmethod
    def lost(cls, key: SampleKey) -> "Clip":
        """Return the lost clip of a key for which no video could be read."""
        return cls(None, np.empty(0, np.int64), np.empty(0, np.float32), label=-1, index=key.index, key=key)

    @property
    def was_read(self) -> bool:
        return len(self.frames_T) > 0

    def with_pixels(self, pixels: Tensor | None) -> "Clip":
        return replace(self, pixels=pixels)


def mix_pairs(clips: Sequence[Clip], mixer: PairMixer) -> list[Clip]:
    """Mix the first clip with the second, the third with the fourth and so on; the partner of a lost clip stays."""
    if len(clips) % 2:
        raise ValueError(f"{len(clips)} clips do not make pairs to mix; batch.micro_size must be even")
    mixed: list[Clip] = []
    for first, second in zip(clips[::2], clips[1::2], strict=True):
        if first.pixels is not None and second.pixels is not None:
            labels = (first.label, second.label)
            clips_BCTHW, target_BK = mixer.mix(first.pixels, second.pixels, labels, first.key)
            both = zip((first, second), clips_BCTHW, target_BK.numpy(), strict=True)
            mixed += [replace(clip, pixels=pixels, target_K=target_K) for clip, pixels, target_K in both]
        else:
            for clip in (first, second):
                mixed.append(replace(clip, target_K=mixer.target(clip.label).numpy()) if clip.was_read else clip)
    return mixed


@dataclass
class ClipBatch:
    """One micro-batch.

    Attributes:
        clips_BCTHW: uint8; empty if the pixels are in ``crops``. Channels may be last in memory, as the decoder
            writes them: reordering would take time.
        frames_BT: int64, index in the video of each frame; for a mixed clip, in the video of ``index_B``.
        noise_BS: float32 in [0, 1), values that the task asked for with each clip.
        label_B: int64.
        index_B: int64, rows of the list.
        target_BK: float32, the shares of the classes in each clip; None if clips are not mixed.
        crops: uint8, crop_THWC of each clip, of any size, if the device resizes them (data.resize); else empty.
        bad: Draws that failed while this batch was made.
        num_lost: Samples that are missing because no replacement could be read either.
    """

    clips_BCTHW: Tensor
    frames_BT: Tensor
    noise_BS: Tensor
    label_B: Tensor
    index_B: Tensor
    target_BK: Tensor | None = None
    crops: list[Tensor] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)
    num_lost: int = 0

    @classmethod
    def collate(cls, clips: Sequence[Clip], *, crops: bool = False, pin: bool = False) -> "ClipBatch":
        """Copy clips into a batch, with ``crops`` as crops for the device to resize; lost clips are left out."""
        read = [clip for clip in clips if clip.was_read]
        pixels = [clip.pixels for clip in read if clip.pixels is not None]
        targets = [clip.target_K for clip in read if clip.target_K is not None]
        return cls(
            clips_BCTHW=_stack([] if crops else pixels, pin=pin),
            frames_BT=_to_tensor([clip.frames_T for clip in read], np.int64, pin=pin),
            noise_BS=_to_tensor([clip.noise_S for clip in read], np.float32, pin=pin),
            label_B=_to_tensor([clip.label for clip in read], np.int64, pin=pin),
            index_B=_to_tensor([clip.index for clip in read], np.int64, pin=pin),
            target_BK=_to_tensor(targets, np.float32, pin=pin) if targets else None,
            crops=[_stack([crop_THWC], pin=pin)[0] for crop_THWC in pixels] if crops else [],
            bad=[bad for clip in clips for bad in clip.bad],
            num_lost=len(clips) - len(read),
        )

    def require_whole(self) -> None:
        """Raise UserError for a batch with lost samples: more than `MAX_REPLACEMENTS` draws in a row failed."""
        if self.num_lost:
            last = self.bad[-1]
            raise UserError(
                f"{MAX_REPLACEMENTS + 1} videos drawn in a row cannot be read, the last is {last.path}: "
                f"{last.reason}; check the list and its storage"
            )

    def clips_on(self, device: torch.device, image_size: int) -> Tensor:
        """Return clips_BCTHW uint8 on a device, H = W = ``image_size``; crops are resized on the device."""
        if not self.crops:
            return self.clips_BCTHW.to(device, non_blocking=True)
        crops = [crop_THWC.to(device, non_blocking=True) for crop_THWC in self.crops]
        return torch.stack([resize_crop(crop_THWC, image_size) for crop_THWC in crops])


def _stack(parts: Sequence[Tensor], *, pin: bool) -> Tensor:
    """Stack uint8 tensors of one shape; unlike `torch.stack`, keeps the order of their axes in memory."""
    if not parts:
        return torch.empty(0, dtype=torch.uint8, pin_memory=pin)
    layout = Layout.of(parts[0])
    shape, stride = (len(parts), *layout.shape), (parts[0].numel(), *layout.stride)
    stacked = torch.empty_strided(shape, stride, dtype=torch.uint8, pin_memory=pin)
    for target, part in zip(stacked, parts, strict=True):
        target.copy_(part)
    return stacked


def _to_tensor(values: Sequence[object], dtype: DTypeLike, *, pin: bool) -> Tensor:
    tensor = torch.from_numpy(np.array(values, dtype=dtype))
    return tensor.pin_memory() if pin else tensor
