"""What a run is built of: embeddings, teacher, student, answers and objective."""

import contextlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.device import DTYPES
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.project import ProjectionReport, fresh_student, project_experts, project_teacher
from wandistiller.projection.selection import spread_layers
from wandistiller.reports.progress import Countdown
from wandistiller.run.caches import asking_line, cached_batches, in_turn_with_builders
from wandistiller.run.held_out import has_states, held_out_states, keep_states
from wandistiller.run.reach import reachable_prompts
from wandistiller.run.run import Run
from wandistiller.sampling.teacher import Teacher
from wandistiller.targets.answers import NO_HIDDEN_STATES, Answers, HiddenStates, TeacherAnswers
from wandistiller.targets.cache import CachedAnswers, TeacherCache
from wandistiller.targets.cache_builders import Filling, fill_together
from wandistiller.targets.cache_parts import CachePart
from wandistiller.targets.replay import ReplayedAnswers
from wandistiller.targets.segments import SegmentAnswers, SegmentOptions
from wandistiller.targets.shares import Share
from wandistiller.targets.sizes_in_turn import SizesInTurn
from wandistiller.targets.state_batch import DrawOptions
from wandistiller.targets.states import draws_by_size, states_of, teacher_levels
from wandistiller.training.checkpoints import DamagedCheckpointError
from wandistiller.training.feature_loss import FeatureLoss, span_ends
from wandistiller.training.loop import Saving
from wandistiller.training.objective import Objective, TrainedStudent
from wandistiller.training.state import RunState
from wandistiller.wan.prompt_embeds import Embeds, PromptEmbeds
from wandistiller.wan.text_encoder import embed_texts

logger = logging.getLogger(__name__)

# What one builder of a teacher cache at a time does for all, and locks while it does:
ENCODING_LOCK, HELD_OUT_LOCK = ".encoding.lock", ".held_out.lock"


# ---- text ----


def embed_prompts(run: Run) -> Embeds:
    """Embed every prompt that the run can come to, and the negative prompt where guidance needs it.

    The encoder has left memory on return.
    """
    settings, trained = run.settings, run.trained_texts
    negative_prompts = [settings.negative_prompt] if settings.uses_guidance else []
    reached = reachable_prompts(run)
    everything = [*(trained[index] for index in reached), *run.held_out_texts, *negative_prompts]
    embeds = _embed_shared(run, everything)
    if embeds.truncated:
        print(f"Warning: {embeds.truncated} prompts are longer than {run.config.text_max_length} tokens and were cut")
    negative = embeds.read(len(everything) - 1) if settings.uses_guidance else None
    logger.info("prompts encoded, or found in their cache")
    own = embeds.first(len(reached))
    if len(reached) < len(trained):
        # A state that a longer run has left may hold prompts that this one would not come to:
        own = own.placed(reached, len(trained), lambda index: _embed(run, [trained[index]]).read(0))
    return Embeds(own, embeds.part(len(reached), len(run.held_out_texts)), negative)


def _embed_shared(run: Run, texts: list[str]) -> PromptEmbeds:
    """Encode this process's share of the texts into the cache, and read all of them back."""
    if run.encoder is not None:
        lock = Path(run.flags.data.prompt_cache) / ENCODING_LOCK
        with contextlib.nullcontext() if run.has_all_answers else in_turn_with_builders(run, lock, "the prompts"):
            _embed(run, texts[run.processes.rank :: run.processes.count])
        run.processes.barrier()
    return _embed(run, texts)


def _embed(run: Run, texts: list[str]) -> PromptEmbeds:
    """Encode the texts into the cache, as far as they are not there yet, and read them from it."""
    return embed_texts(texts, run.encoder, run.config, run.flags.data.prompt_cache, run.device, progress=print_encoding)


def print_encoding(done: int, total: int) -> None:
    """Print how many prompts are encoded, now and then."""
    if done == total or done % 500 == 0:
        print(f"Encoding prompts: {done}/{total}", flush=True)


# ---- teacher and student ----


def load_teacher(run: Run, embeds: Embeds) -> Teacher | None:
    """Load the teacher, which fills the cache that the run asks for; return None where the run does without it from there on."""
    is_only, is_offline = run.flags.states.cache_only, run.flags.states.offline_teacher
    if run.has_all_answers and is_offline and not is_only:
        return None
    teacher = build_teacher(run, embeds.negative)
    logger.info("teacher read and projected")
    if not run.has_all_answers:
        fill_caches(run, embeds, teacher)
    if is_offline or is_only:
        with in_turn_with_builders(run, run.caches[0].folder / HELD_OUT_LOCK, "the held-out states"):
            keep_states(run, held_out_states(run, embeds, teacher))
        run.processes.barrier()  # all of them read what the first one has written
    return None if is_offline or is_only else teacher


def fill_only(run: Run) -> None:
    """Ask the teacher for what its caches lack, and for what runs that learn from them offline measure their students with."""
    if not run.has_all_answers or not has_states(run):
        load_teacher(run, embed_prompts(run))


def fill_caches(run: Run, embeds: Embeds, teacher: Teacher) -> None:
    """Ask the teacher for everything that is to lie in its caches, together with whatever other builders there are."""

    def filling(index: int, cache: TeacherCache) -> Filling:
        num_batches = cached_batches(run, Share(index, len(run.caches)))

        def answers_of(part: CachePart) -> TeacherAnswers:
            return live_answers(run, embeds, teacher, part=(part.index, max(1, len(cache.parts))))[index]

        def on_part(part: CachePart) -> Countdown:
            print(asking_line(cache, part, num_batches), flush=True)
            return Countdown("Teacher's answers", part.num_batches or num_batches)

        return Filling(cache, num_batches, answers_of, on_part)

    fillings = [filling(index, cache) for index, cache in enumerate(run.caches)]
    if run.processes.are_many:
        for each in fillings:
            if not each.cache.is_complete:
                part = each.cache.own_part
                each.cache.build(each.answers_of(part), each.num_batches, each.on_part(part))
    else:
        fill_together(fillings, lambda text: print(f"Waiting for other builders of {text}", flush=True))
    logger.info("answers of the teacher written to its cache")


def build_teacher(run: Run, negative_prompt_embeds: Tensor | None) -> Teacher:
    """Build the teacher: all of the Wan in 2D, its weights kept as the flags say."""
    performance, processes = run.flags.performance, run.processes
    is_fp8 = performance.teacher_dtype == "fp8"
    is_sharded = performance.shards_teacher and processes.can_shard
    experts = project_experts(
        run.wan_files,
        run.config.text_max_length,
        run.dtype if is_fp8 else DTYPES[performance.teacher_dtype],
        "cpu" if performance.teacher_offload else processes.device,
        fp8=is_fp8,
        shard=processes.shard if is_sharded else None,
    )
    return Teacher(
        experts,
        run.settings,
        negative_prompt_embeds,
        processes.device if performance.teacher_offload else None,
        processes.any_true if is_sharded else bool,
    )


def make_student(run: Run) -> tuple[WanLiteStudent, ProjectionReport]:
    """Make what is trained: a part of the teacher, or a student that inherits nothing."""
    flags = run.flags
    device, seed = run.device, flags.optimization.seed
    if flags.student.init == "random":
        student, report = fresh_student(run.wan_files, run.config, flags.student.init_expert, device=device, seed=seed)
    else:
        student, report = project_teacher(
            run.wan_files,
            run.config,
            flags.student.init_expert,
            layers=flags.student.layers,
            device=device,
            seed=seed,
        )
    print(report.summary())
    logger.info("student read and projected")
    student.gradient_checkpointing = flags.performance.gradient_checkpointing
    return student, report


def compile_and_shard(run: Run, student: WanLiteStudent, teacher: Teacher | None, objective: Objective) -> None:
    """Compile the models' blocks and shard the student, where the flags ask for it."""
    performance, processes = run.flags.performance, run.processes
    if performance.compile:
        compile_blocks([student, *(teacher.experts.values() if teacher else [])])
    if performance.shard and not processes.can_shard:
        print("--shard is of no use to a process by itself; start several with torchrun --nproc_per_node N")
    if performance.shards_student:
        processes.shard(student)
        processes.shard(objective.feature_loss)


def compile_blocks(models: Iterable[WanLiteStudent]) -> None:
    """torch.compile each block in place: one graph serves all blocks of a model, and names of weights stay."""
    for model in models:
        for block in model.blocks:
            block.compile()


# ---- answers and objective ----


def build_objective(run: Run, projection: ProjectionReport) -> Objective:
    """Build the loss, with the maps of hidden states that it learns beside the student."""
    flags, config, teacher = run.flags, run.config, run.wan_files.config
    feature_loss = None
    if flags.objective.feature_loss_weight:
        has_maps = hidden_states(run, projection).channels is None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(flags.optimization.seed)  # maps that are learnt start the same in every process
            feature_loss = FeatureLoss(config.hidden_size, teacher.hidden_size, config.depth, has_maps).to(run.device)
    return Objective(
        shift=run.settings.shift,
        sigma_weighting=flags.objective.sigma_weighting,
        feature_loss=feature_loss,
        feature_weight=flags.objective.feature_loss_weight,
        compute_dtype=run.dtype,
        device=run.device,
    )


def hidden_states(run: Run, projection: ProjectionReport) -> HiddenStates:
    """Return which of the teacher's hidden states the objective compares; none where it compares none.

    They are of the channels that the student has, or of all where it has none of the teacher's.
    """
    if not run.flags.objective.feature_loss_weight:
        return NO_HIDDEN_STATES
    depth = run.wan_files.config.depth
    layers = span_ends(projection.layers or spread_layers(depth, run.config.depth), depth)
    return HiddenStates(layers, projection.channels or None if run.config.block == "wan" else None)


def build_answers(
    run: Run, embeds: Embeds, teacher: Teacher | None, student: WanLiteStudent, projection: ProjectionReport
) -> Answers:
    """Build what the student learns from: the cache, whole segments of the teacher's paths, or the teacher itself, once or more.

    The answers bring along the hidden states that the objective compares; `projection` says of which layers and channels.
    """
    by_size: Sequence[Answers]
    if run.caches:
        by_size = cached_answers(run, embeds)
    elif run.flags.objective.student_steps:
        by_size = segment_answers(run, embeds, teacher, student)
    else:
        by_size = live_answers(run, embeds, teacher, projection)
    if run.flags.states.replay > 1 and not run.caches:
        by_size = replayed_answers(run, embeds, by_size)
    return by_size[0] if len(by_size) == 1 else SizesInTurn(by_size)


def cached_answers(run: Run, embeds: Embeds) -> list[CachedAnswers]:
    """Build the teacher's answers on disk, those of each image size."""
    seed, count = run.flags.optimization.seed, len(run.caches)
    return [
        CachedAnswers(cache, embeds.trained, run.lanes, run.device, Share(index, count).seed(seed))
        for index, cache in enumerate(run.caches)
    ]


def replayed_answers(run: Run, embeds: Embeds, by_size: Sequence[Answers]) -> list[ReplayedAnswers]:
    """Build the store that the answers of each image size are learnt from again."""
    replay, seed = run.flags.states.replay, run.flags.optimization.seed
    parts = [Share(index, len(by_size)) for index in range(len(by_size))]
    return [
        ReplayedAnswers(answers, embeds.trained, replay, part.of(run.num_steps), seed, run.device, part)
        for part, answers in zip(parts, by_size, strict=True)
    ]


def live_answers(
    run: Run,
    embeds: Embeds,
    teacher: Teacher,
    projection: ProjectionReport | None = None,
    part: tuple[int, int] = (0, 1),
) -> list[TeacherAnswers]:
    """Build the teacher's answers at the states that the flags ask for, those of each image size.

    Args:
        part: number and count, where the answers are those of a part of a cache.
    """
    num_prompts = len(run.texts.prompts)
    draws = draws_by_size(
        run.states_options, run.latent_shapes, run.settings, num_prompts, run.lanes, run.device, run.num_used
    )
    return [
        TeacherAnswers(
            teacher,
            states_of(run.states_options, draw.of_part(*part), run.settings),
            embeds.trained,
            run.device,
            run.dtype,
            hidden_states=hidden_states(run, projection) if projection else NO_HIDDEN_STATES,
            student_rollout=run.flags.states.student_rollout,
        )
        for draw in draws
    ]


def segment_answers(run: Run, embeds: Embeds, teacher: Teacher, student: WanLiteStudent) -> list[SegmentAnswers]:
    """Build the teacher's answers over whole segments of its paths, of each image size, for a student of --student_steps."""
    flags, shapes = run.flags, run.latent_shapes
    segments = SegmentOptions(
        num_segments=flags.objective.student_steps,
        num_teacher_steps=run.settings.num_inference_steps,
        student_rollout=flags.states.student_rollout,
        compute_dtype=run.dtype,
    )
    draws = [
        DrawOptions(
            latent_shape=shape,
            num_prompts=len(run.texts.prompts),
            lanes=run.lanes,
            shift=run.settings.shift,
            levels=teacher_levels(run.settings),
            seed=flags.optimization.seed,
            device=run.device,
            num_used=run.num_used,
            share=Share(index, len(shapes)),
        )
        for index, shape in enumerate(shapes)
    ]
    return [SegmentAnswers(teacher, student, embeds.trained, draw, segments) for draw in draws]


# ---- the state to resume from ----


def resume(run: Run, student: WanLiteStudent, objective: Objective, answers: Answers) -> tuple[Run, Saving]:
    """Load the newest checkpoint that holds the state of this run; return the run that resumes from it, with that state.

    A checkpoint can be damaged though its checksums are right, and then the one before it is loaded.

    Raises:
        UserError: none of the checkpoints can be loaded.
    """
    if run.resume_from is None:
        return run, Saving(run.checkpoints)
    options = run.training_options
    state = RunState(
        TrainedStudent(student, objective), answers, options.optimization, options.num_steps, run.processes
    )
    while True:
        try:
            state.load(run.resume_from)
        except DamagedCheckpointError as error:
            run.checkpoints.tell_of_damage(run.resume_from.folder, str(error))
            run = run.going_on_from(run.checkpoints.newest(before=run.resume_from.step))
        else:
            return run, Saving(run.checkpoints, state)
