"""The doors of the server, and who may not come in."""

import io
import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask

from blpseg.scribbles import rasterize_strokes
from blpseg.scribbles.label_studio_rle import decode_rle

pytest.importorskip("fastapi", reason="the extra `annotate` is not installed")
from fastapi.testclient import TestClient  # noqa: E402

from blpseg.annotate import server  # noqa: E402
from blpseg.annotate.server import create_app  # noqa: E402
from blpseg.annotate.store import Project  # noqa: E402

from .conftest import CLASSES, stroke  # noqa: E402

HOST = "http://127.0.0.1:8000"


@pytest.fixture
def client(project):
    with TestClient(create_app(project), base_url=HOST) as made:
        yield made


def test_doors(client, project, photos):
    described = client.get("/api/project").json()
    assert [c["name"] for c in described["classes"]] == CLASSES
    assert [i["name"] for i in described["images"]] == ["a.jpg", "b c.png", "d#1.png"]
    assert described["images"][0] == {"name": "a.jpg", "width": 80, "height": 60, "strokes": 0}
    assert client.get("/api/images/d%231.png").content == (photos / "d#1.png").read_bytes()
    small = cv2.imdecode(np.frombuffer(client.get("/api/thumbnails/a.jpg").content, np.uint8), 1)
    assert small.shape == (60, 80, 3)
    empty = client.get("/api/strokes/b%20c.png").json()
    assert empty == {"image": "b c.png", "width": 64, "height": 48, "version": 0, "strokes": []}
    answer = client.put("/api/strokes/b%20c.png", json=empty | {"strokes": [stroke(1, [1, 2], [3, 4])]})
    assert answer.json() == {"version": 1, "strokes": 1}
    assert client.get("/api/project").json()["images"][1]["strokes"] == 1
    late = client.put("/api/strokes/b%20c.png", json=empty)
    assert late.status_code == 409 and "changed elsewhere" in late.json()["detail"]
    assert client.post("/api/classes", json={"name": "pot"}).json()["classes"][3]["name"] == "pot"
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["..%2Fconfig.yaml", "%2e%2e/%2e%2e/etc/passwd", "a.jpg%00", "%2Fetc%2Fpasswd"])
def test_names_select_listed_photos_only(client, name):
    for path in (f"/api/images/{name}", f"/api/thumbnails/{name}", f"/api/strokes/{name}", f"/{name}"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"host": "127.0.0.1.evil.example:8000"}, {"host": ""}, {"origin": "http://evil.example"},
     {"origin": "null"}, {"origin": "http://["}, {"origin": "http://127.0.0.1:9000"}],
)  # fmt: skip
def test_other_sites_are_refused(client, project, headers):
    assert client.put("/api/strokes/a.jpg", json={"strokes": []}, headers=headers).status_code == 403
    assert client.get("/api/project", headers=headers).status_code == 403
    assert not project.strokes_path(project.photo("a.jpg")).exists()


def test_token(project):
    with TestClient(create_app(project, token="s3cret"), base_url="http://192.0.2.7:8000") as client:
        assert client.get("/api/project").status_code == 401
        assert client.get("/?token=wrong").status_code == 401
        assert client.get("/api/project", headers={"authorization": "Bearer s3cret"}).status_code == 200
        assert client.get("/?token=s3cret", follow_redirects=False).headers["location"] == "/"
        assert client.get("/api/project").status_code == 200  # by the cookie
        assert client.get("/api/project", headers={"origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize(
    "body, status",
    [(b"{", 400), (b"[" * 100_000, 400), (b"null", 400), (b'{"strokes": 7}', 400), (b'{"strokes": [null]}', 400),
     (b'{"strokes": [], "version": "1"}', 400), (b'{"strokes": [], "image": "b c.png"}', 400),
     (b'{"strokes": [], "width": 81}', 400), (b"x" * 2000, 413), (b'{"strokes": [], "version": 0}', 200)],
)  # fmt: skip
def test_bodies(client, monkeypatch, body, status):
    if status == 413:
        monkeypatch.setattr(server, "MAX_BODY", 1000)
    answer = client.put("/api/strokes/a.jpg", content=body)
    assert answer.status_code == status
    assert status == 200 or "\n" not in answer.json()["detail"]
    chunks = client.put("/api/strokes/a.jpg", content=iter([body]))  # without Content-Length
    assert chunks.status_code == (409 if status == 200 else status)


def test_another_host_needs_a_token(run_tool, photos, tmp_path, capfd):
    arguments = [str(tmp_path / "p"), "--images", str(photos), "--classes", "background", "leaf"]
    assert run_tool("tools/annotate.py", *arguments, "--host", "0.0.0.0") == 1
    assert capfd.readouterr().err == (
        "error: --host 0.0.0.0 lets other machines in: add --token, so that only those with its URL may\n"
    )


def test_a_token_is_no_word_to_guess(run_tool, photos, tmp_path, capfd):
    arguments = [str(tmp_path / "p"), "--images", str(photos), "--classes", "background", "leaf", "--token", "a;b"]
    assert run_tool("tools/annotate.py", *arguments) == 1
    assert capfd.readouterr().err.startswith("error: --token: 8 letters")


def test_the_page_does_not_wait_for_pytorch(root):
    code = (
        "import sys, blpseg.annotate.server; print([m for m in ('torch', 'detectron2', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_strokes_hold_no_markup(client, project):
    document = {"strokes": [stroke(1, [1, 1], evil="<script>", image="../../x")]}
    assert client.put("/api/strokes/a.jpg", json=document).status_code == 200
    stored = project.strokes_path(project.photo("a.jpg")).read_text()
    assert "evil" not in stored and "script" not in stored and json.loads(stored)["image"] == "a.jpg"


def test_prediction_region_and_ranking(client, project):
    client.put("/api/strokes/a.jpg", json={"strokes": [stroke(1, [30, 30], [50, 32]), stroke(0, [4, 4], [76, 5])]})
    answer = client.post("/api/predict/a.jpg")
    assert answer.headers["x-prediction"] == "strokes"
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.mode == "P" and picture.size == (80, 60) and picture.getpalette()[3:6] == list(project.colors[1])
    label = np.asarray(picture)
    found = client.post("/api/region/a.jpg", json={"x": 40, "y": 20}).json()["stroke"]
    drawn = rasterize_strokes([(found["class"], np.array(found["points"])[:, ::-1])], 60, 80)
    assert drawn[20, 40] == 1 and (label[drawn == 1] == 1).all() and (drawn == 1).sum() > 600
    for place in ({"x": -1, "y": 0}, {"x": 80, "y": 0}, {"x": "1", "y": 0}, [], {}):
        assert client.post("/api/region/a.jpg", json=place).status_code == 400
    empty = Image.open(io.BytesIO(client.post("/api/predict/d%231.png").content))
    assert (np.asarray(empty) == 255).all() and empty.info["transparency"] == 255
    ranked = client.get("/api/next").json()["images"]
    assert [i["name"] for i in ranked] == ["b c.png", "d#1.png", "a.jpg"] and ranked[0]["score"] is None


def test_export(client, project):
    client.put("/api/strokes/a.jpg", json={"strokes": [stroke(2, [30, 30], [50, 32]), stroke(0, [4, 4], [76, 5])]})
    files = client.post("/api/export").json()["files"]
    assert all((project.root / name).is_file() for name in files)
    label = cv2.imread(str(project.root / "predictions/a.png"), cv2.IMREAD_UNCHANGED)
    assert label.shape == (60, 80) and set(np.unique(label)) == {0, 2}
    coco = json.loads((project.root / "export/coco.json").read_text())
    assert [c["name"] for c in coco["categories"]] == CLASSES and len(coco["images"]) == 1
    for annotation in coco["annotations"]:
        assert np.array_equal(mask.decode(annotation["segmentation"]), label == annotation["category_id"])
    (task,) = json.loads((project.root / "export/label_studio.json").read_text())
    for result in task["predictions"][0]["result"]:
        values = decode_rle("", result["value"]["rle"], 4 * 60 * 80).reshape(60, 80, 4)
        number = CLASSES.index(result["value"]["brushlabels"][0])
        assert np.array_equal(values == 255, np.repeat((label == number)[..., None], 4, axis=2))
    config = (project.root / "export/label_studio_config.xml").read_text()
    assert "&lt;b&gt;flower" in config and "<b>" not in config
    nnunet = project.root / "export/nnunet/Dataset001_scribbles"
    described = json.loads((nnunet / "dataset.json").read_text())
    assert described["labels"]["ignore"] == 3 and described["numTraining"] == 1
    sparse = cv2.imread(str(nnunet / "labelsTr/a.png"), cv2.IMREAD_UNCHANGED)
    drawn = cv2.imread(str(project.label_path(project.photo("a.jpg"))), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(sparse, np.where(drawn == 255, 3, drawn))
    assert len(list((nnunet / "imagesTr").iterdir())) == 1 and len(list((nnunet / "imagesTs").iterdir())) == 2


def test_nnunet_has_its_own_background_and_ignore(photos, tmp_path):
    project = Project(tmp_path / "project", photos, ["ignore", "background", "leaf"])
    with TestClient(create_app(project), base_url=HOST) as client:
        client.post("/api/export")
    described = json.loads((project.root / "export/nnunet/Dataset001_scribbles/dataset.json").read_text())
    assert described["labels"] == {"background": 0, "background 1": 1, "leaf": 2, "ignore": 3}
    project.close()


def test_training_is_refused_without_two_classes(client):
    client.put("/api/strokes/a.jpg", json={"strokes": [stroke(1, [30, 30])]})
    for body in ({}, {"iterations": 0}, {"iterations": "1"}, {"iterations": 10**9}):
        answer = client.post("/api/train", json=body)
        assert answer.status_code == 400, body
    assert client.get("/api/train").json()["state"] == "idle" == client.delete("/api/train").json()["state"]
    assert client.get("/api/project").json()["trainer"]["state"] == "idle"
