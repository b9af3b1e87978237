"""Requests as lines of JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ether_diffusion.errors import InputError
from ether_diffusion.serving.lines import ImageRequest, adapter_names, make_request, read_lines, shard


def write(folder, *lines: str):
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_line_says_everything_and_flags_hold_where_it_leaves_out(tmp_path):
    full = {
        "prompt": "a dog", "adapter": {"dog": 0.5, "style": 1}, "negative_prompt": "blur", "seed": 5, "steps": 9,
        "guidance": 2, "size": "768x512",
    }  # fmt: skip
    path = write(
        tmp_path, json.dumps(full), "", '{"prompt": "a cat", "adapter": "cat", "strength": 0.8, "steps": null}'
    )
    first, second = read_lines(path, {"seed": 100, "steps": 3, "guidance": 7.5})
    assert first.arguments == {
        "prompt": "a dog", "seed": 5, "adapter": {"dog": 0.5, "style": 1.0}, "negative_prompt": "blur",
        "num_inference_steps": 9, "guidance_scale": 2.0, "width": 768, "height": 512,
    }  # fmt: skip
    assert second == ImageRequest(prompt="a cat", adapters=(("cat", 0.8),), seed=101, steps=3, guidance=7.5)
    assert adapter_names([first, second]) == ["cat", "dog", "style"]


@pytest.mark.parametrize(
    "line, told",
    [
        ("{", "line 2: is no JSON"),
        ("[1]", "line 2: is no JSON object"),
        ("[" * 100_000, "line 2: is no JSON"),
        ("{}", "line 2: has no prompt"),
        ('{"prompt": " "}', "line 2: prompt: got ' ', needs a text"),
        ('{"prompt": "a", "step": 3}', "line 2: step: there is no such key; there are prompt, negative_prompt, seed"),
        ('{"prompt": "a", "steps": 0}', "line 2: steps: got 0, needs a whole number from 1"),
        ('{"prompt": "a", "steps": true}', "line 2: steps: got True"),
        ('{"prompt": "a", "seed": -1}', "line 2: seed: got -1, needs a whole number from 0"),
        ('{"prompt": "a", "guidance": NaN}', "line 2: guidance: got nan, needs a finite number"),
        (
            '{"prompt": "a", "size": "512"}',
            "line 2: size: got '512', needs width and height in pixels, as \"768x512\"",
        ),
        ('{"prompt": "a", "strength": 1}', "line 2: strength is that of the one adapter that is named"),
        ('{"prompt": "a", "adapter": ["x"]}', "line 2: adapter: got"),
        ('{"prompt": "a", "adapter": {"x": "1"}}', "line 2: strength of x: got '1', needs a finite number"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(line, told, tmp_path):
    with pytest.raises(InputError) as caught:
        read_lines(write(tmp_path, '{"prompt": "fine"}', line), {"seed": 0})
    assert told in str(caught.value)


def test_a_file_without_lines_or_in_another_encoding_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no line"):
        read_lines(write(tmp_path, "", " "), {"seed": 0})
    (tmp_path / "latin").write_bytes(b'{"prompt": "perro peque\xf1o"}')
    with pytest.raises(InputError, match="is no text in UTF-8"):
        read_lines(tmp_path / "latin", {"seed": 0})


REQUESTS = st.builds(
    ImageRequest,
    prompt=st.text(min_size=1),
    adapters=st.lists(st.tuples(st.text(), st.floats(0, 2)), max_size=2).map(tuple),
    seed=st.integers(0, 5),
    size=st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3)),
)


@given(requests=st.lists(REQUESTS, max_size=20), processes=st.integers(1, 5))
def test_processes_share_out_all_requests_and_no_image_has_two_makers(requests, processes):
    parts = [shard(requests, k, processes) for k in range(processes)]
    assert sorted(r.file_name for part in parts for r in part) == sorted({r.file_name for r in requests})
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(first=REQUESTS, second=REQUESTS)
def test_the_name_of_a_file_tells_requests_apart(first, second):
    assert (first.file_name == second.file_name) == (first == second)
    assert first.file_name.isascii() and len(first.file_name) == 20


def test_keys_that_flags_give_are_checked_as_those_of_lines():
    with pytest.raises(InputError, match="--prompt: size: got 'big'"):
        make_request({"prompt": "a"}, "--prompt", {"size": "big"})
