"""The network of a cluster: a namespace with one bridge, on which nodes and pods have their addresses."""

from pathlib import Path

from commands import run

# Nothing of this is reachable from outside of the namespace, so every cluster has the same addresses.
PREFIX = "10.244"
POD_RANGE = f"{PREFIX}.0.0/16"
SERVICE_RANGE = "10.96.0.0/16"
GATEWAY = f"{PREFIX}.0.1"
API_SERVICE = "10.96.0.1"
DNS_SERVICE = "10.96.0.10"
BRIDGE = "cni0"


def node_address(index):
    """The address of a node; its pods have those of the same third number plus one."""
    return f"{PREFIX}.{100 + index}.1"


def within(name):
    """The words before a program that is to run in the cluster's network."""
    return ["nsenter", f"--net=/run/netns/{name}"]


def make(name, nodes):
    run("ip", "netns", "add", name)
    inside = within(name)
    run(*inside, "ip", "link", "set", "lo", "up")
    run(*inside, "ip", "link", "add", BRIDGE, "type", "bridge")
    run(*inside, "ip", "link", "set", BRIDGE, "up")
    run(*inside, "ip", "address", "add", f"{GATEWAY}/16", "dev", BRIDGE)
    for index in range(nodes):
        run(*inside, "ip", "address", "add", f"{node_address(index)}/16", "dev", BRIDGE)
    # Addresses of Services have a route only through this one, before they are translated.
    run(*inside, "ip", "route", "add", "default", "via", GATEWAY)
    run(*inside, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1", "net.bridge.bridge-nf-call-iptables=1")


def remove(name):
    if Path(f"/run/netns/{name}").exists():
        run("ip", "netns", "delete", name)


def cni(index):
    """The list of CNI plugins for the pods of a node."""
    return {
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": False,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{
                        "subnet": POD_RANGE,
                        "rangeStart": f"{PREFIX}.{1 + index}.1",
                        "rangeEnd": f"{PREFIX}.{1 + index}.254",
                        "gateway": GATEWAY,
                    }]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }
        ],
    }  # fmt: skip
