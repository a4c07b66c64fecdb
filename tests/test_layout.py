"""The layout of a batch: words, labels, positions, and who sees whom, each checked against a plain restatement."""

import itertools

import pytest
import torch
from toy import MAX_ROUNDS, SOURCE, TOKENS, conversations, make_model, make_round, random_tree

from nmlib import layout, phrases
from nmlib.conversation import Conversation
from nmlib.layout import IGNORE, MAIN, PADDING, Layout, Template

TOKENIZER = layout.build_tokenizer(SOURCE.attributes, TOKENS, MAX_ROUNDS)
GROUNDED, POLITE = Template(TOKENIZER, TOKENS, "grounded"), Template(TOKENIZER, TOKENS, "polite")
IMAGE = " ".join(layout.image_token(index) for index in range(TOKENS))


def two_rounds() -> Conversation:
    upload = make_round("upload", "here is a picture")
    return Conversation("two", "toy", (upload, make_round("edit", "make the square red", 0)))


def words(batch: Layout, row: int) -> str:
    """A row as text, padding left out."""
    return TOKENIZER.decode(batch.input_ids[row][batch.segments[row] != PADDING].tolist())


def supervised(batch: Layout, row: int) -> list[tuple[str, str]]:
    """(word, word to say next) wherever a row is supervised."""
    chosen = batch.labels[row] != IGNORE
    here = TOKENIZER.convert_ids_to_tokens(batch.input_ids[row][chosen].tolist())
    return list(zip(here, TOKENIZER.convert_ids_to_tokens(batch.labels[row][chosen].tolist()), strict=True))


# ---------------------------------------------------------------------------------------------------------
# words and labels


def test_upload_and_edit_by_hand() -> None:
    batch = GROUNDED.packed([two_rounds()])
    assert words(batch, 0) == (
        f"<s> [INST] #1 <img> {IMAGE} </img> here is a picture [/INST] "
        f"[INST] make the square red [/INST] #1 to #2 <img> {IMAGE}"
    )
    # the reply is learned word by word, up to the word that opens the image; nothing else is
    assert supervised(batch, 0) == [("[/INST]", "#1"), ("#1", "to"), ("to", "#2"), ("#2", "<img>")]
    assert (batch.labels[0] != IGNORE).nonzero().flatten().tolist() == [19, 20, 21, 22]
    assert batch.queries.tolist() == [[0, 1]] and batch.history.tolist() == [[0, 0]]
    # history block of round 0 at 4 to 7, query block of round 1 at the end
    assert batch.history_slots[0].nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert batch.query_slots[0].nonzero().flatten().tolist() == [24, 25, 26, 27]


def test_padding_comes_last_and_says_so() -> None:
    """Beside a longer row every field of a shorter one is what it is alone, then its own kind of padding."""
    longer = Conversation("three", "toy", (*two_rounds().rounds, make_round("edit", "make the square blue", 1)))
    alone, beside = GROUNDED.packed([two_rounds()]), GROUNDED.packed([longer, two_rounds()])
    length = alone.input_ids.shape[1]
    assert beside.input_ids.shape[1] > length
    padding = {"input_ids": int(TOKENIZER.pad_token_id or 0), "segments": PADDING, "labels": IGNORE}
    for name in ("input_ids", "position_ids", "segments", "rounds", "labels", "block_start", "history_slots"):
        row = getattr(beside, name)[1]
        assert torch.equal(row[:length], getattr(alone, name)[0]), name
        assert set(row[length:].tolist()) == {padding.get(name, 0)}, name


def test_description_by_hand() -> None:
    first = make_round("describe", "a picture with red square")
    told = Conversation("told", "toy", (first, make_round("edit", "make the square red", 0)))
    batch = GROUNDED.packed([told])
    assert words(batch, 0) == (
        f"<s> [INST] a picture with red square [/INST] #1 <img> {IMAGE} {IMAGE} </img> "
        f"[INST] make the square red [/INST] #1 to #2 <img> {IMAGE}"
    )
    expected = [("[/INST]", "#1"), ("#1", "<img>")]
    assert supervised(batch, 0) == [*expected, ("[/INST]", "#1"), ("#1", "to"), ("to", "#2"), ("#2", "<img>")]
    assert batch.queries.tolist() == [[0, 0], [0, 1]] and batch.history.tolist() == [[0, 0]]


def test_polite_replies_name_no_picture() -> None:
    batch = POLITE.packed([two_rounds()])
    reply = phrases.response("polite", 1, 0, "make the square red")
    assert words(batch, 0) == (
        f"<s> [INST] <img> {IMAGE} </img> here is a picture [/INST] "
        f"[INST] make the square red [/INST] {reply} <img> {IMAGE}"
    )
    assert " ".join(said for _, said in supervised(batch, 0)) == f"{reply} <img>"


def test_unknown_words_become_unk_and_case_does_not_matter() -> None:
    assert TOKENIZER.decode(GROUNDED.encode("Make the SQUARE mauve")) == "make the square <unk>"


def test_every_word_of_the_vocabulary_is_one_token() -> None:
    for word in [*phrases.vocabulary(SOURCE.attributes), *map(phrases.marker, range(MAX_ROUNDS)), *IMAGE.split()]:
        assert TOKENIZER.convert_ids_to_tokens(GROUNDED.encode(word)) == [word]


def test_a_literal_image_word_in_an_instruction_is_no_history_slot() -> None:
    sly = Conversation("sly", "toy", (two_rounds().rounds[0], make_round("edit", "paint <img_00000> red", 0)))
    batch = GROUNDED.packed([sly])
    assert int(batch.history_slots.sum()) == TOKENS * len(batch.history)


def test_replies_say_what_was_asked_in_the_shortest_words() -> None:
    edits = [("hue", "red"), ("edge", "none"), ("hue", "blue"), ("edge", "black")]
    told = [make_round("upload", "")] + [make_round("edit", "", i, edit) for i, edit in enumerate(edits)]
    asked = [
        make_round("rollback", "", 1, ("hue", "red"), reference="content"),
        make_round("rollback", "", 2, reference="count"),
    ]
    conversation = Conversation("told", "toy", (*told, *asked))
    assert conversation.named_edit(5) == "none edge" and conversation.named_edit(6) == conversation.named_edit(3) == ""
    once = Conversation("told", "toy", (*told[:3], make_round("rollback", "", 0, reference="content")))
    assert once.named_edit(3) == "hue"


def test_without_pictures_words_keep_their_places() -> None:
    told = [two_rounds()]
    full, spoken = GROUNDED.packed(told), GROUNDED.packed(told, pictures=False)
    is_word = ~full.query_slots[0] & ~full.history_slots[0]
    for name in ("input_ids", "position_ids", "rounds", "labels"):
        assert getattr(spoken, name)[0].tolist() == getattr(full, name)[0][is_word].tolist(), name
    assert spoken.rounds[0].tolist() == [0] * 10 + [1] * 10
    assert len(spoken.queries) == len(spoken.history) == 0


# ---------------------------------------------------------------------------------------------------------
# positions and blocks


@pytest.mark.parametrize("template", [GROUNDED, POLITE], ids=["grounded", "polite"])
def test_query_and_history_block_of_a_round_share_their_positions(template: Template) -> None:
    batch = template.packed([*conversations(), random_tree(3, 6)])
    queries = batch.position_ids[batch.query_slots].reshape(-1, TOKENS)
    history = batch.position_ids[batch.history_slots].reshape(-1, TOKENS)
    found = {tuple(key): block.tolist() for key, block in zip(batch.history.tolist(), history, strict=True)}
    shared = 0
    for key, block in zip(batch.queries.tolist(), queries.tolist(), strict=True):
        if tuple(key) in found:
            assert found[tuple(key)] == block
            shared += 1
    assert shared == 2 + 3 + 4  # every generated round but the last of each conversation


def test_positions_on_the_main_path_count_up_without_gaps() -> None:
    batch = GROUNDED.packed(conversations())
    for positions, segments in zip(batch.position_ids, batch.segments, strict=True):
        main = positions[segments == MAIN].tolist()
        assert main == list(range(len(main)))


def test_prefix_rows_are_the_packed_row_cut_off() -> None:
    """A `prefix` sample is what its query block sees in the packed row, at the same positions."""
    pair = conversations()
    packed, prefix = GROUNDED.packed(pair), GROUNDED.prefix(pair)
    assert prefix.queries.tolist() == packed.queries.tolist()
    mask = packed.attention_mask()[:, 0]
    for row, (owner, index) in enumerate(prefix.queries.tolist()):
        block = (packed.segments[owner] == index + 1).nonzero().flatten()
        seen = mask[owner, block[-1]]
        real = prefix.segments[row] != PADDING
        for name in ("input_ids", "position_ids", "history_slots", "query_slots"):
            ours, theirs = getattr(prefix, name)[row][real], getattr(packed, name)[owner][seen]
            assert torch.equal(ours, theirs), name


def test_prefix_takes_the_rounds_it_is_told() -> None:
    batch = GROUNDED.prefix(conversations(), rounds=[3, 0])
    assert batch.queries.tolist() == [[0, 3], [1, 0]]
    assert batch.history.tolist() == [[0, 0], [0, 1], [0, 2]]
    uploads = GROUNDED.prefix(conversations(), rounds=[0, 1])  # nothing to supervise in an upload
    assert uploads.queries.tolist() == [[1, 1]] and len(uploads.input_ids) == 1


@pytest.mark.parametrize("kind", ["packed", "prefix"])
def test_blocks_come_in_the_order_of_their_slots(kind: str) -> None:
    """The i-th run of history slots, row by row, is the i-th entry of `history`: what masked_scatter relies on."""
    pair = [*conversations(), random_tree(5, 6)]
    batch: Layout = getattr(GROUNDED, kind)(pair)
    opened = (batch.input_ids == GROUNDED.boi).cumsum(1)  # an image that follows the n-th <img> is of round n - 1
    rounds = (opened - 1)[batch.history_slots].reshape(-1, TOKENS)
    assert torch.equal(rounds, batch.history[:, 1:].expand(-1, TOKENS))
    assert torch.equal((opened - 1)[batch.query_slots].reshape(-1, TOKENS), batch.queries[:, 1:].expand(-1, TOKENS))
    assert batch.history_slots.sum(1).sum() == TOKENS * len(batch.history)
    owners = batch.history[:, 0].tolist()
    assert owners == sorted(owners)


# ---------------------------------------------------------------------------------------------------------
# who sees whom


def test_mask_against_a_restatement_in_order_of_the_sequence() -> None:
    """In the order of the row: nobody sees what comes later, nor another query block, nor padding."""
    batch = GROUNDED.packed([*conversations(), random_tree(7, 6), random_tree(8, 2, upload=False)])
    mask = batch.attention_mask()
    rows, length = batch.segments.shape
    assert mask.shape == (rows, 1, length, length) and mask.dtype == torch.bool
    for row in range(rows):
        segments = batch.segments[row].tolist()
        for i, j in itertools.product(range(length), repeat=2):
            if segments[i] == PADDING:
                assert mask[row, 0, i, i]
            else:
                expected = j <= i and segments[j] in (MAIN, segments[i])
                assert bool(mask[row, 0, i, j]) == expected, (row, i, j)


def test_a_layout_moves_whole() -> None:
    moved = GROUNDED.packed(conversations()).to("meta")
    assert {value.device.type for value in vars(moved).values()} == {"meta"}


def test_a_model_and_its_template_agree_on_the_vocabulary() -> None:
    model, template = make_model()
    assert model.llm.config.vocab_size == len(template.tokenizer)
    assert model.marker_ids.tolist() == [template.encode(f"#{n + 1}")[0] for n in range(MAX_ROUNDS)]
