"""Distil a Wan text-to-video checkpoint into a small 2D image student, from a text file of prompts.

    python train_distillation.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --data_path data/static_prompts.txt \
        --output_dir ./outputs/wan_t2i --teacher_calls 4000 --batch_size 4

The demo, on a CPU in minutes and with no download, needs no flags:

    python train_distillation.py
"""

from wandistiller.command_line import end_process, run_command
from wandistiller.run.flags import Flags, one_for_each_lora, parse_args
from wandistiller.run.inputs import read_inputs


def main(argv: list[str] | None = None) -> int:
    """Read the flags and run; `argv` are the words after the script's name, those of this process by default."""
    codes = map(distil, one_for_each_lora(parse_args(argv)))
    return next(filter(None, codes), 0)  # an interrupted run is the last one


def distil(flags: Flags) -> int:
    """Take one run from its flags to a trained student; return the exit code."""
    # What a person typed is checked before torch loads:
    inputs = read_inputs(flags)

    from wandistiller.reports.cards import try_to_write_model_card
    from wandistiller.run import build, messages
    from wandistiller.run.dry_run import print_budget
    from wandistiller.run.folder import memory_advice, open_folder
    from wandistiller.run.learning import build_batches, open_caches
    from wandistiller.run.observers import watch
    from wandistiller.run.record import save_student
    from wandistiller.run.resolve import resolve
    from wandistiller.run.stages import Stages

    # Every refusal that needs no folder comes before anything is written or a weight is read:
    settings = resolve(flags, inputs)
    messages.print_settings(settings)
    with memory_advice(settings):
        if flags.output.dry_run:
            return print_budget(settings)
        caches = open_caches(settings)
        if settings.cache_part:
            build.fill_part(settings, caches)
            messages.print_filled(settings, caches)
            return 0
        with open_folder(settings) as folder:
            # The text encoder leaves memory before the teacher comes, and an offline teacher before the student does:
            embeds = build.embed_prompts(settings)
            teacher = build.load_teacher(settings, embeds, caches)
            student, projection = build.make_student(settings)
            objective = build.build_objective(settings)
            build.compile_and_shard(settings, student, teacher, objective)
            batches = build_batches(settings, caches, embeds.trained, teacher, projection)
            stages = Stages(settings, student, objective, batches, embeds.trained)
            del batches  # they leave memory with their stage
            folder = stages.resume(folder)
            with watch(settings, folder, embeds, teacher) as observer:
                with observer.shown():
                    result = stages.train(observer, folder)
                save_student(settings, folder.path, student, projection, stages.made(result), stages.student_steps)
                if not result.interrupted:
                    observer.draw_last(student, result.num_steps)
            if settings.processes.is_first:
                try_to_write_model_card(folder.path)
                calls = messages.calls_line(settings, stages.state.teacher_calls, result.num_steps, teacher)
                messages.print_end(settings, folder, result, calls)
    return 130 if result.interrupted else 0


if __name__ == "__main__":
    end_process(run_command(main, many_processes=True))
