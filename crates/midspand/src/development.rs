//! The folder of a development relay: its CA, keys and connection strings.

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use midspan_core::{
    connection_string::{ConnectionString, Identity},
    id::DeviceAddress,
    key::Key,
};
use midspan_platform::clock;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use secrecy::{ExposeSecret as _, SecretString};
use time::{Duration, OffsetDateTime};

use crate::server::ServerSettings;

/// A development relay's folder, with everything in it that is needed to start.
#[derive(Debug)]
pub(crate) struct Development {
    folder: PathBuf,
    host: String,
    group_key: Key,
    service_key: Key,
    devices: Vec<DeviceAddress>,
    plaintext: bool,
}

const SERVICE: &str = "service";

/// Where a development relay keeps its files unless it is told otherwise.
pub(crate) fn default_folder() -> PathBuf {
    let home = |name, below: &str| std::env::var_os(name).map(|folder| PathBuf::from(folder).join(below));
    home("XDG_DATA_HOME", "midspan/dev")
        .or_else(|| home("HOME", ".local/share/midspan/dev"))
        .unwrap_or_else(|| PathBuf::from("midspan-dev"))
}

impl Development {
    /// Makes what is missing in `folder`. Keys and the CA are kept, so that devices keep their credentials.
    pub(crate) fn prepare(
        folder: PathBuf,
        hosts: &[String],
        address: SocketAddr,
        devices: &[DeviceAddress],
        plaintext: bool,
    ) -> anyhow::Result<Self> {
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))
            .with_context(|| format!("cannot protect the folder {}", folder.display()))?;
        write_once(&folder.join("ticket.key"), || Ok(random_key()?.to_base64()))?;
        write_once(&folder.join("deny.json"), || Ok("{\"devices\": [], \"services\": []}\n".into()))?;
        let group_key = kept_key(&folder.join("group.key"))?;
        let service_key = kept_key(&folder.join("service.key"))?;
        write_once(&folder.join("credentials.json"), || Ok(credentials(&group_key, &service_key)))?;
        make_certificate(&folder, hosts)?;
        Ok(Self {
            host: format!("{}:{}", hosts.first().map_or("localhost", String::as_str), address.port()),
            folder,
            group_key,
            service_key,
            devices: devices.to_vec(),
            plaintext,
        })
    }

    /// The host name under which a listener can be reached from this machine.
    pub(crate) fn host_of(address: SocketAddr) -> String {
        match address {
            address if address.ip().is_unspecified() => "localhost".to_owned(),
            SocketAddr::V4(address) => address.ip().to_string(),
            SocketAddr::V6(address) => format!("[{}]", address.ip()),
        }
    }

    /// The credentials file.
    pub(crate) fn credentials(&self) -> PathBuf {
        self.folder.join("credentials.json")
    }

    /// Names the folder's files where no flag names others.
    pub(crate) fn fill_in(&self, server: &mut ServerSettings) {
        let file = |name: &str| Some(self.folder.join(name));
        if server.tls_certificate.is_none() && !server.insecure_plaintext {
            server.tls_certificate = file("server.pem");
            server.tls_key = file("server.key");
        }
        server.activity_log = server.activity_log.take().or_else(|| file("activity.jsonl"));
        server.secrets.ticket_key_file = server.secrets.ticket_key_file.take().or_else(|| file("ticket.key"));
        server.secrets.deny_file = server.secrets.deny_file.take().or_else(|| file("deny.json"));
    }

    /// Writes one connection string for the service and one for each device.
    pub(crate) fn write_connection_strings(&self) -> anyhow::Result<()> {
        for address in &self.devices {
            let key = self.group_key.derive(address);
            let identity = Identity::Device(address.clone());
            let text = ConnectionString { host: self.host.clone(), identity, key }.to_text();
            write(&self.connection_file(address), &text)?;
        }
        let identity = Identity::Service(SERVICE.to_owned());
        let key = self.service_key.clone();
        let text = ConnectionString { host: self.host.clone(), identity, key }.to_text();
        write(&self.folder.join("service.connection"), &text)
    }

    /// Prints what to paste next. Keys are named by their files, never shown.
    #[expect(
        clippy::print_stdout,
        reason = "this is what a person who starts a development relay wants to read"
    )]
    pub(crate) fn say_what_next(&self, address: SocketAddr) {
        let Some(device) = self.devices.first() else { return };
        let (folder, file) = (self.folder.display(), self.connection_file(device));
        let trust =
            if self.plaintext { "--insecure-plaintext".to_owned() } else { format!("--ca {folder}/ca.pem") };
        println!("midspan development relay on {address}; its files are in {folder}\n");
        println!("1. be the device {device}, and let it reach its own sshd:\n");
        println!(
            "   midspan --connection-string-file {} {trust} device --allow ssh=127.0.0.1:22\n",
            file.display()
        );
        println!("2. be the service, and log in to the device:\n");
        println!(
            "   export MIDSPAN_CONNECTION_STRING_FILE={folder}/service.connection MIDSPAN_CA={folder}/ca.pem"
        );
        println!("   ssh -o ProxyCommand='midspan connect --stdio %h' {}\n", device.device);
    }

    fn connection_file(&self, address: &DeviceAddress) -> PathBuf {
        self.folder.join(format!("{}.connection", address.to_string().replace('/', "+")))
    }
}

/// Writes a secret to a file that only its owner can read, in one step.
fn write(file: &Path, text: &SecretString) -> anyhow::Result<()> {
    let context = || format!("cannot write {}", file.display());
    let fresh = file.with_extension(format!("new-{:x}", clock::random_u64()));
    let mut open =
        fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(&fresh).with_context(context)?;
    open.write_all(text.expose_secret().as_bytes()).with_context(context)?;
    fs::rename(&fresh, file).with_context(context)
}

fn write_once(file: &Path, text: impl FnOnce() -> anyhow::Result<SecretString>) -> anyhow::Result<()> {
    if file.exists() { Ok(()) } else { write(file, &text()?) }
}

fn kept_key(file: &Path) -> anyhow::Result<Key> {
    write_once(file, || Ok(random_key()?.to_base64()))?;
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    Key::from_base64(&text).with_context(|| file.display().to_string())
}

fn random_key() -> anyhow::Result<Key> {
    let bytes = [clock::random().to_be_bytes(), clock::random().to_be_bytes()].concat();
    Ok(Key::from_bytes(bytes)?)
}

fn credentials(group_key: &Key, service_key: &Key) -> SecretString {
    let json = serde_json::json!({
        "group_keys": [group_key.to_base64().expose_secret()],
        "services": {SERVICE: {
            "keys": [service_key.to_base64().expose_secret()],
            "allow": ["open", "list", "close"],
            "every_device": true,
        }},
    });
    format!("{json:#}\n").into()
}

/// Makes the CA once, and at every start a certificate for `hosts` that it signs.
fn make_certificate(folder: &Path, hosts: &[String]) -> anyhow::Result<()> {
    let (ca_file, ca_key_file) = (folder.join("ca.pem"), folder.join("ca.key"));
    if !ca_file.exists() || !ca_key_file.exists() {
        let key = KeyPair::generate()?;
        let certificate = ca_parameters().self_signed(&key)?;
        write(&ca_key_file, &key.serialize_pem().into())?;
        write(&ca_file, &certificate.pem().into())?;
    }
    let ca_key =
        fs::read_to_string(&ca_key_file).with_context(|| format!("cannot read {}", ca_key_file.display()))?;
    let ca_key = KeyPair::from_pem(&ca_key).with_context(|| ca_key_file.display().to_string())?;
    let issuer = Issuer::new(ca_parameters(), ca_key);

    let names = hosts.iter().map(|host| host.trim_matches(['[', ']']).to_owned()).collect::<Vec<_>>();
    let mut parameters = CertificateParams::new(names)?;
    parameters.distinguished_name.push(DnType::CommonName, "midspan development relay");
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    parameters.use_authority_key_identifier_extension = true;
    (parameters.not_before, parameters.not_after) = validity(90);
    let key = KeyPair::generate()?;
    let certificate = parameters.signed_by(&key, &issuer)?;
    write(&folder.join("server.key"), &key.serialize_pem().into())?;
    write(&folder.join("server.pem"), &certificate.pem().into())
}

fn ca_parameters() -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name.push(DnType::CommonName, "midspan development CA");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (parameters.not_before, parameters.not_after) = validity(3650);
    parameters
}

/// From yesterday, for clocks that are a little slow, until `days` from now.
fn validity(days: i64) -> (OffsetDateTime, OffsetDateTime) {
    let now =
        i64::try_from(clock::unix().0).ok().and_then(|now| OffsetDateTime::from_unix_timestamp(now).ok());
    let now = now.unwrap_or(OffsetDateTime::UNIX_EPOCH);
    (now - Duration::days(1), now + Duration::days(days))
}
