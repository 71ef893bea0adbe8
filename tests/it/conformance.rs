//! Conformance of frames (RFC 6455): the ground of Autobahn's groups 1 to 7 and 10, a little of group 9, and the forms of
//! lengths and masks.
//!
//! Every case is played twice: against an echo server on a connection of its own, and through the relay against the same
//! echo at the device's leg. Both must come to the verdict that the standard asks for. Where the library of the echo has a
//! way of its own, the case says which, and why ([`Case::direct`]). The client shares no code with either.
//!
//! A verdict is what was seen, but for what the standard leaves open:
//!
//! * How messages are fragmented. The client puts them together again.
//! * The order of pongs among messages: pings are answered by the relay, messages by the device. Each keeps its own order.
//! * How much is answered to what was sent before a violation or a close frame. The end may overtake it on the longer way,
//!   so of answers for which the case did not wait, any number may be missing from the end.
//! * The texts of close frames that the server sends.

mod cases;
mod client;

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use cases::{Case, Finish};
use client::{End, Message, Seen};
use futures_util::{SinkExt as _, StreamExt as _, stream};
use secrecy::ExposeSecret as _;
use testkit::{DEADLINE, DeviceLink, Relay, within};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream, accept_async,
    tungstenite::{self, Error, error::ProtocolError, protocol::CloseFrame},
};

/// Cases that are played at the same time.
const AT_ONCE: usize = 8;

/// Cases without any end that are looked at. Each takes its time.
const HUNG: usize = 2;

/// A message this long is not the one that asks whether somebody is still there.
const LONG: usize = 100;

/// What a case came to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    messages: Vec<Message>,
    pongs: Vec<Vec<u8>>,
    end: End,
    heard: Heard,
}

/// How the conversation ended for the echo.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Heard {
    /// It heard a close frame, perhaps with code and text.
    Closed(Option<(u16, String)>),
    /// The client broke the protocol. It is for the relay to notice that, and to tell the echo.
    Violation,
    /// The same, but the relay did not notice.
    ViolationPassedOn,
    /// A text was not UTF-8.
    NotUtf8,
    /// A frame was too long.
    TooLong,
    /// The connection ended without a close frame.
    Lost,
}

/// What an echo does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    Nothing,
    /// Texts come back as binary messages.
    Type,
    /// The last octet of a long binary message is changed.
    Octet,
    /// Every message comes back twice.
    Twice,
    /// A violation is answered with the code of a normal end.
    Code,
    /// After a violation the connection ends without a close frame.
    Silence,
}

/// Whether a case meets a flaw.
type Meets<'a> = &'a dyn Fn(&Case) -> bool;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_relay_comes_to_the_same_verdicts_as_a_direct_echo() {
    let cases = Arc::new(cases::all());
    let names: HashSet<_> = cases.iter().map(|case| &case.name).collect();
    assert_eq!(names.len(), cases.len(), "two cases have the same name");
    assert!(cases.len() >= 250, "only {} cases are left", cases.len());

    // The cases come faster than a service usually asks.
    let relay = Arc::new(Relay::with(&["--limit-initiations-per-second", "10000"]).await);
    let next = Arc::new(AtomicUsize::new(0));
    let mut workers = JoinSet::new();
    for worker in 0..AT_ONCE {
        let (cases, relay, next) = (Arc::clone(&cases), Arc::clone(&relay), Arc::clone(&next));
        workers.spawn(async move {
            let device = format!("echo-{worker}");
            let mut link = relay.device(&device).await;
            let (mut complaints, mut hung) = (vec![], 0);
            while hung < HUNG
                && let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed))
            {
                let direct = play_directly(case, Flaw::Nothing).await;
                let relayed = Box::pin(play_through(&relay, &device, &mut link, case)).await;
                complaints.extend(judge(case, &direct, &relayed));
                hung += usize::from(direct.end == End::Hung || relayed.end == End::Hung);
            }
            link.close().await;
            complaints
        });
    }
    let mut complaints = workers.join_all().await.concat();
    complaints.sort();
    let (wrong, all) = (complaints.len(), cases.len());
    // Fewer are played when too many hang.
    let played = next.load(Ordering::Relaxed).min(all);
    assert!(
        complaints.is_empty(),
        "{wrong} wrong verdicts; {played} of {all} cases were played:\n{}",
        complaints.join("\n")
    );
    assert_eq!(played, all);
    relay.assert_quiet().await;
}

#[tokio::test]
async fn a_flaw_is_found_by_the_cases_that_meet_it_and_by_no_others() {
    let has = |case: &Case, meets: fn(&Message) -> bool| case.expected.messages.iter().any(meets);
    let cases = cases::all();
    // Where the probe meets the flaw, all that end well do.
    let probed = |case: &Case| case.finish == Finish::Probe && case.expected.end == End::Open;
    // To a close code that is not to be sent, the library answers by itself.
    let violated =
        |case: &Case| case.expected.heard == Heard::Violation && !case.name.starts_with("7 the close code");
    let flaws: [(Flaw, Meets<'_>); 6] = [
        (Flaw::Nothing, &|_| false),
        (Flaw::Type, &|case| has(case, |message| message.text)),
        (Flaw::Octet, &|case| has(case, |message| !message.text && message.payload.len() >= LONG)),
        (Flaw::Twice, &|case| probed(case) || has(case, |_| true)),
        (Flaw::Code, &violated),
        (Flaw::Silence, &violated),
    ];
    for (flaw, meets) in flaws {
        // A sample will do. Where the direct echo has its own way there is nothing to compare.
        let sample = cases.iter().filter(|case| case.direct.is_none()).step_by(5);
        let plays = sample.map(|case| async move { (case, play_directly(case, flaw).await) });
        let mut plays = stream::iter(plays).buffer_unordered(AT_ONCE);
        let mut met = 0;
        while let Some((case, verdict)) = plays.next().await {
            let complaint = judge(case, &case.expected.clone().cut(case), &verdict);
            assert_eq!(complaint.is_some(), meets(case), "{flaw:?}: {}: {verdict:?}", case.name);
            met += usize::from(meets(case));
        }
        assert!(flaw == Flaw::Nothing || met > 0, "no case meets {flaw:?}");
    }
}

/// What is wrong with the verdicts on a case.
fn judge(case: &Case, direct: &Verdict, relayed: &Verdict) -> Option<String> {
    let expected = &case.expected.clone().cut(case);
    let expected_directly = case.direct.as_ref().unwrap_or(expected);
    if direct == expected_directly && relayed == expected {
        return None;
    }
    let own = case.direct.as_ref().map(|verdict| format!("\n    directly  {verdict:?}")).unwrap_or_default();
    let both = format!("\n    direct    {direct:?}\n    relayed   {relayed:?}");
    Some(format!("{}\n    expected  {expected:?}{own}{both}", case.name))
}

impl Verdict {
    fn new(case: &Case, (seen, end): (Seen, End), heard: Heard) -> Self {
        let Seen { messages, pongs, .. } = seen;
        Self { messages, pongs, end, heard }.cut(case)
    }

    /// Leaves out what the end may have overtaken, as long as it is the right thing.
    fn cut(mut self, case: &Case) -> Self {
        if self.end != End::Open {
            let (messages, pongs) = case.awaited;
            if case.expected.messages.starts_with(&self.messages) {
                self.messages.truncate(messages);
            }
            if case.expected.pongs.starts_with(&self.pongs) {
                self.pongs.truncate(pongs);
            }
        }
        self
    }
}

/// Plays a case against an echo on a connection of its own.
async fn play_directly(case: &Case, flaw: Flaw) -> Verdict {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let echo = async {
        let (tcp, _) = listener.accept().await.unwrap();
        tcp.set_nodelay(true).unwrap();
        echo(accept_async(tcp).await.unwrap(), flaw).await
    };
    let client = async {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        within("the upgrade", client::upgrade(&mut tcp, "/", &address.to_string(), "")).await;
        client::play(tcp, case).await
    };
    let (seen, heard) = tokio::join!(client, echo);
    Verdict::new(case, seen, heard)
}

/// Plays a case at the service's leg of a stream whose device is the echo. Half-close is not asked for.
async fn play_through(relay: &Relay, device: &str, link: &mut DeviceLink, case: &Case) -> Verdict {
    let handshake = relay.handshake(device, link).await;
    let echo = async { echo(relay.device_leg(&handshake).await.socket, Flaw::Nothing).await };
    let client = async {
        let mut io = relay.target().connect().await;
        let url = &handshake.grant.url;
        let path = &url[url.find("/bridges").unwrap()..];
        let bearer = format!("Authorization: Bearer {}\r\n", handshake.grant.ticket.expose_secret());
        within("the upgrade", client::upgrade(&mut io, path, &relay.target().authority, &bearer)).await;
        client::play(io, case).await
    };
    let (seen, heard) = tokio::join!(client, echo);
    let heard = match heard {
        Heard::Closed(Some((1011, text))) if text.starts_with("service_protocol: ") => Heard::Violation,
        Heard::Violation => Heard::ViolationPassedOn,
        heard @ (Heard::Closed(_)
        | Heard::ViolationPassedOn
        | Heard::NotUtf8
        | Heard::TooLong
        | Heard::Lost) => heard,
    };
    Verdict::new(case, seen, heard)
}

/// Sends every message back until the end.
async fn echo<IO: AsyncRead + AsyncWrite + Unpin>(mut socket: WebSocketStream<IO>, flaw: Flaw) -> Heard {
    let mut heard = Heard::Lost;
    while let Some(next) = socket.next().await {
        let error = match next {
            Ok(message @ (tungstenite::Message::Text(_) | tungstenite::Message::Binary(_))) => {
                let message = flaw.spoil(message);
                if flaw == Flaw::Twice {
                    let _ = socket.send(message.clone()).await;
                }
                // Who has gone is heard of by the next read.
                let _ = socket.send(message).await;
                continue;
            }
            Ok(tungstenite::Message::Close(close)) => {
                heard = Heard::close(close);
                continue;
            }
            Ok(_) => continue,
            Err(error) => error,
        };
        let code;
        (heard, code) = match error {
            Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) | Error::Io(_) => break,
            Error::Protocol(_) => (Heard::Violation, if flaw == Flaw::Code { 1000 } else { 1002 }),
            Error::Utf8(_) => (Heard::NotUtf8, 1007),
            Error::Capacity(_) => (Heard::TooLong, 1009),
            Error::ConnectionClosed
            | Error::AlreadyClosed
            | Error::Tls(_)
            | Error::WriteBufferFull(_)
            | Error::AttackAttempt
            | Error::Url(_)
            | Error::Http(_)
            | Error::HttpFormat(_) => panic!("no error of a connection that is read: {error}"),
        };
        if flaw == Flaw::Silence && heard == Heard::Violation {
            break;
        }
        // The library leaves it to its caller to say why.
        let _ = socket.close(Some(CloseFrame { code: code.into(), reason: "".into() })).await;
        break;
    }
    // The client may still be writing; a reset would take from it what it has not read yet.
    let end = async {
        let io = socket.get_mut();
        io.shutdown().await?;
        let mut sink = vec![0; 64 * 1024];
        while io.read(&mut sink).await? > 0 {}
        std::io::Result::Ok(())
    };
    let _ = timeout(DEADLINE, end).await;
    heard
}

impl Heard {
    fn close(close: Option<CloseFrame>) -> Self {
        let Some(CloseFrame { code, reason }) = close else { return Self::Closed(None) };
        match (u16::from(code), reason.as_str()) {
            // The library's word for a close code that is not to be sent.
            (1002, "Protocol violation") => Self::Violation,
            (code, reason) => Self::Closed(Some((code, reason.to_owned()))),
        }
    }
}

impl Flaw {
    fn spoil(self, message: tungstenite::Message) -> tungstenite::Message {
        match (self, message) {
            (Self::Type, tungstenite::Message::Text(text)) => tungstenite::Message::Binary(text.into()),
            (Self::Octet, tungstenite::Message::Binary(bytes)) if bytes.len() >= LONG => {
                let mut bytes = bytes.to_vec();
                *bytes.last_mut().unwrap() ^= 1;
                tungstenite::Message::binary(bytes)
            }
            (_, message) => message,
        }
    }
}
