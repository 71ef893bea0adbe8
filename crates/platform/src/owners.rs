//! How the control plane reaches the edge that owns a stream.

use async_trait::async_trait;
use midspan_core::{close::CloseReason, id::StreamId, ticket::Owner};
use thiserror::Error;

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

/// For a control plane that shares its process with no edge.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoOwners;

#[async_trait]
impl Owners for NoOwners {
    async fn end(&self, _: &Owner, _: StreamId, _: CloseReason) -> Result<(), OwnerUnreachable> {
        Err(OwnerUnreachable)
    }
}
