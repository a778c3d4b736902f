"""Files behind URLs, from a server in this process."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from blpseg.utils.downloads import cache_path, fetch
from blpseg.utils.errors import BLPSegError

CONTENT = {host: host.encode() * 1000 for host in ("127.0.0.1", "localhost")}
DIGEST = {host: hashlib.sha256(data).hexdigest() for host, data in CONTENT.items()}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Two hosts of different content; ``requests`` lists the paths asked for, ``cut`` makes answers end early."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            data = CONTENT[self.headers["Host"].split(":")[0]]
            self.send_response(404 if "missing" in self.path else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if self.server.cut else data)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.cut = [], False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def url(server, path, host="127.0.0.1"):
    return f"http://{host}:{server.server_port}/{path}"


def test_downloaded_once_and_kept_by_the_whole_url(server):
    paths = {host: fetch(url(server, "a/model.pth", host)) for host in CONTENT}
    for host, path in paths.items():
        assert open(path, "rb").read() == CONTENT[host] and path.endswith("/model.pth")
        assert fetch(url(server, "a/model.pth", host)) == path
    assert len(server.requests) == 2


def test_the_official_name_does_not_take_another_hosts_file(server, monkeypatch):
    fetch(url(server, "detectron2/DeepLab/R-103.pkl"))
    monkeypatch.setattr("blpseg.utils.downloads.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(BLPSegError, match="detectron2://DeepLab/R-103.pkl: cannot be fetched"):
        fetch("detectron2://DeepLab/R-103.pkl")


@pytest.mark.parametrize(
    "path",
    ["../../x.pth", "%2e%2e/%2e%2e/x", "..%2f..%2fx.pth", "a/..", "", ".", "?x=../../y", "a/\0\x1b[31m.pth", ".." * 99],
)
def test_nothing_is_written_outside_the_cache(server, tmp_path, path):
    assert cache_path(url(server, path)).resolve().is_relative_to(tmp_path / "cache")
    try:
        fetch(url(server, path))
    except BLPSegError:
        pass
    assert {p.name for p in tmp_path.iterdir()} <= {"cache"}


def test_a_cut_download_does_not_stay(server, tmp_path):
    server.cut = True
    with pytest.raises(BLPSegError, match="model.pth: cannot be fetched .*4500 of 9000|IncompleteRead"):
        fetch(url(server, "model.pth"))
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]
    server.cut = False
    assert open(fetch(url(server, "model.pth")), "rb").read() == CONTENT["127.0.0.1"]


def test_a_digest_is_compared(server, tmp_path):
    address = url(server, "model.pth")
    good, bad = f"{address}#sha256={DIGEST['127.0.0.1']}", f"{address}#sha256={'0' * 64}"
    with pytest.raises(BLPSegError, match=f"its SHA-256 is {DIGEST['127.0.0.1']}, not 000"):
        fetch(bad)
    path = fetch(good)
    assert fetch(good) == path and len(server.requests) == 2
    open(path, "ab").write(b"more")  # damaged in the cache: fetched again
    assert open(fetch(good), "rb").read() == CONTENT["127.0.0.1"]
    with pytest.raises(BLPSegError, match="64 hexadecimal digits"):
        fetch(f"{address}#sha256=123")
    local = tmp_path / "local.pth"
    local.write_bytes(b"weights")
    assert fetch(f"{local}#sha256={hashlib.sha256(b'weights').hexdigest()}") == str(local)
    with pytest.raises(BLPSegError, match="local.pth: its SHA-256 is not"):
        fetch(f"{local}#sha256={'0' * 64}")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        *[("missing.pth", "404"), ("http://127.0.0.1:1/x.pth", "refused"), ("http:///x", "cannot be fetched")],
        *[("https://[::1/x", "x"), ("catalog://nothing", "nothing"), ("none://x", "x")],
    ],
)
def test_what_cannot_be_fetched_is_one_line(server, path, reason):
    path = path if "://" in path else url(server, path)
    with pytest.raises(BLPSegError, match=reason) as error:
        fetch(path)
    assert "\n" not in str(error.value)
