"""Finds the rank that a hanging run waits for, from the last signs of life of all ranks."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass

from everest_ds.train.checkpoints.owner import Owner


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A rank's last sign of life.

    Attributes:
        rank: Its number.
        process: The process.
        beat: How many signs it has given.
        step: Optimiser steps taken.
        position: Phases entered so far; see `everest_ds.pulse`.
        phase: The last of them.
        idle_s: Seconds since its last progress.
        limit_s: Seconds without progress that count as a hang.
        call: The Python call that it is in.
        waits: Whether it waits for other ranks in that call, as far as Python can tell.
        queued: Collectives that it has queued so far, by torch's flight recorder; None if they are not recorded.
        is_hung: Whether it has detected the hang and is about to end.
    """

    rank: int
    process: Owner
    beat: int
    step: int
    position: int
    phase: str
    idle_s: float
    limit_s: float
    call: str
    waits: bool
    queued: int | None = None
    is_hung: bool = False

    def describe(self) -> str:
        """Return the sign in one line, without times."""
        where = "waits in" if self.waits else "is in"
        queued = "" if self.queued is None else f", {self.queued} collectives queued"
        return (
            f"rank {self.rank} (pid {self.process.pid} on {self.process.host}): {self.phase} after step {self.step}"
            f", {where} {self.call}{queued}"
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The ranks that block a run, and the evidence.

    Attributes:
        ranks: The blocking ranks; empty if no rank differs from the others.
        why: The evidence, in words.
    """

    ranks: list[int]
    why: str


def judge(signs: Sequence[Sign], silent: Collection[int]) -> Verdict:
    """Return which ranks block the run.

    The first of these that exist: silent ranks; of the ranks that do not wait, those with the least progress; if
    all wait, those that wait in a different place from most, because they skipped a call or made an additional one.

    Args:
        signs: The last sign of each rank that has given one.
        silent: Ranks that have stopped giving signs.
    """
    if silent:
        return Verdict(ranks=sorted(silent), why="no sign of life, while its peers wait")
    busy = [sign for sign in signs if not sign.waits]
    if busy:
        least = min(_progress(sign) for sign in busy)
        ranks = [sign.rank for sign in busy if _progress(sign) == least]
        if len(ranks) == len(signs) > 1:
            return Verdict(ranks=[], why="all ranks are in the same phase, and none waits in a Python call")
        return Verdict(ranks=ranks, why="behind: it has not reached the call in which its peers wait")
    if odd := _minority(signs, lambda sign: sign.position):
        return Verdict(ranks=odd, why="elsewhere: it waits in another phase than its peers, in a call they skip")
    if odd := _minority(signs, lambda sign: sign.call):
        return Verdict(ranks=odd, why="elsewhere: it waits in another call than its peers")
    queued = [sign for sign in signs if sign.queued is not None]
    if odd := _minority(queued, lambda sign: sign.queued):
        return Verdict(ranks=odd, why="elsewhere: it has queued another number of collectives than its peers")
    return Verdict(ranks=[], why="all ranks wait in the same call: probably the network or a device is blocked")


def _progress(sign: Sign) -> tuple[int, int]:
    return sign.position, sign.queued or 0


def _minority(signs: Sequence[Sign], key: Callable[[Sign], Hashable]) -> list[int]:
    """Return the ranks that differ from most, or of two equal groups those ahead; empty if all agree."""
    counts = Counter(key(sign) for sign in signs)
    if len(counts) < 2:
        return []
    ahead = {value: max(sign.position for sign in signs if key(sign) == value) for value in counts}
    most = max(counts, key=lambda value: (counts[value], -ahead[value]))
    return [sign.rank for sign in signs if key(sign) != most]
