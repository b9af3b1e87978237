"""Tokens: who is let in, and how much each may ask for."""

import asyncio

import httpx
import pytest
from helpers.scripts import wait_until
from helpers.server import GENERATIONS, error_of, leaving_client, serving, settled

from ether_diffusion.errors import InputError
from ether_diffusion.server.tokens import read_tokens

ALICE, BOB = "alice-has-this-token", "bob-has-another-one"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def guarded(tiny_pipeline, adapters):
    settings = {"tokens": frozenset({ALICE, BOB}), "token_limit": 2, "uploads": True}
    with serving(tiny_pipeline, adapters, max_batch=2, **settings) as running:
        yield running


def test_nothing_but_health_metrics_and_documentation_is_open_without_a_token(guarded):
    closed = [
        ("POST", GENERATIONS),
        ("GET", "/v1/models"),
        ("GET", "/v1/adapters"),
        ("POST", "/v1/adapters"),
        ("DELETE", "/v1/adapters/dog"),
    ]
    for headers in ({}, bearer("a-token-nobody-has"), {"Authorization": ALICE}, {"Authorization": "Bearer é"}):
        for method, path in closed:
            raw = {name: value.encode("latin-1") for name, value in headers.items()}
            answer = guarded.client.request(method, path, headers=raw, json={"prompt": "a dog"})
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
            assert error_of(answer)["type"] == "authentication_error"
    for path in ("/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json"):
        assert guarded.client.get(path).status_code == 200
    assert len(guarded.client.get("/v1/models", headers=bearer(ALICE)).json()["data"]) == 5


def test_each_token_has_a_limit_of_its_own(guarded):
    body = {"prompt": "a dog", "num_inference_steps": 2}
    many = guarded.client.post(GENERATIONS, json={**body, "n": 3}, headers=bearer(ALICE))
    assert (many.status_code, error_of(many)["code"]) == (429, "token_limit")
    with leaving_client(guarded, n=2, num_inference_steps=60, headers=bearer(ALICE)):
        wait_until(lambda: guarded.engine.running + guarded.engine.waiting == 2)
        refused = guarded.client.post(GENERATIONS, json=body, headers=bearer(ALICE))
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) > 0
        assert guarded.client.post(GENERATIONS, json={**body, "timeout": 60}, headers=bearer(BOB)).status_code == 200
    settled(guarded)
    assert guarded.client.post(GENERATIONS, json=body, headers=bearer(ALICE)).status_code == 200


def test_tokens_take_turns(tiny_pipeline):
    """One image at a time: who comes once waits for one image of another's many, not for all."""
    ended = []

    async def ask(client: httpx.AsyncClient, token: str, name: str) -> None:
        body = {"prompt": "a dog", "num_inference_steps": 15}
        await client.post(GENERATIONS, json=body, headers=bearer(token))
        ended.append(name)

    async def run(url: str, engine) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            first = [asyncio.create_task(ask(client, ALICE, "alice")) for _ in range(5)]
            while engine.waiting < 4:
                await asyncio.sleep(0.01)
            await asyncio.gather(*first, asyncio.create_task(ask(client, BOB, "bob")))

    with serving(tiny_pipeline, tokens=frozenset({ALICE, BOB}), max_batch=2) as running:
        asyncio.run(run(running.url, running.engine))
    assert ended.index("bob") <= 2 and len(ended) == 6


def test_a_file_of_tokens_may_have_comments_and_empty_lines(tmp_path):
    file = tmp_path / "tokens.txt"
    file.write_text(f"# of alice\n{ALICE}\n\n  {BOB}  \n")
    assert read_tokens(file) == {ALICE, BOB}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds no token"),
        ("# only a comment\n", "holds no token"),
        ("short\n", "line 1: a token has 16 or more"),
        (f"{ALICE}\ntwo words in one line\n", "line 2: a token has"),
        (f"{ALICE}\n{BOB}\n{ALICE}\n", "line 3: the token of line 1 again"),
    ],
)
def test_lines_that_can_be_no_tokens_are_refused_without_showing_them(tmp_path, content, told):
    file = tmp_path / "tokens.txt"
    file.write_text(content)
    with pytest.raises(InputError, match=told) as refused:
        read_tokens(file)
    assert not any(line in str(refused.value) for line in content.split() if line[0] != "#" and len(line) > 5)
