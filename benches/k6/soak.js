// Soak: for a long time, streams of any length and messages of any size come and go.
import { deviceScenario, runDevices } from './lib/device.js';
import { begin, steady } from './lib/figures.js';
import { keepScenario, runServices, Service } from './lib/service.js';
import { common, load } from './lib/settings.js';

const { devices: count, rate, streams, duration, settle, pause, bytes, grace, handshakeLimit, echoLimit } = load({
  streams: 100,
  duration: '10m',
  pause: '1s',
  bytes: 16384,
});
const seconds = streams / rate + duration;
const lifetime = settle + seconds + 5;
const LONGEST_LIFE = 60;

export const options = Object.assign({}, common, {
  scenarios: { devices: deviceScenario(count, lifetime), services: keepScenario(streams, seconds, settle) },
  thresholds: Object.assign({}, steady, {
    midspan_held_streams: [`count==${streams}`],
    midspan_handshake: [`p(95)<${handshakeLimit}`],
    midspan_echo: [`p(95)<${echoLimit}`],
  }),
});

export const setup = begin;

export async function devices() {
  await runDevices(count, lifetime, settle);
}

export async function services() {
  const service = new Service(lifetime, count, grace);
  const life = () => LONGEST_LIFE * Math.random();
  await runServices(service, { streams, rate, seconds, pause, life, bytes: () => Math.ceil(bytes * Math.random()) });
}
