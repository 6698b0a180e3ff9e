"""The demo teacher's velocity field: a small WanTransformer3DModel, trained by flow matching with its text encoder.

x_sigma = (1 - sigma) x_0 + sigma noise, and the model predicts velocity = noise - x_0 at timestep 1000 sigma, as Wan
does (https://arxiv.org/abs/2210.02747, https://arxiv.org/abs/2503.20314).
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import demo_text as text
import demo_vae
import demo_world as world
import numpy as np
import torch
import torch.nn.functional as F
from demo_optim import MuonWithAdam, warmup_constant_decay
from torch import Tensor, nn
from tqdm import tqdm

FLOW_SHIFT = 3.0
PROMPT_DROPOUT = 0.1
CLIP_EVERY = 8  # one batch in so many is of clips
TWO_OBJECTS = 0.8  # share of the stills drawn: which object goes where is what takes longest to learn
TRAINING_SHIFT = 5.0  # noisier than drawing: places and bindings are settled at the noisy end


def new_transformer(num_layers: int = 6, num_heads: int = 6, ffn_dim: int = 512):
    """Make a small untrained WanTransformer3DModel; at six heads its width is three times what one latent patch holds."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=num_heads,
        attention_head_dim=32,
        in_channels=demo_vae.LATENT_CHANNELS,
        out_channels=demo_vae.LATENT_CHANNELS,
        text_dim=text.TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=ffn_dim,
        num_layers=num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        rope_max_seq_len=64,
    )
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    start_away_from_pads(model)
    return model


@torch.no_grad()
def start_away_from_pads(model) -> None:
    """Start with queries that avoid the pad key: about 500 pads would else drown the few words and their gradient."""
    embedder = model.condition_embedder.text_embedder
    nn.init.zeros_(embedder.linear_1.bias)
    nn.init.zeros_(embedder.linear_2.bias)
    for block in model.blocks:
        direction = torch.sign(torch.randn_like(block.attn2.to_k.bias))
        block.attn2.to_k.bias.copy_(0.2 * direction)  # a pad is a zero vector here, so its key is this direction
        block.attn2.to_q.bias.copy_(-1.0 * direction)


def make_folded_processor():
    """Make diffusers' own Wan attention add `bias` to the logits: set on cross-attention, it folds the pads into one."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class FoldedPadProcessor(WanAttnProcessor):
        bias: Tensor | None = None

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)

    return FoldedPadProcessor()


def fold_pads(model):
    """Give all cross-attentions one shared processor, and return it; its `bias` is set before each forward."""
    processor = make_folded_processor()
    for block in model.blocks:
        block.attn2.set_processor(processor)
    return processor


SQUARE = (world.IMAGE_SIZE, world.IMAGE_SIZE)


def encode_scenes(
    vae, scenes: list[world.Scene], num_frames: int, rng: np.random.Generator, size: tuple[int, int] = SQUARE
) -> Tensor:
    """Render scenes at a width and height and encode them: normalised latents (N, C, T, H, W)."""
    parts = []
    for start in tqdm(range(0, len(scenes), 128), desc=f"latents of {num_frames} frame(s)", mininterval=5):
        frames = np.stack([world.render(scene, rng, num_frames, size) for scene in scenes[start : start + 128]])
        parts.append(demo_vae.normalise(vae, demo_vae.encode(vae, frames)))
    return torch.cat(parts)


class LatentPool:
    """Normalised latents of rendered training scenes, with their scenes; prompts are phrased anew on every draw."""

    def __init__(self, vae, num_stills: int, num_clips: int, seed: int, cache: Path):
        rng = np.random.default_rng(seed + 10)
        self.stills = [world.sample_scene(rng, two_objects=0.55) for _ in range(num_stills)]
        self.clips = [world.sample_moving_scene(rng) for _ in range(num_clips)]
        # Some clips stand still, so that a prompt without a motion means none.
        self.clips += [world.sample_scene(rng, two_objects=0.55) for _ in range(num_clips // 4)]
        if not cache.exists():
            latents = {"stills": encode_scenes(vae, self.stills, 1, rng)}
            latents["clips"] = encode_scenes(vae, self.clips, world.NUM_FRAMES, rng)
            torch.save(latents, cache)
        latents = torch.load(cache, weights_only=True, map_location=vae.device)
        self.still_latents, self.clip_latents = latents["stills"], latents["clips"]
        self.one = np.array([i for i, scene in enumerate(self.stills) if len(scene.things) == 1])
        self.two = np.array([i for i, scene in enumerate(self.stills) if len(scene.things) == 2])

    def draw(self, count: int, clips: bool, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        """Draw latents (B, C, T, H, W) and prompts; a prompt is now and then empty, which is what guidance needs."""
        scenes, latents = (self.clips, self.clip_latents) if clips else (self.stills, self.still_latents)
        if clips:
            rows = rng.integers(len(scenes), size=count)
        else:
            num_two = round(TWO_OBJECTS * count)
            rows = np.concatenate([rng.choice(self.two, num_two), rng.choice(self.one, count - num_two)])
        prompts = ["" if rng.random() < PROMPT_DROPOUT else world.describe(scenes[i], rng) for i in rows]
        return latents[torch.from_numpy(rows)], prompts


class SizedPool:
    """Normalised latents of stills at several sizes; the batches take turns, and each is of one size."""

    def __init__(self, vae, num_stills: int, sizes: Sequence[tuple[int, int]], seed: int):
        rng = np.random.default_rng(seed + 10)
        self.scenes = [[world.sample_scene(rng, two_objects=TWO_OBJECTS) for _ in range(num_stills)] for _ in sizes]
        self.latents = [
            encode_scenes(vae, scenes, 1, rng, size) for scenes, size in zip(self.scenes, sizes, strict=True)
        ]
        self.turn = 0

    def draw(self, count: int, clips: bool, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        """Draw latents (B, C, 1, H, W) and prompts of the next size."""
        scenes, latents = self.scenes[self.turn], self.latents[self.turn]
        self.turn = (self.turn + 1) % len(self.latents)
        rows = rng.integers(len(scenes), size=count)
        prompts = ["" if rng.random() < PROMPT_DROPOUT else world.describe(scenes[i], rng) for i in rows]
        return latents[torch.from_numpy(rows)], prompts


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a transformer and its text encoder are trained.

    Attributes:
        steps, batch_size, lr, seed, device: as the maker's flags say; a batch of clips is half as large.
        work: folder of the log and of the state that a later run resumes from.
        shape: arguments of `new_transformer`.
        start: pipeline folder whose transformer and text encoder are trained further; None for new ones.
        clip_every: one batch in so many is of clips; 0 for a world of stills.
        shift: of the noise levels trained on.
        ema: decay of the average that becomes the teacher.
        save_every: steps between saved states.
    """

    steps: int
    batch_size: int
    lr: float
    seed: int
    device: torch.device
    work: Path
    shape: dict[str, int] = field(default_factory=dict)
    start: Path | None = None
    clip_every: int = CLIP_EVERY
    shift: float = TRAINING_SHIFT
    ema: float = 0.995
    save_every: int = 100

    def is_of_clips(self, step: int) -> bool:
        """Tell whether the batch of this step is of clips."""
        return self.clip_every > 0 and step % self.clip_every == self.clip_every - 1


class Pool(Protocol):
    """What a transformer is trained on."""

    def draw(self, count: int, clips: bool, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        """Draw normalised latents (B, C, T, H, W) and a prompt for each."""


def flow_loss(predict: Callable[[Tensor, Tensor], Tensor], latents: Tensor, shift: float, generator) -> Tensor:
    """Return the mean squared error of the velocity at a shifted-uniform noise level per sample.

    Args:
        predict: takes x_sigma and sigma, and returns the velocity.
    """
    u = torch.rand(len(latents), generator=generator).to(latents.device)
    sigma = shift * u / (1 + (shift - 1) * u)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    s = sigma.view(-1, 1, 1, 1, 1)
    x_sigma = (1 - s) * latents + s * noise
    return F.mse_loss(predict(x_sigma, sigma), noise - latents)


def parameter_groups(modules: list[nn.Module], lr: float) -> list[dict]:
    """Give hidden matrices to Muon, and to Adam embeddings, input and output layers, vectors and tables.

    UMT5's relative position biases are logits and have some way to go from zero, so their steps are ten times longer:
    until they tell near words from far ones, the encoder cannot say which object a place belongs to.
    """
    outer = ("shared", "embed_tokens", "patch_embedding", "proj_out", "time_embedder")
    matrices, others, biases = [], [], []
    for name, p in itertools.chain.from_iterable(module.named_parameters() for module in modules):
        if "relative_attention_bias" in name:
            biases.append(p)
        else:
            (others if p.ndim != 2 or any(word in name for word in outer) else matrices).append(p)
    return [
        {"params": matrices, "muon": True, "lr": lr},
        {"params": others, "muon": False, "lr": lr},
        {"params": biases, "muon": False, "lr": 10 * lr},
    ]


def ema_decay(step: int, decay: float) -> float:
    """Return the decay: a short memory at first, so that the average does not remember the random start."""
    return min(decay, (1 + step) / (10 + step))


def first_models(training: Training, vocab_size: int) -> tuple[nn.Module, nn.Module]:
    """Return the transformer and the text encoder that training starts from, in fp32."""
    if training.start is None:
        return new_transformer(**training.shape), text.new_text_encoder(vocab_size)
    from diffusers import WanTransformer3DModel
    from transformers import UMT5EncoderModel

    model = WanTransformer3DModel.from_pretrained(training.start / "transformer", dtype=torch.float32)
    text_encoder = UMT5EncoderModel.from_pretrained(training.start / "text_encoder", dtype=torch.float32)  # nosec B615 # a local folder
    text.check_embeddings(text_encoder)
    return model, text_encoder


def train_transformer(tokenizer, open_pool: Callable[[], Pool], training: Training):
    """Train transformer and text encoder together, or resume from `training.work`; return both with their EMA weights."""
    torch.manual_seed(training.seed)
    model, text_encoder = (part.to(training.device) for part in first_models(training, len(tokenizer)))
    processor = fold_pads(model)
    both = nn.ModuleDict({"transformer": model, "text_encoder": text_encoder}).train()
    optimizer = MuonWithAdam(parameter_groups([model, text_encoder], training.lr))
    average = {name: p.detach().clone() for name, p in both.named_parameters()}
    steps, first = training.steps, load_state(training.work, both, average, optimizer)
    pool = open_pool() if first < steps else None
    rng = np.random.default_rng([training.seed, first])
    generator = torch.Generator().manual_seed(training.seed + first)
    progress = tqdm(range(first, steps), desc="transformer", mininterval=5, initial=first, total=steps)
    running = None
    for step in progress:
        clips = training.is_of_clips(step)
        latents, prompts = pool.draw(training.batch_size // 2 if clips else training.batch_size, clips, rng)
        tokens = text.tokenize(tokenizer, prompts, training.device)

        def predict(x_sigma: Tensor, sigma: Tensor, tokens=tokens) -> Tensor:
            prompt_embeds, processor.bias = text.encode_folded(text_encoder, *tokens)
            return model(x_sigma, 1000.0 * sigma, prompt_embeds, return_dict=False)[0]

        optimizer.set_lr_factor(warmup_constant_decay(step, steps, warmup=min(60, steps)))
        loss = flow_loss(predict, latents, training.shift, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        if not math.isfinite(float(norm)):
            raise RuntimeError(f"gradient norm {float(norm)} at step {step}; lower --lr")
        optimizer.step()
        decay = ema_decay(step, training.ema)
        for name, p in both.named_parameters():
            average[name].lerp_(p.detach(), 1 - decay)
        if not clips:
            running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
            progress.set_postfix(loss=f"{running:.4f}", grad=f"{float(norm):.2f}")
        if step % training.save_every == training.save_every - 1 or step == steps - 1:
            save_state(training.work, both, average, optimizer, step + 1)
            append_log(training.work, step + 1, running, progress.format_dict["elapsed"])
    both.load_state_dict(average, strict=False)
    return model.eval(), text_encoder.eval()


def training_minutes(work: Path) -> float:
    """Return the minutes in the training log, over all runs that share it; the clock starts anew with each run."""
    seconds, before = 0.0, 0.0
    for line in (work / "transformer_log.jsonl").read_text(encoding="utf-8").splitlines():
        now = json.loads(line)["elapsed_s"]
        seconds += now - before if now >= before else now
        before = now
    return round(seconds / 60, 1)


def append_log(work: Path, step: int, loss: float | None, elapsed_s: float) -> None:
    """Append one JSON line of training figures."""
    with open(work / "transformer_log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "loss": loss, "elapsed_s": round(elapsed_s)}) + "\n")


def save_state(work: Path, both: nn.Module, average: dict, optimizer, step: int) -> None:
    """Save everything that is needed to resume, whole or not at all."""
    state = {"model": both.state_dict(), "average": average, "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, work / "transformer_state.pt.part")
    os.replace(work / "transformer_state.pt.part", work / "transformer_state.pt")


def load_state(work: Path, both: nn.Module, average: dict, optimizer) -> int:
    """Load a saved state if there is one; return the step to resume from."""
    path = work / "transformer_state.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location=next(both.parameters()).device)
    both.load_state_dict(state["model"])
    average.update(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
