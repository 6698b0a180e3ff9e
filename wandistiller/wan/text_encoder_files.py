"""A UMT5 text encoder and its tokenizer on disk: where they lie, how large the encoder is, and what its embeddings depend on.

Nothing here loads a weight or imports transformers.
"""

import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from wandistiller.errors import UserError
from wandistiller.files.checked_json import TeacherFileError, read_json
from wandistiller.files.hub import fetch, is_hub_id
from wandistiller.files.safetensors_files import indexed_files, read_header

TEXT_ENCODER_SOURCE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"  # all released Wans share this encoder
TEXT_ENCODER_ADVICE = f"a folder with text_encoder/ and tokenizer/, such as a copy of {TEXT_ENCODER_SOURCE} (only these two folders are needed)"
TOKENIZER_MODELS = ("tokenizer.json", "spiece.model")
TOKENIZER_FILES = (*TOKENIZER_MODELS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
READ_WHOLE_BYTES = 64 * 2**20  # weight files up to this size are fingerprinted by all their bytes
HEADER_BYTES = 2**20  # what is read of a larger file's start: its header at least
NUM_SAMPLES, SAMPLE_BYTES = 2048, 4096  # a larger file is sampled; these reach every matrix of UMT5-XXL


@dataclass(frozen=True)
class TextEncoderFiles:
    """The folders of a text encoder and of its tokenizer."""

    encoder: Path
    tokenizer: Path

    def text_dim(self) -> int:
        """Return the width of the embeddings, which config.json calls d_model.

        Raises:
            TeacherFileError: the folder is not that of a UMT5 encoder.
        """
        path = self.encoder / "config.json"
        if not path.is_file():
            raise TeacherFileError(
                f"{self.encoder}: holds no config.json; a text encoder is a folder like text_encoder/ of a Wan pipeline in "
                "diffusers format, with config.json and *.safetensors (an original models_t5_*.pth cannot be used directly)"
            )
        config = read_json(path)
        model_type, text_dim = config.get("model_type"), config.get("d_model")
        if model_type != "umt5" or not isinstance(text_dim, int) or text_dim < 1:
            raise TeacherFileError(
                f"{path}: model_type={model_type!r}, d_model={text_dim!r}; "
                "Wan's text encoder has model_type 'umt5' and a positive d_model"
            )
        return text_dim

    def check_text_dim(self, text_dim: int) -> None:
        """Refuse an encoder whose embeddings have another width than teacher and student take."""
        if (width := self.text_dim()) != text_dim:
            raise UserError(
                f"{self.encoder}: gives embeddings of width {width}, teacher and student take {text_dim}; point "
                "--text_encoder_path at the teacher's own encoder"
            )

    def num_parameters(self) -> int:
        """Count the encoder's parameters by the headers of its files; the embedding table counts once."""
        sizes: dict[str, int] = {}
        for path in self._weight_files():
            sizes |= {name: prod(shape) for name, shape in read_header(path).shapes.items()}
        table = "encoder.embed_tokens.weight"
        return sum(size for name, size in sizes.items() if name != table or "shared.weight" not in sizes)

    def fingerprint(self, settings: str) -> str:
        """Return a digest that changes with anything that changes an embedding; large weight files are only sampled.

        Args:
            settings: what an embedding depends on beside the files.
        """
        if not any((self.tokenizer / name).is_file() for name in TOKENIZER_MODELS):
            raise TeacherFileError(
                f"{self.tokenizer}: holds no {' or '.join(TOKENIZER_MODELS)}; give the tokenizer/ folder of a Wan pipeline"
            )
        small = [self.encoder / "config.json", *(self.tokenizer / name for name in TOKENIZER_FILES)]
        parts = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in small if path.is_file()]
        parts += [(path.name, _weight_file_digest(path)) for path in sorted(self._weight_files())]
        return hashlib.sha256(json.dumps([settings, parts]).encode()).hexdigest()[:32]

    def _weight_files(self) -> list[Path]:
        """Return the files that transformers will read."""
        single, index = self.encoder / "model.safetensors", self.encoder / "model.safetensors.index.json"
        if single.is_file():
            return [single]
        if not index.is_file():
            raise TeacherFileError(
                f"{self.encoder}: holds neither {single.name} nor {index.name}; only safetensors weights are read"
            )
        return indexed_files(index)


def find_text_encoder(path: str | Path) -> TextEncoderFiles:
    """Find encoder and tokenizer by `--text_encoder_path`: a pipeline folder, a hub id, or the encoder's own folder."""
    folder = Path(path)
    if not folder.exists() and is_hub_id(path):
        folder = fetch(str(path), ["text_encoder/*", "tokenizer/*"], "a local folder with text_encoder/ and tokenizer/")
    if (folder / "text_encoder").is_dir():
        return TextEncoderFiles(folder / "text_encoder", folder / "tokenizer")
    if (folder / "config.json").is_file():
        beside = folder.parent / "tokenizer"
        return TextEncoderFiles(folder, beside if beside.is_dir() else folder)
    reason = "holds no text encoder" if folder.exists() else "there is no such folder"
    raise TeacherFileError(f"{path}: {reason}; --text_encoder_path takes {TEXT_ENCODER_ADVICE}")


def _weight_file_digest(path: Path) -> str:
    read_header(path)  # refuses a file that is not whole
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file:
        digest.update(file.read(READ_WHOLE_BYTES if size <= READ_WHOLE_BYTES else HEADER_BYTES))
        for start in range(0, size if size > READ_WHOLE_BYTES else 0, max(1, size // NUM_SAMPLES)):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
