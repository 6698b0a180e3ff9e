"""Print prompts that templates give, and count how many different ones there are.

    python tools/sample_prompts.py --num_prompts 20
    python tools/sample_prompts.py --prompts my_templates --seed 3 --held_out
    python tools/sample_prompts.py --count 1200000

`--count` draws so many prompts and counts those that differ, which takes about a minute a million.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wandistiller.command_line import run_command
from wandistiller.flags import FlagParser, number, path
from wandistiller.prompts.templates import TemplatePrompts, Templates


def main(argv: list[str] | None = None) -> int:
    parser = FlagParser("sample_prompts.py", __doc__)
    group = parser.group("Prompts")
    group.flag("--prompts", "folder or file of templates", str(ROOT / "data" / "prompt_templates"), type=path)
    group.flag("--seed", "another one gives other prompts", 0, type=number(int, low=0))
    group.flag("--held_out", "print those that no run trains on", False, action="store_true")
    group.flag("--num_prompts", "how many are printed, from the first", 10, type=number(int, low=0))
    group.flag("--count", "how many are drawn to count the different ones", 0, type=number(int, low=0))
    args = parser.parse(argv)
    templates = Templates.load(args.prompts)
    prompts = TemplatePrompts(templates, args.seed, args.held_out)
    for prompt in prompts[: args.num_prompts]:
        print(prompt)
    print(
        f"{templates.num_templates} templates and {len(templates.wildcards)} wildcards, {templates.count:,} ways to draw a prompt",
        file=sys.stderr,
    )
    if args.count and prompts.is_endless:
        # A digest of each would do; Python's own hash tells two prompts of one process apart as well.
        different = {hash(prompts.drawn(index)) for index in range(args.count)}
        print(f"{args.count:,} draws gave {len(different):,} different prompts", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
