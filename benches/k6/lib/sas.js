// Shared access signatures, as docs/protocol.md has them.
import crypto from 'k6/crypto';
import encoding from 'k6/encoding';

import { credential, groupKey, host, known, prefix } from './settings.js';

function sign(resource, key, policy, lifetime) {
  const what = encodeURIComponent(resource);
  const expiry = Math.floor(Date.now() / 1000) + Math.ceil(lifetime);
  const signature = crypto.hmac('sha256', encoding.b64decode(key), `${what}\n${expiry}`, 'base64');
  const name = policy ? `&skn=${encodeURIComponent(policy)}` : '';
  return `SharedAccessSignature sr=${what}&sig=${encodeURIComponent(signature)}&se=${expiry}${name}`;
}

// The id of a device, by its number.
export function deviceId(number) {
  return known.length ? known[number].id : `${prefix}${number}`;
}

export function signAsDevice(number, lifetime) {
  const id = deviceId(number);
  const key = known.length ? known[number].key : crypto.hmac('sha256', encoding.b64decode(groupKey), id, 'base64');
  return sign(`${host}/devices/${id}`, key, undefined, lifetime);
}

export function signAsService(lifetime) {
  return sign(host, credential.key, credential.policy, lifetime);
}
