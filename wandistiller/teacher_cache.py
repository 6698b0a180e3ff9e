"""The teacher's answers on disk: asked for once, learnt from without a teacher in memory.

A folder of safetensors shards, `cache.json` that says what the answers are answers of, and while it is built the state of
its sampling paths, so that the same command goes on where it was stopped.
"""

import hashlib
import json
import shutil
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.answers import Answer, TeacherAnswers
from wandistiller.atomic import atomic_path
from wandistiller.errors import UserError
from wandistiller.state_sources import StatesOptions
from wandistiller.teacher import TeacherSettings
from wandistiller.wan_checkpoint import WanCheckpoint

DESCRIPTION_NAME = "cache.json"
STATE_NAME = "state.safetensors"
SHARD_BATCHES = 16
STORED_DTYPE = (
    torch.float16
)  # of latents and velocities: a relative rounding of 0.0005, far below what a student reaches


def teacher_fingerprint(checkpoint: WanCheckpoint) -> str:
    """The same for the same weights wherever they lie: a digest of every expert's output layer."""
    digest = hashlib.sha256()
    for name in checkpoint.experts:
        digest.update(checkpoint.expert(name).read("proj_out.weight").float().numpy().tobytes())
    return digest.hexdigest()[:16]


def prompts_digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]


def describe_teacher(checkpoint: WanCheckpoint, settings: TeacherSettings) -> dict[str, object]:
    """Whose velocities they are, and how guided and sampled."""
    guidance = {name: getattr(settings, name) for name in ("guidance_scale", "guidance_scale_2", "boundary_ratio")}
    return {
        "teacher": teacher_fingerprint(checkpoint),
        **guidance,
        "negative_prompt": settings.negative_prompt if settings.uses_guidance else None,
        "shift": settings.shift,
        "num_inference_steps": settings.num_inference_steps,
    }


def describe_cache(
    checkpoint: WanCheckpoint,
    settings: TeacherSettings,
    options: StatesOptions,
    prompts: Sequence[str],
    latent_shape: tuple[int, int, int],
    text_max_length: int,
    batch_size: int,
) -> dict[str, object]:
    """Everything that makes the answers what they are, as JSON values."""
    description = {
        **describe_teacher(checkpoint, settings),
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

    def __init__(self, folder: str | Path, description: dict[str, object]):
        self.folder = Path(folder)
        self.description = description
        self.is_complete = False
        self.shards: list[Path] = []
        self.rows: list[int] = []  # of each shard
        file = self.folder / DESCRIPTION_NAME
        if file.exists():
            self._check(file)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(
                f"--teacher_cache {folder}: holds files and no {DESCRIPTION_NAME}, so it is not a teacher cache; give a "
                "new or empty folder"
            )

    @property
    def num_answers(self) -> int:
        """States answered, of a complete cache."""
        return sum(self.rows)

    def _check(self, file: Path) -> None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            made_of, is_complete, num_shards = found["answers_of"], found["is_complete"], found["num_shards"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{file}: is damaged; remove {self.folder} and run again, its answers are asked anew"
            ) from None
        differing = [
            f"{name} {made_of.get(name)!r}, this run has {value!r}"
            for name, value in self.description.items()
            if made_of.get(name) != value
        ]
        if differing:
            raise UserError(
                f"--teacher_cache {self.folder}: was made with {'; '.join(differing)}. Give another folder, or the same flags"
            )
        self.is_complete = is_complete
        if is_complete:
            self._index(num_shards)

    def _index(self, num_shards: int) -> None:
        """Find every shard by its header; none is read."""
        from safetensors import SafetensorError, safe_open

        self.shards = [self._shard(number) for number in range(num_shards)]
        self.rows = []
        for path in self.shards:
            try:
                with safe_open(path, framework="pt") as shard:
                    self.rows.append(shard.get_slice("sigma").get_shape()[0])
            except (SafetensorError, OSError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"{path}: is missing or damaged ({reason}); copy it again, or remove {self.folder} to ask the teacher anew"
                ) from None

    def _shard(self, number: int) -> Path:
        return self.folder / f"answers_{number:05d}.safetensors"

    def build(self, answers: TeacherAnswers, num_batches: int, on_progress: Callable[[int], None]) -> None:
        """Ask for `num_batches` batches (fewer where a stopped build has some already) and mark the cache complete.

        Raises:
            UserError: the disk has too little room.
        """
        from safetensors.torch import load_file, save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        state, num_shards = self.folder / STATE_NAME, 0
        if state.exists():
            saved = load_file(state)
            num_shards = int(saved.pop("num_shards"))
            answers.load_state_dict(saved)
        self._check_disk(num_batches - answers.num_calls)
        self._describe(False, 0)
        # A state is that of the paths after so many whole shards: what a killed build wrote beyond is written again.
        while (done := answers.num_calls) < num_batches:
            count = min(SHARD_BATCHES, num_batches - done)
            rows = [self._ask(answers, done + index, on_progress) for index in range(count)]
            shard = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            with atomic_path(self._shard(num_shards)) as beside:
                save_file(shard, beside)
            num_shards += 1
            with atomic_path(state) as beside:
                save_file(answers.state_dict() | {"num_shards": torch.tensor(num_shards)}, beside)
        self._index(num_shards)
        self._describe(True, num_shards)
        state.unlink()
        self.is_complete = True

    def _ask(self, answers: TeacherAnswers, done: int, on_progress: Callable[[int], None]) -> dict[str, Tensor]:
        answer = answers.next()
        answers.advance(answer, answer.velocity, 0.0)
        stored = {name: getattr(answer, name).to("cpu", STORED_DTYPE) for name in ("latents", "velocity")}
        if not all(value.isfinite().all() for value in stored.values()):
            raise ValueError(
                f"batch {done + 1}: the teacher's velocity is not finite, or too large for {STORED_DTYPE}; lower "
                "--guidance_scale, or train without --teacher_cache"
            )
        on_progress(done + 1)
        return stored | {"sigma": answer.sigma.float(), "prompts": torch.tensor(answer.prompts)}

    def _check_disk(self, num_batches: int) -> None:
        elements = self.description["batch_size"] * torch.Size(self.description["latent_shape"]).numel()
        needed = 2 * elements * STORED_DTYPE.itemsize * num_batches
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"--teacher_cache {self.folder}: {num_batches} batches of answers take {needed:,} bytes, {free:,} are free; "
                "give a folder on a larger disk, a larger --replay or fewer steps"
            )

    def _describe(self, is_complete: bool, num_shards: int) -> None:
        about = {"is_complete": is_complete, "num_shards": num_shards, "answers_of": self.description}
        with atomic_path(self.folder / DESCRIPTION_NAME) as beside:
            beside.write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")


class CachedAnswers:
    """Batches from a complete cache, every answer once an epoch in an order of its own; only a batch is in memory.

    `num_calls` stays 0: the teacher was asked when the cache was made.
    """

    num_calls = 0

    def __init__(self, cache: TeacherCache, batch_size: int, device: str, seed: int = 0):
        from safetensors import safe_open

        self.cache = cache
        self.batch_size = min(batch_size, cache.num_answers)
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.ends = list(accumulate(cache.rows))
        shards = [safe_open(path, framework="pt") for path in cache.shards]
        names = ("latents", "velocity", "sigma", "prompts")
        self.slices = [{name: shard.get_slice(name) for name in names} for shard in shards]
        self.order = torch.randperm(cache.num_answers, generator=self.generator)
        self.position = 0

    def next(self) -> Answer:
        rows = self._take(self.batch_size)
        found = [self._row(index) for index in rows]
        batch = {name: torch.cat([row[name] for row in found]) for name in found[0]}
        latents, velocity = (batch[name].to(self.device, torch.float32) for name in ("latents", "velocity"))
        return Answer(latents, batch["sigma"], batch["prompts"].tolist(), velocity)

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
        self.order, self.position = state["order"].clone(), int(state["position"])
        self.generator.set_state(state["generator"])
