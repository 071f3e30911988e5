"""Requests leave when they are due, and locust's report comes back."""

import threading

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from labkit import load_test
from labkit.servers import serving


def app(seen: list[int]) -> FastAPI:
    application = FastAPI()

    @application.post(load_test.PATH)
    async def chat(request: Request) -> JSONResponse:
        number = (await request.json())["number"]
        seen.append(number)
        return JSONResponse({}, 200 if number else 429)

    return application


def test_an_open_loop_sends_every_request_when_it_is_due() -> None:
    seen: list[int] = []
    before = threading.active_count()
    with serving(app(seen)) as server:
        samples = load_test.open_loop(server.url, [{"number": i} for i in (1, 0, 2)], [0.2, 0.0, 0.1])
    assert sorted(seen) == [0, 1, 2]
    assert [sample.ok for sample in samples] == [True, False, True]
    assert [sample.due for sample in samples] == [0.2, 0.0, 0.1]
    assert all(sample.due <= sample.sent <= sample.done for sample in samples)
    assert threading.active_count() == before


def test_a_server_that_is_not_there_is_a_failure_and_no_exception() -> None:
    with serving(app([])) as server:
        gone = server.url
    assert [sample.ok for sample in load_test.open_loop(gone, [{"number": 1}], [0.0])] == [False]


def test_locust_reports_its_requests() -> None:
    seen: list[int] = []
    with serving(app(seen)) as server:
        report = load_test.locust(server.url, [{"number": 1}], users=2, seconds=2)
    assert report.requests == len(seen) > 0
    assert report.requests == sum(report.histogram.values())
    assert report.failed == 0
    assert report.seconds > 0
    assert report.percentile(0.5) <= report.percentile(0.95)


def test_a_percentile_is_a_response_time_that_occurred() -> None:
    report = load_test.LocustReport(20, 0, 1.0, {150: 19, 3400: 1})
    assert (report.percentile(0.5), report.percentile(0.95), report.percentile(0.96)) == (150, 150, 3400)
