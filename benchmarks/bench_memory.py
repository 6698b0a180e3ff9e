"""A whole training step at true size on a GPU: its memory beside what `--dry_run` says it takes, its time and its MFU.

    python benchmarks/bench_memory.py                                           # Wan2.2-TI2V-5B
    python benchmarks/bench_memory.py --teacher 14B --arms checkpointing        # one expert of Wan2.2-A14B

A teacher of the released shape with random weights and the default student with its channels, in bf16, with and without gradient
checkpointing and torch.compile. Each arm is a process of its own, so that none inherits another's memory. "MFU" is the share of
the rate that plain matrix products reach on the device. The last line is one JSON document. It needs a CUDA GPU; without one it
says so and exits with 2.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

GIB = 2**30
NUM_TOKENS = 64  # text tokens of every prompt
ARMS = {"plain": [], "checkpointing": ["--checkpointing"], "compile": ["--compile"],
        "checkpointing, compile": ["--checkpointing", "--compile"]}  # fmt: skip
TEACHERS = {  # Wan2.1 and Wan2.2: wan/configs
    "1.3B": {"hidden_size": 1536, "depth": 30, "num_heads": 12, "ffn_dim": 8960, "num_channels": 16},
    "5B": {"hidden_size": 3072, "depth": 30, "num_heads": 24, "ffn_dim": 14336, "num_channels": 48},
    "14B": {"hidden_size": 5120, "depth": 40, "num_heads": 40, "ffn_dim": 13824, "num_channels": 16},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=list(TEACHERS), default="5B", help="its shape (default: 5B)")
    parser.add_argument("--image_size", type=int, default=1024, help="pixels (default: 1024)")
    parser.add_argument("--batch_size", type=int, default=4, help="prompts of a step (default: 4)")
    parser.add_argument("--num_steps", type=int, default=5, help="steps of an arm, the first is not timed (default: 5)")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help=str(list(ARMS))
    )
    parser.add_argument(
        "--one_arm", action="store_true", help=argparse.SUPPRESS
    )  # one arm runs in a process of its own
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    import torch

    if not torch.cuda.is_available():
        print("bench_memory.py: measures a CUDA GPU, and there is none here", file=sys.stderr)
        raise SystemExit(2)
    if args.one_arm:
        print(json.dumps(measure_arm(args)))
        return
    rows = {}
    print(f"{'arm':<24}{'budget GiB':>12}{'measured GiB':>14}{'measured / budget':>19}{'s a step':>10}{'MFU':>6}")
    for name in args.arms:
        row = rows[name] = run_arm(args, ARMS[name])
        if "error" in row:
            print(f"{name:<24}{row['error']}", flush=True)
            continue
        ratio = row["measured_gib"] / row["budget_gib"]
        print(
            f"{name:<24}{row['budget_gib']:>12.2f}{row['measured_gib']:>14.2f}{ratio:>19.1%}"
            f"{row['seconds_per_step']:>10.3f}{row['mfu']:>6.0%}",
            flush=True,
        )
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    about |= {"teacher": args.teacher, "image_size": args.image_size, "batch_size": args.batch_size}
    print(json.dumps(about | {"arms": rows}))


def run_arm(args: argparse.Namespace, flags: list[str]) -> dict:
    """Return the row of one arm, or under "error" why there is none."""
    sizes = [
        "--teacher",
        args.teacher,
        "--image_size",
        args.image_size,
        "--batch_size",
        args.batch_size,
        "--num_steps",
        args.num_steps,
    ]
    words = [sys.executable, __file__, "--one_arm", *sizes, *flags]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def measure_arm(args: argparse.Namespace) -> dict:
    """Train a few steps of one arm as the trainer does, and read the allocator."""
    import torch

    from wandistiller.budget.machine import matmul_rate
    from wandistiller.budget.memory import memory_budget, training_peak_bytes

    workload = build_workload(args)
    step = build_step(workload, args.compile)
    step()  # gradients, moments and compiled code exist from here on
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(args.num_steps - 1):
        step()
    end.record()
    torch.cuda.synchronize()
    # The context and fragmentation are outside of what max_memory_allocated counts, so the reserve stays out here too.
    parts = [part for part in memory_budget(workload) if part.name != "reserve"]
    seconds = start.elapsed_time(end) / 1000 / max(1, args.num_steps - 1)
    return {
        "budget_gib": training_peak_bytes(parts) / GIB,
        "measured_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "seconds_per_step": seconds,
        "mfu": step_flops(workload) / seconds / matmul_rate("cuda", torch.bfloat16),
        "components_gib": {part.name: part.num_bytes / GIB for part in parts},
    }


def step_flops(workload) -> float:
    """Count the FLOPs of a step that asks the teacher; blocks computed twice count once, as MFU has it."""
    from wandistiller.model.sizes import BACKWARD_PASSES, guided_flops, num_image_tokens, transformer_flops

    teacher, student, side = workload.teacher, workload.student, workload.latent_size
    answer = guided_flops(teacher, num_image_tokens(teacher, side), NUM_TOKENS + 1, NUM_TOKENS + 1)
    forward = transformer_flops(student, num_image_tokens(student, side), NUM_TOKENS + 1)
    return workload.batch_size * (answer + (1 + BACKWARD_PASSES) * forward)


def build_workload(args: argparse.Namespace):
    from wandistiller.budget.workload import Workload, stored_latents
    from wandistiller.model.config import StudentConfig
    from wandistiller.targets.trajectories import paths_per_lane

    config = StudentConfig.load(ROOT / "config" / "student_config.json")
    shape = TEACHERS[args.teacher]
    student = config.replace(num_channels=shape["num_channels"], image_size=args.image_size)
    teacher = StudentConfig(block="wan", image_size=args.image_size, **shape)
    return Workload(
        teacher=teacher,
        student=student,
        latent_size=student.latent_size,
        batch_size=args.batch_size,
        gradient_checkpointing=args.checkpointing,
        stored_latents=stored_latents(paths_per_lane(args.batch_size), renoised=True),
        mean_text_tokens=NUM_TOKENS,
        negative_text_tokens=NUM_TOKENS,
        text_encoder_parameters=0,
    )


def build_step(workload, is_compiled: bool, device: str = "cuda") -> Callable[[], None]:
    """Build the trainer's parts, and return one pass through them: answer, loss, backward, update, move the states."""
    import torch
    from torch import nn

    from wandistiller.budget.step_time import random_model
    from wandistiller.model.transformer import WanLiteStudent
    from wandistiller.processes import Processes
    from wandistiller.run.build import compile_blocks
    from wandistiller.sampling.teacher import Teacher
    from wandistiller.targets.answers import TeacherAnswers
    from wandistiller.targets.lanes import Lanes
    from wandistiller.targets.states import StatesOptions, build_states
    from wandistiller.training.objective import Objective, TrainedStudent
    from wandistiller.training.optimizer import OptimizationOptions
    from wandistiller.training.state import RunState
    from wandistiller.wan.mock import mock_wan_files
    from wandistiller.wan.prompt_embeds import PromptEmbeds
    from wandistiller.wan.settings import resolve_settings

    dtype = torch.bfloat16
    student = WanLiteStudent(workload.student).to(device).train()
    expert = random_model(workload.teacher, device, dtype)
    settings = resolve_settings(mock_wan_files(workload.student), shift=5.0, guidance_scale=5.0)
    text_dim = workload.teacher.text_encoder_output_dim
    texts = [0.1 * torch.randn(NUM_TOKENS, text_dim, generator=torch.Generator().manual_seed(i)) for i in range(64)]
    embeds = PromptEmbeds(len(texts), text_dim, texts.__getitem__)
    teacher = Teacher({"high": expert}, settings, texts[0])
    student.gradient_checkpointing = workload.gradient_checkpointing
    if is_compiled:
        compile_blocks([student, expert])
    options = StatesOptions(kind="trajectory", renoise_fraction=0.25)
    states = build_states(options, workload.student, settings, len(texts), Lanes(workload.batch_size), device)
    answers = TeacherAnswers(teacher, states, embeds, device, dtype)
    objective = Objective(shift=settings.shift, compute_dtype=dtype, device=device)
    optimization = OptimizationOptions(lr=1e-6, ema_decay=0.999 if workload.ema else 0.0)
    trained = TrainedStudent(student, objective)
    run = RunState(trained, answers, optimization, 1000, Processes(device))

    def step() -> None:
        answer = answers.next()
        loss = trained(answer, 0.0)
        loss.total.backward()
        nn.utils.clip_grad_norm_(run.trained.parameters(), optimization.max_grad_norm)
        run.update(float(loss.velocity))
        answers.advance(answer, loss.student_velocity, 0.0)

    return step


if __name__ == "__main__":
    main()
