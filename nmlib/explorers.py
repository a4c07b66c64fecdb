"""Explorers: demos that a reader clicks, live in a notebook and alive in the static book.

Each explorer is an `anywidget` whose view is one ES module (`front/shared.js` and the explorer's own file). Its
notebook output also holds `text/html`, in which the same module runs without a kernel on the recorded data; the
book keeps only that (`book.polish`). What the data looks like is said in `recordings`.

A live `ConversationExplorer` is told what to do by custom messages:

    {"type": "say", "text": ...}                  {"type": "branch", "id": ..., "text": ...}
    {"type": "undo"}    {"type": "go_to", "id": ...}    {"type": "choose", "index": ...}

and answers by its traits `data`, `chosen`, `busy`, `progress` (what it is at, and how many steps are done of how many)
and `message` (an error in words, or empty).
"""

import hashlib
import html
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import traitlets

from nmlib.cache import CacheError
from nmlib.conversation import ConversationError
from nmlib.recordings import DriftConversation, ExplorerError, ExplorerState, IdentityState, SessionRecorder

FRONT = Path(__file__).parent / "front"
ANSWER = "The model answers"
_HTML = "text/html"
_numbers = itertools.count()


def _front(*names: str) -> str:
    return "\n".join((FRONT / name).read_text(encoding="utf-8") for name in names)


def _embedded(value: Any) -> str:
    """JSON that may stand inside a `<script>` element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


class Explorer(anywidget.AnyWidget):
    """A widget with a static version of itself.

    Args:
        data: what is shown, plain values.
    """

    _css = _front("explorers.css")
    data = traitlets.Dict().tag(sync=True)

    def shown(self) -> dict[str, Any]:
        """The values that the static version starts from."""
        return {"data": self.data}

    def html(self) -> str:
        """The static version: a `<div>`, the values as JSON, and the module, which asks no other host."""
        values = _embedded(self.shown())
        digest = hashlib.blake2b(values.encode(), digest_size=4).hexdigest()
        id_ = f"nmlib-{digest}-{next(_numbers)}"  # two explorers on one page stay apart
        return (
            f'<div class="nmlib-demo" id="{id_}"><noscript>This demo needs JavaScript.</noscript></div>\n'
            f"<style>{self._css}</style>\n"
            f'<script type="application/json" id="{id_}-values">{values}</script>\n'
            f'<script type="application/json" id="{id_}-module">{_embedded(str(self._esm))}</script>\n'
            f'<script type="module">{_front("mount.js").replace("NMLIB_ID", id_)}</script>'
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        live = super()._repr_mimebundle_(**kwargs)
        data, metadata = live if isinstance(live, tuple) else (live or {}, {})
        return {**data, _HTML: self.html()}, metadata


class ConversationExplorer(Explorer):
    """The tree of a conversation: look at a state, undo, go to, branch.

    Args:
        conversations: recorded states, or recorders of sessions that go on living.

    Raises:
        ExplorerError: no conversations, or recorded and living ones together.
    """

    _esm = _front("shared.js", "conversation.js")
    chosen = traitlets.Int(0).tag(sync=True)
    live = traitlets.Bool(False).tag(sync=True)
    busy = traitlets.Bool(False).tag(sync=True)
    progress = traitlets.Dict().tag(sync=True)
    message = traitlets.Unicode("").tag(sync=True)

    def __init__(self, conversations: Sequence[ExplorerState | SessionRecorder]) -> None:
        self._recorders = [item for item in conversations if isinstance(item, SessionRecorder)]
        if not conversations or len(self._recorders) not in (0, len(conversations)):
            raise ExplorerError(
                f"{len(conversations)} conversations, {len(self._recorders)} of them alive; expected at least one, "
                "and all recorded or all alive"
            )
        self._states = [item.state() if isinstance(item, SessionRecorder) else item for item in conversations]
        super().__init__(data=self._data(), live=bool(self._recorders))
        self.on_msg(self._hear)

    def _data(self) -> dict[str, Any]:
        return {"conversations": [state.model_dump(mode="json") for state in self._states]}

    def shown(self) -> dict[str, Any]:
        """The values of the static version, in which nothing claims to have a kernel."""
        return {"data": self.data, "chosen": self.chosen, "live": False, "busy": False, "progress": {}, "message": ""}

    def _hear(self, _: object, content: Mapping[str, Any], buffers: object) -> None:
        """Do what a message of the front end asks, and show errors where they happen."""
        self.message, self.progress, self.busy = "", {}, True
        try:
            self._obey(content)
        except (ConversationError, CacheError, ExplorerError) as error:
            self.message = str(error)
        except Exception as error:
            self.message = f"unexpected {type(error).__name__}: {error}; the log of the notebook says more"
            raise
        finally:
            if self._recorders:
                self._states[self.chosen] = self._recorders[self.chosen].state(self._report)
                self.data = self._data()
            self.busy, self.progress = False, {}

    def _report(self, what: str) -> None:
        """Say what a request for a picture is at; the answer of the model is the first of its steps."""
        steps = self._recorders[self.chosen].steps
        self.progress = {"what": what, "done": min(self.progress.get("done", -1) + 1, steps - 1), "steps": steps}

    def _obey(self, content: Mapping[str, Any]) -> None:
        if not self._recorders:
            raise ExplorerError("this conversation is recorded; there is no session to talk to")
        session = self._recorders[self.chosen].session
        match content:
            case {"type": "say", "text": str(text)}:
                self._report(ANSWER)
                session.say(text)
            case {"type": "branch", "id": int(id_), "text": str(text)}:
                self._report(ANSWER)
                session.branch(id_, text)
            case {"type": "undo"}:
                session.undo()
            case {"type": "go_to", "id": int(id_)}:
                session.go_to(id_)
            case {"type": "choose", "index": int(index)} if 0 <= index < len(self._recorders):
                self.chosen = index
            case _:
                raise ExplorerError(f"message {dict(content)!r} is not understood; expected one of this module's")


class DriftExplorer(Explorer):
    """Long conversations under several history policies, round by round.

    Args:
        conversations: as `recordings.record_policies` makes them.

    Raises:
        ExplorerError: there are none.
    """

    _esm = _front("shared.js", "drift.js")

    def __init__(self, conversations: Sequence[DriftConversation]) -> None:
        if not conversations:
            raise ExplorerError("0 conversations; expected at least one")
        super().__init__(data={"conversations": [item.model_dump(mode="json") for item in conversations]})


class IdentityExplorer(Explorer):
    """Held-out people under every stage of training: identity against compliance.

    Args:
        state: stages and cases.
    """

    _esm = _front("shared.js", "identity.js")

    def __init__(self, state: IdentityState) -> None:
        super().__init__(data=state.model_dump(mode="json"))


class Controls(ipywidgets.VBox):
    """Plain `ipywidgets` for settings; on a static page a table of the values instead.

    Args:
        settings: name -> widget.
    """

    def __init__(self, settings: Mapping[str, ipywidgets.Widget]) -> None:
        self._settings = dict(settings)
        super().__init__(list(self._settings.values()))

    @property
    def values(self) -> dict[str, Any]:
        """What is set now."""
        return {name: widget.value for name, widget in self._settings.items()}

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in self.values.items()
        )
        return {**super()._repr_mimebundle_(**kwargs), _HTML: f'<table class="dataframe"><tbody>{rows}</tbody></table>'}


def controls(**settings: Sequence[str] | range) -> Controls:
    """A dropdown for each list of names, a slider for each range; the first value is the default.

    Args:
        settings: for example `stage=("rollback", "markov"), seed=range(10)`.

    Raises:
        ExplorerError: a setting without values.
    """
    made: dict[str, ipywidgets.Widget] = {}
    for name, values in settings.items():
        if not len(values):
            raise ExplorerError(f"setting {name!r} has no values; expected at least one")
        if isinstance(values, range):
            made[name] = ipywidgets.IntSlider(values[0], min(values), max(values), abs(values.step), description=name)
        else:
            made[name] = ipywidgets.Dropdown(options=list(values), value=values[0], description=name)
    return Controls(made)
