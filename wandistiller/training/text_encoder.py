"""What a small text encoder learns from: the teacher's embeddings of prompts, and what a picture model reads of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from wandistiller.device import autocast, to_device
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.training.objective import Loss
from wandistiller.walk.draws import dealt_prompt
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.small_umt5 import SmallUmt5


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """Prompts as token ids, and their embeddings.

    Attributes:
        ids: token ids (B, S), 0 past each prompt's end.
        mask: 1 (B, S) where a token is text.
        embeds: the teacher's embeddings (B, S, D).
        sigma: zeros (B,); texts have no noise level.
        features: what else is compared: `embeds` where a picture model reads them.
    """

    ids: Tensor
    mask: Tensor
    embeds: Tensor
    sigma: Tensor
    features: tuple[Tensor, ...] = ()


class TextBatches:
    """The batches of a run. What a step learns from follows from the step alone, so that they have no state.

    Args:
        tokens: ids of each prompt, as many as its embedding has rows.
        slots: this process's part of a batch, of `total` prompts over all processes.
        is_read: whether a picture model reads the embeddings.
    """

    num_calls, num_micro_batches = 0, 1  # as the loop counts them: the teacher has answered before the first step

    def __init__(
        self,
        tokens: Sequence[list[int]],
        embeds: PromptEmbeds,
        slots: range,
        total: int,
        *,
        seed: int = 0,
        is_read: bool = False,
        device: str = "cpu",
    ):
        self.tokens, self.embeds, self.slots, self.total = tokens, embeds, slots, total
        self.seed, self.is_read, self.device = seed, is_read, device

    def of_step(self, step: int) -> Iterator[TextBatch]:
        """Yield the one micro-batch of a step (from 0); every prompt comes once an epoch."""
        places = [step * self.total + slot for slot in self.slots]
        yield self.of_prompts([dealt_prompt((self.seed, 0), place, len(self.tokens)) for place in places])

    def of_prompts(self, indices: Sequence[int]) -> TextBatch:
        """Return a batch of these prompts."""
        embeds, lengths = self.embeds.batch(indices, self.device)
        ids = torch.zeros(embeds.shape[:2], dtype=torch.int64)
        for row, index in zip(ids, indices, strict=True):
            row[: len(self.tokens[index])] = torch.tensor(self.tokens[index])
        mask = torch.arange(ids.shape[1], device=lengths.device) < lengths[:, None]
        return TextBatch(
            ids=to_device(ids, self.device),
            mask=mask.long(),
            embeds=embeds,
            sigma=torch.zeros(len(ids)),
            features=(embeds,) if self.is_read else (),
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take nothing over."""


class TextReader(nn.Module):
    """What a picture model reads of a text: the keys and values of every cross-attention."""

    def __init__(self, student: WanLiteStudent):
        super().__init__()
        self.embedder: nn.Module = student.condition_embedder.text_embedder
        blocks: Any = student.blocks
        self.attentions = nn.ModuleList(block.attn2 for block in blocks)
        self.eval().requires_grad_(False)

    def forward(self, embeds: Tensor) -> list[Tensor]:
        """Return keys and values (B, S, D) of embeddings (B, S, text_dim), layer by layer."""
        context, attentions = self.embedder(embeds), cast(Any, self.attentions)
        return [
            read
            for attention in attentions
            for read in (attention.norm_k(attention.to_k(context)), attention.to_v(context))
        ]


def token_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Return the squared error (B, S) of each token's vector (B, S, D), relative to its own square."""
    error, scale = (actual.float() - expected.float()).square().sum(dim=-1), expected.float().square().sum(dim=-1)
    return error / scale.clamp(min=1e-6)  # the teacher's padding is zeros, and is masked later


@dataclass(frozen=True, kw_only=True)
class EncoderObjective:
    """Computes the loss of a small encoder: errors of its embeddings, and of what is read of them, each the mean over text tokens.

    Attributes:
        reader: the picture model; None compares embeddings alone.
        feature_loss: the loop's place for what is learnt beside the encoder; nothing is.
    """

    reader: TextReader | None = None
    compute_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    feature_loss: None = None

    def __call__(self, student: SmallUmt5, batch: TextBatch, progress: float = 0.0) -> Loss:
        """Return the loss at a batch; `progress` changes nothing."""
        embeds = autocast(student, self.device, self.compute_dtype)(batch.ids, batch.mask)
        by_sample = _mean_over_text(token_errors(embeds, batch.embeds), batch.mask)
        loss, beside = by_sample.mean(), by_sample.new_zeros(())
        if self.reader is not None:
            read = autocast(self.reader, self.device, self.compute_dtype)
            with torch.no_grad():
                expected = read(batch.embeds)
            errors = [token_errors(ours, theirs) for ours, theirs in zip(read(embeds), expected, strict=True)]
            beside = _mean_over_text(torch.stack(errors).mean(dim=0), batch.mask).mean()
        return Loss(loss + beside, beside.detach(), by_sample.detach())


def _mean_over_text(errors: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (B,) of errors (B, S) over the tokens that are text."""
    return (errors * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
