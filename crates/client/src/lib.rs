//! The client side of Midspan: the device's and the service's end of a stream.
//!
//! A [`Service`] opens a [`Stream`] to a device by its id. A [`Device`] keeps a link to the relay and hands every
//! request for a stream to a [`Handler`]. A [`Stream`] carries messages, or the bytes of a local connection.
//!
//! Every connection is outbound, goes through the proxy that the environment names (`HTTPS_PROXY`, `ALL_PROXY`,
//! `NO_PROXY`), and is TLS unless [`Options::plaintext`] allows otherwise.
//!
//! ```no_run
//! use midspan_client::{Capabilities, Options, Service, stream_request};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let connection = "HostName=relay.example;SharedAccessKeyName=support;SharedAccessKey=...".parse()?;
//! let service = Service::new(connection, Options::default())?;
//! let request = stream_request("ssh".parse()?, Capabilities::of_this_client());
//! let stream = service.open(&"dev1".parse()?, &request).await?;
//! stream.proxy(tokio::net::TcpStream::connect("127.0.0.1:2222").await?).await?;
//! # Ok(())
//! # }
//! ```

mod backoff;
mod clock;
mod device;
mod dial;
mod exchange;
mod frames;
mod http;
mod leg;
mod link;
mod messages;
mod proxy;
mod scratch;
mod service;
mod tls;

pub use midspan_core::{
    api::{DeviceStatus, Endpoints, StreamRequest},
    capability::Capabilities,
    close::Side,
    connection_string::{ConnectionString, ConnectionStringError, Identity},
    id::{DeviceAddress, StreamId, StreamName},
    link::{Invitation, Metadata},
    problem::Problem,
    record::{StreamRecord, StreamState},
};

pub use crate::{
    clock::{Clock, SystemClock},
    device::{Device, DeviceSettings, Handler},
    dial::{DialError, describe},
    http::{Options, RequestError, SetupError},
    leg::{Message, Stream, StreamError},
    proxy::Traffic,
    service::{OpenError, Service, stream_request},
    tls::{TlsError, Trust},
};
