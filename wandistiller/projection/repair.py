"""A selected student's linear layers refitted, in forward order, to what its teacher does.

The student walks through the calibration states beside the teacher. Every layer is fitted on the student's own activations,
so that it corrects what the layers before it lost, and only then does the student walk on:

- queries, keys, values and the FFN's first layer answer what the teacher's answer in the kept rows;
- the outputs of self-attention, cross-attention and FFN bring the residual stream to where the teacher's is after the same
  sublayer, in the kept channels;
- the head answers the guided velocity, where every other layer follows the prompt's own branch.

Memory: on the device the teacher's expert, the student, one batch of activations and the sums of one layer, at most
`num_levels` x (K + 1)^2 float64 numbers for a layer of K inputs. The residual streams of all states lie in a temporary file.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from wandistiller.errors import UserError
from wandistiller.model.layers import rope_table
from wandistiller.model.transformer import (
    Context,
    Fp32RMSNorm,
    GeluProjection,
    WanAttention,
    WanBlock,
    WanLiteStudent,
    modulate,
)
from wandistiller.projection.calibration import (
    CalibrationOptions,
    CalibrationStates,
    embed_text,
    mixed_precision,
    text_batches,
    times_of,
    wan_blocks,
    watching_inputs,
)
from wandistiller.projection.ridge import GatedFit, LinearFit
from wandistiller.projection.selection import Selection
from wandistiller.sampling.flow import sigma_to_timestep
from wandistiller.wan.prompt_embeds import PromptEmbeds


@dataclass(frozen=True)
class Sublayer:
    """One of the three parts of a block, each of which adds to the residual stream.

    Attributes:
        name: "attn1", "attn2" or "ffn".
        axis: the axis of the selection that its inner units lie along, without the layer.
        first_row: of the block's modulation: shift, scale and gate lie one after another; None where there is none.
    """

    name: str
    axis: str
    first_row: int | None

    def linears(self, block: WanBlock) -> list[nn.Linear]:
        """Return the layers that read the normed residual stream."""
        if self.name == "ffn":
            return [cast(GeluProjection, block.ffn.net[0]).proj]
        attention: WanAttention = getattr(block, self.name)
        return [attention.to_q, attention.to_k, attention.to_v] if self.name == "attn1" else [attention.to_q]

    def norms(self, block: WanBlock) -> list[Fp32RMSNorm]:
        """Return the norms of what `linears` answer, in their order."""
        if self.name == "ffn":
            return []
        return [block.attn1.norm_q, block.attn1.norm_k] if self.name == "attn1" else [block.attn2.norm_q]

    def output(self, block: WanBlock) -> nn.Linear:
        """Return the layer that writes to the residual stream."""
        return cast(nn.Linear, block.ffn.net[2] if self.name == "ffn" else getattr(block, self.name).to_out[0])

    def input(self, block: WanBlock, x: Tensor, table: Tensor) -> Tensor:
        """Return what `linears` read, of a residual stream (B, L, D) and the block's modulation (6, D)."""
        if self.first_row is None:
            return block.norm2(x)
        shift, scale = table[self.first_row : self.first_row + 2]
        norm = block.norm1 if self.name == "attn1" else block.norm3
        return modulate(norm(x), shift, scale)

    def __call__(self, block: WanBlock, inputs: Tensor, text: Context | None, rope: Tensor) -> Tensor:
        if self.name == "ffn":
            return block.ffn(inputs)
        return block.attn1(inputs, rope=rope) if self.name == "attn1" else block.attn2(inputs, (text,))

    def add(self, x: Tensor, table: Tensor, written: Tensor) -> Tensor:
        """Return the residual stream after this sublayer."""
        return x + written if self.first_row is None else torch.addcmul(x, table[self.first_row + 2], written)


SUBLAYERS = (Sublayer("attn1", "attn1", 0), Sublayer("attn2", "attn2", None), Sublayer("ffn", "neurons", 3))


@contextlib.contextmanager
def temporary_streams(*shapes: tuple[int, ...]) -> Iterator[list[Tensor]]:
    """Make float32 tensors in temporary files that are mapped to memory: the system writes to disk what memory has no room for."""
    tensors = []
    for shape in shapes:
        size = torch.Size(shape).numel()
        # The name goes at once, the data with the tensor.
        with tempfile.NamedTemporaryFile(prefix="calibration-") as file:
            try:
                _reserve(file.fileno(), 4 * size)
            except OSError as error:
                raise UserError(
                    f"{tempfile.gettempdir()}: has no room for {4 * size / 2**30:.1f} GiB of hidden states "
                    f"({error.strerror}); set TMPDIR to a larger disk, or calibrate on fewer paths"
                ) from error
            tensors.append(torch.from_file(file.name, shared=True, size=size).view(shape))
    yield tensors


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Reserve all of a file's room on the disk now, because writing to a mapped file on a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:
        os.truncate(descriptor, num_bytes)


class Walker:
    """A model on its way through the calibration states, block by block; `stream` (S, P, L, D) is where it is."""

    def __init__(self, model: WanLiteStudent, states: CalibrationStates, embeds: PromptEmbeds, device: str):
        self.model, self.states, self.embeds, self.device = model, states, embeds, device
        self.dtype = model.patch_embedding.weight.dtype
        height, width = (side // model.config.patch_size for side in states.latents.shape[-2:])
        self.rope = rope_table(model.config.head_dim, height, width, torch.device(device))
        self.stream_shape = (len(states.sigma), states.num_paths, height * width, model.config.hidden_size)
        self.stream = torch.empty(0)

    def start(self, stream: Tensor, batches: list[tuple[int, slice]]) -> None:
        """Enter the residual stream of all states, before the first block."""
        self.stream = stream
        timesteps = sigma_to_timestep(self.states.sigma).to(self.device)
        self.temb, self.timestep_proj = self.model.condition_embedder(timesteps)  # (S, D), (S, 6, D)
        for batch in batches:
            latents = self.states.latents[batch].to(self.device, self.dtype)
            self.keep(batch, self.model.patch_embedding(latents).flatten(2).transpose(1, 2))

    def at(self, batch: tuple[int, slice]) -> Tensor:
        """Return the residual stream (B, L, D) of a batch, on the device."""
        return self.stream[batch].to(self.device)

    def keep(self, batch: tuple[int, slice], x: Tensor) -> None:
        self.stream[batch] = x.float().to(self.stream.device)

    def text(self, batch: tuple[int, slice]) -> Context:
        prompts = self.states.prompts[batch[1]]
        return embed_text(self.model, *self.embeds.batch(prompts, self.device))[0]

    def modulation(self, block: WanBlock) -> Tensor:
        """Return the modulation (S, 6, D) of a block."""
        return block.scale_shift_table.float() + self.timestep_proj

    def inputs(self, block: WanBlock, sublayer: Sublayer, batch: tuple[int, slice]) -> Tensor:
        """Return what the linear layers of a sublayer read (B, L, D)."""
        return sublayer.input(block, self.at(batch), self.modulation(block)[batch[0]]).to(self.dtype)

    def written(self, block: WanBlock, sublayer: Sublayer, batch: tuple[int, slice]) -> Tensor:
        """Return what a sublayer adds to the residual stream (B, L, D), before its gate."""
        text = self.text(batch) if sublayer.name == "attn2" else None
        return sublayer(block, self.inputs(block, sublayer, batch), text, self.rope)

    def step(self, block: WanBlock, sublayer: Sublayer, batch: tuple[int, slice]) -> Tensor:
        """Walk through a sublayer and return the residual stream after it."""
        written = self.written(block, sublayer, batch)
        x = sublayer.add(self.at(batch), self.modulation(block)[batch[0]], written)
        self.keep(batch, x)
        return x


class Repair:
    """Refits a selected student to the teacher's expert that it was selected from.

    Args:
        student: a wan student with the selected weights, in float32; it is changed in place.
        expert: that expert at its own shape, on the device.
        selection: what the student took of it.
        states: what it is fitted on, with the guided answers that its head learns.
    """

    def __init__(
        self,
        student: WanLiteStudent,
        expert: WanLiteStudent,
        selection: Selection,
        states: CalibrationStates,
        embeds: PromptEmbeds,
        options: CalibrationOptions,
    ):
        self.selection, self.states, self.embeds, self.options = selection, states, embeds, options
        self.student = Walker(student, states, embeds, options.device)
        self.teacher = Walker(expert, states, embeds, options.device)
        self.batches = list(states.batches(options.batch_size))
        self.channels = self.kept("channels", expert.config.hidden_size)

    def kept(self, axis: str, size: int) -> Tensor:
        """Return the teacher's indices of an axis that the student has."""
        return self.selection.axes.get(axis, torch.arange(size)).to(self.options.device)

    def teacher_precision(self) -> torch.autocast:
        return mixed_precision(self.options)

    @torch.no_grad()
    def __call__(self, after: Callable[[str, float | None], None]) -> None:
        """Refit everything; `after` is called with each stage's name and, for a block, how far its residual stream is off."""
        teacher, student = self.teacher, self.student
        self._fit_time_embedder()
        self._fit_text_embedder()
        after("embedders", None)
        with temporary_streams(teacher.stream_shape, student.stream_shape) as (teacher_stream, student_stream):
            with self.teacher_precision():
                teacher.start(teacher_stream, self.batches)
            student.start(student_stream, self.batches)
            teacher_blocks, skipped = wan_blocks(teacher.model), 0
            for number, (block, layer) in enumerate(zip(wan_blocks(student.model), self.selection.layers, strict=True)):
                for index in range(skipped, layer):
                    self._pass(teacher_blocks[index])
                teacher_block, skipped = teacher_blocks[layer], layer + 1
                for sublayer in SUBLAYERS:
                    self._fit_inputs(block, teacher_block, sublayer, layer)
                    if sublayer.name == "attn2":
                        self._fit_text_inputs(block, teacher_block, layer)
                    self._fit_output(block, teacher_block, sublayer)
                    for batch in self.batches:
                        student.step(block, sublayer, batch)
                after(f"block {number}", self._distance())
            self._fit_head()
        after("head", None)

    def _pass(self, block: WanBlock) -> None:
        """Take the teacher through a layer that the student does not have."""
        with self.teacher_precision():
            for sublayer in SUBLAYERS:
                for batch in self.batches:
                    self.teacher.step(block, sublayer, batch)

    def _distance(self) -> float:
        """Return |x_student - x_teacher| / |x_teacher| of the residual streams, in the kept channels."""
        difference, size = 0.0, 0.0
        for batch in self.batches:
            target = self.teacher.at(batch)[..., self.channels].double()
            difference += float((self.student.at(batch) - target).square().sum())
            size += float(target.square().sum())
        return (difference / size) ** 0.5

    # ---- the embedders ----

    def _fit_time_embedder(self) -> None:
        student, times = self.student.model.condition_embedder, times_of(self.states, self.options)
        temb, timestep_proj = self.teacher.model.condition_embedder(times)
        targets = {
            student.time_embedder.linear_2: temb[:, self.channels],
            student.time_proj: timestep_proj[:, :, self.channels].flatten(1),
        }
        for linear, target in targets.items():
            fit = self._linear_fit(linear)
            fit.add(input_of(linear, partial(student, times)), target)
            self._solve(fit, [linear])

    def _fit_text_embedder(self) -> None:
        linear = self.student.model.condition_embedder.text_embedder.linear_2
        rows = self.kept("text_channels", self.teacher.model.config.hidden_size)
        fit = self._linear_fit(linear)
        for (target, is_there), text in self._texts():
            fit.add(input_of(linear, text)[is_there], target.embeds[is_there][:, rows])
        self._solve(fit, [linear])

    def _texts(self) -> Iterator[tuple[tuple[Context, Tensor], Callable[[], tuple[Context, Tensor]]]]:
        """Yield what the teacher makes of each batch of prompts, and a call for what the student makes of it."""
        for prompts in text_batches(self.embeds, self.options):
            batch = self.embeds.batch(prompts, self.options.device)
            with self.teacher_precision():
                target = embed_text(self.teacher.model, *batch)
            yield target, partial(embed_text, self.student.model, *batch)

    # ---- the blocks ----

    def _fit_inputs(self, block: WanBlock, teacher_block: WanBlock, sublayer: Sublayer, layer: int) -> None:
        """Fit queries, keys and values, or the FFN's first layer."""
        linears, theirs = sublayer.linears(block), sublayer.linears(teacher_block)
        rows = self.kept(f"{sublayer.axis}.{layer}", len(theirs[0].weight))
        fit, scales = self._linear_fit(*linears), KeptScales(sublayer.norms(block))
        for batch in self.batches:
            with self.teacher_precision():
                inputs = self.teacher.inputs(teacher_block, sublayer, batch)
                answers = [linear(inputs) for linear in theirs]
            fit.add(self.student.inputs(block, sublayer, batch), torch.cat([part[..., rows] for part in answers], -1))
            scales.add(answers, rows)
        self._solve(fit, linears)
        scales.fold()

    def _fit_text_inputs(self, block: WanBlock, teacher_block: WanBlock, layer: int) -> None:
        """Fit keys and values of the text."""
        linears, theirs = ([part.attn2.to_k, part.attn2.to_v] for part in (block, teacher_block))
        rows = self.kept(f"attn2.{layer}", len(theirs[0].weight))
        fit, scales = self._linear_fit(*linears), KeptScales([block.attn2.norm_k])
        for (target, is_there), text in self._texts():
            with self.teacher_precision():
                answers = [linear(target.embeds)[is_there] for linear in theirs]
            fit.add(text()[0].embeds[is_there], torch.cat([part[..., rows] for part in answers], -1))
            scales.add(answers, rows)
        self._solve(fit, linears)
        scales.fold()

    def _fit_output(self, block: WanBlock, teacher_block: WanBlock, sublayer: Sublayer) -> None:
        """Fit the layer that writes to the residual stream; the teacher walks on through this sublayer."""
        linear = sublayer.output(block)
        rows = self._output_rows(block, teacher_block, sublayer)
        if sublayer.first_row is None:
            fit = self._linear_fit(linear)
            for _, inputs, targets in rows:
                fit.add(inputs, targets)
            self._solve(fit, [linear])
            return
        gated = GatedFit(len(self.states.sigma), linear.in_features, linear.out_features, self.options.device)
        for level, inputs, targets in rows:
            gated.add(level, inputs, targets)
        gates = self.student.modulation(block)[:, sublayer.first_row + 2]
        _set(linear, *gated.solve(gates, linear.weight, linear.bias, self.options.ridge))

    def _output_rows(
        self, block: WanBlock, teacher_block: WanBlock, sublayer: Sublayer
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield noise level, inputs and targets of the output layer for each batch, with the teacher one sublayer further."""
        linear, student = sublayer.output(block), self.student
        for batch in self.batches:
            with self.teacher_precision():
                target = self.teacher.step(teacher_block, sublayer, batch)[..., self.channels]
            inputs = input_of(linear, partial(student.written, block, sublayer, batch))
            yield batch[0], inputs, target - student.at(batch)

    def _fit_head(self) -> None:
        model, student = self.student.model, self.student
        fit = self._linear_fit(model.proj_out)
        for batch in self.batches:
            shift, scale = model.scale_shift_table[0].float() + student.temb[batch[0]]
            inputs = modulate(model.norm_out(student.at(batch)), shift, scale)
            velocity = self.states.velocity[batch].to(self.options.device)
            fit.add(inputs, patches(velocity, model.config.patch_size))
        self._solve(fit, [model.proj_out])

    # ---- fits ----

    def _linear_fit(self, *linears: nn.Linear) -> LinearFit:
        """Make the sums for layers that read the same inputs."""
        outputs = sum(linear.out_features for linear in linears)
        return LinearFit(linears[0].in_features, outputs, self.options.device)

    def _solve(self, fit: LinearFit, linears: Sequence[nn.Linear]) -> None:
        weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
        weight, bias = fit.solve(weight, bias, self.options.ridge)
        sizes = [linear.out_features for linear in linears]
        for linear, *values in zip(linears, weight.split(sizes), bias.split(sizes), strict=True):
            _set(linear, *values)


class KeptScales:
    """E[rms of the kept entries / rms of all] of queries and keys, which Wan normalises over all heads at once.

    A student has fewer heads: its norm divides by the rms of those alone, and its norm's weight takes the ratio back.

    Args:
        norms: the student's norms.
    """

    def __init__(self, norms: Sequence[Fp32RMSNorm]):
        self.norms = norms
        self.count = 0
        self.sums = [torch.zeros((), dtype=torch.float64)] * len(norms)

    def add(self, answers: list[Tensor], rows: Tensor) -> None:
        """Take in what the teacher's layers answer, those with norms first."""
        self.count += answers[0][..., 0].numel()
        for index, answer in enumerate(answers[: len(self.norms)]):
            self.sums[index] = self.sums[index].to(answer.device) + (rms(answer[..., rows]) / rms(answer)).sum()

    def fold(self) -> None:
        """Multiply the norms' weights by the ratios."""
        for norm, total in zip(self.norms, self.sums, strict=True):
            norm.weight.mul_(total / self.count)


def rms(x: Tensor) -> Tensor:
    """Return the root mean square along the last dimension, in float64."""
    return x.double().square().mean(dim=-1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def input_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """Return what a module was given while `run` was called."""
    inputs: list[Tensor] = []
    with watching_inputs({module: inputs.append}):
        run()
    return inputs[0]


def patches(latents: Tensor, size: int) -> Tensor:
    """Cut (B, C, H, W) into patches (B, L, P * P * C), the inverse of what a wan student does to its head's answers."""
    parts = latents.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, h, P, w, P)
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
