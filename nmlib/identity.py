"""Who is shown: an embedder of subjects trained with the ArcFace loss, exported to ONNX, loaded by `insightface`.

It learns on subjects that nothing else sees. Two pictures of one subject (other pose, light, edits) should be
close, two subjects apart. On photographs any local ArcFace ONNX file is loaded by the same call; `faces` has a
network for them whose weights a package ships.
"""

import contextlib
import io
import itertools
import logging
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmlib.config import IdentityConfig
from nmlib.runtime import atomic_path

INPUT_SIZE = 112
CHANNELS = (32, 64, 128, 192)
WARMUP_STEPS = 300
SAME_PICTURE = 1e-3  # radians; two views closer than this cannot tell a copy from the person


class IdentityError(ValueError):
    """An embedder that cannot be used; the message says why."""


class IdentityLosses(NamedTuple):
    """`total` is the ArcFace loss; `accuracy` the share of subjects recognised without the margin."""

    total: Tensor
    accuracy: Tensor


class Embedder(nn.Module):
    """A small convolutional network from pictures to unit vectors.

    Its ONNX form takes what insightface feeds: (B, 3, 112, 112), BGR swapped to RGB, scaled to [-1, 1].
    """

    def __init__(self, embedding_dim: int, working_size: int) -> None:
        super().__init__()
        self.working_size = working_size
        widths = (3, *CHANNELS)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.PReLU(after)]
        self.features = nn.Sequential(*layers)
        side = working_size
        for _ in CHANNELS:
            side = (side + 1) // 2
        self.head = nn.Linear(CHANNELS[-1] * side**2, embedding_dim)
        self.norm = nn.BatchNorm1d(embedding_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, h, w) in [-1, 1] -> unit vectors (B, E)."""
        size = (self.working_size, self.working_size)
        resized = F.interpolate(pixels, size, mode="bilinear", align_corners=False)  # (B, 3, s, s)
        return F.normalize(self.norm(self.head(self.features(resized).flatten(1))), dim=1)  # (B, E)


class ArcFaceTrainer(nn.Module):
    """Additive angular margin over the training subjects (Deng et al. 2019), margin ramped up."""

    def __init__(self, settings: IdentityConfig, working_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.embedder = Embedder(settings.embedding_dim, working_size)
        self.centres = nn.Parameter(0.1 * torch.randn(settings.identities, settings.embedding_dim))

    def forward(self, images: Tensor, labels: Tensor, step: int) -> IdentityLosses:
        """Loss of pictures (B, 3, H, W) in [0, 1] of subjects `labels` (B,)."""
        vectors = self.embedder(images * 2 - 1).float()  # (B, E)
        with torch.autocast(images.device.type, enabled=False):  # in bfloat16 0.999 is 1, where acos has no slope
            cosine = vectors @ F.normalize(self.centres.float(), dim=1).T  # (B, K)
            margin = self.settings.margin * min(1.0, step / WARMUP_STEPS)
            angle = torch.acos(cosine.gather(1, labels[:, None]).clamp(-0.999, 0.999))  # (B, 1)
            logits = self.settings.scale * cosine.scatter(1, labels[:, None], torch.cos(angle + margin))
        return IdentityLosses(F.cross_entropy(logits, labels), (cosine.argmax(1) == labels).float().mean())


def export_onnx(embedder: Embedder, path: Path) -> None:
    """Write the embedder as an ArcFace ONNX file that insightface loads."""
    embedder.cpu().eval()
    example = torch.zeros(2, 3, INPUT_SIZE, INPUT_SIZE)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision is missing
    quiet = warnings.catch_warnings(action="ignore", category=FutureWarning)  # of torch.export's own making
    with atomic_path(path) as temporary, contextlib.redirect_stdout(io.StringIO()), quiet:
        torch.onnx.export(
            embedder,
            (example,),
            str(temporary),
            input_names=["input"],
            output_names=["embedding"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1, max=4096)}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )


class SubjectEmbedder(ABC):
    """What turns pictures, one subject in each, into unit vectors that are close where the subject is the same."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Unit vectors (B, E) of pictures (B, 3, H, W) in [0, 1]."""

    def check(self, first: Tensor, second: Tensor) -> float:
        """Area under the ROC curve on known pairs.

        Args:
            first: pictures (B, 3, H, W) in [0, 1] of B different subjects, B at least 2.
            second: other pictures of the same subjects, in the same order.

        Returns:
            The share, from 0 to 1, of cases in which a pair of one subject scores above a pair of two.

        Raises:
            IdentityError: fewer than two subjects, or all pairs look alike, as they do when a network scales its own
                input.
        """
        if len(first) != len(second) or len(first) < 2:
            raise IdentityError(f"{len(first)} and {len(second)} pictures: expected the same 2 or more subjects twice")
        scores = self(first) @ self(second).T  # (B, B)
        same, other = scores.diag(), scores[~torch.eye(len(scores), dtype=torch.bool)]
        if float(scores.std()) < 1e-2:
            raise IdentityError(
                f"every pair scores {float(scores.mean()):.2f}: this is no face embedder, or it scales its own input "
                "(insightface already maps pixels to [-1, 1])"
            )
        return float((same[:, None] > other[None]).float().mean())


class FaceEmbedder(SubjectEmbedder):
    """An ArcFace ONNX file, loaded by insightface.

    Args:
        path: a local file.

    Raises:
        IdentityError: the file is missing or insightface does not take it for a face embedder.
    """

    def __init__(self, path: Path) -> None:
        from insightface.model_zoo import get_model

        if not path.is_file():
            raise IdentityError(f"{path}: no such ONNX file; run the notebook that trains the embedder")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._model = get_model(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen kinds, which share no base
            reason = " ".join(str(error).split())
            raise IdentityError(f"{path}: damaged, or no ONNX file ({reason}); delete it and run again") from None
        if self._model is None or not hasattr(self._model, "get_feat"):
            raise IdentityError(f"{path}: insightface does not take this for an ArcFace network of {INPUT_SIZE} px")

    def __call__(self, images: Tensor) -> Tensor:
        """Unit vectors (B, E) of pictures (B, 3, H, W) in [0, 1]."""
        size = (INPUT_SIZE, INPUT_SIZE)
        resized = F.interpolate(images, size, mode="bilinear", align_corners=False)  # (B, 3, 112, 112)
        pixels = (resized * 255).round().to(torch.uint8).permute(0, 2, 3, 1).flip(-1).cpu().numpy()
        vectors = np.concatenate(
            [self._model.get_feat(list(part)) for part in np.array_split(pixels, len(pixels) // 256 + 1)]
        )
        return F.normalize(torch.from_numpy(vectors).float(), dim=1)  # (B, E)


def copy_paste_score(generated: Tensor, reference: Tensor, other_view: Tensor) -> Tensor:
    """Whether generated faces copy the reference picture or show the person anew.

    A similarity to the reference alone is highest for a pasted copy of it. With a second, true picture of the same
    person, and the angle a(u, v) = arccos(u . v) between two embeddings, the score of each row is

        (a(generated, other_view) - a(generated, reference)) / a(reference, other_view)

    It is 1 for a copy of the reference, -1 for the other view itself, and 0 where the face is as far from one as from
    the other. Angles obey the triangle inequality, so it lies in [-1, 1]. It says nothing of how alike the faces are:
    a stranger scores about 0 as well, so report the similarity to `other_view` beside it.

    Args:
        generated: unit vectors (B, E) of generated faces.
        reference: unit vectors (B, E) of the pictures that the model was given.
        other_view: unit vectors (B, E) of other true pictures of the same people.

    Returns:
        Scores (B,), NaN where reference and other view are one picture (an angle below `SAME_PICTURE`): nothing can
        be told there, and such rows are to be left out of a mean (`torch.nanmean`).

    Raises:
        IdentityError: shapes differ, or rows that are no unit vectors.

    Source: the copy-paste measure of WithAnyone, arXiv 2510.14975.
    """
    for name, vectors in (("generated", generated), ("reference", reference), ("other_view", other_view)):
        if vectors.ndim != 2 or vectors.shape != generated.shape:
            raise IdentityError(f"{name} is {tuple(vectors.shape)}; expected {tuple(generated.shape)}, that is (B, E)")
        if not torch.allclose(vectors.norm(dim=1), vectors.new_ones(len(vectors)), atol=1e-3):
            raise IdentityError(f"{name}: rows are no unit vectors; give what an embedder returns")
    between = _angle(reference, other_view)  # (B,)
    score = (_angle(generated, other_view) - _angle(generated, reference)) / between
    return torch.where(between < SAME_PICTURE, torch.nan, score.clamp(-1, 1))


def _angle(first: Tensor, second: Tensor) -> Tensor:
    """Angles (B,) in radians between rows of unit vectors, exact for small ones too, where arccos is not."""
    return 2 * torch.atan2((first - second).norm(dim=1), (first + second).norm(dim=1))
