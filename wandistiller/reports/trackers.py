"""Trackers, which watch a run: metrics.jsonl, TensorBoard, and wandb or trackio, each imported where it is used.

A tracker gets the metrics of every step and the sample pictures. None of them may end a run.
"""

import importlib
import importlib.util
import json
import os
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.errors import UserError, first_line
from wandistiller.files.atomic import write_text
from wandistiller.files.output_folder import TRACKER_NAME
from wandistiller.reports.metrics import read_metrics
from wandistiller.step_metrics import StepMetrics

if TYPE_CHECKING:
    from PIL.Image import Image

PROJECT = "wandistiller"
PICTURE_NAME = "samples"


class Tracker:
    """Watches a run; does nothing with what it has no place for."""

    def step(self, metrics: StepMetrics) -> None:
        """Take the metrics of a step."""

    def picture(self, step: int, picture: "Image") -> None:
        """Take the sample picture of a step."""

    def close(self) -> None:
        """Finish at the end of the run."""


class MetricsFile(Tracker):
    """Writes every step to metrics.jsonl; what a killed process wrote beyond `first_step`, which the run resumes from, is removed."""

    def __init__(self, path: Path, first_step: int = 0):
        kept = [line for line in read_metrics(path) if line["step"] <= first_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))  # a kill here loses no step before them
        self._file = path.open("ab", buffering=0)  # a killed run keeps what it has measured

    def step(self, metrics: StepMetrics) -> None:
        self._file.write(json.dumps(asdict(metrics)).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def scalars(metrics: StepMetrics) -> dict[str, float]:
    """Return the numbers of a step by name. What the step did not measure is left out."""
    values = asdict(metrics)
    losses, held_out, _ = values.pop("loss_by_sigma"), values.pop("held_out") or {}, values.pop("step")
    values |= {f"loss_by_sigma/{bucket / len(losses):.1f}": value for bucket, value in enumerate(losses)}
    values |= {f"held_out/{name}": value for name, value in held_out.items()}
    return {name: float(value) for name, value in values.items() if value is not None}


class TensorBoardFiles(Tracker):
    """Writes event files to a folder, which `tensorboard --logdir` shows; events beyond `first_step` are hidden."""

    def __init__(self, folder: Path, first_step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _report_of_thread
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


def _report_of_thread(failure: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, but for TensorBoard's: its next write raises that again, where the run takes note of it."""
    if not type(failure.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failure)


class RunTracker(Tracker):
    """Reports to wandb or to trackio, which share their calls: init, log, Image and finish.

    Args:
        name: name of the library.
        folder: output folder, after which the run is named there.
        config: what is recorded of the run.
    """

    def __init__(self, name: str, folder: Path, config: dict):
        self.module = importlib.import_module(name)
        # A command that resumes a run finds it there by what the first one noted.
        note = folder / TRACKER_NAME
        if not note.is_file():
            write_text(note, secrets.token_hex(4))
        run = note.read_text(encoding="utf-8", errors="replace")[:8]
        options = {"project": PROJECT, "name": f"{folder.resolve().name}-{run}", "config": config, "resume": "allow"}
        if name == "wandb":
            options["id"] = run  # trackio knows a run by its name
            # Nobody may be there to answer where it asks for a login; `wandb sync` sends the files later.
            mode = os.environ.get("WANDB_MODE") or ("online" if self.module.api.api_key else "offline")
            options |= {"dir": str(folder), "mode": mode}
        self.module.init(**options)

    def step(self, metrics: StepMetrics) -> None:
        self.module.log(scalars(metrics), step=metrics.step)

    def picture(self, step: int, picture: "Image") -> None:
        self.module.log({PICTURE_NAME: self.module.Image(picture, caption=f"step {step}")}, step=step)

    def close(self) -> None:
        self.module.finish()


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


class Trackers(Tracker):
    """Several trackers as one, used as a context manager. One that cannot start, or fails, is reported once and left out.

    Args:
        makers: a function that starts each tracker, by its name.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tracker]] | None = None):
        self.trackers: dict[str, Tracker] = {}
        for name, make in (makers or {}).items():
            if (tracker := self._tried(name, make)) is not None:
                self.trackers[name] = tracker

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *failure: object) -> None:
        self._call_all("close")

    def step(self, metrics: StepMetrics) -> None:
        self._call_all("step", metrics)

    def picture(self, step: int, picture: "Image") -> None:
        self._call_all("picture", step, picture)

    def _call_all(self, what: str, *values: object) -> None:
        for name, tracker in list(self.trackers.items()):
            self._tried(name, getattr(tracker, what), *values)

    def _tried(self, name: str, call: Callable, *values: object):
        try:
            return call(*values)
        except Exception as error:  # a full disk, a lost network, a library's own error: the run is worth more
            self.trackers.pop(name, None)
            text = f"Warning: {name} is left out from here on ({first_line(error)}); the run goes on"
            print(text, file=sys.stderr, flush=True)
