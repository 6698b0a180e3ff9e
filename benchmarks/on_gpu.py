"""Everything that a GPU is needed for, in parts of at most eight minutes, and the section of docs/measurements.md that they make.

    python benchmarks/on_gpu.py --list
    python benchmarks/on_gpu.py --write                    # all parts, one after the other
    python benchmarks/on_gpu.py --write tests forward      # some of them; a further call adds others

It runs from a clone with torch for CUDA and what requirements.txt names; the part `tests` needs pytest. What a part's commands print
goes to PART.md in --output_dir, with date, device and commit; a part that fails or takes longer than its minutes is told and the
next one runs. --write puts the parts that the folder holds into docs/measurements.md. The last line is one JSON document.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.pages import write_section

PAGE = ROOT / "docs" / "measurements.md"
PART_MINUTES = 8.0
FORWARD = "benchmarks/bench_forward.py --depth 4 --pixels 512 1024 --prompt_tokens 64 --model"
MEMORY = "benchmarks/bench_memory.py --batch_size 4"
DEMO = "outputs/on_gpu_demo"
# A part -> the question that it answers, and its commands
PARTS: dict[str, tuple[str, list[str]]] = {
    "tests": (
        "Does everything that a GPU alone can show hold, with NCCL under torchrun?",
        ["-m pytest tests/test_gpu.py -q -rs -p no:cacheprovider"],
    ),
    "forward": (
        "How fast is the 2D forward and backward pass against diffusers, and what is its MFU?",
        [f"{FORWARD} {model}" for model in ("1.3B", "5B", "14B")],
    ),
    "compiled": (
        "And compiled, both sides?",
        [f"{FORWARD} {model} --modes forward --compile" for model in ("1.3B", "5B", "14B")],
    ),
    "memory": (
        "Does a step at true size take the memory that --dry_run says, and what is its MFU?",
        [f"{MEMORY} --teacher 5B --image_size 1024", f"{MEMORY} --teacher 14B --image_size 512"],
    ),
    "streaming": (
        "Do answers of a teacher of 14B hide the copies of its blocks (--teacher_offload blocks)?",
        [
            f"benchmarks/bench_streaming.py --teacher 14B --depth 10 --teacher_dtype {dtype}"
            for dtype in ("fp8", "bf16")
        ],
    ),
    "demo": (
        "Does the demo in bf16 reach what it reaches on a CPU?",
        [
            f"train_distillation.py --output_dir {DEMO} --overwrite --device cuda --dtype bf16",
            f"evaluate_student.py --student {DEMO} --prompts_file data/demo_heldout_prompts.txt --device cuda "
            "--num_prompts 100 --batch_size 50 --judge tools/demo_judge.py:judge_all",
        ],
    ),
}
Parts = Mapping[str, tuple[str, list[str]]]


def parse_args(argv: list[str] | None, parts: Parts) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--list", action="store_true", help="name the parts and their commands, and run none")
    parser.add_argument("--minutes", type=float, default=PART_MINUTES, help=f"a part's (default: {PART_MINUTES:g})")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "on_gpu")
    parser.add_argument("--write", action="store_true", help="put the results into docs/measurements.md")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.parts if name not in parts]:
        parser.error(f"no part is called {unknown[0]}; there are {', '.join(parts)}")
    args.parts = args.parts or list(parts)
    return args


def about_machine() -> str:
    """Return date, device, torch and commit."""
    import torch

    words = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{datetime.now(UTC):%Y-%m-%d}, {name}, torch {torch.__version__}, commit {commit}"


def run_command(command: str, limit_s: float) -> tuple[int, str]:
    """Run a command of the repository; return its exit code (124: it took longer), and what it printed, in Markdown."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command.split()],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=limit_s,
        )  # fmt: skip
        code, printed = done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
        code, printed = 124, (expired.stdout or b"").decode(errors="replace")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in printed.strip().splitlines()]
    shown = "\n".join(line for line in lines if not line.startswith("{") and "it/s]" not in line)
    state = f", which failed with exit code {code}" if code else ""
    return code, f"`python {command}`, {time.monotonic() - start:.0f} s{state}:\n\n```\n{shown}\n```\n"


def main(argv: list[str] | None = None, parts: Parts = PARTS, page: Path = PAGE) -> int:
    args = parse_args(argv, parts)
    if args.list:
        for name in args.parts:
            about, commands = parts[name]
            print(f"{name:<10}{about}", *(f"{'':<12}python {command}" for command in commands), sep="\n")
        return 0
    machine, failed = about_machine(), []
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in args.parts:
        about, commands = parts[name]
        deadline, texts = time.monotonic() + 60 * args.minutes, [f"**{about}** ({machine})\n"]
        for command in commands:
            code, text = run_command(command, max(1.0, deadline - time.monotonic()))
            print(text, flush=True)
            texts.append(text)
            failed += [name] if code else []
        (args.output_dir / f"{name}.md").write_text("\n".join(texts), encoding="utf-8")
    if args.write:
        kept = [file for name in parts if (file := args.output_dir / f"{name}.md").exists()]
        write_section(page, "on_gpu", "\n".join(file.read_text(encoding="utf-8") for file in kept))
    print(json.dumps({"machine": machine, "parts": args.parts, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
