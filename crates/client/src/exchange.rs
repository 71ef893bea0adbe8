//! One HTTP/1.1 request over one connection, up to its answer or its upgrade.

use std::future::poll_fn;

use bytes::Bytes;
use futures_util::future::join;
use http::{Method, Request, StatusCode, response};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;

use crate::dial::Connection;

/// What came of a request.
pub(crate) enum Exchanged {
    /// The connection speaks another protocol from here on.
    Upgraded {
        /// The header of the answer.
        head: response::Parts,
        /// The connection.
        connection: Connection,
        /// What has been read of the other protocol already.
        read: Bytes,
    },
    /// An answer with its body.
    Answer(response::Parts, Bytes),
}

impl Exchanged {
    /// The status of the answer.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Upgraded { head, .. } | Self::Answer(head, _) => head.status,
        }
    }
}

/// Sends `request` and waits for the answer. The caller sets the deadline.
///
/// The text of the error is for people: hyper's own, with its cause.
pub(crate) async fn exchange(
    connection: Connection,
    request: Request<Full<Bytes>>,
) -> Result<Exchanged, String> {
    let is_connect = request.method() == Method::CONNECT;
    let (mut sender, mut driver) =
        http1::handshake(TokioIo::new(connection)).await.map_err(|error| words(&error))?;
    let answer = async move {
        let answer = sender.send_request(request).await.map_err(|error| words(&error))?;
        let status = answer.status();
        if status == StatusCode::SWITCHING_PROTOCOLS || (is_connect && status.is_success()) {
            return Ok::<_, String>((answer.into_parts().0, None));
        }
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, BODY_MAX).collect().await.map_err(|error| words(&*error))?;
        Ok((head, Some(body.to_bytes())))
    };
    let (answer, _) = join(answer, poll_fn(|context| driver.poll_without_shutdown(context))).await;
    Ok(match answer? {
        (head, Some(body)) => Exchanged::Answer(head, body),
        (head, None) => {
            let parts = driver.into_parts();
            Exchanged::Upgraded { head, connection: parts.io.into_inner(), read: parts.read_buf }
        }
    })
}

fn words(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// The longest body of an answer: a page of 1,000 streams stays well below.
const BODY_MAX: usize = 4 << 20;
