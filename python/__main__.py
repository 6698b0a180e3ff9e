"""What `torchrun python train_distillation.py` runs: torchrun starts Python itself, and takes `python` for a script.

A folder of that name is run in its place, so that the slip is answered instead of "can't open file".
"""

import os
import sys


def main() -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        command = " ".join(sys.argv[1:]) or "train_distillation.py ..."
        print(
            f"error: torchrun starts Python itself; leave the word python out: torchrun --nproc_per_node N {command}",
            file=sys.stderr,
        )
    return 2


if __name__ == "__main__":
    sys.exit(main())
