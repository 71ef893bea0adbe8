//! Certificates: made for development, given, replaced, and wrong.

use std::{fs, path::Path, sync::Arc};

use midspan_core::connection_string::ConnectionString;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use secrecy::ExposeSecret as _;
use testkit::{Midspan, Process, Relay, ServiceApi, Target, binary, trusting, until};
use time::{Duration, OffsetDateTime};

#[tokio::test]
async fn a_given_certificate_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    authority.issue(folder.path(), &["localhost"], Duration::days(1));
    let relay = Relay::with(&arguments(folder.path())).await;
    let target = Target { tls: trusting(&folder.path().join("ca.pem")), ..localhost(&relay) };
    target.try_connect().await.expect("the given certificate is not the one in use");
}

#[tokio::test]
async fn the_public_name_is_the_name_in_credentials() {
    let relay = Relay::with(&["--public-host", "relay.example"]).await;
    assert_eq!(relay.target().host(), "relay.example");
    let mut link = relay.device("dev1").await;
    relay.join(&mut link).await;
    let connection = relay.service_connection();
    let local = ConnectionString { host: "localhost".to_owned(), ..connection.clone() };
    let service = ServiceApi::new(relay.target().clone(), &local);
    service.get("/v1/endpoints").await.problem(401, "unauthorized");
}

#[tokio::test]
async fn tls_1_2_is_taken() {
    let relay = Relay::start().await;
    let mut roots = rustls::RootCertStore::empty();
    let pem = fs::read(relay.path("ca.pem")).unwrap();
    roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let target = Target { tls: Arc::new(config), ..relay.target().clone() };
    ServiceApi::new(target, relay.service_connection()).get("/v1/endpoints").await.expect(200);
}

#[tokio::test]
async fn a_new_certificate_is_taken_up_while_running() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    authority.issue(folder.path(), &["localhost"], Duration::days(1));
    let relay = Relay::with(&arguments(folder.path())).await;
    let target = Target { tls: trusting(&folder.path().join("ca.pem")), ..localhost(&relay) };
    let before = certificate(&target).await;
    // A broken one is not.
    fs::write(folder.path().join("server.pem"), "not a certificate").unwrap();
    until("the log names the file", || async { relay.log().contains("server.pem").then_some(()) }).await;
    assert!(certificate(&target).await == before, "a broken file replaced a good certificate");
    authority.issue(folder.path(), &["localhost"], Duration::days(1));
    until("new connections see the new certificate", || async {
        (certificate(&target).await != before).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_relay_without_a_usable_certificate_does_not_start_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    authority.issue(folder.path(), &["localhost"], Duration::days(1));
    fs::rename(path("server.key"), path("good.key")).unwrap();
    fs::rename(path("server.pem"), path("good.pem")).unwrap();
    authority.issue(folder.path(), &["localhost"], Duration::days(-1));
    fs::rename(path("server.key"), path("expired.key")).unwrap();
    fs::rename(path("server.pem"), path("expired.pem")).unwrap();
    fs::write(path("empty.pem"), "").unwrap();
    for (certificate, key, named, words) in [
        ("absent.pem", "good.key", "absent.pem", "No such file"),
        ("good.pem", "absent.key", "absent.key", "No such file"),
        ("empty.pem", "good.key", "empty.pem", "certificate"),
        ("good.pem", "empty.pem", "empty.pem", "key"),
        ("good.pem", "expired.key", "good.pem", "key"),
        ("expired.pem", "expired.key", "expired.pem", "expired"),
    ] {
        let data = tempfile::tempdir().unwrap();
        let mut command = binary("midspand");
        command.args(["dev", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--data-dir"]);
        command.arg(data.path()).args(["--tls-certificate", &path(certificate), "--tls-key", &path(key)]);
        let mut process = Process::spawn(command);
        let status = process.wait_exit().await;
        let message = process.stderr();
        assert!(!status.success(), "{certificate} with {key} was taken");
        assert!(
            message.contains(named),
            "{certificate} with {key}: the message does not name {named}: {message}"
        );
        assert!(message.contains(words), "{certificate} with {key}: {message}");
    }
}

#[tokio::test]
async fn a_public_host_that_the_certificate_does_not_cover_is_warned_of() {
    let folder = tempfile::tempdir().unwrap();
    Authority::new().issue(folder.path(), &["localhost", "relay.example"], Duration::days(1));
    let hosts = ["--public-host", "relay.example", "--public-host", "other.example"];
    let relay = Relay::with(&[&arguments(folder.path())[..], &hosts].concat()).await;
    let warned: Vec<_> = relay
        .log_records()
        .into_iter()
        .filter(|record| record["level"] == "WARN")
        .map(|record| record.to_string())
        .filter(|record| record.contains("does not cover"))
        .collect();
    let [warning] = warned.as_slice() else { panic!("{warned:?}") };
    assert!(warning.contains("other.example") && warning.contains("server.pem"), "{warning}");
}

#[tokio::test]
async fn the_client_says_what_is_wrong_with_a_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let trusted = folder.path().join("ca.pem");
    let authority = Authority::new();
    authority.issue(folder.path(), &["other.example"], Duration::days(1));
    let relay = Relay::with(&arguments(folder.path())).await;
    let wrong_name = devices(&relay, &trusted).await;
    assert!(wrong_name.contains("other.example"), "{wrong_name}");
    let unknown = devices(&relay, &relay.path("ca.pem")).await;
    assert!(unknown.contains("not trusted") && unknown.contains("--ca"), "{unknown}");

    // The relay does not start with a certificate that has expired; but one may expire on it.
    let host = relay.target().host().to_owned();
    drop(relay);
    authority.issue(folder.path(), &[&host, "localhost"], Duration::seconds(4));
    let relay = Relay::with(&arguments(folder.path())).await;
    let message = until("the certificate has expired", || async {
        let message = devices(&relay, &trusted).await;
        message.contains("expired").then_some(message)
    })
    .await;
    assert!(message.contains("renew it"), "{message}");
}

/// What a failing `midspan devices` says that trusts `ca`.
async fn devices(relay: &Relay, ca: &Path) -> String {
    let mut command = Midspan::command(relay, &["devices", "--ca", ca.to_str().unwrap()]);
    command.env("MIDSPAN_CONNECTION_STRING", relay.service_connection().to_text().expose_secret());
    let mut process = Process::spawn(command);
    let status = process.wait_exit().await;
    assert!([0, 3].contains(&status.code().unwrap()), "{status}: {}", process.stderr());
    process.stderr()
}

/// The arguments for the certificate in `folder`.
fn arguments(folder: &Path) -> [&'static str; 6] {
    let leak = |name: &str| -> &'static str { folder.join(name).to_str().unwrap().to_owned().leak() };
    ["--tls-certificate", leak("server.pem"), "--tls-key", leak("server.key"), "--reload-interval", "200ms"]
}

fn localhost(relay: &Relay) -> Target {
    Target { authority: format!("localhost:{}", relay.port()), ..relay.target().clone() }
}

async fn certificate(target: &Target) -> CertificateDer<'static> {
    let connection = target.connect().await;
    connection.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "a test's own CA");
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
        Self { issuer }
    }

    /// Writes `server.pem`, `server.key` and `ca.pem` to `folder`; the certificate is good for `life` from now.
    fn issue(&self, folder: &Path, names: &[&str], life: Duration) {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let mut parameters = CertificateParams::new(names).unwrap();
        let today = OffsetDateTime::now_utc();
        parameters.not_before = today - Duration::days(30);
        parameters.not_after = today + life;
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        fs::write(folder.join("server.key"), key.serialize_pem()).unwrap();
        fs::write(folder.join("server.pem"), certificate.pem()).unwrap();
        fs::write(folder.join("ca.pem"), self.issuer.as_ref().pem()).unwrap();
    }
}
