"""Distil a Wan text-to-video checkpoint into a small 2D image student, from a text file of prompts.

    python train_distillation.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --data_path data/static_prompts.txt \
        --output_dir ./outputs/wan_t2i --teacher_calls 4000 --batch_size 4

The demo, on a CPU in minutes and with no download, needs no flags:

    python train_distillation.py
"""

from pathlib import Path

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

    from wandistiller.run import build, messages
    from wandistiller.run.dry_run import check_disk, print_budget
    from wandistiller.run.folder import memory_advice, open_folder, run_identity
    from wandistiller.run.learning import open_caches
    from wandistiller.run.observers import watch
    from wandistiller.run.resolve import resolve
    from wandistiller.run.stages import build_run

    # Every refusal that needs no folder comes before anything is written or a weight is read:
    settings = resolve(flags, inputs)
    messages.print_settings(settings)
    with memory_advice(settings):
        if flags.dry_run:
            return print_budget(settings)
        caches = open_caches(settings)
        if settings.cache_part:
            build.load_teacher(settings, build.embed_prompts(settings), caches)
            messages.print_filled(settings, caches)
            return 0
        with open_folder(settings, run_identity(settings)) as checkpoints:
            check_disk(settings)
            run, folder = build_run(settings, caches), Path(settings.output_dir)
            run.resume(checkpoints.resume_from)
            with watch(settings, checkpoints, run.embeds, run.teacher) as observer:
                with observer.shown():
                    result = run.train(observer, checkpoints)
                run.save(folder=folder)
                if not result.interrupted:
                    observer.draw_last(run.student, result.num_steps)
            if settings.processes.is_first:
                messages.print_end(run, folder, result)
    return 130 if result.interrupted else 0


if __name__ == "__main__":
    end_process(run_command(main, many_processes=True))
