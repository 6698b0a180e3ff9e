"""How fast a checkpoint becomes a 2D model: projection against reading the same bytes with safetensors.

    python benchmarks/bench_projection.py                       # 14B's widths in fp32, 5 GiB of layers: teacher and student
    python benchmarks/bench_projection.py --model 1.3B --case teacher --dtype bf16

A sharded checkpoint of a released Wan's widths and random weights, as deep as --gib allows, is written to a temporary folder.
"teacher" is the checkpoint at its own shape and precision, "student" config/student_config.json with its part of the layers in
float32. Reading loads every tensor that the projection uses, one at a time, and keeps it for the teacher, as a loaded model does.
Both run in turns, each in a process of its own that has imported everything, on files that the system has in memory. "peak" is the
most that projecting held beyond the imports. The last line is one JSON document.
"""

import argparse
import json
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import RELEASED, ratio, ratio_text, released_config, seconds_of
from wandistiller.device import DTYPES
from wandistiller.model.config import StudentConfig
from wandistiller.model.sizes import count_parameters
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.project import project_teacher
from wandistiller.wan.names import transformer_settings
from wandistiller.wan.transformer_files import teacher_tensor_shapes

CONFIG = ROOT / "config" / "student_config.json"
FILE_NAME, NUM_SHARDS, GIB = "diffusion_pytorch_model", 4, 2**30


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(RELEASED), default="14B")
    parser.add_argument("--case", nargs="+", choices=["teacher", "student"], default=["teacher", "student"])
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the checkpoint")
    parser.add_argument("--gib", type=float, default=5.0, help="size of the checkpoint, at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the checkpoint is written (the system's temporary folder)")
    return parser.parse_args()


def teacher_config(name: str, dtype: str, gib: float) -> StudentConfig:
    """Return a released shape, with as many of its layers as `gib` allows."""
    config = released_config(name, 512)
    count = count_parameters(config)
    room = gib * GIB / DTYPES[dtype].itemsize - (count.total - config.depth * count.block)
    return config.replace(depth=max(2, min(config.depth, int(room / count.block))))


def write_checkpoint(folder: Path, config: StudentConfig, dtype: torch.dtype) -> None:
    """Write a sharded transformer folder in diffusers' layout."""
    shapes, weight_map = teacher_tensor_shapes(config), {}
    (folder / "config.json").write_text(json.dumps(transformer_settings(config)))
    size = -(-len(shapes) // NUM_SHARDS)
    for number in range(NUM_SHARDS):
        file = f"{FILE_NAME}-{number + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        tensors = {name: (0.02 * torch.randn(shapes[name])).to(dtype) for name in list(shapes)[number * size :][:size]}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / f"{FILE_NAME}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def memory_bytes(field: str) -> int:
    """Read what this process takes, from the system (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def read(folder: Path, names: list[str], keep: bool) -> dict:
    weight_map = json.loads((folder / f"{FILE_NAME}.safetensors.index.json").read_text())["weight_map"]
    kept = []

    def load() -> None:
        for file_name in dict.fromkeys(weight_map[name] for name in names):
            with safe_open(folder / file_name, framework="pt") as file:
                for name in (name for name in names if weight_map[name] == file_name):
                    tensor = file.get_tensor(name).clone()  # what safetensors gives is the file itself, not read yet
                    kept.extend([tensor] if keep else [])

    return {"seconds": seconds_of(load, "cpu")}


def project(folder: Path, config: StudentConfig | None, dtype: torch.dtype) -> dict:
    """Return seconds and memory of a projection, and the names of the tensors that it used."""
    WanLiteStudent(StudentConfig.load(CONFIG).replace(hidden_size=128, num_heads=1, depth=1, ffn_dim=128))
    before, made = memory_bytes("VmRSS"), []
    seconds = seconds_of(lambda: made.append(project_teacher(folder, config, dtype=dtype)), "cpu")
    student, report = made[0]
    result = sum(tensor.nbytes for tensor in student.state_dict().values())
    used = [name for name, entry in report.teacher.items() if entry["status"] == "used"]
    return {"seconds": seconds, "peak_bytes": memory_bytes("VmHWM") - before, "result_bytes": result, "used": used}


def alone(work, *inputs) -> dict:
    """Run `work` in a process of its own, and return what it gives."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *inputs).result()


def measure(case: str, folder: Path, teacher: StudentConfig, args: argparse.Namespace) -> dict:
    config, dtype = None, DTYPES[args.dtype]
    if case == "student":
        config, dtype = StudentConfig.load(CONFIG), torch.float32
        config = config.replace(depth=max(1, config.depth * teacher.depth // RELEASED[args.model]["depth"]))
    found = alone(project, folder, config, dtype)  # brings the files into memory
    works = {"read": (read, folder, found["used"], case == "teacher"), "project": (project, folder, config, dtype)}
    taken: dict[str, list[dict]] = {"read": [], "project": []}
    for number in range(args.rounds):
        for side in sorted(works, reverse=bool(number % 2)):
            taken[side].append(alone(*works[side]))
    seconds = {side: [row["seconds"] for row in rows] for side, rows in taken.items()}
    medians = {f"{side}_s": statistics.median(values) for side, values in seconds.items()}
    peak = max(row["peak_bytes"] for row in taken["project"])
    row = {"case": case, **medians, **ratio(seconds["project"], seconds["read"])}
    return row | {"result_bytes": found["result_bytes"], "peak_bytes": peak}


def main() -> int:
    args = parse_args()
    teacher, rows = teacher_config(args.model, args.dtype, args.gib), []
    with tempfile.TemporaryDirectory(prefix="bench_projection_", dir=args.folder) as folder:
        write_checkpoint(Path(folder), teacher, DTYPES[args.dtype])
        print(f"{args.model}, {teacher.depth} layers, {args.dtype}, in {NUM_SHARDS} files")
        print("case       read, s  project, s  ratio (quartiles)     result, GiB  peak, GiB")
        for case in args.case:
            rows.append(row := measure(case, Path(folder), teacher, args))
            print(
                f"{case:<9}{row['read_s']:>9.2f}{row['project_s']:>12.2f}  {ratio_text(row):<22}"
                f"{row['result_bytes'] / GIB:>11.2f}{row['peak_bytes'] / GIB:>11.2f}",
                flush=True,
            )
    print(json.dumps(vars(args) | {"depth": teacher.depth, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
