"""The teacher's answers on disk: asked for once, learnt from without a teacher in memory.

A folder of safetensors shards, `cache.json` that says what the answers are answers of, and while it is built the state
of its sampling paths, so that the same command goes on where it was stopped.
"""

import hashlib
import json
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.errors import UserError
from wandistiller.files.atomic import write_json
from wandistiller.files.output_folder import check_output_folder
from wandistiller.files.safetensors_files import (
    DamagedFileError,
    open_safetensors,
    read_header,
    read_tensors,
    write_tensors,
)
from wandistiller.processes import Processes
from wandistiller.targets.answers import Answer, TeacherAnswers
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.states import StatesOptions
from wandistiller.wan.files import WanFiles
from wandistiller.wan.settings import TeacherSettings

DESCRIPTION_NAME = "cache.json"
STATE_NAME = "state.safetensors"
SHARD_NAME = "answers_{:05d}.safetensors"
SHARD_BATCHES = 16
STORED_NAMES = ("latents", "velocity", "sigma", "prompts")
# Of latents and velocities: a relative rounding of 0.0005, far below what a student reaches.
STORED_DTYPE = torch.float16
# What atomic_path leaves beside these files where a process was killed in it.
LEFTOVERS = tuple(f".{name}.*.tmp" for name in (DESCRIPTION_NAME, "state*.safetensors", "answers_*.safetensors"))


class AnswerError(ValueError):
    """An answer that cannot be stored; the message says what to do."""

    exit_code = 1


def teacher_fingerprint(wan_files: WanFiles) -> str:
    """The same for the same weights wherever they lie: a digest of every expert's output layer and of its middle block.

    The block tells a merged LoRA from the original; reading everything would take minutes for a large teacher.
    """
    digest = hashlib.sha256()
    for expert in map(wan_files.expert, wan_files.experts):
        middle = f"blocks.{expert.config.depth // 2}"
        for name in ("proj_out.weight", f"{middle}.attn1.to_q.weight", f"{middle}.ffn.net.2.weight"):
            digest.update(expert.read(name).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def prompts_digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]


def describe_teacher(wan_files: WanFiles, settings: TeacherSettings) -> dict[str, object]:
    """Whose velocities they are, and how guided and sampled."""
    guidance = {name: getattr(settings, name) for name in ("guidance_scale", "guidance_scale_2", "boundary_ratio")}
    return {
        "teacher": teacher_fingerprint(wan_files),
        **guidance,
        "negative_prompt": settings.negative_prompt if settings.uses_guidance else None,
        "shift": settings.shift,
        "num_inference_steps": settings.num_inference_steps,
    }


def describe_cache(
    wan_files: WanFiles,
    settings: TeacherSettings,
    options: StatesOptions,
    prompts: Sequence[str],
    latent_shape: tuple[int, int, int],
    text_max_length: int,
    batch_size: int,
) -> dict[str, object]:
    """Everything that makes the answers what they are, as JSON values."""
    description = {
        **describe_teacher(wan_files, settings),
        "text_max_length": text_max_length,
        "latent_shape": latent_shape,
        **{f"states_{name}": value for name, value in asdict(options).items()},
        "batch_size": batch_size,
        "num_prompts": len(prompts),
        "prompts": prompts_digest(prompts),
    }
    return json.loads(json.dumps(description))  # as it will be read back


class TeacherCache:
    """A folder of answers, new, begun or complete.

    Raises:
        UserError: the folder holds something else, or answers to something else (it says what differs), or is damaged.
    """

    def __init__(self, folder: str | Path, description: dict[str, object], processes: Processes | None = None):
        self.folder = check_output_folder(folder, "--teacher_cache")
        self.description = description
        self.processes = processes or Processes()
        # Those of a build by several processes lie beside each other:
        mine = f"_{self.processes.rank}_of_{self.processes.count}" if self.processes.are_many else ""
        self.state_file = self.folder / STATE_NAME.replace(".", f"{mine}.")
        self.is_complete = False
        self.shards: list[Path] = []
        self.rows: list[int] = []  # of each shard
        file = self.folder / DESCRIPTION_NAME
        if file.exists():
            self._read(file)
        elif self.folder.exists() and set(self.folder.iterdir()) - set(self._leftovers()):
            raise UserError(
                f"--teacher_cache {folder}: holds files and no {DESCRIPTION_NAME}, so it is not a teacher cache; give "
                "a new or empty folder"
            )

    @property
    def num_answers(self) -> int:
        """States answered and kept so far; all of them once `is_complete`."""
        return sum(self.rows)

    # What is on disk

    def _read(self, file: Path) -> None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            made_of, is_complete = dict(found["answers_of"]), bool(found["is_complete"])
            rows = list(found.get("rows") or [None] * found["num_shards"])  # the first caches had only the latter
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{file}: is damaged; remove {self.folder} and run again, its answers are asked anew"
            ) from None
        differing = [
            f"{name} {made_of.get(name)!r}, this run has {self.description.get(name)!r}"
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
            for path, expected, count in zip(self.shards, rows, self.rows, strict=True):
                if expected not in (None, count):
                    raise self._damaged(path, f"it holds {count} answers, {expected} were written")

    def _index(self, numbers: Iterable[int]) -> None:
        """Find these shards and count their rows by their headers; none is read."""
        self.shards = [self.folder / SHARD_NAME.format(number) for number in numbers]
        self.rows = [self._count_rows(path) for path in self.shards]

    def _numbers(self, num_shards: int) -> range:
        """Of the shards that this process writes, in turns with the others."""
        return range(self.processes.rank, num_shards * self.processes.count, self.processes.count)

    def _count_rows(self, path: Path) -> int:
        try:
            found = read_header(path).shapes
        except DamagedFileError as error:
            raise self._damaged(path, error.reason) from None
        shapes = {name: found.get(name, ()) for name in STORED_NAMES}
        count = shapes["sigma"][:1]
        latents = (*count, *self.description["latent_shape"])
        if shapes != {"latents": latents, "velocity": latents, "sigma": count, "prompts": count} or not count:
            raise self._damaged(path, f"its tensors have the shapes {shapes}")
        return count[0]

    def _damaged(self, path: Path, reason: str) -> UserError:
        return UserError(
            f"{path}: is missing or damaged ({reason}); copy it again, or remove {self.folder} to ask the teacher anew"
        )

    def _leftovers(self) -> list[Path]:
        return [path for pattern in LEFTOVERS for path in self.folder.glob(pattern)]

    # Building

    def build(self, answers: TeacherAnswers, num_batches: int, on_progress: Callable[[int], None]) -> None:
        """Ask for `num_batches` batches (fewer where a stopped build has some already) and mark the cache complete.

        A complete cache is left as it is. Several processes ask and write each for itself, and need each other at the end.

        Args:
            answers: in its first state; that of a stopped build is restored.
            on_progress: called after every batch with the number answered so far, those of a stopped build included.

        Raises:
            UserError: the disk has too little room, the folder cannot be written to, or what a stopped build left is
                damaged.
            AnswerError: an answer is not finite, or too large for STORED_DTYPE.
        """
        if self.is_complete:
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
        """Everything that can be refused, before the teacher is asked."""
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
        """The paths as they were after so many whole shards: what a killed build wrote beyond is written again."""
        state, num_shards = self.state_file, 0
        if state.exists():
            try:
                saved = read_tensors(state)
                num_shards = int(saved.pop("num_shards"))
            except DamagedFileError as error:
                raise self._damaged(state, error.reason) from None
            except KeyError:
                raise self._damaged(state, "it does not say how many shards there are") from None
            answers.load_state_dict(saved)
        self._index(self._numbers(num_shards))

    def _write_shard(self, batches: list[dict[str, Tensor]]) -> None:
        shard = {name: torch.cat([batch[name] for batch in batches]) for name in STORED_NAMES}
        path = self.folder / SHARD_NAME.format(self._numbers(len(self.shards) + 1)[-1])
        write_tensors(path, shard)
        self.shards.append(path)
        self.rows.append(len(shard["sigma"]))

    def _write_state(self, answers: TeacherAnswers) -> None:
        write_tensors(self.state_file, answers.state_dict() | {"num_shards": torch.tensor(len(self.shards))})

    def _check_disk(self, num_batches: int, answers: TeacherAnswers) -> None:
        elements = self.description["batch_size"] * torch.Size(self.description["latent_shape"]).numel()
        # The state of renoised samples can outweigh the answers, and lies there twice while it is replaced.
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


def _ask(answers: TeacherAnswers, done: int, on_progress: Callable[[int], None]) -> dict[str, Tensor]:
    """The next batch as it is stored."""
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
    """Batches from a complete cache, every answer once an epoch in an order of its own; only a batch is in memory.

    `num_calls` stays 0: the teacher was asked when the cache was made. A batch goes over the end of an epoch, so that
    all are full; only a cache of fewer answers than `batch_size` gives smaller ones (or repeats some, to fill given lanes).
    """

    num_calls = 0

    def __init__(self, cache: TeacherCache, batch_size: int, device: str, seed: int = 0, lanes: Lanes | None = None):
        self.cache = cache
        self.lanes = lanes or Lanes(min(batch_size, cache.num_answers))
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.ends = list(accumulate(cache.rows))
        shards = [open_safetensors(path) for path in cache.shards]
        self.slices = [{name: shard.get_slice(name) for name in STORED_NAMES} for shard in shards]
        self.order = torch.randperm(cache.num_answers, generator=self.generator)
        self.position = 0
        self._waiting: list[Answer] = []  # micro-batches of the step in hand

    def next(self) -> Answer:
        if not self._waiting:
            rows = self.lanes.local(torch.tensor(self._take(self.lanes.total)))
            found = [self._row(index) for index in rows.tolist()]
            batch = {name: torch.cat([row[name] for row in found]) for name in found[0]}
            latents, velocity = (to_device(batch[name].float(), self.device) for name in ("latents", "velocity"))
            answer = Answer(latents, batch["sigma"], batch["prompts"].tolist(), velocity)
            self._waiting = answer.split(self.lanes.micro_batch)
        return self._waiting.pop(0)

    def advance(self, answer: Answer, student_velocity: Tensor, progress: float) -> None:
        """Nothing moves: all answers are there."""

    def _take(self, count: int) -> list[int]:
        """The next rows, over the end of an epoch where need be."""
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
        return {name: part[row : row + 1] for name, part in self.slices[number].items()}

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "order": self.order.clone(),
            "position": torch.tensor(self.position),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on at a saved position.

        Raises:
            UserError: it is a position among another number of answers.
        """
        if len(state["order"]) != self.cache.num_answers:
            raise UserError(
                f"--teacher_cache {self.cache.folder}: holds {self.cache.num_answers} answers, the run to go on with "
                f"learnt from {len(state['order'])}; give the folder it learnt from, or start anew with --overwrite"
            )
        self.order, self.position = state["order"].clone(), int(state["position"])
        self.generator.set_state(state["generator"])
