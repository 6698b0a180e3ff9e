"""What a comparison says of each prompt by itself, so that the worst ones can be looked at first."""

from dataclasses import dataclass

from wandistiller.evaluation import measures, noise_parts
from wandistiller.evaluation.experiment import Drawn
from wandistiller.evaluation.judges import accuracy


@dataclass(frozen=True, kw_only=True)
class PromptMeasures:
    """The measures of one prompt over all of its noises; None where something was not measured.

    Attributes:
        latent_distance: how far the student's latents are from the teacher's, in the unit of `measures.endpoint_error`, whose
            square is the mean of these squares.
        psnr_db, ssim: means over the pictures.
        sharpness: high-frequency energy of the student's pictures, as a share of the teacher's.
        gain: the share of the teacher's noise part that the student draws.
        right_student, right_teacher: share of the pictures that the judge holds for right.
    """

    latent_distance: float | None
    psnr_db: float
    ssim: float
    sharpness: float | None
    gain: float | None
    right_student: float | None
    right_teacher: float | None


def measure_prompts(student: Drawn, teacher: Drawn, num_seeds: int) -> list[PromptMeasures]:
    """Return the measures of every prompt; its `num_seeds` noises follow one another."""
    unit = measures.spread(teacher.latents)
    starts = range(0, len(student.latents), num_seeds)
    return [_measure(_part(student, start, num_seeds), _part(teacher, start, num_seeds), unit) for start in starts]


def _part(drawn: Drawn, start: int, count: int) -> Drawn:
    samples = slice(start, start + count)
    return Drawn(drawn.latents[samples], drawn.pictures[samples], drawn.verdicts and drawn.verdicts[samples])


def _measure(student: Drawn, teacher: Drawn, unit: float) -> PromptMeasures:
    count = len(student.latents)
    distance = float((student.latents.double() - teacher.latents.double()).norm()) / count**0.5
    sums = noise_parts.noise_sums(student.latents[None], teacher.latents[None]) if count > 1 else noise_parts.NOTHING
    right = [accuracy(drawn.verdicts)["correct"] if drawn.verdicts else None for drawn in (student, teacher)]
    return PromptMeasures(
        latent_distance=measures.ratio(distance, unit),
        psnr_db=sum(measures.psnr(student.pictures, teacher.pictures)) / count,
        ssim=sum(measures.ssim(student.pictures, teacher.pictures)) / count,
        sharpness=measures.ratio(*(measures.high_frequency_energy(drawn.pictures) for drawn in (student, teacher))),
        gain=noise_parts.noise_parts(sums, unit)["gain"],
        right_student=right[0],
        right_teacher=right[1],
    )
