// Devices: each keeps its link, goes where it is told, accepts every stream, and sends back whatever comes.
import exec from 'k6/execution';
import { WebSocket } from 'k6/experimental/websockets';

import { counts } from './figures.js';
import { base } from './settings.js';
import { deviceId, signAsDevice } from './sas.js';

const OPEN = 1;

// The scenario in which `devices` are there for `seconds`. A few share the event loop of one virtual user.
export function deviceScenario(devices, seconds) {
  const vus = Math.min(devices, Math.max(4, Math.ceil(devices / 50)));
  return { exec: 'devices', executor: 'per-vu-iterations', vus, iterations: 1, maxDuration: `${Math.ceil(seconds) + 30}s` };
}

// A virtual user of that scenario. The links are opened in the first part of `settle` seconds.
export function runDevices(devices, seconds, settle) {
  const { vus } = exec.test.options.scenarios.devices;
  const until = exec.scenario.startTime + seconds * 1000;
  for (let number = exec.scenario.iterationInTest; number < devices; number += vus) {
    new Device(number, until).redial(0.7 * settle * Math.random());
  }
}

class Device {
  constructor(number, until) {
    this.number = number;
    this.until = until;
    this.dialed = 0;
    this.failures = 0;
    this.asked = new Set();
    this.timer = undefined;
    this.link = undefined;
    setTimeout(() => this.end(), until - Date.now());
  }

  dial() {
    const left = this.until - Date.now();
    if (left <= 0) {
      return;
    }
    const url = `${base.replace(/^http/, 'ws')}/v1/devices/${encodeURIComponent(deviceId(this.number))}/link`;
    // The credential outlives the test, so no link has to be renewed.
    const headers = { Authorization: signAsDevice(this.number, left / 1000 + 60) };
    const link = new WebSocket(url, 'midspan.link.v1', { headers, tags: { name: 'link' } });
    this.dialed += 1;
    link.number = this.dialed;
    link.onmessage = (event) => this.hear(link, JSON.parse(event.data));
    link.onerror = (event) => {
      link.failure = event.error;
    };
    link.onclose = () => this.closed(link);
  }

  hear(link, message) {
    if (message.type === 'welcome') {
      counts.links.add(1);
      this.failures = 0;
      this.link = link;
      if (Date.now() >= this.until) {
        this.end();
      }
    } else if (message.type === 'request') {
      link.send(JSON.stringify({ type: 'accept', request: message.request }));
      if (!this.asked.has(message.request)) {
        this.asked.add(message.request);
        openLeg(message, 3);
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
    if (link.told || Date.now() >= this.until) {
      return;
    }
    // It is one or the other: a link that was refused never heard a welcome.
    (this.link === link ? counts.lost : counts.refused).add(1);
    if (this.failures === 0) {
      console.warn(`link of ${deviceId(this.number)}: ${link.failure || 'closed without a goodbye'}`);
    }
    this.redial(Math.min(60, 2 ** this.failures) * Math.random());
    this.failures += 1;
  }

  redial(seconds) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.dial(), Math.min(seconds * 1000, Math.max(0, this.until - Date.now())));
  }

  end() {
    clearTimeout(this.timer);
    if (this.link && this.link.readyState === OPEN) {
      this.link.told = true;
      this.link.close(1000);
    }
  }
}

// A leg whose connection breaks before it stands may be tried again; a refusal is final.
function openLeg(request, tries) {
  const leg = new WebSocket(request.url, null, {
    headers: { Authorization: `Bearer ${request.ticket}` },
    tags: { name: 'device leg' },
  });
  leg.binaryType = 'arraybuffer';
  leg.onopen = () => {
    leg.stood = true;
  };
  leg.onmessage = (event) => {
    if (leg.readyState === OPEN) {
      leg.send(event.data);
    }
  };
  leg.onerror = (event) => {
    const refused = event.error === 'websocket: bad handshake';
    if (!leg.stood && !refused && tries > 1) {
      setTimeout(() => openLeg(request, tries - 1), 200);
    }
  };
}
