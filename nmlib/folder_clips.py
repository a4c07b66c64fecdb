"""Clips of real faces: a folder with one folder of frames for every person."""

from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor

from nmlib.conversation import PICTURE_ERRORS, ConversationError, from_picture
from nmlib.phrases import is_heldout
from nmlib.runtime import read_json
from nmlib.sources import Attribute, Clip

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
BOXES = "faces.json"


class FolderClips:
    """People from `<root>/<person>/<frame>.png`, an `IdentityClips` of which only pixels are known.

    A person's folder may hold `faces.json`: file name -> [left, top, right, bottom], as shares of width and height
    of the upright picture.
    The name of a person's folder decides its split; it is never shown to the model.

    Args:
        root: the folder.
        image_size: height and width that frames are resized to.
        frames: most frames to read of a person, evenly spread in the order of their names.

    Raises:
        ConversationError: there is no person with two frames.
    """

    name = kind = "clips"
    attributes: tuple[Attribute, ...] = ()

    def __init__(self, root: Path, image_size: int, frames: int = 8) -> None:
        self.root, self.image_size, self.frames = root, image_size, frames
        folders = sorted(folder for folder in root.iterdir() if folder.is_dir()) if root.is_dir() else []
        self.people = [folder for folder in folders if len(self._files(folder)) > 1]
        if not self.people:
            raise ConversationError(f"{root}: no person with two frames; expected <person>/<frame>.png below it")

    def _files(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)

    def clips(self, count: int, split: str, generator: Generator, distance: float | None = None) -> list[Clip]:
        """Draw people; see `IdentityClips.clips`.

        Raises:
            ConversationError: the split has too few people, look-alikes are asked for, or a frame cannot be read.
        """
        if distance is not None:
            raise ConversationError(f"{self.root}: look-alikes are not known; set look_alike_distance to null")
        people = [folder for folder in self.people if is_heldout(folder.name) == (split == "heldout")]
        if len(people) < count:
            raise ConversationError(f"{self.root}: {len(people)} people in split {split!r}; expected {count} or more")
        return [self._read(people[place]) for place in torch.randperm(len(people), generator=generator)[:count]]

    def without_boxes(self) -> list[Path]:
        """Folders of people of whom nothing says where their faces are."""
        return [folder for folder in self.people if not (folder / BOXES).exists()]

    def _read(self, folder: Path) -> Clip:
        files = self._files(folder)
        count = min(self.frames, len(files))
        chosen = [files[round(place * (len(files) - 1) / (count - 1))] for place in range(count)]
        images = torch.stack([self._picture(path) for path in chosen])  # (F, 3, H, W)
        return Clip(images=images, boxes=self._boxes(folder / BOXES, chosen))

    def _picture(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as picture:
                return from_picture(picture, str(path), self.image_size)
        except ConversationError:
            raise
        except PICTURE_ERRORS as error:
            raise ConversationError(f"{path}: cannot be read as a picture ({error}); mend or remove it") from None

    def _boxes(self, path: Path, files: list[Path]) -> Tensor | None:
        if not path.exists():
            return None
        known = read_json(path)
        missing = [file.name for file in files if len(known.get(file.name, ())) != 4]
        if missing:
            raise ConversationError(
                f"{path}: no box of four numbers for {missing[0]}; expected [left, top, right, bottom]"
            )
        boxes = torch.tensor([known[file.name] for file in files]).clamp(0, 1)  # (F, 4)
        empty = (boxes[:, :2] >= boxes[:, 2:]).any(1).nonzero().flatten().tolist()
        if empty:
            name = files[empty[0]].name
            raise ConversationError(
                f"{path}: the box of {name} is {known[name]}; expected left < right and top < bottom as shares of the "
                "picture, from 0 to 1"
            )
        return boxes * self.image_size  # (F, 4)
