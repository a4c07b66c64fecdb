"""The page of claims follows its records: a changed record changes the verdict, a missing one fails the build."""

import pytest
from conftest import SMOKE

from nmlib import claims, config
from nmlib.records import Record
from nmlib.runtime import RunError

PARAMS = config.load(SMOKE).model_copy(update={"meaningful": True, "name": "mine"})


def record(id_: str, value: float, spread: float = 0.05) -> Record:
    return Record(
        id=id_, value=value, low=value - spread, high=value + spread, n=7, command="run", modules=(), params_hash="a",
        library_hash="b", machine="c",
    )  # fmt: skip


def everything() -> dict[str, Record]:
    return {id_: record(id_, 0.5) for claim in claims.CLAIMS for id_ in claim.ids}


def verdicts(page: str) -> list[str]:
    return [row.split("|")[3].strip().strip("*") for row in page.splitlines()[2:]]


def test_a_changed_record_changes_its_verdict() -> None:
    found = everything()
    id_ = "drift.identity_gain.round10"
    place = [id_ in claim.ids for claim in claims.CLAIMS].index(True)
    for value, verdict in ((0.06, "reproduced"), (0.04, "trend only"), (-0.01, "not reproduced")):
        page = claims.page(found | {id_: record(id_, value)}, PARAMS, {})
        assert verdicts(page)[place] == verdict and f"`{id_}` {value:.2f}" in page


@pytest.mark.parametrize(
    ("edits", "trained", "verdict"),
    [(0.9, 0.1, "reproduced"), (0.8, 0.1, "reproduced"), (0.79, 0.1, "not reproduced"), (0.9, 0.7, "not reproduced")],
)
def test_a_bad_model_has_no_shortcut(edits: float, trained: float, verdict: str) -> None:
    found = everything()
    changed = {"edit.accuracy.markov_trained": edits, "rollback.accuracy.depth1.markov_trained": trained}
    found |= {id_: record(id_, value) for id_, value in changed.items()}
    assert verdicts(claims.page(found, PARAMS, {}))[0] == verdict


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "reproduced"),
        ({"accuracy.depth3.markov_trained": 0.55}, "trend only"),
        ({"accuracy.depth3.markov_trained": 0.7}, "not reproduced"),
        ({"retrieval.depth3.rollback_trained": 0.2}, "not reproduced"),
        ({"accuracy.depth3.ceiling": 0.59}, "trend only"),
    ],
)
def test_going_farther_is_more_than_beating_no_history(changed: dict[str, float], verdict: str) -> None:
    start = {
        "accuracy.depth3.rollback_trained": 0.6, "accuracy.depth3.markov_trained": 0.2, "accuracy.depth3.ceiling": 0.1,
        "retrieval.depth3.rollback_trained": 0.7, "retrieval.depth3.chance": 0.25,
    }  # fmt: skip
    given = {f"rollback.{id_}": value for id_, value in (start | changed).items()}
    found = everything() | {id_: record(id_, value) for id_, value in given.items()}
    assert verdicts(claims.page(found, PARAMS, {}))[2] == verdict


def test_params_that_mean_nothing_get_no_verdict() -> None:
    page = claims.page(everything(), PARAMS.model_copy(update={"meaningful": False}), {})
    assert set(verdicts(page)) == {"not measured at this size", "not tested"}
    assert "0.50" not in page and "`params/mine.yaml` is too small to judge `rollback.accuracy.depth1" in page


@pytest.mark.parametrize("id_", sorted(everything()))
def test_a_missing_record_fails_the_build(id_: str) -> None:
    found = everything()
    del found[id_]
    with pytest.raises(RunError, match=f"claims: record {id_!r} is missing"):
        claims.page(found, PARAMS, {})


def test_claims_about_people_are_untested_without_people() -> None:
    people = [claim.about == "people" for claim in claims.CLAIMS]
    page = claims.page(everything(), PARAMS.model_copy(update={"people": {}}), {})
    judged = [bool(claim.ids) for claim in claims.CLAIMS]
    untested = [verdict == "not tested" for verdict in verdicts(page)]
    assert untested == [is_people or not has for is_people, has in zip(people, judged, strict=True)] and any(people)


def test_a_published_run_made_for_a_claim_judges_it_in_the_books_of_others() -> None:
    place = [claim.sizes == ("people",) for claim in claims.CLAIMS].index(True)
    id_ = claims.CLAIMS[place].ids[0]  # of stage 3, whose verdict is that it lies above the base
    published = {"people": everything() | {id_: record(id_, 0.91)}}
    for name, value, where in (("cpu", 0.91, "Published run of `params/people.yaml`: "), ("people", 0.5, "")):
        params = PARAMS.model_copy(update={"name": name, "meaningful": name != "cpu"})
        row = claims.page(everything(), params, published).splitlines()[2 + place]
        assert f"| {where}`{id_}` {value:.2f}" in row
        assert ("**reproduced**" in row) == (value > 0.6)
    del published["people"][id_]
    with pytest.raises(RunError, match=f"claims: record '{id_}' is missing; publish it from a run of `people`"):
        claims.page(everything(), PARAMS, published)


@pytest.mark.parametrize(("value", "verdict"), [(0.1, "reproduced"), (0.16, "not reproduced")])
def test_a_face_is_unrecognisable_below_the_bound_of_the_paper(value: float, verdict: str) -> None:
    id_ = "drift.identity.round5.reencode"
    place = [id_ in claim.ids for claim in claims.CLAIMS].index(True)
    page = claims.page(everything() | {id_: record(id_, value)}, PARAMS, {})
    assert verdicts(page)[place] == verdict, "the interval has to end below 0.2"


@pytest.mark.parametrize(("value", "verdict"), [(0.1, "reproduced"), (0.16, "trend only"), (0.5, "not reproduced")])
def test_identity_collapses_below_the_bound_and_tends_to_below_the_middle(value: float, verdict: str) -> None:
    """Between a stranger at 0.1 and the true answer at 0.8 the middle is 0.45."""
    values = {"base": value, "floor": 0.1, "ceiling": 0.8}
    found = {id_: record(id_, number) for name, number in values.items() if (id_ := f"people.identity.{name}")}
    place = ["people.identity.floor" in claim.ids for claim in claims.CLAIMS].index(True)
    assert verdicts(claims.page(everything() | found, PARAMS, {}))[place] == verdict
