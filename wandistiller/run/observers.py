"""Who watches a run: the terminal, its own files, trackers, held-out errors and sample pictures, as one observer of the loop."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wandistiller.files.atomic import write_text
from wandistiller.files.output_folder import (
    LOSS_PLOT_NAME,
    METRICS_NAME,
    RUN_NAME,
    SAMPLES_NAME,
    TENSORBOARD_NAME,
    has_mark,
    set_aside_previous_student,
)
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.reports.plots import LossPlot
from wandistiller.reports.progress import Progress
from wandistiller.reports.samples import Samples
from wandistiller.reports.trackers import MetricsFile, RunTracker, TensorBoardFiles, Tracker, Trackers
from wandistiller.run.held_out import build_measure
from wandistiller.run.settings import Settings
from wandistiller.sampling.sampler import SamplingOptions
from wandistiller.sampling.teacher import Teacher
from wandistiller.step_metrics import StepMetrics
from wandistiller.training.checkpoints import Checkpoints
from wandistiller.training.loop import Observer
from wandistiller.wan.prompt_embeds import Embeds


@dataclass
class RunObserver(Observer):
    """Hands what the loop tells to those who want it; what is None is not done."""

    progress: Progress | None  # in the process that prints
    trackers: Trackers  # told of every step and picture
    held_out: Callable[..., dict[str, float]] | None  # measures the student, in the second stage as it draws then
    samples: Samples | None = None
    student_sampling: SamplingOptions | None = None  # of the saved student, and so of the second stage

    def shown(self) -> contextlib.AbstractContextManager:
        """While the loop runs: the progress bar is there."""
        return contextlib.nullcontext() if self.progress is None else self.progress

    def step(self, metrics: StepMetrics) -> None:
        self.trackers.step(metrics)
        if self.progress is not None:
            self.progress.step(metrics)

    def evaluate(self, student: WanLiteStudent, stage: int) -> dict[str, float] | None:
        if self.held_out is None:
            return None
        return self.held_out(student, self.student_sampling if stage == 2 else None) or None

    def draw(self, student: WanLiteStudent, step: int) -> None:
        if self.samples is not None and (file := self.samples(student, step)):
            tqdm.write(f"step {step}: pictures in {file}", file=sys.stderr)

    def draw_last(self, student: WanLiteStudent, step: int) -> None:
        if (samples := self.samples) is None:
            return
        print(f"Drawing {len(samples.prompts)} prompts", flush=True)
        if file := samples(student, step):
            print(f"{'The student' if samples.teacher is None else 'Teacher above, student below'}: {file}")


@contextlib.contextmanager
def watch(
    settings: Settings, checkpoints: Checkpoints, embeds: Embeds, teacher: Teacher | None
) -> Iterator[RunObserver]:
    """Set up everyone who watches the run, from before its first step until its student is saved."""
    held_out, run_file = build_measure(settings, embeds, teacher), Path(settings.output_dir) / RUN_NAME
    with watched(settings, checkpoints) as (progress, trackers):
        is_ours = has_mark(run_file) or not os.path.lexists(run_file)  # one that a person wrote is left alone
        if settings.processes.is_first and is_ours:
            write_text(run_file, settings.flags_text)
        samples = build_samples(settings, embeds, teacher, trackers)
        yield RunObserver(progress, trackers, held_out, samples, settings.student_sampling)


@contextlib.contextmanager
def watched(
    settings: Any, checkpoints: Checkpoints, also: Sequence[str] = ()
) -> Iterator[tuple[Progress | None, Trackers]]:
    """Show a run of any command, and write down its steps; one that starts anew moves what is in its folder aside first.

    `also` are names of files that it writes beside those of every run.
    """
    processes, folder, first_step = settings.processes, Path(settings.output_dir), checkpoints.first_step
    if checkpoints.resume_from is None:
        aside = processes.first_then_all(lambda: set_aside_previous_student(folder, also))
        if aside:
            print(f"The student that was in {folder} is now in {aside}")
    progress = Progress(settings.num_steps, first_step) if processes.is_first else None
    with build_trackers(settings, folder, first_step) if processes.is_first else Trackers() as trackers:
        yield progress, trackers


def build_trackers(settings: Any, folder: Path, step: int) -> Trackers:
    """metrics.jsonl, TensorBoard, the loss plot, and the tracker of --report, of a run that goes on after a step."""
    report = settings.report
    metrics, events, plot = (folder / name for name in (METRICS_NAME, TENSORBOARD_NAME, LOSS_PLOT_NAME))
    makers: dict[str, Callable[[], Tracker]] = {
        METRICS_NAME: lambda: MetricsFile(metrics, step),
        "TensorBoard": lambda: TensorBoardFiles(events, step),
        LOSS_PLOT_NAME: lambda: LossPlot(metrics, plot),
    }
    if report != "none":
        makers[report] = lambda: RunTracker(report, folder, settings.as_dict())
    return Trackers(makers)


def build_samples(settings: Settings, embeds: Embeds, teacher: Teacher | None, trackers: Trackers) -> Samples | None:
    """Build what --sample_prompts and --sample_every draw, sampled as whoever draws with the saved student will."""
    if settings.vae_location is None:
        return None
    return Samples(
        folder=Path(settings.output_dir) / SAMPLES_NAME,
        teacher=teacher,
        prompts=settings.sample_prompts,
        prompt_embeds=embeds.samples,
        seed=settings.sample_seed,
        latent_shapes=settings.latent_shapes,
        vae_location=settings.vae_location,
        settings=settings.teacher,
        teacher_sampling=settings.teacher_sampling,
        student_sampling=settings.student_sampling,
        batch_size=settings.batch_size,
        needs_all_processes=settings.shard_teacher or settings.shard_student,  # sharded weights are needed from all
        processes=settings.processes,
        on_picture=trackers.picture,
    )
