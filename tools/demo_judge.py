"""Judge a picture of the demo world against its prompt, from the pixels alone.

The judge shares no code with the renderer or the trainer, so that it can find their mistakes: it reads the prompt's plain
English by itself, finds blobs by their contrast to the border, and measures colour, outline, extent and position of each.

    facts = judge(image, "a small red circle on the left, on a white background")    # facts["correct"] is True or False
    python evaluate_student.py --student outputs/demo --judge tools/demo_judge.py:judge_all ...

numpy alone, so that `make demo` needs no package for it that training does not.
"""

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np

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
# Which edge a place is near, and how far from it, as a share of the shorter side; along the other axis it is in the middle.
PLACE_SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}
EDGE_DISTANCE = 0.25
SIZE_WORDS = {"small": "small", "little": "small", "large": "large", "big": "large"}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIRECTION_XY = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FACTS = ("present", "shape", "colour", "size", "place", "background", "makeable")

# A colour further than this RGB distance from every named colour has no name.
COLOUR_TOLERANCE = 70.0
# Blobs that cover a smaller share of the picture, or of the square of its shorter side, are noise.
SPECK_AREA = 14 / 64**2
# Extents and distances are shares of the picture's shorter side.
SMALL_EXTENT = (0.20, 0.325)
LARGE_EXTENT = (0.325, 0.48)
PLACE_TOLERANCE = 0.11
# A blob has a shape where it overlaps its ideal outline by this much (intersection over union), and by this much better
# than any other outline. In small blobs each pixel counts, so the bounds are loose.
MIN_OUTLINE_MATCH = 0.66
MIN_OUTLINE_LEAD = 0.04
# What a prompt leaves unsaid is free, but a mean of several pictures is refused by its blurred edge, which has more
# half-covered pixels for each pixel along it, and by its mixed colour, which lies further from every named one.
MAX_EDGE_WIDTH = 1.4
UNSAID_COLOUR_TOLERANCE = 30.0
# Two objects of a picture are always on opposite sides.
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}

# A colour may be left out where an article or a size comes right before the shape; an unknown colour is refused.
_NO_COLOUR = "|".join(rf"(?<=\b{word} )" for word in ("a", "an", *SIZE_WORDS))
_OBJECT = re.compile(
    rf"\b(?:(?P<size>{'|'.join(SIZE_WORDS)}) )?(?:(?P<colour>{'|'.join(OBJECT_RGB)}) |{_NO_COLOUR})"
    rf"(?P<shape>{'|'.join(SHAPES)})\b"
    r"(?: (?:on|at|in) the (?P<place>left|right|top|bottom|center|middle)\b)?"
    r"(?: moving (?P<motion>left|right|up|down)\b)?"
)
_BACKGROUND = re.compile(rf"\b(?P<background>{'|'.join(BACKGROUND_RGB)}) background\b")


@dataclass(frozen=True)
class Wanted:
    """What a prompt says of one object; None leaves the choice open."""

    shape: str
    colour: str | None
    size: str | None
    place: str | None
    motion: str | None = None


@dataclass(frozen=True)
class Seen:
    """What the pixels say of one blob; None stands where no name fits.

    Attributes:
        centre: x and y in pixels.
        is_crisp: whether its edge is no wider than that of a drawn object.
        colour_distance: RGB distance to the nearest colour that has a name.
    """

    shape: str | None
    colour: str | None
    size: str | None
    place: str | None
    centre: tuple[float, float]
    is_crisp: bool = False
    colour_distance: float = math.inf


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
    side = min(pixels.shape[:2])
    ground = _ground_colour(pixels)
    contrast = np.linalg.norm(pixels - ground, axis=2)
    blobs = [blob for blob in blobs_of(contrast > 40) if blob.sum() >= SPECK_AREA * side**2]
    return [_look_at(pixels, ground, blob) for blob in blobs], _nearest(ground, BACKGROUND_RGB)


def blobs_of(mask: np.ndarray) -> list[np.ndarray]:
    """Return the connected parts of a mask (H, W), in which neighbours may also touch at a corner, as masks of their own."""
    left, blobs = set(zip(*(places.tolist() for places in np.nonzero(mask)), strict=True)), []
    while left:
        blob = [left.pop()]
        for y, x in blob:  # grows while it is read
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            blob.extend(near)
            left -= near
        blobs.append(np.zeros_like(mask))
        blobs[-1][tuple(np.array(blob).T)] = True
    return blobs


def _ground_colour(pixels: np.ndarray) -> np.ndarray:
    """Return the background's colour, which is the median of the picture's border."""
    edge = max(1, min(pixels.shape[:2]) // 32)
    inner = np.zeros(pixels.shape[:2], bool)
    inner[edge:-edge, edge:-edge] = True
    return np.median(pixels[~inner], axis=0)


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
    height, width = pixels.shape[:2]
    extent = max(bottom - top, right - left) / min(height, width)
    centre = ((left + right) / 2, (top + bottom) / 2)
    sizes = {"small": SMALL_EXTENT, "large": LARGE_EXTENT}
    size = next((name for name, (low, high) in sizes.items() if low <= extent < high), None)
    shape = _outline(solid[top:bottom, left:right])
    place = _place(centre, width, height)
    distance = min(float(np.linalg.norm(colour - rgb)) for rgb in OBJECT_RGB.values())
    return Seen(shape, _nearest(colour, OBJECT_RGB), size, place, centre, _is_crisp(cover, solid), distance)


def _is_crisp(cover: np.ndarray, solid: np.ndarray) -> bool:
    """Return whether half-covered pixels are as few as an edge has; those of a mean of several pictures fill areas."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(solid, 1), (3, 3))
    edge = solid & ~windows.all(axis=(2, 3))
    return bool(((cover > 0.12) & (cover < 0.88)).sum() <= MAX_EDGE_WIDTH * edge.sum())


def _nearest(
    rgb: np.ndarray, names: dict[str, tuple[int, int, int]], tolerance: float = COLOUR_TOLERANCE
) -> str | None:
    """Return the name of the nearest colour, None where even that is too far."""
    distances = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in names.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= tolerance else None


def _place(centre: tuple[float, float], width: int, height: int) -> str | None:
    """Return the name of the place around this centre."""
    side, middle = min(width, height), np.array([width, height]) / 2
    reach = middle - EDGE_DISTANCE * side  # from the middle to where a place near an edge is
    offsets = {
        name: float(np.abs(np.array(centre) - middle - sides * reach).max()) / side
        for name, sides in PLACE_SIDES.items()
    }
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
    the objects are False. What the prompt leaves open is free, but `makeable` then means that the world could have made the
    picture.
    """
    wanted, background = read_prompt(prompt)
    seen, ground = look(image)
    facts = dict.fromkeys(FACTS, False)
    if background is None:
        rgb = _ground_colour(image[..., :3].astype(np.float32))
        facts["background"] = _nearest(rgb, BACKGROUND_RGB, UNSAID_COLOUR_TOLERANCE) is not None
    else:
        facts["background"] = ground == background
    if len(seen) == len(wanted):
        facts["present"] = True
        pairings = [_compare(wanted, list(order)) for order in itertools.permutations(seen)]
        best = max(pairings, key=lambda found: (sum(found.values()), found["place"]))
        facts |= best
        facts["makeable"] = says_everything(wanted, background) or is_makeable(seen)
    return facts | {"correct": all(facts.values())}


def judge_all(pictures: np.ndarray, prompts: list[str]) -> list[dict[str, bool]]:
    """Judge pictures (N, H, W, 3) uint8 by their prompts, as `evaluate_student.py --judge` asks for it."""
    return [judge(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]


def says_everything(wanted: list[Wanted], background: str | None) -> bool:
    """Return whether a prompt leaves nothing for the noise to decide."""
    return background is not None and all(None not in (w.colour, w.size, w.place) for w in wanted)


def is_makeable(seen: list[Seen]) -> bool:
    """Return whether every object has a known shape, colour, size and place, a drawn edge, and the other object opposite.

    The mean of several pictures fails, unless it looks like another picture of the world: orange is the mean of red and
    yellow.
    """
    if any(None in (s.shape, s.colour, s.size, s.place) or not s.is_crisp for s in seen):
        return False
    if any(s.colour_distance > UNSAID_COLOUR_TOLERANCE for s in seen):
        return False
    return len(seen) == 1 or (len(seen) == 2 and OPPOSITE.get(seen[0].place) == seen[1].place)


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
