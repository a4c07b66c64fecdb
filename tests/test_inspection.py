"""What a folder holds and how Markov it is: rules for words on the project's own phrasings, counts, messages."""

import json
from pathlib import Path
from typing import Any

import pytest
from layouts import magicbrush_test_files, seed_line, write_imgedit, write_magicbrush, write_seed
from test_archives import write_zip
from test_cli import call  # noqa: F401
from toy import raised

from nmlib import phrases
from nmlib.conversation import Conversation, Round
from nmlib.inspection import Markov, inspect_path
from nmlib.people import PEOPLE_ATTRIBUTES
from nmlib.photo_edits import TINT
from nmlib.readers import ReadError
from nmlib.references import earlier_reference
from nmlib.storage import save_conversations
from nmlib.world_phrases import ATTRIBUTES

WORDS = {
    "number": "three",
    "ordinal": "third",
    "marker": "#3",
    "noun": "the wall",
    "look": "the hat",
    "quote": "add a hat",
}


@pytest.mark.parametrize(
    ("templates", "kind"),
    [
        (phrases.UNDO_ONE, "count"),
        (phrases.UNDO_MANY, "count"),
        (phrases.ORDINAL, "ordinal"),
        (phrases.CONTENT_NOUN, "content"),
        (phrases.CONTENT_LOOK, "content"),
        (phrases.CONTENT_QUOTE, "content"),
        (phrases.START, "start"),
    ],
)
def test_every_rollback_of_the_grammar_names_an_earlier_picture(templates: tuple[str, ...], kind: str) -> None:
    found = {text: earlier_reference(text) for text in (template.format(**WORDS) for template in templates)}
    assert None not in found.values(), found
    wrong = {text: found[text] for text in found if found[text] != kind}
    assert not wrong, wrong


def test_no_edit_of_the_grammar_names_one() -> None:
    edits = [text for a in (*ATTRIBUTES, *PEOPLE_ATTRIBUTES) for said in a.commands.values() for text in said]
    edits += [text for said in TINT.commands.values() for text in said]
    wrong = [text for text in edits if earlier_reference(text) is not None]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Withdraw the previous round of modifications, adjust the vest in round1", "ordinal"),
        ("I don't like your edit, adjust the laptop in first round into black", "ordinal"),
        ("Make it look like the original photo", "start"),
        ("bring the dog back", "content"),
        ("put the hat back on", "content"),
        ("make the wall red again", "content"),
        ("make it as it was", "content"),
        ("have the man put his hand on his back", None),
        ("add a logo on the back of the shirt", None),
        ("add 2 dogs to the background", None),
        ("turn the lights on", None),
        ("turn two lights off", None),
        ("change the first dog into a cat", None),
        ("remove the person who stands before the door", None),
        ("write number 7 on the shirt", None),
    ],
)
def test_words_of_real_data_sets(text: str, kind: str | None) -> None:
    assert earlier_reference(text) == kind


def test_a_round_needs_both_its_base_and_its_words() -> None:
    rounds = (
        Round("here is a picture", "upload"),
        Round("add a hat", "edit", 0),
        Round("undo that", "edit", 1),  # the format says it starts from the last picture; its words say otherwise
        Round("make it blue", "rollback", 0),  # the other way round
        Round("go back to the start", "rollback", 0),
    )
    found = Markov()
    found.add(Conversation("a", "b", rounds).validate())
    assert (found.rounds, found.base, found.words, found.both, found.share) == (4, 2, 2, 1, 0.25)


def test_chains_and_backtracking_side_by_side(tmp_path: Path) -> None:
    train = inspect_path(write_magicbrush(tmp_path / "magicbrush"))[1]
    assert (train.lengths, train.markov.rounds, train.markov.share) == ({1: 1, 3: 1, 2: 1}, 6, 1.0)
    (found,) = inspect_path(write_imgedit(tmp_path / "imgedit"))
    assert (found.markov.rounds, found.markov.both) == (3, 2)
    lines = found.lines()
    assert lines[2] == "rows        1 kept, 1 rejected"
    assert lines[3].startswith(
        "            1 base unknown, for example version_backtracking_part0.parquet, row group 0, row 1:"
    )
    assert lines[-2] == "Markov      0.667: 2 of 3 rounds can be answered from the last picture alone"


def test_a_limit_and_no_pictures(tmp_path: Path) -> None:
    write_seed(tmp_path, [seed_line("a", 2), seed_line("b", 3), seed_line("c", 1)])  # no picture is there
    (closed,) = inspect_path(tmp_path, pictures=False, limit=2)
    assert closed.lengths == {2: 1, 3: 1}
    assert "rows        2 kept, 0 rejected (the first 2 rows; more follow)" in closed.lines()
    (opened,) = inspect_path(tmp_path)
    assert opened.report.rejected == {"missing picture": 3} and "Markov" not in " ".join(opened.lines())


def test_bad_rows_never_stop_it(call: Any, tmp_path: Path) -> None:  # noqa: F811
    """Rows made to stop a reader, in a folder and in a mapping of clips; all that is said of them is printed."""
    long, half = {**seed_line("a", 1), "source_image": "x" * 300}, {**seed_line("b", 1), "source_image": "\ud800"}
    write_seed(tmp_path, [long, half, "[" * 100_000, seed_line("c", 1)])
    (tmp_path / "multi_turn_editing" / "images").mkdir()
    row = {"ytb_id": "\ud800", "duration": {"start_sec": 0, "end_sec": 1},
           "bbox": {"top": 0, "bottom": 1, "left": 0, "right": 1}}  # fmt: skip
    (tmp_path / "celebvhq_info.json").write_text(json.dumps({"clips": {"x" * 300: row, "y": row}}))
    edits, clips = inspect_path(tmp_path)
    assert edits.report.rejected == {"unsafe path": 1, "broken row": 2, "missing picture": 1}
    assert clips.report.rejected == {"unsafe path": 2}
    code, out, err = call("data", "inspect", str(tmp_path))
    assert (code, err) == (0, "") and "0 kept, 4 rejected" in out and "0 kept, 2 rejected" in out


def test_conversations_of_this_project(tmp_path: Path) -> None:
    rounds = (Round("here is a picture", "upload"), Round("add a hat", "edit", 0), Round("undo that", "rollback", 0))
    save_conversations([Conversation("a", "world", rounds)], tmp_path)
    (found,) = inspect_path(tmp_path)
    assert found.markov.share == 0.5


def test_the_command_line(call: Any, tmp_path: Path) -> None:  # noqa: F811
    path = write_zip(tmp_path / "test.zip", magicbrush_test_files())
    code, out, err = call("data", "inspect", str(path))
    assert (code, err) == (0, "")
    assert "kind        MagicBrush test" in out and "1 missing picture" in out
    assert "Markov      0.500: 1 of 2 rounds" in out and "note        for evaluation only" in out
    code, out, err = call("data", "inspect", str(tmp_path / "nothing"))
    assert (code, out, err.count("\n")) == (1, "", 1) and "no such folder" in err
    evil = write_zip(tmp_path / "evil.zip", {"../x": b""})
    assert "leads out of the folder; refused" in raised(lambda: inspect_path(evil), ReadError)
