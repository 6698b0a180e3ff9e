"""A UMT5 text encoder and its tokenizer on disk: where they lie, what its embeddings depend on, and how a text becomes tokens.

Nothing here loads a weight or imports transformers. Nothing but the tokenizer's file itself decides what a prompt becomes: no library
searches a folder, and no class that a folder names is made.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from wandistiller.errors import UserError, first_line
from wandistiller.files.atomic import atomic_path
from wandistiller.files.gguf_files import NO_GGUF, read_gguf_header
from wandistiller.files.hub import place_of
from wandistiller.files.paths import require_file
from wandistiller.files.tensor_files import refusing_damage
from wandistiller.files.weights import digest_of, is_gguf, kept_digest, stored_tensors
from wandistiller.wan.names import part_files
from wandistiller.wan.umt5 import ANCHOR, Umt5Files

TEXT_ENCODER_SOURCE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"  # all released Wans share this encoder
TEXT_ENCODER_ADVICE = f"a folder with text_encoder/ and tokenizer/, such as a copy of {TEXT_ENCODER_SOURCE} (only these two folders are needed)"
ORIGINAL_TOKENIZER = "google/umt5-xxl"  # where the original releases keep it
_HUB_FILES = ["text_encoder/*.json", "text_encoder/*.safetensors", "tokenizer/*", "models_t5_umt5*"]
_HUB_FILES += [f"{ORIGINAL_TOKENIZER}/*"]
JSON_NAME, SENTENCEPIECE_NAME = "tokenizer.json", "spiece.model"
INSIDE = "spiece_model"  # ComfyUI's name for the model as bytes in a file of weights
# What of SentencePiece's model llama.cpp's converter writes into a GGUF (convert_hf_to_gguf.py: T5Model.set_vocab)
_WORDS = ("tokens", "scores", "token_type")
_RULES = ("precompiled_charsmap", "add_space_prefix", "remove_extra_whitespaces", "eos_token_id")
WORD_START = "\u2581"  # SentencePiece's mark
MAX_BYTES = 2**28  # UMT5's are 4 MB (spiece.model) and 17 MB (tokenizer.json)
Tokenize = Callable[[Sequence[str]], list[list[int]]]


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
            UserError: this is no usable UMT5 encoder.
        """
        return Umt5Files(self.encoder)

    def check_text_dim(self, text_dim: int) -> None:
        """Refuse an encoder whose embeddings have another width than teacher and student take."""
        if (width := self.umt5.text_dim) != text_dim:
            raise UserError(
                f"{self.encoder}: gives embeddings of width {width}, teacher and student take {text_dim}; give the "
                "teacher's own encoder"
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
        UserError: there is none, or there are several, or its tokenizer is missing.
    """
    folder = place_of(path, _HUB_FILES, "a local folder with text_encoder/ and tokenizer/")
    if (folder / "text_encoder").is_dir():
        return TextEncoderFiles(folder / "text_encoder", folder / "tokenizer")
    files = encoder_files(folder)
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise UserError(f"{folder}: holds several text encoders ({names}); give one of them")
    if files:
        return TextEncoderFiles(files[0], _tokenizer_of(files[0]))
    if (folder / "config.json").is_file():
        beside = folder.parent / "tokenizer"
        return TextEncoderFiles(folder, beside if beside.is_dir() else folder)
    raise UserError(f"{path}: there is no text encoder there; give {TEXT_ENCODER_ADVICE}")


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
    raise UserError(
        f"{weights}: holds no tokenizer, and none lies beside it ({JSON_NAME} or {SENTENCEPIECE_NAME}); copy that of "
        f"{ORIGINAL_TOKENIZER} or of {TEXT_ENCODER_SOURCE} there"
    )


# ---- the tokenizer ----


def tokenizer_file(place: Path) -> Path | None:
    """Return the file that a tokenizer is read from: `place` itself, or the one in this folder; None where there is none."""
    if place.is_file():
        return place
    return next((place / name for name in (JSON_NAME, SENTENCEPIECE_NAME) if (place / name).is_file()), None)


def require_tokenizer(place: Path) -> Path:
    if (path := tokenizer_file(place)) is None:
        raise UserError(
            f"{place}: holds no {JSON_NAME} or {SENTENCEPIECE_NAME}; give the tokenizer/ folder of a Wan pipeline"
        )
    return path


def has_tokenizer_inside(weights: Path) -> bool:
    """Tell whether a file of weights brings its tokenizer along, with all that decides what a text becomes."""
    if not is_gguf(weights):
        return any(name.endswith(INSIDE) for name in stored_tensors(weights))
    fields = read_gguf_header(weights).metadata
    return fields.get("tokenizer.ggml.model") == "t5" and all(
        f"tokenizer.ggml.{name}" in fields for name in (*_WORDS, *_RULES)
    )


def open_tokenizer(place: Path) -> Tokenize:
    """Return a function from texts to their token numbers, the closing </s> included and nothing cut.

    Raises:
        UserError: there is no tokenizer, or it cannot be read.
    """
    tokenizer = _load_tokenizer(place)
    if hasattr(tokenizer, "encode_batch"):
        return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    return lambda texts: tokenizer.encode(list(texts), add_eos=True)


def vocabulary(place: Path) -> list[str]:
    """Return the tokens that can begin a word, in their order in the alphabet."""
    tokenizer = _load_tokenizer(place)
    is_json = hasattr(tokenizer, "get_vocab")
    pieces = tokenizer.get_vocab() if is_json else map(tokenizer.id_to_piece, range(len(tokenizer)))
    return sorted(piece[1:] for piece in pieces if piece.startswith(WORD_START) and piece != WORD_START)


def _load_tokenizer(place: Path) -> Any:
    """Return the tokenizers library's Tokenizer, or a SentencePieceProcessor."""
    name, content = read_tokenizer(place)
    try:
        if name == JSON_NAME:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_str(content.decode())
            tokenizer.no_truncation()
            tokenizer.no_padding()
            if tokenizer.encode("a").tokens[-1:] != ["</s>"]:
                raise ValueError("it ends no text with </s>, as UMT5's does")
            return tokenizer
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=content)
    except Exception as err:  # the tokenizers library raises bare Exception for a file it cannot parse
        path = tokenizer_file(place)
        raise UserError(f"{path}: the tokenizer cannot be loaded ({first_line(err)})") from err


def read_tokenizer(place: Path) -> tuple[str, bytes]:
    """Return the name that a pipeline gives the tokenizer's file, and its content."""
    path = require_tokenizer(place)
    if path.suffix in (".json", ".model"):
        require_file(path)
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: a tokenizer of more than {MAX_BYTES:,} bytes is not read")
        return JSON_NAME if path.suffix == ".json" else SENTENCEPIECE_NAME, path.read_bytes()
    return SENTENCEPIECE_NAME, _model_of_gguf(path) if is_gguf(path) else _read_inside(path)


def write_tokenizer(place: Path, folder: Path) -> None:
    name, content = read_tokenizer(place)
    with atomic_path(folder / name) as path:
        path.write_bytes(content)


def _read_inside(weights: Path) -> bytes:
    stored = next(tensor for name, tensor in stored_tensors(weights).items() if name.endswith(INSIDE))
    if stored.dtype != "U8" or len(stored.shape) != 1 or stored.shape[0] > MAX_BYTES:
        raise UserError(f"{weights}: {stored.key} is stored as {stored.dtype}; the tokenizer's bytes (U8) belong there")
    return stored.read().numpy().tobytes()


def _model_of_gguf(path: Path) -> bytes:
    """Return SentencePiece's model of the fields that a converter took from it."""
    from sentencepiece import sentencepiece_model_pb2

    fields = read_gguf_header(path).metadata
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    with refusing_damage(path, NO_GGUF):
        tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"] for name in _WORDS)
        charsmap, adds_space, removes_spaces, end = (fields[f"tokenizer.ggml.{name}"] for name in _RULES)
        if tokens[end] != "</s>":
            raise ValueError(f"token {end} is {tokens[end]!r} and no </s>")
        for token, score, kind in zip(tokens, scores, kinds, strict=True):
            model.pieces.add(piece=token, score=float(score), type=int(kind))
        model.trainer_spec.byte_fallback = model.SentencePiece.BYTE in kinds
        model.trainer_spec.unk_id = list(kinds).index(model.SentencePiece.UNKNOWN)
        model.normalizer_spec.precompiled_charsmap = bytes(charsmap.astype("uint8"))
        model.normalizer_spec.add_dummy_prefix = bool(adds_space)
        model.normalizer_spec.remove_extra_whitespaces = bool(removes_spaces)
    return model.SerializeToString()
