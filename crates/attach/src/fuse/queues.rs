//! Serving by FUSE over io_uring (Linux 6.14): a queue and a thread for each processor, requests and replies in shared
//! memory. A tenth more requests at a fifth less processor time than by /dev/fuse; but what is under way when the
//! process dies cannot be taken over, and memory for it is set aside for each processor.
//!
//! The rings are made before INIT is answered: once the kernel was told that they come, it waits for them.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use loam_sys::fuse_ring::{self, Event, FuseRing, OPERATION_OFFSET, Waker};
use zerocopy::IntoBytes;

use super::buffer::PageBuffer;
use super::server::{Attempt, BUDGET_UNIT, EIO, Shared};
use super::session::{self, Action, REPLY_BYTES};
use super::stats::add;
use super::wire::{InHeader, OutHeader};
use crate::Result;

/// Requests of one processor that may be under way; the kernel queues more.
const DEPTH: u16 = 32;
/// The longest request that is looked at; longer ones (writes) are refused by their length.
const MESSAGE_MAX: usize = 8192;
const ENOTCONN: i32 = 107;

/// Threads that have their rings and wait for the connection to begin.
pub(super) struct Queues {
    begin: Mutex<Vec<Sender<Arc<Shared>>>>,
    pub(super) threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Queues {
    /// None: the connection is served by /dev/fuse alone.
    pub(super) fn none() -> Queues {
        Queues { begin: Mutex::default(), threads: Mutex::default() }
    }

    /// Starts a thread with a ring for each possible processor. Their counters are numbered from `first`.
    pub(super) fn prepare(
        channel_to_kernel: std::os::fd::BorrowedFd<'_>,
        max_read: u32,
        first: usize,
    ) -> Result<Queues> {
        let queues = Queues::none();
        let (made, all_made) = channel();
        for number in 0..fuse_ring::possible_processors()? {
            let duplicate = channel_to_kernel.try_clone_to_owned();
            let device = duplicate.map_err(|error| loam_sys::Error::new("fcntl", "/dev/fuse", error))?;
            let (begin, begun) = channel();
            let made = made.clone();
            let thread = std::thread::Builder::new().name(format!("loam-ring-{number}")).spawn(move || {
                let ring = FuseRing::new(std::os::fd::AsFd::as_fd(&device), number, DEPTH, max_read as usize);
                drop(device);
                let (ring, outcome) = match ring {
                    Ok(ring) => (Some(ring), Ok(())),
                    Err(error) => (None, Err(error)),
                };
                let _ = made.send(outcome);
                // Who prepares the queues listens until the last of these is gone.
                drop(made);
                if let Some(ring) = ring {
                    wait_and_serve(ring, first + usize::from(number), &begun);
                }
            });
            let thread = thread.map_err(|error| loam_sys::Error::new("clone", "a FUSE thread", error))?;
            lock(&queues.begin).push(begin);
            lock(&queues.threads).push(thread);
        }
        drop(made);
        for result in all_made {
            // The other threads end when their senders are dropped.
            result?;
        }
        Ok(queues)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        lock(&self.threads).len()
    }

    /// INIT was answered: the queues serve if both sides wanted it, else they end.
    pub(super) fn begin(&self, shared: &Arc<Shared>, agreed: bool) {
        for begin in std::mem::take(&mut *lock(&self.begin)) {
            if agreed {
                let _ = begin.send(Arc::clone(shared));
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait_and_serve(ring: FuseRing, index: usize, begun: &Receiver<Arc<Shared>>) {
    // An error: the connection goes on without queues, or ended before it began.
    let Ok(shared) = begun.recv() else { return };
    super::server::become_flusher();
    let _context = shared.runtime.enter();
    let (done, waiting) = channel();
    let waker = ring.waker();
    let mut queue = Queue { ring, shared: Arc::clone(&shared), index, done, waker };
    if let Err(error) = queue.serve(&waiting) {
        tracing::error!(%error, "a FUSE queue stops serving");
    }
}

/// A miss that is over: the slot that waits for it, and its data or errno.
struct Done {
    slot: usize,
    unique: u64,
    result: Result<(PageBuffer, u32), i32>,
}

struct Queue {
    ring: FuseRing,
    shared: Arc<Shared>,
    index: usize,
    done: Sender<Done>,
    waker: Waker,
}

impl Queue {
    fn serve(&mut self, waiting: &Receiver<Done>) -> loam_sys::Result<()> {
        let mut message = vec![0; MESSAGE_MAX];
        self.ring.register()?;
        while self.ring.is_open() {
            self.ring.wait()?;
            while let Some(event) = self.ring.next_event()? {
                match event {
                    Event::Request(slot) => self.request(slot, &mut message)?,
                    Event::Woken => {
                        for done in waiting.try_iter() {
                            self.finish(done)?;
                        }
                    }
                    Event::Ended(ENOTCONN) => {}
                    Event::Ended(errno) => {
                        let error = std::io::Error::from_raw_os_error(errno);
                        tracing::warn!(%error, "a slot of FUSE over io_uring ended");
                    }
                }
            }
        }
        Ok(())
    }

    fn request(&mut self, slot: usize, message: &mut [u8]) -> loam_sys::Result<()> {
        let message = assemble(&mut self.ring, slot, message);
        let mut reply = [0; REPLY_BYTES];
        let counters = self.shared.counters(self.index);
        let length = match self.shared.session.handle(message, &mut reply) {
            Action::Read { unique, offset, length } => return self.read(slot, unique, offset, length),
            Action::Reply(length) | Action::Begin(length, _) => length,
            // A slot is always answered, or it would be lost.
            Action::Nothing | Action::Malformed => {
                let unique = message.get(8..16).and_then(|bytes| bytes.try_into().ok());
                let header = session::error_header(unique.map_or(0, u64::from_ne_bytes), 0);
                return self.answer(slot, header, 0);
            }
        };
        add(&counters.other, 1);
        let Some((header, body)) = reply.get(..length).and_then(<[u8]>::split_first_chunk) else {
            return Ok(());
        };
        for (place, byte) in self.ring.payload_mut(slot).iter_mut().zip(body) {
            *place = *byte;
        }
        self.ring.reply(slot, header, body.len() as u32)
    }

    fn read(&mut self, slot: usize, unique: u64, offset: u64, length: u32) -> loam_sys::Result<()> {
        let counters = self.shared.counters(self.index);
        let payload = self.ring.payload_mut(slot);
        let Some(buffer) = payload.get_mut(..length as usize) else {
            return self.answer(slot, session::error_header(unique, EIO), 0);
        };
        match self.shared.attempt(offset, buffer) {
            Attempt::Done => {
                add(&counters.hits, 1);
                add(&counters.bytes, u64::from(length));
                self.answer(slot, session::data_header(unique, length), length)
            }
            Attempt::Failed(errno) => self.fail(slot, unique, errno),
            Attempt::MustWait => {
                add(&counters.misses, 1);
                let (done, waker) = (self.done.clone(), self.waker.clone());
                let shared = Arc::clone(&self.shared);
                let miss = Miss { shared, index: self.index, slot, unique, done, waker };
                self.shared.runtime.spawn(miss.run(offset, length));
                Ok(())
            }
        }
    }

    fn finish(&mut self, done: Done) -> loam_sys::Result<()> {
        match done.result {
            Ok((data, length)) => {
                let data = data.first(length as usize);
                if let Some(payload) = self.ring.payload_mut(done.slot).get_mut(..data.len()) {
                    payload.copy_from_slice(data);
                }
                add(&self.shared.counters(self.index).bytes, u64::from(length));
                self.answer(done.slot, session::data_header(done.unique, length), length)
            }
            Err(errno) => self.fail(done.slot, done.unique, errno),
        }
    }

    fn fail(&mut self, slot: usize, unique: u64, errno: i32) -> loam_sys::Result<()> {
        add(&self.shared.counters(self.index).errors, 1);
        self.answer(slot, session::error_header(unique, errno), 0)
    }

    fn answer(&mut self, slot: usize, header: OutHeader, length: u32) -> loam_sys::Result<()> {
        let mut bytes = [0; size_of::<OutHeader>()];
        bytes.copy_from_slice(header.as_bytes());
        self.ring.reply(slot, &bytes, length)
    }
}

/// Puts a request together as /dev/fuse would have given it: header, operation's struct, payload.
fn assemble<'a>(ring: &mut FuseRing, slot: usize, message: &'a mut [u8]) -> &'a [u8] {
    const HEADER: usize = size_of::<InHeader>();
    let payload = ring.payload_size(slot);
    let header = ring.header(slot);
    let total =
        header.get(..4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes) as usize;
    let operation = total.saturating_sub(HEADER + payload).min(OPERATION_OFFSET);
    let parts = [header.get(..HEADER), header.get(OPERATION_OFFSET..OPERATION_OFFSET + operation)];
    let mut length = 0;
    let mut append = |part: &[u8]| {
        if let Some(place) = message.get_mut(length..length + part.len()) {
            place.copy_from_slice(part);
            length += part.len();
        }
    };
    for part in parts {
        append(part.unwrap_or_default());
    }
    append(ring.payload_mut(slot).get(..payload).unwrap_or_default());
    message.get(..length).unwrap_or_default()
}

/// A read that must wait; its slot waits with it.
struct Miss {
    shared: Arc<Shared>,
    index: usize,
    slot: usize,
    unique: u64,
    done: Sender<Done>,
    waker: Waker,
}

impl Miss {
    async fn run(self, offset: u64, length: u32) {
        let units = length.div_ceil(BUDGET_UNIT).max(1);
        let Ok(_budget) = self.shared.waiting.acquire_many(units).await else { return };
        let mut data = PageBuffer::new(length as usize);
        let result = self.shared.device.read(offset, data.first_mut(length as usize)).await;
        self.tell(result.map(|()| (data, length)).map_err(|error| {
            self.shared.log(&error);
            error.errno()
        }));
    }

    fn tell(&self, result: Result<(PageBuffer, u32), i32>) {
        // The queue ends only with the connection: then nobody waits.
        let _ = self.done.send(Done { slot: self.slot, unique: self.unique, result });
        self.waker.wake();
    }
}

impl Drop for Miss {
    fn drop(&mut self) {
        add(&self.shared.counters(self.index).answered_misses, 1);
        if std::thread::panicking() {
            self.tell(Err(EIO));
        }
    }
}
