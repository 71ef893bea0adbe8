// Devices: each keeps its link, goes where it is told, accepts every stream, and sends back whatever comes.
import exec from 'k6/execution';
import { WebSocket } from 'k6/experimental/websockets';

import { counts } from './figures.js';
import { base } from './settings.js';
import { deviceId, signAsDevice } from './sas.js';
import { End, sleep, Timer } from './time.js';

const OPEN = 1;
// Before a leg is dialed again. An address that has just gone may stay in the balancer's list for a second or two.
const LEG_PAUSES_MS = [200, 500, 1000, 2000];

// The scenario in which `devices` are there for `seconds`. A few share the event loop of one virtual user.
export function deviceScenario(devices, seconds) {
  const vus = Math.min(devices, Math.max(4, Math.ceil(devices / 50)));
  return { exec: 'devices', executor: 'per-vu-iterations', vus, iterations: 1, maxDuration: `${Math.ceil(seconds) + 90}s` };
}

// A virtual user of that scenario. The links are opened in the first part of `settle` seconds, and stay until only devices are left.
export async function runDevices(devices, seconds, settle) {
  const { vus } = exec.test.options.scenarios.devices;
  const end = new End(exec.scenario.startTime + seconds * 1000);
  const own = [];
  for (let number = exec.scenario.iterationInTest; number < devices; number += vus) {
    const device = new Device(number, seconds);
    device.redial(0.7 * settle * Math.random());
    own.push(device);
  }
  while (end.left() > 0 || exec.instance.vusActive > vus) {
    await sleep(500);
  }
  own.forEach((device) => device.end());
  await sleep(1000);
  if (own.some((device) => device.legs.size > 0)) {
    // The relay does not read a leg whose other end never came, and so answers its close only when its time is over, a minute later.
    setTimeout(() => {
      throw new Error('legs are left whose services never came');
    });
  }
}

class Device {
  constructor(number, seconds) {
    this.number = number;
    // The credential outlives the test, so no link has to be renewed.
    this.headers = { Authorization: signAsDevice(number, seconds + 120) };
    this.over = false;
    this.dialed = 0;
    this.failures = 0;
    this.asked = new Set();
    this.legs = new Set();
    this.dialing = undefined;
    this.link = undefined;
  }

  dial() {
    const url = `${base.replace(/^http/, 'ws')}/v1/devices/${encodeURIComponent(deviceId(this.number))}/link`;
    const link = new WebSocket(url, 'midspan.link.v1', { headers: this.headers, tags: { name: 'link' } });
    this.dialed += 1;
    link.number = this.dialed;
    // Not when it hears the welcome, which k6 may lose: it comes right behind the answer to the upgrade.
    link.onopen = () => this.opened(link);
    link.onmessage = (event) => this.hear(link, JSON.parse(event.data));
    link.onerror = (event) => {
      link.failure = event.error;
    };
    link.onclose = () => this.closed(link);
  }

  opened(link) {
    counts.links.add(1);
    this.failures = 0;
    this.link = link;
    if (this.over) {
      this.end();
    }
  }

  hear(link, message) {
    if (message.type === 'request') {
      link.send(JSON.stringify({ type: 'accept', request: message.request }));
      if (!this.asked.has(message.request)) {
        this.asked.add(message.request);
        this.openLeg(message, 0);
      }
    } else if (message.type === 'goodbye') {
      this.told(link, message);
    }
  }

  // A link that is told to move stays until the next one stands; any other one is closed by the relay at once.
  told(link, { reason, come_back_seconds: pause }) {
    if (link.told) {
      return;
    }
    link.told = true;
    if (reason === 'draining') {
      counts.moved.add(1);
    } else if (reason !== 'replaced' || link.number === this.dialed) {
      // Replaced without a newer link of our own: somebody else has this identity.
      counts.lost.add(1);
      console.warn(`link of ${deviceId(this.number)}: ${reason}`);
    }
    if (reason !== 'replaced') {
      this.redial(pause * (1 + Math.random()));
    }
  }

  closed(link) {
    if (link.told || this.over) {
      return;
    }
    // It is one or the other: a link that was refused never opened.
    (this.link === link ? counts.lost : counts.refused).add(1);
    if (this.failures === 0) {
      console.warn(`link of ${deviceId(this.number)}: ${link.failure || 'closed without a goodbye'}`);
    }
    this.redial(Math.min(60, 2 ** this.failures) * Math.random());
    this.failures += 1;
  }

  stopDialing() {
    if (this.dialing) {
      this.dialing.stop();
    }
  }

  redial(seconds) {
    this.stopDialing();
    if (!this.over) {
      this.dialing = new Timer(seconds * 1000, () => this.dial());
    }
  }

  // No service is left: a leg that still waits for one would keep the test from its end.
  end() {
    this.over = true;
    this.stopDialing();
    this.legs.forEach((leg) => leg.close());
    if (this.link && this.link.readyState === OPEN) {
      this.link.told = true;
      this.link.close(1000);
    }
  }

  // A leg that did not open, or whose connection breaks before anything came, is tried again: its stream may still wait for it. k6 does
  // not tell a refusal that is final from one that asks for another try. A close frame is final.
  openLeg(request, broken) {
    const leg = new WebSocket(request.url, null, {
      headers: { Authorization: `Bearer ${request.ticket}` },
      tags: { name: 'device leg' },
    });
    this.legs.add(leg);
    leg.binaryType = 'arraybuffer';
    leg.onmessage = (event) => {
      leg.heard = true;
      if (leg.readyState === OPEN) {
        leg.send(event.data);
      }
    };
    leg.onerror = (event) => {
      const final = /close (?!1006)/.test(event.error);
      if (!leg.heard && !final && !this.over && broken < LEG_PAUSES_MS.length) {
        sleep(LEG_PAUSES_MS[broken]).then(() => this.openLeg(request, broken + 1));
      }
    };
    leg.onclose = () => this.legs.delete(leg);
  }
}
