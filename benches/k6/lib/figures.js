// What is measured, beside k6's own figures.
import { Counter, Trend } from 'k6/metrics';

const counter = (name) => new Counter(`midspan_${name}`);

// From the request for a stream until the device's first answer came back through it.
export const handshake = new Trend('midspan_handshake', true);
// From a message to its echo.
export const echo = new Trend('midspan_echo', true);

export const counts = {
  // Streams through which something came back.
  streams: counter('streams'),
  // Second tries, because the relay could not take the first one (503), its edge had gone, or the connection broke.
  retries: counter('retries'),
  // Streams that did not come about, the second try included.
  failed: counter('failed_initiations'),
  // First messages that were sent again, because nothing came back.
  repeats: counter('repeats'),
  // Streams that still stood at the end of the test.
  held: counter('held_streams'),
  // Streams that somebody else than their service ended; a relay that went away (1012) too soon among them.
  cut: counter('cut_streams'),
  // Streams that were ended with 1012 by a relay that went away, after its grace.
  drained: counter('drained_streams'),
  // Echoes that were not what was sent.
  wrong: counter('wrong_echoes'),
  // Device links: opened; told to move, and moved; refused; ended without a goodbye or by an error of ours.
  links: counter('device_links'),
  moved: counter('moved_links'),
  refused: counter('refused_links'),
  lost: counter('lost_links'),
  // Payload that came back.
  bytes: counter('echoed_bytes'),
};

// Every figure exists from the start: k6 passes any threshold on one that was never touched.
export function begin() {
  for (const name of Object.keys(counts)) {
    counts[name].add(0);
  }
}

// No stream fails, is cut too soon or is changed: true of every scenario.
export const sound = {
  midspan_failed_initiations: ['count==0'],
  midspan_cut_streams: ['count==0'],
  midspan_wrong_echoes: ['count==0'],
};

// The same for a deployment that is left alone meanwhile.
export const steady = Object.assign({}, sound, {
  midspan_drained_streams: ['count==0'],
  midspan_refused_links: ['count==0'],
  midspan_lost_links: ['count==0'],
});
