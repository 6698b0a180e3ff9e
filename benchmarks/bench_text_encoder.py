"""What a student loses with a small text encoder: of what it draws right with the full one, how much stays right.

    python benchmarks/bench_text_encoder.py --students outputs/demo outputs/icons --write

For every student encoders of two sizes are distilled from its teacher's by `distill_text_encoder.py --student`, with each seed, and one
from the prompts that lack some words, for prompts that have them. The motions of the demo's world are new in any case: the teacher knows
them from clips. The teacher, which keeps the full encoder, and the student with either draw held-out prompts from the same noises. An
encoder that --output_dir holds is not made again. Prints a table in Markdown, mean and largest distance from it over the seeds, and as its
last line one JSON document; --write puts the table into docs/measurements.md.
"""

import argparse
import json
import os
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.bench_recipe import PAGE, Setting, open_setting, run, spread
from benchmarks.pages import write_section
from benchmarks.shapes import markdown
from tools.demo_judge import SHAPES
from wandistiller.evaluation.experiment import Experiment
from wandistiller.evaluation.judges import load_judge
from wandistiller.evaluation.measures import endpoint_error, noise_seeds
from wandistiller.evaluation.pair import Pair
from wandistiller.flags import ComputeFlags, TeacherFlags
from wandistiller.prompts.prompts import load_prompts
from wandistiller.sampling.flow import seeded_noise
from wandistiller.students.parts import teacher_paths
from wandistiller.students.record import load_student_config
from wandistiller.wan.small_umt5 import num_parameters
from wandistiller.wan.text_encoder import embed_texts
from wandistiller.wan.text_encoder_files import find_text_encoder

QUARTER = {"d_model": 64, "d_ff": 160, "num_layers": 2, "num_heads": 3}  # of the toy teachers' parameters, or near it
TENTH = {"d_model": 48, "d_ff": 64, "num_layers": 2, "num_heads": 2}
WORDS = re.compile(r"\b(purple|ring|guitar|crown|carrot|bus|penguin|key)\b")  # that some encoders never see
MOTIONS = {"left": "up", "right": "down", "top": "down", "bottom": "up", "center": "left", "middle": "right"}
THING = re.compile(rf"\b(?:{'|'.join(SHAPES)}) (?:on|in|at) the (\w+)")
HEADER = ["student, prompts", "text encoder", "right", "of what was right stays right", "endpoint", "grows by"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--students", nargs="+", required=True, help="folders of students of the toy teachers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_noises", type=int, default=2, help="noises of each held-out prompt")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "bench_text_encoder")
    parser.add_argument("--write", action="store_true", help="put the table into docs/measurements.md")
    parser.add_argument("flags", nargs="*", help="more flags of distill_text_encoder.py, after --")
    return parser.parse_args()


def in_motion(prompts: list[str]) -> list[str]:
    """Return the prompts that place one thing of the demo's world, which moves."""
    found = [(prompt, list(THING.finditer(prompt))) for prompt in prompts]
    return [THING.sub(rf"\g<0> moving {MOTIONS[things[0][1]]}", each) for each, things in found if len(things) == 1]


class Bench:
    """What a student and its teacher draw of prompts with the full encoder, and what another encoder changes."""

    def __init__(self, pair: Pair, judge: str, prompts: list[str], num_noises: int):
        seeds = noise_seeds(len(prompts), num_noises, 0)
        embeds, negative = pair.embed(prompts)
        self.pair = pair
        self.experiment = Experiment(
            student=pair.artist("student"), teacher=pair.artist("teacher", negative=negative), prompts=prompts,
            embeds=embeds, noise=seeded_noise(seeds, pair.settings.latent_shape(pair.config)), seeds=seeds,
            judge=load_judge(judge, prompts), num_seeds=num_noises, batch_size=64,
        )  # fmt: skip
        teacher, student = self.experiment.teacher, self.experiment.student
        self.teacher = self.experiment.draw("teacher", teacher.field, teacher.options)
        self.full = self.experiment.draw("student", student.field, student.options)
        self.endpoint = endpoint_error(self.full.latents, self.teacher.latents)

    def row(self, folder: Path) -> dict[str, float]:
        """Return the measures of the student with the encoder of a folder."""
        own, pair, encoder = self.experiment, self.pair, find_text_encoder(folder)
        embeds = embed_texts(own.prompts, encoder, pair.config, pair.prompt_cache, pair.device)
        drawn = replace(own, embeds=embeds).draw(folder.name, own.student.field, own.student.options)
        verdicts = zip(drawn.verdicts or [], self.full.verdicts or [], strict=True)
        endpoint = endpoint_error(drawn.latents, self.teacher.latents)
        return {
            "right": drawn.right or 0.0,
            "stays": statistics.fmean(ours["correct"] for ours, full in verdicts if full["correct"]),
            "endpoint": endpoint,
            "growth": endpoint / self.endpoint - 1,
        }


def distilled(setting: Setting, student: str, name: str, shape: dict, seed: int, args: argparse.Namespace) -> Path:
    """Distil an encoder, unless its folder holds it, and return the folder."""
    folder, texts = args.output_dir / f"{setting.name}_{name}_{seed}", [setting.prompts]
    if (folder / "model.safetensors").exists():
        return folder
    config = args.output_dir / f"{name}.json"
    config.write_text(json.dumps(shape), encoding="utf-8")
    if name == "without_words":
        kept = [prompt for prompt in load_prompts(setting.prompts).prompts if not WORDS.search(prompt)]
        texts = [args.output_dir / f"{setting.name}_without_words.txt"]
        texts[0].write_text("\n".join(kept), encoding="utf-8")
    run(
        "distill_text_encoder.py", "--teacher_path", setting.teacher, "--student", student, "--data_path", *texts,
        "--text_encoder_config", config, "--seed", seed, "--eval_every", 0, "--output_dir", folder, *args.flags,
    )  # fmt: skip
    return folder


def measure(student: str, args: argparse.Namespace) -> list[list[str]]:
    """Return the lines of the table for a student."""
    config = load_student_config(student)
    teacher, _ = teacher_paths(config, TeacherFlags())
    setting, full = open_setting(teacher, student), find_text_encoder(teacher).umt5
    os.environ["ICON_TEACHER"] = teacher  # tools/icon_judge.py finds its pictographs by this
    held_out = list(load_prompts(setting.heldout_prompts).prompts)
    both = {"quarter": QUARTER, "tenth": TENTH}
    kinds = [
        ("held-out", held_out, both),
        ("of motions, new to the encoder", in_motion(held_out), both),
        ("of words new to the encoder", list(filter(WORDS.search, held_out)), {"without_words": QUARTER}),
    ]
    pair = Pair(student, TeacherFlags(), ComputeFlags(device="cpu"), str(args.output_dir / "prompt_cache"))
    lines = []
    for kind, prompts, shapes in kinds:
        if not prompts:
            continue
        bench, title = Bench(pair, setting.judge, prompts, args.num_noises), f"{setting.name}, {len(prompts)} {kind}"
        lines.append([title, "full", f"{100 * (bench.full.right or 0):.1f} %", "", f"{bench.endpoint:.3f}", ""])
        for name, shape in shapes.items():
            rows = [bench.row(distilled(setting, student, name, shape, seed, args)) for seed in args.seeds]
            part = f"{num_parameters(full.shape | shape) / full.num_parameters:.1%}"
            right, stays, growth = (
                spread([100 * row[key] for row in rows], 1) + " %" for key in ("right", "stays", "growth")
            )
            lines.append([title, part, right, stays, spread([row["endpoint"] for row in rows], 3), growth])
    return lines


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lines = [line for student in args.students for line in measure(student, args)]
    print(markdown(HEADER, lines))
    if args.write:
        write_section(PAGE, "bench_text_encoder", markdown(HEADER, lines))
    print(json.dumps([dict(zip(HEADER, line, strict=True)) for line in lines]))


if __name__ == "__main__":
    main()
