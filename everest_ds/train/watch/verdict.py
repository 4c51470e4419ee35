"""From the signs of all ranks to the rank that a hanging run waits for."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass

from everest_ds.train.checkpoints.owner import Owner


@dataclass(frozen=True, kw_only=True)
class Sign:
    """What a rank last said of itself.

    Attributes:
        rank: Its number.
        process: The process.
        beat: How often it has said something.
        step: Optimiser steps taken.
        position: Phases entered so far; see `everest_ds.pulse`.
        phase: The last of them.
        idle_s: Seconds since it got further.
        limit_s: Seconds after which that is a hang.
        call: Where its Python is.
        waits: Whether it waits for other ranks there, as far as Python can tell.
        queued: Collectives that it has queued so far, by torch's flight recorder; None where that has none.
        is_hung: Whether it has found the run hanging, and is about to end.
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
        """Return the sign in a line, without times."""
        where = "waits in" if self.waits else "is in"
        queued = "" if self.queued is None else f", {self.queued} collectives queued"
        return (
            f"rank {self.rank} (pid {self.process.pid} on {self.process.host}): {self.phase} after step {self.step}"
            f", {where} {self.call}{queued}"
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Who holds a run up, and why one thinks so.

    Attributes:
        ranks: Them; none where nobody stands out.
        why: In words.
    """

    ranks: list[int]
    why: str


def judge(signs: Sequence[Sign], silent: Collection[int]) -> Verdict:
    """Return who holds the run up.

    In this order: ranks that have stopped to give signs; those that do not wait while others wait for them, the
    one that got least far; where all wait, those that wait elsewhere than most: they took no part in a call, or
    in one too many.

    Args:
        signs: The last sign of each rank that ever gave one.
        silent: Ranks that give none any more.
    """
    if silent:
        return Verdict(ranks=sorted(silent), why="no sign of life, though its peers wait")
    busy = [sign for sign in signs if not sign.waits]
    if busy:
        least = min(_progress(sign) for sign in busy)
        ranks = [sign.rank for sign in busy if _progress(sign) == least]
        if len(ranks) == len(signs) > 1:
            return Verdict(ranks=[], why="all ranks are in the same phase, and none waits in a call of Python")
        return Verdict(ranks=ranks, why="behind: it does not come to where its peers wait")
    if odd := _minority(signs, lambda sign: sign.position):
        return Verdict(ranks=odd, why="elsewhere: it waits in another phase than its peers, for a call they skip")
    if odd := _minority(signs, lambda sign: sign.call):
        return Verdict(ranks=odd, why="elsewhere: it waits in another call than its peers")
    queued = [sign for sign in signs if sign.queued is not None]
    if odd := _minority(queued, lambda sign: sign.queued):
        return Verdict(ranks=odd, why="elsewhere: it has queued another number of collectives than its peers")
    return Verdict(ranks=[], why="all ranks wait in the same call: the network or a device holds them up")


def _progress(sign: Sign) -> tuple[int, int]:
    return sign.position, sign.queued or 0


def _minority(signs: Sequence[Sign], key: Callable[[Sign], Hashable]) -> list[int]:
    """Return the ranks that differ from most; of equally many those that are ahead. None where all agree."""
    counts = Counter(key(sign) for sign in signs)
    if len(counts) < 2:
        return []
    ahead = {value: max(sign.position for sign in signs if key(sign) == value) for value in counts}
    most = max(counts, key=lambda value: (counts[value], -ahead[value]))
    return [sign.rank for sign in signs if key(sign) != most]
