"""Deliveries, from the read to the settle."""

from benchmarks.rows import Row

ROWS: tuple[Row, ...] = ()
