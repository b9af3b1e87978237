"""Replicas on a Ray cluster of this machine: one that is killed is missed by nobody."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
import yaml
from helpers.scripts import ROOT, wait_until
from helpers.server import as_image, asked, error_of, images_of
from helpers.serving import NAMES

pytest.importorskip("ray.serve", exc_type=ImportError, reason='an extra: pip install "ether-diffusion[ray]"')

from ether_diffusion.server.ray_serve import RayArguments, build

REPLICA = "ray::ServeReplica:ether-diffusion:engines"


def replicas(root: psutil.Process) -> dict[int, psutil.Process]:
    """The processes that hold an engine."""
    found = {}
    for process in root.children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(REPLICA):
                found[process.pid] = process
        except psutil.Error:  # just gone
            continue
    return found


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, tiny_pipeline_folder, served_adapters_once):
    """A server of two replicas as the command starts it: its process and a client."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = ["--base", str(tiny_pipeline_folder), "--adapters", str(served_adapters_once)]
    flags = ["--engine", "ray", "--replicas", "2:2", "--max_batch", "4", "--max_line", "8", "--port", str(port)]
    command = [sys.executable, "-m", "ether_diffusion.commands.main", "serve", *folders, *flags]
    # A cluster of its own, whose processes are no less urgent than the test.
    ray = {"RAY_ADDRESS": "local", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **ray}
    log = tmp_path_factory.mktemp("ray") / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
    root = psutil.Process(process.pid)
    started = lambda: process.poll() is not None or "on Ray" in log.read_text()  # noqa: E731
    try:
        wait_until(started, 400)
        assert process.poll() is None, log.read_text()[-3000:]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=200) as client:
            yield root, client
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


def generate(client, **body) -> httpx.Response:
    return client.post("/v1/images/generations", json={"prompt": "a dog", "num_inference_steps": 2, **body})


@pytest.mark.slow
def test_replicas_answer_as_one_server_does(cluster, alone):
    _, client = cluster
    (image,) = images_of(generate(client, adapter="dog", seed=3))
    assert np.abs(image - as_image(alone.images(asked("dog", seed=3)))).max() <= 1
    assert len(images_of(generate(client, n=3))) == 3
    unknown = generate(client, adapter="dgo")
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "adapter_not_found")
    late = generate(client, num_inference_steps=500, timeout=0.5)
    assert (late.status_code, error_of(late)["code"]) == (504, "timeout")


@pytest.mark.slow
def test_an_adapter_that_many_ask_for_is_served_by_all_replicas(cluster):
    root, client = cluster
    before = {pid: cpu_seconds(process) for pid, process in replicas(root).items()}
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda k: generate(client, adapter="dog", num_inference_steps=50), range(16)))
    assert [answer.status_code for answer in answers] == [200] * 16
    spent = [cpu_seconds(process) - before[pid] for pid, process in replicas(root).items()]
    assert len(spent) == 2 and min(spent) > 0.2 * sum(spent), spent


@pytest.mark.slow
def test_what_does_not_fit_the_line_is_told_when_to_come_again(cluster):
    _, client = cluster
    with ThreadPoolExecutor(48) as threads:  # 8 at a time fit each replica, and 8 wait
        answers = list(threads.map(lambda k: generate(client, num_inference_steps=40, seed=k), range(48)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) <= 48 - 8
    for answer in refused:
        assert (answer.status_code, error_of(answer)["code"], answer.headers["Retry-After"]) == (429, "line_full", "5")


@pytest.mark.slow
def test_a_client_that_leaves_stops_the_replica_that_worked_for_it(cluster):
    root, client = cluster
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/images/generations", json={"prompt": "a dog", "num_inference_steps": 500, "n": 4}, timeout=2)

    def are_idle() -> bool:
        before = sum(map(cpu_seconds, replicas(root).values()))
        time.sleep(1)
        return sum(map(cpu_seconds, replicas(root).values())) - before < 0.2

    wait_until(are_idle, 15)


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load_is_missed_by_nobody(cluster, alone):
    root, client = cluster
    names = [NAMES[k % 4] for k in range(12)]
    killed = min(replicas(root))
    with ThreadPoolExecutor(12) as threads:
        jobs = [
            threads.submit(generate, client, adapter=name, seed=k, num_inference_steps=60)
            for k, name in enumerate(names)
        ]
        before = cpu_seconds(psutil.Process(killed))
        wait_until(lambda: cpu_seconds(psutil.Process(killed)) > before + 0.3, 60)  # it is at work
        os.kill(killed, signal.SIGKILL)
        answers = [job.result() for job in jobs]
    for k, (name, answer) in enumerate(zip(names, answers, strict=True)):
        (image,) = images_of(answer)
        assert np.abs(image - as_image(alone.images(asked(name, seed=k, steps=60)))).max() <= 1
    began = time.monotonic()
    wait_until(lambda: len(replicas(root)) == 2 and killed not in replicas(root), 120)
    print(f"a new replica after {time.monotonic() - began:.0f} s")


def test_the_deployment_says_what_the_documentation_says_of_it(tiny_pipeline_folder):
    arguments = RayArguments(base=str(tiny_pipeline_folder), max_batch=4, min_replicas=2, max_replicas=8, num_gpus=1)
    application = build(arguments)
    (engines,) = application._bound_deployment.init_args[:1]
    config = engines._bound_deployment._deployment_config
    assert (config.max_ongoing_requests, config.max_queued_requests) == (8, 64)
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (2, 8)


def test_the_config_file_for_clusters_can_be_given():
    config = yaml.safe_load((ROOT / "configs" / "serving" / "ray_serve.yaml").read_text())
    (application,) = config["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    assert RayArguments(**application["args"]).max_replicas == 8
