// Settings by environment. Keys come in files, never on a command line. docs/load-testing.md lists them.
import { SharedArray } from 'k6/data';

// Text of a file whose path a variable holds. Only where a script starts: k6 opens no files later.
function contents(name) {
  return __ENV[name] ? open(__ENV[name]).trim() : undefined;
}

function number(name, fallback) {
  const value = Number(__ENV[name] || fallback);
  if (!(value > 0)) {
    throw new Error(`${name} must be a positive number, not ${__ENV[name]}`);
  }
  return value;
}

// Seconds, written like 30, 30s, 5m or 1h.
function seconds(name, fallback) {
  const [, value, unit] = /^([0-9.]+)(s|m|h)?$/.exec(__ENV[name] || fallback) || [];
  if (!(value > 0)) {
    throw new Error(`${name} must be a time such as 30s or 5m, not ${__ENV[name]}`);
  }
  return Number(value) * { s: 1, m: 60, h: 3600 }[unit || 's'];
}

// Name and value pairs of a connection string.
function parse(connection) {
  const pairs = connection.split(';').map((part) => [part.slice(0, part.indexOf('=')), part.slice(part.indexOf('=') + 1)]);
  return Object.fromEntries(pairs);
}

function service() {
  const text = contents('LOAD_SERVICE_FILE');
  if (!text) {
    throw new Error('LOAD_SERVICE_FILE must name a file with the connection string of a service');
  }
  const { HostName, SharedAccessKeyName, SharedAccessKey } = parse(text);
  return { host: HostName, policy: SharedAccessKeyName, key: SharedAccessKey };
}

// Devices of their own connection strings, one a line, or any number whose keys are derived.
function knownDevices() {
  const known = new SharedArray('devices', () => {
    const lines = (contents('LOAD_DEVICES_FILE') || '').split('\n').filter((line) => line);
    return lines.map((line) => ({ id: parse(line).DeviceId, key: parse(line).SharedAccessKey }));
  });
  if (known.length === 0 && !__ENV.LOAD_GROUP_KEY_FILE) {
    throw new Error('LOAD_GROUP_KEY_FILE or LOAD_DEVICES_FILE must name a file with keys of devices');
  }
  return known;
}

export const credential = service();
export const groupKey = contents('LOAD_GROUP_KEY_FILE');
export const known = knownDevices();
// What is found there while the load is wanted.
export const going = __ENV.LOAD_WHILE;
// What the ids of derived devices begin with: another one for each k6 that runs at the same time.
export const prefix = __ENV.LOAD_DEVICE_PREFIX || 'load-';
// Without a port, as signatures have it.
export const host = credential.host.replace(/:\d+$/, '');
export const base = (__ENV.LOAD_URL || `https://${credential.host}`).replace(/\/$/, '');

// What the deployment is asked to do. `defaults` are those of one scenario.
export function load(defaults) {
  return {
    devices: known.length || number('LOAD_DEVICES', defaults.devices || 20),
    rate: number('LOAD_RATE', defaults.rate || 50),
    streams: number('LOAD_STREAMS', defaults.streams || 500),
    duration: seconds('LOAD_DURATION', defaults.duration || '30s'),
    pause: seconds('LOAD_PAUSE', defaults.pause || '5s'),
    bytes: number('LOAD_BYTES', defaults.bytes || 1024),
    // The shortest time that an edge which goes away leaves its streams (`--drain-grace`).
    grace: seconds('LOAD_GRACE', '30s'),
    handshakeLimit: number('LOAD_HANDSHAKE_MS', 2000),
    echoLimit: number('LOAD_ECHO_MS', 500),
    // How long devices have to link before the first stream is asked for.
    settle: seconds('LOAD_SETTLE', '3s'),
  };
}

// Where the names of the deployment lead, when DNS does not say so: `relay.example=10.0.0.1`, `relay.example:443=10.0.0.1:8443`.
function hosts() {
  return Object.fromEntries((__ENV.LOAD_HOSTS || '').split(',').filter((pair) => pair).map((pair) => pair.split('=')));
}

// Options of every scenario. k6 keeps figures for each set of tags, so only those with few values stay.
export const common = {
  hosts: hosts(),
  systemTags: ['name', 'scenario', 'status'],
  summaryTrendStats: ['avg', 'med', 'p(95)', 'p(99)', 'max'],
};
