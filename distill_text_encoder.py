"""Distil Wan's text encoder, UMT5-XXL, into a small one with the same tokenizer, from prompts alone.

    python distill_text_encoder.py --teacher_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --data_path data/prompt_templates --text_encoder_config config/text_encoder_small.json \
        --output_dir outputs/small_text_encoder --student outputs/wan_t2i

The folder then serves as --text_encoder_path of every other command, and `export_student.py --format pipeline` makes a whole pipeline
with it. Ctrl-C saves and exits, and the same command resumes.
"""

from wandistiller.command_line import end_process, run_command
from wandistiller.flags import parse_flags
from wandistiller.run.flags import EncoderFlags
from wandistiller.run.inputs import read_run_prompts


def main(argv: list[str] | None = None) -> int:
    """Read the flags and run; `argv` are the words after the script's name, those of this process by default."""
    what = "Distil Wan's text encoder into a small one, from prompts alone."
    flags = parse_flags(EncoderFlags, "distill_text_encoder.py", what, argv)
    prompts = read_run_prompts(flags, measures=flags.eval_every != 0)

    from wandistiller.run.text_encoder import distil_text_encoder, print_plan, resolve

    settings = resolve(flags, prompts)
    print_plan(settings)
    return 0 if flags.dry_run else distil_text_encoder(settings)


if __name__ == "__main__":
    end_process(run_command(main, many_processes=True))
