"""The tokenizer of Wan's text encoder: tokenizer.json or SentencePiece's own model, as a file or inside the encoder's.

Nothing but the file itself decides what a prompt becomes: no library searches a folder, and no class that a folder names is made.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from wandistiller.errors import UserError, first_line
from wandistiller.files.atomic import atomic_path
from wandistiller.files.gguf_files import NO_GGUF, read_gguf_header
from wandistiller.files.json_files import TeacherFileError
from wandistiller.files.paths import require_file
from wandistiller.files.safetensors_files import refusing_damage
from wandistiller.files.weights import is_gguf, stored_tensors

JSON_NAME, SENTENCEPIECE_NAME = "tokenizer.json", "spiece.model"
INSIDE = "spiece_model"  # ComfyUI's name for the model as bytes in a file of weights
# What of SentencePiece's model llama.cpp's converter writes into a GGUF (convert_hf_to_gguf.py: T5Model.set_vocab)
_WORDS = ("tokens", "scores", "token_type")
_RULES = ("precompiled_charsmap", "add_space_prefix", "remove_extra_whitespaces", "eos_token_id")
MAX_BYTES = 2**28  # UMT5's are 4 MB (spiece.model) and 17 MB (tokenizer.json)
Tokenize = Callable[[Sequence[str]], list[list[int]]]


def tokenizer_file(place: Path) -> Path | None:
    """Return the file that a tokenizer is read from: `place` itself, or the one in this folder; None where there is none."""
    if place.is_file():
        return place
    return next((place / name for name in (JSON_NAME, SENTENCEPIECE_NAME) if (place / name).is_file()), None)


def require_tokenizer(place: Path) -> Path:
    """Return `tokenizer_file(place)`, or refuse a place without one."""
    if (path := tokenizer_file(place)) is None:
        raise TeacherFileError(
            f"{place}: holds no {JSON_NAME} or {SENTENCEPIECE_NAME}; give the tokenizer/ folder of a Wan pipeline"
        )
    return path


def has_tokenizer_inside(weights: Path) -> bool:
    """Tell whether a file of weights brings its tokenizer along, with all that decides what a text becomes."""
    if not is_gguf(weights):
        return any(name.endswith(INSIDE) for name in stored_tensors(weights))
    fields = read_gguf_header(weights).fields
    return fields.get("tokenizer.ggml.model") == "t5" and all(
        f"tokenizer.ggml.{name}" in fields for name in (*_WORDS, *_RULES)
    )


def open_tokenizer(place: Path) -> Tokenize:
    """Return a function from texts to their token numbers, the closing </s> included and nothing cut.

    Raises:
        UserError: there is no tokenizer, or it cannot be read.
    """
    name, content = read_tokenizer(place)
    try:
        return _of_json(content) if name == JSON_NAME else _of_sentencepiece(content)
    except Exception as err:  # the tokenizers library raises bare Exception for a file it cannot parse
        path = tokenizer_file(place)
        raise UserError(f"{path}: the tokenizer cannot be loaded ({first_line(err)})") from err


def read_tokenizer(place: Path) -> tuple[str, bytes]:
    """Return the name that a pipeline gives the tokenizer's file, and its content."""
    path = require_tokenizer(place)
    if path.suffix in (".json", ".model"):
        return JSON_NAME if path.suffix == ".json" else SENTENCEPIECE_NAME, _read(path)
    return SENTENCEPIECE_NAME, _model_of_gguf(path) if is_gguf(path) else _read_inside(path)


def write_tokenizer(place: Path, folder: Path) -> None:
    """Write a tokenizer's file, whole, into a folder."""
    name, content = read_tokenizer(place)
    with atomic_path(folder / name) as path:
        path.write_bytes(content)


def _read(path: Path) -> bytes:
    require_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: a tokenizer of more than {MAX_BYTES:,} bytes is not read")
    return path.read_bytes()


def _read_inside(weights: Path) -> bytes:
    stored = next(tensor for name, tensor in stored_tensors(weights).items() if name.endswith(INSIDE))
    if stored.dtype != "U8" or len(stored.shape) != 1 or stored.shape[0] > MAX_BYTES:
        raise UserError(f"{weights}: {stored.key} is stored as {stored.dtype}; the tokenizer's bytes (U8) belong there")
    return stored.read().numpy().tobytes()


def _model_of_gguf(path: Path) -> bytes:
    """Return SentencePiece's model of the fields that a converter took from it."""
    from sentencepiece import sentencepiece_model_pb2

    fields = read_gguf_header(path).fields
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


def _of_json(content: bytes) -> Tokenize:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def _of_sentencepiece(content: bytes) -> Tokenize:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=content)
    return lambda texts: processor.encode(list(texts), add_eos=True)
