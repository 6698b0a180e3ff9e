"""Everything that a GPU is needed for, in parts of at most eight minutes, and the section of docs/measurements.md that they make.

    python benchmarks/on_gpu.py --list
    python benchmarks/on_gpu.py --output_dir outputs/on_gpu --write              # all parts, one after the other
    python benchmarks/on_gpu.py --output_dir outputs/on_gpu tests forward        # some of them; a further call adds others
    python benchmarks/on_gpu.py --tiny --device cpu                              # every command at tiny size, to find mistakes

It runs from a clone with torch for CUDA and what requirements.txt names; pytest is needed for the part `tests`, torchao for
products in fp8, and what is missing is said in the part's table. What the commands print and measure goes to PART.json in
--output_dir, with date, device and commit; a part that fails or takes longer than its minutes is told and the next one runs.
--write puts the tables of all parts that the folder holds into docs/measurements.md. The last line is one JSON document.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.pages import write_section

PAGE = ROOT / "docs" / "measurements.md"
PART_MINUTES = 8.0


@dataclass(frozen=True)
class Part:
    """Commands that answer one question, at full size and at a tiny one; "{device}" is cuda or cpu, "{dtype}" its own."""

    about: str
    full: list[str]
    tiny: list[str]

    def commands(self, is_tiny: bool, device: str) -> list[list[str]]:
        values = {"device": device, "dtype": "fp32" if device == "cpu" else "bf16"}
        return [line.format(**values).split() for line in (self.tiny if is_tiny else self.full)]


FORWARD = "benchmarks/bench_forward.py --device {device}"
LARGE = "--depth 4 --pixels 512 1024 --prompt_tokens 64 --rounds 7"
STEP, FP8 = "benchmarks/bench_step.py --device {device}", "benchmarks/bench_fp8.py --device {device}"
MEMORY = "benchmarks/bench_memory.py"
TESTS = "-m pytest tests/test_gpu.py -q -rs -p no:cacheprovider"
DEMO = "train_distillation.py --output_dir outputs/on_gpu_demo --overwrite --device {device} --dtype {dtype}"
JUDGED = (
    "evaluate_student.py --student outputs/on_gpu_demo --prompts_file data/demo_heldout_prompts.txt --device {device}"
)
PARTS = {
    "tests": Part(
        "Does everything that a GPU alone can show hold, with NCCL under torchrun?", [TESTS], [f"{TESTS} -k velocities"]
    ),
    "forward": Part(
        "How fast is the 2D forward and backward pass against diffusers, and what is its MFU?",
        [f"{FORWARD} --model {model} {LARGE}" for model in ("1.3B", "5B", "14B")],
        [f"{FORWARD} --model demo --prompt_tokens 4 --rounds 1"],
    ),
    "compiled": Part(
        "And compiled, both sides?",
        [f"{FORWARD} --model {model} {LARGE} --modes forward --compile" for model in ("1.3B", "5B", "14B")],
        [f"{FORWARD} --model demo --prompt_tokens 4 --rounds 1 --modes forward"],
    ),
    "step": Part(
        "What does a whole step of the loop cost beside its parts, and what is its MFU?",
        [
            f"{STEP} --steps 20 --teacher_path mock --student_config config/student_config.json --batch_size 4",
            STEP,
        ],
        [f"{STEP} --steps 2 --rounds 1 --batch_size 2"],
    ),
    "memory": Part(
        "Does a step at true size take the memory that --dry_run says, and what is its MFU?",
        [
            f"{MEMORY} --teacher 5B --image_size 1024 --batch_size 4",
            f"{MEMORY} --teacher 14B --image_size 512 --batch_size 4",
        ],
        [],  # it needs a GPU
    ),
    "fp8": Part(
        "What do weights and products in fp8 cost or bring, and how long does a swap of experts take?",
        [FP8],
        [f"{FP8} --model 1.3B --depth 1 --pixels 64 --rounds 1"],
    ),
    "demo": Part(
        "Does the demo in bf16 reach what it reaches on a CPU?",
        [DEMO, f"{JUDGED} --num_prompts 100 --batch_size 50"],
        [f"{DEMO} --max_steps 2 --batch_size 2 --num_samples 0", f"{JUDGED} --num_prompts 2 --batch_size 2"],
    ),
}


def parse_args(argv: list[str] | None, parts: Mapping[str, Part]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--list", action="store_true", help="name the parts and their commands, and run none")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="every command at a tiny size")
    parser.add_argument("--minutes", type=float, default=PART_MINUTES, help=f"a part's (default: {PART_MINUTES:g})")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "on_gpu")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/measurements.md")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.parts if name not in parts]:
        parser.error(f"no part is called {unknown[0]}; there are {', '.join(parts)}")
    if args.write and (args.tiny or args.device == "cpu"):
        parser.error("--write is for figures of a GPU at full size; leave out --tiny and --device cpu")
    args.parts = args.parts or list(parts)
    return args


def about_machine(device: str) -> dict[str, str]:
    """Return date, device, torch and commit."""
    import torch

    words = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"date": date, "device": name, "torch": torch.__version__, "commit": commit or "unknown"}


def run_command(command: list[str], limit_s: float) -> dict:
    """Run a command of the repository; return its exit code (124: it took longer), what it printed and what it measured."""
    start, run = time.monotonic(), {"command": "python " + " ".join(command)}
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=limit_s,
        )  # fmt: skip
        code, printed = done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
        code, printed = 124, (expired.stdout or b"").decode(errors="replace")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in printed.strip().splitlines()]
    measured = json.loads(lines[-1]) if code == 0 and lines and lines[-1].startswith("{") else None
    shown = [line for line in lines if not line.startswith("{") and "it/s]" not in line and "s/it]" not in line]
    run |= {"exit_code": code, "seconds": round(time.monotonic() - start, 1), "printed": "\n".join(shown)}
    print(f"$ {run['command']}\n{run['printed']}\n[exit code {code}, {run['seconds']} s]\n", flush=True)
    return run | {"document": measured}


def run_part(name: str, part: Part, args: argparse.Namespace, machine: dict[str, str]) -> dict:
    """Run the commands of a part, and keep what they print and measure."""
    deadline, runs = time.monotonic() + 60 * args.minutes, []
    for command in part.commands(args.tiny, args.device):
        runs.append(run_command(command, max(1.0, deadline - time.monotonic())))
    found = machine | {"part": name, "about": part.about, "is_tiny": args.tiny, "runs": runs}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def section(parts: list[dict]) -> str:
    """Return the section of docs/measurements.md in Markdown."""
    lines = []
    for part in parts:
        where = f"{part['date']}, {part['device']}, torch {part['torch']}, commit {part['commit']}"
        lines += [f"**{part['about']}** ({where})", ""]
        for run in part["runs"]:
            state = "" if run["exit_code"] == 0 else f", which failed with exit code {run['exit_code']}"
            lines += [f"`{run['command']}`, {run['seconds']:.0f} s{state}:", "", "```", run["printed"], "```", ""]
    return "\n".join(lines)


def write(folder: Path, page: Path = PAGE) -> None:
    """Put the tables of all parts at full size that the folder holds between the two marks of a page."""
    kept = [json.loads((folder / f"{name}.json").read_text()) for name in PARTS if (folder / f"{name}.json").exists()]
    write_section(page, "on_gpu", section([part for part in kept if not part["is_tiny"]]))


def main(argv: list[str] | None = None, parts: Mapping[str, Part] = PARTS) -> int:
    args = parse_args(argv, parts)
    if args.list:
        for name in args.parts:
            print(f"{name:<10}{parts[name].about}")
            for command in parts[name].commands(args.tiny, args.device):
                print(f"{'':<12}python {' '.join(command)}")
        return 0
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("on_gpu.py: there is no CUDA GPU here; --tiny --device cpu tries the commands", file=sys.stderr)
        return 2
    machine = about_machine(args.device)
    found = [run_part(name, parts[name], args, machine) for name in args.parts]
    if args.write:
        write(args.output_dir)
    failed = [part["part"] for part in found if any(run["exit_code"] for run in part["runs"])]
    print(json.dumps(machine | {"parts": args.parts, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
