// Waiting, and when the load is over.
import http from 'k6/http';

import { going } from './settings.js';

const ASK_MS = 1000;

// Something to be done after a time, unless it is stopped. When k6's first timer is cleared, its next one goes off in its place, however
// much too early; so the clock is asked.
export class Timer {
  constructor(milliseconds, what) {
    this.at = Date.now() + milliseconds;
    this.what = what;
    this.arm();
  }

  arm() {
    const left = this.at - Date.now();
    this.id = setTimeout(() => (Date.now() < this.at ? this.arm() : this.what()), Math.max(0, left));
  }

  stop() {
    clearTimeout(this.id);
  }
}

export function sleep(milliseconds) {
  return new Promise((resolve) => new Timer(milliseconds, resolve));
}

// Waits for a promise, but not for longer than this. No timer is left behind: an iteration lasts until its last timer.
export function within(milliseconds, promise) {
  return new Promise((resolve) => {
    const timer = new Timer(milliseconds, resolve);
    promise.then(() => {
      timer.stop();
      resolve();
    });
  });
}

// The end of the load: a time, or earlier, as soon as nothing is found any more at LOAD_WHILE.
export class End {
  constructor(at) {
    this.at = at;
    if (going) {
      this.follow();
    }
  }

  left() {
    return this.at - Date.now();
  }

  async follow() {
    while (this.left() > 0) {
      await sleep(Math.min(ASK_MS, this.left()));
      const { status } = await http.asyncRequest('GET', going, null, { tags: { name: 'while' } });
      if (status === 404) {
        this.at = Math.min(this.at, Date.now());
      }
    }
  }
}
