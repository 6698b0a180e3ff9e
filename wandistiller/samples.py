"""Sample pictures of a run: fixed prompts and noise, the teacher's row above the student's."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from wandistiller.flow import seeded_noise
from wandistiller.pictures import decode, labelled_grid, load_vae, save_png
from wandistiller.prompt_embeds import PromptEmbeds
from wandistiller.sampling import SamplingOptions, sample_in_batches, student_field
from wandistiller.student import WanLiteStudent
from wandistiller.teacher import Teacher, TeacherSettings

BATCH_SIZE = 8
SEED = 0  # of the first picture's noise; each next one has one more


def save_samples(
    file: Path | None,
    student: WanLiteStudent,
    teacher: Teacher | None,
    settings: TeacherSettings,
    prompts: Sequence[str],
    prompt_embeds: PromptEmbeds,
    vae_location: tuple[str, str | None],
    teacher_options: SamplingOptions,
    student_options: SamplingOptions,
) -> None:
    """Draw the prompts with both from the same noise and write one labelled PNG; the VAE is in memory meanwhile.

    Without a teacher (it may not fit beside the student) the student's row stands alone; without a file nothing is written
    (by processes that only lend their part of the weights).

    Raises:
        UserError: the VAE cannot be loaded or belongs to other latents.
    """
    config = student.config
    noise = seeded_noise(
        range(SEED, SEED + len(prompts)), (config.num_channels, config.latent_size, config.latent_size)
    )
    vae = load_vae(*vae_location, config.num_channels, settings.vae_scale_factor, student_options.device)
    fields = {"teacher": (teacher, teacher_options)} if teacher is not None else {}
    fields["student"] = (student_field(student, settings), student_options)
    rows = []
    for name, (field, options) in fields.items():
        with tqdm(total=len(prompts), desc=f"drawing with the {name}", disable=None, leave=False) as bar:
            latents = sample_in_batches(
                field, noise, prompt_embeds, range(len(prompts)), options, BATCH_SIZE, bar.update
            )
        pictures = [
            decode(vae, part, settings.latents_mean, settings.latents_std) for part in latents.split(BATCH_SIZE)
        ]
        rows.append([picture for part in pictures for picture in part])
    if file is None:
        return
    file.parent.mkdir(exist_ok=True)
    captions = [prompts, [""] * len(prompts)][: len(rows)]
    about = {"num_inference_steps": student_options.num_inference_steps, "shift": settings.shift, "seed": SEED}
    save_png(labelled_grid(rows, captions, list(fields)), file, about)
