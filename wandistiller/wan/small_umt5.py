"""A small UMT5 encoder: cut from the weights of Wan's, trained to make its embeddings, written as a text encoder of fewer layers.

The tokenizer stays. The token table of the small encoder is the teacher's times one learnt matrix, so that a token that no training
prompt has is mapped as the others are, and that the table takes no optimizer state; it is multiplied out when the encoder
is written. A linear map without a bias makes embeddings of the teacher's width of the small ones (zero padding stays zero); whoever
exports a student folds it into the first layer of the student's text embedder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wandistiller.errors import UserError, shown
from wandistiller.files.atomic import write_json
from wandistiller.files.json_files import WHOLE, read_json, setting
from wandistiller.files.tensor_files import write_tensors
from wandistiller.wan.text_encoder_files import write_tokenizer
from wandistiller.wan.umt5 import ATTENTION, FEED_FORWARD, MAP, TABLE, config_of, expected_shapes

CHOSEN = ("d_model", "d_ff", "num_layers", "num_heads")  # all else is the teacher's
ROWS = 2**16  # of the token table, multiplied at a time
MODEL_NAME, CONFIG_NAME = "model.safetensors", "config.json"


def read_small_shape(path: str | Path, teacher: dict[str, Any]) -> dict[str, Any]:
    """Read the shape of a small encoder, as arguments of UMT5Config; what the file leaves to the teacher is taken from its shape.

    Raises:
        UserError: a key is missing or unknown, or larger than the teacher's.
    """
    values = read_json(Path(path))
    if unknown := sorted(values.keys() - set(CHOSEN)):
        raise UserError(f"{path}: {shown(unknown[0])} is no key of a small text encoder; allowed: {', '.join(CHOSEN)}")
    for key in CHOSEN:
        value = setting(values, key, WHOLE, path)
        if value is None or not 1 <= value <= teacher[key]:
            raise UserError(
                f"{path}: {key}={shown(value)} must be a whole number from 1 to the teacher's {teacher[key]}"
            )
    return teacher | values


def num_parameters(shape: dict[str, Any]) -> int:
    """Count the weights of a UMT5 encoder, its token table once."""
    return sum(torch.Size(size).numel() for size in expected_shapes(shape).values())


class SmallUmt5(nn.Module):
    """The small encoder in training: it takes token ids to embeddings of the teacher's width.

    Args:
        shape: arguments of UMT5Config.
        table: the teacher's token table (V, D), which is not trained and no part of the state.
    """

    def __init__(self, shape: dict[str, Any], table: Tensor):
        from transformers import UMT5Config, UMT5EncoderModel

        super().__init__()
        self.shape = shape
        encoder: Any = UMT5EncoderModel(UMT5Config(**shape | {"vocab_size": 2, "dropout_rate": 0.0})).encoder
        encoder.embed_tokens = nn.Identity()  # this module looks tokens up
        self.stack: nn.Module = encoder
        self.register_buffer("table", table, persistent=False)
        self.table_map = nn.Linear(table.shape[1], shape["d_model"], bias=False)
        self.embedding_map = nn.Linear(shape["d_model"], table.shape[1], bias=False)

    table: Tensor

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the embeddings (B, S, D) of token ids (B, S), of which `mask` (B, S) tells those that are text."""
        tokens = self.table_map(F.embedding(ids, self.table).to(self.table_map.weight.dtype))
        return self.embedding_map(self.stack(inputs_embeds=tokens, attention_mask=mask).last_hidden_state)

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by transformers' names, with the map beside them."""
        parts = [part.float() @ self.table_map.weight.T for part in self.table.split(ROWS)]
        stack = {f"encoder.{name}": weight for name, weight in self.stack.state_dict().items()}
        return {TABLE: torch.cat(parts), **stack, MAP: self.embedding_map.weight.detach()}

    def save(self, folder: Path, tokenizer: Path) -> None:
        """Write the encoder in bf16, with its tokenizer, into a folder that `find_text_encoder` finds it in."""
        tensors = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in self.tensors().items()}
        write_tokenizer(tokenizer, folder)
        write_json(folder / CONFIG_NAME, config_of(self.shape, "bfloat16"), indent=2)
        write_tensors(folder / MODEL_NAME, tensors, {"format": "pt"})


@torch.no_grad()
def cut_umt5(
    teacher: Any, shape: dict[str, Any], texts: Sequence[tuple[Tensor, Tensor]], layers: list[int]
) -> SmallUmt5:
    """Cut a small encoder from the teacher's; one of the teacher's own shape gives the teacher's embeddings.

    The residual stream keeps the principal directions of the teacher's hidden states (SliceGPT, arXiv 2401.15024, with one basis for
    all layers), attention the heads and the feed-forward the neurons of the largest weights. RMSNorm of a stream in another basis
    is the same but for its weight, which goes into the matrices behind it.

    Args:
        teacher: transformers' UMT5EncoderModel.
        texts: token ids and masks of some prompts.
        layers: the teacher's layer of each small one.
    """
    tensors = teacher.state_dict()  # each is widened where it is used: all of UMT5-XXL in fp32 are 23 GB
    small = SmallUmt5(shape, teacher.shared.weight.detach()).to(teacher.device)
    basis = principal_directions(teacher, texts, shape["d_model"])  # (D, d)
    scale = (len(basis) / shape["d_model"]) ** 0.5  # of the mean square over D channels to that over d

    def read_from(name: str, norm: str, rows: Tensor) -> Tensor:
        return (tensors[name][rows].float() * tensors[norm].float()) @ basis * scale

    weights: dict[str, Tensor] = {}
    for own, layer in enumerate(layers):
        theirs, ours = f"encoder.block.{layer}.", f"block.{own}."
        attention, feed_forward = f"{theirs}{ATTENTION}", f"{theirs}{FEED_FORWARD}"
        heads, rows = largest_heads(tensors, attention, shape["num_heads"], shape["d_kv"])
        neurons = largest_neurons(tensors, feed_forward, shape["d_ff"])
        for name in "qkv":
            norm = f"{theirs}layer.0.layer_norm.weight"
            weights[f"{ours}{ATTENTION}{name}.weight"] = read_from(f"{attention}{name}.weight", norm, rows)
        for name in ("wi_0", "wi_1"):
            norm = f"{theirs}layer.1.layer_norm.weight"
            weights[f"{ours}{FEED_FORWARD}{name}.weight"] = read_from(f"{feed_forward}{name}.weight", norm, neurons)
        weights[f"{ours}{ATTENTION}o.weight"] = basis.T @ tensors[f"{attention}o.weight"][:, rows].float()
        weights[f"{ours}{FEED_FORWARD}wo.weight"] = basis.T @ tensors[f"{feed_forward}wo.weight"][:, neurons].float()
        bias = "relative_attention_bias.weight"
        weights[f"{ours}{ATTENTION}{bias}"] = tensors[f"{attention}{bias}"][:, heads]
    norms = {name: torch.ones_like(weight) for name, weight in small.stack.state_dict().items() if "layer_norm" in name}
    small.stack.load_state_dict(weights | norms)
    small.table_map.weight.copy_(basis.T)
    final = tensors["encoder.final_layer_norm.weight"].float()
    small.embedding_map.weight.copy_(final[:, None] * basis * scale)
    return small


@torch.no_grad()
def principal_directions(teacher: Any, texts: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Return the `count` principal directions (D, count) of the hidden states of all layers, each state at length 1."""
    total = torch.zeros(teacher.config.d_model, teacher.config.d_model, device=teacher.device)
    for ids, mask in texts:
        states = teacher(ids, mask, output_hidden_states=True).hidden_states[:-1]  # the last one is normed
        for state in states:
            rows = F.normalize(state[mask.bool()].float(), dim=-1)
            total += rows.T @ rows
    return torch.linalg.eigh(total).eigenvectors[:, -count:].flip(1)


def largest_heads(tensors: dict[str, Tensor], attention: str, count: int, d_kv: int) -> tuple[Tensor, Tensor]:
    """Return the heads with the largest values and outputs, in their order, and their rows in q, k and v."""
    value = tensors[f"{attention}v.weight"].float().unflatten(0, (-1, d_kv)).norm(dim=(1, 2))
    output = tensors[f"{attention}o.weight"].float().unflatten(1, (-1, d_kv)).norm(dim=(0, 2))
    heads = (value * output).topk(count).indices.sort().values
    return heads, (heads[:, None] * d_kv + torch.arange(d_kv, device=heads.device)).flatten()


def largest_neurons(tensors: dict[str, Tensor], feed_forward: str, count: int) -> Tensor:
    """Return the neurons of a feed-forward network with the largest weights, in their order."""
    gate, up = (tensors[f"{feed_forward}{name}.weight"].float().norm(dim=1) for name in ("wi_0", "wi_1"))
    down = tensors[f"{feed_forward}wo.weight"].float().norm(dim=0)
    return (gate * up * down).topk(count).indices.sort().values
