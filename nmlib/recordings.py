"""What the explorers show: plain, validated data, filled from sessions and from rollouts.

The front end reads the same JSON in a live notebook and in the static book:

    ExplorerState      title, nodes, current, suggestions
      ExplorerNode     id, parent, base, instruction, reply, image, attention, alternatives
    DriftConversation  title, instructions (R), truth (R pictures), policies {name: R frames}
      DriftFrame       image, psnr (dB), identity (cosine, or null where there is no embedder)
    IdentityState      stages, cases
      IdentityStage    name, label, kind ("stage" or "ablation"), identity, compliance (means over all people)
      IdentityCase     title, prompt, reference, results {stage name: IdentityResult}
      IdentityResult   image, identity (cosine with the reference), compliance (share or CLIP score)

Pictures are small WebP or PNG files as data URIs. `parent` is the node before on its branch, where undo leads;
`base` is the node that the model says it started from. `attention` has one number for each earlier picture of the
branch, first picture first; `alternatives` maps the name of another model or history policy to its picture.
"""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

import pandas as pd
import torch
from PIL import Image
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from nmlib import metrics
from nmlib.cache import Node
from nmlib.chat import POLICIES, ChatSession, Policy, System, history_policy, rollout
from nmlib.conversation import Conversation, Round, to_picture
from nmlib.identity import FaceEmbedder
from nmlib.layout import BOI, Template
from nmlib.settings import Fraction, Settings

PictureUri = Annotated[str, Field(pattern=r"^data:image/(webp|png);base64,[A-Za-z0-9+/]+=*$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Model = TypeVar("Model", bound=Settings)
Rivals = Mapping[str, tuple[System, Policy]]
QUALITY = 90  # of WebP files, in percent


class ExplorerError(ValueError):
    """Data that an explorer cannot show; the message says where, what was seen and what was expected."""


class ExplorerNode(Settings):
    """One picture of a session, with what was said, where it came from and what others made of the request."""

    id: int
    parent: int | None
    base: int | None
    instruction: str
    reply: str
    image: PictureUri
    attention: tuple[Fraction, ...] = ()
    alternatives: dict[str, PictureUri] = Field(default_factory=dict)


class ExplorerState(Settings):
    """The tree of a session, its current node, and sentences to choose from."""

    title: str
    nodes: tuple[ExplorerNode, ...]
    current: int | None
    suggestions: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        paths: list[list[int]] = []
        for place, node in enumerate(self.nodes):
            if node.id != place:
                raise ValueError(f"node {place} has id {node.id}; expected ids 0, 1, 2, ... in order")
            if node.parent is not None and not 0 <= node.parent < place:
                raise ValueError(f"node {place} has parent {node.parent}; expected an earlier node or null")
            before = [] if node.parent is None else [*paths[node.parent], node.parent]
            if node.base is not None and node.base not in before:
                raise ValueError(f"node {place} has base {node.base}; expected null or one of its branch, {before}")
            if node.attention and len(node.attention) != len(before):
                raise ValueError(f"node {place} has {len(node.attention)} numbers of attention; expected {len(before)}")
            paths.append(before)
        there = range(len(self.nodes))
        if self.current not in there and (self.current is not None or self.nodes):
            raise ValueError(f"current is {self.current}; expected a node, 0 to {len(self.nodes) - 1}")
        return self


class DriftFrame(Settings):
    """A picture with its PSNR (dB) and similarity of identity (cosine) to the true one."""

    image: PictureUri
    psnr: Finite
    identity: Finite | None = None


class DriftConversation(Settings):
    """One conversation under several history policies, round by round."""

    title: str
    instructions: tuple[str, ...]
    truth: tuple[PictureUri, ...]
    policies: dict[str, tuple[DriftFrame, ...]]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        rounds = len(self.instructions)
        counts = {"truth": len(self.truth)} | {name: len(frames) for name, frames in self.policies.items()}
        for name, count in counts.items():
            if count != rounds or not rounds:
                raise ValueError(f"{name} has {count} pictures for {rounds} instructions; expected one each")
        return self


class IdentityStage(Settings):
    """A stage of training or an ablation, with its means over all people."""

    name: str
    label: str
    kind: Literal["stage", "ablation"]
    identity: Finite
    compliance: Finite


class IdentityResult(Settings):
    """What one stage made of one person and prompt."""

    image: PictureUri
    identity: Finite
    compliance: Finite


class IdentityCase(Settings):
    """A held-out person, a prompt, and the picture of every stage."""

    title: str
    prompt: str
    reference: PictureUri
    results: dict[str, IdentityResult]


class IdentityState(Settings):
    """All stages, and the people and prompts to look at."""

    stages: tuple[IdentityStage, ...]
    cases: tuple[IdentityCase, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [stage.name for stage in self.stages]
        if not names or not self.cases or len(set(names)) != len(names):
            raise ValueError(f"stages are {names} with {len(self.cases)} cases; expected distinct names and a case")
        for case in self.cases:
            if set(case.results) != set(names):
                raise ValueError(f"case {case.title!r} has results of {sorted(case.results)}; expected {sorted(names)}")
        return self


def read(model: type[Model], raw: Any, where: str) -> Model:
    """Check plain values, as read from JSON, against a schema of this module.

    Args:
        model: for example `IdentityState`.
        raw: mappings, lists, texts and numbers.
        where: name for the message, for example the file.

    Raises:
        ExplorerError: one line with the place, the value and what was expected.
    """
    try:
        return model.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"]) or "(whole)"
        seen = "" if isinstance(fault["input"], dict | list) else f", found {str(fault['input'])[:60]!r}"
        raise ExplorerError(f"{where}: {key}: {fault['msg'].removeprefix('Value error, ')}{seen}") from None


def data_uri(picture: Tensor | Image.Image) -> str:
    """A picture, PIL or a tensor (3, H, W), as a small WebP file in a data URI."""
    shown = to_picture(picture) if isinstance(picture, Tensor) else picture.convert("RGB")
    buffer = io.BytesIO()
    shown.save(buffer, format="WEBP", quality=QUALITY, method=6)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---------------------------------------------------------------------------------------------------------
# sessions


class _SpokenTemplate(Template):
    """The template of a conversation that took place: its replies are those that the model gave."""

    def __init__(self, template: Template, replies: Sequence[str]) -> None:
        super().__init__(template.tokenizer, template.tokens_per_image, template.response)
        self._replies = replies

    def reply(self, conversation: Conversation, index: int) -> list[int]:
        return self.encode(f"{self._replies[index]} {BOI}")


def _told(path: Sequence[Node]) -> Conversation:
    """The branch of a session as a conversation."""
    places = {node.id: place for place, node in enumerate(path)}
    rounds = tuple(
        Round(node.instruction, node.kind, None if node.base is None else places[node.base])  # type: ignore[arg-type]
        for node in path
    )
    return Conversation("session", "chat", rounds)


@torch.no_grad()
def attention_shares(session: ChatSession, id_: int) -> tuple[float, ...]:
    """How much the query tokens of a picture attend to each earlier picture of its branch.

    Args:
        session: holds the node.
        id_: of the node.

    Returns:
        For each earlier picture the part of the queries' attention that falls on its tokens, the mean over queries,
        heads and layers. The rest falls on words and on the queries themselves. Empty for an upload.
    """
    system, path = session.system, session.tokens.path(id_)
    last = len(path) - 1
    if last == 0:
        return ()
    spoken = _SpokenTemplate(system.template, [node.response for node in path])
    layout = spoken.prefix([_told(path)], [last])
    history = torch.stack([session.tokens.tokens(node.id) for node in path[:-1]])  # (C, N, D_feature)
    attentions = system.model.predict(layout, history, output_attentions=True).attentions
    assert attentions is not None
    seen = torch.stack(list(attentions)).mean(dim=(0, 2))[0].cpu()  # (T, T)
    queries = seen[layout.query_slots[0]].mean(0)  # (T,)
    pictures = layout.history_slots[0]  # (T,)
    shares = [float(queries[pictures & (layout.rounds[0] == earlier)].sum()) for earlier in range(last)]
    return tuple(round(min(share, 1.0), 4) for share in shares)


@torch.no_grad()
def rival_picture(session: ChatSession, id_: int, system: System, policy: Policy) -> Image.Image:
    """What another model, or the same under another history policy, makes of a branch of a session.

    It is told the same sentences from the start and reads its own pictures, as it would in use.

    Args:
        session: holds the node.
        id_: the branch leads to this node.
        system: answers.
        policy: what it remembers of its pictures.
    """
    path = session.tokens.path(id_)
    first = session.tokens.tokens(path[0].id)
    features = first.new_zeros(1, len(path), *first.shape)  # (1, R, N, D_feature)
    features[0, 0] = first
    told = rollout(system.model, system.template, [_told(path)], features, history_policy(system, policy))
    return to_picture(system.decode(told.predictions[:, -1], seed=path[-1].seed)[0])


class SessionRecorder:
    """Follows a session and tells an explorer what there is to see.

    Args:
        session: the session; may be empty, and may go on.
        title: name of the conversation.
        rivals: name -> (system, policy) that answer the same requests for comparison.
        suggestions: sentences to choose from.
    """

    def __init__(
        self, session: ChatSession, title: str, rivals: Rivals | None = None, suggestions: Sequence[str] = ()
    ) -> None:
        self.session, self.title, self.rivals = session, title, dict(rivals or {})
        self.suggestions = tuple(suggestions)
        self._nodes: list[ExplorerNode] = []

    @property
    def steps(self) -> int:
        """Steps of a request for a picture: the model's answer, and what `state` reports of it."""
        return 3 + len(self.rivals)

    def state(self, report: Callable[[str], None] = lambda what: None) -> ExplorerState:
        """The session as it is now, new pictures recorded; `report` is told each step of that before it is taken."""
        cache = self.session.tokens
        self._nodes += [self._record(node, report) for node in cache.nodes[len(self._nodes) :]]
        return ExplorerState(
            title=self.title, nodes=tuple(self._nodes), current=cache.current, suggestions=self.suggestions
        )

    def _record(self, node: Node, report: Callable[[str], None]) -> ExplorerNode:
        made = node.kind != "upload"
        report("The picture is drawn")
        image = data_uri(self.session.picture(node.id))
        report("The layers say where they look")
        attention = attention_shares(self.session, node.id) if made else ()
        alternatives = {}
        for name, (system, policy) in self.rivals.items() if made else ():
            report(f"For comparison: {name}")
            alternatives[name] = data_uri(rival_picture(self.session, node.id, system, policy))
        return ExplorerNode(
            id=node.id,
            parent=node.parent,
            base=node.base,
            instruction=node.instruction,
            reply=node.response,
            image=image,
            attention=attention,
            alternatives=alternatives,
        )


def record_session(
    session: ChatSession, title: str, rivals: Rivals | None = None, suggestions: Sequence[str] = ()
) -> ExplorerState:
    """A finished session for the explorer; arguments as of `SessionRecorder`."""
    return SessionRecorder(session, title, rivals, suggestions).state()


# ---------------------------------------------------------------------------------------------------------
# drift


def record_policies(
    system: System, conversations: Sequence[Conversation], embedder: FaceEmbedder | None = None
) -> tuple[DriftConversation, ...]:
    """What every history policy makes of conversations whose true pictures are known.

    Args:
        system: the model and what it needs.
        conversations: of equal length, with pictures.
        embedder: for the similarity of identity; None leaves it out.
    """
    truths = torch.stack([c.images for c in conversations if c.images is not None])  # (B, R, 3, H, W)
    features = torch.stack([system.encode(images) for images in truths])  # (B, R, N, D_feature)
    frames: list[dict[str, tuple[DriftFrame, ...]]] = [{} for _ in conversations]
    for policy in POLICIES:
        history = history_policy(system, policy)
        made = rollout(system.model, system.template, conversations, features, history, policy == "tokens")
        for place, predicted in enumerate(made.predictions):
            frames[place][policy] = _frames(system.decode(predicted), truths[place].float() / 255, embedder)
    return tuple(
        DriftConversation(
            title=f"Conversation {number}",
            instructions=tuple(item.instruction for item in conversation.rounds),
            truth=tuple(data_uri(image) for image in truth),
            policies=by_policy,
        )
        for number, (conversation, truth, by_policy) in enumerate(zip(conversations, truths, frames, strict=True), 1)
    )


def _frames(pictures: Tensor, truth: Tensor, embedder: FaceEmbedder | None) -> tuple[DriftFrame, ...]:
    quality = metrics.psnr(pictures, truth).tolist()
    alike = [None] * len(truth) if embedder is None else (embedder(pictures) * embedder(truth)).sum(1).tolist()
    return tuple(
        DriftFrame(image=data_uri(picture), psnr=round(psnr, 2), identity=None if same is None else round(same, 3))
        for picture, psnr, same in zip(pictures, quality, alike, strict=True)
    )


def record_people(
    table: pd.DataFrame, told: Sequence[Conversation], pictures: Mapping[str, Sequence[Tensor]], base: Sequence[str]
) -> IdentityState:
    """What every stage made of the last requests of some conversations, for the identity explorer.

    Args:
        table: rows of `people_experiments.personal_table`.
        told: conversations of the table, with their pictures.
        pictures: stage -> its answers to them, (3, H, W) each.
        base: names of the stages of the curriculum; all others are ablations.
    """
    means = table.groupby("stage")[["identity", "compliance"]].mean()
    stages = tuple(
        IdentityStage(
            name=name,
            label=name,
            kind="stage" if name in base else "ablation",
            identity=float(means.loc[name, "identity"]),
            compliance=float(means.loc[name, "compliance"]),
        )
        for name in pictures
    )
    first = table[table["seed"] == 0].set_index(["stage", "conversation"])
    cases = []
    for row, conversation in enumerate(told):
        asked = conversation.rounds[-1]
        assert conversation.images is not None and asked.base is not None
        results = {}
        for name, shown in pictures.items():
            scores = first.loc[(name, conversation.id)]
            results[name] = IdentityResult(
                image=data_uri(shown[row]), identity=scores["identity"], compliance=scores["compliance"]
            )
        title, reference = str(asked.name), data_uri(conversation.images[asked.base])
        cases.append(IdentityCase(title=title, prompt=asked.instruction, reference=reference, results=results))
    return IdentityState(stages=stages, cases=tuple(cases))
