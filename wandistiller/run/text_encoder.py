"""A run that distils a small text encoder: its settings, and how it is built, trained and saved with the trainer's own loop."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, cast

import torch

from wandistiller.budget.report import gib
from wandistiller.device import pick_device, pick_dtype
from wandistiller.errors import UserError
from wandistiller.evaluation.held_out import evaluation_mode
from wandistiller.files.output_folder import check_output_folder, check_writable, set_aside_previous_student
from wandistiller.files.weights import digest_of
from wandistiller.model.config import WEIGHTS_NAME
from wandistiller.model.sizes import count_parameters
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import Processes, join
from wandistiller.projection.selection import spread_layers
from wandistiller.prompts.prompts import Prompts
from wandistiller.reports.progress import Progress
from wandistiller.reports.trackers import Trackers
from wandistiller.run.build import print_encoding
from wandistiller.run.folder import Folder, open_folder
from wandistiller.run.observers import RunObserver, build_trackers
from wandistiller.students.record import load_shape
from wandistiller.training.checkpoints import Checkpoints
from wandistiller.training.loop import TrainingResult, train
from wandistiller.training.objective import TrainedStudent
from wandistiller.training.optimizer import OptimizationOptions
from wandistiller.training.state import RunState, TrainingOptions
from wandistiller.training.text_encoder import EncoderObjective, TextBatches, TextReader, token_errors
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.small_umt5 import CONFIG_NAME, MODEL_NAME, SmallUmt5, cut_umt5, num_parameters, read_small_shape
from wandistiller.wan.text_encoder import EncodingOptions, encode_prompts, prompts_digest, token_ids
from wandistiller.wan.text_encoder_files import TextEncoderFiles, find_text_encoder

TEXT_SLOTS = 512  # of the released Wans
LR, LR_WIDTH = 2e-3, 64  # the rate of an encoder of this width; it falls with the root of the width
CUT_PROMPTS, AT_ONCE = 256, 8  # whose hidden states say which directions the small encoder keeps
STATE_COPIES = 4  # weights, their average and AdamW's two moments
WRITTEN = (CONFIG_NAME, MODEL_NAME, "tokenizer.json", "spiece.model")


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Everything that the run needs to know; a field that is named as a flag has the value that counts, typed or not.

    Attributes:
        encoder: the teacher's, on disk.
        shape: of the small encoder, as arguments of UMT5Config.
        student: folder of the picture model that reads the embeddings; None: they are compared alone.
    """

    report: ClassVar[str] = "none"

    encoder: TextEncoderFiles
    shape: dict[str, Any]
    student: str | None
    prompts: list[str]
    held_out_prompts: list[str]
    prompt_cache: str
    output_dir: str
    num_steps: int
    batch_size: int
    optimization: OptimizationOptions
    seed: int
    eval_every: int
    save_every: int
    keep_checkpoints: int
    overwrite: bool
    processes: Processes
    compute_dtype: torch.dtype

    @property
    def num_samples_per_step(self) -> int:
        """Prompts of a step, over all processes."""
        return self.batch_size * self.processes.count

    @property
    def options(self) -> TrainingOptions:
        return TrainingOptions(
            num_steps=self.num_steps,
            optimization=self.optimization,
            eval_every=self.eval_every,
            save_every=self.save_every,
        )


def resolve(flags: Any, prompts: Prompts) -> EncoderSettings:
    """Return the settings; every refusal that needs no weight comes here.

    Raises:
        UserError: a file is missing or wrong, or does not fit the teacher.
    """
    processes = join(flags.compute.device, pick_device)
    encoder = find_text_encoder(flags.teacher_path)
    shape = read_small_shape(flags.text_encoder_config, encoder.umt5.shape)
    folder = check_output_folder(flags.output_dir)
    if folder.resolve() in (encoder.encoder.resolve(), encoder.encoder.parent.resolve()):
        raise UserError(f"--output_dir {folder}: is where the teacher's text encoder lies; give another folder")
    if flags.student is not None and (config := load_shape(flags.student)):
        config.check_is_wan(f"--student {flags.student}", "has no cross-attention; leave it out")
        encoder.check_text_dim(config.text_encoder_output_dim)
    print("\n".join(prompts.lines))
    known = {
        "encoder": encoder,
        "shape": shape,
        "prompts": prompts.train,
        "held_out_prompts": prompts.held_out if flags.eval_every else [],
        "num_steps": flags.max_steps,
        "optimization": OptimizationOptions(
            lr=flags.lr or LR * (LR_WIDTH / shape["d_model"]) ** 0.5,
            lr_scheduler="cosine",
            lr_warmup_steps=min(500, flags.max_steps // 25),
            ema_decay=0.999,
        ),
        "processes": processes,
        "compute_dtype": pick_dtype(flags.compute.dtype, processes.device),
    }
    names = {setting.name for setting in fields(EncoderSettings)}
    return EncoderSettings(**{name: value for name, value in vars(flags).items() if name in names} | known)


def print_plan(settings: EncoderSettings) -> None:
    """Print what the small encoder is, and the sizes of the picture-maker that it is a part of.

    Raises:
        UserError: a folder cannot be written to, or the disk has no room.
    """
    small, teacher = num_parameters(settings.shape), settings.encoder.umt5.num_parameters
    print(f"Text encoder: {small:,} parameters of {teacher:,} ({small / teacher:.1%}), {gib(2 * small)} in bf16")
    if settings.student is not None:
        weights = count_parameters(load_shape(settings.student)).total
        print(f"The student that reads it: {weights:,} parameters, {gib(2 * weights)} in bf16")
    print(f"{settings.num_steps} steps of {settings.num_samples_per_step} prompts, lr {settings.optimization.lr:g}")
    for flag in ("output_dir", "prompt_cache"):
        check_writable(getattr(settings, flag), f"--{flag}")
    check_disk(Checkpoints(settings.output_dir, {}, settings.batch_size, settings.keep_checkpoints), settings)


def check_disk(checkpoints: Checkpoints, settings: EncoderSettings) -> None:
    """Refuse a run whose checkpoints the disk of --output_dir has no room for."""
    if settings.save_every:
        table = settings.shape["vocab_size"] * settings.shape["d_model"]  # multiplied out only when it is written
        weights = (
            num_parameters(settings.shape) - table + 2 * settings.encoder.umt5.text_dim * settings.shape["d_model"]
        )
        written = 2 * num_parameters(settings.shape)
        checkpoints.check_disk(4 * STATE_COPIES * weights, written, settings.overwrite)


def identity(settings: EncoderSettings) -> dict[str, object]:
    """Return what makes two runs the same one."""
    read = settings.student and digest_of([Path(settings.student) / WEIGHTS_NAME])
    return {
        "task": "text encoder",
        **{f"encoder {name}": value for name, value in settings.shape.items()},
        "teacher": settings.encoder.fingerprint(),
        "student": read,  # by its weights
        "prompts": prompts_digest(settings.prompts),
        "batch_size": settings.num_samples_per_step,
        "seed": settings.seed,
    }


def distil_text_encoder(settings: EncoderSettings) -> int:
    """Train the small encoder, or go on from its newest checkpoint, and write it; return the exit code."""
    with open_folder(settings, identity, check_disk) as folder:
        tokens, embeds = embed(settings)
        state, held_out = build(settings, tokens, embeds)
        _, folder = folder.load_newest(settings, lambda _: state)
        result = watched(settings, folder, state, held_out)
        if settings.processes.is_first:
            small: Any = state.trained.student
            small.save(folder.path, settings.encoder.tokenizer)
            print(f"{'Stopped at' if result.interrupted else 'Wrote'} {folder.path}, after {result.num_steps} steps")
            print(f"Give it to any command as --text_encoder_path {folder.path}")
    return 130 if result.interrupted else 0


def embed(settings: EncoderSettings) -> tuple[list[list[int]], PromptEmbeds]:
    """Return the tokens and the teacher's embeddings of all prompts, those that are measured on last."""
    texts = [*settings.prompts, *settings.held_out_prompts]
    processes = settings.processes
    how = settings.prompt_cache, EncodingOptions(TEXT_SLOTS, processes.device), print_encoding
    if processes.are_many:  # each fills its part of the cache
        own = texts[processes.rank :: processes.count]
        encode_prompts(own, settings.encoder, *how)
        processes.barrier()
    embeds = encode_prompts(texts, settings.encoder, *how)
    return token_ids(texts, settings.encoder, TEXT_SLOTS), embeds


def build(
    settings: EncoderSettings, tokens: list[list[int]], embeds: PromptEmbeds
) -> "tuple[RunState, HeldOutTexts | None]":
    """Cut the small encoder from the teacher, and build what it learns from and is measured on."""
    device, count = settings.processes.device, len(settings.prompts)
    reader = None
    if settings.student is not None:
        reader = TextReader(WanLiteStudent.from_pretrained(settings.student)).to(device)
    own = range(settings.batch_size * settings.processes.rank, settings.batch_size * (settings.processes.rank + 1))
    batches: Any = TextBatches(
        tokens[:count],
        embeds.part(0, count),
        own,
        settings.num_samples_per_step,
        seed=settings.seed,
        is_read=reader is not None,
        device=device,
    )
    teacher: Any = settings.encoder.umt5.load(EncodingOptions(TEXT_SLOTS, device).encoder_dtype)
    teacher.to(device)
    layers = spread_layers(teacher.config.num_layers, settings.shape["num_layers"])
    texts = [
        batches.of_prompts(range(start, min(start + AT_ONCE, count)))
        for start in range(0, min(count, CUT_PROMPTS), AT_ONCE)
    ]
    small: Any = cut_umt5(teacher, settings.shape, [(text.ids, text.mask) for text in texts], layers)
    del teacher  # but for its token table
    objective: Any = EncoderObjective(reader=reader, compute_dtype=settings.compute_dtype, device=device)
    trained = TrainedStudent(small, objective)
    state = RunState(trained, batches, settings.options, settings.processes)
    seen = {token for ids in tokens[:count] for token in ids}
    measured = TextBatches(tokens[count:], embeds.part(count, len(tokens) - count), range(0), 0, device=device)
    return state, HeldOutTexts(measured, seen) if len(tokens) > count else None


class HeldOutTexts:
    """Relative errors of the embeddings of held-out prompts: the mean over text tokens, and over those no training prompt has."""

    def __init__(self, batches: TextBatches, seen: set[int]):
        self.batches, self.seen = batches, seen

    @torch.no_grad()
    def __call__(self, student: SmallUmt5) -> dict[str, float]:
        errors, is_new = [], []
        with evaluation_mode(student):
            for index, ids in enumerate(self.batches.tokens):
                batch = self.batches.of_prompts([index])
                errors.append(token_errors(student(batch.ids, batch.mask), batch.embeds)[0, : len(ids)].sqrt().cpu())
                is_new.append(torch.tensor([token not in self.seen for token in ids]))
        found, new = torch.cat(errors), torch.cat(is_new)
        return {"embedding_error": float(found.mean())} | (
            {"new_word_error": float(found[new].mean())} if new.any() else {}
        )


class EncoderObserver(RunObserver):
    """Watches a run that learns texts: a text encoder draws nothing, and is measured on texts alone."""

    def evaluate(self, student: Any, stage: int) -> dict[str, float] | None:
        return None if self.held_out is None else cast(Any, self.held_out)(student)


def watched(settings: Any, folder: Folder, state: RunState, held_out: Any) -> TrainingResult:
    """Train with the progress shown and written down as that of any run."""
    processes = settings.processes
    if folder.resume_from is None:
        aside = processes.first_then_all(lambda: set_aside_previous_student(Path(folder.path), WRITTEN))
        if aside:
            print(f"What was in {folder.path} is now in {aside}")
    progress = Progress(settings.num_steps, folder.first_step) if processes.is_first else None
    with build_trackers(settings, folder) if processes.is_first else Trackers() as trackers:
        observer = EncoderObserver(progress, trackers, held_out)
        with observer.shown():
            return train(state, observer, folder.checkpoints)
