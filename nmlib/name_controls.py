"""Controls of the experiments on names: what must change nothing, and what must leave a model at chance."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Generator

from nmlib import phrases
from nmlib.conversation import Conversation, ConversationError, Round


def rename_everybody(conversation: Conversation, mapping: Mapping[str, str]) -> Conversation:
    """The same conversation with other names; the pictures stay.

    Args:
        conversation: any.
        mapping: old name -> new name; who is not in it keeps the name.

    Raises:
        ConversationError: two people would get one name.
    """
    used = {item.name for item in conversation.rounds if item.name is not None}
    given = [mapping.get(name, name) for name in sorted(used)]
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        raise ConversationError(f"conversation {conversation.id!r}: two people would be called {twice[0]!r}")
    return replace(conversation, rounds=tuple(_renamed(item, mapping) for item in conversation.rounds))


def _renamed(item: Round, mapping: Mapping[str, str]) -> Round:
    if item.name is None:
        return item
    new = mapping.get(item.name, item.name)
    text = phrases.with_name(phrases.without_name(item.instruction, item.name), new)
    return replace(item, instruction=text, name=new)


def shuffle_names(conversation: Conversation, generator: Generator) -> Conversation:
    """A control in which a name does not say who: every recall asks by a name drawn among those known there.

    Pictures and bases stay, so that the base of a recall is no longer the picture its name stands for: the result
    does not pass `validate`, and with K names known nobody can find the right one more often than once in K.
    """
    rounds = []
    for index, item in enumerate(conversation.rounds):
        if item.kind == "recall" and item.name is not None:
            known = sorted(conversation.people(index))
            pick = known[int(torch.randint(len(known), (1,), generator=generator))]
            item = _renamed(item, {item.name: pick})
        rounds.append(item)
    return replace(conversation, rounds=tuple(rounds))
