"""Clips to measure steps on: drawn from a seed, made on the device; no video is read and no copy waited for.

Axes: B clips, C channels, T frames, H W pixels, S values of noise, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.data.dataset import ClipBatch
from everest_ds.model.classifier import EverestClassifier
from everest_ds.train.selecting import num_pretrain_noise
from everest_ds.train.tasks import Task

# Pixels that what moves goes on from one frame to the next.
PIXELS_A_FRAME = 3


def moving_clips(count: int, num_frames: int, image_size: int, generator: torch.Generator) -> Tensor:
    """Return clips in which a textured square drifts over a textured ground that stands still.

    So some tokens change and others do not, as in video: selection by change and its budgets have work to do.

    Args:
        count: B.
        num_frames: T.
        image_size: H and W in pixels.
        generator: Of the device that the clips are made on.

    Returns:
        clips_BCTHW, uint8.
    """

    def texture(edge: int) -> Tensor:
        shape, device = (count, 3, edge, edge), generator.device
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)

    edge = max(image_size // 2, 1)
    clips_BCTHW = texture(image_size)[:, :, None].repeat(1, 1, num_frames, 1, 1)
    square_BCHW = texture(edge)
    for frame in range(num_frames):
        start = frame * PIXELS_A_FRAME % (image_size - edge + 1)
        clips_BCTHW[:, :, frame, start : start + edge, start : start + edge] = square_BCHW
    return clips_BCTHW


def synthetic_batch(task: Task, config: Config, count: int, device: torch.device, seed: int) -> ClipBatch:
    """Return a micro-batch as a loader would hand it over, on the device; the same for the same seed.

    Args:
        task: What the batch is for.
        config: The run.
        count: Clips.
        device: Where it is made.
        seed: Of pixels and noise.
    """
    generator = torch.Generator(device).manual_seed(seed)
    frames = config.candidate_frames if isinstance(config, PretrainConfig) else config.data.num_frames
    clips_BCTHW = moving_clips(count, frames, config.data.image_size, generator)
    noise_BS = torch.rand(count, _noise_length(task, config), device=device, generator=generator)
    label_B, target_BK = torch.zeros(count, dtype=torch.int64, device=device), None
    if isinstance(config, FinetuneConfig):
        assert config.data.num_classes is not None
        label_B = torch.arange(count, device=device) % config.data.num_classes
        target_BK = F.one_hot(label_B, config.data.num_classes).float() if config.data.mixes else None
    return ClipBatch(
        clips_BCTHW=clips_BCTHW,
        frames_BT=torch.arange(frames, device=device).expand(count, -1),
        noise_BS=noise_BS,
        label_B=label_B,
        index_B=torch.arange(count, device=device),
        target_BK=target_BK,
    )


def _noise_length(task: Task, config: Config) -> int:
    if isinstance(config, PretrainConfig):
        return num_pretrain_noise(config)
    assert isinstance(task.model, EverestClassifier)
    return task.model.num_noise(config.grid)
