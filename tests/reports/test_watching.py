"""A run can be seen: metrics, TensorBoard files, the loss plot, sample pictures, wandb and trackio, the summary.

Files are read back as others read them: events by TensorBoard's own EventAccumulator, PNG files by Pillow. Drawing
must leave weights, losses and checkpoints as they are, bit for bit, and two processes (DDP, and FSDP2 with both models
sharded) must draw what one draws, within rounding. wandb and trackio are stand-ins here. No test knows whether a
picture is good to look at.
"""

import json
import shutil
import sys
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.runs import PRUNED_CONFIG, checkpoint_tensors, read_metrics, weights_of
from wandistiller import StudentConfig
from wandistiller.model.sizes import count_parameters
from wandistiller.reports import metrics, plots, trackers
from wandistiller.step_metrics import StepMetrics

CELL = 160 + 8  # pixels of a drawn prompt in a sample picture, with its margin
DRAWN = ["--guidance_scale", 1, "--num_samples", 2, "--teacher_steps", 10]


def metrics_of(step: int) -> StepMetrics:
    losses = [None, *(step / 10 + bucket for bucket in range(9))]
    return StepMetrics(step, 1.0 / step, 2.0, 1e-4, 8.0, float(step), 1.0, 3, loss_by_sigma=losses, memory_bytes=5)


def lines_of(num_steps: int) -> list[dict]:
    return [asdict(metrics_of(step)) for step in range(1, num_steps + 1)]


def events_of(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


# ---- a run as a person sees it ----


def test_a_run_leaves_scalars_pictures_a_plot_and_a_summary(train, teachers, tmp_path):
    flags = (*DRAWN, "--max_steps", 6, "--sample_every", 2, "--eval_every", 3)
    outcome = train(teachers.one, PRUNED_CONFIG, *flags).ok()
    folder, lines = tmp_path / "out", read_metrics(tmp_path / "out")

    assert all(line["memory_bytes"] > 2**25 for line in lines), "a process that has loaded torch holds more"
    assert [line["memory_bytes"] for line in lines] == sorted(line["memory_bytes"] for line in lines)

    events = events_of(folder)
    for name in ("loss", "grad_norm", "lr", "samples_per_s", "teacher_calls", "memory_bytes"):
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert seen == [(line["step"], pytest.approx(line[name], rel=1e-5)) for line in lines], name
    assert [event.step for event in events.Scalars("held_out/velocity_error")] == [3, 6]
    assert [event.step for event in events.Images("samples")] == [2, 4, 6]

    assert sorted(path.name for path in (folder / "samples").iterdir()) == [f"step_00000{n}.png" for n in (2, 4, 6)]
    assert Image.open(folder / "loss.png").size[0] > 500
    parameters = count_parameters(StudentConfig.from_dict(PRUNED_CONFIG)).total
    assert f"{parameters:,} parameters" in outcome.out and "relative velocity error" in outcome.out


def test_a_run_that_goes_on_keeps_the_scalars_before_and_hides_those_beyond(train, teachers, tmp_path):
    flags = ("--save_every", 2, "--guidance_scale", 1)
    train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 4).ok()
    folder = tmp_path / "out" / "checkpoints" / "step_00000004"  # as if the run had been killed before it
    folder.with_suffix(".json").unlink()
    shutil.rmtree(folder)
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 5)
    assert "Resuming from step 2" in outcome.out
    assert [event.step for event in events_of(tmp_path / "out").Scalars("loss")] == [1, 2, 3, 4, 5]


# ---- sample pictures ----


def rows_of(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's and the student's row, without captions."""
    cells = np.asarray(Image.open(file))[-2 * CELL :, -2 * CELL :]
    return cells[:CELL], cells[CELL:]


def test_early_steps_are_drawn_and_stand_below_the_teacher_in_one_picture(train, teachers, tmp_path):
    flags = [*DRAWN, "--sample_every", 60, "--max_steps", 62, "--batch_size", 1, "--sample_prompts", "a cat", "a dog"]
    train(teachers.one, PRUNED_CONFIG, *flags).ok()
    steps = (25, 50, 60, 62)
    files = [tmp_path / "out" / "samples" / f"step_{step:06d}.png" for step in steps]
    assert sorted((tmp_path / "out" / "samples").iterdir()) == files
    stacked = np.asarray(Image.open(tmp_path / "out" / "samples_over_time.png"))[:, -2 * CELL :]
    rows = [stacked[len(stacked) - CELL * count :][:CELL] for count in (5, 4, 3, 2, 1)]
    np.testing.assert_array_equal(rows, [rows_of(files[0])[0], *(rows_of(file)[1] for file in files)])


@pytest.mark.parametrize("recipe", [["--ema_decay", 0.9], ["--student_steps", 8, "--ema_decay", 0]])
def test_drawing_leaves_training_as_it_was_bit_for_bit(train, teachers, tmp_path, recipe):
    flags = (*DRAWN, "--max_steps", 4, "--lr", 1e-3, "--save_every", 4, *recipe)
    folders = [tmp_path / "plain", tmp_path / "drawn"]
    for folder, every in zip(folders, (0, 2), strict=True):
        train(teachers.one, PRUNED_CONFIG, *flags, "--sample_every", every, output_dir=folder).ok()
    plain, drawn = (weights_of(folder) | checkpoint_tensors(folder) for folder in folders)
    assert plain.keys() == drawn.keys() and all(torch.equal(plain[name], drawn[name]) for name in plain)
    losses = [[line["loss"] for line in read_metrics(folder)] for folder in folders]
    assert losses[0] == losses[1]
    pictures = [np.asarray(Image.open(folder / "samples" / "step_000004.png")) for folder in folders]
    np.testing.assert_array_equal(*pictures)


def test_the_teachers_row_stays_and_the_student_draws_with_its_averaged_weights(train, teachers, tmp_path):
    # The learning rate of a step does not depend on how many there are, so that a shorter run is a part of a longer one:
    flags = (*DRAWN, "--sample_every", 2, "--lr", 1e-2, "--ema_decay", 0.9, "--lr_scheduler", "constant",
             "--feature_loss_weight", 0)  # fmt: skip
    for name, steps in (("long", 4), ("short", 2)):
        train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", steps, output_dir=tmp_path / name).ok()
    (above, below), (again, later) = (rows_of(tmp_path / "long" / "samples" / f"step_00000{n}.png") for n in (2, 4))
    np.testing.assert_array_equal(above, again)
    assert (below != later).any()
    # The shorter run has saved the average, and drawn with it at its end:
    np.testing.assert_array_equal(below, rows_of(tmp_path / "short" / "samples" / "step_000002.png")[1])


def test_a_picture_that_cannot_be_made_is_the_last_and_the_run_goes_on(train, teachers, tmp_path):
    flags = ("--guidance_scale", 1, "--save_every", 1, "--sample_every", 1)
    train(teachers.one, PRUNED_CONFIG, *flags, "--num_samples", 0, "--max_steps", 1).ok()
    (tmp_path / "out" / "samples").write_bytes(b"a file in the place of the folder")
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--num_samples", 2, "--max_steps", 4).ok()
    assert outcome.out.count("No sample pictures") == 1 and "Done: 4 steps" in outcome.out


def test_several_processes_draw_what_one_draws(flags_of, launch, tmp_path):
    flags = ["--num_samples", 1, "--sample_every", 2, "--max_steps", 3, "--teacher_steps", 10]
    for name, count, batch, extra in (("one", 1, 4, []), ("DDP", 2, 2, []), ("FSDP2", 2, 2, ["--shard"])):
        codes, said = launch(count, flags_of(name, *flags, "--batch_size", batch, *extra))
        assert codes == [0] * count, said
        assert said.count("Teacher above, student below") == 1
        for step in (2, 3):
            one, other = (
                np.asarray(Image.open(tmp_path / n / "samples" / f"step_{step:06d}.png")) for n in ("one", name)
            )
            assert np.abs(one.astype(int) - other).max() <= 3, "more than rounding"


# ---- the plot ----


def test_the_plot_has_a_line_for_each_band_of_its_colour_scale_and_one_for_all(tmp_path):
    lines = lines_of(250)
    lines[99]["held_out"] = {"velocity_error": 0.5, "endpoint": 0.25, "steps": 4}
    losses, held_out, endpoint, bar = plots.loss_figure(lines).axes
    assert [list(line.get_ydata()) for line in endpoint.get_lines()] == [[0.25]]
    *bands, total = losses.get_lines()[1:]
    colors = [tuple(color) for color in bar.collections[-1].cmap.colors]
    assert [tuple(line.get_color()) for line in bands] == colors and len(set(colors)) == 5
    assert next(tick.get_text() for tick in bar.get_yticklabels()) == "0.0" and "sigma" in bar.get_ylabel()
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in held_out.get_lines()] == [([100], [0.5])]
    assert losses.get_yscale() == held_out.get_yscale() == "log"
    assert all("lower is better" in axes.get_ylabel() for axes in (losses, held_out))
    assert len(total.get_xdata()) < 50 and total.get_xdata()[-1] == 250
    first = int(total.get_xdata()[0])
    assert total.get_ydata()[0] == pytest.approx(sum(1 / step for step in range(1, first + 1)) / first)
    assert len(plots.loss_figure(lines_of(1)).axes) == 2


@pytest.mark.filterwarnings("error")
def test_a_run_without_any_error_is_plotted_too(tmp_path):
    lines = [line | {"loss": 0.0, "loss_by_sigma": [0.0] * 10} for line in lines_of(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    plots.LossPlot(tmp_path / "metrics.jsonl", tmp_path / "loss.png").close()  # a warning would fail it
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.format == "PNG"


# ---- wandb and trackio ----


class StandIn(types.ModuleType):
    """What the two libraries share, as far as it is used."""

    def __init__(self, name: str, key: str | None = None):
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name, origin=f"{name}/__init__.py")
        self.api = types.SimpleNamespace(api_key=key)
        self.started, self.logged, self.finished = None, [], 0

    def init(self, **options) -> None:
        self.started = options

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))

    def Image(self, picture, caption: str):
        return ("image", picture.size, caption)

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_is_reported_with_scalars_and_pictures(train, teachers, tmp_path, monkeypatch, name):
    module = StandIn(name)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    flags = [*DRAWN, "--max_steps", 4, "--sample_every", 3, "--save_every", 2, "--report", name]
    train(teachers.one, PRUNED_CONFIG, *flags).ok()
    assert module.started["config"]["num_steps"] == 4 and module.started["name"].startswith("out-")
    assert module.started.get("mode") == ("offline" if name == "wandb" else None), "nobody is logged in"
    losses = [(step, values["loss"]) for step, values in module.logged if "loss" in values]
    assert losses == [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "out")]
    assert [step for step, values in module.logged if "samples" in values] == [3, 4]
    assert module.finished == 1
    # The command that resumes it reports to the same run, and one that starts anew to another:
    first = module.started
    for more in ([], ["--overwrite"]):
        train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 5, *more).ok()
        assert (module.started["name"] == first["name"]) == (not more)
        assert module.started["resume"] == "allow" and (
            name == "trackio" or module.started["id"] in module.started["name"]
        )


@pytest.mark.parametrize(
    "key, variable, mode", [("k", "", "online"), (None, "", "offline"), ("k", "disabled", "disabled")]
)
def test_wandb_is_online_only_for_those_who_are_logged_in(tmp_path, monkeypatch, key, variable, mode):
    module = StandIn("wandb", key)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", variable)
    trackers.RunTracker("wandb", tmp_path, {})
    assert module.started["mode"] == mode and module.started["dir"] == str(tmp_path)


def test_a_tracker_that_fails_is_told_of_once_and_left_out(tmp_path, capsys):
    class Failing:
        def step(self, metrics):
            raise ConnectionError("the network is gone")

        def close(self):
            raise AssertionError("it was left out")

    file = tmp_path / "metrics.jsonl"
    makers = {"one": Failing, "other": lambda: trackers.MetricsFile(file), "third": lambda: 1 / 0}
    with trackers.Trackers(makers) as watching:
        for step in (1, 2):
            watching.step(metrics_of(step))
    assert metrics.read_metrics(file) == lines_of(2)
    error = capsys.readouterr().err
    assert error.count("the network is gone") == 1 and error.count("third is left out") == 1


# ---- what is read back ----


def test_the_time_of_a_run_counts_each_process_that_went_on_with_it():
    seconds = [1.0, 2.0, 3.0, 0.5, 1.0, 0.25]
    lines = [{"elapsed_s": value} for value in seconds]
    assert metrics.training_seconds(lines) == 3.0 + 1.0 + 0.25


def test_a_folder_that_a_tracker_leaves_is_not_the_tracker(run_main, tmp_path, monkeypatch):
    import train_distillation

    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    outcome = run_main(train_distillation.main, "--report", "trackio", "--output_dir", tmp_path / "out")
    assert outcome.code == 2 and "pip install trackio" in outcome.err and not (tmp_path / "out").exists()


# ---- what is damaged ----

ODD_LINES = {
    "no UTF-8": b"\xff",
    "no loss by noise level": b'{"step": 2, "loss": 1.0, "loss_by_sigma": [1.0]}',
    "text for a number": b'{"step": 2, "loss": "low"}',
    "an error that is none": b'{"step": 2, "held_out": {"velocity_error": null}}',
    "a number that no axis holds": b'{"step": 2, "loss": 1e308}',
    "a step that is text": b'{"step": "2"}',
    "brackets without end": b"[" * 100_000,
}


@pytest.mark.parametrize("odd", ODD_LINES.values(), ids=ODD_LINES)
def test_lines_that_no_run_wrote_are_left_out_by_number_with_a_warning(tmp_path, caplog, odd):
    file, lines = tmp_path / "metrics.jsonl", lines_of(3)
    texts = [json.dumps(line).encode() for line in lines]
    file.write_bytes(b"\n".join([texts[0], odd, *texts[1:], b""]))
    found = metrics.read_metrics(file)
    assert found == lines and f"{file}: left out 1 lines" in caplog.text and caplog.text.rstrip().endswith("line 2")


def test_a_folder_in_the_place_of_the_metrics_is_told_of_and_the_run_resumes(train, teachers, tmp_path):
    flags, file = ["--save_every", 2], tmp_path / "out" / "metrics.jsonl"
    train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 2).ok()
    file.unlink()
    file.mkdir()
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 3)
    assert outcome.code == 0 and "Done: 3 steps" in outcome.out
    assert outcome.err.count("metrics.jsonl is left out from here on (IsADirectoryError") == 1


def test_a_disk_that_takes_no_more_metrics_does_not_end_a_run(tmp_path, capsys):
    file = trackers.MetricsFile(tmp_path / "metrics.jsonl")
    file.close()
    file._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 (closed by the file of the metrics)
    with trackers.Trackers({"metrics.jsonl": lambda: file}) as watching:
        for step in (1, 2, 3):
            watching.step(metrics_of(step))
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_folder_of_tensorboard_that_goes_is_told_of_by_an_error_alone(tmp_path, capfd):
    tracker = trackers.TensorBoardFiles(tmp_path / "tensorboard")
    tracker.step(metrics_of(1))
    shutil.rmtree(tmp_path / "tensorboard")
    with pytest.raises(FileNotFoundError):
        for step in range(2, 1000):
            tracker.step(metrics_of(step))
            tracker.writer.flush()
    assert "Traceback" not in capfd.readouterr().err
