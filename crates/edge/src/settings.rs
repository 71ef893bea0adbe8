use std::time::Duration;

use clap::Args;

/// How the streaming edge treats its streams.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Streaming edge")]
pub struct EdgeSettings {
    /// The edge's name, which placement hashes; the same after a restart
    #[arg(long, env = "MIDSPAN_EDGE_NAME", default_value = "edge-0", value_name = "NAME")]
    pub edge_name: String,
    /// Streams at a time, half-open ones included
    #[arg(long, env = "MIDSPAN_MAX_STREAMS", default_value_t = 8000, value_name = "N")]
    pub max_streams: usize,
    /// Threads that move the bytes of streams; 0 for one a core
    #[arg(long, env = "MIDSPAN_DATA_THREADS", default_value_t = 0, value_name = "N")]
    pub data_threads: usize,
    /// Memory for streams whose reader takes less than comes, all together, in MiB; near it, reads become small
    #[arg(long, env = "MIDSPAN_MAX_BUFFERED_MIB", default_value_t = 64, value_name = "MIB")]
    pub max_buffered_mib: usize,
    /// How often a quiet leg is pinged
    #[arg(long, env = "MIDSPAN_LEG_PING", default_value = "25s", value_name = "TIME", value_parser = midspan_platform::duration::positive)]
    pub leg_ping: Duration,
    /// A leg that has nothing left to read and gives no sign of life for this long is ended
    #[arg(long, env = "MIDSPAN_LEG_SILENCE", default_value = "75s", value_name = "TIME", value_parser = midspan_platform::duration::positive)]
    pub leg_silence: Duration,
    /// A stream that carries no payload for this long is ended
    #[arg(long, env = "MIDSPAN_IDLE_LIMIT", default_value = "1h", value_name = "TIME", value_parser = midspan_platform::duration::positive)]
    pub idle_limit: Duration,
    /// A leg that takes no byte for this long, although some wait for it, is ended
    #[arg(long, env = "MIDSPAN_STALL_LIMIT", default_value = "15m", value_name = "TIME", value_parser = midspan_platform::duration::positive)]
    pub stall_limit: Duration,
    /// At a clean end, a leg that takes no byte for this long, or does not answer the close frame, loses the rest; so does one that needs longer than the stall limit
    #[arg(long, env = "MIDSPAN_CLOSE_LIMIT", default_value = "1m", value_name = "TIME", value_parser = midspan_platform::duration::positive)]
    pub close_limit: Duration,
}
