"""Where portraits are painted: the frame, windows of it, and signed distances, negative inside a shape.

The batch is the *last* axis here, so that a number per picture broadcasts without reshaping and the innermost loop
runs over pictures, whatever small window of the frame is being painted. Coordinates `x` (1, W, B) and `y` (H, 1, B)
stay separate for as long as possible: most of the work is then one-dimensional. Sizes of shapes are numbers or
tensors (B,).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ZOOM, ZOOM_RANGE = 1.1, 1.28  # half frames per portrait unit at framing 0, and the factor from there to 1
SHIFT = 0.07  # largest shift of the portrait, in half frames
CENTRE, CENTRE_MOVE = 0.04, 0.08  # where y = 0 is, and how much it moves up at framing 1 to keep the shirt in view
FAR = -2.0  # the lowest framing, at which the whole body is in view; from -1 down to it, the body is drawn
FAR_MOVE = 0.5  # how much higher the head is there, in half frames
EDGE = 2.2  # width of an edge in pixels: soft enough for a small autoencoder, crisp in large pictures


def ellipse(x: Tensor, y: Tensor, radius_x: Tensor | float, radius_y: Tensor | float) -> Tensor:
    """Distance to an ellipse around 0, to first order: the implicit function over its gradient's length.

    Beside the tips of a long ellipse that is far too small, a halo; the distance to its bounding box mends it.
    """
    x2, y2 = (x / radius_x) ** 2, (y / radius_y) ** 2
    slope = (x2 * (4 / radius_x**2) + 1e-6) + y2 * (4 / radius_y**2)
    distance = (x2 + (y2 - 1)).mul_(slope.rsqrt_())
    return torch.maximum(distance, torch.maximum(x.abs() - radius_x, y.abs() - radius_y))


def box(x: Tensor, y: Tensor, half_x: Tensor | float, half_y: Tensor | float, corner: Tensor | float) -> Tensor:
    """Distance to a box around 0 with rounded corners."""
    side_x, side_y = x.abs() - half_x + corner, y.abs() - half_y + corner
    outside = (side_x.clamp_min(0) ** 2 + side_y.clamp_min(0) ** 2).sqrt_()
    return outside.add_(torch.maximum(side_x, side_y).clamp_max_(0)).sub_(corner)


def glow(x: Tensor, y: Tensor, radius_x: Tensor | float, radius_y: Tensor | float) -> Tensor:
    """A smooth bump, 1 at 0 and 0 outside an ellipse: an opacity for shadows and highlights."""
    return (1 - (x / radius_x) ** 2 - (y / radius_y) ** 2).clamp_(0, 1).square_()


@dataclass(frozen=True)
class Canvas:
    """A window of the frame and the portrait coordinates of its pixels.

    Args:
        pixels: (3, H, W, B), painted in place.
        x, y: portrait coordinates (1, W, B) and (H, 1, B); y grows downwards, the head is around 0.
        sharp: pixels per portrait unit (B,), how steep an edge is.
        shows_bodies: whether some of the pictures may be framed below -1.
    """

    pixels: Tensor
    x: Tensor
    y: Tensor
    sharp: Tensor
    shows_bodies: bool = False

    def window(self, left: float, right: float, top: float, bottom: float) -> "Canvas":
        """The part of a whole frame that can show a rectangle of the portrait, under any framing and shift."""
        size = self.pixels.shape[1]
        farthest, move = (FAR, FAR_MOVE) if self.shows_bodies else (-1.0, 0.0)

        def span(low: float, high: float, margin: float) -> slice:
            low = low * ZOOM * ZOOM_RANGE ** (1 if low < 0 else farthest) - SHIFT - margin
            high = high * ZOOM * ZOOM_RANGE ** (1 if high > 0 else farthest) + SHIFT + margin
            return slice(max(0, int((low + 1) / 2 * size) - 1), min(size, int((high + 1) / 2 * size) + 2))

        rows, columns = span(top, bottom, CENTRE + CENTRE_MOVE + move), span(left, right, 0.0)
        return Canvas(self.pixels[:, rows, columns], self.x[:, columns], self.y[rows], self.sharp)

    def paint(self, distance: Tensor, colour: Tensor, opacity: Tensor | float = 1.0) -> None:
        """Fill the inside of a shape, with a soft edge EDGE pixels wide."""
        self.blend((0.5 - distance * self.sharp).clamp_(0, 1), colour, opacity)

    def blend(self, mask: Tensor, colour: Tensor, opacity: Tensor | float = 1.0) -> None:
        """Mix a colour in, (h, w, B) of it."""
        if not isinstance(opacity, float) or opacity != 1.0:
            mask = mask * opacity
        self.pixels.lerp_(colour, mask)
