"""What a comparison says of each prompt by itself, so that the worst ones can be looked at first."""

from collections.abc import Sequence
from dataclasses import dataclass

from wandistiller.evaluation import measures, noise_parts
from wandistiller.evaluation.experiment import Drawn
from wandistiller.evaluation.judges import Judge


@dataclass(frozen=True, kw_only=True)
class PromptMeasures:
    """The measures of one prompt over all of its noises; None where something was not measured.

    Attributes:
        latent_distance: how far the student's latents are from the teacher's, in the unit of `measures.endpoint_error`, whose
            square is the mean of these squares.
        psnr_db, ssim: means over the pictures.
        sharpness: high-frequency energy of the student's pictures, as a share of the teacher's.
        gain: the share of the teacher's noise part that the student draws.
        right_student, right_teacher: share of the pictures that show what the prompt says.
    """

    latent_distance: float | None
    psnr_db: float
    ssim: float
    sharpness: float | None
    gain: float | None
    right_student: float | None
    right_teacher: float | None


def measure_prompts(
    student: Drawn, teacher: Drawn, prompts: Sequence[str], num_seeds: int, judge: Judge | None
) -> list[PromptMeasures]:
    """Return the measures of every prompt.

    Args:
        prompts: the prompt of each sample; the noises of a prompt follow one another.
        num_seeds: noises of each prompt.
        judge: tells whether a picture shows what its prompt says; None where nobody can.
    """
    unit = measures.spread(teacher.latents)
    return [
        _measure(_part(student, samples), _part(teacher, samples), prompts[samples], unit, judge)
        for samples in (slice(start, start + num_seeds) for start in range(0, len(prompts), num_seeds))
    ]


def _part(drawn: Drawn, samples: slice) -> Drawn:
    return Drawn(drawn.latents[samples], drawn.pictures[samples])


def _measure(
    student: Drawn, teacher: Drawn, prompts: Sequence[str], unit: float, judge: Judge | None
) -> PromptMeasures:
    count = len(prompts)
    distance = float((student.latents.double() - teacher.latents.double()).norm()) / count**0.5
    sums = noise_parts.noise_sums(student.latents[None], teacher.latents[None]) if count > 1 else noise_parts.NOTHING
    right = [
        measures.accuracy(drawn.pictures, prompts, judge)["correct"] if judge else None for drawn in (student, teacher)
    ]
    return PromptMeasures(
        latent_distance=measures.ratio(distance, unit),
        psnr_db=sum(measures.psnr(student.pictures, teacher.pictures)) / count,
        ssim=sum(measures.ssim(student.pictures, teacher.pictures)) / count,
        sharpness=measures.ratio(*(measures.high_frequency_energy(drawn.pictures) for drawn in (student, teacher))),
        gain=noise_parts.noise_parts(sums, unit)["gain"],
        right_student=right[0],
        right_teacher=right[1],
    )
