use std::{fs, path::Path};

use bytes::Bytes;
use midspan_core::{
    id::Incarnation,
    problem::{Problem, ProblemKind},
    ticket::Owner,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::*;
use crate::{
    http::handler,
    listener::{Listener, ListenerMetrics, ListenerSettings},
    metrics::Metrics,
};

const SECOND: Duration = Duration::from_secs(1);

/// An internal CA, and files of those that it has vouched for.
struct Authority {
    folder: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        fs::write(folder.path().join("ca.pem"), certificate.pem()).unwrap();
        Self { folder, issuer: Issuer::new(parameters, key) }
    }

    fn settings(&self, name: &str) -> InternalSettings {
        let key = KeyPair::generate().unwrap();
        let parameters = CertificateParams::new([name.to_owned()]).unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        let file = |end: &str| self.folder.path().join(format!("{name}.{end}"));
        fs::write(file("pem"), certificate.pem()).unwrap();
        fs::write(file("key"), key.serialize_pem()).unwrap();
        InternalSettings {
            internal_listen: Some(([127, 0, 0, 1], 0).into()),
            internal_address: None,
            internal_ca: Some(self.folder.path().join("ca.pem")),
            internal_certificate: Some(file("pem")),
            internal_key: Some(file("key")),
        }
    }

    fn control(&self) -> InternalSettings {
        self.settings("control.midspan.internal")
    }

    fn edge(&self) -> InternalSettings {
        self.settings("edge.midspan.internal")
    }
}

/// A process that answers calls: `/echo` with the question, `/never` not at all, others with a refusal.
struct Process {
    lifecycle: Lifecycle,
    calls: Internal,
    owner: Owner,
}

impl Process {
    async fn start(role: ServerRole, settings: &InternalSettings) -> Self {
        let lifecycle = Lifecycle::new();
        let (calls, tls) = settings.start(role, SECOND / 100, &lifecycle).await.unwrap().unwrap();
        let listener = Listener::bind("internal", ([127, 0, 0, 1], 0).into()).unwrap().trusted();
        let listener = if role == ServerRole::Control { listener.http2() } else { listener };
        let incarnation = Incarnation::from_random(7);
        let owner = Owner { name: "one".to_owned(), incarnation, address: listener.address().to_string() };
        let answers = handler(move |request| {
            answer_call(request, incarnation, |path, question| Box::pin(answer(path, question)))
        });
        let limits =
            ListenerSettings { max_connections: 10, max_unauthenticated: 10, header_limit: 5 * SECOND };
        listener.serve(
            Some(tls),
            &limits.room(),
            &ListenerMetrics::new(&Metrics::new()),
            &lifecycle,
            answers,
        );
        Self { lifecycle, calls, owner }
    }

    async fn stop(self) {
        self.lifecycle.stopped().cancel();
        self.lifecycle.finished().await;
    }
}

async fn answer(path: String, question: Bytes) -> Result<Vec<u8>, Problem> {
    match path.as_str() {
        "/echo" => Ok(question.to_vec()),
        "/never" => std::future::pending().await,
        _ => Err(Problem::new(ProblemKind::Unavailable, "not now")),
    }
}

#[tokio::test]
async fn processes_call_each_other() {
    let ca = Authority::new();
    let one = Process::start(ServerRole::Control, &ca.control()).await;
    let edge = Process::start(ServerRole::Edge, &ca.edge()).await;
    for (role, to) in [(ServerRole::Control, &one.owner), (ServerRole::Edge, &edge.owner)] {
        for n in 0..3 {
            let question = format!("{n}").into_bytes();
            let answer = one.calls.call(role, to, "/echo", question.clone(), SECOND * 5).await.unwrap();
            assert_eq!(answer, question);
        }
        let refused = one.calls.call(role, to, "/other", Vec::new(), SECOND * 5).await.unwrap_err();
        assert!(
            matches!(&refused, CallError::Refused(problem) if problem.detail == "not now"),
            "{refused:?}"
        );
        let late = one.calls.call(role, to, "/never", Vec::new(), SECOND / 20).await;
        assert_eq!(late, Err(CallError::TimedOut));
        let before = Owner { incarnation: Incarnation::from_random(6), ..to.clone() };
        assert_eq!(
            one.calls.call(role, &before, "/echo", Vec::new(), SECOND * 5).await,
            Err(CallError::Gone)
        );
    }
    one.stop().await;
    edge.stop().await;
}

#[tokio::test]
async fn a_process_that_ends_is_noticed_by_those_who_wait_for_it() {
    let ca = Authority::new();
    let (one, other) = (
        Process::start(ServerRole::Control, &ca.control()).await,
        Process::start(ServerRole::Control, &ca.control()).await,
    );
    let owner = other.owner.clone();
    let waiting = one.calls.call(ServerRole::Control, &owner, "/never", Vec::new(), SECOND * 60);
    let stopped = async {
        while other.lifecycle.task_count() < 3 {
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(SECOND / 20).await;
        other.stop().await;
    };
    let (answer, ()) = tokio::join!(waiting, stopped);
    assert!(matches!(answer, Err(CallError::Unreachable(_))), "{answer:?}");
    // Nobody listens there any more.
    let again = one.calls.call(ServerRole::Control, &owner, "/echo", Vec::new(), SECOND * 5).await;
    assert_eq!(again, Err(CallError::Gone));
    one.stop().await;
}

#[tokio::test]
async fn strangers_and_the_wrong_roles_are_refused() {
    let (ca, other_ca) = (Authority::new(), Authority::new());
    let control = Process::start(ServerRole::Control, &ca.control()).await;
    let edge = Process::start(ServerRole::Edge, &ca.edge()).await;
    let stranger = Process::start(ServerRole::Control, &other_ca.control()).await;
    let call = async |from: &Process, role, to: &Process| {
        from.calls.call(role, &to.owner, "/echo", b"1".to_vec(), SECOND * 5).await
    };
    let refused = |answer: Result<Bytes, CallError>| matches!(answer, Err(CallError::Unreachable(_)));
    assert!(call(&edge, ServerRole::Edge, &edge).await.is_ok());
    assert!(refused(call(&edge, ServerRole::Control, &control).await), "an edge calls no control replica");
    assert!(refused(call(&stranger, ServerRole::Control, &control).await));
    assert!(refused(call(&stranger, ServerRole::Edge, &edge).await));
    // Who is called proves its role as well.
    assert!(refused(call(&control, ServerRole::Control, &edge).await));
    for process in [control, edge, stranger] {
        process.stop().await;
    }
}

#[tokio::test]
async fn certificates_are_read_again() {
    let (old, new) = (Authority::new(), Authority::new());
    let (settings, renewed) = (old.control(), new.control());
    let one = Process::start(ServerRole::Control, &settings).await;
    let call = async |to: &Process| {
        one.calls.call(ServerRole::Control, &to.owner, "/echo", b"1".to_vec(), SECOND * 5).await
    };
    let other = Process::start(ServerRole::Control, &renewed).await;
    assert!(call(&other).await.is_err());
    let replace = |from: &Option<PathBuf>, to: &Option<PathBuf>| {
        fs::copy(from.as_deref().unwrap(), to.as_deref().unwrap()).unwrap();
    };
    replace(&renewed.internal_ca, &settings.internal_ca);
    replace(&renewed.internal_certificate, &settings.internal_certificate);
    replace(&renewed.internal_key, &settings.internal_key);
    let mut tries = 0;
    while call(&other).await.is_err() {
        tries += 1;
        assert!(tries < 500, "the new certificate is not taken");
        tokio::time::sleep(SECOND / 100).await;
    }
    one.stop().await;
    other.stop().await;
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named() {
    let ca = Authority::new();
    let lifecycle = Lifecycle::new();
    let start = async |settings: &InternalSettings, role| {
        let error = settings.start(role, SECOND, &lifecycle).await.map(drop).unwrap_err();
        format!("{error:#}")
    };
    let error = start(&ca.edge(), ServerRole::Control).await;
    assert!(error.contains("edge.midspan.internal.pem is not for control.midspan.internal"), "{error}");
    let mut settings = ca.control();
    settings.internal_ca = Some(Path::new("/nonexistent/ca.pem").to_owned());
    assert!(start(&settings, ServerRole::Control).await.contains("/nonexistent/ca.pem"));
    fs::write(ca.folder.path().join("ca.pem"), "").unwrap();
    assert!(start(&ca.control(), ServerRole::Control).await.contains("ca.pem holds no certificate"));
    let alone = InternalSettings { internal_ca: None, ..ca.control() };
    assert!(alone.start(ServerRole::Control, SECOND, &lifecycle).await.unwrap().is_none());
}

#[test]
fn others_must_be_told_an_address_that_they_can_reach() {
    let any = ([0, 0, 0, 0], 8445).into();
    let own = ([127, 0, 0, 1], 8445).into();
    assert_eq!(with_address(None).address(own).unwrap(), "127.0.0.1:8445");
    assert_eq!(with_address(Some("edge-0.edges:8445")).address(any).unwrap(), "edge-0.edges:8445");
    let error = with_address(None).address(any).unwrap_err().to_string();
    assert!(error.contains("--internal-address"), "{error}");
    for wrong in ["edge-0", "edge-0:", ":8445", "edge-0:0", "edge-0:x"] {
        assert!(with_address(Some(wrong)).address(any).is_err(), "{wrong}");
    }
}

fn with_address(address: Option<&str>) -> InternalSettings {
    InternalSettings {
        internal_listen: None,
        internal_address: address.map(str::to_owned),
        internal_ca: None,
        internal_certificate: None,
        internal_key: None,
    }
}
