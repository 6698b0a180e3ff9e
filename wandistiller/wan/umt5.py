"""UMT5, Wan's text encoder, from files in any layout: names, shape, and transformers' model built around our tensors.

The names are transformers' own (also ComfyUI's), the original release's (Wan2.1:wan/modules/t5.py) and GGUF's (llama.cpp's
"t5encoder"). What the tensors tell decides the model's shape, and a config.json beside them must agree.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wandistiller.errors import UserError, shown
from wandistiller.files.gguf_files import require_architecture
from wandistiller.files.json_files import RATIO, WHOLE, read_json, setting
from wandistiller.files.weights import Weight, admit, all_tensors, is_gguf, weight_files
from wandistiller.wan.names import other_part, own_names, renamed

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

TABLE, COPY = "shared.weight", "encoder.embed_tokens.weight"
MAP = "embedding_map.weight"  # of a small encoder (small_umt5.py): from its width to that of the teacher's embeddings
ANCHOR = r"(?:shared|token_embedding|token_embd|encoder\.embed_tokens)\.weight"  # its table in any layout
ATTENTION, FEED_FORWARD = "layer.0.SelfAttention.", "layer.1.DenseReluDense."
# The original release's names (Wan2.1:wan/modules/t5.py) and GGUF's become transformers', one rule after another.
_RENAMES = [
    (r"^(token_embedding|token_embd)\.", "shared."),
    (r"^(norm|enc\.output_norm)\.", "encoder.final_layer_norm."),
    (r"^(blocks|enc\.blk)\.", "encoder.block."),
    (r"\.(norm1|attn_norm)\.", ".layer.0.layer_norm."),
    (r"\.(norm2|ffn_norm)\.", ".layer.1.layer_norm."),
    (r"\.attn[._]([qkvo])\.", rf".{ATTENTION}\1."),
    (r"\.(pos_embedding\.embedding|attn_rel_b)\.", f".{ATTENTION}relative_attention_bias."),
    (r"\.(ffn\.gate\.0|ffn_gate)\.", f".{FEED_FORWARD}wi_0."),
    (r"\.(ffn\.fc1|ffn_up)\.", f".{FEED_FORWARD}wi_1."),
    (r"\.(ffn\.fc2|ffn_down)\.", f".{FEED_FORWARD}wo."),
]
# The keys of config.json that the tensors tell
_SHAPE_KEYS = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size", "relative_attention_num_buckets")


class Umt5Files:
    """A UMT5 encoder on disk, by its headers.

    Attributes:
        where: a folder like text_encoder/ of a pipeline, or a file of weights.
        shape: the arguments of transformers' UMT5Config.
        ignored: the reason for each tensor that is no weight of the encoder.
    """

    def __init__(self, where: Path):
        """Read the headers of its files.

        Raises:
            UserError: they hold no UMT5 encoder, not all of it, more than it, or contradict the config.json beside them.
        """
        self.where = where
        self.files = [where] if where.is_file() else weight_files(where, "model.safetensors")
        config = read_json(where / "config.json") if (where / "config.json").is_file() else {}
        for path in filter(is_gguf, self.files):
            require_architecture(path, ("t5encoder", "t5"), "a UMT5 text encoder")
        found = own_names(ANCHOR, partial(renamed, rules=_RENAMES), all_tensors(self.files), where)
        self._copy = found.get(COPY) if TABLE in found else None
        if TABLE not in found and COPY in found:
            found[TABLE] = found.pop(COPY)
        self.shape = _shape({name: stored.shape for name, stored in found.items()}, config, where)
        expected = expected_shapes(self.shape)
        if MAP in found:
            expected[MAP] = (*found[MAP].shape[:1], self.shape["d_model"])
        self._weights, self.ignored = admit(found, expected, where, what="UMT5 text encoder", harmless=_harmless_reason)

    @property
    def text_dim(self) -> int:
        """The width of the embeddings: d_model, or what the map of a small encoder makes of it."""
        return self._weights[MAP].shape[0] if MAP in self._weights else self.shape["d_model"]

    @property
    def num_parameters(self) -> int:
        """Of the embedding table once."""
        return sum(torch.Size(weight.shape).numel() for weight in self._weights.values())

    @property
    def is_bfloat16(self) -> bool:
        """Whether bfloat16 holds every weight as it is stored."""
        return all(weight.stored.dtype == "BF16" for weight in self._weights.values())

    def load(self, dtype: torch.dtype) -> "UMT5EncoderModel":
        """Load the encoder to the CPU; its `embedding_map` makes embeddings of hidden states.

        Raises:
            UserError: its table of embeddings is all zeros, or two tables differ; a number is not finite.
        """
        from transformers import UMT5Config, UMT5EncoderModel

        with torch.device("meta"):
            encoder: Any = UMT5EncoderModel(UMT5Config(**self.shape))
            widths = self.shape["d_model"], self.text_dim
            encoder.embedding_map = nn.Linear(*widths, bias=False) if MAP in self._weights else nn.Identity()
        tensors = {name: weight.read().to(dtype) for name, weight in self._weights.items()}
        table = tensors[COPY] = tensors[TABLE]
        if not table.any() or (self._copy and not torch.equal(Weight(self._copy).read().to(dtype), table)):
            raise UserError(
                f"{self.where}: the embedding table is all zeros or unlike its copy {COPY}, so prompts would mean nothing; "
                "the file is broken, fetch it again"
            )
        encoder.load_state_dict(tensors, assign=True)
        return encoder.eval()

    def read_map(self) -> torch.Tensor | None:
        """Return the map (text_dim, d_model) of a small encoder in float32; None where there is none."""
        return self._weights[MAP].read().float() if MAP in self._weights else None


def config_of(shape: dict, dtype: str) -> dict:
    """Return the config.json of an encoder that transformers reads in `dtype`."""
    from transformers import UMT5Config

    # Tied, because some versions of transformers leave the table's second name all zeros otherwise (transformers#43880):
    told = {"architectures": ["UMT5EncoderModel"], "tie_word_embeddings": True, "dtype": dtype}
    return UMT5Config(**shape).to_dict() | told


def _shape(shapes: Mapping[str, tuple[int, ...]], config: dict, where: Path) -> dict:
    block = "encoder.block.0."
    try:
        vocab_size, d_model = shapes[TABLE]
        buckets, num_heads = shapes[f"{block}{ATTENTION}relative_attention_bias.weight"]
        inner, _ = shapes[f"{block}{ATTENTION}q.weight"]
        d_ff, _ = shapes[f"{block}{FEED_FORWARD}wi_0.weight"]
    except (KeyError, ValueError):
        raise UserError(
            f"{where}: holds no UMT5 text encoder (its table of embeddings and block 0 were looked for)"
        ) from None
    num_layers = len({match[1] for name in shapes if (match := re.match(r"encoder\.block\.(\d+)\.", name))})
    sizes = (d_model, inner // num_heads if num_heads else 0, d_ff, num_layers, num_heads, vocab_size, buckets)
    shape: dict = dict(zip(_SHAPE_KEYS, sizes, strict=True))
    if min(sizes) < 1 or inner % num_heads:
        raise UserError(f"{where}: an attention of width {inner} does not divide into {num_heads} heads")
    for key, value in {"model_type": "umt5", "feed_forward_proj": "gated-gelu", **shape}.items():
        if (given := config.get(key, value)) != value:
            raise UserError(
                f"{where / 'config.json'}: {key}={shown(given)}; Wan's text encoder beside it has {key}={value!r}"
            )
    # No tensor tells these two.
    distance = setting(config, "relative_attention_max_distance", WHOLE, where / "config.json")
    eps = setting(config, "layer_norm_epsilon", RATIO, where / "config.json")
    return shape | {"relative_attention_max_distance": distance or 128, "layer_norm_epsilon": float(eps or 1e-6)}


def expected_shapes(shape: dict) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the encoder's tensors, without importing transformers."""
    width, inner, d_ff = shape["d_model"], shape["num_heads"] * shape["d_kv"], shape["d_ff"]
    of_block = {
        **{f"{ATTENTION}{name}": (inner, width) for name in "qkv"},
        f"{ATTENTION}o": (width, inner),
        f"{ATTENTION}relative_attention_bias": (shape["relative_attention_num_buckets"], shape["num_heads"]),
        **{f"{FEED_FORWARD}{name}": (d_ff, width) for name in ("wi_0", "wi_1")},
        f"{FEED_FORWARD}wo": (width, d_ff),
        **{f"layer.{number}.layer_norm": (width,) for number in (0, 1)},
    }
    blocks = {
        f"encoder.block.{layer}.{name}.weight": size
        for layer in range(shape["num_layers"])
        for name, size in of_block.items()
    }
    return {TABLE: (shape["vocab_size"], width), **blocks, "encoder.final_layer_norm.weight": (width,)}


def _harmless_reason(name: str) -> str | None:
    if name == COPY:
        return f"a copy of {TABLE}"
    if name.startswith(("decoder.", "lm_head.")):
        return "of UMT5's decoder, which makes no embeddings"
    return other_part(name, "text encoder")
