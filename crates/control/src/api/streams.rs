//! `GET /v1/streams`, `GET /v1/streams/{id}` and `DELETE /v1/streams/{id}`.

use http::StatusCode;
use midspan_core::{
    api::{PAGE_MAX, StreamPage},
    close::CloseReason,
    credential::Permission,
    id::StreamId,
    path::PageQuery,
    problem::{Problem, ProblemKind},
    record::{StreamEnd, StreamRecord},
};
use midspan_platform::{
    clock,
    http::{HttpRequest, HttpResponse, empty, json},
};

use super::{bad_request, in_time};
use crate::{auth::out_of_scope, control::Control};

impl Control {
    pub(crate) async fn list_streams(&self, request: &HttpRequest) -> Result<HttpResponse, Problem> {
        let service = self.service_that_may(request, Permission::List)?;
        let page = PageQuery::parse(request.uri().query().unwrap_or_default())?;
        let after = page.after.map(|after| after.parse::<StreamId>()).transpose();
        let mut after = after.map_err(|error| bad_request(format!("after: {error}")))?;
        let mut items: Vec<StreamRecord> = Vec::new();
        while items.len() <= page.limit {
            let records = in_time(self.rendezvous.streams(after, PAGE_MAX)).await?;
            let Some(last) = records.last() else { break };
            after = Some(last.stream);
            items.extend(records.into_iter().filter(|record| service.reaches(&record.address)));
        }
        let more = items.len() > page.limit;
        items.truncate(page.limit);
        let next = items.last().filter(|_| more).map(|last| last.stream.to_string());
        Ok(json(StatusCode::OK, &StreamPage { items, next }))
    }

    pub(crate) async fn stream_status(
        &self,
        request: &HttpRequest,
        stream: &str,
    ) -> Result<HttpResponse, Problem> {
        let record = self.reached_stream(request, stream, Permission::List).await?;
        Ok(json(StatusCode::OK, &record))
    }

    /// Ends a stream, through its owner, and answers once its legs have been told.
    pub(crate) async fn end_stream(
        &self,
        request: &HttpRequest,
        stream: &str,
    ) -> Result<HttpResponse, Problem> {
        let record = self.reached_stream(request, stream, Permission::Close).await?;
        if record.is_ended() {
            return Ok(empty(StatusCode::NO_CONTENT));
        }
        let reason = CloseReason::Deleted;
        if self.owners.end(&record.owner, record.stream, reason).await.is_err() {
            let detail = "the edge that carries this stream cannot be reached; try again";
            return Err(Problem::new(ProblemKind::Unavailable, detail));
        }
        // Where a leg had come, its owner has recorded the end by now, and this changes nothing.
        let end = StreamEnd::unused(reason, clock::unix());
        if let Some(record) = in_time(self.rendezvous.delete_stream(record.stream, end)).await? {
            self.record_end(&record);
        }
        Ok(empty(StatusCode::NO_CONTENT))
    }

    async fn reached_stream(
        &self,
        request: &HttpRequest,
        stream: &str,
        permission: Permission,
    ) -> Result<StreamRecord, Problem> {
        let service = self.service_that_may(request, permission)?;
        let unknown = || {
            let detail = "no such stream, or it ended more than five minutes ago";
            Problem::new(ProblemKind::StreamUnknown, detail)
        };
        let stream: StreamId = stream.parse().map_err(|_| unknown())?;
        let record = in_time(self.rendezvous.stream(stream)).await?.ok_or_else(unknown)?;
        if !service.reaches(&record.address) {
            return Err(out_of_scope(&service, &record.address));
        }
        Ok(record)
    }
}
