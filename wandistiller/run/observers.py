"""Who watches a run: the terminal, its own files, trackers, held-out errors and sample pictures, as one observer of the loop."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

from tqdm import tqdm

from wandistiller.files.output_folder import (
    LOSS_PLOT_NAME,
    METRICS_NAME,
    SAMPLES_NAME,
    TENSORBOARD_NAME,
    set_aside_previous_student,
)
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.reports.plots import LossPlot
from wandistiller.reports.progress import Progress
from wandistiller.reports.samples import SampleOptions, Samples
from wandistiller.reports.trackers import RunTracker, TensorBoardFiles, Tracker, Trackers, started
from wandistiller.run.held_out import (
    Measure,
    NoiseMeasure,
    build_measure,
    build_noise_measure,
    keep_states,
    measured_states,
)
from wandistiller.run.run import Run
from wandistiller.sampling.recorded import StudentRecord
from wandistiller.sampling.teacher import Teacher
from wandistiller.step_metrics import StepMetrics
from wandistiller.training.loop import Observer
from wandistiller.wan.prompt_embeds import Embeds

logger = logging.getLogger(__name__)


class RunObserver(Observer):
    """Hands what the loop tells to those who want it.

    Args:
        progress: shows every step and writes it down; None in a process that another one prints for.
        trackers: told of every step and picture.
        held_out: measures the student; None where nothing is measured.
        noise: measures what the noise decides in its pictures; None where that is not measured.
        samples: draws with the student; None where nothing is drawn.
    """

    def __init__(
        self,
        progress: Progress | None,
        trackers: Trackers,
        held_out: Measure | None,
        noise: NoiseMeasure | None,
        samples: Samples | None,
    ):
        self.progress, self.trackers, self.held_out, self.samples = progress, trackers, held_out, samples
        self.noise = noise
        self.has_begun = False

    def shown(self) -> contextlib.AbstractContextManager:
        """While the loop runs: the progress bar is there, and metrics.jsonl is open."""
        return contextlib.nullcontext() if self.progress is None else self.progress

    def step(self, metrics: StepMetrics) -> None:
        if self.progress is not None:
            self.progress.step(metrics)
        self.trackers.step(metrics)
        if not self.has_begun:
            self.has_begun = True
            logger.info("first step taken")

    def evaluate(self, student: WanLiteStudent) -> dict[str, float] | None:
        return None if self.held_out is None else self.held_out(student)

    def compare_noise(self, student: WanLiteStudent) -> dict[str, float | None] | None:
        return None if self.noise is None else self.noise(student)

    def draw(self, student: WanLiteStudent, step: int) -> None:
        if self.samples is not None and (file := self.samples(student, step)):
            tqdm.write(f"step {step}: pictures in {file}", file=sys.stderr)

    def draw_last(self, student: WanLiteStudent, step: int) -> None:
        """Draw the picture that a run ends with."""
        if (samples := self.samples) is None:
            return
        who = "the student" if samples.teacher is None else "teacher and student"
        steps = samples.options.student_sampling.num_inference_steps
        print(f"Drawing {len(samples.prompts)} prompts with {who}, {steps} steps", flush=True)
        if file := samples(student, step):
            print(f"{samples.caption}: {file}")
            if strip := samples.over_time():
                print(f"Over time: {strip}")


@contextlib.contextmanager
def watch(run: Run, embeds: Embeds, teacher: Teacher | None) -> Iterator[RunObserver]:
    """Set up everyone who watches the run, from before its first step until its student is saved.

    A run that starts anew moves an earlier student of its folder aside first.
    """
    held_out, noise = build_measure(run, embeds, teacher), build_noise_measure(run, embeds, teacher)
    if held_out is not None:
        logger.info("held-out states of the teacher drawn, or found")
    if run.resume_from is None:
        aside = run.processes.first_then_all(lambda: set_aside_previous_student(run.folder))
        if aside:
            print(f"The student that was in {run.folder} is now in {aside}")
    keep_states(run, measured_states(held_out))  # here, because an earlier student takes its checkpoints with it
    is_first = run.processes.is_first
    progress = Progress(run.num_steps, run.folder / METRICS_NAME, first_step=run.first_step) if is_first else None
    with build_trackers(run) if is_first else Trackers() as trackers:
        samples = build_samples(run, embeds, teacher, trackers)
        logger.info("TensorBoard and sample pictures set up")
        yield RunObserver(progress, trackers, held_out, noise, samples)


def build_trackers(run: Run) -> Trackers:
    """TensorBoard, the loss plot, and the tracker of --report; one that cannot start is left out with a line."""
    folder, report = run.folder, run.flags.output.report
    makers: list[tuple[str, Callable[[], Tracker]]] = [
        ("TensorBoard", lambda: TensorBoardFiles(folder / TENSORBOARD_NAME, run.first_step)),
        (LOSS_PLOT_NAME, lambda: LossPlot(folder / METRICS_NAME, folder / LOSS_PLOT_NAME)),
    ]
    if report != "none":
        makers.append((report, lambda: RunTracker(report, folder, run.flags.as_dict())))
    return Trackers(started(makers))


def build_samples(run: Run, embeds: Embeds, teacher: Teacher | None, trackers: Trackers) -> Samples | None:
    """Build what --num_samples and --sample_every draw, sampled as whoever draws with the saved student will."""
    if run.vae_location is None:
        return None
    settings, flags, student_steps = run.settings, run.flags, run.flags.objective.student_steps
    of_teacher = run.teacher_sampling
    recorded = StudentRecord(
        num_inference_steps=settings.num_inference_steps,
        student_steps=student_steps,
        teacher_sampler=settings.teacher_sampler,
    )
    options = SampleOptions(
        latent_shapes=run.latent_shapes,
        vae_location=run.vae_location,
        settings=settings,
        teacher_sampling=of_teacher,
        student_sampling=replace(of_teacher, num_inference_steps=recorded.steps, sampler=recorded.sampler),
        batch_size=flags.optimization.batch_size,
        needs_all_processes=flags.performance.shard
        is not None,  # sharded weights are needed from all, to draw with any
    )
    prompts, folder = run.texts.prompts[: flags.output.num_samples], run.folder / SAMPLES_NAME
    return Samples(folder, teacher, prompts, embeds.trained, options, run.processes, trackers.picture)
