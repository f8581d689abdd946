//! The threads that serve a connection. Each takes a request, lets the device fill its own buffer and answers with one
//! `writev`: no allocation, no lock, no other thread. Only when the device says that it must wait is the request handed
//! to a task with a buffer of its own, so a miss never stands before a hit.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use loam_block::{BlockDevice, Io};
use rustix::io::Errno;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use zerocopy::IntoBytes;

use super::buffer::PageBuffer;
use super::queues::Queues;
use super::session::{self, Action, MAX_READ, Negotiated, REPLY_BYTES, Session};
use super::stats::{self, Counters, Stats, add};
use super::wire;
use crate::{Error, Result};

/// Threads when nothing else is asked for: as many as there are processors, but no more than this (a second one brings
/// a quarter, further ones little).
const DEFAULT_THREADS_MAX: usize = 4;
/// The most threads.
const THREADS_MAX: usize = 64;
/// Asynchronous requests that the kernel may have under way; 256 instead of its 12 brings a quarter at depth 64.
const DEFAULT_MAX_BACKGROUND: u16 = 256;
/// Bytes of buffers that all waiting reads may hold; more of them wait without a buffer.
const WAITING_BYTES_MAX: u32 = 64 << 20;
/// What the budget above is counted in.
pub(super) const BUDGET_UNIT: u32 = 4096;
/// errno for a read that failed in a way the device did not name.
pub(super) const EIO: i32 = 5;
/// Between looks at whether the threads have ended.
const JOIN_POLL: Duration = Duration::from_millis(1);

const _: () = assert!(MAX_READ <= WAITING_BYTES_MAX, "a read that never gets its buffer");

/// How requests and replies travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// By reads and writes of /dev/fuse. Another process can take over.
    #[default]
    Classic,
    /// By io_uring, where the kernel has it switched on (module parameter `fuse.enable_uring`, Linux 6.14), else as
    /// [`Engine::Classic`]. Faster, but a process that dies takes what is under way with it: no other can take over.
    Uring,
}

/// How a connection is served.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// How requests and replies travel.
    pub engine: Engine,
    /// Threads, 1 to 64; `None`: as many as processors, at most 4.
    pub threads: Option<usize>,
    /// Asynchronous requests that the kernel may have under way.
    pub max_background: u16,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions { engine: Engine::Classic, threads: None, max_background: DEFAULT_MAX_BACKGROUND }
    }
}

impl ServerOptions {
    fn threads(&self) -> usize {
        let processors = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or_else(|| processors().min(DEFAULT_THREADS_MAX)).clamp(1, THREADS_MAX)
    }
}

/// A connection that is being served. Its threads end by themselves when the kernel ends the connection: when the last
/// file and mount of the filesystem are closed. Dropping this does not end them.
pub struct Server {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

pub(super) struct Shared {
    channel: OwnedFd,
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) session: Session,
    pub(super) runtime: Handle,
    pub(super) waiting: Semaphore,
    negotiated: OnceLock<Negotiated>,
    counters: Box<[Counters]>,
    queues: Queues,
}

impl Server {
    /// Begins to serve a new connection: one file `name` with the content of `device`. Reads that must wait run on
    /// `runtime`, which must go on while other threads are blocked in reads of the file.
    ///
    /// # Errors
    /// Where threads cannot be started.
    pub fn start(
        channel: OwnedFd,
        name: &str,
        device: Arc<dyn BlockDevice>,
        runtime: Handle,
        options: &ServerOptions,
    ) -> Result<Server> {
        Server::spawn(channel, name, device, runtime, options, OnceLock::new())
    }

    /// Goes on with a connection that another process began, and asks for every request that it left unanswered.
    ///
    /// # Errors
    /// [`Error::CannotResend`] when the kernel did not offer that, or serves by io_uring; where threads cannot be started.
    pub fn resume(
        channel: OwnedFd,
        name: &str,
        device: Arc<dyn BlockDevice>,
        runtime: Handle,
        options: &ServerOptions,
        negotiated: Negotiated,
    ) -> Result<Server> {
        if !negotiated.can_resend() {
            return Err(Error::CannotResend);
        }
        // A connection stays what it began as.
        let options = ServerOptions { engine: Engine::Classic, ..options.clone() };
        let server = Server::spawn(channel, name, device, runtime, &options, OnceLock::from(negotiated))?;
        let notification = session::resend_notification();
        rustix::io::write(&server.shared.channel, notification.as_bytes())
            .map_err(|error| loam_sys::Error::new("FUSE_NOTIFY_RESEND", "/dev/fuse", error))?;
        Ok(server)
    }

    fn spawn(
        channel: OwnedFd,
        name: &str,
        device: Arc<dyn BlockDevice>,
        runtime: Handle,
        options: &ServerOptions,
        negotiated: OnceLock<Negotiated>,
    ) -> Result<Server> {
        let geometry = device.geometry();
        let mut session = Session::new(name, geometry.size, geometry.maximum_block, options.max_background);
        let threads = options.threads();
        let queues = match options.engine {
            Engine::Classic => Queues::none(),
            Engine::Uring => {
                session.offer_uring();
                Queues::prepare(channel.as_fd(), session.max_read(), threads)?
            }
        };
        let counters = (0..threads + queues.len()).map(|_| Counters::default()).collect();
        let waiting = Semaphore::new((WAITING_BYTES_MAX / BUDGET_UNIT) as usize);
        let shared = Shared { channel, device, session, runtime, waiting, negotiated, counters, queues };
        let shared = Arc::new(shared);
        let mut server = Server { shared, threads: Vec::with_capacity(threads) };
        for index in 0..threads {
            let shared = Arc::clone(&server.shared);
            let thread = std::thread::Builder::new()
                .name(format!("loam-fuse-{index}"))
                .spawn(move || serve(&shared, index))
                .map_err(|error| loam_sys::Error::new("clone", "a FUSE thread", error))?;
            server.threads.push(thread);
        }
        Ok(server)
    }

    /// What INIT agreed on; `None` before the kernel sent it. Known once a file was opened.
    pub fn negotiated(&self) -> Option<Negotiated> {
        self.shared.negotiated.get().copied()
    }

    /// How many threads read requests.
    pub fn threads(&self) -> usize {
        self.threads.len()
    }

    /// The descriptor to keep a duplicate of, for the connection to survive this process.
    pub fn channel(&self) -> BorrowedFd<'_> {
        self.shared.channel.as_fd()
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        stats::sum(self.shared.counters.iter())
    }

    /// Waits until the kernel has ended the connection and all threads are gone. Returns whether that happened in
    /// time.
    pub fn wait(&mut self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        let mut queues = self.shared.queues.threads.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.threads.iter().chain(queues.iter()).all(JoinHandle::is_finished) {
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(JOIN_POLL);
        }
        for thread in self.threads.drain(..).chain(queues.drain(..)) {
            // Panics of the device are caught where it is called; the loop itself has none to pass on.
            let _ = thread.join();
        }
        true
    }
}

/// Whether the connection goes on.
#[derive(PartialEq, Eq)]
enum Channel {
    Open,
    Closed,
}

/// Per thread; without it, memory reclaim through the device could wait for itself.
pub(super) fn become_flusher() {
    if let Err(error) = loam_sys::process::become_io_flusher() {
        tracing::debug!(%error, "serving block I/O without PR_SET_IO_FLUSHER");
    }
}

fn serve(shared: &Arc<Shared>, index: usize) {
    receive(shared, index);
    // Queues that still wait for a beginning would wait for ever.
    shared.queues.begin(shared, false);
}

/// Takes requests from /dev/fuse until the connection ends.
fn receive(shared: &Arc<Shared>, index: usize) {
    become_flusher();
    let _context = shared.runtime.enter();
    let mut request = PageBuffer::new(wire::MIN_READ_BUFFER);
    let mut data = PageBuffer::new(MAX_READ as usize);
    let mut reply = [0; REPLY_BYTES];
    loop {
        let buffer = request.first_mut(wire::MIN_READ_BUFFER);
        let length = match rustix::io::read(&shared.channel, buffer) {
            Ok(0) => return,
            Ok(length) => length,
            // ENOENT: the request was taken back while it was being read.
            Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => continue,
            Err(Errno::NODEV) => return,
            Err(error) => {
                tracing::error!(%error, "cannot read from /dev/fuse: this thread stops serving");
                return;
            }
        };
        let message = request.first(length);
        if shared.handle(index, message, &mut reply, &mut data) == Channel::Closed {
            return;
        }
    }
}

/// What the device did about a read.
pub(super) enum Attempt {
    Done,
    Failed(i32),
    MustWait,
}

impl Shared {
    fn handle(
        self: &Arc<Self>,
        index: usize,
        message: &[u8],
        reply: &mut [u8; REPLY_BYTES],
        data: &mut PageBuffer,
    ) -> Channel {
        let counters = self.counters(index);
        let length = match self.session.handle(message, reply) {
            Action::Read { unique, offset, length } => return self.read(index, unique, offset, length, data),
            Action::Reply(length) => length,
            Action::Begin(length, negotiated) => {
                // Set before the answer: whoever opens the file waits for that.
                let _ = self.negotiated.set(negotiated);
                add(&counters.other, 1);
                let channel = self.send(index, &[reply.get(..length).unwrap_or_default()]);
                self.queues.begin(self, negotiated.uses_uring());
                return channel;
            }
            Action::Nothing => {
                add(&counters.other, 1);
                return Channel::Open;
            }
            Action::Malformed => {
                add(&counters.protocol_errors, 1);
                return Channel::Open;
            }
        };
        add(&counters.other, 1);
        self.send(index, &[reply.get(..length).unwrap_or_default()])
    }

    fn read(
        self: &Arc<Self>,
        index: usize,
        unique: u64,
        offset: u64,
        length: u32,
        data: &mut PageBuffer,
    ) -> Channel {
        let counters = self.counters(index);
        let buffer = data.first_mut(length as usize);
        match self.attempt(offset, buffer) {
            Attempt::Done => {
                add(&counters.hits, 1);
                self.send_data(index, unique, data.first(length as usize))
            }
            Attempt::Failed(errno) => self.send_error(index, unique, errno),
            Attempt::MustWait => {
                add(&counters.misses, 1);
                let miss = Miss { shared: Arc::clone(self), index, unique };
                self.runtime.spawn(miss.run(offset, length));
                Channel::Open
            }
        }
    }

    /// Asks the device once. A future is dropped unpolled: by the contract of [`BlockDevice`] nothing has happened, and
    /// the read is made again with a buffer that may stay with it.
    pub(super) fn attempt(&self, offset: u64, buffer: &mut [u8]) -> Attempt {
        let outcome = catch_unwind(AssertUnwindSafe(|| match self.device.read(offset, buffer) {
            Io::Ready(Ok(())) => Attempt::Done,
            Io::Ready(Err(error)) => {
                self.log(&error);
                Attempt::Failed(error.errno())
            }
            Io::Pending(_) => Attempt::MustWait,
        }));
        outcome.unwrap_or(Attempt::Failed(EIO))
    }

    /// Logs failed reads, ever more rarely: one bad region read over and over must not fill a disk.
    pub(super) fn log(&self, error: &loam_block::Error) {
        let errors = stats::sum(self.counters.iter()).errors + 1;
        if errors.is_power_of_two() {
            tracing::warn!(?error, errors, "a read of the virtual device failed");
        }
    }

    pub(super) fn counters(&self, index: usize) -> &Counters {
        &self.counters[index]
    }

    fn send_data(&self, index: usize, unique: u64, data: &[u8]) -> Channel {
        add(&self.counters(index).bytes, data.len() as u64);
        let header = session::data_header(unique, data.len() as u32);
        self.send(index, &[header.as_bytes(), data])
    }

    fn send_error(&self, index: usize, unique: u64, errno: i32) -> Channel {
        add(&self.counters(index).errors, 1);
        self.send(index, &[session::error_header(unique, errno).as_bytes()])
    }

    /// Writes one reply: header, and data if there is any.
    fn send(&self, index: usize, parts: &[&[u8]]) -> Channel {
        let mut slices = [IoSlice::new(&[]), IoSlice::new(&[])];
        for (slice, part) in slices.iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
        }
        let slices = slices.get(..parts.len()).unwrap_or_default();
        match rustix::io::retry_on_intr(|| rustix::io::writev(&self.channel, slices)) {
            // ENOENT: nobody waits for this one any more.
            Ok(_) | Err(Errno::NOENT) => Channel::Open,
            Err(Errno::NODEV) => Channel::Closed,
            Err(error) => {
                add(&self.counters(index).protocol_errors, 1);
                tracing::error!(%error, "the kernel refused a FUSE reply");
                Channel::Open
            }
        }
    }
}

/// A read that must wait, and is not answered yet.
struct Miss {
    shared: Arc<Shared>,
    index: usize,
    unique: u64,
}

impl Miss {
    async fn run(self, offset: u64, length: u32) {
        let shared = &self.shared;
        // The number of these tasks is bounded by what the kernel has under way; the budget bounds their buffers.
        let units = length.div_ceil(BUDGET_UNIT).max(1);
        let Ok(_budget) = shared.waiting.acquire_many(units).await else { return };
        let mut data = PageBuffer::new(length as usize);
        let result = shared.device.read(offset, data.first_mut(length as usize)).await;
        // Whether the connection is closed is the threads' business.
        let _ = match result {
            Ok(()) => shared.send_data(self.index, self.unique, data.first(length as usize)),
            Err(error) => {
                shared.log(&error);
                shared.send_error(self.index, self.unique, error.errno())
            }
        };
    }
}

impl Drop for Miss {
    fn drop(&mut self) {
        add(&self.shared.counters(self.index).answered_misses, 1);
        // A device that panicked: its reader must not wait for ever. A task that is dropped because the runtime ends is
        // another matter: its request stays open for the process that takes over.
        if std::thread::panicking() {
            let _ = self.shared.send_error(self.index, self.unique, EIO);
        }
    }
}

#[cfg(test)]
mod tests;
