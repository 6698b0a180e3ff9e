"""Hold a student against its teacher on prompts it was not trained on: a table, evaluation.json, gallery.html.

    python evaluate_student.py --student outputs/demo --prompts_file data/demo_heldout_prompts.txt --num_prompts 100

Both draw from the same noise, with the recorded shift and the teacher's recorded guidance. Every measure is defined in
wandistiller/evaluation/measures.py.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller import __version__
from wandistiller.command_line import run_command
from wandistiller.errors import UserError
from wandistiller.files.output_folder import (
    COMPARISON_NAME,
    EVALUATION_NAME,
    FRONTIER_NAME,
    GALLERY_NAME,
    check_evaluation_is_ours,
    check_output_folder,
    prepare_output_folder,
)
from wandistiller.flags import PROMPT_PER, ComputeFlags, TeacherFlags, flag, group, number, parse_flags, path
from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import ImageSize
from wandistiller.prompts.prompts import load_prompts
from wandistiller.students.drawing import check_picture_size, embed_with_negative, student_sampling, teacher_sampling
from wandistiller.students.parts import (
    load_drawing_parts,
    open_recorded_teacher,
    recorded_settings,
    teacher_paths,
)
from wandistiller.students.record import StudentRecord, load_student_config, trained_sizes, weights_digest
from wandistiller.students.trained_prompts import count_trained_prompts

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    from wandistiller.evaluation.experiment import Drawn, Experiment
    from wandistiller.reports.gallery import Evaluated

STUDENT_STEPS = (1, 2, 4, 8)
MAX_COLUMNS = 8  # of teacher_vs_student.png; each is a prompt
SCORER_KINDS = ["clip", "siglip", "dino"]


def scorer(text: str) -> tuple[str, str]:
    """Read a scorer's kind and place, as an argparse type."""
    kind, _, location = text.partition("=")
    if kind not in SCORER_KINDS or not location.strip():
        raise argparse.ArgumentTypeError(
            f"{text!r} must be KIND=ID_OR_FOLDER, of the kinds {', '.join(SCORER_KINDS)}; such as clip=openai/clip-vit-large-patch14"
        )
    return kind, location


@dataclass(frozen=True, kw_only=True)
class PromptFlags:
    """What is drawn."""

    prompts_file: str = flag(
        "prompts that were not trained on: a text file with one a line, a table, a folder or a glob of these, or a folder of prompt "
        "templates (of which the held-out part is taken)",
        required=True,
        type=path,
    )
    caption_column: str | None = flag("column of tables that holds the prompts, where their names do not tell")
    prompt_per: str | None = flag(**PROMPT_PER)
    num_prompts: int = flag("how many of them, from the first", 32, type=number(int, low=1))
    frontier_prompts: int = flag(
        "how many of these are drawn in fewer steps too, by both; 0: none", 16, type=number(int, low=0)
    )
    prompt_cache: str = flag("folder that keeps prompt embeddings between runs", "outputs/prompt_cache", type=path)


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How it is drawn."""

    num_seeds: int = flag("pictures of each prompt", 2, type=number(int, low=1))
    seed: int = flag("of the first noise", 0, type=number(int, low=0, high=2**62))
    num_inference_steps: int | None = flag(
        "steps of the sampler (as recorded; a student of few steps keeps to its own)",
        type=number(int, low=1, high=1000),
    )
    student_steps: list[int] | None = flag(
        f"steps to draw the student in beside its own ({' '.join(map(str, STUDENT_STEPS))}; a student of few steps: none)",
        nargs="*",
        type=number(int, low=1, high=1000),
    )
    batch_size: int = flag("pictures drawn at once", 16, type=number(int, low=1))


@dataclass(frozen=True, kw_only=True)
class JudgingFlags:
    """Who looks at the pictures."""

    judge: str | None = flag(
        "FILE.py:FUNCTION of your own, run as code, that says which pictures are right: given pictures (N, H, W, 3) uint8 and N "
        'prompts, it returns N answers, each True, False or a dict of facts with "correct" (tools/demo_judge.py:judge_all)'
    )
    scorer: list[tuple[str, str]] | None = flag(
        "KIND=ID_OR_FOLDER, a model of transformers that scores the pictures; may be given once for each kind: "
        f"{', '.join(SCORER_KINDS)}",
        action="append",
        type=scorer,
    )


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of this command, as `--help` describes them."""

    student: str = flag("folder of a trained student (--output_dir of train_distillation.py)", required=True, type=path)
    output: str | None = flag(
        f"folder for {EVALUATION_NAME}, {GALLERY_NAME} and the pictures (the student's own)", type=path
    )
    teacher: TeacherFlags = group("Teacher (left out: as the student records)")
    prompts: PromptFlags = group("Prompts")
    sampling: SamplingFlags = group("Sampling")
    judging: JudgingFlags = group("Judge and scorers")
    compute: ComputeFlags = group("Performance")

    @property
    def folder(self) -> Path:
        """The folder that the results go to."""
        return Path(self.output or self.student)


def parse_args(argv: list[str] | None = None) -> Flags:
    flags = parse_flags(Flags, "evaluate_student.py", "Hold a student against its teacher on held-out prompts.", argv)
    kinds = [kind for kind, _ in flags.judging.scorer or []]
    if len(set(kinds)) < len(kinds):
        raise UserError("--scorer: one kind is given twice; give each of clip, siglip and dino once at most")
    return flags


def prepare(flags: Flags, config: StudentConfig, prompts: list[str], teacher: tuple[str, str | None]) -> "Experiment":
    """Load student and teacher and all that they draw with; every file is checked before a weight is read.

    Args:
        teacher: what `teacher_paths` found.
    """
    from wandistiller.device import pick_device, pick_dtype
    from wandistiller.evaluation.experiment import Experiment
    from wandistiller.evaluation.judges import load_judge
    from wandistiller.evaluation.measures import sample_plan
    from wandistiller.evaluation.scorers import load_scorer
    from wandistiller.model.transformer import WanLiteStudent
    from wandistiller.projection.project import project_experts
    from wandistiller.sampling.flow import seeded_noise
    from wandistiller.sampling.sampler import student_as_teacher
    from wandistiller.sampling.teacher import Teacher

    given, device = flags.teacher, pick_device(flags.compute.device)
    dtype = pick_dtype(flags.compute.dtype, device)
    settings = recorded_settings(config)
    wan_files = open_recorded_teacher(config, teacher, given)
    sizes = trained_sizes(config)
    for size in sizes:
        check_picture_size(size, config, wan_files.config.patch_size, ("the student's image_size",) * 2)
    judge = load_judge(flags.judging.judge, prompts) if flags.judging.judge else None
    parts = load_drawing_parts(config, teacher[0], given, device)

    # The text comes first, so that its encoder leaves memory before the models come:
    embeds, negative = embed_with_negative(prompts, settings, parts.encoder, config, flags.prompts.prompt_cache, device)
    # A student that learnt whole steps draws in these alone, whatever --num_inference_steps says:
    own_steps = StudentRecord.of(config).student_steps or flags.sampling.num_inference_steps
    prompt_indices, seeds = sample_plan(len(prompts), flags.sampling.num_seeds, flags.sampling.seed)
    return Experiment(
        student=student_as_teacher(WanLiteStudent.from_pretrained(flags.student, device), settings),
        teacher=Teacher(project_experts(wan_files, config.text_max_length, dtype, device), settings, negative),
        embeds=embeds,
        prompts=[prompts[index] for index in prompt_indices],
        prompt_indices=prompt_indices,
        seeds=seeds,
        noise=seeded_noise(seeds, settings.latent_shape(config, sizes[0])),
        teacher_options=teacher_sampling(config, flags.sampling.num_inference_steps, dtype, device),
        student_options=student_sampling(config, own_steps, dtype, device),
        settings=settings,
        vae=parts.vae,
        judge=judge,
        scorers=[load_scorer(kind, location) for kind, location in flags.judging.scorer or []],
        num_seeds=flags.sampling.num_seeds,
        batch_size=flags.sampling.batch_size,
    )


def describe(flags: Flags, config: StudentConfig, digest: str | None, experiment: "Experiment") -> dict[str, object]:
    """Return what evaluation.json says of how it was measured; `digest` is of the student's weights."""
    options, settings = experiment.teacher_options, experiment.settings
    return {
        "student": flags.student,
        "student_sha256": digest,
        "teacher": flags.teacher.teacher_path or StudentRecord.of(config).teacher_path,
        "prompts_file": flags.prompts.prompts_file,
        "num_prompts": len(experiment.embeds),
        "num_seeds": flags.sampling.num_seeds,
        "seed": flags.sampling.seed,
        "num_inference_steps": options.num_inference_steps,
        "student_steps": experiment.student_options.num_inference_steps,
        "shift": options.shift,
        "guidance_scale": settings.guidance_scale,
        "guidance_scale_2": settings.guidance_scale_2,
        "image_size": config.image_size,
        "image_sizes": [str(size) for size in trained_sizes(config)],
        "device": options.device,
        "dtype": str(options.compute_dtype).removeprefix("torch."),
        "wandistiller_version": __version__,
    }


def drawable_steps(config: StudentConfig, flags: SamplingFlags) -> list[int]:
    """Return the numbers of steps to draw the student in; one that learnt whole steps, or has levels of its own, keeps to its own."""
    record = StudentRecord.of(config)
    is_fixed = record.student_steps or record.teacher_sampler == "euler"
    default = [] if is_fixed else [steps for steps in STUDENT_STEPS if steps < record.steps]
    return default if flags.student_steps is None else flags.student_steps


def warn_of_trained(student: str, prompts: list[str]) -> int:
    """Count the prompts that the student was trained on, and print a warning where there are any: it may look better at these."""
    if num_trained := count_trained_prompts(student, prompts):
        print(
            f"Warning: {num_trained} of the {len(prompts)} prompts are prompts of the training, so this does not measure what the "
            "student draws from others; give --prompts_file prompts that it was not trained on"
        )
    return num_trained


def measure_all(
    flags: Flags, config: StudentConfig, experiment: "Experiment", sizes: list[ImageSize]
) -> "tuple[dict, list[list[Drawn]]]":
    """Return the results, and what the teacher and the student drew at each of `sizes`; costs and fewer steps are of the first."""
    from wandistiller.evaluation.experiment import measure, measure_cost
    from wandistiller.evaluation.frontier import measure_frontier
    from wandistiller.sampling.flow import seeded_noise

    by_size, drawn = {}, []
    for size in sizes:
        if len(sizes) > 1:
            print(f"At {size.width} x {size.height} pixels:")
        noise = seeded_noise(experiment.seeds, experiment.settings.latent_shape(config, size))
        by_size[str(size)], *of_both = measure(replace(experiment, noise=noise))
        drawn.append(of_both)
    results = by_size[str(sizes[0])] | {"cost": measure_cost(experiment)}
    if num_prompts := min(flags.prompts.frontier_prompts, len(experiment.embeds)):
        print(f"In fewer steps: {num_prompts} prompts", flush=True)
        few, seconds = experiment.first(num_prompts), results["cost"]["step_seconds"]
        teacher, student = (one.latents[: len(few.noise)] for one in drawn[0])
        results["frontier"] = measure_frontier(few, teacher, student, drawable_steps(config, flags.sampling), seconds)
    return results | ({"by_size": by_size} if len(sizes) > 1 else {}), drawn


def save_comparison(file: Path, experiment: "Experiment", drawn: "list[list[Drawn]]", sizes: list[ImageSize]) -> None:
    """Write the pictures of the first prompts, each from its first seed: the teacher's row above the student's, of each size.

    Args:
        drawn: what the teacher and the student drew at each of `sizes`.
    """
    from wandistiller.files.pictures import labelled_grid, save_png

    chosen = range(0, len(experiment.prompts), experiment.num_seeds)[:MAX_COLUMNS]
    rows = [[one.pictures[index] for index in chosen] for both in drawn for one in both]
    captions = [[experiment.prompts[index] for index in chosen], *([[""] * len(chosen)] * (len(rows) - 1))]
    ends = [f", {size}" for size in sizes] if len(sizes) > 1 else [""]
    names = [f"{who}{end}" for end in ends for who in ("teacher", "student")]
    options = experiment.teacher_options
    metadata = {"num_inference_steps": options.num_inference_steps, "shift": options.shift}
    save_png(labelled_grid(rows, captions, names), file, metadata)


def evaluated(
    about: dict,
    results: dict,
    prompts: list[str],
    experiment: "Experiment",
    drawn: "list[list[Drawn]]",
    sizes: list[ImageSize],
) -> "Evaluated":
    """Return what the gallery shows: the first size prompt by prompt, of the others the pictures."""
    from wandistiller.evaluation.experiment import measure_prompts
    from wandistiller.reports.gallery import Evaluated

    of_teacher, of_student = drawn[0]
    others = zip(sizes[1:], drawn[1:], strict=True)
    return Evaluated(
        about=about,
        results=results,
        prompts=prompts,
        measures=measure_prompts(of_student, of_teacher, experiment.num_seeds),
        seeds=experiment.seeds,
        teacher=of_teacher.pictures,
        student=of_student.pictures,
        other_sizes={str(size): (one.pictures, other.pictures) for size, (one, other) in others},
    )


def read_prompts(given: PromptFlags) -> list[str]:
    """Read the prompts to draw; what they were read as is printed."""
    file = load_prompts(
        given.prompts_file,
        given.caption_column,
        num_drawn=given.num_prompts,
        held_out=True,
        prompt_per=given.prompt_per,
    )
    if file.notice:
        print(f"{given.prompts_file}: {file.notice}")
    return list(file.prompts[: given.num_prompts])


def main(argv: list[str] | None = None) -> int:
    # What a person typed is checked before torch loads:
    flags = parse_args(argv)
    config = load_student_config(flags.student)
    prompts = read_prompts(flags.prompts)
    teacher = teacher_paths(config, flags.teacher)
    check_evaluation_is_ours(check_output_folder(flags.folder, "--output"), "--output")
    num_trained = warn_of_trained(flags.student, prompts)

    from wandistiller.evaluation.frontier import save_frontier_plot
    from wandistiller.files.atomic import write_json
    from wandistiller.reports.cards import try_to_write_model_card
    from wandistiller.reports.gallery import try_to_write_gallery
    from wandistiller.reports.tables import finite, table_lines

    digest = weights_digest(flags.student)  # before they are read, because a run may be writing new ones
    experiment = prepare(flags, config, prompts, teacher)
    folder = prepare_output_folder(flags.folder, "--output")

    about = describe(flags, config, digest, experiment) | {"num_trained_prompts": num_trained}

    # Measure:
    teacher_steps, student_steps = about["num_inference_steps"], about["student_steps"]
    print(
        f"{len(prompts)} prompts x {flags.sampling.num_seeds} seeds, teacher {teacher_steps} steps, student {student_steps}"
    )
    sizes = trained_sizes(config)
    results, drawn = measure_all(flags, config, experiment, sizes)
    print("\n".join(table_lines(results)))

    # Save the results last, because they name the student that the picture is of:
    if "frontier" in results:
        save_frontier_plot(results["frontier"], folder / FRONTIER_NAME)
    save_comparison(folder / COMPARISON_NAME, experiment, drawn, sizes)
    write_json(
        folder / EVALUATION_NAME, finite(about | results), end="\n", indent=2, ensure_ascii=False, allow_nan=False
    )
    shown = evaluated(about, results, prompts, experiment, drawn, sizes)
    gallery = try_to_write_gallery(folder, shown, Path(flags.student))

    # Tell:
    names = [EVALUATION_NAME, *([FRONTIER_NAME] if "frontier" in results else []), COMPARISON_NAME]
    print(f"Saved {', '.join(names)} in {folder}")
    if gallery:
        print(f"Every prompt, the worst first; open it in a browser: {gallery}")
    if folder.resolve() == Path(flags.student).resolve() and (card := try_to_write_model_card(folder)):
        print(f"The model card holds them: {card}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
