"""Health and metrics: what a watchdog and Prometheus see."""

import threading

from helpers.scripts import wait_until
from helpers.server import images_of, leaving_client, serving, settled
from helpers.serving import NAMES
from prometheus_client.parser import text_string_to_metric_families


def test_a_forward_that_hangs_fails_liveness_until_it_is_through(tiny_pipeline):
    goes_on = threading.Event()
    hook = tiny_pipeline.unet.register_forward_pre_hook(lambda *_: goes_on.wait(30) and None)
    with serving(tiny_pipeline, hang_after=0.2) as running:
        assert running.client.get("/health/live").status_code == 200
        with leaving_client(running):
            wait_until(lambda: running.client.get("/health/live").status_code == 503, 10)
            assert "more than 0.2 seconds" in running.client.get("/health/ready").json()["status"]
            late = running.generate(timeout=0.1)
            assert late.status_code == 504  # who waits is answered, whatever hangs
            goes_on.set()
        settled(running)
        assert running.client.get("/health/live").json() == {"status": "ok"}
    hook.remove()


def test_metrics_count_what_happened_and_never_name_an_adapter(tiny_pipeline, adapters):
    with serving(tiny_pipeline, adapters) as running:
        for name in NAMES:
            images_of(running.generate(adapter=name, n=2))
        assert running.generate(adapter="dgo").status_code == 404
        settled(running)  # an answer is out a moment before its request has ended
        with leaving_client(running):
            wait_until(lambda: running.engine.running == 1)
            assert running.metric("running_requests") == 1
        settled(running)
        wait_until(lambda: running.metric("cancellations_total") == 1, 5)
        text = running.client.get("/metrics").text
        values = {name: running.metric(name) for name in ("images_total", "refusals_total", "adapter_loads_total")}
        assert values == {"images_total": 8, "refusals_total": 1, "adapter_loads_total": 4}
        assert running.metric("step_seconds_count") == 16 and running.metric("line_seconds_count") == 8
        assert running.metric("request_seconds_count") == 4 and running.metric("adapter_host_bytes") > 0
        assert running.metric("forward_rows_total") > running.metric("forwards_total") > 0
    families = list(text_string_to_metric_families(text))
    labels = {label for family in families for sample in family.samples for label in sample.labels}
    assert labels <= {"le", "status"} and not any(name in text for name in NAMES)
