"""What the commands share: flags in both spellings, one-line errors, exit codes.

Exit codes: 0 done, 2 a mistake in flags, config or files, 130 interrupted after saving, 1 anything else.
Standard library only, so that `--help` and mistakes are answered at once.
"""

import argparse
import difflib
import math
import os
import re
import reprlib
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from wandistiller import __version__
from wandistiller.errors import lost_process_message, place_message, shortened
from wandistiller.lost_output import is_lost_output

# This says how long OpenMP's threads spin before they sleep, and must be set before torch loads. Sleeping at once (OMP_WAIT_POLICY=PASSIVE) takes
# small models a third of their speed; spinning for long costs whole time slices where another job keeps a core busy.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


# `wandistiller NAME`, which an installation puts on the PATH, and the script of a clone that is the same command.
COMMANDS = {
    "train": "train_distillation.py",
    "project": "projection_mapper.py",
    "preflight": "run_production_test.py",
    "generate": "generate_images.py",
    "evaluate": "evaluate_student.py",
    "export": "export_student.py",
    "playground": "playground.py",
}
ONE_COMMAND = "wandistiller"

# These are torchrun's own flags; they come here when it is left out or another launcher is used.
LAUNCHER_FLAGS = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "rdzv_endpoint", "local_rank"}
OTHERS_WAIT_S = 5.0
# What kohya's scripts, musubi-tuner, ai-toolkit, diffusers' examples and Wan's generate.py call the flags of these commands. A
# command has the first of the names that it knows; after a colon stands what is answered where it knows the name before it.
_OTHER_NAMES = {
    "learning_rate unet_lr base_lr": ["lr"],
    "steps max_train_steps train_steps num_train_steps num_steps iterations": ["max_steps", "num_inference_steps"],
    "epochs num_train_epochs max_train_epochs": ["num_epochs"],
    "infer_steps inference_steps sampling_steps sample_steps num_sampling_steps": [
        "num_inference_steps",
        "teacher_steps",
    ],
    "num_inference_steps teacher_num_inference_steps": ["teacher_steps"],
    "sampler sample_solver solver sampler_name": ["teacher_sampler"],
    "guidance_interval cfg_interval guidance_start guidance_end": ["guidance_range"],
    "train_batch_size batch per_device_train_batch_size": ["batch_size"],
    "gradient_accumulation_steps gradient_accumulation accumulate_grad_batches": ["grad_accum_steps"],
    "mixed_precision precision weight_dtype": ["dtype"],
    "fp8 fp8_base fp8_scaled quantize": ["teacher_dtype"],
    "blocks_to_swap offload cpu_offload offload_model low_vram": ["teacher_offload"],
    "optimizer_type use_8bit_adam use_8bit_optimizer": ["optimizer"],
    "scheduler lr_scheduler_type": ["lr_scheduler"],
    "warmup_steps lr_warmup": ["lr_warmup_steps"],
    "adam_weight_decay": ["weight_decay"],
    "use_ema ema ema_rate": ["ema_decay"],
    "flow_shift discrete_flow_shift sample_shift timestep_shift": ["shift"],
    "guidance cfg cfg_scale guide_scale sample_guide_scale": ["guidance_scale"],
    "checkpointing_steps save_steps save_every_n_steps save_every_n_epochs save_interval": ["save_every"],
    "checkpoints_total_limit save_total_limit max_step_saves_to_keep": ["keep_checkpoints"],
    "validation_steps sample_every_n_steps sample_steps_interval": ["sample_every"],
    "num_images num_images_per_prompt num_validation_images num_videos": [
        "num_samples",
        "num_seeds",
        "num_images",
    ],
    "validation_prompt validation_prompts sample_prompts": ["eval_prompts", "prompts_file"],
    "prompts prompt_file prompt_path from_file captions": ["data_path", "prompts_file"],
    "dataset dataset_name dataset_config dataset_path data data_dir train_data_dir instance_data_dir": ["data_path"],
    "pretrained_model_name_or_path pretrained_model name_or_path base_model dit ckpt_dir teacher": ["teacher_path"],
    "model_path ckpt checkpoint checkpoint_path student_path": ["student", "teacher_path"],
    "vae vae_model": ["vae_path"],
    "t5 text_encoder text_encoder1 tokenizer": ["text_encoder_path"],
    "report_to log_with logging_dir use_wandb wandb tracker": ["report"],
    "save_path save_dir save_file output_path output_folder output_name out": ["output", "output_dir"],
    "config model_config config_file": ["student_config"],
    "fsdp deepspeed use_fsdp": ["shard"],
    "torch_compile compile_model dynamo_backend": ["compile"],
    "resume resume_from resume_from_checkpoint": ["save_every: a run resumes where the same command is typed again"],
    "resolution size image_size video_size": [
        "height: the size of the pictures is --height and --width",
        'student_config: the size of the pictures is "image_size" in the file of --student_config',
        "student: the size of the pictures is the one that the student was trained at",
    ],
    "lora lora_path lora_weight lora_weights network_weights": [
        "lora",
        "student: projection_mapper.py --lora cuts a LoRA for a student, which diffusers and ComfyUI load onto its export",
        "teacher_lora: a LoRA of the teacher is --teacher_lora FILE[:SCALE]; the student is trained whole",
    ],
    "lora_rank rank network_dim network_alpha network_module": [
        "student_config: no LoRA is trained here; all weights of the student are trained",
        "student: no LoRA is trained here; a student is a whole model",
    ],
    "hidden_size depth num_layers num_heads ffn_dim patch_size text_max_length": [
        "student_config: it is no flag but a line in the file of --student_config"
    ],
    "num_frames frame_num video_length": [
        "student: a student draws single pictures",
        "student_config: a student draws single pictures",
    ],
}


def is_one_command() -> bool:
    """Return whether this process was started as `wandistiller NAME`, which `wandistiller/__main__.py` writes to sys.argv."""
    return sys.argv[0].startswith(f"{ONE_COMMAND} ")


def command_words(script: str, num_processes: int = 1) -> list[str]:
    """Return how a person starts a command, in the way in which this process was started."""
    names = [name for name, known in COMMANDS.items() if known == script] if is_one_command() else []
    launcher = ["torchrun", "--nproc_per_node", str(num_processes)]
    if names:
        return [*([*launcher, "-m"] if num_processes > 1 else []), ONE_COMMAND, *names]
    return [*(launcher if num_processes > 1 else ["python"]), script]


class FlagGroup:
    """One titled group of flags in `--help`."""

    def __init__(self, group: argparse._ArgumentGroup):
        self._group = group

    def flag(self, name: str, help: str, default=None, **options) -> None:
        """Add a flag by its snake_case name; the help text shows its default."""
        shown = "" if default in (None, False) or options.get("required") else f" (default: {default})"
        self._group.add_argument(name, help=(help + shown).replace("%", "%%"), default=default, **options)


class FlagParser(argparse.ArgumentParser):
    """An argument parser that takes every flag with underscores or hyphens and answers mistakes in one line."""

    def __init__(self, prog: str, description: str, epilog: str | None = None):
        super().__init__(
            prog=sys.argv[0] if is_one_command() else prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # Also -1e-5 and -1,2 are values, to be answered as such; argparse knows -1 and -1.5 only:
        self._negative_number_matcher = re.compile(r"-\.?\d")
        self._given: list[str] = []
        version = f"WanDistiller {__version__}"
        self.add_argument("--version", action="version", version=version, help="show the version and exit")

    def group(self, title: str) -> FlagGroup:
        return FlagGroup(self.add_argument_group(title))

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        self._given = [_underscored(arg) for arg in (sys.argv[1:] if argv is None else argv)]
        args, unknown = self.parse_known_args(self._given)
        if unknown:
            self.error(self._unknown_message(*unknown))
        return args

    def _unknown_message(self, given: str, *others: str) -> str:
        if not given.startswith("-"):
            return f"unexpected argument {given!r}; every value follows a --flag"
        if given.split("=")[0].removeprefix("--") in LAUNCHER_FLAGS:
            value = f" {others[0]}" if "=" not in given and others and not others[0].startswith("-") else ""
            return f"{given.split('=')[0]} is a flag of torchrun: torchrun {given}{value} {'-m ' * is_one_command()}{self.prog} ..."
        flag = given.split("=")[0]
        return f"unknown flag {reprlib.repr(flag)[1:-1]}; {self._suggestion(flag)}"

    def _suggestion(self, flag: str) -> str:
        """Return what to give instead of an unknown flag: what other trainers call so, else the flag that is spelt most alike."""
        known = [option for action in self._actions for option in action.option_strings]
        for names, ours in _OTHER_NAMES.items():
            for our, _, answer in (our.partition(": ") for our in ours if flag.removeprefix("--") in names.split()):
                if f"--{our}" in known:
                    return answer or f"here it is called --{our}"
        near = difflib.get_close_matches(flag, known, 1, 0.65)
        return f"did you mean {near[0]}?" if near else "see --help"

    def error(self, message: str) -> NoReturn:
        if "arguments are required" in message:  # the one that is wanted may be there under a name of another trainer
            known = {option for action in self._actions for option in action.option_strings}
            strange = [arg for arg in self._given if arg.startswith("--") and arg.split("=")[0] not in known]
            message = "; ".join([*(self._unknown_message(flag) for flag in strange[:1]), message])
        self.exit(2, f"{self.prog}: error: {shortened(message)}\n" if torchrun_environment().local_rank == 0 else None)


def _underscored(arg: str) -> str:
    """Turn --num-epochs=3 into --num_epochs=3; values are left as they are."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def number(
    kind: type, low: float = -math.inf, high: float = math.inf, above: float = -math.inf
) -> Callable[[str], float]:
    """Return an argparse type: an int or float with low <= value <= high and value > above."""
    noun = {int: "a whole number", float: "a number"}[kind]
    bounds = [f"above {above}"] if above > -math.inf else []
    bounds += [f"at least {low}"] if low > -math.inf else []
    bounds += [f"at most {high}"] if high < math.inf else []

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value > above) or math.isinf(value):
            raise argparse.ArgumentTypeError(
                f"{text!r} must be {noun}" + (f" {' and '.join(bounds)}" if bounds else "")
            )
        return value

    return parse


def path(text: str) -> str:
    """Check a path as an argparse type: the empty text of a shell variable that is not set would mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a path")
    return text


def int_list(text: str) -> list[int]:
    """Read whole numbers separated by commas, as an argparse type."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers separated by commas, such as 0,2,5") from None


def lora_file(text: str) -> tuple[str, float]:
    """Read FILE or FILE:SCALE, as an argparse type; a colon that no number follows belongs to the path."""
    name, colon, after = path(text).rpartition(":")
    try:
        scale = float(after) if colon and name else math.nan
    except ValueError:
        return text, 1.0
    if not (colon and name):
        return text, 1.0
    if not math.isfinite(scale) or scale == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: the scale after the colon must be a number other than 0")
    return name, scale


LORA_FLAG: dict[str, Any] = {"action": "append", "type": lora_file, "metavar": "FILE[:SCALE]"}


def add_student_flag(group: FlagGroup) -> None:
    """Add the flag that names a student's folder."""
    help_text = "folder of a trained student (--output_dir of train_distillation.py)"
    group.flag("--student", help_text, required=True, type=path)


def add_teacher_flags(group: FlagGroup) -> None:
    """Add the flags that say where the teacher of a student and its parts are, for whoever draws with both."""
    group.flag("--teacher_path", "the teacher, where it is no longer where the student's record says", type=path)
    group.flag("--teacher_path_low", "its low-noise expert, where the two experts are two files or folders", type=path)
    group.flag("--teacher_lora", "a LoRA of the teacher, instead of those that the student records", **LORA_FLAG)
    group.flag("--teacher_lora_low", "the same for the low-noise expert of two", **LORA_FLAG)
    group.flag(
        "--text_encoder_path",
        "folder or hub id with text_encoder/ and tokenizer/, where the teacher has none",
        type=path,
    )
    group.flag("--vae_path", "folder or hub id of a diffusers AutoencoderKLWan, where the teacher has none", type=path)


@dataclass(frozen=True)
class TorchrunEnvironment:
    """Which of how many processes this one is, in the whole run and on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def torchrun_environment() -> TorchrunEnvironment:
    """Read what torchrun tells its processes in the environment; a process that was started without it is alone."""

    def read(name: str, alone: int) -> int:
        value = os.environ.get(name, "")
        return int(value) if value.isdecimal() else alone

    return TorchrunEnvironment(
        read("RANK", 0), read("WORLD_SIZE", 1), read("LOCAL_RANK", 0), read("LOCAL_WORLD_SIZE", 1)
    )


def end_process(code: int) -> None:
    """Exit; under torchrun without taking libraries' threads down one by one, in which a process whose work was done has
    been seen to abort, and torchrun then counts the whole run as failed."""
    if "LOCAL_RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's main and turn what it raises into an exit code; errors that carry one are messages to a person."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a prompt that a terminal cannot show must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        exit_code = main() or 0
        sys.stdout.flush()
        return exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if is_lost_output(error):
            return 1
        message, code = place_message(error) or (str(error), getattr(error, "exit_code", None))
        if lost := lost_process_message(error):
            message, code = lost, 1
        if code is None:
            traceback.print_exc()
            return 1
        if number := torchrun_environment().local_rank:
            # Most mistakes are every process's; torchrun ends the others when the first has said so.
            time.sleep(OTHERS_WAIT_S)
        print(f"process {number}: error: {message}" if number else f"error: {message}", file=sys.stderr)
        return code
