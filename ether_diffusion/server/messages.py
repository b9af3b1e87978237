"""The bodies of requests and responses: those of OpenAI's API for images, and what adapters need beside them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator

from ether_diffusion.server.errors import ApiError
from ether_diffusion.serving.lines import HIGHEST_SEED, SIZE

BASE = "base"
MOST_IMAGES = 10  # as OpenAI has it
LONGEST_PROMPT = 32_000
MOST_STEPS = 500
MOST_ADAPTERS = 16


class ImagesRequest(BaseModel):
    """`POST /v1/images/generations`. What is left out, the pipeline decides."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT)]
    model: str = Field(BASE, description='"base", or "base:dog" for the base with the adapter dog.')
    n: Annotated[int, Field(ge=1, le=MOST_IMAGES)] = 1
    size: str = Field("auto", description='Width and height in pixels, as "768x512", or "auto".')
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg"] = "png"
    adapter: str | Annotated[dict[str, FiniteFloat], Field(max_length=MOST_ADAPTERS)] | None = Field(
        None, description="A name, or names with strengths in the order of composition."
    )
    negative_prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)] | None = None
    seed: Annotated[int, Field(ge=0, le=HIGHEST_SEED)] | None = Field(
        None, description="Of the first image; each further one has the next. Drawn where none is given."
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    guidance_scale: FiniteFloat | None = None
    timeout: Annotated[FiniteFloat, Field(gt=0)] | None = Field(None, description="In seconds.")
    # What OpenAI's clients may send, where it changes nothing here.
    user: str | None = None
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: Literal[False] | None = None

    @field_validator("size")
    @classmethod
    def _check_size(cls, value: str) -> str:
        if value != "auto" and SIZE.fullmatch(value) is None:
            raise ValueError('needs width and height in pixels, as "768x512", or "auto"')
        return value

    @field_validator("adapter", mode="before")
    @classmethod
    def _check_adapter(cls, value: Any) -> Any:
        if not isinstance(value, str | dict | None):
            raise ValueError('needs a name, or names with strengths, as {"dog": 0.8}')
        return value

    @property
    def width_and_height(self) -> tuple[int, int] | None:
        """None for the pipeline's own."""
        return None if self.size == "auto" else tuple(map(int, self.size.split("x")))

    @property
    def adapters(self) -> tuple[tuple[str, float], ...]:
        """Names and strengths, in the order of composition.

        Raises:
            ApiError: 404, another model than the one that is served; 400, an adapter that is given twice.
        """
        base, colon, name = self.model.partition(":")
        if base != BASE or (colon and not name):
            message = f'there is no model {self.model[:100]!r}; there is "{BASE}", and "{BASE}:NAME" with an adapter'
            raise ApiError(404, message, param="model", code="model_not_found")
        if name and self.adapter is not None:
            raise ApiError(400, "model names an adapter, and adapter too: name it once", param="adapter")
        given = name or ({} if self.adapter is None else self.adapter)
        return ((given, 1.0),) if isinstance(given, str) else tuple(given.items())


class ImageData(BaseModel):
    """One image."""

    b64_json: str
    seed: int


class ImagesResponse(BaseModel):
    """The images of a request, in the order of their seeds."""

    created: int
    data: list[ImageData]
    output_format: str
    size: str


class Model(BaseModel):
    """A model that requests may name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ether-diffusion"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Adapter(BaseModel):
    """An adapter of the folder. bytes: of its files; created: when they were last written, in seconds since 1970."""

    id: str
    object: Literal["adapter"] = "adapter"
    bytes: int
    created: int


class AdapterList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Adapter]


class Deleted(BaseModel):
    id: str
    object: Literal["adapter"] = "adapter"
    deleted: Literal[True] = True
