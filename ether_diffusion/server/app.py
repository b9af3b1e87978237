"""The app: which path does what. It knows nothing of how images are made."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import UploadFile

from ether_diffusion.server.adapter_folder import AdapterFolder
from ether_diffusion.server.backend import Backend
from ether_diffusion.server.body_limit import BodyLimit
from ether_diffusion.server.errors import ApiError, add_handlers, of_file
from ether_diffusion.server.images import Generation, unless_client_leaves
from ether_diffusion.server.messages import (
    BASE,
    Adapter,
    AdapterList,
    Deleted,
    ImagesRequest,
    ImagesResponse,
    Model,
    ModelList,
)
from ether_diffusion.server.metrics import CountAnswers, Metrics
from ether_diffusion.server.settings import MIB, ServerSettings
from ether_diffusion.server.tokens import Clients

UPLOAD = "/v1/adapters"
UPLOAD_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "file"],
                    "properties": {"name": {"type": "string"}, "file": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


def make_app(backend: Backend, settings: ServerSettings, metrics: Metrics | None = None) -> FastAPI:
    """The server as an ASGI app.

    Args:
        backend: makes the images.
        settings: what fits, and who may ask.
        metrics: those of `/metrics`; default: without an engine's.
    """
    metrics = Metrics() if metrics is None else metrics
    app = FastAPI(title="ether-diffusion", description="Images with an adapter of their own for each request.")
    clients = Clients(settings.tokens, settings.token_limit)

    def identify(authorization: Annotated[str | None, Header()] = None) -> str:
        return clients.identify(authorization)

    client = Depends(identify)
    add_handlers(app)
    _add_images(app, Generation(backend, clients, metrics, settings), client)
    _add_adapters(app, AdapterFolder(settings.adapters), backend, settings, client)
    _add_health(app, backend, metrics)
    upload = settings.max_upload + MIB if settings.uploads else MIB
    app.add_middleware(BodyLimit, limit=lambda method, path: upload if (method, path) == ("POST", UPLOAD) else MIB)
    app.add_middleware(CountAnswers, metrics=metrics)
    return app


def _add_images(app: FastAPI, generation: Generation, client: Any) -> None:
    @app.post("/v1/images/generations", response_model=ImagesResponse, tags=["images"])
    async def generate(asked: ImagesRequest, request: Request, client: str = client) -> Any:
        """Generate images of a prompt, with adapters of the request's own."""
        return await unless_client_leaves(request, generation.answer(asked, client))


def _add_adapters(
    app: FastAPI, folder: AdapterFolder, backend: Backend, settings: ServerSettings, client: Any
) -> None:
    started = int(time.time())

    @app.get("/v1/models", dependencies=[client], tags=["models"])
    async def list_models() -> ModelList:
        """The base, and the base with each adapter."""
        adapters = await run_in_threadpool(folder.adapters)
        return ModelList(
            data=[
                Model(id=BASE, created=started),
                *(Model(id=f"{BASE}:{each.id}", created=each.created) for each in adapters),
            ]
        )

    @app.get(UPLOAD, dependencies=[client], tags=["adapters"])
    async def list_adapters() -> AdapterList:
        """All adapters; whether they fit is seen when they are used."""
        return AdapterList(data=await run_in_threadpool(folder.adapters))

    def uploads_allowed() -> None:
        if not settings.uploads:
            raise ApiError(403, "this server takes no uploads and deletes nothing; it was started without --uploads")

    changing = [client, Depends(uploads_allowed)]

    @app.post(UPLOAD, status_code=201, dependencies=changing, openapi_extra=UPLOAD_FORM, tags=["adapters"])
    async def upload_adapter(request: Request) -> Adapter:
        """Add an adapter, or replace the one of this name: a form with `name` and `file`, a .safetensors file."""
        # Not a parameter: FastAPI would read the whole form before it asks for the token.
        try:
            async with request.form(max_files=1, max_fields=1) as form:
                name, file = form.get("name"), form.get("file")
                if not isinstance(name, str) or not isinstance(file, UploadFile):
                    raise ApiError(400, "a form with name, a text, and file, a .safetensors file, is needed")
                if (file.size or 0) > settings.max_upload:
                    message = f"the file has {file.size:,} bytes; {settings.max_upload:,} fit"
                    raise ApiError(413, message, param="file", code="too_large")
                return await folder.add(name, file.file, backend.check_adapter)
        except OSError as error:  # the disk on which a form is put while it arrives
            raise of_file(error, settings.adapters, "file") from error

    @app.delete(f"{UPLOAD}/{{name}}", dependencies=changing, tags=["adapters"])
    async def delete_adapter(name: str) -> Deleted:
        """Delete an adapter. Requests that have it already keep it."""
        await run_in_threadpool(folder.remove, name)
        return Deleted(id=name)


def _add_health(app: FastAPI, backend: Backend, metrics: Metrics) -> None:
    @app.get("/health/live", tags=["health"])
    async def live() -> Response:
        """503 when the server has to be started anew: a forward hangs, or the engine has stopped."""
        return _health(await backend.fault())

    @app.get("/health/ready", tags=["health"])
    async def ready() -> Response:
        """503 when no request should be sent here."""
        return _health(await backend.fault())

    @app.get("/metrics", tags=["health"])
    def tell_metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _health(fault: str | None) -> Response:
    return JSONResponse({"status": "ok"} if fault is None else {"status": fault}, 200 if fault is None else 503)
