// Rolling update: new streams and held ones, while somebody replaces the relay's processes. None may fail, and none may be cut before
// the grace of the process that carries it; one that is cut after it is opened anew.
import { deviceScenario, runDevices } from './lib/device.js';
import { begin, sound } from './lib/figures.js';
import { keepScenario, runServices, Service } from './lib/service.js';
import { common, load } from './lib/settings.js';

const { devices: count, rate, streams, duration, settle, pause, bytes, grace } = load({ duration: '2m', pause: '2s' });
const seconds = streams / rate + duration;
const lifetime = settle + seconds + 10;
// Of a short stream, in seconds. Always less than the grace, so nothing may end it but its service.
const LONGEST_LIFE = Math.min(2, grace / 2);

export const options = Object.assign({}, common, {
  scenarios: {
    devices: deviceScenario(count, lifetime),
    services: keepScenario(streams, seconds, settle),
    short: {
      exec: 'short',
      executor: 'constant-arrival-rate',
      rate,
      duration: `${Math.floor(duration)}s`,
      startTime: `${settle + streams / rate}s`,
      preAllocatedVUs: Math.ceil(8 * rate),
      maxVUs: Math.ceil(16 * rate),
    },
  },
  thresholds: Object.assign({}, sound, {
    midspan_held_streams: [`count==${streams}`],
    midspan_streams: [`count>=${Math.floor(0.99 * rate * duration)}`],
  }),
});

export const setup = begin;

export function devices() {
  runDevices(count, lifetime, settle);
}

export async function services() {
  const service = new Service(lifetime, count, grace);
  await runServices(service, { streams, rate, seconds, pause, life: () => Infinity, bytes: () => bytes });
}

let service;

export async function short() {
  service = service || new Service(lifetime, count, grace);
  const stream = await service.open();
  if (stream) {
    await service.talk(stream, Date.now() + LONGEST_LIFE * 1000 * Math.random(), pause, bytes);
  }
}
