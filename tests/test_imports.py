"""Chains of real edits given ways back, imported from the layouts they come in, and read again picture by picture."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import (
    magicbrush_rows,
    magicbrush_schema,
    magicbrush_test_files,
    write_imgedit,
    write_parquet,
)
from PIL import Image, ImageOps
from test_archives import write_zip
from test_cli import call  # noqa: F401
from test_full_body import editor, marked
from toy import conversations, open_run, raised

from nmlib import imports, parquet_sets, stored_sets
from nmlib.chains import ChainEditor, Painter, clause, longest_chain, with_rollbacks
from nmlib.config import DataConfig
from nmlib.conversation import Conversation, ConversationError, Round
from nmlib.folder_clips import BOXES
from nmlib.full_body import FullBodyError
from nmlib.imports import HELDOUT, import_set, is_heldout
from nmlib.readers import ReadError
from nmlib.runtime import Run, read_json
from nmlib.storage import load_conversations, load_json, save_conversations
from nmlib.stored_sets import CHUNK, Parts, StoredSet, writing

SIDE = 6
DATA = {
    "chain": {"conversations": 60, "rounds": [2, 3], "rollback_share": 0.0},
    "back": {"conversations": 60, "rounds": [3, 4, 6], "rollback_share": 0.6, "max_depth": 2},
}


def chain(length: int, seed: int = 0) -> Conversation:
    """An upload and edits of it, every picture another one."""
    images = torch.randint(256, (length, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).byte()
    rounds = [Round("here is a picture", "upload")]
    rounds += [Round(f"Make it look {index}.", "edit", index - 1) for index in range(1, length)]
    return Conversation(f"chain-{seed}", "chains", tuple(rounds), images)


def data_settings(**changes: Any) -> DataConfig:
    return DataConfig.model_validate(DATA["back"] | {"rounds": (4, 7)} | changes, strict=False)


# ---------------------------------------------------------------------------------------------------------
# chains


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ("Make the wall blue.", "make the wall blue"),
        ("  Add a\n hat! ", "add a hat"),
        ("USA flag behind her", "USA flag behind her"),
        ("A hat", "a hat"),
    ],
)
def test_an_instruction_becomes_a_part_of_a_sentence(said: str, part: str) -> None:
    assert clause(said) == part


@given(
    length=st.integers(2, 6), share=st.sampled_from([0.3, 0.6, 1.0]), depth=st.integers(1, 3), seed=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_every_picture_is_the_chains(length: int, share: float, depth: int, seed: int) -> None:
    """Going back shows the base again; whatever is edited is edited as the chain edits that very picture."""
    own = chain(length, seed)
    assert own.images is not None
    wanted = data_settings(rollback_share=share, max_depth=depth)
    made = with_rollbacks(own, wanted, random.Random(seed), "train").validate()
    assert made.images is not None and len(made) in wanted.rounds and made.rounds[:2] == own.rounds[:2]
    state = [next(i for i, known in enumerate(own.images) if torch.equal(known, image)) for image in made.images]
    said = {clause(item.instruction): index for index, item in enumerate(own.rounds) if index}
    for index, item in enumerate(made.rounds[1:], start=1):
        assert item.base is not None and made.depth(index) <= depth
        edited = [place for text, place in said.items() if text in clause(item.instruction)]
        is_quote = "before" in item.instruction or "since" in item.instruction
        if state[index] == state[item.base]:
            assert item.kind == "rollback"
        else:
            assert state[index] == state[item.base] + 1
            assert is_quote or edited == [state[index]]


def test_the_end_of_a_chain_is_followed_by_ways_back_alone() -> None:
    """Two pictures and no painter: what can be done from the second is to go back to the first."""
    made = with_rollbacks(chain(2), data_settings(rounds=(7,), rollback_share=0.01), random.Random(1), "train")
    kinds = [item.kind for item in made.rounds]
    assert kinds[:3] == ["upload", "edit", "rollback"] and made.rounds[2].base == 0


class Inverter:
    """A pipeline that turns colours round and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, prompt: str, image: Image.Image, generator: torch.Generator, steps: int) -> Any:
        self.calls.append((prompt, generator.initial_seed(), steps))
        return SimpleNamespace(images=[ImageOps.invert(image)])


def test_a_painter_makes_edits_that_no_chain_has() -> None:
    pipeline = Inverter()
    painter = Painter(pipeline, ["Turn it round."], {"steps": 3})
    own = chain(2)
    made = with_rollbacks(own, data_settings(rounds=(7,), rollback_share=0.3), random.Random(2), "train", painter)
    assert made.images is not None and own.images is not None and pipeline.calls
    assert {(text, steps) for text, _, steps in pipeline.calls} == {("turn it round", 3)}
    assert len({seed for _, seed, _ in pipeline.calls}) == 1, "the same words get the same noise"
    known = list(own.images)
    painted = 0
    for index, item in enumerate(made.rounds[1:], start=1):
        base, image = made.images[item.base or 0], made.images[index]
        if "turn it round" in item.instruction:
            assert torch.equal(image, 255 - base)
            painted += 1
        else:
            assert any(torch.equal(image, other) for other in [*known, *made.images[:index]])
    assert painted == len(pipeline.calls)


def test_a_chain_needs_pictures_and_order() -> None:
    own = chain(4)
    back = Conversation("x", "chains", (*own.rounds, Round("go back", "rollback", 0)), None)
    assert len(longest_chain(back)) == 4
    text = raised(lambda: with_rollbacks(back, data_settings(), random.Random(0), "train"), ConversationError)
    assert text == "conversation 'x': expected a Markov chain of at least two rounds"
    text = raised(lambda: ChainEditor(Conversation("y", "chains", own.rounds)), ConversationError)
    assert text == "conversation 'y': has no pictures; expected one in every round"


# ---------------------------------------------------------------------------------------------------------
# stored sets


def test_what_is_written_one_by_one_is_what_is_written_together(tmp_path: Path) -> None:
    told = [chain(2 + index % 3, index) for index in range(CHUNK + 3)]
    with writing(tmp_path / "a") as add:
        for conversation in told:
            add(conversation)
    save_conversations(told, tmp_path / "b")
    assert json.loads((tmp_path / "a/conversations.json").read_text()) == json.loads(
        (tmp_path / "b/conversations.json").read_text()
    )
    for folder in ("a", "b"):
        stored = StoredSet(tmp_path / folder)
        assert len(stored) == len(told) and stored.dropped == 0
        for found, wanted in zip(stored.take([CHUNK + 1, 0, 4]), [told[CHUNK + 1], told[0], told[4]], strict=True):
            assert found.images is not None and wanted.images is not None
            assert found.rounds == wanted.rounds and torch.equal(found.images, wanted.images)
    assert [c.id for c in load_conversations(tmp_path / "a")] == [c.id for c in told]


def test_batches_of_a_stored_set(tmp_path: Path) -> None:
    """Pure functions of step and seed, of one length, without what was not kept."""
    save_conversations([chain(2 + index % 3, index) for index in range(20)], tmp_path)
    stored = StoredSet(tmp_path, lambda conversation: len(conversation) < 4)
    assert stored.dropped == 6
    lengths = []
    for step in range(12):
        found, again = stored.batch(step, 6, 5), stored.batch(step, 6, 5)
        assert [c.id for c in found] == [c.id for c in again]
        (length,) = {len(c) for c in found}
        assert len(found) == 6 // length
        lengths.append(length)
    assert set(lengths) == {2, 3}
    assert [c.id for c in stored.batch(0, 6, 5)] != [c.id for c in stored.batch(0, 6, 6)]


def test_nothing_half_written_is_taken_for_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyError), writing(tmp_path / "a") as add:
        add(chain(2))
        raise KeyError("stop")
    assert list((tmp_path / "a").iterdir()) == []
    save_conversations([chain(2)], tmp_path / "b")
    save_conversations([chain(3)], tmp_path / "c")
    (tmp_path / "c/rounds.parquet").rename(tmp_path / "b/rounds.parquet")
    text = raised(lambda: StoredSet(tmp_path / "b"), ConversationError)
    assert text.endswith("3 rows, but conversations.json beside it has 2 rounds; build the data set again")
    (tmp_path / "b/rounds.parquet").write_bytes(b"PAR1 and no more")
    assert "damaged or truncated" in raised(lambda: StoredSet(tmp_path / "b"), ConversationError)
    save_conversations([chain(2)], tmp_path / "d")
    text = raised(lambda: StoredSet(tmp_path / "d", lambda conversation: False), ConversationError)
    assert text.endswith("none of its 1 conversations can be used; build it with others")


# ---------------------------------------------------------------------------------------------------------
# imports


def write_sessions(root: Path, count: int = 50) -> Path:
    """MagicBrush with sessions of one to four turns, and a development file."""
    sessions = {str(index): 1 + index % 4 for index in range(count)}
    write_parquet(root, "data/train-00000-of-00001-ab12.parquet", magicbrush_rows(sessions), magicbrush_schema(), 20)
    write_parquet(root, "data/dev-00000-of-00001-ef56.parquet", magicbrush_rows({"dev": 2}), magicbrush_schema())
    return root


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Any]:
    """A run with a chain and a rollback data set from the same folder."""
    folder = tmp_path_factory.mktemp("imported")
    run, root = open_run(folder, data=DATA, stages=[]), write_sessions(folder / "magicbrush")
    return run, [import_set(run, name, [root]) for name in DATA]


def test_import_keeps_chains_and_gives_them_ways_back(imported: tuple[Run, Any]) -> None:
    run, (chains, back) = imported
    for name, found in (("chain", chains), ("back", back)):
        told = load_conversations(run.path("data", name))
        held = load_conversations(run.path("data", name, HELDOUT))
        assert (len(told) + len(held), len(held)) == (found.kept, found.heldout) == (50, found.heldout)
        assert all(is_heldout(c.id) for c in held) and not any(is_heldout(c.id) for c in told) and held
        assert found.rejected == {} and found.short == 0 and found.before.share == 1.0
        assert json.loads((run.path("data", name) / "import.json").read_text())["kept"] == 50
        for conversation in told:
            assert "dev" not in conversation.id and conversation.images is not None
            assert conversation.images.shape[1:] == (3, 16, 16)
    assert chains.after.share == 1.0 and {len(c) for c in load_conversations(run.path("data", "chain"))} == {2, 3}
    assert back.after.share < 0.8 and "Markov      1.000 as it was, 0." in "\n".join(back.lines())
    lengths = Counter(len(c) for c in load_conversations(run.path("data", "back")))
    assert set(lengths) == {3, 4, 6}
    again = import_set(run, "back", [run.folder.parent / "magicbrush"])
    assert again == back, "an import is a function of the settings and the folders"


def test_a_data_set_that_goes_back_by_itself_stays_as_it_is(tmp_path: Path) -> None:
    run = open_run(tmp_path, data=DATA, stages=[])
    found = import_set(run, "back", [write_imgedit(tmp_path / "imgedit")], max_rejected=0.5)
    assert found.rejected == {"base unknown": 1} and found.kept == 1
    (told,) = load_conversations(run.path("data", "back"))
    assert [item.base for item in told.rounds] == [None, 0, 1, 1] and told.rounds[3].kind == "rollback"
    assert found.before == found.after


def test_imports_are_refused_by_name_and_reason(tmp_path: Path) -> None:
    run = open_run(tmp_path, data=DATA, stages=[])
    text = raised(lambda: import_set(run, "other", [tmp_path]), ReadError)
    assert text == "toy: no data set 'other'; `data:` and `people:` define ['back', 'chain']"
    zipped = write_zip(tmp_path / "test.zip", magicbrush_test_files())
    text = raised(lambda: import_set(run, "chain", [zipped]), ReadError)
    assert "its makers ask that nothing is trained on it" in text
    write_parquet(
        tmp_path / "m", "data/dev-00000-of-00001-ef56.parquet", magicbrush_rows({"1": 2}), magicbrush_schema()
    )
    assert "holds only the splits" in raised(lambda: import_set(run, "chain", [tmp_path / "m"]), ReadError)
    save_conversations(conversations(), tmp_path / "own")
    assert "was imported or drawn already" in raised(lambda: import_set(run, "chain", [tmp_path / "own"]), ReadError)
    clips = tmp_path / "celebv"
    clips.mkdir()
    (clips / "celebvhq_info.json").write_text('{"clips": {}}')
    assert "clips of faces; expected chains of edits" in raised(lambda: import_set(run, "chain", [clips]), ReadError)
    assert not (run.folder / "data" / "chain" / "rounds.parquet").exists()


def test_a_failed_import_leaves_the_earlier_data_set(tmp_path: Path) -> None:
    run = open_run(tmp_path, data=DATA, stages=[])
    before = import_set(run, "chain", [write_sessions(tmp_path / "magicbrush", 24)])
    folder = run.path("data", "chain")
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert before.kept == 24 and len(kept) == 5
    held = next(str(number) for number in range(100, 400) if is_heldout(f"magicbrush-{number}"))
    small = tmp_path / "small"
    write_parquet(small, "data/train-00000-of-00001.parquet", magicbrush_rows({held: 2}), magicbrush_schema())
    text = raised(lambda: import_set(run, "chain", [small]), ReadError)
    assert text == f"{small}: 1 conversations, none of them to train on; expected a larger data set"
    assert kept == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "workers", "left"), [("chain", 2, 26), ("back", 0, 38)])
def test_an_interrupted_import_goes_on(
    name: str, workers: int, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two notes: what was noted is not opened again, and the result is that of one go."""
    monkeypatch.setattr(stored_sets, "NOTE_EVERY", 12)
    root = write_sessions(tmp_path / "magicbrush")
    whole, run = open_run(tmp_path / "whole", data=DATA, stages=[]), open_run(tmp_path, data=DATA, stages=[])
    expected = import_set(whole, name, [root])
    seen: list[str] = []

    def stop(id_: str) -> bool:
        seen.append(id_)
        if len(seen) == 30:
            raise KeyboardInterrupt
        return is_heldout(id_)

    with monkeypatch.context() as patch:
        patch.setattr(imports, "is_heldout", stop)
        with pytest.raises(KeyboardInterrupt):
            imports.import_set(run, name, [root], workers=workers)
    folder = run.path("data", name)
    assert not (folder / "rounds.parquet").exists() and (folder / "parts" / "note.json").exists()
    opened: list[str] = []
    assemble = parquet_sets.assemble
    monkeypatch.setattr(parquet_sets, "assemble", lambda id_, *rest: opened.append(id_) or assemble(id_, *rest))
    assert import_set(run, name, [root]) == expected
    assert len(opened) == left
    assert not (folder / "parts").exists()
    for part in ("", HELDOUT):
        told, other = load_conversations(folder / part), load_conversations(whole.path("data", name) / part)
        assert [conversation.id for conversation in told] == [conversation.id for conversation in other]
        for one, two in zip(told, other, strict=True):
            assert one.rounds == two.rounds and one.images is not None and two.images is not None
            assert torch.equal(one.images, two.images)


def test_an_import_of_other_settings_or_files_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, conversation = tmp_path / "set", chain(3)
    with Parts(folder, ("train",), "one") as parts:
        parts.add("train", conversation)
        parts.note({"rows": 1})
    with pytest.raises(KeyError), Parts(folder, ("train",), "one") as parts:
        parts.add("train", chain(2, 1))
        raise KeyError("stop")
    assert Parts(folder, ("train",), "one").source == {"rows": 1}
    assert [told.id for told in Parts(folder, ("train",), "one").told()] == [conversation.id]
    shutil.copytree(folder / "parts", tmp_path / "kept")
    other = Parts(folder, ("train",), "two")
    assert other.is_anew and other.source is None and not (folder / "parts").exists()
    shutil.copytree(tmp_path / "kept", folder / "parts")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stored_sets.shutil, "rmtree", killed)
        Parts(folder, ("train",), "one").drop()
    begun = Parts(folder, ("train",), "one")
    assert begun.source is None and list(begun.told()) == [], "what is half removed is not spoken of"
    run, root = open_run(tmp_path, data=DATA, stages=[]), write_sessions(tmp_path / "magicbrush", 8)
    before = import_key(run, root)
    assert before == import_key(run, root)
    (root / ".DS_Store").touch()
    monkeypatch.chdir(tmp_path)
    assert before == import_key(run, Path("magicbrush"))
    os.utime(next(root.glob("data/train*")), ns=(1, 1))
    assert before != import_key(run, root)


def import_key(run: Run, root: Path) -> str:
    """What an interrupted import of the chains in a folder is known by."""
    return imports._import_key(run, "chain", imports._trainable(root, 16, None), None)


def test_conversations_of_many_files_and_folders_have_names_of_their_own(tmp_path: Path) -> None:
    """Parts of one folder, and the same part in two folders; a row keeps its name whatever else is imported."""
    run = open_run(tmp_path, data=DATA, stages=[])
    root = write_imgedit(tmp_path / "one")
    part = root / "Parquet" / "version_backtracking_part0.parquet"
    shutil.copy(part, part.with_name("version_backtracking_part1.parquet"))
    write_imgedit(tmp_path / "two")
    ids: list[set[str]] = []
    for paths in ([root], [root, tmp_path / "two"]):
        import_set(run, "back", paths, max_rejected=0.5)
        folder = run.path("data", "back")
        told = load_json(folder / "conversations.json")
        assert [conversation.id for conversation in load_conversations(folder)] == [item.id for item in told]
        told += load_json(folder / HELDOUT / "conversations.json")
        ids.append({conversation.id for conversation in told})
        assert len(ids[-1]) == len(told)
    names = ["one/Parquet/version_backtracking_part0", "one/Parquet/version_backtracking_part1"]
    assert ids[0] == {f"imgedit-{name}-0000000" for name in names}
    assert ids[1] == ids[0] | {"imgedit-two/Parquet/version_backtracking_part0-0000000"}
    text = raised(lambda: import_set(run, "back", [root, root], max_rejected=0.5), ReadError)
    assert text == (
        "back: two conversations are named 'imgedit-one/Parquet/version_backtracking_part0-0000000'; expected each "
        "once: give every folder once, and rename one of two folders of the same name"
    )


PEOPLE = {"conversations": 41, "rounds": [2, 3], "pairing": "paired", "people": [1], "recall_share": 1.0,
          "rollback_share": 0.0, "rename_share": 0.0, "reintroduce_share": 0.0, "describe_share": 0.0,
          "face_weight": 1.0}  # fmt: skip


def write_clips(root: Path, people: int = 24, frames: int = 3) -> Path:
    """Folders of frames: every person has a red of their own, and every frame a green."""
    for person in range(people):
        for frame in range(frames):
            path = root / f"person {person}" / f"{frame}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (10 * person, 80 * frame, 7)).save(path)
    return root


def test_clips_become_conversations_by_name(tmp_path: Path) -> None:
    """A recall shows the person of the introduction in another frame; people and names of the splits are apart."""
    run = open_run(tmp_path, data=DATA, people={"named": PEOPLE}, stages=[])
    found = import_set(run, "named", [write_clips(tmp_path / "clips")])
    told, held = (load_conversations(run.path("data", "named", *part)) for part in ((), (HELDOUT,)))
    assert (found.kept, found.heldout, len(told), len(held)) == (41, 3, 38, 3)
    assert len({c.id for c in [*told, *held]}) == 41
    persons, names = [], []
    for part in (told, held):
        assert all(c.rounds[0].kind == "introduce" and c.rounds[-1].kind == "recall" for c in part)
        colours = [c.images[:, :2, 0, 0] for c in part if c.images is not None]
        assert all(len(colour[:, 0].unique()) == 1 for colour in colours), "one person in a conversation"
        assert all(colour[0, 1] != shown for colour in colours for shown in colour[1:, 1]), "another frame"
        persons.append({int(colour[0, 0]) for colour in colours})
        names.append({item.name for c in part for item in c.rounds})
    assert not persons[0] & persons[1] and not names[0] & names[1] and len(persons[0]) > 8
    assert "Markov" not in "\n".join(found.lines())


def test_clips_get_whole_bodies_from_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recalls show what the pipeline made and a judge let pass; a clip in which no face is found is counted."""
    settings = PEOPLE | {"full_body_share": 1.0, "conversations": 23}
    run = open_run(tmp_path, data=DATA, people={"named": settings}, stages=[])
    clips = write_clips(tmp_path / "clips")
    for person in range(0, 24, 3):
        for frame in (clips / f"person {person}").iterdir():  # first pixel: number of faces, height of each
            marked((0, 80 * int(frame.stem), 7), faces=0, side=16).save(frame)
    for person in [number for number in range(24) if number % 3]:
        for frame in (clips / f"person {person}").iterdir():
            marked((200, 10 * int(frame.stem), 0), side=16).save(frame)
    made, pipeline = editor(marked((210, 9, 0)))
    monkeypatch.setattr(imports, "_editors", lambda folder, side: imports.Editors(editor()[0], made))
    found = import_set(run, "named", [clips], pipeline=tmp_path)
    told = [c for part in ((), (HELDOUT,)) for c in load_conversations(run.path("data", "named", *part))]
    bodies = [(c, index) for c in told for index, item in enumerate(c.rounds) if item.named == ("framing",)]
    assert len(bodies) == made.counts["kept"] == len(pipeline.asked) > 0
    assert all(c.images is not None and int(c.images[index, 0].float().median()) == 210 for c, index in bodies)
    noted = read_json(run.path("data", "named", "bodies.json"))
    assert found.rejected == {"pictures without exactly one face, for bodies": len(noted["passed_over"])}
    assert len(noted["passed_over"]) > 0 and found.kept == 23 and noted["counts"] == {"kept": len(bodies)}


MIXED = {"rounds": [7], "people": [2], "recall_share": 0.3, "rollback_share": 0.2, "rename_share": 0.2,
         "full_body_share": 0.0}  # fmt: skip


def import_painted(folder: Path, monkeypatch: pytest.MonkeyPatch, colour: tuple[int, int, int], **changes: Any) -> Any:
    """Conversations of clips whose faces are red, edited by a pipeline that paints a colour; and its editor."""
    run = open_run(folder, data=DATA, people={"named": PEOPLE | MIXED | changes}, stages=[])
    clips = write_clips(folder / "clips")
    for path in clips.rglob("*.png"):
        marked((200, 10 * int(path.stem), 0), side=16).save(path)
    made, _ = editor(marked(colour), max_face_share=1.0)
    monkeypatch.setattr(imports, "_editors", lambda *_: imports.Editors(made, editor()[0]))
    import_set(run, "named", [clips], pipeline=folder)
    told = [c for part in ((), (HELDOUT,)) for c in load_conversations(run.path("data", "named", *part))]
    return [c.validate() for c in told], made, run


def test_clips_get_edits_ways_back_and_new_names_from_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, made, run = import_painted(tmp_path, monkeypatch, (210, 9, 0))
    counts = Counter(item.kind for c in told for item in c.rounds)
    assert min(counts[kind] for kind in ("introduce", "recall", "edit", "rollback")) > 5, counts
    assert all(len(c) == 7 and c.rounds[-1].kind == "recall" for c in told)
    for c in told:
        assert c.images is not None
        for index, item in enumerate(c.rounds):
            pixel = c.images[index, :, 8, 8].tolist()
            if item.kind == "edit":
                assert pixel == [210, 9, 0] and item.face is not None
                says = item.instruction.endswith(made.settings.prompts) or item.name is not None
                assert says, item.instruction
            elif item.kind == "rollback":
                assert item.base is not None
                shown = c.images[item.base, :, 8, 8].tolist()
                assert pixel in (shown, [210, 9, 0])
                assert item.face is not None or pixel == shown
            else:
                assert pixel[0] == 200, "who is asked for is shown as in the clip"
    renamed = [item for c in told for item in c.rounds if item.kind == "edit" and item.name]
    assert renamed and all(item.name in item.instruction for item in renamed)
    noted = read_json(run.path("data", "named", "edits.json"))
    assert noted["counts"] == {"kept": len(noted["pictures"])} and len(noted["pictures"]) >= counts["edit"]
    assert {row["conversation"] for row in noted["pictures"]} <= {c.id for c in told}


def test_an_interrupted_import_of_people_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was painted before the note is not painted again, and is counted all the same."""
    monkeypatch.setattr(stored_sets, "NOTE_EVERY", 10)
    expected, whole, _ = import_painted(tmp_path / "whole", monkeypatch, (210, 9, 0))
    paint, begun = imports.paint_conversation, list[str]()

    def stop(*words: Any, id_: str, **others: Any) -> Conversation:
        begun.append(id_)
        if len(begun) == 25:
            raise KeyboardInterrupt
        return paint(*words, id_=id_, **others)

    with monkeypatch.context() as patch:
        patch.setattr(imports, "paint_conversation", stop)
        with pytest.raises(KeyboardInterrupt):
            import_painted(tmp_path / "cut", patch, (210, 9, 0))
    begun.clear()
    monkeypatch.setattr(
        imports, "paint_conversation", lambda *a, id_, **k: begun.append(id_) or paint(*a, id_=id_, **k)
    )
    told, made, run = import_painted(tmp_path / "cut", monkeypatch, (210, 9, 0))
    assert begun == [f"named-{number:06d}" for number in range(20, 41)]
    assert [c.rounds for c in told] == [c.rounds for c in expected] and made.state() == whole.state()
    assert not run.path("data", "named", "parts").exists()


def test_edits_in_which_the_person_is_lost_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody is asked for instead, or shown again."""
    told, made, _ = import_painted(tmp_path / "blue", monkeypatch, (0, 0, 220))
    kinds = Counter(item.kind for c in told for item in c.rounds)
    assert set(kinds) == {"introduce", "recall", "rollback"} and set(made.counts) == {"identity lost"}
    assert all(c.images is not None and int(c.images[:, 0, 8, 8].min()) == 200 for c in told)


def test_of_a_masked_face_nothing_is_painted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = {f"{frame}.png": [0.2, 0.2, 0.9, 0.9] for frame in range(3)}
    for person in range(24):
        folder = tmp_path / "clips" / f"person {person}"
        folder.mkdir(parents=True)
        (folder / BOXES).write_text(json.dumps(boxes))
    told, _, _ = import_painted(tmp_path, monkeypatch, (210, 9, 0), pairing="masked")
    starts = {c.rounds[item.base].kind for c in told for item in c.rounds if item.kind in ("edit", "rollback")}
    assert starts and "introduce" not in starts


def test_clips_are_refused_with_a_reason(tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips", 2)
    run = open_run(tmp_path, data=DATA, people={"named": PEOPLE, "weighed": PEOPLE | {"face_weight": 2.0}}, stages=[])
    text = raised(lambda: import_set(run, "named", [clips, clips]), ReadError)
    assert text == "named: 2 folders of clips; expected one, so that no person is in it twice"
    text = raised(lambda: import_set(run, "weighed", [clips]), ReadError)
    assert text.endswith(
        "no faces.json, but weighed.face_weight is 2; make the clips with `python -m nmlib data clips`, "
        "or set face_weight to 1"
    )
    text = raised(lambda: import_set(run, "named", [clips], pipeline=tmp_path), FullBodyError)
    assert text == f"{tmp_path}: no pipeline here (no model_index.json); give a folder that diffusers saved"
    assert "expected 1 or more" in raised(lambda: import_set(run, "named", [clips]), ConversationError)


def test_the_command_imports_and_says_what_it_made(call: Any, project_root: Path, tmp_path: Path) -> None:  # noqa: F811
    """In the project of the command line's tests, whose params file has a data set `rollback`."""
    sessions = write_sessions(tmp_path / "magicbrush")
    code, out, err = call("data", "import", str(sessions), "--params", "tiny", "--name", "rollback")
    assert code == 0, err
    assert out.startswith("kept ") and "rows rejected: none" in out and "Markov      1.000 as it was" in out
    assert (project_root / "runs" / "tiny" / "data" / "rollback" / "rounds.parquet").is_file()
    code, _, err = call("data", "import", str(sessions), "--params", "tiny", "--name", "other")
    assert code == 1 and "no data set 'other'" in err.splitlines()[-1]
    words = ("--stage", "rollback", "--name", "rollback", "--weights", str(tmp_path))
    code, _, err = call("evaluate", "--params", "tiny", *words)
    assert code == 1 and "conversations.json" not in err.splitlines()[-1] and "not trained" in err.splitlines()[-1]
