"""Checks that this launch still owns its run, before anything that others read is written."""

from everest_ds.train.callbacks import Callback
from everest_ds.train.checkpoints.owner import Holding
from everest_ds.train.checkpoints.save import TrainState


class Ownership(Callback):
    """Ends a run that has another owner now, or whose directory was removed.

    That is possible if locks do not work across nodes, or after a machine was suspended for a minute.
    """

    def __init__(self, holding: Holding) -> None:
        self._holding = holding

    def on_start(self) -> None:
        """Check at the start, because two launches may have started at the same moment."""
        self._holding.require()

    def on_save(self, state: TrainState) -> TrainState:
        self._holding.require()
        return state
