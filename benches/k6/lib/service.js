// Services: open streams, talk to the devices, close them, and count what did not go as it should.
import exec from 'k6/execution';
import http from 'k6/http';
import { WebSocket } from 'k6/experimental/websockets';

import { counts, echo, handshake } from './figures.js';
import { base } from './settings.js';
import { deviceId, signAsService } from './sas.js';
import { End, sleep, Timer, within } from './time.js';

const CONNECTING = 0;
const OPEN = 1;
const DRAINING = 1012;
// How long an echo or an end may take before it is given up: as long as the relay waits for both legs.
const PATIENCE_MS = 60000;
// The first message through a stream, and how long before it is sent again. k6 loses what comes right behind the answer to an upgrade when
// it reads it before it has told itself that the socket is open; for a device's leg that is this message.
const FIRST = 'first';
const AGAIN_MS = 2000;
// A leg that does not open says that its edge is gone, and so do others until the edge's lease has ended.
const GONE_S = 5;
// The longest time before a stream that was cut is opened anew. An edge that goes cuts many in the same moment, and a burst of set-ups
// would measure nothing but how long it waits for the processor.
const REOPEN_MS = 10000;

// A service that knows how long it will be there, so that its signature lasts as long.
export class Service {
  constructor(seconds, devices, grace) {
    this.headers = { Authorization: signAsService(seconds + 60), 'Content-Type': 'application/json' };
    this.devices = devices;
    this.grace = grace;
    this.complaints = 0;
    this.asked = 0;
  }

  // A stream to any device, tried twice; `undefined` when both tries failed. Something has come back through it.
  async open() {
    for (const last of [false, true]) {
      try {
        return await this.openOnce(deviceId(Math.floor(Math.random() * this.devices)));
      } catch (failure) {
        this.complain(failure);
        if (last || !failure.mayRetry) {
          break;
        }
        counts.retries.add(1);
        await sleep(Math.min(failure.pause || 0, GONE_S) * 1000 + 200 * Math.random());
      }
    }
    counts.failed.add(1);
    return undefined;
  }

  // The relay has no use for the key. With it, k6's HTTP client sends a request again that met the end of an idle connection.
  async openOnce(device) {
    const asked = Date.now();
    const url = `${base}/v1/devices/${encodeURIComponent(device)}/streams`;
    const answer = await http.asyncRequest('POST', url, '{"name":"load"}', {
      headers: Object.assign({ 'Idempotency-Key': `${exec.vu.idInTest}-${(this.asked += 1)}` }, this.headers),
      tags: { name: 'open stream' },
      timeout: '60s',
    });
    if (answer.status !== 201) {
      throw refusal(answer);
    }
    const { url: leg, ticket } = answer.json();
    const stream = new Stream(leg, ticket, asked);
    try {
      await stream.greet();
    } catch (failure) {
      stream.close();
      throw Object.assign(failure, { pause: GONE_S });
    }
    handshake.add(stream.answered - asked);
    counts.streams.add(1);
    return stream;
  }

  // Sends messages through a stream while `left()` milliseconds are left, with pauses in between, and closes it; tells whether it stood
  // until then.
  async talk(stream, left, pause, bytes) {
    const filling = 'x'.repeat(bytes);
    let failure;
    for (let number = 0; !failure && !stream.end && left() > 0; number += 1) {
      try {
        echo.add(await stream.echo(`${number} ${filling}`.slice(0, bytes)));
        if (pause > 0) {
          await within(Math.min(pause * 1000, left()), stream.ended);
        }
      } catch (caught) {
        failure = caught;
        if (stream.socket.readyState !== OPEN) {
          // Its end is about to be told.
          await within(PATIENCE_MS, stream.ended);
        }
      }
    }
    const stood = !failure && !stream.end;
    if (!stood) {
      this.account(stream, failure);
    }
    await stream.close();
    return stood;
  }

  // Keeps one stream after the other until the end, each for `life` seconds at most.
  async keep({ end, life, pause, bytes }) {
    while (end.left() > 0) {
      const stream = await this.open();
      if (!stream) {
        return;
      }
      const last = Date.now() + life() * 1000;
      const stood = await this.talk(stream, () => Math.min(end.at, last) - Date.now(), pause, bytes());
      counts.held.add(stood && end.left() <= 0 ? 1 : 0);
      if (!stood) {
        await sleep(REOPEN_MS * Math.random());
      }
    }
  }

  // One stream for up to `longest` seconds.
  async pass({ longest, pause, bytes }) {
    const stream = await this.open();
    if (stream) {
      const last = Date.now() + longest * 1000 * Math.random();
      await this.talk(stream, () => last - Date.now(), pause, bytes());
    }
  }

  // A stream that ended by itself: the relay may have gone away, but only after its grace.
  account(stream, failure) {
    const { at, code, text } = stream.end || { at: Date.now(), text: failure.message };
    const age = (at - stream.asked) / 1000;
    if (code === DRAINING && age >= this.grace) {
      counts.drained.add(1);
    } else {
      counts.cut.add(1);
      this.complain(new Error(`a stream was cut after ${age.toFixed(1)} s: ${code || ''} ${text}`));
    }
  }

  complain(failure) {
    this.complaints += 1;
    if (this.complaints <= 3) {
      console.warn(failure.message);
    }
  }
}

// The scenario that keeps so many streams for `seconds`; some share the event loop of one virtual user.
export function keepScenario(streams, seconds, settle) {
  return {
    exec: 'services',
    executor: 'per-vu-iterations',
    vus: Math.min(streams, Math.max(4, Math.ceil(streams / 25))),
    iterations: 1,
    startTime: `${settle}s`,
    maxDuration: `${Math.ceil(seconds) + 60}s`,
  };
}

// A virtual user of that scenario. Streams are opened at a rate; `life` and `bytes` are asked for each of them. With `longest`, short
// ones follow at the same rate until the end.
export async function runServices(service, { streams, rate, seconds, pause, life, bytes, longest }) {
  const { vus } = exec.test.options.scenarios.services;
  const { startTime, iterationInTest } = exec.scenario;
  const end = new End(startTime + seconds * 1000);
  const done = [];
  for (let number = iterationInTest; number < streams || longest; number += vus) {
    // By the clock: the rate does not depend on how fast the relay is.
    await sleep(startTime + (number / rate) * 1000 - Date.now());
    if (end.left() <= 0) {
      break;
    }
    done.push(number < streams ? service.keep({ end, life, pause, bytes }) : service.pass({ longest, pause, bytes }));
  }
  await Promise.all(done);
}

// The service's leg of a stream. One message is on its way at a time.
class Stream {
  constructor(url, ticket, asked) {
    this.asked = asked;
    this.end = undefined;
    this.closing = false;
    this.waiting = undefined;
    this.copies = 0;
    this.socket = new WebSocket(url, null, { headers: { Authorization: `Bearer ${ticket}` }, tags: { name: 'service leg' } });
    this.opened = new Promise((resolve) => {
      this.socket.onopen = resolve;
    });
    this.ended = new Promise((resolve) => {
      this.socket.onerror = (event) => {
        this.failure = event.error;
      };
      this.socket.onclose = () => {
        this.end = how(this.failure);
        resolve();
        this.settle(new Error(`the stream ended: ${this.end.text}`));
      };
    });
    this.socket.onmessage = (event) => {
      if (this.copies > 0 && event.data === FIRST && !this.greeting) {
        this.copies -= 1;
      } else {
        this.settle(undefined, event);
      }
    };
  }

  // The first echo, however often it takes.
  async greet() {
    const again = () => {
      if (this.socket.readyState === OPEN) {
        this.copies += 1;
        counts.repeats.add(1);
        this.socket.send(FIRST);
      }
      this.greeting = new Timer(AGAIN_MS, again);
    };
    this.greeting = new Timer(AGAIN_MS, again);
    try {
      await this.echo(FIRST);
    } finally {
      this.greeting.stop();
      this.greeting = undefined;
    }
  }

  // Sends a text and gives the milliseconds until it is back, as the script sees them.
  async echo(text) {
    if (this.socket.readyState === CONNECTING) {
      await Promise.race([this.opened, this.ended]);
    }
    const event = await new Promise((resolve, reject) => {
      const timer = new Timer(PATIENCE_MS, () => this.settle(new Error(`no echo within ${PATIENCE_MS} ms`)));
      this.waiting = { resolve, reject, timer };
      if (this.socket.readyState !== OPEN) {
        this.settle(new Error(`the leg did not open: ${this.failure || 'it was closed'}`));
        return;
      }
      this.sent = exec.instance.currentTestRunDuration;
      this.socket.send(text);
    });
    this.answered = Date.now();
    const took = exec.instance.currentTestRunDuration - this.sent;
    if (event.data !== text) {
      counts.wrong.add(1);
    }
    counts.bytes.add(text.length);
    return took;
  }

  settle(failure, event) {
    const { waiting } = this;
    this.waiting = undefined;
    if (!waiting) {
      // Something that nobody asked for.
      counts.wrong.add(event && !this.closing ? 1 : 0);
      return;
    }
    waiting.timer.stop();
    if (failure) {
      waiting.reject(Object.assign(failure, { mayRetry: true }));
    } else {
      waiting.resolve(event);
    }
  }

  // Closes it, and waits for the relay's close.
  async close() {
    this.closing = true;
    if (this.socket.readyState === OPEN) {
      this.socket.close(1000, 'done');
    }
    await within(PATIENCE_MS, this.ended);
  }
}

// When a stream ended, and with what: code and text of a close frame. k6 tells them as the text of an error, and 1000 and 1001 not at all.
function how(failure) {
  const [, code, text] = /close (\d+)[^:]*(?:: (.*))?$/.exec(failure || '') || [];
  return { at: Date.now(), code: Number(code) || undefined, text: text || failure || 'closed' };
}

// 503 may be tried again, and so may what no answer came to, or what a balancer did not take.
function refusal(answer) {
  const problem = (answer.body && /json/.test(answer.headers['Content-Type']) && answer.json()) || {};
  const failure = new Error(`no stream: ${answer.status} ${problem.detail || answer.error}`);
  return Object.assign(failure, {
    mayRetry: [0, 408, 410, 502, 503].includes(answer.status),
    pause: problem.retry_after_seconds,
  });
}
