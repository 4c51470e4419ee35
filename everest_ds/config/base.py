"""The part of a run's configuration that both tasks share."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from everest_ds.config.sections import BatchConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, TaskName
from everest_ds.errors import UserError
from everest_ds.tokens import TokenGrid


@dataclass(frozen=True, kw_only=True)
class Config:
    """Complete configuration of one run; `PretrainConfig` and `FinetuneConfig` add the fields of their task."""

    recipe: Annotated[str, tyro.conf.Suppress]
    """Name of the recipe that the configuration started from."""
    task: Annotated[TaskName, tyro.conf.Suppress]
    """Task of the run."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _, _ = self.grid, self.position_grid  # both must divide into tubelets
        if self.batch.global_size % self.data.repeats:
            raise UserError(
                f"batch.global_size={self.batch.global_size} must be a multiple of data.repeats="
                f"{self.data.repeats}: a step uses all clips of its videos"
            )

    @property
    def grid(self) -> TokenGrid:
        """The token grid of one clip."""
        return self._grid(self.data.num_frames, self.data.image_size)

    @property
    def position_grid(self) -> TokenGrid:
        """The token grid of the position embeddings, before they are interpolated to `grid`."""
        frames, edge = self.model.position_frames, self.model.position_size
        return self._grid(frames or self.data.num_frames, edge or self.data.image_size)

    @property
    def tokens(self) -> str:
        """Token counts of a clip, in words."""
        return f"{self.grid.num_tokens} tokens a clip"

    def _grid(self, num_frames: int, edge: int) -> TokenGrid:
        tubelet, patch = self.model.tubelet_size, self.model.patch_size
        return TokenGrid.of_clip(
            num_frames=num_frames, height=edge, width=edge, tubelet_size=tubelet, patch_size=patch
        )

    def _require_two_steps(self) -> None:
        if self.grid.time < 2:
            raise UserError(
                f"data.num_frames={self.data.num_frames} is one time step of model.tubelet_size="
                f"{self.model.tubelet_size}, but importance compares a step with the one before; use at least "
                f"{2 * self.model.tubelet_size} frames"
            )
