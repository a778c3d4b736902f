"""The HTTP side: who may ask, what is answered, and nothing of what the client names reaches a path."""

from __future__ import annotations

import contextlib
import hmac
import io
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

import cv2
import numpy as np
from PIL import Image

from ..scribbles._untrusted import parse_json
from ..scribbles.rasterize import UNANNOTATED
from ..utils.errors import BLPSegError, describe
from ..utils.files import read_image
from .export import export
from .instant import Instant
from .regions import region_at, region_strokes
from .store import MAX_BODY, Conflict, Project, Unknown
from .training import Training, scored

try:
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import FileResponse, JSONResponse, Response
    from fastapi.staticfiles import StaticFiles
except ImportError as missing:
    raise BLPSegError(f"the annotator needs {missing.name}: pip install 'blpseg[annotate]'") from None

STATIC = Path(__file__).parent / "static"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_COOKIE = "blpseg_token"
_BROWSERS_SHOW = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp",
                  ".bmp": "image/bmp"}  # fmt: skip
_THUMBNAIL = 160  # pixels, the longer side
_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]


class Guard:
    """ASGI middleware: the page of this server and nobody else may use it.

    A page of another site can make a browser send requests here, and can give its own name our address; Host and Origin
    tell. With a token (for other machines), whoever has it may come under any name.
    """

    def __init__(self, app, hosts: set[str], token: str = ""):
        """
        Args:
            app: what is guarded.
            hosts: names, without port, that a request may address where there is no token.
            token: to be shown once as ``/?token=...``, then by cookie, or as ``Authorization: Bearer``; "" for none.
        """
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        answer = self._refusal(scope, headers)
        received = 0
        if headers.get("content-length", "0").isdecimal() and int(headers.get("content-length", "0")[:20]) > MAX_BODY:
            answer = answer or _too_large()

        async def bounded():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise _TooLarge
            return message

        async def with_headers(message):
            if message["type"] == "http.response.start":
                own = message.get("headers", [])
                names = {name.lower() for name, _ in own}
                message["headers"] = [*own, *(pair for pair in _HEADERS if pair[0] not in names)]
            await send(message)

        try:
            await (answer or self.app)(scope, bounded, with_headers)
        except _TooLarge:
            await _too_large()(scope, receive, with_headers)

    def _refusal(self, scope, headers) -> Response | None:
        host = headers.get("host", "")
        if not self.token and _host_name(host) not in self.hosts:
            return _error(403, f"this server is not {host[:100]!r}; open it as http://127.0.0.1")
        if headers.get("origin", f"http://{host}") not in (f"http://{host}", f"https://{host}"):
            return _error(403, "a page of another site may not ask this server")
        if self.token:
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if _same(given, self.token):
                cookie = f"{_COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                return Response(status_code=303, headers={"location": "/", "set-cookie": cookie})
            bearer = headers.get("authorization", "").removeprefix("Bearer ")
            cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
            if not _same(bearer, self.token) and not _same(cookies.get(_COOKIE, ""), self.token):
                return _error(401, "open the address with ?token=... that the server printed")
        return None


class _TooLarge(Exception):
    pass


def _too_large() -> Response:
    return _error(413, f"a request is at most {MAX_BODY} bytes")


async def _json(request: Request):
    """The request's body; an empty one is an empty object."""
    body = await request.body()
    return parse_json("the request", body) if body else {}


Body = Annotated[Any, Depends(_json)]


def create_app(
    project: Project,
    *,
    hosts: set[str] | None = None,
    token: str = "",
    on_start: Callable[[], None] | None = None,
) -> FastAPI:
    """The annotator of a project as an ASGI application.

    Args:
        project: whose strokes it changes.
        hosts, token: see :class:`Guard`; by default the names of this machine for itself.
        on_start: called when the application starts.
    """

    instant, training = Instant(project), Training(project)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        if on_start:
            on_start()
        instant.prepare()
        yield
        training.close()
        instant.close()

    app = FastAPI(title="BLPSeg", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(Guard, hosts=hosts or set(_LOOPBACK), token=token)
    for kind, status in ((BLPSegError, 400), (Unknown, 404), (Conflict, 409), (OSError, 507)):
        app.add_exception_handler(kind, _answer(status))
    _add_strokes(app, project, instant, training)
    _add_models(app, project, instant, training)
    app.mount("/", StaticFiles(directory=STATIC, html=True))
    return app


def _add_strokes(app: FastAPI, project: Project, instant: Instant, training: Training) -> None:
    @app.get("/api/project")
    def describe_project():
        return {
            "trainer": training.status(),
            "classes": [{"name": n, "color": list(c)} for n, c in zip(project.classes, project.colors, strict=True)],
            "images": [
                {"name": photo.name, "width": photo.width, "height": photo.height, "strokes": photo.count}
                for photo in project.photos.values()
            ],
        }

    @app.post("/api/classes")
    def add_class(body: Body):
        project.add_class(body.get("name") if isinstance(body, dict) else None)
        return describe_project()

    @app.get("/api/images/{name}")
    def photo_file(name: str):
        photo = project.photo(name)
        if not photo.path.is_file():
            raise Unknown(f"{photo.path}: it was there when the server started")
        kind = _BROWSERS_SHOW.get(photo.path.suffix.lower())
        if kind:
            return FileResponse(photo.path, media_type=kind)
        return Response(cv2.imencode(".png", read_image(str(photo.path), "BGR"))[1].tobytes(), media_type="image/png")

    @app.get("/api/thumbnails/{name}")
    def thumbnail(name: str):
        return Response(_thumbnail(project, name), media_type="image/jpeg", headers={"cache-control": "max-age=3600"})

    @app.get("/api/strokes/{name}")
    def get_strokes(name: str):
        instant.prepare(project.photo(name))  # the first stroke will come soon
        return project.read(project.photo(name))

    @app.put("/api/strokes/{name}")
    def put_strokes(name: str, body: Body):
        saved = project.write(project.photo(name), body)
        return {"version": saved["version"], "strokes": len(saved["strokes"])}


def _add_models(app: FastAPI, project: Project, instant: Instant, training: Training) -> None:
    @app.post("/api/predict/{name}")
    def predict(name: str):
        label, source = instant.predict(project.photo(name))
        return Response(_indexed_png(label, project.colors), media_type="image/png", headers={"x-prediction": source})

    @app.post("/api/region/{name}")
    def region(name: str, body: Body):
        photo = project.photo(name)
        x, y = (body.get(key) if isinstance(body, dict) else None for key in ("x", "y"))
        if type(x) is not int or type(y) is not int or not (0 <= x < photo.width and 0 <= y < photo.height):
            raise BLPSegError(f"{photo.name}: x and y are no pixel of the photo")
        label, _ = instant.predict(photo)
        if label[y, x] == UNANNOTATED:
            raise BLPSegError("nothing is predicted here yet: draw strokes first")
        (stroke,) = region_strokes(region_at(label, y, x), int(label[y, x]))
        return {"stroke": stroke | {"time": time.time()}}

    @app.get("/api/next")
    def rank():
        return {"images": scored(project)}

    @app.get("/api/train")
    def progress():
        return training.status()

    @app.post("/api/train")
    def train(body: Body):
        training.start(body.get("iterations") if isinstance(body, dict) else None)
        return training.status()

    @app.delete("/api/train")
    def stop():
        training.stop()
        return training.status()

    @app.post("/api/export")
    def write_all():
        return {"folder": str(project.root), "files": export(project, instant)}


def _indexed_png(label: np.ndarray, colors: Sequence[Sequence[int]]) -> bytes:
    """Class numbers as a palette image; 255, nothing known, is transparent."""
    picture = Image.fromarray(label)
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colors)] = colors
    picture.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=UNANNOTATED, compress_level=1)
    return buffer.getvalue()


def _thumbnail(project: Project, name: str) -> bytes:
    photo = project.photo(name)
    image = read_image(str(photo.path), "BGR")
    scale = min(1.0, _THUMBNAIL / max(photo.height, photo.width))
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    return cv2.imencode(".jpg", cv2.resize(image, size, interpolation=cv2.INTER_AREA))[1].tobytes()


def _answer(status: int) -> Callable:
    return lambda request, error: _error(status, describe(error))


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"detail": message}, status_code=status)


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def serve(
    project: Project, *, host: str = "127.0.0.1", port: int = 8000, token: str = "", on_start: Callable = print
) -> None:
    """Serve a project until the process is asked to end.

    Args:
        project: see :func:`create_app`.
        host, port: to listen on; port 0 takes a free one.
        token: needed for a host that other machines reach.
        on_start: called with the page's URL as soon as requests are accepted.

    Raises:
        BLPSegError: the port is taken, the token is weak, or other machines could come in without one.
    """
    import uvicorn

    if token and not re.fullmatch(r"[A-Za-z0-9_-]{8,}", token):
        raise BLPSegError("--token: 8 letters, digits, - or _ at least; without a text a random one is made")
    if host not in _LOOPBACK and not token:
        raise BLPSegError(f"--host {host} lets other machines in: add --token, so that only those with its URL may")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise BLPSegError(
            f"cannot listen on {host} port {port} ({getattr(error, 'strerror', None) or describe(error)}); "
            "choose another with --port"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
    app = create_app(project, hosts={*_LOOPBACK, host.lower()}, token=token, on_start=lambda: on_start(url))
    config = uvicorn.Config(app, log_level="debug" if os.environ.get("BLPSEG_DEBUG") else "error", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])
