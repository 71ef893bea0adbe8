//! Waiting for sockets.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::{
    buffer::spare_capacity,
    event::{
        Timespec,
        epoll::{self, CreateFlags, Event, EventData, EventFlags},
    },
};

/// Level-triggered epoll, which knows each socket by its place in a slice.
pub(crate) struct Poller {
    epoll: OwnedFd,
    events: Vec<Event>,
}

/// What is waited for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Until {
    Readable,
    Writable,
}

impl Poller {
    pub(crate) fn new<S: AsFd>(sockets: &[S], until: Until) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let flags = match until {
            Until::Readable => EventFlags::IN,
            Until::Writable => EventFlags::OUT,
        };
        for (place, socket) in (0..).zip(sockets) {
            epoll::add(&epoll, socket, EventData::new_u64(place), flags)?;
        }
        Ok(Self { epoll, events: Vec::with_capacity(256) })
    }

    /// The places of sockets that are ready; none when the time is over.
    pub(crate) fn wait(&mut self, most: Duration) -> io::Result<impl Iterator<Item = usize>> {
        self.events.clear();
        let most = Timespec::try_from(most).map_err(io::Error::other)?;
        match epoll::wait(&self.epoll, spare_capacity(&mut self.events), Some(&most)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.events.iter().filter_map(|event| usize::try_from(event.data.u64()).ok()))
    }

    /// Waits for this one no longer.
    pub(crate) fn forget<S: AsFd>(&self, socket: &S) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, socket)?)
    }
}
