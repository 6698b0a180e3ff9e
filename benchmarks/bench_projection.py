"""How fast a checkpoint becomes a 2D model: projection against reading the same bytes with safetensors.

    python benchmarks/bench_projection.py                       # 14B's widths in fp32, 5 GiB of layers: teacher and student
    python benchmarks/bench_projection.py --model 1.3B --case teacher --dtype bf16

A sharded checkpoint of a released Wan's widths and random weights, as deep as --gib allows, is written to a temporary folder
(and removed, also after Ctrl-C). "Reading" loads every tensor that the projection uses into memory with safetensors, one at a
time. "teacher" is the checkpoint at its own shape in its own precision, and its reading keeps every tensor as a loaded model
does (new memory costs more than the copy into it); "student" is config/student_config.json with its share of the layers, in
float32, and its reading drops each tensor, as the projection does. Both sides run in turns, each in a process of its own that has imported everything,
on files that the system has in memory: disks differ, and a slower one slows both sides alike. Reported is the median of the
pairs' ratios with their quartiles, and the most that projecting held beyond the imports, against its bound: the result, the
largest tensor and 500 MB. The last line is one JSON document.
"""

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.bench_forward import SHAPES
from wandistiller.device import DTYPES
from wandistiller.model.config import StudentConfig
from wandistiller.model.sizes import count_parameters
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.wan.names import transformer_settings
from wandistiller.wan.transformer_files import teacher_tensor_shapes

CONFIG = ROOT / "config" / "student_config.json"
FILE_NAME = "diffusion_pytorch_model"
GIB = 2**30
ALLOWED_BYTES = 500e6  # comes on top of result and largest tensor, as in tests/projection/test_projection.py


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[name for name in SHAPES if SHAPES[name]], default="14B")
    parser.add_argument("--case", nargs="+", choices=["teacher", "student"], default=["teacher", "student"])
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the checkpoint")
    parser.add_argument("--gib", type=float, default=5.0, help="size of the checkpoint, at most")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the checkpoint is written (the system's temporary folder)")
    return parser.parse_args()


# ---- the checkpoint ----


def teacher_config(name: str, dtype: str, gib: float) -> StudentConfig:
    """Return a released shape, with as many of its layers as `gib` allows."""
    hidden_size, heads, ffn_dim, depth, channels, text_dim = SHAPES[name]
    config = StudentConfig(
        block="wan",
        hidden_size=hidden_size,
        depth=depth,
        num_heads=heads,
        ffn_dim=ffn_dim,
        num_channels=channels,
        image_size=512,
        text_encoder_output_dim=text_dim,
    )
    count = count_parameters(config)
    room = gib * GIB / DTYPES[dtype].itemsize - (count.total - depth * count.block)
    return config.replace(depth=max(2, min(depth, int(room / count.block))))


def write_checkpoint(folder: Path, config: StudentConfig, dtype: torch.dtype, num_shards: int) -> int:
    """Write a sharded transformer folder in diffusers' layout; return the bytes of its tensors."""
    shapes = teacher_tensor_shapes(config)
    (folder / "config.json").write_text(json.dumps(transformer_settings(config)))
    names, weight_map, num_bytes = list(shapes), {}, 0
    size = -(-len(names) // num_shards)
    for number in range(num_shards):
        file = f"{FILE_NAME}-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        tensors = {name: (0.02 * torch.randn(shapes[name])).to(dtype) for name in names[number * size :][:size]}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / f"{FILE_NAME}.safetensors.index.json").write_text(json.dumps(index))
    return num_bytes


def student_config(teacher: StudentConfig, full_depth: int) -> StudentConfig:
    """Return the default student, with the share of the layers that it has of the full teacher."""
    config = StudentConfig.load(CONFIG)
    return config.replace(depth=max(1, config.depth * teacher.depth // full_depth))


# ---- the two sides, each in its own process ----


def memory_kib(field: str) -> int:
    """Read what this process takes, from the system (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def read(folder: Path, names: list[str], keep: bool) -> float:
    """Time the loading of tensors into memory, one at a time, where they are kept or dropped."""
    weight_map = json.loads((folder / f"{FILE_NAME}.safetensors.index.json").read_text())["weight_map"]
    kept = []
    start = time.perf_counter()
    for file_name in dict.fromkeys(weight_map[name] for name in names):
        with safe_open(folder / file_name, framework="pt") as file:
            for name in names:
                if weight_map[name] == file_name:
                    tensor = file.get_tensor(name).clone()  # what safetensors gives is the file itself, not read yet
                    if keep:
                        kept.append(tensor)
    return time.perf_counter() - start


def project(folder: Path, config: StudentConfig | None, dtype: torch.dtype) -> dict:
    """Return seconds and memory of a projection, and the names of the tensors that it used."""
    import wandistiller.projection.selection

    small = StudentConfig.load(CONFIG).replace(hidden_size=128, num_heads=1, depth=1, ffn_dim=128)
    WanLiteStudent(small)
    before = memory_kib("VmRSS")
    start = time.perf_counter()
    student, report = wandistiller.projection.project.project_teacher(folder, config, dtype=dtype)
    elapsed_s = time.perf_counter() - start
    return {
        "seconds": elapsed_s,
        "peak_bytes": (memory_kib("VmHWM") - before) * 1024,
        "result_bytes": sum(tensor.nbytes for tensor in student.state_dict().values()),
        "used": [name for name, entry in report.teacher.items() if entry["status"] == "used"],
    }


def alone(work, *inputs):
    """Run `work` in a process of its own, and return what it gives."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *inputs).result()


# ---- the comparison ----


def measure(case: str, folder: Path, teacher: StudentConfig, args: argparse.Namespace) -> dict:
    is_own_shape = case == "teacher"
    config = None if is_own_shape else student_config(teacher, SHAPES[args.model][3])
    inputs = (folder, config, DTYPES[args.dtype] if is_own_shape else torch.float32)
    found = alone(project, *inputs)  # brings the files into memory
    itemsize = DTYPES[args.dtype].itemsize
    sizes = {name: itemsize * torch.Size(shape).numel() for name, shape in teacher_tensor_shapes(teacher).items()}
    pairs, peaks = [], [found["peak_bytes"]]
    for number in range(args.rounds):
        order = ("read", "project") if number % 2 else ("project", "read")
        taken = {
            side: alone(read, folder, found["used"], is_own_shape) if side == "read" else alone(project, *inputs)
            for side in order
        }
        peaks.append(taken["project"]["peak_bytes"])
        pairs.append((taken["read"], taken["project"]["seconds"]))
    ratios = [projected / reading for reading, projected in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    num_bytes = sum(sizes[name] for name in found["used"])
    return {
        "case": case,
        "used_bytes": num_bytes,
        "read_s": statistics.median(reading for reading, _ in pairs),
        "project_s": statistics.median(projected for _, projected in pairs),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "project_bytes_per_s": num_bytes / statistics.median(projected for _, projected in pairs),
        "result_bytes": found["result_bytes"],
        "peak_bytes": max(peaks),
        "allowed_bytes": int(found["result_bytes"] + max(sizes.values()) + ALLOWED_BYTES),
    }


def show(row: dict) -> None:
    print(
        f"{row['case']:<9}{row['used_bytes'] / GIB:9.2f}{row['read_s']:9.2f}{row['project_s']:12.2f}"
        f"{row['ratio']:8.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}){row['project_bytes_per_s'] / 1e9:9.2f}"
        f"{row['result_bytes'] / GIB:12.2f}{row['peak_bytes'] / GIB:11.2f}{row['allowed_bytes'] / GIB:10.2f}",
        flush=True,
    )


def main() -> int:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder goes then too
    teacher = teacher_config(args.model, args.dtype, args.gib)
    needed = 1.1 * DTYPES[args.dtype].itemsize * count_parameters(teacher).total
    if (free := shutil.disk_usage(args.folder or tempfile.gettempdir()).free) < needed:
        print(
            f"error: {needed / GIB:.1f} GiB of disk are needed, {free / GIB:.1f} are free; --gib, --folder",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="bench_projection_", dir=args.folder) as place:
        num_bytes = write_checkpoint(Path(place), teacher, DTYPES[args.dtype], args.shards)
        print(f"{args.model}, {teacher.depth} layers, {args.dtype}, {num_bytes / GIB:.2f} GiB in {args.shards} files")
        print("case     used, GiB  read, s  project, s   ratio (quartiles)    GB/s  result, GiB  peak, GiB  allowed")
        rows = []
        for case in args.case:
            rows.append(measure(case, Path(place), teacher, args))
            show(rows[-1])
    settings = {"model": args.model, "depth": teacher.depth, "dtype": args.dtype, "bytes": num_bytes}
    print(json.dumps({**settings, "rounds": args.rounds, "threads": torch.get_num_threads(), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
