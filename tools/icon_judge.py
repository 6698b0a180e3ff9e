"""Judge a picture of the icon world against its prompt, by the real pictograph that it is nearest to.

The judge shares no code with the renderer or the trainer. The teacher's folder holds the real pictographs as one sheet
with transparency and, in teacher_record.json, their names and the colours of the backgrounds. A picture's drawn part is
cut out, scaled to one size, and compared with every pictograph on the same background and with its mirror image.

    judge = open_judge(folder).judge
    facts = judge(image, "a fox face on a pink background")    # facts["correct"] is True or False
    ICON_TEACHER=outputs/icon_teacher python evaluate_student.py --judge tools/icon_judge.py:judge_all ...
"""

import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage  # of requirements-dev.txt
from scipy.spatial.distance import cdist

from wandistiller.errors import UserError
from wandistiller.files.json_files import read_json

WORLD = "icons"  # the name of the icon world in a teacher's record
SHEET_NAME = "pictographs.png"
FACTS = ("present", "icon", "whole", "background")

# A pixel further than this RGB distance from the background is drawn on.
CONTRAST = 40.0
# Blobs that cover a smaller share of the picture are noise.
SPECK_AREA = 10 / 64**2
# The smallest pictograph covers a larger share of the picture's width.
MIN_EXTENT = 0.35
# A background further than this RGB distance from every named colour has no name.
COLOUR_TOLERANCE = 45.0
# The drawn part is compared at this size, and cut out with its box moved and grown by these pixels.
FEATURE_PIXELS = 24
WOBBLE = (-1.0, 0.0, 1.0)
# The RMS over the feature's 255 levels: true pictures reach 23, and the mean of two is rarely nearer than 30.
MAX_DISTANCE = 30.0


@dataclass(frozen=True)
class Seen:
    """What the pixels say of a picture; None stands where nothing is drawn or no name fits.

    Attributes:
        distance: how far the drawn part is from the nearest pictograph.
    """

    icon: str | None
    distance: float
    background: str | None


def ground_colour(pixels: np.ndarray) -> np.ndarray:
    """Return the background of a picture (H, W, 3), which is the median of its border."""
    edge = max(1, pixels.shape[1] // 32)
    inner = np.zeros(pixels.shape[:2], bool)
    inner[edge:-edge, edge:-edge] = True
    return np.median(pixels[~inner], axis=0)


def drawn_parts(image: np.ndarray, wobble: tuple[float, ...] = (0.0,)) -> np.ndarray | None:
    """Return the drawn part of a picture (H, W, 3) uint8 less its background, at one size; None where too little is drawn.

    Blurred edges move the box of the drawn part by a pixel, so it is also cut out with its place and its size off by every
    combination of `wobble` pixels: (cuts, size, size, 3).
    """
    from PIL import Image

    pixels = image.astype(np.float32)
    height, width = pixels.shape[:2]
    ground = ground_colour(pixels)
    labels, count = ndimage.label(np.linalg.norm(pixels - ground, axis=2) > CONTRAST, structure=np.ones((3, 3)))
    areas = ndimage.sum_labels(np.ones_like(labels), labels, np.arange(1, count + 1))
    drawn = np.isin(labels, 1 + np.flatnonzero(areas >= SPECK_AREA * height * width))
    if not drawn.any():
        return None
    ys, xs = np.nonzero(drawn)
    extent = max(np.ptp(ys), np.ptp(xs)) + 1
    if extent < MIN_EXTENT * width:
        return None
    # Squares around the drawn part, which may reach beyond the picture.
    padded = np.empty((3 * height, 3 * width, 3), np.uint8)
    padded[:] = np.round(ground)
    padded[height : 2 * height, width : 2 * width] = image
    picture, size = Image.fromarray(padded), (FEATURE_PIXELS, FEATURE_PIXELS)
    x, y = (xs.min() + xs.max() + 1) / 2 + width, (ys.min() + ys.max() + 1) / 2 + height
    cuts = []
    for dx, dy, larger in itertools.product(wobble, repeat=3):
        reach = (extent + larger) / 2
        box = (x + dx - reach, y + dy - reach, x + dx + reach, y + dy + reach)
        cuts.append(np.asarray(picture.resize(size, Image.Resampling.BILINEAR, box=box), np.float32))
    return np.stack(cuts) - ground


class IconJudge:
    """Names the pictograph and the background of a picture, and holds them against a prompt.

    Args:
        sheet: the pictographs side by side in square tiles, uint8 (H, N H, 4).
        icons: their names.
        backgrounds: RGB of every background that a picture may have, by name.
    """

    def __init__(self, sheet: np.ndarray, icons: list[str], backgrounds: dict[str, list[int]]):
        self.icons, self.backgrounds = icons, backgrounds
        self._tiles = np.split(sheet, len(icons), axis=1)
        self._features: dict[str, np.ndarray] = {}
        longest_first = sorted(icons, key=len, reverse=True)
        self._icon = re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b")
        self._background = re.compile(rf"\b({'|'.join(backgrounds)}) background\b")

    def read_prompt(self, prompt: str) -> tuple[str, str | None]:
        """Return the pictograph that a prompt asks for, and its background or None where the prompt leaves it open.

        Raises:
            ValueError: it names none of the pictographs.
        """
        sentence = " ".join(prompt.lower().replace(",", " ").split())
        icon, background = self._icon.search(sentence), self._background.search(sentence)
        if icon is None:
            raise ValueError(f"no pictograph of this teacher's world in the prompt {prompt!r}")
        return icon[0], background[1] if background else None

    def look(self, image: np.ndarray) -> Seen:
        """Name what a picture (H, W, 3) uint8 shows."""
        ground = ground_colour(image.astype(np.float32))
        distances = {name: float(np.linalg.norm(ground - rgb)) for name, rgb in self.backgrounds.items()}
        nearest = min(distances, key=distances.get)
        background = nearest if distances[nearest] <= COLOUR_TOLERANCE else None
        parts = drawn_parts(image, WOBBLE)
        if parts is None:
            return Seen(None, float("inf"), background)
        errors = cdist(self._references(nearest), parts.reshape(len(parts), -1)) / parts[0].size ** 0.5
        errors = errors.reshape(len(self.icons), -1).min(axis=1)
        return Seen(self.icons[int(errors.argmin())], float(errors.min()), background)

    def judge(self, image: np.ndarray, prompt: str) -> dict[str, bool]:
        """Return whether the picture (H, W, 3) uint8 shows what the prompt says: a fact each, and `correct` for all.

        `icon` means that the nearest pictograph is the right one, `whole` that it is near enough to have been drawn well,
        and `background` that it has a colour of this world, which is the right one where the prompt names it.
        """
        icon, background = self.read_prompt(prompt)
        seen = self.look(image)
        facts = {
            "present": seen.icon is not None,
            "icon": seen.icon == icon,
            "whole": seen.distance <= MAX_DISTANCE,
            "background": seen.background is not None and background in (None, seen.background),
        }
        return facts | {"correct": all(facts.values())}

    def _references(self, background: str) -> np.ndarray:
        """Return every pictograph on a background and its mirror image, as rows of a matrix."""
        if background not in self._features:
            rows = []
            for tile in self._tiles:
                cover = tile[..., 3:].astype(np.float32) / 255
                picture = cover * tile[..., :3] + (1 - cover) * np.array(self.backgrounds[background])
                parts = drawn_parts(np.round(picture).astype(np.uint8))
                if parts is None:  # as good as invisible on this background
                    parts = np.full((1, FEATURE_PIXELS, FEATURE_PIXELS, 3), np.inf, np.float32)
                rows += [parts.ravel(), parts[:, :, ::-1].ravel()]
            self._features[background] = np.stack(rows)
        return self._features[background]


def open_judge(folder: str | Path) -> IconJudge:
    """Return the judge of a teacher's folder.

    Raises:
        UserError: the folder lacks what a judge needs.
    """
    from PIL import Image

    folder = Path(folder)
    record, sheet_path = read_json(folder / "teacher_record.json"), folder / SHEET_NAME
    icons, backgrounds = record.get("icons"), record.get("backgrounds")
    if not icons or not backgrounds or not sheet_path.is_file():
        raise UserError(
            f"{folder}: cannot be judged without {SHEET_NAME} and the icons and backgrounds of teacher_record.json; "
            "make it again with tools/make_icon_teacher.py"
        )
    return IconJudge(np.asarray(Image.open(sheet_path).convert("RGBA")), icons, backgrounds)


def judge_all(pictures: np.ndarray, prompts: list[str]) -> list[dict[str, bool]]:
    """Judge pictures (N, H, W, 3) uint8 by their prompts, as `evaluate_student.py --judge` asks for it.

    The environment variable ICON_TEACHER names the teacher's folder (default: outputs/icon_teacher).
    """
    judge = open_judge(os.environ.get("ICON_TEACHER", "outputs/icon_teacher")).judge
    return [judge(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
