"""What Prometheus reads: every metric, with the text that the person on call gets to see.

Labels are names from the configuration and codes of ours, never ids: their number is bounded.
"""

from bisect import bisect_left
from collections import Counter as Counted
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from observability.names import MetricName
from observability.workers import AcrossWorkers, Combine, Reported

QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.8, 1, 2.5, 5, 10)
"""Seconds of what runs within a request; 0.8 because a sender such as Odoo waits for one second."""

SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1_800, 3_600, 21_600, 86_400, 259_200)
"""Seconds from acceptance to delivery, which may span days of retries."""

BATCHES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)


class Metrics:
    """The metrics of one process, and with a `directory` those of all workers of the host that share it.

    Whoever counts often keeps the labelled child (`metrics.accepted.labels(source)`): finding it costs more than
    counting.
    """

    def __init__(self, directory: Path | None = None, *, version: str = "") -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which Prometheus has no use for
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Combine | Reported] = {"sluicegate_process_start_time_seconds": Combine.MIN}
        ProcessCollector(namespace="sluicegate", registry=self._registry)

        # The door
        self.accepted = self._counter(
            MetricName.ACCEPTED, "Events accepted and durable, duplicates not counted.", "source"
        )
        self.duplicates = self._counter(
            MetricName.DUPLICATES, "Requests that brought an event that was there.", "source"
        )
        self.refused = self._counter(
            MetricName.REFUSED, "Requests refused at the door, by the code of the reason.", "source", "reason"
        )
        self.unrouted = self._counter(
            MetricName.UNROUTED, "Events accepted that no route sends anywhere: a route may be missing.", "source"
        )
        self.handshakes = self._counter(
            MetricName.HANDSHAKES, "Handshakes answered: what a sender asks before its first event.", "source"
        )
        self.connections_refused = self._counter(
            MetricName.CONNECTIONS_REFUSED,
            "Connections closed at once, by the key of `serve` whose number was reached.",
            "limit",
        )
        self.request_seconds = self._crowded(
            MetricName.REQUEST_SECONDS, "From the first byte of a request's head to its answer.", QUICK, "source"
        )
        self.dropped_keys = self._counter(
            MetricName.DROPPED_KEYS, "Top-level keys of payloads that the policy does not name.", "source", "policy"
        )
        self.secret_used = self._counter(
            MetricName.SECRET_USED,
            "Requests proven by each of a source's secrets, counted from 0: one that stands still can be retired.",
            "source",
            "secret",
        )

        # Deliveries
        self.attempts = self._counter(
            MetricName.ATTEMPTS, "Attempts to deliver, by what came of them.", "destination", "outcome"
        )
        self.attempt_seconds = self._crowded(
            MetricName.ATTEMPT_SECONDS, "How long one attempt took.", QUICK, "destination"
        )
        self.delivery_seconds = self._crowded(
            MetricName.DELIVERY_SECONDS, "From acceptance to delivery, retries and holds included.", SLOW, "destination"
        )
        self.in_flight = self._gauge(MetricName.IN_FLIGHT, "Attempts going on right now.", Combine.SUM, "destination")
        self.concurrency_limit = self._gauge(
            MetricName.CONCURRENCY_LIMIT,
            "Attempts allowed at a time: falls when the destination slows down.",
            Combine.SUM,
            "destination",
        )
        self.breaker_open = self._gauge(
            MetricName.BREAKER_OPEN,
            "1 while a destination is left alone because its attempts keep failing.",
            Combine.MAX,
            "destination",
        )

        # What the database says, reported as a whole by whoever asked it last
        self.waiting = self._reported(
            MetricName.WAITING, "Deliveries outstanding, held ones not counted.", "destination"
        )
        self.held = self._reported(
            MetricName.HELD, "Deliveries kept back because their destination is held.", "destination"
        )
        self.dead = self._reported(MetricName.DEAD, "Dead letters that nobody has dealt with yet.", "destination")
        self.oldest_waiting_seconds = self._reported(
            MetricName.OLDEST_WAITING_SECONDS, "Age of the oldest delivery that waits and is not held.", "destination"
        )
        self.destination_late = self._reported(
            MetricName.DESTINATION_LATE,
            "1 while a destination's oldest delivery, held or not, waits for longer than it is expected to.",
            "destination",
        )
        self.source_silent = self._reported(
            MetricName.SOURCE_SILENT,
            "1 while a source, or this facility of it, does not post though it is expected to.",
            "source",
            "facility",
        )
        self.source_heard_seconds = self._reported(
            MetricName.SOURCE_HEARD_SECONDS,
            "Since a source that is expected to post, or this facility of it, posted something proven.",
            "source",
            "facility",
        )
        self.secret_last_used = self._reported(
            MetricName.SECRET_LAST_USED,
            "When each of a source's secrets, by where it comes from, last verified a post: Unix time, to the minute.",
            "source",
            "origin",
        )
        self.secret_unreadable = self._reported(
            MetricName.SECRETS_UNREADABLE,
            "1 while a secret cannot be read anew, or is none that could be used: the one before it goes on counting.",
            "origin",
        )
        self.issuer_away = self._reported(
            MetricName.ISSUER_AWAY,
            "1 while the issuer of a source's tokens does not tell its keys: those that are known count for a day.",
            "source",
        )
        self.sequence_missing = self._reported(
            MetricName.SEQUENCE_MISSING,
            "Numbers missing in the sequence of a sender: messages that it sent, and that never came.",
            "source",
            "facility",
        )
        self.balanced = self._reported(
            MetricName.BALANCED, "1 if every accepted event is accounted for; 0 is an incident."
        )
        self.partitions_ahead = self._reported(
            MetricName.PARTITIONS_AHEAD,
            "Partitions ready for days or hours to come; at 0 intake stops.",
            "table",
            fresh=timedelta(days=2),
        )

        # The fleet
        self.configuration = self._reported(
            MetricName.CONFIGURATION, "1: the configuration that it works by, as the SHA-256 of the file.", "digest"
        )
        self.fleet_processes = self._reported(
            MetricName.FLEET_PROCESSES, "Processes on this database, by the configuration that they work by.", "digest"
        )
        self.configurations_differ = self._reported(
            MetricName.CONFIGURATIONS_DIFFER, "1 if processes have worked by different configurations for 5 minutes."
        )

        # Lanes
        self.lanes_owned = self._gauge(MetricName.LANES_OWNED, "Lanes that this host's dispatchers own.", Combine.SUM)
        self.takeovers = self._counter(
            MetricName.TAKEOVERS,
            "Lanes taken over; careful=true if their owner vanished without handing them on.",
            "careful",
        )
        self.fenced = self._counter(
            MetricName.FENCED, "Verdicts not written because the lane had a new owner: the fence works, and was needed."
        )
        self.presence_lost = self._counter(
            MetricName.PRESENCE_LOST,
            "Connections that dispatchers live and listen on that broke or did not answer: they poll until another is drawn.",
            "reason",
        )
        self.orphans = self._counter(MetricName.ORPHANS, "Deliveries found without their event: must stay 0.")

        # The machine below
        self.batch_size = self._histogram(
            MetricName.BATCH_SIZE, "Requests that shared one transaction at intake.", BATCHES
        )
        self.pool_wait_seconds = self._histogram(
            MetricName.POOL_WAIT_SECONDS, "Waiting for a connection to Postgres.", QUICK
        )
        self.loop_lag_seconds = self._histogram(
            MetricName.LOOP_LAG_SECONDS, "How late the event loop woke: what every request waits on top.", QUICK
        )
        self.clock_offset_seconds = self._gauge(
            MetricName.CLOCK_OFFSET_SECONDS,
            "The database's clock minus ours; beyond 5 s we are not ready.",
            Combine.FARTHEST,
        )
        self.task_runs = self._counter(MetricName.TASK_RUNS, "Runs of each periodic task.", "task")
        self.task_failures = self._counter(MetricName.TASK_FAILURES, "Runs of each periodic task that failed.", "task")
        self.spans_dropped = self._counter(
            MetricName.SPANS_DROPPED, "Spans that did not reach the collector, by reason.", "reason"
        )
        self.log_lines_dropped = self._counter(
            MetricName.LOG_LINES_DROPPED, "Log lines not written because standard output did not take them in time."
        )
        if version:
            Info(MetricName.BUILD.removesuffix("_info"), "The version that runs.", registry=self._registry).info(
                {"version": version}
            )
        self._across = None if directory is None else AcrossWorkers(directory, self._registry, self._gauges)

    def render(self) -> bytes:
        """The text format of Prometheus, version 0.0.4."""
        return generate_latest(self._registry if self._across is None else self._across)

    def of_destination(self, name: str) -> "DestinationMetrics":
        return DestinationMetrics(self, name)

    def forget_destination(self, name: str) -> None:
        """For a destination that the configuration no longer has; what was counted for it stays counted."""
        for gauge in (self.in_flight, self.concurrency_limit, self.breaker_open):
            gauge.remove_by_labels({"destination": name})

    def close(self) -> None:
        """Leave the last counts to the workers that go on."""
        if self._across is not None:
            self._across.close()

    def _counter(self, name: MetricName, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self._registry)

    def _histogram(self, name: MetricName, documentation: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, documentation, labels, buckets=buckets, registry=self._registry)

    def _crowded(self, name: MetricName, documentation: str, buckets: Sequence[float], *labels: str) -> "Crowded":
        return Crowded(name, documentation, labels, buckets=buckets, registry=self._registry)

    def _gauge(self, name: MetricName, documentation: str, how: Combine, *labels: str) -> Gauge:
        self._gauges[name] = how
        return Gauge(name, documentation, labels, registry=self._registry)

    def _reported(
        self, name: MetricName, documentation: str, *labels: str, fresh: timedelta = timedelta(minutes=5)
    ) -> Reported:
        reported = Reported(name, documentation, labels, fresh=fresh)
        self._gauges[name] = reported
        self._registry.register(reported)
        return reported


class Crowded(Histogram):
    """A histogram that is told many values at a time: one by one, each would take two locks and a search."""

    def observe_each(self, values: Sequence[float]) -> None:
        self._sum.inc(sum(values))
        for bucket, n in Counted(bisect_left(self._upper_bounds, value) for value in values).items():
            self._buckets[bucket].inc(n)


class SourceMetrics:
    """What is counted with each post of one source: in plain numbers until `tell`, since to tell each would cost a tenth of it."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self.accepted = 0
        self.duplicates = 0
        self.used: defaultdict[int, int] = defaultdict(int)  # each secret: one that stands still can be retired
        self.dropped: defaultdict[str, int] = defaultdict(int)  # keys that each policy does not name
        self.seconds: list[float] = []
        self._name = name
        self._accepted = metrics.accepted.labels(name)
        self._duplicates = metrics.duplicates.labels(name)
        self._seconds = metrics.request_seconds.labels(name)
        self._secret_used = metrics.secret_used
        self._dropped_keys = metrics.dropped_keys

    def tell(self) -> None:
        """Since the last time."""
        self._accepted.inc(self.accepted)
        self._duplicates.inc(self.duplicates)
        self.accepted = self.duplicates = 0
        for secret, n in self.used.items():
            self._secret_used.labels(self._name, str(secret)).inc(n)
        self.used.clear()
        for policy, n in self.dropped.items():
            self._dropped_keys.labels(self._name, policy).inc(n)
        self.dropped.clear()
        if self.seconds:
            self._seconds.observe_each(self.seconds)
            self.seconds.clear()


class DestinationMetrics:
    """What is counted with each delivery to one destination.

    The labelled children are found once, and what ended is counted in plain numbers until `tell`: with hundreds of
    deliveries in a moment, telling each of them to Prometheus would cost as much as writing it down.
    """

    def __init__(self, metrics: Metrics, name: str) -> None:
        self.attempt_seconds = metrics.attempt_seconds.labels(name)
        self.delivery_seconds = metrics.delivery_seconds.labels(name)
        self._name = name
        self._attempts = metrics.attempts
        self._ended: dict[str, int] = {}
        self._in_flight = metrics.in_flight.labels(name)
        self._concurrency_limit = metrics.concurrency_limit.labels(name)
        self._breaker_open = metrics.breaker_open.labels(name)
        self._gate: tuple[int, int, bool] | None = None

    def ended(self, outcome: str) -> None:
        self._ended[outcome] = self._ended.get(outcome, 0) + 1

    def tell(self) -> None:
        """Since the last time."""
        if self._ended:
            for outcome, n in self._ended.items():
                self._attempts.labels(self._name, outcome).inc(n)
            self._ended.clear()

    def tell_gate(self, *, in_flight: int, limit: int, paused: bool) -> None:
        if self._gate != (in_flight, limit, paused):
            self._gate = in_flight, limit, paused
            self._in_flight.set(in_flight)
            self._concurrency_limit.set(limit)
            self._breaker_open.set(paused)
