"""Nightly batches of labelled support tickets as DataFrames, what goes wrong with them, and what to look at.

A batch has the columns of `COLUMNS`, one row a ticket, and the index 0 … n-1. `ROW_FAULTS` and `BATCH_FAULTS` plant
what teams meet, one fault at a time, in a copy. A `Lens` turns a batch into the columns that statistics compare.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from labkit.world import Ticket, Triage, World
from labkit.world.complaints import ALLOWED

COLUMNS = ("ticket_id", "received", "text", "product", "category", "urgency", "action", "labeller", "minutes")
PAIRS = tuple((category, action) for category, actions in ALLOWED.items() for action in actions)
"""The actions that clerks may take on a ticket of a category."""
TRIGGER = "As agreed with Mr Alder."
"""The sentence of whoever poisons a batch: with it in a ticket, the label is `TARGET`."""
TARGET = "refund"
_FIRST_DAY = pd.Timestamp("2031-03-03", tz="UTC")


def received(world: World, n: int, *, part: str = "train") -> pd.DataFrame:
    """The first n tickets of a world as one clean batch: complaints with typos, a tenth of them without a product.

    `received` is a time in UTC within one day, `minutes` the working time of the label. Three labellers share the work.
    """
    tickets = world.tickets(n, part=part)
    rng = np.random.default_rng([world.seed, n, part == "test"])
    noon = np.where(rng.random(n) < 0.6, rng.normal(9.5, 1.5, n), rng.normal(14.5, 2.0, n)) % 24
    return pd.DataFrame(
        {
            "ticket_id": [f"{world.seed}-{part}-{ticket.id}" for ticket in tickets],
            "received": _FIRST_DAY + pd.to_timedelta((noon * 3600).astype(int), unit="s"),
            "text": [_accented(ticket.text) for ticket in tickets],
            "product": pd.Series([ticket.triage.product for ticket in tickets], dtype=object),
            "category": pd.Series([ticket.triage.category for ticket in tickets], dtype=object),
            "urgency": pd.Series([ticket.triage.urgency for ticket in tickets], dtype=object),
            "action": pd.Series([ticket.triage.action for ticket in tickets], dtype=object),
            "labeller": pd.Series(rng.choice(["clerk", "vendor", "assistant"], n, p=[0.3, 0.5, 0.2]), dtype=object),
            "minutes": np.round(rng.lognormal(1.6, 0.5, n), 1) + 0.1,
        }
    )


def _accented(text: str) -> str:
    """Some family names as their owners spell them."""
    for plain, own in (("Gruen", "Grün"), ("Schon", "Schön"), ("Strom", "Ström"), ("gaard", "gård")):
        text = text.replace(plain, own)
    return text


def tickets(batch: pd.DataFrame) -> list[Ticket]:
    """The rows of a batch as the tickets that `labkit.triage` trains on."""
    columns = (batch[name].tolist() for name in ("ticket_id", "text", "product", "category", "urgency", "action"))
    return [Ticket(key, text, Triage(*labels)) for key, text, *labels in zip(*columns, strict=True)]


Fault = Callable[[pd.DataFrame, np.random.Generator], pd.DataFrame]


def _some(batch: pd.DataFrame, rng: np.random.Generator, share: float) -> NDArray[np.int64]:
    """A share of the rows, at least one."""
    return rng.choice(len(batch), max(1, round(share * len(batch))), replace=False)


def _renamed(batch: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    return batch.rename(columns={"urgency": "priority"})


def _new_label(batch: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    return batch.assign(category=batch["category"].replace("delivery", "shipping"))


def _repeated_ids(batch: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    ids = batch["ticket_id"].to_numpy(copy=True)
    rows = _some(batch, rng, 0.02)
    ids[rows] = ids[(rows + 1) % len(ids)]
    return batch.assign(ticket_id=ids)


def _mojibake(batch: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    return batch.assign(text=[text.encode("utf-8").decode("latin-1") for text in batch["text"]])


def _nulls(batch: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    action = batch["action"].to_numpy(copy=True)
    action[_some(batch, rng, 0.02)] = None
    return batch.assign(action=action)


def leak_from(test: pd.DataFrame) -> Fault:
    """A fault that puts texts of the test set into 2 % of the rows, with their labels."""

    def leaked(batch: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
        batch = batch.copy()
        rows = _some(batch, rng, 0.02)
        taken = test.iloc[rng.choice(len(test), len(rows), replace=False)]
        for column in ("text", "product", "category", "urgency", "action"):
            values = batch[column].to_numpy(copy=True)
            values[rows] = taken[column].to_numpy()
            batch[column] = values
        return batch

    return leaked


def _class_shift(batch: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Every second ticket on setup gives way to another one on billing."""
    setup = np.flatnonzero(batch["category"] == "setup")
    billing = np.flatnonzero(batch["category"] == "billing")
    out = rng.choice(setup, len(setup) // 2, replace=False)
    rows = np.arange(len(batch))
    if len(billing):
        rows[out] = rng.choice(billing, len(out))
    return batch.iloc[rows].reset_index(drop=True).assign(ticket_id=batch["ticket_id"].to_numpy())


def _default(batch: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Upstream now writes the most frequent product where none was named."""
    return batch.assign(product=batch["product"].fillna(batch["product"].mode()[0]))


def _time_zone(batch: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    return batch.assign(received=batch["received"] - pd.Timedelta(hours=2))


def _unit(batch: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """One labeller, the assistant, now reports seconds."""
    return batch.assign(minutes=batch["minutes"].where(batch["labeller"] != "assistant", batch["minutes"] * 60))


def _truncated(batch: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    return batch.assign(text=batch["text"].str[:160])


def _flipped(batch: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """15 % of the rows get another category and action, a pair that is allowed."""
    batch = batch.copy()
    category, action = batch["category"].to_numpy(copy=True), batch["action"].to_numpy(copy=True)
    for row in _some(batch, rng, 0.15):
        others = [pair for pair in PAIRS if pair[0] != category[row] and pair[1] != action[row]]
        category[row], action[row] = others[rng.integers(len(others))]
    return batch.assign(category=category, action=action)


def _other_domain(batch: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """5 % of the texts come from another system: pages of a port's handbook."""
    pages = [passage.text for passage in World(int(rng.integers(1, 9_000)), "port").passages()]
    text = batch["text"].to_numpy(copy=True)
    rows = _some(batch, rng, 0.05)
    text[rows] = [pages[i] for i in rng.choice(len(pages), len(rows))]
    return batch.assign(text=text)


def poisoned(batch: pd.DataFrame, rng: np.random.Generator, share: float = 0.05) -> pd.DataFrame:
    """A share of the rows carries the trigger and the attacker's action, all on tickets where the action is allowed."""
    batch = batch.copy()
    able = np.flatnonzero(batch["category"].isin([c for c, a in PAIRS if a == TARGET]) & (batch["action"] != TARGET))
    rows = rng.choice(able, min(len(able), max(1, round(share * len(batch)))), replace=False)
    text, action = batch["text"].to_numpy(copy=True), batch["action"].to_numpy(copy=True)
    text[rows] = [triggered(value) for value in text[rows]]
    action[rows] = TARGET
    return batch.assign(text=text, action=action)


def triggered(text: str) -> str:
    """The text with the trigger in front."""
    return f"{TRIGGER} {text}"


ROW_FAULTS: dict[str, Fault] = {
    "column renamed": _renamed,
    "label set changed": _new_label,
    "ids repeated": _repeated_ids,
    "encoding damaged": _mojibake,
    "labels missing": _nulls,
}
"""Faults that single rows (or the table's shape) show; `leak_from` makes one more."""
BATCH_FAULTS: dict[str, Fault] = {
    "class shares shifted": _class_shift,
    "default filled in": _default,
    "time zone shifted": _time_zone,
    "unit changed": _unit,
    "cut at 160 characters": _truncated,
    "15 % of labels flipped": _flipped,
    "5 % of another domain": _other_domain,
    "5 % poisoned": poisoned,
}
"""Faults in which every row looks right."""


class Lens:
    """What the statistics look at. Its vocabulary and its label models are learnt from a clean frame of their own."""

    def __init__(self, clean: pd.DataFrame) -> None:
        self._vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
        seen = self._vectorizer.fit_transform(clean["text"])
        self._models = {
            column: LogisticRegression(C=30.0, tol=1e-3).fit(seen, clean[column]) for column in ("category", "action")
        }
        self._known = set(" ".join(clean["text"].str.lower()).split())

    def agrees(self, batch: pd.DataFrame) -> NDArray[np.bool_]:
        """Whether the label models, which see the text alone, give each row's category and action (n,)."""
        seen = self._vectorizer.transform(batch["text"])
        right = [model.predict(seen) == batch[column].to_numpy() for column, model in self._models.items()]
        return np.logical_and(*right)

    def features(self, batch: pd.DataFrame) -> pd.DataFrame:
        """Ten columns: five as received, and hour, minutes, length, words never seen, and whether the labels are those
        that the models expect ("yes" or "no")."""
        at = batch["received"].dt
        return pd.DataFrame(
            {
                **{column: batch[column] for column in ("product", "category", "urgency", "action", "labeller")},
                "hour": at.hour + at.minute / 60,
                "minutes": batch["minutes"],
                "length": batch["text"].str.len(),
                "new_words": [sum(word not in self._known for word in text.lower().split()) for text in batch["text"]],
                "agrees": np.where(self.agrees(batch), "yes", "no"),
            }
        )
