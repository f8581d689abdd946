//! One queue of a device: a ring on which each tag has a command waiting for a request, and the tags' buffers.
//!
//! A tag belongs to the kernel until its command completes, which brings a request; then to us, until
//! [`Queue::commit`] answers it and fetches the next in one command. In between its buffer may be lent to another
//! thread, or be the target of a read on the same ring. Only for a tag that is ours does this module give out
//! references into its buffer.
//!
//! Requests are described in memory that the driver shares read-only; it may change while it is read, so descriptors are
//! copied out.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use io_uring::{IoUring, cqueue, opcode, squeue};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::memory::{Descriptors, LentBuffer, Memory};
use super::registered;
use super::wire::{self, IoCommand, IoDescriptor};
use crate::{Error, Result};

const PAGE: usize = 4096;
/// The character device among the ring's registered files.
const DEVICE_FILE: i32 = 0;
/// What user data says besides the tag.
const KIND_SHIFT: u32 = 16;
const KIND_COMMAND: u64 = 0;
const KIND_MOVE: u64 = 1;
const KIND_WAKE: u64 = 2;
const IORING_POLL_ADD_MULTI: u32 = 1 << 0;
const IORING_ENTER_GETEVENTS: u32 = 1 << 0;
const IORING_ENTER_REGISTERED_RING: u32 = 1 << 4;
/// Linux 6.15: a thread that waits for requests is idle, not waiting for a disk, and is accounted so.
const IORING_ENTER_NO_IOWAIT: u32 = 1 << 7;
const IOSQE_FIXED_FILE: u8 = 1 << 0;
const IOSQE_IO_LINK: u8 = 1 << 2;
const IOSQE_CQE_SKIP_SUCCESS: u8 = 1 << 6;

/// How the bytes of a read get into the request's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// The driver copies them from the tag's buffer when the request is committed.
    Copy,
    /// They are written to the character device from the tag's buffer ([`wire::feature::USER_COPY`]).
    UserCopy,
    /// The pages are buffers of the ring, which reads into them ([`wire::feature::AUTO_BUF_REG`]); what is not in a file
    /// goes as [`Transfer::UserCopy`].
    Registered,
}

/// What a queue is like.
#[derive(Debug, Clone, Copy)]
pub struct QueueOptions {
    /// Its number, from 0.
    pub queue: u16,
    /// The tags it has, as the device was made.
    pub depth: u16,
    /// Bytes of each tag's buffer, whole pages: the longest request.
    pub buffer_bytes: usize,
    /// As the device was made.
    pub transfer: Transfer,
}

/// An entry of the submission queue (`struct io_uring_sqe`): the fields that matter here.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Submission {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: i32,
    /// The file offset; for commands their number in the low half.
    offset: u64,
    address: u64,
    length: u32,
    operation_flags: u32,
    user_data: u64,
    buffer_index: u16,
    personality: u16,
    file_index: u32,
    command: IoCommand,
}

const _: () = assert!(size_of::<Submission>() == 64);
const _: () = assert!(size_of::<Submission>() == size_of::<squeue::Entry>());
const _: () = assert!(std::mem::offset_of!(Submission, command) == 48);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// A command of it waits for a request, or a commit is under way.
    Kernel,
    Us,
    /// Its buffer is elsewhere.
    Lent,
    /// The ring reads into its buffer, or into its request's pages.
    Moving,
    /// It will bring no more requests.
    Nobody,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A request came with this tag.
    Request(u16),
    /// A read that was asked for is over: bytes moved, or a negative errno.
    Moved(u16, i32),
    /// An answer did not reach the request's pages, so it was not given: the tag is ours still.
    NotCommitted(u16),
    /// Somebody called [`Waker::wake`].
    Woken,
    /// The tag will bring no more requests; the errno says why (`ENODEV` when the device was stopped).
    Ended(u16, i32),
}

/// Makes [`Queue::wait`] return, from any thread.
#[derive(Debug, Clone)]
pub struct Waker(Arc<Wake>);

#[derive(Debug)]
struct Wake {
    event: OwnedFd,
    /// Whether a wake was written that the queue has not seen.
    pending: AtomicBool,
}

impl Waker {
    /// Wakes the queue's thread, now or when it waits next. What was done before is seen by it.
    pub fn wake(&self) {
        if !self.0.pending.swap(true, Ordering::AcqRel) {
            // Cannot fail: the counter would have to reach 2^64.
            let _ = rustix::io::write(&self.0.event, &1_u64.to_ne_bytes());
        }
    }
}

/// A queue: used by the thread that made it.
pub struct Queue {
    ring: IoUring<squeue::Entry, cqueue::Entry>,
    /// The ring's index among the thread's registered rings.
    registered: Option<u32>,
    /// What io_uring_enter is called with: that index, or the descriptor.
    entered: RawFd,
    enter_flags: u32,
    options: QueueOptions,
    wake: Arc<Wake>,
    /// Mapped once all tags are the kernel's.
    descriptors: Option<Descriptors>,
    memory: Arc<Memory>,
    owners: Vec<Owner>,
}

impl Queue {
    /// A queue for a device like `options` say, not connected to one yet.
    ///
    /// # Errors
    /// `EINVAL` for numbers that the kernel does not take; `ENOSYS`, `EPERM` where io_uring is not to be had; `ENOMEM`.
    pub fn new(options: QueueOptions) -> Result<Queue> {
        let QueueOptions { queue, depth, buffer_bytes, transfer } = options;
        let fail = |call| move |error: std::io::Error| Error::new(call, format!("ublk queue {queue}"), error);
        let valid = (1..=wire::DEPTH_MAX).contains(&depth)
            && (PAGE..=wire::IO_BYTES_MAX).contains(&buffer_bytes)
            && buffer_bytes.is_multiple_of(PAGE);
        if !valid {
            return Err(fail("io_uring_setup")(std::io::Error::from_raw_os_error(libc::EINVAL)));
        }
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC);
        let event = event.map_err(|error| fail("eventfd")(error.into()))?;
        let mut builder = IoUring::builder();
        builder.setup_single_issuer().setup_defer_taskrun();
        // A tag has at most a move and a commit under way; the wake is one more.
        let entries = 2 * u32::from(depth) + 1;
        let ring = builder.setup_cqsize(2 * entries).build(entries).map_err(fail("io_uring_setup"))?;
        let submitter = ring.submitter();
        submitter.register_files_sparse(1).map_err(fail("io_uring_register"))?;
        if transfer == Transfer::Registered {
            submitter.register_buffers_sparse(u32::from(depth)).map_err(fail("io_uring_register"))?;
        }
        let registered = registered::register(ring.as_raw_fd());
        let mut enter_flags = IORING_ENTER_GETEVENTS;
        if registered.is_some() {
            enter_flags |= IORING_ENTER_REGISTERED_RING;
        }
        if ring.params().is_feature_no_iowait() {
            enter_flags |= IORING_ENTER_NO_IOWAIT;
        }
        let mut queue = Queue {
            entered: registered.map_or(ring.as_raw_fd(), |index| index as RawFd),
            enter_flags,
            ring,
            registered,
            options,
            wake: Arc::new(Wake { event, pending: AtomicBool::new(false) }),
            descriptors: None,
            memory: Arc::new(Memory::new(usize::from(depth), buffer_bytes).map_err(fail("mmap"))?),
            owners: vec![Owner::Us; usize::from(depth)],
        };
        queue.watch_wake()?;
        Ok(queue)
    }

    /// Connects the queue to the device that `server` (/dev/ublkcN) belongs to, which the ring keeps open from then on.
    ///
    /// # Errors
    /// Of io_uring_register.
    pub fn connect(&mut self, server: BorrowedFd<'_>) -> Result<()> {
        let registered = self.ring.submitter().register_files_update(0, &[server.as_raw_fd()]);
        registered.map_err(|error| self.error("io_uring_register", error))?;
        for tag in 0..self.options.depth {
            self.give(tag, wire::IO_FETCH_REQ, 0)?;
        }
        Ok(())
    }

    /// Gives all tags to the kernel, in one call that no signal divides: the kernel takes this thread as the queue's
    /// server, or does not. Failures show as [`Event::Ended`].
    ///
    /// # Errors
    /// Of io_uring_enter.
    pub fn fetch_all(&mut self) -> Result<()> {
        self.enter(0)
    }

    /// Maps the descriptors of requests; before that, they are zeroes. Only after [`Queue::fetch_all`] of all queues: a
    /// process that maps and is killed before it fetched makes the device impossible to take over (Linux 6.12).
    ///
    /// # Errors
    /// `EINVAL` for numbers that the device does not have.
    pub fn map_descriptors(&mut self, server: BorrowedFd<'_>) -> Result<()> {
        let mapped = Descriptors::map(server.as_raw_fd(), self.options.queue, self.options.depth);
        self.descriptors = Some(mapped.map_err(|error| self.error("mmap", error))?);
        Ok(())
    }

    /// What wakes the thread that waits here.
    pub fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.wake))
    }

    /// Submits what was given, and waits until something has happened.
    ///
    /// # Errors
    /// Of io_uring_enter; interruptions are not errors.
    pub fn wait(&mut self) -> Result<()> {
        self.enter(1)
    }

    /// The next thing that has happened; `None`: wait again.
    ///
    /// # Errors
    /// `EBUSY` when the ring is full, which its size rules out.
    pub fn next_event(&mut self) -> Result<Option<Event>> {
        loop {
            let next = self.ring.completion().next();
            let Some(completion) = next else { return Ok(None) };
            let (tag, kind) = (completion.user_data() as u16, completion.user_data() >> KIND_SHIFT);
            if kind == KIND_WAKE {
                // Cleared before the caller looks: what comes later wakes again.
                self.wake.pending.store(false, Ordering::SeqCst);
                if !cqueue::more(completion.flags()) {
                    self.watch_wake()?;
                }
                return Ok(Some(Event::Woken));
            }
            if let Some(event) = self.complete(tag, kind, completion.result()) {
                return Ok(Some(event));
            }
        }
    }

    fn complete(&mut self, tag: u16, kind: u64, result: i32) -> Option<Event> {
        let owner = self.owners.get_mut(usize::from(tag))?;
        if kind == KIND_MOVE {
            // A move that is linked to a commit reports only that it failed; the commit's own completion follows.
            let linked = *owner != Owner::Moving;
            return (!linked).then(|| {
                *owner = Owner::Us;
                Event::Moved(tag, result)
            });
        }
        Some(match -result {
            0 => {
                *owner = Owner::Us;
                Event::Request(tag)
            }
            libc::ECANCELED => {
                *owner = Owner::Us;
                Event::NotCommitted(tag)
            }
            errno => {
                *owner = Owner::Nobody;
                Event::Ended(tag, errno)
            }
        })
    }

    /// Whether any tag may still bring a request or wait for its answer.
    pub fn is_open(&self) -> bool {
        self.owners.iter().any(|owner| *owner != Owner::Nobody)
    }

    /// The request that a tag brought, as the kernel describes it. Zeroes for tags that there are not.
    pub fn descriptor(&self, tag: u16) -> IoDescriptor {
        self.descriptors.as_ref().and_then(|descriptors| descriptors.get(tag)).unwrap_or_default()
    }

    /// The buffer of a tag that is ours; empty for others. It begins on a page.
    pub fn buffer_mut(&mut self, tag: u16) -> &mut [u8] {
        if !self.is_ours(tag) {
            return &mut [];
        }
        let start = self.memory.at(usize::from(tag));
        // SAFETY: inside the mapping and initialised (mapped as zeroes); the tag is ours until it is given or lent, which
        // takes `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), self.memory.buffer_bytes()) }
    }

    fn is_ours(&self, tag: u16) -> bool {
        self.owners.get(usize::from(tag)) == Some(&Owner::Us)
    }

    /// Lends the buffer of a tag that is ours, for another thread to fill.
    pub fn lend(&mut self, tag: u16) -> Option<LentBuffer> {
        if !self.is_ours(tag) {
            return None;
        }
        self.set_owner(tag, Owner::Lent);
        Some(LentBuffer { memory: Arc::clone(&self.memory), tag })
    }

    /// Takes a lent buffer back: its tag is ours again. Those of other queues are ignored.
    pub fn take_back(&mut self, buffer: LentBuffer) {
        let lent = self.owners.get(usize::from(buffer.tag)) == Some(&Owner::Lent);
        if lent && Arc::ptr_eq(&self.memory, &buffer.memory) {
            self.set_owner(buffer.tag, Owner::Us);
        }
    }

    /// Answers the request of a tag that is ours, with the first `length` bytes of its buffer, and fetches the next. Sent
    /// by the next [`Queue::wait`].
    ///
    /// # Errors
    /// `EINVAL` when the tag is not ours or the length too large.
    pub fn commit_read(&mut self, tag: u16, length: u32) -> Result<()> {
        if !self.is_ours(tag) || length as usize > self.memory.buffer_bytes() {
            return Err(self.fail(libc::EINVAL));
        }
        if self.options.transfer != Transfer::Copy && length > 0 {
            self.push(Submission {
                opcode: opcode::Write::CODE,
                flags: IOSQE_FIXED_FILE | IOSQE_IO_LINK | IOSQE_CQE_SKIP_SUCCESS,
                fd: DEVICE_FILE,
                offset: wire::io_buffer_offset(self.options.queue, tag),
                address: self.address(tag),
                length,
                user_data: user_data(tag, KIND_MOVE),
                ..zerocopy::FromZeros::new_zeroed()
            })?;
        }
        self.give(tag, wire::IO_COMMIT_AND_FETCH_REQ, length as i32)
    }

    /// Answers the request of a tag that is ours without data: `result` is 0, or a negative errno. Fetches the next.
    ///
    /// # Errors
    /// `EINVAL` when the tag is not ours.
    pub fn commit(&mut self, tag: u16, result: i32) -> Result<()> {
        if !self.is_ours(tag) {
            return Err(self.fail(libc::EINVAL));
        }
        self.give(tag, wire::IO_COMMIT_AND_FETCH_REQ, result)
    }

    /// Reads `length` bytes of `file` at `offset` into the buffer of a tag that is ours; [`Event::Moved`] follows. The
    /// file must stay open until then.
    ///
    /// # Errors
    /// `EINVAL` when the tag is not ours or the length too large.
    pub fn read_file(&mut self, tag: u16, file: BorrowedFd<'_>, offset: u64, length: u32) -> Result<()> {
        if !self.is_ours(tag) || length as usize > self.memory.buffer_bytes() {
            return Err(self.fail(libc::EINVAL));
        }
        self.push(Submission {
            opcode: opcode::Read::CODE,
            fd: file.as_raw_fd(),
            offset,
            address: self.address(tag),
            length,
            user_data: user_data(tag, KIND_MOVE),
            ..zerocopy::FromZeros::new_zeroed()
        })?;
        self.set_owner(tag, Owner::Moving);
        Ok(())
    }

    /// Reads `length` bytes of `file` at `offset` into the pages of the request of a tag that is ours
    /// ([`Transfer::Registered`]); [`Event::Moved`] follows. The file must stay open until then.
    ///
    /// # Errors
    /// `EINVAL` when the tag is not ours.
    pub fn read_file_into_request(
        &mut self,
        tag: u16,
        file: BorrowedFd<'_>,
        offset: u64,
        length: u32,
    ) -> Result<()> {
        if !self.is_ours(tag) || self.options.transfer != Transfer::Registered {
            return Err(self.fail(libc::EINVAL));
        }
        self.push(Submission {
            opcode: opcode::ReadFixed::CODE,
            fd: file.as_raw_fd(),
            offset,
            length,
            buffer_index: tag,
            user_data: user_data(tag, KIND_MOVE),
            ..zerocopy::FromZeros::new_zeroed()
        })?;
        self.set_owner(tag, Owner::Moving);
        Ok(())
    }

    /// Answers the request of a tag that is ours, whose pages [`Queue::read_file_into_request`] filled with `length`
    /// bytes, and fetches the next.
    ///
    /// # Errors
    /// `EINVAL` when the tag is not ours.
    pub fn commit_moved(&mut self, tag: u16, length: u32) -> Result<()> {
        self.commit(tag, length as i32)
    }

    fn address(&self, tag: u16) -> u64 {
        self.memory.at(usize::from(tag)).as_ptr().expose_provenance() as u64
    }

    fn set_owner(&mut self, tag: u16, owner: Owner) {
        if let Some(place) = self.owners.get_mut(usize::from(tag)) {
            *place = owner;
        }
    }

    /// Makes a tag the kernel's, with a command on it.
    fn give(&mut self, tag: u16, command: u32, result: i32) -> Result<()> {
        let transfer = self.options.transfer;
        let address = if transfer == Transfer::Copy { self.address(tag) } else { 0 };
        self.push(Submission {
            opcode: opcode::UringCmd16::CODE,
            flags: IOSQE_FIXED_FILE,
            fd: DEVICE_FILE,
            offset: u64::from(command),
            // `struct ublk_auto_buf_reg`: the index of the ring's buffer that the next request's pages become.
            address: if transfer == Transfer::Registered { u64::from(tag) } else { 0 },
            user_data: user_data(tag, KIND_COMMAND),
            command: IoCommand { queue: self.options.queue, tag, result, address },
            ..zerocopy::FromZeros::new_zeroed()
        })?;
        self.set_owner(tag, Owner::Kernel);
        Ok(())
    }

    fn watch_wake(&mut self) -> Result<()> {
        self.push(Submission {
            opcode: opcode::PollAdd::CODE,
            fd: self.wake.event.as_raw_fd(),
            length: IORING_POLL_ADD_MULTI,
            operation_flags: libc::POLLIN as u32,
            user_data: KIND_WAKE << KIND_SHIFT,
            ..zerocopy::FromZeros::new_zeroed()
        })
    }

    fn push(&mut self, submission: Submission) -> Result<()> {
        // SAFETY: an Entry is a struct io_uring_sqe of 64 bytes, plain old data of the same size (asserted above); every
        // field of `submission` lies where the kernel's struct has it.
        let entry = unsafe { std::mem::transmute::<Submission, squeue::Entry>(submission) };
        let mut submissions = self.ring.submission();
        // SAFETY: the memory that the entry names lives as long as the kernel may use it (see `drop`); descriptors as
        // long as the ring or, for reads of files, as the callers promise.
        let pushed = unsafe { submissions.push(&entry) };
        drop(submissions);
        pushed.map_err(|_| self.fail(libc::EBUSY))
    }

    fn enter(&mut self, minimum: u32) -> Result<()> {
        let submit = self.ring.submission().len() as libc::c_uint;
        let (ring, flags) = (self.entered, self.enter_flags);
        let no_mask = std::ptr::null::<libc::sigset_t>();
        // SAFETY: the entries in the submission queue were justified when they were pushed; no signal mask is given.
        let result = unsafe {
            libc::syscall(libc::SYS_io_uring_enter, ring, submit, minimum, flags, no_mask, 0_usize)
        };
        if result >= 0 {
            return Ok(());
        }
        let error = std::io::Error::last_os_error();
        match error.raw_os_error() {
            // Busy: completions are waiting to be taken.
            Some(libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
            _ => Err(self.error("io_uring_enter", error)),
        }
    }

    fn fail(&self, errno: i32) -> Error {
        self.error("UBLK_IO_COMMIT_AND_FETCH_REQ", std::io::Error::from_raw_os_error(errno))
    }

    fn error(&self, call: &'static str, error: std::io::Error) -> Error {
        Error::new(call, format!("ublk queue {}", self.options.queue), error)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if let Some(index) = self.registered {
            registered::unregister(self.ring.as_raw_fd(), index);
        }
        let in_use = |owner: &Owner| matches!(owner, Owner::Kernel | Owner::Moving);
        if self.owners.iter().any(in_use) {
            // The kernel may yet write into it: a mapping that is never used again costs less than that.
            std::mem::forget(Arc::clone(&self.memory));
        }
    }
}

fn user_data(tag: u16, kind: u64) -> u64 {
    u64::from(tag) | kind << KIND_SHIFT
}

#[cfg(test)]
mod tests;
