import numpy as np
import pandas as pd
import pytest

from labkit import incident


@pytest.fixture(scope="module")
def desk() -> incident.Bundle:
    return incident.bundle(0)


def faulty(desk: incident.Bundle) -> pd.DataFrame:
    spans = desk.spans
    return spans[(spans.name == "generate") & (spans.adapter == "triage@6") & (spans.template == "t3")]


def right_answer(desk: incident.Bundle) -> dict[str, object]:
    bad = faulty(desk)
    requests = desk.spans[(desk.spans.name == "request") & (desk.spans.start >= bad.start.min())]
    hit = requests.trace.isin(bad.trace)
    return {
        "cause": "skew",
        "replica": "r3",
        "since": bad.start.min() / 60,
        "share": hit.mean(),
        "tenants": set(requests.tenant[hit]),
    }


def test_a_seed_gives_the_same_two_hours(desk: incident.Bundle) -> None:
    again, other = incident.bundle(0), incident.bundle(1)
    pd.testing.assert_frame_equal(desk.spans, again.spans)
    pd.testing.assert_frame_equal(desk.scrapes, again.scrapes)
    assert not desk.spans.equals(other.spans)


def test_spans_form_trees_in_time(desk: incident.Bundle) -> None:
    spans = desk.spans.set_index("span")
    assert spans.index.is_unique
    assert (spans.end >= spans.start).all()
    inner = spans[spans.parent.notna()]
    outer = spans.loc[inner.parent]
    assert (inner.trace.to_numpy() == outer.trace.to_numpy()).all()
    assert (inner.start.to_numpy() >= outer.start.to_numpy() - 1e-9).all()
    assert (inner.end.to_numpy() <= outer.end.to_numpy() + 1e-9).all()
    assert (spans.name[spans.parent.isna()] == "request").all()


def test_a_replica_generates_one_reply_at_a_time(desk: incident.Bundle) -> None:
    spans = desk.spans
    replica = spans[spans.name == "attempt"].set_index("span").replica
    generate = spans[spans.name == "generate"]
    for _, mine in generate.groupby(generate.parent.map(replica)):
        ordered = mine.sort_values("start")
        assert (ordered.start.to_numpy()[1:] >= ordered.end.to_numpy()[:-1] - 1e-9).all()


def test_scraped_counters_agree_with_the_spans_and_fall_only_at_the_restart(desk: incident.Bundle) -> None:
    for (name, replica), rows in desk.scrapes.groupby(["name", "replica"]):
        for _, part in rows.fillna("").groupby(["outcome", "le"]):
            falls = part.time.to_numpy()[1:][np.diff(part.value) < 0]
            assert not len(falls) or (replica == "r3" and len(falls) == 1 and 2460 <= falls[0] <= 2475), name
    tokens = desk.scrapes[(desk.scrapes.name == "output_tokens_total") & (desk.scrapes.replica == "r1")]
    spans = desk.spans
    mine = spans[(spans.name == "attempt") & (spans.replica == "r1") & (spans.end <= tokens.time.max())].span
    counted = spans[(spans.name == "generate") & spans.parent.isin(mine)].output_tokens.sum()
    assert tokens.value.max() == counted


def test_only_the_combination_does_harm(desk: incident.Bundle) -> None:
    spans = desk.spans
    generate = spans[spans.name == "generate"].drop(columns="status")
    parse = spans.loc[spans.name == "parse", ["parent", "status"]]
    failed = generate.merge(parse, on="parent").assign(failed=lambda rows: rows.status == "error")
    share = failed.groupby(["adapter", "template"]).failed.mean()
    assert share["triage@6", "t3"] > 0.5
    assert share.drop(("triage@6", "t3")).max() < 0.05


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_right_answer_meets_no_objection(seed: int) -> None:
    desk = incident.bundle(seed)
    assert incident.objection(desk, **right_answer(desk)) == ""


def test_every_other_cause_meets_one(desk: incident.Bundle) -> None:
    said = {cause: incident.objection(desk, cause=cause) for cause in incident.CAUSES}
    assert [cause for cause, text in said.items() if not text] == ["skew"]
    assert "one of the keys" in incident.objection(desk, cause="the moon")
    assert "one of the keys" in incident.objection(desk, cause=["skew"])


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"replica": "r1"}, "not the replica"),
        ({"replica": pd.Series(["r3"])}, "is a name"),
        ({"cause": pd.Series(["skew"])}, "one of the keys"),
        ({"share": 1 / 3}, "one replica of three"),
        ({"since": 74}, "too late"),
        ({"since": 22}, "too early"),
        ({"since": 2465.0}, "looks like seconds"),
        ({"since": None}, "is a minute"),
        ({"since": float("nan")}, "is a minute"),
        ({"share": 0.9}, "is not the share"),
        ({"share": "33%"}, "from 0 to 1"),
        ({"tenants": "Norix"}, "list or set"),
        ({"tenants": ["Norix"]}, "not the only one"),
        ({"tenants": []}, "not all"),
        ({"tenants": [["Norix"]]}, "list or set"),
        ({"tenants": incident.TENANTS}, "too many"),
    ],
)
def test_a_wrong_entry_is_named(desk: incident.Bundle, answer: dict[str, object], says: str) -> None:
    assert says in incident.objection(desk, **answer)


def test_the_tempting_shares_are_named(desk: incident.Bundle) -> None:
    bad, spans = faulty(desk), desk.spans
    requests, generate = spans[spans.name == "request"], spans[spans.name == "generate"]
    since = bad.start.min()
    attempts = len(bad) / (generate.start >= since).sum()
    assert "you count attempts" in incident.objection(desk, share=attempts)
    assert "divide by those" in incident.objection(desk, share=bad.trace.nunique() / len(requests))
    lost = (requests[requests.start >= since].status == "error").mean()
    assert "failed for good" in incident.objection(desk, share=lost)


def test_an_array_of_names_is_as_good_as_a_set(desk: incident.Bundle) -> None:
    names = right_answer(desk)["tenants"]
    assert isinstance(names, set)
    assert incident.objection(desk, tenants=np.array(sorted(names))) == ""
    assert incident.objection(desk, tenants=pd.Series(sorted(names))) == ""
