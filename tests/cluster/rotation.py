"""Ticket and group keys are changed under load by the commands of docs/operations.md: nobody notices, and the old ones end."""

import base64
import hashlib
import hmac
import json
import os
import re
import time
from urllib.parse import quote

from commands import Failed, until
from load import Load, must_be_clean
from release import NAME, names
from tools import REPOSITORY

KEYS = f"{NAME}-keys"
# So that the steps follow each other within a test: the documented pause is for what nobody hurries.
QUICKLY = ["--set-json", 'control.extraArgs=["--reload-interval=1s"]', "--set-json", 'edge.extraArgs=["--reload-interval=1s"]']
LIGHT = {"LOAD_STREAMS": 20, "LOAD_RATE": 5}


def rotate(release, figures):
    """Three steps, as documented, in a release that was installed with `QUICKLY`."""
    commands = documented(release)
    old = json.loads(release.secret(KEYS)["credentials.json"])["group_keys"][0]
    new = base64.b64encode(os.urandom(32)).decode()
    began = time.monotonic()
    with Load(release, "rolling.js", "rotation-old", LOAD_DEVICE_PREFIX="old-", **LIGHT) as load:
        load.wait_for_streams()
        service = Service(release)
        ticket = service.ticket("old-0")
        step(release, commands[0], {"ticket.key": 1, "credentials.json": 1}, [old, new])
        step(release, commands[1], {"ticket.key": 2, "credentials.json": 1}, [old, new])
        service.must_say(ticket, "101", "a ticket of the key that no longer signs")
        must_be_clean(load, load.finish())
    with Load(release, "rolling.js", "rotation-new", group_key=new, LOAD_DEVICE_PREFIX="new-", **LIGHT) as load:
        load.wait_for_streams()
        service.must_say_of_device(old, "101")
        step(release, commands[2], {"ticket.key": 3, "credentials.json": 2}, [new])
        service.must_say(ticket, "ticket_invalid", "a ticket of the old key")
        service.must_say(service.ticket("new-0"), "101", "a ticket of the new key")
        service.must_say_of_device(old, "unauthorized")
        service.must_say_of_device(new, "101")
        must_be_clean(load, load.finish())
    figures.append(f"3 steps in {time.monotonic() - began:.1f} s")


def documented(release):
    """The commands of the documentation, each with what it needs before it, for this release's namespace."""
    text = (REPOSITORY / "docs/operations.md").read_text()
    lines = re.search(r"\*\*Rotation of keys\.\*\*.*?```sh\n(.*?)```", text, re.DOTALL)[1].splitlines()
    steps = [line for line in lines if re.search(r"# \d\.", line)]
    if len(steps) != 3:
        raise Failed(f"docs/operations.md has {len(steps)} steps of a rotation, and not three")
    return ["\n".join(["set -eu", *(line for line in lines if line not in steps), step]) for step in steps]


def step(release, command, times, group_keys):
    """One step, until every process has read its files anew, so many `times` in all."""
    config = release.cluster.folder / "rotation.kubeconfig"
    config.write_text(release.cluster.kubeconfig.read_text())
    kubectl = release.cluster.tools.program("kubectl")
    release.cluster.within(
        kubectl, "--kubeconfig", config, "config", "set-context", "--current", "--namespace", release.namespace
    )
    env = os.environ | {"KUBECONFIG": str(config), "PATH": f"{kubectl.parent}:{os.environ['PATH']}"}
    release.cluster.within("bash", "-c", command, env=env)
    credentials = json.loads(release.secret(KEYS)["credentials.json"]) | {"group_keys": group_keys}
    data = {"credentials.json": base64.b64encode(json.dumps(credentials).encode()).decode()}
    release.kubectl("patch", "secret", KEYS, "--patch", json.dumps({"data": data}))
    # Kubelets look at the files of a pod that has changed at once.
    release.kubectl("annotate", "pods", "--all", "--overwrite", f"rotated={times['ticket.key']}")
    for role, files in (("control", ("ticket.key", "credentials.json")), ("edge", ("ticket.key",))):
        for pod in names(release.pods(role)):
            for file in files:
                until(f"{pod} has read {file}", lambda pod=pod, file=file: read(release, pod, file) >= times[file], timeout=120)


def read(release, pod, file):
    """How often a process has read a file anew."""
    lines = release.kubectl("logs", pod).splitlines()
    return sum(1 for line in lines if '"file read again"' in line and file in line)


class Service:
    """What is seen from outside: tickets, and the relay's answers to them and to devices."""

    def __init__(self, release):
        self.release = release
        self.folder = release.cluster.folder / "load"
        said = release.secret(f"{NAME}-connections")["operator.connection"]
        pairs = dict(pair.split("=", 1) for pair in said.split(";"))
        self.host, self.policy, self.key = pairs["HostName"], pairs["SharedAccessKeyName"], pairs["SharedAccessKey"]

    def ticket(self, device):
        """Url and ticket of a new stream's leg."""
        url = f"https://{self.host}/v1/devices/{device}/streams"
        authorization = signed(self.host, self.key, self.policy)
        answer = self.ask(url, authorization, r'data = "{\"name\":\"rotation\"}"', 'header = "Content-Type: application/json"')
        said = json.loads(answer.partition("\n\n")[2])
        if "ticket" not in said:
            raise Failed(f"no stream to {device}: {answer}")
        return said["url"], said["ticket"]

    def must_say(self, ticket, expected, what):
        answer = self.upgrade(ticket[0], f"Bearer {ticket[1]}")
        if expected not in answer:
            raise Failed(f"{what}: not {expected} but {answer}")

    def must_say_of_device(self, group_key, expected):
        device = "probe"
        key = base64.b64encode(mac(group_key, device)).decode()
        resource = f"{self.host}/devices/{device}"
        answer = self.upgrade(f"wss://{self.host}/v1/devices/{device}/link", signed(resource, key))
        if expected not in answer:
            raise Failed(f"a device with a key of the group: not {expected} but {answer}")

    def upgrade(self, url, authorization):
        headers = {
            "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Protocol": "midspan.link.v1",
        }  # fmt: skip
        lines = [f'header = "{name}: {value}"' for name, value in headers.items()]
        return self.ask(url.replace("wss://", "https://"), authorization, *lines)

    def ask(self, url, authorization, *lines):
        """The answer with its headers; what is opened is closed after two seconds."""
        config = [
            f'url = "{url}"', f'header = "Authorization: {authorization}"', f'cacert = "{self.folder}/ca"', "http1.1", "include",
            "silent", "max-time = 2", *lines,
        ]  # fmt: skip
        for role in ("control", "edge"):
            name = f"{NAME}-{role}.{self.release.namespace}.svc"
            config.append(f'resolve = "{name}:443:{self.release.service_address(role)}"')
        return self.release.cluster.within("curl", "--config", "-", stdin="\n".join(config), check=False)


def mac(key, text):
    return hmac.digest(base64.b64decode(key), text.encode(), hashlib.sha256)


def signed(resource, key, policy=None):
    """A shared access signature, as docs/protocol.md has it."""
    what, expiry = quote(resource, safe=""), int(time.time()) + 600
    signature = quote(base64.b64encode(mac(key, f"{what}\n{expiry}")).decode(), safe="")
    return f"SharedAccessSignature sr={what}&sig={signature}&se={expiry}" + (f"&skn={policy}" if policy else "")
