"""The teacher's answers on disk: asked for once, and learnt from without a teacher in memory.

The folder holds shards of answers as safetensors, and `cache.json`, which says what they are answers to. A shard holds a
checksum of every answer, which is compared when the answer is read: damage is never learnt from, and nothing is read twice for
it. While the folder is being built it also holds the state of the sampling paths, so that the same command resumes a build that was stopped.
"""

import hashlib
import json
import os
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.errors import UserError, first_line, shown
from wandistiller.files.atomic import write_json
from wandistiller.files.json_files import load_json
from wandistiller.files.output_folder import check_output_folder
from wandistiller.files.prompts import identity_of
from wandistiller.files.safetensors_files import (
    DamagedFileError,
    open_safetensors,
    read_header,
    read_tensors,
    write_tensors,
)
from wandistiller.model.config import StudentConfig
from wandistiller.processes import Processes
from wandistiller.targets.answers import Answer, AnswerQueue, TeacherAnswers
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.state_dicts import check_order
from wandistiller.targets.states import StatesOptions
from wandistiller.wan.lora import without_loras
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import TeacherSettings
from wandistiller.wan.wan_files import WanFiles

DESCRIPTION_NAME = "cache.json"
STATE_NAME = "state.safetensors"
SHARD_NAME = "answers_{:05d}.safetensors"
SHARD_BATCHES = 16
STORED_NAMES = ("latents", "velocity", "sigma", "prompts")
CHECKSUMS_NAME = "checksums"  # CRC-32 of every answer; shards of the first versions have none
# Latents and velocities are rounded to this. The rounding is far below the error that a student reaches.
STORED_DTYPE = torch.float16
STORED_DTYPES = {"latents": "F16", "velocity": "F16", "sigma": "F32", "prompts": "I64"}  # as safetensors spells them
# Files that a process leaves if it is killed while it writes one of ours.
LEFTOVERS = tuple(f".{name}.*.tmp" for name in (DESCRIPTION_NAME, "state*.safetensors", "answers_*.safetensors"))


class AnswerError(ValueError):
    """An answer cannot be stored. The message says what to do."""

    exit_code = 1


def teacher_fingerprint(wan_files: WanFiles) -> str:
    """Return a digest of every expert's output layer and middle block, the same for the same weights wherever they lie.

    The block tells a merged LoRA from the original. Reading everything would take minutes for a large teacher. LoRAs that are
    merged as it is read are left out: their sum depends on the machine in its last bits, and their files tell what they are.
    """
    digest = hashlib.sha256()
    for expert in (without_loras(wan_files.expert(name)) for name in wan_files.experts):
        middle = f"blocks.{expert.config.depth // 2}"
        for name in ("proj_out.weight", f"{middle}.attn1.to_q.weight", f"{middle}.ffn.net.2.weight"):
            digest.update(expert.read(name).float().numpy().tobytes())
    return digest.hexdigest()[:16]


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
        # The fingerprint sees a part of the weights alone. Without LoRAs the description stays what it always was.
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

    Raises:
        UserError: the folder holds something else, or answers to something else (it says what differs), or is damaged.
    """

    def __init__(self, folder: str | Path, description: dict[str, Any], processes: Processes | None = None):
        self.folder = check_output_folder(folder, "--teacher_cache")
        self.description = description
        self.processes = processes or Processes()
        # If several processes build the cache, each keeps a state of its own:
        mine = f"_{self.processes.rank}_of_{self.processes.count}" if self.processes.are_many else ""
        self.state_file = self.folder / STATE_NAME.replace(".", f"{mine}.")
        self.is_complete = False
        self.shards: list[Path] = []
        self.rows: list[int] = []  # answers in each shard
        self.has_checksums = True
        file = self.folder / DESCRIPTION_NAME
        if os.path.lexists(file):
            self._read(file)
        elif self.folder.exists() and set(self.folder.iterdir()) - set(self._leftovers()):
            raise UserError(
                f"--teacher_cache {folder}: holds files and no {DESCRIPTION_NAME}, so it is not a teacher cache; give "
                "a new or empty folder"
            )

    @property
    def num_answers(self) -> int:
        """Answers that are kept so far: all of them once `is_complete`."""
        return sum(self.rows)

    def prompts_asked_with(self) -> set[int]:
        """Return the indices of the prompts that the answers of a complete cache belong to."""
        return {index for path in self.shards for index in open_safetensors(path).get_tensor("prompts").tolist()}

    # What is on disk

    def _read(self, file: Path) -> None:
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
        if not is_complete and found.get("num_processes", 1) != self.processes.count:
            raise UserError(
                f"--teacher_cache {self.folder}: was begun by {found.get('num_processes', 1)} processes, these are "
                f"{self.processes.count}; go on with as many, or remove it and ask anew. A complete one serves any number"
            )
        if is_complete:
            self._index(range(len(rows)))
            if not self.has_checksums:
                print(
                    f"Warning: {self.folder} was made by a version without checksums, so damage to its answers may go unnoticed"
                )
            for path, expected, count in zip(self.shards, rows, self.rows, strict=True):
                if expected not in (None, count):
                    raise self.damaged(path, f"it holds {count} answers, {expected} were written")

    def _index(self, numbers: Iterable[int]) -> None:
        """Find these shards, and count their rows by their headers alone."""
        self.shards = [self.folder / SHARD_NAME.format(number) for number in numbers]
        self.has_checksums = True
        self.rows = [self._count_rows(path) for path in self.shards]

    def _numbers(self, num_shards: int) -> range:
        """Return the numbers of the shards that this process writes, in turns with the others."""
        return range(self.processes.rank, num_shards * self.processes.count, self.processes.count)

    def _count_rows(self, path: Path) -> int:
        try:
            header = read_header(path)
        except DamagedFileError as error:
            raise self.damaged(path, error.reason) from None
        shapes = {name: header.shapes.get(name, ()) for name in STORED_NAMES}
        count = shapes["sigma"][:1]
        latents = (*count, *self.description["latent_shape"])
        if shapes != {"latents": latents, "velocity": latents, "sigma": count, "prompts": count} or not count:
            raise self.damaged(path, f"its tensors have the shapes {shapes}")
        if wrong := {
            name: header.dtypes[name] for name, dtype in STORED_DTYPES.items() if header.dtypes[name] != dtype
        }:
            raise self.damaged(path, f"its tensors are of the types {wrong}")
        if CHECKSUMS_NAME not in header.shapes:
            self.has_checksums = False
        elif (header.shapes[CHECKSUMS_NAME], header.dtypes[CHECKSUMS_NAME]) != (count, "I64"):
            raise self.damaged(path, "its checksums are not those of its answers")
        return count[0]

    def damaged(self, path: Path, reason: str) -> UserError:
        """Return the refusal of a file of this cache."""
        return UserError(
            f"{path}: is missing or damaged ({reason}); copy it again, or remove {self.folder} to ask the teacher anew"
        )

    def _leftovers(self) -> list[Path]:
        return [path for pattern in LEFTOVERS for path in self.folder.glob(pattern)]

    # Building

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
        if self.is_complete:
            self.state_file.unlink(missing_ok=True)  # a kill may have come just before
            return
        try:
            self._start(answers, num_batches)
        except OSError as error:
            raise UserError(
                f"--teacher_cache {self.folder}: cannot be written to ({error.strerror}); give another folder"
            ) from None
        while (done := answers.num_calls) < num_batches:
            count = min(SHARD_BATCHES, num_batches - done)
            self._write_shard([_ask(answers, done + index, on_progress) for index in range(count)])
            self._write_state(answers)
        self.processes.barrier()
        self._index(range(len(self.shards) * self.processes.count))
        if self.processes.is_first:
            self._describe(True)
        self.processes.barrier()
        self.state_file.unlink(missing_ok=True)
        self.is_complete = True

    def _start(self, answers: TeacherAnswers, num_batches: int) -> None:
        """Prepare the folder, and refuse whatever can be refused before the teacher is asked."""
        self.processes.barrier()  # all have found the folder as it was
        if self.processes.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self._leftovers():
                path.unlink()
        self.processes.barrier()
        self._load_state(answers)
        self._check_disk(num_batches - answers.num_calls, answers)
        if self.processes.is_first:
            self._describe(False)
        self.processes.barrier()

    def _load_state(self, answers: TeacherAnswers) -> None:
        """Load the paths as they were after so many whole shards. What a killed build wrote beyond these is written again."""
        state, num_shards = self.state_file, 0
        if os.path.lexists(state):
            try:
                saved = read_tensors(state)
                checksum = saved.pop(CHECKSUMS_NAME, None)
                if checksum is not None and not torch.equal(checksum, _checksum(saved)):
                    raise ValueError("its checksum differs")
                num_shards = int(saved.pop("num_shards"))
                answers.load_state_dict(saved)
            except DamagedFileError as error:
                raise self.damaged(state, error.reason) from None
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                raise self.damaged(state, f"it is not the state of a build: {first_line(error)}") from None
        self._index(self._numbers(num_shards))

    def _write_shard(self, batches: list[dict[str, Tensor]]) -> None:
        shard = {name: torch.cat([batch[name] for batch in batches]) for name in STORED_NAMES}
        path = self.folder / SHARD_NAME.format(self._numbers(len(self.shards) + 1)[-1])
        rows = [{name: values[row : row + 1] for name, values in shard.items()} for row in range(len(shard["sigma"]))]
        write_tensors(path, shard | {CHECKSUMS_NAME: torch.cat([_checksum(row) for row in rows])})
        self.shards.append(path)
        self.rows.append(len(shard["sigma"]))

    def _write_state(self, answers: TeacherAnswers) -> None:
        state = answers.state_dict() | {"num_shards": torch.tensor(len(self.shards))}
        write_tensors(self.state_file, state | {CHECKSUMS_NAME: _checksum(state)})

    def _check_disk(self, num_batches: int, answers: TeacherAnswers) -> None:
        elements = self.description["batch_size"] * torch.Size(self.description["latent_shape"]).numel()
        # The state of renoised samples can be larger than the answers, and is on the disk twice while it is replaced.
        num_states = self.processes.count * (1 if self.state_file.exists() else 2)
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
        about |= {} if is_complete else {"num_processes": self.processes.count}
        write_json(self.folder / DESCRIPTION_NAME, about, indent=1, ensure_ascii=False)


def _checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the CRC-32 (1,) int64 of tensors and their names, whatever order they come in."""
    checksum = 0
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous().flatten()
        checksum = zlib.crc32(values.view(torch.uint8).numpy().data, zlib.crc32(name.encode(), checksum))
    return torch.tensor([checksum])


def _ask(answers: TeacherAnswers, done: int, on_progress: Callable[[int], None]) -> dict[str, Tensor]:
    """Ask for the next batch, and return it as it is stored."""
    parts = []
    for _ in range(answers.lanes.num_micro_batches):
        answer = answers.next()
        answers.advance(answer, answer.velocity, 0.0)
        # A row of weight 0 stands for a lane that had no state to ask about.
        counted = answer.weights.nonzero().flatten()
        on_device = counted.to(answer.latents.device)
        parts.append(
            {
                "latents": _stored(answer.latents[on_device], f"batch {done + 1}: the latents"),
                "velocity": _stored(answer.velocity[on_device], f"batch {done + 1}: the teacher's velocities"),
                "sigma": answer.sigma[counted].float(),
                "prompts": torch.tensor(answer.prompts)[counted],
            }
        )
    on_progress(done + 1)
    return {name: torch.cat([part[name] for part in parts]) for name in STORED_NAMES}


def _stored(values: Tensor, what: str) -> Tensor:
    stored = values.to("cpu", STORED_DTYPE)
    if stored.isfinite().all():
        return stored
    if not values.isfinite().all():
        raise AnswerError(f"{what} are not finite; copy the checkpoint again, or give --dtype fp32")
    raise AnswerError(
        f"{what} reach {values.abs().max():.3g}, more than {STORED_DTYPE} holds ({torch.finfo(STORED_DTYPE).max:g}); "
        "lower --guidance_scale, or train without --teacher_cache"
    )


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
        is_whole = checksum is None or torch.equal(checksum, _checksum(answer))
        # What no checksum tells of must at least be what a teacher can have answered.
        is_possible = 0 <= answer["sigma"] <= 1 and 0 <= answer["prompts"] < len(self.prompt_embeds)
        if is_whole and is_possible and all(values.isfinite().all() for values in answer.values()):
            return answer
        raise self.cache.damaged(self.cache.shards[shard], f"its answer {row} is not the one that was written")

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
