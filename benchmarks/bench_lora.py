"""How much of a teacher's LoRA arrives at a student that it is cut for.

    python benchmarks/bench_lora.py --student outputs/demo                  # the student that the demo command leaves
    python benchmarks/bench_lora.py --student outputs/demo --change swap --scales 0.5 1 1.5

A LoRA is trained on the demo teacher as trainers do it, by flow matching on pictures with captions. --change says what it learns:
"green", what the teacher draws where every shape of the caption is green; or "swap", the teacher's own pictures with red and blue
changed over. It is cut for the student, and both draw held-out prompts with and without it from the same noise. The change of a
picture's latents at the student is held against that at the teacher: the cosine between the two, the ratio of their norms, and the
share of the squared error to the changed teacher that is closed; and the judge of the demo's world tells how many pictures are right
and changed.
Prints a table in Markdown, and as its last line one JSON document; writes the LoRAs and a picture to --output.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.demo_judge import OBJECT_RGB, judge
from wandistiller.files.pictures import labelled_grid, save_png
from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.lora import StudentLora, cut_loras, write_lora
from wandistiller.projection.project import project_teacher
from wandistiller.projection.selection_record import read_made_of
from wandistiller.prompts.prompts import load_prompts
from wandistiller.sampling.flow import seeded_noise, shift_sigma, sigma_to_timestep
from wandistiller.sampling.sampler import SamplingOptions, VelocityField, sample_in_batches, student_as_teacher
from wandistiller.sampling.teacher import Teacher
from wandistiller.students.drawing import embed_with_negative
from wandistiller.wan.layouts import open_teacher
from wandistiller.wan.lora import open_lora, shapes_of
from wandistiller.wan.names import without_frames
from wandistiller.wan.settings import resolve_settings
from wandistiller.wan.vae import decode, find_vae, load_vae

BATCH_SIZE = 64
NOISE_SEED, HELD_OUT_SEED = 11, 1_000_003
COLOUR = "green"
NUM_SHOWN = 6


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", required=True, help="folder of a student of the teacher")
    parser.add_argument("--teacher_path", default=str(ROOT / "data/demo_teacher"))
    parser.add_argument("--change", choices=["swap", "green"], default="green", help="what the LoRA is trained for")
    parser.add_argument("--data_path", default=str(ROOT / "data/demo_prompts.txt"))
    parser.add_argument("--heldout_prompts", default=str(ROOT / "data/demo_heldout_prompts.txt"))
    parser.add_argument(
        "--num_prompts", type=int, default=256, help="captions, a picture each, that the LoRA learns from"
    )
    parser.add_argument("--num_heldout", type=int, default=48)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=250, help="of the LoRA's training")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0], help="of the LoRA at the student")
    parser.add_argument("--prompt_cache", default=str(ROOT / "outputs/prompt_cache"))
    parser.add_argument("--output", default=str(ROOT / "outputs/bench_lora"))
    return parser.parse_args()


def recoloured(prompt: str) -> str:
    return re.sub(rf"\b({'|'.join(OBJECT_RGB)})\b", COLOUR, prompt)


class Bench:
    """The teacher, and the prompts that are trained on, that are drawn for them, and that are held out."""

    def __init__(self, args: argparse.Namespace):
        self.change = args.change
        self.config = StudentConfig.load(args.student)
        self.wan_files = open_teacher(args.teacher_path, self.config)
        self.settings = resolve_settings(self.wan_files)
        captions = load_prompts(args.data_path).prompts[: args.num_prompts]
        self.held_out = load_prompts(args.heldout_prompts).prompts[: args.num_heldout]
        texts = [*captions, *map(recoloured, captions), *self.held_out]
        embeds, self.negative = embed_with_negative(
            texts, self.settings, self.wan_files.text_encoder(), self.config, args.prompt_cache, "cpu"
        )
        count = len(captions)
        self.captions, self.drawn = embeds.first(count), embeds.part(count, count)
        self.held_out_embeds = embeds.part(2 * count, len(self.held_out))
        self.options = SamplingOptions(shift=self.settings.shift, num_inference_steps=self.settings.num_inference_steps)
        self.vae = load_vae(
            find_vae(None, args.teacher_path), self.config.num_channels, self.config.vae_scale_factor, "cpu"
        )

    def teacher(self, *loras: tuple[Path, float]) -> Teacher:
        model, _ = project_teacher(self.wan_files, text_max_length=self.config.text_max_length, loras=loras)
        return Teacher({"high": model}, self.settings, self.negative)

    def draw(self, field: VelocityField, embeds, seed: int) -> Tensor:
        shape = self.settings.latent_shape(self.config)
        noise = seeded_noise([seed + index for index in range(len(embeds))], shape)
        return sample_in_batches(field, noise, embeds, range(len(embeds)), self.options, BATCH_SIZE)

    def pictures(self, latents: Tensor):
        return decode(self.vae, latents, self.settings.latents_mean, self.settings.latents_std)

    @torch.no_grad()
    def changed_pictures(self, teacher: Teacher) -> Tensor:
        """Return the latents of the pictures that the LoRA learns from, one for each caption."""
        if self.change == "green":
            return self.draw(teacher, self.drawn, NOISE_SEED)
        pictures = torch.from_numpy(self.pictures(self.draw(teacher, self.captions, NOISE_SEED))).flip(-1)
        pixels = pictures.permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1
        encoded = torch.cat([self.vae.encode(part).latent_dist.mode()[:, :, 0] for part in pixels.split(BATCH_SIZE)])
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (self.settings.latents_mean, self.settings.latents_std)
        )
        return (encoded - mean) / std

    def share_as_wanted(self, latents: Tensor) -> float:
        """Return the share of held-out prompts whose picture the judge finds right, and changed as the LoRA should."""
        pictures, prompts = self.pictures(latents), self.held_out
        if self.change == "swap":
            pictures = pictures[..., ::-1]
        else:
            prompts = list(map(recoloured, prompts))
        right = [judge(picture, prompt)["correct"] for picture, prompt in zip(pictures, prompts, strict=True)]
        return sum(right) / len(right)


# ---- the teacher's LoRA ----


class Product(nn.Module):
    """A weight with `up @ down` added to it."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def with_products(model: WanLiteStudent, rank: int) -> dict[str, Product]:
    """Add a product to each linear layer of the blocks in place, and return them by the names of the layers."""
    torch.manual_seed(0)
    products = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            products[name] = Product(module.weight, rank)
            parametrize.register_parametrization(module, "weight", products[name])
    return products


def fit(products: dict[str, Product], batches: Iterator[tuple[Tensor, Tensor]], num_steps: int, lr: float) -> None:
    """Train products, given pairs of what a model answers and what it should."""
    parameters = [parameter for product in products.values() for parameter in product.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _, (velocity, expected) in zip(range(num_steps), batches, strict=False):
        loss = F.mse_loss(velocity, expected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"Loss of the last step: {loss.item():.4f}", file=sys.stderr)


def flow_matching(bench: Bench, model: WanLiteStudent, latents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        rows = torch.randint(len(latents), (BATCH_SIZE,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        sigma = shift_sigma(torch.rand(BATCH_SIZE, generator=generator), bench.settings.shift)
        mixed = torch.lerp(latents[rows], noise, sigma[:, None, None, None])
        yield model(mixed, sigma_to_timestep(sigma), *bench.captions.batch(rows.tolist())), noise - latents[rows]


def train_lora(bench: Bench, latents: Tensor, args: argparse.Namespace) -> dict[str, Tensor]:
    """Train a LoRA of the teacher, and return it under diffusers' names."""
    model = bench.teacher().experts["high"]
    products = {f"transformer.{name}": product for name, product in with_products(model, args.rank).items()}
    fit(products, flow_matching(bench, model, latents), args.steps, args.lr)
    down = {f"{name}.lora_A.weight": product.down.detach().clone() for name, product in products.items()}
    return down | {f"{name}.lora_B.weight": product.up.detach().clone() for name, product in products.items()}


# ---- the student's ----


def with_lora(folder: str, student_lora: StudentLora, scale: float) -> WanLiteStudent:
    student = WanLiteStudent.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name in student_lora.names():
                parameter += scale * without_frames(student_lora.delta(name))
    return student


def measured(change: Tensor, wanted: Tensor, before: Tensor, after: Tensor) -> dict[str, float]:
    """Compare changes of latents, and errors to the changed teacher before and after; means over the pictures."""
    change, wanted = change.double().flatten(1), wanted.double().flatten(1)
    return {
        "cosine": float(F.cosine_similarity(change, wanted).mean()),
        "norm_ratio": float((change.norm(dim=1) / wanted.norm(dim=1)).mean()),
        "error_closed": float(1 - after.double().square().sum() / before.double().square().sum()),
    }


def tell(bench: Bench, rows: list[dict], shares: dict[str, float], drawn: dict[str, Tensor], output: Path) -> None:
    """Print the table, and draw the first prompts by all."""
    print("| drawn by | cosine of the change | its norm, of the teacher's | error closed | right and changed |")
    print("|---|---|---|---|---|")
    for name in ("teacher", "teacher + LoRA", "student"):
        print(f"| {name} | | | | {shares[name]:.1%} |")
    for row in rows:
        cells = f"{row['cosine']:.3f} | {row['norm_ratio']:.2f} | {row['error_closed']:.1%} | {shares[row['name']]:.1%}"
        print(f"| {row['name']} | {cells} |")
    grid = [list(bench.pictures(samples[:NUM_SHOWN])) for samples in drawn.values()]
    captions = [bench.held_out[:NUM_SHOWN], *[[""] * NUM_SHOWN] * (len(grid) - 1)]
    save_png(labelled_grid(grid, captions, list(drawn)), output / "lora.png", {})


def cut(bench: Bench, file: Path, folder: str) -> StudentLora:
    """Cut the teacher's LoRA for the student."""
    selection = read_made_of(folder, bench.config).selection
    lora = open_lora(file, 1.0, shapes_of(bench.wan_files.expert("high")))
    return cut_loras([lora], selection, bench.config)


def main() -> None:
    args, start = parse_args(), time.perf_counter()
    bench, output = Bench(args), Path(args.output)
    output.mkdir(parents=True, exist_ok=True)

    # The LoRA of the teacher:
    teacher = bench.teacher()
    latents = bench.changed_pictures(teacher)
    file = output / "teacher_lora.safetensors"
    save_file(train_lora(bench, latents, args), file)
    changed = bench.teacher((file, 1.0))
    drawn = {
        name: bench.draw(field, bench.held_out_embeds, HELD_OUT_SEED)
        for name, field in {
            "teacher": teacher,
            "teacher + LoRA": changed,
            "student": student_as_teacher(WanLiteStudent.from_pretrained(args.student), bench.settings),
        }.items()
    }

    student_lora = cut(bench, file, args.student)
    student_file = output / "student_lora.safetensors"
    student_file.unlink(missing_ok=True)
    write_lora(student_lora, student_file, "diffusers")
    wanted = drawn["teacher + LoRA"] - drawn["teacher"]
    students = {f"student + LoRA at {scale:g}": with_lora(args.student, student_lora, scale) for scale in args.scales}
    rows = []
    for name, student in students.items():
        drawn[name] = bench.draw(student_as_teacher(student, bench.settings), bench.held_out_embeds, HELD_OUT_SEED)
        change = drawn[name] - drawn["student"]
        errors = (drawn["student"] - drawn["teacher + LoRA"], drawn[name] - drawn["teacher + LoRA"])
        rows.append({"name": name} | measured(change, wanted, *errors))
    shares = {name: bench.share_as_wanted(samples) for name, samples in drawn.items()}

    tell(bench, rows, shares, drawn, output)
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "rows": rows,
                "change": args.change,
                "right_and_changed": shares,
                "rank": args.rank,
                "steps": args.steps,
                "seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
