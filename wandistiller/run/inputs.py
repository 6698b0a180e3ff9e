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
from wandistiller.run.flags import MAX_SAMPLES, Flags, OutputFlags

NAME_OF_A_FILE = re.compile(r"\S+\.(txt|csv|tsv|jsonl?|parquet|ya?ml)")


@dataclass(frozen=True)
class Inputs:
    """The student's config and the prompts of a run; `sample_prompts` are those of its pictures."""

    config: StudentConfig
    prompts: Prompts
    sample_prompts: list[str]


def read_inputs(flags: Flags) -> Inputs:
    """Check the flags and read what needs no torch, in the order in which a person would look for a mistake.

    Raises:
        UserError: flags contradict each other, or a file is missing or wrong.
    """
    for name, message in mistakes(flags):
        raise UserError(f"--{name}: {message}")
    data, output = flags.data, flags.output
    check_is_in_clone({"data_path": data.data_path, "teacher_path": data.teacher_path})
    config = StudentConfig.load(ready_config(flags.student.student_config)).replace(distillation=None)  # of another run
    prompts = read_prompts(
        data.data_path,
        data.caption_column,
        num_prompts=data.num_prompts,
        seed=flags.optimization.seed,
        eval_prompts=None if output.eval_every == output.num_samples == 0 else output.eval_prompts,
        prompt_per=data.prompt_per,
    )
    check_output_folder(output.output_dir)
    return Inputs(config, prompts, read_sample_prompts(output) or prompts.held_out[: output.num_samples])


def read_sample_prompts(flags: OutputFlags) -> list[str]:
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


# ---- flags that contradict each other ----

# A flag, the flag that it does not go without, and why
NEEDS = (
    ("assume_gpu", "dry_run", "plans for a GPU that is not here; it goes with --dry_run"),
    ("offline_teacher", "teacher_cache", "the teacher's answers must come from somewhere; add --teacher_cache FOLDER"),
    ("cache_part", "teacher_cache", "is a part of the teacher's answers on disk; add --teacher_cache FOLDER"),
)
# A flag to change, the flag that it does not go together with, and why
EXCLUDES = (
    ("teacher_sampler", "teacher_levels", "teachers of --teacher_levels noise anew; leave it out"),
    ("cache_part", "dry_run", "fills a cache, and --dry_run plans the whole run; leave one of the two out"),
    (
        "feature_loss_weight",
        "teacher_cache",
        "does not go together with --teacher_cache: hidden states are too large to keep",
    ),
)


def samples_per_step(flags: Flags) -> int:
    """Samples of an optimizer step, over all processes."""
    own = flags.optimization
    return own.batch_size * own.grad_accum_steps * torchrun_environment().world_size


def mistakes(flags: Flags) -> Iterator[tuple[str, str]]:
    """Yield the flag to change and why, for each contradiction."""
    values = flags.as_dict()
    is_on = {name: any(value) if isinstance(value, list) else bool(value) for name, value in values.items()}
    yield from ((flag, why) for flag, other, why in NEEDS if is_on[flag] and not is_on[other])
    yield from states_mistakes(flags)
    yield from ((flag, why) for flag, other, why in EXCLUDES if is_on[flag] and is_on[other])
    yield from lora_mistakes(flags)
    if os.path.realpath(flags.student.init_from) == os.path.realpath(flags.output.output_dir or ""):
        yield "init_from", "is the folder that this run writes to; give another --output_dir"
    yield from process_mistakes(flags)


def lora_mistakes(flags: Flags) -> Iterator[tuple[str, str]]:
    student, is_lora = flags.student, flags.student.train == "lora"
    for name in ("lora_rank", "lora_alpha"):
        if getattr(student, name) and not is_lora:
            yield name, "is for --train lora; add that, or leave it out"
    if not is_lora:
        return
    if student.init_from in ("teacher", "random"):
        yield "train", "a LoRA is of a trained student; give its folder as --init_from"
    if flags.states.teacher_cache:
        yield "teacher_cache", "does not go together with --train lora; leave it out"


def states_mistakes(flags: Flags) -> Iterator[tuple[str, str]]:
    states = flags.states
    low, high = states.sigma_range or (0.0, 1.0)
    if low >= high:
        yield "sigma_range", f"LOW {low} must be below HIGH {high}"
    if states.states != "noise" and high != 1.0:
        yield "sigma_range", "a sampling path begins at sigma 1, so HIGH must be 1 (or use --states noise)"
    if states.states == "noise" and states.calls_per_expert:
        yield "calls_per_expert", "is for sampling paths; with --states noise both experts answer in every batch"
    if flags.objective.student_steps and low > 0:
        yield "sigma_range", "does not go together with --student_steps: few steps take all noise levels"


def process_mistakes(flags: Flags) -> Iterator[tuple[str, str]]:
    own, states, are_many = flags.performance, flags.states, torchrun_environment().world_size > 1
    if own.shard in ("teacher", "both"):
        for flag, is_given in (("teacher_dtype", own.teacher_dtype == "fp8"), ("teacher_offload", own.teacher_offload)):
            if is_given:
                yield flag, "does not go together with a sharded teacher; give --shard student"
        if states.teacher_cache and are_many:
            yield "shard", "with --teacher_cache the teacher answers before training; give --shard student"
    if states.cache_part and are_many:
        yield "cache_part", "is for processes started one by one; torchrun's share the work already, leave it out"
