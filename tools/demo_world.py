"""The demo world: coloured shapes on plain backgrounds, described in plain English, drawn without aliasing.

A scene is one or two objects (shape, colour, size, place) on a background colour; a clip lets one object move.
Some (colour, shape, background) triples are held out by a hash: no training prompt or picture ever shows one.

    python tools/demo_world.py --output world.png      # a contact sheet of random scenes
"""

import argparse
import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 64
NUM_FRAMES = 5  # a clip has so many, and the VAE makes two latent frames of them
PIXELS_PER_FRAME = 2.5

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (225, 35, 35),
    "green": (35, 160, 60),
    "blue": (40, 75, 225),
    "yellow": (250, 220, 40),
    "purple": (140, 45, 185),
    "orange": (250, 140, 20),
}
BACKGROUNDS = {
    "white": (246, 246, 246),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "pink": (255, 190, 205),
    "brown": (105, 65, 35),
}
SIZES = {"small": 9.0, "large": 13.0}  # half extent in pixels
SIZE_SYNONYMS = {"small": "little", "large": "big"}
PLACES = {"left": (16, 32), "right": (48, 32), "top": (32, 16), "bottom": (32, 48), "center": (32, 32)}
PLACE_PHRASES = {
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "center": ("in the center", "in the middle"),
}
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
LEAVES_THE_PICTURE = {("left", "left"), ("right", "right"), ("top", "up"), ("bottom", "down")}  # (place, motion)
PLACE_PAIRS = (("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top"))  # two objects never touch
TEMPLATES = (
    "{objects}, on a {background} background",
    "a {background} background with {objects}",
    "a picture of {objects}, {background} background",
)
HELD_OUT_ONE_IN = 7
# What a prompt of one object may leave open: as much as `describe` now and then leaves open in training. Prompts without a
# colour or without the second object's place were never trained on, and the teacher does not draw them.
UNSAID = (("place",), ("size",), ("size", "place"))

JITTER_PIXELS = 1.0  # an object's centre moves by up to so much
JITTER_SIZE = 0.04  # a share of the object's size
JITTER_COLOUR = 6.0  # a channel of 255 levels moves by so many


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background; `motion` moves the first one and exists only in clips."""

    things: tuple[Thing, ...]
    background: str
    motion: str | None = None


def is_held_out_combination(colour: str, shape: str, background: str) -> bool:
    """Tell whether this triple is kept for evaluation; a hash decides, so that every machine agrees."""
    digest = hashlib.sha256(f"{colour} {shape} {background}".encode()).digest()
    return digest[0] % HELD_OUT_ONE_IN == 0


def is_held_out(scene: Scene) -> bool:
    """Tell whether any object of the scene is a held-out combination with the background."""
    return any(is_held_out_combination(thing.colour, thing.shape, scene.background) for thing in scene.things)


def held_out_combinations() -> list[tuple[str, str, str]]:
    """List all held-out (colour, shape, background) triples."""
    triples = itertools.product(COLOURS, SHAPES, BACKGROUNDS)
    return [triple for triple in triples if is_held_out_combination(*triple)]


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def sample_scene(rng: np.random.Generator, *, two_objects: float = 0.45, held_out: bool = False) -> Scene:
    """Draw a scene; `two_objects` is the share with two. `held_out` says which side of the split it comes from."""
    while True:
        places = _pick(rng, PLACE_PAIRS) if rng.random() < two_objects else (_pick(rng, tuple(PLACES)),)
        things = tuple(
            Thing(_pick(rng, SHAPES), _pick(rng, tuple(COLOURS)), _pick(rng, tuple(SIZES)), p) for p in places
        )
        scene = Scene(things, _pick(rng, tuple(BACKGROUNDS)))
        if is_held_out(scene) == held_out:
            return scene


def sample_moving_scene(rng: np.random.Generator) -> Scene:
    """Draw a one-object training scene with a motion that stays inside the picture."""
    scene = sample_scene(rng, two_objects=0.0)
    place = scene.things[0].place
    motion = _pick(rng, [name for name in MOTIONS if (place, name) not in LEAVES_THE_PICTURE])
    return Scene(scene.things, scene.background, motion)


def _describe_thing(thing: Thing, rng: np.random.Generator, variety: float) -> str:
    """Describe one object; `variety` is how often a word is a synonym, or is left out so that the scene is free to choose."""
    size = SIZE_SYNONYMS[thing.size] if rng.random() < variety else thing.size
    words = [thing.colour, thing.shape] if rng.random() < variety / 3 else [size, thing.colour, thing.shape]
    article = "an" if words[0] == "orange" else "a"
    if rng.random() >= variety / 3:
        words.append(_pick(rng, PLACE_PHRASES[thing.place]))
    return " ".join([article, *words])


def describe(scene: Scene, rng: np.random.Generator, variety: float = 0.25) -> str:
    """Describe the scene in plain English; `variety=0` names every attribute by its first word."""
    # A size or place may go unsaid in one-object scenes only: with two objects it would make the prompt ambiguous.
    variety_of_thing = variety if len(scene.things) == 1 and scene.motion is None else 0.0
    objects = [_describe_thing(thing, rng, variety_of_thing) for thing in scene.things]
    if scene.motion:
        objects[0] += f" moving {scene.motion}"
    sentence = _pick(rng, TEMPLATES).format(objects=" and ".join(objects), background=scene.background)
    if rng.random() < variety / 2:  # as people type: a capital, a full stop
        sentence = sentence[0].upper() + sentence[1:]
    return sentence + "." if rng.random() < variety / 2 else sentence


def describe_partly(scene: Scene, rng: np.random.Generator, unsaid: tuple[str, ...]) -> str:
    """Describe the scene with some of the last object's "size", "place" and "colour", or the "background", left open."""
    objects = []
    for thing in scene.things:
        left_out = unsaid if thing is scene.things[-1] else ()
        words = [getattr(thing, name) for name in ("size", "colour") if name not in left_out] + [thing.shape]
        if "place" not in left_out:
            words.append(_pick(rng, PLACE_PHRASES[thing.place]))
        objects.append(" ".join(["an" if words[0] == "orange" else "a", *words]))
    sentence = " and ".join(objects)
    if "background" in unsaid:
        return sentence
    return _pick(rng, TEMPLATES).format(objects=sentence, background=scene.background)


def vocabulary() -> list[str]:
    """List every word that a prompt of this world can hold, in a fixed order."""
    words = ["a", "an", "A", "An", "on", "in", "at", "the", "of", "and", "with", "picture", "background", "moving"]
    words += ["middle", *SHAPES, *COLOURS, *BACKGROUNDS, *SIZES, *SIZE_SYNONYMS.values(), *PLACES, *MOTIONS]
    return list(dict.fromkeys(words))


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Return the distance to the shape's edge, negative inside; (x, y) are relative to its centre."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * r) - 0.26 * r
    if shape == "cross":
        upright = np.maximum(np.abs(x) - 0.33 * r, np.abs(y) - r)
        flat = np.maximum(np.abs(y) - 0.33 * r, np.abs(x) - r)
        return np.minimum(upright, flat)
    slope = np.hypot(2.0, 1.0)  # triangle: apex at the top, base 2r wide and height 2r
    return np.maximum((2 * np.abs(x) - y - r) / slope, y - r)


def place_in(place: str, size: tuple[int, int]) -> np.ndarray:
    """Return x and y of a place in a picture of this width and height."""
    scale = min(size) / IMAGE_SIZE
    offset = np.array(PLACES[place]) - IMAGE_SIZE // 2
    # Where the place is off the middle, the longer side moves it on by what that side is longer.
    return np.array(size) / 2 + scale * offset + np.sign(offset) * (np.array(size) - min(size)) / 2


def render(
    scene: Scene, rng: np.random.Generator, num_frames: int = 1, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
) -> np.ndarray:
    """Draw the scene as uint8 (num_frames, height, width, 3), with a little jitter in place, size and colour.

    Off the square an object is as large, and as far from the edge that its place names, as in the square of the shorter side;
    otherwise it lies in the middle.

    Args:
        size: width and height in pixels.
    """
    width, height = size
    scale = min(size) / IMAGE_SIZE
    ys, xs = np.mgrid[:height, :width].astype(np.float32) + 0.5
    colour = np.array(BACKGROUNDS[scene.background]) + rng.uniform(-JITTER_COLOUR, JITTER_COLOUR, 3)
    frames = np.tile(colour.astype(np.float32), (num_frames, height, width, 1))
    for index, thing in enumerate(scene.things):
        centre = place_in(thing.place, size) + scale * rng.uniform(-JITTER_PIXELS, JITTER_PIXELS, 2)
        radius = scale * SIZES[thing.size] * (1 + rng.uniform(-JITTER_SIZE, JITTER_SIZE))
        colour = np.array(COLOURS[thing.colour]) + rng.uniform(-JITTER_COLOUR, JITTER_COLOUR, 3)
        step = (
            scale * np.array(MOTIONS[scene.motion]) * PIXELS_PER_FRAME if scene.motion and index == 0 else np.zeros(2)
        )
        for t in range(num_frames):
            cx, cy = centre + t * step
            # One pixel of linear coverage across the edge is the anti-aliasing.
            cover = np.clip(0.5 - _signed_distance(thing.shape, xs - cx, ys - cy, radius), 0, 1)[..., None]
            frames[t] = frames[t] * (1 - cover) + colour * cover
    return np.clip(np.round(frames), 0, 255).astype(np.uint8)


def to_tensor_range(frames: np.ndarray) -> np.ndarray:
    """Turn uint8 (..., T, H, W, 3) into float32 (..., 3, T, H, W) in [-1, 1], as the VAE takes it."""
    return np.moveaxis(frames, -1, -4).astype(np.float32) / 127.5 - 1.0


def contact_sheet(images: list[np.ndarray], columns: int, zoom: int = 2) -> np.ndarray:
    """Place pictures (H, W, 3) side by side in rows, enlarged by whole pixels, with a thin frame."""
    padded = [np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=90) for image in images]
    padded += [np.zeros_like(padded[0])] * (-len(padded) % columns)
    rows = [np.concatenate(padded[i : i + columns], axis=1) for i in range(0, len(padded), columns)]
    return np.concatenate(rows).repeat(zoom, 0).repeat(zoom, 1)


def main(argv: list[str] | None = None) -> None:
    """Write a contact sheet of random scenes and print their prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="world.png", help="PNG to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    args = parser.parse_args(argv)
    from PIL import Image

    rng = np.random.default_rng(args.seed)
    scenes = [sample_scene(rng) for _ in range(28)] + [sample_moving_scene(rng) for _ in range(4)]
    pictures: list[np.ndarray] = []
    for scene in scenes:
        print(describe(scene, rng))
        pictures += list(render(scene, rng, NUM_FRAMES if scene.motion else 1))
    Image.fromarray(contact_sheet(pictures, columns=8)).save(args.output)


if __name__ == "__main__":
    main()
