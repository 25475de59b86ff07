"""A short form of `make soak`: mixed requests, clients that leave, nonsense and fuzz; nothing leaks, nothing fails."""

import json
import logging

import live_server
import pytest
from live_server import Live

calibrated = pytest.fixture(scope="module")(live_server.calibrated)
live = pytest.fixture(scope="module")(live_server.live)


@pytest.fixture(autouse=True)
def _no_errors_are_logged(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    yield
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_eighty_requests(live: Live) -> None:
    from soak import soak

    found = soak(live.port, 80, levels=[0, 0.3, 0.5], most=12)
    assert not found.wrong
    assert found.asked["leaving"] > 3
    assert found.asked["malformed"] > 0
    assert found.statuses[200] > 50
    assert set(found.statuses) <= {200, 400, 404, 429}
    live.wait_until_idle()
    assert live.statistics().cache_used == 0


def test_a_hundred_fuzzed_requests(live: Live) -> None:
    from soak import fuzz

    found = fuzz(live.port, 100)
    assert not found.wrong
    assert found.statuses[400] > 30
    assert found.statuses[200] > 10
    live.wait_until_idle()
    with live.client() as client:
        assert json.loads(client.models.list().to_json())["data"][0]["id"] == "tiny"
