"""What each file of config/presets comes to: its flags, memory, disk and hours, tables of docs/training.md and docs/memory.md.

    python benchmarks/recipes.py            # prints the tables
    python benchmarks/recipes.py --write    # puts them into the pages

A preset is planned as `--dry_run` plans it, for a teacher of the released shape. Nothing here is measured: shapes are exact, the rate
of a GPU and the share of it that is reached are assumed.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from benchmarks.pages import print_or_write
from benchmarks.shapes import GIB, H100_FLOPS, MEAN_TEXT_TOKENS, NEGATIVE_TEXT_TOKENS, markdown, released_config
from wandistiller.budget.cards import CARDS, Card
from wandistiller.budget.memory import disk_budget, host_budget, memory_budget, peak_bytes
from wandistiller.budget.report import step_seconds
from wandistiller.budget.workload import Workload, step_flops
from wandistiller.model.config import StudentConfig
from wandistiller.processes import Processes
from wandistiller.prompts.prompts import Prompts
from wandistiller.run.dry_run import workload_of
from wandistiller.run.flags import PRESETS, parse_args
from wandistiller.run.headers import sampled_as
from wandistiller.run.inputs import Inputs
from wandistiller.run.resolve import decide
from wandistiller.run.settings import Settings
from wandistiller.wan.wan_files import WanFiles

PAGES = (ROOT / "docs" / "training.md", ROOT / "docs" / "memory.md")
MFU = 0.33  # share of the peak that others reached with Wan 14B, and that `--dry_run` takes
NUM_HELD_OUT = 32
# What is typed beside a preset: a teacher that a lightning LoRA was merged into
FOUR_STEPS = ["--teacher_steps", "4", "--guidance_scale", "1", "--shift", "5"]
# The presets that there are for cards of each size, the whole ones first
SIZES = ("", "-48GB", "-24GB")
SIZED = ("1.3B-0.5B", "5B-1B", "14B-1B", "A14B-1B")
WHOLE = [name for name in PRESETS if not name.endswith("GB")]
WEEKEND_HOURS = 60


@dataclass(frozen=True)
class Planned:
    """A preset's run: its settings, and what it takes by shapes."""

    settings: Settings
    workload: Workload

    @property
    def flops(self) -> float:
        return step_flops(self.workload).total * self.workload.num_steps

    @property
    def hours(self) -> float:
        return self.flops / (MFU * H100_FLOPS) / 3600

    @property
    def peak_gib(self) -> float:
        return peak_bytes(memory_budget(self.workload)) / GIB

    @property
    def host_gib(self) -> float:
        return peak_bytes(host_budget(self.workload)) / GIB

    def hours_on(self, card: Card) -> float:
        """Return what `--dry_run --assume_gpu` says of the whole run."""
        return sum(step_seconds(self.workload, card)) * self.workload.num_steps / 3600

    @property
    def disk_gib(self) -> float:
        return sum(part.num_bytes for part in disk_budget(self.workload)) / GIB


def released(name: str) -> WanFiles:
    """Return a released teacher by its shape alone; there are no files behind it."""
    teacher = name.split("-")[0]
    config = released_config(teacher.removeprefix("A"), 512)
    sides = ("high", "low") if teacher == "A14B" else ("high",)
    experts = dict.fromkeys(sides, SimpleNamespace(config=config))
    return WanFiles(name, experts)


@cache
def planned(name: str, *typed: str) -> Planned:
    """Return a preset's run with some flags typed beside it, as `--dry_run` would plan it on one GPU."""
    flags = parse_args(["--preset", name, *typed])
    config = StudentConfig.load(ROOT / flags.student_config)
    prompts = [f"prompt {number}" for number in range(flags.num_prompts)]
    wan_files = released(name)
    files = {"wan_files": wan_files, "teacher": sampled_as(flags, wan_files)}
    files |= dict.fromkeys(("encoder", "vae_location", "source"))
    inputs = Inputs(config, Prompts(prompts, prompts[:NUM_HELD_OUT], []), [])
    settings = decide(flags, inputs, files, Processes("cuda"))
    work = replace(
        workload_of(settings),
        mean_text_tokens=MEAN_TEXT_TOKENS,
        negative_text_tokens=NEGATIVE_TEXT_TOKENS if settings.teacher.uses_guidance else 0,
    )
    return Planned(settings, work)


# ---- tables ----


def presets_table() -> str:
    rows = []
    for name in WHOLE:
        run, typed = planned(name), parse_args(["--preset", name])
        own = run.settings
        rows.append(
            [
                f"`{name}`", f"{own.config.image_size}", f"{typed.num_prompts:,}",
                f"{own.batch_size} x {own.grad_accum_steps}", f"{typed.teacher_calls:,}", str(own.replay),
                f"{own.num_steps:,}", f"{own.optimization.lr:g}", own.teacher_dtype,
            ]
        )  # fmt: skip
    header = [
        "preset", "pixels", "prompts, at least", "--batch_size x --grad_accum_steps", "--teacher_calls", "--replay",
        "optimiser steps", "learning rate", "teacher kept in",
    ]  # fmt: skip
    return markdown(header, rows)


def hours_table() -> str:
    rows = []
    for name in WHOLE:
        run, few = planned(name), planned(name, *FOUR_STEPS)
        rows.append(
            [f"`{name}`", f"{run.flops / 1e18:.1f}", f"{run.hours:.0f}", f"{few.hours:.0f}", f"{run.disk_gib:.0f}"]
        )
    return markdown(["preset", "EFLOP", "hours", "with a teacher of 4 steps without guidance", "disk, GiB"], rows)


def memory_table() -> str:
    rows = []
    for name in SIZED:
        runs = [planned(name + size) for size in SIZES]
        rows.append([f"`{name}`", *(f"{run.peak_gib:.0f} / {run.host_gib:.0f}" for run in runs)])
    return markdown(
        ["preset, GiB of one GPU / of the host", *(f"`{size}`" if size else "as it is" for size in SIZES)], rows
    )


def cards_table() -> str:
    rows = [[card.name, *(offer(name, card) for name in SIZED)] for card in CARDS.values()]
    return markdown(["GPU", *(f"`{name}`" for name in SIZED)], rows)


def offer(name: str, card: Card) -> str:
    """Return the largest preset that fits on a card, its hours, and the teacher calls of a weekend where it takes longer."""
    size = next(size for size in SIZES if planned(name + size).peak_gib <= card.gib)
    run = planned(name + size)
    hours = run.hours_on(card)
    calls = f"; {100 * int(run.settings.num_calls * WEEKEND_HOURS / hours / 100):,}" if hours > WEEKEND_HOURS else ""
    return f"{f'`{size}` ' if size else ''}{hours:.0f} h{calls}"


TABLES: dict[str, Callable[[], str]] = {
    "presets": presets_table,
    "hours": hours_table,
    "memory": memory_table,
    "cards": cards_table,
}


if __name__ == "__main__":
    print_or_write(__doc__, PAGES, TABLES)
