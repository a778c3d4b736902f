#!/usr/bin/env python
"""A simulated annotator of photographs with dense masks, and a load test; both speak HTTP to tools/annotate.py.

curve  looks at the prediction and strokes the largest error by the habits of blpseg.scribbles.simulate, again and again
       on each photograph; writes human seconds and mean IoU of the photographs (curve.csv, curve.png). With --train it
       finishes a few photographs, trains, and goes on in --order. Calls with one --output share a figure.
load   clients add strokes at once while the server is killed (SIGKILL); counts the acknowledged strokes that are lost.
"""

import argparse
import csv
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # research/ is not installed

import blpseg  # noqa: F401  (registers the data sets; before what loads torch, whose own deprecations it silences)

# isort: split
import cv2
import numpy as np
import yaml
from detectron2.data import MetadataCatalog
from matplotlib.figure import Figure
from PIL import Image

from blpseg.annotate.regions import region_strokes
from blpseg.data.datasets import load_records
from blpseg.evaluation.report import mean_iou
from blpseg.scribbles import simulate_scribble
from blpseg.utils.cli import add_debug_flag, count, parse_with_opts, run_command
from blpseg.utils.errors import BLPSegError
from blpseg.utils.files import read_label_of
from blpseg.utils.labels import IGNORED
from blpseg.utils.parallel import die_with
from blpseg.utils.yaml_files import read_yaml
from research.study import write_rows

TOOL = Path(__file__).resolve().parents[1] / "tools/annotate.py"


class Server:
    """``tools/annotate.py`` in a child process, and requests to it."""

    def __init__(self, project: Path, images: Path, classes: list[str]):
        self.words = [str(project), "--images", str(images), "--classes", *classes]
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        began = time.monotonic()
        command = [sys.executable, str(TOOL), *self.words, "--port", str(self.port)]
        ends = partial(die_with, os.getpid())
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=ends)
        self.words = self.words[:1]
        while self.process.poll() is None:
            try:
                self.photos = {image["name"]: image for image in self.ask("GET", "project")["images"]}
                self.seconds = time.monotonic() - began  # to the first answer
                return
            except OSError:
                time.sleep(0.05)
        raise BLPSegError("the annotator did not start; its message stands above")

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait()

    def ask(self, method: str, path: str, body: object = None):
        """The answer to a request: JSON, or a class map (H, W)."""
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}/api/{path}"
        request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=600) as answer:
            content = answer.read()
            return json.loads(content) if answer.headers.get_content_type().endswith("json") else np.array(
                Image.open(io.BytesIO(content)))  # fmt: skip

    def draw(self, photo: str, strokes: list[dict]) -> None:
        document = self.ask("GET", f"strokes/{photo}")
        self.ask("PUT", f"strokes/{photo}", {"version": document["version"], "strokes": document["strokes"] + strokes})


def stroke_of_largest_error(prediction: np.ndarray, mask: np.ndarray, width: int, seed: int) -> list[dict]:
    """What an annotator draws next, in the largest connected region of one class that is predicted wrongly: a simulated
    stroke's pixels as strokes one pixel wide. [] if nothing is wrong. Both maps: (H, W), 255 = nothing known."""
    best, region = 0, None
    for label in np.unique(mask[(mask != IGNORED) & (prediction != mask)]).tolist():
        wrong = ((mask == label) & (prediction != label)).astype(np.uint8)
        _, parts, stats, _ = cv2.connectedComponentsWithStats(wrong, connectivity=4)
        largest = 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
        if stats[largest, cv2.CC_STAT_AREA] > best:
            best, region = stats[largest, cv2.CC_STAT_AREA], np.where(parts == largest, label, IGNORED)
    if region is None:
        return []
    drawn = simulate_scribble(region, preference=0.5, width=width, seed=seed)
    return region_strokes(drawn != IGNORED, int(drawn[drawn != IGNORED][0]))


def photo_iou(prediction: np.ndarray, mask: np.ndarray, classes: int) -> float:
    """Mean IoU of a photo's classes in percent; where nothing is predicted, every class is wrong."""
    inside = mask != IGNORED
    index = np.minimum(prediction[inside], classes).astype(np.int64) * (classes + 1) + mask[inside]
    return mean_iou(np.bincount(index, minlength=(classes + 1) ** 2).reshape(classes + 1, classes + 1))


def curve(server: Server, masks: dict[str, np.ndarray], args: argparse.Namespace, classes: int) -> Iterator[dict]:
    """Annotate -> a row for each round: human seconds, mean IoU of the photos, seconds from PUT to prediction."""
    predictions = {photo: server.ask("POST", f"predict/{photo}", {}) for photo in masks}
    strokes, times = 0, []

    def draw(photo: str, number: int) -> None:
        nonlocal strokes
        if drawn := stroke_of_largest_error(predictions[photo], masks[photo], args.width, args.seed + number):
            began = time.monotonic()
            server.draw(photo, drawn)
            predictions[photo] = server.ask("POST", f"predict/{photo}", {})
            times.append(time.monotonic() - began)
            strokes += 1

    def row(mode: str) -> dict:
        score = np.mean([photo_iou(predictions[photo], masks[photo], classes) for photo in masks])
        numbers = {"strokes": strokes, "human seconds": strokes * args.seconds, "mIoU": round(float(score), 2)}
        return {
            "mode": mode,
            "seed": args.seed,
            **numbers,
            "95 % of predictions within, s": round(float(np.quantile(times, 0.95)), 2),
        }

    if not args.train:
        for number in range(args.strokes):
            for photo in masks:
                draw(photo, number)
            yield row("instant")
        return
    left, trainings = list(np.random.default_rng(args.seed).permutation(sorted(masks))), 0
    while left:
        if args.order == "ranked":  # the first round is random: there is no model yet
            scored = [entry["name"] for entry in server.ask("GET", "next")["images"] if entry["score"] is not None]
            left.sort(key=lambda photo: scored.index(photo) if photo in scored else len(scored))
        batch, left = left[: args.photos_a_round], left[args.photos_a_round :]
        for photo in batch:
            for number in range(args.strokes):
                draw(photo, number)
        if trainings != args.trainings:
            train(server, args.train)
            trainings += 1
            predictions = {photo: server.ask("POST", f"predict/{photo}", {}) for photo in masks}
        yield row(f"trained, {args.order}")


def train(server: Server, iterations: int) -> None:
    """Train, and wait for the end."""
    server.ask("POST", "train", {"iterations": iterations})
    while (status := server.ask("GET", "train"))["state"] in ("training", "predicting"):
        time.sleep(1)
    if status["state"] != "done":
        raise BLPSegError(f"training {status['state']}: {status['message']}")


def load(server: Server, args: argparse.Namespace) -> int:
    """Clients that share all photos, and a killer -> the number of acknowledged strokes that are lost."""
    acknowledged: list[tuple[str, float]] = []
    numbers, up, lock = iter(range(args.total)), threading.Event(), threading.Lock()
    up.set()

    def client(seed: int) -> None:
        random = np.random.default_rng(seed)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            photo = server.photos[str(random.choice(list(server.photos)))]
            points = (random.random((5, 2)) * (photo["width"] - 1, photo["height"] - 1)).round(1).tolist()
            while True:
                up.wait()
                try:  # the time is the stroke's name; an answer that was lost leaves it unacknowledged or there twice
                    server.draw(photo["name"], [{"class": 0, "width": 3, "points": points, "time": float(number)}])
                    break
                except urllib.error.HTTPError as error:
                    if error.code != http.client.CONFLICT:  # with another client
                        raise
                except (OSError, http.client.HTTPException):  # the server is away
                    time.sleep(0.01)
            acknowledged.append((photo["name"], float(number)))

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(args.clients)]
    for thread in clients:
        thread.start()
    kills = 0
    while any(thread.is_alive() for thread in clients):
        if kills < args.kills and len(acknowledged) >= (kills + 1) * args.total // (args.kills + 1):
            up.clear()
            server.stop(signal.SIGKILL)
            server.start()
            up.set()
            kills += 1
        time.sleep(0.02)
    server.stop(signal.SIGKILL)
    documents = [json.loads(path.read_bytes()) for path in Path(server.words[0], "strokes").glob("*.json")]
    lost = len(set(acknowledged) - {(d["image"], stroke["time"]) for d in documents for stroke in d["strokes"]})
    print(f"{len(acknowledged)} strokes acknowledged to {args.clients} clients, {kills} times SIGKILL, {lost} lost")
    return lost


def select(dataset: str, limit: int, only: list[str]) -> tuple[dict[Path, np.ndarray], list[str]]:
    """Photographs evenly spaced in a data set -> masks by the photographs' paths, class names.

    Args:
        dataset: with dense masks.
        limit: how many photographs.
        only: class names besides the background; photographs that show others are left out, and the masks count these.

    Raises:
        BLPSegError: a name of ``only`` is no class of the data set.
    """
    metadata = MetadataCatalog.get(dataset)
    names, ignored = list(metadata.stuff_classes), metadata.get("ignore_label", IGNORED)
    if unknown := set(only) - set(names[1:]):
        raise BLPSegError(f"--only: {dataset} has no class {', '.join(sorted(unknown))}; it has {', '.join(names[1:])}")
    kept = [0, *map(names.index, only)] if only else range(len(names))
    number = np.full(256, IGNORED, np.uint8)
    number[list(kept)] = np.arange(len(kept))
    masks = {}
    for record in load_records(dataset):
        size = record["height"], record["width"]
        mask = read_label_of(record["file_name"], record["sem_seg_file_name"], size, ignored)
        if np.isin(mask, [*kept, IGNORED]).all():
            masks[Path(record["file_name"])] = number[mask]
    chosen = list(masks)[:: max(1, len(masks) // limit)][:limit]
    return {path: masks[path] for path in chosen}, [names[i] for i in kept]


def prepare(args: argparse.Namespace, output: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Photographs copied into OUTPUT/photos -> masks by name, class names."""
    (output / "photos").mkdir(parents=True)
    masks, classes = select(args.dataset, args.limit, args.only)
    for path in masks:
        shutil.copy(path, output / "photos")
    return {path.name: mask for path, mask in masks.items()}, classes


def change_config(path: Path, opts: list[str]) -> None:
    """Write keys and values, in pairs, into a config."""
    content = read_yaml(path)
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        *sections, last = key.split(".")
        node = content
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = yaml.safe_load(value)
    path.write_text(yaml.safe_dump(content))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["curve", "load"])
    add("--dataset", default="voc_2012_val", metavar="NAME", help="with dense masks (default: voc_2012_val)")
    add("--limit", type=count, default=12, metavar="N", help="photographs (default: 12)")
    add("--only", nargs="+", default=[], metavar="CLASS", help="photographs of these classes (default: all)")
    add("--output", required=True, metavar="DIR", help="folder of curve.csv, curve.png and the projects")
    add("--strokes", type=count, default=6, metavar="N", help="at most, for each photograph (default: 6)")
    add("--seconds", type=float, default=4.0, metavar="S", help="of a person for a stroke (default: 4)")
    add("--width", type=count, default=3, metavar="W", help="of the strokes, pixels (default: 3)")
    add("--train", type=int, default=0, metavar="N", help="curve: iterations after each round (default: 0, none)")
    add("--order", choices=["random", "ranked"], default="random", help="--train: of photographs (default: random)")
    add("--photos-a-round", type=count, default=2, metavar="N", help="--train: photographs (default: 2)")
    add("--trainings", type=count, metavar="N", help="--train: in the first N rounds (default: in all)")
    add("--clients", type=count, default=4, metavar="N", help="load (default: 4)")
    add("--total", type=count, default=1000, metavar="N", help="load: strokes (default: 1000)")
    add("--kills", type=int, default=10, metavar="N", help="load (default: 10)")
    add("--seed", type=int, default=0, metavar="N", help="of order and strokes (default: 0)")
    args = parse_with_opts(add_debug_flag(parser))
    output = Path(args.output)
    table = str(output / "curve.csv")
    rows = list(csv.DictReader(open(table, newline=""))) if os.path.exists(table) else []
    run = output / f"{args.what}_{len(list(output.glob('*_*')))}"
    masks, classes = prepare(args, run)
    server = Server(run / "project", run / "photos", classes)
    try:
        if args.opts:
            change_config(run / "project/config.yaml", args.opts)
        if args.what == "load":
            return int(load(server, args) > 0)
        for row in curve(server, masks, args, len(classes)):
            print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
            rows.append(row)
            write_rows(table, rows)
    finally:
        server.stop()
    figure = Figure(figsize=(5.5, 3.6), dpi=120, layout="constrained")
    ax = figure.subplots()
    colors: dict[str, str] = {}
    for mode, seed in dict.fromkeys((row["mode"], str(row["seed"])) for row in rows):
        points = [(float(row["human seconds"]), float(row["mIoU"])) for row in rows
                  if (row["mode"], str(row["seed"])) == (mode, seed)]  # fmt: skip
        label = None if mode in colors else mode
        color = colors.setdefault(mode, f"C{len(colors)}")
        ax.plot(*zip(*points, strict=True), "o-", markersize=3, color=color, label=label)
    ax.set(xlabel=f"human seconds ({args.seconds:g} for a stroke)", ylabel=f"mean IoU of {len(masks)} photographs, %")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(output / "curve.png")
    return 0


if __name__ == "__main__":
    run_command(main)
