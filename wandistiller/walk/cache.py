"""A store in a folder: the teacher's answers, asked for ahead of the training and learnt from without a teacher in memory.

The folder holds `cache.json`, which says what the answers are to, and a file of answers for each chunk of slots. A chunk is asked for
from beginning to end and written whole, and what it holds depends on its slots alone: several builders fill chunks of their own
without locks, in any order and on any machines, and a killed one begins the chunk in hand anew. Every answer has a checksum, which is
compared when it is read.
"""

import os
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.errors import UserError, differences
from wandistiller.files.atomic import remove_leftovers, write_json
from wandistiller.files.json_files import WHOLE, load_json
from wandistiller.files.output_folder import check_output_folder
from wandistiller.files.tensor_files import open_safetensors, read_header, write_tensors
from wandistiller.walk.draws import CACHE_ORDER, permutation
from wandistiller.walk.walk import Walk

DESCRIPTION_NAME = "cache.json"
FILE_NAME = "answers_{:06d}.safetensors"  # by the first slot of a chunk
FORMAT = 2
STORED_NAMES = ("latents", "velocity", "sigma", "prompts")
CHECKSUMS_NAME = "checksums"  # CRC-32 of every answer
# Latents and velocities are rounded to this. The rounding is far below the error that a student reaches.
STORED_DTYPE = torch.float16
# A cache has groups of slots beside those of a batch, so that builders can share them; each group makes about so many calls, enough for
# several paths of every slot.
CALLS_PER_GROUP, MAX_GROUPS, FEWEST_GROUPS = 32, 64, 4
MOST_SLOTS = 2**16  # of a batch: what a description may make this process count


class AnswerError(ValueError):
    """An answer cannot be stored. The message says what to do."""

    exit_code = 1


@dataclass(frozen=True)
class Layout:
    """How a cache's answers are shared out over slots, the same whoever asks for them.

    Attributes:
        num_calls: global batches of answers.
        batch_size: slots of a global batch.
        micro_batch: slots that the teacher is asked at together; a chunk.
        calls_per_group: fewest calls of a group of slots.
    """

    num_calls: int
    batch_size: int
    micro_batch: int
    calls_per_group: int = CALLS_PER_GROUP

    @property
    def num_groups(self) -> int:
        return min(MAX_GROUPS, max(self.num_calls // self.calls_per_group, min(self.num_calls, FEWEST_GROUPS)))

    @property
    def num_slots(self) -> int:
        return self.num_groups * self.batch_size

    @property
    def chunks(self) -> list[range]:
        """All slots, in the chunks that the teacher is asked at."""
        return [range(start, start + self.micro_batch) for start in range(0, self.num_slots, self.micro_batch)]

    def calls_of(self, chunk: range) -> int:
        """Return the calls of the group that a chunk belongs to; the first groups have the calls that are left over."""
        return len(range(chunk.start // self.batch_size, self.num_calls, self.num_groups))

    def of_part(self, part: int, num_parts: int) -> list[range]:
        """Return the chunks of builder or process `part` of `num_parts`, from 0."""
        return self.chunks[part::num_parts]


class TeacherCache:
    """A folder of answers, which is new, partly filled or complete.

    Args:
        description: what makes the answers what they are, as JSON values.

    Raises:
        UserError: the folder holds something else, or answers to something else (it says what differs), or is damaged.
    """

    def __init__(self, folder: str | Path, description: dict[str, Any], layout: Layout):
        self.folder = check_output_folder(folder, "--teacher_cache")
        self.description, self.layout = description, layout
        if os.path.lexists(self._file):
            self._read()
        elif self.folder.exists() and any(not path.name.endswith(".tmp") for path in self.folder.iterdir()):
            raise UserError(
                f"--teacher_cache {folder}: holds files and no {DESCRIPTION_NAME}, so it is not a teacher cache; give a new or empty "
                "folder"
            )

    @property
    def _file(self) -> Path:
        return self.folder / DESCRIPTION_NAME

    @property
    def is_complete(self) -> bool:
        """Whether all answers are there; looked at anew, since other builders may fill the rest."""
        return not self.missing(self.layout.chunks)

    def missing(self, chunks: Sequence[range]) -> list[range]:
        """Return those of the chunks that have no file of answers yet."""
        names = set(os.listdir(self.folder)) if self.folder.exists() else set()
        return [chunk for chunk in chunks if FILE_NAME.format(chunk.start) not in names]

    def file_of(self, chunk: range) -> Path:
        return self.folder / FILE_NAME.format(chunk.start)

    def _read(self) -> None:
        """Compare the description. A complete cache serves a run of any length, with its own layout."""
        try:
            found = load_json(self._file)
            made_of, layout = dict(found["answers_of"]), Layout(**found["layout"])
            fits = all(map(WHOLE.fits, vars(layout).values())) and layout.batch_size <= MOST_SLOTS
            if found["format"] != FORMAT or not fits:
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self._file}: is damaged or of another version; remove {self.folder} and run again, its answers are asked anew"
            ) from None
        if differing := differences(made_of, self.description):
            raise UserError(
                f"--teacher_cache {self.folder}: was made with {'; '.join(differing)}. Give another folder, or the same flags"
            )
        asked, self.layout = self.layout, layout
        if layout != asked and not self.is_complete:
            raise UserError(
                f"--teacher_cache {self.folder}: was begun for {layout.num_calls} batches of {layout.micro_batch} answers at a time, this run "
                f"asks for {asked.num_calls} of {asked.micro_batch}; give all builders the same length, --replay and batch, or another "
                "folder"
            )

    def fill(
        self, chunks: Sequence[range], walk_of: Callable[[range], Walk], on_progress: Callable[[int], None]
    ) -> None:
        """Ask for the answers of these chunks, as far as they are not there yet.

        Args:
            walk_of: returns a new walk of a range of slots.
            on_progress: called with the number of chunks that are done.

        Raises:
            UserError: the disk has too little room, or the folder cannot be written to.
            AnswerError: an answer is not finite, or too large for STORED_DTYPE.
        """
        try:
            self._begin(chunks)
            for done, chunk in enumerate(missing := self.missing(chunks)):
                on_progress(len(chunks) - len(missing) + done)
                answers = ask_chunk(walk_of(chunk), self.layout.calls_of(chunk))
                remove_leftovers(self.file_of(chunk))
                write_tensors(self.file_of(chunk), answers)
            on_progress(len(chunks))
        except OSError as error:
            raise UserError(
                f"--teacher_cache {self.folder}: cannot be written to ({error.strerror}); give another folder"
            ) from None

    def _begin(self, chunks: Sequence[range]) -> None:
        """Make the folder and say in it what its answers are to; refuse a disk without room for them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(self._file):
            about = {"format": FORMAT, "layout": vars(self.layout), "answers_of": self.description}
            write_json(self._file, about, indent=1, ensure_ascii=False)
        answers = sum(len(chunk) * self.layout.calls_of(chunk) for chunk in self.missing(chunks))
        needed = 2 * STORED_DTYPE.itemsize * answers * torch.Size(self.description["latent_shape"]).numel()
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise UserError(
                f"--teacher_cache {self.folder}: {answers:,} answers take {needed:,} bytes, {free:,} are free; give a folder on a larger "
                "disk, a larger --replay or fewer steps"
            )


def ask_chunk(walk: Walk, num_calls: int) -> dict[str, Tensor]:
    """Let the teacher answer `num_calls` times at the slots of a walk; return all answers (N, ...) as they are stored.

    Raises:
        AnswerError: an answer is not finite, or too large for STORED_DTYPE.
    """
    rows = range(len(walk.slots))
    found = [answer for call in range(num_calls) if (answer := walk.ask(call, rows))]
    answers = {name: torch.cat([_stored(name, answer[name]) for answer in found]) for name in STORED_NAMES}
    checksums = [
        checksum_of({name: values[row : row + 1] for name, values in answers.items()})
        for row in range(len(answers["sigma"]))
    ]
    return answers | {CHECKSUMS_NAME: torch.tensor(checksums)}


def _stored(name: str, values: Tensor) -> Tensor:
    if name not in ("latents", "velocity"):
        return values
    stored = values.to("cpu", STORED_DTYPE)
    if not stored.isfinite().all():
        raise AnswerError(
            f"the teacher's {name} are not finite, or more than {STORED_DTYPE} holds ({values.abs().max():.3g} at most); copy the "
            "checkpoint again, give --dtype fp32, lower --guidance_scale, or train without --teacher_cache"
        )
    return stored


def checksum_of(answer: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of tensors and their names, whatever order they come in."""
    checksum = 0
    for name in sorted(answer):
        values = answer[name].contiguous().flatten()
        checksum = zlib.crc32(values.view(torch.uint8).numpy().data, zlib.crc32(name.encode(), checksum))
    return checksum


def damaged_file(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: is missing or damaged ({reason}); copy it again, or remove it to ask the teacher anew")


def count_answers(path: Path, latent_shape: Sequence[int]) -> int:
    """Return the answers in a file, by its header alone.

    Raises:
        UserError: it is missing, damaged, or holds something else.
    """
    shapes = {name: stored.shape for name, stored in read_header(path).tensors.items()}
    count = shapes.get("sigma", ())[:1]
    latents = (*count, *latent_shape)
    expected = {"latents": latents, "velocity": latents, "sigma": count, "prompts": count, CHECKSUMS_NAME: count}
    if shapes != expected or not count:
        raise damaged_file(path, f"its tensors have the shapes {shapes}")
    return count[0]


class CachedAnswers:
    """The answers of a complete cache: every answer once an epoch, in another order each epoch. Only a batch is in memory.

    Args:
        slots: this process's range of the `batch_size` slots of a step.
    """

    def __init__(self, cache: TeacherCache, slots: range, batch_size: int, key: tuple[int, int], device: str = "cpu"):
        self.slots, self.batch_size, self.key, self.device = slots, batch_size, key, device
        self.files = [cache.file_of(chunk) for chunk in cache.layout.chunks]
        self.ends = list(accumulate(count_answers(file, cache.description["latent_shape"]) for file in self.files))
        opened = [open_safetensors(file) for file in self.files]
        self.slices = [{name: file.get_slice(name) for name in (*STORED_NAMES, CHECKSUMS_NAME)} for file in opened]

    def sample(self, step: int, rows: range) -> dict[str, Tensor]:
        """Return an answer for each of these slots at a step, as `Store.sample` does."""
        answers = [self._read(step * self.batch_size + self.slots[row]) for row in rows]
        batch = {name: torch.cat([answer[name] for answer in answers]) for name in STORED_NAMES}
        on_device = {name: to_device(batch[name].float(), self.device) for name in ("latents", "velocity")}
        return batch | on_device

    def _read(self, place: int) -> dict[str, Tensor]:
        """Return the answer at a place of an order without end.

        Raises:
            UserError: it is damaged.
        """
        epoch, place = divmod(place, self.ends[-1])
        index = int(permutation((*self.key, CACHE_ORDER, epoch), self.ends[-1])[place])
        number = bisect_right(self.ends, index)
        row = index - (self.ends[number - 1] if number else 0)
        answer = {name: values[row : row + 1] for name, values in self.slices[number].items()}
        checksum = int(answer.pop(CHECKSUMS_NAME))
        if checksum == checksum_of(answer):
            return answer
        raise damaged_file(self.files[number], f"its answer {row} is not the one that was written")
