"""Hold a student against its teacher on prompts it was not trained on: a table, evaluation.json, gallery.html.

    python evaluate_student.py --student outputs/demo --prompts_file data/demo_heldout_prompts.txt --num_prompts 100

Both draw from the same noise, with the recorded shift and the teacher's recorded guidance.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller import __version__
from wandistiller.command_line import run_command
from wandistiller.files.output_folder import (
    COMPARISON_NAME,
    EVALUATION_NAME,
    FRONTIER_NAME,
    GALLERY_NAME,
    check_evaluation_is_ours,
    check_output_folder,
    prepare_output_folder,
)
from wandistiller.flags import DrawingFlags, TextFlags, flag, group, number, parse_flags, path
from wandistiller.model.config import CONFIG_NAME, StudentConfig
from wandistiller.model.image_sizes import ImageSize
from wandistiller.prompts.prompts import prompts_to_draw
from wandistiller.students.drawing import check_picture_size
from wandistiller.students.record import StudentRecord, load_student_config, trained_sizes

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    from wandistiller.evaluation.experiment import Drawn, Experiment

STUDENT_STEPS = (1, 2, 4, 8)
ABOUT = "Hold a student against its teacher on held-out prompts."
MAX_COLUMNS = 8  # of teacher_vs_student.png; each is a prompt


@group()
class Flags(TextFlags, DrawingFlags):
    """The flags of this command, as `--help` describes them."""

    prompts_file: str = flag(
        "prompts that were not trained on: text file, table, folder or glob of these, or templates (their held-out part)",
        required=True,
        type=path,
    )
    num_prompts: int = flag("how many of them, from the first", 32, type=number(int, low=1))
    num_seeds: int = flag("pictures of each prompt", 2, type=number(int, low=1))
    frontier_prompts: int = flag("how many are drawn in fewer steps too; 0: none", 16, type=number(int, low=0))
    size: ImageSize | None = flag(
        "width and height in pixels, such as 640x384 (the first of those that the student was trained at)",
        type=ImageSize.parse,
    )
    batch_size: int = flag("pictures drawn at once", 16, type=number(int, low=1))
    output: str | None = flag(f"folder for {EVALUATION_NAME}, {GALLERY_NAME} and pictures (the student's)", type=path)
    judge: str | None = flag(
        "FILE.py:FUNCTION of your own, run as code, that rates pictures: given pictures (N, H, W, 3) uint8 and N prompts, it returns "
        'N answers, each True, False or a dict of facts and numbers, such as "correct" (tools/demo_judge.py:judge_all)'
    )


def prepare(flags: Flags, size: ImageSize, prompts: list[str]) -> "tuple[Experiment, dict]":
    """Load student and teacher and all that they draw with, and return what a prompt's embedding costs.

    Every file is checked before a weight is read.
    """
    from wandistiller.evaluation.cost import text_cost
    from wandistiller.evaluation.experiment import Experiment
    from wandistiller.evaluation.judges import load_judge
    from wandistiller.evaluation.measures import noise_seeds
    from wandistiller.evaluation.pair import Pair
    from wandistiller.sampling.flow import seeded_noise

    judge = load_judge(flags.judge, prompts) if flags.judge else None
    pair = Pair(flags.student, flags, flags, flags.prompt_cache)
    check_picture_size((size.height, size.width), pair.config, pair.teacher_files.config.patch_size, ("--size",) * 2)

    # The text comes first, so that its encoder leaves memory before the models come:
    embeds, negative = pair.embed(prompts)
    text = text_cost(pair.encoder, prompts[0], pair.config.text_max_length, pair.device)
    seeds = noise_seeds(len(prompts), flags.num_seeds, flags.seed)
    experiment = Experiment(
        # A student that learnt whole steps draws in these alone, whatever --num_inference_steps says:
        student=pair.artist("student", StudentRecord.of(pair.config).student_steps or flags.num_inference_steps),
        teacher=pair.artist("teacher", flags.num_inference_steps, negative=negative),
        prompts=prompts,
        embeds=embeds,
        seeds=seeds,
        noise=seeded_noise(seeds, pair.settings.latent_shape(pair.config, size)),
        judge=judge,
        num_seeds=flags.num_seeds,
        batch_size=flags.batch_size,
    )
    return experiment, text


def describe(flags: Flags, config: StudentConfig, size: ImageSize, experiment: "Experiment") -> dict[str, object]:
    """Return what evaluation.json says of how it was measured."""
    options, settings = experiment.teacher.options, experiment.teacher.settings
    return {
        "student": flags.student,
        "teacher": flags.teacher_path or StudentRecord.of(config).teacher_path,
        "prompts_file": flags.prompts_file,
        "num_prompts": len(experiment.prompts),
        "num_seeds": experiment.num_seeds,
        "seed": flags.seed,
        "num_inference_steps": options.num_inference_steps,
        "student_steps": experiment.student.options.num_inference_steps,
        "shift": options.shift,
        "guidance_scale": settings.guidance_scale,
        "guidance_scale_2": settings.guidance_scale_2,
        "image_size": str(size),
        "device": options.device,
        "dtype": str(options.compute_dtype).removeprefix("torch."),
        "wandistiller_version": __version__,
    }


def measure_all(
    flags: Flags, config: StudentConfig, experiment: "Experiment", text: dict
) -> "tuple[dict, Drawn, Drawn]":
    """Return the results, what the teacher drew and what the student drew; `text` is what a prompt's embedding costs."""
    from wandistiller.evaluation.cost import measure_cost, measure_picture
    from wandistiller.evaluation.experiment import measure
    from wandistiller.evaluation.frontier import measure_frontier

    results, teacher, student = measure(experiment)
    results["cost"] = measure_cost(experiment)
    results["picture"] = measure_picture(experiment, text, results["cost"]["step_seconds"])
    if num_prompts := min(flags.frontier_prompts, len(experiment.prompts)):
        print(f"In fewer steps: {num_prompts} prompts", flush=True)
        few, seconds = experiment.first(num_prompts), results["cost"]["step_seconds"]
        full, own = (one.latents[: len(few.noise)] for one in (teacher, student))
        record = StudentRecord.of(config)
        most = flags.num_inference_steps or record.num_inference_steps
        beside = [] if record.fixed_steps else [*(steps for steps in STUDENT_STEPS if steps < most), most]
        results["frontier"] = measure_frontier(few, full, own, beside, seconds)
    return results, teacher, student


def save_comparison(file: Path, experiment: "Experiment", teacher: "Drawn", student: "Drawn") -> None:
    """Write the pictures of the first prompts, each from its first seed: the teacher's row above the student's."""
    from wandistiller.files.pictures import labelled_grid, save_png

    chosen = range(0, len(teacher.pictures), experiment.num_seeds)[:MAX_COLUMNS]
    rows = {name: [one.pictures[at] for at in chosen] for name, one in (("teacher", teacher), ("student", student))}
    options = experiment.teacher.options
    metadata = {"num_inference_steps": options.num_inference_steps, "shift": options.shift}
    save_png(labelled_grid(rows, experiment.prompts[: len(chosen)]), file, metadata)


def recommend(folder: Path, steps: int | None) -> None:
    """Record in how many steps the student is to be drawn, unless it is fixed to its own."""
    from wandistiller.files.atomic import write_text

    config = StudentConfig.load(folder)
    if StudentRecord.of(config).fixed_steps or steps in (None, StudentRecord.of(config).steps):
        return
    recommended = (config.distillation or {}) | {"recommended_steps": steps}
    write_text(folder / CONFIG_NAME, config.replace(distillation=recommended).to_json())
    print(f"Recorded in {folder / CONFIG_NAME}: {steps} steps are enough, and drawing takes them from now on")


def main(argv: list[str] | None = None) -> int:
    # What a person typed is checked before torch loads:
    flags: Flags = parse_flags(Flags, "evaluate_student.py", ABOUT, argv)
    config = load_student_config(flags.student)
    size = flags.size or trained_sizes(config)[0]
    prompts = prompts_to_draw(flags.prompts_file, flags.num_prompts, flags)
    folder = check_output_folder(flags.output or flags.student, "--output")
    check_evaluation_is_ours(folder, "--output")

    from wandistiller.evaluation.experiment import measure_prompts
    from wandistiller.files.atomic import write_json, write_text
    from wandistiller.reports.gallery import gallery_page
    from wandistiller.reports.plots import save_frontier
    from wandistiller.reports.tables import finite, report_lines, worst_prompts

    experiment, text = prepare(flags, size, prompts)
    prepare_output_folder(folder, "--output")

    # Measure:
    measured, teacher, student = measure_all(flags, config, experiment, text)
    results = describe(flags, config, size, experiment) | measured
    by_prompt = measure_prompts(student, teacher, experiment.num_seeds)
    results["worst_prompts"] = worst_prompts(prompts, [one.distance for one in by_prompt])
    print("\n".join(report_lines(results)))

    # Save the results:
    if "frontier" in results:
        save_frontier(results["frontier"], folder / FRONTIER_NAME)
    save_comparison(folder / COMPARISON_NAME, experiment, teacher, student)
    write_json(folder / EVALUATION_NAME, finite(results), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / GALLERY_NAME, gallery_page(results, experiment, by_prompt, teacher, student))

    # Tell:
    names = [EVALUATION_NAME, COMPARISON_NAME, *([FRONTIER_NAME] if "frontier" in results else [])]
    print(f"Saved {', '.join(names)} in {folder}")
    print(f"Every prompt, the worst first; open it in a browser: {folder / GALLERY_NAME}")
    # What is near the teacher in fewer steps than all of its own is not yet near the teacher.
    in_all = flags.num_inference_steps in (None, StudentRecord.of(config).num_inference_steps)
    if in_all and "frontier" in results and folder.resolve() == Path(flags.student).resolve():
        recommend(folder, results["frontier"]["recommended_steps"])
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
