"""Keys are made once, and read back ever after."""

import base64
import json
import subprocess
import tempfile
import unittest

from api_server import ApiServer
from chart import HELMS, RENDERED_ONLY, Refused, of_kind, render

KEYS = {"ticket.key", "credentials.json", "ca.crt", "ca.key", "internal-ca.crt", "internal-ca.key", "redis.password"}


class Keys(unittest.TestCase):
    def setUp(self):
        self.api = ApiServer()
        self.addCleanup(self.api.close)
        self.kubeconfig = tempfile.NamedTemporaryFile("w", suffix=".yaml")
        self.addCleanup(self.kubeconfig.close)
        self.kubeconfig.write(self.api.kubeconfig())
        self.kubeconfig.flush()

    def secrets(self, name="helm4", **values):
        """The Secrets of an installation or upgrade on the stand-in."""
        extra = ("--dry-run=server", "--disable-openapi-validation", "--kubeconfig", self.kubeconfig.name)
        return of_kind(render(values=values, name=name, extra=extra), "Secret")

    def install(self, **values):
        secrets = self.secrets(**values)
        self.api.secrets["m-keys"] = secrets["m-keys"]["data"]
        return secrets

    def test_an_installation_makes_all_of_them(self):
        for name in HELMS:
            with self.subTest(helm=name):
                keys = self.secrets(name)["m-keys"]
                self.assertEqual(set(keys["data"]), KEYS)
                self.assertGreaterEqual(len(base64.b64decode(text(keys, "ticket.key"))), 32)
                # Neither an upgrade nor `helm uninstall` may take it away.
                annotations = keys["metadata"]["annotations"]
                self.assertEqual(annotations["helm.sh/resource-policy"], "keep")
                self.assertEqual(annotations["helm.sh/hook"], "pre-install,pre-upgrade")

    def test_two_installations_have_different_ones(self):
        one, other = self.secrets()["m-keys"]["data"], self.secrets()["m-keys"]["data"]
        self.assertEqual([key for key in KEYS if one[key] == other[key]], [])

    def test_an_upgrade_leaves_them_alone(self):
        first = self.install()
        for name in HELMS:
            with self.subTest(helm=name):
                second = self.secrets(name)
                self.assertNotIn("m-keys", set(second))
                for secret in ("m-connections", "m-redis"):
                    self.assertEqual(first[secret]["data"], second[secret]["data"])
                for secret in ("m-tls", "m-internal-control", "m-internal-edge"):
                    self.assertEqual(first[secret]["data"]["ca.crt"], second[secret]["data"]["ca.crt"])

    def test_another_host_changes_connection_strings_and_no_key(self):
        first = self.install()
        second = self.secrets(publicHost="relay.example", edgeUrl="https://{owner}.streams.example")
        self.assertNotIn("m-keys", set(second))
        for secret in ("operator", "device", "service"):
            old, new = (text(it["m-connections"], f"{secret}.connection") for it in (first, second))
            self.assertEqual(old.replace("HostName=m-control.relay.svc", "HostName=relay.example"), new)
        names = certificate_names(text(second["m-tls"], "tls.crt"))
        for name in ("relay.example", "*.streams.example", "m-control.relay.svc", "m-edge.relay.svc"):
            self.assertIn(f"DNS:{name}", names)

    def test_certificates_are_good_for_their_role(self):
        secrets = self.install()
        for role in ("control", "edge"):
            self.assertEqual(certificate_names(text(secrets[f"m-internal-{role}"], "tls.crt")), [f"DNS:{role}.midspan.internal"])
            verify(text(secrets["m-keys"], "internal-ca.crt"), text(secrets[f"m-internal-{role}"], "tls.crt"))
        verify(text(secrets["m-keys"], "ca.crt"), text(secrets["m-tls"], "tls.crt"))
        with self.assertRaises(subprocess.CalledProcessError):
            verify(text(secrets["m-keys"], "ca.crt"), text(secrets["m-internal-edge"], "tls.crt"))

    def test_what_was_added_to_them_stays(self):
        self.install()
        credentials = json.loads(base64.b64decode(self.api.secrets["m-keys"]["credentials.json"]))
        credentials["services"]["support"] = {"keys": ["a" * 24], "allow": ["open"], "every_device": True}
        del credentials["services"]["helm-test"], credentials["devices"][0]
        self.api.secrets["m-keys"]["credentials.json"] = base64.b64encode(json.dumps(credentials).encode()).decode()
        second = self.secrets()
        self.assertNotIn("m-keys", set(second))
        self.assertEqual(set(second["m-connections"]["data"]), {"operator.connection"})

    def test_a_key_that_is_wanted_later_joins_the_others(self):
        self.install(tls={"existingSecret": "own"}, redis={"enabled": False, "url": "redis://redis"})
        self.assertNotIn("ca.key", set(self.api.secrets["m-keys"]))
        second = self.secrets()["m-keys"]["data"]
        self.assertEqual(set(second), KEYS)
        for key, value in self.api.secrets["m-keys"].items():
            self.assertEqual(second[key], value)

    def test_without_a_cluster_it_asks_for_secrets(self):
        for name in HELMS:
            with self.subTest(helm=name), self.assertRaises(Refused) as refused:
                render(name=name)
            for value in ("ticketKey", "credentials", "tls", "internalTls.control", "redis"):
                self.assertIn(f"{value}.existingSecret", str(refused.exception))

    def test_without_a_cluster_and_with_secrets_it_makes_none(self):
        for name in HELMS:
            self.assertEqual(set(of_kind(render(RENDERED_ONLY, name=name), "Secret")), set())

    def test_it_asks_for_no_more_than_is_missing(self):
        with self.assertRaises(Refused) as refused:
            render(RENDERED_ONLY, values={"ticketKey": {"existingSecret": ""}})
        self.assertIn("ticketKey.existingSecret", str(refused.exception))
        self.assertNotIn("credentials.existingSecret", str(refused.exception))


def text(secret, key):
    return base64.b64decode(secret["data"][key]).decode()


def openssl(*arguments, given):
    return subprocess.run(["openssl", *arguments], input=given, capture_output=True, text=True, check=True, timeout=60).stdout


def certificate_names(certificate):
    names = openssl("x509", "-noout", "-ext", "subjectAltName", given=certificate).splitlines()[1]
    return [name.strip() for name in names.split(",")]


def verify(ca, certificate):
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(ca)
        file.flush()
        for purpose in ("sslserver", "sslclient"):
            openssl("verify", "-purpose", purpose, "-CAfile", file.name, given=certificate)


if __name__ == "__main__":
    unittest.main()
