"""Which prompts a student was trained on, kept in its folder as digests: a measurement on them says little of others.

The record names the files of the prompts too, but a record may come from a stranger, so that they are never opened.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from wandistiller.files.atomic import atomic_path
from wandistiller.files.clone import CLONE
from wandistiller.files.output_folder import TRAINED_PROMPTS_NAME
from wandistiller.model.config import StudentConfig
from wandistiller.students.record import StudentRecord

DIGEST_BYTES = 8  # two of a million prompts are the same by chance in 1 of 30 million runs
MAX_PROMPTS = 2**24  # beyond these the file is not ours


def write_trained_prompts(folder: Path, prompts: Iterable[str]) -> None:
    """Write the digests of the prompts that a student in `folder` was trained on."""
    with atomic_path(folder / TRAINED_PROMPTS_NAME) as beside:
        beside.write_bytes(b"".join(sorted({_digest(prompt) for prompt in prompts})))


def trained_prompts(folder: str | Path, config: StudentConfig, prompts: Sequence[str], prompts_file: str) -> set[str]:
    """Return those of these prompts that a student was trained on, as far as its folder tells.

    Args:
        prompts_file: where the prompts come from. A folder without digests tells only whether this is the file trained on.
    """
    known = _known_digests(Path(folder) / TRAINED_PROMPTS_NAME)
    if known is not None:
        return {prompt for prompt in prompts if _digest(prompt) in known}
    record = StudentRecord.of(config)
    files = [os.path.realpath(CLONE / name) for name in (record.data_path, record.extra_prompts) if name]
    is_same = os.path.isfile(prompts_file) and os.path.realpath(prompts_file) in files
    return set(prompts) if is_same else set()


def _digest(prompt: str) -> bytes:
    """Digest of a prompt's words, however these are spaced."""
    return hashlib.sha256(" ".join(prompt.split()).encode(errors="surrogatepass")).digest()[:DIGEST_BYTES]


def _known_digests(file: Path) -> set[bytes] | None:
    if not file.is_file() or file.stat().st_size > MAX_PROMPTS * DIGEST_BYTES:
        return None
    digests = file.read_bytes()
    return {digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)}
