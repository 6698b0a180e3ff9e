"""Make the demo teacher from nothing: a small, trained text-to-video pipeline in Wan's format.

    python tools/make_demo_teacher.py                                     # CPU, about an hour on 2 cores
    python tools/make_demo_teacher.py --device cuda --steps 20000         # GPU
    python tools/make_demo_teacher.py --tiny --output_dir /tmp/teacher    # seconds: every stage, nothing learnt
    python tools/make_demo_teacher.py --sizes 64x64 96x64 64x96           # CPU, minutes: a sibling that draws off the square

The story: a world of coloured shapes (demo_world.py) gives prompts, stills and clips; a tokenizer knows its words; a
video autoencoder learns its pictures (demo_vae.py); a Wan transformer and a UMT5 text encoder learn together to draw
them from prompts (demo_transformer.py); all of it is saved as a folder that diffusers' WanPipeline loads unchanged.
Each stage is kept in --work_dir, and the same command resumes where it stopped. With --sizes the transformer and the text
encoder of --start are trained further, on stills of these sizes, each batch of one size.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from wandistiller.flags import FlagParser, number
from wandistiller.model.image_sizes import ImageSize

TINY = {"vae_steps": [1, 2, 1], "steps": 8, "batch_size": 4, "num_stills": 16, "num_clips": 4}
TINY |= {"num_prompts": 20, "num_measured": 4}
DEMO_TEACHER = ROOT / "data" / "demo_teacher"
# One training prompt of so many leaves size or place open, as people's prompts do: the student sees too few of them otherwise.
OPEN_EVERY = 8
# What the flags become that were left out: for a teacher from nothing, and for its sibling of several sizes.
FROM_NOTHING = {"output_dir": DEMO_TEACHER, "steps": 2000, "batch_size": 160, "num_stills": 16000, "lr": 2e-3}
SIBLING = {"output_dir": ROOT / "outputs" / "demo_teacher_sizes", "steps": 300, "batch_size": 48, "num_stills": 1500}
SIBLING |= {"lr": 6e-4}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags; `--tiny` overrides the step counts and sizes, and `--sizes` has other defaults."""
    count = number(int, low=1)
    parser = FlagParser("make_demo_teacher.py", __doc__.split("\n")[0])
    folders = parser.group("Folders")
    folders.flag(
        "--output_dir",
        "pipeline folder to write (data/demo_teacher; with --sizes outputs/demo_teacher_sizes)",
        type=Path,
    )
    folders.flag("--prompts_dir", "where to write the two prompt lists (beside output_dir)", type=Path)
    folders.flag("--work_dir", "unfinished stages (output_dir with '.work' appended)", type=Path)

    training = parser.group("Training")
    training.flag("--seed", "of everything", 0, type=number(int, low=0))
    training.flag("--device", "cpu or cuda", "cpu")
    training.flag("--vae_steps", "VAE steps on crops, clips, whole pictures", [1000, 1000, 300], type=count, nargs=3)
    training.flag("--steps", "of transformer and text encoder (2000; with --sizes 300)", type=count)
    training.flag(
        "--batch_size", "stills per step; batches of clips are half as large (160; with --sizes 48)", type=count
    )
    training.flag("--num_stills", "rendered stills to train on (16000; with --sizes 1500 of each)", type=count)
    training.flag("--num_clips", "rendered clips to train on", 1200, type=count)
    training.flag(
        "--lr",
        "peak learning rate of transformer and text encoder (0.002; with --sizes 0.0006)",
        type=number(float, above=0),
    )
    training.flag("--tiny", "a few steps of every stage, for tests", False, action="store_true")

    sibling = parser.group("A sibling that draws off the square")
    sibling.flag(
        "--sizes", "sizes of its stills, such as 64x64 96x64 64x96", type=ImageSize.parse, nargs="+", metavar="WxH"
    )
    sibling.flag("--start", "the pipeline folder that is trained further, whose VAE stays", DEMO_TEACHER, type=Path)

    result = parser.group("Result")
    result.flag("--num_measured", "stills to measure the VAE's PSNR on; a quarter as many clips", 128, type=count)
    result.flag("--num_prompts", "lines of demo_prompts.txt", 2000, type=count)
    result.flag("--num_heldout_prompts", "lines of demo_heldout_prompts.txt", 300, type=count)
    result.flag("--num_underspecified_prompts", "lines of demo_heldout_underspecified.txt", 120, type=count)
    result.flag("--guidance_scale", "guidance to record for drawing", 3.0, type=number(float, low=0))
    result.flag("--num_inference_steps", "sampling steps to record for drawing", 20, type=count)

    args = parser.parse(argv)
    for name, value in (SIBLING if args.sizes else FROM_NOTHING).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.work_dir = args.work_dir or args.output_dir.with_name(args.output_dir.name + ".work")
    args.prompts_dir = args.prompts_dir or args.output_dir.parent
    vars(args).update(TINY if args.tiny else {})
    return args


def write_prompts(folder: Path, num_prompts: int, num_heldout: int, seed: int) -> None:
    """Write the training prompts, and held-out prompts whose every scene holds a combination never trained on."""
    import demo_world as world
    import numpy as np

    for name, count, held_out, variety, note in (
        ("demo_prompts.txt", num_prompts, False, 0.25, "training prompts of the demo world"),
        ("demo_heldout_prompts.txt", num_heldout, True, 0.0, "each holds a combination that no training prompt holds"),
    ):
        rng, open_rng = np.random.default_rng([seed, held_out]), np.random.default_rng([seed, 3])
        prompts: dict[str, None] = {}
        while len(prompts) < count:
            if not held_out and len(prompts) % OPEN_EVERY == OPEN_EVERY - 1:
                scene = world.sample_scene(open_rng, two_objects=0)
                prompts[world.describe_partly(scene, open_rng, world.UNSAID[len(prompts) % len(world.UNSAID)])] = None
                continue
            scene = world.sample_scene(rng, two_objects=0.5, held_out=held_out)
            prompts[world.describe(scene, rng, variety)] = None
        text = f"# {note}; written by tools/make_demo_teacher.py\n" + "\n".join(prompts) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def write_underspecified(folder: Path, count: int, seed: int) -> None:
    """Write held-out prompts that leave something open, kind by kind in turn, so that any first few hold all kinds."""
    import demo_world as world
    import numpy as np

    rng = np.random.default_rng([seed, 2])
    prompts: dict[str, None] = {}
    for index in itertools.count():
        scene = world.sample_scene(rng, two_objects=0, held_out=True)
        prompts[world.describe_partly(scene, rng, world.UNSAID[index % len(world.UNSAID)])] = None
        if len(prompts) == count:
            break
    note = "the noise decides what each leaves unsaid; written by tools/make_demo_teacher.py"
    text = f"# {note}\n" + "\n".join(prompts) + "\n"
    (folder / "demo_heldout_underspecified.txt").write_text(text, encoding="utf-8")


def vae_stage(args: argparse.Namespace):
    """Train the VAE, or load it from the work folder; return it with its reconstruction PSNR."""
    import demo_vae
    import torch

    device = torch.device(args.device)
    minutes_file = args.work_dir / "vae_minutes.json"
    if not minutes_file.exists():
        started = time.time()
        crop, clip, full = args.vae_steps
        vae = demo_vae.train_vae(crop_steps=crop, clip_steps=clip, full_steps=full, seed=args.seed, device=device)
        vae.save_pretrained(args.work_dir / "vae")
        minutes_file.write_text(json.dumps(round((time.time() - started) / 60, 1)), encoding="utf-8")
    vae = demo_vae.load_vae(args.work_dir, device)
    figures = {
        "vae_minutes": json.loads(minutes_file.read_text(encoding="utf-8")),
        "vae_still_psnr_db": round(demo_vae.still_psnr(vae, args.seed, args.num_measured), 2),
        "vae_clip_psnr_db": round(demo_vae.clip_psnr(vae, args.seed, max(1, args.num_measured // 4)), 2),
    }
    print(f"vae: {figures['vae_still_psnr_db']} dB on stills, {figures['vae_clip_psnr_db']} dB on clips")
    if figures["vae_still_psnr_db"] < 30 and not args.tiny:
        raise SystemExit(f"VAE below 30 dB: remove {minutes_file} and raise --vae_steps")
    return vae, figures


def transformer_stage(args: argparse.Namespace, vae, tokenizer):
    """Train transformer and text encoder, or resume their training."""
    import demo_transformer
    import torch

    def open_pool():
        cache = args.work_dir / "latents.pt"
        return demo_transformer.LatentPool(vae, args.num_stills, args.num_clips, args.seed, cache)

    training = demo_transformer.Training(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        device=torch.device(args.device),
        work=args.work_dir,
    )
    return demo_transformer.train_transformer(tokenizer, open_pool, training)


def save_pipeline(folder: Path, vae, tokenizer, text_encoder, transformer) -> None:
    """Write the folder: transformer and text encoder in bf16, VAE in fp32, as the released Wans are."""
    import demo_transformer
    import torch
    from diffusers import UniPCMultistepScheduler, WanPipeline
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    for block in transformer.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=1000,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=demo_transformer.FLOW_SHIFT,
    )
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.to("cpu", torch.bfloat16),
        vae=vae.to("cpu"),
        scheduler=scheduler,
        transformer=transformer.to("cpu", torch.bfloat16),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # written for the owner alone


def make_sibling(args: argparse.Namespace) -> None:
    """Train --start further on stills of --sizes, and write it as a folder of its own."""
    import demo_text
    import demo_transformer
    import demo_vae
    import torch
    from transformers import T5TokenizerFast

    device = torch.device(args.device)
    vae = demo_vae.load_vae(args.start, device)
    tokenizer = T5TokenizerFast.from_pretrained(args.start / "tokenizer")  # nosec B615 # a local folder
    training = demo_transformer.Training(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        device=device,
        work=args.work_dir,
        start=args.start,
        clip_every=0,
        ema=0.98,
    )
    transformer, text_encoder = demo_transformer.train_transformer(
        tokenizer, lambda: demo_transformer.SizedPool(vae, args.num_stills, args.sizes, args.seed), training
    )
    save_pipeline(args.output_dir, vae, tokenizer, text_encoder, transformer)
    demo_text.check_embeddings(text_encoder)
    minutes = demo_transformer.training_minutes(args.work_dir)
    sizes = [str(size) for size in args.sizes]
    own = {"start": args.start.name, "vae_steps": [0, 0, 0], "sizes": sizes, "transformer_minutes": minutes}
    write_record(args, own)


def write_record(args: argparse.Namespace, figures: dict) -> None:
    """Write what the folder is and how to draw with it; the trainer reads its defaults from here."""
    import demo_text
    import demo_world

    record = {
        "world": "shapes",
        "guidance_scale": args.guidance_scale,
        "negative_prompt": "",  # what prompt dropout trained as the unconditional branch
        "num_inference_steps": args.num_inference_steps,
        "image_size": demo_world.IMAGE_SIZE,
        "text_max_length": demo_text.TEXT_MAX_LENGTH,
        "training": {
            "seed": args.seed,
            "device": args.device,
            "vae_steps": args.vae_steps,
            "steps": args.steps,
            "batch_size": args.batch_size,
            "lr": args.lr,
            **figures,
        },
    }
    (args.output_dir / "teacher_record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Run every stage that is not done yet."""
    args = parse_args(argv)
    for folder in (args.work_dir, args.prompts_dir, args.output_dir):
        folder.mkdir(parents=True, exist_ok=True)
    if args.sizes:
        make_sibling(args)
        print(
            f"{args.output_dir}; measure it with: python tools/check_demo_teacher.py --teacher_path {args.output_dir}"
        )
        return
    import demo_text
    import demo_transformer
    import demo_world
    import torch
    from diffusers import WanPipeline

    started = time.time()
    print(f"VAE {sum(args.vae_steps)} steps, transformer {args.steps} of {args.batch_size}; work in {args.work_dir}")

    # The world's prompts:
    write_prompts(args.prompts_dir, args.num_prompts, args.num_heldout_prompts, args.seed)
    write_underspecified(args.prompts_dir, args.num_underspecified_prompts, args.seed)
    tokenizer = demo_text.make_tokenizer(demo_world.vocabulary())

    # The autoencoder, then what draws in its latents:
    vae, figures = vae_stage(args)
    transformer, text_encoder = transformer_stage(args, vae, tokenizer)

    # The folder, and a look at it as a stranger would load it:
    save_pipeline(args.output_dir, vae, tokenizer, text_encoder, transformer)
    write_record(args, figures | {"transformer_minutes": demo_transformer.training_minutes(args.work_dir)})
    pipeline = WanPipeline.from_pretrained(args.output_dir, dtype=torch.float32)
    demo_text.check_embeddings(pipeline.text_encoder)
    size = sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file())
    print(f"{args.output_dir}: {size / 2**20:.1f} MiB in {(time.time() - started) / 60:.1f} minutes")
    print("measure it with: python tools/check_demo_teacher.py")


if __name__ == "__main__":
    main()
