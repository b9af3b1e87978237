"""Requests for images: each gets its own, or an error that says why."""

import base64
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from helpers.scripts import wait_until
from helpers.server import (
    GENERATIONS,
    as_image,
    asked,
    error_of,
    images_of,
    leaving_client,
    serving,
    settled,
)
from helpers.serving import NAMES
from PIL import Image

from ether_diffusion.demo.settings import read_image


def test_adapters_at_once_give_each_request_its_own_image(server, alone):
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda name: server.generate(adapter=name, seed=3), [None, *NAMES]))
    references = [as_image(alone.images(asked(name, seed=3))) for name in [None, *NAMES]]
    for k, answer in enumerate(answers):
        (image,) = images_of(answer)
        assert np.abs(image - references[k]).max() <= 1
        assert int(np.argmin([np.abs(image - each).sum() for each in references])) == k


def test_a_model_can_name_the_adapter_and_an_adapter_its_strength(server, alone):
    (named,) = images_of(server.generate(model="base:dog", seed=1))
    (half,) = images_of(server.generate(model="base", adapter={"dog": 0.5}, seed=1))
    (composed,) = images_of(server.generate(adapter={"dog": 1.0, "cat": 0.6}, seed=1))
    assert np.abs(named - as_image(alone.images(asked("dog", seed=1)))).max() <= 1
    assert np.abs(half - as_image(alone.images(asked("dog", 0.5, seed=1)))).max() <= 1
    assert np.abs(composed - named).max() > 1


def test_several_images_have_consecutive_seeds_each_of_which_can_be_asked_for_alone(server):
    answer = server.generate(n=3, seed=2**32 - 2)
    assert [each["seed"] for each in answer.json()["data"]] == [2**32 - 2, 2**32 - 1, 0]
    for seed, image in zip((2**32 - 2, 2**32 - 1, 0), images_of(answer), strict=True):
        assert np.abs(images_of(server.generate(seed=seed))[0] - image).max() <= 1


def test_a_seed_is_drawn_and_told_where_none_is_given(server):
    answers = [server.generate() for _ in range(2)]
    seeds = [answer.json()["data"][0]["seed"] for answer in answers]
    assert seeds[0] != seeds[1]
    assert np.abs(images_of(server.generate(seed=seeds[0]))[0] - images_of(answers[0])[0]).max() <= 1


def test_a_png_says_how_it_was_made(server, tmp_path):
    answer = server.generate(adapter={"dog": 0.5}, seed=5, negative_prompt="a cat", guidance_scale=3.0)
    path = tmp_path / "image.png"
    path.write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    settings, _ = read_image(path)
    assert (settings.prompt, settings.negative_prompt, settings.seed) == ("a dog", "a cat", 5)
    assert (settings.steps, settings.guidance, dict(settings.adapters)) == (2, 3.0, {"dog": 0.5})


def test_size_and_format_are_as_asked_for(server):
    answer = server.generate(size="32x16", output_format="jpeg")
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    assert (image.format, image.size) == ("JPEG", (32, 16))
    assert (answer.json()["output_format"], answer.json()["size"]) == ("jpeg", "32x16")


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"n": 1.5}, "n", "valid integer"),
        ({"size": "16"}, "size", 'as "768x512"'),
        ({"size": "9999x9999"}, "size", "up to 4,194,304 fit"),
        ({"size": "17x16"}, None, "divisible by"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"adapter": {"dog": "much"}}, "adapter", "valid number"),
        ({"adapter": ["dog"]}, "adapter", 'as {"dog": 0.8}'),
        ({"model": "base:dog", "adapter": "dog"}, "adapter", "name it once"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
        ({"timeout": 1e9}, "timeout", "up to 120 fit"),
        ({"strength": 0.5}, "strength", "there is no such field"),
        ({"stream": True}, "stream", "False"),
    ],
)
def test_what_does_not_fit_is_refused_and_said_which_field_it_is(server, body, param, told):
    answer = server.generate(**body)
    error = error_of(answer)
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert told in error["message"]


@pytest.mark.parametrize(
    "content", [b"{", b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"[]", b'{"prompt": "a", "adapter": {"dog": NaN}}']
)
def test_bodies_that_are_no_requests_are_refused(server, content):
    answer = server.client.post(GENERATIONS, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and error_of(answer)["message"]


def test_an_unknown_adapter_or_model_is_never_the_base(server):
    for name in ("dgo", "../dog", "", "dog.safetensors", "\x00"):
        answer = server.generate(adapter=name)
        assert (answer.status_code, error_of(answer)["code"]) == (404, "adapter_not_found"), name
    assert "near it: dog" in error_of(server.generate(model="base:dgo"))["message"]
    for model in ("dall-e-3", "base:", "", "dog"):
        answer = server.generate(model=model)
        assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found"), model


def test_a_server_without_adapters_knows_none(tiny_pipeline):
    with serving(tiny_pipeline) as running:
        assert running.generate(adapter="dog").status_code == 404
        assert running.generate().status_code == 200
        assert [each["id"] for each in running.client.get("/v1/models").json()["data"]] == ["base"]
        assert running.client.get("/v1/adapters").json()["data"] == []


def test_a_broken_adapter_is_told_without_where_it_lies(own_server, adapters, tmp_path):
    (adapters / "broken.safetensors").write_bytes(b"no adapter at all")
    answer = own_server.generate(adapter={"dog": 1.0, "broken": 1.0})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (422, "adapter_does_not_fit")
    assert "broken.safetensors" in error["message"] and str(tmp_path) not in error["message"]


def test_a_request_past_its_timeout_is_answered_and_its_rows_are_free(server):
    answer = server.generate(num_inference_steps=500, timeout=0.3)
    assert (answer.status_code, error_of(answer)["code"]) == (504, "timeout")
    settled(server, 2)


def test_a_full_line_says_when_to_come_again_and_keeps_no_part_of_a_request(tiny_pipeline, adapters):
    with serving(tiny_pipeline, adapters, max_batch=2, max_line=2) as running:
        with ExitStack() as leaving:
            for waiting in (0, 1, 2):
                leaving.enter_context(leaving_client(running))
                wait_until(lambda: (running.engine.running, running.engine.waiting) == (1, waiting), 10)  # noqa: B023
            answer = running.generate()
            assert (answer.status_code, error_of(answer)["code"]) == (429, "line_full")
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
        settled(running)
        answer = running.generate(n=4, num_inference_steps=500)  # one runs, two wait: the fourth finds no place
        assert answer.status_code == 429
        settled(running)
        assert running.generate().status_code == 200


def test_clients_that_leave_free_their_rows_and_disturb_nobody(server, alone):
    settled(server)  # of the tests before
    stayed, left_before = [], server.metric("cancellations_total")
    staying = threading.Thread(target=lambda: stayed.append(server.generate(adapter="cat", seed=8)))
    with leaving_client(server, adapter="dog"), leaving_client(server, n=2):
        wait_until(lambda: server.engine.running == 3)
        staying.start()
        wait_until(lambda: stayed)
    settled(server, 5)
    (image,) = images_of(stayed[0])
    assert np.abs(image - as_image(alone.images(asked("cat", seed=8)))).max() <= 1
    wait_until(lambda: server.metric("cancellations_total") == left_before + 2, 5)


def test_one_image_of_a_request_that_fails_stops_the_others(tiny_pipeline, adapters):
    with serving(tiny_pipeline, adapters, max_batch=2, max_line=1) as running:
        assert running.generate(n=5, num_inference_steps=500).status_code == 429
        settled(running, 5)


def test_a_stopped_engine_takes_nothing(own_server):
    own_server.engine.close()
    answer = own_server.generate()
    assert (answer.status_code, error_of(answer)["type"]) == (503, "server_error")
    for path in ("/health/live", "/health/ready"):
        assert own_server.client.get(path).status_code == 503


def test_paths_and_methods_that_are_not_there_are_answered_in_the_same_form(server):
    assert error_of(server.client.get("/v1/chat"))["message"].startswith("GET /v1/chat: Not Found")
    answer = server.client.get(GENERATIONS)
    assert answer.status_code == 405 and error_of(answer)["type"] == "invalid_request_error"


def test_a_body_of_any_length_is_refused_while_it_arrives(server):
    large = b'{"prompt": "' + b"a" * 2**21 + b'"}'
    for content in (large, iter([large[: 2**20], large[2**20 :]])):  # with and without a length
        answer = server.client.post(GENERATIONS, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413 and "1,048,576 bytes fit" in error_of(answer)["message"]
