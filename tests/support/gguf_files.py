"""Tiny Wans in GGUF files as converters write them, written with the gguf library itself, and what the files mean."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor, from_numpy

from support.wan_folders import original_tensors, random_transformer, with_weights

# Heads as wide as every Wan's, and rows of whole blocks of 256 values, as all types of "K" need.
SHAPE = {"heads": 2, "head_dim": 128, "layers": 1, "ffn_dim": 256, "channels": 16, "text_dim": 20}
# Where in a block of each type its float16 scales lie; the library reads these types and writes none of them.
SCALES_OF_BLOCKS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}


def random_blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, seed: int) -> np.ndarray:
    """Return random bytes that are blocks of a type, with scales that make values near unit size."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    for start in SCALES_OF_BLOCKS[kind.name]:
        scale = np.float16(rng.uniform(5e-5, 1e-4, blocks.shape[:-1]))
        blocks[..., start : start + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def quantised(values: np.ndarray, dtype: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return values as they are stored in a type, and the float32 that this means."""
    kind = gguf.GGMLQuantizationType[dtype]
    if dtype in SCALES_OF_BLOCKS:
        stored = random_blocks(values.shape, kind, seed)
    else:
        stored = gguf.quants.quantize(values, kind)
    return stored, gguf.quants.dequantize(stored, kind).reshape(values.shape)


def is_linear_of_a_block(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name


def finish(writer: gguf.GGUFWriter, path: Path) -> None:
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wan_gguf(
    path: Path,
    *,
    dtype: str = "Q8_0",
    architecture: str | None = "wan",
    prefix: str = "",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    noted_shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
    **shape,
):
    """Write a Wan's GGUF: the Linear weights of the blocks in one type, other matrices in 16 bits, and the rest in fp32.

    Args:
        shapes: other shapes to store tensors in, by their original names.
        noted_shapes: what `comfy.gguf.orig_shape.NAME` says of them.

    Returns:
        diffusers' transformer with the weights that the file holds.
    """
    model, rest = random_transformer(**SHAPE | shape, seed=seed), "BF16" if dtype == "F16" else "F16"
    writer = gguf.GGUFWriter(path=None, arch=architecture or "")
    if architecture is None:
        writer.kv_data[0].clear()
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, noted in (noted_shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{prefix}{name}", [int(size) for size in noted])
    held: dict[str, Tensor] = {}
    for number, (name, tensor) in enumerate(original_tensors(model).items()):
        values = tensor.numpy()
        stored_as = dtype if is_linear_of_a_block(name) else rest if values.ndim == 2 else "F32"
        stored, means = quantised(values, stored_as, seed + number)
        held[name] = from_numpy(means.astype(np.float32))
        if shapes and name in shapes:
            stored = stored.reshape(shapes[name])
        writer.add_tensor(prefix + name, stored, raw_dtype=gguf.GGMLQuantizationType[stored_as])
    finish(writer, path)
    canonical = dict(zip(model.state_dict(), held.values(), strict=True))
    return with_weights(model, canonical)
