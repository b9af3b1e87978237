"""What a server tells Prometheus. No label ever holds an adapter's name, a prompt or a token."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ether_diffusion.server.backend import MadeImage
from ether_diffusion.server.errors import CLIENT_LEFT
from ether_diffusion.serving import Engine

PREFIX = "ether_diffusion"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
GAUGES = {
    "waiting_requests": "images in line",
    "running_requests": "images that are being made",
    "largest_forward_rows": "rows of the largest forward",
    "adapter_host_bytes": "bytes of adapters in main memory",
}
COUNTERS = {
    "forwards": "forwards of the models that have adapters",
    "forward_rows": "rows of these forwards; rows a forward is the ratio of the two rates",
    "forward_seconds": "seconds in these forwards",
    "failed_forwards": "forwards that raised; their requests were tried again by halves",
    "adapter_loads": "adapters read from the folder",
}


def engine_values(engine: Engine) -> dict[str, float]:
    """What an engine has to tell, by the names of `GAUGES` and `COUNTERS`."""
    counts, store = engine.counts, engine.store
    return {
        "waiting_requests": engine.waiting,
        "running_requests": engine.running,
        "largest_forward_rows": counts.largest,
        "adapter_host_bytes": 0 if store is None else store.nbytes,
        "forwards": counts.forwards,
        "forward_rows": counts.rows,
        "forward_seconds": counts.seconds,
        "failed_forwards": counts.failed,
        "adapter_loads": 0 if store is None else store.loads,
    }


class EngineCollector(Collector):
    """Looks at an engine whenever it is asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        values = engine_values(self._engine)
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, values[name])
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, values[name])


class Metrics:
    """What an app counts and times.

    Args:
        engine: of this process, where there is one.
    """

    def __init__(self, engine: Engine | None = None) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        if engine is not None:
            self.registry.register(EngineCollector(engine))
        self._line = self._histogram("line_seconds", "from when an image is asked for to its first step")
        self._step = self._histogram("step_seconds", "a step of an image")
        self._request = self._histogram("request_seconds", "from a request to its answer, of those that succeeded")
        self._images = Counter(f"{PREFIX}_images", "images made", registry=self.registry)
        self._refusals = Counter(
            f"{PREFIX}_refusals", "requests answered with an error", ["status"], registry=self.registry
        )
        self._cancellations = Counter(
            f"{PREFIX}_cancellations", "requests whose client left before the answer", registry=self.registry
        )

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=SECONDS, registry=self.registry)

    def made(self, images: list[MadeImage], seconds: float) -> None:
        """A request was answered with these images after so many seconds."""
        self._request.observe(seconds)
        self._images.inc(len(images))
        for image in images:
            self._line.observe(image.line)
            for step in image.steps:
                self._step.observe(step)

    def answered(self, status: int) -> None:
        """A request was answered with this status."""
        if status == CLIENT_LEFT:
            self._cancellations.inc()
        elif status >= 400:
            self._refusals.labels(str(status)).inc()


class CountAnswers:
    """ASGI middleware that tells the metrics how requests to the API were answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(message["status"])
            await send(message)

        is_api = scope["type"] == "http" and scope["path"].startswith("/v1/")
        await self._app(scope, receive, send_counted if is_api else send)
