"""From the scheduler's thread to the event loop: in order, nothing lost, and one call for what a step gave."""

import asyncio
import threading

import live_server
import pytest
from live_server import Live

from teal_cli.serve.mailbox import Mailbox

calibrated = pytest.fixture(scope="module")(live_server.calibrated)
live = pytest.fixture(scope="module")(live_server.live)


def test_everything_comes_in_order() -> None:
    """Of two threads at once, that wake the loop while it delivers."""
    came: list[tuple[int, int]] = []

    async def hear() -> None:
        box = Mailbox(asyncio.get_running_loop())

        def say(name: int) -> None:
            for number in range(3000):
                box.put(came.append, (name, number))
                if number % 3 == 2:
                    box.wake()

        threads = [threading.Thread(target=say, args=(name,)) for name in range(2)]
        for thread in threads:
            thread.start()
        async with asyncio.timeout(live_server.PATIENCE):
            while len(came) < 6000:
                await asyncio.sleep(0.001)

    asyncio.run(hear())
    for name in range(2):
        assert [number for own, number in came if own == name] == list(range(3000))


def test_a_loop_is_woken_once_for_several() -> None:
    calls: list[object] = []

    class Loop:
        is_closed = staticmethod(lambda: False)
        call_soon_threadsafe = staticmethod(calls.append)

    box, came = Mailbox(Loop()), list[int]()  # type: ignore[arg-type]
    box.wake()
    for number in range(4):
        box.put(came.append, number)
    box.wake()
    box.wake()
    assert len(calls) == 1
    calls[0]()  # type: ignore[operator]
    assert came == [0, 1, 2, 3]
    box.put(came.append, 4)
    box.wake()
    assert len(calls) == 2


def test_nobody_hears_after_the_loop_has_ended() -> None:
    async def made() -> Mailbox:
        return Mailbox(asyncio.get_running_loop())

    box = asyncio.run(made())
    with pytest.raises(RuntimeError, match="nobody hears"):
        box.put(print, 1)
    box.wake()


def test_a_step_wakes_the_server_once(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four replies to one request that decode together."""
    woken: list[int] = []
    wake = Mailbox.wake

    def counted(box: Mailbox) -> None:
        if box._said and not box._is_waking:  # what a slow loop has not fetched yet is under way
            woken.append(len(box._said))
        wake(box)

    with live.client() as client:
        client.completions.create(model=live.name, prompt="a", max_tokens=1)  # makes the mailbox
        mailbox = live.service._mailbox
        assert mailbox is not None
        monkeypatch.setattr(live.service.served.scheduler, "on_said", lambda: counted(mailbox))
        tokens, replies = 40, 4
        found = client.completions.create(model=live.name, prompt="a b c", max_tokens=tokens, n=replies, temperature=1)
    assert len(found.choices) == replies
    live.wait_until_idle()
    assert found.usage is not None
    assert len(woken) <= found.usage.completion_tokens / 2
