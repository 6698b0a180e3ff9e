"""A shard of a teacher cache: batches of answers in a safetensors file, with a checksum of every answer."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.safetensors_files import DamagedFileError, read_header, write_tensors
from wandistiller.targets.answers import TeacherAnswers

SHARD_NAME = "answers_{:05d}.safetensors"
SHARD_BATCHES = 16
STORED_NAMES = ("latents", "velocity", "sigma", "prompts")
CHECKSUMS_NAME = "checksums"  # CRC-32 of every answer; shards of the first versions have none
# Latents and velocities are rounded to this. The rounding is far below the error that a student reaches.
STORED_DTYPE = torch.float16
STORED_DTYPES = {"latents": "F16", "velocity": "F16", "sigma": "F32", "prompts": "I64"}  # as safetensors spells them


class AnswerError(ValueError):
    """An answer cannot be stored. The message says what to do."""

    exit_code = 1


def damaged_file(path: Path, reason: str) -> UserError:
    """Return the refusal of a file of a teacher cache."""
    return UserError(
        f"{path}: is missing or damaged ({reason}); copy it again, or remove {path.parent} to ask the teacher anew"
    )


def checksum_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the CRC-32 (1,) int64 of tensors and their names, whatever order they come in."""
    checksum = 0
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous().flatten()
        checksum = zlib.crc32(values.view(torch.uint8).numpy().data, zlib.crc32(name.encode(), checksum))
    return torch.tensor([checksum])


# ---- writing ----


def ask_batch(answers: TeacherAnswers, done: int, on_progress: Callable[[int], None]) -> dict[str, Tensor]:
    """Ask for the next batch, and return it as it is stored.

    Raises:
        AnswerError: an answer is not finite, or too large for STORED_DTYPE.
    """
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


def write_shard(path: Path, batches: Sequence[dict[str, Tensor]]) -> int:
    """Write batches as a shard, whole or not at all; return how many answers it holds."""
    shard = {name: torch.cat([batch[name] for batch in batches]) for name in STORED_NAMES}
    count = len(shard["sigma"])
    rows = [{name: values[row : row + 1] for name, values in shard.items()} for row in range(count)]
    write_tensors(path, shard | {CHECKSUMS_NAME: torch.cat([checksum_of(row) for row in rows])})
    return count


# ---- reading ----


def count_rows(path: Path, latent_shape: Sequence[int]) -> tuple[int, bool]:
    """Return how many answers a shard holds and whether it has their checksums, by its header alone.

    Raises:
        UserError: it is missing, damaged, or holds something else.
    """
    try:
        header = read_header(path)
    except DamagedFileError as error:
        raise damaged_file(path, error.reason) from None
    shapes = {name: header.shapes.get(name, ()) for name in STORED_NAMES}
    count = shapes["sigma"][:1]
    latents = (*count, *latent_shape)
    if shapes != {"latents": latents, "velocity": latents, "sigma": count, "prompts": count} or not count:
        raise damaged_file(path, f"its tensors have the shapes {shapes}")
    if wrong := {name: header.dtypes[name] for name, dtype in STORED_DTYPES.items() if header.dtypes[name] != dtype}:
        raise damaged_file(path, f"its tensors are of the types {wrong}")
    has_checksums = CHECKSUMS_NAME in header.shapes
    if has_checksums and (header.shapes[CHECKSUMS_NAME], header.dtypes[CHECKSUMS_NAME]) != (count, "I64"):
        raise damaged_file(path, "its checksums are not those of its answers")
    return count[0], has_checksums
