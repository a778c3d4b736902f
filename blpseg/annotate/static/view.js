// The photo with its layers on a canvas; mouse, pen and touch on it.
//
// Mouse: left draws, middle, right or held space moves, the wheel zooms. Pen draws, whatever else touches the glass. One
// finger draws until a pen has been seen, from then on it moves; two fingers move and zoom.

const LARGEST_SCALE = 40;
const MARK_RADIUS = 14;
const TAP_REACH = 6; // a finger that rests moves as much; one that does not act yet can become a pinch

export class View {
  /**
   * Handlers: `start()` when something is begun, `end(points)` of a stroke, `tap(point)` and `drag(point)` of the other
   * tools; points are whole pixels of the photo.
   */
  constructor(canvas, handlers) {
    Object.assign(this, {canvas, handlers, context: canvas.getContext('2d')});
    Object.assign(this, {photo: null, prediction: null, strokes: [], places: [], colors: []});
    Object.assign(this, {opacity: 0.5, hidden: false, tool: 'brush', width: 5, color: '#000'});
    this.pointers = new Map();
    this.paths = new WeakMap();
    this.line = null; // the stroke that is being drawn
    this.pressed = null; // where another tool than the brush was pressed
    this.pen = null; // the pen that is down
    this.hover = null;
    this.penSeen = false;
    this.spaceHeld = false;
    new ResizeObserver(() => this.resize()).observe(canvas);
    for (const kind of ['pointerdown', 'pointermove', 'pointerup', 'pointercancel', 'pointerleave', 'wheel']) {
      canvas.addEventListener(kind, (event) => this[kind](event), {passive: false});
    }
    canvas.addEventListener('contextmenu', (event) => event.preventDefault());
  }

  show(photo) {
    Object.assign(this, {photo, prediction: null, strokes: [], places: [], line: null, pressed: null});
    this.fit();
  }

  resize() {
    const box = this.canvas.getBoundingClientRect();
    this.ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.max(1, Math.round(box.width * this.ratio));
    this.canvas.height = Math.max(1, Math.round(box.height * this.ratio));
    this.fit();
  }

  fit() {
    if (!this.photo) return;
    const {width, height} = this.canvas;
    this.scale = Math.min(width / this.photo.width, height / this.photo.height) * 0.98;
    this.x = (width - this.photo.width * this.scale) / 2;
    this.y = (height - this.photo.height * this.scale) / 2;
    this.draw();
  }

  zoom(factor, x = this.canvas.width / 2, y = this.canvas.height / 2) {
    if (!this.photo) return;
    const least = Math.min(this.canvas.width / this.photo.width, this.canvas.height / this.photo.height) / 2;
    const scale = Math.min(Math.max(this.scale * factor, least), LARGEST_SCALE * this.ratio);
    this.x = x - (x - this.x) * scale / this.scale;
    this.y = y - (y - this.y) * scale / this.scale;
    this.scale = scale;
    this.draw();
  }

  draw() {
    if (this.scheduled) return;
    this.scheduled = true;
    requestAnimationFrame(() => {
      this.scheduled = false;
      this.paint();
    });
  }

  paint() {
    const {context: c, canvas} = this;
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.clearRect(0, 0, canvas.width, canvas.height);
    if (!this.photo) return;
    c.setTransform(this.scale, 0, 0, this.scale, this.x, this.y);
    c.imageSmoothingEnabled = this.scale < 2;
    c.drawImage(this.photo, 0, 0);
    if (this.prediction && !this.hidden) {
      c.globalAlpha = this.opacity;
      c.imageSmoothingEnabled = false;
      c.drawImage(this.prediction, 0, 0, this.photo.width, this.photo.height);
      c.globalAlpha = 1;
    }
    if (!this.hidden) this.strokes.forEach((stroke) => this.paintStroke(this.path(stroke), stroke.width, this.colors[stroke.class]));
    if (this.line) this.paintStroke(toPath(this.line), this.width, this.color);
    if (!this.hidden) this.places.forEach(([x, y]) => this.ring(x, y, MARK_RADIUS * this.ratio / this.scale, [6, 4]));
    if (this.hover && this.tool === 'brush' && !this.line) this.ring(...this.hover, this.width / 2, []);
  }

  paintStroke(path, width, color) {
    const c = this.context;
    c.lineCap = c.lineJoin = 'round';
    c.lineWidth = width + 2 * this.ratio / this.scale;
    c.strokeStyle = '#fff';
    c.stroke(path);
    c.lineWidth = width;
    c.strokeStyle = color;
    c.stroke(path);
  }

  ring(x, y, radius, dash) {
    const c = this.context;
    const pixel = this.ratio / this.scale;
    c.beginPath();
    c.arc(x + 0.5, y + 0.5, Math.max(radius, 2 * pixel), 0, 2 * Math.PI);
    for (const [color, width] of [['#000', 3.5], ['#fff', 1.5]]) {
      c.setLineDash(dash.map((length) => length * pixel));
      c.lineWidth = width * pixel;
      c.strokeStyle = color;
      c.stroke();
    }
    c.setLineDash([]);
  }

  path(stroke) {
    if (!this.paths.has(stroke)) this.paths.set(stroke, toPath(stroke.points));
    return this.paths.get(stroke);
  }

  /** The stroke under a point, the latest first. */
  strokeAt([x, y]) {
    const c = this.context;
    c.setTransform(1, 0, 0, 1, 0, 0);
    const reach = 8 * this.ratio / this.scale;
    return this.strokes.findLast((stroke) => {
      c.lineWidth = stroke.width + reach;
      c.lineCap = c.lineJoin = 'round';
      return c.isPointInStroke(this.path(stroke), x + 0.5, y + 0.5);
    });
  }

  /** Canvas pixels of an event, and the pixel of the photo below them, clipped to the photo. */
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * this.ratio, (event.clientY - box.top) * this.ratio];
  }

  pixel([x, y]) {
    const clip = (value, size) => Math.min(Math.max(Math.floor(value), 0), size - 1);
    return [clip((x - this.x) / this.scale, this.photo.width), clip((y - this.y) / this.scale, this.photo.height)];
  }

  moves(event) {
    return event.button > 0 || this.spaceHeld || (event.pointerType === 'touch' && this.penSeen);
  }

  pointerdown(event) {
    if (!this.photo || this.pen !== null) return; // a palm beside the pen
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    const place = this.place(event);
    if (event.pointerType === 'pen') {
      this.penSeen = true;
      this.pen = event.pointerId;
      this.pointers.clear(); // the palm came first
    }
    this.pointers.set(event.pointerId, place);
    this.line = this.pressed = null; // a second finger: no stroke was meant
    this.moving = this.pointers.size > 1 || this.moves(event);
    if (!this.moving) {
      this.handlers.start();
      if (this.tool === 'brush') this.line = [this.pixel(place)];
      else this.pressed = place;
    }
    this.draw();
  }

  pointermove(event) {
    if (!this.photo) return;
    const place = this.place(event);
    this.hover = event.pointerType === 'touch' ? null : this.pixel(place);
    const before = this.pointers.get(event.pointerId);
    if (before && this.moving) this.move(event.pointerId, before, place);
    else if (before && this.line) {
      const events = event.getCoalescedEvents?.() ?? [];
      for (const part of events.length ? events : [event]) this.extend(this.pixel(this.place(part)));
    } else if (before && this.pressed) {
      const [dx, dy] = [place[0] - this.pressed[0], place[1] - this.pressed[1]];
      if (Math.hypot(dx, dy) > TAP_REACH * this.ratio) this.handlers.drag(this.pixel(place));
    }
    if (before) this.pointers.set(event.pointerId, place);
    this.draw();
  }

  extend(point) {
    const last = this.line.at(-1);
    if (point[0] !== last[0] || point[1] !== last[1]) this.line.push(point);
  }

  move(id, before, place) {
    const other = [...this.pointers].find(([key]) => key !== id)?.[1];
    if (other) {
      const distance = ([x, y]) => Math.hypot(x - other[0], y - other[1]);
      const middle = [(place[0] + other[0]) / 2, (place[1] + other[1]) / 2];
      this.x += (place[0] - before[0]) / 2;
      this.y += (place[1] - before[1]) / 2;
      this.zoom(distance(place) / Math.max(distance(before), 1), ...middle);
    } else {
      this.x += place[0] - before[0];
      this.y += place[1] - before[1];
    }
  }

  pointerup(event) {
    const {line, pressed} = this;
    if (!this.pointercancel(event)) return;
    if (line) this.handlers.end(line);
    else if (pressed) this.handlers.tap(this.pixel(this.place(event)));
  }

  /** Forget a pointer and what it was drawing; false for one that was ignored. */
  pointercancel(event) {
    if (!this.pointers.delete(event.pointerId)) return false;
    if (this.pen === event.pointerId) this.pen = null;
    this.line = this.pressed = null;
    this.draw();
    return true;
  }

  pointerleave() {
    this.hover = null;
    this.draw();
  }

  wheel(event) {
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), ...this.place(event));
  }
}

function toPath(points) {
  const path = new Path2D();
  path.moveTo(points[0][0] + 0.5, points[0][1] + 0.5);
  if (points.length === 1) path.lineTo(points[0][0] + 0.501, points[0][1] + 0.5); // a dot
  for (const [x, y] of points.slice(1)) path.lineTo(Math.floor(x) + 0.5, Math.floor(y) + 0.5);
  return path;
}
