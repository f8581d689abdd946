//! The threads of a device's queues: started and told to begin together, watched until they end.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use loam_block::BlockDevice;
use loam_sys::ublk::QueueOptions;
use tokio::runtime::Handle;

use super::device::Device;
use super::queue::Server as QueueServer;
use crate::Result;
use crate::fuse::{Counters, Stats, sum};

/// Between looks at whether the threads have ended.
const JOIN_POLL: Duration = Duration::from_millis(1);
/// How long queues wait for one another.
const MEET_TIMEOUT: Duration = Duration::from_secs(1);

/// What the threads of one device share.
pub(super) struct Shared {
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) runtime: Handle,
    /// Bytes of the device.
    pub(super) size: u64,
    /// The longest request in bytes.
    pub(super) io_bytes_max: u32,
    counters: Box<[Counters]>,
    /// How often a queue has come to a point that they pass together.
    met: AtomicUsize,
}

impl Shared {
    /// Returns when all queues have come here, within microseconds for all of them: a process that is killed between the
    /// beginnings of two queues leaves the kernel with half a server (which makes Linux before 6.16 stumble when the
    /// next one takes over). Gives up on those that do not come.
    pub(super) fn meet(&self) {
        let queues = self.counters.len();
        let round = self.met.fetch_add(1, Ordering::AcqRel) / queues + 1;
        let end = Instant::now() + MEET_TIMEOUT;
        while self.met.load(Ordering::Acquire) < round * queues && Instant::now() < end {
            std::thread::yield_now();
        }
    }

    pub(super) fn counters(&self, queue: u16) -> &Counters {
        &self.counters[usize::from(queue)]
    }

    /// Logs failed reads, ever more rarely: one bad region read over and over must not fill a disk.
    pub(super) fn log(&self, error: &loam_block::Error) {
        let errors = sum(self.counters.iter()).errors + 1;
        if errors.is_power_of_two() {
            tracing::warn!(?error, errors, "a read of the virtual device failed");
        }
    }
}

/// A device's threads. They end by themselves when the device is stopped; dropping this does not end them.
pub(super) struct Server {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    begin: Vec<Sender<Arc<OwnedFd>>>,
    begun: Receiver<Result<()>>,
}

impl Server {
    /// Starts a thread with a ring for each queue. None knows the device before [`Server::begin`].
    pub(super) fn start(device: Arc<dyn BlockDevice>, runtime: Handle, made: &Device) -> Result<Server> {
        let state = made.state();
        let counters = (0..state.queues).map(|_| Counters::default()).collect();
        let shared = Shared {
            device,
            runtime,
            size: state.size,
            io_bytes_max: state.io_bytes_max,
            counters,
            met: AtomicUsize::new(0),
        };
        let (prepared, all_prepared) = channel();
        let (report, begun) = channel();
        let mut server = Server { shared: Arc::new(shared), threads: Vec::new(), begin: Vec::new(), begun };
        for queue in 0..state.queues {
            let options = QueueOptions {
                queue,
                depth: state.depth,
                buffer_bytes: state.io_bytes_max as usize,
                transfer: state.data_path.transfer(),
            };
            let shared = Arc::clone(&server.shared);
            let (prepared, report) = (prepared.clone(), report.clone());
            let (begin, connect) = channel();
            let run = move || {
                super::queue::settle_thread();
                let queue = QueueServer::new(options, shared);
                let (queue, outcome) = match queue {
                    Ok(queue) => (Some(queue), Ok(())),
                    Err(error) => (None, Err(error)),
                };
                let _ = prepared.send(outcome);
                drop(prepared);
                if let Some(queue) = queue {
                    queue.run(&connect, report);
                }
            };
            let thread = std::thread::Builder::new().name(format!("loam-ublk-{queue}")).spawn(run);
            let thread = thread.map_err(|error| loam_sys::Error::new("clone", "a ublk thread", error))?;
            server.threads.push(thread);
            server.begin.push(begin);
        }
        drop(prepared);
        for outcome in all_prepared {
            // The other threads end when their senders are dropped.
            outcome?;
        }
        Ok(server)
    }

    /// Connects all queues to the device whose character device this is. Returns when the kernel has their tags.
    pub(super) fn begin(&self, device: OwnedFd) -> Result<()> {
        let device = Arc::new(device);
        for begin in &self.begin {
            let _ = begin.send(Arc::clone(&device));
        }
        drop(device);
        for _ in &self.begin {
            match self.begun.recv() {
                Ok(outcome) => outcome?,
                // All have reported, or ended without: they say why in the log.
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Counters.
    pub(super) fn stats(&self) -> Stats {
        sum(self.shared.counters.iter())
    }

    /// Waits until all threads are gone. Returns whether that happened in time.
    pub(super) fn wait(&mut self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        while !self.threads.iter().all(JoinHandle::is_finished) {
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(JOIN_POLL);
        }
        for thread in self.threads.drain(..) {
            // Panics of the device are caught where it is called; the loop itself has none to pass on.
            let _ = thread.join();
        }
        true
    }
}
