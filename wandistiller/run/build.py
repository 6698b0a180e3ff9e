"""What a run is built of: embeddings, teacher, student, objective and batches."""

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from wandistiller.device import DTYPES
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.project import ProjectionReport, fresh_student, project_experts, project_teacher
from wandistiller.projection.selection import spread_layers
from wandistiller.run.folder import Folder
from wandistiller.run.held_out import build_measure
from wandistiller.run.learning import build_batches, fill_caches
from wandistiller.run.settings import Settings
from wandistiller.sampling.teacher import Teacher
from wandistiller.training.checkpoints import DamagedCheckpointError
from wandistiller.training.feature_loss import FeatureLoss, span_ends
from wandistiller.training.loop import Saving
from wandistiller.training.objective import Objective, TrainedStudent
from wandistiller.training.state import RunState
from wandistiller.walk.batches import Batches
from wandistiller.walk.cache import TeacherCache
from wandistiller.walk.walk import NO_HIDDEN_STATES, HiddenStates
from wandistiller.wan.prompt_embeds import Embeds, PromptEmbeds
from wandistiller.wan.text_encoder import embed_texts

logger = logging.getLogger(__name__)


# ---- text ----


def embed_prompts(settings: Settings) -> Embeds:
    """Embed the prompts of the run, those that it measures on, and the negative prompt where guidance needs it.

    The text encoder has left memory on return.
    """
    prompts, held_out = settings.prompts, settings.held_out_prompts
    negative_prompts = [settings.teacher.negative_prompt] if settings.teacher.uses_guidance else []
    texts = [*prompts, *held_out, *negative_prompts]
    processes = settings.processes
    if settings.encoder is not None and processes.are_many:
        _embed(settings, texts[processes.rank :: processes.count])
        processes.barrier()
    embeds = _embed(settings, texts)
    if embeds.truncated:
        print(
            f"Warning: {embeds.truncated} prompts are longer than {settings.config.text_max_length} tokens and were cut"
        )
    negative = embeds.read(len(texts) - 1) if negative_prompts else None
    logger.info("prompts encoded, or found in their cache")
    return Embeds(embeds.part(0, len(prompts)), embeds.part(len(prompts), len(held_out)), negative)


def _embed(settings: Settings, texts: list[str]) -> PromptEmbeds:
    """Encode the texts into the cache, as far as they are not there yet, and read them from it."""
    return embed_texts(
        texts, settings.encoder, settings.config, settings.prompt_cache, settings.device, progress=print_encoding
    )


def print_encoding(done: int, total: int) -> None:
    """Print how many prompts are encoded, now and then."""
    if done == total or done % 500 == 0:
        print(f"Encoding prompts: {done}/{total}", flush=True)


# ---- teacher and student ----


def load_teacher(settings: Settings, embeds: Embeds, caches: Sequence[TeacherCache]) -> Teacher | None:
    """Load the teacher, which fills the caches; return None where the student trains without it in memory."""
    has_all_answers = bool(caches) and all(cache.is_complete for cache in caches)
    if has_all_answers and settings.offline_teacher:
        return None
    teacher = build_teacher(settings, embeds.negative)
    logger.info("teacher read and projected")
    if not has_all_answers:
        fill_caches(settings, caches, embeds.trained, teacher)
        logger.info("answers of the teacher written to its cache")
    if not settings.offline_teacher:
        return teacher
    build_measure(settings, embeds, teacher)  # which keeps its states in the cache's folder
    settings.processes.barrier()  # all of them read what the first one has written
    return None


def fill_part(settings: Settings, caches: Sequence[TeacherCache]) -> None:
    """Ask the teacher for one part of what its caches lack (--cache_part); the first part's builder keeps held-out states too."""
    embeds = embed_prompts(settings)
    teacher = build_teacher(settings, embeds.negative)
    fill_caches(settings, caches, embeds.trained, teacher)
    if settings.cache_part[0] == 1:
        build_measure(settings, embeds, teacher)


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
    return Teacher(
        experts,
        settings.teacher,
        negative_prompt_embeds,
        processes.device if settings.teacher_offload else None,
        processes.any_true if is_sharded else bool,
    )


def make_student(settings: Settings) -> tuple[WanLiteStudent, ProjectionReport]:
    """Make what is trained: a part of the teacher, or a student that inherits nothing."""
    device, seed = settings.device, settings.seed
    if settings.init == "random":
        student, report = fresh_student(
            settings.wan_files, settings.config, settings.init_expert, device=device, seed=seed
        )
    else:
        student, report = project_teacher(
            settings.wan_files,
            settings.config,
            settings.init_expert,
            layers=settings.layers,
            device=device,
            seed=seed,
        )
    print(report.summary())
    logger.info("student read and projected")
    student.gradient_checkpointing = settings.gradient_checkpointing
    return student, report


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


def build_objective(settings: Settings, projection: ProjectionReport) -> Objective:
    """Build the loss, with the maps of hidden states that it learns beside the student."""
    config, teacher = settings.config, settings.wan_files.config
    feature_loss = None
    if settings.feature_loss_weight:
        has_maps = hidden_states(settings, projection).channels is None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # maps that are learnt start the same in every process
            feature_loss = FeatureLoss(config.hidden_size, teacher.hidden_size, config.depth, has_maps).to(
                settings.device
            )
    return Objective(
        feature_loss=feature_loss,
        feature_weight=settings.feature_loss_weight,
        compute_dtype=settings.compute_dtype,
        device=settings.device,
    )


def hidden_states(settings: Settings, projection: ProjectionReport) -> HiddenStates:
    """Return which of the teacher's hidden states the objective compares; none where it compares none.

    They are of the channels that the student has, or of all where it has none of the teacher's.
    """
    if not settings.feature_loss_weight:
        return NO_HIDDEN_STATES
    depth = settings.wan_files.config.depth
    layers = span_ends(projection.layers or spread_layers(depth, settings.config.depth), depth)
    return HiddenStates(layers, projection.channels or None if settings.config.block == "wan" else None)


def build_learning(
    settings: Settings,
    caches: Sequence[TeacherCache],
    embeds: Embeds,
    teacher: Teacher | None,
    student: WanLiteStudent,
    projection: ProjectionReport,
) -> Batches:
    """Build what each step learns from, with the hidden states that the objective compares."""
    return build_batches(settings, caches, embeds.trained, teacher, student, hidden_states(settings, projection))


# ---- the state to resume from ----


def resume(
    settings: Settings, folder: Folder, student: WanLiteStudent, objective: Objective, batches: Batches
) -> tuple[Folder, Saving]:
    """Load the newest checkpoint that holds the state of this run; return the folder at it, with that state.

    A checkpoint can be damaged though its checksums are right, and then the one before it is loaded.

    Raises:
        UserError: none of the checkpoints can be loaded.
    """
    if folder.resume_from is None:
        return folder, Saving(folder.checkpoints)
    options = settings.training_options
    state = RunState(
        TrainedStudent(student, objective), batches, options.optimization, options.num_steps, settings.processes
    )
    while True:
        try:
            state.load(folder.resume_from)
        except DamagedCheckpointError as error:
            folder.checkpoints.tell_of_damage(folder.resume_from.folder, str(error))
            folder = folder.resuming_from(folder.checkpoints.newest(before=folder.resume_from.step), settings)
        else:
            return folder, Saving(folder.checkpoints, state)
