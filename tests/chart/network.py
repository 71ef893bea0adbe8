"""Which connections the NetworkPolicies of a set of manifests allow, computed as Kubernetes defines them."""

import dataclasses
import ipaddress

from chart import pods


@dataclasses.dataclass(frozen=True)
class End:
    """A pod of this cluster, or with an address alone something outside of it."""

    name: str
    namespace: str = ""
    labels: tuple = ()
    ports: tuple = ()
    address: str = "10.1.2.3"

    @property
    def is_pod(self):
        return bool(self.namespace)


def ends(documents, namespace="relay"):
    """The pods of the manifests."""
    found = []
    for labels, spec in pods(documents).values():
        ports = tuple((it["name"], it["containerPort"]) for container in spec["containers"] for it in container.get("ports", []))
        found.append(End(labels["app.kubernetes.io/component"], namespace, tuple(sorted(labels.items())), ports))
    return found


def allowed(documents, source, target, port, protocol="TCP", namespace="relay"):
    """Whether a connection may be made: the policies of both ends must allow it; an end that no policy selects allows everything."""
    return all(passes(documents, direction, source, target, port, protocol, namespace) for direction in ("Egress", "Ingress"))


def passes(documents, direction, source, target, port, protocol="TCP", namespace="relay"):
    """Whether the policies of one end allow it: of the source for egress, of the target for ingress."""
    policies = [it["spec"] for it in documents if it["kind"] == "NetworkPolicy"]
    own, other = (source, target) if direction == "Egress" else (target, source)
    of_own = [it for it in policies if own.namespace == namespace and direction in it["policyTypes"] and selects(it["podSelector"], own.labels)]
    if not of_own:
        return True
    rules, peers = {"Egress": ("egress", "to"), "Ingress": ("ingress", "from")}[direction]
    return any(
        (not rule.get(peers) or any(is_peer(peer, other, namespace) for peer in rule[peers]))
        and (not rule.get("ports") or any(is_port(it, target, port, protocol) for it in rule["ports"]))
        for policy in of_own
        for rule in policy.get(rules, [])
    )


def is_peer(peer, other, namespace):
    if "ipBlock" in peer:
        address = ipaddress.ip_address(other.address)
        outside = any(address in ipaddress.ip_network(it) for it in peer["ipBlock"].get("except", []))
        return address in ipaddress.ip_network(peer["ipBlock"]["cidr"]) and not outside
    if not other.is_pod:
        return False
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], (("kubernetes.io/metadata.name", other.namespace),)):
            return False
    elif other.namespace != namespace:
        return False
    return selects(peer.get("podSelector", {}), other.labels)


def is_port(rule, target, port, protocol):
    if rule.get("protocol", "TCP") != protocol:
        return False
    wanted = rule.get("port")
    return wanted in (None, port) or (wanted, port) in target.ports


def selects(selector, labels):
    if "matchExpressions" in selector:
        raise NotImplementedError("the chart uses no expressions")
    return set(selector.get("matchLabels", {}).items()) <= set(labels)
