"""Measure a demo teacher with diffusers' own WanPipeline: prompt accuracy by pixels, and whether its clips move.

    python tools/check_demo_teacher.py --sheet teacher.png
    python tools/check_demo_teacher.py --size 96x64 --num_clips 0      # off the square

Held-out prompts name combinations that no training prompt holds; tools/demo_judge.py reads the pictures.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from wandistiller.flags import FlagParser, number
from wandistiller.model.image_sizes import ImageSize


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags; guidance and steps default to the teacher's own record."""
    count = number(int, low=1)
    parser = FlagParser("check_demo_teacher.py", __doc__.split("\n")[0])
    group = parser.group("Input")
    group.flag("--teacher_path", "pipeline folder", ROOT / "data" / "demo_teacher", type=Path)
    group.flag("--prompts", "prompts file", ROOT / "data" / "demo_heldout_prompts.txt", type=Path)
    group.flag("--num_prompts", "how many of the prompts to draw", 300, type=count)
    group.flag("--num_clips", "how many clips to draw", 40, type=number(int, low=0))
    group.flag("--guidance_scale", "(as recorded)", type=number(float, low=0))
    group.flag("--num_inference_steps", "(as recorded)", type=count)
    group.flag("--batch_size", "prompts drawn at a time", 50, type=count)
    group.flag("--size", "width x height of the pictures", ImageSize(64, 64), type=ImageSize.parse)
    group.flag("--seed", "of the noise", 1234, type=number(int, low=0))
    output = parser.group("Output")
    output.flag("--sheet", "PNG to write with the first pictures and clips", type=Path)
    output.flag("--write_record", "add the figures to teacher_record.json", False, action="store_true")
    return parser.parse(argv)


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file, one a line, without comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def load_pipeline(folder: Path):
    """Load the folder as WanPipeline does, in fp32, and check its token table."""
    import torch
    from demo_text import check_embeddings
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    check_embeddings(pipeline.text_encoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How pictures, or clips of several frames, are drawn; `size` is width and height."""

    steps: int
    guidance: float
    seed: int
    batch_size: int
    num_frames: int = 1
    size: tuple[int, int] = (64, 64)


def draw(pipeline, prompts: list[str], how: Drawing):
    """Draw prompts as uint8 (N, T, H, W, 3)."""
    import torch
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(how.seed)
    parts = []
    for start in tqdm(range(0, len(prompts), how.batch_size), desc=f"{how.num_frames} frame(s)"):
        result = pipeline(
            prompts[start : start + how.batch_size],
            width=how.size[0],
            height=how.size[1],
            num_frames=how.num_frames,
            guidance_scale=how.guidance,
            num_inference_steps=how.steps,
            generator=generator,
            output_type="np",
        )
        parts.append(np.round(np.asarray(result.frames) * 255).astype(np.uint8))
    return np.concatenate(parts)


def moving_prompts(count: int, seed: int) -> list[str]:
    """Make prompts for clips, one object each."""
    import demo_world

    rng = np.random.default_rng(seed)
    return [demo_world.describe(demo_world.sample_moving_scene(rng), rng, 0.0) for _ in range(count)]


def main(argv: list[str] | None = None) -> dict:
    """Draw, judge, print, and return the figures."""
    args = parse_args(argv)
    import demo_judge

    record_path = args.teacher_path / "teacher_record.json"
    record = json.loads(record_path.read_text(encoding="utf-8"))
    guidance = record["guidance_scale"] if args.guidance_scale is None else args.guidance_scale
    steps = args.num_inference_steps or record["num_inference_steps"]
    how = Drawing(steps=steps, guidance=guidance, seed=args.seed, batch_size=args.batch_size, size=args.size)
    pipeline = load_pipeline(args.teacher_path)

    # Stills of held-out combinations:
    prompts = read_prompts(args.prompts)[: args.num_prompts]
    pictures = draw(pipeline, prompts, how)[:, 0]
    facts = [demo_judge.judge(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    correct = Counter(name for fact in facts for name, is_right in fact.items() if is_right)
    figures = {name: round(correct[name] / len(prompts), 4) for name in (*demo_judge.FACTS, "correct")}
    figures |= {
        "picture_size": str(args.size),
        "num_prompts": len(prompts),
        "guidance_scale": guidance,
        "num_inference_steps": steps,
    }
    for prompt, fact in zip(prompts, facts, strict=True):
        if not fact["correct"]:
            print("wrong:", prompt, "->", ", ".join(name for name in demo_judge.FACTS if not fact[name]))

    # Clips of moving objects:
    clip_prompts = moving_prompts(args.num_clips, args.seed)
    if clip_prompts:
        clips = draw(pipeline, clip_prompts, replace(how, num_frames=5))
        judged = [demo_judge.judge_clip(clip, prompt) for clip, prompt in zip(clips, clip_prompts, strict=True)]
        figures["clips_move"] = round(float(np.mean([fact["moves"] for fact in judged])), 4)
        figures["clips_first_frame_correct"] = round(float(np.mean([fact["correct"] for fact in judged])), 4)
        figures["num_clips"] = len(clip_prompts)

    print(json.dumps(figures, indent=2))
    if args.sheet:
        import demo_world
        from PIL import Image

        shown = [*pictures[:50], *[frame for clip in clips[:10] for frame in clip]] if clip_prompts else pictures[:50]
        Image.fromarray(demo_world.contact_sheet(list(shown), columns=10)).save(args.sheet)
    if args.write_record:
        record["held_out_accuracy"] = figures
        record_path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
