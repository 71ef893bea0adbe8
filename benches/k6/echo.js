// Echo latency: few streams, each with one message after the other.
import { deviceScenario, runDevices } from './lib/device.js';
import { begin, steady } from './lib/figures.js';
import { keepScenario, runServices, Service } from './lib/service.js';
import { common, load } from './lib/settings.js';

const { devices: count, rate, streams, duration, settle, bytes, grace, echoLimit } = load({ devices: 4, streams: 4 });
const seconds = streams / rate + duration;
const lifetime = settle + seconds + 5;

export const options = Object.assign({}, common, {
  scenarios: { devices: deviceScenario(count, lifetime), services: keepScenario(streams, seconds, settle) },
  thresholds: Object.assign({}, steady, {
    midspan_held_streams: [`count==${streams}`],
    midspan_echo: [`p(95)<${echoLimit}`],
  }),
});

export const setup = begin;

export async function devices() {
  await runDevices(count, lifetime, settle);
}

export async function services() {
  const service = new Service(lifetime, count, grace);
  await runServices(service, { streams, rate, seconds, pause: 0, life: () => Infinity, bytes: () => bytes });
}
