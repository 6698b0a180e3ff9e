"""Pre-flight before a long GPU job: the trainer's own functions, end to end, on a shrunk student and a mock teacher.

    python run_production_test.py --student_config config/student_config.json --data_path data/static_prompts.txt

With a real --teacher_path it also says, from the checkpoint's headers alone, whether the student config fits it.
"""

import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.command_line import run_command
from wandistiller.errors import UserError
from wandistiller.files.clone import check_is_in_clone
from wandistiller.files.output_folder import (
    METRICS_NAME,
    check_output_folder,
    prepare_output_folder,
    set_aside_previous_student,
)
from wandistiller.flags import LORA_FLAG, FlagParser, number, path
from wandistiller.model.config import StudentConfig
from wandistiller.prompts.prompts import is_endless, load_prompts

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    from wandistiller.model.transformer import WanLiteStudent
    from wandistiller.projection.project import ProjectionReport
    from wandistiller.sampling.teacher import Teacher
    from wandistiller.training.loop import TrainingOptions, TrainingResult
    from wandistiller.wan.prompt_embeds import PromptEmbeds
    from wandistiller.wan.settings import TeacherSettings
    from wandistiller.wan.wan_files import WanFiles

HIDDEN_SIZE, DEPTH, LATENT_SIZE = 256, 4, 8
HEAD_DIM = 64  # for a wan student whose own heads do not fill HIDDEN_SIZE
LR, SEED, STATES = 1e-4, 0, "trajectory"
MAX_LOSS_LINES = 60
MAX_PROMPTS = 2000  # are trained on, so that the test of a file of millions ends


@dataclass(frozen=True)
class Flags:
    """What the pre-flight is asked to test."""

    student_config: str
    data_path: str
    caption_column: str | None
    teacher_path: str
    teacher_path_low: str | None
    teacher_lora: list[tuple[str, float]] | None
    teacher_lora_low: list[tuple[str, float]] | None
    num_epochs: int
    batch_size: int
    output_dir: str | None


def parse_args(argv: list[str] | None = None) -> Flags:
    parser = FlagParser("run_production_test.py", __doc__)
    group = parser.group("Input")
    group.flag(
        "--student_config",
        "the config of the run to come; shrunk for this test",
        "config/student_config.json",
        type=path,
    )
    group.flag("--data_path", "the prompts, as train_distillation.py takes them", "data/static_prompts.txt", type=path)
    group.flag("--caption_column", "column of tables that holds the prompts, where their names do not tell")
    group.flag(
        "--teacher_path", "a real checkpoint to hold the config against (the steps run on a mock)", "mock", type=path
    )
    group.flag("--teacher_path_low", "its low-noise expert, where the two experts are two files or folders", type=path)
    group.flag("--teacher_lora", "a Wan LoRA to hold against it; may be given several times", **LORA_FLAG)
    group.flag("--teacher_lora_low", "the same for the low-noise expert of two", **LORA_FLAG)
    group = parser.group("Test run")
    group.flag("--num_epochs", "passes over the prompts", 1, type=number(int, low=1))
    group.flag("--batch_size", "prompts per step", 2, type=number(int, low=1))
    group.flag("--output_dir", "keep the small student here (a temporary folder if left out)", type=path)
    return Flags(**vars(parser.parse(argv)))


def shrink(config: StudentConfig) -> StudentConfig:
    """Return the same kind of student, small enough for seconds on a CPU: at most HIDDEN_SIZE wide and DEPTH deep."""
    hidden_size = min(HIDDEN_SIZE, config.hidden_size)
    patches = min(max(1, config.latent_size // config.patch_size), -(-LATENT_SIZE // config.patch_size))
    image_size = patches * config.patch_size * config.vae_scale_factor
    shrunk = {"hidden_size": hidden_size, "depth": min(DEPTH, config.depth), "image_size": image_size}
    if hidden_size < config.hidden_size:
        if config.block == "wan":
            head_dim = config.head_dim if hidden_size % config.head_dim == 0 else HEAD_DIM
            shrunk["num_heads"] = hidden_size // head_dim
            shrunk["ffn_dim"] = max(1, config.ffn_dim * hidden_size // config.hidden_size)
        else:
            heads = range(1, config.num_heads + 1)
            shrunk["num_heads"] = max(count for count in heads if hidden_size % count == 0)
            shrunk |= {"ffn_dim": None, "freq_dim": None}  # these follow the width of a lite block
    return config.replace(**shrunk)


def check_real_teacher(flags: Flags, config: StudentConfig, prompts: Sequence[str]) -> None:
    """Print from headers alone whether the given config fits the real teacher, and what a run with it will take."""
    from wandistiller.projection.selection import check_fits
    from wandistiller.run.messages import lora_lines
    from wandistiller.wan.layouts import open_teacher
    from wandistiller.wan.lora import merge_loras
    from wandistiller.wan.settings import resolve_settings, warnings_about

    wan_files = open_teacher(flags.teacher_path, config, flags.teacher_path_low)
    wan_files = merge_loras(wan_files, flags.teacher_lora, flags.teacher_lora_low)
    shape = wan_files.config
    passed(
        f"Teacher {flags.teacher_path}: headers read, {' + '.join(wan_files.experts)}: hidden_size {shape.hidden_size}, "
        f"depth {shape.depth}, num_heads {shape.num_heads}, ffn_dim {shape.ffn_dim}, {shape.num_channels} channels"
    )
    for line in lora_lines(wan_files):
        passed(line)
    check_fits(shape, config, where=flags.student_config)
    settings = resolve_settings(wan_files)
    config.check_image_size(settings.vae_scale_factor, flags.student_config)
    passed(f"{flags.student_config} fits this teacher; {settings.summary()}")
    for warning in warnings_about(wan_files, settings, config):
        warn(warning)
    show_budget(flags, wan_files, settings, config, prompts)


def show_budget(
    flags: Flags, wan_files: "WanFiles", settings: "TeacherSettings", config: StudentConfig, prompts: Sequence[str]
) -> None:
    """Print what --dry_run of the trainer prints, with its default flags; flags can be changed, so that nothing fails here."""
    from wandistiller.device import pick_device, pick_dtype
    from wandistiller.processes import Processes
    from wandistiller.prompts.prompts import NUM_HELD_OUT, Texts
    from wandistiller.run.dry_run import print_budget_tables
    from wandistiller.run.flags import parse_args as parse_training_flags
    from wandistiller.run.plan import Plan, find_encoder, possible_flags, with_defaults
    from wandistiller.targets.lanes import Lanes

    given = {
        "--teacher_path": flags.teacher_path,
        "--student_config": flags.student_config,
        "--data_path": flags.data_path,
    }
    training = parse_training_flags([word for pair in given.items() for word in pair])
    training = possible_flags(training, wan_files, config)
    try:
        encoder = find_encoder(training, wan_files, config)
    except UserError as error:
        encoder = None
        warn(str(error))
    processes = Processes(pick_device(None))
    plan = Plan(
        flags=training,
        config=config,
        texts=Texts(prompts, [], prompts[:NUM_HELD_OUT]),
        wan_files=wan_files,
        settings=settings,
        processes=processes,
        lanes=Lanes.of_process(training.optimization.batch_size, 1, 0, 1),
        dtype=pick_dtype(None, processes.device),
        encoder=encoder,
        vae_location=None,
    )
    verdict, _ = print_budget_tables(with_defaults(plan))
    (passed if verdict.fits else warn)(verdict.sentence)


def run_test(flags: Flags, folder: Path) -> None:
    """Take every step of a training run, in its order."""
    read = {"data_path": flags.data_path, "student_config": flags.student_config}
    check_is_in_clone("data_path", read)
    file = load_prompts(flags.data_path, flags.caption_column)
    prompts = list(file.prompts[:MAX_PROMPTS])
    count = "as many as are asked for" if is_endless(file.prompts) else len(file.prompts)
    passed(f"Prompts found: {count} in {flags.data_path}")
    if file.notice:
        warn(file.notice)
    if len(prompts) < len(file.prompts):
        passed(f"Prompts of this test: the first {len(prompts)}, among them {prompts[0]!r}")
    check_is_in_clone("student_config", read)
    config = StudentConfig.load(flags.student_config)
    small = shrink(config)
    passed(f"Config found: {flags.student_config}")
    if flags.teacher_path != "mock" or flags.teacher_path_low or flags.teacher_lora or flags.teacher_lora_low:
        check_real_teacher(flags, config, prompts if is_endless(file.prompts) else file.prompts)
    passed(
        f"Config adjusted: model_type {small.model_type}, block {small.block}, hidden_size {config.hidden_size} -> "
        f"{small.hidden_size}, depth {config.depth} -> {small.depth}, num_heads {small.num_heads}, "
        f"ffn_dim {small.ffn_dim}, image_size {small.image_size}"
    )

    prepare_output_folder(folder)
    student, teacher, embeds, report = build(small, prompts)
    if aside := set_aside_previous_student(folder):
        passed(f"The student that was in {folder} is now in {aside}")
    trained = train_briefly(flags, student, teacher, embeds, folder)
    if trained[0].interrupted:
        raise KeyboardInterrupt
    save_and_reload(student, teacher, embeds, report, trained, folder)


def build(
    config: StudentConfig, prompts: list[str]
) -> "tuple[WanLiteStudent, Teacher, PromptEmbeds, ProjectionReport]":
    """Make student and teacher as projections of one mock checkpoint, and stand-ins for the prompts' embeddings."""
    import torch

    from wandistiller.projection.project import project_experts, project_teacher
    from wandistiller.sampling.teacher import Teacher
    from wandistiller.wan.layouts import open_teacher
    from wandistiller.wan.prompt_embeds import mock_prompt_embeds
    from wandistiller.wan.settings import resolve_settings

    # So small a model gains nothing from more threads, and with them waits minutes for cores that others keep busy.
    torch.set_num_threads(1)
    wan_files = open_teacher("mock", config)
    settings = resolve_settings(wan_files)
    student, report = project_teacher(wan_files, config, seed=SEED)
    total = sum(parameter.numel() for parameter in student.parameters())
    trainable = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    passed(f"Student parameters: {total:,} total, {trainable:,} trainable")
    texts = [*prompts, settings.negative_prompt]
    embeds = mock_prompt_embeds(texts, config.text_encoder_output_dim, config.text_max_length)
    experts = project_experts(wan_files, config.text_max_length)
    teacher = Teacher(experts, settings, embeds.read(len(prompts)))
    frozen = sum(parameter.numel() for parameter in teacher.experts["high"].parameters())
    passed(f"Teacher ready: mock, {frozen:,} parameters, frozen, guidance_scale {settings.guidance_scale:g}")
    return student, teacher, embeds.first(len(prompts)), report


def train_briefly(
    flags: Flags, student: "WanLiteStudent", teacher: "Teacher", embeds: "PromptEmbeds", folder: Path
) -> "tuple[TrainingResult, TrainingOptions]":
    import torch

    from wandistiller.reports.progress import LINE_EVERY_S, Progress
    from wandistiller.step_metrics import StepMetrics
    from wandistiller.targets.answers import TeacherAnswers
    from wandistiller.targets.lanes import Lanes
    from wandistiller.targets.states import StatesOptions, build_states
    from wandistiller.training.loop import Observer, TrainingOptions, steps_of_epochs, train
    from wandistiller.training.objective import Objective
    from wandistiller.training.optimizer import OptimizationOptions

    class Shown(Observer):
        def __init__(self, progress: Progress):
            self.progress = progress

        def step(self, metrics: StepMetrics) -> None:
            self.progress.step(metrics)

    num_steps = steps_of_epochs(flags.num_epochs, len(embeds), flags.batch_size)
    options = TrainingOptions(
        batch_size=flags.batch_size, num_steps=num_steps, optimization=OptimizationOptions(lr=LR), seed=SEED
    )
    passed(f"Optimizer: AdamW, lr {LR:g}; {num_steps} steps of batch {flags.batch_size}")
    states_options = StatesOptions(kind=STATES, seed=SEED)
    states = build_states(states_options, student.config, teacher.settings, len(embeds), Lanes(flags.batch_size))
    answers = TeacherAnswers(teacher, states, embeds, options.device, torch.float32)
    objective = Objective(shift=teacher.settings.shift)
    with Progress(num_steps, folder / METRICS_NAME, 0.0 if num_steps <= MAX_LOSS_LINES else LINE_EVERY_S) as progress:
        result = train(student, answers, objective, options, Shown(progress))
    passed(f"Steps completed: {result.num_steps} of {num_steps}, average loss {result.average_loss:.4f}")
    return result, options


def save_and_reload(
    student: "WanLiteStudent",
    teacher: "Teacher",
    embeds: "PromptEmbeds",
    report: "ProjectionReport",
    trained: "tuple[TrainingResult, TrainingOptions]",
    folder: Path,
) -> None:
    """Save as the trainer does, load what was saved, and hold its prediction against the student in memory."""
    import torch

    from wandistiller.model.transformer import WanLiteStudent
    from wandistiller.run.record import distillation_record, save_student

    result, options = trained
    recipe = {"teacher_path": "mock", "states": STATES}
    made_of = {"layers": report.layers, "num_prompts": len(embeds), "num_teacher_batches": result.num_steps}
    save_student(student, distillation_record(recipe, teacher.settings, options, result, made_of), folder)
    report.save(folder)
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    passed("Files saved: " + ", ".join(f"{path.name} ({path.stat().st_size:,} bytes)" for path in files))
    config = student.config
    latents = torch.randn(1, config.num_channels, config.latent_size, config.latent_size)
    inputs = (latents, torch.tensor([500.0]), *embeds.batch([0]))
    with torch.no_grad():
        expected, reloaded = student(*inputs), WanLiteStudent.from_pretrained(folder)(*inputs)
    # Weights that lie elsewhere in memory are summed in another order, which a value near zero shows most.
    if float((reloaded - expected).norm()) > 1e-4 * float(expected.norm()):
        raise RuntimeError(f"the student reloaded from {folder} does not predict what the one in memory predicts")
    passed("Reloaded from disk: predicts the same")


def passed(line: str) -> None:
    """Print a line of the test that went well."""
    print(f"[ok] {line}", flush=True)


def warn(line: str) -> None:
    """Print a line that a person should look at before the long job."""
    print(f"[!!] {line}", flush=True)


def main(argv: list[str] | None = None) -> int:
    flags = parse_args(argv)
    try:
        if flags.output_dir is None:
            with tempfile.TemporaryDirectory(prefix="wandistiller-") as folder:
                run_test(flags, Path(folder))
        else:
            run_test(flags, check_output_folder(flags.output_dir))
    except KeyboardInterrupt:
        print("Production Test interrupted")
        return 130
    except Exception as error:
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        print("Production Test FAILED")
        return 2 if isinstance(error, UserError) else 1
    print("Production Test PASSED")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
