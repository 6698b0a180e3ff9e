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
    lines = [f"{name:<46}" + "".join(f"{cell:>14}" for cell in cells) for name, *cells in rows]
    lines += frontier_lines(results["frontier"]) if "frontier" in results else []
    return [*lines, *textwrap.wrap(results["noise"]["meaning"], 106)]


def comparison_rows(results: dict, in_detail: bool = False) -> list[Row]:
    """Return the results as rows of name, student, teacher and ratio.

    Args:
        in_detail: whether to show what a figure consists of too: noise levels and a judge's facts.
    """
    rows = [*_judged("prompt drawn right", results, in_detail), *_distances(results)]
    rows += _noise(results["noise"])
    if velocity := results.get("velocity_error"):
        rows.append(_row("relative velocity error", velocity["mean"]))
        levels = velocity["by_sigma"] if in_detail else []
        rows += [_row(f"  {_sigmas(level)} ({level['count']} states)", level["mean"]) for level in levels]
    rows.append(_row("high frequency energy", *_three(results["high_frequency_energy"])))
    rows += _scores(results)
    rows += [_row(name.replace("_", " "), *_three(values)) for name, values in results["cost"].items()]
    if "frontier" in results and (row := recommended_row(results["frontier"])) and row["times_cheaper"]:
        name = f"cost of a picture, {row['steps']} steps; teacher as near"
        rows.append(
            _row(name, f"{row['cost']:.2%}", f"{row['cost'] * row['times_cheaper']:.2%}", 1 / row["times_cheaper"])
        )
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


def _distances(results: dict) -> Iterator[Row]:
    endpoint = results["endpoint"]
    yield _row("distance to the teacher's latents, relative", endpoint["latent_relative_error"])
    yield _row("PSNR, dB", endpoint["psnr_db"])


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


# ---- the frontier ----


def frontier_lines(frontier: dict) -> list[str]:
    """Return the frontier as a table for the screen, and below it what the recommended number of steps is worth."""
    about = f"{frontier['num_prompts']} prompts x {frontier['num_seeds']} seeds"
    head = (
        "who",
        "steps",
        "sampler",
        "cost",
        "seconds",
        "endpoint",
        "cosine",
        "size",
        "right",
        "as teacher in",
        "cheaper",
    )
    lines = ["", f"In fewer steps ({about}; cost in FLOPs, as a share of the teacher's in all of its steps):"]
    for who, steps, sampler, *cells in (head, *map(_frontier_row, frontier["rows"])):
        lines.append(
            f"{who:<8}{steps:>6}  {sampler:<13}"
            + "".join(f"{cell:>10}" for cell in cells[:-2])
            + "{:>15}{:>9}".format(*cells[-2:])
        )
    return [*lines, nearness(frontier), ""]


def _frontier_row(row: dict) -> Row:
    numbers = [row["endpoint"], row["noise_cosine"], row["noise_size"], row["right"]]
    worth = ["", ""]
    if row["who"] == "student":
        least = ">" if row["at_least"] else ""
        values = ((row["teacher_steps"], " steps"), (row["times_cheaper"], "x"))
        worth = ["-" if value is None else f"{least}{value:.3g}{unit}" for value, unit in values]
    shown = ["-" if number is None else f"{number:.3f}" for number in numbers]
    return row["who"], str(row["steps"]), row["sampler"], f"{row['cost']:.2%}", f"{row['seconds']:.3g}", *shown, *worth


def recommended_row(frontier: dict) -> dict | None:
    """Return the student's row at the recommended number of steps."""
    rows = (
        row for row in frontier["rows"] if row["who"] == "student" and row["steps"] == frontier["recommended_steps"]
    )
    return next(rows, None)


def nearness(frontier: dict) -> str:
    """Say what the student is worth in the recommended number of steps."""
    if (row := recommended_row(frontier)) is None:
        return "The student's pictures hold no numbers that could be compared."
    count, least = "1 step" if row["steps"] == 1 else f"{row['steps']} steps", "more than " if row["at_least"] else ""
    if row["teacher_steps"] is None:
        return f"In {count} the student is farther from the teacher's pictures than the teacher itself in its fewest steps."
    return (
        f"In {count} the student is as near to the teacher's pictures as the teacher itself in {least}{row['teacher_steps']:.2g} "
        f"steps, and {least}{row['times_cheaper']:.3g} times cheaper."
    )
