"""Keys and certificates of a cluster, made with openssl: one authority, and a client certificate for each role."""

import json
import secrets
from pathlib import Path

from commands import run

DAYS = "2"


class Authority:
    """The cluster's certificate authority, in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.certificate, self.key = folder / "ca.crt", folder / "ca.key"

    def make(self):
        """A new authority, and the pair of keys that signs the tokens of service accounts."""
        self.folder.mkdir()
        self._key(self.key)
        subject = ("-subj", "/CN=test-cluster")
        run("openssl", "req", "-x509", "-new", "-key", self.key, *subject, "-days", DAYS, "-out", self.certificate)
        self._key(self.folder / "tokens.key")
        run("openssl", "pkey", "-in", self.folder / "tokens.key", "-pubout", "-out", self.folder / "tokens.pub")

    def issue(self, name, subject, alternatives=""):
        """A certificate for servers and clients, `name`.crt and `name`.key."""
        key, request = self.folder / f"{name}.key", self.folder / f"{name}.csr"
        certificate, extensions = self.folder / f"{name}.crt", self.folder / f"{name}.ext"
        self._key(key)
        lines = "extendedKeyUsage=serverAuth,clientAuth\n"
        if alternatives:
            lines += f"subjectAltName={alternatives}\n"
        extensions.write_text(lines)
        run("openssl", "req", "-new", "-key", key, "-subj", subject, "-out", request)
        # Numbers of their own, so that they can be issued at the same time.
        run(
            "openssl", "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self.key, "-days", DAYS,
            "-set_serial", f"0x{secrets.token_hex(8)}", "-extfile", extensions, "-out", certificate,
        )  # fmt: skip
        return certificate, key

    def kubeconfig(self, name, subject, server):
        """A kubeconfig (JSON, which is YAML) for a new client certificate; gives its path."""
        certificate, key = self.issue(name, subject)
        path = self.folder / f"{name}.kubeconfig"
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "c", "cluster": {"server": server, "certificate-authority": str(self.certificate)}}],
                    "users": [{"name": "u", "user": {"client-certificate": str(certificate), "client-key": str(key)}}],
                    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                    "current-context": "x",
                }
            )
        )
        return path

    def _key(self, path):
        run("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", path)
        path.chmod(0o600)
