"""Opening a teacher by what a person types: a path, a hub id, or mock."""

from pathlib import Path

from wandistiller.errors import UserError
from wandistiller.model.config import StudentConfig
from wandistiller.wan.files import WanFiles, open_wan_files
from wandistiller.wan.mock import mock_wan_files


def open_teacher(
    teacher_path: str | Path | WanFiles, config: StudentConfig | None, low_noise_path: str | Path | None = None
) -> WanFiles:
    """Open a teacher by its headers, from disk or hub, or make the mock around `config`; one already open is returned."""
    if isinstance(teacher_path, WanFiles):
        return teacher_path
    if str(teacher_path) != "mock":
        return open_wan_files(teacher_path, low_noise_path)
    if low_noise_path is not None:
        raise UserError("--teacher_path_low belongs to a --teacher_path with the high-noise expert, not to mock")
    if config is None:
        raise UserError("the mock teacher is made around a student's shape; give --student_config")
    return mock_wan_files(config)
