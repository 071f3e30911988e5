"""Two hours of a triage service in simulated time: what its traces, its scraped metrics and its change log hold.

Something goes wrong on the way, and several other things change that do no harm. Three replicas serve one adapter each;
a tenant's requests go to its home replica, one after the other, and a reply that cannot be parsed is asked for once
more, there. No clock and no model is involved: a seed gives the same bundle on any machine.

Times are seconds since the beginning.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import pandas as pd

SECONDS = 7_200
SCRAPE = 15
"""Seconds between two scrapes of the metrics."""
OFFSET = 4
"""Seconds until the first: a scraper keeps to a time of its own, not to full minutes."""

BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
"""Upper bounds of the latency histogram in seconds; the last bucket, +Inf, comes on top."""

REPLICAS = ("r1", "r2", "r3")
TENANTS = (
    "Arlo",
    "Belvik",
    "Cadura",
    "Denholm",
    "Estrix",
    "Fjord",
    "Galen",
    "Hestia",
    "Ivora",
    "Jarnvik",
    "Kelmo",
    "Norix",
)
NEW_TENANT = "Norix"
TOKEN_SECONDS = 0.05
LONGEST = 96
"""Tokens at which a reply is cut off."""

CAUSES = {
    "deploy": "gateway 2.4 has a bug",
    "traffic": "the traffic of the campaign is too much",
    "tenant": f"the long tickets of {NEW_TENANT} are too much",
    "retries": "retries overload r3",
    "retrieval": "retrieval became slow when the index was compacted",
    "adapter": "adapter triage@6 writes replies that do not parse",
    "template": "prompt template t3 makes replies that do not parse",
    "skew": "a replica serves an adapter that does not fit the prompt template",
}
"""What somebody in the room will say."""

_ROLLED_OUT = {"r1": 480.0, "r2": 720.0, "r3": 960.0}
_TEMPLATE = 1_320.0
_ONBOARDED = 2_160.0
_RESTARTED = 2_460.0
_CAMPAIGN = (3_300.0, 4_500.0)
_COMPACTION = (3_480.0, 3_720.0)
_DEPLOYED = 3_780.0


@dataclass(frozen=True)
class Bundle:
    """What is left of the two hours: `spans`, `scrapes` and `changes`, see the functions that make them."""

    spans: pd.DataFrame
    """A row a span: trace, span, parent (None for a root), name, start, end, and the attributes, empty where unset:
    tenant, gateway, status, replica, attempt, adapter, template, input_tokens, output_tokens."""

    scrapes: pd.DataFrame
    """A row a sample: time, name, replica, outcome or le where the metric has that label, and the value."""

    changes: pd.DataFrame
    """What people changed or announced: minute and text."""


_AGAINST = {
    "deploy": "the share of replies that do not parse rises more than 20 minutes before gateway 2.4 is deployed: a "
    "cause does not follow its effect",
    "traffic": "all replicas have the campaign's traffic, and two of them stay as fast as before; replies already "
    "failed to parse before it began: traffic makes a queue longer that something else began",
    "tenant": f"leave out the requests of {NEW_TENANT}: the other tenants of its replica fail as often, and its long "
    "tickets parsed for the first minutes",
    "retries": "a retry follows a reply that did not parse: look at first attempts only, they fail as well. Retries "
    "are how the damage spreads, not where it begins",
    "retrieval": "retrieve spans are slow on all replicas for four minutes, by less than a second; the waiting on one "
    "replica goes on for an hour",
    "adapter": "triage@6 served for minutes before it was replaced, and its replies parsed. What is different when it "
    "comes back? Group by adapter and template",
    "template": "two replicas serve t3 for more than an hour without harm, and the third did for a while. Group by "
    "adapter and template",
}


def home(tenant: str) -> str:
    """The replica that serves a tenant."""
    return REPLICAS[TENANTS.index(tenant) % len(REPLICAS)]


def bundle(seed: int = 0) -> Bundle:
    """The two hours that a seed stands for."""
    spans = pd.DataFrame(_requests(np.random.default_rng(seed)))
    return Bundle(spans, _scrapes(spans), _changes())


def _adapter(replica: str, time: float) -> str:
    behind = time < _ROLLED_OUT[replica] or (replica == "r3" and time >= _RESTARTED)
    return "triage@6" if behind else "triage@7"


def _arrivals(draw: np.random.Generator) -> Iterator[tuple[float, str]]:
    """When requests come and from whom; during the campaign one and a half times as many."""
    time = 0.0
    while True:
        time += draw.exponential(1 / 0.5)
        if time >= SECONDS:
            return
        busy = _CAMPAIGN[0] <= time < _CAMPAIGN[1]
        tenant = TENANTS[int(draw.integers(len(TENANTS)))]
        if draw.random() < (1.0 if busy else 2 / 3) and (tenant != NEW_TENANT or time >= _ONBOARDED):
            yield time, tenant


def _requests(draw: np.random.Generator) -> Iterator[dict[str, object]]:
    """All spans, request by request. A replica answers one attempt at a time, in the order in which they come."""
    ids = count(1)
    free = dict.fromkeys(REPLICAS, 0.0)
    for number, (time, tenant) in enumerate(_arrivals(draw)):
        trace, root, replica = f"{number:06x}", f"s{next(ids)}", home(tenant)
        template = "t3" if time >= _TEMPLATE else "t2"
        tokens_in = int(draw.poisson(340 if tenant == NEW_TENANT else 55)) + 8
        at, parsed = time, False
        rows: list[dict[str, object]] = []
        for attempt in (1, 2):
            own = f"s{next(ids)}"
            slow = 4.0 if _COMPACTION[0] <= at < _COMPACTION[1] else 1.0
            found = at + slow * draw.gamma(4, 0.03)
            ready = max(at, free[replica])
            begun = max(found, ready)
            adapter = _adapter(replica, begun)
            runs_on = adapter == "triage@6" and template == "t3" and draw.random() < 0.62
            tokens = LONGEST if runs_on else int(draw.integers(26, 37))
            done = begun + TOKEN_SECONDS * tokens + 0.001 * tokens_in
            free[replica] = done
            end = done + 0.01
            parsed = not runs_on and draw.random() >= 0.01
            part = {"trace": trace, "parent": own}
            rows += [
                {"trace": trace, "span": own, "parent": root, "name": "attempt", "start": at, "end": end,
                 "replica": replica, "attempt": attempt},
                {**part, "span": f"s{next(ids)}", "name": "retrieve", "start": at, "end": found},
                {**part, "span": f"s{next(ids)}", "name": "wait", "start": at, "end": ready},
                {**part, "span": f"s{next(ids)}", "name": "generate", "start": begun, "end": done, "adapter": adapter,
                 "template": template, "input_tokens": tokens_in, "output_tokens": tokens},
                {**part, "span": f"s{next(ids)}", "name": "parse", "start": done, "end": end,
                 "status": "ok" if parsed else "error"},
            ]  # fmt: skip
            at = end
            if parsed:
                break
        gateway = "2.4" if time >= _DEPLOYED else "2.3"
        yield {"trace": trace, "span": root, "parent": None, "name": "request", "start": time, "end": at,
               "tenant": tenant, "gateway": gateway, "status": "ok" if parsed else "error"}  # fmt: skip
        yield from rows


def _scrapes(spans: pd.DataFrame) -> pd.DataFrame:
    """Counters as a scraper sees them: cumulative since the replica's process began, so r3 starts again at zero.

    attempts_total{replica, outcome}, output_tokens_total{replica} and attempt_seconds_bucket{replica, le}, all counted
    when an attempt ends.
    """
    attempts = spans[spans.name == "attempt"].set_index("span")
    inner = spans[spans.parent.isin(attempts.index)].set_index("parent")
    outcome = inner.status[inner.name == "parse"].reindex(attempts.index)
    tokens = inner.output_tokens[inner.name == "generate"].reindex(attempts.index)
    seconds = (attempts.end - attempts.start).to_numpy()
    times = np.arange(OFFSET, SECONDS + 1, SCRAPE)
    rows: list[pd.DataFrame] = []

    def counter(name: str, replica: str, weight: np.ndarray, **labels: str) -> None:
        mine = (attempts.replica == replica).to_numpy()
        order = np.argsort(attempts.end.to_numpy()[mine])
        ends, total = attempts.end.to_numpy()[mine][order], np.concatenate([[0], np.cumsum(weight[mine][order])])
        value = total[np.searchsorted(ends, times, side="right")]
        if replica == "r3":
            value = np.where(times >= _RESTARTED, value - total[np.searchsorted(ends, _RESTARTED)], value)
        rows.append(pd.DataFrame({"time": times, "name": name, "replica": replica, **labels, "value": value}))

    for replica in REPLICAS:
        for kind in ("ok", "error"):
            counter("attempts_total", replica, (outcome == kind).to_numpy().astype(int), outcome=kind)
        counter("output_tokens_total", replica, tokens.to_numpy().astype(int))
        for bound in (*BOUNDS, np.inf):
            counter(
                "attempt_seconds_bucket",
                replica,
                (seconds <= bound).astype(int),
                le=f"{bound:g}".replace("inf", "+Inf"),
            )
    return pd.concat(rows, ignore_index=True)


def _changes() -> pd.DataFrame:
    rows = [
        *((_ROLLED_OUT[replica], f"adapter triage@7 rolled out to {replica}") for replica in REPLICAS),
        (_TEMPLATE, "prompt template t3 replaces t2"),
        (_ONBOARDED, f"tenant {NEW_TENANT} comes on board; its tickets are long"),
        (_RESTARTED, "r3 restarted after maintenance of its machine"),
        (_CAMPAIGN[0], "campaign of a tenant begins, traffic rises by half"),
        (_COMPACTION[0], "search index is compacted"),
        (_DEPLOYED, "gateway 2.4 deployed"),
        (_CAMPAIGN[1], "campaign ends"),
    ]
    return pd.DataFrame([(time / 60, text) for time, text in sorted(rows)], columns=["minute", "change"])


def objection(of: Bundle, **answer: object) -> str:
    """What speaks against an answer, or "" when it is right.

    The keys are those of a diagnosis: cause, replica, since (a minute), share, tenants. Any number of them may be
    given, and what speaks against the first wrong one is returned.
    """
    requests, generate = (of.spans[of.spans.name == name] for name in ("request", "generate"))
    bad = generate[(generate.adapter == "triage@6") & (generate.template == "t3")]
    since = float(bad.start.min())
    later = requests[requests.start >= since]
    hit = later.trace.isin(bad.trace)
    shares = {
        "right": float(hit.mean()),
        "third": 1 / 3,
        "attempts": len(bad) / int((generate.start >= since).sum()),
        "whole": int(hit.sum()) / len(requests),
        "failed": float((later.status == "error").mean()),
    }
    against: dict[str, Callable[[object], str]] = {
        "cause": _cause,
        "replica": _replica,
        "since": lambda value: _since(value, since / 60),
        "share": lambda value: _share(value, shares),
        "tenants": lambda value: _tenants(value, set(later.tenant[hit])),
    }
    return next((text for key, value in answer.items() if (text := against[key](value))), "")


def _cause(value: object) -> str:
    if not isinstance(value, str) or value not in CAUSES:
        return f"cause is one of the keys of incident.CAUSES, {', '.join(CAUSES)}; not {value!r}"
    return "" if value == "skew" else f"{value}: {_AGAINST[value]}"


def _replica(value: object) -> str:
    if not isinstance(value, str):
        return f"replica is a name, one of {', '.join(REPLICAS)}; not {value!r}"
    if value == "r3":
        return ""
    return f"{value!r} is not the replica: compare output tokens and the status of parse spans by replica, over time"


def _since(value: object, right: float) -> str:
    if not _is_number(value):
        return f"since is a minute, a number; not {value!r}"
    minute = float(value)  # type: ignore[arg-type]
    if abs(minute - right) <= 1:
        return ""
    if minute > SECONDS / 60:
        return f"since is in minutes since the beginning, at most {SECONDS // 60}; {minute:g} looks like seconds"
    if minute > right:
        return (
            f"minute {minute:g} is too late: an alarm, a peak or a median comes after the beginning. Take the start of "
            "the first span that shows the cause"
        )
    return (
        f"minute {minute:g} is too early: the first span with the faulty combination begins later. One half of the "
        "combination alone does no harm"
    )


def _share(value: object, known: dict[str, float]) -> str:
    if not _is_number(value):
        return f"share is a number from 0 to 1; not {value!r}"
    share = float(value)  # type: ignore[arg-type]
    if abs(share - known["right"]) <= 0.002:
        return ""
    names = {
        "attempts": "you count attempts: a request that is asked for twice is one request. Count traces",
        "third": "one replica of three, or four tenants of twelve, is what the set-up says: count the requests",
        "whole": "the requests before the beginning could not be hit: divide by those that begin at or after `since`",
        "failed": "you count the requests that failed for good; those whose retry succeeded were served by the faulty "
        "combination as well",
    }
    for name, text in names.items():
        if abs(share - known[name]) <= 0.002:
            return f"{share:.3f} is another share: {text}"
    return (
        f"{share:.3f} is not the share: traces with at least one generate span of the faulty combination, among "
        "requests that begin at or after `since`"
    )


def _tenants(value: object, right: set[str]) -> str:
    names = [None] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    if not all(isinstance(name, str) for name in names):
        return f"tenants is a list or set of names; not {value!r}"
    named = set(names)
    if named == right:
        return ""
    if named == {NEW_TENANT}:
        return f"{NEW_TENANT} is one of those hit, not the only one: who else has a trace with the faulty combination?"
    if missing := right - named:
        return f"not all: {len(missing)} tenants with a trace of the faulty combination are missing from yours"
    extra = ", ".join(sorted(map(str, named - right)))
    return f"too many: no trace with the faulty combination is of {extra}; a blast radius ends somewhere"


def _is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))
