//! One queue of FUSE over io_uring (`fs/fuse/dev_uring.c`, Linux 6.14): a ring and slots of memory that the kernel puts
//! requests into and takes replies from, without a read and a write for each.
//!
//! ```text
//! a slot's header, 288 bytes:            command area of the submission, 24 of 80 bytes:
//!   0  struct fuse_in_header, in reply     0  flags u64
//!      struct fuse_out_header              8  commit_id u64
//! 128  the operation's own struct         16  qid u16
//! 256  flags u64                          18  padding
//! 264  commit_id u64
//! 272  payload_sz u32, padding u32
//! 280  reserved u64
//! ```
//!
//! A slot belongs either to the kernel or to us: to us from the completion that brings a request until its reply is
//! submitted. Only then does this module give out references into it. The memory is given back only when no slot is
//! the kernel's, which is so when the connection has ended; else it is left mapped.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Error, Result};

/// Bytes of a slot's header.
pub const HEADER_BYTES: usize = 288;
/// Where the operation's own struct begins in it.
pub const OPERATION_OFFSET: usize = 128;
/// The most slots of one queue.
pub const DEPTH_MAX: u16 = 1024;
/// The most payload bytes of one slot.
pub const PAYLOAD_BYTES_MAX: usize = 16 << 20;

const COMMIT_ID: usize = 264;
const PAYLOAD_SIZE: usize = 272;
const PAGE: usize = 4096;
const CMD_REGISTER: u32 = 1;
const CMD_COMMIT_AND_FETCH: u32 = 2;
/// The user data of the poll on the eventfd; slots have their index.
const WAKE: u64 = u64::MAX;

/// An entry of the submission queue with 128 bytes (`struct io_uring_sqe`): the fields that matter here.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Submission {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: i32,
    cmd_op: u32,
    pad: u32,
    addr: u64,
    len: u32,
    uring_cmd_flags: u32,
    user_data: u64,
    buf_index: u16,
    personality: u16,
    file_index: u32,
    command: Command,
    command_rest: [u8; 56],
}

/// `struct fuse_uring_cmd_req`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Command {
    flags: u64,
    commit_id: u64,
    qid: u16,
    padding: [u8; 6],
}

const _: () = assert!(size_of::<Submission>() == 128);
const _: () = assert!(size_of::<Submission>() == size_of::<squeue::Entry128>());
const _: () = assert!(std::mem::offset_of!(Submission, command) == 48);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Kernel,
    Us,
    /// The connection has ended: nobody will use it again.
    Nobody,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A request lies in this slot.
    Request(usize),
    /// Somebody called [`Waker::wake`].
    Woken,
    /// The slot will bring no more requests; the errno says why (`ENOTCONN` when the connection has ended).
    Ended(i32),
}

/// Makes [`FuseRing::wait`] return, from any thread.
#[derive(Debug, Clone)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// Wakes the queue's thread, now or when it waits next.
    pub fn wake(&self) {
        // A counter that is full wakes just as well.
        let _ = rustix::io::write(self.0.as_ref(), &1_u64.to_ne_bytes());
    }
}

/// A queue: used by the thread that made it.
pub struct FuseRing {
    ring: Option<IoUring<squeue::Entry128, cqueue::Entry>>,
    channel: OwnedFd,
    queue: u16,
    wake: Arc<OwnedFd>,
    memory: NonNull<u8>,
    memory_bytes: usize,
    payload_bytes: usize,
    owners: Vec<Owner>,
    /// What the slots are registered with; the kernel reads it during registration only.
    vectors: Vec<[libc::iovec; 2]>,
}

impl FuseRing {
    /// A queue for the requests of one processor, `queue`, of the connection that `channel` (/dev/fuse) belongs to, with
    /// `depth` slots of `payload_bytes` (whole pages; at least the connection's largest read) each. The kernel sends
    /// requests once every possible processor's queue is registered.
    ///
    /// # Errors
    /// `EINVAL` for numbers beyond the limits above; `ENOSYS`, `EPERM` where io_uring is not to be had; `ENOMEM`.
    pub fn new(channel: BorrowedFd<'_>, queue: u16, depth: u16, payload_bytes: usize) -> Result<FuseRing> {
        let fail = |call| move |error: std::io::Error| Error::new(call, format!("FUSE queue {queue}"), error);
        let invalid = depth == 0
            || depth > DEPTH_MAX
            || !payload_bytes.is_multiple_of(PAGE)
            || !(PAGE..=PAYLOAD_BYTES_MAX).contains(&payload_bytes);
        if invalid {
            return Err(fail("io_uring_setup")(std::io::Error::from_raw_os_error(libc::EINVAL)));
        }
        let channel = channel.try_clone_to_owned().map_err(fail("fcntl"))?;
        let wake = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)
            .map_err(|error| fail("eventfd")(error.into()))?;
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(2 * (u32::from(depth) + 1))
            .build(u32::from(depth) + 1)
            .map_err(fail("io_uring_setup"))?;
        let memory_bytes = usize::from(depth) * (PAGE + payload_bytes);
        let mut fuse_ring = FuseRing {
            ring: Some(ring),
            channel,
            queue,
            wake: Arc::new(wake),
            memory: map(memory_bytes).map_err(fail("mmap"))?,
            memory_bytes,
            payload_bytes,
            owners: vec![Owner::Us; usize::from(depth)],
            vectors: Vec::new(),
        };
        fuse_ring.vectors = (0..usize::from(depth)).map(|slot| fuse_ring.vector(slot)).collect();
        fuse_ring.watch_wake()?;
        Ok(fuse_ring)
    }

    /// Gives all slots to the kernel. Failures show as [`Event::Ended`]: `EAGAIN` before INIT was answered, `EOPNOTSUPP`
    /// when the kernel has FUSE over io_uring switched off, `EINVAL` for payloads that are too small.
    ///
    /// # Errors
    /// `EBUSY` when the ring is full, which its size rules out.
    pub fn register(&mut self) -> Result<()> {
        for slot in 0..self.owners.len() {
            self.give(slot, CMD_REGISTER)?;
        }
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
        let Some(ring) = &self.ring else { return Ok(()) };
        match ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(self.fail("io_uring_enter", error)),
        }
    }

    /// The next thing that has happened; `None`: wait again.
    ///
    /// # Errors
    /// As [`FuseRing::register`].
    pub fn next_event(&mut self) -> Result<Option<Event>> {
        let Some(ring) = &mut self.ring else { return Ok(None) };
        let Some(completion) = ring.completion().next() else { return Ok(None) };
        if completion.user_data() == WAKE {
            // Blocking, but the poll says that there is something.
            let _ = rustix::io::read(self.wake.as_ref(), &mut [0_u8; 8]);
            self.watch_wake()?;
            return Ok(Some(Event::Woken));
        }
        let slot = completion.user_data() as usize;
        let Some(owner) = self.owners.get_mut(slot) else { return Ok(None) };
        if completion.result() < 0 {
            *owner = Owner::Nobody;
            return Ok(Some(Event::Ended(-completion.result())));
        }
        *owner = Owner::Us;
        Ok(Some(Event::Request(slot)))
    }

    /// Whether any slot may still bring a request or wait for its reply.
    pub fn is_open(&self) -> bool {
        self.owners.iter().any(|owner| *owner != Owner::Nobody)
    }

    /// The header of a slot that is ours; empty for others.
    pub fn header(&self, slot: usize) -> &[u8] {
        if self.owners.get(slot) != Some(&Owner::Us) {
            return &[];
        }
        // SAFETY: the slot lies in our mapping, is ours until given away, which takes `&mut self`, and is initialised
        // (mapped as zeroes).
        unsafe { std::slice::from_raw_parts(self.at(slot, 0), HEADER_BYTES) }
    }

    fn header_mut(&mut self, slot: usize) -> &mut [u8] {
        if self.owners.get(slot) != Some(&Owner::Us) {
            return &mut [];
        }
        // SAFETY: as in `header`; `&mut self` makes it the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.at(slot, 0), HEADER_BYTES) }
    }

    /// The payload of a slot that is ours; empty for others. It begins on a page.
    pub fn payload_mut(&mut self, slot: usize) -> &mut [u8] {
        if self.owners.get(slot) != Some(&Owner::Us) {
            return &mut [];
        }
        // SAFETY: as in `header_mut`, with the bytes behind the header's page.
        unsafe { std::slice::from_raw_parts_mut(self.at(slot, PAGE), self.payload_bytes) }
    }

    /// How many bytes of payload came with the request in a slot that is ours.
    pub fn payload_size(&self, slot: usize) -> usize {
        let bytes = self.header(slot).get(PAYLOAD_SIZE..PAYLOAD_SIZE + 4);
        bytes.and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes) as usize
    }

    /// Answers the request in a slot: `header` is a struct fuse_out_header, `payload_length` bytes of the payload follow.
    /// The slot is the kernel's from then on. It is sent by the next [`FuseRing::wait`].
    ///
    /// # Errors
    /// `EINVAL` when the slot is not ours.
    pub fn reply(&mut self, slot: usize, header: &[u8; 16], payload_length: u32) -> Result<()> {
        let place = self.header_mut(slot);
        if place.is_empty() || payload_length as usize > self.payload_bytes {
            return Err(
                self.fail("FUSE_IO_URING_CMD_COMMIT", std::io::Error::from_raw_os_error(libc::EINVAL))
            );
        }
        let place = self.header_mut(slot);
        for (at, bytes) in [(0, &header[..]), (PAYLOAD_SIZE, &payload_length.to_ne_bytes()[..])] {
            if let Some(place) = place.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        }
        self.give(slot, CMD_COMMIT_AND_FETCH)
    }

    fn fail(&self, call: &'static str, error: std::io::Error) -> Error {
        Error::new(call, format!("FUSE queue {}", self.queue), error)
    }

    /// Where byte `offset` of a slot is.
    fn at(&self, slot: usize, offset: usize) -> *mut u8 {
        debug_assert!(slot < self.owners.len() && offset < PAGE + self.payload_bytes);
        self.memory.as_ptr().wrapping_add(slot * (PAGE + self.payload_bytes) + offset)
    }

    fn vector(&self, slot: usize) -> [libc::iovec; 2] {
        [
            libc::iovec { iov_base: self.at(slot, 0).cast(), iov_len: HEADER_BYTES },
            libc::iovec { iov_base: self.at(slot, PAGE).cast(), iov_len: self.payload_bytes },
        ]
    }

    /// Makes a slot the kernel's, with a command on it.
    fn give(&mut self, slot: usize, command: u32) -> Result<()> {
        let commit_id =
            self.header(slot).get(COMMIT_ID..COMMIT_ID + 8).and_then(|bytes| bytes.try_into().ok());
        let register = command == CMD_REGISTER;
        let mut submission: Submission = zerocopy::FromZeros::new_zeroed();
        submission.opcode = opcode::UringCmd80::CODE;
        submission.fd = self.channel.as_raw_fd();
        submission.cmd_op = command;
        submission.user_data = slot as u64;
        submission.command.qid = self.queue;
        if register {
            submission.addr =
                self.vectors.get(slot).map_or(0, |vector| vector.as_ptr().expose_provenance() as u64);
            submission.len = 2;
        } else {
            submission.command.commit_id = commit_id.map_or(0, u64::from_ne_bytes);
        }
        // SAFETY: an Entry128 is a struct io_uring_sqe of 128 bytes, plain old data of the same size (asserted above);
        // every field of `submission` lies where the kernel's struct has it.
        let entry = unsafe { std::mem::transmute::<Submission, squeue::Entry128>(submission) };
        self.push(&entry)?;
        if let Some(owner) = self.owners.get_mut(slot) {
            *owner = Owner::Kernel;
        }
        Ok(())
    }

    fn watch_wake(&mut self) -> Result<()> {
        let poll = opcode::PollAdd::new(types::Fd(self.wake.as_raw_fd()), libc::POLLIN as u32);
        self.push(&poll.build().user_data(WAKE).into())
    }

    fn push(&mut self, entry: &squeue::Entry128) -> Result<()> {
        let busy = || std::io::Error::from_raw_os_error(libc::EBUSY);
        let Some(ring) = &mut self.ring else { return Err(self.fail("io_uring_enter", busy())) };
        let mut submissions = ring.submission();
        // SAFETY: the memory that the entry names (slots, their vectors) lives as long as the kernel may use it: slots
        // until none is the kernel's, see `drop`; descriptors as long as the ring.
        let pushed = unsafe { submissions.push(entry) };
        drop(submissions);
        pushed.map_err(|_| self.fail("io_uring_enter", busy()))
    }
}

impl Drop for FuseRing {
    fn drop(&mut self) {
        // Cancels what is under way, but not at once.
        self.ring = None;
        if self.owners.contains(&Owner::Kernel) {
            // The kernel may yet write into it: a mapping that is never used again costs less than that.
            std::mem::forget(std::mem::take(&mut self.vectors));
            return;
        }
        // SAFETY: the mapping is ours, of this length, and neither the kernel nor anybody else has a reference into it.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.memory_bytes) };
    }
}

fn map(bytes: usize) -> std::io::Result<NonNull<u8>> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new anonymous mapping touches nothing that exists.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| std::io::Error::from_raw_os_error(libc::ENOMEM))
}

/// How many processors there may ever be: the number of queues that FUSE wants.
///
/// # Errors
/// Where sysfs cannot be read.
pub fn possible_processors() -> Result<u16> {
    const PATH: &str = "/sys/devices/system/cpu/possible";
    let text = std::fs::read_to_string(PATH).map_err(|error| Error::new("read", PATH, error))?;
    let last = text.trim().rsplit(['-', ',']).next().and_then(|number| number.parse::<u16>().ok());
    last.and_then(|last| last.checked_add(1))
        .ok_or_else(|| Error::new("read", PATH, std::io::Error::from(std::io::ErrorKind::InvalidData)))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn ring() -> FuseRing {
        let file = tempfile::tempfile().unwrap();
        FuseRing::new(file.as_fd(), 0, 4, 8192).unwrap()
    }

    #[test]
    fn slots_are_apart_and_ours_until_given() {
        let mut ring = ring();
        for slot in 0..4 {
            ring.payload_mut(slot).fill(slot as u8);
        }
        for slot in 0..4 {
            assert!(ring.payload_mut(slot).iter().all(|byte| *byte == slot as u8));
            assert_eq!((ring.payload_mut(slot).len(), ring.header(slot).len()), (8192, HEADER_BYTES));
        }
        assert!(ring.payload_mut(4).is_empty() && ring.header(4).is_empty());
        ring.register().unwrap();
        assert!(ring.payload_mut(0).is_empty() && ring.header(0).is_empty());
        assert!(ring.reply(0, &[0; 16], 0).is_err());
    }

    #[test]
    fn a_file_that_is_not_fuse_ends_all_slots() {
        let mut ring = ring();
        ring.register().unwrap();
        while ring.is_open() {
            ring.wait().unwrap();
            while let Some(event) = ring.next_event().unwrap() {
                assert!(matches!(event, Event::Ended(_)), "{event:?}");
            }
        }
    }

    #[test]
    fn waking_ends_a_wait_each_time() {
        let mut ring = ring();
        for _ in 0..3 {
            ring.waker().wake();
            ring.wait().unwrap();
            assert_eq!(ring.next_event().unwrap(), Some(Event::Woken));
        }
    }

    #[test]
    fn numbers_beyond_the_limits_are_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        for (depth, payload) in
            [(0, 4096), (DEPTH_MAX + 1, 4096), (1, 100), (1, 0), (1, 2 * PAYLOAD_BYTES_MAX)]
        {
            assert!(FuseRing::new(null.as_fd(), 0, depth, payload).is_err());
        }
        assert!(possible_processors().unwrap() >= 1);
    }
}
