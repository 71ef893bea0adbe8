//! The service's end: opening streams, and asking the relay what there is.

use std::{sync::Arc, time::Duration};

use http::Method;
use midspan_core::{
    api::{
        DevicePage, DeviceStatus, Endpoints, HANDSHAKE_MAX, PAGE_MAX, Page, StreamGrant, StreamPage,
        StreamRequest, Timeouts,
    },
    capability::Capabilities,
    connection_string::{ConnectionString, Identity},
    id::{DeviceAddress, StreamId, StreamName},
    link::Metadata,
    record::StreamRecord,
};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use thiserror::Error;
use tracing::debug;

use crate::{
    http::{CALL_TIMEOUT, Options, Relay, RequestError, SetupError},
    leg::Stream,
};

/// A service of one relay.
#[derive(Debug, Clone)]
pub struct Service {
    relay: Arc<Relay>,
}

/// Why a stream was not opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The relay or the device refused, or the relay was not reached.
    #[error(transparent)]
    Request(RequestError),
    /// The device accepted, but the service's own leg did not come about.
    #[error("the device accepted, but this end of the stream failed: {0}")]
    Leg(RequestError),
}

impl OpenError {
    /// The error of the request that failed.
    pub fn request(&self) -> &RequestError {
        match self {
            Self::Request(error) | Self::Leg(error) => error,
        }
    }
}

/// A request for a stream with the relay's own time-outs and no metadata.
///
/// `capabilities` are what the caller keeps to: [`Capabilities::of_this_client`] for a proxy,
/// [`Capabilities::none`] where empty messages are messages.
pub fn stream_request(name: StreamName, capabilities: Capabilities) -> StreamRequest {
    StreamRequest {
        name,
        connect_timeout_seconds: None,
        response_timeout_seconds: None,
        capabilities,
        metadata: Metadata::default(),
    }
}

impl Service {
    /// A service with the connection string of a service; makes no connection yet.
    pub fn new(connection: ConnectionString, options: Options) -> Result<Self, SetupError> {
        match &connection.identity {
            Identity::Service(_) => Ok(Self { relay: Arc::new(Relay::new(connection, options)?) }),
            Identity::Device(address) => {
                Err(SetupError::Identity { needed: "service", given: format!("device {address}") })
            }
        }
    }

    /// Asks the device for a stream and opens this end of it. Takes 50 s at the most to hear the device's answer.
    pub async fn open(&self, address: &DeviceAddress, request: &StreamRequest) -> Result<Stream, OpenError> {
        let body = serde_json::to_vec(request)
            .map_err(|error| OpenError::Request(RequestError::Request(error.to_string())))?;
        let times =
            Timeouts::clamp(HANDSHAKE_MAX, request.connect_timeout_seconds, request.response_timeout_seconds);
        let deadline = times.connect + times.response + ANSWER_SLACK;
        let path = format!("/v1/{}/streams", address.path());
        let grant: StreamGrant = self
            .relay
            .call(Method::POST, &path, Some(body), deadline)
            .await
            .and_then(|body| self.relay.parse(&body))
            .map_err(OpenError::Request)?;
        debug!(stream = %grant.stream, trace = %grant.traceparent.trace_id(), "the device accepted");
        let leg = self.relay.leg(&grant.url, &grant.ticket).await.map_err(OpenError::Leg)?;
        Ok(Stream::new(grant.stream, leg, &request.capabilities, &grant.capabilities))
    }

    /// Lists the devices that the credential reaches and that are registered or connected.
    pub async fn devices(&self) -> Result<Vec<DeviceStatus>, RequestError> {
        self.all("/v1/devices", |page: DevicePage| page).await
    }

    /// One device or module.
    pub async fn device(&self, address: &DeviceAddress) -> Result<DeviceStatus, RequestError> {
        self.relay.fetch(&format!("/v1/{}", address.path())).await
    }

    /// Lists the streams that are not over.
    pub async fn streams(&self) -> Result<Vec<StreamRecord>, RequestError> {
        self.all("/v1/streams", |page: StreamPage| page).await
    }

    /// One stream, also some minutes after its end.
    pub async fn stream(&self, stream: StreamId) -> Result<StreamRecord, RequestError> {
        self.relay.fetch(&format!("/v1/streams/{stream}")).await
    }

    /// Ends a stream.
    pub async fn end(&self, stream: StreamId) -> Result<(), RequestError> {
        let path = format!("/v1/streams/{stream}");
        self.relay.call(Method::DELETE, &path, None, CALL_TIMEOUT).await.map(drop)
    }

    /// The public base URLs of the streaming edge.
    pub async fn endpoints(&self) -> Result<Endpoints, RequestError> {
        self.relay.fetch("/v1/endpoints").await
    }

    async fn all<P: DeserializeOwned, T>(
        &self,
        path: &str,
        page_of: impl Fn(P) -> Page<T>,
    ) -> Result<Vec<T>, RequestError> {
        let mut items = Vec::new();
        let mut after: Option<String> = None;
        loop {
            let query = after.as_ref().map_or_else(String::new, |after| {
                format!("&after={}", utf8_percent_encode(after, NON_ALPHANUMERIC))
            });
            let page = page_of(self.relay.fetch(&format!("{path}?limit={PAGE_MAX}{query}")).await?);
            items.extend(page.items);
            // A relay that names the same page again would be asked for ever.
            if page.next.is_none() || page.next == after {
                return Ok(items);
            }
            after = page.next;
        }
    }
}

/// What the relay's answer may take beyond the device's time: the network, and the relay itself.
const ANSWER_SLACK: Duration = Duration::from_secs(10);
