"""Damage to files, drawn from a random generator: hostile JSON, headers and bytes, no file at all, and strangers.

A stranger is a file that is whole, and yet not what it seems: a tensor too many, too few, renamed or rescaled, a config with fields
that a library's loader would follow. What must be told of it by name stands in the `Damage`.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DEEP = {f"<deep {count}>": "[" * count + "]" * count for count in (90, 400, 100_000)}
HOSTILE = [
    None, True, False, 0, 1, -1, -20, 2, 3, 0.5, -0.0, 1e-300, 1e308, 10**9, 2**31, 2**63, 10**30, 10**400, "", " ", "x", "x" * 5000,
    "../../etc/passwd", "/", "\0", "\ud800", "\u202e\n\x1b[2J", "0", "nan", [], {}, [None], [0.0], [[]], {"": ""}, {"x": None}, "mock",
    float("nan"), float("inf"), float("-inf"), [1] * 1000, [0.0] * 16, [None] * 16, ["x"] * 16, {str(n): n for n in range(300)}, *DEEP,
]  # fmt: skip
# Fields that transformers', diffusers' or PEFT's loaders read somewhere, and what a stranger may write there
FIELDS = [
    "_class_name", "_name_or_path", "_commit_hash", "architectures", "auto_map", "quantization_config", "torch_dtype", "dtype",
    "transformers_weights", "weight_map", "metadata", "tie_word_embeddings", "attn_implementation", "trust_remote_code",
    "use_safetensors", "subfolder", "gguf_file", "adapter_config", "peft_config", "base_model_name_or_path", "custom_pipeline",
    "tokenizer_class", "tokenizer_file", "vocab_file", "added_tokens_decoder", "chat_template", "model_max_length", "truncation",
    "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder", "processor_class", "image_processor_type", "from_flax",
    "is_encoder_decoder", "vocab_size", "num_layers", "model_type", "sp_model_kwargs", "revision", "local_files_only", "device_map",
]  # fmt: skip
LURES = [
    "pytorch_model.bin", "./pytorch_model.bin", "evil.Evil", "../evil--evil.Evil", "https://localhost:9/evil", {"AutoModel": "evil.Evil"},
    {"": "pytorch_model.bin"}, ["os", "system"], {"quant_method": "bitsandbytes", "load_in_8bit": True}, {"strategy": "Fixed", "length": 2},
    {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}, "{{ ''.__class__ }}", *HOSTILE[:12],
]  # fmt: skip
STRANGERS = [
    "blocks.0.to_gate_compress.weight", "blocks.0.attn1.to_q.scale_weight", "blocks.0.attn1.to_q.weight.absmax", "img_emb.proj.0.weight",
    "control_adapter.conv.weight", "vace_blocks.0.before_proj.weight", "scaled_fp8", "model_ema.decay", "encoder.block.0.weight", "bias",
    "decoder.extra.weight", "blocks.99.ffn.net.2.weight", "blocks.0.attn1.to_q.bias_2", "lora_unet_blocks_0_x.alpha", "logit_scale", "x",
]  # fmt: skip
DTYPES = ["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "I8", "U8", "I64", "BOOL", "F4", "X", ""]


@dataclass(frozen=True)
class Damage:
    """What was done to a file.

    Attributes:
        names: of a stranger's tensor, one of which must be told; none where nothing need be named.
        may_be_used: whether it is enough that the results differ, as those of a rescaled tensor do.
    """

    kind: str
    about: str
    names: tuple[str, ...] = ()
    may_be_used: bool = False


def damage(rng: Random, file: Path, bomb: Path) -> Damage:
    """Damage a file; what is pickled or coded into it would make the folder `bomb` where anything opened or ran it."""
    kind = rng.choice([kind for kinds in rng.choices(_kinds_of(file.suffix)) for kind in kinds])
    if kind in STRANGE_TENSORS:
        return _strange(rng, file, kind)
    if kind == "loader's field":
        return _loaders_field(rng, file, bomb)
    value = _value(rng)
    if kind in PLACES:
        _replace(file, kind)
    elif kind in JSON:
        lines = file.read_text(encoding="utf-8").splitlines() if file.suffix == ".jsonl" else [file.read_text("utf-8")]
        at = rng.randrange(len(lines))
        lines[at] = _json(rng, lines[at], kind, value)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    else:
        change = _headers if kind in HEADERS else _bytes
        file.write_bytes(change(rng, file.read_bytes(), kind, value, bomb))
    return Damage(kind, f"{kind} in {file.name}: {ascii(value)[:80]}")


def _value(rng: Random) -> Any:
    draws: list[Callable[[], Any]] = [lambda: rng.choice(HOSTILE)] * 3
    draws += [
        lambda: rng.randrange(-(10**6), 10**6),
        lambda: rng.uniform(-1e3, 1e3),
        lambda: chr(rng.randrange(1, 9999)),
    ]
    return rng.choice(draws)()


# ---- any file ----


class Bomb:
    """An object whose pickle makes a folder where it is opened."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


BYTES = ["flip", "truncate", "insert", "zeros", "empty", "utf-16", "latin-1", "pickle"]
PLACES = ["missing", "folder", "pipe", "loop", "dangling"]
GGUF = ["header bytes", "header number"]
GGUF_HEADER_BYTES = 2000  # the counts, the fields and the first tensors' names, shapes, types and places


def _replace(file: Path, kind: str) -> None:
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "missing":
        file.symlink_to(file.name if kind == "loop" else "nowhere")


def _bytes(rng: Random, content: bytes, kind: str, value: Any, bomb: Path) -> bytes:
    at = int(rng.random() * (min(GGUF_HEADER_BYTES, len(content)) if kind in GGUF else len(content)))
    if kind == "pickle":
        return pickle.dumps(Bomb(bomb))
    if kind in ("flip", "header bytes"):
        return content[:at] + bytes(byte ^ 0xFF for byte in content[at : at + 3]) + content[at + 3 :]
    if kind == "header number":
        number = value if type(value) is int else len(str(value))
        return content[:at] + (number % 2**64).to_bytes(8, "little") + content[at + 8 :]
    if kind == "insert":
        return content[:at] + repr(value).encode("utf-8", "surrogatepass") + content[at:]
    if kind == "zeros":
        return content[:at] + bytes(len(content) - at)
    if kind in ("utf-16", "latin-1"):
        return ("é" + content.decode("utf-8", "replace")).encode(kind, "replace")
    return b"" if kind == "empty" else content[:at]


# ---- JSON ----


JSON = ["value", "delete", "rename", "add", "twice", "text"]


def _json(rng: Random, text: str, kind: str, value: Any) -> str:
    """Damage one place of a JSON text: all places are as likely, whatever their depth."""
    tree = json.loads(text)
    places = list(_places(tree))
    if not places or kind == "text":
        at = rng.randrange(len(text) + 1)
        return text[:at] + _dump(value) + text[at:]
    holder, key = rng.choice(places)
    if kind == "delete":
        del holder[key]
    elif isinstance(holder, dict) and kind in ("rename", "add"):
        holder[str(value)[:5000]] = holder.pop(key) if kind == "rename" else value
    elif kind == "twice":
        return text.replace("{", f'{{"{key}": {_dump(value)}, ', 1)
    else:
        holder[key] = value
    return _dump(tree)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (holder, key or index) of a JSON tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(value)


def _dump(value: Any) -> str:
    text = json.dumps(value)
    for name, deep in DEEP.items():
        text = text.replace(json.dumps(name), deep)
    return text


def _loaders_field(rng: Random, file: Path, bomb: Path) -> Damage:
    """Give a config a field that a library's loader might follow, with what it would find there."""
    (file.parent / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(bomb)))
    (file.parent / "evil.py").write_text(f"import os\nos.mkdir({str(bomb)!r})\n", encoding="utf-8")
    field, lure, tree = rng.choice(FIELDS), rng.choice(LURES), json.loads(file.read_text(encoding="utf-8"))
    if isinstance(tree, dict):
        tree[field] = lure
    file.write_text(_dump(tree), encoding="utf-8", errors="surrogatepass")
    return Damage("loader's field", f"{field} in {file.name}: {ascii(lure)[:80]}")


# ---- safetensors ----


HEADERS = ["header", "dtype", "shape", "name", "offsets", "metadata", "length"]
STRANGE_TENSORS = ["extra", "without one", "renamed", "rescaled", "reshaped", "not finite"]


def _kinds_of(suffix: str) -> list[list[str]]:
    """The kinds that files of a suffix can be damaged in, by families that are as likely."""
    own = {
        ".json": [JSON, JSON, ["loader's field"]],
        ".jsonl": [JSON],
        ".safetensors": [HEADERS, STRANGE_TENSORS, STRANGE_TENSORS],
        ".gguf": [GGUF],
    }
    return [*own.get(suffix, []), [*BYTES, *PLACES]]


def _headers(rng: Random, content: bytes, kind: str, value: Any, bomb: Path) -> bytes:
    """Damage the header of a safetensors file; it stays well-formed unless that is the damage."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = rng.choice([name for name in header if name != "__metadata__"])
    if kind == "length":
        size = value if isinstance(value, int) and 0 <= value < 2**64 else 2**40
        return int(size).to_bytes(8, "little") + content[8:]
    if kind == "dtype":
        header[name]["dtype"] = rng.choice(DTYPES)
    elif kind == "shape":
        header[name]["shape"] = value if isinstance(value, list) else [value]
    elif kind == "offsets":
        header[name]["data_offsets"] = value if isinstance(value, list) else [value, value]
    elif kind == "name":
        header[str(value)[:5000]] = header.pop(name)
    elif kind == "metadata":
        texts = header.setdefault("__metadata__", {})
        inner = texts.get("student_config")
        texts["student_config"] = _json(rng, inner, "value", value) if inner else str(value)
    text = _json(rng, json.dumps(header), "value", value) if kind == "header" else _dump(header)
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + data


def _strange(rng: Random, file: Path, kind: str) -> Damage:
    """Write a whole file of tensors that are not all what they should be."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    floats = [name for name in sorted(tensors) if tensors[name].is_floating_point() and tensors[name].numel()]
    # A LoRA without an alpha is whole, with the rank in its place.
    own = [name for name in sorted(tensors) if kind != "without one" or not name.endswith(".alpha")]
    name = rng.choice(floats if kind == "not finite" and floats else own)
    names, value = (name,), tensors[name]
    if kind == "extra":
        stem, _, last = name.rpartition(".")
        name = rng.choice([*STRANGERS, f"{stem}.extra.{last}".lstrip("."), f"{name}_scale"])
        others = [torch.zeros(2, dtype=torch.int8), torch.ones(2).to(torch.float8_e4m3fn)]
        names, tensors[name] = (name,), rng.choice([torch.tensor(2.0), torch.ones(3), value, *others]).clone()
    elif kind in ("without one", "renamed"):
        del tensors[name]
        if kind == "renamed":
            new = rng.choice([f"{name}_2", f"other.{name}", name.replace("weight", "wieght") + "x"])
            names, tensors[new] = (name, new), value
    elif kind == "rescaled":
        tensors[name] = (value * 3 + 1).to(value.dtype) if value.dtype.itemsize > 1 else value.flip(0).contiguous()
    elif kind == "reshaped":
        tensors[name] = torch.cat([value, value]) if value.ndim else value.expand(3).contiguous()
    elif floats:
        value.view(-1)[rng.randrange(value.numel())] = torch.nan
    save_file(tensors, file, metadata)
    return Damage(kind, f"{kind} in {file.name}: {names[-1]}", names, kind in ("extra", "rescaled"))
