"""Students of a folder that draw what is typed; playground_page.py shows it in a page.

    studio = Studio(find_students("outputs", None))
    answer = studio.draw(Request(student="demo", prompt="a red circle", seed=0))

One student is in memory at a time; its teacher joins it when a request asks for it, and leaves with it. What cannot be drawn is a
UserError, whose text a page shows.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.errors import UserError
from wandistiller.files.output_folder import STUDENT_NAMES
from wandistiller.flags import ComputeFlags, TeacherFlags
from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import ImageSize
from wandistiller.prompts.prompts import slug, unusable
from wandistiller.students.drawing import (
    Artist,
    check_picture_size,
    student_sampling,
    teacher_sampling,
    untrained_warnings,
)
from wandistiller.students.parts import (
    load_drawing_parts,
    open_recorded_teacher,
    recorded_settings,
    teacher_paths,
)
from wandistiller.students.record import StudentRecord, load_student_config, trained_sizes

if TYPE_CHECKING:
    from wandistiller.sampling.sampler import SamplingOptions
    from wandistiller.sampling.teacher import Teacher
    from wandistiller.wan.prompt_embeds import PromptEmbeds

NEEDED_NAMES = STUDENT_NAMES[:2]  # of a folder to be a student's
BOUNDS = {"seed": (0, 2**62), "noises": (1, 8), "steps": (1, 1000), "width": (1, 2**20), "height": (1, 2**20)}


@dataclass(frozen=True, kw_only=True)
class Request:
    """Pictures that are asked for.

    Attributes:
        student: its name in the studio.
        seed: of the first noise; each next noise has the next seed.
        noises: how many pictures of each.
        steps: of student and teacher; None: as the student records.
        width, height: pixels; None: those of the student's first size.
        with_teacher: whether the teacher draws too.
    """

    student: str
    prompt: str
    seed: int = 0
    noises: int = 1
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    with_teacher: bool = False

    def check(self) -> None:
        """Refuse what no student could draw, before anything is loaded."""
        if reason := unusable(self.prompt):
            raise UserError(f"the prompt {reason}; write what to draw")
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{name} is {value}; allowed: {low} to {high}")


@dataclass(frozen=True)
class Picture:
    """A picture as a PNG that tells how it was made, and a name for its file."""

    png: bytes
    name: str
    seed: int


@dataclass(frozen=True)
class Row:
    """The pictures of teacher or student, and the seconds of a picture from noise to pixels."""

    who: str
    steps: int
    pictures: Sequence[Picture]
    seconds: float


@dataclass(frozen=True)
class Answer:
    """The pictures of a request: the teacher's row, if it was asked, above the student's; and sentences to be aware of."""

    request: Request
    size: ImageSize
    rows: Sequence[Row]
    notes: Sequence[str]


def find_students(outputs: str | None, student: str | None) -> dict[str, Path]:
    """Return the folders of students by name: `student` first, then those in `outputs`, the newest first.

    Raises:
        UserError: `student` is not that of a trained student, or there is none at all.
    """
    found = []
    if student is not None:
        load_student_config(student)
        found.append(Path(student))
    place = Path(outputs) if outputs else None
    if place is not None and place.is_dir():
        there = [
            folder for folder in (place, *place.iterdir()) if all((folder / name).is_file() for name in NEEDED_NAMES)
        ]
        found += sorted(there, key=lambda folder: (folder / NEEDED_NAMES[1]).stat().st_mtime, reverse=True)
    if not found:
        raise UserError(
            f"--outputs {outputs}: holds no folder of a trained student; give the folder that --output_dir lies in, or --student"
        )
    named: dict[str, Path] = {}
    for folder in found:
        name = folder.resolve().name
        is_taken = name in named and named[name].resolve() != folder.resolve()
        named.setdefault(str(folder) if is_taken else name, folder)
    return named


class Studio:
    """Draws with one of several students, and with its teacher.

    Args:
        folders: the students' folders by name, as `find_students` returns them.
        teacher: where the parts of a Wan are, where not as the students record.
    """

    def __init__(
        self,
        folders: dict[str, Path],
        teacher: TeacherFlags | None = None,
        compute: ComputeFlags | None = None,
        prompt_cache: str = "outputs/prompt_cache",
    ):
        from wandistiller.device import pick_device, pick_dtype

        self.folders, self.teacher, self.prompt_cache = folders, teacher or TeacherFlags(), prompt_cache
        compute = compute or ComputeFlags()
        self.device = pick_device(compute.device)
        self.dtype = pick_dtype(compute.dtype, self.device)
        self._lock = threading.Lock()  # one memory, one drawing at a time
        self._loaded: _Loaded | None = None

    @property
    def is_drawing(self) -> bool:
        return self._lock.locked()

    def config(self, name: str) -> StudentConfig:
        """Return the config of a student.

        Raises:
            UserError: there is none of that name, or its files have become unusable.
        """
        if name not in self.folders:
            raise UserError(f"there is no student {name!r}; choose one of: {', '.join(self.folders)}")
        return load_student_config(self.folders[name])

    def draw(self, request: Request) -> Answer:
        """Draw what is asked for, loading what is not in memory yet.

        Raises:
            UserError: it cannot be drawn; the text says why.
        """
        from wandistiller.device import is_out_of_memory

        request.check()
        config = self.config(request.student)
        own = trained_sizes(config)[0]
        size = ImageSize(request.width or own.width, request.height or own.height)
        check_picture_size((size.height, size.width), config, config.patch_size or 1, ("height", "width"))
        with self._lock:
            try:
                return self._draw(request, size, config)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._loaded = None
                raise UserError(
                    f"the memory of {self.device} is not enough for this; ask for smaller or fewer pictures, or leave the teacher out"
                ) from error

    def _draw(self, request: Request, size: ImageSize, config: StudentConfig) -> Answer:
        folder = self.folders[request.student]
        weights = folder / NEEDED_NAMES[1]
        version = folder, weights.stat().st_mtime_ns if weights.is_file() else None
        if self._loaded is None or self._loaded.version != version:
            self._loaded = None  # the old one leaves memory before the new one comes
            self._loaded = _Loaded(version, config, self)
        loaded = self._loaded
        embeds = loaded.embed(request.prompt)
        artists = {"teacher": loaded.teacher(request.steps, size)} if request.with_teacher else {}
        artists["student"] = student = loaded.artist(
            loaded.student, student_sampling(config, request.steps, self.dtype, self.device)
        )
        notes = untrained_warnings(config, student.options.num_inference_steps, (size.height, size.width))
        if embeds.truncated:
            notes.append(
                f"the text is longer than the {config.text_max_length} tokens that this student reads, and was cut"
            )
        rows = [loaded.row(who, artist, request, size, embeds) for who, artist in artists.items()]
        return Answer(request, size, rows, notes)


class _Loaded:
    """A student in memory with its VAE, and its teacher once it was asked for; `version` is its folder and when it was written."""

    def __init__(self, version: tuple[Path, int | None], config: StudentConfig, studio: Studio):
        from wandistiller.model.transformer import WanLiteStudent
        from wandistiller.sampling.sampler import student_as_teacher

        self.version, self.config, self.studio = version, config, studio
        self.settings = recorded_settings(config)
        self.places = teacher_paths(config, studio.teacher)
        self.parts = load_drawing_parts(config, self.places[0], studio.teacher, studio.device)
        self.student = student_as_teacher(WanLiteStudent.from_pretrained(version[0], studio.device), self.settings)

    def embed(self, text: str) -> "PromptEmbeds":
        """Return the tokens of a text; the text encoder is in memory only for a text that the cache lacks."""
        from wandistiller.wan.text_encoder import embed_texts

        return embed_texts([text], self.parts.encoder, self.config, self.studio.prompt_cache, self.studio.device)

    def artist(self, who: "Teacher", options: "SamplingOptions") -> Artist:
        return Artist(field=who, options=options, settings=who.settings, vae=self.parts.vae)

    def teacher(self, steps: int | None, size: ImageSize) -> Artist:
        """Return the teacher, which is loaded the first time."""
        files, config = self._teacher_files, self.config
        check_picture_size((size.height, size.width), config, files.config.patch_size, ("height", "width"))
        # Whole steps are the student's alone, so that the teacher's own number is asked for where none is:
        few = StudentRecord.of(config).student_steps
        options = teacher_sampling(config, None if steps == few else steps, self.studio.dtype, self.studio.device)
        return self.artist(self._teacher, options)

    @cached_property
    def _teacher_files(self):
        return open_recorded_teacher(self.config, self.places, self.studio.teacher)

    @cached_property
    def _teacher(self) -> "Teacher":
        from wandistiller.projection.project import project_experts
        from wandistiller.sampling.teacher import Teacher

        negative = self.embed(self.settings.negative_prompt).read(0) if self.settings.uses_guidance else None
        slots, studio = self.config.text_max_length, self.studio
        experts = project_experts(self._teacher_files, slots, studio.dtype, studio.device)
        return Teacher(experts, self.settings, negative)

    def row(self, who: str, artist: Artist, request: Request, size: ImageSize, embeds: "PromptEmbeds") -> Row:
        """Draw the row of teacher or student."""
        from wandistiller.files.pictures import png_bytes

        seeds = range(request.seed, request.seed + request.noises)
        start = time.perf_counter()
        # The pictures come back to the CPU, which waits for them:
        pictures = artist.draw(embeds, [0] * len(seeds), seeds, self.settings.latent_shape(self.config, size))
        seconds = (time.perf_counter() - start) / len(seeds)
        about = artist.metadata(who, str(self.version[0]), (size.height, size.width)) | {"prompt": request.prompt}
        end = f"{size}_{who}.png"
        drawn = [
            Picture(png_bytes(picture, about | {"seed": seed}), f"{slug(request.prompt)}_seed{seed}_{end}", seed)
            for seed, picture in zip(seeds, pictures, strict=True)
        ]
        return Row(who, artist.options.num_inference_steps, drawn, seconds)
