use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method};
use midspan_core::{
    api::StreamGrant,
    connection_string::ConnectionString,
    id::StreamId,
    key::Key,
    problem::Problem,
    record::{StreamEnd, StreamRecord, StreamState},
    sas::SasToken,
    time::UnixTime,
};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};

use crate::{Target, now, until};

/// An HTTP answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The header.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Checks that this is a problem document with this status and name, and gives it.
    #[track_caller]
    pub fn problem(&self, status: u16, name: &str) -> Problem {
        let content_type = self.headers.get("content-type").map(|value| value.to_str().unwrap());
        assert_eq!(content_type, Some("application/problem+json"), "{self:?}");
        let problem: Problem =
            serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        assert_eq!((self.status, problem.name()), (status, Some(name)), "{}", problem.detail);
        assert_eq!(problem.status, status, "the body names another status");
        assert!(!problem.detail.is_empty(), "a problem without a word of what happened");
        let request_id = self.headers.get("x-request-id").map(|value| value.to_str().unwrap());
        assert_eq!(request_id, Some(problem.request_id.as_str()), "the request ids differ");
        let retry_after = self.headers.get("retry-after").map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(retry_after, problem.retry_after_seconds.map(|seconds| seconds.to_string()));
        assert!(
            !matches!(status, 429 | 503) || problem.retry_after_seconds.is_some(),
            "a {status} that does not say when to come back: {problem:?}"
        );
        problem
    }

    /// Checks that this is a success with this status.
    #[track_caller]
    pub fn expect(&self, status: u16) -> &Self {
        assert_eq!(self.status, status, "{}", self.text());
        self
    }

    /// The granted stream.
    #[track_caller]
    pub fn grant(&self) -> StreamGrant {
        assert_eq!(self.status, 201, "{}", self.text());
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The record of a stream.
    #[track_caller]
    pub fn record(&self) -> StreamRecord {
        assert_eq!(self.status, 200, "{}", self.text());
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// A service that talks to the HTTP API. Every request has a connection of its own.
#[derive(Debug, Clone)]
pub struct ServiceApi {
    target: Target,
    authorization: String,
}

impl ServiceApi {
    /// A service with the policy and key of `connection`, whose signature is good for an hour.
    pub fn new(target: Target, connection: &ConnectionString) -> Self {
        let expires = now().plus(Duration::from_secs(3600));
        let authorization = connection.sign(expires).expose_secret().to_owned();
        Self { target, authorization }
    }

    /// The same service with a signature of its own making.
    #[must_use]
    pub fn signed(&self, resource: &str, policy: &str, key: &Key, expires: UnixTime) -> Self {
        self.authorized(SasToken::sign(resource, key, expires, Some(policy)).expose_secret())
    }

    /// The same service with another `Authorization` header.
    #[must_use]
    pub fn authorized(&self, authorization: &str) -> Self {
        Self { target: self.target.clone(), authorization: authorization.to_owned() }
    }

    /// The `Authorization` header.
    pub fn authorization(&self) -> &str {
        &self.authorization
    }

    /// Sends a request with the service's credential and any headers more.
    pub async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut all = vec![("authorization", self.authorization.as_str())];
        all.extend_from_slice(headers);
        self.target.request(self.target.build(method, path, &all, body)).await
    }

    /// `GET`.
    pub async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, &[], b"").await
    }

    /// `DELETE`.
    pub async fn delete(&self, path: &str) -> Answer {
        self.send(Method::DELETE, path, &[], b"").await
    }

    /// `POST` with a JSON body.
    pub async fn post(&self, path: &str, body: &[u8]) -> Answer {
        self.send(Method::POST, path, &[("content-type", "application/json")], body).await
    }

    /// Asks `device` for a stream named `test`.
    pub async fn open(&self, device: &str) -> Answer {
        self.open_with(device, json!({ "name": "test" })).await
    }

    /// Asks `device` (not percent-encoded, or `device/module`) for a stream.
    pub async fn open_with(&self, device: &str, body: Value) -> Answer {
        let address: midspan_core::id::DeviceAddress = device.parse().unwrap();
        self.post(&format!("/v1/{}/streams", address.path()), body.to_string().as_bytes()).await
    }

    /// The record of a stream.
    pub async fn stream(&self, stream: StreamId) -> StreamRecord {
        self.get(&format!("/v1/streams/{stream}")).await.record()
    }

    /// How the stream ended; waits until it is over.
    pub async fn end_of(&self, stream: StreamId) -> StreamEnd {
        until("the stream is over", || async {
            match self.stream(stream).await.state {
                StreamState::Ended(end) => Some(end),
                StreamState::Requested | StreamState::Accepted | StreamState::Joined { .. } => None,
            }
        })
        .await
    }

    /// Checks for which reason the stream ended; waits until it is over.
    pub async fn ended(&self, stream: StreamId, reason: &str) {
        assert_eq!(self.end_of(stream).await.reason.label(), reason);
    }
}
