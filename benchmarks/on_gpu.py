"""Everything that a GPU is needed for, in parts of at most eight minutes, and the section of docs/benchmarks.md that they make.

    python benchmarks/on_gpu.py --list
    python benchmarks/on_gpu.py --output_dir outputs/on_gpu --write              # all parts, one after the other
    python benchmarks/on_gpu.py --output_dir outputs/on_gpu tests forward        # some of them; a further call adds others
    python benchmarks/on_gpu.py --tiny --device cpu                              # every command at tiny size, to find mistakes

It runs from a clone with torch for CUDA and what requirements.txt names; pytest is needed for the part `tests`, torchao for
products in fp8, and what is missing is said in the part's table. A part is one or more commands of this repository. What they
print goes to PART.txt, what they measured to PART.json in --output_dir, with date, device and commit; a part that fails or takes
longer than its minutes is told and the next one runs. --write puts the tables of all parts that the folder holds into
docs/benchmarks.md. The last line is one JSON document.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.pages import write_section

PAGE = ROOT / "docs" / "benchmarks.md"
PART_MINUTES = 8.0


@dataclass(frozen=True)
class Part:
    """Commands that are run together.

    Attributes:
        about: the question that they answer.
        commands: of a size and a device, each a script with its flags.
    """

    about: str
    commands: Callable[[bool, str], list[list[str]]]


def words(line: str) -> list[str]:
    return line.split()


def tests(is_tiny: bool, device: str) -> list[list[str]]:
    which = ["-k", "velocities"] if is_tiny else []
    return [["-m", "pytest", "tests/test_gpu.py", "-q", "-rs", "-p", "no:cacheprovider", *which]]


def forward(is_tiny: bool, device: str, *flags: str) -> list[list[str]]:
    if is_tiny:
        size = "--model demo --prompt_tokens 4 --rounds 1"
        return [["benchmarks/bench_forward.py", *words(size), "--device", device, *flags]]
    size = "--depth 4 --pixels 512 1024 --prompt_tokens 64 --rounds 7"
    return [
        ["benchmarks/bench_forward.py", "--model", model, *words(size), "--device", device, *flags]
        for model in ("1.3B", "5B", "14B")
    ]


def compiled_forward(is_tiny: bool, device: str) -> list[list[str]]:
    return forward(is_tiny, device, "--modes", "forward", *([] if is_tiny else ["--compile"]))


def memory(is_tiny: bool, device: str) -> list[list[str]]:
    if device != "cuda":
        return []
    if is_tiny:
        return [["benchmarks/bench_memory.py", *words("--teacher 1.3B --image_size 256 --batch_size 1 --num_steps 2")]]
    return [
        ["benchmarks/bench_memory.py", *words("--teacher 5B --image_size 1024 --batch_size 4")],
        [
            "benchmarks/bench_memory.py",
            *words("--teacher 14B --image_size 512 --batch_size 4 --arms plain checkpointing"),
        ],
    ]


def step(is_tiny: bool, device: str) -> list[list[str]]:
    """A whole step of the trainer's own loop: the mock teacher around a 1B student, and the demo."""
    script = ["benchmarks/bench_step.py"]
    if is_tiny:
        return [[*script, *words("--steps 2 --batch_size 2"), "--device", device]]
    mock = "--steps 20 --teacher_path mock --student_config config/student_config.json --batch_size 4"
    return [[*script, *words(mock), "--device", device], [*script, "--steps", "60", "--device", device]]


def fp8(is_tiny: bool, device: str) -> list[list[str]]:
    size = words("--model 1.3B --depth 1 --pixels 64 --rounds 1") if is_tiny else []
    return [["benchmarks/bench_fp8.py", *size, "--device", device]]


def offload(is_tiny: bool, device: str) -> list[list[str]]:
    size = words("--model 1.3B --depth 1 --pixels 64 --rounds 1") if is_tiny else words("--depth 10")
    return [["benchmarks/bench_offload.py", *size, "--device", device]]


def demo(is_tiny: bool, device: str) -> list[list[str]]:
    """The demo in bf16, measured as README measures it on a CPU."""
    folder = "outputs/on_gpu_demo"
    dtype = "fp32" if device == "cpu" else "bf16"
    short = words("--max_steps 2 --batch_size 2 --num_samples 0") if is_tiny else []
    how_many = words("--num_prompts 2 --batch_size 2") if is_tiny else words("--num_prompts 100 --batch_size 50")
    train = ["train_distillation.py", "--output_dir", folder, "--overwrite", "--device", device, "--dtype", dtype]
    held_out = ["--prompts_file", "data/demo_heldout_prompts.txt", *how_many]
    return [[*train, *short], ["evaluate_student.py", "--student", folder, *held_out, "--device", device]]


PARTS = {
    "tests": Part("Does everything that a GPU alone can show hold, with NCCL under torchrun?", tests),
    "forward": Part("How fast is the 2D forward and backward pass against diffusers, and what is its MFU?", forward),
    "compiled": Part("And compiled, both sides?", compiled_forward),
    "step": Part("What does a whole step of the loop cost beside its parts, and what is its MFU?", step),
    "memory": Part("Does a step at true size take the memory that --dry_run says, and what is its MFU?", memory),
    "fp8": Part("What do weights, and products, in fp8 cost or bring?", fp8),
    "offload": Part("How long does a swap of experts take?", offload),
    "demo": Part("Does the demo in bf16 reach what it reaches on a CPU?", demo),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--list", action="store_true", help="name the parts and their commands, and run none")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="every command at a tiny size")
    parser.add_argument(
        "--minutes", type=float, default=PART_MINUTES, help=f"most of a part (default: {PART_MINUTES:g})"
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "on_gpu")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"no part is called {unknown[0]}; there are {', '.join(PARTS)}")
    if args.write and (args.tiny or args.device == "cpu"):
        parser.error("--write is for figures of a GPU at full size; leave out --tiny and --device cpu")
    args.parts = args.parts or list(PARTS)
    return args


def about_machine(device: str) -> dict[str, str]:
    """Return date, device, torch and commit."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"date": date, "device": name, "torch": torch.__version__, "commit": commit or "unknown"}


def run_command(command: list[str], seconds: float) -> tuple[int, str]:
    """Run a command of the repository within so many seconds; return its exit code (124: it took longer) and all it printed."""
    full = [sys.executable, *command]
    try:
        done = subprocess.run(
            full, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired as expired:
        return 124, (expired.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout


def last_document(printed: str) -> dict | None:
    """Return the JSON document of the last line, if there is one."""
    lines = printed.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return None
    return json.loads(lines[-1])


def table_of(printed: str) -> str:
    """Return what a person reads of a command's output: no progress bars, and not the JSON document."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in printed.strip().splitlines()]
    return "\n".join(line for line in lines if not line.startswith("{") and "it/s]" not in line and "s/it]" not in line)


def run_part(name: str, args: argparse.Namespace, machine: dict[str, str]) -> dict:
    """Run the commands of a part, and keep what they print and measure."""
    deadline = time.monotonic() + 60 * args.minutes
    runs = []
    for command in PARTS[name].commands(args.tiny, args.device):
        start = time.monotonic()
        code, printed = run_command(command, max(1.0, deadline - start))
        found = {
            "command": "python " + " ".join(command),
            "exit_code": code,
            "seconds": round(time.monotonic() - start, 1),
            "printed": table_of(printed),
            "document": last_document(printed) if code == 0 else None,
        }
        runs.append(found)
        print(f"$ {found['command']}\n{found['printed']}\n[exit code {code}, {found['seconds']} s]\n", flush=True)
    part = machine | {"part": name, "about": PARTS[name].about, "is_tiny": args.tiny, "runs": runs}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f"{name}.json").write_text(json.dumps(part, indent=2) + "\n", encoding="utf-8")
    text = "\n\n".join(f"$ {run['command']}\n{run['printed']}" for run in runs)
    (args.output_dir / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    return part


def section(parts: list[dict]) -> str:
    """Return the section of docs/benchmarks.md in Markdown."""
    lines = []
    for part in parts:
        where = f"{part['date']}, {part['device']}, torch {part['torch']}, commit {part['commit']}"
        lines += [f"**{part['about']}** ({where})", ""]
        for run in part["runs"]:
            state = "" if run["exit_code"] == 0 else f", which failed with exit code {run['exit_code']}"
            lines += [f"`{run['command']}`, {run['seconds']:.0f} s{state}:", "", "```", run["printed"], "```", ""]
    return "\n".join(lines)


def write(folder: Path) -> None:
    """Put the tables of all parts that the folder holds between the two marks of docs/benchmarks.md."""
    kept = [json.loads((folder / f"{name}.json").read_text()) for name in PARTS if (folder / f"{name}.json").exists()]
    write_section(PAGE, "on_gpu", section([part for part in kept if not part["is_tiny"]]))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        for name, part in PARTS.items():
            print(f"{name:<10}{part.about}")
            for command in part.commands(args.tiny, args.device):
                print(f"{'':<12}python {' '.join(command)}")
        return 0
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "on_gpu.py: there is no CUDA GPU here; --tiny --device cpu tries the commands without one", file=sys.stderr
        )
        return 2
    machine = about_machine(args.device)
    parts = [run_part(name, args, machine) for name in args.parts]
    if args.write:
        write(args.output_dir)
    failed = [part["part"] for part in parts if any(run["exit_code"] for run in part["runs"])]
    print(json.dumps(machine | {"parts": [part["part"] for part in parts], "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
