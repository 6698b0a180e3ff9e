"""What a student loses with a small text encoder: of what it draws right with the full one, how much stays right.

    python benchmarks/bench_text_encoder.py --students outputs/demo outputs/icons --write -- --max_steps 2000

For every student encoders of two sizes are distilled by `distill_text_encoder.py --student`, and one from the prompts that lack some
words, for prompts that have them. The motions of the demo's world are new in any case: its teacher knows them from clips. The teacher,
which keeps the full encoder, and the student with either draw held-out prompts from the same noises. An encoder that --output_dir holds is
not made again. Prints a table in Markdown, mean and largest distance from it over the seeds, and as its last line one JSON document.
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

from benchmarks.bench_recipe import PAGE, open_setting, run, spread
from benchmarks.pages import write_section
from benchmarks.shapes import markdown
from tools.demo_judge import SHAPES
from wandistiller.evaluation.experiment import Drawn, Experiment
from wandistiller.evaluation.judges import load_judge
from wandistiller.evaluation.measures import endpoint_error, noise_seeds
from wandistiller.evaluation.pair import Pair
from wandistiller.flags import ComputeFlags, TeacherFlags
from wandistiller.prompts.prompts import load_prompts
from wandistiller.sampling.flow import seeded_noise
from wandistiller.wan.small_umt5 import num_parameters
from wandistiller.wan.text_encoder import embed_texts
from wandistiller.wan.text_encoder_files import find_text_encoder

QUARTER = {"d_model": 80, "d_ff": 64, "num_layers": 2, "num_heads": 4}  # of the toy teachers' parameters, or near it
TENTH = {"d_model": 48, "d_ff": 64, "num_layers": 2, "num_heads": 2}
BOTH, WITHOUT = {"quarter": QUARTER, "tenth": TENTH}, {"without_words": QUARTER}
WORDS = re.compile(r"\b(purple|ring|guitar|crown|carrot|bus|penguin|key)\b")  # that an encoder never sees
MOTIONS = {"left": "up", "right": "down", "top": "down", "bottom": "up", "center": "left", "middle": "right"}
THING = re.compile(rf"\b(?:{'|'.join(SHAPES)}) (?:on|in|at) the (\w+)")
HEADER = ["student, prompts", "text encoder", "% right", "% of these stay right", "endpoint", "grows by %"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--students", nargs="+", required=True, help="folders of students of the toy teachers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_pictures", type=int, default=300, help="about as many of each kind of prompts")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "bench_text_encoder")
    parser.add_argument("--write", action="store_true", help="put the table into docs/measurements.md")
    parser.add_argument("flags", nargs="*", help="more flags of distill_text_encoder.py, after --")
    return parser.parse_args()


def in_motion(prompts: list[str]) -> list[str]:
    """Return the prompts that place one thing of the demo's world, which moves."""
    found = [(prompt, list(THING.finditer(prompt))) for prompt in prompts]
    return [THING.sub(rf"\g<0> moving {MOTIONS[things[0][1]]}", each) for each, things in found if len(things) == 1]


def distilled(name: str, shape: dict, seed: int, pair: Pair, args: argparse.Namespace) -> Path:
    """Distil an encoder, unless its folder holds it, and return the folder."""
    setting = open_setting(pair.teacher_files.location, pair.folder)
    folder, config, data = (args.output_dir / f"{setting.name}_{name}{end}" for end in (f"_{seed}", ".json", ".txt"))
    if not (folder / "model.safetensors").exists():
        prompts = load_prompts(setting.prompts).prompts
        lines = [each for each in prompts if name != "without_words" or not WORDS.search(each)]
        data.write_text("\n".join(lines), encoding="utf-8")
        config.write_text(json.dumps(shape), encoding="utf-8")
        run(
            "distill_text_encoder.py", "--teacher_path", setting.teacher, "--student", pair.folder, "--data_path", data, "--seed", seed,
            "--text_encoder_config", config, "--eval_every", 0, "--output_dir", folder, *args.flags,
        )  # fmt: skip
    return folder


def measures(drawn: Drawn, full: Drawn, teacher: Drawn) -> dict[str, float]:
    """Hold what a student drew with a small encoder against what it draws with the full one, and what the teacher draws."""
    verdicts = zip(drawn.verdicts or [], full.verdicts or [], strict=True)
    error, before = (endpoint_error(one.latents, teacher.latents) for one in (drawn, full))
    stays = statistics.fmean(ours["correct"] for ours, theirs in verdicts if theirs["correct"])
    return {"right": drawn.right or 0.0, "stays": stays, "endpoint": error, "growth": error / before - 1}


def measure(kind: str, prompts: list[str], shapes: dict, pair: Pair, args: argparse.Namespace) -> list[list[str]]:
    """Return the lines of the table for a student's prompts of one kind."""
    setting, encoder = open_setting(pair.teacher_files.location, pair.folder), pair.encoder.umt5
    num_noises = max(1, args.num_pictures // len(prompts))
    seeds, (embeds, negative) = noise_seeds(len(prompts), num_noises, 0), pair.embed(prompts)
    both = Experiment(
        student=pair.artist("student"), teacher=pair.artist("teacher", negative=negative), prompts=prompts,
        embeds=embeds, noise=seeded_noise(seeds, pair.settings.latent_shape(pair.config)), seeds=seeds,
        judge=load_judge(setting.judge, prompts), num_seeds=num_noises, batch_size=64,
    )  # fmt: skip
    own, theirs = both.student, both.teacher
    teacher, full = both.draw("teacher", theirs.field, theirs.options), both.draw("student", own.field, own.options)
    title, error = f"{setting.name}, {len(prompts)} {kind}", endpoint_error(full.latents, teacher.latents)
    lines = [[title, "full", f"{100 * (full.right or 0):.1f}", "", f"{error:.3f}", ""]]
    for name, shape in shapes.items():
        rows = []
        for seed in args.seeds:
            small = find_text_encoder(distilled(name, shape, seed, pair, args))
            text = embed_texts(prompts, small, pair.config, pair.prompt_cache, pair.device)
            student = replace(both, embeds=text).draw(name, own.field, own.options)
            rows.append(measures(student, full, teacher))
        part = f"{num_parameters(encoder.shape | shape) / encoder.num_parameters:.1%}"
        right, stays, growth = (spread([100 * row[key] for row in rows], 1) for key in ("right", "stays", "growth"))
        lines.append(["", part, right, stays, spread([row["endpoint"] for row in rows], 3), growth])
    return lines


def main() -> None:
    args, lines = parse_args(), []
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for student in args.students:
        pair = Pair(student, TeacherFlags(), ComputeFlags(device="cpu"), str(args.output_dir / "prompt_cache"))
        setting = open_setting(pair.teacher_files.location, student)
        os.environ["ICON_TEACHER"] = setting.teacher  # tools/icon_judge.py finds its pictographs by this
        held_out = list(load_prompts(setting.heldout_prompts).prompts)
        lines += measure("held-out", held_out, BOTH, pair, args)
        if motions := in_motion(held_out):
            lines += measure("with motions, new to the encoder", motions, BOTH, pair, args)
        lines += measure("with words it never saw", list(filter(WORDS.search, held_out)), WITHOUT, pair, args)
    print(markdown(HEADER, lines))
    if args.write:
        write_section(PAGE, "bench_text_encoder", markdown(HEADER, lines))
    print(json.dumps([dict(zip(HEADER, line, strict=True)) for line in lines]))


if __name__ == "__main__":
    main()
