"""How a portrait is drawn: painters of signed-distance shapes, from the wall to the hat.

Everything is batched torch on any device and at any resolution; see `world_canvas` for the axes.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nmlib.world_canvas import (
    CENTRE,
    CENTRE_MOVE,
    EDGE,
    FAR,
    FAR_MOVE,
    SHIFT,
    ZOOM,
    ZOOM_RANGE,
    Canvas,
    box,
    ellipse,
    glow,
)  # fmt: skip
from nmlib.world_phrases import ATTRIBUTES

IDENTITY = (
    "skin", "hair", "eyes", "face_width", "face_height", "eye_spacing", "eye_size", "brows", "nose", "mouth",
    "hair_length", "fringe",
)  # fmt: skip
NUISANCE = ("yaw", "shift_x", "shift_y", "lighting", "framing")
SUBJECT = IDENTITY + NUISANCE

FACE_MARGIN = 0.07  # of hair around the face, in its box
EYE_Y = -0.03

SKIN = ((0.34, 0.22, 0.16), (0.50, 0.33, 0.23), (0.72, 0.50, 0.36), (0.90, 0.69, 0.53), (0.98, 0.84, 0.74))
NATURAL_HAIR = ((0.07, 0.06, 0.07), (0.22, 0.13, 0.09), (0.42, 0.23, 0.11), (0.66, 0.27, 0.10), (0.93, 0.77, 0.42))
DYED_HAIR = ((0.96, 0.45, 0.68), (0.20, 0.42, 0.90), (0.78, 0.80, 0.85))
IRIS = ((0.24, 0.13, 0.07), (0.50, 0.31, 0.10), (0.28, 0.52, 0.28), (0.22, 0.52, 0.86))
WALLS = (
    (0.80, 0.30, 0.29), (0.36, 0.62, 0.40), (0.33, 0.50, 0.80), (0.94, 0.82, 0.42), (0.58, 0.40, 0.70),
    (0.92, 0.92, 0.92), (0.17, 0.18, 0.21), (0.94, 0.58, 0.27),
)  # fmt: skip
SHIRTS = (
    (0.76, 0.17, 0.19), (0.20, 0.52, 0.30), (0.17, 0.35, 0.72), (0.95, 0.78, 0.24), (0.47, 0.26, 0.62),
    (0.96, 0.96, 0.95), (0.11, 0.11, 0.14), (0.93, 0.49, 0.13),
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """The numbers of a batch of pictures, one tensor (B,) or colour (3, 1, 1, B) each."""

    subject: dict[str, Tensor]
    value: dict[str, Tensor]
    skin: Tensor
    hair: Tensor
    wall: Tensor
    shirt: Tensor
    iris: Tensor
    width: Tensor
    top: Tensor
    chin: Tensor
    fall: Tensor  # how far down the hair reaches
    far: Tensor  # 0 in portraits, 1 where the whole body is in view

    def pick(self, attribute: str, *options: float) -> Tensor:
        """A number that depends on the value of an attribute, (B,)."""
        return self.skin.new_tensor(options)[self.value[attribute]]

    def colour(self, attribute: str, *options: tuple[float, float, float]) -> Tensor:
        """A colour that depends on the value of an attribute, (3, 1, 1, B)."""
        return self.skin.new_tensor(options)[self.value[attribute]].T[:, None, None]


def _ramp(stops: tuple[tuple[float, float, float], ...], number: Tensor) -> Tensor:
    """Colour at a number in [-1, 1] along evenly spaced stops, (3, 1, 1, B)."""
    table = number.new_tensor(stops)
    place = (number + 1) / 2 * (len(stops) - 1)
    low = place.long().clamp_max(len(stops) - 2)
    return torch.lerp(table[low], table[low + 1], (place - low)[:, None]).T[:, None, None]


def _numbers(subjects: Tensor) -> dict[str, Tensor]:
    """The numbers (B,) of subjects by name, clamped to their ranges."""
    subject = dict(zip(SUBJECT, subjects.clamp(-1, 1).T, strict=True))
    return subject | {"framing": subjects[:, SUBJECT.index("framing")].clamp(FAR, 1)}


def _face(subject: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Half width, height above the middle, and depth of the chin below it, in portrait units, (B,) each."""
    height = subject["face_height"]
    return 0.40 + 0.065 * subject["face_width"], 0.44 + 0.03 * height, 0.47 + 0.065 * height


def _far(subject: dict[str, Tensor]) -> Tensor:
    """How much of the way to a picture of the whole body, 0 in portraits, (B,)."""
    return (-1 - subject["framing"]).clamp_min(0)


def _frame(subject: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Half frames per portrait unit, and where y = 0 is without a shift, (B,) each."""
    centre = CENTRE - CENTRE_MOVE * subject["framing"] - FAR_MOVE * _far(subject)
    return ZOOM * ZOOM_RANGE ** subject["framing"], centre


def face_boxes(subjects: Tensor, size: int) -> Tensor:
    """Where the faces are: from the hair above the forehead to the chin, without a hat.

    Args:
        subjects: float tensor (B, S).
        size: height and width of the pictures.

    Returns:
        (B, 4) left, top, right, bottom in pixels, within the picture.
    """
    subject = _numbers(subjects)
    width, top, chin = _face(subject)
    zoom, centre = _frame(subject)
    x, y = SHIFT * subject["shift_x"], SHIFT * subject["shift_y"] + centre
    half, rise = (width + FACE_MARGIN) * zoom, (top + FACE_MARGIN) * zoom
    edges = torch.stack([x - half, y - rise, x + half, y + chin * zoom], dim=1)  # (B, 4) in half frames
    return ((edges + 1) / 2 * size).clamp(0, size)


def _look(subjects: Tensor, values: Tensor) -> Look:
    """Turn a chunk of states into the numbers the painters need."""
    subject = _numbers(subjects)
    value = {attribute.name: column for attribute, column in zip(ATTRIBUTES, values.T, strict=True)}
    natural = _ramp(NATURAL_HAIR, subject["hair"])
    width, top, chin = _face(subject)
    dyed = subjects.new_tensor((DYED_HAIR[0], *DYED_HAIR))[value["hair"]].T[:, None, None]
    return Look(
        subject=subject,
        value=value,
        skin=_ramp(SKIN, subject["skin"]),
        hair=torch.where(value["hair"] == 0, natural, dyed),
        wall=subjects.new_tensor(WALLS)[value["background"]].T[:, None, None],
        shirt=subjects.new_tensor(SHIRTS)[value["shirt"]].T[:, None, None],
        iris=_ramp(IRIS, subject["eyes"]),
        width=width,
        top=top,
        chin=chin,
        fall=0.46 + 0.36 * subject["hair_length"],
        far=_far(subject),
    )


WHITE = (1.0, 1.0, 1.0)


def _plain(like: Tensor, *rgb: float) -> Tensor:
    """One colour for all pictures, (3, 1, 1, 1)."""
    return like.new_tensor(rgb)[:, None, None, None]


def _paint_wall(canvas: Canvas, look: Look) -> None:
    """Wall with a soft vignette, brighter on the side the light comes from."""
    light = 1.04 + 0.07 * look.subject["lighting"] * canvas.x - 0.07 * canvas.x**2
    torch.mul(look.wall, light - 0.05 * canvas.y - 0.06 * canvas.y**2, out=canvas.pixels)


def _paint_body(canvas: Canvas, look: Look) -> None:
    """Hair behind the neck, shirt with collar, neck."""
    chin = look.chin
    back = canvas.window(-0.75, 0.75, -0.75, 1.0)
    half_x, half_y = look.width + 0.07 + 0.04 * look.subject["hair_length"], (look.fall + 0.47) / 2
    back.paint(box(back.x, back.y - look.fall + half_y, half_x, half_y, half_x * 0.9), look.hair * 0.55)

    low = canvas.window(-1.4, 1.4, 0.4, 1.4)
    base = chin + 0.12  # where the neck meets the shirt
    shade = 1.03 + 0.15 * look.subject["lighting"] * low.x - 0.25 * low.x**2
    if canvas.shows_bodies:
        _paint_limbs(canvas, look)
    half_x, half_y = 0.86 - 0.46 * look.far, 0.63 - 0.28 * look.far
    down = low.y - base - (0.62 - 0.28 * look.far)
    low.paint(box(low.x, down, half_x, half_y, 0.40 - 0.18 * look.far), look.shirt * shade)
    low.paint(ellipse(low.x, low.y - base, 0.28, 0.165), look.shirt * 0.68)
    neckline = ellipse(low.x, low.y - base + 0.012, 0.215, 0.112)
    neck = torch.minimum(neckline, box(low.x, low.y - base + 0.2, 0.165, 0.22, 0.05))
    shadow = 1 - 0.38 * glow(low.x, low.y - chin + 0.02, 0.34, 0.16)  # the chin's
    low.paint(neck, look.skin * 0.84 * shadow)


TROUSERS, SHOES = (0.27, 0.29, 0.40), (0.13, 0.11, 0.12)


def _paint_limbs(canvas: Canvas, look: Look) -> None:
    """Legs in trousers, shoes, sleeves and hands, where the framing is far enough to see them."""
    seen = (look.far > 0).to(look.far.dtype)
    hip = look.chin + 0.75
    limbs = canvas.window(-1.4, 1.4, 0.4, 2.4)
    side, light = limbs.x.abs(), 1.0 + 0.15 * look.subject["lighting"] * limbs.x
    limbs.paint(ellipse(side - 0.21, limbs.y - hip - 0.56, 0.175, 0.09), _plain(side, *SHOES), seen)
    legs = box(side - 0.19, limbs.y - hip - 0.20, 0.145, 0.36, 0.06)
    limbs.paint(legs, _plain(side, *TROUSERS) * light, seen)
    down = limbs.y - look.chin - 0.45
    limbs.paint(ellipse(side - 0.55, down - 0.32, 0.085, 0.095), look.skin * 0.9, seen)
    sleeve = box(side - 0.46 - 0.22 * down, down, 0.095, 0.32, 0.09)
    limbs.paint(sleeve, look.shirt * (0.78 * light), seen)


def _paint_head(canvas: Canvas, look: Look) -> None:
    """Ears and face, rounded by light."""
    light = look.subject["lighting"]
    head = canvas.window(-0.62, 0.62, -0.56, 0.68)
    head.paint(ellipse(head.x.abs() - look.width + 0.005, head.y - 0.03, 0.065, 0.105), look.skin * 0.84)
    height = torch.where(head.y < 0, look.top, look.chin)
    across = head.x / look.width
    shade = 1.06 + 0.14 * light * across - 0.14 * across**2 - 0.10 * (head.y / height) ** 2
    head.paint(ellipse(head.x, head.y, look.width, height), look.skin * shade)


def _paint_cheeks_and_nose(canvas: Canvas, look: Look) -> None:
    """Blush and a soft nose."""
    face = canvas.window(-0.6, 0.6, -0.25, 0.55)
    blush = glow(face.x.abs() - look.width * 0.60, face.y - 0.17, 0.17, 0.13)
    face.blend(blush, look.skin * _plain(face.x, 1.0, 0.70, 0.68), look.pick("expression", 0.45, 0.85, 0.45))
    size = 1.05 + 0.6 * look.subject["nose"]
    shadow_x = face.x + 0.02 * look.subject["lighting"]
    face.blend(glow(shadow_x, face.y - 0.06, 0.075 * size, 0.20), look.skin * 0.80, 0.7)
    face.paint(ellipse(face.x, face.y - 0.135, 0.066 * size, 0.050 * size), look.skin * 0.66, 0.8)
    face.blend(glow(face.x, face.y - 0.105, 0.045 * size, 0.055 * size), (look.skin * 1.12).clamp_max(1))


def _paint_eyes(canvas: Canvas, look: Look) -> None:
    """Eyes and brows, both sides at once by folding x at the middle of the face."""
    eyes = canvas.window(-0.6, 0.6, -0.4, 0.2)
    wide = look.pick("expression", 1.0, 0.92, 1.16)
    radius = (0.092 + 0.020 * look.subject["eye_size"]) * wide
    x = eyes.x.abs() - _eye_x(look)
    y = eyes.y - EYE_Y
    eyes.paint(ellipse(x, y + 0.014, radius * 1.32, radius * 1.12), look.skin * 0.40)
    eyes.paint(ellipse(x, y - 0.004, radius * 1.20, radius * 0.98), _plain(x, 0.93, 0.93, 0.92))
    gaze = x * eyes.x.sign() - 0.03 * look.subject["yaw"]
    eyes.paint(ellipse(gaze, y, radius * 0.70, radius * 0.82), look.iris)
    eyes.paint(ellipse(gaze, y, radius * 0.36, radius * 0.44), _plain(x, 0.04, 0.03, 0.04))
    eyes.paint(ellipse(gaze + radius * 0.28, y + radius * 0.34, radius * 0.24, radius * 0.24), _plain(x, 1, 1, 1), 0.9)
    brows = look.subject["brows"]
    raised = look.pick("expression", 0.0, 0.01, 0.07)
    arch = y + 0.165 + raised + 0.03 * look.subject["eye_size"] + 1.1 * x**2 - 0.16 * brows * x
    eyes.paint(ellipse(x, arch, 0.135, 0.030 + 0.015 * brows), look.hair * 0.55)


def _eye_x(look: Look) -> Tensor:
    """Distance of an eye from the middle of the face, (B,)."""
    return look.width * (0.475 + 0.075 * look.subject["eye_spacing"])


def _paint_mouth(canvas: Canvas, look: Look) -> None:
    """Lips, the inside of the mouth and teeth; one shape, an ellipse with its top cut off, serves every expression."""
    mouth = canvas.window(-0.5, 0.5, 0.1, 0.6)
    wide = 0.175 + 0.045 * look.subject["mouth"]
    radius_x = wide * look.pick("expression", 1.0, 1.15, 0.45) + look.pick("expression", 0.0, 0.03, 0.055)
    radius_y = look.pick("expression", 0.042, 0.17, 0.15)
    y = mouth.y - look.chin * 0.56 - look.pick("expression", 0.0, -0.075, 0.02)
    y = y + look.pick("expression", 0.6, 0.3, 0.0) * mouth.x**2  # the corners go up
    cut = look.pick("expression", -9.0, 0.0, -9.0) - y
    lips = torch.lerp(look.skin * 0.75, _plain(y, 0.74, 0.22, 0.26), 0.65)
    mouth.paint(torch.maximum(ellipse(mouth.x, y, radius_x, radius_y), cut - 0.03), lips)
    inner_y = (radius_y - 0.032).clamp_min(0.012)
    inside = torch.maximum(ellipse(mouth.x, y, radius_x - 0.03, inner_y), cut)
    mouth.paint(inside, _plain(y, 0.42, 0.07, 0.11))
    teeth = look.pick("expression", -9.0, 0.065, -0.05)
    mouth.paint(torch.maximum(inside, y - teeth), _plain(y, 0.98, 0.97, 0.95))


def _paint_fringe(canvas: Canvas, look: Look) -> None:
    """Hair in front: locks at the sides, a cap around the head with an opening for the face, a band of shine."""
    fringe, light = look.subject["fringe"], look.subject["lighting"]
    locks = canvas.window(-0.75, 0.75, -0.5, 1.0)
    half_x, half_y = 0.075 + 0.03 * look.subject["hair_length"], (look.fall + 0.22) / 2
    strand = ellipse(locks.x.abs() - look.width, locks.y - look.fall + half_y, half_x, half_y)
    locks.paint(strand, look.hair * 0.84)
    hair = canvas.window(-0.7, 0.7, -0.75, 0.4)
    x = hair.x - 0.04 * look.subject["yaw"]
    outline = ellipse(hair.x, hair.y + 0.03, look.width + 0.07, look.top + 0.085)
    hairline = look.top * (0.66 - 0.17 * fringe)
    sweep = 0.22 * fringe * x  # the parting: the hairline is higher on one side
    opening = ellipse(x, hair.y - 0.40 - sweep, look.width * 1.01, 0.40 + hairline)
    cap = torch.maximum(torch.maximum(outline, -opening), hair.y - 0.02)
    hair.paint(cap, look.hair * (0.94 - 0.25 * (hair.y + 0.3) + 0.15 * light * hair.x))
    shine = glow(x + 0.12 - 0.2 * light, hair.y + look.top * 0.92, 0.28, 0.11)
    hair.blend(shine * (0.5 - cap * hair.sharp).clamp_(0, 1), (look.hair * 1.2 + 0.12).clamp_max(1), 0.6)


def _paint_glasses(canvas: Canvas, look: Look) -> None:
    """Round glasses are dark rings around clear lenses, square ones thick teal boxes: rounded boxes both."""
    glasses = canvas.window(-0.65, 0.65, -0.35, 0.3)
    worn = look.pick("glasses", 0.0, 1.0, 1.0)
    eye_x = _eye_x(look)
    side, y = glasses.x.abs(), glasses.y - EYE_Y
    stroke = look.pick("glasses", 0.02, 0.022, 0.034)
    half_x = torch.minimum(look.pick("glasses", 0.15, 0.155, 0.170), eye_x - 0.01)  # the frames may not cross
    half_y = look.pick("glasses", 0.15, 0.155, 0.112)
    lens = box(side - eye_x, y, half_x, half_y, torch.minimum(half_x, look.pick("glasses", 0.15, 0.155, 0.03)))
    glasses.paint(lens, look.colour("glasses", WHITE, (0.85, 0.93, 1.0), WHITE), look.pick("glasses", 0.0, 0.34, 0.22))
    arms = torch.maximum(torch.maximum(side - look.width, (y + 0.02).abs() - 0.022), -lens)
    frame = torch.minimum(lens.abs() - stroke, arms)
    glasses.paint(frame, look.colour("glasses", WHITE, (0.10, 0.08, 0.09), (0.02, 0.52, 0.55)), worn)


def _paint_hat(canvas: Canvas, look: Look) -> None:
    """A dome (cap, beanie) or a spiked band (crown), a trim (brim, fold, base) and one round ornament."""
    hat = canvas.window(-0.9, 0.9, -1.1, -0.1)
    worn = look.pick("hat", 0.0, 1.0, 1.0, 1.0)
    yaw, wide = look.subject["yaw"], look.width + 0.09
    x, y = hat.x - 0.03 * yaw, hat.y + look.top * 0.66  # y = 0 is the lower edge

    dome = torch.maximum(ellipse(x, y, wide, look.pick("hat", 0.3, 0.36, 0.42, 0.3)), y)
    spikes = 0.25 + 0.09 * torch.cos(x / wide * (4 * math.pi))
    band = torch.maximum(x.abs() - wide * (0.93 - 0.25 * y), torch.maximum(y - 0.02, -(y + spikes) * 0.6))
    colour = look.colour("hat", WHITE, (0.16, 0.24, 0.48), (0.62, 0.14, 0.28), (0.93, 0.72, 0.16))
    shade = 1.08 + 0.3 * look.subject["lighting"] * x - 0.6 * x**2
    hat.paint(torch.where(look.value["hat"] == 3, band, dome), colour * shade, worn)

    along = x - look.pick("hat", 0.0, 0.16, 0.0, 0.0) * yaw
    across = y + look.pick("hat", 0.0, 0.02, 0.05, 0.0) - 0.15 * x**2
    half_x = wide + look.pick("hat", 0.0, 0.07, 0.025, -0.015)
    half_y = look.pick("hat", 0.05, 0.05, 0.085, 0.05)
    trim = box(along, across, half_x, half_y, look.pick("hat", 0.05, 0.05, 0.08, 0.02))
    hat.paint(trim, look.colour("hat", WHITE, (0.09, 0.14, 0.31), (0.93, 0.86, 0.74), (0.76, 0.52, 0.08)), worn)

    radius = look.pick("hat", 0.08, 0.085, 0.115, 0.06)
    ornament = ellipse(x - 0.03 * yaw, y + look.pick("hat", 0.0, 0.20, 0.45, 0.01), radius, radius)
    hat.paint(ornament, look.colour("hat", WHITE, (0.95, 0.95, 0.95), (0.93, 0.86, 0.74), (0.80, 0.10, 0.22)), worn)


def draw_portraits(subjects: Tensor, values: Tensor, size: int) -> Tensor:
    """Draw one chunk of pictures.

    Args:
        subjects: float32 tensor (B, S), the numbers named in SUBJECT.
        values: int64 tensor (B, A), valid value indices.
        size: height and width.

    Returns:
        Float32 tensor (3, size, size, B) in [0, 1], batch last.
    """
    look = _look(subjects, values)
    subject = look.subject
    zoom, centre = _frame(subject)
    line = (torch.arange(size, device=subjects.device, dtype=torch.float32) + 0.5) / size * 2 - 1
    x = (line[None, :, None] - SHIFT * subject["shift_x"]) / zoom
    y = (line[:, None, None] - SHIFT * subject["shift_y"] - centre) / zoom
    pixels = subjects.new_empty(3, size, size, len(subjects))
    canvas = Canvas(pixels, x, y, zoom * (size / 2 / EDGE), bool((look.far > 0).any()))
    _paint_wall(canvas, look)
    _paint_body(canvas, look)
    _paint_head(canvas, look)
    t = (x / look.width).clamp(-1, 1)
    turned = replace(canvas, x=x - 0.10 * subject["yaw"] * (1 - t**2))
    for painter in (_paint_cheeks_and_nose, _paint_eyes, _paint_mouth):
        painter(turned, look)
    _paint_fringe(canvas, look)
    _paint_glasses(turned, look)
    _paint_hat(canvas, look)
    return canvas.pixels.clamp_(0, 1)
