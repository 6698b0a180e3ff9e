"""Judge a picture of the demo world against its prompt, from the pixels alone.

The judge shares no code with the renderer or the trainer, so that it can find their mistakes: it reads the prompt's plain
English by itself, finds blobs by their contrast to the border, and measures colour, outline, extent and position of each.

    facts = judge(image, "a small red circle on the left, on a white background")    # facts["correct"] is True or False
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from wandistiller.errors import UserError

WORLD = "shapes"  # the name of the demo world in a teacher's record

OBJECT_RGB = {
    "red": (225, 35, 35),
    "green": (35, 160, 60),
    "blue": (40, 75, 225),
    "yellow": (250, 220, 40),
    "purple": (140, 45, 185),
    "orange": (250, 140, 20),
}
BACKGROUND_RGB = {
    "white": (246, 246, 246),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "pink": (255, 190, 205),
    "brown": (105, 65, 35),
}
PLACE_XY = {"left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75), "center": (0.5, 0.5)}
SIZE_WORDS = {"small": "small", "little": "small", "large": "large", "big": "large"}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIRECTION_XY = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FACTS = ("present", "shape", "colour", "size", "place", "background")

# A colour further than this RGB distance from every named colour has no name.
COLOUR_TOLERANCE = 70.0
# Blobs that cover a smaller share of the picture are noise.
SPECK_AREA = 14 / 64**2
# Extents and distances are shares of the picture's width.
SMALL_EXTENT = (0.20, 0.325)
LARGE_EXTENT = (0.325, 0.48)
PLACE_TOLERANCE = 0.11
# A blob has a shape where it overlaps its ideal outline by this much (intersection over union), and by this much better
# than any other outline. In small blobs each pixel counts, so the bounds are loose.
MIN_OUTLINE_MATCH = 0.66
MIN_OUTLINE_LEAD = 0.04

_OBJECT = re.compile(
    rf"\b(?:(?P<size>{'|'.join(SIZE_WORDS)}) )?(?P<colour>{'|'.join(OBJECT_RGB)}) (?P<shape>{'|'.join(SHAPES)})\b"
    r"(?: (?:on|at|in) the (?P<place>left|right|top|bottom|center|middle)\b)?"
    r"(?: moving (?P<motion>left|right|up|down)\b)?"
)
_BACKGROUND = re.compile(rf"\b(?P<background>{'|'.join(BACKGROUND_RGB)}) background\b")


@dataclass(frozen=True)
class Wanted:
    """What a prompt says of one object; None leaves the choice open."""

    shape: str
    colour: str
    size: str | None
    place: str | None
    motion: str | None = None


@dataclass(frozen=True)
class Seen:
    """What the pixels say of one blob; None stands where no name fits.

    Attributes:
        centre: x and y in pixels.
    """

    shape: str | None
    colour: str | None
    size: str | None
    place: str | None
    centre: tuple[float, float]


def find_judge(record: Mapping[str, object], prompts: Sequence[str]) -> Callable[[np.ndarray, str], dict] | None:
    """Return `judge` for a teacher whose record names the demo world; None for any other teacher.

    Raises:
        UserError: one of the prompts is not of that world, so that its pictures could not be judged.
    """
    if record.get("world") != WORLD:
        return None
    for prompt in prompts:
        try:
            read_prompt(prompt)
        except ValueError as error:
            raise UserError(f"--prompts_file: {error}; this teacher is judged on prompts of its own world") from None
    return judge


def read_prompt(prompt: str) -> tuple[list[Wanted], str | None]:
    """Return the objects and the background colour that a prompt asks for.

    Raises:
        ValueError: it asks for no object of the demo world.
    """
    sentence = " ".join(prompt.lower().replace(",", " ").split())
    background = _BACKGROUND.search(sentence)
    wanted = []
    for match in _OBJECT.finditer(sentence):
        place = "center" if match["place"] == "middle" else match["place"]
        size = SIZE_WORDS.get(match["size"] or "")
        wanted.append(Wanted(match["shape"], match["colour"], size, place, match["motion"]))
    if not wanted:
        raise ValueError(f"no object of the demo world in the prompt {prompt!r}")
    return wanted, background["background"] if background else None


def look(image: np.ndarray) -> tuple[list[Seen], str | None]:
    """Return all blobs of an image (H, W, 3) uint8, and the name of its background colour."""
    pixels = image[..., :3].astype(np.float32)
    height, width = pixels.shape[:2]
    edge = max(1, width // 32)
    inner = np.zeros((height, width), bool)
    inner[edge:-edge, edge:-edge] = True
    ground = np.median(pixels[~inner], axis=0)
    contrast = np.linalg.norm(pixels - ground, axis=2)
    labels, count = ndimage.label(contrast > 40, structure=np.ones((3, 3)))
    blobs = [labels == i for i in range(1, count + 1)]
    blobs = [blob for blob in blobs if blob.sum() >= SPECK_AREA * height * width]
    return [_look_at(pixels, ground, blob) for blob in blobs], _nearest(ground, BACKGROUND_RGB)


def _look_at(pixels: np.ndarray, ground: np.ndarray, blob: np.ndarray) -> Seen:
    """Return what the pixels of one blob (a mask of them) say; `ground` is the colour of the background."""
    distance = np.linalg.norm(pixels - ground, axis=2)[blob]
    # Edge pixels are mixed with the background, so the colour is taken from the half that differs from it most.
    colour = np.median(pixels[blob][distance >= np.median(distance)], axis=0)
    axis = colour - ground
    cover = np.clip((pixels - ground) @ axis / (axis @ axis), 0, 1) * blob
    solid = cover > 0.5
    ys, xs = np.nonzero(solid)
    if len(ys) == 0:
        return Seen(None, None, None, None, (0.0, 0.0))
    top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    width = pixels.shape[1]
    extent = max(bottom - top, right - left) / width
    centre = ((left + right) / 2, (top + bottom) / 2)
    sizes = {"small": SMALL_EXTENT, "large": LARGE_EXTENT}
    size = next((name for name, (low, high) in sizes.items() if low <= extent < high), None)
    shape = _outline(solid[top:bottom, left:right])
    return Seen(shape, _nearest(colour, OBJECT_RGB), size, _place(centre, width, pixels.shape[0]), centre)


def _nearest(rgb: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str | None:
    """Return the name of the nearest colour, None where even that is too far."""
    distances = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in names.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= COLOUR_TOLERANCE else None


def _place(centre: tuple[float, float], width: int, height: int) -> str | None:
    """Return the name of the place around this centre."""
    point = np.array(centre) / (width, height)
    offsets = {name: float(np.abs(point - np.array(xy)).max()) for name, xy in PLACE_XY.items()}
    name = min(offsets, key=offsets.get)
    return name if offsets[name] <= PLACE_TOLERANCE else None


def _outline(solid: np.ndarray) -> str | None:
    """Return the shape whose ideal outline, stretched over the blob's own box, clearly overlaps it best."""
    height, width = solid.shape
    if not 0.75 <= width / height <= 1.33:
        return None
    y, x = np.meshgrid(_pixel_centres(height), _pixel_centres(width), indexing="ij")
    radius = np.hypot(x, y)
    ideals = {
        "circle": radius <= 1,
        "square": np.ones_like(solid),
        "triangle": np.abs(x) <= (y + 1) / 2,
        "cross": (np.abs(x) <= 0.34) | (np.abs(y) <= 0.34),
        "ring": (radius <= 1) & (radius >= 0.48),
    }
    match = {name: (solid & ideal).sum() / (solid | ideal).sum() for name, ideal in ideals.items()}
    second, best = sorted(match, key=match.get)[-2:]
    is_clear = match[best] >= MIN_OUTLINE_MATCH and match[best] - match[second] >= MIN_OUTLINE_LEAD
    return best if is_clear else None


def _pixel_centres(count: int) -> np.ndarray:
    """Return the pixel centres of a box whose edges are at -1 and 1."""
    return (np.arange(count) + 0.5) / count * 2 - 1


def _compare(wanted: list[Wanted], seen: list[Seen]) -> dict[str, bool]:
    """Return for each attribute whether every wanted object has it in the blob that is paired with it."""
    pairs = list(zip(wanted, seen, strict=True))
    names = ("shape", "colour", "size", "place")
    return {name: all(getattr(a, name) in (None, getattr(b, name)) for a, b in pairs) for name in names}


def judge(image: np.ndarray, prompt: str) -> dict[str, bool]:
    """Return whether the picture (H, W, 3) uint8 shows what the prompt says: a fact per attribute, and `correct` for all.

    `present` means that there are as many objects as the prompt asks for, no fewer and no more; without it the attributes of
    the objects are False.
    """
    wanted, background = read_prompt(prompt)
    seen, ground = look(image)
    facts = dict.fromkeys(FACTS, False)
    facts["background"] = background in (None, ground)
    if len(seen) == len(wanted):
        facts["present"] = True
        pairings = [_compare(wanted, list(order)) for order in itertools.permutations(seen)]
        best = max(pairings, key=lambda found: (sum(found.values()), found["place"]))
        facts |= best
    return facts | {"correct": all(facts.values())}


def judge_clip(frames: np.ndarray, prompt: str, min_shift: float = 0.06) -> dict[str, bool]:
    """Judge a clip (T, H, W, 3) uint8: the first frame by its facts, and `moves` by where the object goes.

    Args:
        min_shift: the least displacement from the first to the last frame along the prompted direction, in picture widths.
    """
    wanted, _ = read_prompt(prompt)
    facts = judge(frames[0], prompt)
    first, last = look(frames[0])[0], look(frames[-1])[0]
    facts["moves"] = False
    if len(first) == len(last) == 1 and wanted[0].motion:
        shift = (np.array(last[0].centre) - np.array(first[0].centre)) / frames.shape[2]
        direction = np.array(DIRECTION_XY[wanted[0].motion])
        along, across = float(shift @ direction), float(abs(shift @ direction[::-1]))
        facts["moves"] = along >= min_shift and across <= along / 2
    return facts
