//! How the edge that owns a stream is reached.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use midspan_core::{
    close::CloseReason,
    id::StreamId,
    internal::{self, END_STREAM, EndStream},
    ticket::Owner,
};
use thiserror::Error;
use tracing::debug;

use crate::{
    internal::{CallError, Calls},
    rendezvous::ServerRole,
};

/// The owner of a stream cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the edge that owns the stream cannot be reached from this process")]
pub struct OwnerUnreachable;

/// Calls to the owners of streams.
#[async_trait]
pub trait Owners: Send + Sync {
    /// Ends `stream` and answers once its legs have been told; a leg that comes later is refused with `reason`.
    async fn end(&self, owner: &Owner, stream: StreamId, reason: CloseReason)
    -> Result<(), OwnerUnreachable>;
}

/// How long an owner may take to tell the legs of a stream.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Owners in other processes.
#[derive(Clone)]
pub struct RemoteOwners(Arc<dyn Calls>);

impl RemoteOwners {
    /// Owners that are reached by `calls`.
    pub fn new(calls: Arc<dyn Calls>) -> Self {
        Self(calls)
    }
}

#[async_trait]
impl Owners for RemoteOwners {
    async fn end(
        &self,
        owner: &Owner,
        stream: StreamId,
        reason: CloseReason,
    ) -> Result<(), OwnerUnreachable> {
        let end = EndStream { v: internal::VERSION, stream, reason };
        let question = serde_json::to_vec(&end).map_err(|_| OwnerUnreachable)?;
        match self.0.call(ServerRole::Edge, owner, END_STREAM, question, END_LIMIT).await {
            // An owner that has ended has taken its streams with it.
            Ok(_) | Err(CallError::Gone) => Ok(()),
            Err(error) => {
                debug!(%error, edge = owner.name, "the owner of a stream could not be told to end it");
                Err(OwnerUnreachable)
            }
        }
    }
}

impl fmt::Debug for RemoteOwners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RemoteOwners")
    }
}
