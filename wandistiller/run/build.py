"""What a run is built of: embeddings, teacher, student, objective and batches."""

import gc
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from wandistiller.device import DTYPES
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import Processes
from wandistiller.projection.lora import cut_loras
from wandistiller.projection.project import ProjectionReport, fresh_student, project_experts, project_teacher
from wandistiller.projection.selection import select
from wandistiller.projection.selection_record import composed, selection_record
from wandistiller.run.headers import Source
from wandistiller.run.learning import fill_caches
from wandistiller.run.settings import Settings
from wandistiller.sampling.streaming import StreamedBlocks, num_rooms
from wandistiller.sampling.teacher import Teacher
from wandistiller.training.lora import add_lora
from wandistiller.training.objective import FeatureLoss, Objective
from wandistiller.walk.cache import TeacherCache
from wandistiller.wan.prompt_embeds import Embeds, PromptEmbeds
from wandistiller.wan.text_encoder import embed_texts

# ---- text ----


def embed_prompts(settings: Settings) -> Embeds:
    """Embed the prompts of the run, those that it measures on or draws, and the negative prompt where guidance needs it.

    The text encoder has left memory on return.
    """
    parts = [settings.prompts, settings.held_out_prompts, settings.sample_prompts]
    negative_prompts = [settings.teacher.negative_prompt] if settings.teacher.uses_guidance else []
    texts = [*itertools.chain(*parts), *negative_prompts]
    how = settings.encoder, settings.config, settings.prompt_cache, settings.device, print_encoding
    embeds = embed_together(settings.processes, texts, lambda part: embed_texts(part, *how))
    embeds.warn_of_cuts(settings.config.text_max_length)
    negative = embeds.read(len(texts) - 1) if negative_prompts else None
    starts = itertools.accumulate(map(len, parts), initial=0)
    trained, held_out, samples = (embeds.part(start, len(part)) for start, part in zip(starts, parts, strict=False))
    return Embeds(trained, held_out, samples, negative)


def embed_together(processes: Processes, texts: list[str], embed: Callable[[list[str]], PromptEmbeds]) -> PromptEmbeds:
    """Embed texts that all processes need: each encodes a part into the cache, from which all read."""
    if processes.are_many:
        embed(texts[processes.rank :: processes.count])
        processes.barrier()
    return embed(texts)


def print_encoding(done: int, total: int) -> None:
    if done == total or done % 500 == 0:
        print(f"Encoding prompts: {done}/{total}", flush=True)


# ---- teacher and student ----


def load_teacher(settings: Settings, embeds: Embeds, caches: Sequence[TeacherCache]) -> Teacher | None:
    """Load the teacher, which fills its part of the caches; return None where it is not needed in memory any more."""
    has_all_answers = bool(caches) and all(cache.is_complete for cache in caches)
    if has_all_answers and settings.offline_teacher:
        return None
    teacher = build_teacher(settings, embeds.negative)
    if not has_all_answers:
        fill_caches(settings, caches, embeds.trained, teacher)
    if not settings.offline_teacher:
        return teacher
    del teacher
    gc.collect()  # streamed blocks are in a cycle with their hooks
    return None


def build_teacher(settings: Settings, negative_prompt_embeds: Tensor | None) -> Teacher:
    """Build the teacher: all of the Wan in 2D, its weights kept as the flags say."""
    processes = settings.processes
    is_fp8 = settings.teacher_dtype == "fp8"
    is_sharded = settings.shard_teacher and processes.can_shard
    experts = project_experts(
        settings.wan_files,
        settings.config.text_max_length,
        settings.compute_dtype if is_fp8 else DTYPES[settings.teacher_dtype],
        "cpu" if settings.teacher_offload else processes.device,
        fp8=is_fp8,
        shard=processes.shard if is_sharded else None,
    )
    if settings.teacher_offload:
        StreamedBlocks(experts, processes.device, num_rooms(settings.teacher_offload, settings.wan_files.config.depth))
    any_process = processes.any_true if is_sharded else bool
    return Teacher(experts, settings.teacher, negative_prompt_embeds, any_process)


def make_student(settings: Settings) -> tuple[WanLiteStudent, ProjectionReport]:
    """Make what is trained: a part of the teacher or of another Wan, or a student that inherits nothing."""
    device, seed, source = settings.device, settings.seed, settings.source
    if settings.init_from == "random":
        student, report = fresh_student(
            settings.wan_files, settings.config, settings.init_expert, device=device, seed=seed
        )
    elif source is not None:
        student, report = cut_from(source, settings)
    else:
        student, report = project_teacher(
            settings.wan_files, settings.config, settings.init_expert, layers=settings.layers, device=device, seed=seed
        )
    print(report.summary())
    if settings.is_lora:
        add_lora(student, settings.lora_rank, settings.lora_alpha, seed=seed, start=cut_of_lora(settings))
    student.gradient_checkpointing = settings.gradient_checkpointing
    return student, report


def cut_from(source: Source, settings: Settings) -> tuple[WanLiteStudent, ProjectionReport]:
    """Cut a student from another one or from a Wan; the report tells which part it has of what that one was cut from itself."""
    expert = source.wan_files.expert(source.expert)
    selection = select(expert, settings.config, settings.layers)
    student, report = project_teacher(
        source.wan_files, settings.config, source.expert, device=settings.device, selection=selection
    )
    whole = composed(source.part, selection)
    report.layers = whole.layers
    report.channels = whole.axes.get("channels", torch.arange(source.shape.hidden_size)).tolist()
    report.selection = selection_record(source.shape, whole)
    return student, report


def cut_of_lora(settings: Settings) -> Mapping[str, Tensor | tuple[Tensor, Tensor]] | None:
    """Return what the student's part of the teacher's LoRAs changes in each of its matrices; None where that cannot be cut."""
    loras = [lora for lora in settings.wan_files.loras if lora.expert == settings.source.expert]
    is_like = settings.source.is_like(settings.wan_files.config)
    if not (loras and is_like) or any(lora.magnitudes for lora in loras):
        why = "its lengths are those of the teacher's rows" if loras else "that expert of the teacher has none"
        print(f"The LoRA begins with no change: {why if is_like else 'the student is no part of this teacher'}")
        return None
    cut = cut_loras(loras, settings.source.part, settings.config)
    if cut.dropped:
        print(f"The LoRA begins without {len(cut.dropped)} tensors of layers that the student does not have")
    matrices = [*cut.low_rank, *(name for name, change in cut.differences.items() if change.ndim == 2)]
    in_blocks = [name for name in matrices if name.startswith("blocks.")]
    if others := sorted({*cut.low_rank, *cut.differences}.difference(in_blocks)):
        print(f"The LoRA begins without what changes no matrix of a block ({len(others)}, such as {others[0]})")
    return cut.low_rank | {name: cut.delta(name) for name, change in cut.differences.items() if change.ndim == 2}


def compile_and_shard(
    settings: Settings, student: WanLiteStudent, teacher: Teacher | None, objective: Objective
) -> None:
    """Compile the models' blocks and shard the student, where the flags ask for it."""
    processes = settings.processes
    if settings.compile:
        compile_blocks([student, *(teacher.experts.values() if teacher else [])])
    if (settings.shard_teacher or settings.shard_student) and not processes.can_shard:
        print("--shard is of no use to a single process; start several with torchrun --nproc_per_node N")
    if settings.shard_student:
        processes.shard(student)
        processes.shard(objective.feature_loss)


def compile_blocks(models: Iterable[WanLiteStudent], **options: object) -> None:
    """torch.compile each block in place: one graph serves all blocks of a model, and names of weights stay."""
    for model in models:
        for block in model.blocks:
            block.compile(**options)


# ---- objective and batches ----


def build_objective(settings: Settings) -> Objective:
    """Build the loss, with the maps of hidden states that it learns beside the student."""
    config, feature_loss = settings.config, None
    if settings.feature_loss_weight:
        feature_loss = FeatureLoss(config.hidden_size, config.depth).to(settings.device)
    return Objective(
        feature_loss=feature_loss,
        feature_weight=settings.feature_loss_weight,
        compute_dtype=settings.compute_dtype,
        device=settings.device,
    )
