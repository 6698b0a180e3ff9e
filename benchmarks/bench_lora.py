"""How much of a teacher's LoRA arrives at a student: by `--train lora`, and by the cut of the LoRA alone.

    python benchmarks/bench_lora.py --student outputs/demo            # the student that the demo command leaves
    python benchmarks/bench_lora.py --student outputs/demo --teacher_calls 40 --seeds 0 1 2

A LoRA of rank 16 is trained on the demo teacher as trainers do it, by flow matching on pictures with captions: what the teacher
draws where every shape of the caption is green. Student and teacher draw held-out prompts with and without it from the same noise.
The change of a picture's latents at the student is held against that at the teacher: cosine, size, and the share of the squared error
to the changed teacher that is closed; and the judge of the demo's world tells how many pictures are right and green. Prints a table
in Markdown and, as its last line, one JSON document; the LoRAs stay in --output_dir, which is also where a second command goes on.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.bench_recipe import run, spread
from tools.demo_judge import OBJECT_RGB, judge
from wandistiller.evaluation.pair import Pair, sampling_of
from wandistiller.flags import ComputeFlags, TeacherFlags
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.lora import StudentLora, write_lora
from wandistiller.projection.project import project_teacher
from wandistiller.prompts.prompts import load_prompts
from wandistiller.sampling.flow import seeded_noise, shift_sigma, sigma_to_timestep
from wandistiller.sampling.sampler import StudentField, VelocityField, sample_in_batches
from wandistiller.sampling.teacher import Teacher
from wandistiller.training.lora import add_lora, lora_changes
from wandistiller.wan.transformer_files import teacher_tensor_shapes

BATCH_SIZE, RANK = 64, 16
NUM_CAPTIONS, NUM_HELD_OUT, NUM_NOISES = 256, 48, 2
STEPS, LR = 250, 3e-3  # of the teacher's LoRA
TEACHER, PROMPTS, HELD_OUT = (
    ROOT / "data" / name for name in ("demo_teacher", "demo_prompts.txt", "demo_heldout_prompts.txt")
)
MEASURES = ("cosine", "size", "closed", "right")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", type=Path, required=True, help="folder of a student of the demo's teacher")
    parser.add_argument(
        "--teacher_calls", type=int, default=40, help=f"batches of {BATCH_SIZE} that --train lora asks for"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "bench_lora")
    parser.add_argument("flags", nargs="*", help="more flags of train_distillation.py, after --")
    return parser.parse_args()


def in_green(prompt: str) -> str:
    return re.sub(rf"\b({'|'.join(OBJECT_RGB)})\b", "green", prompt)


class Bench:
    """Student and teacher of the demo, the captions that are learnt from, and the held-out prompts."""

    def __init__(self, student: Path):
        self.pair = Pair(str(student), TeacherFlags(teacher_path=str(TEACHER)), ComputeFlags(), "outputs/prompt_cache")
        self.captions = load_prompts(str(PROMPTS)).prompts[:NUM_CAPTIONS]
        self.held_out = [
            prompt for prompt in load_prompts(str(HELD_OUT)).prompts[:NUM_HELD_OUT] for _ in range(NUM_NOISES)
        ]
        self.embeds, self.negative = self.pair.embed([*self.captions, *map(in_green, self.captions), *self.held_out])

    def draw(self, field: VelocityField, who: str, first: int, count: int) -> Tensor:
        own = self.pair
        options = sampling_of(who, own.config, None, own.dtype, own.device)
        noise = seeded_noise(range(first, first + count), self.pair.settings.latent_shape(self.pair.config))
        indices = range(first, first + count)
        return sample_in_batches(field, noise, self.embeds, indices, options, BATCH_SIZE)

    def draw_held_out(self, field: VelocityField, who: str) -> Tensor:
        return self.draw(field, who, 2 * NUM_CAPTIONS, len(self.held_out))

    def teacher(self, *loras: tuple[Path, float]) -> Teacher:
        model, _ = project_teacher(str(TEACHER), loras=loras)
        return Teacher({"high": model}, self.pair.settings, self.negative)

    def right(self, latents: Tensor) -> float:
        """Return the share of pictures that show what the prompt says, in green."""
        own = self.pair.settings
        pictures = self.pair.vae.pictures(latents, own.latents_mean, own.latents_std)
        pairs = zip(pictures, map(in_green, self.held_out), strict=True)
        return sum(judge(picture, prompt)["correct"] for picture, prompt in pairs) / len(pictures)


def train_teacher_lora(bench: Bench, latents: Tensor, file: Path) -> None:
    """Train a LoRA of the teacher on latents (NUM_CAPTIONS, C, H, W) of the captions by flow matching, and write it for diffusers."""
    model = bench.teacher().experts["high"]
    add_lora(model, RANK, RANK)
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=LR, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = torch.randint(len(latents), (BATCH_SIZE,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        sigma = shift_sigma(torch.rand(BATCH_SIZE, generator=generator), bench.pair.settings.shift)
        mixed = torch.lerp(latents[rows], noise, sigma[:, None, None, None])
        velocity = model(mixed, sigma_to_timestep(sigma), *bench.embeds.batch(rows.tolist()))
        F.mse_loss(velocity, noise - latents[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    changes = {
        name: (up.detach(), down.detach()) for name, (up, down) in lora_changes(model, model.state_dict()).items()
    }
    write_lora(StudentLora(teacher_tensor_shapes(model.config), changes), file, "diffusers")


def measures(drawn: Tensor, before: Tensor, changed: Tensor, wanted: Tensor) -> dict[str, float]:
    """Compare what a student with the LoRA draws with what it drew before and with what the teacher with it draws."""
    change = (drawn - before).double().flatten(1)
    wanted = wanted.double().flatten(1)
    return {
        "cosine": float(F.cosine_similarity(change, wanted).mean()),
        "size": float((change.norm(dim=1) / wanted.norm(dim=1)).mean()),
        "closed": float(1 - (drawn - changed).square().sum() / (before - changed).square().sum()),
    }


def students(args: argparse.Namespace, file: Path) -> dict[str, list[Path]]:
    """Return the folders of students with the LoRA: by its cut alone, and by --train lora."""
    made: dict[str, list[Path]] = {"the cut alone": [], "--train lora": []}
    for seed in args.seeds:
        for name, length in (
            ("the cut alone", ["--max_steps", 1, "--lr", 1e-12]),
            ("--train lora", ["--teacher_calls", args.teacher_calls]),
        ):
            folder = args.output_dir / f"{name.split()[-1]}_{length[1]}_{seed}{''.join(args.flags)}"
            if name == "--train lora" or seed == args.seeds[0]:
                made[name].append(folder)
                if not (folder / "lora.safetensors").exists():
                    run(
                        "train_distillation.py", "--train", "lora", "--init_from", args.student, "--teacher_path", TEACHER,
                        "--teacher_lora", file, "--data_path", PROMPTS, "--batch_size", BATCH_SIZE, "--seed", seed, *length,
                        "--num_samples", 0, "--eval_every", 0, "--save_every", 0, "--output_dir", folder, *args.flags,
                    )  # fmt: skip
    return made


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    bench, file = Bench(args.student), args.output_dir / "teacher_lora.safetensors"
    teacher = bench.teacher()
    if not file.exists():
        train_teacher_lora(bench, bench.draw(teacher, "teacher", NUM_CAPTIONS, NUM_CAPTIONS), file)
    own = bench.draw_held_out(teacher, "teacher")
    changed = bench.draw_held_out(bench.teacher((file, 1.0)), "teacher")
    before = bench.draw_held_out(StudentField(WanLiteStudent.from_pretrained(args.student)), "student")
    print(
        "| drawn by | cosine of the change | its size, of the teacher's | error closed | right and green |\n|---|---|---|---|---|"
    )
    for name, latents in (("teacher", own), ("teacher with the LoRA", changed), ("student", before)):
        print(f"| {name} | | | | {bench.right(latents):.1%} |")
    rows: dict[str, list[dict]] = {}
    for name, folders in students(args, file).items():
        for folder in folders:
            drawn = bench.draw_held_out(StudentField(WanLiteStudent.from_pretrained(folder)), "student")
            row = measures(drawn, before, changed, changed - own) | {"right": bench.right(drawn)}
            rows.setdefault(name, []).append(row)
        cells = (spread([row[measure] for row in rows[name]], 2) for measure in MEASURES)
        print(f"| student, {name} | {' | '.join(cells)} |", flush=True)
    print(json.dumps({"teacher_calls": args.teacher_calls, "seeds": args.seeds, "rows": rows}))


if __name__ == "__main__":
    main()
