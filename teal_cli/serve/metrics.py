"""What /metrics tells: Prometheus' text of counters, gauges and histograms."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from teal_cli.decode.requests import Statistics

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


class Metrics:
    """Counts requests, replies and their times.

    Args:
        statistics: of the scheduler; None while the model is loaded.
    """

    def __init__(self, statistics: Callable[[], Statistics | None]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "teal_http_requests", "Requests by path and status.", ["path", "status"], registry=self._registry
        )
        self._first_token = Histogram(
            "teal_time_to_first_token_seconds",
            "From the submission of a request to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._per_token = Histogram(
            "teal_time_per_token_seconds",
            "Mean time between the tokens of a reply.",
            buckets=_TOKEN_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Scheduler(statistics))

    def request(self, path: str, status: int) -> None:
        """An HTTP request was answered."""
        self._requests.labels(path, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        """The first token of a reply came."""
        self._first_token.observe(seconds)

    def reply(self, tokens_per_second: float | None) -> None:
        """A reply ended as it should."""
        if tokens_per_second is not None:
            self._per_token.observe(1.0 / tokens_per_second)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)


class _Scheduler:
    """The scheduler's own numbers, read when somebody asks."""

    def __init__(self, statistics: Callable[[], Statistics | None]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterable[Metric]:
        found = self._statistics()
        if found is None:
            return
        yield GaugeMetricFamily("teal_requests_running", "Requests in slots.", found.running)
        yield GaugeMetricFamily("teal_requests_queued", "Requests that wait.", found.queued)
        yield GaugeMetricFamily("teal_slots", "Sequences that decode together, at most.", found.slots)
        ended = CounterMetricFamily("teal_requests_finished", "Requests by how they ended.", labels=["finish"])
        for finish, count in sorted(found.finished.items()):
            ended.add_metric([finish], count)
        yield ended
        yield CounterMetricFamily("teal_prompt_tokens", "Tokens of prompts.", found.prompt_tokens)
        yield CounterMetricFamily(
            "teal_prompt_tokens_cached", "Of them, those whose keys and values were kept.", found.cached_tokens
        )
        yield CounterMetricFamily("teal_completion_tokens", "Tokens of replies.", found.completion_tokens)
        yield CounterMetricFamily(
            "teal_passes", "Steps that wrote replies, each counted once for each sequence.", found.passes
        )
        if found.drafted_tokens is not None and found.accepted_tokens is not None:
            yield CounterMetricFamily("teal_drafted_tokens", "Tokens that were drafted.", found.drafted_tokens)
            yield CounterMetricFamily("teal_accepted_tokens", "Of them, those accepted.", found.accepted_tokens)
        if found.realised_sparsity is not None:
            yield GaugeMetricFamily(
                "teal_realised_sparsity",
                "Of all steps, weights not read over the weights of the blocks' projections.",
                found.realised_sparsity,
            )
        yield GaugeMetricFamily("teal_cache_positions", "Positions of the KV caches.", found.cache_positions)
        yield GaugeMetricFamily("teal_cache_positions_used", "Of them, by running requests.", found.cache_used)
        yield GaugeMetricFamily(
            "teal_cache_positions_kept", "Of them, kept for requests that begin alike.", found.cache_kept
        )
