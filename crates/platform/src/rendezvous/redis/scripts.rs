//! The transitions, each one atomic step on the keys of one hash tag.

use redis::{Cmd, Script as Source};

macro_rules! scripts {
    ($($(#[$doc:meta])* $name:ident: $label:literal, [$($part:literal),*];)*) => {
        /// One of them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Script {
            $($(#[$doc])* $name,)*
        }

        impl Script {
            /// All of them.
            pub(super) const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The script in metrics.
            pub(super) fn label(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)*
                }
            }

            fn text(self) -> &'static str {
                match self {
                    $(Self::$name => concat!(
                        include_str!("scripts/clock.lua"),
                        $(include_str!(concat!("scripts/", $part, ".lua")),)*
                        include_str!(concat!("scripts/", $label, ".lua")),
                    ),)*
                }
            }
        }
    };
}

scripts! {
    // Of one bucket of streams.
    CreateStream: "create_stream", ["members", "stream"];
    AdvanceStream: "advance_stream", ["members", "stream"];
    RestoreStream: "restore_stream", ["members", "stream"];
    ReadStream: "read_stream", ["members", "stream"];
    ListStreams: "list_streams", ["members", "stream"];
    SweepStreams: "sweep_streams", ["members", "stream"];
    CountServices: "count_services", [];
    // Of one device.
    Reserve: "reserve", ["device"];
    Hold: "hold", [];
    Release: "release", [];
    LinkUp: "link_up", ["device"];
    RestoreLink: "restore_link", [];
    LinkDown: "link_down", [];
    Link: "link", ["device"];
    AwaitLink: "await_link", ["device"];
    // Of one bucket of links.
    ListLink: "list_link", ["members", "links"];
    UnlistLink: "unlist_link", ["members", "links"];
    ListLinks: "list_links", ["links"];
    LostLinks: "lost_links", ["members", "links"];
    // Of all processes.
    Renew: "renew", ["membership"];
    Leases: "leases", ["membership"];
    Withdraw: "withdraw", [];
    ClaimSweep: "claim_sweep", ["membership"];
    // Of one bucket of streams or links.
    Mark: "mark", [];
    // Of one service.
    SettleSlots: "settle_slots", [];
    CorrectSlots: "correct_slots", [];
}

/// The scripts with their hashes, by which a server that has seen them finds them.
#[derive(Debug)]
pub(super) struct Scripts(Vec<Source>);

impl Scripts {
    pub(super) fn new() -> Self {
        Self(Script::ALL.iter().map(|script| Source::new(script.text())).collect())
    }

    /// Runs `script` on a server that knows it.
    pub(super) fn by_hash(&self, script: Script, base: &str, arguments: &[String]) -> Cmd {
        command("EVALSHA", self.0[script as usize].get_hash(), base, arguments)
    }
}

/// Runs `script` on a server that does not know it yet, and does from then on.
pub(super) fn by_text(script: Script, base: &str, arguments: &[String]) -> Cmd {
    command("EVAL", script.text(), base, arguments)
}

fn command(name: &str, script: &str, base: &str, arguments: &[String]) -> Cmd {
    let mut command = redis::cmd(name);
    command.arg(script).arg(1).arg(base).arg(arguments);
    command
}
