"""Traces: recording, propagation, and their cost without a collector."""

from __future__ import annotations

import threading

import pytest

from scanfleet.runtime import tracing
from scanfleet.runtime.settings import CommonSettings
from scanfleet_testing.tracing import ids, recording
from scanfleet_testing.waiting import until

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE}-b7ad6b7169203331-01"
UNSAMPLED = f"00-{TRACE}-b7ad6b7169203331-00"


def test_tracing_without_a_collector_keeps_the_callers_span_as_parent() -> None:
    """No thread and no span; the propagated header is the received one, or a new trace that is not recorded."""
    before = threading.active_count()
    tracing.configure("test", CommonSettings(instance="test"))
    with tracing.span("work", SAMPLED) as span:
        assert not span.is_recording()
        assert tracing.current() == SAMPLED
    with tracing.span("work", "00-junk"):
        assert (tracing.current() or "").endswith("-00")
    with tracing.spans("work", {1: SAMPLED, 2: None}, "consumer", "job") as onward:
        assert onward == {1: SAMPLED, 2: None}
    assert tracing.current() is None
    assert threading.active_count() == before


async def test_tracing_with_a_collector_runs_one_thread_until_stop() -> None:
    """A collector adds one thread, and `stop` ends it even if the collector is unavailable."""
    before = threading.active_count()
    settings = CommonSettings(instance="test", otlp_endpoint="http://127.0.0.1:9/")
    tracing.configure("test", settings)
    assert threading.active_count() == before + 1
    await tracing.stop()
    with tracing.span("work", SAMPLED) as span:
        assert not span.is_recording()
    await until(lambda: threading.active_count() <= before + 1)  # the pool's thread, which waited for it, may stay
    assert not [thread for thread in threading.enumerate() if "Otel" in thread.name]


def test_spans_of_a_trace_hang_together() -> None:
    """Each span is a child of the one whose traceparent it was given, and holds its name, kind and attributes."""
    with recording() as exporter:
        with tracing.span("outer", SAMPLED, "server", {"size": 3}):
            inner = tracing.current()
            with tracing.span("inner", inner):
                assert tracing.current() not in {inner, SAMPLED}
            assert tracing.current() == inner
        child, parent = exporter.get_finished_spans()
    assert (parent.name, parent.kind.name, dict(parent.attributes or {})) == ("outer", "SERVER", {"size": 3})
    assert parent.parent is not None
    assert child.parent is not None
    assert f"{parent.parent.trace_id:032x}-{parent.parent.span_id:016x}" == SAMPLED[3:-3]
    assert child.parent.span_id == ids(parent).span_id
    assert {f"{ids(span).trace_id:032x}" for span in (child, parent)} == {TRACE}


def test_ratio_does_not_override_the_callers_decision() -> None:
    """A request with the sampled flag is recorded whatever the ratio is; one without it is not."""
    with recording(ratio=0.0) as exporter, tracing.span("work", SAMPLED):
        assert sampled(tracing.current())
    assert len(exporter.get_finished_spans()) == 1
    with recording(ratio=1.0) as exporter, tracing.span("work", UNSAMPLED):
        assert tracing.current() == UNSAMPLED
    assert exporter.get_finished_spans() == ()


def sampled(traceparent: str | None) -> int:
    return int((traceparent or "00")[-2:], 16) & 1


@pytest.mark.parametrize("ratio", [1.0, 0.0])
def test_ratio_decides_for_new_traces(ratio: float) -> None:
    """Without a caller's decision the ratio decides, and the decision is propagated."""
    with recording(ratio=ratio) as exporter, tracing.span("work", None):
        assert sampled(tracing.current()) == ratio
        with tracing.span("inner", tracing.current()):
            pass
    assert len(exporter.get_finished_spans()) == 2 * ratio


def test_spans_of_a_batch_exist_in_each_trace() -> None:
    """Work on a batch has a span in each recorded trace, and a separate parent to propagate for each."""
    other = SAMPLED.replace("0a", "0b")
    headers = {1: SAMPLED, 2: other, 3: UNSAMPLED, 4: None}
    with (
        recording() as exporter,
        tracing.spans(lambda job: f"work {job}", headers, "producer", "job") as onward,
    ):
        assert exporter.get_finished_spans() == ()
    ended = {span.name: span for span in exporter.get_finished_spans()}
    assert {name: dict(span.attributes or {}) for name, span in ended.items()} == {
        "work 1": {"job": 1},
        "work 2": {"job": 2},
    }
    assert {key: header and header[3:35] for key, header in onward.items()} == {
        key: header and header[3:35] for key, header in headers.items()
    }
    assert onward[1] != SAMPLED
    assert (onward[3], onward[4]) == (UNSAMPLED, None)


def test_span_records_only_the_type_of_an_error() -> None:
    """A span that ends by an error has its type but not its message."""
    with recording() as exporter:
        with pytest.raises(ValueError, match="secret"), tracing.span("one", SAMPLED):
            raise ValueError("secret")
        with (
            pytest.raises(ValueError, match="secret"),
            tracing.spans("many", {1: SAMPLED}, "consumer", "job"),
        ):
            raise ValueError("secret")
    for span in exporter.get_finished_spans():
        assert (span.status.status_code.name, (span.attributes or {})["error.type"]) == ("ERROR", "ValueError")
        assert "secret" not in span.to_json()
