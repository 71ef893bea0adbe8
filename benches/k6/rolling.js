// Rolling update: held streams and new ones, while somebody replaces the relay's processes. None may fail, and none may be cut before
// the grace of the process that carries it; one that is cut after it is opened anew.
import { deviceScenario, runDevices } from './lib/device.js';
import { begin, sound } from './lib/figures.js';
import { keepScenario, runServices, Service } from './lib/service.js';
import { common, going, load } from './lib/settings.js';

const { devices: count, rate, streams, duration, settle, pause, bytes, grace } = load({ duration: '2m', pause: '2s' });
const seconds = streams / rate + duration;
const lifetime = settle + seconds + 10;
// Of a short stream, in seconds. Always less than the grace, so nothing may end it but its service.
const LONGEST_LIFE = Math.min(2, grace / 2);

export const options = Object.assign({}, common, {
  scenarios: { devices: deviceScenario(count, lifetime), services: keepScenario(streams, seconds, settle) },
  thresholds: Object.assign({}, sound, {
    midspan_held_streams: [`count==${streams}`],
    // Who ends the load early knows how long it lasted.
    midspan_streams: [`count>=${streams + (going ? 0 : Math.floor(0.99 * rate * duration))}`],
  }),
});

export const setup = begin;

export async function devices() {
  await runDevices(count, lifetime, settle);
}

export async function services() {
  const service = new Service(lifetime, count, grace);
  const life = () => Infinity;
  await runServices(service, { streams, rate, seconds, pause, life, bytes: () => bytes, longest: LONGEST_LIFE });
}
