"""Distil Wan's text encoder, UMT5-XXL, into a small one with the same tokenizer, from prompts alone.

    python distill_text_encoder.py --teacher_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --data_path data/prompt_templates --text_encoder_config config/text_encoder_small.json \
        --output_dir outputs/small_text_encoder --student outputs/wan_t2i

The folder then serves as --text_encoder_path of every other command, and `export_student.py --format pipeline` makes a whole pipeline
with it. Ctrl-C saves and exits, and the same command resumes.
"""

from dataclasses import dataclass

from wandistiller.command_line import end_process, run_command
from wandistiller.files.clone import DEMO_TEACHER
from wandistiller.flags import PROMPT_PER, ComputeFlags, flag, group, number, parse_flags, path, switch

COUNT, COUNT_OR_0 = number(int, low=1), number(int, low=0)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of this command, as `--help` describes them."""

    teacher_path: str = flag("where the text encoder and its tokenizer are", DEMO_TEACHER, type=path)
    text_encoder_config: str = flag("shape of the small encoder", "config/demo_text_encoder.json", type=path)
    student: str | None = flag(
        "folder of a student whose cross-attention reads the embeddings; its errors count too", type=path
    )
    data_path: str = flag(
        "prompts: text file, table, folder or glob of these, or templates", "data/demo_prompts.txt", type=path
    )
    caption_column: str | None = flag("column of tables with the prompts")
    prompt_per: str | None = flag(**PROMPT_PER)
    num_prompts: int | None = flag("different prompts to draw", type=number(int, low=1, high=2**20))
    eval_prompts: str | None = flag("file of held-out prompts", type=path)
    prompt_cache: str = flag("folder that keeps prompt embeddings between runs", "outputs/prompt_cache", type=path)
    output_dir: str = flag("folder for the small encoder", "outputs/demo_text_encoder", type=path)
    max_steps: int = flag("optimizer steps of the run", 4000, type=COUNT)
    batch_size: int = flag("prompts per process and step", 16, type=COUNT)
    lr: float | None = flag(
        "peak learning rate (left out: by the encoder's width)", type=number(float, above=0, high=1e9)
    )
    seed: int = flag("seed of the order of prompts", 0, type=number(int, low=0, high=2**63 - 1))
    eval_every: int = flag("steps between measurements of the held-out error; 0: none", 500, type=COUNT_OR_0)
    save_every: int = flag("steps between checkpoints; 0: none", 500, type=COUNT_OR_0)
    keep_checkpoints: int = flag("number of newest checkpoints to keep", 2, type=COUNT)
    overwrite: bool = switch("start anew where the output folder holds checkpoints; what is there is kept beside")
    dry_run: bool = switch("check everything and print the sizes; write nothing")
    compute: ComputeFlags = group("Performance")


def main(argv: list[str] | None = None) -> int:
    """Read the flags and run; `argv` are the words after the script's name, those of this process by default."""
    what = "Distil Wan's text encoder into a small one, from prompts alone."
    flags = parse_flags(Flags, "distill_text_encoder.py", what, argv)

    from wandistiller.prompts.prompts import read_prompts

    prompts = read_prompts(
        flags.data_path,
        flags.caption_column,
        num_prompts=flags.num_prompts,
        seed=flags.seed,
        eval_prompts=flags.eval_prompts if flags.eval_every else None,
        prompt_per=flags.prompt_per,
    )

    from wandistiller.run.text_encoder import distil_text_encoder, print_plan, resolve

    settings = resolve(flags, prompts)
    print_plan(settings)
    return 0 if flags.dry_run else distil_text_encoder(settings)


if __name__ == "__main__":
    end_process(run_command(main, many_processes=True))
