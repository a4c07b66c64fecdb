"""The explorers in a real Chromium: clicked on a static page, and talking to Python, with no other host in reach."""

from pathlib import Path
from typing import Any

import chromium
import pytest
from chromium import Site
from playwright.sync_api import expect
from test_explorers import branched, identity_state, plain_chains, session
from toy import SOURCE, draw, system

from nmlib import recordings
from nmlib.explorers import ConversationExplorer, DriftExplorer, Explorer, IdentityExplorer
from nmlib.recordings import IdentityState, SessionRecorder, data_uri, record_policies, record_session

HEAD = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>test</title><link rel="icon" href="data:,">'
    '<meta name="viewport" content="width=device-width"></head><body>'
)
pytestmark = chromium.needs_chromium


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("site")
    write(made / "all.html", *explorers())
    return made


def write(path: Path, *shown: Explorer) -> None:
    path.write_text(HEAD + "\n<hr>\n".join(explorer.html() for explorer in shown), encoding="utf-8")


def explorers() -> list[Explorer]:
    """Two conversation explorers, a drift and an identity explorer."""
    rivals = {"through pixels": (system(), "reencode")}
    states = [record_session(branched(), "first", rivals), record_session(session("undo that"), "second")]  # type: ignore[arg-type]
    pictures = [data_uri(SOURCE.render(*state)[0]) for state in squares()]
    raw = identity_state()
    more = {"kind": "ablation", "identity": 0.3, "compliance": 0.4}
    raw["stages"] += [more | {"name": f"extra{place}", "label": f"extra_long_name_{place}"} for place in range(18)]
    names = [stage["name"] for stage in raw["stages"]]
    raw["cases"] = []
    for number, (person, prompt) in enumerate(
        (("Person 1", "in a hat"), ("Person 2", "in a hat"), ("Person 2", "old"))
    ):
        results = {
            name: {"image": pictures[place % 3], "identity": 0.1 * place + 0.05 * number, "compliance": 0.5}
            for place, name in enumerate(names)
        }
        raw["cases"].append({"title": person, "prompt": prompt, "reference": pictures[3], "results": results})
    return [
        ConversationExplorer(states),
        ConversationExplorer(states[1:]),
        DriftExplorer(record_policies(system(), [draw(tree) for tree in plain_chains()])),
        IdentityExplorer(recordings.read(IdentityState, raw, "test")),
    ]


def squares() -> list[tuple[Any, Any]]:
    import torch

    return [(torch.tensor([[0.0, 0.1 * place]]), torch.tensor([[place % 3, 1, 0]])) for place in range(4)]


def current(explorer: Any) -> str:
    """The picture that a conversation explorer marks as the current one."""
    return str(explorer.locator(".nm-tree [aria-current=true]").inner_text())


def large(explorer: Any) -> str:
    return str(explorer.locator(".nm-large img").get_attribute("src"))


# ---------------------------------------------------------------------------------------------------------
# the static page


def test_a_recorded_conversation_is_clicked_through(site: Site) -> None:
    page = site.open("all.html")
    first, second = page.locator(".nm-conversation").all()
    expect(first.locator(".nm-badge")).to_have_text("recorded")
    expect(first.locator(".nm-tree button")).to_have_text(["#1", "#2", "#3", "#2b"])
    assert current(first) == "#2b" and page.locator(".nm-conversation input[type=text]:visible").count() == 0
    last, other = large(first), large(second)
    first.get_by_role("button", name="Undo", exact=True).click()
    assert current(first) == "#1" and large(first) != last
    expect(first.get_by_role("status")).to_contain_text("Undone. The current picture is #1 again")
    first.get_by_role("button", name="Undo", exact=True).click()
    expect(first.get_by_role("status")).to_contain_text("nothing to undo")
    choices = first.get_by_label("What was said to #1")
    assert choices.locator("option").all_inner_texts() == ["make the square red", "make the edge white"]
    first.get_by_role("button", name="Say it to the current picture").click()
    assert current(first) == "#2"
    expect(first.locator(".nm-transcript li")).to_have_count(2)
    first.get_by_role("button", name="Picture #1").click()
    assert current(first) == "#2", "a look moves nothing"
    choices.select_option("make the edge white")
    first.get_by_role("button", name="Branch from #1").click()
    assert current(first) == "#2b" and large(first) == last
    first.get_by_role("button", name="Picture #3:").click()
    expect(first.locator(".nm-attention li")).to_have_count(2)
    expect(first.locator(".nm-others figcaption")).to_have_text("through pixels")
    first.get_by_role("button", name="Go to").click()
    assert current(first) == "#3"
    first.get_by_role("button", name="Say it to the current picture").click()
    expect(first.get_by_role("status")).to_contain_text("Nothing that was said to this picture is recorded")
    first.get_by_role("combobox", name="Conversation").select_option("second")
    expect(first.locator(".nm-tree button")).to_have_text(["#1", "#2"])
    assert large(second) == other and current(second) == "#2", "the other explorer stayed as it was"


def test_keyboard_alone_is_enough(site: Site) -> None:
    page = site.open("all.html")
    explorer = page.locator(".nm-conversation").first
    explorer.get_by_role("combobox", name="Conversation").focus()
    page.keyboard.press("Tab")  # past the scrolling list of bars
    for _ in range(12):
        if page.evaluate("document.activeElement.dataset.key") == "state-1":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.dataset.key") == "state-1", "focus stays where it was"
    style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert style == "solid"
    expect(explorer.get_by_role("button", name="Picture #2:")).to_have_attribute("aria-pressed", "true")


def test_drift_by_slider_difference_and_play(site: Site) -> None:
    page = site.open("all.html")
    drift = page.locator(".nm-drift")
    slider, pixels = drift.get_by_role("slider"), drift.locator("[data-policy=reencode] img").first
    expect(drift.locator(".nm-pictures figure")).to_have_count(5)
    expect(slider).to_have_value("2")
    before = pixels.get_attribute("src")
    slider.press("ArrowLeft")
    expect(drift.locator(".nm-status")).to_contain_text("Round 1")
    assert pixels.get_attribute("src") != before
    expect(drift.locator(".nm-chart")).to_have_count(1)  # no embedder, so no curve of identity
    expect(drift.locator(".nm-chart path")).to_have_count(4)
    drift.get_by_label("differences to the truth").check()
    expect(drift.locator(".nm-apart")).to_have_count(4)
    drift.get_by_role("button", name="Play").click()
    expect(drift.get_by_role("button", name="Pause")).to_be_visible()
    expect(drift.get_by_role("button", name="Play")).to_be_visible()  # it ends by itself
    expect(slider).to_have_value("2")
    drift.get_by_role("combobox", name="Conversation").select_option("Conversation 2")
    assert pixels.get_attribute("src") != before


def test_identity_by_stage_point_person_and_prompt(site: Site) -> None:
    page = site.open("all.html")
    identity = page.locator(".nm-identity")
    shown = identity.locator("figure[data-stage]")
    expect(shown).to_have_attribute("data-stage", "stage1")
    first = shown.locator("img").get_attribute("src")
    identity.locator("[data-key=stage-joint]").click()
    expect(shown).to_have_attribute("data-stage", "joint")
    assert shown.locator("img").get_attribute("src") != first
    expect(identity.locator("[data-key=point-joint]")).to_have_attribute("aria-pressed", "true")
    identity.locator("[data-key=point-base]").click()
    expect(shown).to_have_attribute("data-stage", "base")
    expect(shown).to_contain_text("identity 0.00, compliance 0.50")
    identity.get_by_label("Person").select_option("Person 2")
    expect(shown).to_contain_text("identity 0.05")
    assert identity.get_by_label("Prompt").locator("option").all_inner_texts() == ["in a hat", "old"]
    identity.get_by_label("Prompt").select_option("old")
    expect(shown).to_contain_text("identity 0.10")


def test_many_stages_are_one_stop_of_the_keyboard(site: Site) -> None:
    page = site.open("all.html")
    identity = page.locator(".nm-identity")
    shown, focus = identity.locator("figure[data-stage]"), "document.activeElement.dataset.key"
    identity.locator("[data-key=stage-stage1]").focus()
    page.keyboard.press("ArrowRight")
    expect(shown).to_have_attribute("data-stage", "joint")
    assert page.evaluate(focus) == "stage-joint"
    page.keyboard.press("End")
    expect(shown).to_have_attribute("data-stage", "extra17")
    page.keyboard.press("ArrowDown")
    expect(shown).to_have_attribute("data-stage", "base")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(focus) == "point-base", "the points of the plot are one stop too"
    page.keyboard.press("ArrowRight")
    expect(shown).to_have_attribute("data-stage", "stage1")


def test_every_other_control_answers_to_the_keyboard(site: Site) -> None:
    """Choices, buttons that act, play, the switch of differences: what the tests above do with the pointer."""
    page = site.open("all.html")
    talk, drift = page.locator(".nm-conversation").first, page.locator(".nm-drift")
    identity = page.locator(".nm-identity")
    talk.get_by_role("button", name="Undo", exact=True).press("Space")
    assert current(talk) == "#1"
    talk.get_by_label("What was said to #1").press("ArrowDown")
    talk.get_by_role("button", name="Say it to the current picture").press("Enter")
    assert current(talk) == "#2b"
    talk.get_by_role("button", name="Picture #3:").press("Enter")
    talk.get_by_role("button", name="Go to").press("Enter")
    assert current(talk) == "#3"
    talk.get_by_role("combobox", name="Conversation").press("ArrowDown")
    expect(talk.locator(".nm-tree button")).to_have_text(["#1", "#2"])
    drift.get_by_label("differences to the truth").press("Space")
    expect(drift.locator(".nm-apart")).to_have_count(4)
    drift.get_by_role("slider").press("Home")
    drift.get_by_role("button", name="Play").press("Enter")
    expect(drift.get_by_role("button", name="Pause")).to_be_visible()
    expect(drift.get_by_role("button", name="Play")).to_be_visible()
    expect(drift.get_by_role("slider")).to_have_value("2")
    before = drift.locator("[data-policy=reencode] img").first.get_attribute("src")
    drift.get_by_role("combobox", name="Conversation").press("ArrowDown")
    expect(drift.locator("[data-policy=reencode] img").first).not_to_have_attribute("src", str(before))
    for label, chosen in (("Person", "Person 2"), ("Prompt", "old")):
        choice = identity.get_by_label(label)
        choice.press("ArrowDown")
        assert choice.locator("option:checked").inner_text() == chosen


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_fits_a_phone_in_both_themes_and_every_picture_is_described(site: Site, theme: str) -> None:
    page = site.open("all.html", width=360, theme=theme)
    expect(page.locator(".nm-tree img").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    paper = page.locator(".nm-drift").evaluate("node => getComputedStyle(node).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[theme]
    page.evaluate("document.documentElement.dataset.theme = 'dark'")  # the book's own switch wins
    assert page.locator(".nm-drift").evaluate("node => getComputedStyle(node).backgroundColor") == "rgb(20, 24, 29)"
    unnamed = "node => !node.textContent.trim() && !node.getAttribute('aria-label')"
    assert not [one for one in page.get_by_role("button").all() if one.evaluate(unnamed)]
    assert page.locator("img:not([alt])").count() == 0


# ---------------------------------------------------------------------------------------------------------
# with a kernel


TRAITS = ("data", "chosen", "live", "busy", "progress", "message")
LIVE = """
<div id="live"></div><script type="module">
const values = await kernel(null), handlers = {};
const model = { get: (name) => values[name], on: (name, call) => (handlers[name] ||= []).push(call), off: () => {},
  send: async (message) => {
    for (const change of await kernel(message)) {
      values[change.name] = change.value;
      for (const call of handlers["change:" + change.name] || []) call();
    }
  } };
const { default: explorer } = await import("./live.js");
explorer.render({ model, el: document.getElementById("live") });
</script>"""


def test_a_request_says_what_it_is_at(site: Site, folder: Path) -> None:
    widget = ConversationExplorer([SessionRecorder(session(), "first")])
    widget.busy, widget.progress = True, {"what": "The picture is drawn", "done": 1, "steps": 3}
    (folder / "live.js").write_text(str(widget._esm), encoding="utf-8")
    (folder / "busy.html").write_text(f"{HEAD}<style>{widget._css}</style>{LIVE}", encoding="utf-8")
    page = site.page()
    page.expose_function("kernel", lambda message: {name: getattr(widget, name) for name in TRAITS})
    page.goto(f"{site.address}/busy.html")
    live = page.locator(".nm-conversation")
    expect(live.get_by_role("status")).to_have_text("The picture is drawn (step 2 of 3) …")
    expect(live).to_have_attribute("aria-busy", "true")
    meter = live.get_by_role("progressbar", name="Steps of this request")
    expect(meter).to_be_visible()
    assert meter.evaluate("node => [node.value, node.max]") == [1, 3]


def test_a_live_session_is_talked_to(site: Site, folder: Path) -> None:
    """The same module with a real session behind it: only the wire of the notebook is missing."""
    recorders = [SessionRecorder(session(), "first", suggestions=["undo that"]), SessionRecorder(session(), "second")]
    widget = ConversationExplorer(recorders)
    changes: list[dict[str, Any]] = []
    widget.observe(lambda change: changes.append({"name": change["name"], "value": change["new"]}), TRAITS)

    def kernel(message: Any) -> Any:
        if message is None:
            return {name: getattr(widget, name) for name in TRAITS}
        changes.clear()
        widget.comm.handle_msg({"content": {"data": {"method": "custom", "content": message}}, "buffers": []})
        return list(changes)

    (folder / "live.js").write_text(str(widget._esm), encoding="utf-8")
    (folder / "live.html").write_text(f"{HEAD}<style>{widget._css}</style>{LIVE}", encoding="utf-8")
    page = site.page()
    page.expose_function("kernel", kernel)
    page.goto(f"{site.address}/live.html")
    chromium.talk(page.locator(".nm-conversation"))
    assert [len(recorder.session.tokens) for recorder in recorders] == [5, 1]
