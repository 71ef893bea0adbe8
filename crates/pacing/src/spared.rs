//! How pacing is taken from a socket, and given back.

use std::{
    os::fd::{AsFd, AsRawFd as _},
    time::Duration,
};

use rustix::net::{
    AddressFamily, SocketType, socket,
    sockopt::{set_tcp_congestion, tcp_congestion},
};
use tracing::debug;

/// Peers with a shorter round trip are nearby: on the same machine, or in the same data centre.
const NEAR: Duration = Duration::from_micros(500);

/// Congestion controls that do not pace, the better one first. Linux always has the second.
const UNPACED: [&str; 2] = ["cubic", "reno"];

/// The number of the option that gives a connection's `struct tcp_info` (Linux, `include/uapi/linux/tcp.h`), and where in
/// it the shortest round trip stands, in words.
const TCP_INFO: i32 = 11;
const MIN_RTT: usize = 37;

/// How the pacing of a socket was taken away, before it listened or connected: one that was paced once has its timers for
/// good.
#[derive(Debug)]
pub(crate) struct Spared {
    /// The congestion control that the kernel gave it.
    kernels: String,
    /// The one that it has instead.
    ours: &'static str,
    near: Duration,
}

impl Spared {
    /// Takes pacing from a socket that is not in use yet. `None` where the kernel does not pace it, or does not let us change
    /// our mind.
    pub(crate) fn of(new: impl AsFd) -> Option<Self> {
        let kernels = tcp_congestion(&new).ok().filter(|name| name.starts_with("bbr"))?;
        Self::instead_of(kernels, NEAR, new)
    }

    fn instead_of(kernels: String, near: Duration, new: impl AsFd) -> Option<Self> {
        // On a socket for that alone: an administrator may allow one way and not the other.
        let trial = socket(AddressFamily::INET, SocketType::STREAM, None).ok()?;
        let there_and_back =
            |name: &str| set_tcp_congestion(&trial, name).and_then(|()| set_tcp_congestion(&trial, &kernels));
        let ours = UNPACED.into_iter().find(|name| there_and_back(name).is_ok())?;
        set_tcp_congestion(new, ours).ok()?;
        Some(Self { kernels, ours, near })
    }

    /// Gives a connection of that socket the kernel's congestion control, unless the peer is nearby.
    ///
    /// The round trip of the handshake says so; a connection without one, as under a flood, is not nearby.
    pub(crate) fn settle(&self, connection: impl AsFd) {
        let is_near = round_trip(&connection).is_some_and(|time| time < self.near);
        // One that the way there has chosen stays, as `ip route` can.
        if is_near || tcp_congestion(&connection).is_ok_and(|name| name != self.ours) {
            return;
        }
        if let Err(error) = set_tcp_congestion(connection, &self.kernels) {
            debug!(%error, "a connection from afar is not paced");
        }
    }
}

/// The shortest round trip of a connection so far, if the kernel has seen one.
fn round_trip(connection: impl AsFd) -> Option<Duration> {
    let mut info = [u32::MAX; MIN_RTT + 1];
    let descriptor = connection.as_fd().as_raw_fd();
    // A kernel that knows less fills less of it.
    uapi::getsockopt(descriptor, uapi::c::IPPROTO_TCP, TCP_INFO, &mut info).ok()?;
    (info[MIN_RTT] != u32::MAX).then(|| Duration::from_micros(info[MIN_RTT].into()))
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    use super::*;
    use crate::{Acceptor, connect, new_socket};

    /// Nothing on this machine takes so long, however busy it is.
    const LONG: Duration = Duration::from_secs(1);

    /// A listener that is spared, as if the kernel had given it what every kernel has.
    fn listener(near: Duration) -> Acceptor {
        let socket = new_socket(([127, 0, 0, 1], 0).into()).unwrap();
        socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
        let spared = Spared::instead_of("reno".to_owned(), near, &socket);
        Acceptor { socket: socket.listen(16).unwrap(), spared }
    }

    /// The accepted end is the second.
    async fn connected(listener: &Acceptor) -> (TcpStream, TcpStream) {
        let (peer, accepted) =
            tokio::join!(connect(listener.socket.local_addr().unwrap()), listener.accept());
        (peer.unwrap(), accepted.unwrap().0)
    }

    #[tokio::test]
    async fn peers_nearby_have_what_does_not_pace_and_others_what_the_kernel_gave() {
        for (near, expected) in [(LONG, UNPACED[0]), (Duration::ZERO, "reno")] {
            let listener = listener(near);
            assert_eq!(tcp_congestion(&listener.socket).unwrap(), UNPACED[0], "is CUBIC allowed here?");
            let (_peer, connection) = connected(&listener).await;
            assert_eq!(tcp_congestion(&connection).unwrap(), expected);
        }
    }

    #[tokio::test]
    async fn what_something_else_has_chosen_stays() {
        let (_peer, connection) = connected(&listener(LONG)).await;
        let spared = Spared { kernels: "cubic".to_owned(), ours: "bbr", near: Duration::ZERO };
        set_tcp_congestion(&connection, "reno").unwrap();
        spared.settle(&connection);
        assert_eq!(tcp_congestion(&connection).unwrap(), "reno");
    }

    #[tokio::test]
    async fn what_cannot_be_given_back_is_not_taken() {
        let socket = new_socket(([127, 0, 0, 1], 0).into()).unwrap();
        let before = tcp_congestion(&socket).unwrap();
        assert!(Spared::instead_of("no-such-thing".to_owned(), NEAR, &socket).is_none());
        assert_eq!(tcp_congestion(&socket).unwrap(), before);
    }

    /// Whatever this machine has: a connection with itself is not paced, and a socket without pacing is left alone.
    #[tokio::test]
    async fn no_connection_of_this_machine_with_itself_is_paced() {
        let socket = new_socket(([127, 0, 0, 1], 0).into()).unwrap();
        socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
        let mut spared = Spared::of(&socket);
        if let Some(spared) = &mut spared {
            spared.near = LONG;
        }
        let listener = Acceptor { socket: socket.listen(16).unwrap(), spared };
        let (_peer, connection) = connected(&listener).await;
        let has = tcp_congestion(&connection).unwrap();
        assert!(!has.starts_with("bbr"), "{has}");
        set_tcp_congestion(&connection, "reno").unwrap();
        assert!(Spared::of(&connection).is_none());
        assert_eq!(tcp_congestion(&connection).unwrap(), "reno");
    }

    #[tokio::test]
    async fn the_round_trip_of_a_handshake_is_known_and_that_of_no_handshake_is_not() {
        let (mut peer, mut connection) = connected(&listener(LONG)).await;
        let handshake = round_trip(&connection).unwrap();
        assert!(handshake > Duration::ZERO && handshake < LONG, "{handshake:?}");
        connection.write_all(b"x").await.unwrap();
        peer.read_exact(&mut [0]).await.unwrap();
        assert!(round_trip(&connection).unwrap() <= handshake);
        assert_eq!(round_trip(new_socket(([127, 0, 0, 1], 0).into()).unwrap()), None);
    }
}
