"""What the loader's processes do: items with pixels, made of what is asked for.

`everest_ds.data.dataset` makes training clips, `everest_ds.data.views` the views that score a video.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, Self, TypeVar

from torch import Tensor

from everest_ds.config.sections import DataConfig
from everest_ds.data.pool import Mark


class Item(Protocol):
    """What processes make: something small, and pixels."""

    @property
    def pixels(self) -> Tensor | None:
        """uint8; None where nothing could be read."""

    def with_pixels(self, pixels: Tensor | None) -> Self:
        """Return it with other pixels."""


AskIn = TypeVar("AskIn", contravariant=True)
MadeOut = TypeVar("MadeOut", bound=Item, covariant=True)


class Maker(Protocol[AskIn, MadeOut]):
    """What is asked for clips. Each process gets a copy."""

    @property
    def config(self) -> DataConfig:
        """How clips are loaded."""

    @property
    def item_bytes(self) -> int:
        """Bytes of an item's pixels at most."""

    def num_items(self, ask: AskIn) -> int:
        """Return how many items come of an ask."""

    def __call__(self, ask: AskIn, faults: Mapping[int, str], mark: Mark) -> Sequence[MadeOut]:
        """Make the items of an ask.

        Videos are opened in an order that the ask alone decides. The number of each, from 0, is marked before it is
        opened; one that ``faults`` names by its number is not opened but counts as bad for that reason.
        """
