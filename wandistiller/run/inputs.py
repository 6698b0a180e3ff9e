"""What a run reads before torch loads: the student's config and the prompts; and flags that contradict each other. Standard library only."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from wandistiller.command_line import torchrun_environment
from wandistiller.errors import UserError, shown
from wandistiller.files.clone import check_is_in_clone, ready_config
from wandistiller.files.output_folder import check_output_folder
from wandistiller.model.config import StudentConfig
from wandistiller.prompts.prompts import Prompts, load_prompts, read_prompts, unusable
from wandistiller.run.flags import MAX_SAMPLES, Flags, PromptFlags

NAME_OF_A_FILE = re.compile(r"\S+\.(txt|csv|tsv|jsonl?|parquet|ya?ml)")


@dataclass(frozen=True)
class Inputs:
    """The student's config and the prompts of a run; `sample_prompts` are those of its pictures."""

    config: StudentConfig
    prompts: Prompts
    sample_prompts: list[str]


def read_inputs(flags: Flags) -> Inputs:
    """Check the flags and read what needs no torch, in the order in which a person would look for a mistake."""
    for name, message in mistakes(flags):
        raise UserError(f"--{name}: {message}")
    check_is_in_clone({"data_path": flags.data_path, "teacher_path": flags.teacher_path})
    config = StudentConfig.load(ready_config(flags.student_config)).replace(distillation=None)  # of another run
    prompts = read_run_prompts(flags, measures=flags.eval_every != 0 or flags.num_samples != 0)
    check_output_folder(flags.output_dir)
    return Inputs(config, prompts, read_sample_prompts(flags) or prompts.held_out[: flags.num_samples])


def read_run_prompts(flags: PromptFlags, measures: bool) -> Prompts:
    """Read the prompts that the flags of a run name; those of --eval_prompts where something is measured or drawn."""
    return read_prompts(
        flags.data_path,
        flags.caption_column,
        num_prompts=flags.num_prompts,
        seed=flags.seed,
        eval_prompts=flags.eval_prompts if measures else None,
        prompt_per=flags.prompt_per,
    )


def read_sample_prompts(flags: Flags) -> list[str]:
    """Return the prompts of --sample_prompts: of its files, and what is no file."""
    found: list[str] = []
    for text in flags.sample_prompts or []:
        if os.path.exists(text):
            found += load_prompts(text, num_drawn=MAX_SAMPLES).prompts
        elif reason := "is no file here" if NAME_OF_A_FILE.fullmatch(text) else unusable(text):
            raise UserError(f"--sample_prompts {shown(text)}: {reason}; write prompts in quotes, or files of prompts")
        else:
            found.append(text)
    if len(found) > MAX_SAMPLES:
        raise UserError(f"--sample_prompts: are {len(found)} prompts; allowed: at most {MAX_SAMPLES}")
    return found


# A flag, the flag that it does not go without, and why
NEEDS = (
    ("assume_gpu", "dry_run", "plans for a GPU that is not here; it goes with --dry_run"),
    ("offline_teacher", "teacher_cache", "the teacher's answers must come from somewhere; add --teacher_cache FOLDER"),
    ("cache_part", "teacher_cache", "is a part of the teacher's answers on disk; add --teacher_cache FOLDER"),
)
# A flag to change, the flag that it does not go together with, and why
EXCLUDES = (
    ("teacher_sampler", "teacher_levels", "teachers of --teacher_levels noise anew; leave it out"),
    ("eval_every", "offline_teacher", "measures by the teacher, which is not in memory; leave one of the two out"),
    ("cache_part", "dry_run", "fills a cache, and --dry_run plans the whole run; leave one of the two out"),
    ("feature_loss_weight", "teacher_cache", "needs hidden states, which --teacher_cache does not keep; leave it out"),
)


def mistakes(flags: Flags) -> Iterator[tuple[str, str]]:
    """Yield the flag to change and why, for each contradiction."""
    is_on = {name: any(value) if isinstance(value, list) else bool(value) for name, value in vars(flags).items()}
    yield from ((flag, why) for flag, other, why in NEEDS if is_on[flag] and not is_on[other])
    yield from ((flag, why) for flag, other, why in EXCLUDES if is_on[flag] and is_on[other])
    low, high = flags.sigma_range or (0.0, 1.0)
    if low >= high:
        yield "sigma_range", f"LOW {low} must be below HIGH {high}"
    elif high != 1.0:
        yield "sigma_range", "a sampling path begins at sigma 1, so HIGH must be 1"
    if flags.student_steps and low > 0:
        yield "sigma_range", "does not go together with --student_steps: few steps take all noise levels"
    for name in ("lora_rank", "lora_alpha"):
        if is_on[name] and flags.train != "lora":
            yield name, "is for --train lora; add that, or leave it out"
    if flags.train == "lora" and flags.init_from in ("teacher", "random"):
        yield "train", "lora needs a student that is trained already; give its folder as --init_from"
    if flags.train == "lora" and flags.teacher_cache:
        yield "teacher_cache", "does not go together with --train lora; leave it out"
    if os.path.realpath(flags.init_from) == os.path.realpath(flags.output_dir or ""):
        yield "init_from", "is the folder that this run writes to; give another --output_dir"
    yield from process_mistakes(flags)


def process_mistakes(flags: Flags) -> Iterator[tuple[str, str]]:
    """Yield those of several processes, or of --shard."""
    are_many = torchrun_environment().world_size > 1
    if flags.shard in ("teacher", "both"):
        if flags.teacher_dtype == "fp8" or flags.teacher_offload:
            name = "teacher_offload" if flags.teacher_offload else "teacher_dtype"
            yield name, "does not go together with a sharded teacher; give --shard student"
        if flags.teacher_cache and are_many:
            yield "shard", "with --teacher_cache the teacher answers before training; give --shard student"
    if flags.cache_part and are_many:
        yield "cache_part", "is for processes started one by one; torchrun's share the work already, leave it out"
