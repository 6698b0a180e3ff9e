"""A UMT5 text encoder and its tokenizer on disk: where they lie, how large the encoder is, and what its embeddings depend on.

Nothing here loads a weight or imports transformers.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from wandistiller.errors import UserError
from wandistiller.files.hub import place_of
from wandistiller.files.json_files import TeacherFileError
from wandistiller.files.weights import digest_of, kept_digest
from wandistiller.wan.names import part_files
from wandistiller.wan.tokenizer import (
    JSON_NAME,
    SENTENCEPIECE_NAME,
    has_tokenizer_inside,
    require_tokenizer,
    tokenizer_file,
)
from wandistiller.wan.umt5 import ANCHOR, Umt5Files

TEXT_ENCODER_SOURCE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"  # all released Wans share this encoder
TEXT_ENCODER_ADVICE = f"a folder with text_encoder/ and tokenizer/, such as a copy of {TEXT_ENCODER_SOURCE} (only these two folders are needed)"
ORIGINAL_TOKENIZER = "google/umt5-xxl"  # where the original releases keep it
_HUB_FILES = [
    "text_encoder/*.json",
    "text_encoder/*.safetensors",
    "tokenizer/*",
    "models_t5_umt5*",
    f"{ORIGINAL_TOKENIZER}/*",
]


@dataclass(frozen=True)
class TextEncoderFiles:
    """A text encoder and its tokenizer: folders, or files.

    Attributes:
        encoder: a folder like text_encoder/ of a pipeline, or a file of weights in any layout.
        tokenizer: a folder like tokenizer/ of a pipeline, or the file itself; a file of weights may hold it.
    """

    encoder: Path
    tokenizer: Path

    @cached_property
    def umt5(self) -> Umt5Files:
        """The encoder by its headers.

        Raises:
            TeacherFileError: this is no usable UMT5 encoder.
        """
        return Umt5Files(self.encoder)

    def check_text_dim(self, text_dim: int) -> None:
        """Refuse an encoder whose embeddings have another width than teacher and student take."""
        if (width := self.umt5.text_dim) != text_dim:
            raise UserError(
                f"{self.encoder}: gives embeddings of width {width}, teacher and student take {text_dim}; point "
                "--text_encoder_path at the teacher's own encoder"
            )

    def fingerprint(self, settings: str = "") -> str:
        """Return a digest of every byte that an embedding depends on.

        Args:
            settings: what an embedding depends on beside the files.
        """
        shape, weights = json.dumps(self.umt5.shape, sort_keys=True), digest_of(self.umt5.files)
        parts = [settings, shape, weights, kept_digest(require_tokenizer(self.tokenizer))]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def find_text_encoder(path: str | Path) -> TextEncoderFiles:
    """Find encoder and tokenizer by `--text_encoder_path`.

    Args:
        path: a pipeline folder, a hub id, the encoder's own folder, a file of weights or another that it lies beside, the folder of
            an original release, or ComfyUI's models/.

    Raises:
        TeacherFileError: there is none, or there are several, or its tokenizer is missing.
    """
    folder = place_of(path, _HUB_FILES, "a local folder with text_encoder/ and tokenizer/")
    if (folder / "text_encoder").is_dir():
        return TextEncoderFiles(folder / "text_encoder", folder / "tokenizer")
    files = encoder_files(folder)
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise TeacherFileError(
            f"{folder}: holds several text encoders ({names}); give one of them as --text_encoder_path"
        )
    if files:
        return TextEncoderFiles(files[0], _tokenizer_of(files[0]))
    if (folder / "config.json").is_file():
        beside = folder.parent / "tokenizer"
        return TextEncoderFiles(folder, beside if beside.is_dir() else folder)
    reason = "holds no text encoder" if folder.exists() else "there is no such folder"
    raise TeacherFileError(f"{path}: {reason}; --text_encoder_path takes {TEXT_ENCODER_ADVICE}")


def encoder_files(place: Path) -> list[Path]:
    """Return the files that are a text encoder: `place` itself, or those in this folder or where its parts lie."""
    return part_files(place, ANCHOR, "umt5", ("text_encoders", "clip"))


def _tokenizer_of(weights: Path) -> Path:
    """Find the tokenizer of a file of weights: in it, beside it, or where original releases and pipelines keep it."""
    if has_tokenizer_inside(weights):
        return weights
    folder = weights.parent
    for place in (folder, folder / ORIGINAL_TOKENIZER, folder / "tokenizer", folder.parent / "tokenizer"):
        if tokenizer_file(place):
            return place
    raise TeacherFileError(
        f"{weights}: holds no tokenizer, and none lies beside it ({JSON_NAME} or {SENTENCEPIECE_NAME}); copy that of "
        f"{ORIGINAL_TOKENIZER} or of {TEXT_ENCODER_SOURCE} there"
    )
