// Set-up rate: so many new streams a second, each for one message.
import { deviceScenario, runDevices } from './lib/device.js';
import { begin, steady } from './lib/figures.js';
import { Service } from './lib/service.js';
import { common, load } from './lib/settings.js';

const { devices: count, rate, duration, settle, handshakeLimit, grace } = load({});
const lifetime = settle + duration + 5;

export const options = Object.assign({}, common, {
  scenarios: {
    devices: deviceScenario(count, lifetime),
    services: {
      exec: 'services',
      executor: 'constant-arrival-rate',
      rate,
      duration: `${duration}s`,
      startTime: `${settle}s`,
      preAllocatedVUs: Math.ceil(2 * rate),
      maxVUs: Math.ceil(4 * rate),
    },
  },
  thresholds: Object.assign({}, steady, {
    dropped_iterations: ['count==0'],
    midspan_streams: [`count>=${Math.floor(0.99 * rate * duration)}`],
    midspan_handshake: [`p(95)<${handshakeLimit}`],
  }),
});

export const setup = begin;

export async function devices() {
  await runDevices(count, lifetime, settle);
}

let service;

export async function services() {
  service = service || new Service(lifetime, count, grace);
  const stream = await service.open();
  if (stream) {
    await stream.close();
  }
}
