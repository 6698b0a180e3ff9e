"""An evaluation as rows of one table, for the screen, a model card and the gallery, and as values that JSON can hold."""

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

from wandistiller.files.hub import hub_id

Row = tuple[str, ...]


def cell_text(value: str | float | None) -> str:
    """Return a value as a table shows it."""
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def table_lines(results: dict) -> list[str]:
    """Return the results as the lines of a table for the screen, and below it what they mean."""
    rows = [("", "student", "teacher", "ratio"), *comparison_rows(results, in_detail=True)]
    equal = f"The student equals the teacher at {equal_steps(results['teacher_at_fewer_steps'])}."
    lines = [f"{name:<46}" + "".join(f"{cell:>14}" for cell in cells) for name, *cells in rows]
    return [*lines, equal, *textwrap.wrap(results["noise"]["meaning"], 106)]


def comparison_rows(results: dict, in_detail: bool = False) -> list[Row]:
    """Return the results as rows of name, student, teacher and ratio.

    Args:
        in_detail: whether to show what a figure consists of too: noise levels, a judge's facts, the teacher in fewer steps.
    """
    rows = [*_judged("prompt drawn right", results, in_detail), *_distances(results, in_detail)]
    rows += _noise(results["noise"])
    if velocity := results.get("velocity_error"):
        rows.append(_row("relative velocity error", velocity["mean"]))
        levels = velocity["by_sigma"] if in_detail else []
        rows += [_row(f"  {_sigmas(level)} ({level['count']} states)", level["mean"]) for level in levels]
    rows.append(_row("high frequency energy", *_three(results["high_frequency_energy"])))
    rows += _scores(results)
    rows += [_row(name.replace("_", " "), *_three(values)) for name, values in results["cost"].items()]
    for size, measured in results.get("by_size", {}).items():
        rows += _judged(f"{size}: prompt drawn right", measured)
        rows.append(_row(f"{size}: distance to the teacher's latents", measured["endpoint"]["latent_relative_error"]))
        rows.append(_row(f"{size}: gain of what the noise decides", measured["noise"]["gain"]))
    return rows


def _row(name: str, *values: str | float | None) -> Row:
    """Return a row of texts; a value that could not be measured is "-", and one that there is not is empty."""
    return name, *map(cell_text, values), *[""] * (3 - len(values))


def _three(row: dict) -> tuple:
    return row["student"], row["teacher"], row["ratio"]


def _sigmas(level: dict) -> str:
    low, high = level["sigma"]
    return f"sigma {low:.1f} to {high:.1f}"


def _judged(name: str, results: dict, in_detail: bool = False) -> Iterator[Row]:
    """Yield how many pictures the judge holds for right; nothing without a judge."""
    if not (judged := results.get("accuracy")):
        return
    both = judged["student"], judged["teacher"]
    yield _row(name, *(f"{facts['correct']:.1%}" for facts in both), judged["ratio"])
    if in_detail:
        for fact in (name for name in both[0] if name != "correct"):
            yield _row(f"  {fact}", *(f"{facts[fact]:.1%}" for facts in both))
        for steps, share in results["teacher_at_fewer_steps"]["accuracy"].items():
            yield _row(f"  teacher in {steps} steps", "", f"{share:.1%}")


def _distances(results: dict, in_detail: bool) -> Iterator[Row]:
    endpoint = results["endpoint"]
    yield _row("distance to the teacher's latents, relative", endpoint["latent_relative_error"])
    if in_detail:
        for steps, error in results["teacher_at_fewer_steps"]["latent_relative_error"].items():
            yield _row(f"  teacher in {steps} steps", "", error)
    yield _row("PSNR, dB", endpoint["psnr_db"])
    yield _row("SSIM", endpoint["ssim"])


def _noise(noise: dict) -> Iterator[Row]:
    """Yield the errors of what the prompt decides and of what the noise decides, and how the latter compares."""
    teacher, ratio = noise["teacher_noise"], noise["norm_ratio"]
    yield _row("what the prompt decides: error", noise["mean_error"])
    yield _row("what the noise decides: error", noise["noise_error"])
    yield _row("what the noise decides: size", None if ratio is None else ratio * teacher, teacher, ratio)
    yield _row("what the noise decides: cosine to the teacher's", noise["cosine"])
    yield _row("what the noise decides: gain", noise["gain"])


def _scores(results: dict) -> Iterator[Row]:
    """Yield what scorers said of the pictures; nothing where there were none."""
    for kind, found in (results.get("scores") or {}).items():
        # Paths of a machine are nobody else's business:
        yield _row(f"{kind} is {hub_id(found['model']) or Path(found['model']).name}")
        if "cosine" in found:
            yield _row(f"{kind}: cosine to the teacher's picture", found["cosine"])
            yield _row(f"{kind}: standard error", found["standard_error"])
            yield _row(f"{kind}: cosine to pictures of other prompts", found["of_other_prompts"])
            continue
        yield _row(f"{kind}: cosine to the prompt", *_three(found))
        yield _row(f"{kind}: standard error of the difference", found.get("standard_error_of_difference"))
    if cmmd := results.get("cmmd"):
        yield _row(f"CMMD ({cmmd['num_pictures']} pictures)", cmmd["value"])


def finite(values: object) -> object:
    """Return the values with None for NaN and infinity, which JSON does not have."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def equal_steps(fewer: dict) -> str:
    """Say how many steps the teacher may take to be as far from its own pictures as the student is."""
    low, high = fewer["student_equals"]["at_least_steps"], fewer["student_equals"]["fewer_than_steps"]
    if low is None and high is None:
        return "(no smaller number of steps to compare with)"
    if low is None:
        return f"fewer than {high} steps"
    return f"{low} steps or more" if high is None else f"{low} to {high} steps"
