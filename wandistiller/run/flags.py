"""The flags of train_distillation.py, grouped as `--help` shows them: names, meanings and defaults.

Each flag is a field, with its help text beside it. `parse_args` returns a frozen `Flags`; nothing changes it afterwards. The
module needs the standard library alone, so that `--help` and mistakes are answered before torch loads.
"""

import os
from dataclasses import asdict, dataclass, field, fields
from dataclasses import replace as replace_fields
from typing import Any

from wandistiller.command_line import torchrun_environment
from wandistiller.files.clone import DEMO_HELD_OUT_PROMPTS, DEMO_TEACHER, check_is_in_clone
from wandistiller.flags import LORA_FLAG, FlagParser, build, flag, group, int_list, number, path, switch
from wandistiller.model.image_sizes import AspectRatio, ImageSize
from wandistiller.run.config_help import READY_CONFIGS
from wandistiller.run.flag_mistakes import mistakes
from wandistiller.run.presets import PRESETS
from wandistiller.run.recipe import Recipe
from wandistiller.run.states_kinds import STATES

REPORTS = ["none", "wandb", "trackio"]
LR_SCHEDULERS = ["constant", "linear", "cosine"]
# These won on two teachers (docs/experiments.md). They stand for flags that are left out, wherever they apply.
STUDENT_ROLLOUT = (0.0, 1.0)
FEATURE_LOSS_WEIGHT = 1.0
# Experts that take turns on the device answer many batches each, which spreads the time that it takes to move one in.
OFFLOAD_CALLS_PER_EXPERT = 64


# A teacher that is to draw in so few steps was distilled to them, as lightning LoRAs are, unless its sampler is named.
FEW_STEPS = 8
SAMPLERS = {
    "unipc": "the teacher answers rightly at all noise levels, as the released Wans do",
    "euler": "it was distilled to its steps, and is asked at the noise levels of these alone",
}


def flag_by_teacher(help: str, general: object, demo: object, rest: str = "", **options: object) -> Any:
    """Declare a flag whose default differs for the demo teacher; the help text shows both."""
    shown = f"{help} (default: {general}; with the demo teacher {demo}){rest}"
    return field(default=None, metadata={"help": shown, "options": options, "defaults": (general, demo)})


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """What is read: the teacher, its text encoder and VAE, and the prompts."""

    teacher_path: str = flag(
        "folder, .safetensors or .gguf file, hub id, or mock (random weights, no download)", DEMO_TEACHER, type=path
    )
    teacher_path_low: str | None = flag(
        "the low-noise expert, where the two experts are two files or folders", type=path
    )
    teacher_lora: list[tuple[str, float]] | None = flag(
        "a Wan LoRA (.safetensors) that is merged into the teacher as it is read, into the high-noise expert of two; may be given "
        "several times",
        **LORA_FLAG,
    )
    teacher_lora_low: list[tuple[str, float]] | None = flag("the same for the low-noise expert of two", **LORA_FLAG)
    text_encoder_path: str | None = flag(
        "folder or hub id with text_encoder/ and tokenizer/, where the teacher has none", type=path
    )
    vae_path: str | None = flag(
        "folder or hub id of a diffusers AutoencoderKLWan, where the teacher has none", type=path
    )
    data_path: str = flag_by_teacher(
        "prompts: a text file with one a line, a table (.csv, .tsv, .jsonl, .json, .parquet), a folder or a glob of these, or a "
        "folder of prompt templates",
        "data/static_prompts.txt",
        "data/demo_prompts.txt",
        type=path,
    )
    caption_column: str | None = flag(
        "column of tables that holds the prompts (left out: the only one of text, or the one called caption, prompt or text)"
    )
    prompt_cache: str = flag("folder that keeps prompt embeddings between runs", "outputs/prompt_cache", type=path)
    prompt_cache_gib: float = flag(
        "room for the embeddings of this run's prompts; where it is too little for all that the run can come to, fewer are used",
        100.0,
        type=number(float, above=0),
    )


@dataclass(frozen=True, kw_only=True)
class StudentFlags:
    """What the student looks like, and what it starts from."""

    student_config: str = flag("shape of the student", "config/demo_student_config.json", type=path)
    init: str = flag(
        "what the student starts from: the teacher's projected weights, or random values",
        "projection",
        choices=["projection", "random"],
    )
    init_expert: str = flag(
        "the expert that initialises the student, of a two-expert teacher", "high", choices=["high", "low"]
    )
    aspect_ratios: tuple[AspectRatio, ...] | None = flag(
        "train at these ratios of width to height, 4:1 to 1:4, such as 1:1 4:3 3:4, each of about image_size^2 pixels; a step "
        "is of one of them, in turn (left out: image_size x image_size alone)",
        nargs="+",
        type=AspectRatio.parse,
        metavar="W:H",
    )
    image_sizes: tuple[ImageSize, ...] | None = flag(
        "train at these sizes in pixels instead, such as 512x512 640x384",
        nargs="+",
        type=ImageSize.parse,
        metavar="WxH",
    )
    layers: list[int] | None = flag(
        "teacher layer of each student block, e.g. 0,2,5,7 (evenly spread if left out)", type=int_list
    )


@dataclass(frozen=True, kw_only=True)
class TeacherFlags:
    """How the teacher is sampled."""

    guidance_scale: float | None = flag("g of v_uncond + g (v_cond - v_uncond); 1 is off", type=number(float, low=0))
    guidance_scale_2: float | None = flag("g of the low-noise expert", type=number(float, low=0))
    boundary_ratio: float | None = flag(
        "sigma from which the high-noise expert answers", type=number(float, low=0, high=1)
    )
    negative_prompt: str | None = flag("what guidance pushes away from (Wan's own, less the words against stills)")
    shift: float | None = flag("warp of the noise levels, shift u / (1 + (shift - 1) u)", type=number(float, above=0))
    guidance_range: tuple[float, float] | None = flag(
        "noise levels with guidance, ends included; at the others one pass of the teacher answers instead of two (left out: all)",
        nargs=2,
        type=number(float, low=0, high=1),
        metavar=("LOW", "HIGH"),
    )
    teacher_steps: int | None = flag("steps that the teacher draws in", type=number(int, low=1, high=1000))
    teacher_sampler: str | None = flag(
        f"{'; '.join(f'{name}: {what}' for name, what in SAMPLERS.items())} (left out: euler for --teacher_steps of {FEW_STEPS} or "
        "fewer, else unipc)",
        choices=list(SAMPLERS),
    )


@dataclass(frozen=True, kw_only=True)
class StatesFlags:
    """At which states the student learns, and where the teacher's answers there come from."""

    states: str = flag(
        "; ".join(f"{name}: {kind.help}" for name, kind in STATES.items()),
        "trajectory",
        choices=list(STATES),
    )
    sigma_range: tuple[float, float] = flag(
        "noise levels trained on", (0.0, 1.0), nargs=2, type=number(float, low=0, high=1), metavar=("LOW", "HIGH")
    )
    renoise_fraction: float = flag(
        f"share of each batch that is renoised samples (default: {STATES['trajectory'].renoise_fraction}; with --states renoise "
        f"{STATES['renoise'].renoise_fraction}; 0 where paths do not finish)",
        type=number(float, low=0, high=1),
    )
    student_rollout: tuple[float, float] = flag(
        "share of the paths that follow the student's own velocity, at the start and at the end of training (default: 0 1; "
        "with --teacher_cache 0 0)",
        nargs=2,
        type=number(float, low=0, high=1),
        metavar=("START", "END"),
    )
    prompt_swap: float = flag(
        "probability that a state of pure noise is given another prompt; it falls with the noise",
        0.0,
        type=number(float, low=0, high=1),
    )
    extra_prompts: str | None = flag("file of further prompts, which come by --prompt_swap alone", type=path)
    calls_per_expert: int = flag(
        "batches in a row for one expert of a two-expert teacher; 0: both in every batch (default: 0; with "
        f"--teacher_offload on trajectories {OFFLOAD_CALLS_PER_EXPERT}, unless --renoise_fraction is given)",
        type=number(int, low=0),
    )
    replay: int | None = flag(
        "steps that learn from each of the teacher's answers (default: as many as cost what an answer costs, 4 to 8)",
        type=number(int, low=1),
    )
    teacher_cache: str | None = flag(
        "folder for the teacher's answers: all are asked for first, then learnt from", type=path
    )
    offline_teacher: bool = switch("with --teacher_cache: no teacher in memory while the student trains")
    cache_parts: int = flag(
        "with --teacher_cache: parts that the answers are asked for in, so that as many processes started with this command ask at "
        "once, each for other parts",
        1,
        type=number(int, low=1, high=1000),
    )
    cache_only: bool = switch("with --teacher_cache: end once the answers are complete; nothing is trained")


@dataclass(frozen=True, kw_only=True)
class ObjectiveFlags:
    """What the student is asked to match."""

    feature_loss_weight: float = flag(
        "of the error of hidden states beside that of velocities; falls to 0 over training (default: "
        f"{FEATURE_LOSS_WEIGHT:g}; 0 with --teacher_cache, --student_steps and --states noise)",
        type=number(float, low=0),
    )
    sigma_weighting: str = flag(
        "of the squared velocity error; x0: sigma squared; endpoint: how far a sampling step moves there",
        "none",
        choices=["none", "x0", "endpoint"],
    )
    student_steps: int | None = flag(
        "a student that draws in so many steps, each over a whole segment of the teacher's path (left out: in as many as "
        "the teacher)",
        type=number(int, low=1, high=100),
    )


@dataclass(frozen=True, kw_only=True)
class OptimizationFlags:
    """How long and how fast the student learns."""

    num_epochs: int = flag_by_teacher(
        "as many optimiser steps as so many passes over the prompts take", 1, 40, type=number(int, low=1)
    )
    max_steps: int | None = flag("optimiser steps; overrides --num_epochs", type=number(int, low=1))
    teacher_calls: int | None = flag(
        "batches that the teacher answers (with --student_steps beside those that its paths begin with), from which the steps "
        "follow by --replay; overrides --num_epochs",
        type=number(int, low=1),
    )
    batch_size: int = flag_by_teacher(
        "samples a GPU (or process) learns from at a time",
        4,
        64,
        "; a step takes this times --grad_accum_steps times the processes",
        type=number(int, low=1),
    )
    grad_accum_steps: int = flag(
        "such batches whose gradients add up to one optimiser step", 1, type=number(int, low=1)
    )
    lr: float | None = flag(
        "peak learning rate (default: by the optimiser, the student's width and the samples of a step)",
        type=number(float, above=0, high=1e9),
    )
    lr_scheduler: str = flag(
        "the learning rate after its warm-up: kept, or down to zero", "cosine", choices=LR_SCHEDULERS
    )
    lr_warmup_steps: int | None = flag(
        "steps of a linear rise from zero (default: a twenty-fifth of all, 500 at most)", type=number(int, low=0)
    )
    ema_decay: float = flag(
        "the saved weights are a moving average with this memory a step; 0: the last weights",
        0.999,
        type=number(float, low=0, high=0.999999),
    )
    optimizer: str = flag(
        "adamw; adamw8bit: its two moments in 8 bits, a quarter of the memory (needs pip install bitsandbytes); muon: "
        "orthogonalised updates for the matrices of the student's blocks, adamw for the rest",
        "muon",
        choices=["muon", "adamw", "adamw8bit"],
    )
    max_grad_norm: float = flag("gradients are clipped to this norm", 1.0, type=number(float, above=0))
    weight_decay: float = flag("weight decay", 0.0, type=number(float, low=0))
    seed: int = flag("of prompt order, noise and initial values", 0, type=number(int, low=0, high=2**63 - 1))


@dataclass(frozen=True, kw_only=True)
class PerformanceFlags:
    """Where and in which precision the run computes."""

    device: str | None = flag("cpu, cuda, cuda:1, ... (cuda if there is one)")
    dtype: str | None = flag(
        "of matrix products and of the teacher's weights (bf16 on cuda, else fp32)", choices=["fp32", "bf16"]
    )
    teacher_dtype: str | None = flag(
        "how the frozen teacher's weights are kept (that of --dtype); fp8: those of its blocks at a byte each, products in "
        "--dtype",
        choices=["fp32", "bf16", "fp8"],
    )
    teacher_offload: bool = switch(
        "of a two-expert teacher only the expert in use is on the device, both are in host memory"
    )
    shard: str | None = flag(
        "under torchrun: shard the weights of the student (with its gradients, average and optimiser), of the teacher or, "
        "without a value, of both over the processes (FSDP2); left out: a whole copy in each (DDP)",
        nargs="?",
        const="both",
        choices=["student", "teacher", "both"],
    )
    gradient_checkpointing: bool = switch(
        "compute the student's blocks again in the backward pass instead of keeping what they hold"
    )
    compile: bool = switch("torch.compile for the student and the teacher")

    @property
    def shards_teacher(self) -> bool:
        return self.shard in ("teacher", "both")

    @property
    def shards_student(self) -> bool:
        return self.shard in ("student", "both")


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """What is written, measured, drawn and printed."""

    output_dir: str = flag("folder for the student", "outputs/demo", type=path)
    save_every: int = flag(
        "steps between checkpoints, and one at the end; the same command resumes from the newest. 0: none",
        500,
        type=number(int, low=0),
    )
    keep_checkpoints: int = flag("how many of the newest stay", 2, type=number(int, low=1))
    overwrite: bool = switch("start anew where the output folder holds checkpoints; what is there is kept beside")
    eval_every: int | None = flag(
        "steps between measurements on held-out states: velocity error at the teacher's and at the student's own; 0: none (left "
        "out: at the teacher's alone, about 6 times, where the run is long enough to spare 2 % of its teacher calls)",
        type=number(int, low=0),
    )
    eval_prompts: str | None = field(
        default=None,
        metadata={
            "help": "file of held-out prompts to measure on (default: those of --data_path, with noise of their own; with the "
            f"demo teacher {DEMO_HELD_OUT_PROMPTS})",
            "options": {"type": path},
            "defaults": (None, DEMO_HELD_OUT_PROMPTS),
        },
    )
    num_samples: int = flag(
        "prompts drawn by teacher and student after training; 0: none", 8, type=number(int, low=0, high=64)
    )
    dry_run: bool = switch(
        "check everything, print what the run will take of memory, disk and computing, and whether it fits; write nothing"
    )
    assume_gpu_gib: float | None = flag(
        "with --dry_run: memory of the GPU to plan for, where it is not the one here", type=number(float, above=0)
    )
    sample_every: int = flag_by_teacher(
        "steps between such pictures while it trains; 0: none", 0, 200, type=number(int, low=0)
    )
    report: str = flag(
        "send losses and pictures to wandb or trackio as well (pip install the one you name)", "none", choices=REPORTS
    )
    preset: str | None = flag(
        f"set the flags of a real run by teacher and student, as docs/recipes.md lists them: {', '.join(PRESETS)}; what is typed "
        "beside it counts instead",
        choices=list(PRESETS),
        metavar="NAME",
    )
    verbose: bool = switch("print when each part of the start was done")
    print_config: str | None = flag(
        "print a student_config.json for this teacher, and on stderr what its keys mean; nothing else is done",
        type=lambda text: next((name for name in READY_CONFIGS if name.lower() == text.lower()), text),
        choices=list(READY_CONFIGS),
    )


class FlagError(ValueError):
    """Flags contradict each other; the message names the one to change."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """All flags of a run, in their groups.

    Raises:
        FlagError: flags contradict each other.
    """

    data: DataFlags = group("Data")
    student: StudentFlags = group("Student")
    teacher: TeacherFlags = group("Teacher (left out: the released model's own values, or what the checkpoint records)")
    states: StatesFlags = group("Training states")
    objective: ObjectiveFlags = group("Objective")
    optimization: OptimizationFlags = group("Optimization")
    performance: PerformanceFlags = group("Performance")
    output: OutputFlags = group("Output")

    def __post_init__(self) -> None:
        for name, message in mistakes(self):
            raise FlagError(f"argument {name}: {message}")

    @property
    def recipe(self) -> Recipe:
        """What the student records of how it is made, and what a resumed run must keep."""
        values = self.as_dict()
        values["image_sizes"] = values["image_sizes"] and [str(size) for size in values["image_sizes"]]
        return Recipe(**{known.name: values[known.name] for known in fields(Recipe)})

    def as_dict(self) -> dict[str, Any]:
        """Return every flag by its name, without the groups."""
        return {name: value for values in asdict(self).values() for name, value in values.items()}

    def replace(self, **changes: object) -> "Flags":
        """Return a copy with other values of some flags, which are named without their groups."""
        groups = {group.name: getattr(self, group.name) for group in fields(self)}
        for name, value in changes.items():
            (owner,) = [group for group, values in groups.items() if hasattr(values, name)]
            groups[owner] = replace_fields(groups[owner], **{name: value})
        return Flags(**groups)


def parse_args(argv: list[str] | None = None) -> Flags:
    """Read the command line; mistakes end the process with one line and exit code 2."""
    parser = FlagParser(
        "train_distillation.py",
        "Distil a Wan checkpoint into a small 2D image student. Flags are accepted with underscores or hyphens.",
        flags=Flags,
    )
    given = vars(parser.parse(argv))
    if given["preset"]:
        # A preset stands for the defaults of its flags, so that what is typed goes before it:
        parser.set_defaults(**PRESETS[given["preset"]].flags_beside(given))
        given = vars(parser.parse(argv))
    values = with_defaults(given)
    try:
        return build(Flags, values)
    except FlagError as error:
        parser.error(str(error))


def check_is_here(flags: Flags, name: str) -> None:
    """Refuse a default that names a file of a clone where there is none; `name` is the flag whose file is read next."""
    read = {"teacher_path": flags.data.teacher_path, "data_path": flags.data.data_path}
    check_is_in_clone(name, {**read, "student_config": flags.student.student_config})


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in the best known values for what was left out: by teacher first, then by other flags."""
    for name in ("sigma_range", "student_rollout", "guidance_range", "aspect_ratios", "image_sizes"):
        values[name] = values[name] and tuple(values[name])
    is_demo = os.path.realpath(values["teacher_path"]) == os.path.realpath(DEMO_TEACHER)
    for flags in fields(Flags):
        for known in fields(flags.type):
            if "defaults" in known.metadata and values[known.name] is None:
                values[known.name] = known.metadata["defaults"][is_demo]
    return with_recipe(values)


def with_recipe(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in the recipe that won, for what was left out and where it can be had."""
    states, few_steps = values["states"], values["student_steps"]
    has_paths, is_live = STATES[states].has_paths, values["teacher_cache"] is None
    num_samples = values["batch_size"] * values["grad_accum_steps"] * torchrun_environment().world_size
    finishes = has_paths and values["sigma_range"] == (0.0, 1.0) and num_samples > 1
    filled: dict[str, Any] = {}

    def fill(name: str, value: object) -> Any:
        filled[name] = value if values[name] is None else values[name]
        return filled[name]

    takes_turns = values["teacher_offload"] and states == "trajectory" and not few_steps
    fill("teacher_sampler", "euler" if (values["teacher_steps"] or FEW_STEPS + 1) <= FEW_STEPS else None)
    calls = fill("calls_per_expert", OFFLOAD_CALLS_PER_EXPERT if takes_turns and not values["renoise_fraction"] else 0)
    can_renoise = finishes and not few_steps and not calls
    fill("renoise_fraction", STATES[states].renoise_fraction if can_renoise else 0.0)
    fill("student_rollout", STUDENT_ROLLOUT if has_paths and is_live else (0.0, 0.0))
    fill("feature_loss_weight", FEATURE_LOSS_WEIGHT if has_paths and is_live and not few_steps else 0.0)
    return values | filled
