use std::{path::PathBuf, time::Duration};

use clap::Args;
use midspan_core::{api::HANDSHAKE_MAX, owner_name::EdgeUrl};

/// How the control plane treats devices and services.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Control plane")]
pub struct ControlSettings {
    /// The replica's name
    #[arg(long, env = "MIDSPAN_CONTROL_NAME", default_value = "control-0", value_name = "NAME")]
    pub control_name: String,
    /// Keys of devices and services (JSON)
    #[arg(long, env = "MIDSPAN_CREDENTIALS_FILE", value_name = "FILE")]
    pub credentials_file: Option<PathBuf>,
    /// A host name of the relay that credentials may name; may be repeated
    #[arg(long = "public-host", env = "MIDSPAN_PUBLIC_HOST", value_name = "NAME", value_delimiter = ',')]
    pub public_hosts: Vec<String>,
    /// The public base URL of the streaming edges, such as `https://relay.example`, or `https://{owner}.streams.example` to name the edge that owns the stream
    #[arg(long, env = "MIDSPAN_EDGE_URL", value_name = "URL")]
    pub edge_url: Option<EdgeUrl>,
    /// From the request for a stream until both legs are joined, at most 60s; the device has five sixths of it
    #[arg(long, env = "MIDSPAN_HANDSHAKE_LIMIT", default_value = "60s", value_name = "TIME", value_parser = handshake_limit)]
    pub handshake_limit: Duration,
    /// How often a device link is pinged
    #[arg(long, env = "MIDSPAN_LINK_PING", default_value = "25s", value_name = "TIME", value_parser = midspan_platform::duration::positive)]
    pub link_ping: Duration,
    /// A device link on which nothing comes for this long is given up
    #[arg(long, env = "MIDSPAN_LINK_SILENCE", default_value = "1m", value_name = "TIME", value_parser = midspan_platform::duration::positive)]
    pub link_silence: Duration,
    /// Device links of this process
    #[arg(long, env = "MIDSPAN_LIMIT_DEVICE_LINKS", default_value_t = 15_000, value_name = "N")]
    pub limit_device_links: usize,
    /// Streams of one device at a time, half-open ones included
    #[arg(long, env = "MIDSPAN_LIMIT_STREAMS_PER_DEVICE", default_value_t = 100, value_name = "N")]
    pub limit_streams_per_device: u64,
    /// Streams of one service credential at a time, half-open ones included
    #[arg(long, env = "MIDSPAN_LIMIT_STREAMS_PER_SERVICE", default_value_t = 10_000, value_name = "N")]
    pub limit_streams_per_service: u64,
    /// Streams of the whole relay at a time, half-open ones included
    #[arg(long, env = "MIDSPAN_LIMIT_STREAMS_PER_RELAY", default_value_t = 100_000, value_name = "N")]
    pub limit_streams_per_relay: u64,
    /// Requests for streams per second and service credential
    #[arg(long, env = "MIDSPAN_LIMIT_INITIATIONS_PER_SECOND", default_value_t = 100, value_name = "N")]
    pub limit_initiations_per_second: u32,
    /// Requests for streams that wait for a device at a time
    #[arg(long, env = "MIDSPAN_LIMIT_WAITING_INITIATIONS", default_value_t = 4000, value_name = "N")]
    pub limit_waiting_initiations: usize,
}

fn handshake_limit(text: &str) -> Result<Duration, String> {
    let limit = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if (Duration::from_secs(1)..=HANDSHAKE_MAX).contains(&limit) {
        Ok(limit)
    } else {
        Err("must be 1s to 60s".to_owned())
    }
}
