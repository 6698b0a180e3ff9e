"""Damage to files as hypothesis draws it: JSON with hostile values, safetensors and GGUF with hostile headers, bytes, no file at all.

A `Damage` is drawn before the file is known, so that it can be told in a line and done again.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

DEEP = {f"<deep {count}>": "[" * count + "]" * count for count in (90, 400, 100_000)}
HOSTILE = [
    None, True, False, 0, 1, -1, -20, 2, 3, 0.5, -0.0, 1e-300, 1e308, 10**9, 2**31, 2**63, 10**30, 10**400, "", " ", "x", "x" * 5000,
    "../../etc/passwd", "/", "\0", "\ud800", "\u202e\n\x1b[2J", "0", "nan", [], {}, [None], [0.0], [[]], {"": ""}, {"x": None}, "mock",
    float("nan"), float("inf"), float("-inf"), [1] * 1000, [0.0] * 16, [None] * 16, ["x"] * 16, {str(n): n for n in range(300)}, *DEEP,
]  # fmt: skip
DTYPES = ["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "I8", "U8", "I64", "BOOL", "F4", "X", ""]
IN_JSON = ["value", "value", "value", "delete", "rename", "add", "twice", "text"]
IN_BYTES = ["flip", "truncate", "insert", "zeros", "empty", "utf-16", "latin-1", "pickle"]
IN_PLACE = ["missing", "folder", "pipe", "loop", "dangling"]
IN_TENSORS = ["header", "dtype", "shape", "name", "offsets", "metadata", "nan", "length"]
IN_GGUF = ["header bytes", "header number"]
GGUF_HEADER_BYTES = 2000  # the counts, the fields and the first tensors' names, shapes, types and places


@dataclass(frozen=True)
class Damage:
    """What is done to one of the files of a case.

    Attributes:
        file: which of the files, as a share of their number; `where` is as well of what is in it.
        kind: the name of what is done.
        value: what is put there.
    """

    file: float
    kind: str
    where: float
    value: Any

    def __str__(self) -> str:
        return f"{self.kind} at {self.where:.4f}: {ascii(self.value)[:80]}"


SHARES = st.floats(min_value=0, max_value=1, exclude_max=True)
VALUES = st.one_of(
    st.sampled_from(HOSTILE),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(st.none() | st.integers(-3, 3), lambda inner: st.lists(inner, max_size=3)),
)


def damages(kinds: list[str]) -> st.SearchStrategy[Damage]:
    return st.builds(Damage, file=SHARES, kind=st.sampled_from(kinds), where=SHARES, value=VALUES)


def apply(damage: Damage, files: list[Path], bomb: Path) -> Path:
    """Damage one of the files and return it; a pickle put there would make the folder `bomb` where anything opened it."""
    file = files[int(damage.file * len(files))]
    if damage.kind in IN_PLACE:
        _replace(file, damage.kind)
    elif damage.kind == "pickle":
        file.write_bytes(pickle.dumps(Bomb(str(bomb))))
    elif damage.kind in IN_BYTES:
        file.write_bytes(_bytes(file.read_bytes(), damage))
    elif damage.kind in IN_GGUF:
        file.write_bytes(_gguf(file.read_bytes(), damage))
    elif damage.kind in IN_TENSORS and file.suffix == ".safetensors":
        file.write_bytes(_tensors(file.read_bytes(), damage))
    elif file.suffix == ".jsonl":
        lines = file.read_text(encoding="utf-8").splitlines()
        at = int(damage.where * len(lines))
        lines[at] = _json(lines[at], damage)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    elif file.suffix == ".json":
        file.write_text(_json(file.read_text(encoding="utf-8"), damage), encoding="utf-8", errors="surrogatepass")
    else:
        file.write_bytes(_bytes(file.read_bytes(), damage))
    return file


class Bomb:
    """An object whose pickle makes a folder where it is opened."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


def _replace(file: Path, kind: str) -> None:
    if file.is_dir():
        shutil.rmtree(file)
    else:
        file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "missing":
        file.symlink_to(file.name if kind == "loop" else "nowhere")


def _bytes(content: bytes, damage: Damage) -> bytes:
    at = int(damage.where * len(content))
    if damage.kind == "flip":
        return content[:at] + bytes(byte ^ 0xFF for byte in content[at : at + 4]) + content[at + 4 :]
    if damage.kind == "insert":
        return content[:at] + repr(damage.value).encode("utf-8", "surrogatepass") + content[at:]
    if damage.kind == "zeros":
        return content[:at] + bytes(len(content) - at)
    if damage.kind in ("utf-16", "latin-1"):
        return ("é" + content.decode("utf-8", "replace")).encode(damage.kind, "replace")
    return b"" if damage.kind == "empty" else content[:at]


def _gguf(content: bytes, damage: Damage) -> bytes:
    """Damage the header of a GGUF file: some bytes of it, or a whole number as the format has them."""
    at = int(damage.where * min(GGUF_HEADER_BYTES, len(content)))
    if damage.kind == "header bytes":
        return content[:at] + bytes(byte ^ 0xFF for byte in content[at : at + 2]) + content[at + 2 :]
    value = damage.value if type(damage.value) is int else len(str(damage.value))
    return content[:at] + (value % 2**64).to_bytes(8, "little") + content[at + 8 :]


def _json(text: str, damage: Damage) -> str:
    """Damage one place of a JSON text: all places are as likely, whatever their depth."""
    tree = json.loads(text)
    places = list(_places(tree))
    if not places or damage.kind == "text":
        at = int(damage.where * len(text))
        return text[:at] + _dump(damage.value) + text[at:]
    holder, key = places[int(damage.where * len(places))]
    if damage.kind == "delete":
        del holder[key]
    elif isinstance(holder, dict) and damage.kind == "rename":
        holder[str(damage.value)[:5000]] = holder.pop(key)
    elif isinstance(holder, dict) and damage.kind == "add":
        holder[str(damage.value)[:5000]] = damage.value
    elif damage.kind == "twice":
        return text.replace("{", f'{{"{key}": {_dump(damage.value)}, ', 1)
    else:
        holder[key] = damage.value
    return _dump(tree)


def _places(tree: Any):
    """Yield every (holder, key or index) of a JSON tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _dump(value: Any) -> str:
    text = json.dumps(value)
    for name, deep in DEEP.items():
        text = text.replace(json.dumps(name), deep)
    return text


def _tensors(content: bytes, damage: Damage) -> bytes:
    """Damage a safetensors file: its header stays well-formed unless that is the damage."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = names[int(damage.where * len(names))]
    entry, value = header[name], damage.value
    if damage.kind == "length":
        size = value if isinstance(value, int) and 0 <= value < 2**64 else 2**40
        return int(size).to_bytes(8, "little") + content[8:]
    if damage.kind == "nan":
        start, _ = entry["data_offsets"]
        data = data[:start] + b"\x00\x00\xc0\x7f" + data[start + 4 :]
    elif damage.kind == "dtype":
        entry["dtype"] = DTYPES[(value if isinstance(value, int) else len(str(value))) % len(DTYPES)]
    elif damage.kind == "shape":
        entry["shape"] = value if isinstance(value, list) else [value]
    elif damage.kind == "offsets":
        entry["data_offsets"] = value if isinstance(value, list) else [value, value]
    elif damage.kind == "name":
        header[str(value)[:5000]] = header.pop(name)
    elif damage.kind == "metadata":
        texts = header.setdefault("__metadata__", {})
        inner = texts.get("student_config")
        texts["student_config"] = _json(inner, Damage(0, "value", damage.where, value)) if inner else str(value)
    text = (
        _json(json.dumps(header), Damage(0, "value", damage.where, value)) if damage.kind == "header" else _dump(header)
    )
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + data
