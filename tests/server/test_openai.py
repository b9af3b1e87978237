"""OpenAI's own client asks the server."""

import base64
import io

import numpy as np
import pytest
from helpers.server import as_image, asked
from PIL import Image

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="not needed", max_retries=0) as client:
        yield client


def test_it_gets_images_of_a_model_with_an_adapter(client, alone):
    extra = {"seed": 6, "num_inference_steps": 2}
    answer = client.images.generate(
        model="base:dog", prompt="a dog", n=2, size="16x16", response_format="b64_json", extra_body=extra
    )
    images = [Image.open(io.BytesIO(base64.b64decode(each.b64_json))) for each in answer.data]
    reference = as_image(alone.images(asked("dog", seed=6)))
    assert np.abs(np.asarray(images[0], dtype=int) - reference).max() <= 1
    assert len(images) == 2 and answer.created > 0 and answer.output_format == "png"


def test_it_knows_the_models_and_the_errors(client):
    assert "base:dog" in [model.id for model in client.models.list()]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(model="base:dgo", prompt="a dog")
    assert unknown.value.code == "adapter_not_found" and "near it: dog" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(model="base", prompt="a dog", size="huge")
    assert refused.value.param == "size"
