"""Pre-flight before a long GPU job: the trainer itself, end to end, on a shrunk student and a mock teacher.

    python run_production_test.py --student_config config/student_config.json --data_path data/static_prompts.txt

It takes the flags of train_distillation.py. With a real --teacher_path (or a --preset) it first prints the budget of that very command,
and fails where the command would be refused.
"""

import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from train_distillation import distil
from wandistiller.command_line import run_command
from wandistiller.model.config import StudentConfig
from wandistiller.run.flags import Flags, ObjectiveFlags, OptimizationFlags, PromptFlags, parse_args
from wandistiller.run.inputs import read_inputs

HIDDEN_SIZE, DEPTH, LATENT_SIZE = 256, 4, 8
HEAD_DIM = 64  # for a wan student whose own heads do not fill HIDDEN_SIZE
BATCH_SIZE, MAX_PROMPTS = 2, 200
DEFAULTS: dict[str, object] = {
    "teacher_path": "mock",
    "student_config": "config/student_config.json",
    "output_dir": None,  # a temporary folder
}
# What is typed in these groups is tested; all else needs the real teacher, a GPU or a long time.
TESTED = [known.name for group in (PromptFlags, ObjectiveFlags, OptimizationFlags) for known in fields(group)]
SMALL: dict[str, Any] = {
    **dict.fromkeys(("teacher_calls", "max_steps", "lr_warmup_steps")),
    "teacher_steps": 10,  # of a teacher that has all levels; what a stand-in draws is no picture
    **{"teacher_path": "mock", "device": "cpu", "num_samples": 0, "overwrite": True},
    **{"num_epochs": 1, "batch_size": BATCH_SIZE, "grad_accum_steps": 1},
}


def shrink(config: StudentConfig) -> StudentConfig:
    """Return the same kind of student, small enough for seconds on a CPU: at most HIDDEN_SIZE wide and DEPTH deep."""
    hidden_size = min(HIDDEN_SIZE, config.hidden_size)
    patches = min(max(1, config.latent_size // config.patch_size), -(-LATENT_SIZE // config.patch_size))
    image_size = patches * config.patch_size * config.vae_scale_factor
    shrunk = {"hidden_size": hidden_size, "depth": min(DEPTH, config.depth), "image_size": image_size}
    if hidden_size < config.hidden_size:
        if config.is_wan:
            head_dim = config.head_dim if hidden_size % config.head_dim == 0 else HEAD_DIM
            shrunk["num_heads"] = hidden_size // head_dim
            shrunk["ffn_dim"] = max(1, config.ffn_dim * hidden_size // config.hidden_size)
        else:
            heads = range(1, config.num_heads + 1)
            shrunk["num_heads"] = max(count for count in heads if hidden_size % count == 0)
            shrunk |= {"ffn_dim": None, "freq_dim": None}  # these follow the width of a lite block
    return config.replace(**shrunk)


def run_test(flags: Flags, scratch: Path) -> None:
    """Dry-run the real command where there is a real teacher, then train, resume and reload a small student."""
    from wandistiller import WanLiteStudent
    from wandistiller.model.sizes import count_parameters

    inputs, folder, config_file = read_inputs(flags), Path(flags.output_dir), scratch / "student_config.json"
    passed(f"Prompts found: {len(inputs.prompts.train):,} in {flags.data_path}")
    passed(f"Config found: {flags.student_config}")
    if flags.teacher_path != "mock":
        distil(flags)
        passed(f"{flags.student_config} fits {flags.teacher_path}")
    small = shrink(inputs.config)
    config_file.write_text(small.to_json(), encoding="utf-8")
    passed(
        f"Config adjusted: model_type {small.model_type}, block {small.block}, hidden_size {inputs.config.hidden_size} -> "
        f"{small.hidden_size}, depth {inputs.config.depth} -> {small.depth}, num_heads {small.num_heads}, "
        f"ffn_dim {small.ffn_dim}, image_size {small.image_size}"
    )
    passed(f"Student parameters: {count_parameters(small).total:,}")
    num_prompts = min(len(inputs.prompts.train), MAX_PROMPTS)
    own = {"student_config": str(config_file), "num_prompts": num_prompts, "output_dir": flags.output_dir}
    tested = {name: getattr(flags, name) for name in (*TESTED, "sigma_range", "gradient_checkpointing")}
    train_and_resume(Flags(**tested | SMALL | own), -(-num_prompts // BATCH_SIZE))
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    passed("Files saved: " + ", ".join(f"{path.name} ({path.stat().st_size:,} bytes)" for path in files))
    WanLiteStudent.from_pretrained(folder)
    passed("Reloaded from disk: every weight is finite")


def train_and_resume(flags: Flags, num_steps: int) -> None:
    """Train half of an epoch, and resume for the rest."""
    import torch

    from wandistiller.reports.metrics import read_metrics

    # So small a model gains nothing from more threads, and with them waits minutes for cores that others keep busy.
    torch.set_num_threads(1)
    half = max(1, num_steps // 2)
    whole = replace(flags, save_every=half, eval_every=half)
    for part in (replace(whole, max_steps=half, eval_every=0), replace(whole, overwrite=False)):
        if distil(part) == 130:
            raise KeyboardInterrupt
    losses = [line["loss"] for line in read_metrics(Path(flags.output_dir) / "metrics.jsonl")]
    passed(f"Steps completed: {len(losses)} of {num_steps}, average loss {sum(losses) / len(losses):.4f}")


def passed(line: str) -> None:
    print(f"[ok] {line}", flush=True)


def main(argv: list[str] | None = None) -> int:
    flags = parse_args(argv, "run_production_test.py", DEFAULTS)
    outcome = "FAILED"
    try:
        with tempfile.TemporaryDirectory(prefix="wandistiller-") as scratch:
            folder = flags.output_dir or f"{scratch}/student"
            run_test(replace(flags, output_dir=folder, dry_run=True, cache_part=None), Path(scratch))
        outcome = "PASSED"
    finally:
        print(f"Production Test {outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
