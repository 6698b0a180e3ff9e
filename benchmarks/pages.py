"""Pages of docs/ that hold what a benchmark measured or computed, between marks in their text."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Tables = Mapping[str, Callable[[], str]]


def with_tables(page: str, tables: Tables) -> str:
    """Return a page with fresh tables between its marks; those of other names stay as they are."""

    def fresh(match: re.Match) -> str:
        return match[1] + tables[match[2]]() + match[3] if match[2] in tables else match[0]

    return re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", fresh, page, flags=re.DOTALL)


def print_or_write(about: str, pages: Sequence[Path], tables: Tables) -> None:
    """Be the command of a script that computes tables: print them, or with --write put them into its pages."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = " and ".join(f"docs/{page.name}" for page in pages)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {where}")
    if not parser.parse_args().write:
        for name, table in tables.items():
            print(f"<!-- table: {name} -->\n{table()}<!-- end -->\n")
        return
    for page in pages:
        page.write_text(with_tables(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def write_section(page: Path, name: str, text: str) -> None:
    """Put Markdown between the two marks that a page has for a benchmark."""
    start, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.read_text(encoding="utf-8").split(start)
    _, after = rest.split(end)
    page.write_text(f"{before}{start}\n\n{text}\n{end}{after}", encoding="utf-8")
