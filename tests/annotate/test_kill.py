"""Strokes that were acknowledged are there after the server was killed."""

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra `annotate` is not installed")

from blpseg.annotate.store import Project  # noqa: E402

from .conftest import CLASSES, stroke  # noqa: E402


def ask(address, method, path, body=None):
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.slow
def test_no_acknowledged_stroke_is_lost(root, photos, tmp_path):
    """Two clients add strokes to one photo at once, by its version, while the server is killed twice."""
    folder, acknowledged, over = tmp_path / "project", [], threading.Event()
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(root / "tools/annotate.py"), str(folder), "--port", "0"]
    state = {}

    def start(*more):
        server = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True, env=environment)
        url = urlsplit(re.search(r"http://\S+", server.stdout.readline())[0])
        state["address"] = url.hostname, url.port
        return server

    def client(number):
        count = 0
        while not over.is_set():
            mine = stroke(number, [count % 80, count % 60], [5, 7], time=1000 * number + count)
            try:
                _, document = ask(state["address"], "GET", "/api/strokes/a.jpg")
                document["strokes"].append(mine)
                status, _ = ask(state["address"], "PUT", "/api/strokes/a.jpg", document)
            except (OSError, http.client.HTTPException, ValueError):
                over.wait(0.05)  # killed, or not up again yet
                continue
            assert status in (200, 409)
            if status == 200:
                acknowledged.append(mine["time"])
                count += 1

    def wait_for(count):
        deadline = time.monotonic() + 300
        while len(acknowledged) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(acknowledged) >= count

    server = start("--images", str(photos), "--classes", *CLASSES)
    clients = [threading.Thread(target=client, args=(number,)) for number in (1, 2)]
    for thread in clients:
        thread.start()
    try:
        for count in (15, 30):
            wait_for(count)
            server.kill()
            server.wait()
            server = start()
        wait_for(40)
    finally:
        over.set()
        for thread in clients:
            thread.join()
        server.kill()
        server.wait()
    project = Project(folder)
    photo = project.photo("a.jpg")
    document = project.read(photo)
    assert set(acknowledged) <= {s["time"] for s in document["strokes"]}
    label = cv2.imread(str(project.label_path(photo)), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(label, project.rasterize(photo, document))
    project.close()
