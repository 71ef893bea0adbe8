"""A Midspan service in plain Python, written from docs/protocol.md: it checks a device that echoes.

usage: service.py CONNECTION_STRING_FILE CA_FILE DEVICE
"""
import asyncio, base64, hashlib, hmac, http.client, json, random, ssl, sys, time
from urllib.parse import quote

from websockets.asyncio.client import connect

HALF_CLOSE = "half-close"


def read_connection(path):
    text = open(path).read().strip()
    return dict(part.split("=", 1) for part in text.split(";") if part)


def sign(resource, key, policy, lifetime=300):
    expiry, resource = str(int(time.time()) + lifetime), quote(resource, safe="")
    digest = hmac.digest(base64.b64decode(key), f"{resource}\n{expiry}".encode(), hashlib.sha256)
    signature = quote(base64.b64encode(digest), safe="")
    return f"SharedAccessSignature sr={resource}&sig={signature}&se={expiry}&skn={quote(policy, safe='')}"


def ask(connection, tls, device, **request):
    """Asks for a stream; gives the status and the body of the answer."""
    host = connection["HostName"]
    signature = sign(host.rsplit(":", 1)[0], connection["SharedAccessKey"], connection["SharedAccessKeyName"])
    relay = http.client.HTTPSConnection(host, context=tls, timeout=60)
    headers = {"Authorization": signature, "Content-Type": "application/json"}
    relay.request("POST", f"/v1/devices/{quote(device, safe='')}/streams", json.dumps(request), headers)
    answer = relay.getresponse()
    return answer.status, json.loads(answer.read())


def open_leg(grant, tls):
    bearer = {"Authorization": "Bearer " + grant["ticket"]}
    return connect(grant["url"], ssl=tls, additional_headers=bearer, compression=None, max_size=None)


async def check_messages(grant, tls, count=1000):
    """Every message comes back complete, in order, and of its type; empty ones and text as well."""
    messages = [b"", "", b"x" * 65536, "text \u00fc \u20ac " * 700, b"y" * 65537]
    while len(messages) < count:
        size = random.choice([0, 1, 125, 126, 1000, 16384, 65535])
        messages.append(random.choice([random.randbytes(size), "t" * size]))
    random.shuffle(messages)
    async with open_leg(grant, tls) as leg:
        async def send():
            for message in messages:
                await leg.send(message)
        sending = asyncio.ensure_future(send())
        for number, message in enumerate(messages):
            echoed = await leg.recv()
            assert type(echoed) is type(message) and echoed == message, f"message {number} came back changed"
        await sending
    assert leg.close_code == 1000, f"closed with {leg.close_code} {leg.close_reason}"
    print(f"{count} messages, {sum(map(len, messages))} characters and bytes: all came back")


async def check_half_close(grant, tls):
    """What was sent before the end of our direction comes back after it, and then the end of the other direction."""
    assert HALF_CLOSE in grant["capabilities"], f"the device can only do {grant['capabilities']}"
    data = random.randbytes(300_000)
    async with open_leg(grant, tls) as leg:
        async def send():
            for at in range(0, len(data), 50_000):
                await leg.send(data[at:at + 50_000])
            await leg.send(b"")
        sending, echoed = asyncio.ensure_future(send()), b""
        while piece := await leg.recv():
            echoed += piece
        await sending
    assert echoed == data, f"{len(echoed)} of {len(data)} bytes came back"
    assert leg.close_code == 1000, f"closed with {leg.close_code} {leg.close_reason}"
    print("half-close: all that was sent before came back after it")


async def main(connection_file, ca_file, device):
    connection, tls = read_connection(connection_file), ssl.create_default_context(cafile=ca_file)
    status, problem = ask(connection, tls, device, name="nonsense")
    assert (status, problem["type"]) == (409, "urn:midspan:problem:device_rejected"), problem
    print("rejected as it should be:", problem["device_reason"])
    for request, check in [({}, check_messages), ({"capabilities": [HALF_CLOSE]}, check_half_close)]:
        status, grant = ask(connection, tls, device, name="echo", connect_timeout_seconds=20, **request)
        assert status == 201, grant
        await asyncio.wait_for(check(grant, tls), 60)


asyncio.run(main(*sys.argv[1:]))
