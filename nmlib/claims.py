"""What the paper claims, and what was found: a verdict for each claim that follows from records alone.

A claim is judged by the run that the book shows if that is one of the sizes made for it, otherwise by a published run
of one of these.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nmlib.config import Params
from nmlib.records import Record
from nmlib.runtime import RunError

Records = Mapping[str, Record]
REPRODUCED, TREND, NOT_REPRODUCED, NOT_TESTED = "reproduced", "trend only", "not reproduced", "not tested"
NOT_MEASURED = "not measured at this size"
NOBODY = 0.2  # similarity of faces below which the paper speaks of a generic face
EDITS_WELL = 0.8  # least share of single edits that are right before a failure to go back counts as a shortcut


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Args:
        text: the claim in our words.
        where: section or experiment of the paper.
        ids: records it is judged by, in the order in which they are shown; none for a claim that is not tested.
        judge: records -> verdict.
        note: what the verdict does and does not say.
        sizes: params files made for it, the first published one of which judges it in the books of others.
        about: block of the params file that it needs, for example `people`.
    """

    text: str
    where: str
    ids: tuple[str, ...]
    judge: Callable[[Records], str]
    note: str
    sizes: tuple[str, ...] = ("cpu", "gpu", "photos")
    about: str | None = None


def above(higher: Record, lower: Record) -> str:
    """Reproduced if the intervals are apart, a trend if only the means are."""
    if _low(higher) > _high(lower):
        return REPRODUCED
    return TREND if higher.value > lower.value else NOT_REPRODUCED


def gains(difference: Record) -> str:
    """Reproduced if the interval of a difference lies above zero, a trend if only its mean does."""
    if _low(difference) > 0:
        return REPRODUCED
    return TREND if difference.value > 0 else NOT_REPRODUCED


def collapsed(base: Record, floor: Record, ceiling: Record) -> str:
    """Reproduced below the paper's bound, a trend if faces are nearer to a stranger's than to the true answer."""
    if _high(base) < NOBODY:
        return REPRODUCED
    return TREND if base.value < (floor.value + ceiling.value) / 2 else NOT_REPRODUCED


def comparable(now: Record, before: Record) -> str:
    """Reproduced unless the interval lies below the earlier one."""
    return REPRODUCED if _high(now) >= _low(before) else NOT_REPRODUCED


def _low(record: Record) -> float:
    return record.value if record.low is None else record.low


def _high(record: Record) -> float:
    return record.value if record.high is None else record.high


def _shortcut(found: Records) -> str:
    """A model that edits well and yet is no better than a policy without history; a bad model has no shortcut."""
    trained, ceiling = (found[f"rollback.accuracy.depth1.{end}"] for end in ("markov_trained", "ceiling"))
    edits = found["edit.accuracy.markov_trained"].value >= EDITS_WELL
    return REPRODUCED if edits and _low(trained) <= _high(ceiling) else NOT_REPRODUCED


def _farther(found: Records) -> str:
    """The worst of the verdicts at depth 3: above a policy without history, above chains, above a guess."""
    accuracy, retrieval = "rollback.accuracy.depth3", "rollback.retrieval.depth3"
    trained = found[f"{accuracy}.rollback_trained"]
    verdicts = [above(trained, found[f"{accuracy}.{end}"]) for end in ("ceiling", "markov_trained")]
    verdicts.append(above(found[f"{retrieval}.rollback_trained"], found[f"{retrieval}.chance"]))
    return max(verdicts, key=(REPRODUCED, TREND, NOT_REPRODUCED).index)


def _unrecognisable(found: Records) -> str:
    """Reproduced if the interval ends below what the paper calls nobody's face."""
    return REPRODUCED if _high(found["drift.identity.round5.reencode"]) < NOBODY else NOT_REPRODUCED


def _untested(_: Records) -> str:
    return NOT_TESTED


CLAIMS = (
    Claim(
        "A model trained on editing chains alone edits the last picture whatever is asked (Markov shortcut).",
        "experiment 4",
        ("rollback.accuracy.depth1.markov_trained", "rollback.accuracy.depth1.ceiling", "edit.accuracy.markov_trained"),
        _shortcut,
        "The ceiling is the best that any policy without history can do, by enumeration; it is a shortcut only if "
        f"single edits are good, at least {EDITS_WELL} of them right.",
    ),
    Claim(
        "Rollback data and history teach the model to go back.",
        "data 1",
        ("rollback.accuracy.depth1.rollback_trained", "rollback.accuracy.depth1.markov_trained"),
        lambda found: above(*(found[f"rollback.accuracy.depth1.{end}_trained"] for end in ("rollback", "markov"))),
        "Depth 1, on the model's own history.",
    ),
    Claim(
        "Trained on rollbacks of two rounds, it generalises to three.",
        "experiment 2",
        ("rollback.accuracy.depth3.rollback_trained", "rollback.accuracy.depth2.rollback_trained",
         "rollback.accuracy.depth3.markov_trained", "rollback.accuracy.depth3.ceiling",
         "rollback.retrieval.depth3.rollback_trained", "rollback.retrieval.depth3.chance"),
        _farther,
        "It has to be better than a policy without history, than the same model trained on chains, and than a guess of "
        "the picture; compare with depth 2.",
    ),
    Claim(
        "Keeping the predicted tokens preserves identity over many rounds; encoding pictures again does not.",
        "experiment 1",
        ("drift.identity_gain.round10", "drift.identity.round10.tokens", "drift.identity.round10.reencode"),
        lambda found: gains(found["drift.identity_gain.round10"]),
        "Similarity to the exact picture of round 10; the gain is that of each conversation.",
    ),
    Claim(
        "Without kept tokens a face is unrecognisable after three rounds or more.",
        "failure signatures",
        ("drift.identity.round5.reencode", "drift.identity.round10.reencode"),
        _unrecognisable,
        f"Judged at round 5 by the paper's own bound for a generic face, {NOBODY}; faces fade here, and more slowly.",
        ("cpu", "gpu"),
    ),
    Claim(
        "Keeping tokens gains less, the better the detokenizer is.",
        "break conditions",
        ("breaks.caching.accuracy.step40", "breaks.caching.accuracy.trained"),
        lambda found: above(*(found[f"breaks.caching.accuracy.{step}"] for step in ("step40", "trained"))),
        "Full states read from the tokens, after few steps of the detokenizer's training and at its end.",
        ("cpu",),
        "breaks",
    ),
    Claim(
        "Rollback data help only a model that is large enough.",
        "break conditions",
        ("breaks.size.named.size192x4.benefit", "breaks.size.named.size48x1.benefit"),
        lambda found: above(*(found[f"breaks.size.named.size{size}.benefit"] for size in ("192x4", "48x1"))),
        "Measured on replies alone, without pictures.",
        ("cpu",),
        "breaks",
    ),
    Claim(
        "Rollback data help less, the longer the history is.",
        "break conditions",
        ("breaks.rounds.retrieval.rounds6.benefit", "breaks.rounds.retrieval.rounds16.benefit"),
        lambda found: above(*(found[f"breaks.rounds.retrieval.rounds{rounds}.benefit"] for rounds in (6, 16))),
        "The same distance back in six rounds and in sixteen, which are longer than any conversation in training.",
        ("cpu",),
        "breaks",
    ),
    Claim(
        "The curriculum raises the similarity of faces far above the base (in the paper from 0.114 to 0.597).",
        "experiment 3",
        ("people.identity.stage123", "people.identity.portrait", "people.identity.base", "people.identity.ceiling"),
        lambda found: above(found["people.identity.stage123"], found["people.identity.base"]),
        "Another embedder and another world: only the order can be compared, not the numbers. The rise comes with "
        "`portrait`, practice in other views before the first stage; the three stages add nothing to it.",
        ("people",),
        "people",
    ),
    Claim(
        "It does so at a comparable prompt compliance.",
        "experiment 3",
        ("people.clip.stage123", "people.clip.base"),
        lambda found: comparable(found["people.clip.stage123"], found["people.clip.base"]),
        "CLIP score of a small CLIP trained on this world; not below the base's interval counts as comparable.",
        ("people",),
        "people",
    ),
    Claim(
        "Without it identity collapses: a face, but nobody's in particular (similarity below 0.2).",
        "failure signatures",
        ("people.identity.base", "people.identity.floor", "people.identity.ceiling"),
        lambda found: collapsed(*(found[f"people.identity.{name}"] for name in ("base", "floor", "ceiling"))),
        "A trend where the face is nearer to a stranger's than to the true answer, but above the paper's bound.",
        ("people",),
        "people",
    ),
    Claim(
        "Stages one after another are better than one training on everything.",
        "curriculum",
        ("people.identity.stage123", "people.identity.joint", "people.compliance.stage123", "people.compliance.joint"),
        lambda found: above(found["people.identity.stage123"], found["people.identity.joint"]),
        "As many steps for both; judged by identity alone, compliance is shown beside it.",
        ("people",),
        "people",
    ),
    Claim(
        "A DiT trained for reconstruction reaches 14.7 dB on photographs of people.",
        "detokenizer",
        (),
        _untested,
        "No photographs of people were at hand; the detokenizer here is measured on its own world.",
    ),
    Claim("People prefer the results in a study.", "human study", (), _untested, "No people were asked."),
)  # fmt: skip


def page(found: Records, params: Params, published: Mapping[str, Records]) -> str:
    """The table of claims. Verdicts are withheld where results mean nothing and no published ones are there.

    Args:
        found: records of the run.
        params: its settings.
        published: records of published runs, by the name of their params file.

    Raises:
        RunError: a record that a claim is bound to is missing.
    """
    rows = ["| claim | where | verdict | measured |", "|---|---|---|---|"]
    for claim in CLAIMS:
        others = [name for name in claim.sizes if name in published] if params.name not in claim.sizes else []
        verdict, measured = _published(claim, others[0], published) if others else _judged(claim, found, params)
        rows.append(f"| {claim.text} | {claim.where} | {verdict} | {measured} |")
    return "\n".join(rows)


def _published(claim: Claim, name: str, published: Mapping[str, Records]) -> tuple[str, str]:
    """The verdict of a published run, and the numbers that it follows from; a claim without records has neither."""
    verdict, measured = _verdict(claim, published[name], f"publish it from a run of `{name}`")
    return verdict, f"Published run of `params/{name}.yaml`: {measured}" if claim.ids else measured


def _judged(claim: Claim, found: Records, params: Params) -> tuple[str, str]:
    """The verdict of the run itself."""
    if claim.about is not None and not getattr(params, claim.about):
        return NOT_TESTED, f"This run has no `{claim.about}`."
    if claim.ids and not params.meaningful:
        names = ", ".join(f"`{id_}`" for id_ in claim.ids)
        return NOT_MEASURED, f"`params/{params.name}.yaml` is too small to judge {names}. {claim.note}"
    return _verdict(claim, found, "run the notebook that measures it")


def _verdict(claim: Claim, found: Records, cure: str) -> tuple[str, str]:
    missing = [id_ for id_ in claim.ids if id_ not in found]
    if missing:
        raise RunError(f"claims: record {missing[0]!r} is missing; {cure}")
    numbers = "; ".join(f"`{id_}` {_number(found[id_])}" for id_ in claim.ids)
    return f"**{claim.judge(found)}**", f"{numbers}. {claim.note}" if numbers else claim.note


def _number(record: Record) -> str:
    span = "" if record.low is None else f" ({record.low:.2f} to {record.high:.2f})"
    return f"{record.value:.2f}{span}"
