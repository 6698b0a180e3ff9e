"""Trackers, which watch a run beside its own files: TensorBoard, wandb or trackio, each imported where it is used.

A tracker gets the metrics of every step and the sample pictures. None of them may end a run.
"""

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from wandistiller.errors import UserError
from wandistiller.reports.metrics import bucket_name
from wandistiller.step_metrics import StepMetrics

if TYPE_CHECKING:
    from PIL.Image import Image

PROJECT = "wandistiller"
PICTURE_NAME = "samples"


class Tracker(Protocol):
    """Watches a run."""

    def step(self, metrics: StepMetrics) -> None: ...
    def picture(self, step: int, picture: "Image") -> None: ...
    def close(self) -> None: ...


def scalars(metrics: StepMetrics) -> dict[str, float]:
    """Return the numbers of a step by name. What the step did not measure is left out."""
    values = asdict(metrics)
    named = {name: value for name, value in values.items() if isinstance(value, (int, float)) and name != "step"}
    losses = values["loss_by_sigma"]
    named |= {f"loss_by_sigma/{bucket_name(index, len(losses))}": value for index, value in enumerate(losses)}
    for group in ("loss_by_expert", "velocity_error"):
        named |= {f"{group}/{name}": value for name, value in (values[group] or {}).items()}
    return {name: float(value) for name, value in named.items() if value is not None}


class TensorBoardFiles:
    """Writes event files to a folder, which `tensorboard --logdir` shows.

    Args:
        first_step: the step that the run resumes from. What a killed process wrote beyond it is hidden.
    """

    def __init__(self, folder: Path, first_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)
        threading.excepthook = _without_tensorboards(threading.excepthook)

    def step(self, metrics: StepMetrics) -> None:
        for name, value in scalars(metrics).items():
            self.writer.add_scalar(name, value, metrics.step)

    def picture(self, step: int, picture: "Image") -> None:
        import numpy as np

        self.writer.add_image(PICTURE_NAME, np.asarray(picture), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _without_tensorboards(hook: Callable[[threading.ExceptHookArgs], object]) -> Callable[..., None]:
    """Return a hook that prints no traceback of TensorBoard's writing thread, whose error its next call raises as well.

    A folder that is moved or removed while a run writes to it, or a full disk, then is one warning.
    """

    def hooked(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard"):
            hook(failure)

    return hooked


class RunTracker:
    """Reports to wandb or to trackio, which share their calls: init, log, Image and finish.

    Args:
        name: name of the library.
        folder: output folder, after which the run is named there.
        config: what is recorded of the run.
    """

    def __init__(self, name: str, folder: Path, config: dict):
        self.module = importlib.import_module(name)
        about = {"project": PROJECT, "name": folder.resolve().name, "config": config}
        if name == "wandb":
            _start_wandb(self.module, {**about, "dir": str(folder)})
        else:
            self.module.init(**about)

    def step(self, metrics: StepMetrics) -> None:
        self.module.log(scalars(metrics), step=metrics.step)

    def picture(self, step: int, picture: "Image") -> None:
        self.module.log({PICTURE_NAME: self.module.Image(picture, caption=f"step {step}")}, step=step)

    def close(self) -> None:
        self.module.finish()


def _start_wandb(module, about: dict) -> None:
    """Start wandb online if the person is logged in and it can be reached, or else with files for a later `wandb sync`."""
    mode = os.environ.get("WANDB_MODE") or ("online" if _is_logged_in(module) else "offline")
    try:
        module.init(**about, mode=mode)
    except Exception as error:  # wandb has a type of its own for each way in which a server is not reached
        if mode != "online":
            raise
        print(
            f"Warning: wandb is not reached ({type(error).__name__}); its files stay in {about['dir']}", file=sys.stderr
        )
        module.init(**about, mode="offline")


def _is_logged_in(module) -> bool:
    """Return whether the person is logged in to wandb. Ask no question, since nobody may be there to answer."""
    try:
        return module.login(prompt=False, verify=False)
    except TypeError:  # older releases have no `prompt`
        return bool(module.api.api_key)


def check_report(name: str) -> None:
    """Refuse a --report if its library is not installed.

    Raises:
        UserError: says how to install it.
    """
    if name == "none":
        return
    spec = importlib.util.find_spec(name)
    # A folder of that name, such as wandb makes for its files, can be imported too, but has no origin.
    if spec is None or spec.origin is None:
        raise UserError(f"--report {name}: {name} is not installed; pip install {name}, or leave --report out")


class Trackers:
    """Several trackers as one, used as a context manager. One that fails is reported once and left out."""

    def __init__(self, trackers: Sequence[Tracker] = ()):
        self.trackers = list(trackers)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call_all("close")

    def step(self, metrics: StepMetrics) -> None:
        self._call_all("step", metrics)

    def picture(self, step: int, picture: "Image") -> None:
        self._call_all("picture", step, picture)

    def _call_all(self, what: str, *values: object) -> None:
        for tracker in list(self.trackers):
            try:
                getattr(tracker, what)(*values)
            except Exception as error:  # a full disk, a lost network, a library's own error: the run is worth more
                self.trackers.remove(tracker)
                print(f"Warning: {_complaint(tracker, error)}", file=sys.stderr, flush=True)


def started(trackers: Sequence[tuple[str, Callable[[], Tracker]]]) -> list[Tracker]:
    """Start trackers, each given as its name and a function that makes it. One that cannot start is reported and left out."""
    running = []
    for name, make in trackers:
        try:
            running.append(make())
        except Exception as error:  # as in Trackers
            print(f"Warning: {_complaint(name, error)}", file=sys.stderr, flush=True)
    return running


def _complaint(tracker: object, error: Exception) -> str:
    name = tracker if isinstance(tracker, str) else type(tracker).__name__
    reason = " ".join(str(error).split())[:200]
    return f"{name} is left out from here on ({type(error).__name__}: {reason}); the run goes on"
