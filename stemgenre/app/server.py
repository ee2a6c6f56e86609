"""The page on an address: who gets in, what may be sent to it, what it gives away."""

import base64
import contextlib
import json
import secrets
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse
from starlette.datastructures import Headers, MutableHeaders

from stemgenre.app import views
from stemgenre.app.page import Page
from stemgenre.errors import UserError

MAX_FILE_BYTES = 100 * 2**20  # of an upload
MAX_UPLOAD_BYTES = 512 * 2**20  # of a request with several
MAX_BODY_BYTES = 2**20  # of any other request
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
UPLOAD, API = "/gradio_api/upload", "/gradio_api/"
OWN = "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; worker-src 'self' blob:; form-action 'self'; base-uri 'self'; frame-ancestors 'none'"  # noqa: E501
WRITTEN = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; sandbox allow-scripts"  # noqa: E501  scripts are not allowed by the first of these; the last lets a page reload itself


class Refused(Exception):
    """A request that gets an answer in one line: status code, text."""


class Guard:
    """An ASGI app in front of another: refuses what no visitor of this page has to send.

    `hosts`: the names under which it may be reached, None for any (against DNS rebinding).
    `password`: "USER:PASSWORD", or None. `uploads`: the only folder whose files a request may name.
    """

    def __init__(
        self, app: Callable, *, hosts: tuple[str, ...] | None, password: str | None, uploads: Path
    ) -> None:
        self.app, self.hosts, self.uploads = app, hosts, uploads.resolve()
        self.expected = password and "Basic " + base64.b64encode(password.encode()).decode()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page uses no web sockets
            await send({"type": "websocket.close"})
            return
        try:
            self._check_visitor(Headers(scope=scope))
            self._check_path(scope["path"])
            if scope["method"] not in ("GET", "HEAD"):
                receive = await self._checked_body(scope, receive)
            await self.app(scope, receive, _with_headers(send))
        except Refused as refusal:
            code, text = refusal.args
            headers = {"WWW-Authenticate": 'Basic realm="Stem Genre"'} if code == 401 else {}
            response = PlainTextResponse(text, status_code=code, headers=headers)
            await response(scope, receive, send)

    def _check_visitor(self, headers):
        host = headers.get("host", "")
        if self.hosts and urlsplit(f"//{host}").hostname not in self.hosts:
            raise Refused(403, "this page is reached by its own address only")
        given = headers.get("authorization", "")
        if self.expected and not secrets.compare_digest(given.encode(), self.expected.encode()):
            raise Refused(401, "a user and a password are needed")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refused(403, "requests from other pages are refused")

    def _check_path(self, path):
        """Gradio's own ways to files: only to uploads; none to other servers."""
        kind, _, name = path.removeprefix(API).partition("=")
        if kind == "proxy" or (kind == "file" and not self._is_upload(name)):
            raise Refused(403, "not allowed")
        if path.startswith(API + "file/"):
            raise Refused(403, "not allowed")

    def _is_upload(self, name):
        try:
            path = Path(unquote(name)).resolve()
        except (OSError, ValueError):
            return False
        return path.is_relative_to(self.uploads) and path != self.uploads

    async def _checked_body(self, scope, receive) -> Callable[[], Awaitable[dict]]:
        """A `receive` of the same body, that is not too long and names no file but uploads."""
        is_upload = scope["path"].rstrip("/") == UPLOAD
        limit = MAX_UPLOAD_BYTES if is_upload else MAX_BODY_BYTES
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdigit() or int(length) > limit:
            raise Refused(413, f"more than {limit // 2**20} MB")
        if is_upload:
            return _counted(receive, limit)
        body, more = b"", True
        while more:
            part = await receive()
            if part["type"] == "http.disconnect":
                raise Refused(400, "incomplete")
            body, more = body + part.get("body", b""), part.get("more_body", False)
            if len(body) > limit:
                raise Refused(413, f"more than {limit // 2**20} MB")
        self._check_files(body)
        parts = iter([{"type": "http.request", "body": body}])

        async def replay():
            part = next(parts, None)
            return part if part is not None else await receive()

        return replay

    def _check_files(self, body):
        """Refuses a body that names a file or an address which is no upload."""
        try:
            waiting = [json.loads(body or b"null")]
        except (ValueError, RecursionError):
            raise Refused(400, "not JSON") from None
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                for key in {"path", "url"} & value.keys():
                    self._check_file(key, value[key])
                waiting += value.values()
            elif isinstance(value, list):
                waiting += value

    def _check_file(self, key, name):
        if name is None:
            return
        if key == "url":  # Gradio's own address of an upload
            name = str(name).partition("/file=")[2]
        if not isinstance(name, str) or not self._is_upload(name):
            raise Refused(403, "not an upload")


def _counted(receive, limit):
    """A `receive` that ends a body which is longer than `limit` bytes."""
    size = 0

    async def count():
        nonlocal size
        part = await receive()
        size += len(part.get("body", b""))
        return part if size <= limit else {"type": "http.disconnect"}

    return count


def _with_headers(send):
    """A `send` that adds what the browser has to refuse."""

    async def sending(part):
        if part["type"] == "http.response.start":
            headers = MutableHeaders(scope=part)
            headers.setdefault("content-security-policy", OWN)
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "no-referrer"
        await send(part)

    return sending


def make_app(
    page: Page, *, hosts: tuple[str, ...] | None, password: str | None, uploads: Path
) -> Guard:
    """The ASGI app: the page, and the files that runs and eda.py have written."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    def answer(file, **options):
        if file is None:
            return PlainTextResponse("there is no such file", status_code=404)
        headers = {"content-security-policy": WRITTEN, "cache-control": "no-store"}
        return FileResponse(file, headers=headers, **options)

    @app.get("/report/{name:path}/report/index.html")
    def report(name: str):
        """Of a run, or of one of its networks: the links from one to the other are relative."""
        runs, (folder, _, network) = page.runs.find(), name.rpartition("/")
        found, prefix = (runs[name], "") if name in runs else (runs.get(folder), f"{network}/")
        return answer(found and found.file(f"{prefix}report/index.html"), media_type="text/html")

    @app.get("/submit")
    def submit(run: str):
        found = page.runs.find().get(run)
        name = found.settings().get("SUBMIT_FILE", "submit.csv") if found else ""
        return answer(found and found.file(name), media_type="text/csv", filename="submit.csv")

    @app.get("/eda")
    def eda(of: str):
        return answer(page.eda_pages().get(of), media_type="text/html")

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    blocks = page.build()
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        theme=gr.themes.Default(**fonts).set(  # Gradio's own is nearly as light as the page
            block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
        ),
        css=views.CSS,
        footer_links=[],
        max_file_size=MAX_FILE_BYTES,
        allowed_paths=[],
        show_error=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        mcp_server=False,
    )
    return Guard(app, hosts=hosts, password=password, uploads=uploads)


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the address is not available."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{host}:{port} cannot be opened: {reason}; choose another --port"
        ) from None


def serve(app: Callable, listening: socket.socket) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, timeout_graceful_shutdown=1
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
