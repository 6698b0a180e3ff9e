"""Print prompts that templates give, and count how many different ones there are.

    python tools/sample_prompts.py --num_prompts 20
    python tools/sample_prompts.py --prompts my_templates --seed 3 --held_out
    python tools/sample_prompts.py --count 1200000

`--count` draws so many prompts and counts those that differ, which takes about a minute a million.
"""

import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wandistiller.command_line import run_command
from wandistiller.flags import FlagParser, number, path
from wandistiller.prompts.templates import Templates, draw_prompts


def main(argv: list[str] | None = None) -> int:
    parser = FlagParser("sample_prompts.py", __doc__)
    group = parser.group("Prompts")
    group.flag("--prompts", "folder or file of templates", str(ROOT / "data" / "prompt_templates"), type=path)
    group.flag("--seed", "another one gives other prompts", 0, type=number(int, low=0))
    group.flag("--held_out", "print those that no run trains on", False, action="store_true")
    group.flag("--num_prompts", "how many are printed, from the first", 10, type=number(int, low=0))
    group.flag("--count", "how many are drawn to count the different ones", 0, type=number(int, low=0))
    args = parser.parse(argv)
    train, held_out = draw_prompts(args.prompts, args.seed, args.num_prompts, args.num_prompts)
    for prompt in (held_out if args.held_out else train)[: args.num_prompts]:
        print(prompt)
    if args.count:
        templates, generator = Templates(args.prompts), random.Random(args.seed)
        # A digest of each would do; Python's own hash tells two prompts of one process apart as well.
        different = {hash(templates.draw(generator)) for _ in range(args.count)}
        print(f"{args.count:,} draws gave {len(different):,} different prompts", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
