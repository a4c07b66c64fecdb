"""Explorers: the data they show, what they refuse, the messages they obey, and the static version they carry."""

import base64
import io
import json
import re
from dataclasses import replace
from typing import Any

import nbformat
import pytest
import torch
from PIL import Image
from toy import SOURCE, TOKENS, conversations, draw, raised, random_tree, system

from nmlib import book, metrics, recordings
from nmlib.chat import POLICIES, ChatSession
from nmlib.conversation import Conversation, to_picture
from nmlib.explorers import FRONT, Controls, ConversationExplorer, DriftExplorer, IdentityExplorer, controls
from nmlib.mllm import HistoryMLLM, Output
from nmlib.recordings import (
    DriftConversation,
    ExplorerError,
    ExplorerState,
    IdentityState,
    SessionRecorder,
    attention_shares,
    data_uri,
    record_policies,
    record_session,
    rival_picture,
)

SYSTEM = system()
VIEW = "application/vnd.jupyter.widget-view+json"
PIXEL = data_uri(torch.zeros(3, 5, 5))
MOST_BYTES = 25_000


def session(*sentences: str) -> ChatSession:
    talk = ChatSession(SYSTEM)
    images = draw(conversations()[0]).images
    assert images is not None
    talk.upload(images[0], "here is a picture")
    for sentence in sentences:
        talk.say(sentence)
    return talk


def branched() -> ChatSession:
    talk = session("make the square red", "paint the ground dark")
    talk.branch(0, "make the edge white")
    return talk


def state(**changes: Any) -> dict[str, Any]:
    """A valid state as plain values: 0 - 1 - 2 and 0 - 3."""
    parents, bases = (None, 0, 1, 0), (None, 0, 0, None)
    nodes = [
        {"id": place, "parent": parent, "base": base, "instruction": f"say {place}", "reply": "", "image": PIXEL}
        for place, (parent, base) in enumerate(zip(parents, bases, strict=True))
    ]
    nodes[2] |= {"attention": [0.25, 0.5], "alternatives": {"other": PIXEL}}
    return {"title": "toy", "nodes": nodes, "current": 3} | changes


def identity_state(**changes: Any) -> dict[str, Any]:
    names = ("base", "stage1", "joint")
    result = {"image": PIXEL, "identity": 0.5, "compliance": 0.25}
    stages = [
        {"name": name, "label": name.title(), "kind": "ablation" if name == "joint" else "stage",
         "identity": 0.1 * place, "compliance": 0.9 - 0.1 * place}
        for place, name in enumerate(names)
    ]  # fmt: skip
    case = {"title": "Person 1", "prompt": "in a hat", "reference": PIXEL, "results": dict.fromkeys(names, result)}
    return {"stages": stages, "cases": [case]} | changes


# ---------------------------------------------------------------------------------------------------------
# the schema


def test_a_state_survives_json() -> None:
    read = recordings.read(ExplorerState, state(), "toy.json")
    assert read.nodes[2].attention == (0.25, 0.5) and read.nodes[3].base is None
    assert recordings.read(ExplorerState, json.loads(read.model_dump_json()), "again") == read
    identity = recordings.read(IdentityState, identity_state(), "toy.json")
    assert [stage.kind for stage in identity.stages] == ["stage", "stage", "ablation"]


@pytest.mark.parametrize(
    ("place", "change", "text"),
    [
        (1, {"id": 4}, "node 1 has id 4; expected ids 0, 1, 2, ... in order"),
        (1, {"parent": 1}, "node 1 has parent 1; expected an earlier node or null"),
        (3, {"base": 2}, "node 3 has base 2; expected null or one of its branch, [0]"),
        (2, {"attention": [0.5]}, "node 2 has 1 numbers of attention; expected 2"),
        (2, {"attention": [0.5, 1.5]}, "Input should be less than or equal to 1, found '1.5'"),
        (0, {"image": "https://example.org/a.png"}, "String should match pattern"),
        (0, {"colour": 1}, "nodes.0.colour: Extra inputs are not permitted, found '1'"),
    ],
)
def test_states_that_contradict_themselves(place: int, change: dict[str, Any], text: str) -> None:
    raw = state()
    raw["nodes"][place] |= change
    seen = raised(lambda: recordings.read(ExplorerState, raw, "toy.json"), ExplorerError)
    assert seen.startswith("toy.json: ") and text in seen


def test_the_current_node_exists() -> None:
    for current in (4, None):
        seen = raised(lambda c=current: recordings.read(ExplorerState, state(current=c), "x"), ExplorerError)  # type: ignore[misc]
        assert seen == f"x: (whole): current is {current}; expected a node, 0 to 3"
    assert recordings.read(ExplorerState, state(nodes=[], current=None), "x").nodes == ()


def test_drift_and_identity_must_be_complete() -> None:
    frame = {"image": PIXEL, "psnr": 20.0}
    raw = {"title": "a", "instructions": ["one", "two"], "truth": [PIXEL] * 2, "policies": {"tokens": [frame]}}
    text = raised(lambda: recordings.read(DriftConversation, raw, "d"), ExplorerError)
    assert text == "d: (whole): tokens has 1 pictures for 2 instructions; expected one each"
    raw = identity_state()
    del raw["cases"][0]["results"]["joint"]
    text = raised(lambda: recordings.read(IdentityState, raw, "i"), ExplorerError)
    assert "case 'Person 1' has results of ['base', 'stage1']; expected ['base', 'joint', 'stage1']" in text
    assert "with 0 cases" in raised(
        lambda: recordings.read(IdentityState, identity_state(cases=[]), "i"), ExplorerError
    )


def test_pictures_are_small_and_true() -> None:
    picture = draw(conversations()[0]).images[1]  # type: ignore[index]
    uri = data_uri(picture)
    assert data_uri(to_picture(picture)) == uri
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as opened:
        assert (opened.format, opened.size) == ("WEBP", (SOURCE.image_size, SOURCE.image_size))
        shown = torch.tensor(list(opened.convert("RGB").get_flattened_data())).float()
    assert (shown - picture.flatten(1).T.float()).abs().mean() < 12


# ---------------------------------------------------------------------------------------------------------
# recording


def test_attention_is_that_of_the_pass_which_made_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    talk, made = branched(), []
    real = HistoryMLLM.predict

    def noted(self: HistoryMLLM, *args: Any, **kwargs: Any) -> Output:
        made.append(real(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(HistoryMLLM, "predict", noted)
    for id_ in (1, 2, 3):
        shares = attention_shares(talk, id_)
        assert len(shares) == len(talk.tokens.path(id_)) - 1
        assert all(share > 0 for share in shares) and sum(shares) < 1
        torch.testing.assert_close(made[-1].images[0], talk.tokens.tokens(id_), rtol=1e-4, atol=1e-4)
    assert attention_shares(talk, 0) == ()


def test_attention_that_is_equal_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = session("make the square red", "paint the ground dark")

    def equal(self: HistoryMLLM, layout: Any, history: Any, output_attentions: bool) -> Output:
        length = layout.input_ids.shape[1]
        same = torch.full((1, 3, length, length), 1 / length)
        lengths.append(length)
        return Output(history, history, history, [same, same])

    lengths: list[int] = []
    monkeypatch.setattr(HistoryMLLM, "predict", equal)
    shares = attention_shares(talk, 2)
    assert shares == pytest.approx((TOKENS / lengths[0],) * 2, abs=1e-4)


def test_rivals_answer_from_the_start() -> None:
    talk = branched()
    for id_ in (2, 3):
        same = torch.tensor(list(rival_picture(talk, id_, SYSTEM, "tokens").get_flattened_data()))
        own = torch.tensor(list(talk.picture(id_).get_flattened_data()))
        assert (same - own).abs().max() <= 1
    other = rival_picture(talk, 2, SYSTEM, "reencode")
    assert other.tobytes() != talk.picture(2).tobytes()


def test_a_session_is_recorded_once_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = branched()
    rivals = {"through pixels": (SYSTEM, "reencode")}
    recorder = SessionRecorder(talk, "toy", rivals, ["undo that"])  # type: ignore[arg-type]
    first = recorder.state()
    assert [node.parent for node in first.nodes] == [None, 0, 1, 0]
    assert [len(node.attention) for node in first.nodes] == [0, 1, 2, 1]
    assert first.nodes[0].alternatives == {} and list(first.nodes[3].alternatives) == ["through pixels"]
    assert (first.current, first.suggestions) == (3, ("undo that",))
    assert first.nodes[1].image == data_uri(talk.picture(1))
    assert record_session(talk, "toy", rivals, ["undo that"]) == first  # type: ignore[arg-type]
    monkeypatch.setattr(recordings, "rival_picture", lambda session, id_, *_: asked.append(id_) or talk.picture(0))
    asked: list[int] = []
    talk.go_to(1)
    assert recorder.state() == first.model_copy(update={"current": 1})
    talk.say("undo that")
    told: list[str] = []
    assert recorder.state(told.append).nodes[:4] == first.nodes and asked == [4]
    assert told == ["The picture is drawn", "The layers say where they look", "For comparison: through pixels"]
    assert recorder.steps == 1 + len(told)


def test_drift_is_what_the_measures_say() -> None:
    told = [draw(tree) for tree in plain_chains()]
    made = record_policies(SYSTEM, told)
    assert [item.title for item in made] == ["Conversation 1", "Conversation 2"]
    for talk, item in zip(told, made, strict=True):
        assert talk.images is not None
        assert tuple(item.policies) == POLICIES
        assert item.truth[2] == data_uri(talk.images[2])
        first = SYSTEM.decode(SYSTEM.encode(talk.images[:1]))
        quality = float(metrics.psnr(first, talk.images[:1].float() / 255)[0])
        for frames in item.policies.values():
            assert frames[0].image == data_uri(first[0]) and frames[0].identity is None
            assert frames[0].psnr == pytest.approx(quality, abs=0.006)
        assert item.policies["tokens"][2].psnr == pytest.approx(item.policies["prefix"][2].psnr, abs=0.02)
        assert item.policies["reencode"][2] != item.policies["tokens"][2]
    alike = record_policies(SYSTEM, told[:1], lambda images: torch.ones(len(images), 1))  # type: ignore[arg-type]
    assert {frame.identity for frame in alike[0].policies["oracle"]} == {1.0}


def plain_chains() -> list[Conversation]:
    """Two conversations of three rounds; their states need not follow their words."""
    made = []
    for seed in (1, 2):
        tree = random_tree(seed, 3)
        values = [(seed, place % 2, 1) for place in range(3)]
        rounds = tuple(
            replace(item, values=value, subject=(0.25, -0.5)) for item, value in zip(tree.rounds, values, strict=True)
        )
        made.append(Conversation(tree.id, tree.source, rounds))
    return made


# ---------------------------------------------------------------------------------------------------------
# messages


def tell(widget: ConversationExplorer, **content: Any) -> None:
    """Hand a message of the front end to a widget, as the notebook does."""
    widget.comm.handle_msg({"content": {"data": {"method": "custom", "content": content}}, "buffers": []})


def test_a_live_session_obeys() -> None:
    talk = session()
    widget = ConversationExplorer([SessionRecorder(talk, "one"), SessionRecorder(session(), "two")])
    busy: list[bool] = []
    told: list[tuple[str, int, int]] = []
    widget.observe(lambda change: busy.append(change["new"]), "busy")
    widget.observe(lambda change: told.append(tuple(change["new"].values())), "progress")
    shown = lambda: widget.data["conversations"][widget.chosen]  # noqa: E731
    tell(widget, type="say", text="Make the square red!")
    assert busy == [True, False]
    steps = ["The model answers", "The picture is drawn", "The layers say where they look"]
    assert told == [*((what, done, 3) for done, what in enumerate(steps)), ()]
    assert shown()["current"] == 1 and shown()["nodes"][1]["instruction"] == "make the square red"
    tell(widget, type="say", text="undo that")
    tell(widget, type="undo")
    assert shown()["current"] == 1 and len(shown()["nodes"]) == 3
    tell(widget, type="go_to", id=2)
    assert shown()["current"] == talk.current.id == 2
    tell(widget, type="branch", id=0, text="paint the ground dark")
    assert shown()["current"] == 3 and shown()["nodes"][3]["parent"] == 0
    tell(widget, type="choose", index=1)
    assert widget.chosen == 1 and len(shown()["nodes"]) == 1
    tell(widget, type="say", text="make the edge white")
    assert [len(item["nodes"]) for item in widget.data["conversations"]] == [4, 2]
    assert widget.message == ""


def test_errors_are_shown_and_pass() -> None:
    talk = session()
    widget = ConversationExplorer([SessionRecorder(talk, "one")])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"type": "say", "text": " "}, "instruction ' ' has no words; say what to change"),
        ({"type": "undo"}, "nothing to undo: this is the first picture of the session"),
        ({"type": "go_to", "id": 7}, "no picture 7 in this session; it has 0 to 0"),
        ({"type": "choose", "index": 3}, "is not understood"),
        ({"type": "go_to", "id": "0"}, "is not understood"),
        ({"kind": "say"}, "is not understood"),
    ]
    for content, text in cases:
        tell(widget, **content)
        assert text in widget.message and not widget.busy
        assert len(talk.tokens) == 1
    tell(widget, type="say", text="undo that")
    assert widget.message == "" and len(talk.tokens) == 2


def test_a_fault_of_the_model_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = session()
    widget = ConversationExplorer([SessionRecorder(talk, "one")])
    monkeypatch.setattr(talk, "say", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        widget._hear(widget, {"type": "say", "text": "x"}, [])
    assert widget.message.startswith("unexpected ZeroDivisionError: ") and not widget.busy


def test_recorded_conversations_have_nobody_to_talk_to() -> None:
    recorded = recordings.read(ExplorerState, state(), "toy")
    widget = ConversationExplorer([recorded])
    before = dict(widget.data)
    tell(widget, type="undo")
    assert "is recorded" in widget.message and widget.data == before
    text = raised(lambda: ConversationExplorer([recorded, SessionRecorder(session(), "a")]), ExplorerError)
    assert text == "2 conversations, 1 of them alive; expected at least one, and all recorded or all alive"
    for empty in (lambda: ConversationExplorer([]), lambda: DriftExplorer([])):
        assert raised(empty, ExplorerError).startswith("0 conversations")


# ---------------------------------------------------------------------------------------------------------
# the static version


def test_static_version_claims_no_kernel_and_escapes() -> None:
    talk = session()
    widget = ConversationExplorer([SessionRecorder(talk, "</script><b>", suggestions=["a < b"])])
    widget.busy, widget.message = True, "left over"
    text = widget.html()
    values = json.loads(re.search(r'-values">(.*?)</script>', text, re.S).group(1))  # type: ignore[union-attr]
    assert values == {"data": widget.data, "chosen": 0, "live": False, "busy": False, "progress": {}, "message": ""}
    assert values["data"]["conversations"][0]["title"] == "</script><b>"
    assert text.count("</script>") == 3 and "\\u003c/script>" in text
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg\\"]


def test_two_explorers_have_two_names() -> None:
    identity = IdentityExplorer(recordings.read(IdentityState, identity_state(), "x"))
    names = {re.search(r'id="([^"]+)"', identity.html()).group(1) for _ in range(2)}  # type: ignore[union-attr]
    assert len(names) == 2


def test_the_book_keeps_the_static_version_only() -> None:
    widget = ConversationExplorer([recordings.read(ExplorerState, state(), "toy")])
    for shown in (widget, controls(seed=range(3))):
        bundle = shown._repr_mimebundle_()
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        assert {VIEW, "text/html"} <= set(data)
        output = nbformat.v4.new_output("display_data", data=data)
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell("x", outputs=[output])], metadata={"widgets": {"state": {}}}
        )
        book.polish(notebook)
        assert VIEW not in notebook.cells[0].outputs[0].data and "widgets" not in notebook.metadata


def test_the_front_end_is_small() -> None:
    for file in FRONT.iterdir():
        assert file.stat().st_size < MOST_BYTES, file.name


# ---------------------------------------------------------------------------------------------------------
# controls


def test_controls_start_from_the_first_value() -> None:
    made = controls(stage=("rollback", "markov"), seed=range(4, 10, 2))
    assert isinstance(made, Controls) and made.values == {"stage": "rollback", "seed": 4}
    made.children[0].value, made.children[1].value = "markov", 8
    assert made.values == {"stage": "markov", "seed": 8}
    assert "<tr><th>stage</th><td>markov</td></tr>" in made._repr_mimebundle_()["text/html"]
    assert (
        raised(lambda: controls(seed=range(0)), ExplorerError) == "setting 'seed' has no values; expected at least one"
    )
