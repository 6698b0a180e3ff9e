"""What a teacher in less memory costs: its velocity error when kept as bf16 or fp8, and how often two experts are swapped.

    python benchmarks/bench_teacher_dtype.py                          # about three minutes on a CPU core
    python benchmarks/bench_teacher_dtype.py --student outputs/demo   # with the error of a student beside it

Errors are relative to the teacher in float32, at states of its own sampling paths with its own guidance; "endpoint" is the
distance of the latents that they end in, from the same noise. Swaps are counted over 1000 batches of the A14B preset without
its weights. Prints two tables, and as its last line one JSON document.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wandistiller.device import autocast
from wandistiller.evaluation.held_out import HeldOutErrors
from wandistiller.evaluation.measures import endpoint_error, relative_errors
from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.project import project_experts
from wandistiller.prompts.prompts import load_prompts
from wandistiller.sampling.sampler import SamplingOptions, VelocityField, sample, student_as_teacher
from wandistiller.sampling.teacher import Teacher
from wandistiller.students.drawing import embed_with_negative
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.states import StatesOptions, build_states
from wandistiller.wan.layouts import open_teacher
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import RELEASED_MODELS, TeacherSettings, resolve_settings
from wandistiller.wan.wan_files import WanFiles

FP32, BF16 = torch.float32, torch.bfloat16
# column -> (kept as, dtype of matrix products); the first is what the others are held against. A checkpoint that is bf16 on
# disk, as the demo teacher's, loses nothing as bf16; "noise of bf16" is what one in float32 would lose.
VARIANTS = {
    "fp32": ("fp32", FP32),
    "bf16": ("bf16", FP32),
    "noise of bf16": ("noise of bf16", FP32),
    "fp8": ("fp8", FP32),
    "fp32, bf16 products": ("fp32", BF16),
    "bf16, bf16 products": ("bf16", BF16),
    "fp8, bf16 products": ("fp8", BF16),
}
CALLS_PER_EXPERT = (0, 16, 64, 256)
SWAP_BATCHES, SWAP_BATCH_SIZE = 1000, 4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher_path", default=str(ROOT / "data" / "demo_teacher"))
    parser.add_argument(
        "--student_config",
        default=str(ROOT / "config" / "demo_student_config.json"),
        help="for image size and text slots (default: the demo's)",
    )
    parser.add_argument("--prompts_file", default=str(ROOT / "data" / "demo_heldout_prompts.txt"))
    parser.add_argument("--num_prompts", type=int, default=32, help="paths, one a prompt (default: 32)")
    parser.add_argument("--student", help="folder of a student of this teacher, measured beside it")
    parser.add_argument("--prompt_cache", default=str(ROOT / "outputs" / "prompt_cache"))
    return parser.parse_args()


@dataclass
class Answerer:
    """A velocity field that answers with matrix products in `dtype`."""

    field: VelocityField
    dtype: torch.dtype

    def velocity(self, *state: Tensor) -> Tensor:
        return autocast(self.field.velocity, "cpu", self.dtype)(*state).float()


def kept_as(
    storage: str,
    compute: torch.dtype,
    wan_files: WanFiles,
    settings: TeacherSettings,
    text_max_length: int,
    negative_prompt_embeds: Tensor | None,
) -> Answerer:
    """Return the teacher with its weights as `storage`; where products are float32, bf16 weights are widened after rounding."""
    dtype = {"fp32": FP32, "fp8": compute}.get(storage, BF16)
    experts = project_experts(wan_files, text_max_length, dtype, fp8=storage == "fp8")
    for expert in experts.values():
        rounded = [parameter for parameter in expert.parameters() if parameter.dtype == BF16]
        if compute == FP32:
            expert.float()
        if storage == "noise of bf16":
            add_rounding_noise(rounded)
    return Answerer(Teacher(experts, settings, negative_prompt_embeds), compute)


def add_rounding_noise(weights: list[nn.Parameter]) -> None:
    """Add up to half a unit in the last place of bf16 (8 bits) either way, as if the values had been rounded to what they are."""
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        _, exponent = torch.frexp(weight.data)  # 0.5 <= mantissa < 1
        unit = torch.exp2(exponent - 8.0)
        weight.data += (torch.rand(weight.shape, generator=generator) - 0.5) * unit


def errors_by_sigma(field: VelocityField, held_out: HeldOutErrors) -> dict[float, float]:
    """Return the mean relative velocity error at every measured noise level of the teacher's paths."""
    found: dict[float, list[Tensor]] = {}
    for text, states in zip(held_out.texts, held_out.teacher_states, strict=True):
        for latents, sigma, expected in states:
            errors = relative_errors(field.velocity(latents, sigma, *text), expected)
            found.setdefault(round(float(sigma[0]), 3), []).append(errors)
    return {sigma: float(torch.cat(errors).mean()) for sigma, errors in found.items()}


def endpoints(field: VelocityField, held_out: HeldOutErrors) -> Tensor:
    """Return the latents (B, C, H, W) that the paths of all measured noises end in."""
    paths = zip(held_out.noises, held_out.texts, strict=True)
    return torch.cat([sample(field, noise, *text, held_out.options) for noise, text in paths])


def measure_errors(args: argparse.Namespace) -> dict[str, dict]:
    """Return {column: {"by_sigma": ..., "mean": ..., "endpoint": ...}} of every way to keep the teacher, and of the student."""
    config = StudentConfig.load(args.student_config)
    wan_files = open_teacher(args.teacher_path, config)
    settings = resolve_settings(wan_files)
    prompts = load_prompts(args.prompts_file).prompts[: args.num_prompts]
    embeds: PromptEmbeds
    embeds, negative = embed_with_negative(
        prompts, settings, wan_files.text_encoder(), config, args.prompt_cache, "cpu"
    )
    options = SamplingOptions(shift=settings.shift, num_inference_steps=settings.num_inference_steps)
    side = config.image_size // settings.vae_scale_factor
    teacher = (wan_files, settings, config.text_max_length, negative)

    reference = kept_as(*VARIANTS["fp32"], *teacher)
    held_out = HeldOutErrors(reference, embeds, (config.num_channels, side, side), options)
    expected = endpoints(reference, held_out)
    fields = {name: (lambda how=how: kept_as(*how, *teacher)) for name, how in VARIANTS.items() if name != "fp32"}
    if args.student:
        fields["student"] = lambda: Answerer(
            student_as_teacher(WanLiteStudent.from_pretrained(args.student), settings), FP32
        )
    results = {}
    for name, make in fields.items():
        field = make()  # only one of them is in memory at a time
        by_sigma = errors_by_sigma(field, held_out)
        results[name] = {
            "by_sigma": by_sigma,
            "mean": sum(by_sigma.values()) / len(by_sigma),
            "endpoint": endpoint_error(endpoints(field, held_out), expected),
        }
    return results


class NoWeights(nn.Module):
    """An expert that answers zero."""

    def forward(self, latents: Tensor, *others: Tensor) -> Tensor:
        return torch.zeros_like(latents)


def count_swaps(calls_per_expert: int) -> int:
    """Count the changes of the expert in use over SWAP_BATCHES batches of the A14B preset, on latents of one token."""
    (model,) = (model for model in RELEASED_MODELS if model.num_experts == 2)
    settings = TeacherSettings(
        model.name, model.shift, model.num_inference_steps, 1.0, 1.0, model.boundary_ratio, "", None, None, 8
    )
    shape = {"hidden_size": 128, "num_heads": 1, "ffn_dim": 128, "depth": 1, "num_channels": model.num_channels}
    config = StudentConfig(block="wan", image_size=16, **shape)
    options = StatesOptions(kind="trajectory", calls_per_expert=calls_per_expert)
    states = build_states(options, config, settings, num_prompts=55, lanes=Lanes(SWAP_BATCH_SIZE))
    teacher = Teacher({"high": NoWeights(), "low": NoWeights()}, settings)
    for _ in range(SWAP_BATCHES):
        batch = states.draw()
        text = torch.zeros(len(batch.sigma), 1, 1), torch.ones(len(batch.sigma), dtype=torch.long)
        states.advance(batch, teacher.velocity(batch.latents, batch.sigma, *text))
    return teacher.num_swaps


def print_errors(results: dict[str, dict]) -> None:
    names = list(results)
    print("relative velocity error\n" + f"{'sigma':<10}" + "".join(f"{name:>22}" for name in names))
    rows = {
        f"{sigma:.3f}": [results[name]["by_sigma"][sigma] for name in names] for sigma in results[names[0]]["by_sigma"]
    }
    rows |= {what: [results[name][what] for name in names] for what in ("mean", "endpoint")}
    for row, values in rows.items():
        print(f"{row:<10}" + "".join(f"{value:>22.5f}" for value in values))


def main() -> None:
    args = parse_args()
    with torch.inference_mode():
        errors = measure_errors(args)
    print_errors(errors)
    swaps = {calls: count_swaps(calls) for calls in CALLS_PER_EXPERT}
    print(f"\n{'calls_per_expert':<18}swaps in {SWAP_BATCHES} batches of {SWAP_BATCH_SIZE}")
    for calls, count in swaps.items():
        print(f"{calls:<18}{count}")
    print(json.dumps({"num_prompts": args.num_prompts, "student": args.student, "errors": errors, "swaps": swaps}))


if __name__ == "__main__":
    main()
