// The strokes of one photo: what is drawn, what can be undone, and what the server has acknowledged.

import * as api from './api.js';

const RETRY_MS = 2000;

export class Sheet {
  /** `changed(sheet)` is called when strokes or the state of saving change, `saved(sheet)` when the disk has them. */
  constructor(name, {changed, saved, message}) {
    Object.assign(this, {name, changed, saved, message});
    this.strokes = [];
    this.acknowledged = []; // the strokes of `version`
    this.version = 0;
    this.past = [];
    this.future = [];
    this.pending = false; // there are changes that the server has not acknowledged
    this.loaded = this.load();
  }

  async load() {
    const stored = await api.strokes(this.name);
    this.version = stored.version;
    this.strokes = this.acknowledged = stored.strokes;
    this.past = [];
    this.future = [];
    this.changed(this);
  }

  add(stroke) {
    this.set([...this.strokes, stroke]);
  }

  remove(stroke) {
    this.set(this.strokes.filter((other) => other !== stroke));
  }

  set(strokes) {
    this.past.push(this.strokes);
    this.future = [];
    this.apply(strokes);
  }

  undo() {
    if (!this.past.length) return;
    this.future.push(this.strokes);
    this.apply(this.past.pop());
  }

  redo() {
    if (!this.future.length) return;
    this.past.push(this.strokes);
    this.apply(this.future.pop());
  }

  apply(strokes) {
    this.strokes = strokes;
    this.dirty = true;
    this.save();
    this.changed(this);
  }

  /** One PUT at a time; what is drawn meanwhile goes with the next. */
  async save() {
    if (this.pending) return;
    this.pending = true;
    while (this.dirty) {
      this.dirty = false;
      const sent = this.strokes;
      try {
        ({version: this.version} = await api.save(this.name, {strokes: sent, version: this.version}));
        this.acknowledged = sent;
        this.failed = false;
      } catch (error) {
        await this.recover(error);
      }
    }
    this.pending = false;
    this.changed(this);
    if (!this.failed) this.saved(this);
  }

  async recover(error) {
    if (error.status === 409) {
      // Another window was faster: its strokes first, then ours that it does not know.
      const mine = this.strokes.filter((stroke) => !this.acknowledged.includes(stroke));
      await this.load().then(() => {
        this.strokes = [...this.strokes, ...mine];
        this.dirty = mine.length > 0;
        this.message(`${this.name} was changed in another window: its strokes were loaded, your new ones kept.`);
        this.changed(this);
      }, () => this.retryLater());
    } else if (error.status >= 400 && error.status < 500) {
      this.failed = true;
      this.message(`Not saved: ${error.message}`);
    } else {
      this.message(`Not saved yet: ${error.message}`);
      await this.retryLater();
    }
  }

  async retryLater() {
    this.failed = true;
    this.dirty = true;
    this.changed(this);
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}
