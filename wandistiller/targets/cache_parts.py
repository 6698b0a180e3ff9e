"""A teacher cache is asked for in parts: one by one builder, one by each process of torchrun, or `--cache_parts` by whoever comes.

A part is asked for by itself: it has sampling paths of its own, whose state lies beside its shards, so that it is resumed where it was
stopped. Of several processes each writes shards in turn with the others, since they go on together. Parts that any builder may take
have shards in a row, so that their names and number are known before there is any answer.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from wandistiller.errors import first_line
from wandistiller.files.atomic import remove_leftovers
from wandistiller.files.safetensors_files import DamagedFileError, read_tensors, write_tensors
from wandistiller.model.image_sizes import shares
from wandistiller.targets.answers import TeacherAnswers
from wandistiller.targets.cache_shards import (
    CHECKSUMS_NAME,
    SHARD_BATCHES,
    SHARD_NAME,
    ask_batch,
    checksum_of,
    count_rows,
    damaged_file,
    write_shard,
)

STATE_NAME = "state{}.safetensors"
LOCK_NAME = ".part_{}.lock"


@dataclass(frozen=True)
class CachePart:
    """A part of a cache.

    Attributes:
        state_name: file of the state of its paths.
        numbers: of its shards, in order; more than it comes to need where that depends on how long it is asked.
        num_batches: that it holds once it is done; 0 where that is said when it is asked.
    """

    index: int
    state_name: str
    numbers: range
    num_batches: int = 0

    @property
    def lock_name(self) -> str:
        return LOCK_NAME.format(self.index)

    @property
    def last_name(self) -> str:
        """The shard that is written last, of a part whose number of batches is known."""
        return SHARD_NAME.format(self.numbers[-1])


def part_of_process(rank: int, num_processes: int) -> CachePart:
    """Return what one of so many processes asks for, which go on together; one by itself asks for everything."""
    mine = f"_{rank}_of_{num_processes}" if num_processes > 1 else ""
    return CachePart(0, STATE_NAME.format(mine), range(rank, sys.maxsize, num_processes))


def parts_of(num_batches: int, num_parts: int) -> list[CachePart]:
    """Split so many batches into parts as equal as can be; each has at least one batch."""
    counts = shares(num_batches, num_parts)
    ends = list(accumulate(math.ceil(count / SHARD_BATCHES) for count in counts))
    return [
        CachePart(index, STATE_NAME.format(f"_part_{index}"), range(start, end), count)
        for index, (start, end, count) in enumerate(zip([0, *ends], ends, counts, strict=False))
    ]


class PartBuild:
    """A part while it is asked for: the shards that it has, and the state of its paths after them.

    Args:
        latent_shape: (C, H, W) of its answers.
    """

    def __init__(self, folder: Path, part: CachePart, latent_shape: Sequence[int]):
        self.folder, self.part, self.latent_shape = folder, part, latent_shape
        self.state_file = folder / part.state_name
        self.num_shards = 0

    def remove_leftovers(self) -> None:
        """Remove what a builder of this part has left that was killed while it wrote a file."""
        remove_leftovers(self.state_file)
        own = {SHARD_NAME.format(number) for number in self.part.numbers}
        for path in self.folder.glob(".answers_*.tmp"):
            if path.name[1:].rsplit(".", 2)[0] in own:
                path.unlink(missing_ok=True)

    def resume(self, answers: TeacherAnswers) -> None:
        """Load the paths as they were after so many whole shards. What a killed build wrote beyond these is written again.

        Raises:
            UserError: the state, or one of these shards, is damaged.
        """
        state = self.state_file
        if not os.path.lexists(state):
            return
        try:
            saved = read_tensors(state)
            checksum = saved.pop(CHECKSUMS_NAME, None)
            if checksum is not None and not torch.equal(checksum, checksum_of(saved)):
                raise ValueError("its checksum differs")
            self.num_shards = int(saved.pop("num_shards"))
            answers.load_state_dict(saved)
        except DamagedFileError as error:
            raise damaged_file(state, error.reason) from None
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise damaged_file(state, f"it is not the state of a build: {first_line(error)}") from None
        for number in self.part.numbers[: self.num_shards]:
            count_rows(self.folder / SHARD_NAME.format(number), self.latent_shape)

    def ask(self, answers: TeacherAnswers, num_batches: int, on_progress: Callable[[int], None]) -> None:
        """Ask for what is missing of so many batches, and write it a shard at a time.

        Args:
            on_progress: called after every batch with the number of batches so far, including those of a stopped build.

        Raises:
            AnswerError: an answer is not finite, or too large to be stored.
        """
        while (done := answers.num_calls) < num_batches:
            count = min(SHARD_BATCHES, num_batches - done)
            batches = [ask_batch(answers, done + index, on_progress) for index in range(count)]
            write_shard(self.folder / SHARD_NAME.format(self.part.numbers[self.num_shards]), batches)
            self.num_shards += 1
            if answers.num_calls == self.part.num_batches:
                return  # its last shard says that the part is done, and by now another builder may have tidied up
            state = answers.state_dict() | {"num_shards": torch.tensor(self.num_shards)}
            write_tensors(self.state_file, state | {CHECKSUMS_NAME: checksum_of(state)})
