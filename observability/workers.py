"""Several worker processes of one host, and a scrape that reaches only one of them: it answers for all.

Each worker writes what it has counted into the shared directory once a second and whenever it is asked; whoever is
asked adds up what lies there. A worker holds a lock for as long as it lives. What a dead one had counted is added to
`gone.json`, since a counter must never fall, and what it had under way is forgotten.

The library's own multi-process mode was not taken: it is switched by an environment variable before the first import,
cannot forget the series of a destination that no longer exists, and lets the files of dead workers pile up.
"""

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import Enum, auto
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

EVERY = timedelta(seconds=1)
PATIENCE = timedelta(seconds=0.2)


class Combine(Enum):
    """How the gauges of several workers become one; counters and histograms are always added up."""

    SUM = auto()
    MAX = auto()
    MIN = auto()
    FARTHEST = auto()  # from zero


class Reported(Collector):
    """A gauge that someone reports as a whole now and then: what the report leaves out is gone.

    A report that nobody renews grows old and disappears, so that no dashboard shows yesterday's calm.
    """

    def __init__(self, name: str, documentation: str, labels: tuple[str, ...], *, fresh: timedelta) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._fresh = fresh
        self._values: dict[tuple[str, ...], float] = {}
        self._at = 0.0

    def report(self, values: Mapping[str, float] | Mapping[tuple[str, str], float] | float) -> None:
        """The present values: by label, or labels, or the one value of a gauge without."""
        by_label: Mapping[Any, float] = values if isinstance(values, Mapping) else {(): values}
        self._values = {(label,) if isinstance(label, str) else label: float(v) for label, v in by_label.items()}
        self._at = time.time()

    @property
    def at(self) -> float:
        """When it was reported; 0 if that is too long ago."""
        return self._at if time.time() - self._at < self._fresh.total_seconds() else 0.0

    def collect(self) -> Iterable[Metric]:
        metric = Metric(self._name, self._documentation, "gauge")
        if self.at:
            for label, value in self._values.items():
                metric.add_sample(self._name, dict(zip(self._labels, label, strict=True)), value)
        return [metric]


class AcrossWorkers(Collector):
    """This worker's metrics and those of the others that share the directory, as one."""

    def __init__(self, directory: Path, registry: CollectorRegistry, gauges: Mapping[str, Combine | Reported]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._registry = registry
        self._gauges = gauges
        self._name = uuid4().hex
        self._others: list[list[Family]] = []
        with self._locked():
            self._alive = os.open(directory / f"{self._name}.lock", os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._alive, fcntl.LOCK_EX)
        self._writing = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="metrics across workers", daemon=True)
        self._thread.start()

    def collect(self) -> Iterable[Metric]:
        """Everybody's metrics: of this moment for this worker, at most a second old for the others."""
        own = self._write()
        with suppress(OSError), self._locked():  # else they are as they were: a full disk must not make counters fall
            gone = self._bury_the_dead()
            files = [path for path in self._directory.glob("*.json") if path.stem not in (self._name, "gone")]
            self._others = [gone.families, *map(_families, files)]
        return combined([own, *self._others], self._gauges)

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._write()
        os.close(self._alive)

    def _work(self) -> None:
        while not self._stopping.wait(EVERY.total_seconds()):
            self._write(gently=True)

    def _write(self, *, gently: bool = False) -> "list[Family]":
        own: list[Family] = []
        for metric in self._registry.collect():
            own.append(self._family(metric))
            if gently:
                time.sleep(0)  # let the event loop go first: the whole may take 10 ms where there are many destinations
        with self._writing, suppress(OSError):  # the next second tries again
            _replace(self._directory / f"{self._name}.json", msgspec.json.encode(own))
        return own

    def _family(self, metric: Metric) -> "Family":
        how = self._gauges.get(metric.name)
        at = how.at if isinstance(how, Reported) else 0.0
        series = [Series(sample.name, dict(sample.labels), float(sample.value)) for sample in metric.samples]
        return Family(metric.name, metric.type, metric.documentation, at, series)

    def _bury_the_dead(self) -> "Gone":
        """Add what they had counted to `gone.json`, once, even if this worker dies in the middle of it."""
        memory = self._directory / "gone.json"
        gone = msgspec.json.decode(memory.read_bytes(), type=Gone) if memory.exists() else Gone([], [])
        for lock in filter(_is_dead, self._directory.glob("*.lock")):
            left = lock.with_suffix(".json")
            if left.exists() and lock.stem not in gone.buried:
                counted = [family for family in _families(left) if family.type in ("counter", "histogram")]
                unfinished = [name for name in gone.buried if (self._directory / f"{name}.json").exists()]
                gone = Gone([*unfinished, lock.stem], _added_up([gone.families, counted], {}))
                _replace(memory, msgspec.json.encode(gone))
            for file in (left, left.with_suffix(".unfinished"), lock):
                file.unlink(missing_ok=True)
        return gone

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time in the directory; the kernel lets go of it for one that dies, and one that hangs is not waited for."""
        lock = os.open(self._directory / "directory", os.O_CREAT | os.O_RDWR, 0o600)
        deadline = time.monotonic() + PATIENCE.total_seconds()
        try:
            while not _taken(lock):
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(0.005)
            yield
        finally:
            os.close(lock)


def start_afresh(directory: Path) -> None:
    """Forget what an earlier run left; for the parent, before its workers start."""
    shutil.rmtree(directory, ignore_errors=True)


class Series(msgspec.Struct, array_like=True, frozen=True):
    name: str
    labels: dict[str, str]
    value: float


class Family(msgspec.Struct, array_like=True, frozen=True):
    name: str
    type: str
    documentation: str
    at: float
    series: list[Series]


class Gone(msgspec.Struct, array_like=True, frozen=True):
    """What dead workers had counted, and whose file may still lie there although it is in here."""

    buried: list[str]
    families: list[Family]


def combined(workers: Iterable[list[Family]], gauges: Mapping[str, Combine | Reported]) -> Iterator[Metric]:
    for family in _added_up(workers, gauges):
        metric = Metric(family.name, family.documentation, family.type)
        for series in family.series:
            metric.add_sample(series.name, series.labels, series.value)
        yield metric


def _added_up(workers: Iterable[list[Family]], gauges: Mapping[str, Combine | Reported]) -> list[Family]:
    by_name: dict[str, list[Family]] = {}
    for families in workers:
        for family in families:
            by_name.setdefault(family.name, []).append(family)
    return [_one(same, gauges.get(name) or _usual(same[0])) for name, same in by_name.items()]


def _usual(family: Family) -> Combine:
    """What is told and not counted stays 1, however many tell it."""
    return Combine.MAX if family.type == "info" else Combine.SUM


def _one(same: list[Family], how: Combine | Reported) -> Family:
    first = same[0]
    if isinstance(how, Reported):
        return max(same, key=lambda family: family.at)
    values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for series in (series for family in same for series in family.series):
        key = (series.name, tuple(series.labels.items()))
        values[key] = series.value if key not in values else _both(values[key], series.value, how)
    return Family(
        first.name,
        first.type,
        first.documentation,
        0.0,
        [Series(name, dict(labels), value) for (name, labels), value in values.items()],
    )


def _both(one: float, other: float, how: Combine) -> float:
    match how:
        case Combine.SUM:
            return one + other
        case Combine.MAX:
            return max(one, other)
        case Combine.MIN:
            return min(one, other)
        case Combine.FARTHEST:
            return max(one, other, key=abs)


def _families(path: Path) -> list[Family]:
    return msgspec.json.decode(path.read_bytes(), type=list[Family])


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def _is_dead(lock: Path) -> bool:
    file = os.open(lock, os.O_RDWR)
    try:
        return _taken(file)
    finally:
        os.close(file)


def _taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
