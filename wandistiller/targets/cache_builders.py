"""Several builders fill teacher caches at once: processes that know nothing of each other, on one machine or on a shared file system.

A builder takes a part that is unfinished and that nobody has locked, asks for what it lacks and takes the next. Where none is left
to take it waits, since whoever is at work may die; the system lets go of the lock then, and the part is resumed where it was.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wandistiller.files.locks import holder_of
from wandistiller.targets.answers import TeacherAnswers
from wandistiller.targets.cache import TeacherCache
from wandistiller.targets.cache_parts import CachePart

POLL_S = 2.0


@dataclass(frozen=True)
class Filling:
    """A cache that is to be filled.

    Attributes:
        num_batches: answers that it is to hold, in batches.
        answers_of: makes the source of a part's answers, in its first state.
        on_part: called when this process begins with a part; returns what is called after every batch with their number so far.
    """

    cache: TeacherCache
    num_batches: int
    answers_of: Callable[[CachePart], TeacherAnswers]
    on_part: Callable[[CachePart], Callable[[int], None]]


def fill_together(fillings: Sequence[Filling], on_wait: Callable[[str], None]) -> None:
    """Fill caches together with whatever other builders there are; all are complete on return.

    Args:
        on_wait: called with what is being waited for, again where that has changed.

    Raises:
        UserError, AnswerError: as in `TeacherCache.build`.
    """
    for filling in fillings:
        filling.cache.begin()
    told = ""
    while unfinished := [filling for filling in fillings if not filling.cache.look_again()]:
        if any([_work_on(filling) for filling in unfinished]):
            continue
        waits = "; ".join(_others_work(filling.cache) for filling in unfinished)
        if waits != told:
            on_wait(waits)
            told = waits
        time.sleep(POLL_S)


def _work_on(filling: Filling) -> bool:
    """Do all of a cache that can be done here now; return whether there was anything."""
    cache, has_worked = filling.cache, False
    for part in cache.unfinished():
        with cache.taken(part) as is_mine:
            # Another builder may have finished it since it was listed:
            if is_mine and not cache.look_again() and part in cache.unfinished():
                _ask_for(filling, part)
                has_worked = True
    if cache.parts and not cache.is_complete and not cache.unfinished():
        cache.finish()
    return has_worked or cache.is_complete


def _ask_for(filling: Filling, part: CachePart) -> None:
    on_progress, answers = filling.on_part(part), filling.answers_of(part)
    if filling.cache.parts:
        filling.cache.build_part(part, answers, on_progress)
    else:
        filling.cache.build(answers, filling.num_batches, on_progress)


def _others_work(cache: TeacherCache) -> str:
    """Return which parts of a cache others are at work on, and who."""
    at_work = [
        f"part {part.index + 1} of {max(1, len(cache.parts))} ({holder_of(cache.lock_of(part))})"
        for part in cache.unfinished()
    ]
    return f"{cache.folder}: {', '.join(at_work)}"
