"""Whether a run is still this launch's, looked at before anything that others read is written."""

from everest_ds.train.callbacks import Callback
from everest_ds.train.checkpoints.owner import Holding
from everest_ds.train.checkpoints.save import TrainState


class Ownership(Callback):
    """Refuses to continue a run that has another owner by now, or whose directory is gone.

    That is possible where locks do not reach, and after a machine stood still for a minute.
    """

    def __init__(self, holding: Holding) -> None:
        self._holding = holding

    def on_start(self) -> None:
        """Two launches may have begun at the same moment."""
        self._holding.require()

    def on_save(self, state: TrainState) -> TrainState:
        """See the class."""
        self._holding.require()
        return state
