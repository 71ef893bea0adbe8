//! Whether the kernel paces what is sent.

use rustix::net::{AddressFamily, SocketType, socket, sockopt::tcp_congestion};

/// Whether new sockets have a congestion control that spreads a burst over time, as BBR does, and CUBIC does not.
///
/// What cannot be asked counts as not paced.
pub(crate) fn is_on() -> bool {
    socket(AddressFamily::INET, SocketType::STREAM, None)
        .and_then(tcp_congestion)
        .is_ok_and(|name| name.starts_with("bbr"))
}
