"""The page of claims follows its records: a changed record changes the verdict, a missing one fails the build."""

import pytest
from conftest import SMOKE

from nmlib import claims, config
from nmlib.records import Record
from nmlib.runtime import RunError

PARAMS = config.load(SMOKE).model_copy(update={"meaningful": True})


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
        page = claims.page(found | {id_: record(id_, value)}, PARAMS)
        assert verdicts(page)[place] == verdict and f"`{id_}` {value:.2f}" in page


@pytest.mark.parametrize(
    ("edits", "trained", "verdict"),
    [(0.9, 0.1, "reproduced"), (0.8, 0.1, "reproduced"), (0.79, 0.1, "not reproduced"), (0.9, 0.7, "not reproduced")],
)
def test_a_bad_model_has_no_shortcut(edits: float, trained: float, verdict: str) -> None:
    found = everything()
    changed = {"edit.accuracy.markov_trained": edits, "rollback.accuracy.depth1.markov_trained": trained}
    found |= {id_: record(id_, value) for id_, value in changed.items()}
    assert verdicts(claims.page(found, PARAMS))[0] == verdict


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
    assert verdicts(claims.page(found, PARAMS))[2] == verdict


def test_params_that_mean_nothing_get_no_verdict() -> None:
    page = claims.page(everything(), PARAMS.model_copy(update={"meaningful": False}))
    assert set(verdicts(page)) == {"not measured at this size", "not tested"}
    assert "0.50" not in page and "`params/smoke.yaml` is too small to judge `rollback.accuracy.depth1" in page


@pytest.mark.parametrize("id_", sorted(everything()))
def test_a_missing_record_fails_the_build(id_: str) -> None:
    found = everything()
    del found[id_]
    with pytest.raises(RunError, match=f"claims: record {id_!r} is missing"):
        claims.page(found, PARAMS)


def test_claims_about_people_are_untested_without_people() -> None:
    people = [claim.about == "people" for claim in claims.CLAIMS]
    page = claims.page(everything(), PARAMS.model_copy(update={"people": {}}))
    assert [verdict == "not tested" for verdict in verdicts(page)[:7]] == people[:7] and any(people)
