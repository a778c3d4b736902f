"""The page in a real browser, against a server in a process of its own: what a person does in the first minutes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import cv2
import numpy as np
import pytest
import yaml

pytest.importorskip("fastapi", reason="the extra `annotate` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from blpseg.scribbles import rasterize_strokes  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_MS = 300_000  # a busy machine loads PyTorch slowly; every wait is for a condition


@pytest.fixture
def served(root, tmp_path, photos):
    """(project folder, URL) of a server; its config asks for small steps of training."""
    folder = tmp_path / "project"
    made = [sys.executable, str(root / "tools/new_project.py"), str(folder), "--images", str(photos), "--classes"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([*made, "background", "leaf"], check=True, env=environment)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["SOLVER"]["IMS_PER_BATCH"], config["INPUT"]["CROP"]["SIZE"] = 2, [64, 64]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-W", "ignore", str(root / "tools/annotate.py"), str(folder), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield folder, re.search(r"http://\S+", server.stdout.readline())[0]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


@pytest.fixture
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as p:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        made = p.chromium.launch(executable_path=CHROMIUM, args=options)
        yield made
        made.close()


def visit(browser, url, width, height, **more):
    """The page, its first photo open; what goes wrong in it is in ``faults``."""
    page = browser.new_page(viewport={"width": width, "height": height}, **more)
    page.set_default_timeout(PATIENCE_MS)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(url)
    page.locator("nav button[aria-current=true] img").wait_for()
    status(page, "0 strokes, saved")
    return page


def on_screen(page, *points):
    """Where fractions of the photo of 80 x 60 are, which fits into the canvas; and the scale."""
    box = page.locator("#canvas").bounding_box()
    scale = 0.98 * min(box["width"] / 80, box["height"] / 60)
    left, top = box["x"] + (box["width"] - 80 * scale) / 2, box["y"] + (box["height"] - 60 * scale) / 2
    return [(left + x * 80 * scale, top + y * 60 * scale) for x, y in points], scale


def drag(page, *points):
    """A stroke of the mouse through fractions of the photo."""
    places, _ = on_screen(page, *points)
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=8)
    page.mouse.up()


def status(page, text):
    page.locator("#status", has_text=text).wait_for()


def stored(folder):
    document = json.loads((folder / "strokes/a.json").read_text())
    label = cv2.imread(str(folder / "scribbles/train/a.png"), cv2.IMREAD_UNCHANGED)
    return document["strokes"], label


def drawn(strokes):
    """What the project's own rasteriser makes of stored strokes."""
    return rasterize_strokes([(s["class"], np.array(s["points"])[:, ::-1], s["width"]) for s in strokes], 60, 80)


def shown(page):
    return page.locator("#canvas").screenshot()


@pytest.mark.slow
def test_first_minutes(browser, served):
    folder, url = served
    page = visit(browser, url, 1280, 800)
    bare = shown(page)
    drag(page, (0.4, 0.5), (0.6, 0.45), (0.55, 0.6))  # with class 2, which is chosen at first
    page.keyboard.press("1")
    drag(page, (0.05, 0.1), (0.9, 0.08))
    status(page, "2 strokes, saved")
    page.locator("body[data-prediction=strokes]:not(.predicting)").wait_for()
    strokes, label = stored(folder)
    assert [s["class"] for s in strokes] == [1, 0] and strokes[0]["width"] == 5
    assert abs(np.array(strokes[0]["points"][0]) - (32, 30)).max() <= 1, "where the mouse was pressed"
    assert np.array_equal(label, drawn(strokes))
    with_overlay = shown(page)
    assert with_overlay != bare
    page.keyboard.down("h")
    page.locator("#hide.held").wait_for()
    assert shown(page) != with_overlay
    page.keyboard.up("h")

    page.keyboard.press("Control+z")
    status(page, "1 stroke, saved")
    assert len(stored(folder)[0]) == 1
    page.keyboard.press("Control+Shift+z")
    status(page, "2 strokes, saved")
    assert np.array_equal(stored(folder)[1], label)
    page.reload()
    page.locator("nav .done", has_text="2").wait_for()
    page.locator("nav button").first.click()
    status(page, "2 strokes, saved")
    page.locator("body[data-prediction=strokes]:not(.predicting)").wait_for()
    page.keyboard.press("a")  # keep the predicted leaf as a stroke
    drag(page, (0.5, 0.5))
    status(page, "3 strokes, saved")
    assert (stored(folder)[1] == 1).sum() > 600
    page.keyboard.press("e")
    drag(page, (0.5, 0.08))  # the background's stroke
    status(page, "2 strokes, saved")
    assert not (stored(folder)[1] == 0).any()
    page.keyboard.press("z")
    status(page, "3 strokes, saved")

    page.request.post(f"{url}api/train", data={"iterations": 20})
    page.reload()
    page.locator("#train[data-state=done]").wait_for()
    assert "loss" in page.locator("#training").inner_text()
    assert (folder / "models/run_001/model_final.pth").is_file()
    page.locator("nav button").nth(1).click()  # a photo without strokes
    page.locator("body[data-prediction=model]:not(.predicting)").wait_for()
    page.locator("nav .rank", has_text="next 1").wait_for()
    page.click("#export")
    page.locator("#file-list li", has_text="predictions/b c.png").wait_for()
    assert cv2.imread(str(folder / "predictions/b c.png"), cv2.IMREAD_UNCHANGED).shape == (48, 64)
    assert not page.faults


class Fingers:
    """Touches, as Chromium gets them from a screen."""

    def __init__(self, page):
        self.send = page.context.new_cdp_session(page).send

    def touch(self, kind, *places):
        points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(places)]
        self.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})

    def drag(self, *places):
        self.touch("Start", places[0])
        for place in places[1:]:
            self.touch("Move", place)
        self.touch("End")

    def pinch(self, middle, before, after):
        """Two fingers, one after the other, from one distance in pixels to another."""

        def fingers(distance):
            return [(middle[0] + side * distance / 2, middle[1]) for side in (-1, 1)]

        self.touch("Start", fingers(before)[0])
        self.touch("Start", *fingers(before))
        for distance in np.linspace(before, after, 5)[1:]:
            self.touch("Move", *fingers(distance))
        self.touch("End")

    def pen(self, kind, place):
        about = {"pointerType": "pen", "button": "left", "buttons": int(kind != "Released"), "clickCount": 1}
        self.send("Input.dispatchMouseEvent", {"type": f"mouse{kind}", "x": place[0], "y": place[1], **about})


@pytest.mark.slow
def test_fingers_and_pen_on_a_tablet(browser, served):
    folder, url = served
    page = visit(browser, url, 1024, 768, has_touch=True)
    fingers = Fingers(page)
    (a, b, c, middle), scale = on_screen(page, (0.4, 0.4), (0.5, 0.6), (0.6, 0.4), (0.5, 0.5))
    fingers.drag(a, b, c)
    status(page, "1 stroke, saved")
    strokes, label = stored(folder)
    assert abs(np.array(strokes[0]["points"]) - [[32, 24], [40, 36], [48, 24]]).max() <= 1
    assert np.array_equal(label, drawn(strokes))

    page.locator("#eraser").tap()
    fingers.pinch(b, 100, 200)  # zooms, and does nothing else, though a finger lies on the stroke
    page.locator("#brush").tap()
    fingers.drag(b, (b[0] + 8 * scale, b[1]))
    status(page, "2 strokes, saved")
    (_, (start, *_, end)) = (s["points"] for s in stored(folder)[0])
    assert abs(np.array(start) - [40, 36]).max() <= 1 and abs(end[0] - start[0] - 4) <= 1, "twice as large"
    page.locator("#fit").tap()
    page.locator("#eraser").tap()
    fingers.drag(b)
    status(page, "1 stroke, saved")
    page.locator("#undo").tap()
    status(page, "2 strokes, saved")

    page.locator("#classes button").first.tap()
    fingers.touch("Start", middle)  # the palm
    fingers.pen("Pressed", a)
    fingers.pen("Moved", c)
    fingers.pen("Released", c)
    fingers.touch("End")
    status(page, "3 strokes, saved")
    assert stored(folder)[0][-1]["class"] == 0
    before = shown(page)
    fingers.drag(b, c)  # from now on a finger moves the photo
    status(page, "3 strokes, saved")
    assert shown(page) != before and len(stored(folder)[0]) == 3
    assert not page.faults
