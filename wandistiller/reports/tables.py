"""An evaluation as a table, for the screen and for a model card, and as values that JSON can hold."""

import math
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from wandistiller.files.hub import hub_id


def cell_text(value: str | float | None) -> str:
    """Return a value as a table shows it."""
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def table_lines(results: dict) -> list[str]:
    """Return the results as the lines of a table for the screen."""

    def line(name: str, *cells: str | float | None) -> str:
        return f"{name:<42}" + "".join(f"{cell_text(cell):>16}" for cell in cells)

    def compared(name: str, row: dict) -> str:
        return line(name, row["student"], row["teacher"], row["ratio"])

    endpoint, fewer = results["endpoint"], results["teacher_at_fewer_steps"]
    lines = [line("", "student", "teacher", "ratio")]
    if "accuracy" in results:
        judged = results["accuracy"]
        both = judged["student"], judged["teacher"]
        lines += [
            line(f"prompt accuracy ({judged['num_pictures']} pictures)", *(b["correct"] for b in both), judged["ratio"])
        ]
        lines += [line(f"  {name}", *(b[name] for b in both)) for name in both[0] if name != "correct"]
        lines += [line(f"  teacher at {n} steps", "", share) for n, share in fewer["accuracy"].items()]
    lines += [
        line("endpoint: latent relative error", endpoint["latent_relative_error"]),
        line("endpoint: PSNR, dB", endpoint["psnr_db"]),
        line("endpoint: SSIM", endpoint["ssim"]),
        *(line(f"  teacher at {n} steps: relative error", "", e) for n, e in fewer["latent_relative_error"].items()),
        f"  the student equals the teacher at {equal_steps(fewer)}",
    ]
    lines += noise_lines(results["noise"], line)
    if "velocity_error" in results:
        lines.append(line("relative velocity error", results["velocity_error"]["mean"]))
        for bucket in results["velocity_error"]["by_sigma"]:
            low, high = bucket["sigma"]
            lines.append(line(f"  sigma {low:.1f} to {high:.1f} ({bucket['count']} states)", bucket["mean"]))
    lines.append(compared("high frequency energy", results["high_frequency_energy"]))
    for name, values in score_rows(results):
        lines.append(line(name, *values))
    for name, row in results["cost"].items():
        lines.append(compared(name.replace("_", " "), row))
    return [*lines, *size_lines(results, line)]


def size_lines(results: dict, line: Callable[..., str]) -> list[str]:
    """Return what was measured at each image size as lines of the table; nothing where there is one."""
    lines = []
    for size, measured in results.get("by_size", {}).items():
        if judged := measured.get("accuracy"):
            both = (judged[who]["correct"] for who in ("student", "teacher"))
            lines.append(line(f"{size}: prompt accuracy", *both, judged["ratio"]))
        lines.append(line(f"{size}: latent relative error", measured["endpoint"]["latent_relative_error"]))
        lines.append(line(f"{size}: gain of what the noise decides", measured["noise"]["gain"]))
    return lines


def score_rows(results: dict) -> list[tuple[str, tuple]]:
    """Return what scorers said as rows of a name and the values of student, teacher and ratio; none where there were none."""
    rows: list[tuple[str, tuple]] = []
    for kind, found in (results.get("scores") or {}).items():
        model = found["model"]
        rows.append(
            (f"{kind} is {hub_id(model) or Path(model).name}", ("",))
        )  # paths of a machine are nobody else's business
        if "cosine" in found:
            rows += [
                (f"{kind}: cosine to the teacher's picture", (found["cosine"],)),
                (f"{kind}: standard error", (found["standard_error"],)),
                (f"{kind}: cosine to pictures of other prompts", (found["of_other_prompts"],)),
            ]
            continue
        rows += [
            (f"{kind}: cosine to the prompt", (found["student"], found["teacher"], found["ratio"])),
            (f"{kind}: standard error of the difference", (found.get("standard_error_of_difference"),)),
        ]
    if cmmd := results.get("cmmd"):
        rows.append((f"CMMD ({cmmd['num_pictures']} pictures)", (cmmd["value"],)))
    return rows


def noise_lines(noise: dict, line: Callable[..., str]) -> list[str]:
    """Return what the prompt decides and what the noise decides as lines of the table, and below them what they mean."""
    lines = [
        line("what the prompt decides: error", noise["mean_error"]),
        line("what the noise decides: error", noise["noise_error"]),
        line("  size", *noise_sizes(noise)),
        line("  cosine to the teacher's", noise["cosine"]),
        line("  gain: share of the teacher's in it", noise["gain"]),
    ]
    return lines + textwrap.wrap(noise["meaning"], 106, initial_indent="  ", subsequent_indent="  ")


def noise_sizes(noise: dict) -> tuple[float | None, float | None, float | None]:
    """Return the size of the student's noise part, that of the teacher's, and their ratio."""
    teacher, ratio = noise["teacher_noise"], noise["norm_ratio"]
    return (None if ratio is None else ratio * teacher), teacher, ratio


def comparison_rows(results: dict) -> list[tuple[str, str, str, str]]:
    """Return the results as rows of name, student, teacher and ratio, for a markdown table."""

    def row(name: str, *values: str | float | None) -> tuple[str, str, str, str]:
        student, teacher, ratio = (["" if value is None else cell_text(value) for value in values] + ["", ""])[:3]
        return name, student, teacher, ratio

    endpoint = results["endpoint"]
    rows: list[tuple[str, str, str, str]] = []
    if judged := results.get("accuracy"):
        student, teacher = (f"{judged[who]['correct']:.1%}" for who in ("student", "teacher"))
        rows.append(("prompt drawn right", student, teacher, cell_text(judged["ratio"])))
    for size, measured in results.get("by_size", {}).items():
        if judged := measured.get("accuracy"):
            student, teacher = (f"{judged[who]['correct']:.1%}" for who in ("student", "teacher"))
            rows.append((f"prompt drawn right at {size}", student, teacher, cell_text(judged["ratio"])))
        rows.append(row(f"distance to the teacher's latents at {size}", measured["endpoint"]["latent_relative_error"]))
    if "velocity_error" in results:
        rows.append(row("relative velocity error", results["velocity_error"]["mean"]))
    rows += [
        row("distance to the teacher's latents, relative", endpoint["latent_relative_error"]),
        row("PSNR, dB", endpoint["psnr_db"]),
        row("SSIM", endpoint["ssim"]),
    ]
    if noise := results.get("noise"):  # which an evaluation.json of an earlier version lacks
        rows += [
            row("what the prompt decides: error", noise["mean_error"]),
            row("what the noise decides: error", noise["noise_error"]),
            row("what the noise decides: size", *noise_sizes(noise)),
            row("what the noise decides: cosine to the teacher's", noise["cosine"]),
            row("what the noise decides: gain", noise["gain"]),
        ]
    rows += [row(name, *values) for name, values in score_rows(results)]
    compared = {"high_frequency_energy": results["high_frequency_energy"], **results["cost"]}
    for name, values in compared.items():
        rows.append(row(name.replace("_", " "), values["student"], values["teacher"], values["ratio"]))
    return rows


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


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
