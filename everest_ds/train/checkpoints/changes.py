"""Accepts and reports changes of a run's data since a checkpoint was saved."""

from dataclasses import replace

from everest_ds.data.lists.contents import describe_change
from everest_ds.train.checkpoints.save import TrainState


def accept_changes(was: TrainState, now: TrainState) -> tuple[TrainState, tuple[str, ...]]:
    """Return a run's state with this launch's data, and notes on what changed.

    Args:
        was: The state of the checkpoint. Fields that an older version did not write are not compared.
        now: The state of a fresh run with this launch's data.
    """
    notes = []
    if was.contents and now.contents and (changed := describe_change(was.contents, now.contents)):
        notes.append(f"training videos of the same names: {changed}; training continues with them")
    state = replace(was, contents=now.contents)
    if now.val_videos is None:
        return state, tuple(notes)
    state = replace(state, val_videos=now.val_videos, val_contents=now.val_contents)
    note = _describe_validation(was, now)
    if note and was.best_score is not None:
        state = replace(state, best_step=None, best_score=None)
        note += f"; the best score, {was.best_score:.4g} of step {was.best_step}, no longer counts"
    return state, (*notes, note) if note else tuple(notes)


def _describe_validation(was: TrainState, now: TrainState) -> str | None:
    """Return what changed in the validation list; None if nothing did or it is not known."""
    if was.val_videos is None or was.val_contents is None or now.val_contents is None:
        return None
    if was.val_videos != now.val_videos:
        return f"the validation list changed ({was.val_videos}, now {now.val_videos})"
    changed = describe_change(was.val_contents, now.val_contents)
    return f"validation videos of the same names: {changed}" if changed else None
