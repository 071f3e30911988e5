# %% [markdown]
# # 4.5 Watching it
#
# You will be able to follow one request through a service by its traces, read its metrics as Prometheus does, find the cause of an incident from both, set a drift alarm whose false alarms you can state, and decide whether to retrain.
#
# **You will measure.** A permutation test at 1 % for drift in embeddings alarms on {{naive_false}} of the days on which nothing happened. Calibrated on whole days it alarms on {{alarm_false}} ({{alarm_false:interval}}). Of nine changes to the tickets it sees some that cost nothing, and misses two of the four that cost much: after one, exact match is {{lower_exact}} instead of {{none_exact}}, and its alarm rate is {{lower_seen}}. An incident would burn the error budget of 30 days in {{budget_days}} days; you name its cause, its first minute and whom it reached.
#
# **You need.** Lesson 1.1 (intervals), 2.1 (adapters); p-values; HTTP.
#
# **Time.** About 75 minutes; the solution runs in {{run:seconds}} s on one CPU core.

# %% [markdown]
# ## Why it matters at work
#
# A model that is served badly raises no exception. It answers, a little later and a little worse, and the first to notice is a customer. Whoever is on call has traces, metrics and a chat full of theories, and ten minutes.
#
# Monitoring also fails the other way. An alarm that cries on clean days is muted within two weeks, and a muted alarm is the same as none. So you are asked two numbers of every alarm: how often does it fire when nothing is wrong, and how long does it take when something is?
#
# In interviews: "the p99 doubled after a deployment; what do you do?", "how do you detect drift without labels, and what can you not detect?", "when would you not retrain?"

# %% tags=["parameters"]
model_id = "shipped"  # "shipped", or a causal language model with a chat template, which then gets adapters taught now
device = "cpu"  # "cpu", "cuda" or "mps"
customers = 48  # of the service, each a company with its own products; quick: 6
days = 4_000  # clean days to calibrate on, and as many to count false alarms; quick: 50
drifted_days = 400  # of each kind of drift; quick: 5
label_counts = (4, 16, 64)  # fresh labels to retrain with; quick: (4,)
passes = 256  # examples seen in a retraining; quick: 16
learning_rate = 3e-3  # of a retraining; for a real model 1e-4 to 3e-4
repeats = 2  # retrainings of each size, with other labels; quick: 1
seed = 0

# %%
import json
import logging
import math
import queue as queues
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of a faster kernel that is not installed
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

import httpx
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import requests
from fastapi import FastAPI, Request, Response
from feature_engine.selection import DropHighPSIFeatures
from IPython.display import display
from numpy.typing import ArrayLike, NDArray
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.propagate import extract, inject
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, get_current_span
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
    make_asgi_app,
)
from scipy.stats import chi2, permutation_test
from sklearn.metrics.pairwise import rbf_kernel

from labkit import assistant, incident, triage
from labkit.adapters import teach
from labkit.base_model.finetune import Pair, replies
from labkit.plots import COLOURS, direct_label, intervals, label_lines, use_house_style
from labkit.predict import compare
from labkit.results import ResultCard
from labkit.retrieval import encode
from labkit.servers import free_port, process, serving
from labkit.triage import interval
from labkit.world import LESSON_SEEDS, Ticket, Triage, World
from labkit.world.complaints import noisy
from labkit.world.draw import Draw

use_house_style()
disable_created_metrics()  # else each counter comes with a second series, the time of its birth
card = ResultCard("4_5_watching_it")

# %% [markdown]
# ## A request leaves a trace
#
# A **span** is a named piece of work with a start, an end and attributes. It knows the *trace* it belongs to and its parent span, so the spans of one request form a tree. OpenTelemetry (OTel) is the standard: the code makes spans, a processor hands them to an exporter, and any backend can read them.
#
# In one thread the tree builds itself: a span that is opened while another is *current* becomes its child. "Current" lives in a context variable, and a context variable ends at the thread, the queue and the socket. Beyond, the parent has to travel with the message, as a header that W3C Trace Context defines: `traceparent: 00-<trace id>-<span id>-<flags>`. Where one hop forgets it, a request falls apart into two traces, and neither shows why it was slow.
#
# Two functions of the API do the work. `inject(headers)` writes the current context into a dictionary; `extract(headers)` returns a context, and `tracer.start_as_current_span(name, context=...)` begins a span in it.


# %%
def new_tracer() -> tuple[Tracer, InMemorySpanExporter]:
    """A tracer, and the memory to which its spans go when they end. No thread: each span is exported at once."""
    provider, memory = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return provider.get_tracer("lesson"), memory


# %% [markdown]
# **Exercise.** A ticket is accepted in one process and triaged in another, with a queue between them. Write both sides.
#
# `accept(tracer, queue, ticket)` opens a span `accept` below the one that is current, and puts one message on the queue, `{"ticket": ticket, "headers": headers}`, a dictionary that can be written as JSON; `headers` carry the context of that span.
#
# `work(tracer, message, generate)` opens a span `triage`, **child of that `accept` span**, whatever span is current where it runs. With empty headers `triage` begins a trace of its own. Inside, as its children and one after the other:
#
# - `generate`, around the call `generate(ticket)`, which returns the reply and its number of tokens; the number is the span's only attribute, `gen_ai.usage.output_tokens` (the name that OTel's conventions give it).
# - `parse`, around `Triage.parse(reply)`. If that raises `ValueError`, the span ends with status `ERROR` and the exception recorded, and `work` returns `None`. Otherwise it returns the `Triage`. No other exception is caught.
#
# All spans end. `work` leaves the message, and what was current before, as they were. The ticket's text stands in no attribute and no event: more people read traces than tickets. *About 15 lines in all.*
#
# <details><summary>Hint 1</summary>A with block around start_as_current_span records an exception that leaves it, sets the status and ends the span. So where must the try stand: inside the block, or around it?</details>
# <details><summary>Hint 2</summary>inject has to run while the accept span is current. In work the parent is not what is current, but what extract(message["headers"]) gives, as the argument context.</details>
# <details><summary>Hint 3</summary>work: with start_as_current_span("triage", context=extract(...)): with start_as_current_span("generate") as span: call it, span.set_attribute(...). Then try: with start_as_current_span("parse"): return Triage.parse(reply) / except ValueError: return None.</details>


# %% exercise="carry-context" difficulty=3 minutes=11
def accept(tracer: Tracer, queue: queues.Queue, ticket: str) -> None:
    """Put a ticket on the queue, with the context of its span."""
    ### BEGIN SOLUTION
    headers: dict[str, str] = {}
    with tracer.start_as_current_span("accept", kind=SpanKind.PRODUCER):
        inject(headers)
        queue.put({"ticket": ticket, "headers": headers})
    ### END SOLUTION


def work(tracer: Tracer, message: Mapping, generate: Callable[[str], tuple[str, int]]) -> Triage | None:
    """Triage the ticket of a message, in spans that belong to the trace of whoever accepted it."""
    ### BEGIN SOLUTION
    with tracer.start_as_current_span("triage", context=extract(message["headers"]), kind=SpanKind.CONSUMER):
        with tracer.start_as_current_span("generate") as span:
            reply, tokens = generate(message["ticket"])
            span.set_attribute("gen_ai.usage.output_tokens", tokens)
        try:
            with tracer.start_as_current_span("parse"):
                return Triage.parse(reply)
        except ValueError:
            return None
    ### END SOLUTION


# %% check="carry-context" points=2
GOOD = Triage("Norix", "billing", "high", "refund")


class Wire(queues.Queue):
    """A queue between processes: what is put on it is written as JSON at that moment."""

    def _put(self, item: object) -> None:
        super()._put(json.dumps(item))


def traced(reply: str, ticket: str = "The Norix, s3cret, broke.", *, keep: bool = True) -> tuple[object, dict]:
    """Accept here, work in a fresh thread under a span of its own, and return the result and the spans by name."""
    tracer, memory = new_tracer()
    queue = Wire()
    try:
        accept(tracer, queue, ticket)
    except TypeError as error:
        raise AssertionError(
            f"A queue carries bytes between processes, and accept raised TypeError ({error}): put a dictionary of texts "
            "with headers made by inject on it, not a span or a context"
        ) from error
    assert queue.qsize() == 1, f"accept puts one message on the queue; yours put {queue.qsize()}"
    message = json.loads(queue.get())
    assert isinstance(message, dict), (
        f"The message is a dictionary with the ticket and the headers; yours is {message!r}"
    )
    assert message.get("ticket") == ticket, f"The message holds the ticket; yours is {message}"
    if not keep:
        message["headers"] = {}
    else:
        assert message.get("headers"), (
            "The headers are empty, so the request will fall into two traces: call inject(headers) inside the with block, "
            "where the accept span is current, and before the message is put on the queue"
        )
    sent, found, asked, same = json.dumps(message), [], [], []

    def answer(text: str) -> tuple[str, int]:
        asked.append(text)
        called.append(time.time_ns())
        return reply, 31

    def elsewhere() -> None:
        with tracer.start_as_current_span("poll") as poll:
            try:
                found.append(work(tracer, message, answer))
            except Exception as error:
                found.append(error)
            same.append(get_current_span() is poll)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    if not isinstance(found[0], Exception):
        assert asked == [ticket], f"generate is called once, with the text of the ticket; yours with {asked}"
    assert json.dumps(message) == sent, (
        f"work changed the message to {message}: when it fails, the same message is put back on the queue"
    )
    assert same == [True], (
        "After work another span is current than before, so the worker's next span lands in a foreign trace: detach what "
        "you attach, or use a with block"
    )
    return found[0], {span.name: span for span in memory.get_finished_spans()}


called: list[int] = []


got, spans = traced(GOOD.to_json())
assert not isinstance(got, Exception), f"work raised {type(got).__name__}: {got}"
assert got == GOOD, f"work returns the Triage of the reply; yours returned {got}"
missing = [name for name in ("accept", "triage", "generate", "parse") if name not in spans]
assert not missing, f"No finished span is called {missing}: a span that never ended is never exported; use a with block"
ids = {name: span.get_span_context() for name, span in spans.items()}
assert spans["triage"].parent is not None, (
    "triage has no parent: pass the extracted context on, start_as_current_span('triage', context=extract(...)); "
    "extracting alone changes nothing"
)
assert spans["triage"].parent.span_id != ids["poll"].span_id, (
    "triage became a child of poll, the span that was current in the worker: the parent is in the message's headers, "
    "pass context=extract(...)"
)
assert spans["triage"].parent.span_id == ids["accept"].span_id, (
    "The parent of triage is the accept span: inject while it is current"
)
assert spans["triage"].context.trace_id == ids["accept"].trace_id, "One request is one trace: triage is in another one"
for name in ("generate", "parse"):
    assert spans[name].parent is not None, f"{name} has no parent: open it while triage is current"
    assert spans[name].parent.span_id == ids["triage"].span_id, (
        f"{name} is not a child of triage: open it inside triage's block (start_as_current_span makes a span current, "
        "start_span does not), and after the other one has ended"
    )
assert dict(spans["generate"].attributes) == {"gen_ai.usage.output_tokens": 31}, (
    "generate has one attribute, gen_ai.usage.output_tokens = 31, set before the span ends; yours has "
    f"{dict(spans['generate'].attributes)}"
)
assert spans["generate"].start_time <= called[-1] <= spans["generate"].end_time, (
    "generate was called before its span began or after it had ended, so its duration says nothing: call it inside the block"
)
told = [
    name
    for name, span in spans.items()
    if "s3cret" in str([dict(part.attributes or {}) for part in (span, *span.events)])
]
assert not told, f"The ticket's text stands in an attribute or event of {told}: more people read traces than tickets"
tracer, memory = new_tracer()
with tracer.start_as_current_span("request") as outer:
    accept(tracer, Wire(), "A ticket")
above = memory.get_finished_spans()[0].parent
assert (above.span_id if above else 0) == outer.get_span_context().span_id, (
    "accept does not go on with the trace of the request that is current: open it without a context of its own"
)
### BEGIN HIDDEN TESTS
_got, _spans = traced(GOOD.to_json(), ticket="Another ticket", keep=False)
assert _got == GOOD, f"A message with empty headers is triaged as well; yours returned {_got}"
assert _spans["triage"].parent is None, "With empty headers triage begins a trace of its own, whatever is current"
assert _spans["triage"].context.trace_id != _spans["accept"].context.trace_id, "With empty headers: a trace of its own"
assert spans["generate"].end_time <= spans["parse"].start_time, "generate ends before parse begins"
assert spans["triage"].end_time >= spans["parse"].end_time, "triage ends after its children"
assert spans["parse"].status.status_code != StatusCode.ERROR, "A reply that parses is no error"
### END HIDDEN TESTS

# %% check="carry-context" points=1
got, spans = traced('{"product": "Nor')
assert not isinstance(got, Exception), f"A reply that does not parse gives None; yours let out {type(got).__name__}"
assert got is None, f"A reply that does not parse gives None; yours gave {got}"
assert "parse" in spans, "The parse span of a bad reply is missing: it has to end, too"
assert spans["parse"].status.status_code == StatusCode.ERROR, (
    "The parse span of a bad reply must have status ERROR. If you catch the exception inside its with block, the span never "
    "sees it: put the try around the block"
)
assert any(event.name == "exception" for event in spans["parse"].events), (
    "The exception is not recorded in the parse span: let it leave the with block, or call span.record_exception"
)
### BEGIN HIDDEN TESTS
for _reply in ("", "[]", '{"product": null, "category": "sales", "urgency": "low", "action": "call"}'):
    _got, _spans = traced(_reply)
    assert _got is None, f"{_reply!r} is no triage: None; yours gave {_got}"
    assert _spans["parse"].status.status_code == StatusCode.ERROR, f"{_reply!r}: the parse span has status ERROR"
    assert _spans["triage"].context.trace_id == _spans["accept"].context.trace_id, "One request is one trace"


def _broken(text: str) -> tuple[str, int]:
    raise ValueError("out of memory")


_tracer, _memory = new_tracer()
_raised = ""
try:
    work(_tracer, {"ticket": "x", "headers": {}}, _broken)
except ValueError as _error:
    _raised = str(_error)
assert _raised == "out of memory", (
    "Only what Triage.parse raises is caught: a ValueError of generate is a failure of the service, let it out"
)
_got, _spans = traced(None)
assert isinstance(_got, TypeError), (
    "Only a ValueError of Triage.parse is caught: a reply that is no text is a bug, and its TypeError goes to the caller; "
    f"yours returned {_got!r}"
)
assert {_span.name for _span in _memory.get_finished_spans()} >= {"triage", "generate"}, "All spans end, also then"
### END HIDDEN TESTS


# %% mistake="does not inject" of="carry-context" says="call inject(headers) inside the with block"
def accept(tracer, queue, ticket):
    headers = {}
    inject(headers)
    with tracer.start_as_current_span("accept"):
        queue.put({"ticket": ticket, "headers": headers})


def work(tracer, message, generate):
    with tracer.start_as_current_span("triage", context=extract(message["headers"])):
        return Triage.parse(generate(message["ticket"])[0])


# %% mistake="injects after the put" of="carry-context" says="before the message is put on the queue"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept"):
        message = {"ticket": ticket, "headers": {}}
        queue.put(message)
        inject(message["headers"])


def work(tracer, message, generate):
    with tracer.start_as_current_span("triage", context=extract(message["headers"])):
        return Triage.parse(generate(message["ticket"])[0])


# %% mistake="a span around nothing" of="carry-context" says="so its duration says nothing"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept"):
        message = {"ticket": ticket, "headers": {}}
        inject(message["headers"])
        queue.put(message)


def work(tracer, message, generate):
    reply, tokens = generate(message["ticket"])
    with tracer.start_as_current_span("triage", context=extract(message["headers"])):
        tracer.start_span("generate", attributes={"gen_ai.usage.output_tokens": tokens}).end()
        try:
            with tracer.start_as_current_span("parse"):
                return Triage.parse(reply)
        except ValueError:
            return None


# %% mistake="sends the span" of="carry-context" says="A queue carries bytes"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept") as span:
        queue.put({"ticket": ticket, "headers": {"parent": span}})


def work(tracer, message, generate):
    return Triage.parse(generate(message["ticket"])[0])


# %% mistake="extracts and forgets" of="carry-context" says="triage became a child of poll"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept"):
        message = {"ticket": ticket, "headers": {}}
        inject(message["headers"])
    queue.put(message)


def work(tracer, message, generate):
    extract(message["headers"])
    with tracer.start_as_current_span("triage"):
        with tracer.start_as_current_span("generate") as span:
            reply, tokens = generate(message["ticket"])
            span.set_attribute("gen_ai.usage.output_tokens", tokens)
        try:
            with tracer.start_as_current_span("parse"):
                return Triage.parse(reply)
        except ValueError:
            return None


# %% mistake="spans that do not end" of="carry-context" says="a span that never ended is never exported"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept"):
        message = {"ticket": ticket, "headers": {}}
        inject(message["headers"])
        queue.put(message)


def work(tracer, message, generate):
    with tracer.start_as_current_span("triage", context=extract(message["headers"])):
        span = tracer.start_span("generate")
        reply, tokens = generate(message["ticket"])
        span.set_attribute("gen_ai.usage.output_tokens", tokens)
        try:
            with tracer.start_as_current_span("parse"):
                return Triage.parse(reply)
        except ValueError:
            return None


# %% mistake="not current" of="carry-context" says="is not a child of triage"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept"):
        message = {"ticket": ticket, "headers": {}}
        inject(message["headers"])
        queue.put(message)


def work(tracer, message, generate):
    with tracer.start_span("triage", context=extract(message["headers"])):
        with tracer.start_as_current_span("generate") as span:
            reply, tokens = generate(message["ticket"])
            span.set_attribute("gen_ai.usage.output_tokens", tokens)
        try:
            with tracer.start_as_current_span("parse"):
                return Triage.parse(reply)
        except ValueError:
            return None


# %% mistake="catches inside the span" of="carry-context" says="put the try around the block"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept"):
        message = {"ticket": ticket, "headers": {}}
        inject(message["headers"])
        queue.put(message)


def work(tracer, message, generate):
    with tracer.start_as_current_span("triage", context=extract(message["headers"])):
        with tracer.start_as_current_span("generate") as span:
            reply, tokens = generate(message["ticket"])
            span.set_attribute("gen_ai.usage.output_tokens", tokens)
        with tracer.start_as_current_span("parse"):
            try:
                return Triage.parse(reply)
            except ValueError:
                return None


# %% mistake="the ticket in the trace" of="carry-context" says="text stands in an attribute"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept", attributes={"ticket": ticket}):
        message = {"ticket": ticket, "headers": {}}
        inject(message["headers"])
        queue.put(message)


def work(tracer, message, generate):
    with tracer.start_as_current_span("triage", context=extract(message["headers"])):
        with tracer.start_as_current_span("generate") as span:
            reply, tokens = generate(message["ticket"])
            span.set_attribute("gen_ai.usage.output_tokens", tokens)
        try:
            with tracer.start_as_current_span("parse"):
                return Triage.parse(reply)
        except ValueError:
            return None


# %% mistake="swallows every error" of="carry-context" says="a ValueError of generate is a failure of the service"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept"):
        message = {"ticket": ticket, "headers": {}}
        inject(message["headers"])
        queue.put(message)


def work(tracer, message, generate):
    try:
        with tracer.start_as_current_span("triage", context=extract(message["headers"])):
            with tracer.start_as_current_span("generate") as span:
                reply, tokens = generate(message["ticket"])
                span.set_attribute("gen_ai.usage.output_tokens", tokens)
            with tracer.start_as_current_span("parse"):
                return Triage.parse(reply)
    except ValueError:
        return None


# %% mistake="a sibling inside the other" of="carry-context" says="after the other one has ended"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept"):
        message = {"ticket": ticket, "headers": {}}
        inject(message["headers"])
        queue.put(message)


def work(tracer, message, generate):
    with tracer.start_as_current_span("triage", context=extract(message["headers"])):
        found = None
        with tracer.start_as_current_span("generate") as span:
            reply, tokens = generate(message["ticket"])
            span.set_attribute("gen_ai.usage.output_tokens", tokens)
            try:
                with tracer.start_as_current_span("parse"):
                    found = Triage.parse(reply)
            except ValueError:
                pass
        return found


# %% mistake="catches too much" of="carry-context" says="a reply that is no text is a bug"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept"):
        message = {"ticket": ticket, "headers": {}}
        inject(message["headers"])
        queue.put(message)


def work(tracer, message, generate):
    with tracer.start_as_current_span("triage", context=extract(message["headers"])):
        with tracer.start_as_current_span("generate") as span:
            reply, tokens = generate(message["ticket"])
            span.set_attribute("gen_ai.usage.output_tokens", tokens)
        try:
            with tracer.start_as_current_span("parse"):
                return Triage.parse(reply)
        except Exception:
            return None


# %% mistake="attaches and stays" of="carry-context" says="detach what you attach"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept"):
        headers = {}
        inject(headers)
        queue.put({"ticket": ticket, "headers": headers})


def work(tracer, message, generate):
    parent = extract(message["headers"])
    from opentelemetry.context import attach

    attach(parent)
    with tracer.start_as_current_span("triage"):
        with tracer.start_as_current_span("generate") as span:
            reply, n = generate(message["ticket"])
            span.set_attribute("gen_ai.usage.output_tokens", n)
        try:
            with tracer.start_as_current_span("parse"):
                return Triage.parse(reply)
        except ValueError:
            return None


# %% mistake="a root in the middle" of="carry-context" says="go on with the trace of the request"
def accept(tracer, queue, ticket):
    from opentelemetry.context import Context

    with tracer.start_as_current_span("accept", context=Context()):
        headers = {}
        inject(headers)
        queue.put({"ticket": ticket, "headers": headers})


def work(tracer, message, generate):
    parent = extract(message["headers"])
    with tracer.start_as_current_span("triage", context=parent):
        with tracer.start_as_current_span("generate") as span:
            reply, n = generate(message["ticket"])
            span.set_attribute("gen_ai.usage.output_tokens", n)
        try:
            with tracer.start_as_current_span("parse"):
                return Triage.parse(reply)
        except ValueError:
            return None


# %% mistake="the prompt as an event" of="carry-context" says="text stands in an attribute or event"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept"):
        headers = {}
        inject(headers)
        queue.put({"ticket": ticket, "headers": headers})


def work(tracer, message, generate):
    parent = extract(message["headers"])
    with tracer.start_as_current_span("triage", context=parent):
        with tracer.start_as_current_span("generate") as span:
            span.add_event("prompt", {"text": message["ticket"]})
            reply, n = generate(message["ticket"])
            span.set_attribute("gen_ai.usage.output_tokens", n)
        try:
            with tracer.start_as_current_span("parse"):
                return Triage.parse(reply)
        except ValueError:
            return None


# %% mistake="asks about the message" of="carry-context" says="with the text of the ticket"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept"):
        headers = {}
        inject(headers)
        queue.put({"ticket": ticket, "headers": headers})


def work(tracer, message, generate):
    parent = extract(message["headers"])
    with tracer.start_as_current_span("triage", context=parent):
        with tracer.start_as_current_span("generate") as span:
            reply, n = generate(message)
            span.set_attribute("gen_ai.usage.output_tokens", n)
        try:
            with tracer.start_as_current_span("parse"):
                return Triage.parse(reply)
        except ValueError:
            return None


# %% mistake="takes the message apart" of="carry-context" says="the same message is put back"
def accept(tracer, queue, ticket):
    with tracer.start_as_current_span("accept"):
        headers = {}
        inject(headers)
        queue.put({"ticket": ticket, "headers": headers})


def work(tracer, message, generate):
    parent = extract(message.pop("headers"))
    with tracer.start_as_current_span("triage", context=parent):
        with tracer.start_as_current_span("generate") as span:
            reply, n = generate(message["ticket"])
            span.set_attribute("gen_ai.usage.output_tokens", n)
        try:
            with tracer.start_as_current_span("parse"):
                return Triage.parse(reply)
        except ValueError:
            return None


# %% alternative="contexts by hand" of="carry-context"
def accept(tracer, queue, ticket):
    from opentelemetry.trace import set_span_in_context

    span = tracer.start_span("accept")
    headers = {}
    inject(headers, context=set_span_in_context(span))
    queue.put({"headers": headers, "ticket": ticket})
    span.end()


def work(tracer, message, generate):
    from opentelemetry.trace import set_span_in_context

    with tracer.start_span("triage", context=extract(message["headers"])) as outer:
        inside = set_span_in_context(outer)
        with tracer.start_span("generate", context=inside) as span:
            reply, tokens = generate(message["ticket"])
            span.set_attributes({"gen_ai.usage.output_tokens": tokens})
        span = tracer.start_span("parse", context=inside)
        try:
            found = Triage.parse(reply)
        except ValueError as error:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR, "does not parse"))
            found = None
        span.end()
    return found


# %% [markdown]
# One leak is left: the exception that `parse` records quotes the reply, and a reply can quote its ticket. Where that matters, record the exception's type only.
#
# Now as a job would, with everything real. A collector takes spans over OTLP, the protocol that every backend speaks. The service is a FastAPI application: OTel's instrumentation opens a span for each HTTP request and takes the parent from its headers, so the client's trace continues. It puts the ticket on a queue; the worker takes it off and asks the model, with the adapter "triage" of this course's assistant. Counters and a histogram are served at `/metrics`, for Prometheus to fetch.

# %%
model, tokenizer = assistant.load(model_id, device=device)
shop = World(LESSON_SEEDS[4_400 + seed])
received: list = []
collector = FastAPI()


@collector.post("/v1/traces")
async def collect(request: Request) -> Response:
    """An OTLP collector: it keeps every span that it is sent."""
    sent = ExportTraceServiceRequest.FromString(await request.body())
    received.extend(span for r in sent.resource_spans for scope in r.scope_spans for span in scope.spans)
    return Response(media_type="application/x-protobuf")


def make_service(
    provider: TracerProvider, registry: CollectorRegistry, queue: queues.Queue
) -> tuple[FastAPI, Counter, Histogram]:
    """The service with its metrics: it accepts tickets over HTTP and puts them on the queue."""
    outcomes = Counter("triage_replies", "Replies of the model.", ["outcome"], registry=registry)
    tokens = Histogram("triage_reply_tokens", "Length of a reply.", buckets=(16, 32, 64), registry=registry)
    app = FastAPI()

    @app.post("/tickets", status_code=202)
    def post(body: dict) -> dict:
        accept(provider.get_tracer("service"), queue, body["text"])
        return {"accepted": True}

    app.mount("/metrics", make_asgi_app(registry))
    FastAPIInstrumentor.instrument_app(
        app, tracer_provider=provider, exclude_spans=["receive", "send"], excluded_urls="metrics"
    )
    return app, outcomes, tokens


def ask(text: str) -> tuple[str, int]:
    """The model's reply to a ticket, and its number of tokens."""
    (reply,) = replies(model, tokenizer, [text])
    return reply, len(tokenizer(reply, add_special_tokens=False)["input_ids"]) + 1


def tree(spans: Iterable, parent: bytes = b"", depth: int = 0) -> None:
    """Print spans below their parents."""
    for span in sorted((s for s in spans if s.parent_span_id == parent), key=lambda s: s.start_time_unix_nano):
        notes = {a.key: a.value.int_value for a in span.attributes if a.key.startswith("gen_ai")}
        print("    " * depth + span.name, notes or "")
        tree(spans, span.span_id, depth + 1)


def measured_ask(text: str) -> tuple[str, int]:
    """The same, with the reply's length in the histogram."""
    reply, length = ask(text)
    tokens.observe(length)
    return reply, length


registry, queue = CollectorRegistry(), queues.Queue()
session = requests.Session()
session.trust_env = False  # no proxy between this process and itself
with serving(collector) as gathering:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{gathering.url}/v1/traces", session=session)))
    app, outcomes, tokens = make_service(provider, registry, queue)
    with serving(app) as service, provider.get_tracer("client").start_as_current_span("client"):
        headers: dict[str, str] = {}
        inject(headers)
        httpx.post(f"{service.url}/tickets", json={"text": shop.tickets(1)[0].text}, headers=headers, trust_env=False)
    while not queue.empty():
        done = work(provider.get_tracer("worker"), queue.get(), measured_ask)
        outcomes.labels("ok" if done else "unparsed").inc()
    provider.shutdown()
print(
    f"traceparent: {len(headers['traceparent'])} characters; traces received: {len({s.trace_id for s in received})}\n"
)
tree(received)
print("\n" + "\n".join(line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")))

# %% [markdown]
# One trace from the client to the parser, across HTTP, a queue and two tracers. (The processor here exports each span when it ends; in production a `BatchSpanProcessor` does it in a thread.)
#
# ## What a counter says
#
# Traces are kept for some requests, metrics for all. A Prometheus server *scrapes* each process every few seconds: it reads numbers that only grow (counters), numbers that go up and down (gauges), and histograms, which are a counter for each bucket, "so many observations at most `le`", cumulative over the buckets.
#
# **Rates.** A counter starts again at zero when its process restarts, so the difference of two samples may be negative. And scrapes do not fall on the ends of your window, so what happened between a window's end and the nearest scrape has to be estimated. Prometheus assumes that the counter went on growing as it did between the samples, within limits. That is why `increase()` of whole requests is not a whole number.
#
# **Quantiles.** From a histogram one knows in which bucket the quantile lies, and interpolates linearly within it. The error is up to the width of that bucket, however many requests there were.
#
# **Exercise.** Two functions that give what PromQL gives.
#
# `increase(times, values, start, end)`, a float. The samples, lists or arrays, are sorted by time and lie within `start < t <= end` (seconds). Fewer than two samples give `nan`.
#
# 1. *raw* is the last value minus the first; for each sample lower than the one before it (a restart), the value before the drop is added.
# 2. The *gap* is the mean time between two samples. On each side of the samples the growth is carried on to the window's end if that is nearer than 1.1 gaps, and by half a gap otherwise.
# 3. On the left not further than to where the counter would have been zero: if *raw* > 0, at most `(last time - first time) * first value / raw` seconds.
# 4. With *covered* = last time − first time, the result is `raw * (covered + left + right) / covered`.
#
# `increase([15, 30, 45, 60], [3, 6, 9, 12], 5, 65)` is 12.0: *raw* is 9, *left* 10 and *right* 5.
#
# `histogram_quantile(q, bounds, counts)`, with `0 < q < 1`, ascending upper `bounds` of which the last is `inf`, and `counts` *cumulative* over the buckets (floats; lists or arrays). The rank is `q` times the total. The quantile lies in the first bucket whose cumulative count is at least the rank; interpolate within it, from 0 if it is the first. In the last bucket the answer is the largest finite bound. A total of 0 gives `nan`. For bounds `[1, 2, 4, inf]` and counts `[0, 6, 10, 10]` the median is 1 + 5/6.
#
# *Predict* as well. A histogram of seconds has the 8 finite bounds of `incident.BOUNDS` and the labels `replica` (3 values) and `outcome` (2). Somebody adds the label `trace`, to find a slow request from its metric. In two hours there are about 2,600 requests, each served once, by one replica, with one outcome. How many time series does Prometheus hold afterwards? `predicted_series` is a whole number. *About 20 lines.*
#
# <details><summary>Hint 1</summary>What grows by the restart is not lost: before a drop the counter had reached the value before it. In the histogram, how many observations lie below the bucket, and how many in it?</details>
# <details><summary>Hint 2</summary>raw = last - first + sum of values[i-1] where values[i] &lt; values[i-1]. In the bucket: the share (rank - count below) / (count in the bucket) of its width.</details>
# <details><summary>Hint 3</summary>left = first time - start; if it is at least 1.1 gaps, half a gap; then min(left, covered * first / raw) if raw &gt; 0. The index of the bucket is np.searchsorted(counts, rank). A histogram has, for each set of labels, a series a bucket (with +Inf), a sum and a count.</details>

# %% exercise="promql" difficulty=3 minutes=12
predicted_series = None
### BEGIN SOLUTION
predicted_series = 28_600
### END SOLUTION


def increase(times: Sequence[float], values: Sequence[float], start: float, end: float) -> float:
    """How much a counter grew within the window, as Prometheus estimates it."""
    ### BEGIN SOLUTION
    if len(times) < 2:
        return math.nan
    drops = sum(before for before, after in pairwise(values) if after < before)
    raw = values[-1] - values[0] + drops
    covered = times[-1] - times[0]
    gap = covered / (len(times) - 1)
    left, right = times[0] - start, end - times[-1]
    left = left if left < 1.1 * gap else gap / 2
    right = right if right < 1.1 * gap else gap / 2
    if raw > 0:
        left = min(left, covered * values[0] / raw)
    return float(raw * (covered + left + right) / covered)
    ### END SOLUTION


def histogram_quantile(q: float, bounds: Sequence[float], counts: Sequence[float]) -> float:
    """The quantile q of a histogram, interpolated within its bucket."""
    ### BEGIN SOLUTION
    if counts[-1] == 0:
        return math.nan
    rank = q * counts[-1]
    at = int(np.searchsorted(counts, rank))
    if at >= len(bounds) - 1:
        return float(bounds[-2])
    low, below = (bounds[at - 1], counts[at - 1]) if at else (0.0, 0.0)
    return float(low + (bounds[at] - low) * (rank - below) / (counts[at] - below))
    ### END SOLUTION


# %% check="promql" points=2
assert predicted_series is not None, "Write your prediction down first: predicted_series = a whole number"
assert isinstance(predicted_series, int | float | np.number), (
    f"predicted_series is a number; yours is {predicted_series!r}"
)
assert predicted_series > 0, f"A number of time series is positive; yours is {predicted_series}"
samples = [30, 33, 2, 5]
inc = increase([15, 30, 45, 60], samples, 14, 61)
assert inc > 0, (
    f"The counter fell from 33 to 2: its process restarted, and nothing was taken back. Add the 33 before the drop; yours is {inc}"
)
assert abs(inc - 8 * 47 / 45) < 1e-9, (
    f"From 30 over 33 to a restart and up to 5 is 3 + 5 = 8, carried on by one second on each side: {8 * 47 / 45:.3f}; yours is {inc}"
)
assert samples == [30, 33, 2, 5], f"increase changed the samples that it was given, to {samples}: add up in a variable"
inc = increase(np.array([15, 30, 45, 60]), np.array([3, 6, 9, 12]), 5, 65)
assert inc != 9, "You take the difference of the samples: carry the growth on to the ends of the window (steps 2 and 4)"
assert abs(inc - 12) < 1e-9, f"For the example of the statement the increase is 12; yours is {inc}"
inc = increase([100, 110, 120], [50, 60, 70], 60, 125)
assert abs(inc - 30) < 1e-9, (
    "Growth is carried on to the window's end only if that is nearer than 1.1 gaps, else by half a gap: here the samples may "
    f"have begun late, 20 * (20 + 5 + 5) / 20 = 30; yours is {inc}"
)
inc = increase([100, 110, 120], [50, 60, 70], 89.5, 120)
assert abs(inc - 30.5) < 1e-9, (
    "The first sample is 10.5 s from the window's start and the gap is 10 s: that is nearer than 1.1 gaps, so the growth is "
    f"carried on all the way, 20 * 30.5 / 20; yours is {inc}"
)
inc = increase([100, 110, 120], [50, 60, 70], 100, 135)
assert abs(inc - 25) < 1e-9, (
    f"15 s after the last sample are more than 1.1 gaps of 10 s: half a gap, so 25; yours is {inc}"
)
inc = increase([10, 20, 30], [1, 11, 21], 0, 30)
assert abs(inc - 21) < 1e-9, (
    f"A counter cannot have been below zero: it stood at 0 one second before the first sample, so 21; yours is {inc}"
)
inc = increase([100, 110, 120], [8, 18, 28], 60, 120)
assert abs(inc - 25) < 1e-9, (
    "40 s before the first sample are more than 1.1 gaps: half a gap, 5 s. The zero would be 8 s away and changes nothing: "
    f"step 3 comes after step 2; 20 * (20 + 5) / 20 = 25, yours is {inc}"
)
assert math.isnan(increase([10], [3], 0, 20)), "One sample says nothing about growth: nan"
### BEGIN HIDDEN TESTS
assert math.isnan(increase([], [], 0, 20)), "No sample: nan"
try:
    _still = increase([10, 20], [4, 4], 5, 25)
except ZeroDivisionError as _error:
    raise AssertionError("A counter that stands still: step 3 holds only if raw > 0; you divide by raw = 0") from _error
assert _still == 0, f"A counter that stands still has an increase of 0; yours is {_still}"
assert increase([10, 20], [0, 0], 5, 25) == 0, "A counter at 0 that stands still has an increase of 0"
assert abs(increase([10, 20], [0, 8], 5, 25) - 12) < 1e-9, "A counter that was 0 at its first sample began there"
_fell = increase([10, 20, 30], [2, 10, 4], 0, 30)
assert abs(_fell - 14) < 1e-9, (
    f"raw, restart included, is 12, so the counter was 0 at 20 * 2 / 12 s before the first sample: 14; yours is {_fell}"
)
_rng = np.random.default_rng(3)
for _n in (2, 3, 10, 40):
    _t = 1000 + np.cumsum(np.full(_n, 15.0)) + _rng.uniform(-1, 1, _n)
    _v = np.cumsum(_rng.integers(1, 9, _n)) + 500.0
    _raw, _cov = _v[-1] - _v[0], _t[-1] - _t[0]
    _want = _raw * (_cov + 10) / _cov
    assert abs(increase(_t, _v, _t[0] - 4, _t[-1] + 6) - _want) < 1e-6, f"{_n} samples, ends 4 and 6 s away"
    assert abs(increase(list(_t), list(_v), _t[0] - 4, _t[-1] + 6) - _want) < 1e-6, "Lists are samples as well"
    _far = _raw * (_cov + _cov / (_n - 1)) / _cov
    assert abs(increase(_t, _v, _t[0] - 200, _t[-1] + 200) - _far) < 1e-6, (
        f"{_n} samples, both ends far away: half a gap"
    )
_two = increase([0, 10, 20, 30, 40], [9, 2, 5, 1, 3], -1, 41)
assert abs(_two - 8 * 42 / 40) < 1e-9, (
    f"Two restarts: 2 + 3 + 1 + 2, carried on by a second on each side; yours is {_two}"
)
### END HIDDEN TESTS

# %% check="promql" points=2
bounds, counts = [1.0, 2.0, 4.0, math.inf], [0.0, 6.0, 10.0, 10.0]
median = histogram_quantile(0.5, bounds, counts)
assert abs(median - 11 / 6) < 1e-9, (
    f"The median of the example is 1 + 5/6 = 1.833: counts are cumulative already, and one interpolates within the bucket; yours is {median}"
)
ninth = histogram_quantile(0.9, bounds, counts)
assert abs(ninth - 3.5) < 1e-9, (
    "Rank 9 lies in the bucket from 2 to 4, of which 6 observations are below: 2 + 2 * (9 - 6) / (10 - 6) = 3.5; yours is "
    f"{ninth}"
)
first = histogram_quantile(0.25, [2.0, 4.0, math.inf], [10.0, 20.0, 20.0])
assert abs(first - 1.0) < 1e-9, f"The first bucket begins at 0: rank 5 of 10 between 0 and 2 is 1; yours is {first}"
last = histogram_quantile(0.99, bounds, [0.0, 6.0, 10.0, 20.0])
assert last == 4.0, f"In the last bucket nothing is known but the largest finite bound, 4: yours is {last}"
try:
    nothing = histogram_quantile(0.5, bounds, [0.0] * 4)
except ZeroDivisionError as error:
    raise AssertionError("Without observations a quantile is nan: ask for the total before you divide") from error
assert math.isnan(nothing), f"Without observations a quantile is nan; yours is {nothing}"
### BEGIN HIDDEN TESTS
assert abs(histogram_quantile(0.6, bounds, counts) - 2.0) < 1e-9, (
    "A rank equal to a cumulative count is that bucket's end"
)
assert abs(histogram_quantile(0.5, bounds, [5.0, 5.0, 10.0, 10.0]) - 1.0) < 1e-9, (
    "The first bucket whose count is at least the rank, 5 of 10, is the first: 1.0"
)
_rng = np.random.default_rng(4)
for _size in (1, 7, 500):
    _x = _rng.gamma(2, 3, _size)
    _b = [0.5, 1.0, 3.0, 9.0, math.inf]
    _c = [float((_x <= _bound).sum()) for _bound in _b]
    for _q in (0.1, 0.5, 0.95):
        _i = next(_i for _i in range(5) if _c[_i] >= _q * _size)
        if _i == 4:
            _want = 9.0
        else:
            _low, _n = (_b[_i - 1], _c[_i - 1]) if _i else (0.0, 0.0)
            _want = _low + (_b[_i] - _low) * ((_q * _size - _n) / (_c[_i] - _n))
        assert abs(histogram_quantile(_q, _b, _c) - _want) < 1e-9, f"q = {_q}, counts {_c}: {_want}"
        assert abs(histogram_quantile(_q, np.array(_b), np.array(_c) / 7) - _want) < 1e-6, "Counts may be fractions"
### END HIDDEN TESTS


# %% mistake="a restart takes back" of="promql" says="nothing was taken back"
predicted_series = 100


def increase(times, values, start, end):
    if len(times) < 2:
        return math.nan
    return (values[-1] - values[0]) * (end - start) / (times[-1] - times[0])


def histogram_quantile(q, bounds, counts):
    return 1.0


# %% mistake="difference of the samples" of="promql" says="From 30 over 33 to a restart"
predicted_series = 100


def increase(times, values, start, end):
    if len(times) < 2:
        return math.nan
    return float(np.clip(np.diff(values), 0, None).sum())


def histogram_quantile(q, bounds, counts):
    return 1.0


# %% mistake="always to the ends" of="promql" says="else by half a gap"
predicted_series = 100


def increase(times, values, start, end):
    if len(times) < 2:
        return math.nan
    steps = [after - before if after >= before else after for before, after in pairwise(values)]
    return sum(steps) / (times[-1] - times[0]) * (end - start)


def histogram_quantile(q, bounds, counts):
    return 1.0


# %% mistake="one gap is the limit" of="promql" says="that is nearer than 1.1 gaps"
predicted_series = 100


def increase(times, values, start, end):
    if len(times) < 2:
        return math.nan
    raw = sum(after - before if after >= before else after for before, after in pairwise(values))
    covered = times[-1] - times[0]
    gap = covered / (len(times) - 1)
    left, right = (side if side <= gap else gap / 2 for side in (times[0] - start, end - times[-1]))
    left = min(left, covered * values[0] / raw) if raw else left
    return raw * (covered + left + right) / covered


def histogram_quantile(q, bounds, counts):
    return 1.0


# %% mistake="below zero" of="promql" says="A counter cannot have been below zero"
predicted_series = 100


def increase(times, values, start, end):
    if len(times) < 2:
        return math.nan
    raw = sum(after - before if after >= before else after for before, after in pairwise(values))
    covered = times[-1] - times[0]
    gap = covered / (len(times) - 1)
    sides = [side if side < 1.1 * gap else gap / 2 for side in (times[0] - start, end - times[-1])]
    return raw * (covered + sum(sides)) / covered


def histogram_quantile(q, bounds, counts):
    return 1.0


# %% mistake="the upper bound" of="promql" says="one interpolates within the bucket"
predicted_series = 100


def increase(times, values, start, end):
    if len(times) < 2:
        return math.nan
    raw = sum(after - before if after >= before else after for before, after in pairwise(values))
    covered = times[-1] - times[0]
    gap = covered / (len(times) - 1)
    left, right = (side if side < 1.1 * gap else gap / 2 for side in (times[0] - start, end - times[-1]))
    left = min(left, covered * values[0] / raw) if raw else left
    return raw * (covered + left + right) / covered


def histogram_quantile(q, bounds, counts):
    return next(bound for bound, count in zip(bounds, counts, strict=True) if count >= q * counts[-1])


# %% mistake="forgets what lies below" of="promql" says="of which 6 observations are below"
predicted_series = 100


def increase(times, values, start, end):
    if len(times) < 2:
        return math.nan
    raw = sum(after - before if after >= before else after for before, after in pairwise(values))
    covered = times[-1] - times[0]
    gap = covered / (len(times) - 1)
    left, right = (side if side < 1.1 * gap else gap / 2 for side in (times[0] - start, end - times[-1]))
    left = min(left, covered * values[0] / raw) if raw else left
    return raw * (covered + left + right) / covered


def histogram_quantile(q, bounds, counts):
    rank = q * counts[-1]
    at = int(np.searchsorted(counts, rank))
    low = bounds[at - 1] if at else 0.0
    return low + (bounds[at] - low) * rank / counts[at]


# %% mistake="infinity in the last bucket" of="promql" says="the largest finite bound"
predicted_series = 100


def increase(times, values, start, end):
    if len(times) < 2:
        return math.nan
    raw = sum(after - before if after >= before else after for before, after in pairwise(values))
    covered = times[-1] - times[0]
    gap = covered / (len(times) - 1)
    left, right = (side if side < 1.1 * gap else gap / 2 for side in (times[0] - start, end - times[-1]))
    left = min(left, covered * values[0] / raw) if raw else left
    return raw * (covered + left + right) / covered


def histogram_quantile(q, bounds, counts):
    return float(np.interp(q * counts[-1], [0.0, *counts], [0.0, *bounds]))


# %% mistake="the zero before the gap" of="promql" says="step 3 comes after step 2"
predicted_series = 2600 * 11


def increase(times, values, start, end):
    t, v = np.asarray(times, float), np.asarray(values, float)
    if len(t) < 2:
        return math.nan
    raw = v[-1] - v[0] + sum(a for a, b in pairwise(v) if b < a)
    covered = t[-1] - t[0]
    gap = covered / (len(t) - 1)
    left, right = t[0] - start, end - t[-1]
    if raw > 0:
        left = min(left, covered * v[0] / raw)
    if left >= 1.1 * gap:
        left = gap / 2
    if right >= 1.1 * gap:
        right = gap / 2
    return float(raw * (covered + left + right) / covered)


def histogram_quantile(q, bounds, counts):
    if counts[-1] == 0:
        return math.nan
    rank = q * counts[-1]
    i = next(k for k, c in enumerate(counts) if c >= rank)
    if i == len(bounds) - 1:
        return float(bounds[-2])
    low, below = (bounds[i - 1], counts[i - 1]) if i else (0.0, 0.0)
    return float(low + (bounds[i] - low) * (rank - below) / (counts[i] - below))


# %% mistake="the slope without the restart" of="promql" says="raw, restart included, is 12"
predicted_series = 2600 * 11


def increase(times, values, start, end):
    t, v = np.asarray(times, float), np.asarray(values, float)
    if len(t) < 2:
        return math.nan
    raw = v[-1] - v[0] + sum(a for a, b in pairwise(v) if b < a)
    covered = t[-1] - t[0]
    gap = covered / (len(t) - 1)
    left, right = t[0] - start, end - t[-1]
    if left >= 1.1 * gap:
        left = gap / 2
    if right >= 1.1 * gap:
        right = gap / 2
    if raw > 0:
        left = min(left, covered * v[0] / max(v[-1] - v[0], 1e-9))
    return float(raw * (covered + left + right) / covered)


def histogram_quantile(q, bounds, counts):
    if counts[-1] == 0:
        return math.nan
    rank = q * counts[-1]
    i = next(k for k, c in enumerate(counts) if c >= rank)
    if i == len(bounds) - 1:
        return float(bounds[-2])
    low, below = (bounds[i - 1], counts[i - 1]) if i else (0.0, 0.0)
    return float(low + (bounds[i] - low) * (rank - below) / (counts[i] - below))


# %% mistake="repairs the samples in place" of="promql" says="increase changed the samples"
predicted_series = 2600 * 11


def increase(times, values, start, end):
    t, v = np.asarray(times, float), np.asarray(values, float)
    if len(t) < 2:
        return math.nan
    for i in range(1, len(values)):
        if values[i] < values[i - 1]:
            values[i:] = [x + values[i - 1] for x in values[i:]]
    raw = values[-1] - values[0]
    covered = t[-1] - t[0]
    gap = covered / (len(t) - 1)
    left, right = t[0] - start, end - t[-1]
    if left >= 1.1 * gap:
        left = gap / 2
    if right >= 1.1 * gap:
        right = gap / 2
    if raw > 0:
        left = min(left, covered * v[0] / raw)
    return float(raw * (covered + left + right) / covered)


def histogram_quantile(q, bounds, counts):
    if counts[-1] == 0:
        return math.nan
    rank = q * counts[-1]
    i = next(k for k, c in enumerate(counts) if c >= rank)
    if i == len(bounds) - 1:
        return float(bounds[-2])
    low, below = (bounds[i - 1], counts[i - 1]) if i else (0.0, 0.0)
    return float(low + (bounds[i] - low) * (rank - below) / (counts[i] - below))


# %% mistake="a prediction in words" of="promql" says="predicted_series is a number"
predicted_series = "28,600"


def increase(times, values, start, end):
    t, v = np.asarray(times, float), np.asarray(values, float)
    if len(t) < 2:
        return math.nan
    raw = v[-1] - v[0] + sum(a for a, b in pairwise(v) if b < a)
    covered = t[-1] - t[0]
    gap = covered / (len(t) - 1)
    left, right = t[0] - start, end - t[-1]
    if left >= 1.1 * gap:
        left = gap / 2
    if right >= 1.1 * gap:
        right = gap / 2
    if raw > 0:
        left = min(left, covered * v[0] / raw)
    return float(raw * (covered + left + right) / covered)


def histogram_quantile(q, bounds, counts):
    if counts[-1] == 0:
        return math.nan
    rank = q * counts[-1]
    i = next(k for k, c in enumerate(counts) if c >= rank)
    if i == len(bounds) - 1:
        return float(bounds[-2])
    low, below = (bounds[i - 1], counts[i - 1]) if i else (0.0, 0.0)
    return float(low + (bounds[i] - low) * (rank - below) / (counts[i] - below))


# %% alternative="loops" of="promql"
predicted_series = 28_000


def increase(times, values, start, end):
    times, values = np.asarray(times, float), np.asarray(values, float)
    if times.size <= 1:
        return float("nan")
    raw = 0.0
    for i in range(1, len(values)):
        raw += values[i] if values[i] < values[i - 1] else values[i] - values[i - 1]
    span = times[-1] - times[0]
    gap = span / (len(times) - 1)
    seconds = span
    to_end = end - times[-1]
    seconds += to_end if to_end < 1.1 * gap else 0.5 * gap
    to_start = times[0] - start
    if to_start >= 1.1 * gap:
        to_start = 0.5 * gap
    if raw > 0:
        to_start = min(to_start, span / raw * values[0])
    return raw / span * (seconds + to_start)


def histogram_quantile(q, bounds, counts):
    total = counts[-1]
    if not total:
        return float("nan")
    low = below = 0.0
    for bound, count in zip(bounds, counts, strict=True):
        if count >= q * total:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (q * total - below) / (count - below)
        low, below = bound, count


# %% [markdown]
# The metrics of the rest of this section come from two hours of a service that ended badly; you will find out why in the next section. `incident.bundle` simulates it, so that no number depends on a clock: three replicas, twelve tenants, a scrape every 15 seconds.

# %%
desk = incident.bundle(seed)
KEYS = ["name", "replica", "outcome", "le"]
series = {
    key: (part.time.to_numpy(), part.value.to_numpy())
    for key, part in desk.scrapes.fillna({"outcome": "", "le": ""}).groupby(KEYS)
}
LE = [f"{bound:g}" for bound in incident.BOUNDS] + ["+Inf"]
EDGES = [*incident.BOUNDS, math.inf]


def grown(name: str, replicas: Iterable[str], end: float, window: float, *, outcome: str = "", le: str = "") -> float:
    """sum(increase(name{...}[window])) over replicas, at `end` (seconds)."""
    total = 0.0
    for replica in replicas:
        times, values = series[name, replica, outcome, le]
        inside = (times > end - window) & (times <= end)
        total += increase(times[inside], values[inside], end - window, end)
    return total


def quantile(q: float, replicas: Sequence[str], end: float, window: float = 600) -> float:
    """histogram_quantile over the summed buckets of these replicas."""
    return histogram_quantile(q, EDGES, [grown("attempt_seconds_bucket", replicas, end, window, le=le) for le in LE])


attempts = desk.spans[desk.spans.name == "attempt"]
at, window = 5_400, 600
within = attempts[(attempts.end > at - window) & (attempts.end <= at)]
true_p99 = float(np.quantile(within.end - within.start, 0.99))
each = {replica: quantile(0.99, [replica], at, window) for replica in incident.REPLICAS}
pooled, mean_of = quantile(0.99, incident.REPLICAS, at, window), float(np.mean([*each.values()]))
print(f"p99 of each replica: { {name: round(value, 1) for name, value in each.items()} } seconds")
print(
    f"mean of the three: {mean_of:.1f} s; from the summed buckets: {pooled:.1f} s; of the attempts themselves: {true_p99:.1f} s"
)

live = CollectorRegistry()
seconds = Histogram("seconds", "Seconds.", ["replica", "outcome"], buckets=incident.BOUNDS, registry=live)
traced_seconds = Histogram(
    "traced_seconds", "Seconds.", ["replica", "outcome", "trace"], buckets=incident.BOUNDS, registry=live
)
parsed = desk.spans[desk.spans.name == "parse"].set_index("parent").status
first = attempts[attempts.attempt == 1]
for row in first.assign(outcome=parsed.reindex(first.span).to_numpy()).itertuples():
    seconds.labels(row.replica, row.outcome).observe(row.end - row.start)
    traced_seconds.labels(row.replica, row.outcome, row.trace).observe(row.end - row.start)
counted = {family.name: len(family.samples) for family in live.collect()}
print(counted)
compare([("time series with the label trace", predicted_series, counted["traced_seconds"])], format=",d")

card.record("true_p99", true_p99, format=".0f", unit="s", label="p99 of the attempts of ten minutes, from traces")
card.record("pooled_p99", pooled, format=".0f", unit="s", label="the same from summed buckets")
card.record("mean_p99", mean_of, format=".0f", unit="s", label="mean of three replicas' p99")
card.record("series_before", counted["seconds"], format=",d", label="time series of a histogram")
card.record("series_after", counted["traced_seconds"], format=",d", label="time series with the request as a label")

# %% [markdown]
# A quantile of the whole is no mean of quantiles: {{mean_p99}} s against {{true_p99}} s from the traces. Sum the buckets first, then take the quantile. It lies in the last bucket, of which Prometheus reports the lower end, {{pooled_p99}} s: a histogram does not know what is above its largest bound. If you care about a limit, put a bound on it and some above.
#
# The label `trace` made {{series_after}} series of {{series_before}}, for two hours of a small service. Each combination of values is a series, kept in memory, whether it ever gets a second observation or not. What identifies one request belongs into traces; from a metric to a trace lead *exemplars*, an example's trace id beside a bucket.
#
# And the real server? Where Debian's package `prometheus` is installed, the next cell gives it the same samples and asks it in PromQL over its HTTP API; then lets it scrape a live application. Nothing later depends on it. (Servers from before [a fix of 2024](https://github.com/prometheus/prometheus/pull/13725), such as Debian 12's 2.42, take step 3 of `increase` before step 2. It makes no difference to what is asked below.)

# %%
BASE = 1_700_000_000  # the simulation's second 0, as Unix time


def openmetrics(scrapes: pd.DataFrame) -> str:
    """Samples with their times, in the text format that Prometheus imports."""
    lines: list[str] = []
    for name, rows in scrapes.groupby("name", sort=False):
        family, kind = (name[:-7], "histogram") if name.endswith("_bucket") else (name[:-6], "counter")
        lines.append(f"# TYPE {family} {kind}")
        labels = [label for label in KEYS[1:] if rows[label].notna().any()]
        for key, part in rows.groupby(labels, sort=False):
            inside = ",".join(f'{label}="{value}"' for label, value in zip(labels, key, strict=True))
            lines += [f"{name}{{{inside}}} {v} {BASE + t}" for t, v in zip(part.time, part.value, strict=True)]
    return "\n".join([*lines, "# EOF", ""])


def ask_prometheus(url: str, query: str, second: float | None = None) -> float:
    """The value of a PromQL expression with one result, at a second of the simulation; nan if there is none."""
    given = {"query": query} | ({} if second is None else {"time": BASE + second})
    found = httpx.get(f"{url}/api/v1/query", params=given, trust_env=False).json()["data"]["result"]
    return float(found[0]["value"][1]) if found else math.nan


def running_prometheus(folder: Path, config: str):
    """Prometheus on a free port, with its data in `folder`; a context manager, and its address."""
    (folder / "prometheus.yml").write_text(config, encoding="utf-8")
    url = f"http://127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
               "--storage.tsdb.retention.time=100y", f"--web.listen-address={url[7:]}"]  # fmt: skip
    return process(command, ready=f"{url}/-/ready"), url


if shutil.which("prometheus") and shutil.which("promtool"):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "samples").write_text(openmetrics(desk.scrapes), encoding="utf-8")
        blocks = [
            "promtool",
            "tsdb",
            "create-blocks-from",
            "openmetrics",
            str(folder / "samples"),
            str(folder / "data"),
        ]
        subprocess.run(blocks, check=True, capture_output=True)
        server, url = running_prometheus(folder, "")
        worst = 0.0
        with server:
            for second in (300, 1_240, 2_467, 2_500, 3_600, 5_400, 7_200):
                for mine, query in (
                    (
                        grown("output_tokens_total", ["r3"], second, 300),
                        'increase(output_tokens_total{replica="r3"}[5m])',
                    ),
                    (
                        quantile(0.99, incident.REPLICAS, second, 300),
                        "histogram_quantile(0.99, sum by (le) (increase(attempt_seconds_bucket[5m])))",
                    ),
                ):
                    theirs = ask_prometheus(url, query, second)
                    worst = max(worst, abs(mine - theirs) / abs(theirs))
        print(f"largest relative difference to Prometheus over 14 answers: {worst:.0e}")
    with serving(app) as service, tempfile.TemporaryDirectory() as name:
        target = json.dumps([{"targets": [service.url[7:]]}])
        scrape = f'{{"scrape_configs": [{{"job_name": "service", "scrape_interval": "200ms", "scrape_timeout": "200ms", "static_configs": {target}}}]}}'
        server, url = running_prometheus(Path(name), scrape)
        with server:
            for _ in range(100):
                if ask_prometheus(url, "up") == 1:
                    break
                time.sleep(0.1)
            print("scraped live: up =", ask_prometheus(url, "up"), end=", ")
            print("sum(triage_replies_total) =", ask_prometheus(url, "sum(triage_replies_total)"))
else:
    print(
        "Prometheus is not installed here: `sudo apt install prometheus` on Debian and Ubuntu, then run this cell again."
    )

# %% [markdown]
# ## A budget for errors
#
# An objective of 99.5 % over 30 days leaves a budget: one request in 200 may fail. The **burn rate** is the share of failed requests, divided by the share that the budget allows. At burn rate 1 the budget lasts the 30 days; at 14.4 an hour costs 2 % of it, which the SRE workbook (Beyer et al., 2018) takes as worth waking somebody up.
#
# One window is not enough. A short one fires on every hiccup. A long one goes on firing for an hour after the repair, and alarms that stay on are alarms that nobody reads. So both must burn: the long window says that it matters, the short one that it is still going on.
#
# **Exercise.** Write `burning(bad, total, objective, long, short, factor)`. `bad` and `total` hold failed and all requests of each minute, (n,). Return (n,) booleans: whether at the end of minute `t` the burn rates over the last `long` **and** the last `short` minutes (`t` included) are both at least `factor`.
#
# The burn rate over a window is (failed requests / all requests in the window) / (1 − `objective`); 0 where there were no requests. At the beginning, where a window reaches back before minute 0, it has the minutes that there are.
#
# `burning([0, 0, 5, 0], [10, 10, 10, 10], 0.9, 2, 1, 2.0)` is `[False, False, True, False]`: at minute 2 the rates are 2.5 and 5, at minute 3 2.5 and 0. *About 8 lines.*
#
# <details><summary>Hint 1</summary>A minute with one request and one failure is not as bad as one with a hundred of each. What is divided by what, and when?</details>
# <details><summary>Hint 2</summary>Sum the failures of the window and the requests of the window, and divide the sums. With a cumulative sum a window is a difference.</details>
# <details><summary>Hint 3</summary>For each t: b = sum(bad[max(0, t - w + 1) : t + 1]), the same for total; rate = b / n / (1 - objective) if n else 0. Both windows, joined by and.</details>


# %% exercise="burn-rate" difficulty=2 minutes=8
def burning(
    bad: Sequence[float], total: Sequence[float], objective: float, long: int, short: int, factor: float
) -> NDArray[np.bool_]:
    """Whether the error budget burns at least `factor` times too fast, over both windows, at each minute: (n,)."""
    ### BEGIN SOLUTION
    counts = np.array([bad, total], dtype=float)
    sums = np.cumsum(np.pad(counts, ((0, 0), (1, 0))), axis=1)
    now = np.arange(counts.shape[1]) + 1
    alarm = np.ones(counts.shape[1], dtype=bool)
    for window in (long, short):
        failed, every = sums[:, now] - sums[:, np.maximum(now - window, 0)]
        alarm &= failed / np.maximum(every, 1e-9) / (1 - objective) >= factor
    return alarm
    ### END SOLUTION


# %% check="burn-rate" points=2
got = np.asarray(burning([0, 0, 5, 0], [10, 10, 10, 10], 0.9, 2, 1, 2.0))
assert got.shape == (4,), f"One answer a minute, (4,); yours has the shape {got.shape}"
assert got.tolist() != [False, False, True, True], (
    "At minute 3 nothing fails any more, yet you fire: both windows must burn, the long one and the short one"
)
assert got.tolist() == [False, False, True, False], (
    f"For the example of the statement: minute 2 only; yours is {got.tolist()}"
)
got = np.asarray(burning([0, 0, 0, 0, 3], [10] * 5, 0.9, 5, 1, 2.0)).tolist()
assert not got[4], (
    "One bad minute in five: the short window burns at 3, the long one at 0.6. Both must burn, so no alarm; yours fires"
)
counts = np.array([[1.0, 0, 0, 0], [1, 99, 50, 50]])
got = np.asarray(burning(counts[0], counts[1], 0.75, 2, 2, 1.5)).tolist()
assert not got[1], (
    "One failure among a hundred requests: divide the sums of the window; the mean of each minute's share would be 0.5"
)
assert counts.tolist() == [[1, 0, 0, 0], [1, 99, 50, 50]], (
    "burning changed the counts that it was given: copy them first"
)
got = np.asarray(burning([3, 3, 3], [10, 10, 10], 0.9, 60, 5, 2.5)).tolist()
assert got == [True, True, True], (
    f"A share of 0.3 at a budget of 0.1 burns at 3 from the first minute on, with the minutes that there are; yours is {got}"
)
### BEGIN HIDDEN TESTS
_got = np.asarray(burning([2, 0], [4, 4], 0.5, 1, 1, 1.0)).tolist()
assert _got == [True, False], "At least `factor`: a rate equal to it counts"
_rng = np.random.default_rng(6)
for _n, _long, _short in ((1, 1, 1), (9, 4, 2), (50, 12, 3), (30, 60, 5)):
    _total = _rng.integers(0, 9, _n)
    _bad = _rng.binomial(_total, 0.3)
    _want = []
    for _t in range(_n):
        _rates = []
        for _w in (_long, _short):
            _s = slice(max(0, _t - _w + 1), _t + 1)
            _rates.append(_bad[_s].sum() / _total[_s].sum() / 0.2 if _total[_s].sum() else 0.0)
        _want.append(min(_rates) >= 1.4142)
    _got = np.asarray(burning(_bad.tolist(), _total.tolist(), 0.8, _long, _short, 1.4142)).tolist()
    assert _got == _want, (
        f"{_n} minutes, windows of {_long} and {_short}: a window ends with minute t and holds w minutes"
    )
### END HIDDEN TESTS

# %% check="burn-rate" points=1
with np.errstate(all="raise"):
    try:
        got = np.asarray(burning([0, 0, 0], [0, 0, 5], 0.99, 2, 1, 1.0)).tolist()
    except (FloatingPointError, ZeroDivisionError) as error:
        raise AssertionError("A window without requests burns nothing: rate 0, not a division by zero") from error
assert got == [False, False, False], f"Without requests, and without failures, there is no alarm; yours is {got}"
minutes = np.zeros(90)
minutes[10:40] = 6
got = np.flatnonzero(burning(minutes, np.full(90, 20), 0.99, 60, 5, 14.4))
assert len(got), "Half an hour with 30 % failures at a budget of 1 % must fire"
assert got[-1] <= 44, (
    f"The failures end with minute 39, and you fire until minute {got[-1]}: the short window, of five minutes, ends the alarm"
)
assert got[-1] >= 40, f"Windows look back, not ahead: minute 40 still has failures in both; yours ends at {got[-1]}"
### BEGIN HIDDEN TESTS
assert got[0] == 19, (
    f"The long window reaches 14.4 at minute 19, when 60 of 400 requests have failed; yours fires at {got[0]}"
)
assert np.asarray(burning([], [], 0.9, 2, 1, 1.0)).tolist() == [], "No minutes, no answers"
### END HIDDEN TESTS


# %% mistake="the long window only" of="burn-rate" says="yet you fire: both windows must burn"
def burning(bad, total, objective, long, short, factor):
    bad, total = np.asarray(bad, float), np.asarray(total, float)
    rate = lambda t, w: bad[max(0, t - w + 1) : t + 1].sum() / max(1, total[max(0, t - w + 1) : t + 1].sum())
    return np.array([rate(t, long) / (1 - objective) >= factor for t in range(len(bad))])


# %% mistake="either window" of="burn-rate" says="yet you fire: both windows must burn"
def burning(bad, total, objective, long, short, factor):
    bad, total = np.asarray(bad, float), np.asarray(total, float)
    rate = lambda t, w: bad[max(0, t - w + 1) : t + 1].sum() / max(1, total[max(0, t - w + 1) : t + 1].sum())
    return np.array([max(rate(t, long), rate(t, short)) / (1 - objective) >= factor for t in range(len(bad))])


# %% mistake="the short window only" of="burn-rate" says="Both must burn, so no alarm"
def burning(bad, total, objective, long, short, factor):
    bad, total = np.asarray(bad, float), np.asarray(total, float)
    rate = lambda t, w: bad[max(0, t - w + 1) : t + 1].sum() / max(1, total[max(0, t - w + 1) : t + 1].sum())
    return np.array([rate(t, short) / (1 - objective) >= factor for t in range(len(bad))])


# %% mistake="mean of the shares" of="burn-rate" says="divide the sums of the window"
def burning(bad, total, objective, long, short, factor):
    share = pd.Series(np.asarray(bad, float) / np.maximum(1, np.asarray(total, float)))
    rates = [share.rolling(w, min_periods=1).mean() / (1 - objective) for w in (long, short)]
    return ((rates[0] >= factor) & (rates[1] >= factor)).to_numpy()


# %% mistake="waits for full windows" of="burn-rate" says="with the minutes that there are"
def burning(bad, total, objective, long, short, factor):
    table = pd.DataFrame({"bad": bad, "total": total}, dtype=float)
    alarm = np.ones(len(table), bool)
    for w in (long, short):
        sums = table.rolling(w).sum()
        alarm &= (sums.bad / sums.total / (1 - objective) >= factor).to_numpy()
    return alarm


# %% mistake="forgets the budget" of="burn-rate" says="minute 2 only"
def burning(bad, total, objective, long, short, factor):
    table = pd.DataFrame({"bad": bad, "total": total}, dtype=float)
    alarm = np.ones(len(table), bool)
    for w in (long, short):
        sums = table.rolling(w, min_periods=1).sum()
        alarm &= (sums.bad / sums.total.clip(lower=1) >= factor).to_numpy()
    return alarm


# %% mistake="divides by no requests" of="burn-rate" says="not a division by zero"
def burning(bad, total, objective, long, short, factor):
    bad, total = np.asarray(bad, float), np.asarray(total, float)
    rate = lambda t, w: bad[max(0, t - w + 1) : t + 1].sum() / total[max(0, t - w + 1) : t + 1].sum()
    return np.array(
        [min(rate(t, long), rate(t, short)) / (1 - objective) >= factor for t in range(len(bad))], dtype=bool
    )


# %% mistake="adds up in place" of="burn-rate" says="burning changed the counts"
def burning(bad, total, objective, long, short, factor):
    bad, total = np.asarray(bad, float), np.asarray(total, float)
    sums = [np.concatenate([[0.0], np.cumsum(part, out=part)]) for part in (bad, total)]
    now, alarm = np.arange(len(bad)) + 1, np.ones(len(bad), bool)
    for w in (long, short):
        b, n = (part[now] - part[np.maximum(now - w, 0)] for part in sums)
        alarm &= b / np.maximum(n, 1) / (1 - objective) >= factor
    return alarm


# %% alternative="pandas" of="burn-rate"
def burning(bad, total, objective, long, short, factor):
    table = pd.DataFrame({"bad": np.asarray(bad, float), "total": np.asarray(total, float)})
    alarms = []
    for w in (long, short):
        sums = table.rolling(w, min_periods=1).sum()
        alarms.append((sums.bad / sums.total.where(sums.total > 0)).fillna(0) / (1 - objective) >= factor)
    return (alarms[0] & alarms[1]).to_numpy()


# %% [markdown]
# ## An incident
#
# You are on call. The pager went off; the dashboard is below. Beside it stands what people changed or announced in the two hours. Each line is somebody's theory.

# %%
requests_ = desk.spans[desk.spans.name == "request"]
minute = (requests_.end // 60).astype(int)
length = incident.SECONDS // 60
of_minute = lambda minutes: np.bincount(minutes, minlength=length)[:length]
total, failed = of_minute(minute), of_minute(minute[requests_.status == "error"])
alarm = burning(failed, total, 0.995, 60, 5, 14.4)
clock = np.arange(10, length + 1, 2)

fig, axes = plt.subplots(3, 1, figsize=(8.6, 5.6), sharex=True)
axes[0].plot(clock, [quantile(0.99, incident.REPLICAS, 60 * m, 300) for m in clock], color=COLOURS.before)
axes[0].set(title="The dashboard", ylabel="p99 (s)", yscale="log", ylim=(2, 500))
axes[1].plot(clock, [failed[m - 5 : m].sum() / total[m - 5 : m].sum() for m in clock], color=COLOURS.wrong)
axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
axes[1].set(ylabel="requests\nthat fail")
axes[2].plot(clock, [total[m - 5 : m].sum() / 5 for m in clock], color=COLOURS.before)
axes[2].set(ylabel="requests\na minute", xlabel="minute", ylim=(0, None))
for ax in axes:
    for number, when in enumerate(desk.changes.minute, 1):
        ax.axvline(when, color=COLOURS.other, lw=1, ls=":")
        if ax is axes[0]:
            ax.annotate(str(number), (when, 1), xycoords=("data", "axes fraction"), xytext=(2, -10),
                        textcoords="offset points", color=COLOURS.other, fontsize=9)  # fmt: skip
    fired = np.flatnonzero(alarm)
    ax.axvspan(fired[0], fired[-1], color=COLOURS.wrong, alpha=0.07, lw=0)
plt.show()
log = desk.changes.assign(minute=desk.changes.minute.round().astype(int))
log.index = pd.RangeIndex(1, len(log) + 1)
display(log.style.set_properties(**{"text-align": "left"}))
print(f"the pager went off at minute {fired[0]} (shaded: the burn rate is at least 14.4 over 60 and 5 minutes)")

# %% [markdown]
# `desk.spans` has a row for each span. The tree of a request: `request` (attributes `tenant`, `gateway`, `status`), below it one or two `attempt` (`replica`, `attempt`), and below each of these `retrieve` and `wait` (for the replica to be free), which run side by side, then `generate` (`adapter`, `template`, `input_tokens`, `output_tokens`) and `parse` (`status`). A tenant's requests go to one replica; a reply that does not parse is asked for once more.
#
# Where does the time of an attempt go? A span's **self time** is its duration without the time in which a child ran. Children that run side by side must not be subtracted twice, so what is subtracted is the *union* of their intervals.


# %%
def self_seconds(spans: pd.DataFrame) -> pd.Series:
    """Each span's duration minus the union of its children's intervals, by span id."""
    found = {row.span: row.end - row.start for row in spans.itertuples()}
    for parent, children in spans.dropna(subset="parent").sort_values("start").groupby("parent"):
        until = -math.inf
        for start, end in zip(children.start, children.end, strict=True):
            found[parent] -= max(0.0, end - max(start, until))
            until = max(until, end)
    return pd.Series(found)


example = requests_.assign(seconds=requests_.end - requests_.start).sort_values("seconds").iloc[-1]
rows = desk.spans[desk.spans.trace == example.trace]
shown = rows.assign(seconds=rows.end - rows.start, self_seconds=rows.span.map(self_seconds(rows)))
columns = ["name", "attempt", "replica", "seconds", "self_seconds", "adapter", "template", "output_tokens", "status"]
whole = dict.fromkeys(("attempt", "output_tokens"), "{:.0f}")
formatted = shown[columns].style.format(precision=1, na_rep="").format(whole, na_rep="")
display(formatted.hide(axis="index").set_caption("the slowest request"))
display(
    pd.Series(incident.CAUSES, name="what somebody in the room says")
    .to_frame()
    .style.set_properties(**{"text-align": "left"})
)

# %% [markdown]
# **Exercise.** Fill the dictionary `diagnosis` from queries over `desk.spans`, in this cell.
#
# - `"cause"`: the key of the right sentence in `incident.CAUSES`, shown above. Exactly one is the cause. For each of the others there is something in the spans that speaks against it.
# - `"replica"`: the name of the replica on which it happens.
# - `"since"`: the minute (a number; spans are in seconds) at which the first span that shows the cause began.
# - `"share"`: of the *requests* that began at or after that moment, the share with at least one `generate` span that shows the cause, whether or not its reply parsed.
# - `"tenants"`: the names of the tenants of such requests: the blast radius.
#
# The check objects to the first wrong entry with what speaks against it. *About 10 lines of queries.*
#
# <details><summary>Hint 1</summary>Who is different? Compare replicas before you compare times. Then compare the bad replica with itself, before and after. A cause must explain both.</details>
# <details><summary>Hint 2</summary>Attributes stand on different spans of a trace: merge parse (status) and generate (adapter, template, tokens) on their common parent, the attempt, which has the replica. Group by two attributes at a time; one alone is often innocent.</details>
# <details><summary>Hint 3</summary>generate.merge(parse, on="parent"), then groupby(["adapter", "template"]) of the status. Select the generate spans of the bad combination; start.min() / 60; the requests with start &gt;= that moment; trace.isin(bad.trace).mean(); the set of their tenants.</details>

# %% exercise="diagnosis" difficulty=4 minutes=14
diagnosis = {"cause": None, "replica": None, "since": None, "share": None, "tenants": None}
### BEGIN SOLUTION
generate = desk.spans[desk.spans.name == "generate"]
outcome = desk.spans[desk.spans.name == "parse"][["parent", "status"]]
both = generate.drop(columns="status").merge(outcome, on="parent")
both["replica"] = both.parent.map(attempts.set_index("span").replica)
unparsed = both.assign(unparsed=both.status == "error").groupby(["adapter", "template", "replica"]).unparsed
display(unparsed.agg(["size", "mean"]))
faulty = both[(both.adapter == "triage@6") & (both.template == "t3")]
later = requests_[requests_.start >= faulty.start.min()]
reached = later.trace.isin(faulty.trace)
diagnosis = {
    "cause": "skew",
    "replica": faulty.replica.mode()[0],
    "since": faulty.start.min() / 60,
    "share": reached.mean(),
    "tenants": set(later.tenant[reached]),
}
### END SOLUTION

# %% check="diagnosis" points=2
assert isinstance(diagnosis, dict), f"diagnosis is a dictionary; yours is a {type(diagnosis).__name__}"
unnamed = [key for key in ("cause", "replica", "since", "share", "tenants") if diagnosis.get(key) is None]
assert "cause" not in unnamed, f"diagnosis lacks {unnamed}: fill it from queries over desk.spans"
against = incident.objection(desk, cause=diagnosis["cause"])
assert not against, against
assert "replica" not in unnamed, f"diagnosis lacks {unnamed}: fill it from queries over desk.spans"
against = incident.objection(desk, replica=diagnosis["replica"])
assert not against, against

# %% check="diagnosis" points=1
assert diagnosis.get("since") is not None, "diagnosis lacks since: the minute at which it began"
against = incident.objection(desk, since=diagnosis["since"])
assert not against, against

# %% check="diagnosis" points=1
assert diagnosis.get("share") is not None, "diagnosis lacks share: which share of the requests it reached"
against = incident.objection(desk, share=diagnosis["share"])
assert not against, against
assert diagnosis.get("tenants") is not None, "diagnosis lacks tenants: the names of those whom it reached"
against = incident.objection(desk, tenants=diagnosis["tenants"])
assert not against, against

# %% mistake="the last deployment" of="diagnosis" says="a cause does not follow its effect"
diagnosis = {"cause": "deploy", "replica": "r3", "since": 63, "share": 1.0, "tenants": list(incident.TENANTS)}

# %% mistake="the peak of the traffic" of="diagnosis" says="traffic makes a queue longer that something else began"
diagnosis = {"cause": "traffic", "replica": "r3", "since": 55, "share": 0.5, "tenants": list(incident.TENANTS)}

# %% mistake="the new tenant" of="diagnosis" says="the other tenants of its replica fail as often"
diagnosis = {"cause": "tenant", "replica": "r3", "since": 36, "share": 0.1, "tenants": ["Norix"]}

# %% mistake="the symptom" of="diagnosis" says="look at first attempts only"
diagnosis = {"cause": "retries", "replica": "r3", "since": 41, "share": 0.3, "tenants": ["Norix"]}

# %% mistake="one half of the combination" of="diagnosis" says="What is different when it comes back?"
diagnosis = {"cause": "adapter", "replica": "r3", "since": 0, "share": 0.3, "tenants": ["Norix"]}

# %% mistake="the other half" of="diagnosis" says="two replicas serve t3"
diagnosis = {"cause": "template", "replica": "r3", "since": 22, "share": 0.3, "tenants": ["Norix"]}

# %% mistake="when the alarm fired" of="diagnosis" says="an alarm, a peak or a median comes after the beginning"
diagnosis = {"cause": "skew", "replica": "r3", "since": float(np.flatnonzero(alarm)[0]), "share": 0.3, "tenants": []}

# %% mistake="counts attempts" of="diagnosis" says="you count attempts"
_generate = desk.spans[desk.spans.name == "generate"]
_bad = _generate[(_generate.adapter == "triage@6") & (_generate.template == "t3")]
_since = _bad.start.min()
diagnosis = {
    "cause": "skew", "replica": "r3", "since": _since / 60,
    "share": len(_bad) / (_generate.start >= _since).sum(), "tenants": ["Norix"],
}  # fmt: skip

# %% mistake="divides by the whole time" of="diagnosis" says="divide by those that begin at or after"
_generate = desk.spans[desk.spans.name == "generate"]
_bad = _generate[(_generate.adapter == "triage@6") & (_generate.template == "t3")]
diagnosis = {
    "cause": "skew", "replica": "r3", "since": _bad.start.min() / 60,
    "share": _bad.trace.nunique() / len(requests_), "tenants": ["Norix"],
}  # fmt: skip

# %% mistake="only what failed for good" of="diagnosis" says="whose retry succeeded"
_generate = desk.spans[desk.spans.name == "generate"]
_bad = _generate[(_generate.adapter == "triage@6") & (_generate.template == "t3")]
_later = requests_[requests_.start >= _bad.start.min()]
diagnosis = {
    "cause": "skew", "replica": "r3", "since": _bad.start.min() / 60,
    "share": (_later.status == "error").mean(), "tenants": ["Norix"],
}  # fmt: skip

# %% mistake="one replica of three" of="diagnosis" says="one replica of three"
_generate = desk.spans[desk.spans.name == "generate"]
_bad = _generate[(_generate.adapter == "triage@6") & (_generate.template == "t3")]
diagnosis = {
    "cause": "skew", "replica": "r3", "since": _bad.start.min() / 60, "share": 1 / 3, "tenants": ["Norix"],
}  # fmt: skip

# %% mistake="a column for a name" of="diagnosis" says="replica is a name"
diagnosis = {
    "cause": "skew", "replica": desk.spans.replica[desk.spans.replica == "r3"].head(1), "since": 41, "share": 0.33,
    "tenants": ["Norix"],
}  # fmt: skip

# %% mistake="everybody" of="diagnosis" says="a blast radius ends somewhere"
_generate = desk.spans[desk.spans.name == "generate"]
_bad = _generate[(_generate.adapter == "triage@6") & (_generate.template == "t3")]
_later = requests_[requests_.start >= _bad.start.min()]
diagnosis = {
    "cause": "skew", "replica": "r3", "since": _bad.start.min() / 60,
    "share": _later.trace.isin(_bad.trace).mean(), "tenants": _later.tenant.unique(),
}  # fmt: skip

# %% alternative="one row a trace" of="diagnosis"
_by = desk.spans.pivot_table(index="trace", columns="name", values="start", aggfunc="first")
_tags = desk.spans.groupby("trace").agg(
    tenant=("tenant", "first"), replica=("replica", "first"), combos=("adapter", lambda a: set(a.dropna()))
)
_t3 = desk.spans[desk.spans.template == "t3"]
_old = _t3[_t3.adapter.str.endswith("6", na=False)]
_from = float(_old.start.min())
_mask = _by.request >= _from
_ours = _tags.index.isin(_old.trace.unique())
diagnosis = {
    "cause": "skew",
    "replica": str(_tags.replica[_ours].iloc[0]),
    "since": round(_from / 60, 1),
    "share": float((_ours & _mask.reindex(_tags.index).to_numpy()).sum() / _mask.sum()),
    "tenants": sorted(_tags.tenant[_ours].unique()),
}

# %% [markdown]
# The timeline, as it would stand in the report that follows an incident. What is drawn is by replica, which the dashboard was not.

# %%
fig, axes = plt.subplots(3, 1, figsize=(8.6, 6.4), sharex=True)
named = {name: COLOURS.wrong if name == diagnosis["replica"] else COLOURS.before for name in incident.REPLICAS}
for name, colour in named.items():
    axes[0].plot(clock, [quantile(0.99, [name], 60 * m, 300) for m in clock], color=colour, label=name)
    ok, error = (
        np.array([grown("attempts_total", [name], 60 * m, 300, outcome=kind) for m in clock])
        for kind in ("ok", "error")
    )
    tokens_out = np.array([grown("output_tokens_total", [name], 60 * m, 300) for m in clock])
    axes[1].plot(clock, tokens_out / (ok + error), color=colour, label=name)
    axes[2].plot(clock, error / (ok + error), color=colour, label=name)
axes[0].set(yscale="log", ylabel="p99 (s)", title="One replica, from one minute on")
axes[1].set(ylabel="tokens a reply")
axes[2].set(ylabel="replies that\ndo not parse", xlabel="minute")
axes[2].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
for ax in axes:
    ax.axvline(diagnosis["since"], color=COLOURS.truth, lw=1.5)
    ax.axvline(fired[0], color=COLOURS.wrong, lw=1.5, ls="--")
direct_label(axes[1], diagnosis["since"], 50, f"it begins, {diagnosis['since']:.0f}", COLOURS.truth, offset=(-78, 0))
direct_label(axes[1], fired[0], 45, f"the pager, {fired[0]}", COLOURS.wrong)
label_lines(axes[0], gap=0.13)
plt.show()

generated = desk.spans.query("name == 'generate'")
began = 60 * diagnosis["since"]
price_in, price_out = 0.5e-6, 2e-6  # euros a token, of a price list
spent = generated.input_tokens * price_in + generated.output_tokens * price_out
for name, rows in (("before", requests_.start < began), ("after", requests_.start >= began)):
    mine = requests_[rows]
    answered = (mine.status == "ok").sum()
    cost = spent[generated.trace.isin(mine.trace)].sum()
    print(f"{name}: {1000 * cost / answered:.3f} euros for a thousand answered requests")
    card.record(f"cost_{name}", 1000 * cost / answered, format=".3f", unit="euros",
                label=f"cost of 1,000 answered requests, {name} the fault")  # fmt: skip
rate = failed[int(diagnosis["since"]) + 1 :].sum() / total[int(diagnosis["since"]) + 1 :].sum() / 0.005
card.record("since", diagnosis["since"], format=".0f", label="minute at which the incident began")
card.record("paged", int(fired[0]), format="d", label="minute at which the burn rate paged")
card.record("share", diagnosis["share"], format=".0%", label="requests that the fault reached")
card.record("burn", rate, format=".0f", label="burn rate of the error budget during the incident")
card.record(
    "budget_days", 30 / rate, format=".1f", unit="days", label="time in which it would burn the budget of 30 days"
)

# %% [markdown]
# The replica came back from maintenance with the adapter of last week, which knows nothing of the prompt template that replaced the old one in between. It does not find the end of its reply; the reply is cut off at 96 tokens, does not parse, and is asked for again. So three things rise together: tokens, errors and, since the replica serves one at a time, the queue. The campaign made the queue visible, and gateway 2.4 came when people had begun to look.
#
# The burn rate during the incident is {{burn}}: the budget of 30 days would last {{budget_days}} days. The pager went off at minute {{paged}}, after the beginning at {{since}}; the long window still held healthy minutes. A thousand answered requests cost {{cost_after}} euros instead of {{cost_before}}: cost *per answer* is the number to watch, since cost per request hides the retries that lead nowhere.
#
# What would have found it in a minute: the adapter's and the template's version as attributes on every `generate` span, which they were, and a panel that groups by both, which nobody had. What would have prevented it: a version that is checked when a replica starts, not when it is rolled out.
#
# ## Drift, and what a rule of thumb is worth
#
# Now the service works, and the tickets change. A **drift alarm** compares a batch, here a day's tickets, with a reference from a time when the model was known to be good.
#
# The population stability index (PSI) compares a number's histogram. Cut the reference into bins by its own quantiles; let $p_i$ be the reference's share of bin $i$ and $q_i$ the batch's:
#
# $$\mathrm{PSI} = \sum_i (q_i - p_i) \ln \frac{q_i}{p_i}$$
#
# Banks read it by a rule: below 0.1 is no change, above 0.25 a major one. But PSI has a distribution on clean days too. With $B$ bins, $n$ reference and $m$ batch values it is about $\left(\frac1n + \frac1m\right)$ times a chi-square variable with $B - 1$ degrees of freedom (Yurdakul, 2018). A rule without $n$ and $m$ in it cannot be a test.
#
# **Exercise.** Write two functions and a prediction.
#
# `psi(reference, batch, bins=10, floor=1e-4)`. The inner edges are the quantiles of the reference at `1/bins`, `2/bins`, …, `(bins-1)/bins` (`np.quantile`'s default), of which only those strictly between the reference's smallest and largest value count, each once. A value *equal* to an edge belongs to the bin below it. A share of 0 is replaced by `floor`; nothing is renormalised. Return a float. For `reference = range(1, 101)`, `batch = [10, 60, 70, 80]` and `bins=2` it is 0.25 ln 2 + 0.25 ln 1.5 = 0.2747.
#
# `psi_limit(n, m, bins, alarm)`: the value that a clean PSI exceeds with probability `alarm` by the formula above. `psi_limit(500, 100, 10, 0.01)` is 0.26.
#
# *Predict* `predicted_rule`: on which share of clean days, with a reference of 384 ticket lengths and 48 tickets a day, does PSI with ten bins exceed 0.25? *About 10 lines.*
#
# <details><summary>Hint 1</summary>Whose quantiles are the edges, and which side does an edge belong to? For the prediction: the mean of a chi-square variable is its degrees of freedom.</details>
# <details><summary>Hint 2</summary>np.searchsorted(edges, values, side="left") puts a value equal to an edge below it. np.bincount with minlength counts; divide by the number of values.</details>
# <details><summary>Hint 3</summary>edges = np.unique of the inner quantiles within the range; p, q = two histograms with np.where(share == 0, floor, share); the sum. The limit is chi2.ppf(1 - alarm, bins - 1) * (1/n + 1/m).</details>

# %% exercise="psi" difficulty=2 minutes=9
predicted_rule = None
### BEGIN SOLUTION
predicted_rule = 0.6
### END SOLUTION


def psi(reference: ArrayLike, batch: ArrayLike, bins: int = 10, floor: float = 1e-4) -> float:
    """The population stability index of a batch against a reference, over bins of the reference's quantiles."""
    ### BEGIN SOLUTION
    known, new = np.asarray(reference, float), np.asarray(batch, float)
    inner = np.unique(np.quantile(known, np.arange(1, bins) / bins))
    inner = inner[(inner > known.min()) & (inner < known.max())]
    parts = [np.bincount(np.searchsorted(inner, x), minlength=len(inner) + 1) / len(x) for x in (known, new)]
    p, q = (np.where(part == 0, floor, part) for part in parts)
    return float(((q - p) * np.log(q / p)).sum())
    ### END SOLUTION


def psi_limit(n: int, m: int, bins: int, alarm: float) -> float:
    """What the PSI of m clean values against n exceeds with probability `alarm`, about."""
    ### BEGIN SOLUTION
    return float(chi2.ppf(1 - alarm, bins - 1) * (1 / n + 1 / m))
    ### END SOLUTION


# %% check="psi" points=2
hundred = list(range(1, 101))
got = psi(hundred, [10, 60, 70, 80], bins=2)
assert abs(got - 0.274653) < 1e-5, f"The example of the statement is 0.2747; yours is {got}"
got = psi(hundred, [10, 20, 30, 40], bins=2)
want = (1 - 0.5) * math.log(2) + (1e-4 - 0.5) * math.log(1e-4 / 0.5)
assert np.isfinite(got), f"A bin that is empty in the batch has the share floor, 0.0001; yours gives {got}"
assert abs(got - want) < 1e-6, (
    f"A share of 0 is replaced by floor, other shares stay: {want:.4f}; yours is {got:.4f}. Nothing is added to full bins, "
    "and empty bins are not left out"
)
got = psi([1, 2, 3, 4], [2, 2, 2, 3], bins=4)
want = psi([1, 2, 3, 4], [1.9, 1.9, 1.9, 2.9], bins=4)
assert abs(got - want) < 1e-9, "The median of 1, 2, 3, 4 is 2.5, and 2 lies below it: use np.quantile's default"
got = psi([0, 1, 2, 3, 4], [2, 2, 2, 3], bins=2)
want = (0.75 - 0.6) * math.log(0.75 / 0.6) + (0.25 - 0.4) * math.log(0.25 / 0.4)
assert abs(got - want) < 1e-9, (
    f"The edge is 2, and values equal to an edge belong to the bin below it: {want:.4f}; yours is {got:.4f}"
)
rng = np.random.default_rng(0)
wide = psi(rng.normal(0, 1, 5000), rng.normal(0, 1, 5000) * 1.0 + 20)
assert wide > 5, (
    f"A batch outside the reference's range has drifted as far as it can: the outermost bins are open; yours is {wide:.2f}"
)
skew = psi([1, 1, 1, 2, 3, 9], [1, 2, 3, 9], bins=3)
want = (0.5 - 4 / 6) * math.log(0.5 / (4 / 6)) + (0.5 - 2 / 6) * math.log(0.5 / (2 / 6))
assert np.isfinite(skew), f"Equal quantiles are one edge; yours gives {skew}"
assert abs(skew - want) < 1e-9, (
    "One third of the reference is its smallest value, 1, and such a quantile is no edge: only those strictly between the "
    f"smallest and the largest value count, here 2.33; {want:.4f}, yours is {skew:.4f}"
)
top = psi([1, 2, 9, 9, 9], [1, 2, 9, 10], bins=2)
assert abs(top) < 1e-9, (
    f"The median of the reference is its largest value, 9, so no edge is left and PSI is 0; yours is {top}"
)
got = psi([1, 2, 3, 4], [1, 1, 1, 4], bins=2, floor=0.3)
want = (0.75 - 0.5) * math.log(0.75 / 0.5) + (0.25 - 0.5) * math.log(0.25 / 0.5)
assert abs(got - want) < 1e-9, (
    f"Only a share of 0 becomes floor; 0.25 stays below a floor of 0.3: {want:.4f}; yours is {got:.4f}"
)
gap = psi([1, 10], [5, 6], bins=4)
want = 4 * (0.5 - 1e-4) * math.log(0.5 / 1e-4)
assert np.isfinite(gap), f"The reference can have empty bins, too: their share is floor; yours gives {gap}"
assert abs(gap - want) < 1e-6, (
    f"Empty bins of the reference have the share floor as well: {want:.3f}; yours is {gap:.3f}"
)
mixed, other = np.array([4.0, 1, 3, 2]), np.array([2.0, 1])
psi(mixed, other, bins=2)
assert (mixed.tolist(), other.tolist()) == ([4, 1, 3, 2], [2, 1]), (
    "psi changed the values that it was given: sort a copy"
)
assert psi(hundred, hundred) < 1e-9, "The reference against itself is 0: take the edges from the reference, once"
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(7)
for _n, _m, _bins, _shift, _round in (
    (50, 40, 5, 0.0, 9),
    (400, 32, 10, 0.5, 9),
    (300, 200, 10, 0.2, 0),
    (200, 80, 20, 0, 1),
):
    _x, _y = np.round(_rng.gamma(3, 2, _n), _round), np.round(_rng.gamma(3, 2, _m) + _shift, _round)
    _tool = DropHighPSIFeatures(
        split_col="part", cut_off=0, bins=_bins, min_pct_empty_bins=1e-4, variables=["x"], threshold=99
    )
    _tool.cut_off = [0]
    _tool.fit(pd.DataFrame({"x": np.concatenate([_x, _y]), "part": [0] * _n + [1] * _m, "other": 1.0}))
    _got, _want = psi(_x, _y, bins=_bins), _tool.psi_values_["x"]
    assert abs(_got - _want) < 1e-9, (
        f"feature_engine gives {_want:.6f} for {_n} and {_m} values and {_bins} bins; yours is {_got:.6f}"
    )
_floor = psi(hundred, [10, 20, 30, 40], bins=2, floor=0.01)
assert abs(_floor - (0.5 * math.log(2) + (0.01 - 0.5) * math.log(0.02))) < 1e-9, "floor is a parameter"
assert abs(psi(np.array([5.0, 1, 3, 2, 4]), [2.5], bins=2) - psi([1, 2, 3, 4, 5], np.array([2.5]), bins=2)) < 1e-12, (
    "Order plays no part"
)
### END HIDDEN TESTS

# %% check="psi" points=1
assert predicted_rule is not None, "Write your prediction down first: predicted_rule = a share from 0 to 1"
assert isinstance(predicted_rule, int | float | np.number), (
    f"predicted_rule is a number from 0 to 1; yours is {predicted_rule!r}"
)
assert 0 <= predicted_rule <= 1, f"A share lies from 0 to 1; yours is {predicted_rule}"
limit = psi_limit(500, 100, 10, 0.01)
assert abs(limit - 0.278509) > 1e-4, "Ten bins have nine degrees of freedom: their shares sum to one"
assert abs(limit - 0.259992) < 1e-4, f"For 500 and 100 values, 10 bins and 1 % it is 0.26; yours is {limit:.4f}"
assert psi_limit(500, 100, 10, 0.001) > limit, "Fewer false alarms need a higher limit: the quantile at 1 - alarm"
assert psi_limit(500, 1000, 10, 0.01) < limit, "More values, a lower limit: the factor is 1/n + 1/m"
### BEGIN HIDDEN TESTS
for _n, _m, _bins, _alarm in ((384, 32, 10, 0.01), (10**6, 10**6, 10, 0.05), (100, 100, 2, 0.5)):
    _want = chi2.isf(_alarm, _bins - 1) * (_n + _m) / (_n * _m)
    assert abs(psi_limit(_n, _m, _bins, _alarm) - _want) < 1e-9 + 1e-6 * _want, f"n = {_n}, m = {_m}: {_want}"
### END HIDDEN TESTS


# %% mistake="bins of equal width" of="psi" says="belong to the bin below it"
predicted_rule = 0.5


def psi(reference, batch, bins=10, floor=1e-4):
    inner = np.unique(np.quantile(reference, np.arange(1, bins) / bins))
    p, q = (np.bincount(np.digitize(x, inner), minlength=len(inner) + 1) / len(x) for x in (reference, batch))
    p, q = np.maximum(p, floor), np.maximum(q, floor)
    return float(np.sum((q - p) * np.log(q / p)))


def psi_limit(n, m, bins, alarm):
    return chi2.ppf(1 - alarm, bins - 1) * (1 / n + 1 / m)


# %% mistake="closed outer bins" of="psi" says="the outermost bins are open"
predicted_rule = 0.5


def psi(reference, batch, bins=10, floor=1e-4):
    edges = np.quantile(reference, np.linspace(0, 1, bins + 1))
    cut = lambda x: pd.cut(np.asarray(x, float), np.unique(edges), include_lowest=True).value_counts().to_numpy()
    counts = [cut(x) for x in (reference, batch)]
    p, q = (np.maximum(c / max(1, c.sum()), floor) for c in counts)
    if not counts[1].sum():
        return 0.0
    return float(np.sum((q - p) * np.log(q / p)))


def psi_limit(n, m, bins, alarm):
    return chi2.ppf(1 - alarm, bins - 1) * (1 / n + 1 / m)


# %% mistake="empty bins explode" of="psi" says="has the share floor"
predicted_rule = 0.5


def psi(reference, batch, bins=10, floor=1e-4):
    with np.errstate(all="ignore"):
        inner = np.unique(np.quantile(reference, np.arange(1, bins) / bins))
        p, q = (np.bincount(np.searchsorted(inner, x), minlength=len(inner) + 1) / len(x) for x in (reference, batch))
        return float(np.sum((q - p) * np.log(q / p)))


def psi_limit(n, m, bins, alarm):
    return chi2.ppf(1 - alarm, bins - 1) * (1 / n + 1 / m)


# %% mistake="leaves empty bins out" of="psi" says="empty bins are not left out"
predicted_rule = 0.5


def psi(reference, batch, bins=10, floor=1e-4):
    inner = np.unique(np.quantile(reference, np.arange(1, bins) / bins))
    p, q = (np.bincount(np.searchsorted(inner, x), minlength=len(inner) + 1) / len(x) for x in (reference, batch))
    keep = (p > 0) & (q > 0)
    return float(np.sum((q - p)[keep] * np.log(q[keep] / p[keep])))


def psi_limit(n, m, bins, alarm):
    return chi2.ppf(1 - alarm, bins - 1) * (1 / n + 1 / m)


# %% mistake="edges from the batch" of="psi" says="The example of the statement is 0.2747"
predicted_rule = 0.5


def psi(reference, batch, bins=10, floor=1e-4):
    inner = np.unique(np.quantile(np.concatenate([reference, batch]), np.arange(1, bins) / bins)) + 5
    p, q = (np.bincount(np.searchsorted(inner, x), minlength=len(inner) + 1) / len(x) for x in (reference, batch))
    p, q = np.maximum(p, floor), np.maximum(q, floor)
    return float(np.sum((q - p) * np.log(q / p)))


def psi_limit(n, m, bins, alarm):
    return chi2.ppf(1 - alarm, bins - 1) * (1 / n + 1 / m)


# %% mistake="an edge at the smallest value" of="psi" says="such a quantile is no edge"
predicted_rule = 0.5


def psi(reference, batch, bins=10, floor=1e-4):
    inner = np.unique(np.quantile(reference, np.arange(1, bins) / bins))
    p, q = (np.bincount(np.searchsorted(inner, x), minlength=len(inner) + 1) / len(x) for x in (reference, batch))
    p, q = np.maximum(p, floor), np.maximum(q, floor)
    return float(np.sum((q - p) * np.log(q / p)))


def psi_limit(n, m, bins, alarm):
    return chi2.ppf(1 - alarm, bins - 1) * (1 / n + 1 / m)


# %% mistake="Kullback and Leibler" of="psi" says="The example of the statement is 0.2747"
predicted_rule = 0.5


def psi(reference, batch, bins=10, floor=1e-4):
    inner = np.unique(np.quantile(reference, np.arange(1, bins) / bins))
    p, q = (np.bincount(np.searchsorted(inner, x), minlength=len(inner) + 1) / len(x) for x in (reference, batch))
    p, q = np.maximum(p, floor), np.maximum(q, floor)
    return float(np.sum(q * np.log(q / p)))


def psi_limit(n, m, bins, alarm):
    return chi2.ppf(1 - alarm, bins - 1) * (1 / n + 1 / m)


# %% mistake="ten degrees of freedom" of="psi" says="nine degrees of freedom"
predicted_rule = 0.5


def psi(reference, batch, bins=10, floor=1e-4):
    x, y = np.asarray(reference, float), np.asarray(batch, float)
    inner = np.unique(np.quantile(x, np.arange(1, bins) / bins))
    inner = inner[(inner > x.min()) & (inner < x.max())]
    p, q = (np.bincount(np.searchsorted(inner, v), minlength=len(inner) + 1) / len(v) for v in (x, y))
    p, q = np.maximum(p, floor), np.maximum(q, floor)
    return float(np.sum((q - p) * np.log(q / p)))


def psi_limit(n, m, bins, alarm):
    return chi2.ppf(1 - alarm, bins) * (1 / n + 1 / m)


# %% mistake="floor as a minimum" of="psi" says="Only a share of 0 becomes floor"
predicted_rule = 0.35


def psi(reference, batch, bins=10, floor=1e-4):
    r, b = np.asarray(reference, float), np.asarray(batch, float)
    edges = np.unique(np.quantile(r, np.arange(1, bins) / bins))
    edges = edges[(edges > r.min()) & (edges < r.max())]

    def shares(x):
        s = np.bincount(np.searchsorted(edges, x, side="left"), minlength=len(edges) + 1) / len(x)
        return np.maximum(s, floor)

    p, q = shares(r), shares(b)
    return float(np.sum((q - p) * np.log(q / p)))


def psi_limit(n, m, bins, alarm):
    return float(chi2.isf(alarm, bins - 1) * (1 / n + 1 / m))


# %% mistake="an edge at the largest value" of="psi" says="no edge is left"
predicted_rule = 0.35


def psi(reference, batch, bins=10, floor=1e-4):
    r, b = np.asarray(reference, float), np.asarray(batch, float)
    edges = np.unique(np.quantile(r, np.arange(1, bins) / bins))
    edges = edges[edges > r.min()]

    def shares(x):
        s = np.bincount(np.searchsorted(edges, x, side="left"), minlength=len(edges) + 1) / len(x)
        return np.where(s == 0, floor, s)

    p, q = shares(r), shares(b)
    return float(np.sum((q - p) * np.log(q / p)))


def psi_limit(n, m, bins, alarm):
    return float(chi2.isf(alarm, bins - 1) * (1 / n + 1 / m))


# %% mistake="a floor for the batch only" of="psi" says="The reference can have empty bins"
predicted_rule = 0.35


def psi(reference, batch, bins=10, floor=1e-4):
    r, b = np.asarray(reference, float), np.asarray(batch, float)
    edges = np.unique(np.quantile(r, np.arange(1, bins) / bins))
    edges = edges[(edges > r.min()) & (edges < r.max())]

    def shares(x):
        s = np.bincount(np.searchsorted(edges, x, side="left"), minlength=len(edges) + 1) / len(x)
        return np.where(s == 0, floor, s)

    with np.errstate(all="ignore"):
        p, q = np.bincount(np.searchsorted(edges, r), minlength=len(edges) + 1) / len(r), shares(b)
        return float(np.sum((q - p) * np.log(q / p)))


def psi_limit(n, m, bins, alarm):
    return float(chi2.isf(alarm, bins - 1) * (1 / n + 1 / m))


# %% mistake="sorts what it gets" of="psi" says="psi changed the values"
predicted_rule = 0.35


def psi(reference, batch, bins=10, floor=1e-4):
    for part in (reference, batch):
        if hasattr(part, "sort"):
            part.sort()
    r, b = np.asarray(reference, float), np.asarray(batch, float)
    edges = np.unique(np.quantile(r, np.arange(1, bins) / bins))
    edges = edges[(edges > r.min()) & (edges < r.max())]

    def shares(x):
        s = np.bincount(np.searchsorted(edges, x, side="left"), minlength=len(edges) + 1) / len(x)
        return np.where(s == 0, floor, s)

    p, q = shares(r), shares(b)
    return float(np.sum((q - p) * np.log(q / p)))


def psi_limit(n, m, bins, alarm):
    return float(chi2.isf(alarm, bins - 1) * (1 / n + 1 / m))


# %% alternative="pandas.cut" of="psi"
predicted_rule = 1


def psi(reference, batch, bins=10, floor=1e-4):
    reference = pd.Series(np.asarray(reference, float))
    cuts = reference.quantile([i / bins for i in range(1, bins)])
    cuts = sorted({c for c in cuts if reference.min() < c < reference.max()})
    edges = [-np.inf, *cuts, np.inf]
    total = 0.0
    p = pd.cut(reference, edges).value_counts(normalize=True, sort=False)
    q = pd.cut(pd.Series(np.asarray(batch, float)), edges).value_counts(normalize=True, sort=False)
    for a, b in zip(p, q, strict=True):
        a, b = a or floor, b or floor
        total += (b - a) * math.log(b / a)
    return total


def psi_limit(n, m, bins, alarm):
    return chi2.isf(alarm, df=bins - 1) * (n + m) / n / m


# %% [markdown]
# The service has {{customers}} customers, each with products of its own. A day's 48 tickets come from four of them, twelve each: customers write when something is up. Eight other tickets of each customer are the reference. Nothing has changed on any of the days below.

# %%
PER_DAY, EACH = 4, 12  # customers that write on a day, and tickets of each
seeds = [LESSON_SEEDS[4_500 + 100 * seed + i] for i in range(customers)]
reference = [ticket for s in seeds for ticket in World(s).tickets(8, part="train")]
desk_tickets = [World(s).tickets(16, part="test") for s in seeds]  # what customers write on later days


def draw_days(
    count: int, rows: np.ndarray, rng: np.random.Generator, *, who: int = PER_DAY, each: int = EACH
) -> np.ndarray:
    """Row numbers of the tickets of each day, (count, who * each), from rows (customers, tickets)."""
    found = []
    for _ in range(count):
        chosen = rng.choice(len(rows), who, replace=False)
        found.append(np.concatenate([rng.choice(rows[c], each, replace=False) for c in chosen]))
    return np.array(found)


def share(values: ArrayLike) -> tuple[float, float, float]:
    """A share and its 95 % Wilson interval."""
    return float(np.mean(values)), *interval(np.asarray(values, bool))


rng = np.random.default_rng(seed)
lengths_ref = np.array([len(ticket.text) for ticket in reference])
lengths = np.array([[len(ticket.text) for ticket in tickets] for tickets in desk_tickets]).ravel()
clean = draw_days(2 * days, np.arange(lengths.size).reshape(customers, -1), rng)
psi_clean = np.array([psi(lengths_ref, lengths[day]) for day in clean])
many = np.array(
    [psi(lengths_ref, rng.choice(lengths, PER_DAY * EACH, replace=False)) for _ in range(days)]
)  # one by one
n, m = len(lengths_ref), PER_DAY * EACH
limit = psi_limit(n, m, 10, 0.01)
rule = share(psi_clean > 0.25)

tool = DropHighPSIFeatures(split_col="day", cut_off=[0], bins=10, variables=["length"], threshold="auto", p_value=0.01)
frame = pd.DataFrame({"length": np.concatenate([lengths_ref, lengths[clean[0]]]), "day": [0] * n + [1] * m, "x": 1})
tool.fit(frame)
print(f"one day: yours {psi_clean[0]:.6f}, feature_engine {tool.psi_values_['length']:.6f}")

fig, ax = plt.subplots(figsize=(7.6, 3.8))
grid = np.linspace(0, 1.6, 300)
scale = (n + m) / (n * m)
density = chi2.pdf(grid / scale, 9) / scale
ax.hist(np.minimum(psi_clean, 1.6), bins=60, range=(0, 1.6), density=True, color=COLOURS.before, alpha=0.4)
ax.plot(grid, density, color=COLOURS.truth)
direct_label(ax, 0.27, 2.6, "scaled\n$\\chi^2$", COLOURS.truth)
for x, text in ((0.25, "rule: 0.25"), (limit, "chi-square, 1 %"), (np.quantile(psi_clean, 0.99), "1 % of days")):
    ax.axvline(x, color=COLOURS.wrong, lw=1.5, ls="--")
    ax.annotate(text, (x, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -12), textcoords="offset points",
                color=COLOURS.wrong, fontsize=9)  # fmt: skip
ax.set(xlabel="PSI of the ticket lengths of a clean day", ylabel="density", title="PSI when nothing has changed")
plt.show()
chi_false = share(psi_clean > limit)
iid_false = share(many > limit)
psi_coarse = np.array([psi(lengths_ref, lengths[day], bins=4) for day in clean])
coarse_false = share(psi_coarse > psi_limit(n, m, 4, 0.01))
print(
    f"limit at 1 % by chi-square: {limit:.2f}; exceeded on {chi_false[0]:.1%} of clean days, {iid_false[0]:.1%} of iid ones"
)
print(f"with four bins: exceeded on {coarse_false[0]:.1%}")
compare([("clean days above 0.25", predicted_rule, rule[0])], format=".0%")
for name, found, label in (
    ("psi_rule", rule, "clean days on which PSI exceeds 0.25"),
    ("psi_chi", chi_false, "clean days above the chi-square limit of 1 %, ten bins"),
    ("psi_iid", iid_false, "the same for tickets drawn one by one"),
    ("psi_coarse", coarse_false, "clean days above the chi-square limit of 1 %, four bins"),
):
    card.record(name, found[0], low=found[1], high=found[2], format=".1%", tolerance=0.02, label=label)
card.record("customers", customers, format="d", label="customers of the service")

# %% [markdown]
# The rule of thumb alarms on {{psi_rule}} of clean days: with 48 values in ten bins a PSI of 0.2 is what chance gives in the mean. With a million values the same 0.25 lies far beyond chance, and shifts below it go unseen. The chi-square limit knows $n$ and $m$, and still alarms on {{psi_chi}} instead of 1 %. The second hump in the figure says why: with five values expected in a bin, now and then one is empty, and an empty bin counts by `floor`, a number that somebody chose. For tickets drawn one by one it is nearly as bad ({{psi_iid}}), so the customers are not to blame. With four bins it is {{psi_coarse}}. (feature_engine's `threshold="auto"` is this limit. Evidently 0.7, which many teams use, does not import under the pinned pandas 3.1.)
#
# ## Drift in what a text says
#
# Length is one number. To compare texts, embed them, and compare two clouds of vectors. The squared **maximum mean discrepancy** (Gretton et al., 2012) is the squared distance of the two clouds' means in the feature space of a kernel $k$. Its unbiased estimate from $x_1 \dots x_n$ and $y_1 \dots y_m$:
#
# $$\widehat{\mathrm{MMD}}^2 = \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j) - \frac{2}{nm} \sum_{i, j} k(x_i, y_j)$$
#
# With $k(x, y) = e^{-\gamma \lVert x - y \rVert^2}$ it is 0 in expectation only if the distributions are equal. $\gamma$ is fixed once, by the reference: one over the median of its squared distances. A $\gamma$ from each batch would be a ruler that stretches with what it measures.
#
# A score becomes an alarm through a sample of what it looks like when nothing has changed, the *null*. The p-value of a score counts itself in: $(1 + \#\{\text{null} \ge \text{score}\}) / (1 + \#\text{null})$. So it is never 0, and with 50 null scores no alarm at 1 % is possible.
#
# **Exercise.** Write both, and a prediction.
#
# `mmd2(kxx, kyy, kxy)` from the three kernel matrices, `(n, n)`, `(m, m)` and `(n, m)`, `n, m >= 2`; a float. For `kxx = [[1, .5], [.5, 1]]`, `kyy = [[1, .2], [.2, 1]]` and `kxy` all 0.3 it is 0.5 + 0.2 − 0.6 = 0.1. Use array operations: it is called some ten thousand times below.
#
# `p_values(scores, null)`: an array with the p-value of each score. Nulls `[1, 2, 3, 4]` give the scores `[5, 2.5, 0]` the p-values `[0.2, 0.6, 1.0]`.
#
# *Predict* `predicted_naive`. A permutation test takes its null from the same clean tickets, shuffled: some are called "reference" and 48 "the day", over and over. At a level of 1 %, on which share of clean days does it alarm? *About 6 lines.*
#
# <details><summary>Hint 1</summary>Which terms of a sum over all pairs do not belong to i ≠ j, and what is the kernel there? What does shuffling tickets assume about a day's tickets?</details>
# <details><summary>Hint 2</summary>Take the trace from the sum of kxx and kyy, and divide by n (n - 1). In kxy all pairs count. Compare scores[:, None] with null[None, :].</details>
# <details><summary>Hint 3</summary>off = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)); off(kxx) + off(kyy) - 2 * kxy.mean(). And (1 + (null &gt;= scores[:, None]).sum(1)) / (1 + len(null)).</details>

# %% exercise="mmd-alarm" difficulty=3 minutes=9
predicted_naive = None
### BEGIN SOLUTION
predicted_naive = 0.15
### END SOLUTION


def mmd2(kxx: ArrayLike, kyy: ArrayLike, kxy: ArrayLike) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy, from kernel matrices."""
    ### BEGIN SOLUTION
    xx, yy, xy = (np.asarray(k, float) for k in (kxx, kyy, kxy))
    n, m = xy.shape
    inside = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(inside - 2 * xy.mean())
    ### END SOLUTION


def p_values(scores: ArrayLike, null: ArrayLike) -> NDArray[np.float64]:
    """The p-value of each score, (k,), from scores of the null, (n,): large scores speak against it."""
    ### BEGIN SOLUTION
    values, ordered = np.asarray(scores, float), np.sort(np.asarray(null, float))
    at_least = len(ordered) - np.searchsorted(ordered, values, side="left")
    return (1 + at_least) / (1 + len(ordered))
    ### END SOLUTION


# %% check="mmd-alarm" points=2
got = mmd2([[1, 0.5], [0.5, 1]], [[1, 0.2], [0.2, 1]], [[0.3, 0.3], [0.3, 0.3]])
assert abs(got - (0.75 + 0.6 - 0.6)) > 1e-6, (
    "You count pairs i = j: the kernel of a vector with itself is 1 and says nothing. Leave out the diagonals of kxx and kyy"
)
assert abs(got - 0.1) < 1e-9, f"The example of the statement is 0.1; yours is {got}"
rng = np.random.default_rng(2)
x, y = rng.normal(size=(6, 3)), rng.normal(size=(9, 3))
want = 0.0
for a, b in ((x, x), (y, y)):
    want += np.mean([rbf_kernel(a[[i]], b[[j]], 0.2)[0, 0] for i in range(len(a)) for j in range(len(b)) if i != j])
want -= 2 * np.mean(rbf_kernel(x, y, 0.2))
before = [rbf_kernel(x, gamma=0.2), rbf_kernel(y, gamma=0.2), rbf_kernel(x, y, 0.2)]
copies = [k.copy() for k in before]
got = mmd2(*before)
assert abs(got - want) < 1e-9, (
    f"For 6 and 9 vectors it is {want:.6f}: all pairs of kxy count, also i = j, and the means have their own numbers of "
    f"pairs; yours is {got:.6f}"
)
assert all(np.array_equal(k, kept) for k, kept in zip(before, copies, strict=True)), (
    "Do not change the matrices you get"
)
low = mmd2(np.eye(2), np.eye(2), np.full((2, 2), 0.3))
assert abs(low + 0.6) < 1e-9, (
    f"An unbiased estimate of 0 is negative half of the time: here -0.6. Neither clip it nor take its root; yours is {low}"
)
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(5)
for _n, _m in ((2, 2), (2, 7), (30, 5)):
    _a, _b = _rng.normal(size=(_n, 4)), _rng.normal(size=(_m, 4)) + 0.5
    _k = lambda _u, _v: np.exp(-0.3 * ((_u[:, None] - _v[None]) ** 2).sum(-1))
    _want = (
        (_k(_a, _a).sum() - _n) / _n / (_n - 1)
        + (_k(_b, _b).sum() - _m) / _m / (_m - 1)
        - 2 * _k(_a, _b).sum() / _n / _m
    )
    assert abs(mmd2(_k(_a, _a), _k(_b, _b), _k(_a, _b)) - _want) < 1e-9, f"n = {_n}, m = {_m}"
_linear = mmd2([[4, 2], [2, 9]], [[1, 0], [0, 1]], [[1, 2], [3, 4]])
assert abs(_linear - (2 + 0 - 5)) < 1e-9, f"The diagonal is left out whatever stands there; -3, yours is {_linear}"
### END HIDDEN TESTS

# %% check="mmd-alarm" points=2
assert predicted_naive is not None, "Write your prediction down first: predicted_naive = a share from 0 to 1"
assert isinstance(predicted_naive, int | float | np.number), (
    f"predicted_naive is a number from 0 to 1; yours is {predicted_naive!r}"
)
assert 0 <= predicted_naive <= 1, f"A share lies from 0 to 1; yours is {predicted_naive}"
got = np.asarray(p_values([5, 2.5, 0], [1, 2, 3, 4]))
assert got.shape == (3,), f"One p-value a score, (3,); yours has the shape {got.shape}"
assert got[0] > 0, "A p-value is never 0: the score itself is one of the values that could have been, (1 + k) / (1 + n)"
assert abs(got[0] - 0.2) < 1e-9, f"No null score reaches 5: (1 + 0) / (1 + 4) = 0.2; yours is {got[0]}"
assert np.allclose(got, [0.2, 0.6, 1.0]), f"Large scores speak against the null: [0.2, 0.6, 1.0]; yours are {got}"
null = np.array([3.0, 4, 1, 3])
tied = np.asarray(p_values(np.array([3.0]), null))
assert tied.shape == (1,), f"One score, an array with one p-value; yours has the shape {tied.shape}"
assert abs(tied[0] - 0.8) < 1e-9, f"Null scores equal to the score count: (1 + 3) / 5 = 0.8; yours is {tied[0]}"
assert null.tolist() == [3, 4, 1, 3], (
    "p_values changed the null that it was given: np.sort makes a copy, .sort() does not"
)
### BEGIN HIDDEN TESTS
assert np.asarray(p_values([], [1.0])).shape == (0,), "No score, no p-value"
assert np.allclose(p_values([1.0], [9.0] * 99 + [0.0]), 100 / 101), "The null need not be sorted"
_rng = np.random.default_rng(8)
_null, _scores = _rng.normal(size=301).round(1), _rng.normal(size=40).round(1)
_want = [(1 + sum(_v >= _s for _v in _null)) / 302 for _s in _scores]
assert np.allclose(p_values(_scores, _null), _want), "p-values of many scores"
assert np.allclose(p_values(list(_scores), list(_null)), _want), "Lists are scores as well"
### END HIDDEN TESTS


# %% mistake="counts the diagonal" of="mmd-alarm" says="You count pairs i = j"
predicted_naive = 0.01


def mmd2(kxx, kyy, kxy):
    return float(np.mean(kxx) + np.mean(kyy) - 2 * np.mean(kxy))


def p_values(scores, null):
    return (1 + (np.asarray(null) >= np.asarray(scores, float)[:, None]).sum(1)) / (1 + len(null))


# %% mistake="no diagonal anywhere" of="mmd-alarm" says="all pairs of kxy count"
predicted_naive = 0.01


def mmd2(kxx, kyy, kxy):
    off = lambda k: float(np.asarray(k)[~np.eye(*np.shape(k), dtype=bool)].mean())
    return off(kxx) + off(kyy) - 2 * off(kxy)


def p_values(scores, null):
    return (1 + (np.asarray(null) >= np.asarray(scores, float)[:, None]).sum(1)) / (1 + len(null))


# %% mistake="clips at zero" of="mmd-alarm" says="Neither clip it nor take its root"
predicted_naive = 0.01


def mmd2(kxx, kyy, kxy):
    off = lambda k: float(np.asarray(k)[~np.eye(len(k), dtype=bool)].mean())
    return max(0.0, off(kxx) + off(kyy) - 2 * float(np.mean(kxy)))


def p_values(scores, null):
    return (1 + (np.asarray(null) >= np.asarray(scores, float)[:, None]).sum(1)) / (1 + len(null))


# %% mistake="one cross term" of="mmd-alarm" says="The example of the statement is 0.1"
predicted_naive = 0.01


def mmd2(kxx, kyy, kxy):
    off = lambda k: float(np.asarray(k)[~np.eye(len(k), dtype=bool)].mean())
    return off(kxx) + off(kyy) - float(np.mean(kxy))


def p_values(scores, null):
    return (1 + (np.asarray(null) >= np.asarray(scores, float)[:, None]).sum(1)) / (1 + len(null))


# %% mistake="empties the diagonal in place" of="mmd-alarm" says="Do not change the matrices"
predicted_naive = 0.01


def mmd2(kxx, kyy, kxy):
    kxx, kyy = np.asarray(kxx, float), np.asarray(kyy, float)
    np.fill_diagonal(kxx, 0)
    np.fill_diagonal(kyy, 0)
    n, m = np.shape(kxy)
    return float(kxx.sum() / n / (n - 1) + kyy.sum() / m / (m - 1) - 2 * np.mean(kxy))


def p_values(scores, null):
    return (1 + (np.asarray(null) >= np.asarray(scores, float)[:, None]).sum(1)) / (1 + len(null))


# %% mistake="a p-value of zero" of="mmd-alarm" says="A p-value is never 0"
predicted_naive = 0.01


def mmd2(kxx, kyy, kxy):
    off = lambda k: float(np.asarray(k)[~np.eye(len(k), dtype=bool)].mean())
    return off(kxx) + off(kyy) - 2 * float(np.mean(kxy))


def p_values(scores, null):
    return (np.asarray(null) >= np.asarray(scores, float)[:, None]).mean(1)


# %% mistake="the wrong tail" of="mmd-alarm" says="No null score reaches 5"
predicted_naive = 0.01


def mmd2(kxx, kyy, kxy):
    off = lambda k: float(np.asarray(k)[~np.eye(len(k), dtype=bool)].mean())
    return off(kxx) + off(kyy) - 2 * float(np.mean(kxy))


def p_values(scores, null):
    return (1 + (np.asarray(null) <= np.asarray(scores, float)[:, None]).sum(1)) / (1 + len(null))


# %% mistake="ties do not count" of="mmd-alarm" says="Null scores equal to the score count"
predicted_naive = 0.01


def mmd2(kxx, kyy, kxy):
    off = lambda k: float(np.asarray(k)[~np.eye(len(k), dtype=bool)].mean())
    return off(kxx) + off(kyy) - 2 * float(np.mean(kxy))


def p_values(scores, null):
    return (1 + (np.asarray(null) > np.asarray(scores, float)[:, None]).sum(1)) / (1 + len(null))


# %% mistake="sorts the null in place" of="mmd-alarm" says="p_values changed the null"
predicted_naive = 0.15


def mmd2(kxx, kyy, kxy):
    def off(k):
        k = np.asarray(k, float)
        n = len(k)
        return (k.sum() - np.trace(k)) / (n * (n - 1))

    return float(off(kxx) + off(kyy) - 2 * np.mean(kxy))


def p_values(scores, null):
    s, z = np.asarray(scores, float), np.asarray(null, float)
    z.sort()
    return (1 + len(z) - np.searchsorted(z, s, side="left")) / (1 + len(z))


# %% mistake="a scalar for one score" of="mmd-alarm" says="an array with one p-value"
predicted_naive = 0.15


def mmd2(kxx, kyy, kxy):
    def off(k):
        k = np.asarray(k, float)
        n = len(k)
        return (k.sum() - np.trace(k)) / (n * (n - 1))

    return float(off(kxx) + off(kyy) - 2 * np.mean(kxy))


def p_values(scores, null):
    s, z = np.asarray(scores, float), np.sort(np.asarray(null, float))
    s = s if len(s) > 1 else s[0]
    return (1 + len(z) - np.searchsorted(z, s, side="left")) / (1 + len(z))


# %% alternative="loops" of="mmd-alarm"
predicted_naive = 0


def mmd2(kxx, kyy, kxy):
    total = 0.0
    for k in (np.array(kxx, float), np.array(kyy, float)):
        total += k[~np.eye(len(k), dtype=bool)].mean()
    return total - 2 * np.mean(kxy)


def p_values(scores, null):
    return np.array([(1 + sum(1 for value in null if value >= score)) / (1 + len(null)) for score in scores])


# %% [markdown]
# First the clean days, with MiniLM's embeddings. Two nulls for the same score: tickets shuffled one by one, and {{null_days}} *days* on which nothing had changed. Both are compared with as many other clean days.

# %%
known = encode([ticket.text for ticket in reference])
stream = encode([ticket.text for tickets in desk_tickets for ticket in tickets])
squared = 2 - 2 * known @ known.T
gamma = 1 / float(np.median(squared[np.triu_indices(len(known), 1)]))
k_ref = rbf_kernel(known, gamma=gamma)


def day_scores(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """MMD squared of each day (a row of row numbers) against the reference."""
    inner, cross = rbf_kernel(vectors, gamma=gamma), rbf_kernel(known, vectors, gamma)
    return np.array([mmd2(k_ref, inner[np.ix_(day, day)], cross[:, day]) for day in rows])


scores = day_scores(stream, clean)
null_days, fresh_days = scores[:days], scores[days:]
everything = np.concatenate([known, stream])
k_all = rbf_kernel(everything, gamma=gamma)
shuffled = []
for _ in range(min(days, 999)):
    order = rng.permutation(len(everything))
    a, b = order[: len(known)], order[len(known) : len(known) + m]
    shuffled.append(mmd2(k_all[np.ix_(a, a)], k_all[np.ix_(b, b)], k_all[np.ix_(a, b)]))

few_x, few_y = known[:40], stream[:8]
pool = rbf_kernel(np.concatenate([few_x, few_y]), gamma=gamma)
statistic = lambda i, j: mmd2(pool[np.ix_(i, i)], pool[np.ix_(j, j)], pool[np.ix_(i, j)])
library = permutation_test(
    (np.arange(40), np.arange(40, 48)), statistic, permutation_type="independent", alternative="greater",
    n_resamples=999, rng=np.random.default_rng(0), vectorized=False,
)  # fmt: skip
mine = p_values([library.statistic], library.null_distribution)[0]
print(f"p-value of one small batch: yours {mine:.4f}, scipy {library.pvalue:.4f}")

LEVEL = 0.005
naive, alarm_false = share(p_values(fresh_days, shuffled) <= 0.01), share(p_values(fresh_days, null_days) <= LEVEL)
rows_all = np.arange(lengths.size).reshape(customers, -1)
writing = {
    who: m // who for who in (3, 4, 6, 8, 12, 16, 24, 48) if who <= customers
}  # customers a day: tickets of each
by_number = {PER_DAY: naive} | {
    who: share(p_values(day_scores(stream, draw_days(days // 2, rows_all, rng, who=who, each=each)), shuffled) <= 0.01)
    for who, each in writing.items()
    if who != PER_DAY
}
by_number = dict(sorted(by_number.items()))
fig, ax = plt.subplots(figsize=(7.4, 3.6))
mean, low, high = (np.array(part) for part in zip(*by_number.values(), strict=True))
intervals(ax, [*by_number], mean, low, high, COLOURS.before)
ax.plot([*by_number], mean, color=COLOURS.before)
ax.axhline(0.01, color=COLOURS.truth, ls="--", lw=1.5)
ax.plot(PER_DAY, alarm_false[0], "D", ms=8, color=COLOURS.after)
direct_label(ax, 6, mean[2], "tickets shuffled", COLOURS.before, offset=(10, 8))
direct_label(ax, PER_DAY, alarm_false[0], "calibrated on days", COLOURS.after, offset=(10, -13))
direct_label(ax, 30, 0.01, "1 %", COLOURS.truth, offset=(0, 5))
ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
ax.set(xscale="log", xlabel="customers that share the 48 tickets of a day", ylabel="clean days with an alarm", ylim=(-0.012, None),
       xticks=[*by_number], xticklabels=[*by_number], title="A test at 1 %, on days on which nothing changed")  # fmt: skip
ax.minorticks_off()
plt.show()
print(f"false alarms: tickets shuffled, 1 %: {naive[0]:.1%}; days, {LEVEL:.1%}: {alarm_false[0]:.2%}")
compare([("clean days on which the permutation test alarms", predicted_naive, naive[0])], format=".0%")
card.record("naive_false", naive[0], low=naive[1], high=naive[2], format=".0%", tolerance=0.05, label="false alarms of a permutation test of tickets at 1 %")  # fmt: skip
most = max(by_number)
card.record("naive_spread", by_number[most][0], low=by_number[most][1], high=by_number[most][2], format=".1%", tolerance=0.01, label="the same when each ticket is another customer's")  # fmt: skip
card.record("null_days", days, format=",d", label="clean days that the alarm is calibrated on")
card.record("alarm_false", alarm_false[0], low=alarm_false[1], high=alarm_false[2], format=".1%", tolerance=0.005, label="false alarms, calibrated on days")  # fmt: skip

# %% [markdown]
# The permutation test is exact, for tickets that are exchangeable. A day's tickets are not: twelve come from one customer and name the same few products, so they resemble each other more than tickets of twelve customers do. The test finds, correctly, that a day is no random sample of tickets, on {{naive_false}} of the days, and calls it drift. The fewer customers write on a day, the worse; when each ticket is another customer's, it keeps its promise ({{naive_spread}}; less than 1 %, since one ticket of everybody is more even than chance). **Shuffle what is independent**: here days, elsewhere users, sessions or shops.
#
# Calibrated on days the alarm fires on {{alarm_false}} ({{alarm_false:interval}}) of clean ones. The level is 0.5 % and not 1 % for a reason: the null is itself a sample. With {{null_days}} days the twentieth largest score is the limit, and the rate that it really has varies from calibration to calibration: it has a beta distribution with the parameters 20 and 3,981, of which 98 % lie between 0.28 % and 0.79 %. So the one per cent holds for this calibration and not only for the mean of all.
#
# ## What an alarm sees, and what it costs you not to see
#
# Nine things that happen to a service, each to the same tickets:

# %%
moved = [tickets[:EACH] for tickets in desk_tickets[: min(12, customers)]]
others = [LESSON_SEEDS[5_500 + 100 * seed + i] for i in range(len(moved))]


def each_ticket(change: Callable[[Ticket, Draw], Ticket]) -> list[Ticket]:
    """The same tickets, changed."""
    return [change(ticket, Draw("drift", i, ticket.id)) for i, ticket in enumerate(t for ts in moved for t in ts)]


def coded(ticket: Ticket, draw: Draw) -> Ticket:
    """Products get codes in place of names."""
    product = ticket.triage.product
    if product is None:
        return ticket
    code = f"{draw.pick('ABDKMTX')}{draw.pick('QRXZ')}-{draw.between(100, 9999)}"
    return replace(ticket, text=ticket.text.replace(product, code), triage=replace(ticket.triage, product=code))


def new_policy(ticket: Ticket, draw: Draw | None = None) -> Ticket:
    """From today nobody refunds by ticket: the customer gets a call. The text is the same."""
    action = "call" if ticket.triage.action == "refund" else ticket.triage.action
    return replace(ticket, triage=replace(ticket.triage, action=action))


def only_delivery(world: World) -> list[Ticket]:
    return [t for t in world.tickets(20 * EACH, part="test") if t.triage.category == "delivery"][:EACH]


flat = lambda groups: [ticket for tickets in groups for ticket in tickets]
again = flat(moved)
kinds: dict[str, list[Ticket]] = {
    "nothing": again,
    "other customers": flat(World(s).tickets(EACH, part="test") for s in others),
    "a port's tickets": flat(World(s, domain="port").tickets(EACH, part="test") for s in others),
    "a footer": each_ticket(lambda t, draw: replace(t, text=f"{t.text} Sent from my phone.")),
    "only deliveries": flat(only_delivery(World(s)) for s in seeds[: len(moved)]),
    "typos": each_ticket(lambda t, draw: replace(t, text=noisy(draw, t.text, 0.6))),
    "product codes": each_ticket(coded),
    "a quoted mail": [
        replace(t, text=f"{t.text}\nEarlier you wrote: {again[i - 9].text}") for i, t in enumerate(again)
    ],
    "lower case": each_ticket(lambda t, draw: replace(t, text=t.text.lower())),
    "a new policy": each_ticket(new_policy),
}
for name in ("product codes", "a quoted mail", "lower case", "a new policy"):
    before, after = next((b, a) for b, a in zip(again, kinds[name], strict=True) if b != a)
    print(f"{name}: {after.text!r}; {before.triage.action} -> {after.triage.action}")

model.set_adapter("triage")
texts = {ticket.text: ticket for tickets in (*kinds.values(), flat(desk_tickets)) for ticket in tickets}
replied = dict(zip(texts, triage.answers(model, tokenizer, [*texts.values()]), strict=True))  # each text once
judged = lambda tickets: triage.score([replied[ticket.text] for ticket in tickets], tickets).exact
right = {name: judged(tickets) for name, tickets in kinds.items()}
steady = judged(flat(desk_tickets))

# %% [markdown]
# Three monitors look at each day: PSI of the ticket lengths, MMD of the embeddings, and the number of wrong triages among the day's 48, for which somebody has to label them; say that takes five days. Each is calibrated on the same clean days and alarms at a p-value of {{level}} or less.

# %%
wrong_clean = (~steady)[clean].sum(axis=1)
nulls = {"length": psi_clean[:days], "embedding": null_days, "labels": wrong_clean[:days]}
grid_rows = np.arange(len(again)).reshape(-1, EACH)
power: dict[str, dict[str, tuple[float, float, float]]] = {}
drift_scores: dict[str, np.ndarray] = {}
embedded: dict[tuple[str, ...], np.ndarray] = {}
for name, tickets in kinds.items():
    rows = draw_days(drifted_days, grid_rows, np.random.default_rng(seed + 1))
    sizes = np.array([len(ticket.text) for ticket in tickets])
    written = tuple(ticket.text for ticket in tickets)
    if written not in embedded:
        embedded[written] = encode(written)
    drift_scores[name] = day_scores(embedded[written], rows)
    today = {
        "length": [psi(lengths_ref, sizes[day]) for day in rows],
        "embedding": drift_scores[name],
        "labels": (~right[name])[rows].sum(axis=1),
    }
    power[name] = {monitor: share(p_values(today[monitor], nulls[monitor]) <= LEVEL) for monitor in nulls}
any_false = np.mean(
    np.any([p_values(clean_days, nulls[k]) <= LEVEL for k, clean_days in
            (("length", psi_clean[days:]), ("embedding", fresh_days), ("labels", wrong_clean[days:]))], axis=0)
)  # fmt: skip
exact = {name: share(found) for name, found in right.items()}
frame = pd.DataFrame(
    {
        "what happens": kinds.keys(),
        "exact match": [exact[name][0] for name in kinds],
        **{f"alarm: {monitor}": [power[name][monitor][0] for name in kinds] for monitor in nulls},
    }
)
shown = [column for column in frame if column != "what happens"]
display(frame.style.hide(axis="index").format("{:.0%}", subset=shown).set_caption("share of days with an alarm"))
print(f"any of the three alarms on {any_false:.1%} of clean days")
card.record(
    "any_false", any_false, format=".1%", tolerance=0.005, label="clean days on which any of three monitors alarms"
)

fig, ax = plt.subplots(figsize=(8.2, 4.4))
for name in kinds:
    loss = exact["nothing"][0] - exact[name][0]
    mean, low, high = power[name]["embedding"]
    colour = COLOURS.before if abs(loss) < 0.05 else COLOURS.wrong
    ax.errorbar(loss, mean, yerr=[[mean - low], [high - mean]], fmt="o", ms=7, color=colour)
places = {"nothing": (8, 6), "other customers": (8, 20), "a port's tickets": (8, 34)}
places["a quoted mail"] = (6, -18)
for name in kinds:
    loss = exact["nothing"][0] - exact[name][0]
    left = loss > 0.6
    ax.annotate(name, (loss, power[name]["embedding"][0]), xytext=places.get(name, (-8 if left else 8, 7)),
                textcoords="offset points", ha="right" if left else "left", fontsize=9.5)  # fmt: skip
ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
ax.set(xlabel="exact match lost (points)", ylabel="days with an alarm", ylim=(-0.05, 1.12), xlim=(-0.06, 1.0),
       title="The embedding's alarm, and the harm done")  # fmt: skip
plt.show()

card.record("level", LEVEL, format=".1%", label="level of each monitor")
for key, name in (("none", "nothing"), ("lower", "lower case"), ("codes", "product codes"), ("quote", "a quoted mail"),
                  ("policy", "a new policy"), ("footer", "a footer"), ("port", "a port's tickets"), ("mix", "only deliveries"), ("typos", "typos")):  # fmt: skip
    mean, low, high = exact[name]
    card.record(f"{key}_exact", mean, low=low, high=high, format=".0%", tolerance=0.03, label=f"exact match, {name}")
    mean, low, high = power[name]["embedding"]
    card.record(f"{key}_seen", mean, low=low, high=high, format=".0%", tolerance=0.05, label=f"days with an alarm of the embedding, {name}")  # fmt: skip
for key, name in (("lower", "lower case"), ("policy", "a new policy"), ("typos", "typos")):
    mean, low, high = power[name]["labels"]
    card.record(f"{key}_labels", mean, low=low, high=high, format=".0%", tolerance=0.05, label=f"days with an alarm of the labels, {name}")  # fmt: skip

# %% [markdown]
# The figure is the argument against equating drift with harm. Its axes hardly agree:
#
# - **Seen and harmful**: product codes ({{codes_exact}} right) and quoted mails ({{quote_exact}}). This is what drift detection is sold for.
# - **Seen and harmless**: a footer ({{footer_seen}} of days, {{footer_exact}} right), or a week in which everybody writes about deliveries ({{mix_seen}}, {{mix_exact}}). A retraining here would cost money and bring nothing. A whole new domain, a port's ships in place of products, is hardly seen ({{port_seen}}) and hardly harmful ({{port_exact}}).
# - **Harmful and not seen**: a new policy, {{policy_exact}} right. The tickets are the same to the letter, so *no* monitor of inputs can see it, whatever its kernel. Only labels can: {{policy_labels}} of days, five days late.
# - **Harmful and not seen, for another reason**: lower case. Somebody upstream "normalised" the text; exact match falls to {{lower_exact}}, since names must be copied as they are written. MiniLM's tokenizer lower-cases, so to it *nothing has changed*. A monitor is blind to what its features throw away, and you find out which by breaking things on purpose, as here. Labels see it on {{lower_labels}} of days; so would the share of capital letters.
#
# What is not shown: levels belong to this model and these tickets. Days are drawn again and again from the same {{customers}} customers, and drifted days from twelve of them; the intervals count days, not customers, and are too narrow for customers to come.
#
# ## Rare false alarms or quick detection
#
# A daily alarm at level $\alpha$ that looks at independent days has a mean time of $1/\alpha$ days to a false alarm (its *average run length*), and $1/\text{power}$ days to detection. The three monitors above, each at {{level}}, alarm together on {{any_false}} of clean days; twenty at 1 % give a false alarm every fifth day or so. A level is a budget to be divided among monitors. For a weak and lasting drift there is a better deal: add up evidence. Below, the mean score of the last five days against one day's score, on simulated streams that draw from the days above: the footer on every ticket, and on every second one, as when an app is rolled out step by step.


# %%
def run_lengths(width: int, limits: np.ndarray, drifted: np.ndarray | None, length: int, runs: int) -> np.ndarray:
    """Mean days until the mean of the last `width` scores exceeds each limit, from day `width` on or from a change."""
    source = np.random.default_rng(seed + 2)
    before = source.choice(scores, (runs, width - 1))
    after = source.choice(scores if drifted is None else drifted, (runs, length))
    sums = np.cumsum(np.pad(np.concatenate([before, after], axis=1), ((0, 0), (1, 0))), axis=1)
    means = (sums[:, width:] - sums[:, :-width]) / width
    found = []
    for limit in limits:
        over = means > limit
        found.append(np.where(over.any(axis=1), over.argmax(axis=1) + 1, length).mean())
    return np.array(found)


footed, plain = (embedded[tuple(t.text for t in kinds[name])] for name in ("a footer", "nothing"))
rows = draw_days(drifted_days, grid_rows, np.random.default_rng(seed + 4))
both_texts = np.concatenate([plain, footed])  # a ticket's footer stands len(plain) rows below it
some = {
    share_: np.where(np.random.default_rng(seed + 5).random(rows.shape) < share_, rows + len(plain), rows)
    for share_ in (0.5, 0.25)
}
slow = {
    "footer on all": drift_scores["a footer"],
    "footer on 1 in 2": day_scores(both_texts, some[0.5]),
    "footer on 1 in 4": day_scores(both_texts, some[0.25]),
}
runs, horizon = min(days, 400), 4_000 if days >= 1_000 else 50
fig, ax = plt.subplots(figsize=(7.6, 4.0))
marks: dict[tuple[str, int], float] = {}
for width, style in ((1, "--"), (5, "-")):
    means = np.convolve(
        np.random.default_rng(seed + 3).choice(scores, 100 * len(scores)), np.ones(width) / width, "valid"
    )
    limits = np.quantile(means, 1 - np.geomspace(0.2, 0.0015, 12))
    to_false = run_lengths(width, limits, None, horizon, runs)
    for name, colour in (
        ("footer on 1 in 4", ""),
        ("footer on 1 in 2", COLOURS.wrong),
        ("footer on all", COLOURS.other),
    ):
        delay = run_lengths(width, limits, slow[name], horizon, 2_000)
        if colour:
            ax.plot(
                to_false, delay, ls=style, color=colour, label=f"{name}, {'one day' if width == 1 else 'mean of 5'}"
            )
        marks[name, width] = float(np.interp(200, to_false, delay))
ax.set(xscale="log", yscale="log", xlabel="days to a false alarm (mean)", ylabel="days to detection (mean)",
       title="The price of fewer false alarms")  # fmt: skip
for axis in (ax.xaxis, ax.yaxis):
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
ax.set_yticks([1, 2, 5, 10, 20, 50, 100])
label_lines(ax)
plt.show()
for name, key in (("footer on 1 in 2", "half"), ("footer on all", "footer")):
    for width in (1, 5):
        card.record(f"{key}_delay_{width}", marks[name, width], format=".1f", unit="days", tolerance=max(0.5, 0.25 * marks[name, width]), label=f"days to detect {name}, {width}-day score, one false alarm in 200 days")  # fmt: skip
card.record("quarter_delay_5", marks["footer on 1 in 4", 5], format=",.0f", unit="days", tolerance=1_000, label="days to detect footer on 1 in 4, 5-day score, one false alarm in 200 days")  # fmt: skip
card.record("horizon", horizon, format=",d", unit="days", label="days that are simulated")

# %% [markdown]
# At one false alarm in 200 days, a footer on every second ticket is found after {{half_delay_1}} days by single days' scores and after {{half_delay_5}} by the mean of five; a footer on all tickets after {{footer_delay_1}} and {{footer_delay_5}} days. Where a single day nearly always suffices, four clean days in the mean only slow it down. So which detector is better depends on the drift that you fear. (A footer on one ticket in four, which is not drawn: single days have not found it when the simulation ends after {{horizon}} days, and the mean of five needs {{quarter_delay_5}}. There is always a drift too small to see.) CUSUM (Page, 1954) does this with a memory that adapts; the two axes are the ones on which to compare any detector.


# %%
@dataclass(frozen=True)
class Terms:
    """What a decision rests on, in euros, tickets and days."""

    label: float  # euros for one label
    training: float  # euros for a training run with its tests and its release
    wrong: float  # euros for one wrong triage
    tickets: int  # a day
    labels_a_day: int
    ends: float  # probability that the drift is gone on the next day
    horizon: int  # days that count


# %% [markdown]
# ## Retrain, or not
#
# The new policy costs accuracy every day. So retrain? Labels cost money and *days*; a training run has to be tested and released; and the drift may end by itself (policies are taken back, campaigns end), after which the old adapter serves again.
#
# **Exercise.** Write `decide(gains, terms)`. `gains` maps a number of fresh labels `n` to the exact match gained by retraining with them, as a fraction. The value of retraining with `n` labels, in euros:
#
# - The adapter serves from day `d = ceil(n / terms.labels_a_day) + 1` on: the labelling, and one day for training, tests and release. Today is day 0.
# - The drift is there today. On each day `t` it is still there with probability `(1 - terms.ends) ** t`. It saves `gain * terms.tickets * terms.wrong` on each day `d, d + 1, …, terms.horizon - 1` on which it is there, and nothing on the others.
# - `n` labels cost `n * terms.label`, the run costs `terms.training`.
#
# Return `(n, value)` of the largest value; of equal values the smaller `n`. If no value is positive, or `gains` is empty, return `(0, 0.0)`: leave it.
#
# With `Terms(label=1, training=10, wrong=2, tickets=50, labels_a_day=4, ends=0.5, horizon=4)`, `decide({4: 0.5}, terms)` is `(4, 4.75)`: the adapter serves on days 2 and 3, on which the drift is there with 0.25 and 0.125; that saves 18.75 and costs 14. *About 8 lines.*
#
# <details><summary>Hint 1</summary>More labels gain more on each day, and begin later. Which days are left, and how likely is each?</details>
# <details><summary>Hint 2</summary>The expected number of useful days is the sum of (1 - ends) ** t over range(d, horizon); it may be empty.</details>
# <details><summary>Hint 3</summary>Start with best = (0, 0.0); for n in sorted(gains): compute the value; if value &gt; best[1]: best = (n, value).</details>


# %% exercise="retrain" difficulty=2 minutes=8
def decide(gains: Mapping[int, float], terms: Terms) -> tuple[int, float]:
    """With how many fresh labels to retrain, 0 for not at all, and the expected value in euros."""
    ### BEGIN SOLUTION
    best = (0, 0.0)
    for n in sorted(gains):
        first = math.ceil(n / terms.labels_a_day) + 1
        useful = sum((1 - terms.ends) ** t for t in range(first, terms.horizon))
        value = gains[n] * terms.tickets * terms.wrong * useful - n * terms.label - terms.training
        if value > best[1]:
            best = (n, value)
    return best
    ### END SOLUTION


# %% check="retrain" points=2
base = Terms(label=1, training=10, wrong=2, tickets=50, labels_a_day=4, ends=0.5, horizon=4)
got = decide({4: 0.5}, base)
assert isinstance(got, tuple | list), f"Return a pair, (n, value); yours is {got!r}"
assert len(got) == 2, f"Return (n, value); yours is {got}"
assert abs(got[1] - 86) > 1e-9, (
    "The drift may end: day t counts with the probability (1 - ends) ** t that it is still there"
)
assert abs(got[1] - 79.75) > 1e-9, "Labelling and release take days: the adapter serves from day d on, not from day 0"
assert got[0] == 4, f"With the example of the statement: (4, 4.75); yours is {got}"
assert abs(got[1] - 4.75) < 1e-9, (
    f"With the example of the statement the value is 4.75: days 2 and 3 of horizon 4, labels and training paid; yours is {got[1]}"
)
late = decide({5: 0.5}, replace(base, label=0, training=0))
assert abs(late[1] - 6.25) < 1e-9, (
    f"Five labels at four a day take two days, so the fifth costs a day: day 3 alone is left, 6.25; yours is {late}"
)
try:
    slow = decide({4: 0.4, 400: 0.6}, replace(base, ends=0.0, horizon=90, tickets=10, label=0))
except ZeroDivisionError as error:
    raise AssertionError(
        "With ends = 0 the drift stays for good: a closed form that divides by it needs that case"
    ) from error
assert slow[0] == 4, (
    f"400 labels at four a day come after the horizon: the larger gain is worth nothing by then, choose 4; yours is {slow}"
)
more = decide({4: 0.1, 40: 0.9}, replace(base, ends=0.0, horizon=365, tickets=1000))
assert more[0] == 40, f"Where the drift stays and tickets are many, more labels pay: 40; yours is {more}"
### BEGIN HIDDEN TESTS
_rng = np.random.default_rng(9)
for _ in range(40):
    _terms = Terms(*_rng.uniform(0.1, [3, 50, 5]), int(_rng.integers(1, 500)), int(_rng.integers(1, 60)), float(_rng.uniform(0, 0.3)), int(_rng.integers(1, 90)))  # fmt: skip
    _gains = {int(_n): float(_rng.uniform(-0.1, 0.5)) for _n in _rng.integers(1, 300, 4)}
    _best = (0, 0.0)
    for _n in sorted(_gains):
        _d = -(-_n // _terms.labels_a_day) + 1
        _days = sum((1 - _terms.ends) ** _t for _t in range(_d, _terms.horizon))
        _value = _gains[_n] * _terms.tickets * _terms.wrong * _days - _n * _terms.label - _terms.training
        _best = max(_best, (_n, _value), key=lambda pair: pair[1])
    _got = decide(dict(sorted(_gains.items(), reverse=True)), _terms)
    assert _got is not None, "Where nothing pays, the answer is still a pair: (0, 0.0)"
    assert _got[0] == _best[0], f"{_gains}, {_terms}: {_best}; yours is {_got}"
    assert abs(_got[1] - _best[1]) < 1e-6, f"{_gains}, {_terms}: {_best}; yours is {_got}"
### END HIDDEN TESTS

# %% check="retrain" points=1
got = decide({4: 0.05, 8: 0.04}, base)
assert got is not None, "Where nothing pays, the answer is still a pair: (0, 0.0)"
assert tuple(got) == (0, 0.0), (
    f"No size pays here: not retraining is worth 0, and that is the best. Return (0, 0.0); yours is {got}"
)
options = {8: 0.5, 4: 0.5}
equal = decide(options, replace(base, label=0, labels_a_day=100))
assert equal[0] == 4, f"Of equal values the smaller n, whatever the order of the dictionary; yours is {equal}"
assert options == {8: 0.5, 4: 0.5}, f"decide changed gains to {options}: whoever calls it needs them again"
short = decide({40: 0.9}, replace(base, horizon=5))
assert tuple(short) == (0, 0.0), f"Labels that come after the horizon save nothing; (0, 0.0); yours is {short}"
### BEGIN HIDDEN TESTS
assert tuple(decide({}, base)) == (0, 0.0), "Without an option: leave it"
assert tuple(decide({4: 0.0}, replace(base, training=0, label=0))) == (0, 0.0), "A value of 0 is not positive: leave it"
assert tuple(decide({4: -0.2}, replace(base, training=0, label=0))) == (0, 0.0), "A retraining that harms is left"
_late = decide({400: -0.5}, Terms(0, 0, 2, 50, 4, 0.0, 5))
assert tuple(_late) == (0, 0.0), (
    f"After the horizon there are no days, not a negative number of them; (0, 0.0), yours is {_late}"
)
_sure = decide({4: 1.0}, replace(base, ends=1.0))
assert tuple(_sure) == (0, 0.0), "A drift that is gone tomorrow is left alone"
### END HIDDEN TESTS


# %% mistake="the drift stays" of="retrain" says="The drift may end"
def decide(gains, terms):
    options = {0: 0.0}
    for n, gain in gains.items():
        days_left = max(0, terms.horizon - math.ceil(n / terms.labels_a_day) - 1)
        options[n] = gain * terms.tickets * terms.wrong * days_left - n * terms.label - terms.training
    best = max(sorted(options), key=options.get)
    return best, options[best]


# %% mistake="at once" of="retrain" says="the adapter serves from day d on"
def decide(gains, terms):
    options = {0: 0.0}
    for n, gain in gains.items():
        useful = sum((1 - terms.ends) ** t for t in range(terms.horizon))
        options[n] = gain * terms.tickets * terms.wrong * useful - n * terms.label - terms.training
    best = max(sorted(options), key=options.get)
    return best, options[best]


# %% mistake="the largest gain" of="retrain" says="the larger gain is worth nothing by then"
def decide(gains, terms):
    n = max(sorted(gains), key=gains.get)
    first = math.ceil(n / terms.labels_a_day) + 1
    useful = sum((1 - terms.ends) ** t for t in range(first, terms.horizon))
    return n, gains[n] * terms.tickets * terms.wrong * useful - n * terms.label - terms.training


# %% mistake="always retrains" of="retrain" says="not retraining is worth 0"
def decide(gains, terms):
    options = {}
    for n, gain in gains.items():
        first = math.ceil(n / terms.labels_a_day) + 1
        useful = sum((1 - terms.ends) ** t for t in range(first, terms.horizon))
        options[n] = gain * terms.tickets * terms.wrong * useful - n * terms.label - terms.training
    best = max(sorted(options), key=options.get)
    return best, options[best]


# %% mistake="one day off" of="retrain" says="days 2 and 3 of horizon 4"
def decide(gains, terms):
    options = {0: 0.0}
    for n, gain in gains.items():
        first = math.ceil(n / terms.labels_a_day) + 1
        useful = sum((1 - terms.ends) ** t for t in range(first, terms.horizon + 1))
        options[n] = gain * terms.tickets * terms.wrong * useful - n * terms.label - terms.training
    best = max(sorted(options), key=options.get)
    return best, options[best]


# %% mistake="half a day of labelling" of="retrain" says="the fifth costs a day"
def decide(gains, terms):
    options = {0: 0.0}
    for n, gain in sorted(gains.items(), reverse=True):
        first = n // terms.labels_a_day + 1
        useful = sum((1 - terms.ends) ** t for t in range(first, terms.horizon))
        options[n] = gain * terms.tickets * terms.wrong * useful - n * terms.label - terms.training
    best = max(options, key=options.get)
    return best, options[best]


# %% mistake="negative days" of="retrain" says="not a negative number of them"
def decide(gains, terms):
    options = {0: 0.0}
    for n, gain in gains.items():
        first, stay = math.ceil(n / terms.labels_a_day) + 1, 1 - terms.ends
        useful = (stay**first - stay**terms.horizon) / terms.ends if terms.ends else terms.horizon - first
        options[n] = gain * terms.tickets * terms.wrong * useful - n * terms.label - terms.training
    best = max(sorted(options), key=options.get)
    return best, options[best]


# %% mistake="empties the dictionary" of="retrain" says="decide changed gains"
def decide(gains, terms):
    best = (0, 0.0)
    for n in sorted(gains):
        gain = gains.pop(n)
        d = math.ceil(n / terms.labels_a_day) + 1
        days_on = sum((1 - terms.ends) ** t for t in range(d, terms.horizon))
        value = gain * terms.tickets * terms.wrong * days_on - n * terms.label - terms.training
        if value > best[1]:
            best = (n, value)
    return best


# %% mistake="a drift that stays for good" of="retrain" says="With ends = 0"
def decide(gains, terms):
    best = (0, 0.0)
    for n, gain in sorted(gains.items()):
        d = math.ceil(n / terms.labels_a_day) + 1
        days_on = max(0, (1 - terms.ends) ** d - (1 - terms.ends) ** terms.horizon) / terms.ends
        value = gain * terms.tickets * terms.wrong * days_on - n * terms.label - terms.training
        if value > best[1]:
            best = (n, value)
    return best


# %% mistake="nothing where nothing pays" of="retrain" says="still a pair"
def decide(gains, terms):
    best = (0, 0.0)
    for n, gain in sorted(gains.items()):
        d = math.ceil(n / terms.labels_a_day) + 1
        days_on = sum((1 - terms.ends) ** t for t in range(d, terms.horizon))
        value = gain * terms.tickets * terms.wrong * days_on - n * terms.label - terms.training
        if value > best[1]:
            best = (n, value)
    return best if best[0] else None


# %% mistake="worth nothing, done" of="retrain" says="A value of 0 is not positive"
def decide(gains, terms):
    best = (0, -1e-9)
    for n, gain in sorted(gains.items()):
        d = math.ceil(n / terms.labels_a_day) + 1
        days_on = sum((1 - terms.ends) ** t for t in range(d, terms.horizon))
        value = gain * terms.tickets * terms.wrong * days_on - n * terms.label - terms.training
        if value >= 0 and value > best[1]:
            best = (n, value)
    return best if best[0] else (0, 0.0)


# %% alternative="a closed form" of="retrain"
def decide(gains, terms):
    def value(n):
        start, stay = -(-n // terms.labels_a_day) + 1, 1 - terms.ends
        if start >= terms.horizon:
            useful = 0.0
        elif terms.ends == 0:
            useful = terms.horizon - start
        else:
            useful = (stay**start - stay**terms.horizon) / terms.ends
        return gains[n] * terms.tickets * terms.wrong * useful - n * terms.label - terms.training

    best = max(sorted(gains), key=value, default=None)
    return (0, 0.0) if best is None or value(best) <= 0 else (best, value(best))


# %% [markdown]
# How much do $n$ labels gain? Measured: the adapter is trained on from where it is, on $n$ freshly labelled tickets, over and over until it has seen {{passes}} examples, and tested on tickets of the same customers. For two of the drifts: the policy (twice, with other labels), and the product codes.

# %%
start = {
    key: value.clone()
    for key, value in get_peft_model_state_dict(model, adapter_name="triage", save_embedding_layers=False).items()
}
for name, weight in model.named_parameters():
    weight.requires_grad_(".triage." in name and "lora_" in name)


def retrained(change: Callable[[Ticket, Draw], Ticket], n: int, number: int, tests: list[Ticket]) -> np.ndarray:
    """Which of the tests a copy of the adapter gets right after training on n fresh labels."""
    set_peft_model_state_dict(model, start, adapter_name="triage")
    draw = Draw("labels", seed, number)
    fresh = [change(t, Draw("fresh", t.text)) for t in draw.order(reference, n)]
    pairs = [Pair(t.text, t.triage.to_json()) for t in fresh]
    teach(model, tokenizer, (pairs * -(-passes // n))[: max(passes, n)], rate=learning_rate)
    return triage.score(triage.answers(model, tokenizer, tests), tests).exact


curves: dict[str, dict[int, tuple[float, float, float]]] = {}
for name, change in (("a new policy", new_policy), ("product codes", coded)):
    tests = kinds[name]
    curves[name] = {}
    for n in label_counts if change is new_policy else label_counts[-2:]:
        draws = range(repeats if change is new_policy else 1)
        gained = [retrained(change, n, k, tests).astype(float) - right[name] for k in draws]
        values = np.mean(gained, axis=0).reshape(-1, EACH).mean(axis=1)  # one value a customer
        drawn = np.random.default_rng(seed).choice(values, (2_000, len(values))).mean(axis=1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        curves[name][n] = (float(values.mean()), min(float(low), values.mean()), max(float(high), values.mean()))
        print(f"{name}, {n} labels: {100 * values.mean():+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})")
set_peft_model_state_dict(model, start, adapter_name="triage")
model.requires_grad_(False)

terms = Terms(label=1.5, training=120, wrong=4, tickets=200, labels_a_day=40, ends=0.05, horizon=60)
gains = {name: {n: mean for n, (mean, _, _) in curve.items()} for name, curve in curves.items()}
for name in gains:
    print("{}: {} labels, worth {:,.0f} euros".format(name, *decide(gains[name], terms)))

stays, volumes = np.geomspace(2, 60, 25), np.geomspace(2, 400, 25)
policy_gains = gains["a new policy"]
choice = np.array(
    [[decide(policy_gains, replace(terms, ends=1 / s, tickets=float(v)))[0] for s in stays] for v in volumes]
)
levels = [0, *label_counts]
fig, axes = plt.subplots(1, 2, figsize=(10.6, 3.9), width_ratios=(1, 1.15))
for name, colour in (("a new policy", COLOURS.after), ("product codes", COLOURS.wrong)):
    x = [*curves[name]]
    mean, low, high = (100 * np.array(part) for part in zip(*curves[name].values(), strict=True))
    axes[0].errorbar(x, mean, yerr=[mean - low, high - mean], fmt="o-", capsize=3, color=colour, label=name)
axes[0].set(xscale="log", xlabel="fresh labels", ylabel="exact match gained (points)", title="What labels gain",
            xticks=label_counts, xticklabels=label_counts)  # fmt: skip
axes[0].minorticks_off()
axes[0].legend(loc=(0.46, 0.14))
shades = ["#e3e3e1", "#9cc3e8", "#4f95d6", "#0067c2"]
for place, level in enumerate(levels):
    rows, columns = np.nonzero(choice == level)
    axes[1].scatter(stays[columns], volumes[rows], marker="s", s=32, color=shades[min(place, 3)],
                    label="leave it" if level == 0 else f"{level} labels")  # fmt: skip
axes[1].plot(1 / terms.ends, terms.tickets, marker="*", ms=14, color=COLOURS.truth)
axes[1].set(xscale="log", yscale="log", xticks=(2, 5, 10, 20, 50), yticks=(5, 20, 100, 400), xlabel="days that the drift lasts (mean)", ylabel="tickets a day",
            title="Best decision, new policy")  # fmt: skip
for axis in (axes[1].xaxis, axes[1].yaxis):
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

chosen, worth = decide(policy_gains, terms)
chosen_codes, _ = decide(gains["product codes"], terms)
card.record("chosen", chosen, format="d", label="labels to retrain with, new policy")
card.record("worth", worth, low=min(worth, decide({n: low for n, (_, low, _) in curves["a new policy"].items()}, terms)[1]), high=max(worth, decide({n: high for n, (_, _, high) in curves["a new policy"].items()}, terms)[1]), format=",.0f", unit="euros", tolerance=600, label="expected value of that")  # fmt: skip
card.record("chosen_codes", chosen_codes, format="d", label="labels to retrain with, product codes")
for key, name in (("policy", "a new policy"), ("codes", "product codes")):
    for n, (mean, low, high) in curves[name].items():
        if n in (label_counts[0], label_counts[-1]):
            size = "few" if n < label_counts[-1] else "most"
            card.record(f"{key}_gain_{size}", 100 * mean, low=100 * low, high=100 * high, format=".0f", unit="points", tolerance=4, label=f"gain, {name}, {n} labels")  # fmt: skip
card.record("passes", passes, format="d", label="examples seen in a retraining")

# %% [markdown]
# For the policy, four labels gain {{policy_gain_few}} points and 64 gain {{policy_gain_most}}: the adapter knows how to triage and has to learn one sentence. At the star (200 tickets a day, a drift that lasts 20 days in the mean) the best is {{chosen}} labels, worth {{worth}} euros ({{worth:interval}}, from the interval of the gain). Towards the lower left it does not pay at all: few tickets, or gone before the adapter is out.
#
# For the product codes 64 labels gain {{codes_gain_most}} points, so the decision is {{chosen_codes}}: leave it. The alarm was loud, the harm is large, and retraining at this price does nothing. (The likely reason, not measured here: a code is spelled from pieces that this small model never had to copy.) What helps is upstream: map codes to names before the model, a rule for codes, another model. The same holds for lower case: nobody retrains a model for a bug in a pipeline.
#
# ## With a real model
#
# ```
# course run 4.5 -p model_id Qwen/Qwen3-0.6B -p device cuda
# ```
#
# Adapters are taught on a few examples first; the rest is the code above. What changes:
#
# - **Traces.** Instrument with `opentelemetry-instrumentation-*` for your client and server, keep to the GenAI semantic conventions for names, use a `BatchSpanProcessor` and an OpenTelemetry Collector. Keep all traces with errors and a sample of the others, chosen when they end (*tail sampling*). Prompts and replies in spans are personal data: off by default.
# - **Metrics.** The histogram to have for a language model: time to first token, time per output token, tokens in and out, queue length, by model *and adapter and template version*. Prometheus's native histograms replace hand-picked bounds.
# - **Alerts.** `burning` is two lines of PromQL: `sum(rate(failed_total[1h])) / sum(rate(requests_total[1h])) > 14.4 * 0.005 and …[5m]…`. Test rules with `promtool test rules`.
# - **Drift.** More traffic makes every test see harmless shifts; then calibrate on days, not for a p-value, and report an effect size. Add monitors for what the embedding throws away: case, length, language, share of replies that do not parse, confidence.
# - **Labels.** Budget them first. A small random sample a day, labelled within the week, is the only monitor that sees everything.
#
# ## Result card

# %%
card.show()

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>The p99 rose and a deployment went out. What do you do?</summary>
#
# Roll back if that is safe and quick, but do not stop there: check that the effect begins after the deployment. In an incident that I took apart it had begun 20 minutes earlier. Then split by replica, version and tenant, and compare the bad group with itself before and with its neighbours at the same time; a cause must explain both. Attributes interact: the old adapter was harmless, the new template was harmless, the two together cut off replies. State cause, first minute ({{since}}), affected share ({{share}}) and blast radius, with what speaks against the other theories.
#
# </details>
#
# <details><summary>How do you detect drift without labels, and what can you not detect?</summary>
#
# Compare batches of inputs (PSI of features, MMD of embeddings) and of outputs with a reference. Calibrate on whole clean days: a permutation test of single tickets at 1 % alarmed on {{naive_false}} of clean days, because tickets of a day are not independent. Then say what it cannot see. Same inputs with another right answer: never. What the features throw away: lower-casing brought exact match to {{lower_exact}} and an uncased embedding saw nothing. And an alarm is no harm: a footer alarmed on {{footer_seen}} of days at no loss. So keep a small random sample of labels, late as they are.
#
# </details>
#
# <details><summary>When would you not retrain?</summary>
#
# When the expected saving, over the days that the drift will last after the labels are in, is below the cost of labels, training, tests and risk; when nothing is lost (a harmless shift); when the cause is a bug upstream; and when labels do not help, which a learning curve shows: for the policy four labels gained {{policy_gain_few}} points, for the product codes 64 gained {{codes_gain_most}}.
#
# </details>
#
# ## Read next
#
# - B. H. Sigelman et al., [*Dapper, a Large-Scale Distributed Systems Tracing Infrastructure*](https://research.google/pubs/dapper-a-large-scale-distributed-systems-tracing-infrastructure/), 2010. Spans, trees, sampling.
# - W3C, [*Trace Context*](https://www.w3.org/TR/trace-context/), 2021; OpenTelemetry, [*Semantic conventions for generative AI*](https://opentelemetry.io/docs/specs/semconv/gen-ai/).
# - Prometheus, [*Query functions*](https://prometheus.io/docs/prometheus/latest/querying/functions/) and [*Histograms and summaries*](https://prometheus.io/docs/practices/histograms/). The definitions of `increase` and `histogram_quantile`.
# - B. Beyer et al., [*The Site Reliability Workbook*](https://sre.google/workbook/alerting-on-slos/), 2018, chapter 5. Burn rates over two windows.
# - B. Yurdakul, [*Statistical Properties of Population Stability Index*](https://scholarworks.wmich.edu/dissertations/3208/), 2018. The distribution that the rule of thumb lacks.
# - A. Gretton et al., [*A Kernel Two-Sample Test*](https://jmlr.org/papers/v13/gretton12a.html), 2012. MMD.
# - S. Rabanser et al., [*Failing Loudly: An Empirical Study of Methods for Detecting Dataset Shift*](https://arxiv.org/abs/1810.11953), 2019. Which detectors see which shifts, and whether they are harmful.
# - E. S. Page, [*Continuous Inspection Schemes*](https://doi.org/10.1093/biomet/41.1-2.100), 1954. Average run length, and CUSUM.
# - D. Sculley et al., [*Hidden Technical Debt in Machine Learning Systems*](https://papers.nips.cc/paper/5656-hidden-technical-debt-in-machine-learning-systems), 2015. What a service depends on without saying so.
