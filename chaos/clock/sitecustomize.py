"""Sets the clock of one Python process: `time.time` is off by the seconds that stand in the file CHAOS_CLOCK, at each moment.

Only for processes that find this folder in PYTHONPATH.  The monotonic clock is left alone, as on a machine whose date is set.
"""

import os
import time
from pathlib import Path

_clock = Path(os.environ["CHAOS_CLOCK"])
_right = time.time


def _wrong() -> float:
    return _right() + float(_clock.read_text() or 0)


time.time = _wrong
