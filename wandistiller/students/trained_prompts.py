"""Which prompts a student was trained on, kept in its folder as digests: a measurement on them says little of others."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from wandistiller.files.atomic import atomic_path
from wandistiller.files.output_folder import TRAINED_PROMPTS_NAME

DIGEST_BYTES = 8  # two of a million prompts are the same by chance in 1 of 30 million runs
MAX_PROMPTS = 2**24  # beyond these the file is not ours


def write_trained_prompts(folder: Path, prompts: Iterable[str]) -> None:
    """Write the digests of the prompts that a student in `folder` was trained on."""
    with atomic_path(folder / TRAINED_PROMPTS_NAME) as beside:
        beside.write_bytes(b"".join(sorted({_digest(prompt) for prompt in prompts})))


def count_trained_prompts(folder: str | Path, prompts: Sequence[str]) -> int:
    """Count those of these prompts that a student was trained on, as far as its folder tells."""
    file = Path(folder) / TRAINED_PROMPTS_NAME
    if not file.is_file() or file.stat().st_size > MAX_PROMPTS * DIGEST_BYTES:
        return 0
    digests = file.read_bytes()
    known = {digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)}
    return sum(_digest(prompt) in known for prompt in prompts)


def _digest(prompt: str) -> bytes:
    """Digest of a prompt's words, however these are spaced."""
    return hashlib.sha256(" ".join(prompt.split()).encode(errors="surrogatepass")).digest()[:DIGEST_BYTES]
