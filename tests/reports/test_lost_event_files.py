"""A run whose TensorBoard folder is removed or moved under it goes on, with one warning and no traceback of a thread.

pytest tests/reports/test_lost_event_files.py
"""

import shutil

from wandistiller.reports.trackers import TensorBoardFiles, Trackers


class Flushing(TensorBoardFiles):
    """Writes at once, where the library would wait for two minutes."""

    def step(self, value: float) -> None:
        self.writer.add_scalar("loss", value, 1)
        self.writer.flush()


def test_event_files_that_go_are_one_warning(tmp_path, capfd):
    with Trackers([Flushing(tmp_path / "run" / "tensorboard")]) as trackers:
        shutil.rmtree(tmp_path / "run")
        for _ in range(3):
            trackers.step(1.0)
    error = capfd.readouterr().err
    assert error.count("Flushing is left out from here on (FileNotFoundError") == 1 and "Traceback" not in error
