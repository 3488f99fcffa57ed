"""How tasks are ended."""

import asyncio


async def end(*tasks: "asyncio.Task[None]") -> None:
    """Cancel until they are over: before Python 3.12, wait_for loses a cancellation that comes as its wait ends."""
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=0.5)
