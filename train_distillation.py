"""Distil a Wan text-to-video checkpoint into a small 2D image student, from a text file of prompts.

    python train_distillation.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --data_path data/static_prompts.txt \
        --output_dir ./outputs/wan_t2i --teacher_calls 4000 --batch_size 4

The demo, on a CPU in minutes and with no download, needs no flags:

    python train_distillation.py
"""

import sys

from wandistiller.command_line import end_process, run_command
from wandistiller.files.output_folder import check_output_folder
from wandistiller.model.config import StudentConfig
from wandistiller.prompts.prompts import TextPaths, read_texts
from wandistiller.run.config_help import print_config
from wandistiller.run.flags import Flags, check_is_here, parse_args


def main(argv: list[str] | None = None) -> int:
    """Read the flags and run; `argv` are the words after the script's name, those of this process by default."""
    command = sys.argv[1:] if argv is None else argv
    flags = parse_args(command)
    if flags.output.print_config:
        print_config(flags.output.print_config)
        return 0
    return distil(flags, command)


def distil(flags: Flags, command: list[str]) -> int:
    """Take one run from its flags to a trained student; return the exit code."""
    # What a person typed is checked before torch loads:
    check_is_here(flags, "student_config")
    config = StudentConfig.load(flags.student.student_config)
    check_is_here(flags, "data_path")
    paths = TextPaths(
        flags.data.data_path, flags.data.caption_column, flags.states.extra_prompts, flags.output.eval_prompts
    )
    texts = read_texts(paths, flags.output.eval_every != 0, flags.optimization.seed)
    check_is_here(flags, "teacher_path")
    check_output_folder(flags.output.output_dir)

    from wandistiller.reports.cards import try_to_write_model_card
    from wandistiller.run import build, messages
    from wandistiller.run.dry_run import print_budget
    from wandistiller.run.observers import watch
    from wandistiller.run.plan import make_plan
    from wandistiller.run.record import save_trained_student
    from wandistiller.run.run import memory_advice, open_builder, open_run
    from wandistiller.training.loop import train

    with messages.printed_log(flags.output.verbose):
        # Every refusal that needs no folder comes before anything is written or a weight is read:
        plan = make_plan(flags, config, texts)
        messages.print_plan(plan)
        if flags.output.dry_run:
            with memory_advice(plan):
                return print_budget(plan)
        if flags.states.cache_only:
            with open_builder(plan, command) as run:
                build.fill_only(run)
                messages.print_filled(run)
            return 0
        with open_run(plan, command) as run:
            # The text encoder leaves memory before the teacher comes, and an offline teacher before the student does:
            embeds = build.embed_prompts(run)
            teacher = build.load_teacher(run, embeds)
            student, projection = build.make_student(run)
            objective = build.build_objective(run, projection)
            build.compile_and_shard(run, student, teacher, objective)
            answers = build.build_answers(run, embeds, teacher, student, projection)
            run, saving = build.resume(run, student, objective, answers)
            with watch(run, embeds, teacher) as observer:
                with observer.shown():
                    options = run.training_options
                    result = train(student, answers, objective, options, observer, saving, run.processes)
                save_trained_student(run, student, projection, result, answers.num_calls)
                if not result.interrupted:
                    observer.draw_last(student, result.num_steps)
            if run.processes.is_first:
                try_to_write_model_card(run.folder)
                messages.print_end(run, result, answers.num_calls, teacher)
    return 130 if result.interrupted else 0


if __name__ == "__main__":
    end_process(run_command(main))
