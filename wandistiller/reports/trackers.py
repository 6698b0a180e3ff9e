"""Who watches a run beside its own files: TensorBoard, wandb or trackio, each imported where it is used.

A tracker is told the scalars of every step and the sample pictures. None of them may end a run.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from wandistiller.errors import UserError
from wandistiller.reports.metrics import StepMetrics, bucket_name

if TYPE_CHECKING:
    from PIL.Image import Image

PROJECT = "wandistiller"
PICTURE_NAME = "samples"


class Tracker(Protocol):
    """What is told of a run while it goes on."""

    def step(self, metrics: StepMetrics) -> None: ...
    def picture(self, step: int, picture: "Image") -> None: ...
    def close(self) -> None: ...


def scalars(metrics: StepMetrics) -> dict[str, float]:
    """The numbers of a step by name; what a step has not measured is left out."""
    values = asdict(metrics)
    named = {name: value for name, value in values.items() if isinstance(value, (int, float)) and name != "step"}
    losses = values["loss_by_sigma"]
    named |= {f"loss_by_sigma/{bucket_name(index, len(losses))}": value for index, value in enumerate(losses)}
    for group in ("loss_by_expert", "velocity_error"):
        named |= {f"{group}/{name}": value for name, value in (values[group] or {}).items()}
    return {name: float(value) for name, value in named.items() if value is not None}


class TensorBoardFiles:
    """Event files in a folder, which `tensorboard --logdir` shows.

    Args:
        first_step: steps before this process; what a killed one has written beyond is hidden.
    """

    def __init__(self, folder: Path, first_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def step(self, metrics: StepMetrics) -> None:
        for name, value in scalars(metrics).items():
            self.writer.add_scalar(name, value, metrics.step)

    def picture(self, step: int, picture: "Image") -> None:
        import numpy as np

        self.writer.add_image(PICTURE_NAME, np.asarray(picture), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class RunTracker:
    """A run of wandb or of trackio, which share their calls: init, log, Image and finish.

    Args:
        name: of the library.
        folder: of the run, after which it is named there.
        config: what is recorded of it.
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
    """Online for those who are logged in and reach it, else into files that `wandb sync` sends later."""
    mode = os.environ.get("WANDB_MODE") or ("online" if _is_logged_in(module) else "offline")
    try:
        module.init(**about, mode=mode)
    except Exception as error:  # wandb has one type for each way a server is not reached
        if mode != "online":
            raise
        print(
            f"Warning: wandb is not reached ({type(error).__name__}); its files stay in {about['dir']}", file=sys.stderr
        )
        module.init(**about, mode="offline")


def _is_logged_in(module) -> bool:
    """Without a question, which nobody may be there to answer."""
    try:
        return module.login(prompt=False, verify=False)
    except TypeError:  # releases that know no `prompt`
        return bool(module.api.api_key)


def check_report(name: str) -> None:
    """Refuse a --report whose library is not installed.

    Raises:
        UserError: says how to install it.
    """
    if name == "none":
        return
    spec = importlib.util.find_spec(name)
    if (
        spec is None or spec.origin is None
    ):  # a folder of that name, such as wandb makes for its files, can be imported too
        raise UserError(f"--report {name}: {name} is not installed; pip install {name}, or leave --report out")


class Trackers:
    """Several trackers as one, to be used as a context manager; one that fails is told of once and left out."""

    def __init__(self, trackers: Sequence[Tracker] = ()):
        self.trackers = list(trackers)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tell("close")

    def step(self, metrics: StepMetrics) -> None:
        self._tell("step", metrics)

    def picture(self, step: int, picture: "Image") -> None:
        self._tell("picture", step, picture)

    def _tell(self, what: str, *values: object) -> None:
        for tracker in list(self.trackers):
            try:
                getattr(tracker, what)(*values)
            except Exception as error:  # a full disk, a lost network, another library's own: the run is worth more
                self.trackers.remove(tracker)
                print(f"Warning: {_complaint(tracker, error)}", file=sys.stderr, flush=True)


def started(trackers: Sequence[tuple[str, object]]) -> list[Tracker]:
    """Trackers from (name, a call that makes it); one that cannot start is told of and left out."""
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
