"""What scorers say of a student's pictures beside its teacher's: pure functions of directions, unit vectors (N, D) in float64.

Prompts come one after another, each with as many pictures as there are noises of it.
"""

from collections.abc import Sequence

import numpy as np

from wandistiller.evaluation.scorers import Scorer

# CMMD (Jayasumana et al. 2024, arXiv 2401.09603): the width of the Gaussian kernel, and the factor that makes figures readable.
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
ROWS_AT_ONCE = 1024


def compare_scores(
    scorers: Sequence[Scorer], prompts: Sequence[str], pictures: dict[str, np.ndarray], batch_size: int, device: str
) -> dict:
    """Return what the scorers say, as JSON values: "scores" by kind, and "cmmd" where one of them is a CLIP.

    Args:
        prompts: each prompt once.
        pictures: those of the "student" and of the "teacher", (N, H, W, 3) uint8.
    """
    results: dict = {"scores": {}}
    for scorer in scorers:
        found = {name: scorer.embed_pictures(drawn, batch_size, device) for name, drawn in pictures.items()}
        by_prompt = {
            name: directions.reshape(len(prompts), -1, directions.shape[1]) for name, directions in found.items()
        }
        about = {"model": scorer.location, "num_prompts": len(prompts)}
        if scorer.reads_text:
            about["num_cut"] = scorer.num_cut(prompts)
            texts = scorer.embed_texts(prompts, batch_size, device)
            results["scores"][scorer.kind] = about | text_scores(by_prompt["student"], by_prompt["teacher"], texts)
        else:
            results["scores"][scorer.kind] = about | picture_scores(by_prompt["student"], by_prompt["teacher"])
        if scorer.kind == "clip":
            results["cmmd"] = {
                "model": scorer.location,
                "is_published_model": scorer.is_published_cmmd,
                "num_pictures": len(found["student"]),
                "value": cmmd(found["student"], found["teacher"]),
                "unbiased": paired_cmmd(found["student"], found["teacher"]),
            }
    return results


def text_scores(student: np.ndarray, teacher: np.ndarray, texts: np.ndarray) -> dict:
    """Return the cosines of pictures to their prompts, the share that the student keeps of the teacher's, and errors.

    A picture has some cosine to any text, so `above_other_prompts` is what its own prompt has above the mean of all others.

    Args:
        student, teacher: directions of pictures, (prompts, seeds, D).
        texts: directions of prompts, (prompts, D).
    """
    own, above = {}, {}
    for name, pictures in (("student", student), ("teacher", teacher)):
        cosines = np.einsum("psd,qd->pq", pictures, texts) / pictures.shape[1]  # (prompts, prompts), mean over seeds
        own[name] = np.diagonal(cosines)
        if len(texts) > 1:
            others = (cosines.sum(axis=1) - own[name]) / (len(texts) - 1)
            above[name] = float((own[name] - others).mean())
    return {
        "student": float(own["student"].mean()),
        "teacher": float(own["teacher"].mean()),
        "ratio": retention(float(own["student"].mean()), float(own["teacher"].mean())),
        "standard_error": {
            "student": standard_error(own["student"]),
            "teacher": standard_error(own["teacher"]),
            "ratio": ratio_error(own["student"], own["teacher"]),
        },
        "above_other_prompts": above | {"ratio": retention(above["student"], above["teacher"])} if above else None,
    }


def picture_scores(student: np.ndarray, teacher: np.ndarray) -> dict:
    """Return the cosine of the student's pictures to the teacher's of the same prompt and noise, and of other prompts."""
    cosines = np.einsum("psd,psd->p", student, teacher) / student.shape[1]  # (prompts,)
    sums = student.sum(axis=1), teacher.sum(axis=1)  # (prompts, D)
    num_prompts, num_seeds = student.shape[:2]
    others = sums[0].sum(axis=0) @ sums[1].sum(axis=0) - np.einsum("pd,pd->", *sums)
    num_others = num_prompts * (num_prompts - 1) * num_seeds**2
    return {
        "cosine": float(cosines.mean()),
        "standard_error": standard_error(cosines),
        "of_other_prompts": float(others / num_others) if num_others else None,
    }


def retention(student: float, teacher: float) -> float | None:
    """Return student / teacher; None if the teacher's score is not positive."""
    return student / teacher if teacher > 0 else None


def standard_error(values: np.ndarray) -> float | None:
    """Return the standard error of the mean over prompts; of one nothing is known."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def ratio_error(student: np.ndarray, teacher: np.ndarray) -> float | None:
    """Return the standard error of mean(student) / mean(teacher) over prompts, by the jackknife: both fall and rise together."""
    count = len(student)
    if count < 2:
        return None
    without = (teacher.sum() - teacher) / (count - 1)
    if teacher.mean() <= 0 or (without <= 0).any():
        return None
    ratios = (student.sum() - student) / (count - 1) / without
    return float((((ratios - ratios.mean()) ** 2).sum() * (count - 1) / count) ** 0.5)


def cmmd(x: np.ndarray, y: np.ndarray, rows_at_once: int = ROWS_AT_ONCE) -> float:
    """Return CMMD as its authors' code computes it: the biased estimate of the squared mean discrepancy, times 1000.

    k_xx + k_yy - 2 k_xy with means of exp(-|a - b|^2 / (2 sigma^2)) over all pairs, a picture with itself among them. It is
    larger for fewer pictures, so only figures of as many compare.
    """
    parts = ((x, x, 1), (y, y, 1), (x, y, -2))
    return CMMD_SCALE * sum(sign * _mean_kernel(a, b, rows_at_once) for a, b, sign in parts)


def paired_cmmd(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return the unbiased estimate (Gretton et al. 2012, equation 4), which leaves out pairs of one prompt and noise.

    It may be below 0, where nothing tells the two sets apart.
    """
    count = len(x)
    if count < 2:
        return None
    same = np.exp(-((x - y) ** 2).sum(axis=1) / (2 * CMMD_SIGMA**2)).sum()
    within = count**2 * (_mean_kernel(x, x) + _mean_kernel(y, y)) - 2 * count
    between = count**2 * _mean_kernel(x, y) - same
    return CMMD_SCALE * float((within - 2 * between) / (count * (count - 1)))


def _mean_kernel(x: np.ndarray, y: np.ndarray, rows_at_once: int = ROWS_AT_ONCE) -> float:
    """Return the mean of the Gaussian kernel over all pairs, some rows at a time."""
    total, y_squares = 0.0, (y**2).sum(axis=1)
    for start in range(0, len(x), rows_at_once):
        rows = x[start : start + rows_at_once]
        squares = (rows**2).sum(axis=1)[:, None] + y_squares - 2 * rows @ y.T
        total += float(np.exp(-squares / (2 * CMMD_SIGMA**2)).sum())
    return total / (len(x) * len(y))
