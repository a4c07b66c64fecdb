"""Talking to SEED-X at the terminal: a picture of any shape, read in tiles, then instructions and ways back.

The weights are those of a stage that was trained here, or the released ones themselves. Pictures are drawn by the
detokenizer on the latents of a VAE, where the run has trained one; without it the replies are words.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from nmlib import latent_training, runtime, seedx_training
from nmlib.cache import CacheError
from nmlib.chat import lines_typed
from nmlib.conversation import PICTURE_ERRORS, ConversationError, from_picture, to_picture
from nmlib.detokenizer import TokenDecoder
from nmlib.runtime import Run
from nmlib.seedx_checkpoint import System, from_pretrained
from nmlib.seedx_generate import Reply, SeedXChat, Shown
from nmlib.seedx_layout import SampleError
from nmlib.seedx_vision import QwenViT, tile

GRIDS = ("1x1", "1x2", "1x3", "2x1", "3x1", "1x4", "4x1", "2x2")  # columns x rows, of SEED-X's own configuration
RELEASED = "weights"  # in place of a stage's name: the weights that stages begin with
HELP = "Say what to change. /show FILE [words] brings a picture, /draw TEXT makes it draw; /undo, /quit."


def load(run: Run, stage: str, weights: Path) -> System:
    """A stage with its encoder on the run's device, or with `weights` for its name the released model.

    Raises:
        CheckpointError: the stage was not trained, or a part is missing or damaged.
    """
    if stage != RELEASED:
        system = seedx_training.open_stage(run, stage, weights)
    else:
        assert run.params.seedx is not None
        system = from_pretrained(weights, run.params.seedx, runtime.compute_dtype(run.params.precision))
    assert system.vit is not None
    device = runtime.device()
    return system._replace(agent=system.agent.to(device).eval(), vit=system.vit.to(device).eval())


@torch.no_grad()
def look_at(vit: QwenViT, path: Path, grids: Sequence[str] = GRIDS) -> Shown:
    """Read a picture file as SEED-X reads one of any resolution: tiles of the grid that fits it best, and the whole.

    Args:
        vit: the encoder.
        path: any picture that Pillow reads.
        grids: columns x rows to choose from; `1x1` is what SEED-X was taught to edit with, none reads the whole alone.

    Raises:
        ConversationError: no picture, or one too large to be meant.
    """
    try:
        with Image.open(path) as opened:
            picture = to_picture(from_picture(opened, str(path)))
    except ConversationError:
        raise
    except PICTURE_ERRORS as error:
        raise ConversationError(f"{path}: no picture that can be read ({error})") from None
    pieces = tile(picture, grids or GRIDS[:1], vit.settings.image_size)
    first = 0 if grids else len(pieces.pixels) - 1  # the whole is the last
    pixels, positions = pieces.pixels[first:], pieces.positions[first:]  # (n, 3, H, W), (n, 2)
    features = vit(pixels.to(vit.proj.device, vit.proj.dtype)).float()  # (n, M, D_feature)
    return Shown(features, tuple((float(x), float(y)) for x, y in positions))


def repl(
    system: System, folder: Path, picture: Path, decoder: TokenDecoder | None, grids: Sequence[str] = GRIDS
) -> None:
    """Talk on the terminal, beginning with a picture; every picture drawn is written to `folder` as `NNN.png`.

    Args:
        system: with its encoder.
        folder: takes the pictures.
        picture: file that the conversation begins with.
        decoder: draws pictures; None leaves them undrawn.
        grids: see `look_at`.

    Raises:
        ConversationError: the first file is no picture.
    """
    assert system.vit is not None
    chat = SeedXChat(system.agent, system.template)
    chat.show(["here is a picture"], [look_at(system.vit, picture, grids)])
    folder.mkdir(parents=True, exist_ok=True)
    drawn = len(list(folder.glob("*.png")))  # what was drawn before stays
    print(HELP)
    for line in lines_typed():
        try:
            reply = _obey(chat, system.vit, line, grids)
        except (ConversationError, CacheError, SampleError) as error:
            print(error)
            continue
        if reply is not None:
            print(reply.text)
            drawn = _draw(reply, folder, decoder, drawn)


def _obey(chat: SeedXChat, vit: QwenViT, line: str, grids: Sequence[str]) -> Reply | None:
    """Carry out one line of the terminal; the reply, where there is one."""
    word, _, rest = line.partition(" ")
    if word == "/undo":
        chat.undo()
    elif word == "/show":
        file, text = _file_and_words(rest)
        chat.show([text or "here is a picture"], [look_at(vit, file, grids)])
    elif (word.startswith("/") and word != "/draw") or not line:
        print(HELP)
    else:
        is_forced = word == "/draw"
        return chat.say([rest if is_forced else line], force_image=is_forced)[0]
    return None


def _file_and_words(line: str) -> tuple[Path, str]:
    """The longest beginning of a line that is a file, which may have spaces in its name, and the rest."""
    words = line.split(" ")
    for count in range(len(words), 1, -1):
        if Path(" ".join(words[:count])).is_file():
            return Path(" ".join(words[:count])), " ".join(words[count:])
    return Path(words[0]), " ".join(words[1:])


def _draw(reply: Reply, folder: Path, decoder: TokenDecoder | None, drawn: int) -> int:
    """Write the pictures of a reply as files, the first with the number after `drawn`; the number of the last."""
    if len(reply.images) and decoder is None:
        print(f"({len(reply.images)} pictures in tokens; drawing them takes `train --stage detokenizer`)")
        return drawn
    for image in decoder.decode(reply.images) if len(reply.images) and decoder is not None else []:
        drawn += 1
        path = folder / f"{drawn:03d}.png"
        to_picture(image.cpu()).save(path)
        print(path)
    return drawn


def talk_to(run: Run, stage: str, picture: Path | None, weights: Path | None, tiles: str) -> None:
    """What `python -m nmlib chat` does where the params file is one of SEED-X.

    Args:
        run: holds stages and detokenizer.
        stage: see `load`.
        picture: file that the conversation begins with.
        weights: folder of the released weights; by default `weights` in the run's folder.
        tiles: grids with commas between them, `any` for SEED-X's own, empty for the whole picture alone.

    Raises:
        CheckpointError: weights or a stage are missing, damaged or do not fit.
        ConversationError: no picture, or a grid that is none.
    """
    if picture is None:
        raise ConversationError(f"{run.name}: SEED-X has no pictures of its own; give one with --picture FILE")
    grids = GRIDS if tiles == "any" else tuple(filter(None, tiles.split(",")))
    if unknown := [grid for grid in grids if not re.fullmatch(r"[1-9]x[1-9]", grid)]:
        raise ConversationError(f"--tiles: {unknown[0]!r}; expected columns x rows such as 2x1, or any of {GRIDS}")
    folder, decoder = seedx_training.weights_folder(run, weights), latent_training.open_latest(run)
    repl(load(run, stage, folder), run.path("chat", stage), picture, decoder, grids)
