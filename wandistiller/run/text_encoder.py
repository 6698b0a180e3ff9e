"""A run that distils a small text encoder: its settings, and how it is built, trained and saved with the trainer's own loop."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from wandistiller.budget.report import gib
from wandistiller.device import pick_device, pick_dtype
from wandistiller.errors import UserError
from wandistiller.files.output_folder import check_output_folder, check_writable
from wandistiller.files.weights import digest_of
from wandistiller.model.config import WEIGHTS_NAME
from wandistiller.model.sizes import count_parameters
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import Processes, join
from wandistiller.projection.selection import spread_layers
from wandistiller.prompts.prompts import Prompts
from wandistiller.run.build import embed_together, print_encoding
from wandistiller.run.flags import EncoderFlags
from wandistiller.run.folder import open_folder
from wandistiller.run.held_out import NUM_MEASUREMENTS
from wandistiller.run.observers import RunObserver, watched
from wandistiller.run.resolve import given, suggested_warmup
from wandistiller.run.settings import of_fields
from wandistiller.students.record import load_shape
from wandistiller.training.loop import train
from wandistiller.training.objective import TrainedStudent
from wandistiller.training.optimizer import OptimizationOptions
from wandistiller.training.state import RunState, TrainingOptions
from wandistiller.training.text_encoder import EncoderObjective, TextBatches, TextReader, token_errors
from wandistiller.walk.draws import OTHER_WORDS, rng
from wandistiller.wan.small_umt5 import CONFIG_NAME, MODEL_NAME, SmallUmt5, cut_umt5, num_parameters, read_small_shape
from wandistiller.wan.text_encoder import EncodingOptions, encode_prompts, prompts_digest, token_ids
from wandistiller.wan.text_encoder_files import TextEncoderFiles, find_text_encoder, vocabulary
from wandistiller.wan.vae import count_vae_parameters

TEXT_SLOTS = 512  # of the released Wans
LR, LR_WIDTH = 2e-3, 64  # the rate of an encoder of this width; it falls with the root of the width
CUT_PROMPTS, AT_ONCE = 256, 8  # whose hidden states say which directions the small encoder keeps
OTHER_WORDS_SHARE = 0.2  # of the words of every prompt's second copy (docs/measurements.md)
WRITTEN = (CONFIG_NAME, MODEL_NAME, "tokenizer.json", "spiece.model")


@dataclass(frozen=True, kw_only=True)
class EncoderSettings(EncoderFlags):
    """Everything that the run needs to know. What is declared as a flag has the value that counts, typed or not."""

    report: ClassVar[str] = "none"

    encoder: TextEncoderFiles  # the teacher's
    shape: dict[str, Any]  # of the small encoder, as arguments of UMT5Config
    prompts: Prompts
    optimization: OptimizationOptions
    eval_every: int
    processes: Processes
    device: str
    compute_dtype: torch.dtype

    @property
    def num_steps(self) -> int:
        return self.max_steps

    @property
    def num_samples_per_step(self) -> int:
        """Prompts of a step, over all processes."""
        return self.batch_size * self.processes.count


def resolve(flags: EncoderFlags, prompts: Prompts) -> EncoderSettings:
    """Return the settings; every refusal that needs no weight comes here."""
    processes = join(flags.device, pick_device)
    encoder = find_text_encoder(flags.teacher_path)
    shape = read_small_shape(flags.text_encoder_config, encoder.umt5.shape)
    folder = check_output_folder(flags.output_dir)
    if folder.resolve() in (encoder.encoder.resolve(), encoder.encoder.parent.resolve()):
        raise UserError(f"--output_dir {folder}: is where the teacher's text encoder lies; give another folder")
    if encoder.umt5.text_dim != encoder.umt5.shape["d_model"]:
        raise UserError(f"--teacher_path {flags.teacher_path}: its text encoder is a small one itself; give the Wan's")
    if flags.student is not None and (config := load_shape(flags.student)):
        config.check_is_wan(f"--student {flags.student}", "has no cross-attention; leave it out")
        encoder.check_text_dim(config.text_encoder_output_dim)
        place = Path(flags.student)
        is_whole = flags.dry_run or (place / WEIGHTS_NAME).is_file()
        if not is_whole or folder.resolve() == place.resolve():
            raise UserError(f"--student {place}: must hold {WEIGHTS_NAME}, and not be the --output_dir")
    print("\n".join(prompts.lines))
    eval_every = given(flags.eval_every, math.ceil(flags.max_steps / NUM_MEASUREMENTS))
    return EncoderSettings(
        **vars(flags) | {"eval_every": eval_every, "device": processes.device},
        encoder=encoder,
        shape=shape,
        prompts=prompts,
        optimization=OptimizationOptions(
            lr=flags.lr or LR * (LR_WIDTH / shape["d_model"]) ** 0.5,
            lr_scheduler="cosine",
            lr_warmup_steps=suggested_warmup(flags.max_steps),
            ema_decay=0.999,
        ),
        processes=processes,
        compute_dtype=pick_dtype(flags.dtype, processes.device),
    )


def print_plan(settings: EncoderSettings) -> None:
    """Print what the small encoder is, and the sizes of the picture-maker that it is a part of."""
    small, teacher = num_parameters(settings.shape), settings.encoder.umt5.num_parameters
    print(f"Text encoder: {small:,} parameters of {teacher:,} ({small / teacher:.1%}), {gib(2 * small)} in bf16")
    if settings.student is not None:
        config = load_shape(settings.student)
        sizes = {
            "student": 2 * count_parameters(config).total,
            "text encoder": 2 * small,
            "VAE (fp32)": 4 * count_vae_parameters(settings.teacher_path, config.num_channels),
        }
        parts = ", ".join(f"{name} {gib(size)}" for name, size in sizes.items())
        print(f"With the student that reads it a pipeline in bf16 takes {gib(sum(sizes.values()))}: {parts}")
    changed = f"{len(settings.prompts.train):,} prompts, and each with {OTHER_WORDS_SHARE:.0%} of its words replaced"
    print(f"{changed}: {settings.num_steps} steps of {settings.num_samples_per_step}, lr {settings.optimization.lr:g}")
    for flag in ("output_dir", "prompt_cache"):
        check_writable(getattr(settings, flag), f"--{flag}")


def identity(settings: EncoderSettings) -> dict[str, object]:
    """Return what makes two runs the same one."""
    read = settings.student and digest_of([Path(settings.student) / WEIGHTS_NAME])
    return {
        "task": "text encoder",
        **{f"encoder {name}": value for name, value in settings.shape.items()},
        "teacher": settings.encoder.fingerprint(),
        "student": read,  # by its weights
        "prompts": prompts_digest(settings.prompts.train),
        "share of other words": OTHER_WORDS_SHARE,
        "batch_size": settings.num_samples_per_step,
        "seed": settings.seed,
    }


def distil_text_encoder(settings: EncoderSettings) -> int:
    """Train the small encoder, or go on from its newest checkpoint, and write it; return the exit code."""
    processes = settings.processes
    with open_folder(settings, identity(settings)) as checkpoints:
        state, held_out = build(settings)
        if checkpoints.resume_from is not None:
            state.load(checkpoints.resume_from)
        with watched(settings, checkpoints, WRITTEN) as (progress, trackers):
            observer = RunObserver(progress, trackers, held_out)
            small: Any = state.trained.student
            with observer.shown():
                result = train(state, observer, checkpoints)
        if processes.is_first:
            folder = Path(settings.output_dir)
            small.save(folder, settings.encoder.tokenizer)
            print(f"{'Stopped at' if result.interrupted else 'Wrote'} {folder}, after {result.num_steps} steps")
            print(f"Give it to any command as --text_encoder_path {folder}")
    return 130 if result.interrupted else 0


def build(settings: EncoderSettings) -> "tuple[RunState, HeldOutTexts | None]":
    """Cut the small encoder from the teacher, and build what it learns from and is measured on."""
    device, prompts = settings.device, settings.prompts.train
    train_texts = prompts + with_other_words(prompts, vocabulary(settings.encoder.tokenizer), settings.seed)
    texts, count = train_texts + (settings.prompts.held_out if settings.eval_every else []), len(train_texts)
    encoding = EncodingOptions(TEXT_SLOTS, device)
    given = settings.encoder, settings.prompt_cache, encoding, print_encoding
    embeds = embed_together(settings.processes, texts, lambda part: encode_prompts(part, *given))
    tokens = token_ids(texts, settings.encoder, TEXT_SLOTS)
    reader = None
    if settings.student is not None:
        reader = TextReader(WanLiteStudent.from_pretrained(settings.student)).to(device)
    start, total = settings.batch_size * settings.processes.rank, settings.num_samples_per_step
    slots = range(start, start + settings.batch_size)
    how: dict[str, Any] = {"seed": settings.seed, "is_read": reader is not None, "device": device}
    batches: Any = TextBatches(tokens[:count], embeds.part(0, count), slots, total, **how)
    teacher: Any = settings.encoder.umt5.load(encoding.encoder_dtype)
    teacher.to(device)
    layers = spread_layers(teacher.config.num_layers, settings.shape["num_layers"])
    parts = torch.arange(0, count, math.ceil(count / CUT_PROMPTS)).split(AT_ONCE)
    cut_by = [(batch.ids, batch.mask) for batch in (batches.of_prompts(part.tolist()) for part in parts)]
    small: Any = cut_umt5(teacher, settings.shape, cut_by, layers)
    del teacher  # but for its token table
    objective: Any = EncoderObjective(reader=reader, compute_dtype=settings.compute_dtype, device=device)
    trained = TrainedStudent(small, objective)
    options = TrainingOptions(**of_fields(TrainingOptions, settings))
    state = RunState(trained, batches, options, settings.processes)
    seen = {token for ids in tokens[: len(prompts)] for token in ids}
    measured = TextBatches(tokens[count:], embeds.part(count, len(tokens) - count), range(0), 0, device=device)
    return state, HeldOutTexts(measured, seen) if len(tokens) > count else None


def with_other_words(prompts: Sequence[str], words: Sequence[str], seed: int) -> list[str]:
    """Return the prompts with some of their words replaced by any others, so that the encoder meets words that no prompt has."""
    draws = rng(seed, 0, OTHER_WORDS)

    def word_or_another(word: str) -> str:
        return words[int(draws.integers(len(words)))] if draws.random() < OTHER_WORDS_SHARE else word

    return [" ".join(word_or_another(word) for word in prompt.split(" ")) for prompt in prompts]


class HeldOutTexts:
    """Relative errors of the embeddings of held-out prompts: the mean over text tokens, and over those no training prompt has."""

    def __init__(self, batches: TextBatches, seen: set[int]):
        self.batches, self.seen = batches, seen

    @torch.no_grad()
    def __call__(self, student: SmallUmt5, _: None = None) -> dict[str, float]:
        errors, is_new = [], []
        for index, ids in enumerate(self.batches.tokens):
            batch = self.batches.of_prompts([index])
            errors.append(token_errors(student(batch.ids, batch.mask), batch.embeds)[0, : len(ids)].sqrt().cpu())
            is_new.append(torch.tensor([token not in self.seen for token in ids]))
        found, new = torch.cat(errors), torch.cat(is_new)
        return {"embedding_error": float(found.mean())} | (
            {"new_word_error": float(found[new].mean())} if new.any() else {}
        )
