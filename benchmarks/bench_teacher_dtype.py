"""What a teacher in less memory costs: its velocity error when its weights are kept as bf16 or fp8.

    python benchmarks/bench_teacher_dtype.py                          # a few minutes on a CPU core
    python benchmarks/bench_teacher_dtype.py --student outputs/demo   # with the error of a student beside it

Errors are relative to the teacher in float32, at the states of its own sampling paths with its own guidance, the mean over prompts;
"endpoint" is the distance of the latents that each draws from the same noise. Prints a table, and as its last line one JSON document.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wandistiller.device import autocast
from wandistiller.evaluation.measures import endpoint_error, relative_errors
from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.project import project_experts
from wandistiller.prompts.prompts import load_prompts
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions, alone, sample
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.layouts import open_teacher
from wandistiller.wan.settings import resolve_settings
from wandistiller.wan.text_encoder import embed_texts

FP32, BF16 = torch.float32, torch.bfloat16
# weights, products: the dtype that weights are read in, whether blocks are then rounded to fp8, the dtype of products
VARIANTS = {"bf16, bf16": (BF16, False, BF16), "fp8, fp32": (FP32, True, FP32), "fp8, bf16": (BF16, True, BF16)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher_path", default=str(ROOT / "data" / "demo_teacher"))
    parser.add_argument(
        "--student_config", default=str(ROOT / "config" / "demo_student_config.json"), help="for its size"
    )
    parser.add_argument("--prompts_file", default=str(ROOT / "data" / "demo_heldout_prompts.txt"))
    parser.add_argument("--num_prompts", type=int, default=32, help="paths, one a prompt (default: 32)")
    parser.add_argument("--student", help="folder of a student of this teacher, measured beside it")
    parser.add_argument("--prompt_cache", default=str(ROOT / "outputs" / "prompt_cache"))
    return parser.parse_args()


class Field:
    """A velocity field with products in `dtype`, which remembers the states it was asked at and what it answered."""

    def __init__(self, teacher: Teacher, dtype: torch.dtype = FP32):
        self.teacher, self.dtype = teacher, dtype
        self.asked: list[tuple[tuple[Tensor, ...], Tensor]] = []

    def velocity(self, *state: Tensor) -> Tensor:
        velocity = autocast(self.teacher.velocity, "cpu", self.dtype)(*state).float()
        self.asked.append((tuple(value.clone() for value in state), velocity))
        return velocity


def measure(args: argparse.Namespace) -> dict[str, dict]:
    """Return {name: {"by_sigma": ..., "mean": ..., "endpoint": ...}} for each way to keep the teacher, and the student."""
    config = StudentConfig.load(args.student_config)
    wan_files = open_teacher(args.teacher_path, config)
    settings = resolve_settings(wan_files)
    texts = [*load_prompts(args.prompts_file).prompts[: args.num_prompts], settings.negative_prompt]
    embeds = embed_texts(texts, wan_files.text_encoder(), config, args.prompt_cache, "cpu")
    count = len(texts) - 1
    negative, text = embeds.read(count), embeds.batch(list(range(count)))
    noise = seeded_noise(range(count), settings.latent_shape(config))
    options = SamplingOptions(shift=settings.shift, num_inference_steps=settings.num_inference_steps)

    def teacher(dtype: torch.dtype, fp8: bool) -> Teacher:
        return Teacher(project_experts(wan_files, config.text_max_length, dtype, fp8=fp8), settings, negative)

    reference = Field(teacher(FP32, False))
    expected = sample(reference, noise, *text, options)
    # Each is made when its turn comes, so that one at a time is in memory:
    makers = {name: lambda how=how: Field(teacher(*how[:2]), how[2]) for name, how in VARIANTS.items()}
    if args.student:
        student = WanLiteStudent.from_pretrained(args.student)
        makers["the student"] = lambda: Field(Teacher({"high": student}, alone(settings)))
    results = {}
    for name, make in makers.items():
        field, by_sigma = make(), {}
        for state, velocity in reference.asked:
            error = relative_errors(field.velocity(*state), velocity).mean()
            by_sigma[round(float(state[1][0]), 3)] = float(error)
        endpoint = endpoint_error(sample(field, noise, *text, options), expected)
        results[name] = {"by_sigma": by_sigma, "mean": sum(by_sigma.values()) / len(by_sigma), "endpoint": endpoint}
    return results


def main() -> None:
    args = parse_args()
    with torch.inference_mode():
        results = measure(args)
    print("relative velocity error\n" + f"{'sigma':<10}" + "".join(f"{name:>14}" for name in results))
    sigmas = next(iter(results.values()))["by_sigma"]
    rows = {f"{sigma:.3f}": [row["by_sigma"][sigma] for row in results.values()] for sigma in sigmas}
    rows |= {what: [row[what] for row in results.values()] for what in ("mean", "endpoint")}
    for name, values in rows.items():
        print(f"{name:<10}" + "".join(f"{value:>14.5f}" for value in values))
    print(json.dumps({"num_prompts": args.num_prompts, "student": args.student, "errors": results}))


if __name__ == "__main__":
    main()
