// The page: buttons, keys, photos, and what the server is asked for after a stroke.

import * as api from './api.js';
import {Sheet} from './sheet.js';
import {View} from './view.js';

const $ = (id) => document.getElementById(id);
const TRAINING_POLL_MS = 1000;

const state = {classes: [], images: [], current: -1, number: 0, tool: 'brush', sheet: null, sheets: new Map(), ranks: new Map()};
let predicting = false; // a prediction is on its way ...
let stale = false; // ... and the strokes have changed since it was asked for

const view = new View($('canvas'), {start: clearMessage, end: endStroke, tap: applyTool, drag: erase});

// Photos

async function open(index) {
  if (index < 0 || index >= state.images.length || index === state.current) return;
  const first = state.current < 0;
  state.current = index;
  const {name} = state.images[index];
  $('name').textContent = name;
  document.title = `${name} · Scribble`;
  showPhotos();
  view.show(null);
  $('hint').textContent = 'Loading …';
  document.body.dataset.prediction = 'none'; // what the overlay shows, also for tests
  const known = state.sheets.get(name);
  const sheet = known?.pending ? known : new Sheet(name, {changed, saved, message});
  state.sheets.set(name, sheet);
  state.sheet = sheet;
  try {
    const [bitmap] = await Promise.all([api.photo(name), sheet.loaded]);
    if (state.sheet !== sheet) return;
    view.show(bitmap);
    if (first) setWidth(Math.max(5, Math.round(Math.max(bitmap.width, bitmap.height) / 100)));
    changed(sheet);
    predict();
    rank();
  } catch (error) {
    message(`${name}: ${error.message}`);
  }
}

function showPhotos() {
  const strip = $('photos');
  if (strip.childElementCount !== state.images.length) strip.replaceChildren(...state.images.map(thumbnail));
  state.images.forEach((image, index) => {
    const button = strip.children[index];
    const [done, place] = [button.querySelector('.done'), button.querySelector('.rank')];
    button.setAttribute('aria-current', String(index === state.current));
    done.hidden = !image.strokes;
    done.textContent = `✓ ${image.strokes}`;
    place.hidden = !(state.ranks.get(image.name) <= 3);
    place.textContent = `next ${state.ranks.get(image.name)}`;
  });
  strip.children[state.current]?.scrollIntoView({block: 'nearest', inline: 'nearest'});
  $('previous').disabled = state.current <= 0;
  $('following').disabled = state.current >= state.images.length - 1;
}

function thumbnail(image, index) {
  const button = element('button', {title: image.name});
  button.append(element('img', {src: api.thumbnailUrl(image.name), loading: 'lazy', alt: image.name}));
  button.append(element('span', {className: 'rank'}), element('span', {className: 'done'}));
  button.addEventListener('click', () => open(index));
  return button;
}

async function rank(go = false) {
  try {
    const {images} = await api.next();
    state.ranks = new Map(images.filter((image) => image.score !== null).map((image, i) => [image.name, i + 1]));
    const here = state.images[state.current];
    view.places = images.find((image) => image.name === here?.name)?.places ?? [];
    view.draw();
    showPhotos();
    if (!go) return;
    const best = images.find((image) => image.name !== here?.name);
    if (best) open(state.images.findIndex((image) => image.name === best.name));
  } catch (error) {
    message(error.message);
  }
}

// Strokes

function endStroke(points) {
  state.sheet.add({class: state.number, width: view.width, points, time: Date.now() / 1000});
}

function applyTool(point) {
  if (state.tool === 'accept') accept(point);
  else erase(point);
}

function erase(point) {
  if (state.tool !== 'eraser') return;
  const stroke = view.strokeAt(point);
  if (stroke) state.sheet.remove(stroke);
}

async function accept([x, y]) {
  const {sheet} = state;
  try {
    const {stroke} = await api.region(sheet.name, x, y);
    sheet.add(stroke);
  } catch (error) {
    message(error.message);
  }
}

function changed(sheet) {
  const image = state.images.find(({name}) => name === sheet.name);
  if (image.strokes !== sheet.strokes.length) {
    image.strokes = sheet.strokes.length;
    showPhotos();
  }
  if (sheet !== state.sheet) return;
  view.strokes = sheet.strokes;
  view.draw();
  $('undo').disabled = !sheet.past.length;
  $('redo').disabled = !sheet.future.length;
  const count = sheet.strokes.length;
  $('status').textContent = sheet.failed ? 'Not saved' : sheet.pending ? 'Saving …' : `${count} ${count === 1 ? 'stroke' : 'strokes'}, saved`;
  showHint();
}

const TOOL_HINTS = {eraser: 'Click a stroke to remove it', accept: 'Click a region of the mask to keep it as a stroke'};

/** What to do next, for somebody who is here for the first time. */
function showHint() {
  if (!view.photo) return;
  const {strokes} = state.sheet;
  const used = new Set(strokes.map((stroke) => stroke.class));
  const missing = state.classes.filter((_, number) => !used.has(number)).map(({name}) => name);
  const trained = ['model', 'both'].includes(document.body.dataset.prediction);
  const first = state.images.every((image) => !image.strokes || image.name === state.sheet.name);
  let text = '';
  if (state.tool !== 'brush') text = TOOL_HINTS[state.tool];
  else if (trained) text = used.size ? '' : 'The trained model made this mask. Draw strokes where it is wrong';
  else if (!used.size) text = `Draw a short stroke on: ${state.classes[state.number].name}. Then choose another class on the left`;
  else if (used.size === 1) text = `Choose another class on the left and draw a stroke on it: ${missing.slice(0, 4).join(', ')}${missing.length > 4 ? ' …' : ''}`;
  else if (first && strokes.length < 5) text = 'The mask follows your strokes. Draw one more where it is wrong, or go to the next photo (›)';
  $('hint').textContent = text;
}

function saved(sheet) {
  if (sheet === state.sheet) predict();
}

async function predict() {
  if (predicting) {
    stale = true;
    return;
  }
  predicting = true;
  document.body.classList.add('predicting');
  do {
    stale = false;
    const {sheet} = state;
    try {
      const {image, source} = await api.predict(sheet.name);
      if (sheet !== state.sheet) stale = true;
      else view.prediction = source === 'none' ? null : image;
      document.body.dataset.prediction = source;
      showHint();
      view.draw();
    } catch (error) {
      message(error.message);
    }
  } while (stale);
  predicting = false;
  document.body.classList.remove('predicting');
}

// Classes and tools

function showClasses() {
  view.colors = state.classes.map((_, number) => color(number));
  view.color = color(state.number);
  $('classes').replaceChildren(...state.classes.map(({name}, number) => {
    const button = element('button', {role: 'radio', title: number < 9 ? `Key ${number + 1}` : name});
    button.setAttribute('aria-checked', String(number === state.number));
    button.style.background = color(number);
    button.style.color = ink(state.classes[number].color);
    button.append(element('kbd', {textContent: number < 9 ? number + 1 : ''}), element('span', {textContent: name}));
    button.addEventListener('click', () => choose(number));
    return button;
  }));
}

function choose(number) {
  if (number >= state.classes.length) return;
  state.number = number;
  showClasses();
  use('brush');
}

function use(tool) {
  state.tool = view.tool = tool;
  $('canvas').className = tool;
  for (const button of document.querySelectorAll('[data-tool]')) {
    button.setAttribute('role', 'radio');
    button.setAttribute('aria-checked', String(button.dataset.tool === tool));
  }
  showHint();
  view.draw();
}

function setWidth(width) {
  $('width').value = width;
  view.width = Number($('width').value);
  $('width-shown').textContent = view.width;
  view.draw();
}

function hide(hidden) {
  view.hidden = hidden;
  $('hide').classList.toggle('held', hidden);
  view.draw();
}

function color(number) {
  const [r, g, b] = state.classes[number].color;
  return `rgb(${r} ${g} ${b})`;
}

/** Black or white, whichever reads better on a colour: relative luminance of WCAG 2. */
function ink(rgb) {
  const linear = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 ? '#000' : '#fff';
}

// Training and export

async function followTraining() {
  let before = null;
  for (;;) {
    let now;
    try {
      now = await api.training();
    } catch {
      now = before;
    }
    if (now) showTraining(now);
    const busy = now && (now.state === 'training' || now.state === 'predicting');
    if (now && before && now.models !== before.models) {
      predict();
      rank();
    }
    before = now;
    if (!busy) return;
    await new Promise((resolve) => setTimeout(resolve, TRAINING_POLL_MS));
  }
}

function showTraining(now) {
  const busy = now.state === 'training' || now.state === 'predicting';
  $('train').textContent = busy ? 'Stop' : 'Train';
  $('train').dataset.state = now.state;
  $('progress').hidden = !busy;
  $('progress').value = now.state === 'training' ? now.iteration / now.iterations : now.predicted / state.images.length;
  const parts = [];
  if (now.state === 'training') parts.push(`step ${now.iteration} of ${now.iterations}`);
  if (now.state === 'predicting') parts.push(`predicting photo ${now.predicted + 1} of ${state.images.length}`);
  if (now.state === 'training' && now.seconds_left !== null) parts.push(`${duration(now.seconds_left)} left`);
  if (now.loss !== null) parts.push(`loss ${now.loss.toFixed(3)}`);
  if (now.mIoU !== null) parts.push(`mIoU ${now.mIoU.toFixed(1)}`);
  if (now.state === 'failed' || now.state === 'stopped') parts.push(now.message);
  $('training').textContent = parts.join(' · ');
}

const duration = (seconds) => (seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`);

async function toggleTraining() {
  clearMessage();
  try {
    await ($('train').textContent === 'Stop' ? api.stopTraining() : api.train());
    followTraining();
  } catch (error) {
    message(error.message);
  }
}

async function exportAll() {
  clearMessage();
  $('export').disabled = true;
  try {
    const {folder, files} = await api.exportAll();
    $('file-list').replaceChildren(...[`in ${folder}:`, ...files].map((textContent) => element('li', {textContent})));
    $('files').showModal();
  } catch (error) {
    message(error.message);
  }
  $('export').disabled = false;
}

// The rest

function element(kind, properties) {
  return Object.assign(document.createElement(kind), properties);
}

function message(text) {
  $('message').textContent = text;
  $('message').hidden = false;
}

function clearMessage() {
  $('message').hidden = true;
}

async function addClass(event) {
  event.preventDefault();
  try {
    ({classes: state.classes} = await api.addClass($('class-name').value.trim()));
    $('class-name').value = '';
    choose(state.classes.length - 1);
  } catch (error) {
    message(error.message);
  }
}

const KEYS = {
  b: () => use('brush'), e: () => use('eraser'), a: () => use('accept'), n: () => rank(true), f: () => view.fit(),
  z: () => state.sheet.undo(), y: () => state.sheet.redo(), h: () => hide(true),
  '[': () => setWidth(view.width - 2), ']': () => setWidth(view.width + 2),
  '+': () => view.zoom(1.25), '=': () => view.zoom(1.25), '-': () => view.zoom(0.8),
  ArrowLeft: () => open(state.current - 1), ArrowRight: () => open(state.current + 1),
};

function key(event) {
  if (event.target.matches('input:not([type="range"])') || $('files').open || !state.sheet) return;
  const control = event.ctrlKey || event.metaKey;
  if (event.key === ' ') view.spaceHeld = true;
  else if (control && event.key.toLowerCase() === 'z') event.shiftKey ? state.sheet.redo() : state.sheet.undo();
  else if (control && event.key !== 'y') return;
  else if (/^[1-9]$/.test(event.key)) choose(Number(event.key) - 1);
  else if (KEYS[event.key]) KEYS[event.key]();
  else return;
  event.preventDefault();
}

function listen() {
  const clicks = {
    previous: () => open(state.current - 1), following: () => open(state.current + 1), suggested: () => rank(true),
    undo: () => state.sheet.undo(), redo: () => state.sheet.redo(), fit: () => view.fit(),
    'zoom-in': () => view.zoom(1.25), 'zoom-out': () => view.zoom(0.8), train: toggleTraining, export: exportAll,
  };
  for (const [id, action] of Object.entries(clicks)) $(id).addEventListener('click', action);
  for (const button of document.querySelectorAll('[data-tool]')) button.addEventListener('click', () => use(button.dataset.tool));
  $('new-class').addEventListener('submit', addClass);
  $('width').addEventListener('input', () => setWidth($('width').value));
  $('opacity').addEventListener('input', () => {
    view.opacity = $('opacity').value / 100;
    view.draw();
  });
  $('hide').addEventListener('pointerdown', () => hide(true));
  for (const kind of ['pointerup', 'pointercancel', 'pointerleave']) $('hide').addEventListener(kind, () => hide(false));
  window.addEventListener('keydown', key);
  window.addEventListener('keyup', (event) => {
    if (event.key === ' ') view.spaceHeld = false;
    if (event.key === 'h') hide(false);
  });
  window.addEventListener('blur', () => hide(false));
  window.addEventListener('beforeunload', (event) => {
    if ([...state.sheets.values()].some((sheet) => sheet.pending)) event.preventDefault();
  });
}

async function start() {
  listen();
  use('brush');
  try {
    Object.assign(state, await api.project());
  } catch (error) {
    message(error.message);
    return;
  }
  choose(Math.min(1, state.classes.length - 1));
  const first = state.images.findIndex((image) => !image.strokes);
  open(Math.max(first, 0));
  followTraining();
}

start();
