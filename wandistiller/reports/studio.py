"""The students of a folder, ready to draw what is typed: what playground.py shows in a page is done here, without the page.

    studio = Studio(find_students("outputs", None), StudioOptions())
    answer = studio.draw(Wish(student="demo", prompt="a red circle", seed=0))

One student is in memory at a time; its teacher comes beside it when a wish asks for that, and leaves with it. What cannot be drawn is a
UserError, whose text a page shows.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.errors import UserError
from wandistiller.files.output_folder import STUDENT_NAMES
from wandistiller.model.config import StudentConfig
from wandistiller.prompts.prompts import slug, unusable
from wandistiller.reports.cards import introduction, limits, read_evaluation
from wandistiller.reports.tables import equal_steps
from wandistiller.sampling.drawing import Artist, check_picture_size, untrained_warnings
from wandistiller.sampling.recorded import (
    StudentRecord,
    TeacherLoras,
    load_drawing_parts,
    load_student_config,
    open_recorded_teacher,
    recorded_settings,
    student_sampling,
    teacher_paths,
    teacher_sampling,
    trained_sizes,
)

if TYPE_CHECKING:
    import torch

    from wandistiller.sampling.recorded import DrawingParts
    from wandistiller.wan.prompt_embeds import PromptEmbeds

NEEDED_NAMES = STUDENT_NAMES[:2]  # of a folder to be a student's
MAX_NOISES = 8
MAX_LETTERS = 10_000  # of a prompt
MAX_STEPS, MAX_SEED = 1000, 2**62


@dataclass(frozen=True, kw_only=True)
class StudioOptions:
    """Where the parts of a Wan are and how is computed; None leaves a value to the student's record, or to the machine."""

    teacher_path: str | None = None
    teacher_path_low: str | None = None
    teacher_lora: list[tuple[str, float]] | None = None
    teacher_lora_low: list[tuple[str, float]] | None = None
    text_encoder_path: str | None = None
    vae_path: str | None = None
    prompt_cache: str = "outputs/prompt_cache"
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is asked for.

    Attributes:
        student: its name in the studio.
        seed: of the first noise; each next noise has the next seed.
        steps: of student and teacher; None leaves them to the student's record.
        width, height: pixels; None is that of the student's first size.
        with_teacher: whether the teacher draws too.
    """

    student: str
    prompt: str
    seed: int = 0
    num_noises: int = 1
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    with_teacher: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture as a PNG that tells how it was made, and a name for its file."""

    png: bytes
    name: str
    seed: int


@dataclass(frozen=True)
class Drawn:
    """What one of the two drew, and the seconds of a picture."""

    who: str
    steps: int
    pictures: Sequence[Picture]
    seconds: float


@dataclass(frozen=True)
class Answer:
    """What a wish came to: the teacher's pictures, if it was asked, above the student's, and sentences to be aware of."""

    wish: Wish
    size: tuple[int, int]
    rows: Sequence[Drawn]
    notes: Sequence[str] = field(default_factory=list)


def find_students(outputs: str | None, student: str | None) -> dict[str, Path]:
    """Return the folders of students by name: `student` first, then those in `outputs`, the newest first.

    Raises:
        UserError: `student` is not that of a trained student, or there is none at all.
    """
    found: dict[str, Path] = {}
    if student is not None:
        load_student_config(student)
        found[Path(student).resolve().name] = Path(student)
    outputs_folder = Path(outputs) if outputs is not None else None
    if outputs_folder is not None and outputs_folder.is_dir():
        folders = [folder for folder in (outputs_folder, *outputs_folder.iterdir()) if _is_student(folder)]
        folders.sort(key=lambda folder: (folder / NEEDED_NAMES[1]).stat().st_mtime, reverse=True)
        for folder in folders:
            if all(folder.resolve() != known.resolve() for known in found.values()):
                name = folder.resolve().name
                found[name if name not in found else str(folder)] = folder
    if not found:
        raise UserError(
            f"--outputs {outputs}: holds no folder of a trained student; give the folder that --output_dir lies in, or --student"
        )
    return found


def _is_student(folder: Path) -> bool:
    return all((folder / name).is_file() for name in NEEDED_NAMES)


def told_record(folder: Path) -> str:
    """Return what a student's folder says of it, in words, as markdown."""
    config = load_student_config(folder)
    parts = [introduction(config, config.distillation or {})]
    if results := read_evaluation(folder):
        parts.append(_told_evaluation(results))
    return "\n\n".join([*parts, limits(config, config.distillation or {})])


def _told_evaluation(results: dict) -> str:
    """Return how near the student came to its teacher, or nothing where the evaluation lacks something."""
    try:
        text, fewer = f"Measured on {results['num_prompts']} prompts.", results["teacher_at_fewer_steps"]
        if fewer["latent_relative_error"]:
            text += (
                f" Its pictures are as near to the teacher's as those of the teacher itself in {equal_steps(fewer)}."
            )
        if right := results.get("accuracy"):
            text += f" It draws {right['student']['correct']:.1%} of them right, the teacher {right['teacher']['correct']:.1%}."
        return text
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""


class Studio:
    """Draws with one of several students, and with its teacher.

    Args:
        folders: the students' folders by name, as `find_students` returns them.
    """

    def __init__(self, folders: dict[str, Path], options: StudioOptions):
        from wandistiller.device import pick_device, pick_dtype

        self.folders, self.options = folders, options
        self.device = pick_device(options.device)
        self.dtype = pick_dtype(options.dtype, self.device)
        self._lock = threading.Lock()  # one memory, one drawing at a time
        self._easel: _Easel | None = None

    def config(self, name: str) -> StudentConfig:
        """Return the config of a student.

        Raises:
            UserError: there is none of that name, or its files have become unusable.
        """
        if name not in self.folders:
            raise UserError(f"There is no student {name!r}; choose one of: {', '.join(self.folders)}.")
        return load_student_config(self.folders[name])

    def draw(self, wish: Wish) -> Answer:
        """Draw a wish, loading what it needs and is not there yet.

        Raises:
            UserError: it cannot be drawn; the text says why.
        """
        from wandistiller.device import is_out_of_memory

        config = self.config(wish.student)
        own = trained_sizes(config)[0]
        size = own.height if wish.height is None else wish.height, own.width if wish.width is None else wish.width
        _check(wish, config, size)
        with self._lock:
            try:
                return self._draw(wish, config, size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._easel = None
                raise UserError(
                    f"The memory of {self.device} is not enough for this; ask for smaller or fewer pictures, or leave the teacher out."
                ) from error

    def _draw(self, wish: Wish, config: StudentConfig, size: tuple[int, int]) -> Answer:
        folder = self.folders[wish.student]
        if self._easel is None or not self._easel.is_of(folder):
            self._easel = None  # the old one leaves memory before the new one comes
            self._easel = _Easel(folder, config, self)
        easel = self._easel
        embeds = easel.embed(wish.prompt)
        artists = {"teacher": easel.teacher(wish.steps, size)} if wish.with_teacher else {}
        artists["student"] = easel.student(wish.steps)
        notes = untrained_warnings(config, artists["student"].options.num_inference_steps, size)
        if embeds.truncated:
            notes.append(
                f"the text is longer than the {config.text_max_length} tokens that this student reads; what comes after them was left out"
            )
        rows = [_timed(who, artist, wish, size, embeds, easel) for who, artist in artists.items()]
        return Answer(wish, size, rows, [f"{note[0].upper()}{note[1:]}." for note in notes])


def _check(wish: Wish, config: StudentConfig, size: tuple[int, int]) -> None:
    """Refuse what no student could draw, before anything is loaded."""
    if reason := unusable(wish.prompt):
        raise UserError(f"The prompt {reason}; write what to draw.")
    if len(wish.prompt) > MAX_LETTERS:
        raise UserError(f"The prompt has {len(wish.prompt):,} letters; allowed: at most {MAX_LETTERS:,}.")
    for name, value, low, high in (
        ("seed", wish.seed, 0, MAX_SEED),
        ("number of noises", wish.num_noises, 1, MAX_NOISES),
        ("number of steps", 1 if wish.steps is None else wish.steps, 1, MAX_STEPS),
    ):
        if not low <= value <= high:
            raise UserError(f"The {name} is {value}; allowed: {low} to {high}.")
    check_picture_size(size, config, config.patch_size or 1, ("height", "width"))


def _timed(
    who: str, artist: Artist, wish: Wish, size: tuple[int, int], embeds: "PromptEmbeds", easel: "_Easel"
) -> Drawn:
    """Draw the row of one of the two, and measure the time of a picture, from noise to pixels."""
    from wandistiller.files.pictures import png_bytes

    config, seeds = easel.config, range(wish.seed, wish.seed + wish.num_noises)
    height, width = (pixels // config.vae_scale_factor for pixels in size)
    start = time.perf_counter()
    # The pictures come back to the CPU, which waits for them:
    pictures = artist.draw(embeds, [0] * len(seeds), seeds, (config.num_channels, height, width))
    seconds = (time.perf_counter() - start) / len(seeds)
    about = artist.metadata(who, str(easel.folder), size)
    drawn = [
        Picture(
            png_bytes(picture, {"prompt": wish.prompt, "seed": seed, **about}),
            f"{slug(wish.prompt)}_seed{seed}_{size[1]}x{size[0]}_{who}.png",
            seed,
        )
        for seed, picture in zip(seeds, pictures, strict=True)
    ]
    return Drawn(who, artist.options.num_inference_steps, drawn, seconds)


class _Easel:
    """A student in memory with its VAE and text encoder's files, and its teacher once it was asked for."""

    def __init__(self, folder: Path, config: StudentConfig, studio: Studio):
        from wandistiller.model.transformer import WanLiteStudent
        from wandistiller.sampling.sampler import student_as_teacher

        self.folder, self.config = folder, config
        self.options, self.device, self.dtype = studio.options, studio.device, studio.dtype
        self.settings = recorded_settings(config)
        self.places = teacher_paths(config, self.options.teacher_path, self.options.teacher_path_low)
        self.parts: DrawingParts = load_drawing_parts(
            config,
            self.places[0],
            text_encoder_path=self.options.text_encoder_path,
            vae_path=self.options.vae_path,
            device=self.device,
        )
        self.written_ns = self._written_ns()
        self.field = student_as_teacher(WanLiteStudent.from_pretrained(folder, self.device), self.settings)

    def _written_ns(self) -> int:
        return (self.folder / NEEDED_NAMES[1]).stat().st_mtime_ns

    def is_of(self, folder: Path) -> bool:
        """Return whether this is the student of a folder, and the one that lies there now."""
        try:
            return folder == self.folder and self._written_ns() == self.written_ns
        except OSError:  # it is gone, which loading it will say
            return False

    def embed(self, text: str) -> "PromptEmbeds":
        """Return the tokens of a text; the text encoder is in memory only for a text that the cache lacks."""
        from wandistiller.wan.text_encoder import embed_texts

        return embed_texts([text], self.parts.encoder, self.config, self.options.prompt_cache, self.device)

    def student(self, steps: int | None) -> Artist:
        options = student_sampling(self.config, steps, self.dtype, self.device)
        return Artist(field=self.field, options=options, settings=self.field.settings, vae=self.parts.vae)

    def teacher(self, steps: int | None, size: tuple[int, int]) -> Artist:
        """Return the teacher, which is loaded the first time."""
        check_picture_size(size, self.config, self._teacher_files.config.patch_size, ("height", "width"))
        # Whole steps are the student's alone, so that the teacher's own number is asked for where none is:
        few = StudentRecord.of(self.config).student_steps
        options = teacher_sampling(self.config, None if steps == few else steps, self.dtype, self.device)
        return Artist(field=self._teacher_field, options=options, settings=self.settings, vae=self.parts.vae)

    @cached_property
    def _teacher_files(self):
        loras = TeacherLoras(self.options.teacher_lora or [], self.options.teacher_lora_low or [])
        return open_recorded_teacher(self.config, *self.places, loras)

    @cached_property
    def _teacher_field(self):
        from wandistiller.projection.project import project_experts
        from wandistiller.sampling.teacher import Teacher

        negative: torch.Tensor | None = None
        if self.settings.uses_guidance:
            negative = self.embed(self.settings.negative_prompt).read(0)
        experts = project_experts(self._teacher_files, self.config.text_max_length, self.dtype, self.device)
        return Teacher(experts, self.settings, negative)
