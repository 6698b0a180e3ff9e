"""The teacher's answers on disk: asked for once, and learnt from without a teacher in memory.

The folder holds shards of answers as safetensors, and `cache.json`, which says what they are answers to. A shard holds a
checksum of every answer, which is compared when the answer is read: damage is never learnt from, and nothing is read twice for
it. While the folder is being built it also holds the state of the sampling paths, so that the same command resumes a build that was stopped.
cache_shards.py has the shards, cache_parts.py the parts that a cache is asked for in, cache_builders.py several builders at once.
"""

import contextlib
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.errors import UserError, shown
from wandistiller.files.atomic import remove_leftovers, write_json
from wandistiller.files.json_files import load_json
from wandistiller.files.locks import NoLocksError, locked_file, waited_for
from wandistiller.files.output_folder import check_output_folder
from wandistiller.files.safetensors_files import open_safetensors
from wandistiller.model.config import StudentConfig
from wandistiller.processes import Processes
from wandistiller.prompts.prompts import identity_of
from wandistiller.targets.answers import Answer, AnswerQueue, TeacherAnswers
from wandistiller.targets.cache_parts import CachePart, PartBuild, part_of_process
from wandistiller.targets.cache_shards import (
    CHECKSUMS_NAME,
    SHARD_BATCHES,
    SHARD_NAME,
    STORED_DTYPE,
    STORED_NAMES,
    checksum_of,
    count_rows,
    damaged_file,
)
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.state_dicts import check_order
from wandistiller.targets.states import StatesOptions
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import TeacherSettings
from wandistiller.wan.wan_files import WanFiles

DESCRIPTION_NAME = "cache.json"
LOCK_NAME = ".cache.lock"  # held while the description is made or completed
# Files that a process leaves if it is killed while it writes one of ours, and what several builders lock.
LEFTOVERS = tuple(f".{name}.*.tmp" for name in (DESCRIPTION_NAME, "state*.safetensors", "answers_*.safetensors"))
LOCKS = (LOCK_NAME, ".part_*.lock")


def teacher_fingerprint(wan_files: WanFiles) -> str:
    """Return what tells this teacher from others."""
    return wan_files.fingerprint()


def prompts_digest(prompts: Sequence[str]) -> str:
    """Return a digest of prompts, or of the templates that they are drawn from, without a copy of them all."""
    digest, texts = hashlib.sha256(), identity_of(prompts)
    separator = ""
    while some := list(islice(texts, 4096)):
        digest.update((separator + "\n".join(some)).encode())
        separator = "\n"
    return digest.hexdigest()[:16]


def describe_teacher(wan_files: WanFiles, settings: TeacherSettings) -> dict[str, object]:
    """Return what makes the teacher's velocities what they are: its weights, guidance and sampling."""
    guidance = {name: getattr(settings, name) for name in ("guidance_scale", "guidance_scale_2", "boundary_ratio")}
    recorded = settings.recorded()
    # Only where they are not usual, so that caches and checkpoints of runs without them stay those of the same run:
    unusual: dict[str, object] = {
        name: recorded[name] for name in ("teacher_sampler", "guidance_range") if name in recorded
    }
    return {
        "teacher": teacher_fingerprint(wan_files),
        **guidance,
        "negative_prompt": settings.negative_prompt if settings.uses_guidance else None,
        "shift": settings.shift,
        "num_inference_steps": settings.num_inference_steps,
        # The fingerprint is that of the weights as they lie on disk. Without LoRAs the description stays what it always was.
        **({"teacher_lora": [lora.identity for lora in wan_files.loras]} if wan_files.loras else {}),
        **unusual,
    }


def describe_cache(
    wan_files: WanFiles,
    settings: TeacherSettings,
    options: StatesOptions,
    prompts: Sequence[str],
    config: StudentConfig,
    batch_size: int,
) -> dict[str, Any]:
    """Return everything that makes the answers what they are, as JSON values."""
    description = {
        **describe_teacher(wan_files, settings),
        "text_max_length": config.text_max_length,
        "latent_shape": settings.latent_shape(config),
        **{f"states_{name}": value for name, value in asdict(options).items()},
        "batch_size": batch_size,
        "num_prompts": len(prompts),
        "prompts": prompts_digest(prompts),
    }
    return json.loads(json.dumps(description))  # as it will be read back


class TeacherCache:
    """A folder of answers, which is new, partly built or complete.

    Args:
        parts: those that any builder may take, where it is not asked for in one.

    Raises:
        UserError: the folder holds something else, or answers to something else (it says what differs), or is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        description: dict[str, Any],
        processes: Processes | None = None,
        parts: Sequence[CachePart] = (),
    ):
        self.folder = check_output_folder(folder, "--teacher_cache")
        self.description = description
        self.processes = processes or Processes()
        self.own_part = part_of_process(self.processes.rank, self.processes.count)
        self.parts = parts
        self.is_complete = False
        self.shards: list[Path] = []
        self.rows: list[int] = []  # answers in each shard
        self.has_checksums = True
        # Listed before the description is looked for, which another builder may write at any moment and before anything else:
        is_foreign = self._holds_other_files()
        if os.path.lexists(self._file):
            self._read()
        elif is_foreign:
            raise UserError(
                f"--teacher_cache {folder}: holds files and no {DESCRIPTION_NAME}, so it is not a teacher cache; give "
                "a new or empty folder"
            )

    @property
    def _file(self) -> Path:
        return self.folder / DESCRIPTION_NAME

    def _holds_other_files(self) -> bool:
        """Return whether the folder holds anything but locks and what a killed process leaves."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        return any(not any(fnmatch(name, pattern) for pattern in (*LEFTOVERS, *LOCKS)) for name in names)

    @property
    def num_answers(self) -> int:
        """Answers that are kept so far: all of them once `is_complete`."""
        return sum(self.rows)

    def prompts_asked_with(self) -> set[int]:
        """Return the indices of the prompts that the answers of a complete cache belong to."""
        return {index for path in self.shards for index in open_safetensors(path).get_tensor("prompts").tolist()}

    def look_again(self) -> bool:
        """Return whether the cache is complete by now; other builders may have done the rest."""
        if not self.is_complete and os.path.lexists(self._file):
            self._read()
        return self.is_complete

    # Reading

    def _read(self) -> None:
        """Read the description, and where the cache is complete the headers of its shards."""
        file = self._file
        try:
            found = load_json(file)
            made_of, is_complete = dict(found["answers_of"]), bool(found["is_complete"])
            # The first caches only had num_shards. A number beyond the files that are there needs no list.
            rows = list(
                found.get("rows") or [None] * min(int(found["num_shards"]), len(list(self.folder.iterdir())) + 1)
            )
            if is_complete and not rows:
                raise ValueError("a complete cache without answers")
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            raise UserError(
                f"{file}: is damaged; remove {self.folder} and run again, its answers are asked anew"
            ) from None
        differing = [
            f"{name} {shown(made_of.get(name))}, this run has {shown(self.description.get(name))}"
            for name in self.description | made_of
            if made_of.get(name) != self.description.get(name)
        ]
        if differing:
            raise UserError(
                f"--teacher_cache {self.folder}: was made with {'; '.join(differing)}. Give another folder, "
                "or the same flags"
            )
        self.is_complete = is_complete
        if not is_complete:
            self._check_builders(found)
            return
        self._index(range(len(rows)))
        if not self.has_checksums:
            print(
                f"Warning: {self.folder} was made by a version without checksums, so damage to its answers may go unnoticed"
            )
        for path, expected, count in zip(self.shards, rows, self.rows, strict=True):
            if expected not in (None, count):
                raise damaged_file(path, f"it holds {count} answers, {expected} were written")

    def _check_builders(self, found: dict[str, Any]) -> None:
        """Refuse to go on with what was begun in other parts, or for another number of batches."""
        num_processes, num_parts = found.get("num_processes", 1), found.get("num_parts", 1)
        refused = f"--teacher_cache {self.folder}: was "
        if num_parts != max(1, len(self.parts)):
            raise UserError(
                f"{refused}begun with --cache_parts {shown(num_parts)}, this run has {max(1, len(self.parts))}; go on with the same, or "
                "remove it and ask anew. A complete one serves any run"
            )
        if num_processes != self.processes.count:
            raise UserError(
                f"{refused}begun by {num_processes} processes, these are {self.processes.count}; go on with as many, or remove it and ask "
                "anew. A complete one serves any number"
            )
        num_batches = sum(part.num_batches for part in self.parts)
        if self.parts and found.get("num_batches") != num_batches:
            raise UserError(
                f"{refused}begun for {shown(found.get('num_batches'))} batches of answers, this run asks for {num_batches}; give all builders "
                "the same --max_steps, --num_epochs, --teacher_calls and --replay"
            )

    def _index(self, numbers: Iterable[int]) -> None:
        """Find these shards, and count their rows by their headers alone."""
        self.shards = [self.folder / SHARD_NAME.format(number) for number in numbers]
        counted = [count_rows(path, self.description["latent_shape"]) for path in self.shards]
        self.rows = [count for count, _ in counted]
        self.has_checksums = all(has_checksums for _, has_checksums in counted)

    def _found(self, *patterns: str) -> set[Path]:
        return {path for pattern in patterns for path in self.folder.glob(pattern)}

    # Building, by one process or by those that torchrun started

    def build(self, answers: TeacherAnswers, num_batches: int, on_progress: Callable[[int], None]) -> None:
        """Ask for `num_batches` batches (fewer where a stopped build has some already) and mark the cache complete.

        A complete cache is left as it is. Each of several processes asks and writes by itself, and all meet at the end.

        Args:
            answers: a source in its first state. The state of a stopped build is loaded into it.
            on_progress: called after every batch with the number of batches so far, including those of a stopped build.

        Raises:
            UserError: the disk has too little room, the folder cannot be written to, or what a stopped build left is
                damaged.
            AnswerError: an answer is not finite, or too large for STORED_DTYPE.
        """
        build = PartBuild(self.folder, self.own_part, self.description["latent_shape"])
        if self.is_complete:
            build.state_file.unlink(missing_ok=True)  # a kill may have come just before
            return
        with self._writing():
            self._start(build, answers, num_batches)
        build.ask(answers, num_batches, on_progress)
        self.processes.barrier()
        self._index(range(build.num_shards * self.processes.count))
        if self.processes.is_first:
            self._describe(True)
        self.processes.barrier()
        build.state_file.unlink(missing_ok=True)
        self.is_complete = True

    def _start(self, build: PartBuild, answers: TeacherAnswers, num_batches: int) -> None:
        """Prepare the folder, and refuse whatever can be refused before the teacher is asked."""
        self.processes.barrier()  # all have found the folder as it was
        if self.processes.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self._found(*LEFTOVERS):
                path.unlink()
        self.processes.barrier()
        build.resume(answers)
        num_states = self.processes.count * (1 if build.state_file.exists() else 2)
        self._check_disk(num_batches - answers.num_calls, answers, num_states)
        if self.processes.is_first:
            self._describe(False)
        self.processes.barrier()

    # Building, by whoever comes: see cache_builders.py

    def begin(self) -> None:
        """Make the folder and, unless another builder has, say in it what is to be asked for in parts.

        Raises:
            UserError: it cannot be written to, has no locks, or another builder has begun something else there.
        """
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.parts:
                with waited_for(self.folder / LOCK_NAME):
                    if os.path.lexists(self._file):
                        self._read()
                    else:
                        remove_leftovers(self._file)
                        self._describe(False)

    def unfinished(self) -> list[CachePart]:
        """Return the parts that lack answers, by the names of their shards."""
        if not self.parts:
            return [] if self.is_complete else [self.own_part]
        # Listed, not asked for by name: a file system on a network may remember for a while that there was no such file.
        names = set(os.listdir(self.folder))
        return [part for part in self.parts if part.last_name not in names]

    @contextlib.contextmanager
    def taken(self, part: CachePart) -> Iterator[bool]:
        """Yield whether this process alone may ask for a part inside, or until it ends however it ends."""
        with contextlib.ExitStack() as held:
            with self._writing():
                try:
                    is_mine = held.enter_context(locked_file(self.lock_of(part)))
                except NoLocksError:
                    if self.parts:
                        raise
                    is_mine = True  # one builder needs none
            yield is_mine

    def lock_of(self, part: CachePart) -> Path:
        """Return the file that a builder locks while it asks for a part."""
        return self.folder / part.lock_name

    def build_part(self, part: CachePart, answers: TeacherAnswers, on_progress: Callable[[int], None]) -> None:
        """Ask for a part that this process has taken; `build` says of what and what is raised."""
        build = PartBuild(self.folder, part, self.description["latent_shape"])
        with self._writing():
            build.remove_leftovers()
            build.resume(answers)
            others = [other for other in self.unfinished() if other != part]
            num_left = part.num_batches - answers.num_calls + self._batches_left(others)
            num_states = (1 if build.state_file.exists() else 2) + 2 * len(others)
            self._check_disk(num_left, answers, num_states)
        build.ask(answers, part.num_batches, on_progress)

    def _batches_left(self, parts: Sequence[CachePart]) -> int:
        """Return how many batches these unfinished parts lack."""
        names = set(os.listdir(self.folder))
        written = sum(SHARD_NAME.format(number) in names for part in parts for number in part.numbers)
        return sum(part.num_batches for part in parts) - SHARD_BATCHES * written

    def finish(self) -> None:
        """Mark the cache complete, unless another builder has: all parts are done.

        Raises:
            UserError: a shard is missing or damaged.
        """
        with self._writing(), waited_for(self.folder / LOCK_NAME):
            if self.look_again():
                return
            self._index(range(self.parts[-1].numbers.stop))
            # First, so that none is left if a kill comes between: the parts are done without them.
            for path in self._found("state*.safetensors", *LEFTOVERS, ".part_*.lock"):
                path.unlink(missing_ok=True)
            self._describe(True)
            self.is_complete = True

    # What both do

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what the file system refuses inside into words.

        Raises:
            UserError: it has no locks, or the folder cannot be written to.
        """
        try:
            yield
        except NoLocksError as error:
            raise UserError(
                f"--cache_parts {len(self.parts)}: {self.folder} is on a file system without locks ({error.strerror}), which keep "
                "builders from asking for the same; give a --teacher_cache on another one, or leave --cache_parts out"
            ) from None
        except OSError as error:
            raise UserError(
                f"--teacher_cache {self.folder}: cannot be written to ({error.strerror}); give another folder"
            ) from None

    def _check_disk(self, num_batches: int, answers: TeacherAnswers, num_states: int) -> None:
        """Refuse a disk without room for so many batches and states.

        The state of renoised samples can be larger than the answers, and is on the disk twice while it is replaced.
        """
        elements = self.description["batch_size"] * torch.Size(self.description["latent_shape"]).numel()
        needed = 2 * elements * STORED_DTYPE.itemsize * num_batches
        needed += num_states * sum(value.nbytes for value in answers.state_dict().values())
        free = shutil.disk_usage(self.folder).free
        if num_batches > 0 and needed > free:
            raise UserError(
                f"--teacher_cache {self.folder}: {num_batches} batches of answers take {needed:,} bytes, {free:,} are "
                "free; give a folder on a larger disk, a larger --replay or fewer steps"
            )

    def _describe(self, is_complete: bool) -> None:
        rows = self.rows if is_complete else []
        about = {"is_complete": is_complete, "num_shards": len(rows), "rows": rows, "answers_of": self.description}
        if not is_complete:
            about["num_processes"] = self.processes.count
            if self.parts:
                about |= {"num_parts": len(self.parts), "num_batches": sum(part.num_batches for part in self.parts)}
        write_json(self._file, about, indent=1, ensure_ascii=False)


class CachedAnswers:
    """Gives every answer of a complete cache once an epoch, in another order each epoch. Only a batch is in memory.

    `num_calls` stays 0, since the teacher was asked when the cache was built. A batch continues over the end of an epoch, so
    that all batches are full. A cache with fewer answers than lanes gives smaller batches, or repeats answers if lanes must
    be padded.
    """

    num_calls = 0

    def __init__(self, cache: TeacherCache, prompt_embeds: PromptEmbeds, lanes: Lanes, device: str, seed: int = 0):
        self.cache = cache
        self.lanes = lanes if lanes.pads else Lanes(min(lanes.total, cache.num_answers))
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.ends = list(accumulate(cache.rows))
        shards = [open_safetensors(path) for path in cache.shards]
        known = {*STORED_NAMES, CHECKSUMS_NAME}
        self.slices = [{name: shard.get_slice(name) for name in known & {*shard.keys()}} for shard in shards]
        self.order = torch.randperm(cache.num_answers, generator=self.generator)
        self.position = 0
        self.prompt_embeds = prompt_embeds
        self._queue = AnswerQueue(prompt_embeds, device, self.lanes.micro_batch)

    def next(self) -> Answer:
        if not self._queue:
            rows = self.lanes.local(torch.tensor(self._take(self.lanes.total)))
            found = [self._row(index) for index in rows.tolist()]
            batch = {name: torch.cat([row[name] for row in found]) for name in found[0]}
            latents, velocity = (to_device(batch[name].float(), self.device) for name in ("latents", "velocity"))
            self._queue.fill(
                latents=latents,
                sigma=batch["sigma"],
                prompts=batch["prompts"].tolist(),
                velocity=velocity,
                weights=torch.ones(len(rows)),
            )
        return self._queue.pop()

    def advance(self, answer: Answer, student_velocity: Tensor, progress: float) -> None:
        """Do nothing: all answers are there already."""

    def _take(self, count: int) -> list[int]:
        """Return the next rows, from the next epoch too if this one has too few left."""
        taken = self.order[self.position : self.position + count].tolist()
        self.position += len(taken)
        if len(taken) < count:
            self.order = torch.randperm(len(self.order), generator=self.generator)
            self.position = 0
            taken += self._take(count - len(taken))
        return taken

    def _row(self, index: int) -> dict[str, Tensor]:
        number = bisect_right(self.ends, index)
        row = index - (self.ends[number - 1] if number else 0)
        return self._checked({name: part[row : row + 1] for name, part in self.slices[number].items()}, number, row)

    def _checked(self, answer: dict[str, Tensor], shard: int, row: int) -> dict[str, Tensor]:
        """Return an answer as it was written.

        Raises:
            UserError: it is damaged.
        """
        checksum = answer.pop(CHECKSUMS_NAME, None)
        is_whole = checksum is None or torch.equal(checksum, checksum_of(answer))
        # What no checksum tells of must at least be what a teacher can have answered.
        is_possible = 0 <= answer["sigma"] <= 1 and 0 <= answer["prompts"] < len(self.prompt_embeds)
        if is_whole and is_possible and all(values.isfinite().all() for values in answer.values()):
            return answer
        raise damaged_file(self.cache.shards[shard], f"its answer {row} is not the one that was written")

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "order": self.order.clone(),
            "position": torch.tensor(self.position),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume at a saved position.

        Raises:
            UserError: the position was saved in a cache with another number of answers.
        """
        if len(state["order"]) != self.cache.num_answers:
            raise UserError(
                f"--teacher_cache {self.cache.folder}: holds {self.cache.num_answers} answers, the run to go on with "
                f"learnt from {len(state['order'])}; give the folder it learnt from, or start anew with --overwrite"
            )
        check_order(state["order"], state["position"], self.cache.num_answers)
        self.order, self.position = state["order"].clone(), int(state["position"])
        self.generator.set_state(state["generator"])
