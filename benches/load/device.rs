//! Devices that keep a link and accept every stream.

use std::{
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use midspan_core::{
    connection_string::{ConnectionString, Identity},
    id::DeviceAddress,
    key::Key,
    link::SUBPROTOCOL,
    time::UnixTime,
};
use rustls::ClientConfig;
use secrecy::ExposeSecret as _;
use serde_json::Value;

use crate::connection::{Connection, Received, Scratch};

/// One device with its link.
#[derive(Debug)]
pub(crate) struct Device {
    connection: Connection,
    /// What has come and is not whole.
    unread: Vec<u8>,
}

const TEXT: u8 = 1;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

impl Device {
    /// Opens the link, and waits for its welcome.
    pub(crate) fn open(
        number: usize,
        group_key: &Key,
        control: SocketAddr,
        tls: &Arc<ClientConfig>,
        scratch: &mut Scratch,
    ) -> Result<Self> {
        let address: DeviceAddress = format!("dev{number}").parse()?;
        let (path, key) = (format!("/v1/devices/{address}/link"), group_key.derive(&address));
        let identity = Identity::Device(address);
        let signature = ConnectionString { host: "localhost".to_owned(), identity, key }.sign(UnixTime::LAST);
        let headers = format!(
            "Authorization: {}\r\nSec-WebSocket-Protocol: {SUBPROTOCOL}\r\n",
            signature.expose_secret()
        );
        let mut device = Self { connection: Connection::open(control, Some(tls))?, unread: Vec::new() };
        device.connection.request_with(&path, &headers)?;
        let head = loop {
            device.read(scratch)?;
            if let Some(end) = device.unread.windows(4).position(|end| end == b"\r\n\r\n") {
                break device.unread.drain(..end + 4).collect::<Vec<_>>();
            }
        };
        ensure!(head.starts_with(b"HTTP/1.1 101 "), "the relay answered {}", String::from_utf8_lossy(&head));
        while device.frame().is_none() {
            device.read(scratch)?;
        }
        Ok(device)
    }

    /// Reads once and answers what has come: pings, and requests for streams. How many of the latter there were.
    pub(crate) fn serve(&mut self, scratch: &mut Scratch) -> Result<usize> {
        self.read(scratch)?;
        let mut requests = 0;
        while let Some((opcode, payload)) = self.frame() {
            match opcode {
                PING => self.send(PONG, &payload)?,
                TEXT => {
                    let message: Value = serde_json::from_slice(&payload)?;
                    if message["type"] == "request" {
                        let accept = serde_json::json!({"type": "accept", "request": message["request"]});
                        self.send(TEXT, accept.to_string().as_bytes())?;
                        requests += 1;
                    }
                }
                CLOSE => anyhow::bail!("the relay closed a link"),
                _ => {}
            }
        }
        Ok(requests)
    }

    fn read(&mut self, scratch: &mut Scratch) -> Result<()> {
        let unread = &mut self.unread;
        let received = self.connection.receive(scratch, |bytes| {
            unread.extend_from_slice(bytes);
            Ok(())
        })?;
        ensure!(received != Received::End, "the relay ended a link");
        Ok(())
    }

    /// The next frame that is there to its end; the relay sends none above 64 KiB.
    fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let (&first, &second) = (self.unread.first()?, self.unread.get(1)?);
        let (header, length) = match second {
            126 => (4, usize::from(u16::from_be_bytes([*self.unread.get(2)?, *self.unread.get(3)?]))),
            short => (2, usize::from(short)),
        };
        if self.unread.len() < header + length {
            return None;
        }
        let mut frame: Vec<u8> = self.unread.drain(..header + length).collect();
        Some((first & 0x0f, frame.split_off(header)))
    }

    fn send(&mut self, opcode: u8, payload: &[u8]) -> Result<()> {
        let length = u8::try_from(payload.len()).ok().filter(|&length| length < 126);
        let mut frame = vec![0x80 | opcode, 0x80 | length.context("too long for this device")?, 0, 0, 0, 0];
        frame.extend_from_slice(payload);
        self.connection.send_all(&frame)?;
        Ok(())
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}
