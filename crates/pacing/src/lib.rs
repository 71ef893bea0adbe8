//! TCP sockets, and which of their connections the kernel paces.
//!
//! A congestion control like BBR paces: it spreads what a socket sends over time, with a timer for each burst. Over a long
//! path that spares the queues on the way. A path of less than half a millisecond has none that matter, and the timers take a
//! quarter to a third of a relay's processor time. So connections with peers nearby are not paced; all others have what the
//! kernel gives them. Where the kernel does not pace, or is not Linux, all have.

#[cfg(target_os = "linux")]
mod spared;

/// Elsewhere nothing is known that paces.
#[cfg(not(target_os = "linux"))]
mod spared {
    /// Nothing can be taken away.
    #[derive(Debug)]
    pub(crate) enum Spared {}

    impl Spared {
        /// Leaves the socket as it is.
        pub(crate) fn of<T>(_new: T) -> Option<Self> {
            None
        }

        pub(crate) fn settle<T>(&self, _connection: T) {
            match *self {}
        }
    }
}

use std::{io, net::SocketAddr};

use tokio::net::{TcpListener, TcpSocket, TcpStream, ToSocketAddrs, lookup_host};

use self::spared::Spared;

/// How many connections may wait in the kernel to be accepted, for each socket.
const BACKLOG: u32 = 1024;

/// A socket that listens, on no runtime yet.
#[derive(Debug)]
pub struct Listening {
    socket: std::net::TcpListener,
    spared: Option<Spared>,
}

impl Listening {
    /// Listens on `address`, where connections of a process that has just ended may still be. Others may listen there as
    /// well if all of them `reuse_port`. To be called on a runtime.
    pub fn bind(address: SocketAddr, reuse_port: bool) -> io::Result<Self> {
        let socket = new_socket(address)?;
        socket.set_reuseaddr(true)?;
        socket.set_reuseport(reuse_port)?;
        let spared = Spared::of(&socket);
        socket.bind(address)?;
        Ok(Self { socket: socket.listen(BACKLOG)?.into_std()?, spared })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Accepts connections on the runtime of the caller from here on.
    pub fn acceptor(self) -> io::Result<Acceptor> {
        Ok(Acceptor { socket: TcpListener::from_std(self.socket)?, spared: self.spared })
    }
}

/// Accepts connections of a listening socket, and has those paced that the kernel would pace and whose peers are not nearby.
#[derive(Debug)]
pub struct Acceptor {
    socket: TcpListener,
    spared: Option<Spared>,
}

impl Acceptor {
    /// The next connection, and where its peer is. When this is given up, no connection is lost.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let (connection, address) = self.socket.accept().await?;
        if let Some(spared) = &self.spared {
            spared.settle(&connection);
        }
        Ok((connection, address))
    }
}

/// Connects to the first of the addresses that answers; small messages do not wait for an acknowledgement.
///
/// One address is tried after the other. Fails as the last one did.
pub async fn connect(addresses: impl ToSocketAddrs) -> io::Result<TcpStream> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in lookup_host(addresses).await? {
        match connect_to(address).await {
            Ok(connection) => return Ok(connection),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

async fn connect_to(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = new_socket(address)?;
    let spared = Spared::of(&socket);
    let connection = socket.connect(address).await?;
    if let Some(spared) = spared {
        spared.settle(&connection);
    }
    Ok(connection)
}

/// A socket for this kind of address, whose small messages do not wait for an acknowledgement; what it accepts inherits that.
fn new_socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_nodelay(true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listening() -> Listening {
        Listening::bind(([127, 0, 0, 1], 0).into(), false).unwrap()
    }

    #[tokio::test]
    async fn a_name_without_a_listener_says_why() {
        let nobody = listening().local_addr().unwrap().to_string();
        assert_eq!(connect(&nobody).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn small_messages_do_not_wait() {
        let listening = listening();
        let address = listening.local_addr().unwrap();
        let acceptor = listening.acceptor().unwrap();
        let (there, here) = tokio::join!(connect(address), acceptor.accept());
        assert!(there.unwrap().nodelay().unwrap());
        assert!(here.unwrap().0.nodelay().unwrap());
    }
}
