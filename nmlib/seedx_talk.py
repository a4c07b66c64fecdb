"""A SEED-X that was trained here in a conversation of its own: it replies freely, and reads what it made itself.

The instructions are those of a stored conversation, so that its true pictures can be laid beside the replies. What the
model reads of a picture that it made is decided by a policy, as in the small world: its predicted tokens, as the
settings' `history` has it, the decoded picture encoded again, or the true picture.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from nmlib.conversation import Conversation
from nmlib.detokenizer import TokenDecoder
from nmlib.runtime import device, progress
from nmlib.seedx_checkpoint import System
from nmlib.seedx_evaluation import COLUMNS, judged, ways_back
from nmlib.seedx_generate import MAX_NEW_TOKENS, Remember, Reply, SeedXChat, Shown
from nmlib.seedx_training import to_clip
from nmlib.seedx_vision import QwenViT

SeedXPolicy = Literal["tokens", "reencode", "oracle"]
POLICIES: tuple[SeedXPolicy, ...] = get_args(SeedXPolicy)


@torch.no_grad()
def talk(
    system: System,
    conversation: Conversation,
    policy: SeedXPolicy = "tokens",
    decoder: TokenDecoder | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[Reply]:
    """Say the instructions of a conversation, one after the other, and let the model make every picture.

    Args:
        system: with its encoder.
        conversation: with pictures; those that the person brings are shown, the others are asked for.
        policy: what later rounds read of a picture that was made.
        decoder: draws pictures; needed by `reencode` alone.
        max_new_tokens: of each reply.

    Returns:
        A reply for every picture that is asked for, which ends with that picture. A model that only talks is asked
        again, and made to draw first.

    Raises:
        ValueError: no pictures, or no decoder for `reencode`.
    """
    if system.vit is None or conversation.images is None:
        raise ValueError(f"conversation {conversation.id!r}: talking needs its pictures, and the system's encoder")
    vit, agent = system.vit.to(device()), system.agent.to(device()).eval()
    true = encode(vit, conversation.images)[:, None]  # (R, 1, M, D_feature)
    asked = [index for index, item in enumerate(conversation.rounds) if not item.is_brought]
    replies: list[Reply] = []
    remember = _remember(policy, vit, decoder, lambda: true[asked[len(replies)]])
    chat = SeedXChat(agent, system.template, remember=remember)
    for index, item in enumerate(conversation.rounds):
        if item.is_brought:
            chat.show([item.instruction], [Shown(true[index])])
            continue
        (reply,) = chat.say([item.instruction], max_new_tokens=max_new_tokens, max_images=1)
        if not len(reply.images):
            chat.undo()
            (reply,) = chat.say([item.instruction], force_image=True, max_new_tokens=max_new_tokens, max_images=1)
        replies.append(reply)
    return replies


def talk_table(
    system: System,
    conversations: Sequence[Conversation],
    policies: Sequence[SeedXPolicy] = ("tokens", "oracle"),
    decoder: TokenDecoder | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> pd.DataFrame:
    """Base retrieval where the model talks by itself: rows as of `seedx_evaluation.retrieval_table`.

    `history` is the policy. Unlike there, every kind of the settings' `history` can be asked: tokens repeated, as they
    are, or the states of the query tokens.

    Args:
        system: with its encoder.
        conversations: with pictures.
        policies: of which each conversation is talked through once.
        decoder: draws pictures; needed by `reencode` alone.
        max_new_tokens: of each reply.
    """
    assert system.vit is not None
    rows: list[dict[str, object]] = []
    for conversation in progress(conversations, desc="talk"):
        assert conversation.images is not None
        targets = system.agent.to_target(encode(system.vit.to(device()), conversation.images))  # (R, N, D_feature)
        asked = [index for index, item in enumerate(conversation.rounds) if not item.is_brought]
        for policy in policies:
            replies = talk(system, conversation, policy, decoder, max_new_tokens=max_new_tokens)
            made = dict(zip(asked, replies, strict=True))
            rows += [
                judged(conversation, index, made[index].images[0], targets) | {"history": policy}
                for index in ways_back(conversation)
            ]
    return pd.DataFrame(rows, columns=COLUMNS)


def encode(vit: QwenViT, images: Tensor) -> Tensor:
    """Encoder tokens (B, M, D_feature) of uint8 pictures (B, 3, H, W), resized to the encoder's size if need be."""
    size = (vit.settings.image_size, vit.settings.image_size)
    images = images.to(vit.proj.device)
    if images.shape[-2:] != size:
        resized = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        images = resized.round().clamp(0, 255).byte()  # (B, 3, H, W)
    pixels = to_clip(images).to(vit.proj.dtype)
    return vit(pixels).float()  # (B, M, D_feature)


def _remember(
    policy: SeedXPolicy, vit: QwenViT, decoder: TokenDecoder | None, true: Callable[[], Tensor]
) -> Remember | None:
    """What stands in the history for the picture of a reply; None for its tokens."""
    if policy == "tokens":
        return None

    def remember(_: int, predicted: Tensor) -> Tensor:
        if policy == "oracle":
            return true()[: len(predicted)]  # (n, M, D_feature)
        if not len(predicted):  # of a reply of words alone
            return predicted
        assert decoder is not None
        return encode(vit, (decoder.decode(predicted) * 255).round().byte())  # (n, M, D_feature)

    if policy == "reencode" and decoder is None:
        raise ValueError("reencode: pictures are drawn and encoded again, which needs a decoder")
    return remember
