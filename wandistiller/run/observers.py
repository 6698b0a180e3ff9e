"""Who watches a run: the terminal, its own files, trackers, held-out errors and sample pictures, as one observer of the loop."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

from wandistiller.evaluation.held_out import PathErrors
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
from wandistiller.run.folder import Folder
from wandistiller.run.held_out import build_measure
from wandistiller.run.settings import Settings
from wandistiller.sampling.sampler import SamplingOptions
from wandistiller.sampling.teacher import Teacher
from wandistiller.step_metrics import StepMetrics
from wandistiller.training.loop import Observer
from wandistiller.wan.prompt_embeds import Embeds


class RunObserver(Observer):
    """Hands what the loop tells to those who want it.

    Args:
        progress: shows every step and writes it down; None in a process that another one prints for.
        trackers: told of every step and picture.
        held_out: measures the student; None where nothing is measured.
        samples: draws with the student; None where nothing is drawn.
        student_sampling: how the saved student draws, and so the one of the second stage; None where nothing is drawn.
    """

    def __init__(
        self,
        progress: Progress | None,
        trackers: Trackers,
        held_out: PathErrors | None,
        samples: Samples | None = None,
        student_sampling: SamplingOptions | None = None,
    ):
        self.progress, self.trackers, self.held_out, self.samples = progress, trackers, held_out, samples
        self.student_sampling = student_sampling

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
        """Draw the picture that a run ends with."""
        if (samples := self.samples) is None:
            return
        who = f"student {samples.student_sampling.num_inference_steps} steps"
        if samples.teacher is not None:
            who = f"teacher {samples.teacher_sampling.num_inference_steps} steps, {who}"
        print(f"Drawing {len(samples.prompts)} prompts, {who}", flush=True)
        if file := samples(student, step):
            print(f"{'The student' if samples.teacher is None else 'Teacher above, student below'}: {file}")


@contextlib.contextmanager
def watch(settings: Settings, folder: Folder, embeds: Embeds, teacher: Teacher | None) -> Iterator[RunObserver]:
    """Set up everyone who watches the run, from before its first step until its student is saved.

    A run that starts anew moves an earlier student of its folder aside first.
    """
    held_out = build_measure(settings, embeds, teacher)
    if folder.resume_from is None:
        aside = settings.processes.first_then_all(lambda: set_aside_previous_student(folder.path))
        if aside:
            print(f"The student that was in {folder.path} is now in {aside}")
    is_first, run_file = settings.processes.is_first, folder.path / RUN_NAME
    if is_first and (has_mark(run_file) or not os.path.lexists(run_file)):  # one that a person wrote is left alone
        write_text(run_file, settings.flags_text)
    progress = Progress(settings.num_steps, folder.first_step) if is_first else None
    with build_trackers(settings, folder) if is_first else Trackers() as trackers:
        samples = build_samples(settings, folder, embeds, teacher, trackers)
        yield RunObserver(progress, trackers, held_out, samples, settings.student_sampling)


def build_trackers(settings: Settings, folder: Folder) -> Trackers:
    """metrics.jsonl, TensorBoard, the loss plot, and the tracker of --report."""
    path, report = folder.path, settings.report
    makers: dict[str, Callable[[], Tracker]] = {
        METRICS_NAME: lambda: MetricsFile(path / METRICS_NAME, folder.first_step),
        "TensorBoard": lambda: TensorBoardFiles(path / TENSORBOARD_NAME, folder.first_step),
        LOSS_PLOT_NAME: lambda: LossPlot(path / METRICS_NAME, path / LOSS_PLOT_NAME),
    }
    if report != "none":
        makers[report] = lambda: RunTracker(report, path, settings.as_dict())
    return Trackers(makers)


def build_samples(
    settings: Settings, folder: Folder, embeds: Embeds, teacher: Teacher | None, trackers: Trackers
) -> Samples | None:
    """Build what --sample_prompts and --sample_every draw, sampled as whoever draws with the saved student will."""
    if settings.vae_location is None:
        return None
    return Samples(
        folder=folder.path / SAMPLES_NAME,
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
