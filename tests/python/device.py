"""A Midspan device in plain Python, written from docs/protocol.md: it echoes every stream named `echo`.

usage: device.py CONNECTION_STRING_FILE CA_FILE
"""
import asyncio, base64, hashlib, hmac, json, random, ssl, sys, time
from datetime import datetime
from urllib.parse import quote

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

HALF_CLOSE = "half-close"


def read_connection(path):
    text = open(path).read().strip()
    return dict(part.split("=", 1) for part in text.split(";") if part)


def sign(resource, key, lifetime):
    expiry, resource = str(int(time.time()) + lifetime), quote(resource, safe="")
    digest = hmac.digest(base64.b64decode(key), f"{resource}\n{expiry}".encode(), hashlib.sha256)
    return f"SharedAccessSignature sr={resource}&sig={quote(base64.b64encode(digest), safe='')}&se={expiry}"


async def echo(request, tls):
    half_close = HALF_CLOSE in request.get("capabilities", [])
    bearer = {"Authorization": "Bearer " + request["ticket"]}
    try:
        async with connect(request["url"], ssl=tls, additional_headers=bearer, compression=None, max_size=None) as leg:
            async for message in leg:
                await leg.send(message)
                if half_close and message == b"":
                    break  # Both directions have ended: leaving the block closes with 1000.
        print("stream", request["stream"], "ended with", leg.close_code, leg.close_reason, flush=True)
    except (ConnectionClosed, InvalidStatus, OSError) as error:
        print("stream", request["stream"], "broke:", error, flush=True)


async def serve(link, tls, legs, seen):
    """Answers what the relay sends until the link ends, and says how long to stay away, if the relay said so."""
    async for message in link:
        message = json.loads(message)
        if message["type"] == "welcome":
            print("connected", flush=True)
            # A minute before the credential ends, or in the middle of its life if that is shorter.
            left = datetime.fromisoformat(message["expires"]) - datetime.fromisoformat(message["now"])
            left = left.total_seconds()
            asyncio.get_running_loop().call_later(max(left - 60, left / 2), asyncio.ensure_future, link.close())
        elif message["type"] == "request":
            answer = {"type": "accept", "request": message["request"], "capabilities": [HALF_CLOSE]}
            if message["name"] != "echo":
                answer = {"type": "reject", "request": message["request"], "reason": f"no such service here: {message['name']}"}
            elif message["request"] not in seen:
                legs.create_task(echo(message, tls))
            seen.add(message["request"])
            await link.send(json.dumps(answer))
        elif message["type"] == "goodbye":
            print("goodbye:", message["reason"], message["message"], flush=True)
            return message["come_back_seconds"] * random.uniform(1, 1.5)
    return None


async def main(connection_file, ca_file):
    connection, tls = read_connection(connection_file), ssl.create_default_context(cafile=ca_file)
    host, device = connection["HostName"], connection["DeviceId"]
    failures, seen = 0, set()
    async with asyncio.TaskGroup() as legs:
        while True:
            pause = None
            try:
                signature = sign(f"{host.rsplit(':', 1)[0]}/devices/{device}", connection["SharedAccessKey"], 3600)
                async with connect(f"wss://{host}/v1/devices/{quote(device, safe='')}/link", ssl=tls, compression=None,
                                   subprotocols=["midspan.link.v1"], additional_headers={"Authorization": signature}) as link:
                    failures = 0
                    pause = await serve(link, tls, legs, seen)
            except InvalidStatus as error:
                print("refused:", error.response.status_code, error.response.body.decode(), flush=True)
            except (ConnectionClosed, OSError) as error:
                print("link lost:", error, flush=True)
            failures += 1
            await asyncio.sleep(random.uniform(0, min(60, 2 ** (failures - 1))) if pause is None else pause)


asyncio.run(main(*sys.argv[1:]))
