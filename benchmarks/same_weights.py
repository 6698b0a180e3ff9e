"""Compare the students that two checkouts train, bit for bit: a change of structure must not move a weight.

    git worktree add ../before COMMIT
    python benchmarks/same_weights.py ../before

Every run is a short command, typed the same in both checkouts: the demo, replay, segments, a teacher cache, an fp8 teacher, noise,
random weights, and the pre-flight's mock run. The weights are compared bit for bit (the order of a file's metadata is random), and a
checkpoint of the other checkout is resumed in this one. The last line is one JSON document.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "diffusion_model.safetensors"
DEMO = ["train_distillation.py", "--num_samples", "0", "--device", "cpu"]
SHORT = [*DEMO, "--batch_size", "8", "--max_steps", "24", "--save_every", "0"]
RUNS = {
    "demo, 60 steps": [*DEMO, "--max_steps", "60", "--seed", "0"],
    "pre-flight": ["run_production_test.py", "--student_config", "config/demo_student_config.json"],
    "replay": [*SHORT, "--replay", "6", "--student_rollout", "0.5", "1"],
    "segments": [*SHORT, "--student_steps", "2", "--replay", "2"],
    "cache": [*SHORT, "--teacher_cache", "{folder}/cache", "--offline_teacher"],
    "fp8 teacher": [*SHORT, "--teacher_dtype", "fp8", "--replay", "1"],
    "noise": [*SHORT, "--states", "noise"],
    "from random weights": [*SHORT, "--init", "random"],
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    return parser.parse_args()


def weights_of(checkout: Path, words: list[str], folder: Path) -> str:
    """Return the checksum of the student that a command makes in a checkout."""
    words = [word.format(folder=folder) for word in words]
    if words[0] == "train_distillation.py":
        words += ["--prompt_cache", str(folder.parent / "prompt_cache")]
    command = [sys.executable, *words, "--output_dir", str(folder / "student")]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(words)} failed\n{done.stdout}{done.stderr}")
    digest = hashlib.sha256()
    for tensor_name, tensor in sorted(load_file(folder / "student" / WEIGHTS).items()):
        digest.update(f"{tensor_name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def main() -> int:
    args = parse_args()
    same = {}
    with tempfile.TemporaryDirectory() as scratch:
        places = {"before": (args.other.resolve(), Path(scratch) / "before"), "now": (ROOT, Path(scratch) / "now")}
        for name in args.only:
            sums = {
                when: weights_of(checkout, RUNS[name], folder / name) for when, (checkout, folder) in places.items()
            }
            same[name] = sums["before"] == sums["now"]
            print(f"{name:<24}{'the same' if same[name] else 'DIFFERENT'}  {sums['now'][:16]}", flush=True)

        # A run that the other checkout began, resumed by each:
        words, begun = [*SHORT, "--save_every", "12"], Path(scratch) / "begun"
        weights_of(args.other.resolve(), [*words, "--max_steps", "12"], begun)
        sums = {}
        for when, (checkout, folder) in places.items():
            shutil.copytree(begun, folder / "resumed")
            sums[when] = weights_of(checkout, words, folder / "resumed")
        same["resumed"] = sums["before"] == sums["now"]
        print(f"{'resumed from before':<24}{'the same' if same['resumed'] else 'DIFFERENT'}  {sums['now'][:16]}")
    print(json.dumps(same))
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
