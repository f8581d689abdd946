//! One connection in its transmission phase, shared by the futures of its requests without a task of its own.
//!
//! Two roles go from request to request. The *sender* writes to the socket: header and payload from where the caller
//! holds them. The *leader* reads from it: a reply to itself is received straight into the caller's buffer; a reply to
//! another that carries no data is noted there and its future woken; one that carries data makes the leader hand its
//! role over. Whoever is done with a role names its successor. Locks are held for table look-ups, and by the holder of a
//! role (whom nobody disputes it) for calls that do not block.
//!
//! Futures may be dropped at any time. What comes for a request that is gone is read and forgotten; a request that was
//! sent by half takes the connection with it. A leader that is not polled any more loses the role ([`Link::tick`]).

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use tokio::io::AsyncWrite;
use tokio::sync::Notify;

use super::coverage::Coverage;
use super::failure::{Break, BreakKind, Failure};
use super::handshake::ContextIds;
use super::receive::Receiver;
use super::transport::Halves;
use crate::protocol::{Command, CommandFlags, HeaderStyle, NbdError, Request, StatusChunk};

/// Requests that one connection has in flight at most, those counted whose futures are gone. More wait.
const IN_FLIGHT_MAX: usize = 1024;

/// Reads from this length on are large: their payload is not taken into the receive buffer. In bytes.
pub(super) const LARGE_READ: u64 = 32 << 10;

/// Metadata contexts that are chosen at most.
pub(super) const CONTEXTS_MAX: usize = 2;

/// What kind of reply a request has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Data for a buffer.
    Data,
    /// Extents.
    Status,
    /// Only whether it went well.
    Nothing,
}

/// What a request is, as far as its reply is concerned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expected {
    pub(super) answer: Answer,
    pub(super) offset: u64,
    /// Bytes of the export.
    pub(super) length: u64,
    /// Bytes that cross the wire, either way.
    pub(super) payload: u64,
    /// Commands that may take long for good reason have more time.
    pub(super) slow: bool,
}

/// Data that was received for a request while its future was not polled.
pub(super) struct Parked {
    pub(super) at: usize,
    pub(super) bytes: Vec<u8>,
}

#[derive(PartialEq, Eq)]
enum Phase {
    Free,
    Live,
    /// Its future is gone, its reply is not.
    Abandoned,
    /// The reply is complete.
    Done,
}

/// A request in flight.
pub(super) struct Slot {
    /// Index, and in the upper half how often it was used: a late reply to an earlier use is not taken for this one's.
    cookie: u64,
    phase: Phase,
    pub(super) expected: Expected,
    waker: Waker,
    queued: bool,
    /// Ticks that passed since it began.
    age: u32,
    /// It was leader and did not come: its data is received for it.
    pub(super) absent: bool,
    pub(super) coverage: Coverage,
    pub(super) parked: Vec<Parked>,
    pub(super) status: Vec<StatusChunk>,
    pub(super) error: Option<(NbdError, String)>,
}

/// Whether somebody comes for the data of a request.
pub(super) enum Presence {
    /// Its future does.
    Here,
    /// It did not when it was called.
    Absent,
    /// It cannot: it was dropped.
    Gone,
}

impl Slot {
    pub(super) fn presence(&self) -> Presence {
        match self.phase {
            Phase::Abandoned => Presence::Gone,
            _ if self.absent => Presence::Absent,
            _ => Presence::Here,
        }
    }

    /// Notes that `length` bytes at `offset` of the export are answered.
    pub(super) fn covered(&mut self, offset: u64, length: u64, hole: bool) -> Result<(), &'static str> {
        let Expected { answer, offset: begin, length: total, .. } = self.expected;
        if answer != Answer::Data {
            return Err("no data was asked for");
        }
        let start = offset.checked_sub(begin).ok_or("it lies before what was asked")?;
        self.coverage.add(start, length, hole, total)
    }

    pub(super) fn note_status(&mut self, status: StatusChunk) -> Result<(), Break> {
        if self.status.iter().any(|other| other.context == status.context) {
            return Err(Break::content("a block status chunk", "its context was answered already"));
        }
        if self.status.len() == CONTEXTS_MAX {
            return Err(Break::content("a block status chunk", "there are more than contexts were chosen"));
        }
        self.status.push(status);
        Ok(())
    }

    /// Whether the reply may end now.
    pub(super) fn check_complete(&self) -> Result<(), Break> {
        match self.expected.answer {
            Answer::Data if !self.coverage.is_whole(self.expected.length) => {
                Err(Break::content("a reply", "it ends before all that was asked is answered"))
            }
            Answer::Status if self.status.is_empty() => {
                Err(Break::content("a reply", "it ends without the status that was asked for"))
            }
            _ => Ok(()),
        }
    }
}

/// The requests, and who holds which role.
pub(super) struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    live: usize,
    large_reads: usize,
    sender: Option<u32>,
    send_queue: VecDeque<u32>,
    pub(super) leader: Option<u32>,
    leader_came: bool,
    /// Futures that wait for a free slot.
    crowd: Vec<Waker>,
    broken: Option<Arc<Break>>,
    /// Nobody counts ticks: who begins a request wakes the clock.
    clock_stopped: bool,
}

/// What became of a whole request.
pub(super) struct Reply {
    pub(super) coverage: Coverage,
    pub(super) parked: Vec<Parked>,
    pub(super) status: Vec<StatusChunk>,
}

/// A connection in its transmission phase.
pub(super) struct Link {
    pub(super) style: HeaderStyle,
    pub(super) contexts: ContextIds,
    /// Which of the device's connections in time this is: 0 for those it began with.
    pub(super) epoch: u64,
    pub(super) receiver: Mutex<Receiver>,
    pub(super) writer: Mutex<Box<dyn AsyncWrite + Send + Unpin>>,
    table: Mutex<Table>,
    is_broken: AtomicBool,
    /// Bytes of the requests in flight, and something for each of them: what connections are chosen by.
    load: AtomicU64,
    in_flight: AtomicUsize,
    /// Bytes that were written and acknowledged, and not flushed since.
    pub(super) unflushed: AtomicU64,
    pub(super) clock: Arc<Notify>,
}

/// What a request weighs in [`Link::load`] beside its payload, in bytes.
const REQUEST_WEIGHT: u64 = 4096;

/// A lock whose holder cannot leave it half-changed: poison says nothing.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    pub(super) fn new(style: HeaderStyle, contexts: ContextIds, epoch: u64, halves: Halves) -> Self {
        let table = Table {
            slots: Vec::new(),
            free: Vec::new(),
            live: 0,
            large_reads: 0,
            sender: None,
            send_queue: VecDeque::new(),
            leader: None,
            leader_came: false,
            crowd: Vec::new(),
            broken: None,
            clock_stopped: false,
        };
        Link {
            style,
            contexts,
            epoch,
            receiver: Mutex::new(Receiver::new(halves.read)),
            writer: Mutex::new(halves.write),
            table: Mutex::new(table),
            is_broken: AtomicBool::new(false),
            load: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            unflushed: AtomicU64::new(0),
            clock: Arc::default(),
        }
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    /// How much it has to do, in bytes.
    pub(super) fn load(&self) -> u64 {
        self.load.load(Ordering::Relaxed)
    }

    /// Requests that it carries.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Whether it is of no use any more.
    pub(super) fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::SeqCst)
    }

    /// Gives the connection up: every request on it fails with `cause`. The first cause stays.
    pub(super) fn break_off(&self, cause: Break) -> Arc<Break> {
        let mut table = self.table();
        if let Some(cause) = &table.broken {
            return cause.clone();
        }
        let cause = Arc::new(cause);
        table.broken = Some(cause.clone());
        self.is_broken.store(true, Ordering::SeqCst);
        let mut wakers: Vec<Waker> = table.crowd.drain(..).collect();
        let waiting = table.slots.iter_mut().filter(|slot| slot.phase != Phase::Free);
        wakers.extend(waiting.map(|slot| std::mem::replace(&mut slot.waker, Waker::noop().clone())));
        drop(table);
        self.clock.notify_one();
        wakers.into_iter().for_each(Waker::wake);
        cause
    }

    /// Takes a slot for a request; `None` when there is none and the future has to wait.
    pub(super) fn enter(&self, expected: Expected, cx: &Context<'_>) -> Result<Option<(u32, u64)>, Failure> {
        let mut table = self.table();
        if let Some(cause) = &table.broken {
            return Err(Failure::Broken(cause.clone()));
        }
        if table.live == IN_FLIGHT_MAX {
            table.crowd.push(cx.waker().clone());
            return Ok(None);
        }
        let index = table.take_slot(expected, cx.waker());
        let cookie = table.slots[index as usize].cookie;
        let wake_clock = std::mem::take(&mut table.clock_stopped);
        drop(table);
        self.load.fetch_add(expected.payload + REQUEST_WEIGHT, Ordering::Relaxed);
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        if wake_clock {
            self.clock.notify_one();
        }
        Ok(Some((index, cookie)))
    }

    /// Asks for the role of the sender.
    pub(super) fn may_send(&self, me: u32, cx: &Context<'_>) -> Result<bool, Failure> {
        let mut table = self.table();
        if let Some(cause) = &table.broken {
            return Err(Failure::Broken(cause.clone()));
        }
        match table.sender {
            None => table.sender = Some(me),
            Some(sender) if sender == me => {}
            Some(_) => {
                let slot = &mut table.slots[me as usize];
                slot.waker.clone_from(cx.waker());
                if !std::mem::replace(&mut slot.queued, true) {
                    table.send_queue.push_back(me);
                }
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The sender is done: the next one is called.
    pub(super) fn sent(&self) {
        let mut table = self.table();
        let next = table.next_sender();
        drop(table);
        next.wake();
    }

    /// Takes the complete reply of `me`, if it is `wanted` yet; `me` is no request any more then.
    pub(super) fn take_reply(&self, me: u32, wanted: bool) -> Option<Result<Reply, Failure>> {
        let mut table = self.table();
        let slot = &mut table.slots[me as usize];
        if slot.phase != Phase::Done || !wanted {
            return table.broken.clone().map(|cause| Err(Failure::Broken(cause)));
        }
        let reply = match slot.error.take() {
            Some((error, message)) => Err(Failure::Refused { error, message }),
            None => Ok(Reply {
                coverage: std::mem::take(&mut slot.coverage),
                parked: std::mem::take(&mut slot.parked),
                status: std::mem::take(&mut slot.status),
            }),
        };
        self.leave(table, me);
        Some(reply)
    }

    /// The future of `me` is dropped. `begun` and `sent`: whether any, and all, of the request went out.
    pub(super) fn abandon(&self, me: u32, begun: bool, sent: bool) {
        let mut table = self.table();
        let mut next = Waker::noop().clone();
        if table.sender == Some(me) {
            next = table.next_sender();
        } else {
            table.send_queue.retain(|queued| *queued != me);
        }
        let mut leader = Waker::noop().clone();
        if table.leader == Some(me) {
            leader = table.choose_leader(Some(me)).map_or_else(|| leader, |index| table.take_waker(index));
        }
        let broken = table.broken.is_some();
        let slot = &mut table.slots[me as usize];
        if slot.phase == Phase::Done || !begun || broken {
            self.leave(table, me);
        } else {
            slot.phase = Phase::Abandoned;
            slot.waker = Waker::noop().clone();
            slot.parked = Vec::new();
            drop(table);
            if !sent {
                self.break_off(Break::new(BreakKind::HalfSent));
            }
        }
        next.wake();
        leader.wake();
    }

    fn leave(&self, mut table: MutexGuard<'_, Table>, index: u32) {
        let weight = table.release(index) + REQUEST_WEIGHT;
        let crowd = std::mem::take(&mut table.crowd);
        drop(table);
        self.load.fetch_sub(weight, Ordering::Relaxed);
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        crowd.into_iter().for_each(Waker::wake);
    }

    /// The reply to `index` is complete: its future is woken, or if there is none the slot is free.
    pub(super) fn complete(&self, mut table: MutexGuard<'_, Table>, index: u32) {
        let slot = &mut table.slots[index as usize];
        if slot.phase == Phase::Abandoned {
            return self.leave(table, index);
        }
        slot.phase = Phase::Done;
        let waker = table.take_waker(index);
        drop(table);
        waker.wake();
    }

    /// A quarter of a second or so went by. Breaks the connection when a request is older than its limit in ticks, and
    /// takes the role of leader from who was not polled since the last tick while others wait. Whether there was
    /// anything in flight.
    pub(super) fn tick(&self, limit: u32, slow_limit: u32) -> bool {
        let mut table = self.table();
        let mut late = false;
        for slot in table.slots.iter_mut().filter(|slot| matches!(slot.phase, Phase::Live | Phase::Abandoned))
        {
            slot.age += 1;
            late |= slot.age > if slot.expected.slow { slow_limit } else { limit };
        }
        if late {
            drop(table);
            self.break_off(Break::new(BreakKind::TimedOut));
            return false;
        }
        let mut wakers = [Waker::noop().clone(), Waker::noop().clone()];
        let came = std::mem::take(&mut table.leader_came);
        if let Some(leader) = table.leader.filter(|_| !came && table.live > 1) {
            if let Some(next) = table.choose_leader(Some(leader)) {
                // It may only have had nothing to do: woken, it is there again.
                table.slots[leader as usize].absent = true;
                wakers = [table.take_waker(next), table.take_waker(leader)];
            } else {
                table.leader = Some(leader);
            }
        }
        let busy = table.live > 0;
        table.clock_stopped = !busy;
        drop(table);
        wakers.into_iter().for_each(Waker::wake);
        busy
    }

    /// Tells the server that this was all, if that goes without waiting.
    pub(super) fn say_goodbye(&self) {
        {
            let table = self.table();
            if table.sender.is_some() || table.broken.is_some() {
                return;
            }
        }
        let (flags, command) = (CommandFlags::empty(), Command::Disconnect);
        let request = Request { flags, command, cookie: 0, offset: 0, length: 0 };
        let header = match self.style {
            HeaderStyle::Extended => request.encode_extended().to_vec(),
            _ => request.encode_compact().map_or_else(Vec::new, Vec::from),
        };
        let mut writer = lock(&self.writer);
        let cx = &mut Context::from_waker(Waker::noop());
        let _ = Pin::new(&mut *writer).poll_write(cx, &header);
        let _ = Pin::new(&mut *writer).poll_shutdown(cx);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Who counts its time sees that it is gone.
        self.clock.notify_one();
    }
}

impl Table {
    fn take_slot(&mut self, expected: Expected, waker: &Waker) -> u32 {
        self.live += 1;
        self.large_reads += usize::from(expected.answer == Answer::Data && expected.length >= LARGE_READ);
        let index = self.free.pop().unwrap_or(self.slots.len() as u32);
        let uses = self.slots.get(index as usize).map_or(0, |slot| slot.cookie >> 32);
        let slot = Slot {
            cookie: (uses + 1) << 32 | u64::from(index),
            phase: Phase::Live,
            expected,
            waker: waker.clone(),
            queued: false,
            age: 0,
            absent: false,
            coverage: Coverage::default(),
            parked: Vec::new(),
            status: Vec::new(),
            error: None,
        };
        match self.slots.get_mut(index as usize) {
            Some(old) => *old = slot,
            None => self.slots.push(slot),
        }
        index
    }

    /// Frees a slot; returns its payload in bytes.
    fn release(&mut self, index: u32) -> u64 {
        let slot = &mut self.slots[index as usize];
        slot.phase = Phase::Free;
        slot.waker = Waker::noop().clone();
        self.live -= 1;
        let expected = slot.expected;
        self.large_reads -= usize::from(expected.answer == Answer::Data && expected.length >= LARGE_READ);
        self.free.push(index);
        expected.payload
    }

    /// Whether the reply to `me` is complete.
    pub(super) fn is_done(&self, me: u32) -> bool {
        self.slots[me as usize].phase == Phase::Done
    }

    /// Whether large replies may come, of which only the header is to go through the receive buffer.
    pub(super) fn expects_large(&self) -> bool {
        self.large_reads > 0
    }

    /// The slot that a reply belongs to; `None` for one that was never asked for, or is answered already.
    pub(super) fn find(&mut self, cookie: u64) -> Option<(u32, &mut Slot)> {
        let index = cookie as u32;
        let slot = self.slots.get_mut(index as usize).filter(|slot| slot.cookie == cookie)?;
        matches!(slot.phase, Phase::Live | Phase::Abandoned).then_some((index, slot))
    }

    pub(super) fn slot(&mut self, index: u32) -> &mut Slot {
        &mut self.slots[index as usize]
    }

    /// Notes that the future of `me` was polled. Whether it is leader, or has become it because nobody was.
    pub(super) fn lead(&mut self, me: u32, cx: &Context<'_>) -> bool {
        let slot = &mut self.slots[me as usize];
        slot.waker.clone_from(cx.waker());
        slot.absent = false;
        if *self.leader.get_or_insert(me) != me {
            return false;
        }
        self.leader_came = true;
        true
    }

    /// Makes a live request other than `not` leader, if there is one.
    pub(super) fn choose_leader(&mut self, not: Option<u32>) -> Option<u32> {
        let count = self.slots.len();
        let from = not.map_or(0, |index| index as usize + 1);
        let live = |index: &u32| self.slots[*index as usize].phase == Phase::Live && not != Some(*index);
        let mut candidates = (from..from + count).map(|index| (index % count) as u32).filter(live);
        let first = candidates.next();
        let present = |index: &u32| !self.slots[*index as usize].absent;
        self.leader = first.into_iter().chain(candidates).find(present).or(first);
        self.leader
    }

    pub(super) fn waker(&self, index: u32) -> &Waker {
        &self.slots[index as usize].waker
    }

    /// The waker of `index`, which is about to be woken and leaves another when it is polled.
    pub(super) fn take_waker(&mut self, index: u32) -> Waker {
        std::mem::replace(&mut self.slots[index as usize].waker, Waker::noop().clone())
    }

    fn next_sender(&mut self) -> Waker {
        self.sender = self.send_queue.pop_front();
        match self.sender {
            Some(next) => {
                self.slots[next as usize].queued = false;
                self.take_waker(next)
            }
            None => Waker::noop().clone(),
        }
    }
}
