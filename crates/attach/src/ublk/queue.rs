//! The thread of one queue. It takes all requests that have come, lets the device fill their buffers, and gives all
//! answers with the call that waits for the next: no allocation, no lock, no other thread. Only when the device says
//! that it must wait does the request's buffer go to a task, and come back by a channel.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, sync_channel};

use loam_block::{Access, Io, Ticket};
use loam_sys::ublk::{Event, LentBuffer, Queue, QueueOptions, Transfer, Waker};

use super::request::{EIO, Request};
use super::server::Shared;
use crate::Result;
use crate::fuse::{Counters, add};

/// The errno of a tag whose device was stopped.
const ENODEV: i32 = 19;
/// After a read that had to wait, but lies in a local file: how many further ones are looked for there first. A device
/// that always waits (a file past the page cache) then makes no future only to have it dropped.
const LOCATE_FIRST: u32 = 64;

/// Makes the calling thread one that block I/O depends on. Where it runs is the scheduler's choice, which measured best.
pub(super) fn settle_thread() {
    // Without it, memory reclaim through the device could wait for itself.
    if let Err(error) = loam_sys::process::become_io_flusher() {
        tracing::debug!(%error, "serving block I/O without PR_SET_IO_FLUSHER");
    }
    if let Err(error) = loam_sys::ublk::prefer_batches() {
        tracing::debug!(%error, "a ublk queue is scheduled as any thread");
    }
}

/// A miss that is over: its buffer, and the errno if it failed.
struct Done {
    buffer: LentBuffer,
    result: Result<(), i32>,
}

/// What is known of a request while it is under way.
#[derive(Clone, Copy)]
struct UnderWay {
    offset: u64,
    length: u32,
    /// Of the location that is being read.
    ticket: Option<Ticket>,
    /// Whether it is read into the request's pages.
    unseen: bool,
}

const NOTHING: UnderWay = UnderWay { offset: 0, length: 0, ticket: None, unseen: false };

/// A queue that serves.
pub(super) struct Server {
    queue: Queue,
    number: u16,
    shared: Arc<Shared>,
    under_way: Box<[UnderWay]>,
    done: SyncSender<Done>,
    finished: Receiver<Done>,
    waker: Waker,
    zero_copy: bool,
    /// How many of the next reads are first looked for in a local file.
    locate_first: u32,
}

/// What the device did about a read.
enum Attempt {
    Done,
    Failed(i32),
    MustWait,
}

impl Server {
    pub(super) fn new(options: QueueOptions, shared: Arc<Shared>) -> Result<Server> {
        let queue = Queue::new(options)?;
        // Each tag waits at most once, so a send never finds the channel full.
        let (done, finished) = sync_channel(usize::from(options.depth));
        Ok(Server {
            waker: queue.waker(),
            queue,
            number: options.queue,
            shared,
            under_way: vec![NOTHING; usize::from(options.depth)].into(),
            done,
            finished,
            zero_copy: options.transfer == Transfer::Registered,
            locate_first: 0,
        })
    }

    /// Waits for the device, says how connecting to it went, and serves until it is stopped.
    pub(super) fn run(mut self, device: &Receiver<Arc<OwnedFd>>, report: Sender<Result<()>>) {
        // An error: the device could not be made.
        let Ok(device) = device.recv() else { return };
        let begun = self.begin(device.as_fd());
        // The ring has the device open from here on, for as long as it serves.
        drop(device);
        let failed = begun.is_err();
        let _ = report.send(begun);
        drop(report);
        if failed {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let _context = shared.runtime.enter();
        if let Err(error) = self.serve() {
            tracing::error!(%error, "a ublk queue stops serving");
        }
    }

    fn begin(&mut self, device: BorrowedFd<'_>) -> Result<()> {
        let connected = self.queue.connect(device);
        // Even after an error: the others wait for all.
        self.shared.meet();
        connected?;
        self.queue.fetch_all()?;
        self.shared.meet();
        self.queue.map_descriptors(device)?;
        // Commands that the kernel does not take fail at once; no request can have come.
        while let Some(event) = self.queue.next_event()? {
            if let Event::Ended(_, errno) = event {
                let error = std::io::Error::from_raw_os_error(errno);
                let queue = format!("ublk queue {}", self.number);
                return Err(loam_sys::Error::new("UBLK_IO_FETCH_REQ", queue, error).into());
            }
        }
        Ok(())
    }

    fn serve(&mut self) -> loam_sys::Result<()> {
        while self.queue.is_open() {
            self.queue.wait()?;
            while let Some(event) = self.queue.next_event()? {
                match event {
                    Event::Request(tag) => self.request(tag)?,
                    Event::Moved(tag, result) => self.moved(tag, result)?,
                    Event::NotCommitted(tag) => self.fail(tag, EIO)?,
                    Event::Woken => {
                        while let Ok(done) = self.finished.try_recv() {
                            self.finish(done)?;
                        }
                    }
                    Event::Ended(_, ENODEV) => {}
                    Event::Ended(tag, errno) => {
                        let error = std::io::Error::from_raw_os_error(errno);
                        tracing::warn!(%error, tag, queue = self.number, "the kernel refused a ublk command");
                        count(&self.counters().protocol_errors, 1);
                    }
                }
            }
        }
        Ok(())
    }

    fn counters(&self) -> &Counters {
        self.shared.counters(self.number)
    }

    fn request(&mut self, tag: u16) -> loam_sys::Result<()> {
        let descriptor = self.queue.descriptor(tag);
        match Request::parse(&descriptor, self.shared.size, self.shared.io_bytes_max) {
            Request::Read { offset, length } => self.read(tag, offset, length),
            Request::Flush => {
                count(&self.counters().other, 1);
                self.queue.commit(tag, 0)
            }
            Request::Refused(errno) => {
                count(&self.counters().other, 1);
                self.queue.commit(tag, -errno)
            }
        }
    }

    fn read(&mut self, tag: u16, offset: u64, length: u32) -> loam_sys::Result<()> {
        if self.zero_copy && self.read_located(tag, offset, length, Access::Unseen)? {
            return Ok(());
        }
        if self.locate_first > 0 {
            self.locate_first -= 1;
            if self.read_located(tag, offset, length, Access::Seen)? {
                return Ok(());
            }
        }
        let Some(buffer) = self.queue.buffer_mut(tag).get_mut(..length as usize) else {
            return self.fail(tag, EIO);
        };
        match attempt(&self.shared, offset, buffer) {
            Attempt::Done => {
                count(&self.counters().hits, 1);
                self.answer(tag, length)
            }
            Attempt::Failed(errno) => self.fail(tag, errno),
            Attempt::MustWait if self.read_located(tag, offset, length, Access::Seen)? => {
                self.locate_first = LOCATE_FIRST;
                Ok(())
            }
            Attempt::MustWait => self.wait_for(tag, offset, length),
        }
    }

    /// Reads by the queue's own ring what lies in a local file. Returns false when it does not.
    fn read_located(&mut self, tag: u16, offset: u64, length: u32, access: Access) -> loam_sys::Result<bool> {
        let Server { queue, shared, under_way, .. } = self;
        let locate = || shared.device.locate(offset, u64::from(length), access);
        let Ok(Some(located)) = catch_unwind(AssertUnwindSafe(locate)) else { return Ok(false) };
        let unseen = access == Access::Unseen;
        if unseen {
            queue.read_file_into_request(tag, located.file, located.offset, length)?;
        } else {
            queue.read_file(tag, located.file, located.offset, length)?;
        }
        if let Some(place) = under_way.get_mut(usize::from(tag)) {
            *place = UnderWay { offset, length, ticket: Some(located.ticket), unseen };
        }
        Ok(true)
    }

    /// A read of a local file is over.
    fn moved(&mut self, tag: u16, result: i32) -> loam_sys::Result<()> {
        let under_way = self.under_way.get(usize::from(tag)).copied().unwrap_or(NOTHING);
        let UnderWay { offset, length, ticket, unseen } = under_way;
        let Some(ticket) = ticket.filter(|_| result == length as i32) else {
            return self.wait_for(tag, offset, length);
        };
        let Server { queue, shared, .. } = self;
        let bytes = if unseen { None } else { queue.buffer_mut(tag).get(..length as usize) };
        let settled = catch_unwind(AssertUnwindSafe(|| shared.device.settle(ticket, bytes)));
        if !settled.unwrap_or(false) {
            return self.wait_for(tag, offset, length);
        }
        let counters = self.counters();
        count(&counters.hits, 1);
        if unseen {
            count(&counters.bytes, u64::from(length));
            return self.queue.commit_moved(tag, length);
        }
        self.answer(tag, length)
    }

    /// Hands a read to a task.
    fn wait_for(&mut self, tag: u16, offset: u64, length: u32) -> loam_sys::Result<()> {
        let Some(buffer) = self.queue.lend(tag) else { return self.fail(tag, EIO) };
        count(&self.counters().misses, 1);
        if let Some(place) = self.under_way.get_mut(usize::from(tag)) {
            *place = UnderWay { offset, length, ticket: None, unseen: false };
        }
        let miss = Miss {
            shared: Arc::clone(&self.shared),
            number: self.number,
            buffer: Some(buffer),
            done: self.done.clone(),
            waker: self.waker.clone(),
        };
        self.shared.runtime.spawn(miss.run(offset, length));
        Ok(())
    }

    fn finish(&mut self, done: Done) -> loam_sys::Result<()> {
        let tag = done.buffer.tag();
        self.queue.take_back(done.buffer);
        match done.result {
            Ok(()) => {
                let length = self.under_way.get(usize::from(tag)).map_or(0, |under_way| under_way.length);
                self.answer(tag, length)
            }
            Err(errno) => self.fail(tag, errno),
        }
    }

    fn answer(&mut self, tag: u16, length: u32) -> loam_sys::Result<()> {
        count(&self.counters().bytes, u64::from(length));
        self.queue.commit_read(tag, length)
    }

    fn fail(&mut self, tag: u16, errno: i32) -> loam_sys::Result<()> {
        count(&self.counters().errors, 1);
        self.queue.commit(tag, -errno)
    }
}

/// Adds to a counter that only this thread writes: cheaper than an addition that others may make meanwhile.
fn count(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed) + amount, Ordering::Relaxed);
}

/// Asks the device once. A future is dropped unpolled: by the contract of [`loam_block::BlockDevice`] nothing has happened, and the
/// read is made again with the buffer in the hands of a task.
fn attempt(shared: &Shared, offset: u64, buffer: &mut [u8]) -> Attempt {
    let outcome = catch_unwind(AssertUnwindSafe(|| match shared.device.read(offset, buffer) {
        Io::Ready(Ok(())) => Attempt::Done,
        Io::Ready(Err(error)) => {
            shared.log(&error);
            Attempt::Failed(error.errno())
        }
        Io::Pending(_) => Attempt::MustWait,
    }));
    outcome.unwrap_or(Attempt::Failed(EIO))
}

/// A read that must wait; its tag waits with it.
struct Miss {
    shared: Arc<Shared>,
    number: u16,
    buffer: Option<LentBuffer>,
    done: SyncSender<Done>,
    waker: Waker,
}

impl Miss {
    async fn run(mut self, offset: u64, length: u32) {
        let shared = Arc::clone(&self.shared);
        let Some(buffer) = self.buffer.as_mut().and_then(|buffer| buffer.get_mut(..length as usize)) else {
            return;
        };
        let result = shared.device.read(offset, buffer).await;
        self.tell(result.map_err(|error| {
            shared.log(&error);
            error.errno()
        }));
    }

    fn tell(&mut self, result: Result<(), i32>) {
        let Some(buffer) = self.buffer.take() else { return };
        // The queue ends only with the device: then nobody waits.
        let _ = self.done.try_send(Done { buffer, result });
        self.waker.wake();
    }
}

impl Drop for Miss {
    fn drop(&mut self) {
        add(&self.shared.counters(self.number).answered_misses, 1);
        // A device that panicked: its reader must not wait for ever. A task that is dropped because the runtime ends is
        // another matter: its request stays open for the process that takes over.
        if std::thread::panicking() {
            self.tell(Err(EIO));
        }
    }
}
