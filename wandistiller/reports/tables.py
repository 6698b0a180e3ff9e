"""An evaluation as sentences and as rows of one table, for the screen and the gallery, and as values that JSON can hold."""

import math
import textwrap
from collections.abc import Iterator, Sequence

Row = tuple[str, ...]
HEAD = ("", "student", "teacher", "ratio", "better")
NUM_WORST, WIDTH = 3, 106


def cell_text(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def report_lines(results: dict) -> list[str]:
    """Return an evaluation for the screen: what the student is worth in a sentence, its worst prompts, then tables."""
    worst = (f"{one['prompt']!r} ({cell_text(one['distance'])})" for one in results["worst_prompts"])
    farthest = f"Farthest from the teacher: {'; '.join(worst)}"
    lines = ["", *textwrap.wrap(headline(results), WIDTH), *textwrap.wrap(farthest, WIDTH), ""]
    if "frontier" in results:
        lines += frontier_lines(results["frontier"])
    lines += picture_lines(results["picture"])
    rows = [HEAD, *comparison_rows(results)]
    lines += [f"{name:<46}{_cells(cells)}" for name, *cells in rows]
    return lines


def headline(results: dict) -> str:
    """Say in one sentence what the student is worth, in the recommended number of steps where the frontier was drawn."""
    if "frontier" not in results:
        error = results["endpoint"]["latent_relative_error"]
        return (
            f"The student's pictures are at a relative distance of {cell_text(error)} from the teacher's (0: the same)."
        )
    return nearness(results["frontier"])


def worst_prompts(prompts: Sequence[str], distances: Sequence[float]) -> list[dict]:
    ranked = sorted(zip(prompts, distances, strict=True), key=lambda both: -both[1])
    return [{"prompt": prompt, "distance": distance} for prompt, distance in ranked[:NUM_WORST]]


def comparison_rows(results: dict) -> list[Row]:
    """Return the results as rows of name, student, teacher, ratio, and which way is better."""
    rows = [*_judged(results)]
    rows.append(_row("distance to the teacher's latents, relative", results["endpoint"]["latent_relative_error"]))
    for what, name, better in (("size", "norm_ratio", "1"), ("cosine", "cosine", "higher"), ("gain", "gain", "1")):
        rows.append(_row(f"what the noise decides: {what}", results["noise"][name], better=better))
    if velocity := results.get("velocity_error"):
        rows.append(_row("relative velocity error", velocity["mean"]))
    for name, cost in results["cost"].items():
        rows.append(_row(name.replace("_", " "), cost["student"], cost["teacher"], cost["ratio"]))
    return rows


def _row(name: str, *values: str | float | None, better: str = "lower") -> Row:
    """Return a row of texts; a value that could not be measured is "-", and one that there is not is empty."""
    return name, *map(cell_text, values), *[""] * (3 - len(values)), better


def _judged(results: dict) -> Iterator[Row]:
    """Yield how many pictures the judge holds for right, and what else it says; nothing without a judge."""
    if judged := results.get("accuracy"):
        student, teacher = judged["student"], judged["teacher"]
        if "correct" in student:
            both = student["correct"], teacher["correct"]
            kept = both[0] / both[1] if both[1] else None
            yield _row("prompt drawn right", *(f"{right:.1%}" for right in both), kept, better="higher")
        for fact in student:
            if fact != "correct":
                yield _row(f"  {fact}", student[fact], teacher[fact], better="")


def picture_lines(parts: dict[str, dict]) -> list[str]:
    """Return what a picture costs from text to pixels as a table for the screen, with each part's share of the seconds."""
    shares = {}
    for who, other in (("student", "teacher"), ("teacher", "student")):
        own = {name: part["seconds"] for name, part in parts.items() if name != other}
        shares[who] = {name: f"{seconds / sum(own.values()):.1%}" for name, seconds in own.items()}
    titles = ("MiB", "GFLOPs", "seconds", "of student's", "of teacher's")
    lines = ["A picture from text to pixels, and each part's share of its seconds:", " " * 22 + _cells(titles)]
    for name, part in parts.items():
        numbers = (part["bytes"] / 2**20, part["flops"] / 1e9, part["seconds"])
        cells = [*map(cell_text, numbers), *(shares[who].get(name, "") for who in shares)]
        lines.append(f"{name:<22}{_cells(cells)}")
    return [*lines, ""]


def _cells(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>14}" for cell in cells)


def finite(values: object) -> object:
    """Return the values with None for NaN and infinity, which JSON does not have."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


# ---- the frontier ----

FRONTIER_COLUMNS = (  # title, entry of a row, how it is written, width
    ("who", "who", "s", 7),
    ("steps", "steps", "d", 7),
    ("sampler", "sampler", "s", 14),
    ("FLOPs", "cost", ".2%", 10),
    ("seconds", "seconds", ".3g", 10),
    ("endpoint", "endpoint", ".3f", 10),
    ("cosine", "noise_cosine", ".3f", 10),
    ("size", "noise_size", ".3f", 10),
    ("right", "right", ".3f", 10),
    ("as teacher in", "teacher_steps", ".3g", 15),
    ("cheaper", "times_cheaper", ".3g", 9),
)


def frontier_lines(frontier: dict) -> list[str]:
    """Return the frontier as a table for the screen; what could not be measured is "-"."""
    about = f"{frontier['num_prompts']} prompts x {frontier['num_seeds']} seeds"
    lines = [
        f"In fewer steps ({about}; FLOPs and seconds of a picture, FLOPs as a share of the teacher's in all of its steps;",
        "endpoint: distance to the teacher's picture, lower is better; cosine and size of what the noise decides, 1 is best):",
        "".join(f"{title:>{width}}" for title, _, _, width in FRONTIER_COLUMNS),
    ]
    for row in frontier["rows"]:
        known = {
            name: "-" if row[name] is None else f"{row[name]:{form}}"
            for _, name, form, _ in FRONTIER_COLUMNS
            if name in row
        }
        if row.get("at_least"):  # the teacher is not as near in any number of steps that was measured
            known |= {name: f">{known[name]}" for name in ("teacher_steps", "times_cheaper")}
        lines.append("".join(f"{known.get(name, ''):>{width}}" for _, name, _, width in FRONTIER_COLUMNS))
    return [*lines, ""]


def nearness(frontier: dict) -> str:
    """Say what the student is worth in the recommended number of steps."""
    recommended = "student", frontier["recommended_steps"]
    row = next((row for row in frontier["rows"] if (row["who"], row["steps"]) == recommended), None)
    if row is None:
        return "The student's pictures hold no numbers that could be compared."
    count, share = "1 step" if row["steps"] == 1 else f"{row['steps']} steps", f"{row['cost']:.1%}"
    least = "more than " if row["at_least"] else ""
    whole = f"of the cost of the teacher's picture in all of its {frontier['rows'][-1]['steps']}"
    if frontier["rows"][-1]["steps"] == 1:
        return f"In {count} the student's picture costs {share} {whole}; a teacher of one step has no fewer."
    if row["teacher_steps"] is None:
        return f"In {count}, at {share} {whole}, the student is farther from the teacher's pictures than the teacher in its fewest steps."
    return (
        f"In {count} the student is as near to the teacher's pictures as the teacher itself in {least}{row['teacher_steps']:.2g} "
        f"steps, at {share} {whole}: {least}{row['times_cheaper']:.3g} times cheaper than the teacher that is as near."
    )
