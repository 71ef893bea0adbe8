// Waiting, and when the load is over.
import http from 'k6/http';

import { going } from './settings.js';

const ASK_MS = 1000;

export function sleep(milliseconds) {
  return new Promise((resolve) => {
    setTimeout(resolve, Math.max(0, milliseconds));
  });
}

// Waits for a promise, but not for longer than this. No timer is left behind: an iteration lasts until its last timer.
export function within(milliseconds, promise) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    promise.then(() => {
      clearTimeout(timer);
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
